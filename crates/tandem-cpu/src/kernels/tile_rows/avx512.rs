//! AVX-512: tiles of 32 rows, two registers of sixteen lanes.

// Rows and tokens run over several arrays of registers at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use tandem_core::Float;
use tandem_core::quant::minifloat::E4M3;

use super::super::affine::load_params;
use super::{
    Codes, FloatToken, GROUP, IntegerToken, Scales, Sums, Tile, code_bytes, code_values, prefetch_group, share_log2,
};

/// Rows of a tile.
pub(super) const HEIGHT: usize = 32;
/// Tokens of a pass whose products do not keep the processor busy while one waits for the other.
const FEW: usize = 2;

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
/// The processor has AVX-512 with VNNI and VBMI, and `x` was made for `tile`.
pub(super) unsafe fn int8_tile<const T: usize>(tile: &Tile<'_>, x: &[IntegerToken<'_, i8>; T], out: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.layout.codes {
            Codes::U8 => int8_sums::<T, true, false>(tile, x, out),
            _ if tile.layout.group < GROUP => int8_sums::<T, false, true>(tile, x, out),
            _ => int8_sums::<T, false, false>(tile, x, out),
        }
    }
}

/// # Safety
/// As [`int8_tile`].
pub(super) unsafe fn int16_tile<const T: usize>(tile: &Tile<'_>, x: &[IntegerToken<'_, i16>; T], out: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.layout.codes {
            Codes::U8 => int16_sums::<T, true, false>(tile, x, out),
            _ if tile.layout.group < GROUP => int16_sums::<T, false, true>(tile, x, out),
            _ => int16_sums::<T, false, false>(tile, x, out),
        }
    }
}

/// # Safety
/// The processor has AVX-512 with BF16, and `x` was made for `tile`.
pub(super) unsafe fn bf16_tile<const T: usize>(tile: &Tile<'_>, x: &[FloatToken<'_, u16>; T], out: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.layout.codes {
            Codes::U4 | Codes::E2m1 if tile.layout.group < GROUP => bf16_sums::<T, NIBBLES, true>(tile, x, out),
            Codes::U4 | Codes::E2m1 => bf16_sums::<T, NIBBLES, false>(tile, x, out),
            Codes::U8 => bf16_sums::<T, U8_CODES, false>(tile, x, out),
            Codes::E4m3 => bf16_sums::<T, E4M3_CODES, false>(tile, x, out),
            Codes::Bf16 => bf16_sums::<T, BF16_CODES, false>(tile, x, out),
        }
    }
}

/// # Safety
/// The processor has AVX-512, and `x` was made for `tile`.
pub(super) unsafe fn f32_tile<const T: usize>(tile: &Tile<'_>, x: &[FloatToken<'_, f32>; T], out: &mut Sums) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.layout.codes {
            Codes::U4 | Codes::E2m1 if tile.layout.group < GROUP => f32_sums::<T, NIBBLES, true>(tile, x, out),
            Codes::U4 | Codes::E2m1 => f32_sums::<T, NIBBLES, false>(tile, x, out),
            Codes::U8 => f32_sums::<T, U8_CODES, false>(tile, x, out),
            Codes::E4m3 => f32_sums::<T, E4M3_CODES, false>(tile, x, out),
            Codes::Bf16 => f32_sums::<T, BF16_CODES, false>(tile, x, out),
        }
    }
}

// Codes as constants that kernels are compiled for.
const NIBBLES: u8 = 0;
const U8_CODES: u8 = 1;
const E4M3_CODES: u8 = 2;
const BF16_CODES: u8 = 3;

/// Scales and biases of the groups of a tile.
pub(super) struct Params<'a> {
    tile: &'a Tile<'a>,
    scales: Scales,
    share_log2: u32,
}

