//! Flags of a command line from files and variables: what the command line does not give, `TANDEM_CONTEXT=8k` or a line
//! `context = "8k"` of a TOML file may give.
//!
//! Which flags there are, which values they take and which exclude each other is read from clap's own table, so a new flag
//! can be set from everywhere without a line here. Values become defaults of the flags; clap parses them as it parses
//! those of the command line. This crate knows no flag of any program, and prints nothing.

mod file;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::builder::ValueRange;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

pub use file::SettingsFile;

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// A file is not TOML, or sets what is no flag.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found.
        what: String,
    },
    /// A flag refuses a value.
    #[error("{origin}: {what}")]
    Value {
        /// Where the value is.
        origin: Origin,
        /// What the flag says.
        what: String,
    },
    /// Two flags from equally important places exclude each other.
    #[error("{0}")]
    Conflict(String),
}

/// Where the value of a flag came from, the most important first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    CommandLine,
    /// A variable of this name.
    Variable(String),
    /// A line of a file, under the heading `section` if that is not empty.
    File {
        /// The file.
        path: PathBuf,
        /// Such as `run` or `models."owner/name".serve`.
        section: String,
    },
    /// The program's own.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::CommandLine => write!(f, "command line"),
            Origin::Variable(name) => write!(f, "{name}"),
            Origin::File { path, section } if section.is_empty() => write!(f, "{}", path.display()),
            Origin::File { path, section } => write!(f, "{} [{section}]", path.display()),
            Origin::Default => write!(f, "default"),
        }
    }
}

/// A flag of the command that was asked for, and what it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Flag {
    /// Its long name, without dashes.
    pub name: String,
    /// Its values as text; none if nothing sets it.
    pub values: Vec<String>,
    /// Where they came from; `None` if nothing sets it.
    pub origin: Option<Origin>,
    is_switch: bool,
}

/// What a program may be told besides its command line.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Before the name of a flag in capitals: `TANDEM_`.
    pub prefix: &'static str,
    /// Flags that files must not set, such as names of programs to run: a file may come with a folder that a user only
    /// looks at.
    pub never_from_files: &'static [&'static str],
    /// Files, the most important first.
    pub files: Vec<SettingsFile>,
    /// Variables that begin with the prefix.
    pub variables: BTreeMap<String, String>,
}

/// A command line with settings put in.
pub struct Applied {
    /// The program's table, in which values of files and variables are defaults.
    pub command: Command,
    /// Names of the command that was asked for, below the program: `["bench", "decode"]`.
    pub path: Vec<String>,
    /// Its flags, in the order of its help, then those of the whole program.
    pub flags: Vec<Flag>,
}

impl Applied {
    /// The values of files and variables as arguments, for another process that must not look for them itself.
    pub fn arguments(&self) -> Vec<String> {
        let is_set_outside = |flag: &&Flag| matches!(flag.origin, Some(Origin::Variable(_) | Origin::File { .. }));
        let flags = self.flags.iter().filter(is_set_outside);
        let arguments = flags.flat_map(|flag| {
            flag.values.iter().flat_map(|value| match (flag.is_switch, value.as_str()) {
                (true, "true") => vec![format!("--{}", flag.name)],
                // A switch that is off, or one that is counted.
                (true, text) => vec![format!("--{}", flag.name); text.parse().unwrap_or(0)],
                (false, value) => vec![format!("--{}={value}", flag.name)],
            })
        });
        arguments.collect()
    }
}

/// A value that a flag may take, with its place among all.
struct Candidate {
    origin: Origin,
    /// 0 for the command line, more for what counts less.
    rank: usize,
    values: Vec<String>,
}

impl Settings {
    /// Takes the variables with the prefix; values that are not UTF-8 or empty are passed over.
    pub fn new(
        prefix: &'static str,
        never_from_files: &'static [&'static str],
        files: Vec<SettingsFile>,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> Settings {
        let text = variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let variables = text.filter(|(name, value)| name.starts_with(prefix) && !value.is_empty()).collect();
        Settings { prefix, never_from_files, files, variables }
    }

