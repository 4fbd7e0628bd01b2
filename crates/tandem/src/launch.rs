//! `tandem launch`: starts a rank on every host of a hostfile, and sees that none outlives the others.
//!
//! Ranks on this host are child processes, the others are started through the system's ssh. The launcher does not take
//! part in the model: it passes on addresses, prints what ranks say, and ends every rank when one fails.

use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tandem_comm::tcp::Secret;

use tandem_runtime::ParallelOptions;
use tandem_runtime::options::TransportKind;
use tandem_runtime::ranks::{Announcement, Host, NEWS, Order, hosts, local_hosts};

use crate::cli::LaunchArgs;

/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// After this long without a line, ranks that have ended say nothing more.
const LAST_WORDS: Duration = Duration::from_millis(50);
/// Ranks that fail so soon will probably fail again.
const SHORT: Duration = Duration::from_secs(2);

/// Runs `tandem launch`.
pub(crate) fn launch(args: &LaunchArgs) -> anyhow::Result<ExitCode> {
    let parallel = args.parallel();
    parallel.check_encryption()?;
    if args.backend.is_some() {
        eprintln!("launch: --backend is mlx.launch's name for --transport, which is the one to use here");
    }
    let hosts = match &args.hostfile {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            hosts(&text, &path.display().to_string())?
        }
        None => local_hosts(parallel.n_ranks()?),
    };
    if args.hostfile.is_some() && parallel.ranks.is_some_and(|n| n != hosts.len()) {
        bail!("--ranks says {} and the hostfile has {} hosts; leave one out", parallel.n_ranks()?, hosts.len());
    }
    ensure!(
        args.starting_port == 0 || usize::from(args.starting_port) + hosts.len() <= 1 << 16,
        "--starting-port {} leaves no ports for {} ranks; expected at most {}",
        args.starting_port,
        hosts.len(),
        (1usize << 16).saturating_sub(hosts.len())
    );
    catch_signals()?;
    match parallel.transport {
        TransportKind::Mpi => {
            let command = mpirun(args, &parallel, &hosts)?;
            restarting(args.restart, |_| {
                run_to_end(command(), || {
                    format!(
                        "cannot start {}; install Open MPI or MPICH, or name its launcher with --mpirun",
                        args.mpirun.display()
                    )
                })
            })
        }
        TransportKind::Local => {
            ensure!(
                hosts.iter().all(Host::is_local),
                "--transport local runs threads of one process, but the hostfile has other hosts; use tcp or mpi"
            );
            let program = std::env::current_exe()?;
            restarting(args.restart, |_| {
                let mut command = Command::new(&program);
                command.args(&args.command).args(parallel.flags(hosts.len()));
                run_to_end(command, || "cannot start this program again".to_string())
            })
        }
        TransportKind::Auto | TransportKind::Tcp | TransportKind::Nccl => {
            let launcher = Launcher { args, parallel, hosts };
            restarting(args.restart, |generation| launcher.generation(generation))
        }
    }
}

/// The short form: `command` with `n` ranks on this host.
pub(crate) fn launch_here(n: usize, parallel: &ParallelOptions, command: Vec<String>) -> anyhow::Result<ExitCode> {
    let args = LaunchArgs::short_form(command);
    catch_signals()?;
    Launcher { args: &args, parallel: parallel.clone(), hosts: local_hosts(n) }.generation(0)
}

fn catch_signals() -> anyhow::Result<()> {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, INTERRUPT.clone()).context("cannot wait for signals")?;
    }
    Ok(())
}

