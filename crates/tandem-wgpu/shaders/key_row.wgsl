// ${cache}[slot] = rope(layer_norm(x)) of row r, rotation of the first 2 * a.pairs elements.
    let row = r * a.${P}width;
    let out = batch[batch[${BATCH_SLOTS}u] + r] * a.${P}width;
    var sum = 0.0;
    for (var i = li; i < a.${P}width; i += WG) { sum += ${x}[row + i]; }
    let mean = group_sum(sum, li) / f32(a.${P}width);
    var squares = 0.0;
    for (var i = li; i < a.${P}width; i += WG) { squares = fma(${x}[row + i] - mean, ${x}[row + i] - mean, squares); }
    let scale = 1.0 / sqrt(group_sum(squares, li) / f32(a.${P}width) + a.${P}eps);
    let position = batch[batch[${BATCH_POSITIONS}u] + r];
    for (var i = li; i < a.${P}width - a.${P}pairs; i += WG) {
        if (i >= a.${P}pairs) {
            let e = i + a.${P}pairs;
            ${cache}[out + e] = (${x}[row + e] - mean) * scale * ${weight}[e] + ${bias}[e];
        } else {
            let cs = cos_sin(position, ${turns}[2u * i], ${turns}[2u * i + 1u]) * a.${P}scaling;
            var e0 = 2u * i;
            var e1 = e0 + 1u;
            if (a.${P}half_layout != 0u) {
                e0 = i;
                e1 = i + a.${P}pairs;
            }
            let v0 = (${x}[row + e0] - mean) * scale * ${weight}[e0] + ${bias}[e0];
            let v1 = (${x}[row + e1] - mean) * scale * ${weight}[e1] + ${bias}[e1];
            ${cache}[out + e0] = v0 * cs.x - v1 * cs.y;
            ${cache}[out + e1] = v1 * cs.x + v0 * cs.y;
        }
    }
