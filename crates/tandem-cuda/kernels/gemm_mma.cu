// Prefill: many tokens times a packed matrix on the tensor cores. A block takes 128 rows and 128 tokens, or 32 where
// experts get few; weights are decoded into shared memory as bf16, 64 columns at a time, while the columns before are
// multiplied. Unlike the row kernels of decoding, affine weights are rounded to bf16 here.

struct GemmArgs {
    Matrix m0, m1;           // gated: gate and up, else the same matrix twice
    MoePlan plan;            // routed: the expert of blockIdx.z and its pairs
    const u16* x;            // packed bf16, [.., x_pitch]
    float* out;              // [.., out_pitch], or null
    u16* packed;             // packed bf16, [.., packed_pitch], or null
    u32 x_pitch, out_pitch, packed_pitch, n;
    u32 x_divisor;           // routed: row of x = pair / x_divisor
    u32 x_offset, x_stride, out_offset, out_stride;
    u32 gated, routed;
    u32 unused;
};

// 32 elements of a row, from memory and then decoded.
struct RawRow {
    uint4 a, b;
    u32 scale;
};

template <u32 FORMAT>
DI void load_rest(RawRow& raw, const u8* codes, const u8* scales, u32 k) {
    if constexpr (FORMAT == MXFP4) {
        raw.scale = scales[k / 32 & 7];
    } else {
        static_assert(FORMAT == AFFINE_BF16, "load_rest lacks this format");
        raw.b = load_stream(codes + 16);
        raw.scale = ((const u32*)scales)[k / 64 & 1];
    }
}

// Elements k .. k + 32 of a row, from the tiles of its group.
DI RawRow load_raw(const Matrix& m, const u8* group, u32 row, u32 k) {
    RawRow raw;
    raw.a = raw.b = make_uint4(0, 0, 0, 0);
    raw.scale = 0;
    if (k >= m.cols) return raw;
    u32 byte = tiled_byte(m, k);
    const u8* tile = group + byte / TILE_ROW_BYTES * TILE_BYTES;
    const u8* codes = tile + tile_place(row, byte & (TILE_ROW_BYTES - 1));
    const u8* scales = tile + TILE_SCALES + (row & 7) * TILE_ROW_SCALES;
    raw.a = load_stream(codes);
    FOR_TILED_FORMAT(m.format, load_rest<FORMAT>(raw, codes, scales, k));
    return raw;
}

template <u32 FORMAT>
DI void store_raw_as(const RawRow& raw, u16* to) {
    if constexpr (FORMAT == MXFP4) {
        u32 scale = (raw.scale + 62 << 7) * 0x10001u;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 p[4];
            decode_mxfp4(word(raw.a, j), scale, p);
            *(uint4*)(to + j * 8) = make_uint4(p[0], p[1], p[2], p[3]);
        }
    } else {
        static_assert(FORMAT == AFFINE_BF16, "store_raw lacks this format");
        float scale = __uint_as_float(raw.scale << 16);
        float bias = __uint_as_float(raw.scale & 0xffff0000u) + 128.0f * scale;
        u32 scales = pack_bf16(scale, scale), biases = pack_bf16(bias, bias);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4& v = j < 2 ? raw.a : raw.b;
            u32 p[4];
            decode_bytes(word(v, 2 * (j & 1)), word(v, 2 * (j & 1) + 1), p);
#pragma unroll
            for (int e = 0; e < 4; e++) p[e] = fma_bf16x2(p[e], scales, biases);
            *(uint4*)(to + j * 8) = make_uint4(p[0], p[1], p[2], p[3]);
        }
    }
}

DI void store_raw(const Matrix& m, const RawRow& raw, u16* to) {
    FOR_TILED_FORMAT(m.format, store_raw_as<FORMAT>(raw, to));
}

