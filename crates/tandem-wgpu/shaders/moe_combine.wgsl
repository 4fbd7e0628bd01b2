// y[r] = sum_k weights[r, k] * parts[r, k] over experts that are held, added to y under ADD.
#include common
@group(0) @binding(0) var<storage, read> parts: array<f32>;
@group(0) @binding(1) var<storage, read> ids: array<i32>;
@group(0) @binding(2) var<storage, read> weights: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let i = (wid.x + a.base) * WG + li;
    if (i >= a.width) { return; }
    let row = a.first_row + wid.y;
#if ADD
    var sum = y[row * a.width + i];
#else
    var sum = 0.0;
#end
    for (var k = 0u; k < a.top_k; k++) {
        if (ids[row * a.top_k + k] >= 0) {
            sum = fma(weights[row * a.top_k + k], parts[(wid.y * a.top_k + k) * a.width + i], sum);
        }
    }
    y[row * a.width + i] = sum;
}
