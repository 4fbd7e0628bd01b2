//! What the handlers need, made from a model and the server's options.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tandem_engine::{EngineError, GenerationConfig, check_vocabulary};
use tandem_text::{ChatTemplate, Dialect, Tokenizer, ends_of_turn};
use thiserror::Error;

use crate::body::{Admission, IN_FLIGHT};
use crate::browser::Access;
use crate::generation;
use crate::grammar::Grammars;
use crate::metrics::Metrics;
use crate::replay::Said;
use crate::store::Store;
use crate::worker::Worker;

/// What is served.
#[derive(Debug)]
pub struct Model {
    /// Names that requests may use, at least one; answers carry the first.
    pub names: Vec<String>,
    /// Family, as `model_type` of its config.json.
    pub model_type: String,
    /// Turns text into tokens.
    pub tokenizer: Tokenizer,
    /// Renders conversations; without it there are only completions of text.
    pub template: Option<ChatTemplate>,
    /// How the model writes tool calls.
    pub dialect: Dialect,
    /// Defaults for sampling, and the tokens that end an answer.
    pub defaults: GenerationConfig,
    /// Logits of a row.
    pub vocab_size: usize,
    /// Tokens of a sequence at most.
    pub context: usize,
    /// Arithmetic that it runs in, for the page.
    pub numerics: &'static str,
    /// Bytes per second that the weights can be read with, for metrics; 0 if not known.
    pub bandwidth: f64,
    /// Answers written at the same time, for the page.
    pub max_batch: usize,
}

/// How it is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// Keys of which a request needs one; none: open to all who reach it.
    pub api_keys: Vec<String>,
    /// Whether /metrics is answered without one of them, to schedulers that cannot send one.
    pub open_metrics: bool,
    /// Names besides localhost that requests may be for, `*` for any; `None` does not look at the name.
    pub allowed_hosts: Option<Vec<String>>,
    /// Origins of web pages that may use it besides its own, `*` for any.
    pub cors_origins: Vec<String>,
    /// Bytes of the largest request.
    pub max_body_bytes: usize,
    /// Bytes of all requests together that are being read.
    pub max_body_bytes_in_flight: usize,
    /// Directory that keeps answers of /v1/responses for the next start; in memory only if `None`.
    pub store_dir: Option<PathBuf>,
    /// Time after which an answer that is not complete is given up.
    pub request_timeout: Duration,
    /// Time without a finished step, while requests wait, after which /health says so.
    pub stall_timeout: Duration,
    /// Whether prompts are logged.
    pub log_text: bool,
    /// Gives freed memory back to the system; called some time after large requests.
    pub return_memory: fn(),
}

impl Default for Options {
    fn default() -> Options {
        Options {
            api_keys: vec![],
            open_metrics: false,
            allowed_hosts: Some(vec![]),
            cors_origins: vec![],
            max_body_bytes: 16 << 20,
            max_body_bytes_in_flight: IN_FLIGHT,
            store_dir: None,
            request_timeout: Duration::from_secs(3600),
            stall_timeout: Duration::from_secs(600),
            log_text: false,
            return_memory: || (),
        }
    }
}

impl Options {
    /// Checks what can be checked before a model is loaded.
    ///
    /// # Errors
    /// A name or an origin is not one.
    pub fn check(&self) -> Result<(), ServeError> {
        self.access().map(|_| ())
    }

    pub(crate) fn access(&self) -> Result<Access, ServeError> {
        Access::new(self.allowed_hosts.as_deref(), &self.cors_origins)
    }
}

/// Why nothing can be served.
#[derive(Debug, Error)]
pub enum ServeError {
    /// A value of [`Options::allowed_hosts`] is not a name.
    #[error("the allowed host {0:?} is not a name; give it without scheme, port and path, or * for any")]
    Host(String),
    /// A value of [`Options::cors_origins`] is not an origin.
    #[error("the origin {0:?} is not one; write it as in https://example.com:8443, without a path, or * for any")]
    Origin(String),
    /// The vocabulary is of no use for structured output.
    #[error("the vocabulary cannot be used for structured output: {0}")]
    Vocabulary(String),
    /// A file of keys cannot be read.
    #[error("cannot read --api-key-file {path}: {error}", path = .path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A file of keys has none.
    #[error("{path} holds no key; write one on a line of its own", path = .0.display())]
    NoKey(PathBuf),
    /// The model's files end turns with a token that it does not have.
    #[error("eos_token_id: {0}")]
    Ends(EngineError),
}

