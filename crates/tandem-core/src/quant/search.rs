//! Quantising with less error than rounding to nearest, at the same bytes: scales found by search, and codes that
//! compensate for the errors of those before them.
//!
//! The searches minimise a weighted squared error of the weights. Compensation is GPTQ (Frantar et al., arXiv 2210.17323):
//! it minimises the squared error of the product with inputs of a known covariance.

use super::minifloat::{E2M1, E2M1_MAX, E4M3, E4M3_MAX, e2m1_encode_small, e4m3_encode, e8m0, e8m0_encode_up};
use super::{Packed, QuantError, affine, amax, bitstream, check_range, check_values, wide};
use crate::dtype::{DType, Float};

/// What is known about the inputs of a matrix: their covariance, factored for compensating errors. Columns are cut into
/// blocks; those of different blocks count as independent.
#[derive(Clone, Debug)]
pub struct Covariance {
    block: usize,
    /// `[cols, block]`: for each column, what an error of 1 there takes from the columns after it in its block. Row `i`
    /// of the upper Cholesky factor of the inverse of the block's damped covariance, divided by its diagonal element.
    feedback: Vec<f32>,
    /// `[cols]`, the diagonal of the damped covariance.
    moments: Vec<f32>,
}

impl Covariance {
    /// From sums `products`, `[cols, block]` row-major: row `i` has the products of input `i` with the inputs of its block,
    /// of which those from `i` on are read. A block of 1 gives second moments alone. `damping` is a share of the mean
    /// moment that is added to the diagonal. `None` when that is not positive definite.
    ///
    /// # Panics
    /// When `products` has another length.
    pub fn new(cols: usize, block: usize, products: &[f32], damping: f64) -> Option<Covariance> {
        assert_eq!(products.len(), cols * block, "a row of {block} products for each of {cols} columns");
        let mean = (0..cols).map(|i| f64::from(products[i * block + i % block])).sum::<f64>() / cols.max(1) as f64;
        if mean.is_nan() || mean <= 0.0 {
            return None;
        }
        let mut covariance = Covariance { block, feedback: vec![0.0; cols * block], moments: vec![0.0; cols] };
        for first in (0..cols).step_by(block) {
            let n = block.min(cols - first);
            let mut matrix: Vec<f64> = (0..n * n)
                .map(|k| {
                    let (i, j) = (k / n, k % n);
                    let product = f64::from(products[(first + i.min(j)) * block + i.max(j)]);
                    product + if i == j { damping * mean } else { 0.0 }
                })
                .collect();
            (0..n).for_each(|i| covariance.moments[first + i] = matrix[i * n + i] as f32);
            // H = L L^T of the reversed matrix; L's inverse, reversed back, is the upper U of H^-1 = U^T U.
            matrix.reverse();
            let lower = cholesky(&matrix, n)?;
            let mut upper = invert_lower(&lower, n);
            upper.reverse();
            for (i, row) in upper.chunks_exact(n).enumerate() {
                let feedback = &mut covariance.feedback[(first + i) * block..][..n];
                feedback.iter_mut().zip(row).for_each(|(feedback, value)| *feedback = (value / row[i]) as f32);
            }
        }
        Some(covariance)
    }
}

/// The lower factor of a symmetric positive definite matrix.
fn cholesky(matrix: &[f64], n: usize) -> Option<Vec<f64>> {
    let mut lower = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| lower[i * n + k] * lower[j * n + k]).sum();
            let rest = matrix[i * n + j] - dot;
            lower[i * n + j] = if i == j {
                if rest.is_nan() || rest <= 0.0 {
                    return None;
                }
                rest.sqrt()
            } else {
                rest / lower[j * n + j]
            };
        }
    }
    Some(lower)
}

/// The inverse of a lower triangular matrix.
fn invert_lower(lower: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    for i in 0..n {
        let (above, row) = inverse.split_at_mut(i * n);
        for k in 0..i {
            let factor = lower[i * n + k];
            for (value, known) in row[..=k].iter_mut().zip(&above[k * n..k * n + k + 1]) {
                *value -= factor * known;
            }
        }
        row[i] = 1.0;
        let diagonal = lower[i * n + i];
        row[..=i].iter_mut().for_each(|value| *value /= diagonal);
    }
    inverse
}

