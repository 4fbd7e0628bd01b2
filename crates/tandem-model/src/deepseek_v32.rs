//! DeepSeek-V3, DeepSeek-V3.2 and GLM-5.x (`deepseek_v3`, `deepseek_v32`, `glm_moe_dsa`): multi-head latent attention,
//! sparse attention by a lightning indexer, mixture of experts.
//!
//! References: DeepSeek-V2 (arXiv 2405.04434) for MLA, DeepSeek-V3 (2412.19437) for routing, the DeepSeek-V3.2 report
//! for the indexer, transformers' `modeling_glm_moe_dsa.py` for conventions. Attention runs absorbed: queries are moved
//! into the latent space, so that the cache holds one latent per token whatever the number of heads.

use tandem_core::backend::{
    AddRmsNorm, Backend, CacheKind, HeadLinear, Heads, Linear, Mlp, Moe, PrepareAttention, RmsNorm, Rope,
    RopeIndexSelect, RopeLayout, RopeMlaAttention, Route, Routing, WriteIndexKey, WriteLatent,
};
use tandem_core::config::{IndexerConfig, MlaConfig};
use tandem_core::weights::{Axis, Form, ModuleKind, Split, WeightSpec};
use tandem_core::{CheckpointError, ModelConfig};

use crate::{KvCache, LayerCache, Limits, Loader, Model, Share, StepShape};

/// Epsilon of the norms inside attention: 1e-6 in DeepSeek's code whatever `rms_norm_eps` says.
const ATTENTION_NORM_EPS: f32 = 1e-6;

