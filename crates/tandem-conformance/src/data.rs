//! Made-up inputs: values, matrices in every format, batches of sequences whose pages are out of order.

use bytes::Bytes;
use tandem_core::backend::{Batch, PAGE_SIZE, Rope, RopeLayout};
use tandem_core::weights::{MatrixData, MatrixPart};
use tandem_core::{DType, Float, quant};

/// Affine 8-bit in groups of 64, what checkpoints keep beside MXFP4.
pub(crate) const AFFINE8: DType = affine(8, 64, Float::BF16);

const fn affine(bits: u8, group_size: u16, params: Float) -> DType {
    DType::Affine { bits, group_size, params }
}

/// A format of each kind, and of each width of codes.
pub(crate) const FORMATS: [DType; 18] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Mxfp4,
    DType::Mxfp8,
    DType::Nvfp4,
    DType::Fp8Block,
    affine(2, 64, Float::BF16),
    affine(3, 32, Float::BF16),
    affine(4, 32, Float::F16),
    affine(4, 64, Float::BF16),
    affine(4, 128, Float::F32),
    affine(5, 64, Float::F16),
    affine(6, 64, Float::BF16),
    affine(8, 32, Float::F16),
    AFFINE8,
    affine(8, 128, Float::F32),
    affine(6, 128, Float::F32),
];

/// Every format that a weight can have.
pub(crate) fn every_format() -> Vec<DType> {
    let mut formats: Vec<DType> = FORMATS.into_iter().filter(|f| !matches!(f, DType::Affine { .. })).collect();
    for bits in [2, 3, 4, 5, 6, 8] {
        for group_size in [32, 64, 128] {
            formats.extend([Float::F32, Float::F16, Float::BF16].map(|params| affine(bits, group_size, params)));
        }
    }
    formats
}

/// The name of a format, with what its own name leaves out.
pub(crate) fn format_name(dtype: DType) -> String {
    match dtype {
        DType::Affine { params, .. } => format!("{dtype}:{params}"),
        _ => dtype.to_string(),
    }
}

/// Whether rows of `cols` elements can have this format.
pub(crate) fn fits(dtype: DType, cols: usize) -> bool {
    dtype == DType::Fp8Block || cols.is_multiple_of(dtype.group_size())
}

/// A cheap deterministic sequence, even in -1..1.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// The same, in values that bf16 has.
pub(crate) fn coarse(seed: u64, n: usize) -> Vec<f32> {
    noise(seed, n).into_iter().map(|v| f32::from_bits(v.to_bits() & 0xffff_0000)).collect()
}

/// The same, in eighths: sums of products of a few thousand of these are exact in f32, in any order.
pub(crate) fn grid(seed: u64, n: usize) -> Vec<f32> {
    noise(seed, n).into_iter().map(|v| (v * 8.0).round() / 8.0).collect()
}

/// A stack of matrices of noise. The first group of each is zero, and one of the second row far smaller than the rest.
pub(crate) fn matrix(dtype: DType, stack: usize, rows: usize, cols: usize, seed: u64) -> MatrixData {
    let parts = (0..stack)
        .map(|i| {
            let mut values = noise(seed + i as u64, rows * cols);
            values[..cols.min(32)].fill(0.0);
            values.iter_mut().skip(cols).take(32).for_each(|v| *v *= 1e-6);
            part(dtype, rows, cols, &values)
        })
        .collect();
    named(dtype, rows, cols, parts)
}

fn named(dtype: DType, rows: usize, cols: usize, parts: Vec<MatrixPart>) -> MatrixData {
    MatrixData { name: format_name(dtype), dtype, rows, cols, parts }
}

fn part(dtype: DType, rows: usize, cols: usize, values: &[f32]) -> MatrixPart {
    let packed = quant::quantize(dtype, rows, cols, values).expect("the suite's shapes fit their formats");
    // NVFP4 may have a scale of the whole matrix, in units of 2688.
    let global_scale = (dtype == DType::Nvfp4 && rows.is_multiple_of(2)).then_some(2688.0 * 0.75);
    MatrixPart {
        weight: packed.weight.into(),
        scales: packed.scales.into(),
        biases: packed.biases.into(),
        global_scale,
    }
}

/// Different rows of a large matrix, which repeats them: a prime, so that no power of two of rows hides a mistake.
const DISTINCT_ROWS: usize = 251;

