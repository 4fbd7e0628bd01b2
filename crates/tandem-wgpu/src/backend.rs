//! [`Backend`] on any GPU that wgpu reaches: each operation is one or two dispatches in a compute pass that goes on from
//! operation to operation.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tandem_core::Batch;
use tandem_core::backend::{
    AddRmsNorm, Backend, CacheKind, GqaAttention, HeadLinear, IndexSelect, Linear, MlaAttention, Mlp, Moe, PAGE_SIZE,
    PrepareAttention, RmsNorm, Rope, RopeLayout, RopeMlaAttention, Rotate, RouterTopk, WriteIndexKey, WriteLatent,
    composed,
};
use tandem_core::weights::MatrixData;

use crate::WgpuError;
use crate::args::{Args, CacheArgs, MatrixArgs, PrepareArgs, RopeArgs, RouterArgs, RowArgs};
use crate::attention::{Attention, Rotated};
use crate::batch::{Batches, WgpuBatch};
use crate::buffer::{Memory, WgpuBuffer, WgpuCache, WgpuIndices};
use crate::device::{AdapterInfo, Device, WORKGROUP};
use crate::linear::Choices;
use crate::matrix::WgpuMatrix;
use crate::pipelines::{Lanes, MAX_EXPERTS, MAX_TOP_K, Pipeline, Pipelines};
use crate::recorder::{Cost, KernelTime, Recorder, SubmissionStats};
use crate::residency::{Residency, ResidencyMeter};

/// Bytes copied to measure the device's bandwidth: more than its caches hold, little for software.
const BANDWIDTH_BYTES: usize = 256 << 20;
const SOFTWARE_BANDWIDTH_BYTES: usize = 8 << 20;

/// Vectors of four elements that a thread of rms_norm.wgsl keeps, at most.
const MOST_NORM_VECTORS: usize = 8;

/// Buffers of prepare_attention.wgsl; adapters that lack them run its parts one by one.
const PREPARE_BUFFERS: u32 = 13;

/// How the backend runs; what differs from [`Options::default`] is for choice of device or for tests.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// An adapter's number, or a part of its name; the first adapter otherwise.
    pub device: Option<String>,
    /// Work that one submission may hold.
    pub budget: Duration,
    /// Without subgroups, as on adapters that have none.
    pub plain: bool,
    /// Most bytes of a matrix in one buffer, below the adapter's own limit.
    pub binding_limit: Option<u64>,
    /// How batches of many rows meet matrices.
    pub tiles: Tiles,
    /// Shapes of kernels.
    pub tuning: Tuning,
}

/// How batches of more than 64 rows meet quantised matrices. Halves are for adapters with cooperative matrices; on others
/// the same kernel does without, slowly, for tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tiles {
    /// Products in single precision.
    Single,
    /// Numbers as the sum of two of half precision, which together have 22 bits; sums in single precision.
    Split,
    /// `Split` where the adapter has cooperative matrices, else `Single`.
    #[default]
    Fitting,
    /// Numbers rounded to half precision, with a power of two for each row; sums in single precision.
    Half,
}

/// Shapes of the kernels for few rows; results differ by the order of sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Vectors of four elements of the input that a workgroup keeps, over all rows at once; at most 1536.
    pub staged_vectors: usize,
    /// Workgroups that keep the device busy: with fewer, more threads share each row.
    pub enough_groups: usize,
    /// Most rows of a matrix that threads read at once: 1, 2 or 4.
    pub most_rows: usize,
    /// The same for gate and up.
    pub most_gate_rows: usize,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning { staged_vectors: 1536, enough_groups: 300, most_rows: 2, most_gate_rows: 2 }
    }
}

impl Default for Options {
    fn default() -> Options {
        Options {
            device: None,
            budget: Duration::from_millis(250),
            plain: false,
            binding_limit: None,
            tiles: Tiles::default(),
            tuning: Tuning::default(),
        }
    }
}