/// Everything that handlers need.
pub struct App {
    pub(crate) worker: Worker,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) dialect: Dialect,
    pub(crate) defaults: GenerationConfig,
    pub(crate) grammars: Grammars,
    pub(crate) metrics: Metrics,
    pub(crate) vocab_size: usize,
    /// Tokens per sequence.
    pub(crate) context: usize,
    /// Names that requests may use; the first is the one that answers carry.
    pub(crate) model_names: Vec<String>,
    /// Seconds since 1970 at the start.
    pub(crate) created: u64,
    /// Longest time of one request.
    pub(crate) timeout: Duration,
    /// Of one step.
    pub(crate) stall_timeout: Duration,
    /// SHA-256 of the keys, none if the server is open.
    pub(crate) keys: Vec<[u8; 32]>,
    /// Whether /metrics needs none of them.
    pub(crate) open_metrics: bool,
    /// Whether prompts and answers may be logged.
    pub(crate) log_text: bool,
    pub(crate) max_body_bytes: usize,
    pub(crate) access: Access,
    pub(crate) admission: Admission,
    pub(crate) store: Store,
    pub(crate) said: Said,
    /// Bytes of the vocabulary's longest token.
    pub(crate) longest_token: usize,
    /// Facts about the model, for the page.
    pub(crate) facts: Value,
}

impl App {
    /// Puts a running engine and its model behind the interfaces.
    ///
    /// # Errors
    /// An option is not usable, or the vocabulary is not.
    pub fn new(worker: Worker, model: Model, options: &Options) -> Result<Arc<App>, ServeError> {
        let Model { names, model_type, tokenizer, template, dialect, mut defaults, vocab_size, context, .. } = model;
        check_vocabulary(&defaults.eos_token_ids, vocab_size).map_err(ServeError::Ends)?;
        defaults.eos_token_ids = ends_of_turn(&defaults.eos_token_ids, &tokenizer, template.as_ref(), vocab_size);
        let sampling = defaults.apply(&tandem_engine::SamplingOverrides::default());
        let token_bytes = |id| tokenizer.token_bytes(id).map_or(0, |bytes| bytes.len());
        let longest_token = (0..vocab_size as u32).map(token_bytes).max().unwrap_or(1);
        let grammars = Grammars::new(&tokenizer, dialect, vocab_size, &defaults.eos_token_ids)
            .map_err(|error| ServeError::Vocabulary(error.to_string()))?;
        Ok(Arc::new(App {
            grammars,
            metrics: Metrics::new(names.first().map_or("", String::as_str), model.bandwidth),
            facts: json!({
                "model": names.first(), "model_type": model_type, "context": context, "numerics": model.numerics,
                "max_batch": model.max_batch, "version": env!("CARGO_PKG_VERSION"),
                "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p},
            }),
            said: Said::default(),
            worker,
            tokenizer,
            template,
            dialect,
            defaults,
            vocab_size,
            context,
            model_names: names,
            created: generation::now(),
            timeout: options.request_timeout,
            stall_timeout: options.stall_timeout,
            keys: options.api_keys.iter().map(|key| Sha256::digest(key.trim()).into()).collect(),
            open_metrics: options.open_metrics,
            log_text: options.log_text,
            max_body_bytes: options.max_body_bytes,
            access: options.access()?,
            admission: Admission::new(options.max_body_bytes_in_flight, options.return_memory),
            store: Store::new(options.store_dir.clone()),
            longest_token,
        }))
    }

    /// The engine.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Name of the model in answers.
    pub fn model_name(&self) -> &str {
        self.model_names.first().map_or("", String::as_str)
    }
}
