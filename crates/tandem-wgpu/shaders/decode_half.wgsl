// Decodes the loaded unit `unit` to vectors `to` and on of w_0 (and w_1), in half precision and times a.pre; as
// decode_unit.wgsl otherwise.
#for part PARTS
{
#if SMALL_GROUPS
    let g = ${unit} * ${PARTS}u + ${part}u;
#include scale_word s=${s} base=${base} g=g name=c_word
#include scale word=c_word g=g name=c
#else
    let g = ${unit} / ${UNITS_PER_GROUP}u;
#include scale word=${words} g=g name=c
#end
#for i PART_VECTORS
    {
#if SHIFTED
        let v = fma(decode_${part*PART_VECTORS+i}(${q}), vec4(c * a.pre), vec4(c_shift * a.pre));
#else
        let v = decode_${part*PART_VECTORS+i}(${q}) * POST * (c * a.pre);
#end
        let number = half_number(v);
        w_0[to + ${part*PART_VECTORS+i}u] = vec4<f16>(number);
#if SPLIT_W
        w_1[to + ${part*PART_VECTORS+i}u] = vec4<f16>(v - number);
#end
    }
#end
}
#end
