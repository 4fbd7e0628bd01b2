//! Runs the `tandem` binary as a user would, and makes spoiled copies of fixtures.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

pub(crate) mod tiny;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// What a command left behind.
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// The output of a command that must have succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// The output as JSON.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }
}

/// The command, from the root of the repository, with `HOME` and caches out of reach.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(args).current_dir(root()).stdin(Stdio::null());
    for variable in ["HF_HOME", "HF_HUB_CACHE", "RUST_BACKTRACE", "RUST_LOG"] {
        command.env_remove(variable);
    }
    // Settings of the machine that runs the tests, which have variables of their own (`TANDEM_REQUIRE_MPI`) too.
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("TANDEM_") {
            command.env_remove(variable);
        }
    }
    command.env("HOME", "/nonexistent");
    command
}

/// Runs a prepared command.
pub(crate) fn finish(command: &mut Command) -> Done {
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Done { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// Runs `tandem args`.
pub(crate) fn tandem(args: &[&str]) -> Done {
    finish(&mut command(args))
}

/// Runs `tandem args` with `input` on a pipe.
pub(crate) fn tandem_with_input(args: &[&str], input: &[u8]) -> Done {
    let mut command = command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary starts");
    child.stdin.take().expect("piped").write_all(input).expect("read");
    let Output { status, stdout, stderr } = child.wait_with_output().expect("ends");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Done { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A path below `tests/golden`, as an argument.
pub(crate) fn golden(path: &str) -> String {
    text(&root().join("tests/golden").join(path))
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_string()
}

/// A folder for one test.
pub(crate) fn temporary() -> TempDir {
    TempDir::new().expect("a temporary folder")
}

/// Writes `content` to a file in `dir` and returns its path.
pub(crate) fn file(dir: &TempDir, name: &str, content: impl AsRef<[u8]>) -> String {
    let path = dir.path().join(name);
    std::fs::write(&path, content).expect("writable");
    text(&path)
}

/// A copy of a fixture model to spoil.
pub(crate) struct Copy {
    dir: TempDir,
}

impl Copy {
    /// Copies `tests/golden/models/{name}`.
    pub(crate) fn of(name: &str) -> Copy {
        let dir = temporary();
        for entry in std::fs::read_dir(golden(&format!("models/{name}"))).expect("a fixture") {
            let path = entry.expect("readable").path();
            if !path.ends_with("golden.safetensors") {
                std::fs::copy(&path, dir.path().join(path.file_name().expect("named"))).expect("copies");
            }
        }
        Copy { dir }
    }

    /// The folder, as an argument.
    pub(crate) fn path(&self) -> String {
        text(self.dir.path())
    }

    /// Changes a file in place.
    pub(crate) fn edit(self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Copy {
        let path = self.dir.path().join(name);
        let mut bytes = std::fs::read(&path).unwrap_or_default();
        change(&mut bytes);
        std::fs::write(&path, bytes).expect("writable");
        self
    }

    /// Sets a field of `config.json`.
    pub(crate) fn config(self, key: &str, value: Value) -> Copy {
        self.edit("config.json", |bytes| {
            let mut config: Value = serde_json::from_slice(bytes).expect("JSON");
            config[key] = value;
            *bytes = config.to_string().into_bytes();
        })
    }

    /// Removes a file.
    pub(crate) fn without(self, name: &str) -> Copy {
        std::fs::remove_file(self.dir.path().join(name)).expect("removable");
        self
    }

    /// Overwrites the first bytes of a tensor.
    pub(crate) fn patch(self, tensor: &str, bytes: &[u8]) -> Copy {
        self.edit("model.safetensors", |data| {
            let header_len = u64::from_le_bytes(*data.first_chunk().expect("8 bytes")) as usize;
            let header: Value = serde_json::from_slice(&data[8..8 + header_len]).expect("JSON");
            let start = header[tensor]["data_offsets"][0].as_u64().expect("the tensor is there") as usize;
            data[8 + header_len + start..][..bytes.len()].copy_from_slice(bytes);
        })
    }
}
