//! The published shapes, in every interface, as a whole and in pieces.

use serde_json::{Value, json};

use super::Server;
use crate::fields::{CHAT, COMPLETIONS, COUNT, Field, MESSAGES, RESPONSES, TOOL, Use};

const CHAT_PATH: &str = "/v1/chat/completions";
const CALL: &str = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>";

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn schema() -> Value {
    json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
}

fn merge(mut base: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

/// What an answer says, whichever interface gave it: reasoning, text, calls (name, arguments), end.
pub(super) type Said = (String, String, Vec<(String, String)>, String);

/// One question in all interfaces, with the interface's own tool form, as a whole and as a stream.
async fn ask_all(server: &Server, script: &str, stop: Option<&str>, max_tokens: u32) -> Vec<(&'static str, Said)> {
    let tool = json!({"type": "function", "function": {"name": "get_weather", "parameters": schema()}});
    let flat = json!({"type": "function", "name": "get_weather", "parameters": schema()});
    let input = json!({"name": "get_weather", "input_schema": schema()});
    let mut chat = json!({"messages": user("hi"), "tools": [tool], "max_tokens": max_tokens});
    let mut messages = json!({"model": "fable", "messages": user("hi"), "tools": [input], "max_tokens": max_tokens});
    let responses = json!({"input": "hi", "tools": [flat], "max_output_tokens": max_tokens});
    if let Some(stop) = stop {
        chat["stop"] = json!([stop]);
        messages["stop_sequences"] = json!([stop]);
    }
    let mut all = vec![];
    server.says(script);
    all.push(("chat", said_by_chat(&server.ok(CHAT_PATH, &chat).await)));
    server.says(script);
    all.push(("chat stream", said_by_chunks(&server.stream(CHAT_PATH, &chat).await)));
    server.says(script);
    all.push(("messages", said_by_message(&server.ok("/v1/messages", &messages).await)));
    server.says(script);
    all.push(("messages stream", said_by_message_events(&server.stream("/v1/messages", &messages).await)));
    // Responses have no stop strings.
    if stop.is_none() {
        server.says(script);
        all.push(("responses", said_by_response(&server.ok("/v1/responses", &responses).await)));
        server.says(script);
        let events = server.stream("/v1/responses", &responses).await;
        check_events(&events);
        all.push(("responses stream", said_by_response(&events.last().unwrap()["response"])));
    }
    all
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

pub(super) fn said_by_chat(answer: &Value) -> Said {
    let choice = &answer["choices"][0];
    let message = &choice["message"];
    let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
    let call = |call: &Value| (text(&call["function"]["name"]), text(&call["function"]["arguments"]));
    let end = match choice["finish_reason"].as_str().unwrap() {
        "tool_calls" => "calls",
        other => other,
    };
    (text(&message["reasoning_content"]), text(&message["content"]), calls.iter().map(call).collect(), end.to_owned())
}

pub(super) fn said_by_chunks(chunks: &[Value]) -> Said {
    let mut said = Said::default();
    for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
        let delta = &choice["delta"];
        said.0.push_str(&text(&delta["reasoning_content"]));
        said.1.push_str(&text(&delta["content"]));
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            if call["id"].is_string() {
                said.2.push((text(&call["function"]["name"]), String::new()));
            }
            said.2.last_mut().unwrap().1.push_str(&text(&call["function"]["arguments"]));
        }
        if let Some(end) = choice["finish_reason"].as_str() {
            said.3 = if end == "tool_calls" { "calls".into() } else { end.into() };
        }
    }
    said
}

fn end_of_message(value: &Value) -> String {
    match value.as_str().unwrap() {
        "tool_use" => "calls",
        "max_tokens" => "length",
        "end_turn" | "stop_sequence" => "stop",
        other => other,
    }
    .to_owned()
}

pub(super) fn said_by_message(message: &Value) -> Said {
    let mut said = Said::default();
    for block in message["content"].as_array().unwrap() {
        match block["type"].as_str().unwrap() {
            "thinking" => {
                assert!(!text(&block["signature"]).is_empty());
                said.0.push_str(&text(&block["thinking"]));
            }
            "text" => said.1.push_str(&text(&block["text"])),
            _ => said.2.push((text(&block["name"]), block["input"].to_string())),
        }
    }
    said.3 = end_of_message(&message["stop_reason"]);
    said
}

pub(super) fn said_by_message_events(events: &[Value]) -> Said {
    assert_eq!(
        (&events[0]["type"], &events.last().unwrap()["type"]),
        (&json!("message_start"), &json!("message_stop"))
    );
    let mut said = Said::default();
    let (mut open, mut has_signature) = (None, true);
    for event in events {
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert!(open.is_none(), "{event}");
                open = Some(event["index"].clone());
                let block = &event["content_block"];
                if block["type"] == "tool_use" {
                    said.2.push((text(&block["name"]), String::new()));
                }
                has_signature = block["type"] != "thinking";
            }
            "content_block_delta" => {
                assert_eq!(open.as_ref(), Some(&event["index"]));
                let delta = &event["delta"];
                said.0.push_str(&text(&delta["thinking"]));
                said.1.push_str(&text(&delta["text"]));
                if delta["type"] == "input_json_delta" {
                    said.2.last_mut().unwrap().1.push_str(&text(&delta["partial_json"]));
                }
                has_signature |= delta["type"] == "signature_delta";
            }
            "content_block_stop" => {
                assert!(open.take() == Some(event["index"].clone()) && has_signature, "{event}");
            }
            "message_delta" => said.3 = end_of_message(&event["delta"]["stop_reason"]),
            _ => {}
        }
    }
    said
}

pub(super) fn said_by_response(response: &Value) -> Said {
    let mut said = Said::default();
    for item in response["output"].as_array().unwrap() {
        match item["type"].as_str().unwrap() {
            "reasoning" => said.0.push_str(&text(&item["content"][0]["text"])),
            "message" => said.1.push_str(&text(&item["content"][0]["text"])),
            _ => said.2.push((text(&item["name"]), text(&item["arguments"]))),
        }
    }
    said.3 = match response["status"].as_str().unwrap() {
        "incomplete" => "length",
        _ if !said.2.is_empty() => "calls",
        _ => "stop",
    }
    .to_owned();
    said
}

