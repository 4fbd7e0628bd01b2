//! The seam between a model, written once, and the device that runs it.
//!
//! A backend implements a few fused, model-shaped operations over row-major activations. Operations only enqueue:
//! they do not allocate, wait or fail; shapes are checked when a model is loaded, and the first device error sticks and
//! is returned by [`Backend::sync`]. Everything that varies from step to step lives in the device's copy of a
//! [`Batch`]; `n_rows` is the size of the batch's bucket.

use crate::weights::MatrixData;

/// Tokens per page of the key-value cache.
pub const PAGE_SIZE: usize = 64;

/// In [`Batch::tokens`]: the token meant is the one that the device chose in the step before, for the entry of
/// [`Batch::choices`] that the other bits give. Among what [`Backend::collect`] returns: the other bits are the first token
/// whose logit is NaN.
pub const CHOSEN: u32 = 1 << 31;
/// Among what [`Backend::collect`] returns: no logit is above `-inf`.
pub const NO_TOKEN: u32 = u32::MAX;

/// How a device chooses the token that follows a row; the words are those of `tandem-engine`'s `SamplingParams`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep so many; 0 keeps all.
    pub top_k: u32,
    /// Keep this share of the probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with this share of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// The random number, in `0..1`.
    pub unit: f64,
}

/// What one step runs, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids, `[n_rows]`, or [`CHOSEN`].
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence, `[n_rows]`; it attends to positions up to and including its own.
    pub positions: Vec<u32>,
    /// For each row, which of `block_tables` it belongs to, `[n_rows]`.
    pub sequences: Vec<u32>,
    /// Pages of each sequence: position `p` lives in slot `pages[p / PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE`.
    pub block_tables: Vec<Vec<u32>>,
    /// Rows whose logits are wanted.
    pub logits_rows: Vec<u32>,
    /// For each of `logits_rows`, how the device chooses the next token; empty when the host chooses.
    pub choices: Vec<Choice>,
}

impl Batch {
    /// Rows in this batch.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Cache slot of position `position` of sequence `sequence`.
    #[inline]
    pub fn slot(&self, sequence: usize, position: usize) -> usize {
        self.block_tables[sequence][position / PAGE_SIZE] as usize * PAGE_SIZE + position % PAGE_SIZE
    }

    /// Longest context any row sees, its own position included.
    pub fn max_context(&self) -> usize {
        self.positions.iter().map(|p| *p as usize + 1).max().unwrap_or(0)
    }
}

/// A slice of every row of an activation, seen as heads: element `i` of head `h` is at `offset + h * stride + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Heads.
    pub n: usize,
    /// Distance between heads.
    pub stride: usize,
    /// Start of head 0.
    pub offset: usize,
    /// Elements of one head.
    pub width: usize,
}

impl Heads {
    /// `n` heads of `width`, one after the other from the start of the row.
    pub const fn packed(n: usize, width: usize) -> Heads {
        Heads { n, stride: width, offset: 0, width }
    }
}

/// Which elements a rotary embedding pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// (2i, 2i+1)
    Interleaved,
    /// (i, i + dim/2)
    Half,
}

/// A rotary embedding: frequencies, pairing and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `[dim / 2]`
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin.
    pub scaling: f32,
    /// Pairing.
    pub layout: RopeLayout,
}

impl Rope {
    /// Rotated dimensions.
    pub fn dim(&self) -> usize {
        self.inv_freq.len() * 2
    }
}

/// How experts are chosen (DeepSeek-V3's `noaux_tc`): sigmoid scores plus bias pick, scores alone weigh.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// Expert groups; 1 switches group-limited routing off.
    pub n_group: usize,
    /// Groups kept.
    pub topk_group: usize,
    /// Divide by the sum of the chosen scores.
    pub normalize: bool,
    /// Factor on the result.
    pub scale: f32,
    /// First expert that this rank holds. Ids are relative to it; an expert of another rank gets id -1, which
    /// [`Backend::moe`] leaves out.
    pub first_expert: usize,
    /// Experts that this rank holds: all of them unless experts are partitioned.
    pub n_held: usize,
}

