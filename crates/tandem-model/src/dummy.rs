//! Random weights of true shapes and formats, made in memory, for measuring speed without a checkpoint.
//!
//! Values are such that activations stay of order one; every byte is written, so every page is resident. The output of
//! such a model means nothing.

use std::num::NonZero;

use tandem_core::quant::minifloat::e4m3_encode;
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind, Weight};
use tandem_core::{CheckpointError, DType, Float, ModelConfig};

use crate::loader::WeightTable;
use crate::{Recipe, WeightSource, weight_specs};

/// Whether the matrices of a stack differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stacks {
    /// Each has random bits of its own, as a processor's caches could tell.
    Distinct,
    /// All share the first one's: for devices that copy them.
    Repeated,
}

/// The weights of a configuration, filled with random bits when asked for.
pub struct DummyWeights {
    list: Vec<Weight>,
    table: WeightTable,
    stacks: Stacks,
}

impl DummyWeights {
    /// Plans every weight; no memory is taken yet.
    pub fn new(config: &ModelConfig, recipe: &Recipe, stacks: Stacks) -> DummyWeights {
        let list: Vec<Weight> = weight_specs(config)
            .into_iter()
            .map(|spec| {
                let plain = if spec.leaf == "e_score_correction_bias" { DType::F32 } else { DType::BF16 };
                let dtype = recipe.dtype(&spec, plain, Float::BF16);
                Weight::nowhere(spec, dtype)
            })
            .collect();
        DummyWeights { table: WeightTable::new(list.clone()), list, stacks }
    }

    /// Every weight, for accounting.
    pub fn weights(&self) -> &[Weight] {
        &self.list
    }
}

impl WeightSource for DummyWeights {
    fn matrix(&self, module: &str) -> Result<MatrixData, CheckpointError> {
        let weight = self.table.get(module, "weight")?;
        let (n, rows, cols) = weight.spec.dims();
        let stack = if self.stacks == Stacks::Repeated { 1 } else { n };
        let dtype = weight.dtype;
        let (row_bytes, scale_bytes, bias_bytes) =
            (dtype.weight_bytes(1, cols), dtype.scale_bytes(1, cols), dtype.bias_bytes(1, cols));
        let zeros = |bytes: usize| vec![0u8; stack * rows * bytes];
        let (mut elements, mut scales, mut biases) = (zeros(row_bytes), zeros(scale_bytes), zeros(bias_bytes));
        let n_cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let n_rows = (stack * rows).div_ceil(n_cores).max(1);
        let random = RandomRows::new(weight);
        std::thread::scope(|scope| {
            let mut scales = scales.chunks_mut((n_rows * scale_bytes).max(1));
            let mut biases = biases.chunks_mut((n_rows * bias_bytes).max(1));
            for (i, elements) in elements.chunks_mut(n_rows * row_bytes).enumerate() {
                let (scales, biases) = (scales.next().unwrap_or_default(), biases.next().unwrap_or_default());
                let random = &random;
                scope.spawn(move || random.fill(i * n_rows, elements, scales, biases));
            }
        });
        let whole =
            MatrixPart { weight: elements.into(), scales: scales.into(), biases: biases.into(), global_scale: None };
        if self.stacks == Stacks::Repeated {
            return Ok(MatrixData { name: module.to_string(), dtype, rows, cols, parts: vec![whole; n] });
        }
        Ok(weight.matrix_of(&whole))
    }

    fn vector(&self, module: &str, leaf: &str) -> Result<Vec<f32>, CheckpointError> {
        let (_, _, len) = self.table.get(module, leaf)?.spec.dims();
        Ok(vec![if leaf == "weight" { 1.0 } else { 0.0 }; len])
    }
}

