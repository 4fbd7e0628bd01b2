//! A model's needs of a server beside its engine: the small files, the name of its cached pages, the bytes of a step.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tandem_core::ModelConfig;
use tandem_core::weights::ModuleKind;
use tandem_engine::{GenerationConfig, RankStatus};
use tandem_model::Accounting;
use tandem_text::{ChatFormat, Dialect, Tokenizer};

use crate::model_dir::model_dir;
use crate::options::ModelOptions;

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
