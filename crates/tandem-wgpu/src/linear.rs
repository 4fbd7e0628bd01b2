//! Products with matrices: [`tandem_core::Backend`]'s linear, head_linear, mlp and moe.
//!
//! Up to [`EXACT_ROWS`] rows, kernels read the rows of a matrix for a few rows of x at a time, and add up in an order that does
//! not depend on how many there are (segments.wgsl); above, tiles.

use std::sync::Arc;

use tandem_core::backend::{EXACT_ROWS, Heads, Mlp};

use crate::args::{Args, CombineArgs, HalfArgs, MatrixArgs, PlanArgs, RowArgs, SeveralArgs};
use crate::backend::{Tiles, WgpuBackend};
use crate::buffer::{Memory, WgpuBuffer, WgpuIndices};
use crate::device::WORKGROUP;
use crate::matrix::{Chunk, SEGMENT_ELEMENTS, WgpuMatrix};
use crate::pipelines::{MAX_EXPERTS, Pipeline};
use crate::recorder::Cost;
use crate::template::Defines;

/// Rows of x that share the decoding of a weight, in the kernels for few rows.
const TOKENS: usize = 4;
/// Accumulators of a thread in these kernels: rows of the matrix times rows of x.
const SUMS: usize = 16;
/// Groups of threads that share a row, at most.
const MOST_SPLIT: usize = 4;
/// Sums of segments that the threads of a workgroup exchange, at most.
const SHARED_SUMS: usize = 448;
/// Most matrices of linear_several.
const SEVERAL: usize = 3;
/// Rows of a tile of linear_tiles.
const TILE_ROWS: usize = 128;
/// Columns to a multiple of which rows in half precision are padded: those of any step.
const HALF_PADDING: usize = 64;
/// Slots of a tile of routed experts.
const ROUTED_TILE: usize = 32;
/// Bytes that the products of routed experts may take at once; longer batches go in parts.
const ROUTED_BYTES: usize = 112 << 20;

/// A slice of every row of a buffer, and the distance of the slices of a stack's matrices.
#[derive(Clone, Copy)]
struct View {
    pitch: usize,
    offset: usize,
    stride: usize,
}

impl View {
    fn whole(buffer: &WgpuBuffer) -> View {
        View { pitch: buffer.width, offset: 0, stride: 0 }
    }

    fn heads(buffer: &WgpuBuffer, heads: Heads) -> View {
        View { pitch: buffer.width, offset: heads.offset, stride: heads.stride }
    }

    /// True if its rows can be read four elements at a time.
    fn is_aligned(self) -> bool {
        self.pitch.is_multiple_of(4) && self.offset.is_multiple_of(4) && self.stride.is_multiple_of(4)
    }
}

/// Experts of each row.
#[derive(Clone, Copy)]
pub(crate) struct Choices<'a> {
    pub(crate) ids: &'a WgpuIndices,
    pub(crate) weights: &'a WgpuBuffer,
}

impl WgpuBackend {
    /// `out = x . w^T`
    pub(crate) fn product(&self, x: &WgpuBuffer, w: &WgpuMatrix, n_rows: usize, out: &WgpuBuffer) {
        self.products(&x.memory, View::whole(x), w, n_rows, &out.memory, View::whole(out));
    }

    /// Head `h` of `out` is head `h` of `x` times matrix `h` of the stack.
    pub(crate) fn products_by_head(
        &self,
        (x, from): (&WgpuBuffer, Heads),
        w: &WgpuMatrix,
        n_rows: usize,
        (out, to): (&WgpuBuffer, Heads),
    ) {
        self.products(&x.memory, View::heads(x, from), w, n_rows, &out.memory, View::heads(out, to));
    }

