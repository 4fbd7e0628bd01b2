//! `tandem bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use tandem_cpu::Isa;
use tandem_load::{Arrivals, Goal, LoadOptions, Prompts, Ramp};
use tandem_model::Recipe;
use tandem_runtime::DeviceOptions;
use tandem_runtime::measured::MeasuredOptions;

use super::model::{ActivationsArg, BackendArg, ModelArgs};
use super::parallel::ParallelArgs;
use super::shapes::ShapeArgs;
use super::values::{real, token_count, tokens, whole};

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Token-by-token decoding: ms per token, bytes read, fraction of the memory's bandwidth.
    ///
    /// --context and --batch take several values, such as --context 512,4k: one row for each combination.
    Decode(BenchDecodeArgs),
    /// Prompt processing: tokens per second, GFLOP/s.
    ///
    /// --context, --prompt-tokens and --prefill-chunk take several values: one row for each combination.
    Prefill(BenchPrefillArgs),
    /// Load for an OpenAI-compatible server: time to the first token, between tokens, tokens per second.
    ///
    /// --concurrency, --request-rate, --prompt-words and --max-tokens take several values: one row for each combination.
    Serve(BenchServeArgs),
    /// Collectives between ranks: latency and bandwidth by size, next to a raw socket's.
    Comm(BenchCommArgs),
    /// What limits decoding: formats, one rank and several, transports and sums compared in one table, on random weights.
    Matrix(BenchMatrixArgs),
    /// What the timings that every run keeps cost: steps with and without them in turns.
    #[command(hide = true)]
    Timings(BenchTimingsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BenchTimingsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Pairs of runs of four steps each.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = whole::<usize>(10, 100_000))]
    pub(crate) pairs: usize,
}

#[derive(Debug, Args)]
pub(crate) struct BenchDecodeArgs {
    #[command(flatten)]
    pub(crate) model: BenchModelArgs,
    /// Tokens in the cache before each step (random vectors).
    #[arg(long, alias = "sweep-context", value_name = "N,..", value_delimiter = ',', default_value = "512", value_parser = token_count)]
    pub(crate) context: Vec<usize>,
    /// Sequences that decode together.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1", value_parser = whole::<usize>(1, 65536))]
    pub(crate) batch: Vec<usize>,
    /// Steps measured.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = whole::<usize>(1, 1048576))]
    pub(crate) steps: usize,
    /// Steps before that.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = whole::<usize>(0, 1048576))]
    pub(crate) warmup: usize,
    /// Measure steps that verify up to this many drafted tokens of each sequence too.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole::<usize>(0, 8))]
    pub(crate) draft_depth: usize,
    /// Shares of drafts that are right up to each position, e.g. 0.83,0.65,0.49, to say what tokens per second these steps
    /// would give.
    #[arg(long, value_name = "A,A,..", value_delimiter = ',', value_parser = real::<f64>(0.0, 1.0))]
    pub(crate) force_acceptance: Vec<f64>,
    /// Share of a row's experts that an earlier row of the same step also chose, about, where steps verify drafts: that share of
    /// rows repeats an earlier row's token. Rows choose independently if 0.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = real::<f64>(0.0, 1.0))]
    pub(crate) expert_overlap: f64,
}

