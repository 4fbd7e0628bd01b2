//! Products of 4-bit matrices (mxfp4, affine 4) with one row of activations.
//!
//! Codes become values by a table look-up in a register and are multiplied with activations in the order that shifting
//! the packed words yields (see [`super::activations`]); a group's scale multiplies its sum of products. One file per
//! instruction set; this one checks lengths and adds what affine biases contribute.

#![allow(unsafe_code)]
// Rows index several arrays of registers at once.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "aarch64")]
mod neon;

use tandem_core::DType;
use tandem_core::quant::PackedView;
use tandem_core::quant::minifloat::E2M1;

use super::activations::{Activations, NIBBLE_BLOCK, SumsOf};
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
    let values = x.nibble_f32(token);
    match isa {
        // SAFETY: an `Isa` other than Scalar only exists on processors that have it; `Rows` checked the lengths. A processor with AVX-512 has AVX2 too.
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
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => unsafe { avx2::int8_kernel(&rows, x.nibble_q8(token), out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::int8_kernel(&rows, (x.nibble_q8(token).0, x.q8(token).scales), out) },
        _ => unreachable!("no row kernels for {isa}"),
    }
    rows.add_biases(isa, |group| x.sums(token, group, SumsOf::Int8), out);
}

impl Rows<'_> {
    /// Values of the 16 codes.
    fn table(&self) -> [f32; 16] {
        match self.dtype {
            DType::Affine { .. } => std::array::from_fn(|i| i as f32),
            _ => E2M1,
        }
    }

    fn n_blocks(&self) -> usize {
        self.cols.div_ceil(NIBBLE_BLOCK)
    }

    /// Integer values of the 16 codes, and what they count: units of 1 for affine, of 1/2 for e2m1.
    fn int_table(&self) -> ([i8; 16], f32) {
        let unit = if self.dtype == DType::Mxfp4 { 0.5 } else { 1.0 };
        (self.table().map(|value| (value / unit) as i8), unit)
    }
}