    fn products(&self, x: &Memory, from: View, w: &WgpuMatrix, n: usize, y: &Memory, to: View) {
        let tile = if n <= EXACT_ROWS { None } else { Some(self.tile((x, from), &[w], n, None)) };
        for chunk in &w.chunks {
            let mut args = matrix_args(w, chunk, from, to, n);
            args.x_offset += (chunk.parts.start * from.stride) as u32;
            args.y_offset += (chunk.parts.start * to.stride) as u32;
            let buffers = [&chunk.weight, chunk.scales(), x, y];
            let cost = cost(w, chunk.rows.len() * chunk.parts.len(), n);
            if let Some(tile) = &tile {
                self.run_tile(tile, (w, chunk), None, args, y, cost);
                continue;
            }
            let shape = self.rows_shape(RowsKernel::Linear, w, n, chunk.rows.len(), chunk.parts.len());
            let pipeline = self.rows_kernel::<MatrixArgs>("linear_rows", RowsKernel::Linear, w, from, &shape);
            let grid = [shape.blocks(chunk.rows.len()), n.div_ceil(shape.tokens), chunk.parts.len()];
            self.run(&pipeline, &buffers, &args, grid, cost);
        }
    }

    /// `out = x . w^T` for several matrices: those of one format go together, so that the short ones do not wait for each
    /// other.
    pub(crate) fn linear_of(&self, x: &WgpuBuffer, outputs: &mut [(&WgpuMatrix, &mut WgpuBuffer)], n: usize) {
        let buffers = self.device.info.max_storage_buffers as usize;
        let most = SEVERAL.min(buffers.saturating_sub(1) / 3);
        let mut done = vec![false; outputs.len()];
        for i in 0..outputs.len() {
            if std::mem::replace(&mut done[i], true) {
                continue;
            }
            let mut together = vec![i];
            for j in i + 1..outputs.len() {
                let (first, other) = (outputs[i].0, outputs[j].0);
                let fits = n <= EXACT_ROWS && first.chunks.len() == 1 && other.chunks.len() == 1;
                let alike = first.format == other.format && first.cols == other.cols && first.parts == 1;
                if fits && alike && !done[j] && together.len() < most {
                    done[j] = true;
                    together.push(j);
                }
            }
            if let [only] = together[..] {
                self.product(x, outputs[only].0, n, outputs[only].1);
            } else {
                let group: Vec<(&WgpuMatrix, &WgpuBuffer)> =
                    together.iter().map(|o| (outputs[*o].0, &*outputs[*o].1)).collect();
                self.several(x, &group, n);
            }
        }
    }

    fn several(&self, x: &WgpuBuffer, outputs: &[(&WgpuMatrix, &WgpuBuffer)], n: usize) {
        let (from, w) = (View::whole(x), outputs[0].0);
        let all_rows = outputs.iter().map(|(w, _)| w.rows).sum();
        let kind = RowsKernel::Several { outputs: outputs.len() };
        let shape = self.rows_shape(kind, w, n, all_rows, 1);
        let pipeline = self.rows_kernel::<SeveralArgs>("linear_several", kind, w, from, &shape);
        let mut first = 0;
        let places: Vec<[u32; 4]> = (0..SEVERAL)
            .map(|o| {
                let Some((w, y)) = outputs.get(o) else { return [0; 4] };
                let place = [first as u32, shape.blocks(w.rows) as u32, w.rows as u32, y.width as u32];
                first += shape.blocks(w.rows);
                place
            })
            .collect();
        let post = |o: usize| outputs.get(o).map_or(1.0, |(w, _)| w.post());
        let ([first_0, blocks_0, rows_0, y_pitch_0], [first_1, blocks_1, rows_1, y_pitch_1]) = (places[0], places[1]);
        let [first_2, blocks_2, rows_2, y_pitch_2] = places[2];
        let args = SeveralArgs {
            base: 0,
            units: w.units as u32,
            cols: w.cols as u32,
            scale_pitch: w.scale_pitch as u32,
            x_pitch: from.pitch as u32,
            x_offset: 0,
            n_tokens: n as u32,
            first_0,
            blocks_0,
            rows_0,
            y_pitch_0,
            post_0: post(0),
            first_1,
            blocks_1,
            rows_1,
            y_pitch_1,
            post_1: post(1),
            first_2,
            blocks_2,
            rows_2,
            y_pitch_2,
            post_2: post(2),
        };
        let mut buffers = vec![&x.memory];
        for (w, y) in outputs {
            buffers.extend([&w.chunks[0].weight, w.chunks[0].scales(), &y.memory]);
        }
        self.run(&pipeline, &buffers, &args, [first, n.div_ceil(shape.tokens), 1], cost(w, all_rows, n));
    }

