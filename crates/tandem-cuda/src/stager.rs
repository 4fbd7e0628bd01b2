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
    /// On the device, for what does not stay as it comes. Dropped first: that waits for the copies.
    staging: Memory,
    pinned: Pinned,
    /// Its copy has arrived.
    arrived: Event,
    /// The device is done with it.
    free: Event,
}

/// The buffers of one thread, the next one first.
struct Worker {
    next: Buffer,
    busy: Buffer,
}

/// Threads' buffers, and where the time of loading went.
pub(crate) struct Stager {
    workers: Vec<Worker>,
    /// Orders what does not belong to one buffer.
    order: Option<Event>,
    capacity: usize,
    threads: usize,
    start: Instant,
    bytes: usize,
    copying: Duration,
    /// Making buffers, and memory on the device.
    allocating: Duration,
    /// Deciding how matrices are kept.
    checking: Duration,
}

impl Stager {
    pub(crate) fn new() -> Stager {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        Stager {
            workers: vec![],
            order: None,
            capacity: 0,
            threads,
            start: Instant::now(),
            bytes: 0,
            copying: Duration::ZERO,
            allocating: Duration::ZERO,
            checking: Duration::ZERO,
        }
    }

    /// Makes buffers for a matrix of `bytes`, of which `least` must fit at once; false if the device is out of memory, which
    /// its next `sync` says.
    pub(crate) fn prepare(&mut self, device: &Arc<Device>, bytes: usize, least: usize) -> bool {
        let start = Instant::now();
        let prepared = self.make_buffers(device, bytes, least);
        self.allocating += start.elapsed();
        prepared
    }

    /// Memory on the device, zeroed unless all of it will be written.
    pub(crate) fn alloc(&mut self, device: &Arc<Device>, bytes: usize, cleared: bool) -> Memory {
        let start = Instant::now();
        let memory = if cleared { device.alloc(bytes) } else { device.alloc_for_all_bytes(bytes) };
        self.allocating += start.elapsed();
        memory
    }

    /// Times what decides how a matrix is kept.
    pub(crate) fn check<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.checking += start.elapsed();
        result
    }

    fn make_buffers(&mut self, device: &Arc<Device>, bytes: usize, least: usize) -> bool {
        let wanted = BUFFER.max(least + SOURCES * ALIGNMENT);
        if self.capacity < wanted {
            self.workers.clear();
            self.capacity = wanted;
        }
        let capacity = self.capacity;
        let buffer = || {
            let (pinned, staging) = (device.pinned(capacity)?, device.alloc_for_all_bytes(capacity));
            Some(Buffer { staging, pinned, arrived: device.event()?, free: device.event()? })
        };
        if self.order.is_none() {
            self.order = device.event();
        }
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
        let stays = pieces.iter().any(|piece| matches!(piece, Piece::Copy { .. }));
        if let Some(order) = self.order.as_ref().filter(|_| stays) {
            // The memory that such pieces go to has just been cleared.
            device.copies_after_stream(order);
        }
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
        if let Some(order) = self.order.as_ref().filter(|_| stays) {
            device.after_copies(order);
        }
        self.bytes += total;
        self.copying += start.elapsed();
    }

    /// Tells the log where the time went.
    pub(crate) fn report(&self) {
        tracing::info!(
            "{:.2} GB of weights went through pinned memory in {:.2} s by {} threads, and {:.2} s were spent between: {:.2} s \
             on memory, {:.2} s on ranges of scales, the rest on reading and checking the files",
            self.bytes as f64 / 1e9,
            self.copying.as_secs_f64(),
            self.threads,
            self.start.elapsed().saturating_sub(self.copying).as_secs_f64(),
            self.allocating.as_secs_f64(),
            self.checking.as_secs_f64(),
        );
    }
}

impl Worker {
    fn send(&mut self, device: &Device, piece: &Piece<'_>) {
        let Buffer { staging, pinned, arrived, free } = &mut self.next;
        device.wait(free);
        match piece {
            Piece::Copy { bytes, to } => {
                pinned.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
                device.fetch_aside(*to, pinned, bytes.len());
                device.record_copies(free);
            }
            Piece::Repack { sources, args } => {
                // One copy for all: each costs as much time as many bytes.
                let (mut end, mut places) = (0usize, [0; SOURCES]);
                for (source, place) in sources.iter().zip(&mut places).filter(|(source, _)| !source.is_empty()) {
                    let offset = end.next_multiple_of(ALIGNMENT);
                    end = offset + source.len();
                    *place = staging.pointer() + offset as u64;
                    pinned.bytes_mut()[offset..end].copy_from_slice(source);
                }
                device.fetch_aside(staging.pointer(), pinned, end);
                device.after_copies(arrived);
                let [weight, scales, biases] = places;
                let args = RepackArgs { weight, scales, biases, ..*args };
                device.launch("repack", (args.blocks(), 1, 1), 128, 0, &mut args![args]);
                device.record(free);
            }
        }
        std::mem::swap(&mut self.next, &mut self.busy);
    }
}