impl<'a> Params<'a> {
    pub(super) fn new(tile: &'a Tile<'a>) -> Params<'a> {
        Params { tile, scales: tile.layout.scales, share_log2: share_log2(&tile.layout) }
    }

    /// Scales of the 32 rows for group `group` of 32 columns, or of 16 where these have their own.
    ///
    /// # Safety
    /// `group` must be one of the tile's.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn scales(&self, group: usize) -> [__m512; 2] {
        // SAFETY: the scales of the group's 32 rows are there.
        unsafe {
            match self.scales {
                Scales::Float(float) => pair(float, self.tile.scales, group >> self.share_log2),
                Scales::E8m0 => {
                    let bytes = self.tile.scales.as_ptr().add(group * HEIGHT);
                    [e8m0(_mm_loadu_si128(bytes.cast())), e8m0(_mm_loadu_si128(bytes.add(16).cast()))]
                }
                Scales::One => [_mm512_set1_ps(1.0); 2],
            }
        }
    }

    /// Biases of the 32 rows for group `group` of 32 columns; zeros where there are none.
    ///
    /// # Safety
    /// `group` must be one of the tile's.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn biases(&self, group: usize) -> [__m512; 2] {
        match self.scales {
            // SAFETY: there are as many biases as scales.
            Scales::Float(float) if self.tile.layout.biased => unsafe {
                pair(float, self.tile.biases, group >> self.share_log2)
            },
            _ => [_mm512_setzero_ps(); 2],
        }
    }
}

/// Scales or biases of group `group`.
///
/// # Safety
/// 32 params must be there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn pair(float: Float, params: &[u8], group: usize) -> [__m512; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let first = params.as_ptr().add(group * HEIGHT * float.bytes());
        [load_params(float, first), load_params(float, first.add(16 * float.bytes()))]
    }
}

/// e8m0 bytes as powers of two: byte 0 is the subnormal 2^-127, byte 255 infinity.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn e8m0(bytes: __m128i) -> __m512 {
    let bits = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(bytes));
    _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x0040_0000)))
}

/// The two registers of word `word` of every row.
///
/// # Safety
/// `word` must be one of the tile's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn words(tile: &Tile<'_>, word: usize) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let p = tile.codes.as_ptr().add(word * 4 * HEIGHT);
        [_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast())]
    }
}

/// Adds what affine biases contribute: the bias of each group times the sum of its activations.
///
/// # Safety
/// The processor must have AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn add_biases<const T: usize>(params: &Params<'_>, x_sums: &[&[f32]; T], sums: &mut [[__m512; 2]; T]) {
    let Scales::Float(float) = params.scales else { return };
    if !params.tile.layout.biased {
        return;
    }
    for group in 0..(params.tile.cols / GROUP) >> params.share_log2 {
        // SAFETY: the group is one of the tile's.
        let bias = unsafe { pair(float, params.tile.biases, group) };
        for t in 0..T {
            let sum = _mm512_set1_ps(x_sums[t][group]);
            for h in 0..2 {
                sums[t][h] = _mm512_fmadd_ps(bias[h], sum, sums[t][h]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn store<const T: usize>(sums: &[[__m512; 2]; T], unit: f32, out: &mut Sums) {
    let unit = _mm512_set1_ps(unit);
    for (sums, out) in sums.iter().zip(out) {
        // SAFETY: 32 floats.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(sums[0], unit));
            _mm512_storeu_ps(out.as_mut_ptr().add(16), _mm512_mul_ps(sums[1], unit));
        }
    }
}

/// `sums += dots * scales of the rows * scale of the activations`, for dots of integers.
///
/// # Safety
/// `group` must be one of the tile's and `x_group` one of the activations'.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn scale_dots<const T: usize, E>(
    params: &Params<'_>,
    group: usize,
    x: &[IntegerToken<'_, E>; T],
    x_group: usize,
    dots: &[[__m512i; 2]; T],
    sums: &mut [[__m512; 2]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let scales = params.scales(group);
        for t in 0..T {
            let x_scale = _mm512_set1_ps(*x[t].scales.get_unchecked(x_group));
            for h in 0..2 {
                // Not the product of the scales: it may be too small for f32.
                let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t][h]), x_scale);
                sums[t][h] = _mm512_fmadd_ps(dot, scales[h], sums[t][h]);
            }
        }
    }
}

