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

// Elements that a thread keeps in registers; wider rows are read twice.
#define NORM_KEPT 8

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const __grid_constant__ NormArgs args) {
    __shared__ float scratch[32];
    let_next_start();
    // Weights are constant and far away: they are on their way while the previous kernel finishes.
    float kept_weights[NORM_KEPT];
#pragma unroll
    for (int i = 0; i < NORM_KEPT; i++) {
        u32 c = i * blockDim.x + threadIdx.x;
        kept_weights[i] = c < args.width ? __ldg(args.weight + c) : 0.0f;
    }
    wait_for_previous();
    u64 r = blockIdx.x;
    float* x = args.x + r * args.x_pitch;
    const float* y = args.y + r * args.y_pitch;
    float kept[NORM_KEPT], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_KEPT; i++) {
        u32 c = i * blockDim.x + threadIdx.x;
        kept[i] = 0.0f;
        if (c < args.width) {
            kept[i] = x[c];
            if (args.y) {
                kept[i] += y[c];
                x[c] = kept[i];
            }
        }
        squares += kept[i] * kept[i];
    }
    for (u32 c = NORM_KEPT * blockDim.x + threadIdx.x; c < args.width; c += blockDim.x) {
        float v = x[c];
        if (args.y) {
            v += y[c];
            x[c] = v;
        }
        squares += v * v;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / args.width + args.eps);
    auto store = [&](u32 c, float v, float weight) {
        v = v * scale * weight;
        args.out[r * args.out_pitch + c] = v;
        if (args.packed) args.packed[r * args.packed_pitch + packed_place(c)] = to_bf16(v);
    };
#pragma unroll
    for (int i = 0; i < NORM_KEPT; i++) {
        u32 c = i * blockDim.x + threadIdx.x;
        if (c < args.width) store(c, kept[i], kept_weights[i]);
    }
    for (u32 c = NORM_KEPT * blockDim.x + threadIdx.x; c < args.width; c += blockDim.x) store(c, x[c], args.weight[c]);
}
