//! How our own tools are declared to models.

use reliant_types::{limits, pb};
use serde_json::{Value, json};

use super::{is_read_only, sandbox::Sandbox};

fn tool(name: &str, description: String, properties: Value, required: &[&str]) -> pb::ToolDeclaration {
    let schema = json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    });
    pb::ToolDeclaration {
        name: name.into(),
        description,
        input_schema_json: schema.to_string(),
        read_only: is_read_only(name),
        root_id: String::new(),
    }
}

fn path(what: &str) -> Value {
    json!({"type": "string", "description": format!("{what}, relative to the project root")})
}

pub fn own(sandbox: &Sandbox, bench_tools: bool) -> Vec<pb::ToolDeclaration> {
    let timeout = limits::TOOL_TIMEOUT.as_secs();
    let timeout_max = limits::TOOL_TIMEOUT_MAX.as_secs();
    let mut tools = vec![
        tool(
            "shell",
            format!(
                "Runs a command with bash in the project root and returns its output (stdout and stderr) and exit code. \
                 There is no terminal and no input. {}",
                sandbox.sentence()
            ),
            json!({
                "command": {"type": "string", "description": "The command line"},
                "timeout_seconds": {
                    "type": "integer", "minimum": 1, "maximum": timeout_max,
                    "description": format!("The command and all it started are killed after this time; default {timeout}"),
                },
            }),
            &["command"],
        ),
        tool(
            "read_file",
            "Reads a text file, with line numbers.".into(),
            json!({
                "path": path("The file"),
                "offset": {"type": "integer", "minimum": 1, "description": "First line to read, from 1"},
                "limit": {"type": "integer", "minimum": 1, "description": "Lines to read; default 2000"},
            }),
            &["path"],
        ),
        tool(
            "write_file",
            "Writes a whole file, replacing what was there; makes missing directories. Refused once when the file changed since it was last read.".into(),
            json!({
                "path": path("The file"),
                "content": {"type": "string", "description": "The file's whole content"},
            }),
            &["path", "content"],
        ),
        tool(
            "edit_file",
            "Replaces an exact piece of a text file. The piece must occur exactly once, unless replace_all is set.".into(),
            json!({
                "path": path("The file"),
                "old_string": {"type": "string", "description": "The piece to replace, exactly as it is in the file, without line numbers"},
                "new_string": {"type": "string", "description": "What to put in its place"},
                "replace_all": {"type": "boolean", "description": "Replace every occurrence; default false"},
            }),
            &["path", "old_string", "new_string"],
        ),
        tool(
            "list_dir",
            "Lists a directory: directories first, then files with their sizes.".into(),
            json!({"path": path("The directory; default the project root")}),
            &[],
        ),
        tool(
            "glob",
            "Finds files by a pattern such as **/*.rs, newest first. What .gitignore names is left out.".into(),
            json!({
                "pattern": {"type": "string", "description": "The pattern; ** crosses directories"},
                "path": path("The directory to look in; default the project root"),
            }),
            &["pattern"],
        ),
        tool(
            "grep",
            "Searches file contents by a regular expression (Rust syntax). What .gitignore names, and binary files, are left out.".into(),
            json!({
                "pattern": {"type": "string", "description": "The regular expression"},
                "path": path("The file or directory to search; default the project root"),
                "glob": {"type": "string", "description": "Only files that fit this pattern, for example *.rs"},
                "ignore_case": {"type": "boolean", "description": "Default false"},
                "literal": {"type": "boolean", "description": "Take the pattern as plain text; default false"},
                "context": {"type": "integer", "minimum": 0, "maximum": 10, "description": "Lines to show before and after each match; default 0"},
                "files_only": {"type": "boolean", "description": "Show only the names of files with a match; default false"},
                "limit": {"type": "integer", "minimum": 1, "maximum": 2000, "description": "Matches to show; default 200"},
            }),
            &["pattern"],
        ),
    ];
    if bench_tools {
        tools.push(tool("noop", "Does nothing. For measurements.".into(), json!({}), &[]));
    }
    tools
}
