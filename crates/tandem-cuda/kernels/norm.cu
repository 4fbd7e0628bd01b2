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

DI void load_8(const float* p, float (&v)[8]) {
    *(float4*)v = *(const float4*)p;
    *(float4*)(v + 4) = *(const float4*)(p + 4);
}

// This thread's weights of a row of groups of 8. They are constant, so they are loaded while the previous kernel finishes.
DI void load_weights(const NormArgs& args, float (&w)[8]) {
    if (threadIdx.x * 8 < args.width) load_8(args.weight + threadIdx.x * 8, w);
}

// Rows of whole groups of 8, one or none a thread: every access is a vector. `y` is this thread's part of what is added,
// `w` its weights.
DI void norm_row_8(const NormArgs& args, u64 r, float* scratch, const float (&y)[8], const float (&w)[8]) {
    u32 c = threadIdx.x * 8;
    bool mine = c < args.width;
    float kept[8] = {}, squares = 0.0f;
    if (mine) {
        float* x = args.x + r * args.x_pitch + c;
        load_8(x, kept);
        if (args.y) {
#pragma unroll
            for (int i = 0; i < 8; i++) kept[i] += y[i];
            *(float4*)x = *(const float4*)kept;
            *(float4*)(x + 4) = *(const float4*)(kept + 4);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) squares += kept[i] * kept[i];
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / args.width + args.eps);
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < 8; i++) kept[i] = kept[i] * scale * w[i];
    float* out = args.out + r * args.out_pitch + c;
    *(float4*)out = *(const float4*)kept;
    *(float4*)(out + 4) = *(const float4*)(kept + 4);
    if (args.packed)
        *(uint4*)(args.packed + r * args.packed_pitch + c) =
            make_uint4(pack_bf16(kept[0], kept[4]), pack_bf16(kept[1], kept[5]), pack_bf16(kept[2], kept[6]), pack_bf16(kept[3], kept[7]));
}

// Row r, once the previous kernel is done.
DI void norm_row(const NormArgs& args, u64 r, float* scratch) {
    bool vectors = ((args.width | args.x_pitch | args.y_pitch | args.out_pitch) & 7) == 0;
    if (vectors && args.width <= 8 * blockDim.x) {
        float y[8] = {}, w[8] = {};
        load_weights(args, w);
        wait_for_previous();
        if (args.y && threadIdx.x * 8 < args.width) load_8(args.y + r * args.y_pitch + threadIdx.x * 8, y);
        return norm_row_8(args, r, scratch, y, w);
    }
    wait_for_previous();
    float* x = args.x + r * args.x_pitch;
    const float* y = args.y + r * args.y_pitch;
    // Elements beyond what threads keep in registers are read twice.
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
    auto store = [&](u32 c, float v) {
        v = v * scale * args.weight[c];
        args.out[r * args.out_pitch + c] = v;
        if (args.packed) args.packed[r * args.packed_pitch + packed_place(c)] = to_bf16(v);
    };
#pragma unroll
    for (int i = 0; i < NORM_KEPT; i++) {
        u32 c = i * blockDim.x + threadIdx.x;
        if (c < args.width) store(c, kept[i]);
    }
    for (u32 c = NORM_KEPT * blockDim.x + threadIdx.x; c < args.width; c += blockDim.x) store(c, x[c]);
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const __grid_constant__ NormArgs args) {
    __shared__ float scratch[32];
    let_next_start();
    norm_row(args, blockIdx.x, scratch);
}
