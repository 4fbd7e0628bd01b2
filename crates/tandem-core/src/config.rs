//! `config.json` of a checkpoint: Hugging Face field names, validated on parse.
//!
//! One [`ModelConfig`] serves every family; what a family lacks is `None`. Nothing here reads weights.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, text_name};
use crate::dtype::{DType, Float};
use crate::json::without_literals;

/// Why a `config.json` cannot be used. Every message says what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}. Expected a model directory that holds config.json")]
    Read {
        /// The file.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// Not JSON, or a field has the wrong type.
    #[error("{path} is not a valid model configuration: {message}")]
    Parse {
        /// The file.
        path: String,
        /// What the parser said.
        message: String,
    },
    /// A `model_type` this engine does not run.
    #[error(
        "model_type is {found:?}; supported are {}. Pick a checkpoint of one of these families",
        ModelType::names()
    )]
    UnknownModelType {
        /// What the file says.
        found: String,
    },
    /// A field is absent.
    #[error("config.json of a {model_type} model must have {field:?}; add it or use a complete checkpoint")]
    Missing {
        /// The field.
        field: &'static str,
        /// The family.
        model_type: &'static str,
    },
    /// Fields contradict each other or are out of range.
    #[error("config.json: {0}")]
    Invalid(String),
}

/// The families this engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelType {
    /// GLM-5, 5.1, 5.2, 5.3.
    GlmMoeDsa,
    /// DeepSeek-V3.2.
    DeepseekV32,
    /// DeepSeek-V3 / R1: no indexer.
    DeepseekV3,
    /// GLM-4.7-Flash: DeepSeek-V3's arithmetic.
    Glm4MoeLite,
    /// Llama and its look-alikes.
    Llama,
}

impl ModelType {
    /// All of them.
    pub const ALL: [ModelType; 5] =
        [ModelType::GlmMoeDsa, ModelType::DeepseekV32, ModelType::DeepseekV3, ModelType::Glm4MoeLite, ModelType::Llama];

    /// The `model_type` string.
    pub const fn name(self) -> &'static str {
        self.parts().name
    }

    /// What a configuration of this type has: one line per type.
    const fn parts(self) -> Parts {
        const DEEPSEEK: Parts = Parts { name: "deepseek_v3", mla: true, moe: true, mtp: true, indexer: None };
        match self {
            ModelType::GlmMoeDsa => Parts { name: "glm_moe_dsa", indexer: Some(true), ..DEEPSEEK },
            ModelType::DeepseekV32 => Parts { name: "deepseek_v32", indexer: Some(false), ..DEEPSEEK },
            ModelType::DeepseekV3 => DEEPSEEK,
            ModelType::Glm4MoeLite => Parts { name: "glm4_moe_lite", ..DEEPSEEK },
            ModelType::Llama => Parts { name: "llama", mla: false, moe: false, mtp: false, indexer: None },
        }
    }

    /// All names in a sentence.
    fn names() -> String {
        let (last, others) = ModelType::ALL.split_last().expect("there are some");
        format!("{} and {}", others.iter().map(|t| t.name()).collect::<Vec<_>>().join(", "), last.name())
    }

    fn parse(name: &str) -> Result<ModelType, ConfigError> {
        let found = ModelType::ALL.into_iter().find(|t| t.name() == name);
        found.ok_or_else(|| ConfigError::UnknownModelType { found: name.to_string() })
    }
}

/// The sections that configurations of one `model_type` have. Which are there follows from the type, never from the
/// fields that a file happens to hold.
struct Parts {
    name: &'static str,
    /// Multi-head latent attention; else grouped-query attention.
    mla: bool,
    /// Routed experts.
    moe: bool,
    /// Multi-token-prediction layers.
    mtp: bool,
    /// An indexer, and whether its rotary pairs are (2i, 2i+1) where the file does not say.
    indexer: Option<bool>,
}

/// Frequencies of rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParameters {
    /// Base of the geometric progression.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071), as Hugging Face's `_compute_yarn_parameters`.
    Yarn {
        /// Context extension factor.
        factor: f64,
        /// Trained context.
        original_max_position_embeddings: f64,
        /// Rotations above which a dimension is extrapolated.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Temperature of cos and sin.
        mscale: Option<f64>,
        /// Temperature of the softmax, and divisor of `mscale`.
        mscale_all_dim: Option<f64>,
        /// Overrides the scaling of cos and sin.
        attention_factor: Option<f64>,
        /// Round the correction range to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1's piecewise scaling.
    Llama3 {
        /// Division of low frequencies.
        factor: f64,
        /// Wavelength border of low frequencies, in trained contexts.
        low_freq_factor: f64,
        /// Wavelength border of high frequencies, in trained contexts.
        high_freq_factor: f64,
        /// Trained context.
        original_max_position_embeddings: f64,
    },
}

