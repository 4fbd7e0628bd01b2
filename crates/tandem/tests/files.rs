//! Files as people really have them: one test for each kind of fault, with its siblings in a table.

mod common;

use common::tiny::{Tensor, Tiny, TinyDir};
use common::{finish, temporary, text};
use serde_json::{Value, json};

/// What `eval logits --activations f32` gives for tokens 97 to 104.
fn logits(model: &TinyDir) -> Vec<f32> {
    std::fs::write(model.path().join("tokens.json"), "[97, 98, 99, 100, 101, 102, 103, 104]").unwrap();
    model.run(&["eval", "logits"], &["--tokens", "tokens.json", "--out", "out.st", "--activations", "f32"]).ok();
    let bytes = std::fs::read(model.path().join("out.st")).unwrap();
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    bytes[8 + header..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Says "bcd" after "a", then <|im_end|> (256), then nothing that stops.
fn speaker() -> Tiny {
    let tokens = [97u32, 98, 99, 100, 256, 101, 102, 103, 104, 105, 106, 107, 108];
    Tiny::new(264).special(&["<|custom_end|>", "<|other|>"]).says(&tokens)
}

#[test]
fn ends_of_turn_come_from_every_source() {
    let check = |what: &str, model: Tiny| {
        let found = model.write().generate("xa", &[]).json();
        assert_eq!((found["text"].as_str(), found["finish_reason"].as_str()), (Some("bcd"), Some("stop")), "{what}");
    };
    let generation = |value: Value| Tiny { generation_config: Some(json!({"eos_token_id": value})), ..speaker() };
    check("config.json", speaker().config("eos_token_id", json!(256)));
    check("config.json, a list", speaker().config("eos_token_id", json!([5, 256])));
    check("generation_config.json", generation(json!(256)));
    check("both, of which one knows it", generation(json!([5])).config("eos_token_id", json!(256)));
    check("none in one of them", generation(json!(-1)).config("eos_token_id", json!([256])));
    check("the tokenizer's", speaker().tokenizer_config("eos_token", json!("<|custom_end|>")));
    check("the tokenizer's, an object", speaker().tokenizer_config("eos_token", json!({"content": "<|custom_end|>"})));
    check(
        "the tokenizer's beside another",
        generation(json!(5)).tokenizer_config("eos_token", json!("<|custom_end|>")),
    );
    let map = json!({"eos_token": "<|custom_end|>"}).to_string();
    check("special_tokens_map.json", speaker().file("special_tokens_map.json", map));
    let turn = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|custom_end|>\n{% endfor %}";
    check("the template", speaker().template(turn));
    check("the template's file", speaker().file("chat_template.jinja", turn));
    for name in ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"] {
        let mut model = speaker();
        model.tokenizer["added_tokens"][0]["content"] = json!(name);
        check(name, model);
    }
    // What is said to go on goes on.
    let found = speaker().config("eos_token_id", json!(256)).write().generate("xa", &["--ignore-eos"]).json();
    assert_eq!(found["finish_reason"], "length");
    // A token that only opens a turn is no end.
    let open = "{% for m in messages %}<|custom_end|>{{ m.role }}: {{ m.content }}{% endfor %}";
    assert_eq!(speaker().template(open).write().generate("xa", &[]).json()["finish_reason"], "length");
    // An id that the model does not have.
    let done = speaker().config("eos_token_id", json!(999)).write().generate("xa", &[]);
    assert!(
        done.code == Some(1) && done.stderr.contains("token id 999 is outside the vocabulary of 264"),
        "{}",
        done.stderr
    );
}

#[test]
fn a_special_token_stops_as_a_stop_string() {
    for stop in ["<|custom_end|>", " <|custom_end|>\n"] {
        let found = speaker().write().generate("xa", &["--stop", stop]).json();
        assert_eq!((found["text"].as_str(), found["finish_reason"].as_str()), (Some("bcd"), Some("stop")), "{stop:?}");
    }
    let found = speaker().write().generate("xa", &["--stop", "<|other|>", "--stop", "cd"]).json();
    assert_eq!(found["text"], "b");
}

#[test]
fn special_tokens_are_tokens_whoever_names_them() {
    let plain = || Tiny::new(264);
    let check = |what: &str, model: Tiny| {
        let found = model.write().generate("<|im_start|>hi<|im_end|>", &[]).json();
        assert_eq!(found["prompt_tokens"], 4, "{what}");
    };
    let decoder =
        json!({"256": {"content": "<|im_start|>", "special": true}, "257": {"content": "<|im_end|>", "special": true}});
    check("added_tokens_decoder", plain().tokenizer_config("added_tokens_decoder", decoder));
    let (start, end) = (json!("<|im_start|>"), json!("<|im_end|>"));
    let both = plain().tokenizer_config("bos_token", start.clone()).tokenizer_config("eos_token", end.clone());
    check("bos_token and eos_token", both);
    let objects = plain()
        .tokenizer_config("pad_token", json!({"content": "<|im_start|>"}))
        .tokenizer_config("unk_token", json!({"content": "<|im_end|>"}));
    check("pad_token and unk_token", objects);
    check("additional_special_tokens", plain().tokenizer_config("additional_special_tokens", json!([start, end])));
    check("extra_special_tokens", plain().tokenizer_config("extra_special_tokens", json!({"a": start, "b": end})));
    let map = json!({"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]});
    check("special_tokens_map.json", plain().file("special_tokens_map.json", map.to_string()));
    let legacy = json!({"<|im_end|>": 257, "<|im_start|>": 256}).to_string();
    check("added_tokens.json", plain().file("added_tokens.json", legacy));
    // In the vocabulary, but not as an added token.
    let mut known = plain().tokenizer_config("eos_token", end.clone()).tokenizer_config("bos_token", start.clone());
    known.tokenizer["model"]["vocab"]["<|im_start|>"] = json!(256);
    known.tokenizer["model"]["vocab"]["<|im_end|>"] = json!(257);
    check("the vocabulary", known);
    // Templates see them all.
    let template = "{{ bos_token }}{{ sep_token }}{{ additional_special_tokens[0] }}{{ image_token }}";
    let model = plain()
        .template(template)
        .tokenizer_config("bos_token", start.clone())
        .tokenizer_config("sep_token", json!("<sep>"))
        .tokenizer_config("additional_special_tokens", json!(["<extra>"]))
        .tokenizer_config("extra_special_tokens", json!({"image_token": "<image>"}));
    let found = model.write().run(&["run"], &["--max-tokens", "1", "--json", "hi"]).json();
    assert_eq!(found["prompt_tokens"], 4);
    // Ids that contradict the vocabulary.
    let wrong =
        plain().tokenizer_config("added_tokens_decoder", json!({"300": {"content": "<|im_start|>", "special": true}}));
    assert!(wrong.write().generate("a", &[]).stderr.contains("should have id 300"));
}

/// Prompt tokens count bytes here, so the number says what a template gave.
fn rendered_bytes(model: Tiny, args: &[&str]) -> Value {
    model.write().run(&["run"], &[&["--max-tokens", "1", "--json"], args, &["hi"]].concat()).json()["prompt_tokens"]
        .take()
}

#[test]
fn templates_are_found_and_read_as_transformers_does() {
    let crlf = "{% for m in messages %}<|{{ m.role }}|>\r\n{{ m.content }}\r\n{% endfor %}<|assistant|>\r\n";
    for (what, model) in [
        ("chat_template.jinja", Tiny::new(264).file("chat_template.jinja", crlf)),
        ("tokenizer_config.json", Tiny::new(264).template(crlf)),
        ("chat_template.json", Tiny::new(264).file("chat_template.json", json!({"chat_template": crlf}).to_string())),
        ("carriage returns alone", Tiny::new(264).template(&crlf.replace("\r\n", "\r"))),
    ] {
        assert_eq!(rendered_bytes(model, &[]), "<|user|>\nhi\n<|assistant|>".len(), "{what}");
    }
    // The variant for tools, wherever it is.
    let dir = temporary();
    let tools = common::file(&dir, "tools.json", json!([{"type": "function", "function": {"name": "f"}}]).to_string());
    let list = json!([{"name": "default", "template": "12345"}, {"name": "tool_use", "template": "123"}]);
    let model = Tiny::new(264).tokenizer_config("chat_template", list);
    assert_eq!(rendered_bytes(model.clone(), &[]), 5);
    assert_eq!(rendered_bytes(model, &["--tools", &tools]), 3);
    let model = Tiny::new(264).file("chat_template.jinja", "12345").write();
    std::fs::create_dir(model.path().join("additional_chat_templates")).unwrap();
    std::fs::write(model.path().join("additional_chat_templates/tool_use.jinja"), "123").unwrap();
    let found = model.run(&["run"], &["--max-tokens", "1", "--json", "--tools", &tools, "hi"]).json();
    assert_eq!(found["prompt_tokens"], 3);
}

#[test]
fn templates_end_whatever_they_say() {
    let double = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = OP %}{% endfor %}";
    let mut templates: Vec<String> = [
        "ns.x ~ ns.x",
        "ns.x + ns.x",
        "ns.x * 2",
        "ns.x|replace('a', 'aa')",
        "[ns.x, ns.x]|join",
        "ns.x.replace('a', 'aa')",
        "''.join([ns.x, ns.x])",
        "'%s%s' % (ns.x, ns.x)",
        "'{}{}'.format(ns.x, ns.x)",
        "[ns.x, ns.x]",
        "{'a': ns.x, 'b': ns.x}",
        "(ns.x|string) ~ ns.x",
        "[ns.x, ns.x]|tojson",
    ]
    .iter()
    .map(|op| double.replace("OP", op) + "{{ ns.x }}")
    .collect();
    templates.extend(
        [
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "{% for i in range(100000) %}{% for j in range(100000) %}0123456789{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ [1]|batch(10**12, 1) }}",
            "{{ 'a' * 10**10 }}",
            "{{ ('a' * 90000000) ~ ('a' * 90000000) ~ ('a' * 90000000) }}",
            "{{ '%999999999d' % 1 }}",
            "{{ '{:>999999999}'.format(1) }}",
            "{{ 'a'.ljust(10**12) }}",
            "{{ 'a'|center(10**12) }}",
            "{{ [0] * 10**12 }}",
            "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% for j in range(100) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
            "{%}",
            "{% set x = 'ab' %}{%}",
        ]
        .map(str::to_owned),
    );
    for template in templates {
        let start = std::time::Instant::now();
        let done = Tiny::new(264).template(&template).write().run(&["run"], &["--max-tokens", "1", "hi"]);
        assert_eq!(done.code, Some(1), "{template}: {} {}", done.stdout.len(), done.stderr);
        assert!(
            done.stderr.lines().count() == 1 && done.stderr.contains("chat template"),
            "{template}: {}",
            done.stderr
        );
        assert!(start.elapsed().as_secs() < 10, "{template}: {:?}", start.elapsed());
    }
}

#[test]
fn configurations_are_read_as_their_authors_meant_them() {
    let check = |what: &str, model: Tiny, expected: &[f32]| {
        let found = logits(&model.write());
        let error = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(found.len() == expected.len() && error < 1e-5, "{what}: {error}");
    };
    let plain = || Tiny::new(264).noise();
    let expected = logits(&plain().write());
    // Python's literals, in files and fields that do not matter.
    for (file, text) in [
        (
            "config.json",
            plain().config.to_string().replacen('{', "{\"time_limits\": [0.0, Infinity, -Infinity, NaN],", 1),
        ),
        ("generation_config.json", "{\"x\": NaN, \"y\": [-Infinity]}".into()),
        ("tokenizer_config.json", "{\"model_max_length\": Infinity}".into()),
    ] {
        check(file, plain().file(file, text), &expected);
    }
    let broken = plain().config("rms_norm_eps", json!("X")).config.to_string().replace("\"X\"", "NaN");
    let done = plain().file("config.json", broken).write().generate("a", &[]);
    assert!(done.code == Some(1) && done.stderr.contains("NaN"), "{}", done.stderr);
    // rope_scaling beside rope_parameters.
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    let scaled = logits(&plain().config("rope_scaling", linear.clone()).write());
    assert!(scaled != expected);
    let parameters = json!({"rope_type": "default", "rope_theta": 10000.0});
    let both = |scaling: Value| plain().config("rope_parameters", parameters.clone()).config("rope_scaling", scaling);
    check("rope_scaling wins", both(linear), &scaled);
    check("its older form", both(json!({"type": "linear", "factor": 4.0})), &scaled);
    check("an empty one says nothing", both(json!({})), &expected);
    check("nor does none", both(Value::Null), &expected);
    // A whole file beside the index of others.
    let index = json!({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}).to_string();
    check("a stale index", plain().file("model.safetensors.index.json", index), &expected);
    // A configuration that wraps the model's.
    let mut wrapped = plain();
    wrapped.config = json!({"model_type": "some_vision_model", "text_config": wrapped.config, "vision_config": {}});
    check("text_config", wrapped.clone(), &expected);
    for (prefix, kept) in [("language_model.", ""), ("model.language_model.", "model.")] {
        let mut inner = wrapped.clone();
        let tensors = std::mem::take(&mut inner.tensors);
        inner.tensors = tensors
            .into_iter()
            .map(|(n, t)| (n.strip_prefix(kept).map_or(n.clone(), |n| format!("{prefix}{n}")), t))
            .collect();
        inner.tensors.insert("vision_tower.patch.weight".into(), Tensor::f32(&[2], &[1.0, 2.0]));
        check(prefix, inner, &expected);
    }
}

#[test]
fn a_tied_model_with_a_head_of_its_own_uses_it() {
    let own = Tiny::new(264).noise();
    let expected = logits(&own.clone().write());
    let tied = own.clone().config("tie_word_embeddings", json!(true)).write();
    assert_eq!(logits(&tied), expected);
    let done = tied.generate("a", &[]);
    assert!(done.stderr.contains("has an lm_head that differs"), "{}", done.stderr);
    for command in
        [&["convert", ".", "--out", "o", "--quant", "f32"][..], &["convert", ".", "--out", "o", "--quant", "bf16"]]
    {
        let dir = own.clone().config("tie_word_embeddings", json!(true)).write();
        finish(common::command(command).current_dir(dir.path())).ok();
        let config: Value = serde_json::from_slice(&std::fs::read(dir.path().join("o/config.json")).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], false);
    }
    // The same bytes are one head.
    let mut same = own.clone().config("tie_word_embeddings", json!(true));
    same.tensors.insert("lm_head.weight".into(), same.tensors["model.embed_tokens.weight"].clone());
    let done = same.write().generate("a", &[]);
    assert!(!done.stderr.contains("differs"), "{}", done.stderr);
}

#[test]
fn block_scales_of_every_published_type_mean_the_same() {
    let model = |dtype: &'static str, scale: &[u8]| {
        let mut model = Tiny::new(264)
            .noise()
            .config("quantization_config", json!({"quant_method": "fp8", "weight_block_size": [128, 128]}));
        let codes: Vec<u8> = (0..=255u8).map(|byte| byte & 0xbf).collect();
        for name in ["mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"] {
            let module = format!("model.layers.0.{name}");
            let weight = Tensor { dtype: "F8_E4M3", shape: vec![16, 16], bytes: codes.clone() };
            model.tensors.insert(format!("{module}.weight"), weight);
            let scale = Tensor { dtype, shape: vec![1, 1], bytes: scale.to_vec() };
            model.tensors.insert(format!("{module}.weight_scale_inv"), scale);
        }
        model.write()
    };
    let expected = logits(&model("F32", &0.25f32.to_le_bytes()));
    for (dtype, scale) in [
        ("BF16", &half::bf16::from_f32(0.25).to_le_bytes()[..]),
        ("F16", &half::f16::from_f32(0.25).to_le_bytes()),
        ("F8_E8M0", &[125]),
        ("U8", &[125]),
    ] {
        assert_eq!(logits(&model(dtype, scale)), expected, "{dtype}");
    }
    for (dtype, scale) in [("F8_E8M0", &[255][..]), ("BF16", &[0xc0, 0x7f]), ("F32", &[0, 0, 0x80, 0x7f])] {
        let done = model(dtype, scale).generate("a", &[]);
        assert!(
            done.code == Some(1) && done.stderr.contains("scale that is not a finite number"),
            "{dtype} {}",
            done.stderr
        );
    }
    let done = model("I32", &[1, 0, 0, 0]).generate("a", &[]);
    assert!(done.stderr.contains("weight_scale_inv has type I32"), "{}", done.stderr);
}

