//! Activations in the forms that matrix kernels read: plain, rounded, quantised, and reordered to match packed weights.

use tandem_core::{DType, Numerics};

use crate::isa::Isa;
use crate::matrix::CpuMatrix;
use crate::pool::Pool;
use crate::shared_mut::SharedMut;

/// Elements per scale of 8-bit activations.
pub const Q8_GROUP: usize = 32;
/// Elements of one step of the kernels for 4-bit weights: 64 packed bytes.
pub const NIBBLE_BLOCK: usize = 128;
/// Elements of one step of the kernels for 8-bit weights.
pub const BYTE_BLOCK: usize = 64;

/// Which kernel family multiplies a matrix, decided by its layout, its format, the numerics and the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Decode each row to f32, then a dot product: any format on any processor.
    Generic,
    /// 4-bit codes, f32 products.
    NibbleF32,
    /// 4-bit codes, integer products.
    NibbleInt8,
    /// 8-bit codes, f32 products.
    ByteF32,
    /// 8-bit codes, integer products.
    ByteInt8,
    /// Tiles.
    #[cfg(target_arch = "x86_64")]
    Tiles(super::tile_rows::Operand),
}

impl Kernel {
    pub(crate) fn choose(matrix: &CpuMatrix, numerics: Numerics, isa: Isa) -> Kernel {
        let dtype = matrix.dtype();
        if isa == Isa::Scalar {
            return Kernel::Generic;
        }
        #[cfg(target_arch = "x86_64")]
        if let CpuMatrix::Tiled(_) = matrix {
            return Kernel::Tiles(super::tile_rows::Operand::choose(dtype, numerics, isa));
        }
        let int8 = numerics == Numerics::Int8 && isa.has_int8_dot();
        match dtype {
            DType::Mxfp4 | DType::Affine { bits: 4, .. } if int8 => Kernel::NibbleInt8,
            DType::Mxfp4 | DType::Affine { bits: 4, .. } => Kernel::NibbleF32,
            DType::Affine { bits: 8, .. } if int8 => Kernel::ByteInt8,
            DType::Affine { bits: 8, .. } => Kernel::ByteF32,
            _ => Kernel::Generic,
        }
    }

    /// The forms of the activations that this kernel reads for a matrix of this format.
    fn forms(self, dtype: DType) -> Forms {
        let mut forms = Forms::default();
        match self {
            Kernel::Generic | Kernel::ByteF32 => {}
            Kernel::NibbleF32 => forms.nibble_f32 = true,
            Kernel::NibbleInt8 => forms.nibble_q8 = true,
            Kernel::ByteInt8 => forms.q8 = true,
            #[cfg(target_arch = "x86_64")]
            Kernel::Tiles(operand) => match operand {
                super::tile_rows::Operand::Int8 => forms.q8 = true,
                super::tile_rows::Operand::Bf16 => forms.pairs_bf16 = true,
                super::tile_rows::Operand::F32 => {}
            },
        }
        if let DType::Affine { group_size, .. } = dtype {
            forms.sums[group_size.trailing_zeros() as usize - 5] = true;
        }
        forms
    }
}

/// Forms of activations, see the fields of [`Activations`].
#[derive(Clone, Copy, Debug, Default)]
struct Forms {
    sums: [bool; 3],
    nibble_f32: bool,
    nibble_q8: bool,
    q8: bool,
    pairs_bf16: bool,
}

impl Forms {
    fn or(self, other: Forms) -> Forms {
        Forms {
            sums: std::array::from_fn(|i| self.sums[i] || other.sums[i]),
            nibble_f32: self.nibble_f32 || other.nibble_f32,
            nibble_q8: self.nibble_q8 || other.nibble_q8,
            q8: self.q8 || other.q8,
            pairs_bf16: self.pairs_bf16 || other.pairs_bf16,
        }
    }
}

