// Scale and shift of group ${g} of a row whose scales begin at word ${base} of ${s}, as ${name} (and ${name}_shift).
#if E8M0
let ${name} = bitcast<f32>(((${s}[${base} + (${g} >> 2u)] >> ((${g} & 3u) * 8u)) & 255u) << 23u);
#end
#if SCALE32
let ${name} = bitcast<f32>(${s}[${base} + ${g}]);
#end
#if PAIR16
let ${name}_pair = ${s}[${base} + ${g}];
let ${name} = bitcast<f32>(${name}_pair << 16u);
let ${name}_shift = fma(CENTRE, ${name}, bitcast<f32>(${name}_pair & 0xFFFF0000u));
#end
#if PAIR32
let ${name} = bitcast<f32>(${s}[${base} + ${g} * 2u]);
let ${name}_shift = fma(CENTRE, ${name}, bitcast<f32>(${s}[${base} + ${g} * 2u + 1u]));
#end
