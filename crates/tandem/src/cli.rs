//! Commands and flags.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tandem_convert::ConvertOptions;
use tandem_cpu::Isa;
use tandem_engine::SamplingOverrides;
use tandem_model::Recipe;
use tandem_runtime::conversation::ConversationOptions;
use tandem_runtime::measured::MeasuredOptions;
use tandem_runtime::options::{Activations, BackendChoice, ShapeOptions, TransportKind};
use tandem_runtime::{DeviceOptions, ModelOptions, ParallelOptions};

/// Runs very large mixture-of-experts language models from low-bit checkpoints, at the speed of the memory they sit in.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, max_term_width = 100, after_long_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Say more on stderr (-v, -vv, -vvv); without it RUST_LOG counts, such as tandem_serve=debug.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Form of the log on stderr.
    #[arg(long, global = true, value_enum, value_name = "FORM", default_value_t = LogFormat::Text, hide_short_help = true)]
    pub(crate) log_format: LogFormat,
    /// Where `tandem launch` sends its orders.
    #[arg(long, global = true, hide = true, value_name = "FD")]
    pub(crate) launch_fd: Option<u32>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Ends the long help of commands.
const EXIT_CODES: &str = "\
Exit codes:
  0    done, or the reader of standard output has left
  1    an error: something is not found, malformed, does not fit or cannot be written; one line on stderr says what
  2    the command line is wrong
  130  Ctrl-C ended it";

const RUN_EXAMPLES: &str = "\
Examples:
  tandem run \"Tell me a story\"                        one answer from the bundled model
  tandem run --model OWNER/NAME --context 8k           a chat
  git diff | tandem run \"Review this\" --json | jq -r .text";

const SERVE_EXAMPLES: &str = "\
Examples:
  tandem serve --port 8000
  tandem serve --model OWNER/NAME --context 32k --max-batch 32 --api-key-file keys.txt
  tandem serve --log-format json 2>> serve.log";

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer a prompt, or chat when there is none.
    #[command(after_help = RUN_EXAMPLES, after_long_help = [RUN_EXAMPLES, EXIT_CODES].join("\n\n"))]
    Run(RunArgs),
    /// Say what a checkpoint is: architecture, sizes, quantisation, bytes read per token.
    Inspect(InspectArgs),
    /// Measure a model's outputs.
    Eval(EvalArgs),
    /// Measure speed against what this machine's memory allows.
    Bench(BenchArgs),
    /// Serve the model over HTTP: OpenAI's and Anthropic's interfaces, and a chat page.
    #[command(after_help = SERVE_EXAMPLES, after_long_help = [SERVE_EXAMPLES, EXIT_CODES].join("\n\n"))]
    Serve(ServeArgs),
    /// Run a command on several machines, or as several processes of this one.
    Launch(LaunchArgs),
    /// Write a checkpoint in other formats, in MLX's layout.
    Convert(ConvertArgs),
    /// Get a model from Hugging Face into the local cache.
    Pull(PullArgs),
    /// List the devices that models can run on, with their memory, limits and features.
    Devices(DevicesArgs),
    /// Print the completions of a shell: tandem completions bash > ~/.local/share/bash-completion/completions/tandem
    Completions(CompletionsArgs),
    /// Write man pages, one a command.
    #[command(hide = true)]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Folder that gets the pages.
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Hugging Face id, owner/name. HF_TOKEN, or the token of `hf auth login`, is sent along; HF_ENDPOINT names another
    /// server; HF_HUB_CACHE or HF_HOME another cache.
    pub(crate) repo: String,
    /// Branch, tag or commit.
    #[arg(long, value_name = "NAME", default_value = "main")]
    pub(crate) revision: String,
    /// Get files of this name too, * standing for anything, such as *.gguf; may be given several times. Weights
    /// (safetensors), JSON, tokenizers and chat templates are got in any case, pickles in none.
    #[arg(long, value_name = "GLOB")]
    pub(crate) include: Vec<String>,
    /// Get the configuration, the index and the tokenizer only, for `inspect` and `bench --load-format dummy`.
    #[arg(long)]
    pub(crate) metadata: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Address to listen on; only this machine reaches the default.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, value_name = "N", default_value_t = 8000)]
    pub(crate) port: u16,
    /// File with API keys, one a line; requests need one of them. Open to all who reach it if not given.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Name of the model in requests and answers; may be given several times. The directory's name if not given.
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Vec<String>,
    /// Chat template to use instead of the model's.
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
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
}