/// Gate, up and down projections of a mixture of experts or of one MLP.
#[derive(Debug)]
pub struct Mlp<M> {
    /// `[experts?, intermediate, hidden]`
    pub gate: M,
    /// `[experts?, intermediate, hidden]`
    pub up: M,
    /// `[experts?, hidden, intermediate]`
    pub down: M,
}

/// What a cache holds, from which a backend picks the element type that its numerics allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheKind {
    /// MLA's normalised latent followed by the rotated shared key.
    Latent,
    /// Keys of the sparse-attention indexer.
    IndexKey,
    /// Keys or values of grouped-query attention.
    KeyValue,
}

/// A norm that [`Backend::prepare_attention`] makes: `out = rms_norm(x) * weight`.
pub struct NormJob<'a, T> {
    /// Input.
    pub x: &'a T,
    /// `[width]`
    pub weight: &'a T,
    /// Result.
    pub out: &'a mut T,
}

/// As [`Backend::write_latent`].
pub struct LatentJob<'a, T, C> {
    /// `[n_rows, latent + rope]`
    pub kv_a: &'a T,
    /// `[latent]`
    pub norm: &'a T,
    /// Of the shared key.
    pub rope: &'a Rope,
    /// Written to.
    pub cache: &'a mut C,
}

/// As [`Backend::write_index_key`].
pub struct IndexKeyJob<'a, T, C> {
    /// `[n_rows, dim]`
    pub k: &'a T,
    /// `[dim]`
    pub norm: &'a T,
    /// `[dim]`
    pub norm_bias: &'a T,
    /// Of the key's first dimensions.
    pub rope: &'a Rope,
    /// Written to.
    pub cache: &'a mut C,
}

/// Heads to rotate before they are used: [`Backend::rope`]'s `x`, `from`, `rope`.
#[derive(Clone, Copy)]
pub struct Rotation<'a, T> {
    /// Input.
    pub x: &'a T,
    /// The slice of `x`.
    pub from: Heads,
    /// The rotation.
    pub rope: &'a Rope,
}

/// The fused blocks of [`Backend`] as sequences of primitives: what they mean, and their default bodies.
#[allow(missing_docs, clippy::too_many_arguments)]
pub mod composed {
    use super::{Backend, Heads, IndexKeyJob, LatentJob, NormJob, Rotation, Routing};

    pub fn prepare_attention<B: Backend + ?Sized>(
        b: &B,
        query: Option<NormJob<'_, B::Buffer>>,
        latent: LatentJob<'_, B::Buffer, B::Cache>,
        key: Option<IndexKeyJob<'_, B::Buffer, B::Cache>>,
        eps: f32,
        batch: &B::Batch,
        n_rows: usize,
    ) {
        if let Some(NormJob { x, weight, out }) = query {
            b.rms_norm(x, weight, eps, n_rows, out);
        }
        b.write_latent(latent.kv_a, latent.norm, eps, latent.rope, batch, latent.cache);
        if let Some(IndexKeyJob { k, norm, norm_bias, rope, cache }) = key {
            b.write_index_key(k, norm, norm_bias, eps, rope, batch, cache);
        }
    }

    pub fn rope_index_select<B: Backend + ?Sized>(
        b: &B,
        q: Rotation<'_, B::Buffer>,
        rotated: &mut B::Buffer,
        weights: &B::Buffer,
        batch: &B::Batch,
        cache: &B::Cache,
        selected: &mut B::Indices,
    ) {
        b.rope(q.x, q.from, q.rope, batch, rotated, q.from);
        b.index_select(rotated, weights, q.from.n, batch, cache, selected);
    }

    pub fn rope_mla_attention<B: Backend + ?Sized>(
        b: &B,
        rope: Rotation<'_, B::Buffer>,
        q: &mut B::Buffer,
        latent: usize,
        scale: f32,
        batch: &B::Batch,
        cache: &B::Cache,
        selected: Option<&B::Indices>,
        out: &mut B::Buffer,
    ) {
        let Heads { n, width, .. } = rope.from;
        let to = Heads { n, stride: latent + width, offset: latent, width };
        b.rope(rope.x, rope.from, rope.rope, batch, q, to);
        b.mla_attention(q, n, latent, scale, batch, cache, selected, out);
    }

