//! Weights in the order in which the tile kernels read them.
//!
//! A tile is `height` rows of a matrix, one row to a 32-bit lane of two (x86) or four (Arm) vector registers. Its codes
//! come word by word: the first 32-bit word of each of the rows, then the second, and so on, so that one multiplication
//! serves a register of rows and its other operand is one broadcast word of the activations. Scales and biases of a group
//! stand side by side for the rows. The last tile of a matrix is filled up with zeros. Values stay what they were;
//! formats that no kernel reads as they are become one that has kernels ([`Layout`]).
//!
//! Within a word, codes are in the order that costs the kernels the fewest instructions:
//! - 4 bits: column `j` of the eight in bits `8 j..8 j + 4`, column `4 + j` above it (`j` in 0..4): masking yields four
//!   columns in order.
//! - 8 bits: four columns in order.
//! - bf16: the eight columns of four words are (0, 2), (4, 6), (1, 3), (5, 7), the order of pairs that shifting 4-bit
//!   codes yields.

#![allow(unsafe_code)]

use std::sync::Mutex;

use memmap2::MmapMut;
use tandem_core::quant::minifloat::{E2M1, E4M3, e8m0};
use tandem_core::weights::{MatrixData, MatrixPart};
use tandem_core::{CheckpointError, DType, Float};

use crate::isa::Isa;
use crate::pool::Pool;
use crate::shared_mut::SharedMut;

/// Rows of the tallest tile.
pub(crate) const MAX_HEIGHT: usize = 32;
/// Tiles repacked by one task, at least this many bytes of them.
const TASK_BYTES: usize = 256 << 10;
/// What nvfp4's global scale is divided by.
const NVFP4_UNIT: f32 = 2688.0;

/// What the codes of a tile stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codes {
    /// Unsigned integers of 4 bits.
    U4,
    /// Floats of 4 bits.
    E2m1,
    /// Unsigned integers of 8 bits.
    U8,
    /// Floats of 8 bits.
    E4m3,
    /// The values themselves.
    Bf16,
}

impl Codes {
    pub(crate) const fn bits(self) -> usize {
        match self {
            Codes::U4 | Codes::E2m1 => 4,
            Codes::U8 | Codes::E4m3 => 8,
            Codes::Bf16 => 16,
        }
    }

    /// Small integers are what an integer product takes.
    pub(crate) const fn are_integers(self) -> bool {
        matches!(self, Codes::U4 | Codes::E2m1 | Codes::U8)
    }
}

/// How the scales of a tile are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// There are none.
    One,
    /// Powers of two, a byte each.
    E8m0,
    /// Floats.
    Float(Float),
}

impl Scales {
    const fn bytes(self) -> usize {
        match self {
            Scales::One => 0,
            Scales::E8m0 => 1,
            Scales::Float(float) => float.bytes(),
        }
    }
}

/// What a tile holds. A storage format becomes the layout that keeps its values:
///
/// | format | codes | scales |
/// |---|---|---|
/// | mxfp4, mxfp8, bf16, affine of 4 and 8 bits | as they were | as they were |
/// | affine of 2 and 3, of 5 and 6 bits | 4 bits, 8 bits | as they were |
/// | nvfp4 | as they were | bf16 instead of e4m3, the global scale beside the matrix |
/// | fp8 in blocks | as they were | one f32 a row and 128 columns |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) codes: Codes,
    pub(crate) scales: Scales,
    /// Columns that share a scale.
    pub(crate) group: usize,
    /// Biases beside the scales, of the same type.
    pub(crate) biased: bool,
}

