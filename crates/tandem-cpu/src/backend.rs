//! [`Backend`] on the CPU: splits each operation over the pool and calls the kernels.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use tandem_core::backend::{
    Batch, CacheKind, GqaAttention, HeadLinear, IndexSelect, Linear, MlaAttention, Mlp, Moe, RmsNorm, Rotate,
    RouterTopk, WriteIndexKey, WriteLatent,
};
use tandem_core::weights::MatrixData;
use tandem_core::{Backend, CheckpointError, DType, EXACT_ROWS, Numerics};

use crate::cache::{CpuCache, Rows};
use crate::isa::Isa;
use crate::kernels::activations::{Activations, Kernel};
use crate::kernels::attention::{HEAD_BLOCK, attend};
#[cfg(target_arch = "x86_64")]
use crate::kernels::attention_amx;
use crate::kernels::index_select::{Int8Query, scores, scores_int8, select};
use crate::kernels::matrix::matrix_rows;
use crate::kernels::norm::{layer_norm, rms_norm};
use crate::kernels::rope::{angles, rotate};
use crate::kernels::router_topk::router_topk;
use crate::kernels::silu_mul::silu_mul;
#[cfg(target_arch = "x86_64")]
use crate::kernels::tile_rows::amx;
use crate::kernels::vector::Element;
use crate::matrix::{CpuMatrix, Mapped};
use crate::pool::Pool;
use crate::scratch::{with_activations, with_scratch};
use crate::shared_mut::SharedMut;
use crate::tiles::Tiles;

/// Packed bytes of one task of a matrix product, at most: long runs stream better (64 KB: 42 to 55 ms for two GLM-5.1
/// layers, 256 KB: 34 to 39 ms in the same run), and short ones balance better.
const TASK_BYTES: std::ops::RangeInclusive<usize> = 16 << 10..=512 << 10;
/// Tasks per thread, if their size allows.
const TASKS_PER_THREAD: usize = 4;
/// The same where many rows go through AMX: each task reads all activations, which are more than the caches of one core hold.
const LARGE_TASKS_PER_THREAD: usize = 2;
/// Tokens whose products take AMX as long as the weights take to unpack.
const AMX_TOKENS: usize = 32;
/// Rows of activations that the caller prepares by itself.
const SERIAL_ROWS: usize = 64;
/// Rows of a tile: tasks begin at multiples of it.
const TILE_ROWS: usize = 32;
/// Positions that one task of the indexer scores.
const SCORE_SPAN: usize = 512;
/// Floats of index scores kept at once; longer prefills are scored in blocks of rows.
const SCORE_FLOATS: usize = 4 << 20;

/// What only shows while weights are used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CpuError {
    /// A matrix is damaged.
    #[error(transparent)]
    Weights(Arc<CheckpointError>),
}

/// `[rows, width] f32`
#[derive(Debug, Default)]
pub struct CpuBuffer {
    data: Vec<f32>,
    width: usize,
}

/// `[rows, width] i32`
#[derive(Debug)]
pub struct CpuIndices {
    data: Vec<i32>,
    width: usize,
}

impl CpuBuffer {
    /// A buffer of these values.
    pub fn new(data: Vec<f32>, width: usize) -> CpuBuffer {
        CpuBuffer { data, width }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.width..(i + 1) * self.width]
    }

    fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.width..(i + 1) * self.width]
    }
}

impl CpuIndices {
    /// Indices of these values.
    pub fn new(data: Vec<i32>, width: usize) -> CpuIndices {
        CpuIndices { data, width }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[i32] {
        &self.data[i * self.width..(i + 1) * self.width]
    }

    /// Copies the first rows, as many as `out` holds.
    pub fn read(&self, out: &mut [i32]) {
        out.copy_from_slice(&self.data[..out.len()]);
    }
}

/// The CPU as a backend.
pub struct CpuBackend {
    isa: Isa,
    numerics: Numerics,
    /// Whether matrices are repacked where that makes them faster.
    repack: bool,
    pool: Arc<Pool>,
    work: Mutex<Work>,
    /// The first error; it stays, and every [`Backend::sync`] tells it.
    failed: Mutex<Option<CpuError>>,
    /// Formats that [`CpuBackend::say_if_slow`] has spoken of.
    slow: Mutex<HashSet<DType>>,
}

/// Memory that operations reuse.
#[derive(Default)]
struct Work {
    /// Activations of an MLP's intermediate layer.
    intermediate: Vec<f32>,
    /// Index scores.
    scores: Vec<f32>,
    /// Input of a matrix product, and of the down projections that follow it.
    input: Activations,
    routed: Activations,
    shared: Activations,
}

impl CpuBackend {
    /// A backend with `n_threads` threads, the given numerics and the best kernels of this processor.
    pub fn new(n_threads: usize, numerics: Numerics) -> CpuBackend {
        CpuBackend::with_isa(n_threads, numerics, Isa::detect())
    }

    /// A backend with given kernels; `Isa::Scalar` is the oracle.
    pub fn with_isa(n_threads: usize, numerics: Numerics, isa: Isa) -> CpuBackend {
        CpuBackend {
            isa,
            numerics,
            repack: true,
            pool: Arc::new(Pool::new(n_threads)),
            work: Mutex::default(),
            failed: Mutex::default(),
            slow: Mutex::default(),
        }
    }

