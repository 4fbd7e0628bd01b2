//! How ranks meet: who connects to whom, and the proof that a connection belongs to this launch.
//!
//! Rank i connects to every lower rank and accepts from every higher one, three times each (messages, signs of life, second
//! parts of long messages):
//!
//! ```text
//! connector -> acceptor   magic [8], nonce c [32]
//! acceptor  -> connector  nonce a [32]
//! connector -> acceptor   from u16, connection u8, HMAC-SHA256(secret, "c" + what is proved) [32]
//! acceptor  -> connector  HMAC-SHA256(secret, "a" + what is proved) [32]
//! both, if encrypted      Noise_NNpsk0 [48], with HMAC-SHA256(secret, "k" + what is proved) as its key
//! both                    length u32, hello as JSON
//! ```
//!
//! What is proved: generation, both ranks, the connection's kind, whether it is encrypted and both nonces, so that an answer
//! fits one connection only. Nothing of variable length is read before the proof; proofs are compared in constant time. A
//! connection without proof is dropped and the meeting goes on.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::TcpConfig;
use super::wire::Wire;
use crate::error::CommError;

/// Bytes of a launch's secret.
pub const SECRET_BYTES: usize = 32;
const MAGIC: &[u8; 8] = b"TANDEM/1";
const NONCE: usize = 32;
const PROOF: usize = 32;
const FIRST: usize = MAGIC.len() + NONCE;
const SECOND: usize = 3 + PROOF;
/// Connections of one pair of ranks: messages, signs of life, second parts of long messages.
const N_CONNECTIONS: usize = 3;
/// In the byte of a connection's kind: it is encrypted.
const ENCRYPTED: u8 = 0x80;
/// A stranger may keep a connection open for this long.
const STRANGER: Duration = Duration::from_secs(5);
/// Strangers at once; the oldest goes first.
const MAX_PENDING: usize = 256;
/// Longest hello.
const MAX_HELLO: usize = 8192;

/// Known to the ranks of one launch. It is not printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub [u8; SECRET_BYTES]);

impl Secret {
    /// A new one from the system's generator.
    ///
    /// # Errors
    /// The system has none.
    pub fn random() -> Result<Secret, CommError> {
        random().map(Secret)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What all ranks must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the program.
    pub version: String,
    /// Hash of the model's configuration and tensor table.
    pub model: String,
}

fn random() -> Result<[u8; 32], CommError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|e| CommError::setup(format!("the system has no random numbers: {e}")))?;
    Ok(bytes)
}

struct Proved<'a> {
    config: &'a TcpConfig,
    from: u16,
    to: u16,
    /// With [`ENCRYPTED`], if it is.
    connection: u8,
    nonce_c: [u8; NONCE],
    nonce_a: [u8; NONCE],
}

impl Proved<'_> {
    fn mac(&self, role: &[u8; 1]) -> Hmac<Sha256> {
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.config.secret.0) else {
            unreachable!("HMAC takes keys of any length")
        };
        mac.update(role);
        mac.update(&self.config.generation.to_le_bytes());
        mac.update(&self.from.to_le_bytes());
        mac.update(&self.to.to_le_bytes());
        mac.update(&[self.connection]);
        mac.update(&self.nonce_c);
        mac.update(&self.nonce_a);
        mac
    }

    fn proof(&self, role: &[u8; 1]) -> [u8; PROOF] {
        self.mac(role).finalize().into_bytes().into()
    }

    fn verify(&self, role: &[u8; 1], proof: &[u8]) -> bool {
        self.mac(role).verify_slice(proof).is_ok()
    }

    /// The same connection, seen by a side that encrypts if this one does not.
    fn other_mode(&self) -> Proved<'_> {
        Proved { connection: self.connection ^ ENCRYPTED, ..*self }
    }

    /// What the connection is from now on.
    fn wire(&self, stream: TcpStream, is_connector: bool) -> std::io::Result<Wire> {
        if self.config.encrypt {
            Wire::sealed(stream, &self.proof(b"k"), is_connector)
        } else {
            Ok(Wire::plain(stream))
        }
    }
}