/// Quantises `values`, `[rows, cols]` f32 row-major, to fewer errors than [`super::quantize`] makes and the same bytes:
/// errors of the product with inputs of that covariance, or of the weights when it is not known. For formats with groups.
///
/// # Errors
/// As [`super::quantize`].
///
/// # Panics
/// For plain floats and [`DType::Fp8Block`], which have nothing to search.
pub fn quantize_searched(
    dtype: DType,
    rows: usize,
    cols: usize,
    values: &[f32],
    inputs: Option<&Covariance>,
) -> Result<Packed, QuantError> {
    check_values(dtype, rows, cols, values)?;
    let mut packed = Packed { dtype, rows, cols, weight: vec![], scales: vec![], biases: vec![] };
    let group = dtype.group_size();
    let ones = if inputs.is_none() { vec![1.0; cols] } else { vec![] };
    let moments = inputs.map_or(&ones, |covariance| &covariance.moments);
    assert_eq!(moments.len(), cols, "one moment per column");
    let mut current = vec![0.0; cols];
    let mut codes = vec![0u8; cols];
    wide(|| {
        for row in values.chunks_exact(cols.max(1)) {
            current.copy_from_slice(row);
            for first in (0..cols).step_by(group) {
                let end = first + group;
                let scale = find_scale(dtype, &current[first..end], &moments[first..end]);
                for j in first..end {
                    let value = current[j];
                    codes[j] = scale.encode(value);
                    if let Some(Covariance { block, feedback, .. }) = inputs {
                        let error = value - scale.decode(codes[j]);
                        let feedback = &feedback[j * block..(j + 1) * block][j % block + 1..];
                        for (later, feedback) in current[j + 1..].iter_mut().zip(feedback) {
                            *later -= error * feedback;
                        }
                    }
                }
                scale.write(&codes[first..end], &mut packed);
            }
        }
    });
    check_range(&packed, values)?;
    Ok(packed)
}

/// The parameters of one group, as they are stored.
#[derive(Clone, Copy, Debug)]
enum Scale {
    Affine { bits: usize, params: Float, scale: f32, bias: f32 },
    E2m1 { byte: u8, scale: f32 },
    E4m3 { byte: u8, scale: f32 },
}

impl Scale {
    #[inline(always)]
    fn encode(&self, value: f32) -> u8 {
        match *self {
            Scale::Affine { bits, scale, bias, .. } => affine::code(value, scale, bias, max_code(bits)),
            Scale::E2m1 { scale, .. } => e2m1_encode_small((value / scale).clamp(-E2M1_MAX, E2M1_MAX)) as u8,
            Scale::E4m3 { scale, .. } => e4m3_encode(value / scale),
        }
    }

    #[inline(always)]
    fn decode(&self, code: u8) -> f32 {
        match *self {
            Scale::Affine { scale, bias, .. } => scale * f32::from(code) + bias,
            Scale::E2m1 { scale, .. } => E2M1[usize::from(code)] * scale,
            Scale::E4m3 { scale, .. } => E4M3[usize::from(code)] * scale,
        }
    }

    #[inline(always)]
    fn error(&self, values: &[f32], moments: &[f32]) -> f64 {
        // Differences first: those of integers vectorise.
        let mut errors = [0.0f32; affine::MAX_GROUP];
        match *self {
            Scale::Affine { bits, scale, bias, .. } => {
                let mut codes = [0; affine::MAX_GROUP];
                affine::encode(values, scale, bias, max_code(bits), &mut codes);
                let decoded = codes.iter().map(|code| scale * f32::from(*code) + bias);
                errors.iter_mut().zip(values).zip(decoded).for_each(|((error, value), found)| *error = value - found);
            }
            _ => errors.iter_mut().zip(values).for_each(|(error, v)| *error = v - self.decode(self.encode(*v))),
        }
        errors.iter().zip(moments).map(|(error, moment)| f64::from(*error).powi(2) * f64::from(*moment)).sum()
    }