/// Activations of one operation, `[n_rows, width]`, in the forms that its matrices need. Memory is kept between uses.
#[derive(Debug, Default)]
pub struct Activations {
    width: usize,
    /// `[n_rows, width]`
    plain: Vec<f32>,
    /// Sums per 32, 64 and 128 elements (what affine biases multiply), `[n_rows, width / group]` each.
    sums: [Vec<f32>; 3],
    /// Sums of the 8-bit form, likewise.
    q8_sums: [Vec<f32>; 3],
    /// `[n_rows, blocks * 128]`, element `8 i + j` of a block at `16 j + i`.
    nibble_f32: Vec<f32>,
    /// `[n_rows, blocks * 128]`, element `2 m + j` of a block at `64 j + m`.
    nibble_q8: Vec<i8>,
    /// Scale of each 32-bit lane of a 128-block, `[n_rows, blocks * 16]`.
    nibble_scales: Vec<f32>,
    /// Sum of the 8 integers of each lane, `[n_rows, blocks * 16]`.
    nibble_lane_sums: Vec<i32>,
    /// `[n_rows, blocks * 64]`
    q8: Vec<i8>,
    /// Scale of each 32-bit lane of a 64-block, `[n_rows, blocks * 16]`.
    byte_scales: Vec<f32>,
    /// `[n_rows, blocks * 8]`, the even ones of eight elements before the odd ones.
    pairs_bf16: Vec<u16>,
    /// Scale and sum of the integers of each group of 32, `[n_rows, groups]`.
    q8_scales: Vec<f32>,
    q8_group_sums: Vec<i32>,
}

impl Activations {
    /// Takes `x [n_rows, width]` in the forms that `kernels` (each with the format of its matrix) read; many rows are
    /// shared out over `pool`.
    pub(crate) fn prepare<'a>(
        &mut self,
        pool: Option<&Pool>,
        isa: Isa,
        n_rows: usize,
        row: impl Fn(usize) -> &'a [f32] + Sync,
        width: usize,
        kernels: impl Iterator<Item = (Kernel, DType)>,
    ) {
        self.width = width;
        let forms = kernels.fold(Forms::default(), |forms, (kernel, dtype)| forms.or(kernel.forms(dtype)));
        let quantized = forms.nibble_q8 || forms.q8;
        let lengths = |wanted: bool, per_row: usize| if wanted { n_rows * per_row } else { 0 };
        let nibbles = width.div_ceil(NIBBLE_BLOCK) * NIBBLE_BLOCK;
        let bytes = width.div_ceil(BYTE_BLOCK) * BYTE_BLOCK;
        let groups = width.div_ceil(Q8_GROUP);
        self.plain.resize(n_rows * width, 0.0);
        for i in 0..3 {
            self.sums[i].resize(lengths(forms.sums[i], width / (32 << i)), 0.0);
            self.q8_sums[i].resize(lengths(forms.sums[i] && quantized, width / (32 << i)), 0.0);
        }
        self.nibble_f32.resize(lengths(forms.nibble_f32, nibbles), 0.0);
        self.pairs_bf16.resize(lengths(forms.pairs_bf16, width.next_multiple_of(8)), 0);
        self.nibble_q8.resize(lengths(forms.nibble_q8, nibbles), 0);
        self.nibble_scales.resize(lengths(forms.nibble_q8, nibbles / 8), 0.0);
        self.nibble_lane_sums.resize(lengths(forms.nibble_q8, nibbles / 8), 0);
        self.q8.resize(lengths(forms.q8, bytes), 0);
        self.byte_scales.resize(lengths(forms.q8, bytes / 4), 0.0);
        self.q8_scales.resize(lengths(quantized, groups), 0.0);
        self.q8_group_sums.resize(lengths(quantized, groups), 0);

        let shared = Shared {
            width,
            plain: SharedMut::new(&mut self.plain),
            sums: self.sums.each_mut().map(|v| SharedMut::new(v)),
            q8_sums: self.q8_sums.each_mut().map(|v| SharedMut::new(v)),
            nibble_f32: SharedMut::new(&mut self.nibble_f32),
            pairs_bf16: SharedMut::new(&mut self.pairs_bf16),
            nibble_q8: SharedMut::new(&mut self.nibble_q8),
            nibble_scales: SharedMut::new(&mut self.nibble_scales),
            nibble_lane_sums: SharedMut::new(&mut self.nibble_lane_sums),
            q8: SharedMut::new(&mut self.q8),
            byte_scales: SharedMut::new(&mut self.byte_scales),
            q8_scales: SharedMut::new(&mut self.q8_scales),
            q8_group_sums: SharedMut::new(&mut self.q8_group_sums),
        };
        let fill = |range: std::ops::Range<usize>| {
            for r in range {
                shared.fill(isa, forms, r, n_rows, row(r));
            }
        };
        match pool {
            Some(pool) => pool.chunks(n_rows, n_rows.div_ceil(8 * pool.n_threads()), fill),
            None => fill(0..n_rows),
        }
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.plain[row * self.width..(row + 1) * self.width]
    }

    /// Sums per `group` elements of `row`.
    pub(crate) fn sums(&self, row: usize, group: usize, int8: bool) -> &[f32] {
        let all = if int8 { &self.q8_sums } else { &self.sums };
        let n = self.width / group;
        &all[group.trailing_zeros() as usize - 5][row * n..(row + 1) * n]
    }

    pub(crate) fn nibble_f32(&self, row: usize) -> &[f32] {
        block_row(&self.nibble_f32, row, self.width, NIBBLE_BLOCK, NIBBLE_BLOCK)
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn pairs_bf16(&self, row: usize) -> &[u16] {
        block_row(&self.pairs_bf16, row, self.width, 8, 8)
    }

    /// Integers in order.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn q8(&self, row: usize) -> &[i8] {
        block_row(&self.q8, row, self.width, BYTE_BLOCK, BYTE_BLOCK)
    }

    /// Scales and integer sums of the groups of 32.
    pub(crate) fn q8_groups(&self, row: usize) -> (&[f32], &[i32]) {
        (
            block_row(&self.q8_scales, row, self.width, Q8_GROUP, 1),
            block_row(&self.q8_group_sums, row, self.width, Q8_GROUP, 1),
        )
    }

    /// Integers, lane scales and lane sums.
    pub(crate) fn nibble_q8(&self, row: usize) -> (&[i8], &[f32], &[i32]) {
        (
            block_row(&self.nibble_q8, row, self.width, NIBBLE_BLOCK, NIBBLE_BLOCK),
            block_row(&self.nibble_scales, row, self.width, NIBBLE_BLOCK, 16),
            block_row(&self.nibble_lane_sums, row, self.width, NIBBLE_BLOCK, 16),
        )
    }

    /// Integers and lane scales.
    pub(crate) fn byte_q8(&self, row: usize) -> (&[i8], &[f32]) {
        (
            block_row(&self.q8, row, self.width, BYTE_BLOCK, BYTE_BLOCK),
            block_row(&self.byte_scales, row, self.width, BYTE_BLOCK, 16),
        )
    }
}

