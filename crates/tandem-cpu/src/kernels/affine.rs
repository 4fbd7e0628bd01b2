//! Scales and biases of affine matrices in vector registers.

#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use tandem_core::DType;
use tandem_core::Float;

use crate::isa::Isa;

/// Asks for what lies at `offset` of the row four rows on, where the next step of the matrix will read. The processor's
/// own prefetchers stop at every page.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn prefetch_next_rows(row: &[u8], offset: usize) {
    let next = row.as_ptr().wrapping_add(4 * row.len() + offset);
    // SAFETY: a prefetch may name any address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(next.cast()) }
}

/// Distance between rows of expanded scales: whole registers, and one to spare for reads beyond the end.
#[cfg(target_arch = "x86_64")]
pub(crate) fn scales_pitch(dtype: DType, cols: usize) -> usize {
    (cols / dtype.group_size()).next_multiple_of(16) + 16
}

/// Scales of some rows as f32, `[rows, scales_pitch]`, zeros beyond each row's end.
///
/// # Safety
/// The processor must have AVX-512.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn expand_scales(dtype: DType, cols: usize, rows: &[&[u8]], out: &mut [f32]) {
    let pitch = scales_pitch(dtype, cols);
    for (scales, out) in rows.iter().zip(out.chunks_exact_mut(pitch)) {
        out[pitch - 16..].fill(0.0);
        for offset in (0..scales.len()).step_by(64) {
            prefetch_next_rows(scales, offset);
        }
        // SAFETY: the caller's promise; `out` has whole registers for all scales.
        unsafe {
            match dtype {
                DType::Affine { params, .. } => expand_params(params, scales, out),
                _ => expand_e8m0(scales, out),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
/// The scales of one block over the 32-bit lanes of its codes: 1, 2 or 4 equal parts.
///
/// # Safety
/// `scales` must point to 4 readable floats.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(crate) unsafe fn spread<const PARTS: usize>(scales: *const f32) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match PARTS {
            1 => _mm512_set1_ps(*scales),
            2 => {
                let pair = _mm512_castpd_ps(_mm512_set1_pd(scales.cast::<f64>().read_unaligned()));
                _mm512_permutevar_ps(pair, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1))
            }
            _ => {
                let four = _mm512_broadcast_f32x4(_mm_loadu_ps(scales));
                _mm512_permutevar_ps(four, _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3))
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
/// Sixteen params of type `float` from `p`, as many as the mask names.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn load_params(float: Float, p: *const u8, mask: u16) -> __m512 {
    // SAFETY: the caller has the params that the mask names.
    unsafe {
        match float {
            Float::F32 => _mm512_maskz_loadu_ps(mask, p.cast()),
            Float::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())),
            Float::BF16 => {
                let half = _mm256_maskz_loadu_epi16(mask, p.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn mask(n: usize) -> u16 {
    if n >= 16 { u16::MAX } else { (1 << n) - 1 }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn expand_params(float: Float, params: &[u8], out: &mut [f32]) {
    let n = params.len() / float.bytes();
    assert!(out.len() >= n.next_multiple_of(16));
    for i in (0..n).step_by(16) {
        // Whole registers but the last: a constant mask costs nothing.
        let mask = if i + 16 <= n { u16::MAX } else { mask(n - i) };
        // SAFETY: the mask covers the params that are there; `out` is whole registers (checked).
        unsafe {
            let values = load_params(float, params.as_ptr().add(i * float.bytes()), mask);
            _mm512_storeu_ps(out.as_mut_ptr().add(i), values);
        }
    }
}

/// e8m0 bytes as powers of two: byte 0 is the subnormal 2^-127, byte 255 infinity.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn expand_e8m0(bytes: &[u8], out: &mut [f32]) {
    let n = bytes.len();
    assert!(out.len() >= n.next_multiple_of(16));
    let smallest = _mm512_set1_epi32(0x0040_0000);
    for i in (0..n / 16 * 16).step_by(16) {
        // SAFETY: 16 bytes are there, and `out` is whole registers (checked).
        unsafe {
            let exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().add(i).cast()));
            let bits = _mm512_max_epu32(_mm512_slli_epi32::<23>(exponents), smallest);
            _mm512_storeu_ps(out.as_mut_ptr().add(i), _mm512_castsi512_ps(bits));
        }
    }
    let rest = n / 16 * 16;
    if rest < n {
        let mask = mask(n - rest);
        // SAFETY: the mask covers the bytes that are there; `out` is whole registers (checked).
        unsafe {
            let exponents = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes.as_ptr().add(rest).cast()));
            let bits = _mm512_max_epu32(_mm512_slli_epi32::<23>(exponents), smallest);
            _mm512_storeu_ps(out.as_mut_ptr().add(rest), _mm512_castsi512_ps(_mm512_maskz_mov_epi32(mask, bits)));
        }
    }
}

/// `sum_g biases[g] * sums[g]`
pub(crate) fn bias_dot(isa: Isa, float: Float, biases: &[u8], sums: &[f32]) -> f32 {
    assert!(biases.len() >= sums.len() * float.bytes());
    match isa {
        // SAFETY: an `Isa` other than Scalar only exists on processors that have it; the lengths were just checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { bias_avx512(float, biases, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { bias_avx2(float, biases, sums) },
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn bias_avx512(float: Float, biases: &[u8], sums: &[f32]) -> f32 {
    let mut total = _mm512_setzero_ps();
    for (chunk, sums) in sums.chunks(16).enumerate() {
        let mask = mask(sums.len());
        // SAFETY: the mask covers the sums that are there, and there is a bias for each.
        unsafe {
            let bias = load_params(float, biases.as_ptr().add(chunk * 16 * float.bytes()), mask);
            total = _mm512_fmadd_ps(bias, _mm512_maskz_loadu_ps(mask, sums.as_ptr()), total);
        }
    }
    _mm512_reduce_add_ps(total)
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