/// Two ranks that belong together, of which only one encrypts.
fn mixed(config: &TcpConfig, peer: usize) -> CommError {
    let how = |is_encrypted| if is_encrypted { "with --encrypt" } else { "without --encrypt" };
    CommError::setup(format!(
        "rank {peer} ({}) was started {}, this rank ({}) {}; start all ranks with it or all without it",
        config.peers[peer].host,
        how(!config.encrypt),
        config.peers[config.rank].host,
        how(config.encrypt),
    ))
}

/// The connections to every rank; this rank's own place is empty.
pub(super) fn meet(listener: TcpListener, config: &TcpConfig) -> Result<Vec<Option<[Wire; N_CONNECTIONS]>>, CommError> {
    let deadline = Instant::now() + config.start_timeout;
    let mut found: Vec<[Option<Wire>; N_CONNECTIONS]> = config.peers.iter().map(|_| Default::default()).collect();
    for (peer, places) in found.iter_mut().enumerate().take(config.rank) {
        for (connection, place) in places.iter_mut().enumerate() {
            *place = Some(connect_to(config, peer, connection as u8, deadline)?);
        }
    }
    Acceptor { config, found: &mut found, pending: vec![], n_strangers: 0 }.run(listener, deadline)?;
    let mut connections = vec![];
    for (rank, streams) in found.into_iter().enumerate() {
        connections.push(match streams {
            [Some(first), Some(control), Some(second)] if rank != config.rank => Some([first, control, second]),
            _ => None,
        });
    }
    Ok(connections)
}

/// Proves this rank to a lower one.
fn connect_to(config: &TcpConfig, peer: usize, connection: u8, deadline: Instant) -> Result<Wire, CommError> {
    let place = &config.peers[peer];
    let mut last = "no answer".to_string();
    while Instant::now() < deadline {
        match try_connect(config, place.address, peer, connection, deadline) {
            Ok(Some(mut wire)) => {
                exchange_hellos(&mut wire, config, peer)?;
                return Ok(wire);
            }
            Ok(None) => return Err(mixed(config, peer)),
            Err(e) => last = e.to_string(),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(CommError::setup(format!(
        "rank {peer} ({}) could not be reached at {} within {:.0} s: {last}. Check that the address belongs to that host \
         and that no firewall is between",
        place.host,
        place.address,
        config.start_timeout.as_secs_f64()
    )))
}

/// None: the other side belongs to the launch, and only one of the two encrypts.
fn try_connect(
    config: &TcpConfig,
    address: SocketAddr,
    peer: usize,
    connection: u8,
    deadline: Instant,
) -> std::io::Result<Option<Wire>> {
    let refused = |message: &str| std::io::Error::new(ErrorKind::PermissionDenied, message.to_string());
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let mut stream = TcpStream::connect_timeout(&address, left.min(Duration::from_secs(5)))?;
    stream.set_nodelay(true)?;
    // A lower rank may still be meeting ranks below it.
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))?;
    let nonce_c = random().map_err(|e| refused(&e.to_string()))?;
    stream.write_all(&[MAGIC.as_slice(), &nonce_c].concat())?;
    let mut nonce_a = [0; NONCE];
    stream.read_exact(&mut nonce_a)?;
    let connection = if config.encrypt { connection | ENCRYPTED } else { connection };
    let proved = Proved { config, from: config.rank as u16, to: peer as u16, connection, nonce_c, nonce_a };
    let mut second = proved.from.to_le_bytes().to_vec();
    second.push(connection);
    second.extend(proved.proof(b"c"));
    stream.write_all(&second)?;
    let mut proof = [0; PROOF];
    stream.read_exact(&mut proof)?;
    if proved.other_mode().verify(b"a", &proof) {
        return Ok(None);
    }
    if !proved.verify(b"a", &proof) {
        return Err(refused("what listens there does not belong to this launch"));
    }
    proved.wire(stream, true).map(Some)
}

