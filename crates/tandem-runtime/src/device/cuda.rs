//! NVIDIA GPUs as devices: what one must hold before anything is loaded onto it, and sums between several.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};
use tandem_comm::{Doing, Failure, Group};
use tandem_core::Backend;
use tandem_core::backend::{Mlp, Moe};
use tandem_core::weights::MatrixData;
use tandem_cpu::bandwidth::measure_read_bandwidth;
use tandem_cpu::{CpuBackend, CpuBuffer, CpuIndices, CpuMatrix};
use tandem_cuda::{
    CudaBackend, CudaGroup, GroupBuffer, Handle, HostExperts, Numerics, Options, UniqueId, Way, nccl_present, unique_id,
};
use tandem_engine::Profiled;
use tandem_model::{Offload, Stacks};

use super::{Device, FoundDevice, Place, SumTimes, Sums, ToHold, cache_bytes_per_token, cpu_backend, fits_in_memory};
use crate::news::{News, OnNews, ignore_news};
use crate::options::{Activations, DeviceOptions};
use crate::units::bytes;

/// Read to measure the host's memory.
const READ_BYTES: usize = 512 << 20;
/// Kept free for kernels' scratch, graphs and the driver.
const RESERVE: u64 = 1 << 30;

/// Leaves experts on the host where the model does not fit the GPU, or where `--n-cpu-moe` asks for it.
///
/// # Errors
/// It does not fit even so.
fn place_experts(
    backend: CudaBackend,
    options: &DeviceOptions,
    load: &ToHold<'_>,
    on_news: OnNews<'_>,
) -> anyhow::Result<CudaBackend> {
    let (shape, weights) = (load.shape, load.weights);
    let cache = (shape.n_slots * cache_bytes_per_token(&backend, shape)) as u64;
    let free = backend.free_memory().saturating_sub(load.mtp);
    let offload = Offload::new(weights, shape.config, free.saturating_sub(cache + RESERVE), options.n_cpu_moe);
    let wanted = offload.device_bytes + cache + RESERVE;
    if wanted > free {
        bail!(
            "{} has {} free, and this needs {}: {} of weights, {} of cache for {} tokens, {} of working memory. Ask for \
             a smaller --context, use a smaller model, more of --n-cpu-moe, or --backend cpu",
            backend.info().name,
            bytes(free),
            bytes(wanted),
            bytes(offload.device_bytes),
            bytes(cache),
            shape.n_slots,
            bytes(RESERVE)
        );
    }
    if offload.layers.is_empty() {
        return Ok(backend);
    }
    if !fits_in_memory(offload.host_bytes) {
        bail!(
            "the experts of {} layers do not fit the GPU, and the {} that they take are not free on the host either: free \
             memory, or use a smaller model",
            offload.layers.len(),
            bytes(offload.host_bytes)
        );
    }
    let cpu = cpu_backend(options, offload.host_bytes);
    let (device, host) = (backend.bandwidth(), measure_read_bandwidth(cpu.pool(), READ_BYTES));
    on_news(News::Note(format!(
        "experts of {} layers stay on the host: {} of {}; expected at most {:.1} tok/s, reading {} per token at {:.0} GB/s \
         on the GPU and {} at {:.0} GB/s on the host",
        offload.layers.len(),
        bytes(offload.host_bytes),
        bytes(offload.host_bytes + offload.device_bytes),
        offload.tokens_per_second(device, host),
        bytes(offload.device_read_bytes),
        device / 1e9,
        bytes(offload.host_read_bytes),
        host / 1e9
    )));
    let backend = backend.with_host_read_bytes(offload.host_read_bytes);
    let experts = CpuExperts { backend: cpu, stacks: RefCell::default(), mlps: RefCell::default() };
    Ok(backend.with_host_experts(move |module| offload.modules.contains(module), experts))
}

/// The processor's backend as the place of experts.
struct CpuExperts {
    backend: CpuBackend,
    /// Stacks that have been loaded, until they are used for the first time.
    stacks: RefCell<Vec<Option<CpuMatrix>>>,
    /// By the number of their gate.
    mlps: RefCell<HashMap<usize, Mlp<CpuMatrix>>>,
}

impl HostExperts for CpuExperts {
    fn load(&self, data: MatrixData) -> usize {
        let mut stacks = self.stacks.borrow_mut();
        stacks.push(Some(self.backend.load_matrix(data)));
        stacks.len() - 1
    }

