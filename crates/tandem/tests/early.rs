//! Mistakes show before weights are read: commands on a model of 5 GB that is a hole in a file.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::tiny::{Tiny, TinyDir};
use common::{command, file, finish, tandem, temporary, text};
use serde_json::{Value, json};

const HIDDEN: usize = 4096;
const MLP: usize = 14336;
const LAYERS: usize = 10;
const KV: usize = 1024;

/// A llama of 5 GB in bf16, all zero, that takes no room on the disk.
fn large() -> TinyDir {
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let sizes = [
        ("hidden_size", HIDDEN),
        ("intermediate_size", MLP),
        ("num_hidden_layers", LAYERS),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 8),
        ("head_dim", 128),
    ];
    let tiny = Tiny::new(320).template(template);
    let model = sizes.into_iter().fold(tiny, |tiny, (key, n)| tiny.config(key, json!(n))).write();
    let mut shapes = BTreeMap::from([
        ("model.embed_tokens".to_string(), vec![320, HIDDEN]),
        ("lm_head".to_string(), vec![320, HIDDEN]),
        ("model.norm".to_string(), vec![HIDDEN]),
    ]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![KV, HIDDEN]),
            ("self_attn.v_proj", vec![KV, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![MLP, HIDDEN]),
            ("mlp.up_proj", vec![MLP, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, MLP]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            shapes.insert(format!("model.layers.{layer}.{name}"), shape);
        }
    }
    let mut end = 0;
    let mut header = serde_json::Map::new();
    for (name, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(format!("{name}.weight"), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    assert!((4_000_000_000..6_000_000_000).contains(&end), "{end} bytes");
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = File::create(model.path().join("model.safetensors")).expect("writable");
    out.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&header)).expect("writable");
    out.set_len((8 + header.len() + end) as u64).expect("a hole");
    model
}

