//! AVX2 (with FMA and F16C; AVX-VNNI where it is there): tiles of 16 rows, two registers of eight lanes.
//!
//! Bytes are multiplied in pairs to 16-bit sums, which hold four products of e2m1 codes (24 x 127 each) and eight of
//! 4-bit integers; they are widened twice or once a group. Products of 8-bit codes do not fit, so these meet 16-bit
//! activations. Instructions per 64 packed bytes of a 16-row tile and one token: `bench/runs/2026-11-26-cpu-avx2`.

// Rows and tokens run over several arrays of registers at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use tandem_core::Float;

use super::{
    Codes, FloatToken, GROUP, IntegerToken, Isa, Scales, Sums, Tile, code_bytes, code_values, prefetch_group,
    share_log2,
};

/// Rows of a tile.
const HEIGHT: usize = 16;

/// An expression of each of two registers. (`map` would call its closure: a function without the caller's instructions
/// cannot inline one that has them.)
macro_rules! both {
    ($pair:expr, $item:ident => $value:expr) => {{
        let [a, b] = $pair;
        [
            {
                let $item = a;
                $value
            },
            {
                let $item = b;
                $value
            },
        ]
    }};
}

/// # Safety
/// The processor has AVX2, and `x` was made for `tile`.
pub(super) unsafe fn int8_tile<const T: usize>(
    isa: Isa,
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i8>; T],
    out: &mut Sums,
) {
    let halves = tile.layout.group < GROUP;
    // SAFETY: the caller's promise; AVX-VNNI is there where it is chosen.
    unsafe {
        match (tile.layout.codes, isa.has_vnni()) {
            (Codes::E2m1, false) if halves => int8_sums::<T, true, true>(tile, x, out),
            (Codes::E2m1, false) => int8_sums::<T, true, false>(tile, x, out),
            (Codes::U4, false) => int8_sums::<T, false, false>(tile, x, out),
            (Codes::E2m1, true) if halves => vnni_sums::<T, 4, true>(tile, x, out),
            (Codes::E2m1 | Codes::U4, true) => vnni_sums::<T, 4, false>(tile, x, out),
            (Codes::U8, true) => vnni_sums::<T, 8, false>(tile, x, out),
            (codes, _) => unreachable!("{codes:?} are not multiplied as bytes"),
        }
    }
}

/// # Safety
/// As [`int8_tile`].
pub(super) unsafe fn int16_tile<const T: usize>(tile: &Tile<'_>, x: &[IntegerToken<'_, i16>; T], out: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.layout.codes {
            Codes::E2m1 if tile.layout.group < GROUP => int16_sums::<T, E2M1_CODES, true>(tile, x, out),
            Codes::E2m1 => int16_sums::<T, E2M1_CODES, false>(tile, x, out),
            Codes::U4 => int16_sums::<T, U4_CODES, false>(tile, x, out),
            _ => int16_sums::<T, U8_CODES, false>(tile, x, out),
        }
    }
}

/// # Safety
/// As [`int8_tile`].
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

// Codes as constants that kernels are compiled for.
const E2M1_CODES: u8 = 0;
const U4_CODES: u8 = 1;
const U8_CODES: u8 = 2;
const E4M3_CODES: u8 = 3;
const BF16_CODES: u8 = 4;

/// Keeps loads on their side: the compiler would move them up, and with them more values than there are registers.
#[inline(always)]
fn in_order() {
    // SAFETY: does nothing.
    unsafe { std::arch::asm!("", options(nostack, preserves_flags)) };
}

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
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(&self, group: usize) -> [__m256; 2] {
        // SAFETY: the scales of the group's 16 rows are there.
        unsafe {
            match self.scales {
                Scales::Float(float) => pair(float, self.tile.scales, group >> self.share_log2),
                Scales::E8m0 => {
                    let bytes = self.tile.scales.as_ptr().add(group * HEIGHT);
                    [e8m0(bytes), e8m0(bytes.add(8))]
                }
                Scales::One => [_mm256_set1_ps(1.0); 2],
            }
        }
    }
}