/// A GPU as a backend, in single precision.
pub struct WgpuBackend {
    pub(crate) device: Arc<Device>,
    pub(crate) pipelines: Arc<Pipelines>,
    pub(crate) recorder: Recorder,
    batches: Batches,
    scratch: RefCell<HashMap<&'static str, Arc<Memory>>>,
    turns: RefCell<Vec<(Rope, Arc<Memory>)>>,
    staging: RefCell<Option<wgpu::Buffer>>,
    residency: RefCell<ResidencyMeter>,
    matrix_limit: u64,
    pub(crate) tiles: Tiles,
    pub(crate) tuning: Tuning,
    encoding: Cell<f64>,
}

impl WgpuBackend {
    /// Opens an adapter and measures its bandwidth.
    ///
    /// # Errors
    /// No adapter, a choice that names none or several, or an adapter that cannot run the kernels.
    pub fn new(options: &Options) -> Result<WgpuBackend, WgpuError> {
        let start = Instant::now();
        let device = Arc::new(Device::open(options.device.as_deref(), options.tiles)?);
        let tiles = match options.tiles {
            Tiles::Fitting if device.cooperative => Tiles::Split,
            Tiles::Fitting => Tiles::Single,
            tiles => tiles,
        };
        let lanes = Lanes::of(&device, options.plain);
        let limit = device.info.max_binding_bytes.min(device.info.max_buffer_bytes).saturating_sub(1024);
        let limit = options.binding_limit.unwrap_or(limit).min(limit);
        let pipelines = Arc::new(Pipelines::new(Arc::clone(&device), lanes));
        // A guess until it is measured.
        let mut backend = WgpuBackend::with(device, pipelines, options.budget, 1e10, limit, (tiles, options.tuning));
        let bandwidth = backend.measure_bandwidth();
        backend.recorder.set_bandwidth(bandwidth);
        backend.sync()?;
        tracing::info!(
            "opened {} ({}) in {:.2} s, {:.1} GB/s by a copy",
            backend.info().name,
            backend.info().api,
            start.elapsed().as_secs_f64(),
            bandwidth / 1e9
        );
        Ok(backend)
    }

    /// Another backend on the same device, with the same compiled kernels and nothing else in common.
    #[must_use]
    pub fn another(&self) -> WgpuBackend {
        let (device, pipelines) = (Arc::clone(&self.device), Arc::clone(&self.pipelines));
        WgpuBackend::with(
            device,
            pipelines,
            self.recorder.budget(),
            self.recorder.bandwidth(),
            self.matrix_limit,
            (self.tiles, self.tuning),
        )
    }

    fn with(
        device: Arc<Device>,
        pipelines: Arc<Pipelines>,
        budget: Duration,
        bandwidth: f64,
        matrix_limit: u64,
        (tiles, tuning): (Tiles, Tuning),
    ) -> WgpuBackend {
        WgpuBackend {
            pipelines,
            recorder: Recorder::new(Arc::clone(&device), budget, bandwidth),
            batches: Batches::default(),
            scratch: RefCell::default(),
            turns: RefCell::default(),
            staging: RefCell::default(),
            residency: RefCell::default(),
            matrix_limit,
            tiles,
            tuning,
            encoding: Cell::new(0.0),
            device,
        }
    }

    /// The adapter.
    pub fn info(&self) -> &AdapterInfo {
        &self.device.info
    }

    /// Bytes per second of a copy on the device, read and written bytes counted.
    pub fn bandwidth(&self) -> f64 {
        self.recorder.bandwidth()
    }

    /// True if products in half precision go through cooperative matrices.
    pub fn is_cooperative(&self) -> bool {
        self.device.cooperative
    }

    /// True where the processor and the GPU share memory.
    pub fn is_unified(&self) -> bool {
        self.device.unified
    }

    /// How submissions have kept to their budget.
    pub fn submission_stats(&self) -> SubmissionStats {
        self.recorder.stats()
    }

