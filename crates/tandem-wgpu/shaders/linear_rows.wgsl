// y = x . w^T for a few rows of x: LANES threads share ROWS rows of w and stride along their units. The z dimension is the
// matrix of a stack (a head), which has its own slice of the rows of x and y.
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

var<workgroup> xs: array<vec4<f32>, ${TOKENS*XS}>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let lane = li % LANES;
    let row0 = ((wid.x + a.base) * GROUPS + li / LANES) * ${ROWS}u;
    let token0 = wid.y * ${TOKENS}u;
    let part = wid.z;
#for t TOKENS
    let x_row_${t} = min(token0 + ${t}u, a.n_tokens - 1u) * a.x_pitch + a.x_offset + part * a.x_stride;
#end
#for r ROWS
    let y_w${r} = part * a.weight_part + min(row0 + ${r}u, a.rows - 1u) * a.weight_pitch;
    let y_s${r} = part * a.scale_part + min(row0 + ${r}u, a.rows - 1u) * a.scale_pitch;
#for t TOKENS
    var y_${r}_${t} = 0.0;
#end
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
#for t TOKENS
#for r ROWS
    let sum_${r}_${t} = lane_sum(y_${r}_${t}, li);
    if (lane == 0u && row0 + ${r}u < a.rows && token0 + ${t}u < a.n_tokens) {
        y[(token0 + ${t}u) * a.y_pitch + a.y_offset + part * a.y_stride + row0 + ${r}u] = sum_${r}_${t};
    }
#end
#end
}
