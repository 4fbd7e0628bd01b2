//! [`Backend`] on an NVIDIA device: each operation is a few kernel launches, and a decode step is one graph.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytemuck::Zeroable;
use tandem_core::backend::{
    AddRmsNorm, Backend, CacheKind, GqaAttention, HeadLinear, Heads, IndexSelect, Linear, MlaAttention, Mlp, Moe,
    PrepareAttention, RmsNorm, Rope, RopeIndexSelect, RopeMlaAttention, Rotate, Route, RouterTopk, Routing,
    WriteIndexKey, WriteLatent, composed,
};
use tandem_core::weights::MatrixData;
use tandem_core::{Batch, Numerics};

use crate::CudaError;
use crate::args;
use crate::batch::{BatchMemory, CudaBatch, DECODE_ROWS, Sampled};
use crate::buffer::{CudaBuffer, CudaIndices};
use crate::driver::{Device, DeviceInfo, Graph, Memory};
use crate::host_experts::{HostExperts, HostMoe, OnHost};
use crate::matrix::CudaMatrix;
use crate::preamble::*;
use crate::stager::Stager;

/// Bytes that are copied to measure the memory's bandwidth.
const BANDWIDTH_BYTES: usize = 1 << 30;
/// Positions of one block of the tensor-core attention while decoding: short enough to spread one row over the device.
const DECODE_SPAN: usize = 64;
/// As many positions are faster without a second kernel that merges spans.
const ONE_SPAN: usize = 128;
/// Widest vector of the reference attention.
const ATTENTION_MAX_WIDTH: usize = 32 * ATTENTION_ELEMENTS;
/// Shared memory of the row kernels: a ring for each warp.
const ROWS_SHARED: usize = ROW_WARPS * RING * ROUND_BYTES;
/// Shared memory of gemm_wgmma: stages of bf16 tokens, a ring of tiles for two groups of rows of each of 8 warps, and what
/// aligns it.
const WGMMA_SHARED: usize = WGMMA_STAGES * GEMM_TILE * GEMM_K * 2 + 8 * WGMMA_RING * 2 * TILE_BYTES + WGMMA_ALIGNMENT;
/// Shared memory of mla_prefill: bf16 queries and two tiles of positions, shares of a tile, and what aligns it.
const PREFILL_SHARED: usize =
    (MLA_PREFILL_HEADS + 2 * MLA_TILE) * MLA_MAX_WIDTH * 2 + MLA_PREFILL_HEADS * MLA_TILE * 2 + WGMMA_ALIGNMENT;
/// Heads from which on it is faster than mla_attention.
const PREFILL_HEADS: usize = 24;
/// Tokens of an expert, on average, that are worth the larger tile.
const GEMM_TOKENS: usize = 48;
/// Blocks of gemm_mma_128 that are worth a launch; fewer leave most of the device idle.
const GEMM_BLOCKS: usize = 128;
/// Blocks of its scoring kernel that fill the device.
const INDEX_BLOCKS: usize = 528;
/// Contexts from which on a cluster of 8 blocks selects for a row, and rows up to which that is faster.
const TOPK_CLUSTER_CONTEXT: usize = 8192;
const TOPK_CLUSTER_ROWS: usize = 16;
/// Widest row that prepare_attention's 256 threads normalise.
const PREPARE_MAX_WIDTH: usize = 256 * NORM_KEPT;
/// Floats of index scores kept at once; longer prefills are scored in blocks of rows.
const SCORE_FLOATS: usize = 64 << 20;

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
    memory: Memory,
    width: usize,
    bf16: bool,
}

/// A step that has run, or has been recorded.
enum Recorded {
    /// It ran once, so that all memory it needs is there.
    Ran,
    /// To replay, in order.
    Parts(Vec<Part>),
}

/// A part of a recorded step.
enum Part {
    Graph(Graph),
    /// Experts that the host computes while the device waits.
    Host(HostMoe),
}

/// An NVIDIA device as a backend.
pub struct CudaBackend {
    // Dropped first: graphs refer to the memory below.
    recorded: RefCell<HashMap<CudaBatch, Recorded>>,
    batch_memory: RefCell<BatchMemory>,
    sampled: RefCell<Sampled>,
    scratch: RefCell<HashMap<&'static str, Memory>>,
    /// While weights are being loaded.
    stager: RefCell<Option<Stager>>,
    /// Experts that do not fit the device.
    on_host: Option<OnHost>,
    /// The parts so far, while a step is being recorded.
    recording: RefCell<Option<Vec<Part>>>,
    options: Options,
    bandwidth: Cell<Option<f64>>,
    device: Arc<Device>,
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
            recorded: RefCell::default(),
            batch_memory: RefCell::default(),
            sampled: RefCell::default(),
            scratch: RefCell::default(),
            stager: RefCell::default(),
            on_host: None,
            recording: RefCell::default(),
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

