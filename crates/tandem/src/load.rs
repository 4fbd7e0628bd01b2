//! From command-line flags to a model that is ready to run.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tandem_core::Backend;
use tandem_core::weights::ModuleKind;
use tandem_core::{Checkpoint, ModelConfig};
use tandem_cpu::{CpuBackend, Numerics, system};
use tandem_engine::{BlockManager, EXACT_ROWS, Engine, ModelRunner, Runner};
use tandem_model::{Accounting, CheckpointWeights, Limits, WeightSource};

use crate::cli::{ActivationsArg, BackendArg, ModelArgs, TransportArg};
use crate::distributed;
use crate::report::bytes;

/// The model that ships with the project.
const BUNDLED: &str = "models/fable-30m-MXFP4-Q8";
/// Context when nobody asks for more: the cache of a model made for 200,000 tokens would take tens of gigabytes.
const DEFAULT_CONTEXT: usize = 32768;

/// A model ready to run.
pub(crate) struct Loaded {
    pub(crate) dir: PathBuf,
    pub(crate) config: ModelConfig,
    pub(crate) engine: Engine,
    pub(crate) accounting: Accounting,
    pub(crate) load_time: Duration,
    pub(crate) prefill_chunk: usize,
    /// Name of the activations' numerics.
    pub(crate) numerics: &'static str,
    /// Bytes per second at which GPUs or several ranks read the model; the processor's is measured by those who want it.
    pub(crate) bandwidth: Option<f64>,
}

/// Rows whose logits one step may return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogitsRows {
    /// Only the last row's: generation.
    One,
    /// Every row's: evaluation.
    Chunk,
    /// The last row's of so many sequences: serving.
    Several(usize),
}

/// Loads the model that the flags name.
pub(crate) fn load(args: &ModelArgs, logits: LogitsRows) -> anyhow::Result<Loaded> {
    load_with_cache(args, logits, None, 1)
}

/// [`load`] with a cache of `cache_tokens`, or of `n_contexts` full sequences.
pub(crate) fn load_with_cache(
    args: &ModelArgs,
    logits: LogitsRows,
    cache_tokens: Option<usize>,
    n_contexts: usize,
) -> anyhow::Result<Loaded> {
    let start = Instant::now();
    let dir = model_dir(args.model.as_deref())?;
    let config = ModelConfig::load(&dir)?;
    let context = match args.context {
        Some(0) => bail!("--context must be at least 1"),
        Some(n) if n > config.max_position_embeddings => bail!(
            "--context {n} exceeds the {} positions this model was made for; ask for fewer",
            config.max_position_embeddings
        ),
        Some(n) => n,
        None => config.max_position_embeddings.min(DEFAULT_CONTEXT),
    };
    let checkpoint = Checkpoint::open(&dir)?;
    let weights = tandem_model::resolve(&checkpoint, &config)?;
    let accounting = Accounting::new(&weights, &config);
    let prefill_chunk = args.prefill_chunk.clamp(1, context);
    let limits = match logits {
        LogitsRows::One => Limits { max_rows: prefill_chunk, max_logits_rows: 1 },
        LogitsRows::Chunk => Limits { max_rows: prefill_chunk, max_logits_rows: prefill_chunk },
        // A step of decoding may hold prompt tokens too.
        LogitsRows::Several(n) => Limits { max_rows: prefill_chunk.max(EXACT_ROWS), max_logits_rows: n },
    };

    // One sequence always fits.
    let blocks = BlockManager::for_tokens(cache_tokens.unwrap_or(n_contexts * context).max(context));
    let shape = Shape { config: &config, limits, n_slots: blocks.n_slots() };
    // The multi-token-prediction head is not loaded.
    let resident = accounting.total(|k| if k.kind == ModuleKind::Mtp { 0 } else { k.resident_bytes });
    let (runner, numerics, bandwidth): (Box<dyn Runner>, _, _) = if distributed::leads() {
        no_host_experts(args.n_cpu_moe)?;
        let model = distributed::Model::new(config.clone(), checkpoint, weights, args);
        let n_slots = blocks.n_slots();
        match distributed::transport(&args.parallel) {
            #[cfg(feature = "cuda")]
            TransportArg::Nccl => {
                use tandem_cuda::CudaBackend;
                let (runner, numerics) = distributed::lead::<CudaBackend>(&model, &args.parallel, limits, n_slots, 1)?;
                let bandwidth = runner.plan().bandwidth();
                (Box::new(runner), numerics, Some(bandwidth))
            }
            #[cfg(not(feature = "cuda"))]
            TransportArg::Nccl => bail!(distributed::NO_CUDA),
            _ => {
                if args.backend == BackendArg::Cuda {
                    bail!("several ranks run on GPUs with --transport nccl; add it, or use --backend cpu");
                }
                let (runner, numerics) = distributed::lead::<CpuBackend>(&model, &args.parallel, limits, n_slots, 1)?;
                let bandwidth = runner.plan().bandwidth();
                (Box::new(runner), numerics, Some(bandwidth))
            }
        }
    } else {
        let source = CheckpointWeights::new(&checkpoint, weights.clone());
        match choose(args.backend, args.activations)? {
            Device::Cpu => {
                no_host_experts(args.n_cpu_moe)?;
                let (backend, numerics) = cpu_backend(args.threads, args.activations, resident);
                let runner = runner(backend, &source, shape, resident)?;
                if args.lock {
                    lock_memory();
                }
                (Box::new(runner), numerics, None)
            }
            #[cfg(feature = "cuda")]
            Device::Cuda => {
                let backend = cuda_backend(args.activations)?;
                let (n, threads, activations) = (args.n_cpu_moe, args.threads, args.activations);
                let backend = crate::cuda::place_experts(backend, shape, &weights, n, threads, activations)?;
                let (numerics, bandwidth) = (backend.numerics().name(), backend.bandwidth());
                (Box::new(runner(backend, &source, shape, resident)?), numerics, Some(bandwidth))
            }
        }
    };
    let engine = Engine::new(runner, blocks, context, config.max_position_embeddings);
    Ok(Loaded { dir, config, engine, accounting, load_time: start.elapsed(), prefill_chunk, numerics, bandwidth })
}

