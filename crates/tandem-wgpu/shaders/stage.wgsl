// Copies units ${first} .. ${first} + ${n} of ${COUNT} rows of x to xs, XS vectors for each; row t begins at element
// x_row_t. Where rows are whole units the loads are all under way before the first is stored. What is left of
// ${CHUNK} units is 0.
#if ALIGNED
{
#for i STEPS
#for t COUNT
    let x_${i}_${t} = x[(x_row_${t} >> 2u) + min(${first} * VECTORS + li + ${i}u * WG, a.units * VECTORS - 1u)];
#end
#end
#for i STEPS
    {
        let v = li + ${i}u * WG;
        if (v < ${CHUNK}u * VECTORS) {
#for t COUNT
            xs[${t*XS}u + v + (v >> 3u)] = select(vec4(0.0), x_${i}_${t}, v < ${n} * VECTORS);
#end
        }
    }
#end
}
#else
for (var v = li; v < ${CHUNK}u * VECTORS; v += WG) {
    let k = (${first} * VECTORS + v) * 4u;
#for t COUNT
    var x_${t} = vec4(0.0);
    for (var i = 0u; i < 4u; i++) {
        if (k + i < a.cols) { x_${t}[i] = x[x_row_${t} + k + i]; }
    }
    xs[${t*XS}u + v + (v >> 3u)] = x_${t};
#end
}
#end
