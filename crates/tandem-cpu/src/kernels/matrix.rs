//! Rows of a packed matrix times activations: the work that decides the speed of decoding.

use tandem_core::Numerics;
use tandem_core::quant::PackedView;

use super::activations::{Activations, Kernel};
use super::rows::ROWS;
#[cfg(target_arch = "x86_64")]
use super::tile_rows::tile_rows;
use super::vector::dot;
use super::{byte_rows, nibble_rows};
use crate::isa::Isa;
use crate::matrix::CpuMatrix;
use crate::scratch::with_scratch;

/// `out[t * n_rows + i] = matrix[first_row + i] . x[tokens[t]]` for `n_rows` rows of matrix `part`, `first_row` a
/// multiple of 32.
///
/// A value depends on its row and token alone, not on what else is asked for.
#[allow(clippy::too_many_arguments)]
pub(crate) fn matrix_rows(
    isa: Isa,
    numerics: Numerics,
    matrix: &CpuMatrix,
    part: usize,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    let kernel = Kernel::choose(matrix, numerics, isa);
    let view = match matrix {
        CpuMatrix::Mapped(mapped) => mapped.data.view(part),
        #[cfg(target_arch = "x86_64")]
        CpuMatrix::Tiled(tiles) => {
            let Kernel::Tiles(operand) = kernel else { unreachable!("tiles have their own kernels") };
            return tile_rows(operand, tiles, part, first_row, n_rows, x, tokens, out);
        }
    };
    if kernel == Kernel::Generic {
        return generic_rows(isa, &view, first_row, n_rows, x, tokens, out);
    }
    for start in (0..n_rows).step_by(ROWS) {
        let n = ROWS.min(n_rows - start);
        for (t, token) in tokens.iter().enumerate() {
            let mut values = [0.0f32; ROWS];
            let (first, token) = (first_row + start, *token as usize);
            match kernel {
                Kernel::NibbleF32 => nibble_rows::f32_rows(isa, &view, first, n, x, token, &mut values),
                Kernel::NibbleInt8 => nibble_rows::int8_rows(isa, &view, first, n, x, token, &mut values),
                Kernel::ByteF32 => byte_rows::f32_rows(isa, &view, first, n, x, token, &mut values),
                Kernel::ByteInt8 => byte_rows::int8_rows(isa, &view, first, n, x, token, &mut values),
                _ => unreachable!("handled above"),
            }
            out[t * n_rows + start..][..n].copy_from_slice(&values[..n]);
        }
    }
}

/// Any format: decodes a row, then takes dot products.
fn generic_rows(
    isa: Isa,
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    with_scratch(matrix.cols, |row| {
        for i in 0..n_rows {
            matrix.dequantize_row(first_row + i, row);
            for (t, token) in tokens.iter().enumerate() {
                out[t * n_rows + i] = dot(isa, x.row(*token as usize), &*row);
            }
        }
    });
}
