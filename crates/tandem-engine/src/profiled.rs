//! A backend that times every operation of another.
//!
//! It may always note how long calls take ([`Profiled::with_times`]), which says where time goes on a device that does an
//! operation when it is called. While the stopwatch is on, every operation is waited for, and nothing is recorded or replayed. Labels come with the operations, not
//! with the weights, so that matrices pass through as they are and a profiled model is the very model that the unprofiled
//! figures come from.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_core::Backend;
use tandem_core::backend::{
    AddRmsNorm, Batch, CacheKind, GqaAttention, HeadLinear, IndexSelect, Linear, MlaAttention, Mlp, Moe,
    PrepareAttention, RmsNorm, RopeIndexSelect, RopeMlaAttention, Rotate, Route, RouterTopk, WriteIndexKey,
    WriteLatent, composed,
};
use tandem_core::weights::{MatrixData, ModuleKind};

use crate::timings::OperationTimes;

/// What time is spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Query, key-value, latent and output projections; the indexer's too, which run in the same calls.
    AttentionProjections,
    /// Caching, rotating, scoring and selecting index keys.
    Indexer,
    /// Rotation, caching and attention proper, sparse or not.
    SparseAttention,
    /// Router gate and the pick of experts.
    Router,
    /// Routed and shared experts, which run fused.
    Experts,
    /// MLPs of dense layers.
    DenseMlp,
    /// Norms.
    Norms,
    /// Output projection.
    LmHead,
    /// Embedding, residual additions, transfers.
    Other,
}

impl Operation {
    /// Every operation, in the order reports use.
    pub const ALL: [Operation; 9] = [
        Operation::AttentionProjections,
        Operation::Indexer,
        Operation::SparseAttention,
        Operation::Router,
        Operation::Experts,
        Operation::DenseMlp,
        Operation::Norms,
        Operation::LmHead,
        Operation::Other,
    ];

    /// Name in reports and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::AttentionProjections => "attention_projections",
            Operation::Indexer => "indexer",
            Operation::SparseAttention => "sparse_attention",
            Operation::Router => "router",
            Operation::Experts => "experts",
            Operation::DenseMlp => "dense_mlp",
            Operation::Norms => "norms",
            Operation::LmHead => "lm_head",
            Operation::Other => "other",
        }
    }

    /// Whose time a product of matrices is.
    const fn of_product(label: ModuleKind) -> Operation {
        match label {
            ModuleKind::Attention | ModuleKind::Indexer => Operation::AttentionProjections,
            ModuleKind::Router => Operation::Router,
            ModuleKind::RoutedExperts | ModuleKind::SharedExpert => Operation::Experts,
            ModuleKind::DenseMlp => Operation::DenseMlp,
            ModuleKind::LmHead => Operation::LmHead,
            ModuleKind::Norms => Operation::Norms,
            ModuleKind::Embed | ModuleKind::Mtp => Operation::Other,
        }
    }

    /// Whose time a rotation is.
    const fn of_rotation(label: ModuleKind) -> Operation {
        match label {
            ModuleKind::Indexer => Operation::Indexer,
            _ => Operation::SparseAttention,
        }
    }
}

/// What one or more profiled steps did.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    calls: Vec<(Operation, Duration)>,
    experts_touched: u64,
    moe_calls: u64,
}

impl Profile {
    /// Time spent on `operation`.
    pub fn time(&self, operation: Operation) -> Duration {
        self.calls.iter().filter(|(o, _)| *o == operation).map(|(_, time)| *time).sum()
    }

    /// Time spent on all operations.
    pub fn total(&self) -> Duration {
        self.calls.iter().map(|(_, time)| *time).sum()
    }

    /// Different routed experts of all runs of MoE layers, and the number of these runs.
    pub fn experts(&self) -> (u64, u64) {
        (self.experts_touched, self.moe_calls)
    }
}

/// Counts the different values in the first rows of indices.
type CountDistinct<B> = fn(&B, &<B as Backend>::Indices, usize) -> usize;

/// `B` with a stopwatch, which is off at first.
pub struct Profiled<B: Backend> {
    inner: B,
    count_distinct: CountDistinct<B>,
    on: Cell<bool>,
    times: Option<Arc<OperationTimes>>,
    profile: RefCell<Profile>,
    /// The first error while waiting, until `sync` returns it.
    error: RefCell<Option<B::Error>>,
}

impl<B: Backend> Profiled<B> {
    /// Wraps a backend; `count_distinct` counts the experts that a step touches.
    pub fn new(inner: B, count_distinct: CountDistinct<B>) -> Profiled<B> {
        Profiled {
            inner,
            count_distinct,
            on: Cell::new(false),
            times: None,
            profile: RefCell::default(),
            error: RefCell::default(),
        }
    }

