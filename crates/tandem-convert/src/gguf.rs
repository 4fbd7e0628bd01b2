//! GGUF files as a source: llama.cpp's names and metadata become Hugging Face's.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};
use tandem_core::config::yarn_mscale;
use tandem_core::gguf::{GgmlType, Gguf, GgufTensor, Value as Meta};
use tandem_core::weights::{Form, MatrixPart, Weight, WeightSpec};
use tandem_core::{CheckpointError, DType, Float, ModelConfig, ModelType};
use tandem_model::{mtp_specs, weight_specs};

use super::gguf_tokenizer;
use super::source::{Source, copy, file_fingerprint};

/// Layers of the deepest model; config.json is held to it too.
const MAX_BLOCKS: usize = 4096;

/// What `--tokenizer DIR` takes from a model.
const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
];

/// A model in GGUF.
pub(super) struct GgufSource {
    path: PathBuf,
    gguf: Gguf,
    config_json: Map<String, Value>,
    config: ModelConfig,
    weights: Vec<Weight>,
    places: Vec<Place>,
    /// Taken from another model instead.
    tokenizer: Option<PathBuf>,
}

/// Where rows of a weight are.
struct Place {
    tensor: GgufTensor,
    rows: Rows,
}

enum Rows {
    /// One after the other.
    Plain,
    /// Pairs of a rotary embedding side by side: heads of this many rows, or elements of a bias.
    Interleaved(usize),
    /// In the joint `attn_kv_b`: heads of this many rows, of which these many are skipped.
    KvB { head: usize, skip: usize },
    /// Columns of `attn_kv_b`: the first `cols` rows of each head of this many.
    KvBTransposed { head: usize },
}

impl GgufSource {
    /// Opens a file; `tokenizer` is a folder whose tokenizer is taken in place of the file's own.
    pub(super) fn open(path: &Path, tokenizer: Option<&Path>) -> anyhow::Result<GgufSource> {
        let gguf = Gguf::open(path)?;
        let config_json = config_json(&gguf).with_context(|| format!("{} cannot be converted", path.display()))?;
        let config = ModelConfig::parse(&Value::Object(config_json.clone()).to_string())?;
        let (mut weights, mut places, mut problems) = (vec![], vec![], vec![]);
        let mut used = HashSet::from(["rope_freqs.weight".to_string()]);
        let mtp = mtp_specs(&config);
        let has_mtp = gguf.names().any(|name| name.contains(".nextn."));
        for spec in weight_specs(&config).into_iter().chain(if has_mtp { mtp } else { vec![] }) {
            match find(&gguf, &config, &spec) {
                Ok((name, place)) => {
                    let dtype = stored_dtype(&gguf, &spec, &place);
                    used.insert(name);
                    weights.push(Weight::nowhere(spec, dtype));
                    places.push(place);
                }
                Err(_) if spec.optional => {}
                Err(problem) => problems.push(problem),
            }
        }
        problems.extend(gguf.names().filter(|name| !used.contains(*name)).map(|name| {
            format!("{name} is in the file but this {} model has no use for it", config.model_type.name())
        }));
        if !problems.is_empty() {
            return Err(CheckpointError::Mismatch { problems }.into());
        }
        let tokenizer = tokenizer.map(Path::to_path_buf);
        match &tokenizer {
            Some(dir) => {
                ensure!(dir.join("tokenizer.json").exists(), "--tokenizer {} has no tokenizer.json", dir.display())
            }
            // What cannot be read is said before any weight is.
            None => drop(gguf_tokenizer::files(&gguf, &config).with_context(|| path.display().to_string())?),
        }
        Ok(GgufSource { path: path.to_path_buf(), gguf, config_json, config, weights, places, tokenizer })
    }
}

