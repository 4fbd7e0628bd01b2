// scores[row, p] = sum_h weights[row, h] * relu(q[row, h] . key[p]) for the positions that the row sees: a thread has one
// position and 16 heads at a time, whose queries lie with heads side by side.
#include common
@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> weights: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<f32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read_write> scores: array<f32>;

const DIM = ${DIM}u;
var<workgroup> qs: array<vec4<f32>, ${DIM*4}>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let row = a.first_row + wid.y;
    let first = (wid.x + a.base) * WG;
    let visible = batch[batch[${BATCH_POSITIONS}u] + row] + 1u;
    if (first >= visible) { return; }
    let p = min(first + li, visible - 1u);
    let page = batch[batch[${BATCH_TABLES}u] + batch[batch[${BATCH_SEQUENCES}u] + row] * batch[${BATCH_PITCH}u] + p / ${PAGE}u];
    let key = (page * ${PAGE}u + p % ${PAGE}u) * DIM;
    var score = 0.0;
    for (var head = 0u; head < a.n_heads; head += 16u) {
        workgroupBarrier();
        for (var i = li; i < DIM * 4u; i += WG) {
            var v = vec4(0.0);
            for (var j = 0u; j < 4u; j++) {
                let h = head + i % 4u * 4u + j;
                if (h < a.n_heads) { v[j] = q[(row * a.n_heads + h) * DIM + i / 4u]; }
            }
            qs[i] = v;
        }
        workgroupBarrier();
#for j 4
        var dot_${j} = vec4(0.0);
#end
        for (var d = 0u; d < DIM; d++) {
            let k = vec4(keys[key + d]);
#for j 4
            dot_${j} = fma(qs[d * 4u + ${j}u], k, dot_${j});
#end
        }
#for j 4
        for (var i = 0u; i < 4u; i++) {
            let h = head + ${j*4}u + i;
            if (h < a.n_heads) { score = fma(weights[row * a.n_heads + h], max(dot_${j}[i], 0.0), score); }
        }
#end
    }
    if (first + li < visible) { scores[wid.y * a.pitch + p] = score; }
}
