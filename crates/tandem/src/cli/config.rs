//! `tandem config`, and the command line with what files and variables add to it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, FromArgMatches};
use tandem_settings::{Settings, SettingsError};

use super::table::{command, explained};
use super::{Cli, Command};

/// Variables are `TANDEM_` and the name of a flag.
const PREFIX: &str = "TANDEM_";
/// A file may lie in a folder that the user only looks at: it starts no program and gets no model.
const NEVER_FROM_FILES: [&str; 5] = ["mpirun", "remote-binary", "ssh-option", "yes", "config-file"];

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// A command with its flags, such as `run --model OWNER/NAME`. Files and variables alone are listed if not given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

/// A command line, and the same as arguments that say everything.
pub(crate) struct Parsed {
    pub(crate) cli: Cli,
    pub(crate) arguments: Vec<String>,
}

/// Parses a command line, its program's name first; clap ends the process where it is wrong.
pub(crate) fn parse(args: Vec<OsString>) -> Result<Parsed, SettingsError> {
    let texts = || args.iter().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>();
    let parse = |table: clap::Command| {
        let matches = table.try_get_matches_from(&args).unwrap_or_else(|error| explained(error, &texts()).exit());
        Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    };
    let plain = || Parsed { cli: parse(command()), arguments: texts() };
    // A rank has its flags from the launcher, which looked for them.
    if args.iter().any(|arg| arg.to_string_lossy().starts_with("--launch-fd")) {
        return Ok(plain());
    }
    let first = command().ignore_errors(true).try_get_matches_from(&args);
    // Help needs no settings, and what shows them is not subject to them.
    let Some(first) = first.ok().filter(|first| first.subcommand_name() != Some("config")) else { return Ok(plain()) };
    let named = first.get_one::<PathBuf>("config_file").cloned();
    let settings = settings(named.as_deref())?;
    let applied = settings.apply(command(), &args)?;
    let arguments = with(texts(), applied.arguments());
    let mut cli = parse(applied.command);
    if let Command::Launch(launch) = &mut cli.command {
        launch.command = launched(&settings, &launch.command)?;
    }
    Ok(Parsed { cli, arguments })
}

/// A command that `tandem launch` starts, with its settings; how ranks are arranged is the launcher's.
fn launched(settings: &Settings, launched: &[String]) -> Result<Vec<String>, SettingsError> {
    let program = std::iter::once("tandem").chain(launched.iter().map(String::as_str));
    let mut applied = settings.apply(command(), &program.map(OsString::from).collect::<Vec<_>>())?;
    let all = command();
    let launch = all.find_subcommand("launch").into_iter().flat_map(|launch| launch.get_arguments());
    let launchers: Vec<_> = launch.filter_map(|arg| arg.get_long()).collect();
    applied.flags.retain(|flag| !launchers.contains(&&*flag.name));
    Ok(with(launched.to_vec(), applied.arguments()))
}

/// Puts flags behind the others, before what `--` ends them with.
fn with(mut command: Vec<String>, flags: Vec<String>) -> Vec<String> {
    let end = command.iter().position(|word| word == "--").unwrap_or(command.len());
    command.splice(end..end, flags);
    command
}

/// Variables, and the file of --config-file, else ./tandem.toml and the user's.
pub(crate) fn settings(named: Option<&Path>) -> Result<Settings, SettingsError> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")));
    let usual = [Some(PathBuf::from("tandem.toml")), home.map(|folder| folder.join("tandem").join("tandem.toml"))];
    Settings::new(PREFIX, &NEVER_FROM_FILES, vec![], std::env::vars_os()).read(named, "config-file", &usual)
}
