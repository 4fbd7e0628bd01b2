//! What every family has: the embedding, the residual stream with its norms and sums over ranks, the head.
//!
//! A family gives the [`Layer`] between the norms, and its specs; the rest is here once.

use tandem_core::backend::{AddRmsNorm, Backend, CacheSpec, Linear, RmsNorm};
use tandem_core::weights::{Axis, Form, ModuleKind, Read, Split, WeightSpec};
use tandem_core::{CheckpointError, ModelConfig};

use crate::mtp::Mtp;
use crate::registry::cache_specs;
use crate::{KvCache, LayerCache, Limits, Loader, Model, Share, StepShape};

/// The batch of a step, on the device and in numbers.
pub(crate) struct Step<'a, B: Backend> {
    /// On the device.
    pub(crate) batch: &'a B::Batch,
    /// Its numbers.
    pub(crate) shape: StepShape,
}

/// A family's decoder layer without the norms before its two halves and the additions after them.
pub(crate) trait Layer<B: Backend>: Sized {
    /// Numbers and activations that all layers use.
    type Shared;
    /// `out = attention(x)`, both `[n_rows, hidden_size]`.
    fn attention(
        &self,
        b: &B,
        shared: &mut Self::Shared,
        step: &Step<'_, B>,
        cache: &mut LayerCache<B>,
        x: &B::Buffer,
        out: &mut B::Buffer,
    );
    /// `out = mlp(x)`, both `[n_rows, hidden_size]`.
    fn mlp(&self, b: &B, shared: &mut Self::Shared, n_rows: usize, x: &B::Buffer, out: &mut B::Buffer);
    /// What the MLP is, which says how ranks divide it.
    fn mlp_kind(&self) -> ModuleKind;
}

/// A loaded model: a rank's layers of a family, and the ends that it holds.
pub(crate) struct Decoder<B: Backend, L: Layer<B>> {
    share: Share<B>,
    hidden_size: usize,
    rms_norm_eps: f32,
    /// On the first stage, and on the last if the head is the embedding.
    embed_tokens: Option<B::Matrix>,
    layers: Vec<Normed<B, L>>,
    /// By layer.
    caches: Vec<Vec<CacheSpec>>,
    /// On the last stage.
    norm: Option<B::Buffer>,
    lm_head: Option<B::Matrix>,
    shared: L::Shared,
    scratch: Scratch<B>,
    mtp: Option<Mtp<B, L>>,
}

/// A layer and the norms before its halves.
pub(crate) struct Normed<B: Backend, L> {
    pub(crate) input_layernorm: B::Buffer,
    pub(crate) layer: L,
    pub(crate) post_attention_layernorm: B::Buffer,
}

impl<B: Backend, L: Layer<B>> Normed<B, L> {
    /// Loads decoder layer `idx`.
    ///
    /// # Errors
    /// The checkpoint is damaged.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        idx: usize,
        layer: &impl Fn(&mut Loader<'_, B>, usize) -> Result<L, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        let p = format!("model.layers.{idx}");
        Ok(Normed {
            layer: layer(loader, idx)?,
            input_layernorm: loader.vector(&format!("{p}.input_layernorm"), "weight")?,
            post_attention_layernorm: loader.vector(&format!("{p}.post_attention_layernorm"), "weight")?,
        })
    }
}

/// Activations, allocated once; a step allocates nothing. `n` is the rows of the batch.
struct Scratch<B: Backend> {
    /// Residual stream, `[n, hidden_size]`.
    hidden: B::Buffer,
    /// Norm of the residual stream, `[n, hidden_size]`.
    normed: B::Buffer,
    /// Output of half a layer, `[n, hidden_size]`.
    block: B::Buffer,
    /// `[max_logits_rows, hidden_size]`
    last: B::Buffer,
    last_normed: B::Buffer,
    /// `[max_logits_rows, vocab_size]`
    logits: B::Buffer,
}

impl<B: Backend, L: Layer<B>> Decoder<B, L> {
    /// Loads the share's layers with `layer`, and the ends that the share holds.
    ///
    /// # Errors
    /// The checkpoint is damaged.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        config: &ModelConfig,
        share: Share<B>,
        limits: Limits,
        shared: L::Shared,
        mtp: Option<Mtp<B, L>>,
        layer: impl Fn(&mut Loader<'_, B>, usize) -> Result<L, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        let (part, tied) = (share.part().clone(), config.tie_word_embeddings);
        let mut layers = vec![];
        for l in part.layers.clone() {
            layers.push(Normed::load(loader, l, &layer)?);
        }
        let b = loader.backend;
        let (n, hidden) = (limits.max_rows, config.hidden_size);
        let n_logits = if part.head { limits.max_logits_rows } else { 0 };
        Ok(Decoder {
            hidden_size: hidden,
            rms_norm_eps: config.rms_norm_eps,
            embed_tokens: loader
                .matrix_if(part.embeds || (part.head && tied) || mtp.is_some(), "model.embed_tokens")?,
            layers,
            caches: part.layers.map(|l| cache_specs(config, l)).collect(),
            norm: if part.head { Some(loader.vector("model.norm", "weight")?) } else { None },
            lm_head: loader.matrix_if(part.head && !tied, "lm_head")?,
            shared,
            scratch: Scratch {
                hidden: b.alloc(n, hidden),
                normed: b.alloc(n, hidden),
                block: b.alloc(n, hidden),
                last: b.alloc(n_logits, hidden),
                last_normed: b.alloc(n_logits, hidden),
                logits: b.alloc(n_logits, config.vocab_size),
            },
            share,
            mtp,
        })
    }
}

