//! A batch on the device: one buffer of words, whose first eight say where its lists begin.

use std::sync::{Arc, Mutex, PoisonError};

use tandem_core::Batch;

use crate::buffer::Memory;
use crate::device::Device;
use crate::pipelines::{
    BATCH_LOGITS, BATCH_PITCH, BATCH_POSITIONS, BATCH_SEQUENCES, BATCH_SLOTS, BATCH_TABLES, BATCH_TOKENS,
};

/// Memory of batches that are gone.
type Pool = Arc<Mutex<Vec<Memory>>>;

/// A [`Batch`] on the device.
pub struct WgpuBatch {
    memory: Option<Memory>,
    pool: Pool,
    pub(crate) n_rows: usize,
    pub(crate) n_logits: usize,
    pub(crate) max_context: usize,
}

impl WgpuBatch {
    pub(crate) fn memory(&self) -> &Memory {
        match &self.memory {
            Some(memory) => memory,
            None => unreachable!("taken only when dropped"),
        }
    }
}

impl Drop for WgpuBatch {
    fn drop(&mut self) {
        // Work that reads it may be under way; what is written next is written after that.
        locked(&self.pool).extend(self.memory.take());
    }
}

/// Makes batches.
#[derive(Default)]
pub(crate) struct Batches {
    pool: Pool,
}

impl Batches {
    /// Copies a batch; everything recorded must have been submitted.
    pub(crate) fn upload(&self, device: &Device, batch: &Batch) -> WgpuBatch {
        let words = words(batch);
        let bytes = words.len() as u64 * 4;
        let fits = locked(&self.pool).iter().position(|m| m.bytes >= bytes);
        let memory = match fits {
            Some(i) => locked(&self.pool).swap_remove(i),
            None => Memory::new(device, bytes.next_power_of_two().max(4096)),
        };
        device.queue.write_buffer(&memory.buffer, 0, bytemuck::cast_slice(&words));
        WgpuBatch {
            memory: Some(memory),
            pool: Arc::clone(&self.pool),
            n_rows: batch.n_rows(),
            n_logits: batch.logits_rows.len(),
            max_context: batch.max_context(),
        }
    }
}

fn words(batch: &Batch) -> Vec<u32> {
    let pitch = batch.block_tables.iter().map(Vec::len).max().unwrap_or(0);
    let mut words = vec![0; BATCH_TOKENS as usize];
    words.extend(&batch.tokens);
    let mut list = |header: u32, values: &mut dyn Iterator<Item = u32>| {
        words[header as usize] = words.len() as u32;
        words.extend(values);
    };
    list(BATCH_POSITIONS, &mut batch.positions.iter().copied());
    let slot = |(sequence, position): (&u32, &u32)| batch.slot(*sequence as usize, *position as usize) as u32;
    list(BATCH_SLOTS, &mut batch.sequences.iter().zip(&batch.positions).map(slot));
    list(BATCH_SEQUENCES, &mut batch.sequences.iter().copied());
    list(BATCH_LOGITS, &mut batch.logits_rows.iter().copied());
    let tables =
        batch.block_tables.iter().flat_map(|t| t.iter().copied().chain(std::iter::repeat_n(0, pitch - t.len())));
    list(BATCH_TABLES, &mut tables.collect::<Vec<u32>>().into_iter());
    words[BATCH_PITCH as usize] = pitch as u32;
    words
}

fn locked(pool: &Pool) -> std::sync::MutexGuard<'_, Vec<Memory>> {
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}
