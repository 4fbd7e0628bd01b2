// The lightning indexer: scores sum_h weights[h] * relu(q[h] . key) of cached keys, and the positions of the k highest.

struct IndexArgs {
    Pages pages;
    const float* q;          // [n, n_heads * dim]
    const float* weights;    // [n, weights_pitch]
    const void* keys;        // [n_slots, dim]
    float* scores;           // [n, scores_pitch]
    int* selected;           // [n, k]
    u32 n_heads, dim, weights_pitch, scores_pitch, k;
    u32 row0;                // first row of this launch; scores start there
};

// One warp a position, any shape.
template <class T>
DI void index_scores_f32(const IndexArgs& args) {
    let_next_start();
    wait_for_previous();
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = args.row0 + blockIdx.y;
    u32 visible = args.pages.positions[r] + 1, sequence = args.pages.sequences[r];
    if (visible <= args.k) return;
    const float* q = args.q + u64(r) * args.n_heads * args.dim;
    for (u32 p = blockIdx.x * 64 + warp; p < min(blockIdx.x * 64 + 64, visible); p += 8) {
        const T* key = (const T*)args.keys + u64(args.pages.slot(sequence, p)) * args.dim;
        float score = 0.0f;
        for (u32 h = 0; h < args.n_heads; h++) {
            float dot = 0.0f;
            for (u32 e = lane; e < args.dim; e += 32) dot += q[h * args.dim + e] * load_element(key + e);
            score += args.weights[u64(r) * args.weights_pitch + h] * fmaxf(warp_sum(dot), 0.0f);
        }
        if (lane == 0) args.scores[u64(blockIdx.y) * args.scores_pitch + p] = score;
    }
}

extern "C" __global__ void __launch_bounds__(256) index_scores_f32_f32(const __grid_constant__ IndexArgs args) { index_scores_f32<float>(args); }
extern "C" __global__ void __launch_bounds__(256) index_scores_f32_bf16(const __grid_constant__ IndexArgs args) { index_scores_f32<u16>(args); }

// bf16 keys of 128 elements, heads a multiple of 16: a warp scores 16 positions on the tensor cores. Elements meet in the
// order in which lanes load 16 bytes.
extern "C" __global__ void __launch_bounds__(256) index_scores_mma(const __grid_constant__ IndexArgs args) {
    let_next_start();
    wait_for_previous();
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, r = args.row0 + blockIdx.y;
    u32 visible = args.pages.positions[r] + 1, sequence = args.pages.sequences[r];
    u32 p0 = blockIdx.x * 128 + warp * 16;
    if (visible <= args.k || p0 >= visible) return;
    uint4 keys[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        u32 p = min(p0 + j * 8 + g, visible - 1);
        const u16* key = (const u16*)args.keys + u64(args.pages.slot(sequence, p)) * 128;
#pragma unroll
        for (int i = 0; i < 4; i++) keys[j][i] = *(const uint4*)(key + i * 32 + t * 8);
    }
    float low[2] = {}, high[2] = {};     // positions 2t and 2t + 1 of each tile
    for (u32 h0 = 0; h0 < args.n_heads; h0 += 16) {
        float acc[2][4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* a = args.q + (u64(r) * args.n_heads + h0 + g) * 128 + i * 32 + t * 8;
            const float* b = a + 8 * 128;
            u32 p[4], q[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                p[e] = pack_bf16(a[2 * e], a[2 * e + 1]);
                q[e] = pack_bf16(b[2 * e], b[2 * e + 1]);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                mma(acc[j], p[0], q[0], p[1], q[1], keys[j][i].x, keys[j][i].y);
                mma(acc[j], p[2], q[2], p[3], q[3], keys[j][i].z, keys[j][i].w);
            }
        }
        float w0 = args.weights[u64(r) * args.weights_pitch + h0 + g];
        float w1 = args.weights[u64(r) * args.weights_pitch + h0 + g + 8];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            low[j] += w0 * fmaxf(acc[j][0], 0.0f) + w1 * fmaxf(acc[j][2], 0.0f);
            high[j] += w0 * fmaxf(acc[j][1], 0.0f) + w1 * fmaxf(acc[j][3], 0.0f);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int d = 4; d < 32; d <<= 1) {
            low[j] += __shfl_xor_sync(FULL, low[j], d);
            high[j] += __shfl_xor_sync(FULL, high[j], d);
        }
        u32 p = p0 + j * 8 + 2 * t;
        float* out = args.scores + u64(blockIdx.y) * args.scores_pitch + p;
        if (g == 0 && p < visible) out[0] = low[j];
        if (g == 0 && p + 1 < visible) out[1] = high[j];
    }
}

