//! A model that can be measured: with a stopwatch around every operation.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value};
use tandem_core::backend::{Backend, CacheKind, Sampling};
use tandem_core::{Batch, ModelConfig};
use tandem_cpu::Pool;
use tandem_cpu::system::major_page_faults;
use tandem_engine::{DeviceSampler, EngineError, ModelRunner, Profiled, RankTimes, Runner};

use super::ranks::RankReport;
use crate::device::Device;

/// A runner that can be profiled and describes its device.
pub trait MeasuredRunner {
    /// As [`Runner::step`].
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError>;
    /// As [`Runner::device_sampler`].
    fn device_sampler(&mut self) -> Option<&mut dyn DeviceSampler> {
        None
    }
    /// Starts to measure, operations one by one if asked.
    fn start(&mut self, profile: bool) -> anyhow::Result<()>;
    /// What was measured since, by rank.
    fn stop(&mut self) -> anyhow::Result<Vec<RankReport>>;
    /// Puts random vectors into the first slots of the cache.
    fn fill_cache(&mut self, config: &ModelConfig, n_slots: usize) -> anyhow::Result<()>;
    /// As [`Backend::cache_bytes`].
    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize;
    /// Bytes per second that the device's memory delivers.
    fn bandwidth(&self) -> f64;
    /// The threads that compute, if the device is the processor: its memory is measured with the same ones, since two
    /// pools would be in each other's way. `None` also for several ranks.
    fn pool(&self) -> Option<Arc<Pool>>;
    /// Operations per second that the device's arithmetic reaches, where that can be measured.
    fn peak(&self) -> Option<f64>;
    /// Share of the positions that f32 index scores select which the device's selects too; `None` where it uses f32.
    fn index_agreement(&self, n_heads: usize, dim: usize, n_keys: usize, k: usize) -> Option<f64>;
    /// Peak memory of the process, or memory in use on the device.
    fn peak_memory_bytes(&self) -> u64;
    /// The device in one line.
    fn name(&self) -> String;
    /// The device in JSON.
    fn describe(&self) -> Map<String, Value>;
}

/// The whole model in this process.
pub(super) struct Alone<B: Device> {
    pub(super) runner: ModelRunner<Profiled<B>>,
    pub(super) faults_before: u64,
}

impl<B: Device> MeasuredRunner for Alone<B> {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        self.runner.step(batch, logits)
    }

    fn device_sampler(&mut self) -> Option<&mut dyn DeviceSampler> {
        self.runner.device_sampler()
    }

    fn start(&mut self, profile: bool) -> anyhow::Result<()> {
        self.faults_before = major_page_faults();
        if profile {
            self.runner.backend().start();
        }
        Ok(())
    }

    fn stop(&mut self) -> anyhow::Result<Vec<RankReport>> {
        let profile = self.runner.backend().stop();
        Ok(vec![RankReport::new::<B>(&profile, &RankTimes::default(), self.faults_before)])
    }

    fn fill_cache(&mut self, config: &ModelConfig, n_slots: usize) -> anyhow::Result<()> {
        Ok(self.runner.fill_cache_random(config, n_slots, 1)?)
    }

    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize {
        self.runner.backend().cache_bytes(kind, width)
    }

    fn bandwidth(&self) -> f64 {
        Device::bandwidth(self.runner.backend().inner())
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        Device::pool(self.runner.backend().inner())
    }

    fn peak(&self) -> Option<f64> {
        self.runner.backend().inner().peak()
    }

    fn index_agreement(&self, n_heads: usize, dim: usize, n_keys: usize, k: usize) -> Option<f64> {
        self.runner.backend().inner().index_agreement(n_heads, dim, n_keys, k)
    }

    fn peak_memory_bytes(&self) -> u64 {
        self.runner.backend().inner().memory_bytes()
    }

    fn name(&self) -> String {
        Device::name(self.runner.backend().inner())
    }

    fn describe(&self) -> Map<String, Value> {
        self.runner.backend().inner().describe()
    }
}

/// Milliseconds from the end of a step to the end of the next, where the device samples tokens and has the next step while
/// it works on one, as in the engine: `n` of them after `warmup` others.
///
/// # Errors
/// The device failed, or the logits make no sense.
pub fn times_ahead(
    sampler: &mut dyn DeviceSampler,
    warmup: usize,
    n: usize,
    mut batch: impl FnMut() -> Batch,
) -> anyhow::Result<Vec<f64>> {
    let greedy = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, unit: 0.0 };
    let mut next = || {
        let batch = batch();
        Batch { sampling: vec![greedy; batch.logits_rows.len()], ..batch }
    };
    let mut ends = vec![];
    sampler.submit(next())?;
    for step in 0..=warmup + n {
        if step < warmup + n {
            sampler.submit(next())?;
        }
        sampler.collect()?.into_iter().collect::<Result<Vec<u32>, _>>()?;
        ends.push(Instant::now());
    }
    Ok(ends[warmup..].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect())
}
