//! Tiles of a packed matrix times activations: decode and prefill alike.
//!
//! A step takes one word of every row of a tile ([`crate::tiles`]) and multiplies it by the same word of each of a few
//! tokens, broadcast; codes are unpacked once for all of them. Sums are taken per group of columns and then scaled. A
//! value does not depend on what other tokens it is computed with. One file per instruction set; this one chooses the
//! operand, cuts tokens into passes and checks lengths.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use tandem_core::quant::minifloat::E2M1;

use super::activations::{Activations, IntegerRow, Numerics, SumsOf};
use crate::isa::Isa;
use crate::tiles::{Codes, Layout, MAX_HEIGHT, Scales, Tile, Tiles};

/// Tokens of one pass, at most.
const MAX_TOKENS: usize = 6;
/// Columns of one step, which share a scale of the activations.
const GROUP: usize = 32;

/// Sums of a pass, `[tokens, rows of the tile]`.
type Sums = [[f32; MAX_HEIGHT]; MAX_TOKENS];

/// What the inner loop multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    /// Unsigned codes times signed bytes, 32-bit sums per group.
    Int8,
    /// Unsigned codes times signed 16-bit integers, 32-bit sums per group.
    Int16,
    /// Codes as bf16 times bf16.
    Bf16,
    /// Decoded values in f32.
    F32,
}

impl Operand {
    /// The operand that `numerics` asks for, or the next more exact one that this processor multiplies.
    pub(crate) fn choose(layout: Layout, numerics: Numerics, isa: Isa) -> Operand {
        let integers = layout.codes.are_integers();
        match (numerics, isa) {
            // Without dot products of bytes, pairs of 8-bit codes times 8-bit activations do not fit 16-bit sums.
            (Numerics::Int8, Isa::Avx2) if integers && (layout.codes != Codes::U8 || isa.has_vnni()) => Operand::Int8,
            (Numerics::Int8 | Numerics::Bf16, Isa::Avx2) if integers => Operand::Int16,
            (Numerics::Int8, Isa::Avx512) if integers && isa.has_vnni() => Operand::Int8,
            (Numerics::Bf16, Isa::Avx512) if isa.has_bf16() => Operand::Bf16,
            _ => Operand::F32,
        }
    }

    fn sums(self) -> SumsOf {
        match self {
            Operand::Int8 => SumsOf::Int8,
            Operand::Int16 => SumsOf::Int16,
            Operand::Bf16 | Operand::F32 => SumsOf::Plain,
        }
    }

    /// Tokens of one pass: as many accumulators as leave registers for operands.
    fn max_tokens(self, isa: Isa) -> usize {
        match (isa, self) {
            (Isa::Avx2, Operand::F32) => 3,
            (Isa::Avx2, _) => 4,
            _ => MAX_TOKENS,
        }
    }
}

/// Bytes ahead of the one being read that are asked for, into the second-level cache: the processor's own prefetchers stop
/// at every page. Without, the kernels of a 2-core Zen 4 machine reach 0.6 to 0.75 of plain reading in memory, with these
/// 0.8 to 0.97 (in one run each: mxfp4, affine 4-bit in small matrices, affine 8-bit); first-level prefetches do not help.
const fn ahead(operand: Operand, codes: Codes) -> usize {
    match (operand, codes.bits()) {
        (_, 4) => 8 << 10,
        (Operand::Int8, _) => 2 << 10,
        _ => 4 << 10,
    }
}

/// `out[t * n_rows + i] = matrix[first_row + i] . x[tokens[t]]` for `n_rows` rows of matrix `part`; `first_row` is the
/// first of a tile.
#[allow(clippy::too_many_arguments)]
pub(crate) fn tile_rows(
    isa: Isa,
    operand: Operand,
    matrix: &Tiles,
    part: usize,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    let height = matrix.height();
    assert!(first_row.is_multiple_of(height) && first_row + n_rows <= matrix.rows);
    // Equal shares: 8 tokens are two passes of 4, not 6 and 2.
    let most = operand.max_tokens(isa);
    let share = tokens.len().div_ceil(tokens.len().div_ceil(most).max(1)).max(1);
    let mut sums = [[0.0; MAX_HEIGHT]; MAX_TOKENS];
    // What comes before the tiles' own prefetches, at once.
    let first = matrix.tile(part, first_row / height).codes.as_ptr();
    prefetch_lines(first, ahead(operand, matrix.layout.codes).div_ceil(64));
    for start in (0..n_rows).step_by(height) {
        let tile = matrix.tile(part, (first_row + start) / height);
        let n = height.min(n_rows - start);
        for (pass, tokens) in tokens.chunks(share).enumerate() {
            // SAFETY: tiles exist only on processors with the instructions of `isa`, and the operand was chosen for it
            // (`Operand::choose`).
            unsafe {
                match tokens.len() {
                    1 => pass_of::<1>(isa, operand, &tile, x, tokens, &mut sums),
                    2 => pass_of::<2>(isa, operand, &tile, x, tokens, &mut sums),
                    3 => pass_of::<3>(isa, operand, &tile, x, tokens, &mut sums),
                    4 => pass_of::<4>(isa, operand, &tile, x, tokens, &mut sums),
                    5 => pass_of::<5>(isa, operand, &tile, x, tokens, &mut sums),
                    _ => pass_of::<6>(isa, operand, &tile, x, tokens, &mut sums),
                }
            }
            for (t, sums) in sums[..tokens.len()].iter().enumerate() {
                out[(pass * share + t) * n_rows + start..][..n].copy_from_slice(&sums[..n]);
            }
        }
    }
}

