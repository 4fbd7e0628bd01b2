//! How far a backend may be from the scalar CPU kernels. Every tolerance of the suite is derived here, from element
//! types and lengths of sums; none is a number that made a test pass.
//!
//! Rounding to a type of unit roundoff `u` (2^-24 for f32, 2^-9 for bf16) moves a value `v` by at most `u |v|`. Seen as
//! random, the error has the variance `(u v)^2 / 3` at most. Independent errors add up as variances, so a [`Budget`]
//! holds the variance of the error of a result, relative to the mean square of the result itself:
//!
//! | step | variance |
//! |---|---|
//! | an elementwise operation of f32 | `u^2 / 3` |
//! | a sum of `n` products in f32, in any order | `(u^2 / 3) (1 + n / 2)`: each product is rounded once, and partial sums grow to the result's size over `n` additions, so that their squares add up to half of `n` times it |
//! | operands rounded to bf16 | `u^2 / 3` for each operand: errors of terms of random sign add up as the terms do |
//! | operands as 8-bit integers, scale `max / 127` per group | `(crest / 127)^2 / 12`: the error is even in plus and minus half a step, and `crest` is the largest value of a group in units of its root mean square |
//! | affine weights as `scale * code + bias` | what the sum costs, 15 times: for values even in -1..1 (mean square 1/3) both parts have mean squares of at most 4/3 and 1, and the difference is rounded once more |
//! | a sum of `n` products rounded towards zero after each 8 | not random, so it is added without a safety factor: `n / 8` roundings lose half of `2 u` of a partial sum each, which is 2/3 of the result's size on average: `u n / 12` |
//! | softmax shares | logits move by an absolute error `e`, shares by the relative error `e` |
//!
//! Both sides have errors of f32, which is why f32 steps count twice. What is compared is the root mean square of the
//! difference to that of the result, and [`SAFETY`] standard deviations are allowed: errors are not quite independent,
//! and results of few values scatter. A single value may be [`PEAK`] of these tolerances away.

/// Unit roundoff of f32.
const F32: f64 = 1.0 / (1 << 24) as f64;
/// Unit roundoff of bf16.
const BF16: f64 = 1.0 / (1 << 9) as f64;
/// Standard deviations that the root mean square of an error may have.
const SAFETY: f64 = 4.0;
/// Tolerances that a single value may be away: with [`SAFETY`], 32 standard deviations of a typical value, for values of
/// a result differ in size.
pub(crate) const PEAK: f64 = 8.0;
/// Crest of values that are even in -1..1: 1 over the root of 1/3.
pub(crate) const EVEN: f64 = 1.732;
/// Crest of the intermediate values of an MLP, `silu(gate) * up`: most of a group of 32 may lie in one value, at
/// sqrt(32), which would then be exact; half of it in one is the worst.
pub(crate) const GATED: f64 = 4.0;

/// What a backend rounds a group of operands to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Nothing: f32.
    None,
    /// bfloat16.
    Bf16,
    /// 8-bit integers with a scale per group of 32, or per vector of the indexer.
    Int8,
    /// 16-bit integers with a scale per group of 32.
    Int16,
}

/// How the sums of a backend's fastest matrix products are rounded; they are f32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// To the nearest, at each addition.
    Nearest,
    /// Towards zero, after each 8 products at most: tensor cores.
    TowardsZero,
}

/// The roundings of a backend under one of its numerics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Activations that meet MXFP4, 4-bit and 8-bit affine weights.
    pub packed: Rounding,
    /// Activations that meet NVFP4 and affine weights of other widths.
    pub other_packed: Rounding,
    /// Activations that meet the 8-bit floats of MXFP8 and of FP8 in blocks.
    pub fp8: Rounding,
    /// Activations that meet bf16 weights.
    pub bf16: Rounding,
    /// Affine weights in batches of more than 64 rows.
    pub prefill_weights: Rounding,
    /// Activations that meet packed weights in batches of more than 64 rows, where not as in smaller ones.
    pub prefill_packed: Option<Rounding>,
    /// Cached latents, keys and values.
    pub cache: Rounding,
    /// Queries that meet cached latents, and shares of the softmax that meet them as values.
    pub mla: Rounding,
    /// The same for grouped-query attention.
    pub gqa: Rounding,
    /// Keys and queries of the indexer.
    pub index: Rounding,
    /// Sums of products of matrices.
    pub sums: Sums,
    /// Bytes of MXFP4 scales below this one may decode as zero: byte `b` is `2^(b - 127)`.
    pub smallest_scale: u8,
    /// Whether NaN in a product's operands makes its result NaN, as IEEE has it and WGSL does not promise.
    pub keeps_nan: bool,
}

impl Precision {
    /// Single precision everywhere.
    pub const F32: Precision = Precision {
        packed: Rounding::None,
        other_packed: Rounding::None,
        fp8: Rounding::None,
        bf16: Rounding::None,
        prefill_weights: Rounding::None,
        prefill_packed: None,
        cache: Rounding::None,
        mla: Rounding::None,
        gqa: Rounding::None,
        index: Rounding::None,
        sums: Sums::Nearest,
        smallest_scale: 0,
        keeps_nan: true,
    };
}

