//! Long numbers and texts that look like JSON are the same on both sides, in every interface.

use axum::http::Request;
use serde_json::{Value, json};

use super::Server;

/// Arguments of a call: key, as the model writes it, as JSON has it.
const ARGUMENTS: &[(&str, &str, &str)] = &[
    ("id", "123456789012345678901234567890", "123456789012345678901234567890"),
    ("next", "18446744073709551616", "18446744073709551616"),
    ("least", "-9223372036854775809", "-9223372036854775809"),
    ("list", "[12345678901234567890123, {\"a\": 1}]", "[12345678901234567890123, {\"a\": 1}]"),
    ("zip", "007", "\"007\""),
    ("digits", "123456789012345678901234567890", "\"123456789012345678901234567890\""),
    ("text", "{\"id\": 123456789012345678901234567890}", "\"{\\\"id\\\": 123456789012345678901234567890}\""),
    ("quoted", "\"a\\n\\u00e9\"", "\"\\\"a\\\\n\\\\u00e9\\\"\""),
    ("lines", "a\n\tb \\ \"c\" é 🦊", "\"a\\n\\tb \\\\ \\\"c\\\" é 🦊\""),
    ("truth", "true", "\"true\""),
];

/// A result of a tool that looks like JSON.
const RESULT: &str = "{\"id\": 123456789012345678901234567890, \"n\": 1.0, \"s\": \"\\u00e9\"}";

fn schema() -> Value {
    let kind = |key: &str| match key {
        "id" | "next" | "least" => json!({"type": "integer"}),
        "list" => json!({"type": "array"}),
        _ => json!({"type": "string"}),
    };
    let properties: Value = ARGUMENTS.iter().map(|(key, _, _)| (key.to_string(), kind(key))).collect();
    json!({"type": "object", "properties": properties})
}

/// As the model writes it, and the arguments as an object.
fn call() -> (String, String) {
    let pairs: String = ARGUMENTS
        .iter()
        .map(|(key, written, _)| format!("<arg_key>{key}</arg_key><arg_value>{written}</arg_value>"))
        .collect();
    let members: Vec<String> = ARGUMENTS.iter().map(|(key, _, json)| format!("\"{key}\": {json}")).collect();
    (format!("<tool_call>f{pairs}</tool_call>"), format!("{{{}}}", members.join(", ")))
}

/// The text of an answer.
async fn send(server: &Server, path: &str, body: &str) -> String {
    let request = Request::post(path).header("content-type", "application/json");
    let (status, _, bytes) = server.send(request.body(body.to_owned().into()).unwrap()).await;
    let text = String::from_utf8(bytes).unwrap();
    assert_eq!(status, 200, "{path} {body}: {text}");
    text
}

/// Without white space outside of texts.
fn compact(json: &str) -> String {
    tandem_text::exact::write(&tandem_text::exact::read(json).unwrap_or_else(|e| panic!("{e}: {json}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_model_to_the_client() {
    let server = Server::start();
    let (script, arguments) = call();
    let parameters = schema();
    let user = json!([{"role": "user", "content": "hi"}]);
    let function = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
    for (path, body) in [
        ("/v1/chat/completions", json!({"messages": user, "tools": [function]})),
        (
            "/v1/responses",
            json!({"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": parameters}]}),
        ),
        (
            "/v1/messages",
            json!({"model": "fable", "max_tokens": 2000, "messages": user, "tools": [{"name": "f", "input_schema": parameters}]}),
        ),
        ("/api/chat", json!({"model": "fable", "messages": user, "tools": [function]})),
    ] {
        for is_stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = json!(is_stream);
            server.says(&script);
            let answer = send(&server, path, &body.to_string()).await;
            if (path, is_stream) == ("/v1/messages", false) || path == "/api/chat" {
                // The arguments are part of the answer's JSON.
                let answer = if is_stream { answer.lines().next().unwrap() } else { &answer };
                assert!(compact(answer).contains(&compact(&arguments)), "{path} {is_stream}: {answer}");
                continue;
            }
            let events: Vec<Value> = match is_stream {
                false => vec![serde_json::from_str(&answer).unwrap()],
                true => {
                    answer.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect()
                }
            };
            let places = [
                "/choices/0/message/tool_calls/0/function/arguments",
                "/choices/0/delta/tool_calls/0/function/arguments",
                "/output/0/arguments",
                "/delta/partial_json",
            ];
            let deltas = events.iter().filter(|event| event["type"] == "response.function_call_arguments.delta");
            let mut found: String = deltas.map(|event| event["delta"].as_str().unwrap()).collect();
            found.extend(events.iter().flat_map(|e| places.iter().filter_map(|place| e.pointer(place)?.as_str())));
            assert_eq!(found, arguments, "{path} {is_stream}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_client_to_the_model() {
    let (_, arguments) = call();
    let escaped = json!(arguments).to_string();
    let result = json!(RESULT).to_string();
    let user = format!("{{\"role\": \"user\", \"content\": {result}}}");
    let ask = |rest: &str| format!("\"messages\": [{user}, {rest}, {{\"role\": \"user\", \"content\": \"?\"}}]}}");
    let chat_call = |arguments: &str| {
        format!(
            "{{\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": [{{\"id\": \"c\", \"type\": \"function\", \
             \"function\": {{\"name\": \"f\", \"arguments\": {arguments}}}}}]}}, \
             {{\"role\": \"tool\", \"tool_call_id\": \"c\", \"content\": {result}}}"
        )
    };
    let anthropic = format!(
        "{{\"role\": \"assistant\", \"content\": [{{\"type\": \"tool_use\", \"id\": \"c\", \"name\": \"f\", \"input\": {arguments}}}]}}, \
         {{\"role\": \"user\", \"content\": [{{\"type\": \"tool_result\", \"tool_use_id\": \"c\", \"content\": {result}}}]}}"
    );
    let responses = |arguments: &str| {
        format!(
            "{{\"input\": [{user}, {{\"type\": \"function_call\", \"call_id\": \"c\", \"name\": \"f\", \"arguments\": {arguments}}}, \
             {{\"type\": \"function_call_output\", \"call_id\": \"c\", \"output\": {result}}}, {{\"role\": \"user\", \"content\": \"?\"}}]}}"
        )
    };
    for (path, body) in [
        ("/v1/chat/completions", format!("{{{}", ask(&chat_call(&escaped)))),
        ("/v1/chat/completions", format!("{{{}", ask(&chat_call(&arguments)))),
        ("/v1/responses", responses(&escaped)),
        // Some clients give arguments as an object, others as text.
        ("/v1/responses", responses(&arguments)),
        ("/api/chat", format!("{{\"model\": \"fable\", {}", ask(&chat_call(&escaped)))),
        ("/v1/messages", format!("{{\"model\": \"fable\", \"max_tokens\": 9, {}", ask(&anthropic))),
        ("/api/chat", format!("{{\"model\": \"fable\", {}", ask(&chat_call(&arguments)))),
    ] {
        // A server of its own: nothing of the prompt is in its cache.
        let server = Server::start();
        server.says("yes");
        send(&server, path, &body).await;
        let prompt = server.seen();
        for (key, written, _) in ARGUMENTS {
            let pair = format!("<arg_key>{key}</arg_key><arg_value>{written}</arg_value>");
            let loose = format!("<arg_key>{key}</arg_key>\n<arg_value>{written}</arg_value>");
            assert!(prompt.contains(&pair) || prompt.contains(&loose), "{path}: {pair} is not in {prompt}");
        }
        assert_eq!(prompt.matches(RESULT).count(), 2, "{path}: {prompt}");
    }
}
