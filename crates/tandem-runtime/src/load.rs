//! From options to an engine that is ready to run.

use std::any::TypeId;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use tandem_core::weights::{ModuleKind, Weight};
use tandem_core::{Backend, Checkpoint, DType, Float, ModelConfig};
use tandem_cpu::{CpuBackend, Isa, system};
use tandem_engine::{BlockManager, DraftDepth, EXACT_ROWS, Engine, ModelRunner, Profiled, Runner};
use tandem_model::{Accounting, CheckpointWeights, Limits, Plan, Share, WeightSource};

use crate::device::{Device, DeviceKind, ToHold, WithDevice, fits_in_memory, lock_memory, n_threads, no_host_experts};
use crate::diagnosis::{Facts, Recorder, Residency};
use crate::model_dir::model_dir;
use crate::mtp::{self, Sidecar};
use crate::news::{Meter, OnNews, Unit};
use crate::options::{LoadOptions, ModelOptions};
use crate::ranks::{self, Joined, Model};
use crate::units;

/// A model ready to run.
pub struct Loaded {
    /// Its directory.
    pub dir: PathBuf,
    /// Its config.json.
    pub config: ModelConfig,
    /// Runs it.
    pub engine: Engine,
    /// Its bytes by kind of module.
    pub accounting: Accounting,
    /// From the call to here.
    pub load_time: Duration,
    /// Tokens of a prompt that run at once.
    pub prefill_chunk: usize,
    /// Name of the activations' numerics.
    pub numerics: &'static str,
    /// The device in one line.
    pub device: String,
    /// Bytes per second at which GPUs or several ranks read the model; the processor's is measured by those who want it.
    pub bandwidth: Option<f64>,
    /// Records what a run does.
    pub recorder: Recorder,
}

/// Rows whose logits one step may return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsRows {
    /// Only the last row's: generation.
    One,
    /// Every row's: evaluation.
    Chunk,
    /// The last row's of each of this many sequences: serving.
    Several(usize),
}

/// What a runner is made for.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// Rows of a step.
    pub limits: Limits,
    /// Tokens in the cache.
    pub n_slots: usize,
}

