//! A TOML file of flags: at the top for every command, under `[run]` or `[bench.decode]` for one, under
//! `[models."owner/name"]` for one model, under `[models."owner/name".run]` for both.

use std::path::{Path, PathBuf};

use clap::Command;
use toml::{Table, Value};

use crate::{SettingsError, all_flags, is_settable, similar};

/// Heading of the sections of models.
const MODELS: &str = "models";

/// A file of settings.
#[derive(Clone, Debug)]
pub struct SettingsFile {
    /// Where it is.
    pub path: PathBuf,
    content: Table,
}

/// Headings from the file's top to a section.
pub(crate) struct Section(Vec<String>);

impl Section {
    /// As it stands between brackets in the file.
    pub(crate) fn title(&self) -> String {
        let is_bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let key = |key: &String| if key.chars().all(is_bare) { key.clone() } else { format!("{key:?}") };
        self.0.iter().map(key).collect::<Vec<_>>().join(".")
    }
}

impl SettingsFile {
    /// Reads a file; `None` if there is none.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is not TOML.
    pub fn read(path: &Path) -> Result<Option<SettingsFile>, SettingsError> {
        use std::io::ErrorKind::{NotADirectory, NotFound};
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), NotFound | NotADirectory) => return Ok(None),
            Err(error) => return Err(SettingsError::Unreadable { path: path.to_owned(), error }),
        };
        let content = text.parse::<Table>().map_err(|error| SettingsError::File {
            path: path.to_owned(),
            what: format!("this is not TOML: {}", error.to_string().trim_end()),
        })?;
        Ok(Some(SettingsFile { path: path.to_owned(), content }))
    }

    /// Sections that count for a command and a model, the most particular first.
    pub(crate) fn sections(&self, path: &[String], model: Option<&str>) -> Vec<Section> {
        let key = model.and_then(|model| self.model_key(model));
        let commands: Vec<&[String]> = (0..=path.len()).rev().map(|n| &path[..n]).collect();
        let of_model = key.into_iter().flat_map(|key| {
            let head = [MODELS.to_owned(), key];
            commands.iter().map(move |command| Section([&head[..], command].concat())).collect::<Vec<_>>()
        });
        of_model.chain(commands.iter().map(|command| Section(command.to_vec()))).collect()
    }

    /// The heading of a model: its whole name, or the last part of it.
    fn model_key(&self, model: &str) -> Option<String> {
        let models = self.content.get(MODELS)?.as_table()?;
        let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or(model);
        [model, last].into_iter().find(|name| models.contains_key(*name)).map(str::to_owned)
    }

    /// The values of a flag in a section.
    pub(crate) fn get(&self, section: &Section, flag: &str) -> Option<Vec<String>> {
        let mut table = &self.content;
        for key in &section.0 {
            table = table.get(key)?.as_table()?;
        }
        let (_, value) = table.iter().find(|(key, value)| key.replace('_', "-") == flag && !value.is_table())?;
        match value {
            Value::Array(values) => values.iter().map(text).collect(),
            value => text(value).map(|text| vec![text]),
        }
    }

    /// Refuses what sets nothing.
    pub(crate) fn check(&self, program: &Command, never: &[&str]) -> Result<(), SettingsError> {
        self.check_table(&self.content, program, program, &Section(vec![]), never)
    }

    fn check_table(
        &self,
        table: &Table,
        program: &Command,
        command: &Command,
        section: &Section,
        never: &[&str],
    ) -> Result<(), SettingsError> {
        let wrong = |what: String| SettingsError::File { path: self.path.clone(), what };
        let place = if section.0.is_empty() { String::new() } else { format!(" in [{}]", section.title()) };
        let mut flags = all_flags(command);
        flags.extend(
            program.get_arguments().filter(|arg| is_settable(arg)).filter_map(|a| a.get_long().map(str::to_owned)),
        );
        for (key, value) in table {
            let flag = key.replace('_', "-");
            let below = |name: &str| Section([&section.0[..], &[name.to_owned()]].concat());
            match value {
                Value::Table(models) if section.0.is_empty() && key == MODELS => {
                    for (name, value) in models {
                        let section = Section(vec![MODELS.to_owned(), name.clone()]);
                        let Some(table) = value.as_table() else {
                            return Err(wrong(format!("[models] has a section for each model, found {name:?} alone")));
                        };
                        self.check_table(table, program, program, &section, never)?;
                    }
                }
                Value::Table(inner) => {
                    let Some(found) = command.find_subcommand(key) else {
                        let known = command.get_subcommands().map(Command::get_name);
                        let hint = similar(key, known).map_or(String::new(), |name| format!("; did you mean {name}?"));
                        return Err(wrong(format!("[{}] is no command's section{hint}", below(key).title())));
                    };
                    self.check_table(inner, program, found, &below(key), never)?;
                }
                _ if never.contains(&&*flag) => {
                    return Err(wrong(format!("{key:?}{place} can be set on the command line and by a variable only")));
                }
                _ if !flags.contains(&flag) => {
                    let hint = similar(&flag, flags.iter().map(String::as_str));
                    let hint = hint.map_or(String::new(), |name| format!("; did you mean {name}?"));
                    return Err(wrong(format!("{key:?}{place} is no flag{hint}")));
                }
                value => {
                    let is_plain = |value: &Value| text(value).is_some();
                    let is_right = value.as_array().map_or_else(|| is_plain(value), |all| all.iter().all(is_plain));
                    if !is_right {
                        return Err(wrong(format!(
                            "{key:?}{place} is {}, expected a text, a number, true or false, or a list of these",
                            value.type_str()
                        )));
                    }
                }
            }
        }
        Ok(())
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(is_set) => Some(is_set.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}
