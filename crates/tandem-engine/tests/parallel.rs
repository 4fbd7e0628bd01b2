//! Every division of every fixture against one rank, over threads and TCP.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tandem_comm::local::Fault;
use tandem_comm::mpi::{self, Mpi};
use tandem_comm::tcp::{Hello, Peer, Secret, TcpConfig};
use tandem_comm::{Channel, CommError, Group, Incoming, Transport, Wait, Wire, local, tcp};
use tandem_core::backend::{Backend, Batch};
use tandem_core::{Checkpoint, ModelConfig};
use tandem_cpu::{CpuBackend, Numerics};
use tandem_engine::{
    BlockManager, DistributedRunner, DraftDepth, Engine, HostReduce, Logits, ModelRunner, Pipeline, RankRunner, Runner,
    Sequence,
};
use tandem_model::{
    CheckpointWeights, Division, Limits, MtpSource, PartWeights, Planner, RankResources, Request, Share, load_drafting,
};

const LIMITS: Limits = Limits { max_rows: 64, max_logits_rows: 64 };
const CONTEXT: usize = 256;
const PATIENCE: Duration = Duration::from_secs(20);

fn models() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut dirs: Vec<PathBuf> = vec![root.join("models/fable-30m-MXFP4-Q8")];
    let mut roots = vec![root.join("tests/golden/models")];
    roots.extend(std::env::var_os("TANDEM_FIXTURES").map(PathBuf::from));
    for root in roots {
        let entries = std::fs::read_dir(root).expect("fixtures").map(|e| e.expect("readable").path());
        dirs.extend(entries.filter(|d| d.join("config.json").exists()));
    }
    dirs.sort();
    assert!(dirs.len() >= 8);
    dirs
}

fn engine(runner: impl Runner + 'static, config: &ModelConfig) -> Engine {
    Engine::new(Box::new(runner), BlockManager::for_tokens(CONTEXT), CONTEXT, config.max_position_embeddings)
}

fn one_rank(dir: &Path, numerics: Numerics) -> Engine {
    let config = ModelConfig::load(dir).expect("config.json");
    let checkpoint = Checkpoint::open(dir).expect("weights");
    let backend = CpuBackend::new(1, numerics);
    let model = tandem_model::load(&backend, &config, &checkpoint, LIMITS, &mut |_| {}).expect("model");
    engine(ModelRunner::new(backend, model, LIMITS, config.vocab_size, CONTEXT), &config)
}

/// Loads this rank's share as the plan for `request` says; the bytes loaded are checked against the plan's.
fn share(
    dir: &Path,
    numerics: Numerics,
    transport: Box<dyn Transport>,
    request: Request,
    patience: Duration,
) -> (RankRunner<CpuBackend>, ModelConfig) {
    share_with(dir, numerics, transport, request, patience, false)
}