#[derive(Debug, Args)]
pub(crate) struct BenchPrefillArgs {
    #[command(flatten)]
    pub(crate) model: BenchModelArgs,
    /// Tokens in the cache before the prompt (random vectors).
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "0", value_parser = token_count)]
    pub(crate) context: Vec<usize>,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "512", value_parser = tokens(1, 268435456))]
    pub(crate) prompt_tokens: Vec<usize>,
    /// Tokens run at once.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "256", value_parser = tokens(1, 65536))]
    pub(crate) prefill_chunk: Vec<usize>,
    /// Prompts measured.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = whole::<usize>(1, 1048576))]
    pub(crate) steps: usize,
    /// Prompts before that.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole::<usize>(0, 1048576))]
    pub(crate) warmup: usize,
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
    /// Write a page with a chart, which needs nothing else.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) report: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchServeArgs {
    /// The server, without /v1; http or https.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Name of the model; the first of /v1/models if not given.
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Key to send.
    #[arg(long, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
    /// Take any certificate of an https server.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Seconds to wait for a server that does not answer yet or still loads its model. If not given, 600 for one that
    /// loads, and none for one that does not answer.
    #[arg(long, value_name = "SECONDS", value_parser = whole::<u64>(0, 604800))]
    pub(crate) ready_check_timeout_sec: Option<u64>,
    /// Requests measured.
    #[arg(long, alias = "num-prompts", value_name = "N", default_value_t = 64, value_parser = whole::<usize>(1, 16777216))]
    pub(crate) requests: usize,
    /// Requests before them that are not measured.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole::<usize>(0, 1048576))]
    pub(crate) num_warmups: usize,
    /// Requests open at the same time: 16 if not given, or as many as come with --request-rate.
    #[arg(long, alias = "max-concurrency", value_name = "N,..", value_delimiter = ',', value_parser = whole::<usize>(1, 65536))]
    pub(crate) concurrency: Vec<usize>,
    /// Requests that come each second, on average, however many are open.
    #[arg(long, value_name = "R,..", value_delimiter = ',', value_parser = real::<f64>(0.001, 1e6))]
    pub(crate) request_rate: Vec<f64>,
    /// Shape of their pauses: 1 is a Poisson process, less comes in bursts, more is more even.
    #[arg(long, value_name = "B", default_value_t = 1.0, value_parser = real::<f64>(0.001, 1e9))]
    pub(crate) burstiness: f64,
    /// Come more and more often, from --ramp-up-start-rps to --ramp-up-end-rps.
    #[arg(long, value_enum, value_name = "HOW", conflicts_with = "request_rate", requires_all = ["ramp_up_start_rps", "ramp_up_end_rps"])]
    pub(crate) ramp_up_strategy: Option<RampArg>,
    /// Requests a second at the start.
    #[arg(long, value_name = "R", requires = "ramp_up_strategy", value_parser = real::<f64>(0.001, 1e6))]
    pub(crate) ramp_up_start_rps: Option<f64>,
    /// Requests a second at the end.
    #[arg(long, value_name = "R", requires = "ramp_up_strategy", value_parser = real::<f64>(0.001, 1e6))]
    pub(crate) ramp_up_end_rps: Option<f64>,
    /// Limits of a good request in ms, such as ttft:500,tpot:50,e2el:5000; good requests a second are reported.
    #[arg(long, value_name = "KEY:MS", value_delimiter = ',')]
    pub(crate) goodput: Vec<Goal>,
    /// Conversations in ShareGPT's form, whose first messages are the prompts; random words if not given.
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["prompt_words", "shared_prefix", "num_prefixes"])]
    pub(crate) dataset_path: Option<PathBuf>,
    /// Random words of each prompt.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "100", value_parser = whole::<usize>(0, 1048576))]
    pub(crate) prompt_words: Vec<usize>,
    /// Words before them that prompts share.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole::<usize>(0, 1048576))]
    pub(crate) shared_prefix: usize,
    /// Different beginnings that are shared, of which each prompt has one.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole::<usize>(1, 1048576))]
    pub(crate) num_prefixes: usize,
    /// Tokens of each answer; servers that know ignore_eos write exactly as many.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "64", value_parser = whole::<usize>(0, 268435456))]
    pub(crate) max_tokens: Vec<usize>,
    /// Use /v1/chat/completions instead of /v1/completions.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Seed of the prompts.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole::<u64>(0, u64::MAX))]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl BenchServeArgs {
    /// One load for each combination of values. Each has prompts of its own, so that none finds another's in a cache.
    pub(crate) fn loads(&self) -> Vec<LoadOptions> {
        let (from, to) = (self.ramp_up_start_rps.unwrap_or(1.0), self.ramp_up_end_rps.unwrap_or(1.0));
        let ramps = match self.ramp_up_strategy {
            Some(RampArg::Linear) => vec![Some(Ramp::Linear(from, to))],
            Some(RampArg::Exponential) => vec![Some(Ramp::Exponential(from, to))],
            None if self.request_rate.is_empty() => vec![None],
            None => self.request_rate.iter().map(|rate| Some(Ramp::Constant(*rate))).collect(),
        };
        let concurrencies: Vec<Option<usize>> = match &self.concurrency[..] {
            [] => vec![None],
            given => given.iter().copied().map(Some).collect(),
        };
        let mut loads = vec![];
        for own in &self.prompt_words {
            for max_tokens in &self.max_tokens {
                for ramp in &ramps {
                    for concurrency in &concurrencies {
                        let words =
                            Prompts::Words { own: *own, shared: self.shared_prefix, num_prefixes: self.num_prefixes };
                        loads.push(LoadOptions {
                            url: self.url.clone(),
                            model_name: self.model_name.clone(),
                            api_key: self.api_key.clone(),
                            insecure: self.insecure,
                            requests: self.requests,
                            num_warmups: self.num_warmups,
                            concurrency: concurrency.or(ramp.is_none().then_some(16)),
                            arrivals: ramp.map(|ramp| Arrivals { ramp, burstiness: self.burstiness }),
                            prompts: self.dataset_path.clone().map_or(words, Prompts::ShareGpt),
                            max_tokens: *max_tokens,
                            chat: self.chat,
                            seed: self.seed.wrapping_add(loads.len() as u64),
                            goodput: self.goodput.clone(),
                        });
                    }
                }
            }
        }
        loads
    }
}

/// How figures are printed.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArgs {
    /// Print a table in Markdown, to paste.
    #[arg(long, conflicts_with_all = ["json", "csv"])]
    pub(crate) markdown: bool,
    /// Print comma-separated values below their names.
    #[arg(long, conflicts_with = "json")]
    pub(crate) csv: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How rates rise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RampArg {
    /// The same step at each request.
    Linear,
    /// The same factor at each request.
    Exponential,
}

#[derive(Debug, Args)]
pub(crate) struct BenchCommArgs {
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
    /// Largest payload in bytes.
    #[arg(long, value_name = "BYTES", default_value = "16m", value_parser = token_count)]
    pub(crate) max_bytes: usize,
    /// Measure only the way between every two ranks, each direction by itself.
    #[arg(long)]
    pub(crate) pairs: bool,
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
    /// Measure weights that cannot all stay in memory: most of a token's time goes into reading them from the disk.
    #[arg(long)]
    pub(crate) allow_paging: bool,
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
    #[command(flatten)]
    pub(crate) output: OutputArgs,
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
                allow_paging: args.allow_paging,
                n_cpu_moe: args.n_cpu_moe,
            },
            parallel: (&args.parallel).into(),
            sync_every: args.sync_every,
        }
    }
}