/// # Safety
/// The processor must have what `isa` and `operand` need.
unsafe fn pass_of<const T: usize>(
    isa: Isa,
    operand: Operand,
    tile: &Tile<'_>,
    x: &Activations,
    tokens: &[u32],
    out: &mut Sums,
) {
    let token = |t: usize| tokens[t] as usize;
    let sums = |t: usize| if tile.layout.biased { x.sums(token(t), tile.layout.group, operand.sums()) } else { &[] };
    // SAFETY: the caller's promise.
    unsafe {
        match operand {
            Operand::Int8 => {
                let x: [IntegerToken<'_, i8>; T] =
                    std::array::from_fn(|t| IntegerToken::new(tile, x.q8(token(t)), sums(t)));
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512::int8_tile(tile, &x, out),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2::int8_tile(isa, tile, &x, out),
                    _ => unreachable!("no tiles for {isa}"),
                }
            }
            Operand::Int16 => {
                let x: [IntegerToken<'_, i16>; T] =
                    std::array::from_fn(|t| IntegerToken::new(tile, x.pairs_i16(token(t)), sums(t)));
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2::int16_tile(tile, &x, out),
                    _ => unreachable!("no such tiles for {isa}"),
                }
            }
            Operand::Bf16 => {
                let x: [FloatToken<'_, u16>; T] =
                    std::array::from_fn(|t| FloatToken::new(tile, x.pairs_bf16(token(t)), sums(t)));
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512::bf16_tile(tile, &x, out),
                    _ => unreachable!("no such tiles for {isa}"),
                }
            }
            Operand::F32 => {
                let x: [FloatToken<'_, f32>; T] =
                    std::array::from_fn(|t| FloatToken::new(tile, x.row(token(t)), sums(t)));
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512::f32_tile(tile, &x, out),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2::f32_tile(tile, &x, out),
                    _ => unreachable!("no tiles for {isa}"),
                }
            }
        }
    }
}

/// A token's activations as integers, lengths checked: bytes in the order of the columns, or 16-bit ones in the order of
/// pairs of [`crate::tiles`].
#[derive(Clone, Copy)]
struct IntegerToken<'a, T> {
    values: &'a [T],
    /// Per group of 32.
    scales: &'a [f32],
    /// Sums of the values per group of 32.
    group_sums: &'a [i32],
    /// The same per 16, if the tile has scales per 16.
    half_sums: &'a [i32],
    /// Sums of the activations per group of the matrix, which its biases multiply; empty without biases.
    sums: &'a [f32],
}

impl<'a, T> IntegerToken<'a, T> {
    fn new(tile: &Tile<'_>, row: IntegerRow<'a, T>, sums: &'a [f32]) -> IntegerToken<'a, T> {
        let n_groups = tile.cols / GROUP;
        let IntegerRow { values, scales, group_sums, half_sums } = row;
        assert!(values.len() >= tile.cols && scales.len() >= n_groups && group_sums.len() >= n_groups);
        assert!(tile.layout.group >= GROUP || half_sums.len() >= 2 * n_groups);
        assert!(!tile.layout.biased || sums.len() >= tile.cols / tile.layout.group);
        IntegerToken { values, scales, group_sums, half_sums, sums }
    }
}

/// A token's activations as f32 in order, or as bf16 in the order of pairs of [`crate::tiles`]; lengths checked.
#[derive(Clone, Copy)]
struct FloatToken<'a, E> {
    values: &'a [E],
    /// As in [`IntegerToken`].
    sums: &'a [f32],
}

impl<'a, E> FloatToken<'a, E> {
    fn new(tile: &Tile<'_>, values: &'a [E], sums: &'a [f32]) -> FloatToken<'a, E> {
        assert!(values.len() >= tile.cols);
        assert!(!tile.layout.biased || sums.len() >= tile.cols / tile.layout.group);
        FloatToken { values, sums }
    }
}

/// Values of the 16 codes of a 4-bit layout.
fn code_values(codes: Codes) -> [f32; 16] {
    if codes == Codes::E2m1 { E2M1 } else { std::array::from_fn(|i| i as f32) }
}

/// The same as unsigned bytes, what was added to make them so, and what they count.
fn code_bytes(codes: Codes) -> ([i8; 16], i32, f32) {
    match codes {
        Codes::E2m1 => (E2M1.map(|v| (v * 2.0) as i8 + 12), 12, 0.5),
        _ => (std::array::from_fn(|i| i as i8), 0, 1.0),
    }
}

/// Groups of 32 columns that share a scale, as a power of two; 0 too where a group of 16 has its own.
fn share_log2(layout: &Layout) -> u32 {
    (layout.group / GROUP).max(1).trailing_zeros()
}

/// Asks for what lies `ahead` of the tile's group `group`: as much as a group of columns takes with its scales and
/// biases, so that tiles in a row are asked for without a gap.
#[inline(always)]
fn prefetch_group<const LINES: usize>(tile: &Tile<'_>, group: usize, group_bytes: usize, ahead: usize) {
    prefetch_lines(tile.codes.as_ptr().wrapping_add(ahead + group * group_bytes), LINES);
}

/// Asks for cache lines from `first` on.
#[inline(always)]
#[allow(unused_unsafe)] // prefetching became safe after rust-version
fn prefetch_lines(first: *const u8, n: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..n {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(first.wrapping_add(64 * line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (first, n);
}