/// [`share`], on rank 0 with the multi-token-prediction layer if `drafts`.
fn share_with(
    dir: &Path,
    numerics: Numerics,
    transport: Box<dyn Transport>,
    request: Request,
    patience: Duration,
    drafts: bool,
) -> (RankRunner<CpuBackend>, ModelConfig) {
    let config = ModelConfig::load(dir).expect("config.json");
    let checkpoint = Checkpoint::open(dir).expect("weights");
    let weights = tandem_model::resolve(&checkpoint, &config).expect("resolves");
    let backend = CpuBackend::new(1, numerics);
    let world = Group::world(transport, patience);
    let resources = RankResources { host: "test".into(), memory: 1 << 40, bandwidth: 1e10, round_trip: 1e-5 };
    let planner = Planner {
        config: &config,
        weights: &weights,
        n_slots: CONTEXT,
        cache_bytes: &|kind, width| backend.cache_bytes(kind, width),
        ranks: &vec![resources; world.size()],
    };
    let plan = planner.plan(request).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let plan = Arc::new(plan);
    let rank = &plan.ranks[world.rank()];
    let pipeline = Pipeline::new(world, plan.clone());
    let reduce = (plan.tensor_size > 1)
        .then(|| Arc::new(HostReduce::new(pipeline.tensor_group(), Wire::F32, config.hidden_size)));
    let division = Division::new(&rank.part, &config, &weights);
    let local = division.config(&config);
    let whole = CheckpointWeights::new(&checkpoint, weights.clone());
    let source = PartWeights::new(&whole, &weights, division.clone());
    let group = reduce.clone().map(|r| r as Arc<dyn tandem_core::backend::TensorGroup<CpuBackend>>);
    let mtp = if drafts && rank.part.head { MtpSource::new(&config, &whole, &weights) } else { None };
    let (share, mut loaded) = (Share { division: division.clone(), group }, 0);
    let progress = &mut |bytes: usize| loaded += bytes as u64;
    // The layer is not a part of the plan.
    let embeds = if mtp.is_some() && !rank.part.embeds {
        let embedding = weights.iter().find(|w| w.spec.module == "model.embed_tokens").expect("an embedding");
        embedding.bytes() as u64
    } else {
        0
    };
    let model = load_drafting(&backend, &local, &source, share, LIMITS, mtp, progress).expect("loads");
    loaded -= embeds;
    let vectors: u64 = weights.iter().filter(|w| w.spec.shape.len() == 1).map(|w| division.bytes(w, &config)).sum();
    assert_eq!(loaded + vectors, rank.weight_bytes, "{}: bytes planned and loaded", dir.display());
    let runner =
        RankRunner::new(backend, model, pipeline, reduce, LIMITS, config.vocab_size, config.hidden_size, CONTEXT);
    (runner, config)
}

/// Runs `lead` on rank 0's engine while the other ranks follow.
fn on_ranks<R: Send>(
    dir: &Path,
    numerics: Numerics,
    transports: Vec<Box<dyn Transport>>,
    request: Request,
    lead: impl FnOnce(&mut Engine) -> R + Send,
) -> R {
    on_ranks_with(dir, numerics, transports, request, DraftDepth::OFF, lead)
}

/// [`on_ranks`], with drafts, the multi-token-prediction layer's too.
fn on_ranks_with<R: Send>(
    dir: &Path,
    numerics: Numerics,
    transports: Vec<Box<dyn Transport>>,
    request: Request,
    depth: DraftDepth,
    lead: impl FnOnce(&mut Engine) -> R + Send,
) -> R {
    std::thread::scope(|scope| {
        let mut transports = transports.into_iter();
        let first = transports.next().expect("at least one");
        let followers: Vec<_> = transports
            .map(|t| scope.spawn(move || share(dir, numerics, t, request, PATIENCE).0.follow().expect("follows")))
            .collect();
        let result = {
            let drafts = depth != DraftDepth::OFF;
            let (runner, config) = share_with(dir, numerics, first, request, PATIENCE, drafts);
            lead(&mut engine(DistributedRunner::new(runner), &config).with_drafts(depth))
        };
        followers.into_iter().for_each(|f| f.join().expect("no panic"));
        result
    })
}

fn over_local(n: usize) -> Vec<Box<dyn Transport>> {
    local::group(n).into_iter().map(|t| Box::new(t) as Box<dyn Transport>).collect()
}

fn over_tcp(n: usize) -> Vec<Box<dyn Transport>> {
    let listeners: Vec<TcpListener> =
        (0..n).map(|_| tcp::listen("127.0.0.1:0".parse().expect("an address")).expect("loopback")).collect();
    let peers: Vec<Peer> = listeners
        .iter()
        .map(|l| Peer { host: "loopback".to_string(), address: l.local_addr().expect("bound") })
        .collect();
    let threads: Vec<_> = listeners
        .into_iter()
        .enumerate()
        .map(|(rank, listener)| {
            let config = TcpConfig {
                encrypt: false,
                rank,
                peers: peers.clone(),
                secret: Secret([3; 32]),
                generation: 0,
                hello: Hello { version: "test".to_string(), model: "test".to_string() },
                deadline: PATIENCE,
                start_timeout: PATIENCE,
                on_failure: Box::new(|_| {}),
            };
            std::thread::spawn(move || Box::new(tcp::connect(listener, config).expect("meets")) as Box<dyn Transport>)
        })
        .collect();
    threads.into_iter().map(|t| t.join().expect("no panic")).collect()
}

