//! DeepSeek-V3, DeepSeek-V3.2 and GLM-5.x (`deepseek_v3`, `deepseek_v32`, `glm_moe_dsa`): multi-head latent attention,
//! sparse attention by a lightning indexer, mixture of experts.
//!
//! References: DeepSeek-V2 (arXiv 2405.04434) for MLA, DeepSeek-V3 (2412.19437) for routing, the DeepSeek-V3.2 report
//! for the indexer, transformers' `modeling_glm_moe_dsa.py` for conventions. Attention runs absorbed: queries are moved
//! into the latent space, so that the cache holds one latent per token whatever the number of heads.

use tandem_core::backend::{
    Backend, CacheKind, CacheSpec, HeadLinear, Heads, Linear, Mlp, Moe, PrepareAttention, RmsNorm, Rope,
    RopeIndexSelect, RopeLayout, RopeMlaAttention, Route, Routing, WriteIndexKey, WriteLatent,
};
use tandem_core::config::{IndexerConfig, MlaConfig};
use tandem_core::weights::{Axis, Form, ModuleKind, Read, Split, WeightSpec};
use tandem_core::{CheckpointError, ModelConfig};

use crate::decoder::{self, Decoder, Layer, Step, mlp_specs};
use crate::mtp::{Mtp, MtpSource};
use crate::{LayerCache, Limits, Loader, Model, Share};

/// Epsilon of the norms inside attention: 1e-6 in DeepSeek's code whatever `rms_norm_eps` says.
const ATTENTION_NORM_EPS: f32 = 1e-6;

/// The numbers of the forward pass.
struct Dims {
    n_heads: usize,
    mla: MlaConfig,
    indexer: Option<IndexerConfig>,
    routing: Routing,
    softmax_scale: f32,
    rope: Rope,
    index_rope: Rope,
}

/// A decoder layer between its norms.
struct DeepseekLayer<B: Backend> {
    attention: Attention<B>,
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

/// What all layers use. `n` is the rows of the batch.
struct Shared<B: Backend> {
    dims: Dims,
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
}

impl<B: Backend> Layer<B> for DeepseekLayer<B> {
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
        self.attention.forward(b, shared, step, cache, x, out);
    }

    fn mlp(&self, b: &B, s: &mut Shared<B>, n_rows: usize, x: &B::Buffer, out: &mut B::Buffer) {
        match &self.mlp {
            Block::Dense(mlp) => b.mlp(x, mlp, n_rows, out),
            Block::Moe { gate, bias, experts, shared } => {
                let (ids, weights) = (&mut s.expert_ids, &mut s.expert_weights);
                let (routing, logits) = (&s.dims.routing, &mut s.router_logits);
                b.route(Route { x, gate, bias, routing, n_rows, logits, ids, weights });
                let (ids, weights) = (&s.expert_ids, &s.expert_weights);
                b.moe(Moe { x, experts, shared: shared.as_ref(), ids, weights, n_rows, out });
            }
        }
    }

    fn mlp_kind(&self) -> ModuleKind {
        match &self.mlp {
            Block::Dense(_) => ModuleKind::DenseMlp,
            Block::Moe { .. } => ModuleKind::RoutedExperts,
        }
    }
}

impl<B: Backend> Attention<B> {
    /// `out = attention(x)`
    fn forward(
        &self,
        b: &B,
        s: &mut Shared<B>,
        step: &Step<'_, B>,
        cache: &mut LayerCache<B>,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) {
        let Step { batch, shape } = *step;
        let (dims, n) = (&s.dims, shape.n_rows);
        let (mla, n_heads) = (&dims.mla, dims.n_heads);
        let [latent, index @ ..] = &mut cache.caches[..] else { unreachable!("cache_specs lists a latent") };
        let mut index = index.first_mut();
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
        b.linear(Linear { x, n_rows: n, outputs: &mut projections, label: ModuleKind::Attention });
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
        let key = self.indexer.as_ref().zip(index.as_deref_mut()).map(|(indexer, cache)| WriteIndexKey {
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
        let (x, w, latent_q) = (&s.q, &self.embed_q, &mut s.q_latent);
        b.head_linear(HeadLinear { x, from: nope, w, n_rows: n, out: latent_q, to: to_latent });
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
        let (x, w, values) = (&s.attended, &self.unembed_out, &mut s.values);
        b.head_linear(HeadLinear { x, from, w, n_rows: n, out: values, to });
        let outputs = &mut [(&self.o_proj, out)];
        b.linear(Linear { x: &s.values, n_rows: n, outputs, label: ModuleKind::Attention });
    }
}

/// Loads the share's decoder layers, and the MTP layer if one is asked for.
pub(crate) fn load<B: Backend + 'static>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    share: Share<B>,
    limits: Limits,
    mtp: Option<MtpSource<'_>>,
) -> Result<Box<dyn Model<B>>, CheckpointError> {
    let shared = Shared::new(loader.backend, config, Dims::new(config, &share), limits.max_rows);
    let mtp = match mtp {
        Some(from) => {
            let dims = Dims::new(from.config, &Share::<B>::whole(from.config));
            let shared = Shared::new(loader.backend, from.config, dims, limits.max_rows);
            let layer = |loader: &mut Loader<'_, B>, layer: usize| load_layer(loader, from.config, layer);
            Some(Mtp::load(loader.backend, &from, limits, shared, layer)?)
        }
        None => None,
    };
    let layer = |loader: &mut Loader<'_, B>, layer: usize| load_layer(loader, config, layer);
    Ok(Box::new(Decoder::load(loader, config, share, limits, shared, mtp, layer)?))
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
            softmax_scale: config.softmax_scale(),
            rope: rope(mla.rope_interleave),
            index_rope: rope(config.indexer.as_ref().is_some_and(|i| i.rope_interleave)),
            indexer: config.indexer.clone(),
            mla,
        }
    }
}