    fn moe(&self, mlp: [usize; 3], n_rows: usize, x: &[f32], ids: &[i32], weights: &[f32], out: &mut [f32]) {
        let mut mlps = self.mlps.borrow_mut();
        if let [Some(gate), Some(up), Some(down)] = mlp.map(|i| self.stacks.borrow_mut()[i].take()) {
            mlps.insert(mlp[0], Mlp { gate, up, down });
        }
        let Some(experts) = mlps.get(&mlp[0]) else { return };
        let (hidden, top_k) = (x.len() / n_rows, ids.len() / n_rows);
        let (x, weights) = (CpuBuffer::new(x.to_vec(), hidden), CpuBuffer::new(weights.to_vec(), top_k));
        let ids = CpuIndices::new(ids.to_vec(), top_k);
        let mut sum = self.backend.alloc(n_rows, hidden);
        let (x, ids, weights) = (&x, &ids, &weights);
        self.backend.moe(Moe { x, experts, shared: None, ids, weights, n_rows, out: &mut sum });
        self.backend.download(&sum, out);
        // A damaged expert: no number may come of it, so that the step fails.
        if let Err(error) = self.backend.sync() {
            tracing::error!("{error}");
            out.fill(f32::NAN);
        }
    }
}

/// The GPU that this build would run on.
pub(super) fn found() -> Option<FoundDevice> {
    if !tandem_cuda::device_present() {
        return None;
    }
    let backend = CudaBackend::new(Options::new(Numerics::Bf16)).ok()?;
    let (free, total) = (backend.free_memory(), backend.info().total_memory);
    let mut json = backend.describe();
    json.insert("memory_bytes".into(), total.into());
    let name = format!("{}, {} free of {}", backend.info().name, bytes(free), bytes(total));
    Some(FoundDevice { backend: "cuda", name, json })
}

/// As [`super::copy_speed`].
pub(super) fn copy_speed() -> Option<(f64, f64)> {
    const ROWS: usize = 4096;
    const WIDTH: usize = 8192;
    let backend = CudaBackend::new(Options::new(Numerics::Bf16)).ok()?;
    let (rows, mut buffer) = (vec![1.0f32; ROWS * WIDTH], backend.alloc(ROWS, WIDTH));
    let mut from_host = 0.0f64;
    for _ in 0..4 {
        let start = Instant::now();
        backend.write_rows(&rows, &mut buffer);
        backend.sync().ok()?;
        from_host = from_host.max(4.0 * (ROWS * WIDTH) as f64 / start.elapsed().as_secs_f64());
    }
    Some((CudaBackend::bandwidth(&backend), from_host))
}

/// The numerics that `--activations` asks for.
fn numerics(activations: Activations) -> anyhow::Result<Numerics> {
    Ok(match activations {
        Activations::F32 => Numerics::F32,
        Activations::Bf16 | Activations::Auto => Numerics::Bf16,
        Activations::Int8 => bail!("--activations int8 is for --backend cpu; on a GPU use bf16 or f32"),
    })
}

/// Lets the GPUs of a group's ranks reach each other's memory, and meets them through NCCL if every rank has it.
fn connect(backend: &CudaBackend, group: &Group, on_news: OnNews<'_>) -> anyhow::Result<CudaGroup> {
    let doing = Doing::of("sharing GPU memory");
    let (rank, size) = (group.rank(), group.size());
    let (buffer, handle) = GroupBuffer::new(backend, size)?;
    let mut all = vec![0; handle.len() * size];
    group.all_gather(&handle, &mut all, doing)?;
    let handles: Vec<Handle> =
        all.chunks_exact(handle.len()).map(Handle::try_from).collect::<Result<_, _>>().context("handles")?;
    let peers = buffer.connect(rank, &handles);
    let mut have = vec![[0u8; 2]; size];
    let mine = [u8::from(peers.is_ok()), u8::from(nccl_present())];
    group.all_gather(&mine, have.as_flattened_mut(), doing)?;
    let [all_mapped, all_nccl] = [0, 1].map(|i| have.iter().all(|rank| rank[i] == 1));
    let peers = match peers {
        Ok(peers) => all_mapped.then_some(peers),
        Err(error) if !all_nccl => {
            return Err(error)
                .context("and NCCL, which needs no such access, was not found on every rank (libnccl.so.2)");
        }
        Err(_) => None,
    };
    if rank == 0 && !all_nccl {
        on_news(News::Note(
            "note: NCCL was not found on every rank (libnccl.so.2); long sums go through the GPUs' memory as short ones do"
                .to_string(),
        ));
    }
    if rank == 0 && !all_mapped {
        on_news(News::Note(
            "note: the GPUs cannot reach each other's memory; all sums go through NCCL, which is slower for short ones"
                .to_string(),
        ));
    }
    let mut id: Option<UniqueId> = None;
    if all_nccl {
        let mut shared = if rank == 0 { unique_id()? } else { [0; 128] };
        group.broadcast(0, &mut shared, doing)?;
        id = Some(shared);
    }
    let sums = CudaGroup::new(backend, peers, id.as_ref(), rank, size)?;
    // Nobody sends before everybody has cleared what is sent to.
    group.barrier(doing)?;
    Ok(sums)
}

