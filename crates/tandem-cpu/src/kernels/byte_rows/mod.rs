//! Products of affine 8-bit matrices with one row of activations.
//!
//! `y = sum_g scale_g * (q_g . x_g) + sum_g bias_g * sum(x_g)`: codes are read once, and the second sum needs only the
//! sums of the activations' groups, which all rows share. One file per instruction set; this one checks lengths and
//! adds the second sum.

#![allow(unsafe_code)]
// Rows index several arrays of registers at once.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "aarch64")]
mod neon;

use tandem_core::quant::PackedView;
use tandem_core::{DType, Float};

use super::activations::Activations;
use super::affine::bias_dot;
use crate::isa::Isa;

const ROWS: usize = 4;

/// f32 products. `out[i] = matrix[first_row + i] . x[token]` for `n_rows` (at most 4) rows.
pub(crate) fn f32_rows(
    isa: Isa,
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    token: usize,
    out: &mut [f32; ROWS],
) {
    let rows = Rows::new(matrix, first_row, n_rows);
    let values = x.row(token);
    match isa {
        // SAFETY: an `Isa` other than Scalar only exists on processors that have it; `Rows` checked the lengths. A
        // processor with AVX-512 has AVX2 too.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { avx2::f32_kernel(&rows, values, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::f32_kernel(&rows, values, out) },
        _ => unreachable!("no row kernels for {isa}"),
    }
    rows.add_biases(isa, x.sums(token, rows.group_size, false), out);
}

/// Integer products per group of 32.
pub(crate) fn int8_rows(
    isa: Isa,
    matrix: &PackedView<'_>,
    first_row: usize,
    n_rows: usize,
    x: &Activations,
    token: usize,
    out: &mut [f32; ROWS],
) {
    let rows = Rows::new(matrix, first_row, n_rows);
    match isa {
        // SAFETY: as in `f32_rows`; the kernel was chosen because `Isa::has_int8_dot`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { avx2::int8_kernel(&rows, x.byte_q8(token).0, x.q8_groups(token).0, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::int8_kernel(&rows, x.byte_q8(token).0, x.q8_groups(token), out) },
        _ => unreachable!("no row kernels for {isa}"),
    }
    rows.add_biases(isa, x.sums(token, rows.group_size, true), out);
}

/// Up to four rows of an affine 8-bit matrix, lengths checked.
struct Rows<'a> {
    /// Codes of each row; rows beyond `n` repeat the last.
    codes: [&'a [u8]; ROWS],
    scales: [&'a [u8]; ROWS],
    biases: [&'a [u8]; ROWS],
    n: usize,
    cols: usize,
    group_size: usize,
    params: Float,
}

impl<'a> Rows<'a> {
    fn new(matrix: &PackedView<'a>, first_row: usize, n: usize) -> Rows<'a> {
        let DType::Affine { bits: 8, group_size, params } = matrix.dtype else {
            unreachable!("chosen for affine 8-bit matrices only")
        };
        assert!((1..=ROWS).contains(&n) && first_row + n <= matrix.rows && matrix.cols.is_multiple_of(32));
        let row = |bytes: &'a [u8], size: usize, i: usize| {
            let start = (first_row + i.min(n - 1)) * size;
            &bytes[start..start + size]
        };
        let param_bytes = matrix.dtype.scale_bytes(1, matrix.cols);
        Rows {
            codes: std::array::from_fn(|i| row(matrix.weight, matrix.cols, i)),
            scales: std::array::from_fn(|i| row(matrix.scales, param_bytes, i)),
            biases: std::array::from_fn(|i| row(matrix.biases, param_bytes, i)),
            n,
            cols: matrix.cols,
            group_size: group_size as usize,
            params,
        }
    }

    fn add_biases(&self, isa: Isa, sums: &[f32], out: &mut [f32; ROWS]) {
        for (out, biases) in out.iter_mut().zip(&self.biases[..self.n]) {
            *out += bias_dot(isa, self.params, biases, sums);
        }
    }
}
