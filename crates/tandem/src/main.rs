//! The `tandem` command.

mod bench;
mod cli;
mod compare;
mod convert;
mod devices;
mod eval;
mod inspect;
mod launch;
mod news;
mod pull;
mod report;
mod run;
mod serve;
mod tasks;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tandem_runtime::ranks::{self, Joined, Role};
use tandem_runtime::{ModelOptions, ParallelOptions, measured};

fn main() -> ExitCode {
    tandem_runtime::device::prepare_process();
    let cli = cli::Cli::parse();
    init_logging(cli.verbose);
    // A panic is our bug, never the user's fault; say so in one line instead of a backtrace.
    std::panic::set_hook(Box::new(|info| {
        if tandem_text::tokenizer::is_guarded() {
            return;
        }
        eprintln!("error: tandem has a bug: {info}. Please report this with the command you ran");
    }));
    match run(cli) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Messages quote files.
            eprintln!("error: {}", report::plain(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: cli::Cli) -> anyhow::Result<ExitCode> {
    let parallel = cli.command.parallel_args().map(ParallelOptions::from);
    let joined = match Role::find(cli.launch_fd, parallel.as_ref(), quit)? {
        Role::Alone => None,
        Role::Lead(joined) => Some(joined),
        Role::Launch(n) => return launch::launch_here(n, &parallel.unwrap_or_default()),
        Role::Follow(joined) => return follow(joined, &cli.command).map(|()| ExitCode::SUCCESS),
    };
    match cli.command {
        cli::Command::Launch(args) => return launch::launch(&args),
        cli::Command::Run(args) => run::run(&args, joined)?,
        cli::Command::Inspect(args) => inspect::inspect(&args)?,
        cli::Command::Eval(args) => eval::eval(&args, joined)?,
        cli::Command::Bench(args) => bench::bench(&args, joined)?,
        cli::Command::Convert(args) => convert::convert(&args)?,
        cli::Command::Pull(args) => pull::pull(&args)?,
        cli::Command::Devices(args) => devices::devices(&args)?,
        cli::Command::Serve(args) => serve::serve(&args, joined, quit)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Another rank than 0 of the same command.
fn follow(joined: Joined, command: &cli::Command) -> anyhow::Result<()> {
    if let cli::Command::Bench(cli::BenchArgs { command: cli::BenchCommand::Comm(args) }) = command {
        return bench::comm::comm(args, Some(joined));
    }
    if let Some(args) = command.bench_model_args() {
        return measured::follow(joined, &args.into());
    }
    let args = command.model_args().context("tandem launch runs run, serve, eval and bench")?;
    ranks::follow(joined, &ModelOptions::from(args))
}

/// Ends this process: the launcher or another rank is lost, and every thread may be waiting for it.
fn quit(message: &str) {
    eprintln!("error: {}", report::plain(message));
    std::process::exit(1);
}

fn init_logging(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::new(level);
    // Colours are for terminals, not for files of messages.
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    subscriber.with_ansi(is_terminal).with_target(verbose > 1).init();
}

/// `tandem run ... | head` is not an error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<std::io::Error>()).any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
