//! A batch on the device, in memory that stays where it is, so that graphs can refer to it.

use std::sync::Arc;

use tandem_core::Batch;

use crate::args::Pages;
use crate::driver::{Device, Memory};

/// Rows of a decode batch, at most; more are prefill.
pub(crate) const DECODE_ROWS: usize = 64;

/// What the operations of one step need to know of its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CudaBatch {
    pub(crate) n_rows: usize,
    pub(crate) n_logits: usize,
    /// At least the longest context; of a decode batch rounded up to a power of two, so that few graphs serve all.
    pub(crate) max_context: usize,
    /// Pages per row of the block tables, a power of two.
    table_pitch: usize,
    base: u64,
}

impl CudaBatch {
    fn row_array(&self, index: usize) -> u64 {
        self.base + (index * self.n_rows * 4) as u64
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.row_array(0)
    }

    pub(crate) fn positions(&self) -> u64 {
        self.row_array(1)
    }

    /// Cache slot of each row.
    pub(crate) fn slots(&self) -> u64 {
        self.row_array(3)
    }

    pub(crate) fn logits_rows(&self) -> u64 {
        self.row_array(4)
    }

    pub(crate) fn pages(&self) -> Pages {
        Pages {
            positions: self.positions(),
            sequences: self.row_array(2),
            tables: self.row_array(5),
            table_pitch: self.table_pitch as u32,
            unused: 0,
        }
    }
}

/// The memory that batches are copied to.
#[derive(Default)]
pub(crate) struct BatchMemory {
    memory: Option<Memory>,
}

impl BatchMemory {
    /// Copies a batch to the device. The second value is true if the memory moved, so that no graph is valid any more.
    ///
    /// Layout, i32: tokens, positions, sequences, slots, rows of logits (`[n_rows]` each), block tables
    /// `[n_sequences, table_pitch]`.
    pub(crate) fn upload(&mut self, device: &Arc<Device>, batch: &Batch) -> (CudaBatch, bool) {
        let n = batch.n_rows();
        let longest = batch.block_tables.iter().map(Vec::len).max().unwrap_or(0);
        let table_pitch = longest.next_power_of_two().max(4);
        let mut words = vec![0u32; 5 * n + batch.block_tables.len() * table_pitch];
        let (rows, tables) = words.split_at_mut(5 * n);
        for r in 0..n {
            rows[r] = batch.tokens[r];
            rows[n + r] = batch.positions[r];
            rows[2 * n + r] = batch.sequences[r];
            rows[3 * n + r] = batch.slot(batch.sequences[r] as usize, batch.positions[r] as usize) as u32;
        }
        rows[4 * n..4 * n + batch.logits_rows.len()].copy_from_slice(&batch.logits_rows);
        for (to, table) in tables.chunks_exact_mut(table_pitch).zip(&batch.block_tables) {
            to[..table.len()].copy_from_slice(table);
        }
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let moved = self.memory.as_ref().is_none_or(|m| m.bytes() < bytes.len());
        if moved {
            self.memory = None;
            self.memory = Some(device.alloc(bytes.len().next_power_of_two().max(64 << 10)));
        }
        let base = self.memory.as_ref().map_or(0, Memory::pointer);
        device.upload(base, bytes);
        let context = batch.max_context();
        let max_context = if n <= DECODE_ROWS { context.next_power_of_two().max(64) } else { context };
        (CudaBatch { n_rows: n, n_logits: batch.logits_rows.len(), max_context, table_pitch, base }, moved)
    }
}
