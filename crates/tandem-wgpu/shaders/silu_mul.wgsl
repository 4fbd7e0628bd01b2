// gate = silu(gate) * up
#include common
@group(0) @binding(0) var<storage, read_write> gate: array<f32>;
@group(0) @binding(1) var<storage, read> up: array<f32>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let i = (wid.x + a.base) * WG + li;
    if (i < a.width) { gate[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i]; }
}
