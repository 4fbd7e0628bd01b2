// Decoding of one unit: the UNIT elements of 16 bytes of a row, in VECTORS vectors of four. A decoded element times POST
// times its group's scale is the weight, in this order, so that extreme scales keep their range; affine formats add the
// group's shift.

const UNIT = ${UNIT}u;
const VECTORS = ${VECTORS}u;
const GROUP_SIZE = ${GROUP}u;

#if FP4
// matrix.rs puts the bits of codes 2j (low half of the word) and 2j + 1 (high half) where one or two shifts and masks make
// a half-precision number of them, scaled by 2^-14.
const POST = 16384.0;
fn low4(w: u32) -> vec4<f32> {
    return vec4(unpack2x16float(w & 0x8E008E00u), unpack2x16float((w << 3u) & 0x8E008E00u));
}
fn high4(w: u32) -> vec4<f32> {
    return vec4(
        unpack2x16float(((w << 6u) & 0x0E000E00u) | ((w << 1u) & 0x80008000u)),
        unpack2x16float(((w << 9u) & 0x0E000E00u) | ((w << 2u) & 0x80008000u)),
    );
}
#for i 4
fn decode_${i*2}(q: vec4<u32>) -> vec4<f32> { return low4(q[${i}]); }
fn decode_${i*2+1}(q: vec4<u32>) -> vec4<f32> { return high4(q[${i}]); }
#end
#end
#if Q4
// Codes less 8, so that products stay small. Pairs as in FP4, four bits each: 2^10 + code is a half-precision number whose
// last bits are the code.
const POST = 1.0;
const CENTRE = 8.0;
fn low4(w: u32) -> vec4<f32> {
    let a = unpack2x16float((w & 0x000F000Fu) | 0x64006400u) - 1032.0;
    let b = fma(unpack2x16float((w & 0x00F000F0u) | 0x64006400u), vec2(0.0625), vec2(-72.0));
    return vec4(a, b);
}
#for i 4
fn decode_${i*2}(q: vec4<u32>) -> vec4<f32> { return low4(q[${i}]); }
fn decode_${i*2+1}(q: vec4<u32>) -> vec4<f32> { return low4(q[${i}] >> 8u); }
#end
#end
#if Q8
const POST = 1.0;
const CENTRE = 128.0;
#for i 4
fn decode_${i}(q: vec4<u32>) -> vec4<f32> {
    let even = unpack2x16float((q[${i}] & 0x00FF00FFu) | 0x64006400u) - 1152.0;
    let odd = unpack2x16float(((q[${i}] >> 8u) & 0x00FF00FFu) | 0x64006400u) - 1152.0;
    return vec4(even.x, odd.x, even.y, odd.y);
}
#end
#end
#if FP8
const POST = 256.0;
fn pair(w: u32) -> vec2<f32> { return unpack2x16float(((w & 0x00800080u) << 8u) | ((w & 0x007F007Fu) << 7u)); }
#for i 4
fn decode_${i}(q: vec4<u32>) -> vec4<f32> {
    let even = pair(q[${i}]);
    let odd = pair(q[${i}] >> 8u);
    return vec4(even.x, odd.x, even.y, odd.y);
}
#end
#end
#if BF16
const POST = 1.0;
fn pair(w: u32) -> vec2<f32> { return vec2(bitcast<f32>(w << 16u), bitcast<f32>(w & 0xFFFF0000u)); }
fn decode_0(q: vec4<u32>) -> vec4<f32> { return vec4(pair(q.x), pair(q.y)); }
fn decode_1(q: vec4<u32>) -> vec4<f32> { return vec4(pair(q.z), pair(q.w)); }
#end
#if F16
const POST = 1.0;
fn decode_0(q: vec4<u32>) -> vec4<f32> { return vec4(unpack2x16float(q.x), unpack2x16float(q.y)); }
fn decode_1(q: vec4<u32>) -> vec4<f32> { return vec4(unpack2x16float(q.z), unpack2x16float(q.w)); }
#end
#if F32
const POST = 1.0;
fn decode_0(q: vec4<u32>) -> vec4<f32> { return bitcast<vec4<f32>>(q); }
#end
