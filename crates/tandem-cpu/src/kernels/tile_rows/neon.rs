//! NEON: tiles of 16 rows, four registers of four lanes.
//!
//! Products of bytes take one instruction for four columns of four rows (dotprod: the activations are an element of a
//! register, so they cost no broadcast), or for eight columns of two rows and two tokens (i8mm); sums are exact, so that
//! both give the same bits. bf16 weights take BFMMLA for single tokens too, since BFDOT would round otherwise.

// Rows and tokens run over several arrays of registers at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::neon::params4;
use super::{Codes, FloatToken, GROUP, IntegerToken, Isa, Scales, Sums, Tile, prefetch_group, share_log2};

/// Rows of a tile.
const HEIGHT: usize = 16;
/// Registers of a word of a tile.
const REGISTERS: usize = 4;

// Codes as constants that kernels are compiled for.
const E2M1_CODES: u8 = 0;
const U4_CODES: u8 = 1;
const U8_CODES: u8 = 2;
const E4M3_CODES: u8 = 3;
const BF16_CODES: u8 = 4;

/// # Safety
/// The processor has NEON with dotprod, and `x` was made for `tile`.
pub(super) unsafe fn int8_tile<const T: usize>(
    isa: Isa,
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i8>; T],
    out: &mut Sums,
) {
    let halves = tile.layout.group < GROUP;
    // SAFETY: the caller's promise; i8mm is there where it is chosen.
    unsafe {
        match (tile.layout.codes, T.is_multiple_of(2) && isa.has_i8mm()) {
            (Codes::E2m1, false) if halves => dot_sums::<T, E2M1_CODES, true>(tile, x, out),
            (Codes::E2m1, false) => dot_sums::<T, E2M1_CODES, false>(tile, x, out),
            (Codes::U4, false) => dot_sums::<T, U4_CODES, false>(tile, x, out),
            (_, false) => dot_sums::<T, U8_CODES, false>(tile, x, out),
            (Codes::E2m1, true) if halves => mm_sums::<T, E2M1_CODES, true>(tile, x, out),
            (Codes::E2m1, true) => mm_sums::<T, E2M1_CODES, false>(tile, x, out),
            (Codes::U4, true) => mm_sums::<T, U4_CODES, false>(tile, x, out),
            (_, true) => mm_sums::<T, U8_CODES, false>(tile, x, out),
        }
    }
}

/// # Safety
/// The processor has NEON with bf16, and `x` was made for `tile`, whose codes are bf16.
pub(super) unsafe fn bf16_tile<const T: usize>(tile: &Tile<'_>, x: &[FloatToken<'_, u16>; T], out: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe { bf16_sums::<T>(tile, x, out) }
}

/// # Safety
/// The processor has NEON, and `x` was made for `tile`.
pub(super) unsafe fn f32_tile<const T: usize>(tile: &Tile<'_>, x: &[FloatToken<'_, f32>; T], out: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.layout.codes {
            Codes::E2m1 if tile.layout.group < GROUP => f32_sums::<T, E2M1_CODES, true>(tile, x, out),
            Codes::E2m1 => f32_sums::<T, E2M1_CODES, false>(tile, x, out),
            Codes::U4 => f32_sums::<T, U4_CODES, false>(tile, x, out),
            Codes::U8 => f32_sums::<T, U8_CODES, false>(tile, x, out),
            Codes::E4m3 => f32_sums::<T, E4M3_CODES, false>(tile, x, out),
            Codes::Bf16 => f32_sums::<T, BF16_CODES, false>(tile, x, out),
        }
    }
}

