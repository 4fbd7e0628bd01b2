//! One rank of several: joins the others, agrees on a plan, loads its part, and leads or follows.
//!
//! A rank is started by [`launch`] (processes over TCP), by an MPI launcher, or as a thread of one process. Rank 0 runs
//! the command; the others only load and follow.

pub(crate) mod launch;
mod rank;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tandem_comm::tcp::{Hello, TcpConfig};
use tandem_comm::{Doing, Group, Transport, Wire, local, mpi, tcp};
use tandem_core::backend::TensorGroup;
use tandem_core::weights::Weight;
use tandem_core::{Backend, Checkpoint, ModelConfig};
use tandem_cpu::{CpuBackend, Numerics, system};
use tandem_engine::{Answer, Check, DistributedRunner, HostReduce, Pipeline, RankRunner};
use tandem_model::{
    CheckpointWeights, Division, DummyWeights, Limits, PartWeights, Plan, Planner, RankResources, Recipe, Request,
    Share, Stacks, WeightSource, load_share,
};

use crate::cli::{ActivationsArg, Cli, ModelArgs, ParallelArgs, TransportArg};
use crate::load::{cpu_backend, lock_memory, model_dir};
use crate::report::bytes;
pub(crate) use rank::Started;
use rank::{Announcement, announce};

/// Bytes read to estimate a rank's bandwidth for the plan; `bench` measures properly.
const PROBE_BYTES: usize = 128 << 20;
/// What `--transport nccl` says without the feature.
#[cfg(not(feature = "cuda"))]
pub(crate) const NO_CUDA: &str =
    "this tandem was built without CUDA, which --transport nccl needs; build it with --features cuda";
/// Loading a large model takes this many patiences at most.
const LOADING_PATIENCES: u32 = 720;

/// How this process reaches the other ranks, until [`lead`] or [`follow`] takes it.
static JOINED: OnceLock<Mutex<Option<Joined>>> = OnceLock::new();

enum Joined {
    Tcp(Box<rank::Started>),
    Mpi,
    /// Threads of this process; ranks in all.
    Threads(usize),
}

/// What main does with a command.
pub(crate) enum Role {
    /// Runs it, alone or as rank 0.
    Lead,
    /// Follows rank 0.
    Follow(Box<rank::Started>),
    /// Starts the ranks.
    Launch(usize),
}

/// Finds out what this process is.
pub(crate) fn role(cli: &Cli) -> anyhow::Result<Role> {
    if let Some(fd) = cli.launch_fd {
        let started = rank::start(fd)?;
        if started.order.rank > 0 {
            return Ok(Role::Follow(Box::new(started)));
        }
        let _ = JOINED.set(Mutex::new(Some(Joined::Tcp(Box::new(started)))));
        return Ok(Role::Lead);
    }
    let Some(parallel) = cli.command.parallel_args() else { return Ok(Role::Lead) };
    let asked = parallel.n_ranks()?;
    match parallel.transport {
        TransportArg::Mpi if mpi::launched() => {
            let _ = JOINED.set(Mutex::new(Some(Joined::Mpi)));
            Ok(Role::Lead)
        }
        TransportArg::Mpi => bail!(
            "--transport mpi needs an MPI launcher: mpirun -n {asked} tandem ..., or tandem launch --transport mpi --ranks \
             {asked} -- ..."
        ),
        _ if asked == 1 => Ok(Role::Lead),
        TransportArg::Local => {
            let _ = JOINED.set(Mutex::new(Some(Joined::Threads(asked))));
            Ok(Role::Lead)
        }
        TransportArg::Auto | TransportArg::Tcp | TransportArg::Nccl => Ok(Role::Launch(asked)),
    }
}

fn take_joined() -> Option<Joined> {
    JOINED.get()?.lock().unwrap_or_else(|e| e.into_inner()).take()
}

/// What a rank needs to load its part, but for the other ranks.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) weights: Arc<Vec<Weight>>,
    pub(crate) source: Source,
    pub(crate) threads: Option<usize>,
    pub(crate) lock: bool,
    pub(crate) activations: ActivationsArg,
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
    pub(crate) fn new(config: ModelConfig, checkpoint: Checkpoint, weights: Vec<Weight>, args: &ModelArgs) -> Model {
        Model {
            config: Arc::new(config),
            weights: Arc::new(weights),
            source: Source::Checkpoint(Arc::new(checkpoint)),
            threads: args.threads,
            lock: args.lock,
            activations: args.activations,
        }
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

/// Where a rank is.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Ranks of this host.
    pub(crate) on_this_host: usize,
    /// This one among them.
    pub(crate) local_rank: usize,
}

