// The rows of x in half precision, for linear_tiles_half.wgsl: times the power of two that brings the row's largest element
// to 2^14 .. 2^15, as a number and (X_PARTS 2) what that leaves of it. A row of `to` has n_parts slices of `width` columns,
// those past `cols` zero, and all numbers before all remainders; `scales` takes the power back.
#include common
#include half_number
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> to: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let row = wid.x + a.base;
    let start = row * a.x_pitch + a.x_offset;
    var most = 0.0;
    for (var i = li; i < a.n_parts * a.cols; i += WG) {
        most = max(most, abs(x[start + i / a.cols * a.x_stride + i % a.cols]));
    }
    most = lane_max(most, li);
    workgroupBarrier();
    if (li % LANES == 0u) { across[li / LANES] = most; }
    workgroupBarrier();
    for (var i = 0u; i < GROUPS; i++) { most = max(most, across[i]); }
    // 2^(14 - e) for an exponent e, and its inverse.
    let up = clamp(268u - ((bitcast<u32>(most) >> 23u) & 255u), 1u, 253u);
    let factor = bitcast<f32>(up << 23u);
    if (li == 0u) { scales[row] = bitcast<f32>((254u - up) << 23u); }
    let quads = a.n_parts * a.width / 4u;
    for (var i = li; i < quads; i += WG) {
        let part = i * 4u / a.width;
        let column = i * 4u % a.width;
        let at = start + part * a.x_stride + column;
        var v = vec4(0.0);
        for (var j = 0u; j < 4u; j++) {
            if (column + j < a.cols) { v[j] = x[at + j] * factor; }
        }
        let number = half_number(v);
        to[row * quads * ${X_PARTS}u + i] = vec4<f16>(number);
#if SPLIT_X
        to[(row * 2u + 1u) * quads + i] = vec4<f16>(v - number);
#end
    }
}