/// A loaded model of the DeepSeek line.
pub struct DeepseekV32<B: Backend> {
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

/// The numbers of the forward pass.
struct Dims {
    n_heads: usize,
    mla: MlaConfig,
    indexer: Option<IndexerConfig>,
    routing: Routing,
    rms_norm_eps: f32,
    softmax_scale: f32,
    rope: Rope,
    index_rope: Rope,
}

struct Layer<B: Backend> {
    input_layernorm: B::Buffer,
    attention: Attention<B>,
    post_attention_layernorm: B::Buffer,
    mlp: Block<B>,
}

struct Attention<B: Backend> {
    query: Query<B>,
    kv_a_proj_with_mqa: B::Matrix,
    kv_a_layernorm: B::Buffer,
    embed_q: B::Matrix,
    unembed_out: B::Matrix,
    o_proj: B::Matrix,
    indexer: Option<Indexer<B>>,
}

enum Query<B: Backend> {
    Direct { q_proj: B::Matrix },
    LowRank { q_a_proj: B::Matrix, q_a_layernorm: B::Buffer, q_b_proj: B::Matrix },
}

struct Indexer<B: Backend> {
    wq_b: B::Matrix,
    wk: B::Matrix,
    k_norm: B::Buffer,
    k_norm_bias: B::Buffer,
    weights_proj: B::Matrix,
}

enum Block<B: Backend> {
    Dense(Mlp<B::Matrix>),
    Moe { gate: B::Matrix, bias: B::Buffer, experts: Mlp<B::Matrix>, shared: Option<Mlp<B::Matrix>> },
}

/// All activations, allocated once; a step allocates nothing. `n` is the rows of the batch.
struct Scratch<B: Backend> {
    /// Residual stream, `[n, hidden_size]`.
    hidden: B::Buffer,
    /// Norm of the residual stream, `[n, hidden_size]`.
    normed: B::Buffer,
    /// Output of a block, `[n, hidden_size]`.
    block: B::Buffer,
    /// `[n, q_lora_rank]`
    q_a: B::Buffer,
    /// `[n, q_lora_rank]`
    q_a_normed: B::Buffer,
    /// `[n, n_heads * (nope + rope)]`
    q: B::Buffer,
    /// Queries in the latent space, `[n, n_heads * (kv_lora_rank + rope)]`.
    q_latent: B::Buffer,
    /// `[n, kv_lora_rank + rope]`
    kv_a: B::Buffer,
    /// `[n, n_heads * kv_lora_rank]`
    attended: B::Buffer,
    /// `[n, n_heads * v_head_dim]`
    values: B::Buffer,
    /// `[n, index_n_heads * index_head_dim]`, before and after rotation.
    index_q: B::Buffer,
    index_q_rotated: B::Buffer,
    /// `[n, index_head_dim]`
    index_k: B::Buffer,
    /// `[n, index_n_heads]`
    index_weights: B::Buffer,
    /// `[n, index_topk]`
    selected: B::Indices,
    /// `[n, n_routed_experts]`
    router_logits: B::Buffer,
    /// `[n, num_experts_per_tok]`
    expert_ids: B::Indices,
    expert_weights: B::Buffer,
    /// `[max_logits_rows, hidden_size]`
    last: B::Buffer,
    last_normed: B::Buffer,
    /// `[max_logits_rows, vocab_size]`
    logits: B::Buffer,
}

impl<B: Backend> Model<B> for DeepseekV32<B> {
    fn forward(&mut self, b: &B, batch: &B::Batch, shape: StepShape, cache: &mut KvCache<B>) {
        let n = shape.n_rows;
        let eps = self.dims.rms_norm_eps;
        let [attention_sliced, dense_sliced, moe_sliced] = self.share.division.reduces();
        if let (true, Some(embed_tokens)) = (self.share.part().embeds, &self.embed_tokens) {
            b.embed(embed_tokens, batch, &mut self.scratch.hidden);
        }
        for (i, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            let s = &mut self.scratch;
            // The output of the layer before joins the residual stream together with this norm.
            if i == 0 {
                let (x, weight, out) = (&s.hidden, &layer.input_layernorm, &mut s.normed);
                b.rms_norm(RmsNorm { x, weight, eps, n_rows: n, out });
            } else {
                let (x, y, weight, out) = (&mut s.hidden, &s.block, &layer.input_layernorm, &mut s.normed);
                b.add_rms_norm(AddRmsNorm { x, y, weight, eps, n_rows: n, out });
            }
            self.share.begin_layer(b, i, &s.hidden, n);
            layer.attention.forward(b, &self.dims, batch, shape, cache, s);
            self.share.all_reduce(b, attention_sliced, &mut s.block, n, "attention");
            let (x, y, weight, out) = (&mut s.hidden, &s.block, &layer.post_attention_layernorm, &mut s.normed);
            b.add_rms_norm(AddRmsNorm { x, y, weight, eps, n_rows: n, out });
            layer.mlp.forward(b, &self.dims, n, s);
            let mlp_sliced = if matches!(layer.mlp, Block::Moe { .. }) { moe_sliced } else { dense_sliced };
            self.share.all_reduce(b, mlp_sliced, &mut s.block, n, "the MLP");
        }
        if !self.layers.is_empty() {
            b.add(&mut self.scratch.hidden, &self.scratch.block, n);
        }
        if let (true, Some(norm)) = (shape.n_logits > 0, &self.norm) {
            let s = &mut self.scratch;
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
        let mla = &self.dims.mla;
        let layers = self
            .layers
            .iter()
            .map(|layer| LayerCache::Latent {
                latent: backend.alloc_cache(CacheKind::Latent, n_slots, mla.kv_lora_rank + mla.qk_rope_head_dim),
                index: match (&layer.attention.indexer, &self.dims.indexer) {
                    (Some(_), Some(i)) => Some(backend.alloc_cache(CacheKind::IndexKey, n_slots, i.index_head_dim)),
                    _ => None,
                },
            })
            .collect();
        KvCache { layers }
    }

    fn cache_bytes_per_token(&self, backend: &B) -> usize {
        let mla = &self.dims.mla;
        let latent = backend.cache_bytes(CacheKind::Latent, mla.kv_lora_rank + mla.qk_rope_head_dim);
        let index =
            self.dims.indexer.as_ref().map_or(0, |i| backend.cache_bytes(CacheKind::IndexKey, i.index_head_dim));
        let n_indexers = self.layers.iter().filter(|l| l.attention.indexer.is_some()).count();
        self.layers.len() * latent + n_indexers * index
    }
}

impl<B: Backend> Attention<B> {
    /// `scratch.block = attention(scratch.normed)`
    fn forward(
        &self,
        b: &B,
        dims: &Dims,
        batch: &B::Batch,
        shape: StepShape,
        cache: &mut LayerCache<B>,
        s: &mut Scratch<B>,
    ) {
        let n = shape.n_rows;
        let (mla, n_heads) = (&dims.mla, dims.n_heads);
        let LayerCache::Latent { latent, index } = cache else { unreachable!("the cache was made by this model") };
        // Below index_topk every position is selected: the keys must be cached, but queries need not be scored.
        let sparse = dims.indexer.as_ref().is_some_and(|i| shape.max_context > i.index_topk);

        let mut projections = vec![(&self.kv_a_proj_with_mqa, &mut s.kv_a)];
        match &self.query {
            Query::Direct { q_proj } => projections.push((q_proj, &mut s.q)),
            Query::LowRank { q_a_proj, .. } => projections.push((q_a_proj, &mut s.q_a)),
        }
        if let Some(indexer) = &self.indexer {
            projections.push((&indexer.wk, &mut s.index_k));
            if sparse {
                projections.push((&indexer.weights_proj, &mut s.index_weights));
            }
        }
        b.linear(Linear { x: &s.normed, n_rows: n, outputs: &mut projections, label: ModuleKind::Attention });
        let eps = ATTENTION_NORM_EPS;
        let query = match &self.query {
            Query::Direct { .. } => None,
            Query::LowRank { q_a_layernorm, .. } => {
                let (x, out) = (&s.q_a, &mut s.q_a_normed);
                Some(RmsNorm { x, weight: q_a_layernorm, eps, n_rows: n, out })
            }
        };
        let (norm, rope) = (&self.kv_a_layernorm, &dims.rope);
        let write_latent = WriteLatent { kv_a: &s.kv_a, norm, eps, rope, batch, cache: &mut *latent };
        let key = self.indexer.as_ref().zip(index.as_mut()).map(|(indexer, cache)| WriteIndexKey {
            k: &s.index_k,
            norm: &indexer.k_norm,
            norm_bias: &indexer.k_norm_bias,
            eps,
            rope: &dims.index_rope,
            batch,
            cache,
        });
        b.prepare_attention(PrepareAttention { query, latent: write_latent, key });
        if let Query::LowRank { q_b_proj, .. } = &self.query {
            let mut projections = vec![(q_b_proj, &mut s.q)];
            if let Some(indexer) = &self.indexer
                && sparse
            {
                projections.push((&indexer.wq_b, &mut s.index_q));
            }
            b.linear(Linear { x: &s.q_a_normed, n_rows: n, outputs: &mut projections, label: ModuleKind::Attention });
        }
        if let (true, Some(index), Some(config)) = (sparse && self.indexer.is_some(), index, &dims.indexer) {
            // The references scale every score by `index_n_heads^-0.5 * index_head_dim^-0.5`; a positive factor does not
            // change which positions win, so it is left out.
            b.rope_index_select(RopeIndexSelect {
                q: &s.index_q,
                heads: Heads::packed(config.index_n_heads, config.index_head_dim),
                rope: &dims.index_rope,
                rotated: &mut s.index_q_rotated,
                weights: &s.index_weights,
                batch,
                cache: index,
                selected: &mut s.selected,
            });
        }

        // q = [q_nope | q_rope] per head -> [embed_q . q_nope | rope(q_rope)], comparable with the cached vector.
        let q_stride = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
        let latent_stride = mla.kv_lora_rank + mla.qk_rope_head_dim;
        let nope = Heads { n: n_heads, stride: q_stride, offset: 0, width: mla.qk_nope_head_dim };
        let rope = Heads { n: n_heads, stride: q_stride, offset: mla.qk_nope_head_dim, width: mla.qk_rope_head_dim };
        let to_latent = Heads { n: n_heads, stride: latent_stride, offset: 0, width: mla.kv_lora_rank };
        let (w, out) = (&self.embed_q, &mut s.q_latent);
        b.head_linear(HeadLinear { x: &s.q, from: nope, w, n_rows: n, out, to: to_latent });
        b.rope_mla_attention(RopeMlaAttention {
            x: &s.q,
            from: rope,
            rope: &dims.rope,
            q: &mut s.q_latent,
            latent: mla.kv_lora_rank,
            scale: dims.softmax_scale,
            batch,
            cache: latent,
            selected: sparse.then_some(&s.selected),
            out: &mut s.attended,
        });
        let (from, to) = (Heads::packed(n_heads, mla.kv_lora_rank), Heads::packed(n_heads, mla.v_head_dim));
        let (w, out) = (&self.unembed_out, &mut s.values);
        b.head_linear(HeadLinear { x: &s.attended, from, w, n_rows: n, out, to });
        let outputs = &mut [(&self.o_proj, &mut s.block)];
        b.linear(Linear { x: &s.values, n_rows: n, outputs, label: ModuleKind::Attention });
    }
}

impl<B: Backend> Block<B> {
    /// `scratch.block = mlp(scratch.normed)`
    fn forward(&self, b: &B, dims: &Dims, n: usize, s: &mut Scratch<B>) {
        match self {
            Block::Dense(mlp) => b.mlp(&s.normed, mlp, n, &mut s.block),
            Block::Moe { gate, bias, experts, shared } => {
                let (x, ids, weights) = (&s.normed, &mut s.expert_ids, &mut s.expert_weights);
                let (routing, logits) = (&dims.routing, &mut s.router_logits);
                b.route(Route { x, gate, bias, routing, n_rows: n, logits, ids, weights });
                let (ids, weights, out) = (&s.expert_ids, &s.expert_weights, &mut s.block);
                b.moe(Moe { x, experts, shared: shared.as_ref(), ids, weights, n_rows: n, out });
            }
        }
    }
}

impl<B: Backend> DeepseekV32<B> {
    /// Loads the share's decoder layers (an MTP layer stays in the checkpoint).
    ///
    /// # Errors
    /// The checkpoint is damaged.
    pub fn load(
        loader: &mut Loader<'_, B>,
        config: &ModelConfig,
        share: Share<B>,
        limits: Limits,
    ) -> Result<Self, CheckpointError> {
        let dims = Dims::new(config, &share);
        let part = share.part();
        let layers = part.layers.clone().map(|l| load_layer(loader, config, l)).collect::<Result<Vec<_>, _>>()?;
        let tied = config.tie_word_embeddings;
        let limits = Limits { max_logits_rows: if part.head { limits.max_logits_rows } else { 0 }, ..limits };
        Ok(DeepseekV32 {
            embed_tokens: loader.matrix_if(part.embeds || (part.head && tied), "model.embed_tokens")?,
            layers,
            norm: if part.head { Some(loader.vector("model.norm", "weight")?) } else { None },
            lm_head: loader.matrix_if(part.head && !tied, "lm_head")?,
            scratch: Scratch::new(loader.backend, config, &dims, limits),
            dims,
            share,
        })
    }
}

impl Dims {
    fn new<B: Backend>(config: &ModelConfig, share: &Share<B>) -> Dims {
        let (mla, moe) = (config.mla.clone(), config.moe.as_ref());
        let (Some(mla), Some(moe)) = (mla, moe) else { unreachable!("this family's config has both") };
        let held = share.division.held_experts();
        let rope = |interleaved: bool| Rope {
            inv_freq: config.rope.inv_freq(mla.qk_rope_head_dim),
            scaling: config.rope.attention_scaling(),
            layout: if interleaved { RopeLayout::Interleaved } else { RopeLayout::Half },
        };
        Dims {
            n_heads: config.num_attention_heads,
            routing: Routing {
                top_k: moe.num_experts_per_tok,
                n_group: moe.n_group,
                topk_group: moe.topk_group,
                normalize: moe.norm_topk_prob,
                scale: moe.routed_scaling_factor,
                first_expert: held.start,
                n_held: held.len(),
            },
            rms_norm_eps: config.rms_norm_eps,
            softmax_scale: config.softmax_scale(),
            rope: rope(mla.rope_interleave),
            index_rope: rope(config.indexer.as_ref().is_some_and(|i| i.rope_interleave)),
            indexer: config.indexer.clone(),
            mla,
        }
    }
}

impl<B: Backend> Scratch<B> {
    fn new(b: &B, config: &ModelConfig, dims: &Dims, limits: Limits) -> Scratch<B> {
        let (n, hidden, heads, mla) = (limits.max_rows, config.hidden_size, dims.n_heads, &dims.mla);
        let q_lora = mla.q_lora_rank.unwrap_or(0);
        let latent = mla.kv_lora_rank + mla.qk_rope_head_dim;
        let (index_heads, index_dim, index_topk) =
            dims.indexer.as_ref().map_or((0, 0, 0), |i| (i.index_n_heads, i.index_head_dim, i.index_topk));
        let n_experts = config.moe.as_ref().map_or(0, |m| m.n_routed_experts);
        Scratch {
            hidden: b.alloc(n, hidden),
            normed: b.alloc(n, hidden),
            block: b.alloc(n, hidden),
            q_a: b.alloc(n, q_lora),
            q_a_normed: b.alloc(n, q_lora),
            q: b.alloc(n, heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)),
            q_latent: b.alloc(n, heads * latent),
            kv_a: b.alloc(n, latent),
            attended: b.alloc(n, heads * mla.kv_lora_rank),
            values: b.alloc(n, heads * mla.v_head_dim),
            index_q: b.alloc(n, index_heads * index_dim),
            index_q_rotated: b.alloc(n, index_heads * index_dim),
            index_k: b.alloc(n, index_dim),
            index_weights: b.alloc(n, index_heads),
            selected: b.alloc_indices(n, index_topk),
            router_logits: b.alloc(n, n_experts),
            expert_ids: b.alloc_indices(n, dims.routing.top_k),
            expert_weights: b.alloc(n, dims.routing.top_k),
            last: b.alloc(limits.max_logits_rows, hidden),
            last_normed: b.alloc(limits.max_logits_rows, hidden),
            logits: b.alloc(limits.max_logits_rows, config.vocab_size),
        }
    }
}

fn load_layer<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    layer: usize,
) -> Result<Layer<B>, CheckpointError> {
    let p = format!("model.layers.{layer}");
    let a = format!("{p}.self_attn");
    let query = match config.mla.as_ref().and_then(|m| m.q_lora_rank) {
        None => Query::Direct { q_proj: loader.matrix(&format!("{a}.q_proj"))? },
        Some(_) => Query::LowRank {
            q_a_proj: loader.matrix(&format!("{a}.q_a_proj"))?,
            q_a_layernorm: loader.vector(&format!("{a}.q_a_layernorm"), "weight")?,
            q_b_proj: loader.matrix(&format!("{a}.q_b_proj"))?,
        },
    };
    let indexer = if config.has_indexer(layer) {
        Some(Indexer {
            wq_b: loader.matrix(&format!("{a}.indexer.wq_b"))?,
            wk: loader.matrix(&format!("{a}.indexer.wk"))?,
            k_norm: loader.vector(&format!("{a}.indexer.k_norm"), "weight")?,
            k_norm_bias: loader.vector(&format!("{a}.indexer.k_norm"), "bias")?,
            weights_proj: loader.matrix(&format!("{a}.indexer.weights_proj"))?,
        })
    } else {
        None
    };
    let attention = Attention {
        query,
        kv_a_proj_with_mqa: loader.matrix(&format!("{a}.kv_a_proj_with_mqa"))?,
        kv_a_layernorm: loader.vector(&format!("{a}.kv_a_layernorm"), "weight")?,
        embed_q: loader.matrix(&format!("{a}.embed_q"))?,
        unembed_out: loader.matrix(&format!("{a}.unembed_out"))?,
        o_proj: loader.matrix(&format!("{a}.o_proj"))?,
        indexer,
    };
    let mlp = if config.is_sparse(layer) {
        let has_shared = config.moe.as_ref().is_some_and(|m| m.n_shared_experts > 0);
        Block::Moe {
            gate: loader.matrix(&format!("{p}.mlp.gate"))?,
            bias: loader.vector(&format!("{p}.mlp.gate"), "e_score_correction_bias")?,
            experts: loader.mlp(&format!("{p}.mlp.switch_mlp"))?,
            shared: if has_shared { Some(loader.mlp(&format!("{p}.mlp.shared_experts"))?) } else { None },
        }
    } else {
        Block::Dense(loader.mlp(&format!("{p}.mlp"))?)
    };
    Ok(Layer {
        input_layernorm: loader.vector(&format!("{p}.input_layernorm"), "weight")?,
        attention,
        post_attention_layernorm: loader.vector(&format!("{p}.post_attention_layernorm"), "weight")?,
        mlp,
    })
}