/// Row `row` of data that has `per_block` entries for each block of `block` elements.
fn block_row<T>(data: &[T], row: usize, width: usize, block: usize, per_block: usize) -> &[T] {
    let n = width.div_ceil(block) * per_block;
    &data[row * n..(row + 1) * n]
}

/// The forms being filled, each row by one worker.
struct Shared<'a> {
    width: usize,
    plain: SharedMut<'a, f32>,
    sums: [SharedMut<'a, f32>; 3],
    q8_sums: [SharedMut<'a, f32>; 3],
    nibble_f32: SharedMut<'a, f32>,
    pairs_bf16: SharedMut<'a, u16>,
    nibble_q8: SharedMut<'a, i8>,
    nibble_scales: SharedMut<'a, f32>,
    nibble_lane_sums: SharedMut<'a, i32>,
    q8: SharedMut<'a, i8>,
    byte_scales: SharedMut<'a, f32>,
    q8_scales: SharedMut<'a, f32>,
    q8_group_sums: SharedMut<'a, i32>,
}

impl Shared<'_> {
    #[allow(unsafe_code)]
    fn fill(&self, isa: Isa, forms: Forms, row: usize, n_rows: usize, x: &[f32]) {
        match isa {
            // SAFETY: the ISA is only available on processors that have it.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { self.fill_avx512(forms, row, n_rows, x) },
            _ => self.fill_row(forms, row, n_rows, x),
        }
    }

    /// The same loops, compiled for AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn fill_avx512(&self, forms: Forms, row: usize, n_rows: usize, x: &[f32]) {
        self.fill_row(forms, row, n_rows, x);
    }

    #[inline(always)]
    fn fill_row(&self, forms: Forms, row: usize, n_rows: usize, x: &[f32]) {
        assert_eq!(x.len(), self.width);
        own(&self.plain, row, n_rows).copy_from_slice(x);
        for (i, sums) in self.sums.iter().enumerate() {
            for (sum, values) in own(sums, row, n_rows).iter_mut().zip(x.chunks_exact(32 << i)) {
                *sum = sum_of(values);
            }
        }
        if forms.nibble_f32 {
            reorder::<8, _, _>(x, NIBBLE_BLOCK, own(&self.nibble_f32, row, n_rows), |v| v);
        }
        if forms.pairs_bf16 {
            reorder::<2, _, _>(x, 8, own(&self.pairs_bf16, row, n_rows), bf16_bits);
        }
        if !forms.nibble_q8 && !forms.q8 {
            return;
        }
        let (scales, sums) = (own(&self.q8_scales, row, n_rows), own(&self.q8_group_sums, row, n_rows));
        // Blocks of bytes are in order, so they hold the integers until nibbles are made of them.
        let mut codes = [0i8; NIBBLE_BLOCK];
        for (b, block) in x.chunks(NIBBLE_BLOCK).enumerate() {
            codes.fill(0);
            for (g, group) in block.chunks(Q8_GROUP).enumerate() {
                let largest = group.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
                let largest = f32::from_bits(largest);
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                let mut total = 0i32;
                for (code, v) in codes[g * Q8_GROUP..].iter_mut().zip(group) {
                    // Adding 1.5 * 2^23 leaves the value rounded to nearest even in the low bits.
                    let q = (v * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
                    *code = q as i8;
                    // NaN, which the scale carries on, leaves bits that are no integer of this size.
                    total += i32::from(*code);
                }
                scales[b * 4 + g] = largest / 127.0;
                sums[b * 4 + g] = total;
            }
            if forms.nibble_q8 {
                let out = &mut own(&self.nibble_q8, row, n_rows)[b * NIBBLE_BLOCK..][..NIBBLE_BLOCK];
                reorder::<2, _, _>(&codes, NIBBLE_BLOCK, out, |v| v);
                let lane_sums = &mut own(&self.nibble_lane_sums, row, n_rows)[b * 16..][..16];
                for (lane, sum) in lane_sums.iter_mut().enumerate() {
                    *sum = codes[lane * 8..lane * 8 + 8].iter().map(|q| i32::from(*q)).sum();
                }
            }
            if forms.q8 {
                let out = &mut own(&self.q8, row, n_rows)[b * NIBBLE_BLOCK..];
                let n = out.len().min(NIBBLE_BLOCK);
                out[..n].copy_from_slice(&codes[..n]);
            }
        }
        if forms.nibble_q8 {
            lanes(scales, NIBBLE_BLOCK, own(&self.nibble_scales, row, n_rows));
        }
        if forms.q8 {
            lanes(scales, BYTE_BLOCK, own(&self.byte_scales, row, n_rows));
        }
        for (i, out) in self.q8_sums.iter().enumerate() {
            let groups = scales.chunks_exact(1 << i).zip(sums.chunks_exact(1 << i));
            for (out, (scales, sums)) in own(out, row, n_rows).iter_mut().zip(groups) {
                *out = scales.iter().zip(sums).map(|(scale, sum)| scale * *sum as f32).sum();
            }
        }
    }
}