    /// The same, which always notes how long calls take: for a device that does an operation when it is called, and whose
    /// fused blocks are their primitives.
    #[must_use]
    pub fn with_times(self) -> Profiled<B> {
        Profiled { times: Some(Arc::default()), ..self }
    }

    /// How long calls took, where that is noted.
    pub fn operation_times(&self) -> Option<Arc<OperationTimes>> {
        self.times.clone()
    }

    /// The backend inside.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// Starts an empty profile.
    pub fn start(&self) {
        self.profile.take();
        self.on.set(true);
    }

    /// Stops and returns the profile.
    pub fn stop(&self) -> Profile {
        self.on.set(false);
        self.profile.take()
    }

    fn timed<R>(&self, operation: Operation, call: impl FnOnce(&B) -> R) -> R {
        if !self.on.get() {
            let Some(times) = self.times.as_ref().filter(|times| times.is_on()) else { return call(&self.inner) };
            let start = Instant::now();
            let result = call(&self.inner);
            times.add(operation, start.elapsed());
            return result;
        }
        let start = Instant::now();
        let result = call(&self.inner);
        if let Err(error) = self.inner.sync() {
            self.error.borrow_mut().get_or_insert(error);
        }
        let time = start.elapsed();
        self.profile.borrow_mut().calls.push((operation, time));
        result
    }

    /// Fused blocks are run as the primitives that they stand for.
    fn takes_apart(&self) -> bool {
        self.on.get() || self.times.is_some()
    }

    fn note(&self, change: impl FnOnce(&mut Profile)) {
        if self.on.get() {
            change(&mut self.profile.borrow_mut());
        }
    }
}

impl<B: Backend> Backend for Profiled<B> {
    type Buffer = B::Buffer;
    type Indices = B::Indices;
    type Matrix = B::Matrix;
    type Batch = B::Batch;
    type Cache = B::Cache;
    type Error = B::Error;

    fn alloc(&self, rows: usize, width: usize) -> B::Buffer {
        self.inner.alloc(rows, width)
    }

    fn alloc_indices(&self, rows: usize, width: usize) -> B::Indices {
        self.inner.alloc_indices(rows, width)
    }

    fn alloc_cache(&self, kind: CacheKind, n_slots: usize, width: usize) -> B::Cache {
        self.inner.alloc_cache(kind, n_slots, width)
    }

    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize {
        self.inner.cache_bytes(kind, width)
    }

    fn load_matrix(&self, data: MatrixData) -> B::Matrix {
        self.inner.load_matrix(data)
    }

    fn load_vector(&self, values: &[f32]) -> B::Buffer {
        self.inner.load_vector(values)
    }

    fn upload(&self, batch: Batch) -> B::Batch {
        self.timed(Operation::Other, |b| b.upload(batch))
    }

    fn download(&self, buffer: &B::Buffer, out: &mut [f32]) {
        self.timed(Operation::Other, |b| b.download(buffer, out));
    }

    fn save_page(&self, cache: &B::Cache, page: u32, out: &mut Vec<u8>) -> bool {
        self.inner.save_page(cache, page, out)
    }

    fn load_page(&self, cache: &mut B::Cache, page: u32, bytes: &mut &[u8]) -> bool {
        self.inner.load_page(cache, page, bytes)
    }

    fn write_rows(&self, rows: &[f32], buffer: &mut B::Buffer) {
        self.timed(Operation::Other, |b| b.write_rows(rows, buffer));
    }

    fn sync(&self) -> Result<(), B::Error> {
        let result = self.timed(Operation::Other, B::sync);
        self.error.borrow_mut().take().map_or(result, Err)
    }

    fn warning(&self) -> Option<String> {
        self.inner.warning()
    }

    fn record_or_replay(&self, batch: &B::Batch, max_context: usize, operations: &mut dyn FnMut(usize)) {
        if self.on.get() {
            operations(max_context)
        } else {
            self.inner.record_or_replay(batch, max_context, operations)
        }
    }

    fn samples(&self) -> bool {
        self.inner.samples()
    }

    fn sample(&self, logits: &B::Buffer, batch: &B::Batch) {
        self.timed(Operation::Other, |b| b.sample(logits, batch));
    }

    fn collect(&self, tokens: &mut Vec<u32>) -> Result<(), B::Error> {
        self.inner.collect(tokens)
    }

    fn embed(&self, table: &B::Matrix, batch: &B::Batch, out: &mut B::Buffer) {
        self.timed(Operation::Other, |b| b.embed(table, batch, out));
    }