    /// The same backend, leaving weights where they are mapped if `repack` is false: half the speed, but no memory of
    /// its own for models that do not fit.
    pub fn with_repacking(mut self, repack: bool) -> CpuBackend {
        self.repack = repack;
        self
    }

    /// The numerics that this processor computes fast and well, see [`CpuBackend::default_numerics_for`].
    pub fn default_numerics() -> Numerics {
        CpuBackend::default_numerics_for(Isa::detect())
    }

    /// The numerics that `isa` computes fast and well: with 16-bit activations where it multiplies these fast enough for
    /// its memory, with 8-bit ones on Arm, where only bytes have such products, else in f32.
    pub fn default_numerics_for(isa: Isa) -> Numerics {
        match isa {
            Isa::Avx2 | Isa::Avx512 | Isa::Amx => Numerics::Bf16,
            Isa::Neon if isa.has_int8_dot() => Numerics::Int8,
            Isa::Neon | Isa::Scalar => Numerics::F32,
        }
    }

    /// Numerics in use.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// The worker threads, for others to use between operations.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Kernels in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// Formats of loaded matrices whose rows are decoded at every use, having no kernel here.
    pub fn slow_formats(&self) -> Vec<String> {
        let slow = self.slow.lock().unwrap_or_else(|e| e.into_inner());
        slow.iter().map(DType::to_string).collect()
    }

    /// Says once for each format that a matrix has no kernel that reads it as it is.
    fn say_if_slow(&self, name: &str, matrix: &CpuMatrix) {
        let dtype = matrix.dtype();
        // Plain f32 is read as it is, and the scalar kernels are there to be slow.
        let is_slow = self.isa != Isa::Scalar
            && dtype != DType::F32
            && Kernel::choose(matrix, self.numerics, self.isa, 1) == Kernel::Generic;
        if is_slow && self.slow.lock().unwrap_or_else(|e| e.into_inner()).insert(dtype) {
            tracing::warn!(
                "{name} ({dtype}, {} columns) is not repacked and has no kernel of its own on {}: each row of such \
                 matrices is decoded at every use, which is slow",
                matrix.cols(),
                self.isa
            );
        }
    }

    /// Keeps the first error for [`Backend::sync`].
    fn note(&self, result: Result<(), CheckpointError>) {
        if let Err(error) = result {
            let mut failed = self.failed.lock().unwrap_or_else(|e| e.into_inner());
            failed.get_or_insert(CpuError::Weights(Arc::new(error)));
        }
    }

    fn work(&self) -> std::sync::MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One matrix of a stack applied to some tokens of a step.
struct Product<'a> {
    /// Rows of the step.
    n_rows: usize,
    matrix: &'a CpuMatrix,
    part: usize,
    /// Rows of the activations.
    tokens: &'a [u32],
}

/// A range of rows of matrix `item` of a list.
struct Task {
    item: usize,
    first_row: usize,
    n_rows: usize,
}

/// A matrix to be cut into tasks.
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    row_bytes: usize,
    tokens: usize,
}

/// Cuts matrices into tasks of about the same time, `n_tasks` or some more, where unpacking and multiplying take time and the
/// bytes do not; the longest come first.
fn large_tasks(matrices: impl Iterator<Item = Size> + Clone, n_tasks: usize) -> Vec<Task> {
    let cost = |size: &Size| size.row_bytes * (AMX_TOKENS + size.tokens);
    let total: usize = matrices.clone().map(|size| size.rows * cost(&size)).sum();
    let mut tasks = vec![];
    for (item, size) in matrices.enumerate() {
        let n_pieces = (size.rows * cost(&size) * n_tasks).div_ceil(total.max(1)).max(1);
        let step = size.rows.div_ceil(n_pieces).next_multiple_of(TILE_ROWS);
        for first_row in (0..size.rows).step_by(step) {
            let n_rows = step.min(size.rows - first_row);
            tasks.push((n_rows * cost(&size), Task { item, first_row, n_rows }));
        }
    }
    tasks.sort_by_key(|(cost, _)| std::cmp::Reverse(*cost));
    tasks.into_iter().map(|(_, task)| task).collect()
}

/// Rows of a task for `total` bytes shared by `n_threads`, at `row_bytes` a row: whole tiles.
fn task_rows(total: usize, row_bytes: usize, n_threads: usize) -> usize {
    let bytes = (total / (TASKS_PER_THREAD * n_threads)).clamp(*TASK_BYTES.start(), *TASK_BYTES.end());
    (bytes / row_bytes.max(1)).max(1).next_multiple_of(TILE_ROWS)
}

/// Cuts matrices into tasks.
fn tasks(matrices: impl Iterator<Item = Size> + Clone, n_threads: usize) -> Vec<Task> {
    let total = matrices.clone().map(|size| size.rows * size.row_bytes).sum();
    let mut tasks = vec![];
    for (item, Size { rows, row_bytes, .. }) in matrices.enumerate() {
        let step = task_rows(total, row_bytes, n_threads);
        for first_row in (0..rows).step_by(step) {
            tasks.push(Task { item, first_row, n_rows: step.min(rows - first_row) });
        }
    }
    tasks
}

