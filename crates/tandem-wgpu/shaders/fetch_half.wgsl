// As fetch.wgsl, for x in half precision: vectors of a slice are padded to whole steps.
#include fetch_weights first=${first}
#for i X_FILLS
{
    let k = min(${first} * (UNIT / 4u) + x_quad_${i}, a.x_width - 1u);
#for p X_PARTS
    x_${i}_${p} = x[x_row_${i} + ${p}u * a.x_pitch + k];
#end
}
#end
