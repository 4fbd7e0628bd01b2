//! `tandem doctor` and `tandem explain` as a user runs them.

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use common::{command, file, finish, tandem, temporary, text};
use serde_json::Value;
use tempfile::TempDir;

const FABLE: &str = "models/fable-30m-MXFP4-Q8";

/// Runs in a state directory.
fn in_state(dir: &TempDir, args: &[&str]) -> common::Done {
    finish(command(args).env("XDG_STATE_HOME", dir.path()))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn the_last_run_is_explained_without_its_text() {
    let dir = temporary();
    let nothing = in_state(&dir, &["explain"]);
    assert_eq!(nothing.code, Some(1));
    assert!(nothing.stderr.contains("no run to explain"), "{}", nothing.stderr);
    let secret = "a unicorn called Wilhelmina";
    let prompt = ["run", secret, "--model", FABLE, "--max-tokens", "40", "--ignore-eos", "--temperature", "0"];
    let said = in_state(&dir, &prompt).ok();
    let kept = std::fs::read_to_string(dir.path().join("tandem/last-run.json")).expect("kept");
    assert!(!kept.contains("Wilhelmina") && !kept.contains(said.trim()), "{kept}");
    let page = dir.path().join("page.html");
    let json = in_state(&dir, &["explain", "--json", "--report", &text(&page)]).json();
    let explanation = &json["explanation"];
    assert_ne!(explanation["principal"], "unknown", "{explanation}");
    let parts = explanation["parts"].as_array().expect("parts");
    let sum: f64 = parts.iter().map(|part| number(&part["ms"])).sum();
    assert!((sum / number(&explanation["step_ms"]) - 1.0).abs() < 0.1, "{explanation}");
    for name in ["experts", "attention_projections", "lm_head", "router", "sparse_attention", "host"] {
        assert!(parts.iter().any(|part| part["name"] == name && number(&part["ms"]) > 0.0), "{name} in {parts:?}");
    }
    assert!(number(&json["record"]["facts"]["bandwidth"]) > 1e8);
    let page = std::fs::read_to_string(page).expect("written");
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg"));
    let shown = in_state(&dir, &["explain"]).ok();
    assert!(shown.contains("\nbottleneck: ") && shown.contains("tokens/s"), "{shown}");
    // What is not a record says so.
    file(&dir, "tandem/last-run.json", "{}");
    assert!(in_state(&dir, &["explain"]).stderr.contains("form"));
}

#[test]
fn ranks_are_explained_together() {
    let dir = temporary();
    let prompt = ["run", "Once", "--model", FABLE, "--max-tokens", "24", "--ignore-eos", "--tp", "2", "--threads", "1"];
    in_state(&dir, &prompt).ok();
    let json = in_state(&dir, &["explain", "--json"]).json();
    let ranks = json["record"]["ranks"].as_array().expect("ranks");
    assert_eq!(ranks.len(), 2);
    assert!(ranks.iter().all(|rank| number(&rank["working_ms"]) > 0.0 && number(&rank["summing_ms"]) > 0.0), "{json}");
    let parts = json["explanation"]["parts"].as_array().expect("parts");
    assert!(parts.iter().any(|part| part["name"] == "communication" && number(&part["ms"]) > 0.0), "{parts:?}");
}

#[test]
fn a_server_is_explained_while_it_runs_to_those_who_have_its_key() {
    let dir = temporary();
    let keys = file(&dir, "keys", "# of the test\nabc\n");
    let mut server = command(&["serve", "--model", FABLE, "--port", "0", "--api-key-file", &keys])
        .env("XDG_STATE_HOME", dir.path())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(server.stderr.take().expect("piped")).lines();
    let url = loop {
        let line = lines.next().expect("the server has ended").expect("UTF-8");
        if let Some((_, rest)) = line.split_once("http://") {
            break format!("http://{}", rest.split(' ').next().expect("an address"));
        }
    };
    std::thread::spawn(move || lines.for_each(drop));
    let body = serde_json::json!({"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": true});
    let request = ureq::post(format!("{url}/v1/completions")).header("Authorization", "Bearer abc");
    request.header("content-type", "application/json").send(body.to_string()).expect("an answer");
    let json = tandem(&["explain", &url, "--api-key-file", &keys, "--json"]).json();
    assert!(number(&json["explanation"]["tokens_per_second"]) > 0.0, "{json}");
    // A step that verifies drafts makes several tokens.
    assert!(number(&json["record"]["decode"]["n_tokens"]) >= 30.0, "{json}");
    let without = tandem(&["explain", &url]);
    assert!(without.code == Some(1) && without.stderr.contains("401"), "{}", without.stderr);
    server.kill().expect("killed");
    let _ = server.wait();
    assert!(tandem(&["explain", &url]).stderr.contains("cannot reach"));
    assert!(tandem(&["explain", "here"]).stderr.contains("no address"));
}

#[test]
fn a_doctor_finds_what_is_wrong_and_says_how_fast_it_should_be() {
    let dir = temporary();
    let healthy = tandem(&["doctor", "--json", "--model", FABLE]);
    let report: Value = serde_json::from_str(&healthy.stdout).expect("JSON");
    let level = |report: &Value, id: &str| {
        let findings = report["report"]["findings"].as_array().expect("findings");
        findings.iter().find(|f| f["id"] == id).map(|f| f["level"].as_str().expect("a word").to_owned())
    };
    assert_eq!(level(&report, "model.files").as_deref(), Some("ok"), "{report}");
    assert_eq!(level(&report, "model.fit").as_deref(), Some("ok"), "{report}");
    let expected = &report["report"]["prediction"];
    assert!(number(&expected["decode_tokens_per_second"]) > 1.0, "{expected}");
    assert!(number(&expected["prefill_tokens_per_second"]) > number(&expected["decode_tokens_per_second"]));
    // A model that is none, more threads than cores, older kernels, a hostfile with a wrong address: each by name.
    let hosts = file(&dir, "hosts.json", r#"[{"ssh": "localhost"}, {"ssh": "localhost", "ips": ["203.0.113.9"]}]"#);
    let sick = tandem(&["doctor", "--json", "--model", &text(dir.path()), "--threads", "999", "--hostfile", &hosts]);
    assert_eq!(sick.code, Some(1));
    let report: Value = serde_json::from_str(&sick.stdout).expect("JSON");
    for id in ["model.files", "processor.threads"] {
        assert_eq!(level(&report, id).as_deref(), Some("problem"), "{id}: {report}");
    }
    assert!(sick.stdout.contains("203.0.113.9"), "{report}");
    let shown = tandem(&["doctor", "--hostfile", &hosts]);
    assert!(shown.code == Some(1) && shown.stdout.contains("to do: "), "{}", shown.stdout);
}
