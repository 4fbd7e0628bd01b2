//! Requests of agents and SDKs, as `scripts/serve/clients.py` kept them: each gets the answer that it got then.

use serde_json::{Value, json};

use super::protocol::{
    Said, check_events, said_by_chat, said_by_chunks, said_by_message, said_by_message_events, said_by_response, text,
};
use super::{CONTEXT, Server};
use crate::Options;

/// What an answer of this path says, and its output items' ids if it has some.
fn read(path: &str, is_stream: bool, body: &str) -> (Said, Vec<String>, String) {
    let events = || -> Vec<Value> {
        let lines = body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        lines.map(|data| serde_json::from_str(data).unwrap()).collect()
    };
    let whole = || -> Value { serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {body}")) };
    match (path, is_stream) {
        ("/v1/chat/completions", false) => (said_by_chat(&whole()), vec![], String::new()),
        ("/v1/chat/completions", true) => (said_by_chunks(&events()), vec![], String::new()),
        ("/v1/messages", false) => (said_by_message(&whole()), vec![], String::new()),
        ("/v1/messages", true) => (said_by_message_events(&events()), vec![], String::new()),
        ("/v1/responses", _) => {
            let response = match is_stream {
                true => {
                    let events = events();
                    check_events(&events);
                    events.last().unwrap()["response"].clone()
                }
                false => whole(),
            };
            let ids = response["output"].as_array().unwrap().iter().map(|item| text(&item["id"])).collect();
            (said_by_response(&response), ids, text(&response["id"]))
        }
        ("/api/chat", _) => {
            let mut said = Said::default();
            for line in body.lines() {
                let line: Value = serde_json::from_str(line).unwrap();
                said.0.push_str(&text(&line["message"]["thinking"]));
                said.1.push_str(&text(&line["message"]["content"]));
                for call in line["message"]["tool_calls"].as_array().into_iter().flatten() {
                    said.2.push((text(&call["function"]["name"]), call["function"]["arguments"].to_string()));
                }
            }
            (said, vec![], String::new())
        }
        _ => panic!("{path} is not read here"),
    }
}

/// The reasoning, the text, and the call that a script says in the bundled model's dialect.
fn scripted(says: &str) -> (String, String, Vec<(String, Value)>) {
    let (reasoning, rest) = match says.strip_prefix("<think>").and_then(|says| says.split_once("</think>")) {
        Some((reasoning, rest)) => (reasoning, rest),
        None => ("", says),
    };
    let Some((content, call)) = rest.split_once("<tool_call>") else {
        return (reasoning.to_owned(), rest.to_owned(), vec![]);
    };
    let mut parts = call.trim_end_matches("</tool_call>").split("<arg_key>");
    let name = parts.next().unwrap().to_owned();
    let arguments = parts.map(|pair| {
        let (key, value) = pair.split_once("</arg_key><arg_value>").unwrap();
        let value = value.trim_end_matches("</arg_value>");
        let value = if value.starts_with('[') { serde_json::from_str(value).unwrap() } else { json!(value) };
        (key.to_owned(), value)
    });
    (reasoning.to_owned(), content.to_owned(), vec![(name, Value::Object(arguments.collect()))])
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_get_what_they_expect() {
    let server = Server::with_context(&Options::default(), 8 * CONTEXT);
    let dir = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src/tests/clients"));
    let mut n_requests = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let fixture: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let (mut item_ids, mut response_id, mut before) = (vec![], String::new(), Value::Null);
        for (i, asked) in fixture["requests"].as_array().unwrap().iter().enumerate() {
            let what = format!("{} of {}, request {i}", path.file_stem().unwrap().display(), fixture["client"]);
            let mut body = asked["body"].clone();
            for field in asked["again"].as_array().unwrap() {
                let field = field.as_str().unwrap();
                body[field] = before[field].clone();
            }
            before = body.clone();
            body["model"] = json!("fable");
            // They name what this server gave out in the turn before.
            if body["previous_response_id"].is_string() {
                body["previous_response_id"] = json!(response_id);
            }
            let items = body["input"].as_array_mut().into_iter().flatten();
            for (item, id) in items.filter(|item| item["type"] == "item_reference").zip(&item_ids) {
                item["id"] = json!(id);
            }
            let mut request = axum::http::Request::post(asked["path"].as_str().unwrap());
            for (name, value) in asked["headers"].as_object().unwrap() {
                request = request.header(name, value.as_str().unwrap());
            }
            if let Some(says) = asked["says"].as_str() {
                server.says(says);
            }
            let (status, _, bytes) = server.send(request.body(body.to_string().into()).unwrap()).await;
            let answer = String::from_utf8(bytes).unwrap();
            assert_eq!(status, 200, "{what}: {answer}");
            n_requests += 1;
            let Some(says) = asked["says"].as_str() else { continue };
            let route = asked["path"].as_str().unwrap().split('?').next().unwrap();
            // Ollama's streams are the default.
            let (said, ids, id) = read(route, body["stream"] == true, &answer);
            (item_ids, response_id) = (ids, id);
            let (reasoning, content, calls) = scripted(says);
            let found: Vec<(String, Value)> =
                said.2.iter().map(|(name, json)| (name.clone(), serde_json::from_str(json).unwrap())).collect();
            assert_eq!((said.1.trim(), found), (content.trim(), calls), "{what}");
            assert!(said.0 == reasoning || said.0.is_empty(), "{what}: {}", said.0);
        }
    }
    assert!(n_requests >= 46, "{n_requests} requests");
}
