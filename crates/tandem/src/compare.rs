//! `tandem eval compare`: what a model's outputs lose against another's of the same architecture.

use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::json;
use tandem_core::weights::{Form, MatrixData, Weight};
use tandem_core::{Checkpoint, CheckpointError, ModelConfig};
use tandem_cpu::CpuBackend;
use tandem_engine::{BlockManager, Engine, Logits, ModelRunner, Sequence, check_vocabulary};
use tandem_model::{Accounting, CheckpointWeights, Limits, WeightSource};

use crate::cli::{ActivationsArg, CompareArgs};
use crate::eval::{check_weights, documents};
use crate::load::{cpu_backend, model_dir};
use crate::presets;
use crate::report::print_json;
use tandem_text::Tokenizer;

/// Inputs per window of a plain text.
const WINDOW: usize = 512;
/// Rows run at once.
const CHUNK: usize = 128;
/// Worst positions shown.
const WORST: usize = 5;
/// Tokens of context shown with each.
const SHOWN: usize = 12;

/// Runs the command.
pub(crate) fn compare(args: &CompareArgs) -> anyhow::Result<()> {
    let (a, b) = (Side::open(&args.a)?, Side::open(&args.b)?);
    ensure!(
        a.config.vocab_size == b.config.vocab_size,
        "{} has a vocabulary of {}, {} of {}: only models of one tokenizer can be compared",
        args.a,
        a.config.vocab_size,
        args.b,
        b.config.vocab_size
    );
    let windows = Windows::new(&args.text, &a.tokenizer, args.context.unwrap_or(WINDOW))?;
    ensure!(
        Windows::new(&args.text, &b.tokenizer, args.context.unwrap_or(WINDOW))?.0 == windows.0,
        "the tokenizers of {} and {} cut the text differently: only models of one tokenizer can be compared",
        args.a,
        args.b
    );
    for (side, name) in [(&a, &args.a), (&b, &args.b)] {
        check_weights(&side.checkpoint, &side.resolve()?).with_context(|| name.clone())?;
    }
    let load = |side: &Side, source: &dyn WeightSource| {
        let bytes = side.resident_bytes()?;
        engine(&side.config, source, bytes, windows.longest(), args.threads, args.activations)
    };
    let mut first = load(&a, &a.weights()?)?;
    let result = windows.compare(&mut first, &mut load(&b, &b.weights()?)?)?;
    let mut kinds: Vec<(String, Comparison)> = vec![];
    if args.per_module {
        for kind in a.kinds()? {
            let mixed = Mixed { a: a.weights()?, b: b.weights()?, kind: &kind };
            if mixed.differs(&a)? {
                let mut engine = load(&a, &mixed)?;
                kinds.push((kind.clone(), windows.compare(&mut first, &mut engine)?));
            }
        }
        kinds.sort_by(|x, y| y.1.mean_kl().total_cmp(&x.1.mean_kl()));
    }
    if args.json {
        let worst = |c: &Comparison| -> anyhow::Result<Vec<serde_json::Value>> {
            c.worst(WORST)
                .iter()
                .map(|p| Ok(json!({"position": p.position, "kl": p.kl, "context": windows.context(&a.tokenizer, p)?})))
                .collect()
        };
        let ranked: Vec<_> = kinds
            .iter()
            .map(|(kind, c)| json!({"module": kind, "mean_kl": c.mean_kl(), "top1_agreement": c.agreement()}))
            .collect();
        return print_json(&json!({
            "a": args.a, "b": args.b,
            "tokens": result.points.len(),
            "perplexity_a": result.perplexity(|p| p.nll_a),
            "perplexity_b": result.perplexity(|p| p.nll_b),
            "mean_kl": result.mean_kl(),
            "p99_kl": result.p99_kl(),
            "top1_agreement": result.agreement(),
            "worst": worst(&result)?,
            "per_module": ranked,
        }));
    }
    println!(
        "perplexity        {:.4} (A)  {:.4} (B)  over {} tokens",
        result.perplexity(|p| p.nll_a),
        result.perplexity(|p| p.nll_b),
        result.points.len()
    );
    println!("KL(A || B)        {:.6} nats mean, {:.6} at the 99th percentile", result.mean_kl(), result.p99_kl());
    println!("top-1 agreement   {:.2} %", 100.0 * result.agreement());
    println!("worst positions");
    for point in result.worst(WORST) {
        println!("  {:>7}  KL {:.4}  {:?}", point.position, point.kl, windows.context(&a.tokenizer, point)?);
    }
    if !kinds.is_empty() {
        println!(
            "\none kind of module at a time from B, the rest from A\n{:<36}{:>12}{:>10}",
            "module", "mean KL", "top-1"
        );
        for (kind, c) in &kinds {
            println!("{kind:<36}{:>12.6}{:>8.2} %", c.mean_kl(), 100.0 * c.agreement());
        }
    }
    Ok(())
}

