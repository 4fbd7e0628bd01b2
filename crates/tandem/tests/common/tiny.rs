//! A model of a few kilobytes, made to order.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Done, finish, temporary, text};

const HIDDEN: usize = 16;

/// A tensor as a file holds it.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f32(shape: &[usize], values: &[f32]) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        Tensor { dtype: "F32", shape: shape.to_vec(), bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
    }
}

/// A llama of one layer and 16 dimensions. Tokens 0 to 255 are bytes; attention and MLP add nothing, so that
/// [`Tiny::says`] decides what follows what.
#[derive(Clone)]
pub(crate) struct Tiny {
    pub(crate) config: Value,
    pub(crate) tokenizer: Value,
    pub(crate) tokenizer_config: Value,
    pub(crate) generation_config: Option<Value>,
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// Further files, or others of the same names.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

/// Characters that stand for bytes in byte-level vocabularies.
pub(crate) fn byte_character(byte: u8) -> char {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let byte = u32::from(byte);
    let code = if printable(byte) { byte } else { 256 + (0..byte).filter(|b| !printable(*b)).count() as u32 };
    char::from_u32(code).expect("a character")
}

impl Tiny {
    /// A vocabulary of `n_vocab` rows, at least 256.
    pub(crate) fn new(n_vocab: usize) -> Tiny {
        let vocab: serde_json::Map<String, Value> =
            (0..=255u8).map(|byte| (byte_character(byte).to_string(), json!(byte))).collect();
        let mut tensors = BTreeMap::new();
        for name in [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ] {
            let zeros = Tensor::f32(&[HIDDEN, HIDDEN], &[0.0; HIDDEN * HIDDEN]);
            tensors.insert(format!("model.layers.0.{name}.weight"), zeros);
        }
        for name in ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"] {
            tensors.insert(format!("model.{name}.weight"), Tensor::f32(&[HIDDEN], &[1.0; HIDDEN]));
        }
        let embedding: Vec<f32> = (0..n_vocab).flat_map(direction).collect();
        tensors.insert("model.embed_tokens.weight".into(), Tensor::f32(&[n_vocab, HIDDEN], &embedding));
        tensors.insert("lm_head.weight".into(), Tensor::f32(&[n_vocab, HIDDEN], &vec![0.0; n_vocab * HIDDEN]));
        Tiny {
            config: json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
                "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 8, "vocab_size": n_vocab, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 2048, "tie_word_embeddings": false, "hidden_act": "silu",
                "rope_theta": 10000.0, "torch_dtype": "float32", "attention_bias": false, "mlp_bias": false,
            }),
            tokenizer: json!({
                "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
                "post_processor": null,
                "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
                "model": {
                    "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                    "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                    "vocab": vocab, "merges": [],
                },
            }),
            tokenizer_config: json!({"tokenizer_class": "PreTrainedTokenizerFast"}),
            generation_config: None,
            tensors,
            files: BTreeMap::new(),
        }
    }

    /// Adds special tokens to tokenizer.json, with ids from 256 on.
    pub(crate) fn special(mut self, contents: &[&str]) -> Tiny {
        for (id, content) in (256..).zip(contents) {
            let token = json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            });
            self.tokenizer["added_tokens"].as_array_mut().expect("a list").push(token);
        }
        self
    }

    /// Each token's likeliest successor is the next one.
    pub(crate) fn says(mut self, tokens: &[u32]) -> Tiny {
        for pair in tokens.windows(2) {
            let row: Vec<u8> = direction(pair[0] as usize).iter().flat_map(|v| v.to_le_bytes()).collect();
            self.tensors.get_mut("lm_head.weight").expect("a head").bytes[pair[1] as usize * HIDDEN * 4..]
                [..HIDDEN * 4]
                .copy_from_slice(&row);
        }
        self
    }

    /// Weights other than zero everywhere, the same each time.
    pub(crate) fn noise(mut self) -> Tiny {
        let mut state = 1u32;
        for (name, tensor) in &mut self.tensors {
            if tensor.dtype == "F32" && !name.contains("norm") {
                for value in tensor.bytes.chunks_exact_mut(4) {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    value.copy_from_slice(&((state >> 8) as f32 / 8_388_608.0 - 1.0).to_le_bytes());
                }
            }
        }
        self
    }

    /// Sets a field of config.json.
    pub(crate) fn config(mut self, key: &str, value: Value) -> Tiny {
        self.config[key] = value;
        self
    }

    /// Sets a field of tokenizer_config.json.
    pub(crate) fn tokenizer_config(mut self, key: &str, value: Value) -> Tiny {
        self.tokenizer_config[key] = value;
        self
    }

    /// Sets the chat template.
    pub(crate) fn template(self, template: &str) -> Tiny {
        self.tokenizer_config("chat_template", json!(template))
    }

    /// Adds or replaces a file.
    pub(crate) fn file(mut self, name: &str, bytes: impl AsRef<[u8]>) -> Tiny {
        self.files.insert(name.into(), bytes.as_ref().to_vec());
        self
    }

    /// Overwrites an f32 of a tensor.
    pub(crate) fn set(mut self, tensor: &str, index: usize, value: f32) -> Tiny {
        let bytes = &mut self.tensors.get_mut(tensor).expect("a tensor").bytes;
        bytes[index * 4..][..4].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// Changes every f32 tensor that `choose` names to bf16 or f16, by cutting or by rounding towards zero.
    pub(crate) fn cast(mut self, dtype: &'static str, choose: impl Fn(&str) -> bool) -> Tiny {
        for (name, tensor) in &mut self.tensors {
            if choose(name) && tensor.dtype == "F32" {
                let values = tensor.bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                tensor.bytes = match dtype {
                    "BF16" => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
                    "F16" => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
                    _ => panic!("no cast to {dtype}"),
                };
                tensor.dtype = dtype;
            }
        }
        self
    }

    /// Writes the files.
    pub(crate) fn write(&self) -> TinyDir {
        let dir = temporary();
        self.write_to(dir.path());
        TinyDir { dir }
    }

    /// Writes the files into a folder.
    pub(crate) fn write_to(&self, dir: &Path) {
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).expect("writable");
        write("config.json", self.config.to_string().as_bytes());
        write("tokenizer.json", self.tokenizer.to_string().as_bytes());
        write("tokenizer_config.json", self.tokenizer_config.to_string().as_bytes());
        if let Some(config) = &self.generation_config {
            write("generation_config.json", config.to_string().as_bytes());
        }
        write("model.safetensors", &safetensors(&self.tensors));
        self.files.iter().for_each(|(name, bytes)| write(name, bytes));
    }
}

