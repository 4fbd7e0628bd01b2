// The lightning indexer: scores sum_h weights[h] * relu(q[h] . key) of cached keys, and the positions of the k highest.
//
// The kernels of scores let the next one start only after their own wait: when that of the positions begins, all that came
// before the scores is there, and what follows may read it without a wait (linear_mma's x_is_there).

struct IndexArgs {
    Pages pages;
    const float* q;          // [n, n_heads * dim]
    const float* weights;    // [n, weights_pitch]
    const void* keys;        // [n_slots, dim]
    float* scores;           // [n, scores_pitch]
    int* selected;           // [n, k]
    u32 n_heads, dim, weights_pitch, scores_pitch, k;
    u32 row0;                // first row of this launch; scores start there
    u32 alone;               // the only row of its batch: all keys but its own were cached by earlier steps
    u32 unused;
    Rope rope;               // index_scores_mma: rotates queries unless `half` is 0
};

// One warp a position, any shape.
template <class T>
DI void index_scores_f32(const IndexArgs& args) {
    wait_for_previous();
    let_next_start();
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = args.row0 + blockIdx.y;
    u32 visible = args.pages.positions[r] + 1, sequence = args.pages.sequences[r];
    if (visible <= args.k) return;
    const float* q = args.q + u64(r) * args.n_heads * args.dim;
    for (u32 p = blockIdx.x * INDEX_F32_TILE + warp; p < min((blockIdx.x + 1) * INDEX_F32_TILE, visible); p += 8) {
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

// bf16 keys of up to INDEX_MAX_DIM elements, a multiple of 32, and up to INDEX_MAX_HEADS heads: a warp scores 16 positions at once on the tensor
// cores. Elements meet in the order in which lanes load 16 bytes; queries wait in shared memory in that order.
extern "C" __global__ void __launch_bounds__(256) index_scores_mma(const __grid_constant__ IndexArgs args) {
    __shared__ uint4 queries[INDEX_MAX_HEADS / 16][INDEX_MAX_DIM / 32][2][32];
    __shared__ float weights[INDEX_MAX_HEADS], cosines[INDEX_MAX_DIM / 2], sines[INDEX_MAX_DIM / 2];
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, r = args.row0 + blockIdx.y;
    // What comes with the batch is there before any kernel of the step.
    u32 visible = args.pages.positions[r] + 1, sequence = args.pages.sequences[r], half = args.rope.half;
    if (threadIdx.x < half) angle(args.rope, threadIdx.x, visible - 1, cosines[threadIdx.x], sines[threadIdx.x]);
    uint4 keys[2][4];
    auto load_keys = [&](u32 p0) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            u32 p = min(p0 + j * 8 + g, visible - 1);
            const u16* key = (const u16*)args.keys + u64(args.pages.slot(sequence, p)) * args.dim;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i * 32 < args.dim) keys[j][i] = *(const uint4*)(key + i * 32 + t * 8);
        }
    };
    // The first keys before the wait, unless one of them is new.
    u32 start = blockIdx.x * INDEX_TILE + warp * 16;
    bool loaded = args.alone && start + 16 < visible;
    if (loaded) load_keys(start);
    wait_for_previous();
    let_next_start();
    if (visible <= args.k || blockIdx.x * INDEX_TILE >= visible) return;
    __syncthreads();
    u32 pieces = args.dim / 8, n_groups = (args.n_heads + 15) / 16;
    if (threadIdx.x < n_groups * 16)
        weights[threadIdx.x] = threadIdx.x < args.n_heads ? args.weights[u64(r) * args.weights_pitch + threadIdx.x] : 0.0f;
    for (u32 u = threadIdx.x; u < n_groups * 16 * pieces; u += 256) {
        u32 h = u / pieces, piece = u % pieces, e = piece * 8;
        float v[8] = {};
        if (h < args.n_heads) {
            const float* q = args.q + (u64(r) * args.n_heads + h) * args.dim;
            *(float4*)v = *(const float4*)(q + e);
            *(float4*)(v + 4) = *(const float4*)(q + e + 4);
            if (e < 2 * half) rotate_8(args.rope, q, e, cosines, sines, v);
        }
        queries[h >> 4][piece >> 2][h >> 3 & 1][(h & 7) * 4 + (piece & 3)] =
            make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
    __syncthreads();
    for (u32 p0 = start; p0 < visible; p0 += gridDim.x * INDEX_TILE) {
        if (!loaded) load_keys(p0);
        loaded = false;
        float low[2] = {}, high[2] = {};     // positions 2t and 2t + 1 of each tile
        for (u32 group = 0; group < n_groups; group++) {
            float acc[2][4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i * 32 >= args.dim) break;
                uint4 a = queries[group][i][0][lane], b = queries[group][i][1][lane];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    mma(acc[j], a.x, b.x, a.y, b.y, keys[j][i].x, keys[j][i].y);
                    mma(acc[j], a.z, b.z, a.w, b.w, keys[j][i].z, keys[j][i].w);
                }
            }
            float w0 = weights[group * 16 + g], w1 = weights[group * 16 + g + 8];
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
}

