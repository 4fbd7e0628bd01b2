//! `tandem convert`: bytes, layouts, interrupted runs and bad sources.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Copy, golden, tandem, temporary, text};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// All tensors of a directory.
fn tensors(dir: &Path) -> Tensors {
    let mut all = Tensors::new();
    for entry in std::fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.extension().is_some_and(|e| e == "safetensors") && !path.ends_with("golden.safetensors") {
            let bytes = std::fs::read(&path).expect("readable");
            for (name, view) in SafeTensors::deserialize(&bytes).expect("valid").iter() {
                let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(all.insert(name.to_string(), tensor).is_none(), "{name} twice");
            }
        }
    }
    all
}

#[track_caller]
fn assert_same(found: &Tensors, expected: &Tensors) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, tensor) in found {
        assert!(tensor == &expected[name], "{name} differs");
    }
}

fn save(dir: &Path, all: &Tensors) {
    let views = all.iter().map(|(name, (dtype, shape, data))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).expect("sizes fit"))
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("writable");
}

/// Converts and returns the new folder.
#[track_caller]
fn convert(source: &str, out: &Path, more: &[&str]) {
    let out = text(out);
    tandem(&[&["convert", source, "--out", &out][..], more].concat()).ok();
}

#[track_caller]
fn fails(args: &[&str], expected: &[&str]) {
    let done = tandem(&[&["convert"], args].concat());
    assert_eq!(done.code, Some(1), "{args:?}: {}", done.stderr);
    assert!(done.stderr.starts_with("error: "), "{}", done.stderr);
    for part in expected {
        assert!(done.stderr.contains(part), "{args:?}: {:?} does not say {part:?}", done.stderr);
    }
    assert!(!done.stderr.contains("has a bug"), "{}", done.stderr);
}

#[test]
fn quantising_gives_the_bytes_of_mlx() {
    let dir = temporary();
    let out = dir.path().join("out");
    convert(&golden("models/glm51_tiny_bf16"), &out, &["--quant", "mxfp4-q8"]);
    assert_same(&tensors(&out), &tensors(Path::new(&golden("models/glm51_tiny"))));
    // In several files, and by rules, the same.
    let rules = common::file(&dir, "rules.toml", "default = 'affine8'\n[rules]\n'*.switch_mlp.*' = 'mxfp4'\n");
    let shards = dir.path().join("shards");
    let quant = format!("mixed:{rules}");
    convert(&golden("models/glm51_tiny_bf16"), &shards, &["--quant", &quant, "--max-shard-size", "100KB"]);
    assert_same(&tensors(&shards), &tensors(&out));
    let index = std::fs::read_to_string(shards.join("model.safetensors.index.json")).expect("an index");
    let index: Value = serde_json::from_str(&index).expect("JSON");
    let files: std::collections::BTreeSet<&str> =
        index["weight_map"].as_object().expect("a map").values().filter_map(Value::as_str).collect();
    assert!(files.len() > 2, "{files:?}");
    let inspected = tandem(&["inspect", &text(&shards), "--json"]).json();
    let original = tandem(&["inspect", &golden("models/glm51_tiny"), "--json"]).json();
    assert_eq!(inspected["modules"], original["modules"]);
}

/// The layer that drafts alone, of either layout: a checkpoint drafts with it as with its own.
#[test]
fn a_layer_that_drafts_is_converted_alone() {
    let (fable, hf) = (golden("../../models/fable-30m-MXFP4-Q8"), golden("models/glm51_hf_tiny_mtp"));
    let drafted = |model: &str, mtp: Option<&str>, prompt: &str| {
        let mut args =
            vec!["run", prompt, "--model", model, "--json", "--raw", "--max-tokens", "40", "--temperature", "0"];
        args.extend(["--ignore-eos", "--draft-depth", "2"]);
        args.extend(mtp.iter().flat_map(|mtp| ["--mtp", *mtp]));
        let found = tandem(&args).json();
        assert_eq!(found["generated_tokens"], 40);
        ["tokens", "drafted_tokens", "accepted_by_draft_position"].map(|name| found[name].clone())
    };
    for model in [&fable, &hf] {
        let dir = temporary();
        let out = dir.path().join("layer");
        convert(model, &out, &["--mtp-only", "--quant", "keep"]);
        let out = out.display().to_string();
        assert_eq!(drafted(model, Some(&out), "Once"), drafted(model, None, "Once"), "{model}");
        // In other formats it drafts, perhaps otherwise; the text is the model's.
        let other = dir.path().join("other");
        convert(model, &other, &["--mtp-only", "--quant", "mxfp4"]);
        let size = |dir: &Path| std::fs::metadata(dir.join("model.safetensors")).expect("a file").len();
        assert!(size(&other) < size(Path::new(&out)));
        assert_eq!(drafted(model, Some(&other.display().to_string()), "Once")[0], drafted(model, None, "Once")[0]);
    }
    let dir = temporary();
    let out = dir.path().join("none").display().to_string();
    for (source, more, expected) in [
        (golden("models/llama_tiny"), &[][..], "no num_nextn_predict_layers"),
        (golden("models/dsv32_tiny"), &[], "tandem pull OWNER/NAME --mtp"),
        (fable.clone(), &["--quant", "mixed-4.8"], "does not run alone"),
    ] {
        fails(&[&[source.as_str(), "--mtp-only", "--out", &out], more].concat(), &[expected]);
    }
    let done = tandem(&["convert", &fable, "--mtp-only", "--search", "--out", &out]);
    assert!(done.code == Some(2) && done.stderr.contains("--search"), "{}", done.stderr);
}