    /// How a kernel divides `rows` rows of a matrix for `n` rows of x, which `times` such dispatches at once read.
    fn rows_shape(&self, kind: RowsKernel, w: &WgpuMatrix, n: usize, rows: usize, times: usize) -> RowsShape {
        let lanes = self.pipelines.lanes.n as usize;
        let groups = WORKGROUP as usize / lanes;
        let segment = SEGMENT_ELEMENTS / w.format.unit() * lanes;
        let segments = w.units.div_ceil(segment).max(1);
        let (tokens, matrices, most_rows) = match kind {
            RowsKernel::Linear | RowsKernel::Several { .. } => (n.next_power_of_two(), 1, self.tuning.most_rows),
            RowsKernel::GateUp { routed: false } => (n.next_power_of_two(), 2, self.tuning.most_gate_rows),
            RowsKernel::GateUp { routed: true } => (1, 2, self.tuning.most_gate_rows),
            RowsKernel::Down { .. } => (1, 1, self.tuning.most_rows),
        };
        // Segments of x that fit workgroup memory.
        let staged = (self.tuning.staged_vectors * 4 / (SEGMENT_ELEMENTS * lanes)).max(1);
        let tokens = tokens.min(TOKENS).min(power_of_two_below(staged));
        let blocks = |rows_at_once: usize| rows.div_ceil(rows_at_once) * times * n.div_ceil(tokens);
        let fits = |split: usize| {
            let parts = if matches!(kind, RowsKernel::Down { .. }) { split } else { segments };
            split * tokens <= staged && parts * (groups / split) * tokens * matrices <= SHARED_SUMS
        };
        // Long rows keep a thread busy; where a row is one segment, or rows of x share it, it takes more of them at once.
        let mut shape = RowsShape { tokens, rows: 1, split: 1, teams: groups, segment, segments };
        if segments == 1 || tokens > 1 {
            let plenty = if segments == 1 { 3 * self.tuning.enough_groups } else { self.tuning.enough_groups };
            let choices = [4, 2].into_iter().filter(|r| *r <= most_rows && r * tokens * matrices <= SUMS);
            shape.rows = choices.into_iter().find(|r| blocks(groups * r) >= plenty).unwrap_or(1);
        }
        let most_split = segments.next_power_of_two().min(MOST_SPLIT).min(groups);
        while shape.rows == 1
            && shape.split < most_split
            && fits(shape.split * 2)
            && blocks(groups / shape.split) < self.tuning.enough_groups
        {
            shape.split *= 2;
        }
        shape.teams = groups / shape.split;
        shape
    }

    fn rows_kernel<A: Args>(
        &self,
        shader: &'static str,
        kind: RowsKernel,
        w: &WgpuMatrix,
        from: View,
        shape: &RowsShape,
    ) -> Arc<Pipeline> {
        let aligned = from.is_aligned() && w.cols.is_multiple_of(w.format.unit());
        let routed = kind == RowsKernel::GateUp { routed: true };
        let adds = matches!(kind, RowsKernel::Down { adds: true });
        let outputs = if let RowsKernel::Several { outputs } = kind { outputs } else { 1 };
        let RowsShape { tokens, rows, split, .. } = *shape;
        // Only sums that are exchanged need to know how many there are.
        let segments = if split > 1 { shape.segments } else { 1 };
        assert!(segments < 1 << 16, "{shape:?}");
        let flags = u64::from(aligned) | u64::from(routed) << 1 | u64::from(adds) << 2 | (outputs as u64) << 3;
        let powers = [tokens, rows, split].iter().fold(0, |all, n| all << 4 | u64::from(n.ilog2()));
        let variant = w.format.number() | flags << 16 | powers << 24 | (segments as u64) << 40;
        self.pipelines.get::<A>(shader, variant, |d| {
            w.format.define(d);
            shape.define(w.format.unit(), d);
            define(
                d,
                &[("ALIGNED", aligned.into()), ("ROUTED", routed.into()), ("ADD", adds.into()), ("OUTPUTS", outputs)],
            );
        })
    }