    pub fn route<B: Backend + ?Sized>(
        b: &B,
        x: &B::Buffer,
        gate: &B::Matrix,
        bias: &B::Buffer,
        routing: &Routing,
        n_rows: usize,
        logits: &mut B::Buffer,
        ids: &mut B::Indices,
        weights: &mut B::Buffer,
    ) {
        b.linear(x, n_rows, &mut [(gate, logits)]);
        b.router_topk(logits, bias, routing, n_rows, ids, weights);
    }
}

/// A device that can run the models. Buffers are `[rows, width] f32` unless said otherwise.
pub trait Backend {
    /// Activations.
    type Buffer;
    /// Small integers: expert ids, selected positions; `[rows, width] i32`.
    type Indices;
    /// A matrix, or a stack of equal ones, in any [`crate::DType`].
    type Matrix;
    /// A [`Batch`] on the device.
    type Batch;
    /// Paged storage of one kind of cached vector for one layer.
    type Cache;
    /// The device's error.
    type Error: std::error::Error + Send + Sync + 'static;

    // --- memory and transfers ---

    /// Zeroed activations.
    fn alloc(&self, rows: usize, width: usize) -> Self::Buffer;
    /// Zeroed indices.
    fn alloc_indices(&self, rows: usize, width: usize) -> Self::Indices;
    /// Cache for `n_slots` vectors of `width` elements.
    fn alloc_cache(&self, kind: CacheKind, n_slots: usize, width: usize) -> Self::Cache;
    /// Bytes of one cached vector of `width` elements.
    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize;
    /// Takes a matrix over. Nothing is copied where the device can use the mapped file.
    fn load_matrix(&self, data: MatrixData) -> Self::Matrix;
    /// A one-row buffer.
    fn load_vector(&self, values: &[f32]) -> Self::Buffer;
    /// Copies a batch to the device.
    fn upload(&self, batch: Batch) -> Self::Batch;
    /// Copies whole rows from the host to the start of `buffer`, after everything enqueued before.
    fn write_rows(&self, rows: &[f32], buffer: &mut Self::Buffer);
    /// Copies the first `out.len() / width` rows to the host, after everything enqueued before.
    fn download(&self, buffer: &Self::Buffer, out: &mut [f32]);
    /// Appends the bytes of one page of a cache, after everything enqueued before; false when the device cannot.
    fn save_page(&self, _cache: &Self::Cache, _page: u32, _out: &mut Vec<u8>) -> bool {
        false
    }
    /// Fills a page from the front of `bytes`, as [`Backend::save_page`] wrote them, and takes them off; false when they
    /// do not fit.
    fn load_page(&self, _cache: &mut Self::Cache, _page: u32, _bytes: &mut &[u8]) -> bool {
        false
    }
    /// Waits for everything enqueued.
    ///
    /// # Errors
    /// The first device error since the last call.
    fn sync(&self) -> Result<(), Self::Error>;
    /// Enqueues one step: calls `operations` with a context that is at least the batch's longest.
    ///
    /// A device may record the operations of one batch and replay them for later ones of the same shape, so they must
    /// follow from the context and the batch's numbers of rows alone.
    fn step(&self, batch: &Self::Batch, max_context: usize, operations: &mut dyn FnMut(usize)) {
        let _ = batch;
        operations(max_context);
    }

    // --- tokens chosen by the device ---

    /// True if the device chooses tokens as [`Batch::choices`] ask.
    fn chooses(&self) -> bool {
        false
    }
    /// Enqueues the choices of a batch from its `logits [n_logits, vocab]`, as the last operation of a step.
    fn choose(&self, _logits: &Self::Buffer, _batch: &Self::Batch) {}
    /// Waits for the oldest step with choices that has not been collected, of which there are two at most, and appends its
    /// tokens. What was enqueued after it goes on.
    ///
    /// # Errors
    /// The first device error since the last call of this or [`Backend::sync`].
    fn collect(&self, _tokens: &mut Vec<u32>) -> Result<(), Self::Error> {
        Ok(())
    }

    // --- required primitives ---

