// `v` to the 11 bits that a half-precision number has. By its bits: a conversion to f16 and back is dropped by some drivers'
// compilers (NVIDIA 580), and with it the remainder.
fn half_number(v: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>((bitcast<vec4<u32>>(v) + vec4(0x1000u)) & vec4(0xFFFFE000u));
}
