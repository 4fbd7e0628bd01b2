//! Products of packed matrices with many rows of activations, on AVX-512: prefill.
//!
//! Thirty-two rows of the matrix are unpacked into a tile, lanes across rows, that stays in the second-level cache
//! while all tokens pass over it, six at a time, in registers. A step of the inner loop multiplies one 32-bit word of
//! each row (four bytes, two bf16 or one f32) by the same word of a token, broadcast. Scales apply per group of
//! columns, as in the row kernels; sums run in another order, so results agree with theirs to rounding.

#![allow(unsafe_code)]
// Rows, tokens and heads run over several arrays at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use tandem_core::quant::PackedView;
use tandem_core::quant::minifloat::{E2M1, e8m0};
use tandem_core::{DType, Float};

use super::activations::{Activations, NIBBLE_BLOCK, Numerics, Q8_GROUP};
use crate::isa::Isa;
use crate::scratch::{Tile, with_scratch, with_tile};

/// Rows of a tile: two registers of 16 lanes.
pub(crate) const TILE_ROWS: usize = 32;
/// Tokens of one pass: 2 x 6 accumulators, twice, leave registers for operands.
const TILE_TOKENS: usize = 6;
/// Blocks of 128 columns unpacked at once: the tile takes 32 KB of bytes or 64 KB of bf16.
const TILE_BLOCKS: usize = 8;

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
        let packed = matches!(dtype, DType::Mxfp4 | DType::Affine { bits: 4 | 8, .. });
        match numerics {
            Numerics::Int8 if packed && isa.has_vnni() => Operand::Int8,
            Numerics::Bf16 if (packed || dtype == DType::BF16) && isa.has_bf16() => Operand::Bf16,
            _ => Operand::F32,
        }
    }
}

/// `out[t * n_rows + i] = matrix[first_row + i] . x[tokens[t]]` for `n_rows` rows.
pub(crate) fn gemm_rows(
    operand: Operand,
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    assert!(first_row + n_rows <= matrix.rows && out.len() >= n_rows * tokens.len());
    for start in (0..n_rows).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(n_rows - start);
        with_scratch(tokens.len().next_multiple_of(TILE_TOKENS) * TILE_ROWS, |sums| {
            sums.fill(0.0);
            with_tile(|tile| {
                // SAFETY: chosen for processors with these instructions only (`Operand::choose`, `Isa::Avx512`).
                unsafe { tile_sums(operand, matrix, first_row + start, rows, x, tokens, tile, sums) }
            });
            for (t, sums) in sums.chunks_exact(TILE_ROWS).take(tokens.len()).enumerate() {
                out[t * n_rows + start..][..rows].copy_from_slice(&sums[..rows]);
            }
        });
    }
}

/// Adds the products of one tile of rows to `sums [n_tokens, TILE_ROWS]`.
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn tile_sums(
    operand: Operand,
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    tile: &mut Tile,
    sums: &mut [f32],
) {
    let n_blocks = matrix.cols.div_ceil(NIBBLE_BLOCK);
    let nibbles = matrix.dtype.bits() == 4;
    if operand == Operand::F32 {
        tile.rows.resize(TILE_ROWS * matrix.cols.next_multiple_of(16), 0.0);
        tile.rows.fill(0.0);
        for (i, row) in tile.rows.chunks_exact_mut(matrix.cols.next_multiple_of(16)).take(n_rows).enumerate() {
            matrix.dequantize_row(first_row + i, &mut row[..matrix.cols]);
        }
    }
    for first_block in (0..n_blocks).step_by(TILE_BLOCKS) {
        let blocks = first_block..n_blocks.min(first_block + TILE_BLOCKS);
        let k = first_block * NIBBLE_BLOCK;
        // SAFETY: the instructions are there (see the caller); lengths are checked inside.
        unsafe {
            match operand {
                Operand::Int8 => pack_codes(matrix, first_row, n_rows, blocks.clone(), nibbles, tile),
                Operand::Bf16 => pack_bf16(matrix, first_row, n_rows, blocks.clone(), nibbles, tile),
                Operand::F32 => pack_f32(matrix.cols, blocks.clone(), tile),
            }
        }
        if operand != Operand::F32 {
            pack_scales(matrix, first_row, n_rows, blocks.clone(), tile);
        }
        // Equal shares: 8 tokens are two passes of 4, not 6 and 2.
        let share = tokens.len().div_ceil(tokens.len().div_ceil(TILE_TOKENS));
        for (tokens, sums) in tokens.chunks(share).zip(sums.chunks_mut(share * TILE_ROWS)) {
            // SAFETY: as above; the tile was packed for these blocks.
            unsafe {
                match operand {
                    Operand::Int8 => int8_tokens(matrix.dtype, tile, blocks.clone(), nibbles, x, tokens, sums),
                    Operand::Bf16 => bf16_tokens(matrix.dtype, tile, blocks.clone(), nibbles, x, tokens, sums),
                    Operand::F32 => f32_tokens(tile, k, matrix.cols, x, tokens, sums),
                }
            }
        }
    }
}

