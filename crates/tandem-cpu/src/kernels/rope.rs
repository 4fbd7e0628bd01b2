//! Rotary position embedding (arXiv 2104.09864).

use tandem_core::backend::{Rope, RopeLayout};

/// cos and sin of every pair at `position`, angles in f64 so that long contexts stay exact: `[dim / 2]` each.
pub fn angles(rope: &Rope, position: u32, cos: &mut [f32], sin: &mut [f32]) {
    for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&rope.inv_freq) {
        let (s, c) = (f64::from(position) * f64::from(*frequency)).sin_cos();
        *cos = c as f32 * rope.scaling;
        *sin = s as f32 * rope.scaling;
    }
}

/// Rotates the first `2 * cos.len()` elements of `x` into `out` and copies the rest.
pub fn rotate(layout: RopeLayout, cos: &[f32], sin: &[f32], x: &[f32], out: &mut [f32]) {
    let half = cos.len();
    for i in 0..half {
        let (a, b) = match layout {
            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
            RopeLayout::Half => (i, i + half),
        };
        (out[a], out[b]) = (x[a] * cos[i] - x[b] * sin[i], x[b] * cos[i] + x[a] * sin[i]);
    }
    out[2 * half..].copy_from_slice(&x[2 * half..]);
}