/// Every weight of the decoder.
pub(crate) fn weight_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut specs = vec![
        WeightSpec::matrix("model.embed_tokens", &[vocab, hidden], ModuleKind::Embed, Form::Matrix),
        WeightSpec::vector("model.norm", "weight", hidden, ModuleKind::Norms),
    ];
    if !config.tie_word_embeddings {
        specs.push(WeightSpec::matrix("lm_head", &[vocab, hidden], ModuleKind::LmHead, Form::Matrix));
    }
    for layer in 0..config.num_hidden_layers {
        specs.extend(layer_specs(config, layer));
    }
    specs
}

/// Every weight of the multi-token-prediction layers: a decoder layer, two norms, a projection, and a head's norm
/// (DeepSeek-V3, section 2.2). Published checkpoints may repeat the embedding and the head there.
pub(crate) fn mtp_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut specs = vec![];
    for layer in config.mtp_layers() {
        let p = format!("model.layers.{layer}");
        let of_layer = specs.len();
        specs.extend(layer_specs(config, layer));
        for norm in ["enorm", "hnorm", "shared_head.norm"] {
            specs.push(WeightSpec::vector(format!("{p}.{norm}"), "weight", hidden, ModuleKind::Mtp));
        }
        let eh_proj = format!("{p}.eh_proj");
        specs.push(WeightSpec::matrix(eh_proj, &[hidden, 2 * hidden], ModuleKind::Mtp, Form::Matrix));
        for copy in ["embed_tokens", "shared_head.head"] {
            let spec = WeightSpec::matrix(format!("{p}.{copy}"), &[vocab, hidden], ModuleKind::Mtp, Form::Matrix);
            specs.push(WeightSpec { optional: true, ..spec });
        }
        for spec in &mut specs[of_layer..] {
            spec.kind = ModuleKind::Mtp;
            spec.layer = Some(layer);
        }
    }
    specs
}

