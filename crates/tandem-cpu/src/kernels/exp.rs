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
