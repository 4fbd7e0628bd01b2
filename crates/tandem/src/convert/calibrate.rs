//! What the inputs of every matrix look like while a model reads a text.
//!
//! [`Capture`] is a backend that runs the model on the CPU backend and looks at what goes into each matrix on the way.
//! MLPs and experts are run projection by projection, because what goes into the last one shows nowhere else.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use tandem_core::ModelConfig;
use tandem_core::backend::{Backend, Batch, CacheKind, Heads, Mlp, Rope, Routing};
use tandem_core::quant::Compensation;
use tandem_core::weights::{Form, MatrixData, WeightSpec};
use tandem_cpu::{CpuBackend, CpuBuffer, CpuIndices};
use tandem_engine::{BlockManager, Engine, Logits, ModelRunner, Sequence};
use tandem_model::{Limits, WeightSource};

use crate::compare::Windows;

/// Tokens of the text that are used, at most.
pub(super) const MAX_TOKENS: usize = 16_384;
/// Bytes of all covariances together, at most; models that need more get second moments only.
const MAX_COVARIANCE_BYTES: usize = 2 << 30;
/// Share of the mean moment that is added to a covariance's diagonal.
const DAMPING: f64 = 0.02;
const CHUNK: usize = 128;

/// The inputs of every matrix, by module and matrix of the stack.
pub(super) struct Calibration {
    inputs: HashMap<(String, usize), Known>,
    /// Modules that share an input, by the first of them.
    shared: HashMap<String, String>,
}

/// What a conversion may use about one matrix.
pub(super) enum Known {
    Moments(Vec<f32>),
    Covariance(Compensation),
}

impl Calibration {
    /// What is known about matrix `part` of `module`.
    pub(super) fn get(&self, module: &str, part: usize) -> Option<&Known> {
        let first = self.shared.get(module).map_or(module, String::as_str);
        self.inputs.get(&(first.to_string(), part))
    }

    /// Runs the model of `source` over the text.
    pub(super) fn measure(
        config: &ModelConfig,
        source: &dyn WeightSource,
        windows: &Windows,
        backend: CpuBackend,
    ) -> anyhow::Result<Calibration> {
        let squares = |spec: &WeightSpec| {
            let (stack, _, cols) = spec.dims();
            stack * cols * cols * 4
        };
        let specs = tandem_model::weight_specs(config);
        let bytes: usize = specs.iter().filter(|s| s.form != Form::Vector).map(squares).sum();
        let seen = RefCell::new(Seen { full: bytes <= MAX_COVARIANCE_BYTES, ..Seen::default() });
        let capture = Capture { inner: backend, seen: Rc::new(seen) };
        let seen = capture.seen.clone();
        let limits = Limits { max_rows: CHUNK, max_logits_rows: CHUNK };
        let model = tandem_model::load_from(&capture, config, source, limits, &mut |_| {})?;
        let blocks = BlockManager::for_tokens(windows.longest());
        let runner = ModelRunner::new(capture, model, limits, config.vocab_size, blocks.n_slots());
        let mut engine = Engine::new(Box::new(runner), blocks, windows.longest(), config.max_position_embeddings);
        let mut left = MAX_TOKENS;
        for tokens in &windows.0 {
            let tokens = &tokens[..(tokens.len() - 1).min(left)];
            if tokens.is_empty() {
                break;
            }
            let mut sequence = Sequence::default();
            engine.run(&mut sequence, tokens, CHUNK, Logits::All)?;
            engine.release(&mut sequence);
            left -= tokens.len();
        }
        drop(engine);
        let Seen { sums, shared, .. } = seen.take();
        let inputs = sums.into_iter().map(|(key, sum)| (key, sum.into_known())).collect();
        Ok(Calibration { inputs, shared })
    }
}

#[derive(Default)]
struct Seen {
    sums: HashMap<(String, usize), Sum>,
    shared: HashMap<String, String>,
    /// Covariances, not only moments.
    full: bool,
}

/// Sums over the inputs of one matrix.
struct Sum {
    cols: usize,
    n: usize,
    /// `[cols]`, or the upper half of `[cols, cols]`.
    products: Vec<f32>,
}

