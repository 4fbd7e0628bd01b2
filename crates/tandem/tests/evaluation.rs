//! Evaluation and servers never hide a number that is not one, nor a token that the model does not have.

mod common;

use common::finish;
use common::tiny::{Tiny, TinyDir};
use serde_json::{Value, json};

const TEXT: &str = "hello there, xabcd";

/// Every command that looks at logits, on a folder that holds model `a` and the model to judge, `b`.
fn commands() -> Vec<Vec<&'static str>> {
    let commands = [
        "eval compare a b --text text.txt",
        "eval compare b a --text text.txt",
        "eval compare a b --text text.txt --json",
        "eval compare a b --text text.json",
        "eval perplexity --model b --text text.txt",
        "eval perplexity --model b --text text.txt --json",
        "eval perplexity --model b --text text.json",
        "eval perplexity --model b --text text.txt --context 3",
        "eval tasks --model b --tasks choose.jsonl",
        "eval tasks --model b --tasks choose.jsonl --json",
        "eval tasks --model b --tasks generate.jsonl",
        "eval logits --model b --tokens tokens.json --out scratch.safetensors",
    ];
    commands.iter().map(|line| line.split(' ').collect()).collect()
}

/// Runs every command; each must fail with one message that holds one of `expected`, and print nothing.
fn check(what: &str, a: &Tiny, b: &Tiny, text: &str, expected: &[&str]) {
    let dir = common::temporary();
    for (name, model) in [("a", a), ("b", b)] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        model.write_to(&dir.path().join(name));
    }
    let choose = json!({"question": text, "choices": ["a", text], "answer": 0}).to_string();
    let generate = json!({"kind": "k", "prompt": text, "expect": "b"}).to_string();
    let tokens: Value = text
        .strip_suffix("<|end|>")
        .map_or(json!(text.as_bytes()), |text| text.bytes().map(u32::from).chain([256]).collect());
    for (name, content) in [
        ("text.txt", text.to_owned()),
        ("text.json", json!([text]).to_string()),
        ("choose.jsonl", choose),
        ("generate.jsonl", generate),
        ("tokens.json", tokens.to_string()),
    ] {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    for command in commands() {
        let done = finish(common::command(&command).current_dir(dir.path()));
        assert_eq!((done.code, &*done.stdout), (Some(1), ""), "{what}: {command:?}: {}", done.stderr);
        let is_expected = expected.iter().any(|text| done.stderr.contains(text));
        assert!(is_expected && done.stderr.lines().count() == 1, "{what}: {command:?}: {}", done.stderr);
    }
}

fn good() -> Tiny {
    Tiny::new(264).special(&["<|end|>"]).noise()
}

#[test]
fn not_a_number_is_never_agreement() {
    let bad = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for value in bad {
        // A row of the head that no token of the text is, a row that is, and every kind of weight before it.
        for (tensor, index) in [("lm_head.weight", 263 * 16), ("lm_head.weight", b'e' as usize * 16 + 3)] {
            let what = format!("{tensor}[{index}] = {value}");
            check(
                &what,
                &good(),
                &good().set(tensor, index, value),
                TEXT,
                &["not a finite number", "the forward pass"],
            );
        }
    }
    // Finite weights whose products are not.
    let huge = good().set("lm_head.weight", 16, 3e38).set("lm_head.weight", 17, 3e38).set("lm_head.weight", 18, 3e38);
    let huge = (0..16).fold(huge, |model, i| model.set("model.norm.weight", i, 1e30));
    check("overflow", &good(), &huge, TEXT, &["the forward pass"]);
}

#[test]
fn tokens_outside_the_vocabulary_are_refused_wherever_they_are() {
    let small = Tiny::new(256).special(&["<|end|>"]).noise();
    for text in ["hello<|end|>", "<|end|>hello<|end|>"] {
        check(text, &small, &small, text, &["token id 256 is outside the vocabulary of 256"]);
    }
}

#[test]
fn run_says_that_logits_are_no_numbers() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let model: TinyDir = good().set("lm_head.weight", 16, value).write();
        let done = model.generate("xa", &[]);
        assert_eq!((done.code, &*done.stdout), (Some(1), ""), "{}", done.stderr);
        assert!(done.stderr.contains("the forward pass") || done.stderr.contains("not a finite"), "{}", done.stderr);
    }
}

/// Bytes of numbers that are none, by safetensors' type.
fn not_numbers(dtype: &str) -> &'static [&'static [u8]] {
    match dtype {
        "F32" => &[&[0, 0, 0xc0, 0x7f], &[0, 0, 0x80, 0xff]],
        "BF16" => &[&[0xc0, 0x7f], &[0x80, 0x7f]],
        "F16" => &[&[0, 0x7e], &[0, 0xfc]],
        "F8_E4M3" => &[&[0x7f], &[0xff]],
        _ => &[],
    }
}

