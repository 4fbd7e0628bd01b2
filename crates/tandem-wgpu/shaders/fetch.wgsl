// Loads what this thread fetches of the step that begins at unit ${first}; past the end of a row, something that is not used.
#for i FILLS
{
    let unit = min(${first} + fill_unit_${i}, a.units - 1u);
#if AHEAD
    let g = unit / ${UNITS_PER_GROUP}u;
#end
#if PAIR
    if (fill_row_${i} < 64u) {
        fill_q${i} = w[fill_at_${i} + unit];
#if AHEAD
#include scale_word s=s base=fill_s${i} g=g name=word
        fill_k${i} = word;
#end
    } else {
        fill_q${i} = w2[fill_at_${i} + unit];
#if AHEAD
#include scale_word s=s2 base=fill_s${i} g=g name=word
        fill_k${i} = word;
#end
    }
#else
    fill_q${i} = w[fill_at_${i} + unit];
#if AHEAD
#include scale_word s=s base=fill_s${i} g=g name=word
    fill_k${i} = word;
#end
#end
}
#end
#for i X_FILLS
{
    let k = ${first} * UNIT + x_quad_${i} * 4u;
#if ALIGNED
    x_${i} = vec4(0.0);
    if (k < a.cols) { x_${i} = x[(x_row_${i} + k) >> 2u]; }
#else
    x_${i} = vec4(0.0);
    for (var j = 0u; j < 4u; j++) {
        if (k + j < a.cols) { x_${i}[j] = x[x_row_${i} + k + j]; }
    }
#end
}
#end
