//! What a GPU must hold, before anything is loaded onto it; GPUs as the devices of several ranks.

use std::sync::Arc;

use anyhow::{Context, bail};
use tandem_comm::{Doing, Failure, Group};
use tandem_core::Backend;
use tandem_core::backend::CacheKind;
use tandem_cuda::{CudaBackend, CudaGroup, GroupBuffer, Handle, Numerics, Options, UniqueId, nccl_present, unique_id};
use tandem_model::Stacks;

use crate::cli::ActivationsArg;
use crate::distributed::{Model, Place, RankDevice, Sums};
use crate::load::Shape;
use crate::report::bytes;

/// Kept free for kernels' scratch, graphs and the driver.
const RESERVE: u64 = 1 << 30;

/// Refuses a model that will not fit.
pub(crate) fn check_memory(backend: &CudaBackend, shape: Shape<'_>, weights: u64) -> anyhow::Result<()> {
    let cache = (shape.n_slots * cache_bytes_per_token(backend, shape)) as u64;
    let (free, wanted) = (backend.free_memory(), weights + cache + RESERVE);
    if wanted > free {
        bail!(
            "{} has {} free, and this needs {}: {} of weights, {} of cache for {} tokens, {} of working memory. Ask for \
             a smaller --context, use a smaller model, or --backend cpu",
            backend.info().name,
            bytes(free),
            bytes(wanted),
            bytes(weights),
            bytes(cache),
            shape.n_slots,
            bytes(RESERVE)
        );
    }
    Ok(())
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
