// y = sum_k weights[k] * down[ids[k]](h[k]), added to y under ADD, for each row of a small batch. Experts outside of
// first_part .. first_part + n_parts are left out. SPLIT groups of LANES threads share the segments of each, and add up when
// all experts are done.
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

const SEGMENT = ${SEGMENT_UNITS}u * LANES;
var<workgroup> xs: array<vec4<f32>, ${XS}>;
#if SPLIT_UP
var<workgroup> sums: array<f32, ${SPLIT*TEAMS*ROWS}>;
#end

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let lane = li % LANES;
    let split = li / LANES % ${SPLIT}u;
    let team = li / (LANES * ${SPLIT}u);
    let first_row = (wid.x + a.base) * ${TEAMS*ROWS}u;
    let row0 = first_row + team * ${ROWS}u;
    let slot0 = wid.y * a.top_k;
#for r ROWS
    let w_${r} = min(row0 + ${r}u, a.rows - 1u) * a.weight_pitch;
    let s_${r} = min(row0 + ${r}u, a.rows - 1u) * a.scale_pitch;
    var total_${r} = 0.0;
#end
    for (var k = 0u; k < a.top_k; k++) {
        let id = ids[slot0 + k] - i32(a.first_part);
        if (id < 0 || id >= i32(a.n_parts)) { continue; }
        let weight = weights[slot0 + k];
        let x_row_0 = (slot0 + k) * a.x_pitch;
#for r ROWS
        let y_w${r} = u32(id) * a.weight_part + w_${r};
        let y_s${r} = u32(id) * a.scale_part + s_${r};
        var y_${r}_0 = 0.0;
#end
        for (var first = 0u; first < a.units; first += ${CHUNK}u) {
            let n = min(${CHUNK}u, a.units - first);
#for j SEGMENT_UNITS
            let at_${j} = split * SEGMENT + ${j}u * LANES + lane;
            let unit_${j} = min(first + at_${j}, a.units - 1u);
#include load w=w s=s acc=y unit=unit_${j} as=y_u${j}
#end
            workgroupBarrier();
#include stage first=first n=n COUNT=1
            workgroupBarrier();
#for j SEGMENT_UNITS
            {
#include dot s=s acc=y at=at_${j} unit=unit_${j} as=y_u${j}
            }
#end
        }
#for r ROWS
        total_${r} = fma(weight, y_${r}_0, total_${r});
#end
    }
#for r ROWS
    let sum_${r} = lane_sum(total_${r}, li);
#end
#if SPLIT_UP
    if (lane == 0u) {
#for r ROWS
        sums[(split * ${TEAMS}u + team) * ${ROWS}u + ${r}u] = sum_${r};
#end
    }
    workgroupBarrier();
    if (li < ${TEAMS*ROWS}u && first_row + li < a.rows) {
        var sum = 0.0;
        for (var i = 0u; i < ${SPLIT}u; i++) { sum += sums[i * ${TEAMS*ROWS}u + li]; }
        let at = wid.y * a.y_pitch + a.y_offset + first_row + li;
#if ADD
        y[at] = y[at] + sum * a.post;
#else
        y[at] = sum * a.post;
#end
    }
#else
#for r ROWS
    if (lane == 0u && row0 + ${r}u < a.rows) {
        let at = wid.y * a.y_pitch + a.y_offset + row0 + ${r}u;
#if ADD
        y[at] = y[at] + sum_${r} * a.post;
#else
        y[at] = sum_${r} * a.post;
#end
    }
#end
#end
}
