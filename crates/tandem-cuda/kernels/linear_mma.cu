// out = x . w^T for up to four matrices of one packed format on one input, or for the matrices of a stack on slices of it.

struct LinearJob {
    Matrix m;
    float* out;          // [n, out_pitch]
    u16* packed;         // the same as packed bf16, [n, packed_pitch], or null
    u32 out_pitch, packed_pitch;
    u32 first_block;     // blocks of this job start here
    u32 add;             // add to out instead of storing
};

struct LinearArgs {
    LinearJob jobs[MAX_JOBS];
    const u16* x;        // packed bf16, [n, x_pitch]
    u32 n_jobs, x_pitch, n, split;
    u32 x_offset, x_stride;      // of part p: x_offset + p * x_stride
    u32 out_offset, out_stride;
    u32 x_is_there;              // x was written before the previous kernel let this one start
    u32 unused;
};

template <int NT, bool ONE = false>
DI void linear_mma(const LinearArgs& args) {
    __shared__ float shares[8][NT][4][32];
    u32 j = 0;
    while (j + 1 < args.n_jobs && blockIdx.y >= args.jobs[j + 1].first_block) j++;
    const LinearJob& job = args.jobs[j];
    u32 part = blockIdx.z, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = args.split;
    u32 block_row = (blockIdx.y - job.first_block) * (8 / split) * 16;
    u32 row = block_row + warp / split * 16;
    u32 column0 = blockIdx.x * 8 * NT;
    u32 columns[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        u32 column = column0 + n * 8 + (lane >> 2);
        columns[n] = column < args.n ? column * args.x_pitch + args.x_offset + part * args.x_stride : NO_COLUMN;
    }
    let_next_start();
    float acc[NT][4];
    const u16* x = ONE ? args.x + args.x_offset + part * args.x_stride : args.x;
    tile_rows<NT, ONE>(acc, job.m, row, job.m, row + 8, part, split, warp % split, x, columns, args.x_is_there);
    u32 out0 = args.out_offset + part * args.out_stride;
    add_shares<NT>(acc, split, shares, [&](u32 tile, u32 n, u32 r, u32 c, float value) {
        u32 out_row = block_row + tile * 16 + r, column = column0 + n * 8 + c;
        if (out_row >= job.m.rows || column >= args.n) return;
        float* out = job.out + u64(column) * job.out_pitch + out0 + out_row;
        if (job.add) value += *out;
        *out = value;
        if (job.packed) job.packed[u64(column) * job.packed_pitch + packed_place(out0 + out_row)] = to_bf16(value);
    });
    if (args.x_is_there) wait_for_previous();
}

extern "C" __global__ void __launch_bounds__(256, 3) linear_mma_one(const __grid_constant__ LinearArgs args) { linear_mma<1, true>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) linear_mma_1(const __grid_constant__ LinearArgs args) { linear_mma<1>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) linear_mma_2(const __grid_constant__ LinearArgs args) { linear_mma<2>(args); }
extern "C" __global__ void __launch_bounds__(256, 2) linear_mma_4(const __grid_constant__ LinearArgs args) { linear_mma<4>(args); }