/// One element of every tensor of every fixture in turn, whatever the format, the module or its use: norms, routers,
/// biases, embeddings, experts that nobody chooses, layers that are not run.
#[test]
fn one_element_that_is_no_number_fails_every_evaluation() {
    let dir = common::temporary();
    let tokens = common::file(&dir, "tokens.json", "[1, 2, 3, 4, 5, 6, 7, 8, 9]");
    for name in ["llama_tiny", "glm51_tiny", "glm51_tiny_bf16", "dsv3_fp8_tiny", "glm51_hf_tiny_mtp"] {
        let weights = std::fs::read(common::golden(&format!("models/{name}/model.safetensors"))).unwrap();
        let length = u64::from_le_bytes(*weights.first_chunk().unwrap()) as usize;
        let header: serde_json::Map<String, Value> = serde_json::from_slice(&weights[8..8 + length]).unwrap();
        // Layers look alike: of each kind of tensor and type one.
        let mut seen = std::collections::BTreeSet::new();
        let mut n = 0;
        for (tensor, info) in header.iter().filter(|(tensor, _)| *tensor != "__metadata__") {
            let dtype = info["dtype"].as_str().unwrap();
            let kind: String = tensor.chars().filter(|c| !c.is_ascii_digit()).collect();
            let [start, end] = [0, 1].map(|i| info["data_offsets"][i].as_u64().unwrap() as usize);
            if !seen.insert((kind, dtype)) || end == start {
                continue;
            }
            for (i, code) in not_numbers(dtype).iter().enumerate() {
                // The last element: of the last row, expert or position.
                let copy = common::Copy::of(name).edit("model.safetensors", |bytes| {
                    let at = 8 + length + if i == 0 { end - code.len() } else { start };
                    bytes[at..at + code.len()].copy_from_slice(code);
                });
                let out = common::text(&dir.path().join("out.safetensors"));
                let done =
                    common::tandem(&["eval", "logits", "--model", &copy.path(), "--tokens", &tokens, "--out", &out]);
                assert_eq!((done.code, &*done.stdout), (Some(1), ""), "{name} {tensor} {code:?}");
                assert!(done.stderr.contains("not a finite number"), "{name} {tensor}: {}", done.stderr);
                n += 1;
            }
        }
        assert!(n > 5, "{name} has {n} tensors of floats");
    }
}

/// A server says that the model is broken, in every interface, and never text.
#[test]
fn a_server_answers_not_a_number_with_an_error() {
    // Finite weights whose products are not, so that loading notices nothing.
    let model =
        (0..16).fold(good(), |model, i| model.set("model.norm.weight", i, 1e30).set("lm_head.weight", 16 + i, 3e38));
    let model = model.template("{% for m in messages %}{{ m.content }}{% endfor %}").write();
    let mut command = common::command(&["serve", "--model", &model.arg(), "--port", "0", "--served-model-name", "m"]);
    let mut server = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(server.stderr.take().unwrap()));
    let url = loop {
        let line = lines.next().expect("the server has ended").unwrap();
        if let Some((_, rest)) = line.split_once("http://") {
            break format!("http://{}", rest.split(' ').next().unwrap());
        }
    };
    std::thread::spawn(move || lines.for_each(drop));
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let messages = json!([{"role": "user", "content": "xa"}]);
    for (path, body) in [
        ("/v1/completions", json!({"prompt": "xa", "max_tokens": 4})),
        ("/v1/completions", json!({"prompt": "xa", "max_tokens": 4, "logprobs": 2, "temperature": 0})),
        ("/v1/chat/completions", json!({"messages": messages, "max_tokens": 4})),
        ("/v1/chat/completions", json!({"messages": messages, "max_tokens": 4, "logprobs": true, "top_logprobs": 2})),
        ("/v1/responses", json!({"input": "xa", "max_output_tokens": 4})),
        ("/v1/messages", json!({"model": "m", "messages": messages, "max_tokens": 4})),
    ] {
        for stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = json!(stream);
            let url = format!("{url}{path}");
            let mut response =
                agent.post(&url).header("content-type", "application/json").send(body.to_string()).unwrap();
            let (status, text) = (response.status().as_u16(), response.body_mut().read_to_string().unwrap());
            assert!(stream || status >= 500, "{path}: {status} {text}");
            assert!(text.contains("error") && text.contains("the logit of token"), "{path} {body}: {text}");
            assert!(!text.contains("\"delta\":{\"content\":\"") && !text.contains("null,null"), "{path}: {text}");
        }
    }
    server.kill().unwrap();
    server.wait().unwrap();
}
