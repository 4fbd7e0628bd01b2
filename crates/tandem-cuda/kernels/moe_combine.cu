// out[t] = sum_k weights[t, k] * parts[t, k] + shared[t], in that order; pairs without an expert are left out.

extern "C" __global__ void __launch_bounds__(256) moe_combine(const float* parts, const float* shared, const int* ids, const float* weights,
                                                               u32 weights_pitch, float* out, u32 width, u32 top_k) {
    let_next_start();
    wait_for_previous();
    u32 c = (blockIdx.x * 256 + threadIdx.x) * 4, t = blockIdx.y;
    if (c >= width) return;
    if ((width & 3) == 0) {
        float4 sum = make_float4(0, 0, 0, 0);
        for (u32 k = 0; k < top_k; k++) {
            if (ids[t * top_k + k] < 0) continue;
            float w = weights[t * weights_pitch + k];
            float4 v = *(const float4*)(parts + (u64(t) * top_k + k) * width + c);
            sum = make_float4(fmaf(w, v.x, sum.x), fmaf(w, v.y, sum.y), fmaf(w, v.z, sum.z), fmaf(w, v.w, sum.w));
        }
        if (shared) {
            float4 v = *(const float4*)(shared + u64(t) * width + c);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        *(float4*)(out + u64(t) * width + c) = sum;
        return;
    }
    for (u32 i = c; i < min(c + 4, width); i++) {
        float sum = 0.0f;
        for (u32 k = 0; k < top_k; k++)
            if (ids[t * top_k + k] >= 0) sum = fmaf(weights[t * weights_pitch + k], parts[(u64(t) * top_k + k) * width + i], sum);
        out[u64(t) * width + i] = sum + (shared ? shared[u64(t) * width + i] : 0.0f);
    }
}
