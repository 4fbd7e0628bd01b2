//! `tandem agent` with clients that are shell scripts: their settings, signals and exit codes, and the server's life.
#![cfg(target_os = "linux")]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{command, golden, root, temporary, text};
use serde_json::{Value, json};
use tempfile::TempDir;

const FABLE: &str = "models/fable-30m-MXFP4-Q8";

/// Folders of one user: programs, home, temporary files; and the notes that a fake client leaves.
struct Place {
    folder: TempDir,
}

impl Place {
    /// All three clients are a script that notes its arguments and variables, and goes on with `body`.
    fn new(body: &str) -> Place {
        let folder = temporary();
        for name in ["bin", "home", "tmp", "notes"] {
            std::fs::create_dir(folder.path().join(name)).expect("a folder");
        }
        let place = Place { folder };
        let notes = text(&place.path("notes"));
        for client in ["claude", "codex", "opencode"] {
            let script = format!(
                "#!/bin/sh\nnotes='{notes}'\nenv -0 > \"$notes/env\"\nprintf '%s\\0' \"$@\" > \"$notes/arguments\"\n\
                 [ \"$1\" = --settings ] && cp \"$2\" \"$notes/settings\"\n{body}\n"
            );
            let file = place.path("bin").join(client);
            std::fs::write(&file, script).expect("writable");
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("a program");
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, args: &[&str]) -> Agent {
        let path = format!("{}:/usr/bin:/bin", self.path("bin").display());
        let mut command = command(&[&["agent"], args].concat());
        command.env("PATH", path).env("HOME", self.path("home")).env("TMPDIR", self.path("tmp"));
        command.env("ANTHROPIC_API_KEY", "the user's own").stdout(Stdio::null()).stderr(Stdio::piped());
        Agent { child: command.spawn().expect("the binary starts") }
    }

    /// A note of the client, once it is there whole: the one after it is.
    fn note(&self, name: &str) -> String {
        let file = self.path("notes").join(name);
        wait(&format!("note {name}"), || file.exists());
        std::fs::read_to_string(&file).expect("UTF-8")
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.note("ready");
        let env = self.note("env");
        env.split('\0').find_map(|line| line.strip_prefix(&format!("{name}=")).map(str::to_owned))
    }

    fn arguments(&self) -> Vec<String> {
        self.note("ready");
        self.note("arguments").split_terminator('\0').map(str::to_owned).collect()
    }

    /// Address, key and model, as the client finds them.
    fn settings(&self, client: &str) -> (String, String, String) {
        match client {
            "claude" => {
                self.note("ready");
                let settings: Value = serde_json::from_str(&self.note("settings")).expect("JSON");
                let of = |name: &str| settings["env"][name].as_str().expect(name).to_owned();
                let names = ["ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_MODEL"];
                names.iter().for_each(|name| assert_eq!(self.variable(name), Some(of(name)), "{name}"));
                assert_eq!(self.variable("ANTHROPIC_API_KEY"), None, "the user's own key stays with the user");
                (of(names[0]), of(names[1]), of(names[2]))
            }
            "codex" => {
                let arguments = self.arguments();
                let of = |start: &str| {
                    let found = arguments.iter().find_map(|word| word.split_once(start)).expect(start).1;
                    found.split('"').next().expect("quoted").to_owned()
                };
                let url = of("base_url = \"");
                let key = self.variable(&of("env_key = \"")).expect("a key");
                (url.strip_suffix("/v1").expect("with /v1").to_owned(), key, of("model=\""))
            }
            _ => {
                let config = self.variable("OPENCODE_CONFIG_CONTENT").expect("set");
                let config: Value = serde_json::from_str(&config).expect("JSON");
                let options = &config["provider"]["tandem"]["options"];
                let of = |value: &Value| value.as_str().expect("a string").to_owned();
                let model = of(&config["model"]).strip_prefix("tandem/").expect("ours").to_owned();
                let url = of(&options["baseURL"]).strip_suffix("/v1").expect("with /v1").to_owned();
                (url, of(&options["apiKey"]), model)
            }
        }
    }

    /// The client goes on.
    fn go(&self) {
        std::fs::write(self.path("notes").join("go"), "").expect("writable");
    }

    #[track_caller]
    fn is_clean(&self) {
        // The server's own record of its last run is no configuration of a client.
        let own = self.path("home/.local/state/tandem");
        for folder in ["home", "tmp"] {
            let mut left = vec![];
            files(&self.path(folder), &mut left);
            left.retain(|file| !file.starts_with(&own));
            assert!(left.is_empty(), "{folder} has {left:?}");
        }
    }
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

/// Notes that it is ready, and waits for [`Place::go`].
const WAITS: &str = "touch \"$notes/ready\"\nwhile [ -d \"$notes\" ] && [ ! -e \"$notes/go\" ]; do sleep 0.05; done";

struct Agent {
    child: Child,
}

impl Agent {
    fn end(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        self.child.stderr.take().expect("piped").read_to_string(&mut said).expect("UTF-8");
        (self.child.wait().expect("ends"), said)
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let done = std::process::Command::new("kill").args(["-s", name, &pid]).status().expect("kill");
        assert!(done.success());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn wait(what: &str, is_done: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what} does not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A port that nobody listens on.
fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port().to_string()
}

fn post(url: &str, key: &str, path: &str, body: Value) -> (u16, Value) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let request = agent.post(format!("{url}{path}")).header("authorization", format!("Bearer {key}"));
    let mut response = request.header("content-type", "application/json").send(body.to_string()).expect("an answer");
    let text = response.body_mut().read_to_string().expect("a body");
    (response.status().as_u16(), serde_json::from_str(&text).expect("JSON"))
}

fn is_gone(url: &str) -> bool {
    TcpStream::connect(url.strip_prefix("http://").expect("an address")).is_err()
}

/// A first request as each client makes it.
fn first_request(client: &str, model: &str) -> (&'static str, Value) {
    let messages = json!([{"role": "user", "content": "Hello"}]);
    match client {
        "claude" => ("/v1/messages", json!({"model": model, "max_tokens": 4, "messages": messages})),
        "codex" => ("/v1/responses", json!({"model": model, "max_output_tokens": 4, "input": "Hello"})),
        _ => ("/v1/chat/completions", json!({"model": model, "max_tokens": 4, "messages": messages})),
    }
}

#[test]
fn a_server_lives_as_long_as_its_client() {
    for (client, last) in [("claude", "exit 7"), ("codex", "exit 0"), ("opencode", "kill -KILL $$")] {
        let place = Place::new(&format!("{WAITS}\n{last}"));
        let agent = place.start(&[client, "--port", &free_port(), "--model", FABLE, "--", "-p", "a b", "--url"]);
        let (url, key, model) = place.settings(client);
        assert_eq!(model, "fable-30m-MXFP4-Q8");
        let arguments = place.arguments();
        assert_eq!(arguments[arguments.len() - 3..], ["-p", "a b", "--url"], "{client}");
        assert!(arguments.iter().all(|word| !word.contains(&key)), "{client}: {arguments:?}");
        let (path, body) = first_request(client, &model);
        assert_eq!(post(&url, &key, path, body.clone()).0, 200, "{client}");
        // Nobody else on the machine may use it.
        assert_eq!(post(&url, "other", path, body).0, 401, "{client}");
        place.go();
        let (status, said) = agent.end();
        let expected = if client == "opencode" {
            137
        } else if client == "claude" {
            7
        } else {
            0
        };
        assert_eq!(status.code(), Some(expected), "{client}: {said}");
        assert!(said.contains("no server at") && said.contains("tokens of context"), "{said}");
        assert!(is_gone(&url), "{client}: the server is still there");
        place.is_clean();
    }
}

struct Serve {
    child: Child,
    url: String,
}

impl Serve {
    fn start(args: &[&str]) -> Serve {
        let mut command = command(&[&["serve", "--model", FABLE, "--port", "0"], args].concat());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let line = lines.find_map(|line| line.ok()?.strip_prefix("listening on ").map(str::to_owned)).expect("listens");
        std::thread::spawn(move || lines.for_each(drop));
        Serve { child, url: format!("http://{}", line.split(';').next().expect("an address")) }
    }

    fn port(&self) -> &str {
        self.url.rsplit(':').next().expect("a port")
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_server_that_is_there_is_used_and_stays() {
    let folder = temporary();
    let keys = common::file(&folder, "keys.txt", "# mine\nfirst\nsecond\n");
    let flags = ["--api-key-file", &keys, "--served-model-name", "odd name/\"τ\"", "--served-model-name", "other"];
    let open = Serve::start(&flags[2..]);
    let closed = Serve::start(&flags);
    let with_v1 = format!("{}/v1/", open.url);
    for (client, args, model) in [
        // It may still be loading.
        ("claude", vec!["--url", &open.url], "odd name/\"τ\""),
        ("opencode", vec!["--url", &with_v1, "--model", "other"], "other"),
        ("opencode", vec!["--port", open.port()], "odd name/\"τ\""),
        ("claude", vec!["--url", &closed.url, "--api-key-file", &keys], "odd name/\"τ\""),
    ] {
        let place = Place::new("touch \"$notes/ready\"");
        let agent = place.start(&[&[client], &args[..]].concat());
        let (url, key, found) = place.settings(client);
        let (status, said) = agent.end();
        assert!(status.success() && !said.contains("is started"), "{args:?}: {said}");
        assert_eq!(found, model, "{args:?}");
        let (path, body) = first_request(client, &found);
        assert_eq!(post(&url, &key, path, body).0, 200, "{args:?}");
        place.is_clean();
    }
}

#[test]
fn signals_reach_the_client() {
    let server = Serve::start(&[]);
    let body = "for signal in TERM HUP INT QUIT; do trap \"echo $signal >> $notes/got\" $signal; done\n\
                touch \"$notes/ready\"\nn=0\nwhile [ \"$(wc -l < \"$notes/got\" 2>/dev/null || echo 0)\" -lt 4 ]; do sleep 0.05; done\n\
                exit 3";
    let place = Place::new(body);
    let agent = place.start(&["codex", "--url", &server.url]);
    place.note("ready");
    let got = || std::fs::read_to_string(place.path("notes").join("got")).unwrap_or_default();
    let mut expected = String::new();
    for signal in ["TERM", "HUP", "INT", "QUIT"] {
        agent.signal(signal);
        expected += &format!("{signal}\n");
        wait(signal, || got() == expected);
    }
    assert_eq!(agent.end().0.code(), Some(3));
    // One that it does not catch ends it, and its code says so.
    let place = Place::new(WAITS);
    let agent = place.start(&["codex", "--url", &server.url]);
    place.note("ready");
    agent.signal("TERM");
    assert_eq!(agent.end().0.code(), Some(128 + 15));
    place.is_clean();
}

#[test]
fn nothing_outlives_a_killed_agent() {
    let place = Place::new(WAITS);
    let agent = place.start(&["claude", "--port", &free_port(), "--model", FABLE]);
    let (url, ..) = place.settings("claude");
    agent.signal("KILL");
    wait("the end of the server", || is_gone(&url));
    place.go();
}

#[test]
fn mistakes_show_before_anything_is_started() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let other = format!("http://{}", taken.local_addr().expect("an address"));
    // Another program: it answers every request with a page.
    std::thread::spawn(move || {
        for stream in taken.incoming() {
            let mut stream = stream.expect("a client");
            let _ = stream.read(&mut [0; 4096]);
            let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi");
        }
    });
    let folder = temporary();
    let [keys, none] =
        [("keys.txt", "wrong\n"), ("none.txt", "# no key\n")].map(|(name, text)| common::file(&folder, name, text));
    let closed = Serve::start(&["--api-key-file", &keys]);
    let server = Serve::start(&[]);
    let empty = format!("http://127.0.0.1:{}", free_port());
    let place = Place::new("touch \"$notes/ready\"");
    for (args, code, expected) in [
        (&["--url", &empty][..], 1, "does not answer"),
        (&["--url", "127.0.0.1:8000"], 1, "expected one such as http://127.0.0.1:8000"),
        (&["--url", "ftp://127.0.0.1"], 1, "expected one such as"),
        (&["--url", &other], 1, "expected a list of models"),
        (&["--url", &closed.url], 1, "--api-key-file"),
        (&["--url", &server.url, "--model", "gpt-5"], 1, "it has fable-30m-MXFP4-Q8"),
        (&["--api-key-file", &none], 1, "holds no key"),
        (&["--api-key-file", "/nonexistent"], 1, "cannot read"),
        (&["--port", "0"], 2, "expected a whole number from 1 to 65535"),
        (&["--context", "0"], 2, "expected a whole number from 1"),
        (&["--url", &server.url, "--port", "8000"], 2, "cannot be used with"),
        (&["exec"], 2, "exec"),
    ] {
        let (status, said) = place.start(&[&["claude"], args].concat()).end();
        assert!(status.code() == Some(code) && said.contains(expected), "{args:?}: {status}: {said}");
    }
    for (args, expected) in [(&["emacs"][..], "claude, codex, opencode"), (&[], "<CLIENT>")] {
        let (status, said) = place.start(args).end();
        assert!(status.code() == Some(2) && said.contains(expected), "{args:?}: {said}");
    }
    assert!(!place.path("notes").join("ready").exists());
    place.is_clean();
}

#[test]
fn a_client_that_is_not_installed() {
    let place = Place::new("");
    for (client, package) in
        [("claude", "@anthropic-ai/claude-code"), ("codex", "@openai/codex"), ("opencode", "opencode-ai")]
    {
        std::fs::remove_file(place.path("bin").join(client)).expect("removable");
        // No server is looked for or started: a model that is not there is not missed.
        let (status, said) = place.start(&[client, "--model", "/nonexistent"]).end();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("npm install -g {package}")) && said.lines().count() == 1, "{said}");
    }
    place.is_clean();
}

#[test]
fn a_server_that_does_not_start() {
    let place = Place::new("touch \"$notes/ready\"");
    let broken = common::Copy::of("llama_tiny").patch("model.norm.weight", &[0xff; 4]);
    for (model, expected) in [("/nonexistent".to_owned(), "nonexistent"), (broken.path(), "norm")] {
        let (status, said) = place.start(&["codex", "--port", &free_port(), "--model", &model]).end();
        let last = said.lines().last().unwrap_or_default();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(last.starts_with("error: the server did not start: ") && last.contains(expected), "{said}");
    }
    assert!(!place.path("notes").join("ready").exists());
    place.is_clean();
}

#[test]
fn a_server_that_ends_before_its_client_is_told_of() {
    let place = Place::new(WAITS);
    let agent = place.start(&["claude", "--port", &free_port(), "--model", FABLE]);
    let (url, ..) = place.settings("claude");
    let children = format!("/proc/{0}/task/{0}/children", agent.child.id());
    let children = std::fs::read_to_string(children).expect("listed");
    let server = children.split_whitespace().find(|pid| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|b| *b == 0).any(|word| word == b"serve"))
    });
    std::process::Command::new("kill").args(["-KILL", server.expect("a server")]).status().expect("kill");
    wait("its end", || is_gone(&url));
    place.go();
    let (status, said) = agent.end();
    assert!(status.success() && said.contains("the server ended before Claude Code"), "{said}");
    let kept = said.rsplit("(all in ").next().and_then(|rest| rest.split(')').next()).expect("a folder");
    assert!(Path::new(kept).join("serve.log").exists(), "{said}");
}

#[test]
fn settings_reach_the_server_that_is_started() {
    let folder = temporary();
    let settings = "served-model-name = \"named\"\n[agent]\nport = PORT\n[serve]\ncontext = 512\n";
    let config = common::file(&folder, "tandem.toml", settings.replace("PORT", &free_port()));
    let place = Place::new("touch \"$notes/ready\"");
    let model = text(&root().join(FABLE));
    let agent = place.start(&["codex", "--config-file", &config, "--model", &model]);
    let (_, _, name) = place.settings("codex");
    let (status, said) = agent.end();
    assert!(status.success() && said.contains("named has 512 tokens"), "{said}");
    assert_eq!(name, "named");
    // The command line counts more.
    let agent =
        place.start(&["codex", "--config-file", &config, "--model", &golden("models/glm51_tiny"), "--context", "256"]);
    let (_, said) = agent.end();
    assert!(said.contains("has 256 tokens"), "{said}");
}
