//! Signs of life: one thread per rank that sends and expects them, and passes on why a rank stops.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::failure_of;
use super::waker::{Waker, wake, waker};
use super::wire::Wire;
use crate::error::{CommError, Failure};

/// Kinds of control messages: kind u8, length u16, text.
const ALIVE: u8 = 1;
const ABORT: u8 = 2;
const LEAVE: u8 = 3;
/// Longest reason that is passed on.
const MAX_REASON: usize = 2000;

/// What is known of the group.
pub(super) struct Health {
    failure: Mutex<Option<CommError>>,
    failed: Condvar,
    stopped: AtomicBool,
    /// Readable once the group has failed.
    wake: Waker,
    wake_sender: Waker,
    /// For writing; the thread reads from clones.
    controls: Vec<Option<Mutex<Wire>>>,
}

struct Watched {
    rank: usize,
    stream: Wire,
    seen: Instant,
    buffer: Vec<u8>,
    open: bool,
    left: bool,
}

impl Health {
    pub(super) fn start(
        controls: Vec<Option<Wire>>,
        hosts: Vec<String>,
        deadline: Duration,
        on_failure: Box<dyn Fn(&CommError) + Send>,
    ) -> Result<Arc<Health>, CommError> {
        let broken = |e: std::io::Error| CommError::setup(format!("cannot prepare a connection: {e}"));
        let (wake, wake_sender) = waker().map_err(broken)?;
        let mut watched = vec![];
        for (rank, stream) in controls.iter().enumerate() {
            if let Some(stream) = stream {
                let stream = stream.try_clone().map_err(broken)?;
                watched.push(Watched { rank, stream, seen: Instant::now(), buffer: vec![], open: true, left: false });
            }
        }
        let health = Arc::new(Health {
            failure: Mutex::default(),
            failed: Condvar::new(),
            stopped: AtomicBool::new(false),
            wake,
            wake_sender,
            controls: controls.into_iter().map(|c| c.map(Mutex::new)).collect(),
        });
        let thread = health.clone();
        std::thread::Builder::new()
            .name("tandem-health".to_string())
            .spawn(move || thread.watch(watched, &hosts, deadline, &*on_failure))
            .map_err(broken)?;
        Ok(health)
    }

    /// Why the group has failed, if it has.
    pub(super) fn failure(&self) -> Option<CommError> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// [`Health::failure`], waiting up to `patience` for one.
    pub(super) fn wait_for_failure(&self, patience: Duration) -> Option<CommError> {
        let guard = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        drop(self.failed.wait_timeout_while(guard, patience, |f| f.is_none()));
        self.failure()
    }

    /// Readable once the group has failed.
    pub(super) fn wake(&self) -> &Waker {
        &self.wake
    }

    pub(super) fn abort(&self, message: &str) {
        let end = (0..=message.len().min(MAX_REASON)).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
        self.tell_all(ABORT, &message.as_bytes()[..end]);
    }

    pub(super) fn leave(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.tell_all(LEAVE, &[]);
    }

    /// Ends the thread.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        for control in self.controls.iter().flatten() {
            let control = control.lock().unwrap_or_else(|e| e.into_inner());
            let _ = control.stream().shutdown(std::net::Shutdown::Both);
        }
    }

    fn tell_all(&self, kind: u8, text: &[u8]) {
        let mut message = vec![kind];
        message.extend((text.len() as u16).to_le_bytes());
        message.extend(text);
        for control in self.controls.iter().flatten() {
            let mut control = control.lock().unwrap_or_else(|e| e.into_inner());
            // A full or closed connection is noticed by its reader.
            let _ = control.write_all(&message);
        }
    }

    fn fail(&self, error: CommError) {
        let mut failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        if failure.is_none() && !self.stopped.load(Ordering::Relaxed) {
            *failure = Some(error);
            wake(&self.wake_sender);
            self.failed.notify_all();
        }
    }

    fn watch(
        &self,
        mut watched: Vec<Watched>,
        hosts: &[String],
        deadline: Duration,
        on_failure: &(dyn Fn(&CommError) + Send),
    ) {
        // Detection, notice and exit together must fit in the deadline.
        let limit = deadline.mul_f64(0.7);
        let beat = (deadline / 10).clamp(Duration::from_millis(20), Duration::from_secs(1));
        let mut next_beat = Instant::now();
        let mut last_turn = Instant::now();
        while !self.stopped.load(Ordering::Relaxed) {
            if Instant::now() >= next_beat {
                self.tell_all(ALIVE, &[]);
                next_beat = Instant::now() + beat;
            }
            let mut fds: Vec<PollFd<'_>> =
                watched.iter().filter(|w| w.open).map(|w| PollFd::new(&w.stream, PollFlags::IN)).collect();
            let nanoseconds = beat.as_nanos().min(999_999_999) as _;
            let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: nanoseconds }));
            drop(fds);
            let now = Instant::now();
            // This process itself was suspended: the others' silence meanwhile means nothing.
            let suspended = now - last_turn > limit / 2;
            last_turn = now;
            for w in watched.iter_mut().filter(|w| w.open) {
                if suspended {
                    w.seen = now;
                }
                let failure = match w.read(now) {
                    Some(failure) => Some(failure),
                    None if now - w.seen > limit => Some(Failure::Stalled { seconds: (now - w.seen).as_secs_f64() }),
                    None => None,
                };
                if let Some(failure) = failure.filter(|_| !w.left) {
                    self.fail(CommError::by(w.rank, &hosts[w.rank], failure));
                }
            }
            if let Some(error) = self.failure() {
                self.insist(&error, deadline.mul_f64(0.2), on_failure);
                return;
            }
        }
    }

    /// Gives the rank's own thread some time to end with the error, then ends the process for it.
    fn insist(&self, error: &CommError, grace: Duration, on_failure: &(dyn Fn(&CommError) + Send)) {
        let start = Instant::now();
        while start.elapsed() < grace {
            std::thread::sleep(Duration::from_millis(10));
            if self.stopped.load(Ordering::Relaxed) {
                return;
            }
        }
        on_failure(error);
    }
}

impl Watched {
    /// Takes in what has arrived; a failure if the rank has one.
    fn read(&mut self, now: Instant) -> Option<Failure> {
        let mut bytes = [0; 512];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => {
                    self.open = false;
                    let failure = self.messages();
                    return failure.or(Some(Failure::Lost { why: "its process has ended".to_string() }));
                }
                Ok(n) => {
                    self.seen = now;
                    self.buffer.extend(&bytes[..n]);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return self.messages(),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => {
                    self.open = false;
                    return self.messages().or(Some(failure_of(&e)));
                }
            }
        }
    }

    /// Whole messages of the buffer.
    fn messages(&mut self) -> Option<Failure> {
        while let [kind, low, high, ..] = self.buffer[..] {
            let length = usize::from(u16::from_le_bytes([low, high]));
            let text = self.buffer.get(3..3 + length)?.to_vec();
            self.buffer.drain(..3 + length);
            match kind {
                ALIVE => {}
                LEAVE => self.left = true,
                ABORT => return Some(Failure::Stopped { message: String::from_utf8_lossy(&text).into_owned() }),
                other => {
                    return Some(Failure::Protocol { message: format!("control message of unknown kind {other}") });
                }
            }
        }
        None
    }
}
