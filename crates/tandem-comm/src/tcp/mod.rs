//! Ranks as processes over TCP, with nothing to install.
//!
//! Two connections per pair of ranks: one for messages, read and written by the rank's own thread, and one for signs of
//! life, kept by a thread of its own ([`health`]) so that a rank that computes for long still answers. Figures:
//! bench/runs/2026-11-23-comm.

mod handshake;
mod health;

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use handshake::{Hello, SECRET_BYTES, Secret};
use health::Health;

use crate::error::{CommError, Failure};
use crate::frame::{Counters, HEADER, Header};
use crate::transport::{Channel, Incoming, Transport, Wait};

/// A rank stays awake from this long before a message is due, by the last one, until this long after: a sleeping core takes
/// 50 to 250 us to wake up, as long as a hop between hosts. It shares the core with what else wants it, so not for longer.
const AWAKE: Duration = Duration::from_millis(2);
/// A turn that takes longer than this was not spent waiting.
const SUSPENDED: Duration = Duration::from_secs(1);
/// How long the reason of a closed connection may take to arrive on the other one.
const REASON: Duration = Duration::from_millis(300);

/// One rank's place.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Name for messages.
    pub host: String,
    /// Where it listens.
    pub address: SocketAddr,
}

/// What is needed to form a group.
pub struct TcpConfig {
    /// This rank.
    pub rank: usize,
    /// Every rank, this one included.
    pub peers: Vec<Peer>,
    /// Known to the ranks of this launch only.
    pub secret: Secret,
    /// Counts restarts; ranks of different generations do not meet.
    pub generation: u32,
    /// Compared between all ranks.
    pub hello: Hello,
    /// A rank that gives no sign of life for this long is taken for dead.
    pub deadline: Duration,
    /// For all connections together.
    pub start_timeout: Duration,
    /// Called from another thread when the group has failed and this rank has not left it within a fifth of the deadline;
    /// it should end the process.
    pub on_failure: Box<dyn Fn(&CommError) + Send>,
}

/// One rank of a group of processes.
pub struct Tcp {
    rank: usize,
    /// This rank's own place is empty.
    links: Vec<Option<Link>>,
    hosts: Vec<String>,
    health: Arc<Health>,
}

struct Link {
    stream: TcpStream,
    sent: Counters,
    received: Counters,
    /// Messages that arrived while one of another channel was awaited.
    early: [VecDeque<Vec<u8>>; Channel::N],
    /// Bytes that were read together with a shorter message in front of them.
    again: VecDeque<u8>,
    /// Commands that the connection has not taken yet.
    posted: VecDeque<u8>,
    /// How long the last message of each channel was waited for.
    waited: [Duration; Channel::N],
}

impl Link {
    /// Writes what the connection takes of the commands; true when progress was made.
    fn post(&mut self) -> Result<bool, Failure> {
        let before = self.posted.len();
        while !self.posted.is_empty() {
            match self.stream.write(self.posted.as_slices().0) {
                Ok(n) => drop(self.posted.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::Lost { why: e.to_string() }),
            }
        }
        Ok(self.posted.len() < before)
    }

    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if self.again.is_empty() { self.stream.read(into) } else { self.again.read(into) }
    }
}

/// Listens on `address`; port 0 takes a free one.
///
/// # Errors
/// The address is not this machine's, or the port is taken.
pub fn listen(address: SocketAddr) -> Result<TcpListener, CommError> {
    TcpListener::bind(address).map_err(|e| {
        CommError::setup(format!(
            "cannot listen on {address}: {e}. The hostfile must list, for each host, an address that this host has; \
             --starting-port changes the port"
        ))
    })
}

/// Meets the other ranks: every pair of ranks proves to each other that it knows the secret before anything else is
/// read, and compares versions and models.
///
/// # Errors
/// A rank does not come in time, or runs another version or model.
pub fn connect(listener: TcpListener, config: TcpConfig) -> Result<Tcp, CommError> {
    let connections = handshake::meet(listener, &config)?;
    let hosts: Vec<String> = config.peers.iter().map(|p| p.host.clone()).collect();
    let mut links = vec![];
    let mut controls = vec![];
    for connection in connections {
        match connection {
            None => {
                links.push(None);
                controls.push(None);
            }
            Some([data, control]) => {
                let nonblocking = data.set_nonblocking(true).and_then(|()| control.set_nonblocking(true));
                nonblocking.map_err(|e| CommError::setup(format!("cannot prepare a connection: {e}")))?;
                links.push(Some(Link {
                    stream: data,
                    sent: Counters::default(),
                    received: Counters::default(),
                    early: Default::default(),
                    again: VecDeque::new(),
                    posted: VecDeque::new(),
                    waited: Default::default(),
                }));
                controls.push(Some(control));
            }
        }
    }
    let health = Health::start(controls, hosts.clone(), config.deadline, config.on_failure)?;
    Ok(Tcp { rank: config.rank, links, hosts, health })
}

