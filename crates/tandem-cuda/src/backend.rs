//! [`Backend`] on an NVIDIA device: each operation is a few kernel launches, and a decode step is one graph.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Instant;

use tandem_core::backend::{
    AddRmsNorm, Backend, CacheKind, GqaAttention, HeadLinear, IndexSelect, Linear, MlaAttention, Mlp, Moe,
    PrepareAttention, RmsNorm, RopeIndexSelect, RopeMlaAttention, Rotate, Route, RouterTopk, WriteIndexKey,
    WriteLatent,
};
use tandem_core::weights::MatrixData;
use tandem_core::{Batch, Numerics};

use crate::CudaError;
use crate::args;
use crate::batch::{BatchMemory, CudaBatch, Sampled};
use crate::buffer::{CudaBuffer, CudaIndices};
use crate::driver::{Device, DeviceInfo, Memory};
use crate::host_experts::{HostExperts, OnHost};
use crate::matrix::CudaMatrix;
use crate::stager::Stager;
use crate::step::Steps;

/// Bytes that are copied to measure the memory's bandwidth.
const BANDWIDTH_BYTES: usize = 1 << 30;

/// How the backend launches work; the defaults are the fastest, the others are for comparison in tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which device.
    pub ordinal: i32,
    /// F32 or Bf16; caches are kept alike.
    pub numerics: Numerics,
    /// Decode steps are recorded once per shape and replayed.
    pub graphs: bool,
    /// Kernels may start while their predecessors finish (programmatic dependent launch).
    pub programmatic: bool,
    /// Prefill takes the tensor cores of Hopper's own (wgmma), where there are such.
    pub hopper: bool,
}

impl Options {
    /// The first device, as fast as it can.
    pub fn new(numerics: Numerics) -> Options {
        Options { ordinal: 0, numerics, graphs: true, programmatic: true, hopper: true }
    }
}

/// Paged storage of one kind of cached vector.
pub struct CudaCache {
    pub(crate) memory: Memory,
    /// Elements of a vector.
    pub(crate) width: usize,
    pub(crate) bf16: bool,
}

/// An NVIDIA device as a backend.
pub struct CudaBackend {
    // Dropped first: graphs refer to the memory below.
    pub(crate) steps: Steps,
    batch_memory: RefCell<BatchMemory>,
    sampled: RefCell<Sampled>,
    /// While weights are being loaded.
    stager: RefCell<Option<Stager>>,
    /// Experts that do not fit the device.
    pub(crate) on_host: Option<OnHost>,
    host_read_bytes: u64,
    pub(crate) options: Options,
    bandwidth: Cell<Option<f64>>,
    pub(crate) device: Arc<Device>,
}

impl CudaBackend {
    /// Opens the device and compiles the kernels for it, unless they are in the cache.
    ///
    /// # Errors
    /// No driver or device, a driver or device that is too old, no compiler, or numerics that it does not have.
    pub fn new(options: Options) -> Result<CudaBackend, CudaError> {
        if options.numerics == Numerics::Int8 {
            return Err(CudaError::Numerics(options.numerics));
        }
        let start = Instant::now();
        let device = Arc::new(Device::open(options.ordinal, options.programmatic)?);
        tracing::info!("opened {} in {:.2} s", device.info.name, start.elapsed().as_secs_f64());
        Ok(CudaBackend {
            steps: Steps::default(),
            batch_memory: RefCell::default(),
            sampled: RefCell::default(),
            stager: RefCell::default(),
            on_host: None,
            host_read_bytes: 0,
            options,
            bandwidth: Cell::new(None),
            device,
        })
    }

    /// The same with stacks of experts left to `experts` on the host: those whose names `keeps` says.
    #[must_use]
    pub fn with_host_experts(
        self,
        keeps: impl Fn(&str) -> bool + 'static,
        experts: impl HostExperts + 'static,
    ) -> CudaBackend {
        CudaBackend { on_host: Some(OnHost::new(Box::new(keeps), Box::new(experts))), ..self }
    }

