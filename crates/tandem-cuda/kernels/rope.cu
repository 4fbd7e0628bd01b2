// Rotary embedding of heads, and the cached vectors that carry one.

struct Rope {
    float inv_freq[MAX_ROPE_PAIRS];  // [half]
    float scaling;
    u32 half, interleaved;
};

// A slice of every row seen as heads: element i of head h is at offset + h * stride + i.
struct Heads {
    u32 n, stride, offset, width;
};

// cos and sin of pair i at a position; the angle is reduced to half turns in double precision.
DI void angle(const Rope& rope, u32 i, u32 position, float& cosine, float& sine) {
    double turns = double(position) * double(rope.inv_freq[i]) * 0.15915494309189535;
    turns -= rint(turns);
    sincospif(float(2.0 * turns), &sine, &cosine);
    cosine *= rope.scaling;
    sine *= rope.scaling;
}

// Writes element pair i of a rotated vector through `store(index, value)`.
template <class Load, class Store>
DI void rotate_pair(const Rope& rope, u32 i, float cosine, float sine, Load load, Store store) {
    u32 a = rope.interleaved ? 2 * i : i, b = rope.interleaved ? 2 * i + 1 : i + rope.half;
    float x = load(a), y = load(b);
    store(a, x * cosine - y * sine);
    store(b, y * cosine + x * sine);
}

// Elements e .. e + 8 of the vector at `x`, which `v` holds as they are, rotated; e and the pairs are multiples of 8, and
// e is within the rotated dimensions.
DI void rotate_8(const Rope& rope, const float* x, u32 e, const float* cosines, const float* sines, float (&v)[8]) {
    if (rope.interleaved) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            u32 pair = (e + i) / 2;
            float a = v[i], b = v[i + 1];
            v[i] = a * cosines[pair] - b * sines[pair];
            v[i + 1] = b * cosines[pair] + a * sines[pair];
        }
        return;
    }
    bool first = e < rope.half;
    const float* other = x + (first ? e + rope.half : e - rope.half);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 pair = first ? e + i : e + i - rope.half;
        v[i] = first ? v[i] * cosines[pair] - other[i] * sines[pair] : v[i] * cosines[pair] + other[i] * sines[pair];
    }
}

struct RopeArgs {
    Rope rope;
    const float* x;          // [n, x_pitch]
    float* out;              // [n, out_pitch]
    const int* positions;    // [n]
    Heads from, to;
    u32 x_pitch, out_pitch;
};

extern "C" __global__ void __launch_bounds__(256) rope(const __grid_constant__ RopeArgs args) {
    __shared__ float cosines[MAX_ROPE_PAIRS], sines[MAX_ROPE_PAIRS];
    let_next_start();
    u32 r = blockIdx.x, half = args.rope.half, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Positions come with the batch, before any kernel of the step.
    if (threadIdx.x < half) angle(args.rope, threadIdx.x, args.positions[r], cosines[threadIdx.x], sines[threadIdx.x]);
    wait_for_previous();
    __syncthreads();
    u32 h = blockIdx.y * 8 + warp;
    if (h >= args.from.n) return;
    const float* from = args.x + u64(r) * args.x_pitch + args.from.offset + h * args.from.stride;
    float* to = args.out + u64(r) * args.out_pitch + args.to.offset + h * args.to.stride;
    for (u32 i = lane; i < half; i += 32) {
        u32 a = args.rope.interleaved ? 2 * i : i, b = args.rope.interleaved ? 2 * i + 1 : i + half;
        float x = from[a], y = from[b];
        to[a] = x * cosines[i] - y * sines[i];
        to[b] = y * cosines[i] + x * sines[i];
    }
    for (u32 e = 2 * half + lane; e < args.from.width; e += 32) to[e] = from[e];
}

DI void store_element(float* p, float v) { *p = v; }
DI void store_element(u16* p, float v) { *p = to_bf16(v); }

struct WriteArgs {
    Rope rope;
    const float* x;          // [n, x_pitch]
    const float* norm;       // [latent] or [width]
    const float* norm_bias;  // [width], for layer norm
    void* cache;             // [n_slots, width]
    const int* slots;        // [n]
    const int* positions;    // [n]
    u32 x_pitch, width, latent;
    float eps;
};

// Waits for the previous kernel. Before that come the angles of the row's position, which is there with the batch, and the
// norm's weights, which are constant, into L2.
DI void prepare_write(const WriteArgs& args, float (&cosines)[MAX_ROPE_PAIRS], float (&sines)[MAX_ROPE_PAIRS]) {
    u32 i = threadIdx.x, normed = args.latent ? args.latent : args.width;
    if (i < args.rope.half) angle(args.rope, i, args.positions[blockIdx.x], cosines[i], sines[i]);
    if (i * 32 < normed) prefetch(args.norm + i * 32);
    if (args.norm_bias && i * 32 < normed) prefetch(args.norm_bias + i * 32);
    wait_for_previous();
}

