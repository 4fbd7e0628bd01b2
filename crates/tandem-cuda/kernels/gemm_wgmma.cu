// Prefill on Hopper's tensor cores: a block takes 128 rows and up to 128 tokens, each of its two groups of four warps 64 of
// the rows. Packed weights pass through a ring in shared memory that a warp has to itself and are decoded in registers, the
// first operand of wgmma, while the columns before are multiplied. As in gemm_mma.cu, affine weights are rounded to bf16.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A tile of each of a warp's two groups of 8 rows: [group][half] 8 rows of 64 bytes, each row's four pieces in the order
// (piece ^ row / 2) so that one piece of every row meets every bank once; and scales.
struct RawTiles {
    uint4 halves[2][2][32];
    uint2 scales[2][8];
};
static_assert(sizeof(RawTiles) == 2 * TILE_BYTES, "the launch makes room for the ring");

DI void start_tiles(RawTiles& to, const u8* w0, const u8* w1, u32 r, u32 lane) {
    u32 place = (lane & ~3u) | ((lane ^ lane >> 3) & 3);
    const u8 *a = w0 + r * TILE_BYTES, *b = w1 + r * TILE_BYTES;
    copy16(&to.halves[0][0][place], a + lane * 16);
    copy16(&to.halves[0][1][place], a + 512 + lane * 16);
    copy16(&to.halves[1][0][place], b + lane * 16);
    copy16(&to.halves[1][1][place], b + 512 + lane * 16);
    if (lane < 8) copy16((u8*)to.scales + lane * 16, (lane < 4 ? a : b) + TILE_SCALES + (lane & 3) * 16);
}

// Describes tokens in shared memory to wgmma: rows of 128 bytes, swizzled in groups of eight.
DI u64 describe_tokens(const void* p) {
    return u64(shared_address(p) >> 4 & 0x3fff) | u64(1) << 16 | u64(64) << 32 | u64(1) << 62;
}

DI void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DI void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DI void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// d += a . b over 16 columns of 64 rows and N tokens; a and d are laid out as mma's.
template <int N>
struct Wgmma;

template <>
struct Wgmma<32> {
    static DI void run(float (&d)[4][4], const u32 (&a)[4], u64 b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
            "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
                       "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

template <>
struct Wgmma<64> {
    static DI void run(float (&d)[8][4], const u32 (&a)[4], u64 b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
                       "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
                       "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                       "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

template <>
struct Wgmma<128> {
    static DI void run(float (&d)[16][4], const u32 (&a)[4], u64 b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
                       "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
                       "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                       "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
                       "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
                       "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
                       "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
                       "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

// A block's place in the product.
struct WgmmaPlace {
    u32 part, first, count, row0, x0, out0;
    const u8 *w0, *w1;       // tiles of this warp's rows: 0..8 and 8..16, of m0 and m1 if gated
};

// A step's four fragments of weights: row g of the first group and of the second. Lane t has the t-th pair of every eight
// columns, as tokens are packed.
template <u32 FORMAT>
DI void decode_step(const RawTiles& tiles, u32 step, u32 lane, u32 (&a)[4][4]) {
    u32 g = lane >> 2, t = lane & 3;
    u32 half = FORMAT == MXFP4 ? step >> 1 & 1 : step & 1;
#pragma unroll
    for (int group = 0; group < 2; group++) {
        const uint4* row = &tiles.halves[group][half][g * 4];
        uint2 s = tiles.scales[group][g];
        u32 raw = half ? s.y : s.x;
        if constexpr (FORMAT == MXFP4) {
            // Two runs of 32 columns, with a scale each.
            u32 first = (step & 1) * 2;
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                uint4 w = row[(first + i) ^ g >> 1];
                u32 scale = ((raw >> (first + i) * 8 & 255) + 62 << 7) * 0x10001u;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 codes = word(w, j) >> 4 * t;
                    a[2 * i + (j >> 1)][2 * (j & 1) + group] =
                        mul_bf16x2((codes << 12 & 0x80008000u) | (codes << 6 & 0x01c001c0u), scale);
                }
            }
        } else {
            static_assert(FORMAT == AFFINE_BF16, "decode_step lacks this format");
            // Four runs of 16 columns.
            float scale = __uint_as_float(raw << 16), bias = __uint_as_float(raw & 0xffff0000u) + 128.0f * scale;
            u32 scales = pack_bf16(scale, scale), biases = pack_bf16(bias, bias);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                uint4 w = row[i ^ g >> 1];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    // The odd bytes are masked out.
                    u32 pair = __byte_perm(word(w, 2 * j), word(w, 2 * j + 1), t | (t + 4) << 8);
                    u32 low = sub_bf16x2((pair & 0x007f007fu) | 0x43004300u, (pair & 0x00800080u) ^ 0x43804380u);
                    a[i][2 * j + group] = fma_bf16x2(low, scales, biases);
                }
            }
        }
    }
}

// Copies 16 bytes, or zeros.
DI void copy16_or_zeros(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// Up to N tokens from `column0` on.
template <u32 FORMAT, int N>
DI void gemm_tokens(const GemmArgs& args, const WgmmaPlace& at, u32 column0, u8* memory) {
    constexpr u32 TILE_STEPS = FORMAT == MXFP4 ? 4 : 2, STAGE = N * 128, COPIES = N / 32;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, cols = args.m0.cols;
    u32 steps = (cols + GEMM_K - 1) / GEMM_K, rounds = args.m0.row_bytes / TILE_BYTES;
    u8* tokens = memory;                                                        // [WGMMA_STAGES][N, 128 bytes]
    RawTiles* ring = (RawTiles*)(memory + WGMMA_STAGES * GEMM_TILE * 128) + warp * WGMMA_RING;
    // A thread copies 8 columns of each 32nd token. Past the last one it copies that again.
    u32 token = threadIdx.x >> 3, piece = threadIdx.x & 7, sources[COPIES];
#pragma unroll
    for (u32 i = 0; i < COPIES; i++) {
        u32 c = min(column0 + token + i * 32, at.count - 1);
        sources[i] = (args.routed ? u32(args.plan.sorted[at.first + c]) / args.x_divisor : c) * args.x_pitch;
    }
    const u16* x = args.x + at.x0 + piece * 8;
    auto start_x = [&](u32 step, u32 stage) {
        u32 k = step * GEMM_K;
        bool inside = k + piece * 8 < cols;
        u8* to = tokens + stage * STAGE + token * 128 + (piece ^ (token & 7)) * 16;
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) copy16_or_zeros(to + i * 32 * 128, x + sources[i] + (inside ? k : 0), inside);
    };
    float acc[N / 8][4];
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[j][e] = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        if (i < rounds) start_tiles(ring[i], at.w0, at.w1, i, lane);
        if (i < steps) start_x(i, i);
        commit_copies();
    }
    wait_copies<1>();
    __syncwarp();
    u32 a0[4][4], a1[4][4], stage = 0;
    decode_step<FORMAT>(ring[0], 0, lane, a0);
    auto multiply = [&](u32 step, u32 (&now)[4][4], u32 (&next)[4][4]) {
        wait_copies<1>();
        // wgmma reads shared memory past the order of ordinary accesses.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        u64 b = describe_tokens(tokens + stage * STAGE);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<N>::run(acc, now[i], b + 2 * i);
        wgmma_commit();
        // The tile and the tokens of the steps before are done with.
        if (step % TILE_STEPS == 0) {
            u32 r = step / TILE_STEPS + 2;
            if (r < rounds) start_tiles(ring[r % WGMMA_RING], at.w0, at.w1, r, lane);
        }
        if (step + 2 < steps) start_x(step + 2, stage == 0 ? 2 : stage - 1);
        commit_copies();
        stage = stage == 2 ? 0 : stage + 1;
        if (step + 1 < steps) decode_step<FORMAT>(ring[(step + 1) / TILE_STEPS % WGMMA_RING], step + 1, lane, next);
        wgmma_wait();
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) asm volatile("" : "+f"(acc[j][e])::"memory");
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) asm volatile("" ::"r"(now[i][e]) : "memory");
    };
    for (u32 step = 0; step < steps; step += 2) {
        multiply(step, a0, a1);
        if (step + 1 < steps) multiply(step + 1, a1, a0);
    }
    wait_copies<0>();
    __syncthreads();
    constexpr float factor = TILED_FACTOR<FORMAT>;
    u32 g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int side = 0; side < 2; side++) {
            u32 c = column0 + j * 8 + 2 * t + side;
            if (c >= at.count) continue;
            u64 to = args.routed ? u32(args.plan.sorted[at.first + c]) : c;
            float low = acc[j][side] * factor, high = acc[j][side + 2] * factor;
            if (args.gated) {
                u32 r = at.row0 + warp * 8 + g;
                if (r < args.m0.rows) args.packed[to * args.packed_pitch + packed_place(r)] = to_bf16(low / (1.0f + __expf(-low)) * high);
                continue;
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                u32 r = at.row0 + warp * 16 + g + 8 * e;
                if (r >= args.m0.rows) continue;
                float value = e ? high : low;
                if (args.out) args.out[to * args.out_pitch + at.out0 + r] = value;
                if (args.packed) args.packed[to * args.packed_pitch + packed_place(at.out0 + r)] = to_bf16(value);
            }
        }
    }
}

