// Where this thread finds the weights that it fetches of each step, for fetch_weights.wgsl.
    let weight_at = part * a.weight_part;
    let scale_at = part * a.scale_part;
    // What this thread fetches of each step: units of rows, and vectors of x.
#for i FILLS
    let fill_row_${i} = (li + ${i}u * WG) % (ROWS * STEP_UNITS) / STEP_UNITS;
    let fill_unit_${i} = (li + ${i}u * WG) % STEP_UNITS;
#if PAIR
    let fill_matrix_row_${i} = min(first_row + fill_row_${i} % 64u, a.rows - 1u);
#else
    let fill_matrix_row_${i} = min(first_row + fill_row_${i}, a.rows - 1u);
#end
    let fill_at_${i} = weight_at + fill_matrix_row_${i} * a.weight_pitch;
    let fill_s${i} = scale_at + fill_matrix_row_${i} * a.scale_pitch;
    var fill_q${i}: vec4<u32>;
#if AHEAD
#if PAIR32
    var fill_k${i}: vec2<u32>;
#else
    var fill_k${i}: u32;
#end
#end
#end
