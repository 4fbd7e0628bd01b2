// Lanes: LANES threads that add up a row together. They are a subgroup, a part of one, or (PLAIN) neighbours in
// workgroup memory. lane_sum and lane_max must be reached by every thread of the workgroup.

const WG = ${WG}u;
const LANES = ${LANES}u;
const GROUPS = WG / LANES;

var<workgroup> across: array<f32, WG>;

#if PLAIN
fn lane_sum(v: f32, li: u32) -> f32 {
    across[li] = v;
    workgroupBarrier();
    var sum = 0.0;
    let first = li / LANES * LANES;
    for (var i = 0u; i < LANES; i++) { sum += across[first + i]; }
    workgroupBarrier();
    return sum;
}

fn lane_max(v: f32, li: u32) -> f32 {
    across[li] = v;
    workgroupBarrier();
    let first = li / LANES * LANES;
    var most = across[first];
    for (var i = 1u; i < LANES; i++) { most = max(most, across[first + i]); }
    workgroupBarrier();
    return most;
}
#else
#if WHOLE
fn lane_sum(v: f32, li: u32) -> f32 { return subgroupAdd(v); }
fn lane_max(v: f32, li: u32) -> f32 { return subgroupMax(v); }
#else
// The subgroup may be longer than LANES.
fn lane_sum(v: f32, li: u32) -> f32 {
    var sum = v;
    for (var d = LANES / 2u; d > 0u; d = d >> 1u) { sum += subgroupShuffleXor(sum, d); }
    return sum;
}

fn lane_max(v: f32, li: u32) -> f32 {
    var most = v;
    for (var d = LANES / 2u; d > 0u; d = d >> 1u) { most = max(most, subgroupShuffleXor(most, d)); }
    return most;
}
#end
#end

// Sum over the workgroup; every thread gets it.
fn group_sum(v: f32, li: u32) -> f32 {
    let part = lane_sum(v, li);
    workgroupBarrier();
    if (li % LANES == 0u) { across[li / LANES] = part; }
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < GROUPS; i++) { sum += across[i]; }
    workgroupBarrier();
    return sum;
}
