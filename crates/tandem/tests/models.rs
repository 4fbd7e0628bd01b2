//! `tandem serve --models-dir`: several models behind one port, each a process.
#![cfg(target_os = "linux")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{command, finish, golden, root, temporary, text};
use serde_json::{Value, json};
use tempfile::TempDir;

const ODD: &str = "-odd name \"τ\" 100%";

struct Server {
    child: Child,
    url: String,
    folder: TempDir,
}

/// A folder with models of each kind.
fn models() -> TempDir {
    let folder = temporary();
    let fable = root().join("models/fable-30m-MXFP4-Q8").canonicalize().expect("the bundled model");
    let tiny = Path::new(&golden("models/llama_tiny")).canonicalize().expect("a fixture");
    std::fs::create_dir(folder.path().join("owner")).expect("a folder");
    std::fs::create_dir(folder.path().join("broken")).expect("a folder");
    std::fs::write(folder.path().join("broken/config.json"), "{\"model_type\": \"llama\"").expect("writable");
    for (name, target) in [("a", &fable), ("b", &fable), ("owner/tiny", &tiny), (ODD, &tiny)] {
        symlink(target, folder.path().join(name)).expect("a link");
    }
    folder
}

/// Holds one model of fable-30m's size, as the server itself expects it; not one beside another that is on its way in.
fn budget() -> &'static str {
    static BUDGET: OnceLock<String> = OnceLock::new();
    BUDGET.get_or_init(|| {
        let (_, model) = Server::start(&[]).get("/v1/models/a");
        let bytes = model["memory_bytes"].as_u64().expect("bytes");
        format!("{}MB", (bytes + bytes / 20) / 1_000_000)
    })
}

impl Server {
    fn start(flags: &[&str]) -> Server {
        let folder = models();
        let dir = text(folder.path());
        let mut command =
            command(&[&["serve", "--models-dir", &dir, "--port", "0", "--max-batch", "4"], flags].concat());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let url = loop {
            let line = lines.next().expect("the server has ended").expect("UTF-8");
            if let Some((_, rest)) = line.split_once("http://") {
                break format!("http://{}", rest.split(' ').next().expect("an address"));
            }
        };
        // With --nocapture it shows what models say.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| eprintln!("{line}")));
        Server { child, url, folder }
    }

    fn request(&self, path: &str, body: Option<Value>, headers: &[(&str, &str)]) -> (u16, Value, Option<String>) {
        ask(&self.url, path, body, headers)
    }

    fn get(&self, path: &str) -> (u16, Value) {
        let (status, body, _) = self.request(path, None, &[]);
        (status, body)
    }

    #[track_caller]
    fn chat(&self, model: &str) -> Value {
        let (status, body, _) = self.request("/v1/chat/completions", Some(chat(model)), &[]);
        assert_eq!(status, 200, "{model}: {body}");
        assert_eq!(body["model"], model, "{body}");
        body
    }

    fn state(&self, model: &str) -> String {
        let (_, list) = self.get("/v1/models");
        let found = list["data"].as_array().expect("a list").iter().find(|entry| entry["id"] == model);
        found.unwrap_or_else(|| panic!("{model} is not in {list}"))["state"].as_str().expect("a state").to_owned()
    }

    fn metric(&self, start: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let text = text.as_str().expect("text").to_owned();
        let line = text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("no {start} in {text}"));
        line.rsplit(' ').next().expect("a value").parse().expect("a number")
    }

    /// Models' processes.
    fn processes(&self) -> Vec<u32> {
        let pid = self.child.id();
        let mut found = vec![];
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        found
    }

    fn signal(&self, pid: u32, name: &str) {
        let done = std::process::Command::new("kill").args(["-s", name, &pid.to_string()]).status().expect("kill");
        assert!(done.success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(url: &str, path: &str, body: Option<Value>, headers: &[(&str, &str)]) -> (u16, Value, Option<String>) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut response = match body {
        Some(body) => {
            let mut call = agent.post(format!("{url}{path}")).header("content-type", "application/json");
            for (name, value) in headers {
                call = call.header(*name, *value);
            }
            call.send(body.to_string()).expect("an answer")
        }
        None => agent.get(format!("{url}{path}")).call().expect("an answer"),
    };
    let retry = response.headers().get("retry-after").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let text = response.body_mut().read_to_string().expect("a body");
    (response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)), retry)
}

