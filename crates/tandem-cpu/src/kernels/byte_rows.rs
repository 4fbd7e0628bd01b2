//! Products of affine 8-bit matrices with one row of activations, on AVX-512.
//!
//! `y = sum_g scale_g * (q_g . x_g) + sum_g bias_g * sum(x_g)`: codes are read once, and the second sum needs only the
//! sums of the activations' groups, which all rows share.

#![allow(unsafe_code)]
// Rows, tokens and heads run over several arrays at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use tandem_core::quant::PackedView;

use super::activations::{Activations, BYTE_BLOCK};
use super::rows::{ROWS, Rows, spread};
use crate::scratch::with_scratch;

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
        unsafe { f32_kernel(&rows, scales, x.row(token), out) };
    });
    rows.add_biases(|group| x.sums(token, group, false), out);
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
    let (q, x_scales) = x.byte_q8(token);
    with_scratch(rows.scales_len(), |scales| {
        rows.expand(scales);
        // SAFETY: as in `f32_rows`, with VNNI.
        unsafe {
            if rows.dtype.group_size() == 32 {
                int8_kernel::<2>(&rows, scales, q, x_scales, out);
            } else {
                int8_kernel::<1>(&rows, scales, q, x_scales, out);
            }
        }
    });
    rows.add_biases(|group| x.sums(token, group, true), out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_kernel(rows: &Rows<'_>, scales: &[f32], x: &[f32], out: &mut [f32; ROWS]) {
    let (group_size, pitch) = (rows.dtype.group_size(), rows.scales_pitch());
    assert!(x.len() >= rows.cols && scales.len() >= rows.scales_len());
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for group in 0..rows.cols / group_size {
        let mut partial = [_mm512_setzero_ps(); ROWS];
        let start = group * group_size;
        for k in (start..start + group_size).step_by(16) {
            // SAFETY: k + 16 <= cols, and every row has cols codes.
            unsafe {
                let x = _mm512_loadu_ps(x.as_ptr().add(k));
                for r in 0..ROWS {
                    let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(rows.codes[r].as_ptr().add(k).cast()));
                    partial[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), x, partial[r]);
                }
            }
        }
        for r in 0..ROWS {
            // SAFETY: every row has a scale for every group, and more.
            let scale = unsafe { spread::<1>(scales.as_ptr().add(r * pitch + group)) };
            sums[r] = _mm512_fmadd_ps(partial[r], scale, sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}

/// `PARTS` scales in a block of 64: 2 for groups of 32, else 1.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int8_kernel<const PARTS: usize>(
    rows: &Rows<'_>,
    scales: &[f32],
    x: &[i8],
    x_scales: &[f32],
    out: &mut [f32; ROWS],
) {
    let (group_size, pitch) = (rows.dtype.group_size(), rows.scales_pitch());
    let n_blocks = rows.cols.div_ceil(BYTE_BLOCK);
    assert!(x.len() >= n_blocks * BYTE_BLOCK && x_scales.len() >= n_blocks * 16);
    assert!(scales.len() >= rows.scales_len());
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        let left = rows.cols - block * BYTE_BLOCK;
        let mask = if left >= BYTE_BLOCK { u64::MAX } else { (1u64 << left) - 1 };
        // SAFETY: within the block, whose lengths were checked above; the mask covers the codes that are there.
        unsafe {
            let q = _mm512_loadu_si512(x.as_ptr().add(block * BYTE_BLOCK).cast());
            let x_scale = _mm512_loadu_ps(x_scales.as_ptr().add(block * 16));
            for r in 0..ROWS {
                let codes = _mm512_maskz_loadu_epi8(mask, rows.codes[r].as_ptr().add(block * BYTE_BLOCK).cast());
                let dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, q);
                let scale = spread::<PARTS>(scales.as_ptr().add(r * pitch + block * BYTE_BLOCK / group_size));
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(x_scale, scale), sums[r]);
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}
