//! Commands and flags, black box, on tiny fixtures.

mod common;

use std::path::Path;

use common::{Copy, command, file, finish, golden, tandem, tandem_with_input, temporary, text};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// f32 logits at every position: tests/golden/README.md.
const TOLERANCE: f32 = 5e-4;
const FABLE: &str = "models/fable-30m-MXFP4-Q8";

fn words(path: &str, name: &str) -> (Vec<usize>, Vec<[u8; 4]>) {
    let data = std::fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let tensors = SafeTensors::deserialize(&data).expect("safetensors");
    let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    (tensor.shape().to_vec(), tensor.data().as_chunks::<4>().0.to_vec())
}

/// Runs `eval logits` on a fixture's second prompt and compares with the reference.
#[track_caller]
fn check_logits(model: &str, flags: &[&str]) {
    let dir = temporary();
    let goldens = golden(&format!("models/{model}/golden.safetensors"));
    let (_, tokens) = words(&goldens, "p1.tokens");
    let tokens: Vec<u32> = tokens.into_iter().map(u32::from_le_bytes).collect();
    let tokens = file(&dir, "tokens.json", json!(tokens).to_string());
    let out = text(&dir.path().join("logits.safetensors"));
    let model = golden(&format!("models/{model}"));
    let common = ["eval", "logits", "--model", &model, "--tokens", &tokens, "--out", &out, "--activations", "f32"];
    tandem(&[&common[..], flags].concat()).ok();
    let (shape, found) = words(&out, "logits");
    let (expected_shape, expected) = words(&goldens, "p1.logits");
    assert_eq!(shape, expected_shape);
    let error = found
        .into_iter()
        .zip(expected)
        .map(|(f, e)| (f32::from_le_bytes(f) - f32::from_le_bytes(e)).abs())
        .fold(0.0, f32::max);
    assert!(error <= TOLERANCE, "{flags:?}: logits differ by {error}");
}

#[test]
fn logits_equal_the_reference_on_every_path() {
    for flags in [
        &[][..],
        &["--prefill-chunk", "7"],
        &["--decode-from", "20"],
        &["--decode-from", "0"],
        &["--prefill-chunk", "5", "--decode-from", "33", "--threads", "1"],
    ] {
        check_logits("glm51_tiny", flags);
    }
    check_logits("dsv32_tiny", &["--prefill-chunk", "7"]);
    check_logits("llama_tiny", &["--decode-from", "20"]);
}

/// A short greedy answer of the bundled model as JSON.
fn answer(flags: &[&str]) -> Value {
    let prompt = "What is the capital of Japan?";
    tandem(&[&["run", prompt, "--model", FABLE, "--json"], flags].concat()).json()
}

#[test]
fn a_pipe_is_the_prompt() {
    let flags = ["run", "--model", FABLE, "--temperature", "0"];
    let piped = tandem_with_input(&flags, b"What is the capital of Japan?");
    let expected = answer(&["--temperature", "0"]);
    // Statistics go to stderr, the answer and nothing else to stdout.
    assert!(piped.stderr.contains("tok/s") && piped.stderr.lines().count() == 1, "{}", piped.stderr);
    assert_eq!(piped.ok().trim_end(), expected["text"].as_str().expect("text"));
}

#[test]
fn stop_strings_end_the_answer() {
    let whole = answer(&["--temperature", "0"]);
    let whole = whole["text"].as_str().expect("text");
    let (before, _) = whole.split_once("capital").unwrap_or_else(|| panic!("{whole:?} has the word"));
    let stopped = answer(&["--temperature", "0", "--stop", "never", "--stop", "capital"]);
    assert_eq!(stopped["text"], before);
    assert_eq!(stopped["finish_reason"], "stop");
}

#[test]
fn max_tokens_ends_the_answer() {
    let found = answer(&["--temperature", "0", "--max-tokens", "3"]);
    assert_eq!(found["generated_tokens"], 3);
    assert_eq!(found["finish_reason"], "length");
}

