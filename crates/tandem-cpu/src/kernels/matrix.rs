//! Rows of a packed matrix times activations: the work that decides the speed of decoding.

use tandem_core::quant::PackedView;

use super::vector::dot;
use crate::isa::Isa;
use crate::scratch::with_scratch;

/// Activations of one operation, in every form that the kernels it will call need.
pub struct Activations<'a> {
    /// `[n_rows, width]`
    x: &'a [f32],
    width: usize,
}

impl<'a> Activations<'a> {
    /// Activations `[n_rows, width]`.
    pub fn new(x: &'a [f32], width: usize) -> Activations<'a> {
        Activations { x, width }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.x[row * self.width..(row + 1) * self.width]
    }
}

/// `out[i * tokens.len() + t] = matrix[first_row + i] . x[tokens[t]]` for `n_rows` rows.
pub fn matrix_rows(
    isa: Isa,
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations<'_>,
    tokens: &[u32],
    out: &mut [f32],
) {
    with_scratch(matrix.cols, |row| {
        for (i, out) in out.chunks_exact_mut(tokens.len()).take(n_rows).enumerate() {
            matrix.dequantize_row(first_row + i, row);
            for (out, token) in out.iter_mut().zip(tokens) {
                *out = dot(isa, x.row(*token as usize), &*row);
            }
        }
    });
}