fn chat(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0})
}

#[track_caller]
fn wait(what: &str, is_done: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what} does not happen");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn memory(pids: &[u32]) -> u64 {
    let of = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default().to_owned();
        line.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    pids.iter().map(of).sum()
}

/// A body for each interface, and where its errors have their message.
fn interfaces(model: &str) -> Vec<(&'static str, Value, &'static str)> {
    let messages = json!([{"role": "user", "content": "Hi"}]);
    vec![
        ("/v1/chat/completions", chat(model), "/error/message"),
        ("/v1/completions", json!({"model": model, "prompt": "Hi", "max_tokens": 1}), "/error/message"),
        ("/v1/responses", json!({"model": model, "input": "Hi", "max_output_tokens": 1}), "/error/message"),
        ("/v1/messages", json!({"model": model, "messages": messages, "max_tokens": 1}), "/error/message"),
        ("/v1/messages/count_tokens", json!({"model": model, "messages": messages}), "/error/message"),
        (
            "/api/chat",
            json!({"model": model, "messages": messages, "stream": false, "options": {"num_predict": 1}}),
            "/error",
        ),
        (
            "/api/generate",
            json!({"model": model, "prompt": "Hi", "stream": false, "options": {"num_predict": 1}}),
            "/error",
        ),
        ("/api/show", json!({"model": model}), "/error"),
        ("/tokenize", json!({"model": model, "prompt": "Hi"}), "/error/message"),
        ("/detokenize", json!({"model": model, "tokens": [1, 2]}), "/error/message"),
    ]
}

#[test]
fn requests_find_their_model_in_every_interface() {
    let server = Server::start(&["--models-memory", "1GB"]);
    let (_, list) = server.get("/v1/models");
    let seen: Vec<(&str, &str, bool)> = list["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|model| {
            (
                model["id"].as_str().expect("a name"),
                model["state"].as_str().expect("a state"),
                model["error"].is_string(),
            )
        })
        .collect();
    let expected = [(ODD, false), ("a", false), ("b", false), ("broken", true), ("owner/tiny", false)];
    assert_eq!(seen, expected.map(|(name, error)| (name, "unloaded", error)), "{list}");
    assert_eq!((server.get("/health").0, server.get("/ready").0), (200, 200));
    assert!(server.processes().is_empty());
    for (name, status, says) in [("a", 200, ""), ("no such", 404, "does not exist"), ("broken", 503, "config.json")] {
        for (path, body, message) in interfaces(name) {
            let (found, answer, _) = server.request(path, Some(body), &[]);
            let said = answer.pointer(message).and_then(Value::as_str).unwrap_or_default();
            assert!(found == status && said.contains(says), "{name} {path}: {found} {answer}");
            assert_eq!(
                answer["type"] == "error",
                status != 200 && path.starts_with("/v1/messages"),
                "{path}: {answer}"
            );
        }
    }
    // Nothing else was loaded, and one that is loaded alone is the one that is meant.
    assert_eq!(server.processes().len(), 1);
    let (status, answer, _) =
        server.request("/v1/chat/completions", Some(json!({"messages": chat("a")["messages"], "max_tokens": 1})), &[]);
    assert_eq!((status, &answer["model"]), (200, &json!("a")));
    // Without a chat template there are completions.
    for name in [ODD, "owner/tiny"] {
        let body = json!({"model": name, "prompt": "Hi", "max_tokens": 2});
        let (status, answer, _) = server.request("/v1/completions", Some(body), &[]);
        assert_eq!((status, &answer["model"]), (200, &json!(name)), "{answer}");
    }
    let (status, answer, _) = server.request("/v1/chat/completions", Some(json!({"messages": []})), &[]);
    assert!(status == 400 && answer["error"]["param"] == "model", "{answer}");
    for (body, status) in [(json!({"model": 3}), 400), (json!([]), 400), (json!("x"), 400)] {
        assert_eq!(server.request("/v1/chat/completions", Some(body.clone()), &[]).0, status, "{body}");
    }
    for (path, status) in [
        ("/v1/models/a", 200),
        ("/v1/models/owner/tiny", 200),
        ("/v1/models/broken", 200),
        ("/v1/models/none", 404),
        ("/info?model=a", 200),
        ("/info?model=b", 503),
        ("/info?model=none", 404),
        ("/api/tags", 200),
        ("/api/ps", 200),
        ("/api/version", 200),
        ("/openapi.json", 200),
        ("/", 200),
        ("/none", 404),
        ("/v1/responses/resp_none", 404),
    ] {
        assert_eq!(server.get(path).0, status, "{path}");
    }
    // Kept answers are found with whichever model has them.
    let (_, answer, _) =
        server.request("/v1/responses", Some(json!({"model": "a", "input": "Hi", "max_output_tokens": 1})), &[]);
    assert_eq!(server.get(&format!("/v1/responses/{}", answer["id"].as_str().expect("an id"))).0, 200);
    assert_eq!(server.metric("tandem_model_loads_total{model=\"a\"}"), 1.0);
    assert!(server.metric("tandem_generated_tokens_total{model=\"a\"}") >= 1.0);
    assert!(server.metric("vllm:num_requests_running{model=\"a\",") == 0.0);
    // A broken one that is mended is found by the next request.
    std::fs::remove_dir_all(server.folder.path().join("broken")).expect("removed");
    symlink(golden("models/llama_tiny"), server.folder.path().join("broken")).expect("a link");
    let body = json!({"model": "broken", "prompt": "Hi", "max_tokens": 2});
    wait("the mended model", || server.request("/v1/completions", Some(body.clone()), &[]).0 == 200);
    // A model that comes later is found.
    symlink(golden("models/llama_tiny"), server.folder.path().join("later")).expect("a link");
    wait("the new model", || server.get("/v1/models/later").0 == 200);
}

