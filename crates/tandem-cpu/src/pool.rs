//! A fork-join pool: the caller is worker 0, the others spin briefly for the next job and then park.
//!
//! A decode step forks hundreds of times for tens of microseconds each, which general-purpose pools are too slow for.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks: longer than the serial stretches of a decode step, far shorter than
/// a person's pause.
const SPIN: Duration = Duration::from_micros(200);

type Job<'a> = &'a (dyn Fn(usize) + Sync + 'a);

struct Shared {
    /// Increases by one per job.
    epoch: AtomicUsize,
    /// Valid from the increase of `epoch` until `remaining` is 0.
    job: UnsafeCell<Option<Job<'static>>>,
    /// Workers that have not finished the current job.
    remaining: AtomicUsize,
    /// Held while parking and waking.
    park: Mutex<()>,
    wake: Condvar,
    /// Workers parked or about to park.
    n_parked: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
}

// SAFETY: `job` is written by the caller only while no worker runs (remaining == 0) and read by workers only after they
// see the new epoch, which is stored after the write.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}
// SAFETY: as above; the reference inside is only used while the caller of `run` keeps it alive.
#[allow(unsafe_code)]
unsafe impl Send for Shared {}

/// Worker threads.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    /// One `run` at a time.
    running: Mutex<()>,
}

impl Pool {
    /// A pool of `n_threads` including the caller; at least 1.
    pub fn new(n_threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            remaining: AtomicUsize::new(0),
            park: Mutex::new(()),
            wake: Condvar::new(),
            n_parked: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let handles = (1..n_threads.max(1))
            .filter_map(|worker| {
                let shared = Arc::clone(&shared);
                let thread = std::thread::Builder::new().name(format!("tandem-{worker}"));
                thread.spawn(move || work(&shared, worker)).ok()
            })
            .collect();
        Pool { shared, handles, running: Mutex::new(()) }
    }

    /// Threads, the caller included.
    pub fn n_threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Runs `job(worker)` once on every worker and waits for all.
    ///
    /// # Panics
    /// When a worker's job panicked.
    #[allow(unsafe_code)]
    pub fn run(&self, job: impl Fn(usize) + Sync) {
        if self.handles.is_empty() {
            return job(0);
        }
        let _one_at_a_time = self.running.lock().unwrap_or_else(|e| e.into_inner());
        let shared = &*self.shared;
        let job: Job<'_> = &job;
        // SAFETY: only the lifetime changes. Workers use the reference between the epoch's increase and their decrease
        // of `remaining`, and this function does not return (or unwind, see `Finish`) before that is 0.
        let job: Job<'static> = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        // SAFETY: no worker reads `job` now: remaining is 0 and the epoch is old.
        unsafe { *shared.job.get() = Some(job) };
        shared.remaining.store(self.handles.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if shared.n_parked.load(Ordering::SeqCst) > 0 {
            let _guard = shared.park.lock().unwrap_or_else(|e| e.into_inner());
            shared.wake.notify_all();
        }
        {
            let _finish = Finish(shared);
            job(0);
        }
        if shared.panicked.swap(false, Ordering::SeqCst) {
            panic!("a worker thread panicked");
        }
    }

    /// Runs `task(range)` over chunks of `0..n` that idle workers take as they go; a chunk has `grain` elements.
    pub fn chunks(&self, n: usize, grain: usize, task: impl Fn(std::ops::Range<usize>) + Sync) {
        let grain = grain.max(1);
        if n <= grain || self.handles.is_empty() {
            if n > 0 {
                task(0..n);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(|_| {
            loop {
                let start = next.fetch_add(grain, Ordering::Relaxed);
                if start >= n {
                    break;
                }
                task(start..(start + grain).min(n));
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        {
            let _guard = self.shared.park.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.wake.notify_all();
        }
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

/// Waits for the workers even when the caller's own share unwinds.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut spins = 0u32;
        while self.0.remaining.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < 20_000 {
                std::hint::spin_loop();
            } else {
                // More threads than free cores: let the worker have this one.
                std::thread::yield_now();
            }
        }
    }
}

#[allow(unsafe_code)]
fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        seen = wait_for_epoch(shared, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the epoch increased after `job` was written, and it stays until this worker decreases `remaining`.
        let job = unsafe { *shared.job.get() };
        if let Some(job) = job
            && std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(worker))).is_err()
        {
            shared.panicked.store(true, Ordering::SeqCst);
        }
        shared.remaining.fetch_sub(1, Ordering::Release);
    }
}

fn wait_for_epoch(shared: &Shared, seen: usize) -> usize {
    let mut start = None;
    loop {
        for _ in 0..256 {
            let epoch = shared.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() > SPIN {
            break;
        }
    }
    let mut guard = shared.park.lock().unwrap_or_else(|e| e.into_inner());
    shared.n_parked.fetch_add(1, Ordering::SeqCst);
    let epoch = loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            break epoch;
        }
        guard = shared.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
    };
    shared.n_parked.fetch_sub(1, Ordering::SeqCst);
    epoch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_runs_every_job() {
        for n_threads in [1, 2, 4] {
            let pool = Pool::new(n_threads);
            let counts: Vec<AtomicUsize> = (0..n_threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..1000 {
                pool.run(|worker| {
                    counts[worker].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1000));
        }
    }

    #[test]
    fn chunks_cover_everything_once_also_after_parking() {
        let pool = Pool::new(3);
        for n in [0, 1, 7, 100, 1001] {
            std::thread::sleep(SPIN * 5);
            let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            pool.chunks(n, 7, |range| {
                for i in range {
                    hits[i].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_panicking_job_does_not_hang_the_pool() {
        let pool = Pool::new(2);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(|worker| assert!(worker != 1, "on purpose"));
        }));
        assert!(result.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 2);
    }
}
