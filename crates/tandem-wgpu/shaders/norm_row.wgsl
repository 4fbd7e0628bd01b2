// ${y} = ${x} / sqrt(mean(x^2) + eps) * ${weight} for row r; ADD: ${x} += addend first. VECTORS: a thread keeps its part of
// the row, all of whose loads are under way at once; without, rows are too long or odd.
#if VECTORS
    let n = ${width} / 4u;
    let row = r * n;
#for i VECTORS
    let i_${i} = min(li + ${i}u * WG, n - 1u);
    let w_${i} = ${weight}[i_${i}];
#if ADD
    var v_${i} = ${x}[row + i_${i}] + addend[row + i_${i}];
#else
    var v_${i} = ${x}[row + i_${i}];
#end
#end
    var squares = 0.0;
#for i VECTORS
    if (li + ${i}u * WG < n) {
#if ADD
        ${x}[row + i_${i}] = v_${i};
#end
        squares += dot(v_${i}, v_${i});
    }
#end
    let scale = 1.0 / sqrt(group_sum(squares, li) / f32(${width}) + ${eps});
#for i VECTORS
    if (li + ${i}u * WG < n) { ${y}[row + i_${i}] = v_${i} * scale * w_${i}; }
#end
#else
    let row = r * ${width};
    var squares = 0.0;
    for (var i = li; i < ${width}; i += WG) {
#if ADD
        let v = ${x}[row + i] + addend[row + i];
        ${x}[row + i] = v;
#else
        let v = ${x}[row + i];
#end
        squares = fma(v, v, squares);
    }
    let scale = 1.0 / sqrt(group_sum(squares, li) / f32(${width}) + ${eps});
    for (var i = li; i < ${width}; i += WG) { ${y}[row + i] = ${x}[row + i] * scale * ${weight}[i]; }
#end
