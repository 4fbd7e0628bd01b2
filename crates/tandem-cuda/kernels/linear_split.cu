// out = x . w^T of many tokens and bf16 weights on the tensor cores without rounding the tokens: each is the sum of three
// bf16 numbers, which hold all of its 24 bits. For prefill's router, whose choice should not depend on rounding.
//
// A block takes 32 rows and 32 tokens, and each of its warps an eighth of the columns. In a run of 32 columns lane (g, t)
// has eight neighbours of each row and token, so that fragments come straight from memory.

// Two floats as three pairs of bf16.
DI void split_pair(float low, float high, u32 (&parts)[3]) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
        parts[i] = pack_bf16(low, high);
        low -= __uint_as_float(parts[i] << 16);
        high -= __uint_as_float(parts[i] & 0xffff0000u);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_split(const __grid_constant__ LinearF32Args args) {
    __shared__ float shares[8][32][32];
    let_next_start();
    wait_for_previous();
    const Matrix& m = args.m;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    u32 row0 = blockIdx.x * 32, token0 = blockIdx.y * 32, runs = (m.cols + 31) / 32;
    const u8* w = m.weight + t * 16;
    const float* x = args.x + t * 8;
    float acc[2][4][4] = {};
    for (u32 run = warp; run < runs; run += 8) {
        u32 k = run * 32;
        bool inside = k + t * 8 < m.cols;
        uint4 a[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                u32 row = min(row0 + i * 16 + e * 8 + g, m.rows - 1);
                a[i][e] = inside ? *(const uint4*)(w + u64(row) * m.row_bytes + k * 2) : make_uint4(0, 0, 0, 0);
            }
        float v[4][8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 token = min(token0 + j * 8 + g, args.n - 1);
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] = 0.0f;
            if (inside) load_8(x + u64(token) * args.x_pitch + k, v[j]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int step = 0; step < 2; step++) {
                u32 b0[3], b1[3];
                split_pair(v[j][step * 4], v[j][step * 4 + 1], b0);
                split_pair(v[j][step * 4 + 2], v[j][step * 4 + 3], b1);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    // The smallest first.
                    for (int part = 2; part >= 0; part--)
                        mma(acc[i][j], word(a[i][0], 2 * step), word(a[i][1], 2 * step), word(a[i][0], 2 * step + 1),
                            word(a[i][1], 2 * step + 1), b0[part], b1[part]);
            }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) shares[warp][i * 16 + g + 8 * (e >> 1)][j * 8 + 2 * t + (e & 1)] = acc[i][j][e];
    __syncthreads();
    for (u32 i = threadIdx.x; i < 32 * 32; i += 256) {
        u32 row = i & 31, token = i >> 5;
        if (row0 + row >= m.rows || token0 + token >= args.n) continue;
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < 8; s++) sum += shares[s][row][token];
        args.out[u64(token0 + token) * args.out_pitch + row0 + row] = sum;
        if (args.packed) args.packed[u64(token0 + token) * args.packed_pitch + packed_place(row0 + row)] = to_bf16(sum);
    }
}
