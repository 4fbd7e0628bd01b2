//! Weights in the order in which the AVX-512 kernels read them.
//!
//! A tile is 32 rows of a matrix, one row to a 32-bit lane. Its codes come word by word: the first 32-bit word of each
//! of the 32 rows, then the second, and so on, so that one multiplication serves 16 rows and its other operand is one
//! broadcast word of the activations. Scales and biases of a group stand side by side for the 32 rows. The last tile of
//! a matrix is filled up with zeros. The bits of codes, scales and biases stay what they were.
//!
//! Within a word, codes are in the order that costs the kernels the fewest instructions:
//! - 4 bits: column `j` of the eight in bits `8 j..8 j + 4`, column `4 + j` above it (`j` in 0..4): masking yields four
//!   columns in order.
//! - 8 bits: as they were.
//! - bf16: the eight columns of four words are (0, 2), (4, 6), (1, 3), (5, 7), the order of pairs that shifting 4-bit
//!   codes yields.

#![allow(unsafe_code)]

use std::sync::Mutex;

use memmap2::{Advice, MmapMut};
use tandem_core::weights::{MatrixData, MatrixPart};
use tandem_core::{CheckpointError, DType};

use crate::pool::Pool;
use crate::shared_mut::SharedMut;

/// Rows of a tile: two registers of 16 lanes.
pub(crate) const TILE_ROWS: usize = 32;
/// Tiles repacked by one task, at least this many bytes of them.
const TASK_BYTES: usize = 256 << 10;

/// A matrix or stack of equal matrices in tiles.
pub struct Tiles {
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) n_parts: usize,
    memory: MmapMut,
}

/// One tile.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub(crate) dtype: DType,
    pub(crate) cols: usize,
    /// `[words of a row, 32] u32`, 64-byte aligned.
    pub(crate) codes: &'a [u8],
    /// `[groups, 32]`, or empty.
    pub(crate) scales: &'a [u8],
    /// `[groups, 32]`, or empty.
    pub(crate) biases: &'a [u8],
}

impl Tile<'_> {
    /// Bytes of 32 columns with their share of scales and biases.
    pub(crate) fn group_bytes(&self) -> usize {
        (self.codes.len() + self.scales.len() + self.biases.len()) * 32 / self.cols
    }
}

impl Tiles {
    /// Formats and widths that tiles exist for.
    pub(crate) fn supports(dtype: DType, cols: usize) -> bool {
        cols.is_multiple_of(32) && matches!(dtype, DType::Mxfp4 | DType::BF16 | DType::Affine { bits: 4 | 8, .. })
    }

    /// Repacks `data` over the pool, and checks on the way that its elements are finite; `None` when the system has no
    /// memory for it.
    pub(crate) fn new(data: &MatrixData, pool: &Pool) -> Option<(Tiles, Result<(), CheckpointError>)> {
        let mut tiles = Tiles {
            dtype: data.dtype,
            rows: data.rows,
            cols: data.cols,
            n_parts: data.parts.len(),
            memory: MmapMut::map_anon(1).ok()?,
        };
        let tile_bytes = tiles.tile_bytes();
        let n_tiles = tiles.n_tiles();
        tiles.memory = MmapMut::map_anon((data.parts.len() * n_tiles * tile_bytes).max(1)).ok()?;
        // Fewer page faults and look-ups; a system without huge pages says no, and nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = tiles.memory.advise(Advice::HugePage);
        let (codes, scales, biases) = tiles.lengths();
        let target = SharedMut::new(&mut tiles.memory[..]);
        let failed = Mutex::new(Ok(()));
        pool.chunks(data.parts.len() * n_tiles, TASK_BYTES.div_ceil(tile_bytes), |range| {
            for i in range {
                let first_row = i % n_tiles * TILE_ROWS;
                // SAFETY: one task per tile.
                let tile = unsafe { target.slice(i * tile_bytes, codes + scales + biases) };
                let (to_codes, rest) = tile.split_at_mut(codes);
                let (to_scales, to_biases) = rest.split_at_mut(scales);
                let part = &data.parts[i / n_tiles];
                // While the rows are in the cache.
                let checked = data.check_finite(i / n_tiles, first_row, TILE_ROWS.min(data.rows - first_row));
                if let (Err(error), Ok(mut failed)) = (checked, failed.lock()) {
                    *failed = Err(error);
                }
                pack_codes(data.dtype, &part.weight, data.cols, first_row, data.rows, to_codes);
                let n_groups = data.cols / data.dtype.group_size();
                pack_params(&part.scales, n_groups, first_row, data.rows, to_scales);
                pack_params(&part.biases, n_groups, first_row, data.rows, to_biases);
            }
        });
        Some((tiles, failed.into_inner().unwrap_or(Ok(()))))
    }

