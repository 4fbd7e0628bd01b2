// Decodes the loaded unit `unit` of row `row` of the tile to ws. ${q} is the unit and ${words} the words of its scales, the
// first of which begins at word ${base} of ${s}.
#for part PARTS
{
#if SCALED
#if SMALL_GROUPS
    let g = ${unit} * ${PARTS}u + ${part}u;
#include scale_word s=${s} base=${base} g=g name=c_word
#include scale word=c_word g=g name=c
#else
    let g = ${unit} / ${UNITS_PER_GROUP}u;
#include scale word=${words} g=g name=c
#end
#end
#for i PART_VECTORS
#if SHIFTED
    let f_${i} = fma(decode_${part*PART_VECTORS+i}(${q}), vec4(c), vec4(c_shift));
#else
#if SCALED
    let f_${i} = decode_${part*PART_VECTORS+i}(${q}) * POST * c;
#else
    let f_${i} = decode_${part*PART_VECTORS+i}(${q});
#end
#end
    {
        let k = column + ${part*PART_VECTORS*4+i*4}u;
        ws[(k * ROWS + row) >> 2u][row & 3u] = f_${i}.x;
        ws[((k + 1u) * ROWS + row) >> 2u][row & 3u] = f_${i}.y;
        ws[((k + 2u) * ROWS + row) >> 2u][row & 3u] = f_${i}.z;
        ws[((k + 3u) * ROWS + row) >> 2u][row & 3u] = f_${i}.w;
    }
#end
}
#end
