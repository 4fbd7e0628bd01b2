//! Scales and biases of a few rows in vector registers (AVX-512).

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use tandem_core::quant::PackedView;
use tandem_core::{DType, Float};

/// Up to four rows of a matrix with scales, lengths checked.
pub(crate) struct Rows<'a> {
    /// Packed codes of each row; rows beyond `n` repeat the last.
    pub(crate) codes: [&'a [u8]; ROWS],
    scales: [&'a [u8]; ROWS],
    biases: [&'a [u8]; ROWS],
    n: usize,
    pub(crate) cols: usize,
    pub(crate) dtype: DType,
}

/// Rows that share the loads of the activations.
pub(crate) const ROWS: usize = 4;

impl<'a> Rows<'a> {
    pub(crate) fn new(matrix: &PackedView<'a>, first_row: usize, n: usize) -> Rows<'a> {
        assert!((1..=ROWS).contains(&n) && first_row + n <= matrix.rows && matrix.cols.is_multiple_of(32));
        let row = |bytes: &'a [u8], size: usize, i: usize| {
            let start = (first_row + i.min(n - 1)) * size;
            &bytes[start..start + size]
        };
        let (dtype, cols) = (matrix.dtype, matrix.cols);
        Rows {
            codes: std::array::from_fn(|i| row(matrix.weight, dtype.weight_bytes(1, cols), i)),
            scales: std::array::from_fn(|i| row(matrix.scales, dtype.scale_bytes(1, cols), i)),
            biases: std::array::from_fn(|i| row(matrix.biases, dtype.bias_bytes(1, cols), i)),
            n,
            cols,
            dtype,
        }
    }

    /// Floats that [`Rows::expand`] needs.
    pub(crate) fn scales_len(&self) -> usize {
        ROWS * self.scales_pitch()
    }

    /// Distance between rows of expanded scales: whole registers, and one to spare for reads beyond the end.
    pub(crate) fn scales_pitch(&self) -> usize {
        (self.cols / self.dtype.group_size()).next_multiple_of(16) + 16
    }

    /// Scales as f32, `[ROWS, scales_pitch]`, zeros beyond each row's end.
    pub(crate) fn expand(&self, out: &mut [f32]) {
        let pitch = self.scales_pitch();
        for (scales, out) in self.scales.iter().zip(out.chunks_exact_mut(pitch)) {
            out[pitch - 16..].fill(0.0);
            // SAFETY: only called by kernels chosen for AVX-512; `out` has whole registers for all scales.
            unsafe {
                match self.dtype {
                    DType::Affine { params, .. } => expand_params(params, scales, out),
                    _ => expand_e8m0(scales, out),
                }
            }
        }
    }

    /// `out[i] += sum_g biases[i][g] * sums[g]` for affine formats; `sums` gives the activations' sums per group.
    pub(crate) fn add_biases<'s>(&self, sums: impl Fn(usize) -> &'s [f32], out: &mut [f32; ROWS]) {
        if let DType::Affine { group_size, params, .. } = self.dtype {
            let sums = sums(group_size as usize);
            for (out, biases) in out.iter_mut().zip(&self.biases[..self.n]) {
                assert!(biases.len() >= sums.len() * params.bytes());
                // SAFETY: only called by kernels chosen for AVX-512; the lengths were just checked.
                *out += unsafe { bias_dot(params, biases, sums) };
            }
        }
    }
}

/// The scales of one block over the 32-bit lanes of its codes: 1, 2 or 4 equal parts.
///
/// # Safety
/// `scales` must point to 4 readable floats.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(crate) unsafe fn spread<const PARTS: usize>(scales: *const f32) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match PARTS {
            1 => _mm512_set1_ps(*scales),
            2 => {
                let pair = _mm512_castpd_ps(_mm512_set1_pd(scales.cast::<f64>().read_unaligned()));
                _mm512_permutevar_ps(pair, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1))
            }
            _ => {
                let four = _mm512_broadcast_f32x4(_mm_loadu_ps(scales));
                _mm512_permutevar_ps(four, _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3))
            }
        }
    }
}

/// Sixteen params of type `float` from `p`, as many as the mask names.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn load_params(float: Float, p: *const u8, mask: u16) -> __m512 {
    // SAFETY: the caller has the params that the mask names.
    unsafe {
        match float {
            Float::F32 => _mm512_maskz_loadu_ps(mask, p.cast()),
            Float::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())),
            Float::BF16 => {
                let half = _mm256_maskz_loadu_epi16(mask, p.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            }
        }
    }
}

fn mask(n: usize) -> u16 {
    if n >= 16 { u16::MAX } else { (1 << n) - 1 }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn expand_params(float: Float, params: &[u8], out: &mut [f32]) {
    let n = params.len() / float.bytes();
    for i in (0..n).step_by(16) {
        // SAFETY: the mask covers the params that are there; `out` is whole registers.
        unsafe {
            let values = load_params(float, params.as_ptr().add(i * float.bytes()), mask(n - i));
            _mm512_storeu_ps(out[i..i + 16].as_mut_ptr(), values);
        }
    }
}

/// e8m0 bytes as powers of two: byte 0 is the subnormal 2^-127, byte 255 infinity.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn expand_e8m0(bytes: &[u8], out: &mut [f32]) {
    for i in (0..bytes.len()).step_by(16) {
        let mask = mask(bytes.len() - i);
        // SAFETY: the mask covers the bytes that are there; `out` is whole registers.
        unsafe {
            let exponents = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes.as_ptr().add(i).cast()));
            let bits = _mm512_max_epu32(_mm512_slli_epi32::<23>(exponents), _mm512_set1_epi32(0x0040_0000));
            _mm512_storeu_ps(out[i..i + 16].as_mut_ptr(), _mm512_castsi512_ps(_mm512_maskz_mov_epi32(mask, bits)));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn bias_dot(float: Float, biases: &[u8], sums: &[f32]) -> f32 {
    let mut total = _mm512_setzero_ps();
    for (chunk, sums) in sums.chunks(16).enumerate() {
        let mask = mask(sums.len());
        // SAFETY: the mask covers the sums that are there, and there is a bias for each.
        unsafe {
            let bias = load_params(float, biases.as_ptr().add(chunk * 16 * float.bytes()), mask);
            total = _mm512_fmadd_ps(bias, _mm512_maskz_loadu_ps(mask, sums.as_ptr()), total);
        }
    }
    _mm512_reduce_add_ps(total)
}