    /// Reads files: `named`, or the one of the variable of `file_flag`, which must be there; else those of `usual` that
    /// are, the most important first.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or is not TOML.
    pub fn read(
        mut self,
        named: Option<&Path>,
        file_flag: &str,
        usual: &[Option<PathBuf>],
    ) -> Result<Settings, SettingsError> {
        let variable = self.variables.get(&self.variable_of(file_flag)).map(PathBuf::from);
        if let Some(path) = named.map(Path::to_owned).or(variable) {
            let error = std::io::Error::from(std::io::ErrorKind::NotFound);
            let file = SettingsFile::read(&path)?.ok_or(SettingsError::Unreadable { path, error })?;
            self.files.push(file);
            return Ok(self);
        }
        for path in usual.iter().flatten() {
            self.files.extend(SettingsFile::read(path)?);
        }
        Ok(self)
    }

    /// The name of the variable that sets a flag.
    pub fn variable_of(&self, flag: &str) -> String {
        format!("{}{}", self.prefix, flag.replace('-', "_").to_uppercase())
    }

    /// Variables with the prefix that set no flag of any command, each with a flag's variable that it looks like.
    pub fn unknown_variables(&self, command: &Command) -> Vec<(String, Option<String>)> {
        let known: Vec<String> = all_flags(command).iter().map(|flag| self.variable_of(flag)).collect();
        let unknown = self.variables.keys().filter(|name| !known.contains(name));
        unknown.map(|name| (name.clone(), similar(name, known.iter().map(String::as_str)))).collect()
    }

    /// Puts settings into the command that `args` asks for (`args[0]` is the program). A command line that clap refuses
    /// is left to clap.
    ///
    /// # Errors
    ///
    /// A file names what is no flag, a value is none that its flag takes, or two exclude each other.
    pub fn apply(&self, command: Command, args: &[OsString]) -> Result<Applied, SettingsError> {
        for file in &self.files {
            file.check(&command, self.never_from_files)?;
        }
        let Some(matches) = given(&command, args) else {
            return Ok(Applied { command, path: vec![], flags: vec![] });
        };
        let mut path = vec![];
        let (mut leaf, mut leaf_matches) = (&command, &matches);
        while let Some((name, inner)) = leaf_matches.subcommand() {
            let Some(found) = leaf.find_subcommand(name) else { break };
            path.push(found.get_name().to_owned());
            (leaf, leaf_matches) = (found, inner);
        }
        // Of a program without a command there is nothing to set.
        if path.is_empty() {
            return Ok(Applied { command, path, flags: vec![] });
        }
        let globals = command.get_arguments().filter(|arg| arg.is_global_set());
        let args: Vec<(&Arg, bool)> =
            leaf.get_arguments().map(|arg| (arg, false)).chain(globals.map(|arg| (arg, true))).collect();
        let args: Vec<(&Arg, bool)> = args.into_iter().filter(|(arg, _)| is_settable(arg)).collect();
        // The model first: files have sections for models.
        let model = args.iter().find(|(arg, _)| arg.get_long() == Some("model"));
        let model = model.and_then(|(arg, _)| self.find(arg, leaf_matches, &path, None));
        let model = model.and_then(|found| found.values.first().cloned());

        let mut found: Vec<(&Arg, bool, Option<Candidate>)> = vec![];
        for (arg, is_global) in &args {
            found.push((arg, *is_global, self.find(arg, leaf_matches, &path, model.as_deref())));
        }
        drop_excluded(leaf, leaf_matches, &mut found)?;
        let mut flags = vec![];
        let mut changes: Vec<(bool, String, Vec<String>)> = vec![];
        for (arg, is_global, candidate) in found {
            let is_switch = !takes_value(arg);
            let name = arg.get_long().unwrap_or_default().to_owned();
            let Some(mut candidate) = candidate else {
                let values: Vec<String> =
                    arg.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
                let origin = (!values.is_empty()).then_some(Origin::Default);
                flags.push(Flag { name, values, origin, is_switch });
                continue;
            };
            if candidate.origin != Origin::CommandLine {
                candidate.values = checked(arg, &candidate)?;
                changes.push((is_global, arg.get_id().to_string(), candidate.values.clone()));
            }
            flags.push(Flag { name, values: candidate.values, origin: Some(candidate.origin), is_switch });
        }
        let mut command = command;
        for (is_global, id, values) in changes {
            let place = if is_global { &[][..] } else { &path };
            command =
                change(command, place, |inner| inner.mut_arg(id, |arg| arg.required(false).default_values(values)));
        }
        Ok(Applied { command, path, flags })
    }

