//! The fused blocks of [`Backend`] as sequences of primitives: what they mean, and their default bodies.

use super::operations::{
    IndexSelect, Linear, MlaAttention, PrepareAttention, RopeIndexSelect, RopeMlaAttention, Rotate, Route, RouterTopk,
};
use super::{Backend, Heads};
use crate::weights::ModuleKind;

/// [`Backend::prepare_attention`]
pub fn prepare_attention<B: Backend + ?Sized>(b: &B, op: PrepareAttention<'_, B::Buffer, B::Batch, B::Cache>) {
    if let Some(query) = op.query {
        b.rms_norm(query);
    }
    b.write_latent(op.latent);
    if let Some(key) = op.key {
        b.write_index_key(key);
    }
}

/// [`Backend::rope_index_select`]
pub fn rope_index_select<B: Backend + ?Sized>(
    b: &B,
    op: RopeIndexSelect<'_, B::Buffer, B::Indices, B::Batch, B::Cache>,
) {
    let RopeIndexSelect { q, heads, rope, rotated, weights, batch, cache, selected } = op;
    b.rope(Rotate { x: q, from: heads, rope, batch, out: rotated, to: heads, label: ModuleKind::Indexer });
    b.index_select(IndexSelect { q: rotated, weights, n_heads: heads.n, batch, cache, selected });
}

/// [`Backend::rope_mla_attention`]
pub fn rope_mla_attention<B: Backend + ?Sized>(
    b: &B,
    op: RopeMlaAttention<'_, B::Buffer, B::Indices, B::Batch, B::Cache>,
) {
    let RopeMlaAttention { x, from, rope, q, latent, scale, batch, cache, selected, out } = op;
    let Heads { n, width, .. } = from;
    let to = Heads { n, stride: latent + width, offset: latent, width };
    b.rope(Rotate { x, from, rope, batch, out: q, to, label: ModuleKind::Attention });
    b.mla_attention(MlaAttention { q, n_heads: n, latent, scale, batch, cache, selected, out });
}

/// [`Backend::route`]
pub fn route<B: Backend + ?Sized>(b: &B, op: Route<'_, B::Buffer, B::Indices, B::Matrix>) {
    let Route { x, gate, bias, routing, n_rows, logits, ids, weights } = op;
    b.linear(Linear { x, n_rows, outputs: &mut [(gate, logits)], label: ModuleKind::Router });
    b.router_topk(RouterTopk { logits, bias, routing, n_rows, ids, weights });
}
