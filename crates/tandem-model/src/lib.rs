//! The model families, each written once over [`tandem_core::Backend`].
//!
//! A family is one file: its tables of weights and cached vectors, and its forward pass. Nothing here knows which backend
//! runs it.

mod accounting;
mod cache;
mod decoder;
mod dummy;
mod families;
mod loader;
mod mtp;
mod offload;
mod plan;
mod recipe;
mod registry;
mod share;

use tandem_core::backend::{Backend, Batch, CacheSpec};
use tandem_core::weights::{self, Weight};
use tandem_core::{Checkpoint, CheckpointError, ModelConfig};

pub use accounting::{Accounting, KindShare};
pub use cache::{KvCache, LayerCache};
pub use dummy::{DummyWeights, RandomRows, Stacks};
pub use loader::{CheckpointWeights, Loader, WeightSource};
pub use mtp::MtpSource;
pub use offload::Offload;
pub use plan::{Plan, PlanError, Planner, RankPlan, RankResources, Request};
pub use recipe::{Recipe, Target, glob_matches};
pub use registry::{cache_specs, mtp_specs, weight_specs};
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
    /// What each of its layers caches for each token.
    fn cache_specs(&self) -> &[Vec<CacheSpec>];
    /// What the multi-token-prediction layer caches for each token; empty if none is loaded.
    fn mtp_cache_specs(&self) -> &[Vec<CacheSpec>] {
        &[]
    }
    /// Elements of a hidden state.
    fn hidden_size(&self) -> usize;
    /// With a multi-token-prediction layer: the hidden states of the last step's rows after the final norm,
    /// `[max_rows, hidden_size]`.
    fn normed(&self) -> &B::Buffer;
    /// Enqueues rows of the multi-token-prediction layer, if there is one: tokens after the `given` hidden states
    /// `[n_rows, hidden_size]` of those before them, whose positions the batch has. Afterwards [`Model::drafted`] has the
    /// logits of the wanted rows.
    fn draft(&mut self, _backend: &B, _batch: &B::Batch, _shape: StepShape, _given: &[f32], _cache: &mut KvCache<B>) {}
    /// Logits `[max_logits_rows, vocab_size]` of the rows drafted last, and the hidden states `[max_logits_rows,
    /// hidden_size]` to give for the token after.
    fn drafted(&self) -> Option<(&B::Buffer, &B::Buffer)> {
        None
    }
    /// An empty cache for `n_slots` tokens.
    fn new_cache(&self, backend: &B, n_slots: usize) -> KvCache<B> {
        KvCache::new(backend, self.cache_specs(), n_slots)
    }
    /// Bytes that one token takes in the cache.
    fn cache_bytes_per_token(&self, backend: &B) -> usize {
        self.cache_specs()
            .iter()
            .chain(self.mtp_cache_specs())
            .flatten()
            .map(|spec| backend.cache_bytes(spec.kind, spec.width))
            .sum()
    }
}

/// Finds every weight of the model in the checkpoint, strictly.
///
/// # Errors
/// Every missing, duplicate, misshapen, wrongly typed or unexplained tensor.
pub fn resolve(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Vec<Weight>, CheckpointError> {
    weights::resolve(checkpoint, config, &weight_specs(config), &mtp_specs(config))
}

/// Finds the weights of the multi-token-prediction layers alone, in a checkpoint that may hold a whole model.
///
/// # Errors
/// As [`resolve`], of these layers.
pub fn resolve_mtp(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Vec<Weight>, CheckpointError> {
    weights::resolve_mtp(checkpoint, config, &mtp_specs(config))
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
    load_drafting(backend, config, source, share, limits, None, progress)
}

/// [`load_share`] with the multi-token-prediction layer, which is whole on the rank that has it.
///
/// # Errors
/// The source fails.
pub fn load_drafting<B: Backend + 'static>(
    backend: &B,
    config: &ModelConfig,
    source: &dyn WeightSource,
    share: Share<B>,
    limits: Limits,
    mtp: Option<MtpSource<'_>>,
    progress: &mut dyn FnMut(usize),
) -> Result<Box<dyn Model<B>>, CheckpointError> {
    registry::load(&mut Loader::new(backend, source, progress), config, share, limits, mtp)
}
