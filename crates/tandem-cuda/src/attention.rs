//! Attention over cached vectors, and what writes them.

use bytemuck::Zeroable;
use tandem_core::backend::{
    GqaAttention, Heads, MlaAttention, PrepareAttention, RmsNorm, Rope, RopeMlaAttention, WriteIndexKey, WriteLatent,
    composed,
};

use crate::CudaBackend;
use crate::args;
use crate::backend::CudaCache;
use crate::batch::{CudaBatch, DECODE_ROWS};
use crate::buffer::{CudaBuffer, CudaIndices};
use crate::index::index_key_args;
use crate::norm::norm_args;
use crate::preamble::*;

/// Positions of one block of the tensor-core attention while decoding: short enough to spread one row over the device.
const DECODE_SPAN: usize = 64;
/// As many positions are faster without a second kernel that merges spans.
const ONE_SPAN: usize = 128;
/// Widest vector of the reference attention.
const ATTENTION_MAX_WIDTH: usize = 32 * ATTENTION_ELEMENTS;
/// Shared memory of mla_prefill: bf16 queries and two tiles of positions, shares of a tile, and what aligns it.
const PREFILL_SHARED: usize =
    (MLA_PREFILL_HEADS + 2 * MLA_TILE) * MLA_MAX_WIDTH * 2 + MLA_PREFILL_HEADS * MLA_TILE * 2 + WGMMA_ALIGNMENT;
/// Heads from which on it is faster than mla_attention.
const PREFILL_HEADS: usize = 24;
/// Widest row that prepare_attention's 256 threads normalise.
const PREPARE_MAX_WIDTH: usize = 256 * NORM_KEPT;

impl CudaBackend {
    /// Attention over latents; with `rotated`, the heads' last elements are read from there and rotated on their way in.
    pub(crate) fn enqueue_mla(
        &self,
        op: MlaAttention<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>,
        rotated: Option<(&CudaBuffer, Heads, &Rope)>,
    ) {
        let MlaAttention { q, n_heads, latent, scale, batch, cache, selected, out } = op;
        let (n, width) = (batch.n_rows, cache.width);
        let (chosen, n_selected) = selected.map_or((0, 0), |s| (s.pointer(), s.width()));
        if !attends_on_tensor_cores(cache, latent) {
            let mut args = args::AttentionArgs::zeroed();
            (args.q, args.keys, args.values) = (q.pointer(), cache.memory.pointer(), cache.memory.pointer());
            (args.selected, args.n_selected, args.scale) = (chosen, n_selected as u32, scale);
            (args.n_heads, args.key_width, args.value_width) = (n_heads as u32, width as u32, latent as u32);
            (args.key_pitch, args.value_pitch) = (width as u32, width as u32);
            return self.attention_f32(batch, cache, out, args);
        }
        let attended = if selected.is_some() { n_selected.min(batch.max_context) } else { batch.max_context };
        let span = if n > DECODE_ROWS {
            attended
        } else if attended <= ONE_SPAN {
            ONE_SPAN
        } else {
            DECODE_SPAN.max(attended.div_ceil(MLA_MAX_SPANS).next_multiple_of(MLA_TILE))
        };
        let n_spans = attended.div_ceil(span);
        let packed = out.packed_output(n);
        let mut args = args::MlaArgs {
            pages: batch.pages(),
            q: q.pointer(),
            cache: cache.memory.pointer(),
            selected: chosen,
            shares: 0,
            stats: 0,
            out: out.pointer(),
            packed: packed.pointer,
            n_heads: n_heads as u32,
            width: width as u32,
            latent: latent as u32,
            n_selected: n_selected as u32,
            packed_pitch: packed.pitch as u32,
            span: span as u32,
            n_spans: n_spans as u32,
            scale,
            rotated_pitch: 0,
            rotated_stride: 0,
            rotated: 0,
            rope: rotated.map_or(args::Rope::none(), |(_, _, rope)| args::Rope::new(rope)),
        };
        if let Some((x, from, _)) = rotated {
            (args.rotated_pitch, args.rotated_stride) = (x.width() as u32, from.stride as u32);
            args.rotated = x.pointer() + (from.offset * 4) as u64;
        }
        let whole = (width, latent) == (MLA_MAX_WIDTH, MLA_MAX_LATENT) && n_spans == 1 && args.rotated == 0;
        if n > DECODE_ROWS && whole && n_heads >= PREFILL_HEADS && self.on_hopper() {
            let grid = (1, n_heads.div_ceil(MLA_PREFILL_HEADS), n);
            return self.device.launch("mla_prefill", grid, 256, PREFILL_SHARED, &mut args![args]);
        }
        if n_spans > 1 {
            args.shares = self.scratch("shares", n * n_spans * n_heads * latent * 4);
            args.stats = self.scratch("stats", n * n_spans * n_heads * 8);
        }
        let grid = (n_spans, n_heads.div_ceil(MLA_HEADS), n);
        self.device.launch("mla_attention", grid, 256, mla_shared(width), &mut args![args]);
        if n_spans > 1 {
            self.launch("mla_merge", (n_heads, n, 1), 512, &mut args![args]);
        }
    }

    pub(crate) fn enqueue_rope_mla(&self, op: RopeMlaAttention<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        let vectors = [op.from.offset, op.from.stride, op.rope.inv_freq.len()].iter().all(|v| v.is_multiple_of(8));
        if op.batch.n_rows > DECODE_ROWS || !vectors || !attends_on_tensor_cores(op.cache, op.latent) {
            return composed::rope_mla_attention(self, op);
        }
        let RopeMlaAttention { x, from, rope, q, latent, scale, batch, cache, selected, out } = op;
        let attention = MlaAttention { q, n_heads: from.n, latent, scale, batch, cache, selected, out };
        self.enqueue_mla(attention, Some((x, from, rope)));
    }

