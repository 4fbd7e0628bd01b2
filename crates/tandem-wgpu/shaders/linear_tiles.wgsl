// y = x . w^T for many rows of x: a workgroup makes 128 rows of the product (PAIR: 64 of gate and of up, and from them
// silu(gate) * up) for TOKENS rows of x, 32 columns at a time through workgroup memory; a thread has 4 + 4 rows and
// TOKENS / 16 tokens. PLANNED: the y dimension is a tile of moe_plan, whose expert and slots `plan` gives; else it is a block
// of rows of x, and the z dimension the matrix of a stack, as in linear_rows.
#include common
#include format
@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> s: array<u32>;
#if PAIR
@group(0) @binding(2) var<storage, read> w2: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> s2: array<u32>;
#end
#if ALIGNED
@group(0) @binding(${PAIR*2+2}) var<storage, read> x: array<vec4<f32>>;
#else
@group(0) @binding(${PAIR*2+2}) var<storage, read> x: array<f32>;
#end
@group(0) @binding(${PAIR*2+3}) var<storage, read_write> y: array<f32>;
#if PLANNED
@group(0) @binding(${PAIR*2+4}) var<storage, read> plan: array<u32>;
#end

const ROWS = 128u;
const TOKENS = ${TOKENS}u;
const DEPTH = 32u;
const STEP_UNITS = DEPTH / UNIT;

// [DEPTH, ROWS / 4] and [DEPTH, TOKENS]
var<workgroup> ws: array<vec4<f32>, DEPTH * ROWS / 4u>;
var<workgroup> xs: array<f32, DEPTH * TOKENS>;
#if PLANNED
var<workgroup> slots: array<u32, TOKENS>;
#end

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
#if PAIR
    let first_row = (wid.x + a.base) * 64u;
#else
    let first_row = (wid.x + a.base) * 128u;
#end
#if PLANNED
    // plan: number of tiles; then expert, first slot and number of slots of each; then the slots, from a.plan_order on.
    if (wid.y >= plan[0]) { return; }
    let id = i32(plan[1u + wid.y * 3u]) - i32(a.first_part);
    if (id < 0 || id >= i32(a.n_parts)) { return; }
    let part = u32(id);
    let first_token = 0u;
    let n_tokens = plan[3u + wid.y * 3u];
    let order = a.plan_order + plan[2u + wid.y * 3u];
    if (li < TOKENS) { slots[li] = plan[order + min(li, n_tokens - 1u)]; }
    workgroupBarrier();
#else
    let part = wid.z;
    let first_token = wid.y * TOKENS;
    let n_tokens = a.n_tokens;
#end
    // Threads of a subgroup read 8 different groups of rows and 4 of tokens.
    let row_group = li % 8u + 8u * (li / 32u % 2u);
    let token_group = li / 8u % 4u + 4u * (li / 64u);
#for t TILE_TOKENS
    var low_${t} = vec4(0.0);
    var high_${t} = vec4(0.0);
#end
    let weight_at = part * a.weight_part;
    let scale_at = part * a.scale_part;
    for (var first = 0u; first < a.units; first += STEP_UNITS) {
        workgroupBarrier();
        for (var i = li; i < ROWS * STEP_UNITS; i += 256u) {
            let row = i / STEP_UNITS;
            let unit = first + i % STEP_UNITS;
            let column = i % STEP_UNITS * UNIT;
#if PAIR
            let matrix_row = first_row + row % 64u;
#else
            let matrix_row = first_row + row;
#end
            if (matrix_row < a.rows && unit < a.units) {
                let at = weight_at + matrix_row * a.weight_pitch + unit;
                let sb = scale_at + matrix_row * a.scale_pitch;
#if PAIR
                if (row < 64u) {
#include decode_unit w=w s=s
                } else {
#include decode_unit w=w2 s=s2
                }
#else
#include decode_unit w=w s=s
#end
            } else {
                for (var k = 0u; k < UNIT; k++) { ws[((column + k) * ROWS + row) >> 2u][row & 3u] = 0.0; }
            }
        }
        for (var i = li; i < TOKENS * DEPTH / 4u; i += 256u) {
            let token = i / (DEPTH / 4u);
            let quad = i % (DEPTH / 4u);
            let k = first * UNIT + quad * 4u;
#if PLANNED
            let x_row = slots[token] / a.top_k * a.x_pitch + a.x_offset;
#else
            let x_row = min(first_token + token, n_tokens - 1u) * a.x_pitch + a.x_offset + part * a.x_stride;
#end
#if ALIGNED
            var v = vec4(0.0);
            if (k < a.cols) { v = x[(x_row + k) >> 2u]; }
#else
            var v = vec4(0.0);
            for (var j = 0u; j < 4u; j++) {
                if (k + j < a.cols) { v[j] = x[x_row + k + j]; }
            }
#end
            xs[(quad * 4u) * TOKENS + token] = v.x;
            xs[(quad * 4u + 1u) * TOKENS + token] = v.y;
            xs[(quad * 4u + 2u) * TOKENS + token] = v.z;
            xs[(quad * 4u + 3u) * TOKENS + token] = v.w;
        }
        workgroupBarrier();
        for (var k = 0u; k < DEPTH; k++) {
            let w_low = ws[k * (ROWS / 4u) + row_group];
            let w_high = ws[k * (ROWS / 4u) + 16u + row_group];
#for t TILE_TOKENS
            let x_${t} = xs[k * TOKENS + token_group + ${t*16}u];
            low_${t} = fma(w_low, vec4(x_${t}), low_${t});
            high_${t} = fma(w_high, vec4(x_${t}), high_${t});
#end
        }
    }
#for t TILE_TOKENS
    {
        let token = token_group + ${t*16}u;
        if (first_token + token < n_tokens) {
#if PLANNED
            let out = slots[token] * a.y_pitch + a.y_offset;
#else
            let out = (first_token + token) * a.y_pitch + a.y_offset + part * a.y_stride;
#end
            let row = first_row + row_group * 4u;
#if PAIR
            let g = low_${t};
            let v = g / (1.0 + exp(-g)) * high_${t};
            for (var i = 0u; i < 4u; i++) {
                if (row + i < a.rows) { y[out + row + i] = v[i]; }
            }
#else
            for (var i = 0u; i < 4u; i++) {
                if (row + i < a.rows) { y[out + row + i] = low_${t}[i]; }
                if (row + 64u + i < a.rows) { y[out + row + 64u + i] = high_${t}[i]; }
            }
#end
        }
    }
#end
}
