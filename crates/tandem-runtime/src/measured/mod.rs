//! A model that is loaded to be measured: from a checkpoint, or of a preset's shapes with random weights.

mod bytes_read;
pub mod drafts;
pub mod plot;
mod ranks;
mod runner;
pub mod workload;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Map, Value, json};
use tandem_core::weights::{Read, Weight};
use tandem_core::{Checkpoint, ModelConfig};
use tandem_cpu::Pool;
use tandem_engine::Profiled;
use tandem_model::{Accounting, CheckpointWeights, DummyWeights, Limits, Recipe, Stacks, WeightSource};

use crate::device::{Device, DeviceKind, ToHold, WithDevice, lock_memory, n_threads, no_host_experts};
use crate::load::{Shape, resident_bytes, runner as load_runner};
use crate::model_dir::model_dir;
use crate::news::{News, OnNews};
use crate::options::{DeviceOptions, ParallelOptions, ShapeOptions};
use crate::presets;
use crate::ranks::{Joined, Model, Source, follow_with};
use crate::units::bytes;

pub use bytes_read::{BytesRead, prefill_flop};
pub use ranks::{RankReport, by_stage};
pub use runner::{MeasuredRunner, times_ahead};

/// Read for the bandwidth before a model is loaded.
const BANDWIDTH_BYTES: usize = 1 << 30;

/// What is measured, and how.
#[derive(Clone, Debug)]
pub struct MeasuredOptions {
    /// A model directory or a Hugging Face id; the bundled model if `None`.
    pub model: Option<String>,
    /// Shapes of made-up weights.
    pub shapes: ShapeOptions,
    /// Formats of made-up weights.
    pub quant: Recipe,
    /// Pin the weights in memory.
    pub lock: bool,
    /// Where it runs.
    pub device: DeviceOptions,
    /// How it is divided among ranks.
    pub parallel: ParallelOptions,
    /// Tensor-parallel ranks sum in each layer of this many only; 1 but to see what the sums cost.
    pub sync_every: usize,
}

/// A model ready to be measured.
pub struct MeasuredModel {
    /// Its config.json, or a preset's with other shapes.
    pub config: ModelConfig,
    /// Its bytes by kind of module.
    pub accounting: Accounting,
    /// Runs it.
    pub runner: Box<dyn MeasuredRunner>,
    /// Parameters of the index queries, which short contexts do not need.
    pub index_query_parameters: u64,
    /// One line that names model, formats and numerics.
    pub title: String,
    name: String,
    quant: Option<String>,
    /// Name of the activations' numerics.
    pub numerics: &'static str,
    /// Weights in memory; an MTP head stays in its file.
    pub resident_bytes: u64,
    load_seconds: f64,
    /// Until [`MeasuredModel::note_peak_memory`].
    pub peak_memory_bytes: u64,
}

/// Another rank than 0.
///
/// # Errors
/// The model cannot be loaded, or another rank failed.
pub fn follow(joined: Joined, options: &MeasuredOptions) -> anyhow::Result<()> {
    let place = match &joined {
        Joined::Tcp(started) => started.model_on_this_host().map(str::to_string),
        _ => None,
    };
    let (_, model) = described(options, place.as_deref())?;
    let kind = DeviceKind::choose_for_ranks(&options.device, joined.transport(&options.parallel))?;
    kind.with(Follow { joined, model, parallel: &options.parallel })
}

struct Follow<'a> {
    joined: Joined,
    model: Model,
    parallel: &'a ParallelOptions,
}

impl WithDevice for Follow<'_> {
    type Output = ();

    fn run<D: Device>(self) -> anyhow::Result<()> {
        follow_with::<Profiled<D>>(self.joined, &self.model, self.parallel)
    }
}

/// Bytes per second before a model is loaded; 0 for devices that are measured with it.
///
/// # Errors
/// This build does not have the device.
pub fn bandwidth_before(options: &DeviceOptions) -> anyhow::Result<f64> {
    Ok(match DeviceKind::choose(options)? {
        DeviceKind::Cpu => {
            tandem_cpu::bandwidth::measure_read_bandwidth(&Pool::new(n_threads(options)), BANDWIDTH_BYTES)
        }
        DeviceKind::Cuda | DeviceKind::Wgpu => 0.0,
    })
}

struct Lead<'a, 'n> {
    options: &'a MeasuredOptions,
    model: &'a Model,
    shape: Shape<'a>,
    joined: Joined,
    on_news: OnNews<'n>,
}

