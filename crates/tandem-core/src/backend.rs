//! The seam between a model, written once, and the device that runs it.
//!
//! A backend implements a few fused, model-shaped operations over row-major activations. Operations only enqueue:
//! they do not allocate, wait or fail; shapes are checked when a model is loaded, and the first device error sticks and
//! is returned by [`Backend::sync`]. Everything that varies from step to step lives in the device's copy of a
//! [`Batch`]; `n_rows` is the size of the batch's bucket.

pub mod composed;
mod operations;

use crate::weights::MatrixData;

pub use operations::{
    AddRmsNorm, GqaAttention, HeadLinear, IndexSelect, Linear, MlaAttention, Moe, PrepareAttention, RmsNorm,
    RopeIndexSelect, RopeMlaAttention, Rotate, Route, RouterTopk, WriteIndexKey, WriteLatent,
};

/// Tokens per page of the key-value cache.
pub const PAGE_SIZE: usize = 64;

/// Rows of the largest batch whose results do not depend on each other, bit for bit: every backend gives a row of such a
/// batch the bits that it has alone, so the scheduler keeps steps in which something decodes within it.
pub const EXACT_ROWS: usize = 64;

/// In [`Batch::tokens`]: the token meant is the one that the device sampled in the step before, for the entry of
/// [`Batch::sampling`] that the other bits give. Among what [`Backend::collect`] returns: the other bits are the first token
/// whose logit is NaN.
pub const SAMPLED: u32 = 1 << 31;
/// Among what [`Backend::collect`] returns: no logit is above `-inf`.
pub const NO_TOKEN: u32 = u32::MAX;

/// How a device samples the token that follows a row; the words are those of `tandem-engine`'s `SamplingParams`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep this number of the likeliest tokens; 0 keeps all.
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
    /// Token ids, `[n_rows]`, or [`SAMPLED`].
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence, `[n_rows]`; it attends to positions up to and including its own.
    pub positions: Vec<u32>,
    /// For each row, which of `block_tables` it belongs to, `[n_rows]`.
    pub sequences: Vec<u32>,
    /// Pages of each sequence: position `p` lives in slot `pages[p / PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE`.
    pub block_tables: Vec<Vec<u32>>,
    /// Rows whose logits are wanted, each at most once.
    pub logits_rows: Vec<u32>,
    /// For each of `logits_rows`, how the device samples the next token; empty when the host samples.
    pub sampling: Vec<Sampling>,
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

