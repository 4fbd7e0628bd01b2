//! JSON schemas of tools, taken apart as far as calls written as text need it.
//!
//! [`alternatives`] follows references and resolves `allOf`, `anyOf`, `oneOf` and lists of types, so that what is left are
//! plain schemas of one type each.

use serde_json::{Map, Value, json};
use thiserror::Error;

/// Plain schemas of one schema at most.
const MAX_ALTERNATIVES: usize = 64;
/// References and combinations inside each other at most.
const MAX_DEPTH: usize = 64;

/// Why a schema cannot be taken apart.
#[derive(Debug, Error)]
pub enum SchemaError {
    /// A reference leads nowhere.
    #[error("the reference {0:?} leads nowhere")]
    Reference(String),
    /// References lead back to themselves, or combinations are nested too deep.
    #[error("{0:?} leads back to itself, or is nested more than {MAX_DEPTH} deep")]
    Depth(&'static str),
    /// There are too many combinations.
    #[error("{0:?} makes more than {MAX_ALTERNATIVES} combinations")]
    Many(&'static str),
    /// Two parts of a combination say different things under this keyword.
    #[error("two parts of allOf differ in {0:?}, which cannot be combined")]
    Conflict(String),
}

/// The plain schemas of which a value must fit one; `root` is what references start from.
///
/// # Errors
/// References lead nowhere or in a circle, or there are too many combinations.
pub fn alternatives(schema: &Value, root: &Value) -> Result<Vec<Map<String, Value>>, SchemaError> {
    expand(schema, root, 0)
}

/// The schema that a reference of `root` names.
pub fn resolve<'a>(reference: &str, root: &'a Value) -> Option<&'a Value> {
    let pointer = reference.strip_prefix('#')?;
    if pointer.is_empty() || pointer == "/" {
        return Some(root);
    }
    if pointer.starts_with('/') {
        return root.pointer(pointer).or_else(|| root.pointer(&unescaped(pointer)));
    }
    // The name of an anchor.
    let definitions = ["$defs", "definitions"].iter().filter_map(|key| root.get(*key)?.as_object());
    definitions.flat_map(Map::values).find(|schema| schema.get("$anchor").and_then(Value::as_str) == Some(pointer))
}

/// `%20` and the like, as in the fragment of an address.
fn unescaped(text: &str) -> String {
    let mut bytes = vec![];
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'%')
            .then(|| after.get(..2).and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok()))
            .flatten();
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn expand(schema: &Value, root: &Value, depth: usize) -> Result<Vec<Map<String, Value>>, SchemaError> {
    let Value::Object(map) = schema else {
        // `true` is anything, `false` nothing.
        return Ok(if schema == &Value::Bool(false) { vec![] } else { vec![Map::new()] });
    };
    if depth > MAX_DEPTH {
        return Err(SchemaError::Depth(if map.contains_key("$ref") { "$ref" } else { "allOf" }));
    }
    let mut base = map.clone();
    let mut found = vec![Map::new()];
    if let Some(reference) = base.remove("$ref") {
        let name = reference.as_str().unwrap_or_default();
        let target = resolve(name, root).ok_or_else(|| SchemaError::Reference(name.to_owned()))?;
        found = expand(target, root, depth + 1)?;
    }
    if let Some(Value::Array(parts)) = base.remove("allOf") {
        for part in &parts {
            found = product(&found, &expand(part, root, depth + 1)?, "allOf")?;
        }
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(Value::Array(parts)) = base.remove(key) {
            let mut union = vec![];
            for part in &parts {
                union.extend(expand(part, root, depth + 1)?);
            }
            found = product(&found, &union, key)?;
        }
    }
    let types: Vec<Value> = match base.get("type") {
        Some(Value::Array(types)) => types.clone(),
        _ => return product(&found, &[base], "allOf"),
    };
    let one = |kind: Value| {
        let mut one = base.clone();
        one.insert("type".into(), kind);
        one
    };
    let each: Vec<Map<String, Value>> = types.into_iter().map(one).collect();
    product(&found, &each, "type")
}

fn product(
    left: &[Map<String, Value>],
    right: &[Map<String, Value>],
    key: &'static str,
) -> Result<Vec<Map<String, Value>>, SchemaError> {
    if left.len() * right.len() > MAX_ALTERNATIVES {
        return Err(SchemaError::Many(key));
    }
    let mut all = vec![];
    for left in left {
        for right in right {
            all.extend(merged(left, right)?);
        }
    }
    Ok(all)
}