/// `sum += ` products of four bytes of each lane with those of element `$i` of the activations.
macro_rules! sdot {
    ($sum:expr, $weights:expr, $x:expr, $i:literal) => {
        asm!(
            concat!("sdot {sum:v}.4s, {weights:v}.16b, {x:v}.4b[", $i, "]"),
            sum = inout(vreg) $sum, weights = in(vreg) $weights, x = in(vreg) $x,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
}

/// Sums of the rows scaled, as [`Sums`] wants them.
type Rows = [float32x4_t; REGISTERS];
type Dots = [int32x4_t; REGISTERS];

/// Scales and biases of the groups of a tile.
struct Params<'a> {
    tile: &'a Tile<'a>,
    scales: Scales,
    share_log2: u32,
}

impl<'a> Params<'a> {
    fn new(tile: &'a Tile<'a>) -> Params<'a> {
        Params { tile, scales: tile.layout.scales, share_log2: share_log2(&tile.layout) }
    }

    /// Scales of the 16 rows for group `group` of 32 columns, or of 16 where these have their own.
    ///
    /// # Safety
    /// `group` must be one of the tile's.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scales(&self, group: usize) -> Rows {
        let mut rows = [vdupq_n_f32(1.0); REGISTERS];
        // SAFETY: the scales of the group's 16 rows are there.
        unsafe {
            match self.scales {
                Scales::Float(float) => {
                    let first = self.tile.scales.as_ptr().add((group >> self.share_log2) * HEIGHT * float.bytes());
                    for r in 0..REGISTERS {
                        rows[r] = params4(float, first.add(4 * r * float.bytes()));
                    }
                }
                Scales::E8m0 => {
                    let bytes = vld1q_u8(self.tile.scales.as_ptr().add(group * HEIGHT));
                    let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
                    let wide = [
                        vmovl_u16(vget_low_u16(low)),
                        vmovl_high_u16(low),
                        vmovl_u16(vget_low_u16(high)),
                        vmovl_high_u16(high),
                    ];
                    for r in 0..REGISTERS {
                        // Byte 0 is the subnormal 2^-127, byte 255 infinity.
                        let bits = vmaxq_u32(vshlq_n_u32::<23>(wide[r]), vdupq_n_u32(0x0040_0000));
                        rows[r] = vreinterpretq_f32_u32(bits);
                    }
                }
                Scales::One => {}
            }
        }
        rows
    }
}

