//! A model as a process: `tandem serve --model DIR` on a port of its own, which ends with this one. Its memory goes back to the
//! system with it, and a crash takes no other model along.

use std::ffi::OsString;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::pool::{Launcher, Spec};
use super::send::{self, Target};

/// Between two questions whether a model is ready.
const PAUSE: Duration = Duration::from_millis(50);
/// Between two questions whether a process still answers, and for its answer: one that is stopped or hangs is ended.
const PULSE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(30);
/// For a process to end once it is told to; its answers were complete before.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a line at most.
const LONGEST_LINE: usize = 2000;

/// Starts models.
pub(crate) struct Processes {
    /// Program and arguments, but for the model.
    pub(crate) command: Vec<OsString>,
    /// Key that the processes want, in a file of a folder that lives as long as this.
    pub(crate) key: String,
    pub(crate) key_file: tempfile::NamedTempFile,
    /// Folder of cached pages; each model has one below it.
    pub(crate) cache_dir: Option<std::path::PathBuf>,
    /// Gets each line that a model says.
    pub(crate) on_line: super::OnLine,
}

/// A model that is ready.
pub(crate) struct Running {
    child: Child,
    /// Its input; apart from it, since to wait for a child closes its input.
    stdin: Option<ChildStdin>,
    /// Ends when the process no longer answers.
    pulse: JoinSet<()>,
    last_error: watch::Receiver<String>,
}

impl Launcher for Processes {
    type Running = Running;
    type Address = Target;

    async fn load(&self, spec: &Spec) -> Result<(Running, Target), String> {
        let Some((program, arguments)) = self.command.split_first() else { return Err("no program".to_owned()) };
        let mut command = Command::new(program);
        let joined = |flag: &str, value: &std::ffi::OsStr| {
            let mut word = OsString::from(flag);
            word.push(value);
            word
        };
        command
            .args(arguments)
            .arg(joined("--model=", spec.dir.as_os_str()))
            .arg(joined("--served-model-name=", spec.name.as_ref()))
            .arg(joined("--api-key-file=", self.key_file.path().as_os_str()))
            .args(["--host=127.0.0.1", "--port=0", "--end-with-stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if let Some(dir) = &self.cache_dir {
            command.arg(joined("--cache-dir=", dir.join(folder_name(&spec.name)).as_os_str()));
        }
        // Ctrl-C at a terminal is for this process, which ends its answers first.
        #[cfg(unix)]
        command.process_group(0);
        let mut child = command.spawn().map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        let Some(stderr) = child.stderr.take() else { return Err("the process has no stderr".to_owned()) };
        let (address, mut listens) = watch::channel(None);
        let (last, last_error) = watch::channel(String::new());
        let (name, on_line) = (spec.name.clone(), Arc::clone(&self.on_line));
        tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).split(b'\n');
            while let Ok(Some(line)) = lines.next_segment().await {
                let line = String::from_utf8_lossy(&line[..line.len().min(LONGEST_LINE)]).into_owned();
                if let Some(rest) = line.strip_prefix("listening on ") {
                    let _ = address.send(rest.split(';').next().map(str::to_owned));
                }
                if let Some(error) = line.strip_prefix("error: ") {
                    let _ = last.send(error.to_owned());
                }
                on_line(&name, &line);
            }
        });
        let mut running = Running { stdin: child.stdin.take(), pulse: JoinSet::new(), child, last_error };
        let heard = async { listens.wait_for(Option::is_some).await.ok().and_then(|address| address.clone()) };
        let address = tokio::select! {
            why = self.ended(&mut running) => return Err(why),
            address = heard => address,
        };
        // Its stderr ended before, and so does it.
        let Some(address) = address else { return Err(self.ended(&mut running).await) };
        let mut target = Target { address, key: self.key.as_str().into(), context: None };
        running.pulse.spawn(until_silent(target.clone()));
        tokio::select! {
            why = self.ended(&mut running) => return Err(why),
            context = until_ready(&target) => target.context = context,
        }
        Ok((running, target))
    }

    fn bytes(&self, running: &Running) -> Option<u64> {
        running.child.id().and_then(memory_of_tree)
    }

    async fn ended(&self, running: &mut Running) -> String {
        let status = tokio::select! {
            status = running.child.wait() => status,
            Some(_) = running.pulse.join_next() => {
                // Whoever waits for it gets an end, and its memory is free when this returns.
                let _ = running.child.kill().await;
                return format!("its process did not answer for {} s and was ended", SILENCE.as_secs());
            }
        };
        // Its last words may still be in the pipe.
        let _ = tokio::time::timeout(Duration::from_millis(200), async {
            while running.last_error.borrow().is_empty() && running.last_error.changed().await.is_ok() {}
        })
        .await;
        let error = running.last_error.borrow().clone();
        match (status, error.is_empty()) {
            (_, false) => error,
            (Ok(status), true) => format!("its process ended with {status}"),
            (Err(error), true) => format!("its process is lost: {error}"),
        }
    }

    async fn end(&self, mut running: Running) {
        // The end of its input.
        drop(running.stdin.take());
        if tokio::time::timeout(END_TIMEOUT, running.child.wait()).await.is_err() {
            let _ = running.child.kill().await;
        }
    }
}

/// Waits until a process takes too long to say how it is. One that has ended is somebody else's to notice.
async fn until_silent(target: Target) {
    loop {
        tokio::time::sleep(PULSE).await;
        let asked = async {
            let stream = TcpStream::connect(&target.address).await.ok()?;
            send::get(stream, &target, "/health").await.ok()
        };
        if tokio::time::timeout(SILENCE, asked).await.is_err() {
            return;
        }
    }
}

/// Waits until a model answers, and returns the tokens of its context.
async fn until_ready(target: &Target) -> Option<u64> {
    loop {
        if let Ok(stream) = TcpStream::connect(&target.address).await
            && let Ok((StatusCode::OK, body)) = send::get(stream, target, "/v1/models").await
        {
            let list: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
            return list["data"][0]["max_model_len"].as_u64();
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A folder's name for any model's name.
fn folder_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '.' };
    use sha2::{Digest, Sha256};
    let digest: String = Sha256::digest(name).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{digest}", name.chars().take(60).map(plain).collect::<String>())
}

/// Bytes in memory of a process and those that it started, on Linux.
fn memory_of_tree(pid: u32) -> Option<u64> {
    let folder = std::path::PathBuf::from(format!("/proc/{pid}"));
    let status = std::fs::read_to_string(folder.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let own = line.split_whitespace().next()?.parse::<u64>().ok()? << 10;
    let children = std::fs::read_to_string(folder.join(format!("task/{pid}/children"))).unwrap_or_default();
    let others = children.split_whitespace().filter_map(|pid| memory_of_tree(pid.parse().ok()?));
    Some(own + others.sum::<u64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_names_are_plain_and_differ() {
        let names = ["a", "a/b", "a.b", "../..", "τ", "x y", "A", ""];
        let folders: std::collections::HashSet<String> = names.iter().map(|name| folder_name(name)).collect();
        assert_eq!(folders.len(), names.len());
        assert!(folders.iter().all(|folder| !folder.contains('/') && folder.len() > 8), "{folders:?}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_of_this_process() {
        let bytes = memory_of_tree(std::process::id()).expect("known");
        assert!((1 << 20..1 << 40).contains(&bytes), "{bytes}");
        assert_eq!(memory_of_tree(u32::MAX), None);
    }
}
