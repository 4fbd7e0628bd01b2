//! What is measured on: a backend with a stopwatch, whichever it is.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use tandem_core::backend::{Backend, CacheKind};
use tandem_core::weights::Weight;
use tandem_core::{Batch, ModelConfig};
use tandem_cpu::bandwidth::measure_read_bandwidth;
use tandem_cpu::kernels::index_select::agreement;
use tandem_cpu::peak::measure_peak;
use tandem_cpu::system::{major_page_faults, peak_memory_bytes};
use tandem_cpu::{CpuBackend, CpuIndices, Numerics, Pool};
use tandem_engine::{DeviceSampler, EngineError, ModelRunner, Profiled, RankTimes, Runner};
use tandem_model::WeightSource;

use super::model::n_threads;
use super::ranks::RankReport;
use crate::cli::BenchModelArgs;
use crate::load::{Device, Shape, choose, cpu_backend, no_host_experts, runner};

/// Read for the bandwidth.
const BANDWIDTH_BYTES: usize = 1 << 30;
/// Read by each of several ranks.
const RANK_BANDWIDTH_BYTES: usize = 512 << 20;

/// A runner that can be profiled and describes its device.
pub(super) trait BenchRunner {
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

/// What differs from backend to backend.
pub(super) trait BenchDevice: Backend + Sized {
    /// With a stopwatch that counts the experts of a step.
    fn profiled(self) -> Profiled<Self>;
    fn bandwidth(&self) -> f64;
    fn pool(&self) -> Option<Arc<Pool>>;
    /// The same, quickly and without a word.
    fn bandwidth_of_rank(&self) -> f64 {
        self.bandwidth()
    }
    fn peak(&self) -> Option<f64>;
    fn index_agreement(&self, n_heads: usize, dim: usize, n_keys: usize, k: usize) -> Option<f64>;
    fn memory_bytes(&self) -> u64;
    fn name(&self) -> String;
    fn describe(&self) -> Value;
}

/// The whole model in this process.
struct Alone<B: BenchDevice> {
    runner: ModelRunner<Profiled<B>>,
    faults_before: u64,
}

impl<B: BenchDevice> BenchRunner for Alone<B> {
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
        Ok(vec![RankReport::new(&profile, &RankTimes::default(), self.faults_before)])
    }

    fn fill_cache(&mut self, config: &ModelConfig, n_slots: usize) -> anyhow::Result<()> {
        Ok(self.runner.fill_cache_random(config, n_slots, 1)?)
    }

    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize {
        self.runner.backend().cache_bytes(kind, width)
    }

    fn bandwidth(&self) -> f64 {
        self.runner.backend().inner().bandwidth()
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        self.runner.backend().inner().pool()
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
        self.runner.backend().inner().name()
    }

    fn describe(&self) -> Map<String, Value> {
        match self.runner.backend().inner().describe() {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }
}

/// Loads the model onto the device that the flags name; the second value is the name of the numerics.
pub(super) fn load(
    args: &BenchModelArgs,
    source: &dyn WeightSource,
    shape: Shape<'_>,
    resident: u64,
    weights: &[Weight],
) -> anyhow::Result<(Box<dyn BenchRunner>, &'static str)> {
    match choose(args.backend, args.activations)? {
        Device::Cpu => {
            let _ = weights;
            no_host_experts(args.n_cpu_moe)?;
            let (backend, numerics) = cpu_backend(args.threads, args.activations, resident);
            let runner = runner(backend.profiled(), source, shape, resident)?;
            Ok((Box::new(Alone { runner, faults_before: 0 }), numerics))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda => {
            let backend = crate::load::cuda_backend(args.activations)?;
            let (n, threads, activations) = (args.n_cpu_moe, args.threads, args.activations);
            let backend = crate::cuda::place_experts(backend, shape, weights, n, threads, activations)?;
            let numerics = backend.numerics().name();
            let runner = runner(backend.profiled(), source, shape, resident)?;
            Ok((Box::new(Alone { runner, faults_before: 0 }), numerics))
        }
    }
}

/// Bytes per second before a model is loaded, where that can be measured without it.
pub(super) fn bandwidth_before(args: &BenchModelArgs) -> anyhow::Result<f64> {
    Ok(match choose(args.backend, args.activations)? {
        Device::Cpu => cpu_bandwidth(&Pool::new(n_threads(args.threads))),
        #[cfg(feature = "cuda")]
        Device::Cuda => 0.0,
    })
}

/// Bytes per second with the threads of a model.
fn cpu_bandwidth(pool: &Pool) -> f64 {
    let bandwidth = measure_read_bandwidth(pool, BANDWIDTH_BYTES);
    eprintln!("read bandwidth with {} threads: {:.2} GB/s", pool.n_threads(), bandwidth / 1e9);
    bandwidth
}

/// Different experts in the first rows; those of other ranks have the id -1.
fn count_distinct(_: &CpuBackend, ids: &CpuIndices, n_rows: usize) -> usize {
    (0..n_rows).flat_map(|row| ids.row(row)).filter(|id| **id >= 0).collect::<HashSet<_>>().len()
}

impl BenchDevice for CpuBackend {
    fn profiled(self) -> Profiled<CpuBackend> {
        Profiled::new(self, count_distinct)
    }

    fn bandwidth_of_rank(&self) -> f64 {
        measure_read_bandwidth(self.pool(), RANK_BANDWIDTH_BYTES)
    }

    fn bandwidth(&self) -> f64 {
        cpu_bandwidth(self.pool())
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        Some(Arc::clone(self.pool()))
    }

    fn peak(&self) -> Option<f64> {
        measure_peak(self.pool(), self.numerics(), self.isa())
    }

    fn index_agreement(&self, n_heads: usize, dim: usize, n_keys: usize, k: usize) -> Option<f64> {
        (self.numerics() != Numerics::F32).then(|| agreement(self.isa(), n_heads, dim, n_keys, k))
    }

    fn memory_bytes(&self) -> u64 {
        peak_memory_bytes()
    }

    fn name(&self) -> String {
        format!("{} threads, {}", self.n_threads(), self.isa())
    }

    fn describe(&self) -> Value {
        json!({ "threads": self.n_threads(), "isa": self.isa().to_string() })
    }
}

#[cfg(feature = "cuda")]
impl BenchDevice for tandem_cuda::CudaBackend {
    fn profiled(self) -> Profiled<tandem_cuda::CudaBackend> {
        Profiled::new(self, tandem_cuda::CudaBackend::count_distinct)
    }

    fn bandwidth(&self) -> f64 {
        tandem_cuda::CudaBackend::bandwidth(self)
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        None
    }

    fn peak(&self) -> Option<f64> {
        None
    }

    fn index_agreement(&self, _: usize, _: usize, _: usize, _: usize) -> Option<f64> {
        None
    }

    fn memory_bytes(&self) -> u64 {
        self.info().total_memory - self.free_memory()
    }

    fn name(&self) -> String {
        self.info().name.clone()
    }

    fn describe(&self) -> Value {
        json!({ "device": self.info().name })
    }
}
