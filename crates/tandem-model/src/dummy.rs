//! Random weights of true shapes and formats, made in memory, for measuring speed without a checkpoint.
//!
//! Values are such that activations stay of order one; every byte is written, so every page is resident. The output of
//! such a model means nothing.

use std::num::NonZero;

use tandem_core::weights::{Form, MatrixData, MatrixPart, ModuleKind, Weight, WeightSpec};
use tandem_core::{CheckpointError, DType, Float, ModelConfig};

use crate::loader::WeightTable;
use crate::{WeightSource, weight_specs};

/// Which module gets which format; router gates and vectors are never quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// Routed experts mxfp4, everything else affine 8-bit in groups of 64.
    Mxfp4Q8,
    /// Affine 4-bit in groups of 64.
    Affine4,
    /// Affine 8-bit in groups of 64.
    Affine8,
}

impl Recipe {
    /// Name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Recipe::Mxfp4Q8 => "mxfp4-q8",
            Recipe::Affine4 => "affine4",
            Recipe::Affine8 => "affine8",
        }
    }

    fn dtype(self, spec: &WeightSpec) -> DType {
        let (_, _, cols) = spec.dims();
        let affine = |bits| DType::Affine { bits, group_size: 64, params: Float::BF16 };
        match (self, spec.kind) {
            _ if spec.leaf == "e_score_correction_bias" => DType::F32,
            _ if spec.form == Form::Vector => DType::BF16,
            (_, ModuleKind::Router) => DType::BF16,
            (Recipe::Mxfp4Q8, ModuleKind::RoutedExperts) if cols.is_multiple_of(32) => DType::Mxfp4,
            _ if !cols.is_multiple_of(64) => DType::BF16,
            (Recipe::Affine4, _) => affine(4),
            (Recipe::Mxfp4Q8 | Recipe::Affine8, _) => affine(8),
        }
    }
}

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
    pub fn new(config: &ModelConfig, recipe: Recipe, stacks: Stacks) -> DummyWeights {
        let list: Vec<Weight> = weight_specs(config)
            .into_iter()
            .map(|spec| {
                let dtype = recipe.dtype(&spec);
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
        // Products keep the size of their input when elements have variance 1 / cols; an embedding is not a product.
        let fan_in = if weight.spec.kind == ModuleKind::Embed { 1.0 } else { cols as f32 };
        let dtype = weight.dtype;
        let seed = seed_of(module);
        let sized = |n: usize| vec![0u8; stack * n];
        let mut whole = MatrixPart::default();
        let mut elements = sized(dtype.weight_bytes(rows, cols));
        match dtype {
            DType::Float(float) => {
                let step = (12.0 / fan_in).sqrt() / 256.0;
                fill_from_table(&mut elements, float, seed, |i| (i as f32 - 127.5) * step);
            }
            DType::Affine { bits, params, .. } => {
                fill_random(&mut elements, seed);
                let scale = |i: usize| 2.0 / (f32::from(1u16 << bits) * fan_in.sqrt()) * (0.75 + i as f32 / 512.0);
                let mut scales = sized(dtype.scale_bytes(rows, cols));
                fill_from_table(&mut scales, params, !seed, scale);
                let mut biases = sized(dtype.bias_bytes(rows, cols));
                fill_from_table(&mut biases, params, !seed, |i| -scale(i) * f32::from(1u16 << (bits - 1)));
                (whole.scales, whole.biases) = (scales.into(), biases.into());
            }
            DType::Mxfp4 => {
                fill_random(&mut elements, seed);
                // e8m0 scales, one of two neighbouring powers of two; uniform e2m1 codes have an rms of 2.9.
                let base = (127.0 - fan_in.log2() / 2.0 - 1.0).round() as u8;
                let mut scales = sized(dtype.scale_bytes(rows, cols));
                fill_random(&mut scales, !seed);
                scales.iter_mut().for_each(|byte| *byte = base - (*byte & 1));
                whole.scales = scales.into();
            }
            DType::Mxfp8 | DType::Nvfp4 | DType::Fp8Block => unreachable!("no recipe has {dtype}"),
        }
        whole.weight = elements.into();
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

/// Random bytes, on every core.
fn fill_random(out: &mut [u8], seed: u64) {
    in_parallel(out, 64, |part, out| {
        let mut lanes = Lanes::new(seed ^ (part << 32));
        for chunk in out.chunks_mut(64) {
            chunk.copy_from_slice(&lanes.next()[..chunk.len()]);
        }
    });
}

/// Random picks of `value(0..256)`, on every core; equal seeds pick alike.
fn fill_from_table(out: &mut [u8], float: Float, seed: u64, value: impl Fn(usize) -> f32) {
    let size = float.bytes();
    let mut table = Vec::with_capacity(256 * size);
    (0..256).for_each(|i| float.write(value(i), &mut table));
    in_parallel(out, 64 * size, |part, out| {
        let mut lanes = Lanes::new(seed ^ (part << 32));
        for chunk in out.chunks_mut(64 * size) {
            for (element, pick) in chunk.chunks_exact_mut(size).zip(lanes.next()) {
                element.copy_from_slice(&table[usize::from(pick) * size..][..size]);
            }
        }
    });
}

/// Cuts `out` into parts of whole `unit`s, one per core.
fn in_parallel(out: &mut [u8], unit: usize, fill: impl Fn(u64, &mut [u8]) + Sync) {
    let n_parts = if out.len() < 1 << 20 { 1 } else { std::thread::available_parallelism().map_or(1, NonZero::get) };
    let size = out.len().div_ceil(n_parts).next_multiple_of(unit).max(unit);
    std::thread::scope(|scope| {
        for (part, out) in out.chunks_mut(size).enumerate() {
            let fill = &fill;
            scope.spawn(move || fill(part as u64, out));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_is_finite_and_of_the_right_size() {
        for (dtype, cols) in [
            (DType::BF16, 96),
            (DType::Mxfp4, 96),
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