impl Layout {
    /// The layout of a format and width that tiles exist for.
    pub(crate) fn new(dtype: DType, cols: usize) -> Option<Layout> {
        let plain = |codes, scales, group| Layout { codes, scales, group, biased: false };
        let layout = match dtype {
            DType::BF16 => plain(Codes::Bf16, Scales::One, 32),
            DType::Mxfp4 => plain(Codes::E2m1, Scales::E8m0, 32),
            DType::Mxfp8 => plain(Codes::E4m3, Scales::E8m0, 32),
            DType::Nvfp4 => plain(Codes::E2m1, Scales::Float(Float::BF16), 16),
            DType::Fp8Block => plain(Codes::E4m3, Scales::Float(Float::F32), 128),
            DType::Affine { bits, group_size, params } => Layout {
                codes: if bits <= 4 { Codes::U4 } else { Codes::U8 },
                scales: Scales::Float(params),
                group: group_size.into(),
                biased: true,
            },
            DType::Float(_) => return None,
        };
        cols.is_multiple_of(32).then_some(layout)
    }

    /// Bytes of codes, of scales and of biases of `rows` rows.
    fn lengths(&self, rows: usize, cols: usize) -> (usize, usize, usize) {
        let scales = rows * cols.div_ceil(self.group) * self.scales.bytes();
        (rows * cols * self.codes.bits() / 8, scales, if self.biased { scales } else { 0 })
    }
}

/// A matrix or stack of equal matrices in tiles.
pub struct Tiles {
    pub(crate) dtype: DType,
    pub(crate) layout: Layout,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// What the sums of each matrix are multiplied by.
    units: Vec<f32>,
    height: usize,
    memory: MmapMut,
}

/// One tile.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub(crate) layout: Layout,
    pub(crate) cols: usize,
    /// What its sums are multiplied by.
    pub(crate) unit: f32,
    /// `[words of a row, height] u32`, 64-byte aligned.
    pub(crate) codes: &'a [u8],
    /// `[groups, height]`, or empty.
    pub(crate) scales: &'a [u8],
    /// `[groups, height]`, or empty.
    pub(crate) biases: &'a [u8],
    /// Bytes of 32 columns with their share of scales and biases.
    pub(crate) group_bytes: usize,
    /// How many bytes ahead of the group that it reads a kernel asks the memory for.
    pub(crate) ahead: usize,
    /// Whether it asks for all lines, not for one of several.
    pub(crate) every_line: bool,
}

/// Rows of a tile for these instructions; 0 where there are no kernels for tiles.
pub(crate) fn height_for(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 | Isa::Amx => 32,
        Isa::Avx2 | Isa::Neon => 16,
        Isa::Scalar => 0,
    }
}

impl Tiles {
    /// Bytes that the tiles of `data` take, or `None` if its format, its width or the processor has none.
    pub(crate) fn bytes_for(data: &MatrixData, isa: Isa) -> Option<usize> {
        let layout = Layout::new(data.dtype, data.cols)?;
        let height = height_for(isa);
        (height > 0).then(|| data.parts.len() * data.rows.div_ceil(height) * tile_bytes(&layout, height, data.cols))
    }

