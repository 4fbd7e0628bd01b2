// y = sum_k weights[k] * down[ids[k]](h[k]), added to y under ADD, for each row of a small batch. Experts outside of
// first_part .. first_part + n_parts are left out.
#include common
#include format
@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> s: array<u32>;
#if ALIGNED
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
#else
@group(0) @binding(2) var<storage, read> x: array<f32>;
#end
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read> ids: array<i32>;
@group(0) @binding(5) var<storage, read> weights: array<f32>;

var<workgroup> xs: array<vec4<f32>, ${TOKENS*XS}>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let lane = li % LANES;
    let row0 = ((wid.x + a.base) * GROUPS + li / LANES) * ${ROWS}u;
#for r ROWS
    var total_${r} = 0.0;
#end
    for (var k = 0u; k < a.top_k; k++) {
        let slot = wid.y * a.top_k + k;
        let id = ids[slot] - i32(a.first_part);
        if (id >= 0 && id < i32(a.n_parts)) {
            let part = u32(id);
            let x_row_0 = slot * a.x_pitch;
#for r ROWS
            let y_w${r} = part * a.weight_part + min(row0 + ${r}u, a.rows - 1u) * a.weight_pitch;
            let y_s${r} = part * a.scale_part + min(row0 + ${r}u, a.rows - 1u) * a.scale_pitch;
            var y_${r}_0 = 0.0;
#end
            for (var first = 0u; first < a.units; first += ${CHUNK}u) {
                let n = min(${CHUNK}u, a.units - first);
                workgroupBarrier();
#include stage first=first n=n
                workgroupBarrier();
                for (var u = lane; u < n; u += LANES) {
#include dot w=w s=s acc=y
                }
            }
#for r ROWS
            total_${r} = fma(weights[slot], y_${r}_0, total_${r});
#end
        }
    }
#for r ROWS
    let sum_${r} = lane_sum(total_${r}, li);
    if (lane == 0u && row0 + ${r}u < a.rows) {
        let at = wid.y * a.y_pitch + a.y_offset + row0 + ${r}u;
#if ADD
        y[at] = y[at] + sum_${r};
#else
        y[at] = sum_${r};
#end
    }
#end
}
