//! Affine groups: `w = scale * q + bias`, `q` unsigned; a scale may be negative.

use super::{PackedView, bitstream};
use crate::dtype::Float;

/// Codes of the largest group.
pub(super) const MAX_GROUP: usize = 128;

/// Least magnitude of a scale, MLX's guard against a group of equal values.
const MIN_SCALE: f32 = 1e-7;

#[inline(always)]
pub(super) fn dequantize_row(
    view: &PackedView<'_>,
    row: usize,
    bits: usize,
    group: usize,
    params: Float,
    out: &mut [f32],
) {
    let (weight, scales, biases) = (view.weight_row(row), view.scales_row(row), view.biases_row(row));
    let mut codes = [0; MAX_GROUP];
    let codes = &mut codes[..group];
    for (g, (out, packed)) in out.chunks_exact_mut(group).zip(weight.chunks_exact(group * bits / 8)).enumerate() {
        let (scale, bias) = (params.read(scales, g), params.read(biases, g));
        bitstream::unpack(bits, packed, codes);
        for (value, code) in out.iter_mut().zip(&*codes) {
            // Two roundings, not a fused multiply-add: the goldens store this result.
            *value = scale * f32::from(*code) + bias;
        }
    }
}

/// Quantises one group as MLX's CPU backend does, to the same bits.
///
/// The codes come from the f32 scale and bias, which are rounded to `params` only when stored. The end of the range
/// that is farther from zero is the bias and is exact; the scale is adjusted so that zero is a code.
#[inline(always)]
pub(super) fn quantize_group(
    group: &[f32],
    bits: usize,
    params: Float,
    weight: &mut Vec<u8>,
    scales: &mut Vec<u8>,
    biases: &mut Vec<u8>,
) {
    let max_code = ((1u32 << bits) - 1) as f32;
    let (low, high) = range(group);
    let low_is_edge = low.abs() > high.abs();
    let edge = if low_is_edge { low } else { high };

    let step = ((high - low) / max_code).max(MIN_SCALE);
    let mut scale = if low_is_edge { step } else { -step };
    let mut bias = 0.0;
    let zero_code = (edge / scale).round_ties_even();
    if zero_code != 0.0 {
        scale = edge / zero_code;
        bias = edge;
    }

    let mut codes = [0; MAX_GROUP];
    encode(group, scale, bias, max_code, &mut codes);
    bitstream::pack(bits, &codes[..group.len()], weight);
    params.write(scale, scales);
    params.write(bias, biases);
}

/// Smallest and largest value; eight lanes, because a chain of minima does not vectorise.
#[inline(always)]
pub(super) fn range(group: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
    for values in group.as_chunks::<8>().0 {
        for (lane, value) in values.iter().enumerate() {
            low[lane] = if *value < low[lane] { *value } else { low[lane] };
            high[lane] = if *value > high[lane] { *value } else { high[lane] };
        }
    }
    (low.into_iter().fold(f32::INFINITY, f32::min), high.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// `1.5 * 2^23`: added to a small f32 it rounds it to an integer, ties to even, which the lowest bits then hold.
const ROUND: f32 = 12_582_912.0;

/// [`code`] of each value.
#[inline(always)]
pub(super) fn encode(group: &[f32], scale: f32, bias: f32, max_code: f32, codes: &mut [u8; MAX_GROUP]) {
    codes.iter_mut().zip(group).for_each(|(found, value)| *found = code(*value, scale, bias, max_code));
}

/// `(value - bias) / scale`, rounded to nearest even and clamped to `0..=max_code`; NaN gives 0.
#[inline(always)]
pub(super) fn code(value: f32, scale: f32, bias: f32, max_code: f32) -> u8 {
    let scaled = (value - bias) / scale;
    let clamped = if scaled > 0.0 { scaled } else { 0.0 };
    let clamped = if clamped < max_code { clamped } else { max_code };
    (clamped + ROUND).to_bits() as u8
}
