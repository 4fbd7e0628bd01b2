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

template <int TOKENS>
DI void linear_f32(const LinearF32Args& args) {
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
    if (row < m.rows) {
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
