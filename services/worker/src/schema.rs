//! Whether a call's arguments fit its tool's schema, as far as can be told in bounded time.
//!
//! The schema is a stranger's: a daemon's, or an MCP server's. So only keywords are judged whose cost is that of reading
//! them: types, names, fixed values, sizes, level by level. References, combinations, conditions and patterns, by which a
//! schema of 3 KB can take for ever, are left to the tool itself, which judges its arguments in any case. What is judged
//! here spares the person an approval and the model a round trip (docs/adr/0011-schemas-are-judged-where-they-are-served.md).

use serde_json::{Map, Value};

/// Mistakes told to the model at once.
const MISTAKES_MAX: usize = 5;
/// Levels of arrays and objects that are looked into.
const DEPTH_MAX: usize = 8;
/// Values and names that are looked at in all; what lies behind is not judged.
const STEPS_MAX: usize = 20_000;
/// Of a value or a list of names in a sentence.
const SHOWN_MAX_CHARS: usize = 120;

/// What does not fit, a sentence each; nothing where all that is judged fits.
pub fn mistakes(schema: &Value, arguments: &Value) -> Vec<String> {
    let mut judge = Judge { mistakes: Vec::new(), steps: STEPS_MAX };
    judge.value(schema, arguments, &mut Vec::new());
    judge.mistakes
}

struct Judge {
    mistakes: Vec<String>,
    steps: usize,
}

impl Judge {
    /// False where nothing more is to be judged.
    fn step(&mut self, count: usize) -> bool {
        self.steps = self.steps.saturating_sub(count);
        self.steps > 0 && self.mistakes.len() < MISTAKES_MAX
    }

    fn mistake(&mut self, path: &[String], text: String) {
        if self.mistakes.len() < MISTAKES_MAX {
            let place = path.iter().map(|part| format!("/{part}")).collect::<String>();
            self.mistakes.push(if place.is_empty() { text } else { format!("{place}: {text}") });
        }
    }

    fn value(&mut self, schema: &Value, value: &Value, path: &mut Vec<String>) {
        let Value::Object(schema) = schema else { return };
        // Older drafts ignore what stands beside a reference.
        if !self.step(1) || path.len() > DEPTH_MAX || schema.contains_key("$ref") {
            return;
        }
        if value.is_null() && schema.get("nullable") == Some(&Value::Bool(true)) {
            return;
        }
        if let Some(wanted) = wrong_type(schema, value) {
            return self.mistake(path, format!("must be {wanted}, not {}", kind(value)));
        }
        self.fixed(schema, value, path);
        self.sizes(schema, value, path);
        match value {
            Value::Object(fields) => self.fields(schema, fields, path),
            Value::Array(items) => {
                let Some(schema @ Value::Object(_)) = schema.get("items") else { return };
                for (index, item) in items.iter().enumerate() {
                    if !self.step(1) {
                        return;
                    }
                    self.below(schema, item, index.to_string(), path);
                }
            }
            _ => {}
        }
    }

    fn below(&mut self, schema: &Value, value: &Value, name: String, path: &mut Vec<String>) {
        path.push(name);
        self.value(schema, value, path);
        path.pop();
    }