/// Loads the model that the options name; as rank 0 of several if `joined` leads to others.
///
/// # Errors
/// The options contradict the model, a file is missing or malformed, it does not fit, or another rank failed.
pub fn load(
    options: &ModelOptions,
    what: LoadOptions,
    joined: Option<Joined>,
    on_news: OnNews<'_>,
) -> anyhow::Result<Loaded> {
    let start = Instant::now();
    let dir = model_dir(options.model.as_deref())?;
    let mut config = ModelConfig::load(&dir)?;
    let context = options.context(&config)?;
    let checkpoint = Checkpoint::open(&dir)?;
    settle_tie(&mut config, &checkpoint);
    let weights = tandem_model::resolve(&checkpoint, &config)?;
    let accounting = Accounting::new(&weights, &config);
    let depth = match options.draft_depth {
        Some(depth) => depth,
        // What `auto` does among ranks and on other devices has not been measured well enough.
        None if what.logits != LogitsRows::Chunk
            && joined.is_none()
            && DeviceKind::choose(&options.device)? == DeviceKind::Cpu =>
        {
            DraftDepth::Auto
        }
        None => DraftDepth::OFF,
    };
    let drafts = depth != DraftDepth::OFF;
    ensure!(
        drafts || options.mtp.is_none(),
        "--mtp is the layer that drafts, and nothing is to be drafted; give --draft-depth auto, or a number from 1 to 8"
    );
    let sidecar = options.mtp.as_deref().filter(|_| drafts).map(|place| Sidecar::open(place, &config)).transpose()?;
    let prefill_chunk = options.prefill_chunk.clamp(1, context);
    // A sequence's next token and its drafts.
    let n_rows = 1 + depth.most();
    let limits = match what.logits {
        LogitsRows::One => Limits { max_rows: prefill_chunk, max_logits_rows: n_rows },
        LogitsRows::Chunk => Limits { max_rows: prefill_chunk, max_logits_rows: prefill_chunk },
        // A step of decoding may hold prompt tokens too.
        LogitsRows::Several(n) => {
            Limits { max_rows: prefill_chunk.max(EXACT_ROWS), max_logits_rows: (n * n_rows).min(EXACT_ROWS).max(n) }
        }
    };
    // One sequence always fits.
    let blocks = BlockManager::for_tokens(what.cache_tokens.unwrap_or(what.n_contexts * context).max(context));
    let n_slots = blocks.n_slots();
    let mut facts = Facts::of_model(name_of(&dir), &config, &accounting);
    facts.weight_bytes = resident_bytes(&accounting);
    let files: Vec<PathBuf> = checkpoint.files().map(PathBuf::from).collect();
    let running = match joined {
        Some(joined) => {
            no_host_experts(&options.device)?;
            let kind = DeviceKind::choose_for_ranks(&options.device, joined.transport(&options.parallel))?;
            facts.backend = kind.name().to_string();
            let model = Model::new(config.clone(), checkpoint, weights, options).with_drafts(drafts, sidecar);
            kind.with(Lead { model, options, limits, n_slots, joined, on_news })?
        }
        None => {
            let shape = Shape { config: &config, limits, n_slots };
            let source = CheckpointWeights::new(&checkpoint, weights.clone());
            let mut mtp = if drafts { mtp::bytes_of(sidecar.as_ref(), &config, &weights) } else { 0 };
            let mut resident = resident_bytes(&accounting) + mtp;
            // Unless it was asked for, the layer must not be what the memory is too small for.
            if options.draft_depth.is_none() && !fits_in_memory(resident) {
                (mtp, resident) = (0, resident - mtp);
            }
            let kind = DeviceKind::choose(&options.device)?;
            facts.backend = kind.name().to_string();
            facts.weight_bytes = resident;
            let mapped = if kind == DeviceKind::Cpu { mapped_files(&weights, resident, &files) } else { vec![] };
            facts.weights_are_mapped = !mapped.is_empty();
            let to_hold = ToHold { shape, weights: &weights, resident, mtp, sidecar: sidecar.as_ref() };
            kind.with(Alone { options, source: &source, to_hold, mapped: &mapped, on_news })?
        }
    };
    let Running { runner, numerics, device, bandwidth, residency, plan, host_expert_bytes, slow_formats } = running;
    (facts.host_expert_bytes, facts.slow_formats) = (host_expert_bytes, slow_formats);
    let engine = Engine::new(runner, blocks, context, config.max_position_embeddings)
        .with_drafts(depth)
        .with_major_faults(system::major_page_faults);
    let load_time = start.elapsed();
    facts.numerics = numerics.to_string();
    facts.device = device.clone();
    facts.bandwidth = bandwidth;
    if facts.backend == DeviceKind::Cpu.name() {
        facts.threads = n_threads(&options.device);
        facts.isa = Some(options.device.isa.unwrap_or_else(Isa::detect).to_string());
        facts.best_isa = Some(Isa::detect().to_string());
    }
    if let Some(plan) = &plan {
        facts.take_plan(plan);
        // Ranks of one host share its cores, unless flags say otherwise.
        facts.threads = options.device.threads.unwrap_or((facts.threads / plan.ranks.len()).max(1));
    }
    let recorder = Recorder::new(facts, engine.timings(), residency);
    Ok(Loaded { dir, config, engine, accounting, load_time, prefill_chunk, numerics, device, bandwidth, recorder })
}