impl CpuBackend {
    /// Takes rows of `width` elements in the forms that `matrices` need in a step of `step_rows`; many rows over the pool.
    fn prepare<'a>(
        &self,
        to: &mut Activations,
        (n_rows, step_rows): (usize, usize),
        row: impl Fn(usize) -> &'a [f32] + Sync,
        width: usize,
        matrices: impl Iterator<Item = &'a CpuMatrix>,
    ) {
        let kernels = matrices.map(|m| (Kernel::choose(m, self.numerics, self.isa, step_rows), m.dtype()));
        let pool = (n_rows > SERIAL_ROWS).then_some(&*self.pool);
        to.prepare(pool, self.isa, n_rows, row, width, kernels);
    }

    /// `out [n_tokens, n_rows]`: rows of a matrix for each token.
    fn matrix_rows(&self, p: &Product<'_>, x: &Activations, first_row: usize, n_rows: usize, out: &mut [f32]) {
        self.note(p.matrix.check(p.part, first_row, n_rows));
        let kernel = Kernel::choose(p.matrix, self.numerics, self.isa, p.n_rows);
        matrix_rows(self.isa, kernel, p.matrix, p.part, first_row, n_rows, x, p.tokens, out);
    }

    /// `out = sum over experts of weight * expert(x)`, each expert with the rows and weights that chose it, in the order
    /// given per row, so that a row's result does not depend on the rest of the batch.
    fn experts(&self, x: &CpuBuffer, experts: &[Expert<'_>], n_rows: usize, out: &mut CpuBuffer) {
        let Some(first) = experts.first() else { return };
        let mut starts = Vec::with_capacity(experts.len());
        let mut total = 0;
        for e in experts {
            starts.push(total);
            total += e.tokens.len() * e.mlp.gate.rows();
        }
        let mut work = self.work();
        let Work { intermediate, input, routed, shared, .. } = &mut *work;
        intermediate.resize(total, 0.0);

        let matrices = experts.iter().flat_map(|e| [&e.mlp.gate, &e.mlp.up]);
        self.prepare(input, (n_rows, n_rows), |r| x.row(r), x.width, matrices);
        // A task owns a range of rows of both gate and up.
        let sizes = experts.iter().map(|e| Size {
            rows: e.mlp.gate.rows(),
            row_bytes: e.mlp.gate.bytes_of(1) + e.mlp.up.bytes_of(1),
            tokens: e.tokens.len(),
        });
        let gate_tasks = if self.is_large(n_rows) {
            large_tasks(sizes, 2 * TASKS_PER_THREAD * self.n_threads())
        } else {
            tasks(sizes, self.n_threads())
        };
        {
            let target = SharedMut::new(intermediate);
            self.pool.chunks(gate_tasks.len(), 1, |range| {
                for Task { item, first_row, n_rows: n } in &gate_tasks[range] {
                    let e = &experts[*item];
                    let product = |matrix| Product { n_rows, matrix, part: e.part, tokens: &e.tokens };
                    with_scratch(2 * n * e.tokens.len(), |values| {
                        let (gate, up) = values.split_at_mut(n * e.tokens.len());
                        self.matrix_rows(&product(&e.mlp.gate), input, *first_row, *n, gate);
                        self.matrix_rows(&product(&e.mlp.up), input, *first_row, *n, up);
                        silu_mul(self.isa, gate, up);
                        for (t, values) in gate.chunks_exact(*n).enumerate() {
                            let start = starts[*item] + t * e.mlp.gate.rows() + first_row;
                            // SAFETY: each (expert, range of rows, token) is stored once.
                            #[allow(unsafe_code)]
                            unsafe { target.slice(start, *n) }.copy_from_slice(values);
                        }
                    });
                }
            });
        }
        // Routed experts come first and have one width; the shared one, last, may have another.
        let n_routed = experts.iter().take_while(|e| e.mlp.down.cols() == first.mlp.down.cols()).count();
        let split = starts.get(n_routed).copied().unwrap_or(total);
        for (to, experts, range) in
            [(&mut *routed, &experts[..n_routed], 0..split), (&mut *shared, &experts[n_routed..], split..total)]
        {
            if let Some(e) = experts.first() {
                let width = e.mlp.down.cols();
                let inputs = &intermediate[range];
                let row = |r: usize| &inputs[r * width..(r + 1) * width];
                self.prepare(to, (inputs.len() / width, n_rows), row, width, experts.iter().map(|e| &e.mlp.down));
            }
        }
        // Down projections: a task owns a range of output columns for every expert, so that sums need no lock.
        let hidden = first.mlp.down.rows();
        let row_bytes: usize = experts.iter().map(|e| e.mlp.down.bytes_of(1)).sum();
        let step = if self.is_large(n_rows) {
            hidden.div_ceil(LARGE_TASKS_PER_THREAD * self.n_threads()).next_multiple_of(TILE_ROWS)
        } else {
            task_rows(row_bytes * hidden, row_bytes, self.n_threads())
        };
        let width = out.width;
        let target = SharedMut::new(&mut out.data);
        self.pool.chunks(hidden.div_ceil(step), 1, |range| {
            for chunk in range {
                let (first_row, n) = (chunk * step, step.min(hidden - chunk * step));
                with_scratch(n_rows * n, |sums| {
                    sums.fill(0.0);
                    for (i, (e, start)) in experts.iter().zip(&starts).enumerate() {
                        let (own, base) = if i < n_routed { (&*routed, 0) } else { (&*shared, split) };
                        let first_input = (start - base) / e.mlp.down.cols();
                        let n_tokens = e.tokens.len();
                        let inputs: Vec<u32> = (first_input..first_input + n_tokens).map(|t| t as u32).collect();
                        let product = Product { n_rows, matrix: &e.mlp.down, part: e.part, tokens: &inputs };
                        with_scratch(n * n_tokens, |values| {
                            self.matrix_rows(&product, own, first_row, n, values);
                            for ((t, values), weight) in e.tokens.iter().zip(values.chunks_exact(n)).zip(&e.weights) {
                                let sums = &mut sums[*t as usize * n..][..n];
                                for (sum, value) in sums.iter_mut().zip(values) {
                                    *sum += weight * value;
                                }
                            }
                        });
                    }
                    for (row, sums) in sums.chunks_exact(n).enumerate() {
                        // SAFETY: this task alone writes these columns.
                        #[allow(unsafe_code)]
                        unsafe { target.slice(row * width + first_row, n) }.copy_from_slice(sums);
                    }
                });
            }
        });
    }

    /// Calls `task(row, first head, n heads)` for every row and block of heads.
    fn head_blocks(&self, n_rows: usize, n_heads: usize, block: usize, task: impl Fn(usize, usize, usize) + Sync) {
        let n_blocks = n_heads.div_ceil(block);
        self.pool.chunks(n_rows * n_blocks, 1, |range| {
            for i in range {
                let first = i % n_blocks * block;
                task(i / n_blocks, first, block.min(n_heads - first));
            }
        });
    }

    fn mla<E: Element>(&self, op: MlaAttention<'_, CpuBuffer, CpuIndices, Batch, CpuCache>, cache: &Rows<E>) {
        let MlaAttention { q, n_heads, latent, scale, batch, selected, out, .. } = op;
        let (q_width, out_width) = (q.width / n_heads, out.width / n_heads);
        let width = out.width;
        let target = SharedMut::new(&mut out.data);
        let chosen = |row: usize| {
            let visible = batch.positions[row] as usize + 1;
            selected.map(|s| s.row(row)).filter(|s| visible > s.len())
        };
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut is_done = vec![false; batch.n_rows()];
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx
            && E::IS_BF16
            && let Some(contexts) = Contexts::of(batch, (q_width, latent), |row| chosen(row).is_none())
        {
            contexts.pack(&self.pool, batch, cache, |contexts, lines| {
                self.head_blocks(batch.n_rows(), n_heads, attention_amx::HEADS, |row, first, n| {
                    let Some(context) = contexts.of_row(row) else { return };
                    // SAFETY: one task per (row, block of heads); the processor has AMX.
                    #[allow(unsafe_code)]
                    unsafe {
                        let out = target.slice(row * width + first * out_width, n * out_width);
                        let q = &q.row(row)[first * q_width..(first + n) * q_width];
                        let n_positions = batch.positions[row] as usize + 1;
                        attention_amx::attend(
                            contexts.shape,
                            &lines[context.lines.clone()],
                            n_positions,
                            q,
                            scale,
                            out,
                        );
                    }
                });
                is_done = (0..batch.n_rows()).map(|row| contexts.of_row(row).is_some()).collect();
            });
        }
        // Enough tasks to keep every thread busy when few rows have few heads.
        let block = HEAD_BLOCK.min(n_heads.div_ceil(self.n_threads()));
        self.head_blocks(batch.n_rows(), n_heads, block, |row, first, n| {
            let sequence = batch.sequences[row] as usize;
            if is_done[row] {
                return;
            }
            let chosen = chosen(row);
            let n_positions = chosen.map_or(batch.positions[row] as usize + 1, <[i32]>::len);
            let slot = |i: usize| batch.slot(sequence, chosen.map_or(i, |c| c[i] as usize));
            // SAFETY: one task per (row, block of heads).
            #[allow(unsafe_code)]
            let out = unsafe { target.slice(row * width + first * out_width, n * out_width) };
            let q = &q.row(row)[first * q_width..(first + n) * q_width];
            let key = |i| cache.row(slot(i));
            let value = |i| &cache.row(slot(i))[..latent];
            attend(self.isa, q, n, scale, n_positions, key, value, out);
        });
    }

    fn gqa<E: Element>(&self, op: GqaAttention<'_, CpuBuffer, Batch, CpuCache>, keys: &Rows<E>, values: &Rows<E>) {
        let GqaAttention { q, n_heads, n_kv_heads, scale, batch, out, .. } = op;
        let (group, dim, width) = (n_heads / n_kv_heads, out.width / n_heads, out.width);
        let target = SharedMut::new(&mut out.data);
        self.head_blocks(batch.n_rows(), n_kv_heads, 1, |row, kv_head, _| {
            let sequence = batch.sequences[row] as usize;
            let n_positions = batch.positions[row] as usize + 1;
            let part = kv_head * dim..(kv_head + 1) * dim;
            let key = |i| &keys.row(batch.slot(sequence, i))[part.clone()];
            let value = |i| &values.row(batch.slot(sequence, i))[part.clone()];
            for first in (0..group).step_by(HEAD_BLOCK) {
                let n = HEAD_BLOCK.min(group - first);
                let start = (kv_head * group + first) * dim;
                // SAFETY: one task per (row, key head).
                #[allow(unsafe_code)]
                let out = unsafe { target.slice(row * width + start, n * dim) };
                attend(self.isa, &q.row(row)[start..start + n * dim], n, scale, n_positions, key, value, out);
            }
        });
    }

    /// Chooses positions for every row; `score(row, first position, out)` computes the scores of a span.
    fn select(&self, batch: &Batch, selected: &mut CpuIndices, score: impl Fn(usize, usize, &mut [f32]) + Sync) {
        let context = batch.max_context();
        let block = (SCORE_FLOATS / context.max(1)).clamp(1, batch.n_rows());
        let mut work = self.work();
        work.scores.resize(block * context, 0.0);
        let k = selected.width;
        for first in (0..batch.n_rows()).step_by(block) {
            let n = block.min(batch.n_rows() - first);
            let spans = context.div_ceil(SCORE_SPAN);
            {
                let all = SharedMut::new(&mut work.scores);
                self.pool.chunks(n * spans, 1, |range| {
                    for i in range {
                        let (row, start) = (first + i / spans, i % spans * SCORE_SPAN);
                        let visible = batch.positions[row] as usize + 1;
                        if start >= visible || visible <= k {
                            continue;
                        }
                        let n = (visible - start).min(SCORE_SPAN);
                        // SAFETY: one task per (row, span).
                        #[allow(unsafe_code)]
                        score(row, start, unsafe { all.slice((row - first) * context + start, n) });
                    }
                });
            }
            let target = SharedMut::new(&mut selected.data);
            let all = &work.scores;
            self.pool.chunks(n, 1, |range| {
                let mut scratch = vec![];
                for i in range {
                    let visible = batch.positions[first + i] as usize + 1;
                    // SAFETY: one task per row.
                    #[allow(unsafe_code)]
                    let out = unsafe { target.slice((first + i) * k, k) };
                    select(&all[i * context..i * context + visible], &mut scratch, out);
                }
            });
        }
    }

    /// Writes to the cache what `row(r, to)` makes of each row, `width` values.
    fn cache_rows(&self, width: usize, batch: &Batch, cache: &mut CpuCache, row: impl Fn(usize, &mut [f32]) + Sync) {
        let n_rows = batch.n_rows();
        with_scratch(n_rows * width, |rows| {
            let target = SharedMut::new(rows);
            // SAFETY: one task per row.
            #[allow(unsafe_code)]
            self.rows(n_rows, |r| row(r, unsafe { target.slice(r * width, width) }));
            for (r, values) in rows.chunks_exact(width).enumerate() {
                cache.write(batch.slot(batch.sequences[r] as usize, batch.positions[r] as usize), values);
            }
        });
    }

    /// Whether matrices meet the rows of such a step on AMX.
    fn is_large(&self, n_rows: usize) -> bool {
        self.isa == Isa::Amx && self.numerics == Numerics::Bf16 && n_rows > EXACT_ROWS
    }

    /// Rows in parallel when there are many, else on the caller: a fork costs more than a few rows.
    fn rows(&self, n_rows: usize, task: impl Fn(usize) + Sync) {
        if n_rows < 8 {
            (0..n_rows).for_each(task);
        } else {
            self.pool.chunks(n_rows, n_rows.div_ceil(4 * self.n_threads()), |range| range.for_each(&task));
        }
    }
}

