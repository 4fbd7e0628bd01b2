// y = x / sqrt(mean(x^2) + eps) * weight over whole rows; ADD: x += addend first. See norm_row for VECTORS.
#include common
#if VECTORS
@group(0) @binding(0) var<storage, ${X_ACCESS}> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;
#if ADD
@group(0) @binding(3) var<storage, read> addend: array<vec4<f32>>;
#end
#else
@group(0) @binding(0) var<storage, ${X_ACCESS}> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
#if ADD
@group(0) @binding(3) var<storage, read> addend: array<f32>;
#end
#end

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let r = wid.x + a.base;
#include norm_row x=x weight=weight y=y width=a.width eps=a.eps
}
