//! The `tandem` command.

mod bench;
mod cli;
mod compare;
mod convert;
#[cfg(feature = "cuda")]
mod cuda;
mod distributed;
mod eval;
mod inspect;
mod load;
mod presets;
mod pull;
mod report;
mod run;
mod serve;
mod tasks;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use distributed::Role;

fn main() -> ExitCode {
    #[cfg(feature = "cuda")]
    tandem_cuda::forbid_multicast();
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
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: cli::Cli) -> anyhow::Result<ExitCode> {
    match distributed::role(&cli)? {
        Role::Lead => {}
        Role::Launch(n) => {
            let parallel = cli.command.parallel_args().cloned().unwrap_or_default();
            return distributed::launch::launch_here(n, &parallel);
        }
        Role::Follow(started) => {
            if let cli::Command::Bench(cli::BenchArgs { command: cli::BenchCommand::Comm(args) }) = &cli.command {
                return bench::comm::comm(args, Some(*started)).map(|()| ExitCode::SUCCESS);
            }
            if let Some(args) = cli.command.bench_model_args() {
                return bench::model::follow(*started, args).map(|()| ExitCode::SUCCESS);
            }
            let args = cli.command.model_args().context("tandem launch runs run, serve, eval and bench")?;
            return distributed::follow(*started, args).map(|()| ExitCode::SUCCESS);
        }
    }
    match cli.command {
        cli::Command::Launch(args) => return distributed::launch::launch(&args),
        cli::Command::Run(args) => run::run(&args)?,
        cli::Command::Inspect(args) => inspect::inspect(&args)?,
        cli::Command::Eval(args) => eval::eval(&args)?,
        cli::Command::Bench(args) => bench::bench(&args)?,
        cli::Command::Convert(args) => convert::convert(&args)?,
        cli::Command::Pull(args) => pull::pull(&args)?,
        cli::Command::Serve(args) => serve::serve(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn init_logging(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::new(level);
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(verbose > 1).init();
}

/// `tandem run ... | head` is not an error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<std::io::Error>()).any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