/// Scales or biases of group `group`.
///
/// # Safety
/// 16 params must be there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pair(float: Float, params: &[u8], group: usize) -> [__m256; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let first = params.as_ptr().add(group * HEIGHT * float.bytes());
        let second = first.add(8 * float.bytes());
        match float {
            Float::F32 => [_mm256_loadu_ps(first.cast()), _mm256_loadu_ps(second.cast())],
            Float::F16 => {
                [_mm256_cvtph_ps(_mm_loadu_si128(first.cast())), _mm256_cvtph_ps(_mm_loadu_si128(second.cast()))]
            }
            Float::BF16 => both!([first, second], p => {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }),
        }
    }
}

/// Eight e8m0 bytes as powers of two: byte 0 is the subnormal 2^-127, byte 255 infinity.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn e8m0(bytes: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    let bytes = unsafe { _mm_loadl_epi64(bytes.cast()) };
    let bits = _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(bytes));
    _mm256_castsi256_ps(_mm256_max_epu32(bits, _mm256_set1_epi32(0x0040_0000)))
}

/// The two registers of word `word` of every row.
///
/// # Safety
/// `word` must be one of the tile's.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn words(tile: &Tile<'_>, word: usize) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let p = tile.codes.as_ptr().add(word * 4 * HEIGHT);
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())]
    }
}