/// The error of a result, relative to the result's root mean square.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Budget {
    /// Of random errors.
    variance: f64,
    /// Size of errors that all point the same way.
    bias: f64,
}

impl Budget {
    /// Copies and decoded powers of two.
    pub(crate) fn exact() -> Budget {
        Budget::default()
    }

    /// `n` elementwise operations of f32, on both sides.
    pub(crate) fn steps(n: usize) -> Budget {
        Budget { variance: 2.0 * n as f64 * F32 * F32 / 3.0, bias: 0.0 }
    }

    /// A sum of `n` products in f32, on both sides.
    pub(crate) fn sum(n: usize) -> Budget {
        Budget { variance: 2.0 * F32 * F32 / 3.0 * (1.0 + n as f64 / 2.0), bias: 0.0 }
    }

    /// What a sum of `n` products in a matrix product has besides.
    pub(crate) fn of_sums(sums: Sums, n: usize) -> Budget {
        let bias = if sums == Sums::TowardsZero { F32 * n as f64 / 12.0 } else { 0.0 };
        Budget { variance: 0.0, bias }
    }

    /// The same with weights as `scale * code + bias`.
    pub(crate) fn of_affine(self) -> Budget {
        Budget { variance: 15.0 * self.variance, bias: 15f64.sqrt() * self.bias }
    }

    /// Operands rounded, `crest` being their largest value in units of their root mean square.
    pub(crate) fn rounded(rounding: Rounding, crest: f64) -> Budget {
        let variance = match rounding {
            Rounding::None => 0.0,
            Rounding::Bf16 => BF16 * BF16 / 3.0,
            Rounding::Int8 => (crest / 127.0).powi(2) / 12.0,
            Rounding::Int16 => (crest / 32767.0).powi(2) / 12.0,
        };
        Budget { variance, bias: 0.0 }
    }

    /// Both errors.
    #[must_use]
    pub(crate) fn and(self, other: Budget) -> Budget {
        Budget { variance: self.variance + other.variance, bias: self.bias + other.bias }
    }

    /// The error `n` times, independent each time: `sqrt(n)` times its size.
    #[must_use]
    pub(crate) fn times(self, n: f64) -> Budget {
        Budget { variance: self.variance * n, bias: self.bias * n.sqrt() }
    }

    /// The tolerance: of the root mean square of a difference, relative to that of the result.
    pub(crate) fn tolerance(self) -> f64 {
        SAFETY * self.variance.sqrt() + self.bias
    }
}

/// Standard deviations that the error of one index score may have: among a million scores the largest has five.
const SCORE_SAFETY: f64 = 6.0;

/// What scores one row's positions.
pub(crate) struct Scores<'a> {
    /// `[heads, dim]`
    pub(crate) q: &'a [f32],
    /// `[heads]`
    pub(crate) weights: &'a [f32],
    /// Rounding of queries, each head by itself, and of keys.
    pub(crate) rounding: Rounding,
}

/// The score of a key, `sum_h weights[h] * relu(q[h] . key)`, and the largest error that a backend may make.
///
/// A rounded element of the key errs alike for all heads that let it pass, so that its error counts with the sum of their
/// weighted queries; rounded queries err by themselves, as do the sums in f32 of both sides.
pub(crate) fn score(scores: &Scores<'_>, key: &[f32]) -> (f64, f64) {
    let Scores { q, weights, rounding } = scores;
    let wide = |v: f32| f64::from(v);
    let step = |values: &[f32]| values.iter().fold(0.0, |m, v| f64::max(m, wide(*v).abs())) / 127.0;
    // The variance of a rounded element, the vector's step being known.
    let variance = |v: f32, step: f64| match rounding {
        Rounding::None => 0.0,
        Rounding::Bf16 => (BF16 * wide(v)).powi(2) / 3.0,
        Rounding::Int8 => step * step / 12.0,
        Rounding::Int16 => (step * 127.0 / 32767.0).powi(2) / 12.0,
    };
    let (mut value, mut error) = (0.0, 0.0);
    let mut passed = vec![0.0; key.len()];
    let key_step = step(key);
    for (q, weight) in q.chunks_exact(key.len()).zip(weights.iter().map(|w| wide(*w))) {
        let q_step = step(q);
        let (mut dot, mut own, mut of_key) = (0.0, 0.0, 0.0);
        for (q, k) in q.iter().zip(key) {
            let product = wide(*q) * wide(*k);
            dot += product;
            // Keys come from a norm and a rotation, whose few steps join those of the sum.
            own += wide(*k).powi(2) * variance(*q, q_step) + product.powi(2) * Budget::sum(key.len() + 32).variance;
            of_key += wide(*q).powi(2) * variance(*k, key_step);
        }
        value += weight * dot.max(0.0);
        // A head whose dot product may be positive for the backend counts too.
        if dot > -SCORE_SAFETY * (own + of_key).sqrt() {
            error += weight * weight * own;
            passed.iter_mut().zip(q).for_each(|(sum, q)| *sum += weight * wide(*q));
        }
    }
    error += passed.iter().zip(key).map(|(sum, k)| sum * sum * variance(*k, key_step)).sum::<f64>();
    (value, SCORE_SAFETY * error.sqrt())
}