/// Adds what affine biases contribute: the bias of each group times the sum of its activations.
///
/// # Safety
/// The sums must be as many as the groups.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_biases<const T: usize>(params: &Params<'_>, x_sums: &[&[f32]; T], sums: &mut [Rows; T]) {
    let Scales::Float(float) = params.scales else { return };
    if !params.tile.layout.biased {
        return;
    }
    for group in 0..(params.tile.cols / GROUP) >> params.share_log2 {
        // SAFETY: the group is one of the tile's and of the sums'.
        unsafe {
            let first = params.tile.biases.as_ptr().add(group * HEIGHT * float.bytes());
            for r in 0..REGISTERS {
                let bias = params4(float, first.add(4 * r * float.bytes()));
                for t in 0..T {
                    sums[t][r] = vfmaq_n_f32(sums[t][r], bias, *x_sums[t].get_unchecked(group));
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn store<const T: usize>(sums: &[Rows; T], unit: f32, out: &mut Sums) {
    for t in 0..T {
        for r in 0..REGISTERS {
            // SAFETY: 16 floats and more.
            unsafe { vst1q_f32(out[t].as_mut_ptr().add(4 * r), vmulq_n_f32(sums[t][r], unit)) };
        }
    }
}

/// Register `r` of word `word` of every row.
///
/// # Safety
/// `word` must be one of the tile's.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(tile: &Tile<'_>, word: usize, r: usize) -> uint8x16_t {
    // SAFETY: the caller's promise.
    unsafe { vld1q_u8(tile.codes.as_ptr().add(word * 4 * HEIGHT + 16 * r)) }
}

/// `sums += dots * scales of the rows * scale of the activations`
///
/// # Safety
/// `group` must be one of the tile's and `x_group` one of the activations'.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn scale_dots<const T: usize>(
    params: &Params<'_>,
    group: usize,
    x: &[IntegerToken<'_, i8>; T],
    x_group: usize,
    dots: &[Dots; T],
    sums: &mut [Rows; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let scales = params.scales(group);
        for t in 0..T {
            let x_scale = *x[t].scales.get_unchecked(x_group);
            for r in 0..REGISTERS {
                // Not the product of the scales: it may be too small for f32.
                let dot = vmulq_n_f32(vcvtq_f32_s32(dots[t][r]), x_scale);
                sums[t][r] = vfmaq_f32(sums[t][r], dot, scales[r]);
            }
        }
    }
}

/// The 16 codes as signed bytes, and what they count. 8-bit codes become signed by taking 128 away.
fn signed_codes(codes: Codes) -> ([i8; 16], f32) {
    match codes {
        Codes::E2m1 => (super::E2M1.map(|v| (v * 2.0) as i8), 0.5),
        _ => (std::array::from_fn(|i| i as i8), 1.0),
    }
}

/// What the codes lack: 128 times the sum of the activations for 8-bit ones.
///
/// # Safety
/// `group` must be one of the activations'.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn start_dots<const T: usize, const CODES: u8>(x: &[IntegerToken<'_, i8>; T], group: usize) -> [Dots; T] {
    let mut dots = [[vdupq_n_s32(0); REGISTERS]; T];
    if CODES == U8_CODES {
        for t in 0..T {
            // SAFETY: the caller's promise.
            dots[t] = [vdupq_n_s32(128 * unsafe { *x[t].group_sums.get_unchecked(group) }); REGISTERS];
        }
    }
    dots
}

/// Columns 0 to 3 of the eight in a register of 4-bit codes, or 4 to 7, as signed bytes.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles<const CODES: u8>(codes: uint8x16_t, upper: bool, table: int8x16_t) -> int8x16_t {
    let indices = if upper { vshrq_n_u8::<4>(codes) } else { vandq_u8(codes, vdupq_n_u8(15)) };
    if CODES == E2M1_CODES { vqtbl1q_s8(table, indices) } else { vreinterpretq_s8_u8(indices) }
}

/// Integer products of four columns at a time.
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot_sums<const T: usize, const CODES: u8, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i8>; T],
    out: &mut Sums,
) {
    let (table, unit) = signed_codes(tile.layout.codes);
    // SAFETY: 16 bytes.
    let table = unsafe { vld1q_s8(table.as_ptr()) };
    let params = Params::new(tile);
    let mut sums = [[vdupq_n_f32(0.0); REGISTERS]; T];
    for group in 0..tile.cols / GROUP {
        if CODES == U8_CODES {
            prefetch_group::<{ 32 * HEIGHT }>(tile, group);
        } else {
            prefetch_group::<{ 16 * HEIGHT }>(tile, group);
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            let mut dots = start_dots::<T, CODES>(x, group);
            for half in 0..2 {
                if HALVES && half == 1 {
                    dots = [[vdupq_n_s32(0); REGISTERS]; T];
                }
                let mut columns = [vdupq_n_s8(0); T];
                for t in 0..T {
                    columns[t] = vld1q_s8(x[t].values.as_ptr().add(group * GROUP + 16 * half));
                }
                macro_rules! words {
                    ($(($word:literal, $first:literal, $second:literal)),*) => {
                        $(for r in 0..REGISTERS {
                            if CODES == U8_CODES {
                                let signed = |codes| vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
                                let first = signed(load(tile, group * 8 + 4 * half + 2 * $word, r));
                                let second = signed(load(tile, group * 8 + 4 * half + 2 * $word + 1, r));
                                for t in 0..T {
                                    sdot!(dots[t][r], first, columns[t], $first);
                                    sdot!(dots[t][r], second, columns[t], $second);
                                }
                            } else {
                                let codes = load(tile, group * 4 + 2 * half + $word, r);
                                let first = nibbles::<CODES>(codes, false, table);
                                let second = nibbles::<CODES>(codes, true, table);
                                for t in 0..T {
                                    sdot!(dots[t][r], first, columns[t], $first);
                                    sdot!(dots[t][r], second, columns[t], $second);
                                }
                            }
                        })*
                    };
                }
                words!((0, 0, 1), (1, 2, 3));
                if HALVES {
                    scale_dots(&params, 2 * group + half, x, group, &dots, &mut sums);
                }
            }
            if !HALVES {
                scale_dots(&params, group, x, group, &dots, &mut sums);
            }
        }
    }
    // SAFETY: the lengths were checked.
    unsafe { add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums) };
    store(&sums, unit * tile.unit, out);
}

