//! What several kernels for AVX2 (with FMA and F16C) share.

use std::arch::x86_64::*;

use tandem_core::Float;

/// Sum of the lanes.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn reduce(v: __m256) -> f32 {
    let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
}

/// Element `index` of a row's scales or biases.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn param(float: Float, params: &[u8], index: usize) -> f32 {
    match float {
        Float::F16 => {
            let bits = u16::from_le_bytes([params[2 * index], params[2 * index + 1]]);
            _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
        }
        _ => float.read(params, index),
    }
}
