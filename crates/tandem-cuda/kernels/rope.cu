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

// Elements of a row that a thread keeps in registers; more are read when they are needed.
#define WRITE_KEPT 4

// What does not depend on the previous kernel: the norm's weights of the elements that a thread keeps, the row's place in the
// cache, and the angles of its position, which are there with the batch. Then waits, and loads those elements.
template <class T>
struct Written {
    float w[WRITE_KEPT], bias[WRITE_KEPT], x[WRITE_KEPT];
    const float* from;
    T* to;

    DI Written(const WriteArgs& args, u32 normed, float (&cosines)[MAX_ROPE_PAIRS], float (&sines)[MAX_ROPE_PAIRS]) {
        u32 r = blockIdx.x;
        from = args.x + u64(r) * args.x_pitch;
        to = (T*)args.cache + u64(args.slots[r]) * args.width;
#pragma unroll
        for (u32 i = 0; i < WRITE_KEPT; i++) {
            u32 c = i * blockDim.x + threadIdx.x;
            w[i] = c < normed ? args.norm[c] : 0.0f;
            bias[i] = args.norm_bias && c < normed ? args.norm_bias[c] : 0.0f;
        }
        if (threadIdx.x < args.rope.half) angle(args.rope, threadIdx.x, args.positions[r], cosines[threadIdx.x], sines[threadIdx.x]);
        wait_for_previous();
#pragma unroll
        for (u32 i = 0; i < WRITE_KEPT; i++) {
            u32 c = i * blockDim.x + threadIdx.x;
            x[i] = c < normed ? from[c] : 0.0f;
        }
    }

    // Calls `f(element, x, weight, bias)` for this thread's first `n` elements.
    template <class F>
    DI void for_each(const WriteArgs& args, u32 n, F f) const {
#pragma unroll
        for (u32 i = 0; i < WRITE_KEPT; i++)
            if (i * blockDim.x + threadIdx.x < n) f(i * blockDim.x + threadIdx.x, x[i], w[i], bias[i]);
        for (u32 c = WRITE_KEPT * blockDim.x + threadIdx.x; c < n; c += blockDim.x)
            f(c, from[c], args.norm[c], args.norm_bias ? args.norm_bias[c] : 0.0f);
    }
};

// [rms_norm(x[..latent]), rope(x[latent..])], once the previous kernel is done.
template <class T>
DI void write_latent(const WriteArgs& args, float* scratch) {
    __shared__ float cosines[MAX_ROPE_PAIRS], sines[MAX_ROPE_PAIRS];
    Written<T> row(args, args.latent, cosines, sines);
    // A thread has its own angles.
    for (u32 i = threadIdx.x; i < args.rope.half; i += blockDim.x)
        rotate_pair(
            args.rope, i, cosines[i], sines[i], [&](u32 e) { return row.from[args.latent + e]; },
            [&](u32 e, float v) { store_element(row.to + args.latent + e, v); });
    float squares = 0.0f;
    row.for_each(args, args.latent, [&](u32, float x, float, float) { squares += x * x; });
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / args.latent + args.eps);
    row.for_each(args, args.latent, [&](u32 c, float x, float w, float) { store_element(row.to + c, x * scale * w); });
    for (u32 c = args.latent + 2 * args.rope.half + threadIdx.x; c < args.width; c += blockDim.x) store_element(row.to + c, row.from[c]);
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
    u32 width = args.width;
    Written<T> row(args, width, cosines, sines);
    float sum = 0.0f, squares = 0.0f;
    row.for_each(args, width, [&](u32, float x, float, float) { sum += x; });
    float mean = block_sum(sum, scratch) / width;
    row.for_each(args, width, [&](u32, float x, float, float) { squares += (x - mean) * (x - mean); });
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + args.eps);
    row.for_each(args, width, [&](u32 c, float x, float w, float bias) { normed[c] = (x - mean) * scale * w + bias; });
    __syncthreads();
    for (u32 i = threadIdx.x; i < args.rope.half; i += blockDim.x)
        rotate_pair(
            args.rope, i, cosines[i], sines[i], [&](u32 e) { return normed[e]; },
            [&](u32 e, float v) { store_element(row.to + e, v); });
    for (u32 c = 2 * args.rope.half + threadIdx.x; c < width; c += blockDim.x) store_element(row.to + c, normed[c]);
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