    fn fields(&mut self, schema: &Map<String, Value>, fields: &Map<String, Value>, path: &mut Vec<String>) {
        for name in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            if !self.step(1) {
                return;
            }
            if !fields.contains_key(name) {
                self.mistake(path, format!("'{}' is missing", shown(name)));
            }
        }
        let known = schema.get("properties").and_then(Value::as_object);
        let others = schema.get("additionalProperties").filter(|_| !schema.contains_key("patternProperties"));
        for (name, value) in fields {
            if !self.step(1) {
                return;
            }
            match (known.and_then(|known| known.get(name)), others) {
                (Some(schema), _) => self.below(schema, value, name.clone(), path),
                (None, Some(Value::Bool(false))) => {
                    let names: Vec<&str> = known.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
                    let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
                    self.mistake(path, format!("'{}' is not known; there are: {}", shown(name), shown(&names)));
                }
                (None, Some(schema)) => self.below(schema, value, name.clone(), path),
                (None, None) => {}
            }
        }
    }

    fn fixed(&mut self, schema: &Map<String, Value>, value: &Value, path: &[String]) {
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
            if !self.step(allowed.len()) {
                return;
            }
            if !allowed.iter().any(|allowed| same(allowed, value)) {
                let list = allowed.iter().map(Value::to_string).collect::<Vec<_>>().join(", ");
                self.mistake(path, format!("{} is none of {}", shown(&value.to_string()), shown(&list)));
            }
        }
        if let Some(only) = schema.get("const").filter(|only| !same(only, value)) {
            self.mistake(path, format!("must be {}", shown(&only.to_string())));
        }
    }

    fn sizes(&mut self, schema: &Map<String, Value>, value: &Value, path: &[String]) {
        let (low, high, size, unit) = match value {
            Value::Number(number) => ("minimum", "maximum", number.as_f64(), ""),
            Value::String(text) => ("minLength", "maxLength", Some(text.chars().count() as f64), " characters"),
            Value::Array(items) => ("minItems", "maxItems", Some(items.len() as f64), " items"),
            _ => return,
        };
        let Some(size) = size else { return };
        let limit = |name: &str| schema.get(name).and_then(Value::as_f64);
        if let Some(low) = limit(low).filter(|low| size < *low) {
            self.mistake(path, format!("has {size}{unit}; at least {low} are needed"));
        }
        if let Some(high) = limit(high).filter(|high| size > *high) {
            self.mistake(path, format!("has {size}{unit}; at most {high} are allowed"));
        }
    }
}

/// The type that the value should have, in words; none where it has it, or where the schema names none that is known.
fn wrong_type(schema: &Map<String, Value>, value: &Value) -> Option<String> {
    let names: Vec<&str> = match schema.get("type")? {
        Value::String(name) => vec![name],
        Value::Array(names) => names.iter().filter_map(Value::as_str).take(8).collect(),
        _ => return None,
    };
    let fits = |name: &&str| match *name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => true,
    };
    (!names.is_empty() && !names.iter().any(fits)).then(|| names.join(" or "))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Numbers are alike by value, 1 and 1.0 too.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

