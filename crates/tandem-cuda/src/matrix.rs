//! Matrices on the device: in the tiles of common.cuh where a tensor-core kernel reads the format, else as they are stored,
//! scales padded to whole 16-byte loads.

use std::sync::Arc;

use bytemuck::Zeroable;
use tandem_core::DType;
use tandem_core::dtype::{FP8_BLOCK, Float};
use tandem_core::weights::{MatrixData, MatrixPart};

use crate::args::{self, RepackArgs};
use crate::driver::{Device, Memory};
use crate::preamble::{Format, TILE_BYTES, TILE_ROW_BYTES, TILE_ROWS, Tiled};
use crate::stager::{Piece, Stager};

/// Bytes of mma_rows.cuh's MXFP4 scales, which must stay normal bf16 numbers after its shift by 2^-64.
const TILED_E8M0: std::ops::RangeInclusive<u8> = 96..=192;
/// NVFP4's global scales are relative to the largest product of its element and scale, 6 * 448.
const NVFP4_LARGEST: f32 = 2688.0;

/// A matrix or a stack of equal ones.
pub struct CudaMatrix {
    pub(crate) view: args::Matrix,
    pub(crate) parts: usize,
    /// If tensor-core kernels read it.
    pub(crate) tiled: Option<Tiled>,
    /// Its number among the experts that stay on the host.
    pub(crate) on_host: Option<usize>,
    _memory: Vec<Memory>,
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

    /// Without its weights on the device.
    pub(crate) fn empty(data: &MatrixData) -> CudaMatrix {
        let view = args::Matrix { rows: data.rows as u32, cols: data.cols as u32, ..args::Matrix::zeroed() };
        CudaMatrix { view, parts: data.parts.len(), tiled: None, on_host: None, _memory: vec![] }
    }

    /// In memory of the host, where it is known by `number`.
    pub(crate) fn on_host(data: &MatrixData, number: usize) -> CudaMatrix {
        CudaMatrix { on_host: Some(number), ..CudaMatrix::empty(data) }
    }

    /// Copies a matrix to the device.
    pub(crate) fn load(device: &Arc<Device>, stager: &mut Stager, data: &MatrixData) -> CudaMatrix {
        let (rows, cols, dtype) = (data.rows, data.cols, data.dtype);
        let bytes = data.parts.iter().map(|p| p.weight.len() + p.scales.len() + p.biases.len()).sum();
        let tile_rows = TILE_ROWS * (dtype.weight_bytes(1, cols) + 2 * dtype.scale_bytes(1, cols));
        if !stager.prepare(device, bytes, tile_rows) {
            return CudaMatrix::empty(data);
        }
        let (format, bits, group) = match dtype {
            DType::Float(Float::F32) => (Format::F32, 32, 1),
            DType::Float(Float::F16) => (Format::F16, 16, 1),
            DType::Float(Float::BF16) => (Format::Bf16, 16, 1),
            DType::Mxfp4 => (Format::Mxfp4, 4, 32),
            DType::Mxfp8 => (Format::Mxfp8, 8, 32),
            DType::Nvfp4 => (Format::Nvfp4, 4, 16),
            DType::Fp8Block => (Format::Fp8Block, 8, FP8_BLOCK as u32),
            DType::Affine { bits, group_size, params: Float::BF16 } => {
                (Format::AffineBf16, bits.into(), group_size.into())
            }
            DType::Affine { bits, group_size, .. } => (Format::AffineF32, bits.into(), group_size.into()),
        };
        let tiled = match dtype {
            DType::Mxfp4 => stager.check(|| has_tiled_scales(data)).then_some(Tiled::Mxfp4),
            DType::Affine { bits: 8, group_size: 64, params: Float::BF16 } => Some(Tiled::Affine8),
            _ => None,
        };
        assert!(tiled.is_none_or(|tiled| tiled.format() == format), "{tiled:?} is another format than {dtype}");
        let mut view = args::Matrix {
            rows: rows as u32,
            cols: cols as u32,
            format: format as u32,
            bits,
            group,
            tiled: tiled.is_some().into(),
            ..args::Matrix::zeroed()
        };
        let memory = match tiled {
            Some(Tiled::Mxfp4 | Tiled::Affine8) => load_tiles(device, stager, data, &mut view),
            None => load_rows(device, stager, data, &mut view),
        };
        CudaMatrix { view, parts: data.parts.len(), tiled, on_host: None, _memory: memory }
    }
}

/// True if the row kernels' arithmetic holds every scale of an MXFP4 matrix.
fn has_tiled_scales(data: &MatrixData) -> bool {
    let fits = |part: &MatrixPart| {
        // Zero is as good as a usual one. Extremes of blocks, so that this takes vector instructions.
        part.scales.chunks(4096).all(|block| {
            let (low, high) = block.iter().fold((255, 0), |(low, high), e| {
                let e = if *e == 0 { 127 } else { *e };
                (e.min(low), e.max(high))
            });
            TILED_E8M0.contains(&low) && TILED_E8M0.contains(&high)
        })
    };
    let parts = if is_repeated(data, 1) { &data.parts[..1] } else { &data.parts[..] };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    if parts.len() < 8 {
        return parts.iter().all(fits);
    }
    std::thread::scope(|scope| {
        let shares: Vec<_> = parts
            .chunks(parts.len().div_ceil(threads))
            .map(|share| scope.spawn(move || share.iter().all(fits)))
            .collect();
        shares.into_iter().all(|share| share.join().unwrap_or(false))
    })
}

/// Weights made up for a benchmark share their bytes: those need not cross the bus again.
fn is_repeated(data: &MatrixData, part: usize) -> bool {
    let first = &data.parts[0].weight;
    data.parts.get(part).is_some_and(|p| std::ptr::eq(p.weight.as_ptr(), first.as_ptr()) && !p.weight.is_empty())
}