/// A schema that both allow; `None` when nothing fits both.
fn merged(left: &Map<String, Value>, right: &Map<String, Value>) -> Result<Option<Map<String, Value>>, SchemaError> {
    let mut both = left.clone();
    for (key, value) in right {
        let Some(other) = both.get(key).cloned() else {
            both.insert(key.clone(), value.clone());
            continue;
        };
        if other == *value {
            continue;
        }
        let number = |value: &Value| value.as_f64().unwrap_or(0.0);
        let merged = match key.as_str() {
            "properties" | "$defs" | "definitions" => {
                let mut properties = other.as_object().cloned().unwrap_or_default();
                for (name, schema) in value.as_object().into_iter().flatten() {
                    let schema = match properties.get(name) {
                        Some(other) if other != schema && key == "properties" => json!({"allOf": [other, schema]}),
                        _ => schema.clone(),
                    };
                    properties.insert(name.clone(), schema);
                }
                Value::Object(properties)
            }
            "required" => {
                let mut names = other.as_array().cloned().unwrap_or_default();
                names.extend(
                    value
                        .as_array()
                        .into_iter()
                        .flatten()
                        .filter(|name| !names.contains(name))
                        .cloned()
                        .collect::<Vec<_>>(),
                );
                Value::Array(names)
            }
            "enum" => {
                let (Some(ours), Some(theirs)) = (other.as_array(), value.as_array()) else { continue };
                let common: Vec<Value> = ours.iter().filter(|value| theirs.contains(value)).cloned().collect();
                if common.is_empty() {
                    return Ok(None);
                }
                Value::Array(common)
            }
            "const" => return Ok(None),
            "type" => match (other.as_str(), value.as_str()) {
                (Some("number"), Some("integer")) | (Some("integer"), Some("number")) => json!("integer"),
                _ => return Ok(None),
            },
            "minimum" | "exclusiveMinimum" | "minLength" | "minItems" | "minProperties" => {
                if number(&other) > number(value) { other } else { value.clone() }
            }
            "maximum" | "exclusiveMaximum" | "maxLength" | "maxItems" | "maxProperties" => {
                if number(&other) < number(value) { other } else { value.clone() }
            }
            "additionalProperties" | "unevaluatedProperties" => match (&other, value) {
                (Value::Bool(true), value) => value.clone(),
                (other, Value::Bool(true)) => other.clone(),
                (Value::Bool(false), _) | (_, Value::Bool(false)) => json!(false),
                (other, value) => json!({"allOf": [other, value]}),
            },
            "items" => json!({"allOf": [other, value]}),
            // Words about the value, of which the nearest count.
            "title" | "description" | "default" | "examples" | "example" | "deprecated" | "readOnly" | "writeOnly"
            | "$comment" | "$id" | "$schema" | "$anchor" | "nullable" => value.clone(),
            key => return Err(SchemaError::Conflict(key.to_owned())),
        };
        both.insert(key.clone(), merged);
    }
    Ok(Some(both))
}

/// The types of values that fit a plain schema; empty when it allows any.
pub fn types(schema: &Map<String, Value>) -> Vec<&str> {
    let mut types: Vec<&str> = match (schema.get("type"), schema.get("const"), schema.get("enum")) {
        (Some(Value::String(kind)), ..) => vec![kind],
        (_, Some(value), _) => vec![type_of(value)],
        (_, _, Some(Value::Array(values))) => values.iter().map(type_of).collect(),
        _ if schema.contains_key("properties") => vec!["object"],
        _ if schema.contains_key("items") => vec!["array"],
        _ if schema.contains_key("pattern") || schema.contains_key("maxLength") => vec!["string"],
        _ => vec![],
    };
    types.sort_unstable();
    types.dedup();
    types
}

/// The type of a value.
pub fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The plain schemas of an argument of a tool with these parameters; `None` when nothing is said about it.
pub fn of_argument(parameters: &Value, name: &str) -> Option<Vec<Map<String, Value>>> {
    let mut found = vec![];
    for object in alternatives(parameters, parameters).ok()? {
        let declared = object.get("properties").and_then(|properties| properties.get(name));
        let other = object.get("additionalProperties").filter(|schema| schema.is_object());
        if let Some(schema) = declared.or(other) {
            found.extend(alternatives(schema, parameters).ok()?);
        }
    }
    (!found.is_empty()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(schema: Value, expected: Value) {
        let found = alternatives(&schema, &schema).map(|all| {
            let plain = |map: Map<String, Value>| map.into_iter().filter(|(key, _)| key != "$defs").collect();
            all.into_iter().map(plain).map(Value::Object).collect::<Vec<_>>()
        });
        assert_eq!(json!(found.unwrap()), expected);
    }

    #[test]
    fn schemas_are_taken_apart() {
        check(json!({"type": ["string", "null"]}), json!([{"type": "string"}, {"type": "null"}]));
        check(
            json!({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "integer"}}, "minimum": 1}),
            json!([{"type": "integer", "minimum": 1}]),
        );
        check(json!({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"const": 1}}}), json!([{"const": 1}]));
        check(
            json!({"$ref": "#x", "$defs": {"a": {"$anchor": "x", "const": 1}}}),
            json!([{"$anchor": "x", "const": 1}]),
        );
        check(
            json!({"allOf": [{"type": "number", "minimum": 1}, {"type": "integer", "minimum": 3}]}),
            json!([{"type": "integer", "minimum": 3}]),
        );
        check(
            json!({"type": "object", "properties": {"a": {}}, "required": ["a"], "anyOf": [
                {"properties": {"b": {"type": "string"}}, "required": ["b"]}, {"required": ["a", "c"]},
            ]}),
            json!([
                {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}, "required": ["b", "a"]},
                {"type": "object", "properties": {"a": {}}, "required": ["a", "c"]},
            ]),
        );
        check(json!({"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]}), json!([{"enum": [2, 3]}]));
        check(json!({"allOf": [{"type": "string"}, {"type": "null"}]}), json!([]));
        for bad in [
            json!({"$ref": "#"}),
            json!({"$ref": "#/$defs/x"}),
            json!({"$ref": "http://a.example/x"}),
            json!({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}),
            json!({"allOf": [{"anyOf": vec![json!({}); 9]}, {"anyOf": vec![json!({}); 9]}]}),
        ] {
            assert!(alternatives(&bad, &bad).is_err(), "{bad}");
        }
        // A tree, whose root is not circular by itself.
        let tree = json!({"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}});
        assert_eq!(types(&of_argument(&tree, "children").unwrap()[0]), ["array"]);
    }
}