impl WithDevice for Lead<'_, '_> {
    type Output = (Box<dyn MeasuredRunner>, &'static str);

    fn run<D: Device>(self) -> anyhow::Result<Self::Output> {
        let Lead { options, model, shape, joined, on_news } = self;
        ranks::load::<D>(joined, &options.parallel, options.sync_every, model, shape, on_news)
    }
}

struct InOneProcess<'a, 'n> {
    options: &'a MeasuredOptions,
    model: &'a Model,
    to_hold: ToHold<'a>,
    on_news: OnNews<'n>,
}

impl WithDevice for InOneProcess<'_, '_> {
    type Output = (Box<dyn MeasuredRunner>, &'static str);

    fn run<D: Device>(self) -> anyhow::Result<Self::Output> {
        let InOneProcess { options, model, to_hold, on_news } = self;
        let source: Box<dyn WeightSource + '_> = match &model.source {
            Source::Checkpoint(checkpoint) => Box::new(CheckpointWeights::new(checkpoint, model.weights.to_vec())),
            Source::Dummy { recipe, .. } => Box::new(DummyWeights::new(&model.config, recipe, D::stacks())),
        };
        let backend = D::alone(&options.device, &to_hold, on_news)?;
        let numerics = backend.numerics_name();
        let runner = load_runner(backend.profiled(), &*source, &to_hold, on_news)?;
        if options.lock {
            lock_memory(on_news);
        }
        Ok((Box::new(runner::Alone { runner, faults_before: 0 }), numerics))
    }
}

/// Name, shapes, and where the weights come from (`place`, if the launcher says so); nothing is loaded.
fn described(options: &MeasuredOptions, place: Option<&str>) -> anyhow::Result<(String, Model)> {
    let dir = || model_dir(place.or(options.model.as_deref()));
    if !options.shapes.is_dummy("--model DIR")? {
        let dir = dir()?;
        let (mut config, checkpoint) = (ModelConfig::load(&dir)?, Checkpoint::open(&dir)?);
        config.settle_tie(&checkpoint);
        let weights = tandem_model::resolve(&checkpoint, &config)?;
        return Ok((name_of(&dir), model_of(options, config, weights, Source::Checkpoint(Arc::new(checkpoint)))));
    }
    let (name, text) = match &options.shapes.config {
        Some(config) => presets::config_text(config)?,
        None => {
            let dir = dir()?;
            (name_of(&dir), presets::read(&dir.join("config.json"))?)
        }
    };
    Ok((name, dummy(options, options.shapes.apply(&text)?)?))
}

/// Random weights for the configuration of a text.
fn dummy(options: &MeasuredOptions, text: String) -> anyhow::Result<Model> {
    let config = ModelConfig::parse(&text)?;
    let weights = DummyWeights::new(&config, &options.quant, Stacks::Distinct).weights().to_vec();
    Ok(model_of(options, config, weights, Source::Dummy { recipe: options.quant.clone(), text }))
}

fn model_of(options: &MeasuredOptions, config: ModelConfig, weights: Vec<Weight>, source: Source) -> Model {
    let (config, weights, device) = (Arc::new(config), Arc::new(weights), options.device.clone());
    Model { config, weights, source, device, lock: options.lock, drafts: false, sidecar: None }
}

impl MeasuredModel {
    /// Loads or makes the model, for batches of `max_rows` and sequences of `length` tokens; as rank 0 of several if
    /// `joined` leads to others.
    ///
    /// # Errors
    /// The options contradict the model, it does not fit, or another rank failed.
    pub fn load(
        options: &MeasuredOptions,
        limits: Limits,
        length: usize,
        n_slots: usize,
        joined: Option<Joined>,
        on_news: OnNews<'_>,
    ) -> anyhow::Result<MeasuredModel> {
        let (name, model) = described(options, None)?;
        MeasuredModel::load_model(options, name, model, limits, length, n_slots, joined, on_news)
    }

    /// Makes a model of random weights with the configuration of this text, in one process.
    ///
    /// # Errors
    /// As [`MeasuredModel::load`].
    pub fn of_text(
        options: &MeasuredOptions,
        text: String,
        limits: Limits,
        length: usize,
        n_slots: usize,
        on_news: OnNews<'_>,
    ) -> anyhow::Result<MeasuredModel> {
        let model = dummy(options, text)?;
        MeasuredModel::load_model(options, "a sample".to_string(), model, limits, length, n_slots, None, on_news)
    }

    #[allow(clippy::too_many_arguments)]
    fn load_model(
        options: &MeasuredOptions,
        name: String,
        model: Model,
        limits: Limits,
        length: usize,
        n_slots: usize,
        joined: Option<Joined>,
        on_news: OnNews<'_>,
    ) -> anyhow::Result<MeasuredModel> {
        let start = Instant::now();
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
        let resident_bytes = resident_bytes(&accounting);
        let doing = if dummy { "making" } else { "loading" };
        on_news(News::Note(format!("{name}: {doing} {}", bytes(resident_bytes))));
        let shape = Shape { config, limits, n_slots };
        let (runner, numerics) = match joined {
            Some(joined) => {
                no_host_experts(&options.device)?;
                let kind = DeviceKind::choose_for_ranks(&options.device, joined.transport(&options.parallel))?;
                kind.with(Lead { options, model: &model, shape, joined, on_news })?
            }
            None => {
                let to_hold = ToHold { shape, weights, resident: resident_bytes, mtp: 0, sidecar: None };
                DeviceKind::choose(&options.device)?.with(InOneProcess { options, model: &model, to_hold, on_news })?
            }
        };
        let config = config.clone();
        let quant = dummy.then(|| options.quant.name.clone());
        let title = format!(
            "{name}, {} layers, {}, activations {numerics}",
            config.num_hidden_layers,
            quant.as_deref().unwrap_or("checkpoint's formats")
        );
        let load_seconds = start.elapsed().as_secs_f64();
        Ok(MeasuredModel {
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
    ///
    /// # Errors
    /// A rank failed.
    pub fn fill_cache(&mut self, n_slots: usize) -> anyhow::Result<()> {
        self.runner.fill_cache(&self.config, n_slots)
    }

    /// Records the peak so far: measuring bandwidth beside the loaded model would add its buffer. (The buffer of the
    /// first measurement is gone before the model is loaded, but it shows in the peak of models smaller than it.)
    /// `beside` bytes are the measurement's own.
    pub fn note_peak_memory(&mut self, beside: usize) {
        self.peak_memory_bytes = self.runner.peak_memory_bytes() - beside as u64;
    }

    /// What was measured, for JSON.
    pub fn describe(&self) -> Map<String, Value> {
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
}

/// A model directory's own name.
fn name_of(dir: &Path) -> String {
    dir.file_name().map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned())
}