    /// The same, noting how many of the host's bytes a token reads.
    #[must_use]
    pub fn with_host_read_bytes(self, host_read_bytes: u64) -> CudaBackend {
        CudaBackend { host_read_bytes, ..self }
    }

    /// Bytes of experts on the host that a token reads.
    pub fn host_read_bytes(&self) -> u64 {
        self.host_read_bytes
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.device.info
    }

    pub(crate) fn device(&self) -> Arc<Device> {
        Arc::clone(&self.device)
    }

    /// `y` holds this rank's part of a sum, which the norm or addition that reads it next makes.
    pub(crate) fn expect_sum(&self, args: args::ReduceArgs, y: &CudaBuffer) {
        y.pending.set(Some(args));
    }

    fn make_sum(&self, y: &CudaBuffer, n_rows: usize) {
        if let Some(args) = y.pending.take() {
            let (to, n) = (y.pointer(), (n_rows * y.width() / 8) as u32);
            self.launch("all_reduce", ((n as usize).div_ceil(256), 1, 1), 256, &mut args![args, to, n]);
        }
    }

    /// Bytes free on the device.
    pub fn free_memory(&self) -> u64 {
        self.device.free_memory()
    }

    /// Numerics in use.
    pub fn numerics(&self) -> Numerics {
        self.options.numerics
    }

    /// Bytes per second of a copy on the device, read and written bytes counted, measured once.
    pub fn bandwidth(&self) -> f64 {
        if let Some(bandwidth) = self.bandwidth.get() {
            return bandwidth;
        }
        let (from, to) = (self.device.alloc(BANDWIDTH_BYTES), self.device.alloc(BANDWIDTH_BYTES));
        let seconds = (0..8)
            .map(|_| self.device.time(|| self.device.copy(to.pointer(), from.pointer(), BANDWIDTH_BYTES)))
            .fold(f64::INFINITY, f64::min);
        let bandwidth = 2.0 * BANDWIDTH_BYTES as f64 / seconds;
        self.bandwidth.set(Some(bandwidth));
        bandwidth
    }

    /// Different values in the first rows of indices.
    pub fn count_distinct(&self, ids: &CudaIndices, n_rows: usize) -> usize {
        let mut values = vec![0i32; n_rows * ids.width()];
        self.device.download(ids.pointer(), bytemuck::cast_slice_mut(&mut values));
        values.into_iter().collect::<std::collections::HashSet<i32>>().len()
    }

    /// Indices as the host sees them, for tests.
    pub fn download_indices(&self, ids: &CudaIndices, out: &mut [i32]) {
        self.device.download(ids.pointer(), bytemuck::cast_slice_mut(out));
    }

    /// A buffer of these values.
    pub fn buffer(&self, values: &[f32], width: usize) -> CudaBuffer {
        let buffer = CudaBuffer::new(&self.device, values.len() / width.max(1), width);
        self.device.upload(buffer.pointer(), bytemuck::cast_slice(values));
        buffer
    }

    /// True if Hopper's own kernels may run.
    pub(crate) fn on_hopper(&self) -> bool {
        self.options.hopper && self.device.info.hopper
    }

    /// True if activations and caches are bf16 where tensor cores take them.
    pub(crate) fn in_bf16(&self) -> bool {
        self.options.numerics == Numerics::Bf16
    }

    /// True if the tensor-core kernels take these matrices.
    pub(crate) fn tiled(&self, matrices: &[&CudaMatrix]) -> bool {
        self.in_bf16() && matrices.iter().all(|m| m.tiled.is_some())
    }
}

impl Backend for CudaBackend {
    type Buffer = CudaBuffer;
    type Indices = CudaIndices;
    type Matrix = CudaMatrix;
    type Batch = CudaBatch;
    type Cache = CudaCache;
    type Error = CudaError;

