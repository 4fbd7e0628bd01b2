//! NVIDIA FP4: E2M1 codes, low nibble first, one E4M3 scale per 16 and an optional f32 scale of the whole matrix.

use super::minifloat::{E2M1, E2M1_EXACT, E2M1_MAX, E4M3, E4M3_MAX, e2m1_encode, e2m1_encode_small, e4m3_encode};
use super::{PackedView, amax};

pub(super) const GROUP: usize = 16;

pub(super) fn dequantize_row(view: &PackedView<'_>, row: usize, out: &mut [f32]) {
    let groups = out.chunks_exact_mut(GROUP).zip(view.weight_row(row).chunks_exact(GROUP / 2));
    for ((out, packed), scale) in groups.zip(view.scales_row(row)) {
        decode_e2m1(packed, effective_scale(*scale, view.global_scale), out);
    }
}

/// Scale of a group: `e4m3(byte)`, times `global_scale / (448 * 6)` (divided first, as MLX rounds) where there is one.
#[inline]
pub(super) fn effective_scale(byte: u8, global_scale: Option<f32>) -> f32 {
    let scale = E4M3[usize::from(byte)];
    match global_scale {
        Some(global_scale) => scale * (global_scale / (E4M3_MAX * E2M1_MAX)),
        None => scale,
    }
}

/// Quantises one group as MLX's CPU backend does, without a global scale.
///
/// The scale is the nearest E4M3 to `amax / 6`, so groups with `amax` below about 0.006 become zeros.
#[inline(always)]
pub(super) fn quantize_group(group: &[f32], weight: &mut Vec<u8>, scales: &mut Vec<u8>) {
    let byte = e4m3_encode(amax(group) / E2M1_MAX);
    encode_e2m1(group, E4M3[usize::from(byte)], weight);
    scales.push(byte);
}

/// Decodes two E2M1 values per byte, low nibble first.
#[inline]
pub(super) fn decode_e2m1(packed: &[u8], scale: f32, out: &mut [f32]) {
    for (pair, byte) in out.chunks_exact_mut(2).zip(packed) {
        pair[0] = E2M1[usize::from(byte & 15)] * scale;
        pair[1] = E2M1[usize::from(byte >> 4)] * scale;
    }
}

/// Largest group that is encoded at once.
const MAX_GROUP: usize = 32;

/// Appends `group / scale` as E2M1, low nibble first.
#[inline(always)]
pub(super) fn encode_e2m1(group: &[f32], scale: f32, weight: &mut Vec<u8>) {
    let mut codes = [0u32; MAX_GROUP];
    let codes = &mut codes[..group.len()];
    if amax(group) / scale <= E2M1_EXACT {
        for (code, value) in codes.iter_mut().zip(group) {
            *code = e2m1_encode_small(value / scale);
        }
    } else {
        for (code, value) in codes.iter_mut().zip(group) {
            *code = u32::from(e2m1_encode(value / scale));
        }
    }
    weight.extend(codes.chunks_exact(2).map(|pair| (pair[0] | pair[1] << 4) as u8));
}
