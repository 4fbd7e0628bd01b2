//! The indexer: its keys, and the positions that it selects.

use std::cell::RefCell;
use std::rc::Rc;

use tandem_core::Backend;
use tandem_core::backend::{Batch, CacheKind, Rope, RopeLayout};
use tandem_cpu::kernels::{norm, rope as rotary};

use crate::data::{all_positions, grid, last_rows, noise, rope, slots, tables};
use crate::subject::{IndexKeys, Latents};
use crate::tolerance::{Scores, score};
use crate::{Case, Oracle, Rounding, Subject, Suite, alike};

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>, batches: &[usize]) {
    for (heads, dim, context, k) in [(4, 64, 700, 128), (8, 32, 100, 16), (32, 128, 300, 100), (3, 96, 90, 128)] {
        for n in batches.iter().filter(|n| heads * dim * context < 500_000 || **n <= 65) {
            for (how, fused) in [(Keys::Written, false), (Keys::Prepared, true)] {
                suite.case(&Select { heads, dim, context, k, n: *n, how, fused });
            }
            suite.case(&Select { heads, dim, context, k, n: *n, how: Keys::Grid, fused: false });
        }
    }
    if batches.len() > 1 {
        let long = [(4, 32, 9000, 2048), (4, 32, 20_000, 2048), (4, 32, 70_000, 2048)];
        for (heads, dim, context, k) in [(4, 32, 3000, 2048), (64, 128, 1000, 512)].into_iter().chain(long) {
            for how in [Keys::Written, Keys::Grid] {
                suite.case(&Select { heads, dim, context, k, n: 3, how, fused: false });
            }
        }
    }
}

/// How the indexer's keys get into the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keys {
    /// By [`Backend::write_index_key`].
    Written,
    /// By [`Backend::prepare_attention`].
    Prepared,
    /// As they are, in eighths, as are queries and weights: scores are exact, with many ties.
    Grid,
}

/// [`Backend::index_select`], or [`Backend::rope_index_select`].
///
/// Where arithmetic is exact, in f32 and bf16 on [`Keys::Grid`], the selection must be the scalar kernels' own, ties
/// too. Elsewhere no position outside the selection may score higher than one inside it by more than the errors of both
/// scores, which follow from their operands.
pub(crate) struct Select {
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    pub(crate) context: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) how: Keys,
    pub(crate) fused: bool,
}

/// What the scalar kernels have: keys of all positions of all sequences, queries, and the selection.
pub(crate) struct Known {
    /// `[sequences][positions * dim]`
    keys: Vec<Vec<f32>>,
    /// `[n, heads * dim]`, rotated.
    q: Vec<f32>,
    selected: Vec<i32>,
    /// Scores of every row's positions with their errors, for the roundings met so far.
    scores: RefCell<Vec<(Rounding, Rc<[RowScores]>)>>,
}

type RowScores = Vec<(f64, f64)>;

impl Select {
    fn rope(&self) -> Rope {
        rope(self.dim / 2, RopeLayout::Interleaved)
    }

    fn norms(&self) -> [Vec<f32>; 2] {
        [noise(4, self.dim), noise(5, self.dim)]
    }

    fn values(&self, seed: u64, n: usize) -> Vec<f32> {
        if self.how == Keys::Grid { grid(seed, n) } else { noise(seed, n) }
    }

    fn batch(&self) -> Batch {
        last_rows(self.n, self.context)
    }

    fn q(&self) -> Vec<f32> {
        self.values(6, self.n * self.heads * self.dim)
    }

    fn weights(&self) -> Vec<f32> {
        self.values(7, self.n * self.heads)
    }

    /// Batches that write all positions, with their keys.
    fn batches(&self) -> Vec<(Batch, Vec<f32>)> {
        // At most 64 rows at a time take a backend's kernels for decoding.
        let rows = if self.how == Keys::Prepared { 64 } else { 1024 };
        let batches = all_positions(self.context, &tables(self.context), rows).into_iter().enumerate();
        batches
            .map(|(i, batch)| (self.values(50 + i as u64, batch.n_rows() * self.dim), batch))
            .map(|(k, b)| (b, k))
            .collect()
    }

    fn run<B: Backend>(&self, b: &Subject<B>) -> Vec<i32> {
        let mut cache = b.cache(CacheKind::IndexKey, slots(self.context), self.dim);
        let ([norm, norm_bias], rope) = (self.norms(), self.rope());
        let mut latents = b.cache(CacheKind::Latent, slots(self.context), 48);
        for (batch, k) in self.batches() {
            let keys = IndexKeys { k: &k, norm: &norm, norm_bias: &norm_bias, rope: &rope };
            match self.how {
                Keys::Grid => b.write_cache(&k, &batch, &mut cache),
                Keys::Written => b.write_index_key(&keys, &batch, &mut cache),
                Keys::Prepared => {
                    let (kv_a, norm, x) = (noise(1, batch.n_rows() * 48), noise(2, 32), noise(3, batch.n_rows() * 64));
                    let latent = Latents { kv_a: &kv_a, norm: &norm, rope: &self::rope(16, RopeLayout::Interleaved) };
                    let weight = noise(8, 64);
                    let query = Some((&x[..], &weight[..]));
                    b.prepare_attention(query, &latent, &mut latents, Some((&keys, &mut cache)), &batch);
                }
            }
        }
        let (q, weights, batch) = (self.q(), self.weights(), self.batch());
        let selected = if self.fused {
            b.rope_index_select(&q, &rope, &weights, &batch, &cache, self.k)
        } else {
            b.index_select(&q, &weights, &batch, &cache, self.k)
        };
        b.indices(&selected, self.n * self.k)
    }