#[test]
fn every_format_runs() {
    let dir = temporary();
    for quant in
        ["mxfp4", "mxfp8", "nvfp4", "affine2", "affine3:g32", "affine4:g32", "affine5", "affine6", "affine8", "bf16"]
    {
        let out = dir.path().join(quant);
        convert("models/fable-30m-MXFP4-Q8", &out, &["--quant", quant]);
        let answer = tandem(&["run", "What is 2 + 3?", "--model", &text(&out), "--max-tokens", "8", "--json"]).json();
        assert!(answer["tokens"].as_array().is_some_and(|t| !t.is_empty()), "{quant}: {answer}");
        let dry = tandem(&["convert", "models/fable-30m-MXFP4-Q8", "--quant", quant, "--dry-run", "--json"]).json();
        let inspected = tandem(&["inspect", &text(&out), "--json"]).json();
        assert_eq!(dry["bytes"], inspected["resident_bytes"], "{quant}");
        assert_eq!(dry["read_bytes_per_token"], inspected["read_bytes_per_token"], "{quant}");
    }
}

#[test]
fn made_up_checkpoints_have_true_shapes() {
    let dir = temporary();
    let out = dir.path().join("out");
    let config = golden("models/glm51_tiny/config.json");
    let flags = ["--config", &config, "--load-format", "dummy", "--num-layers", "4", "--quant"];
    for quant in ["mxfp4-q8", "nvfp4", "bf16"] {
        let out = out.with_extension(quant);
        tandem(&[&["convert", "--out", &text(&out)], &flags[..], &[quant]].concat()).ok();
        let inspected = tandem(&["inspect", &text(&out), "--json"]).json();
        assert_eq!(inspected["num_hidden_layers"], 4, "{quant}");
        assert_eq!(inspected["weights_present"], true);
    }
}

#[test]
fn an_interrupted_run_goes_on() {
    let dir = temporary();
    let (source, flags) = (golden("models/glm51_tiny_bf16"), ["--quant", "affine4", "--max-shard-size", "100KB"]);
    let whole = dir.path().join("whole");
    convert(&source, &whole, &flags);
    // As if killed: the first two files are complete, then one of them was damaged; another is half there.
    let partial = dir.path().join("out.partial");
    let out = text(&dir.path().join("out"));
    let mut child = common::command(&[&["convert", &source, "--out", &out][..], &flags].concat());
    let done = common::finish(child.env("TMPDIR", dir.path()));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    std::fs::rename(&out, &partial).expect("renamed");
    fails(&[&[&source[..], "--out", &text(&whole)], &flags[..]].concat(), &["exists already"]);
    std::fs::write(partial.join("conversion.json"), "{}").expect("written");
    fails(&[&[&source[..], "--out", &out], &flags[..]].concat(), &["conversion.json is damaged"]);
    std::fs::write(partial.join("conversion.json"), json!({"fingerprint": "0", "files": {}}).to_string())
        .expect("written");
    fails(&[&[&source[..], "--out", &out], &flags[..]].concat(), &["interrupted conversion of another source"]);
    std::fs::remove_file(partial.join("conversion.json")).expect("there");
    std::fs::write(partial.join("model-00002-of-00005.safetensors.tmp"), "half").expect("written");
    convert(&source, Path::new(&out), &flags);
    assert_same(&tensors(Path::new(&out)), &tensors(&whole));
    assert!(!partial.exists());
    for entry in std::fs::read_dir(&whole).expect("a folder") {
        let name = entry.expect("readable").file_name();
        let read = |dir: &Path| std::fs::read(dir.join(&name)).expect("readable");
        assert_eq!(read(&whole), read(Path::new(&out)), "{name:?}");
    }
}

