//! The gated activation of an MLP.

use crate::isa::Isa;

/// `gate[i] = silu(gate[i]) * up[i]`, `silu(x) = x / (1 + exp(-x))`.
///
/// # Panics
/// When the lengths differ.
#[allow(unsafe_code)]
pub fn silu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    match isa {
        // SAFETY: the ISA is only available on processors that have it; lengths are equal.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { silu_mul_avx512(gate, up) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { silu_mul_avx2(gate, up) },
        _ => silu_mul_scalar(gate, up),
    }
}

/// The oracle of [`silu_mul`].
pub fn silu_mul_scalar(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
unsafe fn silu_mul_avx512(gate: &mut [f32], up: &[f32]) {
    use std::arch::x86_64::*;
    for i in (0..gate.len()).step_by(16) {
        let n = (gate.len() - i).min(16);
        let mask = if n == 16 { u16::MAX } else { (1u16 << n) - 1 };
        // SAFETY: the mask covers the elements that are there.
        unsafe {
            let g = _mm512_maskz_loadu_ps(mask, gate.as_ptr().add(i));
            let u = _mm512_maskz_loadu_ps(mask, up.as_ptr().add(i));
            let denominator =
                _mm512_add_ps(_mm512_set1_ps(1.0), super::exp::exp(_mm512_sub_ps(_mm512_setzero_ps(), g)));
            _mm512_mask_storeu_ps(gate.as_mut_ptr().add(i), mask, _mm512_mul_ps(_mm512_div_ps(g, denominator), u));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
unsafe fn silu_mul_avx2(gate: &mut [f32], up: &[f32]) {
    use std::arch::x86_64::*;
    let mut chunks = gate.chunks_exact_mut(8);
    for (gate, up) in chunks.by_ref().zip(up.chunks_exact(8)) {
        // SAFETY: 8 elements each.
        unsafe {
            let (g, u) = (_mm256_loadu_ps(gate.as_ptr()), _mm256_loadu_ps(up.as_ptr()));
            let denominator =
                _mm256_add_ps(_mm256_set1_ps(1.0), super::exp::exp8(_mm256_sub_ps(_mm256_setzero_ps(), g)));
            _mm256_storeu_ps(gate.as_mut_ptr(), _mm256_mul_ps(_mm256_div_ps(g, denominator), u));
        }
    }
    let rest = chunks.into_remainder();
    let start = up.len() - rest.len();
    silu_mul_scalar(rest, &up[start..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_matches_the_scalar_one() {
        for isa in Isa::available() {
            for n in [1, 7, 8, 15, 16, 17, 100, 200] {
                let values: Vec<f32> = (0..n).map(|i| (i as f32 - n as f32 / 2.0) * 1.7).collect();
                let up: Vec<f32> = (0..n).map(|i| 1.0 + i as f32).collect();
                let (mut expected, mut found) = (values.clone(), values.clone());
                silu_mul_scalar(&mut expected, &up);
                silu_mul(isa, &mut found, &up);
                for (e, f) in expected.iter().zip(&found) {
                    assert!((e - f).abs() <= 1e-5 * e.abs().max(1e-3), "{isa} {e} {f}");
                }
            }
        }
    }
}