/// Which model, and how it runs.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Model directory, or a Hugging Face id (owner/name). The bundled fable-30m if not given.
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Get a model that is not here from Hugging Face without asking.
    #[arg(long)]
    pub(crate) yes: bool,
    /// Tokens of context, such as 8k; the model's own limit, at most 32768, if not given.
    #[arg(long, alias = "max-context", value_name = "N", value_parser = tokens(0, 268435456))]
    pub(crate) context: Option<usize>,
    /// Threads; one per core if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1024), help_heading = "Hardware")]
    pub(crate) threads: Option<usize>,
    /// Pin the weights in memory, so that the system cannot take it back.
    #[arg(long, help_heading = "Hardware", hide_short_help = true)]
    pub(crate) lock: bool,
    /// Tokens of prompt run at once.
    #[arg(long, value_name = "N", default_value = "256", value_parser = tokens(1, 65536), help_heading = "Hardware", hide_short_help = true)]
    pub(crate) prefill_chunk: usize,
    /// Numerics of the activations that meet quantised weights.
    #[arg(long, value_enum, default_value_t = ActivationsArg::Auto, help_heading = "Hardware", hide_short_help = true)]
    pub(crate) activations: ActivationsArg,
    /// Device to run on.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto, help_heading = "Hardware")]
    pub(crate) backend: BackendArg,
    /// The GPU for --backend wgpu: its number in `tandem devices`, or a part of its name; the first one if not given.
    #[arg(long, value_name = "N|NAME", help_heading = "Hardware", hide_short_help = true)]
    pub(crate) device: Option<String>,
    /// Layers whose experts stay in the host's memory and are computed by its processor, for a model that does not fit the
    /// GPU; as few as let it fit if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(0, 4096), help_heading = "Hardware", hide_short_help = true)]
    pub(crate) n_cpu_moe: Option<usize>,
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActivationsArg {
    /// Single precision: the reference.
    F32,
    /// At least as precise as bfloat16; 16-bit integers per group of 32 where these are faster.
    Bf16,
    /// 8-bit integers per group of 32.
    Int8,
    /// The best for this processor.
    Auto,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU (Ampere or later).
    Cuda,
    /// Any GPU, through Vulkan or Metal; `tandem devices` lists them.
    Wgpu,
    /// The best device found.
    Auto,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The prompt; a pipe on standard input joins it, or is the prompt. A chat without either.
    pub(crate) prompt: Option<String>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// System message.
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    pub(crate) system: Option<String>,
    /// Pass the prompt to the model as it stands, without the chat template.
    #[arg(long, help_heading = "Prompt")]
    pub(crate) raw: bool,
    /// Chat template to use instead of the model's.
    #[arg(long, value_name = "FILE", help_heading = "Prompt")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Reasoning before the answer, for templates that know `enable_thinking`.
    #[arg(long, value_enum, help_heading = "Prompt")]
    pub(crate) thinking: Option<OnOff>,
    /// JSON file with an array of tools (OpenAI's form) that the model may call.
    #[arg(long, value_name = "FILE", help_heading = "Prompt")]
    pub(crate) tools: Option<PathBuf>,
    /// Tokens to generate at most.
    #[arg(long, value_name = "N", value_parser = tokens(0, 268435456), help_heading = "Output")]
    pub(crate) max_tokens: Option<usize>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Text that ends the answer; may be given several times.
    #[arg(long, value_name = "TEXT", help_heading = "Output")]
    pub(crate) stop: Vec<String>,
    /// Keep generating after an end-of-text token.
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub(crate) ignore_eos: bool,
    /// Print one JSON object with text, reasoning, tool calls, tokens and statistics instead of streaming.
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnOff {
    On,
    Off,
}

/// Defaults come from the model's generation_config.json.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// 0 picks the likeliest token. The model's generation_config.json has the defaults of these.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Consider the K likeliest tokens only.
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Consider the likeliest tokens that add up to P.
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Consider tokens at least P times as likely as the likeliest.
    #[arg(long, value_name = "P", hide_short_help = true)]
    pub(crate) min_p: Option<f32>,
    /// Make tokens that occurred less likely (1 does nothing).
    #[arg(long, value_name = "R", hide_short_help = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Same seed, same text.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Model directory, or a Hugging Face id, of which only the metadata is got. The bundled fable-30m if not given.
    #[arg(value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    #[command(subcommand)]
    pub(crate) command: EvalCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Write the logits of every position to a safetensors file.
    Logits(LogitsArgs),
    /// Perplexity of a text.
    Perplexity(PerplexityArgs),
    /// What model B's outputs lose against model A's: perplexities, KL divergence, agreement.
    Compare(CompareArgs),
    /// Score generated or chosen answers against expected ones, with standard errors.
    Tasks(TasksArgs),
}

