// Positions of the a.top_k highest scores of a row, ascending; all that it sees while they are fewer, then -1. Among equal
// scores at the threshold the earlier positions win. The threshold is found byte by byte; then every thread takes the
// positions of its own stretch.
#include common
@group(0) @binding(0) var<storage, read> scores: array<f32>;
@group(0) @binding(1) var<storage, read> batch: array<u32>;
@group(0) @binding(2) var<storage, read_write> selected: array<i32>;

var<workgroup> counts: array<atomic<u32>, 256>;
var<workgroup> found: array<u32, 2>;
var<workgroup> higher: array<u32, WG>;
var<workgroup> equal: array<u32, WG>;

// An integer that orders as the float does; both zeros are alike.
fn ordered(value: f32) -> u32 {
    let bits = bitcast<u32>(select(value, 0.0, value == 0.0));
    return bits ^ (u32(bitcast<i32>(bits) >> 31u) | 0x80000000u);
}

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let local_row = wid.x + a.base;
    let row = a.first_row + local_row;
    let visible = batch[batch[${BATCH_POSITIONS}u] + row] + 1u;
    let out = row * a.top_k;
    if (visible <= a.top_k) {
        for (var i = li; i < a.top_k; i += WG) { selected[out + i] = select(-1, i32(i), i < visible); }
        return;
    }
    let first = local_row * a.pitch;
    var prefix = 0u;
    var wanted = a.top_k;
    for (var pass_ = 0u; pass_ < 4u; pass_++) {
        let shift = 24u - 8u * pass_;
        for (var i = li; i < 256u; i += WG) { atomicStore(&counts[i], 0u); }
        workgroupBarrier();
        for (var p = li; p < visible; p += WG) {
            let key = ordered(scores[first + p]);
            if (pass_ == 0u || (key >> (shift + 8u)) == prefix) { atomicAdd(&counts[(key >> shift) & 255u], 1u); }
        }
        workgroupBarrier();
        if (li == 0u) {
            var left = wanted;
            var bucket = 255u;
            loop {
                let n = atomicLoad(&counts[bucket]);
                if (n >= left || bucket == 0u) { break; }
                left -= n;
                bucket -= 1u;
            }
            found[0] = bucket;
            found[1] = left;
        }
        workgroupBarrier();
        prefix = (prefix << 8u) | found[0];
        wanted = found[1];
        workgroupBarrier();
    }
    let stretch = (visible + WG - 1u) / WG;
    let begin = min(li * stretch, visible);
    let end = min(begin + stretch, visible);
    var n_higher = 0u;
    var n_equal = 0u;
    for (var p = begin; p < end; p++) {
        let key = ordered(scores[first + p]);
        if (key > prefix) { n_higher += 1u; }
        if (key == prefix) { n_equal += 1u; }
    }
    higher[li] = n_higher;
    equal[li] = n_equal;
    workgroupBarrier();
    var before_higher = 0u;
    var before_equal = 0u;
    for (var i = 0u; i < li; i++) {
        before_higher += higher[i];
        before_equal += equal[i];
    }
    var to = before_higher + min(before_equal, wanted);
    var ties = wanted - min(before_equal, wanted);
    for (var p = begin; p < end; p++) {
        let key = ordered(scores[first + p]);
        if (key > prefix || (key == prefix && ties > 0u)) {
            if (key == prefix) { ties -= 1u; }
            selected[out + to] = i32(p);
            to += 1u;
        }
    }
}
