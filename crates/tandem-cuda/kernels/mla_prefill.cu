// Prefill's absorbed MLA on Hopper's tensor cores: a block is one row and 64 heads, so that every cached vector is read once
// for all of them. Two groups of four warps each score 32 of a tile's 64 positions, and add up 256 of the 512 elements of
// the result. For the shape of DeepSeek-V3 and GLM-5 alone: latents of 512 elements and 64 rotated ones.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define MLA_WIDTH MLA_MAX_WIDTH
#define MLA_LATENT MLA_MAX_LATENT
// 64 rows (heads, positions) of 64 columns, swizzled for wgmma; nine of them are a tile of whole vectors.
#define MLA_PANEL 8192
#define MLA_TILE_BYTES (9 * MLA_PANEL)

// d += a . b over 16 columns, operands in shared memory: scores of 32 positions, and 256 elements of weighted positions.
DI void wgmma_scores(float (&d)[4][4], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, 1, 1, 1, 0, 0;"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
          "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
        : "l"(a), "l"(b));
}

DI void wgmma_values(float (&d)[32][4], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, 1, 1, 1, 0, 1;"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
          "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
          "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
          "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
          "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
          "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
          "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
          "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3]),
          "+f"(d[16][0]), "+f"(d[16][1]), "+f"(d[16][2]), "+f"(d[16][3]), "+f"(d[17][0]), "+f"(d[17][1]), "+f"(d[17][2]), "+f"(d[17][3]),
          "+f"(d[18][0]), "+f"(d[18][1]), "+f"(d[18][2]), "+f"(d[18][3]), "+f"(d[19][0]), "+f"(d[19][1]), "+f"(d[19][2]), "+f"(d[19][3]),
          "+f"(d[20][0]), "+f"(d[20][1]), "+f"(d[20][2]), "+f"(d[20][3]), "+f"(d[21][0]), "+f"(d[21][1]), "+f"(d[21][2]), "+f"(d[21][3]),
          "+f"(d[22][0]), "+f"(d[22][1]), "+f"(d[22][2]), "+f"(d[22][3]), "+f"(d[23][0]), "+f"(d[23][1]), "+f"(d[23][2]), "+f"(d[23][3]),
          "+f"(d[24][0]), "+f"(d[24][1]), "+f"(d[24][2]), "+f"(d[24][3]), "+f"(d[25][0]), "+f"(d[25][1]), "+f"(d[25][2]), "+f"(d[25][3]),
          "+f"(d[26][0]), "+f"(d[26][1]), "+f"(d[26][2]), "+f"(d[26][3]), "+f"(d[27][0]), "+f"(d[27][1]), "+f"(d[27][2]), "+f"(d[27][3]),
          "+f"(d[28][0]), "+f"(d[28][1]), "+f"(d[28][2]), "+f"(d[28][3]), "+f"(d[29][0]), "+f"(d[29][1]), "+f"(d[29][2]), "+f"(d[29][3]),
          "+f"(d[30][0]), "+f"(d[30][1]), "+f"(d[30][2]), "+f"(d[30][3]), "+f"(d[31][0]), "+f"(d[31][1]), "+f"(d[31][2]), "+f"(d[31][3])
        : "l"(a), "l"(b));
}

// Place of a row's piece of 8 columns in a tile.
DI u32 mla_place(u32 row, u32 piece) { return (piece >> 3) * MLA_PANEL + row * 128 + ((piece ^ row) & 7) * 16; }

// A matrix in shared memory whose rows' columns are added up over, and one whose rows are.
DI u64 describe_rows(u32 address) { return u64(address >> 4 & 0x3fff) | u64(1) << 16 | u64(64) << 32 | u64(1) << 62; }
DI u64 describe_columns(u32 address) {
    return u64(address >> 4 & 0x3fff) | u64(MLA_PANEL >> 4) << 16 | u64(64) << 32 | u64(1) << 62;
}

