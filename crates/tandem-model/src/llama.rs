//! Llama and its look-alikes: grouped-query attention with rotary embedding, gated MLP, optional projection biases.
//!
//! Reference: transformers' `modeling_llama.py`.

use tandem_core::backend::{Backend, CacheKind, Heads, Mlp, Rope, RopeLayout};
use tandem_core::weights::{Form, ModuleKind, WeightSpec};
use tandem_core::{CheckpointError, ModelConfig};

use crate::{KvCache, LayerCache, Limits, Loader, Model, StepShape};

/// A loaded Llama.
pub struct Llama<B: Backend> {
    dims: Dims,
    embed_tokens: B::Matrix,
    layers: Vec<Layer<B>>,
    norm: B::Buffer,
    lm_head: Option<B::Matrix>,
    scratch: Scratch<B>,
}

struct Dims {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    rms_norm_eps: f32,
    softmax_scale: f32,
    rope: Rope,
}

struct Layer<B: Backend> {
    input_layernorm: B::Buffer,
    q_proj: Projection<B>,
    k_proj: Projection<B>,
    v_proj: Projection<B>,
    o_proj: Projection<B>,
    post_attention_layernorm: B::Buffer,
    mlp: Mlp<B::Matrix>,
}

struct Projection<B: Backend> {
    weight: B::Matrix,
    bias: Option<B::Buffer>,
}

/// All activations, allocated once. `n` is the rows of the batch.
struct Scratch<B: Backend> {
    /// Residual stream and its norm, `[n, hidden_size]`.
    hidden: B::Buffer,
    normed: B::Buffer,
    /// Output of a block, `[n, hidden_size]`.
    block: B::Buffer,
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
    /// `[max_logits_rows, hidden_size]`
    last: B::Buffer,
    last_normed: B::Buffer,
    /// `[max_logits_rows, vocab_size]`
    logits: B::Buffer,
}

