//! AVX-512: a step takes 16 (f32) or 64 (int8) columns of each of up to four rows.

use std::arch::x86_64::*;

use tandem_core::DType;

use super::super::activations::BYTE_BLOCK;
use super::super::affine::{expand_scales, prefetch_next_rows, scales_pitch, spread};
use super::{ROWS, Rows};
use crate::scratch::with_scratch;

impl Rows<'_> {
    fn dtype(&self) -> DType {
        DType::Affine { bits: 8, group_size: self.group_size as u16, params: self.params }
    }
}

/// f32 products.
///
/// # Safety
/// The processor must have AVX-512.
pub(super) unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    with_scratch(ROWS * scales_pitch(rows.dtype(), rows.cols), |scales| {
        // SAFETY: the caller's promise.
        unsafe {
            expand_scales(rows.dtype(), rows.cols, &rows.scales, scales);
            f32_codes(rows, scales, x, out);
        }
    });
}

/// Integer products per group of 32; `x` is integers and lane scales.
///
/// # Safety
/// The processor must have AVX512-VNNI.
pub(super) unsafe fn int8_kernel(rows: &Rows<'_>, x: (&[i8], &[f32]), out: &mut [f32; ROWS]) {
    with_scratch(ROWS * scales_pitch(rows.dtype(), rows.cols), |scales| {
        // SAFETY: the caller's promise.
        unsafe {
            expand_scales(rows.dtype(), rows.cols, &rows.scales, scales);
            if rows.group_size == 32 {
                int8_codes::<2>(rows, scales, x.0, x.1, out);
            } else {
                int8_codes::<1>(rows, scales, x.0, x.1, out);
            }
        }
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_codes(rows: &Rows<'_>, scales: &[f32], x: &[f32], out: &mut [f32; ROWS]) {
    let (group_size, pitch) = (rows.group_size, scales_pitch(rows.dtype(), rows.cols));
    assert!(x.len() >= rows.cols && scales.len() >= ROWS * pitch);
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for group in 0..rows.cols / group_size {
        let mut partial = [_mm512_setzero_ps(); ROWS];
        let start = group * group_size;
        for k in (start..start + group_size).step_by(64) {
            for r in 0..ROWS {
                prefetch_next_rows(rows.codes[r], k);
            }
        }
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
unsafe fn int8_codes<const PARTS: usize>(
    rows: &Rows<'_>,
    scales: &[f32],
    x: &[i8],
    x_scales: &[f32],
    out: &mut [f32; ROWS],
) {
    let (group_size, pitch) = (rows.group_size, scales_pitch(rows.dtype(), rows.cols));
    let n_blocks = rows.cols.div_ceil(BYTE_BLOCK);
    assert!(x.len() >= n_blocks * BYTE_BLOCK && x_scales.len() >= n_blocks * 16);
    assert!(scales.len() >= ROWS * pitch);
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        let left = rows.cols - block * BYTE_BLOCK;
        let mask = if left >= BYTE_BLOCK { u64::MAX } else { (1u64 << left) - 1 };
        // SAFETY: within the block, whose lengths were checked above; the mask covers the codes that are there.
        unsafe {
            let q = _mm512_loadu_si512(x.as_ptr().add(block * BYTE_BLOCK).cast());
            let x_scale = _mm512_loadu_ps(x_scales.as_ptr().add(block * 16));
            for r in 0..ROWS {
                prefetch_next_rows(rows.codes[r], block * BYTE_BLOCK);
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
