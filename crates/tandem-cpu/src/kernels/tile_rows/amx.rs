//! AMX: many tokens times a tile of 32 rows, products of bf16.
//!
//! A few columns of a tile at a time become bf16 with their scales in them, in the order in which AMX reads its second
//! operand: a pair of columns of every row, then the next pair. Sums stay in its registers over all columns, for up to 32
//! tokens; more tokens share what was unpacked. For MXFP4 that is exact: an element has two bits, a scale is a power of
//! two. Affine weights are rounded.
//!
//! Sums are in another order than those of [`super::avx512`], which is why this is for steps of more than
//! [`tandem_core::EXACT_ROWS`] rows.

// Rows and tokens run over several arrays of registers at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;

use super::avx512::{HEIGHT, Params, words};
use super::{Activations, Codes, GROUP, Scales, Tile, Tiles, code_values, lines_ahead, prefetch_group};
use crate::scratch::with_scratch;

/// Tokens of one register.
const BLOCK: usize = 16;
/// Bytes of 32 columns of a tile as bf16.
const GROUP_BYTES: usize = 2 * GROUP * HEIGHT;
/// Groups between unpacking one and multiplying it: AMX reads what has left the processor's queue of stores.
const LAG: usize = 2;
/// Groups that are kept for few tokens.
const RING: usize = 4;
/// Groups that many tokens share: 32 KB, and of the activations a part that stays in the second-level cache.
const SHARED: usize = 16;

/// 32 columns of a row of activations as bf16, the even ones of eight before the odd ones.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line([u16; GROUP]);

impl Default for Line {
    fn default() -> Line {
        Line([0; GROUP])
    }
}

/// Lines from one row of activations to the next. One more than a row has: rows a power of two apart would share few places
/// of the cache.
pub(crate) fn pitch(width: usize) -> usize {
    width / GROUP + 1
}

/// Rows after the last that blocks of tokens may reach.
pub(crate) const EXTRA_ROWS: usize = BLOCK;

/// Rounds a row to lines.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn fill_lines(x: &[f32], out: &mut [Line]) {
    let order = _mm512_set_epi32(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
    // SAFETY: the caller's promise.
    unsafe { fill(x, 1.0, order, out) }
}

/// Rounds `scale * x` to lines whose elements are in order.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn fill_in_order(x: &[f32], scale: f32, out: &mut [Line]) {
    let order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // SAFETY: the caller's promise.
    unsafe { fill(x, scale, order, out) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn fill(x: &[f32], scale: f32, order: __m512i, out: &mut [Line]) {
    assert!(x.len() == out.len() * GROUP);
    let scale = _mm512_set1_ps(scale);
    for (x, out) in x.as_chunks::<GROUP>().0.iter().zip(out) {
        for half in 0..2 {
            // SAFETY: 16 floats, and room for 16 halves.
            unsafe {
                let values = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(16 * half)), scale);
                let bits = _mm512_castps_si512(values);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
                let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
                let rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0_0000));
                let ordered = _mm512_permutexvar_epi32(order, _mm512_srli_epi32::<16>(rounded));
                _mm256_storeu_si256(out.0.as_mut_ptr().add(16 * half).cast(), _mm512_cvtepi32_epi16(ordered));
            }
        }
    }
}

/// What multiplies: the processor, or in tests the definition. It holds the sums of two blocks of tokens and both halves of a
/// tile's rows.
pub(crate) trait Engine {
    /// Prepares this thread.
    unsafe fn new() -> Self;

    /// Sums of nothing.
    unsafe fn zero(&mut self);

    /// Sums as [`Engine::store`] stores them.
    unsafe fn load<const TWO: bool>(&mut self, from: *const f32, pitch: usize);

    /// Sums to `[16 tokens, or 32 if TWO][32 rows]`, tokens `pitch` floats apart.
    unsafe fn store<const TWO: bool>(&mut self, to: *mut f32, pitch: usize);

    /// Adds products of 16 tokens, or 32 if `TWO`, that are `pitch` lines apart, and `weights [16 pairs][32 rows][2]`.
    unsafe fn multiply<const TWO: bool>(&mut self, x: *const Line, pitch: usize, weights: *const u8);
}