extern "C" __global__ void __launch_bounds__(256, 1) mla_prefill(const __grid_constant__ MlaArgs args) {
    __shared__ float maxima[2][64];
    u8* memory = dynamic_memory + (-shared_address(dynamic_memory) & (WGMMA_ALIGNMENT - 1));
    u8 *queries = memory, *keys = memory + MLA_TILE_BYTES, *weights = memory + 3 * MLA_TILE_BYTES;
    u32 r = blockIdx.z, head0 = blockIdx.y * 64, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 group = warp >> 2, g = lane >> 2, t = lane & 3, row = (warp & 3) * 16 + g;
    let_next_start();
    u32 visible = args.pages.positions[r] + 1, sequence = args.pages.sequences[r];
    u32 n = args.selected ? min(visible, args.n_selected) : visible;
    u32 heads = min(64u, args.n_heads - head0);
    wait_for_previous();
    // A warp has every eighth position of a tile, each of its first lanes the place of one. Positions are looked up three
    // tiles ahead and their slots two, so that nothing waits for either.
    auto position = [&](u32 first) {
        u32 p = first + warp + 8 * lane;
        if (lane >= 8 || p >= n) return 0u;
        return args.selected ? u32(args.selected[u64(r) * args.n_selected + p]) : p;
    };
    auto copy_keys = [&](u32 first, u32 slot, u8* to) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 p = warp + 8 * i;
            const u16* from = args.cache + u64(__shfl_sync(FULL, slot, i)) * MLA_WIDTH;
            for (u32 c = lane; c < MLA_WIDTH / 8; c += 32) {
                if (first + p < n) {
                    copy16(to + mla_place(p, c), from + c * 8);
                } else {
                    *(uint4*)(to + mla_place(p, c)) = make_uint4(0, 0, 0, 0);
                }
            }
        }
        commit_copies();
    };
    copy_keys(0, args.pages.slot(sequence, position(0)), keys);
    u32 slot = args.pages.slot(sequence, position(64)), ahead = position(128);
    for (u32 u = threadIdx.x; u < 64 * (MLA_WIDTH / 8); u += 256) {
        u32 h = u / (MLA_WIDTH / 8), c = u % (MLA_WIDTH / 8);
        float v[8] = {};
        if (h < heads) load_8(args.q + (u64(r) * args.n_heads + head0 + h) * MLA_WIDTH + c * 8, v);
        *(uint4*)(queries + mla_place(h, c)) =
            make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
    const float none = -__int_as_float(0x7f800000);
    // Of rows g and g + 8 of this warp's heads; sums are of this group's positions.
    float maximum[2] = {none, none}, sum[2] = {};
    float acc[32][4];
#pragma unroll
    for (int j = 0; j < 32; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[j][e] = 0.0f;
    u32 q_address = shared_address(queries), w_address = shared_address(weights);
    for (u32 first = 0, stage = 0; first < n; first += 64, stage ^= 1) {
        wait_copies<0>();
        // wgmma reads shared memory past the order of ordinary accesses.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        u32 k_address = shared_address(keys + stage * MLA_TILE_BYTES);
        float s[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
        wgmma_fence();
#pragma unroll
        for (u32 k = 0; k < MLA_WIDTH / 16; k++) {
            u32 at = (k >> 2) * MLA_PANEL + (k & 3) * 32;
            wgmma_scores(s, describe_rows(q_address + at), describe_rows(k_address + at + group * 32 * 128));
        }
        wgmma_commit();
        if (first + 64 < n) copy_keys(first + 64, slot, keys + (stage ^ 1) * MLA_TILE_BYTES);
        slot = args.pages.slot(sequence, ahead);
        ahead = position(first + 192);
        wgmma_wait();
        float highest[2] = {none, none};
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                asm volatile("" : "+f"(s[j][e])::"memory");
                u32 p = first + group * 32 + j * 8 + 2 * t + (e & 1);
                s[j][e] = p < n ? s[j][e] * args.scale : none;
                highest[e >> 1] = fmaxf(highest[e >> 1], s[j][e]);
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(FULL, highest[i], 1));
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(FULL, highest[i], 2));
            if (t == 0) maxima[group][row + 8 * i] = highest[i];
        }
        __syncthreads();
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float higher = fmaxf(maximum[i], fmaxf(maxima[0][row + 8 * i], maxima[1][row + 8 * i]));
            factor[i] = __expf(maximum[i] - higher);
            maximum[i] = higher;
            sum[i] *= factor[i];
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float low = __expf(s[j][2 * i] - maximum[i]), high = __expf(s[j][2 * i + 1] - maximum[i]);
                sum[i] += low + high;
                *(u32*)(weights + mla_place(row + 8 * i, group * 4 + j) + t * 4) = pack_bf16(low, high);
            }
        if (__any_sync(FULL, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int j = 0; j < 32; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[j][e] *= factor[e >> 1];
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        wgmma_fence();
#pragma unroll
        for (u32 k = 0; k < 4; k++)
            wgmma_values(acc, describe_rows(w_address + k * 32), describe_columns(k_address + group * 4 * MLA_PANEL + k * 16 * 128));
        wgmma_commit();
        wgmma_wait();
#pragma unroll
        for (int j = 0; j < 32; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) asm volatile("" : "+f"(acc[j][e])::"memory");
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(FULL, sum[i], 1);
        sum[i] += __shfl_xor_sync(FULL, sum[i], 2);
        if (t == 0) maxima[group][row + 8 * i] = sum[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 h = row + 8 * i;
        float inverse = 1.0f / (maxima[0][h] + maxima[1][h]);
        u32 place = (head0 + h) * MLA_LATENT + group * 256;
#pragma unroll
        for (int j = 0; j < 32; j++) {
            float low = acc[j][2 * i] * inverse, high = acc[j][2 * i + 1] * inverse;
            // Packed pairs are of columns four apart, which another lane has.
            float low4 = __shfl_xor_sync(FULL, low, 2), high4 = __shfl_xor_sync(FULL, high, 2);
            if (h >= heads) continue;
            *(float2*)(args.out + u64(r) * args.n_heads * MLA_LATENT + place + j * 8 + 2 * t) = make_float2(low, high);
            if (args.packed && t < 2)
                *(uint2*)(args.packed + u64(r) * args.packed_pitch + place + j * 8 + t * 4) = make_uint2(pack_bf16(low, low4), pack_bf16(high, high4));
        }
    }
}

#endif
