//! Products of 4-bit matrices (mxfp4, affine 4) with one row of activations, on AVX-512.
//!
//! A step reads 64 packed bytes, 128 codes, of each of up to four rows. Codes become values by a table look-up in a
//! register; all lanes that a group's codes fall into get the group's scale, so a scale costs one multiplication per
//! step. Activations come in the order that shifting the packed words yields (see [`super::activations`]).

#![allow(unsafe_code)]
// Rows, tokens and heads run over several arrays at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use tandem_core::DType;
use tandem_core::quant::PackedView;
use tandem_core::quant::minifloat::E2M1;

use super::activations::{Activations, NIBBLE_BLOCK};
use super::rows::{ROWS, Rows, spread};
use crate::scratch::with_scratch;

/// Calls `$kernel::<scales per block>`.
macro_rules! with_parts {
    ($rows:expr, $kernel:ident ( $($arg:expr),* )) => {
        match NIBBLE_BLOCK / $rows.dtype.group_size() {
            1 => $kernel::<1>($($arg),*),
            2 => $kernel::<2>($($arg),*),
            _ => $kernel::<4>($($arg),*),
        }
    };
}

/// f32 products. `out[i] = matrix[first_row + i] . x[token]` for `n_rows` (at most 4) rows.
pub(crate) fn f32_rows(
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    token: usize,
    out: &mut [f32; ROWS],
) {
    let rows = Rows::new(matrix, first_row, n_rows);
    with_scratch(rows.scales_len(), |scales| {
        rows.expand(scales);
        // SAFETY: the kernel was chosen because the processor has AVX-512; `Rows` checked the lengths.
        unsafe { with_parts!(rows, f32_kernel(&rows, scales, x.nibble_f32(token), out)) };
    });
    rows.add_biases(|group| x.sums(token, group, false), out);
}

/// bf16 products, f32 sums; mxfp4 only.
pub(crate) fn bf16_rows(
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    token: usize,
    out: &mut [f32; ROWS],
) {
    let rows = Rows::new(matrix, first_row, n_rows);
    with_scratch(rows.scales_len(), |scales| {
        rows.expand(scales);
        // SAFETY: as in `f32_rows`, with AVX512-BF16.
        unsafe { bf16_kernel(&rows, scales, x.nibble_bf16(token), out) };
    });
}

/// Integer products per group of 32.
pub(crate) fn int8_rows(
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    token: usize,
    out: &mut [f32; ROWS],
) {
    let rows = Rows::new(matrix, first_row, n_rows);
    let (q, x_scales, sums) = x.nibble_q8(token);
    with_scratch(rows.scales_len(), |scales| {
        rows.expand(scales);
        // SAFETY: as in `f32_rows`, with VNNI.
        unsafe { with_parts!(rows, int8_kernel(&rows, scales, q, x_scales, sums, out)) };
    });
    rows.add_biases(|group| x.sums(token, group, true), out);
}

/// Values of the 16 codes.
fn table(dtype: DType) -> [f32; 16] {
    match dtype {
        DType::Affine { .. } => std::array::from_fn(|i| i as f32),
        _ => E2M1,
    }
}

/// 64 bytes of codes, zeros (code 0) beyond the row's end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn load(codes: &[u8], block: usize) -> __m512i {
    let codes = &codes[block * (NIBBLE_BLOCK / 2)..];
    if codes.len() >= 64 {
        // SAFETY: 64 bytes are there.
        unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
    } else {
        // SAFETY: the mask covers the bytes that are there.
        unsafe { _mm512_maskz_loadu_epi8((1u64 << codes.len()) - 1, codes.as_ptr().cast()) }
    }
}

