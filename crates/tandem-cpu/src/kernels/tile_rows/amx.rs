//! AMX: up to 32 tokens of 8-bit activations, or 16 of 16-bit ones, times a tile of 32 rows.
//!
//! A word of a tile ([`crate::tiles`]) is a row of AMX's second operand as it is, so that 32 columns of a tile are two
//! of its registers, and 32 columns of 16 tokens are one. Sums of a group leave the registers, are scaled and added as
//! the AVX-512 kernels do it: integers are exact, so that the results have the same bits, whichever kernel a row takes.
//! 16-bit activations are two products: of their upper, signed bytes and of their lower, unsigned ones.

// Rows and tokens run over several arrays of registers at once; an index says so best.
#![allow(clippy::needless_range_loop)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;

use super::avx512::{HEIGHT, Params, add_biases};
use super::{Activations, Codes, GROUP, IntegerToken, Operand, Tile, Tiles, code_bytes};
use crate::scratch::with_scratch;

/// Fewer tokens than this are faster on AVX-512: a register of AMX holds 16, filled or not.
pub(super) const LEAST_TOKENS: usize = 8;
/// Tokens of one register.
const BLOCK: usize = 16;
/// Bytes of a group of columns of a block of tokens.
const BLOCK_BYTES: usize = BLOCK * GROUP;
/// Sums of one register, of tokens and rows.
type Square = [[i32; BLOCK]; BLOCK];

/// Two blocks of activations, two halves of a tile's rows, and their four products.
struct Step {
    /// `[16 tokens, 32] i8`, or the upper bytes of 16-bit activations.
    first: *const u8,
    /// The next 16 tokens, or the lower bytes of the same ones.
    second: *const u8,
    /// `[8 words, 32 rows, 4] u8`
    weights: *const u8,
}

/// What multiplies: the processor, or in tests the definition.
trait Engine {
    /// Prepares this thread.
    unsafe fn configure();

    /// `squares[0..2]` become the sums of the first block and both halves of the rows, `squares[2..4]` those of the second
    /// block if `TWO`; its bytes are unsigned if `WIDE`.
    ///
    /// # Safety
    /// The pointers of the step must be as long as it says, and the thread configured.
    unsafe fn multiply<const TWO: bool, const WIDE: bool>(step: &Step, squares: &mut [Square; 4]);
}

/// The processor's.
pub(super) struct Amx;

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
    bytes: [64, 64, 64, 64, 32, 32, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Engine for Amx {
    unsafe fn configure() {
        CONFIGURED.with(|configured| {
            if !configured.replace(true) {
                // SAFETY: the processor has AMX and the system lets this process use it (`Isa::available`). Nothing else
                // in this program uses the registers.
                unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, preserves_flags)) };
            }
        });
    }

    #[inline]
    unsafe fn multiply<const TWO: bool, const WIDE: bool>(step: &Step, squares: &mut [Square; 4]) {
        let to = squares.as_mut_ptr();
        // SAFETY: reads and writes what the caller promises, with the shapes of `CONFIG`: activations of 32 bytes a row,
        // weights 128 bytes apart, sums of 64 bytes a row.
        unsafe {
            if !TWO {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tileloadd tmm6, [{weights} + {weights_pitch}]",
                    "tileloadd tmm7, [{weights} + {weights_pitch} + 64]",
                    "tileloadd tmm4, [{first} + {pitch}]",
                    "tdpbsud tmm0, tmm4, tmm6",
                    "tdpbsud tmm1, tmm4, tmm7",
                    "tilestored [{to} + {to_pitch}], tmm0",
                    "tilestored [{to} + {to_pitch} + 1024], tmm1",
                    first = in(reg) step.first, pitch = in(reg) GROUP,
                    weights = in(reg) step.weights, weights_pitch = in(reg) 4 * HEIGHT,
                    to = in(reg) to, to_pitch = in(reg) 64usize,
                    options(nostack, preserves_flags),
                );
                return;
            }
            macro_rules! both_blocks {
                ($second:literal) => {
                    asm!(
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        "tileloadd tmm6, [{weights} + {weights_pitch}]",
                        "tileloadd tmm4, [{first} + {pitch}]",
                        "tdpbsud tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{weights} + {weights_pitch} + 64]",
                        "tdpbsud tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{second} + {pitch}]",
                        concat!($second, " tmm2, tmm5, tmm6"),
                        concat!($second, " tmm3, tmm5, tmm7"),
                        "tilestored [{to} + {to_pitch}], tmm0",
                        "tilestored [{to} + {to_pitch} + 1024], tmm1",
                        "tilestored [{to} + {to_pitch} + 2048], tmm2",
                        "tilestored [{to} + {to_pitch} + 3072], tmm3",
                        first = in(reg) step.first, second = in(reg) step.second, pitch = in(reg) GROUP,
                        weights = in(reg) step.weights, weights_pitch = in(reg) 4 * HEIGHT,
                        to = in(reg) to, to_pitch = in(reg) 64usize,
                        options(nostack, preserves_flags),
                    )
                };
            }
            if WIDE {
                both_blocks!("tdpbuud");
            } else {
                both_blocks!("tdpbsud");
            }
        }
    }
}

