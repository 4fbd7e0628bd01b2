//! AVX-512: a step reads 64 packed bytes, 128 codes, of each of up to four rows; all lanes that a group's codes fall
//! into get the group's scale, so a scale costs one multiplication per step.

use std::arch::x86_64::*;

use tandem_core::DType;

use super::super::activations::NIBBLE_BLOCK;
use super::super::affine::spread_params;
use super::{ROWS, Rows};

impl Rows<'_> {
    /// 64 bytes of codes of row `row`, zeros (code 0) beyond its end.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn load(&self, row: usize, block: usize) -> __m512i {
        let start = block * (NIBBLE_BLOCK / 2);
        let codes = &self.codes[row][start..];
        if codes.len() >= 64 {
            // SAFETY: 64 bytes are there.
            unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
        } else {
            // SAFETY: the mask covers the bytes that are there.
            unsafe { _mm512_maskz_loadu_epi8((1u64 << codes.len()) - 1, codes.as_ptr().cast()) }
        }
    }

    /// Scales of a block's groups, spread over the 32-bit lanes of their codes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn scale(&self, row: usize, block: usize) -> __m512 {
        match self.dtype {
            DType::Affine { group_size, params, .. } => {
                spread_params(params, self.scales[row], group_size as usize, block, NIBBLE_BLOCK)
            }
            _ => e8m0_lanes(&self.scales[row][block * 4..]),
        }
    }
}

/// Up to four e8m0 bytes as powers of two, four lanes each. Byte 0 is the subnormal 2^-127, byte 255 infinity.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn e8m0_lanes(bytes: &[u8]) -> __m512 {
    let word = match bytes {
        [a, b, c, d, ..] => u32::from_le_bytes([*a, *b, *c, *d]),
        short => short.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)),
    };
    let spread =
        _mm_shuffle_epi8(_mm_cvtsi32_si128(word as i32), _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
    let exponent = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(spread));
    _mm512_castsi512_ps(_mm512_max_epu32(exponent, _mm512_set1_epi32(0x0040_0000)))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    assert!(x.len() >= rows.n_blocks() * NIBBLE_BLOCK);
    // SAFETY: 16 floats.
    let table = unsafe { _mm512_loadu_ps(rows.table().as_ptr()) };
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..rows.n_blocks() {
        // No closures here: they would be compiled without this function's instructions.
        let mut codes = [_mm512_setzero_si512(); ROWS];
        for (r, codes) in codes.iter_mut().enumerate() {
            *codes = rows.load(r, block);
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
            sums[r] = _mm512_fmadd_ps(partial[r], rows.scale(r, block), sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn bf16_kernel(rows: &Rows<'_>, x: &[u16], out: &mut [f32; ROWS]) {
    assert!(x.len() >= rows.n_blocks() * NIBBLE_BLOCK);
    // Twice the 16 values: the permutation reads five bits, of which the fifth belongs to the next code.
    let table: [u16; 32] = std::array::from_fn(|i| half::bf16::from_f32(rows.table()[i % 16]).to_bits());
    // SAFETY: 64 bytes.
    let table = unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..rows.n_blocks() {
        // No closures here: they would be compiled without this function's instructions.
        let mut codes = [_mm512_setzero_si512(); ROWS];
        for (r, codes) in codes.iter_mut().enumerate() {
            *codes = rows.load(r, block);
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
                partial[r] = _mm512_dpbf16_ps(partial[r], unsafe { std::mem::transmute(values) }, x);
                codes[r] = _mm512_srli_epi16::<4>(codes[r]);
            }
        }
        for r in 0..ROWS {
            sums[r] = _mm512_fmadd_ps(partial[r], rows.scale(r, block), sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}

/// Codes become unsigned bytes: affine ones as they are, e2m1 as twice the value plus 12.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn int8_kernel(
    rows: &Rows<'_>,
    (x, scales, lane_sums): (&[i8], &[f32], &[i32]),
    out: &mut [f32; ROWS],
) {
    let n_blocks = rows.n_blocks();
    assert!(x.len() >= n_blocks * NIBBLE_BLOCK && scales.len() >= n_blocks * 16 && lane_sums.len() >= n_blocks * 16);
    let is_mx = rows.dtype == DType::Mxfp4;
    let offset = if is_mx { 12 } else { 0 };
    let unit = if is_mx { 2.0 } else { 1.0 };
    let table: [i8; 16] = std::array::from_fn(|i| (rows.table()[i] * unit) as i8 + offset);
    // SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let low = _mm512_set1_epi8(0x0f);
    let offset = _mm512_set1_epi32(-i32::from(offset));
    let unit = _mm512_set1_ps(1.0 / unit);
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..n_blocks {
        // SAFETY: within the block, whose lengths were checked above.
        let (x_low, x_high, scale, lane_sum) = unsafe {
            (
                _mm512_loadu_si512(x.as_ptr().add(block * NIBBLE_BLOCK).cast()),
                _mm512_loadu_si512(x.as_ptr().add(block * NIBBLE_BLOCK + 64).cast()),
                _mm512_mul_ps(unit, _mm512_loadu_ps(scales.as_ptr().add(block * 16))),
                _mm512_loadu_si512(lane_sums.as_ptr().add(block * 16).cast()),
            )
        };
        let start = _mm512_mullo_epi32(lane_sum, offset);
        for r in 0..ROWS {
            let codes = rows.load(r, block);
            let even = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low));
            let odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low));
            let dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, even, x_low), odd, x_high);
            let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale);
            sums[r] = _mm512_fmadd_ps(scaled, rows.scale(r, block), sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = _mm512_reduce_add_ps(sum);
    }
}
