//! Several models behind one port, each a process of its own (docs/decisions/0014): which of them are in memory ([`pool`]),
//! how they are started ([`process`]), and requests on their way to them.

mod folder;
mod metrics;
mod pool;
mod process;
mod routes;
mod send;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use sha2::{Digest, Sha256};
use thiserror::Error;

pub use folder::CheckModel;
pub use pool::KeepAlive;

use crate::app::{Options, ServeError};
use crate::body::Admission;
use crate::browser::Access;
use pool::{Limits, Pool, Spec};
use process::Processes;

/// The folder is read again at most this often.
const REREAD: Duration = Duration::from_secs(2);

/// Gets a model's name and each line that its process says.
pub type OnLine = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Which models there are, and how they share the memory.
pub struct ModelsOptions {
    /// Folder of models.
    pub dir: PathBuf,
    /// Bytes of memory of all models together.
    pub memory_bytes: u64,
    /// How long an idle model stays, unless a request says otherwise.
    pub keep_alive: KeepAlive,
    /// Names of models that are loaded at once and never leave.
    pub pinned: Vec<String>,
    /// Longest time that a request waits for its model, unless it says otherwise.
    pub load_timeout: Duration,
    /// Makes program and arguments of a model's process, once all options are found usable; its model, names, address and
    /// key are added.
    pub command: Box<dyn FnOnce() -> Vec<OsString>>,
    /// Folder of cached pages and answers, of which each model has a part.
    pub cache_dir: Option<PathBuf>,
    /// Looks at a model before it is loaded.
    pub check: CheckModel,
    /// Gets what models say.
    pub on_line: OnLine,
}

/// Why several models cannot be served.
#[derive(Debug, Error)]
pub enum ModelsError {
    /// The folder cannot be read.
    #[error("cannot read --models-dir {}: {error}", .dir.display())]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It has nothing in it.
    #[error("--models-dir {} has no models; expected a folder for each, such as NAME or OWNER/NAME, with its files", .0.display())]
    Empty(PathBuf),
    /// None of its models can be loaded.
    #[error("no model of --models-dir {} can be loaded; {name:?}: {why}", .dir.display())]
    NoneLoadable {
        /// The folder.
        dir: PathBuf,
        /// The model that needs least memory, or the first one if all are broken.
        name: String,
        /// Why.
        why: String,
    },
    /// A pinned model is not there, or cannot be loaded.
    #[error("--pin {name:?}: {why}")]
    Pin {
        /// The name.
        name: String,
        /// Why.
        why: String,
    },
    /// An option of the server.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The key of the models' processes.
    #[error("cannot write a temporary file: {0}")]
    Key(std::io::Error),
}

/// The models, and whatever their requests pass on the way.
pub struct Models {
    pool: Arc<Pool<Processes>>,
    dir: PathBuf,
    check: CheckModel,
    /// What the folder had, and when it was read.
    specs: Mutex<(Vec<Spec>, Instant)>,
    load_timeout: Duration,
    keys: Vec<[u8; 32]>,
    open_metrics: bool,
    access: Access,
    admission: Admission,
    max_body_bytes: usize,
    created: u64,
}

impl Models {
    /// Reads the folder and begins to load pinned models. Needs tokio's runtime.
    ///
    /// # Errors
    /// The folder has no models, a pinned one cannot be loaded, or an option is not usable.
    pub fn new(models: ModelsOptions, options: &Options) -> Result<Arc<Models>, ModelsError> {
        let access = options.access()?;
        let unreadable = |error| ModelsError::Folder { dir: models.dir.clone(), error };
        let specs = folder::models_of(&models.dir, &[], &models.check).map_err(unreadable)?;
        if specs.is_empty() {
            return Err(ModelsError::Empty(models.dir));
        }
        let limit = models.memory_bytes;
        let smallest = specs.iter().min_by_key(|spec| spec.bytes.as_ref().map_or(u64::MAX, |bytes| *bytes));
        if let Some((name, why)) = smallest.and_then(|spec| Some((spec.name.clone(), spec.never(limit)?))) {
            return Err(ModelsError::NoneLoadable { dir: models.dir, name, why });
        }
        let mut pinned = models.pinned;
        pinned.sort();
        pinned.dedup();
        let mut pinned_bytes = 0;
        for name in &pinned {
            let refuse = |why: String| ModelsError::Pin { name: name.clone(), why };
            let Some(spec) = specs.iter().find(|spec| spec.name == *name) else {
                let names: Vec<&str> = specs.iter().map(|spec| &*spec.name).collect();
                return Err(refuse(format!("there is no such model; there are {}", names.join(", "))));
            };
            pinned_bytes += *spec.bytes.as_ref().map_err(|why| refuse(why.clone()))?;
            if pinned_bytes > limit {
                return Err(refuse(format!(
                    "pinned models need {}, and all models together may have {} (--models-memory)",
                    pool::size(pinned_bytes),
                    pool::size(limit)
                )));
            }
        }
        let key = random_key().map_err(ModelsError::Key)?;
        let key_file = key_file(&key).map_err(ModelsError::Key)?;
        let (command, cache_dir, on_line) = ((models.command)(), models.cache_dir, models.on_line);
        let processes = Processes { command, key, key_file, cache_dir, on_line };
        let limits = Limits { memory_bytes: limit, keep_alive: models.keep_alive, pinned };
        Ok(Arc::new(Models {
            pool: Pool::new(processes, limits, specs.clone()),
            dir: models.dir,
            check: models.check,
            specs: Mutex::new((specs, Instant::now())),
            load_timeout: models.load_timeout,
            keys: options.api_keys.iter().map(|key| Sha256::digest(key.trim()).into()).collect(),
            open_metrics: options.open_metrics,
            access,
            admission: Admission::new(options.max_body_bytes_in_flight, options.return_memory),
            max_body_bytes: options.max_body_bytes,
            created: crate::generation::now(),
        }))
    }