    fn write(&self, codes: &[u8], packed: &mut Packed) {
        match *self {
            Scale::Affine { bits, params, scale, bias } => {
                bitstream::pack(bits, codes, &mut packed.weight);
                params.write(scale, &mut packed.scales);
                params.write(bias, &mut packed.biases);
            }
            Scale::E2m1 { byte, .. } => {
                bitstream::pack(4, codes, &mut packed.weight);
                packed.scales.push(byte);
            }
            Scale::E4m3 { byte, .. } => {
                packed.weight.extend_from_slice(codes);
                packed.scales.push(byte);
            }
        }
    }
}

/// The largest code of an affine format.
fn max_code(bits: usize) -> f32 {
    ((1u32 << bits) - 1) as f32
}

/// Shares of a group's range that the search starts from.
const SHRINK: [f32; 7] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6];
/// Least-squares steps from each.
const REFITS: usize = 2;

/// The scale with the least error; mlx's own where none is better.
#[inline(always)]
fn find_scale(dtype: DType, values: &[f32], moments: &[f32]) -> Scale {
    let largest = amax(values);
    let candidates: Vec<Scale> = match dtype {
        DType::Mxfp4 => {
            let best = e8m0_encode_up(largest / E2M1_MAX);
            let bytes = [0, 1, 2].map(|less| best.saturating_sub(less));
            bytes.map(|byte| Scale::E2m1 { byte, scale: e8m0(byte) }).to_vec()
        }
        DType::Mxfp8 => {
            let best = e8m0_encode_up(largest / E4M3_MAX);
            [0, 1].map(|less| best.saturating_sub(less)).map(|byte| Scale::E4m3 { byte, scale: e8m0(byte) }).to_vec()
        }
        DType::Nvfp4 => {
            let best = e4m3_encode(largest / E2M1_MAX);
            let bytes =
                (best.saturating_sub(6).max(best.min(1))..=best.saturating_add(4).min(0x7e)).collect::<Vec<u8>>();
            let nearest = std::iter::once(best).chain(bytes);
            nearest.map(|byte| Scale::E2m1 { byte, scale: E4M3[usize::from(byte)].max(f32::MIN_POSITIVE) }).collect()
        }
        DType::Affine { bits, params, .. } => affine_candidates(bits.into(), params, values, moments),
        DType::Float(_) | DType::Fp8Block => unreachable!("{dtype} has no groups to search"),
    };
    let mut best = (f64::INFINITY, candidates[0]);
    for candidate in candidates {
        let error = candidate.error(values, moments);
        if error < best.0 {
            best = (error, candidate);
        }
    }
    best.1
}

