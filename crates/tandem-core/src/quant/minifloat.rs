//! The three small floats of the block formats: E2M1 codes, E4M3 codes and scales, E8M0 scales.
//!
//! Definitions: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 5.4. Grouping and packing are in the format files.

/// Value of each E2M1 code; bit 3 is the sign, so code 8 is -0.
pub const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Largest E2M1 magnitude.
pub const E2M1_MAX: f32 = 6.0;

/// Value of each E4M3 byte (`float8_e4m3fn`: no infinities, 0x7f and 0xff are NaN).
pub static E4M3: [f32; 256] = e4m3_table();

/// Largest E4M3 magnitude.
pub const E4M3_MAX: f32 = 448.0;

/// Decodes an E8M0 scale byte as MLX does: `2^(byte - 127)`; 0 is the f32 subnormal `2^-127`, 255 is +inf (OCP: NaN).
#[inline]
pub fn e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// Encodes to E4M3: nearest even, magnitudes above 448 (infinities too) saturate, NaN stays NaN, the sign is kept.
#[inline]
pub fn e4m3_encode(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.abs();
    let bits = magnitude.to_bits();
    let code = if magnitude.is_nan() {
        0x7f
    } else if magnitude >= E4M3_MAX {
        0x7e
    } else if magnitude < 1.0 / 64.0 {
        // Subnormals are multiples of 2^-9; a result of 8 is the smallest normal, whose code is also 8.
        (magnitude * 512.0).round_ties_even() as u8
    } else {
        // Keep 3 of 23 mantissa bits; the carry of the rounding runs into the exponent, which is rebiased 127 -> 7.
        let odd = (bits >> 20) & 1;
        (((bits + 0x7_ffff + odd) >> 20) - (120 << 3)) as u8
    };
    sign | code
}

/// Encodes to the nearest E2M1 code by MLX's CPU rule: the first code of [`E2M1`] with the least f32 distance.
///
/// So ties go to the smaller magnitude, -0 is never written, and NaN or a magnitude beyond about 2^27 (every distance
/// is the same after rounding) gives code 0.
#[inline]
pub(crate) fn e2m1_encode(value: f32) -> u8 {
    let mut best = 0;
    let mut least = value.abs();
    for (code, candidate) in E2M1.iter().enumerate().skip(1) {
        let distance = (value - candidate).abs();
        if distance < least {
            best = code as u8;
            least = distance;
        }
    }
    best
}

/// Largest magnitude for which [`e2m1_encode_small`] is [`e2m1_encode`].
pub(crate) const E2M1_EXACT: f32 = 64.0;

/// [`e2m1_encode`] for magnitudes up to [`E2M1_EXACT`], where differences to the candidates next to the value are exact,
/// so that the midpoints decide. Without branches, so that a loop over it vectorises.
#[inline]
pub(crate) fn e2m1_encode_small(value: f32) -> u32 {
    let magnitude = value.abs();
    let code = u32::from(magnitude > 0.25)
        + u32::from(magnitude > 0.75)
        + u32::from(magnitude > 1.25)
        + u32::from(magnitude > 1.75)
        + u32::from(magnitude > 2.5)
        + u32::from(magnitude > 3.5)
        + u32::from(magnitude > 5.0);
    code + (u32::from(value < -0.25) << 3)
}

/// Encodes a scale to the least E8M0 power of two that is not below it (MLX 0.32.3 and later), clamped to `2^-127`.
///
/// Zero gives 127 (a scale of 1), as MLX's CPU backend writes. `scale` is finite and not negative.
#[inline]
pub(crate) fn e8m0_encode_up(scale: f32) -> u8 {
    debug_assert!(scale.is_finite() && scale >= 0.0, "e8m0 scale must be finite and not negative, found {scale}");
    let bits = scale.to_bits();
    if bits == 0 {
        127
    } else if bits <= e8m0(0).to_bits() {
        0
    } else {
        // Subnormals above 2^-127 round up to byte 1 by the same expression.
        ((bits + 0x7f_ffff) >> 23).min(254) as u8
    }
}

