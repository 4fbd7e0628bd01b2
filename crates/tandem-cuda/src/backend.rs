//! [`Backend`] on an NVIDIA device: each operation is a few kernel launches, and a decode step is one graph.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::Zeroable;
use tandem_core::Batch;
use tandem_core::backend::{Backend, CacheKind, Heads, Mlp, Rope, Routing};
use tandem_core::weights::MatrixData;

use crate::CudaError;
use crate::args::{self, MAX_JOBS};
use crate::batch::{BatchMemory, CudaBatch, DECODE_ROWS};
use crate::buffer::{CudaBuffer, CudaIndices};
use crate::driver::{Device, DeviceInfo, Graph, Memory};
use crate::matrix::{CudaMatrix, MXFP4};

/// Bytes that are copied to measure the memory's bandwidth.
const BANDWIDTH_BYTES: usize = 1 << 30;
/// Positions of one block of the tensor-core attention while decoding: short enough to spread one row over the device.
const DECODE_SPAN: usize = 64;
/// Spans of one row, at most; their shares are merged.
const MAX_SPANS: usize = 64;
/// Tokens in shared memory at once (MLA_TILE), and the largest shapes of the tensor-core attention.
const MLA_TILE: usize = 64;
const MLA_MAX_WIDTH: usize = 576;
const MLA_MAX_LATENT: usize = 512;
/// Widest vector of the reference attention (ATTENTION_ELEMENTS * 32).
const ATTENTION_MAX_WIDTH: usize = 640;
/// Shared memory of the row kernels: RING rounds of 2688 bytes for each of 8 warps.
const ROWS_SHARED: usize = 8 * 3 * 2688;
/// Rows and tokens of a block of gemm_mma, its shared memory, and the tokens that make it worth while.
const GEMM_TILE: usize = 128;
const GEMM_SHARED: usize = 4 * GEMM_TILE * 72 * 2;
const GEMM_TOKENS: usize = 48;
/// Blocks of gemm_mma that are worth a launch; fewer leave most of the device idle.
const GEMM_BLOCKS: usize = 128;
/// Floats of index scores kept at once; longer prefills are scored in blocks of rows.
const SCORE_FLOATS: usize = 64 << 20;
/// Experts and choices that router_topk and moe_plan hold.
const MAX_EXPERTS: usize = 512;
const MAX_TOP_K: usize = 32;

/// How activations meet weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// Single precision everywhere, caches too.
    F32,
    /// Activations and caches rounded to bf16 where tensor cores take them; sums in f32.
    Bf16,
}

impl Numerics {
    /// Name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Numerics::F32 => "f32",
            Numerics::Bf16 => "bf16",
        }
    }
}

/// How the backend launches work; the defaults are the fastest, the others are for comparison in tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which device.
    pub ordinal: i32,
    /// Numerics.
    pub numerics: Numerics,
    /// Decode steps are recorded once per shape and replayed.
    pub graphs: bool,
    /// Kernels may start while their predecessors finish (programmatic dependent launch).
    pub programmatic: bool,
}

impl Options {
    /// The first device, as fast as it can.
    pub fn new(numerics: Numerics) -> Options {
        Options { ordinal: 0, numerics, graphs: true, programmatic: true }
    }
}

/// Paged storage of one kind of cached vector.
pub struct CudaCache {
    memory: Memory,
    width: usize,
    bf16: bool,
}

/// A step that has run, or has been recorded.
enum Recorded {
    /// It ran once, so that all memory it needs is there.
    Ran,
    /// To replay.
    Graph(Graph),
}

/// An NVIDIA device as a backend.
pub struct CudaBackend {
    // Dropped first: graphs refer to the memory below.
    recorded: RefCell<HashMap<CudaBatch, Recorded>>,
    batch_memory: RefCell<BatchMemory>,
    scratch: RefCell<HashMap<&'static str, Memory>>,
    options: Options,
    bandwidth: Cell<Option<f64>>,
    device: Arc<Device>,
}

