//! `tandem eval`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::model::{ActivationsArg, ModelArgs};
use super::values::{tokens, whole};

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