// Blocks of a row: one, or a cluster of 8 that read each other's shared memory, which compute capability 9.0 has.
#if __CUDA_ARCH__ >= 900
DI void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

DI u32 load_cluster(const u32* p, u32 rank) {
    u32 address, v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

DI void store_cluster(const u32* p, u32 rank, u32 v) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
#else
DI void cluster_sync() {}
DI u32 load_cluster(const u32* p, u32) { return *p; }
DI void store_cluster(const u32*, u32, u32) {}
#endif

// Positions of the k highest scores, ascending; all of them while there are no more, then -1. Among equal scores at the
// threshold the earlier positions win. Radix selection in digits of 11, 11 and 10 bits; a warp has a run of positions, of
// which a lane keeps up to KEPT in registers.
template <u32 BLOCKS, int KEPT>
DI void index_topk(const IndexArgs& args) {
    __shared__ u32 counts[2048];
    __shared__ u32 warp_sums[32];
    __shared__ u32 found_bucket, found_rest;
    __shared__ u32 warp_higher[32], warp_equal[32];
    __shared__ u32 totals[2];
    let_next_start();
    u32 row = BLOCKS == 1 ? blockIdx.x : blockIdx.x / BLOCKS, rank = BLOCKS == 1 ? 0 : blockIdx.x % BLOCKS;
    u32 r = args.row0 + row, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 visible = args.pages.positions[r] + 1, k = args.k;
    wait_for_previous();
    int* selected = args.selected + u64(r) * k;
    if (visible <= k) {
        for (u32 i = rank * 1024 + threadIdx.x; i < k; i += BLOCKS * 1024) selected[i] = i < visible ? int(i) : -1;
        return;
    }
    const float* scores = args.scores + u64(row) * args.scores_pitch;
    u32 each = ((visible + 32 * BLOCKS - 1) / (32 * BLOCKS) + 31) / 32 * 32;
    u32 begin = min((rank * 32 + warp) * each, visible), end = min(begin + each, visible);
    u32 kept[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        u32 p = begin + i * 32 + lane;
        kept[i] = p < end ? ordered(__ldcg(scores + p)) : 0;
    }
    // Calls `f(score, exists, position)` for the warp's positions, all lanes together.
    auto for_each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (begin + i * 32 < end) f(kept[i], begin + i * 32 + lane < end, begin + i * 32 + lane);
        for (u32 p0 = begin + KEPT * 32; p0 < end; p0 += 32) {
            u32 p = p0 + lane;
            f(p < end ? ordered(__ldcg(scores + p)) : 0, p < end, p);
        }
    };
    u32 prefix = 0, wanted = k;
    const u32 shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
#pragma unroll
    for (int pass = 0; pass < 3; pass++) {
        u32 shift = shifts[pass], width = widths[pass];
        counts[threadIdx.x] = counts[threadIdx.x + 1024] = 0;
        __syncthreads();
        for_each([&](u32 o, bool exists, u32) {
            bool member = pass == 0 || o >> (shift + width) == prefix;
            if (exists && member) atomicAdd(&counts[o >> shift & ((1u << width) - 1)], 1);
        });
        // Buckets from the highest on: which holds the `wanted`-th score, and how many are wanted of it. A block alone has two
        // a thread; of a cluster each block adds up its part of them.
        constexpr u32 EACH = BLOCKS == 1 ? 2 : 1;
        if (BLOCKS > 1) cluster_sync();
        __syncthreads();
        u32 part = (1u << width) / BLOCKS, at = EACH * threadIdx.x, top = (1u << width) - 1 - rank * part - at, n[2] = {0, 0};
        if (at < part) {
            n[0] = counts[top];
            if (EACH == 2) n[1] = counts[top - 1];
#pragma unroll
            for (u32 other = 1; other < BLOCKS; other++) n[0] += load_cluster(counts + top, (rank + other) % BLOCKS);
        }
        u32 sum = n[0] + n[1], through = sum;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            u32 v = __shfl_up_sync(FULL, through, d);
            if (lane >= d) through += v;
        }
        if (lane == 31) warp_sums[warp] = through;
        __syncthreads();
        u32 before = lane < warp ? warp_sums[lane] : 0;
        through += __reduce_add_sync(FULL, before);
        if (BLOCKS > 1) {
            if (threadIdx.x == 1023) totals[0] = through;
            cluster_sync();
            before = lane < rank ? load_cluster(totals, lane) : 0;
            through += __reduce_add_sync(FULL, before);
        }
        if (through >= wanted && through - sum < wanted) {
            u32 left = wanted - (through - sum), bucket = left > n[0] ? top - 1 : top, rest = left > n[0] ? left - n[0] : left;
            if (BLOCKS == 1) {
                found_bucket = bucket;
                found_rest = rest;
            }
#pragma unroll
            for (u32 other = 0; BLOCKS > 1 && other < BLOCKS; other++) {
                store_cluster(&found_bucket, other, bucket);
                store_cluster(&found_rest, other, rest);
            }
        }
        // Then nobody reads these counts any more.
        if (BLOCKS > 1) cluster_sync();
        __syncthreads();
        prefix = prefix << width | found_bucket;
        wanted = found_rest;
    }
    // `prefix` is the threshold; `wanted` of the scores equal to it are taken.
    u32 higher = 0, equal = 0;
    for_each([&](u32 o, bool exists, u32) {
        higher += exists && o > prefix;
        equal += exists && o == prefix;
    });
    higher = __reduce_add_sync(FULL, higher);
    equal = __reduce_add_sync(FULL, equal);
    if (lane == 0) {
        warp_higher[warp] = higher;
        warp_equal[warp] = equal;
    }
    __syncthreads();
    u32 place = __reduce_add_sync(FULL, lane < warp ? warp_higher[lane] : 0);
    u32 equals = __reduce_add_sync(FULL, lane < warp ? warp_equal[lane] : 0);
    if (BLOCKS > 1) {
        if (threadIdx.x == 1023) {
            totals[0] = place + higher;
            totals[1] = equals + equal;
        }
        cluster_sync();
        for (u32 other = 0; other < rank; other++) {
            place += load_cluster(totals, other);
            equals += load_cluster(totals + 1, other);
        }
        // Nobody leaves while others read its totals.
        cluster_sync();
    }
    place += min(equals, wanted);
    for_each([&](u32 o, bool exists, u32 position) {
        bool is_higher = exists && o > prefix, is_equal = exists && o == prefix;
        u32 equal_mask = __ballot_sync(FULL, is_equal);
        bool taken = is_higher || (is_equal && equals + __popc(equal_mask & ((1u << lane) - 1)) < wanted);
        u32 mask = __ballot_sync(FULL, taken);
        if (taken) selected[place + __popc(mask & ((1u << lane) - 1))] = position;
        place += __popc(mask);
        equals += __popc(equal_mask);
    });
}

// By blocks a row, and scores that a lane keeps: each costs time even where it is not needed.
extern "C" __global__ void __launch_bounds__(1024) index_topk_1_8(const __grid_constant__ IndexArgs args) { index_topk<1, 8>(args); }
extern "C" __global__ void __launch_bounds__(1024) index_topk_1_16(const __grid_constant__ IndexArgs args) { index_topk<1, 16>(args); }
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __cluster_dims__(TOPK_CLUSTER, 1, 1) __launch_bounds__(1024) index_topk_8_8(const __grid_constant__ IndexArgs args) { index_topk<TOPK_CLUSTER, 8>(args); }
extern "C" __global__ void __cluster_dims__(TOPK_CLUSTER, 1, 1) __launch_bounds__(1024) index_topk_8_16(const __grid_constant__ IndexArgs args) { index_topk<TOPK_CLUSTER, 16>(args); }
#endif
