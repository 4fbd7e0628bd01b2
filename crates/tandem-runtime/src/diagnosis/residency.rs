//! Whether the weights stay in memory: looked at when they are loaded, and every few seconds by a thread that gives way to
//! all others.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tandem_cpu::{process, system};
use tandem_engine::{ReadUsage, Usage};

use crate::units::bytes;

/// Between two looks.
pub(super) const EVERY: Duration = Duration::from_secs(3);
/// Stands for a share that nobody knows.
const UNKNOWN: u64 = u64::MAX;
/// Share of the weights, in parts in a million, that may leave memory without a word: the ends of files are never read.
const TOLERATED_PPM: u64 = 20_000;

/// What is known about the weights of this process.
#[derive(Debug)]
pub struct Residency {
    /// Files that the weights are mapped from, without links; none if the weights are copies in memory.
    files: Vec<PathBuf>,
    weight_bytes: u64,
    share_ppm: AtomicU64,
    best_ppm: AtomicU64,
    swapped_bytes: AtomicU64,
}

impl Residency {
    /// Looks once, and goes on as long as the result lives. `files` are those whose mappings are the weights, if these are
    /// not copied.
    pub fn watch(files: &[PathBuf], weight_bytes: u64) -> Arc<Residency> {
        let files = files.iter().map(|file| file.canonicalize().unwrap_or_else(|_| file.clone())).collect();
        let zero = || AtomicU64::new(0);
        let share_ppm = AtomicU64::new(UNKNOWN);
        let residency = Residency { files, weight_bytes, share_ppm, best_ppm: zero(), swapped_bytes: zero() };
        residency.look();
        let residency = Arc::new(residency);
        let watched = Arc::downgrade(&residency);
        // Without the thread everything else works.
        let _ = std::thread::Builder::new().name("residency".into()).spawn(move || watch(&watched));
        residency
    }

    /// Looks now.
    pub fn look(&self) {
        let swapped = process::swapped_bytes();
        self.swapped_bytes.store(swapped, Ordering::Relaxed);
        let share = if self.files.is_empty() {
            Some(1.0 - (swapped as f64 / self.weight_bytes.max(1) as f64).min(1.0))
        } else {
            process::resident_share(&self.files)
        };
        let ppm = share.map_or(UNKNOWN, |share| (share * 1e6) as u64);
        self.share_ppm.store(ppm, Ordering::Relaxed);
        if ppm != UNKNOWN {
            self.best_ppm.fetch_max(ppm, Ordering::Relaxed);
        }
    }

    /// Share of the weights that is in memory, from 0 to 1, as of the last look.
    pub fn share(&self) -> Option<f64> {
        Some(self.share_ppm.load(Ordering::Relaxed)).filter(|ppm| *ppm != UNKNOWN).map(|ppm| ppm as f64 / 1e6)
    }

    /// A sentence for the user, if weights have left memory.
    pub fn warning(&self) -> Option<String> {
        let (share, best) = (self.share()?, self.best_ppm.load(Ordering::Relaxed));
        if (share * 1e6) as u64 + TOLERATED_PPM >= best {
            return None;
        }
        let swapped = self.swapped_bytes.load(Ordering::Relaxed);
        let how = if swapped > 0 { format!(", {} are swapped out", bytes(swapped)) } else { String::new() };
        Some(format!(
            "only {:.0} % of the weights are in memory{how}: the rest is read from the disk for every token. Close other \
             programs, or pin the weights with --lock",
            100.0 * share
        ))
    }

    /// Reads what the system says about this process, with what is known here.
    pub fn usage(self: &Arc<Self>) -> ReadUsage {
        let residency = Arc::clone(self);
        Arc::new(move || Usage {
            cpu: system::cpu_time(),
            run_delay: process::run_delay(),
            throttled: process::throttled(),
            major_faults: system::major_page_faults(),
            swapped_bytes: residency.swapped_bytes.load(Ordering::Relaxed),
            resident_ppm: Some(residency.share_ppm.load(Ordering::Relaxed)).filter(|ppm| *ppm != UNKNOWN),
        })
    }
}

fn watch(watched: &Weak<Residency>) {
    process::lower_priority();
    let mut warned = false;
    loop {
        std::thread::sleep(EVERY);
        let Some(residency) = watched.upgrade() else { return };
        residency.look();
        let warning = residency.warning();
        if let (Some(text), false) = (&warning, warned) {
            tracing::warn!("{text}");
        }
        warned = warning.is_some();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_left_memory_are_reported_once_they_were_there() {
        let residency = Residency::watch(&[], 1 << 30);
        assert_eq!((residency.share(), residency.warning()), (Some(1.0), None));
        // (best, now, warns)
        for (best, now, warns) in [(1_000_000, 985_000, false), (1_000_000, 900_000, true), (500_000, 490_000, false)] {
            residency.best_ppm.store(best, Ordering::Relaxed);
            residency.share_ppm.store(now, Ordering::Relaxed);
            assert_eq!(residency.warning().is_some(), warns, "{best} {now}");
        }
        residency.share_ppm.store(UNKNOWN, Ordering::Relaxed);
        assert_eq!((residency.share(), residency.warning()), (None, None));
    }
}