#[test]
fn a_seed_repeats_the_text() {
    let model = golden("models/glm51_tiny");
    let sample = |seed: &str| {
        let flags = ["--temperature", "1.5", "--seed", seed, "--max-tokens", "24", "--ignore-eos", "--json", "--raw"];
        tandem(&[&["run", "hello", "--model", &model], &flags[..]].concat()).json()["tokens"].clone()
    };
    assert_eq!(sample("7"), sample("7"));
    assert_ne!(sample("7"), sample("8"));
}

#[test]
fn version_and_help() {
    let version = tandem(&["--version"]).ok();
    assert_eq!(version, format!("tandem {}\n", env!("CARGO_PKG_VERSION")));
    for args in
        [&["--help"][..], &["run", "--help"], &["inspect", "--help"], &["eval", "--help"], &["eval", "logits", "-h"]]
    {
        assert!(tandem(args).ok().contains("Usage: tandem"), "{args:?}");
    }
}

#[test]
fn usage_errors_exit_with_2() {
    for args in [
        &[][..],
        &["frobnicate"],
        &["run", "hi", "--no-such-flag"],
        &["run", "hi", "--temperature", "warm"],
        &["run", "hi", "--context", "-1"],
        &["run", "hi", "--activations", "fp3"],
        &["run", "hi", "--backend", "abacus"],
        &["eval"],
        &["eval", "logits"],
        &["eval", "logits", "--tokens", "a.json"],
    ] {
        let done = tandem(args);
        assert_eq!(done.code, Some(2), "{args:?}: {}", done.stderr);
        let help = done.stderr.contains("Usage: tandem") || done.stderr.contains("try '--help'");
        assert!(done.stdout.is_empty() && help, "{args:?}: {}", done.stderr);
    }
}

#[test]
fn a_template_from_a_file_wins() {
    let dir = temporary();
    let template = file(&dir, "t.jinja", "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}");
    let model = golden("models/glm51_tiny");
    let flags = ["--model", &model, "--temperature", "0", "--max-tokens", "8", "--ignore-eos", "--json"];
    let run = |prompt: &str, more: &[&str]| tandem(&[&["run", prompt], &flags[..], more].concat()).json();
    let found = run("hi", &["--chat-template", &template, "--system", "be nice"]);
    let raw = run("<system>be nice<user>hi", &["--raw"]);
    assert_eq!((&found["tokens"], &found["prompt_tokens"]), (&raw["tokens"], &raw["prompt_tokens"]));
}

#[test]
fn a_model_without_a_template_says_so() {
    let copy = Copy::of("glm51_tiny").without("chat_template.jinja");
    let done = tandem(&["run", "hi", "--model", &copy.path()]);
    assert_eq!(done.code, Some(1));
    assert!(done.stderr.contains("--raw") && done.stderr.contains("--chat-template FILE"), "{}", done.stderr);
}

/// The checkpoint says how it chats, `inspect` shows it, and `--chat-format` forces another way.
#[test]
fn chat_formats() {
    let with = golden("models/dsv32_tiny");
    let without = Copy::of("dsv32_tiny").without("chat_template.jinja");
    let chat =
        |model: &str, more: &[&str]| tandem(&[&["inspect", model, "--json"], more].concat()).json()["chat"].clone();
    for (model, more, format, prompts) in [
        (&with, &[][..], "hermes", json!("template")),
        (&without.path(), &[], "deepseek_v32", json!("built-in")),
        (&without.path(), &["--chat-format", "llama3"], "llama3", json!(null)),
        (&with, &["--chat-format", "deepseek_v32"], "deepseek_v32", json!("built-in")),
    ] {
        let found = chat(model, more);
        assert_eq!((&found["format"], &found["prompts"]), (&json!(format), &prompts), "{model} {more:?}");
    }
    let shown = tandem(&["inspect", &without.path()]).stdout;
    let line = "chat format: deepseek_v32, built-in prompts, reasoning off, can be switched on";
    assert!(shown.contains(line), "{shown}");
    // A prompt is made, with reasoning and without, and what the format cannot be told is said.
    let run = |more: &[&str]| {
        let flags = ["run", "hi", "--model", &without.path(), "--max-tokens", "1", "--json"];
        tandem(&[&flags[..], more].concat())
    };
    assert!(run(&["--thinking", "off"]).json()["prompt_tokens"].as_u64() > Some(10));
    let done = run(&["--thinking", "high"]);
    assert!(done.stderr.contains("knows no levels of effort"), "{}", done.stderr);
    assert_eq!(run(&["--thinking", "much"]).code, Some(2));
    assert_eq!(run(&["--chat-format", "morse"]).code, Some(2));
}