/// What a rank runs on.
pub(crate) trait RankDevice: Backend + Sized + 'static {
    /// A device before the numerics are agreed on.
    type Opened;
    /// Opens it.
    fn open(model: &Model, place: Place) -> anyhow::Result<Self::Opened>;
    /// Bytes that the rank may fill.
    fn memory(opened: &Self::Opened, place: Place) -> u64;
    /// Bytes per second, roughly.
    fn bandwidth(opened: &Self::Opened) -> f64;
    /// Name of the numerics.
    fn numerics(model: &Model) -> anyhow::Result<&'static str>;
    /// The backend, with the numerics of rank 0.
    fn finish(opened: Self::Opened, numerics: &str) -> Self;
    /// Told whether the weights fit in memory.
    #[must_use]
    fn with_fit(self, _fits: bool) -> Self {
        self
    }
    /// Whether made-up experts may share their bytes.
    fn stacks() -> Stacks;
    /// Sums over `group` that the device makes itself.
    fn sums(&self, _group: &Group) -> anyhow::Result<Option<Sums<Self>>> {
        Ok(None)
    }
}

/// Sums on devices, and what knows of their failures.
pub(crate) struct Sums<B: Backend> {
    pub(crate) group: Arc<dyn TensorGroup<B>>,
    pub(crate) check: Check,
}

/// A device, or something around it.
pub(crate) trait RankBackend: Backend + Sized + 'static {
    type Device: RankDevice;
    fn of(device: Self::Device) -> Self;
    fn device(&self) -> &Self::Device;
    /// The device's sums as this backend's.
    fn through(group: Arc<dyn TensorGroup<Self::Device>>) -> Arc<dyn TensorGroup<Self>>;
    /// How a rank with this configuration answers rank 0's questions.
    fn answer(config: &ModelConfig) -> Option<Answer<Self>>;
}

/// A device alone.
impl<D: RankDevice> RankBackend for D {
    type Device = D;

    fn of(device: D) -> D {
        device
    }

    fn device(&self) -> &D {
        self
    }

    fn through(group: Arc<dyn TensorGroup<D>>) -> Arc<dyn TensorGroup<D>> {
        group
    }

    fn answer(_: &ModelConfig) -> Option<Answer<D>> {
        None
    }
}

impl RankDevice for CpuBackend {
    /// Threads.
    type Opened = usize;

    fn open(model: &Model, place: Place) -> anyhow::Result<usize> {
        let share = || (system::default_threads() / place.on_this_host.max(1)).max(1);
        Ok(model.threads.unwrap_or_else(share))
    }

    fn memory(_: &usize, place: Place) -> u64 {
        system::available_memory_bytes().map_or(u64::MAX >> 8, |free| free / place.on_this_host.max(1) as u64)
    }

    fn bandwidth(threads: &usize) -> f64 {
        probe_bandwidth(*threads)
    }

    fn numerics(model: &Model) -> anyhow::Result<&'static str> {
        Ok(cpu_backend(Some(1), model.activations, 0).1)
    }

    fn finish(threads: usize, numerics: &str) -> CpuBackend {
        let numerics = match numerics {
            "f32" => Numerics::F32,
            "int8" => Numerics::Int8,
            _ => Numerics::Bf16,
        };
        CpuBackend::new(threads, numerics)
    }

    fn with_fit(self, fits: bool) -> CpuBackend {
        // Repacked weights take memory of their own; mapped ones can be read again from their files.
        self.with_repacking(fits)
    }

    fn stacks() -> Stacks {
        Stacks::Distinct
    }
}

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

/// True when this process is rank 0 of several.
pub(crate) fn leads() -> bool {
    JOINED.get().is_some_and(|joined| joined.lock().unwrap_or_else(|e| e.into_inner()).is_some())
}

/// How rank 0's ranks reach each other.
pub(crate) fn transport(parallel: &ParallelArgs) -> TransportArg {
    match JOINED.get().map(|joined| joined.lock().unwrap_or_else(|e| e.into_inner())).as_deref() {
        Some(Some(Joined::Tcp(started))) => started.order.parallel.transport,
        _ => parallel.transport,
    }
}

