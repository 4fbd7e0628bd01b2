//! What it costs to verify drafts: steps of one to nine rows of each sequence, in turns, against the bytes that they read.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Map, Value, json};
use tandem_core::Batch;

use super::workload::{PROFILED_STEPS, Random, Sequences, Spread, experts_per_layer};
use super::{BytesRead, MeasuredModel};

/// What is measured.
#[derive(Clone, Debug)]
pub struct DraftCase<'a> {
    /// Tokens in the cache.
    pub context: usize,
    /// Drafts of each sequence, at most: every number from 0 on is measured.
    pub depth: usize,
    /// Steps measured at each depth, and steps before that.
    pub steps: usize,
    /// Not counted.
    pub warmup: usize,
    /// Share of a row's experts that an earlier row of its sequence chose too. A row gets the token of an earlier one that often:
    /// with made-up weights, whose experts follow from the token almost alone, it chooses the same ones then.
    pub expert_overlap: f64,
    /// Shares of drafts that are right through each position.
    pub force_acceptance: &'a [f64],
}

/// Steps with the same number of drafts for each sequence.
#[derive(Clone, Copy, Debug)]
pub struct Verified {
    depth: usize,
    ms: f64,
    bytes: f64,
    experts_per_layer: Option<f64>,
    /// Tokens per second with the acceptance asked for; drafting itself is not in it.
    tokens_per_second: Option<f64>,
}

/// Measures every depth from 0 to the one asked for, if one is.
///
/// # Errors
/// The model fails, or computes what is not finite.
pub fn verified(
    model: &mut MeasuredModel,
    sequences: &Sequences,
    case: &DraftCase<'_>,
) -> anyhow::Result<Vec<Verified>> {
    if case.depth == 0 {
        return Ok(vec![]);
    }
    let (mut random, vocab_size, mut logits) = (Random::new(case.context as u64), model.config.vocab_size, vec![]);
    // Of rows by depth, so far: repeated ones are spread evenly, and each depth has its share of them.
    let mut n_repeated = vec![0.0; case.depth + 1];
    let mut step = |model: &mut MeasuredModel, depth: usize| -> anyhow::Result<(usize, f64)> {
        n_repeated[depth] += case.expert_overlap * depth as f64;
        let n = n_repeated[depth].floor() as usize;
        n_repeated[depth] -= n as f64;
        let batch = sequences.verify_batch(case.context, 1 + depth, n, &mut random, vocab_size);
        logits.clear();
        let start = Instant::now();
        model.runner.step(batch, &mut logits)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        ensure!(logits.iter().all(|l| l.is_finite()), "the model's logits are not finite; its weights are damaged");
        Ok((n, ms))
    };
    let depths = 0..=case.depth;
    // Steps with the same number of repeated rows are alike.
    let mut times: Vec<BTreeMap<usize, Vec<f64>>> = vec![BTreeMap::new(); depths.clone().count()];
    for i in 0..case.warmup + case.steps {
        for depth in depths.clone() {
            let (n, ms) = step(model, depth)?;
            if i >= case.warmup {
                times[depth].entry(n).or_default().push(ms);
            }
        }
    }
    let mut found = vec![];
    for (depth, times) in depths.zip(times) {
        model.runner.start(true)?;
        for _ in 0..case.steps.min(PROFILED_STEPS.max(10)) {
            step(model, depth)?;
        }
        let experts_per_layer = experts_per_layer(&model.runner.stop()?);
        let bytes =
            BytesRead::of_decode_step(model, case.context + 1 + depth, sequences.len(), experts_per_layer).total();
        let n_steps: usize = times.values().map(Vec::len).sum();
        let ms: f64 =
            times.into_values().map(|times| times.len() as f64 / n_steps as f64 * Spread::of(times).median).sum();
        let tokens = case.force_acceptance.get(..depth).map(|shares| 1.0 + shares.iter().sum::<f64>());
        let tokens_per_second = tokens.map(|tokens| sequences.len() as f64 * tokens * 1e3 / ms);
        found.push(Verified { depth, ms, bytes, experts_per_layer, tokens_per_second });
    }
    Ok(found)
}

