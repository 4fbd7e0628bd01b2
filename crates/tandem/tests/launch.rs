//! `tandem launch` and `--ranks`, black box: equal answers, and no rank outlives the others.
#![cfg(target_os = "linux")]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use common::{command, file, finish, golden, tandem, temporary, text};
use serde_json::{Value, json};

const PROMPT: &str = "Tell me a story about a brave fox named Lily.";

fn tokens(flags: &[&str], model: &str) -> Vec<Value> {
    let run = ["run", "--raw", "--json", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"];
    let rest = ["--activations", "f32", "--threads", "1", "--context", "256", "--model", model, PROMPT];
    let args = [&run[..], flags, &rest[..]].concat();
    tandem(&args).json()["tokens"].as_array().expect("tokens").clone()
}

#[test]
fn every_way_to_start_ranks_gives_the_tokens_of_one() {
    for model in ["models/fable-30m-MXFP4-Q8".to_string(), golden("models/glm51_tiny")] {
        let expected = tokens(&[], &model);
        for flags in [
            &["--ranks", "2"][..],
            &["--pp", "3"],
            &["--tp", "2"],
            &["--ep", "2"],
            &["--pp", "2", "--tp", "2"],
            &["--pp", "2", "--encrypt"],
            &["--tp", "2", "--transport", "tcp", "--encrypt"],
            &["--ranks", "2", "--pp", "2", "--transport", "local"],
            &["--tp", "2", "--transport", "local"],
        ] {
            assert_eq!(tokens(flags, &model), expected, "{flags:?}");
        }
    }
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

#[test]
fn mpi_launchers_give_the_tokens_of_one() {
    let model = golden("models/glm51_tiny");
    let expected = tokens(&[], &model);
    for mpirun in ["mpirun.openmpi", "mpirun.mpich"].into_iter().filter(|m| installed(m)) {
        for division in [["--pp", "2"], ["--tp", "2"]] {
            let launch = ["launch", "--transport", "mpi", "--mpirun", mpirun, division[0], division[1], "--", "run"];
            let run =
                ["--raw", "--json", "--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--activations", "f32"];
            let rest = ["--threads", "1", "--context", "256", "--model", &model, PROMPT];
            let mut command = command(&[&launch[..], &run, &rest].concat());
            command.env("OMPI_MCA_plm", "isolated");
            for name in
                ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"]
            {
                command.env(name, "1");
            }
            let found = finish(&mut command).json();
            assert_eq!(found["tokens"].as_array(), Some(&expected), "{mpirun} {division:?}");
        }
    }
}

/// An ssh that runs the command here, and writes down how it was called.
#[test]
fn other_hosts_are_reached_through_ssh_without_the_secret_on_the_command_line() {
    use std::os::unix::fs::PermissionsExt;
    let dir = temporary();
    let log = text(&dir.path().join("log"));
    let ssh = file(
        &dir,
        "ssh",
        format!("#!/bin/sh\necho \"$@\" >> {log}\nenv >> {log}\nfor last; do :; done\nexec sh -c \"$last\"\n"),
    );
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).expect("own file");
    let path = format!("{}:{}", text(dir.path()), std::env::var("PATH").unwrap_or_default());
    let model = golden("models/glm51_tiny");
    let expected = tokens(&[], &model);
    for hosts in [
        r#"[{"ssh": "localhost"}, {"ssh": "far away", "ips": ["127.0.0.1"], "rdma": [null]}]"#,
        r#"{"hosts": [{"ssh": "a", "ips": ["127.0.0.1"]}, {"ssh": "b", "ips": ["127.0.0.1"]}]}"#,
    ] {
        let hostfile = file(&dir, "hosts.json", hosts);
        let launch = [
            "launch",
            "--hostfile",
            &hostfile,
            "--backend",
            "ring",
            "--encrypt",
            "--pp",
            "2",
            "--remote-model",
            &model,
            "--",
        ];
        let run = ["run", "--raw", "--json", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"];
        let rest = ["--activations", "f32", "--threads", "1", "--context", "256", "--model", &model, PROMPT];
        let found = finish(command(&[&launch[..], &run, &rest].concat()).env("PATH", &path)).json();
        assert_eq!(found["tokens"].as_array(), Some(&expected));
    }
    let log = std::fs::read_to_string(log).expect("ssh was called");
    assert!(log.contains("BatchMode=yes far away"), "{log}");
    // The secret is 64 hexadecimal digits.
    let digits = log.split(|c: char| !c.is_ascii_hexdigit()).map(str::len).max();
    assert!(digits < Some(64), "{log}");
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    for (flags, expected) in [
        (&["--ranks", "2", "--pp", "3"][..], "needs 3 ranks, but there are 2"),
        (&["--ranks", "2", "--tp", "2", "--ep", "3"], "must be equal"),
        (&["--ranks", "2", "--transport", "mpi", "--encrypt"], "--encrypt reaches what goes over TCP"),
        (&["--ranks", "2", "--transport", "nccl", "--encrypt"], "--encrypt reaches what goes over TCP"),
        (&["--pp", "0"], "from 1 to 4096"),
        (&["--pp", "2", "--deadline", "0"], "--deadline must be between"),
        (&["--ranks", "2", "--transport", "mpi"], "needs an MPI launcher"),
    ] {
        let done = tandem(&[&["run", "--raw"], flags, &["--context", "128", "hello"]].concat());
        assert_ne!(done.code, Some(0));
        assert!(done.stderr.contains(expected), "{flags:?}: {}", done.stderr);
    }
}

/// A launch in the background, with its ranks' process ids.
struct Launch {
    child: Child,
    ranks: Vec<u32>,
}

fn children(of: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    let mut pids: Vec<u32> = text.split_whitespace().filter_map(|p| p.parse().ok()).collect();
    pids.sort_unstable();
    pids
}

fn runs(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z')
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(status.expect("kill").success());
}

fn launch(n: usize, flags: &[&str], run_flags: &[&str]) -> Launch {
    let ranks = n.to_string();
    let launch = ["launch", "--deadline", "4", "--ranks", &ranks];
    let run = ["--", "run", "--raw", "--temperature", "0", "--threads", "1", "--activations", "f32", "--ignore-eos"];
    let args = [&launch[..], flags, &run, run_flags].concat();
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let start = Instant::now();
    let mut pids = vec![];
    while pids.len() < n && start.elapsed() < Duration::from_secs(20) {
        assert!(child.try_wait().expect("a child").is_none(), "the launcher ended");
        pids = children(child.id());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(pids.len(), n);
    Launch { child, ranks: pids }
}

impl Launch {
    /// Waits for text, so that decoding is under way.
    fn wait_for_text(&mut self) {
        let stdout = self.child.stdout.as_mut().expect("piped");
        stdout.read_exact(&mut [0; 40]).expect("the model speaks");
    }

    /// Code and stderr, which must come within the deadline.
    fn end(mut self, within: Duration) -> (Option<i32>, String, Duration) {
        let start = Instant::now();
        // The story goes on until the end.
        let mut stdout = self.child.stdout.take().expect("piped");
        std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        let stderr = BufReader::new(self.child.stderr.take().expect("piped"));
        let reader = std::thread::spawn(move || stderr.lines().map_while(Result::ok).collect::<Vec<_>>().join("\n"));
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            assert!(start.elapsed() < within, "the launcher did not end within {within:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        let took = start.elapsed();
        while self.ranks.iter().any(|pid| runs(*pid)) {
            assert!(start.elapsed() < within, "a rank outlived the launcher");
            std::thread::sleep(Duration::from_millis(5));
        }
        (status.code(), reader.join().expect("no panic"), took)
    }
}

const ENDLESS: [&str; 3] = ["--max-tokens", "30000", PROMPT];
/// The deadline of these launches, and some time for a busy machine.
const WITHIN: Duration = Duration::from_secs(6);

#[test]
fn a_killed_rank_is_named_and_nobody_outlives_it() {
    for (n, flags, victim) in [(2, ["--pp", "2"], 1), (3, ["--pp", "3"], 0), (2, ["--tp", "2"], 1)] {
        let mut launch = launch(n, &flags, &ENDLESS);
        launch.wait_for_text();
        signal(launch.ranks[victim], "KILL");
        let (code, stderr, _) = launch.end(WITHIN);
        assert_ne!(code, Some(0));
        // What it held is in the message, unless the thread that watches over the ranks was first.
        let named = stderr.contains(&format!("rank {victim} (localhost, layers "))
            || stderr.contains(&format!("rank {victim} (localhost) is gone"));
        assert!(named && stderr.contains("is gone"), "{stderr}");
        assert!(stderr.contains(&format!("rank {victim} (localhost) ended first: signal: 9")), "{stderr}");
    }
}

#[test]
fn a_suspended_rank_is_named_within_the_deadline() {
    for (n, victim) in [(2, 1), (2, 0), (3, 1)] {
        let mut launch = launch(n, &["--pp", if n == 2 { "2" } else { "3" }], &ENDLESS);
        launch.wait_for_text();
        signal(launch.ranks[victim], "STOP");
        let (code, stderr, took) = launch.end(WITHIN * 2);
        assert_ne!(code, Some(0));
        let last = stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with(&format!("launch: rank {victim} (localhost) did not answer")), "{stderr}");
        // Four seconds, and one.
        assert!(took < Duration::from_secs(5), "{took:?}: {stderr}");
    }
}

#[test]
fn the_end_of_the_launcher_ends_every_rank() {
    for (name, code) in [("KILL", None), ("INT", Some(130)), ("TERM", Some(130))] {
        let mut launch = launch(2, &["--pp", "2"], &ENDLESS);
        launch.wait_for_text();
        signal(launch.child.id(), name);
        assert_eq!(launch.end(WITHIN).0, code);
    }
}

/// A remote rank 0 has no other way to notice than its orders' pipe, which is the user's input only for `run`.
#[test]
fn a_remote_server_does_not_outlive_its_launcher() {
    use std::os::unix::fs::PermissionsExt;
    let dir = temporary();
    let ssh = file(&dir, "ssh", "#!/bin/sh\nfor last; do :; done\nexec sh -c \"exec $last\"\n");
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).expect("own file");
    let path = format!("{}:{}", text(dir.path()), std::env::var("PATH").unwrap_or_default());
    let hostfile = file(&dir, "hosts.json", r#"[{"ssh": "a", "ips": ["127.0.0.1"]}]"#);
    let args = ["launch", "--hostfile", &hostfile, "--", "serve", "--port", "0", "--threads", "1"];
    let mut child = command(&args)
        .env("PATH", &path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    assert!(lines.by_ref().map_while(Result::ok).any(|line| line.contains("listening on")), "it ended");
    let ranks = children(child.id());
    assert_eq!(ranks.len(), 1);
    signal(child.id(), "KILL");
    child.wait().expect("a child");
    let start = Instant::now();
    while runs(ranks[0]) {
        assert!(start.elapsed() < WITHIN, "the server outlived its launcher");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn restarted_ranks_answer() {
    let mut launch = launch(2, &["--pp", "2", "--restart", "1"], &["--max-tokens", "400", PROMPT]);
    launch.wait_for_text();
    signal(launch.ranks[1], "KILL");
    let (code, stderr, _) = launch.end(Duration::from_secs(60));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stderr.contains("starting the ranks again (1 of 1)") && stderr.contains("generated 400 tokens"),
        "{stderr}"
    );
}

/// `tandem launch ... -- serve`, whose ranks are to die.
struct Service {
    launch: Child,
    n_ranks: usize,
    url: String,
    said: Arc<Mutex<String>>,
    /// Counts restarts.
    generation: usize,
}

impl Service {
    fn start(n_ranks: usize, flags: &[&str], serve_flags: &[&str]) -> Service {
        // The same port for every generation, as clients would have it.
        let port = TcpListener::bind("127.0.0.1:0").expect("loopback").local_addr().expect("bound").port();
        let port_text = port.to_string();
        let launch = ["launch", "--deadline", "4", "--restart", "1000", "--start-timeout", "600"];
        let serve =
            ["--", "serve", "--port", &port_text, "--threads", "1", "--activations", "f32", "--context", "2048"];
        let mut launch = command(&[&launch[..], flags, &serve, serve_flags].concat());
        let mut launch = launch.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts");
        let said = Arc::new(Mutex::new(String::new()));
        let (lines, listener) = (BufReader::new(launch.stderr.take().expect("piped")).lines(), said.clone());
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| *listener.lock().expect("no panic") += &(line + "\n"));
        });
        Service { launch, n_ranks, url: format!("http://127.0.0.1:{port}"), said, generation: 0 }
    }

    fn said(&self) -> String {
        self.said.lock().expect("no panic").clone()
    }

    /// Waits until `done`, for a minute of running time.
    fn wait(&mut self, what: &str, done: impl Fn(&Service) -> bool) {
        let start = Running::now();
        while !done(self) {
            assert!(self.launch.try_wait().expect("a child").is_none(), "the launcher ended: {}", self.said());
            assert!(start.elapsed() < Duration::from_secs(60), "{what}: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The processes of the ranks.
    fn ranks(&mut self) -> Vec<u32> {
        self.wait("ranks start", |s| children(s.launch.id()).len() == s.n_ranks);
        children(self.launch.id())
    }

    /// Waits until this generation answers.
    fn wait_until_ready(&mut self) {
        self.wait("ready", |s| {
            let said = s.said();
            let own = said.split("starting the ranks again").nth(s.generation);
            own.is_some_and(|said| said.contains("on http://"))
        });
    }

    /// Rank `victim` dies at once: the others end within the deadline, which is returned, and a new generation starts.
    fn kill(&mut self, victim: usize) -> Duration {
        let ranks = self.ranks();
        let start = Running::now();
        signal(ranks[victim], "KILL");
        self.wait("the others end", |_| !ranks.iter().any(|pid| runs(*pid)));
        let took = start.elapsed();
        assert!(took < Duration::from_secs(4), "the others ended after {took:?}: {}", self.said());
        self.generation += 1;
        let again = format!("starting the ranks again ({} of 1000)", self.generation);
        self.wait("a new generation", |s| s.said().contains(&again));
        let said = self.said();
        let end = said.split("starting the ranks again").nth(self.generation - 1).expect("the last generation");
        assert!(end.contains(&format!("rank {victim} (localhost) ended first: signal: 9")), "{said}");
        took
    }

    fn end(mut self) {
        let ranks = self.ranks();
        signal(self.launch.id(), "TERM");
        let start = Running::now();
        while self.launch.try_wait().expect("a child").is_none() || ranks.iter().any(|pid| runs(*pid)) {
            assert!(start.elapsed() < WITHIN, "something is left: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.launch.kill();
        let _ = self.launch.wait();
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

/// The values of metrics by their names.
fn metrics(url: &str) -> impl Fn(&str) -> f64 + use<> {
    let text =
        agent().get(format!("{url}/metrics")).call().expect("connects").body_mut().read_to_string().expect("text");
    move |name| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().expect("a number")
    }
}

/// Status and body, or None when the connection broke.
fn ask(url: &str, prompt: &str, max_tokens: usize) -> Option<(u16, Value)> {
    let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
    let post = agent().post(format!("{url}/v1/completions")).header("content-type", "application/json");
    let mut answer = post.send(body.to_string()).ok()?;
    let text = answer.body_mut().read_to_string().ok()?;
    Some((answer.status().as_u16(), serde_json::from_str(&text).expect("JSON")))
}

/// A clock that stands still while this process does not run: machines are suspended, and shared.
#[derive(Clone, Copy)]
struct Running(Duration);

impl Running {
    fn now() -> Running {
        static TIME: AtomicU64 = AtomicU64::new(0);
        static TICKER: Once = Once::new();
        TICKER.call_once(|| {
            std::thread::spawn(|| {
                let mut last = Instant::now();
                loop {
                    std::thread::sleep(Duration::from_millis(5));
                    let passed = last.elapsed().min(Duration::from_millis(250));
                    TIME.fetch_add(passed.as_micros() as u64, Ordering::Relaxed);
                    last = Instant::now();
                }
            });
        });
        Running(Duration::from_micros(TIME.load(Ordering::Relaxed)))
    }

    fn elapsed(self) -> Duration {
        Running::now().0 - self.0
    }
}

/// What is the same in every answer.
fn text_of(answer: Option<(u16, Value)>) -> Value {
    let (status, body) = answer.expect("an answer");
    assert_eq!(status, 200, "{body}");
    body["choices"][0]["text"].clone()
}

#[test]
fn a_rank_that_dies_behind_the_server_is_one_error_and_the_service_comes_back() {
    let cache = temporary();
    let mut service = Service::start(2, &["--pp", "2"], &["--cache-dir", &text(cache.path())]);
    service.wait_until_ready();
    let expected = text_of(ask(&service.url, PROMPT, 8));
    let long_prompt = PROMPT.repeat(15);
    let after_long = text_of(ask(&service.url, &long_prompt, 8));
    // The ranks are asked about once a second what they have done.
    service.wait("the second rank's tokens", |s| metrics(&s.url)("tandem_rank_rows_total{rank=\"1\"}") >= 170.0);
    let of = metrics(&service.url);
    let (mut n_layers, mut cache) = (0.0, 0.0);
    for rank in ["{rank=\"0\"}", "{rank=\"1\"}"] {
        // A slow rank may have no layers, but it has the embedding or the head.
        n_layers += of(&format!("tandem_rank_layers{rank}"));
        cache += of(&format!("tandem_rank_cache_bytes{rank}"));
        assert_eq!(of(&format!("tandem_rank_rows_total{rank}")), of("tandem_rank_rows_total{rank=\"0\"}"));
        assert_eq!(of(&format!("tandem_rank_cache_used_bytes{rank}")), 0.0);
        assert!(of(&format!("tandem_rank_weights_bytes{rank}")) > 1e5);
        assert!(of(&format!("tandem_rank_busy_seconds_total{rank}")) > 0.0);
    }
    assert!(n_layers == 8.0 && cache > 1e6, "{n_layers} layers, {cache} bytes");

    // While two requests are answered, one of them as a stream.
    let url = format!("{}/v1/completions", service.url);
    let (sender, first_token) = channel();
    let stream = std::thread::spawn(move || {
        let body = json!({"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": true, "temperature": 0, "stream": true});
        let post = agent().post(url).header("content-type", "application/json");
        let mut answer = post.send(body.to_string()).expect("connects");
        let lines = BufReader::new(answer.body_mut().as_reader()).lines().map_while(Result::ok);
        let data = lines.filter_map(|line| line.strip_prefix("data: ").map(str::to_string));
        data.inspect(|_| sender.send(()).unwrap_or(())).collect::<Vec<_>>()
    });
    first_token.recv().expect("a stream");
    let url = service.url.clone();
    let whole = std::thread::spawn(move || ask(&url, PROMPT, 1900));
    std::thread::sleep(Duration::from_millis(100));
    service.kill(1);
    let (status, body) = whole.join().expect("no panic").expect("an answer");
    assert_eq!(status, 503, "{body}");
    let message = body["error"]["message"].as_str().expect("OpenAI's form");
    assert!(message.contains("rank 1 (localhost, layers 0 to") && message.contains("is gone"), "{message}");
    let events = stream.join().expect("no panic");
    let errors = events.iter().filter(|data| data.contains("\"error\"")).count();
    assert_eq!(errors, 1, "{:?}", events.last());
    // Then while nothing happens, and rank 0 itself.
    for victim in [1, 0] {
        service.wait_until_ready();
        assert_eq!(text_of(ask(&service.url, PROMPT, 8)), expected);
        service.kill(victim);
    }
    service.wait_until_ready();
    // Every rank's part of two pages was on disk, wherever the plan cuts this time.
    assert_eq!(text_of(ask(&service.url, &long_prompt, 8)), after_long);
    assert_eq!(metrics(&service.url)("tandem_disk_prompt_tokens_total"), 128.0);
    assert_eq!(text_of(ask(&service.url, PROMPT, 8)), expected);
    service.end();
}

/// Kills a random rank behind a server at 200 random moments of loading, prefill, decoding and rest:
/// `cargo test --release -p tandem-llm --test launch -- --ignored --nocapture soak`.
#[test]
#[ignore = "takes half an hour; see bench/runs/2026-11-23-comm"]
fn soak_of_killed_ranks() {
    let long_prompt = PROMPT.repeat(150);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    let mut slowest = Duration::ZERO;
    let mut expected = None;
    let (mut errors, mut broken, mut complete) = (0, 0, 0);
    let layouts = [(2, ["--pp", "2"]), (3, ["--pp", "3"]), (2, ["--tp", "2"]), (2, ["--ep", "2"])];
    for (n, flags) in layouts {
        let mut service = Service::start(n, &flags, &[]);
        for i in 0..50 {
            let victim = next(n as u64) as usize;
            let phase = ["load", "prefill", "decode", "idle"][i % 4];
            let moment = Duration::from_millis(next(if phase == "load" { 1500 } else { 700 }));
            if phase != "load" {
                service.wait_until_ready();
                let text = text_of(ask(&service.url, PROMPT, 8));
                assert_eq!(text, *expected.get_or_insert(text.clone()), "{}", service.said());
            }
            let request = match phase {
                "prefill" => Some((long_prompt.clone(), 4)),
                "decode" => Some((PROMPT.to_string(), 1900)),
                _ => None,
            };
            let request = request.map(|(prompt, max_tokens)| {
                let url = service.url.clone();
                std::thread::spawn(move || ask(&url, &prompt, max_tokens))
            });
            std::thread::sleep(moment);
            let took = service.kill(victim);
            slowest = slowest.max(took);
            let outcome = match request.map(|request| request.join().expect("no panic")) {
                None => "nothing asked".to_string(),
                Some(None) => {
                    assert_eq!(victim, 0, "only rank 0 has connections");
                    broken += 1;
                    "connection broken".to_string()
                }
                Some(Some((status, body))) => {
                    assert!(status == 200 || body["error"]["message"].is_string(), "{status} {body}");
                    if status == 200 {
                        complete += 1
                    } else {
                        errors += 1
                    }
                    format!("status {status}")
                }
            };
            println!("{phase}, {flags:?}, rank {victim} killed after {moment:?}: {outcome}, all ended after {took:?}");
        }
        service.wait_until_ready();
        assert_eq!(Some(text_of(ask(&service.url, PROMPT, 8))), expected);
        service.end();
    }
    println!(
        "200 kills; of 100 requests in flight {errors} got one error, {broken} lost their connection with rank 0, {complete} \
         were complete; every next request succeeded; slowest end {slowest:?}, deadline 4 s"
    );
}
