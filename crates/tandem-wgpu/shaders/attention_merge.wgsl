// Adds up the spans of attention.wgsl: one workgroup for each row and head.
#include common
@group(0) @binding(0) var<storage, read> spans: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let head = wid.x + a.base;
    let pitch = a.width + 2u;
    let first = head * a.n_spans * pitch;
    var most = -3.0e38;
    for (var s = 0u; s < a.n_spans; s++) { most = max(most, spans[first + s * pitch + a.width]); }
    var sum = 0.0;
    for (var s = 0u; s < a.n_spans; s++) {
        let at = first + s * pitch + a.width;
        sum = fma(exp(spans[at] - most), spans[at + 1u], sum);
    }
    for (var i = li; i < a.width; i += WG) {
        var v = 0.0;
        for (var s = 0u; s < a.n_spans; s++) {
            let at = first + s * pitch;
            v = fma(exp(spans[at + a.width] - most), spans[at + i], v);
        }
        y[head * a.width + i] = v / sum;
    }
}
