//! A backend under test, and the suite's only calls of [`Backend`]: one function per operation, host values in and out.

use std::rc::Rc;

use tandem_core::Backend;
use tandem_core::backend::{
    AddRmsNorm, Batch, CacheKind, GqaAttention, HeadLinear, Heads, IndexSelect, Linear, MlaAttention, Mlp, Moe,
    PAGE_SIZE, PrepareAttention, RmsNorm, Rope, RopeIndexSelect, RopeMlaAttention, Rotate, Route, RouterTopk, Routing,
    Sampling, WriteIndexKey, WriteLatent,
};
use tandem_core::weights::{MatrixData, ModuleKind};

use crate::Precision;
use crate::data::{all_positions, plain_batch};

/// Epsilon of every norm.
const EPS: f32 = 1e-6;
/// What outputs hold before an operation, so that an element that is not written shows. Gaps between heads must keep it.
pub(crate) const POISON: f32 = -7.75;

/// Whose time an operation is, in profiles.
const LABEL: ModuleKind = ModuleKind::Attention;

/// A backend with one of its numerics, to be compared with the scalar CPU kernels.
pub struct Subject<B: Backend> {
    /// What reports call it: device, kernels, numerics.
    pub name: String,
    /// What it rounds besides sums.
    pub precision: Precision,
    /// Bytes of the largest matrix, cache or buffer that it can hold; larger cases are excluded and counted as such.
    pub largest_buffer: usize,
    make: Rc<dyn Fn() -> B>,
    read_indices: fn(&B, &B::Indices, &mut [i32]),
    backend: B,
}

/// The weights of an MLP or of a stack of experts: gate, up, down.
pub(crate) type MlpData = [MatrixData; 3];

/// Where an index key comes from: what [`Backend::write_index_key`] takes besides the cache and the batch.
pub(crate) struct IndexKeys<'a> {
    pub(crate) k: &'a [f32],
    pub(crate) norm: &'a [f32],
    pub(crate) norm_bias: &'a [f32],
    pub(crate) rope: &'a Rope,
}

/// What [`Backend::write_latent`] takes besides the cache and the batch.
pub(crate) struct Latents<'a> {
    pub(crate) kv_a: &'a [f32],
    pub(crate) norm: &'a [f32],
    pub(crate) rope: &'a Rope,
}

/// The shape and inputs of attention over latents.
#[derive(Clone, Copy)]
pub(crate) struct Mla<'a> {
    /// `[n, heads * (latent + rope)]`
    pub(crate) q: &'a [f32],
    pub(crate) heads: usize,
    pub(crate) latent: usize,
    pub(crate) scale: f32,
}

impl<B: Backend> Subject<B> {
    /// A subject that `make` makes, again where a case needs a device to itself; `read_indices` copies the first rows of
    /// indices to the host.
    pub fn new(
        name: impl Into<String>,
        precision: Precision,
        make: impl Fn() -> B + 'static,
        read_indices: fn(&B, &B::Indices, &mut [i32]),
    ) -> Subject<B> {
        let backend = make();
        Subject { name: name.into(), precision, largest_buffer: usize::MAX, make: Rc::new(make), read_indices, backend }
    }

    /// The same with a limit to the bytes of one matrix, cache or buffer.
    #[must_use]
    pub fn with_largest_buffer(self, bytes: usize) -> Subject<B> {
        Subject { largest_buffer: bytes, ..self }
    }

    /// The same with a device to itself.
    pub(crate) fn fresh(&self) -> Subject<B> {
        Subject {
            name: self.name.clone(),
            backend: (self.make)(),
            make: Rc::clone(&self.make),
            precision: self.precision,
            largest_buffer: self.largest_buffer,
            read_indices: self.read_indices,
        }
    }

    /// For cases that put operations together themselves.
    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    // --- transfers ---

    pub(crate) fn buffer(&self, values: &[f32], width: usize) -> B::Buffer {
        let mut buffer = self.backend.alloc(values.len() / width.max(1), width);
        self.backend.write_rows(values, &mut buffer);
        buffer
    }

