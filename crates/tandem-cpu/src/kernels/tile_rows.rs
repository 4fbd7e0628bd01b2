//! Tiles of a packed matrix times activations, on AVX-512: decode and prefill alike.
//!
//! A tile ([`crate::tiles`]) holds 32 rows, one to a lane. A step takes one word of every row and multiplies it by the
//! same word of each of up to six tokens, broadcast; codes are unpacked once for all of them. Sums are taken per group
//! of 32 columns and then scaled. A value does not depend on what other tokens it is computed with.

#![allow(unsafe_code)]
// Rows and tokens run over several arrays of registers at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use tandem_core::quant::minifloat::E2M1;
use tandem_core::{DType, Float, Numerics};

use super::activations::Activations;
use super::affine::load_params;
use crate::isa::Isa;
use crate::tiles::{TILE_ROWS, Tile, Tiles};

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

/// Tokens of one pass: 2 x 6 accumulators, twice, leave registers for operands.
const MAX_TOKENS: usize = 6;
/// Columns whose products are summed before they are scaled.
const GROUP: usize = 32;
/// Bytes ahead of the one being read that are asked for, into the second-level cache: the processor's own prefetchers stop
/// at every page. Without, the kernels of a 2-core Zen 4 machine reach 0.6 to 0.75 of plain reading in memory, with these
/// 0.8 to 0.97 (in one run each: mxfp4, affine 4-bit in small matrices, affine 8-bit); first-level prefetches do not help.
const fn ahead(operand: Operand, bits: usize) -> usize {
    match (operand, bits) {
        (_, 4) => 8 << 10,
        (Operand::Int8, _) => 2 << 10,
        _ => 4 << 10,
    }
}

/// What the inner loop multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    /// Unsigned codes times signed bytes, 32-bit sums per group.
    Int8,
    /// Codes as bf16 times bf16.
    Bf16,
    /// Decoded values in f32.
    F32,
}

impl Operand {
    pub(crate) fn choose(dtype: DType, numerics: Numerics, isa: Isa) -> Operand {
        match numerics {
            Numerics::Int8 if dtype != DType::BF16 && isa.has_vnni() => Operand::Int8,
            Numerics::Bf16 if isa.has_bf16() => Operand::Bf16,
            _ => Operand::F32,
        }
    }
}

/// `out[t * n_rows + i] = matrix[first_row + i] . x[tokens[t]]` for `n_rows` rows of matrix `part`; `first_row` is the
/// first of a tile.
#[allow(clippy::too_many_arguments)]
pub(crate) fn tile_rows(
    operand: Operand,
    matrix: &Tiles,
    part: usize,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    assert!(first_row.is_multiple_of(TILE_ROWS) && first_row + n_rows <= matrix.rows);
    // Equal shares: 8 tokens are two passes of 4, not 6 and 2.
    let share = tokens.len().div_ceil(tokens.len().div_ceil(MAX_TOKENS).max(1)).max(1);
    let mut sums = [[0.0; TILE_ROWS]; MAX_TOKENS];
    // What comes before the tiles' own prefetches, at once.
    let first = matrix.tile(part, first_row / TILE_ROWS).codes.as_ptr();
    prefetch_lines(first, ahead(operand, matrix.dtype.bits()).div_ceil(64));
    for start in (0..n_rows).step_by(TILE_ROWS) {
        let tile = matrix.tile(part, (first_row + start) / TILE_ROWS);
        let n = TILE_ROWS.min(n_rows - start);
        for (pass, tokens) in tokens.chunks(share).enumerate() {
            // SAFETY: tiles exist only on processors with AVX-512, and the operand was chosen for this one
            // (`Operand::choose`).
            unsafe {
                match tokens.len() {
                    1 => tokens_of::<1>(operand, &tile, x, tokens, &mut sums),
                    2 => tokens_of::<2>(operand, &tile, x, tokens, &mut sums),
                    3 => tokens_of::<3>(operand, &tile, x, tokens, &mut sums),
                    4 => tokens_of::<4>(operand, &tile, x, tokens, &mut sums),
                    5 => tokens_of::<5>(operand, &tile, x, tokens, &mut sums),
                    _ => tokens_of::<6>(operand, &tile, x, tokens, &mut sums),
                }
            }
            for (t, sums) in sums[..tokens.len()].iter().enumerate() {
                out[(pass * share + t) * n_rows + start..][..n].copy_from_slice(&sums[..n]);
            }
        }
    }
}

