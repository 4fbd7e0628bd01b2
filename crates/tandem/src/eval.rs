//! `tandem eval`: logits and perplexity of a model, and its right answers.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tandem_core::ModelConfig;
use tandem_engine::{Engine, Logits, Sequence, check_vocabulary};

use crate::cli::{EvalArgs, EvalCommand, LogitsArgs, PerplexityArgs, TasksArgs};
use crate::news::on_terminal;
use crate::report::{check_writable, print_json};
use tandem_runtime::judge::tasks::{Count, Score as TaskScore, Tasks};
use tandem_runtime::judge::{documents, load_checked};
use tandem_runtime::ranks::Joined;
use tandem_runtime::{Loaded, LogitsRows, model_dir};
use tandem_text::Tokenizer;

/// Inputs per window of a text when `--context` does not say.
const DEFAULT_WINDOW: usize = 512;

/// Runs the command.
pub(crate) fn eval(args: &EvalArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    match &args.command {
        EvalCommand::Logits(args) => logits(args, joined),
        EvalCommand::Perplexity(args) => perplexity(args, joined),
        EvalCommand::Compare(args) => crate::compare::compare(args),
        EvalCommand::Tasks(args) => tasks(args, joined),
    }
}

fn logits(args: &LogitsArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    let text = read(&args.tokens)?;
    let tokens: Vec<u32> = serde_json::from_str(&text)
        .with_context(|| format!("{} must be a JSON array of token ids such as [1, 2, 3]", args.tokens.display()))?;
    check_writable(&args.out)?;
    let config = ModelConfig::load(&model_dir(args.model.model.as_deref())?)?;
    check_vocabulary(&tokens, config.vocab_size)?;
    let Loaded { mut engine, prefill_chunk, .. } =
        load_checked(&(&args.model).into(), LogitsRows::Chunk, joined, &mut on_terminal())?;
    let decode_from = args.decode_from.unwrap_or(tokens.len()).min(tokens.len());
    let start = Instant::now();
    let mut sequence = Sequence::default();
    let mut logits = vec![];
    for (part, chunk) in [(&tokens[..decode_from], prefill_chunk), (&tokens[decode_from..], 1)] {
        if !part.is_empty() || tokens.is_empty() {
            logits.extend(engine.run(&mut sequence, part, chunk, Logits::All)?);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = vec![tokens.len(), engine.vocab_size()];
    let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), &bytes)?;
    safetensors::serialize_to_file([("logits", view)], None, &args.out)
        .with_context(|| format!("cannot write {}", args.out.display()))?;
    if args.json {
        return print_json(&json!({
            "n_tokens": shape[0],
            "vocab_size": shape[1],
            "seconds": seconds,
            "out": args.out.display().to_string(),
        }));
    }
    println!("{} x {} logits in {}", shape[0], shape[1], args.out.display());
    Ok(())
}

fn perplexity(args: &PerplexityArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    let text = read(&args.text)?;
    let is_json = args.text.extension().is_some_and(|e| e == "json");
    let tokenizer = Tokenizer::from_dir(&model_dir(args.model.model.as_deref())?)?;
    let whole = tokenizer.encode(if is_json { "" } else { &text }, true)?;
    if !is_json && whole.len() < 2 {
        bail!("{} has {} tokens; perplexity needs at least 2", args.text.display(), whole.len());
    }
    let Loaded { mut engine, prefill_chunk, .. } =
        load_checked(&(&args.model).into(), LogitsRows::Chunk, joined, &mut on_terminal())?;
    let start = Instant::now();
    let mut score = Score::default();
    let window = match documents(&args.text, &text)? {
        Some(documents) => {
            for document in documents {
                let tokens = tokenizer.encode(&document, true)?;
                if tokens.len() > 1 {
                    score.add(&mut engine, &tokens[..tokens.len() - 1], &tokens[1..], prefill_chunk)?;
                }
            }
            if score.n == 0 {
                bail!("{} has no text of at least 2 tokens; perplexity needs one", args.text.display());
            }
            engine.context()
        }
        None => {
            let tokens = whole;
            let window = args.model.context.unwrap_or(DEFAULT_WINDOW).min(engine.context());
            let n = tokens.len() - 1;
            for first in (0..n).step_by(window) {
                let end = (first + window).min(n);
                score.add(&mut engine, &tokens[first..end], &tokens[first + 1..end + 1], prefill_chunk)?;
            }
            window
        }
    };
    let (seconds, perplexity) = (start.elapsed().as_secs_f64(), score.perplexity());
    ensure!(
        perplexity.is_finite(),
        "the mean of {} nats per token is too much for a perplexity: this is no model of this text, or a damaged one",
        score.nll / score.n as f64
    );
    if args.json {
        return print_json(&json!({
            "perplexity": perplexity,
            "tokens_scored": score.n,
            "mean_nll_nats": score.nll / score.n as f64,
            "window_tokens": window,
            "seconds": seconds,
        }));
    }
    println!("perplexity {perplexity:.4} over {} tokens", score.n);
    Ok(())
}

/// Negative log likelihood in nats, in f64.
#[derive(Default)]
struct Score {
    nll: f64,
    n: usize,
}

impl Score {
    /// Scores `targets[i]` given `inputs[..=i]`, from an empty cache.
    fn add(&mut self, engine: &mut Engine, inputs: &[u32], targets: &[u32], chunk: usize) -> anyhow::Result<()> {
        let mut sequence = Sequence::default();
        let vocab = engine.vocab_size();
        check_vocabulary(targets, vocab)?;
        for (inputs, targets) in inputs.chunks(chunk).zip(targets.chunks(chunk)) {
            let logits = engine.run(&mut sequence, inputs, chunk, Logits::All)?;
            for (row, target) in logits.chunks_exact(vocab).zip(targets) {
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|v| f64::from(v - max).exp()).sum();
                self.nll += sum.ln() - f64::from(row[*target as usize] - max);
                self.n += 1;
            }
        }
        engine.release(&mut sequence);
        Ok(())
    }

    fn perplexity(&self) -> f64 {
        (self.nll / self.n as f64).exp()
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Right answers of a file of tasks.
fn tasks(args: &TasksArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    let tasks = Tasks::read(&args.tasks)?;
    let scores = tasks.score(&(&args.model).into(), args.max_tokens, joined, &mut on_terminal())?;
    if args.json {
        let kinds: BTreeMap<&str, Value> = scores
            .iter()
            .map(|(kind, TaskScore { plain, normalized })| {
                let mut value = json!({
                    "right": plain.right, "total": plain.total, "accuracy": plain.accuracy(),
                    "standard_error": plain.standard_error(),
                });
                if normalized.total > 0 {
                    value["right_normalized"] = json!(normalized.right);
                    value["accuracy_normalized"] = json!(normalized.accuracy());
                    value["standard_error_normalized"] = json!(normalized.standard_error());
                }
                (kind.as_str(), value)
            })
            .collect();
        return print_json(&json!({ "kinds": kinds }));
    }
    let percent = |count: &Count| {
        let error = count.standard_error().map_or_else(String::new, |error| format!(" ± {:.1}", 100.0 * error));
        format!("{}/{} = {:.1}{error} %", count.right, count.total, 100.0 * count.accuracy())
    };
    for (kind, TaskScore { plain, normalized }) in &scores {
        let of = if normalized.total > 0 { format!(", per byte {}", percent(normalized)) } else { String::new() };
        println!("{kind:<16} {}{of}", percent(plain));
    }
    Ok(())
}