impl<B: Backend> Shared<B> {
    fn new(b: &B, config: &ModelConfig, dims: Dims, n: usize) -> Shared<B> {
        let (heads, mla) = (dims.n_heads, &dims.mla);
        let q_lora = mla.q_lora_rank.unwrap_or(0);
        let latent = mla.kv_lora_rank + mla.qk_rope_head_dim;
        let (index_heads, index_dim, index_topk) =
            dims.indexer.as_ref().map_or((0, 0, 0), |i| (i.index_n_heads, i.index_head_dim, i.index_topk));
        let n_experts = config.moe.as_ref().map_or(0, |m| m.n_routed_experts);
        Shared {
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
            dims,
        }
    }
}

fn load_layer<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    layer: usize,
) -> Result<DeepseekLayer<B>, CheckpointError> {
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
    Ok(DeepseekLayer { attention, mlp })
}

/// The latent with the shared key, and the indexer's key if the layer has an indexer of its own.
pub(crate) fn cache_specs(config: &ModelConfig, layer: usize) -> Vec<CacheSpec> {
    let latent = config.mla.as_ref().map(|mla| mla.kv_lora_rank + mla.qk_rope_head_dim);
    let key = config.indexer.as_ref().filter(|_| config.has_indexer(layer)).map(|indexer| indexer.index_head_dim);
    let specs = [(CacheKind::Latent, latent), (CacheKind::IndexKey, key)];
    specs.into_iter().filter_map(|(kind, width)| Some(CacheSpec { kind, width: width? })).collect()
}

/// Every weight of the decoder.
pub(crate) fn weight_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    decoder::weight_specs(config, layer_specs)
}

/// Every weight of the multi-token-prediction layers: a decoder layer, two norms, a projection, and a head's norm
/// (DeepSeek-V3, section 2.2). Published checkpoints may repeat the embedding and the head there.
pub(crate) fn mtp_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut specs = vec![];
    for layer in config.mtp_layers() {
        let p = format!("model.layers.{layer}");
        let of_layer = specs.len();
        specs.extend(decoder::layer_specs(config, layer, layer_specs(config, layer)));
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
            spec.read = Read::Never;
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
            indexer("wq_b", &[i.index_n_heads * i.index_head_dim, q_lora]).read(Read::Sparse),
            indexer("wk", &[i.index_head_dim, hidden]),
            norm(format!("{a}.indexer.k_norm"), i.index_head_dim),
            WeightSpec::vector(format!("{a}.indexer.k_norm"), "bias", i.index_head_dim, ModuleKind::Norms),
            indexer("weights_proj", &[i.index_n_heads, hidden]).read(Read::Sparse),
        ]);
    }
    if config.is_sparse(layer) {
        let (n, width) = (moe.n_routed_experts, moe.moe_intermediate_size);
        let (stack, experts) = (format!("{p}.mlp.switch_mlp"), Some((n, moe.num_experts_per_tok)));
        specs.extend(mlp_specs(&stack, hidden, width, experts, ModuleKind::RoutedExperts));
        if moe.n_shared_experts > 0 {
            let (module, width) = (format!("{p}.mlp.shared_experts"), width * moe.n_shared_experts);
            specs.extend(mlp_specs(&module, hidden, width, None, ModuleKind::SharedExpert));
        }
        let gate = format!("{p}.mlp.gate");
        let matrix = WeightSpec::matrix(gate.clone(), &[n, hidden], ModuleKind::Router, Form::Matrix);
        specs.push(WeightSpec { keeps_format: true, ..matrix });
        specs.push(WeightSpec::vector(gate, "e_score_correction_bias", n, ModuleKind::Router));
    } else {
        specs.extend(mlp_specs(&format!("{p}.mlp"), hidden, config.intermediate_size, None, ModuleKind::DenseMlp));
    }
    specs
}
