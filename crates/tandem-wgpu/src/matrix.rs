//! Matrices on the device, in the forms that format.wgsl decodes.
//!
//! A row is a whole number of units of 16 bytes. 4-bit codes are reordered within each word, 2- and 3-bit codes widened to 4
//! bits, 5- and 6-bit codes to 8; scales become one word a group, but E8M0 bytes stay bytes. A matrix that is longer than what
//! a kernel may see at once is kept in chunks: whole matrices of a stack, or rows of one.

use std::ops::Range;
use std::sync::Arc;

use tandem_core::DType;
use tandem_core::dtype::{FP8_BLOCK, Float};
use tandem_core::quant::minifloat::E4M3;
use tandem_core::weights::{MatrixData, MatrixPart};

use crate::buffer::Memory;
use crate::device::Device;
use crate::template::Defines;

/// Bytes sent to the device at once while a matrix is loaded.
const PIECE_BYTES: usize = 16 << 20;
/// Bytes on their way, at most.
const UNDER_WAY_BYTES: usize = 128 << 20;
/// NVFP4's global scales are relative to the largest product of its element and scale, 6 * 448.
const NVFP4_LARGEST: f32 = 2688.0;

/// Codes of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
    F32,
    F16,
    Bf16,
    Fp8,
    Fp4,
    Q8,
    Q4,
}

/// What a group's scale is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    None,
    /// A byte.
    E8m0,
    /// A float.
    F32,
    /// Scale and bias in bf16, in one word.
    Pair16,
    /// Scale and bias, in two words.
    Pair32,
}

/// How the kernels read a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    code: Code,
    scale: Scale,
    /// Elements that share a scale; 1 without scales.
    group: usize,
}

impl Format {
    pub(crate) fn of(dtype: DType) -> Format {
        let (code, scale) = match dtype {
            DType::Float(Float::F32) => (Code::F32, Scale::None),
            DType::Float(Float::F16) => (Code::F16, Scale::None),
            DType::Float(Float::BF16) => (Code::Bf16, Scale::None),
            DType::Mxfp4 => (Code::Fp4, Scale::E8m0),
            DType::Nvfp4 => (Code::Fp4, Scale::F32),
            DType::Mxfp8 => (Code::Fp8, Scale::E8m0),
            DType::Fp8Block => (Code::Fp8, Scale::F32),
            DType::Affine { bits, params, .. } => {
                let code = if bits <= 4 { Code::Q4 } else { Code::Q8 };
                (code, if params == Float::BF16 { Scale::Pair16 } else { Scale::Pair32 })
            }
        };
        Format { code, scale, group: dtype.group_size() }
    }

    /// Elements of a unit.
    pub(crate) fn unit(self) -> usize {
        match self.code {
            Code::F32 => 4,
            Code::F16 | Code::Bf16 => 8,
            Code::Fp8 | Code::Q8 => 16,
            Code::Fp4 | Code::Q4 => 32,
        }
    }

    /// A number for each format, below 2^16.
    pub(crate) fn number(self) -> u64 {
        self.code as u64 | (self.scale as u64) << 4 | (self.group.ilog2() as u64) << 8
    }

    /// Parts of a unit with scales of their own.
    fn parts(self) -> usize {
        if self.scale == Scale::None { 1 } else { (self.unit() / self.group).max(1) }
    }

    fn scale_pitch(self, cols: usize) -> usize {
        let groups = cols.div_ceil(self.group).next_multiple_of(self.parts());
        match self.scale {
            Scale::None => 0,
            Scale::E8m0 => groups.div_ceil(4),
            Scale::F32 | Scale::Pair16 => groups,
            Scale::Pair32 => groups * 2,
        }
    }

    /// What the shaders' `#if`s ask for.
    pub(crate) fn define(self, defines: &mut Defines) {
        let code = match self.code {
            Code::F32 => "F32",
            Code::F16 => "F16",
            Code::Bf16 => "BF16",
            Code::Fp8 => "FP8",
            Code::Fp4 => "FP4",
            Code::Q8 => "Q8",
            Code::Q4 => "Q4",
        };
        let scale = match self.scale {
            Scale::None => "UNSCALED",
            Scale::E8m0 => "E8M0",
            Scale::F32 => "SCALE32",
            Scale::Pair16 => "PAIR16",
            Scale::Pair32 => "PAIR32",
        };
        let unit = self.unit();
        let numbers = [
            (code, 1),
            (scale, 1),
            ("SCALED", usize::from(self.scale != Scale::None)),
            ("SHIFTED", usize::from(matches!(self.scale, Scale::Pair16 | Scale::Pair32))),
            ("UNIT", unit),
            ("VECTORS", unit / 4),
            ("GROUP", self.group),
            ("PARTS", self.parts()),
            ("PART_VECTORS", unit / 4 / self.parts()),
            ("SMALL_GROUPS", usize::from(self.scale != Scale::None && self.group < unit)),
            ("UNITS_PER_GROUP", (self.group / unit).max(1)),
        ];
        defines.extend(numbers.iter().map(|(name, n)| ((*name).to_string(), n.to_string())));
    }
}