#[test]
fn two_models_take_turns_in_the_memory_of_one() {
    let server = Server::start(&["--models-memory", budget()]);
    let limit = server.metric("tandem_models_memory_limit_bytes") as u64;
    let (mut most, mut answers) = (0, vec![]);
    for i in 0..8 {
        answers.push(server.chat(["a", "b"][i % 2])["choices"][0]["message"]["content"].clone());
        most = most.max(memory(&server.processes()));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert!(most < limit, "{most} bytes of {limit}");
    assert!(server.metric("tandem_model_loads_total{model=\"a\"}") >= 4.0);
    // A stream is not cut by a request for the other model, which waits.
    let (url, body) = (server.url.clone(), chat("b"));
    let mut long = chat("a");
    long["stream"] = json!(true);
    // Drafts put several tokens into one event: their number is in the last.
    long["stream_options"] = json!({"include_usage": true});
    long["max_tokens"] = json!(1500);
    long["ignore_eos"] = json!(true);
    let stream = std::thread::spawn({
        let url = server.url.clone();
        move || ask(&url, "/v1/chat/completions", Some(long), &[])
    });
    wait("the stream", || server.metric("tandem_model_requests_running{model=\"a\"}") == 1.0);
    let other = std::thread::spawn(move || ask(&url, "/v1/chat/completions", Some(body), &[]).0);
    let (status, text, _) = stream.join().expect("no panic");
    let text = text.as_str().expect("a stream");
    let whole = text.trim_end().ends_with("data: [DONE]") && text.contains("\"completion_tokens\":1500");
    assert!(status == 200 && whole, "{text}");
    assert_eq!(other.join().expect("no panic"), 200);
    // Many at once, for both.
    let all: Vec<_> = (0..40)
        .map(|i| {
            let url = server.url.clone();
            std::thread::spawn(move || ask(&url, "/v1/chat/completions", Some(chat(["a", "b"][i % 2])), &[]))
        })
        .collect();
    for request in all {
        let (status, body, _) = request.join().expect("no panic");
        assert_eq!(status, 200, "{body}");
    }
    assert_eq!(server.metric("tandem_model_failures_total{model=\"a\"}"), 0.0);
}

#[test]
fn waiting_leaving_and_crashing() {
    let server = Server::start(&["--models-memory", budget()]);
    // Not to wait begins the load all the same.
    let header = "x-tandem-load-timeout";
    let (status, body, retry) = server.request("/v1/chat/completions", Some(chat("a")), &[(header, "0")]);
    assert!(status == 503 && retry.is_some_and(|seconds| seconds.parse::<u32>().is_ok()), "{status}: {body}");
    assert!(body["error"]["message"].as_str().is_some_and(|text| text.contains("not loaded yet")), "{body}");
    wait("the load", || server.state("a") == "loaded");
    assert_eq!(server.request("/v1/chat/completions", Some(chat("a")), &[(header, "0")]).0, 200);
    for value in ["-1", "soon", "nan", ""] {
        assert_eq!(server.request("/v1/chat/completions", Some(chat("a")), &[(header, value)]).0, 400, "{value:?}");
    }
    // A client that leaves during a load disturbs nobody.
    let body = chat("b").to_string();
    let mut stream = TcpStream::connect(server.url.strip_prefix("http://").expect("http")).expect("connects");
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("sent");
    wait("the load", || server.state("b") != "unloaded");
    drop(stream);
    server.chat("a");
    server.chat("b");
    // A crash is one model's, and the next request loads it again.
    let killed = server.processes();
    assert_eq!(killed.len(), 1);
    server.signal(killed[0], "KILL");
    wait("its end", || server.state("b") == "failed");
    server.chat("b");
    assert_eq!(server.metric("tandem_model_failures_total{model=\"b\"}"), 1.0);
    // Ollama's word for not at all: its memory goes back.
    let keep = json!({"model": "b", "messages": [{"role": "user", "content": "Hi"}], "stream": false, "keep_alive": 0, "options": {"num_predict": 1}});
    assert_eq!(server.request("/api/chat", Some(keep.clone()), &[]).0, 200);
    wait("the end of b", || server.state("b") == "unloaded" && server.processes().is_empty());
    let bad = json!({"model": "b", "prompt": "Hi", "keep_alive": "soon"});
    assert_eq!(server.request("/api/generate", Some(bad), &[]).0, 400);
}

#[test]
fn pinned_models_stay_and_nothing_outlives_the_server() {
    let server = Server::start(&["--models-memory", "450MB", "--pin", "owner/tiny", "--keep-alive", "0"]);
    wait("the pinned model", || server.get("/ready").0 == 200);
    let pinned = server.processes();
    assert_eq!(pinned.len(), 1);
    for name in ["a", "b", "a"] {
        server.chat(name);
        assert_eq!(server.state("owner/tiny"), "loaded");
    }
    wait("the end of the others", || server.processes() == pinned);
    server.signal(server.child.id(), "TERM");
    let gone = |pid: u32| !Path::new(&format!("/proc/{pid}/cmdline")).exists() || memory(&[pid]) == 0;
    wait("the end of all", || gone(pinned[0]));
    let server = Server::start(&["--pin", "owner/tiny"]);
    wait("the pinned model", || server.get("/ready").0 == 200);
    let pinned = server.processes();
    server.signal(server.child.id(), "KILL");
    wait("the end of all", || gone(pinned[0]));
}

#[test]
fn keys_are_the_servers_and_not_the_models() {
    let folder = temporary();
    let keys = common::file(&folder, "keys.txt", "mine\n");
    let server = Server::start(&["--api-key-file", &keys]);
    let body = || Some(json!({"model": "owner/tiny", "prompt": "Hi", "max_tokens": 1}));
    for (key, status) in [("Bearer mine", 200), ("Bearer other", 401), ("", 401)] {
        assert_eq!(server.request("/v1/completions", body(), &[("authorization", key)]).0, status, "{key:?}");
    }
    assert_eq!(server.request("/v1/completions", body(), &[("x-api-key", "mine")]).0, 200);
    let foreign = [("authorization", "Bearer mine"), ("origin", "https://example.com")];
    assert_eq!(server.request("/v1/completions", body(), &foreign).0, 403);
    // The model's own port wants another key.
    let pid = server.processes()[0];
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).expect("readable");
    let line = String::from_utf8_lossy(&line).into_owned();
    assert!(!line.contains("keys.txt") && line.contains("--host=127.0.0.1"), "{line}");
}