fn layer_specs(config: &ModelConfig, layer: usize) -> Vec<WeightSpec> {
    let (Some(mla), Some(moe)) = (&config.mla, &config.moe) else { unreachable!("this family's config has both") };
    let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
    let p = format!("model.layers.{layer}");
    let a = format!("{p}.self_attn");
    let (nope, rope, v, kv_lora) = (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim, mla.kv_lora_rank);
    let norm = |module: String, len: usize| WeightSpec::vector(module, "weight", len, ModuleKind::Norms);
    let attention = |name: &str, shape: &[usize], form: Form| {
        WeightSpec::matrix(format!("{a}.{name}"), shape, ModuleKind::Attention, form)
    };

    let mut specs = vec![
        norm(format!("{p}.input_layernorm"), hidden),
        norm(format!("{p}.post_attention_layernorm"), hidden),
        attention("kv_a_proj_with_mqa", &[kv_lora + rope, hidden], Form::Matrix),
        norm(format!("{a}.kv_a_layernorm"), kv_lora),
        attention("embed_q", &[heads, kv_lora, nope], Form::EmbedQ).divided(Split::Heads(Axis::Stack)),
        attention("unembed_out", &[heads, v, kv_lora], Form::UnembedOut).divided(Split::Heads(Axis::Stack)),
        attention("o_proj", &[hidden, heads * v], Form::Matrix).divided(Split::Heads(Axis::Cols)),
    ];
    let q_proj = |name: &str, cols: usize| {
        attention(name, &[heads * (nope + rope), cols], Form::Matrix).divided(Split::Heads(Axis::Rows))
    };
    match mla.q_lora_rank {
        None => specs.push(q_proj("q_proj", hidden)),
        Some(q_lora) => specs.extend([
            attention("q_a_proj", &[q_lora, hidden], Form::Matrix),
            norm(format!("{a}.q_a_layernorm"), q_lora),
            q_proj("q_b_proj", q_lora),
        ]),
    }
    if let (true, Some(i), Some(q_lora)) = (config.has_indexer(layer), &config.indexer, mla.q_lora_rank) {
        let indexer = |name: &str, shape: &[usize]| {
            WeightSpec::matrix(format!("{a}.indexer.{name}"), shape, ModuleKind::Indexer, Form::Matrix)
        };
        specs.extend([
            indexer("wq_b", &[i.index_n_heads * i.index_head_dim, q_lora]),
            indexer("wk", &[i.index_head_dim, hidden]),
            norm(format!("{a}.indexer.k_norm"), i.index_head_dim),
            WeightSpec::vector(format!("{a}.indexer.k_norm"), "bias", i.index_head_dim, ModuleKind::Norms),
            indexer("weights_proj", &[i.index_n_heads, hidden]),
        ]);
    }
    let mut mlp = |module: String, stack: Option<usize>, width: usize, kind: ModuleKind| {
        for (name, rows, cols, axis) in [
            ("gate_proj", width, hidden, Axis::Rows),
            ("up_proj", width, hidden, Axis::Rows),
            ("down_proj", hidden, width, Axis::Cols),
        ] {
            let module = format!("{module}.{name}");
            let spec = match stack {
                Some(n) => WeightSpec::matrix(module, &[n, rows, cols], kind, Form::Experts),
                None => WeightSpec::matrix(module, &[rows, cols], kind, Form::Matrix),
            };
            specs.push(spec.divided(Split::Width(axis)));
        }
    };
    if config.is_sparse(layer) {
        let width = moe.moe_intermediate_size;
        mlp(format!("{p}.mlp.switch_mlp"), Some(moe.n_routed_experts), width, ModuleKind::RoutedExperts);
        if moe.n_shared_experts > 0 {
            let width = width * moe.n_shared_experts;
            mlp(format!("{p}.mlp.shared_experts"), None, width, ModuleKind::SharedExpert);
        }
        let gate = format!("{p}.mlp.gate");
        let n = moe.n_routed_experts;
        specs.push(WeightSpec::matrix(gate.clone(), &[n, hidden], ModuleKind::Router, Form::Matrix));
        specs.push(WeightSpec::vector(gate, "e_score_correction_bias", n, ModuleKind::Router));
    } else {
        mlp(format!("{p}.mlp"), None, config.intermediate_size, ModuleKind::DenseMlp);
    }
    for spec in &mut specs {
        spec.layer = Some(layer);
    }
    specs
}