    /// Runs the operations of a step, or what was recorded of an equal one.
    fn run_or_replay(&self, batch: &CudaBatch, operations: &mut dyn FnMut(usize)) {
        if !self.options.graphs || batch.n_rows > DECODE_ROWS {
            return operations(batch.max_context);
        }
        let known = self.recorded.borrow_mut().remove(batch);
        let recorded = match known {
            None => {
                operations(batch.max_context);
                Recorded::Ran
            }
            Some(Recorded::Parts(parts)) => {
                self.replay(&parts);
                Recorded::Parts(parts)
            }
            Some(Recorded::Ran) => {
                self.recording.replace(Some(vec![]));
                self.device.begin_capture();
                operations(batch.max_context);
                let mut parts = self.recording.take().unwrap_or_default();
                let Some(graph) = self.device.end_capture() else { return };
                parts.push(Part::Graph(graph));
                self.replay(&parts);
                Recorded::Parts(parts)
            }
        };
        self.recorded.borrow_mut().insert(*batch, recorded);
    }

    fn on_hopper(&self) -> bool {
        self.options.hopper && self.device.info.hopper
    }

    fn replay(&self, parts: &[Part]) {
        for part in parts {
            match (part, &self.on_host) {
                (Part::Graph(graph), _) => self.device.replay(graph),
                (Part::Host(work), Some(on_host)) => on_host.run(&self.device, work),
                (Part::Host(_), None) => {}
            }
        }
    }

    /// [`Backend::moe`] with routed experts on the host; the shared one runs on the device.
    #[allow(clippy::too_many_arguments)]
    fn moe_on_host(
        &self,
        mlp: [usize; 3],
        x: &CudaBuffer,
        shared: Option<&Mlp<CudaMatrix>>,
        ids: &CudaIndices,
        weights: &CudaBuffer,
        n_rows: usize,
        out: &mut CudaBuffer,
    ) {
        let Some(on_host) = &self.on_host else { return };
        let sum = self.scratch("host_sum", n_rows * out.width() * 4);
        let (work, moved) = on_host.fetch(&self.device, mlp, n_rows, (x, ids, weights), sum);
        if moved {
            self.recorded.borrow_mut().clear();
        }
        if let Some(shared) = shared {
            self.mlp(x, shared, n_rows, out);
        }
        let is_recording = self.recording.borrow().is_some();
        if is_recording {
            let graph = self.device.end_capture();
            if let Some(parts) = self.recording.borrow_mut().as_mut() {
                parts.extend(graph.map(Part::Graph));
                parts.push(Part::Host(work));
            }
            self.device.begin_capture();
        } else {
            on_host.run(&self.device, &work);
        }
        let (to, bytes) = (out.pointer(), n_rows * out.width() * 4);
        if shared.is_some() {
            let n = (n_rows * out.width()) as u64;
            self.launch("add", ((n as usize).div_ceil(256), 1, 1), 256, &mut args![to, sum, n]);
        } else {
            self.device.copy(to, sum, bytes);
        }
    }

    fn in_bf16(&self) -> bool {
        self.options.numerics == Numerics::Bf16
    }

    fn tiled(&self, matrices: &[&CudaMatrix]) -> bool {
        self.in_bf16() && matrices.iter().all(|m| m.tiled.is_some())
    }

    /// True if the tensor-core kernels take this gate, up and down; gate and up pass through one kernel together.
    fn tiled_mlp(&self, mlp: &Mlp<CudaMatrix>) -> bool {
        self.tiled(&[&mlp.gate, &mlp.up, &mlp.down]) && mlp.gate.tiled == mlp.up.tiled
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
    fn linear_f32(&self, m: &CudaMatrix, parts: usize, args: args::LinearF32Args) {
        let (rows, args) = linear_f32_args(m, parts, args);
        let n = args.n as usize;
        let vectors = m.cols().is_multiple_of(8) && args.x_pitch.is_multiple_of(4);
        if n > DECODE_ROWS
            && parts == 1
            && args.ids == 0
            && m.view.format == Format::Bf16 as u32
            && vectors
            && self.in_bf16()
        {
            return self.launch("linear_split", (m.rows().div_ceil(32), n.div_ceil(32), 1), 256, &mut args![args]);
        }
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
                self.gemm(m, GEMM_TILE, (n.div_ceil(GEMM_TILE), m.rows().div_ceil(GEMM_TILE), m.parts), gemm);
            }
            return;
        }
        args.n_jobs = matrices.len() as u32;
        args.split = split(matrices[0].view) as u32;
        let rows_per_block = 16 * (ROW_WARPS / args.split as usize);
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

