// Routed experts and a shared expert on the tensor cores: gate, up and SiLU in one kernel, down in another.
//
// Work is a list of experts with the (token, choice) pairs they serve, sorted by expert (moe_plan). The first blocks have
// the shared expert, which serves every token and needs no plan; then `slot_blocks` blocks each have an expert in use.

struct MoePlan {
    const int* n_active;     // experts in use
    const int* active;       // [slots] expert of each slot
    const int* first;        // [slots + 1] its pairs in `sorted`
    const int* sorted;       // [n * top_k] pairs
};

struct GateUpArgs {
    Matrix gate, up, shared_gate, shared_up;
    MoePlan plan;
    const u16* x;            // packed bf16, [n, x_pitch]
    u16* h;                  // packed bf16, [n * top_k, h_pitch]
    u16* shared_h;           // [n, shared_h_pitch]
    u32 x_pitch, h_pitch, shared_h_pitch;
    u32 n, top_k;
    u32 shared_blocks, slot_blocks;
    u32 split, shared_split;
    u32 unused;
};

// Tokens of one block: pairs first .. first + count of the list, or from `first` on if there is no list.
struct Columns {
    const int* sorted;
    u32 first, count;
    DI u32 pair(u32 c) const { return sorted ? u32(sorted[first + c]) : first + c; }
};

// Columns of an expert's block, or none. ONE: a single token, whose experts are `plan.active` and whose pairs are in order.
template <bool ONE>
DI bool find_columns(const MoePlan& plan, u32 slot, u32& part, Columns& columns) {
    if (ONE) {
        int expert = plan.active[slot];
        part = u32(expert);
        columns = Columns{nullptr, slot, 1};
        return expert >= 0;
    }
    if (int(slot) >= plan.n_active[0]) return false;
    part = plan.active[slot];
    u32 first = plan.first[slot];
    columns = Columns{plan.sorted, first, u32(plan.first[slot + 1]) - first};
    return true;
}

