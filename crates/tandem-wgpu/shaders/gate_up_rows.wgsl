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

var<workgroup> xs: array<vec4<f32>, ${TOKENS*XS}>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let lane = li % LANES;
    let row0 = ((wid.x + a.base) * GROUPS + li / LANES) * ${ROWS}u;
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
#for t TOKENS
    var g_${r}_${t} = 0.0;
    var u_${r}_${t} = 0.0;
#end
#end
    for (var first = 0u; first < a.units; first += ${CHUNK}u) {
        let n = min(${CHUNK}u, a.units - first);
        workgroupBarrier();
#include stage first=first n=n
        workgroupBarrier();
        for (var u = lane; u < n; u += LANES) {
#include dot w=gate s=gate_scales acc=g
#include dot w=up s=up_scales acc=u
        }
    }
#for t TOKENS
#for r ROWS
    let gate_${r}_${t} = lane_sum(g_${r}_${t}, li);
    let up_${r}_${t} = lane_sum(u_${r}_${t}, li);
    if (lane == 0u && row0 + ${r}u < a.rows && out_row0 + ${t}u < a.n_tokens) {
        h[(out_row0 + ${t}u) * a.y_pitch + a.y_offset + row0 + ${r}u] = gate_${r}_${t} / (1.0 + exp(-gate_${r}_${t})) * up_${r}_${t};
    }
#end
#end
}