/// The processor's.
pub(crate) struct Amx;

thread_local! {
    static CONFIGURED: Cell<bool> = const { Cell::new(false) };
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row.
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Registers 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

// Nothing else in this program uses AMX's registers, so that they keep their values from one block to the next. No block says
// that it leaves memory alone: each is done in its place among loads and stores.
impl Engine for Amx {
    unsafe fn new() -> Amx {
        CONFIGURED.with(|configured| {
            if !configured.replace(true) {
                // SAFETY: the processor has AMX and the system lets this process use it (`Isa::available`).
                unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, preserves_flags)) };
            }
        });
        Amx
    }

    #[inline(always)]
    unsafe fn zero(&mut self) {
        // SAFETY: changes these registers only.
        unsafe {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn load<const TWO: bool>(&mut self, from: *const f32, pitch: usize) {
        // SAFETY: reads what the caller promises.
        unsafe {
            asm!(
                "tileloadd tmm0, [{from} + {pitch}]",
                "tileloadd tmm1, [{from} + {pitch} + 64]",
                from = in(reg) from, pitch = in(reg) 4 * pitch,
                options(nostack, preserves_flags),
            );
            if TWO {
                asm!(
                    "tileloadd tmm2, [{from} + {pitch}]",
                    "tileloadd tmm3, [{from} + {pitch} + 64]",
                    from = in(reg) from.add(BLOCK * pitch), pitch = in(reg) 4 * pitch,
                    options(nostack, preserves_flags),
                );
            }
        }
    }

    #[inline(always)]
    unsafe fn store<const TWO: bool>(&mut self, to: *mut f32, pitch: usize) {
        // SAFETY: writes what the caller promises.
        unsafe {
            asm!(
                "tilestored [{to} + {pitch}], tmm0",
                "tilestored [{to} + {pitch} + 64], tmm1",
                to = in(reg) to, pitch = in(reg) 4 * pitch,
                options(nostack, preserves_flags),
            );
            if TWO {
                asm!(
                    "tilestored [{to} + {pitch}], tmm2",
                    "tilestored [{to} + {pitch} + 64], tmm3",
                    to = in(reg) to.add(BLOCK * pitch), pitch = in(reg) 4 * pitch,
                    options(nostack, preserves_flags),
                );
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const TWO: bool>(&mut self, x: *const Line, pitch: usize, weights: *const u8) {
        // SAFETY: reads what the caller promises: rows of 64 bytes, weights 128 bytes apart.
        unsafe {
            if TWO {
                asm!(
                    "tileloadd tmm6, [{weights} + {weights_pitch}]",
                    "tileloadd tmm4, [{first} + {pitch}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{weights} + {weights_pitch} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{second} + {pitch}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    first = in(reg) x, second = in(reg) x.add(BLOCK * pitch),
                    pitch = in(reg) size_of::<Line>() * pitch,
                    weights = in(reg) weights, weights_pitch = in(reg) 4 * HEIGHT,
                    options(nostack, preserves_flags),
                );
            } else {
                asm!(
                    "tileloadd tmm6, [{weights} + {weights_pitch}]",
                    "tileloadd tmm4, [{first} + {pitch}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{weights} + {weights_pitch} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    first = in(reg) x, pitch = in(reg) size_of::<Line>() * pitch,
                    weights = in(reg) weights, weights_pitch = in(reg) 4 * HEIGHT,
                    options(nostack, preserves_flags),
                );
            }
        }
    }
}

/// Multiplications of registers, `4 * steps` of them, for [`crate::peak`]; each is 16 x 16 x 32 products.
///
/// # Safety
/// The processor has AMX, and this process may use it.
pub(crate) unsafe fn multiply_registers(steps: usize) {
    // SAFETY: the caller's promise; registers only.
    unsafe {
        Amx::new().zero();
        for _ in 0..steps {
            asm!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                options(nostack, preserves_flags, nomem),
            );
        }
    }
}

/// [`super::tile_rows`] for [`super::Operand::AmxBf16`].
///
/// # Safety
/// The processor has AVX-512 with VBMI, and AMX with bf16.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn tile_rows(
    matrix: &Tiles,
    part: usize,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe { rows_of::<Amx>(matrix, part, first_row, n_rows, x, tokens, out) }
}

/// Activations of consecutive tokens: whole blocks can be read.
struct Tokens<'a> {
    lines: &'a [Line],
    pitch: usize,
    n: usize,
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn rows_of<E: Engine>(
    matrix: &Tiles,
    part: usize,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    let Some(first) = tokens.first().map(|t| *t as usize) else { return };
    assert!(out.len() >= tokens.len() * n_rows);
    let pitch = pitch(matrix.cols);
    let n = tokens.len();
    let mut of = |lines: &[Line]| {
        let tokens = Tokens { lines, pitch, n };
        assert!(lines.len() >= n.next_multiple_of(BLOCK) * pitch);
        let rows = Rows { matrix, part, first_row, n: n_rows };
        // SAFETY: the caller's promise.
        unsafe {
            match matrix.layout.codes {
                Codes::U4 | Codes::E2m1 => products::<E, NIBBLES>(&rows, &tokens, out),
                Codes::U8 => products::<E, U8_CODES>(&rows, &tokens, out),
                Codes::E4m3 => products::<E, E4M3_CODES>(&rows, &tokens, out),
                Codes::Bf16 => products::<E, BF16_CODES>(&rows, &tokens, out),
            }
        }
    };
    if tokens.iter().enumerate().all(|(i, token)| *token as usize == first + i) {
        return of(&x.lines()[first * pitch..]);
    }
    with_lines(n.next_multiple_of(BLOCK) * pitch, |lines| {
        for (token, to) in tokens.iter().zip(lines.chunks_exact_mut(pitch)) {
            to.copy_from_slice(&x.lines()[*token as usize * pitch..][..pitch]);
        }
        of(lines);
    });
}

/// Calls `body` with lines of unspecified content.
pub(crate) fn with_lines<R>(n: usize, body: impl FnOnce(&mut [Line]) -> R) -> R {
    const FLOATS: usize = size_of::<Line>() / size_of::<f32>();
    with_scratch((n + 1) * FLOATS, |memory| {
        // SAFETY: floats and halves may have any bits.
        let (_, lines, _) = unsafe { memory.align_to_mut::<Line>() };
        body(&mut lines[..n])
    })
}

struct Rows<'a> {
    matrix: &'a Tiles,
    part: usize,
    first_row: usize,
    n: usize,
}

impl<'a> Rows<'a> {
    /// The tile whose rows begin `start` after the first, and how many of these are wanted.
    fn tile(&self, start: usize) -> (Tile<'a>, usize) {
        let mut tile = self.matrix.tile(self.part, (self.first_row + start) / HEIGHT);
        tile.every_line = true;
        tile.ahead = lines_ahead(super::Operand::AmxBf16, tile.layout.codes.bits());
        (tile, HEIGHT.min(self.n - start))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn products<E: Engine, const CODES: u8>(rows: &Rows<'_>, tokens: &Tokens<'_>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match tokens.n.div_ceil(BLOCK) {
            1 => of_few::<E, CODES, false>(rows, tokens, out),
            2 => of_few::<E, CODES, true>(rows, tokens, out),
            _ => of_many::<E, CODES>(rows, tokens, out),
        }
    }
}

/// One block of tokens, or two: their sums stay in registers, and products of a group are taken while others are unpacked.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn of_few<E: Engine, const CODES: u8, const TWO: bool>(rows: &Rows<'_>, tokens: &Tokens<'_>, out: &mut [f32]) {
    let n_groups = rows.matrix.cols / GROUP;
    let x = tokens.lines.as_ptr();
    const PITCH: usize = HEIGHT;
    with_lines((RING * GROUP_BYTES + 4 * 2 * BLOCK * PITCH) / size_of::<Line>(), |memory| {
        let (ring, sums) = memory.split_at_mut(RING * GROUP_BYTES / size_of::<Line>());
        let ring = ring.as_mut_ptr().cast::<u8>();
        let sums = sums.as_mut_ptr().cast::<f32>();
        for start in (0..rows.n).step_by(HEIGHT) {
            let (tile, n) = rows.tile(start);
            let unpack = Unpack::new(&tile);
            // SAFETY: groups are within the tile and the tokens, whose lengths the caller checked; the ring and the sums have
            // the sizes above.
            unsafe {
                let mut engine = E::new();
                engine.zero();
                for group in 0..n_groups + LAG {
                    if group < n_groups {
                        unpack.group::<CODES>(group, ring.add(group % RING * GROUP_BYTES));
                    }
                    if let Some(group) = group.checked_sub(LAG) {
                        let weights = unpack.weights::<CODES>(group, ring.add(group % RING * GROUP_BYTES));
                        engine.multiply::<TWO>(x.add(group), tokens.pitch, weights);
                    }
                }
                engine.store::<TWO>(sums, PITCH);
                for t in 0..tokens.n {
                    let sums = std::slice::from_raw_parts(sums.add(t * PITCH), n);
                    scaled(sums, tile.unit, &mut out[t * rows.n + start..][..n]);
                }
            }
        }
    });
}

/// More blocks: a stretch of columns of a tile is unpacked once for all of them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn of_many<E: Engine, const CODES: u8>(rows: &Rows<'_>, tokens: &Tokens<'_>, out: &mut [f32]) {
    let n_groups = rows.matrix.cols / GROUP;
    let n_blocks = tokens.n.div_ceil(BLOCK);
    let x = tokens.lines.as_ptr();
    // A line more than a multiple of two: as for activations.
    let pitch = rows.n.next_multiple_of(HEIGHT) + GROUP / 2;
    let n_sums = n_blocks * BLOCK * pitch * size_of::<f32>() / size_of::<Line>();
    let n_shared = SHARED * GROUP_BYTES / size_of::<Line>();
    with_lines(n_shared + n_sums, |memory| {
        let (shared, sums) = memory.split_at_mut(n_shared);
        let shared = shared.as_mut_ptr().cast::<u8>();
        let sums = sums.as_mut_ptr().cast::<f32>();
        let mut unit = 1.0;
        for first in (0..n_groups).step_by(SHARED) {
            let stretch = SHARED.min(n_groups - first);
            for start in (0..rows.n).step_by(HEIGHT) {
                let (tile, _) = rows.tile(start);
                unit = tile.unit;
                let unpack = Unpack::new(&tile);
                // SAFETY: as above; sums have room for all tokens of all blocks, and all rows of the tiles.
                unsafe {
                    for group in 0..stretch {
                        unpack.group::<CODES>(first + group, shared.add(group * GROUP_BYTES));
                    }
                    let mut engine = E::new();
                    for block in (0..n_blocks).step_by(2) {
                        let sums = sums.add(block * BLOCK * pitch + start);
                        let x = x.add(block * BLOCK * tokens.pitch + first);
                        macro_rules! blocks {
                            ($two:literal) => {{
                                if first == 0 {
                                    engine.zero();
                                } else {
                                    engine.load::<$two>(sums, pitch);
                                }
                                for group in 0..stretch {
                                    let at = shared.add(group * GROUP_BYTES);
                                    let weights = unpack.weights::<CODES>(first + group, at);
                                    engine.multiply::<$two>(x.add(group), tokens.pitch, weights);
                                }
                                engine.store::<$two>(sums, pitch);
                            }};
                        }
                        if block + 1 < n_blocks {
                            blocks!(true);
                        } else {
                            blocks!(false);
                        }
                    }
                }
            }
        }
        for (t, out) in out.chunks_exact_mut(rows.n).enumerate().take(tokens.n) {
            // SAFETY: as above.
            scaled(unsafe { std::slice::from_raw_parts(sums.add(t * pitch), rows.n) }, unit, out);
        }
    });
}