/// # Safety
/// The processor must have what `operand` needs.
unsafe fn tokens_of<const T: usize>(
    operand: Operand,
    tile: &Tile<'_>,
    x: &Activations,
    tokens: &[u32],
    out: &mut [[f32; TILE_ROWS]; MAX_TOKENS],
) {
    let token = |t: usize| tokens[t] as usize;
    // SAFETY: the caller's promise.
    unsafe {
        match operand {
            Operand::Int8 => {
                let x: [Int8Token<'_>; T] = std::array::from_fn(|t| Int8Token::new(x, token(t), tile));
                match tile.dtype.bits() {
                    4 => int8_sums::<T, false>(tile, &x, out),
                    _ => int8_sums::<T, true>(tile, &x, out),
                }
            }
            Operand::Bf16 => {
                let x: [FloatToken<'_, u16>; T] = std::array::from_fn(|t| FloatToken {
                    values: x.pairs_bf16(token(t)),
                    sums: affine_sums(x, token(t), tile, false),
                });
                match tile.dtype.bits() {
                    4 => bf16_sums::<T, 4>(tile, &x, out),
                    8 => bf16_sums::<T, 8>(tile, &x, out),
                    _ => bf16_sums::<T, 16>(tile, &x, out),
                }
            }
            Operand::F32 => {
                let x: [FloatToken<'_, f32>; T] = std::array::from_fn(|t| FloatToken {
                    values: x.row(token(t)),
                    sums: affine_sums(x, token(t), tile, false),
                });
                match tile.dtype.bits() {
                    4 => f32_sums::<T, 4>(tile, &x, out),
                    8 => f32_sums::<T, 8>(tile, &x, out),
                    _ => f32_sums::<T, 16>(tile, &x, out),
                }
            }
        }
    }
}

/// Sums of the activations per group of an affine matrix, which its biases multiply; empty for other formats.
fn affine_sums<'a>(x: &'a Activations, token: usize, tile: &Tile<'_>, int8: bool) -> &'a [f32] {
    match tile.dtype {
        DType::Affine { group_size, .. } => x.sums(token, group_size as usize, int8),
        _ => &[],
    }
}

/// A token's 8-bit activations.
#[derive(Clone, Copy)]
struct Int8Token<'a> {
    /// In the order of the columns.
    values: &'a [i8],
    /// Per group of 32.
    scales: &'a [f32],
    /// Sums of the values per group of 32.
    group_sums: &'a [i32],
    /// See [`affine_sums`].
    sums: &'a [f32],
}

impl<'a> Int8Token<'a> {
    fn new(x: &'a Activations, token: usize, tile: &Tile<'_>) -> Int8Token<'a> {
        let (scales, group_sums) = x.q8_groups(token);
        Int8Token { values: x.q8(token), scales, group_sums, sums: affine_sums(x, token, tile, true) }
    }
}

/// A token's activations as f32 in order, or as bf16 in the order of pairs of [`crate::tiles`].
#[derive(Clone, Copy)]
struct FloatToken<'a, E> {
    values: &'a [E],
    /// See [`affine_sums`].
    sums: &'a [f32],
}

/// Scales and biases of the groups of a tile.
struct Params<'a> {
    tile: &'a Tile<'a>,
    float: Option<Float>,
    /// Groups of 32 columns that share a scale, as a power of two.
    share_log2: u32,
}

