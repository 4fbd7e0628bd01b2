//! Judging a model by its outputs: the text that it reads, and what it loses against another of the same architecture.

pub mod tasks;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tandem_core::checkpoint::check_mapped;
use tandem_core::weights::{Form, MatrixData, ModuleKind, Weight};
use tandem_core::{Checkpoint, CheckpointError, ModelConfig};
use tandem_cpu::CpuBackend;
use tandem_cpu::system::default_threads;
use tandem_engine::{BlockManager, Engine, Logits, ModelRunner, Sequence, check_vocabulary};
use tandem_model::{Accounting, CheckpointWeights, Limits, WeightSource};
use tandem_text::Tokenizer;

use crate::device::cpu_backend;
use crate::load::{Loaded, LogitsRows, load, settle_tie};
use crate::model_dir::model_dir;
use crate::news::OnNews;
use crate::options::{DeviceOptions, LoadOptions, ModelOptions};
use crate::presets;
use crate::ranks::Joined;

/// Rows run at once.
const CHUNK: usize = 128;
/// Tokens of context shown with a position.
const SHOWN: usize = 12;

/// Strings of a JSON file, each a document; `None` when the file is plain text.
///
/// # Errors
/// It ends in .json and is not JSON, or holds no strings.
pub fn documents(path: &Path, text: &str) -> anyhow::Result<Option<Vec<String>>> {
    if path.extension().is_none_or(|e| e != "json") {
        return Ok(None);
    }
    fn collect(value: Value, out: &mut Vec<String>) {
        match value {
            Value::String(s) => out.push(s),
            Value::Array(values) => values.into_iter().for_each(|v| collect(v, out)),
            Value::Object(map) => map.into_iter().for_each(|(_, v)| collect(v, out)),
            _ => {}
        }
    }
    let value = serde_json::from_str(text).with_context(|| format!("{} is not JSON", path.display()))?;
    let mut out = vec![];
    collect(value, &mut out);
    if out.is_empty() {
        bail!("{} has no strings in it; expected an array or object of texts", path.display());
    }
    Ok(Some(out))
}

/// Checks what loading does not read: elements of matrices that stay mapped until an expert or a token asks for them, and
/// layers that do not run. An evaluation that happens not to meet a damaged weight would say nothing about the model.
///
/// # Errors
/// An element is NaN or infinite, or cannot be read.
pub fn check_weights(checkpoint: &Checkpoint, weights: &[Weight]) -> Result<(), CheckpointError> {
    let left: Vec<&Weight> = weights
        .iter()
        .filter(|weight| weight.dtype.has_non_finite_codes() || weight.spec.kind == ModuleKind::Mtp)
        .collect();
    let next = AtomicUsize::new(0);
    let check = || {
        while let Some(weight) = left.get(next.fetch_add(1, Ordering::Relaxed)) {
            if weight.spec.form == Form::Vector {
                weight.vector(checkpoint)?;
                continue;
            }
            let matrix = weight.matrix(checkpoint)?;
            for part in 0..matrix.parts.len() {
                matrix.check_finite(part, 0, matrix.rows)?;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..default_threads()).map(|_| scope.spawn(check)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
    })?;
    check_mapped()
}

/// [`load`], and [`check_weights`].
///
/// # Errors
/// As both.
pub fn load_checked(
    options: &ModelOptions,
    logits: LogitsRows,
    joined: Option<Joined>,
    on_news: OnNews<'_>,
) -> anyhow::Result<Loaded> {
    let loaded = load(options, LoadOptions::one_sequence(logits), joined, on_news)?;
    let checkpoint = Checkpoint::open(&loaded.dir)?;
    check_weights(&checkpoint, &tandem_model::resolve(&checkpoint, &loaded.config)?)?;
    Ok(loaded)
}

/// One of the two models.
pub struct Side {
    /// Its config.json.
    pub config: ModelConfig,
    checkpoint: Checkpoint,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl Side {
    /// Opens a model directory, or a Hugging Face id in the local cache.
    ///
    /// # Errors
    /// A file is missing or malformed.
    pub fn open(name: &str) -> anyhow::Result<Side> {
        let dir = model_dir(Some(name))?;
        let (mut config, checkpoint) = (ModelConfig::load(&dir)?, Checkpoint::open(&dir)?);
        settle_tie(&mut config, &checkpoint);
        Ok(Side { config, checkpoint, tokenizer: Tokenizer::from_dir(&dir)? })
    }

    /// Every weight, found.
    ///
    /// # Errors
    /// A tensor is missing, misshapen or unexplained.
    pub fn resolve(&self) -> Result<Vec<Weight>, CheckpointError> {
        tandem_model::resolve(&self.checkpoint, &self.config)
    }

    /// [`check_weights`] of this model.
    ///
    /// # Errors
    /// As [`check_weights`] and [`Side::resolve`].
    pub fn check_weights(&self) -> Result<(), CheckpointError> {
        check_weights(&self.checkpoint, &self.resolve()?)
    }

    /// Every weight, ready to be read.
    ///
    /// # Errors
    /// A tensor is missing, misshapen or unexplained.
    pub fn weights(&self) -> Result<CheckpointWeights<'_>, CheckpointError> {
        Ok(CheckpointWeights::new(&self.checkpoint, self.resolve()?))
    }

    /// Bytes of weights in memory.
    ///
    /// # Errors
    /// As [`Side::resolve`].
    pub fn resident_bytes(&self) -> Result<u64, CheckpointError> {
        Ok(Accounting::new(&self.resolve()?, &self.config).total(|k| k.resident_bytes))
    }

    /// The processor as a backend for this model.
    ///
    /// # Errors
    /// As [`Side::resolve`].
    pub fn backend(&self, options: &DeviceOptions) -> Result<CpuBackend, CheckpointError> {
        Ok(cpu_backend(options, self.resident_bytes()?))
    }

    /// Kinds of matrices: module paths without their layers.
    pub fn kinds(&self) -> Vec<String> {
        let specs = tandem_model::weight_specs(&self.config);
        let mut kinds: Vec<String> = vec![];
        for spec in specs.iter().filter(|spec| spec.form != Form::Vector) {
            let kind = kind_of(&spec.module);
            if !kinds.iter().any(|known| known == kind) {
                kinds.push(kind.to_string());
            }
        }
        kinds
    }
}

/// `model.layers.3.mlp.gate_proj` -> `mlp.gate_proj`.
pub fn kind_of(module: &str) -> &str {
    let module = module.strip_prefix("model.").unwrap_or(module);
    module.strip_prefix("layers.").and_then(|m| m.split_once('.')).map_or(module, |(_, kind)| kind)
}

/// A model from `weight_bytes` of weights of any source, for windows of `longest` tokens.
///
/// # Errors
/// A weight is damaged.
pub fn engine(
    config: &ModelConfig,
    source: &dyn WeightSource,
    weight_bytes: u64,
    longest: usize,
    options: &DeviceOptions,
) -> anyhow::Result<Engine> {
    let backend = cpu_backend(options, weight_bytes);
    let limits = Limits { max_rows: CHUNK, max_logits_rows: CHUNK };
    let model = tandem_model::load_from(&backend, config, source, limits, &mut |_| {})?;
    let blocks = BlockManager::for_tokens(longest);
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, blocks.n_slots());
    Ok(Engine::new(Box::new(runner), blocks, longest, config.max_position_embeddings))
}