/// Columns per scale.
fn scale_group(dtype: DType) -> usize {
    if dtype.is_quantized() { dtype.group_size() } else { NIBBLE_BLOCK }
}

/// Transposes 16 registers of 16 words: word `i` of register `r` becomes word `r` of register `i`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(v: &mut [__m512i; 16]) {
    let mut t = [_mm512_setzero_si512(); 16];
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for i in 0..4 {
        for j in 0..2 {
            v[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            v[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    }
    for i in 0..4 {
        t[i] = _mm512_shuffle_i32x4::<0x88>(v[i], v[i + 4]);
        t[i + 4] = _mm512_shuffle_i32x4::<0xdd>(v[i], v[i + 4]);
        t[i + 8] = _mm512_shuffle_i32x4::<0x88>(v[i + 8], v[i + 12]);
        t[i + 12] = _mm512_shuffle_i32x4::<0xdd>(v[i + 8], v[i + 12]);
    }
    for i in 0..8 {
        v[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
        v[i + 8] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]);
    }
}

/// Up to 64 bytes from `start` on; zeros beyond the end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load64(bytes: &[u8], start: usize) -> __m512i {
    let bytes = bytes.get(start..).unwrap_or_default();
    let mask = if bytes.len() >= 64 { u64::MAX } else { (1u64 << bytes.len()) - 1 };
    // SAFETY: the mask covers the bytes that are there.
    unsafe { _mm512_maskz_loadu_epi8(mask, bytes.as_ptr().cast()) }
}

/// Asks for the same bytes of the row one tile on: reading 32 rows side by side is no pattern the processor's own
/// prefetchers follow.
#[inline(always)]
fn prefetch_next_tile(row: &[u8], offset: usize, len: usize) {
    for line in (0..len).step_by(64) {
        let next = row.as_ptr().wrapping_add(TILE_ROWS * row.len() + offset + line);
        // SAFETY: a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(next.cast()) }
    }
}

/// Packed bytes of row `row`, empty beyond the tile.
#[inline]
fn row_bytes<'a>(matrix: &PackedView<'a>, first_row: usize, n_rows: usize, row: usize) -> &'a [u8] {
    let size = matrix.dtype.weight_bytes(1, matrix.cols);
    if row < n_rows { &matrix.weight[(first_row + row) * size..][..size] } else { &[] }
}