    fn rotated(&self, position: u32, x: &[f32]) -> Vec<f32> {
        let rope = self.rope();
        let half = rope.inv_freq.len();
        let (mut cos, mut sin, mut out) = (vec![0.0; half], vec![0.0; half], vec![0.0; self.dim]);
        rotary::angles(&rope, position, &mut cos, &mut sin);
        rotary::rotate(rope.layout, &cos, &sin, x, &mut out);
        out
    }

    /// Keys as they are in an exact cache.
    fn keys(&self) -> Vec<Vec<f32>> {
        let [norm, norm_bias] = self.norms();
        let mut keys = vec![vec![]; tables(self.context).len()];
        for (batch, k) in self.batches() {
            for (r, k) in k.chunks_exact(self.dim).enumerate() {
                let to = &mut keys[batch.sequences[r] as usize];
                if self.how == Keys::Grid {
                    to.extend_from_slice(k);
                    continue;
                }
                let mut normed = vec![0.0; self.dim];
                norm::layer_norm(k, &norm, &norm_bias, 1e-6, &mut normed);
                to.extend(self.rotated(batch.positions[r], &normed));
            }
        }
        keys
    }

    fn scores(&self, known: &Known, rounding: Rounding) -> Rc<[RowScores]> {
        if let Some((_, scores)) = known.scores.borrow().iter().find(|(known, _)| *known == rounding) {
            return Rc::clone(scores);
        }
        let (batch, weights) = (self.batch(), self.weights());
        let scores: Rc<[RowScores]> = (0..self.n)
            .map(|row| {
                let q = &known.q[row * self.heads * self.dim..(row + 1) * self.heads * self.dim];
                let scores = Scores { q, weights: &weights[row * self.heads..(row + 1) * self.heads], rounding };
                let keys = &known.keys[batch.sequences[row] as usize];
                keys.chunks_exact(self.dim).take(batch.positions[row] as usize + 1).map(|k| score(&scores, k)).collect()
            })
            .collect();
        known.scores.borrow_mut().push((rounding, Rc::clone(&scores)));
        scores
    }

    fn check_row(&self, found: &[i32], scores: &[(f64, f64)]) -> Result<(), String> {
        let visible = scores.len();
        let n = visible.min(self.k);
        let (chosen, rest) = found.split_at(n);
        let ascending = chosen.is_sorted_by(|a, b| a < b) && chosen.iter().all(|p| (0..visible as i32).contains(p));
        if !ascending || rest.iter().any(|p| *p != -1) {
            return Err(format!("not {n} ascending positions below {visible}, then -1: {found:?}"));
        }
        // The least that a chosen position may score, and the most that another one must.
        let (mut least, mut most) = ((f64::INFINITY, 0), (f64::NEG_INFINITY, 0));
        for (p, (value, error)) in scores.iter().enumerate() {
            if chosen.binary_search(&(p as i32)).is_ok() {
                least = if value + error < least.0 { (value + error, p) } else { least };
            } else {
                most = if value - error > most.0 { (value - error, p) } else { most };
            }
        }
        if most.0 > least.0 {
            return Err(format!("position {} was selected instead of {}, which surely scores higher", least.1, most.1));
        }
        Ok(())
    }
}

impl Case for Select {
    type Expected = Known;

    fn name(&self) -> String {
        let Select { heads, dim, context, k, n, how, fused } = self;
        let name = if *fused { "rope_index_select" } else { "index_select" };
        format!("{name} {heads}x{dim} {k} of {context} keys {how:?} n={n}")
    }

    fn bytes(&self) -> usize {
        slots(self.context) * self.dim * 4
    }

    fn expected(&self, oracle: &Oracle) -> Known {
        let (batch, mut q) = (self.batch(), self.q());
        if self.fused {
            let heads = q.chunks_exact_mut(self.dim).enumerate();
            heads.for_each(|(i, head)| head.copy_from_slice(&self.rotated(batch.positions[i / self.heads], head)));
        }
        Known { keys: self.keys(), q, selected: self.run(oracle), scores: RefCell::default() }
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Known) -> Result<(), String> {
        let found = self.run(b);
        if self.how == Keys::Grid && b.precision.index != Rounding::Int8 {
            return alike("positions", &found, &expected.selected);
        }
        let scores = self.scores(expected, b.precision.index);
        let mut rows = found.chunks_exact(self.k).zip(&*scores).enumerate();
        rows.try_for_each(|(row, (found, scores))| self.check_row(found, scores).map_err(|e| format!("row {row}: {e}")))
    }
}