#[test]
fn mistakes_show_within_a_second() {
    let large = large();
    let model = large.arg();
    let dir = temporary();
    let bad_template = file(&dir, "bad.jinja", "{% for m in messages %}");
    let refusing = file(&dir, "refusing.jinja", "{{ raise_exception('no such role') }}");
    let bad_tools = file(&dir, "tools.json", r#"[{"type": "function"}]"#);
    let tokens = file(&dir, "tokens.json", "[1, 2]");
    let outside = file(&dir, "outside.json", "[1, 4000]");
    let short = file(&dir, "short.txt", "a");
    let tasks = file(&dir, "tasks.jsonl", "{}");
    let plain = file(&dir, "plain", "");
    let cache = format!("{plain}/cache");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let long = "word ".repeat(1000);
    let cases: [(&[&str], &str); 24] = [
        (&["run", "hi", "--chat-template", "/no/such"], "cannot read the chat template /no/such"),
        (&["run", "hi", "--chat-template", &bad_template], "syntax error"),
        (&["run", "hi", "--chat-template", &refusing], "refused the conversation"),
        (&["run", "hi", "--tools", "/no/such"], "cannot read /no/such"),
        (&["run", "hi", "--tools", &bad_tools], "entry 0 declares no function"),
        (&["run", "hi", "--temperature", "-1"], "temperature is -1, expected"),
        (&["run", "hi", "--top-p", "7"], "top_p is 7, expected"),
        (&["run", "hi", "--context", "0"], "--context must be at least 1"),
        (&["run", "hi", "--context", "1m"], "exceeds the 2048 positions"),
        (&["run", &long, "--raw", "--context", "1k"], "the context holds 1024"),
        (&["run", "", "--raw"], "the prompt is empty"),
        (&["run", "--json", ""], "the prompt is empty"),
        (&["serve", "--port", &port], "cannot listen on 127.0.0.1"),
        (&["serve", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (&["serve", "--chat-template", &bad_template], "syntax error"),
        (&["serve", "--api-key-file", "/no/such"], "cannot read --api-key-file /no/such"),
        (&["serve", "--context", "1m"], "exceeds the 2048 positions"),
        (&["serve", "--cache-dir", &cache], "cannot use --cache-dir"),
        (&["serve", "--cors-origin", "nonsense"], "the origin \"nonsense\" is not one"),
        (&["eval", "logits", "--tokens", &tokens, "--out", "/no/such/out"], "cannot write /no/such/out"),
        (&["eval", "logits", "--tokens", &outside, "--out", &plain], "token id 4000 is outside the vocabulary"),
        (&["eval", "perplexity", "--text", "/no/such"], "cannot read /no/such"),
        (&["eval", "perplexity", "--text", &short], "perplexity needs at least 2"),
        (&["eval", "tasks", "--tasks", &tasks], "line 1 is neither"),
    ];
    // The first start reads the program itself from the disk.
    tandem(&["--version"]).ok();
    for (args, expected) in cases {
        // On a busy machine one of several counts.
        let fastest = (0..3).map(|_| {
            let start = Instant::now();
            let done = tandem(&[args, &["--model", &model]].concat());
            let seconds = start.elapsed();
            assert_eq!(done.code, Some(1), "{args:?}: {}", done.stderr);
            assert!(done.stdout.is_empty() && done.stderr.contains(expected), "{args:?}: {}", done.stderr);
            seconds
        });
        let fastest = fastest.take(if args.contains(&"no.such.host.invalid") { 1 } else { 3 }).min().expect("some");
        assert!(fastest < Duration::from_secs(1) || args.contains(&"no.such.host.invalid"), "{args:?}: {fastest:?}");
    }
    assert_eq!(std::fs::read(&plain).expect("still there"), b"", "a file that is there stays as it is");
    let tokenizer = Tiny::new(320).file("tokenizer.json", "{");
    let broken = tokenizer.write();
    for args in [&["run", "hi", "--raw"][..], &["serve"], &["eval", "perplexity", "--text", &short]] {
        let done = broken.run(args, &[]);
        assert!(
            done.code == Some(1) && done.stderr.contains("tokenizer.json is not a valid"),
            "{args:?}: {}",
            done.stderr
        );
    }
}

/// The port answers while 5 GB are loaded.
#[test]
fn a_server_that_loads_says_so() {
    let large = large();
    let mut child = command(&["serve", "--model", &large.arg(), "--port", "0", "--threads", "1"])
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let address = loop {
        let line = lines.next().expect("a line").expect("UTF-8");
        if let Some((_, rest)) = line.split_once("listening on ") {
            break rest.split(';').next().expect("an address").to_owned();
        }
    };
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let get = |path: &str| {
        let mut response = agent.get(format!("http://{address}{path}")).call().expect("an answer");
        let retry = response.headers().get("retry-after").is_some();
        let text = response.body_mut().read_to_string().expect("text");
        (response.status().as_u16(), retry, serde_json::from_str::<Value>(&text).expect("JSON"))
    };
    let (status, _, health) = get("/health");
    assert_eq!((status, &health["status"]), (200, &json!("loading")), "{health}");
    assert!(health["progress"]["fraction"].is_number(), "{health}");
    for path in ["/ready", "/v1/models"] {
        let (status, retry, body) = get(path);
        assert!(status == 503 && retry, "{path}: {status} {body}");
    }
    child.kill().expect("runs");
    child.wait().expect("ends");
}

/// Logs in a file are lines of JSON, or text without escape codes.
#[test]
fn logs_have_no_escape_codes() {
    for (form, json_lines) in [("json", true), ("text", false)] {
        let args = ["inspect", "models/fable-30m-MXFP4-Q8", "-vvv", "--log-format", form];
        let done = finish(command(&args).env("CLICOLOR", "1"));
        assert!(!done.stderr.contains('\u{1b}'), "{}", done.stderr);
        if json_lines {
            done.stderr.lines().for_each(|line| drop(serde_json::from_str::<Value>(line).expect(line)));
        }
    }
    let done = finish(command(&["inspect"]).env("RUST_LOG", "tandem=loud"));
    assert!(done.code == Some(1) && done.stderr.contains("RUST_LOG is \"tandem=loud\""), "{}", done.stderr);
}

#[test]
fn models_that_are_not_here() {
    let dir = temporary();
    let nobody = [("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HOME", dir.path().to_str().expect("UTF-8"))];
    // In a script nothing is got without --yes; with it, and for metadata, the server is asked.
    let done = finish(command(&["run", "hi", "--model", "some/model"]).envs(nobody));
    assert!(done.code == Some(1) && done.stderr.contains("`tandem pull some/model` gets it"), "{}", done.stderr);
    assert!(!done.stderr.contains("127.0.0.1:9"), "{}", done.stderr);
    for args in [&["run", "hi", "--model", "some/model", "--yes"][..], &["inspect", "some/model"]] {
        let done = finish(command(args).envs(nobody));
        assert!(done.code == Some(1) && done.stderr.contains("127.0.0.1:9"), "{args:?}: {}", done.stderr);
    }
    // Outside a clone the first command says what to do. A copy of the program has no clone above it.
    let copy = dir.path().join("tandem");
    std::fs::copy(env!("CARGO_BIN_EXE_tandem"), &copy).expect("copies");
    let done =
        finish(std::process::Command::new(&copy).args(["run", "hi"]).current_dir(dir.path()).stdin(Stdio::null()));
    assert!(done.code == Some(1) && done.stderr.contains("--model OWNER/NAME"), "{}", done.stderr);
}

/// Help fits one screen in its short form, and says how commands end in its long one; completions and man pages are made.
#[test]
fn help_completions_and_man_pages() {
    for args in [&["-h"][..], &["run", "-h"], &["serve", "-h"], &["inspect", "-h"], &["pull", "-h"]] {
        let help = finish(command(args).env("COLUMNS", "100")).ok();
        assert!(help.lines().count() <= 60, "{args:?}: {} lines", help.lines().count());
    }
    let help = tandem(&["run", "--help"]).ok();
    for heading in
        ["Model:", "Prompt:", "Sampling:", "Output:", "Hardware:", "Several ranks:", "Examples:", "Exit codes:"]
    {
        assert!(help.contains(heading), "{heading}\n{help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = tandem(&["completions", shell]).ok();
        assert!(script.contains("chat-template"), "{shell}");
    }
    let dir = temporary();
    tandem(&["man", &text(dir.path())]).ok();
    let page = std::fs::read_to_string(dir.path().join("tandem-run.1")).expect("a page");
    assert!(page.starts_with(".ie") || page.contains(".TH"), "{page}");
}
