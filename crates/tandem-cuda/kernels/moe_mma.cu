// Routed experts and a shared expert on the tensor cores: gate, up and SiLU in one kernel, down in another.
//
// Work is a list of experts with the (token, choice) pairs they serve, sorted by expert (moe_plan). blockIdx.y counts
// through the experts in use; the last value is the shared expert, which serves every token.

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
    u32 n, top_k, slots;     // routed slots; blockIdx.y == slots is the shared expert
    u32 split;
};

// Tokens of one block: pairs first .. first + count of the list, or from `first` on if there is no list.
struct Columns {
    const int* sorted;
    u32 first, count;
    DI u32 pair(u32 c) const { return sorted ? u32(sorted[first + c]) : first + c; }
};

// Columns of this block, or none. ONE: a single token, whose experts are `plan.active` and whose pairs are in order.
template <bool ONE>
DI bool find_columns(const MoePlan& plan, u32 slots, u32 n, u32& part, Columns& columns) {
    if (blockIdx.y == slots) {
        part = 0;
        columns = Columns{nullptr, 0, ONE ? 1 : n};
        return true;
    }
    if (ONE) {
        int expert = plan.active[blockIdx.y];
        part = u32(expert);
        columns = Columns{nullptr, blockIdx.y, 1};
        return expert >= 0;
    }
    if (int(blockIdx.y) >= plan.n_active[0]) return false;
    part = plan.active[blockIdx.y];
    u32 first = plan.first[blockIdx.y];
    columns = Columns{plan.sorted, first, u32(plan.first[blockIdx.y + 1]) - first};
    return true;
}

template <int NT, bool ONE = false>
DI void moe_gate_up(const GateUpArgs& args) {
    __shared__ float shares[8][NT][4][32];
    let_next_start();
    wait_for_previous();
    bool shared = blockIdx.y == args.slots;
    const Matrix& gate = shared ? args.shared_gate : args.gate;
    const Matrix& up = shared ? args.shared_up : args.up;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = args.split;
    u32 block_row = blockIdx.x * (8 / split) * 8;
    if (block_row >= gate.rows) return;
    u32 part;
    Columns columns;
    if (!find_columns<ONE>(args.plan, args.slots, args.n, part, columns)) return;
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
        tile_rows<NT, ONE>(acc, gate, row, up, row, part, split, warp % split, args.x, x, true);
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
    u32 h_pitch, shared_h_pitch;
    u32 n, slots;
    u32 split;
    u32 hidden;
};

template <int NT, bool ONE = false>
DI void moe_down(const DownArgs& args) {
    __shared__ float shares[8][NT][4][32];
    let_next_start();
    wait_for_previous();
    bool shared = blockIdx.y == args.slots;
    const Matrix& down = shared ? args.shared_down : args.down;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = args.split;
    u32 block_row = blockIdx.x * (8 / split) * 16;
    u32 part;
    Columns columns;
    if (!find_columns<ONE>(args.plan, args.slots, args.n, part, columns)) return;
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
        tile_rows<NT, ONE>(acc, down, row, down, row + 8, part, split, warp % split, ONE ? h + columns.pair(0) * pitch : h, x, true);
        add_shares<NT>(acc, split, shares, [&](u32 tile, u32 n, u32 r, u32 c, float value) {
            u32 out_row = block_row + tile * 16 + r, column = column0 + n * 8 + c;
            if (out_row >= down.rows || column >= columns.count) return;
            out[u64(columns.pair(column)) * args.hidden + out_row] = value;
        });
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) moe_down_one(const __grid_constant__ DownArgs args) { moe_down<1, true>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) moe_down_1(const __grid_constant__ DownArgs args) { moe_down<1>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) moe_down_2(const __grid_constant__ DownArgs args) { moe_down<2>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) moe_down_4(const __grid_constant__ DownArgs args) { moe_down<4>(args); }
