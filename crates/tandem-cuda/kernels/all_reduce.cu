// Sums over the GPUs of one host, each with a process of its own, by plain stores into each other's memory (one shot, as
// NCCL's LL protocol): every 8 bytes of data carry the number of the sum they belong to, so that a reader knows what has
// arrived without a fence or a second message. Buffers alternate: a rank that sends for sum s has seen everybody's
// part of sum s - 1, so everybody is done with s - 2.

// Nanoseconds without a part of another rank, after which it is given up.
#define PATIENCE 20000000000ull

struct ReduceArgs {
    uint4* buffers[MAX_RANKS];   // of each rank, as this one sees it: [2][n_ranks][capacity]
    u32* state;                  // number of the last sum; blocks that are done; 1 once a rank was given up
    u32* failed;                 // the same for the host
    u32 n_ranks, rank, capacity, unused;
};

DI void send(uint4* to, float a, float b, u32 number) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%2};" ::"l"(to), "r"(__float_as_uint(a)), "r"(number), "r"(__float_as_uint(b)) : "memory");
}

DI uint4 peek(const uint4* from) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

DI u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// `v`, elements 8 i .. 8 i + 8 of this rank's part, becomes the sum over ranks, in their order.
DI void reduce_8(const ReduceArgs& args, u32 number, u32 i, float (&v)[8]) {
    u32 half = (number & 1) * args.n_ranks;
    for (u32 other = 1; other < args.n_ranks; other++) {
        u32 to = (args.rank + other) % args.n_ranks;
        uint4* place = args.buffers[to] + u64(half + args.rank) * args.capacity + i * 4;
#pragma unroll
        for (int j = 0; j < 4; j++) send(place + j, v[2 * j], v[2 * j + 1], number);
    }
    float sum[8];
    for (u32 from = 0; from < args.n_ranks; from++) {
        float part[8];
        if (from == args.rank) {
#pragma unroll
            for (int j = 0; j < 8; j++) part[j] = v[j];
        } else {
            const uint4* place = args.buffers[args.rank] + u64(half + from) * args.capacity + i * 4;
            u64 start = 0;
            for (u32 tries = 1;; tries++) {
                bool here = true;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint4 p = peek(place + j);
                    here = here && p.y == number && p.w == number;
                    part[2 * j] = __uint_as_float(p.x);
                    part[2 * j + 1] = __uint_as_float(p.z);
                }
                if (here) break;
                if (tries % 1024) continue;
                if (start == 0) start = nanoseconds();
                if (load_fresh((const int*)args.state + 2) || nanoseconds() - start > PATIENCE) {
                    args.state[2] = 1;
                    *(volatile u32*)args.failed = 1;
                    break;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = from == 0 ? part[j] : sum[j] + part[j];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = sum[j];
}

// The last block to finish counts the sum.
DI void finish_sum(const ReduceArgs& args, u32 number) {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(args.state + 1, 1) == gridDim.x - 1) {
        args.state[1] = 0;
        args.state[0] = number;
    }
}

// x = sum over ranks of x, n groups of 8 elements.
extern "C" __global__ void __launch_bounds__(256) all_reduce(const __grid_constant__ ReduceArgs args, float* x, u32 n) {
    let_next_start();
    wait_for_previous();
    u32 number = u32(load_fresh((const int*)args.state)) + 1, i = blockIdx.x * 256 + threadIdx.x;
    if (i < n) {
        float v[8];
        load_8(x + u64(i) * 8, v);
        reduce_8(args, number, i, v);
        *(float4*)(x + u64(i) * 8) = *(const float4*)v;
        *(float4*)(x + u64(i) * 8 + 4) = *(const float4*)(v + 4);
    }
    finish_sum(args, number);
}

// rms_norm of x + (sum over ranks of y): a row a block, a group of 8 elements a thread.
extern "C" __global__ void __launch_bounds__(1024) all_reduce_norm(const __grid_constant__ ReduceArgs args, const __grid_constant__ NormArgs norm) {
    __shared__ float scratch[32];
    let_next_start();
    float w[8] = {};
    load_weights(norm, w);
    wait_for_previous();
    u32 number = u32(load_fresh((const int*)args.state)) + 1;
    float y[8] = {};
    if (threadIdx.x * 8 < norm.width) {
        load_8(norm.y + u64(blockIdx.x) * norm.y_pitch + threadIdx.x * 8, y);
        reduce_8(args, number, blockIdx.x * norm.width / 8 + threadIdx.x, y);
    }
    norm_row_8(norm, blockIdx.x, scratch, y, w);
    finish_sum(args, number);
}
