//! Activations in the forms that matrix kernels read: plain, rounded, quantised, and reordered to match packed weights.

use tandem_core::DType;

use crate::isa::Isa;

/// Numerics of activations that meet quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// Single precision throughout: the reference.
    F32,
    /// Rounded to bfloat16 wherever products are taken in bfloat16, f32 elsewhere; sums in f32.
    Bf16,
    /// 8-bit integers with one f32 scale per 32, for 4-bit and 8-bit weights; f32 for unquantised ones.
    Int8,
}

impl Numerics {
    /// Name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Numerics::F32 => "f32",
            Numerics::Bf16 => "bf16",
            Numerics::Int8 => "int8",
        }
    }
}

/// Elements per scale of 8-bit activations.
pub const Q8_GROUP: usize = 32;
/// Elements of one step of the kernels for 4-bit weights: 64 packed bytes.
pub const NIBBLE_BLOCK: usize = 128;
/// Elements of one step of the kernels for 8-bit weights.
pub const BYTE_BLOCK: usize = 64;

/// Which kernel family multiplies a matrix, decided by its format, the numerics, the processor and the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Decode each row to f32, then a dot product: any format on any processor.
    Generic,
    /// 4-bit codes, f32 products.
    NibbleF32,
    /// 4-bit codes, bf16 products.
    NibbleBf16,
    /// 4-bit codes, integer products.
    NibbleInt8,
    /// 8-bit codes, f32 products.
    ByteF32,
    /// 8-bit codes, integer products.
    ByteInt8,
    /// Tiles of rows shared by many tokens.
    #[cfg(target_arch = "x86_64")]
    Gemm(super::gemm::Operand),
}

