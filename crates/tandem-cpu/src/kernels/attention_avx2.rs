//! [`super::attention::attend`] on AVX2 with FMA.
//!
//! As on AVX-512: scores are kept as `[position][H heads]`, `H` 4 or 8, softmax runs across heads in lanes, and the
//! weighted sum keeps 4 heads x 16 dimensions in registers over a block of positions. Products are f32.

#![allow(unsafe_code)]
// Tokens and heads run over several arrays at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::attention::HEAD_BLOCK;
use super::exp::exp8;
use super::vector::Element;
use crate::scratch::with_scratch;

/// Positions of one pass of the weighted sum: their vectors stay in the second-level cache.
const POSITION_BLOCK: usize = 128;
/// Bytes of cached vectors that are asked for before they are read: rows of one head lie apart, and pages anywhere.
const AHEAD_BYTES: usize = 4 << 10;
/// Heads that share the loads of a value.
const VALUE_HEADS: usize = 4;

pub(super) fn attend<'a, E: Element>(
    q: &[f32],
    n_heads: usize,
    scale: f32,
    n_positions: usize,
    key: impl Fn(usize) -> &'a [E],
    value: impl Fn(usize) -> &'a [E],
    out: &mut [f32],
) {
    if n_heads <= 4 {
        attend_block::<4, E>(q, n_heads, scale, n_positions, key, value, out);
    } else {
        attend_block::<HEAD_BLOCK, E>(q, n_heads, scale, n_positions, key, value, out);
    }
}

fn attend_block<'a, const H: usize, E: Element>(
    q: &[f32],
    n_heads: usize,
    scale: f32,
    n_positions: usize,
    key: impl Fn(usize) -> &'a [E],
    value: impl Fn(usize) -> &'a [E],
    out: &mut [f32],
) {
    let (key_width, value_width) = (q.len() / n_heads, out.len() / n_heads);
    let pitch = key_width.next_multiple_of(8);
    let n_scores = (n_positions * H).next_multiple_of(8);
    with_scratch(H * pitch + n_scores, |memory| {
        let (queries, scores) = memory.split_at_mut(H * pitch);
        queries.fill(0.0);
        for (to, from) in queries.chunks_exact_mut(pitch).zip(q.chunks_exact(key_width)) {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from * scale;
            }
        }
        // SAFETY: this processor has AVX2 and FMA: the caller checked the ISA.
        unsafe {
            all_scores::<H, E>(queries, pitch, n_positions, &key, key_width, scores);
            softmax::<H>(scores, n_positions);
            weighted_sum::<H, E>(scores, n_positions, &value, value_width, n_heads, out);
        }
    });
}

/// Sums of 8 registers: lane `i` of the result is the sum of register `i`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn reduce8(v: &[__m256; 8]) -> __m256 {
    let quads = [
        _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3])),
        _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7])),
    ];
    _mm256_add_ps(
        _mm256_permute2f128_ps::<0x20>(quads[0], quads[1]),
        _mm256_permute2f128_ps::<0x31>(quads[0], quads[1]),
    )
}

/// Asks for a vector's cache lines.
#[inline]
#[allow(unused_unsafe)] // prefetching became safe after rust-version
fn prefetch<E>(vector: &[E]) {
    for line in (0..size_of_val(vector)).step_by(64) {
        // SAFETY: a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(vector.as_ptr().cast::<i8>().wrapping_add(line)) };
    }
}

/// Elements `start..start + 8`, zeros beyond the end.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn load<E: Element>(x: &[E], start: usize) -> __m256 {
    if start + 8 <= x.len() {
        // SAFETY: 8 elements are there.
        unsafe {
            let p = x.as_ptr().add(start);
            if E::IS_BF16 {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
            } else {
                _mm256_loadu_ps(p.cast())
            }
        }
    } else {
        let mut values = [0.0; 8];
        for (to, from) in values.iter_mut().zip(x.iter().skip(start)) {
            *to = from.widen();
        }
        // SAFETY: 8 floats.
        unsafe { _mm256_loadu_ps(values.as_ptr()) }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn all_scores<'a, const H: usize, E: Element>(
    queries: &[f32],
    pitch: usize,
    n_positions: usize,
    key: &impl Fn(usize) -> &'a [E],
    key_width: usize,
    scores: &mut [f32],
) {
    let ahead = AHEAD_BYTES.div_ceil(key_width * size_of::<E>());
    for p in (0..n_positions).step_by(8 / H) {
        let mut keys = [key(p); 2];
        for i in 0..8 / H {
            keys[i] = key((p + i).min(n_positions - 1));
            prefetch(key((p + i + ahead).min(n_positions - 1)));
        }
        let mut sums = [_mm256_setzero_ps(); 8];
        for d in (0..key_width).step_by(8) {
            for i in 0..8 / H {
                let k = load(keys[i], d);
                for h in 0..H {
                    // SAFETY: queries have `pitch` elements per head, a multiple of 8.
                    let q = unsafe { _mm256_loadu_ps(queries.as_ptr().add(h * pitch + d)) };
                    sums[i * H + h] = _mm256_fmadd_ps(q, k, sums[i * H + h]);
                }
            }
        }
        // SAFETY: scores have room for whole registers.
        unsafe { _mm256_storeu_ps(scores[p * H..][..8].as_mut_ptr(), reduce8(&sums)) };
    }
}

