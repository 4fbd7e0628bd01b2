//! What the inputs of every matrix look like while a model reads a text.
//!
//! [`Capture`] is a backend that runs the model on the CPU backend and looks at what goes into each matrix on the way.
//! MLPs and experts are run projection by projection, because what goes into the last one shows nowhere else.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tandem_core::ModelConfig;
use tandem_core::backend::{
    Backend, Batch, CacheKind, GqaAttention, HeadLinear, IndexSelect, Linear, MlaAttention, Mlp, Moe, RmsNorm, Rotate,
    RouterTopk, WriteIndexKey, WriteLatent,
};
use tandem_core::quant::Covariance;
use tandem_core::weights::{Axis, Form, MatrixData, ModuleKind, Split, WeightSpec};
use tandem_cpu::{CpuBackend, CpuBuffer, CpuIndices, Pool};
use tandem_engine::{BlockManager, Engine, Logits, ModelRunner, Sequence};
use tandem_model::{Limits, WeightSource};

use tandem_runtime::{Meter, OnNews, Unit};

use super::text::step_rows;

/// Bytes of all covariances together, at most.
const MAX_COVARIANCE_BYTES: usize = 2 << 30;
/// Columns of the largest block of a covariance: factoring one takes the third power.
const MAX_BLOCK: usize = 2048;
/// Share of the mean moment that is added to a covariance's diagonal.
const DAMPING: f64 = 0.02;

/// The inputs of every matrix.
pub(super) struct Calibration {
    inputs: HashMap<Key, Covariance>,
    /// Modules that share an input, by the first of them.
    shared: HashMap<String, String>,
}

/// Module, and the matrix of its stack if they have inputs of their own.
type Key = (String, Option<usize>);

impl Calibration {
    /// What is known about the inputs of matrix `part` of `module`.
    pub(super) fn get(&self, module: &str, part: usize) -> Option<&Covariance> {
        let first = self.shared.get(module).map_or(module, String::as_str);
        let of = |part| self.inputs.get(&(first.to_string(), part));
        of(None).or_else(|| of(Some(part)))
    }

    /// Runs the model of `source` over runs of tokens.
    pub(super) fn measure(
        config: &ModelConfig,
        source: &dyn WeightSource,
        runs: &[Vec<u32>],
        backend: CpuBackend,
        on_news: OnNews<'_>,
    ) -> anyhow::Result<Calibration> {
        let n_threads = backend.n_threads();
        let n_tokens: usize = runs.iter().map(Vec::len).sum();
        let meter = Meter::new("calibrating", Unit::Tokens, n_tokens as u64, on_news);
        let rows = step_rows(config);
        let specs = tandem_model::weight_specs(config);
        let blocks = Blocks::new(&specs, MAX_COVARIANCE_BYTES);
        let matrices = specs.iter().filter(|spec| spec.form != Form::Vector);
        let widths = matrices.map(|spec| (spec.module.clone(), blocks.of(spec))).collect();
        let experts = specs.iter().filter(|spec| spec.form == Form::Experts).map(|spec| spec.module.clone()).collect();
        let seen = Rc::new(RefCell::new(Seen { widths, ..Seen::default() }));
        let capture = Capture { inner: backend, rows, experts, seen };
        let seen = capture.seen.clone();
        let limits = Limits { max_rows: rows, max_logits_rows: rows };
        let model = tandem_model::load_from(&capture, config, source, limits, &mut |_| {})?;
        let longest = runs.iter().map(Vec::len).max().unwrap_or(1);
        let manager = BlockManager::for_tokens(longest);
        let runner = ModelRunner::new(capture, model, limits, config.vocab_size, manager.n_slots());
        let mut engine = Engine::new(Box::new(runner), manager, longest, config.max_position_embeddings);
        for tokens in runs {
            let mut sequence = Sequence::default();
            for tokens in tokens.chunks(rows) {
                engine.run(&mut sequence, tokens, rows, Logits::All)?;
                meter.add(tokens.len() as u64);
            }
            engine.release(&mut sequence);
        }
        meter.finish();
        drop(engine);
        let Seen { sums, shared, .. } = seen.take();
        Ok(Calibration { inputs: factor(sums, n_threads), shared })
    }
}