#[test]
fn what_does_not_fit_a_format_is_refused() {
    let check = |what: &str, model: Tiny, quant: &str, expected: &str| {
        let dir = model.write();
        let done = finish(common::command(&["convert", ".", "--out", "o", "--quant", quant]).current_dir(dir.path()));
        assert_eq!(done.code, Some(1), "{what}: {}", done.stderr);
        assert!(done.stderr.contains(expected) && !dir.path().join("o").exists(), "{what}: {}", done.stderr);
    };
    let huge = |value: f32| Tiny::new(264).noise().set("model.layers.0.mlp.up_proj.weight", 5, value);
    for value in [1e5, -7e4, f32::MAX] {
        check("f16", huge(value), "f16", "beyond the range of f16");
    }
    check("bf16", huge(f32::MAX), "bf16", "beyond the range of bf16");
    for bad in [f32::NAN, f32::INFINITY] {
        for quant in ["keep", "bf16", "f16", "f32"] {
            check("not a number", huge(bad), quant, "not a finite number");
            check("a norm", Tiny::new(264).noise().set("model.norm.weight", 3, bad), quant, "not a finite number");
        }
    }
}

#[test]
fn links_do_not_lead_out_of_a_model() {
    let outside = temporary();
    let secret = common::file(&outside, "secret.json", "{\"key\": \"private\"}");
    for name in ["notes.txt", "LICENSE", "extra.json"] {
        let model = Tiny::new(264).write();
        std::os::unix::fs::symlink(&secret, model.path().join(name)).unwrap();
        let done =
            finish(common::command(&["convert", ".", "--out", "o", "--quant", "keep"]).current_dir(model.path()));
        assert!(done.code == Some(1) && done.stderr.contains("outside of the model"), "{name}: {}", done.stderr);
    }
    // Within the model, and into the blobs of a snapshot's own repository.
    let cache = temporary();
    let snapshot = cache.path().join("models--o--n/snapshots/abc");
    let blobs = cache.path().join("models--o--n/blobs");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(&blobs).unwrap();
    Tiny::new(264).write_to(&snapshot);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::rename(snapshot.join(name), blobs.join(name)).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join(name)).unwrap();
    }
    let out = text(&cache.path().join("out"));
    common::tandem(&["convert", &text(&snapshot), "--out", &out, "--quant", "keep"]).ok();
    assert!(cache.path().join("out/tokenizer.json").symlink_metadata().unwrap().is_file());
}

