// h = silu(gate(x)) * up(x) for a few rows of x. ROUTED: the y dimension counts the chosen experts of all rows, `ids` names
// them, and those outside of first_part .. first_part + n_parts are left alone.
#include common
#include format
@group(0) @binding(0) var<storage, read> gate: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> gate_scales: array<u32>;
@group(0) @binding(2) var<storage, read> up: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> up_scales: array<u32>;
#if ALIGNED
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;
#else
@group(0) @binding(4) var<storage, read> x: array<f32>;
#end
@group(0) @binding(5) var<storage, read_write> h: array<f32>;
#if ROUTED
@group(0) @binding(6) var<storage, read> ids: array<i32>;
#end

const SEGMENT = ${SEGMENT_UNITS}u * LANES;
var<workgroup> xs: array<vec4<f32>, ${TOKENS*XS}>;
#if SPLIT_UP
var<workgroup> sums: array<f32, ${SEGMENTS*TEAMS*ROWS*TOKENS*2}>;
#end

fn gated(g: f32, u: f32) -> f32 {
    let scaled = g * a.post;
    return scaled / (1.0 + exp(-scaled)) * (u * a.post);
}

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let first_row = (wid.x + a.base) * ${TEAMS*ROWS}u;
    let row0 = first_row + li / (LANES * ${SPLIT}u) * ${ROWS}u;
#if ROUTED
    let id = ids[wid.y] - i32(a.first_part);
    if (id < 0 || id >= i32(a.n_parts)) { return; }
    let part = u32(id);
    let out_row0 = wid.y;
    let x_row_0 = wid.y / a.top_k * a.x_pitch;
#else
    let part = 0u;
    let out_row0 = wid.y * ${TOKENS}u;
#for t TOKENS
    let x_row_${t} = min(out_row0 + ${t}u, a.n_tokens - 1u) * a.x_pitch;
#end
#end
#for r ROWS
    let g_w${r} = part * a.weight_part + min(row0 + ${r}u, a.rows - 1u) * a.weight_pitch;
    let g_s${r} = part * a.scale_part + min(row0 + ${r}u, a.rows - 1u) * a.scale_pitch;
    let u_w${r} = g_w${r};
    let u_s${r} = g_s${r};
#end
#include segments A=g WA=gate SA=gate_scales B=u WB=up SB=up_scales GATED=1
#if SPLIT_UP
    workgroupBarrier();
    if (li < ${TEAMS*ROWS*TOKENS}u) {
        let row = first_row + li / ${TOKENS}u;
        let token = out_row0 + li % ${TOKENS}u;
        var g_sum = 0.0;
        var u_sum = 0.0;
        for (var i = 0u; i < ${SEGMENTS}u; i++) {
            g_sum += sums[i * ${TEAMS*ROWS*TOKENS}u + li];
            u_sum += sums[(i + ${SEGMENTS}u) * ${TEAMS*ROWS*TOKENS}u + li];
        }
        if (row < a.rows && token < a.n_tokens) { h[token * a.y_pitch + a.y_offset + row] = gated(g_sum, u_sum); }
    }
#else
#for t TOKENS
#for r ROWS
    if (lane == 0u && row0 + ${r}u < a.rows && out_row0 + ${t}u < a.n_tokens) {
        h[(out_row0 + ${t}u) * a.y_pitch + a.y_offset + row0 + ${r}u] = gated(g_total_${r}_${t}, u_total_${r}_${t});
    }
#end
#end
#end
}
