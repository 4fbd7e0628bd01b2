//! The lightning indexer: which cached positions a query attends to (DeepSeek-V3.2 report, equation 1).

use super::vector::{Element, dot};
use crate::isa::Isa;

/// Score of each of `keys`: `sum_h weights[h] * relu(q[h] . key)`; `q [n_heads, dim]`.
pub fn scores<'a, E: Element>(
    isa: Isa,
    q: &[f32],
    weights: &[f32],
    keys: impl Iterator<Item = &'a [E]>,
    out: &mut [f32],
) {
    let dim = q.len() / weights.len();
    for (out, key) in out.iter_mut().zip(keys) {
        *out = weights.iter().zip(q.chunks_exact(dim)).map(|(w, q)| w * dot(isa, q, key).max(0.0)).sum();
    }
}

/// Positions of the `selected.len()` highest scores, ascending; all of them when there are fewer, then -1.
///
/// Among equal scores at the threshold the earlier positions win (the references leave this open).
pub fn select(scores: &[f32], scratch: &mut Vec<f32>, selected: &mut [i32]) {
    let k = selected.len();
    if scores.len() <= k {
        for (i, s) in selected.iter_mut().enumerate() {
            *s = if i < scores.len() { i as i32 } else { -1 };
        }
        return;
    }
    scratch.clear();
    scratch.extend_from_slice(scores);
    let (above, threshold, _) = scratch.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    let mut ties = k - above.iter().filter(|s| s.total_cmp(&threshold).is_gt()).count();
    let mut out = selected.iter_mut();
    for (position, score) in scores.iter().enumerate() {
        let order = score.total_cmp(&threshold);
        if order.is_gt() || (order.is_eq() && ties > 0) {
            if order.is_eq() {
                ties -= 1;
            }
            if let Some(slot) = out.next() {
                *slot = position as i32;
            }
        }
    }
}