/// Accepts from higher ranks, and gets rid of everyone else.
struct Acceptor<'a> {
    config: &'a TcpConfig,
    found: &'a mut [[Option<Wire>; N_CONNECTIONS]],
    pending: Vec<Pending>,
    n_strangers: usize,
}

/// A connection that has not proved itself.
struct Pending {
    stream: TcpStream,
    from: SocketAddr,
    since: Instant,
    nonce_a: [u8; NONCE],
    /// First and second message.
    read: Vec<u8>,
}

impl Acceptor<'_> {
    fn missing(&self) -> Option<usize> {
        (self.config.rank + 1..self.found.len()).find(|r| self.found[*r].iter().any(Option::is_none))
    }

    fn run(&mut self, listener: TcpListener, deadline: Instant) -> Result<(), CommError> {
        let broken = |e: std::io::Error| CommError::setup(format!("cannot accept connections: {e}"));
        listener.set_nonblocking(true).map_err(broken)?;
        while let Some(missing) = self.missing() {
            if Instant::now() >= deadline {
                return Err(CommError::setup(format!(
                    "rank {missing} ({}) did not connect within {:.0} s; see its output, and check that no firewall is \
                     between the hosts",
                    self.config.peers[missing].host,
                    self.config.start_timeout.as_secs_f64()
                )));
            }
            let mut fds = vec![PollFd::new(&listener, PollFlags::IN)];
            fds.extend(self.pending.iter().map(|p| PollFd::new(&p.stream, PollFlags::IN)));
            let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 }));
            drop(fds);
            loop {
                match listener.accept() {
                    Ok((stream, from)) => self.welcome(stream, from)?,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    // A connection that ended before it was accepted, or too many open files: not this group's end.
                    Err(e) => {
                        tracing::debug!("a connection was not accepted: {e}");
                        break;
                    }
                }
            }
            for pending in std::mem::take(&mut self.pending) {
                self.advance(pending)?;
            }
        }
        if self.n_strangers > 0 {
            tracing::warn!("{} connections did not belong to this launch and were dropped", self.n_strangers);
        }
        Ok(())
    }

    fn welcome(&mut self, stream: TcpStream, from: SocketAddr) -> Result<(), CommError> {
        if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
            return Ok(());
        }
        if self.pending.len() >= MAX_PENDING {
            let oldest = self.pending.remove(0);
            self.drop_stranger(oldest.from, "too many connections at once");
        }
        self.pending.push(Pending { stream, from, since: Instant::now(), nonce_a: random()?, read: vec![] });
        Ok(())
    }

    fn drop_stranger(&mut self, from: SocketAddr, why: &str) {
        self.n_strangers += 1;
        if self.n_strangers <= 5 {
            tracing::warn!("dropped a connection from {from} that does not belong to this launch: {why}");
        }
    }

    /// Reads on; keeps, drops or takes over the connection.
    fn advance(&mut self, mut pending: Pending) -> Result<(), CommError> {
        loop {
            let before = pending.read.len();
            let wanted = if before < FIRST { FIRST } else { FIRST + SECOND };
            let mut bytes = [0; FIRST + SECOND];
            match pending.stream.read(&mut bytes[..wanted - before]) {
                Ok(0) => {
                    self.drop_stranger(pending.from, "it closed without a proof");
                    return Ok(());
                }
                Ok(n) => pending.read.extend(&bytes[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    if pending.since.elapsed() < STRANGER {
                        self.pending.push(pending);
                    } else {
                        self.drop_stranger(pending.from, "it did not prove itself in time");
                    }
                    return Ok(());
                }
                Err(e) => {
                    self.drop_stranger(pending.from, &e.to_string());
                    return Ok(());
                }
            }
            let known = pending.read.len().min(MAGIC.len());
            if pending.read[..known] != MAGIC[..known] {
                self.drop_stranger(pending.from, "it does not speak this protocol");
                return Ok(());
            }
            if before < FIRST && pending.read.len() == FIRST {
                // 32 bytes always fit in the buffer of a new connection.
                if pending.stream.write_all(&pending.nonce_a).is_err() {
                    self.drop_stranger(pending.from, "it does not listen");
                    return Ok(());
                }
            }
            if pending.read.len() == FIRST + SECOND {
                return self.judge(pending);
            }
        }
    }

    fn judge(&mut self, pending: Pending) -> Result<(), CommError> {
        let Pending { mut stream, from: address, nonce_a, read, .. } = pending;
        let mut nonce_c = [0; NONCE];
        nonce_c.copy_from_slice(&read[MAGIC.len()..FIRST]);
        let second = &read[FIRST..];
        let from = u16::from_le_bytes([second[0], second[1]]);
        let connection = second[2];
        let proved = Proved { config: self.config, from, to: self.config.rank as u16, connection, nonce_c, nonce_a };
        if !proved.verify(b"c", &second[3..]) {
            self.drop_stranger(address, "its proof is wrong");
            return Ok(());
        }
        let rank = usize::from(from);
        let place = usize::from(connection & !ENCRYPTED);
        let expected = rank > self.config.rank && rank < self.found.len() && place < N_CONNECTIONS;
        if !expected || self.found[rank][place].is_some() {
            self.drop_stranger(address, "it claims a rank that is not awaited");
            return Ok(());
        }
        let ready = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(STRANGER)))
            .and_then(|()| stream.set_write_timeout(Some(STRANGER)));
        let is_encrypted = connection & ENCRYPTED != 0;
        if is_encrypted != self.config.encrypt {
            // The other side reads from this proof what this one does.
            let _ = ready.and_then(|()| stream.write_all(&proved.other_mode().proof(b"a")));
            return Err(mixed(self.config, rank));
        }
        let wire = ready.and_then(|()| stream.write_all(&proved.proof(b"a"))).and_then(|()| proved.wire(stream, false));
        let mut wire = match wire {
            Ok(wire) => wire,
            Err(e) => {
                self.drop_stranger(address, &e.to_string());
                return Ok(());
            }
        };
        exchange_hellos(&mut wire, self.config, rank)?;
        self.found[rank][place] = Some(wire);
        Ok(())
    }
}