    /// An output, poisoned.
    pub(crate) fn out(&self, n: usize, width: usize) -> B::Buffer {
        self.buffer(&vec![POISON; n * width], width)
    }

    /// The first values of a buffer.
    pub(crate) fn values(&self, buffer: &B::Buffer, n: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; n];
        self.backend.download(buffer, &mut out);
        self.sync();
        out
    }

    pub(crate) fn indices(&self, indices: &B::Indices, n: usize) -> Vec<i32> {
        let mut out = vec![i32::MIN; n];
        self.sync();
        (self.read_indices)(&self.backend, indices, &mut out);
        out
    }

    fn sync(&self) {
        if let Err(error) = self.backend.sync() {
            panic!("the device failed: {error}");
        }
    }

    pub(crate) fn upload(&self, batch: &Batch) -> B::Batch {
        self.backend.upload(batch.clone())
    }

    pub(crate) fn load(&self, data: &MatrixData) -> B::Matrix {
        self.backend.load_matrix(data.clone())
    }

    pub(crate) fn load_mlp(&self, [gate, up, down]: &MlpData) -> Mlp<B::Matrix> {
        Mlp { gate: self.load(gate), up: self.load(up), down: self.load(down) }
    }

    // --- rows ---

    pub(crate) fn embed(&self, table: &MatrixData, batch: &Batch) -> Vec<f32> {
        let table_on_device = self.load(table);
        let mut out = self.out(batch.n_rows(), table.cols);
        self.backend.embed(&table_on_device, &self.upload(batch), &mut out);
        self.values(&out, batch.n_rows() * table.cols)
    }

    pub(crate) fn gather_logits_rows(&self, x: &[f32], width: usize, batch: &Batch) -> Vec<f32> {
        let n = batch.logits_rows.len();
        let mut out = self.out(n, width);
        self.backend.gather_logits_rows(&self.buffer(x, width), &self.upload(batch), &mut out);
        self.values(&out, n * width)
    }

    pub(crate) fn rms_norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let (width, n) = (weight.len(), x.len() / weight.len());
        let mut out = self.out(n, width);
        let (x, weight) = (self.buffer(x, width), self.backend.load_vector(weight));
        self.backend.rms_norm(RmsNorm { x: &x, weight: &weight, eps: EPS, n_rows: n, out: &mut out });
        self.values(&out, n * width)
    }

    /// The sum and its norm.
    pub(crate) fn add_rms_norm(&self, x: &[f32], y: &[f32], weight: &[f32]) -> [Vec<f32>; 2] {
        let (width, n) = (weight.len(), x.len() / weight.len());
        let (mut x, y) = (self.buffer(x, width), self.buffer(y, width));
        let mut out = self.out(n, width);
        let weight = self.backend.load_vector(weight);
        self.backend.add_rms_norm(AddRmsNorm { x: &mut x, y: &y, weight: &weight, eps: EPS, n_rows: n, out: &mut out });
        [self.values(&x, n * width), self.values(&out, n * width)]
    }

    pub(crate) fn add(&self, x: &[f32], y: &[f32], width: usize) -> Vec<f32> {
        let (mut x_on_device, y) = (self.buffer(x, width), self.buffer(y, width));
        self.backend.add(&mut x_on_device, &y, x.len() / width);
        self.values(&x_on_device, x.len())
    }

    pub(crate) fn add_bias(&self, x: &[f32], bias: &[f32]) -> Vec<f32> {
        let mut x_on_device = self.buffer(x, bias.len());
        self.backend.add_bias(&mut x_on_device, &self.backend.load_vector(bias), x.len() / bias.len());
        self.values(&x_on_device, x.len())
    }

    pub(crate) fn rope(
        &self,
        x: &[f32],
        (from, from_width): (Heads, usize),
        rope: &Rope,
        batch: &Batch,
        (to, to_width): (Heads, usize),
    ) -> Vec<f32> {
        let n = batch.n_rows();
        let mut out = self.out(n, to_width);
        let (x, batch, label) = (&self.buffer(x, from_width), &self.upload(batch), LABEL);
        self.backend.rope(Rotate { x, from, rope, batch, out: &mut out, to, label });
        self.values(&out, n * to_width)
    }

    // --- products ---

    pub(crate) fn linear(&self, x: &[f32], n: usize, matrices: &[&MatrixData]) -> Vec<Vec<f32>> {
        let loaded: Vec<B::Matrix> = matrices.iter().map(|m| self.load(m)).collect();
        self.linear_loaded(x, n, &loaded.iter().zip(matrices.iter().map(|m| m.rows)).collect::<Vec<_>>())
    }

    /// Matrices with their numbers of rows.
    pub(crate) fn linear_loaded(&self, x: &[f32], n: usize, matrices: &[(&B::Matrix, usize)]) -> Vec<Vec<f32>> {
        let x = self.buffer(x, x.len() / n);
        let mut outs: Vec<B::Buffer> = matrices.iter().map(|(_, rows)| self.out(n, *rows)).collect();
        let mut outputs: Vec<(&B::Matrix, &mut B::Buffer)> = matrices.iter().map(|(m, _)| *m).zip(&mut outs).collect();
        self.backend.linear(Linear { x: &x, n_rows: n, outputs: &mut outputs, label: LABEL });
        outs.iter().zip(matrices).map(|(out, (_, rows))| self.values(out, n * rows)).collect()
    }

    pub(crate) fn head_linear(
        &self,
        x: &[f32],
        n: usize,
        from: Heads,
        stack: &MatrixData,
        (to, to_width): (Heads, usize),
    ) -> Vec<f32> {
        let stack = self.load(stack);
        let mut out = self.out(n, to_width);
        let x = &self.buffer(x, x.len() / n);
        self.backend.head_linear(HeadLinear { x, from, w: &stack, n_rows: n, out: &mut out, to });
        self.values(&out, n * to_width)
    }

    pub(crate) fn mlp(&self, x: &[f32], n: usize, mlp: &MlpData) -> Vec<f32> {
        let hidden = mlp[2].rows;
        let mlp = self.load_mlp(mlp);
        let mut out = self.out(n, hidden);
        self.backend.mlp(&self.buffer(x, x.len() / n), &mlp, n, &mut out);
        self.values(&out, n * hidden)
    }

    // --- experts ---

    /// Ids and weights of the experts for these logits.
    pub(crate) fn router_topk(&self, logits: &[f32], bias: &[f32], routing: &Routing) -> (Vec<i32>, Vec<f32>) {
        let n = logits.len() / bias.len();
        let mut ids = self.backend.alloc_indices(n, routing.top_k);
        let mut weights = self.out(n, routing.top_k);
        let (logits, bias) = (self.buffer(logits, bias.len()), self.backend.load_vector(bias));
        let (ids_out, weights_out) = (&mut ids, &mut weights);
        let op = RouterTopk { logits: &logits, bias: &bias, routing, n_rows: n, ids: ids_out, weights: weights_out };
        self.backend.router_topk(op);
        (self.indices(&ids, n * routing.top_k), self.values(&weights, n * routing.top_k))
    }

    /// Logits, ids and weights.
    pub(crate) fn route(
        &self,
        x: &[f32],
        n: usize,
        gate: &MatrixData,
        bias: &[f32],
        routing: &Routing,
    ) -> (Vec<f32>, Vec<i32>, Vec<f32>) {
        let (k, n_experts) = (routing.top_k, gate.rows);
        let (gate, bias) = (self.load(gate), self.backend.load_vector(bias));
        let mut ids = self.backend.alloc_indices(n, k);
        let (mut logits, mut weights) = (self.out(n, n_experts), self.out(n, k));
        let x = self.buffer(x, x.len() / n);
        self.backend.route(Route {
            x: &x,
            gate: &gate,
            bias: &bias,
            routing,
            n_rows: n,
            logits: &mut logits,
            ids: &mut ids,
            weights: &mut weights,
        });
        (self.values(&logits, n * n_experts), self.indices(&ids, n * k), self.values(&weights, n * k))
    }

    /// A mixture of experts that `router_topk` chooses from `logits`.
    pub(crate) fn moe(
        &self,
        x: &[f32],
        n: usize,
        experts: &MlpData,
        shared: Option<&MlpData>,
        logits: &[f32],
        routing: &Routing,
    ) -> Vec<f32> {
        let (hidden, n_experts) = (experts[2].rows, logits.len() / n);
        let (experts, shared) = (self.load_mlp(experts), shared.map(|s| self.load_mlp(s)));
        self.moe_loaded((x, n, hidden), &experts, shared.as_ref(), (logits, n_experts), routing)
    }

    /// The same with loaded matrices.
    pub(crate) fn moe_loaded(
        &self,
        (x, n, hidden): (&[f32], usize, usize),
        experts: &Mlp<B::Matrix>,
        shared: Option<&Mlp<B::Matrix>>,
        (logits, n_experts): (&[f32], usize),
        routing: &Routing,
    ) -> Vec<f32> {
        let mut ids = self.backend.alloc_indices(n, routing.top_k);
        let (mut weights, mut out) = (self.out(n, routing.top_k), self.out(n, hidden));
        let (logits, bias) = (self.buffer(logits, n_experts), self.backend.load_vector(&vec![0.0; n_experts]));
        let (ids_out, weights_out) = (&mut ids, &mut weights);
        let op = RouterTopk { logits: &logits, bias: &bias, routing, n_rows: n, ids: ids_out, weights: weights_out };
        self.backend.router_topk(op);
        let x = self.buffer(x, x.len() / n);
        let op = Moe { x: &x, experts, shared, ids: &ids, weights: &weights, n_rows: n, out: &mut out };
        self.backend.moe(op);
        self.values(&out, n * hidden)
    }

    // --- tokens ---

    /// The device's tokens of rows of logits, three times over: two steps under way, the second and third recorded or
    /// replayed. Steps of one size must come with one buffer, as they do in a model.
    ///
    /// # Errors
    /// The three differ.
    pub(crate) fn sample(
        &self,
        buffer: &mut B::Buffer,
        logits: &[f32],
        sampling: &[Sampling],
    ) -> Result<Vec<u32>, String> {
        let (b, n) = (&self.backend, sampling.len());
        let logits_rows = (0..n as u32).collect();
        let batch = Batch { logits_rows, sampling: sampling.to_vec(), ..plain_batch(n) };
        b.write_rows(logits, buffer);
        let submit = || {
            let batch = b.upload(batch.clone());
            b.record_or_replay(&batch, 1, &mut |_| b.sample(buffer, &batch));
        };
        let mut found = vec![];
        let mut collect = || b.collect(&mut found).map_err(|error| error.to_string());
        submit();
        submit();
        collect()?;
        submit();
        collect()?;
        collect()?;
        let alike = found.len() == 3 * n && found[..n] == found[n..2 * n] && found[..n] == found[2 * n..];
        found.truncate(n);
        if alike { Ok(found) } else { Err(format!("three equal steps sample differently, the first {found:?}")) }
    }

    // --- caches ---

    pub(crate) fn cache(&self, kind: CacheKind, n_slots: usize, width: usize) -> B::Cache {
        self.backend.alloc_cache(kind, n_slots, width)
    }

    pub(crate) fn write_cache(&self, x: &[f32], batch: &Batch, cache: &mut B::Cache) {
        let x = self.buffer(x, x.len() / batch.n_rows());
        self.backend.write_cache(&x, &self.upload(batch), cache);
        self.sync();
    }

    pub(crate) fn write_latent(&self, latents: &Latents<'_>, batch: &Batch, cache: &mut B::Cache) {
        let kv_a = self.buffer(latents.kv_a, latents.kv_a.len() / batch.n_rows());
        let norm = self.backend.load_vector(latents.norm);
        let (rope, batch) = (latents.rope, &self.upload(batch));
        self.backend.write_latent(WriteLatent { kv_a: &kv_a, norm: &norm, eps: EPS, rope, batch, cache });
        self.sync();
    }

    pub(crate) fn write_index_key(&self, keys: &IndexKeys<'_>, batch: &Batch, cache: &mut B::Cache) {
        let k = self.buffer(keys.k, keys.k.len() / batch.n_rows());
        let (norm, bias) = (self.backend.load_vector(keys.norm), self.backend.load_vector(keys.norm_bias));
        let (rope, batch) = (keys.rope, &self.upload(batch));
        let op = WriteIndexKey { k: &k, norm: &norm, norm_bias: &bias, eps: EPS, rope, batch, cache };
        self.backend.write_index_key(op);
        self.sync();
    }

    /// The fused writes; returns the normalised queries. `query` is input and weight.
    pub(crate) fn prepare_attention(
        &self,
        query: Option<(&[f32], &[f32])>,
        latents: &Latents<'_>,
        cache: &mut B::Cache,
        keys: Option<(&IndexKeys<'_>, &mut B::Cache)>,
        batch: &Batch,
    ) -> Option<Vec<f32>> {
        let b = &self.backend;
        let n = batch.n_rows();
        let query = query.map(|(x, weight)| {
            (self.buffer(x, weight.len()), b.load_vector(weight), self.out(n, weight.len()), weight.len())
        });
        let (kv_a, norm) = (self.buffer(latents.kv_a, latents.kv_a.len() / n), b.load_vector(latents.norm));
        let keys = keys.map(|(keys, cache)| {
            let k = self.buffer(keys.k, keys.k.len() / n);
            (k, b.load_vector(keys.norm), b.load_vector(keys.norm_bias), keys.rope, cache)
        });
        let mut query = query;
        let mut keys = keys;
        let batch = &self.upload(batch);
        b.prepare_attention(PrepareAttention {
            query: query.as_mut().map(|(x, weight, out, _)| RmsNorm { x, weight, eps: EPS, n_rows: n, out }),
            latent: WriteLatent { kv_a: &kv_a, norm: &norm, eps: EPS, rope: latents.rope, batch, cache },
            key: keys.as_mut().map(|(k, norm, norm_bias, rope, cache)| WriteIndexKey {
                k,
                norm,
                norm_bias,
                eps: EPS,
                rope,
                batch,
                cache: &mut **cache,
            }),
        });
        self.sync();
        query.map(|(_, _, out, width)| self.values(&out, n * width))
    }

    /// Cached vectors as they decode, one for each row of the batch: attention of one head to a single position, all of
    /// whose elements are values. [`Backend::index_select`] picks the position, by the bits of its number.
    pub(crate) fn read_cache(&self, cache: &B::Cache, width: usize, batch: &Batch) -> Vec<f32> {
        const BITS: usize = 32;
        let bits = |position: u32| (0..BITS as u32).map(move |bit| [-1.0, 1.0][(position >> bit & 1) as usize]);
        let n_slots = batch.block_tables.iter().flatten().max().map_or(0, |page| (*page as usize + 1) * PAGE_SIZE);
        let mut keys = self.backend.alloc_cache(CacheKind::KeyValue, n_slots, BITS);
        for part in all_positions(batch.max_context(), &batch.block_tables, 256) {
            let codes: Vec<f32> = part.positions.iter().flat_map(|p| bits(*p)).collect();
            self.write_cache(&codes, &part, &mut keys);
        }
        let n = batch.n_rows();
        let q: Vec<f32> = batch.positions.iter().flat_map(|p| bits(*p)).collect();
        let selected = self.index_select(&q, &vec![1.0; n], batch, &keys, 1);
        let mla = Mla { q: &vec![0.0; n * width], heads: 1, latent: width, scale: 1.0 };
        let [found, _] = self.mla_attention(mla, batch, cache, Some(&selected));
        found
    }

    /// Whether pages can be saved; the page's bytes are appended.
    pub(crate) fn save_page(&self, cache: &B::Cache, page: u32, bytes: &mut Vec<u8>) -> bool {
        self.backend.save_page(cache, page, bytes)
    }

    pub(crate) fn load_page(&self, cache: &mut B::Cache, page: u32, bytes: &mut &[u8]) -> bool {
        self.backend.load_page(cache, page, bytes)
    }

    // --- attention ---

    /// Selected positions, `[n, k]`.
    pub(crate) fn index_select(
        &self,
        q: &[f32],
        weights: &[f32],
        batch: &Batch,
        cache: &B::Cache,
        k: usize,
    ) -> B::Indices {
        let n = batch.n_rows();
        let (n_heads, width) = (weights.len() / n, q.len() / n);
        let mut selected = self.backend.alloc_indices(n, k);
        let (q, weights) = (self.buffer(q, width), self.buffer(weights, n_heads));
        let (batch, out) = (&self.upload(batch), &mut selected);
        self.backend.index_select(IndexSelect { q: &q, weights: &weights, n_heads, batch, cache, selected: out });
        self.sync();
        selected
    }

    pub(crate) fn rope_index_select(
        &self,
        q: &[f32],
        rope: &Rope,
        weights: &[f32],
        batch: &Batch,
        cache: &B::Cache,
        k: usize,
    ) -> B::Indices {
        let n = batch.n_rows();
        let (n_heads, width) = (weights.len() / n, q.len() / n);
        let mut selected = self.backend.alloc_indices(n, k);
        let (q, weights, mut rotated) = (self.buffer(q, width), self.buffer(weights, n_heads), self.out(n, width));
        self.backend.rope_index_select(RopeIndexSelect {
            q: &q,
            heads: Heads::packed(n_heads, width / n_heads),
            rope,
            rotated: &mut rotated,
            weights: &weights,
            batch: &self.upload(batch),
            cache,
            selected: &mut selected,
        });
        self.sync();
        selected
    }

    /// The result twice: scratch of the first run is dirty.
    pub(crate) fn mla_attention(
        &self,
        mla: Mla<'_>,
        batch: &Batch,
        cache: &B::Cache,
        selected: Option<&B::Indices>,
    ) -> [Vec<f32>; 2] {
        let Mla { q, heads, latent, scale } = mla;
        let n = batch.n_rows();
        let (q, batch) = (self.buffer(q, q.len() / n), self.upload(batch));
        [(); 2].map(|()| {
            let mut out = self.out(n, heads * latent);
            let (q, batch, out_buffer) = (&q, &batch, &mut out);
            let op = MlaAttention { q, n_heads: heads, latent, scale, batch, cache, selected, out: out_buffer };
            self.backend.mla_attention(op);
            self.values(&out, n * heads * latent)
        })
    }

    /// `mla.q` holds the latent part of every head, and anything where the rotated part goes; `unrotated` is
    /// `[n, heads, rope]` within rows of `from`.
    pub(crate) fn rope_mla_attention(
        &self,
        mla: Mla<'_>,
        (unrotated, from, rope): (&[f32], Heads, &Rope),
        batch: &Batch,
        cache: &B::Cache,
        selected: Option<&B::Indices>,
    ) -> Vec<f32> {
        let Mla { q, heads, latent, scale } = mla;
        let n = batch.n_rows();
        let (mut q, x) = (self.buffer(q, q.len() / n), self.buffer(unrotated, unrotated.len() / n));
        let mut out = self.out(n, heads * latent);
        self.backend.rope_mla_attention(RopeMlaAttention {
            x: &x,
            from,
            rope,
            q: &mut q,
            latent,
            scale,
            batch: &self.upload(batch),
            cache,
            selected,
            out: &mut out,
        });
        self.values(&out, n * heads * latent)
    }

    pub(crate) fn gqa_attention(
        &self,
        q: &[f32],
        (heads, kv_heads, dim): (usize, usize, usize),
        scale: f32,
        batch: &Batch,
        keys: &B::Cache,
        values: &B::Cache,
    ) -> Vec<f32> {
        let n = batch.n_rows();
        let mut out = self.out(n, heads * dim);
        let (q, batch) = (self.buffer(q, heads * dim), self.upload(batch));
        self.backend.gqa_attention(GqaAttention {
            q: &q,
            n_heads: heads,
            n_kv_heads: kv_heads,
            scale,
            batch: &batch,
            keys,
            values,
            out: &mut out,
        });
        self.values(&out, n * heads * dim)
    }
}