    /// The most important value of a flag.
    fn find(&self, arg: &Arg, matches: &ArgMatches, path: &[String], model: Option<&str>) -> Option<Candidate> {
        let flag = arg.get_long()?;
        if matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine) {
            let id = arg.get_id().as_str();
            let values = match takes_value(arg) {
                true => matches.get_raw(id).into_iter().flatten().map(|v| v.to_string_lossy().into_owned()).collect(),
                false if matches!(arg.get_action(), ArgAction::Count) => vec![matches.get_count(id).to_string()],
                false => vec!["true".to_owned()],
            };
            return Some(Candidate { origin: Origin::CommandLine, rank: 0, values });
        }
        let name = self.variable_of(flag);
        if let Some(text) = self.variables.get(&name) {
            let values = match arg.get_action() {
                ArgAction::Append if arg.get_value_delimiter().is_none() => {
                    text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
                }
                _ => vec![text.clone()],
            };
            return Some(Candidate { origin: Origin::Variable(name), rank: 1, values });
        }
        let mut rank = 1;
        for file in &self.files {
            for section in file.sections(path, model) {
                rank += 1;
                if let Some(values) = file.get(&section, flag) {
                    let origin = Origin::File { path: file.path.clone(), section: section.title() };
                    return Some(Candidate { origin, rank, values });
                }
            }
        }
        None
    }
}

/// The command line as it is, a required flag that is missing or not; `None` where clap has something else to say.
fn given(command: &Command, args: &[OsString]) -> Option<ArgMatches> {
    match command.clone().try_get_matches_from(args) {
        Ok(matches) => Some(matches),
        Err(error) if error.kind() == ErrorKind::MissingRequiredArgument => {
            command.clone().ignore_errors(true).try_get_matches_from(args).ok()
        }
        Err(_) => None,
    }
}

/// Removes values whose flag a more important value excludes; between equals that is an error.
fn drop_excluded(
    leaf: &Command,
    matches: &ArgMatches,
    found: &mut [(&Arg, bool, Option<Candidate>)],
) -> Result<(), SettingsError> {
    let excludes =
        |one: &Arg, other: &Arg| leaf.get_arg_conflicts_with(one).iter().any(|arg| arg.get_id() == other.get_id());
    // Arguments without a name count too: they are only on the command line.
    let positionals: Vec<&Arg> = leaf.get_positionals().collect();
    let is_given = |arg: &Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    for i in 0..found.len() {
        let Some(rank) = found[i].2.as_ref().map(|candidate| candidate.rank).filter(|rank| *rank > 0) else { continue };
        let arg = found[i].0;
        if found[i].1 {
            continue;
        }
        let mut is_out =
            positionals.iter().any(|other| is_given(other) && (excludes(arg, other) || excludes(other, arg)));
        for (other, is_global, candidate) in found.iter() {
            let Some(candidate) = candidate.as_ref().filter(|_| !is_global && other.get_id() != arg.get_id()) else {
                continue;
            };
            if !excludes(arg, other) && !excludes(other, arg) {
                continue;
            }
            if candidate.rank == rank {
                let name = |arg: &Arg| arg.get_long().unwrap_or_default().to_owned();
                let origin = found[i].2.as_ref().map_or(Origin::Default, |candidate| candidate.origin.clone());
                let (one, two) = (name(arg), name(other));
                let second = &candidate.origin;
                return Err(SettingsError::Conflict(format!(
                    "{origin} and {second} cannot be used together: --{one} excludes --{two}"
                )));
            }
            is_out |= candidate.rank < rank;
        }
        if is_out {
            found[i].2 = None;
        }
    }
    Ok(())
}

