//! Runs one batch through a model on a backend.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_core::{Backend, Batch, ModelConfig};
use tandem_model::{KvCache, Limits, Model, StepShape};

use crate::EngineError;
use crate::sampler::{SampleError, argmax, sampled};
use crate::timings::{OperationTimes, ReadUsage, Spent};

/// What one rank holds, and what it has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankStatus {
    /// Where it runs; empty if that is here.
    pub host: String,
    /// Decoder layers that it holds, or a slice of each.
    pub layers: Range<usize>,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes of its part of the cache.
    pub cache_bytes: u64,
    /// Rows run so far, of all steps.
    pub rows: u64,
    /// Time spent on them, waiting for other ranks left out.
    pub busy: Duration,
    /// Where the time went.
    pub spent: Spent,
}

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
    /// The device's sampling of tokens, if it samples.
    fn device_sampler(&mut self) -> Option<&mut dyn DeviceSampler> {
        None
    }
    /// What the rank of this process has done so far, without its usage of the system.
    fn spent(&self) -> Spent {
        Spent::default()
    }
    /// Whether this process times the operations of a step, as it does at first where it can.
    fn set_timings(&mut self, _on: bool) {}
    /// What a user should know of the device now: it has lost memory.
    fn warning(&self) -> Option<String> {
        None
    }
    /// The multi-token-prediction layer, if one is loaded.
    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        None
    }
    /// Rows of the largest batch.
    fn limits(&self) -> Limits;
    /// Logits per row.
    fn vocab_size(&self) -> usize;
    /// Every rank, as of the last step.
    ///
    /// # Errors
    /// A rank is gone.
    fn ranks(&mut self) -> Result<Vec<RankStatus>, EngineError> {
        Ok(vec![])
    }
    /// The cached vectors of a page, if they can be had: [`Runner::load_page`] takes them.
    fn save_page(&mut self, _page: u32) -> Option<Vec<u8>> {
        None
    }
    /// Fills a page with what [`Runner::save_page`] returned for the same model and numerics; false, and the page's
    /// contents are undefined, when that is not possible.
    fn load_page(&mut self, _page: u32, _bytes: &[u8]) -> bool {
        false
    }
}

/// A runner that samples tokens where it computes logits. A step may be submitted behind another, and name tokens that are
/// not known yet ([`tandem_core::backend::SAMPLED`]); at most two are under way.
pub trait DeviceSampler {
    /// Starts a step whose tokens are sampled.
    ///
    /// # Errors
    /// The device failed.
    fn submit(&mut self, batch: Batch) -> Result<(), EngineError>;
    /// Waits for the oldest step under way and returns its tokens.
    ///
    /// # Errors
    /// The device failed.
    fn collect(&mut self) -> Result<Vec<Result<u32, SampleError>>, EngineError>;
}

/// A multi-token-prediction layer: it drafts the token after next.
pub trait Drafter {
    /// Elements of a hidden state.
    fn hidden_size(&self) -> usize;
    /// The hidden states of the rows of the last step, which has ended, `[n_rows, hidden_size]`; none if another step had been
    /// submitted behind it.
    fn hidden(&self) -> &[f32];
    /// Runs rows whose `hidden [n_rows, hidden_size]` is that of a position and whose token is the one after it. The wanted
    /// rows' drafts are returned, each with the hidden state to go on from.
    ///
    /// # Errors
    /// The device failed.
    fn draft(&mut self, batch: Batch, hidden: &[f32]) -> Result<Drafted, EngineError>;
}

/// What a [`Drafter`] makes of a batch.
#[derive(Clone, Debug, Default)]
pub struct Drafted {
    /// `[n_logits]`
    pub tokens: Vec<u32>,
    /// `[n_logits, hidden_size]`
    pub hidden: Vec<f32>,
}

/// A rank's multi-token-prediction layer beside its model.
pub(crate) struct MtpState<B: Backend> {
    cache: KvCache<B>,
    /// Of the last step's rows, `[n_rows, hidden_size]`.
    pub(crate) hidden: Vec<f32>,
    pub(crate) hidden_size: usize,
    vocab_size: usize,
}

