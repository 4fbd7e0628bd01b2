//! Scales and biases of affine matrices in vector registers.

#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use tandem_core::Float;

use crate::isa::Isa;

#[cfg(target_arch = "x86_64")]
/// Sixteen params of type `float` from `p`.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn load_params(float: Float, p: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match float {
            Float::F32 => _mm512_loadu_ps(p.cast()),
            Float::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
            Float::BF16 => {
                let half = _mm256_loadu_si256(p.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            }
        }
    }
}

/// `sum_g biases[g] * sums[g]`
pub(crate) fn bias_dot(isa: Isa, float: Float, biases: &[u8], sums: &[f32]) -> f32 {
    assert!(biases.len() >= sums.len() * float.bytes());
    match isa {
        // SAFETY: an `Isa` other than Scalar only exists on processors that have it, and one with AVX-512 has AVX2 too;
        // the lengths were just checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => unsafe { bias_avx2(float, biases, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { bias_neon(float, biases, sums) },
        _ => bias_scalar(float, biases, 0, sums),
    }
}

/// Sum over the groups from `first` on; `sums` are theirs.
fn bias_scalar(float: Float, biases: &[u8], first: usize, sums: &[f32]) -> f32 {
    sums.iter().enumerate().map(|(i, sum)| float.read(biases, first + i) * sum).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bias_avx2(float: Float, biases: &[u8], sums: &[f32]) -> f32 {
    let mut total = _mm256_setzero_ps();
    let (chunks, rest) = sums.as_chunks::<8>();
    for (chunk, sums) in chunks.iter().enumerate() {
        // SAFETY: there is a bias for each sum.
        unsafe {
            let p = biases.as_ptr().add(chunk * 8 * float.bytes());
            let bias = match float {
                Float::F32 => _mm256_loadu_ps(p.cast()),
                Float::F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                Float::BF16 => {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
                }
            };
            total = _mm256_fmadd_ps(bias, _mm256_loadu_ps(sums.as_ptr()), total);
        }
    }
    super::avx2::reduce(total) + bias_scalar(float, biases, 8 * chunks.len(), rest)
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn bias_neon(float: Float, biases: &[u8], sums: &[f32]) -> f32 {
    let mut total = vdupq_n_f32(0.0);
    let (chunks, rest) = sums.as_chunks::<4>();
    for (chunk, sums) in chunks.iter().enumerate() {
        // SAFETY: there is a bias for each sum.
        unsafe {
            let bias = super::neon::params4(float, biases.as_ptr().add(chunk * 4 * float.bytes()));
            total = vfmaq_f32(total, bias, vld1q_f32(sums.as_ptr()));
        }
    }
    vaddvq_f32(total) + bias_scalar(float, biases, 4 * chunks.len(), rest)
}
