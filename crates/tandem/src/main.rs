//! The `tandem` command.

mod bench;
mod cli;
#[cfg(feature = "cuda")]
mod cuda;
mod eval;
mod inspect;
mod load;
mod report;
mod run;
mod text;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    init_logging(cli.verbose);
    // A panic is our bug, never the user's fault; say so in one line instead of a backtrace.
    std::panic::set_hook(Box::new(|info| {
        eprintln!("error: tandem has a bug: {info}. Please report this with the command you ran");
    }));
    let result = match cli.command {
        cli::Command::Run(args) => run::run(&args),
        cli::Command::Inspect(args) => inspect::inspect(&args),
        cli::Command::Eval(args) => eval::eval(&args),
        cli::Command::Bench(args) => bench::bench(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
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
