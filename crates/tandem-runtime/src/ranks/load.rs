//! Loading one rank's part of a model, and leading or following with it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tandem_comm::{Doing, Group, Transport, Wire, local};
use tandem_core::backend::TensorGroup;
use tandem_core::weights::{ModuleKind, Weight};
use tandem_core::{Backend, Checkpoint, ModelConfig};
use tandem_engine::{Answer, DistributedRunner, HostReduce, OperationTimes, Pipeline, Profiled, RankRunner};
use tandem_model::{
    Accounting, CheckpointWeights, Division, DummyWeights, Limits, PartWeights, Plan, Planner, RankResources, Recipe,
    Request, Share, WeightSource, load_drafting,
};

use super::Joined;
use super::started::{Announcement, announce};
use crate::device::{Device, DeviceKind, Place, WithDevice, lock_memory};
use crate::diagnosis::Residency;
use crate::load::mapped_files;
use crate::model_dir::model_dir;
use crate::mtp::{self, Sidecar};
use crate::news::{News, OnNews, Progress, Unit, ignore_news};
use crate::options::{DeviceOptions, ModelOptions, ParallelOptions};
use crate::units::bytes;

/// Loading a large model takes at most this many times the deadline.
const LOADING_SLACK: u32 = 720;

/// What a rank needs to load its part, but for the other ranks.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) weights: Arc<Vec<Weight>>,
    pub(crate) source: Source,
    pub(crate) device: DeviceOptions,
    pub(crate) lock: bool,
    /// Rank 0 holds the multi-token-prediction layer, if there is one.
    pub(crate) drafts: bool,
    /// Where that layer is, if not with the model.
    pub(crate) sidecar: Option<Arc<Sidecar>>,
}

/// Where its weights come from.
#[derive(Clone)]
pub(crate) enum Source {
    Checkpoint(Arc<Checkpoint>),
    /// Made up, for the configuration with this text.
    Dummy {
        recipe: Recipe,
        text: String,
    },
}

impl Model {
    /// A checkpoint's.
    pub(crate) fn new(
        config: ModelConfig,
        checkpoint: Checkpoint,
        weights: Vec<Weight>,
        options: &ModelOptions,
    ) -> Model {
        Model {
            config: Arc::new(config),
            weights: Arc::new(weights),
            source: Source::Checkpoint(Arc::new(checkpoint)),
            device: options.device.clone(),
            lock: options.lock,
            drafts: false,
            sidecar: None,
        }
    }

    /// The same, drafting if `drafts`, by a layer of another directory if there is one.
    pub(crate) fn with_drafts(self, drafts: bool, sidecar: Option<Sidecar>) -> Model {
        Model { drafts, sidecar: sidecar.map(Arc::new), ..self }
    }

    /// A hash of the configuration, and of the tensors by name, type and shape.
    fn digest(&self) -> anyhow::Result<String> {
        let text = match &self.source {
            Source::Checkpoint(checkpoint) => {
                let path = checkpoint.dir().join("config.json");
                let config =
                    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
                config + &checkpoint.table()
            }
            Source::Dummy { recipe, text } => format!("{} {text}", recipe.name),
        };
        Ok(digest(text.as_bytes()))
    }
}

/// A device, or something around it, as one rank of several.
pub(crate) trait RankBackend: Backend + Sized + 'static {
    /// The device.
    type Device: Device;
    /// Around a device.
    fn of(device: Self::Device) -> Self;
    /// The device inside.
    fn device(&self) -> &Self::Device;
    /// The device's sums as this backend's.
    fn through(group: Arc<dyn TensorGroup<Self::Device>>) -> Arc<dyn TensorGroup<Self>>;
    /// How long operations take, where that is noted.
    fn operation_times(&self) -> Option<Arc<OperationTimes>>;
    /// How a rank with this configuration answers rank 0's questions.
    fn answers(config: &ModelConfig) -> Option<Answers<Self>>;
}

/// Answers rank 0's questions between two steps.
pub(crate) type Answers<B> = Answer<B>;

/// What rank 0 decides for all.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Setup {
    max_rows: usize,
    max_logits_rows: usize,
    n_slots: usize,
    numerics: String,
    pp: Option<usize>,
    tp: Option<usize>,
    ep: Option<usize>,
    wire_bf16: bool,
    /// 1, but for measurements.
    sync_every: usize,
    /// Bytes of the layer by which rank 0 drafts, if it does.
    drafts: Option<u64>,
}