template <int NT, bool ONE = false>
DI void moe_gate_up(const GateUpArgs& args) {
    __shared__ float shares[8][NT][4][32];
    bool shared = blockIdx.x < args.shared_blocks;
    const Matrix& gate = shared ? args.shared_gate : args.gate;
    const Matrix& up = shared ? args.shared_up : args.up;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = shared ? args.shared_split : args.split;
    u32 block = shared ? blockIdx.x : (blockIdx.x - args.shared_blocks) % args.slot_blocks;
    u32 block_row = block * (8 / split) * 8, part = 0;
    Columns columns{nullptr, 0, ONE ? 1 : args.n};
    // The next kernel reads the plan before this one has finished, so it may not start before the plan is there.
    if (!shared) {
        wait_for_previous();
        let_next_start();
        if (!find_columns<ONE>(args.plan, (blockIdx.x - args.shared_blocks) / args.slot_blocks, part, columns)) return;
    }
    bool waited = !shared;
    u32 row = block_row + warp / split * 8;
    for (u32 column0 = 0; column0 < columns.count; column0 += 8 * NT) {
        u32 x[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 c = column0 + n * 8 + (lane >> 2);
            x[n] = NO_COLUMN;
            if (c < columns.count) x[n] = columns.pair(c) / (shared ? 1 : args.top_k) * args.x_pitch;
        }
        float acc[NT][4];
        tile_rows<NT, ONE>(acc, gate, row, up, row, part, split, warp % split, args.x, x, waited);
        if (!waited) let_next_start();
        waited = true;
        // Rows 0..8 of the tile are gate's, 8..16 up's: the shares of both are added up by the same thread.
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) shares[warp][n][r][lane] = acc[n][r];
        __syncthreads();
        for (u32 i = threadIdx.x; i < 8 / split * 32 * NT * 2; i += 256) {
            u32 l = i & 31, r = i >> 5 & 1, n = (i >> 6) % NT, tile = (i >> 6) / NT;
            float g = 0.0f, u = 0.0f;
            for (u32 s = 0; s < split; s++) {
                g += shares[tile * split + s][n][r][l];
                u += shares[tile * split + s][n][r + 2][l];
            }
            u32 h_row = block_row + tile * 8 + (l >> 2), c = column0 + n * 8 + 2 * (l & 3) + r;
            if (h_row >= gate.rows || c >= columns.count) continue;
            float value = g / (1.0f + __expf(-g)) * u;
            u32 pair = columns.pair(c);
            if (shared) {
                args.shared_h[u64(pair) * args.shared_h_pitch + packed_place(h_row)] = to_bf16(value);
            } else {
                args.h[u64(pair) * args.h_pitch + packed_place(h_row)] = to_bf16(value);
            }
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) moe_gate_up_one(const __grid_constant__ GateUpArgs args) { moe_gate_up<1, true>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) moe_gate_up_1(const __grid_constant__ GateUpArgs args) { moe_gate_up<1>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) moe_gate_up_2(const __grid_constant__ GateUpArgs args) { moe_gate_up<2>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) moe_gate_up_4(const __grid_constant__ GateUpArgs args) { moe_gate_up<4>(args); }

struct DownArgs {
    Matrix down, shared_down;
    MoePlan plan;
    const u16* h;            // packed bf16, [n * top_k, h_pitch]
    const u16* shared_h;     // [n, shared_h_pitch]
    float* out;              // [n * top_k, hidden]: each pair's own result
    float* shared_out;       // [n, hidden]
    const float* weights;    // moe_down_token: [top_k]
    u32 h_pitch, shared_h_pitch;
    u32 n, hidden;
    u32 shared_blocks, slot_blocks;
    u32 split, shared_split;
    u32 top_k, unused;
};

template <int NT>
DI void moe_down(const DownArgs& args) {
    __shared__ float shares[8][NT][4][32];
    let_next_start();
    wait_for_previous();
    bool shared = blockIdx.x < args.shared_blocks;
    const Matrix& down = shared ? args.shared_down : args.down;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = shared ? args.shared_split : args.split;
    u32 block = shared ? blockIdx.x : (blockIdx.x - args.shared_blocks) % args.slot_blocks;
    u32 block_row = block * (8 / split) * 16, part = 0;
    Columns columns{nullptr, 0, args.n};
    if (!shared && !find_columns<false>(args.plan, (blockIdx.x - args.shared_blocks) / args.slot_blocks, part, columns)) return;
    u32 row = block_row + warp / split * 16;
    const u16* h = shared ? args.shared_h : args.h;
    u32 pitch = shared ? args.shared_h_pitch : args.h_pitch;
    float* out = shared ? args.shared_out : args.out;
    for (u32 column0 = 0; column0 < columns.count; column0 += 8 * NT) {
        u32 x[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 c = column0 + n * 8 + (lane >> 2);
            x[n] = c < columns.count ? columns.pair(c) * pitch : NO_COLUMN;
        }
        float acc[NT][4];
        tile_rows<NT, false>(acc, down, row, down, row + 8, part, split, warp % split, h, x, true);
        add_shares<NT>(acc, split, shares, [&](u32 tile, u32 n, u32 r, u32 c, float value) {
            u32 out_row = block_row + tile * 16 + r, column = column0 + n * 8 + c;
            if (out_row >= down.rows || column >= columns.count) return;
            out[u64(columns.pair(column)) * args.hidden + out_row] = value;
        });
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) moe_down_1(const __grid_constant__ DownArgs args) { moe_down<1>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) moe_down_2(const __grid_constant__ DownArgs args) { moe_down<2>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) moe_down_4(const __grid_constant__ DownArgs args) { moe_down<4>(args); }

// A single token: a block has 16 rows of all its experts, a warp one expert after the other and an eighth of the shared
// one, and adds them up as moe_down (split 1; shared 8) and moe_combine do: `out` is the token's result, [hidden].
extern "C" __global__ void __launch_bounds__(256, 3) moe_down_token(const __grid_constant__ DownArgs args) {
    __shared__ float parts[MAX_TOP_K][16], shares[SHARED_DOWN_SPLIT][16];
    let_next_start();
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.x * 16;
    bool waited = false, writes = (lane & 3) == 0;
    const u32 column[1] = {0};
    for (u32 slot = warp; slot < args.top_k; slot += 8) {
        // The plan was there before the kernel before this one let it start (moe_gate_up).
        int expert = load_fresh(args.plan.active + slot);
        if (expert < 0) continue;
        float acc[1][4];
        tile_rows<1, true>(acc, args.down, row, args.down, row + 8, expert, 1, 0, args.h + slot * args.h_pitch, column, waited);
        waited = true;
        if (writes) {
            parts[slot][lane >> 2] = acc[0][0];
            parts[slot][(lane >> 2) + 8] = acc[0][2];
        }
    }
    if (args.shared_h) {
        float acc[1][4];
        tile_rows<1, true>(acc, args.shared_down, row, args.shared_down, row + 8, 0, SHARED_DOWN_SPLIT, warp, args.shared_h, column, waited);
        waited = true;
        if (writes) {
            shares[warp][lane >> 2] = acc[0][0];
            shares[warp][(lane >> 2) + 8] = acc[0][2];
        }
    }
    if (!waited) wait_for_previous();
    __syncthreads();
    u32 r = threadIdx.x;
    if (r >= 16 || row + r >= args.hidden) return;
    float sum = 0.0f;
    for (u32 slot = 0; slot < args.top_k; slot++)
        if (load_fresh(args.plan.active + slot) >= 0) sum = fmaf(args.weights[slot], parts[slot][r], sum);
    if (args.shared_h) {
        float share = 0.0f;
#pragma unroll
        for (int w = 0; w < SHARED_DOWN_SPLIT; w++) share += shares[w][r];
        sum += share;
    }
    args.out[row + r] = sum;
}
