//! What would bring a server down.

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use super::Server;
use crate::Options;

#[tokio::test(flavor = "multi_thread")]
async fn lengths_and_counts_are_checked_first() {
    let server = Server::start();
    let long = "x".repeat(12 << 20);
    let tool = json!({"type": "function", "function": {"name": "f", "description": long}});
    let user = json!([{"role": "user", "content": "hi"}]);
    let start = std::time::Instant::now();
    for (path, body, code) in [
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": long}]}), "context_length_exceeded"),
        ("/v1/chat/completions", json!({"messages": user, "tools": [tool]}), "context_length_exceeded"),
        ("/v1/chat/completions", json!({"messages": user, "chat_template_kwargs": {"x": long}}), ""),
        ("/v1/chat/completions", json!({"messages": user, "stop": vec!["x"; 100_000]}), ""),
        ("/v1/chat/completions", json!({"messages": vec![user[0].clone(); 200_000]}), ""),
        ("/v1/completions", json!({"prompt": long}), "context_length_exceeded"),
        ("/v1/completions", json!({"prompt": vec!["x"; 500_000]}), ""),
        ("/v1/completions", json!({"prompt": vec![1; 100_000]}), "context_length_exceeded"),
        ("/v1/responses", json!({"input": long}), "context_length_exceeded"),
        ("/tokenize", json!({"prompt": long}), "context_length_exceeded"),
    ] {
        let (status, error) = server.post(path, &body).await;
        assert_eq!(status, 400, "{path}: {error}");
        assert!(code.is_empty() || error["error"]["code"] == code, "{path}: {error}");
    }
    let words = json!({"messages": [{"role": "user", "content": "fox ".repeat(400_000)}]});
    assert_eq!(server.post("/v1/chat/completions", &words).await.0, 400);
    let count = json!({"model": "fable", "messages": words["messages"]});
    let (status, counted) = server.post("/v1/messages/count_tokens", &count).await;
    assert!(status == 200 && counted["input_tokens"].as_u64() > Some(4096), "{counted}");
    assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
}