/// Compares versions and models with a rank that has proved itself.
fn exchange_hellos(wire: &mut Wire, config: &TcpConfig, peer: usize) -> Result<(), CommError> {
    let host = &config.peers[peer].host;
    let theirs = send_and_receive_hello(wire, &config.hello)
        .map_err(|e| CommError::setup(format!("rank {peer} ({host}) connected but did not introduce itself: {e}")))?;
    let mine = &config.hello;
    if theirs.version != mine.version {
        return Err(CommError::setup(format!(
            "rank {peer} ({host}) runs tandem {}, this rank ({}) runs {}; install the same version on every host",
            theirs.version, config.peers[config.rank].host, mine.version
        )));
    }
    if theirs.model != mine.model {
        return Err(CommError::setup(format!(
            "rank {peer} ({host}) has another model than this rank ({}): hash {} against {}; copy the same checkpoint to \
             every host (--remote-model names its place there)",
            config.peers[config.rank].host, theirs.model, mine.model
        )));
    }
    Ok(())
}

fn send_and_receive_hello(wire: &mut Wire, hello: &Hello) -> std::io::Result<Hello> {
    let text = serde_json::to_vec(hello)?;
    wire.write_all(&[&(text.len() as u32).to_le_bytes()[..], &text].concat())?;
    let mut length = [0; 4];
    wire.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_HELLO {
        return Err(std::io::Error::new(ErrorKind::InvalidData, "its introduction is too long"));
    }
    let mut text = vec![0; length];
    wire.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}
