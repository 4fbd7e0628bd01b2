//! Repository chores: `cargo xtask <command>`.

mod fable;
mod scaling;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  ci              every check: .ci/run (formatting, clippy, tests, the full fixture set if it is there)
  fixtures [DIR]  golden model test on every checkpoint of DIR as well [../shared/fixtures/models]
  fable DIR       compare DIR/fable-30m and DIR/fable-30m-MXFP4-Q8 with their goldens; archives bench/runs/<date>-fable-30m
  scaling [NAME=VALUE ...]
                  GLM-5.1 on 1 to 64 machines, on paper: tok/s, time to first token, cost (docs/scaling.md)
";

/// What went wrong, for a person.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["ci"] => run(Command::new("bash").arg(".ci/run").current_dir(root())),
        ["fixtures"] => fixtures(&root().join("../shared/fixtures/models")),
        ["fixtures", dir] => fixtures(Path::new(dir)),
        ["fable", dir] => fable::fable(Path::new(dir)),
        ["scaling", ref words @ ..] => scaling::scaling(words).map(|text| print!("{text}")),
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            Ok(())
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn fixtures(dir: &Path) -> Result<()> {
    // Tests run in their package's directory, so the path must not depend on ours. The whole workspace, since one package
    // alone has other features and would build its dependencies again.
    let dir = dir.canonicalize().map_err(|e| format!("cannot use {}: {e}", dir.display()))?;
    let mut test = Command::new("cargo");
    test.args(["test", "--workspace", "--test", "golden_models"]);
    run(test.env("TANDEM_FIXTURES", dir).current_dir(root()))
}

/// The repository's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the repository").to_path_buf()
}

/// Runs a command with our terminal; an exit code other than 0 is an error.
fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|e| format!("cannot start {command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} failed: {status}")) }
}

/// Runs a command and returns its standard output.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|e| format!("cannot start {command:?}: {e}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?} failed: {}\n{errors}", output.status));
    }
    String::from_utf8(output.stdout).map_err(|e| format!("{command:?} wrote no UTF-8: {e}"))
}