/// Blocks of a row; checks that activations and scales cover them.
fn n_blocks(rows: &Rows<'_>, x_len: usize, scales: &[f32]) -> usize {
    let n = rows.cols.div_ceil(NIBBLE_BLOCK);
    assert!(x_len >= n * NIBBLE_BLOCK && scales.len() >= rows.scales_len());
    n
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_kernel<const PARTS: usize>(rows: &Rows<'_>, scales: &[f32], x: &[f32], out: &mut [f32; ROWS]) {
    let (n_blocks, pitch) = (n_blocks(rows, x.len(), scales), rows.scales_pitch());
    // SAFETY: 16 floats.
    let table = unsafe { _mm512_loadu_ps(table(rows.dtype).as_ptr()) };
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        let mut codes = [_mm512_setzero_si512(); ROWS];
        for (r, codes) in codes.iter_mut().enumerate() {
            *codes = load(rows.codes[r], block);
        }
        let mut partial = [_mm512_setzero_ps(); ROWS];
        for j in 0..8 {
            // SAFETY: within the block, whose length was checked above.
            let x = unsafe { _mm512_loadu_ps(x.as_ptr().add(block * NIBBLE_BLOCK + 16 * j)) };
            for r in 0..ROWS {
                // The permutation reads the low four bits of each lane only.
                partial[r] = _mm512_fmadd_ps(_mm512_permutexvar_ps(codes[r], table), x, partial[r]);
                codes[r] = _mm512_srli_epi32::<4>(codes[r]);
            }
        }
        for r in 0..ROWS {
            // SAFETY: scales have four readable floats for every block.
            let scale = unsafe { spread::<PARTS>(scales.as_ptr().add(r * pitch + block * PARTS)) };
            sums[r] = _mm512_fmadd_ps(partial[r], scale, sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn bf16_kernel(rows: &Rows<'_>, scales: &[f32], x: &[u16], out: &mut [f32; ROWS]) {
    let (n_blocks, pitch) = (n_blocks(rows, x.len(), scales), rows.scales_pitch());
    // Twice the 16 values: the permutation reads five bits, of which the fifth belongs to the next code.
    let values = table(rows.dtype);
    let mut table = [0u16; 32];
    for (i, entry) in table.iter_mut().enumerate() {
        *entry = half::bf16::from_f32(values[i % 16]).to_bits();
    }
    // SAFETY: 64 bytes.
    let table = unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        let mut codes = [_mm512_setzero_si512(); ROWS];
        for (r, codes) in codes.iter_mut().enumerate() {
            *codes = load(rows.codes[r], block);
        }
        let mut partial = [_mm512_setzero_ps(); ROWS];
        for j in 0..4 {
            // SAFETY: within the block, whose length was checked above; the type is 64 bytes of bf16.
            let x: __m512bh = unsafe {
                std::mem::transmute(_mm512_loadu_si512(x.as_ptr().add(block * NIBBLE_BLOCK + 32 * j).cast()))
            };
            for r in 0..ROWS {
                let values = _mm512_permutexvar_epi16(codes[r], table);
                // SAFETY: both types are 512 bits of bf16.
                partial[r] =
                    _mm512_dpbf16_ps(partial[r], unsafe { std::mem::transmute::<__m512i, __m512bh>(values) }, x);
                codes[r] = _mm512_srli_epi16::<4>(codes[r]);
            }
        }
        for r in 0..ROWS {
            // SAFETY: scales have four readable floats for every block.
            let scale = unsafe { spread::<4>(scales.as_ptr().add(r * pitch + block * 4)) };
            sums[r] = _mm512_fmadd_ps(partial[r], scale, sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}

/// Codes become unsigned bytes: affine ones as they are, e2m1 as twice the value plus 12.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int8_kernel<const PARTS: usize>(
    rows: &Rows<'_>,
    scales: &[f32],
    x: &[i8],
    x_scales: &[f32],
    lane_sums: &[i32],
    out: &mut [f32; ROWS],
) {
    let (n_blocks, pitch) = (n_blocks(rows, x.len(), scales), rows.scales_pitch());
    assert!(x_scales.len() >= n_blocks * 16 && lane_sums.len() >= n_blocks * 16);
    let is_mx = rows.dtype == DType::Mxfp4;
    let offset = if is_mx { 12 } else { 0 };
    let unit = if is_mx { 2.0 } else { 1.0 };
    let values = table(rows.dtype);
    let mut table = [0i8; 16];
    for (entry, value) in table.iter_mut().zip(values) {
        *entry = (value * unit) as i8 + offset;
    }
    // SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let low = _mm512_set1_epi8(0x0f);
    let offset = _mm512_set1_epi32(-i32::from(offset));
    let unit = _mm512_set1_ps(1.0 / unit);
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        // SAFETY: within the block, whose lengths were checked above.
        let (x_low, x_high, x_scale, lane_sum) = unsafe {
            (
                _mm512_loadu_si512(x.as_ptr().add(block * NIBBLE_BLOCK).cast()),
                _mm512_loadu_si512(x.as_ptr().add(block * NIBBLE_BLOCK + 64).cast()),
                _mm512_mul_ps(unit, _mm512_loadu_ps(x_scales.as_ptr().add(block * 16))),
                _mm512_loadu_si512(lane_sums.as_ptr().add(block * 16).cast()),
            )
        };
        let start = _mm512_mullo_epi32(lane_sum, offset);
        for r in 0..ROWS {
            let codes = load(rows.codes[r], block);
            let even = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low));
            let odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low));
            let dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, even, x_low), odd, x_high);
            // SAFETY: scales have four readable floats for every block.
            let scale = unsafe { spread::<PARTS>(scales.as_ptr().add(r * pitch + block * PARTS)) };
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(x_scale, scale), sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}
