//! Commands and flags: one file a command, which ends in the options of the library that does the work.

mod agent;
mod bench;
mod config;
mod convert;
mod diagnosis;
mod drafts;
mod eval;
mod inspect;
mod launch;
mod model;
mod parallel;
mod pull;
mod run;
mod serve;
mod shapes;
mod table;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use agent::AgentArgs;
pub(crate) use bench::{
    BenchArgs, BenchCommArgs, BenchCommand, BenchDecodeArgs, BenchMatrixArgs, BenchModelArgs, BenchPrefillArgs,
    BenchServeArgs, OutputArgs,
};
pub(crate) use config::{ConfigArgs, Parsed, parse, settings};
pub(crate) use convert::ConvertArgs;
pub(crate) use diagnosis::{DoctorArgs, ExplainArgs};
pub(crate) use eval::{CompareArgs, EvalArgs, EvalCommand, LogitsArgs, PerplexityArgs, TasksArgs};
pub(crate) use inspect::InspectArgs;
pub(crate) use launch::LaunchArgs;
pub(crate) use model::ModelArgs;
pub(crate) use parallel::ParallelArgs;
pub(crate) use pull::PullArgs;
pub(crate) use run::RunArgs;
pub(crate) use serve::ServeArgs;
pub(crate) use table::command;

/// Runs very large mixture-of-experts language models from low-bit checkpoints, at the speed of the memory they sit in.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Say more on stderr (-v, -vv, -vvv); without it RUST_LOG counts, such as tandem_serve=debug.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Form of the log on stderr.
    #[arg(long, global = true, value_enum, value_name = "FORM", default_value_t = LogFormat::Text, hide_short_help = true)]
    pub(crate) log_format: LogFormat,
    /// File of flags to read instead of ./tandem.toml and ~/.config/tandem/tandem.toml.
    #[arg(long, global = true, value_name = "FILE", hide_short_help = true)]
    pub(crate) config_file: Option<PathBuf>,
    /// Where `tandem launch` sends its orders.
    #[arg(long, global = true, hide = true, value_name = "FD")]
    pub(crate) launch_fd: Option<u32>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

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
    Run(RunArgs),
    /// Say what a checkpoint is: architecture, sizes, quantisation, bytes read per token.
    Inspect(InspectArgs),
    /// Measure a model's outputs.
    Eval(EvalArgs),
    /// Measure speed against what this machine's memory allows.
    Bench(BenchArgs),
    /// Serve the model over HTTP: OpenAI's and Anthropic's interfaces, and a chat page.
    Serve(ServeArgs),
    /// Run a command on several machines, or as several processes of this one.
    Launch(LaunchArgs),
    /// Start a coding agent on a running server, or on one that is started for it.
    Agent(AgentArgs),
    /// Write a checkpoint in other formats, in MLX's layout.
    Convert(ConvertArgs),
    /// Get a model from Hugging Face into the local cache.
    Pull(PullArgs),
    /// Say what is wrong with this machine, a model's files or the hosts of ranks, and how fast the model should be.
    Doctor(DoctorArgs),
    /// Say where a token's time goes, what limits it and what would help: of the last run, or of a running server.
    Explain(ExplainArgs),
    /// List the devices that models can run on, with their memory, limits and features.
    Devices(DevicesArgs),
    /// Show what flags are set to by files, variables and the command line: tandem config run --model OWNER/NAME
    Config(ConfigArgs),
    /// Print the completions of a shell: tandem completions bash > ~/.local/share/bash-completion/completions/tandem
    Completions(CompletionsArgs),
    /// Write man pages, one a command.
    #[command(hide = true)]
    Man(ManArgs),
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
            Command::Agent(_)
            | Command::Inspect(_)
            | Command::Bench(_)
            | Command::Launch(_)
            | Command::Convert(_)
            | Command::Pull(_)
            | Command::Doctor(_)
            | Command::Explain(_)
            | Command::Devices(_)
            | Command::Config(_)
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
            // Each model has ranks of its own.
            Command::Serve(args) if args.models_dir.is_some() => None,
            command => command.model_args().map(|args| &args.parallel),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
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

#[cfg(test)]
mod tests {
    use clap::{Arg, Command};

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
        numeric_flags(&command(), &["tandem".to_string()], &mut flags);
        assert!(flags.len() > 60, "{}", flags.len());
        // Any seed will do, and the engine and the ranks check these with messages of their own.
        let others = ["seed", "temperature", "top-k", "top-p", "min-p", "repetition-penalty", "deadline"];
        for (path, arg) in flags {
            let name = arg.get_long().expect("long").to_string();
            if others.contains(&&*name) || arg.is_hide_set() {
                continue;
            }
            for value in ["99999999999999999999", "18446744073709551615", "1e300", "nan", "inf", "-1", "x", ""] {
                let given = format!("--{name}={value}");
                let error =
                    command().try_get_matches_from(path.iter().chain([&given])).err().map(|error| error.to_string());
                let error = error.unwrap_or_default();
                let says = error.contains("expected a") && error.contains("from ") && error.contains(" to ");
                assert!(says && error.contains(&format!("--{name}")), "{path:?} {given}: {error}");
            }
        }
    }
}
