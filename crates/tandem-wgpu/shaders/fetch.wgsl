// Loads what this thread fetches of the step that begins at unit ${first}; past the end of a row, zeros of x.
#include fetch_weights first=${first}
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