#[test]
fn nothing_of_a_file_steers_the_terminal() {
    let evil = "\x1b]0;owned\x07\x1b[2J\u{9b}31m\r";
    let tensor = Tensor::f32(&[1], &[0.0]);
    let mut model = Tiny::new(264);
    model.tensors.insert(format!("evil{evil}"), tensor);
    let raise = format!("{{{{ raise_exception({}) }}}}", json!(evil));
    for (what, done) in [
        ("a tensor's name", model.write().generate("a", &[])),
        ("a model type", Tiny::new(264).config("model_type", json!(evil)).write().generate("a", &[])),
        ("a template", Tiny::new(264).template(&raise).write().run(&["run"], &["hi"])),
        ("an activation", Tiny::new(264).config("hidden_act", json!(evil)).write().generate("a", &[])),
    ] {
        let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
        assert!(done.code == Some(1) && !done.stderr.contains(steers), "{what}: {:?}", done.stderr);
        assert!(done.stderr.contains("u{1b}"), "{what}: {:?}", done.stderr);
    }
}

/// Hugging Face's cache, by each of the variables that name it.
#[test]
fn the_cache_is_found_by_every_variable() {
    let dir = temporary();
    let hub = |root: &str| {
        let repo = dir.path().join(root).join("models--o--n");
        std::fs::create_dir_all(repo.join("snapshots/abc")).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        Tiny::new(264).write_to(&repo.join("snapshots/abc"));
    };
    ["a/hub", "b", "c", "d/huggingface/hub", "e/.cache/huggingface/hub"].iter().for_each(|root| hub(root));
    let home = text(dir.path());
    let at = |name: &str| text(&dir.path().join(name));
    let cases: &[&[(&str, String)]] = &[
        &[("HF_HOME", at("a"))],
        &[("HF_HOME", "~/a".into())],
        &[("HF_HOME", "$HOME/a".into())],
        &[("HF_HOME", "${HOME}/a".into())],
        &[("HF_HUB_CACHE", at("b")), ("HF_HOME", at("nowhere"))],
        &[("HF_HUB_CACHE", "~/b".into())],
        &[("HUGGINGFACE_HUB_CACHE", at("c"))],
        &[("HUGGINGFACE_HUB_CACHE", at("nowhere")), ("HF_HUB_CACHE", at("b"))],
        &[("XDG_CACHE_HOME", at("d"))],
        &[("XDG_CACHE_HOME", at("nowhere")), ("HF_HOME", at("a"))],
        &[("HOME", at("e"))],
        &[("HF_HOME", String::new()), ("XDG_CACHE_HOME", at("d"))],
    ];
    for case in cases {
        let mut command = common::command(&["inspect", "o/n", "--json"]);
        command.env("HOME", &home).env_remove("XDG_CACHE_HOME").env_remove("HUGGINGFACE_HUB_CACHE");
        case.iter().for_each(|(name, value)| _ = command.env(name, value));
        let done = finish(&mut command);
        assert_eq!(done.code, Some(0), "{case:?}: {}", done.stderr);
    }
    // Revisions: by name, by commit, and none where several could be meant.
    let repo = dir.path().join("b/models--o--n");
    std::fs::create_dir_all(repo.join("snapshots/def")).unwrap();
    std::fs::create_dir_all(repo.join("refs/refs/pr")).unwrap();
    std::fs::write(repo.join("refs/refs/pr/1"), "def\n").unwrap();
    std::fs::write(repo.join("refs/v1"), "def").unwrap();
    Tiny::new(300).write_to(&repo.join("snapshots/def"));
    let vocabulary = |name: &str| {
        let done = finish(common::command(&["inspect", name, "--json"]).env("HF_HUB_CACHE", at("b")));
        (done.code == Some(0)).then(|| serde_json::from_str::<Value>(&done.stdout).unwrap()["parameters"].take())
    };
    let (main, other) = (vocabulary("o/n").unwrap(), vocabulary("o/n@def").unwrap());
    assert!(main != other);
    for (name, expected) in [("o/n@main", &main), ("o/n@abc", &main), ("o/n@v1", &other), ("o/n@refs/pr/1", &other)] {
        assert_eq!(vocabulary(name).as_ref(), Some(expected), "{name}");
    }
    for name in ["o/n@nothing", "o/n@../abc", "o/n@", "o/x"] {
        assert_eq!(vocabulary(name), None, "{name}");
    }
    std::fs::remove_file(repo.join("refs/main")).unwrap();
    assert_eq!(vocabulary("o/n"), None, "two snapshots and no word which");
}

