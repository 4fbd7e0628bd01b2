//! Starts a coding agent on a server of this machine, or another: finds the server or starts one, gives the client its
//! settings for this run ([`Client::setup`]), and runs it in the foreground.
//!
//! Prints nothing: news go to the caller. Leaves the client's own files alone.

mod client;
#[cfg(unix)]
mod foreground;
#[cfg(unix)]
mod server;

use std::ffi::OsString;
#[cfg(unix)]
use std::os::unix::fs::PermissionsExt;
#[cfg(unix)]
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::process::Command;

#[cfg(unix)]
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
#[cfg(unix)]
use signal_hook::iterator::Signals;
use thiserror::Error;

pub use client::{Client, Endpoint, Setup};

#[cfg(unix)]
use crate::server::Server;

/// What to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The client.
    pub client: Client,
    /// The user's arguments for it.
    pub arguments: Vec<OsString>,
    /// Address of a server that must be there; if `None`, the one at `port` of this machine, or one that is started.
    pub url: Option<String>,
    /// Port where a server is looked for.
    pub port: u16,
    /// Key that the server of `url` wants.
    pub api_key: Option<String>,
    /// Name of the model, or for a server that is started, its directory; the server's first one if `None`.
    pub model: Option<String>,
    /// Tokens of context of a server that is started; as it has them itself if `None`.
    pub context: Option<usize>,
    /// Program and first arguments that start a server: `tandem serve`.
    pub server: Vec<OsString>,
}

/// Why the client was not started.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The program is not there.
    #[error("{} is not installed (no {} in PATH); install it with: npm install -g {}", .0.title(), .0.program(), .0.package())]
    NotInstalled(Client),
    /// The address is none.
    #[error("--url is {0:?}, expected one such as http://127.0.0.1:8000")]
    Url(String),
    /// Nobody answers.
    #[error("{url} does not answer ({why}); is the server running? Without --url one is started")]
    Absent {
        /// The address.
        url: String,
        /// The connection's error.
        why: String,
    },
    /// No key, or a wrong one.
    #[error("{0} wants an API key; --api-key-file names a file that has it")]
    Key(String),
    /// It is no server of models.
    #[error("{url}/v1/models answers {what}, expected a list of models; is it a tandem server?")]
    NoServer {
        /// The address.
        url: String,
        /// Its answer.
        what: String,
    },
    /// The server lacks the model.
    #[error("{url} has no model {asked:?}, it has {}; --model names one of these", .listed.join(", "))]
    Model {
        /// The address.
        url: String,
        /// The name asked for.
        asked: String,
        /// Names that the server has.
        listed: Vec<String>,
    },
    /// The server ended while it loaded.
    #[error("the server did not start: {0}")]
    Start(String),
    /// Terminals and signals are Unix's here.
    #[error("tandem agent runs on Linux and macOS only; start {} by itself, with the address of a server", .0.title())]
    System(Client),
    /// A file or a process.
    #[error("cannot {what}: {error}")]
    Io {
        /// What was to be done.
        what: String,
        /// Why it was not.
        error: std::io::Error,
    },
}

#[cfg(unix)]
impl AgentError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> AgentError {
        let what = what.into();
        move |error| AgentError::Io { what, error }
    }
}

/// Tokens of the longest first prompts: instructions and tools, before anything is asked.
#[cfg(unix)]
const FIRST_PROMPT: u64 = 24_000;

/// Runs the client to its end, and returns its exit code, 128 and the signal if one ended it; `news` gets lines for the user
/// until the client has the terminal, and after it.
///
/// # Errors
/// The client is not installed, or there is no server with the model.
#[cfg(unix)]
pub fn run(options: &Options, news: &mut dyn FnMut(&str)) -> Result<u8, AgentError> {
    let client = options.client;
    // Before a server loads for minutes.
    let program = program(client, std::env::var_os("PATH").unwrap_or_default())?;
    let mut signals =
        Signals::new([SIGTERM, SIGHUP, SIGINT, SIGQUIT, SIGCONT]).map_err(AgentError::io("wait for signals"))?;
    let folder = tempfile::Builder::new()
        .prefix("tandem-agent-")
        .tempdir()
        .map_err(AgentError::io("make a folder for temporary files"))?;
    let mut interrupted = || signals.pending().find(|signal| *signal != SIGCONT);
    let server = match Server::find_or_start(options, folder.path(), news, &mut interrupted)? {
        Ok(server) => server,
        // As shells have it.
        Err(signal) => return Ok(128u8.saturating_add(u8::try_from(signal).unwrap_or(0))),
    };
    let endpoint = server.endpoint();
    news(&format!("{} runs with {} at {}", client.title(), endpoint.model, endpoint.url));
    if let Some(context) = endpoint.context.filter(|context| *context < FIRST_PROMPT) {
        news(&format!(
            "warning: {} has {context} tokens of context, and the first prompt of a coding agent is up to {FIRST_PROMPT}; \
             --context starts a server with more, if the model has them",
            endpoint.model
        ));
    }
    let setup = client.setup(endpoint, folder.path(), |name| std::env::var_os(name));
    for (file, text) in &setup.files {
        write_private(file, text)?;
    }
    let mut command = Command::new(&program);
    command.args(&setup.arguments).args(&options.arguments);
    for (name, value) in &setup.variables {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let code = foreground::run(command, signals).map_err(AgentError::io(format!("run {}", program.display())))?;
    if let Some(last_line) = server.stop() {
        let kept = folder.keep();
        news(&format!("warning: the server ended before {}: {last_line} (all in {})", client.title(), kept.display()));
    }
    Ok(code)
}

/// Not on this system.
///
/// # Errors
/// Always.
#[cfg(not(unix))]
pub fn run(options: &Options, _: &mut dyn FnMut(&str)) -> Result<u8, AgentError> {
    Err(AgentError::System(options.client))
}

/// The client's program in the folders of PATH.
#[cfg(unix)]
fn program(client: Client, path: OsString) -> Result<PathBuf, AgentError> {
    let is_program =
        |path: &PathBuf| path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(client.program())).filter(is_program);
    found.next().ok_or(AgentError::NotInstalled(client))
}

/// A file that nobody else reads.
#[cfg(unix)]
fn write_private(file: &Path, text: &str) -> Result<(), AgentError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    opened
        .and_then(|mut opened| opened.write_all(text.as_bytes()))
        .map_err(AgentError::io(format!("write {}", file.display())))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_a_file_that_can_be_run() {
        let folder = tempfile::tempdir().expect("a folder");
        let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
        std::fs::create_dir_all(one.join("claude")).expect("a folder of that name");
        std::fs::create_dir_all(&two).expect("a folder");
        let path = || std::env::join_paths([&one, &two]).expect("a path");
        let error = program(Client::Claude, path()).expect_err("a folder is no program").to_string();
        assert_eq!(
            error,
            "Claude Code is not installed (no claude in PATH); install it with: npm install -g @anthropic-ai/claude-code"
        );
        let file = two.join("claude");
        std::fs::write(&file, "#!/bin/sh\n").expect("writable");
        assert!(program(Client::Claude, path()).is_err(), "a file without the right to run it");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("a program");
        assert_eq!(program(Client::Claude, path()).expect("found"), file);
        assert!(program(Client::Codex, OsString::new()).is_err());
    }
}
