//! The model that a benchmark runs: from a checkpoint, or of a preset's shapes with random weights.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Map, Value, json};
use tandem_core::weights::{ModuleKind, Read};
use tandem_core::{Checkpoint, ModelConfig};
use tandem_cpu::CpuBackend;
use tandem_cpu::system::default_threads;
use tandem_engine::Profiled;
use tandem_model::{Accounting, CheckpointWeights, DummyWeights, Limits, Stacks, WeightSource};

use super::device::{self, BenchRunner};
use super::ranks;
use crate::cli::{BackendArg, BenchModelArgs, TransportArg};
use crate::distributed::{self, Model, Source, Started};
use crate::load::{Device, Shape, choose, lock_memory, model_dir, no_host_experts};
use crate::presets;
use crate::report::{bytes, count};

/// A model ready to be measured.
pub(super) struct BenchModel {
    pub(super) config: ModelConfig,
    pub(super) accounting: Accounting,
    pub(super) runner: Box<dyn BenchRunner>,
    /// Parameters of the index queries, which short contexts do not need.
    pub(super) index_query_parameters: u64,
    /// One line that names model, formats and numerics.
    pub(super) title: String,
    name: String,
    quant: Option<String>,
    pub(super) numerics: &'static str,
    /// Weights in memory; an MTP head stays in its file.
    pub(super) resident_bytes: u64,
    load_seconds: f64,
    /// Until [`BenchModel::note_peak_memory`].
    peak_memory_bytes: u64,
}

/// Another rank than 0.
pub(crate) fn follow(started: Started, args: &BenchModelArgs) -> anyhow::Result<()> {
    let (_, model) = described(args, started.order.model.as_deref())?;
    match started.order.parallel.transport {
        #[cfg(feature = "cuda")]
        TransportArg::Nccl => distributed::follow_with::<Profiled<tandem_cuda::CudaBackend>>(started, &model),
        #[cfg(not(feature = "cuda"))]
        TransportArg::Nccl => anyhow::bail!(distributed::NO_CUDA),
        _ => distributed::follow_with::<Profiled<CpuBackend>>(started, &model),
    }
}

/// Name, shapes, and where the weights come from (`place`, if the launcher says so); nothing is loaded.
fn described(args: &BenchModelArgs, place: Option<&str>) -> anyhow::Result<(String, Model)> {
    let dir = || model_dir(place.or(args.model.as_deref()));
    let model = |config, weights, source| Model {
        config: Arc::new(config),
        weights: Arc::new(weights),
        source,
        threads: args.threads,
        lock: args.lock,
        activations: args.activations,
    };
    if !args.shapes.is_dummy("--model DIR")? {
        let dir = dir()?;
        let (config, checkpoint) = (ModelConfig::load(&dir)?, Checkpoint::open(&dir)?);
        let weights = tandem_model::resolve(&checkpoint, &config)?;
        return Ok((name_of(&dir), model(config, weights, Source::Checkpoint(Arc::new(checkpoint)))));
    }
    let (name, text) = match &args.shapes.config {
        Some(config) => presets::config_text(config)?,
        None => {
            let dir = dir()?;
            (name_of(&dir), presets::read(&dir.join("config.json"))?)
        }
    };
    let text = args.shapes.apply(&text)?;
    let config = ModelConfig::parse(&text)?;
    let weights = DummyWeights::new(&config, &args.quant, Stacks::Distinct).weights().to_vec();
    Ok((name, model(config, weights, Source::Dummy { recipe: args.quant.clone(), text })))
}

/// Threads to use.
pub(super) fn n_threads(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(default_threads).max(1)
}