/// A model directory's own name.
fn name_of(dir: &std::path::Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

/// The files whose mappings are the weights, where the processor copies hardly any: repacked weights are copies, and their
/// files need not stay in memory.
pub(crate) fn mapped_files(weights: &[Weight], resident: u64, files: &[PathBuf]) -> Vec<PathBuf> {
    let is_mapped = |weight: &&Weight| matches!(weight.dtype, DType::Float(Float::F32 | Float::F16));
    let mapped: u64 = weights.iter().filter(is_mapped).map(|weight| weight.bytes() as u64).sum();
    let all_are_mapped = !fits_in_memory(resident) || mapped as f64 > 0.95 * resident as f64;
    if all_are_mapped { files.to_vec() } else { vec![] }
}

/// [`ModelConfig::settle_tie`], with a line that says so.
pub fn settle_tie(config: &mut ModelConfig, checkpoint: &Checkpoint) -> bool {
    let differs = config.settle_tie(checkpoint);
    if differs {
        tracing::warn!(
            "config.json ties lm_head to the embedding, but the checkpoint has an lm_head that differs: that one is used"
        );
    }
    differs
}

/// Bytes of the multi-token-prediction layer.
pub(crate) fn mtp_bytes(accounting: &Accounting) -> u64 {
    accounting.total(|k| if k.kind == ModuleKind::Mtp { k.resident_bytes } else { 0 })
}

/// Bytes of the weights that are always loaded: a multi-token-prediction layer stays in its file unless it is to draft.
pub(crate) fn resident_bytes(accounting: &Accounting) -> u64 {
    accounting.total(|k| if k.kind == ModuleKind::Mtp { 0 } else { k.resident_bytes })
}

struct Running {
    runner: Box<dyn Runner>,
    numerics: &'static str,
    device: String,
    bandwidth: Option<f64>,
    residency: Arc<Residency>,
    /// Of several ranks.
    plan: Option<Plan>,
    host_expert_bytes: u64,
    slow_formats: Vec<String>,
}

/// Rank 0 of several.
struct Lead<'a, 'n> {
    model: Model,
    options: &'a ModelOptions,
    limits: Limits,
    n_slots: usize,
    joined: Joined,
    on_news: OnNews<'n>,
}

impl WithDevice for Lead<'_, '_> {
    type Output = Running;

    fn run<D: Device>(self) -> anyhow::Result<Running> {
        let Lead { model, options, limits, n_slots, joined, on_news } = self;
        let (runner, numerics, residency) =
            ranks::lead::<Profiled<D>>(joined, &model, &options.parallel, limits, n_slots, 1, on_news)?;
        let (plan, device) = (runner.plan().clone(), Device::name(runner.backend().inner()));
        let device = format!("{} ranks, {device} each", plan.ranks.len());
        let bandwidth = Some(plan.bandwidth());
        let (plan, host_expert_bytes) = (Some(plan), 0);
        let slow_formats = runner.backend().inner().slow_formats();
        let runner = Box::new(runner);
        Ok(Running { runner, numerics, device, bandwidth, residency, plan, host_expert_bytes, slow_formats })
    }
}

/// The whole model in this process.
struct Alone<'a, 'n> {
    options: &'a ModelOptions,
    source: &'a dyn WeightSource,
    to_hold: ToHold<'a>,
    /// Files whose mappings are the weights.
    mapped: &'a [PathBuf],
    on_news: OnNews<'n>,
}

impl WithDevice for Alone<'_, '_> {
    type Output = Running;

    fn run<D: Device>(self) -> anyhow::Result<Running> {
        let Alone { options, source, to_hold, mapped, on_news } = self;
        let backend = D::alone(&options.device, &to_hold, on_news)?;
        let (numerics, device, bandwidth) = (backend.numerics_name(), backend.name(), backend.known_bandwidth());
        let host_expert_bytes = backend.host_read_bytes();
        let backend = backend.profiled();
        let times = backend.operation_times();
        let runner = runner(backend, source, &to_hold, on_news)?;
        if options.lock {
            lock_memory(on_news);
        }
        let slow_formats = runner.backend().inner().slow_formats();
        let residency = Residency::watch(mapped, to_hold.resident);
        let runner = Box::new(runner.with_times(times, residency.usage()));
        Ok(Running { runner, numerics, device, bandwidth, residency, plan: None, host_expert_bytes, slow_formats })
    }
}

/// Loads a model onto a backend.
pub(crate) fn runner<B: Backend + 'static>(
    backend: B,
    source: &dyn WeightSource,
    to_hold: &ToHold<'_>,
    on_news: OnNews<'_>,
) -> anyhow::Result<ModelRunner<B>> {
    let ToHold { shape: Shape { config, limits, n_slots }, weights, resident, mtp, sidecar } = *to_hold;
    let meter = Meter::new("loading", Unit::Bytes, resident, on_news);
    let model = mtp::with_source(sidecar, config, source, weights, |layer| {
        let (share, layer) = (Share::whole(config), layer.filter(|_| mtp > 0));
        let progress = &mut |bytes: usize| meter.add(bytes as u64);
        tandem_model::load_drafting(&backend, config, source, share, limits, layer, progress)
    })?;
    meter.finish();
    // A GPU says so itself.
    let cache = model.cache_bytes_per_token(&backend) as u64 * n_slots as u64;
    let backends = [TypeId::of::<CpuBackend>(), TypeId::of::<Profiled<CpuBackend>>()];
    let is_cpu = backends.contains(&TypeId::of::<B>());
    ensure!(
        !is_cpu || fits_in_memory(cache),
        "a cache of {n_slots} tokens takes {}, more than there is memory; ask for less with --context or --cache-tokens",
        units::bytes(cache)
    );
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, n_slots).with_weight_bytes(resident);
    runner.sync()?;
    Ok(runner)
}
