//! AVX2: a step reads 32 packed bytes, 64 codes, of each of up to four rows.

use std::arch::x86_64::*;

use tandem_core::DType;
use tandem_core::quant::minifloat::{E2M1, e8m0};

use super::super::activations::NIBBLE_BLOCK;
use super::super::avx2::{param, reduce};
use super::{ROWS, Rows};

/// Codes of one step.
const STEP: usize = 64;

impl Rows<'_> {
    /// 32 bytes of codes of row `row`, the second 16 zeros (code 0) when the row ends before them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_avx2(&self, row: usize, step: usize) -> __m256i {
        let codes = &self.codes[row][step * (STEP / 2)..];
        if codes.len() >= 32 {
            // SAFETY: 32 bytes are there.
            unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }
        } else {
            assert!(codes.len() >= 16);
            // SAFETY: 16 bytes are there.
            _mm256_zextsi128_si256(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) })
        }
    }

    /// Scales of a step's two groups of 32, four lanes each; 0 beyond the row's end.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn scale_avx2(&self, row: usize, step: usize) -> __m256 {
        let scales = self.scales[row];
        let group = 2 * step;
        let has_second = (group + 1) * 32 < self.cols;
        let (first, second) = match self.dtype {
            DType::Affine { group_size, params, .. } => {
                let shift = group_size.trailing_zeros() - 5;
                if shift > 0 {
                    return _mm256_set1_ps(param(params, scales, group >> shift));
                }
                (param(params, scales, group), if has_second { param(params, scales, group + 1) } else { 0.0 })
            }
            _ => (e8m0(scales[group]), if has_second { e8m0(scales[group + 1]) } else { 0.0 }),
        };
        _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first))
    }

    fn n_steps(&self) -> usize {
        self.cols.div_ceil(STEP)
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn f32_kernel(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    if rows.dtype == DType::Mxfp4 {
        // SAFETY: as the caller promises.
        unsafe { f32_codes::<true>(rows, x, out) }
    } else {
        // SAFETY: as the caller promises.
        unsafe { f32_codes::<false>(rows, x, out) }
    }
}

/// Values of the codes in the low four bits of each lane, whatever the other bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn decode<const E2M1_CODES: bool>(codes: __m256i, magnitudes: __m256) -> __m256 {
    if E2M1_CODES {
        // The permutation reads three bits; the fourth is the sign.
        let sign = _mm256_and_si256(_mm256_slli_epi32::<28>(codes), _mm256_set1_epi32(i32::MIN));
        _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, codes), _mm256_castsi256_ps(sign))
    } else {
        _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15)))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn f32_codes<const E2M1_CODES: bool>(rows: &Rows<'_>, x: &[f32], out: &mut [f32; ROWS]) {
    assert!(x.len() >= rows.n_blocks() * NIBBLE_BLOCK);
    // SAFETY: 8 floats and more.
    let magnitudes = unsafe { _mm256_loadu_ps(E2M1.as_ptr()) };
    let mut sums = [_mm256_setzero_ps(); ROWS];
    for step in 0..rows.n_steps() {
        // No closures here: they would be compiled without this function's instructions.
        let mut codes = [_mm256_setzero_si256(); ROWS];
        for (r, codes) in codes.iter_mut().enumerate() {
            *codes = rows.load_avx2(r, step);
        }
        let mut partial = [_mm256_setzero_ps(); ROWS];
        let start = step / 2 * NIBBLE_BLOCK + step % 2 * 8;
        for j in 0..8 {
            // SAFETY: within the block, whose length was checked above.
            let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(start + 16 * j)) };
            for r in 0..ROWS {
                partial[r] = _mm256_fmadd_ps(decode::<E2M1_CODES>(codes[r], magnitudes), x, partial[r]);
                codes[r] = _mm256_srli_epi32::<4>(codes[r]);
            }
        }
        for r in 0..ROWS {
            sums[r] = _mm256_fmadd_ps(partial[r], rows.scale_avx2(r, step), sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = reduce(sum);
    }
}

/// Codes become unsigned bytes: affine ones as they are, e2m1 as twice the value plus 12. At most 24, so four products
/// of them and signed bytes fit in 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn int8_kernel(
    rows: &Rows<'_>,
    (x, scales, lane_sums): (&[i8], &[f32], &[i32]),
    out: &mut [f32; ROWS],
) {
    let n_blocks = rows.n_blocks();
    assert!(x.len() >= n_blocks * NIBBLE_BLOCK && scales.len() >= n_blocks * 16 && lane_sums.len() >= n_blocks * 16);
    let (table, unit) = rows.int_table();
    let offset = -i32::from(table.into_iter().fold(0, i8::min));
    let table = table.map(|value| value + offset as i8);
    // SAFETY: 16 bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let (low, ones) = (_mm256_set1_epi8(0x0f), _mm256_set1_epi16(1));
    let (offset, unit) = (_mm256_set1_epi32(-offset), _mm256_set1_ps(unit));
    let mut sums = [_mm256_setzero_ps(); ROWS];
    for step in 0..rows.n_steps() {
        let start = step / 2 * NIBBLE_BLOCK + step % 2 * 32;
        // SAFETY: within the block, whose lengths were checked above.
        let (x_low, x_high, scale, lane_sum) = unsafe {
            (
                _mm256_loadu_si256(x.as_ptr().add(start).cast()),
                _mm256_loadu_si256(x.as_ptr().add(start + 64).cast()),
                _mm256_mul_ps(unit, _mm256_loadu_ps(scales.as_ptr().add(step * 8))),
                _mm256_loadu_si256(lane_sums.as_ptr().add(step * 8).cast()),
            )
        };
        let start = _mm256_mullo_epi32(lane_sum, offset);
        for r in 0..ROWS {
            let codes = rows.load_avx2(r, step);
            let even = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, low));
            let odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low));
            let pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, x_low), _mm256_maddubs_epi16(odd, x_high));
            let dot = _mm256_add_epi32(start, _mm256_madd_epi16(pairs, ones));
            let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale);
            sums[r] = _mm256_fmadd_ps(scaled, rows.scale_avx2(r, step), sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = reduce(sum);
    }
}