    /// Repacks `data` over the pool, and checks on the way that its elements are finite; `None` where there are no tiles
    /// for it, or no memory.
    pub(crate) fn new(data: &MatrixData, isa: Isa, pool: &Pool) -> Option<(Tiles, Result<(), CheckpointError>)> {
        let bytes = Tiles::bytes_for(data, isa)?;
        let layout = Layout::new(data.dtype, data.cols)?;
        let unit = |part: &MatrixPart| part.global_scale.map_or(1.0, |scale| scale / NVFP4_UNIT);
        let mut tiles = Tiles {
            dtype: data.dtype,
            layout,
            rows: data.rows,
            cols: data.cols,
            units: data.parts.iter().map(unit).collect(),
            height: height_for(isa),
            memory: MmapMut::map_anon(bytes.max(1)).ok()?,
        };
        // Fewer page faults and look-ups; a system without huge pages says no, and nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = tiles.memory.advise(memmap2::Advice::HugePage);
        let (tile_bytes, n_tiles, height) = (tiles.tile_bytes(), tiles.n_tiles(), tiles.height);
        let (codes, scales, biases) = layout.lengths(height, data.cols);
        let target = SharedMut::new(&mut tiles.memory[..]);
        let failed = Mutex::new(Ok(()));
        pool.chunks(data.parts.len() * n_tiles, TASK_BYTES.div_ceil(tile_bytes), |range| {
            for i in range {
                let first_row = i % n_tiles * height;
                // SAFETY: one task per tile.
                let tile = unsafe { target.slice(i * tile_bytes, codes + scales + biases) };
                let (to_codes, rest) = tile.split_at_mut(codes);
                let (to_scales, to_biases) = rest.split_at_mut(scales);
                let part = &data.parts[i / n_tiles];
                let rows = first_row..data.rows.min(first_row + height);
                // While the rows are in the cache.
                let checked = data.check_finite(i / n_tiles, first_row, rows.len());
                if let (Err(error), Ok(mut failed)) = (checked, failed.lock()) {
                    *failed = Err(error);
                }
                pack_codes(data.dtype, &part.weight, data.cols, rows.clone(), height, to_codes);
                pack_scales(data, &part.scales, rows.clone(), height, to_scales);
                pack_params(&part.biases, data.cols / data.dtype.group_size(), rows, height, to_biases);
            }
        });
        Some((tiles, failed.into_inner().unwrap_or(Ok(()))))
    }

    fn tile_bytes(&self) -> usize {
        tile_bytes(&self.layout, self.height, self.cols)
    }

    fn n_tiles(&self) -> usize {
        self.rows.div_ceil(self.height)
    }

    /// Rows of a tile.
    pub(crate) fn height(&self) -> usize {
        self.height
    }

    /// Matrices of the stack.
    pub(crate) fn n_parts(&self) -> usize {
        self.units.len()
    }

    /// Tile `index` of matrix `part`.
    pub(crate) fn tile(&self, part: usize, index: usize) -> Tile<'_> {
        assert!(part < self.n_parts() && index < self.n_tiles());
        let (codes, scales, biases) = self.layout.lengths(self.height, self.cols);
        let bytes = &self.memory[(part * self.n_tiles() + index) * self.tile_bytes()..];
        let (to_scales, to_biases) = (codes + scales, codes + scales + biases);
        Tile {
            layout: self.layout,
            cols: self.cols,
            unit: self.units[part],
            codes: &bytes[..codes],
            scales: &bytes[codes..to_scales],
            biases: &bytes[to_scales..to_biases],
            group_bytes: to_biases * 32 / self.cols.max(1),
            ahead: 0,
            every_line: false,
        }
    }

    /// Row `row` of matrix `part`, decoded with the roundings of [`tandem_core::quant`].
    pub(crate) fn dequantize_row(&self, part: usize, row: usize, out: &mut [f32]) {
        let (height, layout) = (self.height, self.layout);
        let (tile, lane) = (self.tile(part, row / height), row % height);
        let words = tile.codes.as_chunks::<4>().0.iter().skip(lane).step_by(height).map(|b| u32::from_le_bytes(*b));
        match layout.codes {
            Codes::U4 | Codes::E2m1 => {
                for (word, out) in words.zip(out.as_chunks_mut::<8>().0) {
                    for (j, out) in out.iter_mut().enumerate() {
                        let code = word >> (8 * (j % 4) + 4 * (j / 4)) & 15;
                        *out = if layout.codes == Codes::U4 { code as f32 } else { E2M1[code as usize] };
                    }
                }
            }
            Codes::U8 | Codes::E4m3 => {
                for (word, out) in words.zip(out.as_chunks_mut::<4>().0) {
                    for (out, code) in out.iter_mut().zip(word.to_le_bytes()) {
                        *out = if layout.codes == Codes::U8 { code.into() } else { E4M3[usize::from(code)] };
                    }
                }
            }
            Codes::Bf16 => {
                for (i, word) in words.enumerate() {
                    let first = i / 4 * 8 + [0, 4, 1, 5][i % 4];
                    out[first] = f32::from_bits(word << 16);
                    out[first + 2] = f32::from_bits(word & 0xffff_0000);
                }
            }
        }
        for (group, out) in out.chunks_mut(layout.group).enumerate() {
            let at = group * height + lane;
            let scale = match layout.scales {
                Scales::One => break,
                Scales::E8m0 => e8m0(tile.scales[at]),
                Scales::Float(float) => float.read(tile.scales, at) * tile.unit,
            };
            let bias = match layout.scales {
                Scales::Float(float) if layout.biased => Some(float.read(tile.biases, at)),
                _ => None,
            };
            for value in out {
                *value *= scale;
                if let Some(bias) = bias {
                    *value += bias;
                }
            }
        }
    }
}

