//! Products with matrices: [`tandem_core::Backend`]'s linear, head_linear, mlp and moe.
//!
//! Up to [`EXACT_ROWS`] rows, kernels read the rows of a matrix for a few rows of x at a time, and add up in an order that does
//! not depend on how many there are; above, tiles.

use std::sync::Arc;

use tandem_core::backend::{EXACT_ROWS, Heads, Mlp};

use crate::args::{CombineArgs, MatrixArgs, PlanArgs, RowArgs};
use crate::backend::WgpuBackend;
use crate::buffer::{Memory, WgpuBuffer, WgpuIndices};
use crate::device::WORKGROUP;
use crate::matrix::{Chunk, WgpuMatrix};
use crate::pipelines::{MAX_EXPERTS, Pipeline};
use crate::recorder::Cost;
use crate::template::Defines;

/// Rows of x that share the decoding of a weight, in the kernels for few rows.
const TOKENS: usize = 4;
/// Rows of a tile of linear_tiles.
const TILE_ROWS: usize = 128;
/// Slots of a tile of routed experts.
const ROUTED_TILE: usize = 16;
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
        for chunk in &w.chunks {
            let mut args = matrix_args(w, chunk, from, to, n);
            args.x_offset += (chunk.parts.start * from.stride) as u32;
            args.y_offset += (chunk.parts.start * to.stride) as u32;
            let buffers = [&chunk.weight, chunk.scales(), x, y];
            let cost = cost(w, chunk.rows.len() * chunk.parts.len(), n);
            if n <= EXACT_ROWS {
                let (pipeline, rows, tokens) =
                    self.rows_kernel(RowsKernel::Linear, w, from, n, chunk, chunk.parts.len());
                let grid = [rows, n.div_ceil(tokens), chunk.parts.len()];
                self.run(&pipeline, &buffers, &args, grid, cost);
            } else {
                let tokens = tile_tokens(n);
                let pipeline = self.tiles_kernel(w, from, tokens, false, false);
                let grid = [chunk.rows.len().div_ceil(TILE_ROWS), n.div_ceil(tokens), chunk.parts.len()];
                self.run(&pipeline, &buffers, &args, grid, cost);
            }
        }
    }

    /// A kernel that reads the rows of a chunk for a few tokens, the number of its workgroups, and its tokens. `times` chunks'
    /// worth of rows are read in the same dispatch.
    fn rows_kernel(
        &self,
        kind: RowsKernel,
        w: &WgpuMatrix,
        from: View,
        n: usize,
        chunk: &Chunk,
        times: usize,
    ) -> (Arc<Pipeline>, usize, usize) {
        let (shader, tokens, most_rows) = match kind {
            RowsKernel::Linear => ("linear_rows", n.next_power_of_two().min(TOKENS), self.tuning.most_rows),
            RowsKernel::GateUp { routed: false } => {
                ("gate_up_rows", n.next_power_of_two().min(TOKENS), self.tuning.most_gate_rows)
            }
            RowsKernel::GateUp { routed: true } => ("gate_up_rows", 1, self.tuning.most_gate_rows),
            RowsKernel::Down { .. } => ("down_rows", 1, self.tuning.most_rows),
        };
        let groups = WORKGROUP as usize / self.pipelines.lanes.n as usize;
        let blocks = |rows: usize| chunk.rows.len().div_ceil(groups * rows);
        let rows = [4, 2]
            .into_iter()
            .find(|r| *r <= most_rows && blocks(*r) * times >= self.tuning.enough_groups)
            .unwrap_or(1);
        let aligned = from.is_aligned() && w.cols.is_multiple_of(w.format.unit());
        let unit_vectors = w.format.unit() / 4;
        let staged = (self.tuning.staged_vectors / tokens / unit_vectors).max(1);
        let routed = kind == RowsKernel::GateUp { routed: true };
        let adds = kind == RowsKernel::Down { adds: true };
        let flags = u64::from(aligned) | u64::from(routed) << 1 | u64::from(adds) << 2;
        let variant = w.format.number() | flags << 16 | (tokens as u64) << 20 | (rows as u64) << 24;
        let pipeline = self.pipelines.get::<MatrixArgs>(shader, variant, |d| {
            w.format.define(d);
            define(
                d,
                &[
                    ("ALIGNED", aligned.into()),
                    ("TOKENS", tokens),
                    ("ROWS", rows),
                    ("CHUNK", staged),
                    ("XS", staged * unit_vectors * 9 / 8 + 1),
                    ("ROUTED", routed.into()),
                    ("ADD", adds.into()),
                ],
            );
        });
        (pipeline, blocks(rows), tokens)
    }

    fn tiles_kernel(&self, w: &WgpuMatrix, from: View, tokens: usize, pair: bool, planned: bool) -> Arc<Pipeline> {
        let aligned = from.is_aligned() && w.cols.is_multiple_of(4);
        let flags = aligned as u64 | (pair as u64) << 1 | (planned as u64) << 2;
        let variant = w.format.number() | flags << 16 | (tokens as u64) << 20;
        self.pipelines.get::<MatrixArgs>("linear_tiles", variant, |d| {
            w.format.define(d);
            define(
                d,
                &[
                    ("ALIGNED", aligned.into()),
                    ("PAIR", pair.into()),
                    ("PLANNED", planned.into()),
                    ("TOKENS", tokens),
                    ("TILE_TOKENS", tokens / 16),
                ],
            );
        })
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
            for (gate, up) in mlp.gate.chunks.iter().zip(&mlp.up.chunks) {
                let args = matrix_args(&mlp.gate, gate, from, to, n);
                let buffers = [&gate.weight, gate.scales(), &up.weight, up.scales(), &x.memory, &*hidden];
                let cost = cost(&mlp.gate, 2 * gate.rows.len(), n);
                if n <= EXACT_ROWS {
                    let (pipeline, rows, tokens) =
                        self.rows_kernel(RowsKernel::GateUp { routed: false }, &mlp.gate, from, n, gate, 1);
                    self.run(&pipeline, &buffers, &args, [rows, n.div_ceil(tokens), 1], cost);
                } else {
                    let tokens = tile_tokens(n);
                    let pipeline = self.tiles_kernel(&mlp.gate, from, tokens, true, false);
                    let grid = [gate.rows.len().div_ceil(TILE_ROWS / 2), n.div_ceil(tokens), 1];
                    self.run(&pipeline, &buffers, &args, grid, cost);
                }
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
            let (pipeline, rows, _) =
                self.rows_kernel(RowsKernel::GateUp { routed: true }, &experts.gate, from, n, gate, n_slots);
            let cost = cost(&experts.gate, 2 * gate.rows.len() * n_slots, 1);
            self.run(&pipeline, &buffers, &args, [rows, n_slots, 1], cost);
        }
        for (i, chunk) in experts.down.chunks.iter().enumerate() {
            let mut args = matrix_args(&experts.down, chunk, to, View::whole(out), n);
            args.top_k = top_k as u32;
            let buffers =
                [&chunk.weight, chunk.scales(), &*hidden, &out.memory, &choices.ids.memory, &choices.weights.memory];
            // Chunks of rows write rows of their own; chunks of experts add to the same ones.
            adds |= i > 0 && chunk.rows.start == 0;
            let kind = RowsKernel::Down { adds };
            let (pipeline, rows, _) = self.rows_kernel(kind, &experts.down, to, n, chunk, n);
            let cost = cost(&experts.down, chunk.rows.len() * n_slots, 1);
            self.run(&pipeline, &buffers, &args, [rows, n, 1], cost);
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
            let tiles =
                |w: &WgpuMatrix, second: Option<&WgpuMatrix>, x: (&Memory, View), y: (&Memory, View), top_k: usize| {
                    for (i, chunk) in w.chunks.iter().enumerate() {
                        let mut args = matrix_args(w, chunk, x.1, y.1, n_slots);
                        (args.top_k, args.plan_order) = (top_k as u32, plan_order as u32);
                        let pipeline = self.tiles_kernel(w, x.1, ROUTED_TILE, second.is_some(), true);
                        let tile_rows = if second.is_some() { TILE_ROWS / 2 } else { TILE_ROWS };
                        let grid = [chunk.rows.len().div_ceil(tile_rows), max_tiles, 1];
                        let mut buffers = vec![&chunk.weight, chunk.scales()];
                        if let Some(second) = second {
                            buffers.extend([&second.chunks[i].weight, second.chunks[i].scales()]);
                        }
                        buffers.extend([x.0, y.0, &*plan]);
                        let matrices = if second.is_some() { 2 } else { 1 };
                        let mut cost = cost(w, matrices * chunk.rows.len() * n_experts.min(n_slots), 1);
                        cost.products = (matrices * chunk.rows.len() * w.cols * n_slots) as u64;
                        self.run(&pipeline, &buffers, &args, grid, cost);
                    }
                };
            if alike(experts) {
                tiles(&experts.gate, Some(&experts.up), (&x.memory, from), (&hidden, between), top_k);
            } else {
                let up = self.scratch("routed_up", n_slots * width * 4);
                tiles(&experts.gate, None, (&x.memory, from), (&hidden, between), top_k);
                tiles(&experts.up, None, (&x.memory, from), (&up, between), top_k);
                self.silu_mul(&hidden, &up, n_slots * width);
            }
            let to = View { pitch: hidden_size, offset: 0, stride: 0 };
            tiles(&experts.down, None, (&hidden, between), (&parts, to), 1);

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

/// What a kernel for a few rows does with its products.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RowsKernel {
    Linear,
    /// With a single row's expert each, or one MLP for all rows.
    GateUp {
        routed: bool,
    },
    /// Of routed experts, added to the result.
    Down {
        adds: bool,
    },
}

fn define(defines: &mut Defines, numbers: &[(&str, usize)]) {
    defines.extend(numbers.iter().map(|(name, n)| ((*name).to_string(), n.to_string())));
}

/// Gate and up can share a kernel.
fn alike(mlp: &Mlp<WgpuMatrix>) -> bool {
    mlp.gate.format == mlp.up.format && mlp.gate.rows == mlp.up.rows
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
    }
}

fn cost(w: &WgpuMatrix, rows: usize, n: usize) -> Cost {
    Cost { bytes: (rows * w.row_bytes()) as u64, products: (rows * w.cols * n) as u64 }
}
