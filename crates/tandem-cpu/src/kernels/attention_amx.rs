//! [`super::attention::attend`] on AMX, for many rows of few sequences that see all that came before: cached vectors are put
//! into the order of AMX's second operand once for all of them.
//!
//! For 32 heads of a row, queries times keys are scores `[head][position]`, which softmax turns into shares in the order in
//! which they meet the values.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::exp::exp;
use super::tile_rows::amx::{Amx, Engine, Line, fill_in_order, with_lines};

/// Heads of a task: two blocks of rows of AMX's first operand.
pub(crate) const HEADS: usize = 32;
/// Positions of a block of the context, and elements of a line.
pub(crate) const SPAN: usize = 32;
/// Lines of 32 x 32 elements.
const SQUARE: usize = SPAN;

/// The shape of cached vectors: keys, and values which are their first elements. Both are multiples of 32.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) key: usize,
    pub(crate) value: usize,
}

impl Shape {
    /// Lines that a block of 32 positions takes: keys first.
    pub(crate) fn block_lines(self) -> usize {
        (self.key + self.value) / SPAN * SQUARE
    }
}

/// Blocks of a context.
pub(crate) fn n_blocks(n_positions: usize) -> usize {
    n_positions.div_ceil(SPAN)
}

/// Puts the vectors of a block, 32 and less, into order; the rest are zeros. Elements are bf16.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn pack(shape: Shape, vectors: &[&[u16]], to: &mut [Line]) {
    assert!(vectors.len() <= SPAN && vectors.iter().all(|v| v.len() >= shape.key) && shape.value <= shape.key);
    assert_eq!(to.len(), shape.block_lines());
    let zeros = vec![0u16; shape.key];
    let vector = |p: usize| vectors.get(p).map_or(zeros.as_ptr(), |v| v.as_ptr());
    let (keys, values) = to.split_at_mut(shape.key / SPAN * SQUARE);
    // Keys: pairs of elements, each of all positions.
    for (group, to) in keys.chunks_exact_mut(SQUARE).enumerate() {
        for (p, to) in (0..SPAN).map(|p| (p, &raw mut *to)) {
            // SAFETY: 16 pairs of a vector, and 16 lines of two, 32 positions each.
            unsafe {
                let pairs = vector(p).add(group * SPAN).cast::<u32>();
                let to = to.cast::<u32>().add(p);
                for pair in 0..SPAN / 2 {
                    *to.add(pair * SPAN) = pairs.add(pair).read_unaligned();
                }
            }
        }
    }
    // Values: pairs of positions, each of all elements.
    for (group, to) in values.chunks_exact_mut(SQUARE).enumerate() {
        for pair in 0..SPAN / 2 {
            for half in 0..2 {
                // SAFETY: 16 elements of two vectors, and a line for them.
                unsafe {
                    let at = group * SPAN + 16 * half;
                    let wide = |p: usize| _mm512_cvtepu16_epi32(_mm256_loadu_si256(vector(p).add(at).cast()));
                    let both = _mm512_or_si512(wide(2 * pair), _mm512_slli_epi32::<16>(wide(2 * pair + 1)));
                    _mm512_storeu_si512((&raw mut to[2 * pair + half]).cast(), both);
                }
            }
        }
    }
}

