//! Softmax attention of a few query heads of one row over cached vectors.

use super::vector::{Element, axpy, dot};
use crate::isa::Isa;
use crate::scratch::with_scratch;

/// Heads that the vector kernel takes at once: they share each cached vector.
pub const HEAD_BLOCK: usize = 8;

/// `out[h] = sum_p softmax_p(scale * q[h] . key(p)) * value(p)` for the heads of `q`, at most [`HEAD_BLOCK`].
///
/// `q [n_heads, key_width]`, `out [n_heads, value_width]`; `key` and `value` give the cached vectors of the p-th attended
/// position.
#[allow(clippy::too_many_arguments)]
pub fn attend<'a, E: Element>(
    isa: Isa,
    q: &[f32],
    n_heads: usize,
    scale: f32,
    n_positions: usize,
    key: impl Fn(usize) -> &'a [E],
    value: impl Fn(usize) -> &'a [E],
    out: &mut [f32],
) {
    assert!(n_heads <= HEAD_BLOCK);
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx512 | Isa::Amx) {
        return super::attention_avx512::attend(isa, q, n_heads, scale, n_positions, key, value, out);
    }
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx2 {
        return super::attention_avx2::attend(q, n_heads, scale, n_positions, key, value, out);
    }
    let (key_width, value_width) = (q.len() / n_heads, out.len() / n_heads);
    with_scratch(n_heads * n_positions, |scores| {
        for p in 0..n_positions {
            let key = key(p);
            for (h, q) in q.chunks_exact(key_width).enumerate() {
                scores[h * n_positions + p] = scale * dot(isa, q, key);
            }
        }
        for scores in scores.chunks_exact_mut(n_positions) {
            softmax(scores);
        }
        out.fill(0.0);
        for p in 0..n_positions {
            let value = value(p);
            for (h, out) in out.chunks_exact_mut(value_width).enumerate() {
                axpy(isa, scores[h * n_positions + p], value, out);
            }
        }
    });
}

/// `x = exp(x - max) / sum`
fn softmax(x: &mut [f32]) {
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