    /// How products of many rows of x with matrices of one format run; rows in half precision are made here.
    fn tile<'a>(
        &self,
        x: (&'a Memory, View),
        matrices: &[&WgpuMatrix],
        n: usize,
        plan: Option<Planned<'a>>,
    ) -> Tile<'a> {
        let halves = self.halves(x, matrices, n);
        let tokens = match (plan, &halves) {
            (Some(_), _) => ROUTED_TILE,
            (None, Some(_)) if !self.device.cooperative => 32,
            (None, _) => tile_tokens(n),
        };
        let blocks = plan.map_or(n.div_ceil(tokens), |plan| plan.most_tiles);
        Tile { x: x.0, from: x.1, halves, tokens, blocks, plan: plan.map(|plan| plan.memory) }
    }

    /// The rows of x in half precision, if this product is to have them.
    fn halves(&self, (x, from): (&Memory, View), matrices: &[&WgpuMatrix], n: usize) -> Option<Halves> {
        let w = matrices[0];
        let exponent = matrices.iter().map(|w| w.to_half()).min().flatten()?;
        let parts = match self.tiles {
            Tiles::Single | Tiles::Fitting => return None,
            Tiles::Split => 2,
            Tiles::Half => 1,
        };
        let width = w.cols.next_multiple_of(HALF_PADDING);
        // A stack's matrices read slices of their own, or all the same rows.
        let slices = if from.stride == 0 { 1 } else { w.parts };
        let pitch = slices * width / 4;
        let bytes = n * pitch * parts * 8;
        if bytes as u64 > self.device.info.max_binding_bytes.min(self.device.info.max_buffer_bytes) - 1024 {
            return None;
        }
        let (rows, scales) = (self.scratch("half_rows", bytes), self.scratch("half_scales", n * 4));
        let pipeline = self.pipelines.get::<HalfArgs>("half_rows", parts as u64, |d| {
            define(d, &[("X_PARTS", parts), ("SPLIT_X", (parts == 2).into())]);
        });
        let args = HalfArgs {
            base: 0,
            cols: w.cols as u32,
            n_parts: slices as u32,
            x_pitch: from.pitch as u32,
            x_offset: from.offset as u32,
            x_stride: from.stride as u32,
            width: width as u32,
        };
        let cost = Cost { bytes: (n * slices * w.cols * 4 + bytes) as u64, products: 0 };
        self.run(&pipeline, &[x, &*rows, &*scales], &args, [n, 1, 1], cost);
        Some(Halves {
            rows,
            scales,
            parts,
            pitch,
            width: width / 4,
            stride: if slices > 1 { width / 4 } else { 0 },
            exponent,
        })
    }

    /// Runs a chunk of a matrix, and of a second one of the same shape for gate and up.
    fn run_tile(
        &self,
        tile: &Tile<'_>,
        (w, chunk): (&WgpuMatrix, &Chunk),
        second: Option<&Chunk>,
        mut args: MatrixArgs,
        y: &Memory,
        cost: Cost,
    ) {
        let tile_rows = if second.is_some() { TILE_ROWS / 2 } else { TILE_ROWS };
        let mut buffers = vec![&chunk.weight, chunk.scales()];
        if let Some(second) = second {
            buffers.extend([&second.weight, second.scales()]);
        }
        let (pair, planned) = (second.is_some(), tile.plan.is_some());
        let flags = (pair as u64) << 1 | (planned as u64) << 2;
        let variant = w.format.number() | (tile.tokens as u64) << 20;
        let pipeline = if let Some(halves) = &tile.halves {
            args.pre = 2f32.powi(halves.exponent);
            args.post *= 2f32.powi(-halves.exponent);
            (args.x_pitch, args.x_stride) = (halves.pitch as u32, halves.stride as u32);
            args.x_offset = (chunk.parts.start * halves.stride) as u32;
            args.x_width = halves.width as u32;
            buffers.extend([&*halves.rows, &*halves.scales]);
            let shape = HalfTile {
                tokens: tile.tokens,
                x_parts: halves.parts,
                w_parts: if w.format.is_exact_in_half() { 1 } else { halves.parts },
                cooperative: self.device.cooperative,
            };
            let variant = variant | (flags | (halves.parts as u64) << 3) << 32;
            self.pipelines.get::<MatrixArgs>("linear_tiles_half", variant, |d| {
                w.format.define(d);
                define(d, &[("PAIR", pair.into()), ("PLANNED", planned.into())]);
                shape.define(w.format.unit(), d);
            })
        } else {
            buffers.push(tile.x);
            let aligned = tile.from.is_aligned() && w.cols.is_multiple_of(4);
            let variant = variant | (flags | aligned as u64) << 32;
            self.pipelines.get::<MatrixArgs>("linear_tiles", variant, |d| {
                w.format.define(d);
                define(d, &[("ALIGNED", aligned.into()), ("PAIR", pair.into()), ("PLANNED", planned.into())]);
                tiles_define(w.format.unit(), tile.tokens, d);
            })
        };
        buffers.push(y);
        buffers.extend(tile.plan);
        let parts = if planned { 1 } else { chunk.parts.len() };
        let grid = [chunk.rows.len().div_ceil(tile_rows), tile.blocks, parts];
        self.run(&pipeline, &buffers, &args, grid, cost);
    }

    /// `out = down(silu(gate(x)) * up(x))`
    pub(crate) fn mlp_of(&self, x: &WgpuBuffer, mlp: &Mlp<WgpuMatrix>, n: usize, out: &WgpuBuffer) {
        let width = mlp.gate.rows;
        let hidden = self.scratch("mlp_hidden", n * width * 4);
        let to = View { pitch: width, offset: 0, stride: 0 };
        let from = View::whole(x);
        if !alike(mlp) {
            let up = self.scratch("mlp_up", n * width * 4);
            self.products(&x.memory, from, &mlp.gate, n, &hidden, to);
            self.products(&x.memory, from, &mlp.up, n, &up, to);
            self.silu_mul(&hidden, &up, n * width);
        } else {
            let matrices = [&mlp.gate, &mlp.up];
            let tile = if n <= EXACT_ROWS { None } else { Some(self.tile((&x.memory, from), &matrices, n, None)) };
            for (gate, up) in mlp.gate.chunks.iter().zip(&mlp.up.chunks) {
                let args = matrix_args(&mlp.gate, gate, from, to, n);
                let cost = cost(&mlp.gate, 2 * gate.rows.len(), n);
                if let Some(tile) = &tile {
                    self.run_tile(tile, (&mlp.gate, gate), Some(up), args, &hidden, cost);
                    continue;
                }
                let buffers = [&gate.weight, gate.scales(), &up.weight, up.scales(), &x.memory, &*hidden];
                let (kind, rows) = (RowsKernel::GateUp { routed: false }, gate.rows.len());
                let shape = self.rows_shape(kind, &mlp.gate, n, rows, 1);
                let pipeline = self.rows_kernel::<MatrixArgs>("gate_up_rows", kind, &mlp.gate, from, &shape);
                self.run(&pipeline, &buffers, &args, [shape.blocks(rows), n.div_ceil(shape.tokens), 1], cost);
            }
        }
        self.products(&hidden, to, &mlp.down, n, &out.memory, View::whole(out));
    }

    fn silu_mul(&self, gate: &Memory, up: &Memory, n: usize) {
        let pipeline = self.pipelines.get::<RowArgs>("silu_mul", 0, |_| {});
        let args = RowArgs { width: n as u32, ..RowArgs::default() };
        let cost = Cost { bytes: n as u64 * 12, products: 0 };
        self.run(&pipeline, &[gate, up], &args, [self.blocks(n), 1, 1], cost);
    }

    /// The chosen experts' sum, and the shared expert's share if there is one.
    pub(crate) fn moe_of(
        &self,
        x: &WgpuBuffer,
        experts: &Mlp<WgpuMatrix>,
        shared: Option<&Mlp<WgpuMatrix>>,
        choices: Choices<'_>,
        n: usize,
        out: &WgpuBuffer,
    ) {
        if n == 0 {
            return;
        }
        if let Some(shared) = shared {
            self.mlp_of(x, shared, n, out);
        }
        if n <= EXACT_ROWS && alike(experts) {
            self.routed_rows(x, experts, choices, n, out, shared.is_some());
        } else {
            self.routed_tiles(x, experts, choices, n, out, shared.is_some());
        }
    }

    /// Every chosen expert of every row by itself.
    fn routed_rows(
        &self,
        x: &WgpuBuffer,
        experts: &Mlp<WgpuMatrix>,
        choices: Choices<'_>,
        n: usize,
        out: &WgpuBuffer,
        mut adds: bool,
    ) {
        let (width, top_k) = (experts.gate.rows, choices.ids.width);
        let n_slots = n * top_k;
        let hidden = self.scratch("routed_hidden", n_slots * width * 4);
        let (from, to) = (View::whole(x), View { pitch: width, offset: 0, stride: 0 });
        for (gate, up) in experts.gate.chunks.iter().zip(&experts.up.chunks) {
            let mut args = matrix_args(&experts.gate, gate, from, to, n_slots);
            args.top_k = top_k as u32;
            let buffers =
                [&gate.weight, gate.scales(), &up.weight, up.scales(), &x.memory, &*hidden, &choices.ids.memory];
            let (kind, rows) = (RowsKernel::GateUp { routed: true }, gate.rows.len());
            let shape = self.rows_shape(kind, &experts.gate, 1, rows, n_slots);
            let pipeline = self.rows_kernel::<MatrixArgs>("gate_up_rows", kind, &experts.gate, from, &shape);
            let cost = cost(&experts.gate, 2 * rows * n_slots, 1);
            self.run(&pipeline, &buffers, &args, [shape.blocks(rows), n_slots, 1], cost);
        }
        for (i, chunk) in experts.down.chunks.iter().enumerate() {
            let mut args = matrix_args(&experts.down, chunk, to, View::whole(out), n);
            args.top_k = top_k as u32;
            let buffers =
                [&chunk.weight, chunk.scales(), &*hidden, &out.memory, &choices.ids.memory, &choices.weights.memory];
            // Chunks of rows write rows of their own; chunks of experts add to the same ones.
            adds |= i > 0 && chunk.rows.start == 0;
            let (kind, rows) = (RowsKernel::Down { adds }, chunk.rows.len());
            let shape = self.rows_shape(kind, &experts.down, 1, rows, n);
            let pipeline = self.rows_kernel::<MatrixArgs>("down_rows", kind, &experts.down, to, &shape);
            let cost = cost(&experts.down, rows * n_slots, 1);
            self.run(&pipeline, &buffers, &args, [shape.blocks(rows), n, 1], cost);
        }
    }

    /// Experts with their rows together.
    fn routed_tiles(
        &self,
        x: &WgpuBuffer,
        experts: &Mlp<WgpuMatrix>,
        choices: Choices<'_>,
        n: usize,
        out: &WgpuBuffer,
        adds: bool,
    ) {
        let (width, hidden_size, top_k) = (experts.gate.rows, experts.down.rows, choices.ids.width);
        let n_experts = experts.gate.parts;
        assert!(n_experts <= MAX_EXPERTS, "{n_experts} experts");
        let rows_at_once = (ROUTED_BYTES / 4 / (top_k * hidden_size.max(width)).max(1)).clamp(1, n);
        for first_row in (0..n).step_by(rows_at_once) {
            let n = rows_at_once.min(n - first_row);
            let n_slots = n * top_k;
            let max_tiles = n_slots.div_ceil(ROUTED_TILE) + n_experts.min(n_slots);
            let plan_order = 1 + 3 * max_tiles;
            let plan = self.scratch("plan", (plan_order + n_slots) * 4);
            let hidden = self.scratch("routed_hidden", n_slots * width * 4);
            let parts = self.scratch("routed_parts", n_slots * hidden_size * 4);
            let args = PlanArgs {
                base: 0,
                n_experts: n_experts as u32,
                first_slot: (first_row * top_k) as u32,
                n_slots: n_slots as u32,
                tile: ROUTED_TILE as u32,
                plan_order: plan_order as u32,
            };
            let pipeline = self.pipelines.get::<PlanArgs>("moe_plan", 0, |_| {});
            self.run(&pipeline, &[&choices.ids.memory, &plan], &args, [1, 1, 1], Cost::default());

            let from = View { offset: first_row * x.width, ..View::whole(x) };
            let between = View { pitch: width, offset: 0, stride: 0 };
            // `n_x` rows of x, each for `top_k` slots.
            let tiles = |w: &WgpuMatrix,
                         second: Option<&WgpuMatrix>,
                         x: (&Memory, View),
                         y: (&Memory, View),
                         (n_x, top_k): (usize, usize)| {
                let matrices: Vec<&WgpuMatrix> = [Some(w), second].into_iter().flatten().collect();
                let tile = self.tile(x, &matrices, n_x, Some(Planned { memory: &plan, most_tiles: max_tiles }));
                for (i, chunk) in w.chunks.iter().enumerate() {
                    let mut args = matrix_args(w, chunk, x.1, y.1, n_slots);
                    (args.top_k, args.plan_order) = (top_k as u32, plan_order as u32);
                    let rows = matrices.len() * chunk.rows.len();
                    let mut cost = cost(w, rows * n_experts.min(n_slots), 1);
                    cost.products = (rows * w.cols * n_slots) as u64;
                    let second = second.map(|second| &second.chunks[i]);
                    self.run_tile(&tile, (w, chunk), second, args, y.0, cost);
                }
            };
            if alike(experts) {
                tiles(&experts.gate, Some(&experts.up), (&x.memory, from), (&hidden, between), (n, top_k));
            } else {
                let up = self.scratch("routed_up", n_slots * width * 4);
                tiles(&experts.gate, None, (&x.memory, from), (&hidden, between), (n, top_k));
                tiles(&experts.up, None, (&x.memory, from), (&up, between), (n, top_k));
                self.silu_mul(&hidden, &up, n_slots * width);
            }
            let to = View { pitch: hidden_size, offset: 0, stride: 0 };
            tiles(&experts.down, None, (&hidden, between), (&parts, to), (n_slots, 1));

            let pipeline = self.pipelines.get::<CombineArgs>("moe_combine", adds.into(), |d| {
                d.insert("ADD".into(), u32::from(adds).to_string());
            });
            let args =
                CombineArgs { base: 0, width: hidden_size as u32, first_row: first_row as u32, top_k: top_k as u32 };
            let buffers = [&*parts, &choices.ids.memory, &choices.weights.memory, &out.memory];
            let cost = Cost { bytes: (n_slots * hidden_size * 4) as u64, products: 0 };
            self.run(&pipeline, &buffers, &args, [self.blocks(hidden_size), n, 1], cost);
        }
    }
}

