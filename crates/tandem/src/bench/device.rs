//! What is measured on: a backend with a stopwatch, whichever it is.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use tandem_core::backend::{Backend, CacheKind};
use tandem_core::{Batch, ModelConfig};
use tandem_cpu::bandwidth::measure_read_bandwidth;
use tandem_cpu::kernels::index_select::agreement;
use tandem_cpu::peak::measure_peak;
use tandem_cpu::system::peak_memory_bytes;
use tandem_cpu::{CpuBackend, CpuIndices, Numerics, Pool};
use tandem_engine::{EngineError, ModelRunner, Profile, Profiled, Runner};
use tandem_model::WeightSource;

use super::model::n_threads;
use crate::cli::BenchModelArgs;
use crate::load::{Device, Shape, choose, cpu_backend, runner};

/// Read for the bandwidth.
const BANDWIDTH_BYTES: usize = 1 << 30;

/// A runner that can be profiled and describes its device.
pub(super) trait BenchRunner {
    /// As [`Runner::step`].
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError>;
    /// Starts an empty profile.
    fn start(&self);
    /// Stops and returns the profile.
    fn stop(&self) -> Profile;
    /// Puts random vectors into the first slots of the cache.
    fn fill_cache(&mut self, config: &ModelConfig, n_slots: usize) -> Result<(), EngineError>;
    /// As [`Backend::cache_bytes`].
    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize;
    /// Bytes per second that the device's memory delivers.
    fn bandwidth(&self) -> f64;
    /// The threads that compute, if the device is the processor: its memory is measured with the same ones, since two
    /// pools would be in each other's way.
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
trait BenchDevice: Backend {
    fn bandwidth(&self) -> f64;
    fn pool(&self) -> Option<Arc<Pool>>;
    fn peak(&self) -> Option<f64>;
    fn index_agreement(&self, n_heads: usize, dim: usize, n_keys: usize, k: usize) -> Option<f64>;
    fn memory_bytes(&self) -> u64;
    fn name(&self) -> String;
    fn describe(&self) -> Value;
}

impl<B: BenchDevice> BenchRunner for ModelRunner<Profiled<B>> {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        Runner::step(self, batch, logits)
    }

    fn start(&self) {
        self.backend().start();
    }

    fn stop(&self) -> Profile {
        self.backend().stop()
    }

    fn fill_cache(&mut self, config: &ModelConfig, n_slots: usize) -> Result<(), EngineError> {
        self.fill_cache_random(config, n_slots, 1)
    }

    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize {
        self.backend().cache_bytes(kind, width)
    }

    fn bandwidth(&self) -> f64 {
        self.backend().inner().bandwidth()
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        self.backend().inner().pool()
    }

    fn peak(&self) -> Option<f64> {
        self.backend().inner().peak()
    }

    fn index_agreement(&self, n_heads: usize, dim: usize, n_keys: usize, k: usize) -> Option<f64> {
        self.backend().inner().index_agreement(n_heads, dim, n_keys, k)
    }

    fn peak_memory_bytes(&self) -> u64 {
        self.backend().inner().memory_bytes()
    }

    fn name(&self) -> String {
        self.backend().inner().name()
    }

    fn describe(&self) -> Map<String, Value> {
        match self.backend().inner().describe() {
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
) -> anyhow::Result<(Box<dyn BenchRunner>, &'static str)> {
    match choose(args.backend, args.activations)? {
        Device::Cpu => {
            let (backend, numerics) = cpu_backend(args.threads, args.activations, resident);
            let backend = Profiled::new(backend, count_distinct);
            Ok((Box::new(runner(backend, source, shape, resident)?), numerics))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda => {
            let backend = crate::load::cuda_backend(args.activations)?;
            crate::cuda::check_memory(&backend, shape, resident)?;
            let numerics = backend.numerics().name();
            let backend = Profiled::new(backend, tandem_cuda::CudaBackend::count_distinct);
            Ok((Box::new(runner(backend, source, shape, resident)?), numerics))
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

/// Different experts in the first rows.
fn count_distinct(_: &CpuBackend, ids: &CpuIndices, n_rows: usize) -> usize {
    (0..n_rows).flat_map(|row| ids.row(row)).collect::<HashSet<_>>().len()
}

impl BenchDevice for CpuBackend {
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