/// `sum += a b^T` for two rows and two tokens of eight bytes each.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut result = sum;
    // SAFETY: reads and writes the named registers only.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) result, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    result
}

/// The same for an even number of tokens, eight columns of two rows and two tokens at a time.
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn mm_sums<const T: usize, const CODES: u8, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i8>; T],
    out: &mut Sums,
) {
    let (table, unit) = signed_codes(tile.layout.codes);
    // SAFETY: 16 bytes.
    let table = unsafe { vld1q_s8(table.as_ptr()) };
    let params = Params::new(tile);
    let mut sums = [[vdupq_n_f32(0.0); REGISTERS]; T];
    for group in 0..tile.cols / GROUP {
        if CODES == U8_CODES {
            prefetch_group::<{ 32 * HEIGHT }>(tile, group);
        } else {
            prefetch_group::<{ 16 * HEIGHT }>(tile, group);
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            let start = start_dots::<T, CODES>(x, group);
            // `[pair of tokens][two registers of rows]`: row 0 and both tokens, row 1 and both tokens.
            let mut squares = [[[vdupq_n_s32(0); 2]; REGISTERS]; T];
            for half in 0..2 {
                if HALVES && half == 1 {
                    squares = [[[vdupq_n_s32(0); 2]; REGISTERS]; T];
                }
                // Of each pair of tokens columns 0 to 7 and 8 to 15.
                let mut columns = [[vdupq_n_s8(0); 2]; T];
                for pair in 0..T / 2 {
                    let first = vld1q_s8(x[2 * pair].values.as_ptr().add(group * GROUP + 16 * half));
                    let second = vld1q_s8(x[2 * pair + 1].values.as_ptr().add(group * GROUP + 16 * half));
                    let (first, second) = (vreinterpretq_s64_s8(first), vreinterpretq_s64_s8(second));
                    columns[pair] = [
                        vreinterpretq_s8_s64(vzip1q_s64(first, second)),
                        vreinterpretq_s8_s64(vzip2q_s64(first, second)),
                    ];
                }
                for eight in 0..2 {
                    for r in 0..REGISTERS {
                        let [low, high] = if CODES == U8_CODES {
                            let signed = |codes| vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
                            let word = group * 8 + 4 * half + 2 * eight;
                            [signed(load(tile, word, r)), signed(load(tile, word + 1, r))]
                        } else {
                            let codes = load(tile, group * 4 + 2 * half + eight, r);
                            [nibbles::<CODES>(codes, false, table), nibbles::<CODES>(codes, true, table)]
                        };
                        let (low, high) = (vreinterpretq_s32_s8(low), vreinterpretq_s32_s8(high));
                        let rows =
                            [vreinterpretq_s8_s32(vzip1q_s32(low, high)), vreinterpretq_s8_s32(vzip2q_s32(low, high))];
                        for pair in 0..T / 2 {
                            for i in 0..2 {
                                squares[pair][r][i] = smmla(squares[pair][r][i], rows[i], columns[pair][eight]);
                            }
                        }
                    }
                }
                if HALVES || half == 1 {
                    let mut dots = start;
                    for pair in 0..T / 2 {
                        for r in 0..REGISTERS {
                            let [first, second] = squares[pair][r];
                            let (even, odd) = (vuzp1q_s32(first, second), vuzp2q_s32(first, second));
                            dots[2 * pair][r] = vaddq_s32(dots[2 * pair][r], even);
                            dots[2 * pair + 1][r] = vaddq_s32(dots[2 * pair + 1][r], odd);
                        }
                    }
                    let group_idx = if HALVES { 2 * group + half } else { group };
                    scale_dots(&params, group_idx, x, group, &dots, &mut sums);
                }
            }
        }
    }
    // SAFETY: the lengths were checked.
    unsafe { add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums) };
    store(&sums, unit * tile.unit, out);
}