impl Sequences {
    /// `n_rows` new tokens per sequence after `context` cached ones, each with its logits; `n_repeated` of them, never the first,
    /// are one that came before.
    fn verify_batch(
        &self,
        context: usize,
        n_rows: usize,
        n_repeated: usize,
        random: &mut Random,
        vocab_size: usize,
    ) -> Batch {
        let n = self.block_tables.len();
        let mut tokens: Vec<u32> = (0..n * n_rows).map(|_| random.below(vocab_size)).collect();
        for tokens in tokens.chunks_exact_mut(n_rows) {
            let mut left = n_repeated;
            for row in 1..n_rows {
                // Each with the same chance.
                if (random.below(n_rows - row) as usize) < left {
                    tokens[row] = tokens[random.below(row) as usize];
                    left -= 1;
                }
            }
        }
        Batch {
            tokens,
            positions: (0..n).flat_map(|_| (0..n_rows).map(|i| (context + i) as u32)).collect(),
            sequences: (0..n as u32).flat_map(|s| std::iter::repeat_n(s, n_rows)).collect(),
            block_tables: self.block_tables.clone(),
            logits_rows: (0..(n * n_rows) as u32).collect(),
            sampling: vec![],
        }
    }
}

impl Verified {
    /// Time and bytes as multiples of those of a step without drafts.
    fn against(&self, plain: &Verified) -> (f64, f64) {
        (self.ms / plain.ms, self.bytes / plain.bytes)
    }
}

/// For programs.
pub fn json(verified: &[Verified]) -> Value {
    let row = |v: &Verified| {
        let (time, bytes) = v.against(&verified[0]);
        let mut map = Map::new();
        map.insert("draft_depth".into(), json!(v.depth));
        map.insert("step_ms_median".into(), json!(v.ms));
        map.insert("step_bytes".into(), json!(v.bytes.round() as u64));
        map.insert("experts_read_per_layer".into(), json!(v.experts_per_layer));
        map.insert("times_plain_step".into(), json!(time));
        map.insert("times_plain_bytes".into(), json!(bytes));
        map.insert("time_over_bytes".into(), json!(time / bytes));
        map.insert("tokens_per_second".into(), json!(v.tokens_per_second));
        Value::Object(map)
    };
    verified.iter().map(row).collect()
}

/// For people.
pub fn lines(verified: &[Verified]) -> Vec<String> {
    let mut lines = vec![];
    if !verified.is_empty() {
        lines.push("  steps that verify drafts, against one without; experts of a layer that a step reads".to_string());
    }
    for v in verified {
        let (time, bytes) = v.against(&verified[0]);
        let experts = v.experts_per_layer.map(|n| format!(", {n:.1} experts")).unwrap_or_default();
        let rate = v.tokens_per_second.map(|n| format!(", {n:.2} tokens/s")).unwrap_or_default();
        lines.push(format!(
            "    {} drafted: {:.2} ms, {time:.2} times the time for {bytes:.2} times the bytes ({:.2}){experts}{rate}",
            v.depth,
            v.ms,
            time / bytes
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_repeat_earlier_ones_as_often_as_asked() {
        let (sequences, mut random) = (Sequences::new(3, 100), Random::new(7));
        let mut by_row = [0; 5];
        for n_repeated in [0, 1, 2, 4].into_iter().cycle().take(400) {
            let batch = sequences.verify_batch(20, 5, n_repeated, &mut random, 1 << 20);
            assert_eq!(batch.positions[..5], [20, 21, 22, 23, 24]);
            for tokens in batch.tokens.chunks_exact(5) {
                let repeats: Vec<usize> = (1..5).filter(|row| tokens[..*row].contains(&tokens[*row])).collect();
                assert_eq!(repeats.len(), n_repeated, "{tokens:?}");
                repeats.iter().for_each(|row| by_row[*row] += 1);
            }
        }
        // 7 of 16 rows.
        assert!(by_row[0] == 0 && by_row[1..].iter().all(|n| (450..600).contains(n)), "{by_row:?}");
    }
}
