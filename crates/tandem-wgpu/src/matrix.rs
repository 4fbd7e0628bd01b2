//! Matrices on the device, in the forms that format.wgsl decodes.
//!
//! A row is a whole number of units of 16 bytes. 4-bit codes are reordered within each word, 2- and 3-bit codes widened to 4
//! bits, 5- and 6-bit codes to 8; scales become one word a group, but E8M0 bytes stay bytes. A matrix that is longer than what
//! a kernel may see at once is kept in chunks: whole matrices of a stack, or rows of one.

use std::ops::Range;
use std::sync::Arc;

use tandem_core::DType;
use tandem_core::checkpoint::release_mapped;
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
/// Elements of a segment of a row for each of the threads that share it: a whole number of units of any format.
pub(crate) const SEGMENT_ELEMENTS: usize = 32;
/// Most that scales are lifted by, as a power of two, and the largest that lifted scales may be: 2^64, so that their products
/// keep as much room again.
const MOST_LIFT: u32 = 32;
const LARGEST_LIFTED: i32 = 64;
/// NVFP4's global scales are relative to the largest product of its element and scale, 6 * 448.
const NVFP4_LARGEST: f32 = 2688.0;
/// Half-precision numbers below 2^15 have room for rounding.
const HALF_EXPONENT: i32 = 15;

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

    /// True if groups of its weights share a scale.
    #[cfg(test)]
    pub(crate) fn is_scaled(self) -> bool {
        self.scale != Scale::None
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

    /// Exponent of a power of two above every code, in units of a power of two above the scale: of affine formats the shift
    /// is counted in.
    fn code_exponent(self) -> i32 {
        1 + match self.code {
            Code::Fp4 => 3,
            Code::Fp8 => 9,
            Code::Q4 => 5,
            Code::Q8 => 9,
            Code::F32 | Code::F16 | Code::Bf16 => 0,
        }
    }

    /// True if a weight has no more digits than a half-precision number: short codes times powers of two.
    pub(crate) fn is_exact_in_half(self) -> bool {
        matches!(self.code, Code::Fp4 | Code::Fp8) && self.scale == Scale::E8m0
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
            ("AHEAD", usize::from(self.scale != Scale::None && self.group >= unit)),
            ("SEGMENT_UNITS", SEGMENT_ELEMENTS / unit),
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
    /// Power of two that the scales on the device are larger by. Devices may flush subnormal numbers: small scales become
    /// normal ones, and the kernels take the factor back from the finished sum.
    lift: u32,
    /// Exponent of a power of two above all weights on the device; None without scales.
    ceiling: Option<i32>,
}

impl WgpuMatrix {
    /// The exponent of a power of two that brings the largest weights on the device near the largest of half precision, but
    /// not above; None where they are not known.
    pub(crate) fn to_half(&self) -> Option<i32> {
        self.ceiling.map(|ceiling| (HALF_EXPONENT - ceiling).clamp(-100, 100))
    }

    /// What takes the lift back.
    pub(crate) fn post(&self) -> f32 {
        2f32.powi(-(self.lift as i32))
    }

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
        let largest = largest_scale(data);
        let lift = lift(largest);
        let ceiling = largest.map(|largest| largest + lift as i32 + format.code_exponent());
        let mut matrix = WgpuMatrix { format, rows, cols, parts, chunks: vec![], units, scale_pitch, lift, ceiling };
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
                    pack_scales(dtype, self.cols, part, row, self.lift, out);
                });
            }
            // Where the GPU shares memory with the file's pages, a stack of experts would be there twice.
            [&part.weight, &part.scales, &part.biases].iter().for_each(|bytes| release_mapped(bytes));
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

/// The power of two by which a matrix's scales are made larger: as much as leaves the largest of them room.
fn lift(largest_scale: Option<i32>) -> u32 {
    largest_scale.map_or(0, |largest| (LARGEST_LIFTED - largest).clamp(0, MOST_LIFT as i32) as u32)
}

/// Exponent of the largest scale (or shift) of all parts.
fn largest_scale(data: &MatrixData) -> Option<i32> {
    data.parts.iter().map(|part| largest_exponent(data.dtype, part)).max().flatten()
}

/// Exponent of the largest scale (or shift) that is a number; None without scales.
fn largest_exponent(dtype: DType, part: &MatrixPart) -> Option<i32> {
    let of_bits = |bits: u32| ((bits >> 23 & 255) as i32 - 127).min(128);
    let of_all = |params: Float, bytes: &[u8]| {
        let n = bytes.len() / params.bytes();
        let exponents = (0..n).map(|i| params.read(bytes, i)).filter(|v| v.is_finite()).map(|v| of_bits(v.to_bits()));
        exponents.max().unwrap_or(-127)
    };
    match dtype {
        DType::Float(_) => None,
        DType::Mxfp4 | DType::Mxfp8 => {
            part.scales.iter().filter(|b| **b != 255).max().map(|byte| i32::from(*byte) - 127)
        }
        // An element scale is below 2^9.
        DType::Nvfp4 => Some(of_bits(nvfp4_global(part).to_bits()) + 9),
        DType::Fp8Block => Some(of_all(Float::F32, &part.scales)),
        DType::Affine { params, .. } => Some(of_all(params, &part.scales).max(of_all(params, &part.biases))),
    }
}

fn nvfp4_global(part: &MatrixPart) -> f32 {
    part.global_scale.map_or(1.0, |g| g / NVFP4_LARGEST)
}

