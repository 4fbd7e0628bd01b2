//! AVX-512: a step takes 16 (f32) or 64 (int8) columns of each of up to four rows.

use std::arch::x86_64::*;

use super::super::activations::BYTE_BLOCK;
use super::super::affine::spread_params;
use super::{ROWS, Rows};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
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
pub(super) unsafe fn int8_kernel(rows: &Rows<'_>, (x, scales): (&[i8], &[f32]), out: &mut [f32; ROWS]) {
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