    /// Bytes of codes, scales and biases of a tile.
    fn lengths(&self) -> (usize, usize, usize) {
        (
            self.dtype.weight_bytes(TILE_ROWS, self.cols),
            self.dtype.scale_bytes(TILE_ROWS, self.cols),
            self.dtype.bias_bytes(TILE_ROWS, self.cols),
        )
    }

    fn tile_bytes(&self) -> usize {
        let (codes, scales, biases) = self.lengths();
        (codes + scales + biases).next_multiple_of(64)
    }

    fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Tile `index` of matrix `part`.
    pub(crate) fn tile(&self, part: usize, index: usize) -> Tile<'_> {
        assert!(part < self.n_parts && index < self.n_tiles());
        let (codes, scales, biases) = self.lengths();
        let bytes = &self.memory[(part * self.n_tiles() + index) * self.tile_bytes()..];
        let (to_scales, to_biases) = (codes + scales, codes + scales + biases);
        Tile {
            dtype: self.dtype,
            cols: self.cols,
            codes: &bytes[..codes],
            scales: &bytes[codes..to_scales],
            biases: &bytes[to_scales..to_biases],
        }
    }

    /// Row `row` of matrix `part`, decoded.
    pub(crate) fn dequantize_row(&self, part: usize, row: usize, out: &mut [f32]) {
        let (tile, lane) = (self.tile(part, row / TILE_ROWS), row % TILE_ROWS);
        let words: Vec<u32> = tile
            .codes
            .as_chunks::<4>()
            .0
            .iter()
            .skip(lane)
            .step_by(TILE_ROWS)
            .map(|b| u32::from_le_bytes(*b))
            .collect();
        let mut weight = Vec::with_capacity(words.len() * 4);
        if self.dtype == DType::BF16 {
            for four in words.as_chunks::<4>().0 {
                for k in 0..8 {
                    weight.extend(((four[PAIR_OF[k]] >> (16 * (k / 2 % 2))) as u16).to_le_bytes());
                }
            }
        } else {
            for word in words {
                let word = if self.dtype.bits() == 4 { nibbles_in_order(word) } else { word };
                weight.extend(word.to_le_bytes());
            }
        }
        let n_params = self.cols / self.dtype.group_size() * TILE_ROWS;
        let params = |bytes: &[u8]| -> Vec<u8> {
            let size = bytes.len() / n_params;
            bytes.chunks_exact(size.max(1)).skip(lane).step_by(TILE_ROWS).flatten().copied().collect()
        };
        let part = MatrixPart {
            weight: weight.into(),
            scales: params(tile.scales).into(),
            biases: params(tile.biases).into(),
            global_scale: None,
        };
        let data = MatrixData { name: String::new(), dtype: self.dtype, rows: 1, cols: self.cols, parts: vec![part] };
        data.view(0).dequantize_row(0, out);
    }
}

/// Which of four words holds column `k` of eight in bf16.
const PAIR_OF: [usize; 8] = [0, 2, 0, 2, 1, 3, 1, 3];

/// Eight 4-bit codes, lowest first, to the order of tiles.
fn interleaved_nibbles(word: u32) -> u32 {
    let spread = |half: u32| {
        let bytes = (half | half << 8) & 0x00ff_00ff;
        (bytes | bytes << 4) & 0x0f0f_0f0f
    };
    spread(word & 0xffff) | spread(word >> 16) << 4
}

/// The inverse.
fn nibbles_in_order(word: u32) -> u32 {
    let gather = |bytes: u32| {
        let pairs = (bytes | bytes >> 4) & 0x00ff_00ff;
        (pairs | pairs >> 8) & 0xffff
    };
    gather(word & 0x0f0f_0f0f) | gather(word >> 4 & 0x0f0f_0f0f) << 16
}

