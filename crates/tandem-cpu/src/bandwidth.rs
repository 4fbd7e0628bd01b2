//! The machine's read bandwidth: the limit that decoding is measured against.
//!
//! It is the best of several unrolled loads (instruction sets, number of streams, software prefetch), because which one
//! wins differs between processors and the limit must not be understated. Writes are not measured.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::time::Instant;

use crate::isa::Isa;
use crate::pool::Pool;
use crate::shared_mut::SharedMut;

/// Buffers are larger than any cache.
const MIN_BYTES: usize = 1 << 30;
/// Passes of each loop; the best counts, since other programs only ever slow it down.
const PASSES: usize = 4;
/// Words that one step of a loop reads from one stream.
const STEP: usize = 32;
/// Words ahead that the prefetching variants ask for.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 256;

/// Parts per thread, handed out as threads become free, as weights are.
const PARTS: usize = 16;

/// Bytes per second that the pool's threads read together, in contiguous parts of at least 1 GiB in all.
pub fn measure_read_bandwidth(pool: &Pool, bytes: usize) -> f64 {
    ReadMeter::new(pool, bytes.max(MIN_BYTES)).best
}

/// A buffer to read, and the loop that reads it fastest.
pub struct ReadMeter<'a> {
    pool: &'a Pool,
    buffer: Buffer,
    read: Read,
    /// Bytes per second of the best pass of the best loop.
    pub best: f64,
}

impl<'a> ReadMeter<'a> {
    /// Tries every loop on `bytes` of memory.
    pub fn new(pool: &'a Pool, bytes: usize) -> ReadMeter<'a> {
        // Parts divide into 4 streams of whole steps.
        let n_parts = PARTS * pool.n_threads();
        let part = (bytes / 8 / n_parts).next_multiple_of(4 * STEP);
        let mut meter = ReadMeter { pool, buffer: Buffer::new(part, n_parts, pool), read: scalar, best: 0.0 };
        for read in variants() {
            for _ in 0..PASSES {
                let rate = meter.rate(read);
                if rate > meter.best {
                    (meter.best, meter.read) = (rate, read);
                }
            }
        }
        meter
    }

    /// Bytes per second of one pass of the best loop, now.
    pub fn pass(&self) -> f64 {
        self.rate(self.read)
    }

    fn rate(&self, read: Read) -> f64 {
        let words = self.buffer.words();
        let n_parts = PARTS * self.pool.n_threads();
        let part = words.len() / n_parts;
        let start = Instant::now();
        self.pool.chunks(n_parts, 1, |parts| {
            for i in parts {
                black_box(read(&words[i * part..(i + 1) * part]));
            }
        });
        (words.len() * 8) as f64 / start.elapsed().as_secs_f64()
    }
}

type Read = fn(&[u64]) -> u64;

fn variants() -> Vec<Read> {
    let mut variants: Vec<Read> = vec![];
    for isa in Isa::available() {
        match isa {
            Isa::Scalar => variants.push(scalar),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => variants.extend([avx2::<1, false> as Read, avx2::<2, true>, avx2::<4, false>]),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => variants.extend([
                avx512::<1, false> as Read,
                avx512::<1, true>,
                avx512::<2, false>,
                avx512::<2, true>,
                avx512::<4, false>,
                avx512::<4, true>,
            ]),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => variants.extend([neon::<1> as Read, neon::<2>, neon::<4>]),
            #[allow(unreachable_patterns)]
            _ => {}
        }
    }
    variants
}

fn scalar(words: &[u64]) -> u64 {
    let mut sums = [0u64; STEP];
    for step in words.chunks_exact(STEP) {
        for (sum, word) in sums.iter_mut().zip(step) {
            *sum ^= word;
        }
    }
    sums.iter().fold(0, |a, b| a ^ b)
}

/// Reads `STREAMS` equal stretches of `words` side by side.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn avx512<const STREAMS: usize, const PREFETCH: bool>(words: &[u64]) -> u64 {
    use std::arch::x86_64::*;
    #[target_feature(enable = "avx512f")]
    #[allow(unused_unsafe)] // prefetching became safe after rust-version
    fn read<const STREAMS: usize, const PREFETCH: bool>(words: &[u64]) -> u64 {
        let length = words.len() / STREAMS / STEP * STEP;
        let mut sums = [[_mm512_setzero_si512(); 4]; STREAMS];
        for at in (0..length).step_by(STEP) {
            for (stream, sums) in sums.iter_mut().enumerate() {
                let step = &words[stream * length + at..][..STEP];
                for (i, sum) in sums.iter_mut().enumerate() {
                    if PREFETCH {
                        // SAFETY: a prefetch never faults, wherever it points.
                        unsafe { _mm_prefetch::<_MM_HINT_T0>(step.as_ptr().wrapping_add(AHEAD + i * 8).cast()) };
                    }
                    // SAFETY: `step` has 4 vectors of 8 words.
                    let vector = unsafe { _mm512_loadu_si512(step.as_ptr().add(i * 8).cast()) };
                    *sum = _mm512_xor_si512(*sum, vector);
                }
            }
        }
        let all = sums.iter().flatten().fold(_mm512_setzero_si512(), |a, b| _mm512_xor_si512(a, *b));
        _mm512_reduce_add_epi64(all) as u64
    }
    // SAFETY: `variants` lists this only where the processor has AVX-512.
    unsafe { read::<STREAMS, PREFETCH>(words) }
}

