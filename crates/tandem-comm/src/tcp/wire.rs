//! A connection between two ranks, plain or encrypted.
//!
//! An encrypted one carries frames: length u16 (little-endian), then so many bytes, which are Noise's of up to 65,519 of ours.
//! Both sides count frames and the count is part of what proves them, so that one which is altered, repeated, left out or
//! moved does not open. The keys come from the launch's secret and from two that exist for this connection only
//! (`Noise_NNpsk0`): who learns the secret later cannot read what was recorded before.

use std::io::{Error, ErrorKind, IoSlice, Read, Result, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustix::fd::{AsFd, BorrowedFd};
use snow::StatelessTransportState;

/// ChaCha20-Poly1305 is fast on every processor, and has no limit on frames that a run could reach (docs/decisions/0013).
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";
/// Bytes of each of the two messages that agree on keys: a public key and a proof.
const KEY_MESSAGE: usize = 48;
/// Bytes of a frame behind its length.
const MAX_FRAME: usize = u16::MAX as usize;
const LENGTH: usize = 2;
/// Bytes of a frame's proof.
const TAG: usize = 16;

/// One side of a connection.
pub(super) struct Wire {
    stream: TcpStream,
    seal: Option<Seal>,
}

struct Seal {
    noise: Arc<StatelessTransportState>,
    n_sent: u64,
    n_received: u64,
    /// A sealed frame, of which the connection has taken `n_gone` bytes.
    outgoing: Vec<u8>,
    n_gone: usize,
    /// Bytes that have arrived; those from `start` to `end` are not opened yet.
    incoming: Box<[u8]>,
    start: usize,
    end: usize,
    /// An opened frame that did not fit where it was wanted, of which `n_taken` bytes were taken.
    opened: Vec<u8>,
    n_taken: usize,
}

impl Wire {
    /// A connection whose bytes are sent as they are.
    pub(super) fn plain(stream: TcpStream) -> Wire {
        Wire { stream, seal: None }
    }

    /// Agrees on keys with the other side, which knows `key` too and is not `is_connector`.
    pub(super) fn sealed(mut stream: TcpStream, key: &[u8; 32], is_connector: bool) -> Result<Wire> {
        let builder = snow::Builder::new(PATTERN.parse().map_err(noise)?).psk(0, key).map_err(noise)?;
        let mut state =
            if is_connector { builder.build_initiator() } else { builder.build_responder() }.map_err(noise)?;
        let mut message = [0; KEY_MESSAGE];
        for sends in [is_connector, !is_connector] {
            if sends {
                state.write_message(&[], &mut message).map_err(noise)?;
                stream.write_all(&message)?;
            } else {
                stream.read_exact(&mut message)?;
                state.read_message(&message, &mut []).map_err(noise)?;
            }
        }
        let noise = Arc::new(state.into_stateless_transport_mode().map_err(noise)?);
        Ok(Wire { stream, seal: Some(Seal::new(noise, 0, 0)) })
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The same connection again: one of the two may read and the other may write.
    pub(super) fn try_clone(&self) -> Result<Wire> {
        let seal = self.seal.as_ref().map(|seal| Seal::new(Arc::clone(&seal.noise), seal.n_sent, seal.n_received));
        Ok(Wire { stream: self.stream.try_clone()?, seal })
    }

    /// Bytes that were written to this side and that the connection has not taken; [`Write::flush`] tries again.
    pub(super) fn n_waiting(&self) -> usize {
        self.seal.as_ref().map_or(0, |seal| seal.outgoing.len() - seal.n_gone)
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn noise(error: snow::Error) -> Error {
    Error::new(ErrorKind::InvalidData, format!("the connection cannot be encrypted: {error}"))
}

fn altered() -> Error {
    Error::new(ErrorKind::InvalidData, "a message was altered, repeated or left out on its way")
}

impl Seal {
    fn new(noise: Arc<StatelessTransportState>, n_sent: u64, n_received: u64) -> Seal {
        Seal {
            noise,
            n_sent,
            n_received,
            outgoing: vec![],
            n_gone: 0,
            incoming: vec![0; 2 * (LENGTH + MAX_FRAME)].into(),
            start: 0,
            end: 0,
            opened: vec![],
            n_taken: 0,
        }
    }

    /// Where the next frame lies, if it is here whole.
    fn frame(&self) -> Result<Option<std::ops::Range<usize>>> {
        let [low, high, ..] = self.incoming[self.start..self.end] else { return Ok(None) };
        let length = usize::from(u16::from_le_bytes([low, high]));
        // A frame of nothing would look like the connection's end.
        if length <= TAG {
            return Err(altered());
        }
        let start = self.start + LENGTH;
        Ok((start + length <= self.end).then_some(start..start + length))
    }

    /// Gives the connection what it takes of the sealed frame.
    fn push(&mut self, stream: &mut TcpStream) -> Result<()> {
        while self.n_gone < self.outgoing.len() {
            match stream.write(&self.outgoing[self.n_gone..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.n_gone += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.outgoing.clear();
        self.n_gone = 0;
        Ok(())
    }

    /// Makes a frame of the parts' first bytes, and says of how many.
    fn fill(&mut self, parts: &[&[u8]]) -> Result<usize> {
        let mut joined = vec![];
        let plain = match parts {
            [part] => &part[..part.len().min(MAX_FRAME - TAG)],
            parts => {
                for part in parts {
                    joined.extend(&part[..part.len().min(MAX_FRAME - TAG - joined.len())]);
                }
                &joined[..]
            }
        };
        let length = plain.len() + TAG;
        self.outgoing.resize(LENGTH + length, 0);
        self.outgoing[..LENGTH].copy_from_slice(&(length as u16).to_le_bytes());
        self.noise.write_message(self.n_sent, plain, &mut self.outgoing[LENGTH..]).map_err(noise)?;
        self.n_sent += 1;
        Ok(plain.len())
    }

    /// A frame of the parts' first bytes, once the frame before it is gone.
    fn write(&mut self, stream: &mut TcpStream, parts: &[&[u8]]) -> Result<usize> {
        self.push(stream)?;
        if parts.iter().all(|part| part.is_empty()) {
            return Ok(0);
        }
        let n = self.fill(parts)?;
        match self.push(stream) {
            // Taken over: the rest of the frame goes with the next call.
            Err(e) if e.kind() != ErrorKind::WouldBlock => Err(e),
            _ => Ok(n),
        }
    }

    fn read(&mut self, stream: &mut TcpStream, into: &mut [u8]) -> Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            if self.n_taken < self.opened.len() {
                let n = (&self.opened[self.n_taken..]).read(into)?;
                self.n_taken += n;
                return Ok(n);
            }
            if let Some(frame) = self.frame()? {
                let sealed = &self.incoming[frame.clone()];
                let open = |into: &mut [u8]| self.noise.read_message(self.n_received, sealed, into);
                // To where it is wanted, if that has room for the proof too.
                let direct = into.len() >= frame.len();
                let n = if direct {
                    open(into).map_err(|_| altered())?
                } else {
                    self.opened.resize(frame.len(), 0);
                    let n = open(&mut self.opened).map_err(|_| altered())?;
                    self.opened.truncate(n);
                    self.n_taken = 0;
                    n
                };
                (self.n_received, self.start) = (self.n_received + 1, frame.end);
                if direct {
                    return Ok(n);
                }
                continue;
            }
            self.incoming.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            match stream.read(&mut self.incoming[self.end..])? {
                0 => return Ok(0),
                n => self.end += n,
            }
        }
    }
}

impl Read for Wire {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        match &mut self.seal {
            None => self.stream.read(into),
            Some(seal) => seal.read(&mut self.stream, into),
        }
    }

    fn read_vectored(&mut self, into: &mut [std::io::IoSliceMut<'_>]) -> Result<usize> {
        match &mut self.seal {
            None => self.stream.read_vectored(into),
            Some(seal) => match into.iter_mut().find(|part| !part.is_empty()) {
                Some(part) => seal.read(&mut self.stream, part),
                None => Ok(0),
            },
        }
    }
}

impl Write for Wire {
    fn write(&mut self, data: &[u8]) -> Result<usize> {
        match &mut self.seal {
            None => self.stream.write(data),
            Some(seal) => seal.write(&mut self.stream, &[data]),
        }
    }

    fn write_vectored(&mut self, data: &[IoSlice<'_>]) -> Result<usize> {
        match &mut self.seal {
            None => self.stream.write_vectored(data),
            Some(seal) => seal.write(&mut self.stream, &data.iter().map(|part| &**part).collect::<Vec<_>>()),
        }
    }

    fn flush(&mut self) -> Result<()> {
        match &mut self.seal {
            None => Ok(()),
            Some(seal) => seal.push(&mut self.stream),
        }
    }
}