fn prompt(config_vocab: usize) -> Vec<u32> {
    (0..40u32).map(|i| (i * 131 + 7) % config_vocab as u32).collect()
}

/// All logits of a prompt in chunks, then greedy tokens one by one, with their logits.
fn trace(engine: &mut Engine) -> (Vec<f32>, Vec<u32>) {
    let vocab = engine.vocab_size();
    let mut sequence = Sequence::default();
    let mut logits = engine.run(&mut sequence, &prompt(vocab), 9, Logits::All).expect("runs");
    let mut last = logits[logits.len() - vocab..].to_vec();
    let mut tokens = vec![];
    for _ in 0..8 {
        let token = (0..vocab).max_by(|a, b| last[*a].total_cmp(&last[*b]).then(b.cmp(a))).expect("a vocabulary");
        tokens.push(token as u32);
        last = engine.run(&mut sequence, &[token as u32], 1, Logits::Last).expect("runs");
        logits.extend(&last);
    }
    engine.release(&mut sequence);
    (logits, tokens)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn request(pp: usize, tp: usize, ep: usize) -> Request {
    let some = |n: usize| if n > 1 { Some(n) } else { None };
    Request { pp: Some(pp), tp: some(tp), ep: some(ep) }
}

#[test]
fn pipelines_give_the_bits_of_one_rank() {
    for dir in models() {
        for numerics in [Numerics::F32, CpuBackend::default_numerics()] {
            let (expected, tokens) = trace(&mut one_rank(&dir, numerics));
            for n in [2, 3] {
                for transports in [over_local(n), over_tcp(n)] {
                    let (found, found_tokens) = on_ranks(&dir, numerics, transports, request(n, 1, 1), trace);
                    assert_eq!(found_tokens, tokens, "{} pp={n}", dir.display());
                    assert!(bits(&found) == bits(&expected), "{} pp={n}: logits differ", dir.display());
                }
            }
        }
    }
}

#[test]
fn slices_agree_with_one_rank_and_repeat() {
    for dir in models() {
        let has_experts = ModelConfig::load(&dir).expect("config.json").moe.is_some();
        let (expected, tokens) = trace(&mut one_rank(&dir, Numerics::F32));
        let size = (expected.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / expected.len() as f64).sqrt();
        for (n, request) in [
            (2, request(1, 2, 1)),
            (3, request(1, 3, 1)),
            (4, request(2, 2, 1)),
            (2, request(1, 1, 2)),
            (2, request(1, 2, 2)),
        ] {
            if request.ep.is_some() && !has_experts {
                continue;
            }
            let what = format!("{} {request:?}", dir.display());
            let (found, found_tokens) = on_ranks(&dir, Numerics::F32, over_local(n), request, trace);
            assert_eq!(found_tokens, tokens, "{what}");
            let worst = found.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
            assert!(worst <= 2e-4 * size.max(1.0), "{what}: logits differ by {worst} of {size}");
            let (again, _) = on_ranks(&dir, Numerics::F32, over_tcp(n), request, trace);
            assert!(bits(&found) == bits(&again), "{what}: another transport gives other bits");
        }
    }
}

/// An MPI job can be joined once; it is left when the last model has run.
#[derive(Clone)]
struct Job(Arc<Mutex<Mpi>>);

impl Job {
    fn mpi(&self) -> std::sync::MutexGuard<'_, Mpi> {
        self.0.lock().expect("no panic")
    }
}

