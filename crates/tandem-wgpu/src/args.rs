//! Arguments of the kernels: each struct is declared once, and its WGSL twin is made of the same words.
//!
//! All fields have four bytes, so that both sides lay them out alike. `base` is first in each: the recorder cuts a dispatch
//! along x and counts workgroups from there.

macro_rules! args {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ident),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
            pub(crate) struct $name {
                pub(crate) base: u32,
                $(pub(crate) $field: $type,)*
            }

            impl Args for $name {
                const WGSL: &'static str = concat!(
                    "struct Args { base: u32, ", $(stringify!($field), ": ", stringify!($type), ", ",)* "}\n",
                    "var<immediate> a: Args;\n"
                );
            }
        )*
    };
}

/// Arguments of a kernel.
pub(crate) trait Args: bytemuck::Pod {
    /// The declaration that its shader begins with.
    const WGSL: &'static str;
}

/// Most bytes of any of them.
pub(crate) const MAX_ARGS_BYTES: u32 = 96;

args! {
    /// Of every product with a matrix, and of the embedding. Pitches, parts and units of weights count 16 bytes, of scales
    /// words; those of `x` and `y` count elements. `post` takes back what the scales were lifted by.
    /// For x in half precision, pitches count vectors of four and `x_width` is that of a slice; weights are multiplied by `pre`.
    MatrixArgs {
        rows: u32, cols: u32, units: u32, weight_pitch: u32, weight_part: u32, scale_pitch: u32, scale_part: u32,
        x_pitch: u32, x_offset: u32, x_stride: u32, y_pitch: u32, y_offset: u32, y_stride: u32, n_tokens: u32,
        first_part: u32, n_parts: u32, top_k: u32, plan_order: u32, post: f32, pre: f32, x_width: u32,
    }
    /// Of half_rows; `width` is that of a padded slice.
    HalfArgs { cols: u32, n_parts: u32, x_pitch: u32, x_offset: u32, x_stride: u32, width: u32 }
    /// Of the products of one input with several matrices of one format; `first` and `blocks` are the workgroups of each.
    SeveralArgs {
        units: u32, cols: u32, scale_pitch: u32, x_pitch: u32, x_offset: u32, n_tokens: u32,
        first_0: u32, blocks_0: u32, rows_0: u32, y_pitch_0: u32, post_0: f32,
        first_1: u32, blocks_1: u32, rows_1: u32, y_pitch_1: u32, post_1: f32,
        first_2: u32, blocks_2: u32, rows_2: u32, y_pitch_2: u32, post_2: f32,
    }
    /// Of what works element by element on rows.
    RowArgs { width: u32, eps: f32 }
    RopeArgs {
        n_heads: u32, head_width: u32, pairs: u32, half_layout: u32, scaling: f32,
        x_pitch: u32, x_offset: u32, x_stride: u32, y_pitch: u32, y_offset: u32, y_stride: u32,
    }
    /// Of what is written to the caches.
    CacheArgs { width: u32, pairs: u32, half_layout: u32, scaling: f32, eps: f32 }
    PrepareArgs {
        latent_width: u32, latent_pairs: u32, latent_half_layout: u32, latent_scaling: f32, latent_eps: f32,
        key_width: u32, key_pairs: u32, key_half_layout: u32, key_scaling: f32, key_eps: f32,
        query_width: u32, query_eps: f32,
    }
    RouterArgs {
        n_experts: u32, n_group: u32, topk_group: u32, top_k: u32, normalize: u32, scale: f32,
        first_expert: u32, n_held: u32,
    }
    PlanArgs { n_experts: u32, first_slot: u32, n_slots: u32, tile: u32, plan_order: u32 }
    CombineArgs { width: u32, first_row: u32, top_k: u32 }
    IndexArgs { first_row: u32, n_heads: u32, pitch: u32, top_k: u32 }
    AttentionArgs {
        n_heads: u32, heads_per_kv: u32, key_pitch: u32, value_pitch: u32, top_k: u32, least_span: u32, n_spans: u32, scale: f32,
        x_pitch: u32, x_offset: u32, x_stride: u32, half_layout: u32, scaling: f32,
    }
    MergeArgs { width: u32, n_spans: u32 }
}
