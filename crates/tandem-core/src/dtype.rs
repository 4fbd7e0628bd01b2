//! The closed set of storage formats a weight can have, with their sizes.
//!
//! This file knows bits, groups and byte counts; the arithmetic of each format is in [`crate::quant`].

use std::fmt;

/// An unquantised element type, also the type of affine scales and biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl Float {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::BF16 => 2,
        }
    }

    /// Decodes element `index` of a little-endian array. Panics when `bytes` is too short.
    #[inline]
    pub fn read(self, bytes: &[u8], index: usize) -> f32 {
        match self {
            Float::F32 => {
                let b = &bytes[index * 4..index * 4 + 4];
                f32::from_le_bytes([b[0], b[1], b[2], b[3]])
            }
            Float::F16 => half::f16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]).to_f32(),
            Float::BF16 => {
                f32::from_bits(u32::from(u16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]])) << 16)
            }
        }
    }

    /// Appends `value`, rounded to nearest even, as little-endian bytes.
    pub fn write(self, value: f32, out: &mut Vec<u8>) {
        match self {
            Float::F32 => out.extend_from_slice(&value.to_le_bytes()),
            Float::F16 => out.extend_from_slice(&half::f16::from_f32(value).to_le_bytes()),
            Float::BF16 => out.extend_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
        }
    }
}

impl fmt::Display for Float {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::BF16 => "bf16",
        })
    }
}

/// How a matrix `[rows, cols]` is stored. Groups run along `cols` (the input dimension).
///
/// Packed bits are one little-endian bit stream per row: element `k` occupies bits `[k*bits, (k+1)*bits)` of the row
/// (MLX's layout for every mode).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// Plain floating point, no scales.
    Float(Float),
    /// `w = scale * q + bias`, `q` unsigned of `bits` bits (2, 3, 4, 5, 6 or 8), groups of 32, 64 or 128.
    Affine {
        /// Bits of one code.
        bits: u8,
        /// Elements that share a scale and a bias.
        group_size: u16,
        /// Type of the stored scales and biases.
        params: Float,
    },
    /// OCP microscaling FP4: e2m1 codes, one e8m0 scale byte per 32.
    Mxfp4,
    /// OCP microscaling FP8: e4m3 codes, one e8m0 scale byte per 32.
    Mxfp8,
    /// NVIDIA FP4: e2m1 codes, one e4m3 scale byte per 16.
    Nvfp4,
    /// Hugging Face FP8: e4m3 codes, one f32 `weight_scale_inv` per 128 x 128 block.
    Fp8Block,
}

/// Side of the square block of [`DType::Fp8Block`].
pub const FP8_BLOCK: usize = 128;

impl DType {
    /// Plain f32.
    pub const F32: DType = DType::Float(Float::F32);
    /// Plain f16.
    pub const F16: DType = DType::Float(Float::F16);
    /// Plain bf16.
    pub const BF16: DType = DType::Float(Float::BF16);

    /// Bits of one element, scales not counted.
    pub const fn bits(self) -> usize {
        match self {
            DType::Float(f) => f.bytes() * 8,
            DType::Affine { bits, .. } => bits as usize,
            DType::Mxfp4 | DType::Nvfp4 => 4,
            DType::Mxfp8 | DType::Fp8Block => 8,
        }
    }

    /// Elements along a row that share a scale; 1 for plain floats.
    pub const fn group_size(self) -> usize {
        match self {
            DType::Float(_) => 1,
            DType::Affine { group_size, .. } => group_size as usize,
            DType::Mxfp4 | DType::Mxfp8 => 32,
            DType::Nvfp4 => 16,
            DType::Fp8Block => FP8_BLOCK,
        }
    }

    /// True when the format has scales.
    pub const fn is_quantized(self) -> bool {
        !matches!(self, DType::Float(_))
    }

    /// True when an element's own bits can be NaN or an infinity.
    pub const fn has_non_finite_codes(self) -> bool {
        matches!(self, DType::Float(_) | DType::Mxfp8 | DType::Fp8Block)
    }

    /// Bytes of packed elements of `[rows, cols]`.
    pub const fn weight_bytes(self, rows: usize, cols: usize) -> usize {
        rows * (cols * self.bits()).div_ceil(8)
    }

    /// Bytes of the scales of `[rows, cols]`.
    pub const fn scale_bytes(self, rows: usize, cols: usize) -> usize {
        match self {
            DType::Float(_) => 0,
            DType::Affine { group_size, params, .. } => rows * (cols / group_size as usize) * params.bytes(),
            DType::Mxfp4 | DType::Mxfp8 => rows * (cols / 32),
            DType::Nvfp4 => rows * (cols / 16),
            DType::Fp8Block => rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK) * 4,
        }
    }

    /// Bytes of the biases of `[rows, cols]`.
    pub const fn bias_bytes(self, rows: usize, cols: usize) -> usize {
        match self {
            DType::Affine { .. } => self.scale_bytes(rows, cols),
            _ => 0,
        }
    }

    /// All bytes of `[rows, cols]`: elements, scales and biases.
    pub const fn total_bytes(self, rows: usize, cols: usize) -> usize {
        self.weight_bytes(rows, cols) + self.scale_bytes(rows, cols) + self.bias_bytes(rows, cols)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DType::Float(float) => float.fmt(f),
            DType::Affine { bits, group_size, .. } => write!(f, "affine{bits}:g{group_size}"),
            DType::Mxfp4 => f.write_str("mxfp4"),
            DType::Mxfp8 => f.write_str("mxfp8"),
            DType::Nvfp4 => f.write_str("nvfp4"),
            DType::Fp8Block => f.write_str("fp8:b128"),
        }
    }
}