impl Device for CudaBackend {
    type Opened = CudaBackend;

    fn open(options: &DeviceOptions, place: Place) -> anyhow::Result<CudaBackend> {
        let numerics = numerics(options.activations)?;
        Ok(CudaBackend::new(Options { ordinal: place.local_rank as i32, ..Options::new(numerics) })?)
    }

    fn memory(opened: &CudaBackend, _: Place) -> u64 {
        opened.free_memory().saturating_sub(RESERVE)
    }

    fn plan_bandwidth(opened: &CudaBackend) -> f64 {
        CudaBackend::bandwidth(opened)
    }

    fn numerics(options: &DeviceOptions) -> anyhow::Result<&'static str> {
        Ok(numerics(options.activations)?.name())
    }

    fn finish(opened: CudaBackend, name: &str) -> anyhow::Result<CudaBackend> {
        // Every rank has the same flags, so it was opened with these numerics.
        ensure!(
            opened.numerics().name() == name,
            "rank 0 runs with numerics {name}, this rank with {}; give every rank the same --activations",
            opened.numerics().name()
        );
        Ok(opened)
    }

    fn alone(options: &DeviceOptions, load: &ToHold<'_>, on_news: OnNews<'_>) -> anyhow::Result<CudaBackend> {
        let backend = CudaBackend::new(Options::new(numerics(options.activations)?))?;
        place_experts(backend, options, load, on_news)
    }

    fn numerics_name(&self) -> &'static str {
        self.numerics().name()
    }

    fn known_bandwidth(&self) -> Option<f64> {
        Some(CudaBackend::bandwidth(self))
    }

    fn host_read_bytes(&self) -> u64 {
        CudaBackend::host_read_bytes(self)
    }

    fn stacks() -> Stacks {
        Stacks::Repeated
    }

    fn sums(&self, group: &Group, on_news: OnNews<'_>) -> anyhow::Result<Option<Sums<CudaBackend>>> {
        let sums = Arc::new(connect(self, group, on_news)?);
        let (watched, group) = (Arc::clone(&sums), group.clone());
        let check = move || {
            if !watched.has_failed() {
                return Ok(());
            }
            let other = usize::from(group.rank() == 0);
            let message = "its part of a sum over GPUs did not arrive".to_string();
            Err(group.blame(other, Failure::Stopped { message }, Doing::of("all_reduce on the GPU")))
        };
        Ok(Some(Sums { group: sums, check: Box::new(check) }))
    }

    fn profiled(self) -> Profiled<CudaBackend> {
        Profiled::new(self, CudaBackend::count_distinct)
    }

    fn bandwidth(&self) -> f64 {
        CudaBackend::bandwidth(self)
    }

    fn memory_bytes(&self) -> u64 {
        self.info().total_memory - self.free_memory()
    }

    fn name(&self) -> String {
        self.info().name.clone()
    }

    fn describe(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("device".into(), json!(self.info().name));
        map
    }
}

/// Times sums that the GPUs of `world` make among themselves, each as one of many in a graph.
///
/// # Errors
/// There is no GPU, or a part of a sum did not arrive.
pub(super) fn time_sums(world: &Group, local_rank: usize) -> anyhow::Result<Vec<SumTimes>> {
    const SUMS: usize = 100;
    const REPETITIONS: usize = 15;
    let backend = CudaBackend::new(Options { ordinal: local_rank as i32, ..Options::new(Numerics::Bf16) })?;
    let sums = connect(&backend, world, &mut ignore_news)?;
    let mut timed = vec![];
    for (name, way) in [("on GPUs", Way::Peers), ("NCCL", Way::Nccl)] {
        for bytes in [4 << 10, 12 << 10, 24 << 10, 192 << 10, 1536 << 10, 12 << 20, 96 << 20] {
            let n_sums = if bytes > 4 << 20 { 10 } else { SUMS };
            let mut microseconds = vec![];
            for _ in 0..REPETITIONS {
                world.barrier(Doing::of("timing sums on GPUs"))?;
                microseconds.extend(sums.measure(bytes / 4, n_sums, way)?.map(|seconds| seconds * 1e6));
            }
            ensure!(!sums.has_failed(), "a part of a sum over GPUs did not arrive");
            if !microseconds.is_empty() {
                microseconds.sort_by(f64::total_cmp);
                timed.push(SumTimes { name, bytes, repetitions: REPETITIONS * n_sums, microseconds });
            }
        }
    }
    Ok(timed)
}