/// [`super::tile_rows`] for many tokens; `operand` is one of the integer ones.
///
/// # Safety
/// The processor has AVX-512 with VNNI and VBMI, and AMX.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn tile_rows(
    operand: Operand,
    matrix: &Tiles,
    part: usize,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match operand {
            Operand::Int8 => rows_of::<Amx, false>(matrix, part, first_row, n_rows, x, tokens, out),
            _ => rows_of::<Amx, true>(matrix, part, first_row, n_rows, x, tokens, out),
        }
    }
}

/// `WIDE`: 16-bit activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn rows_of<E: Engine, const WIDE: bool>(
    matrix: &Tiles,
    part: usize,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe { E::configure() };
    let n_groups = matrix.cols / GROUP;
    let pass = if WIDE { BLOCK } else { 2 * BLOCK };
    // Equal shares, in whole registers.
    let n_passes = tokens.len().div_ceil(pass);
    let share = tokens.len().div_ceil(n_passes);
    with_scratch(2 * n_groups * BLOCK_BYTES / size_of::<f32>(), |memory| {
        // SAFETY: floats are bytes, and any bytes are floats.
        let (_, packed, _) = unsafe { memory.align_to_mut::<u8>() };
        for (pass, tokens) in tokens.chunks(share).enumerate() {
            let two = WIDE || tokens.len() > BLOCK;
            // SAFETY: this function's instructions are there.
            unsafe { pack::<WIDE>(matrix.cols, x, tokens, packed) };
            for start in (0..n_rows).step_by(HEIGHT) {
                let tile = matrix.tile(part, (first_row + start) / HEIGHT);
                let n = HEIGHT.min(n_rows - start);
                let mut sums = [[0.0f32; HEIGHT]; 2 * BLOCK];
                // SAFETY: this function's instructions are there, and `packed` holds these tokens.
                unsafe {
                    if two {
                        tile_sums::<E, true, WIDE>(&tile, x, tokens, packed, &mut sums);
                    } else {
                        tile_sums::<E, false, WIDE>(&tile, x, tokens, packed, &mut sums);
                    }
                }
                for (t, sums) in sums[..tokens.len()].iter().enumerate() {
                    out[(pass * share + t) * n_rows + start..][..n].copy_from_slice(&sums[..n]);
                }
            }
        }
    });
}

/// Activations to `[2, groups, 16 tokens, 32] u8`; tokens that do not exist are zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn pack<const WIDE: bool>(cols: usize, x: &Activations, tokens: &[u32], packed: &mut [u8]) {
    let n_groups = cols / GROUP;
    let half = n_groups * BLOCK_BYTES;
    assert!(packed.len() >= 2 * half);
    packed.fill(0);
    // Pairs to the order of the columns.
    let order = _mm256_set_epi8(
        15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0, 15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0,
    );
    for (t, token) in tokens.iter().enumerate() {
        if WIDE {
            let values = x.pairs_i16(*token as usize).values;
            assert!(values.len() >= cols);
            for group in 0..n_groups {
                // SAFETY: 32 values are there, and room for their bytes.
                unsafe {
                    let pairs = _mm512_loadu_si512(values.as_ptr().add(group * GROUP).cast());
                    let upper = _mm512_cvtepi16_epi8(_mm512_srli_epi16::<8>(pairs));
                    let to = packed.as_mut_ptr().add(group * BLOCK_BYTES + t * GROUP);
                    _mm256_storeu_si256(to.cast(), _mm256_shuffle_epi8(upper, order));
                    let lower = _mm256_shuffle_epi8(_mm512_cvtepi16_epi8(pairs), order);
                    _mm256_storeu_si256(to.add(half).cast(), lower);
                }
            }
        } else {
            let values = x.q8(*token as usize).values;
            assert!(values.len() >= cols);
            for group in 0..n_groups {
                let at = t / BLOCK * half + group * BLOCK_BYTES + t % BLOCK * GROUP;
                // SAFETY: 32 bytes are there, and room for them.
                unsafe {
                    let bytes = _mm256_loadu_si256(values.as_ptr().add(group * GROUP).cast());
                    _mm256_storeu_si256(packed.as_mut_ptr().add(at).cast(), bytes);
                }
            }
        }
    }
}

