//! The bundled model, black box: the reference's text, perplexities and task scores.

mod common;

use common::{file, golden, root, tandem, temporary};
use serde_json::{Value, json};

const MODEL: &str = "models/fable-30m-MXFP4-Q8";
/// The reference is in single precision.
const F32: &[&str] = &["--activations", "f32"];
/// The first five chats of each kind.
const SLICE_PERPLEXITY: f64 = 1.615_803;
const SLICE_TOKENS: u64 = 3516;

fn reference() -> Value {
    let text = std::fs::read_to_string(golden("fable-30m/golden.json")).expect("golden.json");
    let goldens: Value = serde_json::from_str(&text).expect("JSON");
    goldens["MXFP4-Q8 (dequantised, float32)"].clone()
}

#[test]
fn greedy_text_equals_the_reference() {
    let reference = reference();
    let prompts = reference["greedy"].as_array().expect("an array");
    assert_eq!(prompts.len(), 7);
    for golden in prompts {
        let prompt = golden["prompt"].as_str().expect("text");
        let found =
            tandem(&[&["run", prompt, "--raw", "--temperature", "0", "--json", "--model", MODEL], F32].concat()).json();
        let mut expected = golden["greedy_ids"].as_array().expect("ids").clone();
        expected.pop(); // the end of the turn, which is not part of the answer
        assert_eq!(found["tokens"], json!(expected), "{}: {}", golden["kind"], found["text"]);
        assert_eq!(found["finish_reason"], "stop", "{}", golden["kind"]);
        assert_eq!(found["prompt_tokens"], golden["prompt_ids"].as_array().expect("ids").len());
    }
}

/// Perplexity of a file with the reference numerics.
fn check_perplexity(text: &str, expected: f64, n_tokens: u64) {
    let found = tandem(&[&["eval", "perplexity", "--model", MODEL, "--text", text, "--json"], F32].concat()).json();
    let perplexity = found["perplexity"].as_f64().expect("a number");
    assert!((perplexity - expected).abs() < 5e-4, "{text}: perplexity {perplexity}, expected {expected}");
    assert_eq!(found["tokens_scored"], n_tokens, "{text}");
}

#[test]
fn fast_numerics_keep_perplexity_within_one_percent() {
    let text = golden("fable-30m/held-text.txt");
    for activations in ["bf16", "int8"] {
        let args = ["eval", "perplexity", "--model", MODEL, "--text", &text, "--json", "--activations", activations];
        let perplexity = tandem(&args).json()["perplexity"].as_f64().expect("a number");
        assert!((perplexity / 2.2013 - 1.0).abs() < 0.01, "{activations}: {perplexity}");
    }
}

#[test]
fn text_perplexity_equals_the_reference() {
    let reference = reference();
    let expected = reference["text_perplexity_512"].as_f64().expect("a number");
    assert!((expected - 2.2013).abs() < 5e-5);
    check_perplexity(&golden("fable-30m/held-text.txt"), expected, reference["text_tokens"].as_u64().expect("a count"));
}

/// The whole file (26,749 tokens, reference 1.5383) takes too long here; this slice's value is of the engine version
/// that reproduced the whole.
#[test]
fn chat_perplexity_of_a_slice() {
    let chats = std::fs::read_to_string(golden("fable-30m/held-chats.json")).expect("held-chats.json");
    let mut chats: Value = serde_json::from_str(&chats).expect("JSON");
    for chats in chats.as_object_mut().expect("kinds").values_mut() {
        chats.as_array_mut().expect("chats").truncate(5);
    }
    let dir = temporary();
    check_perplexity(&file(&dir, "chats.json", chats.to_string()), SLICE_PERPLEXITY, SLICE_TOKENS);
}

#[test]
fn tasks_score_as_the_reference() {
    let all = std::fs::read_to_string(golden("fable-30m/tasks.jsonl")).expect("tasks.jsonl");
    // The reference solves every task of these kinds.
    for (kind, n) in [("arithmetic", 4), ("json", 4), ("tool call", 3)] {
        let lines: Vec<&str> = all
            .lines()
            .filter(|line| serde_json::from_str::<Value>(line).is_ok_and(|task| task["kind"] == kind))
            .take(n)
            .collect();
        assert_eq!(lines.len(), n, "{kind}");
        let dir = temporary();
        let tasks = file(&dir, "tasks.jsonl", lines.join("\n"));
        let found = tandem(&[&["eval", "tasks", "--model", MODEL, "--tasks", &tasks, "--json"], F32].concat()).json();
        assert_eq!(found["kinds"][kind]["right"], n, "{found}");
        assert_eq!(found["kinds"][kind]["total"], n, "{found}");
    }
}

#[test]
fn the_likeliest_choice_is_the_answer() {
    let question = "[gMASK]<sop><|user|>\nTell me a story about a brave fox named Lily.<|assistant|></think>\nFar away, in the \
                    valley, lived a brave";
    let line = |choices: &[&str], answer: Value| {
        json!({"kind": "story", "question": question, "choices": choices, "answer": answer}).to_string()
    };
    let lines = [
        line(&[" owl named Lily.", " fox named Lily.", " fox named Hugo."], json!(1)),
        line(&[" fox named Lily.", " bear."], json!(" fox named Lily.")),
        // Wrong on purpose.
        line(&[" fox", " stone"], json!(1)),
        json!({"kind": "arithmetic", "prompt": "[gMASK]<sop><|user|>\n49 - 26 =<|assistant|><think>", "expect": "49 - 26 = 23."})
            .to_string(),
    ];
    let dir = temporary();
    let tasks = file(&dir, "tasks.jsonl", lines.join("\n"));
    let args = [&["eval", "tasks", "--model", MODEL, "--tasks", &tasks], F32].concat();
    let found = tandem(&[&args[..], &["--json"]].concat()).json();
    let story = &found["kinds"]["story"];
    assert_eq!(
        (&story["right"], &story["right_normalized"], &story["total"]),
        (&json!(2), &json!(2), &json!(3)),
        "{found}"
    );
    let error = story["standard_error"].as_f64().expect("a number");
    assert!((error - 1.0 / 3.0).abs() < 1e-9, "{found}");
    assert_eq!(found["kinds"]["arithmetic"], json!({"right": 1, "total": 1, "accuracy": 1.0, "standard_error": null}));
    let text = tandem(&args).ok();
    assert!(text.contains("story            2/3 = 66.7 ± 33.3 %, per byte 2/3 = 66.7 ± 33.3 %"), "{text}");
}

#[test]
fn the_bundled_model_is_the_default() {
    let found = tandem(&["inspect", "--json"]).json();
    assert!(found["path"].as_str().expect("a path").ends_with(MODEL), "{found}");
    assert_eq!(found["mtp_head"], true);
    assert!(root().join(MODEL).join("model.safetensors").exists());
}
