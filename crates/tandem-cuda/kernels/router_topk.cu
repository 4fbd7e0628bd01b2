// The choice of experts (DeepSeek-V3's noaux_tc): sigmoid scores plus bias pick groups and experts, scores alone weigh.
// One warp a row; at most MAX_EXPERTS experts in at most 32 groups, a lane each. Ties go to the lower index.

struct RouterArgs {
    const float* logits;     // [n, n_experts]
    const float* bias;       // [n_experts]
    int* ids;                // [n, top_k] relative to first_expert, -1 for experts that are not held
    float* weights;          // [n, top_k]
    u32 n_experts, top_k, n_group, topk_group, normalize;
    float scale;
    u32 first_expert, n_held;
};

// Lane and value of the largest (value, then lowest index).
DI void best_of_warp(float& value, u32& index) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) {
        float v = __shfl_xor_sync(FULL, value, d);
        u32 i = __shfl_xor_sync(FULL, index, d);
        if (v > value || (v == value && i < index)) {
            value = v;
            index = i;
        }
    }
}

// Experts of a lane.
#define LANE_EXPERTS (MAX_EXPERTS / 32)
static_assert(MAX_TOP_K <= 32 && MAX_GROUPS <= 32, "a lane has one choice and one group");

// One warp; `scores` and `choice` have MAX_EXPERTS floats.
DI void router_row(const RouterArgs& args, u32 row, float* scores, float* choice) {
    const float none = -__int_as_float(0x7f800000);
    u32 lane = threadIdx.x & 31, n = args.n_experts;
    const float* logits = args.logits + u64(row) * n;
    float loaded[LANE_EXPERTS];
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) loaded[i] = i * 32 + lane < n ? __ldcg(logits + i * 32 + lane) : 0.0f;
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) {
        u32 e = i * 32 + lane;
        if (e >= n) break;
        float s = 1.0f / (1.0f + expf(-loaded[i]));
        scores[e] = s;
        choice[e] = s + __ldg(args.bias + e);
    }
    __syncwarp();
    if (args.n_group > 1) {
        u32 size = n / args.n_group;
        float group = none;
        if (lane < args.n_group) {
            float first = none, second = none;
            for (u32 e = lane * size; e < (lane + 1) * size; e++) {
                float v = choice[e];
                if (v > first) {
                    second = first;
                    first = v;
                } else if (v > second) {
                    second = v;
                }
            }
            group = first + second;
        }
        u32 kept = 0;
        for (u32 i = 0; i < args.topk_group; i++) {
            float value = kept >> lane & 1 ? none : group;
            u32 index = kept >> lane & 1 ? 64 + lane : lane;
            best_of_warp(value, index);
            kept |= 1u << (index & 31);
        }
        __syncwarp();
        for (u32 e = lane; e < size * args.n_group; e += 32)
            if (!(kept >> (e / size) & 1)) choice[e] = none;
        __syncwarp();
    }
    // A lane has experts lane, lane + 32, ..; order-preserving integers, 0 for none and for those taken.
    u32 keys[LANE_EXPERTS];
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) {
        u32 e = i * 32 + lane;
        keys[i] = e < n ? ordered(choice[e]) : 0;
    }
    float sum = 0.0f, mine = 0.0f;
    u32 my_id = 0;
    for (u32 k = 0; k < args.top_k; k++) {
        u32 best = 0;
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) best = max(best, keys[i]);
        best = __reduce_max_sync(FULL, best);
        u32 index = 1u << 30;
#pragma unroll
        for (int i = LANE_EXPERTS - 1; i >= 0; i--)
            if (keys[i] == best) index = i * 32 + lane;
        index = min(__reduce_min_sync(FULL, index), n - 1);
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++)
            if (index == i * 32 + lane) keys[i] = 0;
        float s = scores[index];
        sum += s;
        if (lane == k) {
            mine = s;
            my_id = index;
        }
    }
    if (lane < args.top_k) {
        u32 held = my_id - args.first_expert;
        args.ids[u64(row) * args.top_k + lane] = held < args.n_held ? int(held) : -1;
        args.weights[u64(row) * args.top_k + lane] = (args.normalize ? mine / (sum + 1e-20f) : mine) * args.scale;
    }
}

// Those of 4 `words` keys that come before key `mine` of index `own`: the larger, then the lower index. The indices of a warp's
// lanes are 32 in a row; keys past the last expert are 0.
DI u32 keys_before(const uint4* keys, u32 words, u32 mine, u32 own) {
    u32 before = 0, same = own / 32 * 8;
#pragma unroll 4
    for (u32 i = 0; i < same; i++) {
        uint4 v = keys[i];
        before += (v.x >= mine) + (v.y >= mine) + (v.z >= mine) + (v.w >= mine);
    }
    for (u32 i = same; i < min(same + 8, words); i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++) before += i * 4 + j < own ? word(keys[i], j) >= mine : word(keys[i], j) > mine;
#pragma unroll 4
    for (u32 i = same + 8; i < words; i++) {
        uint4 v = keys[i];
        before += (v.x > mine) + (v.y > mine) + (v.z > mine) + (v.w > mine);
    }
    return before;
}

