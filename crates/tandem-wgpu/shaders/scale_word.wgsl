// The word (two for PAIR32) that holds the scale of group ${g} of a row whose scales begin at word ${base} of ${s}.
#if E8M0
let ${name} = ${s}[${base} + (${g} >> 2u)];
#end
#if SCALE32
let ${name} = ${s}[${base} + ${g}];
#end
#if PAIR16
let ${name} = ${s}[${base} + ${g}];
#end
#if PAIR32
let ${name} = vec2(${s}[${base} + ${g} * 2u], ${s}[${base} + ${g} * 2u + 1u]);
#end