impl<'a> Params<'a> {
    fn new(tile: &'a Tile<'a>) -> Params<'a> {
        let (float, share) = match tile.dtype {
            DType::Affine { params, group_size, .. } => (Some(params), group_size as usize / GROUP),
            _ => (None, 1),
        };
        Params { tile, float, share_log2: share.trailing_zeros() }
    }

    /// Scales of the 32 rows for columns `32 group..`.
    ///
    /// # Safety
    /// `group` must be one of the tile's.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn scales(&self, group: usize) -> [__m512; 2] {
        // SAFETY: the scales of the group's 32 rows are there.
        unsafe {
            match self.float {
                Some(float) => self.pair(float, self.tile.scales, group >> self.share_log2),
                None if self.tile.dtype == DType::Mxfp4 => {
                    let bytes = self.tile.scales.as_ptr().add(group * TILE_ROWS);
                    [e8m0(_mm_loadu_si128(bytes.cast())), e8m0(_mm_loadu_si128(bytes.add(16).cast()))]
                }
                None => [_mm512_set1_ps(1.0); 2],
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn pair(&self, float: Float, params: &[u8], group: usize) -> [__m512; 2] {
        // SAFETY: the caller's promise: 32 params are there.
        unsafe {
            let first = params.as_ptr().add(group * TILE_ROWS * float.bytes());
            [load_params(float, first), load_params(float, first.add(16 * float.bytes()))]
        }
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
unsafe fn words(tile: &Tile<'_>, word: usize) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let p = tile.codes.as_ptr().add(word * 4 * TILE_ROWS);
        [_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast())]
    }
}

/// Asks for what lies `ahead` of the tile's group `group`: as much as a group of `BITS` codes takes with its scales and
/// biases, so that tiles in a row are asked for without a gap.
#[inline]
fn prefetch<const BITS: usize>(tile: &Tile<'_>, group: usize, group_bytes: usize, ahead: usize) {
    // 32 rows' codes are 2 BITS lines, scales and biases two more at most, unless they are f32.
    prefetch_lines(tile.codes.as_ptr().wrapping_add(ahead + group * group_bytes), 2 * BITS + 2);
}

/// Asks for cache lines from `first` on.
#[inline]
#[allow(unused_unsafe)] // prefetching became safe after rust-version
fn prefetch_lines(first: *const u8, n: usize) {
    for line in 0..n {
        // SAFETY: a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(first.wrapping_add(64 * line).cast()) };
    }
}

/// Adds what affine biases contribute: the bias of each group times the sum of its activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn add_biases<const T: usize>(params: &Params<'_>, x_sums: &[&[f32]; T], sums: &mut [[__m512; 2]; T]) {
    let Some(float) = params.float else { return };
    let n_groups = (params.tile.cols / GROUP) >> params.share_log2;
    assert!(x_sums.iter().all(|s| s.len() >= n_groups));
    for group in 0..n_groups {
        // SAFETY: the group is one of the tile's.
        let bias = unsafe { params.pair(float, params.tile.biases, group) };
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
fn store<const T: usize>(sums: &[[__m512; 2]; T], unit: f32, out: &mut [[f32; TILE_ROWS]; MAX_TOKENS]) {
    let unit = _mm512_set1_ps(unit);
    for (sums, out) in sums.iter().zip(out) {
        // SAFETY: 32 floats.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(sums[0], unit));
            _mm512_storeu_ps(out.as_mut_ptr().add(16), _mm512_mul_ps(sums[1], unit));
        }
    }
}

/// Integer products. Codes are unsigned bytes: affine ones as they are, e2m1 as twice the value plus 12.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn int8_sums<const T: usize, const BYTES: bool>(
    tile: &Tile<'_>,
    x: &[Int8Token<'_>; T],
    out: &mut [[f32; TILE_ROWS]; MAX_TOKENS],
) {
    let n_groups = tile.cols / GROUP;
    let is_mx = tile.dtype == DType::Mxfp4;
    for x in x {
        assert!(x.values.len() >= tile.cols && x.scales.len() >= n_groups && x.group_sums.len() >= n_groups);
    }
    // Four times the 16 values: the permutation reads six bits, of which two belong to the next code.
    let table: [i8; 16] = std::array::from_fn(|i| if is_mx { (E2M1[i] * 2.0) as i8 + 12 } else { i as i8 });
    // SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let params = Params::new(tile);
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    let group_bytes = tile.group_bytes();
    for group in 0..n_groups {
        if BYTES {
            prefetch::<8>(tile, group, group_bytes, ahead(Operand::Int8, 8));
        } else {
            prefetch::<4>(tile, group, group_bytes, ahead(Operand::Int8, 4));
        }
        let mut dots = [[_mm512_setzero_si512(); 2]; T];
        if is_mx {
            for t in 0..T {
                // Takes away the 12 that make e2m1 codes unsigned. SAFETY: checked above.
                dots[t] = [_mm512_set1_epi32(-12 * unsafe { *x[t].group_sums.get_unchecked(group) }); 2];
            }
        }
        // SAFETY: group, words and columns are within the tile and the activations, whose lengths were checked.
        unsafe {
            let four = |t: usize, step: usize| {
                _mm512_set1_epi32(x[t].values.as_ptr().add(group * GROUP + step * 4).cast::<i32>().read_unaligned())
            };
            if BYTES {
                for step in 0..8 {
                    let codes = words(tile, group * 8 + step);
                    for t in 0..T {
                        let x = four(t, step);
                        for h in 0..2 {
                            dots[t][h] = _mm512_dpbusd_epi32(dots[t][h], codes[h], x);
                        }
                    }
                }
            } else {
                for step in 0..4 {
                    let codes = words(tile, group * 4 + step);
                    let lows = both!(codes, c => _mm512_permutexvar_epi8(c, table));
                    for t in 0..T {
                        let x = four(t, 2 * step);
                        for h in 0..2 {
                            dots[t][h] = _mm512_dpbusd_epi32(dots[t][h], lows[h], x);
                        }
                    }
                    let highs = both!(codes, c => _mm512_permutexvar_epi8(_mm512_srli_epi16::<4>(c), table));
                    for t in 0..T {
                        let x = four(t, 2 * step + 1);
                        for h in 0..2 {
                            dots[t][h] = _mm512_dpbusd_epi32(dots[t][h], highs[h], x);
                        }
                    }
                }
            }
            let scales = params.scales(group);
            for t in 0..T {
                let x_scale = _mm512_set1_ps(*x[t].scales.get_unchecked(group));
                for h in 0..2 {
                    let scale = _mm512_mul_ps(scales[h], x_scale);
                    sums[t][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][h]), scale, sums[t][h]);
                }
            }
        }
    }
    add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums);
    store(&sums, if is_mx { 0.5 } else { 1.0 }, out);
}

