// y = x . w^T for a few rows of x. The z dimension is the matrix of a stack (a head), which has its own slice of the rows of
// x and y.
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

const SEGMENT = ${SEGMENT_UNITS}u * LANES;
var<workgroup> xs: array<vec4<f32>, ${TOKENS*XS}>;
#if SPLIT_UP
var<workgroup> sums: array<f32, ${SEGMENTS*TEAMS*ROWS*TOKENS}>;
#end

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let first_row = (wid.x + a.base) * ${TEAMS*ROWS}u;
    let row0 = first_row + li / (LANES * ${SPLIT}u) * ${ROWS}u;
    let token0 = wid.y * ${TOKENS}u;
    let part = wid.z;
#for t TOKENS
    let x_row_${t} = min(token0 + ${t}u, a.n_tokens - 1u) * a.x_pitch + a.x_offset + part * a.x_stride;
#end
#for r ROWS
    let y_w${r} = part * a.weight_part + min(row0 + ${r}u, a.rows - 1u) * a.weight_pitch;
    let y_s${r} = part * a.scale_part + min(row0 + ${r}u, a.rows - 1u) * a.scale_pitch;
#end
#include segments A=y WA=w SA=s
#if SPLIT_UP
    workgroupBarrier();
    if (li < ${TEAMS*ROWS*TOKENS}u) {
        let row = first_row + li / ${TOKENS}u;
        let token = token0 + li % ${TOKENS}u;
        var sum = 0.0;
        for (var i = 0u; i < ${SEGMENTS}u; i++) { sum += sums[i * ${TEAMS*ROWS*TOKENS}u + li]; }
        if (row < a.rows && token < a.n_tokens) {
            y[token * a.y_pitch + a.y_offset + part * a.y_stride + row] = sum * a.post;
        }
    }
#else
#for t TOKENS
#for r ROWS
    if (lane == 0u && row0 + ${r}u < a.rows && token0 + ${t}u < a.n_tokens) {
        y[(token0 + ${t}u) * a.y_pitch + a.y_offset + part * a.y_stride + row0 + ${r}u] = y_total_${r}_${t} * a.post;
    }
#end
#end
#end
}