/// Softmax over positions of `scores [n_positions, H]`, each head in its lane.
#[target_feature(enable = "avx2,fma")]
unsafe fn softmax<const H: usize>(scores: &mut [f32], n_positions: usize) {
    // The last register may have room for a position that does not exist.
    scores[n_positions * H..].fill(f32::NEG_INFINITY);
    let (registers, _) = scores.as_chunks_mut::<8>();
    // The same heads, 8 / H times.
    macro_rules! across {
        ($v:expr, $op:ident) => {{
            let v = $v;
            if H == 4 { $op(v, _mm256_permute2f128_ps::<1>(v, v)) } else { v }
        }};
    }
    // SAFETY: every chunk is 8 floats.
    unsafe {
        let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
        for register in registers.iter() {
            max = _mm256_max_ps(max, _mm256_loadu_ps(register.as_ptr()));
        }
        max = across!(max, _mm256_max_ps);
        let mut sum = _mm256_setzero_ps();
        for register in registers.iter_mut() {
            let e = exp8(_mm256_sub_ps(_mm256_loadu_ps(register.as_ptr()), max));
            sum = _mm256_add_ps(sum, e);
            _mm256_storeu_ps(register.as_mut_ptr(), e);
        }
        let inverse = _mm256_div_ps(_mm256_set1_ps(1.0), across!(sum, _mm256_add_ps));
        for register in registers.iter_mut() {
            _mm256_storeu_ps(register.as_mut_ptr(), _mm256_mul_ps(_mm256_loadu_ps(register.as_ptr()), inverse));
        }
    }
}

/// `out[h] = sum_p weights[p][h] * value(p)`, `weights [n_positions, H]`
#[target_feature(enable = "avx2,fma")]
unsafe fn weighted_sum<'a, const H: usize, E: Element>(
    weights: &[f32],
    n_positions: usize,
    value: &impl Fn(usize) -> &'a [E],
    value_width: usize,
    n_heads: usize,
    out: &mut [f32],
) {
    out.fill(0.0);
    let ahead = AHEAD_BYTES.div_ceil(value_width * size_of::<E>());
    for first in (0..n_positions).step_by(POSITION_BLOCK) {
        let n = POSITION_BLOCK.min(n_positions - first);
        let mut values = [&[] as &[E]; POSITION_BLOCK];
        for (p, slot) in values[..n].iter_mut().enumerate() {
            *slot = &value(first + p)[..value_width];
            prefetch(value((first + p + ahead).min(n_positions - 1)));
        }
        for d in (0..value_width).step_by(16) {
            for head in (0..n_heads).step_by(VALUE_HEADS) {
                let mut sums = [[_mm256_setzero_ps(); 2]; VALUE_HEADS];
                let weights = weights[first * H..].chunks_exact(H);
                for (v, weights) in values[..n].iter().zip(weights) {
                    let (v0, v1) = (load(v, d), load(v, d + 8));
                    let weights = &weights[head..][..VALUE_HEADS];
                    for h in 0..VALUE_HEADS {
                        let weight = _mm256_set1_ps(weights[h]);
                        sums[h][0] = _mm256_fmadd_ps(weight, v0, sums[h][0]);
                        sums[h][1] = _mm256_fmadd_ps(weight, v1, sums[h][1]);
                    }
                }
                for h in 0..VALUE_HEADS.min(n_heads - head) {
                    let n = (value_width - d).min(16);
                    let out = &mut out[(head + h) * value_width + d..][..n];
                    let mut values = [0.0; 16];
                    // SAFETY: 16 floats.
                    unsafe {
                        _mm256_storeu_ps(values.as_mut_ptr(), sums[h][0]);
                        _mm256_storeu_ps(values.as_mut_ptr().add(8), sums[h][1]);
                    }
                    for (out, value) in out.iter_mut().zip(values) {
                        *out += value;
                    }
                }
            }
        }
    }
}