// router_row by a block of 256 threads: every expert counts those that come before it.
DI void router_block(const RouterArgs& args) {
    constexpr u32 EACH = MAX_EXPERTS / 256;
    __shared__ float scores[MAX_EXPERTS], first[MAX_GROUPS], second[MAX_GROUPS];
    __shared__ __align__(16) u32 keys[MAX_EXPERTS];
    __shared__ u32 group_keys[MAX_GROUPS], chosen[MAX_TOP_K];
    const float none = -__int_as_float(0x7f800000);
    u32 n = args.n_experts, lane = threadIdx.x & 31;
    float choice[EACH], bias[EACH];
    u32 key[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        u32 e = min(i * 256 + threadIdx.x, n - 1);
        choice[i] = __ldcg(args.logits + e);
        bias[i] = __ldg(args.bias + e);
    }
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        u32 e = i * 256 + threadIdx.x;
        keys[e] = 0;
        if (e >= n) continue;
        float s = 1.0f / (1.0f + expf(-choice[i]));
        scores[e] = s;
        choice[i] = s + bias[i];
        key[i] = keys[e] = ordered(choice[i]);
    }
    if (threadIdx.x < MAX_GROUPS) first[threadIdx.x] = second[threadIdx.x] = none;
    __syncthreads();
    if (args.n_group > 1) {
        u32 size = n / args.n_group;
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            u32 e = i * 256 + threadIdx.x, group = e / size;
            if (group >= args.n_group) break;
            u32 before = 0;
            for (u32 j = group * size; j < (group + 1) * size; j++) before += keys[j] > key[i] || (keys[j] == key[i] && j < e);
            if (before == 0) first[group] = choice[i];
            if (before == 1) second[group] = choice[i];
        }
        __syncthreads();
        if (threadIdx.x < args.n_group) group_keys[threadIdx.x] = ordered(first[threadIdx.x] + second[threadIdx.x]);
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            u32 e = i * 256 + threadIdx.x, group = e / size;
            if (group >= args.n_group) break;
            u32 before = 0, mine = group_keys[group];
            for (u32 j = 0; j < args.n_group; j++) before += group_keys[j] > mine || (group_keys[j] == mine && j < group);
            if (before >= args.topk_group) key[i] = keys[e] = ordered(none);
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        u32 e = i * 256 + threadIdx.x;
        if (e >= n) break;
        u32 before = keys_before((const uint4*)keys, (n + 3) / 4, key[i], e);
        if (before < args.top_k) chosen[before] = e;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    float mine = 0.0f, sum = 0.0f;
    u32 id = 0;
    if (lane < args.top_k) {
        id = chosen[lane];
        mine = scores[id];
    }
    for (u32 k = 0; k < args.top_k; k++) sum += __shfl_sync(FULL, mine, k);
    if (lane >= args.top_k) return;
    u32 held = id - args.first_expert;
    args.ids[lane] = held < args.n_held ? int(held) : -1;
    args.weights[lane] = (args.normalize ? mine / (sum + 1e-20f) : mine) * args.scale;
}

extern "C" __global__ void __launch_bounds__(32) router_topk(const __grid_constant__ RouterArgs args) {
    __shared__ float scores[MAX_EXPERTS], choice[MAX_EXPERTS];
    let_next_start();
    wait_for_previous();
    router_row(args, blockIdx.x, scores, choice);
}

// The router's product and choice in one launch: the last block to finish chooses. Sums are linear_f32's.
template <int TOKENS>
DI void route(const LinearF32Args& linear, const RouterArgs& args, u32* ticket) {
    __shared__ bool last;
    let_next_start();
    // Constants, on their way while the previous kernel finishes.
    if (blockIdx.x == 0 && threadIdx.x * 32 < args.n_experts) prefetch(args.bias + threadIdx.x * 32);
    if constexpr (TOKENS == 1) {
        __shared__ uint4 held[HELD_STEPS][256];
        bool holds = hold_weights(linear, held);
        wait_for_previous();
        linear_f32<1>(linear, holds ? held : nullptr);
    } else {
        if (threadIdx.x * 128 < linear.m.row_bytes) prefetch(linear.m.weight + u64(blockIdx.x) * linear.m.row_bytes + threadIdx.x * 128);
        wait_for_previous();
        linear_f32<TOKENS>(linear);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // After the barrier this holds for the whole block.
        __threadfence();
        last = atomicAdd(ticket, 1) == gridDim.x * gridDim.y - 1;
        if (last) *ticket = 0;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    if constexpr (TOKENS == 1) {
        router_block(args);
    } else {
        __shared__ float scores[8][MAX_EXPERTS], choice[8][MAX_EXPERTS];
        u32 warp = threadIdx.x >> 5;
        for (u32 row = warp; row < linear.n; row += 8) {
            router_row(args, row, scores[warp], choice[warp]);
            __syncwarp();
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 5) route_1(const __grid_constant__ LinearF32Args linear, const __grid_constant__ RouterArgs args, u32* ticket) {
    route<1>(linear, args, ticket);
}
extern "C" __global__ void __launch_bounds__(256) route_8(const __grid_constant__ LinearF32Args linear, const __grid_constant__ RouterArgs args, u32* ticket) {
    route<8>(linear, args, ticket);
}
