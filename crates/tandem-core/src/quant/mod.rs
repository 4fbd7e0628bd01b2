//! Scalar codecs of every weight format: the definition that fast kernels are tested against.
//!
//! One file per format. Sizes and names are in [`crate::dtype`]; nothing here multiplies matrices or uses threads.

mod affine;
mod bitstream;
mod fp8_block;
pub mod minifloat;
mod mxfp4;
mod mxfp8;
mod nvfp4;
mod search;

use crate::dtype::{DType, Float};

pub use search::{Covariance, quantize_searched};

/// A borrowed matrix `[rows, cols]` in any storage format; rows are outputs, groups run along the columns.
#[derive(Clone, Copy, Debug)]
pub struct PackedView<'a> {
    /// Storage format.
    pub dtype: DType,
    /// Output dimension.
    pub rows: usize,
    /// Input dimension.
    pub cols: usize,
    /// Packed codes or plain floats, `dtype.weight_bytes(rows, cols)` bytes.
    pub weight: &'a [u8],
    /// Scales, row-major over `[rows, cols / group]` (blocks for [`DType::Fp8Block`]); empty for plain floats.
    pub scales: &'a [u8],
    /// Biases, laid out as the scales; empty unless affine.
    pub biases: &'a [u8],
    /// NVFP4 only: the effective scale of a group is `e4m3(scale) * (global_scale / 2688)`.
    pub global_scale: Option<f32>,
}

impl<'a> PackedView<'a> {
    /// Wraps the parts of a matrix `[rows, cols]`, with no global scale.
    ///
    /// # Errors
    /// Unsupported bits or group size, `cols` not a multiple of the group (the blocks of [`DType::Fp8Block`] may be
    /// partial), or a part whose length is not what `dtype` says.
    pub fn new(
        dtype: DType,
        rows: usize,
        cols: usize,
        weight: &'a [u8],
        scales: &'a [u8],
        biases: &'a [u8],
    ) -> Result<Self, QuantError> {
        check_shape(dtype, rows, cols)?;
        for (part, expected, found) in [
            ("weight", dtype.weight_bytes(rows, cols), weight.len()),
            ("scales", dtype.scale_bytes(rows, cols), scales.len()),
            ("biases", dtype.bias_bytes(rows, cols), biases.len()),
        ] {
            if expected != found {
                return Err(QuantError::Length { part, dtype, rows, cols, expected, found });
            }
        }
        Ok(Self { dtype, rows, cols, weight, scales, biases, global_scale: None })
    }

    /// Decodes row `row` into `out`, `[cols]` f32, in f32 arithmetic (affine: multiply, round, add, round).
    ///
    /// # Panics
    /// When `row >= rows` or `out.len() != cols`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of a matrix of {} rows", self.rows);
        assert_eq!(out.len(), self.cols, "a row of {} needs an output of {} values", self.dtype, self.cols);
        match self.dtype {
            DType::Float(float) => wide(|| decode_floats(float, self.weight_row(row), out)),
            DType::Affine { bits, group_size, params } => {
                wide(|| affine::dequantize_row(self, row, bits.into(), group_size.into(), params, out));
            }
            DType::Mxfp4 => mxfp4::dequantize_row(self, row, out),
            DType::Mxfp8 => mxfp8::dequantize_row(self, row, out),
            DType::Nvfp4 => nvfp4::dequantize_row(self, row, out),
            DType::Fp8Block => fp8_block::dequantize_row(self, row, out),
        }
    }

    /// Decodes the whole matrix, `[rows, cols]` f32 row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        if self.cols > 0 {
            for (row, out) in out.chunks_exact_mut(self.cols).enumerate() {
                self.dequantize_row(row, out);
            }
        }
        out
    }

    /// Finds the first of `n_rows` rows from `first_row` on that holds an element which is NaN or infinite, and its column.
    /// Scales are another matter: [`has_nan_scale`].
    ///
    /// # Panics
    /// When the rows are not in the matrix.
    pub fn find_non_finite(&self, first_row: usize, n_rows: usize) -> Option<(usize, usize)> {
        if !self.dtype.has_non_finite_codes() || self.cols == 0 {
            return None;
        }
        let row_bytes = self.dtype.weight_bytes(1, self.cols);
        let bytes = &self.weight[first_row * row_bytes..][..n_rows * row_bytes];
        let is_bad = |bytes: &[u8]| wide(|| holds_non_finite(self.dtype, bytes));
        // Blocks that the first cache holds, so that the search for the element is short.
        let block = bytes.chunks(16 << 10).position(is_bad)?;
        let element = self.dtype.bits() / 8;
        let first = block * (16 << 10) / element;
        let index = first + bytes[first * element..].chunks_exact(element).position(is_bad)?;
        Some((first_row + index / self.cols, index % self.cols))
    }

    fn weight_row(&self, row: usize) -> &'a [u8] {
        slice_row(self.weight, row, self.dtype.weight_bytes(1, self.cols))
    }

    fn scales_row(&self, row: usize) -> &'a [u8] {
        slice_row(self.scales, row, self.dtype.scale_bytes(1, self.cols))
    }

    fn biases_row(&self, row: usize) -> &'a [u8] {
        slice_row(self.biases, row, self.dtype.bias_bytes(1, self.cols))
    }
}

