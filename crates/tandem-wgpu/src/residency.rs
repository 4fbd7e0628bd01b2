//! Whether the device still holds the weights: bytes over time of each step, against what the first steps reached.
//!
//! A driver that has taken memory back fetches it again in every step, at a small part of the memory's bandwidth and with no
//! other sign.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Decode steps that set the mark, after the very first, which compiles and touches memory for the first time.
const FIRST_STEPS: usize = 8;
/// Steps that are looked at together: a single slow one means nothing.
const RECENT_STEPS: usize = 4;
/// Part of the first steps' rate below which memory counts as lost.
const LOST_BELOW: f64 = 0.35;
/// Rows up to which a step is bound by the bytes that it reads.
const MAX_ROWS: usize = 4;
/// Steps that are over sooner say more about the host than about memory.
const LEAST_TIME: Duration = Duration::from_millis(2);

/// Rates of decode steps, bytes per second; zeros until there were enough steps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Residency {
    /// The best of the first steps.
    pub first: f64,
    /// The best of the last few steps.
    pub recent: f64,
    /// Steps in a row that were slow.
    pub slow_steps: usize,
}

impl Residency {
    /// True when the last steps read their bytes far more slowly than the first.
    pub fn is_lost(self) -> bool {
        self.slow_steps >= RECENT_STEPS
    }

    /// What a user should know, if memory is lost.
    pub fn warning(self) -> Option<String> {
        self.is_lost().then(|| {
            format!(
                "the GPU reads weights at {:.1} GB/s, and {:.1} at first: the system has probably taken memory back. Close \
                 other programs, use a smaller --context, or raise the limit on wired memory (macOS: sudo sysctl \
                 iogpu.wired_limit_mb=N)",
                self.recent / 1e9,
                self.first / 1e9
            )
        })
    }
}

/// Measures steps.
#[derive(Debug, Default)]
pub(crate) struct ResidencyMeter {
    begun: Option<(Instant, u64)>,
    seen: usize,
    first: f64,
    recent: VecDeque<f64>,
    slow_steps: usize,
}

impl ResidencyMeter {
    /// A step of `n_rows` begins; `bytes` were read before it.
    pub(crate) fn begin(&mut self, bytes: u64, n_rows: usize) {
        self.begun = (n_rows <= MAX_ROWS).then(|| (Instant::now(), bytes));
    }

    /// The device is idle, with `bytes` read in all.
    pub(crate) fn end(&mut self, bytes: u64) {
        if let Some((start, before)) = self.begun.take()
            && start.elapsed() >= LEAST_TIME
        {
            self.note((bytes - before) as f64 / start.elapsed().as_secs_f64());
        }
    }

    fn note(&mut self, rate: f64) {
        self.seen += 1;
        if self.seen == 1 {
            return;
        }
        if self.seen <= 1 + FIRST_STEPS {
            self.first = self.first.max(rate);
        }
        self.recent.push_back(rate);
        if self.recent.len() > RECENT_STEPS {
            self.recent.pop_front();
        }
        self.slow_steps = if rate < LOST_BELOW * self.first { self.slow_steps + 1 } else { 0 };
    }

    pub(crate) fn report(&self) -> Residency {
        let recent = self.recent.iter().copied().fold(0.0, f64::max);
        Residency { first: self.first, recent, slow_steps: self.slow_steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(rates: &[f64]) -> Residency {
        let mut meter = ResidencyMeter::default();
        rates.iter().for_each(|rate| meter.note(*rate));
        meter.report()
    }

    #[test]
    fn a_lasting_fall_is_lost_memory_and_a_hiccup_is_not() {
        let steady = [1.0, 500.0, 510.0, 505.0, 500.0, 495.0];
        assert!(!after(&steady).is_lost());
        assert!(!after(&[&steady[..], &[20.0, 500.0]].concat()).is_lost());
        let lost = after(&[&steady[..], &[20.0, 18.0, 21.0, 19.0]].concat());
        assert!(lost.is_lost() && lost.warning().is_some_and(|w| w.contains("iogpu.wired_limit_mb")), "{lost:?}");
        // Back again.
        assert!(!after(&[&steady[..], &[20.0, 18.0, 21.0, 19.0, 480.0]].concat()).is_lost());
        // A first step that compiles is no mark, and without steps there is nothing to say.
        assert!(!after(&[1000.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]).is_lost());
        assert_eq!(after(&[]).warning(), None);
    }
}