    /// A product with `m`, and with a second matrix of the same format if `args` says so; `tokens` of a block: GEMM_TILE or
    /// GEMM_FEW.
    fn gemm(&self, m: &CudaMatrix, tokens: usize, grid: (usize, usize, usize), args: args::GemmArgs) {
        // Its places in the input are of 32 bits.
        let small = u64::from(args.n) * u64::from(args.x_pitch) <= u64::from(u32::MAX);
        if let Some(tiled) = m.tiled.filter(|_| self.on_hopper() && tokens == GEMM_TILE && small) {
            let name = match tiled {
                Tiled::Mxfp4 => "gemm_wgmma_mxfp4",
                Tiled::Affine8 => "gemm_wgmma_affine",
            };
            return self.device.launch(name, grid, 256, WGMMA_SHARED, &mut args![args]);
        }
        let (name, stages) =
            if tokens == GEMM_TILE { ("gemm_mma_128", GEMM_STAGES) } else { ("gemm_mma_32", GEMM_FEW_STAGES) };
        // Two stages of decoded rows, and those of tokens.
        let shared = (2 * GEMM_TILE + stages * tokens) * GEMM_PITCH * 2;
        self.device.launch(name, grid, 256, shared, &mut args![args]);
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
                let (mut tokens, mut slots) = (GEMM_TILE, 1);
                let mut tiles = rows.div_ceil(tokens);
                if let Some((plan, top_k, n_slots)) = plan {
                    (args.plan, args.routed, args.x_divisor) = (*plan, 1, top_k as u32);
                    let each = rows / mlp.gate.parts;
                    tokens = if each < GEMM_TOKENS && !self.on_hopper() { GEMM_FEW } else { GEMM_TILE };
                    (tiles, slots) = (each.div_ceil(tokens).max(1), n_slots);
                }
                self.gemm(&mlp.gate, tokens, (tiles, inter.div_ceil(GEMM_TILE / 2), slots), args);
                (args.m0, args.m1, args.gated) = (mlp.down.view, mlp.down.view, 0);
                (args.x, args.x_pitch, args.x_divisor) = (h, pitch, 1);
                (args.packed, args.packed_pitch) = (0, 0);
                (args.out, args.out_pitch) = (out, hidden as u32);
                self.gemm(&mlp.down, tokens, (tiles, hidden.div_ceil(GEMM_TILE), slots), args);
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
        if n > DECODE_ROWS {
            return self.mlp_gemm(x, n, routed, shared, parts, shared_out);
        }
        let mut down = self.gate_up(x, n, routed, shared);
        (down.out, down.shared_out) = (parts, shared_out);
        if let Some((experts, ..)) = routed {
            // A warp has 16 rows.
            down.slot_blocks = experts.down.rows().div_ceil(16 * ROW_WARPS) as u32;
        }
        let slots = routed.map_or(0, |r| r.3);
        let columns = routed.map_or(n, |(experts, _, k, _)| expert_columns(n, k, experts));
        let blocks = (down.shared_blocks + down.slot_blocks * slots as u32) as usize;
        let name = ["moe_down_1", "moe_down_1", "moe_down_2", "moe_down_4"][token_tiles(columns).0];
        self.device.launch(name, (blocks, 1, 1), 256, ROWS_SHARED, &mut args![down]);
    }

    /// The same for one token, whose result goes to `out`; `weights` are those of its experts.
    fn mlp_token(
        &self,
        x: &CudaBuffer,
        routed: Option<(&Mlp<CudaMatrix>, &args::MoePlan, usize, usize)>,
        weights: u64,
        shared: Option<&Mlp<CudaMatrix>>,
        out: u64,
    ) {
        let mut down = self.gate_up(x, 1, routed, shared);
        (down.out, down.weights) = (out, weights);
        down.top_k = routed.map_or(0, |r| r.2) as u32;
        let blocks = (down.hidden as usize).div_ceil(16);
        self.device.launch("moe_down_token", (blocks, 1, 1), 256, ROWS_SHARED, &mut args![down]);
    }

