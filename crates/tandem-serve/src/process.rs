//! The process around a server: the end that it is asked for, its descriptors, its keys.

use std::io::Read;
use std::path::Path;

use crate::app::ServeError;

/// Connections at most, and descriptors that are kept for everything else.
const MAX_CONNECTIONS: usize = 4096;
#[cfg(unix)]
const OTHER_DESCRIPTORS: usize = 128;

/// Connections that there are descriptors for; the system's soft bound is raised as far as it lets us.
pub fn max_connections() -> usize {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let wanted = (MAX_CONNECTIONS + OTHER_DESCRIPTORS) as u64;
        let mut limit = getrlimit(Resource::Nofile);
        if limit.current.is_some_and(|current| current < wanted) {
            let mut raised = limit;
            raised.current = Some(limit.maximum.map_or(wanted, |most| most.min(wanted)));
            if setrlimit(Resource::Nofile, raised).is_ok() {
                limit = raised;
            }
        }
        let n_descriptors = limit.current.map_or(usize::MAX, |n| n as usize);
        n_descriptors.saturating_sub(OTHER_DESCRIPTORS).clamp(16, MAX_CONNECTIONS)
    }
    #[cfg(not(unix))]
    MAX_CONNECTIONS
}

/// Waits for Ctrl-C, or the system's request to end.
pub async fn end_signal() {
    #[cfg(unix)]
    {
        let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
        if let Ok(mut terminate) = terminate {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    #[cfg(unix)]
    let _ = tokio::signal::ctrl_c().await;
    #[cfg(not(unix))]
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = STDIN_ENDED.notified() => {}
    }
}

/// Where no signal ends a process: [`end_signal`] waits for it too.
#[cfg(not(unix))]
static STDIN_ENDED: tokio::sync::Notify = tokio::sync::Notify::const_new();

/// Sends this process the system's request to end once its standard input ends: whoever holds the other end of a pipe takes
/// this process along, however it ends itself.
pub fn end_with_stdin() {
    std::thread::spawn(|| {
        let mut input = std::io::stdin().lock();
        let mut bytes = [0; 256];
        // A signal is no end.
        while match input.read(&mut bytes) {
            Ok(n) => n > 0,
            Err(error) => error.kind() == std::io::ErrorKind::Interrupted,
        } {}
        #[cfg(unix)]
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
        #[cfg(not(unix))]
        STDIN_ENDED.notify_one();
    });
}

/// Keys of a file, one a line; empty lines and lines that begin with # do not count.
///
/// # Errors
/// The file cannot be read, or holds none.
pub fn read_keys(path: &Path) -> Result<Vec<String>, ServeError> {
    let unreadable = |error| ServeError::KeyFile { path: path.to_owned(), error };
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if keys.is_empty() { Err(ServeError::NoKey(path.to_owned())) } else { Ok(keys) }
}
