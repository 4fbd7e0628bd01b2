//! Tiles of a packed matrix times activations: decode and prefill alike.
//!
//! A step takes one word of every row of a tile ([`crate::tiles`]) and multiplies it by the same word of each of a few
//! tokens, broadcast; codes are unpacked once for all of them. Sums are taken per group of columns and then scaled. A
//! value does not depend on what other tokens it is computed with. One file per instruction set; this one chooses the
//! operand, cuts tokens into passes and checks lengths.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use tandem_core::quant::minifloat::E2M1;
use tandem_core::{EXACT_ROWS, Float, Numerics};

use super::activations::{Activations, IntegerRow, SumsOf};
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
    /// Decoded values as bf16 times bf16 in AMX's registers, for steps of many rows.
    AmxBf16,
    /// Decoded values in f32.
    F32,
}

impl Operand {
    /// The operand that `numerics` asks for in a step of `n_rows` rows, or the next more exact one that this processor
    /// multiplies.
    pub(crate) fn choose(layout: Layout, numerics: Numerics, isa: Isa, n_rows: usize) -> Operand {
        let integers = layout.codes.are_integers();
        match (numerics, isa) {
            // Not for scales of f32, which bf16 would round.
            (Numerics::Bf16, Isa::Amx) if n_rows > EXACT_ROWS && layout.scales != Scales::Float(Float::F32) => {
                Operand::AmxBf16
            }
            // Without dot products of bytes, pairs of 8-bit codes times 8-bit activations do not fit 16-bit sums.
            (Numerics::Int8, Isa::Avx2) if integers && (layout.codes != Codes::U8 || isa.has_vnni()) => Operand::Int8,
            (Numerics::Int8 | Numerics::Bf16, Isa::Avx2) if integers => Operand::Int16,
            (Numerics::Int8, Isa::Avx512 | Isa::Amx) if integers => Operand::Int8,
            // Twice as fast as products of bf16 on Zen 4, and more exact.
            (Numerics::Bf16, Isa::Avx512 | Isa::Amx) if integers => Operand::Int16,
            (Numerics::Bf16, Isa::Avx512 | Isa::Amx) if isa.has_bf16() => Operand::Bf16,
            (Numerics::Int8, Isa::Neon) if integers && isa.has_int8_dot() => Operand::Int8,
            (Numerics::Bf16, Isa::Neon) if layout.codes == Codes::Bf16 && isa.has_bf16() => Operand::Bf16,
            _ => Operand::F32,
        }
    }

    fn sums(self) -> SumsOf {
        match self {
            Operand::Int8 => SumsOf::Int8,
            Operand::Int16 => SumsOf::Int16,
            Operand::Bf16 | Operand::AmxBf16 | Operand::F32 => SumsOf::Plain,
        }
    }

    /// Tokens of one pass: as many accumulators as leave registers for operands.
    fn max_tokens(self, isa: Isa) -> usize {
        match (isa, self) {
            (Isa::Avx2, Operand::F32) => 3,
            (Isa::Avx2 | Isa::Neon, _) => 4,
            _ => MAX_TOKENS,
        }
    }
}

