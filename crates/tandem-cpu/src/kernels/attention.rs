//! Softmax attention of a few query heads of one row over cached vectors.

use super::vector::{Element, axpy, dot};
use crate::isa::Isa;

/// `out[h] = sum_p softmax_p(scale * q[h] . keys[p]) * values[p]` for the heads of `q`.
///
/// `q [n_heads, key_width]`, `out [n_heads, value_width]`, `scores` is working memory of `n_heads * n_positions`; `key`
/// and `value` give the cached vectors of the i-th attended position.
#[allow(clippy::too_many_arguments)]
pub fn attend<'a, E: Element>(
    isa: Isa,
    q: &[f32],
    n_heads: usize,
    scale: f32,
    n_positions: usize,
    key: impl Fn(usize) -> &'a [E],
    value: impl Fn(usize) -> &'a [E],
    scores: &mut [f32],
    out: &mut [f32],
) {
    let (key_width, value_width) = (q.len() / n_heads, out.len() / n_heads);
    for p in 0..n_positions {
        let key = key(p);
        for (h, q) in q.chunks_exact(key_width).enumerate() {
            scores[h * n_positions + p] = scale * dot(isa, q, key);
        }
    }
    for scores in scores[..n_heads * n_positions].chunks_exact_mut(n_positions) {
        softmax(scores);
    }
    out.fill(0.0);
    for p in 0..n_positions {
        let value = value(p);
        for (h, out) in out.chunks_exact_mut(value_width).enumerate() {
            axpy(isa, scores[h * n_positions + p], value, out);
        }
    }
}

/// `x = exp(x - max) / sum`
pub fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f32;
    for v in x.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    for v in x {
        *v /= sum;
    }
}
