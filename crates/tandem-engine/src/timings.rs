//! Where the time of steps went: sums that every rank keeps while it works, and the engine's last steps one by one.
//!
//! Nothing here waits for a device or allocates in a step; a step costs a few clock readings per layer. What it means is
//! for others to say.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::profiled::Operation;

const N_OPERATIONS: usize = Operation::ALL.len();

/// Time by operation, in the order of [`Operation::ALL`].
pub type ByOperation = [Duration; N_OPERATIONS];

/// Nanoseconds by operation. One thread adds, any may read.
#[derive(Debug, Default)]
pub struct OperationTimes {
    sums: [AtomicU64; N_OPERATIONS],
    is_off: AtomicBool,
}

impl OperationTimes {
    /// Whether calls are timed; they are at first.
    pub(crate) fn is_on(&self) -> bool {
        !self.is_off.load(Ordering::Relaxed)
    }

    pub(crate) fn set_on(&self, on: bool) {
        self.is_off.store(!on, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, operation: Operation, time: Duration) {
        let sum = &self.sums[operation as usize];
        // Only one thread writes, so that this needs no locked instruction.
        sum.store(sum.load(Ordering::Relaxed) + time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// The sums so far.
    pub fn read(&self) -> ByOperation {
        std::array::from_fn(|i| Duration::from_nanos(self.sums[i].load(Ordering::Relaxed)))
    }
}

/// What the operating system says about a rank's process since it began, and now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time of all threads.
    pub cpu: Duration,
    /// Time in which threads could have run and had no core.
    pub run_delay: Duration,
    /// Time in which a quota kept the process from running.
    pub throttled: Duration,
    /// Pages that an access had to wait for.
    pub major_faults: u64,
    /// Bytes of the process that are swapped out now.
    pub swapped_bytes: u64,
    /// Parts in a million of the weights that are in memory now; `None` where the system does not tell.
    pub resident_ppm: Option<u64>,
}

/// Reads the [`Usage`] of this process.
pub type ReadUsage = Arc<dyn Fn() -> Usage + Send + Sync>;

/// What a rank has done since it was loaded; all sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Steps.
    pub n_steps: u64,
    /// Their rows.
    pub n_rows: u64,
    /// Its part of the model, sums over ranks left out.
    pub working: Duration,
    /// In sums over tensor-parallel ranks, waiting for the others included.
    pub summing: Duration,
    /// Waiting for hidden states.
    pub receiving: Duration,
    /// Sending hidden states.
    pub sending: Duration,
    /// Parts of `working`; zeros where operations are only enqueued.
    pub operations: ByOperation,
    /// Of the process.
    pub usage: Usage,
}

/// Words of a [`Spent`] on the wire, before its operations.
const N_WORDS: usize = 12;
/// Stands for a share that nobody knows.
const UNKNOWN: u64 = u64::MAX;

impl Spent {
    /// As little-endian words.
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let ns = |time: Duration| time.as_nanos() as u64;
        let u = self.usage;
        let words: [u64; N_WORDS] = [
            self.n_rows,
            self.n_steps,
            ns(self.working),
            ns(self.summing),
            ns(self.receiving),
            ns(self.sending),
            ns(u.cpu),
            ns(u.run_delay),
            ns(u.throttled),
            u.major_faults,
            u.swapped_bytes,
            u.resident_ppm.unwrap_or(UNKNOWN),
        ];
        words.into_iter().chain(self.operations.map(ns)).flat_map(u64::to_le_bytes).collect()
    }

    /// What a rank sent; zeros for what it did not.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Spent {
        let word = |i: usize| bytes.get(8 * i..).and_then(<[u8]>::first_chunk).map_or(0, |b| u64::from_le_bytes(*b));
        let time = |i| Duration::from_nanos(word(i));
        Spent {
            n_rows: word(0),
            n_steps: word(1),
            working: time(2),
            summing: time(3),
            receiving: time(4),
            sending: time(5),
            operations: std::array::from_fn(|i| time(N_WORDS + i)),
            usage: Usage {
                cpu: time(6),
                run_delay: time(7),
                throttled: time(8),
                major_faults: word(9),
                swapped_bytes: word(10),
                resident_ppm: Some(word(11)).filter(|ppm| *ppm != UNKNOWN),
            },
        }
    }

    /// What was done since `before`; states are as they are now.
    #[must_use]
    pub fn since(&self, before: &Spent) -> Spent {
        let (now, was) = (self.usage, before.usage);
        Spent {
            n_steps: self.n_steps.saturating_sub(before.n_steps),
            n_rows: self.n_rows.saturating_sub(before.n_rows),
            working: self.working.saturating_sub(before.working),
            summing: self.summing.saturating_sub(before.summing),
            receiving: self.receiving.saturating_sub(before.receiving),
            sending: self.sending.saturating_sub(before.sending),
            operations: std::array::from_fn(|i| self.operations[i].saturating_sub(before.operations[i])),
            usage: Usage {
                cpu: now.cpu.saturating_sub(was.cpu),
                run_delay: now.run_delay.saturating_sub(was.run_delay),
                throttled: now.throttled.saturating_sub(was.throttled),
                major_faults: now.major_faults.saturating_sub(was.major_faults),
                ..now
            },
        }
    }
}

