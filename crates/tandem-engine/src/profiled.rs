//! A backend that times every operation of another.
//!
//! While it is on, every operation is waited for, and nothing is recorded or replayed. Labels follow from the order in which a
//! forward pass calls operations, not from the weights, so that matrices pass through as they are and a profiled model
//! is the very model that the unprofiled figures come from.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use tandem_core::Backend;
use tandem_core::backend::{
    Batch, CacheKind, Heads, IndexKeyJob, LatentJob, Mlp, NormJob, Rope, Rotation, Routing, composed,
};
use tandem_core::weights::MatrixData;

/// What time is spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Query, key-value, latent and output projections; the indexer's too, which run in the same calls.
    AttentionProjections,
    /// Caching, rotating, scoring and selecting index keys.
    Indexer,
    /// Rotation, caching and attention proper, sparse or not.
    SparseAttention,
    /// Router gate and choice.
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
}

/// What one or more profiled steps did.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    calls: Vec<(Operation, Duration)>,
    /// Between the gathering of logits rows and the next embedding.
    in_head: bool,
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

    fn relabel_last(&mut self, operation: Operation) {
        if let Some(last) = self.calls.last_mut() {
            last.0 = operation;
        }
    }
}

/// Counts the different values in the first rows of indices.
type CountDistinct<B> = fn(&B, &<B as Backend>::Indices, usize) -> usize;

/// `B` with a stopwatch, which is off at first.
pub struct Profiled<B: Backend> {
    inner: B,
    count_distinct: CountDistinct<B>,
    on: Cell<bool>,
    profile: RefCell<Profile>,
    /// The first error while waiting, until `sync` returns it.
    error: RefCell<Option<B::Error>>,
}