    /// Counts submissions from here on.
    pub fn begin_submission_stats(&self) {
        self.recorder.begin_stats();
    }

    /// What steps read in their time, and whether that has fallen.
    pub fn residency(&self) -> Residency {
        self.residency.borrow().report()
    }

    /// Measures every dispatch from now on, where the device can; see [`WgpuBackend::kernel_times`].
    pub fn profile(&self, on: bool) {
        self.recorder.profile(on);
    }

    /// Times by kernel since the profile began, longest first; after [`Backend::sync`].
    pub fn kernel_times(&self) -> Vec<KernelTime> {
        self.recorder.kernel_times()
    }

    /// Bytes that kernels have read and written so far, by their shapes.
    pub fn bytes(&self) -> u64 {
        self.recorder.bytes()
    }

    /// Seconds that the host took to enqueue the last step.
    pub fn encoding_seconds(&self) -> f64 {
        self.encoding.get()
    }

    /// Submissions that the device has not finished, counted from here on; any thread may read the number.
    pub fn watch_submissions(&self) -> Arc<AtomicUsize> {
        self.recorder.watch()
    }

    /// Loses the device, to see what happens then.
    pub fn lose(&self) {
        self.device.device.destroy();
    }

    /// Indices as the host sees them, for tests.
    pub fn download_indices(&self, ids: &WgpuIndices, out: &mut [i32]) {
        self.read(&ids.memory, 0, bytemuck::cast_slice_mut(out));
    }

    /// A buffer of these values.
    pub fn buffer(&self, values: &[f32], width: usize) -> WgpuBuffer {
        let mut buffer = self.alloc(values.len() / width.max(1), width);
        self.write_rows(values, &mut buffer);
        buffer
    }

    fn measure_bandwidth(&self) -> f64 {
        let bytes = if self.device.info.kind == "cpu" { SOFTWARE_BANDWIDTH_BYTES } else { BANDWIDTH_BYTES };
        let bytes = bytes.min(self.matrix_limit as usize / 2);
        let (from, to) = (Memory::new(&self.device, bytes as u64), Memory::new(&self.device, bytes as u64));
        let pipeline = self.pipelines.get::<RowArgs>("copy", 0, |_| {});
        let args = RowArgs { width: (bytes / 16) as u32, ..RowArgs::default() };
        let seconds = |n: usize| {
            let start = Instant::now();
            for _ in 0..n {
                self.run(&pipeline, &[&from, &to], &args, [self.blocks(bytes / 16), 1, 1], Cost::default());
            }
            self.recorder.wait();
            start.elapsed().as_secs_f64()
        };
        // The first one zeroes the memory. What a submission costs cancels out.
        seconds(1);
        let (few, many) = (seconds(1).min(seconds(1)), seconds(5).min(seconds(5)));
        let of_copy = ((many - few) / 4.0).max(many / 10.0);
        2.0 * bytes as f64 / of_copy
    }

    /// Workgroups of threads that have one of `n` elements each.
    pub(crate) fn blocks(&self, n: usize) -> usize {
        n.div_ceil(WORKGROUP as usize)
    }

    pub(crate) fn run<A: Args>(
        &self,
        pipeline: &Pipeline,
        buffers: &[&Memory],
        args: &A,
        grid: [usize; 3],
        cost: Cost,
    ) {
        self.recorder.dispatch(pipeline, buffers, bytemuck::bytes_of(args), grid.map(|n| n as u32), cost);
    }

    /// Scratch memory under a name; work that was recorded with a shorter one keeps that.
    pub(crate) fn scratch(&self, name: &'static str, bytes: usize) -> Arc<Memory> {
        let mut scratch = self.scratch.borrow_mut();
        if let Some(memory) = scratch.get(name)
            && memory.bytes >= bytes as u64
        {
            return Arc::clone(memory);
        }
        self.device.errors.enter(name);
        let memory = Arc::new(Memory::new(&self.device, bytes as u64));
        scratch.insert(name, Arc::clone(&memory));
        memory
    }

