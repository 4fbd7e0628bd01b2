// As linear_tiles.wgsl, with products of half-precision numbers and sums in single precision: `x` is what half_rows.wgsl
// made, weights are times `pre`, a power of two that brings the largest near 2^15. Either may come in two parts (X_PARTS,
// W_PARTS), a number and its remainder; the product of the remainders is left out. Eight groups of 32 threads each have two
// blocks of 16 rows (PAIR: one of gate and the same of up) for ${TOKENS/32} blocks of 16 tokens. COOPERATIVE: a group is a
// subgroup, and its blocks are cooperative matrices; else every thread takes its elements by itself, for tests.
#include format
#include half_number
@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> s: array<u32>;
#if PAIR
@group(0) @binding(2) var<storage, read> w2: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> s2: array<u32>;
#end
@group(0) @binding(${PAIR*2+2}) var<storage, read> x: array<vec4<f16>>;
@group(0) @binding(${PAIR*2+3}) var<storage, read> x_scales: array<f32>;
@group(0) @binding(${PAIR*2+4}) var<storage, read_write> y: array<f32>;
#if PLANNED
@group(0) @binding(${PAIR*2+5}) var<storage, read> plan: array<u32>;
#end

const WG = ${WG}u;
const ROWS = 128u;
const TOKENS = ${TOKENS}u;
const DEPTH = ${DEPTH}u;
const STEP_UNITS = DEPTH / UNIT;
// Vectors of a row in workgroup memory: 16 bytes more than it has, so that rows begin in different banks.
const PITCH = ${PITCH}u;

#for p W_PARTS
var<workgroup> w_${p}: array<vec4<f16>, ROWS * PITCH>;
#end
#for p X_PARTS
var<workgroup> x_${p}: array<vec4<f16>, TOKENS * PITCH>;
#end
// A block of each group, [token, row].
var<workgroup> blocks: array<f32, 2048>;
#if PLANNED
var<workgroup> slots: array<u32, TOKENS>;
#end

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
#include tile_place
#for i 8
    blocks[li + ${i}u * WG] = 0.0;
#end
    workgroupBarrier();
    let group = li / 32u;
    let lane = li % 32u;
    // Of the tile's blocks of 16 rows and of 16 tokens.
    let row_block = group % 4u;
    let token_block = group / 4u * ${TOKENS/32}u;
    let block_at = group * 256u;
#for r 2
#for t TOKENS/32
#if COOPERATIVE
    var c_${r}_${t} = coopLoad<coop_mat16x16<f32, C>>(&blocks[block_at], 16u);
#else
    var c_${r}_${t} = array<f32, 8>();
#end
#end
#end
#include tile_fills
#for i X_FILLS
    let x_quad_${i} = (li + ${i}u * WG) % (DEPTH / 4u);
    let x_token_${i} = (li + ${i}u * WG) / (DEPTH / 4u) % TOKENS;
#if PLANNED
    let x_row_${i} = slots[x_token_${i}] / a.top_k * (a.x_pitch * ${X_PARTS}u) + a.x_offset;
#else
    let x_row_${i} = min(first_token + x_token_${i}, n_tokens - 1u) * (a.x_pitch * ${X_PARTS}u) + a.x_offset + part * a.x_stride;
#end
#for p X_PARTS
    var x_${i}_${p} = vec4<f16>();
