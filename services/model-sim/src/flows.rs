//! The default script: it says what it is, and runs real tools for four prompts, with what the request offers.

use serde_json::{Map, Value, json};

use crate::{
    answer::Answer,
    ask::{Ask, Tool},
    schema,
};

pub const SHELL_PROMPT: &str = "run a shell command";
pub const EDIT_PROMPT: &str = "edit a file";
pub const MCP_PROMPT: &str = "ask an MCP server";
pub const DEMO_PROMPT: &str = "demo";

/// What is shown of one result.
const SHOWN_BYTES: usize = 1200;

const INTRODUCTION: &str = "I am Reliant's model simulator, not a real model: whatever you write, I answer with this text. \
To talk to a real model, set OPENAI_API_KEY or ANTHROPIC_API_KEY and start Reliant again (OPENAI_BASE_URL names a compatible \
server, for example Ollama).

Three prompts show what works without one. They run real tools on your machine:

- run a shell command
- edit a file
- ask an MCP server
";

const MCP_HELP: &str = "No MCP server is configured here. Put a file `.mcp.json` into the project's root, for example

```json
{\"mcpServers\": {\"time\": {\"command\": \"uvx\", \"args\": [\"mcp-server-time\"]}}}
```

trust it when you are asked, and send this prompt again.
";

/// One thing to do, and what is said before it.
struct Step {
    say: String,
    tool: String,
    args: Value,
}

pub fn answer(ask: &Ask, answer: &mut Answer) {
    let prompt = ask.prompt().trim().trim_end_matches(['.', '!']).to_lowercase();
    let mut missing = Vec::new();
    let mut steps = Vec::new();
    if prompt == DEMO_PROMPT {
        shell(ask, "git status --short --branch", &mut steps, &mut missing);
        edit(ask, "reliant-demo.txt", &mut steps, &mut missing);
        // A demo without a server is still a demo.
        mcp(ask, &mut steps, &mut Vec::new());
    } else if prompt.contains(SHELL_PROMPT) {
        shell(ask, "uname -a; git status --short 2>/dev/null || true", &mut steps, &mut missing);
    } else if prompt.contains(EDIT_PROMPT) {
        edit(ask, "reliant-hello.txt", &mut steps, &mut missing);
    } else if prompt.contains(&MCP_PROMPT.to_lowercase()) {
        mcp(ask, &mut steps, &mut missing);
    } else {
        answer.text(INTRODUCTION);
        return;
    }
    match steps.get(ask.round()) {
        Some(step) => {
            answer.text(&step.say);
            answer.tool(&step.tool, &step.args.to_string());
        }
        None => {
            let mut text = if ask.round() > 0 { summary(ask) } else { String::new() };
            for sentence in missing {
                text.push_str(&sentence);
                text.push('\n');
            }
            answer.text(&text);
        }
    }
}

fn shell(ask: &Ask, command: &str, steps: &mut Vec<Step>, missing: &mut Vec<String>) {
    match ask.tool("shell") {
        Some(tool) => steps.push(Step {
            say: format!("I run `{command}`.\n"),
            tool: tool.name.clone(),
            args: with(tool, &[(&["command", "cmd", "script"], command)]),
        }),
        None => missing.push(no_tool("shell")),
    }
}

fn edit(ask: &Ask, path: &str, steps: &mut Vec<Step>, missing: &mut Vec<String>) {
    let before = "Hello from the simulator.";
    let after = "Hello from Reliant: this line was edited.";
    let (Some(write), Some(edit)) = (ask.tool("write_file"), ask.tool("edit_file")) else {
        missing.push(no_tool("write_file and edit_file"));
        return;
    };
    let path_names: &[&str] = &["path", "file_path", "file"];
    let content = format!("{before}\n");
    steps.push(Step {
        say: format!("I write `{path}`.\n"),
        tool: write.name.clone(),
        args: with(write, &[(path_names, path), (&["content", "text", "contents"], &content)]),
    });
    steps.push(Step {
        say: "Now I edit it.\n".into(),
        tool: edit.name.clone(),
        args: with(
            edit,
            &[
                (path_names, path),
                (&["old_string", "old_text", "old", "search"], before),
                (&["new_string", "new_text", "new", "replace"], after),
            ],
        ),
    });
}

fn mcp(ask: &Ask, steps: &mut Vec<Step>, missing: &mut Vec<String>) {
    // Tools that are known to be harmless come first.
    let rank = |tool: &Tool| {
        let name = tool.name.rsplit("__").next().unwrap_or_default();
        [name.contains("current_time"), name.contains("echo"), name.contains("time")]
            .iter()
            .position(|fits| *fits)
            .unwrap_or(3)
    };
    match ask.tools.iter().filter(|tool| tool.name.starts_with("mcp__")).min_by_key(|tool| rank(tool)) {
        Some(tool) => steps.push(Step {
            say: format!("I ask the MCP server by `{}`.\n", tool.name),
            tool: tool.name.clone(),
            args: schema::arguments(&tool.schema),
        }),
        None => missing.push(MCP_HELP.into()),
    }
}