// [rms_norm(x[..latent]), rope(x[latent..])], once the previous kernel is done.
template <class T>
DI void write_latent(const WriteArgs& args, float* scratch) {
    __shared__ float cosines[MAX_ROPE_PAIRS], sines[MAX_ROPE_PAIRS];
    prepare_write(args, cosines, sines);
    u32 r = blockIdx.x;
    const float* x = args.x + u64(r) * args.x_pitch;
    T* out = (T*)args.cache + u64(args.slots[r]) * args.width;
    float squares = 0.0f;
    for (u32 c = threadIdx.x; c < args.latent; c += blockDim.x) squares += x[c] * x[c];
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / args.latent + args.eps);
    for (u32 c = threadIdx.x; c < args.latent; c += blockDim.x) store_element(out + c, x[c] * scale * args.norm[c]);
    for (u32 i = threadIdx.x; i < args.rope.half; i += blockDim.x)
        rotate_pair(
            args.rope, i, cosines[i], sines[i], [&](u32 e) { return x[args.latent + e]; },
            [&](u32 e, float v) { store_element(out + args.latent + e, v); });
    for (u32 c = args.latent + 2 * args.rope.half + threadIdx.x; c < args.width; c += blockDim.x) store_element(out + c, x[c]);
}

extern "C" __global__ void __launch_bounds__(256) write_latent_f32(const __grid_constant__ WriteArgs args) {
    __shared__ float scratch[32];
    let_next_start();
    write_latent<float>(args, scratch);
}
extern "C" __global__ void __launch_bounds__(256) write_latent_bf16(const __grid_constant__ WriteArgs args) {
    __shared__ float scratch[32];
    let_next_start();
    write_latent<u16>(args, scratch);
}

// rope(layer_norm(x)), once the previous kernel is done; up to MAX_INDEX_KEY elements.
template <class T>
DI void write_index_key(const WriteArgs& args, float* scratch) {
    __shared__ float normed[MAX_INDEX_KEY], cosines[MAX_ROPE_PAIRS], sines[MAX_ROPE_PAIRS];
    prepare_write(args, cosines, sines);
    u32 r = blockIdx.x, width = args.width;
    const float* x = args.x + u64(r) * args.x_pitch;
    T* out = (T*)args.cache + u64(args.slots[r]) * width;
    float sum = 0.0f, squares = 0.0f;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) sum += x[c];
    float mean = block_sum(sum, scratch) / width;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) squares += (x[c] - mean) * (x[c] - mean);
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + args.eps);
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) normed[c] = (x[c] - mean) * scale * args.norm[c] + args.norm_bias[c];
    __syncthreads();
    for (u32 i = threadIdx.x; i < args.rope.half; i += blockDim.x)
        rotate_pair(
            args.rope, i, cosines[i], sines[i], [&](u32 e) { return normed[e]; },
            [&](u32 e, float v) { store_element(out + e, v); });
    for (u32 c = 2 * args.rope.half + threadIdx.x; c < width; c += blockDim.x) store_element(out + c, normed[c]);
}

extern "C" __global__ void __launch_bounds__(128) write_index_key_f32(const __grid_constant__ WriteArgs args) {
    __shared__ float scratch[32];
    let_next_start();
    write_index_key<float>(args, scratch);
}
extern "C" __global__ void __launch_bounds__(128) write_index_key_bf16(const __grid_constant__ WriteArgs args) {
    __shared__ float scratch[32];
    let_next_start();
    write_index_key<u16>(args, scratch);
}

// What follows attention's first products, in one launch: a norm, and both kinds of cached vectors. blockIdx.y picks;
// those that are not asked for have no input.
struct PrepareArgs {
    NormArgs query;
    WriteArgs latent, key;
};

template <class T>
DI void prepare_attention(const PrepareArgs& args) {
    __shared__ float scratch[32];
    let_next_start();
    if (blockIdx.y == 0) {
        write_latent<T>(args.latent, scratch);
    } else if (blockIdx.y == 2) {
        write_index_key<T>(args.key, scratch);
    } else if (args.query.x) {
        norm_row(args.query, blockIdx.x, scratch);
    } else {
        wait_for_previous();
    }
}

extern "C" __global__ void __launch_bounds__(256) prepare_attention_f32(const __grid_constant__ PrepareArgs args) { prepare_attention<float>(args); }
extern "C" __global__ void __launch_bounds__(256) prepare_attention_bf16(const __grid_constant__ PrepareArgs args) { prepare_attention<u16>(args); }

// Caches plain vectors.
template <class T>
DI void write_rows(const WriteArgs& args) {
    let_next_start();
    wait_for_previous();
    u32 r = blockIdx.x;
    T* out = (T*)args.cache + u64(args.slots[r]) * args.width;
    for (u32 c = threadIdx.x; c < args.width; c += blockDim.x) store_element(out + c, args.x[u64(r) * args.x_pitch + c]);
}

extern "C" __global__ void __launch_bounds__(256) write_rows_f32(const __grid_constant__ WriteArgs args) { write_rows<float>(args); }
extern "C" __global__ void __launch_bounds__(256) write_rows_bf16(const __grid_constant__ WriteArgs args) { write_rows<u16>(args); }