/// Words `[rows, words]` to `[words, 32]`, each through what the format wants of it.
fn pack_codes(dtype: DType, source: &[u8], cols: usize, first_row: usize, rows: usize, out: &mut [u8]) {
    let row_bytes = dtype.weight_bytes(1, cols);
    let n = TILE_ROWS.min(rows - first_row);
    let (out, _) = out.as_chunks_mut::<4>();
    if n < TILE_ROWS {
        out.fill([0; 4]);
    }
    /// Words of a row that are taken before the next row's: one cache line.
    const RUN: usize = 16;
    for first in (0..row_bytes / 4).step_by(RUN) {
        for lane in 0..n {
            let row = &source[(first_row + lane) * row_bytes..][..row_bytes];
            let words = row.as_chunks::<4>().0;
            let words = &words[first..words.len().min(first + RUN)];
            let to = &mut out[first * TILE_ROWS..];
            if dtype == DType::BF16 {
                for (eight, words) in words.as_chunks::<4>().0.iter().enumerate() {
                    let [a, b, c, d] = words.map(u32::from_le_bytes);
                    let pairs = [
                        a & 0xffff | b << 16,
                        c & 0xffff | d << 16,
                        a >> 16 | b & 0xffff_0000,
                        c >> 16 | d & 0xffff_0000,
                    ];
                    for (i, pair) in pairs.into_iter().enumerate() {
                        to[(4 * eight + i) * TILE_ROWS + lane] = pair.to_le_bytes();
                    }
                }
            } else if dtype.bits() == 4 {
                for (i, word) in words.iter().enumerate() {
                    to[i * TILE_ROWS + lane] = interleaved_nibbles(u32::from_le_bytes(*word)).to_le_bytes();
                }
            } else {
                for (i, word) in words.iter().enumerate() {
                    to[i * TILE_ROWS + lane] = *word;
                }
            }
        }
    }
}

/// Params `[rows, groups]` to `[groups, 32]`.
fn pack_params(source: &[u8], n_groups: usize, first_row: usize, rows: usize, out: &mut [u8]) {
    let size = out.len() / (n_groups * TILE_ROWS);
    let n = TILE_ROWS.min(rows - first_row);
    if n < TILE_ROWS {
        out.fill(0);
    }
    match size {
        1 => transpose::<1>(source, n_groups, first_row, n, out),
        2 => transpose::<2>(source, n_groups, first_row, n, out),
        4 => transpose::<4>(source, n_groups, first_row, n, out),
        _ => {}
    }
}

fn transpose<const SIZE: usize>(source: &[u8], n_groups: usize, first_row: usize, n: usize, out: &mut [u8]) {
    let (source, out) = (source.as_chunks::<SIZE>().0, out.as_chunks_mut::<SIZE>().0);
    for lane in 0..n {
        let row = &source[(first_row + lane) * n_groups..][..n_groups];
        for (param, to) in row.iter().zip(out[lane..].iter_mut().step_by(TILE_ROWS)) {
            *to = *param;
        }
    }
}

#[cfg(test)]
mod tests {
    use tandem_core::{Float, quant};

    use super::*;

    #[test]
    fn rows_decode_as_they_did_in_the_checkpoint() {
        let affine = |bits, group_size, params| DType::Affine { bits, group_size, params };
        let formats = [
            DType::Mxfp4,
            DType::BF16,
            affine(4, 32, Float::F16),
            affine(8, 64, Float::BF16),
            affine(8, 128, Float::F32),
        ];
        for dtype in formats {
            for (rows, cols) in [(1, 128), (32, 256), (33, 128), (70, 384)] {
                let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
                let packed = quant::quantize(dtype, rows, cols, &values).expect("fits");
                let part = MatrixPart {
                    weight: packed.weight.into(),
                    scales: packed.scales.into(),
                    biases: packed.biases.into(),
                    global_scale: None,
                };
                let data = MatrixData { name: String::new(), dtype, rows, cols, parts: vec![part.clone(), part] };
                let (tiles, checked) = Tiles::new(&data, &Pool::new(2)).expect("memory");
                assert!(checked.is_ok());
                let (mut found, mut expected) = (vec![0.0; cols], vec![0.0; cols]);
                for row in 0..rows {
                    tiles.dequantize_row(1, row, &mut found);
                    data.view(1).dequantize_row(row, &mut expected);
                    assert_eq!(found, expected, "{dtype} {rows}x{cols} row {row}");
                }
            }
        }
    }
}
