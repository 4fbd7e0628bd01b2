//! A batch on the device, in memory that stays where it is, so that graphs can refer to it; the tokens that a step sampled.

use std::collections::VecDeque;
use std::sync::Arc;

use tandem_core::Batch;

use crate::args::{Pages, Sampling, SamplingHeader};
use crate::driver::{Device, Event, Memory, Pinned};

/// Rows of a decode batch, at most; more are prefill, whose kernels need not give a row the same bits in any batch.
pub(crate) const DECODE_ROWS: usize = tandem_core::EXACT_ROWS;
/// Sampled tokens of one batch, at most.
const MAX_SAMPLED: usize = 1024;

/// What the operations of one step need to know of its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CudaBatch {
    pub(crate) n_rows: usize,
    pub(crate) n_logits: usize,
    /// `n_logits` if the device samples tokens, else 0.
    pub(crate) n_sampled: usize,
    /// At least the longest context; of a decode batch rounded up to a power of two, so that few graphs serve all.
    pub(crate) max_context: usize,
    /// Pages per row of the block tables, a power of two.
    table_pitch: usize,
    base: u64,
}

impl CudaBatch {
    fn row_array(&self, index: usize) -> u64 {
        self.base + (sampling_bytes(self.n_sampled) + index * self.n_rows * 4) as u64
    }

    /// The header of the sampling parameters.
    pub(crate) fn sampling(&self) -> u64 {
        self.base
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

fn sampling_bytes(n_sampled: usize) -> usize {
    if n_sampled == 0 { 0 } else { size_of::<SamplingHeader>() + n_sampled * size_of::<Sampling>() }
}

/// The memory that batches are copied to.
#[derive(Default)]
pub(crate) struct BatchMemory {
    memory: Option<Memory>,
    /// Where the next batch waits for the device, and the one before it; each with the end of its copy.
    staged: VecDeque<(Pinned, Event)>,
}

impl BatchMemory {
    /// Copies a batch to the device, behind what is enqueued. The second value is true if the memory moved, so that no
    /// graph is valid any more. Tokens that the device samples go to `sampled`.
    ///
    /// Layout: header and parameters, if tokens are sampled (sample.cu); as i32, tokens, positions, sequences, slots, rows of
    /// logits (`[n_rows]` each), block tables `[n_sequences, table_pitch]`.
    pub(crate) fn upload(&mut self, device: &Arc<Device>, batch: &Batch, sampled: &mut Sampled) -> (CudaBatch, bool) {
        let (n, n_sampled) = (batch.n_rows(), batch.sampling.len());
        let longest = batch.block_tables.iter().map(Vec::len).max().unwrap_or(0);
        let table_pitch = longest.next_power_of_two().max(4);
        let mut bytes: Vec<u8> = Vec::with_capacity(sampling_bytes(n_sampled));
        if n_sampled > 0 {
            let sampling: Vec<Sampling> = batch.sampling.iter().map(Sampling::new).collect();
            let header = SamplingHeader { to: sampled.begin(device, n_sampled), unused: [0; 3] };
            bytes.extend(bytemuck::bytes_of(&header));
            bytes.extend(bytemuck::cast_slice::<Sampling, u8>(&sampling));
        }
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
        bytes.extend(bytemuck::cast_slice::<u32, u8>(&words));
        let moved = self.memory.as_ref().is_none_or(|m| m.bytes() < bytes.len());
        if moved {
            self.memory = None;
            self.memory = Some(device.alloc(bytes.len().next_power_of_two().max(64 << 10)));
        }
        let base = self.memory.as_ref().map_or(0, Memory::pointer);
        self.send(device, &bytes, base);
        let context = batch.max_context();
        let max_context = if n <= DECODE_ROWS { context.next_power_of_two().max(64) } else { context };
        (CudaBatch { n_rows: n, n_logits: batch.logits_rows.len(), n_sampled, max_context, table_pitch, base }, moved)
    }

    fn send(&mut self, device: &Device, bytes: &[u8], to: u64) {
        let oldest = if self.staged.len() < 2 { None } else { self.staged.pop_front() };
        let fits = |(pinned, event): (Pinned, Event)| {
            device.wait(&event);
            (pinned.bytes() >= bytes.len()).then_some((pinned, event))
        };
        let Some((mut pinned, event)) = oldest
            .and_then(fits)
            .or_else(|| Some((device.pinned(bytes.len().next_power_of_two().max(64 << 10))?, device.event()?)))
        else {
            return;
        };
        pinned.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        device.fetch(to, &pinned, 0, bytes.len());
        device.record(&event);
        self.staged.push_back((pinned, event));
    }
}

/// The tokens that steps sampled.
#[derive(Default)]
pub(crate) struct Sampled {
    places: Option<Places>,
    /// Which half of the host's memory each step under way writes, and how many tokens.
    under_way: VecDeque<(usize, usize)>,
    /// The half that the next step writes.
    half: usize,
}

struct Places {
    /// For the next step's embedding.
    device: Memory,
    /// For the host: two halves of [`MAX_SAMPLED`] words, and the end of each half's step.
    host: Pinned,
    ends: [Event; 2],
}

impl Sampled {
    /// Makes the memory, if it is not there.
    fn places(&mut self, device: &Arc<Device>) -> Option<&Places> {
        if self.places.is_none() {
            let (memory, host) = (device.alloc(MAX_SAMPLED * 4), device.pinned(2 * MAX_SAMPLED * 4)?);
            self.places = Some(Places { device: memory, host, ends: [device.event()?, device.event()?] });
        }
        self.places.as_ref()
    }

    /// Where the last step's tokens are on the device.
    pub(crate) fn pointer(&mut self, device: &Arc<Device>) -> u64 {
        self.places(device).map_or(0, |p| p.device.pointer())
    }

    /// Where the next step's `n` tokens go on the host.
    fn begin(&mut self, device: &Arc<Device>, n: usize) -> u64 {
        assert!(
            n <= MAX_SAMPLED && self.under_way.len() < 2,
            "{n} tokens to sample with {} steps under way",
            self.under_way.len()
        );
        let half = self.half;
        self.half ^= 1;
        self.under_way.push_back((half, n));
        self.places(device).map_or(0, |p| p.host.address() + (half * MAX_SAMPLED * 4) as u64)
    }

    /// Everything of the newest step has been enqueued.
    pub(crate) fn end(&self, device: &Device) {
        if let (Some(places), Some((half, _))) = (&self.places, self.under_way.back()) {
            device.record(&places.ends[*half]);
        }
    }

    /// Waits for the oldest step's tokens.
    pub(crate) fn take(&mut self, device: &Device, tokens: &mut Vec<u32>) {
        let (Some((half, n)), Some(places)) = (self.under_way.pop_front(), &self.places) else { return };
        device.wait(&places.ends[half]);
        tokens.extend((0..n).map(|i| places.host.word(half * MAX_SAMPLED + i)));
    }
}
