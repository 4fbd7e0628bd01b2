//! Matrix products: one matrix, several on one input, one per head, and MLPs.

use tandem_core::backend::Heads;
use tandem_core::weights::MatrixData;
use tandem_core::{Backend, DType, Float};

use crate::data::{AFFINE8, FORMATS, coarse, every_format, fits, format_name, matrix, noise, sampled};
use crate::subject::{MlpData, POISON};
use crate::tolerance::{Budget, EVEN, GATED};
use crate::{Case, Oracle, Precision, Rounding, Subject, Suite, compare, rms, same};

/// Rows up to which a row's result does not depend on its batch, and from which on weights may be rounded.
const EXACT_ROWS: usize = 64;

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>, batches: &[usize]) {
    let one_row = batches.len() == 1;
    // Every format at one shape, and some formats at ragged ones.
    for dtype in every_format() {
        suite.case(&Linear::new(dtype, 37, 384, batches[batches.len() / 2], Input::Coarse));
    }
    let shapes =
        [(1, 32), (3, 64), (4, 96), (7, 128), (5, 160), (17, 256), (64, 384), (130, 512), (33, 2176), (40, 6144)];
    for (i, (rows, cols)) in shapes.into_iter().enumerate() {
        for dtype in FORMATS.into_iter().filter(|dtype| fits(*dtype, cols)) {
            let all = matches!(dtype, DType::Mxfp4 | DType::BF16) || dtype == AFFINE8;
            for (j, n) in batches.iter().enumerate() {
                // Formats with kernels of their own meet every batch, the others two at each shape.
                if !one_row && !all && j % 4 != i % 4 {
                    continue;
                }
                suite.case(&Linear::new(dtype, rows, cols, *n, Input::Coarse));
                if all && (one_row || j % 2 == i % 2) {
                    suite.case(&Linear::new(dtype, rows, cols, *n, Input::Noise));
                }
            }
        }
    }
    for n in batches {
        suite.case(&Several { n: *n });
    }
    for dtype in [AFFINE8, DType::BF16, DType::Mxfp4] {
        for (n_heads, cols, rows) in [(4, 64, 64), (3, 192, 128), (9, 128, 40)] {
            batches.iter().for_each(|n| suite.case(&ByHead { dtype, n_heads, cols, rows, n: *n }));
        }
    }
    let affine4 = DType::Affine { bits: 4, group_size: 64, params: Float::BF16 };
    for dtype in [AFFINE8, DType::Mxfp4, DType::BF16, affine4, DType::Nvfp4] {
        for n in batches {
            let mlp = [(320, 128), (320, 128), (128, 320)].map(|(r, c)| matrix(dtype, 1, r, c, 5));
            suite.case(&DenseMlp { mlp, n: *n, only: None });
        }
    }
    for byte in [0, 1, 2, 60, 96, 126, 127, 128, 192, 193, 200, 240] {
        suite.case(&UniformScale { byte });
    }
    suite.case(&NanScale);
    if !one_row {
        for dtype in FORMATS {
            suite.case(&SameInAnyBatch { dtype, cols: 256 });
        }
        for dtype in [DType::Mxfp4, AFFINE8, DType::BF16] {
            suite.case(&SameInAnyBatch { dtype, cols: 2048 });
        }
        // A prefill chunk, and more rows of weights than one block or task has.
        for (dtype, cols) in [(DType::Mxfp4, 96), (AFFINE8, 64), (DType::BF16, 72)] {
            suite.case(&Linear::new(dtype, 1030, cols, 300, Input::Coarse));
        }
    }
    for n in [1, *batches.last().unwrap_or(&1)] {
        for dtype in [DType::Mxfp4, AFFINE8, DType::BF16, DType::F32] {
            suite.case(&NanRow { dtype, n });
        }
    }
}

/// Values of a product's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// Those of bf16, which a backend that rounds to bf16 keeps.
    Coarse,
    /// Any.
    Noise,
}

impl Input {
    fn values(self, seed: u64, n: usize) -> Vec<f32> {
        match self {
            Input::Coarse => coarse(seed, n),
            Input::Noise => noise(seed, n),
        }
    }

    /// What is left of a rounding of these values.
    fn after(self, rounding: Rounding) -> Rounding {
        if self == Input::Coarse && rounding == Rounding::Bf16 { Rounding::None } else { rounding }
    }
}

