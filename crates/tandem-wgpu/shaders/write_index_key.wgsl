// cache[slot] = rope(layer_norm(x)) of each row, rotation of the first 2 * a.pairs elements.
#include common
#include rope_table
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read> turns: array<u32>;
@group(0) @binding(4) var<storage, read> batch: array<u32>;
@group(0) @binding(5) var<storage, read_write> cache: array<f32>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let r = wid.x + a.base;
    let row = r * a.width;
    let out = batch[batch[${BATCH_SLOTS}u] + r] * a.width;
    var sum = 0.0;
    for (var i = li; i < a.width; i += WG) { sum += x[row + i]; }
    let mean = group_sum(sum, li) / f32(a.width);
    var squares = 0.0;
    for (var i = li; i < a.width; i += WG) { squares = fma(x[row + i] - mean, x[row + i] - mean, squares); }
    let scale = 1.0 / sqrt(group_sum(squares, li) / f32(a.width) + a.eps);
    let position = batch[batch[${BATCH_POSITIONS}u] + r];
    for (var i = li; i < a.width - a.pairs; i += WG) {
        if (i >= a.pairs) {
            let e = i + a.pairs;
            cache[out + e] = (x[row + e] - mean) * scale * weight[e] + bias[e];
        } else {
            let cs = cos_sin(position, turns[2u * i], turns[2u * i + 1u]) * a.scaling;
            var e0 = 2u * i;
            var e1 = e0 + 1u;
            if (a.half_layout != 0u) {
                e0 = i;
                e1 = i + a.pairs;
            }
            let v0 = (x[row + e0] - mean) * scale * weight[e0] + bias[e0];
            let v1 = (x[row + e1] - mean) * scale * weight[e1] + bias[e1];
            cache[out + e0] = v0 * cs.x - v1 * cs.y;
            cache[out + e1] = v1 * cs.x + v0 * cs.y;
        }
    }
}
