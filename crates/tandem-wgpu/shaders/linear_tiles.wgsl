// y = x . w^T for many rows of x: a workgroup makes 128 rows of the product (PAIR: 64 of gate and of up, and from them
// silu(gate) * up) for TOKENS rows of x, 32 columns at a time through workgroup memory; a thread has 4 + 4 rows and
// TILE_TOKENS tokens, and loads the next columns while it multiplies these. PLANNED: the y dimension is a tile of moe_plan, whose expert and slots `plan` gives; else it is a block
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

// [DEPTH, ROWS / 4] and [DEPTH, TOKENS / TILE_TOKENS]
var<workgroup> ws: array<vec4<f32>, DEPTH * ROWS / 4u>;
#if ONE_TOKEN
var<workgroup> xs: array<f32, DEPTH * TOKENS>;
#else
var<workgroup> xs: array<vec${TILE_TOKENS}<f32>, DEPTH * TOKENS / ${TILE_TOKENS}u>;
#end
#if PLANNED
var<workgroup> slots: array<u32, TOKENS>;
#end

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
#include tile_place
#if PLANNED
    workgroupBarrier();
#end
    // Threads of a subgroup read 8 different groups of rows and 4 of tokens.
    let row_group = li % 8u + 8u * (li / 32u % 2u);
    let token_group = li / 8u % 4u + 4u * (li / 64u);
#for t TILE_TOKENS
    var low_${t} = vec4(0.0);
    var high_${t} = vec4(0.0);
#end
#include tile_fills
#for i X_FILLS
    let x_token_${i} = (li + ${i}u * WG) % TOKENS;
    let x_quad_${i} = (li + ${i}u * WG) / TOKENS % (DEPTH / 4u);
#if PLANNED
    let x_row_${i} = slots[x_token_${i}] / a.top_k * a.x_pitch + a.x_offset;
#else
    let x_row_${i} = min(first_token + x_token_${i}, n_tokens - 1u) * a.x_pitch + a.x_offset + part * a.x_stride;
#end
    var x_${i} = vec4(0.0);
#end
    {
#include fetch first=0u
    }
    for (var first = 0u; first < a.units; first += STEP_UNITS) {
        workgroupBarrier();
#for i FILLS
        if (li + ${i}u * WG < ROWS * STEP_UNITS) {
            let row = fill_row_${i};
            let unit = first + fill_unit_${i};
            let column = fill_unit_${i} * UNIT;
            if (unit < a.units) {
#if PAIR
#if SMALL_GROUPS
                if (row < 64u) {
#include decode_unit q=fill_q${i} words=fill_k${i} s=s base=fill_s${i} unit=unit
                } else {
#include decode_unit q=fill_q${i} words=fill_k${i} s=s2 base=fill_s${i} unit=unit
                }
#else
#include decode_unit q=fill_q${i} words=fill_k${i} s=s base=fill_s${i} unit=unit
#end
#else
#include decode_unit q=fill_q${i} words=fill_k${i} s=s base=fill_s${i} unit=unit
#end
            } else {
                for (var k = 0u; k < UNIT; k++) { ws[((column + k) * ROWS + row) >> 2u][row & 3u] = 0.0; }
            }
        }
#end
#for i X_FILLS
        if (li + ${i}u * WG < TOKENS * DEPTH / 4u) {
            let to = x_quad_${i} * 4u * TOKENS + x_token_${i};
#for c 4
#if ONE_TOKEN
            xs[to + ${c}u * TOKENS] = x_${i}[${c}];
#else
            xs[(to + ${c}u * TOKENS) / ${TILE_TOKENS}u][(to + ${c}u * TOKENS) % ${TILE_TOKENS}u] = x_${i}[${c}];
#end
#end
        }
#end
        workgroupBarrier();
        {
            let next = first + STEP_UNITS;
#include fetch first=next
        }
        for (var k = 0u; k < DEPTH; k++) {
            let w_low = ws[k * (ROWS / 4u) + row_group];
            let w_high = ws[k * (ROWS / 4u) + 16u + row_group];
            let x_k = xs[k * (TOKENS / ${TILE_TOKENS}u) + token_group];
#for t TILE_TOKENS
#if ONE_TOKEN
            low_${t} = fma(w_low, vec4(x_k), low_${t});
            high_${t} = fma(w_high, vec4(x_k), high_${t});
#else
            low_${t} = fma(w_low, vec4(x_k[${t}]), low_${t});
            high_${t} = fma(w_high, vec4(x_k[${t}]), high_${t});
#end
#end
        }
    }
#for t TILE_TOKENS
    {
        let token = token_group * ${TILE_TOKENS}u + ${t}u;
        if (first_token + token < n_tokens) {
#if PLANNED
            let out = slots[token] * a.y_pitch + a.y_offset;
#else
            let out = (first_token + token) * a.y_pitch + a.y_offset + part * a.y_stride;
#end
            let row = first_row + row_group * 4u;
#if PAIR
            let g = low_${t} * a.post;
            let v = g / (1.0 + exp(-g)) * (high_${t} * a.post);
            for (var i = 0u; i < 4u; i++) {
                if (row + i < a.rows) { y[out + row + i] = v[i]; }
            }
#else
            for (var i = 0u; i < 4u; i++) {
                if (row + i < a.rows) { y[out + row + i] = low_${t}[i] * a.post; }
                if (row + 64u + i < a.rows) { y[out + row + 64u + i] = high_${t}[i] * a.post; }
            }
#end
        }
    }
#end
}
