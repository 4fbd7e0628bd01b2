//! What several kernels for NEON share.

#![allow(unsafe_code)]

use std::arch::aarch64::*;
use std::arch::asm;

use tandem_core::Float;

/// Adds to each 32-bit lane the products of its four signed bytes. The intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn sdot(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut result = sum;
    // SAFETY: reads and writes the named registers only.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) result, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    result
}

/// Element `index` of a row's scales or biases.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn param(float: Float, params: &[u8], index: usize) -> f32 {
    if float != Float::F16 {
        return float.read(params, index);
    }
    let bits = u16::from_le_bytes([params[2 * index], params[2 * index + 1]]);
    let mut value = f32::from_bits(u32::from(bits));
    // SAFETY: reads and writes the named register only. Every Armv8 converts from half precision.
    unsafe { asm!("fcvt {v:s}, {v:h}", v = inout(vreg) value, options(pure, nomem, nostack, preserves_flags)) };
    value
}

/// Four elements of a row's scales or biases.
///
/// # Safety
/// `p` points to four elements.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) unsafe fn params4(float: Float, p: *const u8) -> float32x4_t {
    // SAFETY: the caller has four elements at p; the conversion reads and writes the named registers only.
    unsafe {
        match float {
            Float::F32 => vld1q_f32(p.cast()),
            Float::BF16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))),
            Float::F16 => {
                let values: float32x4_t;
                asm!(
                    "fcvtl {values:v}.4s, {halves:v}.4h",
                    values = lateout(vreg) values, halves = in(vreg) vld1_u16(p.cast()),
                    options(pure, nomem, nostack, preserves_flags),
                );
                values
            }
        }
    }
}