/// How wide the blocks of covariances are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Blocks {
    /// Covariances of the last projections of experts, one for each.
    experts: usize,
    others: usize,
}

impl Blocks {
    /// As wide as `max_bytes` allows; those of experts are the most and give way first.
    fn new(specs: &[WeightSpec], max_bytes: usize) -> Blocks {
        let mut blocks = Blocks { experts: MAX_BLOCK, others: MAX_BLOCK };
        let bytes = |spec: &WeightSpec, blocks: Blocks| {
            let (stack, _, cols) = spec.dims();
            // What goes into the other projections goes into those of all experts.
            let stack = if spec.form == Form::Experts && !is_expert_down(spec) { 1 } else { stack };
            stack * cols * blocks.of(spec) * 4
        };
        let too_large = |blocks: Blocks| {
            let matrices = specs.iter().filter(|spec| spec.form != Form::Vector);
            matrices.map(|spec| bytes(spec, blocks)).sum::<usize>() > max_bytes
        };
        while blocks.experts > 1 && too_large(blocks) {
            blocks.experts /= 2;
        }
        while blocks.others > 1 && too_large(blocks) {
            blocks.others /= 2;
        }
        blocks
    }

    fn of(self, spec: &WeightSpec) -> usize {
        let widest = if is_expert_down(spec) { self.experts } else { self.others };
        widest.min(spec.dims().2)
    }
}

/// The last projections of experts: their input is as wide as the MLP inside.
fn is_expert_down(spec: &WeightSpec) -> bool {
    spec.form == Form::Experts && spec.split == Split::Width(Axis::Cols)
}

#[derive(Default)]
struct Seen {
    sums: HashMap<Key, Sum>,
    shared: HashMap<String, String>,
    /// Block width by module.
    widths: HashMap<String, usize>,
}

/// Sums over the inputs of one matrix.
struct Sum {
    cols: usize,
    block: usize,
    n: usize,
    /// `[cols, block]`, as [`Covariance::new`] takes them.
    products: Vec<f32>,
}

impl Sum {
    fn factor(&self) -> Option<Covariance> {
        // Few inputs say little about directions that they did not take.
        let damping = DAMPING + 0.1 * (self.block as f64 / self.n.max(1) as f64).min(10.0);
        Covariance::new(self.cols, self.block, &self.products, damping)
    }
}

/// Factors every sum, one after the other on each thread.
fn factor(sums: HashMap<Key, Sum>, n_threads: usize) -> HashMap<Key, Covariance> {
    let sums: Vec<Mutex<Option<(Key, Sum)>>> = sums.into_iter().map(|sum| Mutex::new(Some(sum))).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = vec![];
        while let Some(sum) = sums.get(next.fetch_add(1, Ordering::Relaxed)) {
            let taken = sum.lock().ok().and_then(|mut sum| sum.take());
            done.extend(taken.and_then(|(key, sum)| Some((key, sum.factor()?))));
        }
        done
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("factoring does not panic")).collect()
    })
}

impl Seen {
    fn add(&mut self, module: &str, part: Option<usize>, cols: usize, rows: &[&[f32]], pool: &Pool) {
        if rows.is_empty() {
            return;
        }
        let block = self.widths.get(module).copied().unwrap_or(1);
        let sum = self.sums.entry((module.to_string(), part)).or_insert_with(|| Sum {
            cols,
            block,
            n: 0,
            products: vec![0.0; cols * block],
        });
        sum.n += rows.len();
        let left = Mutex::new(sum.products.chunks_exact_mut(block).enumerate());
        pool.run(|| {
            while let Some((i, products)) = left.lock().ok().and_then(|mut left| left.next()) {
                let products = &mut products[i % block..];
                for row in rows {
                    let x = row[i];
                    products.iter_mut().zip(&row[i..]).for_each(|(sum, y)| *sum += x * y);
                }
            }
        });
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
    /// Rows of the largest step.
    rows: usize,
    /// Modules that are stacks of experts.
    experts: HashSet<String>,
    seen: Rc<RefCell<Seen>>,
}

impl Capture {
    /// Notes the input of matrices that are multiplied with the same rows: of one of a stack, or all the same.
    fn note(&self, matrices: &[&Named], part: Option<usize>, rows: &[&[f32]]) {
        let Some(first) = matrices.first() else { return };
        let mut seen = self.seen.borrow_mut();
        for other in &matrices[1..] {
            seen.shared.insert(other.name.clone(), first.name.clone());
        }
        seen.add(&first.name, part, first.cols, rows, self.inner.pool());
    }