impl Sum {
    fn into_known(self) -> Known {
        let Sum { cols, n, products } = self;
        if products.len() == cols * cols && cols > 1 {
            // Few inputs say little about directions that they did not take.
            let damping = DAMPING + 0.1 * (cols as f64 / n.max(1) as f64).min(10.0);
            if let Some(compensation) = Compensation::new(cols, &products, damping) {
                return Known::Covariance(compensation);
            }
            return Known::Moments((0..cols).map(|i| products[i * cols + i]).collect());
        }
        Known::Moments(products)
    }
}

impl Seen {
    fn add(&mut self, module: &str, part: usize, cols: usize, rows: &[&[f32]]) {
        if rows.is_empty() {
            return;
        }
        let size = if self.full { cols * cols } else { cols };
        let sum = self.sums.entry((module.to_string(), part)).or_insert_with(|| Sum {
            cols,
            n: 0,
            products: vec![0.0; size],
        });
        sum.n += rows.len();
        if !self.full {
            for row in rows {
                sum.products.iter_mut().zip(*row).for_each(|(sum, x)| *sum += x * x);
            }
            return;
        }
        for (i, products) in sum.products.chunks_exact_mut(cols).enumerate() {
            let products = &mut products[i..];
            for row in rows {
                let x = row[i];
                products.iter_mut().zip(&row[i..]).for_each(|(sum, y)| *sum += x * y);
            }
        }
    }
}

type Matrix = <CpuBackend as Backend>::Matrix;

/// A matrix that knows its name.
struct Named {
    name: String,
    cols: usize,
    /// The matrix or stack; a stack of experts in single matrices.
    parts: Vec<Matrix>,
}

struct Capture {
    inner: CpuBackend,
    seen: Rc<RefCell<Seen>>,
}

impl Capture {
    /// Notes the input of matrices that are multiplied with the same rows.
    fn note(&self, matrices: &[&Named], part: usize, rows: &[&[f32]]) {
        let Some(first) = matrices.first() else { return };
        let mut seen = self.seen.borrow_mut();
        for other in &matrices[1..] {
            seen.shared.insert(other.name.clone(), first.name.clone());
        }
        seen.add(&first.name, part, first.cols, rows);
    }

    /// `down(silu(gate(x)) * up(x))` with matrix `part` of each stack, noting both inputs: `[rows, hidden]`.
    fn run_mlp(&self, rows: &[&[f32]], mlp: &Mlp<Named>, part: usize) -> CpuBuffer {
        self.note(&[&mlp.gate, &mlp.up], part, rows);
        let n = rows.len();
        let width = mlp.down.cols;
        let x = CpuBuffer::new(rows.concat(), mlp.gate.cols);
        let (mut gate, mut up) = (self.inner.alloc(n, width), self.inner.alloc(n, width));
        self.inner.linear(&x, n, &mut [(&mlp.gate.parts[part], &mut gate), (&mlp.up.parts[part], &mut up)]);
        let inner: Vec<f32> = (0..n)
            .flat_map(|i| {
                gate.row(i).iter().zip(up.row(i)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>()
            })
            .collect();
        let inner_rows: Vec<&[f32]> = inner.chunks_exact(width).collect();
        self.note(&[&mlp.down], part, &inner_rows);
        let mut out = self.inner.alloc(n, mlp.gate.cols);
        self.inner.linear(&CpuBuffer::new(inner.clone(), width), n, &mut [(&mlp.down.parts[part], &mut out)]);
        out
    }
}

fn rows_of(x: &CpuBuffer, n_rows: usize, cols: usize) -> Vec<&[f32]> {
    (0..n_rows).map(|i| &x.row(i)[..cols]).collect()
}

impl Backend for Capture {
    type Buffer = CpuBuffer;
    type Indices = CpuIndices;
    type Matrix = Named;
    type Batch = <CpuBackend as Backend>::Batch;
    type Cache = <CpuBackend as Backend>::Cache;
    type Error = <CpuBackend as Backend>::Error;

    fn alloc(&self, rows: usize, width: usize) -> CpuBuffer {
        self.inner.alloc(rows, width)
    }

