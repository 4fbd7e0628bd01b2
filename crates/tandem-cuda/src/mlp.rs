//! Feed-forward blocks: dense ones, routed experts with a shared one, and the router.

use bytemuck::Zeroable;
use tandem_core::backend::{Mlp, Moe, Route, RouterTopk, Routing, composed};

use crate::CudaBackend;
use crate::args;
use crate::batch::DECODE_ROWS;
use crate::buffer::{CudaBuffer, CudaIndices};
use crate::linear::{linear_f32_args, split, token_tiles};
use crate::matrix::CudaMatrix;
use crate::preamble::*;

/// Tokens of an expert, on average, that are worth the larger tile.
const GEMM_TOKENS: usize = 48;

/// Routed experts of one launch.
#[derive(Clone, Copy)]
struct Routed<'a> {
    experts: &'a Mlp<CudaMatrix>,
    /// Which of them are in use, and for which pairs of token and choice.
    plan: args::MoePlan,
    /// Experts of a token.
    top_k: usize,
    /// Experts in use, at most.
    slots: usize,
}

impl CudaBackend {
    pub(crate) fn enqueue_mlp(&self, x: &CudaBuffer, mlp: &Mlp<CudaMatrix>, n_rows: usize, out: &mut CudaBuffer) {
        out.written();
        if self.tiled_mlp(mlp) {
            return match n_rows {
                1 => self.mlp_token(x, None, 0, Some(mlp), out.pointer()),
                _ => self.mlp_mma(x, n_rows, None, Some(mlp), 0, out.pointer()),
            };
        }
        self.mlp_f32(x, mlp, None, n_rows, out.pointer());
    }

    pub(crate) fn enqueue_moe(&self, op: Moe<'_, CudaBuffer, CudaIndices, CudaMatrix>) {
        op.out.written();
        let Mlp { gate, up, down } = op.experts;
        if let [Some(gate), Some(up), Some(down)] = [gate, up, down].map(|m| m.on_host) {
            return self.moe_on_host([gate, up, down], op);
        }
        let Moe { x, experts, shared, ids, weights, n_rows, out } = op;
        let (top_k, hidden, n_experts) = (ids.width(), experts.down.rows(), experts.gate.parts);
        let pairs = n_rows * top_k;
        let tiled = self.tiled_mlp(experts) && shared.is_none_or(|shared| self.tiled_mlp(shared));
        if tiled && n_rows == 1 {
            // One token's experts are a plan already.
            let plan = args::MoePlan { active: ids.pointer(), ..args::MoePlan::zeroed() };
            return self.mlp_token(
                x,
                Some(Routed { experts, plan, top_k, slots: top_k }),
                weights.pointer(),
                shared,
                out.pointer(),
            );
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
            self.mlp_mma(x, n_rows, Some(Routed { experts, plan, top_k, slots }), shared, parts, shared_out);
        } else {
            self.mlp_f32(x, experts, Some((ids.pointer(), top_k)), pairs, parts);
            if let Some(shared) = shared {
                self.mlp_f32(x, shared, None, n_rows, shared_out);
            }
        }
        self.combine(parts, shared.map(|_| shared_out), ids, weights, n_rows, out);
    }

    /// [`Backend::moe`] with routed experts on the host, where gate, up and down have these numbers; the shared one runs on
    /// the device.
    fn moe_on_host(&self, mlp: [usize; 3], op: Moe<'_, CudaBuffer, CudaIndices, CudaMatrix>) {
        let Moe { x, shared, ids, weights, n_rows, out, .. } = op;
        let Some(on_host) = &self.on_host else { return };
        let sum = self.scratch("host_sum", n_rows * out.width() * 4);
        let (work, moved) = on_host.fetch(&self.device, mlp, n_rows, (x, ids, weights), sum);
        if moved {
            self.steps.forget();
        }
        if let Some(shared) = shared {
            self.enqueue_mlp(x, shared, n_rows, out);
        }
        self.run_on_host(on_host, work);
        let (to, bytes) = (out.pointer(), n_rows * out.width() * 4);
        if shared.is_some() {
            let n = (n_rows * out.width()) as u64;
            self.launch("add", ((n as usize).div_ceil(256), 1, 1), 256, &mut args![to, sum, n]);
        } else {
            self.device.copy(to, sum, bytes);
        }
    }