/// An owned matrix `[rows, cols]` in any storage format, as [`quantize`] makes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    /// Storage format.
    pub dtype: DType,
    /// Output dimension.
    pub rows: usize,
    /// Input dimension.
    pub cols: usize,
    /// Packed codes or plain floats.
    pub weight: Vec<u8>,
    /// Scales; empty for plain floats.
    pub scales: Vec<u8>,
    /// Biases; empty unless affine.
    pub biases: Vec<u8>,
}

impl Packed {
    /// Borrows the matrix.
    pub fn view(&self) -> PackedView<'_> {
        PackedView {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            weight: &self.weight,
            scales: &self.scales,
            biases: &self.biases,
            global_scale: None,
        }
    }
}

/// Quantises `values`, `[rows, cols]` f32 row-major, to the bits that MLX 0.32.4's CPU backend writes.
///
/// Plain floats are rounded to nearest even. [`DType::Fp8Block`] is not an MLX format: `scale_inv = amax / 448` per
/// block, 1 for a zero block. Differences from MLX: non-finite values are an error, and an E8M0 scale below `2^-127` is
/// clamped where MLX wraps the byte. Affine groups that span more than the range of f32 get an infinite scale, as in
/// MLX; [`has_nan_scale`] finds them.
///
/// # Errors
/// Unsupported bits, group size or shape as in [`PackedView::new`]; `values` not `rows * cols` long; a non-finite value
/// for a quantised format.
pub fn quantize(dtype: DType, rows: usize, cols: usize, values: &[f32]) -> Result<Packed, QuantError> {
    check_values(dtype, rows, cols, values)?;
    let mut weight = Vec::with_capacity(dtype.weight_bytes(rows, cols));
    let mut scales = Vec::with_capacity(dtype.scale_bytes(rows, cols));
    let mut biases = Vec::with_capacity(dtype.bias_bytes(rows, cols));
    match dtype {
        DType::Float(float) => values.iter().for_each(|value| float.write(*value, &mut weight)),
        DType::Affine { bits, group_size, params } => wide(|| {
            for group in values.chunks_exact(group_size.into()) {
                affine::quantize_group(group, bits.into(), params, &mut weight, &mut scales, &mut biases);
            }
        }),
        DType::Mxfp4 => wide(|| {
            for group in values.chunks_exact(mxfp4::GROUP) {
                mxfp4::quantize_group(group, &mut weight, &mut scales);
            }
        }),
        DType::Mxfp8 => {
            for group in values.chunks_exact(mxfp8::GROUP) {
                mxfp8::quantize_group(group, &mut weight, &mut scales);
            }
        }
        DType::Nvfp4 => wide(|| {
            for group in values.chunks_exact(nvfp4::GROUP) {
                nvfp4::quantize_group(group, &mut weight, &mut scales);
            }
        }),
        DType::Fp8Block => fp8_block::quantize(cols, values, &mut weight, &mut scales),
    }
    let packed = Packed { dtype, rows, cols, weight, scales, biases };
    check_range(&packed, values)?;
    Ok(packed)
}

/// Refuses what does not fit the format: an element, a scale or a bias became infinite.
fn check_range(packed: &Packed, values: &[f32]) -> Result<(), QuantError> {
    let (dtype, cols) = (packed.dtype, packed.cols);
    let index = match dtype {
        DType::Float(_) => match packed.view().find_non_finite(0, packed.rows) {
            Some((row, col)) if values[row * cols + col].is_finite() => Some(row * cols + col),
            Some((row, col)) => {
                return Err(QuantError::NonFinite { dtype, row, col, value: values[row * cols + col] });
            }
            None => None,
        },
        DType::Affine { group_size, .. } => has_nan_scale(&packed.view()).map(|group| {
            let first = group * usize::from(group_size);
            let group = values[first..].iter().take(group_size.into()).enumerate();
            first + group.max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).map_or(0, |(i, _)| i)
        }),
        _ => None,
    };
    match index {
        Some(index) => Err(QuantError::Overflow { dtype, row: index / cols, col: index % cols, value: values[index] }),
        None => Ok(()),
    }
}

