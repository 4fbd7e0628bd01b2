//! The multi-token-prediction layer (DeepSeek-V3, arXiv 2412.19437, section 2.2): from the hidden state of one token and
//! the token after it, logits of the next one after that.
//!
//! `x = eh_proj [rms(embed(t_{i+1}), enorm), rms(h_i, hnorm)]`, a decoder layer with a cache of its own, and
//! `lm_head(rms(y, shared_head.norm))`. `h_i` is what follows the model's final norm; for a further token it is the layer's
//! own output. It is a rank's alone: nothing is summed over ranks.

use tandem_core::backend::{AddRmsNorm, Backend, CacheSpec, Linear, RmsNorm};
use tandem_core::weights::{Axis, ModuleKind, Weight};
use tandem_core::{CheckpointError, ModelConfig, ModelType};

use crate::decoder::{Layer, Normed, Step};
use crate::registry::cache_specs;
use crate::{KvCache, Limits, Loader, WeightSource};

/// Where the layer's weights come from: the whole of them, whatever this rank's share of the others.
pub struct MtpSource<'a> {
    /// The whole model's configuration.
    pub config: &'a ModelConfig,
    /// The whole model's weights.
    pub source: &'a dyn WeightSource,
    has_own: [bool; 2],
}

impl<'a> MtpSource<'a> {
    /// Of a model whose `source` has these weights; none if there is no such layer among them.
    pub fn new(config: &'a ModelConfig, source: &'a dyn WeightSource, weights: &[Weight]) -> Option<MtpSource<'a>> {
        let is_there = |name: &str| {
            let module = format!("model.layers.{}.{name}", config.num_hidden_layers);
            weights.iter().any(|w| w.spec.kind == ModuleKind::Mtp && w.spec.module == module)
        };
        let has_own = ["embed_tokens", "shared_head.head"].map(is_there);
        is_there("eh_proj").then_some(MtpSource { config, source, has_own })
    }
}

/// A loaded layer.
pub(crate) struct Mtp<B: Backend, L: Layer<B>> {
    enorm: B::Buffer,
    hnorm: B::Buffer,
    /// `eh_proj`'s columns that meet the embedding and those that meet the hidden state, `[hidden_size, hidden_size]` each.
    eh_proj: [B::Matrix; 2],
    layer: Normed<B, L>,
    shared_head_norm: B::Buffer,
    embed_tokens: Option<B::Matrix>,
    head: Option<B::Matrix>,
    shared: L::Shared,
    eps: f32,
    caches: [Vec<CacheSpec>; 1],
    feeds_back_normed: bool,
    s: Scratch<B>,
}

/// Activations; `n` is the rows of the batch.
struct Scratch<B: Backend> {
    /// `[n, hidden_size]` each.
    embedded: B::Buffer,
    given: B::Buffer,
    normed: B::Buffer,
    hidden: B::Buffer,
    block: B::Buffer,
    /// `[max_logits_rows, hidden_size]` each.
    last: B::Buffer,
    last_normed: B::Buffer,
    /// `[max_logits_rows, vocab_size]`
    logits: B::Buffer,
}