/// The MXFP4 modules of `glm51_tiny` under other projects' names.
#[test]
fn mxfp4_of_other_projects_is_carried_over() {
    let expected = tensors(Path::new(&golden("models/glm51_tiny")));
    let all_mxfp4 = temporary();
    let quantised = all_mxfp4.path().join("mlx");
    convert(&golden("models/glm51_tiny"), &quantised, &["--quant", "mxfp4"]);
    let mlx = tensors(&quantised);
    // compressed-tensors: every matrix, per expert.
    let mut packed = Tensors::new();
    // gpt-oss: stacked experts, gate and up rows alternating; other matrices in bf16.
    let mut blocks = Tensors::new();
    let bf16 = tensors(Path::new(&golden("models/glm51_tiny_bf16")));
    for (name, (dtype, shape, data)) in &mlx {
        let (module, leaf) = name.rsplit_once('.').expect("dotted");
        let quantised = mlx.contains_key(&format!("{module}.scales"));
        if !quantised {
            packed.insert(name.clone(), (*dtype, shape.clone(), data.clone()));
            blocks.insert(name.clone(), (*dtype, shape.clone(), data.clone()));
            continue;
        }
        let new_leaf = if leaf == "weight" { "weight_packed" } else { "weight_scale" };
        let width = if leaf == "weight" { 4 } else { 1 };
        let mut shape = shape.clone();
        *shape.last_mut().expect("dimensions") *= width;
        if module.contains("switch_mlp") {
            let n = data.len() / shape[0];
            for (expert, data) in data.chunks_exact(n).enumerate() {
                let module = module.replace("switch_mlp", &format!("experts.{expert}"));
                packed.insert(format!("{module}.{new_leaf}"), (Dtype::U8, shape[1..].to_vec(), data.to_vec()));
            }
            let new_leaf = if leaf == "weight" { "blocks" } else { "scales" };
            let (last, rows) = (*shape.last().expect("dimensions"), shape[1]);
            let inner = if leaf == "weight" { vec![last / 16, 16] } else { vec![last] };
            let module_of = |projection: &str| {
                module.rsplit_once('.').expect("dotted").0.replace("switch_mlp", "experts") + projection
            };
            if module.ends_with("down_proj") {
                let name = module_of(&format!(".down_proj_{new_leaf}"));
                blocks.insert(name, (Dtype::U8, [vec![shape[0], rows], inner].concat(), data.clone()));
            } else if module.ends_with("gate_proj") {
                let up = &mlx[&name.replace("gate_proj", "up_proj")].2;
                let rows_of = data.chunks_exact(last).zip(up.chunks_exact(last));
                let joint: Vec<u8> = rows_of.flat_map(|(gate, up)| [gate, up].concat()).collect();
                let name = module_of(&format!(".gate_up_proj_{new_leaf}"));
                blocks.insert(name, (Dtype::U8, [vec![shape[0], 2 * rows], inner].concat(), joint));
            }
        } else {
            packed.insert(format!("{module}.{new_leaf}"), (Dtype::U8, shape.clone(), data.clone()));
            if leaf == "weight" {
                blocks.insert(name.clone(), bf16[name].clone());
            }
        }
    }
    assert!(expected.len() > 50);
    for (all, section) in [
        (&packed, json!({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"})),
        (&blocks, json!({"quant_method": "mxfp4"})),
    ] {
        let copy = Copy::of("glm51_tiny_bf16").config("quantization_config", section.clone());
        save(Path::new(&copy.path()), all);
        let out = all_mxfp4.path().join(section["quant_method"].as_str().expect("text"));
        convert(&copy.path(), &out, &["--quant", "keep"]);
        let found = tensors(&out);
        for (name, tensor) in &found {
            if !name.contains("switch_mlp") && section["quant_method"] == "mxfp4" {
                continue;
            }
            assert!(tensor == &mlx[name], "{name} differs");
        }
        assert!(found.keys().any(|name| name.ends_with("switch_mlp.up_proj.scales")));
        // It also runs as it is.
        tandem(&["inspect", &copy.path()]).ok();
    }
}

#[test]
fn bad_sources_are_refused() {
    let dir = temporary();
    let out = text(&dir.path().join("out"));
    let tiny = golden("models/glm51_tiny");
    fails(&["/no/such/model", "--out", &out], &["/no/such/model does not exist"]);
    fails(&[&tiny, "--out", &out, "--quant", "q4"], &["\"q4\" is not a format", "mxfp4-q8"]);
    fails(&[&tiny, "--out", &out, "--quant", "mixed:/no/such/file"], &["cannot read /no/such/file"]);
    fails(&["--config", "glm-5.1", "--out", &out], &["add --load-format dummy"]);
    let pickle = Copy::of("glm51_tiny").without("model.safetensors").edit("pytorch_model.bin", |b| b.extend([1, 2, 3]));
    fails(&[&pickle.path(), "--out", &out], &["pytorch_model.bin is a pickle file", "refused"]);
    let file = common::file(&dir, "weights.pt", [0; 4]);
    fails(&[&file, "--out", &out], &["weights.pt is a pickle file"]);
    let missing = Copy::of("glm51_tiny").without("model.safetensors");
    fails(&[&missing.path(), "--out", &out], &["there is no *.safetensors file"]);
    let cut = Copy::of("glm51_tiny").edit("model.safetensors", |b| b.truncate(b.len() / 2));
    fails(&[&cut.path(), "--out", &out], &["not a complete safetensors file"]);
    let huge_header =
        Copy::of("glm51_tiny").edit("model.safetensors", |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
    fails(&[&huge_header.path(), "--out", &out], &["not a complete safetensors file"]);
    let nan = Copy::of("glm51_tiny_bf16").patch("model.layers.0.mlp.up_proj.weight", &[0xc0, 0x7f]);
    fails(&[&nan.path(), "--out", &out, "--quant", "affine4"], &["up_proj", "needs finite values", "row 0, column 0"]);
    let method = Copy::of("glm51_tiny_bf16").config("quantization_config", json!({"quant_method": "awq"}));
    fails(&[&method.path(), "--out", &out], &["quant_method Some(\"awq\") is not supported"]);
    let header = |edit: fn(&mut Value)| {
        Copy::of("glm51_tiny").edit("model.safetensors", |bytes| {
            let n = u64::from_le_bytes(*bytes.first_chunk().expect("8 bytes")) as usize;
            let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).expect("JSON");
            edit(&mut header);
            let text = header.to_string().into_bytes();
            *bytes = [&(text.len() as u64).to_le_bytes()[..], &text, &bytes[8 + n..]].concat();
        })
    };
    let overlap = header(|h| h["lm_head.weight"]["data_offsets"][0] = json!(0));
    fails(&[&overlap.path(), "--out", &out], &["not a complete safetensors file"]);
    let wrong_type = header(|h| {
        h["model.layers.3.mlp.switch_mlp.up_proj.scales"]["dtype"] = json!("I8");
    });
    fails(&[&wrong_type.path(), "--out", &out], &["up_proj.scales has type I8"]);
    let twice = Copy::of("glm51_tiny").edit("second.safetensors", |b| {
        *b = std::fs::read(golden("models/glm51_tiny/model.safetensors")).expect("readable");
    });
    let twice = twice.edit("model.safetensors", |_| {});
    std::fs::rename(
        Path::new(&twice.path()).join("model.safetensors"),
        Path::new(&twice.path()).join("first.safetensors"),
    )
    .expect("renamed");
    fails(&[&twice.path(), "--out", &out], &["is in more than one file"]);
    // The second one may even lie where the first does.
    let twice = Copy::of("glm51_tiny").edit("model.safetensors", |bytes| {
        let n = u64::from_le_bytes(*bytes.first_chunk().expect("8 bytes")) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + n]).expect("JSON");
        let again = format!("{{\"lm_head.weight\":{},", header["lm_head.weight"]);
        bytes.splice(8..9, again.bytes());
        bytes[..8].copy_from_slice(&((n + again.len() - 1) as u64).to_le_bytes());
    });
    fails(&[&twice.path(), "--out", &out], &["not a complete safetensors file", "lm_head.weight twice"]);
}

/// A GGUF file: metadata (all unsigned numbers or texts), then tensors `(name, shape, type, data)`.
fn gguf(metadata: &[(impl AsRef<str>, Value)], tensors: &[(String, Vec<usize>, u32, Vec<u8>)]) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        file.extend(text(key.as_ref()));
        match value {
            Value::String(value) => file.extend([&8u32.to_le_bytes()[..], &text(value)].concat()),
            Value::Bool(value) => file.extend([&7u32.to_le_bytes()[..], &[u8::from(*value)]].concat()),
            Value::Number(n) if n.is_u64() => {
                file.extend([&4u32.to_le_bytes()[..], &(n.as_u64().expect("u64") as u32).to_le_bytes()].concat());
            }
            other => file
                .extend([&6u32.to_le_bytes()[..], &(other.as_f64().expect("a number") as f32).to_le_bytes()].concat()),
        }
    }
    let mut data = vec![];
    for (name, shape, kind, bytes) in tensors {
        file.extend(text(name));
        file.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|n| file.extend((*n as u64).to_le_bytes()));
        file.extend(kind.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    [file, data].concat()
}