/// A message on its way out.
struct Sending<'a> {
    to: usize,
    header: [u8; HEADER],
    data: &'a [u8],
    done: usize,
}

/// A message on its way in.
struct Receiving<'a> {
    from: usize,
    channel: Channel,
    into: Incoming<'a>,
    header: [u8; HEADER],
    /// Bytes of header and payload that are here.
    done: usize,
    parsed: Option<Header>,
    /// A message of another channel.
    early: Vec<u8>,
    finished: bool,
}

impl Sending<'_> {
    /// Writes what the connection takes, behind what was posted; true when progress was made.
    fn advance(&mut self, link: &mut Link) -> Result<bool, Failure> {
        let before = self.done;
        while link.posted.is_empty() && !self.finished() {
            let result = if self.done < HEADER {
                link.stream.write_vectored(&[IoSlice::new(&self.header[self.done..]), IoSlice::new(self.data)])
            } else {
                link.stream.write(&self.data[self.done - HEADER..])
            };
            match result {
                Ok(n) => self.done += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::Lost { why: e.to_string() }),
            }
        }
        Ok(self.done > before)
    }

    fn finished(&self) -> bool {
        self.done == HEADER + self.data.len()
    }
}

impl Receiving<'_> {
    /// Reads what is there; true when progress was made.
    fn advance(&mut self, link: &mut Link) -> Result<bool, Failure> {
        let mut progress = false;
        while !self.finished {
            match self.read(link) {
                Ok(0) => return Err(Failure::Lost { why: "it closed the connection".to_string() }),
                Ok(n) => self.done += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(Failure::Lost { why: e.to_string() }),
            }
            progress = true;
            if self.parsed.is_none() && self.done >= HEADER {
                self.parse(link)?;
            }
            let Some(header) = self.parsed else { continue };
            if self.done == HEADER + header.length {
                if header.channel == self.channel {
                    self.finished = true;
                } else {
                    link.early[header.channel as usize].push_back(std::mem::take(&mut self.early));
                    (self.done, self.parsed) = (0, None);
                }
            }
        }
        Ok(progress)
    }

    fn read(&mut self, link: &mut Link) -> std::io::Result<usize> {
        match (self.parsed, &mut self.into) {
            // Header and payload in one call, when the length is known beforehand.
            (None, Incoming::Exact(into)) if link.again.is_empty() => {
                link.stream.read_vectored(&mut [IoSliceMut::new(&mut self.header[self.done..]), IoSliceMut::new(into)])
            }
            (None, _) => link.read(&mut self.header[self.done..]),
            (Some(header), into) if header.channel == self.channel => {
                let at = self.done - HEADER;
                match into {
                    Incoming::Exact(into) => link.read(&mut into[at..]),
                    Incoming::Any(into) => link.read(&mut into[at..]),
                }
            }
            (Some(_), _) => link.read(&mut self.early[self.done - HEADER..]),
        }
    }

    fn parse(&mut self, link: &mut Link) -> Result<(), Failure> {
        let header = Header::decode(&self.header)?;
        link.received.check(&header)?;
        if header.channel == self.channel {
            self.into.room(header.length)?;
        } else {
            self.early.resize(header.length, 0);
            // What was read behind the header lies where the awaited message goes.
            if let Incoming::Exact(into) = &self.into {
                let here = self.done - HEADER;
                let first = here.min(header.length);
                self.early[..first].copy_from_slice(&into[..first]);
                link.again.extend(&into[first..here]);
                self.done = HEADER + first;
            }
        }
        self.parsed = Some(header);
        Ok(())
    }
}

impl Tcp {
    /// The error of a connection: what its rank, or the rank behind it, said before it closed, if it said something.
    fn explain(&self, rank: usize, failure: Failure, wait: Wait) -> CommError {
        if matches!(failure, Failure::Lost { .. })
            && let Some(reason) = self.health.wait_for_failure(REASON)
        {
            return reason.while_doing(wait.doing);
        }
        CommError::by(rank, &self.hosts[rank], failure).while_doing(wait.doing)
    }

    fn link(&mut self, rank: usize) -> &mut Link {
        self.links[rank].as_mut().unwrap_or_else(|| panic!("rank {rank} sends to itself"))
    }

    /// Writes on at what was posted; true when progress was made.
    fn post(&mut self, wait: Wait) -> Result<bool, CommError> {
        let mut progress = false;
        for rank in 0..self.links.len() {
            if let Some(link) = self.links[rank].as_mut().filter(|link| !link.posted.is_empty()) {
                progress |= link.post().map_err(|failure| self.explain(rank, failure, wait))?;
            }
        }
        Ok(progress)
    }

