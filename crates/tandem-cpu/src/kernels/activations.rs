//! Activations in the forms that matrix kernels read: plain, rounded, quantised, and reordered to match packed weights.

use tandem_core::{DType, Numerics};

use super::tile_rows::Operand;
#[cfg(target_arch = "x86_64")]
use super::tile_rows::amx;
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
    Tiles(Operand),
}

impl Kernel {
    /// `n_rows` are those of the step.
    pub(crate) fn choose(matrix: &CpuMatrix, numerics: Numerics, isa: Isa, n_rows: usize) -> Kernel {
        let dtype = matrix.dtype();
        if isa == Isa::Scalar {
            return Kernel::Generic;
        }
        if let CpuMatrix::Tiled(tiles) = matrix {
            return Kernel::Tiles(Operand::choose(tiles.layout, numerics, isa, n_rows));
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
            Kernel::Generic | Kernel::ByteF32 => forms.plain = true,
            Kernel::NibbleF32 => forms.nibble_f32 = true,
            Kernel::NibbleInt8 => forms.nibble_q8 = true,
            Kernel::ByteInt8 => forms.q8 = true,
            Kernel::Tiles(operand) => match operand {
                Operand::Int8 => forms.q8 = true,
                Operand::Int16 => forms.pairs_i16 = true,
                Operand::Bf16 => forms.pairs_bf16 = true,
                // Biases are in the weights.
                Operand::AmxBf16 => return Forms { lines: true, ..forms },
                Operand::F32 => forms.plain = true,
            },
        }
        forms.half_sums = dtype == DType::Nvfp4;
        if let DType::Affine { group_size, .. } = dtype {
            forms.sums[group_size.trailing_zeros() as usize - 5] = true;
        }
        forms
    }
}

/// Forms of activations, see the fields of [`Activations`].
#[derive(Clone, Copy, Debug, Default)]
struct Forms {
    plain: bool,
    sums: [bool; 3],
    nibble_f32: bool,
    nibble_q8: bool,
    q8: bool,
    pairs_bf16: bool,
    pairs_i16: bool,
    half_sums: bool,
    lines: bool,
}

impl Forms {
    fn or(self, other: Forms) -> Forms {
        Forms {
            plain: self.plain || other.plain,
            sums: std::array::from_fn(|i| self.sums[i] || other.sums[i]),
            nibble_f32: self.nibble_f32 || other.nibble_f32,
            nibble_q8: self.nibble_q8 || other.nibble_q8,
            q8: self.q8 || other.q8,
            pairs_bf16: self.pairs_bf16 || other.pairs_bf16,
            pairs_i16: self.pairs_i16 || other.pairs_i16,
            half_sums: self.half_sums || other.half_sums,
            lines: self.lines || other.lines,
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
    /// `[n_rows, blocks * 128]`, element `8 i + j` of a block at `16 j + i`.
    nibble_f32: Vec<f32>,
    /// `[n_rows, blocks * 128]`, element `2 m + j` of a block at `64 j + m`.
    nibble_q8: Vec<i8>,
    /// Scale of each 32-bit lane of a 128-block, `[n_rows, blocks * 16]`.
    nibble_scales: Vec<f32>,
    /// Sum of the 8 integers of each lane, `[n_rows, blocks * 16]`.
    nibble_lane_sums: Vec<i32>,
    /// In order, `[n_rows, blocks * 64]`.
    q8: Integers<i8>,
    /// Scale of each 32-bit lane of a 64-block, `[n_rows, blocks * 16]`.
    byte_scales: Vec<f32>,
    /// `[n_rows, blocks * 8]`, the even ones of eight elements before the odd ones.
    pairs_bf16: Vec<u16>,
    /// In the same order.
    pairs_i16: Integers<i16>,
    /// `[n_rows and some, pitch]`, see the module `amx`.
    #[cfg(target_arch = "x86_64")]
    lines: Vec<amx::Line>,
}

/// Activations rounded to integers that fill the range of `T`, with a scale per group of 32.
#[derive(Debug, Default)]
struct Integers<T> {
    values: Vec<T>,
    /// `[n_rows, groups]`
    scales: Vec<f32>,
    /// Sums of the integers, `[n_rows, groups]`.
    group_sums: Vec<i32>,
    /// The same per 16, `[n_rows, 2 * groups]`.
    half_sums: Vec<i32>,
    /// Sums of the rounded activations per 32, 64 and 128, `[n_rows, width / group]` each.
    sums: [Vec<f32>; 3],
}

/// One row of [`Integers`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct IntegerRow<'a, T> {
    pub(crate) values: &'a [T],
    pub(crate) scales: &'a [f32],
    pub(crate) group_sums: &'a [i32],
    /// Empty unless a matrix has scales per 16.
    pub(crate) half_sums: &'a [i32],
}

/// Which form of the activations sums are of: each kernel's biases meet what its codes meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SumsOf {
    Plain,
    Int8,
    Int16,
}