/// FNV-1a: the same module always gets the same bits.
fn seed_of(module: &str) -> u64 {
    module.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Eight independent xorshift64 generators (Marsaglia 2003), so that the loop vectorises.
struct Lanes([u64; 8]);

impl Lanes {
    fn new(seed: u64) -> Lanes {
        // Weyl steps through a mixing function: neighbouring seeds get unrelated, non-zero states.
        Lanes(std::array::from_fn(|i| {
            let mut x = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (x ^ (x >> 31)) | 1
        }))
    }

    fn next(&mut self) -> [u8; 64] {
        for x in &mut self.0 {
            *x ^= *x << 13;
            *x ^= *x >> 7;
            *x ^= *x << 17;
        }
        let mut bytes = [0; 64];
        for (bytes, x) in bytes.chunks_exact_mut(8).zip(self.0) {
            bytes.copy_from_slice(&x.to_le_bytes());
        }
        bytes
    }
}

/// Makes any rows of one weight; a row's bits depend on the module's name and the row's number only.
pub struct RandomRows {
    dtype: DType,
    cols: usize,
    seed: u64,
    /// 256 values: of elements (plain floats), else of scales.
    table: Vec<u8>,
    /// 256 biases that go with the scales.
    biases: Vec<u8>,
}

impl RandomRows {
    /// For the matrix or stack `weight`.
    pub fn new(weight: &Weight) -> RandomRows {
        let (dtype, (_, _, cols)) = (weight.dtype, weight.spec.dims());
        // Products keep the size of their input when elements have variance 1 / cols; an embedding is not a product.
        let fan_in = if weight.spec.kind == ModuleKind::Embed { 1.0 } else { cols as f32 };
        let table = |float: Float, value: &dyn Fn(usize) -> f32| {
            let mut bytes = Vec::with_capacity(256 * float.bytes());
            (0..256).for_each(|i| float.write(value(i), &mut bytes));
            bytes
        };
        // A power of two, or the next smaller: e8m0.
        let power = |rms: f32| -> Vec<u8> {
            let base = (127.5 - (fan_in.sqrt() * rms).log2()).round() as u8;
            (0..=255).map(|i| base - (i & 1)).collect()
        };
        let (values, biases) = match dtype {
            DType::Float(float) => {
                let step = (12.0 / fan_in).sqrt() / 256.0;
                (table(float, &|i| (i as f32 - 127.5) * step), vec![])
            }
            DType::Affine { bits, params, .. } => {
                let scale = |i: usize| 2.0 / (f32::from(1u16 << bits) * fan_in.sqrt()) * (0.75 + i as f32 / 512.0);
                (table(params, &scale), table(params, &|i| -scale(i) * f32::from(1u16 << (bits - 1))))
            }
            // The rms of uniform e2m1 codes, and of e4m3 codes without their highest exponent bit.
            DType::Mxfp4 => (power(2.9), vec![]),
            DType::Mxfp8 => (power(0.6), vec![]),
            DType::Nvfp4 => (vec![e4m3_encode(1.0 / (2.9 * fan_in.sqrt())).max(1); 256], vec![]),
            DType::Fp8Block => unreachable!("no recipe has {dtype}"),
        };
        RandomRows { dtype, cols, seed: seed_of(&weight.spec.module), table: values, biases }
    }

    /// Fills whole rows, from row `first_row` of the stack on; the slices are as long as the rows need.
    pub fn fill(&self, first_row: usize, elements: &mut [u8], scales: &mut [u8], biases: &mut [u8]) {
        let (dtype, cols) = (self.dtype, self.cols);
        let mut scales = scales.chunks_mut(dtype.scale_bytes(1, cols).max(1));
        let mut biases = biases.chunks_mut(dtype.bias_bytes(1, cols).max(1));
        for (row, elements) in elements.chunks_mut(dtype.weight_bytes(1, cols).max(1)).enumerate() {
            let seed = self.seed ^ ((first_row + row) as u64) << 32;
            let (scales, biases) = (scales.next().unwrap_or_default(), biases.next().unwrap_or_default());
            match dtype {
                DType::Float(float) => pick(elements, &self.table, float.bytes(), seed),
                DType::Affine { params, .. } => {
                    random(elements, seed, 0xff);
                    pick(scales, &self.table, params.bytes(), !seed);
                    pick(biases, &self.biases, params.bytes(), !seed);
                }
                DType::Mxfp4 | DType::Mxfp8 | DType::Nvfp4 | DType::Fp8Block => {
                    // Without bit 6, no e4m3 byte is NaN.
                    random(elements, seed, if dtype == DType::Mxfp8 { 0xbf } else { 0xff });
                    pick(scales, &self.table, 1, !seed);
                }
            }
        }
    }
}

/// Random bytes with the bits of `mask`.
fn random(out: &mut [u8], seed: u64, mask: u8) {
    let mut lanes = Lanes::new(seed);
    for chunk in out.chunks_mut(64) {
        let bytes = lanes.next().map(|byte| byte & mask);
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}

/// Random entries of a table of 256; equal seeds pick alike.
fn pick(out: &mut [u8], table: &[u8], size: usize, seed: u64) {
    let mut lanes = Lanes::new(seed);
    for chunk in out.chunks_mut(64 * size) {
        for (element, pick) in chunk.chunks_exact_mut(size).zip(lanes.next()) {
            element.copy_from_slice(&table[usize::from(pick) * size..][..size]);
        }
    }
}

#[cfg(test)]
mod tests {
    use tandem_core::weights::{Form, WeightSpec};

    use super::*;

    #[test]
    fn every_format_is_finite_and_of_the_right_size() {
        for (dtype, cols) in [
            (DType::BF16, 96),
            (DType::Mxfp4, 96),
            (DType::Mxfp8, 96),
            (DType::Nvfp4, 96),
            (DType::Affine { bits: 4, group_size: 64, params: Float::BF16 }, 1024),
            (DType::Affine { bits: 8, group_size: 64, params: Float::BF16 }, 128),
        ] {
            let spec = WeightSpec::matrix("m", &[3, 40, cols], ModuleKind::RoutedExperts, Form::Experts);
            let weight = Weight::nowhere(spec, dtype);
            let table = WeightTable::new(vec![weight]);
            let mut dummy = DummyWeights { list: vec![], table, stacks: Stacks::Repeated };
            let data = dummy.matrix("m").expect("made up");
            assert_eq!(data.view(0).dequantize(), data.view(2).dequantize());
            dummy.stacks = Stacks::Distinct;
            let data = dummy.matrix("m").expect("made up");
            assert_eq!(data.parts.len(), 3);
            assert_ne!(data.view(0).dequantize(), data.view(2).dequantize());
            let values: Vec<f32> = (0..3).flat_map(|part| data.view(part).dequantize()).collect();
            assert!(values.iter().all(|v| v.is_finite()), "{dtype}");
            let rms = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt() * (cols as f32).sqrt();
            assert!((0.4..2.0).contains(&rms), "{dtype}: rms {rms} of 1/sqrt(cols)");
        }
    }
}
