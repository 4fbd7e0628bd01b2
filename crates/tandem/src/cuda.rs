//! What a GPU must hold, before anything is loaded onto it.

use anyhow::bail;
use tandem_core::Backend;
use tandem_core::backend::CacheKind;
use tandem_cuda::CudaBackend;

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