#[derive(Debug, Args)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// JSON array of token ids.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) tokens: PathBuf,
    /// Gets tensor `logits`, f32 [n_tokens, vocab].
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,
    /// Run token by token from this position on.
    #[arg(long, value_name = "K", value_parser = whole::<usize>(0, 268435456))]
    pub(crate) decode_from: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// A text, or JSON with strings (in arrays or objects), each a document of its own.
    ///
    /// A text is cut into windows of --context inputs (512 if not given), each scored from an empty cache; every token
    /// but the very first is predicted once.
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The model to compare with: directory or Hugging Face id in the local cache.
    pub(crate) a: String,
    /// The model that is judged.
    pub(crate) b: String,
    /// A text (cut into windows of --context inputs), or JSON with strings, each a document of its own.
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Also take one kind of matrix at a time from B and the rest from A, and rank what hurts.
    #[arg(long)]
    pub(crate) per_module: bool,
    /// Inputs per window of a text; 512 if not given.
    #[arg(long, value_name = "N", value_parser = tokens(0, 268435456))]
    pub(crate) context: Option<usize>,
    /// Threads; one per core if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1024))]
    pub(crate) threads: Option<usize>,
    /// Numerics of the activations that meet quantised weights.
    #[arg(long, value_enum, default_value_t = ActivationsArg::F32)]
    pub(crate) activations: ActivationsArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TasksArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// JSON lines. {kind, prompt, expect}: the greedy answer, after any reasoning, must equal `expect`.
    /// {question, choices, answer}, perhaps with a kind: the likeliest choice must be the answer, which is its number from
    /// 0 or its text; scored by log-likelihood as it is and per byte. Choices follow the question as they are: begin them
    /// with a space where one belongs.
    #[arg(long, value_name = "FILE.jsonl")]
    pub(crate) tasks: PathBuf,
    /// Tokens per answer at most.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = whole::<usize>(0, 268435456))]
    pub(crate) max_tokens: usize,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Token-by-token decoding: ms per token, bytes read, fraction of the memory's bandwidth.
    Decode(BenchDecodeArgs),
    /// Prompt processing: tokens per second, GFLOP/s.
    Prefill(BenchPrefillArgs),
    /// Load for an OpenAI-compatible server: time to the first token, between tokens, tokens per second.
    Serve(BenchServeArgs),
    /// Collectives between ranks: latency and bandwidth by size, next to a raw socket's.
    Comm(BenchCommArgs),
    /// What limits decoding: formats, one rank and several, transports and sums compared in one table, on random weights.
    Matrix(BenchMatrixArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BenchMatrixArgs {
    /// Model directory or Hugging Face id whose shapes are used. The bundled fable-30m's if not given.
    #[arg(long, value_name = "DIR|ID", conflicts_with = "config")]
    pub(crate) model: Option<String>,
    /// Shapes of glm-5.1, deepseek-v3.2, llama-3.2-3b or a config.json.
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) config: Option<String>,
    /// Layers; with it, half of them are measured too.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096))]
    pub(crate) num_layers: Option<usize>,
    /// Leading layers without experts.
    #[arg(long, value_name = "K", value_parser = whole::<usize>(0, 4096))]
    pub(crate) first_dense: Option<usize>,
    /// Vocabulary size.
    #[arg(long, value_name = "V", value_parser = whole::<usize>(1, 16777216))]
    pub(crate) vocab: Option<usize>,
    /// Ranks on this machine to compare with one.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = whole::<usize>(1, 4096))]
    pub(crate) ranks: usize,
    /// Threads of one rank; several share them. One per core if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1024))]
    pub(crate) threads: Option<usize>,
    /// Tokens in the cache before each step.
    #[arg(long, value_name = "N", default_value = "512", value_parser = token_count)]
    pub(crate) context: usize,
    /// Steps measured for each row.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = whole::<usize>(1, 1048576))]
    pub(crate) steps: usize,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchServeArgs {
    /// The server, without /v1 (http only).
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Name of the model; the first of /v1/models if not given.
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Key to send.
    #[arg(long, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = whole::<usize>(1, 16777216))]
    pub(crate) requests: usize,
    /// Requests open at the same time.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = whole::<usize>(1, 65536))]
    pub(crate) concurrency: usize,
    /// Start this many requests a second, however many are open.
    #[arg(long, value_name = "R", conflicts_with = "concurrency", value_parser = real::<f64>(0.001, 1e6))]
    pub(crate) request_rate: Option<f64>,
    /// Random words of each prompt.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = whole::<usize>(0, 1048576))]
    pub(crate) prompt_words: usize,
    /// Words before them that all prompts share.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole::<usize>(0, 1048576))]
    pub(crate) shared_prefix: usize,
    /// Tokens of each answer; servers that know ignore_eos write exactly as many.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = whole::<usize>(0, 268435456))]
    pub(crate) max_tokens: usize,
    /// Use /v1/chat/completions instead of /v1/completions.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Seed of the prompts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is measured, and how.
#[derive(Debug, Args)]
pub(crate) struct BenchModelArgs {
    /// Model directory, or a Hugging Face id that is in the local cache. The bundled fable-30m if not given.
    #[arg(long, value_name = "DIR|ID", conflicts_with = "config")]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) shapes: ShapeArgs,
    /// Formats of random weights: mxfp4-q8, mxfp4, mxfp8, nvfp4, affine4, affine8:g32, bf16, ...
    #[arg(long, value_name = "FORMATS", default_value = "mxfp4-q8", value_parser = Recipe::parse)]
    pub(crate) quant: Recipe,
    /// Threads; one per core if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1024))]
    pub(crate) threads: Option<usize>,
    /// Kernels of the processor: scalar, avx2, avx512, amx or neon; the best that it has if not given.
    #[arg(long, value_name = "ISA")]
    pub(crate) isa: Option<Isa>,
    /// Pin the weights in memory, so that the system cannot take it back.
    #[arg(long)]
    pub(crate) lock: bool,
    /// Numerics of the activations that meet quantised weights.
    #[arg(long, value_enum, default_value_t = ActivationsArg::Auto)]
    pub(crate) activations: ActivationsArg,
    /// Device to run on.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    /// The GPU for --backend wgpu: its number in `tandem devices`, or a part of its name; the first one if not given.
    #[arg(long, value_name = "N|NAME")]
    pub(crate) device: Option<String>,
    /// Layers whose experts stay in the host's memory; as few as let the model fit the GPU if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(0, 4096))]
    pub(crate) n_cpu_moe: Option<usize>,
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
    /// Tensor-parallel ranks sum in each Nth layer only, to see what the sums cost; the output means nothing then.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Several ranks", value_parser = whole::<usize>(1, 1048576))]
    pub(crate) sync_every: usize,
    /// Draw the result.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A model without a checkpoint.
#[derive(Debug, Args)]
pub(crate) struct ShapeArgs {
    /// Shapes of a model without a checkpoint: glm-5.1, deepseek-v3.2, llama-3.2-3b or a config.json.
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) config: Option<String>,
    /// Read weights from the checkpoint, or make random ones.
    #[arg(long, value_enum, default_value_t = LoadFormatArg::Checkpoint)]
    pub(crate) load_format: LoadFormatArg,
    /// Layers, with random weights.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096))]
    pub(crate) num_layers: Option<usize>,
    /// Leading layers without experts, with random weights.
    #[arg(long, value_name = "K", value_parser = whole::<usize>(0, 4096))]
    pub(crate) first_dense: Option<usize>,
    /// Vocabulary size, with random weights.
    #[arg(long, value_name = "V", value_parser = whole::<usize>(1, 16777216))]
    pub(crate) vocab: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadFormatArg {
    /// The weights of the checkpoint.
    Checkpoint,
    /// Random weights of true shapes and formats.
    Dummy,
}

#[derive(Debug, Args)]
pub(crate) struct BenchDecodeArgs {
    #[command(flatten)]
    pub(crate) model: BenchModelArgs,
    /// Tokens in the cache before each step (random vectors).
    #[arg(long, value_name = "N", default_value = "512", value_parser = token_count)]
    pub(crate) context: usize,
    /// Measure at several contexts, e.g. 1k,8k,32k,128k.
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', value_parser = token_count, conflicts_with = "context")]
    pub(crate) sweep_context: Vec<usize>,
    /// Sequences that decode together.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole::<usize>(1, 65536))]
    pub(crate) batch: usize,
    /// Steps measured.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = whole::<usize>(1, 1048576))]
    pub(crate) steps: usize,
    /// Steps before that.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = whole::<usize>(0, 1048576))]
    pub(crate) warmup: usize,
}

#[derive(Debug, Args)]
pub(crate) struct BenchPrefillArgs {
    #[command(flatten)]
    pub(crate) model: BenchModelArgs,
    /// Tokens in the cache before the prompt (random vectors).
    #[arg(long, value_name = "N", default_value = "0", value_parser = token_count)]
    pub(crate) context: usize,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value = "512", value_parser = token_count)]
    pub(crate) prompt_tokens: usize,
    /// Tokens run at once.
    #[arg(long, value_name = "N", default_value = "256", value_parser = token_count)]
    pub(crate) prefill_chunk: usize,
    /// Prompts measured.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = whole::<usize>(1, 1048576))]
    pub(crate) steps: usize,
    /// Prompts before that.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole::<usize>(0, 1048576))]
    pub(crate) warmup: usize,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Model directory (Hugging Face or MLX), GGUF file, or a Hugging Face id that is in the local cache.
    #[arg(value_name = "SRC", required_unless_present = "config", conflicts_with = "config")]
    pub(crate) source: Option<String>,
    /// Gets the new checkpoint; must not exist. Until it is complete, work is in DIR.partial: the same command goes on
    /// where an interrupted one stopped.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub(crate) out: Option<PathBuf>,
    /// mxfp4-q8 (routed experts mxfp4, the rest affine 8-bit), or one format for all: mxfp4, mxfp8, nvfp4, affine2, 3, 4,
    /// 5, 6, 8 (groups of 64; :g32, :g128), bf16, keep; or mixed-4.8 (affine, 3 to 8 bits for each kind of module, 4.8 a
    /// weight in all), or mixed:FILE, a TOML file of patterns and formats.
    ///
    /// mixed-4.8 runs the source once for each kind of module, and prints the rules that it chose.
    /// Router gates, norms and biases are left alone. FILE: `default = "affine8"`, then under `[rules]` lines such as
    /// `"model.layers.*.mlp.switch_mlp.*" = "mxfp4"`, of which the first that matches a module counts.
    #[arg(long, value_name = "FORMATS", default_value = "mxfp4-q8")]
    pub(crate) quant: String,
    #[command(flatten)]
    pub(crate) shapes: ShapeArgs,
    /// Look for scales and codes with less error than those of mlx, at the same size.
    ///
    /// The source first writes some text of its own (where its weights do not fit in memory, it reads random tokens): errors
    /// then count by what goes into each matrix, and codes make up for the errors of those before them (GPTQ).
    #[arg(long)]
    pub(crate) search: bool,
    /// A text, or JSON with strings, that the source reads instead of text of its own. Implies --search.
    #[arg(long, value_name = "FILE")]
    pub(crate) calibrate: Option<PathBuf>,
    /// Take the tokenizer (and its chat template) of this model directory instead of the GGUF file's own.
    #[arg(long, value_name = "DIR")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Size of one output file, at most, unless a single weight is larger.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = byte_count)]
    pub(crate) max_shard_size: u64,
    /// Threads; one per core if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1024))]
    pub(crate) threads: Option<usize>,
    /// Print what would be written: formats, sizes, bytes read per token.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A whole number within a range, which a refusal names.
fn whole<T: TryFrom<u64>>(low: u64, high: u64) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse::<u64>().ok().filter(|number| (low..=high).contains(number));
        let number = number.and_then(|number| T::try_from(number).ok());
        number.ok_or_else(|| format!("expected a whole number from {low} to {high}"))
    }
}