    /// Gate, up, SiLU and down of `slots` routed experts (0 for none) and a shared one. Results of pairs go to `parts`,
    /// those of the shared expert to `shared_out`.
    fn mlp_mma(
        &self,
        x: &CudaBuffer,
        n: usize,
        routed: Option<Routed<'_>>,
        shared: Option<&Mlp<CudaMatrix>>,
        parts: u64,
        shared_out: u64,
    ) {
        if n > DECODE_ROWS {
            return self.mlp_gemm(x, n, routed, shared, parts, shared_out);
        }
        let mut down = self.gate_up(x, n, routed, shared);
        (down.out, down.shared_out) = (parts, shared_out);
        if let Some(Routed { experts, .. }) = routed {
            // A warp has 16 rows.
            down.slot_blocks = experts.down.rows().div_ceil(16 * ROW_WARPS) as u32;
        }
        let slots = routed.map_or(0, |r| r.slots);
        let columns = routed.map_or(n, |r| expert_columns(n, r.top_k, r.experts));
        let blocks = (down.shared_blocks + down.slot_blocks * slots as u32) as usize;
        let name = ["moe_down_1", "moe_down_1", "moe_down_2", "moe_down_4"][token_tiles(columns).0];
        self.device.launch(name, (blocks, 1, 1), 256, ROWS_SHARED, &mut args![down]);
    }

    /// The same for one token, whose result goes to `out`; `weights` are those of its experts.
    fn mlp_token(
        &self,
        x: &CudaBuffer,
        routed: Option<Routed<'_>>,
        weights: u64,
        shared: Option<&Mlp<CudaMatrix>>,
        out: u64,
    ) {
        let mut down = self.gate_up(x, 1, routed, shared);
        (down.out, down.weights) = (out, weights);
        down.top_k = routed.map_or(0, |r| r.top_k) as u32;
        let blocks = (down.hidden as usize).div_ceil(16);
        self.device.launch("moe_down_token", (blocks, 1, 1), 256, ROWS_SHARED, &mut args![down]);
    }

    /// Gate, up and SiLU of up to 64 tokens; returns the arguments of down, but for where its results go.
    fn gate_up(
        &self,
        x: &CudaBuffer,
        n: usize,
        routed: Option<Routed<'_>>,
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
        if let Some(Routed { experts, plan, top_k: k, slots: n_slots }) = routed {
            (gate_up.gate, gate_up.up, down.down) = (experts.gate.view, experts.up.view, experts.down.view);
            (gate_up.plan, down.plan) = (plan, plan);
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

    /// [`CudaBackend::mlp_mma`] for prefill: a product of tiles.
    fn mlp_gemm(
        &self,
        x: &CudaBuffer,
        n: usize,
        routed: Option<Routed<'_>>,
        shared: Option<&Mlp<CudaMatrix>>,
        parts: u64,
        shared_out: u64,
    ) {
        let input = x.packed(&self.device, n);
        let both = |mlp: &Mlp<CudaMatrix>, rows: usize, h: u64, out: u64, routed: Option<Routed<'_>>| {
            let (inter, hidden) = (mlp.gate.rows(), mlp.down.rows());
            let pitch = inter.next_multiple_of(64) as u32;
            let mut args = args::GemmArgs::zeroed();
            (args.m0, args.m1, args.gated) = (mlp.gate.view, mlp.up.view, 1);
            (args.x, args.x_pitch, args.n, args.x_divisor) = (input.pointer, input.pitch as u32, rows as u32, 1);
            (args.packed, args.packed_pitch) = (h, pitch);
            // Blocks of tokens: all of them, or those of an expert that gets its share.
            let (mut tokens, mut slots) = (GEMM_TILE, 1);
            let mut tiles = rows.div_ceil(tokens);
            if let Some(Routed { plan, top_k, slots: n_slots, .. }) = routed {
                (args.plan, args.routed, args.x_divisor) = (plan, 1, top_k as u32);
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
        if let Some(Routed { experts, top_k, .. }) = routed {
            let h = self.scratch("h", h_bytes(experts, n * top_k));
            both(experts, n * top_k, h, parts, routed);
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

    pub(crate) fn enqueue_router_topk(&self, op: RouterTopk<'_, CudaBuffer, CudaIndices>) {
        let RouterTopk { logits, bias, routing, n_rows, ids, weights } = op;
        let args = router_args(logits, bias, routing, ids, weights);
        self.launch("router_topk", (n_rows, 1, 1), 32, &mut args![args]);
    }

    pub(crate) fn enqueue_route(&self, op: Route<'_, CudaBuffer, CudaIndices, CudaMatrix>) {
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

    /// True if the tensor-core kernels take this gate, up and down; gate and up pass through one kernel together.
    fn tiled_mlp(&self, mlp: &Mlp<CudaMatrix>) -> bool {
        self.tiled(&[&mlp.gate, &mlp.up, &mlp.down]) && mlp.gate.tiled == mlp.up.tiled
    }
}

/// Twice the tokens of an expert if they spread evenly; more take several rounds.
fn expert_columns(n: usize, top_k: usize, experts: &Mlp<CudaMatrix>) -> usize {
    (2 * n * top_k).div_ceil(experts.gate.parts).max(2).min(n)
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