const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        let exponent = (byte as u32 >> 3) & 15;
        let mantissa = byte as u32 & 7;
        let magnitude = if byte & 0x7f == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            f32::from_bits(((exponent + 120) << 23) | (mantissa << 20))
        };
        table[byte] = if byte & 0x80 != 0 { -magnitude } else { magnitude };
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn e4m3_round_trips_every_byte() {
        for byte in 0..=255u8 {
            assert_eq!(e4m3_encode(E4M3[usize::from(byte)]) & 0x7f, byte & 0x7f, "byte {byte:#04x}");
            assert_eq!(E4M3[usize::from(byte)].is_sign_negative(), byte & 0x80 != 0, "byte {byte:#04x}");
        }
    }

    #[test]
    fn e4m3_midpoints_go_to_the_even_code() {
        for low in 0..0x7eu8 {
            let midpoint = (E4M3[usize::from(low)] + E4M3[usize::from(low) + 1]) / 2.0;
            let even = low + (low & 1);
            assert_eq!(e4m3_encode(midpoint), even, "between codes {low:#04x} and the next");
            assert_eq!(e4m3_encode(midpoint.next_down()), low);
            assert_eq!(e4m3_encode(-midpoint.next_up()), (low + 1) | 0x80);
        }
    }

    #[test]
    fn e4m3_limits() {
        for (value, expected) in [
            (448.0, 0x7e),
            (465.0, 0x7e),
            (f32::INFINITY, 0x7e),
            (f32::NEG_INFINITY, 0xfe),
            (f32::NAN, 0x7f),
            (-0.0, 0x80),
            (f32::MIN_POSITIVE, 0),
        ] {
            assert_eq!(e4m3_encode(value), expected, "{value}");
        }
    }

    #[test]
    fn e2m1_ties_go_to_the_smaller_magnitude() {
        for code in 0..7u8 {
            let (low, high) = (E2M1[usize::from(code)], E2M1[usize::from(code) + 1]);
            let midpoint = (low + high) / 2.0;
            assert_eq!(e2m1_encode(midpoint), code);
            assert_eq!(e2m1_encode(-midpoint), if code == 0 { 0 } else { code | 8 });
            assert_eq!(e2m1_encode(high), code + 1);
        }
        assert_eq!(e2m1_encode(-0.0), 0);
        assert_eq!(e2m1_encode(1000.0), 7);
        assert_eq!(e2m1_encode(f32::NAN), 0);
        assert_eq!(e2m1_encode(f32::INFINITY), 0);
    }

    #[test]
    fn e8m0_round_trips_and_rounds_up() {
        for byte in 0..=254u8 {
            assert_eq!(e8m0_encode_up(e8m0(byte)), byte);
            assert_eq!(e8m0_encode_up(e8m0(byte).next_up()), (byte + 1).min(254));
        }
        assert_eq!(e8m0(255), f32::INFINITY);
        assert_eq!(e8m0_encode_up(0.0), 127);
        assert_eq!(e8m0_encode_up(f32::from_bits(1)), 0);
    }

    proptest! {
        #[test]
        fn midpoints_decide_as_distances_do(value in -64.0f32..64.0, code in 0usize..8, ulps in -2i32..=2) {
            let midpoint = (E2M1[code] + E2M1[(code + 1).min(7)]) / 2.0;
            let near = f32::from_bits(midpoint.to_bits().saturating_add_signed(ulps));
            for value in [value, value / 16.0, near, -near] {
                prop_assert_eq!(e2m1_encode_small(value), u32::from(e2m1_encode(value)), "{}", value);
            }
        }

        #[test]
        fn e4m3_encode_is_nearest(value in -448.0f32..448.0) {
            let decoded = E4M3[usize::from(e4m3_encode(value))];
            let nearest = E4M3.iter().filter(|v| !v.is_nan()).map(|v| (v - value).abs()).fold(f32::INFINITY, f32::min);
            prop_assert_eq!((decoded - value).abs(), nearest);
        }
    }
}
