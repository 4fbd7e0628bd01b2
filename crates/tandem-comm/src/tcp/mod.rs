//! Ranks as processes over TCP, with nothing to install.
//!
//! Three connections per pair of ranks: two for messages, read and written by the rank's own thread, and one for signs of
//! life, kept by a thread of its own (`health`) so that a rank that computes for long still answers. Figures:
//! bench/runs/2026-11-23-comm.

mod handshake;
mod health;
mod waker;
mod wire;

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use handshake::{Hello, SECRET_BYTES, Secret};
use health::Health;
use wire::Wire;

use crate::error::{CommError, Failure};
use crate::frame::{Counters, HEADER, Header};
use crate::transport::{Channel, Incoming, Transport, Wait};

/// A rank stays awake from this long before a message is due, by the last one, until this long after: a sleeping core takes
/// 50 to 250 us to wake up, as long as a hop between hosts. It shares the core with what else wants it, so not for longer.
const AWAKE: Duration = Duration::from_millis(2);
/// Activations of at least this many bytes go half over each of two connections.
const DIVIDED: usize = 512 << 10;
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
    /// What ranks send to each other is encrypted; all must agree on it.
    pub encrypt: bool,
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
    stream: Wire,
    /// Takes the second parts of long messages.
    second: Wire,
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
        let before = self.n_waiting();
        while !self.posted.is_empty() {
            match self.stream.write(self.posted.as_slices().0) {
                Ok(n) => drop(self.posted.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(failure_of(&e)),
            }
        }
        for wire in [&mut self.stream, &mut self.second] {
            moved(wire.flush().map(|()| 0))?;
        }
        Ok(self.n_waiting() < before)
    }

    /// Bytes that the connections have not taken of what they were given.
    fn n_waiting(&self) -> usize {
        self.posted.len() + self.stream.n_waiting() + self.second.n_waiting()
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
            Some(streams) => {
                let nonblocking = streams.iter().try_for_each(|wire| wire.stream().set_nonblocking(true));
                nonblocking.map_err(|e| CommError::setup(format!("cannot prepare a connection: {e}")))?;
                let [stream, control, second] = streams;
                links.push(Some(Link {
                    stream,
                    second,
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

/// Bytes of a message's first part; the rest goes over the second connection.
fn first_part(channel: Channel, length: usize) -> usize {
    if channel == Channel::Data && length >= DIVIDED { length / 2 } else { length }
}

/// What a call on a connection moved; none when the connection is not ready.
fn moved(result: std::io::Result<usize>) -> Result<Option<usize>, Failure> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(failure_of(&e)),
    }
}

/// A rank whose connection broke is gone; one whose messages do not open has not sent them so.
fn failure_of(error: &std::io::Error) -> Failure {
    match error.kind() {
        ErrorKind::InvalidData => Failure::Protocol { message: error.to_string() },
        _ => Failure::Lost { why: error.to_string() },
    }
}

/// A message on its way out.
struct Sending<'a> {
    to: usize,
    header: [u8; HEADER],
    first: &'a [u8],
    second: &'a [u8],
    /// Bytes of header and first part that are gone.
    done: usize,
    second_done: usize,
}

/// A message on its way in.
struct Receiving<'a> {
    from: usize,
    channel: Channel,
    into: Incoming<'a>,
    header: [u8; HEADER],
    /// Bytes of header and first part that are here.
    done: usize,
    second_done: usize,
    parsed: Option<Header>,
    /// A message of another channel.
    early: Vec<u8>,
    finished: bool,
}

impl Sending<'_> {
    /// Writes what the connections take, behind what was posted; true when progress was made.
    fn advance(&mut self, link: &mut Link) -> Result<bool, Failure> {
        let mut progress = false;
        loop {
            let mut n = 0;
            if link.posted.is_empty() && self.first_waits() {
                let result = if self.done < HEADER {
                    link.stream.write_vectored(&[IoSlice::new(&self.header[self.done..]), IoSlice::new(self.first)])
                } else {
                    link.stream.write(&self.first[self.done - HEADER..])
                };
                n = moved(result)?.unwrap_or(0);
                self.done += n;
            }
            if self.second_waits() {
                let second = moved(link.second.write(&self.second[self.second_done..]))?.unwrap_or(0);
                self.second_done += second;
                n += second;
            }
            if n == 0 {
                return Ok(progress);
            }
            progress = true;
        }
    }

    fn first_waits(&self) -> bool {
        self.done < HEADER + self.first.len()
    }

    fn second_waits(&self) -> bool {
        self.second_done < self.second.len()
    }

    fn finished(&self) -> bool {
        !self.first_waits() && !self.second_waits()
    }
}