    fn product<'a>(&self, x: &'a CpuBuffer, n_rows: usize, outputs: &'a mut [(&'a Matrix, &'a mut CpuBuffer)]) {
        self.inner.linear(Linear { x, n_rows, outputs, label: ModuleKind::DenseMlp });
    }

    /// Adds `down(silu(gate(x)) * up(x))`, with matrix `part` of each stack, to `sum`, `[.., hidden]`, for some rows of `x`
    /// and times their weights. Notes what goes into `down`.
    fn run_mlp(&self, x: &CpuBuffer, rows: &[(usize, f32)], mlp: &Mlp<Named>, part: usize, sum: &mut [f32]) {
        let (n, hidden, width) = (rows.len(), mlp.gate.cols, mlp.down.cols);
        let x: Vec<f32> = rows.iter().flat_map(|(i, _)| &x.row(*i)[..hidden]).copied().collect();
        let (mut gate, mut up) = (self.inner.alloc(n, width), self.inner.alloc(n, width));
        let x = CpuBuffer::new(x, hidden);
        self.product(&x, n, &mut [(&mlp.gate.parts[part], &mut gate), (&mlp.up.parts[part], &mut up)]);
        let inner: Vec<f32> =
            (0..n).flat_map(|i| gate.row(i).iter().zip(up.row(i)).map(|(g, u)| g / (1.0 + (-g).exp()) * u)).collect();
        self.note(&[&mlp.down], Some(part), &inner.chunks_exact(width).collect::<Vec<_>>());
        let mut out = self.inner.alloc(n, hidden);
        self.product(&CpuBuffer::new(inner, width), n, &mut [(&mlp.down.parts[part], &mut out)]);
        for (k, (i, weight)) in rows.iter().enumerate() {
            sum[i * hidden..][..hidden].iter_mut().zip(out.row(k)).for_each(|(sum, y)| *sum += weight * y);
        }
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
        let parts = if self.experts.contains(&name) {
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

    fn rms_norm(&self, op: RmsNorm<'_, CpuBuffer>) {
        self.inner.rms_norm(op);
    }

    fn linear(&self, op: Linear<'_, CpuBuffer, Named>) {
        let Linear { x, n_rows, outputs, label } = op;
        let matrices: Vec<&Named> = outputs.iter().map(|(matrix, _)| *matrix).collect();
        if let Some(first) = matrices.first() {
            self.note(&matrices, None, &rows_of(x, n_rows, first.cols));
        }
        let mut inner: Vec<(&Matrix, &mut CpuBuffer)> =
            outputs.iter_mut().map(|(matrix, out)| (&matrix.parts[0], &mut **out)).collect();
        self.inner.linear(Linear { x, n_rows, outputs: &mut inner, label });
    }

    fn head_linear(&self, op: HeadLinear<'_, CpuBuffer, Named>) {
        let HeadLinear { x, from, w, n_rows, out, to } = op;
        for head in 0..from.n {
            let start = from.offset + head * from.stride;
            let rows: Vec<&[f32]> = (0..n_rows).map(|i| &x.row(i)[start..start + w.cols]).collect();
            self.note(&[w], Some(head), &rows);
        }
        self.inner.head_linear(HeadLinear { x, from, w: &w.parts[0], n_rows, out, to });
    }

    fn rope(&self, op: Rotate<'_, CpuBuffer, Self::Batch>) {
        self.inner.rope(op);
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer, n_rows: usize) {
        self.inner.add(x, y, n_rows);
    }

    fn add_bias(&self, x: &mut CpuBuffer, bias: &CpuBuffer, n_rows: usize) {
        self.inner.add_bias(x, bias, n_rows);
    }

    fn mlp(&self, x: &CpuBuffer, mlp: &Mlp<Named>, n_rows: usize, out: &mut CpuBuffer) {
        self.note(&[&mlp.gate, &mlp.up], None, &rows_of(x, n_rows, mlp.gate.cols));
        let mut sum = vec![0.0; self.rows * mlp.gate.cols];
        let all: Vec<(usize, f32)> = (0..n_rows).map(|i| (i, 1.0)).collect();
        self.run_mlp(x, &all, mlp, 0, &mut sum);
        *out = CpuBuffer::new(sum, mlp.gate.cols);
    }

    fn router_topk(&self, op: RouterTopk<'_, CpuBuffer, CpuIndices>) {
        self.inner.router_topk(op);
    }

    fn moe(&self, op: Moe<'_, CpuBuffer, CpuIndices, Named>) {
        let Moe { x, experts, shared, ids, weights, n_rows, out } = op;
        let hidden = experts.gate.cols;
        let mut sum = vec![0.0; self.rows * hidden];
        // One covariance for all experts of the layer: each alone sees few inputs.
        let mut first = vec![&experts.gate, &experts.up];
        if let Some(shared) = shared {
            first.extend([&shared.gate, &shared.up]);
            let all: Vec<(usize, f32)> = (0..n_rows).map(|i| (i, 1.0)).collect();
            self.run_mlp(x, &all, shared, 0, &mut sum);
        }
        self.note(&first, None, &rows_of(x, n_rows, hidden));
        for expert in 0..experts.gate.parts.len() {
            let mine: Vec<(usize, f32)> = (0..n_rows)
                .flat_map(|i| ids.row(i).iter().zip(weights.row(i)).map(move |(id, weight)| (i, *id, *weight)))
                .filter(|(_, id, _)| *id == expert as i32)
                .map(|(i, _, weight)| (i, weight))
                .collect();
            if !mine.is_empty() {
                self.run_mlp(x, &mine, experts, expert, &mut sum);
            }
        }
        *out = CpuBuffer::new(sum, hidden);
    }

    fn write_latent(&self, op: WriteLatent<'_, CpuBuffer, Self::Batch, Self::Cache>) {
        self.inner.write_latent(op);
    }

    fn write_index_key(&self, op: WriteIndexKey<'_, CpuBuffer, Self::Batch, Self::Cache>) {
        self.inner.write_index_key(op);
    }

    fn write_cache(&self, x: &CpuBuffer, batch: &Self::Batch, cache: &mut Self::Cache) {
        self.inner.write_cache(x, batch, cache);
    }

    fn index_select(&self, op: IndexSelect<'_, CpuBuffer, CpuIndices, Self::Batch, Self::Cache>) {
        self.inner.index_select(op);
    }

    fn mla_attention(&self, op: MlaAttention<'_, CpuBuffer, CpuIndices, Self::Batch, Self::Cache>) {
        self.inner.mla_attention(op);
    }

    fn gqa_attention(&self, op: GqaAttention<'_, CpuBuffer, Self::Batch, Self::Cache>) {
        self.inner.gqa_attention(op);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covariances_have_a_bounded_size() {
        let specs = |name: &str| {
            let (_, text) = tandem_runtime::presets::config_text(name).expect("a preset");
            tandem_model::weight_specs(&ModelConfig::parse(&text).expect("valid"))
        };
        let whole = Blocks { experts: MAX_BLOCK, others: MAX_BLOCK };
        assert_eq!(Blocks::new(&specs("glm-5.1"), MAX_COVARIANCE_BYTES), Blocks { experts: 1, others: 32 });
        assert_eq!(Blocks::new(&specs("glm-5.1"), usize::MAX), whole);
        assert_eq!(Blocks::new(&specs("glm-5.1"), 0), Blocks { experts: 1, others: 1 });
        let narrow = specs("glm-5.1").into_iter().find(|spec| spec.module.ends_with("kv_a_layernorm")).expect("there");
        assert_eq!(whole.of(&narrow), 512, "as wide as the input, at most");
    }
}
