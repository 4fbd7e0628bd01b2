//! Whatever a user gives, the answer is one clear message: never a panic, never a backtrace.

mod common;

use common::{Copy, Done, file, golden, tandem, tandem_with_input, temporary, text};
use serde_json::json;

/// Checks that a command failed with exit code 1 and one message that says all of `expected`.
#[track_caller]
fn check_done(what: &str, done: &Done, expected: &[&str]) {
    let Done { code, stdout, stderr } = done;
    assert_eq!(*code, Some(1), "{what}: {stderr}");
    assert_eq!(stdout, "", "{what}: output before the error");
    assert!(stderr.starts_with("error: "), "{what}: {stderr}");
    assert_eq!(stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{what}: {stderr}");
    for part in expected {
        assert!(stderr.contains(part), "{what}: {stderr:?} does not say {part:?}");
    }
    for never in ["panicked", "has a bug", "backtrace", "RUST_BACKTRACE", "unwrap", "   0: "] {
        assert!(!stderr.contains(never), "{what}: {stderr}");
    }
}

#[track_caller]
fn check(args: &[&str], expected: &[&str]) {
    check_done(&format!("{args:?}"), &tandem(args), expected);
}

/// A model that none of the commands accepts.
#[track_caller]
fn check_model(model: &str, expected: &[&str]) {
    let dir = temporary();
    let tokens = file(&dir, "tokens.json", "[1, 2, 3]");
    let out = text(&dir.path().join("out.safetensors"));
    check(&["run", "hi", "--raw", "--model", model], expected);
    check(&["eval", "logits", "--model", model, "--tokens", &tokens, "--out", &out], expected);
    check(&["eval", "perplexity", "--model", model, "--text", &tokens], expected);
}

/// As [`check_model`], and `inspect` refuses it too: no weights need be read to know.
#[track_caller]
fn check_uninspectable(model: &str, expected: &[&str]) {
    check_model(model, expected);
    check(&["inspect", model], expected);
}

const TINY: &str = "glm51_tiny";

#[test]
fn bad_paths() {
    check_uninspectable("/no/such/model", &["/no/such/model does not exist", "--model takes a model directory"]);
    check_uninspectable("./nowhere", &["./nowhere does not exist"]);
    let empty = temporary();
    check_uninspectable(&text(empty.path()), &["has no config.json", "--model takes a model directory"]);
    check_uninspectable(
        "someone/unheard-of",
        &["someone/unheard-of", "neither a directory nor in the Hugging Face cache"],
    );
    let file = golden("models/glm51_tiny/config.json");
    check_uninspectable(&file, &["config.json is a file", "--model takes a model directory"]);
}

#[test]
fn truncated_weights() {
    let cut = |keep: fn(usize) -> usize| Copy::of(TINY).edit("model.safetensors", |b| b.truncate(keep(b.len())));
    for copy in [cut(|n| n - 1), cut(|n| n / 2), cut(|_| 100), cut(|_| 0)] {
        check_uninspectable(&copy.path(), &["model.safetensors is not a complete safetensors file", "copy it again"]);
    }
    let copy = Copy::of("dsv32_tiny").without("model-00002-of-00003.safetensors");
    check_model(&copy.path(), &["cannot read", "model-00002-of-00003.safetensors"]);
    check_uninspectable(&Copy::of(TINY).without("model.safetensors").path(), &["there is no *.safetensors file"]);
}

#[test]
fn bad_configurations() {
    let copy = |key: &str, value| Copy::of(TINY).config(key, value);
    let edited = |bytes: &str| Copy::of(TINY).edit("config.json", |b| *b = bytes.into());
    for (copy, expected) in [
        (copy("model_type", json!("gpt2")), &["model_type is \"gpt2\"", "supported are glm_moe_dsa", "Pick a"][..]),
        (copy("model_type", json!(null)), &["model_type is \"\""]),
        (copy("model_type", json!(3)), &["config.json is not a valid model configuration"]),
        (edited("{\"model_type\": "), &["config.json is not a valid model configuration", "EOF", "line 1"]),
        (edited("[]"), &["config.json is not a valid model configuration"]),
        (edited(""), &["config.json is not a valid model configuration"]),
        (copy("hidden_size", json!(-1)), &["config.json is not a valid model configuration"]),
        (copy("hidden_size", json!(null)), &["must have \"hidden_size\""]),
        (copy("qk_rope_head_dim", json!(31)), &["qk_rope_head_dim must be even", "found 31"]),
        (copy("num_experts_per_tok", json!(99)), &["num_experts_per_tok 99 exceeds the 8 experts"]),
        (copy("n_group", json!(3)), &["n_routed_experts 8 must divide into n_group 3"]),
        (copy("scoring_func", json!("softmax")), &["scoring_func must be \"sigmoid\", found \"softmax\""]),
        (copy("hidden_size", json!(1u64 << 40)), &["hidden_size must be between 1 and"]),
        (copy("rope_parameters", json!({"rope_type": "spiral"})), &["rope_type \"spiral\" is not supported"]),
        (copy("quantization", json!({"bits": 7, "group_size": 64})), &["7 bits", "supported are"]),
        (copy("vocab_size", json!(1 << 24)), &["does not match its config.json", "model.embed_tokens"]),
    ] {
        check_uninspectable(&copy.path(), expected);
    }
    let llama = |key: &str, value| Copy::of("llama_tiny").config(key, value);
    check_uninspectable(&llama("num_key_value_heads", json!(3)).path(), &["does not divide by num_key_value_heads 3"]);
    let copy = llama("head_dim", json!(null)).config("num_attention_heads", json!(7));
    check_uninspectable(&copy.path(), &["does not divide by num_attention_heads 7", "no head_dim"]);
}

/// Sizes that pass one by one but whose products do not fit a machine word.
#[test]
fn sizes_beyond_reason() {
    let huge = json!(1 << 24);
    let copy = Copy::of(TINY).config("hidden_size", huge.clone()).config("v_head_dim", huge.clone());
    let copy = copy.config("num_attention_heads", huge);
    check_uninspectable(&copy.path(), &["parameters, expected at most", "one of them is wrong"]);
}

#[test]
fn nan_scales() {
    let expected = "has a scale that is not a finite number (entry 0); the file is damaged";
    let nan = [0xc0, 0x7f]; // bf16, little-endian
    let copy = Copy::of(TINY).patch("lm_head.scales", &nan);
    check_model(&copy.path(), &["lm_head", expected, "download or convert it again"]);
    let copy = Copy::of(TINY).patch("model.layers.0.mlp.up_proj.biases", &nan);
    check_model(&copy.path(), &["model.layers.0.mlp.up_proj", expected]);
    let copy = Copy::of(TINY).patch("model.layers.3.mlp.switch_mlp.gate_proj.scales", &[255]); // e8m0's NaN
    check_model(&copy.path(), &["model.layers.3.mlp.switch_mlp.gate_proj", expected]);
}

#[test]
fn nan_weights_are_found_at_load() {
    let copy = Copy::of(TINY).patch("model.norm.weight", &[0xc0, 0x7f]);
    check(
        &["run", "hi", "--raw", "--json", "--model", &copy.path()],
        &["model.norm.weight[0] is NaN", "download or convert it again"],
    );
}

#[test]
fn bad_templates() {
    let dir = temporary();
    let model = golden("models/glm51_tiny");
    let template = |name: &str, source: &str, expected: &[&str]| {
        let path = file(&dir, name, source);
        check(&["run", "hi", "--model", &model, "--chat-template", &path], expected);
    };
    template(
        "raise",
        "{{ raise_exception('no such role') }}",
        &["refused the conversation: \"no such role\"", "line 1"],
    );
    template("syntax", "one\n{% for m in messages %}", &["syntax error", "--chat-template FILE"]);
    template("unknown", "{{ messages | frobnicate }}", &["chat template, line 1", "--chat-template FILE"]);
    template("empty", "", &["the prompt is empty"]);
    check(
        &["run", "hi", "--model", &model, "--chat-template", "/no/such"],
        &["cannot read the chat template /no/such"],
    );
    let copy = Copy::of(TINY).edit("chat_template.jinja", |b| *b = b"{{ raise_exception('never') }}".to_vec());
    check(&["run", "hi", "--model", &copy.path()], &["refused the conversation: \"never\""]);
}

#[test]
fn prompts_that_do_not_fit() {
    let model = golden("models/glm51_tiny");
    let long = "the quick brown fox ".repeat(20);
    let run = ["run", &long, "--raw", "--model", &model, "--context"];
    check(&[&run[..], &["16"]].concat(), &["the context holds 16", "shorten the prompt or raise --context"]);
    check(&[&run[..], &["0"]].concat(), &["--context must be at least 1"]);
    check(&[&run[..], &["1000000"]].concat(), &["--context 1000000 exceeds the 4096 positions"]);
}

#[test]
fn empty_prompts() {
    let model = golden("models/glm51_tiny");
    check(&["run", "", "--raw", "--model", &model], &["the prompt is empty", "at least one token"]);
    let done = tandem_with_input(&["run", "--raw", "--model", &model], b"");
    check_done("an empty pipe", &done, &["the prompt is empty"]);
    let done = tandem_with_input(&["run", "--raw", "--model", &model], &[0xff, 0xfe, 0x00]);
    check_done("a pipe of bytes", &done, &["standard input is not UTF-8 text"]);
}

#[test]
fn bad_token_files() {
    let dir = temporary();
    let model = golden("models/glm51_tiny");
    let out = text(&dir.path().join("out.safetensors"));
    let check_tokens = |tokens: &str, expected: &[&str]| {
        check(&["eval", "logits", "--model", &model, "--tokens", tokens, "--out", &out], expected);
        assert!(!dir.path().join("out.safetensors").exists(), "{tokens}: nothing may be written");
    };
    check_tokens("/no/such.json", &["cannot read /no/such.json"]);
    check_tokens(&file(&dir, "cut.json", "[1, 2"), &["must be a JSON array of token ids such as [1, 2, 3]"]);
    check_tokens(&file(&dir, "negative.json", "[1, -2]"), &["must be a JSON array of token ids"]);
    check_tokens(&file(&dir, "object.json", "{\"tokens\": [1]}"), &["must be a JSON array of token ids"]);
    check_tokens(&file(&dir, "outside.json", "[1, 320]"), &["token id 320 is outside the vocabulary of 320"]);
    check_tokens(&file(&dir, "none.json", "[]"), &["the prompt is empty"]);
    let tokens = file(&dir, "fine.json", "[1, 2]");
    let nowhere = ["--out", "/no/such/folder/out.safetensors"];
    check(
        &[&["eval", "logits", "--model", &model, "--tokens", &tokens], &nowhere[..]].concat(),
        &["cannot write /no/such"],
    );
}

#[test]
fn bad_evaluation_files() {
    let dir = temporary();
    let model = golden("models/glm51_tiny");
    let perplexity = |text: &str, expected: &[&str]| {
        check(&["eval", "perplexity", "--model", &model, "--text", text], expected);
    };
    perplexity("/no/such.txt", &["cannot read /no/such.txt"]);
    perplexity(&file(&dir, "empty.txt", ""), &["perplexity needs at least 2"]);
    perplexity(
        &file(&dir, "numbers.json", "[1, 2]"),
        &["has no strings in it", "expected an array or object of texts"],
    );
    perplexity(&file(&dir, "cut.json", "[\"a"), &["cut.json is not JSON"]);
    perplexity(&file(&dir, "short.json", "[\"\"]"), &["short.json has no text of at least 2 tokens"]);
    let tasks = file(&dir, "tasks.jsonl", "{\"kind\": \"a\", \"prompt\": \"b\", \"expect\": \"c\"}\n{}\n");
    check(
        &["eval", "tasks", "--model", &model, "--tasks", &tasks],
        &["line 2 is neither {kind, prompt, expect}", "missing field `kind`"],
    );
}

#[test]
fn bad_tokenizers_and_settings() {
    let run = |copy: Copy, expected: &[&str]| check(&["run", "hi", "--raw", "--model", &copy.path()], expected);
    run(Copy::of(TINY).without("tokenizer.json"), &["tokenizer.json", "a model directory needs tokenizer.json"]);
    run(Copy::of(TINY).edit("tokenizer.json", |b| b.truncate(50)), &["tokenizer.json is not a valid tokenizer file"]);
    let duplicate = |b: &mut Vec<u8>| {
        let text =
            String::from_utf8(b.clone()).unwrap().replacen("\"vocab\":", "\"vocab\": {\"a\": 99999999999}, \"x\":", 1);
        *b = text.into_bytes();
    };
    run(
        Copy::of(TINY).edit("tokenizer.json", duplicate),
        &["tokenizer.json is not a valid", "expected one below 16777216"],
    );
    run(Copy::of(TINY).edit("tokenizer_config.json", |b| b.truncate(50)), &["tokenizer_config.json"]);
    run(
        Copy::of(TINY).edit("generation_config.json", |b| b.truncate(9)),
        &["generation_config.json is malformed", "fix"],
    );
    let model = golden("models/glm51_tiny");
    let flags = |flags: &[&str], expected: &[&str]| {
        check(&[&["run", "hi", "--raw", "--model", &model], flags].concat(), expected);
    };
    flags(&["--top-p", "7"], &["top_p is 7, expected"]);
    flags(&["--temperature=-1"], &["temperature is -1, expected"]);
    flags(&["--temperature", "nan"], &["temperature is NaN, expected"]);
    let dir = temporary();
    flags(&["--tools", &file(&dir, "tools.json", "{}")], &["must be a JSON array of tools"]);
}
