//! Parameters of the kernels, laid out as in `kernels/`.

use bytemuck::{Pod, Zeroable};
use tandem_core::backend::{self, RopeLayout};

/// `struct Matrix` of common.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct Matrix {
    pub(crate) weight: u64,
    pub(crate) scales: u64,
    pub(crate) globals: u64,
    pub(crate) weight_part: u64,
    pub(crate) scale_part: u64,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    pub(crate) row_bytes: u32,
    pub(crate) scale_pitch: u32,
    pub(crate) format: u32,
    pub(crate) bits: u32,
    pub(crate) group: u32,
    pub(crate) tiled: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct LinearJob {
    pub(crate) m: Matrix,
    pub(crate) out: u64,
    pub(crate) packed: u64,
    pub(crate) out_pitch: u32,
    pub(crate) packed_pitch: u32,
    pub(crate) first_block: u32,
    pub(crate) add: u32,
}

/// Jobs of one launch.
pub(crate) const MAX_JOBS: usize = 4;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct LinearArgs {
    pub(crate) jobs: [LinearJob; MAX_JOBS],
    pub(crate) x: u64,
    pub(crate) n_jobs: u32,
    pub(crate) x_pitch: u32,
    pub(crate) n: u32,
    pub(crate) split: u32,
    pub(crate) x_offset: u32,
    pub(crate) x_stride: u32,
    pub(crate) out_offset: u32,
    pub(crate) out_stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct LinearF32Args {
    pub(crate) m: Matrix,
    pub(crate) x: u64,
    pub(crate) out: u64,
    pub(crate) packed: u64,
    pub(crate) ids: u64,
    pub(crate) x_pitch: u32,
    pub(crate) out_pitch: u32,
    pub(crate) packed_pitch: u32,
    pub(crate) n: u32,
    pub(crate) x_divisor: u32,
    pub(crate) x_offset: u32,
    pub(crate) x_stride: u32,
    pub(crate) out_offset: u32,
    pub(crate) out_stride: u32,
    pub(crate) split: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoePlan {
    pub(crate) n_active: u64,
    pub(crate) active: u64,
    pub(crate) first: u64,
    pub(crate) sorted: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoePlanArgs {
    pub(crate) ids: u64,
    pub(crate) plan: MoePlan,
    pub(crate) n_pairs: u32,
    pub(crate) n_experts: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct GateUpArgs {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) shared_gate: Matrix,
    pub(crate) shared_up: Matrix,
    pub(crate) plan: MoePlan,
    pub(crate) x: u64,
    pub(crate) h: u64,
    pub(crate) shared_h: u64,
    pub(crate) x_pitch: u32,
    pub(crate) h_pitch: u32,
    pub(crate) shared_h_pitch: u32,
    pub(crate) n: u32,
    pub(crate) top_k: u32,
    pub(crate) shared_blocks: u32,
    pub(crate) slot_blocks: u32,
    pub(crate) split: u32,
    pub(crate) shared_split: u32,
    pub(crate) unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct DownArgs {
    pub(crate) down: Matrix,
    pub(crate) shared_down: Matrix,
    pub(crate) plan: MoePlan,
    pub(crate) h: u64,
    pub(crate) shared_h: u64,
    pub(crate) out: u64,
    pub(crate) shared_out: u64,
    pub(crate) weights: u64,
    pub(crate) h_pitch: u32,
    pub(crate) shared_h_pitch: u32,
    pub(crate) n: u32,
    pub(crate) hidden: u32,
    pub(crate) shared_blocks: u32,
    pub(crate) slot_blocks: u32,
    pub(crate) split: u32,
    pub(crate) shared_split: u32,
    pub(crate) top_k: u32,
    pub(crate) unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct GemmArgs {
    pub(crate) m0: Matrix,
    pub(crate) m1: Matrix,
    pub(crate) plan: MoePlan,
    pub(crate) x: u64,
    pub(crate) out: u64,
    pub(crate) packed: u64,
    pub(crate) x_pitch: u32,
    pub(crate) out_pitch: u32,
    pub(crate) packed_pitch: u32,
    pub(crate) n: u32,
    pub(crate) x_divisor: u32,
    pub(crate) x_offset: u32,
    pub(crate) x_stride: u32,
    pub(crate) out_offset: u32,
    pub(crate) out_stride: u32,
    pub(crate) gated: u32,
    pub(crate) routed: u32,
    pub(crate) unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct NormArgs {
    pub(crate) x: u64,
    pub(crate) y: u64,
    pub(crate) weight: u64,
    pub(crate) out: u64,
    pub(crate) packed: u64,
    pub(crate) x_pitch: u32,
    pub(crate) y_pitch: u32,
    pub(crate) out_pitch: u32,
    pub(crate) packed_pitch: u32,
    pub(crate) width: u32,
    pub(crate) eps: f32,
}

/// GPUs of one group, at most.
pub(crate) const MAX_RANKS: usize = 8;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct ReduceArgs {
    pub(crate) buffers: [u64; MAX_RANKS],
    pub(crate) state: u64,
    pub(crate) failed: u64,
    pub(crate) n_ranks: u32,
    pub(crate) rank: u32,
    pub(crate) capacity: u32,
    pub(crate) unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct RouterArgs {
    pub(crate) logits: u64,
    pub(crate) bias: u64,
    pub(crate) ids: u64,
    pub(crate) weights: u64,
    pub(crate) n_experts: u32,
    pub(crate) top_k: u32,
    pub(crate) n_group: u32,
    pub(crate) topk_group: u32,
    pub(crate) normalize: u32,
    pub(crate) scale: f32,
    pub(crate) first_expert: u32,
    pub(crate) n_held: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct RepackArgs {
    pub(crate) weight: u64,
    pub(crate) scales: u64,
    pub(crate) biases: u64,
    pub(crate) tiles: u64,
    pub(crate) rows: u32,
    pub(crate) row_bytes: u32,
    pub(crate) scale_row: u32,
    pub(crate) rounds: u32,
}

/// `struct Sampling` of sample.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct Sampling {
    pub(crate) inverse_temperature: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) least: f32,
    pub(crate) unit: f64,
    pub(crate) unused: u64,
}

impl Sampling {
    pub(crate) fn new(sampling: &backend::Sampling) -> Sampling {
        Sampling {
            inverse_temperature: if sampling.temperature == 0.0 { 0.0 } else { 1.0 / sampling.temperature },
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            least: if sampling.min_p > 0.0 { sampling.min_p.ln() } else { f32::NEG_INFINITY },
            unit: sampling.unit,
            unused: 0,
        }
    }
}

/// `struct SamplingHeader` of sample.cu, without the parameters.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SamplingHeader {
    pub(crate) to: u64,
    pub(crate) unused: [u64; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SampleArgs {
    pub(crate) logits: u64,
    pub(crate) header: u64,
    pub(crate) sampled: u64,
    pub(crate) vocab: u32,
    pub(crate) unused: u32,
}

impl RepackArgs {
    /// Blocks of its kernel: a tile each.
    pub(crate) fn blocks(&self) -> usize {
        (self.rows as usize).div_ceil(8) * self.rounds as usize
    }
}

/// Pairs of a rotary embedding, at most.
pub(crate) const MAX_ROPE_PAIRS: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Rope {
    inv_freq: [f32; MAX_ROPE_PAIRS],
    scaling: f32,
    half: u32,
    interleaved: u32,
}

impl Rope {
    pub(crate) fn new(rope: &backend::Rope) -> Rope {
        assert!(rope.inv_freq.len() <= MAX_ROPE_PAIRS, "at most {MAX_ROPE_PAIRS} rotated pairs");
        let mut inv_freq = [0.0; MAX_ROPE_PAIRS];
        inv_freq[..rope.inv_freq.len()].copy_from_slice(&rope.inv_freq);
        let interleaved = u32::from(rope.layout == RopeLayout::Interleaved);
        Rope { inv_freq, scaling: rope.scaling, half: rope.inv_freq.len() as u32, interleaved }
    }

    /// For rows that are cached as they are.
    pub(crate) fn none() -> Rope {
        Rope { inv_freq: [0.0; MAX_ROPE_PAIRS], scaling: 1.0, half: 0, interleaved: 0 }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    n: u32,
    stride: u32,
    offset: u32,
    width: u32,
}

impl From<backend::Heads> for Heads {
    fn from(h: backend::Heads) -> Heads {
        Heads { n: h.n as u32, stride: h.stride as u32, offset: h.offset as u32, width: h.width as u32 }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RopeArgs {
    pub(crate) rope: Rope,
    pub(crate) x: u64,
    pub(crate) out: u64,
    pub(crate) positions: u64,
    pub(crate) from: Heads,
    pub(crate) to: Heads,
    pub(crate) x_pitch: u32,
    pub(crate) out_pitch: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct WriteArgs {
    pub(crate) rope: Rope,
    pub(crate) x: u64,
    pub(crate) norm: u64,
    pub(crate) norm_bias: u64,
    pub(crate) cache: u64,
    pub(crate) slots: u64,
    pub(crate) positions: u64,
    pub(crate) x_pitch: u32,
    pub(crate) width: u32,
    pub(crate) latent: u32,
    pub(crate) eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PrepareArgs {
    pub(crate) query: NormArgs,
    pub(crate) latent: WriteArgs,
    pub(crate) key: WriteArgs,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct Pages {
    pub(crate) positions: u64,
    pub(crate) sequences: u64,
    pub(crate) tables: u64,
    pub(crate) table_pitch: u32,
    pub(crate) unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct AttentionArgs {
    pub(crate) pages: Pages,
    pub(crate) q: u64,
    pub(crate) keys: u64,
    pub(crate) values: u64,
    pub(crate) selected: u64,
    pub(crate) out: u64,
    pub(crate) packed: u64,
    pub(crate) n_heads: u32,
    pub(crate) key_width: u32,
    pub(crate) value_width: u32,
    pub(crate) key_pitch: u32,
    pub(crate) value_pitch: u32,
    pub(crate) heads_per_key: u32,
    pub(crate) n_selected: u32,
    pub(crate) packed_pitch: u32,
    pub(crate) scale: f32,
    pub(crate) unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MlaArgs {
    pub(crate) pages: Pages,
    pub(crate) q: u64,
    pub(crate) cache: u64,
    pub(crate) selected: u64,
    pub(crate) shares: u64,
    pub(crate) stats: u64,
    pub(crate) out: u64,
    pub(crate) packed: u64,
    pub(crate) n_heads: u32,
    pub(crate) width: u32,
    pub(crate) latent: u32,
    pub(crate) n_selected: u32,
    pub(crate) packed_pitch: u32,
    pub(crate) span: u32,
    pub(crate) n_spans: u32,
    pub(crate) scale: f32,
    pub(crate) rotated_pitch: u32,
    pub(crate) rotated_stride: u32,
    pub(crate) rotated: u64,
    pub(crate) rope: Rope,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IndexArgs {
    pub(crate) pages: Pages,
    pub(crate) q: u64,
    pub(crate) weights: u64,
    pub(crate) keys: u64,
    pub(crate) scores: u64,
    pub(crate) selected: u64,
    pub(crate) n_heads: u32,
    pub(crate) dim: u32,
    pub(crate) weights_pitch: u32,
    pub(crate) scores_pitch: u32,
    pub(crate) k: u32,
    pub(crate) row0: u32,
    pub(crate) rope: Rope,
}

/// Pointers to kernel parameters, in order.
macro_rules! args {
    ($($value:expr),* $(,)?) => {
        [$((&raw const $value).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
