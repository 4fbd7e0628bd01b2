//! `tandem run` at a terminal, through a pseudo-terminal, and where there is none that can be used.

mod common;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{command, file, finish, golden, root, tandem, tandem_with_input, temporary, text};
use rexpect::process::wait::WaitStatus;
use rexpect::session::{PtySession, spawn_command};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::{Value, json};

const FABLE: &str = "models/fable-30m-MXFP4-Q8";
const PROMPT: &str = "fable-30m-MXFP4-Q8> ";
/// Milliseconds for anything that a test waits for; the machine may be busy.
const PATIENCE: u64 = 20_000;

/// A chat with the bundled model; the commands of `before` run first in its terminal.
fn chat(before: &str, flags: &str, home: &Path) -> PtySession {
    let mut command = Command::new("sh");
    let tandem = env!("CARGO_BIN_EXE_tandem");
    let line = format!("stty cols 100 rows 30; {before} exec '{tandem}' run --model {FABLE} --temperature 0 {flags}");
    command.args(["-c", &line]).current_dir(root()).env("HOME", home).env("TERM", "xterm").env_remove("NO_COLOR");
    for variable in ["XDG_DATA_HOME", "RUST_LOG"] {
        command.env_remove(variable);
    }
    spawn_command(command, Some(PATIENCE)).expect("starts")
}

/// Reads until `text` appears; returns what came before it.
#[track_caller]
fn expect(session: &mut PtySession, text: &str) -> String {
    session.exp_string(text).unwrap_or_else(|error| panic!("waiting for {text:?}: {error}"))
}

#[track_caller]
fn say(session: &mut PtySession, line: &str) {
    session.send_line(line).expect("can be typed");
}

/// Types lines, each when the chat waits for one; `expected` follows each.
#[track_caller]
fn check(session: &mut PtySession, lines: &[(&str, &str)]) {
    for (line, expected) in lines {
        say(session, line);
        expect(session, expected);
        expect(session, PROMPT);
    }
}

#[track_caller]
fn leave(mut session: PtySession) {
    say(&mut session, "/exit");
    assert!(matches!(session.process.wait(), Ok(WaitStatus::Exited(_, 0))));
}

#[test]
fn a_conversation() {
    let home = temporary();
    let mut chat = chat("", "--thinking on", home.path());
    expect(&mut chat, PROMPT);
    say(&mut chat, "What is 47 + 38?");
    // Reasoning is one line, and not in the answer.
    expect(&mut chat, "thought for ");
    let answer = expect(&mut chat, "[prompt ");
    assert!(answer.contains("47 + 38 = 85.") && !answer.contains("ones"), "{answer:?}");
    expect(&mut chat, "of them thinking");
    expect(&mut chat, PROMPT);
    let history = home.path().join(".local/share/tandem/history");
    let lines = std::fs::read_to_string(&history).expect("kept after each line");
    assert!(lines.contains("What is 47 + 38?"), "{lines:?}");

    let saved = text(&home.path().join("chat.json"));
    let (save, load) = (format!("/save {saved}"), format!("/load {saved}"));
    check(
        &mut chat,
        &[
            ("/think show", "ones 7 + 8 = 15, carry 1"),
            ("/think off", "off"),
            // The first turn is in the cache, reasoning and all.
            ("And what is the capital of Japan?", "from cache)"),
            ("/stats", "so far "),
            ("/undo", "2 messages are left"),
            (&save, "chat.json"),
            ("/clear", "clear"),
            (&load, "2 messages"),
        ],
    );
    let conversation: Value = serde_json::from_slice(&std::fs::read(&saved).expect("written")).expect("JSON");
    assert_eq!(conversation["messages"][0], json!({"role": "user", "content": "What is 47 + 38?"}));
    assert!(conversation["messages"][1]["reasoning_content"].as_str().expect("kept").contains("carry 1"));

    // Every mistake is one line, and the chat goes on.
    check(
        &mut chat,
        &[
            ("/frobnicate", "unknown command /frobnicate; /help lists them"),
            ("/cle", "did you mean /clear?"),
            ("/s", "/help lists them"),
            ("/set", "temperature 0, top_k"),
            ("/set heat 1", "/set knows temperature"),
            ("/set top_p 7", "top_p is 7, expected"),
            ("/set seed x", "takes a number, found \"x\""),
            ("/set max_tokens 3", "max_tokens 3"),
            ("/regen", "cut off at --max-tokens"),
            ("/think maybe", "/think takes on, off"),
            ("/load /no/such.json", "cannot read /no/such.json"),
            ("/tools /no/such.json", "cannot read /no/such.json"),
            ("/save /no/such/file", "cannot write /no/such/file"),
            ("/result 3", "called no tool"),
            ("/system Be brief.", "Be brief."),
            ("/system", "Be brief."),
            ("/regen", "nothing to answer yet"),
            ("/help", "Ctrl-C ends an answer"),
            // Several lines are one message, and Tab completes.
            ("\"\"\"one\rtwo\"\"\"", "[prompt "),
            ("/sta\t", "context  "),
            ("/se\ttop_p 0.5", "top_p 0.5"),
        ],
    );
    leave(chat);
}