    fn alloc(&self, rows: usize, width: usize) -> CudaBuffer {
        CudaBuffer::new(&self.device, rows, width)
    }

    fn alloc_indices(&self, rows: usize, width: usize) -> CudaIndices {
        CudaIndices::new(&self.device, rows, width)
    }

    fn alloc_cache(&self, kind: CacheKind, n_slots: usize, width: usize) -> CudaCache {
        let bytes = self.cache_bytes(kind, width);
        CudaCache { memory: self.device.alloc(n_slots * bytes), width, bf16: self.in_bf16() }
    }

    fn cache_bytes(&self, _kind: CacheKind, width: usize) -> usize {
        width * if self.in_bf16() { 2 } else { 4 }
    }

    fn load_matrix(&self, data: MatrixData) -> CudaMatrix {
        if let Some(on_host) = self.on_host.as_ref().filter(|on_host| (on_host.keeps)(&data.name)) {
            return CudaMatrix::on_host(&data.clone(), on_host.experts.load(data));
        }
        CudaMatrix::load(&self.device, self.stager.borrow_mut().get_or_insert_with(Stager::new), &data)
    }

    fn load_vector(&self, values: &[f32]) -> CudaBuffer {
        self.buffer(values, values.len())
    }

    fn upload(&self, batch: Batch) -> CudaBatch {
        let sampled = &mut self.sampled.borrow_mut();
        let (batch, moved) = self.batch_memory.borrow_mut().upload(&self.device, &batch, sampled);
        if moved {
            self.steps.forget();
        }
        batch
    }

    fn download(&self, buffer: &CudaBuffer, out: &mut [f32]) {
        self.device.download(buffer.pointer(), bytemuck::cast_slice_mut(out));
    }

    fn sync(&self) -> Result<(), CudaError> {
        self.device.sync()
    }

    fn write_rows(&self, values: &[f32], out: &mut CudaBuffer) {
        out.written();
        self.device.upload(out.pointer(), bytemuck::cast_slice(values));
    }

    fn record_or_replay(&self, batch: &CudaBatch, _max_context: usize, operations: &mut dyn FnMut(usize)) {
        // Everything has been loaded.
        if let Some(stager) = self.stager.borrow_mut().take() {
            stager.report();
        }
        self.run_or_replay(batch, operations);
        if batch.n_sampled > 0 {
            self.sampled.borrow().end(&self.device);
        }
    }

    fn samples(&self) -> bool {
        true
    }

    fn sample(&self, logits: &CudaBuffer, batch: &CudaBatch) {
        let sampled = self.sampled.borrow_mut().pointer(&self.device);
        let (logits, vocab) = (logits.pointer(), logits.width() as u32);
        let args = args::SampleArgs { logits, header: batch.sampling(), sampled, vocab, unused: 0 };
        self.launch("sample", (batch.n_sampled, 1, 1), 1024, &mut args![args]);
    }

    fn collect(&self, tokens: &mut Vec<u32>) -> Result<(), CudaError> {
        self.sampled.borrow_mut().take(&self.device, tokens);
        self.device.take_error()
    }

    fn embed(&self, table: &CudaMatrix, batch: &CudaBatch, out: &mut CudaBuffer) {
        out.written();
        let (tokens, sampled) = (batch.tokens(), self.sampled.borrow_mut().pointer(&self.device));
        let to = out.pointer();
        self.launch("embed", (batch.n_rows, 1, 1), 256, &mut args![table.view, tokens, sampled, to]);
    }

    fn gather_logits_rows(&self, x: &CudaBuffer, batch: &CudaBatch, out: &mut CudaBuffer) {
        out.written();
        let (from, rows, to, width) = (x.pointer(), batch.logits_rows(), out.pointer(), x.width() as u32);
        self.launch("gather_rows", (batch.n_logits, 1, 1), 256, &mut args![from, rows, to, width]);
    }