/// The values of a flag, if the flag takes them.
fn checked(arg: &Arg, candidate: &Candidate) -> Result<Vec<String>, SettingsError> {
    let flag = arg.get_long().unwrap_or_default();
    let refused = |what: String| SettingsError::Value { origin: candidate.origin.clone(), what };
    let takes_several = matches!(arg.get_action(), ArgAction::Append) || arg.get_value_delimiter().is_some();
    if candidate.values.len() != 1 && !takes_several {
        return Err(refused(format!("--{flag} takes one value, found {}", candidate.values.len())));
    }
    if !takes_value(arg) && !matches!(arg.get_action(), ArgAction::Count) {
        let value = match candidate.values[0].to_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => "true",
            "false" | "0" | "no" | "off" => "false",
            other => return Err(refused(format!("--{flag} is {other:?}, expected true or false"))),
        };
        return Ok(vec![value.to_owned()]);
    }
    // The flag alone, so that only its value can be wrong. Counts are given as a number here.
    let mut alone = Arg::new("value").long(flag.to_owned()).num_args(ValueRange::SINGLE).action(ArgAction::Append);
    alone = match arg.get_action() {
        ArgAction::Count => alone.value_parser(clap::value_parser!(u8)),
        _ => alone.value_parser(arg.get_value_parser().clone()),
    };
    if let Some(delimiter) = arg.get_value_delimiter() {
        alone = alone.value_delimiter(delimiter);
    }
    let command = Command::new("settings").no_binary_name(true).arg(alone);
    let arguments = candidate.values.iter().map(|value| format!("--{flag}={value}"));
    if let Err(error) = command.try_get_matches_from(arguments) {
        let text = error.to_string();
        let what = text.trim_start_matches("error: ").split("\n\nFor more").next().unwrap_or_default();
        return Err(refused(what.trim_end().to_owned()));
    }
    Ok(candidate.values.clone())
}

fn takes_value(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Set | ArgAction::Append)
}

/// Flags that help shows, but for those that print help and end.
fn is_settable(arg: &Arg) -> bool {
    let sets = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append | ArgAction::SetTrue | ArgAction::Count);
    arg.get_long().is_some() && !arg.is_hide_set() && sets
}

fn change(command: Command, path: &[String], change_it: impl FnOnce(Command) -> Command) -> Command {
    let mut change_it = Some(change_it);
    change_with(command, path, &mut |command| match change_it.take() {
        Some(change_it) => change_it(command),
        None => command,
    })
}

fn change_with(command: Command, path: &[String], change_it: &mut dyn FnMut(Command) -> Command) -> Command {
    match path.split_first() {
        None => change_it(command),
        Some((first, rest)) => command.mut_subcommand(first.clone(), |inner| change_with(inner, rest, change_it)),
    }
}

/// Every settable flag of a command and of those below it.
fn all_flags(command: &Command) -> Vec<String> {
    let own = command.get_arguments().filter(|arg| is_settable(arg)).filter_map(|arg| arg.get_long());
    let mut flags: Vec<String> = own.map(str::to_owned).collect();
    flags.extend(command.get_subcommands().flat_map(all_flags));
    flags.sort();
    flags.dedup();
    flags
}

/// The name that the user may have meant.
fn similar<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let near = known.map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate));
    near.filter(|(distance, _)| *distance <= 2).min().map(|(_, candidate)| candidate.to_owned())
}