/// `dots += others`, where these were used.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn add_dots<const T: usize>(dots: &mut [[__m512i; 2]; T], others: &[[__m512i; 2]; T]) {
    if T <= FEW {
        for t in 0..T {
            for h in 0..2 {
                dots[t][h] = _mm512_add_epi32(dots[t][h], others[t][h]);
            }
        }
    }
}

/// What takes the offset of the codes away: `-offset * sum of the activations`.
///
/// # Safety
/// `part` must be one of the activations' groups of 32, or of 16 if `HALVES`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn start_dots<const T: usize, const HALVES: bool, E>(
    x: &[IntegerToken<'_, E>; T],
    part: usize,
    offset: i32,
) -> [[__m512i; 2]; T] {
    let mut dots = [[_mm512_setzero_si512(); 2]; T];
    for t in 0..T {
        let of = if HALVES { x[t].half_sums } else { x[t].group_sums };
        // SAFETY: the caller's promise.
        dots[t] = [_mm512_set1_epi32(-offset * unsafe { *of.get_unchecked(part) }); 2];
    }
    dots
}

/// Integer products. Codes are unsigned bytes: affine ones as they are, e2m1 as twice the value plus 12.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn int8_sums<const T: usize, const BYTES: bool, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i8>; T],
    out: &mut Sums,
) {
    let (table, offset, unit) = code_bytes(tile.layout.codes);
    // Four times the 16 values: the permutation reads six bits, of which two belong to the next code.
    // SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let params = Params::new(tile);
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    for group in 0..tile.cols / GROUP {
        if BYTES {
            prefetch_group::<{ 32 * HEIGHT }>(tile, group);
        } else {
            prefetch_group::<{ 16 * HEIGHT }>(tile, group);
        }
        let mut dots = [[_mm512_setzero_si512(); 2]; T];
        // With few tokens, products would wait for each other: every other one goes to sums of its own.
        let mut others = [[_mm512_setzero_si512(); 2]; T];
        macro_rules! step {
            ($dots:ident, $values:expr, $column:expr) => {{
                let values = $values;
                for t in 0..T {
                    let x = x[t].values.as_ptr().add(group * GROUP + $column).cast::<i32>().read_unaligned();
                    let x = _mm512_set1_epi32(x);
                    for h in 0..2 {
                        $dots[t][h] = _mm512_dpbusd_epi32($dots[t][h], values[h], x);
                    }
                }
            }};
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            if BYTES {
                for word in 0..8 {
                    if T <= FEW && word % 2 == 1 {
                        step!(others, words(tile, group * 8 + word), 4 * word);
                    } else {
                        step!(dots, words(tile, group * 8 + word), 4 * word);
                    }
                }
            } else {
                if HALVES {
                    dots = start_dots::<T, true, _>(x, 2 * group, offset);
                } else if offset != 0 {
                    dots = start_dots::<T, false, _>(x, group, offset);
                }
                for word in 0..4 {
                    if HALVES && word == 2 {
                        add_dots::<T>(&mut dots, &others);
                        others = [[_mm512_setzero_si512(); 2]; T];
                        scale_dots(&params, 2 * group, x, group, &dots, &mut sums);
                        dots = start_dots::<T, true, _>(x, 2 * group + 1, offset);
                    }
                    let codes = words(tile, group * 4 + word);
                    step!(dots, both!(codes, c => _mm512_permutexvar_epi8(c, table)), 8 * word);
                    let highs = both!(codes, c => _mm512_permutexvar_epi8(_mm512_srli_epi16::<4>(c), table));
                    if T <= FEW {
                        step!(others, highs, 8 * word + 4);
                    } else {
                        step!(dots, highs, 8 * word + 4);
                    }
                }
            }
            add_dots::<T>(&mut dots, &others);
            scale_dots(&params, if HALVES { 2 * group + 1 } else { group }, x, group, &dots, &mut sums);
        }
    }
    // SAFETY: the lengths were checked.
    unsafe { add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums) };
    store(&sums, unit * tile.unit, out);
}

