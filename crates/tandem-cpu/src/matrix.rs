//! A matrix as the backend keeps it.

use tandem_core::DType;
use tandem_core::weights::MatrixData;

use crate::tiles::Tiles;

/// A matrix or stack of equal matrices.
pub enum CpuMatrix {
    /// As it is in the checkpoint, usually mapped from its file.
    Mapped(MatrixData),
    /// Repacked in memory, see the module `tiles`.
    Tiled(Tiles),
}

impl CpuMatrix {
    /// Storage format.
    pub fn dtype(&self) -> DType {
        match self {
            CpuMatrix::Mapped(data) => data.dtype,
            CpuMatrix::Tiled(tiles) => tiles.dtype,
        }
    }

    /// Output dimension of each matrix.
    pub fn rows(&self) -> usize {
        match self {
            CpuMatrix::Mapped(data) => data.rows,
            CpuMatrix::Tiled(tiles) => tiles.rows,
        }
    }

    /// Input dimension of each matrix.
    pub fn cols(&self) -> usize {
        match self {
            CpuMatrix::Mapped(data) => data.cols,
            CpuMatrix::Tiled(tiles) => tiles.cols,
        }
    }

    /// Matrices in the stack.
    pub fn n_parts(&self) -> usize {
        match self {
            CpuMatrix::Mapped(data) => data.parts.len(),
            CpuMatrix::Tiled(tiles) => tiles.n_parts(),
        }
    }

    /// Bytes of `rows` rows of one matrix, scales and biases included.
    pub(crate) fn bytes_of(&self, rows: usize) -> usize {
        self.dtype().total_bytes(rows, self.cols())
    }

    /// Row `row` of matrix `part`, decoded.
    pub(crate) fn dequantize_row(&self, part: usize, row: usize, out: &mut [f32]) {
        match self {
            CpuMatrix::Mapped(data) => data.view(part).dequantize_row(row, out),
            CpuMatrix::Tiled(tiles) => tiles.dequantize_row(part, row, out),
        }
    }
}