/// What every rank tells every other.
#[derive(Serialize, Deserialize)]
struct Introduction {
    host: String,
    memory: u64,
    bandwidth: f64,
    round_trip: f64,
    /// Rank 0's.
    setup: Option<Setup>,
}

/// Rank 0 of several loads its part and leads; also the name of its numerics. Tensor-parallel ranks sum in each
/// `sync_every`th layer only, which is 1 but for measurements.
pub(crate) fn lead<B: RankBackend>(
    joined: Joined,
    model: &Model,
    parallel: &ParallelOptions,
    limits: Limits,
    n_slots: usize,
    sync_every: usize,
    on_news: OnNews<'_>,
) -> anyhow::Result<(DistributedRunner<B>, &'static str, Arc<Residency>)> {
    let numerics = B::Device::numerics(&model.device)?;
    let parallel = match &joined {
        Joined::Tcp(started) => started.order.parallel.clone(),
        _ => parallel.clone(),
    };
    let setup = Setup {
        max_rows: limits.max_rows,
        max_logits_rows: limits.max_logits_rows,
        n_slots,
        numerics: numerics.to_string(),
        pp: parallel.pp,
        tp: parallel.tp,
        ep: parallel.ep,
        wire_bf16: parallel.wire_bf16,
        sync_every,
        drafts: model.drafts.then(|| mtp::bytes_of(model.sidecar.as_deref(), &model.config, &model.weights)),
    };
    let deadline = parallel.deadline()?;
    if let Joined::Threads(n) = joined {
        let place = Place { on_this_host: n, local_rank: 0 };
        let mut transports = local::group(n).into_iter();
        let own = transports.next().context("--ranks must be at least 1")?;
        for transport in transports {
            let model = model.clone();
            std::thread::spawn(move || {
                let result = load_rank::<B>(Box::new(transport), deadline, &model, None, place, &mut ignore_news)
                    .and_then(|(runner, _)| runner.follow().map_err(Into::into));
                if let Err(error) = result {
                    tracing::error!("{error:#}");
                }
            });
        }
        let (runner, residency) = load_rank(Box::new(own), deadline, model, Some(setup), place, on_news)?;
        return Ok((DistributedRunner::new(runner), numerics, residency));
    }
    let (runner, residency) = join(joined, deadline, model, Some(setup), on_news)?;
    Ok((DistributedRunner::new(runner), numerics, residency))
}

