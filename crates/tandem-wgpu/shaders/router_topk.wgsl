// DeepSeek-V3's noaux_tc for one row: as tandem-cpu/src/kernels/router_topk.rs. An expert's rank among all is counted by
// comparing it with every other, so that no thread waits for another's choice.
#include common
@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> bias: array<f32>;
@group(0) @binding(2) var<storage, read_write> ids: array<i32>;
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;

const LEAST = -3.4e38;
var<workgroup> choice: array<f32, ${MAX_EXPERTS}>;
var<workgroup> group_scores: array<f32, ${MAX_EXPERTS}>;
var<workgroup> chosen: array<u32, ${MAX_TOP_K}>;

fn score(x: f32) -> f32 { return 1.0 / (1.0 + exp(-x)); }

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let row = wid.x + a.base;
    let first = row * a.n_experts;
    for (var e = li; e < a.n_experts; e += WG) {
        let c = score(logits[first + e]) + bias[e];
        // Not c when it is not a number.
        choice[e] = select(LEAST, c, c > LEAST);
    }
    workgroupBarrier();
    if (a.n_group > 1u) {
        let size = a.n_experts / a.n_group;
        for (var g = li; g < a.n_group; g += WG) {
            var best = LEAST;
            var second = LEAST;
            for (var e = g * size; e < (g + 1u) * size; e++) {
                let c = choice[e];
                second = max(second, min(best, c));
                best = max(best, c);
            }
            group_scores[g] = best + second;
        }
        workgroupBarrier();
        for (var e = li; e < a.n_group * size; e += WG) {
            let g = e / size;
            var rank = 0u;
            for (var o = 0u; o < a.n_group; o++) {
                if (group_scores[o] > group_scores[g] || (group_scores[o] == group_scores[g] && o < g)) { rank += 1u; }
            }
            if (rank >= a.topk_group) { choice[e] = LEAST; }
        }
        workgroupBarrier();
    }
    for (var e = li; e < a.n_experts; e += WG) {
        let mine = choice[e];
        var rank = 0u;
        for (var o = 0u; o < a.n_experts; o++) {
            let other = choice[o];
            if (other > mine || (other == mine && o < e)) { rank += 1u; }
        }
        if (rank < a.top_k) { chosen[rank] = e; }
    }
    workgroupBarrier();
    if (li < a.top_k) {
        var sum = 1.0;
        if (a.normalize != 0u) {
            sum = 1e-20;
            for (var k = 0u; k < a.top_k; k++) { sum += score(logits[first + chosen[k]]); }
        }
        let e = chosen[li];
        weights[row * a.top_k + li] = score(logits[first + e]) / sum * a.scale;
        let held = i32(e) - i32(a.first_expert);
        ids[row * a.top_k + li] = select(-1, held, held >= 0 && held < i32(a.n_held));
    }
}