impl Kernel {
    /// `many` rows of activations allow kernels whose sums run in another order than a single row's.
    pub(crate) fn choose(dtype: DType, numerics: Numerics, isa: Isa, many: bool) -> Kernel {
        if isa == Isa::Scalar {
            return Kernel::Generic;
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = many;
        #[cfg(target_arch = "x86_64")]
        if many && isa == Isa::Avx512 {
            return Kernel::Gemm(super::gemm::Operand::choose(dtype, numerics, isa));
        }
        match (dtype, numerics) {
            (DType::Mxfp4, Numerics::Bf16) if isa.has_bf16() => Kernel::NibbleBf16,
            (DType::Mxfp4 | DType::Affine { bits: 4, .. }, Numerics::Int8) if isa.has_int8_dot() => Kernel::NibbleInt8,
            (DType::Mxfp4 | DType::Affine { bits: 4, .. }, _) => Kernel::NibbleF32,
            (DType::Affine { bits: 8, .. }, Numerics::Int8) if isa.has_int8_dot() => Kernel::ByteInt8,
            (DType::Affine { bits: 8, .. }, _) => Kernel::ByteF32,
            _ => Kernel::Generic,
        }
    }

    /// The forms of the activations that this kernel reads for a matrix of this format.
    fn forms(self, dtype: DType) -> Forms {
        let mut forms = Forms::default();
        match self {
            Kernel::Generic => {}
            Kernel::NibbleF32 => forms.nibble_f32 = true,
            Kernel::NibbleBf16 => forms.nibble_bf16 = true,
            Kernel::NibbleInt8 => forms.nibble_q8 = true,
            Kernel::ByteF32 => {}
            Kernel::ByteInt8 => forms.byte_q8 = true,
            #[cfg(target_arch = "x86_64")]
            Kernel::Gemm(operand) => match operand {
                super::gemm::Operand::Int8 if dtype.bits() == 4 => forms.nibble_q8 = true,
                super::gemm::Operand::Int8 => forms.byte_q8 = true,
                super::gemm::Operand::Bf16 if dtype.bits() == 4 => forms.nibble_bf16 = true,
                super::gemm::Operand::Bf16 => forms.plain_bf16 = true,
                super::gemm::Operand::F32 => {}
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
    nibble_bf16: bool,
    nibble_q8: bool,
    byte_q8: bool,
    plain_bf16: bool,
}

impl Forms {
    fn or(self, other: Forms) -> Forms {
        Forms {
            sums: std::array::from_fn(|i| self.sums[i] || other.sums[i]),
            nibble_f32: self.nibble_f32 || other.nibble_f32,
            nibble_bf16: self.nibble_bf16 || other.nibble_bf16,
            nibble_q8: self.nibble_q8 || other.nibble_q8,
            byte_q8: self.byte_q8 || other.byte_q8,
            plain_bf16: self.plain_bf16 || other.plain_bf16,
        }
    }
}

/// Activations of one operation, `[n_rows, width]`, in the forms that its matrices need. Memory is kept between uses.
#[derive(Debug, Default)]
pub struct Activations {
    width: usize,
    n_rows: usize,
    /// `[n_rows, width]`
    plain: Vec<f32>,
    /// Sums per 32, 64 and 128 elements (what affine biases multiply), `[n_rows, width / group]` each.
    sums: [Vec<f32>; 3],
    /// Sums of the 8-bit form, likewise.
    q8_sums: [Vec<f32>; 3],
    /// `[n_rows, blocks * 128]`, element `8 i + j` of a block at `16 j + i`.
    nibble_f32: Vec<f32>,
    /// `[n_rows, blocks * 128]`, element `4 m + j` of a block at `32 j + m`.
    nibble_bf16: Vec<u16>,
    /// `[n_rows, blocks * 128]`, element `2 m + j` of a block at `64 j + m`.
    nibble_q8: Vec<i8>,
    /// Scale of each 32-bit lane of a 128-block, `[n_rows, blocks * 16]`.
    nibble_scales: Vec<f32>,
    /// Sum of the 8 integers of each lane, `[n_rows, blocks * 16]`.
    nibble_lane_sums: Vec<i32>,
    /// `[n_rows, blocks * 64]`
    byte_q8: Vec<i8>,
    /// Scale of each 32-bit lane of a 64-block, `[n_rows, blocks * 16]`.
    byte_scales: Vec<f32>,
    /// `[n_rows, blocks * 128]`, in order.
    plain_bf16: Vec<u16>,
    /// `[n_rows, width]`, and per group of 32 the scale and the sum of the integers.
    q8: Vec<i8>,
    q8_scales: Vec<f32>,
    q8_group_sums: Vec<i32>,
}

impl Activations {
    /// Takes `x [n_rows, width]` in the forms that `kernels` (each with the group size of its matrix) read.
    pub(crate) fn prepare<'a>(
        &mut self,
        rows: impl Iterator<Item = &'a [f32]>,
        width: usize,
        kernels: impl Iterator<Item = (Kernel, DType)>,
    ) {
        self.width = width;
        self.plain.clear();
        rows.for_each(|row| self.plain.extend_from_slice(row));
        self.n_rows = self.plain.len() / width.max(1);
        let forms = kernels.fold(Forms::default(), |forms, (kernel, dtype)| forms.or(kernel.forms(dtype)));
        for (i, group) in [32usize, 64, 128].into_iter().enumerate() {
            if forms.sums[i] {
                self.sums[i].clear();
                self.sums[i].extend(self.plain.chunks_exact(group).map(sum));
            }
        }
        let bf16 = |v: f32| half::bf16::from_f32(v).to_bits();
        if forms.nibble_f32 {
            reorder(&self.plain, width, NIBBLE_BLOCK, 8, &mut self.nibble_f32, |v| v);
        }
        if forms.nibble_bf16 {
            reorder(&self.plain, width, NIBBLE_BLOCK, 4, &mut self.nibble_bf16, bf16);
        }
        if forms.plain_bf16 {
            reorder(&self.plain, width, NIBBLE_BLOCK, 1, &mut self.plain_bf16, bf16);
        }
        if forms.nibble_q8 || forms.byte_q8 {
            self.quantize();
        }
        if forms.nibble_q8 {
            reorder(&self.q8, width, NIBBLE_BLOCK, 2, &mut self.nibble_q8, |v| v);
            lanes(&self.q8_scales, width, NIBBLE_BLOCK, &mut self.nibble_scales);
            self.nibble_lane_sums.clear();
            self.nibble_lane_sums.extend(self.nibble_q8.chunks_exact(NIBBLE_BLOCK).flat_map(|block| {
                std::array::from_fn::<i32, 16, _>(|lane| {
                    (0..4).map(|i| i32::from(block[4 * lane + i]) + i32::from(block[64 + 4 * lane + i])).sum()
                })
            }));
        }
        if forms.byte_q8 {
            reorder(&self.q8, width, BYTE_BLOCK, 1, &mut self.byte_q8, |v| v);
            lanes(&self.q8_scales, width, BYTE_BLOCK, &mut self.byte_scales);
        }
    }

    /// 8-bit form of every row: per group of 32 `scale = max|x| / 127`, `q = round(x / scale)`.
    fn quantize(&mut self) {
        self.q8.clear();
        self.q8_scales.clear();
        for group in self.plain.chunks_exact(self.width).flat_map(|row| row.chunks(Q8_GROUP)) {
            let largest = group.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let (scale, inverse) = if largest > 0.0 { (largest / 127.0, 127.0 / largest) } else { (0.0, 0.0) };
            self.q8_scales.push(scale);
            self.q8.extend(group.iter().map(|v| (v * inverse).round_ties_even() as i8));
        }
        self.q8_group_sums.clear();
        for row in self.q8.chunks_exact(self.width) {
            self.q8_group_sums.extend(row.chunks(Q8_GROUP).map(|g| g.iter().map(|q| i32::from(*q)).sum::<i32>()));
        }
        let per_row = self.width.div_ceil(Q8_GROUP);
        for (i, groups) in [1usize, 2, 4].into_iter().enumerate() {
            self.q8_sums[i].clear();
            if !self.width.is_multiple_of(groups * Q8_GROUP) {
                continue;
            }
            let dequantized = self.q8_group_sums.iter().zip(&self.q8_scales).map(|(sum, scale)| *sum as f32 * scale);
            let dequantized: Vec<f32> = dequantized.collect();
            for row in dequantized.chunks_exact(per_row) {
                self.q8_sums[i].extend(row.chunks_exact(groups).map(|s| s.iter().sum::<f32>()));
            }
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
    pub(crate) fn nibble_bf16(&self, row: usize) -> &[u16] {
        block_row(&self.nibble_bf16, row, self.width, NIBBLE_BLOCK, NIBBLE_BLOCK)
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn plain_bf16(&self, row: usize) -> &[u16] {
        block_row(&self.plain_bf16, row, self.width, NIBBLE_BLOCK, NIBBLE_BLOCK)
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
            block_row(&self.byte_q8, row, self.width, BYTE_BLOCK, BYTE_BLOCK),
            block_row(&self.byte_scales, row, self.width, BYTE_BLOCK, 16),
        )
    }
}

fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for chunk in values.chunks_exact(16) {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v;
        }
    }
    lanes.iter().sum()
}

/// Row `row` of data that has `per_block` entries for each block of `block` elements.
fn block_row<T>(data: &[T], row: usize, width: usize, block: usize, per_block: usize) -> &[T] {
    let n = width.div_ceil(block) * per_block;
    &data[row * n..(row + 1) * n]
}

/// Reorders each block so that element `planes * m + j` comes to `j * (block / planes) + m`; short blocks end in zeros.
fn reorder<T: Copy, U: Copy + Default>(
    x: &[T],
    width: usize,
    block: usize,
    planes: usize,
    out: &mut Vec<U>,
    convert: impl Fn(T) -> U,
) {
    let per_row = width.div_ceil(block) * block;
    let n_rows = x.len() / width.max(1);
    out.clear();
    out.resize(n_rows * per_row, U::default());
    let plane = block / planes;
    for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(per_row)) {
        for (x, out) in row.chunks(block).zip(out.chunks_exact_mut(block)) {
            for (m, values) in x.chunks(planes).enumerate() {
                for (j, v) in values.iter().enumerate() {
                    out[j * plane + m] = convert(*v);
                }
            }
        }
    }
}

/// Spreads each group's scale over its 32-bit lanes; short blocks end in zeros.
fn lanes(scales: &[f32], width: usize, block: usize, out: &mut Vec<f32>) {
    let groups = width.div_ceil(Q8_GROUP);
    let per_block = block / Q8_GROUP;
    let per_group = 16 / per_block;
    out.clear();
    for row in scales.chunks_exact(groups) {
        for block in row.chunks(per_block) {
            out.extend((0..16).map(|lane| block.get(lane / per_group).copied().unwrap_or(0.0)));
        }
    }
}
