// Copies units ${first} .. ${first} + ${n} of TOKENS rows of x to xs; row t begins at element x_row_t.
for (var v = li; v < ${n} * VECTORS; v += WG) {
    let k = (${first} * VECTORS + v) * 4u;
#for t TOKENS
#if ALIGNED
    xs[${t*XS} + v + (v >> 3u)] = x[(x_row_${t} + k) >> 2u];
#else
    var x_${t} = vec4(0.0);
    for (var i = 0u; i < 4u; i++) {
        if (k + i < a.cols) { x_${t}[i] = x[x_row_${t} + k + i]; }
    }
    xs[${t*XS} + v + (v >> 3u)] = x_${t};
#end
#end
}