/// Tile of unsigned codes: for each block 32 steps of `[TILE_ROWS]` words of four codes. 4-bit codes come in two planes
/// of even and odd columns, as in [`Activations::nibble_q8`]; 8-bit ones in order. e2m1 becomes twice its value plus 12.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn pack_codes(
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    blocks: std::ops::Range<usize>,
    nibbles: bool,
    tile: &mut Tile,
) {
    let offset = if matrix.dtype == DType::Mxfp4 { 12 } else { 0 };
    let mut table = [0i8; 16];
    for (i, code) in table.iter_mut().enumerate() {
        *code = if offset > 0 { (E2M1[i] * 2.0) as i8 + offset } else { i as i8 };
    }
    // SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let low = _mm512_set1_epi8(0x0f);
    let bytes_per_block = NIBBLE_BLOCK * matrix.dtype.bits() / 8;
    tile.words.resize(blocks.len() * 32 * TILE_ROWS, 0);
    for (b, block) in blocks.enumerate() {
        for half in 0..TILE_ROWS / 16 {
            let mut planes = [[_mm512_setzero_si512(); 16]; 2];
            for r in 0..16 {
                let bytes = row_bytes(matrix, first_row, n_rows, half * 16 + r);
                prefetch_next_tile(bytes, block * bytes_per_block, bytes_per_block);
                if nibbles {
                    let codes = load64(bytes, block * 64);
                    planes[0][r] = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low));
                    planes[1][r] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low));
                } else {
                    planes[0][r] = load64(bytes, block * 128);
                    planes[1][r] = load64(bytes, block * 128 + 64);
                }
            }
            for (p, plane) in planes.iter_mut().enumerate() {
                transpose(plane);
                for (i, words) in plane.iter().enumerate() {
                    let start = ((b * 32 + p * 16 + i) * 2 + half) * 16;
                    // SAFETY: sized above.
                    unsafe { _mm512_storeu_si512(tile.words.as_mut_ptr().add(start).cast(), *words) };
                }
            }
        }
    }
}

/// Tile of codes as bf16: for each block 64 steps of `[TILE_ROWS]` words of two. 4-bit codes come in four planes, as in
/// [`Activations::nibble_bf16`]; others in order.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pack_bf16(
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    blocks: std::ops::Range<usize>,
    nibbles: bool,
    tile: &mut Tile,
) {
    let is_mx = matrix.dtype == DType::Mxfp4;
    let mut table = [0u16; 32];
    for (i, value) in table.iter_mut().enumerate() {
        *value = half::bf16::from_f32(if is_mx { E2M1[i % 16] } else { (i % 16) as f32 }).to_bits();
    }
    // SAFETY: 64 bytes.
    let table = unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
    let bytes_per_block = NIBBLE_BLOCK * matrix.dtype.bits() / 8;
    tile.words.resize(blocks.len() * 64 * TILE_ROWS, 0);
    for (b, block) in blocks.enumerate() {
        for half in 0..TILE_ROWS / 16 {
            let mut planes = [[_mm512_setzero_si512(); 16]; 4];
            for r in 0..16 {
                let bytes = row_bytes(matrix, first_row, n_rows, half * 16 + r);
                prefetch_next_tile(bytes, block * bytes_per_block, bytes_per_block);
                let mut codes = load64(bytes, if nibbles { block * 64 } else { 0 });
                for (p, plane) in planes.iter_mut().enumerate() {
                    plane[r] = if nibbles {
                        let values = _mm512_permutexvar_epi16(codes, table);
                        codes = _mm512_srli_epi16::<4>(codes);
                        values
                    } else if matrix.dtype == DType::BF16 {
                        load64(bytes, block * 256 + p * 64)
                    } else {
                        let wide = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(load64(bytes, block * 128 + p * 32)));
                        let first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(wide));
                        let second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(wide));
                        let pair = _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(second), _mm512_cvtepi32_ps(first));
                        // SAFETY: both types are 512 bits.
                        unsafe { std::mem::transmute::<__m512bh, __m512i>(pair) }
                    };
                }
            }
            for (p, plane) in planes.iter_mut().enumerate() {
                transpose(plane);
                for (i, words) in plane.iter().enumerate() {
                    let start = ((b * 64 + p * 16 + i) * 2 + half) * 16;
                    // SAFETY: sized above.
                    unsafe { _mm512_storeu_si512(tile.words.as_mut_ptr().add(start).cast(), *words) };
                }
            }
        }
    }
}