/// Adds what affine biases contribute: the bias of each group times the sum of its activations.
///
/// # Safety
/// The sums must be as many as the groups.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_biases<const T: usize>(params: &Params<'_>, x_sums: &[&[f32]; T], sums: &mut [[__m256; 2]; T]) {
    let Scales::Float(float) = params.scales else { return };
    if !params.tile.layout.biased {
        return;
    }
    for group in 0..(params.tile.cols / GROUP) >> params.share_log2 {
        // SAFETY: the group is one of the tile's and of the sums'.
        unsafe {
            let bias = pair(float, params.tile.biases, group);
            for t in 0..T {
                let sum = _mm256_set1_ps(*x_sums[t].get_unchecked(group));
                for h in 0..2 {
                    sums[t][h] = _mm256_fmadd_ps(bias[h], sum, sums[t][h]);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store<const T: usize>(sums: &[[__m256; 2]; T], unit: f32, out: &mut Sums) {
    let unit = _mm256_set1_ps(unit);
    for (sums, out) in sums.iter().zip(out) {
        // SAFETY: 16 floats and more.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(sums[0], unit));
            _mm256_storeu_ps(out.as_mut_ptr().add(8), _mm256_mul_ps(sums[1], unit));
        }
    }
}

/// `sums += dots * scales of the rows * scale of the activations`, for dots of integers.
///
/// # Safety
/// `group` must be one of the tile's and `x_group` one of the activations'.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale_dots<const T: usize, E>(
    params: &Params<'_>,
    group: usize,
    x: &[IntegerToken<'_, E>; T],
    x_group: usize,
    dots: &[[__m256i; 2]; T],
    sums: &mut [[__m256; 2]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let scales = params.scales(group);
        for t in 0..T {
            let x_scale = _mm256_set1_ps(*x[t].scales.get_unchecked(x_group));
            for h in 0..2 {
                // Not the product of the scales: it may be too small for f32.
                let dot = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[t][h]), x_scale);
                sums[t][h] = _mm256_fmadd_ps(dot, scales[h], sums[t][h]);
            }
        }
    }
}

/// What takes the offset of the codes away: `-offset * sum of the activations`.
///
/// # Safety
/// `part` must be one of the activations' groups of 32, or of 16 if `HALVES`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn start_dots<const T: usize, const HALVES: bool, E>(
    x: &[IntegerToken<'_, E>; T],
    part: usize,
    offset: i32,
) -> [[__m256i; 2]; T] {
    let mut dots = [[_mm256_setzero_si256(); 2]; T];
    for t in 0..T {
        let of = if HALVES { x[t].half_sums } else { x[t].group_sums };
        // SAFETY: the caller's promise.
        dots[t] = [_mm256_set1_epi32(-offset * unsafe { *of.get_unchecked(part) }); 2];
    }
    dots
}

/// Integer products of 4-bit codes and bytes.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn int8_sums<const T: usize, const E2M1: bool, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i8>; T],
    out: &mut Sums,
) {
    let (table, offset, unit) = code_bytes(tile.layout.codes);
    // SAFETY: 16 bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let (low, ones) = (_mm256_set1_epi8(0x0f), _mm256_set1_epi16(1));
    let params = Params::new(tile);
    let mut sums = [[_mm256_setzero_ps(); 2]; T];
    for group in 0..tile.cols / GROUP {
        prefetch_group::<{ 16 * HEIGHT }>(tile, group);
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            let mut dots = [[_mm256_setzero_si256(); 2]; T];
            for half in 0..2 {
                if E2M1 && HALVES {
                    dots = start_dots::<T, true, _>(x, 2 * group + half, offset);
                } else if E2M1 && half == 0 {
                    dots = start_dots::<T, false, _>(x, group, offset);
                }
                let mut pairs = [[_mm256_setzero_si256(); 2]; T];
                for step in 2 * half..2 * half + 2 {
                    let codes = words(tile, group * 4 + step);
                    for nibble in 0..2 {
                        let values = both!(codes, c => {
                            let c = if nibble == 1 { _mm256_srli_epi16::<4>(c) } else { c };
                            let c = _mm256_and_si256(c, low);
                            if E2M1 { _mm256_shuffle_epi8(table, c) } else { c }
                        });
                        for t in 0..T {
                            let column = group * GROUP + step * 8 + nibble * 4;
                            let x = _mm256_set1_epi32(x[t].values.as_ptr().add(column).cast::<i32>().read_unaligned());
                            for h in 0..2 {
                                pairs[t][h] = _mm256_add_epi16(pairs[t][h], _mm256_maddubs_epi16(values[h], x));
                            }
                        }
                    }
                }
                for t in 0..T {
                    for h in 0..2 {
                        dots[t][h] = _mm256_add_epi32(dots[t][h], _mm256_madd_epi16(pairs[t][h], ones));
                    }
                }
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

/// The same with dot products of four bytes (AVX-VNNI); `BITS` of a code: 4 or 8.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn vnni_sums<const T: usize, const BITS: usize, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i8>; T],
    out: &mut Sums,
) {
    let (table, offset, unit) = code_bytes(tile.layout.codes);
    // SAFETY: 16 bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let low = _mm256_set1_epi8(0x0f);
    let is_mx = tile.layout.codes == Codes::E2m1;
    let params = Params::new(tile);
    let mut sums = [[_mm256_setzero_ps(); 2]; T];
    for group in 0..tile.cols / GROUP {
        if BITS == 8 {
            prefetch_group::<{ 32 * HEIGHT }>(tile, group);
        } else {
            prefetch_group::<{ 16 * HEIGHT }>(tile, group);
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            let mut dots = [[_mm256_setzero_si256(); 2]; T];
            for half in 0..2 {
                if is_mx && HALVES {
                    dots = start_dots::<T, true, _>(x, 2 * group + half, offset);
                } else if is_mx && half == 0 {
                    dots = start_dots::<T, false, _>(x, group, offset);
                }
                for step in BITS / 2 * half..BITS / 2 * (half + 1) {
                    let codes = words(tile, group * BITS + step);
                    for nibble in 0..8 / BITS {
                        let values = both!(codes, c => {
                            if BITS == 8 {
                                c
                            } else {
                                let c = if nibble == 1 { _mm256_srli_epi16::<4>(c) } else { c };
                                _mm256_shuffle_epi8(table, _mm256_and_si256(c, low))
                            }
                        });
                        for t in 0..T {
                            let column = group * GROUP + step * (32 / BITS) + nibble * 4;
                            let x = _mm256_set1_epi32(x[t].values.as_ptr().add(column).cast::<i32>().read_unaligned());
                            for h in 0..2 {
                                dots[t][h] = _mm256_dpbusd_avx_epi32(dots[t][h], values[h], x);
                            }
                        }
                    }
                }
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

/// Integer products of codes and 16-bit activations.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn int16_sums<const T: usize, const CODES: u8, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i16>; T],
    out: &mut Sums,
) {
    let (table, offset, unit) = code_bytes(tile.layout.codes);
    // SAFETY: 16 bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let low = _mm256_set1_epi8(0x0f);
    let params = Params::new(tile);
    let mut sums = [[_mm256_setzero_ps(); 2]; T];
    for group in 0..tile.cols / GROUP {
        if CODES == U8_CODES {
            prefetch_group::<{ 32 * HEIGHT }>(tile, group);
        } else {
            prefetch_group::<{ 16 * HEIGHT }>(tile, group);
        }
        // Products of a register's even columns, and of its odd ones, with pair `$pair` and the one after the next.
        macro_rules! step {
            ($dots:ident, $bytes:expr, $pair:expr) => {{
                for odd in 0..2 {
                    if T > 2 {
                        in_order();
                    }
                    let values = both!($bytes, b => {
                        if odd == 0 { _mm256_and_si256(b, _mm256_set1_epi16(0xff)) } else { _mm256_srli_epi16::<8>(b) }
                    });
                    let pair = $pair + 2 * odd;
                    for t in 0..T {
                        let x = x[t].values.as_ptr().add(group * GROUP + 2 * pair).cast::<i32>().read_unaligned();
                        let x = _mm256_set1_epi32(x);
                        for h in 0..2 {
                            $dots[t][h] = _mm256_add_epi32($dots[t][h], _mm256_madd_epi16(values[h], x));
                        }
                    }
                }
            }};
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            let mut dots = [[_mm256_setzero_si256(); 2]; T];
            for half in 0..2 {
                if CODES == E2M1_CODES && HALVES {
                    dots = start_dots::<T, true, _>(x, 2 * group + half, offset);
                } else if CODES == E2M1_CODES && half == 0 {
                    dots = start_dots::<T, false, _>(x, group, offset);
                }
                if CODES == U8_CODES {
                    for word in 4 * half..4 * half + 4 {
                        step!(dots, words(tile, group * 8 + word), word / 2 * 4 + word % 2);
                    }
                } else {
                    for word in 2 * half..2 * half + 2 {
                        let codes = words(tile, group * 4 + word);
                        for nibble in 0..2 {
                            let values = both!(codes, c => {
                                let c = if nibble == 1 { _mm256_srli_epi16::<4>(c) } else { c };
                                let c = _mm256_and_si256(c, low);
                                if CODES == E2M1_CODES { _mm256_shuffle_epi8(table, c) } else { c }
                            });
                            step!(dots, values, 4 * word + nibble);
                        }
                    }
                }
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

/// f32 products.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn f32_sums<const T: usize, const CODES: u8, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[FloatToken<'_, f32>; T],
    out: &mut Sums,
) {
    // SAFETY: 8 floats and more.
    let magnitudes = unsafe { _mm256_loadu_ps(code_values(tile.layout.codes).as_ptr()) };
    let params = Params::new(tile);
    let mut sums = [[_mm256_setzero_ps(); 2]; T];
    for group in 0..tile.cols / GROUP {
        match CODES {
            BF16_CODES => prefetch_group::<{ 64 * HEIGHT }>(tile, group),
            U8_CODES | E4M3_CODES => prefetch_group::<{ 32 * HEIGHT }>(tile, group),
            _ => prefetch_group::<{ 16 * HEIGHT }>(tile, group),
        }
        // Two sums for each register, of alternating columns: one alone would wait for its own last addition.
        let mut partial = [[[_mm256_setzero_ps(); 2]; 2]; T];
        macro_rules! step {
            ($weights:expr, $column:expr, $chain:expr) => {{
                let weights = $weights;
                for t in 0..T {
                    let x = _mm256_set1_ps(*x[t].values.get_unchecked(group * GROUP + $column));
                    for h in 0..2 {
                        partial[t][h][$chain] = _mm256_fmadd_ps(weights[h], x, partial[t][h][$chain]);
                    }
                }
            }};
        }
        macro_rules! scale {
            ($group:expr) => {{
                let scales = params.scales($group);
                for t in 0..T {
                    for h in 0..2 {
                        let sum = _mm256_add_ps(partial[t][h][0], partial[t][h][1]);
                        sums[t][h] = _mm256_fmadd_ps(sum, scales[h], sums[t][h]);
                    }
                }
            }};
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            match CODES {
                E2M1_CODES | U4_CODES => {
                    for word in 0..4 {
                        if HALVES && word == 2 {
                            scale!(2 * group);
                            partial = [[[_mm256_setzero_ps(); 2]; 2]; T];
                        }
                        let mut codes = words(tile, group * 4 + word);
                        for i in 0..8 {
                            let values = both!(codes, c => {
                                if CODES == E2M1_CODES {
                                    // The permutation reads three bits; the fourth is the sign.
                                    let sign = _mm256_and_si256(_mm256_slli_epi32::<28>(c), _mm256_set1_epi32(i32::MIN));
                                    _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, c), _mm256_castsi256_ps(sign))
                                } else {
                                    _mm256_cvtepi32_ps(_mm256_and_si256(c, _mm256_set1_epi32(15)))
                                }
                            });
                            step!(values, 8 * word + i / 2 + i % 2 * 4, i % 2);
                            codes = both!(codes, c => _mm256_srli_epi32::<4>(c));
                        }
                    }
                }
                U8_CODES => {
                    for word in 0..8 {
                        let mut codes = words(tile, group * 8 + word);
                        for column in 0..4 {
                            let low = _mm256_set1_epi32(0xff);
                            let values = both!(codes, c => _mm256_cvtepi32_ps(_mm256_and_si256(c, low)));
                            step!(values, 4 * word + column, column % 2);
                            codes = both!(codes, c => _mm256_srli_epi32::<8>(c));
                        }
                    }
                }
                E4M3_CODES => {
                    // Sign, exponent and mantissa where f32 has them; the exponent's bias differs by 120.
                    let (bits, rebias) =
                        (_mm256_set1_epi32(0x87f0_0000_u32 as i32), _mm256_set1_ps(f32::from_bits(247 << 23)));
                    for word in 0..8 {
                        let codes = words(tile, group * 8 + word);
                        for column in 0..4 {
                            let values = both!(codes, c => {
                                let c = match column {
                                    0 => _mm256_slli_epi32::<24>(c),
                                    1 => _mm256_slli_epi32::<16>(c),
                                    2 => _mm256_slli_epi32::<8>(c),
                                    _ => c,
                                };
                                let c = _mm256_and_si256(_mm256_srai_epi32::<4>(c), bits);
                                _mm256_mul_ps(_mm256_castsi256_ps(c), rebias)
                            });
                            step!(values, 4 * word + column, column % 2);
                        }
                    }
                }
                _ => {
                    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                    for word in 0..16 {
                        let pairs = words(tile, group * 16 + word);
                        let first = word / 4 * 8 + [0, 4, 1, 5][word % 4];
                        step!(both!(pairs, p => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(p))), first, 0);
                        step!(both!(pairs, p => _mm256_castsi256_ps(_mm256_and_si256(p, upper))), first + 2, 1);
                    }
                }
            }
            scale!(if HALVES { 2 * group + 1 } else { group });
        }
    }
    // SAFETY: the lengths were checked.
    unsafe { add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums) };
    store(&sums, tile.unit, out);
}