/// Integer products of codes and 16-bit activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn int16_sums<const T: usize, const BYTES: bool, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[IntegerToken<'_, i16>; T],
    out: &mut Sums,
) {
    let (table, offset, unit) = code_bytes(tile.layout.codes);
    // Four times the 16 values, as above. SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let low = _mm512_set1_epi16(0xff);
    let params = Params::new(tile);
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    for group in 0..tile.cols / GROUP {
        if BYTES {
            prefetch_group::<{ 32 * HEIGHT }>(tile, group);
        } else {
            prefetch_group::<{ 16 * HEIGHT }>(tile, group);
        }
        let mut dots = [[_mm512_setzero_si512(); 2]; T];
        // As above.
        let mut others = [[_mm512_setzero_si512(); 2]; T];
        macro_rules! products {
            ($dots:ident, $values:expr, $pair:expr) => {{
                let values = $values;
                for t in 0..T {
                    let x = x[t].values.as_ptr().add(group * GROUP + 2 * $pair).cast::<i32>().read_unaligned();
                    let x = _mm512_set1_epi32(x);
                    for h in 0..2 {
                        $dots[t][h] = _mm512_dpwssd_epi32($dots[t][h], values[h], x);
                    }
                }
            }};
        }
        // A register's even columns meet pair `$pair`, its odd ones the pair after the next.
        macro_rules! step {
            ($bytes:expr, $pair:expr) => {{
                let bytes = $bytes;
                products!(dots, both!(bytes, b => _mm512_and_si512(b, low)), $pair);
                let odd = both!(bytes, b => _mm512_srli_epi16::<8>(b));
                if T <= FEW {
                    products!(others, odd, $pair + 2);
                } else {
                    products!(dots, odd, $pair + 2);
                }
            }};
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            if BYTES {
                for word in 0..8 {
                    step!(words(tile, group * 8 + word), word / 2 * 4 + word % 2);
                }
            } else {
                if HALVES {
                    dots = start_dots::<T, true, _>(x, 2 * group, offset);
                } else if offset != 0 {
                    dots = start_dots::<T, false, _>(x, group, offset);
                }
                for word in 0..4 {
                    if HALVES && word == 2 {
                        add_dots::<T>(&mut dots, &others);
                        others = [[_mm512_setzero_si512(); 2]; T];
                        scale_dots(&params, 2 * group, x, group, &dots, &mut sums);
                        dots = start_dots::<T, true, _>(x, 2 * group + 1, offset);
                    }
                    let codes = words(tile, group * 4 + word);
                    step!(both!(codes, c => _mm512_permutexvar_epi8(c, table)), 4 * word);
                    let highs = both!(codes, c => _mm512_permutexvar_epi8(_mm512_srli_epi16::<4>(c), table));
                    step!(highs, 4 * word + 1);
                }
            }
            add_dots::<T>(&mut dots, &others);
            scale_dots(&params, if HALVES { 2 * group + 1 } else { group }, x, group, &dots, &mut sums);
        }
    }
    // SAFETY: the lengths were checked.
    unsafe { add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums) };
    store(&sums, unit * tile.unit, out);
}

