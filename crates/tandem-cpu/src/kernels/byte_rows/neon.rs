//! NEON: a step takes 16 (f32) or 32 (int8) columns of each of up to four rows.

use std::arch::aarch64::*;

use super::super::activations::Q8_GROUP;
use super::super::neon::{param, sdot};
use super::{ROWS, Rows};

#[target_feature(enable = "neon")]
pub(super) unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    let (group_size, params) = rows.affine();
    assert!(x.len() >= rows.cols);
    let mut sums = [vdupq_n_f32(0.0); ROWS];
    for group in 0..rows.cols / group_size {
        let mut partial = [vdupq_n_f32(0.0); ROWS];
        let start = group * group_size;
        for k in (start..start + group_size).step_by(16) {
            // No closures here: they would be compiled without this function's instructions.
            let mut values = [vdupq_n_f32(0.0); 4];
            for (i, values) in values.iter_mut().enumerate() {
                // SAFETY: k + 16 <= cols.
                *values = unsafe { vld1q_f32(x.as_ptr().add(k + 4 * i)) };
            }
            for r in 0..ROWS {
                // SAFETY: k + 16 <= cols, and every row has cols codes.
                let codes = unsafe { vld1q_u8(rows.codes[r].as_ptr().add(k)) };
                let (first, second) = (vmovl_u8(vget_low_u8(codes)), vmovl_high_u8(codes));
                let wide = [
                    vmovl_u16(vget_low_u16(first)),
                    vmovl_high_u16(first),
                    vmovl_u16(vget_low_u16(second)),
                    vmovl_high_u16(second),
                ];
                for (wide, values) in wide.into_iter().zip(values) {
                    partial[r] = vfmaq_f32(partial[r], vcvtq_f32_u32(wide), values);
                }
            }
        }
        for r in 0..ROWS {
            sums[r] = vfmaq_n_f32(sums[r], partial[r], param(params, rows.scales[r], group));
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = vaddvq_f32(sum);
    }
}

/// Codes become signed by subtracting 128; the sums of the activations' groups make up for it.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn int8_kernel(
    rows: &Rows<'_>,
    x: &[i8],
    (group_scales, group_sums): (&[f32], &[i32]),
    out: &mut [f32; ROWS],
) {
    let (group_size, params) = rows.affine();
    let n_groups = rows.cols / Q8_GROUP;
    assert!(x.len() >= rows.cols && group_scales.len() >= n_groups && group_sums.len() >= n_groups);
    let shift = group_size.trailing_zeros() - Q8_GROUP.trailing_zeros();
    let sign = vdupq_n_u8(0x80);
    let mut sums = [vdupq_n_f32(0.0); ROWS];
    for group in 0..n_groups {
        let k = group * Q8_GROUP;
        let offset = vsetq_lane_s32::<0>(128 * group_sums[group], vdupq_n_s32(0));
        // SAFETY: k + 32 <= cols.
        let (first, second) = unsafe { (vld1q_s8(x.as_ptr().add(k)), vld1q_s8(x.as_ptr().add(k + 16))) };
        for r in 0..ROWS {
            // SAFETY: k + 32 <= cols, and every row has cols codes.
            let (a, b) = unsafe {
                let codes = rows.codes[r].as_ptr().add(k);
                (vld1q_u8(codes), vld1q_u8(codes.add(16)))
            };
            let dot = sdot(offset, vreinterpretq_s8_u8(veorq_u8(a, sign)), first);
            let dot = sdot(dot, vreinterpretq_s8_u8(veorq_u8(b, sign)), second);
            let scale = group_scales[group] * param(params, rows.scales[r], group >> shift);
            sums[r] = vfmaq_n_f32(sums[r], vcvtq_f32_s32(dot), scale);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = vaddvq_f32(sum);
    }
}
