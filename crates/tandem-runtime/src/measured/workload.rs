//! What is run to be measured: sequences at one position with other tokens in each step, and what is made of their times.

use tandem_core::Batch;
use tandem_core::backend::PAGE_SIZE;

use super::RankReport;

/// Steps of the profiled run, at most.
pub const PROFILED_STEPS: usize = 8;

/// Sequences with consecutive pages.
#[derive(Clone, Debug)]
pub struct Sequences {
    pub(super) block_tables: Vec<Vec<u32>>,
}

impl Sequences {
    /// `n` sequences with pages for `n_tokens` tokens each.
    pub fn new(n: usize, n_tokens: usize) -> Sequences {
        let n_pages = n_tokens.div_ceil(PAGE_SIZE) as u32;
        Sequences { block_tables: (0..n as u32).map(|s| (s * n_pages..(s + 1) * n_pages).collect()).collect() }
    }

    /// Their number.
    #[expect(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> usize {
        self.block_tables.len()
    }

    /// The first `n` of them.
    pub fn first(&self, n: usize) -> Sequences {
        Sequences { block_tables: self.block_tables[..n].to_vec() }
    }

    /// Cache slots of all pages.
    pub fn n_slots(&self) -> usize {
        self.block_tables.iter().map(Vec::len).sum::<usize>() * PAGE_SIZE
    }

    /// One new token per sequence after `context` cached ones.
    pub fn decode_batch(&self, context: usize, random: &mut Random, vocab_size: usize) -> Batch {
        let n = self.block_tables.len();
        Batch {
            tokens: (0..n).map(|_| random.below(vocab_size)).collect(),
            positions: vec![context as u32; n],
            sequences: (0..n as u32).collect(),
            block_tables: self.block_tables.clone(),
            logits_rows: (0..n as u32).collect(),
            sampling: vec![],
        }
    }

    /// Tokens at `positions` of the first sequence.
    pub fn prefill_batch(
        &self,
        positions: std::ops::Range<usize>,
        last: bool,
        random: &mut Random,
        vocab_size: usize,
    ) -> Batch {
        let n = positions.len();
        Batch {
            tokens: (0..n).map(|_| random.below(vocab_size)).collect(),
            positions: positions.map(|p| p as u32).collect(),
            sequences: vec![0; n],
            block_tables: self.block_tables.clone(),
            logits_rows: if last { vec![n as u32 - 1] } else { vec![] },
            sampling: vec![],
        }
    }
}

/// splitmix64: tokens that differ from step to step and agree from run to run.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number, from 0 to below `n`.
    pub fn below(&mut self, n: usize) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % n as u64) as u32
    }
}

/// Order statistics of times.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// Half are below.
    pub median: f64,
    /// A tenth are below.
    pub p10: f64,
    /// Nine tenths are below.
    pub p90: f64,
}

impl Spread {
    /// Of at least one time.
    pub fn of(mut times: Vec<f64>) -> Spread {
        times.sort_by(f64::total_cmp);
        let at = |q: f64| {
            let place = q * (times.len() - 1) as f64;
            let (low, high) = (times[place.floor() as usize], times[place.ceil() as usize]);
            low + (high - low) * place.fract()
        };
        Spread { median: at(0.5), p10: at(0.1), p90: at(0.9) }
    }
}

/// Different experts that a step reads in one MoE layer: of each stage, those of its first rank, and where experts are
/// spread over the ranks, those of all.
pub fn experts_per_layer(reports: &[RankReport]) -> Option<f64> {
    let (mut touched, mut runs) = (0, 0);
    for stage in reports.chunk_by(|a, b| a.stage == b.stage) {
        let counts: Vec<u64> = stage.iter().map(|r| r.experts.0).collect();
        let same = counts.iter().all(|n| *n == counts[0]);
        touched += if same { counts[0] } else { counts.iter().sum() };
        runs += stage[0].experts.1;
    }
    (runs > 0).then(|| touched as f64 / runs as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_interpolates() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0, 4.0, 5.0]);
        assert_eq!((spread.median, spread.p10, spread.p90), (3.0, 1.4, 4.6));
        assert_eq!(Spread::of(vec![7.0]).p90, 7.0);
    }
}
