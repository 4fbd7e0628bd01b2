// Adds unit u (of the staged ones; first + u of the row) of ROWS rows of ${w}, times TOKENS rows of x, to ${acc}_row_token.
#for r ROWS
let ${acc}_q${r} = ${w}[${acc}_w${r} + first + u];
#end
let ${acc}_x = u * VECTORS + ((u * VECTORS) >> 3u);
#for part PARTS
{
#if SCALED
#if SMALL_GROUPS
    let g = (first + u) * ${PARTS}u + ${part}u;
#else
    let g = (first + u) / ${UNITS_PER_GROUP}u;
#end
#for r ROWS
#include scale s=${s} base=${acc}_s${r} g=g name=c${r}
#end
#end
#for t TOKENS
    var x_sum_${t} = vec4(0.0);
#for r ROWS
    var d_${r}_${t} = 0.0;
#end
#end
#for i PART_VECTORS
#for t TOKENS
    let x_${i}_${t} = xs[${t*XS+part*PART_VECTORS+i}u + ${acc}_x];
#if SHIFTED
    x_sum_${t} += x_${i}_${t};
#end
#end
#for r ROWS
    let f_${i}_${r} = decode_${part*PART_VECTORS+i}(${acc}_q${r});
#for t TOKENS
    d_${r}_${t} = fma(f_${i}_${r}.x, x_${i}_${t}.x, d_${r}_${t});
    d_${r}_${t} = fma(f_${i}_${r}.y, x_${i}_${t}.y, d_${r}_${t});
    d_${r}_${t} = fma(f_${i}_${r}.z, x_${i}_${t}.z, d_${r}_${t});
    d_${r}_${t} = fma(f_${i}_${r}.w, x_${i}_${t}.w, d_${r}_${t});
#end
#end
#end
#for t TOKENS
#if SHIFTED
    let s_${t} = x_sum_${t}.x + x_sum_${t}.y + x_sum_${t}.z + x_sum_${t}.w;
#end
#for r ROWS
#if SCALED
    ${acc}_${r}_${t} = fma(c${r}, d_${r}_${t} * POST, ${acc}_${r}_${t});
#else
    ${acc}_${r}_${t} += d_${r}_${t};
#end
#if SHIFTED
    ${acc}_${r}_${t} = fma(c${r}_shift, s_${t}, ${acc}_${r}_${t});
#end
#end
#end
}
#end