impl<B: Backend> Model<B> for Llama<B> {
    fn forward(&mut self, b: &B, batch: &B::Batch, shape: StepShape, cache: &mut KvCache<B>) {
        let n = shape.n_rows;
        let Dims { n_heads, n_kv_heads, head_dim, rms_norm_eps: eps, softmax_scale, ref rope } = self.dims;
        let s = &mut self.scratch;
        let (q_heads, k_heads) = (Heads::packed(n_heads, head_dim), Heads::packed(n_kv_heads, head_dim));
        b.embed(&self.embed_tokens, batch, &mut s.hidden);
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            let LayerCache::KeyValue { keys, values } = cache else { unreachable!("the cache was made by this model") };
            b.rms_norm(&s.hidden, &layer.input_layernorm, eps, n, &mut s.normed);
            b.linear(
                &s.normed,
                n,
                &mut [
                    (&layer.q_proj.weight, &mut s.q),
                    (&layer.k_proj.weight, &mut s.k),
                    (&layer.v_proj.weight, &mut s.v),
                ],
            );
            layer.q_proj.add_bias(b, &mut s.q, n);
            layer.k_proj.add_bias(b, &mut s.k, n);
            layer.v_proj.add_bias(b, &mut s.v, n);
            b.rope(&s.q, q_heads, rope, batch, &mut s.q_rotated, q_heads);
            b.rope(&s.k, k_heads, rope, batch, &mut s.k_rotated, k_heads);
            b.write_cache(&s.k_rotated, batch, keys);
            b.write_cache(&s.v, batch, values);
            b.gqa_attention(&s.q_rotated, n_heads, n_kv_heads, softmax_scale, batch, keys, values, &mut s.attended);
            b.linear(&s.attended, n, &mut [(&layer.o_proj.weight, &mut s.block)]);
            layer.o_proj.add_bias(b, &mut s.block, n);
            b.add_rms_norm(&mut s.hidden, &s.block, &layer.post_attention_layernorm, eps, n, &mut s.normed);
            b.mlp(&s.normed, &layer.mlp, n, &mut s.block);
            b.add(&mut s.hidden, &s.block, n);
        }
        if shape.n_logits > 0 {
            b.gather_logits_rows(&s.hidden, batch, &mut s.last);
            b.rms_norm(&s.last, &self.norm, eps, shape.n_logits, &mut s.last_normed);
            let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
            b.linear(&s.last_normed, shape.n_logits, &mut [(head, &mut s.logits)]);
        }
    }

    fn logits(&self) -> &B::Buffer {
        &self.scratch.logits
    }

    fn new_cache(&self, backend: &B, n_slots: usize) -> KvCache<B> {
        let width = self.dims.n_kv_heads * self.dims.head_dim;
        let layers = self
            .layers
            .iter()
            .map(|_| LayerCache::KeyValue {
                keys: backend.alloc_cache(CacheKind::KeyValue, n_slots, width),
                values: backend.alloc_cache(CacheKind::KeyValue, n_slots, width),
            })
            .collect();
        KvCache { layers }
    }

    fn cache_bytes_per_token(&self, backend: &B) -> usize {
        let width = self.dims.n_kv_heads * self.dims.head_dim;
        self.layers.len() * 2 * backend.cache_bytes(CacheKind::KeyValue, width)
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

impl<B: Backend> Llama<B> {
    /// Loads every layer.
    ///
    /// # Errors
    /// The checkpoint is damaged.
    pub fn load(loader: &mut Loader<'_, B>, config: &ModelConfig, limits: Limits) -> Result<Self, CheckpointError> {
        let bias = config.attention_bias;
        let layers = (0..config.num_hidden_layers)
            .map(|l| {
                let p = format!("model.layers.{l}");
                Ok(Layer {
                    input_layernorm: loader.vector(&format!("{p}.input_layernorm"), "weight")?,
                    q_proj: Projection::load(loader, &format!("{p}.self_attn.q_proj"), bias)?,
                    k_proj: Projection::load(loader, &format!("{p}.self_attn.k_proj"), bias)?,
                    v_proj: Projection::load(loader, &format!("{p}.self_attn.v_proj"), bias)?,
                    o_proj: Projection::load(loader, &format!("{p}.self_attn.o_proj"), bias)?,
                    post_attention_layernorm: loader.vector(&format!("{p}.post_attention_layernorm"), "weight")?,
                    mlp: loader.mlp(&format!("{p}.mlp"))?,
                })
            })
            .collect::<Result<Vec<_>, CheckpointError>>()?;
        let b = loader.backend;
        let (n, hidden) = (limits.max_rows, config.hidden_size);
        let (q_width, k_width) =
            (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        Ok(Llama {
            dims: Dims {
                n_heads: config.num_attention_heads,
                n_kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                rms_norm_eps: config.rms_norm_eps,
                softmax_scale: config.softmax_scale(),
                rope: Rope {
                    inv_freq: config.rope.inv_freq(config.head_dim),
                    scaling: config.rope.attention_scaling(),
                    layout: RopeLayout::Half,
                },
            },
            embed_tokens: loader.matrix("model.embed_tokens")?,
            layers,
            norm: loader.vector("model.norm", "weight")?,
            lm_head: if config.tie_word_embeddings { None } else { Some(loader.matrix("lm_head")?) },
            scratch: Scratch {
                hidden: b.alloc(n, hidden),
                normed: b.alloc(n, hidden),
                block: b.alloc(n, hidden),
                q: b.alloc(n, q_width),
                q_rotated: b.alloc(n, q_width),
                k: b.alloc(n, k_width),
                k_rotated: b.alloc(n, k_width),
                v: b.alloc(n, k_width),
                attended: b.alloc(n, q_width),
                last: b.alloc(limits.max_logits_rows, hidden),
                last_normed: b.alloc(limits.max_logits_rows, hidden),
                logits: b.alloc(limits.max_logits_rows, config.vocab_size),
            },
        })
    }
}

/// Every weight of the decoder.
pub(crate) fn weight_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    let (vocab, hidden, intermediate) = (config.vocab_size, config.hidden_size, config.intermediate_size);
    let (q_width, k_width) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let mut specs = vec![
        WeightSpec::matrix("model.embed_tokens", &[vocab, hidden], ModuleKind::Embed, Form::Matrix),
        WeightSpec::vector("model.norm", "weight", hidden, ModuleKind::Norms),
    ];
    if !config.tie_word_embeddings {
        specs.push(WeightSpec::matrix("lm_head", &[vocab, hidden], ModuleKind::LmHead, Form::Matrix));
    }
    for layer in 0..config.num_hidden_layers {
        let p = format!("model.layers.{layer}");
        let of_layer = specs.len();
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            specs.push(WeightSpec::vector(format!("{p}.{norm}"), "weight", hidden, ModuleKind::Norms));
        }
        for (name, rows, cols) in [
            ("q_proj", q_width, hidden),
            ("k_proj", k_width, hidden),
            ("v_proj", k_width, hidden),
            ("o_proj", hidden, q_width),
        ] {
            let module = format!("{p}.self_attn.{name}");
            if config.attention_bias {
                specs.push(WeightSpec::vector(module.clone(), "bias", rows, ModuleKind::Attention));
            }
            specs.push(WeightSpec::matrix(module, &[rows, cols], ModuleKind::Attention, Form::Matrix));
        }
        for (name, rows, cols) in [
            ("gate_proj", intermediate, hidden),
            ("up_proj", intermediate, hidden),
            ("down_proj", hidden, intermediate),
        ] {
            let module = format!("{p}.mlp.{name}");
            specs.push(WeightSpec::matrix(module, &[rows, cols], ModuleKind::DenseMlp, Form::Matrix));
        }
        for spec in &mut specs[of_layer..] {
            spec.layer = Some(layer);
        }
    }
    specs
}
