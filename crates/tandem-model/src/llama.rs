//! Llama and its look-alikes: grouped-query attention with rotary embedding, gated MLP, optional projection biases.
//!
//! Reference: transformers' `modeling_llama.py`.

use tandem_core::backend::{
    AddRmsNorm, Backend, CacheKind, GqaAttention, Heads, Linear, Mlp, RmsNorm, Rope, RopeLayout, Rotate,
};
use tandem_core::weights::{Axis, Form, ModuleKind, Split, WeightSpec};
use tandem_core::{CheckpointError, ModelConfig};

use crate::{KvCache, LayerCache, Limits, Loader, Model, Share, StepShape};

/// A loaded Llama.
pub struct Llama<B: Backend> {
    dims: Dims,
    share: Share<B>,
    /// On the first stage, and on the last if the head is the embedding.
    embed_tokens: Option<B::Matrix>,
    layers: Vec<Layer<B>>,
    /// On the last stage.
    norm: Option<B::Buffer>,
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
        let Dims { n_heads, n_kv_heads, head_dim, rms_norm_eps: eps, softmax_scale: scale, ref rope } = self.dims;
        let label = ModuleKind::Attention;
        let s = &mut self.scratch;
        let (q_heads, k_heads) = (Heads::packed(n_heads, head_dim), Heads::packed(n_kv_heads, head_dim));
        let [attention_sliced, mlp_sliced, _] = self.share.division.reduces();
        if let (true, Some(embed_tokens)) = (self.share.part().embeds, &self.embed_tokens) {
            b.embed(embed_tokens, batch, &mut s.hidden);
        }
        for (i, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            self.share.begin_layer(b, i, &s.hidden, n);
            let LayerCache::KeyValue { keys, values } = cache else { unreachable!("the cache was made by this model") };
            let (x, weight, out) = (&s.hidden, &layer.input_layernorm, &mut s.normed);
            b.rms_norm(RmsNorm { x, weight, eps, n_rows: n, out });
            let outputs = &mut [
                (&layer.q_proj.weight, &mut s.q),
                (&layer.k_proj.weight, &mut s.k),
                (&layer.v_proj.weight, &mut s.v),
            ];
            b.linear(Linear { x: &s.normed, n_rows: n, outputs, label });
            layer.q_proj.add_bias(b, &mut s.q, n);
            layer.k_proj.add_bias(b, &mut s.k, n);
            layer.v_proj.add_bias(b, &mut s.v, n);
            b.rope(Rotate { x: &s.q, from: q_heads, rope, batch, out: &mut s.q_rotated, to: q_heads, label });
            b.rope(Rotate { x: &s.k, from: k_heads, rope, batch, out: &mut s.k_rotated, to: k_heads, label });
            b.write_cache(&s.k_rotated, batch, keys);
            b.write_cache(&s.v, batch, values);
            let (q, out) = (&s.q_rotated, &mut s.attended);
            b.gqa_attention(GqaAttention { q, n_heads, n_kv_heads, scale, batch, keys, values, out });
            let outputs = &mut [(&layer.o_proj.weight, &mut s.block)];
            b.linear(Linear { x: &s.attended, n_rows: n, outputs, label });
            layer.o_proj.add_bias(b, &mut s.block, n);
            self.share.all_reduce(b, attention_sliced, &mut s.block, n, "attention");
            let (x, y, weight, out) = (&mut s.hidden, &s.block, &layer.post_attention_layernorm, &mut s.normed);
            b.add_rms_norm(AddRmsNorm { x, y, weight, eps, n_rows: n, out });
            b.mlp(&s.normed, &layer.mlp, n, &mut s.block);
            self.share.all_reduce(b, mlp_sliced, &mut s.block, n, "the MLP");
            b.add(&mut s.hidden, &s.block, n);
        }
        if let (true, Some(norm)) = (shape.n_logits > 0, &self.norm) {
            b.gather_logits_rows(&s.hidden, batch, &mut s.last);
            let n_rows = shape.n_logits;
            b.rms_norm(RmsNorm { x: &s.last, weight: norm, eps, n_rows, out: &mut s.last_normed });
            if let Some(head) = self.lm_head.as_ref().or(self.embed_tokens.as_ref()) {
                let outputs = &mut [(head, &mut s.logits)];
                b.linear(Linear { x: &s.last_normed, n_rows, outputs, label: ModuleKind::LmHead });
            }
        }
    }

    fn logits(&self) -> &B::Buffer {
        &self.scratch.logits
    }

    fn hidden(&self) -> &B::Buffer {
        &self.scratch.hidden
    }

    fn hidden_mut(&mut self) -> &mut B::Buffer {
        &mut self.scratch.hidden
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
    /// Loads the share's layers.
    ///
    /// # Errors
    /// The checkpoint is damaged.
    pub fn load(
        loader: &mut Loader<'_, B>,
        config: &ModelConfig,
        share: Share<B>,
        limits: Limits,
    ) -> Result<Self, CheckpointError> {
        let (bias, part, tied) = (config.attention_bias, share.part(), config.tie_word_embeddings);
        let max_logits_rows = if part.head { limits.max_logits_rows } else { 0 };
        let layers = part
            .layers
            .clone()
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
            embed_tokens: loader.matrix_if(part.embeds || (part.head && tied), "model.embed_tokens")?,
            layers,
            norm: if part.head { Some(loader.vector("model.norm", "weight")?) } else { None },
            lm_head: loader.matrix_if(part.head && !tied, "lm_head")?,
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
                last: b.alloc(max_logits_rows, hidden),
                last_normed: b.alloc(max_logits_rows, hidden),
                logits: b.alloc(max_logits_rows, config.vocab_size),
            },
            share,
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
        for (name, rows, cols, axis) in [
            ("gate_proj", intermediate, hidden, Axis::Rows),
            ("up_proj", intermediate, hidden, Axis::Rows),
            ("down_proj", hidden, intermediate, Axis::Cols),
        ] {
            let module = format!("{p}.mlp.{name}");
            let spec = WeightSpec::matrix(module, &[rows, cols], ModuleKind::DenseMlp, Form::Matrix);
            specs.push(spec.divided(Split::Width(axis)));
        }
        for spec in &mut specs[of_layer..] {
            spec.layer = Some(layer);
        }
    }
    specs
}