/// A GGUF file of a [`Tiny`] whose vocabulary has these tokens, by type, after its bytes.
fn gguf(model: &Tiny, specials: &[(&str, u32)], metadata: &[(&str, Value)]) -> Vec<u8> {
    let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    fn value_bytes(value: &Value, string: &dyn Fn(&str) -> Vec<u8>) -> (u32, Vec<u8>) {
        match value {
            Value::String(text) => (8, string(text)),
            Value::Bool(value) => (7, vec![u8::from(*value)]),
            Value::Number(n) if n.is_u64() => (4, (n.as_u64().unwrap() as u32).to_le_bytes().to_vec()),
            Value::Number(n) => (6, (n.as_f64().unwrap() as f32).to_le_bytes().to_vec()),
            Value::Array(items) => {
                let parts: Vec<(u32, Vec<u8>)> = items.iter().map(|item| value_bytes(item, string)).collect();
                let kind = parts.first().map_or(8, |(kind, _)| *kind);
                let mut bytes = [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes()].concat();
                parts.into_iter().for_each(|(_, part)| bytes.extend(part));
                (9, bytes)
            }
            other => panic!("{other}"),
        }
    }
    let mut tokens: Vec<String> = (0..=255).map(|byte| common::tiny::byte_character(byte).to_string()).collect();
    tokens.extend(specials.iter().map(|(token, _)| token.to_string()));
    let types: Vec<u32> = (0..256).map(|_| 1).chain(specials.iter().map(|(_, kind)| *kind)).collect();
    let mut all: std::collections::BTreeMap<String, Value> = [
        ("general.architecture", json!("llama")),
        ("llama.block_count", json!(1)),
        ("llama.embedding_length", json!(16)),
        ("llama.feed_forward_length", json!(16)),
        ("llama.attention.head_count", json!(2)),
        ("llama.attention.key_length", json!(8)),
        ("llama.rope.dimension_count", json!(8)),
        ("llama.context_length", json!(2048)),
        ("tokenizer.ggml.model", json!("gpt2")),
        ("tokenizer.ggml.pre", json!("gpt-2")),
        ("tokenizer.ggml.tokens", json!(tokens)),
        ("tokenizer.ggml.token_type", json!(types)),
        ("tokenizer.ggml.merges", json!([])),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    for (key, value) in metadata {
        if value.is_null() {
            all.remove(*key)
        } else {
            all.insert(key.to_string(), value.clone())
        };
    }
    let names = [
        ("model.layers.0.self_attn.", "blk.0.attn_"),
        ("model.layers.0.mlp.", "blk.0.ffn_"),
        ("_proj.weight", ".weight"),
        ("attn_o.", "attn_output."),
        ("model.layers.0.input_layernorm", "blk.0.attn_norm"),
        ("model.layers.0.post_attention_layernorm", "blk.0.ffn_norm"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ];
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend((model.tensors.len() as u64).to_le_bytes());
    file.extend((all.len() as u64).to_le_bytes());
    for (key, value) in &all {
        let (kind, bytes) = value_bytes(value, &string);
        file.extend([&string(key)[..], &kind.to_le_bytes(), &bytes].concat());
    }
    let mut data = vec![];
    for (name, tensor) in &model.tensors {
        let name = names.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
        file.extend(string(&name));
        file.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|n| file.extend((*n as u64).to_le_bytes()));
        file.extend(0u32.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(&tensor.bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    [file, data].concat()
}

/// Converts a GGUF file, and returns the folder and what the command said.
fn converted(file: &[u8], args: &[&str]) -> (tempfile::TempDir, common::Done) {
    let dir = temporary();
    std::fs::write(dir.path().join("m.gguf"), file).unwrap();
    let args = [&["convert", "m.gguf", "--out", "out", "--quant", "f32"], args].concat();
    let done = finish(common::command(&args).current_dir(dir.path()));
    (dir, done)
}

fn json_of(dir: &tempfile::TempDir, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.path().join("out").join(name)).unwrap()).unwrap()
}

#[test]
fn gguf_ends_and_control_tokens_as_llama_cpp_finds_them() {
    let says = Tiny::new(264).says(&[97, 98, 99, 100, 258, 101, 102, 103, 104, 105, 106, 107]);
    let eos = ("tokenizer.ggml.eos_token_id", json!(257));
    for name in ["<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>"] {
        for kind in [1, 3, 4] {
            let file = gguf(&says, &[("<s>", 3), ("</s>", 3), (name, kind)], std::slice::from_ref(&eos));
            let (dir, done) = converted(&file, &[]);
            done.ok();
            assert_eq!(json_of(&dir, "generation_config.json")["eos_token_id"], json!([257, 258]), "{name} {kind}");
            let run = |args: &[&str]| {
                let args =
                    [&["run", "--model", "out", "--raw", "--temperature", "0", "--max-tokens", "8", "--json"], args]
                        .concat();
                finish(common::command(&args).current_dir(dir.path())).json()
            };
            let found = run(&["xa"]);
            assert_eq!(
                (found["text"].as_str(), found["finish_reason"].as_str()),
                (Some("bcd"), Some("stop")),
                "{name}"
            );
            assert_eq!(run(&[name])["prompt_tokens"], 1, "{name} {kind}");
        }
    }
    // Ids of nothing are passed over.
    let (dir, done) = converted(&gguf(&says, &[("<s>", 3)], &[("tokenizer.ggml.eos_token_id", json!(100_000))]), &[]);
    done.ok();
    assert_eq!(json_of(&dir, "generation_config.json")["eos_token_id"], json!([]));
    // Llama 3's vocabulary begins with its first token unless the file says otherwise.
    for (extra, expected) in [(Value::Null, 2), (json!(false), 1), (json!(true), 2)] {
        let bos = ("tokenizer.ggml.bos_token_id", json!(256));
        let pre = ("tokenizer.ggml.pre", json!("llama-bpe"));
        let (dir, done) =
            converted(&gguf(&says, &[("<s>", 3)], &[bos, pre, ("tokenizer.ggml.add_bos_token", extra)]), &[]);
        done.ok();
        let args = ["run", "--model", "out", "--raw", "--max-tokens", "1", "--json", "a"];
        let found = finish(common::command(&args).current_dir(dir.path())).json();
        assert_eq!(found["prompt_tokens"], expected);
    }
}

#[test]
fn gguf_pre_tokenizers_are_known_or_refused_before_a_weight_is_written() {
    let model = Tiny::new(264);
    let file = gguf(&model, &[], &[("tokenizer.ggml.pre", json!("tekken"))]);
    for args in [&[][..], &["--dry-run"]] {
        let (dir, done) = converted(&file, args);
        assert!(done.code == Some(1) && done.stderr.contains("pre-tokenizer is \"tekken\""), "{}", done.stderr);
        assert!(!dir.path().join("out.partial").exists() && !dir.path().join("out").exists());
    }
    for (key, value, expected) in [
        ("tokenizer.ggml.model", json!("bert"), "of kind \"bert\""),
        ("tokenizer.ggml.merges", Value::Null, "no tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", json!(["ab"]), "must be pairs"),
        ("tokenizer.ggml.token_type", json!([1, 2]), "2 token types for"),
    ] {
        let (dir, done) = converted(&gguf(&model, &[], &[(key, value)]), &[]);
        assert!(done.code == Some(1) && done.stderr.contains(expected), "{key}: {}", done.stderr);
        assert!(!dir.path().join("out.partial").exists(), "{key}");
    }
    // None named: llama.cpp's default, with a line that says so.
    let (_dir, done) = converted(&gguf(&model, &[], &[("tokenizer.ggml.pre", Value::Null)]), &[]);
    assert!(done.code == Some(0) && done.stderr.contains("names no pre-tokenizer"), "{}", done.stderr);
    // The original's.
    let original = Tiny::new(264).template("from the original").write();
    let (dir, done) = converted(&file, &["--tokenizer", &original.arg()]);
    done.ok();
    assert_eq!(json_of(&dir, "tokenizer_config.json")["chat_template"], "from the original");
    let (_dir, done) = converted(&file, &["--tokenizer", "/nonexistent"]);
    assert!(done.code == Some(1) && done.stderr.contains("has no tokenizer.json"), "{}", done.stderr);
}

#[test]
fn gguf_rope_keys_mean_what_llama_cpp_takes_them_for() {
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    let check = |what: &str, metadata: &[(&str, Value)], expected: Value| {
        let (dir, done) = converted(&gguf(&Tiny::new(264), &[], metadata), &[]);
        assert_eq!(done.code, Some(0), "{what}: {}", done.stderr);
        let config = json_of(&dir, "config.json");
        assert_eq!(config.get("rope_scaling").unwrap_or(&Value::Null), &expected, "{what}");
    };
    let (kind, factor, old) = ("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear");
    check("linear", &[(kind, json!("linear")), (factor, json!(4.0))], linear.clone());
    check("a factor without a type", &[(factor, json!(4.0))], linear.clone());
    check("the old key", &[(old, json!(4.0))], linear.clone());
    check("the old key with a type", &[(kind, json!("linear")), (old, json!(4.0))], linear.clone());
    check("the new key wins", &[(factor, json!(4.0)), (old, json!(2.0))], linear);
    check("none", &[(kind, json!("none")), (factor, json!(4.0))], Value::Null);
    check("a factor of 1", &[(factor, json!(1.0))], Value::Null);
    check("a factor of 0", &[(factor, json!(0.0))], Value::Null);
    let original = ("llama.rope.scaling.original_context_length", json!(512));
    let yarn = [(kind, json!("yarn")), (factor, json!(4.0)), original];
    let of = |metadata: &[(&str, Value)]| {
        let (dir, done) = converted(&gguf(&Tiny::new(264), &[], metadata), &[]);
        done.ok();
        json_of(&dir, "config.json")["rope_scaling"]["attention_factor"].as_f64()
    };
    let own = 0.1 * 4f64.ln() + 1.0;
    assert_eq!(of(&yarn), None);
    for key in ["llama.rope.scaling.attn_factor", "llama.rope.scaling.yarn_attn_factor"] {
        let found = of(&[&yarn[..], &[(key, json!(0.5))]].concat()).unwrap();
        assert!((found - 0.5 * own).abs() < 1e-6, "{key}: {found}");
    }
    for (metadata, expected) in [
        (vec![("llama.rope.scaling.attn_factor", json!(0.5))], "without yarn"),
        (vec![(kind, json!("longrope"))], "rope scaling is \"longrope\""),
        (vec![(kind, json!("yarn")), ("llama.rope.scaling.yarn_ext_factor", json!(0.5))], "yarn_ext_factor is 0.5"),
    ] {
        let (_dir, done) = converted(&gguf(&Tiny::new(264), &[], &metadata), &[]);
        assert!(done.code == Some(1) && done.stderr.contains(expected), "{}", done.stderr);
    }
}

#[test]
fn gguf_templates_for_tools_are_kept() {
    let metadata = [
        ("tokenizer.chat_template", json!("12345")),
        ("tokenizer.chat_template.tool_use", json!("123")),
        ("tokenizer.chat_template.rag", json!("1")),
    ];
    let (dir, done) = converted(&gguf(&Tiny::new(264), &[], &metadata), &[]);
    done.ok();
    let tools = common::file(&dir, "tools.json", json!([{"type": "function", "function": {"name": "f"}}]).to_string());
    for (args, expected) in [(vec![], 5), (vec!["--tools", &*tools], 3)] {
        let args = [&["run", "--model", "out", "--max-tokens", "1", "--json"], &args[..], &["hi"]].concat();
        assert_eq!(finish(common::command(&args).current_dir(dir.path())).json()["prompt_tokens"], expected);
    }
}

#[test]
fn gguf_counts_are_bounded_before_they_are_used() {
    let model = Tiny::new(264);
    for (key, value) in [
        ("llama.block_count", u64::from(u32::MAX)),
        ("llama.block_count", 1 << 24),
        ("llama.block_count", 4097),
        ("llama.nextn_predict_layers", u64::from(u32::MAX)),
        ("llama.attention.head_count", u64::from(u32::MAX)),
        ("llama.embedding_length", u64::from(u32::MAX)),
        ("llama.context_length", u64::from(u32::MAX)),
        ("llama.attention.key_length", u64::from(u32::MAX)),
        ("split.count", u64::from(u32::MAX)),
    ] {
        let (_dir, done) = converted(&gguf(&model, &[], &[(key, json!(value))]), &[]);
        assert!(done.code == Some(1) && done.stderr.lines().count() < 30, "{key} {value}: {}", done.stderr);
    }
    for key in ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "llama.rope.scaling.factor"] {
        let mut file = gguf(&model, &[], &[(key, json!(12345.5))]);
        let at = file.windows(4).position(|bytes| bytes == 12345.5f32.to_le_bytes()).unwrap();
        file[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        let (_dir, done) = converted(&file, &[]);
        assert!(done.code == Some(1) && done.stderr.contains("expected a finite number"), "{key}: {}", done.stderr);
    }
}

#[test]
fn modules_take_what_their_mode_implies() {
    let logits = |left_out: &[&str]| {
        let model = common::Copy::of("glm51_tiny").edit("config.json", |bytes| {
            let mut config: Value = serde_json::from_slice(bytes).unwrap();
            for section in ["quantization", "quantization_config"] {
                let Some(section) = config[section].as_object_mut() else { continue };
                for entry in section.values_mut().filter_map(Value::as_object_mut) {
                    left_out.iter().for_each(|key| {
                        entry.remove(*key);
                    });
                }
                // The default's group is that of its mode too.
                left_out.iter().filter(|key| **key != "bits").for_each(|key| {
                    section.remove(*key);
                });
            }
            *bytes = config.to_string().into_bytes();
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("t.json"), "[1, 2, 3]").unwrap();
        let path = model.path();
        let command = ["eval", "logits", "--model", &path, "--tokens", "t.json", "--out", "o", "--activations", "f32"];
        finish(common::command(&command).current_dir(dir.path())).ok();
        std::fs::read(dir.path().join("o")).unwrap()
    };
    let expected = logits(&[]);
    for left_out in [&["group_size"][..], &["bits"], &["group_size", "bits"]] {
        assert_eq!(logits(left_out), expected, "without {left_out:?}");
    }
}
