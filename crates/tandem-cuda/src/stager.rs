//! Weights on their way to the device: threads copy them from where they are mapped into pinned memory, and the device
//! fetches one buffer while the next is filled.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::driver::{Device, Event, Memory, Pinned};

/// Bytes of each buffer: enough for the largest matrix so far, within these.
const SMALLEST: usize = 1 << 20;
const LARGEST: usize = 64 << 20;
/// Copies of fewer bytes are not worth another thread.
const BYTES_PER_THREAD: usize = 2 << 20;
const MAX_THREADS: usize = 16;
/// Pieces begin at multiples of 256 bytes.
const PADDING: usize = 3 * 256;

/// Where staged bytes go.
pub(crate) enum Target {
    /// Memory of the device.
    At(u64),
    /// The device's half of the buffer, for [`Stager::after`]'s work.
    Staging,
}

struct Slot {
    pinned: Pinned,
    staging: Memory,
    fetched: Event,
}

struct Job {
    source: *const u8,
    bytes: usize,
    offset: usize,
    to: u64,
}

/// Two buffers and what is waiting for the next one.
pub(crate) struct Stager {
    slots: [Slot; 2],
    capacity: usize,
    now: usize,
    used: usize,
    jobs: Vec<Job>,
    after: Vec<Work>,
    threads: usize,
    times: Times,
}

/// Where the time of loading went.
#[derive(Clone, Copy)]
struct Times {
    start: Instant,
    bytes: usize,
    copying: Duration,
    waiting: Duration,
}

type Work = Box<dyn FnOnce(&Device)>;

