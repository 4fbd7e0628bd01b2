//! OCP MXFP8: E4M3 codes and one E8M0 scale per 32.

use super::minifloat::{E4M3, E4M3_MAX, e4m3_encode, e8m0, e8m0_encode_up};
use super::{PackedView, amax};

pub(super) const GROUP: usize = 32;

pub(super) fn dequantize_row(view: &PackedView<'_>, row: usize, out: &mut [f32]) {
    let groups = out.chunks_exact_mut(GROUP).zip(view.weight_row(row).chunks_exact(GROUP));
    for ((out, packed), scale) in groups.zip(view.scales_row(row)) {
        decode_e4m3(packed, e8m0(*scale), out);
    }
}

/// Quantises one group as MLX's CPU backend does, except that a scale below `2^-127` is clamped (MLX wraps the byte).
pub(super) fn quantize_group(group: &[f32], weight: &mut Vec<u8>, scales: &mut Vec<u8>) {
    let byte = e8m0_encode_up(amax(group) / E4M3_MAX);
    let scale = e8m0(byte);
    weight.extend(group.iter().map(|value| e4m3_encode(value / scale)));
    scales.push(byte);
}

/// Decodes one E4M3 byte per value.
#[inline]
pub(super) fn decode_e4m3(packed: &[u8], scale: f32, out: &mut [f32]) {
    for (value, code) in out.iter_mut().zip(packed) {
        *value = E4M3[usize::from(*code)] * scale;
    }
}
