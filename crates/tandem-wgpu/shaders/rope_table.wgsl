// Cosine and sine of a pair at a position. `turns` holds for each pair the part of a turn that one position adds, in units
// of 2^-64 (high word, low word), so that the angle of any position is exact to 2^-32 of a turn and only an eighth of a turn
// is left to the polynomials: drivers' own functions may be off by 2^-11.

fn multiply_high(a: u32, b: u32) -> u32 {
    let a0 = a & 0xFFFFu;
    let a1 = a >> 16u;
    let b0 = b & 0xFFFFu;
    let b1 = b >> 16u;
    let middle = a1 * b0 + ((a0 * b0) >> 16u);
    let low = a0 * b1 + (middle & 0xFFFFu);
    return a1 * b1 + (middle >> 16u) + (low >> 16u);
}

fn cos_sin(position: u32, high: u32, low: u32) -> vec2<f32> {
    let turn = position * high + multiply_high(position, low);
    let quarter = (turn + 0x20000000u) >> 30u;
    let rest = bitcast<i32>(turn - (quarter << 30u));
    let t = f32(rest) * 1.4629180792671596e-9;
    let t2 = t * t;
    let sine = fma(t * t2, fma(t2, fma(t2, fma(t2, 2.7557319e-6, -1.9841270e-4), 8.3333333e-3), -1.6666667e-1), t);
    let cosine = fma(t2, fma(t2, fma(t2, fma(t2, 2.4801587e-5, -1.3888889e-3), 4.1666667e-2), -0.5), 1.0);
    switch quarter & 3u {
        case 0u: { return vec2(cosine, sine); }
        case 1u: { return vec2(-sine, cosine); }
        case 2u: { return vec2(-cosine, -sine); }
        default: { return vec2(sine, -cosine); }
    }
}