impl BenchModel {
    /// Loads or makes the model, for batches of `max_rows` and sequences of `length` tokens.
    pub(super) fn load(
        args: &BenchModelArgs,
        max_rows: usize,
        max_logits_rows: usize,
        length: usize,
        n_slots: usize,
    ) -> anyhow::Result<BenchModel> {
        let start = Instant::now();
        let limits = Limits { max_rows, max_logits_rows };
        let (name, model) = described(args, None)?;
        let (config, weights) = (&*model.config, &*model.weights);
        ensure!(
            length <= config.max_position_embeddings,
            "{length} positions exceed the {} this model was made for; ask for a shorter context",
            config.max_position_embeddings
        );
        let dummy = matches!(model.source, Source::Dummy { .. });
        let accounting = Accounting::new(weights, config);
        let index_query_parameters =
            weights.iter().filter(|w| w.spec.read == Read::Sparse).map(|w| w.spec.elements() as u64).sum();
        let resident_bytes = accounting.total(|k| if k.kind == ModuleKind::Mtp { 0 } else { k.resident_bytes });
        eprintln!("{name}: {} {}", if dummy { "making" } else { "loading" }, bytes(resident_bytes));
        let shape = Shape { config, limits, n_slots };
        let (runner, numerics) = if distributed::leads() {
            no_host_experts(args.n_cpu_moe)?;
            match distributed::transport(&args.parallel) {
                #[cfg(feature = "cuda")]
                TransportArg::Nccl => ranks::load::<tandem_cuda::CudaBackend>(args, &model, shape)?,
                #[cfg(not(feature = "cuda"))]
                TransportArg::Nccl => anyhow::bail!(distributed::NO_CUDA),
                _ => {
                    let on_cpu = args.backend != BackendArg::Cuda;
                    ensure!(on_cpu, "several ranks run on GPUs with --transport nccl; add it, or use --backend cpu");
                    ranks::load::<CpuBackend>(args, &model, shape)?
                }
            }
        } else {
            let source: Box<dyn WeightSource + '_> = match &model.source {
                Source::Checkpoint(checkpoint) => Box::new(CheckpointWeights::new(checkpoint, weights.clone())),
                Source::Dummy { recipe, .. } => {
                    let stacks = match choose(args.backend, args.activations)? {
                        Device::Cpu => Stacks::Distinct,
                        #[cfg(feature = "cuda")]
                        Device::Cuda => Stacks::Repeated,
                    };
                    Box::new(DummyWeights::new(config, recipe, stacks))
                }
            };
            let loaded = device::load(args, &*source, shape, resident_bytes, weights)?;
            if args.lock {
                lock_memory();
            }
            loaded
        };
        let config = config.clone();
        let quant = dummy.then(|| args.quant.name.clone());
        let title = format!(
            "{name}, {} layers, {}, activations {numerics}",
            config.num_hidden_layers,
            quant.as_deref().unwrap_or("checkpoint's formats")
        );
        let load_seconds = start.elapsed().as_secs_f64();
        Ok(BenchModel {
            config,
            accounting,
            runner,
            index_query_parameters,
            title,
            name,
            quant,
            numerics,
            resident_bytes,
            load_seconds,
            peak_memory_bytes: 0,
        })
    }

    /// Puts random vectors into the first `n_slots` slots of the cache.
    pub(super) fn fill_cache(&mut self, n_slots: usize) -> anyhow::Result<()> {
        let start = Instant::now();
        self.runner.fill_cache(&self.config, n_slots)?;
        eprintln!("cache filled with {n_slots} random vectors per layer in {:.1} s", start.elapsed().as_secs_f64());
        Ok(())
    }

    /// Records the peak so far: measuring bandwidth beside the loaded model would add its buffer. (The buffer of the
    /// first measurement is gone before the model is loaded, but it shows in the peak of models smaller than it.)
    /// `beside` bytes are the measurement's own.
    pub(super) fn note_peak_memory(&mut self, beside: usize) {
        self.peak_memory_bytes = self.runner.peak_memory_bytes() - beside as u64;
    }

    /// What was measured, for JSON.
    pub(super) fn describe(&self) -> Map<String, Value> {
        let moe_layers = (0..self.config.num_hidden_layers).filter(|l| self.config.is_sparse(*l)).count();
        let value = json!({
            "tandem_version": env!("CARGO_PKG_VERSION"),
            "model": self.name,
            "weights": if self.quant.is_some() { "dummy" } else { "checkpoint" },
            "quant": self.quant,
            "num_hidden_layers": self.config.num_hidden_layers,
            "moe_layers": moe_layers,
            "vocab_size": self.config.vocab_size,
            "resident_bytes": self.resident_bytes,
            "active_parameters": self.accounting.total(|k| k.active_parameters),
            "numerics": self.numerics,
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        });
        let Value::Object(mut map) = value else { return Map::new() };
        map.extend(self.runner.describe());
        map
    }

    /// The same for people.
    pub(super) fn print(&self) {
        println!("{}; {}", self.title, self.runner.name());
        println!(
            "{} parameters active per token, weights {}, peak memory {}",
            count(self.accounting.total(|k| k.active_parameters)),
            bytes(self.resident_bytes),
            bytes(self.peak_memory_bytes)
        );
    }
}

/// A model directory's own name.
fn name_of(dir: &Path) -> String {
    dir.file_name().map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned())
}