    fn alloc_indices(&self, rows: usize, width: usize) -> CpuIndices {
        self.inner.alloc_indices(rows, width)
    }

    fn write_rows(&self, rows: &[f32], buffer: &mut CpuBuffer) {
        self.inner.write_rows(rows, buffer);
    }

    fn alloc_cache(&self, kind: CacheKind, n_slots: usize, width: usize) -> Self::Cache {
        self.inner.alloc_cache(kind, n_slots, width)
    }

    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize {
        self.inner.cache_bytes(kind, width)
    }

    fn load_matrix(&self, data: MatrixData) -> Named {
        let (name, cols) = (data.name.clone(), data.cols);
        let parts = if name.contains("switch_mlp") {
            let single = |part| MatrixData { parts: vec![part], name: name.clone(), ..data };
            data.parts.iter().cloned().map(|part| self.inner.load_matrix(single(part))).collect()
        } else {
            vec![self.inner.load_matrix(data)]
        };
        Named { name, cols, parts }
    }

    fn load_vector(&self, values: &[f32]) -> CpuBuffer {
        self.inner.load_vector(values)
    }

    fn upload(&self, batch: Batch) -> Self::Batch {
        self.inner.upload(batch)
    }

    fn download(&self, buffer: &CpuBuffer, out: &mut [f32]) {
        self.inner.download(buffer, out);
    }

    fn sync(&self) -> Result<(), Self::Error> {
        self.inner.sync()
    }

    fn embed(&self, table: &Named, batch: &Self::Batch, out: &mut CpuBuffer) {
        self.inner.embed(&table.parts[0], batch, out);
    }

    fn gather_logits_rows(&self, x: &CpuBuffer, batch: &Self::Batch, out: &mut CpuBuffer) {
        self.inner.gather_logits_rows(x, batch, out);
    }

    fn rms_norm(&self, x: &CpuBuffer, weight: &CpuBuffer, eps: f32, n_rows: usize, out: &mut CpuBuffer) {
        self.inner.rms_norm(x, weight, eps, n_rows, out);
    }

    fn linear(&self, x: &CpuBuffer, n_rows: usize, outputs: &mut [(&Named, &mut CpuBuffer)]) {
        let matrices: Vec<&Named> = outputs.iter().map(|(matrix, _)| *matrix).collect();
        if let Some(first) = matrices.first() {
            self.note(&matrices, 0, &rows_of(x, n_rows, first.cols));
        }
        let mut inner: Vec<(&Matrix, &mut CpuBuffer)> =
            outputs.iter_mut().map(|(matrix, out)| (&matrix.parts[0], &mut **out)).collect();
        self.inner.linear(x, n_rows, &mut inner);
    }

    fn head_linear(&self, x: &CpuBuffer, from: Heads, w: &Named, n_rows: usize, out: &mut CpuBuffer, to: Heads) {
        for head in 0..from.n {
            let start = from.offset + head * from.stride;
            let rows: Vec<&[f32]> = (0..n_rows).map(|i| &x.row(i)[start..start + w.cols]).collect();
            self.note(&[w], head, &rows);
        }
        self.inner.head_linear(x, from, &w.parts[0], n_rows, out, to);
    }

    fn rope(&self, x: &CpuBuffer, from: Heads, rope: &Rope, batch: &Self::Batch, out: &mut CpuBuffer, to: Heads) {
        self.inner.rope(x, from, rope, batch, out, to);
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer, n_rows: usize) {
        self.inner.add(x, y, n_rows);
    }

    fn add_bias(&self, x: &mut CpuBuffer, bias: &CpuBuffer, n_rows: usize) {
        self.inner.add_bias(x, bias, n_rows);
    }

    fn mlp(&self, x: &CpuBuffer, mlp: &Mlp<Named>, n_rows: usize, out: &mut CpuBuffer) {
        let result = self.run_mlp(&rows_of(x, n_rows, mlp.gate.cols), mlp, 0);
        *out = padded(result, n_rows, mlp.gate.cols);
    }

    fn router_topk(
        &self,
        logits: &CpuBuffer,
        bias: &CpuBuffer,
        routing: &Routing,
        n_rows: usize,
        ids: &mut CpuIndices,
        weights: &mut CpuBuffer,
    ) {
        self.inner.router_topk(logits, bias, routing, n_rows, ids, weights);
    }