/// Tile of decoded values: for each column `[TILE_ROWS]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn pack_f32(cols: usize, blocks: std::ops::Range<usize>, tile: &mut Tile) {
    let pitch = cols.next_multiple_of(16);
    let (first, last) = (blocks.start * NIBBLE_BLOCK, (blocks.end * NIBBLE_BLOCK).min(pitch));
    tile.words.resize((last - first) * TILE_ROWS, 0);
    for k in (first..last).step_by(16) {
        for half in 0..TILE_ROWS / 16 {
            let mut values = [_mm512_setzero_si512(); 16];
            for (r, values) in values.iter_mut().enumerate() {
                let start = (half * 16 + r) * pitch + k;
                // SAFETY: `rows` holds TILE_ROWS rows of `pitch` values.
                *values = unsafe { _mm512_loadu_si512(tile.rows.as_ptr().add(start).cast()) };
            }
            transpose(&mut values);
            for (i, values) in values.iter().enumerate() {
                let start = ((k - first + i) * 2 + half) * 16;
                // SAFETY: sized above.
                unsafe { _mm512_storeu_si512(tile.words.as_mut_ptr().add(start).cast(), *values) };
            }
        }
    }
}

/// Scales and biases of the tile, `[groups, TILE_ROWS]`; groups beyond the row's end get 0.
fn pack_scales(
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    blocks: std::ops::Range<usize>,
    tile: &mut Tile,
) {
    let group = scale_group(matrix.dtype);
    let per_block = NIBBLE_BLOCK / group;
    let (first, n) = (blocks.start * per_block, blocks.len() * per_block);
    tile.scales.clear();
    tile.scales.resize(n * TILE_ROWS, 0.0);
    tile.biases.clear();
    let per_row = if matrix.dtype.is_quantized() { matrix.cols / group } else { 0 };
    match matrix.dtype {
        DType::Affine { params, .. } => {
            tile.biases.resize(n * TILE_ROWS, 0.0);
            for row in 0..n_rows {
                for g in 0..n.min(per_row - first) {
                    let index = (first_row + row) * per_row + first + g;
                    tile.scales[g * TILE_ROWS + row] = params.read(matrix.scales, index);
                    tile.biases[g * TILE_ROWS + row] = params.read(matrix.biases, index);
                }
            }
        }
        DType::Mxfp4 => {
            for row in 0..n_rows {
                let start = (first_row + row) * per_row + first;
                for (g, byte) in matrix.scales[start..start + n.min(per_row - first)].iter().enumerate() {
                    tile.scales[g * TILE_ROWS + row] = e8m0(*byte);
                }
            }
        }
        _ => {
            debug_assert_eq!(matrix.dtype, DType::Float(Float::BF16));
            tile.scales.fill(1.0);
        }
    }
}

