//! The model families, each written once over [`tandem_core::Backend`].
//!
//! A family is one file: its table of weights and its forward pass. Nothing here knows which backend runs it.

mod accounting;
mod cache_fill;
mod deepseek_v32;
mod dummy;
mod llama;
mod loader;
mod offload;
mod plan;
mod recipe;
mod share;

use tandem_core::backend::{Backend, Batch};
use tandem_core::weights::{self, Weight, WeightSpec};
use tandem_core::{Checkpoint, CheckpointError, ModelConfig};

pub use accounting::{Accounting, KindShare};
pub use deepseek_v32::DeepseekV32;
pub use dummy::{DummyWeights, RandomRows, Stacks};
pub use llama::Llama;
pub use loader::{CheckpointWeights, Loader, WeightSource};
pub use offload::Offload;
pub use plan::{Plan, PlanError, Planner, RankPlan, RankResources, Request};
pub use recipe::{Recipe, Target, glob_matches};
pub use share::{Division, Part, PartWeights, Share};

/// Sizes fixed when a model is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Rows of the largest batch.
    pub max_rows: usize,
    /// Rows of one batch whose logits may be asked for.
    pub max_logits_rows: usize,
}

/// What of a batch decides which operations run; equal shapes run the same sequence of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Rows in the batch.
    pub n_rows: usize,
    /// Rows whose logits are wanted.
    pub n_logits: usize,
    /// Longest context in the batch.
    pub max_context: usize,
}

impl StepShape {
    /// The shape of a batch.
    pub fn of(batch: &Batch) -> StepShape {
        StepShape { n_rows: batch.n_rows(), n_logits: batch.logits_rows.len(), max_context: batch.max_context() }
    }
}

/// The cache of one decoder layer.
pub enum LayerCache<B: Backend> {
    /// Multi-head latent attention: one vector per token, and the indexer's key if the layer has an indexer.
    Latent {
        /// `[n_slots, kv_lora_rank + qk_rope_head_dim]`
        latent: B::Cache,
        /// `[n_slots, index_head_dim]`
        index: Option<B::Cache>,
    },
    /// Grouped-query attention: `[n_slots, n_kv_heads * head_dim]` each.
    KeyValue {
        /// Keys, rotated.
        keys: B::Cache,
        /// Values.
        values: B::Cache,
    },
}

/// The key-value cache of all layers.
pub struct KvCache<B: Backend> {
    /// One entry per decoder layer.
    pub layers: Vec<LayerCache<B>>,
}

impl<B: Backend> KvCache<B> {
    /// The vectors of a page in all layers; `None` if the backend cannot save them.
    pub fn save_page(&self, backend: &B, page: u32) -> Option<Vec<u8>> {
        let mut bytes = vec![];
        let saved = self.layers.iter().all(|layer| match layer {
            LayerCache::Latent { latent, index } => {
                backend.save_page(latent, page, &mut bytes)
                    && index.as_ref().is_none_or(|index| backend.save_page(index, page, &mut bytes))
            }
            LayerCache::KeyValue { keys, values } => {
                backend.save_page(keys, page, &mut bytes) && backend.save_page(values, page, &mut bytes)
            }
        });
        saved.then_some(bytes)
    }

    /// Fills a page with what [`KvCache::save_page`] returned for the same model and numerics; false, and the page's
    /// contents are undefined, when that is not possible.
    pub fn load_page(&mut self, backend: &B, page: u32, mut bytes: &[u8]) -> bool {
        let loaded = self.layers.iter_mut().all(|layer| match layer {
            LayerCache::Latent { latent, index } => {
                backend.load_page(latent, page, &mut bytes)
                    && index.as_mut().is_none_or(|index| backend.load_page(index, page, &mut bytes))
            }
            LayerCache::KeyValue { keys, values } => {
                backend.load_page(keys, page, &mut bytes) && backend.load_page(values, page, &mut bytes)
            }
        });
        loaded && bytes.is_empty()
    }
}

/// A loaded model.
pub trait Model<B: Backend> {
    /// Enqueues one step: from tokens, or from [`Model::hidden_mut`] if an earlier stage has the embedding. Afterwards the
    /// logits of the wanted rows are in [`Model::logits`], or the residual stream for the next stage in [`Model::hidden`].
    fn forward(&mut self, backend: &B, batch: &B::Batch, shape: StepShape, cache: &mut KvCache<B>);
    /// `[max_logits_rows, vocab_size]`
    fn logits(&self) -> &B::Buffer;
    /// The residual stream, `[max_rows, hidden_size]`.
    fn hidden(&self) -> &B::Buffer;
    /// The residual stream, to be filled before [`Model::forward`].
    fn hidden_mut(&mut self) -> &mut B::Buffer;
    /// An empty cache for `n_slots` tokens.
    fn new_cache(&self, backend: &B, n_slots: usize) -> KvCache<B>;
    /// Bytes that one token takes in the cache.
    fn cache_bytes_per_token(&self, backend: &B) -> usize;
}

/// The weights a model of this configuration needs.
pub fn weight_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    match config.mla {
        Some(_) => deepseek_v32::weight_specs(config),
        None => llama::weight_specs(config),
    }
}

/// The weights of the multi-token-prediction layers, if the configuration announces any.
pub fn mtp_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    match config.mla {
        Some(_) => deepseek_v32::mtp_specs(config),
        None => vec![],
    }
}

/// Finds every weight of the model in the checkpoint, strictly.
///
/// # Errors
/// Every missing, duplicate, misshapen, wrongly typed or unexplained tensor.
pub fn resolve(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Vec<Weight>, CheckpointError> {
    weights::resolve(checkpoint, config, &weight_specs(config), &mtp_specs(config))
}

/// Loads a model of any family.
///
/// `progress` is called with the bytes of each matrix handed to the backend.
///
/// # Errors
/// The checkpoint does not match the configuration, or holds values no correct checkpoint holds.
pub fn load<B: Backend + 'static>(
    backend: &B,
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    limits: Limits,
    progress: &mut dyn FnMut(usize),
) -> Result<Box<dyn Model<B>>, CheckpointError> {
    let source = CheckpointWeights::new(checkpoint, resolve(checkpoint, config)?);
    load_from(backend, config, &source, limits, progress)
}

/// [`load`] with weights from anywhere.
///
/// # Errors
/// The source fails.
pub fn load_from<B: Backend + 'static>(
    backend: &B,
    config: &ModelConfig,
    source: &dyn WeightSource,
    limits: Limits,
    progress: &mut dyn FnMut(usize),
) -> Result<Box<dyn Model<B>>, CheckpointError> {
    load_share(backend, config, source, Share::whole(config), limits, progress)
}

/// [`load_from`] for one rank's share: `source` gives its slices ([`PartWeights`]) and `config` has their sizes
/// ([`Division::config`]).
///
/// # Errors
/// The source fails.
pub fn load_share<B: Backend + 'static>(
    backend: &B,
    config: &ModelConfig,
    source: &dyn WeightSource,
    share: Share<B>,
    limits: Limits,
    progress: &mut dyn FnMut(usize),
) -> Result<Box<dyn Model<B>>, CheckpointError> {
    let mut loader = Loader::new(backend, source, progress);
    Ok(match config.mla {
        Some(_) => Box::new(DeepseekV32::load(&mut loader, config, share, limits)?),
        None => Box::new(Llama::load(&mut loader, config, share, limits)?),
    })
}