/// Runs generations of ranks until one ends well, the user ends it, or `restarts` are used up. What fails again within
/// [`SHORT`] is started again later and later.
fn restarting(restarts: u32, mut run: impl FnMut(u32) -> anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    let (mut generation, mut n_short) = (0, 0);
    loop {
        let start = Instant::now();
        let result = run(generation)?;
        if result == ExitCode::SUCCESS || INTERRUPT.load(Ordering::Relaxed) || generation >= restarts {
            return Ok(result);
        }
        generation += 1;
        n_short = if start.elapsed() < SHORT { n_short + 1 } else { 0 };
        let pause = pause_after(n_short);
        let when = if pause.is_zero() { String::new() } else { format!(" in {} s", pause.as_secs()) };
        eprintln!("launch: starting the ranks again ({generation} of {restarts}){when}");
        let start = Instant::now();
        while start.elapsed() < pause {
            if INTERRUPT.load(Ordering::Relaxed) {
                return Ok(ExitCode::from(INTERRUPTED));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The first restart is at once, then after 1, 2, 4, .. 32 seconds.
fn pause_after(n_short: u32) -> Duration {
    Duration::from_secs(n_short.checked_sub(2).map_or(0, |n| 1 << n.min(5)))
}

/// Runs a program that starts and watches the ranks itself, and ends it when this one is to end.
fn run_to_end(mut command: Command, cannot: impl Fn() -> String) -> anyhow::Result<ExitCode> {
    let mut child = command.spawn().with_context(cannot)?;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for the ranks")? {
            return Ok(if INTERRUPT.load(Ordering::Relaxed) { ExitCode::from(INTERRUPTED) } else { code(status) });
        }
        if INTERRUPT.load(Ordering::Relaxed)
            && let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw)
        {
            // It may have ended meanwhile.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// MPI's launcher, which starts the ranks itself.
fn mpirun<'a>(
    args: &'a LaunchArgs,
    parallel: &'a ParallelOptions,
    hosts: &'a [Host],
) -> anyhow::Result<impl Fn() -> Command + 'a> {
    let binary = args.remote_binary.clone().map_or_else(std::env::current_exe, Ok)?;
    Ok(move || {
        let mut command = Command::new(&args.mpirun);
        command.args(["-n", &hosts.len().to_string()]);
        if !hosts.iter().all(Host::is_local) {
            command.args(["--host", &hosts.iter().map(|h| h.name.as_str()).collect::<Vec<_>>().join(",")]);
        }
        command.arg(&binary).args(&args.command).args(parallel.flags(hosts.len()));
        command
    })
}

fn code(status: ExitStatus) -> ExitCode {
    // As shells have it, 128 and the signal.
    let number = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    ExitCode::from(u8::try_from(number).unwrap_or(1))
}

/// Set by Ctrl-C and its like.
static INTERRUPT: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

struct Launcher<'a> {
    args: &'a LaunchArgs,
    parallel: ParallelOptions,
    hosts: Vec<Host>,
}

/// What happens to ranks.
enum Event {
    Line(usize, String),
    News(usize, Announcement),
}

/// A started rank. Dropping the pipe ends it.
struct Rank {
    child: Child,
    /// None once a remote rank 0 reads the user's input from it.
    pipe: Option<Box<dyn Write + Send>>,
    status: Option<ExitStatus>,
}

impl Launcher<'_> {
    /// Starts every rank and waits for the end of all.
    fn generation(&self, generation: u32) -> anyhow::Result<ExitCode> {
        let secret: String = Secret::random()?.0.iter().map(|b| format!("{b:02x}")).collect();
        let (sender, events) = channel();
        let mut ranks: Vec<Rank> = vec![];
        let result = (0..self.hosts.len())
            .try_for_each(|rank| {
                ranks.push(self.start(rank, &secret, generation, &sender)?);
                Ok(())
            })
            .and_then(|()| self.watch(&mut ranks, &events));
        drop(sender);
        end(&mut ranks, Duration::from_millis(500));
        // What the ranks said last.
        while let Ok(event) = events.recv_timeout(Duration::from_millis(200)) {
            self.show(&event, &Bars::none());
        }
        result
    }

    /// Of the commands that ranks run, only `run` reads.
    fn reads_input(&self) -> bool {
        let commands = ["run", "serve", "eval", "bench"];
        self.args.command.iter().find(|word| commands.contains(&word.as_str())).is_none_or(|command| command == "run")
    }

    fn order(&self, rank: usize, secret: &str, generation: u32) -> Order {
        let host = &self.hosts[rank];
        // Checked to be below 65536 when the launcher began.
        let port = if self.args.starting_port == 0 { 0 } else { self.args.starting_port.saturating_add(rank as u16) };
        Order {
            secret: secret.to_string(),
            rank,
            hosts: self.hosts.iter().map(|h| h.name.clone()).collect(),
            listen: host.ip,
            port,
            generation,
            parallel: self.parallel.clone(),
            on_this_host: self.hosts.iter().filter(|h| h.name == host.name).count(),
            start_timeout: self.args.start_timeout,
            model: self.args.remote_model.clone().filter(|_| !host.is_local()),
            reads_input: self.reads_input(),
        }
    }

    fn start(&self, rank: usize, secret: &str, generation: u32, events: &Sender<Event>) -> anyhow::Result<Rank> {
        let host = &self.hosts[rank];
        let order = serde_json::to_string(&self.order(rank, secret, generation))? + "\n";
        let exe = std::env::current_exe().context("cannot find this program")?;
        let mut inherited: Option<OwnedFd> = None;
        let mut pipe: Option<Box<dyn Write + Send>> = None;
        let mut command = if host.is_local() {
            // Standard input is the user's; orders come on a pipe of their own.
            let (read, write) = std::io::pipe().context("cannot make a pipe")?;
            rustix::io::fcntl_setfd(&read, rustix::io::FdFlags::empty()).context("cannot pass a pipe on")?;
            let mut command = Command::new(&exe);
            command.args(["--launch-fd", &read.as_raw_fd().to_string()]).args(&self.args.command);
            command.stdin(if rank == 0 { Stdio::inherit() } else { Stdio::null() });
            inherited = Some(read.into());
            pipe = Some(Box::new(write));
            command
        } else {
            let binary = self.args.remote_binary.clone().unwrap_or(exe);
            let mut remote = vec![binary.display().to_string(), "--launch-fd".to_string(), "0".to_string()];
            remote.extend(self.args.command.iter().cloned());
            let remote: Vec<String> = remote.iter().map(|word| quoted(word)).collect();
            let mut command = Command::new("ssh");
            command.args(["-o", "BatchMode=yes"]);
            self.args.ssh_option.iter().for_each(|option| {
                command.args(["-o", option]);
            });
            command.args([&host.name, &remote.join(" ")]).stdin(Stdio::piped());
            command
        };
        command.stderr(Stdio::piped()).stdout(if rank == 0 { Stdio::inherit() } else { Stdio::piped() });
        let mut child = command.spawn().with_context(|| match host.is_local() {
            true => "cannot start this program again".to_string(),
            false => format!("cannot start ssh to reach {}", host.name),
        })?;
        drop(inherited);
        if let Some(stdin) = child.stdin.take() {
            pipe = Some(Box::new(stdin));
        }
        if let Some(stream) = child.stderr.take() {
            read_lines(rank, stream, events.clone());
        }
        if let Some(stream) = child.stdout.take() {
            read_lines(rank, stream, events.clone());
        }
        if let Some(pipe) = &mut pipe {
            // A rank that is gone already is noticed by its exit.
            let _ = pipe.write_all(order.as_bytes());
        }
        Ok(Rank { child, pipe, status: None })
    }

    /// Passes addresses on, prints, and returns when rank 0 is done or a rank has failed.
    fn watch(&self, ranks: &mut [Rank], events: &Receiver<Event>) -> anyhow::Result<ExitCode> {
        let mut addresses: Vec<Option<SocketAddr>> = vec![None; ranks.len()];
        let mut told = false;
        let start = Instant::now();
        let bars = Bars::new(ranks.len());
        let patience = self.parallel.deadline()?;
        let mut first_failure: Option<(usize, ExitStatus, Instant)> = None;
        let mut finished: Option<Instant> = None;
        loop {
            match events.recv_timeout(Duration::from_millis(10)) {
                Ok(Event::News(rank, Announcement::Listening(address))) => addresses[rank] = Some(address),
                Ok(event) => self.show(&event, &bars),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if !told && addresses.iter().all(Option::is_some) {
                told = true;
                let text = serde_json::to_string(&addresses.iter().flatten().collect::<Vec<_>>())? + "\n";
                for (i, rank) in ranks.iter_mut().enumerate() {
                    if let Some(pipe) = &mut rank.pipe {
                        let _ = pipe.write_all(text.as_bytes());
                    }
                    if i == 0 && !self.hosts[0].is_local() && self.reads_input() {
                        forward_input(rank.pipe.take());
                    }
                }
            }
            if INTERRUPT.load(Ordering::Relaxed) {
                return Ok(ExitCode::from(INTERRUPTED));
            }
            if !told && start.elapsed().as_secs_f64() > self.args.start_timeout {
                let missing = addresses.iter().position(Option::is_none).unwrap_or(0);
                bail!(
                    "rank {missing} ({}) did not start within {:.0} s; does `ssh {} {}` work without a question? \
                     (--remote-binary names the program there, --start-timeout waits longer)",
                    self.hosts[missing].name,
                    self.args.start_timeout,
                    self.hosts[missing].name,
                    self.args.remote_binary.as_deref().map_or_else(|| "tandem".into(), |b| b.display().to_string())
                );
            }
            for (i, rank) in ranks.iter_mut().enumerate().filter(|(_, r)| r.status.is_none()) {
                let Some(status) = rank.child.try_wait().context("cannot wait for a rank")? else { continue };
                rank.status = Some(status);
                if i == 0 && status.success() {
                    finished = Some(Instant::now());
                } else if !status.success() && first_failure.is_none() {
                    first_failure = Some((i, status, Instant::now()));
                }
            }
            let all_ended = ranks.iter().all(|r| r.status.is_some());
            if let Some((rank, status, at)) = first_failure {
                // Whoever lives sees the failure within 0.1 of the deadline, and ends within 0.2 more.
                let is_over = |rank: &Rank| rank.status.is_some() || is_suspended(rank.child.id());
                if ranks.iter().all(is_over) || at.elapsed() > patience.mul_f64(0.3) {
                    // What the ranks said last may still be in its pipe; this launcher's line follows it.
                    for event in std::iter::from_fn(|| events.recv_timeout(LAST_WORDS).ok()).take(20) {
                        self.show(&event, &bars);
                    }
                    // Ranks end within moments of each other: one that a signal ended did not follow another.
                    let by_signal =
                        |(i, r): (usize, &Rank)| r.status.filter(|s| s.signal().is_some()).map(|status| (i, status));
                    let killed = ranks.iter().enumerate().find_map(by_signal);
                    let silent = silent(ranks).filter(|_| killed.is_none());
                    let (rank, status) = killed.unwrap_or((rank, status));
                    let ended = format!("rank {rank} ({}) ended first: {status}", self.hosts[rank].name);
                    match silent {
                        Some(silent) => {
                            let host = &self.hosts[silent].name;
                            eprintln!("launch: rank {silent} ({host}) did not answer and is ended; {ended}");
                        }
                        None => eprintln!("launch: {ended}"),
                    }
                    return Ok(match code(status) {
                        ExitCode::SUCCESS => ExitCode::FAILURE,
                        other => other,
                    });
                }
            } else if all_ended || finished.is_some_and(|at| at.elapsed() > patience) {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }

    fn show(&self, event: &Event, bars: &Bars) {
        match event {
            Event::Line(rank, line) => {
                let line = crate::report::plain(line);
                bars.print(format!("[rank {rank} {}] {line}", self.hosts[*rank].name));
            }
            Event::News(rank, Announcement::Loading { done, total }) => bars.set(*rank, *done, *total),
            Event::News(_, Announcement::Listening(_)) => {}
        }
    }
}

/// The rank that the others have waited for in vain: one that is suspended, else one that has not ended.
fn silent(ranks: &[Rank]) -> Option<usize> {
    let running = || ranks.iter().enumerate().filter(|(_, rank)| rank.status.is_none()).map(|(i, _)| i);
    running().find(|i| is_suspended(ranks[*i].child.id())).or_else(|| running().next())
}

/// Whether a process of this host was stopped by a signal; false where the system does not tell.
fn is_suspended(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, state)| state.trim_start().starts_with(['T', 't']))
}

/// Ends every rank that still runs: first its pipe, then the process.
fn end(ranks: &mut [Rank], grace: Duration) {
    ranks.iter_mut().for_each(|rank| rank.pipe = None);
    let start = Instant::now();
    while start.elapsed() < grace && ranks.iter_mut().any(|r| !matches!(r.child.try_wait(), Ok(Some(_)))) {
        std::thread::sleep(Duration::from_millis(10));
    }
    for rank in ranks {
        // Killing what has ended is no failure.
        let _ = rank.child.kill();
        let _ = rank.child.wait();
    }
}

fn read_lines(rank: usize, stream: impl Read + Send + 'static, events: Sender<Event>) {
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stream);
        let mut line = vec![];
        while matches!(lines.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_string();
            line.clear();
            let news = text.strip_prefix(NEWS).and_then(|json| serde_json::from_str(json).ok());
            let event = match news {
                Some(news) => Event::News(rank, news),
                None => Event::Line(rank, text),
            };
            if events.send(event).is_err() {
                return;
            }
        }
    });
}