/// Rows of x for a product of many, in blocks of `tokens`; `plan` gives the blocks of routed experts.
struct Tile<'a> {
    x: &'a Memory,
    from: View,
    halves: Option<Halves>,
    tokens: usize,
    blocks: usize,
    plan: Option<&'a Memory>,
}

/// Blocks of routed experts, as moe_plan.wgsl makes them: never more than `most_tiles`.
#[derive(Clone, Copy)]
struct Planned<'a> {
    memory: &'a Memory,
    most_tiles: usize,
}

/// What half_rows.wgsl makes of rows of x; pitch, width and stride count vectors of four.
struct Halves {
    rows: Arc<Memory>,
    scales: Arc<Memory>,
    /// Numbers that an element is the sum of.
    parts: usize,
    pitch: usize,
    width: usize,
    stride: usize,
    /// Power of two that the weights are to be multiplied by.
    exponent: i32,
}

/// What linear_tiles_half.wgsl knows of a tile.
pub(crate) struct HalfTile {
    pub(crate) tokens: usize,
    pub(crate) x_parts: usize,
    pub(crate) w_parts: usize,
    pub(crate) cooperative: bool,
}

impl HalfTile {
    pub(crate) fn define(&self, unit: usize, d: &mut Defines) {
        let HalfTile { tokens, x_parts, w_parts, cooperative } = *self;
        // Columns of a step: what gives each thread a unit, and as much as there is room for.
        let depth = if cooperative && unit == 32 && w_parts == 1 { 64 } else { 32 };
        let fills = |n: usize| n.div_ceil(WORKGROUP as usize);
        define(
            d,
            &[
                ("TOKENS", tokens),
                ("DEPTH", depth),
                // Cooperative matrices want rows to begin at multiples of 16 bytes; without them memory is scarce.
                ("PITCH", depth / 4 + if cooperative { 2 } else { 1 }),
                ("FILLS", fills(TILE_ROWS * depth / unit)),
                ("X_FILLS", fills(tokens * depth / 4)),
                ("X_PARTS", x_parts),
                ("SPLIT_X", (x_parts == 2).into()),
                ("W_PARTS", w_parts),
                ("SPLIT_W", (w_parts == 2).into()),
                ("COOPERATIVE", cooperative.into()),
            ],
        );
    }
}

