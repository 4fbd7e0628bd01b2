//! Runs one batch through a model on a backend.

use tandem_core::{Backend, Batch, ModelConfig};
use tandem_model::{KvCache, Limits, Model, StepShape};

use crate::EngineError;

/// Something that runs batches; the engine and its tests do not know what.
pub trait Runner {
    /// Runs one step and appends the wanted rows' logits, `[n_logits, vocab_size]`.
    ///
    /// # Errors
    /// The device failed.
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError>;
    /// Runs several steps in order, as [`Runner::step`] does one by one; a pipeline works on some of them at once.
    ///
    /// # Errors
    /// The device failed.
    fn steps(&mut self, batches: Vec<Batch>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        batches.into_iter().try_for_each(|batch| self.step(batch, logits))
    }
    /// Rows of the largest batch.
    fn limits(&self) -> Limits;
    /// Logits per row.
    fn vocab_size(&self) -> usize;
}

/// A model, its backend and its cache.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    cache: KvCache<B>,
    limits: Limits,
    vocab_size: usize,
}

impl<B: Backend> ModelRunner<B> {
    /// A runner with an empty cache of `n_slots` tokens.
    pub fn new(backend: B, model: Box<dyn Model<B>>, limits: Limits, vocab_size: usize, n_slots: usize) -> Self {
        let cache = model.new_cache(&backend, n_slots);
        ModelRunner { backend, model, cache, limits, vocab_size }
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Waits for the device.
    ///
    /// # Errors
    /// What went wrong since the last time: after loading, too little memory.
    pub fn sync(&self) -> Result<(), EngineError> {
        self.backend.sync().map_err(|e| EngineError::Device(Box::new(e)))
    }

    /// Fills the first `n_slots` slots of every layer's cache with random vectors, to measure long contexts without
    /// running them.
    ///
    /// # Errors
    /// The device failed.
    pub fn fill_cache_random(&mut self, config: &ModelConfig, n_slots: usize, seed: u64) -> Result<(), EngineError> {
        self.cache.fill_random(&self.backend, config, n_slots, seed);
        self.sync()
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        let shape = StepShape::of(&batch);
        let batch = self.backend.upload(batch);
        let (backend, model, cache) = (&self.backend, &mut self.model, &mut self.cache);
        backend.step(&batch, shape.max_context, &mut |max_context| {
            model.forward(backend, &batch, StepShape { max_context, ..shape }, cache);
        });
        let start = logits.len();
        logits.resize(start + shape.n_logits * self.vocab_size, 0.0);
        self.backend.download(self.model.logits(), &mut logits[start..]);
        self.sync()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}