/// What the rows of a large step attend to on AMX.
#[cfg(target_arch = "x86_64")]
struct Contexts {
    shape: attention_amx::Shape,
    contexts: Vec<Context>,
    /// Of each row; none where it attends to positions of its own choice.
    of_row: Vec<Option<usize>>,
}

#[cfg(target_arch = "x86_64")]
struct Context {
    sequence: usize,
    n_positions: usize,
    lines: std::ops::Range<usize>,
}

#[cfg(target_arch = "x86_64")]
impl Contexts {
    /// Rows of a sequence that make it worth while to put its context in order.
    const LEAST_ROWS: usize = 16;

    /// Contexts of the rows that attend to all, where the batch is large enough.
    fn of(batch: &Batch, (key, value): (usize, usize), attends_to_all: impl Fn(usize) -> bool) -> Option<Contexts> {
        let unit = attention_amx::SPAN;
        if batch.n_rows() <= EXACT_ROWS || !key.is_multiple_of(unit) || !value.is_multiple_of(unit) || value > key {
            return None;
        }
        let shape = attention_amx::Shape { key, value };
        let mut contexts: Vec<Context> = vec![];
        let mut of_row: Vec<Option<usize>> = vec![None; batch.n_rows()];
        let mut n_lines = 0;
        for sequence in 0..batch.block_tables.len() {
            let is_own = |row: &usize| batch.sequences[*row] as usize == sequence && attends_to_all(*row);
            let rows: Vec<usize> = (0..batch.n_rows()).filter(is_own).collect();
            let n_positions = rows.iter().map(|row| batch.positions[*row] as usize + 1).max().unwrap_or(0);
            if rows.len() < Contexts::LEAST_ROWS {
                continue;
            }
            let first = n_lines;
            n_lines += attention_amx::n_blocks(n_positions) * shape.block_lines();
            rows.iter().for_each(|row| of_row[*row] = Some(contexts.len()));
            contexts.push(Context { sequence, n_positions, lines: first..n_lines });
        }
        (!contexts.is_empty()).then_some(Contexts { shape, contexts, of_row })
    }