/// What a kernel for a few rows does with its products.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RowsKernel {
    Linear,
    /// Of one input with several matrices.
    Several {
        outputs: usize,
    },
    /// With a single row's expert each, or one MLP for all rows.
    GateUp {
        routed: bool,
    },
    /// Of routed experts, added to the result.
    Down {
        adds: bool,
    },
}

/// How the workgroups of a kernel for a few rows divide a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowsShape {
    /// Rows of x that share the decoding of a weight.
    pub(crate) tokens: usize,
    /// Rows of the matrix that a thread reads at once.
    pub(crate) rows: usize,
    /// Groups of threads that share a row's segments, and such teams in a workgroup.
    pub(crate) split: usize,
    pub(crate) teams: usize,
    /// Units of a segment, and segments of a row.
    pub(crate) segment: usize,
    pub(crate) segments: usize,
}

impl RowsShape {
    /// Workgroups for `rows` rows.
    fn blocks(&self, rows: usize) -> usize {
        rows.div_ceil(self.teams * self.rows)
    }

    pub(crate) fn define(&self, unit: usize, d: &mut Defines) {
        // Segments of x that are staged at once.
        let chunk = self.split * self.segment;
        let chunk_vectors = chunk * unit / 4;
        define(
            d,
            &[
                ("TOKENS", self.tokens),
                ("ROWS", self.rows),
                ("SPLIT", self.split),
                ("SPLIT_UP", (self.split > 1).into()),
                ("TEAMS", self.teams),
                ("CHUNK", chunk),
                ("SEGMENTS", self.segments),
                ("XS", chunk_vectors * 9 / 8),
                ("STEPS", chunk_vectors.div_ceil(WORKGROUP as usize)),
            ],
        );
    }
}