/// Reads `STREAMS` equal stretches of `words` side by side.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn avx2<const STREAMS: usize, const PREFETCH: bool>(words: &[u64]) -> u64 {
    use std::arch::x86_64::*;
    #[target_feature(enable = "avx2")]
    #[allow(unused_unsafe)] // prefetching became safe after rust-version
    fn read<const STREAMS: usize, const PREFETCH: bool>(words: &[u64]) -> u64 {
        let length = words.len() / STREAMS / STEP * STEP;
        let mut sums = [[_mm256_setzero_si256(); 8]; STREAMS];
        for at in (0..length).step_by(STEP) {
            for (stream, sums) in sums.iter_mut().enumerate() {
                let step = &words[stream * length + at..][..STEP];
                for (i, sum) in sums.iter_mut().enumerate() {
                    if PREFETCH && i % 2 == 0 {
                        // SAFETY: a prefetch never faults, wherever it points.
                        unsafe { _mm_prefetch::<_MM_HINT_T0>(step.as_ptr().wrapping_add(AHEAD + i * 4).cast()) };
                    }
                    // SAFETY: `step` has 8 vectors of 4 words.
                    let vector = unsafe { _mm256_loadu_si256(step.as_ptr().add(i * 4).cast()) };
                    *sum = _mm256_xor_si256(*sum, vector);
                }
            }
        }
        let all = sums.iter().flatten().fold(_mm256_setzero_si256(), |a, b| _mm256_xor_si256(a, *b));
        let mut lanes = [0u64; 4];
        // SAFETY: `lanes` is as large as the vector.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), all) };
        lanes.iter().fold(0, |a, b| a ^ b)
    }
    // SAFETY: `variants` lists this only where the processor has AVX2.
    unsafe { read::<STREAMS, PREFETCH>(words) }
}

/// Reads `STREAMS` equal stretches of `words` side by side.
#[cfg(target_arch = "aarch64")]
#[allow(unsafe_code)]
fn neon<const STREAMS: usize>(words: &[u64]) -> u64 {
    use std::arch::aarch64::*;
    #[target_feature(enable = "neon")]
    fn read<const STREAMS: usize>(words: &[u64]) -> u64 {
        let length = words.len() / STREAMS / STEP * STEP;
        let mut sums = [[vdupq_n_u64(0); 4]; STREAMS];
        for at in (0..length).step_by(STEP) {
            for (stream, sums) in sums.iter_mut().enumerate() {
                let step = &words[stream * length + at..][..STEP];
                for i in 0..STEP / 2 {
                    // SAFETY: `step` has 16 vectors of 2 words.
                    let vector = unsafe { vld1q_u64(step.as_ptr().add(i * 2)) };
                    sums[i % 4] = veorq_u64(sums[i % 4], vector);
                }
            }
        }
        let all = sums.iter().flatten().fold(vdupq_n_u64(0), |a, b| veorq_u64(a, *b));
        vgetq_lane_u64::<0>(all) ^ vgetq_lane_u64::<1>(all)
    }
    // SAFETY: `variants` lists this only where the processor has NEON.
    unsafe { read::<STREAMS>(words) }
}

/// Words on a huge-page boundary, in huge pages where the system offers them, all of them resident.
struct Buffer {
    data: *mut u64,
    len: usize,
}

#[allow(unsafe_code)]
impl Buffer {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len * 8, 2 << 20).unwrap_or_else(|_| Layout::new::<u64>())
    }

    /// `n_parts` parts of `part` words, written by the threads that read them.
    fn new(part: usize, n_parts: usize, pool: &Pool) -> Buffer {
        let len = part * n_parts;
        let layout = Buffer::layout(len);
        assert!(layout.size() == len * 8 && len > 0, "a buffer of {len} words");
        // SAFETY: the layout is not empty.
        let data = unsafe { alloc(layout) }.cast::<u64>();
        if data.is_null() {
            handle_alloc_error(layout);
        }
        #[cfg(target_os = "linux")]
        // SAFETY: the range was just allocated; the advice does not change its content. Refusal only costs speed.
        unsafe {
            libc::madvise(data.cast(), layout.size(), libc::MADV_HUGEPAGE);
        }
        // SAFETY: `len` words were allocated, and any bits are a valid MaybeUninit.
        let words = SharedMut::new(unsafe { std::slice::from_raw_parts_mut(data.cast::<MaybeUninit<u64>>(), len) });
        pool.chunks(n_parts, 1, |parts| {
            // SAFETY: every part is handed out once.
            let own = unsafe { words.slice(parts.start * part, parts.len() * part) };
            own.iter_mut().enumerate().for_each(|(i, word)| *word = MaybeUninit::new(i as u64));
        });
        Buffer { data, len }
    }

    fn words(&self) -> &[u64] {
        // SAFETY: `new` allocated and initialised `len` words, which live as long as self.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

#[allow(unsafe_code)]
impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.data.cast(), Buffer::layout(self.len)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_reads_every_word() {
        let n = 4 * STEP * 3;
        // One bit set per position: an unread or twice read word shows in the total.
        for hot in [0, 1, STEP, n / 2, n - 1] {
            let mut words = vec![0u64; n];
            words[hot] = 1 << 40;
            for read in variants() {
                assert_eq!(read(&words), 1 << 40, "word {hot}");
            }
        }
    }
}
