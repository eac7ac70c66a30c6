//! Whether a foreign schema is one at all: keywords of the kinds that JSON Schema gives them, level by level. Providers
//! refuse a request with a tool whose schema is none, and with it the whole turn. Nothing is evaluated here, and no
//! reference followed.

use serde_json::Value;

/// Deeper ones are for nobody to fill in.
const DEPTH_MAX: usize = 32;
const TYPES: [&str; 7] = ["object", "array", "string", "number", "integer", "boolean", "null"];

/// Whether `schema` is a JSON schema of draft 7 or 2020-12.
pub fn is_schema(schema: &Value) -> bool {
    is_schema_below(schema, 0)
}

fn is_schema_below(schema: &Value, depth: usize) -> bool {
    match schema {
        Value::Bool(_) => true,
        Value::Object(keywords) if depth < DEPTH_MAX => {
            keywords.iter().all(|(keyword, value)| fits(keyword, value, depth + 1))
        }
        _ => false,
    }
}

/// Whether a keyword's value is of its kind; what no draft knows may be anything.
fn fits(keyword: &str, value: &Value, depth: usize) -> bool {
    let schema = |value: &Value| is_schema_below(value, depth);
    let schemas = |value: &Value| value.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(schema));
    match keyword {
        "type" => match value {
            Value::String(name) => TYPES.contains(&name.as_str()),
            Value::Array(names) => {
                !names.is_empty() && names.iter().all(|name| fits("type", name, depth) && name.is_string())
            }
            _ => false,
        },
        "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas" => {
            value.as_object().is_some_and(|map| map.values().all(schema))
        }
        "items" => schema(value) || schemas(value),
        "allOf" | "anyOf" | "oneOf" | "prefixItems" => schemas(value),
        "not"
        | "if"
        | "then"
        | "else"
        | "contains"
        | "propertyNames"
        | "additionalProperties"
        | "additionalItems"
        | "unevaluatedItems"
        | "unevaluatedProperties" => schema(value),
        "required" => value.as_array().is_some_and(|names| names.iter().all(Value::is_string)),
        "enum" | "examples" => value.is_array(),
        "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties" | "minContains"
        | "maxContains" => value.as_f64().is_some_and(|number| number >= 0.0 && number.fract() == 0.0),
        "multipleOf" => value.as_f64().is_some_and(|number| number > 0.0),
        "minimum" | "maximum" => value.is_number(),
        "title" | "description" | "pattern" | "format" | "$ref" | "$id" | "$comment" | "$anchor" => value.is_string(),
        "uniqueItems" | "readOnly" | "writeOnly" | "deprecated" => value.is_boolean(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schemas_of_both_drafts_are_taken() {
        for good in [
            json!(true),
            json!({}),
            json!({"type": ["string", "null"], "x-own": {"type": 7}, "default": 3, "const": []}),
            json!({"items": [{"type": "string"}], "additionalItems": false, "definitions": {"a": {}}}),
            json!({"prefixItems": [{}], "$defs": {"a": {"$ref": "#/$defs/a"}}, "anyOf": [{"type": "string"}, false]}),
            json!({"properties": {"type": {"type": "string"}, "required": {}}, "required": [], "minLength": 0, "maximum": -1.5}),
        ] {
            assert!(is_schema(&good), "{good}");
        }
    }

    #[test]
    fn what_is_none_is_refused_at_any_level() {
        let mut deep = json!({});
        for _ in 0..100 {
            deep = json!({"items": deep});
        }
        for bad in [
            json!(1),
            json!([]),
            json!({"type": "strin"}),
            json!({"type": []}),
            json!({"type": [["string"]]}),
            json!({"properties": []}),
            json!({"properties": {"a": {"type": "strin"}}}),
            json!({"items": {"anyOf": [{"required": "a"}]}}),
            json!({"allOf": []}),
            json!({"enum": "a"}),
            json!({"minLength": -1}),
            json!({"minLength": 1.5}),
            json!({"multipleOf": 0}),
            json!({"pattern": 1}),
            json!({"$ref": 1}),
            json!({"uniqueItems": "yes"}),
            deep,
        ] {
            assert!(!is_schema(&bad), "{bad}");
        }
    }
}