/// The part of a form that belongs to `row`.
#[inline(always)]
#[allow(unsafe_code, clippy::mut_from_ref)]
fn own<'a, T>(all: &'a SharedMut<'_, T>, row: usize, n_rows: usize) -> &'a mut [T] {
    let n = all.len() / n_rows;
    // SAFETY: each row is filled by one worker, which holds one part of a form at a time.
    unsafe { all.slice(row * n, n) }
}

#[inline(always)]
fn sum_of(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for chunk in values.chunks_exact(16) {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v;
        }
    }
    lanes.iter().sum()
}

/// Rounds to nearest even; NaN stays NaN.
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { 0x7fc0 } else { rounded as u16 }
}

/// Reorders each block so that element `PLANES * m + j` comes to `j * (block / PLANES) + m`; short blocks end in zeros.
#[inline(always)]
fn reorder<const PLANES: usize, T: Copy + Default, U: Copy + Default>(
    x: &[T],
    block: usize,
    out: &mut [U],
    convert: impl Fn(T) -> U,
) {
    let plane = block / PLANES;
    for (x, out) in x.chunks(block).zip(out.chunks_exact_mut(block)) {
        if x.len() == block {
            for j in 0..PLANES {
                for m in 0..plane {
                    out[j * plane + m] = convert(x[PLANES * m + j]);
                }
            }
        } else {
            out.fill(U::default());
            for (i, v) in x.iter().enumerate() {
                out[i % PLANES * plane + i / PLANES] = convert(*v);
            }
        }
    }
}

/// Spreads each group's scale over its 32-bit lanes; short blocks end in zeros.
#[inline(always)]
fn lanes(scales: &[f32], block: usize, out: &mut [f32]) {
    let per_block = block / Q8_GROUP;
    for (scales, out) in scales.chunks(per_block).zip(out.chunks_exact_mut(16)) {
        for (lane, out) in out.iter_mut().enumerate() {
            *out = scales.get(lane * per_block / 16).copied().unwrap_or(0.0);
        }
    }
}
