//! Traces of a server's requests, against a collector of this process.

#![cfg(feature = "otel")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use common::{command, finish, tandem};
use serde_json::{Value, json};

const FABLE: &str = "models/fable-30m-MXFP4-Q8";
const PATIENCE: Duration = Duration::from_secs(60);

/// The address of a collector, and what it gets: the first line of a request, and its body.
fn collector() -> (String, Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let (send, receive) = channel();
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let send = send.clone();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(socket);
                while let Some(request) = read(&mut reader) {
                    if send.send(request).is_err() {
                        return;
                    }
                    let answer =
                        b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
                    reader.get_mut().write_all(answer).expect("sent");
                }
            });
        }
    });
    (format!("http://{address}"), receive)
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<(String, Vec<u8>)> {
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).ok().filter(|n| *n > 0)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((first.trim().to_owned(), body))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// A key with its value as a field of a protobuf message.
fn attribute(key: &str, value: &[u8]) -> Vec<u8> {
    [key.as_bytes(), &[0x12, value.len() as u8], value].concat()
}

#[test]
fn a_span_for_each_request() {
    let (url, spans) = collector();
    let mut server = command(&["serve", "--model", FABLE, "--port", "0", "--served-model-name", "fable"])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &url)
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(server.stderr.take().expect("piped")).lines();
    let address = lines.find_map(|line| {
        line.expect("UTF-8").split_once(" on http://").and_then(|(_, rest)| Some(rest.split(' ').next()?.to_owned()))
    });
    let address = address.expect("an address");
    std::thread::spawn(move || lines.for_each(drop));
    let (trace, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let body = json!({"messages": [{"role": "user", "content": "What is 47 + 38?"}], "max_tokens": 4, "n": 2,
                      "temperature": 0, "ignore_eos": true});
    let mut answer = ureq::post(format!("http://{address}/v1/chat/completions"))
        .header("content-type", "application/json")
        .header("traceparent", format!("00-{trace}-{parent}-01"))
        .send(body.to_string())
        .expect("an answer");
    let answer: Value = serde_json::from_str(&answer.body_mut().read_to_string().expect("text")).expect("JSON");
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().expect("counted") as u8;
    // What is not sent yet goes out at the end.
    let pid = rustix::process::Pid::from_child(&server);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("sent");
    let (first, sent) = spans.recv_timeout(PATIENCE).expect("spans");
    assert!(server.wait().expect("ends").success());
    assert_eq!(first, "POST /v1/traces HTTP/1.1");
    let bytes = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect()
    };
    let integer = |n: u8| vec![0x18, n];
    let text = |text: &str| [&[0x0a, text.len() as u8], text.as_bytes()].concat();
    let list = |words: &[&str]| {
        let words = words.iter().flat_map(|word| {
            let word = text(word);
            [vec![0x0a, word.len() as u8], word].concat()
        });
        let words: Vec<u8> = words.collect();
        [vec![0x2a, words.len() as u8], words].concat()
    };
    for (what, part) in [
        ("the caller's trace", bytes(trace)),
        ("the caller's span", bytes(parent)),
        ("a name", [&[0x2a, 10], &b"chat fable"[..]].concat()),
        ("a service", attribute("service.name", &text("tandem"))),
        ("an operation", attribute("gen_ai.operation.name", &text("chat"))),
        ("a model", attribute("gen_ai.request.model", &text("fable"))),
        ("a limit", attribute("gen_ai.request.max_tokens", &integer(4))),
        ("tokens in", attribute("gen_ai.usage.input_tokens", &integer(prompt_tokens))),
        ("tokens out, of two answers", attribute("gen_ai.usage.output_tokens", &integer(8))),
        ("why they ended", attribute("gen_ai.response.finish_reasons", &list(&["length", "length"]))),
        ("a time", b"gen_ai.latency.time_to_first_token".to_vec()),
    ] {
        assert!(contains(&sent, &part), "{what}: {part:?} in {:?}", String::from_utf8_lossy(&sent));
    }
    assert!(spans.recv_timeout(Duration::from_millis(200)).is_err(), "one span, sent once");
}

#[test]
fn an_endpoint_that_is_none() {
    let done = finish(command(&["inspect", FABLE]).env("OTEL_EXPORTER_OTLP_ENDPOINT", "not a url"));
    assert!(done.code == Some(1) && done.stderr.contains("expected a URL such as"), "{}", done.stderr);
    // Nobody there: the command works all the same.
    finish(command(&["inspect", FABLE]).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")).ok();
    tandem(&["inspect", FABLE]).ok();
}