/// Words of a row's scales, larger by 2^`lift`.
fn pack_scales(dtype: DType, cols: usize, part: &MatrixPart, row: usize, lift: u32, out: &mut [u8]) {
    let factor = 2f32.powi(lift as i32);
    match dtype {
        DType::Float(_) => {}
        DType::Mxfp4 | DType::Mxfp8 => {
            let n = cols / 32;
            for (out, byte) in out.iter_mut().zip(&part.scales[row * n..(row + 1) * n]) {
                // 255 is no number.
                *out = if *byte == 255 { 255 } else { byte + lift as u8 };
            }
        }
        DType::Nvfp4 => {
            let n = cols / 16;
            let global = nvfp4_global(part) * factor;
            for (out, byte) in out.chunks_exact_mut(4).zip(&part.scales[row * n..(row + 1) * n]) {
                out.copy_from_slice(&(E4M3[usize::from(*byte)] * global).to_le_bytes());
            }
        }
        DType::Fp8Block => {
            let n = cols.div_ceil(FP8_BLOCK);
            let first = row / FP8_BLOCK * n;
            for (g, out) in out.chunks_exact_mut(4).take(n).enumerate() {
                out.copy_from_slice(&(Float::F32.read(&part.scales, first + g) * factor).to_le_bytes());
            }
        }
        DType::Affine { group_size, params, .. } => {
            let n = cols / usize::from(group_size);
            for g in 0..n {
                let at = row * n + g;
                let (scale, bias) = (params.read(&part.scales, at) * factor, params.read(&part.biases, at) * factor);
                if params == Float::BF16 {
                    // A bf16 times a power of two is one.
                    out[g * 4..g * 4 + 2].copy_from_slice(&((scale.to_bits() >> 16) as u16).to_le_bytes());
                    out[g * 4 + 2..g * 4 + 4].copy_from_slice(&((bias.to_bits() >> 16) as u16).to_le_bytes());
                } else {
                    out[g * 8..g * 8 + 4].copy_from_slice(&scale.to_le_bytes());
                    out[g * 8 + 4..g * 8 + 8].copy_from_slice(&bias.to_le_bytes());
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

    fn one_group(dtype: DType, scales: Vec<u8>, biases: Vec<u8>, global_scale: Option<f32>) -> MatrixData {
        let weight = vec![0u8; dtype.weight_bytes(1, 128)].into();
        let part = MatrixPart { weight, scales: scales.into(), biases: biases.into(), global_scale };
        MatrixData { name: "scales".into(), rows: 1, cols: 128, dtype, parts: vec![part] }
    }

    fn packed(data: &MatrixData) -> Vec<u32> {
        let pitch = Format::of(data.dtype).scale_pitch(data.cols);
        let mut out = vec![0u8; pitch * 4];
        pack_scales(data.dtype, data.cols, &data.parts[0], 0, lift(largest_scale(data)), &mut out);
        out.as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect()
    }

    /// Every format's smallest scales, which a device may flush, are normal numbers on it, and nothing else changes.
    #[test]
    fn small_scales_are_lifted_by_a_power_of_two_and_large_ones_stay() {
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let halves = |values: &[f32]| {
            values.iter().flat_map(|v| [(v.to_bits() >> 16) as u8, (v.to_bits() >> 24) as u8]).collect::<Vec<u8>>()
        };
        let tiny = 2f32.powi(-130);
        let affine = |params| DType::Affine { bits: 4, group_size: 64, params };
        let pair32 = |bits: [u32; 4]| bits.map(f32::from_bits).map(|v| v * 2f32.powi(-(MOST_LIFT as i32)));

        let data = one_group(DType::Mxfp4, vec![0, 1, 127, 255], vec![], None);
        assert_eq!((lift(largest_scale(&data)), packed(&data)), (32, vec![u32::from_le_bytes([32, 33, 159, 255])]));
        let data = one_group(DType::Mxfp8, vec![0, 1, 2, 191], vec![], None);
        assert_eq!((lift(largest_scale(&data)), packed(&data)), (0, vec![u32::from_le_bytes([0, 1, 2, 191])]));
        let data = one_group(DType::Mxfp4, vec![0, 1, 2, 181], vec![], None);
        assert_eq!((lift(largest_scale(&data)), packed(&data)), (10, vec![u32::from_le_bytes([10, 11, 12, 191])]));

        let data = one_group(DType::Fp8Block, bytes(&[tiny]), vec![], None);
        assert_eq!(f32::from_bits(packed(&data)[0]), tiny * 2f32.powi(32));
        let data = one_group(DType::Nvfp4, vec![1; 8], vec![], Some(tiny * NVFP4_LARGEST));
        assert_eq!(f32::from_bits(packed(&data)[0]), E4M3[1] * 2f32.powi(32) * tiny);
        let data = one_group(affine(Float::F32), bytes(&[tiny, 1.0]), bytes(&[-tiny, -8.0]), None);
        let words: [u32; 4] = packed(&data).try_into().expect("two groups");
        assert_eq!(pair32(words), [tiny, -tiny, 1.0, -8.0]);
        let data = one_group(affine(Float::BF16), halves(&[tiny, 1.0]), halves(&[-tiny, -8.0]), None);
        let words = packed(&data);
        let words = [words[0] << 16, words[0] & 0xffff_0000, words[1] << 16, words[1] & 0xffff_0000];
        assert_eq!(pair32(words), [tiny, -tiny, 1.0, -8.0]);
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
