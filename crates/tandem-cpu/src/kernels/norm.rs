//! RMS norm and layer norm of one row.

/// `out = x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum_by_16(x, |v| v * v) / x.len() as f32 + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * w;
    }
}

/// `out = (x - mean) / sqrt(var + eps) * weight + bias` (arXiv 1607.06450).
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len() as f32;
    let mean = sum_by_16(x, |v| v) / n;
    let scale = 1.0 / (sum_by_16(x, |v| (v - mean) * (v - mean)) / n + eps).sqrt();
    for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = (x - mean) * scale * w + b;
    }
}

/// Sixteen partial sums: vectorises, and loses less than one long sum.
fn sum_by_16(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let chunks = x.chunks_exact(16);
    let tail: f32 = chunks.remainder().iter().map(|v| f(*v)).sum();
    for chunk in chunks {
        for (sum, v) in sums.iter_mut().zip(chunk) {
            *sum += f(*v);
        }
    }
    sums.iter().sum::<f32>() + tail
}