/// One kind of vector that a decoder layer keeps for each token. A family lists them layer by layer, as it lists its
/// weights; allocation, pages on disk, planning and accounting read that list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSpec {
    /// What it holds.
    pub kind: CacheKind,
    /// Elements.
    pub width: usize,
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
    /// What a user should know of the device now, such as that the system has taken its memory back.
    fn warning(&self) -> Option<String> {
        None
    }
    /// Enqueues one step: calls `operations` with a context that is at least the batch's longest.
    ///
    /// A device may record the operations of one batch and replay them for later ones of the same shape, so they must
    /// follow from the context and the batch's numbers of rows alone.
    fn record_or_replay(&self, batch: &Self::Batch, max_context: usize, operations: &mut dyn FnMut(usize)) {
        let _ = batch;
        operations(max_context);
    }

    // --- tokens sampled by the device ---

    /// True if the device samples tokens as [`Batch::sampling`] asks.
    fn samples(&self) -> bool {
        false
    }
    /// Samples the tokens of a batch from its `logits [n_logits, vocab]`, as the last operation of a step.
    fn sample(&self, _logits: &Self::Buffer, _batch: &Self::Batch) {}
    /// Waits for the oldest step with sampled tokens that has not been collected, of which there are two at most, and
    /// appends its tokens. What was enqueued after it goes on.
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
    fn rms_norm(&self, op: RmsNorm<'_, Self::Buffer>);
    /// [`Backend::add`] of `y`, then [`Backend::rms_norm`] of the sum.
    fn add_rms_norm(&self, op: AddRmsNorm<'_, Self::Buffer>) {
        let AddRmsNorm { x, y, weight, eps, n_rows, out } = op;
        self.add(x, y, n_rows);
        self.rms_norm(RmsNorm { x, weight, eps, n_rows, out });
    }
    /// `out = x . w^T` for each `(w, out)`.
    fn linear(&self, op: Linear<'_, Self::Buffer, Self::Matrix>);
    /// Head `h` of `out` is `x`'s head `h` times matrix `h` of the stack: `[width_in] -> [width_out]`.
    fn head_linear(&self, op: HeadLinear<'_, Self::Buffer, Self::Matrix>);
    /// Rotates the first `rope.dim()` elements of each head of `from` by the row's position; the rest is copied.
    fn rope(&self, op: Rotate<'_, Self::Buffer, Self::Batch>);
    /// `x += y`
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, n_rows: usize);
    /// Adds a vector to every row.
    fn add_bias(&self, x: &mut Self::Buffer, bias: &Self::Buffer, n_rows: usize);
    /// `out = down(silu(gate(x)) * up(x))`
    fn mlp(&self, x: &Self::Buffer, mlp: &Mlp<Self::Matrix>, n_rows: usize, out: &mut Self::Buffer);
    /// Picks experts and their weights from logits.
    fn router_topk(&self, op: RouterTopk<'_, Self::Buffer, Self::Indices>);
    /// `out = sum_k weights[k] * expert[ids[k]](x)` over ids that are not negative, plus `shared(x)` if given.
    fn moe(&self, op: Moe<'_, Self::Buffer, Self::Indices, Self::Matrix>);
    /// Caches MLA's vector of each row: `[rms_norm(kv_a[..latent]), rope(kv_a[latent..])]`.
    fn write_latent(&self, op: WriteLatent<'_, Self::Buffer, Self::Batch, Self::Cache>);
    /// Caches the indexer's key of each row: `rope(layer_norm(k))`, rotation on the first dimensions.
    fn write_index_key(&self, op: WriteIndexKey<'_, Self::Buffer, Self::Batch, Self::Cache>);
    /// Caches a plain vector of each row.
    fn write_cache(&self, x: &Self::Buffer, batch: &Self::Batch, cache: &mut Self::Cache);
    /// Positions each row attends to: the `selected` width's worth of highest
    /// `sum_h weights[h] * relu(q[h] . key)`, all of them while fewer are visible; ascending, then -1.
    fn index_select(&self, op: IndexSelect<'_, Self::Buffer, Self::Indices, Self::Batch, Self::Cache>);
    /// Softmax attention of every query head over cached latents, whose first `latent` elements are also the values.
    /// Restricted to `selected` positions if given.
    fn mla_attention(&self, op: MlaAttention<'_, Self::Buffer, Self::Indices, Self::Batch, Self::Cache>);
    /// Softmax attention over cached keys and values; query heads share key heads in consecutive groups.
    fn gqa_attention(&self, op: GqaAttention<'_, Self::Buffer, Self::Batch, Self::Cache>);

    // --- fused blocks: a backend overrides what its profile asks for ---

    /// What follows the first products of attention: the queries' norm and both cached vectors, which do not depend on
    /// each other.
    fn prepare_attention(&self, op: PrepareAttention<'_, Self::Buffer, Self::Batch, Self::Cache>) {
        composed::prepare_attention(self, op);
    }
    /// [`Backend::rope`] of the indexer's queries, into `rotated` if it is kept at all, then [`Backend::index_select`].
    fn rope_index_select(&self, op: RopeIndexSelect<'_, Self::Buffer, Self::Indices, Self::Batch, Self::Cache>) {
        composed::rope_index_select(self, op);
    }
    /// [`Backend::rope`] into the elements of `q`'s heads after the latent ones, if they are kept at all, then
    /// [`Backend::mla_attention`].
    fn rope_mla_attention(&self, op: RopeMlaAttention<'_, Self::Buffer, Self::Indices, Self::Batch, Self::Cache>) {
        composed::rope_mla_attention(self, op);
    }
    /// [`Backend::linear`] by the router's gate, then [`Backend::router_topk`].
    fn route(&self, op: Route<'_, Self::Buffer, Self::Indices, Self::Matrix>) {
        composed::route(self, op);
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
