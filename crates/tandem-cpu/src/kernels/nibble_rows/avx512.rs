//! AVX-512: a step reads 64 packed bytes, 128 codes, of each of up to four rows.
//!
//! All lanes that a group's codes fall into get the group's scale, so a scale costs one multiplication per step.

use std::arch::x86_64::*;

use tandem_core::DType;

use super::super::activations::NIBBLE_BLOCK;
use super::super::affine::{expand_scales, prefetch_next_rows, scales_pitch, spread};
use super::{ROWS, Rows};
use crate::scratch::with_scratch;

/// Calls `$kernel::<scales per block>` with the rows' expanded scales.
macro_rules! with_scales {
    ($rows:expr, $scales:ident, $kernel:ident ( $($arg:expr),* )) => {
        with_scratch(ROWS * scales_pitch($rows.dtype, $rows.cols), |$scales| {
            // SAFETY: the caller promises AVX-512 and what else the kernel needs.
            unsafe {
                expand_scales($rows.dtype, $rows.cols, &$rows.scales, $scales);
                match NIBBLE_BLOCK / $rows.dtype.group_size() {
                    1 => $kernel::<1>($($arg),*),
                    2 => $kernel::<2>($($arg),*),
                    _ => $kernel::<4>($($arg),*),
                }
            }
        })
    };
}

/// f32 products.
///
/// # Safety
/// The processor must have AVX-512.
pub(super) unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    with_scales!(rows, scales, f32_codes(rows, scales, x, out));
}

/// bf16 products, f32 sums; mxfp4 only.
///
/// # Safety
/// The processor must have AVX512-BF16.
pub(super) unsafe fn bf16_kernel(rows: &Rows<'_>, x: &[u16], out: &mut [f32; ROWS]) {
    with_scratch(ROWS * scales_pitch(rows.dtype, rows.cols), |scales| {
        // SAFETY: the caller's promise.
        unsafe {
            expand_scales(rows.dtype, rows.cols, &rows.scales, scales);
            bf16_codes(rows, scales, x, out);
        }
    });
}

/// Integer products per group of 32; `x` is integers, lane scales and lane sums.
///
/// # Safety
/// The processor must have AVX512-VNNI.
pub(super) unsafe fn int8_kernel(rows: &Rows<'_>, x: (&[i8], &[f32], &[i32]), out: &mut [f32; ROWS]) {
    with_scales!(rows, scales, int8_codes(rows, scales, x.0, x.1, x.2, out));
}

/// 64 bytes of codes, zeros (code 0) beyond the row's end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn load(codes: &[u8], block: usize) -> __m512i {
    let codes = &codes[block * (NIBBLE_BLOCK / 2)..];
    if codes.len() >= 64 {
        // SAFETY: 64 bytes are there.
        unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
    } else {
        // SAFETY: the mask covers the bytes that are there.
        unsafe { _mm512_maskz_loadu_epi8((1u64 << codes.len()) - 1, codes.as_ptr().cast()) }
    }
}