impl<T: Copy + Default> Integers<T> {
    /// Room for `n_rows` of `width`, of which `per_row` are stored; none if not `wanted`.
    fn room(
        &mut self,
        wanted: bool,
        forms: Forms,
        n_rows: usize,
        width: usize,
        per_row: usize,
    ) -> SharedIntegers<'_, T> {
        let length = |wanted: bool, per_row: usize| if wanted { n_rows * per_row } else { 0 };
        let groups = width.div_ceil(Q8_GROUP);
        // Empty where it is not wanted, which is how rows know.
        self.half_sums.resize(length(wanted && forms.half_sums, 2 * groups), 0);
        SharedIntegers {
            values: room(&mut self.values, length(wanted, per_row)),
            scales: room(&mut self.scales, length(wanted, groups)),
            group_sums: room(&mut self.group_sums, length(wanted, groups)),
            half_sums: SharedMut::new(&mut self.half_sums),
            sums: sums_room(&mut self.sums, |i| length(wanted && forms.sums[i], width / (Q8_GROUP << i))),
        }
    }

    fn row(&self, row: usize, width: usize, block: usize) -> IntegerRow<'_, T> {
        let half_sums =
            if self.half_sums.is_empty() { &[] } else { block_row(&self.half_sums, row, width, Q8_GROUP, 2) };
        IntegerRow {
            values: block_row(&self.values, row, width, block, block),
            scales: block_row(&self.scales, row, width, Q8_GROUP, 1),
            group_sums: block_row(&self.group_sums, row, width, Q8_GROUP, 1),
            half_sums,
        }
    }
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
        let shared = Shared {
            width,
            plain: room(&mut self.plain, lengths(forms.plain, width)),
            sums: sums_room(&mut self.sums, |i| lengths(forms.sums[i], width / (Q8_GROUP << i))),
            nibble_f32: room(&mut self.nibble_f32, lengths(forms.nibble_f32, nibbles)),
            pairs_bf16: room(&mut self.pairs_bf16, lengths(forms.pairs_bf16, width.next_multiple_of(8))),
            nibble_q8: room(&mut self.nibble_q8, lengths(forms.nibble_q8, nibbles)),
            nibble_scales: room(&mut self.nibble_scales, lengths(forms.nibble_q8, nibbles / 8)),
            nibble_lane_sums: room(&mut self.nibble_lane_sums, lengths(forms.nibble_q8, nibbles / 8)),
            byte_scales: room(&mut self.byte_scales, lengths(forms.q8, bytes / 4)),
            q8: self.q8.room(quantized, forms, n_rows, width, bytes),
            pairs_i16: self.pairs_i16.room(forms.pairs_i16, forms, n_rows, width, width.next_multiple_of(8)),
            #[cfg(target_arch = "x86_64")]
            lines: {
                let n = if forms.lines { (n_rows + amx::EXTRA_ROWS) * amx::pitch(width) } else { 0 };
                room(&mut self.lines, n)
            },
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
    pub(crate) fn sums(&self, row: usize, group: usize, of: SumsOf) -> &[f32] {
        let all = match of {
            SumsOf::Plain => &self.sums,
            SumsOf::Int8 => &self.q8.sums,
            SumsOf::Int16 => &self.pairs_i16.sums,
        };
        let n = self.width / group;
        &all[group.trailing_zeros() as usize - 5][row * n..(row + 1) * n]
    }

    pub(crate) fn nibble_f32(&self, row: usize) -> &[f32] {
        block_row(&self.nibble_f32, row, self.width, NIBBLE_BLOCK, NIBBLE_BLOCK)
    }

    pub(crate) fn pairs_bf16(&self, row: usize) -> &[u16] {
        block_row(&self.pairs_bf16, row, self.width, 8, 8)
    }

    /// All rows for AMX, [`amx::pitch`] lines each, and [`amx::EXTRA_ROWS`] more.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn lines(&self) -> &[amx::Line] {
        &self.lines
    }

    /// 8-bit integers in order.
    pub(crate) fn q8(&self, row: usize) -> IntegerRow<'_, i8> {
        self.q8.row(row, self.width, BYTE_BLOCK)
    }

    /// 16-bit integers, the even ones of eight before the odd ones.
    pub(crate) fn pairs_i16(&self, row: usize) -> IntegerRow<'_, i16> {
        self.pairs_i16.row(row, self.width, 8)
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
        (self.q8(row).values, block_row(&self.byte_scales, row, self.width, BYTE_BLOCK, 16))
    }
}

