// Loads the weights that this thread fetches of the step that begins at unit ${first}; past the end of a row, something that is not used.
#for i FILLS
{
    let unit = min(${first} + fill_unit_${i}, a.units - 1u);
#if AHEAD
    let g = unit / ${UNITS_PER_GROUP}u;
#end
#if PAIR
    if (fill_row_${i} < 64u) {
        fill_q${i} = w[fill_at_${i} + unit];
#if AHEAD
#include scale_word s=s base=fill_s${i} g=g name=word
        fill_k${i} = word;
#end
    } else {
        fill_q${i} = w2[fill_at_${i} + unit];
#if AHEAD
#include scale_word s=s2 base=fill_s${i} g=g name=word
        fill_k${i} = word;
#end
    }
#else
    fill_q${i} = w[fill_at_${i} + unit];
#if AHEAD
#include scale_word s=s base=fill_s${i} g=g name=word
    fill_k${i} = word;
#end
#end
}
#end