/// Another rank than 0: loads its part of a checkpoint and follows until rank 0 stops.
///
/// # Errors
/// The model cannot be loaded, or another rank failed.
pub fn follow(joined: Joined, options: &ModelOptions) -> anyhow::Result<()> {
    let place = match &joined {
        Joined::Tcp(started) => started.model_on_this_host().map(str::to_string),
        _ => None,
    };
    let dir = model_dir(place.as_deref().or(options.model.as_deref()))?;
    let mut config = ModelConfig::load(&dir)?;
    let checkpoint = Checkpoint::open(&dir)?;
    config.settle_tie(&checkpoint);
    let weights = tandem_model::resolve(&checkpoint, &config)?;
    let model = Model::new(config, checkpoint, weights, options);
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

/// [`follow`] with a model that is at hand.
pub(crate) fn follow_with<B: RankBackend>(
    joined: Joined,
    model: &Model,
    parallel: &ParallelOptions,
) -> anyhow::Result<()> {
    let deadline = match &joined {
        Joined::Tcp(started) => started.order.parallel.deadline()?,
        _ => parallel.deadline()?,
    };
    join::<B>(joined, deadline, model, None, &mut ignore_news)?.0.follow()?;
    Ok(())
}

/// Meets the other processes and loads this one's part. A launcher is told how far it is.
fn join<B: RankBackend>(
    joined: Joined,
    deadline: Duration,
    model: &Model,
    setup: Option<Setup>,
    on_news: OnNews<'_>,
) -> anyhow::Result<(RankRunner<B>, Arc<Residency>)> {
    match joined {
        Joined::Tcp(started) => {
            let place = started.place();
            let transport = started.connect(model.digest()?)?;
            let mut tell_launcher = |news: News| match news {
                News::Progress(Progress { done, total, .. }) => announce(&Announcement::Loading { done, total }),
                other => on_news(other),
            };
            load_rank(transport, deadline, model, setup, place, &mut tell_launcher)
        }
        Joined::Mpi(transport) => {
            let place = Place { on_this_host: on_host(), local_rank: 0 };
            load_rank(transport, deadline, model, setup, place, on_news)
        }
        Joined::Threads(_) => anyhow::bail!("threads of one process do not join others"),
    }
}

/// Ranks of an MPI job on this host, as its launcher says.
fn on_host() -> usize {
    ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"]
        .iter()
        .find_map(|name| std::env::var(name).ok()?.parse().ok())
        .unwrap_or(1)
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// Introduces this rank, plans, loads its part, and waits until every rank has.
fn load_rank<B: RankBackend>(
    transport: Box<dyn Transport>,
    deadline: Duration,
    model: &Model,
    setup: Option<Setup>,
    place: Place,
    on_news: OnNews<'_>,
) -> anyhow::Result<(RankRunner<B>, Arc<Residency>)> {
    let world = Group::world(transport, deadline);
    let result = load_in(&world, model, setup, place, on_news);
    if let Err(error) = &result {
        world.abort(&format!("{error:#}"));
    }
    result
}

fn load_in<B: RankBackend>(
    world: &Group,
    model: &Model,
    setup: Option<Setup>,
    place: Place,
    on_news: OnNews<'_>,
) -> anyhow::Result<(RankRunner<B>, Arc<Residency>)> {
    let Model { config, weights, source, .. } = model;
    let introducing = Doing::of("agreeing on a plan");
    world.set_slack(6);
    let opened = B::Device::open(&model.device, place)?;
    let round_trip = round_trip(world, config.hidden_size)?;
    let introduction = Introduction {
        host: world.host(world.rank()),
        memory: B::Device::memory(&opened, place),
        bandwidth: B::Device::plan_bandwidth(&opened),
        round_trip,
        setup,
    };
    let texts = world.gather_messages(&serde_json::to_vec(&introduction)?, introducing)?;
    let everyone: Vec<Introduction> =
        texts.iter().map(|t| serde_json::from_slice(t)).collect::<Result<_, _>>().context("a rank's introduction")?;
    let setup = everyone[0].setup.clone().context("rank 0 did not say what to load")?;
    let mut resources: Vec<RankResources> = everyone
        .into_iter()
        .map(|i| RankResources { host: i.host, memory: i.memory, bandwidth: i.bandwidth, round_trip: i.round_trip })
        .collect();
    let device = B::Device::finish(opened, &setup.numerics)?;
    let drafts = setup.drafts.is_some() && world.rank() == 0;
    if let Some(mtp) = setup.drafts {
        // The layer, and the embedding that it looks up, come on top of what the plan gives rank 0.
        let accounting = Accounting::new(weights, config);
        let embedding = accounting.total(|k| if k.kind == ModuleKind::Embed { k.resident_bytes } else { 0 });
        resources[0].memory = resources[0].memory.saturating_sub(mtp + embedding);
    }
    let planner = Planner {
        config,
        weights,
        n_slots: setup.n_slots,
        cache_bytes: &|kind, width| device.cache_bytes(kind, width),
        ranks: &resources,
    };
    let plan = Arc::new(planner.plan(Request { pp: setup.pp, tp: setup.tp, ep: setup.ep })?);
    let hashes = world.gather_messages(digest(format!("{plan:?}").as_bytes()).as_bytes(), introducing)?;
    ensure!(hashes.iter().all(|h| *h == hashes[0]), "the ranks made different plans; this is a bug in tandem");
    let division = Division::new(&plan.ranks[world.rank()].part, config, weights);
    let planned = &plan.ranks[world.rank()];
    let backend = B::of(device.with_fit(planned.weight_bytes <= resources[world.rank()].memory));
    if world.rank() == 0 {
        on_news(News::Note(describe_plan(&plan, &resources, &division)));
    }

    let pipeline = Pipeline::new(world.clone(), plan.clone());
    let wire = if setup.wire_bf16 { Wire::Bf16 } else { Wire::F32 };
    let sums = if plan.tensor_size > 1 { backend.device().sums(&pipeline.tensor_group(), on_news)? } else { None };
    let (sums, check) = sums.map_or((None, None), |sums| (Some(sums.group), Some(sums.check)));
    let reduce = (plan.tensor_size > 1 && sums.is_none()).then(|| {
        let reduce = HostReduce::new(pipeline.tensor_group(), wire, config.hidden_size);
        Arc::new(reduce.with_sync_every(setup.sync_every))
    });
    let whole: Box<dyn WeightSource + '_> = match source {
        Source::Checkpoint(checkpoint) => Box::new(CheckpointWeights::new(checkpoint, weights.to_vec())),
        Source::Dummy { recipe, .. } => Box::new(DummyWeights::new(config, recipe, B::Device::stacks())),
    };
    let source = PartWeights::new(&*whole, weights, division.clone());
    let total = planned.weight_bytes;
    let (mut loaded, mut last) = (0, Instant::now());
    let group = reduce.clone().map(|r| r as Arc<dyn TensorGroup<B>>).or_else(|| sums.map(B::through));
    let limits = Limits { max_rows: setup.max_rows, max_logits_rows: setup.max_logits_rows };
    let local_config = division.config(config);
    let share = Share { division, group };
    let mut progress = |n: usize| {
        loaded += n as u64;
        if last.elapsed() > Duration::from_millis(200) {
            last = Instant::now();
            on_news(News::Progress(Progress { doing: "loading", unit: Unit::Bytes, done: loaded, total }));
        }
    };
    let loaded_model = mtp::with_source(model.sidecar.as_deref(), config, &*whole, weights, |layer| {
        let layer = layer.filter(|_| drafts);
        load_drafting(&backend, &local_config, &source, share, limits, layer, &mut progress)
    })?;
    on_news(News::Progress(Progress { doing: "loading", unit: Unit::Bytes, done: total, total }));
    if model.lock {
        lock_memory(on_news);
    }
    let mapped = match &model.source {
        Source::Checkpoint(checkpoint) if B::Device::stays_mapped() => {
            let files: Vec<PathBuf> = checkpoint.files().map(PathBuf::from).collect();
            mapped_files(weights, total, &files)
        }
        _ => vec![],
    };
    let (times, residency) = (backend.operation_times(), Residency::watch(&mapped, total));
    let runner = RankRunner::new(
        backend,
        loaded_model,
        pipeline,
        reduce,
        limits,
        config.vocab_size,
        config.hidden_size,
        setup.n_slots,
    )
    .with_answer(B::answers(&local_config))
    .with_check(check)
    .with_times(times, residency.usage());
    world.set_slack(LOADING_SLACK);
    world.barrier(Doing::of("waiting for every rank to load"))?;
    world.set_slack(1);
    Ok((runner, residency))
}

/// The plan as lines of text.
fn describe_plan(plan: &Plan, resources: &[RankResources], division: &Division) -> String {
    let (n, tensor) = (plan.n_stages, plan.tensor_size);
    let mut lines = vec![format!("plan: {n} pipeline stage{}, {tensor} rank{} each", plural(n), plural(tensor))];
    for (rank, (planned, r)) in plan.ranks.iter().zip(resources).enumerate() {
        let part = &planned.part;
        let ends = match (part.embeds, part.head) {
            (true, true) => ", embedding, head",
            (true, false) => ", embedding",
            (false, true) => ", head",
            (false, false) => "",
        };
        let layers = match part.layers.len() {
            0 => "no layers".to_string(),
            _ => format!("layers {} to {}", part.layers.start, part.layers.end - 1),
        };
        let slice = if tensor > 1 { format!(", slice {} of {tensor}", part.tensor_rank + 1) } else { String::new() };
        lines.push(format!(
            "  rank {rank} ({}): {layers}{ends}{slice}; weights {}, cache {} of {} free; reads {} per token, at {:.1} GB/s \
             {:.1} tok/s",
            r.host,
            bytes(planned.weight_bytes),
            bytes(planned.cache_bytes),
            if r.memory > 1 << 50 { "unknown".to_string() } else { bytes(r.memory) },
            bytes(planned.read_bytes),
            r.bandwidth / 1e9,
            planned.tokens_per_second,
        ));
    }
    let replicated = division.replicated();
    if !replicated.is_empty() {
        lines.push(format!("  on every rank of a stage: {}", replicated.join(", ")));
    }
    lines.push(format!("  expected at most {:.1} tok/s for one sequence", plan.tokens_per_second));
    lines.join("\n")
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// Seconds for one token's activations to every other rank and back, the median of a few.
fn round_trip(world: &Group, hidden_size: usize) -> anyhow::Result<f64> {
    if world.size() == 1 {
        return Ok(0.0);
    }
    let mine = vec![0; hidden_size * 4];
    let mut all = vec![0; mine.len() * world.size()];
    let doing = Doing::of("measuring the network");
    let mut times = vec![];
    for _ in 0..7 {
        let start = Instant::now();
        world.all_gather(&mine, &mut all, doing)?;
        times.push(start.elapsed().as_secs_f64() * 2.0);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
