// Sorts the chosen experts of many rows, for linear_tiles: plan[0] is the number of tiles; then expert, first slot and number
// of slots of each; from a.plan_order on the slots, by expert. One workgroup.
#include common
@group(0) @binding(0) var<storage, read> ids: array<i32>;
@group(0) @binding(1) var<storage, read_write> plan: array<u32>;

var<workgroup> counts: array<atomic<u32>, ${MAX_EXPERTS}>;
var<workgroup> firsts: array<u32, ${MAX_EXPERTS}>;
var<workgroup> tiles: array<u32, ${MAX_EXPERTS}>;

@compute @workgroup_size(${WG})
fn main(@builtin(local_invocation_index) li: u32) {
    for (var e = li; e < a.n_experts; e += WG) { atomicStore(&counts[e], 0u); }
    workgroupBarrier();
    for (var i = li; i < a.n_slots; i += WG) {
        let id = ids[a.first_slot + i];
        if (id >= 0) { atomicAdd(&counts[u32(id)], 1u); }
    }
    workgroupBarrier();
    if (li == 0u) {
        var slot = 0u;
        var tile = 0u;
        for (var e = 0u; e < a.n_experts; e++) {
            firsts[e] = slot;
            tiles[e] = tile;
            let n = atomicLoad(&counts[e]);
            slot += n;
            tile += (n + a.tile - 1u) / a.tile;
        }
        plan[0] = tile;
    }
    workgroupBarrier();
    for (var e = li; e < a.n_experts; e += WG) {
        let n = atomicLoad(&counts[e]);
        var at = 1u + tiles[e] * 3u;
        for (var first = 0u; first < n; first += a.tile) {
            plan[at] = e;
            plan[at + 1u] = firsts[e] + first;
            plan[at + 2u] = min(a.tile, n - first);
            at += 3u;
        }
        atomicStore(&counts[e], 0u);
    }
    workgroupBarrier();
    for (var i = li; i < a.n_slots; i += WG) {
        let id = ids[a.first_slot + i];
        if (id >= 0) { plan[a.plan_order + firsts[u32(id)] + atomicAdd(&counts[u32(id)], 1u)] = i; }
    }
}
