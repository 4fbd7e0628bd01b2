// Softmax attention of one query head over cached vectors, in single precision: the reference for MLA, and grouped-query
// attention. A block is one row and head; its warps take every fourth position each and merge at the end.

// Where positions of a batch live.
struct Pages {
    const int* positions;    // [n]
    const int* sequences;    // [n]
    const int* tables;       // [n_sequences, table_pitch] pages of PAGE_TOKENS slots
    u32 table_pitch, unused;
    DI u32 slot(u32 sequence, u32 position) const {
        return u32(tables[sequence * table_pitch + position / PAGE_TOKENS]) * PAGE_TOKENS + position % PAGE_TOKENS;
    }
};

struct AttentionArgs {
    Pages pages;
    const float* q;          // [n, n_heads * key_width]
    const void* keys;        // [n_slots, key_pitch]
    const void* values;      // [n_slots, value_pitch]
    const int* selected;     // [n, n_selected] or null
    float* out;              // [n, n_heads * value_width]
    u16* packed;             // the same as packed bf16, or null
    u32 n_heads, key_width, value_width, key_pitch, value_pitch;
    u32 heads_per_key;       // query heads that share a cached head; 0: all share one vector
    u32 n_selected, packed_pitch;
    float scale;
    u32 unused;
};

DI float load_element(const float* p) { return *p; }
DI float load_element(const u16* p) { return bf16_to_f32(*p); }

#define ATTENTION_WARPS 4

template <class T>
DI void attention_f32(const AttentionArgs& args) {
    __shared__ float merged[ATTENTION_WARPS][ATTENTION_ELEMENTS * 32];
    __shared__ float maxima[ATTENTION_WARPS], sums[ATTENTION_WARPS];
    let_next_start();
    wait_for_previous();
    u32 r = blockIdx.y, h = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 visible = args.pages.positions[r] + 1, sequence = args.pages.sequences[r];
    u32 cached_head = args.heads_per_key ? h / args.heads_per_key : 0;
    const T* keys = (const T*)args.keys + cached_head * args.key_width;
    const T* values = (const T*)args.values + cached_head * args.value_width;
    float q[ATTENTION_ELEMENTS], acc[ATTENTION_ELEMENTS];
#pragma unroll
    for (int i = 0; i < ATTENTION_ELEMENTS; i++) {
        u32 e = i * 32 + lane;
        q[i] = e < args.key_width ? args.q[u64(r) * args.n_heads * args.key_width + h * args.key_width + e] : 0.0f;
        acc[i] = 0.0f;
    }
    float maximum = -__int_as_float(0x7f800000), sum = 0.0f;
    u32 n = args.selected ? min(visible, args.n_selected) : visible;
    for (u32 p = warp; p < n; p += ATTENTION_WARPS) {
        u32 position = p;
        if (args.selected) {
            int s = args.selected[u64(r) * args.n_selected + p];
            if (s < 0) break;
            position = s;
        }
        u32 slot = args.pages.slot(sequence, position);
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < ATTENTION_ELEMENTS; i++) {
            u32 e = i * 32 + lane;
            if (e < args.key_width) dot += q[i] * load_element(keys + u64(slot) * args.key_pitch + e);
        }
        float score = warp_sum(dot) * args.scale;
        float higher = fmaxf(maximum, score);
        float old = expf(maximum - higher), weight = expf(score - higher);
        maximum = higher;
        sum = sum * old + weight;
#pragma unroll
        for (int i = 0; i < ATTENTION_ELEMENTS; i++) {
            u32 e = i * 32 + lane;
            if (e < args.value_width) acc[i] = acc[i] * old + weight * load_element(values + u64(slot) * args.value_pitch + e);
        }
    }
    if (lane == 0) {
        maxima[warp] = maximum;
        sums[warp] = sum;
    }
#pragma unroll
    for (int i = 0; i < ATTENTION_ELEMENTS; i++) merged[warp][i * 32 + lane] = acc[i];
    __syncthreads();
    float highest = maxima[0];
    for (int w = 1; w < ATTENTION_WARPS; w++) highest = fmaxf(highest, maxima[w]);
    float factors[ATTENTION_WARPS], total = 0.0f;
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; w++) {
        factors[w] = expf(maxima[w] - highest);
        total += factors[w] * sums[w];
    }
    for (u32 e = threadIdx.x; e < args.value_width; e += 32 * ATTENTION_WARPS) {
        float value = 0.0f;
#pragma unroll
        for (int w = 0; w < ATTENTION_WARPS; w++) value += factors[w] * merged[w][e];
        value /= total;
        u32 place = h * args.value_width + e;
        args.out[u64(r) * args.n_heads * args.value_width + place] = value;
        if (args.packed) args.packed[u64(r) * args.packed_pitch + packed_place(place)] = to_bf16(value);
    }
}

extern "C" __global__ void __launch_bounds__(128) attention_f32_f32(const __grid_constant__ AttentionArgs args) { attention_f32<float>(args); }
extern "C" __global__ void __launch_bounds__(128) attention_f32_bf16(const __grid_constant__ AttentionArgs args) { attention_f32<u16>(args); }