/// A part of a matrix in one buffer.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) weight: Memory,
    /// None without scales.
    pub(crate) scales: Option<Memory>,
    /// Matrices of the stack that it holds.
    pub(crate) parts: Range<usize>,
    /// Rows of each.
    pub(crate) rows: Range<usize>,
}

impl Chunk {
    /// What the kernels bind as scales.
    pub(crate) fn scales(&self) -> &Memory {
        self.scales.as_ref().unwrap_or(&self.weight)
    }
}

/// A matrix or a stack of equal ones.
#[derive(Debug)]
pub struct WgpuMatrix {
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) parts: usize,
    pub(crate) chunks: Vec<Chunk>,
    /// Of a row: units, and words of scales.
    pub(crate) units: usize,
    pub(crate) scale_pitch: usize,
}

impl WgpuMatrix {
    /// Bytes of a row on the device, scales included.
    pub(crate) fn row_bytes(&self) -> usize {
        self.units * 16 + self.scale_pitch * 4
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        (self.parts * self.rows * self.row_bytes()) as u64
    }

    /// Copies a matrix to the device; `limit` bytes of it at most lie in one buffer.
    pub(crate) fn load(device: &Arc<Device>, data: &MatrixData, limit: u64) -> WgpuMatrix {
        let format = Format::of(data.dtype);
        let (rows, cols, parts) = (data.rows, data.cols, data.parts.len());
        let units = cols.div_ceil(format.unit());
        let scale_pitch = format.scale_pitch(cols);
        let row_bytes = (units * 16).max(scale_pitch * 4).max(1);
        let rows_at_once = (limit as usize / row_bytes).max(1);
        let mut matrix = WgpuMatrix { format, rows, cols, parts, chunks: vec![], units, scale_pitch };
        let ranges: Vec<(Range<usize>, Range<usize>)> = if rows <= rows_at_once {
            let parts_at_once = rows_at_once / rows.max(1);
            (0..parts).step_by(parts_at_once).map(|p| (p..parts.min(p + parts_at_once), 0..rows)).collect()
        } else {
            let cuts = move |p| (0..rows).step_by(rows_at_once).map(move |r| (p..p + 1, r..rows.min(r + rows_at_once)));
            (0..parts).flat_map(cuts).collect()
        };
        for (parts, rows) in ranges {
            let chunk = matrix.load_chunk(device, data, parts, rows);
            matrix.chunks.push(chunk);
        }
        matrix
    }

    fn load_chunk(&self, device: &Arc<Device>, data: &MatrixData, parts: Range<usize>, rows: Range<usize>) -> Chunk {
        let n_rows = parts.len() * rows.len();
        let weight = Memory::new(device, (n_rows * self.units * 16) as u64);
        let scales = (self.scale_pitch > 0).then(|| Memory::new(device, (n_rows * self.scale_pitch * 4) as u64));
        let chunk = Chunk { weight, scales, parts: parts.clone(), rows: rows.clone() };
        if device.errors.any() {
            return chunk;
        }
        let weight_bytes = rows.len() * self.units * 16;
        let scale_bytes = rows.len() * self.scale_pitch * 4;
        let repeats = |part: &usize| *part > parts.start && is_repeated(data, parts.start, *part);
        for (i, part) in parts.clone().enumerate().filter(|(_, part)| !repeats(part)) {
            let (weight_at, scale_at) = ((i * weight_bytes) as u64, (i * scale_bytes) as u64);
            let part = &data.parts[part];
            let dtype = data.dtype;
            send(device, &chunk.weight, weight_at, &rows, self.units * 16, |row, out| {
                pack_codes(dtype, self.format, self.cols, part, row, out);
            });
            if let Some(scales) = &chunk.scales {
                send(device, scales, scale_at, &rows, self.scale_pitch * 4, |row, out| {
                    pack_scales(dtype, self.cols, part, row, out);
                });
            }
        }
        let repeated: Vec<usize> = parts.clone().filter(repeats).map(|part| part - parts.start).collect();
        repeat_first(device, &chunk.weight, weight_bytes as u64, &repeated);
        if let Some(scales) = &chunk.scales {
            repeat_first(device, scales, scale_bytes as u64, &repeated);
        }
        chunk
    }
}

