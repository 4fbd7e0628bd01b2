//! What each larger operation of [`Backend`](super::Backend) takes: one plain struct, so that a new field reaches the
//! backends that need it and passes through everything that wraps one.
//!
//! Type parameters: `T` activations, `I` indices, `M` matrix, `D` batch on the device, `C` cache.

use super::{Heads, Mlp, Rope, Routing};
use crate::weights::ModuleKind;

/// As [`Backend::rms_norm`](super::Backend::rms_norm).
pub struct RmsNorm<'a, T> {
    /// `[n_rows, width]`
    pub x: &'a T,
    /// `[width]`
    pub weight: &'a T,
    /// Added to the mean square.
    pub eps: f32,
    /// Rows.
    pub n_rows: usize,
    /// `[n_rows, width]`
    pub out: &'a mut T,
}

/// As [`Backend::add_rms_norm`](super::Backend::add_rms_norm).
pub struct AddRmsNorm<'a, T> {
    /// `[n_rows, width]`, becomes the sum.
    pub x: &'a mut T,
    /// `[n_rows, width]`
    pub y: &'a T,
    /// `[width]`
    pub weight: &'a T,
    /// Added to the mean square.
    pub eps: f32,
    /// Rows.
    pub n_rows: usize,
    /// `[n_rows, width]`, the norm of the sum.
    pub out: &'a mut T,
}

/// As [`Backend::linear`](super::Backend::linear).
pub struct Linear<'a, T, M> {
    /// `[n_rows, cols]`
    pub x: &'a T,
    /// Rows.
    pub n_rows: usize,
    /// Matrices `[rows, cols]`, and where their products go, `[n_rows, rows]` each.
    pub outputs: &'a mut [(&'a M, &'a mut T)],
    /// Whose time this is, for profiles.
    pub label: ModuleKind,
}

/// As [`Backend::head_linear`](super::Backend::head_linear).
pub struct HeadLinear<'a, T, M> {
    /// Input rows.
    pub x: &'a T,
    /// The slice of `x`, as wide as the matrices have columns.
    pub from: Heads,
    /// `[n_heads, width_out, width_in]`
    pub w: &'a M,
    /// Rows.
    pub n_rows: usize,
    /// Output rows; what is outside `to` stays.
    pub out: &'a mut T,
    /// The slice of `out`, as wide as the matrices have rows.
    pub to: Heads,
}

/// As [`Backend::rope`](super::Backend::rope).
pub struct Rotate<'a, T, D> {
    /// Input rows.
    pub x: &'a T,
    /// The slice of `x`.
    pub from: Heads,
    /// The rotation.
    pub rope: &'a Rope,
    /// Positions.
    pub batch: &'a D,
    /// Output rows; what is outside `to` stays.
    pub out: &'a mut T,
    /// The slice of `out`.
    pub to: Heads,
    /// Whose time this is, for profiles.
    pub label: ModuleKind,
}

/// As [`Backend::router_topk`](super::Backend::router_topk).
pub struct RouterTopk<'a, T, I> {
    /// `[n_rows, n_experts]`
    pub logits: &'a T,
    /// `[n_experts]`, added to the scores that pick, not to those that weigh.
    pub bias: &'a T,
    /// The rule.
    pub routing: &'a Routing,
    /// Rows.
    pub n_rows: usize,
    /// `[n_rows, top_k]`, relative to `routing.first_expert`; -1 when not held.
    pub ids: &'a mut I,
    /// `[n_rows, top_k]`
    pub weights: &'a mut T,
}

/// As [`Backend::moe`](super::Backend::moe).
pub struct Moe<'a, T, I, M> {
    /// `[n_rows, hidden]`
    pub x: &'a T,
    /// Stacks of the experts that this rank holds.
    pub experts: &'a Mlp<M>,
    /// An MLP for every row.
    pub shared: Option<&'a Mlp<M>>,
    /// `[n_rows, top_k]`; a negative one is left out.
    pub ids: &'a I,
    /// `[n_rows, top_k]`
    pub weights: &'a T,
    /// Rows.
    pub n_rows: usize,
    /// `[n_rows, hidden]`
    pub out: &'a mut T,
}

/// As [`Backend::write_latent`](super::Backend::write_latent).
pub struct WriteLatent<'a, T, D, C> {
    /// `[n_rows, latent + rope]`
    pub kv_a: &'a T,
    /// `[latent]`
    pub norm: &'a T,
    /// Added to the mean square.
    pub eps: f32,
    /// Rotates the shared key.
    pub rope: &'a Rope,
    /// Positions and slots.
    pub batch: &'a D,
    /// Written to.
    pub cache: &'a mut C,
}

/// As [`Backend::write_index_key`](super::Backend::write_index_key).
pub struct WriteIndexKey<'a, T, D, C> {
    /// `[n_rows, dim]`
    pub k: &'a T,
    /// `[dim]`
    pub norm: &'a T,
    /// `[dim]`
    pub norm_bias: &'a T,
    /// Added to the variance.
    pub eps: f32,
    /// Rotates the key's first dimensions.
    pub rope: &'a Rope,
    /// Positions and slots.
    pub batch: &'a D,
    /// Written to.
    pub cache: &'a mut C,
}