impl Transport for Job {
    fn rank(&self) -> usize {
        self.mpi().rank()
    }

    fn size(&self) -> usize {
        self.mpi().size()
    }

    fn host(&self, rank: usize) -> String {
        self.mpi().host(rank)
    }

    fn exchange(
        &mut self,
        channel: Channel,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, Incoming<'_>)>,
        wait: Wait,
    ) -> Result<(), CommError> {
        self.mpi().exchange(channel, send, recv, wait)
    }

    fn abort(&mut self, message: &str) {
        self.mpi().abort(message);
    }

    fn leave(&mut self) {}
}

/// What `mpi_rank` is to run: stages, slices, parts of the experts.
const LAYOUT: &str = "TANDEM_TEST_LAYOUT";

/// One rank of [`mpi_gives_the_bits_of_threads`], started by mpirun: every model in turn.
#[test]
#[ignore = "started by mpi_gives_the_bits_of_threads under mpirun"]
fn mpi_rank() {
    let layout = std::env::var(LAYOUT).expect("set by the other test");
    let numbers: Vec<usize> = layout.split(',').map(|n| n.parse().expect("a number")).collect();
    let request = request(numbers[0], numbers[1], numbers[2]);
    let job = Job(Arc::new(Mutex::new(mpi::init().expect("libmpi"))));
    for dir in models() {
        if request.ep.is_some() && ModelConfig::load(&dir).expect("config.json").moe.is_none() {
            continue;
        }
        let (runner, config) = share(&dir, Numerics::F32, Box::new(job.clone()), request, PATIENCE);
        if job.rank() > 0 {
            runner.follow().expect("follows");
            continue;
        }
        let (found, tokens) = trace(&mut engine(DistributedRunner::new(runner), &config));
        let (_, of_one_rank) = trace(&mut one_rank(&dir, Numerics::F32));
        assert_eq!(tokens, of_one_rank, "{}", dir.display());
        let (of_threads, _) = on_ranks(&dir, Numerics::F32, over_local(job.size()), request, trace);
        assert!(bits(&found) == bits(&of_threads), "{}: logits differ from those over threads", dir.display());
    }
    job.mpi().leave();
}

#[test]
fn mpi_gives_the_bits_of_threads() {
    for mpirun in ["mpirun.openmpi", "mpirun.mpich"] {
        let mut found = 0;
        for (n, layout) in [("2", "2,1,1"), ("3", "3,1,1"), ("2", "1,2,1"), ("4", "2,2,1"), ("2", "1,1,2")] {
            let mut command = std::process::Command::new(mpirun);
            command.args(["-n", n]).arg(std::env::current_exe().expect("this test")).env(LAYOUT, layout);
            command.args(["--exact", "mpi_rank", "--ignored"]);
            // Open MPI refuses root and more ranks than cores unless told otherwise, and looks for an ssh.
            for name in
                ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"]
            {
                command.env(name, "1");
            }
            command.env("OMPI_MCA_plm", "isolated");
            let Ok(output) = command.output() else { continue };
            found += 1;
            let text = [output.stdout, output.stderr].map(|t| String::from_utf8_lossy(&t).into_owned()).join("");
            assert!(output.status.success() && text.contains("1 passed"), "{mpirun} {layout}: {text}");
        }
        let required = std::env::var_os("TANDEM_REQUIRE_MPI").is_some();
        assert!(found == 5 || !required, "{mpirun} was not found (Debian: apt-get install openmpi-bin mpich)");
    }
}

