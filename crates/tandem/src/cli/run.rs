//! `tandem run`.

use std::path::PathBuf;

use clap::Args;
use tandem_engine::SamplingOverrides;
use tandem_runtime::conversation::ConversationOptions;
use tandem_text::{Dialect, Reasoning};

use super::drafts::DraftArgs;
use super::model::ModelArgs;
use super::values::{chat_format, number, reasoning, tokens, whole};

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The prompt; a pipe on standard input joins it, or is the prompt. A chat without either.
    pub(crate) prompt: Option<String>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) drafts: DraftArgs,
    /// System message.
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    pub(crate) system: Option<String>,
    /// Pass the prompt to the model as it stands, without the chat template.
    #[arg(long, help_heading = "Prompt")]
    pub(crate) raw: bool,
    /// Chat template to use instead of the model's.
    #[arg(long, value_name = "FILE", help_heading = "Prompt")]
    pub(crate) chat_template: Option<PathBuf>,
    /// How prompts are made and answers written, if not as the checkpoint says.
    #[arg(long, value_name = "NAME", value_parser = chat_format(), help_heading = "Prompt")]
    pub(crate) chat_format: Option<Dialect>,
    /// Reasoning before the answer: on, off, or how much, in the nearest word that the chat template knows.
    #[arg(long, value_name = "LEVEL", value_parser = reasoning(), help_heading = "Prompt")]
    pub(crate) thinking: Option<Reasoning>,
    /// JSON file with an array of tools (OpenAI's form) that the model may call.
    #[arg(long, value_name = "FILE", help_heading = "Prompt")]
    pub(crate) tools: Option<PathBuf>,
    /// Tokens to generate at most; until the context is full if not given.
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

impl From<&RunArgs> for ConversationOptions {
    fn from(args: &RunArgs) -> ConversationOptions {
        let flags = &args.sampling;
        ConversationOptions {
            system: args.system.clone(),
            raw: args.raw,
            chat_template: args.chat_template.clone(),
            chat_format: args.chat_format,
            thinking: args.thinking.unwrap_or_default(),
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

/// Defaults come from the model's generation_config.json.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// 0 picks the likeliest token. The model's generation_config.json has the defaults of these.
    #[arg(long, value_name = "T", value_parser = number::<f32>())]
    pub(crate) temperature: Option<f32>,
    /// Consider the K likeliest tokens only.
    #[arg(long, value_name = "K", value_parser = whole::<u32>(0, u32::MAX.into()))]
    pub(crate) top_k: Option<u32>,
    /// Consider the likeliest tokens that add up to P.
    #[arg(long, value_name = "P", value_parser = number::<f32>())]
    pub(crate) top_p: Option<f32>,
    /// Consider tokens at least P times as likely as the likeliest.
    #[arg(long, value_name = "P", value_parser = number::<f32>(), hide_short_help = true)]
    pub(crate) min_p: Option<f32>,
    /// Make tokens that occurred less likely (1 does nothing).
    #[arg(long, value_name = "R", value_parser = number::<f32>(), hide_short_help = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Same seed, same text.
    #[arg(long, value_name = "N", value_parser = whole::<u64>(0, u64::MAX))]
    pub(crate) seed: Option<u64>,
}
