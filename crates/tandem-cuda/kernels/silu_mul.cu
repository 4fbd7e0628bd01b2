// gate = silu(gate) * up, elementwise.

extern "C" __global__ void __launch_bounds__(256) silu_mul(float* gate, const float* up, u64 n) {
    let_next_start();
    wait_for_previous();
    u64 i = u64(blockIdx.x) * 256 + threadIdx.x;
    if (i < n) {
        float g = gate[i];
        gate[i] = g / (1.0f + expf(-g)) * up[i];
    }
}