fn scaled(sums: &[f32], unit: f32, out: &mut [f32]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum * unit;
    }
}

// Codes as constants that kernels are compiled for.
const NIBBLES: u8 = 0;
const U8_CODES: u8 = 1;
const E4M3_CODES: u8 = 2;
const BF16_CODES: u8 = 3;

/// Exponent that an e2m1 value has less than its own before its scale is added: no scale byte is smaller, and a code of zero
/// becomes 2^-64 of its scale.
const REBIAS: u8 = 64;
/// Scale bytes for which the sum of exponents is one of a finite number.
const EXPONENTS: std::ops::RangeInclusive<u8> = REBIAS..=252;

/// A tile's values as bf16.
struct Unpack<'a> {
    tile: &'a Tile<'a>,
    params: Params<'a>,
    /// MXFP4 whose scales can be added to the exponents of its elements.
    adds_exponents: bool,
    /// Values of 16 codes as bf16, their exponents lower by [`REBIAS`], twice.
    halves: __m512i,
    /// Values of 16 codes.
    values: __m512,
}

impl<'a> Unpack<'a> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn new(tile: &'a Tile<'a>) -> Unpack<'a> {
        let values = code_values(tile.layout.codes);
        let half = |v: f32| (v.to_bits() >> 16) as u16 - if v == 0.0 { 0 } else { (127 - u16::from(REBIAS)) << 7 };
        let halves: [u16; 32] = std::array::from_fn(|i| half(values[i % 16]));
        let adds_exponents = tile.layout.codes == Codes::E2m1
            && tile.layout.scales == Scales::E8m0
            && tile.scales.iter().fold(u8::MAX, |low, scale| low.min(*scale)) >= *EXPONENTS.start()
            && tile.scales.iter().fold(0, |high, scale| high.max(*scale)) <= *EXPONENTS.end();
        // SAFETY: 64 bytes each.
        unsafe {
            Unpack {
                tile,
                params: Params::new(tile),
                adds_exponents,
                halves: _mm512_loadu_si512(halves.as_ptr().cast()),
                values: _mm512_loadu_ps(values.as_ptr()),
            }
        }
    }

    /// Where the pairs of `group` are, `unpacked` being where [`Unpack::group`] put them: bf16 needs no unpacking.
    ///
    /// # Safety
    /// `group` must be one of the tile's.
    #[inline(always)]
    unsafe fn weights<const CODES: u8>(&self, group: usize, unpacked: *mut u8) -> *const u8 {
        // SAFETY: the caller's promise.
        if CODES == BF16_CODES { unsafe { self.tile.codes.as_ptr().add(group * GROUP_BYTES) } } else { unpacked }
    }

    /// 32 columns to `[16 pairs][32 rows][2]`.
    ///
    /// # Safety
    /// `group` must be one of the tile's, and `to` have room for [`GROUP_BYTES`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn group<const CODES: u8>(&self, group: usize, to: *mut u8) {
        match CODES {
            NIBBLES => prefetch_group::<{ 16 * HEIGHT }>(self.tile, group),
            BF16_CODES => return prefetch_group::<{ 64 * HEIGHT }>(self.tile, group),
            _ => prefetch_group::<{ 32 * HEIGHT }>(self.tile, group),
        }
        // SAFETY: the caller's promise.
        unsafe {
            if CODES == NIBBLES && self.adds_exponents {
                self.exponents(group, to);
            } else {
                self.floats::<CODES>(group, to);
            }
        }
    }

    /// [`Unpack::group`] where exponents can be added.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn exponents(&self, group: usize, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = self.tile.scales.as_ptr().add(group * HEIGHT);
            let add = |bytes: __m128i| {
                let exponents = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(REBIAS.into()));
                _mm512_or_si512(_mm512_slli_epi32::<7>(exponents), _mm512_slli_epi32::<23>(exponents))
            };
            let scales = [add(_mm_loadu_si128(bytes.cast())), add(_mm_loadu_si128(bytes.add(16).cast()))];
            for word in 0..4 {
                let codes = words(self.tile, group * 4 + word);
                for h in 0..2 {
                    let mut codes = codes[h];
                    for i in 0..4 {
                        // The permutation reads five bits, of which the fifth belongs to the next code.
                        let values = _mm512_add_epi16(_mm512_permutexvar_epi16(codes, self.halves), scales[h]);
                        _mm512_storeu_si512(to.add((4 * word + i) * 4 * HEIGHT + 64 * h).cast(), values);
                        codes = _mm512_srli_epi16::<4>(codes);
                    }
                }
            }
        }
    }

    /// [`Unpack::group`] by way of f32, rounded.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn floats<const CODES: u8>(&self, group: usize, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            // A group of 16 columns may have its own scale.
            let halves = self.tile.layout.group < GROUP;
            let scales = if halves {
                [self.params.scales(2 * group), self.params.scales(2 * group + 1)]
            } else {
                [self.params.scales(group); 2]
            };
            let biases = self.params.biases(group);
            let store = |pair: usize, h: usize, first: __m512, second: __m512| {
                // To the nearest, halves away from zero.
                let half = _mm512_set1_epi32(0x8000);
                let first = _mm512_add_epi32(_mm512_castps_si512(first), half);
                let second = _mm512_add_epi32(_mm512_castps_si512(second), half);
                let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(first), second);
                _mm512_storeu_si512(to.add(pair * 4 * HEIGHT + 64 * h).cast(), both);
            };
            let n_words = if CODES == NIBBLES { 4 } else { 8 };
            for word in 0..n_words {
                let codes = words(self.tile, group * n_words + word);
                for h in 0..2 {
                    let (scale, bias) = (scales[2 * word / n_words][h], biases[h]);
                    macro_rules! value {
                        ($i:expr) => {{
                            let code = match CODES {
                                NIBBLES => {
                                    let code = _mm512_srlv_epi32(codes[h], _mm512_set1_epi32(4 * $i));
                                    // The permutation reads the low four bits of each lane only.
                                    _mm512_permutexvar_ps(code, self.values)
                                }
                                U8_CODES => {
                                    let code = _mm512_srlv_epi32(codes[h], _mm512_set1_epi32(8 * $i));
                                    _mm512_cvtepi32_ps(_mm512_and_si512(code, _mm512_set1_epi32(0xff)))
                                }
                                _ => {
                                    // Sign, exponent and mantissa where f32 has them; the exponent's bias differs by 120.
                                    let code = _mm512_sllv_epi32(codes[h], _mm512_set1_epi32(24 - 8 * $i));
                                    let bits = _mm512_set1_epi32(0x87f0_0000_u32 as i32);
                                    let code = _mm512_and_si512(_mm512_srai_epi32::<4>(code), bits);
                                    _mm512_mul_ps(_mm512_castsi512_ps(code), _mm512_set1_ps(f32::from_bits(247 << 23)))
                                }
                            };
                            _mm512_fmadd_ps(code, scale, bias)
                        }};
                    }
                    if CODES == NIBBLES {
                        for i in 0..4 {
                            store(4 * word + i, h, value!(i as i32), value!(i as i32 + 4));
                        }
                    } else {
                        let first = word / 2 * 4 + word % 2;
                        store(first, h, value!(0), value!(2));
                        store(first + 2, h, value!(1), value!(3));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use half::bf16;
    use tandem_core::weights::{MatrixData, MatrixPart};
    use tandem_core::{DType, Float, Numerics, quant};

    use super::super::Operand;
    use super::*;
    use crate::isa::Isa;
    use crate::kernels::activations::Kernel;
    use crate::matrix::CpuMatrix;
    use crate::pool::Pool;

    /// What the instructions are defined to do.
    pub(crate) struct Definition([[f32; HEIGHT]; 2 * BLOCK]);

    impl Engine for Definition {
        unsafe fn new() -> Definition {
            Definition([[f32::NAN; HEIGHT]; 2 * BLOCK])
        }

        unsafe fn zero(&mut self) {
            self.0 = [[0.0; HEIGHT]; 2 * BLOCK];
        }

        unsafe fn load<const TWO: bool>(&mut self, from: *const f32, pitch: usize) {
            for (t, sums) in self.0.iter_mut().enumerate().take(if TWO { 2 * BLOCK } else { BLOCK }) {
                // SAFETY: as promised.
                sums.copy_from_slice(unsafe { std::slice::from_raw_parts(from.add(t * pitch), HEIGHT) });
            }
        }

        unsafe fn store<const TWO: bool>(&mut self, to: *mut f32, pitch: usize) {
            for (t, sums) in self.0.iter().enumerate().take(if TWO { 2 * BLOCK } else { BLOCK }) {
                // SAFETY: as promised.
                unsafe { std::slice::from_raw_parts_mut(to.add(t * pitch), HEIGHT) }.copy_from_slice(sums);
            }
        }

        unsafe fn multiply<const TWO: bool>(&mut self, x: *const Line, pitch: usize, weights: *const u8) {
            for (t, sums) in self.0.iter_mut().enumerate().take(if TWO { 2 * BLOCK } else { BLOCK }) {
                // SAFETY: as promised.
                let (x, weights) = unsafe {
                    (&(*x.add(t * pitch)).0, std::slice::from_raw_parts(weights.cast::<[u16; 2]>(), GROUP / 2 * HEIGHT))
                };
                for (r, sum) in sums.iter_mut().enumerate() {
                    // Sums of even and of odd elements, each product added with one rounding; numbers below the smallest
                    // normal one are zeros.
                    let mut own = [0.0f32; 2];
                    for (pair, x) in x.as_chunks::<2>().0.iter().enumerate() {
                        let weights = weights[pair * HEIGHT + r];
                        for (own, (x, weight)) in own.iter_mut().zip(x.iter().zip(weights)) {
                            *own = flushed(float(*x).mul_add(float(weight), *own));
                        }
                    }
                    *sum = flushed(*sum + flushed(own[0] + own[1]));
                }
            }
        }
    }

    fn float(bits: u16) -> f32 {
        flushed(bf16::from_bits(bits).to_f32())
    }

    fn flushed(value: f32) -> f32 {
        if value.is_subnormal() { 0.0 } else { value }
    }

    fn loaded(dtype: DType, rows: usize, cols: usize, change: impl Fn(&mut MatrixPart)) -> (CpuMatrix, Vec<f32>) {
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        let packed = quant::quantize(dtype, rows, cols, &values).expect("fits");
        let mut part = MatrixPart {
            weight: packed.weight.into(),
            scales: packed.scales.into(),
            biases: packed.biases.into(),
            global_scale: (dtype == DType::Nvfp4).then_some(0.5),
        };
        change(&mut part);
        let data = MatrixData { name: String::new(), dtype, rows, cols, parts: vec![part] };
        let (tiles, _) = Tiles::new(&data, Isa::Avx512, &Pool::new(1)).expect("memory");
        let mut decoded = vec![0.0; rows * cols];
        for (row, out) in decoded.chunks_exact_mut(cols).enumerate() {
            tiles.dequantize_row(0, row, out);
        }
        (CpuMatrix::Tiled(tiles), decoded)
    }

    /// The most that a product of `n` columns errs by, relative to the sum of its terms' sizes: weights of more than eight
    /// bits are rounded to bf16, and every column adds one rounding of f32.
    fn tolerance(dtype: DType, n: usize) -> f64 {
        let rounded = if matches!(dtype, DType::Affine { .. }) { 2f64.powi(-9) } else { 0.0 };
        rounded + n as f64 * 2f64.powi(-24)
    }

    #[test]
    fn products_are_those_of_bf16() {
        if !Isa::available().contains(&Isa::Avx512) {
            return;
        }
        let affine = |bits, group_size, params| DType::Affine { bits, group_size, params };
        let dtypes = [
            DType::Mxfp4,
            DType::Nvfp4,
            DType::Mxfp8,
            DType::BF16,
            affine(4, 32, Float::BF16),
            affine(8, 64, Float::BF16),
            affine(5, 32, Float::F16),
            affine(8, 128, Float::F16),
        ];
        // Columns of less than one stretch of many tokens, and of more.
        for (dtype, cols) in dtypes.into_iter().flat_map(|dtype| [(dtype, 128), (dtype, 640)]) {
            let rows = 70;
            let (matrix, decoded) = loaded(dtype, rows, cols, |_| ());
            let CpuMatrix::Tiled(tiles) = &matrix else { unreachable!("just made") };
            let x: Vec<f32> = (0..100 * cols).map(|i| ((i * 31337) % 2000) as f32 / 700.0 - 1.3).collect();
            let kernel = Kernel::choose(&matrix, Numerics::Bf16, Isa::Amx, 100);
            assert_eq!(kernel, Kernel::Tiles(Operand::AmxBf16), "{dtype}");
            let mut activations = Activations::default();
            let row = |r: usize| &x[r * cols..(r + 1) * cols];
            activations.prepare(None, Isa::Amx, 100, row, cols, std::iter::once((kernel, dtype)));
            // Tokens in order, as all are of a linear layer, and not, as those of an expert are.
            for (n, step) in [(1, 1), (16, 1), (17, 1), (100, 1), (5, 7), (30, 7), (33, 7), (50, 7)] {
                let tokens: Vec<u32> = (0..n).map(|t| (100 - n + t * step) as u32 % 100).collect();
                let mut found = vec![f32::NAN; n * rows];
                // SAFETY: the processor has AVX-512; the definition needs nothing else.
                unsafe { rows_of::<Definition>(tiles, 0, 0, rows, &activations, &tokens, &mut found) };
                for (t, token) in tokens.iter().enumerate() {
                    let x = row(*token as usize).iter().map(|v| f64::from(bf16::from_f32(*v).to_f32()));
                    for r in 0..rows {
                        let weights = decoded[r * cols..(r + 1) * cols].iter().map(|w| f64::from(*w));
                        let terms = x.clone().zip(weights).map(|(x, w)| x * w);
                        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + f64::abs(t)));
                        let error = (f64::from(found[t * rows + r]) - sum).abs();
                        assert!(error <= tolerance(dtype, cols) * size, "{dtype} {n} tokens, {t} {r}: {error}");
                    }
                }
            }
        }
    }

    /// Every code under every scale byte becomes its value, small ones zero, and zero nothing to speak of.
    #[test]
    fn every_scale_of_mxfp4() {
        if !Isa::available().contains(&Isa::Avx512) {
            return;
        }
        let (rows, cols) = (32, 32);
        for byte in 0..=254 {
            // A row of all codes twice; alone, and beside a scale whose exponents cannot be added.
            for other in [byte, 0] {
                let (matrix, decoded) = loaded(DType::Mxfp4, rows, cols, |part| {
                    part.weight = (0..rows * cols / 2)
                        .map(|i| ((i * 2 % 16) | (((i * 2 + 1) % 16) << 4)) as u8)
                        .collect::<Vec<_>>()
                        .into();
                    part.scales = (0..rows).map(|r| if r == 7 { other } else { byte }).collect::<Vec<_>>().into();
                });
                let CpuMatrix::Tiled(tiles) = &matrix else { unreachable!("just made") };
                let tile = tiles.tile(0, 0);
                let mut pairs = vec![Line::default(); GROUP_BYTES / size_of::<Line>()];
                // SAFETY: the processor has AVX-512, and there is room for a group.
                unsafe { Unpack::new(&tile).group::<NIBBLES>(0, pairs.as_mut_ptr().cast()) };
                for (r, row) in decoded.chunks_exact(cols).enumerate() {
                    for (column, value) in row.iter().enumerate() {
                        let pair = column / 8 * 4 + [0, 2, 0, 2, 1, 3, 1, 3][column % 8];
                        let second = column % 4 / 2;
                        let found = float(pairs[pair * 2 + r / 16].0[r % 16 * 2 + second]);
                        let scale = 2f32.powi(i32::from(if r == 7 { other } else { byte }) - 127);
                        let expected = flushed(bf16::from_f32(*value).to_f32());
                        let is_it =
                            if *value == 0.0 { found.abs() <= scale * 2f32.powi(-63) } else { found == expected };
                        assert!(is_it, "scales {byte} {other}, row {r} column {column}: {found:e} for {value:e}");
                    }
                }
            }
        }
    }
}