/// The first `n` elements, more memory being taken if it has fewer; it never gives any back, for what comes back is zeros that
/// one thread writes.
fn room<T: Copy + Default>(memory: &mut Vec<T>, n: usize) -> SharedMut<'_, T> {
    if memory.len() < n {
        memory.resize(n, T::default());
    }
    SharedMut::new(&mut memory[..n])
}

/// The same for sums of each size of groups, the `i`-th of which are `n(i)`.
fn sums_room(sums: &mut [Vec<f32>; 3], n: impl Fn(usize) -> usize) -> [SharedMut<'_, f32>; 3] {
    let [a, b, c] = sums;
    [(a, 0), (b, 1), (c, 2)].map(|(sums, i)| room(sums, n(i)))
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
    nibble_f32: SharedMut<'a, f32>,
    pairs_bf16: SharedMut<'a, u16>,
    nibble_q8: SharedMut<'a, i8>,
    nibble_scales: SharedMut<'a, f32>,
    nibble_lane_sums: SharedMut<'a, i32>,
    byte_scales: SharedMut<'a, f32>,
    q8: SharedIntegers<'a, i8>,
    pairs_i16: SharedIntegers<'a, i16>,
    #[cfg(target_arch = "x86_64")]
    lines: SharedMut<'a, amx::Line>,
}

struct SharedIntegers<'a, T> {
    values: SharedMut<'a, T>,
    scales: SharedMut<'a, f32>,
    group_sums: SharedMut<'a, i32>,
    half_sums: SharedMut<'a, i32>,
    sums: [SharedMut<'a, f32>; 3],
}