/// Sequences that decode together keep their bits when the pipeline cuts the batch.
#[test]
fn batches_of_sequences_are_cut_without_a_trace() {
    let dir = &models()[0];
    let step = |runner: &mut dyn Runner| -> Vec<f32> {
        let tables: Vec<Vec<u32>> = vec![vec![0], vec![1], vec![2]];
        let mut logits = vec![];
        for position in 0..3 {
            let batch = Batch {
                tokens: vec![5 + position, 9, 11 + position],
                positions: vec![position; 3],
                sequences: vec![0, 1, 2],
                block_tables: tables.clone(),
                logits_rows: vec![0, 1, 2],
                sampling: vec![],
            };
            runner.step(batch, &mut logits).expect("runs");
        }
        logits
    };
    let config = ModelConfig::load(dir).expect("config.json");
    let checkpoint = Checkpoint::open(dir).expect("weights");
    let backend = CpuBackend::new(1, Numerics::F32);
    let model = tandem_model::load(&backend, &config, &checkpoint, LIMITS, &mut |_| {}).expect("model");
    let expected = step(&mut ModelRunner::new(backend, model, LIMITS, config.vocab_size, CONTEXT));
    std::thread::scope(|scope| {
        let mut transports = over_local(2).into_iter();
        let (first, second) = (transports.next().expect("two"), transports.next().expect("two"));
        let follower = scope.spawn(|| share(dir, Numerics::F32, second, request(2, 1, 1), PATIENCE).0.follow());
        let found = {
            let runner = share(dir, Numerics::F32, first, request(2, 1, 1), PATIENCE).0;
            step(&mut DistributedRunner::new(runner))
        };
        follower.join().expect("no panic").expect("follows");
        assert!(bits(&found) == bits(&expected));
    });
}

/// What a faulty network may do to each message of schedule `seed`.
fn faults(seed: u64) -> local::Faults {
    Arc::new(move |from, to, number| {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((from * 8 + to) as u64) << 48 ^ number << 8;
        for shift in [30, 27, 31] {
            x = (x ^ (x >> shift)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        }
        // Some schedules are harsh, some harm one message in many.
        let rate = [40, 200, 1000, 4000][seed as usize % 4];
        if !x.is_multiple_of(rate) {
            return Fault::None;
        }
        match x >> 32 & 7 {
            0 => Fault::Drop,
            1 => Fault::Duplicate,
            2 => Fault::Overtake,
            3 => Fault::Die,
            4 => Fault::Stall(Duration::from_millis(60)),
            5 => Fault::Stall(Duration::from_millis(5)),
            6 => Fault::Delay(Duration::from_millis(60)),
            _ => Fault::Delay(Duration::from_millis(3)),
        }
    })
}

/// Whatever the network does, every rank ends, and every token that comes out is right.
#[test]
fn no_fault_schedule_hangs_or_gives_a_wrong_token() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/dsv3_fp8_tiny");
    let patience = Duration::from_millis(25);
    let greedy = |engine: &mut Engine| -> Vec<u32> {
        let vocab = engine.vocab_size();
        let mut sequence = Sequence::default();
        let Ok(mut last) = engine.run(&mut sequence, &prompt(vocab)[..12], 5, Logits::Last) else { return vec![] };
        let mut tokens = vec![];
        for _ in 0..6 {
            let best = (0..vocab).max_by(|a, b| last[*a].total_cmp(&last[*b]).then(b.cmp(a))).expect("a vocabulary");
            tokens.push(best as u32);
            match engine.run(&mut sequence, &[best as u32], 1, Logits::Last) {
                Ok(logits) => last = logits,
                Err(_) => break,
            }
        }
        tokens
    };
    let expected = greedy(&mut one_rank(&dir, Numerics::F32));
    let (mut complete, mut failed) = (0, 0);
    for seed in 0..1000 {
        let (n, request) = [(2, request(2, 1, 1)), (3, request(3, 1, 1)), (2, request(1, 2, 1)), (4, request(2, 2, 1))]
            [(seed / 4) as usize % 4];
        let transports = local::faulty_group(n, Some(faults(seed)));
        let start = std::time::Instant::now();
        let found = std::thread::scope(|scope| {
            let mut transports = transports.into_iter().map(|t| Box::new(t) as Box<dyn Transport>);
            let first = transports.next().expect("at least one");
            for transport in transports {
                let dir = &dir;
                scope.spawn(move || share(dir, Numerics::F32, transport, request, patience).0.follow());
            }
            let (runner, config) = share(&dir, Numerics::F32, first, request, patience);
            greedy(&mut engine(DistributedRunner::new(runner), &config))
        });
        assert!(start.elapsed() < Duration::from_secs(10), "schedule {seed} hangs");
        assert_eq!(found, expected[..found.len()], "schedule {seed}: a wrong token");
        if found.len() == expected.len() { complete += 1 } else { failed += 1 }
    }
    // The schedules are such that both happen often.
    assert!(complete > 100 && failed > 100, "{complete} complete, {failed} failed");
}

