//! `tandem config`: what flags are set to, and where each value came from.

use std::ffi::OsString;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::{ConfigArgs, command, settings};
use crate::report::{plain, print_json};

/// Runs the command.
pub(crate) fn config(args: &ConfigArgs, named: Option<&Path>) -> anyhow::Result<()> {
    let settings = settings(named)?;
    let program = std::iter::once(OsString::from("tandem")).chain(args.command.iter().cloned()).collect::<Vec<_>>();
    let applied = settings.apply(command(), &program)?;
    if !args.command.is_empty() && applied.path.is_empty() {
        // clap says what is wrong with the command.
        return applied.command.try_get_matches_from(&program).map(drop).map_err(|error| {
            let text = error.to_string();
            anyhow::anyhow!("{}", text.strip_prefix("error: ").unwrap_or(&text).trim_end())
        });
    }
    let files: Vec<String> = settings.files.iter().map(|file| file.path.display().to_string()).collect();
    let unknown = settings.unknown_variables(&command());
    let path = applied.path.join(" ");
    if args.json {
        let flag = |flag: &tandem_settings::Flag| {
            json!({"flag": format!("--{}", flag.name), "values": flag.values, "variable": settings.variable_of(&flag.name),
                "origin": flag.origin.as_ref().map(|origin| origin.to_string())})
        };
        let flags: Vec<Value> = applied.flags.iter().map(flag).collect();
        let unknown: Vec<&String> = unknown.iter().map(|(name, _)| name).collect();
        return print_json(&json!({"files": files, "variables": settings.variables, "unknown_variables": unknown,
            "command": path, "flags": flags}));
    }
    if files.is_empty() {
        println!("no file: neither tandem.toml here nor ~/.config/tandem/tandem.toml is there");
    }
    files.iter().for_each(|file| println!("file {file}"));
    settings.variables.iter().for_each(|(name, value)| println!("{name}={}", plain(value)));
    for (name, similar) in unknown {
        let hint = similar.map_or(String::new(), |similar| format!("; did you mean {similar}?"));
        println!("{name} sets no flag{hint}");
    }
    let width = applied.flags.iter().map(|flag| flag.name.len() + 2).max().unwrap_or(0);
    for flag in &applied.flags {
        let values = flag.values.join(" ");
        let values = if flag.values.is_empty() { "not set" } else { &values };
        let origin = flag.origin.as_ref().map_or(String::new(), |origin| format!("  ({origin})"));
        println!("--{:<width$}{}{}", flag.name, plain(values), plain(&origin));
    }
    Ok(())
}