/// YaRN's attention temperature `0.1 * mscale * ln(factor) + 1` (1 for factors up to 1).
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl RopeParameters {
    /// Inverse frequencies of a rotary embedding over `dim` dimensions: `[dim / 2]`, rounded to f32 as the references do.
    pub fn inv_freq(&self, dim: usize) -> Vec<f32> {
        let base: Vec<f64> = (0..dim / 2).map(|i| self.theta.powf(-((2 * i) as f64) / dim as f64)).collect();
        let scaled: Vec<f64> = match &self.scaling {
            RopeScaling::Default => base,
            RopeScaling::Linear { factor } => base.iter().map(|f| f / factor).collect(),
            RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } => {
                let correction_dim = |rotations: f64| {
                    dim as f64 * (original_max_position_embeddings / (rotations * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (correction_dim(*beta_fast), correction_dim(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                low = low.max(0.0);
                high = high.min(dim as f64 - 1.0);
                if low == high {
                    high += 0.001;
                }
                base.iter()
                    .enumerate()
                    .map(|(i, f)| {
                        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        f / factor * ramp + f * (1.0 - ramp)
                    })
                    .collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: trained,
            } => base
                .iter()
                .map(|f| {
                    let wavelength = 2.0 * std::f64::consts::PI / f;
                    if wavelength > trained / low_freq_factor {
                        f / factor
                    } else if wavelength < trained / high_freq_factor {
                        *f
                    } else {
                        let smooth = (trained / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
        };
        scaled.into_iter().map(|f| f as f32).collect()
    }

    /// Factor on cos and sin (1 unless YaRN asks otherwise).
    pub fn attention_scaling(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn { factor, mscale, mscale_all_dim, attention_factor, .. } => {
                let value = match (attention_factor, mscale, mscale_all_dim) {
                    (Some(value), _, _) => *value,
                    (None, Some(m), Some(all)) if *m != 0.0 && *all != 0.0 => {
                        yarn_mscale(*factor, *m) / yarn_mscale(*factor, *all)
                    }
                    _ => yarn_mscale(*factor, 1.0),
                };
                value as f32
            }
            _ => 1.0,
        }
    }

    /// Factor on MLA's softmax scale: `yarn_mscale(factor, mscale_all_dim)^2` under YaRN, else 1.
    pub fn softmax_scaling(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn { factor, mscale_all_dim: Some(all), .. } if *all != 0.0 => {
                yarn_mscale(*factor, *all).powi(2) as f32
            }
            _ => 1.0,
        }
    }
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
#[derive(Clone, Debug, PartialEq)]
pub struct MlaConfig {
    /// Rank of the query bottleneck; `None` means queries are projected directly.
    pub q_lora_rank: Option<usize>,
    /// Width of the cached latent.
    pub kv_lora_rank: usize,
    /// Head dimensions without position.
    pub qk_nope_head_dim: usize,
    /// Head dimensions with rotary position, shared by all heads' keys.
    pub qk_rope_head_dim: usize,
    /// Value head dimensions.
    pub v_head_dim: usize,
    /// Rotary pairs are (2i, 2i+1) instead of (i, i + dim/2).
    pub rope_interleave: bool,
}

/// Routed experts (DeepSeek-V3, arXiv 2412.19437).
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts per layer.
    pub n_routed_experts: usize,
    /// Experts chosen per token.
    pub num_experts_per_tok: usize,
    /// Shared experts, run as one MLP of `n_shared_experts * moe_intermediate_size`.
    pub n_shared_experts: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Expert groups for group-limited routing.
    pub n_group: usize,
    /// Groups kept per token.
    pub topk_group: usize,
    /// Divide the chosen scores by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the routed output.
    pub routed_scaling_factor: f32,
    /// For each decoder layer, true when its MLP is a mixture of experts.
    pub sparse_layers: Vec<bool>,
}

/// The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2).
#[derive(Clone, Debug, PartialEq)]
pub struct IndexerConfig {
    /// Indexer heads.
    pub index_n_heads: usize,
    /// Indexer head dimension.
    pub index_head_dim: usize,
    /// Positions kept per query.
    pub index_topk: usize,
    /// Rotary pairs of the indexer are (2i, 2i+1).
    pub rope_interleave: bool,
    /// For each decoder layer, true when it has an indexer of its own; others reuse the last one's selection.
    pub full_layers: Vec<bool>,
}

/// One module's quantisation as MLX writes it: `{group_size, bits, mode}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "RawQuantization")]
pub struct ModuleQuantization {
    /// Elements per scale.
    pub group_size: usize,
    /// Bits per element.
    pub bits: usize,
    /// affine, mxfp4, mxfp8 or nvfp4.
    pub mode: String,
}

/// An entry as it is written: what is left out has the default of its mode, as in MLX's `nn.quantize`.
#[derive(Deserialize)]
struct RawQuantization {
    group_size: Option<usize>,
    bits: Option<usize>,
    mode: Option<String>,
}

impl From<RawQuantization> for ModuleQuantization {
    fn from(raw: RawQuantization) -> ModuleQuantization {
        let mode = raw.mode.unwrap_or_else(|| "affine".to_string());
        let (group_size, bits) = match mode.as_str() {
            "mxfp4" => (32, 4),
            "mxfp8" => (32, 8),
            "nvfp4" => (16, 4),
            _ => (64, 4),
        };
        ModuleQuantization { group_size: raw.group_size.unwrap_or(group_size), bits: raw.bits.unwrap_or(bits), mode }
    }
}

impl ModuleQuantization {
    /// The storage format, with scales and biases of type `params` for affine.
    ///
    /// # Errors
    /// A message when mode, bits and group size do not name a supported format.
    pub fn dtype(&self, params: Float) -> Result<DType, ConfigError> {
        match (self.mode.as_str(), self.bits, self.group_size) {
            ("affine", bits @ (2 | 3 | 4 | 5 | 6 | 8), group @ (32 | 64 | 128)) => {
                Ok(DType::Affine { bits: bits as u8, group_size: group as u16, params })
            }
            ("mxfp4", 4, 32) => Ok(DType::Mxfp4),
            ("mxfp8", 8, 32) => Ok(DType::Mxfp8),
            ("nvfp4", 4, 16) => Ok(DType::Nvfp4),
            (mode, bits, group) => Err(ConfigError::Invalid(format!(
                "quantization mode {mode:?} with {bits} bits and group_size {group} is not supported; supported are \
                 affine (2, 3, 4, 5, 6, 8 bits; groups 32, 64, 128), mxfp4 (4, 32), mxfp8 (8, 32) and nvfp4 (4, 16)"
            ))),
        }
    }
}

/// Quantisation settings of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantizationConfig {
    /// Applies to every module that has scales and no entry of its own.
    pub default: Option<ModuleQuantization>,
    /// Entries by module path; `None` is an explicit "not quantised".
    pub modules: HashMap<String, Option<ModuleQuantization>>,
    /// The checkpoint is Hugging Face FP8 with 128 x 128 blocks.
    pub fp8_block: bool,
}

impl QuantizationConfig {
    /// The settings of `module`: its own entry, else the default.
    pub fn for_module(&self, module: &str) -> Option<&ModuleQuantization> {
        match self.modules.get(module) {
            Some(entry) => entry.as_ref(),
            None => self.default.as_ref(),
        }
    }

    fn parse(raw: &RawConfig) -> Result<QuantizationConfig, ConfigError> {
        let invalid = |message: String| ConfigError::Invalid(message);
        let mut config = QuantizationConfig::default();
        if raw.quantization.is_none()
            && let Some(hf) = &raw.quantization_config
            && let Some(method) = hf.get("quant_method")
        {
            let block: Option<Vec<usize>> =
                hf.get("weight_block_size").and_then(|v| serde_json::from_value(v.clone()).ok());
            let format = hf.get("format").and_then(Value::as_str);
            match (method.as_str(), block.as_deref()) {
                (Some("fp8"), Some([128, 128])) => config.fp8_block = true,
                // The tensors' names and types say the rest.
                (Some("mxfp4"), _) => {}
                (Some("compressed-tensors"), _) if format == Some("mxfp4-pack-quantized") => {}
                (Some("compressed-tensors"), _) => {
                    return Err(invalid(format!(
                        "quantization_config.format {format:?} is not supported; of compressed-tensors, only \
                         \"mxfp4-pack-quantized\" is. Pick an unquantised or fp8 checkpoint and convert that"
                    )));
                }
                (Some("fp8"), found) => {
                    return Err(invalid(format!(
                        "quantization_config.weight_block_size must be [128, 128] for fp8, found {found:?}; \
                         convert the checkpoint"
                    )));
                }
                (other, _) => {
                    return Err(invalid(format!(
                        "quantization_config.quant_method {other:?} is not supported; expected \"fp8\", \"mxfp4\", \
                         \"compressed-tensors\" or an MLX \"quantization\" section. Pick an unquantised or fp8 \
                         checkpoint and convert that"
                    )));
                }
            }
            return Ok(config);
        }
        // mlx-lm writes the same object under both names.
        let Some(section) = raw.quantization.as_ref().or(raw.quantization_config.as_ref()) else {
            return Ok(config);
        };
        let mut default = serde_json::Map::new();
        for (key, value) in section {
            match value {
                Value::Object(_) => {
                    let entry: ModuleQuantization = serde_json::from_value(value.clone())
                        .map_err(|e| invalid(format!("quantization.{key:?} is not {{group_size, bits, mode}}: {e}")))?;
                    entry.dtype(Float::BF16)?;
                    config.modules.insert(text_name(key), Some(entry));
                }
                Value::Bool(false) => {
                    config.modules.insert(text_name(key), None);
                }
                Value::Bool(true) => {} // "quantised with the default", which needs no entry
                _ => {
                    default.insert(key.clone(), value.clone());
                }
            }
        }
        if ["bits", "group_size", "mode"].iter().any(|key| default.contains_key(*key)) {
            let entry: ModuleQuantization = serde_json::from_value(Value::Object(default))
                .map_err(|e| invalid(format!("quantization is not {{group_size, bits, mode}}: {e}")))?;
            entry.dtype(Float::BF16)?;
            config.default = Some(entry);
        }
        Ok(config)
    }
}

/// A checkpoint's configuration, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub model_type: ModelType,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense MLP.
    pub intermediate_size: usize,
    /// Decoder layers, MTP layers not counted.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads (grouped-query attention; unused by MLA).
    pub num_key_value_heads: usize,
    /// Dimensions of one head (unused by MLA).
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f32,
    /// Longest position the model was made for.
    pub max_position_embeddings: usize,
    /// lm_head is the embedding.
    pub tie_word_embeddings: bool,
    /// Attention projections carry biases.
    pub attention_bias: bool,
    /// Element type of unquantised weights.
    pub float: Float,
    /// Rotary position embedding.
    pub rope: RopeParameters,
    /// End-of-text token ids (generation_config.json's list wins over these).
    pub eos_token_id: Vec<u32>,
    /// Multi-token-prediction layers the checkpoint may carry.
    pub num_nextn_predict_layers: usize,
    /// MLA, for the DeepSeek line.
    pub mla: Option<MlaConfig>,
    /// Mixture of experts, for the DeepSeek line.
    pub moe: Option<MoeConfig>,
    /// Sparse attention's indexer.
    pub indexer: Option<IndexerConfig>,
    /// How weights are quantised.
    pub quantization: QuantizationConfig,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// The file as it stands; every field optional so that absence gets our own message.
#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<BTreeMap<String, Value>>,
    rope_parameters: Option<BTreeMap<String, Value>>,
    rope_interleave: Option<bool>,
    eos_token_id: Option<OneOrMany>,
    num_nextn_predict_layers: Option<usize>,
    q_lora_rank: Option<usize>,
    kv_lora_rank: Option<usize>,
    qk_nope_head_dim: Option<usize>,
    qk_rope_head_dim: Option<usize>,
    v_head_dim: Option<usize>,
    n_routed_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    n_shared_experts: Option<usize>,
    moe_intermediate_size: Option<usize>,
    first_k_dense_replace: Option<usize>,
    moe_layer_freq: Option<usize>,
    mlp_layer_types: Option<Vec<String>>,
    n_group: Option<usize>,
    topk_group: Option<usize>,
    norm_topk_prob: Option<bool>,
    routed_scaling_factor: Option<f64>,
    scoring_func: Option<String>,
    topk_method: Option<String>,
    index_n_heads: Option<usize>,
    index_head_dim: Option<usize>,
    index_topk: Option<usize>,
    indexer_rope_interleave: Option<bool>,
    indexer_types: Option<Vec<String>>,
    index_topk_pattern: Option<String>,
    index_topk_freq: Option<usize>,
    index_skip_topk_offset: Option<usize>,
    quantization: Option<BTreeMap<String, Value>>,
    quantization_config: Option<BTreeMap<String, Value>>,
}

/// Sizes above this are a damaged file, not a model; it keeps products of two sizes far from overflow.
const MAX_SIZE: usize = 1 << 24;
/// More parameters than this are a damaged file too; it keeps sums of bytes far from overflow.
const MAX_PARAMETERS: f64 = 1e14;

impl ModelConfig {
    /// Reads and validates `dir/config.json`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(dir: &Path) -> Result<ModelConfig, ConfigError> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path)
            .map_err(|source| ConfigError::Read { path: path.display().to_string(), source })?;
        Self::parse(&text).map_err(|e| match e {
            ConfigError::Parse { message, .. } => ConfigError::Parse { path: path.display().to_string(), message },
            other => other,
        })
    }

    /// Parses and validates the text of a `config.json`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
        let malformed =
            |e: serde_json::Error| ConfigError::Parse { path: "config.json".to_string(), message: e.to_string() };
        let text = without_literals(text);
        let raw: RawConfig = serde_json::from_str(&text).map_err(malformed)?;
        let raw = match wrapped(&text, &raw) {
            Some(inner) => serde_json::from_value(inner).map_err(malformed)?,
            None => raw,
        };
        let found = raw.model_type.clone().unwrap_or_default();
        let model_type = ModelType::parse(&found)?;
        Fields { raw: &raw, model_type }.build()
    }

    /// Gives a model that ties its head to the embedding its own head if the checkpoint has a different one, as
    /// transformers does; true if so.
    pub fn settle_tie(&mut self, checkpoint: &Checkpoint) -> bool {
        let leaves = |module: &str| -> Vec<String> {
            let names = checkpoint.names().filter_map(|name| name.strip_prefix(module)?.strip_prefix('.'));
            names.map(str::to_string).collect()
        };
        let (head, embedding) = ("lm_head", "model.embed_tokens");
        let is_same = |leaf: &String| {
            let (a, b) = (format!("{head}.{leaf}"), format!("{embedding}.{leaf}"));
            let type_of = |name: &str| checkpoint.info(name).map(|info| (info.dtype, info.shape.clone()));
            type_of(&a) == type_of(&b) && checkpoint.bytes(&a) == checkpoint.bytes(&b)
        };
        let found = leaves(head);
        let differs = self.tie_word_embeddings
            && checkpoint.has_data()
            && !found.is_empty()
            && (found != leaves(embedding) || !found.iter().all(is_same));
        self.tie_word_embeddings &= !differs;
        differs
    }

    /// Layers of the MTP head that follow the decoder layers, as layer indices.
    pub fn mtp_layers(&self) -> std::ops::Range<usize> {
        self.num_hidden_layers..self.num_hidden_layers + self.num_nextn_predict_layers
    }

    /// Scale of the attention logits.
    pub fn softmax_scale(&self) -> f32 {
        match &self.mla {
            Some(mla) => {
                ((mla.qk_nope_head_dim + mla.qk_rope_head_dim) as f32).powf(-0.5) * self.rope.softmax_scaling()
            }
            None => (self.head_dim as f32).powf(-0.5),
        }
    }

    /// An upper bound of the parameters, every layer taken as dense and sparse; in f64, which cannot overflow.
    fn most_parameters(&self) -> f64 {
        let f = |n: usize| n as f64;
        let hidden = f(self.hidden_size);
        let mut layer = 3.0 * hidden * f(self.intermediate_size)
            + 2.0 * hidden * f(self.head_dim) * (f(self.num_attention_heads) + f(self.num_key_value_heads));
        let q_rank = self.mla.as_ref().and_then(|m| m.q_lora_rank).map_or(hidden, f);
        if let Some(mla) = &self.mla {
            let head = f(mla.qk_nope_head_dim) + f(mla.qk_rope_head_dim) + f(mla.v_head_dim);
            let width = q_rank + f(mla.kv_lora_rank) + hidden;
            layer += f(self.num_attention_heads) * head * width + hidden * (width + f(mla.qk_rope_head_dim));
        }
        if let Some(moe) = &self.moe {
            let experts = f(moe.n_routed_experts) + f(moe.n_shared_experts);
            layer += 3.0 * experts * f(moe.moe_intermediate_size) * hidden + f(moe.n_routed_experts) * hidden;
        }
        if let Some(indexer) = &self.indexer {
            let (heads, dim) = (f(indexer.index_n_heads), f(indexer.index_head_dim));
            layer += heads * dim * q_rank + (heads + dim) * hidden;
        }
        f(self.num_hidden_layers + self.num_nextn_predict_layers)
            * (layer + 2.0 * hidden * (hidden + f(self.vocab_size)))
    }

    /// True when decoder layer `layer` routes tokens to experts (MTP layers always do, in a MoE model).
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.moe.as_ref().is_some_and(|m| m.sparse_layers.get(layer).copied().unwrap_or(true))
    }

    /// True when layer `layer` has an indexer of its own (MTP layers do).
    pub fn has_indexer(&self, layer: usize) -> bool {
        self.indexer.as_ref().is_some_and(|i| i.full_layers.get(layer).copied().unwrap_or(true))
    }
}

/// The language model's part of a configuration that wraps it for images or sound (`text_config`); what concerns the whole
/// checkpoint stays.
fn wrapped(text: &str, outer: &RawConfig) -> Option<Value> {
    if ModelType::parse(outer.model_type.as_deref()?).is_ok() {
        return None;
    }
    let mut outer: serde_json::Map<String, Value> = serde_json::from_str(text).ok()?;
    let Value::Object(mut inner) = outer.remove("text_config")? else { return None };
    ModelType::parse(inner.get("model_type")?.as_str()?).ok()?;
    for key in ["quantization", "quantization_config", "eos_token_id", "dtype", "torch_dtype", "tie_word_embeddings"] {
        if let Some(value) = outer.remove(key).filter(|_| inner.get(key).is_none_or(Value::is_null)) {
            inner.insert(key.to_string(), value);
        }
    }
    Some(Value::Object(inner))
}

struct Fields<'a> {
    raw: &'a RawConfig,
    model_type: ModelType,
}

