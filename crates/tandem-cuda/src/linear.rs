//! Products with matrices: one or several on an input, one per head; for decoding, prefill and any format.

use bytemuck::Zeroable;
use tandem_core::backend::{HeadLinear, Linear};

use crate::CudaBackend;
use crate::args;
use crate::batch::DECODE_ROWS;
use crate::buffer::CudaBuffer;
use crate::matrix::CudaMatrix;
use crate::preamble::*;

/// Shared memory of gemm_wgmma: stages of bf16 tokens, a ring of tiles for two groups of rows of each of 8 warps, and what
/// aligns it.
const WGMMA_SHARED: usize = WGMMA_STAGES * GEMM_TILE * GEMM_K * 2 + 8 * WGMMA_RING * 2 * TILE_BYTES + WGMMA_ALIGNMENT;
/// Blocks of gemm_mma_128 that are worth a launch; fewer leave most of the device idle.
const GEMM_BLOCKS: usize = 128;

impl CudaBackend {
    pub(crate) fn enqueue_linear(&self, op: Linear<'_, CudaBuffer, CudaMatrix>) {
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

    pub(crate) fn enqueue_head_linear(&self, op: HeadLinear<'_, CudaBuffer, CudaMatrix>) {
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
            // What came before the indexer is there when its last kernel starts, and nothing here depends on the indexer.
            args.x_is_there = self.device.last_launch().starts_with("index_topk").into();
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

    /// Single-precision products; `args` lacks what follows from the matrix.
    pub(crate) fn linear_f32(&self, m: &CudaMatrix, parts: usize, args: args::LinearF32Args) {
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
    pub(crate) fn gemm(&self, m: &CudaMatrix, tokens: usize, grid: (usize, usize, usize), args: args::GemmArgs) {
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
        self.device.launch(name, grid, 256, gemm_shared(tokens, stages), &mut args![args]);
    }
}

/// Arguments of a single-precision product, of which `args` lacks what follows from the matrix, and blocks of rows.
pub(crate) fn linear_f32_args(
    m: &CudaMatrix,
    parts: usize,
    mut args: args::LinearF32Args,
) -> (usize, args::LinearF32Args) {
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

/// Warps of a block of 8 that share one tile of rows: as many as leave each at least two pairs of rounds. It depends on
/// the matrix alone, so that sums are added in the same order whatever the batch.
pub(crate) fn split(m: args::Matrix) -> usize {
    let pairs = (m.row_bytes as usize / TILE_BYTES).div_ceil(2);
    [8, 4, 2].into_iter().find(|s| pairs.is_multiple_of(*s) && (pairs / s >= 2 || pairs == 2)).unwrap_or(1)
}

/// Which variant of a tensor-core kernel serves `n` tokens best, and how many it takes at once.
pub(crate) fn token_tiles(n: usize) -> (usize, usize) {
    match n {
        0..=1 => (0, 1),
        2..=8 => (1, 8),
        9..=16 => (2, 16),
        _ => (3, 32),
    }
}