/// A body may name the same things again and again: the work grows with the body, not with its square.
#[tokio::test(flavor = "multi_thread")]
async fn names_may_be_repeated() {
    let server = Server::with_context(&Options::default(), 64 << 10);
    let tools: Vec<Value> =
        (0..1000).map(|i| json!({"type": "function", "function": {"name": format!("f{i}")}})).collect();
    let flat: Vec<Value> = (0..1000).map(|i| json!({"type": "function", "name": format!("f{i}")})).collect();
    let input: Vec<Value> = (0..1000)
        .map(|i| json!({"name": format!("f{i}"), "input_schema": {"type": "object"}, "defer_loading": i > 0}))
        .collect();
    let user = json!([{"role": "user", "content": "hi"}]);
    let last: Vec<Value> = vec![json!({"type": "function", "function": {"name": "f999"}}); 100_000];
    let flat_last: Vec<Value> = vec![json!({"type": "function", "name": "f999"}); 100_000];
    let references: Vec<Value> = vec![json!({"type": "tool_reference", "tool_name": "f999"}); 1000];
    let start = std::time::Instant::now();
    for (path, body) in [
        (
            "/v1/chat/completions",
            json!({"messages": user, "max_tokens": 1, "tools": tools,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": last}}}),
        ),
        (
            "/v1/responses",
            json!({"input": "hi", "max_output_tokens": 1, "tools": flat,
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": flat_last}}),
        ),
        (
            "/v1/messages",
            json!({"model": "fable", "max_tokens": 1, "tools": input,
                "messages": [{"role": "user", "content": references}]}),
        ),
    ] {
        server.says("yes");
        server.ok(path, &body).await;
    }
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

/// What a body names of earlier answers counts as if it were in it, and each answer is read once.
#[tokio::test(flavor = "multi_thread")]
async fn references_are_bounded() {
    let server = Server::with(&Options { max_body_bytes: 4 << 20, ..Options::default() });
    let message = |id: String, text: &str| json!({"type": "message", "role": "user", "id": id, "content": text});
    let reference = |id: String| json!({"type": "item_reference", "id": id});
    // Most of a conversation that the context does not hold: it is kept all the same, without the oldest turns.
    let items: Vec<Value> = (0..20_000).map(|i| message(format!("m{i}"), "fox")).collect();
    let long = json!([message("large".into(), &"x".repeat(1 << 20)), {"role": "user", "content": "hi"}]);
    for input in [json!(items), long] {
        server.says("yes");
        let body = json!({"input": input, "truncation": "auto", "max_output_tokens": 1});
        let start = std::time::Instant::now();
        server.ok("/v1/responses", &body).await;
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
    let start = std::time::Instant::now();
    let many: Vec<Value> = (0..20_000).map(|i| reference(format!("m{i}"))).collect();
    server.says("yes");
    server.ok("/v1/responses", &json!({"input": many, "truncation": "auto", "max_output_tokens": 1})).await;
    let large: Vec<Value> = (0..20_000).map(|_| reference("large".into())).collect();
    let (status, error) = server.post("/v1/responses", &json!({"input": large})).await;
    assert!(status == 400 && error.to_string().contains("refer to fewer"), "{error}");
    let own: Vec<Value> =
        [message("own".into(), "fox")].into_iter().chain(vec![reference("own".into()); 20_000]).collect();
    server.says("yes");
    server.ok("/v1/responses", &json!({"input": own, "truncation": "auto", "max_output_tokens": 1})).await;
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_bounded_alone_and_together() {
    let server =
        Server::with(&Options { max_body_bytes: 1 << 20, max_body_bytes_in_flight: 1 << 20, ..Options::default() });
    let post = |body: Body| {
        let request = Request::post("/v1/messages").header("content-type", "application/json");
        server.send(request.body(body).unwrap())
    };
    let (status, _, body) = post(Body::from(vec![b' '; 2 << 20])).await;
    let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status.as_u16(), &body["error"]["type"]), (413, &json!("request_too_large")), "{body}");
    // Two bodies that do not end hold all bytes: small requests are served all the same.
    let (mut held, mut senders) = (vec![], vec![]);
    for _ in 0..2 {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(4);
        sender.send(Ok(vec![b' '; 1_000_000])).await.unwrap();
        senders.push(sender);
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let request = Request::post("/v1/completions").header("content-type", "application/json");
        let request = request.body(Body::from_stream(stream)).unwrap();
        let app = std::sync::Arc::clone(&server.app);
        held.push(tokio::spawn(async move {
            tower::ServiceExt::oneshot(crate::router(app), request).await.unwrap().status().as_u16()
        }));
    }
    server.says("yes");
    let answer = server.ok("/v1/completions", &json!({"prompt": "a", "max_tokens": 1})).await;
    assert_eq!(answer["choices"][0]["text"], "yes");
    // One of the bodies found no room; the other ends, and is no JSON.
    drop(senders);
    let mut statuses = vec![];
    for task in held {
        statuses.push(task.await.unwrap());
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [400, 503]);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_fails_while_requests_wait_and_no_step_ends() {
    let stall_timeout = std::time::Duration::from_millis(600);
    let server = Server::with(&Options { stall_timeout, ..Options::default() });
    // Nothing waits: the engine may rest for as long as it likes.
    tokio::time::sleep(stall_timeout * 2).await;
    assert_eq!(server.get("/health").await.0, 200);
    server.says("yes");
    let gate = std::sync::Arc::clone(&server.gate);
    let (held, is_held) = std::sync::mpsc::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let holder = std::thread::spawn(move || {
        let _guard = gate.lock().unwrap();
        held.send(()).unwrap();
        let _ = released.recv();
    });
    is_held.recv().unwrap();
    let request = Request::post("/v1/completions").header("content-type", "application/json");
    let request = request.body(Body::from(json!({"prompt": "a", "max_tokens": 1}).to_string())).unwrap();
    let app = std::sync::Arc::clone(&server.app);
    let answer = tokio::spawn(async move { tower::ServiceExt::oneshot(crate::router(app), request).await.unwrap() });
    tokio::time::sleep(stall_timeout / 3).await;
    assert_eq!(server.get("/health").await.0, 200);
    tokio::time::sleep(stall_timeout * 2).await;
    let (status, error) = server.get("/health").await;
    assert!(status == 503 && error.to_string().contains("no step has passed all ranks"), "{status} {error}");
    drop(release);
    holder.join().unwrap();
    assert_eq!(answer.await.unwrap().status(), 200);
    assert_eq!(server.get("/health").await.0, 200);
}