impl<B: Backend> Profiled<B> {
    /// Wraps a backend; `count_distinct` counts the experts that a step touches.
    pub fn new(inner: B, count_distinct: CountDistinct<B>) -> Profiled<B> {
        Profiled { inner, count_distinct, on: Cell::new(false), profile: RefCell::default(), error: RefCell::default() }
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
            return call(&self.inner);
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

    fn step(&self, batch: &B::Batch, max_context: usize, operations: &mut dyn FnMut(usize)) {
        if self.on.get() { operations(max_context) } else { self.inner.step(batch, max_context, operations) }
    }

    fn chooses(&self) -> bool {
        self.inner.chooses()
    }

    fn choose(&self, logits: &B::Buffer, batch: &B::Batch) {
        self.timed(Operation::Other, |b| b.choose(logits, batch));
    }

    fn collect(&self, tokens: &mut Vec<u32>) -> Result<(), B::Error> {
        self.inner.collect(tokens)
    }

    fn embed(&self, table: &B::Matrix, batch: &B::Batch, out: &mut B::Buffer) {
        self.note(|p| p.in_head = false);
        self.timed(Operation::Other, |b| b.embed(table, batch, out));
    }

    fn gather_logits_rows(&self, x: &B::Buffer, batch: &B::Batch, out: &mut B::Buffer) {
        self.note(|p| p.in_head = true);
        self.timed(Operation::Other, |b| b.gather_logits_rows(x, batch, out));
    }

    fn rms_norm(&self, x: &B::Buffer, weight: &B::Buffer, eps: f32, n_rows: usize, out: &mut B::Buffer) {
        self.timed(Operation::Norms, |b| b.rms_norm(x, weight, eps, n_rows, out));
    }

    fn add_rms_norm(
        &self,
        x: &mut B::Buffer,
        y: &B::Buffer,
        weight: &B::Buffer,
        eps: f32,
        n_rows: usize,
        out: &mut B::Buffer,
    ) {
        self.timed(Operation::Norms, |b| b.add_rms_norm(x, y, weight, eps, n_rows, out));
    }

    fn linear(&self, x: &B::Buffer, n_rows: usize, outputs: &mut [(&B::Matrix, &mut B::Buffer)]) {
        let in_head = self.profile.borrow().in_head;
        let operation = if in_head { Operation::LmHead } else { Operation::AttentionProjections };
        self.timed(operation, |b| b.linear(x, n_rows, outputs));
    }

    fn head_linear(&self, x: &B::Buffer, from: Heads, w: &B::Matrix, n_rows: usize, out: &mut B::Buffer, to: Heads) {
        self.timed(Operation::AttentionProjections, |b| b.head_linear(x, from, w, n_rows, out, to));
    }

    fn rope(&self, x: &B::Buffer, from: Heads, rope: &Rope, batch: &B::Batch, out: &mut B::Buffer, to: Heads) {
        self.timed(Operation::SparseAttention, |b| b.rope(x, from, rope, batch, out, to));
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

    fn router_topk(
        &self,
        logits: &B::Buffer,
        bias: &B::Buffer,
        routing: &Routing,
        n_rows: usize,
        ids: &mut B::Indices,
        weights: &mut B::Buffer,
    ) {
        // The product before it was the gate.
        self.note(|p| p.relabel_last(Operation::Router));
        self.timed(Operation::Router, |b| b.router_topk(logits, bias, routing, n_rows, ids, weights));
    }

    fn moe(
        &self,
        x: &B::Buffer,
        experts: &Mlp<B::Matrix>,
        shared: Option<&Mlp<B::Matrix>>,
        ids: &B::Indices,
        weights: &B::Buffer,
        n_rows: usize,
        out: &mut B::Buffer,
    ) {
        self.timed(Operation::Experts, |b| b.moe(x, experts, shared, ids, weights, n_rows, out));
        self.note(|p| {
            p.experts_touched += (self.count_distinct)(&self.inner, ids, n_rows) as u64;
            p.moe_calls += 1;
        });
    }

    fn write_latent(
        &self,
        kv_a: &B::Buffer,
        norm: &B::Buffer,
        eps: f32,
        rope: &Rope,
        batch: &B::Batch,
        cache: &mut B::Cache,
    ) {
        self.timed(Operation::SparseAttention, |b| b.write_latent(kv_a, norm, eps, rope, batch, cache));
    }

    fn write_index_key(
        &self,
        k: &B::Buffer,
        norm: &B::Buffer,
        norm_bias: &B::Buffer,
        eps: f32,
        rope: &Rope,
        batch: &B::Batch,
        cache: &mut B::Cache,
    ) {
        self.timed(Operation::Indexer, |b| b.write_index_key(k, norm, norm_bias, eps, rope, batch, cache));
    }

    fn write_cache(&self, x: &B::Buffer, batch: &B::Batch, cache: &mut B::Cache) {
        self.timed(Operation::SparseAttention, |b| b.write_cache(x, batch, cache));
    }

    fn index_select(
        &self,
        q: &B::Buffer,
        weights: &B::Buffer,
        n_heads: usize,
        batch: &B::Batch,
        cache: &B::Cache,
        selected: &mut B::Indices,
    ) {
        // The rotation before it was of the index queries.
        self.note(|p| p.relabel_last(Operation::Indexer));
        self.timed(Operation::Indexer, |b| b.index_select(q, weights, n_heads, batch, cache, selected));
    }

    fn mla_attention(
        &self,
        q: &B::Buffer,
        n_heads: usize,
        latent: usize,
        scale: f32,
        batch: &B::Batch,
        cache: &B::Cache,
        selected: Option<&B::Indices>,
        out: &mut B::Buffer,
    ) {
        self.timed(Operation::SparseAttention, |b| {
            b.mla_attention(q, n_heads, latent, scale, batch, cache, selected, out);
        });
    }

    fn gqa_attention(
        &self,
        q: &B::Buffer,
        n_heads: usize,
        n_kv_heads: usize,
        scale: f32,
        batch: &B::Batch,
        keys: &B::Cache,
        values: &B::Cache,
        out: &mut B::Buffer,
    ) {
        self.timed(Operation::SparseAttention, |b| {
            b.gqa_attention(q, n_heads, n_kv_heads, scale, batch, keys, values, out);
        });
    }

    // While it is on, fused blocks are run as the primitives that they stand for.

    fn prepare_attention(
        &self,
        query: Option<NormJob<'_, B::Buffer>>,
        latent: LatentJob<'_, B::Buffer, B::Cache>,
        key: Option<IndexKeyJob<'_, B::Buffer, B::Cache>>,
        eps: f32,
        batch: &B::Batch,
        n_rows: usize,
    ) {
        if self.on.get() {
            return composed::prepare_attention(self, query, latent, key, eps, batch, n_rows);
        }
        self.inner.prepare_attention(query, latent, key, eps, batch, n_rows);
    }

    fn rope_index_select(
        &self,
        q: Rotation<'_, B::Buffer>,
        rotated: &mut B::Buffer,
        weights: &B::Buffer,
        batch: &B::Batch,
        cache: &B::Cache,
        selected: &mut B::Indices,
    ) {
        if self.on.get() {
            return composed::rope_index_select(self, q, rotated, weights, batch, cache, selected);
        }
        self.inner.rope_index_select(q, rotated, weights, batch, cache, selected);
    }

    fn rope_mla_attention(
        &self,
        rope: Rotation<'_, B::Buffer>,
        q: &mut B::Buffer,
        latent: usize,
        scale: f32,
        batch: &B::Batch,
        cache: &B::Cache,
        selected: Option<&B::Indices>,
        out: &mut B::Buffer,
    ) {
        if self.on.get() {
            return composed::rope_mla_attention(self, rope, q, latent, scale, batch, cache, selected, out);
        }
        self.inner.rope_mla_attention(rope, q, latent, scale, batch, cache, selected, out);
    }

    fn route(
        &self,
        x: &B::Buffer,
        gate: &B::Matrix,
        bias: &B::Buffer,
        routing: &Routing,
        n_rows: usize,
        logits: &mut B::Buffer,
        ids: &mut B::Indices,
        weights: &mut B::Buffer,
    ) {
        if self.on.get() {
            return composed::route(self, x, gate, bias, routing, n_rows, logits, ids, weights);
        }
        self.inner.route(x, gate, bias, routing, n_rows, logits, ids, weights);
    }
}