impl<T> SharedIntegers<'_, T> {
    /// Rounds `x` to integers of magnitude `limit` and less, 128 at a time, which `store(start, integers)` takes.
    #[inline(always)]
    fn fill(
        &self,
        limit: f32,
        row: usize,
        n_rows: usize,
        x: &[f32],
        mut store: impl FnMut(usize, &[i32; NIBBLE_BLOCK], &mut [T]),
    ) {
        let (scales, sums) = (own(&self.scales, row, n_rows), own(&self.group_sums, row, n_rows));
        let halves = own(&self.half_sums, row, n_rows);
        let values = own(&self.values, row, n_rows);
        for (b, block) in x.chunks(NIBBLE_BLOCK).enumerate() {
            let mut integers = [0i32; NIBBLE_BLOCK];
            for (g, group) in block.chunks(Q8_GROUP).enumerate() {
                let largest = group.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
                let largest = f32::from_bits(largest);
                let inverse = if largest > 0.0 { limit / largest } else { 0.0 };
                for (q, v) in integers[g * Q8_GROUP..].iter_mut().zip(group) {
                    // Adding 1.5 * 2^23 leaves the value rounded to nearest even in the low bits.
                    let bits = (v * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
                    // NaN, which the scale carries on, leaves bits that are no integer of this size.
                    *q = i32::from(bits as i16);
                }
                let (first, second) = integers[g * Q8_GROUP..][..Q8_GROUP].split_at(Q8_GROUP / 2);
                let (first, second) = (first.iter().sum::<i32>(), second.iter().sum::<i32>());
                scales[b * 4 + g] = largest / limit;
                sums[b * 4 + g] = first + second;
                if !halves.is_empty() {
                    halves[8 * b + 2 * g..][..2].copy_from_slice(&[first, second]);
                }
            }
            store(b * NIBBLE_BLOCK, &integers, &mut *values);
        }
        for (i, out) in self.sums.iter().enumerate() {
            let groups = scales.chunks_exact(1 << i).zip(sums.chunks_exact(1 << i));
            for (out, (scales, sums)) in own(out, row, n_rows).iter_mut().zip(groups) {
                *out = scales.iter().zip(sums).map(|(scale, sum)| scale * *sum as f32).sum();
            }
        }
    }
}

impl Shared<'_> {
    #[allow(unsafe_code)]
    fn fill(&self, isa: Isa, forms: Forms, row: usize, n_rows: usize, x: &[f32]) {
        match isa {
            // SAFETY: the ISA is only available on processors that have it.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe {
                self.fill_avx512(forms, row, n_rows, x);
                if forms.lines {
                    let n = self.width / Q8_GROUP;
                    amx::fill_lines(x, self.lines.slice(row * amx::pitch(self.width), n));
                }
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { self.fill_avx2(forms, row, n_rows, x) },
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

    /// The same loops, compiled for AVX2.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx2")]
    unsafe fn fill_avx2(&self, forms: Forms, row: usize, n_rows: usize, x: &[f32]) {
        self.fill_row(forms, row, n_rows, x);
    }

    #[inline(always)]
    fn fill_row(&self, forms: Forms, row: usize, n_rows: usize, x: &[f32]) {
        assert_eq!(x.len(), self.width);
        if forms.plain {
            own(&self.plain, row, n_rows).copy_from_slice(x);
        }
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
        if forms.pairs_i16 {
            self.pairs_i16.fill(32767.0, row, n_rows, x, |start, integers, out| {
                let n = (out.len() - start).min(NIBBLE_BLOCK);
                reorder::<2, _, _>(&integers[..n], 8, &mut out[start..start + n], |q| q as i16);
            });
        }
        if !forms.nibble_q8 && !forms.q8 {
            return;
        }
        self.q8.fill(127.0, row, n_rows, x, |start, integers, out| {
            let codes = integers.map(|q| q as i8);
            let n = (out.len() - start).min(NIBBLE_BLOCK);
            out[start..start + n].copy_from_slice(&codes[..n]);
            if forms.nibble_q8 {
                let out = &mut own(&self.nibble_q8, row, n_rows)[start..][..NIBBLE_BLOCK];
                reorder::<2, _, _>(&codes, NIBBLE_BLOCK, out, |v| v);
                let lane_sums = &mut own(&self.nibble_lane_sums, row, n_rows)[start / 8..][..16];
                for (lane, sum) in lane_sums.iter_mut().enumerate() {
                    *sum = integers[lane * 8..lane * 8 + 8].iter().sum();
                }
            }
        });
        let scales = own(&self.q8.scales, row, n_rows);
        if forms.nibble_q8 {
            lanes(scales, NIBBLE_BLOCK, own(&self.nibble_scales, row, n_rows));
        }
        if forms.q8 {
            lanes(scales, BYTE_BLOCK, own(&self.byte_scales, row, n_rows));
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