fn shown(text: &str) -> String {
    let head: String = text.chars().take(SHOWN_MAX_CHARS).collect();
    if head.len() < text.len() { format!("{head}…") } else { head }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(schema: Value, arguments: Value, expected: &[&str]) {
        assert_eq!(mistakes(&schema, &arguments), expected, "{schema} of {arguments}");
    }

    #[test]
    fn types_names_and_fixed_values_are_judged() {
        let schema = json!({
            "type": "object",
            "properties": {
                "path": {"type": "string", "minLength": 1},
                "count": {"type": "integer", "minimum": 1, "maximum": 9},
                "mode": {"enum": ["fast", "slow", 1]},
                "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
                "maybe": {"type": ["string", "null"]},
                "old": {"type": "string", "nullable": true},
                "kind": {"const": "a"},
                "deep": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
            },
            "required": ["path"],
            "additionalProperties": false,
        });
        for good in [
            json!({"path": "a"}),
            json!({"path": "a", "count": 3.0, "mode": "fast", "tags": [], "maybe": null, "old": null, "kind": "a"}),
            json!({"path": "a", "mode": 1.0, "deep": {"x": true, "y": 1}}),
        ] {
            check(schema.clone(), good, &[]);
        }
        check(schema.clone(), json!({}), &["'path' is missing"]);
        check(schema.clone(), json!({"path": 1}), &["/path: must be string, not number"]);
        check(schema.clone(), json!({"path": ""}), &["/path: has 0 characters; at least 1 are needed"]);
        check(schema.clone(), json!({"path": "a", "count": 1.5}), &["/count: must be integer, not number"]);
        check(schema.clone(), json!({"path": "a", "count": 10}), &["/count: has 10; at most 9 are allowed"]);
        check(schema.clone(), json!({"path": "a", "mode": "x"}), &[r#"/mode: "x" is none of "fast", "slow", 1"#]);
        check(schema.clone(), json!({"path": "a", "tags": ["b", 1]}), &["/tags/1: must be string, not number"]);
        check(schema.clone(), json!({"path": "a", "maybe": 1}), &["/maybe: must be string or null, not number"]);
        check(schema.clone(), json!({"path": "a", "kind": "b"}), &[r#"/kind: must be "a""#]);
        check(schema.clone(), json!({"path": "a", "deep": {}}), &["/deep: 'x' is missing"]);
        check(
            schema,
            json!({"path": "a", "pth": 1}),
            &["'pth' is not known; there are: count, deep, kind, maybe, mode, old, path, tags"],
        );
        check(
            json!({"additionalProperties": {"type": "string"}}),
            json!({"a": 1}),
            &["/a: must be string, not number"],
        );
    }

    #[test]
    fn what_is_not_judged_lets_everything_through() {
        for schema in [
            json!(true),
            json!({}),
            json!({"type": "strin"}),
            json!({"type": 7, "required": "a", "properties": [], "items": 3, "enum": "x"}),
            json!({"$ref": "#/$defs/x", "type": "string"}),
            json!({"anyOf": [{"type": "string"}], "not": {}, "pattern": "(", "if": {}, "then": false}),
            json!({"patternProperties": {"^a": {}}, "additionalProperties": false}),
        ] {
            check(schema, json!({"a": 1}), &[]);
        }
    }

    /// Each of these never ended, or ate all memory, where the schema was run as written.
    #[test]
    fn a_hostile_schema_costs_no_more_than_its_reading() {
        let chain: Map<String, Value> = (0..60)
            .map(|n| {
                let next = json!({"$ref": format!("#/$defs/a{}", n + 1)});
                (format!("a{n}"), json!({"allOf": [next, next], "anyOf": [next, next]}))
            })
            .collect();
        let patterns: Map<String, Value> =
            (0..1500).map(|n| (format!("p{n}"), json!({"type": "string", "pattern": "(\\w{10}){10}"}))).collect();
        let mut nested = json!({"type": "string"});
        let mut value = json!(1);
        for _ in 0..60 {
            nested = json!({"items": nested, "properties": {"a": nested}, "additionalProperties": nested});
            if nested.to_string().len() > 100_000 {
                break;
            }
            value = json!([value, value]);
            if value.to_string().len() > 400_000 {
                break;
            }
        }
        for (schema, value) in [
            (
                json!({"$defs": chain, "allOf": [{"$ref": "#/$defs/a0"}], "properties": {"x": {"$ref": "#/$defs/a0"}}}),
                json!({"x": 1}),
            ),
            (json!({"properties": patterns}), json!({"p1": "x"})),
            (nested, value),
            (json!({"items": {"enum": vec![json!(0); 10_000]}}), json!(vec![1; 10_000])),
        ] {
            let mut judge = Judge { mistakes: Vec::new(), steps: STEPS_MAX };
            judge.value(&schema, &value, &mut Vec::new());
            assert!(judge.mistakes.len() <= MISTAKES_MAX);
            assert!(judge.mistakes.iter().all(|text| text.chars().count() < 400));
        }
    }

    #[test]
    fn mistakes_are_bounded_in_number_and_length() {
        let required: Vec<String> = (0..100).map(|n| format!("{n}{}", "x".repeat(1000))).collect();
        let found = mistakes(&json!({"required": required}), &json!({}));
        assert_eq!(found.len(), MISTAKES_MAX);
        assert!(found.iter().all(|text| text.chars().count() < 200));
    }
}