/// Calls `$kernel::<T>` for the number of tokens in `$tokens`.
macro_rules! with_token_count {
    ($tokens:expr, $kernel:ident ( $($arg:expr),* )) => {
        match $tokens.len() {
            1 => $kernel::<1>($($arg),*),
            2 => $kernel::<2>($($arg),*),
            3 => $kernel::<3>($($arg),*),
            4 => $kernel::<4>($($arg),*),
            5 => $kernel::<5>($($arg),*),
            _ => $kernel::<6>($($arg),*),
        }
    };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int8_tokens(
    dtype: DType,
    tile: &Tile,
    blocks: std::ops::Range<usize>,
    nibbles: bool,
    x: &Activations,
    tokens: &[u32],
    sums: &mut [f32],
) {
    // SAFETY: the caller's promises.
    unsafe { with_token_count!(tokens, int8_kernel(dtype, tile, blocks, nibbles, x, tokens, sums)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int8_kernel<const T: usize>(
    dtype: DType,
    tile: &Tile,
    blocks: std::ops::Range<usize>,
    nibbles: bool,
    x: &Activations,
    tokens: &[u32],
    sums: &mut [f32],
) {
    let group = scale_group(dtype);
    let per_scale = group / Q8_GROUP;
    let is_mx = dtype == DType::Mxfp4;
    let unit = if is_mx { 0.5 } else { 1.0 };
    let offset = if is_mx { -12 } else { 0 };
    let mut q: [&[i8]; T] = [&[]; T];
    let mut scales: [&[f32]; T] = [&[]; T];
    let mut group_sums: [&[i32]; T] = [&[]; T];
    let mut bias_sums: [&[f32]; T] = [&[]; T];
    for t in 0..T {
        let token = tokens[t] as usize;
        q[t] = if nibbles { x.nibble_q8(token).0 } else { x.byte_q8(token).0 };
        (scales[t], group_sums[t]) = x.q8_groups(token);
        if !tile.biases.is_empty() {
            bias_sums[t] = x.sums(token, group, true);
        }
        assert!(scales[t].len() * Q8_GROUP <= q[t].len() && group_sums[t].len() == scales[0].len());
    }
    assert!(sums.len() >= T * TILE_ROWS && tile.words.len() >= blocks.len() * 32 * TILE_ROWS);
    assert!(tile.scales.len() * group >= blocks.len() * NIBBLE_BLOCK * TILE_ROWS);
    let n_groups = scales[0].len();
    // SAFETY: all reads below are inside the lengths that were just checked.
    unsafe {
        let mut total = [[_mm512_setzero_ps(); 2]; T];
        for (t, total) in total.iter_mut().enumerate() {
            total[0] = _mm512_loadu_ps(sums.as_ptr().add(t * TILE_ROWS));
            total[1] = _mm512_loadu_ps(sums.as_ptr().add(t * TILE_ROWS + 16));
        }
        for (b, block) in blocks.enumerate() {
            for g in 0..4 {
                let index = block * 4 + g;
                if index >= n_groups {
                    break;
                }
                let mut dot = [[_mm512_setzero_si512(); 2]; T];
                if offset != 0 {
                    for t in 0..T {
                        let start = _mm512_set1_epi32(offset * *group_sums[t].get_unchecked(index));
                        dot[t] = [start, start];
                    }
                }
                for i in 0..8 {
                    // The words of a group: four of each plane of nibbles, or eight in a row.
                    let step = if nibbles { (i / 4) * 16 + g * 4 + i % 4 } else { g * 8 + i };
                    let words = tile.words.as_ptr().add((b * 32 + step) * TILE_ROWS);
                    let (w0, w1) = (_mm512_loadu_si512(words.cast()), _mm512_loadu_si512(words.add(16).cast()));
                    for t in 0..T {
                        let word = q[t].as_ptr().add(block * NIBBLE_BLOCK + step * 4).cast::<i32>().read_unaligned();
                        let word = _mm512_set1_epi32(word);
                        dot[t][0] = _mm512_dpbusd_epi32(dot[t][0], w0, word);
                        dot[t][1] = _mm512_dpbusd_epi32(dot[t][1], w1, word);
                    }
                }
                let scale_row = tile.scales.as_ptr().add((b * 4 + g) / per_scale * TILE_ROWS);
                let (s0, s1) = (_mm512_loadu_ps(scale_row), _mm512_loadu_ps(scale_row.add(16)));
                for t in 0..T {
                    let scale = _mm512_set1_ps(*scales[t].get_unchecked(index) * unit);
                    total[t][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][0]), _mm512_mul_ps(s0, scale), total[t][0]);
                    total[t][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][1]), _mm512_mul_ps(s1, scale), total[t][1]);
                }
                if !tile.biases.is_empty() && (index + 1) % per_scale == 0 {
                    let bias_row = tile.biases.as_ptr().add((b * 4 + g) / per_scale * TILE_ROWS);
                    let (b0, b1) = (_mm512_loadu_ps(bias_row), _mm512_loadu_ps(bias_row.add(16)));
                    for t in 0..T {
                        let sum = _mm512_set1_ps(bias_sums[t][index / per_scale]);
                        total[t][0] = _mm512_fmadd_ps(b0, sum, total[t][0]);
                        total[t][1] = _mm512_fmadd_ps(b1, sum, total[t][1]);
                    }
                }
            }
        }
        for (t, total) in total.iter().enumerate() {
            _mm512_storeu_ps(sums.as_mut_ptr().add(t * TILE_ROWS), total[0]);
            _mm512_storeu_ps(sums.as_mut_ptr().add(t * TILE_ROWS + 16), total[1]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn bf16_tokens(
    dtype: DType,
    tile: &Tile,
    blocks: std::ops::Range<usize>,
    nibbles: bool,
    x: &Activations,
    tokens: &[u32],
    sums: &mut [f32],
) {
    // SAFETY: the caller's promises.
    unsafe { with_token_count!(tokens, bf16_kernel(dtype, tile, blocks, nibbles, x, tokens, sums)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn bf16_kernel<const T: usize>(
    dtype: DType,
    tile: &Tile,
    blocks: std::ops::Range<usize>,
    nibbles: bool,
    x: &Activations,
    tokens: &[u32],
    sums: &mut [f32],
) {
    let group = scale_group(dtype);
    let per_block = NIBBLE_BLOCK / group;
    let mut values: [&[u16]; T] = [&[]; T];
    let mut bias_sums: [&[f32]; T] = [&[]; T];
    for t in 0..T {
        let token = tokens[t] as usize;
        values[t] = if nibbles { x.nibble_bf16(token) } else { x.plain_bf16(token) };
        if !tile.biases.is_empty() {
            bias_sums[t] = x.sums(token, group, false);
        }
        assert!(values[t].len() >= blocks.end * NIBBLE_BLOCK);
    }
    assert!(sums.len() >= T * TILE_ROWS && tile.words.len() >= blocks.len() * 64 * TILE_ROWS);
    assert!(tile.scales.len() * group >= blocks.len() * NIBBLE_BLOCK * TILE_ROWS);
    // SAFETY: all reads below are inside the lengths that were just checked; the casts keep 512 bits.
    unsafe {
        let bf16 = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
        let mut total = [[_mm512_setzero_ps(); 2]; T];
        for (t, total) in total.iter_mut().enumerate() {
            total[0] = _mm512_loadu_ps(sums.as_ptr().add(t * TILE_ROWS));
            total[1] = _mm512_loadu_ps(sums.as_ptr().add(t * TILE_ROWS + 16));
        }
        for (b, block) in blocks.enumerate() {
            for g in 0..per_block {
                let mut dot = [[_mm512_setzero_ps(); 2]; T];
                for i in 0..group / 2 {
                    // The words of a group: some of each of four planes of nibbles, or all in a row.
                    let step = if nibbles {
                        let n = group / 8;
                        i / n * 16 + g * n + i % n
                    } else {
                        g * (group / 2) + i
                    };
                    let words = tile.words.as_ptr().add((b * 64 + step) * TILE_ROWS);
                    let w0 = bf16(_mm512_loadu_si512(words.cast()));
                    let w1 = bf16(_mm512_loadu_si512(words.add(16).cast()));
                    for t in 0..T {
                        let word =
                            values[t].as_ptr().add(block * NIBBLE_BLOCK + step * 2).cast::<i32>().read_unaligned();
                        let word = bf16(_mm512_set1_epi32(word));
                        dot[t][0] = _mm512_dpbf16_ps(dot[t][0], w0, word);
                        dot[t][1] = _mm512_dpbf16_ps(dot[t][1], w1, word);
                    }
                }
                let scale_row = tile.scales.as_ptr().add((b * per_block + g) * TILE_ROWS);
                let (s0, s1) = (_mm512_loadu_ps(scale_row), _mm512_loadu_ps(scale_row.add(16)));
                for t in 0..T {
                    total[t][0] = _mm512_fmadd_ps(dot[t][0], s0, total[t][0]);
                    total[t][1] = _mm512_fmadd_ps(dot[t][1], s1, total[t][1]);
                }
                if !tile.biases.is_empty() {
                    let bias_row = tile.biases.as_ptr().add((b * per_block + g) * TILE_ROWS);
                    let (b0, b1) = (_mm512_loadu_ps(bias_row), _mm512_loadu_ps(bias_row.add(16)));
                    for t in 0..T {
                        let sum = _mm512_set1_ps(bias_sums[t].get(block * per_block + g).copied().unwrap_or(0.0));
                        total[t][0] = _mm512_fmadd_ps(b0, sum, total[t][0]);
                        total[t][1] = _mm512_fmadd_ps(b1, sum, total[t][1]);
                    }
                }
            }
        }
        for (t, total) in total.iter().enumerate() {
            _mm512_storeu_ps(sums.as_mut_ptr().add(t * TILE_ROWS), total[0]);
            _mm512_storeu_ps(sums.as_mut_ptr().add(t * TILE_ROWS + 16), total[1]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_tokens(tile: &Tile, first: usize, cols: usize, x: &Activations, tokens: &[u32], sums: &mut [f32]) {
    // SAFETY: the caller's promises.
    unsafe { with_token_count!(tokens, f32_kernel(tile, first, cols, x, tokens, sums)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_kernel<const T: usize>(
    tile: &Tile,
    first: usize,
    cols: usize,
    x: &Activations,
    tokens: &[u32],
    sums: &mut [f32],
) {
    let n = (cols - first).min(TILE_BLOCKS * NIBBLE_BLOCK);
    let mut values: [&[f32]; T] = [&[]; T];
    for t in 0..T {
        values[t] = &x.row(tokens[t] as usize)[first..first + n];
    }
    assert!(sums.len() >= T * TILE_ROWS && tile.words.len() >= n * TILE_ROWS);
    // SAFETY: all reads below are inside the lengths that were just checked.
    unsafe {
        let mut total = [[_mm512_setzero_ps(); 2]; T];
        for (t, total) in total.iter_mut().enumerate() {
            total[0] = _mm512_loadu_ps(sums.as_ptr().add(t * TILE_ROWS));
            total[1] = _mm512_loadu_ps(sums.as_ptr().add(t * TILE_ROWS + 16));
        }
        for k in 0..n {
            let words = tile.words.as_ptr().add(k * TILE_ROWS).cast::<f32>();
            let (w0, w1) = (_mm512_loadu_ps(words), _mm512_loadu_ps(words.add(16)));
            for t in 0..T {
                let value = _mm512_set1_ps(*values[t].get_unchecked(k));
                total[t][0] = _mm512_fmadd_ps(w0, value, total[t][0]);
                total[t][1] = _mm512_fmadd_ps(w1, value, total[t][1]);
            }
        }
        for (t, total) in total.iter().enumerate() {
            _mm512_storeu_ps(sums.as_mut_ptr().add(t * TILE_ROWS), total[0]);
            _mm512_storeu_ps(sums.as_mut_ptr().add(t * TILE_ROWS + 16), total[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_swaps_rows_and_columns() {
        if !Isa::available().contains(&Isa::Avx512) {
            return;
        }
        let input: Vec<i32> = (0..256).collect();
        let mut output = vec![0i32; 256];
        // SAFETY: AVX-512 is there, and both arrays hold 256 words.
        unsafe {
            let mut v = [_mm512_setzero_si512(); 16];
            for (r, v) in v.iter_mut().enumerate() {
                *v = _mm512_loadu_si512(input.as_ptr().add(16 * r).cast());
            }
            transpose(&mut v);
            for (r, v) in v.iter().enumerate() {
                _mm512_storeu_si512(output.as_mut_ptr().add(16 * r).cast(), *v);
            }
        }
        for r in 0..16 {
            for c in 0..16 {
                assert_eq!(output[r * 16 + c], (c * 16 + r) as i32, "{r} {c}");
            }
        }
    }
}
