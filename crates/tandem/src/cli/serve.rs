//! `tandem serve`.

use std::path::PathBuf;

use clap::Args;
use tandem_serve::{KeepAlive, keep_alive};
use tandem_text::Dialect;

use super::drafts::DraftArgs;
use super::model::ModelArgs;
use super::values::{byte_count, chat_format, real, tokens, whole};

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) drafts: DraftArgs,
    /// Address to listen on; only this machine reaches the default.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, value_name = "N", default_value_t = 8000, value_parser = whole::<u16>(0, 65535))]
    pub(crate) port: u16,
    /// File with API keys, one a line; requests need one of them. Open to all who reach it if not given.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Answer /metrics without a key: endpoint pickers of Kubernetes cannot send one.
    #[arg(long, hide_short_help = true)]
    pub(crate) metrics_without_key: bool,
    /// Name of the model in requests and answers; may be given several times. The directory's name if not given.
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Vec<String>,
    /// Folder of models, each in a folder of its own (NAME or OWNER/NAME): they are loaded when requests name them.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["model", "served_model_name", "chat_template"], help_heading = "Several models")]
    pub(crate) models_dir: Option<PathBuf>,
    /// Memory of all models together, such as 300GB: idle ones leave for others. Nine tenths of what is free if not given.
    #[arg(long, value_name = "SIZE", value_parser = byte_count, conflicts_with = "model", help_heading = "Several models", hide_short_help = true)]
    pub(crate) models_memory: Option<u64>,
    /// Model that is loaded at the start and never leaves; may be given several times.
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "model",
        help_heading = "Several models",
        hide_short_help = true
    )]
    pub(crate) pin: Vec<String>,
    /// Time that an idle model stays, such as 5m or 1h30m; -1: until its memory is needed, 0: not at all.
    #[arg(long, value_name = "TIME", default_value = "-1", value_parser = keep_alive, help_heading = "Several models", hide_short_help = true)]
    pub(crate) keep_alive: KeepAlive,
    /// Seconds that a request waits for its model; 0 does not wait. The header x-tandem-load-timeout says it for one.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = whole::<u64>(0, 604800), help_heading = "Several models", hide_short_help = true)]
    pub(crate) load_timeout: u64,
    /// Chat template to use instead of the model's.
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// How prompts are made and answers written, if not as the checkpoint says.
    #[arg(long, value_name = "NAME", value_parser = chat_format())]
    pub(crate) chat_format: Option<Dialect>,
    /// Answers written at the same time, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = whole::<usize>(1, 64))]
    pub(crate) max_batch: usize,
    /// Requests that may wait beside those; more are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = whole::<usize>(0, 1048576), hide_short_help = true)]
    pub(crate) max_queue: usize,
    /// Time a step may spend on prompts while answers are written, as a multiple of what the answers take.
    #[arg(long, value_name = "R", default_value_t = 2.0, value_parser = real::<f64>(0.0, 1000.0), hide_short_help = true)]
    pub(crate) prefill_share: f64,
    /// Milliseconds between the tokens of an answer to keep to: as many answers are written at once as this allows, at
    /// least one, and the others wait longer for their first token. No limit if not given.
    #[arg(long, value_name = "MS", value_parser = real::<f64>(0.001, 3.6e6), hide_short_help = true)]
    pub(crate) inter_token_ms: Option<f64>,
    /// Tokens that the cache holds for all requests together; four contexts if not given.
    #[arg(long, value_name = "N", value_parser = tokens(0, 268435456))]
    pub(crate) cache_tokens: Option<usize>,
    /// Directory that keeps cache pages, so that a restart need not run old prompts again.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// Gigabytes in --cache-dir at most; the oldest pages go.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = whole::<u64>(1, 1048576), hide_short_help = true)]
    pub(crate) cache_dir_gb: u64,
    /// Seconds after which an answer that is not complete is given up.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = whole::<u64>(1, 31536000), hide_short_help = true)]
    pub(crate) request_timeout: u64,
    /// Seconds that a stopping server waits for the answers in flight.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = whole::<u64>(0, 604800), hide_short_help = true)]
    pub(crate) drain_timeout: u64,
    /// Megabytes of the largest request; those being read together have 64 at most.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = whole::<usize>(1, 4096), hide_short_help = true)]
    pub(crate) max_body_mb: usize,
    /// Web page origin that may use the server from a browser, or * for any; may be given several times.
    #[arg(long, value_name = "ORIGIN", hide_short_help = true)]
    pub(crate) cors_origin: Vec<String>,
    /// Name that the server goes by besides localhost, or * for any; may be given several times. While it listens on this
    /// machine only, requests for other names are refused: they are those of web pages.
    #[arg(long, value_name = "NAME", hide_short_help = true)]
    pub(crate) allowed_host: Vec<String>,
    /// Log prompts (with -v); they are not logged otherwise.
    #[arg(long)]
    pub(crate) log_text: bool,
    /// End with standard input, which is a pipe from the process that started this one.
    #[arg(long, hide = true)]
    pub(crate) end_with_stdin: bool,
    /// The memory's bandwidth, bytes per second, as the process that started this one measured it.
    #[arg(long, hide = true)]
    pub(crate) measured_bandwidth: Option<f64>,
}
