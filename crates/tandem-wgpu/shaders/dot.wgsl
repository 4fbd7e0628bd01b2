// Adds what load has as ${as} (unit ${at} of the staged ones, ${unit} of the row) of ROWS rows, times TOKENS rows of x, to
// ${acc}_row_token.
let ${as}_x = ${at} * VECTORS + ((${at} * VECTORS) >> 3u);
#for part PARTS
{
#if SCALED
#if SMALL_GROUPS
    let g = ${unit} * ${PARTS}u + ${part}u;
#for r ROWS
#include scale_word s=${s} base=${acc}_s${r} g=g name=word_${r}
#include scale word=word_${r} g=g name=c${r}
#end
#else
    let g = ${unit} / ${UNITS_PER_GROUP}u;
#for r ROWS
#include scale word=${as}_k${r} g=g name=c${r}
#end
#end
#end
#for t TOKENS
#if SHIFTED
    var x_sum_${t} = vec4(0.0);
#end
#for r ROWS
    var d_${r}_${t} = 0.0;
#end
#end
#for i PART_VECTORS
#for t TOKENS
    let x_${i}_${t} = xs[${t*XS+part*PART_VECTORS+i}u + ${as}_x];
#if SHIFTED
    x_sum_${t} += x_${i}_${t};
#end
#end
#for r ROWS
    let f_${i}_${r} = decode_${part*PART_VECTORS+i}(${as}_q${r});
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
