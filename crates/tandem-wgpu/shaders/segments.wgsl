// Products of ROWS rows of a matrix (GATED: of two) with TOKENS rows of x, segment by segment: LANES threads share a segment
// of SEGMENT units, and SPLIT such groups the segments of a row. A row's product is the sum of its segments in their order,
// each added up by its LANES threads, so that it does not depend on how the work is divided. All units of a step are on
// their way before x is there; past the end of a row x is 0.
// With SPLIT > 1 a thread finds the segments' sums in `sums`; else every thread of the group has ${A}_total_row_token.
let lane = li % LANES;
let split = li / LANES % ${SPLIT}u;
let team = li / (LANES * ${SPLIT}u);
#for r ROWS
#for t TOKENS
#if SPLIT_UP
#else
var ${A}_total_${r}_${t} = 0.0;
#if GATED
var ${B}_total_${r}_${t} = 0.0;
#end
#end
#end
#end
for (var first = 0u; first < a.units; first += ${CHUNK}u) {
    let n = min(${CHUNK}u, a.units - first);
#for j SEGMENT_UNITS
    let at_${j} = split * SEGMENT + ${j}u * LANES + lane;
    let unit_${j} = min(first + at_${j}, a.units - 1u);
#include load w=${WA} s=${SA} acc=${A} unit=unit_${j} as=${A}_${j}
#if GATED
#include load w=${WB} s=${SB} acc=${B} unit=unit_${j} as=${B}_${j}
#end
#end
    workgroupBarrier();
#include stage first=first n=n COUNT=${TOKENS}
    workgroupBarrier();
    {
#for r ROWS
#for t TOKENS
        var ${A}_${r}_${t} = 0.0;
#if GATED
        var ${B}_${r}_${t} = 0.0;
#end
#end
#end
#for j SEGMENT_UNITS
        {
#include dot s=${SA} acc=${A} at=at_${j} unit=unit_${j} as=${A}_${j}
#if GATED
#include dot s=${SB} acc=${B} at=at_${j} unit=unit_${j} as=${B}_${j}
#end
        }
#end
#if SPLIT_UP
        let segment = first / SEGMENT + split;
#end
#for r ROWS
#for t TOKENS
        let ${A}_sum_${r}_${t} = lane_sum(${A}_${r}_${t}, li);
#if GATED
        let ${B}_sum_${r}_${t} = lane_sum(${B}_${r}_${t}, li);
#end
#if SPLIT_UP
        if (lane == 0u && segment < ${SEGMENTS}u) {
            sums[(segment * ${TEAMS}u + team) * ${ROWS*TOKENS}u + ${r*TOKENS+t}u] = ${A}_sum_${r}_${t};
#if GATED
            sums[${SEGMENTS*TEAMS*ROWS*TOKENS}u + (segment * ${TEAMS}u + team) * ${ROWS*TOKENS}u + ${r*TOKENS+t}u] = ${B}_sum_${r}_${t};
#end
        }
#else
        ${A}_total_${r}_${t} += ${A}_sum_${r}_${t};
#if GATED
        ${B}_total_${r}_${t} += ${B}_sum_${r}_${t};
#end
#end
#end
#end
    }
}