/// A number of tokens within a range: `4096`, `4k` (4096) or `1m`.
fn tokens(low: usize, high: usize) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = token_count(text).ok().filter(|number| (low..=high).contains(number));
        number.ok_or_else(|| format!("expected a whole number from {low} to {high}, or one such as 8k"))
    }
}

/// A number within a range, which a refusal names.
fn real<T: FromStr + Into<f64> + Copy>(
    low: f64,
    high: f64,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        // NaN is in no range.
        let number = text.parse::<T>().ok().filter(|number| (low..=high).contains(&(*number).into()));
        number.ok_or_else(|| format!("expected a number from {low} to {high}"))
    }
}

/// Tokens in a cache, and bytes of a message.
const MOST_TOKENS: usize = 1 << 28;

/// `5GB`, `300MB` or a number of bytes.
fn byte_count(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let units = [("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1000), ("B", 1), ("", 1)];
    let (digits, factor) = units.iter().find_map(|(unit, n)| Some((upper.strip_suffix(unit)?, *n))).unwrap_or(("", 1));
    digits
        .trim()
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|n| (1..=1 << 50).contains(n))
        .ok_or_else(|| format!("expected a size such as 5GB or 300MB, from 1 B to {} GB", (1u64 << 50) / 1_000_000_000))
}

/// `4096`, `4k` (4096) or `1m`.
fn token_count(text: &str) -> Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    let (digits, factor) = match lower.strip_suffix('k') {
        Some(digits) => (digits, 1 << 10),
        None => lower.strip_suffix('m').map_or((lower.as_str(), 1), |digits| (digits, 1 << 20)),
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|n| *n <= MOST_TOKENS)
        .ok_or_else(|| format!("expected a number of tokens such as 512 or 8k, from 0 to {MOST_TOKENS}"))
}

