// cache[slot] = [rms_norm(kv_a[..latent]), rope(kv_a[latent..])] of each row.
#include common
#include rope_table
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> turns: array<u32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read_write> cache: array<f32>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let r = wid.x + a.base;
    let row = r * a.width;
    let latent = a.width - 2u * a.pairs;
    let out = batch[batch[${BATCH_SLOTS}u] + r] * a.width;
    var squares = 0.0;
    for (var i = li; i < latent; i += WG) { squares = fma(x[row + i], x[row + i], squares); }
    let scale = 1.0 / sqrt(group_sum(squares, li) / f32(latent) + a.eps);
    for (var i = li; i < latent; i += WG) { cache[out + i] = x[row + i] * scale * weight[i]; }
    let position = batch[batch[${BATCH_POSITIONS}u] + r];
    for (var pair = li; pair < a.pairs; pair += WG) {
        let cs = cos_sin(position, turns[2u * pair], turns[2u * pair + 1u]) * a.scaling;
        var e0 = latent + 2u * pair;
        var e1 = e0 + 1u;
        if (a.half_layout != 0u) {
            e0 = latent + pair;
            e1 = e0 + a.pairs;
        }
        let v0 = x[row + e0];
        let v1 = x[row + e1];
        cache[out + e0] = v0 * cs.x - v1 * cs.y;
        cache[out + e1] = v1 * cs.x + v0 * cs.y;
    }
}