/// One of the two models.
pub(crate) struct Side {
    pub(crate) config: ModelConfig,
    checkpoint: Checkpoint,
    pub(crate) tokenizer: Tokenizer,
}

impl Side {
    pub(crate) fn open(name: &str) -> anyhow::Result<Side> {
        let dir = model_dir(Some(name))?;
        let config = ModelConfig::load(&dir)?;
        Ok(Side { config, checkpoint: Checkpoint::open(&dir)?, tokenizer: Tokenizer::from_dir(&dir)? })
    }

    /// Every weight, found.
    pub(crate) fn resolve(&self) -> Result<Vec<Weight>, CheckpointError> {
        tandem_model::resolve(&self.checkpoint, &self.config)
    }

    pub(crate) fn weights(&self) -> Result<CheckpointWeights<'_>, CheckpointError> {
        Ok(CheckpointWeights::new(&self.checkpoint, self.resolve()?))
    }

    /// Bytes of weights in memory.
    pub(crate) fn resident_bytes(&self) -> Result<u64, CheckpointError> {
        Ok(Accounting::new(&self.resolve()?, &self.config).total(|k| k.resident_bytes))
    }

    /// The processor as a backend for this model.
    pub(crate) fn backend(
        &self,
        threads: Option<usize>,
        activations: ActivationsArg,
    ) -> Result<CpuBackend, CheckpointError> {
        Ok(cpu_backend(threads, activations, self.resident_bytes()?).0)
    }

    /// Kinds of matrices: module paths without their layers.
    pub(crate) fn kinds(&self) -> anyhow::Result<Vec<String>> {
        let specs = tandem_model::weight_specs(&self.config);
        let mut kinds: Vec<String> = vec![];
        for spec in specs.iter().filter(|spec| spec.form != Form::Vector) {
            let kind = kind_of(&spec.module);
            if !kinds.iter().any(|known| known == kind) {
                kinds.push(kind.to_string());
            }
        }
        Ok(kinds)
    }
}

/// `model.layers.3.mlp.gate_proj` -> `mlp.gate_proj`.
pub(crate) fn kind_of(module: &str) -> &str {
    let module = module.strip_prefix("model.").unwrap_or(module);
    module.strip_prefix("layers.").and_then(|m| m.split_once('.')).map_or(module, |(_, kind)| kind)
}

/// The weights of A, but one kind of matrix from B.
struct Mixed<'a> {
    a: CheckpointWeights<'a>,
    b: CheckpointWeights<'a>,
    kind: &'a str,
}

impl WeightSource for Mixed<'_> {
    fn matrix(&self, module: &str) -> Result<MatrixData, CheckpointError> {
        if kind_of(module) == self.kind { self.b.matrix(module) } else { self.a.matrix(module) }
    }

    fn vector(&self, module: &str, leaf: &str) -> Result<Vec<f32>, CheckpointError> {
        self.a.vector(module, leaf)
    }
}