/// Ranks that compute something else find out, and say who.
#[test]
fn diverging_ranks_are_named() {
    let everyone = &std::sync::Barrier::new(3);
    let results: Vec<Result<(), CommError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = local::group(3)
            .into_iter()
            .enumerate()
            .map(|(rank, transport)| {
                scope.spawn(move || {
                    let backend = CpuBackend::new(1, Numerics::F32);
                    let reduce = HostReduce::new(Group::world(Box::new(transport), PATIENCE), Wire::F32, 4);
                    let mut hidden = backend.alloc(1, 4);
                    let value = if rank == 2 { 1.0000001 } else { 1.0 };
                    backend.write_rows(&[value, 2.0, 3.0, 4.0], &mut hidden);
                    tandem_core::backend::TensorGroup::begin_layer(&reduce, &backend, 5, &hidden, 1);
                    let result = reduce.finish_step();
                    // A rank that ends earlier would be blamed by those that still compare.
                    everyone.wait();
                    result
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    });
    for result in results {
        let error = result.expect_err("rank 2 differs");
        assert!(error.rank == Some(2) && error.to_string().contains("layer 5"), "{error}");
    }
}

/// Rank 0 drafts, all ranks verify: the text of one rank without drafts, whatever the division.
#[test]
fn ranks_say_the_same_with_drafts() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/fable-30m-MXFP4-Q8");
    let prompt = |i: u32| -> Vec<u32> { (0..40 + i).map(|k| 20 + (k % 17 * 37 + i * 11) % 2800).collect() };
    let texts = |engine: &mut Engine| {
        let mut ids = vec![];
        for i in 0..3 {
            let request = tandem_engine::Request { prompt: prompt(i), max_tokens: 40, ..Default::default() };
            ids.push(engine.submit(request).expect("takes it"));
        }
        let (mut texts, mut outputs) = (vec![vec![]; ids.len()], vec![]);
        while engine.n_running() + engine.n_waiting() > 0 {
            engine.step(&mut outputs).expect("runs");
            for output in outputs.drain(..) {
                let i = ids.iter().position(|id| *id == output.request).expect("a request of ours");
                if let tandem_engine::Event::Token { id, .. } = output.event {
                    texts[i].push(id);
                }
            }
        }
        (texts, engine.counters())
    };
    // The sums of slices are in another order than those of one rank: each division has its own text to compare with.
    for (n, pp, tp) in [(2, Some(2), None), (2, None, Some(2)), (4, Some(2), Some(2))] {
        let request = Request { pp, tp, ep: None };
        let (plain, _) = on_ranks(&dir, Numerics::Bf16, over_local(n), request, texts);
        for depth in [1, 4] {
            let depth = DraftDepth::Fixed(depth);
            let (drafted, counters) = on_ranks_with(&dir, Numerics::Bf16, over_local(n), request, depth, texts);
            assert_eq!(drafted, plain, "{request:?}, depth {depth}");
            assert!(counters.mtp_drafts.drafts > 0 && counters.ngram_drafts.drafts > 0, "{counters:?}");
        }
    }
}