fn tile_bytes(layout: &Layout, height: usize, cols: usize) -> usize {
    let (codes, scales, biases) = layout.lengths(height, cols);
    (codes + scales + biases).next_multiple_of(64)
}

/// Eight 4-bit codes, lowest first, to the order of tiles.
#[inline(always)]
fn interleaved_nibbles(word: u32) -> u32 {
    let spread = |half: u32| {
        let bytes = (half | half << 8) & 0x00ff_00ff;
        (bytes | bytes << 4) & 0x0f0f_0f0f
    };
    spread(word & 0xffff) | spread(word >> 16) << 4
}

/// Words of a row that are taken before the next row's: one cache line of a tile's lane.
const RUN: usize = 16;

/// Rows that are turned at once.
const LANES: usize = 8;

/// Words `[rows, words]` to `[words, height]`, each through what the format wants of it.
fn pack_codes(dtype: DType, source: &[u8], cols: usize, rows: std::ops::Range<usize>, height: usize, out: &mut [u8]) {
    let (out, _) = out.as_chunks_mut::<4>();
    if rows.len() < height {
        out.fill([0; 4]);
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { pack_codes_avx2(dtype, source, cols, rows, height, out) };
    }
    pack_codes_with(dtype, source, cols, rows, height, out, turn);
}

/// [`pack_codes`] compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn pack_codes_avx2(
    dtype: DType,
    source: &[u8],
    cols: usize,
    rows: std::ops::Range<usize>,
    height: usize,
    out: &mut [[u8; 4]],
) {
    pack_codes_with(dtype, source, cols, rows, height, out, |words, out, height| turn_avx2(words, out, height));
}