/// `sum += a b^T` for two rows and two tokens of four bf16 each.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn bfmmla(sum: float32x4_t, a: uint16x8_t, b: uint16x8_t) -> float32x4_t {
    let mut result = sum;
    // SAFETY: reads and writes the named registers only.
    unsafe {
        asm!(
            "bfmmla {sum:v}.4s, {a:v}.8h, {b:v}.8h",
            sum = inout(vreg) result, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    result
}

/// bf16 products of bf16 weights: four columns of two rows and two tokens at a time, the second token a copy of the
/// first where there is none.
#[target_feature(enable = "neon,bf16")]
unsafe fn bf16_sums<const T: usize>(tile: &Tile<'_>, x: &[FloatToken<'_, u16>; T], out: &mut Sums) {
    let mut squares = [[[vdupq_n_f32(0.0); 2]; REGISTERS]; T];
    for group in 0..tile.cols / GROUP {
        prefetch_group::<{ 64 * HEIGHT }>(tile, group);
        for eight in 0..4 {
            // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
            unsafe {
                let mut columns = [[vdupq_n_u16(0); 2]; T];
                for pair in 0..T.div_ceil(2) {
                    let load = |t: usize| {
                        vreinterpretq_u64_u16(vld1q_u16(x[t.min(T - 1)].values.as_ptr().add(group * GROUP + 8 * eight)))
                    };
                    let (first, second) = (load(2 * pair), load(2 * pair + 1));
                    columns[pair] = [
                        vreinterpretq_u16_u64(vzip1q_u64(first, second)),
                        vreinterpretq_u16_u64(vzip2q_u64(first, second)),
                    ];
                }
                for four in 0..2 {
                    let word = group * 16 + 4 * eight + 2 * four;
                    for r in 0..REGISTERS {
                        let first = vreinterpretq_u32_u8(load(tile, word, r));
                        let second = vreinterpretq_u32_u8(load(tile, word + 1, r));
                        let rows = [
                            vreinterpretq_u16_u32(vzip1q_u32(first, second)),
                            vreinterpretq_u16_u32(vzip2q_u32(first, second)),
                        ];
                        for pair in 0..T.div_ceil(2) {
                            for i in 0..2 {
                                squares[pair][r][i] = bfmmla(squares[pair][r][i], rows[i], columns[pair][four]);
                            }
                        }
                    }
                }
            }
        }
    }
    let mut sums = [[vdupq_n_f32(0.0); REGISTERS]; T];
    for t in 0..T {
        for r in 0..REGISTERS {
            let [first, second] = squares[t / 2][r];
            sums[t][r] = if t % 2 == 0 { vuzp1q_f32(first, second) } else { vuzp2q_f32(first, second) };
        }
    }
    store(&sums, tile.unit, out);
}

