// RMS norm of rows, after an addition if asked for, with a packed bf16 copy for the matrix products that follow.

struct NormArgs {
    float* x;                // [n, x_pitch]
    const float* y;          // added to x first, [n, y_pitch], or null
    const float* weight;     // [width]
    float* out;              // [n, out_pitch]
    u16* packed;             // or null
    u32 x_pitch, y_pitch, out_pitch, packed_pitch, width;
    float eps;
};

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const __grid_constant__ NormArgs args) {
    __shared__ float scratch[32];
    let_next_start();
    wait_for_previous();
    u64 r = blockIdx.x;
    float* x = args.x + r * args.x_pitch;
    float squares = 0.0f;
    for (u32 c = threadIdx.x; c < args.width; c += blockDim.x) {
        float v = x[c];
        if (args.y) {
            v += args.y[r * args.y_pitch + c];
            x[c] = v;
        }
        squares += v * v;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / args.width + args.eps);
    for (u32 c = threadIdx.x; c < args.width; c += blockDim.x) {
        float v = x[c] * scale * args.weight[c];
        args.out[r * args.out_pitch + c] = v;
        if (args.packed) args.packed[r * args.packed_pitch + packed_place(c)] = to_bf16(v);
    }
}