/// Blocks of a row and the pitch of its expanded scales; checks that activations and scales cover them.
fn blocks(rows: &Rows<'_>, x_len: usize, scales: &[f32]) -> (usize, usize) {
    let (n, pitch) = (rows.n_blocks(), scales_pitch(rows.dtype, rows.cols));
    assert!(x_len >= n * NIBBLE_BLOCK && scales.len() >= ROWS * pitch);
    (n, pitch)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn f32_codes<const PARTS: usize>(rows: &Rows<'_>, scales: &[f32], x: &[f32], out: &mut [f32; ROWS]) {
    let (n_blocks, pitch) = blocks(rows, x.len(), scales);
    // SAFETY: 16 floats.
    let table = unsafe { _mm512_loadu_ps(rows.table().as_ptr()) };
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        let mut codes = [_mm512_setzero_si512(); ROWS];
        for (r, codes) in codes.iter_mut().enumerate() {
            prefetch_next_rows(rows.codes[r], block * 64);
            *codes = load(rows.codes[r], block);
        }
        let mut partial = [_mm512_setzero_ps(); ROWS];
        for j in 0..8 {
            // SAFETY: within the block, whose length was checked above.
            let x = unsafe { _mm512_loadu_ps(x.as_ptr().add(block * NIBBLE_BLOCK + 16 * j)) };
            for r in 0..ROWS {
                // The permutation reads the low four bits of each lane only.
                partial[r] = _mm512_fmadd_ps(_mm512_permutexvar_ps(codes[r], table), x, partial[r]);
                codes[r] = _mm512_srli_epi32::<4>(codes[r]);
            }
        }
        for r in 0..ROWS {
            // SAFETY: scales have four readable floats for every block.
            let scale = unsafe { spread::<PARTS>(scales.as_ptr().add(r * pitch + block * PARTS)) };
            sums[r] = _mm512_fmadd_ps(partial[r], scale, sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn bf16_codes(rows: &Rows<'_>, scales: &[f32], x: &[u16], out: &mut [f32; ROWS]) {
    let (n_blocks, pitch) = blocks(rows, x.len(), scales);
    // Twice the 16 values: the permutation reads five bits, of which the fifth belongs to the next code.
    let values = rows.table();
    let mut table = [0u16; 32];
    for (i, entry) in table.iter_mut().enumerate() {
        *entry = half::bf16::from_f32(values[i % 16]).to_bits();
    }
    // SAFETY: 64 bytes.
    let table = unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        let mut codes = [_mm512_setzero_si512(); ROWS];
        for (r, codes) in codes.iter_mut().enumerate() {
            prefetch_next_rows(rows.codes[r], block * 64);
            *codes = load(rows.codes[r], block);
        }
        let mut partial = [_mm512_setzero_ps(); ROWS];
        for j in 0..4 {
            // SAFETY: within the block, whose length was checked above; the type is 64 bytes of bf16.
            let x: __m512bh = unsafe {
                std::mem::transmute(_mm512_loadu_si512(x.as_ptr().add(block * NIBBLE_BLOCK + 32 * j).cast()))
            };
            for r in 0..ROWS {
                let values = _mm512_permutexvar_epi16(codes[r], table);
                // SAFETY: both types are 512 bits of bf16.
                partial[r] =
                    _mm512_dpbf16_ps(partial[r], unsafe { std::mem::transmute::<__m512i, __m512bh>(values) }, x);
                codes[r] = _mm512_srli_epi16::<4>(codes[r]);
            }
        }
        for r in 0..ROWS {
            // SAFETY: scales have four readable floats for every block.
            let scale = unsafe { spread::<4>(scales.as_ptr().add(r * pitch + block * 4)) };
            sums[r] = _mm512_fmadd_ps(partial[r], scale, sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}

/// Codes become unsigned bytes: affine ones as they are, e2m1 as twice the value plus 12.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int8_codes<const PARTS: usize>(
    rows: &Rows<'_>,
    scales: &[f32],
    x: &[i8],
    x_scales: &[f32],
    lane_sums: &[i32],
    out: &mut [f32; ROWS],
) {
    let (n_blocks, pitch) = blocks(rows, x.len(), scales);
    assert!(x_scales.len() >= n_blocks * 16 && lane_sums.len() >= n_blocks * 16);
    let is_mx = rows.dtype == DType::Mxfp4;
    let offset = if is_mx { 12 } else { 0 };
    let unit = if is_mx { 2.0 } else { 1.0 };
    let values = rows.table();
    let mut table = [0i8; 16];
    for (entry, value) in table.iter_mut().zip(values) {
        *entry = (value * unit) as i8 + offset;
    }
    // SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let low = _mm512_set1_epi8(0x0f);
    let offset = _mm512_set1_epi32(-i32::from(offset));
    let unit = _mm512_set1_ps(1.0 / unit);
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        // SAFETY: within the block, whose lengths were checked above.
        let (x_low, x_high, x_scale, lane_sum) = unsafe {
            (
                _mm512_loadu_si512(x.as_ptr().add(block * NIBBLE_BLOCK).cast()),
                _mm512_loadu_si512(x.as_ptr().add(block * NIBBLE_BLOCK + 64).cast()),
                _mm512_mul_ps(unit, _mm512_loadu_ps(x_scales.as_ptr().add(block * 16))),
                _mm512_loadu_si512(lane_sums.as_ptr().add(block * 16).cast()),
            )
        };
        let start = _mm512_mullo_epi32(lane_sum, offset);
        for r in 0..ROWS {
            prefetch_next_rows(rows.codes[r], block * 64);
            let codes = load(rows.codes[r], block);
            let even = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low));
            let odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low));
            let dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, even, x_low), odd, x_high);
            // SAFETY: scales have four readable floats for every block.
            let scale = unsafe { spread::<PARTS>(scales.as_ptr().add(r * pitch + block * PARTS)) };
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(x_scale, scale), sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}