#[test]
fn mistakes_show_at_once() {
    let (folder, empty, broken) = (models(), temporary(), temporary());
    let file = common::file(&broken, "file", "");
    std::fs::create_dir(broken.path().join("owner")).expect("a folder");
    std::fs::write(broken.path().join("owner/config.json"), "{}").expect("writable");
    let (dir, empty, broken) = (text(folder.path()), text(empty.path()), text(broken.path()));
    for (flags, code, says) in [
        (&["--models-dir", "/nonexistent"][..], 1, "cannot read --models-dir /nonexistent"),
        (&["--models-dir", &file], 1, "cannot read --models-dir"),
        (&["--models-dir", &empty], 1, "has no models"),
        (&["--models-dir", &broken], 1, "can be loaded; \"owner\": "),
        (&["--models-dir", &dir, "--models-memory", "1MB"], 1, "all models together may have 1 MB"),
        (&["--models-dir", &dir, "--pin", "a", "--pin", "b", "--models-memory", budget()], 1, "pinned models need"),
        (&["--pin", "a"], 1, "--models-dir"),
        (&["--models-memory", "3GB"], 1, "--models-dir"),
        (&["--model", "a", "--pin", "a"], 2, "cannot be used with"),
        (&["--model", "a", "--models-memory", "3GB"], 2, "cannot be used with"),
        (&["--models-dir", &dir, "--models-dir", &dir], 2, "cannot be used multiple times"),
        (&["--models-dir", &dir, "--pin", "c"], 1, "there is no such model; there are"),
        (&["--models-dir", &dir, "--pin", "broken"], 1, "config.json"),
        (&["--models-dir", &dir, "--pin", "a", "--models-memory", "1MB"], 1, "all models together may have 1 MB"),
        (&["--models-dir", &dir, "--model", "a"], 2, "cannot be used with"),
        (&["--models-dir", &dir, "--served-model-name", "a"], 2, "cannot be used with"),
        (&["--models-dir", &dir, "--keep-alive", "soon"], 2, "expected a time such as 5m"),
        (&["--models-dir", &dir, "--models-memory", "much"], 2, "expected a size such as 5GB"),
        (&["--models-dir", &dir, "--cors-origin", "x"], 1, "is not one"),
    ] {
        let done = finish(&mut command(&[&["serve", "--port", "0"], flags].concat()));
        assert!(done.code == Some(code) && done.stderr.contains(says), "{flags:?}: {}", done.stderr);
        assert_eq!(done.stderr.matches("error: ").count(), 1, "{flags:?}: {}", done.stderr);
        assert!(!done.stderr.contains("listening"), "{flags:?}: {}", done.stderr);
    }
}