/// `turn(words, out, height)` stores word `i` of row `r` at `i * height + r`.
#[inline(always)]
fn pack_codes_with(
    dtype: DType,
    source: &[u8],
    cols: usize,
    rows: std::ops::Range<usize>,
    height: usize,
    out: &mut [[u8; 4]],
    turn: impl Fn(&[[u32; RUN]; LANES], &mut [[u8; 4]], usize),
) {
    let row_bytes = dtype.weight_bytes(1, cols);
    let n_words = out.len() / height;
    for first in (0..n_words).step_by(RUN) {
        let n = RUN.min(n_words - first);
        for lane in (0..rows.len()).step_by(LANES) {
            let n_lanes = LANES.min(rows.len() - lane);
            let mut words = [[0u32; RUN]; LANES];
            for (i, words) in words[..n_lanes].iter_mut().enumerate() {
                let row = &source[(rows.start + lane + i) * row_bytes..][..row_bytes];
                row_words(dtype, row, first, n, words);
            }
            let to = &mut out[first * height + lane..];
            if n == RUN && n_lanes == LANES {
                turn(&words, to, height);
            } else {
                for (i, words) in words[..n_lanes].iter().enumerate() {
                    for (word, to) in words[..n].iter().zip(to[i..].iter_mut().step_by(height)) {
                        *to = word.to_le_bytes();
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn turn(words: &[[u32; RUN]; LANES], out: &mut [[u8; 4]], height: usize) {
    for i in 0..RUN {
        for (to, words) in out[i * height..][..LANES].iter_mut().zip(words) {
            *to = words[i].to_le_bytes();
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn turn_avx2(words: &[[u32; RUN]; LANES], out: &mut [[u8; 4]], height: usize) {
    use std::arch::x86_64::*;
    assert!(out.len() >= (RUN - 1) * height + LANES);
    for half in 0..RUN / LANES {
        let mut rows = [_mm256_setzero_si256(); LANES];
        for (register, words) in rows.iter_mut().zip(words) {
            // SAFETY: 8 words from `LANES * half` on.
            *register = unsafe { _mm256_loadu_si256(words.as_ptr().add(LANES * half).cast()) };
        }
        let mut pairs = rows;
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        let mut quads = pairs;
        for i in 0..2 {
            for j in 0..2 {
                let (a, b) = (pairs[4 * i + j], pairs[4 * i + j + 2]);
                quads[4 * i + 2 * j] = _mm256_unpacklo_epi64(a, b);
                quads[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(a, b);
            }
        }
        for i in 0..4 {
            let low = _mm256_permute2x128_si256::<0x20>(quads[i], quads[4 + i]);
            let high = _mm256_permute2x128_si256::<0x31>(quads[i], quads[4 + i]);
            for (word, register) in [(i, low), (4 + i, high)] {
                let at = (LANES * half + word) * height;
                // SAFETY: 8 words, as asserted above.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(at).cast(), register) };
            }
        }
    }
}

/// Words `first..first + n` of a row as tiles hold them.
#[inline(always)]
fn row_words(dtype: DType, row: &[u8], first: usize, n: usize, words: &mut [u32; RUN]) {
    if let DType::Affine { bits: bits @ (2 | 3 | 5 | 6), .. } = dtype {
        let (per_word, wide) = if bits < 4 { (8, 4) } else { (4, 8) };
        for (i, word) in words[..n].iter_mut().enumerate() {
            let codes = (0..per_word).map(|j| code_at(row, bits.into(), (first + i) * per_word + j));
            *word = codes.enumerate().fold(0, |word, (j, code)| word | code << (wide * j));
        }
    } else {
        for (word, bytes) in words[..n].iter_mut().zip(&row.as_chunks::<4>().0[first..]) {
            *word = u32::from_le_bytes(*bytes);
        }
    }
    match dtype {
        DType::BF16 => {
            for four in words.as_chunks_mut::<4>().0 {
                let [a, b, c, d] = *four;
                *four =
                    [a & 0xffff | b << 16, c & 0xffff | d << 16, a >> 16 | b & 0xffff_0000, c >> 16 | d & 0xffff_0000];
            }
        }
        DType::Mxfp4 | DType::Nvfp4 | DType::Affine { bits: 2..=4, .. } => {
            for word in words {
                *word = interleaved_nibbles(*word);
            }
        }
        _ => {}
    }
}

/// Code `k` of a row that is one stream of `bits` a code, lowest first.
#[inline(always)]
fn code_at(row: &[u8], bits: usize, k: usize) -> u32 {
    let (byte, shift) = (k * bits / 8, k * bits % 8);
    let low = u32::from(row[byte]);
    let high = row.get(byte + 1).map_or(0, |b| u32::from(*b));
    (low | high << 8) >> shift & ((1 << bits) - 1)
}

/// Scales to `[groups, height]` in the layout's form.
fn pack_scales(data: &MatrixData, source: &[u8], rows: std::ops::Range<usize>, height: usize, out: &mut [u8]) {
    match data.dtype {
        DType::Nvfp4 => {
            let n_groups = data.cols / 16;
            let (out, _) = out.as_chunks_mut::<2>();
            out.fill([0; 2]);
            for (lane, row) in rows.enumerate() {
                let row = &source[row * n_groups..][..n_groups];
                for (scale, to) in row.iter().zip(out[lane..].iter_mut().step_by(height)) {
                    // Four significant bits: exact.
                    *to = half::bf16::from_f32(E4M3[usize::from(*scale)]).to_le_bytes();
                }
            }
        }
        DType::Fp8Block => {
            let n_groups = data.cols.div_ceil(128);
            let (source, out) = (source.as_chunks::<4>().0, out.as_chunks_mut::<4>().0);
            out.fill([0; 4]);
            for (lane, row) in rows.enumerate() {
                let row = &source[row / 128 * n_groups..][..n_groups];
                for (scale, to) in row.iter().zip(out[lane..].iter_mut().step_by(height)) {
                    *to = *scale;
                }
            }
        }
        _ => pack_params(source, data.cols / data.dtype.group_size(), rows, height, out),
    }
}

/// Params `[rows, groups]` to `[groups, height]`.
fn pack_params(source: &[u8], n_groups: usize, rows: std::ops::Range<usize>, height: usize, out: &mut [u8]) {
    if out.is_empty() {
        return;
    }
    if rows.len() < height {
        out.fill(0);
    }
    match out.len() / (n_groups * height) {
        1 => transpose::<1>(source, n_groups, rows, height, out),
        2 => transpose::<2>(source, n_groups, rows, height, out),
        4 => transpose::<4>(source, n_groups, rows, height, out),
        _ => {}
    }
}

fn transpose<const SIZE: usize>(
    source: &[u8],
    n_groups: usize,
    rows: std::ops::Range<usize>,
    height: usize,
    out: &mut [u8],
) {
    let (source, out) = (source.as_chunks::<SIZE>().0, out.as_chunks_mut::<SIZE>().0);
    for (lane, row) in rows.enumerate() {
        let row = &source[row * n_groups..][..n_groups];
        for (param, to) in row.iter().zip(out[lane..].iter_mut().step_by(height)) {
            *to = *param;
        }
    }
}

#[cfg(test)]
mod tests {
    use tandem_core::quant;

    use super::*;

    #[test]
    fn rows_decode_as_they_did_in_the_checkpoint() {
        let affine = |bits, group_size, params| DType::Affine { bits, group_size, params };
        let formats = [
            DType::Mxfp4,
            DType::Mxfp8,
            DType::Nvfp4,
            DType::Fp8Block,
            DType::BF16,
            affine(2, 64, Float::BF16),
            affine(3, 32, Float::BF16),
            affine(4, 32, Float::F16),
            affine(5, 64, Float::F32),
            affine(6, 128, Float::F16),
            affine(8, 64, Float::BF16),
            affine(8, 128, Float::F32),
        ];
        for isa in Isa::available().into_iter().filter(|isa| height_for(*isa) > 0) {
            for dtype in formats {
                for (rows, cols) in [(1, 128), (32, 256), (33, 128), (70, 384), (150, 160)] {
                    if dtype != DType::Fp8Block && cols % dtype.group_size() != 0 {
                        continue;
                    }
                    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
                    let packed = quant::quantize(dtype, rows, cols, &values).expect("fits");
                    let part = MatrixPart {
                        weight: packed.weight.into(),
                        scales: packed.scales.into(),
                        biases: packed.biases.into(),
                        global_scale: (dtype == DType::Nvfp4).then_some(31.0),
                    };
                    let data = MatrixData { name: String::new(), dtype, rows, cols, parts: vec![part.clone(), part] };
                    let (tiles, checked) = Tiles::new(&data, isa, &Pool::new(2)).expect("memory");
                    assert!(checked.is_ok());
                    let (mut found, mut expected) = (vec![0.0; cols], vec![0.0; cols]);
                    for row in 0..rows {
                        tiles.dequantize_row(1, row, &mut found);
                        data.view(1).dequantize_row(row, &mut expected);
                        assert_eq!(found, expected, "{isa} {dtype} {rows}x{cols} row {row}");
                    }
                }
            }
        }
    }
}