    /// The table of rope_table.wgsl: the part of a turn that a position adds, for each pair, in units of 2^-64.
    pub(crate) fn turns(&self, rope: &Rope) -> Arc<Memory> {
        let mut known = self.turns.borrow_mut();
        if let Some((_, memory)) = known.iter().find(|(r, _)| r == rope) {
            return Arc::clone(memory);
        }
        let words: Vec<u32> = rope
            .inv_freq
            .iter()
            .flat_map(|frequency| {
                let turn = (f64::from(*frequency) / std::f64::consts::TAU).fract();
                let high = turn * 2f64.powi(32);
                [high as u32, (high.fract() * 2f64.powi(32)) as u32]
            })
            .collect();
        let memory = Arc::new(Memory::new(&self.device, words.len() as u64 * 4));
        self.device.queue.write_buffer(&memory.buffer, 0, bytemuck::cast_slice(&words));
        known.push((rope.clone(), Arc::clone(&memory)));
        memory
    }

    /// Copies bytes to the host, after everything enqueued before.
    fn read(&self, from: &Memory, at: u64, out: &mut [u8]) {
        if out.is_empty() || self.device.errors.any() {
            return;
        }
        let bytes = (out.len() as u64).next_multiple_of(4);
        let mut staging = self.staging.borrow_mut();
        if staging.as_ref().is_none_or(|b| b.size() < bytes) {
            *staging = Some(self.device.device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: bytes.next_power_of_two().max(4096),
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }));
        }
        let Some(staging) = &*staging else { return };
        self.recorder.copy(from, at, staging, 0, bytes);
        self.recorder.flush();
        let mapped = Arc::new(AtomicU8::new(0));
        let result = Arc::clone(&mapped);
        staging.slice(..bytes).map_async(wgpu::MapMode::Read, move |r| {
            result.store(if r.is_ok() { 1 } else { 2 }, Ordering::Release);
        });
        self.recorder.wait();
        if mapped.load(Ordering::Acquire) == 1 {
            if let Ok(view) = staging.slice(..bytes).get_mapped_range() {
                out.copy_from_slice(&view[..out.len()]);
            }
            staging.unmap();
        } else if !self.device.errors.any() {
            let operation = self.device.errors.operation();
            self.device.errors.set(WgpuError::Lost { operation, reason: "its results cannot be read".into() });
        }
    }

    /// Copies bytes to the device, after everything enqueued before.
    fn write(&self, to: &Memory, at: u64, bytes: &[u8]) {
        if bytes.is_empty() || self.device.errors.any() {
            return;
        }
        // A write happens before whatever is submitted next.
        self.recorder.flush();
        self.device.queue.write_buffer(&to.buffer, at, bytes);
    }

    fn elementwise(&self, name: &'static str, buffers: &[&Memory], width: usize, rows: usize) {
        let pipeline = self.pipelines.get::<RowArgs>(name, 0, |_| {});
        let args = RowArgs { width: width as u32, ..RowArgs::default() };
        let cost = Cost { bytes: (width * rows * 12) as u64, products: 0 };
        self.run(&pipeline, buffers, &args, [self.blocks(width), rows, 1], cost);
    }

    fn norm(
        &self,
        x: &WgpuBuffer,
        addend: Option<&WgpuBuffer>,
        weight: &WgpuBuffer,
        eps: f32,
        n: usize,
        out: &WgpuBuffer,
    ) {
        let adds = u32::from(addend.is_some());
        let vectors = norm_vectors(x.width);
        let pipeline = self.pipelines.get::<RowArgs>("rms_norm", u64::from(adds) | (vectors as u64) << 1, |d| {
            d.insert("ADD".into(), adds.to_string());
            d.insert("VECTORS".into(), vectors.to_string());
            d.insert("X_ACCESS".into(), if adds == 1 { "read_write" } else { "read" }.into());
        });
        let args = RowArgs { base: 0, width: x.width as u32, eps };
        let mut buffers = vec![&x.memory, &weight.memory, &out.memory];
        buffers.extend(addend.map(|y| &y.memory));
        let cost = Cost { bytes: (n * x.width * 20) as u64, products: 0 };
        self.run(&pipeline, &buffers, &args, [n, 1, 1], cost);
    }
}

