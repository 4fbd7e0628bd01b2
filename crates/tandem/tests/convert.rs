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
        let out = all_mxfp4.path().join(format!("{}", section["quant_method"].as_str().expect("text")));
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
}
