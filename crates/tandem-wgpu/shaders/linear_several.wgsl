// As linear_rows for OUTPUTS matrices of one format on the same rows of x: the workgroups of each follow those of the one
// before.
#include common
#include format
#if ALIGNED
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
#else
@group(0) @binding(0) var<storage, read> x: array<f32>;
#end
#for o OUTPUTS
@group(0) @binding(${o*3+1}) var<storage, read> w_${o}: array<vec4<u32>>;
@group(0) @binding(${o*3+2}) var<storage, read> s_${o}: array<u32>;
@group(0) @binding(${o*3+3}) var<storage, read_write> y_${o}: array<f32>;
#end

const SEGMENT = ${SEGMENT_UNITS}u * LANES;
var<workgroup> xs: array<vec4<f32>, ${TOKENS*XS}>;
#if SPLIT_UP
var<workgroup> sums: array<f32, ${SEGMENTS*TEAMS*ROWS*TOKENS}>;
#end

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let block = wid.x + a.base;
    let token0 = wid.y * ${TOKENS}u;
#for t TOKENS
    let x_row_${t} = min(token0 + ${t}u, a.n_tokens - 1u) * a.x_pitch + a.x_offset;
#end
#for o OUTPUTS
    if (block >= a.first_${o} && block < a.first_${o} + a.blocks_${o}) {
        let first_row = (block - a.first_${o}) * ${TEAMS*ROWS}u;
        let row0 = first_row + li / (LANES * ${SPLIT}u) * ${ROWS}u;
#for r ROWS
        let y_w${r} = min(row0 + ${r}u, a.rows_${o} - 1u) * a.units;
        let y_s${r} = min(row0 + ${r}u, a.rows_${o} - 1u) * a.scale_pitch;
#end
#include segments A=y WA=w_${o} SA=s_${o}
#if SPLIT_UP
        workgroupBarrier();
        if (li < ${TEAMS*ROWS*TOKENS}u) {
            let row = first_row + li / ${TOKENS}u;
            let token = token0 + li % ${TOKENS}u;
            var sum = 0.0;
            for (var i = 0u; i < ${SEGMENTS}u; i++) { sum += sums[i * ${TEAMS*ROWS*TOKENS}u + li]; }
            if (row < a.rows_${o} && token < a.n_tokens) { y_${o}[token * a.y_pitch_${o} + row] = sum * a.post_${o}; }
        }
#else
#for t TOKENS
#for r ROWS
        if (lane == 0u && row0 + ${r}u < a.rows_${o} && token0 + ${t}u < a.n_tokens) {
            y_${o}[(token0 + ${t}u) * a.y_pitch_${o} + row0 + ${r}u] = y_total_${r}_${t} * a.post_${o};
        }
#end
#end
#end
    }
#end
}
