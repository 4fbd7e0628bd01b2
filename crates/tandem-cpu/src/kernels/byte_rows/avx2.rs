//! AVX2: a step takes 8 (f32) or 32 (int8) columns of each of up to four rows.

use std::arch::x86_64::*;

use super::super::activations::Q8_GROUP;
use super::super::avx2::{param, reduce};
use super::{ROWS, Rows};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    let (group_size, params) = rows.affine();
    assert!(x.len() >= rows.cols);
    let mut sums = [_mm256_setzero_ps(); ROWS];
    for group in 0..rows.cols / group_size {
        let mut partial = [_mm256_setzero_ps(); ROWS];
        let start = group * group_size;
        for k in (start..start + group_size).step_by(8) {
            // SAFETY: k + 8 <= cols, and every row has cols codes.
            unsafe {
                let x = _mm256_loadu_ps(x.as_ptr().add(k));
                for r in 0..ROWS {
                    let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(rows.codes[r].as_ptr().add(k).cast()));
                    partial[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), x, partial[r]);
                }
            }
        }
        for r in 0..ROWS {
            let scale = _mm256_set1_ps(param(params, rows.scales[r], group));
            sums[r] = _mm256_fmadd_ps(partial[r], scale, sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = reduce(sum);
    }
}

/// Codes and activations are widened to 16 bits: sums of two products of bytes do not fit there (`maddubs` saturates).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn int8_kernel(rows: &Rows<'_>, x: &[i8], group_scales: &[f32], out: &mut [f32; ROWS]) {
    let (group_size, params) = rows.affine();
    let n_groups = rows.cols / Q8_GROUP;
    assert!(x.len() >= rows.cols && group_scales.len() >= n_groups);
    let shift = group_size.trailing_zeros() - Q8_GROUP.trailing_zeros();
    let mut sums = [_mm256_setzero_ps(); ROWS];
    for (group, x_scale) in group_scales[..n_groups].iter().enumerate() {
        let k = group * Q8_GROUP;
        // SAFETY: k + 32 <= cols, and every row has cols codes.
        unsafe {
            let first = _mm256_cvtepi8_epi16(_mm_loadu_si128(x.as_ptr().add(k).cast()));
            let second = _mm256_cvtepi8_epi16(_mm_loadu_si128(x.as_ptr().add(k + 16).cast()));
            for r in 0..ROWS {
                let codes = rows.codes[r].as_ptr().add(k);
                let dot = _mm256_add_epi32(
                    _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(codes.cast())), first),
                    _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(codes.add(16).cast())), second),
                );
                let scale = _mm256_set1_ps(x_scale * param(params, rows.scales[r], group >> shift));
                sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sums[r]);
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = reduce(sum);
    }
}