#[inline(always)]
fn affine_candidates(bits: usize, params: Float, values: &[f32], moments: &[f32]) -> Vec<Scale> {
    let rounded = |value: f32| {
        let mut bytes = vec![];
        params.write(value, &mut bytes);
        params.read(&bytes, 0)
    };
    let affine = |scale: f32, bias: f32| Scale::Affine { bits, params, scale: rounded(scale), bias: rounded(bias) };
    let max_code = max_code(bits);
    let mut codes = [0; affine::MAX_GROUP];
    let (mut scales, mut biases) = (vec![], vec![]);
    affine::quantize_group(values, bits, params, &mut vec![], &mut scales, &mut biases);
    let mut candidates = vec![affine(params.read(&scales, 0), params.read(&biases, 0))];
    let (low, high) = affine::range(values);
    for shrink in SHRINK {
        let (mut scale, mut bias) = (((high - low) * shrink / max_code).max(1e-7), low * shrink);
        for _ in 0..=REFITS {
            if !rounded(scale).is_normal() || !rounded(bias).is_finite() {
                break;
            }
            candidates.push(affine(scale, bias));
            // Weighted least squares of value = scale * code + bias.
            affine::encode(values, scale, bias, max_code, &mut codes);
            let mut sums = [0.0f64; 5];
            for ((value, moment), code) in values.iter().zip(moments).zip(codes) {
                let (q, v, m) = (f64::from(code), f64::from(*value), f64::from(*moment));
                for (sum, term) in sums.iter_mut().zip([1.0, q, q * q, v, q * v]) {
                    *sum += m * term;
                }
            }
            let [n, q, qq, v, qv] = sums;
            let determinant = n * qq - q * q;
            if determinant.is_nan() || determinant <= 1e-12 * n * qq {
                break;
            }
            (scale, bias) = (((n * qv - q * v) / determinant) as f32, ((qq * v - q * qv) / determinant) as f32);
        }
    }
    candidates
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::quantize;
    use super::*;

    fn error(packed: &Packed, values: &[f32]) -> f64 {
        packed.view().dequantize().iter().zip(values).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    fn formats() -> impl Strategy<Value = DType> {
        prop::sample::select(vec![
            DType::Mxfp4,
            DType::Mxfp8,
            DType::Nvfp4,
            DType::Affine { bits: 4, group_size: 32, params: Float::F32 },
            DType::Affine { bits: 3, group_size: 64, params: Float::BF16 },
        ])
    }

    proptest! {
        #[test]
        fn searching_never_increases_the_error(dtype in formats(), values in prop::collection::vec(-4.0f32..4.0, 2 * 128)) {
            let plain = quantize(dtype, 2, 128, &values).expect("fits");
            let searched = quantize_searched(dtype, 2, 128, &values, None).expect("fits");
            prop_assert_eq!((plain.weight.len(), plain.scales.len()), (searched.weight.len(), searched.scales.len()));
            let (found, limit) = (error(&searched, &values), error(&plain, &values));
            // Codes are the nearest of the stored scales, of which the plain one is a candidate; decoding rounds.
            prop_assert!(found <= limit * (1.0 + 1e-6), "{}: {} instead of at most {}", dtype, found, limit);
        }
    }

    /// Inputs that are nearly one-dimensional: compensated codes keep the products.
    #[test]
    fn compensation_lowers_the_error_of_products() {
        let cols = 64;
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let inputs: Vec<f32> = (0..200)
            .flat_map(|_| {
                let common = random();
                (0..cols).map(|_| common + 0.3 * random()).collect::<Vec<_>>()
            })
            .collect();
        let mut covariance = vec![0.0; cols * cols];
        for x in inputs.chunks_exact(cols) {
            for i in 0..cols {
                for j in 0..cols {
                    covariance[i * cols + j] += x[i] * x[j];
                }
            }
        }
        let values: Vec<f32> = (0..8 * cols).map(|_| random()).collect();
        let of = |known: Option<&Covariance>| {
            let packed = quantize_searched(DType::Mxfp4, 8, cols, &values, known).expect("fits");
            let found = packed.view().dequantize();
            let mut sum = 0.0f64;
            for x in inputs.chunks_exact(cols) {
                for (a, b) in found.chunks_exact(cols).zip(values.chunks_exact(cols)) {
                    let product: f32 = a.iter().zip(b).zip(x).map(|((a, b), x)| (a - b) * x).sum();
                    sum += f64::from(product).powi(2);
                }
            }
            sum
        };
        let plain = of(None);
        // Whole, and in blocks of which the last is shorter.
        for (block, most) in [(64, 0.6), (24, 0.9)] {
            let of_block = |i: usize| (0..block).map(move |k| (i, i / block * block + k));
            let products: Vec<f32> = (0..cols)
                .flat_map(of_block)
                .map(|(i, j)| if j < cols { covariance[i * cols + j] } else { 0.0 })
                .collect();
            let compensated = of(Covariance::new(cols, block, &products, 0.01).as_ref());
            assert!(compensated < most * plain, "block {block}: {compensated} against {plain}");
        }
    }

    #[test]
    fn moments_alone_weigh_columns() {
        let values: Vec<f32> = (0..32).map(|i| 0.1 + i as f32 * 0.37 % 1.0).collect();
        let products: Vec<f32> = (0..32).map(|i| if i == 5 { 1e4 } else { 1e-4 }).collect();
        let moments = Covariance::new(32, 1, &products, 0.0).expect("positive");
        let dtype = DType::Affine { bits: 2, group_size: 32, params: Float::F32 };
        let found = quantize_searched(dtype, 1, 32, &values, Some(&moments)).expect("fits").view().dequantize();
        let plain = quantize_searched(dtype, 1, 32, &values, None).expect("fits").view().dequantize();
        assert!((found[5] - values[5]).abs() < (plain[5] - values[5]).abs(), "{} {}", found[5], plain[5]);
        assert!(Covariance::new(32, 1, &[0.0; 32], 0.1).is_none());
    }
}