impl Backend for WgpuBackend {
    type Buffer = WgpuBuffer;
    type Indices = WgpuIndices;
    type Matrix = WgpuMatrix;
    type Batch = WgpuBatch;
    type Cache = WgpuCache;
    type Error = WgpuError;

    fn alloc(&self, rows: usize, width: usize) -> WgpuBuffer {
        self.device.errors.enter("allocating activations");
        WgpuBuffer::new(&self.device, rows, width)
    }

    fn alloc_indices(&self, rows: usize, width: usize) -> WgpuIndices {
        self.device.errors.enter("allocating activations");
        WgpuIndices { memory: Memory::new(&self.device, (rows * width * 4) as u64), width }
    }

    fn alloc_cache(&self, _kind: CacheKind, n_slots: usize, width: usize) -> WgpuCache {
        self.device.errors.enter("allocating the cache");
        WgpuCache { memory: Memory::new(&self.device, (n_slots * width * 4) as u64), width, n_slots }
    }

    fn cache_bytes(&self, _kind: CacheKind, width: usize) -> usize {
        width * 4
    }

    fn load_matrix(&self, data: MatrixData) -> WgpuMatrix {
        self.device.errors.enter("loading weights");
        WgpuMatrix::load(&self.device, &data, self.matrix_limit)
    }

    fn load_vector(&self, values: &[f32]) -> WgpuBuffer {
        self.device.errors.enter("loading weights");
        self.buffer(values, values.len())
    }

    fn upload(&self, batch: Batch) -> WgpuBatch {
        self.recorder.flush();
        self.batches.upload(&self.device, &batch)
    }

    fn write_rows(&self, rows: &[f32], buffer: &mut WgpuBuffer) {
        self.write(&buffer.memory, 0, bytemuck::cast_slice(rows));
    }

    fn download(&self, buffer: &WgpuBuffer, out: &mut [f32]) {
        self.read(&buffer.memory, 0, bytemuck::cast_slice_mut(out));
    }

    fn save_page(&self, cache: &WgpuCache, page: u32, out: &mut Vec<u8>) -> bool {
        let bytes = PAGE_SIZE * cache.width * 4;
        let start = out.len();
        out.resize(start + bytes, 0);
        self.read(&cache.memory, page as u64 * bytes as u64, &mut out[start..]);
        true
    }

    fn load_page(&self, cache: &mut WgpuCache, page: u32, bytes: &mut &[u8]) -> bool {
        let size = PAGE_SIZE * cache.width * 4;
        if bytes.len() < size || (page as usize + 1) * PAGE_SIZE > cache.n_slots {
            return false;
        }
        let (now, rest) = bytes.split_at(size);
        self.write(&cache.memory, page as u64 * size as u64, now);
        *bytes = rest;
        true
    }

    fn warning(&self) -> Option<String> {
        self.residency().warning()
    }

    fn sync(&self) -> Result<(), WgpuError> {
        self.recorder.wait();
        self.residency.borrow_mut().end(self.recorder.bytes());
        self.device.errors.take()
    }

    fn record_or_replay(&self, batch: &WgpuBatch, max_context: usize, operations: &mut dyn FnMut(usize)) {
        self.residency.borrow_mut().begin(self.recorder.bytes(), batch.n_rows);
        let start = Instant::now();
        operations(max_context);
        self.recorder.flush();
        self.encoding.set(start.elapsed().as_secs_f64());
    }

