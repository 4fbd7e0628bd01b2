//! Strict loading: every way a checkpoint can fail to fit its config.json is an error that names each tensor.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tandem_core::weights::{ModuleKind, Weight};
use tandem_core::{Checkpoint, CheckpointError, ModelConfig};
use tempfile::TempDir;

/// Type, shape and bytes.
type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// A checkpoint in memory, to be spoiled and written.
struct Model {
    config: Value,
    /// One map per shard.
    shards: Vec<BTreeMap<String, Tensor>>,
    index: Option<Value>,
}

impl Model {
    fn fixture(name: &str) -> Model {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name);
        let config = std::fs::read_to_string(dir.join("config.json")).expect("config.json");
        let data = std::fs::read(dir.join("model.safetensors")).expect("model.safetensors");
        let tensors = safetensors::SafeTensors::deserialize(&data).expect("safetensors");
        let shard =
            tensors.iter().map(|(name, t)| (name.to_string(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())));
        Model { config: serde_json::from_str(&config).expect("JSON"), shards: vec![shard.collect()], index: None }
    }

    fn remove(&mut self, name: &str) -> Tensor {
        self.shards[0].remove(name).unwrap_or_else(|| panic!("{name} is in the fixture"))
    }

    fn insert(&mut self, name: &str, tensor: Tensor) {
        self.shards[0].insert(name.to_string(), tensor);
    }

    /// Removes every tensor whose name starts so.
    fn remove_all(&mut self, prefix: &str) {
        self.shards[0].retain(|name, _| !name.starts_with(prefix));
    }

    fn write(&self) -> TempDir {
        let dir = TempDir::new().expect("a temporary folder");
        std::fs::write(dir.path().join("config.json"), self.config.to_string()).expect("writable");
        for (i, shard) in self.shards.iter().enumerate() {
            let views = shard.iter().map(|(name, (dtype, shape, bytes))| {
                (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("consistent"))
            });
            let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).expect("serialisable");
            std::fs::write(dir.path().join(shard_name(i)), bytes).expect("writable");
        }
        if let Some(index) = &self.index {
            std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).expect("writable");
        }
        dir
    }
}

fn shard_name(i: usize) -> String {
    format!("model-{i}.safetensors")
}

fn f32s(shape: &[usize]) -> Tensor {
    (Dtype::F32, shape.to_vec(), vec![0; shape.iter().product::<usize>() * 4])
}

fn resolve(dir: &Path) -> Result<Vec<Weight>, CheckpointError> {
    let config = ModelConfig::load(dir).expect("a valid config");
    tandem_model::resolve(&Checkpoint::open(dir)?, &config)
}

/// Spoils a fixture and checks that the problems found are exactly these, in any order.
#[track_caller]
fn check(fixture: &str, spoil: impl FnOnce(&mut Model), expected: &[&str]) {
    let mut model = Model::fixture(fixture);
    spoil(&mut model);
    let dir = model.write();
    let mut problems = match resolve(dir.path()) {
        Ok(_) => vec![],
        Err(CheckpointError::Mismatch { problems }) => problems,
        Err(other) => panic!("{other}"),
    };
    problems.sort();
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    assert_eq!(problems, expected);
}

