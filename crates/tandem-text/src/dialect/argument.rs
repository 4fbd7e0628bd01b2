//! Arguments that are written as text: as JSON, by what the schema says.

use serde_json::{Map, Value};

use crate::schema::{type_of, types};

/// An argument as JSON text: what the schemas say it is, else what it looks like, else a string. JSON is passed on as it was
/// written, so that no digit is lost.
pub(super) fn coerce(text: &str, schemas: &[Map<String, Value>]) -> String {
    let as_text = || Value::from(text).to_string();
    let types: Vec<&str> = schemas.iter().flat_map(types).collect();
    let is_any = is_any(schemas);
    let allows = |kind: &str| is_any || types.contains(&kind);
    if !is_any && types.iter().all(|kind| *kind == "string") {
        return as_text();
    }
    // A text that the schema names is that text, whatever it looks like.
    let is_named = schemas.iter().any(|schema| {
        let values = schema.get("enum").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        values.iter().chain(schema.get("const")).any(|value| value.as_str() == Some(text))
    });
    if is_named {
        return as_text();
    }
    let trimmed = text.trim();
    let parsed = match trimmed {
        // As Python writes them.
        "True" if allows("boolean") => return "true".to_owned(),
        "False" if allows("boolean") => return "false".to_owned(),
        "None" if allows("null") => return "null".to_owned(),
        _ => serde_json::from_str::<Value>(trimmed).ok(),
    };
    match parsed {
        Some(Value::String(_)) if allows("string") => as_text(),
        Some(Value::Number(n)) => {
            let is_whole = !trimmed.contains(['.', 'e', 'E']);
            match n.as_f64() {
                _ if allows("number") || (is_whole && allows("integer")) => trimmed.to_owned(),
                Some(value) if allows("integer") && value.fract() == 0.0 && value.abs() < 9e15 => {
                    (value as i64).to_string()
                }
                _ if allows("integer") && !allows("string") => trimmed.to_owned(),
                _ => as_text(),
            }
        }
        Some(value) if allows(type_of(&value)) => trimmed.to_owned(),
        _ => as_text(),
    }
}

/// The same for an argument that the model has marked as text or as JSON; where the schema allows no such type, it decides.
pub(super) fn coerce_marked(text: &str, is_text: bool, schemas: &[Map<String, Value>]) -> String {
    let allows = |kind: &str| is_any(schemas) || schemas.iter().flat_map(types).any(|known| known == kind);
    if is_text && allows("string") {
        return Value::from(text).to_string();
    }
    match serde_json::from_str::<Value>(text.trim()) {
        // A quoted text is the text.
        Ok(Value::String(_)) if !is_text => text.trim().to_owned(),
        _ => coerce(text, schemas),
    }
}

fn is_any(schemas: &[Map<String, Value>]) -> bool {
    schemas.is_empty() || schemas.iter().any(|schema| types(schema).is_empty())
}