impl Stager {
    /// Buffers on `device` for a matrix of `bytes`, at least `rows` of which fit at once; none if it is out of memory,
    /// which its next `sync` says.
    ///
    /// It goes on counting where the one `before` it ended.
    pub(crate) fn new(device: &Arc<Device>, bytes: usize, rows: usize, before: Option<Stager>) -> Option<Stager> {
        let start = Times { start: Instant::now(), bytes: 0, copying: Duration::ZERO, waiting: Duration::ZERO };
        let times = before.map_or(start, |before| before.times);
        let capacity = Stager::wanted(bytes, rows);
        let slot = || {
            Some(Slot { pinned: device.pinned(capacity)?, staging: device.alloc(capacity), fetched: device.event()? })
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        let slots = [slot()?, slot()?];
        Some(Stager { slots, capacity, now: 0, used: 0, jobs: vec![], after: vec![], threads, times })
    }

    fn wanted(bytes: usize, rows: usize) -> usize {
        (bytes + PADDING).next_power_of_two().clamp(SMALLEST, LARGEST).max(rows + PADDING)
    }

    /// True if the buffers serve a matrix as well as new ones would.
    pub(crate) fn suits(&self, bytes: usize, rows: usize) -> bool {
        self.capacity >= Stager::wanted(bytes, rows)
    }

    /// Bytes that fit one buffer, in up to three pieces.
    pub(crate) fn room(&self) -> usize {
        self.capacity - PADDING
    }

    /// Makes room for up to three pieces of `bytes` together, at most [`Stager::room`], in one buffer.
    pub(crate) fn reserve(&mut self, device: &Device, bytes: usize) {
        if self.used + bytes + PADDING > self.capacity {
            self.flush(device);
        }
    }

    /// Stages bytes, for which there is room, and returns where they will be on the device.
    ///
    /// # Safety
    /// `source` stays as it is until [`Stager::flush`].
    pub(crate) unsafe fn add(&mut self, source: &[u8], target: Target) -> u64 {
        let offset = self.used;
        self.used += source.len().next_multiple_of(256);
        let to = match target {
            Target::At(to) => to,
            Target::Staging => self.slots[self.now].staging.pointer() + offset as u64,
        };
        self.jobs.push(Job { source: source.as_ptr(), bytes: source.len(), offset, to });
        to
    }

    /// Work to enqueue once what has been added is on the device.
    pub(crate) fn after(&mut self, work: impl FnOnce(&Device) + 'static) {
        self.after.push(Box::new(work));
    }

    /// Sends everything on its way; sources may change when this returns.
    pub(crate) fn flush(&mut self, device: &Device) {
        let slot = &mut self.slots[self.now];
        // The device is done with what this buffer held before.
        let start = Instant::now();
        device.wait(&slot.fetched);
        let waited = Instant::now();
        copy_all(&self.jobs, slot.pinned.bytes_mut(), self.threads);
        self.times.waiting += waited - start;
        self.times.copying += waited.elapsed();
        self.times.bytes += self.jobs.iter().map(|job| job.bytes).sum::<usize>();
        for job in self.jobs.drain(..) {
            device.fetch(job.to, &slot.pinned, job.offset, job.bytes);
        }
        for work in self.after.drain(..) {
            work(device);
        }
        device.record(&slot.fetched);
        self.now ^= 1;
        self.used = 0;
    }

    /// Tells the log where the time went.
    pub(crate) fn report(&self) {
        let Times { start, bytes, copying, waiting } = self.times;
        tracing::info!(
            "{:.2} GB of weights went through pinned memory: {:.2} s copying with {} threads, {:.2} s waiting for the \
             device, {:.2} s elsewhere since the first",
            bytes as f64 / 1e9,
            copying.as_secs_f64(),
            self.threads,
            waiting.as_secs_f64(),
            start.elapsed().saturating_sub(copying + waiting).as_secs_f64(),
        );
    }
}

/// Copies every job into `to`, bytes divided evenly among threads.
fn copy_all(jobs: &[Job], to: &mut [u8], threads: usize) {
    let total: usize = jobs.iter().map(|j| j.bytes).sum();
    let threads = total.div_ceil(BYTES_PER_THREAD).clamp(1, threads);
    // SAFETY: `add`'s contract.
    let source = |job: &Job| unsafe { std::slice::from_raw_parts(job.source, job.bytes) };
    let mut shares: Vec<Vec<(&[u8], &mut [u8])>> = (0..threads).map(|_| vec![]).collect();
    let (mut rest, mut start, mut done) = (to, 0, 0);
    for job in jobs {
        let (_, after) = rest.split_at_mut(job.offset - start);
        let (mut room, after) = after.split_at_mut(job.bytes);
        (rest, start) = (after, job.offset + job.bytes);
        let mut bytes = source(job);
        while !bytes.is_empty() {
            let share = done * threads / total;
            // Up to where the next share begins.
            let n = (((share + 1) * total).div_ceil(threads) - done).clamp(1, bytes.len());
            let (piece, next) = bytes.split_at(n);
            let (place, next_room) = room.split_at_mut(n);
            shares[share].push((piece, place));
            (bytes, room) = (next, next_room);
            done += n;
        }
    }
    std::thread::scope(|scope| {
        for share in shares {
            let copy = move || share.into_iter().for_each(|(from, to)| to.copy_from_slice(from));
            if threads == 1 { copy() } else { _ = scope.spawn(copy) }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_copies_cover_every_byte() {
        let source: Vec<u8> = (0..9_000_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let pieces = [(0, 1), (1, 5_000_000), (5_000_001, 0), (5_000_001, 3), (5_000_004, 3_999_996)];
        let mut offset = 0;
        let jobs: Vec<Job> = pieces
            .iter()
            .map(|(start, bytes)| {
                let job = Job { source: source[*start..].as_ptr(), bytes: *bytes, offset, to: 0 };
                offset += bytes.next_multiple_of(256);
                job
            })
            .collect();
        for threads in [1, 3, 16] {
            let mut to = vec![0; offset];
            copy_all(&jobs, &mut to, threads);
            for (job, (start, bytes)) in jobs.iter().zip(pieces) {
                assert!(to[job.offset..][..bytes] == source[start..][..bytes], "{threads} threads, {start}");
            }
        }
    }
}