    fn of_row(&self, row: usize) -> Option<&Context> {
        self.of_row[row].map(|i| &self.contexts[i])
    }

    /// Calls `body` with the contexts in order.
    #[allow(unsafe_code)]
    fn pack<E: Element>(
        &self,
        pool: &Pool,
        batch: &Batch,
        cache: &Rows<E>,
        body: impl FnOnce(&Contexts, &[amx::Line]),
    ) {
        assert!(E::IS_BF16);
        let n_lines = self.contexts.last().map_or(0, |c| c.lines.end);
        let block_lines = self.shape.block_lines();
        amx::with_lines(n_lines, |lines| {
            let target = SharedMut::new(lines);
            pool.chunks(n_lines / block_lines, 1, |blocks| {
                for block in blocks {
                    let at = block * block_lines;
                    let Some(context) = self.contexts.iter().find(|c| c.lines.contains(&at)) else { continue };
                    let first = (at - context.lines.start) / block_lines * attention_amx::SPAN;
                    let last = context.n_positions.min(first + attention_amx::SPAN);
                    let vectors: Vec<&[u16]> = (first..last)
                        .map(|position| {
                            let row = cache.row(batch.slot(context.sequence, position));
                            // SAFETY: bf16, as was checked, is 16 bits.
                            unsafe { std::slice::from_raw_parts(row.as_ptr().cast::<u16>(), row.len()) }
                        })
                        .collect();
                    // SAFETY: one task per block; the processor has AMX, and AVX-512 with it.
                    unsafe { attention_amx::pack(self.shape, &vectors, target.slice(at, block_lines)) };
                }
            });
            body(self, lines);
        });
    }
}

