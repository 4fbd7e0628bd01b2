//! docs/http-reference.md says what /openapi.json says.

use std::fmt::Write;

use serde_json::{Value, json};

use super::Server;

const HEAD: &str = "\
# HTTP reference

What the server says of itself at `/openapi.json`. This page is written from there, and a test keeps it so: edit the types in
crates/tandem-serve. [Fields of requests](serving-fields.md) says what becomes of every field that other servers know.

Errors have a status of 400 or above and the form of [ErrorResponse](#errorresponse), under /v1/messages that of
[AnthropicErrorResponse](#anthropicerrorresponse), under /api `{\"error\": message}`. Where the server has keys, every path but /,
/health, /ready and /openapi.json asks for one, as `Authorization: Bearer KEY` or `x-api-key: KEY`.
";

/// Paths that the document does not have.
const OTHERS: [(&str, &str); 9] = [
    ("GET /", "The chat page."),
    ("GET /openapi.json", "The document itself."),
    ("POST /v1/responses/{id}/cancel", "An error: answers do not go on without their client."),
    ("POST /api/chat", "Ollama: continues a conversation; streams unless `stream` is false."),
    ("POST /api/generate", "Ollama: continues a text."),
    ("GET /api/tags", "Ollama: the model."),
    ("GET /api/ps", "Ollama: the same."),
    ("POST /api/show", "Ollama: what the model can do."),
    ("GET /api/version", "Ollama: a version."),
];

/// `TANDEM_WRITE_DOCS=1 cargo test` writes the page.
#[tokio::test(flavor = "multi_thread")]
async fn the_reference_says_what_the_document_says() {
    let server = Server::start();
    let (_, document) = server.get("/openapi.json").await;
    let page = page(&document);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/http-reference.md");
    if std::env::var_os("TANDEM_WRITE_DOCS").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), page, "run with TANDEM_WRITE_DOCS=1");
    for (call, _) in OTHERS {
        let (method, path) = call.split_once(' ').unwrap();
        assert!(document["paths"][path][method.to_lowercase()].is_null(), "{call} is in the document by now");
        let (status, answer) = match method {
            "GET" => server.get(path).await,
            _ => server.post(path, &json!({})).await,
        };
        assert!(status != 405 && !answer.to_string().contains("nothing at this path"), "{call}: {status} {answer}");
    }
}

fn page(document: &Value) -> String {
    let mut page = HEAD.to_owned();
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.iter().flat_map(|(path, methods)| {
        methods.as_object().unwrap().iter().map(move |(method, operation)| (path, method.to_uppercase(), operation))
    });
    let operations: Vec<_> = operations.collect();
    for tag in ["OpenAI", "Anthropic", "Tokens", "Server"] {
        write!(page, "\n## {tag}\n\n| path | does | takes | answers |\n|---|---|---|---|\n").unwrap();
        for (path, method, operation) in operations.iter().filter(|(_, _, operation)| operation["tags"][0] == tag) {
            let takes = &operation["requestBody"]["content"]["application/json"]["schema"];
            let takes = if takes.is_null() { String::new() } else { kind(takes) };
            // Errors of all have one form.
            let answers =
                operation["responses"].as_object().unwrap().iter().filter(|(status, _)| !status.ends_with("XX"));
            let answers = answers.flat_map(|(status, response)| {
                let bodies = response["content"].as_object().into_iter().flatten();
                bodies.map(move |(media, content)| {
                    let status = if status == "200" { String::new() } else { format!("{status}: ") };
                    let media = if media == "application/json" { String::new() } else { format!("`{media}`: ") };
                    format!("{status}{media}{}", kind(&content["schema"]))
                })
            });
            let answers: Vec<String> = answers.collect();
            let does = operation["summary"].as_str().unwrap().replace('\n', " ");
            writeln!(page, "| `{method} {path}` | {does} | {takes} | {} |", answers.join("; ")).unwrap();
        }
    }
    assert!(operations.iter().all(|(path, ..)| page.contains(&format!(" {path}` |"))), "a tag is not listed");

    page.push_str("\n## Not in the document\n\n| path | |\n|---|---|\n");
    for (call, what) in OTHERS {
        writeln!(page, "| `{call}` | {what} |").unwrap();
    }

    page.push_str("\n## Types\n\nA field that is not required may be null.\n");
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        write!(page, "\n### {name}\n\n").unwrap();
        let about = text(schema);
        let Some(properties) = schema["properties"].as_object() else {
            let types = kind(schema);
            writeln!(page, "{about}{}{types}", if about.is_empty() { "" } else { " " }).unwrap();
            continue;
        };
        if !about.is_empty() {
            write!(page, "{about}\n\n").unwrap();
        }
        page.push_str("| field | type | |\n|---|---|---|\n");
        for (field, of) in properties {
            let required = schema["required"].as_array().is_some_and(|names| names.iter().any(|name| name == field));
            // The served document has the model's own names here.
            let types = if field == "model" { "string".to_owned() } else { kind(of) };
            let required = if required { ", required" } else { "" };
            writeln!(page, "| `{field}` | {types}{required} | {} |", text(of)).unwrap();
        }
    }
    page
}

/// What a schema says of itself, or the one that stands in it beside null.
fn text(schema: &Value) -> String {
    let own = schema["description"].as_str();
    let inner =
        || schema["oneOf"].as_array()?.iter().find_map(|of| of["$ref"].as_str().and(of["description"].as_str()));
    own.or_else(inner).unwrap_or_default().replace('\n', " ").replace('|', "\\|")
}

/// The values that a schema allows, but for null.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(list) = schema["oneOf"].as_array() {
        let kinds: Vec<String> = list.iter().map(kind).filter(|kind| kind != "null").collect();
        return kinds.join(" or ");
    }
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<String> = values.iter().filter(|v| !v.is_null()).map(|value| format!("`{value}`")).collect();
        return values.join(", ");
    }
    let types = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or("null"),
        of => of.as_str().unwrap_or("anything"),
    };
    match (types, schema["properties"].as_object()) {
        ("array", _) => format!("list of {}", kind(&schema["items"])),
        ("object", Some(properties)) => {
            let required =
                |name: &str| schema["required"].as_array().is_some_and(|names| names.iter().any(|n| n == name));
            let mut fields: Vec<String> = properties
                .iter()
                .map(|(name, of)| format!("`{name}`{}: {}", if required(name) { "" } else { "?" }, kind(of)))
                .collect();
            // Which of several objects it is comes first.
            fields.sort_by_key(|field| !field.starts_with("`type`"));
            format!("{{{}}}", fields.join(", "))
        }
        ("integer" | "number", _) => {
            // Bounds that say more than how many bits the number has; the largest token is the model's own.
            let bound = |name: &str| schema[name].as_f64().filter(|value| value.abs() < 2e9);
            match (bound("minimum"), bound("maximum")) {
                (Some(minimum), Some(maximum)) if types == "number" || maximum < 1000.0 => {
                    format!("{types}, {minimum} to {maximum}")
                }
                (Some(minimum), _) => format!("{types}, {minimum} or more"),
                _ => types.to_owned(),
            }
        }
        _ => types.to_owned(),
    }
}