/// Weights made up for a benchmark share their bytes: those need not cross the bus again.
fn is_repeated(data: &MatrixData, first: usize, part: usize) -> bool {
    let (first, part) = (&data.parts[first].weight, &data.parts[part].weight);
    !part.is_empty() && std::ptr::eq(part.as_ptr(), first.as_ptr())
}

/// Copies the first of the matrices of `bytes` in `memory` to the places of others, by way of other memory: a copy within one
/// buffer is not allowed.
fn repeat_first(device: &Device, memory: &Memory, bytes: u64, others: &[usize]) {
    if bytes == 0 || others.is_empty() {
        return;
    }
    let between = Memory::new(device, bytes);
    let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(&memory.buffer, 0, &between.buffer, 0, bytes);
    for other in others {
        encoder.copy_buffer_to_buffer(&between.buffer, 0, &memory.buffer, *other as u64 * bytes, bytes);
    }
    device.queue.submit([encoder.finish()]);
    device.drain();
}

/// Packs rows with `pack` and sends them to `memory`, from byte `at` on, piece by piece.
fn send(
    device: &Device,
    memory: &Memory,
    at: u64,
    rows: &Range<usize>,
    row_bytes: usize,
    pack: impl Fn(usize, &mut [u8]) + Sync,
) {
    let rows_at_once = (PIECE_BYTES / row_bytes.max(1)).max(1);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let mut piece = vec![];
    for first in rows.clone().step_by(rows_at_once) {
        let n = rows_at_once.min(rows.end - first);
        piece.clear();
        piece.resize(n * row_bytes, 0u8);
        let share = n.div_ceil(threads).max(64);
        std::thread::scope(|scope| {
            for (i, out) in piece.chunks_mut(share * row_bytes).enumerate() {
                let pack = &pack;
                let mut work = move || {
                    for (r, out) in out.chunks_exact_mut(row_bytes).enumerate() {
                        pack(first + i * share + r, out);
                    }
                };
                if n <= share {
                    work();
                } else {
                    scope.spawn(work);
                }
            }
        });
        let to = at + ((first - rows.start) * row_bytes) as u64;
        device.queue.write_buffer(&memory.buffer, to, &piece);
        // What is written waits in memory of the host until it is submitted and done.
        if device.staged(piece.len()) >= UNDER_WAY_BYTES {
            device.drain();
        }
    }
}

/// Codes of a row in units.
fn pack_codes(dtype: DType, format: Format, cols: usize, part: &MatrixPart, row: usize, out: &mut [u8]) {
    let bytes = dtype.weight_bytes(1, cols);
    let codes = &part.weight[row * bytes..(row + 1) * bytes];
    match (format.code, dtype) {
        (Code::Fp4, _) => each_word(codes, out, fp4_word),
        (Code::Q4, DType::Affine { bits: 4, .. }) => each_word(codes, out, q4_word),
        (Code::Q4, DType::Affine { bits, .. }) => {
            let mut word_codes = [0u8; 8];
            for (w, out) in out.chunks_exact_mut(4).enumerate() {
                unpack(bits, codes, w * 8, cols, &mut word_codes);
                let natural = word_codes.iter().enumerate().fold(0u32, |word, (i, c)| word | u32::from(*c) << (4 * i));
                out.copy_from_slice(&q4_word(natural).to_le_bytes());
            }
        }
        (Code::Q8, DType::Affine { bits: bits @ (5 | 6), .. }) => {
            for (w, out) in out.chunks_exact_mut(8).enumerate() {
                unpack(bits, codes, w * 8, cols, out);
            }
        }
        _ => out[..bytes].copy_from_slice(codes),
    }
}

/// Codes `first .. first + out.len()` of a row's bit stream; those past `cols` are 0.
fn unpack(bits: u8, codes: &[u8], first: usize, cols: usize, out: &mut [u8]) {
    let bits = usize::from(bits);
    for (i, out) in out.iter_mut().enumerate() {
        let at = (first + i) * bits;
        *out = 0;
        if first + i < cols {
            let low = u16::from(codes[at / 8]);
            let high = codes.get(at / 8 + 1).map_or(0, |b| u16::from(*b));
            *out = ((low | high << 8) >> (at % 8)) as u8 & ((1u16 << bits) - 1) as u8;
        }
    }
}

