//! The processor as a device.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{bail, ensure};
use serde_json::{Map, Value, json};
use tandem_cpu::bandwidth::measure_read_bandwidth;
use tandem_cpu::kernels::index_select::agreement;
use tandem_cpu::peak::measure_peak;
use tandem_cpu::system::peak_memory_bytes;
use tandem_cpu::{CpuBackend, CpuIndices, Isa, Numerics, Pool, process, system};
use tandem_engine::Profiled;
use tandem_model::Stacks;

use super::{Device, Place, ToHold, n_threads, no_host_experts};
use crate::news::{News, OnNews};
use crate::options::{Activations, DeviceOptions};
use crate::units::bytes;

/// Bytes read to estimate a rank's bandwidth for the plan; `bench` measures properly.
const PLAN_BYTES: usize = 128 << 20;
/// Read for the bandwidth.
const BANDWIDTH_BYTES: usize = 1 << 30;
/// Read by each of several ranks.
const RANK_BANDWIDTH_BYTES: usize = 512 << 20;

impl Device for CpuBackend {
    const HOLDS_IN_PROCESS: bool = true;
    /// Threads and kernels.
    type Opened = (usize, Isa);

    fn open(options: &DeviceOptions, place: Place) -> anyhow::Result<(usize, Isa)> {
        let share = || (system::default_threads() / place.on_this_host.max(1)).max(1);
        Ok((options.threads.unwrap_or_else(share), isa(options)))
    }

    fn memory(_: &(usize, Isa), place: Place) -> u64 {
        system::available_memory_bytes().map_or(u64::MAX >> 8, |free| free / place.on_this_host.max(1) as u64)
    }

    fn plan_bandwidth((threads, _): &(usize, Isa)) -> f64 {
        probe_bandwidth(*threads)
    }

    fn numerics(options: &DeviceOptions) -> anyhow::Result<&'static str> {
        Ok(numerics(options).name())
    }

    fn finish((threads, isa): (usize, Isa), name: &str) -> anyhow::Result<CpuBackend> {
        let all = [Numerics::F32, Numerics::Bf16, Numerics::Int8];
        let Some(numerics) = all.into_iter().find(|n| n.name() == name) else {
            bail!("rank 0 asks for numerics {name:?}, which the processor's backend does not have");
        };
        Ok(CpuBackend::with_isa(threads, numerics, isa))
    }

    fn with_fit(self, fits: bool) -> CpuBackend {
        // Repacked weights take memory of their own; mapped ones can be read again from their files.
        self.with_repacking(fits)
    }

    fn alone(options: &DeviceOptions, load: &ToHold<'_>, on_news: OnNews<'_>) -> anyhow::Result<CpuBackend> {
        no_host_experts(options)?;
        if !fits_in_memory(load.resident) {
            ensure!(
                options.allow_paging,
                "the weights take {} and {} of memory are available{}: most of every token's time would go into reading them \
                 from the disk. Free memory, use fewer bits, a smaller model or more machines; or add --allow-paging",
                bytes(load.resident),
                bytes(system::available_memory_bytes().unwrap_or(0)),
                process::memory_limit()
                    .map_or(String::new(), |limit| format!(" (a control group allows {})", bytes(limit.limit_bytes)))
            );
            on_news(News::Note(format!(
                "the weights take {} and {} of memory are available: they stay mapped from their files, which is slower",
                bytes(load.resident),
                bytes(system::available_memory_bytes().unwrap_or(0))
            )));
        }
        Ok(cpu_backend(options, load.resident))
    }

    fn numerics_name(&self) -> &'static str {
        self.numerics().name()
    }

    fn known_bandwidth(&self) -> Option<f64> {
        None
    }

    fn stays_mapped() -> bool {
        true
    }

    fn stacks() -> Stacks {
        Stacks::Distinct
    }

    fn profiled(self) -> Profiled<CpuBackend> {
        Profiled::new(self, count_distinct).with_times()
    }

    fn bandwidth(&self) -> f64 {
        let bandwidth = measure_read_bandwidth(self.pool(), BANDWIDTH_BYTES);
        tracing::info!("read bandwidth with {} threads: {:.2} GB/s", self.n_threads(), bandwidth / 1e9);
        bandwidth
    }

    fn bandwidth_of_rank(&self) -> f64 {
        measure_read_bandwidth(self.pool(), RANK_BANDWIDTH_BYTES)
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

    fn slow_formats(&self) -> Vec<String> {
        CpuBackend::slow_formats(self)
    }

    fn memory_bytes(&self) -> u64 {
        peak_memory_bytes()
    }

    fn name(&self) -> String {
        format!("{} threads, {}", self.n_threads(), self.isa())
    }

    fn describe(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("threads".into(), json!(self.n_threads()));
        map.insert("isa".into(), json!(self.isa().to_string()));
        map
    }
}

/// The processor as a backend for `weight_bytes` of weights, which are repacked where that fits in memory.
pub fn cpu_backend(options: &DeviceOptions, weight_bytes: u64) -> CpuBackend {
    let backend = CpuBackend::with_isa(n_threads(options), numerics(options), isa(options));
    backend.with_repacking(fits_in_memory(weight_bytes))
}

fn isa(options: &DeviceOptions) -> Isa {
    options.isa.unwrap_or_else(Isa::detect)
}

fn numerics(options: &DeviceOptions) -> Numerics {
    match options.activations {
        Activations::F32 => Numerics::F32,
        Activations::Bf16 => Numerics::Bf16,
        Activations::Int8 => Numerics::Int8,
        Activations::Auto => CpuBackend::default_numerics_for(isa(options)),
    }
}

/// True when this many bytes of weights can be in memory.
pub fn fits_in_memory(weight_bytes: u64) -> bool {
    weight_bytes <= system::available_memory_bytes().unwrap_or(u64::MAX)
}

/// Pins what is loaded, or says why not.
pub fn lock_memory(on_news: OnNews<'_>) {
    if let Err(error) = system::lock_memory() {
        on_news(News::Note(format!(
            "--lock: the weights are not locked ({error}); raise the limit with `ulimit -l unlimited`, or as root"
        )));
    }
}

/// Different experts in the first rows; those of other ranks have the id -1.
fn count_distinct(_: &CpuBackend, ids: &CpuIndices, n_rows: usize) -> usize {
    (0..n_rows).flat_map(|row| ids.row(row)).filter(|id| **id >= 0).collect::<HashSet<_>>().len()
}

/// Bytes per second that `threads` threads read, roughly.
fn probe_bandwidth(threads: usize) -> f64 {
    let words = vec![1u64; PLAN_BYTES / 8];
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        let sum: u64 = std::thread::scope(|scope| {
            let parts = words.chunks(words.len().div_ceil(threads));
            let threads: Vec<_> =
                parts.map(|p| scope.spawn(|| p.iter().fold(0u64, |sum, w| sum.wrapping_add(*w)))).collect();
            threads.into_iter().map(|t| t.join().unwrap_or(0)).sum()
        });
        std::hint::black_box(sum);
        best = best.min(start.elapsed().as_secs_f64());
    }
    PLAN_BYTES as f64 / best
}