impl CudaBackend {
    /// Opens the device and compiles the kernels for it, unless they are in the cache.
    ///
    /// # Errors
    /// No driver or device, a driver or device that is too old, or no compiler.
    pub fn new(options: Options) -> Result<CudaBackend, CudaError> {
        Ok(CudaBackend {
            recorded: RefCell::default(),
            batch_memory: RefCell::default(),
            scratch: RefCell::default(),
            options,
            bandwidth: Cell::new(None),
            device: Arc::new(Device::open(options.ordinal, options.programmatic)?),
        })
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.device.info
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

    fn fast_numerics(&self) -> bool {
        self.options.numerics == Numerics::Bf16
    }

    fn fast(&self, matrices: &[&CudaMatrix]) -> bool {
        self.fast_numerics() && matrices.iter().all(|m| m.fast())
    }

    /// Scratch memory under a name; it keeps its place until a longer one is asked for.
    fn scratch(&self, name: &'static str, bytes: usize) -> u64 {
        let mut scratch = self.scratch.borrow_mut();
        if let Some(memory) = scratch.get(name)
            && memory.bytes() >= bytes
        {
            return memory.pointer();
        }
        // Graphs refer to the old one.
        self.recorded.borrow_mut().clear();
        scratch.remove(name);
        let memory = self.device.alloc(bytes);
        let pointer = memory.pointer();
        scratch.insert(name, memory);
        pointer
    }

    fn launch(
        &self,
        name: &'static str,
        grid: (usize, usize, usize),
        threads: usize,
        arguments: &mut [*mut std::ffi::c_void],
    ) {
        self.device.launch(name, grid, threads, 0, arguments);
    }

    /// Single-precision products; `args` lacks what follows from the matrix.
    fn linear_f32(&self, m: &CudaMatrix, parts: usize, mut args: args::LinearF32Args) {
        args.m = m.view;
        args.x_divisor = args.x_divisor.max(1);
        // Few rows: several warps share each, whatever the batch, so that sums are added in the same order.
        args.split = match m.rows() * parts {
            0..2048 => 8,
            2048..8192 => 2,
            _ => 1,
        };
        let rows = m.rows().div_ceil(8 / args.split as usize);
        let n = args.n as usize;
        if args.ids != 0 || n == 1 {
            self.launch("linear_f32_1", (rows, n, parts), 256, &mut args![args]);
        } else {
            self.launch("linear_f32_8", (rows, n.div_ceil(8), parts), 256, &mut args![args]);
        }
    }

    /// Tensor-core products of up to [`MAX_JOBS`] matrices of one format and width.
    fn linear_mma(&self, matrices: &[&CudaMatrix], mut args: args::LinearArgs) {
        let n = args.n as usize;
        let tiles: usize = matrices.iter().map(|m| m.rows().div_ceil(GEMM_TILE) * m.parts).sum();
        if n > DECODE_ROWS && tiles * n.div_ceil(GEMM_TILE) >= GEMM_BLOCKS {
            for (m, job) in matrices.iter().zip(&args.jobs) {
                let mut gemm = args::GemmArgs::zeroed();
                (gemm.m0, gemm.m1) = (m.view, m.view);
                (gemm.x, gemm.x_pitch, gemm.n) = (args.x, args.x_pitch, args.n);
                (gemm.x_offset, gemm.x_stride) = (args.x_offset, args.x_stride);
                (gemm.out, gemm.out_pitch) = (job.out, job.out_pitch);
                (gemm.packed, gemm.packed_pitch) = (job.packed, job.packed_pitch);
                (gemm.out_offset, gemm.out_stride) = (args.out_offset, args.out_stride);
                self.gemm((n.div_ceil(GEMM_TILE), m.rows().div_ceil(GEMM_TILE), m.parts), gemm);
            }
            return;
        }
        args.n_jobs = matrices.len() as u32;
        args.split = split(matrices[0].view) as u32;
        let rows_per_block = 16 * (8 / args.split as usize);
        let mut blocks = 0;
        for (m, job) in matrices.iter().zip(&mut args.jobs) {
            job.m = m.view;
            job.first_block = blocks as u32;
            blocks += m.rows().div_ceil(rows_per_block);
        }
        let (suffix, tokens) = token_tiles(n);
        let name = ["linear_mma_one", "linear_mma_1", "linear_mma_2", "linear_mma_4"][suffix];
        let grid = (n.div_ceil(tokens), blocks, matrices[0].parts);
        self.device.launch(name, grid, 256, ROWS_SHARED, &mut args![args]);
    }

    fn gemm(&self, grid: (usize, usize, usize), args: args::GemmArgs) {
        self.device.launch("gemm_mma", grid, 256, GEMM_SHARED, &mut args![args]);
    }

    /// [`CudaBackend::mlp_mma`] for prefill: a product of tiles.
    #[allow(clippy::too_many_arguments)]
    fn mlp_gemm(
        &self,
        x: &CudaBuffer,
        n: usize,
        routed: Option<(&Mlp<CudaMatrix>, &args::MoePlan, usize, usize)>,
        shared: Option<&Mlp<CudaMatrix>>,
        parts: u64,
        shared_out: u64,
    ) {
        let input = x.packed(&self.device, n);
        let both =
            |mlp: &Mlp<CudaMatrix>, rows: usize, h: u64, out: u64, plan: Option<(&args::MoePlan, usize, usize)>| {
                let (inter, hidden) = (mlp.gate.rows(), mlp.down.rows());
                let pitch = inter.next_multiple_of(64) as u32;
                let mut args = args::GemmArgs::zeroed();
                (args.m0, args.m1, args.gated) = (mlp.gate.view, mlp.up.view, 1);
                (args.x, args.x_pitch, args.n, args.x_divisor) = (input.pointer, input.pitch as u32, rows as u32, 1);
                (args.packed, args.packed_pitch) = (h, pitch);
                // Blocks of tokens: all of them, or those of an expert that gets its share.
                let (mut tiles, mut slots) = (rows.div_ceil(GEMM_TILE), 1);
                if let Some((plan, top_k, n_slots)) = plan {
                    (args.plan, args.routed, args.x_divisor) = (*plan, 1, top_k as u32);
                    (tiles, slots) = ((rows / mlp.gate.parts).div_ceil(GEMM_TILE).max(1), n_slots);
                }
                self.gemm((tiles, inter.div_ceil(GEMM_TILE / 2), slots), args);
                (args.m0, args.m1, args.gated) = (mlp.down.view, mlp.down.view, 0);
                (args.x, args.x_pitch, args.x_divisor) = (h, pitch, 1);
                (args.packed, args.packed_pitch) = (0, 0);
                (args.out, args.out_pitch) = (out, hidden as u32);
                self.gemm((tiles, hidden.div_ceil(GEMM_TILE), slots), args);
            };
        let h_bytes = |mlp: &Mlp<CudaMatrix>, rows: usize| rows * mlp.gate.rows().next_multiple_of(64) * 2;
        if let Some((experts, plan, top_k, slots)) = routed {
            let h = self.scratch("h", h_bytes(experts, n * top_k));
            both(experts, n * top_k, h, parts, Some((plan, top_k, slots)));
        }
        if let Some(shared) = shared {
            let h = self.scratch("shared_h", h_bytes(shared, n));
            both(shared, n, h, shared_out, None);
        }
    }

    fn mlp_f32(&self, x: &CudaBuffer, mlp: &Mlp<CudaMatrix>, ids: Option<(u64, usize)>, n: usize, out: u64) {
        let (inter, hidden) = (mlp.gate.rows(), mlp.down.rows());
        let (gate, up) = (self.scratch("gate", n * inter * 4), self.scratch("up", n * inter * 4));
        let (ids, top_k) = ids.unwrap_or((0, 1));
        let mut args = args::LinearF32Args::zeroed();
        (args.ids, args.x_divisor, args.n) = (ids, top_k as u32, n as u32);
        (args.x, args.x_pitch, args.out_pitch) = (x.pointer(), x.width() as u32, inter as u32);
        args.out = gate;
        self.linear_f32(&mlp.gate, 1, args);
        args.out = up;
        self.linear_f32(&mlp.up, 1, args);
        let total = (n * inter) as u64;
        self.launch("silu_mul", ((n * inter).div_ceil(256), 1, 1), 256, &mut args![gate, up, total]);
        (args.x, args.x_pitch, args.x_divisor) = (gate, inter as u32, 1);
        (args.out, args.out_pitch) = (out, hidden as u32);
        self.linear_f32(&mlp.down, 1, args);
    }

    /// Gate, up, SiLU and down of `slots` routed experts (0 for none) and a shared one. Results of pairs go to `parts`,
    /// those of the shared expert to `shared_out`.
    #[allow(clippy::too_many_arguments)]
    fn mlp_mma(
        &self,
        x: &CudaBuffer,
        n: usize,
        routed: Option<(&Mlp<CudaMatrix>, &args::MoePlan, usize, usize)>,
        shared: Option<&Mlp<CudaMatrix>>,
        parts: u64,
        shared_out: u64,
    ) {
        // Enough tokens for each expert to fill tiles; few are better served row by row.
        let per_expert = routed.map_or(n, |(experts, _, top_k, _)| n * top_k / experts.gate.parts);
        if n > DECODE_ROWS && per_expert >= GEMM_TOKENS {
            return self.mlp_gemm(x, n, routed, shared, parts, shared_out);
        }
        if n > DECODE_ROWS && routed.is_some() && shared.is_some() {
            // The shared expert serves every token, the routed ones few each.
            self.mlp_gemm(x, n, None, shared, parts, shared_out);
            return self.mlp_mma(x, n, routed, None, parts, shared_out);
        }
        let packed = x.packed(&self.device, n);
        let any = routed.map(|r| r.0).or(shared);
        let Some(any) = any else { return };
        let hidden = any.down.rows();
        let mut gate_up = args::GateUpArgs::zeroed();
        let mut down = args::DownArgs::zeroed();
        (gate_up.x, gate_up.x_pitch, gate_up.n) = (packed.pointer, packed.pitch as u32, n as u32);
        (down.out, down.shared_out, down.n, down.hidden) = (parts, shared_out, n as u32, hidden as u32);
        let (mut slots, mut top_k, mut inter) = (0, 1, 0);
        let mut columns = n;
        if let Some((experts, plan, k, n_slots)) = routed {
            (gate_up.gate, gate_up.up, down.down) = (experts.gate.view, experts.up.view, experts.down.view);
            (gate_up.plan, down.plan) = (*plan, *plan);
            (slots, top_k, inter) = (n_slots, k, experts.gate.rows());
            let pitch = inter.next_multiple_of(64);
            gate_up.h = self.scratch("h", n * top_k * pitch * 2);
            gate_up.h_pitch = pitch as u32;
            // Twice the tokens of an expert if they spread evenly; more take several rounds.
            columns = (2 * n * top_k).div_ceil(experts.gate.parts).max(2).min(n);
        }
        let mut n_y = slots;
        if let Some(shared) = shared {
            (gate_up.shared_gate, gate_up.shared_up) = (shared.gate.view, shared.up.view);
            down.shared_down = shared.down.view;
            let pitch = shared.gate.rows().next_multiple_of(64);
            gate_up.shared_h = self.scratch("shared_h", n * pitch * 2);
            gate_up.shared_h_pitch = pitch as u32;
            inter = inter.max(shared.gate.rows());
            n_y += 1;
            if routed.is_none() {
                columns = n;
            }
        }
        (down.h, down.h_pitch) = (gate_up.h, gate_up.h_pitch);
        (down.shared_h, down.shared_h_pitch) = (gate_up.shared_h, gate_up.shared_h_pitch);
        (gate_up.top_k, gate_up.slots, down.slots) = (top_k as u32, slots as u32, slots as u32);
        gate_up.split = split(any.gate.view) as u32;
        down.split = split(any.down.view) as u32;
        let (suffix, _) = token_tiles(columns);
        let name = ["moe_gate_up_one", "moe_gate_up_1", "moe_gate_up_2", "moe_gate_up_4"][suffix];
        let blocks = inter.div_ceil(8 * (8 / gate_up.split as usize));
        self.device.launch(name, (blocks, n_y, 1), 256, ROWS_SHARED, &mut args![gate_up]);
        let name = ["moe_down_one", "moe_down_1", "moe_down_2", "moe_down_4"][suffix];
        let blocks = hidden.div_ceil(16 * (8 / down.split as usize));
        self.device.launch(name, (blocks, n_y, 1), 256, ROWS_SHARED, &mut args![down]);
    }

    fn write(&self, kernel: [&'static str; 2], n: usize, threads: usize, cache: &CudaCache, mut args: args::WriteArgs) {
        args.cache = cache.memory.pointer();
        args.width = cache.width as u32;
        self.launch(kernel[usize::from(cache.bf16)], (n, 1, 1), threads, &mut args![args]);
    }

    fn attention_f32(&self, batch: &CudaBatch, cache: &CudaCache, out: &CudaBuffer, mut args: args::AttentionArgs) {
        assert!(args.key_width.max(args.value_width) as usize <= ATTENTION_MAX_WIDTH, "heads of at most 640 elements");
        let packed = out.packed_output(batch.n_rows);
        (args.out, args.packed, args.packed_pitch) = (out.pointer(), packed.pointer, packed.pitch as u32);
        args.pages = batch.pages();
        let name = ["attention_f32_f32", "attention_f32_bf16"][usize::from(cache.bf16)];
        self.launch(name, (args.n_heads as usize, batch.n_rows, 1), 128, &mut args![args]);
    }
}

/// Warps of a block of 8 that share one tile of rows: as many as leave each at least two rounds of loads. It depends on
/// the matrix alone, so that sums are added in the same order whatever the batch.
fn split(m: args::Matrix) -> usize {
    let unit = if m.format == MXFP4 { 512 } else { 256 };
    let units = m.cols.div_ceil(unit);
    [8, 4, 2].into_iter().find(|s| units % s == 0 && (units / s >= 2 || units == 2)).unwrap_or(1) as usize
}

/// Which variant of a tensor-core kernel serves `n` tokens best, and how many it takes at once.
fn token_tiles(n: usize) -> (usize, usize) {
    match n {
        0..=1 => (0, 1),
        2..=8 => (1, 8),
        9..=16 => (2, 16),
        _ => (3, 32),
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
        CudaCache { memory: self.device.alloc(n_slots * bytes), width, bf16: self.fast_numerics() }
    }

    fn cache_bytes(&self, _kind: CacheKind, width: usize) -> usize {
        width * if self.fast_numerics() { 2 } else { 4 }
    }

    fn load_matrix(&self, data: MatrixData) -> CudaMatrix {
        CudaMatrix::load(&self.device, &data)
    }

    fn load_vector(&self, values: &[f32]) -> CudaBuffer {
        self.buffer(values, values.len())
    }

    fn upload(&self, batch: Batch) -> CudaBatch {
        let (batch, moved) = self.batch_memory.borrow_mut().upload(&self.device, &batch);
        if moved {
            self.recorded.borrow_mut().clear();
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

    fn step(&self, batch: &CudaBatch, _max_context: usize, operations: &mut dyn FnMut(usize)) {
        if !self.options.graphs || batch.n_rows > DECODE_ROWS {
            return operations(batch.max_context);
        }
        let known = self.recorded.borrow_mut().remove(batch);
        let recorded = match known {
            None => {
                operations(batch.max_context);
                Recorded::Ran
            }
            Some(Recorded::Graph(graph)) => {
                self.device.replay(&graph);
                Recorded::Graph(graph)
            }
            Some(Recorded::Ran) => {
                let Some(graph) = self.device.capture(|| operations(batch.max_context)) else { return };
                self.device.replay(&graph);
                Recorded::Graph(graph)
            }
        };
        self.recorded.borrow_mut().insert(*batch, recorded);
    }

    fn embed(&self, table: &CudaMatrix, batch: &CudaBatch, out: &mut CudaBuffer) {
        out.written();
        let (tokens, to) = (batch.tokens(), out.pointer());
        self.launch("embed", (batch.n_rows, 1, 1), 256, &mut args![table.view, tokens, to]);
    }

    fn gather_logits_rows(&self, x: &CudaBuffer, batch: &CudaBatch, out: &mut CudaBuffer) {
        out.written();
        let (from, rows, to, width) = (x.pointer(), batch.logits_rows(), out.pointer(), x.width() as u32);
        self.launch("gather_rows", (batch.n_logits, 1, 1), 256, &mut args![from, rows, to, width]);
    }

    fn rms_norm(&self, x: &CudaBuffer, weight: &CudaBuffer, eps: f32, n_rows: usize, out: &mut CudaBuffer) {
        self.norm(x, None, weight, eps, n_rows, out);
    }

    fn add_rms_norm(
        &self,
        x: &mut CudaBuffer,
        y: &CudaBuffer,
        weight: &CudaBuffer,
        eps: f32,
        n_rows: usize,
        out: &mut CudaBuffer,
    ) {
        x.written();
        self.norm(x, Some(y), weight, eps, n_rows, out);
    }

    fn linear(&self, x: &CudaBuffer, n_rows: usize, outputs: &mut [(&CudaMatrix, &mut CudaBuffer)]) {
        let mut fast: Vec<&mut (&CudaMatrix, &mut CudaBuffer)> = vec![];
        for output in outputs.iter_mut() {
            if self.fast(&[output.0]) {
                fast.push(output);
                continue;
            }
            let (m, out) = output;
            let packed = out.packed_output(n_rows);
            let mut args = args::LinearF32Args::zeroed();
            (args.x, args.x_pitch, args.n) = (x.pointer(), x.width() as u32, n_rows as u32);
            (args.out, args.out_pitch) = (out.pointer(), out.width() as u32);
            (args.packed, args.packed_pitch) = (packed.pointer, packed.pitch as u32);
            self.linear_f32(m, 1, args);
        }
        // Matrices of one format and width share a launch.
        while let Some(first) = fast.first() {
            let (format, cols) = (first.0.view.format, first.0.cols());
            let mut matrices = vec![];
            let mut args = args::LinearArgs::zeroed();
            let packed = x.packed(&self.device, n_rows);
            (args.x, args.x_pitch, args.n) = (packed.pointer, packed.pitch as u32, n_rows as u32);
            fast.retain_mut(|(m, out)| {
                if matrices.len() == MAX_JOBS || m.view.format != format || m.cols() != cols {
                    return true;
                }
                let packed = out.packed_output(n_rows);
                let job = &mut args.jobs[matrices.len()];
                (job.out, job.out_pitch) = (out.pointer(), out.width() as u32);
                (job.packed, job.packed_pitch) = (packed.pointer, packed.pitch as u32);
                matrices.push(*m);
                false
            });
            self.linear_mma(&matrices, args);
        }
    }

    fn head_linear(&self, x: &CudaBuffer, from: Heads, w: &CudaMatrix, n_rows: usize, out: &mut CudaBuffer, to: Heads) {
        if self.fast(&[w]) && from.offset.is_multiple_of(8) && from.stride.is_multiple_of(8) {
            let input = x.packed(&self.device, n_rows);
            let packed = out.packed_output(n_rows);
            let mut args = args::LinearArgs::zeroed();
            (args.x, args.x_pitch, args.n) = (input.pointer, input.pitch as u32, n_rows as u32);
            (args.x_offset, args.x_stride) = (from.offset as u32, from.stride as u32);
            (args.out_offset, args.out_stride) = (to.offset as u32, to.stride as u32);
            (args.jobs[0].out, args.jobs[0].out_pitch) = (out.pointer(), out.width() as u32);
            (args.jobs[0].packed, args.jobs[0].packed_pitch) = (packed.pointer, packed.pitch as u32);
            return self.linear_mma(&[w], args);
        }
        let packed = out.packed_output(n_rows);
        let mut args = args::LinearF32Args::zeroed();
        (args.x, args.x_pitch, args.n) = (x.pointer(), x.width() as u32, n_rows as u32);
        (args.x_offset, args.x_stride) = (from.offset as u32, from.stride as u32);
        (args.out_offset, args.out_stride) = (to.offset as u32, to.stride as u32);
        (args.out, args.out_pitch) = (out.pointer(), out.width() as u32);
        (args.packed, args.packed_pitch) = (packed.pointer, packed.pitch as u32);
        self.linear_f32(w, from.n, args);
    }

    fn rope(&self, x: &CudaBuffer, from: Heads, rope: &Rope, batch: &CudaBatch, out: &mut CudaBuffer, to: Heads) {
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
        out.written();
        if self.fast(&[&mlp.gate, &mlp.up, &mlp.down]) {
            return self.mlp_mma(x, n_rows, None, Some(mlp), 0, out.pointer());
        }
        self.mlp_f32(x, mlp, None, n_rows, out.pointer());
    }

    fn router_topk(
        &self,
        logits: &CudaBuffer,
        bias: &CudaBuffer,
        routing: &Routing,
        n_rows: usize,
        ids: &mut CudaIndices,
        weights: &mut CudaBuffer,
    ) {
        assert!(logits.width() <= MAX_EXPERTS && routing.top_k <= MAX_TOP_K && routing.n_group <= 32, "{routing:?}");
        weights.written();
        let args = args::RouterArgs {
            logits: logits.pointer(),
            bias: bias.pointer(),
            ids: ids.pointer(),
            weights: weights.pointer(),
            n_experts: logits.width() as u32,
            top_k: routing.top_k as u32,
            n_group: routing.n_group as u32,
            topk_group: routing.topk_group as u32,
            normalize: routing.normalize.into(),
            scale: routing.scale,
            first_expert: routing.first_expert as u32,
            n_held: routing.n_held as u32,
        };
        self.launch("router_topk", (n_rows, 1, 1), 32, &mut args![args]);
    }

    fn moe(
        &self,
        x: &CudaBuffer,
        experts: &Mlp<CudaMatrix>,
        shared: Option<&Mlp<CudaMatrix>>,
        ids: &CudaIndices,
        weights: &CudaBuffer,
        n_rows: usize,
        out: &mut CudaBuffer,
    ) {
        out.written();
        let (top_k, hidden, n_experts) = (ids.width(), experts.down.rows(), experts.gate.parts);
        let pairs = n_rows * top_k;
        let parts = self.scratch("parts", (pairs + n_rows) * hidden * 4);
        let shared_out = parts + (pairs * hidden * 4) as u64;
        let mut matrices = vec![&experts.gate, &experts.up, &experts.down];
        matrices.extend(shared.iter().flat_map(|s| [&s.gate, &s.up, &s.down]));
        if self.fast(&matrices) {
            let slots = n_experts.min(pairs);
            if n_rows == 1 {
                // One token's experts are a plan already.
                let plan = args::MoePlan { active: ids.pointer(), ..args::MoePlan::zeroed() };
                self.mlp_mma(x, 1, Some((experts, &plan, top_k, slots)), shared, parts, shared_out);
                return self.combine(parts, shared.map(|_| shared_out), ids, weights, 1, out);
            }
            let memory = self.scratch("plan", (1 + slots + slots + 1 + pairs) * 4);
            let at = |index: usize| memory + (index * 4) as u64;
            let plan =
                args::MoePlan { n_active: at(0), active: at(1), first: at(1 + slots), sorted: at(2 + 2 * slots) };
            let args =
                args::MoePlanArgs { ids: ids.pointer(), plan, n_pairs: pairs as u32, n_experts: n_experts as u32 };
            self.launch("moe_plan", (1, 1, 1), 1024, &mut args![args]);
            self.mlp_mma(x, n_rows, Some((experts, &plan, top_k, slots)), shared, parts, shared_out);
        } else {
            self.mlp_f32(x, experts, Some((ids.pointer(), top_k)), pairs, parts);
            if let Some(shared) = shared {
                self.mlp_f32(x, shared, None, n_rows, shared_out);
            }
        }
        self.combine(parts, shared.map(|_| shared_out), ids, weights, n_rows, out);
    }

    fn write_latent(
        &self,
        kv_a: &CudaBuffer,
        norm: &CudaBuffer,
        eps: f32,
        rope: &Rope,
        batch: &CudaBatch,
        cache: &mut CudaCache,
    ) {
        let args = args::WriteArgs {
            rope: args::Rope::new(rope),
            x: kv_a.pointer(),
            norm: norm.pointer(),
            norm_bias: 0,
            cache: 0,
            slots: batch.slots(),
            positions: batch.positions(),
            x_pitch: kv_a.width() as u32,
            width: 0,
            latent: norm.width() as u32,
            eps,
        };
        self.write(["write_latent_f32", "write_latent_bf16"], batch.n_rows, 256, cache, args);
    }

    fn write_index_key(
        &self,
        k: &CudaBuffer,
        norm: &CudaBuffer,
        norm_bias: &CudaBuffer,
        eps: f32,
        rope: &Rope,
        batch: &CudaBatch,
        cache: &mut CudaCache,
    ) {
        assert!(k.width() <= 1024, "index keys of at most 1024 elements");
        let args = args::WriteArgs {
            rope: args::Rope::new(rope),
            x: k.pointer(),
            norm: norm.pointer(),
            norm_bias: norm_bias.pointer(),
            cache: 0,
            slots: batch.slots(),
            positions: batch.positions(),
            x_pitch: k.width() as u32,
            width: 0,
            latent: 0,
            eps,
        };
        self.write(["write_index_key_f32", "write_index_key_bf16"], batch.n_rows, 128, cache, args);
    }

    fn write_cache(&self, x: &CudaBuffer, batch: &CudaBatch, cache: &mut CudaCache) {
        let args = args::WriteArgs {
            rope: args::Rope::none(),
            x: x.pointer(),
            norm: 0,
            norm_bias: 0,
            cache: 0,
            slots: batch.slots(),
            positions: batch.positions(),
            x_pitch: x.width() as u32,
            width: 0,
            latent: 0,
            eps: 0.0,
        };
        self.write(["write_rows_f32", "write_rows_bf16"], batch.n_rows, 256, cache, args);
    }

    fn index_select(
        &self,
        q: &CudaBuffer,
        weights: &CudaBuffer,
        n_heads: usize,
        batch: &CudaBatch,
        cache: &CudaCache,
        selected: &mut CudaIndices,
    ) {
        let context = batch.max_context;
        let block = (SCORE_FLOATS / context).clamp(1, batch.n_rows);
        let scores = self.scratch("scores", block * context * 4);
        let mma = cache.bf16 && cache.width == 128 && n_heads.is_multiple_of(16);
        let mut args = args::IndexArgs {
            pages: batch.pages(),
            q: q.pointer(),
            weights: weights.pointer(),
            keys: cache.memory.pointer(),
            scores,
            selected: selected.pointer(),
            n_heads: n_heads as u32,
            dim: cache.width as u32,
            weights_pitch: weights.width() as u32,
            scores_pitch: context as u32,
            k: selected.width() as u32,
            row0: 0,
        };
        for first in (0..batch.n_rows).step_by(block) {
            let n = block.min(batch.n_rows - first);
            args.row0 = first as u32;
            if mma {
                self.launch("index_scores_mma", (context.div_ceil(128), n, 1), 256, &mut args![args]);
            } else {
                let name = ["index_scores_f32_f32", "index_scores_f32_bf16"][usize::from(cache.bf16)];
                self.launch(name, (context.div_ceil(64), n, 1), 256, &mut args![args]);
            }
            self.launch("index_topk", (n, 1, 1), 1024, &mut args![args]);
        }
    }

    fn mla_attention(
        &self,
        q: &CudaBuffer,
        n_heads: usize,
        latent: usize,
        scale: f32,
        batch: &CudaBatch,
        cache: &CudaCache,
        selected: Option<&CudaIndices>,
        out: &mut CudaBuffer,
    ) {
        let (n, width) = (batch.n_rows, cache.width);
        let (chosen, n_selected) = selected.map_or((0, 0), |s| (s.pointer(), s.width()));
        let tensor_cores = cache.bf16
            && width <= MLA_MAX_WIDTH
            && width.is_multiple_of(16)
            && latent <= MLA_MAX_LATENT
            && latent.is_multiple_of(8);
        if !tensor_cores {
            let mut args = args::AttentionArgs::zeroed();
            (args.q, args.keys, args.values) = (q.pointer(), cache.memory.pointer(), cache.memory.pointer());
            (args.selected, args.n_selected, args.scale) = (chosen, n_selected as u32, scale);
            (args.n_heads, args.key_width, args.value_width) = (n_heads as u32, width as u32, latent as u32);
            (args.key_pitch, args.value_pitch) = (width as u32, width as u32);
            return self.attention_f32(batch, cache, out, args);
        }
        let attended = if selected.is_some() { n_selected.min(batch.max_context) } else { batch.max_context };
        let span = if n > DECODE_ROWS {
            attended
        } else {
            DECODE_SPAN.max(attended.div_ceil(MAX_SPANS).next_multiple_of(MLA_TILE))
        };
        let n_spans = attended.div_ceil(span);
        let packed = out.packed_output(n);
        let mut args = args::MlaArgs {
            pages: batch.pages(),
            q: q.pointer(),
            cache: cache.memory.pointer(),
            selected: chosen,
            shares: 0,
            stats: 0,
            out: out.pointer(),
            packed: packed.pointer,
            n_heads: n_heads as u32,
            width: width as u32,
            latent: latent as u32,
            n_selected: n_selected as u32,
            packed_pitch: packed.pitch as u32,
            span: span as u32,
            n_spans: n_spans as u32,
            scale,
        };
        if n_spans > 1 {
            args.shares = self.scratch("shares", n * n_spans * n_heads * latent * 4);
            args.stats = self.scratch("stats", n * n_spans * n_heads * 8);
        }
        let shared = (16 + MLA_TILE) * (width + 8) * 2;
        let grid = (n_spans, n_heads.div_ceil(16), n);
        self.device.launch("mla_attention", grid, 256, shared, &mut args![args]);
        if n_spans > 1 {
            self.launch("mla_merge", (n_heads, n, 1), 128, &mut args![args]);
        }
    }

    fn gqa_attention(
        &self,
        q: &CudaBuffer,
        n_heads: usize,
        n_kv_heads: usize,
        scale: f32,
        batch: &CudaBatch,
        keys: &CudaCache,
        values: &CudaCache,
        out: &mut CudaBuffer,
    ) {
        let head = keys.width / n_kv_heads;
        let mut args = args::AttentionArgs::zeroed();
        (args.q, args.keys, args.values) = (q.pointer(), keys.memory.pointer(), values.memory.pointer());
        (args.n_heads, args.key_width, args.value_width) = (n_heads as u32, head as u32, head as u32);
        (args.key_pitch, args.value_pitch) = (keys.width as u32, values.width as u32);
        (args.heads_per_key, args.scale) = ((n_heads / n_kv_heads) as u32, scale);
        self.attention_f32(batch, keys, out, args);
    }
}

impl CudaBackend {
    /// Adds up the results of each token's experts.
    fn combine(
        &self,
        parts: u64,
        shared: Option<u64>,
        ids: &CudaIndices,
        weights: &CudaBuffer,
        n_rows: usize,
        out: &CudaBuffer,
    ) {
        let (shared, routing, pitch) = (shared.unwrap_or(0), weights.pointer(), weights.width() as u32);
        let (to, width, k, ids) = (out.pointer(), out.width() as u32, ids.width() as u32, ids.pointer());
        let grid = (out.width().div_ceil(1024), n_rows, 1);
        self.launch("moe_combine", grid, 256, &mut args![parts, shared, ids, routing, pitch, to, width, k]);
    }

    fn norm(
        &self,
        x: &CudaBuffer,
        y: Option<&CudaBuffer>,
        weight: &CudaBuffer,
        eps: f32,
        n_rows: usize,
        out: &mut CudaBuffer,
    ) {
        let packed = out.packed_output(n_rows);
        let args = args::NormArgs {
            x: x.pointer(),
            y: y.map_or(0, CudaBuffer::pointer),
            weight: weight.pointer(),
            out: out.pointer(),
            packed: packed.pointer,
            x_pitch: x.width() as u32,
            y_pitch: y.map_or(0, |y| y.width() as u32),
            out_pitch: out.width() as u32,
            packed_pitch: packed.pitch as u32,
            width: weight.width() as u32,
            eps,
        };
        let threads = (weight.width().div_ceil(4)).next_multiple_of(32).clamp(64, 1024);
        self.launch("rms_norm", (n_rows, 1, 1), threads, &mut args![args]);
    }
}