// TOKENS 128: a warp has 64 rows and 32 tokens; TOKENS 32: 32 rows and all tokens, and two warps share the columns.
template <int TOKENS>
DI void gemm_mma(const GemmArgs& args) {
    constexpr int ROW_TILES = TOKENS == 128 ? 4 : 2, CHUNKS = TOKENS / 32;
    constexpr u32 STAGES = TOKENS == GEMM_FEW ? GEMM_FEW_STAGES : GEMM_STAGES;
    constexpr u32 WEIGHTS = GEMM_TILE * GEMM_PITCH, X = TOKENS * GEMM_PITCH;
    u16* memory = (u16*)dynamic_memory;
    let_next_start();
    wait_for_previous();
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 part = blockIdx.z, first = 0, count = args.n;
    if (args.routed) {
        if (int(blockIdx.z) >= args.plan.n_active[0]) return;
        part = args.plan.active[blockIdx.z];
        first = args.plan.first[blockIdx.z];
        count = args.plan.first[blockIdx.z + 1] - first;
    }
    u32 x0 = args.routed ? 0 : args.x_offset + part * args.x_stride;
    u32 out0 = args.routed ? 0 : args.out_offset + part * args.out_stride;
    // This thread decodes half a row: rows 0..8 of each 16 are of m0, the others of m1 if gated.
    u32 tile_row = threadIdx.x >> 1, half = (threadIdx.x & 1) * 32;
    bool second = args.gated && (tile_row & 8);
    const Matrix& m = second ? args.m1 : args.m0;
    u32 row0 = blockIdx.y * (args.gated ? 64 : 128);
    u32 row = min(args.gated ? row0 + tile_row / 16 * 8 + (tile_row & 7) : row0 + tile_row, m.rows - 1);
    const u8* group = tile_of(m, part, row, 0);
    float factor = 1.0f;
    FOR_TILED_FORMAT(m.format, factor = TILED_FACTOR<FORMAT>);
    u32 cols = m.cols, steps = (cols + GEMM_K - 1) / GEMM_K;
    u32 warp_row = TOKENS == 128 ? (warp & 1) * 64 : (warp & 3) * 32, warp_token = TOKENS == 128 ? (warp >> 1) * 32 : 0;
    constexpr u32 WARP_K = TOKENS == 128 ? GEMM_K : GEMM_K / 2;
    u32 warp_k = TOKENS == 128 ? 0 : (warp >> 2) * WARP_K;
    // It copies CHUNKS times 8 columns of a token.
    u32 token = threadIdx.x * CHUNKS / 8, chunk = threadIdx.x * CHUNKS % 8 * 8;

    for (u32 column0 = blockIdx.x * TOKENS; column0 < count; column0 += gridDim.x * TOKENS) {
        const u16* x = nullptr;
        if (column0 + token < count) {
            u32 c = column0 + token;
            u32 source = args.routed ? u32(args.plan.sorted[first + c]) / args.x_divisor : c;
            x = args.x + u64(source) * args.x_pitch + x0 + chunk;
        }
        auto copy_x = [&](u32 k, u16* stage) {
            u16* to = stage + token * GEMM_PITCH + chunk;
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                if (x && k + chunk + j * 8 < cols) {
                    copy16(to + j * 8, x + k + j * 8);
                } else {
                    *(uint4*)(to + j * 8) = make_uint4(0, 0, 0, 0);
                }
            }
            commit_copies();
        };
        float acc[ROW_TILES][4][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;
        u16* weights = memory;               // [2][128, GEMM_PITCH]
        u16* tokens = memory + 2 * WEIGHTS;  // [STAGES][TOKENS, GEMM_PITCH]
#pragma unroll
        for (u32 s = 0; s < STAGES - 1; s++) copy_x(s * GEMM_K, tokens + s * X);
        RawRow raw = load_raw(m, group, row, half);
        // Few tokens are bound by weights, of which two loads are under way then.
        RawRow ahead;
        if (TOKENS == 32) ahead = load_raw(m, group, row, GEMM_K + half);
        store_raw(m, raw, weights + tile_row * GEMM_PITCH + half);
        wait_copies<STAGES - 2>();
        __syncthreads();
        for (u32 step = 0; step < steps; step++) {
            u32 now = step & 1, next = now ^ 1, k = (step + 1) * GEMM_K;
            bool more = step + 1 < steps;
            copy_x((step + STAGES - 1) * GEMM_K, tokens + (step + STAGES - 1) % STAGES * X);
            if (more) {
                if (TOKENS == 32) {
                    raw = ahead;
                    ahead = load_raw(m, group, row, k + GEMM_K + half);
                } else {
                    raw = load_raw(m, group, row, k + half);
                }
            }
            const u16* a_tile = weights + now * WEIGHTS + (warp_row + (lane & 15)) * GEMM_PITCH + (lane >> 4) * 8 + warp_k;
            const u16* b_tile = tokens + step % STAGES * X +
                                (warp_token + (lane & 7) + (lane >> 4) * 8) * GEMM_PITCH + (lane >> 3 & 1) * 8 + warp_k;
#pragma unroll
            for (u32 kk = 0; kk < WARP_K; kk += 16) {
                u32 a[4], b[2][4];
#pragma unroll
                for (int j = 0; j < 2; j++) ldmatrix4(b[j], b_tile + j * 16 * GEMM_PITCH + kk);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    ldmatrix4(a, a_tile + i * 16 * GEMM_PITCH + kk);
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        mma(acc[i][j], a[0], a[1], a[2], a[3], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
                }
            }
            if (more) store_raw(m, raw, weights + next * WEIGHTS + tile_row * GEMM_PITCH + half);
            wait_copies<STAGES - 2>();
            __syncthreads();
        }
        wait_copies<0>();
        __syncthreads();
        if (TOKENS == 32) {
            float4* shares = (float4*)dynamic_memory;     // [4 warps][ROW_TILES * 4][32]
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float4* share = shares + (((warp & 3) * ROW_TILES + i) * 4 + j) * 32 + lane;
                    if (warp >= 4) *share = make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]);
                }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float4 v = shares[(((warp & 3) * ROW_TILES + i) * 4 + j) * 32 + lane];
                    acc[i][j][0] += v.x, acc[i][j][1] += v.y, acc[i][j][2] += v.z, acc[i][j][3] += v.w;
                }
            __syncthreads();
            if (warp >= 4) continue;
        }
        u32 g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int side = 0; side < 2; side++) {
                u32 c = column0 + warp_token + j * 8 + 2 * t + side;
                if (c >= count) continue;
                u64 to = args.routed ? u32(args.plan.sorted[first + c]) : c;
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    float low = acc[i][j][side] * factor, high = acc[i][j][side + 2] * factor;
                    if (args.gated) {
                        u32 r = row0 + (warp_row / 16 + i) * 8 + g;
                        if (r < m.rows)
                            args.packed[to * args.packed_pitch + packed_place(r)] = to_bf16(low / (1.0f + __expf(-low)) * high);
                        continue;
                    }
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        u32 r = row0 + warp_row + i * 16 + g + 8 * e;
                        if (r >= m.rows) continue;
                        float value = e ? high : low;
                        if (args.out) args.out[to * args.out_pitch + out0 + r] = value;
                        if (args.packed) args.packed[to * args.packed_pitch + packed_place(out0 + r)] = to_bf16(value);
                    }
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) gemm_mma_128(const __grid_constant__ GemmArgs args) { gemm_mma<128>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) gemm_mma_32(const __grid_constant__ GemmArgs args) { gemm_mma<32>(args); }