/// As [`Backend::index_select`](super::Backend::index_select).
pub struct IndexSelect<'a, T, I, D, C> {
    /// `[n_rows, n_heads * dim]`, rotated.
    pub q: &'a T,
    /// `[n_rows, n_heads]`
    pub weights: &'a T,
    /// Query heads.
    pub n_heads: usize,
    /// Positions and pages.
    pub batch: &'a D,
    /// Keys, `[dim]` each.
    pub cache: &'a C,
    /// `[n_rows, k]`
    pub selected: &'a mut I,
}

/// As [`Backend::mla_attention`](super::Backend::mla_attention).
pub struct MlaAttention<'a, T, I, D, C> {
    /// `[n_rows, n_heads * (latent + rope)]`
    pub q: &'a T,
    /// Query heads.
    pub n_heads: usize,
    /// Elements of a cached vector that are also its value.
    pub latent: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Positions and pages.
    pub batch: &'a D,
    /// `[latent + rope]` each.
    pub cache: &'a C,
    /// `[n_rows, k]`: the only positions attended to, from [`IndexSelect`].
    pub selected: Option<&'a I>,
    /// `[n_rows, n_heads * latent]`
    pub out: &'a mut T,
}

/// As [`Backend::gqa_attention`](super::Backend::gqa_attention).
pub struct GqaAttention<'a, T, D, C> {
    /// `[n_rows, n_heads * head_dim]`, rotated.
    pub q: &'a T,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads, each shared by as many consecutive query heads.
    pub n_kv_heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Positions and pages.
    pub batch: &'a D,
    /// `[n_kv_heads * head_dim]` each.
    pub keys: &'a C,
    /// `[n_kv_heads * head_dim]` each.
    pub values: &'a C,
    /// `[n_rows, n_heads * head_dim]`
    pub out: &'a mut T,
}

/// As [`Backend::prepare_attention`](super::Backend::prepare_attention): operations that do not depend on each other.
pub struct PrepareAttention<'a, T, D, C> {
    /// The norm of the compressed queries, if they are compressed.
    pub query: Option<RmsNorm<'a, T>>,
    /// The latent to cache.
    pub latent: WriteLatent<'a, T, D, C>,
    /// The indexer's key to cache, if the layer has an indexer.
    pub key: Option<WriteIndexKey<'a, T, D, C>>,
}

/// As [`Backend::rope_index_select`](super::Backend::rope_index_select).
pub struct RopeIndexSelect<'a, T, I, D, C> {
    /// `[n_rows, n_heads * dim]`, not yet rotated.
    pub q: &'a T,
    /// The heads of `q` and of `rotated`.
    pub heads: Heads,
    /// The rotation.
    pub rope: &'a Rope,
    /// Like `q`; a fused block may leave it as it is.
    pub rotated: &'a mut T,
    /// `[n_rows, n_heads]`
    pub weights: &'a T,
    /// Positions and pages.
    pub batch: &'a D,
    /// Keys, `[dim]` each.
    pub cache: &'a C,
    /// `[n_rows, k]`
    pub selected: &'a mut I,
}

/// As [`Backend::rope_mla_attention`](super::Backend::rope_mla_attention).
pub struct RopeMlaAttention<'a, T, I, D, C> {
    /// What is rotated into the last elements of `q`'s heads.
    pub x: &'a T,
    /// The slice of `x`: every query head's rotated part.
    pub from: Heads,
    /// The rotation.
    pub rope: &'a Rope,
    /// `[n_rows, n_heads * (latent + rope)]`, of which the first `latent` elements of each head are there; a fused block
    /// may leave the others as they are.
    pub q: &'a mut T,
    /// Elements of a cached vector that are also its value.
    pub latent: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Positions and pages.
    pub batch: &'a D,
    /// `[latent + rope]` each.
    pub cache: &'a C,
    /// `[n_rows, k]`: the only positions attended to.
    pub selected: Option<&'a I>,
    /// `[n_rows, n_heads * latent]`
    pub out: &'a mut T,
}

/// As [`Backend::route`](super::Backend::route).
pub struct Route<'a, T, I, M> {
    /// `[n_rows, hidden]`
    pub x: &'a T,
    /// `[n_experts, hidden]`
    pub gate: &'a M,
    /// `[n_experts]`, added to the scores that pick, not to those that weigh.
    pub bias: &'a T,
    /// The rule.
    pub routing: &'a Routing,
    /// Rows.
    pub n_rows: usize,
    /// `[n_rows, n_experts]`
    pub logits: &'a mut T,
    /// `[n_rows, top_k]`, relative to `routing.first_expert`; -1 when not held.
    pub ids: &'a mut I,
    /// `[n_rows, top_k]`
    pub weights: &'a mut T,
}