    fn embed(&self, table: &WgpuMatrix, batch: &WgpuBatch, out: &mut WgpuBuffer) {
        let pipeline = self.pipelines.get::<MatrixArgs>("embed", table.format.number(), |d| table.format.define(d));
        for chunk in &table.chunks {
            let args = MatrixArgs {
                rows: chunk.rows.len() as u32,
                cols: table.cols as u32,
                units: table.units as u32,
                weight_pitch: table.units as u32,
                scale_pitch: table.scale_pitch as u32,
                y_pitch: out.width as u32,
                first_part: chunk.rows.start as u32,
                post: table.post(),
                ..MatrixArgs::default()
            };
            let buffers = [&chunk.weight, chunk.scales(), batch.memory(), &out.memory];
            let cost = Cost { bytes: (batch.n_rows * table.row_bytes()) as u64, products: 0 };
            self.run(&pipeline, &buffers, &args, [self.blocks(table.units), batch.n_rows, 1], cost);
        }
    }

    fn gather_logits_rows(&self, x: &WgpuBuffer, batch: &WgpuBatch, out: &mut WgpuBuffer) {
        self.elementwise("gather_rows", &[&x.memory, batch.memory(), &out.memory], x.width, batch.n_logits);
    }

    fn rms_norm(&self, op: RmsNorm<'_, WgpuBuffer>) {
        self.norm(op.x, None, op.weight, op.eps, op.n_rows, op.out);
    }

    fn add_rms_norm(&self, op: AddRmsNorm<'_, WgpuBuffer>) {
        self.norm(op.x, Some(op.y), op.weight, op.eps, op.n_rows, op.out);
    }

    fn linear(&self, op: Linear<'_, WgpuBuffer, WgpuMatrix>) {
        self.linear_of(op.x, op.outputs, op.n_rows);
    }

    fn head_linear(&self, op: HeadLinear<'_, WgpuBuffer, WgpuMatrix>) {
        self.products_by_head((op.x, op.from), op.w, op.n_rows, (op.out, op.to));
    }

    fn rope(&self, op: Rotate<'_, WgpuBuffer, WgpuBatch>) {
        let Rotate { x, from, rope, batch, out, to, .. } = op;
        let pipeline = self.pipelines.get::<RopeArgs>("rope", 0, |_| {});
        let turns = self.turns(rope);
        let pairs = rope.inv_freq.len();
        let args = RopeArgs {
            base: 0,
            n_heads: from.n as u32,
            head_width: from.width as u32,
            pairs: pairs as u32,
            half_layout: u32::from(rope.layout == RopeLayout::Half),
            scaling: rope.scaling,
            x_pitch: x.width as u32,
            x_offset: from.offset as u32,
            x_stride: from.stride as u32,
            y_pitch: out.width as u32,
            y_offset: to.offset as u32,
            y_stride: to.stride as u32,
        };
        let n = from.n * (from.width - pairs);
        let cost = Cost { bytes: (batch.n_rows * from.n * from.width * 8) as u64, products: 0 };
        let buffers = [&x.memory, &*turns, batch.memory(), &out.memory];
        self.run(&pipeline, &buffers, &args, [self.blocks(n), batch.n_rows, 1], cost);
    }

    fn add(&self, x: &mut WgpuBuffer, y: &WgpuBuffer, n_rows: usize) {
        self.elementwise("add", &[&x.memory, &y.memory], n_rows * x.width, 1);
    }

    fn add_bias(&self, x: &mut WgpuBuffer, bias: &WgpuBuffer, n_rows: usize) {
        self.elementwise("add_bias", &[&x.memory, &bias.memory], x.width, n_rows);
    }

    fn mlp(&self, x: &WgpuBuffer, mlp: &Mlp<WgpuMatrix>, n_rows: usize, out: &mut WgpuBuffer) {
        self.mlp_of(x, mlp, n_rows, out);
    }

