//! Weights on their way to the device: threads copy pieces of them from where they are mapped into pinned memory of their own,
//! each into one buffer while the device fetches the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::args::RepackArgs;
use crate::driver::{Device, Event, Memory, Pinned};

/// Bytes of a buffer, unless a matrix has rows so wide that a tile of them is more.
const BUFFER: usize = 4 << 20;
/// Copies of fewer bytes are not worth another thread.
const BYTES_PER_THREAD: usize = 2 << 20;
const MAX_THREADS: usize = 16;
/// Sources within a piece begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Most of a piece.
const SOURCES: usize = 3;

/// Bytes that travel together, at most [`Stager::room`].
pub(crate) enum Piece<'a> {
    /// To where they stay.
    Copy { bytes: &'a [u8], to: u64 },
    /// Elements, scales and biases of rows, to be made tiles of; `args` lacks where they arrive.
    Repack { sources: [&'a [u8]; SOURCES], args: RepackArgs },
}

impl Piece<'_> {
    fn bytes(&self) -> usize {
        match self {
            Piece::Copy { bytes, .. } => bytes.len(),
            Piece::Repack { sources, .. } => sources.iter().map(|s| s.len()).sum(),
        }
    }
}

struct Buffer {
    pinned: Pinned,
    /// On the device, for what does not stay as it comes.
    staging: Memory,
    fetched: Event,
}

/// The buffers of one thread, the next one first.
struct Worker {
    next: Buffer,
    busy: Buffer,
}

/// Threads' buffers, and where the time of loading went.
pub(crate) struct Stager {
    workers: Vec<Worker>,
    capacity: usize,
    threads: usize,
    start: Instant,
    bytes: usize,
    copying: Duration,
}

impl Stager {
    pub(crate) fn new() -> Stager {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        Stager { workers: vec![], capacity: 0, threads, start: Instant::now(), bytes: 0, copying: Duration::ZERO }
    }

    /// Makes buffers for a matrix of `bytes`, of which `least` must fit at once; false if the device is out of memory, which
    /// its next `sync` says.
    pub(crate) fn prepare(&mut self, device: &Arc<Device>, bytes: usize, least: usize) -> bool {
        let wanted = BUFFER.max(least + SOURCES * ALIGNMENT);
        if self.capacity < wanted {
            self.workers.clear();
            self.capacity = wanted;
        }
        let capacity = self.capacity;
        let buffer = || {
            let (pinned, staging) = (device.pinned(capacity)?, device.alloc(capacity));
            Some(Buffer { pinned, staging, fetched: device.event()? })
        };
        while self.workers.len() < bytes.div_ceil(BYTES_PER_THREAD).clamp(1, self.threads) {
            let (Some(next), Some(busy)) = (buffer(), buffer()) else { return false };
            self.workers.push(Worker { next, busy });
        }
        true
    }

    /// Bytes of the largest piece.
    pub(crate) fn room(&self) -> usize {
        self.capacity - SOURCES * ALIGNMENT
    }

    /// Sends pieces on their way, in no order; their sources may change when this returns.
    pub(crate) fn send(&mut self, device: &Device, pieces: &[Piece<'_>]) {
        let start = Instant::now();
        let total: usize = pieces.iter().map(Piece::bytes).sum();
        let n_workers = total.div_ceil(BYTES_PER_THREAD).clamp(1, self.workers.len().max(1));
        let taken = AtomicUsize::new(0);
        let work = |worker: &mut Worker| {
            while let Some(piece) = pieces.get(taken.fetch_add(1, Ordering::Relaxed)) {
                worker.send(device, piece);
            }
        };
        match &mut self.workers[..] {
            [] => {}
            [worker, ..] if n_workers == 1 => work(worker),
            workers => std::thread::scope(|scope| {
                for worker in &mut workers[..n_workers] {
                    scope.spawn(|| work(worker));
                }
            }),
        }
        self.bytes += total;
        self.copying += start.elapsed();
    }

    /// Tells the log where the time went.
    pub(crate) fn report(&self) {
        tracing::info!(
            "{:.2} GB of weights went through pinned memory in {:.2} s by {} threads, and {:.2} s were spent between",
            self.bytes as f64 / 1e9,
            self.copying.as_secs_f64(),
            self.threads,
            self.start.elapsed().saturating_sub(self.copying).as_secs_f64(),
        );
    }
}

impl Worker {
    fn send(&mut self, device: &Device, piece: &Piece<'_>) {
        let Buffer { pinned, staging, fetched } = &mut self.next;
        // The device is done with what this buffer held before.
        device.wait(fetched);
        match piece {
            Piece::Copy { bytes, to } => {
                pinned.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
                device.fetch(*to, pinned, 0, bytes.len());
            }
            Piece::Repack { sources, args } => {
                let (mut offset, mut places) = (0, [0; SOURCES]);
                for (source, place) in sources.iter().zip(&mut places).filter(|(source, _)| !source.is_empty()) {
                    *place = staging.pointer() + offset as u64;
                    pinned.bytes_mut()[offset..offset + source.len()].copy_from_slice(source);
                    device.fetch(*place, pinned, offset, source.len());
                    offset += source.len().next_multiple_of(ALIGNMENT);
                }
                let [weight, scales, biases] = places;
                let args = RepackArgs { weight, scales, biases, ..*args };
                device.launch("repack", (args.blocks(), 1, 1), 128, 0, &mut args![args]);
            }
        }
        device.record(fetched);
        std::mem::swap(&mut self.next, &mut self.busy);
    }
}