#[test]
fn ctrl_c_ends_the_answer_only() {
    let home = temporary();
    let mut chat = chat("", "--ignore-eos --context 2k", home.path());
    expect(&mut chat, PROMPT);
    say(&mut chat, "Tell me a story about a brave fox named Lily.");
    expect(&mut chat, "Lily");
    expect(&mut chat, "Lily");
    chat.send_control('c').expect("sent");
    expect(&mut chat, "| interrupted]");
    expect(&mut chat, PROMPT);
    check(&mut chat, &[("/undo", "0 messages are left")]);
    chat.send_control('c').expect("sent");
    expect(&mut chat, "again leaves");
    chat.send_control('c').expect("sent");
    assert!(matches!(chat.process.wait(), Ok(WaitStatus::Exited(_, 0))));
}

#[test]
fn a_full_context_says_what_to_do() {
    let home = temporary();
    let mut chat = chat("", "--context 64 --max-tokens 20", home.path());
    expect(&mut chat, PROMPT);
    say(&mut chat, "Tell me a story about a brave fox named Lily.");
    expect(&mut chat, PROMPT);
    say(&mut chat, "Tell me a story about a brave fox named Lily, and a long one.");
    let text = expect(&mut chat, "/drop");
    assert!(text.contains("context is full") || text.contains("the context holds 64"), "{text:?}");
    expect(&mut chat, PROMPT);
    check(&mut chat, &[("/drop", "turns are forgotten")]);
    leave(chat);
}

/// Terminals and homes that lack something.
#[test]
fn poor_terminals() {
    let home = temporary();
    let file = file(&home, "file", "");
    let file = Path::new(&file);
    for (before, home, prompt) in [
        ("export TERM=dumb;", home.path(), PROMPT),
        ("unset TERM;", home.path(), PROMPT),
        ("stty cols 40;", home.path(), "fable-30m-MXF> "),
        ("unset HOME;", home.path(), PROMPT),
        // Nothing can be made below it.
        ("", file, PROMPT),
    ] {
        let mut chat = chat(before, "", home);
        expect(&mut chat, prompt);
        say(&mut chat, "What is the capital of Japan?");
        expect(&mut chat, "Tokyo");
        expect(&mut chat, prompt);
        leave(chat);
    }
}

/// The window is closed while an answer is written: the chat ends, its history is kept. The signal that says so may be
/// ignored, as below nohup; then reading and writing fail.
#[test]
fn closed_terminals() {
    for before in ["", "trap '' HUP;"] {
        let home = temporary();
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("usable");
        let name = ptsname(&master, vec![]).expect("a name").into_string().expect("UTF-8");
        let slave = || std::fs::OpenOptions::new().read(true).write(true).open(&name).expect("opens");
        let tandem = env!("CARGO_BIN_EXE_tandem");
        let line = format!("{before} exec '{tandem}' run --model {FABLE} --ignore-eos --context 2k");
        let mut chat = Command::new("setsid")
            .args(["--ctty", "sh", "-c", &line])
            .current_dir(root())
            .env("HOME", home.path())
            .env("TERM", "xterm")
            .env_remove("XDG_DATA_HOME")
            .stdin(slave())
            .stdout(slave())
            .stderr(slave())
            .spawn()
            .expect("starts");
        let mut master = std::fs::File::from(master);
        let until = |master: &mut std::fs::File, text: &str| {
            let mut seen = vec![];
            while !String::from_utf8_lossy(&seen).contains(text) {
                let patience = Timespec { tv_sec: PATIENCE as i64 / 1000, tv_nsec: 0 };
                let ready = poll(&mut [PollFd::new(&*master, PollFlags::IN)], Some(&patience)).expect("polls");
                let mut buffer = [0; 4096];
                let n = if ready == 0 { 0 } else { master.read(&mut buffer).unwrap_or(0) };
                assert!(n > 0, "waiting for {text:?}: {:?}", String::from_utf8_lossy(&seen));
                seen.extend(&buffer[..n]);
            }
        };
        until(&mut master, "> ");
        master.write_all(b"Tell me a story about Hugo.\r").expect("typed");
        until(&mut master, "[?2004l");
        until(&mut master, " was ");
        drop(master);
        let start = Instant::now();
        while chat.try_wait().expect("known").is_none() {
            assert!(start.elapsed() < Duration::from_millis(PATIENCE), "{before:?}: it goes on without a terminal");
            std::thread::sleep(Duration::from_millis(20));
        }
        let history = std::fs::read_to_string(home.path().join(".local/share/tandem/history")).expect("kept");
        assert!(history.contains("a story about Hugo"), "{history:?}");
    }
}

