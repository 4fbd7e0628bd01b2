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

use super::activations::{Activations, SumsOf};
use super::rows::{ROWS, Rows};
use crate::isa::Isa;

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
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => unsafe { avx2::f32_kernel(&rows, values, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::f32_kernel(&rows, values, out) },
        _ => unreachable!("no row kernels for {isa}"),
    }
    rows.add_biases(isa, |group| x.sums(token, group, SumsOf::Plain), out);
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
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => unsafe {
            avx2::int8_kernel(&rows, x.byte_q8(token).0, x.q8(token).scales, out)
        },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe {
            neon::int8_kernel(&rows, x.byte_q8(token).0, (x.q8(token).scales, x.q8(token).group_sums), out)
        },
        _ => unreachable!("no row kernels for {isa}"),
    }
    rows.add_biases(isa, |group| x.sums(token, group, SumsOf::Int8), out);
}