    pub(crate) fn enqueue_gqa(&self, op: GqaAttention<'_, CudaBuffer, CudaBatch, CudaCache>) {
        let GqaAttention { q, n_heads, n_kv_heads, scale, batch, keys, values, out } = op;
        let head = keys.width / n_kv_heads;
        let mut args = args::AttentionArgs::zeroed();
        (args.q, args.keys, args.values) = (q.pointer(), keys.memory.pointer(), values.memory.pointer());
        (args.n_heads, args.key_width, args.value_width) = (n_heads as u32, head as u32, head as u32);
        (args.key_pitch, args.value_pitch) = (keys.width as u32, values.width as u32);
        (args.heads_per_key, args.scale) = ((n_heads / n_kv_heads) as u32, scale);
        self.attention_f32(batch, keys, out, args);
    }

    fn attention_f32(&self, batch: &CudaBatch, cache: &CudaCache, out: &CudaBuffer, mut args: args::AttentionArgs) {
        assert!(
            args.key_width.max(args.value_width) as usize <= ATTENTION_MAX_WIDTH,
            "heads of at most {ATTENTION_MAX_WIDTH} elements"
        );
        let packed = out.packed_output(batch.n_rows);
        (args.out, args.packed, args.packed_pitch) = (out.pointer(), packed.pointer, packed.pitch as u32);
        args.pages = batch.pages();
        let name = ["attention_f32_f32", "attention_f32_bf16"][usize::from(cache.bf16)];
        self.launch(name, (args.n_heads as usize, batch.n_rows, 1), 128, &mut args![args]);
    }

    pub(crate) fn enqueue_prepare_attention(&self, op: PrepareAttention<'_, CudaBuffer, CudaBatch, CudaCache>) {
        let n_rows = op.latent.batch.n_rows;
        let wide = op.query.as_ref().is_some_and(|q| q.weight.width() > PREPARE_MAX_WIDTH);
        if n_rows > DECODE_ROWS || wide {
            return composed::prepare_attention(self, op);
        }
        let to = |mut args: args::WriteArgs, cache: &CudaCache| {
            (args.cache, args.width) = (cache.memory.pointer(), cache.width as u32);
            args
        };
        let PrepareAttention { query, latent, key } = op;
        let name = ["prepare_attention_f32", "prepare_attention_bf16"][usize::from(latent.cache.bf16)];
        let latent = to(latent_args(latent.kv_a, latent.norm, latent.eps, latent.rope, latent.batch), latent.cache);
        let mut args = args::PrepareArgs { query: args::NormArgs::zeroed(), latent, key: latent };
        let mut jobs = 1;
        if let Some(RmsNorm { x, weight, eps, n_rows, out }) = query {
            args.query = norm_args(x, None, weight, eps, n_rows, out);
            jobs = 2;
        }
        if let Some(WriteIndexKey { k, norm, norm_bias, eps, rope, batch, cache }) = key {
            args.key = to(index_key_args(k, norm, norm_bias, eps, rope, batch), cache);
            jobs = 3;
        }
        self.launch(name, (n_rows, jobs, 1), 256, &mut args![args]);
    }

    pub(crate) fn enqueue_write_latent(&self, op: WriteLatent<'_, CudaBuffer, CudaBatch, CudaCache>) {
        let WriteLatent { kv_a, norm, eps, rope, batch, cache } = op;
        let args = latent_args(kv_a, norm, eps, rope, batch);
        self.write(["write_latent_f32", "write_latent_bf16"], batch.n_rows, 256, cache, args);
    }

    pub(crate) fn enqueue_write_cache(&self, x: &CudaBuffer, batch: &CudaBatch, cache: &mut CudaCache) {
        let args = args::WriteArgs {
            rope: args::Rope::none(),
            x: x.pointer(),
            norm: 0,
            norm_bias: 0,
            cache: 0,
            slots: batch.slots(),
            positions: batch.positions(),
            x_pitch: x.width() as u32,
            width: 0,
            latent: 0,
            eps: 0.0,
        };
        self.write(["write_rows_f32", "write_rows_bf16"], batch.n_rows, 256, cache, args);
    }

    pub(crate) fn write(
        &self,
        kernel: [&'static str; 2],
        n: usize,
        threads: usize,
        cache: &CudaCache,
        mut args: args::WriteArgs,
    ) {
        args.cache = cache.memory.pointer();
        args.width = cache.width as u32;
        self.launch(kernel[usize::from(cache.bf16)], (n, 1, 1), threads, &mut args![args]);
    }
}

/// True if mla_attention.cu takes this shape.
fn attends_on_tensor_cores(cache: &CudaCache, latent: usize) -> bool {
    cache.bf16
        && cache.width <= MLA_MAX_WIDTH
        && cache.width.is_multiple_of(16)
        && latent <= MLA_MAX_LATENT
        && latent.is_multiple_of(8)
}

pub(crate) fn latent_args(
    kv_a: &CudaBuffer,
    norm: &CudaBuffer,
    eps: f32,
    rope: &Rope,
    batch: &CudaBatch,
) -> args::WriteArgs {
    args::WriteArgs {
        rope: args::Rope::new(rope),
        x: kv_a.pointer(),
        norm: norm.pointer(),
        norm_bias: 0,
        cache: 0,
        slots: batch.slots(),
        positions: batch.positions(),
        x_pitch: kv_a.width() as u32,
        width: 0,
        latent: norm.width() as u32,
        eps,
    }
}
