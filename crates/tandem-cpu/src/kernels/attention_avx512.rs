//! [`super::attention::attend`] on AVX-512.
//!
//! Scores are kept as `[position][8 heads]`: eight heads and two positions share the loads of a score step, softmax runs
//! across heads in lanes, and the weighted sum keeps 8 heads x 32 dimensions in registers over a block of positions.

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
    let (key_width, value_width) = (q.len() / n_heads, out.len() / n_heads);
    let pitch = key_width.next_multiple_of(32);
    let pairs = n_positions.next_multiple_of(2);
    with_scratch(HEAD_BLOCK * pitch + pairs * HEAD_BLOCK, |memory| {
        let (queries, scores) = memory.split_at_mut(HEAD_BLOCK * pitch);
        queries.fill(0.0);
        for (to, from) in queries.chunks_exact_mut(pitch).zip(q.chunks_exact(key_width)) {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from * scale;
            }
        }
        // SAFETY: this processor has AVX-512 (the caller checked the ISA), and AVX512-BF16 where that kernel is chosen.
        unsafe {
            if E::IS_BF16 && isa.has_bf16() {
                bf16_scores(queries, pitch, n_positions, &key, key_width, scores);
            } else {
                f32_scores(queries, pitch, n_positions, &key, key_width, scores);
            }
            softmax(scores, n_positions);
            weighted_sum(scores, n_positions, &value, value_width, n_heads, out);
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
unsafe fn bf16_scores<'a, E: Element>(
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
    for p in (0..n_positions).step_by(2) {
        let keys = [key(p), key((p + 1).min(n_positions - 1))];
        let mut sums = [_mm512_setzero_ps(); 16];
        for d in (0..key_width).step_by(32) {
            // SAFETY: the casts keep 512 bits; queries have `pitch` elements per head, a multiple of 32.
            unsafe {
                let bf16 = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
                let (k0, k1) = (bf16(load_bf16(keys[0], d)), bf16(load_bf16(keys[1], d)));
                for h in 0..HEAD_BLOCK {
                    let q = bf16(_mm512_loadu_si512(halves.add(h * pitch + d).cast()));
                    sums[h] = _mm512_dpbf16_ps(sums[h], q, k0);
                    sums[8 + h] = _mm512_dpbf16_ps(sums[8 + h], q, k1);
                }
            }
        }
        // SAFETY: scores have room for pairs of positions.
        unsafe { _mm512_storeu_ps(scores[p * HEAD_BLOCK..][..16].as_mut_ptr(), reduce16(&sums)) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_scores<'a, E: Element>(
    queries: &[f32],
    pitch: usize,
    n_positions: usize,
    key: &impl Fn(usize) -> &'a [E],
    key_width: usize,
    scores: &mut [f32],
) {
    for p in (0..n_positions).step_by(2) {
        let keys = [key(p), key((p + 1).min(n_positions - 1))];
        let mut sums = [_mm512_setzero_ps(); 16];
        for d in (0..key_width).step_by(16) {
            let (k0, k1) = (load_f32(keys[0], d), load_f32(keys[1], d));
            for h in 0..HEAD_BLOCK {
                // SAFETY: queries have `pitch` elements per head, a multiple of 16.
                let q = unsafe { _mm512_loadu_ps(queries.as_ptr().add(h * pitch + d)) };
                sums[h] = _mm512_fmadd_ps(q, k0, sums[h]);
                sums[8 + h] = _mm512_fmadd_ps(q, k1, sums[8 + h]);
            }
        }
        // SAFETY: scores have room for pairs of positions.
        unsafe { _mm512_storeu_ps(scores[p * HEAD_BLOCK..][..16].as_mut_ptr(), reduce16(&sums)) };
    }
}

/// Softmax over positions of `scores [n_positions, 8]`, each head in its lane.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn softmax(scores: &mut [f32], n_positions: usize) {
    let last = n_positions * HEAD_BLOCK;
    if !n_positions.is_multiple_of(2) {
        // The second half of the last pair does not exist.
        scores[last..last + HEAD_BLOCK].fill(f32::NEG_INFINITY);
    }
    let (pairs, _) = scores[..last.next_multiple_of(16)].as_chunks_mut::<16>();
    // Both halves of the register hold the same eight heads.
    let swap = |v: __m512| _mm512_shuffle_f32x4::<0x4e>(v, v);
    // SAFETY: every chunk is 16 floats.
    unsafe {
        let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
        for pair in pairs.iter() {
            max = _mm512_max_ps(max, _mm512_loadu_ps(pair.as_ptr()));
        }
        max = _mm512_max_ps(max, swap(max));
        let mut sum = _mm512_setzero_ps();
        for pair in pairs.iter_mut() {
            let e = exp(_mm512_sub_ps(_mm512_loadu_ps(pair.as_ptr()), max));
            sum = _mm512_add_ps(sum, e);
            _mm512_storeu_ps(pair.as_mut_ptr(), e);
        }
        let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), _mm512_add_ps(sum, swap(sum)));
        for pair in pairs.iter_mut() {
            _mm512_storeu_ps(pair.as_mut_ptr(), _mm512_mul_ps(_mm512_loadu_ps(pair.as_ptr()), inverse));
        }
    }
}

/// `out[h] = sum_p weights[p][h] * value(p)`
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn weighted_sum<'a, E: Element>(
    weights: &[f32],
    n_positions: usize,
    value: &impl Fn(usize) -> &'a [E],
    value_width: usize,
    n_heads: usize,
    out: &mut [f32],
) {
    out.fill(0.0);
    for first in (0..n_positions).step_by(POSITION_BLOCK) {
        let block = first..n_positions.min(first + POSITION_BLOCK);
        for d in (0..value_width).step_by(32) {
            let mut sums = [[_mm512_setzero_ps(); 2]; HEAD_BLOCK];
            for p in block.clone() {
                let v = value(p);
                let (v0, v1) = (load_f32(v, d), load_f32(v, d + 16));
                let weights = &weights[p * HEAD_BLOCK..][..HEAD_BLOCK];
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