/// Rank 0 of several loads its part and leads; the name of its numerics. Tensor-parallel ranks sum in each `sync_every`th
/// layer only, which is 1 but for measurements.
pub(crate) fn lead<B: RankBackend>(
    model: &Model,
    parallel: &ParallelArgs,
    limits: Limits,
    n_slots: usize,
    sync_every: usize,
) -> anyhow::Result<(DistributedRunner<B>, &'static str)> {
    let joined = take_joined().context("one command loads one model on several ranks")?;
    let numerics = B::Device::numerics(model)?;
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
    };
    let patience = parallel.patience()?;
    let first = |on_this_host: usize| Place { on_this_host, local_rank: 0 };
    let (transport, place): (Box<dyn Transport>, Place) = match joined {
        Joined::Tcp(started) => {
            let place = started.place();
            (started.connect(model.digest()?)?, place)
        }
        Joined::Mpi => {
            let transport = mpi::init()?;
            if transport.rank() > 0 {
                // Other ranks of an MPI job come here too; they never return.
                let runner = load_rank::<B>(Box::new(transport), patience, model, None, first(on_host()))?;
                runner.follow()?;
                std::process::exit(0);
            }
            (Box::new(transport), first(on_host()))
        }
        Joined::Threads(n) => {
            let mut transports = local::group(n).into_iter();
            let own = transports.next().context("--ranks must be at least 1")?;
            for transport in transports {
                let model = model.clone();
                std::thread::spawn(move || {
                    let result = load_rank::<B>(Box::new(transport), patience, &model, None, first(n))
                        .and_then(|runner| runner.follow().map_err(Into::into));
                    if let Err(error) = result {
                        eprintln!("error: {error:#}");
                    }
                });
            }
            (Box::new(own), first(n))
        }
    };
    let runner = load_rank(transport, patience, model, Some(setup), place)?;
    Ok((DistributedRunner::new(runner), numerics))
}

/// Ranks of an MPI job on this host, as its launcher says.
fn on_host() -> usize {
    ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"]
        .iter()
        .find_map(|name| std::env::var(name).ok()?.parse().ok())
        .unwrap_or(1)
}

/// Another rank than 0, started by [`launch`]: loads its part of a checkpoint and follows until rank 0 stops.
pub(crate) fn follow(started: rank::Started, args: &ModelArgs) -> anyhow::Result<()> {
    let dir = model_dir(started.order.model.as_deref().or(args.model.as_deref()))?;
    let config = ModelConfig::load(&dir)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let weights = tandem_model::resolve(&checkpoint, &config)?;
    let model = Model::new(config, checkpoint, weights, args);
    match started.order.parallel.transport {
        #[cfg(feature = "cuda")]
        TransportArg::Nccl => follow_with::<tandem_cuda::CudaBackend>(started, &model),
        #[cfg(not(feature = "cuda"))]
        TransportArg::Nccl => bail!(NO_CUDA),
        _ => follow_with::<CpuBackend>(started, &model),
    }
}

/// [`follow`] with a model that is at hand.
pub(crate) fn follow_with<B: RankBackend>(started: rank::Started, model: &Model) -> anyhow::Result<()> {
    let (patience, place) = (started.order.parallel.patience()?, started.place());
    let transport = started.connect(model.digest()?)?;
    load_rank::<B>(transport, patience, model, None, place)?.follow()?;
    Ok(())
}

impl rank::Started {
    /// Where this rank is among those of its host.
    pub(crate) fn place(&self) -> Place {
        let (rank, peers) = (self.order.rank, &self.peers);
        let local_rank = peers[..rank].iter().filter(|p| p.host == peers[rank].host).count();
        Place { on_this_host: self.order.on_this_host, local_rank }
    }