    fn router_topk(&self, op: RouterTopk<'_, WgpuBuffer, WgpuIndices>) {
        let RouterTopk { logits, bias, routing, n_rows, ids, weights } = op;
        assert!(logits.width <= MAX_EXPERTS && routing.top_k <= MAX_TOP_K, "{} experts, {routing:?}", logits.width);
        let pipeline = self.pipelines.get::<RouterArgs>("router_topk", 0, |_| {});
        let args = RouterArgs {
            base: 0,
            n_experts: logits.width as u32,
            n_group: routing.n_group as u32,
            topk_group: routing.topk_group as u32,
            top_k: routing.top_k as u32,
            normalize: routing.normalize.into(),
            scale: routing.scale,
            first_expert: routing.first_expert as u32,
            n_held: routing.n_held as u32,
        };
        let cost = Cost { bytes: (n_rows * logits.width * 8) as u64, products: (n_rows * logits.width) as u64 };
        let buffers = [&logits.memory, &bias.memory, &ids.memory, &weights.memory];
        self.run(&pipeline, &buffers, &args, [n_rows, 1, 1], cost);
    }

    fn moe(&self, op: Moe<'_, WgpuBuffer, WgpuIndices, WgpuMatrix>) {
        let choices = Choices { ids: op.ids, weights: op.weights };
        self.moe_of(op.x, op.experts, op.shared, choices, op.n_rows, op.out);
    }

    fn write_latent(&self, op: WriteLatent<'_, WgpuBuffer, WgpuBatch, WgpuCache>) {
        let WriteLatent { kv_a, norm, eps, rope, batch, cache } = op;
        let pipeline = self.pipelines.get::<CacheArgs>("write_latent", 0, |_| {});
        let turns = self.turns(rope);
        let buffers = [&kv_a.memory, &norm.memory, &*turns, batch.memory(), &cache.memory];
        let cost = Cost { bytes: (batch.n_rows * kv_a.width * 8) as u64, products: 0 };
        self.run(&pipeline, &buffers, &cache_args(kv_a.width, rope, eps), [batch.n_rows, 1, 1], cost);
    }

    fn write_index_key(&self, op: WriteIndexKey<'_, WgpuBuffer, WgpuBatch, WgpuCache>) {
        let WriteIndexKey { k, norm, norm_bias, eps, rope, batch, cache } = op;
        let pipeline = self.pipelines.get::<CacheArgs>("write_index_key", 0, |_| {});
        let turns = self.turns(rope);
        let buffers = [&k.memory, &norm.memory, &norm_bias.memory, &*turns, batch.memory(), &cache.memory];
        let cost = Cost { bytes: (batch.n_rows * k.width * 8) as u64, products: 0 };
        self.run(&pipeline, &buffers, &cache_args(k.width, rope, eps), [batch.n_rows, 1, 1], cost);
    }

    fn prepare_attention(&self, op: PrepareAttention<'_, WgpuBuffer, WgpuBatch, WgpuCache>) {
        if self.device.info.max_storage_buffers < PREPARE_BUFFERS {
            return composed::prepare_attention(self, op);
        }
        let PrepareAttention { query, latent: WriteLatent { kv_a, norm, eps, rope, batch, cache }, key } = op;
        let vectors = query.as_ref().map_or(0, |q| norm_vectors(q.x.width));
        let flags = u64::from(key.is_some()) | u64::from(query.is_some()) << 1;
        let pipeline = self.pipelines.get::<PrepareArgs>("prepare_attention", flags | (vectors as u64) << 2, |d| {
            d.insert("KEY".into(), u32::from(key.is_some()).to_string());
            d.insert("QUERY".into(), u32::from(query.is_some()).to_string());
            d.insert("VECTORS".into(), vectors.to_string());
        });
        let turns = self.turns(rope);
        let latent = cache_args(kv_a.width, rope, eps);
        let mut args = PrepareArgs {
            latent_width: latent.width,
            latent_pairs: latent.pairs,
            latent_half_layout: latent.half_layout,
            latent_scaling: latent.scaling,
            latent_eps: latent.eps,
            ..PrepareArgs::default()
        };
        let mut buffers = vec![&kv_a.memory, &norm.memory, &*turns, batch.memory(), &cache.memory];
        let mut bytes = kv_a.width;
        let key_turns = key.as_ref().map(|key| self.turns(key.rope));
        if let (Some(key), Some(turns)) = (&key, &key_turns) {
            let of_key = cache_args(key.k.width, key.rope, key.eps);
            (args.key_width, args.key_pairs, args.key_half_layout) = (of_key.width, of_key.pairs, of_key.half_layout);
            (args.key_scaling, args.key_eps) = (of_key.scaling, of_key.eps);
            buffers.extend([&key.k.memory, &key.norm.memory, &key.norm_bias.memory, turns, &key.cache.memory]);
            bytes += key.k.width;
        }
        if let Some(query) = &query {
            (args.query_width, args.query_eps) = (query.x.width as u32, query.eps);
            buffers.extend([&query.x.memory, &query.weight.memory, &query.out.memory]);
            bytes += query.x.width;
        }
        let grid = [batch.n_rows, 1 + usize::from(key.is_some()) + usize::from(query.is_some()), 1];
        self.run(&pipeline, &buffers, &args, grid, Cost { bytes: (batch.n_rows * bytes * 8) as u64, products: 0 });
    }