/// A large stack of noise whose rows repeat, as do its matrices after the first `distinct`.
pub(crate) fn large_matrix(
    dtype: DType,
    (stack, distinct): (usize, usize),
    (rows, cols): (usize, usize),
    seed: u64,
) -> MatrixData {
    assert!(dtype != DType::Fp8Block, "whose scales belong to several rows");
    let all: Vec<usize> = (0..rows).map(|row| row % DISTINCT_ROWS).collect();
    let parts: Vec<MatrixPart> = (0..distinct as u64)
        .map(|i| {
            let base = part(dtype, DISTINCT_ROWS, cols, &noise(1000 * seed + i, DISTINCT_ROWS * cols));
            take_rows(&base, DISTINCT_ROWS, &all)
        })
        .collect();
    named(dtype, rows, cols, (0..stack).map(|i| parts[i % distinct].clone()).collect())
}

/// Rows to compare of a matrix of `rows`: the first, the last, and others all over.
pub(crate) fn sample_of(rows: usize) -> Vec<usize> {
    let mut sample: Vec<usize> = (0..96).map(|i| i * 7919 % rows).chain([rows - 1]).collect();
    sample.sort_unstable();
    sample.dedup();
    sample
}

/// These rows of every matrix of a stack.
pub(crate) fn sampled(data: &MatrixData, rows: &[usize]) -> MatrixData {
    let parts = data.parts.iter().map(|p| take_rows(p, data.rows, rows)).collect();
    MatrixData { name: data.name.clone(), dtype: data.dtype, rows: rows.len(), cols: data.cols, parts }
}

fn take_rows(part: &MatrixPart, n_rows: usize, rows: &[usize]) -> MatrixPart {
    let take = |bytes: &Bytes| -> Bytes {
        let row_bytes = bytes.len() / n_rows;
        let mut taken = Vec::with_capacity(rows.len() * row_bytes);
        rows.iter().for_each(|row| taken.extend_from_slice(&bytes[row * row_bytes..(row + 1) * row_bytes]));
        taken.into()
    };
    MatrixPart {
        weight: take(&part.weight),
        scales: take(&part.scales),
        biases: take(&part.biases),
        global_scale: part.global_scale,
    }
}

/// A batch of `n` rows whose tokens, positions and pages do not matter.
pub(crate) fn plain_batch(n: usize) -> Batch {
    Batch {
        tokens: vec![0; n],
        positions: vec![0; n],
        sequences: vec![0; n],
        block_tables: vec![vec![0]],
        logits_rows: vec![],
        sampling: vec![],
    }
}

/// Sequences in [`tables`].
pub(crate) const SEQUENCES: usize = 3;

/// Pages of three sequences, interleaved; those of the first backwards, those of the second in steps.
pub(crate) fn tables(context: usize) -> Vec<Vec<u32>> {
    let pages = context.div_ceil(PAGE_SIZE) as u32;
    // A step that has no divisor in common with the number of pages visits all of them.
    let step = (2..).find(|s| gcd(*s, pages) == 1).unwrap_or(1);
    vec![
        (0..pages).map(|p| 3 * (pages - 1 - p)).collect(),
        (0..pages).map(|p| 3 * (p * step % pages) + 1).collect(),
        (0..pages).map(|p| 3 * p + 2).collect(),
    ]
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Slots of a cache for [`tables`].
pub(crate) fn slots(context: usize) -> usize {
    SEQUENCES * context.div_ceil(PAGE_SIZE) * PAGE_SIZE
}

/// `n` rows near the end of all sequences.
pub(crate) fn last_rows(n: usize, context: usize) -> Batch {
    Batch {
        positions: (0..n).map(|r| (context - 1).saturating_sub(r / SEQUENCES * 3) as u32).collect(),
        sequences: (0..n).map(|r| (r % SEQUENCES) as u32).collect(),
        block_tables: tables(context),
        ..plain_batch(n)
    }
}

/// Batches of up to `rows` rows that together hold every position of the sequences in `tables`.
pub(crate) fn all_positions(context: usize, tables: &[Vec<u32>], rows: usize) -> Vec<Batch> {
    let all: Vec<(u32, u32)> =
        (0..tables.len() as u32).flat_map(|s| (0..context as u32).map(move |p| (s, p))).collect();
    all.chunks(rows)
        .map(|chunk| Batch {
            positions: chunk.iter().map(|c| c.1).collect(),
            sequences: chunk.iter().map(|c| c.0).collect(),
            block_tables: tables.to_vec(),
            ..plain_batch(chunk.len())
        })
        .collect()
}

/// A rotary embedding of `dim` elements.
pub(crate) fn rope(dim: usize, layout: RopeLayout) -> Rope {
    let inv_freq = (0..dim / 2).map(|i| 10000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
    Rope { inv_freq, scaling: 1.1, layout }
}
