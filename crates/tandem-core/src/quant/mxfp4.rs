//! OCP MXFP4: E2M1 codes, low nibble first, and one E8M0 scale per 32.

use super::minifloat::{E2M1_MAX, e8m0, e8m0_encode_up};
use super::{PackedView, amax, nvfp4};

pub(super) const GROUP: usize = 32;

pub(super) fn dequantize_row(view: &PackedView<'_>, row: usize, out: &mut [f32]) {
    let groups = out.chunks_exact_mut(GROUP).zip(view.weight_row(row).chunks_exact(GROUP / 2));
    for ((out, packed), scale) in groups.zip(view.scales_row(row)) {
        nvfp4::decode_e2m1(packed, e8m0(*scale), out);
    }
}

/// Quantises one group as MLX's CPU backend does; the scale is rounded up so that the largest value never saturates.
#[inline(always)]
pub(super) fn quantize_group(group: &[f32], weight: &mut Vec<u8>, scales: &mut Vec<u8>) {
    let scale = e8m0_encode_up(amax(group) / E2M1_MAX);
    nvfp4::encode_e2m1(group, e8m0(scale), weight);
    scales.push(scale);
}