    fn write_cache(&self, x: &WgpuBuffer, batch: &WgpuBatch, cache: &mut WgpuCache) {
        self.elementwise("write_cache", &[&x.memory, batch.memory(), &cache.memory], x.width, batch.n_rows);
    }

    fn index_select(&self, op: IndexSelect<'_, WgpuBuffer, WgpuIndices, WgpuBatch, WgpuCache>) {
        self.select(op);
    }

    fn mla_attention(&self, op: MlaAttention<'_, WgpuBuffer, WgpuIndices, WgpuBatch, WgpuCache>) {
        let MlaAttention { q, n_heads, latent, scale, batch, cache, selected, out } = op;
        let (keys, values) = ((cache, cache.width), (cache, latent));
        self.attend(&Attention { q, rotated: None, n_heads, n_kv_heads: 1, scale, batch, keys, values, selected, out });
    }

    fn gqa_attention(&self, op: GqaAttention<'_, WgpuBuffer, WgpuBatch, WgpuCache>) {
        let GqaAttention { q, n_heads, n_kv_heads, scale, batch, keys, values, out } = op;
        let (keys, values) = ((keys, keys.width / n_kv_heads), (values, values.width / n_kv_heads));
        let selected = None;
        self.attend(&Attention { q, rotated: None, n_heads, n_kv_heads, scale, batch, keys, values, selected, out });
    }

    fn rope_mla_attention(&self, op: RopeMlaAttention<'_, WgpuBuffer, WgpuIndices, WgpuBatch, WgpuCache>) {
        let RopeMlaAttention { x, from, rope, q, latent, scale, batch, cache, selected, out } = op;
        if from.width != rope.dim() {
            return composed::rope_mla_attention(
                self,
                RopeMlaAttention { x, from, rope, q, latent, scale, batch, cache, selected, out },
            );
        }
        let rotated = Some(Rotated { x, from, rope });
        let (keys, values) = ((cache, cache.width), (cache, latent));
        let (n_heads, n_kv_heads) = (from.n, 1);
        self.attend(&Attention { q, rotated, n_heads, n_kv_heads, scale, batch, keys, values, selected, out });
    }
}

/// Vectors of a row that a thread of rms_norm.wgsl keeps; 0 where rows are too long or odd.
fn norm_vectors(width: usize) -> usize {
    let vectors = width.div_ceil(4 * WORKGROUP as usize);
    if width.is_multiple_of(4) && vectors <= MOST_NORM_VECTORS { vectors } else { 0 }
}

fn cache_args(width: usize, rope: &Rope, eps: f32) -> CacheArgs {
    CacheArgs {
        base: 0,
        width: width as u32,
        pairs: rope.inv_freq.len() as u32,
        half_layout: u32::from(rope.layout == RopeLayout::Half),
        scaling: rope.scaling,
        eps,
    }
}