/// A vector of length 4 whose product with itself is the largest.
fn direction(token: usize) -> [f32; HIDDEN] {
    // Bits of a product with an odd number: different for each token.
    let bits = (token as u32 + 1).wrapping_mul(2_654_435_761) >> 16;
    std::array::from_fn(|i| if bits >> i & 1 == 1 { 1.0 } else { -1.0 })
}

/// Tensors as a safetensors file.
pub(crate) fn safetensors(tensors: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), vec![]);
    for (name, tensor) in tensors {
        let offsets = [data.len(), data.len() + tensor.bytes.len()];
        header.insert(name.clone(), json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}));
        data.extend_from_slice(&tensor.bytes);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// A [`Tiny`] on disk.
pub(crate) struct TinyDir {
    dir: TempDir,
}

impl TinyDir {
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The folder, as an argument.
    pub(crate) fn arg(&self) -> String {
        text(self.dir.path())
    }

    /// `tandem COMMAND --model DIR ARGS`, run inside the folder.
    pub(crate) fn run(&self, command: &[&str], args: &[&str]) -> Done {
        let args = [command, &["--model", "."], args].concat();
        finish(super::command(&args).current_dir(self.dir.path()))
    }

    /// Greedy tokens after a raw prompt, as JSON.
    pub(crate) fn generate(&self, prompt: &str, args: &[&str]) -> Done {
        let args = [&["--raw", "--temperature", "0", "--max-tokens", "8", "--json"], args, &[prompt]].concat();
        self.run(&["run"], &args)
    }
}