/// What linear_tiles knows of a tile of `tokens` rows of x: the units and vectors of x that a thread fetches of 32 columns.
pub(crate) fn tiles_define(unit: usize, tokens: usize, d: &mut Defines) {
    let fills = |n: usize| n.div_ceil(WORKGROUP as usize);
    define(
        d,
        &[
            ("TOKENS", tokens),
            ("TILE_TOKENS", tokens / 16),
            ("ONE_TOKEN", (tokens == 16).into()),
            ("FILLS", fills(TILE_ROWS * 32 / unit)),
            ("X_FILLS", fills(tokens * 32 / 4)),
        ],
    );
}

fn power_of_two_below(n: usize) -> usize {
    1 << n.max(1).ilog2()
}

fn define(defines: &mut Defines, numbers: &[(&str, usize)]) {
    defines.extend(numbers.iter().map(|(name, n)| ((*name).to_string(), n.to_string())));
}

/// Gate and up can share a kernel.
fn alike(mlp: &Mlp<WgpuMatrix>) -> bool {
    mlp.gate.format == mlp.up.format && mlp.gate.rows == mlp.up.rows && mlp.gate.post() == mlp.up.post()
}

fn tile_tokens(n: usize) -> usize {
    [16, 32].into_iter().find(|t| n <= *t).unwrap_or(64)
}

fn matrix_args(w: &WgpuMatrix, chunk: &Chunk, from: View, to: View, n: usize) -> MatrixArgs {
    MatrixArgs {
        base: 0,
        rows: chunk.rows.len() as u32,
        cols: w.cols as u32,
        units: w.units as u32,
        weight_pitch: w.units as u32,
        weight_part: (w.units * chunk.rows.len()) as u32,
        scale_pitch: w.scale_pitch as u32,
        scale_part: (w.scale_pitch * chunk.rows.len()) as u32,
        x_pitch: from.pitch as u32,
        x_offset: from.offset as u32,
        x_stride: from.stride as u32,
        y_pitch: to.pitch as u32,
        y_offset: (to.offset + chunk.rows.start) as u32,
        y_stride: to.stride as u32,
        n_tokens: n as u32,
        first_part: chunk.parts.start as u32,
        n_parts: chunk.parts.len() as u32,
        top_k: 1,
        plan_order: 0,
        post: w.post(),
        pre: 1.0,
        x_width: 0,
    }
}

fn cost(w: &WgpuMatrix, rows: usize, n: usize) -> Cost {
    Cost { bytes: (rows * w.row_bytes()) as u64, products: (rows * w.cols * n) as u64 }
}
