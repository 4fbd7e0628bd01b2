// Small operations on whole rows: additions, packing, embedding, gathering.

// x += y over the first n elements.
extern "C" __global__ void __launch_bounds__(256) add(float* x, const float* y, u64 n) {
    let_next_start();
    wait_for_previous();
    u64 i = u64(blockIdx.x) * 256 + threadIdx.x;
    if (i < n) x[i] += y[i];
}

// Adds a vector to every row.
extern "C" __global__ void __launch_bounds__(256) add_bias(float* x, const float* bias, u32 width) {
    let_next_start();
    wait_for_previous();
    for (u32 c = threadIdx.x; c < width; c += 256) x[u64(blockIdx.x) * width + c] += bias[c];
}

// Packed bf16 copy of rows; the end of the row up to the pitch becomes 0.
extern "C" __global__ void __launch_bounds__(256) pack_rows(const float* x, u32 width, u16* packed, u32 pitch) {
    let_next_start();
    wait_for_previous();
    for (u32 c = threadIdx.x; c < pitch; c += 256)
        packed[u64(blockIdx.x) * pitch + packed_place(c)] = c < width ? to_bf16(x[u64(blockIdx.x) * width + c]) : 0;
}

// out[r] = table[tokens[r]]; a token with the highest bit set stands for one that the step before sampled.
extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ Matrix table, const u32* tokens, const u32* sampled, float* out) {
    let_next_start();
    wait_for_previous();
    u32 token = tokens[blockIdx.x];
    if (token & SAMPLED) token = sampled[token & ~SAMPLED];
    // None was sampled: the host will say so.
    if (token >= table.rows) token = 0;
    for (u32 k = threadIdx.x * 8; k < table.cols; k += 2048) {
        float v[8];
        decode8(table, 0, token, k, v);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (k + i < table.cols) out[u64(blockIdx.x) * table.cols + k + i] = v[i];
    }
}

// out[i] = x[rows[i]]
extern "C" __global__ void __launch_bounds__(256) gather_rows(const float* x, const int* rows, float* out, u32 width) {
    let_next_start();
    wait_for_previous();
    const float* from = x + u64(rows[blockIdx.x]) * width;
#pragma unroll 8
    for (u32 c = threadIdx.x; c < width; c += 256) out[u64(blockIdx.x) * width + c] = __ldcg(from + c);
}
