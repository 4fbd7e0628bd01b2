// Absorbed MLA over bf16 latents on the tensor cores: a block is one row, 16 heads and a span of attended positions.
// With several spans each block leaves an unnormalised share, which mla_merge adds up; one span stores the result.

struct MlaArgs {
    Pages pages;
    const float* q;          // [n, n_heads * width]
    const u16* cache;        // [n_slots, width]
    const int* selected;     // [n, n_selected] or null
    float* shares;           // [n, n_spans, n_heads, latent]
    float2* stats;           // [n, n_spans, n_heads] (maximum, sum)
    float* out;              // [n, n_heads * latent]
    u16* packed;             // or null
    u32 n_heads, width, latent, n_selected, packed_pitch;
    u32 span, n_spans;
    float scale;
    u32 rotated_pitch, rotated_stride;
    const float* rotated;    // not null: heads' elements from `latent` on are these, to be rotated; [n, rotated_pitch]
    Rope rope;
};

DI void ldmatrix4(u32 (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

DI void ldmatrix2(u32& r0, u32& r1, const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r0), "=r"(r1) : "r"(shared_address(p)));
}

DI void ldmatrix4_trans(u32 (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

extern "C" __global__ void __launch_bounds__(256, 2) mla_attention(const __grid_constant__ MlaArgs args) {
    u16* memory = (u16*)dynamic_memory;
    __shared__ float scores[16][MLA_TILE + 1];
    __shared__ __align__(16) u16 weights[16][MLA_TILE + 8];
    __shared__ float maxima[16], sums[16], rescale[16];
    u32 pitch = args.width + 8;
    u16* q = memory;                     // [16, pitch]
    u16* keys = memory + 16 * pitch;     // [MLA_TILE, pitch]
    __shared__ float cosines[MAX_ROPE_PAIRS], sines[MAX_ROPE_PAIRS];
    let_next_start();
    u32 r = blockIdx.z, head0 = blockIdx.y * 16, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 g = lane >> 2, t = lane & 3;
    // Positions and pages come with the batch, before any kernel of the step.
    u32 visible = args.pages.positions[r] + 1, sequence = args.pages.sequences[r];
    u32 n = args.selected ? min(visible, args.n_selected) : visible;
    u32 begin = blockIdx.x * args.span, end = min(begin + args.span, n);
    if (args.rotated && threadIdx.x < args.rope.half)
        angle(args.rope, threadIdx.x, visible - 1, cosines[threadIdx.x], sines[threadIdx.x]);
    // Loops that run once a kernel are not unrolled here: fetching their instructions would take longer than running them.
    // Starts to copy rows low .. high of the tile of positions from `first` on; a warp has every eighth.
    auto copy_keys = [&](u32 first, u32 low, u32 high) {
        u32 slot = 0, mine = warp + 8 * lane;
        if (lane < 8 && mine >= low && mine < high) {
            u32 p = first + mine;
            if (args.selected) p = args.selected[u64(r) * args.n_selected + p];
            slot = args.pages.slot(sequence, p);
        }
#pragma unroll 1
        for (u32 row = warp, i = 0; i < 8; row += 8, i++) {
            const u16* from = args.cache + u64(__shfl_sync(FULL, slot, i)) * args.width;
            if (row < low || row >= high) continue;
#pragma unroll 1
            for (u32 c = lane * 8; c < args.width; c += 256) copy16(keys + row * pitch + c, from + c);
        }
    };
    // A single row's positions but the last were cached by earlier steps, which were done before this one's batch came.
    u32 count = min(u32(MLA_TILE), end - begin), cached = 0;
    if (gridDim.z == 1 && !args.selected && begin < n) cached = min(count, visible - 1 - begin);
#pragma unroll 1
    for (u32 low = 0, high = cached; low < 2; low++) {
        if (low == 1) {
            wait_for_previous();
            if (begin >= n) return;
        }
        copy_keys(begin, low ? cached : 0, low ? count : high);
    }
    u32 heads = min(16u, args.n_heads - head0);
    if (threadIdx.x < 16) {
        maxima[threadIdx.x] = -__int_as_float(0x7f800000);
        sums[threadIdx.x] = 0.0f;
    }
    __syncthreads();
    // Queries: a warp has every eighth head, a lane 8 elements of each 256, and both heads' are under way at once.
    u32 plain = args.rotated ? args.latent : args.width;
    const float* queries = args.q + (u64(r) * args.n_heads + head0) * args.width;
    const float* turned = args.rotated + u64(r) * args.rotated_pitch + head0 * args.rotated_stride;
    auto store_query = [&](u32 h, u32 c, const float (&v)[8]) {
        *(uint4*)(q + h * pitch + c) =
            make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    };
#pragma unroll 1
    for (u32 c = lane * 8; c < plain; c += 512) {
        float v[4][8] = {};
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (warp + (i & 1) * 8 < heads && c + (i >> 1) * 256 < plain)
                load_8(queries + (warp + (i & 1) * 8) * args.width + c + (i >> 1) * 256, v[i]);
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (c + (i >> 1) * 256 < plain) store_query(warp + (i & 1) * 8, c + (i >> 1) * 256, v[i]);
    }
    // The rotated elements: 16 threads a head.
#pragma unroll 1
    for (u32 h = threadIdx.x >> 4, e = (threadIdx.x & 15) * 8; plain + e < args.width; e += 128) {
        const float* from = turned + h * args.rotated_stride;
        float v[8] = {};
        if (h < heads) {
            load_8(from + e, v);
            if (e < 2 * args.rope.half) rotate_8(args.rope, from, e, cosines, sines, v);
        }
        store_query(h, plain + e, v);
    }
    // Columns of the result: warp w has tiles w, w + 8, .. of 8.
    u32 n_tiles = args.latent / 8;
    float acc[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = 0.0f;

    for (u32 first = begin; first < end; first += MLA_TILE) {
        count = min(u32(MLA_TILE), end - first);
        if (first != begin) copy_keys(first, 0, count);
#pragma unroll 1
        for (u32 p = count + warp; p < MLA_TILE; p += 8)
            for (u32 c = lane * 8; c < args.width; c += 256) *(uint4*)(keys + p * pitch + c) = make_uint4(0, 0, 0, 0);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        // Scores: warp w has positions 8w .. 8w + 7.
        float s[4] = {}, s2[4] = {};
        for (u32 k = 0; k < args.width; k += 32) {
            u32 a[4], b0, b1;
            ldmatrix4(a, q + (lane & 15) * pitch + k + (lane >> 4) * 8);
            ldmatrix2(b0, b1, keys + (warp * 8 + (lane & 7)) * pitch + k + (lane >> 3 & 1) * 8);
            mma(s, a[0], a[1], a[2], a[3], b0, b1);
            if (k + 16 < args.width) {
                ldmatrix4(a, q + (lane & 15) * pitch + k + 16 + (lane >> 4) * 8);
                ldmatrix2(b0, b1, keys + (warp * 8 + (lane & 7)) * pitch + k + 16 + (lane >> 3 & 1) * 8);
                mma(s2, a[0], a[1], a[2], a[3], b0, b1);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) scores[g + 8 * (i >> 1)][warp * 8 + 2 * t + (i & 1)] = (s[i] + s2[i]) * args.scale;
        __syncthreads();
        // Softmax: warp w has heads 2w and 2w + 1, a lane two positions.
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 h = warp * 2 + i;
            float low = lane < count ? scores[h][lane] : -__int_as_float(0x7f800000);
            float high = lane + 32 < count ? scores[h][lane + 32] : -__int_as_float(0x7f800000);
            float old = maxima[h], higher = fmaxf(old, warp_max(fmaxf(low, high)));
            float w0 = __expf(low - higher), w1 = __expf(high - higher);
            float sum = warp_sum(w0 + w1);
            weights[h][lane] = to_bf16(w0);
            weights[h][lane + 32] = to_bf16(w1);
            __syncwarp();
            if (lane == 0) {
                float factor = __expf(old - higher);
                maxima[h] = higher;
                sums[h] = sums[h] * factor + sum;
                rescale[h] = factor;
            }
        }
        __syncthreads();
        float low = rescale[g], high = rescale[g + 8];
        u32 w[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) ldmatrix4(w[j], &weights[lane & 15][j * 16 + (lane >> 4) * 8]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 tile = i * 8 + warp;
            if (tile < n_tiles) {
                acc[i][0] *= low;
                acc[i][1] *= low;
                acc[i][2] *= high;
                acc[i][3] *= high;
                u32 b[4];
                ldmatrix4_trans(b, keys + lane * pitch + tile * 8);
                mma(acc[i], w[0][0], w[0][1], w[0][2], w[0][3], b[0], b[1]);
                mma(acc[i], w[1][0], w[1][1], w[1][2], w[1][3], b[2], b[3]);
                ldmatrix4_trans(b, keys + (32 + lane) * pitch + tile * 8);
                mma(acc[i], w[2][0], w[2][1], w[2][2], w[2][3], b[0], b[1]);
                mma(acc[i], w[3][0], w[3][1], w[3][2], w[3][3], b[2], b[3]);
            }
        }
        __syncthreads();
    }
    bool whole = args.n_spans == 1;
    float inverse[2] = {whole ? 1.0f / sums[g] : 1.0f, whole ? 1.0f / sums[g + 8] : 1.0f};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i * 8 + warp < n_tiles) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 h = g + 8 * half, c = (i * 8 + warp) * 8 + 2 * t;
                if (h >= heads) continue;
                float2 v = make_float2(acc[i][2 * half] * inverse[half], acc[i][2 * half + 1] * inverse[half]);
                if (whole) {
                    u32 place = (head0 + h) * args.latent + c;
                    *(float2*)(args.out + u64(r) * args.n_heads * args.latent + place) = v;
                    if (args.packed) {
                        u16* packed = args.packed + u64(r) * args.packed_pitch;
                        packed[packed_place(place)] = to_bf16(v.x);
                        packed[packed_place(place + 1)] = to_bf16(v.y);
                    }
                } else {
                    u64 row = (u64(r) * args.n_spans + blockIdx.x) * args.n_heads + head0 + h;
                    *(float2*)(args.shares + row * args.latent + c) = v;
                }
            }
        }
    }
    if (!whole && threadIdx.x < heads) {
        u64 row = (u64(r) * args.n_spans + blockIdx.x) * args.n_heads + head0 + threadIdx.x;
        args.stats[row] = make_float2(maxima[threadIdx.x], sums[threadIdx.x]);
    }
}