/// bf16 products, f32 sums.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn bf16_sums<const T: usize, const CODES: u8, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[FloatToken<'_, u16>; T],
    out: &mut Sums,
) {
    // Twice the 16 values: the permutation reads five bits, of which the fifth belongs to the next code.
    let values = code_values(tile.layout.codes);
    let table: [u16; 32] = std::array::from_fn(|i| half::bf16::from_f32(values[i % 16]).to_bits());
    // SAFETY: 64 bytes.
    let table = unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
    // The 128 magnitudes of e4m3.
    let magnitudes: [u16; 128] = std::array::from_fn(|i| half::bf16::from_f32(E4M3[i]).to_bits());
    let magnitudes: [__m512i; 4] = if CODES == E4M3_CODES {
        // SAFETY: 4 times 64 bytes.
        std::array::from_fn(|i| unsafe { magnitudes.as_ptr().add(32 * i).cast::<__m512i>().read_unaligned() })
    } else {
        [_mm512_setzero_si512(); 4]
    };
    let params = Params::new(tile);
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    for group in 0..tile.cols / GROUP {
        match CODES {
            NIBBLES => prefetch_group::<{ 16 * HEIGHT }>(tile, group),
            BF16_CODES => prefetch_group::<{ 64 * HEIGHT }>(tile, group),
            _ => prefetch_group::<{ 32 * HEIGHT }>(tile, group),
        }
        let mut partial = [[_mm512_setzero_ps(); 2]; T];
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            let step = |partial: &mut [[__m512; 2]; T], weights: [__m512i; 2], pair: usize| {
                for t in 0..T {
                    let x = x[t].values.as_ptr().add(group * GROUP + 2 * pair).cast::<i32>().read_unaligned();
                    let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(x));
                    for h in 0..2 {
                        let weights: __m512bh = std::mem::transmute(weights[h]);
                        partial[t][h] = _mm512_dpbf16_ps(partial[t][h], weights, x);
                    }
                }
            };
            match CODES {
                NIBBLES => {
                    for word in 0..4 {
                        if HALVES && word == 2 {
                            scale_partial(&params, 2 * group, &partial, &mut sums);
                            partial = [[_mm512_setzero_ps(); 2]; T];
                        }
                        let mut codes = words(tile, group * 4 + word);
                        for i in 0..4 {
                            step(&mut partial, both!(codes, c => _mm512_permutexvar_epi16(c, table)), 4 * word + i);
                            codes = both!(codes, c => _mm512_srli_epi16::<4>(c));
                        }
                    }
                }
                E4M3_CODES => {
                    for word in 0..8 {
                        let codes = words(tile, group * 8 + word);
                        let first = word / 2 * 4 + word % 2;
                        // Columns 0 and 2 of a word as 16-bit indices, then 1 and 3; seven bits of magnitude, then a sign.
                        for odd in 0..2 {
                            let values = both!(codes, c => {
                                let bytes = if odd == 0 { _mm512_slli_epi16::<8>(c) } else { c };
                                let sign = _mm512_and_si512(bytes, _mm512_set1_epi16(i16::MIN));
                                let index = _mm512_srli_epi16::<8>(bytes);
                                let low = _mm512_permutex2var_epi16(magnitudes[0], index, magnitudes[1]);
                                let high = _mm512_permutex2var_epi16(magnitudes[2], index, magnitudes[3]);
                                let large = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
                                _mm512_or_si512(_mm512_mask_blend_epi16(large, low, high), sign)
                            });
                            step(&mut partial, values, first + 2 * odd);
                        }
                    }
                }
                U8_CODES => {
                    for word in 0..8 {
                        let codes = words(tile, group * 8 + word);
                        let first = word / 2 * 4 + word % 2;
                        let low = _mm512_set1_epi32(0xff);
                        // Small integers are exact in bf16: the upper half of their f32.
                        let join = |a: __m512i, b: __m512i| {
                            let a = _mm512_srli_epi32::<16>(_mm512_castps_si512(_mm512_cvtepi32_ps(a)));
                            _mm512_mask_blend_epi16(0xaaaa_aaaa, a, _mm512_castps_si512(_mm512_cvtepi32_ps(b)))
                        };
                        let even = both!(codes, c => {
                            let third = _mm512_and_si512(_mm512_srli_epi32::<16>(c), low);
                            join(_mm512_and_si512(c, low), third)
                        });
                        step(&mut partial, even, first);
                        let odd = both!(codes, c => {
                            let second = _mm512_and_si512(_mm512_srli_epi32::<8>(c), low);
                            join(second, _mm512_srli_epi32::<24>(c))
                        });
                        step(&mut partial, odd, first + 2);
                    }
                }
                _ => {
                    for word in 0..16 {
                        step(&mut partial, words(tile, group * 16 + word), word);
                    }
                }
            }
            scale_partial(&params, if HALVES { 2 * group + 1 } else { group }, &partial, &mut sums);
        }
    }
    // SAFETY: the lengths were checked.
    unsafe { add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums) };
    store(&sums, tile.unit, out);
}

