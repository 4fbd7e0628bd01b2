//! Attention and the indexer: [`tandem_core::Backend`]'s mla_attention, gqa_attention and index_select.

use tandem_core::backend::{EXACT_ROWS, Heads, IndexSelect, Rope, RopeLayout};

use crate::args::{AttentionArgs, IndexArgs, MergeArgs};
use crate::backend::WgpuBackend;
use crate::batch::WgpuBatch;
use crate::buffer::{WgpuBuffer, WgpuCache, WgpuIndices};
use crate::device::WORKGROUP;
use crate::recorder::Cost;

/// Positions of a tile of attention.wgsl.
const TILE: usize = 32;
/// Positions of a span, at least, and spans of a row, at most. Where a row is cut depends on its own context alone, so that
/// its result does not depend on its batch.
const LEAST_SPAN: usize = 64;
const MAX_SPANS: usize = 32;
/// Bytes of queries that a workgroup keeps.
const QUERY_BYTES: usize = 20 << 10;
/// Bytes of scores kept at once; longer prefills are scored in blocks of rows.
const SCORE_BYTES: usize = 112 << 20;

/// Softmax attention of one batch.
pub(crate) struct Attention<'a> {
    /// `[n_rows, n_heads * key width]`
    pub(crate) q: &'a WgpuBuffer,
    /// What the elements of a query that are no value's are made of, in place of those of `q`.
    pub(crate) rotated: Option<Rotated<'a>>,
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) scale: f32,
    pub(crate) batch: &'a WgpuBatch,
    /// With the width of one key and of one value.
    pub(crate) keys: (&'a WgpuCache, usize),
    pub(crate) values: (&'a WgpuCache, usize),
    pub(crate) selected: Option<&'a WgpuIndices>,
    pub(crate) out: &'a WgpuBuffer,
}

/// Heads that are rotated on the way, all of each.
#[derive(Clone, Copy)]
pub(crate) struct Rotated<'a> {
    pub(crate) x: &'a WgpuBuffer,
    pub(crate) from: Heads,
    pub(crate) rope: &'a Rope,
}

