//! Facts that the kernels and this crate share. Each is written here and put in front of the kernels as CUDA C++, so that
//! neither side can disagree: constants, the numbers of the storage formats, and the formats that are kept in tiles.

use tandem_core::backend::{NO_TOKEN, PAGE_SIZE, SAMPLED};

macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$doc])* pub(crate) const $name: usize = $value;)*
        const CONSTANTS: &[(&str, usize)] = &[$((stringify!($name), $name)),*];
    };
}

constants! {
    /// Rows of a tile.
    TILE_ROWS = 8;
    /// Bytes of elements of each row in a tile.
    TILE_ROW_BYTES = 128;
    /// Bytes of scales of each row in a tile.
    TILE_ROW_SCALES = 8;
    /// Where a tile's scales begin, in bytes.
    TILE_SCALES = TILE_ROWS * TILE_ROW_BYTES;
    /// Bytes of a tile.
    TILE_BYTES = TILE_SCALES + TILE_ROWS * TILE_ROW_SCALES;

    /// Warps of a block of the row kernels, each with its own ring of weights.
    ROW_WARPS = 8;
    /// Rounds of weights in a warp's ring.
    RING = 3;
    /// Bytes of a round: tiles of two groups of rows, and 512 bytes of a single token.
    ROUND_BYTES = 2 * TILE_BYTES + 512;
    /// Matrices of one launch of the row kernels, at most.
    MAX_JOBS = 4;
    /// Warps that share the columns of a shared expert's down projection. Those of a routed one have a warp to themselves,
    /// so that one block can add up all experts of a single token.
    SHARED_DOWN_SPLIT = 8;

    /// Rows, and tokens, of a block of gemm_mma_128 and gemm_wgmma.
    GEMM_TILE = 128;
    /// Tokens of a block of gemm_mma_32.
    GEMM_FEW = 32;
    /// Columns of a step of the prefill products.
    GEMM_K = 64;
    /// Elements from row to row of a step in shared memory; the rest avoids bank conflicts.
    GEMM_PITCH = GEMM_K + 8;
    /// Steps of tokens in shared memory: of gemm_mma_128, and of gemm_mma_32, whose steps are so short that copies must be
    /// further ahead.
    GEMM_STAGES = 2;
    GEMM_FEW_STAGES = 4;
    /// Steps of tokens in shared memory, and tiles in a warp's ring, of gemm_wgmma.
    WGMMA_STAGES = 3;
    WGMMA_RING = 3;
    /// Alignment of what wgmma reads from shared memory, in bytes.
    WGMMA_ALIGNMENT = 1024;

    /// Cached vectors in shared memory at once.
    MLA_TILE = 64;
    /// Heads of a block of mla_attention.
    MLA_HEADS = 16;
    /// Heads of a block of mla_prefill.
    MLA_PREFILL_HEADS = 64;
    /// The largest shapes of the tensor-core attention; mla_prefill has these alone.
    MLA_MAX_WIDTH = 576;
    MLA_MAX_LATENT = 512;
    /// Spans of one row, at most; their shares are merged.
    MLA_MAX_SPANS = 64;
    /// Elements of a vector that a lane of the reference attention holds.
    ATTENTION_ELEMENTS = 20;

    /// Widest index keys and most heads of the tensor-core indexer.
    INDEX_MAX_DIM = 128;
    INDEX_MAX_HEADS = 64;
    /// Positions that a block of index_scores_mma scores at once, and a block of index_scores_f32.
    INDEX_TILE = 128;
    INDEX_F32_TILE = 64;
    /// Blocks of a cluster that selects for a row.
    TOPK_CLUSTER = 8;
    /// Widest index key that is normalised.
    MAX_INDEX_KEY = 1024;

    /// Elements of a row that a thread of rms_norm keeps in registers.
    NORM_KEPT = 8;
    /// Experts that router_topk and moe_plan hold, at most.
    MAX_EXPERTS = 512;
    /// Experts of a token, and groups of experts, at most: a lane each.
    MAX_TOP_K = 32;
    MAX_GROUPS = 32;
    /// Pairs of a rotary embedding, at most.
    MAX_ROPE_PAIRS = 128;
    /// GPUs of one group, at most.
    MAX_RANKS = 8;
    /// Tokens of a page of the cache.
    PAGE_TOKENS = PAGE_SIZE;
}

/// Dynamic shared memory of the row kernels, in bytes: a ring for each warp.
pub(crate) const ROWS_SHARED: usize = ROW_WARPS * RING * ROUND_BYTES;

/// Dynamic shared memory of gemm_mma, in bytes: two stages of decoded rows, and `stages` of tokens.
pub(crate) const fn gemm_shared(tokens: usize, stages: usize) -> usize {
    (2 * GEMM_TILE + stages * tokens) * GEMM_PITCH * 2
}

/// Dynamic shared memory of mla_attention, in bytes, for cached vectors of `width`: queries and a tile of positions.
pub(crate) const fn mla_shared(width: usize) -> usize {
    (MLA_HEADS + MLA_TILE) * (width + 8) * 2
}

/// The largest requests for dynamic shared memory of kernels that run on every architecture.
const SHARED: &[(&str, usize)] = &[
    ("linear_mma_1", ROWS_SHARED),
    ("linear_mma_4", ROWS_SHARED),
    ("moe_gate_up_4", ROWS_SHARED),
    ("moe_down_4", ROWS_SHARED),
    ("moe_down_token", ROWS_SHARED),
    ("gemm_mma_128", gemm_shared(GEMM_TILE, GEMM_STAGES)),
    ("gemm_mma_32", gemm_shared(GEMM_FEW, GEMM_FEW_STAGES)),
    ("mla_attention", mla_shared(MLA_MAX_WIDTH)),
];

