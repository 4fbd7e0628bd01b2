//! What the row kernels read: a few rows of a packed matrix as it lies in the checkpoint.

use tandem_core::quant::PackedView;
use tandem_core::{DType, Float};

use super::affine::bias_dot;
use crate::isa::Isa;

/// Rows that the row kernels take at once: they share the loads of the activations.
pub(crate) const ROWS: usize = 4;

/// Up to four rows of a 4-bit or 8-bit matrix, lengths checked.
pub(crate) struct Rows<'a> {
    /// Packed codes of each row; rows beyond `n` repeat the last.
    pub(crate) codes: [&'a [u8]; ROWS],
    pub(crate) scales: [&'a [u8]; ROWS],
    biases: [&'a [u8]; ROWS],
    n: usize,
    pub(crate) cols: usize,
    pub(crate) dtype: DType,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(matrix: &PackedView<'a>, first_row: usize, n: usize) -> Rows<'a> {
        assert!((1..=ROWS).contains(&n) && first_row + n <= matrix.rows && matrix.cols.is_multiple_of(32));
        let row = |bytes: &'a [u8], size: usize, i: usize| {
            let start = (first_row + i.min(n - 1)) * size;
            &bytes[start..start + size]
        };
        let (dtype, cols) = (matrix.dtype, matrix.cols);
        Rows {
            codes: std::array::from_fn(|i| row(matrix.weight, dtype.weight_bytes(1, cols), i)),
            scales: std::array::from_fn(|i| row(matrix.scales, dtype.scale_bytes(1, cols), i)),
            biases: std::array::from_fn(|i| row(matrix.biases, dtype.bias_bytes(1, cols), i)),
            n,
            cols,
            dtype,
        }
    }

    /// Group size and type of the params of an affine matrix.
    pub(crate) fn affine(&self) -> (usize, Float) {
        let DType::Affine { group_size, params, .. } = self.dtype else {
            unreachable!("chosen for affine matrices only")
        };
        (group_size as usize, params)
    }

    /// Adds what affine biases contribute; `sums(group size)` are the sums of the activations' groups.
    pub(crate) fn add_biases<'s>(&self, isa: Isa, sums: impl Fn(usize) -> &'s [f32], out: &mut [f32; ROWS]) {
        if let DType::Affine { group_size, params, .. } = self.dtype {
            let sums = sums(group_size as usize);
            for (out, biases) in out.iter_mut().zip(&self.biases[..self.n]) {
                *out += bias_dot(isa, params, biases, sums);
            }
        }
    }
}