    /// `out[r] = table[batch.tokens[r]]`
    fn embed(&self, table: &Self::Matrix, batch: &Self::Batch, out: &mut Self::Buffer);
    /// `out[i] = x[batch.logits_rows[i]]`
    fn gather_logits_rows(&self, x: &Self::Buffer, batch: &Self::Batch, out: &mut Self::Buffer);
    /// `out = x / sqrt(mean(x^2) + eps) * weight` over whole rows.
    fn rms_norm(&self, x: &Self::Buffer, weight: &Self::Buffer, eps: f32, n_rows: usize, out: &mut Self::Buffer);
    /// [`Backend::add`] of `y`, then [`Backend::rms_norm`] of the sum.
    fn add_rms_norm(
        &self,
        x: &mut Self::Buffer,
        y: &Self::Buffer,
        weight: &Self::Buffer,
        eps: f32,
        n_rows: usize,
        out: &mut Self::Buffer,
    ) {
        self.add(x, y, n_rows);
        self.rms_norm(x, weight, eps, n_rows, out);
    }
    /// `out = x . w^T` for each `(w, out)`; `x` is `[n_rows, cols]`, each `out` `[n_rows, rows]`.
    fn linear(&self, x: &Self::Buffer, n_rows: usize, outputs: &mut [(&Self::Matrix, &mut Self::Buffer)]);
    /// Head `h` of `out` is `x`'s head `h` times matrix `h` of the stack: `[width_in] -> [width_out]`.
    fn head_linear(
        &self,
        x: &Self::Buffer,
        from: Heads,
        w: &Self::Matrix,
        n_rows: usize,
        out: &mut Self::Buffer,
        to: Heads,
    );
    /// Rotates the first `rope.dim()` elements of each head of `from` by the row's position; the rest is copied.
    fn rope(&self, x: &Self::Buffer, from: Heads, rope: &Rope, batch: &Self::Batch, out: &mut Self::Buffer, to: Heads);
    /// `x += y`
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, n_rows: usize);
    /// Adds a vector to every row.
    fn add_bias(&self, x: &mut Self::Buffer, bias: &Self::Buffer, n_rows: usize);
    /// `out = down(silu(gate(x)) * up(x))`
    fn mlp(&self, x: &Self::Buffer, mlp: &Mlp<Self::Matrix>, n_rows: usize, out: &mut Self::Buffer);
    /// Chooses experts from `logits [n_rows, n_experts]`; `ids` (relative to `routing.first_expert`, -1 when not held) and
    /// `weights` are `[n_rows, top_k]`.
    fn router_topk(
        &self,
        logits: &Self::Buffer,
        bias: &Self::Buffer,
        routing: &Routing,
        n_rows: usize,
        ids: &mut Self::Indices,
        weights: &mut Self::Buffer,
    );
    /// `out = sum_k weights[k] * expert[ids[k]](x)` over ids that are not negative, plus `shared(x)` if given.
    #[allow(clippy::too_many_arguments)]
    fn moe(
        &self,
        x: &Self::Buffer,
        experts: &Mlp<Self::Matrix>,
        shared: Option<&Mlp<Self::Matrix>>,
        ids: &Self::Indices,
        weights: &Self::Buffer,
        n_rows: usize,
        out: &mut Self::Buffer,
    );
    /// Caches MLA's vector of each row: `[rms_norm(kv_a[..latent]), rope(kv_a[latent..])]`.
    fn write_latent(
        &self,
        kv_a: &Self::Buffer,
        norm: &Self::Buffer,
        eps: f32,
        rope: &Rope,
        batch: &Self::Batch,
        cache: &mut Self::Cache,
    );
    /// Caches the indexer's key of each row: `rope(layer_norm(k))`, rotation on the first dimensions.
    #[allow(clippy::too_many_arguments)]
    fn write_index_key(
        &self,
        k: &Self::Buffer,
        norm: &Self::Buffer,
        norm_bias: &Self::Buffer,
        eps: f32,
        rope: &Rope,
        batch: &Self::Batch,
        cache: &mut Self::Cache,
    );
    /// Caches a plain vector of each row.
    fn write_cache(&self, x: &Self::Buffer, batch: &Self::Batch, cache: &mut Self::Cache);
    /// Positions each row attends to: the `selected` width's worth of highest
    /// `sum_h weights[h] * relu(q[h] . key)`, all of them while fewer are visible; ascending, then -1.
    fn index_select(
        &self,
        q: &Self::Buffer,
        weights: &Self::Buffer,
        n_heads: usize,
        batch: &Self::Batch,
        cache: &Self::Cache,
        selected: &mut Self::Indices,
    );
    /// Softmax attention of `q [n_rows, n_heads * width]` over cached latents, whose first `latent` elements are also the
    /// values: `out [n_rows, n_heads * latent]`. Restricted to `selected` positions if given.
    #[allow(clippy::too_many_arguments)]
    fn mla_attention(
        &self,
        q: &Self::Buffer,
        n_heads: usize,
        latent: usize,
        scale: f32,
        batch: &Self::Batch,
        cache: &Self::Cache,
        selected: Option<&Self::Indices>,
        out: &mut Self::Buffer,
    );
    /// Softmax attention of `q [n_rows, n_heads * head_dim]` over cached keys and values
    /// `[.., n_kv_heads * head_dim]`; query heads share key heads in consecutive groups.
    #[allow(clippy::too_many_arguments)]
    fn gqa_attention(
        &self,
        q: &Self::Buffer,
        n_heads: usize,
        n_kv_heads: usize,
        scale: f32,
        batch: &Self::Batch,
        keys: &Self::Cache,
        values: &Self::Cache,
        out: &mut Self::Buffer,
    );

    // --- fused blocks: a backend overrides what its profile asks for ---

    /// What follows the first products of attention: the queries' norm and both cached vectors, which do not depend on
    /// each other.
    #[allow(clippy::too_many_arguments)]
    fn prepare_attention(
        &self,
        query: Option<NormJob<'_, Self::Buffer>>,
        latent: LatentJob<'_, Self::Buffer, Self::Cache>,
        key: Option<IndexKeyJob<'_, Self::Buffer, Self::Cache>>,
        eps: f32,
        batch: &Self::Batch,
        n_rows: usize,
    ) {
        composed::prepare_attention(self, query, latent, key, eps, batch, n_rows);
    }
    /// [`Backend::rope`] of the indexer's queries, into `rotated` if it is kept at all, then [`Backend::index_select`].
    #[allow(clippy::too_many_arguments)]
    fn rope_index_select(
        &self,
        q: Rotation<'_, Self::Buffer>,
        rotated: &mut Self::Buffer,
        weights: &Self::Buffer,
        batch: &Self::Batch,
        cache: &Self::Cache,
        selected: &mut Self::Indices,
    ) {
        composed::rope_index_select(self, q, rotated, weights, batch, cache, selected);
    }
    /// [`Backend::rope`] into the elements of `q`'s heads after the latent ones, if they are kept at all, then
    /// [`Backend::mla_attention`].
    #[allow(clippy::too_many_arguments)]
    fn rope_mla_attention(
        &self,
        rope: Rotation<'_, Self::Buffer>,
        q: &mut Self::Buffer,
        latent: usize,
        scale: f32,
        batch: &Self::Batch,
        cache: &Self::Cache,
        selected: Option<&Self::Indices>,
        out: &mut Self::Buffer,
    ) {
        composed::rope_mla_attention(self, rope, q, latent, scale, batch, cache, selected, out);
    }
    /// [`Backend::linear`] by the router's gate, then [`Backend::router_topk`].
    #[allow(clippy::too_many_arguments)]
    fn route(
        &self,
        x: &Self::Buffer,
        gate: &Self::Matrix,
        bias: &Self::Buffer,
        routing: &Routing,
        n_rows: usize,
        logits: &mut Self::Buffer,
        ids: &mut Self::Indices,
        weights: &mut Self::Buffer,
    ) {
        composed::route(self, x, gate, bias, routing, n_rows, logits, ids, weights);
    }
}

/// Ranks that hold slices of the same layers and add up what they compute.
pub trait TensorGroup<B: Backend>: Send + Sync {
    /// Called before each layer with the residual stream, which is the same on every rank: names the layer in errors, and
    /// now and then compares the stream between ranks.
    fn begin_layer(&self, backend: &B, layer: usize, hidden: &B::Buffer, n_rows: usize);
    /// The first `n_rows` rows of `x` become the sum over all ranks, the same bits on each. As with every operation, an
    /// error is kept until the step is over; what follows it in the step computes nothing of value.
    fn all_reduce(&self, backend: &B, x: &mut B::Buffer, n_rows: usize, part: &'static str);
}