/// Words of 32 bits with a meaning of their own.
const WORDS: &[(&str, u32)] = &[("SAMPLED", SAMPLED), ("NO_TOKEN", NO_TOKEN)];

macro_rules! formats {
    ($($(#[$doc:meta])* $name:ident = $cuda:literal,)*) => {
        /// How a matrix's elements are stored, by the numbers that kernels know.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub(crate) enum Format { $($(#[$doc])* $name,)* }
        const FORMATS: &[(&str, Format)] = &[$(($cuda, Format::$name)),*];
    };
}

formats! {
    F32 = "F32",
    F16 = "F16",
    Bf16 = "BF16",
    Mxfp4 = "MXFP4",
    Mxfp8 = "MXFP8",
    Nvfp4 = "NVFP4",
    /// 8-bit floats with an f32 scale per block of 128 x 128.
    Fp8Block = "FP8_BLOCK",
    /// Whole numbers with f32 scales and biases.
    AffineF32 = "AFFINE_F32",
    /// Whole numbers with bf16 scales and biases.
    AffineBf16 = "AFFINE_BF16",
}

macro_rules! tiled_formats {
    ($($(#[$doc:meta])* $name:ident = $format:ident,)*) => {
        /// The formats that tensor cores read, which are kept in tiles. Every kernel that takes tiles takes all of them: in
        /// Rust by a `match`, in CUDA by `FOR_TILED_FORMAT`, whose cases are these.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Tiled { $($(#[$doc])* $name,)* }

        impl Tiled {
            const ALL: &[Tiled] = &[$(Tiled::$name),*];

            /// As kernels know it.
            pub(crate) const fn format(self) -> Format {
                match self {
                    $(Tiled::$name => Format::$format,)*
                }
            }
        }
    };
}

tiled_formats! {
    /// With scales that the kernels' arithmetic holds.
    Mxfp4 = Mxfp4,
    /// 8 bits in groups of 64 with bf16 scales and biases.
    Affine8 = AffineBf16,
}

/// The constants and formats as CUDA C++; what launches ask of shared memory is for scripts/check-cuda-kernels.
pub(crate) fn preamble() -> String {
    let name_of = |format| FORMATS.iter().find(|(_, f)| *f == format).map_or("", |(name, _)| *name);
    let constants: String = CONSTANTS.iter().map(|(name, value)| format!("#define {name} {value}\n")).collect();
    let words: String = WORDS.iter().map(|(name, value)| format!("#define {name} {value:#x}u\n")).collect();
    let shared: String = SHARED.iter().map(|(kernel, bytes)| format!("#define SHARED_{kernel} {bytes}\n")).collect();
    let formats: Vec<String> = FORMATS.iter().map(|(name, format)| format!("{name} = {}", *format as u32)).collect();
    let cases: String = Tiled::ALL
        .iter()
        .map(|tiled| name_of(tiled.format()))
        .map(|name| format!("case {name}: {{ constexpr u32 FORMAT = {name}; __VA_ARGS__; break; }} "))
        .collect();
    format!(
        "{constants}{words}{shared}enum : unsigned int {{ {} }};\n\
         #define FOR_TILED_FORMAT(format, ...) switch (format) {{ {cases}default: __builtin_unreachable(); }}\n",
        formats.join(", "),
    )
}

/// A type whose layout Rust and CUDA C++ share.
pub(crate) trait Mirrored {
    /// Its name in CUDA C++; addresses are `u64`.
    fn cuda() -> String;
}

macro_rules! mirrored {
    ($($rust:ty = $cuda:literal),*) => {
        $(impl Mirrored for $rust {
            fn cuda() -> String {
                $cuda.into()
            }
        })*
    };
}

mirrored!(u32 = "u32", u64 = "u64", f32 = "float", f64 = "double");

impl<T: Mirrored, const N: usize> Mirrored for [T; N] {
    fn cuda() -> String {
        format!("{}[{N}]", T::cuda())
    }
}

/// A field of an argument structure.
pub(crate) struct Field {
    pub(crate) name: &'static str,
    /// In CUDA C++.
    pub(crate) kind: String,
    /// In bytes, like `size`.
    pub(crate) offset: usize,
    pub(crate) size: usize,
}

/// Assertions, as CUDA C++, that the structure `name` of `size` bytes has these fields and no others.
/// `__INTADDR__` is the only `offsetof` that NVRTC has without headers.
pub(crate) fn layout(name: &str, size: usize, fields: &[Field]) -> String {
    let asserts: String = fields
        .iter()
        .map(|Field { name: field, kind, offset, size }| {
            format!(
                "static_assert(__INTADDR__(&(({name}*)0)->{field}) == {offset}, \"{name}.{field} is elsewhere in args.rs\");\n\
                 static_assert(sizeof({name}::{field}) == {size} && same<plain<decltype({name}::{field})>::type, {kind}>::value, \
                 \"{name}.{field} is another type in args.rs\");\n"
            )
        })
        .collect();
    // A structured binding names all fields, or the program does not compile.
    let all: Vec<String> = (0..fields.len()).map(|i| format!("f{i}")).collect();
    format!(
        "static_assert(sizeof({name}) == {size}, \"{name} has another size in args.rs\");\n{asserts}\
         DI void has_all_fields(const {name}& v) {{ [[maybe_unused]] const auto& [{}] = v; }}\n",
        all.join(", ")
    )
}

/// What [`layout`]'s assertions need: `plain` is a field's type with `u64` for addresses.
pub(crate) const LAYOUT_TYPES: &str = "\
template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };
template <class T> struct plain { typedef T type; };
template <class T> struct plain<T*> { typedef u64 type; };
template <class T, unsigned long N> struct plain<T[N]> { typedef typename plain<T>::type type[N]; };
";