impl Receiving<'_> {
    /// Reads what is there; true when progress was made.
    fn advance(&mut self, link: &mut Link) -> Result<bool, Failure> {
        let closed = || Failure::Lost { why: "it closed the connection".to_string() };
        let mut progress = false;
        while !self.finished {
            let mut ready = false;
            if self.first_waits()
                && let Some(n) = moved(self.read(link))?
            {
                ready = true;
                self.done += if n == 0 { return Err(closed()) } else { n };
                if self.parsed.is_none() && self.done >= HEADER {
                    self.parse(link)?;
                }
            }
            if self.second_waits()
                && let Some(n) = moved(self.read_second(link))?
            {
                ready = true;
                self.second_done += if n == 0 { return Err(closed()) } else { n };
            }
            if !ready {
                break;
            }
            progress = true;
            let Some(header) = self.parsed else { continue };
            if !self.first_waits() && !self.second_waits() {
                if header.channel == self.channel {
                    self.finished = true;
                } else {
                    link.early[header.channel as usize].push_back(std::mem::take(&mut self.early));
                    (self.done, self.second_done, self.parsed) = (0, 0, None);
                }
            }
        }
        Ok(progress)
    }

    fn first_waits(&self) -> bool {
        self.parsed.is_none_or(|h| self.done < HEADER + first_part(h.channel, h.length))
    }

    fn second_waits(&self) -> bool {
        self.parsed.is_some_and(|h| self.second_done < h.length - first_part(h.channel, h.length))
    }

    /// Where the payload of a message with this header goes.
    fn payload(&mut self, header: &Header) -> &mut [u8] {
        match &mut self.into {
            _ if header.channel != self.channel => &mut self.early,
            Incoming::Exact(into) => into,
            Incoming::Any(into) => into,
        }
    }

    fn read(&mut self, link: &mut Link) -> std::io::Result<usize> {
        match (self.parsed, &mut self.into) {
            // Header and payload in one call, when the length is known beforehand.
            (None, Incoming::Exact(into)) if link.again.is_empty() => {
                let n = first_part(self.channel, into.len());
                let header = IoSliceMut::new(&mut self.header[self.done..]);
                link.stream.read_vectored(&mut [header, IoSliceMut::new(&mut into[..n])])
            }
            (None, _) => link.read(&mut self.header[self.done..]),
            (Some(header), _) => {
                let here = self.done - HEADER..first_part(header.channel, header.length);
                link.read(&mut self.payload(&header)[here])
            }
        }
    }

    fn read_second(&mut self, link: &mut Link) -> std::io::Result<usize> {
        let Some(header) = self.parsed else { return Ok(0) };
        let start = first_part(header.channel, header.length) + self.second_done;
        link.second.read(&mut self.payload(&header)[start..])
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
                let first = here.min(first_part(header.channel, header.length));
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
            if let Some(link) = self.links[rank].as_mut().filter(|link| link.n_waiting() > 0) {
                progress |= link.post().map_err(|failure| self.explain(rank, failure, wait))?;
            }
        }
        Ok(progress)
    }

    /// Waits until a connection is ready, the group fails, or 100 ms pass; `due` is when the message should come.
    fn sleep(&self, sending: Option<&Sending>, receiving: Option<&Receiving>, due: Instant) -> std::io::Result<()> {
        let mut fds = Vec::with_capacity(5);
        let sending = sending.map(|s| (s.to, s.first_waits(), s.second_waits(), PollFlags::OUT));
        let receiving = receiving.map(|r| (r.from, r.first_waits(), r.second_waits(), PollFlags::IN));
        for (rank, first, second, flags) in sending.into_iter().chain(receiving) {
            let Some(link) = &self.links[rank] else { continue };
            let waiting = [first.then_some(&link.stream), second.then_some(&link.second)];
            fds.extend(waiting.into_iter().flatten().map(|wire| PollFd::new(wire, flags)));
        }
        for link in self.links.iter().flatten() {
            let waiting = [!link.posted.is_empty() || link.stream.n_waiting() > 0, link.second.n_waiting() > 0];
            let wires = [&link.stream, &link.second].into_iter().zip(waiting).filter(|(_, waits)| *waits);
            fds.extend(wires.map(|(wire, _)| PollFd::new(wire, PollFlags::OUT)));
        }
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
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: asleep.as_nanos() as _ })) {
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
            let (first, second) = data.split_at(first_part(channel, data.len()));
            Sending { to, header: header.encode(), first, second, done: 0, second_done: 0 }
        });
        if let (Some(Sending { to, header, first, .. }), Channel::Command) = (&sending, channel) {
            let posted = &mut self.link(*to).posted;
            posted.extend(header);
            posted.extend(*first);
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
                    receiving = Some(Receiving {
                        from,
                        channel,
                        into,
                        header,
                        done: 0,
                        second_done: 0,
                        parsed: None,
                        early,
                        finished,
                    });
                }
            }
        }
        loop {
            let mut progress = self.post(wait)?;
            if let Some(s) = &mut sending {
                let result = s.advance(self.link(s.to));
                progress |= result.map_err(|f| self.explain(s.to, f, wait))?;
            }
            // Nobody else would send what is sealed but not gone.
            sending = sending.filter(|s| !s.finished() || self.link(s.to).n_waiting() > 0);
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
            let from = receiving.as_ref().map(|r| r.from);
            let due = start + from.map_or(Duration::ZERO, |from| self.link(from).waited[channel as usize]);
            let asleep = Instant::now();
            self.sleep(sending.as_ref(), receiving.as_ref(), due)
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