/// A text as runs of tokens, each scored from an empty cache: inputs are all but the last, targets all but the first.
#[derive(PartialEq)]
pub struct Windows(pub Vec<Vec<u32>>);

impl Windows {
    /// Windows of `window` inputs of a plain text; strings of a JSON file are documents of their own.
    ///
    /// # Errors
    /// The file cannot be read, or has no text of at least 2 tokens.
    pub fn new(path: &Path, tokenizer: &Tokenizer, window: usize) -> anyhow::Result<Windows> {
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

    /// Inputs of the longest window.
    pub fn longest(&self) -> usize {
        self.0.iter().map(|tokens| tokens.len() - 1).max().unwrap_or(1)
    }

    /// Runs both models over every window.
    ///
    /// # Errors
    /// A model's logits are not finite.
    pub fn compare(&self, a: &mut Engine, b: &mut Engine) -> anyhow::Result<Comparison> {
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
    ///
    /// # Errors
    /// The tokenizer cannot decode it.
    pub fn context(&self, tokenizer: &Tokenizer, point: &Point) -> anyhow::Result<String> {
        let tokens = &self.0[point.window];
        let first = (point.offset + 1).saturating_sub(SHOWN);
        let before = tokenizer.decode(&tokens[first..=point.offset], false)?;
        Ok(format!("{before} -> {}", tokenizer.decode(&tokens[point.offset + 1..point.offset + 2], false)?))
    }
}

/// Both models at one position.
pub struct Point {
    /// Among all positions.
    pub position: usize,
    window: usize,
    offset: usize,
    /// KL divergence of B from A, in nats.
    pub kl: f64,
    /// Negative log likelihood of the next token under A, in nats.
    pub nll_a: f64,
    /// The same under B.
    pub nll_b: f64,
    /// Both find the same token likeliest.
    pub agree: bool,
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
pub struct Comparison {
    /// In order.
    pub points: Vec<Point>,
}

impl Comparison {
    fn mean(&self, of: impl Fn(&Point) -> f64) -> f64 {
        self.points.iter().map(of).sum::<f64>() / self.points.len() as f64
    }

    /// Mean KL divergence, in nats.
    pub fn mean_kl(&self) -> f64 {
        self.mean(|p| p.kl)
    }

    /// 99th percentile of the KL divergence, in nats.
    pub fn p99_kl(&self) -> f64 {
        let mut all: Vec<f64> = self.points.iter().map(|p| p.kl).collect();
        all.sort_by(f64::total_cmp);
        all[(all.len() - 1) * 99 / 100]
    }

    /// Share of positions at which both find the same token likeliest.
    pub fn agreement(&self) -> f64 {
        self.mean(|p| if p.agree { 1.0 } else { 0.0 })
    }

    /// Perplexity under one of the two.
    pub fn perplexity(&self, nll: impl Fn(&Point) -> f64) -> f64 {
        self.mean(nll).exp()
    }

    /// The positions with the largest divergences.
    pub fn worst(&self, n: usize) -> Vec<&Point> {
        let mut points: Vec<&Point> = self.points.iter().collect();
        points.sort_by(|a, b| b.kl.total_cmp(&a.kl));
        points.truncate(n);
        points
    }
}

/// The weights of one model, but one kind of matrix ([`kind_of`]) from another of the same shapes.
pub struct Mixed<'a> {
    side: &'a Side,
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

impl<'a> Mixed<'a> {
    /// The weights of `a`, matrices of `kind` from `b`.
    ///
    /// # Errors
    /// When a checkpoint's weights do not fit its configuration.
    pub fn new(a: &'a Side, b: &'a Side, kind: &'a str) -> anyhow::Result<Mixed<'a>> {
        Ok(Mixed { side: a, a: a.weights()?, b: b.weights()?, kind })
    }

    /// True when any matrix of the kind is not the same in both.
    ///
    /// # Errors
    /// When a matrix cannot be read.
    pub fn differs(&self) -> anyhow::Result<bool> {
        for spec in tandem_model::weight_specs(&self.side.config) {
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
