// Rotates the first 2 * a.pairs elements of each head by the row's position and copies the rest. A thread has one pair or
// one element of the rest; the y dimension is the row.
#include common
#include rope_table
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> turns: array<u32>;
@group(0) @binding(2) var<storage, read> batch: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let per_head = a.head_width - a.pairs;
    let i = (wid.x + a.base) * WG + li;
    if (i >= a.n_heads * per_head) { return; }
    let head = i / per_head;
    let pair = i % per_head;
    let source = wid.y * a.x_pitch + a.x_offset + head * a.x_stride;
    let to = wid.y * a.y_pitch + a.y_offset + head * a.y_stride;
    if (pair >= a.pairs) {
        y[to + pair + a.pairs] = x[source + pair + a.pairs];
        return;
    }
    let cs = cos_sin(batch[batch[${BATCH_POSITIONS}u] + wid.y], turns[2u * pair], turns[2u * pair + 1u]) * a.scaling;
    var e0 = 2u * pair;
    var e1 = e0 + 1u;
    if (a.half_layout != 0u) {
        e0 = pair;
        e1 = pair + a.pairs;
    }
    let v0 = x[source + e0];
    let v1 = x[source + e1];
    y[to + e0] = v0 * cs.x - v1 * cs.y;
    y[to + e1] = v1 * cs.x + v0 * cs.y;
}