    fn gather_logits_rows(&self, x: &B::Buffer, batch: &B::Batch, out: &mut B::Buffer) {
        self.timed(Operation::Other, |b| b.gather_logits_rows(x, batch, out));
    }

    fn rms_norm(&self, op: RmsNorm<'_, B::Buffer>) {
        self.timed(Operation::Norms, |b| b.rms_norm(op));
    }

    fn add_rms_norm(&self, op: AddRmsNorm<'_, B::Buffer>) {
        self.timed(Operation::Norms, |b| b.add_rms_norm(op));
    }

    fn linear(&self, op: Linear<'_, B::Buffer, B::Matrix>) {
        self.timed(Operation::of_product(op.label), |b| b.linear(op));
    }

    fn head_linear(&self, op: HeadLinear<'_, B::Buffer, B::Matrix>) {
        self.timed(Operation::AttentionProjections, |b| b.head_linear(op));
    }

    fn rope(&self, op: Rotate<'_, B::Buffer, B::Batch>) {
        self.timed(Operation::of_rotation(op.label), |b| b.rope(op));
    }

    fn add(&self, x: &mut B::Buffer, y: &B::Buffer, n_rows: usize) {
        self.timed(Operation::Other, |b| b.add(x, y, n_rows));
    }

    fn add_bias(&self, x: &mut B::Buffer, bias: &B::Buffer, n_rows: usize) {
        self.timed(Operation::AttentionProjections, |b| b.add_bias(x, bias, n_rows));
    }

    fn mlp(&self, x: &B::Buffer, mlp: &Mlp<B::Matrix>, n_rows: usize, out: &mut B::Buffer) {
        self.timed(Operation::DenseMlp, |b| b.mlp(x, mlp, n_rows, out));
    }

    fn router_topk(&self, op: RouterTopk<'_, B::Buffer, B::Indices>) {
        self.timed(Operation::Router, |b| b.router_topk(op));
    }

    fn moe(&self, op: Moe<'_, B::Buffer, B::Indices, B::Matrix>) {
        let (ids, n_rows) = (op.ids, op.n_rows);
        self.timed(Operation::Experts, |b| b.moe(op));
        self.note(|p| {
            p.experts_touched += (self.count_distinct)(&self.inner, ids, n_rows) as u64;
            p.moe_calls += 1;
        });
    }

    fn write_latent(&self, op: WriteLatent<'_, B::Buffer, B::Batch, B::Cache>) {
        self.timed(Operation::SparseAttention, |b| b.write_latent(op));
    }

    fn write_index_key(&self, op: WriteIndexKey<'_, B::Buffer, B::Batch, B::Cache>) {
        self.timed(Operation::Indexer, |b| b.write_index_key(op));
    }

    fn write_cache(&self, x: &B::Buffer, batch: &B::Batch, cache: &mut B::Cache) {
        self.timed(Operation::SparseAttention, |b| b.write_cache(x, batch, cache));
    }

    fn index_select(&self, op: IndexSelect<'_, B::Buffer, B::Indices, B::Batch, B::Cache>) {
        self.timed(Operation::Indexer, |b| b.index_select(op));
    }

    fn mla_attention(&self, op: MlaAttention<'_, B::Buffer, B::Indices, B::Batch, B::Cache>) {
        self.timed(Operation::SparseAttention, |b| b.mla_attention(op));
    }

    fn gqa_attention(&self, op: GqaAttention<'_, B::Buffer, B::Batch, B::Cache>) {
        self.timed(Operation::SparseAttention, |b| b.gqa_attention(op));
    }

    fn prepare_attention(&self, op: PrepareAttention<'_, B::Buffer, B::Batch, B::Cache>) {
        if self.takes_apart() { composed::prepare_attention(self, op) } else { self.inner.prepare_attention(op) }
    }

    fn rope_index_select(&self, op: RopeIndexSelect<'_, B::Buffer, B::Indices, B::Batch, B::Cache>) {
        if self.takes_apart() { composed::rope_index_select(self, op) } else { self.inner.rope_index_select(op) }
    }

    fn rope_mla_attention(&self, op: RopeMlaAttention<'_, B::Buffer, B::Indices, B::Batch, B::Cache>) {
        if self.takes_apart() { composed::rope_mla_attention(self, op) } else { self.inner.rope_mla_attention(op) }
    }

    fn route(&self, op: Route<'_, B::Buffer, B::Indices, B::Matrix>) {
        if self.takes_apart() { composed::route(self, op) } else { self.inner.route(op) }
    }
}