/// Bytes ahead of the one being read that are asked for, into the second-level cache: the processor's own prefetchers stop
/// at every page.
const AHEAD: usize = 8 << 10;
/// The same where every line is asked for.
const fn lines_ahead(operand: Operand, code_bits: usize) -> usize {
    match (operand, code_bits) {
        (_, 4) => 8 << 10,
        (Operand::Int8, _) => 2 << 10,
        _ => 4 << 10,
    }
}
/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of which one line is asked for when few tokens leave the processor waiting for memory: it starts the processor's
/// prefetchers on the rest. Every line asked for takes one of the few slots that the loads need too: on Zen 4 (mxfp4,
/// int8 activations, two threads) asking for all lines reaches 86 % of plain reading, for one of eight 90 %, for none
/// 82 %. Not where [`crate::isa::wants_every_line`]: on Sapphire Rapids (two GLM-5.1 layers, int8, 16 threads) a step
/// takes 7.8, 9.2 and 8.8 ms.
const STRIDE: usize = 512;
/// Tokens from which on arithmetic bounds, and every line is asked for: 256 tokens through a GLM-5.1 layer on Zen 4 with
/// int8 activations reach 440 to 480 tokens/s, with one line of eight 390 to 415. The same holds for one token where 4-bit
/// codes meet more than bytes (22 GB/s a core from cache, 40 with int8).
const MANY_TOKENS: usize = 3;

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
    #[cfg(target_arch = "x86_64")]
    if operand == Operand::AmxBf16 {
        // SAFETY: `Isa::Amx`, for which alone this is chosen, only exists on processors with AMX and what `Isa::Avx512` needs.
        return unsafe { amx::tile_rows(matrix, part, first_row, n_rows, x, tokens, out) };
    }
    // Equal shares: 8 tokens are two passes of 4, not 6 and 2.
    let most = operand.max_tokens(isa);
    let share = tokens.len().div_ceil(tokens.len().div_ceil(most).max(1)).max(1);
    let mut sums = [[0.0; MAX_HEIGHT]; MAX_TOKENS];
    let code_bits = matrix.layout.codes.bits();
    let is_arithmetic_bound = tokens.len() >= MANY_TOKENS || (operand != Operand::Int8 && code_bits == 4);
    let every_line = is_arithmetic_bound || crate::isa::wants_every_line();
    let ahead = if every_line { lines_ahead(operand, code_bits) } else { AHEAD };
    // What comes before the tiles' own prefetches, at once.
    let first = matrix.tile(part, first_row / height).codes.as_ptr();
    if every_line {
        prefetch_stretch::<LINE>(first, ahead)
    } else {
        prefetch_stretch::<STRIDE>(first, ahead)
    }
    for start in (0..n_rows).step_by(height) {
        let mut tile = matrix.tile(part, (first_row + start) / height);
        (tile.ahead, tile.every_line) = (ahead, every_line);
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
                    Isa::Avx512 | Isa::Amx => avx512::int8_tile(tile, &x, out),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2::int8_tile(isa, tile, &x, out),
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon => neon::int8_tile(isa, tile, &x, out),
                    _ => unreachable!("no tiles for {isa}"),
                }
            }
            Operand::Int16 => {
                let x: [IntegerToken<'_, i16>; T] =
                    std::array::from_fn(|t| IntegerToken::new(tile, x.pairs_i16(token(t)), sums(t)));
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 | Isa::Amx => avx512::int16_tile(tile, &x, out),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2::int16_tile(tile, &x, out),
                    _ => unreachable!("no such tiles for {isa}, {} tokens", x.len()),
                }
            }
            Operand::Bf16 => {
                let x: [FloatToken<'_, u16>; T] =
                    std::array::from_fn(|t| FloatToken::new(tile, x.pairs_bf16(token(t)), sums(t)));
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 | Isa::Amx => avx512::bf16_tile(tile, &x, out),
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon => neon::bf16_tile(tile, &x, out),
                    _ => unreachable!("no such tiles for {isa}"),
                }
            }
            Operand::AmxBf16 => unreachable!("it has its own passes"),
            Operand::F32 => {
                let x: [FloatToken<'_, f32>; T] =
                    std::array::from_fn(|t| FloatToken::new(tile, x.row(token(t)), sums(t)));
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 | Isa::Amx => avx512::f32_tile(tile, &x, out),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2::f32_tile(tile, &x, out),
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon => neon::f32_tile(tile, &x, out),
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
    /// The same per 16, if the tile has scales per 16. Arm's kernels have no need of them.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
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
#[cfg(target_arch = "x86_64")]
fn code_values(codes: Codes) -> [f32; 16] {
    if codes == Codes::E2m1 { E2M1 } else { std::array::from_fn(|i| i as f32) }
}

/// The same as unsigned bytes, what was added to make them so, and what they count.
#[cfg(target_arch = "x86_64")]
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

/// Asks for what will be read later than the tile's group `group`, which is `BYTES` long and more (scales and biases).
#[inline(always)]
fn prefetch_group<const BYTES: usize>(tile: &Tile<'_>, group: usize) {
    let first = tile.codes.as_ptr().wrapping_add(tile.ahead + group * tile.group_bytes);
    if tile.every_line {
        // Two lines more for scales and biases, so that groups in a row are asked for without a gap.
        prefetch_stretch::<LINE>(first, BYTES + 2 * LINE);
    } else {
        prefetch_stretch::<STRIDE>(first, BYTES);
    }
}

/// Asks for one line of each `STEP` of `bytes` from `first` on.
#[inline(always)]
#[allow(unused_unsafe)] // prefetching became safe after rust-version
fn prefetch_stretch<const STEP: usize>(first: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(STEP) {
        let line = first.wrapping_add(at);
        // SAFETY: a prefetch may name any address.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
        }
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            std::arch::asm!("prfm pldl2keep, [{}]", in(reg) line, options(nostack, preserves_flags));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let _ = line;
    }
}