    /// Gate, up and SiLU of up to 64 tokens; returns the arguments of down, but for where its results go.
    fn gate_up(
        &self,
        x: &CudaBuffer,
        n: usize,
        routed: Option<(&Mlp<CudaMatrix>, &args::MoePlan, usize, usize)>,
        shared: Option<&Mlp<CudaMatrix>>,
    ) -> args::DownArgs {
        let packed = x.packed(&self.device, n);
        let (mut gate_up, mut down) = (args::GateUpArgs::zeroed(), args::DownArgs::zeroed());
        (gate_up.x, gate_up.x_pitch, gate_up.n) = (packed.pointer, packed.pitch as u32, n as u32);
        (gate_up.top_k, gate_up.slot_blocks, gate_up.split, gate_up.shared_split) = (1, 1, 1, 1);
        (down.n, down.slot_blocks, down.split, down.shared_split) = (n as u32, 1, 1, SHARED_DOWN_SPLIT as u32);
        // A warp has 8 rows of gate and of up.
        let gate_blocks = |m: &CudaMatrix, split: usize| m.rows().div_ceil(8 * (ROW_WARPS / split)) as u32;
        let (mut slots, mut columns) = (0, n);
        if let Some((experts, plan, k, n_slots)) = routed {
            (gate_up.gate, gate_up.up, down.down) = (experts.gate.view, experts.up.view, experts.down.view);
            (gate_up.plan, down.plan) = (*plan, *plan);
            let pitch = experts.gate.rows().next_multiple_of(64);
            gate_up.h = self.scratch("h", n * k * pitch * 2);
            (gate_up.h_pitch, gate_up.top_k) = (pitch as u32, k as u32);
            let split = split(experts.gate.view);
            (gate_up.split, gate_up.slot_blocks) = (split as u32, gate_blocks(&experts.gate, split));
            (slots, columns) = (n_slots, expert_columns(n, k, experts));
            down.hidden = experts.down.rows() as u32;
        }
        if let Some(shared) = shared {
            (gate_up.shared_gate, gate_up.shared_up) = (shared.gate.view, shared.up.view);
            down.shared_down = shared.down.view;
            let pitch = shared.gate.rows().next_multiple_of(64);
            gate_up.shared_h = self.scratch("shared_h", n * pitch * 2);
            gate_up.shared_h_pitch = pitch as u32;
            let split = split(shared.gate.view);
            (gate_up.shared_split, gate_up.shared_blocks) = (split as u32, gate_blocks(&shared.gate, split));
            down.hidden = shared.down.rows() as u32;
            down.shared_blocks = shared.down.rows().div_ceil(16 * ROW_WARPS / SHARED_DOWN_SPLIT) as u32;
        }
        (down.h, down.h_pitch) = (gate_up.h, gate_up.h_pitch);
        (down.shared_h, down.shared_h_pitch) = (gate_up.shared_h, gate_up.shared_h_pitch);
        let blocks = gate_up.shared_blocks as usize + gate_up.slot_blocks as usize * slots;
        let name = ["moe_gate_up_one", "moe_gate_up_1", "moe_gate_up_2", "moe_gate_up_4"]
            [if n == 1 { 0 } else { token_tiles(columns).0.max(1) }];
        self.device.launch(name, (blocks, 1, 1), 256, ROWS_SHARED, &mut args![gate_up]);
        down
    }