    fn rms_norm(&self, op: RmsNorm<'_, CudaBuffer>) {
        self.enqueue_rms_norm(op);
    }

    fn add_rms_norm(&self, op: AddRmsNorm<'_, CudaBuffer>) {
        self.enqueue_add_rms_norm(op);
    }

    fn linear(&self, op: Linear<'_, CudaBuffer, CudaMatrix>) {
        self.enqueue_linear(op);
    }

    fn head_linear(&self, op: HeadLinear<'_, CudaBuffer, CudaMatrix>) {
        self.enqueue_head_linear(op);
    }

    fn rope(&self, op: Rotate<'_, CudaBuffer, CudaBatch>) {
        let Rotate { x, from, rope, batch, out, to, .. } = op;
        out.written();
        let args = args::RopeArgs {
            rope: args::Rope::new(rope),
            x: x.pointer(),
            out: out.pointer(),
            positions: batch.positions(),
            from: from.into(),
            to: to.into(),
            x_pitch: x.width() as u32,
            out_pitch: out.width() as u32,
        };
        self.launch("rope", (batch.n_rows, from.n.div_ceil(8), 1), 256, &mut args![args]);
    }

    fn add(&self, x: &mut CudaBuffer, y: &CudaBuffer, n_rows: usize) {
        self.make_sum(y, n_rows);
        x.written();
        let n = n_rows * x.width();
        let (to, from, total) = (x.pointer(), y.pointer(), n as u64);
        self.launch("add", (n.div_ceil(256), 1, 1), 256, &mut args![to, from, total]);
    }

    fn add_bias(&self, x: &mut CudaBuffer, bias: &CudaBuffer, n_rows: usize) {
        x.written();
        let (to, from, width) = (x.pointer(), bias.pointer(), x.width() as u32);
        self.launch("add_bias", (n_rows, 1, 1), 256, &mut args![to, from, width]);
    }

    fn mlp(&self, x: &CudaBuffer, mlp: &Mlp<CudaMatrix>, n_rows: usize, out: &mut CudaBuffer) {
        self.enqueue_mlp(x, mlp, n_rows, out);
    }

    fn router_topk(&self, op: RouterTopk<'_, CudaBuffer, CudaIndices>) {
        self.enqueue_router_topk(op);
    }

    fn moe(&self, op: Moe<'_, CudaBuffer, CudaIndices, CudaMatrix>) {
        self.enqueue_moe(op);
    }

    fn write_latent(&self, op: WriteLatent<'_, CudaBuffer, CudaBatch, CudaCache>) {
        self.enqueue_write_latent(op);
    }

    fn write_index_key(&self, op: WriteIndexKey<'_, CudaBuffer, CudaBatch, CudaCache>) {
        self.enqueue_write_index_key(op);
    }

    fn write_cache(&self, x: &CudaBuffer, batch: &CudaBatch, cache: &mut CudaCache) {
        self.enqueue_write_cache(x, batch, cache);
    }

    fn index_select(&self, op: IndexSelect<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        self.enqueue_index(op, args::Rope::none());
    }

    fn mla_attention(&self, op: MlaAttention<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        self.enqueue_mla(op, None);
    }

    fn gqa_attention(&self, op: GqaAttention<'_, CudaBuffer, CudaBatch, CudaCache>) {
        self.enqueue_gqa(op);
    }

    fn prepare_attention(&self, op: PrepareAttention<'_, CudaBuffer, CudaBatch, CudaCache>) {
        self.enqueue_prepare_attention(op);
    }

    fn rope_index_select(&self, op: RopeIndexSelect<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        self.enqueue_rope_index(op);
    }

    fn rope_mla_attention(&self, op: RopeMlaAttention<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        self.enqueue_rope_mla(op);
    }

    fn route(&self, op: Route<'_, CudaBuffer, CudaIndices, CudaMatrix>) {
        self.enqueue_route(op);
    }
}