/// How activations of `n` rows are rounded as they meet weights of a format.
pub(crate) fn activations(precision: Precision, dtype: DType, n: usize) -> Rounding {
    let is_packed = matches!(dtype, DType::Mxfp4 | DType::Nvfp4 | DType::Affine { .. });
    if let Some(rounding) = precision.prefill_packed.filter(|_| is_packed && n > EXACT_ROWS) {
        return rounding;
    }
    match dtype {
        DType::Mxfp4 | DType::Affine { bits: 4 | 8, .. } => precision.packed,
        DType::Nvfp4 | DType::Affine { .. } => precision.other_packed,
        DType::Mxfp8 | DType::Fp8Block => precision.fp8,
        DType::BF16 => precision.bf16,
        DType::Float(_) => Rounding::None,
    }
}

/// The error of a product of `n` rows with `cols` columns, the rounding of its input left out.
pub(crate) fn product(precision: Precision, dtype: DType, n: usize, cols: usize) -> Budget {
    let sum = Budget::sum(cols).and(Budget::steps(2)).and(Budget::of_sums(precision.sums, cols));
    match dtype {
        DType::Affine { .. } if n > EXACT_ROWS => sum.of_affine().and(Budget::rounded(precision.prefill_weights, EVEN)),
        DType::Affine { .. } => sum.of_affine(),
        _ => sum,
    }
}

/// The error of an MLP whose input is coarse: both inner products count, then SiLU and their product, then the intermediate
/// values are rounded for the outer one.
pub(crate) fn mlp_budget(precision: Precision, mlp: &MlpData, n: usize) -> Budget {
    let [gate, _, down] = mlp;
    let input = Budget::rounded(Input::Coarse.after(activations(precision, gate.dtype, n)), EVEN);
    let inner = product(precision, gate.dtype, n, gate.cols).and(input).times(2.0);
    let middle = Budget::steps(8).and(Budget::rounded(activations(precision, down.dtype, n), GATED));
    inner.and(middle).and(product(precision, down.dtype, n, down.cols))
}

/// [`Backend::linear`] with one matrix.
pub(crate) struct Linear {
    pub(crate) weights: MatrixData,
    pub(crate) n: usize,
    pub(crate) input: Input,
    /// Rows of the weights that are compared; all if none.
    pub(crate) only: Option<Vec<usize>>,
}

impl Linear {
    pub(crate) fn new(dtype: DType, rows: usize, cols: usize, n: usize, input: Input) -> Linear {
        Linear { weights: matrix(dtype, 1, rows, cols, 7), n, input, only: None }
    }

    fn input(&self) -> Vec<f32> {
        self.input.values(self.n as u64 + 99, self.n * self.weights.cols)
    }
}

/// Columns `only` of rows of `width`; all if there is no choice.
pub(crate) fn columns(values: Vec<f32>, width: usize, only: Option<&[usize]>) -> Vec<f32> {
    let Some(only) = only else { return values };
    values.chunks_exact(width).flat_map(|row| only.iter().map(|i| row[*i])).collect()
}

impl Case for Linear {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        let MatrixData { dtype, rows, cols, .. } = self.weights;
        format!("linear {} {rows}x{cols} n={} {:?}", format_name(dtype), self.n, self.input)
    }

    fn bytes(&self) -> usize {
        self.weights.dtype.weight_bytes(self.weights.rows, self.weights.cols)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        let cut = self.only.as_ref().map(|rows| sampled(&self.weights, rows));
        oracle.linear(&self.input(), self.n, &[cut.as_ref().unwrap_or(&self.weights)]).remove(0)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let MatrixData { dtype, rows, cols, .. } = self.weights;
        let found = b.linear(&self.input(), self.n, &[&self.weights]).remove(0);
        let found = columns(found, rows, self.only.as_deref());
        let rounding = self.input.after(activations(b.precision, dtype, self.n));
        let budget = product(b.precision, dtype, self.n, cols).and(Budget::rounded(rounding, EVEN));
        // Noise has the mean square 1/3.
        compare("products", &found, expected, (cols as f64 / 9.0).sqrt(), budget)
    }
}

/// [`Backend::linear`] with matrices of several formats and widths on one input.
struct Several {
    n: usize,
}

impl Several {
    const COLS: usize = 256;

    fn matrices() -> [MatrixData; 7] {
        [
            (AFFINE8, 48),
            (DType::Mxfp4, 33),
            (AFFINE8, 16),
            (DType::BF16, 20),
            (AFFINE8, 130),
            (AFFINE8, 1),
            (DType::F32, 7),
        ]
        .map(|(dtype, rows)| matrix(dtype, 1, rows, Several::COLS, rows as u64))
    }