/// Checks what a quantiser is given.
fn check_values(dtype: DType, rows: usize, cols: usize, values: &[f32]) -> Result<(), QuantError> {
    check_shape(dtype, rows, cols)?;
    if values.len() != rows * cols {
        return Err(QuantError::Values { rows, cols, expected: rows * cols, found: values.len() });
    }
    if dtype.is_quantized()
        && wide(|| amax_bits(values)) >= f32::INFINITY.to_bits()
        && let Some(index) = values.iter().position(|value| !value.is_finite())
    {
        return Err(QuantError::NonFinite { dtype, row: index / cols, col: index % cols, value: values[index] });
    }
    Ok(())
}

/// Whether any element of `bytes` is NaN or infinite. Its exponent has all bits set, so a maximum of magnitudes tells,
/// which vectorises.
#[inline(always)]
fn holds_non_finite(dtype: DType, bytes: &[u8]) -> bool {
    let largest_half = |bytes: &[u8]| {
        let halves = bytes.as_chunks::<2>().0.iter();
        halves.fold(0, |largest: i16, half| largest.max((u16::from_le_bytes(*half) & 0x7fff) as i16))
    };
    match dtype {
        DType::Float(Float::F32) => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.fold(0, |largest: i32, word| largest.max((u32::from_le_bytes(*word) & 0x7fff_ffff) as i32))
                >= 0x7f80_0000
        }
        DType::Float(Float::F16) => largest_half(bytes) >= 0x7c00,
        DType::Float(Float::BF16) => largest_half(bytes) >= 0x7f80,
        // E4M3 has no infinity, and NaN in two signs.
        DType::Mxfp8 | DType::Fp8Block => bytes.iter().fold(0, |largest: u8, byte| largest.max(byte & 0x7f)) == 0x7f,
        DType::Affine { .. } | DType::Mxfp4 | DType::Nvfp4 => false,
    }
}

/// Finds the first group (index into the scales) whose scale or bias is NaN or infinite; for E8M0 that is byte 255.
pub fn has_nan_scale(view: &PackedView<'_>) -> Option<usize> {
    let finite = |scale: f32| scale.is_finite();
    match view.dtype {
        DType::Float(_) => None,
        DType::Affine { params, .. } => {
            let n_groups = view.scales.len() / params.bytes();
            (0..n_groups).find(|g| !finite(params.read(view.scales, *g)) || !finite(params.read(view.biases, *g)))
        }
        // Whole blocks, so that this takes vector instructions: every scale of a checkpoint passes here.
        DType::Mxfp4 | DType::Mxfp8 => {
            let largest = |block: &[u8]| block.iter().fold(0, |largest, byte| *byte.max(&largest));
            let block = view.scales.chunks(4096).position(|block| largest(block) == u8::MAX)?;
            view.scales[block * 4096..].iter().position(|byte| *byte == u8::MAX).map(|i| block * 4096 + i)
        }
        DType::Nvfp4 => view.scales.iter().position(|byte| !finite(nvfp4::effective_scale(*byte, view.global_scale))),
        DType::Fp8Block => (0..view.scales.len() / 4).find(|block| !finite(Float::F32.read(view.scales, *block))),
    }
}