    /// Everything that the server answers.
    pub fn router(self: &Arc<Self>) -> Router {
        routes::router(self)
    }

    /// Names of all models, and of those that cannot be loaded the reasons.
    pub fn names(&self) -> Vec<(String, Option<String>)> {
        let specs = self.specs.lock().unwrap_or_else(|e| e.into_inner());
        let limit = self.pool.memory().0;
        specs.0.iter().map(|spec| (spec.name.clone(), spec.never(limit))).collect()
    }

    /// Ends every model's process, and returns when all are gone.
    pub async fn end(&self) {
        self.pool.end().await;
    }

    /// Looks into the folder again, if that is some time ago.
    fn reread(&self) {
        let mut known = self.specs.lock().unwrap_or_else(|e| e.into_inner());
        if known.1.elapsed() < REREAD {
            return;
        }
        match folder::models_of(&self.dir, &known.0, &self.check) {
            Ok(specs) => {
                known.0.clone_from(&specs);
                self.pool.update(specs);
            }
            Err(error) => tracing::warn!("cannot read {}: {error}", self.dir.display()),
        }
        known.1 = Instant::now();
    }
}

/// Flags that are the server's own, with a value, and without.
const OWN_FLAGS: [&str; 12] = [
    "--allowed-host",
    "--api-key-file",
    "--cache-dir",
    "--cors-origin",
    "--host",
    "--keep-alive",
    "--load-timeout",
    "--models-dir",
    "--models-memory",
    "--pin",
    "--port",
    "--served-model-name",
];
const OWN_SWITCH: &str = "--end-with-stdin";

/// The arguments of `tandem serve --models-dir DIR ..` that its models' processes get too; the program's name is none of them.
pub fn arguments_of_model(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = vec![];
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        let (flag, value) = text.split_once('=').map_or((&*text, None), |(flag, value)| (flag, Some(value)));
        if flag == OWN_SWITCH {
            continue;
        }
        if !OWN_FLAGS.contains(&flag) {
            kept.push(argument);
        } else if value.is_none() {
            arguments.next();
        }
    }
    kept
}

/// A key that nobody else on this machine knows.
fn random_key() -> std::io::Result<String> {
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A file that only this user reads.
fn key_file(key: &str) -> std::io::Result<tempfile::NamedTempFile> {
    use std::io::Write;
    let mut file = tempfile::Builder::new().prefix("tandem-key-").tempfile()?;
    file.write_all(key.as_bytes())?;
    Ok(file)
}

/// Reads ollama's form: `5m`, `1h30m`, `300ms`, seconds as a number, a negative one for ever, 0 not at all.
///
/// # Errors
/// It is none.
pub fn keep_alive(text: &str) -> Result<KeepAlive, String> {
    let expected = || format!("expected a time such as 5m, 90s or 1h30m, or -1 for ever, found {text:?}");
    let trimmed = text.trim();
    let (is_negative, rest) = trimmed.strip_prefix('-').map_or((false, trimmed), |rest| (true, rest));
    let mut seconds = 0.0;
    let mut left = rest;
    while !left.is_empty() {
        let digits = left.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(left.len());
        let number: f64 = left[..digits].parse().map_err(|_| expected())?;
        let after = &left[digits..];
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let unit = match &after[..end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            // A number alone is seconds.
            "" if left.len() == rest.len() => 1.0,
            _ => return Err(expected()),
        };
        seconds += number * unit;
        left = &after[end..];
    }
    if rest.is_empty() {
        return Err(expected());
    }
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !is_negative || time.is_zero() => Ok(KeepAlive::For(time)),
        _ => Ok(KeepAlive::Forever),
    }
}
