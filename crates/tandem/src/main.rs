//! The `tandem` command.

#[macro_use]
mod report;

mod agent;
mod bench;
mod cli;
mod compare;
mod config;
mod convert;
mod devices;
mod diagnosis;
mod eval;
mod inspect;
#[cfg_attr(not(unix), path = "launch_nowhere.rs")]
mod launch;
mod news;
mod pull;
mod run;
mod serve;
mod telemetry;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use anyhow::Context;
use tandem_runtime::ranks::{self, Joined, Role};
use tandem_runtime::{ModelOptions, ParallelOptions, measured};
use telemetry::Telemetry;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Exit codes of a bug, as the standard library has it, and of flags that cannot be used, as clap has it.
const PANICKED: u8 = 101;
const WRONG_COMMAND_LINE: u8 = 2;

fn main() -> ExitCode {
    tandem_runtime::device::prepare_process();
    let cli::Parsed { cli, arguments } = match cli::parse(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(error) => {
            eprintln!("error: {}", report::error_text(&error.to_string()));
            return ExitCode::from(WRONG_COMMAND_LINE);
        }
    };
    let _telemetry = match init_logging(&cli) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {}", report::error_text(&format!("{error:#}")));
            return ExitCode::FAILURE;
        }
    };
    // A panic is our bug, never the user's fault; say so in one line instead of a backtrace.
    std::panic::set_hook(Box::new(|info| {
        if !tandem_text::tokenizer::is_guarded() {
            eprintln!("error: tandem has a bug: {info}. Please report this with the command you ran");
        }
    }));
    let done = match std::panic::catch_unwind(AssertUnwindSafe(|| run(cli, arguments))) {
        Ok(done) => done,
        Err(payload) => match payload.downcast::<report::Unwritable>() {
            Ok(unwritable) => Err(anyhow::Error::from(unwritable.0).context("cannot write to standard output")),
            Err(_) => return ExitCode::from(PANICKED),
        },
    };
    match done {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Messages quote files.
            eprintln!("error: {}", report::error_text(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

/// Runs a command; `arguments` is its command line, settings of files and variables put in.
fn run(cli: cli::Cli, arguments: Vec<String>) -> anyhow::Result<ExitCode> {
    if let (Some((model, yes)), None) = (cli.command.wanted_model(), cli.launch_fd) {
        pull::offer(model, yes)?;
    }
    let parallel = cli.command.parallel_args().map(ParallelOptions::from);
    let joined = match Role::find(cli.launch_fd, parallel.as_ref(), quit)? {
        Role::Alone => None,
        Role::Lead(joined) => Some(joined),
        Role::Launch(n) => return launch::launch_here(n, &parallel.unwrap_or_default(), arguments),
        Role::Follow(joined) => return follow(joined, &cli.command).map(|()| ExitCode::SUCCESS),
    };
    match cli.command {
        cli::Command::Launch(args) => return launch::launch(&args),
        cli::Command::Run(args) => return run::run(&args, joined),
        cli::Command::Inspect(args) => inspect::inspect(&args)?,
        cli::Command::Eval(args) => eval::eval(&args, joined)?,
        cli::Command::Bench(args) => bench::bench(&args, joined)?,
        cli::Command::Agent(args) => return agent::agent(args, cli.config_file.as_deref()),
        cli::Command::Convert(args) => convert::convert(&args)?,
        cli::Command::Pull(args) => pull::pull(&args)?,
        cli::Command::Completions(args) => {
            let mut text = vec![];
            clap_complete::generate(args.shell, &mut cli::command(), "tandem", &mut text);
            print!("{}", String::from_utf8_lossy(&text));
        }
        cli::Command::Man(args) => {
            let write = || {
                std::fs::create_dir_all(&args.dir)?;
                clap_mangen::generate_to(cli::command(), &args.dir)
            };
            write().with_context(|| format!("cannot write to {}", args.dir.display()))?;
        }
        cli::Command::Config(args) => config::config(&args, cli.config_file.as_deref())?,
        cli::Command::Doctor(args) => return diagnosis::doctor(&args),
        cli::Command::Explain(args) => diagnosis::explain(&args)?,
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
    eprintln!("error: {}", report::error_text(message));
    std::process::exit(1);
}

/// The log: warnings, and what a server does; more with -v or RUST_LOG. Colours only on a terminal. And traces, until what
/// is returned is dropped.
fn init_logging(cli: &cli::Cli) -> anyhow::Result<Telemetry> {
    let variable = std::env::var("RUST_LOG").ok().filter(|text| !text.trim().is_empty());
    let directives = match (cli.verbose, &variable, &cli.command) {
        (0, Some(variable), _) => variable,
        (0, None, cli::Command::Serve(_)) => "warn,tandem=info",
        (0, None, _) => "warn",
        (1, ..) => "info",
        (2, ..) => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_new(directives)
        .with_context(|| format!("RUST_LOG is {directives:?}, expected directives such as info,tandem_serve=debug"))?;
    let log = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(console::colors_enabled_stderr())
        .with_target(cli.verbose > 1);
    let log = match cli.log_format {
        cli::LogFormat::Text => log.boxed(),
        cli::LogFormat::Json => log.json().flatten_event(true).boxed(),
    };
    let (telemetry, traces) = Telemetry::start()?;
    tracing_subscriber::registry().with(traces).with(log.with_filter(filter)).init();
    Ok(telemetry)
}

/// `tandem run ... | head` is not an error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<std::io::Error>()).any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