/// The user's input goes to a remote rank 0.
fn forward_input(pipe: Option<Box<dyn Write + Send>>) {
    let Some(mut pipe) = pipe else { return };
    if std::io::stdin().is_terminal() {
        // Nobody types there: chats need a local rank 0. The pipe's end tells rank 0 so.
        return;
    }
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut pipe);
    });
}

/// A word for the remote shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A load bar per rank, on a terminal.
struct Bars {
    all: MultiProgress,
    bars: Vec<ProgressBar>,
}

impl Bars {
    fn none() -> Bars {
        Bars { all: MultiProgress::new(), bars: vec![] }
    }

    fn new(n: usize) -> Bars {
        let all = MultiProgress::new();
        if !std::io::stderr().is_terminal() {
            return Bars { all, bars: vec![] };
        }
        let style = ProgressStyle::with_template("{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}");
        let bars = (0..n)
            .map(|rank| {
                let bar = all.add(ProgressBar::new(0)).with_prefix(format!("rank {rank}"));
                if let Ok(style) = &style {
                    bar.set_style(style.clone());
                }
                bar
            })
            .collect();
        Bars { all, bars }
    }

    fn set(&self, rank: usize, done: u64, total: u64) {
        if let Some(bar) = self.bars.get(rank) {
            bar.set_length(total);
            bar.set_position(done);
            if done == total {
                bar.finish_and_clear();
            }
        }
    }

    fn print(&self, line: String) {
        self.all.suspend(|| eprintln!("{line}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_fail_at_once_are_started_later_and_later() {
        let seconds = |n| pause_after(n).as_secs();
        assert_eq!([0, 1, 2, 3, 7, 8, 100].map(seconds), [0, 0, 1, 2, 32, 32, 32]);
    }

    #[test]
    fn words_survive_the_remote_shell() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }
}