/// Tensors under llama.cpp's names: `(name, shape, type, data)`.
fn ggml_tensors(mlx: &Tensors) -> Vec<(String, Vec<usize>, u32, Vec<u8>)> {
    let names = [
        ("model.layers", "blk"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.indexer.weights_proj", "indexer.proj"),
        ("self_attn.indexer.wq_b", "indexer.attn_q_b"),
        ("self_attn.indexer.wk", "indexer.attn_k"),
        ("self_attn.indexer.k_norm", "indexer.k_norm"),
        ("self_attn.q_a_proj", "attn_q_a"),
        ("self_attn.q_b_proj", "attn_q_b"),
        ("self_attn.q_a_layernorm", "attn_q_a_norm"),
        ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
        ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
        ("self_attn.embed_q", "attn_k_b"),
        ("self_attn.unembed_out", "attn_v_b"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
        ("mlp.gate.weight", "ffn_gate_inp.weight"),
        ("mlp.switch_mlp.gate_proj", "ffn_gate_exps"),
        ("mlp.switch_mlp.up_proj", "ffn_up_exps"),
        ("mlp.switch_mlp.down_proj", "ffn_down_exps"),
        ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
        ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
        ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    mlx.iter()
        .map(|(name, (dtype, shape, data))| {
            let new = names.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
            (new, shape.clone(), if *dtype == Dtype::F32 { 0 } else { 30 }, data.clone())
        })
        .collect()
}

/// Logits of a few tokens, as the file that `eval logits` writes.
fn logits(model: &Path) -> Vec<u8> {
    let dir = temporary();
    let tokens = common::file(&dir, "tokens.json", json!([1, 7, 300, 42, 256, 9, 8, 7, 6, 5, 1, 2]).to_string());
    let out = dir.path().join("logits.safetensors");
    let (model, to) = (text(model), text(&out));
    tandem(&["eval", "logits", "--model", &model, "--tokens", &tokens, "--out", &to, "--activations", "f32"]).ok();
    std::fs::read(out).expect("written")
}

/// DeepSeek-V3 with its `kv_b_proj` in two parts, as llama.cpp writes it today, and in one, as it did before.
#[test]
fn a_deepseek_gguf_gives_the_weights_back() {
    // The file keeps one of yarn's two factors; published models have them equal.
    let yarn = json!({"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32,
                      "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707});
    let twin = Copy::of("dsv3_fp8_tiny").config("rope_scaling", yarn);
    let dir = temporary();
    let bf16 = dir.path().join("bf16");
    convert(&twin.path(), &bf16, &["--quant", "bf16"]);
    let expected = tensors(&bf16);
    let (heads, nope, value, rope, latent) = (4, 48, 32, 32, 64);
    let metadata = |more: &[(&'static str, Value)]| {
        let common = [
            ("general.architecture", json!("deepseek2")),
            ("deepseek2.block_count", json!(3)),
            ("deepseek2.context_length", json!(1024)),
            ("deepseek2.embedding_length", json!(192)),
            ("deepseek2.feed_forward_length", json!(320)),
            ("deepseek2.attention.head_count", json!(heads)),
            ("deepseek2.attention.q_lora_rank", json!(96)),
            ("deepseek2.attention.kv_lora_rank", json!(latent)),
            ("deepseek2.rope.dimension_count", json!(rope)),
            ("deepseek2.rope.freq_base", json!(10000.0)),
            ("deepseek2.rope.scaling.type", json!("yarn")),
            ("deepseek2.rope.scaling.factor", json!(16.0)),
            ("deepseek2.rope.scaling.original_context_length", json!(64)),
            ("deepseek2.rope.scaling.yarn_log_multiplier", json!(0.0707)),
            ("deepseek2.attention.layer_norm_rms_epsilon", json!(1e-6)),
            ("deepseek2.expert_count", json!(16)),
            ("deepseek2.expert_used_count", json!(4)),
            ("deepseek2.expert_shared_count", json!(1)),
            ("deepseek2.expert_group_count", json!(4)),
            ("deepseek2.expert_group_used_count", json!(2)),
            ("deepseek2.expert_feed_forward_length", json!(16)),
            ("deepseek2.expert_weights_scale", json!(2.5)),
            ("deepseek2.expert_weights_norm", json!(true)),
            ("deepseek2.expert_gating_func", json!(2)),
            ("deepseek2.leading_dense_block_count", json!(1)),
            ("tokenizer.ggml.model", json!("none")),
        ];
        [&common[..], more].concat()
    };
    let split = ggml_tensors(&expected);
    let mut joint: Vec<_> =
        split.iter().filter(|t| !t.0.contains("attn_k_b") && !t.0.contains("attn_v_b")).cloned().collect();
    for layer in 0..3 {
        let part = |name: &str| &split.iter().find(|t| t.0 == format!("blk.{layer}.{name}.weight")).expect("there").3;
        let (k, v) = (part("attn_k_b"), part("attn_v_b"));
        let mut rows = vec![];
        for head in 0..heads {
            for i in 0..nope {
                // Transposed: k_b is [heads, latent, nope].
                (0..latent).for_each(|l| rows.extend_from_slice(&k[2 * ((head * latent + l) * nope + i)..][..2]));
            }
            rows.extend_from_slice(&v[2 * head * value * latent..2 * (head + 1) * value * latent]);
        }
        joint.push((format!("blk.{layer}.attn_kv_b.weight"), vec![heads * (nope + value), latent], 30, rows));
    }
    let key = |name: &'static str, n: usize| (name, json!(n));
    for (name, stored, lengths) in [
        (
            "split",
            split,
            vec![
                key("deepseek2.attention.key_length", latent + rope),
                key("deepseek2.attention.value_length", latent),
                key("deepseek2.attention.key_length_mla", nope + rope),
                key("deepseek2.attention.value_length_mla", value),
            ],
        ),
        (
            "joint",
            joint,
            vec![key("deepseek2.attention.key_length", nope + rope), key("deepseek2.attention.value_length", value)],
        ),
    ] {
        let file = common::file(&dir, &format!("{name}.gguf"), gguf(&metadata(&lengths), &stored));
        let out = dir.path().join(name);
        convert(&file, &out, &["--quant", "bf16"]);
        assert_same(&tensors(&out), &expected);
        assert!(logits(&out) == logits(&bf16), "{name}: the logits differ");
    }
}

/// llama.cpp stores the rows of queries and keys, and their biases, in another order.
#[test]
fn a_llama_gguf_gives_the_weights_back() {
    let dir = temporary();
    let plain = dir.path().join("plain");
    convert(&golden("models/llama_tiny"), &plain, &["--quant", "f16"]);
    let mut expected = tensors(&plain);
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    for (layer, (name, n)) in (0..3).flat_map(|l| [("q", 256), ("k", 64), ("v", 64), ("o", 256)].map(|p| (l, p))) {
        let bias = (0..n).flat_map(|i| half((i * 7 % 23) as f32 / 64.0)).collect();
        expected.insert(format!("model.layers.{layer}.self_attn.{name}_proj.bias"), (Dtype::F16, vec![n], bias));
    }
    // Vectors are f32 in such files, and f16 again where that is exact.
    for tensor in expected.values_mut().filter(|(_, shape, _)| shape.len() == 1) {
        let (dtype, _, data) = tensor;
        let value = |b: &[u8]| match dtype {
            Dtype::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            _ => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
        };
        *data = data.chunks_exact(2).flat_map(|b| half(value(b))).collect();
        *dtype = Dtype::F16;
    }
    let mut stored = ggml_tensors(&expected);
    for (name, shape, kind, data) in &mut stored {
        *kind = 1;
        if name.contains("attn_q.") || name.contains("attn_k.") {
            let row = data.len() / shape[0];
            // Halves of a head side by side.
            let order = (0..shape[0]).map(|r| r / 32 * 32 + r % 32 / 2 + r % 2 * 16);
            *data = order.flat_map(|r| data[r * row..(r + 1) * row].to_vec()).collect();
        }
        if shape.len() == 1 {
            let wide = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).to_f32().to_le_bytes();
            (*kind, *data) = (0, data.chunks_exact(2).flat_map(wide).collect());
        }
    }
    let metadata = [
        ("general.architecture", json!("llama")),
        ("llama.block_count", json!(3)),
        ("llama.context_length", json!(1024)),
        ("llama.embedding_length", json!(256)),
        ("llama.feed_forward_length", json!(512)),
        ("llama.attention.head_count", json!(8)),
        ("llama.attention.head_count_kv", json!(2)),
        ("llama.attention.key_length", json!(32)),
        ("llama.attention.layer_norm_rms_epsilon", json!(1e-5)),
        ("llama.rope.freq_base", json!(10000.0)),
        ("tokenizer.ggml.model", json!("none")),
    ];
    let file = common::file(&dir, "model.gguf", gguf(&metadata, &stored));
    let out = dir.path().join("out");
    convert(&file, &out, &["--quant", "keep"]);
    assert_same(&tensors(&out), &expected);
    tandem(&["inspect", &text(&out)]).ok();
    let norm = stored.iter().position(|t| t.0 == "output_norm.weight").expect("there");
    stored[norm].2 = 8;
    stored[norm].3.resize(256 / 32 * 34, 0);
    let file = common::file(&dir, "norm.gguf", gguf(&metadata, &stored));
    fails(&[&file, "--out", &text(&dir.path().join("never"))], &["output_norm.weight has ggml type Q8_0"]);
}

/// Metadata of a model with an indexer; those of its rotary embedding are in `more`.
fn indexed_metadata(architecture: &str, model: &str, more: &[(&str, Value)]) -> Vec<(String, Value)> {
    let text = std::fs::read_to_string(golden(&format!("models/{model}/config.json"))).expect("readable");
    let config: Value = serde_json::from_str(&text).expect("JSON");
    let n = |key: &str| config[key].as_u64().unwrap_or_else(|| panic!("{key}"));
    let own = [
        ("block_count", json!(n("num_hidden_layers"))),
        ("context_length", json!(n("max_position_embeddings"))),
        ("embedding_length", json!(n("hidden_size"))),
        ("feed_forward_length", json!(n("intermediate_size"))),
        ("attention.head_count", json!(n("num_attention_heads"))),
        ("attention.head_count_kv", json!(1)),
        ("attention.key_length_mla", json!(n("qk_nope_head_dim") + n("qk_rope_head_dim"))),
        ("attention.value_length_mla", json!(n("v_head_dim"))),
        ("attention.q_lora_rank", json!(n("q_lora_rank"))),
        ("attention.kv_lora_rank", json!(n("kv_lora_rank"))),
        ("attention.layer_norm_rms_epsilon", config["rms_norm_eps"].clone()),
        ("rope.dimension_count", json!(n("qk_rope_head_dim"))),
        ("expert_count", json!(n("n_routed_experts"))),
        ("expert_used_count", json!(n("num_experts_per_tok"))),
        ("expert_shared_count", json!(n("n_shared_experts"))),
        ("expert_group_count", json!(n("n_group"))),
        ("expert_group_used_count", json!(n("topk_group"))),
        ("expert_feed_forward_length", json!(n("moe_intermediate_size"))),
        ("expert_weights_scale", config["routed_scaling_factor"].clone()),
        ("expert_gating_func", json!(2)),
        ("leading_dense_block_count", json!(n("first_k_dense_replace"))),
        ("attention.indexer.head_count", json!(n("index_n_heads"))),
        ("attention.indexer.key_length", json!(n("index_head_dim"))),
        ("attention.indexer.top_k", json!(n("index_topk"))),
    ];
    let named = own.iter().chain(more).map(|(key, value)| (format!("{architecture}.{key}"), value.clone()));
    let general = [("general.architecture", architecture), ("tokenizer.ggml.model", "none")];
    general.iter().map(|(key, value)| (key.to_string(), json!(value))).chain(named).collect()
}

#[test]
fn a_deepseek32_gguf_gives_the_weights_back() {
    let dir = temporary();
    let bf16 = dir.path().join("bf16");
    convert(&golden("models/dsv32_tiny"), &bf16, &["--quant", "bf16"]);
    let expected = tensors(&bf16);
    let yarn = [
        ("rope.freq_base", json!(10000.0)),
        ("rope.scaling.type", json!("yarn")),
        ("rope.scaling.factor", json!(16.0)),
        ("rope.scaling.original_context_length", json!(64)),
        ("rope.scaling.yarn_log_multiplier", json!(0.1)),
    ];
    let metadata = indexed_metadata("deepseek32", "dsv32_tiny", &yarn);
    let file = common::file(&dir, "model.gguf", gguf(&metadata, &ggml_tensors(&expected)));
    let out = dir.path().join("out");
    convert(&file, &out, &["--quant", "bf16"]);
    assert_same(&tensors(&out), &expected);
    assert!(logits(&out) == logits(&bf16), "the logits differ");
}

#[test]
fn a_glm_gguf_gives_the_weights_back() {
    let metadata = indexed_metadata("glm-dsa", "glm51_tiny_bf16", &[]);
    let dir = temporary();
    let bf16 = dir.path().join("bf16");
    convert(&golden("models/glm51_tiny_bf16"), &bf16, &["--quant", "bf16"]);
    let expected = tensors(&bf16);
    let stored = ggml_tensors(&expected);
    let file = common::file(&dir, "model.gguf", gguf(&metadata, &stored));
    let out = dir.path().join("out");
    convert(&file, &out, &["--quant", "keep"]);
    assert_same(&tensors(&out), &expected);
    tandem(&["inspect", &text(&out)]).ok();

    let bytes = std::fs::read(&file).expect("readable");
    let spoiled = |name: &str, edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        edit(&mut bytes);
        common::file(&dir, name, bytes)
    };
    let to = text(&dir.path().join("never"));
    let check = |file: String, expected: &[&str]| fails(&[&file, "--out", &to], expected);
    check(spoiled("cut.gguf", &|b| b.truncate(b.len() / 2)), &["not a complete GGUF file", "truncated?"]);
    check(spoiled("magic.gguf", &|b| b[0] = 0), &["does not start with \"GGUF\""]);
    check(spoiled("tensors.gguf", &|b| b[8..16].copy_from_slice(&u64::MAX.to_le_bytes())), &["tensors, more than its"]);
    check(
        spoiled("values.gguf", &|b| b[16..24].copy_from_slice(&(1u64 << 60).to_le_bytes())),
        &["metadata values, more than"],
    );
    check(spoiled("key.gguf", &|b| b[24..32].copy_from_slice(&u64::MAX.to_le_bytes())), &["directory ends behind"]);
    let some = |keep: &dyn Fn(&str) -> bool| {
        let kept: Vec<_> = metadata.iter().filter(|(key, _)| keep(key)).cloned().collect();
        common::file(&dir, "some.gguf", gguf(&kept, &stored))
    };
    check(some(&|key| !key.ends_with("kv_lora_rank")), &["must have a number glm-dsa.attention.kv_lora_rank"]);
    check(some(&|key| !key.ends_with("architecture")), &["architecture is \"\""]);
    let less: Vec<_> = stored.iter().filter(|t| t.0 != "blk.1.attn_q_a.weight").cloned().collect();
    check(common::file(&dir, "less.gguf", gguf(&metadata, &less)), &["blk.1.attn_q_a.weight is missing"]);
    let odd: Vec<_> = stored
        .iter()
        .cloned()
        .map(|mut t| {
            if t.0 == "output.weight" {
                t.2 = 99
            }
            t
        })
        .collect();
    check(common::file(&dir, "odd.gguf", gguf(&metadata, &odd)), &["output.weight has ggml type 99"]);
}

#[test]
fn comparing_models() {
    let dir = temporary();
    let words =
        common::file(&dir, "text.json", json!(["Once there was a fox named Lily. Lily was brave."]).to_string());
    let model = "models/fable-30m-MXFP4-Q8";
    let same = tandem(&["eval", "compare", model, model, "--text", &words, "--json"]).json();
    assert_eq!((same["mean_kl"].as_f64(), same["top1_agreement"].as_f64()), (Some(0.0), Some(1.0)), "{same}");
    let out = dir.path().join("affine2");
    convert(model, &out, &["--quant", "affine2"]);
    let other = tandem(&["eval", "compare", model, &text(&out), "--text", &words, "--json"]).json();
    assert!(other["mean_kl"].as_f64().is_some_and(|kl| kl > 0.01), "{other}");
    let refused = tandem(&["eval", "compare", model, &golden("models/glm51_tiny"), "--text", &words]);
    assert!(refused.stderr.contains("only models of one tokenizer"), "{}", refused.stderr);
    // Kinds of module of which nothing was quantised are not tried.
    let (a, b) = (golden("models/glm51_tiny_bf16"), golden("models/glm51_tiny"));
    let ranked = tandem(&["eval", "compare", &a, &b, "--text", &words, "--per-module", "--json"]).json();
    let kinds = ranked["per_module"].as_array().expect("a list");
    let of = |value: &Value| value["mean_kl"].as_f64().expect("a number");
    assert!(kinds.is_sorted_by(|x, y| of(x) >= of(y)) && of(&kinds[0]) < of(&ranked) * 2.0, "{ranked}");
    assert!(kinds.iter().any(|kind| kind["module"] == "mlp.switch_mlp.up_proj"), "{ranked}");
    assert!(kinds.iter().all(|kind| kind["module"] != "mlp.gate"), "{ranked}");
    let worst = &ranked["worst"][0];
    assert!(of(&ranked) < worst["kl"].as_f64().expect("a number"), "{ranked}");
    assert!(worst["context"].as_str().is_some_and(|context| context.contains(" -> ")), "{ranked}");
}

#[test]
fn searching_needs_no_text() {
    let dir = temporary();
    let (source, words) = (golden("models/glm51_tiny_bf16"), golden("generate/public_domain.txt"));
    let mean_kl = |out: &Path| {
        let compared = tandem(&["eval", "compare", &source, &text(out), "--text", &words, "--json"]).json();
        compared["mean_kl"].as_f64().expect("a number")
    };
    let of = |name: &str, flags: &[&str]| {
        let out = dir.path().join(name);
        convert(&source, &out, flags);
        out
    };
    let plain = of("plain", &["--quant", "mxfp4"]);
    let searched = of("searched", &["--quant", "mxfp4", "--search"]);
    let again = of("again", &["--quant", "mxfp4", "--search", "--threads", "1"]);
    assert_same(&tensors(&searched), &tensors(&again));
    let sizes = |dir: &Path| tensors(dir).values().map(|(_, shape, _)| shape.clone()).collect::<Vec<_>>();
    assert_eq!(sizes(&plain), sizes(&searched));
    let (plain, searched) = (mean_kl(&plain), mean_kl(&searched));
    assert!(searched < 0.95 * plain, "{searched} against {plain}");
    let calibrated = mean_kl(&of("calibrated", &["--quant", "mxfp4", "--calibrate", &words]));
    assert!(calibrated < 0.85 * plain, "{calibrated} against {plain}");
    let dummy = ["--config", &golden("models/glm51_tiny/config.json"), "--load-format", "dummy"];
    let out = text(&dir.path().join("dummy"));
    fails(&[&dummy[..], &["--out", &out, "--quant", "mixed-4.8"]].concat(), &["run the source", "not --config"]);
}

#[test]
fn mixed_bits_stay_within_their_size() {
    let dir = temporary();
    let source = golden("models/glm51_tiny_bf16");
    let out = dir.path().join("mixed");
    let done = tandem(&["convert", &source, "--out", &text(&out), "--quant", "mixed-4.8"]);
    let rules = done.stderr.split_once("default = ").map(|(_, rules)| format!("default = {rules}")).expect("rules");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let dry = tandem(&["convert", &text(&out), "--quant", "keep", "--dry-run", "--json"]).json();
    let bits = dry["bits_per_weight"].as_f64().expect("a number");
    assert!(bits > 4.0 && bits <= 4.8, "{bits}");
    // What it printed is a rule file.
    let rules = common::file(&dir, "rules.toml", rules);
    let same = dir.path().join("same");
    convert(&source, &same, &["--quant", &format!("mixed:{rules}")]);
    assert_same(&tensors(&same), &tensors(&out));
}