/// Lays a fixture out as huggingface_hub does and inspects it by id.
#[test]
fn ids_are_found_in_the_hugging_face_cache() {
    let home = temporary();
    let repo = home.path().join("hub/models--org--tiny");
    let inspect =
        |variable: &str, value: &Path| finish(command(&["inspect", "org/tiny", "--json"]).env(variable, value));
    let fill = |revision: &str, config: &Path| {
        let snapshot = repo.join("snapshots").join(revision);
        std::fs::create_dir_all(&snapshot).expect("creates");
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(config.join(name), snapshot.join(name)).expect("copies");
        }
    };
    let missing = inspect("HF_HOME", home.path());
    assert_eq!(missing.code, Some(1));
    assert!(missing.stderr.contains("tandem pull org/tiny"), "{}", missing.stderr);

    fill("0123abc", Path::new(&golden("models/glm51_tiny")));
    fill("fff", Path::new(&golden("models/llama_tiny")));
    std::fs::create_dir_all(repo.join("refs")).expect("creates");
    std::fs::write(repo.join("refs/main"), "0123abc\n").expect("writable");
    assert_eq!(inspect("HF_HOME", home.path()).json()["model_type"], "glm_moe_dsa");
    assert_eq!(inspect("HF_HUB_CACHE", &home.path().join("hub")).json()["model_type"], "glm_moe_dsa");
    std::fs::write(repo.join("refs/main"), "fff").expect("writable");
    assert_eq!(inspect("HF_HOME", home.path()).json()["model_type"], "llama");
}

#[test]
fn drafts_change_the_steps_and_not_the_answer() {
    let flags =
        ["run", "Tell me a story about a brave fox named Lily.", "--model", FABLE, "--json", "--max-tokens", "48"];
    let with = |more: &[&str]| tandem(&[&flags[..], more].concat()).json();
    for sampling in [&["--temperature", "0"][..], &["--temperature", "0.7", "--seed", "5"]] {
        let with = |more: &[&str]| with(&[sampling, more].concat());
        let plain = with(&["--draft-depth", "0"]);
        assert_eq!(plain["drafted_tokens"], 0);
        // Its own layer, and that of a checkpoint that could be another one.
        for drafts in [&["--draft-depth", "3"][..], &["--draft-depth", "3", "--mtp", FABLE], &["--draft-depth", "auto"]]
        {
            let drafted = with(drafts);
            assert_eq!(drafted["tokens"], plain["tokens"], "{sampling:?} {drafts:?}");
            let [tokens, accepted] = ["drafted_tokens", "accepted_drafted_tokens"].map(|name| drafted[name].as_u64());
            assert!(tokens >= accepted && (drafts.contains(&"auto") || accepted > Some(8)), "{drafted}");
        }
    }
}

#[test]
fn drafts_that_cannot_be() {
    for (flags, code, expected) in [
        (&["--draft-depth", "9"][..], 2, "expected auto, or a whole number from 0 (off) to 8"),
        (&["--draft-depth", "many"], 2, "expected auto"),
        (&["--draft-depth", "2", "--mtp", &golden("models/glm51_tiny")], 1, "expected 8 as in the model"),
        (&["--draft-depth", "0", "--mtp", FABLE], 1, "give --draft-depth auto"),
        (&["--draft-depth", "2", "--mtp", "/nonexistent/layer"], 1, "/nonexistent/layer"),
    ] {
        let done = tandem(&[&["run", "Hello", "--model", FABLE], flags].concat());
        assert!(done.code == Some(code) && done.stderr.contains(expected), "{flags:?}: {}", done.stderr);
    }
    let llama = golden("models/llama_tiny");
    let done = tandem(&["run", "Hello", "--model", &llama, "--draft-depth", "2", "--mtp", &llama]);
    assert!(done.code == Some(1) && done.stderr.contains("num_nextn_predict_layers"), "{}", done.stderr);
}
