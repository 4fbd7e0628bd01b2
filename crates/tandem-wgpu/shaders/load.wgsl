// Loads unit ${unit} of ROWS rows of ${w} as ${as}_q, and the words of its scales, where a unit has one scale, as ${as}_k.
#for r ROWS
let ${as}_q${r} = ${w}[${acc}_w${r} + ${unit}];
#end
#if AHEAD
let ${as}_group = ${unit} / ${UNITS_PER_GROUP}u;
#for r ROWS
#include scale_word s=${s} base=${acc}_s${r} g=${as}_group name=${as}_k${r}
#end
#end