impl GgufSource {
    /// About where rows are in their tensor.
    fn byte_range(&self, weight: usize, part: usize, rows: Range<usize>) -> Range<usize> {
        let (stack, n_rows, _) = self.weights[weight].spec.dims();
        let bytes = self.gguf.bytes(&self.places[weight].tensor).len();
        let at = |row: usize| bytes / (stack * n_rows).max(1) * (part * n_rows + row);
        at(rows.start)..at(rows.end)
    }
}

impl Source for GgufSource {
    fn config_json(&self) -> &Map<String, Value> {
        &self.config_json
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn weights(&self) -> &[Weight] {
        &self.weights
    }

    fn rows(&self, weight: usize, part: usize, rows: Range<usize>) -> Result<MatrixPart, CheckpointError> {
        let (Weight { spec, dtype, .. }, Place { tensor, rows: layout }) =
            (&self.weights[weight], &self.places[weight]);
        let (_, n_rows, cols) = spec.dims();
        let data = self.gguf.bytes(tensor);
        let ggml_type = tensor.ggml_type;
        if let (Rows::Interleaved(head), Form::Vector) = (layout, spec.form) {
            let mut values = vec![0.0; cols];
            ggml_type.dequantize_row(&data, &mut values);
            let mut out = vec![];
            let DType::Float(float) = dtype else { unreachable!("vectors are floats") };
            (0..cols).for_each(|i| float.write(values[interleaved(*head, i)], &mut out));
            return Ok(MatrixPart { weight: out.into(), ..MatrixPart::default() });
        }
        let (block, size) = ggml_type.block();
        let width = *tensor.shape.last().unwrap_or(&1);
        let row_bytes = width / block * size;
        let stored = |row: usize| &data[row * row_bytes..(row + 1) * row_bytes];
        let (mut out, mut scales, mut biases) = (vec![], vec![], vec![]);
        if let Rows::KvBTransposed { head } = layout {
            let mut columns = vec![0.0; cols * width];
            for (i, column) in columns.chunks_exact_mut(width).enumerate() {
                ggml_type.dequantize_row(stored(part * head + i), column);
            }
            for latent in rows {
                (0..cols).for_each(|i| Float::F32.write(columns[i * width + latent], &mut out));
            }
        } else {
            let mut values = vec![0.0; cols];
            for row in rows.clone() {
                let row = match layout {
                    Rows::Plain => part * n_rows + row,
                    Rows::Interleaved(head) => interleaved(*head, row),
                    Rows::KvB { head, skip } => part * head + skip + row,
                    Rows::KvBTransposed { .. } => unreachable!("handled above"),
                };
                match dtype {
                    DType::Float(float) if ggml_type.exact() != Some(*dtype) => {
                        ggml_type.dequantize_row(stored(row), &mut values);
                        values.iter().for_each(|value| float.write(*value, &mut out));
                    }
                    _ => ggml_type.repack_row(stored(row), &mut out, &mut scales, &mut biases),
                }
            }
            let infinite = |bytes: &[u8]| (0..bytes.len() / 2).find(|i| !Float::F16.read(bytes, *i).is_finite());
            if let DType::Affine { .. } = dtype
                && let Some(index) = infinite(&scales).or(infinite(&biases))
            {
                return Err(CheckpointError::BadScale { tensor: spec.module.clone(), index });
            }
        }
        Ok(MatrixPart { weight: out.into(), scales: scales.into(), biases: biases.into(), global_scale: None })
    }

    fn prefetch(&self, weight: usize, part: usize, rows: Range<usize>) {
        self.gguf.prefetch(&self.places[weight].tensor, self.byte_range(weight, part, rows));
    }

    fn release(&self, weight: usize, part: usize, rows: Range<usize>) {
        self.gguf.release(&self.places[weight].tensor, self.byte_range(weight, part, rows));
    }

    fn close(&self, weight: usize) {
        let tensor = &self.places[weight].tensor;
        self.gguf.release(tensor, 0..self.gguf.bytes(tensor).len());
    }

    fn write_other_files(&self, out: &Path) -> anyhow::Result<()> {
        let Some(dir) = &self.tokenizer else {
            return gguf_tokenizer::write(&self.gguf, &self.config, out)
                .with_context(|| self.path.display().to_string());
        };
        for name in TOKENIZER_FILES {
            let path = dir.join(name);
            if path.exists() {
                copy(&path, &out.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn fingerprint(&self) -> String {
        file_fingerprint(&self.path)
    }
}

/// Where llama.cpp keeps row `row` of heads of `head` rows.
fn interleaved(head: usize, row: usize) -> usize {
    let (start, i) = (row / head * head, row % head);
    start + if i < head / 2 { 2 * i } else { 2 * (i - head / 2) + 1 }
}

/// The format in which rows are handed out: the exact one, or floats. Vectors are of the model's type where that is
/// exact, as MLX keeps them.
fn stored_dtype(gguf: &Gguf, spec: &WeightSpec, place: &Place) -> DType {
    let exact = place.tensor.ggml_type.exact().filter(|_| !matches!(place.rows, Rows::KvBTransposed { .. }));
    if spec.form == Form::Vector && exact == Some(DType::F32) && spec.leaf != "e_score_correction_bias" {
        let bytes = gguf.bytes(&place.tensor);
        let fits = bytes.chunks_exact(4).all(|value| {
            let value = Float::F32.read(value, 0);
            half::f16::from_f32(value).to_f32() == value
        });
        return if fits { DType::F16 } else { DType::F32 };
    }
    exact.unwrap_or(DType::F32)
}

/// llama.cpp's name of a decoder weight's module.
fn module_name(name: &str) -> Option<&'static str> {
    Some(match name {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_a_proj" => "attn_q_a",
        "self_attn.q_a_layernorm" => "attn_q_a_norm",
        "self_attn.q_b_proj" => "attn_q_b",
        "self_attn.kv_a_proj_with_mqa" => "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm" => "attn_kv_a_norm",
        "self_attn.embed_q" => "attn_k_b",
        "self_attn.unembed_out" => "attn_v_b",
        "self_attn.indexer.wq_b" => "indexer.attn_q_b",
        "self_attn.indexer.wk" => "indexer.attn_k",
        "self_attn.indexer.k_norm" => "indexer.k_norm",
        "self_attn.indexer.weights_proj" => "indexer.proj",
        "mlp.gate" => "ffn_gate_inp",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.switch_mlp.gate_proj" => "ffn_gate_exps",
        "mlp.switch_mlp.up_proj" => "ffn_up_exps",
        "mlp.switch_mlp.down_proj" => "ffn_down_exps",
        "mlp.shared_experts.gate_proj" => "ffn_gate_shexp",
        "mlp.shared_experts.up_proj" => "ffn_up_shexp",
        "mlp.shared_experts.down_proj" => "ffn_down_shexp",
        "eh_proj" => "nextn.eh_proj",
        "enorm" => "nextn.enorm",
        "hnorm" => "nextn.hnorm",
        "embed_tokens" => "nextn.embed_tokens",
        "shared_head.head" => "nextn.shared_head_head",
        "shared_head.norm" => "nextn.shared_head_norm",
        _ => return None,
    })
}

fn tensor_name(spec: &WeightSpec) -> Option<String> {
    let module = spec.module.strip_prefix("model.").unwrap_or(&spec.module);
    if let Some((layer, rest)) = module.strip_prefix("layers.").and_then(|m| m.split_once('.')) {
        return Some(match spec.leaf {
            "e_score_correction_bias" => format!("blk.{layer}.exp_probs_b.bias"),
            leaf => format!("blk.{layer}.{}.{leaf}", module_name(rest)?),
        });
    }
    let name = match module {
        "embed_tokens" => "token_embd",
        "norm" => "output_norm",
        "lm_head" => "output",
        _ => return None,
    };
    Some(format!("{name}.{}", spec.leaf))
}

/// Finds a weight's tensor, or says what is wrong.
fn find(gguf: &Gguf, config: &ModelConfig, spec: &WeightSpec) -> Result<(String, Place), String> {
    let (stack, rows, cols) = spec.dims();
    let name = tensor_name(spec).ok_or_else(|| format!("GGUF has no name for {}", spec.module))?;
    let (name, layout, n_rows, width) = match (gguf.tensor(&name), spec.form, &config.mla) {
        (None, Form::EmbedQ | Form::UnembedOut, Some(mla)) => {
            let joint = name.replace("attn_k_b", "attn_kv_b").replace("attn_v_b", "attn_kv_b");
            let head = mla.qk_nope_head_dim + mla.v_head_dim;
            let layout = match spec.form {
                Form::EmbedQ => Rows::KvBTransposed { head },
                _ => Rows::KvB { head, skip: mla.qk_nope_head_dim },
            };
            (joint, layout, stack * head, mla.kv_lora_rank)
        }
        _ if config.model_type == ModelType::Llama && (name.contains(".attn_q.") || name.contains(".attn_k.")) => {
            (name, Rows::Interleaved(config.head_dim), stack * rows, cols)
        }
        _ => (name, Rows::Plain, stack * rows, cols),
    };
    let tensor = gguf.tensor(&name).ok_or_else(|| format!("{name} is missing"))?;
    let found = (tensor.shape.iter().rev().skip(1).product::<usize>(), tensor.shape.last().copied().unwrap_or(0));
    if found != (n_rows, width) {
        return Err(format!("{name} has shape {:?}, expected {n_rows} rows of {width}", tensor.shape));
    }
    if spec.form == Form::Vector && !matches!(tensor.ggml_type.exact(), Some(DType::Float(_))) {
        return Err(format!("{name} has ggml type {:?}, expected F32, F16 or BF16", tensor.ggml_type));
    }
    Ok((name, Place { tensor: tensor.clone(), rows: layout }))
}

/// config.json from the metadata.
fn config_json(gguf: &Gguf) -> anyhow::Result<Map<String, Value>> {
    let architecture = gguf.get("general.architecture").and_then(Meta::as_str).unwrap_or_default().to_string();
    let get = |key: &str| gguf.get(&format!("{architecture}.{key}"));
    let size = |key: &str| {
        get(key)
            .and_then(Meta::as_usize)
            .with_context(|| format!("its metadata must have a number {architecture}.{key}; the file is incomplete"))
    };
    let number = |key: &str| get(key).and_then(Meta::as_f64).map(shortest);
    for (key, found) in gguf.metadata().filter_map(|(key, value)| Some((key, value.as_f64()?))) {
        ensure!(found.is_finite(), "its metadata has {key} = {found}, expected a finite number");
    }
    let (model_type, class) = match architecture.as_str() {
        "llama" => ("llama", "LlamaForCausalLM"),
        "glm-dsa" => ("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
        "deepseek32" => ("deepseek_v32", "DeepseekV32ForCausalLM"),
        "deepseek2" => ("deepseek_v3", "DeepseekV3ForCausalLM"),
        other => bail!("its architecture is {other:?}; read are llama, deepseek2, deepseek32 and glm-dsa"),
    };
    let n_tokens = gguf.get("tokenizer.ggml.tokens").and_then(Meta::as_list).map(<[Meta]>::len);
    let vocab_size = match gguf.tensor("token_embd.weight") {
        Some(tensor) => tensor.shape[0],
        None => get("vocab_size").and_then(Meta::as_usize).or(n_tokens).unwrap_or(0),
    };
    let nextn = get("nextn_predict_layers").and_then(Meta::as_usize).unwrap_or(0);
    // Before anything is made for each of them.
    let n_blocks = size("block_count")?;
    ensure!(
        n_blocks <= MAX_BLOCKS && nextn <= n_blocks,
        "its metadata has {architecture}.block_count = {n_blocks} with {nextn} layers for drafting, expected at most {MAX_BLOCKS}"
    );
    let n_layers = n_blocks - nextn;
    let heads = size("attention.head_count")?;
    let hidden = size("embedding_length")?;
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "torch_dtype": "float16",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length")?,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv").and_then(Meta::as_usize).unwrap_or(heads),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon").unwrap_or(1e-6),
        "max_position_embeddings": size("context_length")?,
        "tie_word_embeddings": gguf.tensor("output.weight").is_none(),
        "attention_bias": gguf.tensor("blk.0.attn_q.bias").is_some(),
        "hidden_act": "silu",
    });
    let theta = number("rope.freq_base").unwrap_or(10000.0);
    let extra = if model_type == "llama" {
        json!({
            "head_dim": get("attention.key_length").or(get("rope.dimension_count")).and_then(Meta::as_usize).unwrap_or(hidden / heads.max(1)),
            "mlp_bias": false,
            "rope_theta": theta,
        })
    } else {
        let rope = size("rope.dimension_count")?;
        let key = get("attention.key_length_mla")
            .and_then(Meta::as_usize)
            .map_or_else(|| size("attention.key_length"), Ok)?;
        let value = get("attention.value_length_mla")
            .and_then(Meta::as_usize)
            .map_or_else(|| size("attention.value_length"), Ok)?;
        if get("expert_gating_func").and_then(Meta::as_usize) != Some(2) {
            bail!("its routing is not by sigmoid (expert_gating_func 2), which is what DeepSeek-V3 and GLM-5 use");
        }
        json!({
            "moe_intermediate_size": size("expert_feed_forward_length")?,
            "first_k_dense_replace": get("leading_dense_block_count").and_then(Meta::as_usize).unwrap_or(0),
            "moe_layer_freq": 1,
            "n_routed_experts": size("expert_count")?,
            "num_experts_per_tok": size("expert_used_count")?,
            "n_shared_experts": get("expert_shared_count").and_then(Meta::as_usize).unwrap_or(0),
            "n_group": get("expert_group_count").and_then(Meta::as_usize).unwrap_or(1),
            "topk_group": get("expert_group_used_count").and_then(Meta::as_usize).unwrap_or(1),
            "norm_topk_prob": get("expert_weights_norm").and_then(Meta::as_bool).unwrap_or(true),
            "routed_scaling_factor": number("expert_weights_scale").unwrap_or(1.0),
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "q_lora_rank": get("attention.q_lora_rank").and_then(Meta::as_usize),
            "kv_lora_rank": size("attention.kv_lora_rank")?,
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": key.checked_sub(rope).context("its key length is smaller than its rotary dimension")?,
            "v_head_dim": value,
            "head_dim": rope,
            "rope_theta": theta,
            "num_nextn_predict_layers": nextn,
        })
    };
    let mut add = |more: Value| {
        if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
            config.extend(more.into_iter().filter(|(_, value)| !value.is_null()));
        }
    };
    add(extra);
    if model_type == "glm_moe_dsa" || model_type == "deepseek_v32" {
        add(json!({
            "index_n_heads": size("attention.indexer.head_count")?,
            "index_head_dim": size("attention.indexer.key_length")?,
            "index_topk": size("attention.indexer.top_k")?,
            "indexer_types": (0..n_layers).map(|l| {
                if gguf.tensor(&format!("blk.{l}.indexer.attn_k.weight")).is_some() { "full" } else { "shared" }
            }).collect::<Vec<_>>(),
        }));
    }
    if model_type == "glm_moe_dsa" {
        add(json!({"indexer_rope_interleave": true, "rope_interleave": true}));
    }
    let original = || match get("rope.scaling.original_context_length") {
        Some(_) => size("rope.scaling.original_context_length"),
        None => size("context_length"),
    };
    // As llama.cpp reads them: the old key, linear if only a factor is there, and a factor of 0 for none.
    let factor = number("rope.scaling.factor").or(number("rope.scale_linear")).filter(|factor| *factor != 0.0);
    let kind = get("rope.scaling.type").and_then(Meta::as_str).unwrap_or("linear");
    let attention =
        number("rope.scaling.attn_factor").unwrap_or(1.0) * number("rope.scaling.yarn_attn_factor").unwrap_or(1.0);
    ensure!(
        attention == 1.0 || kind == "yarn",
        "it has rope.scaling.attn_factor without yarn, which no configuration of Hugging Face says"
    );
    if let Some(found) = number("rope.scaling.yarn_ext_factor").filter(|factor| *factor != 1.0 && *factor >= 0.0) {
        bail!("its rope.scaling.yarn_ext_factor is {found}; read is 1");
    }
    match kind {
        "none" => {}
        "linear" => {
            if let Some(factor) = factor.filter(|factor| *factor != 1.0) {
                add(json!({"rope_scaling": {"rope_type": "linear", "factor": factor}}));
            }
        }
        "yarn" => {
            let factor = factor.unwrap_or(1.0);
            let log = number("rope.scaling.yarn_log_multiplier").map(|m| shortest(m * 10.0));
            let mut scaling = json!({
                "type": "yarn",
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original()?,
                "beta_fast": number("rope.scaling.yarn_beta_fast").unwrap_or(32.0),
                "beta_slow": number("rope.scaling.yarn_beta_slow").unwrap_or(1.0),
                "mscale": log.unwrap_or(1.0),
                "mscale_all_dim": log.unwrap_or(0.0),
            });
            if attention != 1.0 {
                // llama.cpp's factor is on top of yarn's own.
                let own = if log.is_some() { 1.0 } else { yarn_mscale(factor, 1.0) };
                scaling["attention_factor"] = json!(shortest(attention * own));
            }
            add(json!({"rope_scaling": scaling}));
        }
        other => bail!("its rope scaling is {other:?}; read are linear and yarn"),
    }
    if let Some(scaling) = llama3_scaling(gguf, theta)? {
        add(json!({"rope_scaling": scaling}));
    }
    for (key, name) in [("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")] {
        if let Some(id) = gguf.get(&format!("tokenizer.ggml.{key}_token_id")).and_then(Meta::as_usize) {
            add(json!({name: id}));
        }
    }
    let Value::Object(config) = config else { unreachable!("made above") };
    Ok(config)
}

/// Llama 3.1's scaling is stored as its result, one divisor per frequency; finds the parameters that give it.
fn llama3_scaling(gguf: &Gguf, theta: f64) -> anyhow::Result<Option<Value>> {
    let Some(tensor) = gguf.tensor("rope_freqs.weight").filter(|t| t.ggml_type == GgmlType::F32) else {
        return Ok(None);
    };
    let bytes = gguf.bytes(tensor);
    let divisors: Vec<f64> = bytes.chunks_exact(4).map(|b| f64::from(Float::F32.read(b, 0))).collect();
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    let (low, high, original) = (1.0, 4.0, 8192.0);
    for (i, divisor) in divisors.iter().enumerate() {
        let wavelength = 2.0 * std::f64::consts::PI * theta.powf(i as f64 / divisors.len() as f64);
        let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        let expected = 1.0 / ((1.0 - smooth) / factor + smooth);
        // Written so that NaN is refused.
        let off = (expected / divisor - 1.0).abs();
        if off.is_nan() || off > 1e-3 {
            bail!("its rope_freqs are not Llama 3.1's for a trained context of 8192; this scaling is not read");
        }
    }
    Ok(Some(json!({
        "rope_type": "llama3",
        "factor": shortest(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    })))
}

/// An f32 that was widened to f64, as the shortest decimal that names it: 1e-5, not 0.00000999999974.
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}