impl<B: Backend> MtpState<B> {
    /// With an empty cache, if the model has such a layer.
    pub(crate) fn new(backend: &B, model: &dyn Model<B>, n_slots: usize, vocab_size: usize) -> Option<MtpState<B>> {
        let specs = model.mtp_cache_specs();
        let hidden_size = model.hidden_size();
        let new = || MtpState { cache: KvCache::new(backend, specs, n_slots), hidden: vec![], hidden_size, vocab_size };
        (!specs.is_empty()).then(new)
    }

    /// Appends the hidden states of a step that has run.
    pub(crate) fn keep(&mut self, backend: &B, model: &dyn Model<B>, n_rows: usize) {
        let start = self.hidden.len();
        self.hidden.resize(start + n_rows * self.hidden_size, 0.0);
        backend.download(model.normed(), &mut self.hidden[start..]);
    }

    /// As [`Drafter::draft`].
    pub(crate) fn draft(&mut self, backend: &B, model: &mut dyn Model<B>, batch: Batch, hidden: &[f32]) -> Drafted {
        let shape = StepShape::of(&batch);
        let batch = backend.upload(batch);
        model.draft(backend, &batch, shape, hidden, &mut self.cache);
        let (n, mut drafted) = (shape.n_logits, Drafted::default());
        if let (1.., Some((logits, hidden))) = (n, model.drafted()) {
            let mut rows = vec![0.0; n * self.vocab_size];
            backend.download(logits, &mut rows);
            // A draft that makes no sense is rejected like any other.
            drafted.tokens = rows.chunks_exact(rows.len() / n).map(|row| argmax(row).unwrap_or(0)).collect();
            drafted.hidden.resize(n * self.hidden_size, 0.0);
            backend.download(hidden, &mut drafted.hidden);
        }
        drafted
    }
}

/// A model, its backend and its cache.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    cache: KvCache<B>,
    limits: Limits,
    vocab_size: usize,
    status: RankStatus,
    times: Option<Arc<OperationTimes>>,
    usage: Option<ReadUsage>,
    n_steps: u64,
    n_under_way: usize,
    mtp: Option<MtpState<B>>,
    /// Rows of the step enqueued last.
    n_rows: usize,
    /// When the oldest step under way began.
    busy_since: Instant,
}

impl<B: Backend> ModelRunner<B> {
    /// A runner with an empty cache of `n_slots` tokens.
    pub fn new(backend: B, model: Box<dyn Model<B>>, limits: Limits, vocab_size: usize, n_slots: usize) -> Self {
        let cache = model.new_cache(&backend, n_slots);
        let status = RankStatus {
            layers: 0..cache.layers.len(),
            cache_bytes: (model.cache_bytes_per_token(&backend) * n_slots) as u64,
            ..RankStatus::default()
        };
        let mtp = MtpState::new(&backend, &*model, n_slots, vocab_size);
        let busy_since = Instant::now();
        ModelRunner {
            backend,
            model,
            cache,
            limits,
            vocab_size,
            status,
            times: None,
            usage: None,
            n_steps: 0,
            n_under_way: 0,
            mtp,
            n_rows: 0,
            busy_since,
        }
    }

    /// The same, which says where time goes: `times` are the backend's, `usage` reads the process's.
    #[must_use]
    pub fn with_times(self, times: Option<Arc<OperationTimes>>, usage: ReadUsage) -> Self {
        ModelRunner { times, usage: Some(usage), ..self }
    }

    /// The same with this number of weight bytes in its status.
    #[must_use]
    pub fn with_weight_bytes(mut self, weight_bytes: u64) -> Self {
        self.status.weight_bytes = weight_bytes;
        self
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
        self.backend.sync().map_err(|e| EngineError::Device(Box::new(e)))?;
        tandem_core::checkpoint::check_mapped().map_err(|e| EngineError::Device(Box::new(e)))
    }