/// Sums of one tile for the tokens of `packed`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn tile_sums<E: Engine, const TWO: bool, const WIDE: bool>(
    tile: &Tile<'_>,
    x: &Activations,
    tokens: &[u32],
    packed: &[u8],
    out: &mut [[f32; HEIGHT]; 2 * BLOCK],
) {
    let n = tokens.len();
    // One type for both widths: only scales and sums are read here.
    let x: [IntegerToken<'_, i8>; 2 * BLOCK] = std::array::from_fn(|t| {
        let token = tokens[t.min(n - 1)] as usize;
        let operand = if WIDE { Operand::Int16 } else { Operand::Int8 };
        let sums: &[f32] = if tile.layout.biased { x.sums(token, tile.layout.group, operand.sums()) } else { &[] };
        if WIDE {
            let row = x.pairs_i16(token);
            IntegerToken { values: &[], scales: row.scales, group_sums: row.group_sums, half_sums: &[], sums }
        } else {
            IntegerToken::new(tile, x.q8(token), sums)
        }
    });
    let n_groups = tile.cols / GROUP;
    assert!(x.iter().all(|x| x.scales.len() >= n_groups && x.group_sums.len() >= n_groups));
    let half = n_groups * BLOCK_BYTES;
    assert!(packed.len() >= 2 * half && tile.layout.group >= GROUP);
    let (table, offset, unit) = code_bytes(tile.layout.codes);
    // Four times the 16 values: the permutation reads six bits. SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let params = Params::new(tile);
    let mut sums = [[_mm512_setzero_ps(); 2]; 2 * BLOCK];
    let mut squares = [[[0i32; BLOCK]; BLOCK]; 4];
    let mut unpacked = [[0u8; 4 * HEIGHT]; 8];
    for group in 0..n_groups {
        // SAFETY: group and words are within the tile, tokens within the activations, whose lengths were checked.
        unsafe {
            let weights = if tile.layout.codes == Codes::U8 {
                tile.codes.as_ptr().add(group * 8 * 4 * HEIGHT)
            } else {
                for word in 0..4 {
                    for h in 0..2 {
                        let from = tile.codes.as_ptr().add((group * 4 + word) * 4 * HEIGHT + 64 * h);
                        let codes = _mm512_loadu_si512(from.cast());
                        let low = _mm512_permutexvar_epi8(codes, table);
                        let high = _mm512_permutexvar_epi8(_mm512_srli_epi16::<4>(codes), table);
                        _mm512_storeu_si512(unpacked[2 * word].as_mut_ptr().add(64 * h).cast(), low);
                        _mm512_storeu_si512(unpacked[2 * word + 1].as_mut_ptr().add(64 * h).cast(), high);
                    }
                }
                unpacked.as_ptr().cast()
            };
            let first = packed.as_ptr().add(group * BLOCK_BYTES);
            let step = Step { first, second: first.add(half), weights };
            E::multiply::<TWO, WIDE>(&step, &mut squares);
            let scales = params.scales(group);
            for t in 0..n {
                let x_scale = _mm512_set1_ps(*x[t].scales.get_unchecked(group));
                let start = _mm512_set1_epi32(-offset * *x[t].group_sums.get_unchecked(group));
                for h in 0..2 {
                    let load = |i: usize| _mm512_loadu_si512(squares[i][t % BLOCK].as_ptr().cast());
                    let dots = if WIDE {
                        _mm512_add_epi32(_mm512_slli_epi32::<8>(load(h)), load(2 + h))
                    } else {
                        load(t / BLOCK * 2 + h)
                    };
                    let dots = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(dots, start)), x_scale);
                    sums[t][h] = _mm512_fmadd_ps(dots, scales[h], sums[t][h]);
                }
            }
        }
    }
    // SAFETY: the lengths were checked.
    unsafe { add_biases(&params, &std::array::from_fn::<_, { 2 * BLOCK }, _>(|t| x[t].sums), &mut sums) };
    let unit = _mm512_set1_ps(unit * tile.unit);
    for (sums, out) in sums[..n].iter().zip(out) {
        for h in 0..2 {
            // SAFETY: 32 floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * h), _mm512_mul_ps(sums[h], unit)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use tandem_core::weights::{MatrixData, MatrixPart};
    use tandem_core::{DType, Float, Numerics, quant};

    use super::*;
    use crate::isa::Isa;
    use crate::kernels::activations::Kernel;
    use crate::matrix::CpuMatrix;
    use crate::pool::Pool;

    /// What the instructions are defined to do.
    struct Definition;

    impl Engine for Definition {
        unsafe fn configure() {}

        unsafe fn multiply<const TWO: bool, const WIDE: bool>(step: &Step, squares: &mut [Square; 4]) {
            for (block, from) in [step.first, step.second].into_iter().enumerate().take(1 + usize::from(TWO)) {
                for h in 0..2 {
                    for t in 0..BLOCK {
                        for lane in 0..BLOCK {
                            let product = |column: usize| {
                                // SAFETY: within the step's bytes.
                                unsafe {
                                    let x = *from.add(t * GROUP + column);
                                    let x = if WIDE && block == 1 { i32::from(x) } else { i32::from(x as i8) };
                                    let at = column / 4 * 4 * HEIGHT + 64 * h + 4 * lane + column % 4;
                                    x * i32::from(*step.weights.add(at))
                                }
                            };
                            squares[2 * block + h][t][lane] = (0..GROUP).map(product).sum();
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn many_tokens_have_the_bits_of_few() {
        if !Isa::available().contains(&Isa::Avx512) {
            return;
        }
        let affine = |bits, group_size| DType::Affine { bits, group_size, params: Float::BF16 };
        let (rows, cols) = (70, 160);
        for (dtype, cols) in [(DType::Mxfp4, cols), (affine(4, 32), cols), (affine(8, 64), 192), (affine(5, 32), cols)]
        {
            let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
            let packed = quant::quantize(dtype, rows, cols, &values).expect("fits");
            let part = MatrixPart {
                weight: packed.weight.into(),
                scales: packed.scales.into(),
                biases: packed.biases.into(),
                global_scale: None,
            };
            let data = MatrixData { name: String::new(), dtype, rows, cols, parts: vec![part] };
            let (tiles, _) = Tiles::new(&data, Isa::Avx512, &Pool::new(1)).expect("memory");
            let matrix = CpuMatrix::Tiled(tiles);
            let CpuMatrix::Tiled(tiles) = &matrix else { unreachable!("just made") };
            let x: Vec<f32> = (0..50 * cols).map(|i| ((i * 31337) % 2000) as f32 / 700.0 - 1.3).collect();
            for numerics in [Numerics::Int8, Numerics::Bf16] {
                let kernel = Kernel::choose(&matrix, numerics, Isa::Avx512);
                let mut activations = Activations::default();
                let row = |r: usize| &x[r * cols..(r + 1) * cols];
                activations.prepare(None, Isa::Avx512, 50, row, cols, std::iter::once((kernel, dtype)));
                let operand = Operand::choose(tiles.layout, numerics, Isa::Avx512);
                for n in [1, 8, 15, 16, 17, 32, 33, 50] {
                    // Not in order, as tokens of an expert are.
                    let tokens: Vec<u32> = (0..n).map(|t| (t * 7 % 50) as u32).collect();
                    let (mut expected, mut found) = (vec![0.0; n * rows], vec![0.0; n * rows]);
                    super::super::tile_rows(
                        Isa::Avx512,
                        operand,
                        tiles,
                        0,
                        0,
                        rows,
                        &activations,
                        &tokens,
                        &mut expected,
                    );
                    // SAFETY: the processor has AVX-512; the definition needs nothing else.
                    unsafe {
                        match operand {
                            Operand::Int8 => {
                                rows_of::<Definition, false>(tiles, 0, 0, rows, &activations, &tokens, &mut found);
                            }
                            _ => rows_of::<Definition, true>(tiles, 0, 0, rows, &activations, &tokens, &mut found),
                        }
                    }
                    assert_eq!(found, expected, "{dtype} {numerics:?} {n} tokens");
                }
            }
        }
    }
}
