// ${cache}[slot] = [rms_norm(kv_a[..latent]), rope(kv_a[latent..])] of row r.
    let row = r * a.${P}width;
    let latent = a.${P}width - 2u * a.${P}pairs;
    let out = batch[batch[${BATCH_SLOTS}u] + r] * a.${P}width;
    var squares = 0.0;
    for (var i = li; i < latent; i += WG) { squares = fma(${x}[row + i], ${x}[row + i], squares); }
    let scale = 1.0 / sqrt(group_sum(squares, li) / f32(latent) + a.${P}eps);
    for (var i = li; i < latent; i += WG) { ${cache}[out + i] = ${x}[row + i] * scale * ${weight}[i]; }
    let position = batch[batch[${BATCH_POSITIONS}u] + r];
    for (var pair = li; pair < a.${P}pairs; pair += WG) {
        let cs = cos_sin(position, ${turns}[2u * pair], ${turns}[2u * pair + 1u]) * a.${P}scaling;
        var e0 = latent + 2u * pair;
        var e1 = e0 + 1u;
        if (a.${P}half_layout != 0u) {
            e0 = latent + pair;
            e1 = e0 + a.${P}pairs;
        }
        let v0 = ${x}[row + e0];
        let v1 = ${x}[row + e1];
        ${cache}[out + e0] = v0 * cs.x - v1 * cs.y;
        ${cache}[out + e1] = v1 * cs.x + v0 * cs.y;
    }
