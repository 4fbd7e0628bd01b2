// y = x / sqrt(mean(x^2) + eps) * weight over whole rows; ADD: x += addend first.
#include common
#if ADD
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
#else
@group(0) @binding(0) var<storage, read> x: array<f32>;
#end
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
#if ADD
@group(0) @binding(3) var<storage, read> addend: array<f32>;
#end

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let row = (wid.x + a.base) * a.width;
    var squares = 0.0;
    for (var i = li; i < a.width; i += WG) {
#if ADD
        let v = x[row + i] + addend[row + i];
        x[row + i] = v;
#else
        let v = x[row + i];
#end
        squares = fma(v, v, squares);
    }
    let scale = 1.0 / sqrt(group_sum(squares, li) / f32(a.width) + a.eps);
    for (var i = li; i < a.width; i += WG) { y[row + i] = x[row + i] * scale * weight[i]; }
}