impl Fields<'_> {
    fn size(&self, field: &'static str, value: Option<usize>) -> Result<usize, ConfigError> {
        match value {
            None => Err(ConfigError::Missing { field, model_type: self.model_type.name() }),
            Some(v) if v == 0 || v > MAX_SIZE => {
                Err(ConfigError::Invalid(format!("{field} must be between 1 and {MAX_SIZE}, found {v}")))
            }
            Some(v) => Ok(v),
        }
    }

    fn build(&self) -> Result<ModelConfig, ConfigError> {
        let raw = self.raw;
        let parts = self.model_type.parts();
        let hidden_size = self.size("hidden_size", raw.hidden_size)?;
        let num_attention_heads = self.size("num_attention_heads", raw.num_attention_heads)?;
        let num_hidden_layers = self.size("num_hidden_layers", raw.num_hidden_layers)?;
        if num_hidden_layers > 4096 {
            return Err(ConfigError::Invalid(format!(
                "num_hidden_layers must be at most 4096, found {num_hidden_layers}"
            )));
        }
        let num_nextn_predict_layers = if parts.mtp { raw.num_nextn_predict_layers.unwrap_or(0) } else { 0 };
        if num_nextn_predict_layers > 16 {
            return Err(ConfigError::Invalid(format!(
                "num_nextn_predict_layers must be at most 16, found {num_nextn_predict_layers}"
            )));
        }
        if let Some(act) = &raw.hidden_act
            && act != "silu"
        {
            return Err(ConfigError::Invalid(format!("hidden_act must be \"silu\", found {act:?}")));
        }
        let head_dim = match raw.head_dim {
            Some(d) => self.size("head_dim", Some(d))?,
            None if parts.mla => 1,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(ConfigError::Invalid(format!(
                    "hidden_size {hidden_size} does not divide by num_attention_heads {num_attention_heads} and there \
                     is no head_dim; one of the three is wrong"
                )));
            }
        };
        let num_key_value_heads =
            raw.num_key_value_heads.map_or(Ok(num_attention_heads), |n| self.size("num_key_value_heads", Some(n)))?;
        if !parts.mla {
            if raw.mlp_bias == Some(true) {
                return Err(ConfigError::Invalid("mlp_bias true is not supported".to_string()));
            }
            if !num_attention_heads.is_multiple_of(num_key_value_heads) {
                return Err(ConfigError::Invalid(format!(
                    "num_attention_heads {num_attention_heads} does not divide by num_key_value_heads \
                     {num_key_value_heads}"
                )));
            }
            if !head_dim.is_multiple_of(2) {
                return Err(ConfigError::Invalid(format!(
                    "head_dim must be even for rotary embedding, found {head_dim}"
                )));
            }
        }
        let float = match raw.dtype.as_deref().or(raw.torch_dtype.as_deref()) {
            Some("float32") => Float::F32,
            Some("float16") => Float::F16,
            _ => Float::BF16,
        };
        let config = ModelConfig {
            model_type: self.model_type,
            hidden_size,
            intermediate_size: self.size("intermediate_size", raw.intermediate_size)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: self.size("vocab_size", raw.vocab_size)?,
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6) as f32,
            max_position_embeddings: self
                .size("max_position_embeddings", raw.max_position_embeddings.or(Some(2048)))?,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            attention_bias: raw.attention_bias.unwrap_or(false),
            float,
            rope: self.rope()?,
            eos_token_id: match &raw.eos_token_id {
                None => vec![],
                Some(OneOrMany::One(id)) => vec![*id],
                Some(OneOrMany::Many(ids)) => ids.clone(),
            },
            num_nextn_predict_layers,
            mla: parts.mla.then(|| self.mla()).transpose()?,
            moe: parts.moe.then(|| self.moe(num_hidden_layers)).transpose()?,
            indexer: parts.indexer.map(|interleave| self.indexer(num_hidden_layers, interleave)).transpose()?,
            quantization: QuantizationConfig::parse(raw)?,
        };
        let parameters = config.most_parameters();
        if parameters > MAX_PARAMETERS {
            return Err(ConfigError::Invalid(format!(
                "the sizes amount to {parameters:.1e} parameters, expected at most {MAX_PARAMETERS:.0e}; one of them is wrong"
            )));
        }
        Ok(config)
    }

    fn mla(&self) -> Result<MlaConfig, ConfigError> {
        let raw = self.raw;
        if raw.attention_bias == Some(true) {
            return Err(ConfigError::Invalid(format!(
                "attention_bias true is not supported for {}",
                self.model_type.name()
            )));
        }
        let mla = MlaConfig {
            q_lora_rank: raw.q_lora_rank.map(|r| self.size("q_lora_rank", Some(r))).transpose()?,
            kv_lora_rank: self.size("kv_lora_rank", raw.kv_lora_rank)?,
            qk_nope_head_dim: self.size("qk_nope_head_dim", raw.qk_nope_head_dim)?,
            qk_rope_head_dim: self.size("qk_rope_head_dim", raw.qk_rope_head_dim)?,
            v_head_dim: self.size("v_head_dim", raw.v_head_dim)?,
            rope_interleave: raw.rope_interleave.unwrap_or(true),
        };
        if !mla.qk_rope_head_dim.is_multiple_of(2) {
            return Err(ConfigError::Invalid(format!(
                "qk_rope_head_dim must be even for rotary embedding, found {}",
                mla.qk_rope_head_dim
            )));
        }
        Ok(mla)
    }

    fn moe(&self, n_layers: usize) -> Result<MoeConfig, ConfigError> {
        let raw = self.raw;
        let invalid = |m: String| Err(ConfigError::Invalid(m));
        let n_routed_experts = self.size("n_routed_experts", raw.n_routed_experts)?;
        let num_experts_per_tok = self.size("num_experts_per_tok", raw.num_experts_per_tok)?;
        let n_group = self.size("n_group", raw.n_group.or(Some(1)))?;
        let topk_group = self.size("topk_group", raw.topk_group.or(Some(1)))?;
        if n_routed_experts > 65536 {
            return invalid(format!("n_routed_experts must be at most 65536, found {n_routed_experts}"));
        }
        if !n_routed_experts.is_multiple_of(n_group) || topk_group > n_group {
            return invalid(format!(
                "n_routed_experts {n_routed_experts} must divide into n_group {n_group} groups of which topk_group \
                 {topk_group} are kept"
            ));
        }
        if n_group > 1 && n_routed_experts / n_group < 2 {
            return invalid(format!("group-limited routing needs at least 2 experts in each of the {n_group} groups"));
        }
        if num_experts_per_tok > n_routed_experts / n_group * topk_group {
            return invalid(format!(
                "num_experts_per_tok {num_experts_per_tok} exceeds the {} experts that routing leaves",
                n_routed_experts / n_group * topk_group
            ));
        }
        if let Some(f) = &raw.scoring_func
            && f != "sigmoid"
        {
            return invalid(format!("scoring_func must be \"sigmoid\", found {f:?}"));
        }
        if let Some(m) = &raw.topk_method
            && m != "noaux_tc"
        {
            return invalid(format!("topk_method must be \"noaux_tc\", found {m:?}"));
        }
        let sparse_layers = match &raw.mlp_layer_types {
            Some(types) if types.len() < n_layers => {
                return invalid(format!("mlp_layer_types names {} layers of {n_layers}", types.len()));
            }
            Some(types) => types[..n_layers].iter().map(|t| t == "sparse").collect(),
            None => {
                // transformers' Glm4MoeLiteConfig has one dense layer where the file says nothing.
                let usual = usize::from(self.model_type == ModelType::Glm4MoeLite);
                let first = raw.first_k_dense_replace.unwrap_or(usual);
                let freq = self.size("moe_layer_freq", raw.moe_layer_freq.or(Some(1)))?;
                (0..n_layers).map(|l| l >= first && l % freq == 0).collect()
            }
        };
        Ok(MoeConfig {
            n_routed_experts,
            num_experts_per_tok,
            n_shared_experts: raw.n_shared_experts.unwrap_or(0).min(1024),
            moe_intermediate_size: self.size("moe_intermediate_size", raw.moe_intermediate_size)?,
            n_group,
            topk_group,
            norm_topk_prob: raw.norm_topk_prob.unwrap_or(true),
            routed_scaling_factor: raw.routed_scaling_factor.unwrap_or(1.0) as f32,
            sparse_layers,
        })
    }

    /// Full and shared indexers: `indexer_types`, else `index_topk_pattern` ("F" / "S"), else
    /// `max(layer - offset + 1, 0) % freq == 0` (transformers' GlmMoeDsaConfig).
    fn indexer(&self, n_layers: usize, interleave: bool) -> Result<IndexerConfig, ConfigError> {
        let raw = self.raw;
        let named = |n: usize, what: &str| {
            if n < n_layers {
                Err(ConfigError::Invalid(format!("{what} names {n} layers of {n_layers}")))
            } else {
                Ok(())
            }
        };
        let full_layers: Vec<bool> = if let Some(types) = &raw.indexer_types {
            named(types.len(), "indexer_types")?;
            types[..n_layers].iter().map(|t| t == "full").collect()
        } else if let Some(pattern) = &raw.index_topk_pattern {
            named(pattern.len(), "index_topk_pattern")?;
            pattern.bytes().take(n_layers).map(|b| b == b'F').collect()
        } else {
            let freq = self.size("index_topk_freq", raw.index_topk_freq.or(Some(1)))?;
            let offset = raw.index_skip_topk_offset.unwrap_or(2);
            (0..n_layers).map(|l| (l + 1).saturating_sub(offset) % freq == 0).collect()
        };
        if full_layers.first() != Some(&true) {
            return Err(ConfigError::Invalid(
                "layer 0 must have an indexer of its own (indexer_types must start with \"full\")".to_string(),
            ));
        }
        let config = IndexerConfig {
            index_n_heads: self.size("index_n_heads", raw.index_n_heads)?,
            index_head_dim: self.size("index_head_dim", raw.index_head_dim)?,
            index_topk: self.size("index_topk", raw.index_topk)?,
            rope_interleave: raw.indexer_rope_interleave.unwrap_or(interleave),
            full_layers,
        };
        if raw.q_lora_rank.is_none() {
            return Err(ConfigError::Missing { field: "q_lora_rank", model_type: self.model_type.name() });
        }
        if raw.qk_rope_head_dim.is_some_and(|rope| rope > config.index_head_dim) {
            return Err(ConfigError::Invalid(format!(
                "index_head_dim {} is smaller than qk_rope_head_dim {}",
                config.index_head_dim,
                raw.qk_rope_head_dim.unwrap_or(0)
            )));
        }
        Ok(config)
    }

    fn rope(&self) -> Result<RopeParameters, ConfigError> {
        let raw = self.raw;
        let empty = BTreeMap::new();
        // Beside rope_parameters, a rope_scaling that says anything wins, as in transformers.
        let scaling = raw.rope_scaling.as_ref().filter(|section| !section.is_empty());
        let section = scaling.or(raw.rope_parameters.as_ref()).unwrap_or(&empty);
        let optional = |key: &'static str| match section.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_f64()
                .map(Some)
                .ok_or_else(|| ConfigError::Invalid(format!("rope parameter {key:?} must be a number, found {value}"))),
        };
        let required = |key: &'static str| {
            let value =
                optional(key)?.ok_or_else(|| ConfigError::Invalid(format!("rope parameters need a number {key:?}")))?;
            if value.is_finite() && value > 0.0 {
                Ok(value)
            } else {
                Err(ConfigError::Invalid(format!("rope parameter {key:?} must be positive, found {value}")))
            }
        };
        let theta = optional("rope_theta")?.or(raw.rope_theta).unwrap_or(10000.0);
        let trained = || match section.get("original_max_position_embeddings") {
            None | Some(Value::Null) => Ok(raw.max_position_embeddings.unwrap_or(2048) as f64),
            Some(_) => required("original_max_position_embeddings"),
        };
        if !(theta.is_finite() && theta > 1.0) {
            return Err(ConfigError::Invalid(format!("rope_theta must be above 1, found {theta}")));
        }
        let kind = section.get("rope_type").or(section.get("type")).and_then(Value::as_str).unwrap_or("default");
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: required("factor")? },
            "yarn" => RopeScaling::Yarn {
                factor: required("factor")?,
                original_max_position_embeddings: trained()?,
                beta_fast: optional("beta_fast")?.unwrap_or(32.0),
                beta_slow: optional("beta_slow")?.unwrap_or(1.0),
                mscale: optional("mscale")?,
                mscale_all_dim: optional("mscale_all_dim")?,
                attention_factor: optional("attention_factor")?,
                truncate: section.get("truncate").and_then(Value::as_bool).unwrap_or(true),
            },
            "llama3" => RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_max_position_embeddings: trained()?,
            },
            other => {
                return Err(ConfigError::Invalid(format!(
                    "rope_type {other:?} is not supported; supported are default, linear, yarn and llama3"
                )));
            }
        };
        Ok(RopeParameters { theta, scaling })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GLM-4.7-Flash's file says which layers are sparse, in one of three ways.
    #[test]
    fn dense_layers_of_glm4_moe_lite() {
        for (fields, expected) in [
            ("", [false, true, true]),
            (r#""first_k_dense_replace": 2,"#, [false, false, true]),
            (r#""mlp_layer_types": ["sparse", "dense", "sparse"],"#, [true, false, true]),
        ] {
            let text = format!(
                r#"{{"model_type": "glm4_moe_lite", {fields} "hidden_size": 8, "num_attention_heads": 2,
                "num_hidden_layers": 3, "intermediate_size": 8, "vocab_size": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
                "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 8}}"#
            );
            let config = ModelConfig::parse(&text).expect("valid");
            assert_eq!(config.model_type.name(), "glm4_moe_lite");
            let moe = config.moe.expect("experts");
            assert_eq!(moe.sparse_layers, expected, "{fields}");
            assert!(moe.norm_topk_prob && config.indexer.is_none() && config.mla.expect("latent").rope_interleave);
        }
    }
}
