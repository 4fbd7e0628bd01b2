// Softmax attention of HEADS heads of one row over a span of positions, 32 at a time, with a running maximum: LANES threads
// share the product with a key; then each thread has its own elements of the values. MLA's keys and values are the same
// cached vector; ROTATED: what a query has beyond the value's width comes from `x`, by way of a rotation. With several spans their shares go to `y` for attention_merge: [row, head, span, value width + 2].
#include common
#if ROTATED
#include rope_table
#end
@group(0) @binding(0) var<storage, read> q: array<f32>;
#if WIDE
@group(0) @binding(1) var<storage, read> keys: array<vec4<f32>>;
#else
@group(0) @binding(1) var<storage, read> keys: array<f32>;
#end
@group(0) @binding(2) var<storage, read> values: array<f32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
#if ROTATED
@group(0) @binding(5) var<storage, read> x: array<f32>;
@group(0) @binding(6) var<storage, read> turns: array<u32>;
#end
#if SELECTED
@group(0) @binding(${ROTATED*2+5}) var<storage, read> selected: array<i32>;
#end

const HEADS = ${HEADS}u;
const KEY_WIDTH = ${KEY_WIDTH}u;
const VALUE_WIDTH = ${VALUE_WIDTH}u;
const TILE = 32u;
const LEAST = -3.0e38;

#if WIDE
var<workgroup> qs: array<vec4<f32>, HEADS * KEY_WIDTH / 4u>;
#else
var<workgroup> qs: array<f32, HEADS * KEY_WIDTH>;
#end
var<workgroup> slots: array<u32, TILE>;
var<workgroup> shares: array<f32, HEADS * TILE>;
var<workgroup> most: array<f32, HEADS>;
var<workgroup> fade: array<f32, HEADS>;

fn keep_query(at: u32, value: f32) {
#if WIDE
    qs[at >> 2u][at & 3u] = value;
#else
    qs[at] = value;
#end
}

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let row = wid.x + a.base;
    let head0 = wid.y * HEADS;
    let kv_head = head0 / a.heads_per_kv;
    let lane = li % LANES;
    let group = li / LANES;
    var visible = batch[batch[${BATCH_POSITIONS}u] + row] + 1u;
#if SELECTED
    visible = min(visible, a.top_k);
#end
    let shortest = (visible + ${MAX_SPANS*32}u - 1u) / ${MAX_SPANS*32}u * TILE;
    let span = max(a.least_span, shortest);
    let begin = wid.z * span;
    let end = min(begin + span, visible);
#if ROTATED
    // The rest of each query is rotated on the way.
    for (var i = li; i < HEADS * VALUE_WIDTH; i += WG) {
        let at = i / VALUE_WIDTH * KEY_WIDTH + i % VALUE_WIDTH;
        keep_query(at, q[(row * a.n_heads + head0) * KEY_WIDTH + at]);
    }
    let pairs = (KEY_WIDTH - VALUE_WIDTH) / 2u;
    for (var i = li; i < HEADS * pairs; i += WG) {
        let pair = i % pairs;
        let head = i / pairs;
        let cs = cos_sin(batch[batch[${BATCH_POSITIONS}u] + row], turns[2u * pair], turns[2u * pair + 1u]) * a.scaling;
        let e0 = select(2u * pair, pair, a.half_layout != 0u);
        let e1 = select(2u * pair + 1u, pair + pairs, a.half_layout != 0u);
        let head_at = row * a.x_pitch + a.x_offset + (head0 + head) * a.x_stride;
        let v0 = x[head_at + e0];
        let v1 = x[head_at + e1];
        keep_query(head * KEY_WIDTH + VALUE_WIDTH + e0, v0 * cs.x - v1 * cs.y);
        keep_query(head * KEY_WIDTH + VALUE_WIDTH + e1, v1 * cs.x + v0 * cs.y);
    }
#else
    for (var i = li; i < HEADS * KEY_WIDTH; i += WG) { keep_query(i, q[(row * a.n_heads + head0) * KEY_WIDTH + i]); }
#end
    if (li < HEADS) { most[li] = LEAST; }
    let table = batch[${BATCH_TABLES}u] + batch[batch[${BATCH_SEQUENCES}u] + row] * batch[${BATCH_PITCH}u];
#for h HEADS
    var sum_${h} = 0.0;
#for j VALUES
    var out_${h}_${j} = 0.0;
