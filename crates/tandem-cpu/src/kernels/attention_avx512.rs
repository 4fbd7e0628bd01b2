//! [`super::attention::attend`] on AVX-512.
//!
//! Scores are kept as `[position][H heads]`, `H` 4 or 8: a score step takes `H` heads and `16 / H` positions, softmax runs
//! across heads in lanes, and the weighted sum keeps `H` heads x 32 dimensions in registers over a block of positions.

#![allow(unsafe_code)]
// Rows, tokens and heads run over several arrays at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::attention::HEAD_BLOCK;
use super::exp::exp;
use super::vector::Element;
use crate::isa::Isa;
use crate::scratch::with_scratch;

/// Positions of one pass of the weighted sum: their vectors stay in the second-level cache.
const POSITION_BLOCK: usize = 128;
/// Bytes of cached vectors that are asked for before they are read: rows of one head lie apart, and pages anywhere.
const AHEAD_BYTES: usize = 4 << 10;

#[allow(clippy::too_many_arguments)]
pub(super) fn attend<'a, E: Element>(
    isa: Isa,
    q: &[f32],
    n_heads: usize,
    scale: f32,
    n_positions: usize,
    key: impl Fn(usize) -> &'a [E],
    value: impl Fn(usize) -> &'a [E],
    out: &mut [f32],
) {
    if n_heads <= 4 {
        attend_block::<4, E>(isa, q, n_heads, scale, n_positions, key, value, out);
    } else {
        attend_block::<HEAD_BLOCK, E>(isa, q, n_heads, scale, n_positions, key, value, out);
    }
}

#[allow(clippy::too_many_arguments)]
fn attend_block<'a, const H: usize, E: Element>(
    isa: Isa,
    q: &[f32],
    n_heads: usize,
    scale: f32,
    n_positions: usize,
    key: impl Fn(usize) -> &'a [E],
    value: impl Fn(usize) -> &'a [E],
    out: &mut [f32],
) {
    let (key_width, value_width) = (q.len() / n_heads, out.len() / n_heads);
    let pitch = key_width.next_multiple_of(32);
    let n_scores = (n_positions * H).next_multiple_of(16);
    with_scratch(H * pitch + n_scores, |memory| {
        let (queries, scores) = memory.split_at_mut(H * pitch);
        queries.fill(0.0);
        for (to, from) in queries.chunks_exact_mut(pitch).zip(q.chunks_exact(key_width)) {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from * scale;
            }
        }
        // SAFETY: this processor has AVX-512 (the caller checked the ISA), and AVX512-BF16 where that kernel is chosen.
        unsafe {
            if E::IS_BF16 && isa.has_bf16() {
                bf16_scores::<H, E>(queries, pitch, n_positions, &key, key_width, scores);
            } else {
                f32_scores::<H, E>(queries, pitch, n_positions, &key, key_width, scores);
            }
            softmax::<H>(scores, n_positions);
            weighted_sum::<H, E>(scores, n_positions, &value, value_width, n_heads, out);
        }
    });
}

/// Sums of 16 registers: lane `i` of the result is the sum of register `i`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn reduce16(v: &[__m512; 16]) -> __m512 {
    let mut quads = [_mm512_setzero_ps(); 4];
    for (i, quad) in quads.iter_mut().enumerate() {
        let pair = |a: __m512, b: __m512| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (x, y) = (pair(v[4 * i], v[4 * i + 1]), pair(v[4 * i + 2], v[4 * i + 3]));
        let (x, y) = (_mm512_castps_pd(x), _mm512_castps_pd(y));
        *quad = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    let fold =
        |a: __m512, b: __m512| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    fold(fold(quads[0], quads[1]), fold(quads[2], quads[3]))
}

fn positions_ahead<E>(width: usize) -> usize {
    AHEAD_BYTES.div_ceil(width * size_of::<E>())
}

