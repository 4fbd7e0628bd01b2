//! Products of affine 8-bit matrices with one row of activations, on AVX-512.
//!
//! `y = sum_g scale_g * (q_g . x_g) + sum_g bias_g * sum(x_g)`: codes are read once, and the second sum needs only the
//! sums of the activations' groups, which all rows share.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use tandem_core::quant::PackedView;
use tandem_core::{DType, Float};

use super::activations::{Activations, BYTE_BLOCK};
use super::affine::{bias_dot, spread_params};

const ROWS: usize = 4;

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
    // SAFETY: the kernel was chosen because the processor has AVX-512; `Rows` checked the lengths.
    unsafe { f32_kernel(&rows, x.row(token), out) };
    rows.add_biases(x.sums(token, rows.group_size, false), out);
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
    let (q, scales) = x.byte_q8(token);
    // SAFETY: as in `f32_rows`, with VNNI.
    unsafe { int8_kernel(&rows, q, scales, out) };
    rows.add_biases(x.sums(token, rows.group_size, true), out);
}

/// Up to four rows of an affine 8-bit matrix, lengths checked.
struct Rows<'a> {
    /// Codes of each row; rows beyond `n` repeat the last.
    codes: [&'a [u8]; ROWS],
    scales: [&'a [u8]; ROWS],
    biases: [&'a [u8]; ROWS],
    n: usize,
    cols: usize,
    group_size: usize,
    params: Float,
}

impl<'a> Rows<'a> {
    fn new(matrix: &PackedView<'a>, first_row: usize, n: usize) -> Rows<'a> {
        let DType::Affine { bits: 8, group_size, params } = matrix.dtype else {
            unreachable!("chosen for affine 8-bit matrices only")
        };
        assert!((1..=ROWS).contains(&n) && first_row + n <= matrix.rows && matrix.cols.is_multiple_of(32));
        let row = |bytes: &'a [u8], size: usize, i: usize| {
            let start = (first_row + i.min(n - 1)) * size;
            &bytes[start..start + size]
        };
        let param_bytes = matrix.dtype.scale_bytes(1, matrix.cols);
        Rows {
            codes: std::array::from_fn(|i| row(matrix.weight, matrix.cols, i)),
            scales: std::array::from_fn(|i| row(matrix.scales, param_bytes, i)),
            biases: std::array::from_fn(|i| row(matrix.biases, param_bytes, i)),
            n,
            cols: matrix.cols,
            group_size: group_size as usize,
            params,
        }
    }

    fn add_biases(&self, sums: &[f32], out: &mut [f32; ROWS]) {
        for (out, biases) in out.iter_mut().zip(&self.biases[..self.n]) {
            *out += bias_dot(self.params, biases, sums);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    assert!(x.len() >= rows.cols);
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for group in 0..rows.cols / rows.group_size {
        let mut partial = [_mm512_setzero_ps(); ROWS];
        let start = group * rows.group_size;
        for k in (start..start + rows.group_size).step_by(16) {
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
            let scale = _mm512_set1_ps(rows.params.read(rows.scales[r], group));
            sums[r] = _mm512_fmadd_ps(partial[r], scale, sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int8_kernel(rows: &Rows<'_>, x: &[i8], scales: &[f32], out: &mut [f32; ROWS]) {
    let n_blocks = rows.cols.div_ceil(BYTE_BLOCK);
    assert!(x.len() >= n_blocks * BYTE_BLOCK && scales.len() >= n_blocks * 16);
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        let left = rows.cols - block * BYTE_BLOCK;
        let mask = if left >= BYTE_BLOCK { u64::MAX } else { (1u64 << left) - 1 };
        // SAFETY: within the block, whose lengths were checked above; the mask covers the codes that are there.
        unsafe {
            let q = _mm512_loadu_si512(x.as_ptr().add(block * BYTE_BLOCK).cast());
            let x_scale = _mm512_loadu_ps(scales.as_ptr().add(block * 16));
            for r in 0..ROWS {
                let codes = _mm512_maskz_loadu_epi8(mask, rows.codes[r].as_ptr().add(block * BYTE_BLOCK).cast());
                let dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, q);
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), x_scale);
                let scale = spread_params(rows.params, rows.scales[r], rows.group_size, block, BYTE_BLOCK);
                sums[r] = _mm512_fmadd_ps(scaled, scale, sums[r]);
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}
