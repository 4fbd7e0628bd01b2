//! Llama and its look-alikes: grouped-query attention with rotary embedding, gated MLP, optional projection biases.
//!
//! Reference: transformers' `modeling_llama.py`.

use tandem_core::backend::{Backend, CacheKind, CacheSpec, GqaAttention, Heads, Linear, Mlp, Rope, RopeLayout, Rotate};
use tandem_core::weights::{Axis, Form, ModuleKind, Split, WeightSpec};
use tandem_core::{CheckpointError, ModelConfig};

use crate::decoder::{self, Decoder, Layer, Step, mlp_specs};
use crate::mtp::MtpSource;
use crate::{LayerCache, Limits, Loader, Model, Share};

/// A decoder layer between its norms.
struct LlamaLayer<B: Backend> {
    q_proj: Projection<B>,
    k_proj: Projection<B>,
    v_proj: Projection<B>,
    o_proj: Projection<B>,
    mlp: Mlp<B::Matrix>,
}

struct Projection<B: Backend> {
    weight: B::Matrix,
    bias: Option<B::Buffer>,
}

/// The numbers of the forward pass.
struct Dims {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    softmax_scale: f32,
    rope: Rope,
}

/// What all layers use. `n` is the rows of the batch.
struct Shared<B: Backend> {
    dims: Dims,
    /// `[n, n_heads * head_dim]`, before and after rotation.
    q: B::Buffer,
    q_rotated: B::Buffer,
    /// `[n, n_kv_heads * head_dim]`, before and after rotation.
    k: B::Buffer,
    k_rotated: B::Buffer,
    /// `[n, n_kv_heads * head_dim]`
    v: B::Buffer,
    /// `[n, n_heads * head_dim]`
    attended: B::Buffer,
}

impl<B: Backend> Layer<B> for LlamaLayer<B> {
    type Shared = Shared<B>;

    fn attention(
        &self,
        b: &B,
        shared: &mut Shared<B>,
        step: &Step<'_, B>,
        cache: &mut LayerCache<B>,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) {
        let (s, batch, n_rows, label) = (shared, step.batch, step.shape.n_rows, ModuleKind::Attention);
        let Dims { n_heads, n_kv_heads, head_dim, softmax_scale: scale, ref rope } = s.dims;
        let [keys, values] = &mut cache.caches[..] else { unreachable!("cache_specs lists keys and values") };
        let outputs =
            &mut [(&self.q_proj.weight, &mut s.q), (&self.k_proj.weight, &mut s.k), (&self.v_proj.weight, &mut s.v)];
        b.linear(Linear { x, n_rows, outputs, label });
        self.q_proj.add_bias(b, &mut s.q, n_rows);
        self.k_proj.add_bias(b, &mut s.k, n_rows);
        self.v_proj.add_bias(b, &mut s.v, n_rows);
        let (q_heads, k_heads) = (Heads::packed(n_heads, head_dim), Heads::packed(n_kv_heads, head_dim));
        b.rope(Rotate { x: &s.q, from: q_heads, rope, batch, out: &mut s.q_rotated, to: q_heads, label });
        b.rope(Rotate { x: &s.k, from: k_heads, rope, batch, out: &mut s.k_rotated, to: k_heads, label });
        b.write_cache(&s.k_rotated, batch, keys);
        b.write_cache(&s.v, batch, values);
        let (q, attended) = (&s.q_rotated, &mut s.attended);
        b.gqa_attention(GqaAttention { q, n_heads, n_kv_heads, scale, batch, keys, values, out: attended });
        b.linear(Linear { x: &s.attended, n_rows, outputs: &mut [(&self.o_proj.weight, &mut *out)], label });
        self.o_proj.add_bias(b, out, n_rows);
    }

    fn mlp(&self, b: &B, _: &mut Shared<B>, n_rows: usize, x: &B::Buffer, out: &mut B::Buffer) {
        b.mlp(x, &self.mlp, n_rows, out);
    }

    fn mlp_kind(&self) -> ModuleKind {
        ModuleKind::DenseMlp
    }
}