/// Checks that a folder cannot be opened, and that the message says all of `expected`.
#[track_caller]
fn check_refused(dir: &Path, expected: &[&str]) {
    let message = resolve(dir).expect_err("refused").to_string();
    for part in expected {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

const MLX: &str = "glm51_tiny";
const HF: &str = "glm51_hf_tiny_mtp";
const NORM: &str = "model.layers.0.input_layernorm.weight";

#[test]
fn fixtures_are_complete() {
    for fixture in [MLX, HF, "glm51_tiny_bf16", "dsv3_fp8_tiny", "llama_tiny", "glm52_cut"] {
        check(fixture, |_| {}, &[]);
    }
}

#[test]
fn missing_tensors_are_all_listed() {
    check(
        MLX,
        |m| {
            for name in [NORM, "model.layers.1.self_attn.o_proj.biases", "lm_head.scales"] {
                m.remove(name);
            }
            m.remove_all("model.layers.4.mlp.switch_mlp.up_proj.");
            m.remove("model.layers.4.mlp.switch_mlp.down_proj.scales");
            m.remove("model.layers.3.mlp.gate.e_score_correction_bias");
        },
        &[
            "model.layers.0.input_layernorm.weight is missing",
            "model.layers.1.self_attn.o_proj.biases is missing (affine8:g64 has scales and biases)",
            "model.layers.4.mlp.switch_mlp.up_proj.weight is missing",
            "model.layers.4.mlp.switch_mlp.down_proj.scales is missing (config.json says mxfp4 with 4 bits)",
            "model.layers.3.mlp.gate.e_score_correction_bias is missing",
            // Without its scales the packed weight reads as an unquantised one of the wrong type.
            "lm_head.weight has type U32, expected BF16",
            "lm_head.biases exists, but bf16 has no biases",
        ],
    );
}

#[test]
fn a_missing_expert_or_joint_projection_is_named() {
    check(
        HF,
        |m| {
            m.remove("model.layers.1.mlp.experts.5.up_proj.weight");
            m.remove("model.layers.0.self_attn.kv_b_proj.weight");
        },
        &[
            "model.layers.1.mlp.experts.5.up_proj.weight is missing",
            "model.layers.0.self_attn.embed_q.weight is missing",
            "model.layers.0.self_attn.unembed_out.weight is missing",
        ],
    );
}

#[test]
fn duplicates_across_shards_are_all_listed() {
    check(
        MLX,
        |m| {
            let second = [NORM, "model.norm.weight"].map(|n| (n.to_string(), m.shards[0][n].clone()));
            m.shards.push(second.into());
        },
        &[
            "model.layers.0.input_layernorm.weight is in more than one file",
            "model.norm.weight is in more than one file",
        ],
    );
}

#[test]
fn misshapen_tensors_are_all_listed() {
    check(
        MLX,
        |m| {
            for name in [NORM, "model.layers.0.mlp.gate_proj.weight", "lm_head.biases"] {
                let (dtype, mut shape, bytes) = m.remove(name);
                shape.insert(0, 1);
                m.insert(name, (dtype, shape, bytes));
            }
            let (dtype, shape, bytes) = m.remove("model.layers.3.mlp.gate.weight");
            m.insert("model.layers.3.mlp.gate.weight", (dtype, vec![shape[1], shape[0]], bytes));
        },
        &[
            "model.layers.0.input_layernorm.weight has shape [1, 128], expected [128]",
            "model.layers.0.mlp.gate_proj.weight has shape [1, 256, 32], expected [256, 32]",
            "lm_head.biases has shape [1, 320, 2], expected [320, 2]",
            "model.layers.3.mlp.gate.weight has shape [128, 8], expected [8, 128]",
        ],
    );
}

#[test]
fn wrong_types_are_all_listed() {
    check(
        MLX,
        |m| {
            for name in [NORM, "model.layers.0.mlp.gate_proj.weight", "model.layers.3.mlp.switch_mlp.up_proj.scales"] {
                let (_, shape, bytes) = m.remove(name);
                let dtype = match bytes.len() / shape.iter().product::<usize>() {
                    1 => Dtype::I8,
                    2 => Dtype::I16,
                    _ => Dtype::I32,
                };
                m.insert(name, (dtype, shape, bytes));
            }
        },
        &[
            "model.layers.0.input_layernorm.weight has type I16, expected BF16",
            "model.layers.0.mlp.gate_proj.weight has type I32, expected U32",
            "model.layers.3.mlp.switch_mlp.up_proj.scales has type I8, expected U8",
        ],
    );
}

#[test]
fn unexplained_tensors_are_all_listed() {
    check(
        MLX,
        |m| {
            m.insert("model.layers.0.self_attn.q_proj.weight", f32s(&[1]));
            m.insert("model.layers.9.input_layernorm.weight", f32s(&[128]));
            m.insert("visual.patch_embed.weight", f32s(&[2, 2]));
        },
        &[
            "model.layers.0.self_attn.q_proj.weight is in the checkpoint but this glm_moe_dsa model has no use for it",
            "model.layers.9.input_layernorm.weight is in the checkpoint but this glm_moe_dsa model has no use for it",
            "visual.patch_embed.weight is in the checkpoint but this glm_moe_dsa model has no use for it",
        ],
    );
}

#[test]
fn scales_without_settings_are_an_error() {
    check(
        MLX,
        |m| m.config["quantization"]["lm_head"] = json!(false),
        &["lm_head.scales exists but config.json's quantization says nothing about lm_head"],
    );
}

#[test]
fn experts_of_different_types_are_an_error() {
    let name = "model.layers.1.mlp.experts.3.down_proj.weight";
    check(
        HF,
        |m| {
            let (_, shape, _) = m.remove(name);
            m.insert(name, f32s(&shape));
        },
        &["model.layers.1.mlp.experts.3.down_proj.weight is f32 but other experts of \
           model.layers.1.mlp.switch_mlp.down_proj are bf16"],
    );
}

/// Found by the fuzz target `checkpoint`: one grid of block scales for a whole stack passed, and reading it panicked.
#[test]
fn stacked_fp8_experts_need_one_grid_of_scales_each() {
    let module = "model.layers.1.mlp.switch_mlp.up_proj";
    let stacked = |scales: &[usize]| {
        let scales = f32s(scales);
        move |m: &mut Model| {
            let (_, shape, _) = m.remove("model.layers.1.mlp.experts.0.up_proj.weight");
            m.shards[0].retain(|n, _| !(n.starts_with("model.layers.1.mlp.experts.") && n.contains(".up_proj.")));
            let shape = vec![8, shape[0], shape[1]];
            let bytes = vec![0; shape.iter().product()];
            m.insert(&format!("{module}.weight"), (Dtype::F8_E4M3, shape, bytes));
            m.insert(&format!("{module}.weight_scale_inv"), scales);
        }
    };
    check(HF, stacked(&[8, 1, 1]), &[]);
    let problem = format!("{module}.weight_scale_inv has shape [1, 1, 1], expected [8, 1, 1]");
    check(HF, stacked(&[1, 1, 1]), &[&problem]);
}

#[test]
fn known_useless_tensors_are_ignored() {
    check(MLX, |m| m.insert("model.layers.2.self_attn.rotary_emb.inv_freq", f32s(&[16])), &[]);
    // llama_tiny ties its embeddings: a copy of the head is of no use there, and of some use elsewhere.
    check("llama_tiny", |m| m.insert("lm_head.weight", f32s(&[1])), &[]);
    check("llama_tiny", |m| m.config["tie_word_embeddings"] = json!(false), &["lm_head.weight is missing"]);
}

#[test]
fn mtp_layers_are_whole_or_absent() {
    let mtp = "model.layers.2.";
    let has_mtp = |model: &Model| {
        let weights = resolve(model.write().path()).expect("resolves");
        weights.iter().any(|w| w.spec.kind == ModuleKind::Mtp)
    };
    let mut model = Model::fixture(HF);
    assert!(has_mtp(&model));
    model.remove_all(mtp);
    assert!(!has_mtp(&model), "a checkpoint without the announced MTP layer is complete");

    // Its copies of the embedding and the head are optional, one by one.
    check(HF, |m| drop(m.remove("model.layers.2.embed_tokens.weight")), &[]);
    check(HF, |m| drop(m.remove("model.layers.2.shared_head.head.weight")), &[]);
    check(
        HF,
        |m| {
            m.remove("model.layers.2.enorm.weight");
            m.remove("model.layers.2.eh_proj.weight");
        },
        &["model.layers.2.enorm.weight is missing", "model.layers.2.eh_proj.weight is missing"],
    );
    // Nothing is left but the copies: still a layer that began.
    let mut model = Model::fixture(HF);
    model.shards[0].retain(|n, _| !n.starts_with(mtp) || n.ends_with("embed_tokens.weight"));
    check_refused(
        model.write().path(),
        &["27 problems", "model.layers.2.self_attn.embed_q.weight is missing", "and 7 more"],
    );
    // A config that announces no MTP layer has no use for one.
    let mut model = Model::fixture(HF);
    model.config["num_nextn_predict_layers"] = json!(0);
    check_refused(model.write().path(), &["model.layers.2.enorm.weight is in the checkpoint but"]);
}

/// The fixture in two shards with an index.
fn sharded() -> Model {
    let mut model = Model::fixture(MLX);
    let mut first = model.shards.pop().expect("one shard");
    let second = first.split_off("model.layers.3");
    let names = |shard: &BTreeMap<String, Tensor>, i| shard.keys().map(|n| (n.clone(), json!(shard_name(i)))).collect();
    let mut map: serde_json::Map<String, Value> = names(&first, 0);
    map.extend::<serde_json::Map<String, Value>>(names(&second, 1));
    model.index = Some(json!({"metadata": {}, "weight_map": map}));
    model.shards = vec![first, second];
    model
}

fn weight_map(model: &mut Model) -> &mut Value {
    &mut model.index.as_mut().expect("an index")["weight_map"]
}

#[test]
fn an_index_decides_which_files_are_read() {
    let model = sharded();
    let dir = model.write();
    resolve(dir.path()).expect("two shards and an index");
    // A file that the index does not name is none of our business.
    std::fs::write(dir.path().join("consolidated.safetensors"), "junk").expect("writable");
    resolve(dir.path()).expect("the index decides");
}

#[test]
fn an_index_must_tell_the_truth() {
    let mut model = sharded();
    for name in ["ghost.weight", "phantom.weight"] {
        weight_map(&mut model)[name] = json!(shard_name(1));
    }
    let ghosts = [
        "2 problems",
        "the index says model-1.safetensors holds ghost.weight, but it does not",
        "the index says model-1.safetensors holds phantom.weight, but it does not",
    ];
    check_refused(model.write().path(), &ghosts);
}

#[test]
fn an_index_may_not_leave_its_directory() {
    for name in ["../model-0.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".hidden", ""] {
        let mut model = sharded();
        weight_map(&mut model)[NORM] = json!(name);
        check_refused(model.write().path(), &["index.json", "not a file in the same directory"]);
    }
}

#[test]
fn a_shard_that_is_not_there_is_named() {
    let dir = sharded().write();
    std::fs::remove_file(dir.path().join(shard_name(1))).expect("removable");
    check_refused(dir.path(), &["cannot read", "model-1.safetensors"]);
}

#[test]
fn an_index_that_is_not_json_is_named() {
    let dir = sharded().write();
    std::fs::write(dir.path().join("model.safetensors.index.json"), "{").expect("writable");
    check_refused(dir.path(), &["model.safetensors.index.json", "not a weight index"]);
}

#[test]
fn damaged_files_are_named() {
    let dir = Model::fixture(MLX).write();
    let path = dir.path().join(shard_name(0));
    let whole = std::fs::read(&path).expect("readable");
    let header_only = u64::from_le_bytes(*whole.first_chunk().expect("8 bytes")) as usize + 8;
    for length in [whole.len() - 1, header_only, header_only / 2, 7, 0] {
        std::fs::write(&path, &whole[..length]).expect("writable");
        check_refused(
            dir.path(),
            &["model-0.safetensors", "not a complete safetensors file", "Download or copy it again"],
        );
    }
    std::fs::write(&path, [&whole[..], b"more"].concat()).expect("writable");
    check_refused(dir.path(), &["model-0.safetensors", "not a complete safetensors file"]);
}

#[test]
fn a_folder_without_weights_is_named() {
    let dir = Model::fixture(MLX).write();
    std::fs::remove_file(dir.path().join(shard_name(0))).expect("removable");
    check_refused(dir.path(), &["there is no *.safetensors file in it"]);
}
