//! A model's needs of a server beside its engine: the small files, the name of its cached pages, the bytes of a step.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tandem_core::backend::PAGE_SIZE;
use tandem_core::weights::ModuleKind;
use tandem_core::{Checkpoint, ModelConfig};
use tandem_cpu::bandwidth::measure_read_bandwidth;
use tandem_engine::{GenerationConfig, RankStatus};
use tandem_model::Accounting;
use tandem_text::{ChatFormat, Dialect, Tokenizer};

use crate::device::{DeviceKind, cpu_backend};
use crate::load::{resident_bytes, settle_tie};
use crate::model_dir::model_dir;
use crate::options::{Activations, DeviceOptions, LoadOptions, ModelOptions};

/// A model's small files, read and checked before its weights are.
pub struct ModelFiles {
    /// Its directory.
    pub dir: PathBuf,
    /// Its config.json.
    pub config: ModelConfig,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// How it chats.
    pub chat_format: ChatFormat,
    /// Defaults for sampling.
    pub defaults: GenerationConfig,
}

impl ModelFiles {
    /// Reads the files of the options' model; `template` and `dialect` stand for what the checkpoint says.
    ///
    /// # Errors
    /// There is no such model, a file is malformed, or the context is larger than the model's.
    pub fn read(
        options: &ModelOptions,
        template: Option<&Path>,
        dialect: Option<Dialect>,
    ) -> anyhow::Result<ModelFiles> {
        let dir = model_dir(options.model.as_deref())?;
        let config = ModelConfig::load(&dir)?;
        options.context(&config)?;
        let tokenizer = Tokenizer::from_dir(&dir)?;
        let chat_format = ChatFormat::from_dir(&dir, template, dialect, |token| tokenizer.has_token(token))?;
        Ok(ModelFiles { config, tokenizer, chat_format, defaults: GenerationConfig::load(&dir)?, dir })
    }

    /// Name of the directory.
    pub fn name(&self) -> String {
        let dir = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
    }
}

/// Weight bytes that a step of a given number of rows reads: each row picks experts of its own, evenly spread.
pub fn bytes_of_step(accounting: &Accounting, config: &ModelConfig) -> impl Fn(usize) -> u64 + Send + Sync + 'static {
    let routed = accounting.total(|k| if k.kind == ModuleKind::RoutedExperts { k.resident_bytes } else { 0 });
    let others = accounting.total(|k| if k.kind == ModuleKind::RoutedExperts { 0 } else { k.read_bytes });
    let skipped =
        config.moe.as_ref().map_or(0.0, |moe| 1.0 - moe.num_experts_per_tok as f64 / moe.n_routed_experts as f64);
    move |n_rows| others + (routed as f64 * (1.0 - skipped.powi(n_rows as i32))) as u64
}

/// Names what cached pages depend on: the model's files, the numerics, and who has which layers if these are sliced.
///
/// # Errors
/// The files cannot be looked at.
pub fn page_fingerprint(dir: &Path, numerics: &str, ranks: &[RankStatus]) -> anyhow::Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(concat!("tandem ", env!("CARGO_PKG_VERSION"), " pages 1\n"));
    hasher.update(numerics);
    if ranks.windows(2).any(|pair| pair[0].layers == pair[1].layers) {
        ranks.iter().for_each(|rank| hasher.update(format!(" {:?}", rank.layers)));
    }
    hasher.update(std::fs::read(dir.join("config.json"))?);
    let mut files: Vec<_> = std::fs::read_dir(dir)?.collect::<Result<_, _>>()?;
    files.sort_by_key(std::fs::DirEntry::file_name);
    for file in files.iter().filter(|f| f.path().extension().is_some_and(|e| e == "safetensors" || e == "gguf")) {
        let meta = std::fs::metadata(file.path())?;
        let modified = meta.modified()?.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        hasher.update(format!("{:?} {} {modified}\n", file.file_name(), meta.len()));
    }
    Ok(hasher.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect())
}

/// Read for the memory's bandwidth at least.
const BANDWIDTH_BYTES: usize = 256 << 20;

/// Bytes per second that the processor's threads read together, if they are the device. Takes a second, and 1 GiB of memory.
///
/// # Errors
/// There is no such device.
pub fn memory_bandwidth(device: &DeviceOptions) -> anyhow::Result<Option<f64>> {
    let is_cpu = DeviceKind::choose(device)? == DeviceKind::Cpu;
    Ok(is_cpu.then(|| measure_read_bandwidth(cpu_backend(device, 0).pool(), BANDWIDTH_BYTES)))
}

/// Bytes that a process takes besides weights and cache: the program, its threads, room to work.
const PROCESS_BYTES: u64 = 64 << 20;
/// Bytes that each of several ranks reads to measure the memory's bandwidth when it starts; a process alone need not.
const MEASURING_BYTES: u64 = 1 << 30;
/// Bytes of a cached number at most, as backends keep them; f32 if the numerics are.
const CACHED_NUMBER_BYTES: u64 = 2;

/// Bytes of memory that the options' model will about take in a process of its own, or one a rank, whose memory's bandwidth is
/// known, by its configuration and the headers of its
/// files, which are checked as loading would; its weights are looked at when they are loaded.
///
/// # Errors
/// As [`ModelFiles::read`], or a tensor is missing or not as it should be.
pub fn memory_needed(options: &ModelOptions, what: LoadOptions) -> anyhow::Result<u64> {
    let mut files = ModelFiles::read(options, None, None)?;
    let context = options.context(&files.config)?;
    let checkpoint = Checkpoint::open(&files.dir)?;
    settle_tie(&mut files.config, &checkpoint);
    let weights = tandem_model::resolve(&checkpoint, &files.config)?;
    let resident = resident_bytes(&Accounting::new(&weights, &files.config));
    let n_tokens = what.cache_tokens.unwrap_or(what.n_contexts * context).max(context).next_multiple_of(PAGE_SIZE);
    let specs = (0..files.config.num_hidden_layers).flat_map(|layer| tandem_model::cache_specs(&files.config, layer));
    let numbers: u64 = specs.map(|spec| spec.width as u64).sum();
    let number_bytes = if options.device.activations == Activations::F32 { 4 } else { CACHED_NUMBER_BYTES };
    let n_ranks = options.parallel.n_ranks()? as u64;
    let of_processes = n_ranks * (PROCESS_BYTES + if n_ranks > 1 { MEASURING_BYTES } else { 0 });
    Ok(resident + numbers * number_bytes * n_tokens as u64 + of_processes)
}