    fn write(&self, kernel: [&'static str; 2], n: usize, threads: usize, cache: &CudaCache, mut args: args::WriteArgs) {
        args.cache = cache.memory.pointer();
        args.width = cache.width as u32;
        self.launch(kernel[usize::from(cache.bf16)], (n, 1, 1), threads, &mut args![args]);
    }

    fn attention_f32(&self, batch: &CudaBatch, cache: &CudaCache, out: &CudaBuffer, mut args: args::AttentionArgs) {
        assert!(
            args.key_width.max(args.value_width) as usize <= ATTENTION_MAX_WIDTH,
            "heads of at most {ATTENTION_MAX_WIDTH} elements"
        );
        let packed = out.packed_output(batch.n_rows);
        (args.out, args.packed, args.packed_pitch) = (out.pointer(), packed.pointer, packed.pitch as u32);
        args.pages = batch.pages();
        let name = ["attention_f32_f32", "attention_f32_bf16"][usize::from(cache.bf16)];
        self.launch(name, (args.n_heads as usize, batch.n_rows, 1), 128, &mut args![args]);
    }
}

/// Twice the tokens of an expert if they spread evenly; more take several rounds.
fn expert_columns(n: usize, top_k: usize, experts: &Mlp<CudaMatrix>) -> usize {
    (2 * n * top_k).div_ceil(experts.gate.parts).max(2).min(n)
}

/// Warps of a block of 8 that share one tile of rows: as many as leave each at least two pairs of rounds. It depends on
/// the matrix alone, so that sums are added in the same order whatever the batch.
fn split(m: args::Matrix) -> usize {
    let pairs = (m.row_bytes as usize / TILE_BYTES).div_ceil(2);
    [8, 4, 2].into_iter().find(|s| pairs.is_multiple_of(*s) && (pairs / s >= 2 || pairs == 2)).unwrap_or(1)
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
        let RmsNorm { x, weight, eps, n_rows, out } = op;
        self.norm(x, None, weight, eps, n_rows, out);
    }

    fn add_rms_norm(&self, op: AddRmsNorm<'_, CudaBuffer>) {
        let AddRmsNorm { x, y, weight, eps, n_rows, out } = op;
        x.written();
        if let Some(sum) = y.pending.take() {
            let args = norm_args(x, Some(y), weight, eps, n_rows, out);
            let threads = weight.width().div_ceil(8).next_multiple_of(32);
            return self.launch("all_reduce_norm", (n_rows, 1, 1), threads, &mut args![sum, args]);
        }
        self.norm(x, Some(y), weight, eps, n_rows, out);
    }

