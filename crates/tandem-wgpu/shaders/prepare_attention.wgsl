// What follows the first products of attention, for each row: the y dimension is 0 for the cached latent, 1 for the cached
// key of the indexer (KEY) or the norm of the compressed queries (QUERY), 2 for the norm with both.
#include common
#include rope_table
@group(0) @binding(0) var<storage, read> kv_a: array<f32>;
@group(0) @binding(1) var<storage, read> kv_norm: array<f32>;
@group(0) @binding(2) var<storage, read> turns: array<u32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read_write> latents: array<f32>;
#if KEY
@group(0) @binding(5) var<storage, read> k: array<f32>;
@group(0) @binding(6) var<storage, read> k_norm: array<f32>;
@group(0) @binding(7) var<storage, read> k_bias: array<f32>;
@group(0) @binding(8) var<storage, read> k_turns: array<u32>;
@group(0) @binding(9) var<storage, read_write> keys: array<f32>;
#end
#if QUERY
#if VECTORS
@group(0) @binding(${KEY*5+5}) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(${KEY*5+6}) var<storage, read> q_norm: array<vec4<f32>>;
@group(0) @binding(${KEY*5+7}) var<storage, read_write> q_normed: array<vec4<f32>>;
#else
@group(0) @binding(${KEY*5+5}) var<storage, read> q: array<f32>;
@group(0) @binding(${KEY*5+6}) var<storage, read> q_norm: array<f32>;
@group(0) @binding(${KEY*5+7}) var<storage, read_write> q_normed: array<f32>;
#end
#end

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let r = wid.x + a.base;
    if (wid.y == 0u) {
#include latent_row x=kv_a weight=kv_norm turns=turns cache=latents P=latent_
    }
#if KEY
    if (wid.y == 1u) {
#include key_row x=k weight=k_norm bias=k_bias turns=k_turns cache=keys P=key_
    }
#end
#if QUERY
    if (wid.y == ${KEY+1}u) {
#include norm_row x=q weight=q_norm y=q_normed width=a.query_width eps=a.query_eps
    }
#end
}