/// f32 products.
#[target_feature(enable = "neon")]
unsafe fn f32_sums<const T: usize, const CODES: u8, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[FloatToken<'_, f32>; T],
    out: &mut Sums,
) {
    let (table, unit) = signed_codes(tile.layout.codes);
    let unit = if CODES == E2M1_CODES { unit } else { 1.0 };
    // SAFETY: 16 bytes.
    let table = unsafe { vld1q_s8(table.as_ptr()) };
    let params = Params::new(tile);
    let mut sums = [[vdupq_n_f32(0.0); REGISTERS]; T];
    for group in 0..tile.cols / GROUP {
        match CODES {
            BF16_CODES => prefetch_group::<{ 64 * HEIGHT }>(tile, group),
            U8_CODES | E4M3_CODES => prefetch_group::<{ 32 * HEIGHT }>(tile, group),
            _ => prefetch_group::<{ 16 * HEIGHT }>(tile, group),
        }
        let mut partial = [[vdupq_n_f32(0.0); REGISTERS]; T];
        macro_rules! step {
            ($r:expr, $weights:expr, $column:expr) => {{
                let weights = $weights;
                for t in 0..T {
                    let x = *x[t].values.get_unchecked(group * GROUP + $column);
                    partial[t][$r] = vfmaq_n_f32(partial[t][$r], weights, x);
                }
            }};
        }
        // Four signed bytes of each lane, from the lowest on, as floats.
        macro_rules! signed_bytes {
            ($r:expr, $bytes:expr, $column:expr) => {{
                let bytes = vreinterpretq_s32_s8($bytes);
                step!($r, vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<24>(bytes))), $column);
                step!($r, vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<16>(bytes))), $column + 1);
                step!($r, vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<8>(bytes))), $column + 2);
                step!($r, vcvtq_f32_s32(vshrq_n_s32::<24>(bytes)), $column + 3);
            }};
        }
        macro_rules! scale {
            ($group:expr) => {{
                let scales = params.scales($group);
                for t in 0..T {
                    for r in 0..REGISTERS {
                        sums[t][r] = vfmaq_f32(sums[t][r], partial[t][r], scales[r]);
                    }
                }
            }};
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            for word in 0..match CODES {
                BF16_CODES => 16,
                U8_CODES | E4M3_CODES => 8,
                _ => 4,
            } {
                if HALVES && word == 2 {
                    scale!(2 * group);
                    partial = [[vdupq_n_f32(0.0); REGISTERS]; T];
                }
                for r in 0..REGISTERS {
                    match CODES {
                        E2M1_CODES | U4_CODES => {
                            let codes = load(tile, group * 4 + word, r);
                            signed_bytes!(r, nibbles::<CODES>(codes, false, table), 8 * word);
                            signed_bytes!(r, nibbles::<CODES>(codes, true, table), 8 * word + 4);
                        }
                        U8_CODES => {
                            let codes = vreinterpretq_u32_u8(load(tile, group * 8 + word, r));
                            let low = vdupq_n_u32(0xff);
                            step!(r, vcvtq_f32_u32(vandq_u32(codes, low)), 4 * word);
                            step!(r, vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<8>(codes), low)), 4 * word + 1);
                            step!(r, vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<16>(codes), low)), 4 * word + 2);
                            step!(r, vcvtq_f32_u32(vshrq_n_u32::<24>(codes)), 4 * word + 3);
                        }
                        E4M3_CODES => {
                            // Sign, exponent and mantissa where f32 has them; the exponent's bias differs by 120.
                            let codes = vreinterpretq_s32_u8(load(tile, group * 8 + word, r));
                            let (bits, rebias) = (vdupq_n_s32(0x87f0_0000_u32 as i32), f32::from_bits(247 << 23));
                            macro_rules! value {
                                ($top:expr) => {
                                    vmulq_n_f32(vreinterpretq_f32_s32(vandq_s32(vshrq_n_s32::<4>($top), bits)), rebias)
                                };
                            }
                            step!(r, value!(vshlq_n_s32::<24>(codes)), 4 * word);
                            step!(r, value!(vshlq_n_s32::<16>(codes)), 4 * word + 1);
                            step!(r, value!(vshlq_n_s32::<8>(codes)), 4 * word + 2);
                            step!(r, value!(codes), 4 * word + 3);
                        }
                        _ => {
                            let pairs = vreinterpretq_u32_u8(load(tile, group * 16 + word, r));
                            let first = word / 4 * 8 + [0, 4, 1, 5][word % 4];
                            step!(r, vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)), first);
                            let upper = vandq_u32(pairs, vdupq_n_u32(0xffff_0000));
                            step!(r, vreinterpretq_f32_u32(upper), first + 2);
                        }
                    }
                }
            }
            scale!(if HALVES { 2 * group + 1 } else { group });
        }
    }
    // SAFETY: the lengths were checked.
    unsafe {
        for sums in &mut sums {
            for sum in sums {
                *sum = vmulq_n_f32(*sum, unit);
            }
        }
        add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums);
    }
    store(&sums, tile.unit, out);
}
