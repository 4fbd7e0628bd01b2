//! The exponential function in vector registers.

use std::arch::x86_64::*;

/// `e^x` per lane, to about 2 units in the last place; 0 below -87.3, and below that far.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, then a degree-6 polynomial (Cephes' expf) and a scaling by `2^n`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn exp(x: __m512) -> __m512 {
    let set = _mm512_set1_ps;
    let x = _mm512_max_ps(_mm512_min_ps(x, set(88.7)), set(-104.0));
    let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, set(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, so that the remainder is exact.
    let r = _mm512_fnmadd_ps(n, set(0.693_359_4), x);
    let r = _mm512_fnmadd_ps(n, set(-2.121_944_4e-4), r);
    let mut p = set(1.987_569_1e-4);
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = _mm512_fmadd_ps(p, r, set(c));
    }
    let p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, set(1.0)));
    _mm512_scalef_ps(p, n)
}

/// [`exp`] of eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn exp8(x: __m256) -> __m256 {
    let set = _mm256_set1_ps;
    // Below this, 2^n is not a normal number.
    let least = set(-87.33);
    let is_zero = _mm256_cmp_ps::<_CMP_LT_OQ>(x, least);
    let x = _mm256_max_ps(_mm256_min_ps(x, set(88.7)), least);
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        set(std::f32::consts::LOG2_E),
    ));
    let r = _mm256_fnmadd_ps(n, set(0.693_359_4), x);
    let r = _mm256_fnmadd_ps(n, set(-2.121_944_4e-4), r);
    let mut p = set(1.987_569_1e-4);
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = _mm256_fmadd_ps(p, r, set(c));
    }
    let p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, _mm256_add_ps(r, set(1.0)));
    // Twice half of the exponent: 2^128 is not a float.
    let half = _mm256_srai_epi32::<1>(_mm256_cvtps_epi32(n));
    let rest = _mm256_sub_epi32(_mm256_cvtps_epi32(n), half);
    let power = |n: __m256i| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
    let value = _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(rest));
    // NaN is not below.
    _mm256_andnot_ps(is_zero, value)
}