fn each_word(codes: &[u8], out: &mut [u8], word: impl Fn(u32) -> u32) {
    let (words, rest) = codes.as_chunks::<4>();
    for (out, codes) in out.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *out = word(u32::from_le_bytes(*codes)).to_le_bytes();
    }
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        out[words.len() * 4..][..4].copy_from_slice(&word(u32::from_le_bytes(last)).to_le_bytes());
    }
}

/// Even codes to the low half, odd ones to the high half, in order.
fn q4_word(natural: u32) -> u32 {
    (0..4).fold(0, |word, j| {
        let (even, odd) = (natural >> (8 * j) & 15, natural >> (8 * j + 4) & 15);
        word | even << (4 * j) | odd << (4 * j + 16)
    })
}

/// As [`q4_word`], with the sign and the magnitude of each code where format.wgsl's shifts bring them to bits 15 and 11 .. 9
/// of a half.
fn fp4_word(natural: u32) -> u32 {
    const SIGNS: [u32; 4] = [15, 12, 14, 13];
    const MAGNITUDES: [u32; 4] = [9, 6, 3, 0];
    let pairs = q4_word(natural);
    (0..4).fold(0, |word, j| {
        let code = pairs >> (4 * j) & 0x000f_000f;
        word | (code & 0x0007_0007) << MAGNITUDES[j] | (code >> 3 & 0x0001_0001) << SIGNS[j]
    })
}

/// Words of a row's scales.
fn pack_scales(dtype: DType, cols: usize, part: &MatrixPart, row: usize, out: &mut [u8]) {
    match dtype {
        DType::Float(_) => {}
        DType::Mxfp4 | DType::Mxfp8 => {
            let n = cols / 32;
            out[..n].copy_from_slice(&part.scales[row * n..(row + 1) * n]);
        }
        DType::Nvfp4 => {
            let n = cols / 16;
            let global = part.global_scale.map_or(1.0, |g| g / NVFP4_LARGEST);
            for (out, byte) in out.chunks_exact_mut(4).zip(&part.scales[row * n..(row + 1) * n]) {
                out.copy_from_slice(&(E4M3[usize::from(*byte)] * global).to_le_bytes());
            }
        }
        DType::Fp8Block => {
            let n = cols.div_ceil(FP8_BLOCK) * 4;
            let block = row / FP8_BLOCK;
            out[..n].copy_from_slice(&part.scales[block * n..(block + 1) * n]);
        }
        DType::Affine { group_size, params, .. } => {
            let n = cols / usize::from(group_size);
            for g in 0..n {
                let at = row * n + g;
                if params == Float::BF16 {
                    out[g * 4..g * 4 + 2].copy_from_slice(&part.scales[at * 2..at * 2 + 2]);
                    out[g * 4 + 2..g * 4 + 4].copy_from_slice(&part.biases[at * 2..at * 2 + 2]);
                } else {
                    out[g * 8..g * 8 + 4].copy_from_slice(&params.read(&part.scales, at).to_le_bytes());
                    out[g * 8 + 4..g * 8 + 8].copy_from_slice(&params.read(&part.biases, at).to_le_bytes());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(bits: u32) -> f32 {
        half::f16::from_bits(bits as u16).to_f32() * 16384.0
    }

    #[test]
    fn fp4_words_hold_every_code_where_the_shader_looks() {
        let value = |code: u32| tandem_core::quant::minifloat::E2M1[code as usize];
        for natural in [0x7654_3210u32, 0xfedc_ba98, 0x89ab_cdef, 0x0f1e_2d3c] {
            let w = fp4_word(natural);
            let pairs = [
                w & 0x8e00_8e00,
                (w << 3) & 0x8e00_8e00,
                ((w << 6) & 0x0e00_0e00) | ((w << 1) & 0x8000_8000),
                ((w << 9) & 0x0e00_0e00) | ((w << 2) & 0x8000_8000),
            ];
            for (i, pair) in pairs.into_iter().enumerate() {
                let (even, odd) = (natural >> (8 * i) & 15, natural >> (8 * i + 4) & 15);
                assert_eq!([half(pair & 0xffff), half(pair >> 16)], [value(even), value(odd)], "{natural:x} {i}");
            }
        }
    }

    #[test]
    fn odd_widths_unpack() {
        // Codes 0, 1, .. of 3 bits: 0b101_100_011_010_001_000 is 0x2c688 in 18 bits.
        let codes = 0x0002_c688u32.to_le_bytes();
        let mut out = [9u8; 8];
        unpack(3, &codes, 0, 6, &mut out);
        assert_eq!(out, [0, 1, 2, 3, 4, 5, 0, 0]);
    }
}
