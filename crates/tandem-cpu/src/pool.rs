//! A fork-join pool: the caller works too, the others spin briefly for the next job and then park.
//!
//! A decode step forks hundreds of times for tens of microseconds each, which general-purpose pools are too slow for.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks: longer than the serial stretches of a decode step, far shorter than
/// a person's pause.
const SPIN: Duration = Duration::from_micros(200);

type Job<'a> = &'a (dyn Fn() + Sync + 'a);

/// The current job takes workers.
const OPEN: u64 = 1 << 31;
/// Workers inside the current job.
const ACTIVE: u64 = OPEN - 1;
/// Where the job's number starts.
const EPOCH_SHIFT: u32 = 32;

struct Shared {
    /// Number of the current job, whether it is open, and how many workers are inside.
    ///
    /// A worker enters an open job by increasing the count. The caller closes the job when its own share is done and
    /// waits only for those inside: a worker that the system has not scheduled in time is not waited for.
    state: AtomicU64,
    /// Valid while the job is open or a worker is inside.
    job: UnsafeCell<Option<Job<'static>>>,
    /// Held while parking and waking.
    park: Mutex<()>,
    wake: Condvar,
    /// Workers parked or about to park.
    n_parked: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
}

// SAFETY: `job` is written by the caller only while the job is closed and nobody is inside, and read by workers only after
// they entered an open job, which is opened after the write.
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
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
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
                let work = move || {
                    crate::system::prefer_fast_cores();
                    work(&shared);
                };
                thread.spawn(work).ok()
            })
            .collect();
        Pool { shared, handles, running: Mutex::new(()) }
    }

    /// Threads, the caller included.
    pub fn n_threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Runs `job` on the caller and on every worker that comes in time; returns when all of these are done.
    ///
    /// The job must share its work out itself, as [`Pool::chunks`] does.
    ///
    /// # Panics
    /// When a worker's job panicked.
    #[allow(unsafe_code)]
    pub fn run(&self, job: impl Fn() + Sync) {
        if self.handles.is_empty() {
            return job();
        }
        let _one_at_a_time = self.running.lock().unwrap_or_else(|e| e.into_inner());
        let shared = &*self.shared;
        let job: Job<'_> = &job;
        // SAFETY: only the lifetime changes. Workers use the reference while they are inside the job, and this function
        // does not return (or unwind, see `Finish`) before the job is closed and empty.
        let job: Job<'static> = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        // SAFETY: the last job is closed and empty, so no worker reads this now.
        unsafe { *shared.job.get() = Some(job) };
        let epoch = (shared.state.load(Ordering::Relaxed) >> EPOCH_SHIFT) + 1;
        shared.state.store(epoch << EPOCH_SHIFT | OPEN, Ordering::SeqCst);
        if shared.n_parked.load(Ordering::SeqCst) > 0 {
            let _guard = shared.park.lock().unwrap_or_else(|e| e.into_inner());
            shared.wake.notify_all();
        }
        {
            let _finish = Finish(shared);
            job();
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
        self.run(|| {
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
        {
            let _guard = self.shared.park.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.wake.notify_all();
        }
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

/// Closes the job and waits for the workers inside, even when the caller's own share unwinds.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while state & ACTIVE != 0 {
            spins += 1;
            if spins < 2_000 {
                std::hint::spin_loop();
            } else {
                // More threads than free cores: let the worker have this one.
                std::thread::yield_now();
            }
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

#[allow(unsafe_code)]
fn work(shared: &Shared) {
    let mut last = 0;
    while let Some(epoch) = enter(shared, last) {
        last = epoch;
        // SAFETY: this worker is inside the job, which was opened after the write.
        let job = unsafe { *shared.job.get() };
        if let Some(job) = job
            && std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err()
        {
            shared.panicked.store(true, Ordering::SeqCst);
        }
        shared.state.fetch_sub(1, Ordering::Release);
    }
}

/// Waits for an open job other than `last` and enters it; `None` when the pool is being dropped.
fn enter(shared: &Shared, last: u64) -> Option<u64> {
    let try_enter = || {
        let state = shared.state.load(Ordering::SeqCst);
        let entered = state & OPEN != 0
            && state >> EPOCH_SHIFT != last
            && shared.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        entered.then_some(state >> EPOCH_SHIFT)
    };
    let mut start = None;
    loop {
        for _ in 0..256 {
            if let Some(epoch) = try_enter() {
                return Some(epoch);
            }
            std::hint::spin_loop();
        }
        if shared.stop.load(Ordering::SeqCst) {
            return None;
        }
        if start.get_or_insert_with(Instant::now).elapsed() > SPIN {
            break;
        }
    }
    let mut guard = shared.park.lock().unwrap_or_else(|e| e.into_inner());
    shared.n_parked.fetch_add(1, Ordering::SeqCst);
    let epoch = loop {
        if shared.stop.load(Ordering::SeqCst) {
            break None;
        }
        if let Some(epoch) = try_enter() {
            break Some(epoch);
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
    fn the_caller_always_runs_and_nobody_twice() {
        for n_threads in [1, 2, 4] {
            let pool = Pool::new(n_threads);
            for _ in 0..1000 {
                let threads = Mutex::new(vec![]);
                pool.run(|| threads.lock().unwrap().push(std::thread::current().id()));
                let mut threads = threads.into_inner().unwrap();
                assert!(threads.contains(&std::thread::current().id()));
                let n = threads.len();
                threads.sort_by_key(|id| format!("{id:?}"));
                threads.dedup();
                assert!(threads.len() == n && n <= n_threads);
            }
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
        let caller = std::thread::current().id();
        // A worker may come too late for one job, but not for a thousand.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..1000 {
                pool.run(|| {
                    std::thread::sleep(Duration::from_micros(50));
                    assert!(std::thread::current().id() == caller, "on purpose");
                });
            }
        }));
        assert!(result.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(|| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert!(ran.load(Ordering::Relaxed) >= 1);
    }
}