#end
#end
    for (var first = begin; first < end; first += TILE) {
        let n = min(TILE, end - first);
        workgroupBarrier();
        if (li < TILE) {
            var p = min(first + li, end - 1u);
#if SELECTED
            p = u32(selected[row * a.top_k + p]);
#end
            slots[li] = batch[table + p / ${PAGE}u] * ${PAGE}u + p % ${PAGE}u;
        }
        workgroupBarrier();
        {
            let at = group * ${POSITIONS}u;
#for p POSITIONS
            let key_${p} = slots[at + ${p}u] * a.key_pitch + kv_head * KEY_WIDTH;
#for h HEADS
            var dot_${h}_${p} = 0.0;
#end
#end
#if WIDE
            // All of a round's keys are under way at once.
#for it KEY_ROUNDS
            {
                let i = lane + ${it}u * LANES;
                let at = min(i, KEY_WIDTH / 4u - 1u);
#for p POSITIONS
                let k_${p} = keys[(key_${p} >> 2u) + at];
#end
                if (i < KEY_WIDTH / 4u) {
#for h HEADS
                    let q_${h} = qs[${h}u * (KEY_WIDTH / 4u) + i];
#for p POSITIONS
                    dot_${h}_${p} += dot(q_${h}, k_${p});
#end
#end
                }
            }
#end
#else
            for (var i = lane; i < KEY_WIDTH; i += LANES) {
#for p POSITIONS
                let k_${p} = keys[key_${p} + i];
#end
#for h HEADS
                let q_${h} = qs[${h}u * KEY_WIDTH + i];
#for p POSITIONS
                dot_${h}_${p} = fma(q_${h}, k_${p}, dot_${h}_${p});
#end
#end
            }
#end
#for h HEADS
#for p POSITIONS
            let score_${h}_${p} = lane_sum(dot_${h}_${p}, li) * a.scale;
            if (lane == 0u) { shares[${h}u * TILE + at + ${p}u] = select(LEAST, score_${h}_${p}, at + ${p}u < n); }
#end
#end
        }
        workgroupBarrier();
        // Shares of this tile; what came before fades as the maximum grows.
#for round ROUNDS
        let i_${round} = li + ${round}u * WG;
        var share_${round} = 0.0;
        var most_${round} = LEAST;
        if (i_${round} < HEADS * TILE) {
            most_${round} = most[i_${round} / TILE];
            for (var p = 0u; p < TILE; p++) { most_${round} = max(most_${round}, shares[i_${round} / TILE * TILE + p]); }
            share_${round} = select(0.0, exp(shares[i_${round}] - most_${round}), i_${round} % TILE < n);
        }
#end
        workgroupBarrier();
#for round ROUNDS
        if (i_${round} < HEADS * TILE) {
            shares[i_${round}] = share_${round};
            if (i_${round} % TILE == 0u) {
                fade[i_${round} / TILE] = exp(most[i_${round} / TILE] - most_${round});
                most[i_${round} / TILE] = most_${round};
            }
        }
#end
        workgroupBarrier();
#for h HEADS
        sum_${h} *= fade[${h}];
#for j VALUES
        out_${h}_${j} *= fade[${h}];
#end
#end
        // Positions past the end have a share of 0 and stand for the last one. Eight values are under way at once.
        for (var p = 0u; p < n; p += 8u) {
#for e 8
#for j VALUES
            let v_${e}_${j} = values[slots[p + ${e}u] * a.value_pitch + kv_head * VALUE_WIDTH + min(li + ${j}u * WG, VALUE_WIDTH - 1u)];
#end
#end
#for e 8
#for h HEADS
            let share_${e}_${h} = shares[${h}u * TILE + p + ${e}u];
            sum_${h} += share_${e}_${h};
#for j VALUES
            out_${h}_${j} = fma(share_${e}_${h}, v_${e}_${j}, out_${h}_${j});
#end
#end
#end
        }
    }
    workgroupBarrier();
#for h HEADS
    {
        let head = row * a.n_heads + head0 + ${h}u;
#if SPANS
        let to = (head * a.n_spans + wid.z) * (VALUE_WIDTH + 2u);
#for j VALUES
        if (li + ${j}u * WG < VALUE_WIDTH) { y[to + li + ${j}u * WG] = out_${h}_${j}; }
#end
        if (li == 0u) {
            y[to + VALUE_WIDTH] = most[${h}];
            y[to + VALUE_WIDTH + 1u] = sum_${h};
        }
#else
#for j VALUES
        if (li + ${j}u * WG < VALUE_WIDTH) { y[head * VALUE_WIDTH + li + ${j}u * WG] = out_${h}_${j} / sum_${h}; }
#end
#end
    }
#end
}
