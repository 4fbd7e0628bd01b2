// Absorbed MLA over bf16 latents on the tensor cores: a block is one row, 16 heads and a span of attended positions.
// With several spans each block leaves an unnormalised share, which mla_merge adds up; one span stores the result.

#define MLA_TILE 32          // positions in shared memory at once
#define MLA_MAX_WIDTH 576
#define MLA_MAX_LATENT 512

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
};

DI u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

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

DI void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}

DI void copies_done() { asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory"); }

extern "C" __global__ void __launch_bounds__(128) mla_attention(const __grid_constant__ MlaArgs args) {
    extern __shared__ __align__(16) u16 memory[];
    __shared__ float scores[16][MLA_TILE + 1];
    __shared__ __align__(16) u16 weights[16][MLA_TILE + 8];
    __shared__ float maxima[16], sums[16], rescale[16];
    u32 pitch = args.width + 8;
    u16* q = memory;                     // [16, pitch]
    u16* keys = memory + 16 * pitch;     // [MLA_TILE, pitch]
    let_next_start();
    wait_for_previous();
    u32 r = blockIdx.z, head0 = blockIdx.y * 16, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 g = lane >> 2, t = lane & 3;
    u32 visible = args.pages.positions[r] + 1, sequence = args.pages.sequences[r];
    u32 n = args.selected ? min(visible, args.n_selected) : visible;
    u32 begin = blockIdx.x * args.span, end = min(begin + args.span, n);
    if (begin >= n) return;
    u32 heads = min(16u, args.n_heads - head0);
    const float* from = args.q + (u64(r) * args.n_heads + head0) * args.width;
    for (u32 i = threadIdx.x; i < 16 * args.width / 2; i += 128) {
        u32 h = 2 * i / args.width, c = 2 * i % args.width;
        *(u32*)(q + h * pitch + c) = h < heads ? pack_bf16(from[h * args.width + c], from[h * args.width + c + 1]) : 0;
    }
    if (threadIdx.x < 16) {
        maxima[threadIdx.x] = -__int_as_float(0x7f800000);
        sums[threadIdx.x] = 0.0f;
    }
    // Columns of the result: warp w has latent / 4 of them, at most 16 tiles of 8.
    u32 columns = args.latent / 4, column0 = warp * columns;
    float acc[16][4];
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = 0.0f;

    for (u32 first = begin; first < end; first += MLA_TILE) {
        u32 count = min(u32(MLA_TILE), end - first);
        u32 chunks = args.width / 8;
        for (u32 i = threadIdx.x; i < MLA_TILE * chunks; i += 128) {
            u32 p = i / chunks, c = i % chunks;
            u16* to = keys + p * pitch + c * 8;
            if (p < count) {
                u32 position = args.selected ? u32(args.selected[u64(r) * args.n_selected + first + p]) : first + p;
                copy16(to, args.cache + u64(args.pages.slot(sequence, position)) * args.width + c * 8);
            } else {
                *(uint4*)to = make_uint4(0, 0, 0, 0);
            }
        }
        copies_done();
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
        // Softmax: warp w has heads 4w .. 4w + 3, a lane a position.
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 h = warp * 4 + i;
            float score = lane < count ? scores[h][lane] : -__int_as_float(0x7f800000);
            float old = maxima[h], higher = fmaxf(old, warp_max(score));
            float weight = __expf(score - higher);
            float sum = warp_sum(weight);
            weights[h][lane] = to_bf16(weight);
            if (lane == 0) {
                float factor = __expf(old - higher);
                maxima[h] = higher;
                sums[h] = sums[h] * factor + sum;
                rescale[h] = factor;
            }
            __syncwarp();
        }
        __syncthreads();
        float low = rescale[g], high = rescale[g + 8];
        u32 w0[4], w1[4];
        ldmatrix4(w0, &weights[lane & 15][(lane >> 4) * 8]);
        ldmatrix4(w1, &weights[lane & 15][16 + (lane >> 4) * 8]);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (i * 8 < columns) {
                acc[i][0] *= low;
                acc[i][1] *= low;
                acc[i][2] *= high;
                acc[i][3] *= high;
                u32 b[4];
                ldmatrix4_trans(b, keys + lane * pitch + column0 + i * 8);
                mma(acc[i], w0[0], w0[1], w0[2], w0[3], b[0], b[1]);
                mma(acc[i], w1[0], w1[1], w1[2], w1[3], b[2], b[3]);
            }
        }
        __syncthreads();
    }
    bool whole = args.n_spans == 1;
    float inverse[2] = {whole ? 1.0f / sums[g] : 1.0f, whole ? 1.0f / sums[g + 8] : 1.0f};
#pragma unroll
    for (int i = 0; i < 16; i++) {
        if (i * 8 < columns) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 h = g + 8 * half, c = column0 + i * 8 + 2 * t;
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

// Adds up the spans of one row and head, in order.
extern "C" __global__ void __launch_bounds__(128) mla_merge(const __grid_constant__ MlaArgs args) {
    let_next_start();
    wait_for_previous();
    u32 r = blockIdx.y, h = blockIdx.x;
    u32 visible = args.pages.positions[r] + 1;
    u32 n = args.selected ? min(visible, args.n_selected) : visible;
    u32 spans = (n + args.span - 1) / args.span;
    const float2* stats = args.stats + u64(r) * args.n_spans * args.n_heads + h;
    float highest = -__int_as_float(0x7f800000);
    for (u32 s = 0; s < spans; s++) highest = fmaxf(highest, stats[s * args.n_heads].x);
    float total = 0.0f;
    for (u32 s = 0; s < spans; s++) {
        float2 v = stats[s * args.n_heads];
        total += __expf(v.x - highest) * v.y;
    }
    const float* shares = args.shares + (u64(r) * args.n_spans * args.n_heads + h) * args.latent;
    for (u32 c = threadIdx.x * 4; c < args.latent; c += 512) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (u32 s = 0; s < spans; s++) {
            float factor = __expf(stats[s * args.n_heads].x - highest);
            float4 v = *(const float4*)(shares + u64(s) * args.n_heads * args.latent + c);
            sum.x += factor * v.x, sum.y += factor * v.y, sum.z += factor * v.z, sum.w += factor * v.w;
        }
        float inverse = 1.0f / total;
        float v[4] = {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse};
        u32 place = h * args.latent + c;
        float* out = args.out + u64(r) * args.n_heads * args.latent + place;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] = v[i];
            if (args.packed) args.packed[u64(r) * args.packed_pitch + packed_place(place + i)] = to_bf16(v[i]);
        }
    }
}