/// What a runner is made for.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) limits: Limits,
    /// Tokens in the cache.
    pub(crate) n_slots: usize,
}

/// Loads a model of `resident` bytes onto a backend, with a progress bar.
pub(crate) fn runner<B: Backend + 'static>(
    backend: B,
    source: &dyn WeightSource,
    shape: Shape<'_>,
    resident: u64,
) -> anyhow::Result<ModelRunner<B>> {
    let Shape { config, limits, n_slots } = shape;
    let bar = progress_bar(resident);
    let model = tandem_model::load_from(&backend, config, source, limits, &mut |bytes| bar.inc(bytes as u64))?;
    bar.finish_and_clear();
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, n_slots).with_weight_bytes(resident);
    runner.sync()?;
    Ok(runner)
}

/// Refuses `--n-cpu-moe` where it means nothing.
pub(crate) fn no_host_experts(n_cpu_moe: Option<usize>) -> anyhow::Result<()> {
    if n_cpu_moe.is_some() {
        bail!(
            "--n-cpu-moe leaves experts of one GPU's model on the host; without a GPU, or with several ranks, leave it out"
        );
    }
    Ok(())
}

/// Where a model runs.
pub(crate) enum Device {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda,
}

/// The device that `--backend` asks for.
pub(crate) fn choose(backend: BackendArg, activations: ActivationsArg) -> anyhow::Result<Device> {
    match backend {
        BackendArg::Cpu => Ok(Device::Cpu),
        #[cfg(feature = "cuda")]
        BackendArg::Cuda => Ok(Device::Cuda),
        #[cfg(not(feature = "cuda"))]
        BackendArg::Cuda => {
            bail!("this tandem was built without CUDA; build it with --features cuda, or use --backend cpu")
        }
        #[cfg(feature = "cuda")]
        BackendArg::Auto if activations != ActivationsArg::Int8 && tandem_cuda::device_present() => Ok(Device::Cuda),
        BackendArg::Auto => {
            let _ = activations;
            Ok(Device::Cpu)
        }
    }
}

/// The first GPU.
#[cfg(feature = "cuda")]
pub(crate) fn cuda_backend(activations: ActivationsArg) -> anyhow::Result<tandem_cuda::CudaBackend> {
    let numerics = crate::cuda::numerics(activations)?;
    Ok(tandem_cuda::CudaBackend::new(tandem_cuda::Options::new(numerics))?)
}

/// The processor as a backend for `weight_bytes` of weights, and the name of the activations' numerics.
pub(crate) fn cpu_backend(
    threads: Option<usize>,
    activations: ActivationsArg,
    weight_bytes: u64,
) -> (CpuBackend, &'static str) {
    let numerics = match activations {
        ActivationsArg::F32 => Numerics::F32,
        ActivationsArg::Bf16 => Numerics::Bf16,
        ActivationsArg::Int8 => Numerics::Int8,
        ActivationsArg::Auto => CpuBackend::default_numerics(),
    };
    // Repacked weights take memory of their own; mapped ones can be read again from their files.
    let repack = fits_in_memory(weight_bytes);
    if !repack {
        tracing::warn!(
            "the weights take {} and {} of memory are available: they stay mapped from their files, which is slower",
            bytes(weight_bytes),
            bytes(system::available_memory_bytes().unwrap_or(0))
        );
    }
    let backend = CpuBackend::new(threads.unwrap_or_else(system::default_threads).max(1), numerics);
    (backend.with_repacking(repack), numerics.name())
}

