//! Dot products and scaled sums of contiguous vectors, the inner loops of attention.

use half::bf16;

use crate::isa::Isa;

/// A vector element that can be widened to f32.
pub trait Element: Copy + Send + Sync + 'static {
    /// The value as f32.
    fn widen(self) -> f32;
    /// Rounds to nearest even.
    fn narrow(value: f32) -> Self;
    /// True for bf16, whose kernels differ.
    const IS_BF16: bool;
}

impl Element for f32 {
    fn widen(self) -> f32 {
        self
    }
    fn narrow(value: f32) -> f32 {
        value
    }
    const IS_BF16: bool = false;
}

impl Element for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    const IS_BF16: bool = true;
}

/// `sum_i a[i] * b[i]`
///
/// # Panics
/// When the lengths differ.
#[inline]
#[allow(unsafe_code)]
pub fn dot<E: Element>(isa: Isa, a: &[f32], b: &[E]) -> f32 {
    assert_eq!(a.len(), b.len());
    match isa {
        // SAFETY: an `Isa` other than Scalar only exists on processors that have it, and lengths are equal.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { x86::dot_avx512(a, b) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::dot_avx2(a, b) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::dot_neon(a, b) },
        _ => dot_scalar(a, b),
    }
}

/// `y[i] += alpha * x[i]`
///
/// # Panics
/// When the lengths differ.
#[inline]
#[allow(unsafe_code)]
pub fn axpy<E: Element>(isa: Isa, alpha: f32, x: &[E], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    match isa {
        // SAFETY: an `Isa` other than Scalar only exists on processors that have it, and lengths are equal.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { x86::axpy_avx512(alpha, x, y) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::axpy_avx2(alpha, x, y) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::axpy_neon(alpha, x, y) },
        _ => axpy_scalar(alpha, x, y),
    }
}

/// The oracle of [`dot`].
pub fn dot_scalar<E: Element>(a: &[f32], b: &[E]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y.widen()).sum()
}

/// The oracle of [`axpy`].
pub fn axpy_scalar<E: Element>(alpha: f32, x: &[E], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x.widen();
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::avx2::reduce;
    use super::Element;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load16<E: Element>(p: *const E, mask: __mmask16) -> __m512 {
        // SAFETY: masked loads touch only the elements that the mask names, which the caller has.
        unsafe {
            if E::IS_BF16 {
                let half = _mm256_maskz_loadu_epi16(mask, p.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            } else {
                _mm512_maskz_loadu_ps(mask, p.cast())
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn dot_avx512<E: Element>(a: &[f32], b: &[E]) -> f32 {
        let n = a.len();
        let mut sums = [_mm512_setzero_ps(); 4];
        let mut i = 0;
        while i + 64 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: i + 64 <= n.
                unsafe {
                    let x = _mm512_loadu_ps(a.as_ptr().add(i + 16 * j));
                    *sum = _mm512_fmadd_ps(x, load16(b.as_ptr().add(i + 16 * j), 0xffff), *sum);
                }
            }
            i += 64;
        }
        while i < n {
            let mask = if n - i >= 16 { 0xffff } else { (1u16 << (n - i)) - 1 };
            // SAFETY: the mask covers at most n - i elements.
            unsafe {
                let x = _mm512_maskz_loadu_ps(mask, a.as_ptr().add(i));
                sums[0] = _mm512_fmadd_ps(x, load16(b.as_ptr().add(i), mask), sums[0]);
            }
            i += 16;
        }
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn axpy_avx512<E: Element>(alpha: f32, x: &[E], y: &mut [f32]) {
        let n = y.len();
        let alpha = _mm512_set1_ps(alpha);
        let mut i = 0;
        while i < n {
            let mask = if n - i >= 16 { 0xffff } else { (1u16 << (n - i)) - 1 };
            // SAFETY: the mask covers at most n - i elements.
            unsafe {
                let p = y.as_mut_ptr().add(i);
                let sum = _mm512_fmadd_ps(alpha, load16(x.as_ptr().add(i), mask), _mm512_maskz_loadu_ps(mask, p));
                _mm512_mask_storeu_ps(p, mask, sum);
            }
            i += 16;
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load8<E: Element>(p: *const E) -> __m256 {
        // SAFETY: the caller has 8 elements at p.
        unsafe {
            if E::IS_BF16 {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
            } else {
                _mm256_loadu_ps(p.cast())
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn dot_avx2<E: Element>(a: &[f32], b: &[E]) -> f32 {
        let n = a.len();
        let mut sums = [_mm256_setzero_ps(); 4];
        let mut i = 0;
        while i + 32 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: i + 32 <= n.
                unsafe {
                    let x = _mm256_loadu_ps(a.as_ptr().add(i + 8 * j));
                    *sum = _mm256_fmadd_ps(x, load8(b.as_ptr().add(i + 8 * j)), *sum);
                }
            }
            i += 32;
        }
        while i + 8 <= n {
            // SAFETY: i + 8 <= n.
            unsafe {
                sums[0] = _mm256_fmadd_ps(_mm256_loadu_ps(a.as_ptr().add(i)), load8(b.as_ptr().add(i)), sums[0]);
            }
            i += 8;
        }
        let sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
        reduce(sum) + super::dot_scalar(&a[i..], &b[i..])
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn axpy_avx2<E: Element>(alpha: f32, x: &[E], y: &mut [f32]) {
        let n = y.len();
        let factor = _mm256_set1_ps(alpha);
        let mut i = 0;
        while i + 8 <= n {
            // SAFETY: i + 8 <= n.
            unsafe {
                let p = y.as_mut_ptr().add(i);
                _mm256_storeu_ps(p, _mm256_fmadd_ps(factor, load8(x.as_ptr().add(i)), _mm256_loadu_ps(p)));
            }
            i += 8;
        }
        super::axpy_scalar(alpha, &x[i..], &mut y[i..]);
    }
}

#[cfg(target_arch = "aarch64")]
#[allow(unsafe_code)]
mod neon {
    use std::arch::aarch64::*;

    use super::Element;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load4<E: Element>(p: *const E) -> float32x4_t {
        // SAFETY: the caller has 4 elements at p.
        unsafe {
            if E::IS_BF16 { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) } else { vld1q_f32(p.cast()) }
        }
    }

    #[target_feature(enable = "neon")]
    pub(super) unsafe fn dot_neon<E: Element>(a: &[f32], b: &[E]) -> f32 {
        let n = a.len();
        let mut sums = [vdupq_n_f32(0.0); 4];
        let mut i = 0;
        while i + 16 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: i + 16 <= n.
                unsafe {
                    *sum = vfmaq_f32(*sum, vld1q_f32(a.as_ptr().add(i + 4 * j)), load4(b.as_ptr().add(i + 4 * j)));
                }
            }
            i += 16;
        }
        let sum = vaddvq_f32(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3])));
        sum + super::dot_scalar(&a[i..], &b[i..])
    }

    #[target_feature(enable = "neon")]
    pub(super) unsafe fn axpy_neon<E: Element>(alpha: f32, x: &[E], y: &mut [f32]) {
        let n = y.len();
        let mut i = 0;
        while i + 4 <= n {
            // SAFETY: i + 4 <= n.
            unsafe {
                let p = y.as_mut_ptr().add(i);
                vst1q_f32(p, vfmaq_n_f32(vld1q_f32(p), load4(x.as_ptr().add(i)), alpha));
            }
            i += 4;
        }
        super::axpy_scalar(alpha, &x[i..], &mut y[i..]);
    }
}