template <u32 FORMAT>
DI void gemm_wgmma(const GemmArgs& args) {
    u8* memory = dynamic_memory + (-shared_address(dynamic_memory) & (WGMMA_ALIGNMENT - 1));
    let_next_start();
    wait_for_previous();
    WgmmaPlace at;
    at.part = blockIdx.z, at.first = 0, at.count = args.n;
    if (args.routed) {
        if (int(blockIdx.z) >= args.plan.n_active[0]) return;
        at.part = args.plan.active[blockIdx.z];
        at.first = args.plan.first[blockIdx.z];
        at.count = args.plan.first[blockIdx.z + 1] - at.first;
    }
    at.x0 = args.routed ? 0 : args.x_offset + at.part * args.x_stride;
    at.out0 = args.routed ? 0 : args.out_offset + at.part * args.out_stride;
    at.row0 = blockIdx.y * (args.gated ? 64 : 128);
    u32 warp = threadIdx.x >> 5, last = args.m0.rows - 1;
    u32 row = at.row0 + warp * (args.gated ? 8 : 16);
    at.w0 = tile_of(args.m0, at.part, min(row, last), 0);
    at.w1 = tile_of(args.m1, at.part, min(args.gated ? row : row + 8, last), 0);
    for (u32 column0 = blockIdx.x * 128; column0 < at.count; column0 += gridDim.x * 128) {
        u32 left = at.count - column0;
        if (left <= 32) {
            gemm_tokens<FORMAT, 32>(args, at, column0, memory);
        } else if (left <= 64) {
            gemm_tokens<FORMAT, 64>(args, at, column0, memory);
        } else {
            gemm_tokens<FORMAT, 128>(args, at, column0, memory);
        }
    }
}

// One for each tiled format (linear.rs picks).
extern "C" __global__ void __launch_bounds__(256, 2) gemm_wgmma_mxfp4(const __grid_constant__ GemmArgs args) { gemm_wgmma<MXFP4>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) gemm_wgmma_affine(const __grid_constant__ GemmArgs args) { gemm_wgmma<AFFINE_BF16>(args); }

#endif
