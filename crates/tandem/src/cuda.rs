//! What a GPU must hold, before anything is loaded onto it; GPUs as the devices of several ranks.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, bail};
use tandem_comm::{Doing, Failure, Group};
use tandem_core::Backend;
use tandem_core::backend::{CacheKind, Mlp, Moe};
use tandem_core::weights::{MatrixData, Weight};
use tandem_cpu::bandwidth::measure_read_bandwidth;
use tandem_cpu::{CpuBackend, CpuBuffer, CpuIndices, CpuMatrix, system};
use tandem_cuda::{
    CudaBackend, CudaGroup, GroupBuffer, Handle, HostExperts, Numerics, Options, UniqueId, nccl_present, unique_id,
};
use tandem_model::{Offload, Stacks};

use crate::cli::ActivationsArg;
use crate::distributed::{Model, Place, RankDevice, Sums};
use crate::load::{Shape, cpu_backend, fits_in_memory};
use crate::report::bytes;

/// Read to measure the host's memory.
const READ_BYTES: usize = 512 << 20;
/// Kept free for kernels' scratch, graphs and the driver.
const RESERVE: u64 = 1 << 30;

/// Leaves experts on the host where the model does not fit the GPU, or where `n_cpu_moe` asks for it.
///
/// # Errors
/// It does not fit even so.
pub(crate) fn place_experts(
    backend: CudaBackend,
    shape: Shape<'_>,
    weights: &[Weight],
    n_cpu_moe: Option<usize>,
    threads: Option<usize>,
    activations: ActivationsArg,
) -> anyhow::Result<CudaBackend> {
    let cache = (shape.n_slots * cache_bytes_per_token(&backend, shape)) as u64;
    let free = backend.free_memory();
    let offload = Offload::new(weights, shape.config, free.saturating_sub(cache + RESERVE), n_cpu_moe);
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
    let threads = threads.unwrap_or_else(system::default_threads).max(1);
    let (cpu, _) = cpu_backend(Some(threads), activations, offload.host_bytes);
    let (device, host) = (backend.bandwidth(), measure_read_bandwidth(cpu.pool(), READ_BYTES));
    eprintln!(
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
    );
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
    }
}

/// Bytes that one token takes in the cache.
fn cache_bytes_per_token(backend: &CudaBackend, shape: Shape<'_>) -> usize {
    let config = shape.config;
    let layers = config.num_hidden_layers;
    let Some(mla) = &config.mla else {
        return layers * 2 * backend.cache_bytes(CacheKind::KeyValue, config.num_key_value_heads * config.head_dim);
    };
    let latent = backend.cache_bytes(CacheKind::Latent, mla.kv_lora_rank + mla.qk_rope_head_dim);
    let key = config.indexer.as_ref().map_or(0, |i| backend.cache_bytes(CacheKind::IndexKey, i.index_head_dim));
    layers * latent + (0..layers).filter(|l| config.has_indexer(*l)).count() * key
}

/// The numerics that `--activations` asks for.
pub(crate) fn numerics(activations: ActivationsArg) -> anyhow::Result<Numerics> {
    Ok(match activations {
        ActivationsArg::F32 => Numerics::F32,
        ActivationsArg::Bf16 | ActivationsArg::Auto => Numerics::Bf16,
        ActivationsArg::Int8 => bail!("--activations int8 is for --backend cpu; on a GPU use bf16 or f32"),
    })
}

/// Lets the GPUs of a group's ranks reach each other's memory, and meets them through NCCL if every rank has it.
pub(crate) fn connect(backend: &CudaBackend, group: &Group) -> anyhow::Result<CudaGroup> {
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
        eprintln!(
            "note: NCCL was not found on every rank (libnccl.so.2); long sums go through the GPUs' memory as short ones do"
        );
    }
    if rank == 0 && !all_mapped {
        eprintln!(
            "note: the GPUs cannot reach each other's memory; all sums go through NCCL, which is slower for short ones"
        );
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

impl RankDevice for CudaBackend {
    type Opened = CudaBackend;

    fn open(model: &Model, place: Place) -> anyhow::Result<CudaBackend> {
        let options = Options { ordinal: place.local_rank as i32, ..Options::new(numerics(model.activations)?) };
        Ok(CudaBackend::new(options)?)
    }

    fn memory(opened: &CudaBackend, _: Place) -> u64 {
        opened.free_memory().saturating_sub(RESERVE)
    }

    fn bandwidth(opened: &CudaBackend) -> f64 {
        opened.bandwidth()
    }

    fn numerics(model: &Model) -> anyhow::Result<&'static str> {
        Ok(numerics(model.activations)?.name())
    }

    fn finish(opened: CudaBackend, _: &str) -> CudaBackend {
        // Every rank has the same flags.
        opened
    }

    fn stacks() -> Stacks {
        Stacks::Repeated
    }

    fn sums(&self, group: &Group) -> anyhow::Result<Option<Sums<CudaBackend>>> {
        let sums = Arc::new(connect(self, group)?);
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
}
