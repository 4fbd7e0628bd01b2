//! What it costs to verify drafts: steps of one to nine rows of each sequence, in turns, against the bytes that they read.

use std::time::Instant;

use anyhow::ensure;
use serde_json::{Map, Value, json};
use tandem_runtime::measured::{BytesRead, MeasuredModel};

use super::{PROFILED_STEPS, Random, Sequences, Spread, experts_per_layer};
use crate::cli::BenchDecodeArgs;

/// Steps with the same number of drafts for each sequence.
pub(super) struct Verified {
    depth: usize,
    ms: f64,
    bytes: f64,
    experts_per_layer: Option<f64>,
    /// Tokens per second with the acceptance asked for; drafting itself is not in it.
    tokens_per_second: Option<f64>,
}

/// Measures every depth from 0 to the one asked for, if one is.
pub(super) fn verified(
    model: &mut MeasuredModel,
    sequences: &Sequences,
    context: usize,
    args: &BenchDecodeArgs,
) -> anyhow::Result<Vec<Verified>> {
    if args.draft_depth == 0 {
        return Ok(vec![]);
    }
    let (mut random, vocab_size, mut logits) = (Random::new(context as u64), model.config.vocab_size, vec![]);
    let mut step = |model: &mut MeasuredModel, depth: usize| -> anyhow::Result<f64> {
        let batch = sequences.verify_batch(context, 1 + depth, &mut random, vocab_size);
        logits.clear();
        let start = Instant::now();
        model.runner.step(batch, &mut logits)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        ensure!(logits.iter().all(|l| l.is_finite()), "the model's logits are not finite; its weights are damaged");
        Ok(ms)
    };
    let depths = 0..=args.draft_depth;
    let mut times = vec![vec![]; depths.clone().count()];
    for n in 0..args.warmup + args.steps {
        for depth in depths.clone() {
            let ms = step(model, depth)?;
            if n >= args.warmup {
                times[depth].push(ms);
            }
        }
    }
    let mut found = vec![];
    for (depth, times) in depths.zip(times) {
        model.runner.start(true)?;
        for _ in 0..args.steps.min(PROFILED_STEPS) {
            step(model, depth)?;
        }
        let experts_per_layer = experts_per_layer(&model.runner.stop()?);
        let bytes = BytesRead::of_decode_step(model, context + 1 + depth, sequences.len(), experts_per_layer).total();
        let ms = Spread::of(times).median;
        let shares = args.force_acceptance.get(..depth);
        let tokens = shares.map(|shares| 1.0 + shares.iter().sum::<f64>());
        let tokens_per_second = tokens.map(|tokens| sequences.len() as f64 * tokens * 1e3 / ms);
        found.push(Verified { depth, ms, bytes, experts_per_layer, tokens_per_second });
    }
    Ok(found)
}

impl Verified {
    /// Time and bytes as multiples of those of a step without drafts.
    fn against(&self, plain: &Verified) -> (f64, f64) {
        (self.ms / plain.ms, self.bytes / plain.bytes)
    }
}

/// For programs.
pub(super) fn json(verified: &[Verified]) -> Value {
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
pub(super) fn print(verified: &[Verified]) {
    if verified.is_empty() {
        return;
    }
    println!("  steps that verify drafts, against one without; experts of a layer that a step reads");
    for v in verified {
        let (time, bytes) = v.against(&verified[0]);
        let experts = v.experts_per_layer.map(|n| format!(", {n:.1} experts")).unwrap_or_default();
        let rate = v.tokens_per_second.map(|n| format!(", {n:.2} tokens/s")).unwrap_or_default();
        println!(
            "    {} drafted: {:.2} ms, {time:.2} times the time for {bytes:.2} times the bytes ({:.2}){experts}{rate}",
            v.depth,
            v.ms,
            time / bytes
        );
    }
}