/// Why a matrix cannot be wrapped or quantised.
#[derive(thiserror::Error, Debug)]
pub enum QuantError {
    /// A code width that no kernel reads.
    #[error(
        "affine weights have 2, 3, 4, 5, 6 or 8 bits, found {bits}: check `bits` in the model's quantization config"
    )]
    Bits {
        /// Bits of one code.
        bits: u8,
    },
    /// A group size that no kernel reads.
    #[error(
        "affine groups have 32, 64 or 128 values, found {group_size}: check `group_size` in the quantization config"
    )]
    GroupSize {
        /// Values of one group.
        group_size: u16,
    },
    /// A row that is not a whole number of groups.
    #[error(
        "{dtype} needs a multiple of {group_size} columns, found {cols}: \
         choose a smaller group or keep this matrix unquantised"
    )]
    Columns {
        /// Storage format.
        dtype: DType,
        /// Values of one group.
        group_size: usize,
        /// Input dimension.
        cols: usize,
    },
    /// A shape whose size in bits overflows `usize`.
    #[error("a matrix of {rows} x {cols} does not fit in memory: the shape in the checkpoint header is wrong")]
    TooLarge {
        /// Output dimension.
        rows: usize,
        /// Input dimension.
        cols: usize,
    },
    /// A part with the wrong number of bytes.
    #[error(
        "{part} of a {rows} x {cols} {dtype} matrix must have {expected} bytes, found {found}: \
         the quantization config does not match the checkpoint, or the file is truncated"
    )]
    Length {
        /// `weight`, `scales` or `biases`.
        part: &'static str,
        /// Storage format.
        dtype: DType,
        /// Output dimension.
        rows: usize,
        /// Input dimension.
        cols: usize,
        /// Bytes that the format needs.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A source of the wrong length.
    #[error("a {rows} x {cols} matrix has {expected} values, found {found}: pass the values row by row")]
    Values {
        /// Output dimension.
        rows: usize,
        /// Input dimension.
        cols: usize,
        /// `rows * cols`.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A value beyond the range of the format.
    #[error(
        "{value} at row {row}, column {col} is beyond the range of {dtype}: choose a format of more range for this matrix \
         (bf16, f32, or scales of them), or set \"torch_dtype\" of the source's config.json to bfloat16"
    )]
    Overflow {
        /// Storage format.
        dtype: DType,
        /// Row of the value.
        row: usize,
        /// Column of the value.
        col: usize,
        /// The value.
        value: f32,
    },
    /// A value that has no code.
    #[error("{dtype} needs finite values, found {value} at row {row}, column {col}: the source weights are damaged")]
    NonFinite {
        /// Storage format.
        dtype: DType,
        /// Row of the value.
        row: usize,
        /// Column of the value.
        col: usize,
        /// The value.
        value: f32,
    },
}

/// Checks what does not depend on the bytes, so that the sizes of [`DType`] cannot overflow afterwards.
fn check_shape(dtype: DType, rows: usize, cols: usize) -> Result<(), QuantError> {
    if let DType::Affine { bits, group_size, .. } = dtype {
        if !matches!(bits, 2..=6 | 8) {
            return Err(QuantError::Bits { bits });
        }
        if !matches!(group_size, 32 | 64 | 128) {
            return Err(QuantError::GroupSize { group_size });
        }
    }
    // 32 bits is the widest element; an affine scale and bias (64 bits) are shared by at least 32 of them.
    if rows.max(1).checked_mul(cols.max(1)).and_then(|n| n.checked_mul(32)).is_none() {
        return Err(QuantError::TooLarge { rows, cols });
    }
    let group_size = dtype.group_size();
    if dtype != DType::Fp8Block && !cols.is_multiple_of(group_size) {
        return Err(QuantError::Columns { dtype, group_size, cols });
    }
    Ok(())
}

fn slice_row(bytes: &[u8], row: usize, row_bytes: usize) -> &[u8] {
    &bytes[row * row_bytes..(row + 1) * row_bytes]
}

/// Runs `work` compiled for vectors of 256 bits where the processor has them: what is inlined into it, so its loops are
/// marked so. The operations and their order stay, and with them the bits.
#[inline(always)]
#[allow(unsafe_code)]
fn wide<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn with_avx2<T>(work: impl FnOnce() -> T) -> T {
            work()
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { with_avx2(work) };
        }
    }
    work()
}

/// One loop per type: the constant element size lets the compiler vectorise.
#[inline(always)]
fn decode_floats(float: Float, bytes: &[u8], out: &mut [f32]) {
    #[inline(always)]
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn(&[u8; N]) -> f32) {
        for (value, element) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *value = decode(element);
        }
    }
    match float {
        Float::F32 => each::<4>(bytes, out, |element| Float::F32.read(element, 0)),
        Float::F16 => each::<2>(bytes, out, |element| Float::F16.read(element, 0)),
        Float::BF16 => each::<2>(bytes, out, |element| Float::BF16.read(element, 0)),
    }
}

/// Largest magnitude of finite `values`, 0 for none.
#[inline(always)]
fn amax(values: &[f32]) -> f32 {
    f32::from_bits(amax_bits(values))
}

/// Bits of the largest magnitude; NaN counts as the largest. Magnitudes order as their bits do, and a maximum of
/// integers vectorises.
#[inline(always)]
fn amax_bits(values: &[f32]) -> u32 {
    values.iter().fold(0, |largest, value| largest.max((value.to_bits() & 0x7fff_ffff) as i32)) as u32
}

#[cfg(test)]
mod tests;