/// `out[h] = sum_p softmax_p(scale * q[h] . key(p)) * value(p)` over the first `n_positions` of `context`, whole blocks of
/// [`pack`], for up to [`HEADS`] heads: `q [n_heads, key]`, `out [n_heads, value]`.
///
/// # Safety
/// The processor has AVX-512, and AMX with bf16.
pub(crate) unsafe fn attend(
    shape: Shape,
    context: &[Line],
    n_positions: usize,
    q: &[f32],
    scale: f32,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe { attend_on::<Amx>(shape, context, n_positions, q, scale, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn attend_on<E: Engine>(
    shape: Shape,
    context: &[Line],
    n_positions: usize,
    q: &[f32],
    scale: f32,
    out: &mut [f32],
) {
    let n_heads = q.len() / shape.key;
    let n_blocks = n_blocks(n_positions);
    assert!(n_heads <= HEADS && out.len() == n_heads * shape.value && context.len() >= n_blocks * shape.block_lines());
    // One line more than a power of two may be, as for activations of products.
    let (q_pitch, share_pitch, score_pitch) = (shape.key / SPAN + 1, n_blocks + 1, n_blocks * SPAN + SPAN / 2);
    let n_queries = HEADS * q_pitch;
    let n_shares = HEADS * share_pitch;
    let floats = |n: usize| n.div_ceil(SPAN / 2);
    let n_scores = floats(HEADS * score_pitch);
    let n_sums = floats(HEADS * SPAN);
    with_lines(n_queries + n_shares + n_scores + n_sums, |memory| {
        let (queries, memory) = memory.split_at_mut(n_queries);
        let (shares, memory) = memory.split_at_mut(n_shares);
        let (scores, sums) = memory.split_at_mut(n_scores);
        let (scores, sums) = (scores.as_mut_ptr().cast::<f32>(), sums.as_mut_ptr().cast::<f32>());
        // SAFETY: sizes as above; lengths of the context were checked. Rows of heads that do not exist hold anything, and
        // reach nothing but their own.
        unsafe {
            for (q, to) in q.chunks_exact(shape.key).zip(queries.chunks_exact_mut(q_pitch)) {
                fill_in_order(q, scale, &mut to[..q_pitch - 1]);
            }
            let mut engine = E::new();
            for block in 0..n_blocks {
                let keys = context.as_ptr().add(block * shape.block_lines());
                let scores = scores.add(block * SPAN);
                let x = Lines { start: queries.as_ptr(), pitch: q_pitch, n: q_pitch - 1 };
                of_heads(&mut engine, n_heads, x, (keys, SQUARE), (scores, score_pitch));
            }
            let mut inverses = [0.0f32; HEADS];
            for (h, inverse) in inverses.iter_mut().enumerate().take(n_heads) {
                let scores = std::slice::from_raw_parts_mut(scores.add(h * score_pitch), n_blocks * SPAN);
                *inverse = softmax(scores, n_positions, &mut shares[h * share_pitch..][..n_blocks]);
            }
            for group in 0..shape.value / SPAN {
                let values = context.as_ptr().add(shape.key / SPAN * SQUARE + group * SQUARE);
                let x = Lines { start: shares.as_ptr(), pitch: share_pitch, n: n_blocks };
                of_heads(&mut engine, n_heads, x, (values, shape.block_lines()), (sums, SPAN));
                for (h, inverse) in inverses.iter().enumerate().take(n_heads) {
                    let sums = std::slice::from_raw_parts(sums.add(h * SPAN), SPAN);
                    for (out, sum) in out[h * shape.value + group * SPAN..][..SPAN].iter_mut().zip(sums) {
                        *out = sum * inverse;
                    }
                }
            }
        }
    });
}

/// `n` lines of each head, `pitch` lines from one head to the next.
struct Lines {
    start: *const Line,
    pitch: usize,
    n: usize,
}

/// `to [n_heads, 32] = sum_i x[.., i] * squares[i]`, squares being `step` lines apart; rows of up to [`HEADS`] heads are written.
///
/// # Safety
/// The processor has the engine's instructions; lines, squares and sums are there.
#[inline(always)]
unsafe fn of_heads<E: Engine>(
    engine: &mut E,
    n_heads: usize,
    x: Lines,
    (squares, step): (*const Line, usize),
    (to, pitch): (*mut f32, usize),
) {
    #[inline(always)]
    unsafe fn sums<E: Engine, const TWO: bool>(
        engine: &mut E,
        x: &Lines,
        (squares, step): (*const Line, usize),
        (to, pitch): (*mut f32, usize),
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            engine.zero();
            for i in 0..x.n {
                engine.multiply::<TWO>(x.start.add(i), x.pitch, squares.add(i * step).cast());
            }
            engine.store::<TWO>(to, pitch);
        }
    }
    // SAFETY: the caller's promise.
    unsafe {
        if n_heads > HEADS / 2 {
            sums::<E, true>(engine, &x, (squares, step), (to, pitch));
        } else {
            sums::<E, false>(engine, &x, (squares, step), (to, pitch));
        }
    }
}

/// Shares of the first `n` scores before they are divided by their sum, the others being zero; returns one over the sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn softmax(scores: &mut [f32], n: usize, shares: &mut [Line]) -> f32 {
    scores[n..].fill(f32::NEG_INFINITY);
    let (scores, _) = scores.as_chunks_mut::<16>();
    // SAFETY: every chunk is 16 floats.
    unsafe {
        let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
        for scores in scores.iter() {
            max = _mm512_max_ps(max, _mm512_loadu_ps(scores.as_ptr()));
        }
        let max = _mm512_set1_ps(_mm512_reduce_max_ps(max));
        let mut sum = _mm512_setzero_ps();
        for scores in scores.iter_mut() {
            let e = exp(_mm512_sub_ps(_mm512_loadu_ps(scores.as_ptr()), max));
            sum = _mm512_add_ps(sum, e);
            _mm512_storeu_ps(scores.as_mut_ptr(), e);
        }
        fill_in_order(scores.as_flattened(), 1.0, shares);
        1.0 / _mm512_reduce_add_ps(sum)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use half::slice::HalfFloatSliceExt;

    use super::super::tile_rows::amx::tests::Definition;
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn rows_attend_to_all_before_them() {
        if !Isa::available().contains(&Isa::Avx512) {
            return;
        }
        let shape = Shape { key: 96, value: 64 };
        let number = |i: usize, period: usize| (i * 7919 % period) as f32 / period as f32 - 0.5;
        for (n_heads, n_positions, n_cached) in [(32, 1, 1), (32, 33, 80), (7, 64, 64), (16, 31, 40), (17, 100, 100)] {
            let cache: Vec<bf16> = (0..n_cached * shape.key).map(|i| bf16::from_f32(number(i, 1009))).collect();
            let q: Vec<f32> = (0..n_heads * shape.key).map(|i| 8.0 * number(i, 911)).collect();
            let mut context = vec![Line::default(); n_blocks(n_cached) * shape.block_lines()];
            let vectors: Vec<&[u16]> = cache.reinterpret_cast().chunks_exact(shape.key).collect();
            let mut out = vec![f32::NAN; n_heads * shape.value];
            // SAFETY: the processor has AVX-512; the definition needs nothing else.
            unsafe {
                for (vectors, to) in vectors.chunks(SPAN).zip(context.chunks_exact_mut(shape.block_lines())) {
                    pack(shape, vectors, to);
                }
                attend_on::<Definition>(shape, &context, n_positions, &q, 0.25, &mut out);
            }
            let mut expected = vec![0.0; out.len()];
            let key = |p: usize| &cache[p * shape.key..(p + 1) * shape.key];
            let value = |p: usize| &key(p)[..shape.value];
            for (q, out) in q.chunks_exact(shape.key).zip(expected.chunks_exact_mut(shape.value)) {
                super::super::attention::attend(Isa::Scalar, q, 1, 0.25, n_positions, key, value, out);
            }
            // Queries and shares are rounded to bf16: a score of up to 8 errs by its 2^-9 at most, a share by as much again.
            for (found, expected) in out.iter().zip(&expected) {
                assert!((found - expected).abs() <= 0.5 * 2f32.powi(-5), "{n_heads} {n_positions}: {found} {expected}");
            }
        }
    }
}