    fn run<B: Backend>(&self, b: &Subject<B>) -> Vec<Vec<f32>> {
        let matrices = Several::matrices();
        b.linear(&coarse(5, self.n * Several::COLS), self.n, &matrices.each_ref())
    }
}

impl Case for Several {
    type Expected = Vec<Vec<f32>>;

    fn name(&self) -> String {
        format!("linear with several outputs n={}", self.n)
    }

    fn expected(&self, oracle: &Oracle) -> Self::Expected {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Self::Expected) -> Result<(), String> {
        for ((data, found), expected) in Several::matrices().iter().zip(&self.run(b)).zip(expected) {
            let rounding = Input::Coarse.after(activations(b.precision, data.dtype, self.n));
            let budget = product(b.precision, data.dtype, self.n, data.cols).and(Budget::rounded(rounding, EVEN));
            let what = format!("{} of {} rows", data.name, data.rows);
            compare(&what, found, expected, (data.cols as f64 / 9.0).sqrt(), budget)?;
        }
        Ok(())
    }
}

/// [`Backend::head_linear`], whose heads have gaps between them on both sides.
pub(crate) struct ByHead {
    pub(crate) dtype: DType,
    pub(crate) n_heads: usize,
    pub(crate) cols: usize,
    pub(crate) rows: usize,
    pub(crate) n: usize,
}

impl ByHead {
    fn stack(&self) -> MatrixData {
        matrix(self.dtype, self.n_heads, self.rows, self.cols, 4)
    }

    fn from(&self) -> Heads {
        Heads { n: self.n_heads, stride: self.cols + 32, offset: 0, width: self.cols }
    }

    fn to(&self) -> Heads {
        Heads { n: self.n_heads, stride: self.rows + 16, offset: 0, width: self.rows }
    }

    fn run<B: Backend>(&self, b: &Subject<B>) -> Vec<f32> {
        let x = coarse(self.n as u64, self.n * self.n_heads * self.from().stride);
        b.head_linear(&x, self.n, self.from(), &self.stack(), (self.to(), self.n_heads * self.to().stride))
    }
}

impl Case for ByHead {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        let ByHead { n_heads, cols, rows, n, .. } = self;
        format!("head_linear {} {n_heads} heads {rows}x{cols} n={n}", format_name(self.dtype))
    }

    fn bytes(&self) -> usize {
        self.n_heads * self.dtype.weight_bytes(self.rows, self.cols)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let found = self.run(b);
        let written = |i: &usize| i % self.to().stride < self.rows;
        if let Some(i) = (0..found.len()).find(|i| !written(i) && found[*i] != POISON) {
            return Err(format!("value {i}, between heads, was overwritten"));
        }
        let heads = |values: &[f32]| -> Vec<f32> { (0..values.len()).filter(written).map(|i| values[i]).collect() };
        let rounding = Input::Coarse.after(activations(b.precision, self.dtype, self.n));
        let budget = product(b.precision, self.dtype, self.n, self.cols).and(Budget::rounded(rounding, EVEN));
        compare("heads", &heads(&found), &heads(expected), 0.0, budget)
    }
}

/// [`Backend::mlp`].
pub(crate) struct DenseMlp {
    pub(crate) mlp: MlpData,
    pub(crate) n: usize,
    /// Columns of the result that are compared; all if none.
    pub(crate) only: Option<Vec<usize>>,
}

impl DenseMlp {
    fn input(&self) -> Vec<f32> {
        coarse(9, self.n * self.mlp[0].cols)
    }
}

impl Case for DenseMlp {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        let [gate, ..] = &self.mlp;
        format!("mlp {} {}x{} n={}", gate.name, gate.rows, gate.cols, self.n)
    }

    fn bytes(&self) -> usize {
        let [gate, ..] = &self.mlp;
        gate.dtype.weight_bytes(gate.rows, gate.cols)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        let mut mlp = self.mlp.clone();
        if let Some(rows) = &self.only {
            mlp[2] = sampled(&mlp[2], rows);
        }
        oracle.mlp(&self.input(), self.n, &mlp)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let found = columns(b.mlp(&self.input(), self.n, &self.mlp), self.mlp[2].rows, self.only.as_deref());
        compare("outputs", &found, expected, 0.0, mlp_budget(b.precision, &self.mlp, self.n))
    }
}