/// One step of the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTimes {
    /// Tokens made; beside tokens of prompts, rows of sequences that decode.
    pub n_decoding: usize,
    /// Prompt tokens run.
    pub n_prefilled: usize,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// From the end of the step before, where sequences went on, to the end of this one.
    pub total: Duration,
    /// Between the two steps: text, connections, whoever drives the engine.
    pub outside: Duration,
    /// Scheduling, sampling and pages.
    pub host: Duration,
    /// What rank 0 did in it, in one or several parts; its usage has the page faults only.
    pub rank: Spent,
}

/// The last steps of an engine, for whoever explains them.
#[derive(Debug, Default)]
pub struct Timings(Mutex<VecDeque<StepTimes>>);

/// Steps that are kept.
const N_KEPT: usize = 4096;

impl Timings {
    fn steps(&self) -> MutexGuard<'_, VecDeque<StepTimes>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn push(&self, step: StepTimes) {
        let mut steps = self.steps();
        if steps.len() == N_KEPT {
            steps.pop_front();
        }
        steps.push_back(step);
    }

    /// A copy of the last steps, oldest first.
    pub fn last(&self) -> Vec<StepTimes> {
        self.steps().iter().copied().collect()
    }
}

/// The engine's clock: takes one step after the other apart.
pub(crate) struct StepClock {
    timings: Arc<Timings>,
    major_faults: fn() -> u64,
    /// End of the step before, if sequences went on after it.
    last_end: Option<Instant>,
    entered: Instant,
    spent: Spent,
    is_off: bool,
}

impl StepClock {
    pub(crate) fn new() -> StepClock {
        let timings = Arc::default();
        let spent = Spent::default();
        StepClock { timings, major_faults: || 0, last_end: None, entered: Instant::now(), spent, is_off: false }
    }

    /// Whether steps are noted; they are at first.
    pub(crate) fn set_on(&mut self, on: bool) {
        self.is_off = !on;
        self.last_end = None;
    }

    /// Whether steps are noted.
    pub(crate) fn is_on(&self) -> bool {
        !self.is_off
    }

    pub(crate) fn with_major_faults(self, major_faults: fn() -> u64) -> StepClock {
        StepClock { major_faults, ..self }
    }

    pub(crate) fn timings(&self) -> &Arc<Timings> {
        &self.timings
    }

    /// The engine is asked for a step.
    pub(crate) fn enter(&mut self) {
        if self.is_on() {
            self.entered = Instant::now();
        }
    }

    /// A step ended whose device worked, or was waited for, during `device`. `spent` is what the rank has done in all.
    pub(crate) fn end(&mut self, step: StepTimes, device: Duration, mut spent: Spent, goes_on: bool) {
        let now = Instant::now();
        let start = self.last_end.unwrap_or(self.entered);
        let (total, outside) = (now - start, self.entered.saturating_duration_since(start));
        spent.usage.major_faults = (self.major_faults)();
        let rank = spent.since(&self.spent);
        let host = total.saturating_sub(outside).saturating_sub(device);
        self.timings.push(StepTimes { total, outside, host, rank, ..step });
        self.spent = spent;
        self.last_end = goes_on.then_some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rank_spent_survives_the_wire() {
        let ns = Duration::from_nanos;
        for resident_ppm in [None, Some(0), Some(1_000_000)] {
            let usage = Usage {
                cpu: ns(7),
                run_delay: ns(8),
                throttled: ns(9),
                major_faults: 10,
                swapped_bytes: 11,
                resident_ppm,
            };
            let operations = std::array::from_fn(|i| ns(100 + i as u64));
            let (working, summing, receiving, sending) = (ns(3), ns(4), ns(5), ns(6));
            let spent = Spent { n_steps: 1, n_rows: 2, working, summing, receiving, sending, operations, usage };
            assert_eq!(Spent::from_bytes(&spent.to_bytes()), spent);
            assert_eq!(spent.since(&Spent::default()), spent);
        }
        assert_eq!(Spent::from_bytes(&[]).n_rows, 0);
    }

    #[test]
    fn the_oldest_step_makes_room() {
        let timings = Timings::default();
        (0..N_KEPT + 3).for_each(|context| timings.push(StepTimes { context, ..StepTimes::default() }));
        let steps = timings.last();
        assert_eq!((steps.len(), steps[0].context), (N_KEPT, 3));
    }
}
