// Sorts (token, choice) pairs by expert, for moe_mma.cu. One block.

struct MoePlanArgs {
    const int* ids;      // [n_pairs] expert of each pair, -1 for none
    int* n_active;
    int* active;         // [slots]
    int* first;          // [slots + 1]
    int* sorted;         // [n_pairs]
    u32 n_pairs, n_experts;
};

extern "C" __global__ void __launch_bounds__(1024) moe_plan(const __grid_constant__ MoePlanArgs args) {
    static_assert(MAX_EXPERTS <= 1024, "a thread has one expert");
    __shared__ int counts[1024];
    __shared__ int slots[1024];
    __shared__ int warp_pairs[32], warp_used[32];
    let_next_start();
    wait_for_previous();
    u32 e = threadIdx.x, lane = e & 31, warp = e >> 5;
    counts[e] = 0;
    __syncthreads();
    for (u32 i = e; i < args.n_pairs; i += blockDim.x)
        if (args.ids[i] >= 0) atomicAdd(&counts[args.ids[i]], 1);
    __syncthreads();
    // Prefix sums over experts of pairs and of experts in use.
    int count = counts[e], pairs = count, used = count > 0;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        int p = __shfl_up_sync(FULL, pairs, d), u = __shfl_up_sync(FULL, used, d);
        if (lane >= d) {
            pairs += p;
            used += u;
        }
    }
    if (lane == 31) {
        warp_pairs[warp] = pairs;
        warp_used[warp] = used;
    }
    __syncthreads();
    for (u32 w = 0; w < warp; w++) {
        pairs += warp_pairs[w];
        used += warp_used[w];
    }
    int first = pairs - count, slot = used - (count > 0);
    if (count > 0) {
        args.active[slot] = e;
        args.first[slot] = first;
        args.first[slot + 1] = pairs;
    }
    if (e == blockDim.x - 1) args.n_active[0] = used;
    __syncthreads();
    slots[e] = first;
    __syncthreads();
    // The order within an expert does not change any result.
    for (u32 i = e; i < args.n_pairs; i += blockDim.x)
        if (args.ids[i] >= 0) args.sorted[atomicAdd(&slots[args.ids[i]], 1)] = i;
}
