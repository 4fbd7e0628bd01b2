// out = x . w^T in single precision for any format: the reference numerics, and formats without a faster kernel.

struct LinearF32Args {
    Matrix m;
    const float* x;      // [.., x_pitch]
    float* out;          // [n, out_pitch]
    u16* packed;         // the same as packed bf16, or null
    const int* ids;      // matrix of each row of out (-1 for none), or null: blockIdx.z
    u32 x_pitch, out_pitch, packed_pitch, n;
    u32 x_divisor;       // row of x: row of out / x_divisor
    u32 x_offset, x_stride, out_offset, out_stride;
    u32 split;           // warps that share a row
};

// Steps of columns of a row whose weights may wait in shared memory.
#define HELD_STEPS 4

// A thread's bf16 weights of one row, copied while the previous kernel finishes; false if they do not fit.
DI bool hold_weights(const LinearF32Args& args, uint4 (*held)[256]) {
    const Matrix& m = args.m;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = args.split, row = blockIdx.x * (8 / split) + warp / split;
    u32 step = 256 * split;
    bool fits = m.format == BF16 && (m.row_bytes & 15) == 0 && m.cols <= HELD_STEPS * step && ((args.x_pitch | args.x_offset) & 3) == 0;
    if (!fits || row >= m.rows) return fits;
    const u8* w = m.weight + u64(row) * m.row_bytes;
#pragma unroll
    for (u32 i = 0; i < HELD_STEPS; i++) {
        u32 k = (warp % split * 32 + lane) * 8 + i * step;
        if (k < m.cols) copy16(&held[i][threadIdx.x], w + k * 2);
    }
    commit_copies();
    return true;
}

// `held`: the weights of a single token's product (hold_weights), or null. Sums are in the same order either way.
template <int TOKENS>
DI void linear_f32(const LinearF32Args& args, const uint4 (*held)[256] = nullptr) {
    __shared__ float shares[8][TOKENS];
    const Matrix& m = args.m;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = args.split;
    u32 row = blockIdx.x * (8 / split) + warp / split;
    u32 token0 = blockIdx.y * TOKENS;
    if (args.ids && args.ids[token0] < 0) return;
    u32 part = args.ids ? u32(args.ids[token0]) : blockIdx.z;
    u32 x0 = args.x_offset + blockIdx.z * args.x_stride;
    float sums[TOKENS] = {};
    bool vectors = ((args.x_pitch | x0) & 3) == 0;
    if (TOKENS == 1 && held) {
        float x[HELD_STEPS][8];
#pragma unroll
        for (u32 i = 0; i < HELD_STEPS; i++) {
            u32 k = (warp % split * 32 + lane) * 8 + i * 256 * split;
            if (k < m.cols) load_8(args.x + x0 + k, x[i]);
        }
        wait_copies<0>();
#pragma unroll
        for (u32 i = 0; i < HELD_STEPS; i++) {
            u32 k = (warp % split * 32 + lane) * 8 + i * 256 * split;
            if (k >= m.cols || row >= m.rows) break;
            uint4 v = held[i][threadIdx.x];
            float w[8];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                w[2 * j] = __uint_as_float(word(v, j) << 16);
                w[2 * j + 1] = __uint_as_float(word(v, j) & 0xffff0000u);
            }
            sums[0] += w[0] * x[i][0] + w[1] * x[i][1] + w[2] * x[i][2] + w[3] * x[i][3];
            sums[0] += w[4] * x[i][4] + w[5] * x[i][5] + w[6] * x[i][6] + w[7] * x[i][7];
        }
    } else if (row < m.rows) {
        for (u32 k = (warp % split * 32 + lane) * 8; k < m.cols; k += 256 * split) {
            float w[8];
            decode8(m, part, row, k, w);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                if (token0 + t >= args.n) break;
                const float* x = args.x + u64((token0 + t) / args.x_divisor) * args.x_pitch + x0 + k;
                if (vectors && k + 8 <= m.cols) {
                    float4 low = *(const float4*)x, high = *(const float4*)(x + 4);
                    sums[t] += w[0] * low.x + w[1] * low.y + w[2] * low.z + w[3] * low.w;
                    sums[t] += w[4] * high.x + w[5] * high.y + w[6] * high.z + w[7] * high.w;
                } else if (k + 8 <= m.cols) {
#pragma unroll
                    for (int i = 0; i < 8; i += 4) sums[t] += w[i] * x[i] + w[i + 1] * x[i + 1] + w[i + 2] * x[i + 2] + w[i + 3] * x[i + 3];
                } else {
                    for (int i = 0; i < 8; i++)
                        if (k + i < m.cols) sums[t] += w[i] * x[i];
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float sum = warp_sum(sums[t]);
        if (lane == 0) shares[warp][t] = sum;
    }
    __syncthreads();
    if (lane < TOKENS && warp % split == 0 && row < m.rows && token0 + lane < args.n) {
        float sum = 0.0f;
        for (u32 s = 0; s < split; s++) sum += shares[warp + s][lane];
        u32 place = args.out_offset + blockIdx.z * args.out_stride + row;
        args.out[u64(token0 + lane) * args.out_pitch + place] = sum;
        if (args.packed) args.packed[u64(token0 + lane) * args.packed_pitch + packed_place(place)] = to_bf16(sum);
    }
}

extern "C" __global__ void __launch_bounds__(256) linear_f32_1(const __grid_constant__ LinearF32Args args) {
    let_next_start();
    wait_for_previous();
    linear_f32<1>(args);
}
extern "C" __global__ void __launch_bounds__(256) linear_f32_8(const __grid_constant__ LinearF32Args args) {
    let_next_start();
    wait_for_previous();
    linear_f32<8>(args);
}