/// One MXFP4 scale byte for all: the ends of the range. From 240 on sums leave the range of f32.
struct UniformScale {
    byte: u8,
}

impl UniformScale {
    const COLS: usize = 160;

    fn run<B: Backend>(&self, b: &Subject<B>) -> Vec<f32> {
        let mut data = matrix(DType::Mxfp4, 1, 5, UniformScale::COLS, 1);
        data.parts[0].scales = vec![self.byte; 5 * 5].into();
        b.linear(&coarse(8, UniformScale::COLS), 1, &[&data]).remove(0)
    }
}

impl Case for UniformScale {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        format!("linear with MXFP4 scales of byte {}", self.byte)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let found = self.run(b);
        let size = rms(expected);
        if self.byte < b.precision.smallest_scale {
            // Nothing is left but the order of magnitude.
            let far = |(found, expected): (&f32, &f32)| f64::from((found - expected).abs()) > 8.0 * size;
            return if found.iter().zip(expected).any(far) { Err(format!("{found:?}")) } else { Ok(()) };
        }
        let rounding = Input::Coarse.after(activations(b.precision, DType::Mxfp4, 1));
        // Terms below 2^-126 keep fewer bits, down to 2^-149: a step of the smallest for each is lost on both sides.
        let lost = UniformScale::COLS as f64 * 2f64.powi(-149);
        let budget = product(b.precision, DType::Mxfp4, 1, UniformScale::COLS).and(Budget::rounded(rounding, EVEN));
        let budget = budget.and(Budget::steps(1).times((lost / size * f64::from(1 << 24)).powi(2)));
        compare("products", &found, expected, 0.0, budget)
    }
}

/// A NaN among the scales of one row reaches that row's output and no other.
struct NanScale;

impl Case for NanScale {
    type Expected = ();

    fn name(&self) -> String {
        "linear with a NaN scale".into()
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        if !b.precision.keeps_nan {
            return Ok(());
        }
        let mut data = matrix(AFFINE8, 1, 3, 128, 1);
        let mut scales = data.parts[0].scales.to_vec();
        scales[..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
        data.parts[0].scales = scales.into();
        let found = b.linear(&noise(8, 128), 1, &[&data]).remove(0);
        let right = found[0].is_nan() && found[1..].iter().all(|v| v.is_finite());
        if right { Ok(()) } else { Err(format!("{found:?}, expected NaN and two numbers")) }
    }
}

/// A NaN in the middle row of the input reaches every output of that row and none of another.
struct NanRow {
    dtype: DType,
    n: usize,
}

impl Case for NanRow {
    type Expected = ();

    fn name(&self) -> String {
        format!("linear {} with NaN in its input n={}", format_name(self.dtype), self.n)
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        if !b.precision.keeps_nan {
            return Ok(());
        }
        let (rows, cols, middle) = (5, 256, self.n / 2);
        let data = matrix(self.dtype, 1, rows, cols, 1);
        let mut x = coarse(8, self.n * cols);
        x[middle * cols + 77] = f32::NAN;
        let found = b.linear(&x, self.n, &[&data]).remove(0);
        let wrong = (0..found.len()).find(|i| found[*i].is_nan() != (i / rows == middle));
        wrong.map_or(Ok(()), |i| Err(format!("output {} of row {} is {}", i % rows, i / rows, found[i])))
    }
}

/// A row's products do not depend on the rest of its batch, of up to 64 rows.
struct SameInAnyBatch {
    dtype: DType,
    cols: usize,
}

impl Case for SameInAnyBatch {
    type Expected = ();

    fn name(&self) -> String {
        format!("linear {} of {} columns, the same in any batch", format_name(self.dtype), self.cols)
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        let (rows, cols) = (37, self.cols);
        let data = b.load(&matrix(self.dtype, 1, rows, cols, 3));
        let x = noise(5, EXACT_ROWS * cols);
        let all = b.linear_loaded(&x, EXACT_ROWS, &[(&data, rows)]).remove(0);
        for (first, n) in [(0, 1), (1, 1), (31, 1), (5, 2), (31, 9), (40, 17), (63, 1)] {
            let own = b.linear_loaded(&x[first * cols..(first + n) * cols], n, &[(&data, rows)]).remove(0);
            same(&format!("rows {first} to {}", first + n), &own, &all[first * rows..(first + n) * rows])?;
        }
        Ok(())
    }
}