/// One expert, or a whole MLP, with the rows that it serves.
struct Expert<'a> {
    mlp: &'a Mlp<CpuMatrix>,
    part: usize,
    tokens: Vec<u32>,
    weights: Vec<f32>,
}

impl<'a> Expert<'a> {
    /// Serves every row with weight 1.
    fn for_all(mlp: &'a Mlp<CpuMatrix>, n_rows: usize) -> Expert<'a> {
        Expert { mlp, part: 0, tokens: (0..n_rows as u32).collect(), weights: vec![1.0; n_rows] }
    }
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Indices = CpuIndices;
    type Matrix = CpuMatrix;
    type Batch = Batch;
    type Cache = CpuCache;
    type Error = CpuError;

    fn alloc(&self, rows: usize, width: usize) -> CpuBuffer {
        CpuBuffer { data: vec![0.0; rows * width], width }
    }

    fn alloc_indices(&self, rows: usize, width: usize) -> CpuIndices {
        CpuIndices { data: vec![0; rows * width], width }
    }

    fn alloc_cache(&self, kind: CacheKind, n_slots: usize, width: usize) -> CpuCache {
        match (self.numerics, kind) {
            (Numerics::F32, _) => CpuCache::f32(n_slots, width),
            (_, CacheKind::IndexKey) if width.is_multiple_of(4) => CpuCache::int8(n_slots, width),
            _ => CpuCache::bf16(n_slots, width),
        }
    }

    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize {
        match (self.numerics, kind) {
            (Numerics::F32, _) => width * 4,
            (_, CacheKind::IndexKey) if width.is_multiple_of(4) => width + 4,
            _ => width * 2,
        }
    }

    fn load_matrix(&self, data: MatrixData) -> CpuMatrix {
        if self.repack
            && let Some((tiles, checked)) = Tiles::new(&data, self.isa, &self.pool)
        {
            self.note(checked);
            return CpuMatrix::Tiled(tiles);
        }
        let name = data.name.clone();
        let matrix = CpuMatrix::Mapped(Mapped::new(data));
        self.say_if_slow(&name, &matrix);
        matrix
    }

    fn load_vector(&self, values: &[f32]) -> CpuBuffer {
        CpuBuffer { data: values.to_vec(), width: values.len() }
    }

    fn upload(&self, batch: Batch) -> Batch {
        batch
    }

    fn write_rows(&self, rows: &[f32], buffer: &mut CpuBuffer) {
        buffer.data[..rows.len()].copy_from_slice(rows);
    }

    fn download(&self, buffer: &CpuBuffer, out: &mut [f32]) {
        out.copy_from_slice(&buffer.data[..out.len()]);
    }

    fn save_page(&self, cache: &CpuCache, page: u32, out: &mut Vec<u8>) -> bool {
        cache.save_page(page, out);
        true
    }

    fn load_page(&self, cache: &mut CpuCache, page: u32, bytes: &mut &[u8]) -> bool {
        cache.load_page(page, bytes)
    }

    fn sync(&self) -> Result<(), CpuError> {
        self.failed.lock().unwrap_or_else(|e| e.into_inner()).clone().map_or(Ok(()), Err)
    }

    fn embed(&self, table: &CpuMatrix, batch: &Batch, out: &mut CpuBuffer) {
        let width = out.width;
        let target = SharedMut::new(&mut out.data);
        self.rows(batch.tokens.len(), |r| {
            let token = batch.tokens[r] as usize;
            self.note(table.check(0, token, 1));
            // SAFETY: one task per row.
            #[allow(unsafe_code)]
            table.dequantize_row(0, token, unsafe { target.slice(r * width, width) });
        });
    }

    fn gather_logits_rows(&self, x: &CpuBuffer, batch: &Batch, out: &mut CpuBuffer) {
        for (i, row) in batch.logits_rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(*row as usize));
        }
    }

    fn rms_norm(&self, op: RmsNorm<'_, CpuBuffer>) {
        let RmsNorm { x, weight, eps, n_rows, out } = op;
        let width = out.width;
        let target = SharedMut::new(&mut out.data);
        self.rows(n_rows, |r| {
            // SAFETY: one task per row.
            #[allow(unsafe_code)]
            let out = unsafe { target.slice(r * width, width) };
            rms_norm(x.row(r), &weight.data, eps, out);
        });
    }

    fn linear(&self, op: Linear<'_, CpuBuffer, CpuMatrix>) {
        let Linear { x, n_rows, outputs, .. } = op;
        let tokens: Vec<u32> = (0..n_rows as u32).collect();
        let products: Vec<Product<'_>> =
            outputs.iter().map(|(matrix, _)| Product { n_rows, matrix, part: 0, tokens: &tokens }).collect();
        let widths: Vec<usize> = outputs.iter().map(|(_, out)| out.width).collect();
        let targets: Vec<SharedMut<'_, f32>> =
            outputs.iter_mut().map(|(_, out)| SharedMut::new(&mut out.data)).collect();
        let mut work = self.work();
        let width = products.first().map_or(0, |p| p.matrix.cols());
        let row = |r: usize| &x.row(r)[..width];
        self.prepare(&mut work.input, (n_rows, n_rows), row, width, products.iter().map(|p| p.matrix));
        let input = &work.input;
        let sizes =
            products.iter().map(|p| Size { rows: p.matrix.rows(), row_bytes: p.matrix.bytes_of(1), tokens: n_rows });
        let tasks = if self.is_large(n_rows) {
            large_tasks(sizes, LARGE_TASKS_PER_THREAD * self.n_threads())
        } else {
            tasks(sizes, self.n_threads())
        };
        self.pool.chunks(tasks.len(), 1, |range| {
            for Task { item, first_row, n_rows: n } in &tasks[range] {
                with_scratch(n * n_rows, |values| {
                    self.matrix_rows(&products[*item], input, *first_row, *n, values);
                    for (t, values) in values.chunks_exact(*n).enumerate() {
                        // SAFETY: each (product, range of rows, token) is stored once.
                        #[allow(unsafe_code)]
                        unsafe { targets[*item].slice(t * widths[*item] + first_row, *n) }.copy_from_slice(values);
                    }
                });
            }
        });
    }

    fn head_linear(&self, op: HeadLinear<'_, CpuBuffer, CpuMatrix>) {
        let HeadLinear { x, from, w, n_rows, out, to } = op;
        let (width, rows) = (out.width, w.rows());
        let tokens: Vec<u32> = (0..n_rows as u32).collect();
        let kernel = Kernel::choose(w, self.numerics, self.isa, n_rows);
        let target = SharedMut::new(&mut out.data);
        self.pool.chunks(from.n, 1, |range| {
            for head in range {
                with_activations(|input| {
                    let start = from.offset + head * from.stride;
                    let row = |r: usize| &x.row(r)[start..start + from.width];
                    // Not over the pool: this is one of its tasks.
                    let kernels = std::iter::once((kernel, w.dtype()));
                    input.prepare(None, self.isa, n_rows, row, from.width, kernels);
                    with_scratch(rows * n_rows, |values| {
                        let product = Product { n_rows, matrix: w, part: head, tokens: &tokens };
                        self.matrix_rows(&product, input, 0, rows, values);
                        for t in 0..n_rows {
                            // SAFETY: one task per head.
                            #[allow(unsafe_code)]
                            let out = unsafe { target.slice(t * width + to.offset + head * to.stride, to.width) };
                            out.copy_from_slice(&values[t * rows..][..to.width]);
                        }
                    });
                });
            }
        });
    }

    fn rope(&self, op: Rotate<'_, CpuBuffer, Batch>) {
        let Rotate { x, from, rope, batch, out, to, .. } = op;
        let width = out.width;
        let target = SharedMut::new(&mut out.data);
        self.rows(batch.n_rows(), |r| {
            with_scratch(rope.dim(), |table| {
                let (cos, sin) = table.split_at_mut(rope.dim() / 2);
                angles(rope, batch.positions[r], cos, sin);
                for head in 0..from.n {
                    let start = from.offset + head * from.stride;
                    // SAFETY: one task per row.
                    #[allow(unsafe_code)]
                    let out = unsafe { target.slice(r * width + to.offset + head * to.stride, to.width) };
                    rotate(rope.layout, cos, sin, &x.row(r)[start..start + from.width], out);
                }
            });
        });
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer, n_rows: usize) {
        let width = x.width;
        let target = SharedMut::new(&mut x.data);
        self.rows(n_rows, |r| {
            // SAFETY: one task per row.
            #[allow(unsafe_code)]
            let x = unsafe { target.slice(r * width, width) };
            for (x, y) in x.iter_mut().zip(y.row(r)) {
                *x += y;
            }
        });
    }

    fn add_bias(&self, x: &mut CpuBuffer, bias: &CpuBuffer, n_rows: usize) {
        let width = x.width;
        let target = SharedMut::new(&mut x.data);
        self.rows(n_rows, |r| {
            // SAFETY: one task per row.
            #[allow(unsafe_code)]
            let x = unsafe { target.slice(r * width, width) };
            for (x, b) in x.iter_mut().zip(&bias.data) {
                *x += b;
            }
        });
    }

    fn mlp(&self, x: &CpuBuffer, mlp: &Mlp<CpuMatrix>, n_rows: usize, out: &mut CpuBuffer) {
        self.experts(x, &[Expert::for_all(mlp, n_rows)], n_rows, out);
    }

    fn router_topk(&self, op: RouterTopk<'_, CpuBuffer, CpuIndices>) {
        let RouterTopk { logits, bias, routing, n_rows, ids, weights } = op;
        let (n_ids, n_weights) = (ids.width, weights.width);
        let (to_ids, to_weights) = (SharedMut::new(&mut ids.data), SharedMut::new(&mut weights.data));
        self.rows(n_rows, |r| {
            // SAFETY: one task per row.
            #[allow(unsafe_code)]
            let (ids, weights) =
                unsafe { (to_ids.slice(r * n_ids, n_ids), to_weights.slice(r * n_weights, n_weights)) };
            router_topk(logits.row(r), &bias.data, routing, ids, weights);
        });
    }

    fn moe(&self, op: Moe<'_, CpuBuffer, CpuIndices, CpuMatrix>) {
        let Moe { x, experts, shared, ids, weights, n_rows, out } = op;
        let n_experts = experts.gate.n_parts();
        let mut chosen: Vec<Expert<'_>> =
            (0..n_experts).map(|part| Expert { mlp: experts, part, tokens: vec![], weights: vec![] }).collect();
        for r in 0..n_rows {
            for (id, weight) in ids.row(r).iter().zip(weights.row(r)).filter(|(id, _)| **id >= 0) {
                let expert = &mut chosen[*id as usize];
                expert.tokens.push(r as u32);
                expert.weights.push(*weight);
            }
        }
        chosen.retain(|e| !e.tokens.is_empty());
        chosen.extend(shared.map(|mlp| Expert::for_all(mlp, n_rows)));
        if chosen.is_empty() {
            // Every expert of these rows is on another rank.
            out.data[..n_rows * out.width].fill(0.0);
        }
        self.experts(x, &chosen, n_rows, out);
    }

    fn write_latent(&self, op: WriteLatent<'_, CpuBuffer, Batch, CpuCache>) {
        let WriteLatent { kv_a, norm, eps, rope, batch, cache } = op;
        let latent = norm.width;
        self.cache_rows(kv_a.width, batch, cache, |r, row| {
            with_scratch(rope.dim(), |table| {
                let (cos, sin) = table.split_at_mut(rope.dim() / 2);
                rms_norm(&kv_a.row(r)[..latent], &norm.data, eps, &mut row[..latent]);
                angles(rope, batch.positions[r], cos, sin);
                rotate(rope.layout, cos, sin, &kv_a.row(r)[latent..], &mut row[latent..]);
            });
        });
    }

    fn write_index_key(&self, op: WriteIndexKey<'_, CpuBuffer, Batch, CpuCache>) {
        let WriteIndexKey { k, norm, norm_bias, eps, rope, batch, cache } = op;
        self.cache_rows(k.width, batch, cache, |r, row| {
            with_scratch(k.width + rope.dim(), |memory| {
                let (normed, table) = memory.split_at_mut(k.width);
                let (cos, sin) = table.split_at_mut(rope.dim() / 2);
                layer_norm(k.row(r), &norm.data, &norm_bias.data, eps, normed);
                angles(rope, batch.positions[r], cos, sin);
                rotate(rope.layout, cos, sin, normed, row);
            });
        });
    }

    fn write_cache(&self, x: &CpuBuffer, batch: &Batch, cache: &mut CpuCache) {
        for r in 0..batch.n_rows() {
            cache.write(batch.slot(batch.sequences[r] as usize, batch.positions[r] as usize), x.row(r));
        }
    }

    fn index_select(&self, op: IndexSelect<'_, CpuBuffer, CpuIndices, Batch, CpuCache>) {
        let IndexSelect { q, weights, n_heads, batch, cache, selected } = op;
        let slot = |row: usize, position: usize| batch.slot(batch.sequences[row] as usize, position);
        let heads = |row: usize| &weights.row(row)[..n_heads];
        match cache {
            CpuCache::F32(rows) => self.select(batch, selected, |row, first, out| {
                let keys = (first..first + out.len()).map(|p| rows.row(slot(row, p)));
                scores(self.isa, q.row(row), heads(row), keys, out);
            }),
            CpuCache::Bf16(rows) => self.select(batch, selected, |row, first, out| {
                let keys = (first..first + out.len()).map(|p| rows.row(slot(row, p)));
                scores(self.isa, q.row(row), heads(row), keys, out);
            }),
            CpuCache::Int8(rows) => {
                let queries: Vec<Int8Query> =
                    (0..batch.n_rows()).map(|row| Int8Query::new(q.row(row), heads(row))).collect();
                self.select(batch, selected, |row, first, out| {
                    scores_int8(self.isa, &queries[row], |p| rows.row(slot(row, first + p)), out);
                });
            }
        }
    }

    fn mla_attention(&self, op: MlaAttention<'_, CpuBuffer, CpuIndices, Batch, CpuCache>) {
        match op.cache {
            CpuCache::F32(rows) => self.mla(op, rows),
            CpuCache::Bf16(rows) => self.mla(op, rows),
            CpuCache::Int8(_) => unreachable!("latents are not kept in 8 bits"),
        }
    }

    fn gqa_attention(&self, op: GqaAttention<'_, CpuBuffer, Batch, CpuCache>) {
        match (op.keys, op.values) {
            (CpuCache::F32(k), CpuCache::F32(v)) => self.gqa(op, k, v),
            (CpuCache::Bf16(k), CpuCache::Bf16(v)) => self.gqa(op, k, v),
            _ => unreachable!("keys and values are allocated alike"),
        }
    }
}