    /// Enqueues a step.
    fn enqueue(&mut self, batch: Batch) {
        let (shape, samples) = (StepShape::of(&batch), !batch.sampling.is_empty());
        if self.n_under_way == 0 {
            self.busy_since = Instant::now();
        }
        self.n_under_way += 1;
        self.status.rows += shape.n_rows as u64;
        self.n_rows = shape.n_rows;
        let batch = self.backend.upload(batch);
        let (backend, model, cache) = (&self.backend, &mut self.model, &mut self.cache);
        backend.record_or_replay(&batch, shape.max_context, &mut |max_context| {
            model.forward(backend, &batch, StepShape { max_context, ..shape }, cache);
            if samples {
                backend.sample(model.logits(), &batch);
            }
        });
    }

    /// Notes that the oldest step has ended.
    fn note_end(&mut self) {
        if let Some(mtp) = &mut self.mtp {
            mtp.hidden.clear();
            // A step behind this one has other hidden states in the same place.
            if self.n_under_way <= 1 {
                mtp.keep(&self.backend, &*self.model, self.n_rows);
            }
        }
        self.n_under_way = self.n_under_way.saturating_sub(1);
        self.n_steps += 1;
        let now = Instant::now();
        self.status.busy += now - self.busy_since;
        self.busy_since = now;
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
        let (start, n_logits) = (logits.len(), batch.logits_rows.len());
        self.enqueue(batch);
        logits.resize(start + n_logits * self.vocab_size, 0.0);
        self.backend.download(self.model.logits(), &mut logits[start..]);
        self.sync()?;
        self.note_end();
        Ok(())
    }

    fn ranks(&mut self) -> Result<Vec<RankStatus>, EngineError> {
        let mut spent = self.spent();
        spent.usage = self.usage.as_ref().map_or_else(Default::default, |read| read());
        Ok(vec![RankStatus { spent, ..self.status.clone() }])
    }

    fn spent(&self) -> Spent {
        Spent {
            n_steps: self.n_steps,
            n_rows: self.status.rows,
            working: self.status.busy,
            operations: self.times.as_ref().map_or_else(Default::default, |times| times.read()),
            ..Spent::default()
        }
    }

    fn set_timings(&mut self, on: bool) {
        self.times.iter().for_each(|times| times.set_on(on));
    }

    fn warning(&self) -> Option<String> {
        self.backend.warning()
    }

    fn device_sampler(&mut self) -> Option<&mut dyn DeviceSampler> {
        if self.backend.samples() { Some(self) } else { None }
    }

    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        if self.mtp.is_some() { Some(self) } else { None }
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn save_page(&mut self, page: u32) -> Option<Vec<u8>> {
        self.cache.save_page(&self.backend, page)
    }

    fn load_page(&mut self, page: u32, bytes: &[u8]) -> bool {
        self.cache.load_page(&self.backend, page, bytes)
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

impl<B: Backend> DeviceSampler for ModelRunner<B> {
    fn submit(&mut self, batch: Batch) -> Result<(), EngineError> {
        self.enqueue(batch);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Result<u32, SampleError>>, EngineError> {
        let mut words = vec![];
        self.backend.collect(&mut words).map_err(|e| EngineError::Device(Box::new(e)))?;
        self.note_end();
        Ok(words.into_iter().map(|word| sampled(word, self.vocab_size)).collect())
    }
}

impl<B: Backend> Drafter for ModelRunner<B> {
    fn hidden_size(&self) -> usize {
        self.model.hidden_size()
    }

    fn hidden(&self) -> &[f32] {
        self.mtp.as_ref().map_or(&[], |mtp| &mtp.hidden)
    }

    fn draft(&mut self, batch: Batch, hidden: &[f32]) -> Result<Drafted, EngineError> {
        let Some(mtp) = &mut self.mtp else { return Ok(Drafted::default()) };
        let drafted = mtp.draft(&self.backend, &mut *self.model, batch, hidden);
        self.sync()?;
        Ok(drafted)
    }
}
