//! Embedding, gathering, norms, additions and rotations.

use tandem_core::backend::{Batch, Heads, RopeLayout};
use tandem_core::weights::MatrixData;
use tandem_core::{Backend, DType};

use crate::data::{every_format, fits, format_name, matrix, noise, plain_batch, rope};
use crate::subject::POISON;
use crate::tolerance::Budget;
use crate::{Case, Oracle, Subject, Suite, compare, same};

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>, batches: &[usize]) {
    for dtype in every_format() {
        for (vocab, width) in [(1, 128), (37, 384)] {
            suite.case(&Embed { dtype, table: matrix(dtype, 1, vocab, width, 3), n: batches[batches.len() / 2] });
        }
    }
    for (dtype, width) in [(DType::F32, 40), (DType::BF16, 200), (DType::Nvfp4, 48), (DType::Fp8Block, 200)] {
        assert!(fits(dtype, width));
        batches.iter().for_each(|n| suite.case(&Embed { dtype, table: matrix(dtype, 1, 300, width, 3), n: *n }));
    }
    for n in batches {
        for width in [8, 80, 200, 576, 2056] {
            suite.case(&Norms { n: *n, width });
        }
        suite.case(&Gather { n: *n, width: 136 });
        for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
            for shape in [RopeShape::new(1, 24, 16), RopeShape::new(5, 24, 16), RopeShape::new(9, 64, 64)] {
                suite.case(&Rotate { n: *n, layout, shape });
            }
            // A slice of wider heads goes to a slice of others.
            let shape = RopeShape { n_heads: 3, from: (40, 8), to: (32, 4), width: 24, dim: 16 };
            suite.case(&Rotate { n: *n, layout, shape });
        }
    }
    // Long rows.
    suite.case(&Norms { n: 2, width: 6160 });
}

/// [`Backend::embed`]: the first and the last token, and others twice.
pub(crate) struct Embed {
    pub(crate) dtype: DType,
    pub(crate) table: MatrixData,
    pub(crate) n: usize,
}

impl Embed {
    fn batch(&self) -> Batch {
        let last = self.table.rows as u32 - 1;
        let tokens = (0..self.n as u32).map(|r| if r % 3 == 0 { last - r % (last + 1) } else { r * 7 % (last + 1) });
        Batch { tokens: tokens.collect(), ..plain_batch(self.n) }
    }
}

impl Case for Embed {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        format!("embed {} {}x{} n={}", format_name(self.dtype), self.table.rows, self.table.cols, self.n)
    }

    fn bytes(&self) -> usize {
        self.dtype.weight_bytes(self.table.rows, self.table.cols)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        oracle.embed(&self.table, &self.batch())
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        // Scales that are not powers of two round once; affine ones add a bias.
        let budget = match self.dtype {
            DType::Float(_) => return same("rows", &b.embed(&self.table, &self.batch()), expected),
            DType::Affine { .. } => Budget::steps(1).of_affine(),
            _ => Budget::steps(2),
        };
        compare("rows", &b.embed(&self.table, &self.batch()), expected, 0.0, budget)
    }
}

/// [`Backend::gather_logits_rows`]: the last row, the first, and one between, each once.
struct Gather {
    n: usize,
    width: usize,
}

impl Gather {
    fn run<B: Backend>(&self, b: &Subject<B>) -> Vec<f32> {
        let last = self.n as u32 - 1;
        let mut logits_rows = vec![last];
        for row in [0, last / 2] {
            if !logits_rows.contains(&row) {
                logits_rows.push(row);
            }
        }
        let batch = Batch { logits_rows, ..plain_batch(self.n) };
        b.gather_logits_rows(&noise(2, self.n * self.width), self.width, &batch)
    }
}

impl Case for Gather {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        format!("gather {}x{}", self.n, self.width)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        same("rows", &self.run(b), expected)
    }
}

/// Norms and additions of the residual stream, the fused ones too.
pub(crate) struct Norms {
    pub(crate) n: usize,
    pub(crate) width: usize,
}

impl Norms {
    /// The norm, the sum with its norm, the sum alone, the sum with a vector.
    fn run<B: Backend>(&self, b: &Subject<B>) -> [Vec<f32>; 5] {
        let (x, y) = (noise(1, self.n * self.width), noise(2, self.n * self.width));
        let weight = noise(3, self.width);
        let [sum, sum_normed] = b.add_rms_norm(&x, &y, &weight);
        [b.rms_norm(&x, &weight), sum, sum_normed, b.add(&x, &y, self.width), b.add_bias(&x, &weight)]
    }
}

impl Case for Norms {
    type Expected = [Vec<f32>; 5];

    fn name(&self) -> String {
        format!("norms {}x{}", self.n, self.width)
    }

    fn expected(&self, oracle: &Oracle) -> Self::Expected {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Self::Expected) -> Result<(), String> {
        let names = ["rms_norm", "add_rms_norm's sum", "add_rms_norm", "add", "add_bias"];
        // Half of a relative error of the mean square remains after the root; then a division and a product.
        let norm = Budget::sum(self.width).times(0.25).and(Budget::steps(4));
        let budgets = [norm, Budget::exact(), norm, Budget::exact(), Budget::exact()];
        for (((name, found), expected), budget) in names.iter().zip(&self.run(b)).zip(expected).zip(budgets) {
            compare(name, found, expected, 0.0, budget)?;
        }
        Ok(())
    }
}

/// Heads of a rotation: `from` and `to` are stride and offset.
#[derive(Clone, Copy)]
struct RopeShape {
    n_heads: usize,
    from: (usize, usize),
    to: (usize, usize),
    width: usize,
    dim: usize,
}

impl RopeShape {
    fn new(n_heads: usize, width: usize, dim: usize) -> RopeShape {
        RopeShape { n_heads, from: (width, 0), to: (width, 0), width, dim }
    }
}

/// [`Backend::rope`] at positions up to the longest context of GLM-5.1.
struct Rotate {
    n: usize,
    layout: RopeLayout,
    shape: RopeShape,
}

impl Rotate {
    fn run<B: Backend>(&self, b: &Subject<B>) -> Vec<f32> {
        let RopeShape { n_heads, from, to, width, dim } = self.shape;
        let heads = |(stride, offset)| Heads { n: n_heads, stride, offset, width };
        let widths = (n_heads * from.0, n_heads * to.0);
        let positions = (0..self.n as u32).map(|r| r * 9001 % 202_752).collect();
        let batch = Batch { positions, block_tables: vec![(0..3168).collect()], ..plain_batch(self.n) };
        let x = noise(5, self.n * widths.0);
        b.rope(&x, (heads(from), widths.0), &rope(dim, self.layout), &batch, (heads(to), widths.1))
    }
}

impl Case for Rotate {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        let RopeShape { n_heads, from, to, width, dim } = self.shape;
        format!("rope {:?} {n_heads} heads {dim} of {width} {from:?} to {to:?} n={}", self.layout, self.n)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let found = self.run(b);
        let RopeShape { to, width, .. } = self.shape;
        let written = |i: &usize| (to.1..to.1 + width).contains(&(i % to.0));
        if let Some(i) = (0..found.len()).find(|i| !written(i) && found[*i] != POISON) {
            return Err(format!("value {i}, between heads, was overwritten"));
        }
        // cos and sin, the factor, two products and a sum.
        let heads = |values: &[f32]| -> Vec<f32> { (0..values.len()).filter(written).map(|i| values[i]).collect() };
        compare("heads", &heads(&found), &heads(expected), 0.0, Budget::steps(6))
    }
}