/// How a model is divided among ranks.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Several ranks")]
pub(crate) struct ParallelArgs {
    /// Ranks; on this machine, unless `tandem launch` has a hostfile.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096))]
    pub(crate) ranks: Option<usize>,
    /// Pipeline stages: each rank holds some layers.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096), hide_short_help = true)]
    pub(crate) pp: Option<usize>,
    /// Tensor parallelism: each rank holds a slice of every head group and MLP.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096), hide_short_help = true)]
    pub(crate) tp: Option<usize>,
    /// Expert parallelism: each rank holds some of the experts.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096), hide_short_help = true)]
    pub(crate) ep: Option<usize>,
    /// Let measured bandwidth and memory choose; the default when none of --pp, --tp, --ep is given.
    #[arg(long, value_enum, conflicts_with_all = ["pp", "tp", "ep"], hide_short_help = true)]
    pub(crate) plan: Option<PlanArg>,
    /// How ranks talk to each other.
    #[arg(long, value_enum, default_value_t = TransportArg::Auto, hide_short_help = true)]
    pub(crate) transport: TransportArg,
    /// Seconds after which a rank that does not answer is taken for dead (10 if not given).
    #[arg(long, value_name = "SECONDS", hide_short_help = true)]
    pub(crate) deadline: Option<f64>,
    /// Send sums of tensor-parallel ranks as bf16: half the traffic, less exact.
    #[arg(long, hide_short_help = true)]
    pub(crate) wire_bf16: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlanArg {
    /// The fastest division that fits.
    #[default]
    Auto,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportArg {
    /// TCP.
    #[default]
    Auto,
    /// Threads of one process.
    Local,
    /// Built in; nothing to install.
    #[value(alias = "ring")]
    Tcp,
    /// An installed Open MPI or MPICH.
    Mpi,
    /// TCP, and a GPU of this host for each rank: their sums are made on the devices.
    Nccl,
}

impl From<&ParallelArgs> for ParallelOptions {
    fn from(args: &ParallelArgs) -> ParallelOptions {
        ParallelOptions {
            ranks: args.ranks,
            pp: args.pp,
            tp: args.tp,
            ep: args.ep,
            transport: args.transport.into(),
            deadline: args.deadline,
            wire_bf16: args.wire_bf16,
        }
    }
}

impl From<TransportArg> for TransportKind {
    fn from(arg: TransportArg) -> TransportKind {
        match arg {
            TransportArg::Auto => TransportKind::Auto,
            TransportArg::Local => TransportKind::Local,
            TransportArg::Tcp => TransportKind::Tcp,
            TransportArg::Mpi => TransportKind::Mpi,
            TransportArg::Nccl => TransportKind::Nccl,
        }
    }
}

impl From<BackendArg> for BackendChoice {
    fn from(arg: BackendArg) -> BackendChoice {
        match arg {
            BackendArg::Cpu => BackendChoice::Cpu,
            BackendArg::Cuda => BackendChoice::Cuda,
            BackendArg::Wgpu => BackendChoice::Wgpu,
            BackendArg::Auto => BackendChoice::Auto,
        }
    }
}

impl From<ActivationsArg> for Activations {
    fn from(arg: ActivationsArg) -> Activations {
        match arg {
            ActivationsArg::F32 => Activations::F32,
            ActivationsArg::Bf16 => Activations::Bf16,
            ActivationsArg::Int8 => Activations::Int8,
            ActivationsArg::Auto => Activations::Auto,
        }
    }
}

impl From<&ModelArgs> for ModelOptions {
    fn from(args: &ModelArgs) -> ModelOptions {
        ModelOptions {
            model: args.model.clone(),
            context: args.context,
            prefill_chunk: args.prefill_chunk,
            lock: args.lock,
            device: DeviceOptions {
                backend: args.backend.into(),
                device: args.device.clone(),
                activations: args.activations.into(),
                threads: args.threads,
                isa: None,
                n_cpu_moe: args.n_cpu_moe,
            },
            parallel: (&args.parallel).into(),
        }
    }
}

impl From<&BenchModelArgs> for MeasuredOptions {
    fn from(args: &BenchModelArgs) -> MeasuredOptions {
        MeasuredOptions {
            model: args.model.clone(),
            shapes: (&args.shapes).into(),
            quant: args.quant.clone(),
            lock: args.lock,
            device: DeviceOptions {
                backend: args.backend.into(),
                device: args.device.clone(),
                activations: args.activations.into(),
                threads: args.threads,
                isa: args.isa,
                n_cpu_moe: args.n_cpu_moe,
            },
            parallel: (&args.parallel).into(),
            sync_every: args.sync_every,
        }
    }
}

impl From<&ConvertArgs> for ConvertOptions {
    fn from(args: &ConvertArgs) -> ConvertOptions {
        ConvertOptions {
            source: args.source.clone(),
            shapes: (&args.shapes).into(),
            quant: args.quant.clone(),
            search: args.search,
            calibrate: args.calibrate.clone(),
            tokenizer: args.tokenizer.clone(),
            max_shard_size: args.max_shard_size,
            threads: args.threads,
        }
    }
}

impl From<&RunArgs> for ConversationOptions {
    fn from(args: &RunArgs) -> ConversationOptions {
        let flags = &args.sampling;
        ConversationOptions {
            system: args.system.clone(),
            raw: args.raw,
            chat_template: args.chat_template.clone(),
            thinking: args.thinking.map(|thinking| thinking == OnOff::On),
            tools: args.tools.clone(),
            max_tokens: args.max_tokens,
            sampling: SamplingOverrides {
                temperature: flags.temperature,
                top_k: flags.top_k,
                top_p: flags.top_p,
                min_p: flags.min_p,
                repetition_penalty: flags.repetition_penalty,
                seed: flags.seed,
                ..SamplingOverrides::default()
            },
            stop: args.stop.clone(),
            ignore_eos: args.ignore_eos,
        }
    }
}

impl From<&ShapeArgs> for ShapeOptions {
    fn from(args: &ShapeArgs) -> ShapeOptions {
        ShapeOptions {
            config: args.config.clone(),
            dummy: args.load_format == LoadFormatArg::Dummy,
            num_layers: args.num_layers,
            first_dense: args.first_dense,
            vocab: args.vocab,
        }
    }
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LaunchArgs {
    /// Hosts as mlx.launch has them: [{"ssh": "name", "ips": ["10.0.0.1"]}, ...]. "localhost" starts a process here.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) hostfile: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
    /// The same as --transport, as mlx.launch spells it: ring is tcp.
    #[arg(long, value_enum, value_name = "TRANSPORT", conflicts_with = "transport", hide = true)]
    pub(crate) backend: Option<TransportArg>,
    /// Start all ranks again after a failure, at most N times.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole::<u32>(0, 1048576))]
    pub(crate) restart: u32,
    /// Rank r listens on this port plus r; any free port if 0.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub(crate) starting_port: u16,
    /// Seconds for all ranks to start and meet.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = real::<f64>(0.1, 86400.0))]
    pub(crate) start_timeout: f64,
    /// This program on the other hosts; the same path as here if not given.
    #[arg(long, value_name = "PATH")]
    pub(crate) remote_binary: Option<PathBuf>,
    /// The model's directory on the other hosts; as in the command if not given.
    #[arg(long, value_name = "DIR")]
    pub(crate) remote_model: Option<String>,
    /// Option for ssh, as after its -o; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) ssh_option: Vec<String>,
    /// MPI's launcher.
    #[arg(long, value_name = "PROGRAM", default_value = "mpirun")]
    pub(crate) mpirun: PathBuf,
    /// The command: run, eval, bench ... with its flags.
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

impl LaunchArgs {
    /// `--ranks N` of a command, without a launch.
    pub(crate) fn short_form(command: Vec<String>) -> LaunchArgs {
        LaunchArgs {
            hostfile: None,
            parallel: ParallelArgs::default(),
            backend: None,
            restart: 0,
            starting_port: 0,
            start_timeout: 60.0,
            remote_binary: None,
            remote_model: None,
            ssh_option: vec![],
            mpirun: PathBuf::new(),
            command,
        }
    }

    /// The flags, --backend counted in.
    pub(crate) fn parallel(&self) -> ParallelOptions {
        let transport = self.backend.unwrap_or(self.parallel.transport).into();
        ParallelOptions { transport, ..(&self.parallel).into() }
    }
}

impl Command {
    /// The model's flags, of commands that can run on several ranks.
    pub(crate) fn model_args(&self) -> Option<&ModelArgs> {
        match self {
            Command::Run(args) => Some(&args.model),
            Command::Serve(args) => Some(&args.model),
            Command::Eval(args) => match &args.command {
                EvalCommand::Logits(args) => Some(&args.model),
                EvalCommand::Perplexity(args) => Some(&args.model),
                EvalCommand::Tasks(args) => Some(&args.model),
                EvalCommand::Compare(_) => None,
            },
            Command::Inspect(_)
            | Command::Bench(_)
            | Command::Launch(_)
            | Command::Convert(_)
            | Command::Pull(_)
            | Command::Devices(_)
            | Command::Completions(_)
            | Command::Man(_) => None,
        }
    }

    /// What `bench decode` and `bench prefill` measure.
    pub(crate) fn bench_model_args(&self) -> Option<&BenchModelArgs> {
        match self {
            Command::Bench(BenchArgs { command: BenchCommand::Decode(args) }) => Some(&args.model),
            Command::Bench(BenchArgs { command: BenchCommand::Prefill(args) }) => Some(&args.model),
            _ => None,
        }
    }

    /// The model that the command names, and whether it may be got without asking.
    pub(crate) fn wanted_model(&self) -> Option<(&str, bool)> {
        self.model_args().and_then(|args| Some((args.model.as_deref()?, args.yes)))
    }

    /// How the command's ranks are arranged.
    pub(crate) fn parallel_args(&self) -> Option<&ParallelArgs> {
        match self {
            Command::Bench(BenchArgs { command: BenchCommand::Comm(args) }) => Some(&args.parallel),
            Command::Bench(_) => self.bench_model_args().map(|args| &args.parallel),
            command => command.model_args().map(|args| &args.parallel),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct BenchCommArgs {
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
    /// Largest payload in bytes.
    #[arg(long, value_name = "BYTES", default_value = "16m", value_parser = token_count)]
    pub(crate) max_bytes: usize,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use clap::{Arg, Command, CommandFactory};

    use super::*;

    /// Every flag of every command that takes a number, with the names of the commands before it.
    fn numeric_flags(command: &Command, path: &[String], found: &mut Vec<(Vec<String>, Arg)>) {
        let types = [
            std::any::TypeId::of::<usize>(),
            std::any::TypeId::of::<u64>(),
            std::any::TypeId::of::<u32>(),
            std::any::TypeId::of::<u16>(),
            std::any::TypeId::of::<f64>(),
            std::any::TypeId::of::<f32>(),
        ];
        for arg in command.get_arguments().filter(|arg| arg.get_long().is_some()) {
            if types.iter().any(|id| arg.get_value_parser().type_id() == *id) {
                found.push((path.to_vec(), arg.clone()));
            }
        }
        for inner in command.get_subcommands() {
            numeric_flags(inner, &[path, &[inner.get_name().to_string()]].concat(), found);
        }
    }

    #[test]
    fn every_numeric_flag_refuses_absurd_values_with_its_range() {
        let mut flags = vec![];
        numeric_flags(&Cli::command(), &["tandem".to_string()], &mut flags);
        assert!(flags.len() > 60, "{}", flags.len());
        // Any seed will do, ports are 16 bits, and the engine and the ranks check these with messages of their own.
        let others = [
            "seed",
            "port",
            "starting-port",
            "temperature",
            "top-k",
            "top-p",
            "min-p",
            "repetition-penalty",
            "deadline",
        ];
        for (path, arg) in flags {
            let name = arg.get_long().expect("long").to_string();
            if others.contains(&&*name) || arg.is_hide_set() {
                continue;
            }
            for value in ["99999999999999999999", "18446744073709551615", "1e300", "nan", "inf", "-1", "x", ""] {
                let given = format!("--{name}={value}");
                let error = Cli::try_parse_from(path.iter().chain([&given])).err().map(|error| error.to_string());
                let error = error.unwrap_or_default();
                let says = error.contains("expected a") && error.contains("from ") && error.contains(" to ");
                assert!(says && error.contains(&format!("--{name}")), "{path:?} {given}: {error}");
            }
        }
    }
}