    /// Meets the other ranks; all must have the same `model` hash.
    pub(crate) fn connect(self, model: String) -> anyhow::Result<Box<dyn Transport>> {
        let rank::Started { order, listener, peers } = self;
        let patience = order.parallel.patience()?;
        let config = TcpConfig {
            rank: order.rank,
            peers,
            secret: order.secret()?,
            generation: order.generation,
            hello: Hello { version: env!("CARGO_PKG_VERSION").to_string(), model },
            deadline: patience,
            start_timeout: Duration::from_secs_f64(order.start_timeout),
            on_failure: Box::new(|error| {
                eprintln!("error: {error}");
                std::process::exit(1);
            }),
        };
        Ok(Box::new(tcp::connect(listener, config)?))
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// Introduces this rank, plans, loads its part, and waits until every rank has.
fn load_rank<B: RankBackend>(
    transport: Box<dyn Transport>,
    patience: Duration,
    model: &Model,
    setup: Option<Setup>,
    place: Place,
) -> anyhow::Result<RankRunner<B>> {
    let world = Group::world(transport, patience);
    let result = load_in(&world, model, setup, place);
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
) -> anyhow::Result<RankRunner<B>> {
    let Model { config, weights, source, .. } = model;
    let introducing = Doing::of("agreeing on a plan");
    world.set_slack(6);
    let opened = B::Device::open(model, place)?;
    let round_trip = round_trip(world, config.hidden_size)?;
    let introduction = Introduction {
        host: world.host(world.rank()),
        memory: B::Device::memory(&opened, place),
        bandwidth: B::Device::bandwidth(&opened),
        round_trip,
        setup,
    };
    let texts = world.gather_messages(&serde_json::to_vec(&introduction)?, introducing)?;
    let everyone: Vec<Introduction> =
        texts.iter().map(|t| serde_json::from_slice(t)).collect::<Result<_, _>>().context("a rank's introduction")?;
    let setup = everyone[0].setup.clone().context("rank 0 did not say what to load")?;
    let resources: Vec<RankResources> = everyone
        .into_iter()
        .map(|i| RankResources { host: i.host, memory: i.memory, bandwidth: i.bandwidth, round_trip: i.round_trip })
        .collect();
    let device = B::Device::finish(opened, &setup.numerics);
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
        print_plan(&plan, &resources, &division);
    }

    let pipeline = Pipeline::new(world.clone(), plan.clone());
    let wire = if setup.wire_bf16 { Wire::Bf16 } else { Wire::F32 };
    let sums = if plan.tensor_size > 1 { backend.device().sums(&pipeline.tensor_group())? } else { None };
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
    let loaded_model = load_share(&backend, &local_config, &source, Share { division, group }, limits, &mut |n| {
        loaded += n as u64;
        if last.elapsed() > Duration::from_millis(200) {
            last = Instant::now();
            announce(&Announcement::Loading { done: loaded, total });
        }
    })?;
    announce(&Announcement::Loading { done: total, total });
    if model.lock {
        lock_memory();
    }
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
    .with_answer(B::answer(&local_config))
    .with_check(check);
    world.set_slack(LOADING_PATIENCES);
    world.barrier(Doing::of("waiting for every rank to load"))?;
    world.set_slack(1);
    Ok(runner)
}

fn print_plan(plan: &Plan, resources: &[RankResources], division: &Division) {
    let (n, tensor) = (plan.n_stages, plan.tensor_size);
    eprintln!("plan: {n} pipeline stage{}, {tensor} rank{} each", plural(n), plural(tensor));
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
        eprintln!(
            "  rank {rank} ({}): {layers}{ends}{slice}; weights {}, cache {} of {} free; reads {} per token, at {:.1} GB/s \
             {:.1} tok/s",
            r.host,
            bytes(planned.weight_bytes),
            bytes(planned.cache_bytes),
            if r.memory > 1 << 50 { "unknown".to_string() } else { bytes(r.memory) },
            bytes(planned.read_bytes),
            r.bandwidth / 1e9,
            planned.tokens_per_second,
        );
    }
    let replicated = division.replicated();
    if !replicated.is_empty() {
        eprintln!("  on every rank of a stage: {}", replicated.join(", "));
    }
    eprintln!("  expected at most {:.1} tok/s for one sequence", plan.tokens_per_second);
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

/// Bytes per second that `threads` threads read, roughly.
fn probe_bandwidth(threads: usize) -> f64 {
    let words = vec![1u64; PROBE_BYTES / 8];
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        let sum: u64 = std::thread::scope(|scope| {
            let parts = words.chunks(words.len().div_ceil(threads));
            let threads: Vec<_> =
                parts.map(|p| scope.spawn(|| p.iter().fold(0u64, |sum, w| sum.wrapping_add(*w)))).collect();
            threads.into_iter().map(|t| t.join().unwrap_or(0)).sum()
        });
        std::hint::black_box(sum);
        best = best.min(start.elapsed().as_secs_f64());
    }
    PROBE_BYTES as f64 / best
}

/// The other ranks, for commands that every rank runs.
pub(crate) fn world(started: Option<rank::Started>, parallel: &ParallelArgs) -> anyhow::Result<Group> {
    let patience = parallel.patience()?;
    let started = started.map(|s| Joined::Tcp(Box::new(s))).or_else(take_joined);
    match started {
        Some(Joined::Tcp(started)) => Ok(Group::world(started.connect("none".to_string())?, patience)),
        Some(Joined::Mpi) => Ok(Group::world(Box::new(mpi::init()?), patience)),
        _ => bail!("this command needs several ranks: --ranks 2, tandem launch ... --, or mpirun with --transport mpi"),
    }
}

/// The address that this rank listens on.
pub(crate) fn own_address() -> std::net::IpAddr {
    let here = std::net::IpAddr::from([127, 0, 0, 1]);
    let Some(joined) = JOINED.get() else { return here };
    match &*joined.lock().unwrap_or_else(|e| e.into_inner()) {
        Some(Joined::Tcp(started)) => started.listen(),
        _ => here,
    }
}
