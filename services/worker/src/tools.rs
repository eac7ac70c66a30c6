//! Which tools a chat offers, and whether a call that a model wrote may run.
//!
//! A model's call is untrusted text: its tool must be offered, its arguments must be a JSON object that fits the tool's
//! schema, and the chat's mode must allow it. What is refused never reaches a daemon; the model reads why.

use std::time::Duration;

use reliant_types::{Code, Failure, limits, pb};
use serde_json::Value;

use crate::schema;

/// Our own tools without side effects: they may run again by themselves.
const READ_ONLY: &[&str] = &["read_file", "list_dir", "glob", "grep"];
/// A schema larger than this is not read for each call; daemons send none (limits.rs).
const SCHEMA_MAX_BYTES: usize = 64 * 1024;

/// Whether a tool changes nothing. The declaration alone is not enough: an MCP server's hint is not believed.
pub fn is_read_only(tool: &pb::ToolDeclaration) -> bool {
    tool.read_only && READ_ONLY.contains(&tool.name.as_str())
}

/// The tools of a daemon that fit the chat's root and mode: our own first as they are declared, then those of MCP
/// servers by name. So the order does not change when a server comes up again, and a prompt's cache keeps working.
pub fn offered<'a>(tools: &'a [pb::ToolDeclaration], root: &str, mode: pb::ChatMode) -> Vec<&'a pb::ToolDeclaration> {
    let fits = |tool: &&pb::ToolDeclaration| {
        (tool.root_id.is_empty() || tool.root_id == root) && (mode != pb::ChatMode::Plan || is_read_only(tool))
    };
    let (mut offered, mut mcp): (Vec<_>, Vec<_>) = tools.iter().filter(fits).partition(|tool| !is_mcp(tool));
    mcp.sort_by_key(|tool| &tool.name);
    offered.append(&mut mcp);
    offered.truncate(limits::DAEMON_TOOLS_MAX);
    offered
}

fn is_mcp(tool: &pb::ToolDeclaration) -> bool {
    tool.name.starts_with("mcp__")
}

/// Keeps what the model takes in one request. Where that is less, the chat is told by this sentence.
pub fn keep_at_most(offered: &mut Vec<&pb::ToolDeclaration>, max: usize) -> Option<String> {
    let all = offered.len();
    if all <= max {
        return None;
    }
    offered.truncate(max);
    Some(format!(
        "This chat has {all} tools and the model takes at most {max}, so {} of them are not offered to it: Reliant's own come \
         first, then those of MCP servers by name. Remove servers from .mcp.json that this project does not need.",
        all - max
    ))
}

/// What the chat's mode and the tool's schema say of a call.
#[derive(Debug, PartialEq)]
pub struct Verdict {
    pub read_only: bool,
    pub needs_approval: bool,
    pub timeout: Duration,
    /// The call does not run; the model reads this.
    pub refused: Option<Failure>,
}

/// Judges one call. `declared` are all tools of the daemon for this root, `mode` decides which of them are allowed;
/// `timeout` is that of calls that ask for none.
pub fn judge(
    timeout: Duration,
    declared: &[&pb::ToolDeclaration],
    mode: pb::ChatMode,
    tool: &str,
    input: &str,
) -> Verdict {
    let found = declared.iter().find(|candidate| candidate.name == tool);
    let read_only = found.is_some_and(|tool| is_read_only(tool));
    let parsed = parse(input);
    let refused = match (found, &parsed) {
        (None, _) => Some(unknown(declared, tool)),
        (Some(_), _) if mode == pb::ChatMode::Plan && !read_only => Some(Failure::new(
            Code::ToolNotAllowed,
            format!("{tool} is not allowed in plan mode, which only looks; describe the change in your plan instead"),
        )),
        (Some(_), Err(failure)) => Some(failure.clone()),
        (Some(declaration), Ok(value)) => check(declaration, value),
    };
    Verdict {
        read_only,
        needs_approval: refused.is_none() && !read_only && mode != pb::ChatMode::Auto,
        timeout: timeout_of(tool, parsed.as_ref().ok()).unwrap_or(timeout),
        refused,
    }
}

/// What of the arguments does not fit the tool's schema. One that is no schema, or too large, checks nothing: the tool
/// judges its arguments itself.
fn check(tool: &pb::ToolDeclaration, arguments: &Value) -> Option<Failure> {
    if tool.input_schema_json.len() > SCHEMA_MAX_BYTES {
        return None;
    }
    let schema = serde_json::from_str(&tool.input_schema_json).ok()?;
    let mistakes = schema::mistakes(&schema, arguments);
    (!mistakes.is_empty()).then(|| {
        let text = format!("the arguments do not fit {}'s schema: {}", tool.name, mistakes.join("; "));
        Failure::new(Code::ToolArgumentsInvalid, text)
    })
}

fn parse(input: &str) -> Result<Value, Failure> {
    let invalid = |text: String| Err(Failure::new(Code::ToolArgumentsInvalid, text));
    if input.len() > limits::TOOL_INPUT_MAX_BYTES {
        return invalid(format!("the arguments are larger than {} KiB", limits::TOOL_INPUT_MAX_BYTES / 1024));
    }
    // A tool without arguments is often called with nothing at all.
    let text = if input.trim().is_empty() { "{}" } else { input };
    match serde_json::from_str::<Value>(text) {
        Ok(value) if value.is_object() => Ok(value),
        Ok(_) => invalid("the arguments must be a JSON object".to_owned()),
        Err(error) => invalid(format!("the arguments are not valid JSON: {error}")),
    }
}

