//! Parameters of the kernels. `kernels/` declares the same structures; [`layouts`] makes its compiler compare them.

use bytemuck::Zeroable;
use tandem_core::backend::{self, RopeLayout};

use crate::preamble::{Field, LAYOUT_TYPES, MAX_JOBS, MAX_RANKS, MAX_ROPE_PAIRS, Mirrored, TILE_ROWS, layout};

/// Declares structures that kernels take, under the same names and with the same fields as in `kernels/`. All of their
/// fields are plain numbers, so all zeros is a value of each.
macro_rules! kernel_arguments {
    ($($(#[$doc:meta])* struct $name:ident { $($field:ident: $type:ty,)* })*) => {
        $($(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Zeroable)]
        pub(crate) struct $name { $(pub(crate) $field: $type,)* }

        impl Mirrored for $name {
            fn cuda() -> String {
                stringify!($name).into()
            }
        })*

        /// Assertions, as CUDA C++, that `kernels/` declares the structures as this file does.
        pub(crate) fn layouts() -> String {
            let mut text = LAYOUT_TYPES.to_string();
            $(text += &layout(stringify!($name), size_of::<$name>(), &[$(Field {
                name: stringify!($field),
                kind: <$type>::cuda(),
                offset: std::mem::offset_of!($name, $field),
                size: size_of::<$type>(),
            }),*]);)*
            text
        }
    };
}

kernel_arguments! {
    /// A matrix or a stack of equal ones (common.cuh).
    struct Matrix {
        weight: u64,
        scales: u64,
        globals: u64,
        weight_part: u64,
        scale_part: u64,
        rows: u32,
        cols: u32,
        row_bytes: u32,
        scale_pitch: u32,
        format: u32,
        bits: u32,
        group: u32,
        tiled: u32,
    }

    struct LinearJob {
        m: Matrix,
        out: u64,
        packed: u64,
        out_pitch: u32,
        packed_pitch: u32,
        first_block: u32,
        add: u32,
    }

    struct LinearArgs {
        jobs: [LinearJob; MAX_JOBS],
        x: u64,
        n_jobs: u32,
        x_pitch: u32,
        n: u32,
        split: u32,
        x_offset: u32,
        x_stride: u32,
        out_offset: u32,
        out_stride: u32,
        x_is_there: u32,
        unused: u32,
    }

    struct LinearF32Args {
        m: Matrix,
        x: u64,
        out: u64,
        packed: u64,
        ids: u64,
        x_pitch: u32,
        out_pitch: u32,
        packed_pitch: u32,
        n: u32,
        x_divisor: u32,
        x_offset: u32,
        x_stride: u32,
        out_offset: u32,
        out_stride: u32,
        split: u32,
    }

    struct MoePlan {
        n_active: u64,
        active: u64,
        first: u64,
        sorted: u64,
    }

    struct MoePlanArgs {
        ids: u64,
        n_active: u64,
        active: u64,
        first: u64,
        sorted: u64,
        n_pairs: u32,
        n_experts: u32,
    }

    struct GateUpArgs {
        gate: Matrix,
        up: Matrix,
        shared_gate: Matrix,
        shared_up: Matrix,
        plan: MoePlan,
        x: u64,
        h: u64,
        shared_h: u64,
        x_pitch: u32,
        h_pitch: u32,
        shared_h_pitch: u32,
        n: u32,
        top_k: u32,
        shared_blocks: u32,
        slot_blocks: u32,
        split: u32,
        shared_split: u32,
        unused: u32,
    }

    struct DownArgs {
        down: Matrix,
        shared_down: Matrix,
        plan: MoePlan,
        h: u64,
        shared_h: u64,
        out: u64,
        shared_out: u64,
        weights: u64,
        h_pitch: u32,
        shared_h_pitch: u32,
        n: u32,
        hidden: u32,
        shared_blocks: u32,
        slot_blocks: u32,
        split: u32,
        shared_split: u32,
        top_k: u32,
        unused: u32,
    }

    struct GemmArgs {
        m0: Matrix,
        m1: Matrix,
        plan: MoePlan,
        x: u64,
        out: u64,
        packed: u64,
        x_pitch: u32,
        out_pitch: u32,
        packed_pitch: u32,
        n: u32,
        x_divisor: u32,
        x_offset: u32,
        x_stride: u32,
        out_offset: u32,
        out_stride: u32,
        gated: u32,
        routed: u32,
        unused: u32,
    }

    struct NormArgs {
        x: u64,
        y: u64,
        weight: u64,
        out: u64,
        packed: u64,
        x_pitch: u32,
        y_pitch: u32,
        out_pitch: u32,
        packed_pitch: u32,
        width: u32,
        eps: f32,
    }

    struct ReduceArgs {
        buffers: [u64; MAX_RANKS],
        state: u64,
        failed: u64,
        n_ranks: u32,
        rank: u32,
        capacity: u32,
        unused: u32,
    }

    struct RouterArgs {
        logits: u64,
        bias: u64,
        ids: u64,
        weights: u64,
        n_experts: u32,
        top_k: u32,
        n_group: u32,
        topk_group: u32,
        normalize: u32,
        scale: f32,
        first_expert: u32,
        n_held: u32,
    }

    struct RepackArgs {
        weight: u64,
        scales: u64,
        biases: u64,
        tiles: u64,
        rows: u32,
        row_bytes: u32,
        scale_row: u32,
        rounds: u32,
    }

    /// How a token is sampled (sample.cu).
    #[derive(bytemuck::Pod)]
    struct Sampling {
        inverse_temperature: f32,
        top_k: u32,
        top_p: f32,
        least: f32,
        unit: f64,
        unused: u64,
    }

    /// In front of a batch whose tokens are sampled; how follows it (sample.cu).
    #[derive(bytemuck::Pod)]
    struct SamplingHeader {
        to: u64,
        unused: [u64; 3],
    }

    struct SampleArgs {
        logits: u64,
        header: u64,
        sampled: u64,
        vocab: u32,
        unused: u32,
    }

    struct Rope {
        inv_freq: [f32; MAX_ROPE_PAIRS],
        scaling: f32,
        half: u32,
        interleaved: u32,
    }

    struct Heads {
        n: u32,
        stride: u32,
        offset: u32,
        width: u32,
    }

    struct RopeArgs {
        rope: Rope,
        x: u64,
        out: u64,
        positions: u64,
        from: Heads,
        to: Heads,
        x_pitch: u32,
        out_pitch: u32,
    }

    struct WriteArgs {
        rope: Rope,
        x: u64,
        norm: u64,
        norm_bias: u64,
        cache: u64,
        slots: u64,
        positions: u64,
        x_pitch: u32,
        width: u32,
        latent: u32,
        eps: f32,
    }

    struct PrepareArgs {
        query: NormArgs,
        latent: WriteArgs,
        key: WriteArgs,
    }

    struct Pages {
        positions: u64,
        sequences: u64,
        tables: u64,
        table_pitch: u32,
        unused: u32,
    }

    struct AttentionArgs {
        pages: Pages,
        q: u64,
        keys: u64,
        values: u64,
        selected: u64,
        out: u64,
        packed: u64,
        n_heads: u32,
        key_width: u32,
        value_width: u32,
        key_pitch: u32,
        value_pitch: u32,
        heads_per_key: u32,
        n_selected: u32,
        packed_pitch: u32,
        scale: f32,
        unused: u32,
    }

    struct MlaArgs {
        pages: Pages,
        q: u64,
        cache: u64,
        selected: u64,
        shares: u64,
        stats: u64,
        out: u64,
        packed: u64,
        n_heads: u32,
        width: u32,
        latent: u32,
        n_selected: u32,
        packed_pitch: u32,
        span: u32,
        n_spans: u32,
        scale: f32,
        rotated_pitch: u32,
        rotated_stride: u32,
        rotated: u64,
        rope: Rope,
    }

    struct IndexArgs {
        pages: Pages,
        q: u64,
        weights: u64,
        keys: u64,
        scores: u64,
        selected: u64,
        n_heads: u32,
        dim: u32,
        weights_pitch: u32,
        scores_pitch: u32,
        k: u32,
        row0: u32,
        alone: u32,
        unused: u32,
        rope: Rope,
    }
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

impl RepackArgs {
    /// Blocks of its kernel: a tile each.
    pub(crate) fn blocks(&self) -> usize {
        (self.rows as usize).div_ceil(TILE_ROWS) * self.rounds as usize
    }
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

impl From<backend::Heads> for Heads {
    fn from(h: backend::Heads) -> Heads {
        Heads { n: h.n as u32, stride: h.stride as u32, offset: h.offset as u32, width: h.width as u32 }
    }
}

/// Pointers to kernel parameters, in order.
macro_rules! args {
    ($($value:expr),* $(,)?) => {
        [$((&raw const $value).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