fn load_tiles(device: &Arc<Device>, stager: &mut Stager, data: &MatrixData, view: &mut args::Matrix) -> Vec<Memory> {
    let (rows, dtype) = (data.rows, data.dtype);
    let row_bytes = dtype.weight_bytes(1, data.cols);
    // Affine scales and biases are equally long.
    let scale_row = data.parts[0].scales.len() / rows.max(1);
    let rounds = row_bytes.div_ceil(TILE_ROW_BYTES);
    let (group_bytes, groups) = (rounds * TILE_BYTES, rows.div_ceil(TILE_ROWS));
    let part_bytes = groups * group_bytes;
    // Tiles are written whole.
    let memory = stager.alloc(device, part_bytes * data.parts.len(), false);
    let of_row = row_bytes + 2 * scale_row;
    let rows_at_once = stager.room() / of_row / TILE_ROWS * TILE_ROWS;
    let mut pieces = vec![];
    let part_at = |i: usize| memory.pointer() + (i * part_bytes) as u64;
    for (i, part) in data.parts.iter().enumerate().filter(|(i, _)| *i == 0 || !is_repeated(data, *i)) {
        for first in (0..rows).step_by(rows_at_once) {
            let n = rows_at_once.min(rows - first);
            let of = |bytes: &'_ [u8], of_row: usize| -> std::ops::Range<usize> {
                if bytes.is_empty() { 0..0 } else { first * of_row..(first + n) * of_row }
            };
            let sources = [
                &part.weight[of(&part.weight, row_bytes)],
                &part.scales[of(&part.scales, scale_row)],
                &part.biases[of(&part.biases, scale_row)],
            ];
            let args = RepackArgs {
                weight: 0,
                scales: 0,
                biases: 0,
                tiles: part_at(i) + (first / TILE_ROWS * group_bytes) as u64,
                rows: n as u32,
                row_bytes: row_bytes as u32,
                scale_row: scale_row as u32,
                rounds: rounds as u32,
            };
            pieces.push(Piece::Repack { sources, args });
        }
    }
    stager.send(device, &pieces);
    for i in (1..data.parts.len()).filter(|i| is_repeated(data, *i)) {
        device.copy(part_at(i), memory.pointer(), part_bytes);
    }
    (view.weight, view.weight_part, view.row_bytes) = (memory.pointer(), part_bytes as u64, group_bytes as u32);
    vec![memory]
}

fn load_rows(device: &Arc<Device>, stager: &mut Stager, data: &MatrixData, view: &mut args::Matrix) -> Vec<Memory> {
    let (rows, cols, dtype) = (data.rows, data.cols, data.dtype);
    let row_bytes = dtype.weight_bytes(1, cols);
    let scale_row = scale_row_bytes(dtype, cols);
    let scale_pitch = scale_row.next_multiple_of(16);
    let scale_rows = if dtype == DType::Fp8Block { rows.div_ceil(FP8_BLOCK) } else { rows };
    let (weight_part, scale_part) = (rows * row_bytes, scale_rows * scale_pitch);
    // A margin, as kernels may load whole vectors at the end of the last row.
    let weight = stager.alloc(device, weight_part * data.parts.len() + 16, true);
    let scales = stager.alloc(device, scale_part * data.parts.len(), true);
    let globals: Vec<f32> = data.parts.iter().filter_map(|p| p.global_scale).map(|g| g / NVFP4_LARGEST).collect();
    let has_globals = globals.len() == data.parts.len() && !globals.is_empty();
    let globals_memory = device.alloc(globals.len() * 4);
    // What must be rearranged on the way.
    let padded = scale_row > 0 && (scale_pitch != scale_row || matches!(dtype, DType::Affine { .. }));
    let own = |i: &usize| *i == 0 || !is_repeated(data, *i);
    let made: Vec<Vec<u8>> = (0..data.parts.len())
        .filter(own)
        .map(|i| match padded {
            true => padded_scales(dtype, &data.parts[i], scale_rows, scale_row, scale_pitch),
            false => vec![],
        })
        .collect();
    let mut pieces = vec![];
    let mut stage = |bytes, to: u64| stage(&mut pieces, bytes, to, stager.room());
    for (i, made) in (0..data.parts.len()).filter(own).zip(&made) {
        let part = &data.parts[i];
        stage(&part.weight[..], weight.pointer() + (i * weight_part) as u64);
        let source = if padded { &made[..] } else { &part.scales[..] };
        stage(source, scales.pointer() + (i * scale_part) as u64);
    }
    stage(bytemuck::cast_slice(&globals), globals_memory.pointer());
    stager.send(device, &pieces);
    for i in (1..data.parts.len()).filter(|i| is_repeated(data, *i)) {
        device.copy(weight.pointer() + (i * weight_part) as u64, weight.pointer(), weight_part);
        device.copy(scales.pointer() + (i * scale_part) as u64, scales.pointer(), scale_part);
    }
    (view.weight, view.weight_part, view.row_bytes) = (weight.pointer(), weight_part as u64, row_bytes as u32);
    (view.scales, view.scale_part, view.scale_pitch) = (scales.pointer(), scale_part as u64, scale_pitch as u32);
    view.globals = if has_globals { globals_memory.pointer() } else { 0 };
    vec![weight, scales, globals_memory]
}

/// Cuts bytes into pieces of at most `room`.
fn stage<'a>(pieces: &mut Vec<Piece<'a>>, bytes: &'a [u8], to: u64, room: usize) {
    pieces.extend(bytes.chunks(room).enumerate().map(|(i, bytes)| Piece::Copy { bytes, to: to + (i * room) as u64 }));
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