/// A process that hangs is ended, and the request that waits for it is answered by the next one.
#[test]
fn a_model_that_hangs_is_loaded_again() {
    let server = Server::start(&["--models-memory", "1GB"]);
    server.chat("a");
    let hung = server.processes();
    server.signal(hung[0], "STOP");
    // Others do not notice.
    server.chat("b");
    server.chat("a");
    assert!(!server.processes().contains(&hung[0]));
    let (_, model) = server.get("/v1/models/a");
    assert_eq!(model["state"], "loaded", "{model}");
    assert_eq!(server.metric("tandem_model_failures_total{model=\"a\"}"), 1.0);
}

/// A server that is told to end while a model loads ends at once, with the model.
#[test]
fn an_end_during_a_load_leaves_nothing() {
    let mut server = Server::start(&[]);
    let (url, body) = (server.url.clone(), chat("a"));
    let waiting = std::thread::spawn(move || ask(&url, "/v1/chat/completions", Some(body), &[]).0);
    wait("the load", || server.state("a") == "loading");
    let model = server.processes();
    server.signal(server.child.id(), "TERM");
    let start = Instant::now();
    assert!(server.child.wait().expect("an end").success());
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(matches!(waiting.join().expect("no panic"), 200 | 503));
    wait("the end of all", || model.iter().all(|pid| memory(&[*pid]) == 0));
}

/// What a stream's reader sees of a model that is killed: an end, and no other model's trouble.
#[test]
fn a_killed_model_ends_its_streams_only() {
    let server = Server::start(&["--models-memory", "1GB"]);
    server.chat("b");
    let b = server.processes();
    let mut long = chat("a");
    long["stream"] = json!(true);
    long["max_tokens"] = json!(1500);
    long["ignore_eos"] = json!(true);
    let body = long.to_string();
    let mut stream = TcpStream::connect(server.url.strip_prefix("http://").expect("http")).expect("connects");
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("sent");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    let mut begun = [0; 64];
    stream.read_exact(&mut begun).expect("an answer begins");
    let a = server.processes().into_iter().find(|pid| !b.contains(pid)).expect("its process");
    server.signal(a, "KILL");
    let mut rest = String::new();
    let _ = stream.read_to_string(&mut rest);
    assert!(!rest.contains("[DONE]"), "a cut stream does not look whole");
    server.chat("b");
    server.chat("a");
}