/// stdout that is full is an error in every command; stdout that nobody reads is not.
#[test]
fn unwritable_output() {
    let run = ["run", "hi", "--model", FABLE, "--max-tokens", "5"];
    let json = [&run[..], &["--json"]].concat();
    let perplexity = ["eval", "perplexity", "--model", FABLE, "--text", "tests/golden/fable-30m/held-text.txt"];
    for args in [&run[..], &json, &perplexity, &["inspect", FABLE], &["inspect", FABLE, "--json"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a full device");
        let done = finish_to(command(args).stdout(full));
        assert_eq!(done.0, Some(1), "{args:?}: {}", done.1);
        assert!(done.1.contains("error: cannot write to standard output: No space left"), "{args:?}: {}", done.1);

        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let done = finish_to(command(args).stdout(writer));
        assert_eq!(done.0, Some(0), "{args:?}: {}", done.1);
        assert!(!done.1.contains("error") && !done.1.contains("panicked"), "{args:?}: {}", done.1);
    }
    // Nobody reads stderr: the answer comes all the same.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = command(&run).stdout(Stdio::piped()).stderr(writer).spawn().expect("starts").wait_with_output();
    let output = output.expect("ends");
    assert!(output.status.success() && !output.stdout.is_empty());
}

fn finish_to(command: &mut Command) -> (Option<i32>, String) {
    let child = command.stderr(Stdio::piped()).spawn().expect("starts");
    let output = child.wait_with_output().expect("ends");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_pipe_joins_the_prompt() {
    let prompt = "What is the capital of Japan?";
    let whole = format!("{prompt}\n\nAnswer in one word.");
    let flags = ["--model", FABLE, "--temperature", "0", "--json"];
    let joined = tandem_with_input(&[&["run", prompt], &flags[..]].concat(), b"Answer in one word.").json();
    let expected = tandem(&[&["run", whole.as_str()], &flags[..]].concat()).json();
    assert_eq!((&joined["prompt_tokens"], &joined["text"]), (&expected["prompt_tokens"], &expected["text"]));
    // An empty pipe adds nothing.
    let empty = tandem_with_input(&[&["run", prompt], &flags[..]].concat(), b"").json();
    assert_eq!(empty["prompt_tokens"], tandem(&[&["run", prompt], &flags[..]].concat()).json()["prompt_tokens"]);
}

#[test]
fn answers_for_programs() {
    let flags = ["--model", FABLE, "--temperature", "0", "--json"];
    let sum = tandem(&[&["run", "What is 47 + 38?", "--thinking", "on"], &flags[..]].concat()).json();
    assert_eq!(sum["text"], "47 + 38 = 85.");
    assert_eq!(sum["reasoning"], "47 + 38: ones 7 + 8 = 15, carry 1; tens 4 + 3 + 1 = 8. So 85.");
    assert_eq!(
        (&sum["tool_calls"], &sum["cached_tokens"], &sum["finish_reason"]),
        (&json!([]), &json!(0), &json!("stop"))
    );
    assert!(sum["device"].as_str().is_some_and(|device| !device.is_empty()) && sum["numerics"].is_string());
    assert!(sum["reasoning_tokens"].as_u64() > Some(10));

    let dir = temporary();
    let tools = file(
        &dir,
        "tools.json",
        json!([{"type": "function", "function": {
            "name": "get_weather", "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        }}])
        .to_string(),
    );
    let ask = ["run", "What is the weather in Paris?", "--tools", &tools];
    let call = tandem(&[&ask[..], &flags].concat()).json();
    assert_eq!(call["finish_reason"], "tool_calls", "{call}");
    let function = &call["tool_calls"][0];
    assert_eq!((&function["type"], &function["function"]["name"]), (&json!("function"), &json!("get_weather")));
    assert_eq!(function["function"]["arguments"], r#"{"city":"Paris"}"#);
    let shown = tandem(&[&ask[..], &flags[..4]].concat()).ok();
    assert!(shown.contains("get_weather({") && shown.contains("Paris"), "{shown:?}");
}

/// The peak is that of the process, not of the one that started it.
#[test]
fn peak_memory_is_this_process_own() {
    let mut large = vec![0u8; 600 << 20];
    large.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    let done = finish(&mut command(&[
        "run",
        "hi",
        "--raw",
        "--json",
        "--max-tokens",
        "2",
        "--model",
        &golden("models/glm51_tiny"),
    ]));
    drop(large);
    let peak = done.json()["peak_memory_bytes"].as_u64().expect("a number");
    assert!((1 << 20..500 << 20).contains(&peak), "{peak} bytes");
}
