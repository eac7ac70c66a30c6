//! A request, whichever wire format it came in, and how one is refused.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::Value;

/// What is read of a model request.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    /// Without a leading "sim/".
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
    pub items: Vec<Item>,
    pub tools: Vec<Tool>,
    /// Size of the request, for its usage.
    pub bytes: usize,
}

#[derive(Debug, Clone, PartialEq, Hash)]
pub enum Item {
    User(String),
    Assistant { text: String, calls: Vec<AskCall> },
    Result { id: String, content: String, is_error: bool },
}

#[derive(Debug, Clone, PartialEq, Hash)]
pub struct AskCall {
    pub id: String,
    pub name: String,
}

#[derive(Debug, Clone)]
pub struct Tool {
    pub name: String,
    pub schema: Value,
}

/// A tool's result together with the tool's name.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome<'a> {
    pub tool: &'a str,
    pub content: &'a str,
    pub is_error: bool,
}

impl Ask {
    fn latest(&self) -> usize {
        self.items.iter().rposition(|item| matches!(item, Item::User(_))).unwrap_or(0)
    }

    /// The person's last message.
    pub fn prompt(&self) -> &str {
        match self.items.get(self.latest()) {
            Some(Item::User(text)) => text,
            _ => "",
        }
    }

    /// The person's first message.
    pub fn first_prompt(&self) -> &str {
        self.items
            .iter()
            .find_map(|item| match item {
                Item::User(text) => Some(text.as_str()),
                _ => None,
            })
            .unwrap_or("")
    }

    /// Tool rounds since the person's last message.
    pub fn round(&self) -> usize {
        let since = self.items.iter().skip(self.latest());
        since.filter(|item| matches!(item, Item::Assistant { calls, .. } if !calls.is_empty())).count()
    }

    /// Tool results since the person's last message.
    pub fn outcomes(&self) -> Vec<Outcome<'_>> {
        let since = &self.items[self.latest().min(self.items.len())..];
        let mut calls: Vec<&AskCall> = Vec::new();
        let mut outcomes = Vec::new();
        for item in since {
            match item {
                Item::Assistant { calls: asked, .. } => calls = asked.iter().collect(),
                Item::Result { id, content, is_error } => {
                    let tool = calls.iter().find(|call| call.id == *id).map_or("?", |call| call.name.as_str());
                    outcomes.push(Outcome { tool, content, is_error: *is_error });
                }
                Item::User(_) => {}
            }
        }
        outcomes
    }

    pub fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    /// The same for the same conversation.
    pub fn hash(&self) -> u64 {
        hash(&(&self.model, &self.items))
    }
}

pub fn hash(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// An answer with an error status.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    pub status: u16,
    /// The provider's `error.type`; both providers use the same words for what is refused here.
    pub kind: &'static str,
    pub message: String,
    pub retry_after: Option<f64>,
}

impl Refusal {
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { status: 400, kind: "invalid_request_error", message: message.into(), retry_after: None }
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self { status: 404, kind: "not_found_error", ..Self::invalid(message) }
    }
}

/// A tool's name as both providers take it; `max` differs.
pub fn check_tool_name(name: &str, max: usize) -> Result<(), Refusal> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if name.is_empty() || name.len() > max || !name.chars().all(fine) {
        return Err(Refusal::invalid(format!("tool name '{name}' does not match '^[a-zA-Z0-9_-]{{1,{max}}}$'")));
    }
    Ok(())
}

/// Tools have distinct names and schemas of type object.
pub fn check_tools(tools: &[Tool], max_name: usize) -> Result<(), Refusal> {
    let mut names = std::collections::HashSet::new();
    for tool in tools {
        check_tool_name(&tool.name, max_name)?;
        if !names.insert(&tool.name) {
            return Err(Refusal::invalid(format!("tools: tool names must be unique, '{}' is not", tool.name)));
        }
        if tool.schema.get("type").and_then(Value::as_str) != Some("object") {
            return Err(Refusal::invalid(format!("tools: the schema of '{}' is not of type 'object'", tool.name)));
        }
    }
    Ok(())
}

/// The field as text, or a refusal that names it.
pub fn text<'a>(value: &'a Value, field: &str, path: &str) -> Result<&'a str, Refusal> {
    let text = value.get(field).and_then(Value::as_str);
    text.ok_or_else(|| Refusal::invalid(format!("{path}.{field}: a string is required")))
}

/// The model's name without the provider's prefix.
pub fn script_name(model: &str) -> String {
    model.strip_prefix("sim/").unwrap_or(model).to_owned()
}