#end
#end
    {
#include fetch_half first=0u
    }
    for (var first = 0u; first < a.units; first += STEP_UNITS) {
        workgroupBarrier();
#for i FILLS
        if (li + ${i}u * WG < ROWS * STEP_UNITS) {
            let unit = first + fill_unit_${i};
            let to = fill_row_${i} * PITCH + fill_unit_${i} * VECTORS;
            if (unit < a.units) {
#if PAIR
#if SMALL_GROUPS
                if (fill_row_${i} < 64u) {
#include decode_half q=fill_q${i} words=fill_k${i} s=s base=fill_s${i} unit=unit
                } else {
#include decode_half q=fill_q${i} words=fill_k${i} s=s2 base=fill_s${i} unit=unit
                }
#else
#include decode_half q=fill_q${i} words=fill_k${i} s=s base=fill_s${i} unit=unit
#end
#else
#include decode_half q=fill_q${i} words=fill_k${i} s=s base=fill_s${i} unit=unit
#end
            } else {
                for (var k = 0u; k < VECTORS; k++) {
#for p W_PARTS
                    w_${p}[to + k] = vec4<f16>();
#end
                }
            }
        }
#end
#for i X_FILLS
        if (li + ${i}u * WG < TOKENS * DEPTH / 4u) {
#for p X_PARTS
            x_${p}[x_token_${i} * PITCH + x_quad_${i}] = x_${i}_${p};
#end
        }
#end
        workgroupBarrier();
        {
            let next = first + STEP_UNITS;
#include fetch_half first=next
        }
#if COOPERATIVE
#for k DEPTH/16
        {
#for r 2
#for p W_PARTS
            let f_${r}_${p} = coopLoadT<coop_mat16x16<f16, A>>(&w_${p}[(row_block * 16u + ${r}u * 64u) * PITCH + ${k*4}u], PITCH);
#end
#end
#for t TOKENS/32
#for p X_PARTS
            let g_${t}_${p} = coopLoad<coop_mat16x16<f16, B>>(&x_${p}[(token_block + ${t}u) * 16u * PITCH + ${k*4}u], PITCH);
#end
#end
#for r 2
#for t TOKENS/32
#if SPLIT_W
            c_${r}_${t} = coopMultiplyAdd(f_${r}_1, g_${t}_0, c_${r}_${t});
#end
#if SPLIT_X
            c_${r}_${t} = coopMultiplyAdd(f_${r}_0, g_${t}_1, c_${r}_${t});
#end
            c_${r}_${t} = coopMultiplyAdd(f_${r}_0, g_${t}_0, c_${r}_${t});
#end
#end
        }
#end
#else
        for (var k = 0u; k < DEPTH; k++) {
#for r 2
#for p W_PARTS
            let f_${r}_${p} = f32(w_${p}[(row_block * 16u + ${r}u * 64u + lane % 16u) * PITCH + k / 4u][k % 4u]);
#end
#end
            for (var j = 0u; j < 8u; j++) {
#for t TOKENS/32
#for p X_PARTS
                let g_${t}_${p} = f32(x_${p}[((token_block + ${t}u) * 16u + lane / 16u + j * 2u) * PITCH + k / 4u][k % 4u]);
#end
#for r 2
#if SPLIT_W
                c_${r}_${t}[j] += f_${r}_1 * g_${t}_0;
#end
#if SPLIT_X
                c_${r}_${t}[j] += f_${r}_0 * g_${t}_1;
#end
                c_${r}_${t}[j] += f_${r}_0 * g_${t}_0;
#end
#end
            }
        }
#end
    }
    // A thread writes the elements lane + 32 j of each block.
    let row_in_block = lane % 16u;
#for t TOKENS/32
    {
#for r 2
        workgroupBarrier();
#if COOPERATIVE
        coopStore(c_${r}_${t}, &blocks[block_at], 16u);
#else
        for (var j = 0u; j < 8u; j++) { blocks[block_at + lane + j * 32u] = c_${r}_${t}[j]; }
#end
        workgroupBarrier();
#for j 8
        let v_${r}_${j} = blocks[block_at + lane + ${j}u * 32u];
#end
#end
#for j 8
        {
            let token = (token_block + ${t}u) * 16u + lane / 16u + ${j}u * 2u;
            if (first_token + token < n_tokens) {
#if PLANNED
                let out = slots[token] * a.y_pitch + a.y_offset;
                let scale = x_scales[slots[token] / a.top_k];
#else
                let out = (first_token + token) * a.y_pitch + a.y_offset + part * a.y_stride;
                let scale = x_scales[first_token + token];
#end
                let row = first_row + row_block * 16u + row_in_block;
                let low = v_0_${j} * scale * a.post;
                let high = v_1_${j} * scale * a.post;
#if PAIR
                if (row < a.rows) { y[out + row] = low / (1.0 + exp(-low)) * high; }
#else
                if (row < a.rows) { y[out + row] = low; }
                if (row + 64u < a.rows) { y[out + row + 64u] = high; }
#end
            }
        }
#end
    }
#end
}