/// f32 products.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_sums<const T: usize, const CODES: u8, const HALVES: bool>(
    tile: &Tile<'_>,
    x: &[FloatToken<'_, f32>; T],
    out: &mut Sums,
) {
    // SAFETY: 16 floats.
    let table = unsafe { _mm512_loadu_ps(code_values(tile.layout.codes).as_ptr()) };
    let params = Params::new(tile);
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    for group in 0..tile.cols / GROUP {
        match CODES {
            NIBBLES => prefetch_group::<{ 16 * HEIGHT }>(tile, group),
            BF16_CODES => prefetch_group::<{ 64 * HEIGHT }>(tile, group),
            _ => prefetch_group::<{ 32 * HEIGHT }>(tile, group),
        }
        let mut partial = [[_mm512_setzero_ps(); 2]; T];
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            let step = |partial: &mut [[__m512; 2]; T], weights: [__m512; 2], column: usize| {
                for t in 0..T {
                    let x = _mm512_set1_ps(*x[t].values.get_unchecked(group * GROUP + column));
                    for h in 0..2 {
                        partial[t][h] = _mm512_fmadd_ps(weights[h], x, partial[t][h]);
                    }
                }
            };
            match CODES {
                NIBBLES => {
                    for word in 0..4 {
                        if HALVES && word == 2 {
                            scale_partial(&params, 2 * group, &partial, &mut sums);
                            partial = [[_mm512_setzero_ps(); 2]; T];
                        }
                        let mut codes = words(tile, group * 4 + word);
                        for i in 0..8 {
                            // The permutation reads the low four bits of each lane only.
                            let values = both!(codes, c => _mm512_permutexvar_ps(c, table));
                            step(&mut partial, values, 8 * word + i / 2 + i % 2 * 4);
                            codes = both!(codes, c => _mm512_srli_epi32::<4>(c));
                        }
                    }
                }
                E4M3_CODES => {
                    // Sign, exponent and mantissa where f32 has them; the exponent's bias differs by 120.
                    let bits = _mm512_set1_epi32(0x87f0_0000_u32 as i32);
                    let rebias = _mm512_set1_ps(f32::from_bits(247 << 23));
                    for word in 0..8 {
                        let codes = words(tile, group * 8 + word);
                        for column in 0..4 {
                            let values = both!(codes, c => {
                                let c = _mm512_sllv_epi32(c, _mm512_set1_epi32(24 - 8 * column as i32));
                                let c = _mm512_and_si512(_mm512_srai_epi32::<4>(c), bits);
                                _mm512_mul_ps(_mm512_castsi512_ps(c), rebias)
                            });
                            step(&mut partial, values, 4 * word + column);
                        }
                    }
                }
                U8_CODES => {
                    let low = _mm512_set1_epi32(0xff);
                    for word in 0..8 {
                        let mut codes = words(tile, group * 8 + word);
                        for column in 0..4 {
                            let values = both!(codes, c => _mm512_cvtepi32_ps(_mm512_and_si512(c, low)));
                            step(&mut partial, values, 4 * word + column);
                            codes = both!(codes, c => _mm512_srli_epi32::<8>(c));
                        }
                    }
                }
                _ => {
                    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                    for word in 0..16 {
                        let pair = words(tile, group * 16 + word);
                        let first = word / 4 * 8 + [0, 4, 1, 5][word % 4];
                        step(&mut partial, both!(pair, p => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(p))), first);
                        step(
                            &mut partial,
                            both!(pair, p => _mm512_castsi512_ps(_mm512_and_si512(p, upper))),
                            first + 2,
                        );
                    }
                }
            }
            scale_partial(&params, if HALVES { 2 * group + 1 } else { group }, &partial, &mut sums);
        }
    }
    // SAFETY: the lengths were checked.
    unsafe { add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums) };
    store(&sums, tile.unit, out);
}

/// `sums += partial * scales of the group`
///
/// # Safety
/// `group` must be one of the tile's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn scale_partial<const T: usize>(
    params: &Params<'_>,
    group: usize,
    partial: &[[__m512; 2]; T],
    sums: &mut [[__m512; 2]; T],
) {
    // SAFETY: the caller's promise.
    let scales = unsafe { params.scales(group) };
    for t in 0..T {
        for h in 0..2 {
            sums[t][h] = _mm512_fmadd_ps(partial[t][h], scales[h], sums[t][h]);
        }
    }
}