fn unknown(declared: &[&pb::ToolDeclaration], tool: &str) -> Failure {
    let name: String = tool.chars().take(100).collect();
    if declared.is_empty() {
        return Failure::new(
            Code::ToolUnknown,
            format!("there is no tool '{name}': no machine offers tools to this chat"),
        );
    }
    let names: Vec<_> = declared.iter().map(|tool| tool.name.as_str()).take(50).collect();
    Failure::new(Code::ToolUnknown, format!("there is no tool '{name}'; there are: {}", names.join(", ")))
}

/// A shell call may ask for its own limit; elsewhere an argument of that name means what its tool says.
fn timeout_of(tool: &str, input: Option<&Value>) -> Option<Duration> {
    let asked = input.filter(|_| tool == "shell").and_then(|input| input.get("timeout_seconds")?.as_u64());
    asked.filter(|seconds| *seconds > 0).map(|seconds| Duration::from_secs(seconds).min(limits::TOOL_TIMEOUT_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str, read_only: bool, root: &str) -> pb::ToolDeclaration {
        let schema = r#"{"type":"object","properties":{"path":{"type":"string"}},"required":["path"],"additionalProperties":false}"#;
        pb::ToolDeclaration {
            name: name.into(),
            read_only,
            root_id: root.into(),
            input_schema_json: schema.into(),
            ..Default::default()
        }
    }

    #[test]
    fn tools_are_offered_by_root_and_mode() {
        let tools = [tool("read_file", true, ""), tool("write_file", false, ""), tool("mcp__a__b", true, "one")];
        let names = |root, mode| offered(&tools, root, mode).iter().map(|t| t.name.clone()).collect::<Vec<_>>();
        assert_eq!(names("one", pb::ChatMode::Auto), ["read_file", "write_file", "mcp__a__b"]);
        assert_eq!(names("two", pb::ChatMode::Ask), ["read_file", "write_file"]);
        assert_eq!(names("one", pb::ChatMode::Plan), ["read_file"], "an MCP server's hint is not believed");
    }

    #[test]
    fn our_own_tools_come_first_and_what_a_model_cannot_take_is_said() {
        let mut tools: Vec<_> = (0..200).rev().map(|n| tool(&format!("mcp__s__{n:03}"), false, "")).collect();
        tools.insert(70, tool("shell", false, ""));
        tools.push(tool("read_file", true, ""));
        let mut list = offered(&tools, "", pb::ChatMode::Auto);
        let notice = keep_at_most(&mut list, 128).unwrap();
        assert!(notice.contains("202 tools") && notice.contains("74 of them"), "{notice}");
        let names: Vec<_> = list.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(
            (names.len(), &names[..3], names[127]),
            (128, &["shell", "read_file", "mcp__s__000"][..], "mcp__s__125")
        );
        assert_eq!(keep_at_most(&mut list, 128), None);
    }

    #[test]
    fn calls_are_judged() {
        let tools = [tool("read_file", true, ""), tool("write_file", false, "")];
        let declared: Vec<_> = tools.iter().collect();
        let check = |mode, tool: &str, input: &str| {
            let verdict = judge(limits::TOOL_TIMEOUT, &declared, mode, tool, input);
            (verdict.refused.map(|failure| failure.code), verdict.needs_approval)
        };
        use pb::ChatMode::{Ask, Auto, Plan};
        assert_eq!(check(Ask, "read_file", r#"{"path":"a"}"#), (None, false));
        assert_eq!(check(Ask, "write_file", r#"{"path":"a"}"#), (None, true));
        assert_eq!(check(Auto, "write_file", r#"{"path":"a"}"#), (None, false));
        assert_eq!(check(Plan, "write_file", r#"{"path":"a"}"#), (Some(Code::ToolNotAllowed), false));
        assert_eq!(check(Auto, "rm", "{}"), (Some(Code::ToolUnknown), false));
        for bad in ["{}", "[]", "{", r#"{"path":1}"#, r#"{"path":"a","x":1}"#, "null", ""] {
            assert_eq!(check(Auto, "read_file", bad), (Some(Code::ToolArgumentsInvalid), false), "{bad}");
        }
    }

    #[test]
    fn a_broken_schema_checks_nothing_and_a_limit_may_be_asked_for() {
        let broken = pb::ToolDeclaration { input_schema_json: r#"{"type":12}"#.into(), ..tool("x", false, "") };
        let verdict = judge(limits::TOOL_TIMEOUT, &[&broken], pb::ChatMode::Auto, "x", r#"{"timeout_seconds":5}"#);
        assert_eq!((verdict.refused, verdict.timeout), (None, limits::TOOL_TIMEOUT));
        let asked = |seconds: u64| timeout_of("shell", Some(&serde_json::json!({ "timeout_seconds": seconds })));
        assert_eq!(asked(5), Some(Duration::from_secs(5)));
        assert_eq!(asked(u64::MAX), Some(limits::TOOL_TIMEOUT_MAX));
        assert_eq!(asked(0), None);
    }
}