impl WgpuBackend {
    /// `out[row, head] = sum_p softmax_p(scale * q . key(p)) * value(p)`
    pub(crate) fn attend(&self, op: &Attention<'_>) {
        let Attention { q, rotated, n_heads, n_kv_heads, scale, batch, selected, out, .. } = *op;
        let ((keys, key_width), (values, value_width)) = (op.keys, op.values);
        let top_k = selected.map_or(0, |s| s.width);
        let context = if selected.is_some() { batch.max_context.min(top_k) } else { batch.max_context };
        let per_kv = n_heads / n_kv_heads.max(1);
        // As many heads as share keys, their queries fit, and the accumulators stay in registers.
        let wide = value_width.div_ceil(WORKGROUP as usize);
        let most = (8 / wide).max(1).min(QUERY_BYTES / 4 / key_width.max(1));
        let heads = (1..=most.max(1)).rev().find(|h| per_kv.is_multiple_of(*h)).unwrap_or(1);
        let groups = batch.n_rows * (n_heads / heads);
        // Many rows keep the device busy without spans.
        let least_span = if batch.n_rows > EXACT_ROWS { context.max(1) } else { LEAST_SPAN };
        let n_spans = context.div_ceil(least_span).clamp(1, MAX_SPANS);
        let lanes = self.pipelines.lanes.n as usize;
        let positions = TILE / (WORKGROUP as usize / lanes);
        let vectors = key_width.is_multiple_of(4) && keys.width.is_multiple_of(4);
        let variant = (key_width as u64)
            | (value_width as u64) << 16
            | (heads as u64) << 32
            | u64::from(selected.is_some()) << 40
            | u64::from(n_spans > 1) << 41
            | u64::from(rotated.is_some()) << 42
            | u64::from(vectors) << 43;
        let pipeline = self.pipelines.get::<AttentionArgs>("attention", variant, |d| {
            let numbers = [
                ("KEY_WIDTH", key_width),
                ("VALUE_WIDTH", value_width),
                ("HEADS", heads),
                ("VALUES", wide),
                ("POSITIONS", positions),
                ("ROUNDS", (heads * TILE).div_ceil(WORKGROUP as usize)),
                ("SELECTED", usize::from(selected.is_some())),
                ("SPANS", usize::from(n_spans > 1)),
                ("MAX_SPANS", MAX_SPANS),
                ("ROTATED", usize::from(rotated.is_some())),
                ("WIDE", usize::from(vectors)),
                ("KEY_ROUNDS", key_width.div_ceil(4 * lanes)),
            ];
            d.extend(numbers.iter().map(|(name, n)| ((*name).to_string(), n.to_string())));
        });
        let turns = rotated.map(|r| self.turns(r.rope));
        let from = rotated.map_or(Heads::packed(0, 0), |r| r.from);
        let args = AttentionArgs {
            base: 0,
            x_pitch: rotated.map_or(0, |r| r.x.width as u32),
            x_offset: from.offset as u32,
            x_stride: from.stride as u32,
            half_layout: rotated.is_some_and(|r| r.rope.layout == RopeLayout::Half).into(),
            scaling: rotated.map_or(0.0, |r| r.rope.scaling),
            n_heads: n_heads as u32,
            heads_per_kv: per_kv as u32,
            key_pitch: keys.width as u32,
            value_pitch: values.width as u32,
            top_k: top_k as u32,
            least_span: least_span as u32,
            n_spans: n_spans as u32,
            scale,
        };
        let n = batch.n_rows * n_heads;
        let cost = Cost {
            bytes: (groups * context * (key_width + value_width) * 4) as u64,
            products: (n * context * (key_width + value_width)) as u64,
        };
        let spans = (n_spans > 1).then(|| self.scratch("spans", n * n_spans * (value_width + 2) * 4));
        let to = spans.as_deref().unwrap_or(&out.memory);
        let mut buffers = vec![&q.memory, &keys.memory, &values.memory, batch.memory(), to];
        buffers.extend(rotated.map(|r| &r.x.memory));
        buffers.extend(turns.as_deref());
        buffers.extend(selected.map(|s| &s.memory));
        self.run(&pipeline, &buffers, &args, [batch.n_rows, n_heads / heads, n_spans], cost);
        if let Some(spans) = &spans {
            let pipeline = self.pipelines.get::<MergeArgs>("attention_merge", 0, |_| {});
            let args = MergeArgs { base: 0, width: value_width as u32, n_spans: n_spans as u32 };
            let cost = Cost { bytes: (n * n_spans * value_width * 4) as u64, products: 0 };
            self.run(&pipeline, &[spans, &out.memory], &args, [n, 1, 1], cost);
        }
    }

    /// The positions with the highest indexer scores.
    pub(crate) fn select(&self, op: IndexSelect<'_, WgpuBuffer, WgpuIndices, WgpuBatch, WgpuCache>) {
        let IndexSelect { q, weights, n_heads, batch, cache, selected } = op;
        let context = batch.max_context;
        let rows_at_once = (SCORE_BYTES / 4 / context.max(1)).clamp(1, batch.n_rows.max(1));
        let scores_kernel = self.pipelines.get::<IndexArgs>("index_scores", cache.width as u64, |d| {
            d.insert("DIM".into(), cache.width.to_string());
        });
        let topk_kernel = self.pipelines.get::<IndexArgs>("index_topk", 0, |_| {});
        for first in (0..batch.n_rows).step_by(rows_at_once) {
            let n = rows_at_once.min(batch.n_rows - first);
            let scores = self.scratch("scores", n * context * 4);
            let args = IndexArgs {
                base: 0,
                first_row: first as u32,
                n_heads: n_heads as u32,
                pitch: context as u32,
                top_k: selected.width as u32,
            };
            let buffers = [&q.memory, &weights.memory, &cache.memory, batch.memory(), &*scores];
            let cost = Cost {
                bytes: (n * context * (cache.width + 1) * 4) as u64,
                products: (n * context * cache.width * n_heads) as u64,
            };
            self.run(&scores_kernel, &buffers, &args, [self.blocks(context), n, 1], cost);
            let cost = Cost { bytes: (n * context * 6 * 4) as u64, products: 0 };
            self.run(&topk_kernel, &[&*scores, batch.memory(), &selected.memory], &args, [n, 1, 1], cost);
        }
    }
}