/// True when so many bytes of weights can be in memory.
pub(crate) fn fits_in_memory(weight_bytes: u64) -> bool {
    weight_bytes <= system::available_memory_bytes().unwrap_or(u64::MAX)
}

/// `--lock`: pins what is loaded, or says why not.
pub(crate) fn lock_memory() {
    if let Err(error) = system::lock_memory() {
        eprintln!(
            "--lock: the weights are not locked ({error}); raise the limit with `ulimit -l unlimited`, or as root"
        );
    }
}

/// A load bar with GB/s on stderr, silent when that is not a terminal.
pub(crate) fn progress_bar(total: u64) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    if let Ok(style) = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    bar
}

/// The directory of a model: the bundled one, a path, or a Hugging Face id in the local cache.
pub(crate) fn model_dir(name: Option<&str>) -> anyhow::Result<PathBuf> {
    let Some(name) = name else {
        return bundled_model();
    };
    let path = Path::new(name);
    if path.join("config.json").exists() {
        return Ok(path.to_path_buf());
    }
    if path.exists() {
        bail!("{name} has no config.json; --model takes a model directory or a Hugging Face id");
    }
    let is_id = name.split('/').count() == 2 && !name.starts_with(['.', '/', '~']);
    if !is_id {
        bail!("{name} does not exist; --model takes a model directory or a Hugging Face id (owner/name)");
    }
    let cache = hugging_face_cache().context("neither HF_HOME nor HOME is set, so there is no Hugging Face cache")?;
    let repo = cache.join(format!("models--{}", name.replace('/', "--")));
    snapshot(&repo).with_context(|| {
        format!(
            "{name} is neither a directory nor in the Hugging Face cache at {}; `tandem pull {name}` gets it",
            cache.display()
        )
    })
}

/// Where models from Hugging Face are kept, found as its own library finds it.
pub(crate) fn hugging_face_cache() -> Option<PathBuf> {
    path_variable("HF_HUB_CACHE")
        .or_else(|| path_variable("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| hugging_face_home().map(|home| home.join("hub")))
}

/// The user's token, if there is one.
pub(crate) fn hugging_face_token() -> Option<String> {
    let variable = |name| std::env::var(name).ok();
    let file = || path_variable("HF_TOKEN_PATH").or_else(|| hugging_face_home().map(|home| home.join("token")));
    let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
    let token = token.filter(|token| !token.trim().is_empty()).or_else(|| std::fs::read_to_string(file()?).ok())?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

fn hugging_face_home() -> Option<PathBuf> {
    path_variable("HF_HOME")
        .or_else(|| path_variable("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
        .or_else(|| home().map(|home| home.join(".cache/huggingface")))
}

fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from)
}

/// A variable that names a folder; `~` stands for the home directory, `$NAME` and `${NAME}` for other variables.
fn path_variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
    let Some(text) = value.to_str() else { return Some(PathBuf::from(value)) };
    let variable = |name: &str| std::env::var(name).ok();
    let expanded = expand(text, &variable);
    Some(match (expanded.strip_prefix('~'), home()) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => PathBuf::from(expanded),
    })
}

/// Puts values in the place of `$NAME` and `${NAME}`; names without a value stay as they are.
fn expand(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, tail) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some(braced) => braced,
            None => after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len())),
        };
        match variable(name).filter(|_| !name.is_empty()) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[before.len()..rest.len() - tail.len()]),
        }
        rest = tail;
    }
    out + rest
}

/// The snapshot that `refs/main` names, else the only one with a config.json.
fn snapshot(repo: &Path) -> Option<PathBuf> {
    let snapshots = repo.join("snapshots");
    if let Ok(revision) = std::fs::read_to_string(repo.join("refs/main")) {
        let dir = snapshots.join(revision.trim());
        if dir.join("config.json").exists() {
            return Some(dir);
        }
    }
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(&snapshots)
        .ok()?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|dir| dir.join("config.json").exists())
        .collect();
    dirs.sort();
    dirs.pop()
}

/// Next to the working directory or above the executable, as in a clone.
fn bundled_model() -> anyhow::Result<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    std::iter::once(Path::new(""))
        .chain(executable.ancestors())
        .map(|dir| dir.join(BUNDLED))
        .find(|dir| dir.join("config.json").exists())
        .with_context(|| format!("the bundled model {BUNDLED} was not found; name one with --model DIR"))
}
