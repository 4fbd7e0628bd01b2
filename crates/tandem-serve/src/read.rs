//! Requests are read by hand where the published schemas leave room: each fault names its field.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use crate::error::ApiError;

/// What a value is, in the words of an error.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) if text.len() <= 40 => format!("{text:?}"),
        Value::String(_) => "a text".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// An answer with the numbers that [`tandem_text::exact`] kept.
pub(crate) fn exact_json(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], tandem_text::exact::write(value)).into_response()
}

/// 400: the field is not what was expected.
pub(crate) fn expected(path: &str, value: &Value, what: &str) -> ApiError {
    let name = path.rsplit('.').next().unwrap_or(path);
    ApiError::invalid(path, format!("{name} is {}, expected {what}", describe(value)))
}

/// 400: the field is not there.
pub(crate) fn missing(path: &str) -> ApiError {
    let name = path.rsplit('.').next().unwrap_or(path);
    ApiError::invalid(path, format!("{name} is missing"))
}

pub(crate) fn object<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>, ApiError> {
    value.as_object().ok_or_else(|| expected(path, value, "an object"))
}

pub(crate) fn list<'a>(value: &'a Value, path: &str) -> Result<&'a [Value], ApiError> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| expected(path, value, "a list"))
}

pub(crate) fn text<'a>(value: &'a Value, path: &str) -> Result<&'a str, ApiError> {
    value.as_str().ok_or_else(|| expected(path, value, "a text"))
}

/// A field that may be absent or null.
pub(crate) fn optional<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.get(key).filter(|value| !value.is_null())
}

pub(crate) fn optional_text<'a>(
    map: &'a Map<String, Value>,
    key: &str,
    path: &str,
) -> Result<Option<&'a str>, ApiError> {
    optional(map, key).map(|value| text(value, &format!("{path}.{key}"))).transpose()
}

pub(crate) fn required_text<'a>(map: &'a Map<String, Value>, key: &str, path: &str) -> Result<&'a str, ApiError> {
    optional_text(map, key, path)?.ok_or_else(|| missing(&format!("{path}.{key}")))
}

/// The `type` of an object; `default` where it has none.
pub(crate) fn kind<'a>(map: &'a Map<String, Value>, default: &'a str, path: &str) -> Result<&'a str, ApiError> {
    match map.get("type") {
        None | Some(Value::Null) => Ok(default),
        Some(Value::String(kind)) => Ok(kind),
        Some(other) => {
            let message = format!("type is {}, expected a text", describe(other));
            Err(ApiError::invalid(path, message))
        }
    }
}