// Adds up the spans of one row and head: four groups of 128 threads have every fourth span each.
extern "C" __global__ void __launch_bounds__(512) mla_merge(const __grid_constant__ MlaArgs args) {
    __shared__ float factors[MLA_MAX_SPANS];
    __shared__ float4 sums[3][128];
    let_next_start();
    u32 r = blockIdx.y, h = blockIdx.x, lane = threadIdx.x & 31, group = threadIdx.x >> 7, c = (threadIdx.x & 127) * 4;
    u32 visible = args.pages.positions[r] + 1;
    u32 n = args.selected ? min(visible, args.n_selected) : visible;
    u32 spans = (n + args.span - 1) / args.span;
    wait_for_previous();
    const float none = -__int_as_float(0x7f800000);
    const float2* stats = args.stats + u64(r) * args.n_spans * args.n_heads + h;
    const float* shares = args.shares + (u64(r) * args.n_spans * args.n_heads + h) * args.latent;
    // Every warp does the same, but one keeps it.
    float2 low = lane < spans ? stats[lane * args.n_heads] : make_float2(none, 0.0f);
    float2 high = lane + 32 < spans ? stats[(lane + 32) * args.n_heads] : make_float2(none, 0.0f);
    float highest = warp_max(fmaxf(low.x, high.x));
    float f0 = __expf(low.x - highest), f1 = __expf(high.x - highest);
    float inverse = 1.0f / warp_sum(f0 * low.y + f1 * high.y);
    if (threadIdx.x < 32) {
        factors[lane] = f0;
        factors[lane + 32] = f1;
    }
    __syncthreads();
    float4 sum = make_float4(0, 0, 0, 0);
    if (c < args.latent) {
#pragma unroll 8
        for (u32 s = group; s < spans; s += 4) {
            float factor = factors[s];
            float4 v = *(const float4*)(shares + u64(s) * args.n_heads * args.latent + c);
            sum.x += factor * v.x, sum.y += factor * v.y, sum.z += factor * v.z, sum.w += factor * v.w;
        }
    }
    if (group > 0) sums[group - 1][threadIdx.x & 127] = sum;
    __syncthreads();
    if (group > 0 || c >= args.latent) return;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        float4 v = sums[i][threadIdx.x];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    float v[4] = {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse};
    u32 place = h * args.latent + c;
    float* out = args.out + u64(r) * args.n_heads * args.latent + place;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[i] = v[i];
        if (args.packed) args.packed[u64(r) * args.packed_pitch + packed_place(place + i)] = to_bf16(v[i]);
    }
}
