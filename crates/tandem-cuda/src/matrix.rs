//! Matrices on the device: elements as they are stored, scales padded to whole 16-byte loads.

use std::sync::Arc;

use tandem_core::DType;
use tandem_core::dtype::{FP8_BLOCK, Float};
use tandem_core::weights::{MatrixData, MatrixPart};

use crate::args;
use crate::driver::{Device, Memory};

/// Numbers of the formats in common.cuh.
const F32: u32 = 0;
const F16: u32 = 1;
const BF16: u32 = 2;
pub(crate) const MXFP4: u32 = 3;
const MXFP8: u32 = 4;
const NVFP4: u32 = 5;
const FP8_BLOCK_FORMAT: u32 = 6;
const AFFINE_F32: u32 = 7;
const AFFINE_BF16: u32 = 8;

/// Bytes of mma_rows.cuh's MXFP4 scales, which must stay normal bf16 numbers after its shift by 2^-64.
const FAST_E8M0: std::ops::RangeInclusive<u8> = 96..=192;
/// NVFP4's global scales are relative to the largest product of its element and scale, 6 * 448.
const NVFP4_LARGEST: f32 = 2688.0;

/// A matrix or a stack of equal ones.
pub struct CudaMatrix {
    pub(crate) view: args::Matrix,
    pub(crate) parts: usize,
    _memory: [Memory; 3],
}

impl std::fmt::Debug for CudaMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaMatrix {:?}", self.view)
    }
}

impl CudaMatrix {
    /// Rows of each matrix.
    pub(crate) fn rows(&self) -> usize {
        self.view.rows as usize
    }

    /// Columns of each matrix.
    pub(crate) fn cols(&self) -> usize {
        self.view.cols as usize
    }

    /// True if the tensor-core kernels read this format.
    pub(crate) fn fast(&self) -> bool {
        self.view.fast != 0
    }

    /// Copies a matrix to the device.
    pub(crate) fn load(device: &Arc<Device>, data: &MatrixData) -> CudaMatrix {
        let (rows, cols, dtype) = (data.rows, data.cols, data.dtype);
        let row_bytes = dtype.weight_bytes(1, cols);
        let (format, bits, group) = match dtype {
            DType::Float(Float::F32) => (F32, 32, 1),
            DType::Float(Float::F16) => (F16, 16, 1),
            DType::Float(Float::BF16) => (BF16, 16, 1),
            DType::Mxfp4 => (MXFP4, 4, 32),
            DType::Mxfp8 => (MXFP8, 8, 32),
            DType::Nvfp4 => (NVFP4, 4, 16),
            DType::Fp8Block => (FP8_BLOCK_FORMAT, 8, FP8_BLOCK as u32),
            DType::Affine { bits, group_size, params: Float::BF16 } => (AFFINE_BF16, bits.into(), group_size.into()),
            DType::Affine { bits, group_size, .. } => (AFFINE_F32, bits.into(), group_size.into()),
        };
        let scale_row = scale_row_bytes(dtype, cols);
        let scale_pitch = scale_row.next_multiple_of(16);
        let scale_rows = if dtype == DType::Fp8Block { rows.div_ceil(FP8_BLOCK) } else { rows };
        let (weight_part, scale_part) = (rows * row_bytes, scale_rows * scale_pitch);
        // A margin, as kernels may load whole vectors at the end of the last row.
        let weight = device.alloc(weight_part * data.parts.len() + 16);
        let scales = device.alloc(scale_part * data.parts.len());
        let mut fast_scales = true;
        for (i, part) in data.parts.iter().enumerate() {
            // Weights made up for a benchmark share their bytes: those need not cross the bus again.
            if i > 0 && std::ptr::eq(part.weight.as_ptr(), data.parts[0].weight.as_ptr()) && !part.weight.is_empty() {
                device.copy(weight.pointer() + (i * weight_part) as u64, weight.pointer(), weight_part);
                device.copy(scales.pointer() + (i * scale_part) as u64, scales.pointer(), scale_part);
                continue;
            }
            device.upload(weight.pointer() + (i * weight_part) as u64, &part.weight);
            if scale_row == 0 {
                continue;
            }
            let to = scales.pointer() + (i * scale_part) as u64;
            fast_scales &= dtype != DType::Mxfp4 || part.scales.iter().all(|e| FAST_E8M0.contains(e) || *e == 0);
            if scale_pitch == scale_row && !matches!(dtype, DType::Affine { .. }) {
                device.upload(to, &part.scales);
            } else {
                device.upload(to, &padded_scales(dtype, part, scale_rows, scale_row, scale_pitch));
            }
        }
        let globals: Vec<f32> = data.parts.iter().filter_map(|p| p.global_scale).map(|g| g / NVFP4_LARGEST).collect();
        let has_globals = globals.len() == data.parts.len() && !globals.is_empty();
        let globals_memory = device.alloc(globals.len() * 4);
        device.upload(globals_memory.pointer(), bytemuck::cast_slice(&globals));
        let fast = match dtype {
            DType::Mxfp4 => fast_scales,
            DType::Affine { bits: 8, group_size: 64, params: Float::BF16 } => true,
            _ => false,
        };
        CudaMatrix {
            view: args::Matrix {
                weight: weight.pointer(),
                scales: scales.pointer(),
                globals: if has_globals { globals_memory.pointer() } else { 0 },
                weight_part: weight_part as u64,
                scale_part: scale_part as u64,
                rows: rows as u32,
                cols: cols as u32,
                row_bytes: row_bytes as u32,
                scale_pitch: scale_pitch as u32,
                format,
                bits,
                group,
                fast: fast.into(),
            },
            parts: data.parts.len(),
            _memory: [weight, scales, globals_memory],
        }
    }
}

/// Bytes of one row of scales on the device.
fn scale_row_bytes(dtype: DType, cols: usize) -> usize {
    match dtype {
        DType::Affine { params, .. } => {
            let pair = if params == Float::BF16 { 4 } else { 8 };
            cols / dtype.group_size() * pair
        }
        DType::Fp8Block => cols.div_ceil(FP8_BLOCK) * 4,
        _ => dtype.scale_bytes(1, cols),
    }
}

/// Scales (with biases beside them, for affine) in rows of `pitch` bytes.
fn padded_scales(dtype: DType, part: &MatrixPart, rows: usize, row: usize, pitch: usize) -> Vec<u8> {
    let mut out = vec![0u8; rows * pitch];
    if let DType::Affine { params, .. } = dtype {
        let n_groups = part.scales.len() / params.bytes() / rows;
        for (r, out) in out.chunks_exact_mut(pitch).enumerate() {
            for g in 0..n_groups {
                let i = r * n_groups + g;
                if params == Float::BF16 {
                    out[g * 4..g * 4 + 2].copy_from_slice(&part.scales[i * 2..i * 2 + 2]);
                    out[g * 4 + 2..g * 4 + 4].copy_from_slice(&part.biases[i * 2..i * 2 + 2]);
                } else {
                    out[g * 8..g * 8 + 4].copy_from_slice(&params.read(&part.scales, i).to_le_bytes());
                    out[g * 8 + 4..g * 8 + 8].copy_from_slice(&params.read(&part.biases, i).to_le_bytes());
                }
            }
        }
    } else {
        for (out, from) in out.chunks_exact_mut(pitch).zip(part.scales.chunks_exact(row)) {
            out[..row].copy_from_slice(from);
        }
    }
    out
}