    fn moe(
        &self,
        x: &CpuBuffer,
        experts: &Mlp<Named>,
        shared: Option<&Mlp<Named>>,
        ids: &CpuIndices,
        weights: &CpuBuffer,
        n_rows: usize,
        out: &mut CpuBuffer,
    ) {
        let hidden = experts.gate.cols;
        let mut sum = vec![0.0; CHUNK.max(n_rows) * hidden];
        if let Some(shared) = shared {
            let result = self.run_mlp(&rows_of(x, n_rows, hidden), shared, 0);
            (0..n_rows).for_each(|i| sum[i * hidden..(i + 1) * hidden].copy_from_slice(result.row(i)));
        }
        for expert in 0..experts.gate.parts.len() {
            let mine: Vec<(usize, f32)> = (0..n_rows)
                .flat_map(|i| ids.row(i).iter().zip(weights.row(i)).map(move |(id, weight)| (i, *id, *weight)))
                .filter(|(_, id, _)| *id == expert as i32)
                .map(|(i, _, weight)| (i, weight))
                .collect();
            if mine.is_empty() {
                continue;
            }
            let rows: Vec<&[f32]> = mine.iter().map(|(i, _)| &x.row(*i)[..hidden]).collect();
            let result = self.run_mlp(&rows, experts, expert);
            for (k, (i, weight)) in mine.iter().enumerate() {
                let sum = &mut sum[i * hidden..(i + 1) * hidden];
                sum.iter_mut().zip(result.row(k)).for_each(|(sum, y)| *sum += weight * y);
            }
        }
        *out = CpuBuffer::new(sum, hidden);
    }

    fn write_latent(
        &self,
        kv_a: &CpuBuffer,
        norm: &CpuBuffer,
        eps: f32,
        rope: &Rope,
        batch: &Self::Batch,
        cache: &mut Self::Cache,
    ) {
        self.inner.write_latent(kv_a, norm, eps, rope, batch, cache);
    }

    fn write_index_key(
        &self,
        k: &CpuBuffer,
        norm: &CpuBuffer,
        norm_bias: &CpuBuffer,
        eps: f32,
        rope: &Rope,
        batch: &Self::Batch,
        cache: &mut Self::Cache,
    ) {
        self.inner.write_index_key(k, norm, norm_bias, eps, rope, batch, cache);
    }

    fn write_cache(&self, x: &CpuBuffer, batch: &Self::Batch, cache: &mut Self::Cache) {
        self.inner.write_cache(x, batch, cache);
    }

    fn index_select(
        &self,
        q: &CpuBuffer,
        weights: &CpuBuffer,
        n_heads: usize,
        batch: &Self::Batch,
        cache: &Self::Cache,
        selected: &mut CpuIndices,
    ) {
        self.inner.index_select(q, weights, n_heads, batch, cache, selected);
    }

    fn mla_attention(
        &self,
        q: &CpuBuffer,
        n_heads: usize,
        latent: usize,
        scale: f32,
        batch: &Self::Batch,
        cache: &Self::Cache,
        selected: Option<&CpuIndices>,
        out: &mut CpuBuffer,
    ) {
        self.inner.mla_attention(q, n_heads, latent, scale, batch, cache, selected, out);
    }

    fn gqa_attention(
        &self,
        q: &CpuBuffer,
        n_heads: usize,
        n_kv_heads: usize,
        scale: f32,
        batch: &Self::Batch,
        keys: &Self::Cache,
        values: &Self::Cache,
        out: &mut CpuBuffer,
    ) {
        self.inner.gqa_attention(q, n_heads, n_kv_heads, scale, batch, keys, values, out);
    }
}

/// The buffer with room for a whole batch, as the model allocated it.
fn padded(rows: CpuBuffer, n_rows: usize, width: usize) -> CpuBuffer {
    let mut data: Vec<f32> = (0..n_rows).flat_map(|i| rows.row(i).iter().copied()).collect();
    data.resize(CHUNK.max(n_rows) * width, 0.0);
    CpuBuffer::new(data, width)
}
