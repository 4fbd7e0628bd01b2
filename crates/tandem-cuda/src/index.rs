//! The lightning indexer: its keys, scores, and the positions that it selects.

use tandem_core::backend::{Heads, IndexSelect, Rope, RopeIndexSelect, WriteIndexKey, composed};

use crate::CudaBackend;
use crate::args;
use crate::attention::latent_args;
use crate::backend::CudaCache;
use crate::batch::{CudaBatch, DECODE_ROWS};
use crate::buffer::{CudaBuffer, CudaIndices};
use crate::preamble::*;

/// Blocks of its scoring kernel that fill the device.
const INDEX_BLOCKS: usize = 528;
/// Contexts of which the lanes of index_topk_1_8, index_topk_1_16 and index_topk_8_8 hold all scores.
const TOPK_CONTEXT: usize = 8192;
const TOPK_LONG_CONTEXT: usize = 16384;
const TOPK_CLUSTER_CONTEXT: usize = 65536;
/// Rows up to which a cluster of 8 blocks a row is faster in contexts that one block does not hold.
const TOPK_CLUSTER_ROWS: usize = 16;
/// Floats of index scores kept at once; longer prefills are scored in blocks of rows.
const SCORE_FLOATS: usize = 64 << 20;

impl CudaBackend {
    /// Scores and selection; queries are rotated by `rope` first, which only the tensor-core kernel does.
    pub(crate) fn enqueue_index(
        &self,
        op: IndexSelect<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>,
        rope: args::Rope,
    ) {
        let IndexSelect { q, weights, n_heads, batch, cache, selected } = op;
        let context = batch.max_context;
        let block = (SCORE_FLOATS / context).clamp(1, batch.n_rows);
        let scores = self.scratch("scores", block * context * 4);
        let mma = self.scores_on_tensor_cores(n_heads, cache);
        let mut args = args::IndexArgs {
            pages: batch.pages(),
            q: q.pointer(),
            weights: weights.pointer(),
            keys: cache.memory.pointer(),
            scores,
            selected: selected.pointer(),
            n_heads: n_heads as u32,
            dim: cache.width as u32,
            weights_pitch: weights.width() as u32,
            scores_pitch: context as u32,
            k: selected.width() as u32,
            row0: 0,
            alone: (batch.n_rows == 1).into(),
            unused: 0,
            rope,
        };
        for first in (0..batch.n_rows).step_by(block) {
            let n = block.min(batch.n_rows - first);
            args.row0 = first as u32;
            if mma {
                // Blocks keep the queries for all their positions.
                let blocks = context.div_ceil(INDEX_TILE).min((INDEX_BLOCKS / n).max(1));
                self.launch("index_scores_mma", (blocks, n, 1), 256, &mut args![args]);
            } else {
                let name = ["index_scores_f32_f32", "index_scores_f32_bf16"][usize::from(cache.bf16)];
                self.launch(name, (context.div_ceil(INDEX_F32_TILE), n, 1), 256, &mut args![args]);
            }
            let in_clusters = context > TOPK_LONG_CONTEXT && n <= TOPK_CLUSTER_ROWS && self.device.info.clusters;
            let (name, blocks) = match (in_clusters, context) {
                (true, ..=TOPK_CLUSTER_CONTEXT) => ("index_topk_8_8", TOPK_CLUSTER),
                (true, _) => ("index_topk_8_16", TOPK_CLUSTER),
                (false, ..=TOPK_CONTEXT) => ("index_topk_1_8", 1),
                (false, _) => ("index_topk_1_16", 1),
            };
            self.launch(name, (blocks * n, 1, 1), 1024, &mut args![args]);
        }
    }

    pub(crate) fn enqueue_rope_index(&self, op: RopeIndexSelect<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        let whole = op.heads == Heads::packed(op.heads.n, op.cache.width);
        let alone =
            whole && self.scores_on_tensor_cores(op.heads.n, op.cache) && op.rope.inv_freq.len().is_multiple_of(8);
        if op.batch.n_rows > DECODE_ROWS || !alone {
            return composed::rope_index_select(self, op);
        }
        let RopeIndexSelect { q, heads, rope, weights, batch, cache, selected, .. } = op;
        self.enqueue_index(IndexSelect { q, weights, n_heads: heads.n, batch, cache, selected }, args::Rope::new(rope));
    }

    pub(crate) fn enqueue_write_index_key(&self, op: WriteIndexKey<'_, CudaBuffer, CudaBatch, CudaCache>) {
        let WriteIndexKey { k, norm, norm_bias, eps, rope, batch, cache } = op;
        let args = index_key_args(k, norm, norm_bias, eps, rope, batch);
        self.write(["write_index_key_f32", "write_index_key_bf16"], batch.n_rows, 128, cache, args);
    }

    fn scores_on_tensor_cores(&self, n_heads: usize, cache: &CudaCache) -> bool {
        cache.bf16 && cache.width <= INDEX_MAX_DIM && cache.width.is_multiple_of(32) && n_heads <= INDEX_MAX_HEADS
    }
}

pub(crate) fn index_key_args(
    k: &CudaBuffer,
    norm: &CudaBuffer,
    norm_bias: &CudaBuffer,
    eps: f32,
    rope: &Rope,
    batch: &CudaBatch,
) -> args::WriteArgs {
    assert!(k.width() <= MAX_INDEX_KEY, "index keys of at most {MAX_INDEX_KEY} elements");
    args::WriteArgs { norm_bias: norm_bias.pointer(), latent: 0, ..latent_args(k, norm, eps, rope, batch) }
}