    fn linear(&self, op: Linear<'_, CudaBuffer, CudaMatrix>) {
        let Linear { x, n_rows, outputs, .. } = op;
        let mut tiled: Vec<&mut (&CudaMatrix, &mut CudaBuffer)> = vec![];
        for output in outputs.iter_mut() {
            if self.tiled(&[output.0]) {
                tiled.push(output);
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
        while let Some(first) = tiled.first() {
            let (format, cols) = (first.0.view.format, first.0.cols());
            let mut matrices = vec![];
            let mut args = args::LinearArgs::zeroed();
            let packed = x.packed(&self.device, n_rows);
            (args.x, args.x_pitch, args.n) = (packed.pointer, packed.pitch as u32, n_rows as u32);
            tiled.retain_mut(|(m, out)| {
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

    fn head_linear(&self, op: HeadLinear<'_, CudaBuffer, CudaMatrix>) {
        let HeadLinear { x, from, w, n_rows, out, to } = op;
        if self.tiled(&[w]) && from.offset.is_multiple_of(8) && from.stride.is_multiple_of(8) {
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
        out.written();
        if self.tiled_mlp(mlp) {
            return match n_rows {
                1 => self.mlp_token(x, None, 0, Some(mlp), out.pointer()),
                _ => self.mlp_mma(x, n_rows, None, Some(mlp), 0, out.pointer()),
            };
        }
        self.mlp_f32(x, mlp, None, n_rows, out.pointer());
    }

    fn router_topk(&self, op: RouterTopk<'_, CudaBuffer, CudaIndices>) {
        let RouterTopk { logits, bias, routing, n_rows, ids, weights } = op;
        let args = router_args(logits, bias, routing, ids, weights);
        self.launch("router_topk", (n_rows, 1, 1), 32, &mut args![args]);
    }

    fn moe(&self, op: Moe<'_, CudaBuffer, CudaIndices, CudaMatrix>) {
        let Moe { x, experts, shared, ids, weights, n_rows, out } = op;
        out.written();
        if let [Some(gate), Some(up), Some(down)] = [&experts.gate, &experts.up, &experts.down].map(|m| m.on_host) {
            return self.moe_on_host([gate, up, down], x, shared, ids, weights, n_rows, out);
        }
        let (top_k, hidden, n_experts) = (ids.width(), experts.down.rows(), experts.gate.parts);
        let pairs = n_rows * top_k;
        let tiled = self.tiled_mlp(experts) && shared.is_none_or(|shared| self.tiled_mlp(shared));
        if tiled && n_rows == 1 {
            // One token's experts are a plan already.
            let plan = args::MoePlan { active: ids.pointer(), ..args::MoePlan::zeroed() };
            return self.mlp_token(x, Some((experts, &plan, top_k, top_k)), weights.pointer(), shared, out.pointer());
        }
        let parts = self.scratch("parts", (pairs + n_rows) * hidden * 4);
        let shared_out = parts + (pairs * hidden * 4) as u64;
        if tiled {
            let slots = n_experts.min(pairs);
            let memory = self.scratch("plan", (1 + slots + slots + 1 + pairs) * 4);
            let at = |index: usize| memory + (index * 4) as u64;
            let plan =
                args::MoePlan { n_active: at(0), active: at(1), first: at(1 + slots), sorted: at(2 + 2 * slots) };
            let args = args::MoePlanArgs {
                ids: ids.pointer(),
                n_active: plan.n_active,
                active: plan.active,
                first: plan.first,
                sorted: plan.sorted,
                n_pairs: pairs as u32,
                n_experts: n_experts as u32,
            };
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

    fn write_latent(&self, op: WriteLatent<'_, CudaBuffer, CudaBatch, CudaCache>) {
        let WriteLatent { kv_a, norm, eps, rope, batch, cache } = op;
        let args = latent_args(kv_a, norm, eps, rope, batch);
        self.write(["write_latent_f32", "write_latent_bf16"], batch.n_rows, 256, cache, args);
    }

    fn write_index_key(&self, op: WriteIndexKey<'_, CudaBuffer, CudaBatch, CudaCache>) {
        let WriteIndexKey { k, norm, norm_bias, eps, rope, batch, cache } = op;
        let args = index_key_args(k, norm, norm_bias, eps, rope, batch);
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

    fn index_select(&self, op: IndexSelect<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        self.index(op, args::Rope::none());
    }

    fn mla_attention(&self, op: MlaAttention<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        self.mla(op, None);
    }

    fn gqa_attention(&self, op: GqaAttention<'_, CudaBuffer, CudaBatch, CudaCache>) {
        let GqaAttention { q, n_heads, n_kv_heads, scale, batch, keys, values, out } = op;
        let head = keys.width / n_kv_heads;
        let mut args = args::AttentionArgs::zeroed();
        (args.q, args.keys, args.values) = (q.pointer(), keys.memory.pointer(), values.memory.pointer());
        (args.n_heads, args.key_width, args.value_width) = (n_heads as u32, head as u32, head as u32);
        (args.key_pitch, args.value_pitch) = (keys.width as u32, values.width as u32);
        (args.heads_per_key, args.scale) = ((n_heads / n_kv_heads) as u32, scale);
        self.attention_f32(batch, keys, out, args);
    }

    fn prepare_attention(&self, op: PrepareAttention<'_, CudaBuffer, CudaBatch, CudaCache>) {
        let n_rows = op.latent.batch.n_rows;
        let wide = op.query.as_ref().is_some_and(|q| q.weight.width() > PREPARE_MAX_WIDTH);
        if n_rows > DECODE_ROWS || wide {
            return composed::prepare_attention(self, op);
        }
        let to = |mut args: args::WriteArgs, cache: &CudaCache| {
            (args.cache, args.width) = (cache.memory.pointer(), cache.width as u32);
            args
        };
        let PrepareAttention { query, latent, key } = op;
        let name = ["prepare_attention_f32", "prepare_attention_bf16"][usize::from(latent.cache.bf16)];
        let latent = to(latent_args(latent.kv_a, latent.norm, latent.eps, latent.rope, latent.batch), latent.cache);
        let mut args = args::PrepareArgs { query: args::NormArgs::zeroed(), latent, key: latent };
        let mut jobs = 1;
        if let Some(RmsNorm { x, weight, eps, n_rows, out }) = query {
            args.query = norm_args(x, None, weight, eps, n_rows, out);
            jobs = 2;
        }
        if let Some(WriteIndexKey { k, norm, norm_bias, eps, rope, batch, cache }) = key {
            args.key = to(index_key_args(k, norm, norm_bias, eps, rope, batch), cache);
            jobs = 3;
        }
        self.launch(name, (n_rows, jobs, 1), 256, &mut args![args]);
    }

    fn rope_index_select(&self, op: RopeIndexSelect<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        let whole = op.heads == Heads::packed(op.heads.n, op.cache.width);
        let alone =
            whole && self.scores_on_tensor_cores(op.heads.n, op.cache) && op.rope.inv_freq.len().is_multiple_of(8);
        if op.batch.n_rows > DECODE_ROWS || !alone {
            return composed::rope_index_select(self, op);
        }
        let RopeIndexSelect { q, heads, rope, weights, batch, cache, selected, .. } = op;
        self.index(IndexSelect { q, weights, n_heads: heads.n, batch, cache, selected }, args::Rope::new(rope));
    }

    fn rope_mla_attention(&self, op: RopeMlaAttention<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>) {
        let vectors = [op.from.offset, op.from.stride, op.rope.inv_freq.len()].iter().all(|v| v.is_multiple_of(8));
        if op.batch.n_rows > DECODE_ROWS || !vectors || !attends_on_tensor_cores(op.cache, op.latent) {
            return composed::rope_mla_attention(self, op);
        }
        let RopeMlaAttention { x, from, rope, q, latent, scale, batch, cache, selected, out } = op;
        let attention = MlaAttention { q, n_heads: from.n, latent, scale, batch, cache, selected, out };
        self.mla(attention, Some((x, from, rope)));
    }

    fn route(&self, op: Route<'_, CudaBuffer, CudaIndices, CudaMatrix>) {
        if op.n_rows > DECODE_ROWS || self.tiled(&[op.gate]) {
            return composed::route(self, op);
        }
        let Route { x, gate, bias, routing, n_rows, logits, ids, weights } = op;
        logits.written();
        let ticket = self.scratch("ticket", 4);
        let mut linear = args::LinearF32Args::zeroed();
        (linear.x, linear.x_pitch, linear.n) = (x.pointer(), x.width() as u32, n_rows as u32);
        (linear.out, linear.out_pitch) = (logits.pointer(), logits.width() as u32);
        let (rows, linear) = linear_f32_args(gate, 1, linear);
        let args = router_args(logits, bias, routing, ids, weights);
        let (name, tokens) = if n_rows == 1 { ("route_1", 1) } else { ("route_8", n_rows.div_ceil(8)) };
        self.launch(name, (rows, tokens, 1), 256, &mut args![linear, args, ticket]);
    }
}

/// True if mla_attention.cu takes this shape.
fn attends_on_tensor_cores(cache: &CudaCache, latent: usize) -> bool {
    cache.bf16
        && cache.width <= MLA_MAX_WIDTH
        && cache.width.is_multiple_of(16)
        && latent <= MLA_MAX_LATENT
        && latent.is_multiple_of(8)
}

fn router_args(
    logits: &CudaBuffer,
    bias: &CudaBuffer,
    routing: &Routing,
    ids: &CudaIndices,
    weights: &CudaBuffer,
) -> args::RouterArgs {
    assert!(
        logits.width() <= MAX_EXPERTS && routing.top_k <= MAX_TOP_K && routing.n_group <= MAX_GROUPS,
        "{routing:?}"
    );
    weights.written();
    args::RouterArgs {
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
    }
}

/// Arguments of a single-precision product, of which `args` lacks what follows from the matrix, and blocks of rows.
fn linear_f32_args(m: &CudaMatrix, parts: usize, mut args: args::LinearF32Args) -> (usize, args::LinearF32Args) {
    args.m = m.view;
    args.x_divisor = args.x_divisor.max(1);
    // Few rows: several warps share each, whatever the batch, so that sums are added in the same order.
    args.split = match m.rows() * parts {
        0..2048 => 8,
        2048..8192 => 2,
        _ => 1,
    };
    (m.rows().div_ceil(8 / args.split as usize), args)
}

fn latent_args(kv_a: &CudaBuffer, norm: &CudaBuffer, eps: f32, rope: &Rope, batch: &CudaBatch) -> args::WriteArgs {
    args::WriteArgs {
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
    }
}

fn index_key_args(
    k: &CudaBuffer,
    norm: &CudaBuffer,
    norm_bias: &CudaBuffer,
    eps: f32,
    rope: &Rope,
    batch: &CudaBatch,
) -> args::WriteArgs {
    assert!(k.width() <= MAX_INDEX_KEY, "index keys of at most {MAX_INDEX_KEY} elements");
    args::WriteArgs { norm_bias: norm_bias.pointer(), latent: 0, ..latent_args(k, norm, eps, rope, batch) }
}

fn norm_args(
    x: &CudaBuffer,
    y: Option<&CudaBuffer>,
    weight: &CudaBuffer,
    eps: f32,
    n_rows: usize,
    out: &CudaBuffer,
) -> args::NormArgs {
    let packed = out.packed_output(n_rows);
    args::NormArgs {
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
    }
}

impl CudaBackend {
    /// Attention over latents; with `rotated`, the heads' last elements are read from there and rotated on their way in.
    fn mla(
        &self,
        op: MlaAttention<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>,
        rotated: Option<(&CudaBuffer, Heads, &Rope)>,
    ) {
        let MlaAttention { q, n_heads, latent, scale, batch, cache, selected, out } = op;
        let (n, width) = (batch.n_rows, cache.width);
        let (chosen, n_selected) = selected.map_or((0, 0), |s| (s.pointer(), s.width()));
        if !attends_on_tensor_cores(cache, latent) {
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
        } else if attended <= ONE_SPAN {
            ONE_SPAN
        } else {
            DECODE_SPAN.max(attended.div_ceil(MLA_MAX_SPANS).next_multiple_of(MLA_TILE))
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
            rotated_pitch: 0,
            rotated_stride: 0,
            rotated: 0,
            rope: rotated.map_or(args::Rope::none(), |(_, _, rope)| args::Rope::new(rope)),
        };
        if let Some((x, from, _)) = rotated {
            (args.rotated_pitch, args.rotated_stride) = (x.width() as u32, from.stride as u32);
            args.rotated = x.pointer() + (from.offset * 4) as u64;
        }
        let whole = (width, latent) == (MLA_MAX_WIDTH, MLA_MAX_LATENT) && n_spans == 1 && args.rotated == 0;
        if n > DECODE_ROWS && whole && n_heads >= PREFILL_HEADS && self.on_hopper() {
            let grid = (1, n_heads.div_ceil(MLA_PREFILL_HEADS), n);
            return self.device.launch("mla_prefill", grid, 256, PREFILL_SHARED, &mut args![args]);
        }
        if n_spans > 1 {
            args.shares = self.scratch("shares", n * n_spans * n_heads * latent * 4);
            args.stats = self.scratch("stats", n * n_spans * n_heads * 8);
        }
        let shared = (MLA_HEADS + MLA_TILE) * (width + 8) * 2;
        let grid = (n_spans, n_heads.div_ceil(MLA_HEADS), n);
        self.device.launch("mla_attention", grid, 256, shared, &mut args![args]);
        if n_spans > 1 {
            self.launch("mla_merge", (n_heads, n, 1), 512, &mut args![args]);
        }
    }

    fn scores_on_tensor_cores(&self, n_heads: usize, cache: &CudaCache) -> bool {
        cache.bf16 && cache.width <= INDEX_MAX_DIM && cache.width.is_multiple_of(32) && n_heads <= INDEX_MAX_HEADS
    }

    /// Scores and selection; queries are rotated by `rope` first, which only the tensor-core kernel does.
    fn index(&self, op: IndexSelect<'_, CudaBuffer, CudaIndices, CudaBatch, CudaCache>, rope: args::Rope) {
        let IndexSelect { q, weights, n_heads, batch, cache, selected } = op;
        let context = batch.max_context;
        let block = (SCORE_FLOATS / context).clamp(1, batch.n_rows);
        let scores = self.scratch("scores", block * context * 4);
        let mma = self.scores_on_tensor_cores(n_heads, cache);
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
            rope,
        };
        for first in (0..batch.n_rows).step_by(block) {
            let n = block.min(batch.n_rows - first);
            args.row0 = first as u32;
            if mma {
                // Blocks keep the queries for all their positions.
                let blocks = context.div_ceil(INDEX_TILE).min((INDEX_BLOCKS / n).max(1));
                self.launch("index_scores_mma", (blocks, n, 1), 256, &mut args![args]);
            } else {
                let name = ["index_scores_f32_f32", "index_scores_f32_bf16"][usize::from(cache.bf16)];
                self.launch(name, (context.div_ceil(INDEX_F32_TILE), n, 1), 256, &mut args![args]);
            }
            if context > TOPK_CLUSTER_CONTEXT && n <= TOPK_CLUSTER_ROWS {
                self.launch("index_topk_8", (TOPK_CLUSTER * n, 1, 1), 1024, &mut args![args]);
            } else {
                self.launch("index_topk_1", (n, 1, 1), 1024, &mut args![args]);
            }
        }
    }

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
        let args = norm_args(x, y, weight, eps, n_rows, out);
        let threads = weight.width().div_ceil(8).next_multiple_of(32).clamp(64, 1024);
        self.launch("rms_norm", (n_rows, 1, 1), threads, &mut args![args]);
    }
}