/// Numbers in order, every item and part opened and closed once.
#[track_caller]
pub(super) fn check_events(events: &[Value]) {
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i, "{event}");
    }
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..2], ["response.created", "response.in_progress"]);
    for (open, close) in [
        ("response.output_item.added", "response.output_item.done"),
        ("response.content_part.added", "response.content_part.done"),
    ] {
        let places = |kind: &str| {
            let of_kind = events.iter().filter(|event| event["type"] == kind);
            of_kind.map(|event| event["output_index"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(places(open), places(close), "{open}");
    }
    // What was written piece by piece is what each end says.
    for (kind, key) in [
        ("response.output_text", "text"),
        ("response.reasoning_text", "text"),
        ("response.function_call_arguments", "arguments"),
        ("response.custom_tool_call_input", "input"),
    ] {
        let mut written = String::new();
        for event in events {
            match event["type"].as_str().unwrap().strip_prefix(kind) {
                Some(".delta") => written.push_str(&text(&event["delta"])),
                Some(".done") => assert_eq!(text(&event[key]), std::mem::take(&mut written), "{event}"),
                _ => {}
            }
        }
        assert!(written.is_empty() || events.last().unwrap()["type"] != "response.completed", "{kind}: {written}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_interface_says_the_same() {
    let server = Server::start();
    let call = vec![("get_weather".to_owned(), "{\"city\": \"Paris\"}".to_owned())];
    let none: Vec<(String, String)> = vec![];
    let cases: Vec<(String, Option<&str>, u32, Said)> = vec![
        ("yes".into(), None, 99, (String::new(), "yes".into(), none.clone(), "stop".into())),
        ("<think>a fox</think>yes".into(), None, 99, ("a fox".into(), "yes".into(), none.clone(), "stop".into())),
        // A bare end of the reasoning.
        ("a fox</think> yes".into(), None, 99, (String::new(), "a fox yes".into(), none.clone(), "stop".into())),
        ("</think>yes".into(), None, 99, (String::new(), "yes".into(), none.clone(), "stop".into())),
        (CALL.into(), None, 99, (String::new(), String::new(), call.clone(), "calls".into())),
        (format!("<think>so</think>{CALL}"), None, 99, ("so".into(), String::new(), call.clone(), "calls".into())),
        // Stop strings are for the text.
        (
            "<think>a fox</think>yes fox no".into(),
            Some("fox"),
            99,
            ("a fox".into(), "yes ".into(), none.clone(), "stop".into()),
        ),
        (CALL.into(), Some("Paris"), 99, (String::new(), String::new(), call.clone(), "calls".into())),
        (CALL.into(), Some("arg_value"), 99, (String::new(), String::new(), call.clone(), "calls".into())),
    ];
    for (script, stop, max_tokens, expected) in cases {
        for (interface, said) in ask_all(&server, &script, stop, max_tokens).await {
            let calls: Vec<(String, Value)> =
                said.2.iter().map(|(name, json)| (name.clone(), serde_json::from_str(json).unwrap())).collect();
            let wanted: Vec<(String, Value)> =
                expected.2.iter().map(|(name, json)| (name.clone(), serde_json::from_str(json).unwrap())).collect();
            assert_eq!(
                (said.0, said.1, calls, said.3),
                (expected.0.clone(), expected.1.clone(), wanted, expected.3.clone()),
                "{interface}: {script:?}"
            );
        }
    }
    // A call that was cut off is never complete.
    let n = server.app.tokenizer.encode(CALL, false).unwrap().len() as u32;
    for max_tokens in 3..n {
        for (interface, said) in ask_all(&server, CALL, None, max_tokens).await {
            assert_eq!(said.3, "length", "{interface} {max_tokens}");
            for (_, arguments) in said.2 {
                assert!(serde_json::from_str::<Value>(&arguments).is_err(), "{interface} {max_tokens}: {arguments}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_does_what_its_table_says() {
    let server = Server::start();
    for table in [&CHAT, &COMPLETIONS, &RESPONSES, &MESSAGES, &COUNT] {
        let least: Value = serde_json::from_str(&table.least.replace("MODEL", "fable")).unwrap();
        let fields: Vec<&Field> = table.fields.iter().flat_map(|fields| fields.iter()).collect();
        for field in &fields {
            let sample: Value = serde_json::from_str(&field.sample.replace("MODEL", "fable")).unwrap();
            let refused = matches!(field.r#use, Use::Refused(_));
            for (value, status) in [(sample, if refused { 400 } else { 200 }), (Value::Null, 200)] {
                let is_needed = least.get(field.name).is_some();
                if value.is_null() && is_needed {
                    continue;
                }
                let mut body = least.clone();
                body[field.name] = value;
                server.says("yes");
                let (found, answer) = server.post(table.path, &body).await;
                assert_eq!(found, status, "{} {}: {answer}", table.path, body);
                if found == 400 {
                    assert!(answer.to_string().contains(field.name), "{answer}");
                }
            }
        }
        let names: std::collections::HashSet<_> = fields.iter().map(|field| field.name).collect();
        assert_eq!(names.len(), fields.len(), "a field of {} stands there twice", table.path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slips_are_told_in_a_header() {
    let server = Server::start();
    for (path, body) in [
        (CHAT_PATH, json!({"messages": user("hi"), "max_tokens": 1, "temprature": 1})),
        ("/v1/completions", json!({"prompt": "hi", "max_tokens": 1, "topP": 1})),
        ("/v1/responses", json!({"input": "hi", "max_output_token": 1})),
        ("/v1/messages", json!({"model": "fable", "messages": user("hi"), "max_tokens": 1, "stop_sequence": ["x"]})),
    ] {
        for is_stream in [false, true] {
            let body = merge(body.clone(), json!({"stream": is_stream}));
            let request = axum::http::Request::post(path).header("content-type", "application/json");
            let (status, headers, _) = server.send(request.body(body.to_string().into()).unwrap()).await;
            let warning = headers.get("x-tandem-warning").map(|value| value.to_str().unwrap().to_owned());
            assert!(
                status == 200 && warning.as_deref().is_some_and(|w| w.contains("did you mean")),
                "{path} {warning:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_and_items_of_every_type_are_read() {
    let server = Server::start();
    let png = "iVBORw0KGgo=";
    let chat_parts = [
        json!({"type": "text", "text": "x"}),
        json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}),
        json!({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
        json!({"type": "file", "file": {"file_id": "f"}}),
        json!({"type": "refusal", "refusal": "no"}),
    ];
    let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let custom = json!({"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}});
    let mut chat: Vec<Value> = chat_parts.iter().map(|part| json!({"role": "user", "content": [part]})).collect();
    chat.extend([
        json!({"role": "developer", "content": [{"type": "text", "text": "x"}]}),
        json!({"role": "assistant", "content": null, "tool_calls": [call]}),
        json!({"role": "assistant", "tool_calls": [custom]}),
        json!({"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}}),
        json!({"role": "assistant", "content": null, "refusal": "no", "audio": {"id": "a"}, "annotations": []}),
        json!({"role": "assistant", "content": "x", "reasoning_content": "y", "name": "n"}),
        json!({"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "x"}]}),
        json!({"role": "tool", "tool_call_id": "c", "content": chat_parts}),
        json!({"role": "function", "name": "f", "content": "x"}),
        json!({"role": "system", "content": "x", "name": "n"}),
    ]);
    for message in chat {
        server.says("yes");
        server.ok(CHAT_PATH, &json!({"messages": [message, user("hi")[0]], "max_tokens": 1})).await;
    }
    let blocks = [
        json!({"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "citations": null}),
        json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png}}),
        json!({"type": "image", "source": {"type": "url", "url": "https://a.example/x.png"}}),
        json!({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": png}}),
        json!({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}, "title": "t"}),
        json!({"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "x"}]}),
        json!({"type": "tool_reference", "tool_name": "f"}),
    ];
    let result = |content: Value| json!({"type": "tool_result", "tool_use_id": "c", "content": content});
    let mut anthropic: Vec<Value> = blocks.iter().map(|block| json!({"role": "user", "content": [block]})).collect();
    anthropic.extend(blocks.iter().map(|block| json!({"role": "user", "content": [result(json!([block]))]})));
    anthropic.extend([
        json!({"role": "user", "content": [result(Value::Null), {"type": "text", "text": "x"}]}),
        json!({"role": "user", "content": [{"type": "container_upload", "file_id": "f"}]}),
        json!({"role": "assistant", "content": [
            {"type": "thinking", "thinking": "x", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
            {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
        ]}),
    ]);
    for message in anthropic {
        let body = json!({"model": "fable", "messages": [user("a")[0], message, user("hi")[0]], "max_tokens": 1});
        server.says("yes");
        server.ok("/v1/messages", &body).await;
        server.ok("/v1/messages/count_tokens", &json!({"model": "fable", "messages": body["messages"]})).await;
    }
    let message = |content: Value| json!({"type": "message", "role": "user", "content": [content]});
    let items = [
        message(json!({"type": "input_text", "text": "x"})),
        message(json!({"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo=", "detail": "auto"})),
        message(json!({"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64,eA=="})),
        message(json!({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}})),
        json!({"role": "developer", "content": "x"}),
        json!({"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": [
            {"type": "output_text", "text": "x", "annotations": [], "logprobs": []}, {"type": "refusal", "refusal": "no"},
        ]}),
        json!({"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}]}),
        json!({"type": "reasoning", "id": "r", "summary": [], "content": null, "encrypted_content": "x"}),
        json!({"type": "function_call", "id": "f", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"}),
        json!({"type": "function_call_output", "call_id": "c", "output": "x"}),
        json!({"type": "function_call_output", "call_id": "c", "output": [
            {"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "x"},
        ]}),
        json!({"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "x"}),
        json!({"type": "custom_tool_call_output", "call_id": "c", "output": "x"}),
        json!({"type": "local_shell_call", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}}),
        json!({"type": "local_shell_call_output", "call_id": "c", "output": "x"}),
        json!({"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search", "query": "x"}}),
        json!({"type": "file_search_call", "id": "w", "queries": [], "status": "completed"}),
        json!({"type": "computer_call", "id": "w", "call_id": "c", "action": {}, "status": "completed"}),
        json!({"type": "image_generation_call", "id": "w", "result": png, "status": "completed"}),
        json!({"type": "code_interpreter_call", "id": "w", "code": "x", "status": "completed"}),
        json!({"type": "mcp_list_tools", "id": "w", "server_label": "x", "tools": []}),
        json!({"type": "mcp_call", "id": "w", "server_label": "x", "name": "f", "arguments": "{}"}),
        json!({"type": "mcp_approval_request", "id": "w", "server_label": "x", "name": "f", "arguments": "{}"}),
        json!({"type": "compaction", "encrypted_content": "x"}),
    ];
    for item in items {
        server.says("yes");
        server
            .ok("/v1/responses", &json!({"input": [item, {"role": "user", "content": "hi"}], "max_output_tokens": 1}))
            .await;
    }
    // What no schema has is refused by its name.
    for (path, body, name) in [
        (
            CHAT_PATH,
            json!({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}),
            "messages[0].content[0].type",
        ),
        (CHAT_PATH, json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (CHAT_PATH, json!({"messages": [{"content": "x"}]}), "messages[0].role"),
        (CHAT_PATH, json!({"messages": user("x"), "tools": [{"type": "function"}]}), "tools[0].function"),
        (CHAT_PATH, json!({"messages": user("x"), "tool_choice": "sometimes"}), "tool_choice"),
        ("/v1/responses", json!({"input": [5]}), "input[0]"),
        ("/v1/responses", json!({"input": 5}), "input"),
        ("/v1/responses", json!({}), "input"),
    ] {
        let (status, error) = server.post(path, &body).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!(name)), "{body}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_of_every_type_and_every_choice() {
    let server = Server::start();
    let hosted = [
        "web_search",
        "web_search_preview",
        "file_search",
        "code_interpreter",
        "image_generation",
        "mcp",
        "local_shell",
        "shell",
        "apply_patch",
        "computer_use_preview",
        "tool_search",
    ];
    let mut tools = vec![
        json!({"type": "function", "name": "get_weather", "parameters": schema(), "strict": true}),
        json!({"type": "namespace", "name": "multi", "description": "x", "tools": [
            {"type": "function", "name": "spawn", "parameters": {"type": "object", "properties": {}}},
            {"type": "function", "name": "get_weather", "parameters": schema()},
        ]}),
        json!({"type": "custom", "name": "apply_patch", "description": "x", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}}),
    ];
    tools.extend(hosted.iter().map(|kind| json!({"type": kind})));
    let body = json!({"input": "hi", "tools": tools});
    for (script, kind, name, namespace, field, value) in [
        (CALL, "function_call", "get_weather", Value::Null, "arguments", "{\"city\": \"Paris\"}"),
        ("<tool_call>spawn</tool_call>", "function_call", "spawn", json!("multi"), "arguments", "{}"),
        (
            "<tool_call>multi__get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>",
            "function_call",
            "get_weather",
            json!("multi"),
            "arguments",
            "{\"city\": \"Rome\"}",
        ),
        (
            "<tool_call>apply_patch<arg_key>input</arg_key><arg_value>*** Begin\n+x</arg_value></tool_call>",
            "custom_tool_call",
            "apply_patch",
            Value::Null,
            "input",
            "*** Begin\n+x",
        ),
    ] {
        server.says(script);
        let item = server.ok("/v1/responses", &body).await["output"][0].clone();
        assert_eq!(
            (&item["type"], &item["name"], &item["namespace"], &item[field]),
            (&json!(kind), &json!(name), &namespace, &json!(value))
        );
        server.says(script);
        let events = server.stream("/v1/responses", &body).await;
        check_events(&events);
        assert_eq!(events.last().unwrap()["response"]["output"][0][field], value);
        // And back.
        let back = json!({"input": [item, {"type": format!("{kind}_output"), "call_id": item["call_id"], "output": "x"}], "tools": tools});
        server.ok("/v1/responses", &back).await;
    }
    let chat_tools = json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": schema()}},
        {"type": "custom", "custom": {"name": "patch", "format": {"type": "text"}}},
    ]);
    let chat =
        |choice: Value| json!({"messages": user("hi"), "tools": chat_tools, "tool_choice": choice, "max_tokens": 60});
    let patch = "<tool_call>patch<arg_key>input</arg_key><arg_value>a\nb</arg_value></tool_call>";
    server.says(patch);
    let answer = server.ok(CHAT_PATH, &chat(json!("auto"))).await;
    assert_eq!(answer["choices"][0]["message"]["tool_calls"][0]["custom"], json!({"name": "patch", "input": "a\nb"}));
    server.says(patch);
    let chunks = server.stream(CHAT_PATH, &chat(json!("auto"))).await;
    let input: String =
        chunks.iter().map(|c| text(&c["choices"][0]["delta"]["tool_calls"][0]["custom"]["input"])).collect();
    assert_eq!(input, "a\nb");
    let allowed = |mode: &str, name: &str| {
        json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [
            {"type": "function", "function": {"name": name}},
        ]}})
    };
    // Whatever the model would rather say, the choice is kept.
    for (choice, script, n_calls) in [
        (json!("auto"), CALL, 1),
        (json!("none"), CALL, 0),
        (json!("required"), "yes", 1),
        (json!({"type": "function", "function": {"name": "get_weather"}}), "yes", 1),
        (json!({"type": "custom", "custom": {"name": "patch"}}), "yes", 1),
        (allowed("auto", "get_weather"), CALL, 1),
        (allowed("auto", "get_weather"), patch, 0),
        (allowed("required", "get_weather"), "yes", 1),
    ] {
        let body = merge(chat(choice.clone()), json!({"parallel_tool_calls": false}));
        server.says(script);
        let answer = server.ok(CHAT_PATH, &body).await;
        let calls = answer["choices"][0]["message"]["tool_calls"].as_array().map_or(0, Vec::len);
        // The script goes on with its own words in the argument until it ends.
        assert!(calls == n_calls || answer["choices"][0]["finish_reason"] == "length", "{choice} {script}: {answer}");
    }
    for (choice, words) in [
        (json!({"type": "function", "function": {"name": "g"}}), "not among the tools"),
        (allowed("auto", "g"), "not among the tools"),
        (json!({"type": "web_search_preview"}), "cannot run"),
    ] {
        let (status, error) = server.post(CHAT_PATH, &chat(choice)).await;
        assert!(status == 400 && text(&error["error"]["message"]).contains(words), "{error}");
    }
    // Before there were tools.
    let body = json!({"messages": user("hi"), "functions": [{"name": "get_weather", "parameters": schema()}], "function_call": "auto"});
    server.says(CALL);
    let choice = server.ok(CHAT_PATH, &body).await["choices"][0].clone();
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["function_call"]["name"]),
        (&json!("function_call"), &json!("get_weather"))
    );
    for (kind, name) in [
        ("bash_20250124", "bash"),
        ("text_editor_20250728", "str_replace_based_edit_tool"),
        ("web_search_20250305", "web_search"),
    ] {
        let body =
            json!({"model": "fable", "messages": user("hi"), "max_tokens": 3, "tools": [{"type": kind, "name": name}]});
        server.ok("/v1/messages", &body).await;
    }
}

/// The prompt that a request to /v1/messages makes.
async fn prompt_of(request: &Value) -> String {
    Server::start().prompt_of("/v1/messages", request).await
}

/// Tools that come later: the prompt's front stays as it was, the definition stands where the first reference is.
#[tokio::test(flavor = "multi_thread")]
async fn deferred_tools_come_with_their_reference() {
    let server = Server::start();
    let tool = |name: &str, defers: bool| json!({"name": name, "description": format!("About {name}."), "input_schema": schema(), "defer_loading": defers});
    let tools = json!([tool("find", false), tool("get_weather", true), tool("get_time", true)]);
    let hosted = json!([{"type": "tool_search_tool_regex_20251119", "name": "s"}, tool("find", true), tool("get_weather", true)]);
    let searched = |content: Value| {
        json!([
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "find", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": content}]},
        ])
    };
    let reference = |name: &str| json!({"type": "tool_reference", "tool_name": name});
    let body = |messages: Value, tools: &Value| json!({"model": "fable", "messages": messages, "tools": tools, "max_tokens": 99});
    let text = json!({"type": "text", "text": "Found."});
    // The request; the tools that the prompt shows, and whether the call of get_weather is one.
    for (request, shown, is_call) in [
        (body(user("hi"), &tools), vec!["find"], false),
        (body(searched(json!("nothing")), &tools), vec!["find"], false),
        (body(searched(json!([reference("get_weather")])), &tools), vec!["find", "get_weather"], true),
        (body(searched(json!([reference("get_time")])), &tools), vec!["find", "get_time"], false),
        (
            body(
                searched(json!([text, reference("get_time"), reference("get_weather"), reference("get_weather")])),
                &tools,
            ),
            vec!["find", "get_time", "get_weather"],
            true,
        ),
        (
            body(json!([{"role": "user", "content": [reference("get_weather"), text]}]), &tools),
            vec!["find", "get_weather"],
            true,
        ),
        (body(searched(json!([reference("find"), reference("other")])), &tools), vec!["find"], false),
        // The vendor's search does not run here.
        (body(user("hi"), &hosted), vec!["find", "get_weather"], true),
        (
            merge(body(user("hi"), &tools), json!({"tool_choice": {"type": "tool", "name": "get_weather"}})),
            vec!["find", "get_weather"],
            true,
        ),
    ] {
        for is_stream in [false, true] {
            server.says(CALL);
            let said = match is_stream {
                false => said_by_message(&server.ok("/v1/messages", &request).await),
                true => said_by_message_events(&server.stream("/v1/messages", &request).await),
            };
            assert_eq!(said.2.len(), usize::from(is_call), "{request}: {said:?}");
        }
        let mut count = request.clone();
        count.as_object_mut().unwrap().remove("max_tokens");
        let counted = server.ok("/v1/messages/count_tokens", &count).await["input_tokens"].clone();
        server.says("yes");
        let usage = server.ok("/v1/messages", &merge(request.clone(), json!({"max_tokens": 1}))).await["usage"].clone();
        let n = |key: &str| usage[key].as_u64().unwrap();
        assert_eq!(counted, n("input_tokens") + n("cache_read_input_tokens"), "{request}");
        let seen = prompt_of(&request).await;
        for name in ["find", "get_weather", "get_time"] {
            let n = seen.matches(&format!("About {name}.")).count();
            assert_eq!(n, usize::from(shown.contains(&name)), "{name} of {request}: {seen}");
        }
        if request["tools"] == tools && request.get("tool_choice").is_none() {
            let front = prompt_of(&body(user("hi"), &tools)).await;
            let end = front.find("hi").unwrap();
            assert_eq!(seen[..end], front[..end]);
        }
    }
    for (tools, param) in [
        (json!([tool("find", true)]), "tools"),
        (
            json!([tool("find", false), merge(tool("g", true), json!({"defer_loading": "yes"}))]),
            "tools[1].defer_loading",
        ),
    ] {
        let (status, error) = server.post("/v1/messages", &body(user("hi"), &tools)).await;
        assert!(status == 400 && error.to_string().contains("defer_loading"), "{param}: {error}");
    }
    for field in TOOL {
        let mut tool = tool("find", false);
        tool[field.name] = serde_json::from_str(field.sample).unwrap();
        server.says("yes");
        server.ok("/v1/messages", &merge(body(user("hi"), &json!([tool])), json!({"max_tokens": 1}))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_follow_the_schema() {
    let server = Server::start();
    let root = json!({
        "type": "object",
        "properties": {
            "zip": {"$ref": "#/$defs/Zip"}, "both": {"allOf": [{"$ref": "#/$defs/Zip"}, {"maxLength": 9}]},
            "const": {"const": "7"}, "list": {"type": ["array", "null"]}, "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "number": {"type": "integer"}, "tree": {"$ref": "#"}, "enum": {"enum": ["1", 2]},
        },
        "anyOf": [{"properties": {"late": {"type": "string"}}}, {}],
        "additionalProperties": {"type": "string"},
        "$defs": {"Zip": {"type": "string"}},
    });
    for (key, written, read) in [
        ("zip", "12345", "\"12345\""),
        ("both", "12345", "\"12345\""),
        ("const", "7", "\"7\""),
        ("list", "[1, 2]", "[1, 2]"),
        ("list", "null", "null"),
        ("any", "12", "\"12\""),
        ("number", "123456789012345678901234567890", "123456789012345678901234567890"),
        ("number", "3.0", "3"),
        ("tree", "{\"number\": 12345678901234567890123}", "{\"number\": 12345678901234567890123}"),
        ("enum", "1", "\"1\""),
        ("enum", "2", "2"),
        ("late", "true", "\"true\""),
        ("other", "{\"a\": 1}", "\"{\\\"a\\\": 1}\""),
    ] {
        let script = format!("<tool_call>f<arg_key>{key}</arg_key><arg_value>{written}</arg_value></tool_call>");
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": root}});
        server.says(&script);
        let answer = server.ok(CHAT_PATH, &json!({"messages": user("hi"), "tools": [tool]})).await;
        let arguments = text(&answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]);
        assert_eq!(arguments, format!("{{\"{key}\": {read}}}"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forced_calls_obey_the_schema_or_name_what_they_cannot() {
    let server = Server::start();
    let property = |schema: Value| {
        json!({"type": "object", "properties": {"a": schema}, "required": ["a"],
        "$defs": {"Loc": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}, "required": ["name"],
            "additionalProperties": false},
            "Tree": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]}}, "additionalProperties": false}}})
    };
    for (schema, keyword) in [
        (property(json!({"$ref": "#/$defs/Loc"})), ""),
        (property(json!({"type": "array", "items": {"$ref": "#/$defs/Loc"}, "minItems": 1, "maxItems": 1})), ""),
        (property(json!({"$ref": "#/$defs/Tree"})), ""),
        (property(json!({"type": "string", "pattern": "^[a-c]{2}$", "maxLength": 5})), ""),
        (property(json!({"type": "string", "minLength": 2, "maxLength": 3})), ""),
        (property(json!({"const": 5})), ""),
        (property(json!({"enum": ["red", 5, null]})), ""),
        (property(json!({"type": ["integer", "null"]})), ""),
        (property(json!({"allOf": [{"type": "integer", "minimum": 1}, {"maximum": 3}]})), ""),
        (property(json!({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "boolean"}]})), ""),
        (json!({"type": "object", "properties": {}, "required": ["b"]}), ""),
        (json!({"type": "object", "patternProperties": {"x": {}}}), "patternProperties"),
        (json!({"type": "object", "properties": {"a": {}}, "minProperties": 1}), "minProperties"),
        (json!({"type": "object", "dependentRequired": {"a": ["b"]}}), "dependentRequired"),
        (json!({"type": "object", "not": {}}), "not"),
        (json!({"type": "array"}), "type"),
        (property(json!({"type": "string", "not": {"const": "x"}})), "not"),
        (property(json!({"type": "array", "uniqueItems": true})), "uniqueItems"),
        (property(json!({"$ref": "#/$defs/None"})), "#/$defs/None"),
    ] {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": schema}});
        let body = json!({"messages": user("hi"), "tools": [tool], "tool_choice": "required", "max_tokens": 200});
        server.says("");
        let (status, answer) = server.post(CHAT_PATH, &body).await;
        match keyword {
            "" => {
                assert_eq!(status, 200, "{schema}: {answer}");
                let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
                assert_eq!(call["name"], "f", "{schema}: {answer}");
            }
            keyword => {
                assert!(status == 400 && text(&answer["error"]["message"]).contains(keyword), "{schema}: {answer}")
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_format_holds_for_text_and_leaves_calls_alone() {
    let server = Server::start();
    let format = json!({"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": false});
    let chat = json!({"messages": user("hi"), "max_tokens": 60,
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": schema()}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": format, "strict": true}}});
    let responses = json!({"input": "hi", "max_output_tokens": 60,
        "tools": [{"type": "function", "name": "get_weather", "parameters": schema()}],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": format}}});
    let messages = json!({"model": "fable", "messages": user("hi"), "max_tokens": 60,
        "tools": [{"name": "get_weather", "input_schema": schema()}],
        "output_config": {"format": {"type": "json_schema", "schema": format}}});
    for (script, calls, content) in [(CALL, 1, ""), ("{\"sum\": 5}", 0, "{\"sum\": 5}")] {
        server.says(script);
        let said = said_by_chat(&server.ok(CHAT_PATH, &chat).await);
        assert_eq!((said.2.len(), said.1.as_str()), (calls, content));
        server.says(script);
        let said = said_by_response(&server.ok("/v1/responses", &responses).await);
        assert_eq!((said.2.len(), said.1.as_str()), (calls, content));
        server.says(script);
        let said = said_by_message(&server.ok("/v1/messages", &messages).await);
        assert_eq!((said.2.len(), said.1.as_str()), (calls, content));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_can_be_continued_by_their_ids() {
    let server = Server::start();
    server.says("yes");
    let first =
        server.ok("/v1/responses", &json!({"input": "one", "instructions": "be brief", "metadata": {"a": "b"}})).await;
    assert_eq!(
        (&first["instructions"], &first["metadata"]["a"], &first["store"]),
        (&json!("be brief"), &json!("b"), &json!(true))
    );
    let id = text(&first["id"]);
    assert_eq!(server.get(&format!("/v1/responses/{id}")).await, (200, first.clone()));
    let items = server.get(&format!("/v1/responses/{id}/input_items")).await.1;
    assert_eq!(items["data"][0]["content"][0]["text"], "one");
    let tokens = |answer: &Value| answer["usage"]["input_tokens"].as_u64().unwrap();
    let whole = json!({"input": [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "two"},
    ]});
    let expected = tokens(&server.ok("/v1/responses", &whole).await);
    server.says("no");
    let second = server.ok("/v1/responses", &json!({"input": "two", "previous_response_id": id})).await;
    assert_eq!((tokens(&second), &second["previous_response_id"]), (expected, &json!(id)));
    let third = server.ok("/v1/responses", &json!({"input": "three", "previous_response_id": second["id"]})).await;
    assert!(tokens(&third) > expected);
    // The AI SDK refers to single items.
    let referred = json!({"input": [
        {"role": "user", "content": "one"}, {"type": "item_reference", "id": first["output"][0]["id"]},
        {"role": "user", "content": "two"},
    ]});
    assert_eq!(tokens(&server.ok("/v1/responses", &referred).await), expected);
    for (body, status, param) in [
        (json!({"input": "x", "previous_response_id": "resp_0123"}), 400, "previous_response_id"),
        (json!({"input": [{"type": "item_reference", "id": "msg_0123"}]}), 404, "input[0].id"),
        (json!({"input": "x", "conversation": "conv_1"}), 400, "conversation"),
        (json!({"input": "x", "conversation": {"id": "conv_1"}}), 400, "conversation"),
        (json!({"input": "x", "background": true}), 400, "background"),
    ] {
        let (found, error) = server.post("/v1/responses", &body).await;
        assert_eq!((found, &error["error"]["param"]), (status, &json!(param)), "{error}");
    }
    let kept = server.ok("/v1/responses", &json!({"input": "x", "store": false})).await;
    assert_eq!(server.get(&format!("/v1/responses/{}", text(&kept["id"]))).await.0, 404);
    // Reasoning survives in what clients pass through.
    server.says("<think>a fox</think>yes");
    let sealed = server
        .ok("/v1/responses", &json!({"input": "x", "include": ["reasoning.encrypted_content"], "store": false}))
        .await;
    let mut item = sealed["output"][0].clone();
    item.as_object_mut().unwrap().remove("content");
    let back = json!({"input": [{"role": "user", "content": "x"}, item, sealed["output"][1], {"role": "user", "content": "y"}]});
    let without =
        json!({"input": [{"role": "user", "content": "x"}, sealed["output"][1], {"role": "user", "content": "y"}]});
    assert!(tokens(&server.ok("/v1/responses", &back).await) > tokens(&server.ok("/v1/responses", &without).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_of_prompts_and_answers() {
    let server = Server::start();
    server.says("yes");
    // To score the prompt uses the script up.
    let body = json!({
        "prompt": "Once upon a time", "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0, "ignore_eos": true,
    });
    let logprobs = server.ok("/v1/completions", &body).await["choices"][0]["logprobs"].clone();
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().unwrap().len(), 5, "{logprobs}");
    }
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    assert_eq!(logprobs["text_offset"], json!([0, 4, 9, 11, 16]), "{logprobs}");
    let none = server.ok("/v1/completions", &merge(body.clone(), json!({"max_tokens": 0}))).await;
    assert_eq!(none["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 4, "{none}");
    assert_eq!(
        (&none["choices"][0]["text"], &none["usage"]["completion_tokens"]),
        (&json!("Once upon a time"), &json!(0))
    );
    server.says("yes");
    let zero = server.ok("/v1/completions", &json!({"prompt": "x", "logprobs": 0, "max_tokens": 1})).await;
    assert!(zero["choices"][0]["logprobs"]["top_logprobs"][0]["yes"].is_number(), "{zero}");
    server.says("yes");
    let events = server.stream("/v1/completions", &body).await;
    let n: usize = events.iter().map(|e| e["choices"][0]["logprobs"]["tokens"].as_array().map_or(0, Vec::len)).sum();
    assert_eq!(n, 5);
    server.says("<think>a fox</think>yes");
    let answer = server.ok("/v1/responses", &json!({"input": "x", "top_logprobs": 2})).await;
    let shown = answer["output"][1]["content"][0]["logprobs"].as_array().unwrap();
    assert!(shown.len() == 1 && shown[0]["top_logprobs"].as_array().unwrap().len() == 2, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_smaller_promises() {
    let server = Server::start();
    assert_eq!(server.get("/v1/models/fable").await.1["id"], "fable");
    assert_eq!(server.get("/v1/models/other").await.0, 404);
    // /tokenize counts what chat runs.
    let conversation = json!({
        "messages": [
            {"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "a", "reasoning_content": "b", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}},
            ]},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": schema()}}],
        "chat_template_kwargs": {"enable_thinking": true},
    });
    let count = server.ok("/tokenize", &conversation).await["count"].clone();
    assert_eq!(count, server.ok(CHAT_PATH, &conversation).await["usage"]["prompt_tokens"]);
    // The answer continues the assistant's message.
    let prefill = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The capital is"}]);
    let ids = |body: Value| {
        let server = &server;
        async move { server.ok("/tokenize", &body).await["tokens"].clone() }
    };
    let continued =
        ids(json!({"messages": prefill, "continue_final_message": true, "add_generation_prompt": false})).await;
    let text_of = server.ok("/detokenize", &json!({"tokens": continued})).await;
    assert!(text(&text_of["prompt"]).ends_with("</think>The capital is"), "{text_of}");
    let count = server.ok("/v1/messages/count_tokens", &json!({"model": "fable", "messages": prefill})).await;
    assert_eq!(count["input_tokens"], continued.as_array().unwrap().len());
    // The same prefix whatever the volatile lines in front of it say.
    let system = |line: &str| json!({"model": "fable", "messages": user("hi"), "system": [{"type": "text", "text": line}, {"type": "text", "text": "Be kind."}]});
    let mut counts = vec![];
    for line in ["x-anthropic-billing-header: cc_version=2.1; cch=36ee5;", "x-anthropic-billing-header: cch=0;"] {
        counts.push(server.ok("/v1/messages/count_tokens", &system(line)).await);
    }
    let plain = json!({"model": "fable", "messages": user("hi"), "system": "Be kind."});
    assert_eq!(counts, vec![server.ok("/v1/messages/count_tokens", &plain).await; 2]);
    // Errors in the interface's form.
    for (method, path, status) in
        [("POST", "/v1/messages/batches", 404), ("GET", "/v1/messages", 405), ("DELETE", "/v1/messages", 405)]
    {
        let request =
            axum::http::Request::builder().method(method).uri(path).header("content-type", "application/json");
        let (found, _, body) = server.send(request.body("{}".into()).unwrap()).await;
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            (found.as_u16(), &body["type"], body["error"]["type"].is_string()),
            (status, &json!("error"), true),
            "{body}"
        );
    }
    // Overflow in the words that clients look for.
    let long = "fox ".repeat(5000);
    let (_, error) =
        server.post("/v1/messages", &json!({"model": "fable", "messages": user(&long), "max_tokens": 5})).await;
    let message = text(&error["error"]["message"]);
    assert!(message.starts_with("prompt is too long: ") && message.contains(" tokens > 4096 maximum"), "{message}");
    for (path, body) in [
        (CHAT_PATH, json!({"messages": user(&long)})),
        ("/v1/completions", json!({"prompt": long})),
        ("/v1/responses", json!({"input": long})),
    ] {
        let (status, error) = server.post(path, &body).await;
        assert_eq!((status, &error["error"]["code"]), (400, &json!("context_length_exceeded")));
        assert!(
            text(&error["error"]["message"])
                .starts_with("This model's maximum context length is 4096 tokens. However, "),
            "{error}"
        );
    }
    let events = server.stream("/v1/responses", &json!({"input": long})).await;
    assert_eq!(
        (&events[2]["type"], &events[2]["response"]["error"]["code"]),
        (&json!("response.failed"), &json!("context_length_exceeded"))
    );
    let kept = json!({"input": [{"role": "user", "content": long}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "hi"}], "truncation": "auto"});
    server.ok("/v1/responses", &kept).await;
    // A budget closes the reasoning.
    server.says(&("fox ".repeat(50) + "</think>"));
    let budget = json!({"model": "fable", "messages": user("hi"), "max_tokens": 30, "thinking": {"type": "enabled", "budget_tokens": 10}});
    let answer = server.ok("/v1/messages", &budget).await;
    assert_eq!(text(&answer["content"][0]["thinking"]).matches("fox").count(), 10, "{answer}");
    assert_eq!(answer["content"][1]["type"], "text", "{answer}");
    for seed in [json!(u64::MAX), json!(i64::MIN), json!(0), json!(5.0)] {
        server.ok(CHAT_PATH, &json!({"messages": user("hi"), "seed": seed, "max_tokens": 1})).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ollama() {
    let server = Server::start();
    let tool = json!({"type": "function", "function": {"name": "get_weather", "parameters": schema()}});
    let chat = json!({"model": "fable:latest", "messages": user("hi"), "tools": [tool], "options": {"num_predict": 99, "temperature": 0}});
    server.says(&format!("<think>so</think>yes{CALL}"));
    let whole = server.ok("/api/chat", &merge(chat.clone(), json!({"stream": false}))).await;
    let message = &whole["message"];
    assert_eq!((&message["content"], &message["thinking"]), (&json!("yes"), &json!("so")), "{whole}");
    assert_eq!(message["tool_calls"][0]["function"], json!({"name": "get_weather", "arguments": {"city": "Paris"}}));
    assert_eq!((&whole["done"], &whole["done_reason"]), (&json!(true), &json!("stop")));
    server.says(&format!("<think>so</think>yes{CALL}"));
    let (status, lines) = server.post("/api/chat", &chat).await;
    let lines: Vec<Value> = text(&lines).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let content: String = lines.iter().map(|line| text(&line["message"]["content"])).collect();
    assert_eq!((status, content.as_str(), &lines.last().unwrap()["done"]), (200, "yes", &json!(true)));
    for body in [
        json!({"prompt": "hi"}),
        json!({"prompt": "hi", "raw": true}),
        json!({"prompt": "hi", "system": "x", "think": false}),
    ] {
        server.says("yes");
        let answer = server.ok("/api/generate", &merge(body, json!({"model": "fable", "stream": false}))).await;
        assert_eq!((&answer["response"], &answer["done"]), (&json!("yes"), &json!(true)));
    }
    server.says("");
    let format = json!({"model": "fable", "prompt": "hi", "stream": false, "format": {"type": "object", "properties": {"a": {"const": 5}}, "required": ["a"], "additionalProperties": false}});
    let answer = server.ok("/api/generate", &format).await;
    assert_eq!(serde_json::from_str::<Value>(&text(&answer["response"])).unwrap(), json!({"a": 5}));
    assert_eq!(server.get("/api/tags").await.1["models"][0]["name"], "fable");
    assert_eq!(server.ok("/api/show", &json!({"model": "fable"})).await["capabilities"][1], "tools");
    let (status, error) = server.post("/api/chat", &json!({"model": "other", "messages": user("hi")})).await;
    assert!(status == 404 && error["error"].is_string(), "{error}");
    // Nothing to answer: the model is to be loaded.
    let load = server.ok("/api/chat", &json!({"model": "fable", "messages": []})).await;
    assert_eq!((&load["done_reason"], &load["message"]["content"]), (&json!("load"), &json!("")));
    assert_eq!(server.ok("/api/generate", &json!({"model": "fable"})).await["done_reason"], "load");
    let hello = json!({"model": "fable", "prompt": "hi", "stream": false});
    for (path, more, param) in [
        ("/api/generate", json!({"template": "{{ .Prompt }}"}), "template"),
        ("/api/generate", json!({"suffix": "x"}), "suffix"),
        ("/api/generate", json!({"options": {"stop": ["x", 5]}}), "stop[1]"),
        ("/api/generate", json!({"options": {"seed": 1.5}}), "seed"),
        ("/api/generate", json!({"options": {"num_predict": "many"}}), "num_predict"),
        ("/api/generate", json!({"format": "yaml"}), "format"),
        ("/api/chat", json!({"messages": [{"role": "user", "content": "x", "tool_calls": {}}]}), "tool_calls"),
        ("/api/chat", json!({"messages": [{"role": "robot", "content": "x"}]}), "role"),
    ] {
        let (status, error) = server.post(path, &merge(hello.clone(), more.clone())).await;
        assert!(status == 400 && text(&error["error"]).contains(param), "{more}: {error}");
    }
    // What is left out is said.
    for (path, more, note) in [
        ("/api/generate", json!({"images": ["AAAA"]}), "images"),
        ("/api/generate", json!({"context": [1, 2]}), "context"),
        ("/api/generate", json!({"options": {"num_predic": 1}}), "num_predict"),
        ("/api/generate", json!({"raw": true, "options": {"Temperature": 1}}), "temperature"),
        ("/api/chat", json!({"messages": user("hi"), "options": {"max_tokens": 1, "num_ctx": 9}}), "num_predict"),
        ("/api/chat", json!({"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}), "images"),
    ] {
        for is_stream in [false, true] {
            let body = merge(merge(hello.clone(), more.clone()), json!({"stream": is_stream}));
            server.says("yes");
            let request = axum::http::Request::post(path).header("content-type", "application/json");
            let (status, headers, _) = server.send(request.body(body.to_string().into()).unwrap()).await;
            let warning = headers.get("x-tandem-warning").map(|value| value.to_str().unwrap().to_owned());
            assert!(status == 200 && warning.as_deref().is_some_and(|w| w.contains(note)), "{more} {warning:?}");
        }
    }
    let seeded = merge(hello.clone(), json!({"options": {"seed": u64::MAX, "stop": ["x"], "temperature": 0}}));
    server.says("yes");
    assert_eq!(server.ok("/api/generate", &seeded).await["response"], "yes");
}