impl Mixed<'_> {
    /// True when any matrix of the kind is not the same in both.
    fn differs(&self, side: &Side) -> anyhow::Result<bool> {
        for spec in tandem_model::weight_specs(&side.config) {
            if spec.form != Form::Vector && kind_of(&spec.module) == self.kind {
                let (a, b) = (self.a.matrix(&spec.module)?, self.b.matrix(&spec.module)?);
                let same = a.parts.iter().zip(&b.parts).all(|(a, b)| {
                    a.weight == b.weight
                        && a.scales == b.scales
                        && a.biases == b.biases
                        && a.global_scale == b.global_scale
                });
                if a.dtype != b.dtype || !same {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// A model from `weight_bytes` of weights of any source, for windows of `longest` tokens.
pub(crate) fn engine(
    config: &ModelConfig,
    source: &dyn WeightSource,
    weight_bytes: u64,
    longest: usize,
    threads: Option<usize>,
    activations: ActivationsArg,
) -> anyhow::Result<Engine> {
    let (backend, _) = cpu_backend(threads, activations, weight_bytes);
    let limits = Limits { max_rows: CHUNK, max_logits_rows: CHUNK };
    let model = tandem_model::load_from(&backend, config, source, limits, &mut |_| {})?;
    let blocks = BlockManager::for_tokens(longest);
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, blocks.n_slots());
    Ok(Engine::new(Box::new(runner), blocks, longest, config.max_position_embeddings))
}

/// A text as runs of tokens, each scored from an empty cache: inputs are all but the last, targets all but the first.
#[derive(PartialEq)]
pub(crate) struct Windows(pub(crate) Vec<Vec<u32>>);

impl Windows {
    /// Windows of `window` inputs of a plain text; strings of a JSON file are documents of their own.
    pub(crate) fn new(path: &Path, tokenizer: &Tokenizer, window: usize) -> anyhow::Result<Windows> {
        let text = presets::read(path)?;
        let mut windows = vec![];
        match documents(path, &text)? {
            Some(documents) => {
                for document in documents {
                    windows.push(tokenizer.encode(&document, true)?);
                }
            }
            None => {
                let tokens = tokenizer.encode(&text, true)?;
                windows.extend(
                    (0..tokens.len())
                        .step_by(window.max(1))
                        .map(|i| tokens[i..tokens.len().min(i + window + 1)].to_vec()),
                );
            }
        }
        windows.retain(|tokens| tokens.len() > 1);
        ensure!(!windows.is_empty(), "{} has no text of at least 2 tokens", path.display());
        Ok(Windows(windows))
    }

    pub(crate) fn longest(&self) -> usize {
        self.0.iter().map(|tokens| tokens.len() - 1).max().unwrap_or(1)
    }

    /// Runs both models over every window.
    pub(crate) fn compare(&self, a: &mut Engine, b: &mut Engine) -> anyhow::Result<Comparison> {
        let vocab = a.vocab_size();
        // Targets too, before anything runs.
        self.0.iter().try_for_each(|tokens| check_vocabulary(tokens, vocab))?;
        let mut points = vec![];
        for (window, tokens) in self.0.iter().enumerate() {
            let (mut of_a, mut of_b) = (Sequence::default(), Sequence::default());
            let inputs = &tokens[..tokens.len() - 1];
            for (chunk, inputs) in inputs.chunks(CHUNK).enumerate() {
                let la = a.run(&mut of_a, inputs, CHUNK, Logits::All);
                let la = la.with_context(|| format!("model A, window {window}"))?;
                let lb = b.run(&mut of_b, inputs, CHUNK, Logits::All);
                let lb = lb.with_context(|| format!("model B, window {window}"))?;
                for (i, (la, lb)) in la.chunks_exact(vocab).zip(lb.chunks_exact(vocab)).enumerate() {
                    let offset = chunk * CHUNK + i;
                    let target = tokens[offset + 1] as usize;
                    let point = Point::new(la, lb, target, window, offset, points.len());
                    // Rounding may leave a divergence a little below zero, nothing else is hidden: `max` would turn NaN
                    // into perfect agreement.
                    ensure!(
                        point.kl.is_finite() && point.nll_a.is_finite() && point.nll_b.is_finite(),
                        "KL(A || B) is {} after position {offset} of window {window}: the logits are too far apart for f64",
                        point.kl
                    );
                    points.push(point);
                }
            }
            a.release(&mut of_a);
            b.release(&mut of_b);
        }
        let comparison = Comparison { points };
        for (name, perplexity) in [("A", comparison.perplexity(|p| p.nll_a)), ("B", comparison.perplexity(|p| p.nll_b))]
        {
            ensure!(perplexity.is_finite(), "model {name} has no finite perplexity: this is no model of this text");
        }
        Ok(comparison)
    }

    /// The text that leads to a position, and the token that follows.
    fn context(&self, tokenizer: &Tokenizer, point: &Point) -> anyhow::Result<String> {
        let tokens = &self.0[point.window];
        let first = (point.offset + 1).saturating_sub(SHOWN);
        let before = tokenizer.decode(&tokens[first..=point.offset], false)?;
        Ok(format!("{before} -> {}", tokenizer.decode(&tokens[point.offset + 1..point.offset + 2], false)?))
    }
}

/// Both models at one position.
pub(crate) struct Point {
    position: usize,
    window: usize,
    offset: usize,
    /// Nats.
    kl: f64,
    nll_a: f64,
    nll_b: f64,
    agree: bool,
}

impl Point {
    fn new(la: &[f32], lb: &[f32], target: usize, window: usize, offset: usize, position: usize) -> Point {
        let top = |logits: &[f32]| {
            logits
                .iter()
                .enumerate()
                .fold((0, f32::NEG_INFINITY), |best, (i, v)| if *v > best.1 { (i, *v) } else { best })
        };
        let log_sum = |logits: &[f32], max: f32| {
            f64::from(max) + logits.iter().map(|v| f64::from(v - max).exp()).sum::<f64>().ln()
        };
        let ((best_a, max_a), (best_b, max_b)) = (top(la), top(lb));
        let (sum_a, sum_b) = (log_sum(la, max_a), log_sum(lb, max_b));
        let kl: f64 = la
            .iter()
            .zip(lb)
            .map(|(a, b)| {
                let (log_a, log_b) = (f64::from(*a) - sum_a, f64::from(*b) - sum_b);
                log_a.exp() * (log_a - log_b)
            })
            .sum();
        let (nll_a, nll_b) = (sum_a - f64::from(la[target]), sum_b - f64::from(lb[target]));
        Point { position, window, offset, kl: if kl < 0.0 { 0.0 } else { kl }, nll_a, nll_b, agree: best_a == best_b }
    }
}

/// Both models at every position.
pub(crate) struct Comparison {
    points: Vec<Point>,
}

impl Comparison {
    fn mean(&self, of: impl Fn(&Point) -> f64) -> f64 {
        self.points.iter().map(of).sum::<f64>() / self.points.len() as f64
    }

    pub(crate) fn mean_kl(&self) -> f64 {
        self.mean(|p| p.kl)
    }

    fn p99_kl(&self) -> f64 {
        let mut all: Vec<f64> = self.points.iter().map(|p| p.kl).collect();
        all.sort_by(f64::total_cmp);
        all[(all.len() - 1) * 99 / 100]
    }

    fn agreement(&self) -> f64 {
        self.mean(|p| if p.agree { 1.0 } else { 0.0 })
    }

    fn perplexity(&self, nll: impl Fn(&Point) -> f64) -> f64 {
        self.mean(nll).exp()
    }

    fn worst(&self, n: usize) -> Vec<&Point> {
        let mut points: Vec<&Point> = self.points.iter().collect();
        points.sort_by(|a, b| b.kl.total_cmp(&a.kl));
        points.truncate(n);
        points
    }
}