impl<B: Backend, L: Layer<B>> Mtp<B, L> {
    /// Loads the first layer after the decoder's.
    ///
    /// # Errors
    /// The checkpoint is damaged, or its projection cannot be divided where the embedding ends.
    pub(crate) fn load(
        backend: &B,
        from: &MtpSource<'_>,
        limits: Limits,
        shared: L::Shared,
        layer: impl Fn(&mut Loader<'_, B>, usize) -> Result<L, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        let (config, idx) = (from.config, from.config.num_hidden_layers);
        let progress = &mut |_| {};
        let loader = &mut Loader::new(backend, from.source, progress);
        let p = format!("model.layers.{idx}");
        let (n, hidden) = (limits.max_rows, config.hidden_size);
        let eh_proj = from.source.matrix(&format!("{p}.eh_proj"))?;
        if !hidden.is_multiple_of(eh_proj.dtype.group_size()) {
            let problem = format!("{p}.eh_proj has groups that hold columns of both of its halves");
            return Err(CheckpointError::Mismatch { problems: vec![problem] });
        }
        let half = |columns| backend.load_matrix(eh_proj.clone().cut(Axis::Cols, columns));
        Ok(Mtp {
            enorm: loader.vector(&format!("{p}.enorm"), "weight")?,
            hnorm: loader.vector(&format!("{p}.hnorm"), "weight")?,
            eh_proj: [half(0..hidden), half(hidden..2 * hidden)],
            layer: Normed::load(loader, idx, &layer)?,
            shared_head_norm: loader.vector(&format!("{p}.shared_head.norm"), "weight")?,
            embed_tokens: loader.matrix_if(from.has_own[0], &format!("{p}.embed_tokens"))?,
            head: loader.matrix_if(from.has_own[1], &format!("{p}.shared_head.head"))?,
            shared,
            eps: config.rms_norm_eps,
            caches: [cache_specs(config, idx)],
            // GLM's was trained on what follows the head's norm, as on what follows the model's; DeepSeek's takes its output.
            feeds_back_normed: matches!(config.model_type, ModelType::GlmMoeDsa | ModelType::Glm4MoeLite),
            s: Scratch {
                embedded: backend.alloc(n, hidden),
                given: backend.alloc(n, hidden),
                normed: backend.alloc(n, hidden),
                hidden: backend.alloc(n, hidden),
                block: backend.alloc(n, hidden),
                last: backend.alloc(limits.max_logits_rows, hidden),
                last_normed: backend.alloc(limits.max_logits_rows, hidden),
                logits: backend.alloc(limits.max_logits_rows, config.vocab_size),
            },
        })
    }

    pub(crate) fn cache_specs(&self) -> &[Vec<CacheSpec>] {
        &self.caches
    }

    /// Enqueues the batch's tokens after `given` hidden states, `[n_rows, hidden_size]`. `ends` are the model's embedding
    /// and head, for a layer without its own.
    pub(crate) fn forward(
        &mut self,
        b: &B,
        step: &Step<'_, B>,
        given: &[f32],
        ends: [Option<&B::Matrix>; 2],
        cache: &mut KvCache<B>,
    ) {
        let (s, eps, n_rows, batch) = (&mut self.s, self.eps, step.shape.n_rows, step.batch);
        let [embed_tokens, head] = ends;
        let (Some(embed_tokens), [cache]) = (self.embed_tokens.as_ref().or(embed_tokens), &mut cache.layers[..]) else {
            unreachable!("a rank with this layer holds the embedding, and the layer has one cache");
        };
        b.embed(embed_tokens, batch, &mut s.embedded);
        b.rms_norm(RmsNorm { x: &s.embedded, weight: &self.enorm, eps, n_rows, out: &mut s.normed });
        let outputs = &mut [(&self.eh_proj[0], &mut s.hidden)];
        b.linear(Linear { x: &s.normed, n_rows, outputs, label: ModuleKind::Mtp });
        b.write_rows(given, &mut s.given);
        b.rms_norm(RmsNorm { x: &s.given, weight: &self.hnorm, eps, n_rows, out: &mut s.normed });
        let outputs = &mut [(&self.eh_proj[1], &mut s.block)];
        b.linear(Linear { x: &s.normed, n_rows, outputs, label: ModuleKind::Mtp });
        let Normed { input_layernorm, layer, post_attention_layernorm } = &self.layer;
        let (y, weight, out) = (&s.block, input_layernorm, &mut s.normed);
        b.add_rms_norm(AddRmsNorm { x: &mut s.hidden, y, weight, eps, n_rows, out });
        layer.attention(b, &mut self.shared, step, cache, &s.normed, &mut s.block);
        let (y, weight, out) = (&s.block, post_attention_layernorm, &mut s.normed);
        b.add_rms_norm(AddRmsNorm { x: &mut s.hidden, y, weight, eps, n_rows, out });
        layer.mlp(b, &mut self.shared, n_rows, &s.normed, &mut s.block);
        b.add(&mut s.hidden, &s.block, n_rows);
        if let (n_rows @ 1.., Some(head)) = (step.shape.n_logits, self.head.as_ref().or(head)) {
            b.gather_logits_rows(&s.hidden, batch, &mut s.last);
            let weight = &self.shared_head_norm;
            b.rms_norm(RmsNorm { x: &s.last, weight, eps, n_rows, out: &mut s.last_normed });
            let outputs = &mut [(head, &mut s.logits)];
            b.linear(Linear { x: &s.last_normed, n_rows, outputs, label: ModuleKind::Mtp });
        }
    }

    /// Logits of the wanted rows, and the hidden states from which the token after these is drafted.
    pub(crate) fn outputs(&self) -> (&B::Buffer, &B::Buffer) {
        (&self.s.logits, if self.feeds_back_normed { &self.s.last_normed } else { &self.s.last })
    }
}