/// bf16 products, f32 sums; `BITS` of a code: 4, 8 or 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn bf16_sums<const T: usize, const BITS: usize>(
    tile: &Tile<'_>,
    x: &[FloatToken<'_, u16>; T],
    out: &mut [[f32; TILE_ROWS]; MAX_TOKENS],
) {
    for x in x {
        assert!(x.values.len() >= tile.cols);
    }
    // Twice the 16 values: the permutation reads five bits, of which the fifth belongs to the next code.
    let values = code_values(tile.dtype);
    let table: [u16; 32] = std::array::from_fn(|i| half::bf16::from_f32(values[i % 16]).to_bits());
    // SAFETY: 64 bytes.
    let table = unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
    let params = Params::new(tile);
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    let group_bytes = tile.group_bytes();
    for group in 0..tile.cols / GROUP {
        prefetch::<BITS>(tile, group, group_bytes, ahead(Operand::Bf16, BITS));
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
            match BITS {
                4 => {
                    for word in 0..4 {
                        let mut codes = words(tile, group * 4 + word);
                        for i in 0..4 {
                            step(&mut partial, both!(codes, c => _mm512_permutexvar_epi16(c, table)), 4 * word + i);
                            codes = both!(codes, c => _mm512_srli_epi16::<4>(c));
                        }
                    }
                }
                8 => {
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
            scale_partial(&params, group, &partial, &mut sums);
        }
    }
    add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums);
    store(&sums, 1.0, out);
}

/// f32 products; `BITS` of a code: 4, 8 or 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_sums<const T: usize, const BITS: usize>(
    tile: &Tile<'_>,
    x: &[FloatToken<'_, f32>; T],
    out: &mut [[f32; TILE_ROWS]; MAX_TOKENS],
) {
    for x in x {
        assert!(x.values.len() >= tile.cols);
    }
    // SAFETY: 16 floats.
    let table = unsafe { _mm512_loadu_ps(code_values(tile.dtype).as_ptr()) };
    let params = Params::new(tile);
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    let group_bytes = tile.group_bytes();
    for group in 0..tile.cols / GROUP {
        prefetch::<BITS>(tile, group, group_bytes, ahead(Operand::F32, BITS));
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
            match BITS {
                4 => {
                    for word in 0..4 {
                        let mut codes = words(tile, group * 4 + word);
                        for i in 0..8 {
                            // The permutation reads the low four bits of each lane only.
                            let values = both!(codes, c => _mm512_permutexvar_ps(c, table));
                            step(&mut partial, values, 8 * word + i / 2 + i % 2 * 4);
                            codes = both!(codes, c => _mm512_srli_epi32::<4>(c));
                        }
                    }
                }
                8 => {
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
            scale_partial(&params, group, &partial, &mut sums);
        }
    }
    add_biases(&params, &std::array::from_fn(|t| x[t].sums), &mut sums);
    store(&sums, 1.0, out);
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

/// Values of the 16 codes of a 4-bit format.
fn code_values(dtype: DType) -> [f32; 16] {
    match dtype {
        DType::Affine { .. } => std::array::from_fn(|i| i as f32),
        _ => E2M1,
    }
}