    /// Waits until a connection is ready, the group fails, or 100 ms pass; `due` is when the message should come.
    fn sleep(&self, sending: Option<usize>, receiving: Option<usize>, due: Instant) -> std::io::Result<()> {
        let mut fds = Vec::with_capacity(3);
        for (rank, flags) in [(sending, PollFlags::OUT), (receiving, PollFlags::IN)] {
            if let Some(link) = rank.and_then(|r| self.links[r].as_ref()) {
                fds.push(PollFd::new(&link.stream, flags));
            }
        }
        let posting = self.links.iter().flatten().filter(|link| !link.posted.is_empty());
        fds.extend(posting.map(|link| PollFd::new(&link.stream, PollFlags::OUT)));
        fds.push(PollFd::new(self.health.wake(), PollFlags::IN));
        let turn = Duration::from_millis(100);
        let asleep = due.saturating_duration_since(Instant::now() + AWAKE).min(turn);
        while asleep.is_zero() && Instant::now() < due + AWAKE {
            // Reading, to see whether something is there, would lock the connection against what arrives.
            if poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n_ready| n_ready > 0) {
                return Ok(());
            }
            std::thread::yield_now();
        }
        let asleep = if asleep.is_zero() { turn } else { asleep };
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: asleep.as_nanos() as i64 })) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Transport for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.links.len()
    }

    fn host(&self, rank: usize) -> String {
        self.hosts[rank].clone()
    }

    fn exchange(
        &mut self,
        channel: Channel,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, Incoming<'_>)>,
        wait: Wait,
    ) -> Result<(), CommError> {
        if let Some(error) = self.health.failure() {
            return Err(error.while_doing(wait.doing));
        }
        let mut start = Instant::now();
        let mut sending = send.map(|(to, data)| {
            let header = Header { channel, sequence: self.link(to).sent.next(channel), length: data.len() };
            Sending { to, header: header.encode(), data, done: 0 }
        });
        if let (Some(Sending { to, header, data, .. }), Channel::Command) = (&sending, channel) {
            let posted = &mut self.link(*to).posted;
            posted.extend(header);
            posted.extend(*data);
            sending = None;
        }
        let mut receiving = None;
        if let Some((from, mut into)) = recv {
            match self.link(from).early[channel as usize].pop_front() {
                Some(message) => into.fill(&message).map_err(|f| self.explain(from, f, wait))?,
                None => {
                    let header = [0; HEADER];
                    let early = vec![];
                    let finished = false;
                    receiving = Some(Receiving { from, channel, into, header, done: 0, parsed: None, early, finished });
                }
            }
        }
        loop {
            let mut progress = self.post(wait)?;
            if let Some(s) = &mut sending {
                let result = s.advance(self.link(s.to));
                progress |= result.map_err(|f| self.explain(s.to, f, wait))?;
            }
            sending = sending.filter(|s| !s.finished());
            if let Some(r) = &mut receiving {
                let from = r.from;
                let result = r.advance(self.link(from));
                progress |= result.map_err(|f| self.explain(from, f, wait))?;
            }
            if let Some(r) = receiving.take_if(|r| r.finished) {
                self.link(r.from).waited[channel as usize] = start.elapsed();
            }
            if sending.is_none() && receiving.is_none() {
                return Ok(());
            }
            if progress {
                continue;
            }
            let waited = start.elapsed();
            if let Some(error) = self.health.failure() {
                return Err(error.while_doing(wait.doing));
            }
            let awaited = receiving.as_ref().map(|r| r.from).or(sending.as_ref().map(|s| s.to));
            if let (Some(patience), Some(rank)) = (wait.patience, awaited)
                && waited >= patience
            {
                return Err(self.explain(rank, Failure::Stalled { seconds: waited.as_secs_f64() }, wait));
            }
            let (to, from) = (sending.as_ref().map(|s| s.to), receiving.as_ref().map(|r| r.from));
            let due = start + from.map_or(Duration::ZERO, |from| self.link(from).waited[channel as usize]);
            let asleep = Instant::now();
            self.sleep(to, from, due)
                .map_err(|e| CommError::setup(format!("the system cannot wait for connections: {e}")))?;
            // A turn waits for some 100 ms: in a longer one this process was suspended, which is no fault of the others.
            if asleep.elapsed() > SUSPENDED {
                start += asleep.elapsed();
            }
        }
    }

    fn abort(&mut self, message: &str) {
        self.health.abort(message);
    }

    fn leave(&mut self) {
        self.health.leave();
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.health.stop();
    }
}
