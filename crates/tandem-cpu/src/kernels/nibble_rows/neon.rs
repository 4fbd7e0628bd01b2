//! NEON: a step reads 16 packed bytes, a group of 32 codes, of each of up to four rows.

use std::arch::aarch64::*;

use tandem_core::DType;
use tandem_core::quant::minifloat::e8m0;

use super::super::activations::{NIBBLE_BLOCK, Q8_GROUP};
use super::super::neon::{param, sdot};
use super::{ROWS, Rows};

impl Rows<'_> {
    /// Scale of the 32 codes from `32 * group` on.
    #[inline]
    #[target_feature(enable = "neon")]
    fn scale_neon(&self, row: usize, group: usize) -> f32 {
        match self.dtype {
            DType::Affine { group_size, params, .. } => {
                param(params, self.scales[row], group >> (group_size.trailing_zeros() - 5))
            }
            _ => e8m0(self.scales[row][group]),
        }
    }
}

#[target_feature(enable = "neon")]
pub(super) unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    assert!(x.len() >= rows.n_blocks() * NIBBLE_BLOCK);
    // The upper 16 bits of a value, the only ones that are not 0, come from two tables of bytes.
    let (third, fourth) =
        (rows.table().map(|v| (v.to_bits() >> 16) as u8), rows.table().map(|v| v.to_bits().to_be_bytes()[0]));
    // Byte b of word w to position 4 b + w.
    let transpose: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
    // SAFETY: 16 bytes each.
    let (third, fourth, transpose) =
        unsafe { (vld1q_u8(third.as_ptr()), vld1q_u8(fourth.as_ptr()), vld1q_u8(transpose.as_ptr())) };
    let low = vdupq_n_u8(0x0f);
    let mut sums = [vdupq_n_f32(0.0); ROWS];
    for group in 0..rows.cols / Q8_GROUP {
        let start = group / 4 * NIBBLE_BLOCK + group % 4 * 4;
        // No closures here: they would be compiled without this function's instructions.
        let mut values = [vdupq_n_f32(0.0); 8];
        for (j, values) in values.iter_mut().enumerate() {
            // SAFETY: within the block, whose length was checked above.
            *values = unsafe { vld1q_f32(x.as_ptr().add(start + 16 * j)) };
        }
        for r in 0..ROWS {
            // SAFETY: a row has 16 bytes per group.
            let codes = unsafe { vld1q_u8(rows.codes[r][16 * group..].as_ptr()) };
            // Nibble j of word w is element 8 w + j; here nibbles 0, 2, 4, 6 of the four words, then 1, 3, 5, 7.
            let codes = vqtbl1q_u8(codes, transpose);
            let mut partial = [vdupq_n_f32(0.0); 2];
            for (odd, partial) in partial.iter_mut().enumerate() {
                let codes = if odd == 0 { vandq_u8(codes, low) } else { vshrq_n_u8::<4>(codes) };
                let (third, fourth) = (vqtbl1q_u8(third, codes), vqtbl1q_u8(fourth, codes));
                let first = vreinterpretq_u16_u8(vzip1q_u8(third, fourth));
                let second = vreinterpretq_u16_u8(vzip2q_u8(third, fourth));
                let decoded = [
                    vshll_n_u16::<16>(vget_low_u16(first)),
                    vshll_high_n_u16::<16>(first),
                    vshll_n_u16::<16>(vget_low_u16(second)),
                    vshll_high_n_u16::<16>(second),
                ];
                for (i, decoded) in decoded.into_iter().enumerate() {
                    *partial = vfmaq_f32(*partial, vreinterpretq_f32_u32(decoded), values[2 * i + odd]);
                }
            }
            sums[r] = vfmaq_n_f32(sums[r], vaddq_f32(partial[0], partial[1]), rows.scale_neon(r, group));
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = vaddvq_f32(sum);
    }
}

/// Codes become signed bytes: affine ones as they are, e2m1 as twice the value.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn int8_kernel(rows: &Rows<'_>, (x, scales): (&[i8], &[f32]), out: &mut [f32; ROWS]) {
    let n_groups = rows.cols / Q8_GROUP;
    assert!(x.len() >= rows.n_blocks() * NIBBLE_BLOCK && scales.len() >= n_groups);
    let (table, unit) = rows.int_table();
    // SAFETY: 16 bytes.
    let table = unsafe { vld1q_s8(table.as_ptr()) };
    let low = vdupq_n_u8(0x0f);
    let mut sums = [vdupq_n_f32(0.0); ROWS];
    for (group, scale) in scales[..n_groups].iter().enumerate() {
        let start = group / 4 * NIBBLE_BLOCK + group % 4 * 16;
        // SAFETY: within the block, whose length was checked above.
        let (x_low, x_high) =
            unsafe { (vld1q_s8(x.as_ptr().add(start)), vld1q_s8(x.as_ptr().add(start + NIBBLE_BLOCK / 2))) };
        for r in 0..ROWS {
            // SAFETY: a row has 16 bytes per group.
            let codes = unsafe { vld1q_u8(rows.codes[r][16 * group..].as_ptr()) };
            let even = vqtbl1q_s8(table, vandq_u8(codes, low));
            let odd = vqtbl1q_s8(table, vshrq_n_u8::<4>(codes));
            let dot = vcvtq_f32_s32(sdot(sdot(vdupq_n_s32(0), even, x_low), odd, x_high));
            sums[r] = vfmaq_n_f32(sums[r], vmulq_n_f32(dot, scale * unit), rows.scale_neon(r, group));
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = vaddvq_f32(sum);
    }
}
