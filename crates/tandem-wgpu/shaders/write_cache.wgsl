// cache[slot] = x of each row.
#include common
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> batch: array<u32>;
@group(0) @binding(2) var<storage, read_write> cache: array<f32>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let i = (wid.x + a.base) * WG + li;
    if (i < a.width) { cache[batch[batch[${BATCH_SLOTS}u] + wid.y] * a.width + i] = x[wid.y * a.width + i]; }
}
