//! Rows of a packed matrix times activations: the work that decides the speed of decoding.

use tandem_core::DType;
use tandem_core::quant::PackedView;

use super::activations::{Activations, Kernel};
use super::rows::ROWS;
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
    kernel: Kernel,
    matrix: &CpuMatrix,
    part: usize,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    tokens: &[u32],
    out: &mut [f32],
) {
    let view = match matrix {
        CpuMatrix::Mapped(mapped) => mapped.data.view(part),
        CpuMatrix::Tiled(tiles) => {
            let Kernel::Tiles(operand) = kernel else { unreachable!("tiles have their own kernels") };
            return tile_rows(isa, operand, tiles, part, first_row, n_rows, x, tokens, out);
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
    let mut dots = |i: usize, row: &[f32]| {
        for (t, token) in tokens.iter().enumerate() {
            out[t * n_rows + i] = dot(isa, x.row(*token as usize), row);
        }
    };
    if matrix.dtype == DType::F32
        && let Some(values) = floats(matrix.weight)
    {
        for i in 0..n_rows {
            dots(i, &values[(first_row + i) * matrix.cols..][..matrix.cols]);
        }
        return;
    }
    with_scratch(matrix.cols, |row| {
        for i in 0..n_rows {
            matrix.dequantize_row(first_row + i, row);
            dots(i, row);
        }
    });
}

/// The bytes as the floats that they are, where they lie at such an address and the processor keeps floats so.
#[allow(unsafe_code)]
fn floats(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: any bits are a float.
    let (before, values, after) = unsafe { bytes.align_to::<f32>() };
    (cfg!(target_endian = "little") && before.is_empty() && after.is_empty()).then_some(values)
}