fn no_tool(name: &str) -> String {
    format!(
        "I cannot show this: no {name} tool is offered to me. Either the chat has no daemon selected, or the daemon is away, or \
         the chat is in plan mode."
    )
}

/// Arguments under the names that the tool's schema has; whatever else it requires is made up.
fn with(tool: &Tool, values: &[(&[&str], &str)]) -> Value {
    let properties = &tool.schema["properties"];
    let mut args = match schema::arguments(&tool.schema) {
        Value::Object(args) => args,
        _ => Map::new(),
    };
    for (names, value) in values {
        let name = names.iter().find(|name| properties.get(**name).is_some()).unwrap_or(&names[0]);
        args.insert((*name).to_owned(), json!(value));
    }
    Value::Object(args)
}

/// What came of the tool calls since the person's last message.
pub fn summary(ask: &Ask) -> String {
    let outcomes = ask.outcomes();
    let failed = outcomes.iter().filter(|outcome| outcome.is_error).count();
    let mut text = match (outcomes.len(), failed) {
        (1, 0) => "Done: 1 tool call succeeded.\n".to_owned(),
        (count, 0) => format!("Done: {count} tool calls succeeded.\n"),
        (count, failed) => format!("Done: of {count} tool calls {failed} failed.\n"),
    };
    for outcome in outcomes {
        let word = if outcome.is_error { "failed" } else { "succeeded" };
        let content = outcome.content.trim_end();
        let shown = &content[..content.floor_char_boundary(SHOWN_BYTES)];
        let more = if shown.len() < content.len() { "\n…" } else { "" };
        text.push_str(&format!("\n`{}` {word}:\n\n```\n{shown}{more}\n```\n", outcome.tool));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        answer::Block,
        ask::{AskCall, Item},
    };

    fn tool(name: &str, properties: &[&str]) -> Tool {
        let all: Map<String, Value> =
            properties.iter().map(|name| ((*name).to_owned(), json!({ "type": "string" }))).collect();
        Tool { name: name.into(), schema: json!({ "type": "object", "properties": all, "required": properties }) }
    }

    /// Runs a prompt to its end; the calls as (tool, arguments), and the last text.
    fn play(prompt: &str, tools: Vec<Tool>) -> (Vec<(String, Value)>, String) {
        let mut ask = Ask { items: vec![Item::User(prompt.into())], tools, ..Ask::default() };
        let mut calls = Vec::new();
        loop {
            let mut said = Answer::default();
            answer(&ask, &mut said);
            match &said.blocks[..] {
                [Block::Text(text)] => return (calls, text.concat()),
                [Block::Text(_), Block::Tool { name, args, .. }] => {
                    calls.push((name.clone(), serde_json::from_str(&args.concat()).unwrap()));
                    let id = calls.len().to_string();
                    let call = AskCall { id: id.clone(), name: name.clone() };
                    ask.items.push(Item::Assistant { text: String::new(), calls: vec![call] });
                    ask.items.push(Item::Result { id, content: format!("output {}", calls.len()), is_error: false });
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn all_tools() -> Vec<Tool> {
        vec![
            tool("shell", &["command"]),
            tool("write_file", &["path", "content"]),
            tool("edit_file", &["path", "old_string", "new_string"]),
            tool("mcp__time__convert_time", &["time"]),
            tool("mcp__time__get_current_time", &["timezone"]),
        ]
    }

    #[test]
    fn the_demo_uses_all() {
        let (calls, text) = play("demo", all_tools());
        let names: Vec<&str> = calls.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["shell", "write_file", "edit_file", "mcp__time__get_current_time"]);
        assert_eq!(calls[3].1, json!({ "timezone": "UTC" }));
        assert!(text.contains("4 tool calls succeeded") && text.contains("output 3"), "{text}");
        assert_eq!(play("Demo.", vec![tool("shell", &["command"])]).0.len(), 1);
    }

    #[test]
    fn the_offered_prompts_work_and_others_are_answered() {
        for prompt in [SHELL_PROMPT, EDIT_PROMPT, MCP_PROMPT] {
            assert!(INTRODUCTION.contains(prompt), "{prompt}");
            assert!(!play(&format!("Please {prompt}!"), all_tools()).0.is_empty(), "{prompt}");
            let (calls, text) = play(prompt, Vec::new());
            assert!(calls.is_empty() && !text.is_empty(), "{prompt}");
        }
        assert!(play(MCP_PROMPT, Vec::new()).1.contains(".mcp.json"));
        assert!(play("how are you?", all_tools()).1.contains("OPENAI_API_KEY"));
    }
}
