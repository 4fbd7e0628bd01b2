//! Scales and biases of affine matrices in vector registers (AVX-512).

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use tandem_core::Float;

/// Scales of the groups in block `block` of `block_size` elements, each over the 32-bit lanes of its elements. Groups
/// beyond the row's end get 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn spread_params(float: Float, params: &[u8], group_size: usize, block: usize, block_size: usize) -> __m512 {
    if group_size >= block_size {
        return _mm512_set1_ps(float.read(params, block * block_size / group_size));
    }
    let per_block = block_size / group_size;
    let n_params = params.len() / float.bytes();
    let mut values = [0.0f32; 4];
    for (i, value) in values.iter_mut().enumerate().take(per_block) {
        let index = block * per_block + i;
        if index < n_params {
            *value = float.read(params, index);
        }
    }
    if per_block == 2 {
        return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(values[0]), _mm512_set1_ps(values[1]));
    }
    let four = _mm_setr_ps(values[0], values[1], values[2], values[3]);
    let index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    _mm512_permutexvar_ps(index, _mm512_castps128_ps512(four))
}

/// `sum_g biases[g] * sums[g]`
pub(crate) fn bias_dot(float: Float, biases: &[u8], sums: &[f32]) -> f32 {
    assert!(biases.len() >= sums.len() * float.bytes());
    // SAFETY: only called by kernels chosen for AVX-512; the lengths were just checked.
    unsafe { bias_kernel(float, biases, sums) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn bias_kernel(float: Float, biases: &[u8], sums: &[f32]) -> f32 {
    let mut total = _mm512_setzero_ps();
    for (chunk, sums) in sums.chunks(16).enumerate() {
        let mask = if sums.len() == 16 { 0xffff } else { (1u16 << sums.len()) - 1 };
        // SAFETY: the mask covers the sums that are there, and there is a bias for each.
        let (bias, sum) = unsafe {
            let p = biases.as_ptr().add(chunk * 16 * float.bytes());
            let bias = match float {
                Float::F32 => _mm512_maskz_loadu_ps(mask, p.cast()),
                Float::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())),
                Float::BF16 => {
                    let half = _mm256_maskz_loadu_epi16(mask, p.cast());
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
                }
            };
            (bias, _mm512_maskz_loadu_ps(mask, sums.as_ptr()))
        };
        total = _mm512_fmadd_ps(bias, sum, total);
    }
    _mm512_reduce_add_ps(total)
}