impl<B: Backend> Projection<B> {
    fn load(loader: &mut Loader<'_, B>, module: &str, bias: bool) -> Result<Self, CheckpointError> {
        Ok(Projection {
            weight: loader.matrix(module)?,
            bias: if bias { Some(loader.vector(module, "bias")?) } else { None },
        })
    }

    fn add_bias(&self, b: &B, x: &mut B::Buffer, n_rows: usize) {
        if let Some(bias) = &self.bias {
            b.add_bias(x, bias, n_rows);
        }
    }
}

/// Loads the share's layers.
pub(crate) fn load<B: Backend + 'static>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    share: Share<B>,
    limits: Limits,
    _: Option<MtpSource<'_>>,
) -> Result<Box<dyn Model<B>>, CheckpointError> {
    let shared = Shared::new(loader.backend, config, limits.max_rows);
    let layer = |loader: &mut Loader<'_, B>, layer: usize| {
        let (p, bias) = (format!("model.layers.{layer}"), config.attention_bias);
        Ok(LlamaLayer {
            q_proj: Projection::load(loader, &format!("{p}.self_attn.q_proj"), bias)?,
            k_proj: Projection::load(loader, &format!("{p}.self_attn.k_proj"), bias)?,
            v_proj: Projection::load(loader, &format!("{p}.self_attn.v_proj"), bias)?,
            o_proj: Projection::load(loader, &format!("{p}.self_attn.o_proj"), bias)?,
            mlp: loader.mlp(&format!("{p}.mlp"))?,
        })
    };
    Ok(Box::new(Decoder::load(loader, config, share, limits, shared, None, layer)?))
}

impl<B: Backend> Shared<B> {
    fn new(b: &B, config: &ModelConfig, n: usize) -> Shared<B> {
        let dims = Dims {
            n_heads: config.num_attention_heads,
            n_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            softmax_scale: config.softmax_scale(),
            rope: Rope {
                inv_freq: config.rope.inv_freq(config.head_dim),
                scaling: config.rope.attention_scaling(),
                layout: RopeLayout::Half,
            },
        };
        let (q_width, k_width) = (dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim);
        Shared {
            dims,
            q: b.alloc(n, q_width),
            q_rotated: b.alloc(n, q_width),
            k: b.alloc(n, k_width),
            k_rotated: b.alloc(n, k_width),
            v: b.alloc(n, k_width),
            attended: b.alloc(n, q_width),
        }
    }
}

/// Keys, rotated, and values.
pub(crate) fn cache_specs(config: &ModelConfig, _layer: usize) -> Vec<CacheSpec> {
    vec![CacheSpec { kind: CacheKind::KeyValue, width: config.num_key_value_heads * config.head_dim }; 2]
}

/// Every weight of the decoder.
pub(crate) fn weight_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    decoder::weight_specs(config, layer_specs)
}

/// There are no multi-token-prediction layers.
pub(crate) fn mtp_specs(_config: &ModelConfig) -> Vec<WeightSpec> {
    vec![]
}

fn layer_specs(config: &ModelConfig, layer: usize) -> Vec<WeightSpec> {
    let hidden = config.hidden_size;
    let (q_width, k_width) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let p = format!("model.layers.{layer}");
    let mut specs = vec![];
    for (name, rows, cols, split, bias_split) in [
        ("q_proj", q_width, hidden, Split::Heads(Axis::Rows), Split::Heads(Axis::Cols)),
        ("k_proj", k_width, hidden, Split::KvHeads(Axis::Rows), Split::KvHeads(Axis::Cols)),
        ("v_proj", k_width, hidden, Split::KvHeads(Axis::Rows), Split::KvHeads(Axis::Cols)),
        ("o_proj", hidden, q_width, Split::Heads(Axis::Cols), Split::Once),
    ] {
        let module = format!("{p}.self_attn.{name}");
        if config.attention_bias {
            let bias = WeightSpec::vector(module.clone(), "bias", rows, ModuleKind::Attention);
            specs.push(bias.divided(bias_split));
        }
        let weight = WeightSpec::matrix(module, &[rows, cols], ModuleKind::Attention, Form::Matrix);
        specs.push(weight.divided(split));
    }
    specs.extend(mlp_specs(&format!("{p}.mlp"), hidden, config.intermediate_size, None, ModuleKind::DenseMlp));
    specs
}
