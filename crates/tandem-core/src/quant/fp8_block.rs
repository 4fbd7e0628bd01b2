//! Hugging Face block FP8: E4M3 codes and one f32 `weight_scale_inv` per 128 x 128 block, edge blocks partial.

use super::minifloat::{E4M3_MAX, e4m3_encode};
use super::{PackedView, amax, mxfp8};
use crate::dtype::{FP8_BLOCK, Float};

pub(super) fn dequantize_row(view: &PackedView<'_>, row: usize, out: &mut [f32]) {
    let first_block = row / FP8_BLOCK * view.cols.div_ceil(FP8_BLOCK);
    let blocks = out.chunks_mut(FP8_BLOCK).zip(view.weight_row(row).chunks(FP8_BLOCK));
    for (block, (out, packed)) in blocks.enumerate() {
        mxfp8::decode_e4m3(packed, Float::F32.read(view.scales, first_block + block), out);
    }
}

/// Quantises `[rows, cols]`: `scale_inv = amax / 448` (1 when that is zero), codes are the nearest-even E4M3.
pub(super) fn quantize(cols: usize, values: &[f32], weight: &mut Vec<u8>, scales: &mut Vec<u8>) {
    if cols == 0 {
        return;
    }
    for band in values.chunks(FP8_BLOCK * cols) {
        let scale_inv: Vec<f32> = (0..cols)
            .step_by(FP8_BLOCK)
            .map(|start| {
                let end = cols.min(start + FP8_BLOCK);
                let largest = band.chunks_exact(cols).map(|row| amax(&row[start..end])).fold(0.0, f32::max);
                let scale = largest / E4M3_MAX;
                if scale == 0.0 { 1.0 } else { scale }
            })
            .collect();
        for row in band.chunks_exact(cols) {
            for (block, scale) in row.chunks(FP8_BLOCK).zip(&scale_inv) {
                weight.extend(block.iter().map(|value| e4m3_encode(value / scale)));
            }
        }
        scales.extend(scale_inv.iter().flat_map(|scale| scale.to_le_bytes()));
    }
}