impl<B: Backend, L: Layer<B>> Model<B> for Decoder<B, L> {
    fn forward(&mut self, b: &B, batch: &B::Batch, shape: StepShape, cache: &mut KvCache<B>) {
        let (s, n_rows, eps) = (&mut self.scratch, shape.n_rows, self.rms_norm_eps);
        let step = Step { batch, shape };
        if let (true, Some(embed_tokens)) = (self.share.part().embeds, &self.embed_tokens) {
            b.embed(embed_tokens, batch, &mut s.hidden);
        }
        for (i, (Normed { input_layernorm, layer, post_attention_layernorm }, cache)) in
            self.layers.iter().zip(&mut cache.layers).enumerate()
        {
            let (weight, out) = (input_layernorm, &mut s.normed);
            // The output of the layer before joins the residual stream together with this norm.
            if i == 0 {
                b.rms_norm(RmsNorm { x: &s.hidden, weight, eps, n_rows, out });
            } else {
                b.add_rms_norm(AddRmsNorm { x: &mut s.hidden, y: &s.block, weight, eps, n_rows, out });
            }
            self.share.begin_layer(b, i, &s.hidden, n_rows);
            layer.attention(b, &mut self.shared, &step, cache, &s.normed, &mut s.block);
            self.share.all_reduce(b, ModuleKind::Attention, &mut s.block, n_rows);
            let (weight, out) = (post_attention_layernorm, &mut s.normed);
            b.add_rms_norm(AddRmsNorm { x: &mut s.hidden, y: &s.block, weight, eps, n_rows, out });
            layer.mlp(b, &mut self.shared, n_rows, &s.normed, &mut s.block);
            self.share.all_reduce(b, layer.mlp_kind(), &mut s.block, n_rows);
        }
        if !self.layers.is_empty() {
            b.add(&mut s.hidden, &s.block, n_rows);
        }
        if let (true, Some(weight)) = (self.mtp.is_some(), &self.norm) {
            b.rms_norm(RmsNorm { x: &s.hidden, weight, eps, n_rows, out: &mut s.normed });
        }
        if let (true, Some(weight)) = (shape.n_logits > 0, &self.norm) {
            let n_rows = shape.n_logits;
            b.gather_logits_rows(&s.hidden, batch, &mut s.last);
            b.rms_norm(RmsNorm { x: &s.last, weight, eps, n_rows, out: &mut s.last_normed });
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

    fn cache_specs(&self) -> &[Vec<CacheSpec>] {
        &self.caches
    }

    fn mtp_cache_specs(&self) -> &[Vec<CacheSpec>] {
        self.mtp.as_ref().map_or(&[], Mtp::cache_specs)
    }

    fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    fn normed(&self) -> &B::Buffer {
        &self.scratch.normed
    }

    fn draft(&mut self, b: &B, batch: &B::Batch, shape: StepShape, given: &[f32], cache: &mut KvCache<B>) {
        let embed_tokens = self.embed_tokens.as_ref();
        let head = self.lm_head.as_ref().or(embed_tokens);
        if let Some(mtp) = &mut self.mtp {
            mtp.forward(b, &Step { batch, shape }, given, [embed_tokens, head], cache);
        }
    }

    fn drafted(&self) -> Option<(&B::Buffer, &B::Buffer)> {
        self.mtp.as_ref().map(Mtp::outputs)
    }
}

/// Every weight of a decoder whose layers have the norms of [`Decoder`] and what `inner` lists.
pub(crate) fn weight_specs(
    config: &ModelConfig,
    inner: impl Fn(&ModelConfig, usize) -> Vec<WeightSpec>,
) -> Vec<WeightSpec> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let embed = WeightSpec::matrix("model.embed_tokens", &[vocab, hidden], ModuleKind::Embed, Form::Matrix);
    let mut specs =
        vec![embed.read(Read::PerRow), WeightSpec::vector("model.norm", "weight", hidden, ModuleKind::Norms)];
    if !config.tie_word_embeddings {
        specs.push(WeightSpec::matrix("lm_head", &[vocab, hidden], ModuleKind::LmHead, Form::Matrix));
    }
    for layer in 0..config.num_hidden_layers {
        specs.extend(layer_specs(config, layer, inner(config, layer)));
    }
    specs
}

/// The weights of one layer.
pub(crate) fn layer_specs(config: &ModelConfig, layer: usize, inner: Vec<WeightSpec>) -> Vec<WeightSpec> {
    let norm = |name: &str| {
        let module = format!("model.layers.{layer}.{name}");
        WeightSpec::vector(module, "weight", config.hidden_size, ModuleKind::Norms)
    };
    let norms = ["input_layernorm", "post_attention_layernorm"].map(norm);
    norms.into_iter().chain(inner).map(|spec| WeightSpec { layer: Some(layer), ..spec }).collect()
}

/// Gate, up and down projections of an MLP below `module`; of a stack of experts if `experts` gives their number and how
/// many a token has.
pub(crate) fn mlp_specs(
    module: &str,
    hidden: usize,
    width: usize,
    experts: Option<(usize, usize)>,
    kind: ModuleKind,
) -> [WeightSpec; 3] {
    let projections = [
        ("gate_proj", width, hidden, Axis::Rows),
        ("up_proj", width, hidden, Axis::Rows),
        ("down_proj", hidden, width, Axis::Cols),
    ];
    projections.map(|(name, rows, cols, axis)| {
        let module = format!("{module}.{name}");
        let spec = match experts {
            Some((n, per_token)) => {
                WeightSpec::matrix(module, &[n, rows, cols], kind, Form::Experts).read(Read::Experts { per_token })
            }
            None => WeightSpec::matrix(module, &[rows, cols], kind, Form::Matrix),
        };
        spec.divided(Split::Width(axis))
    })
}