/// Asks for a vector's cache lines.
#[inline]
fn prefetch<E>(vector: &[E]) {
    for line in (0..size_of_val(vector)).step_by(64) {
        // SAFETY: a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(vector.as_ptr().cast::<i8>().add(line)) };
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn load_bf16(x: &[impl Element], start: usize) -> __m512i {
    let n = (x.len() - start).min(32);
    let mask = if n == 32 { u32::MAX } else { (1u32 << n) - 1 };
    // SAFETY: the mask covers the elements that are there.
    unsafe { _mm512_maskz_loadu_epi16(mask, x.as_ptr().add(start).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn load_f32<E: Element>(x: &[E], start: usize) -> __m512 {
    let n = x.len().saturating_sub(start).min(16);
    let mask = if n == 16 { u16::MAX } else { (1u16 << n) - 1 };
    // SAFETY: the mask covers the elements that are there.
    unsafe {
        if E::IS_BF16 {
            let half = _mm256_maskz_loadu_epi16(mask, x.as_ptr().add(start).cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        } else {
            _mm512_maskz_loadu_ps(mask, x.as_ptr().add(start).cast())
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn bf16_scores<'a, const H: usize, E: Element>(
    queries: &mut [f32],
    pitch: usize,
    n_positions: usize,
    key: &impl Fn(usize) -> &'a [E],
    key_width: usize,
    scores: &mut [f32],
) {
    // The queries as bf16, in place: the first half of the memory.
    let n = queries.len();
    let halves = queries.as_mut_ptr().cast::<u16>();
    for i in (0..n).step_by(16) {
        // SAFETY: writing 16 halves at 2 i bytes never reaches floats from i on that are still to be read, except those
        // just loaded.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(queries.as_ptr().add(i)));
            _mm256_storeu_si256(halves.add(i).cast(), std::mem::transmute::<__m256bh, __m256i>(rounded));
        }
    }
    let ahead = positions_ahead::<E>(key_width);
    for p in (0..n_positions).step_by(16 / H) {
        let mut keys = [key(p); 4];
        for i in 0..16 / H {
            keys[i] = key((p + i).min(n_positions - 1));
            prefetch(key((p + i + ahead).min(n_positions - 1)));
        }
        let mut sums = [_mm512_setzero_ps(); 16];
        for d in (0..key_width).step_by(32) {
            // SAFETY: the casts keep 512 bits; queries have `pitch` elements per head, a multiple of 32.
            unsafe {
                let bf16 = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
                for i in 0..16 / H {
                    let k = bf16(load_bf16(keys[i], d));
                    for h in 0..H {
                        let q = bf16(_mm512_loadu_si512(halves.add(h * pitch + d).cast()));
                        sums[i * H + h] = _mm512_dpbf16_ps(sums[i * H + h], q, k);
                    }
                }
            }
        }
        // SAFETY: scores have room for whole registers.
        unsafe { _mm512_storeu_ps(scores[p * H..][..16].as_mut_ptr(), reduce16(&sums)) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_scores<'a, const H: usize, E: Element>(
    queries: &[f32],
    pitch: usize,
    n_positions: usize,
    key: &impl Fn(usize) -> &'a [E],
    key_width: usize,
    scores: &mut [f32],
) {
    let ahead = positions_ahead::<E>(key_width);
    for p in (0..n_positions).step_by(16 / H) {
        let mut keys = [key(p); 4];
        for i in 0..16 / H {
            keys[i] = key((p + i).min(n_positions - 1));
            prefetch(key((p + i + ahead).min(n_positions - 1)));
        }
        let mut sums = [_mm512_setzero_ps(); 16];
        for d in (0..key_width).step_by(16) {
            for i in 0..16 / H {
                let k = load_f32(keys[i], d);
                for h in 0..H {
                    // SAFETY: queries have `pitch` elements per head, a multiple of 16.
                    let q = unsafe { _mm512_loadu_ps(queries.as_ptr().add(h * pitch + d)) };
                    sums[i * H + h] = _mm512_fmadd_ps(q, k, sums[i * H + h]);
                }
            }
        }
        // SAFETY: scores have room for whole registers.
        unsafe { _mm512_storeu_ps(scores[p * H..][..16].as_mut_ptr(), reduce16(&sums)) };
    }
}

/// Softmax over positions of `scores [n_positions, H]`, each head in its lane.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn softmax<const H: usize>(scores: &mut [f32], n_positions: usize) {
    // The last register may have room for positions that do not exist.
    scores[n_positions * H..].fill(f32::NEG_INFINITY);
    let (registers, _) = scores.as_chunks_mut::<16>();
    // The same heads, 16 / H times.
    macro_rules! across {
        ($v:expr, $op:ident) => {{
            let v = $v;
            let v = $op(v, _mm512_shuffle_f32x4::<0x4e>(v, v));
            if H == 4 { $op(v, _mm512_shuffle_f32x4::<0xb1>(v, v)) } else { v }
        }};
    }
    // SAFETY: every chunk is 16 floats.
    unsafe {
        let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
        for register in registers.iter() {
            max = _mm512_max_ps(max, _mm512_loadu_ps(register.as_ptr()));
        }
        max = across!(max, _mm512_max_ps);
        let mut sum = _mm512_setzero_ps();
        for register in registers.iter_mut() {
            let e = exp(_mm512_sub_ps(_mm512_loadu_ps(register.as_ptr()), max));
            sum = _mm512_add_ps(sum, e);
            _mm512_storeu_ps(register.as_mut_ptr(), e);
        }
        let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), across!(sum, _mm512_add_ps));
        for register in registers.iter_mut() {
            _mm512_storeu_ps(register.as_mut_ptr(), _mm512_mul_ps(_mm512_loadu_ps(register.as_ptr()), inverse));
        }
    }
}

/// `out[h] = sum_p weights[p][h] * value(p)`, `weights [n_positions, H]`
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn weighted_sum<'a, const H: usize, E: Element>(
    weights: &[f32],
    n_positions: usize,
    value: &impl Fn(usize) -> &'a [E],
    value_width: usize,
    n_heads: usize,
    out: &mut [f32],
) {
    out.fill(0.0);
    let ahead = positions_ahead::<E>(value_width);
    for first in (0..n_positions).step_by(POSITION_BLOCK) {
        let block = first..n_positions.min(first + POSITION_BLOCK);
        for d in (0..value_width).step_by(32) {
            let mut sums = [[_mm512_setzero_ps(); 2]; H];
            for p in block.clone() {
                let v = value(p);
                if d == 0 {
                    prefetch(value((p + ahead).min(n_positions - 1)));
                }
                let (v0, v1) = (load_f32(v, d), load_f32(v, d + 16));
                let weights = &weights[p * H..][..H];
                for (sums, weight) in sums.iter_mut().zip(weights) {
                    let weight = _mm512_set1_ps(*weight);
                    sums[0] = _mm512_fmadd_ps(weight, v0, sums[0]);
                    sums[1] = _mm512_fmadd_ps(weight, v1, sums[1]);
                }
            }
            for (h, sums) in sums.iter().enumerate().take(n_heads) {
                let n = (value_width - d).min(32);
                let out = &mut out[h * value_width + d..][..n];
                let mask = if n == 32 { u32::MAX } else { (1u32 << n) - 1 };
                // SAFETY: the masks cover the elements that are there.
                unsafe {
                    let (p0, m0, m1) = (out.as_mut_ptr(), mask as u16, (mask >> 16) as u16);
                    _mm512_mask_storeu_ps(p0, m0, _mm512_add_ps(_mm512_maskz_loadu_ps(m0, p0), sums[0]));
                    if n > 16 {
                        let p1 = p0.add(16);
                        _mm512_mask_storeu_ps(p1, m1, _mm512_add_ps(_mm512_maskz_loadu_ps(m1, p1), sums[1]));
                    }
                }
            }
        }
    }
}
