// Scale and shift of group ${g}, from its word, as ${name} (and ${name}_shift).
#if E8M0
let ${name} = bitcast<f32>(((${word} >> ((${g} & 3u) * 8u)) & 255u) << 23u);
#end
#if SCALE32
let ${name} = bitcast<f32>(${word});
#end
#if PAIR16
let ${name} = bitcast<f32>(${word} << 16u);
let ${name}_shift = fma(CENTRE, ${name}, bitcast<f32>(${word} & 0xFFFF0000u));
#end
#if PAIR32
let ${name} = bitcast<f32>(${word}.x);
let ${name}_shift = fma(CENTRE, ${name}, bitcast<f32>(${word}.y));
#end