// Finds the bucket that holds the `wanted`-th highest of `counts[n]`, and how many are wanted of it. One warp.
DI void find_bucket(const u32* counts, u32 n, u32 wanted, u32& bucket, u32& rest) {
    u32 lane = threadIdx.x & 31, each = n / 32, sum = 0;
    // Lane 0 has the highest buckets.
    u32 top = n - lane * each;
    for (u32 i = 1; i <= each; i++) sum += counts[top - i];
    u32 through = sum;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        u32 v = __shfl_up_sync(FULL, through, d);
        if (lane >= d) through += v;
    }
    u32 holders = __ballot_sync(FULL, through >= wanted);
    u32 holder = __ffs(holders) - 1;
    u32 b = 0, left = 0;
    if (lane == holder) {
        left = wanted - (through - sum);
        b = top - 1;
        while (counts[b] < left) left -= counts[b--];
    }
    bucket = __shfl_sync(FULL, b, holder);
    rest = __shfl_sync(FULL, left, holder);
}

// Positions of the k highest scores, ascending; all of them while there are no more, then -1. Among equal scores at the
// threshold the earlier positions win. Radix selection in digits of 12, 12 and 8 bits; a block of 1024 a row.
extern "C" __global__ void __launch_bounds__(1024) index_topk(const __grid_constant__ IndexArgs args) {
    __shared__ u32 counts[4096];
    __shared__ u32 found_bucket, found_rest;
    __shared__ u32 warp_higher[32], warp_equal[32];
    let_next_start();
    wait_for_previous();
    u32 r = args.row0 + blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 visible = args.pages.positions[r] + 1, k = args.k;
    int* selected = args.selected + u64(r) * k;
    if (visible <= k) {
        for (u32 i = threadIdx.x; i < k; i += 1024) selected[i] = i < visible ? int(i) : -1;
        return;
    }
    const float* scores = args.scores + u64(blockIdx.x) * args.scores_pitch;
    u32 prefix = 0, wanted = k;
    const u32 shifts[3] = {20, 8, 0}, widths[3] = {12, 12, 8};
#pragma unroll
    for (int pass = 0; pass < 3; pass++) {
        u32 shift = shifts[pass], width = widths[pass];
        for (u32 i = threadIdx.x; i < 4096; i += 1024) counts[i] = 0;
        __syncthreads();
        for (u32 i0 = threadIdx.x; i0 < visible; i0 += 8 * 1024) {
            float loaded[8];
#pragma unroll
            for (int j = 0; j < 8; j++) loaded[j] = i0 + j * 1024 < visible ? scores[i0 + j * 1024] : 0.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                u32 o = ordered(loaded[j]);
                bool member = pass == 0 || o >> (shift + width) == prefix;
                if (i0 + j * 1024 < visible && member) atomicAdd(&counts[o >> shift & ((1u << width) - 1)], 1);
            }
        }
        __syncthreads();
        if (warp == 0) {
            u32 bucket, rest;
            find_bucket(counts, 1u << width, wanted, bucket, rest);
            if (lane == 0) {
                found_bucket = bucket;
                found_rest = rest;
            }
        }
        __syncthreads();
        prefix = prefix << width | found_bucket;
        wanted = found_rest;
        __syncthreads();
    }
    // `prefix` is the threshold; `wanted` of the scores equal to it are taken. A warp has a run of positions.
    u32 each = ((visible + 31) / 32 + 31) / 32 * 32;
    u32 begin = min(warp * each, visible), end = min(begin + each, visible);
    u32 higher = 0, equal = 0;
#pragma unroll 8
    for (u32 i = begin + lane; i < end; i += 32) {
        u32 o = ordered(scores[i]);
        higher += o > prefix;
        equal += o == prefix;
    }
    higher = __reduce_add_sync(FULL, higher);
    equal = __reduce_add_sync(FULL, equal);
    if (lane == 0) {
        warp_higher[warp] = higher;
        warp_equal[warp] = equal;
    }
    __syncthreads();
    u32 place = 0, equals = 0;
    for (u32 w = 0; w < warp; w++) {
        place += warp_higher[w];
        equals += warp_equal[w];
    }
    place += min(equals, wanted);
#pragma unroll 4
    for (u32 i0 = begin; i0 < end; i0 += 32) {
        u32 i = i0 + lane;
        u32 o = i < end ? ordered(__ldg(scores + i)) : 0;
        bool is_higher = i < end && o > prefix, is_equal = i < end && o == prefix;
        u32 equal_mask = __ballot_sync(FULL, is_equal);
        bool taken = is_higher || (is_equal && equals + __popc(equal_mask & ((1u << lane) - 1)) < wanted);
        u32 mask = __ballot_sync(FULL, taken);
        if (taken) selected[place + __popc(mask & ((1u << lane) - 1))] = i;
        place += __popc(mask);
        equals += __popc(equal_mask);
    }
}
