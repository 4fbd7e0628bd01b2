//! A matrix as the backend keeps it.

use std::sync::atomic::{AtomicBool, Ordering};

use tandem_core::weights::MatrixData;
use tandem_core::{CheckpointError, DType};

use crate::tiles::Tiles;

/// A matrix or stack of equal matrices.
pub enum CpuMatrix {
    /// As it is in the checkpoint, usually mapped from its file.
    Mapped(Mapped),
    /// Repacked in memory, see the module `tiles`.
    Tiled(Tiles),
}

/// Rows that are checked together when one of them is first used.
const CHECKED_ROWS: usize = 32;

/// A matrix in the checkpoint's bytes. Elements are looked at when they are first used: at load that would mean reading
/// files that may be larger than memory.
pub struct Mapped {
    pub(crate) data: MatrixData,
    /// `[parts, blocks of rows]`: found to be finite.
    is_checked: Vec<AtomicBool>,
}

impl Mapped {
    pub(crate) fn new(data: MatrixData) -> Mapped {
        let n_blocks = if data.dtype.has_non_finite_codes() { data.rows.div_ceil(CHECKED_ROWS) } else { 0 };
        let is_checked = (0..n_blocks * data.parts.len()).map(|_| AtomicBool::new(false)).collect();
        Mapped { data, is_checked }
    }

    /// Checks the rows that have not been, in whole blocks.
    ///
    /// # Errors
    /// An element is NaN or infinite.
    fn check(&self, part: usize, first_row: usize, n_rows: usize) -> Result<(), CheckpointError> {
        if self.is_checked.is_empty() || n_rows == 0 {
            return Ok(());
        }
        let n_blocks = self.data.rows.div_ceil(CHECKED_ROWS);
        for block in first_row / CHECKED_ROWS..(first_row + n_rows).div_ceil(CHECKED_ROWS) {
            let is_checked = &self.is_checked[part * n_blocks + block];
            // A block that two threads check at once is checked twice.
            if !is_checked.load(Ordering::Relaxed) {
                let first = block * CHECKED_ROWS;
                self.data.check_finite(part, first, CHECKED_ROWS.min(self.data.rows - first))?;
                is_checked.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

impl CpuMatrix {
    /// Checks rows that are about to be used for the first time.
    ///
    /// # Errors
    /// An element is NaN or infinite.
    pub(crate) fn check(&self, part: usize, first_row: usize, n_rows: usize) -> Result<(), CheckpointError> {
        match self {
            CpuMatrix::Mapped(mapped) => mapped.check(part, first_row, n_rows),
            // Checked when they were repacked.
            CpuMatrix::Tiled(_) => Ok(()),
        }
    }

    /// Storage format.
    pub fn dtype(&self) -> DType {
        match self {
            CpuMatrix::Mapped(mapped) => mapped.data.dtype,
            CpuMatrix::Tiled(tiles) => tiles.dtype,
        }
    }

    /// Output dimension of each matrix.
    pub fn rows(&self) -> usize {
        match self {
            CpuMatrix::Mapped(mapped) => mapped.data.rows,
            CpuMatrix::Tiled(tiles) => tiles.rows,
        }
    }

    /// Input dimension of each matrix.
    pub fn cols(&self) -> usize {
        match self {
            CpuMatrix::Mapped(mapped) => mapped.data.cols,
            CpuMatrix::Tiled(tiles) => tiles.cols,
        }
    }

    /// Matrices in the stack.
    pub fn n_parts(&self) -> usize {
        match self {
            CpuMatrix::Mapped(mapped) => mapped.data.parts.len(),
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
            CpuMatrix::Mapped(mapped) => mapped.data.view(part).dequantize_row(row, out),
            CpuMatrix::Tiled(tiles) => tiles.dequantize_row(part, row, out),
        }
    }
}
