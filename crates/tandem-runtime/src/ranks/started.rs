//! A rank that a launcher started: its orders come on a pipe, its news go to stderr.
//!
//! ```text
//! launcher -> rank   Order as one line of JSON
//! rank -> launcher   @tandem {"Listening": "127.0.0.1:40123"}     (a line of stderr)
//! launcher -> rank   every rank's address as one line of JSON
//! ```
//!
//! The pipe then stays open: its end means that the launcher is gone, and the rank ends too.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use tandem_comm::Transport;
use tandem_comm::tcp::{self, Hello, Peer, SECRET_BYTES, Secret, TcpConfig};

use crate::device::Place;
use crate::options::ParallelOptions;

/// Marks a line of a rank's stderr as news for the launcher.
pub const NEWS: &str = "@tandem ";

/// What the launcher tells a rank.
#[derive(Clone, Serialize, Deserialize)]
pub struct Order {
    /// Proof of identity that all ranks share, in hexadecimal.
    pub secret: String,
    /// This rank.
    pub rank: usize,
    /// Name of every rank's host.
    pub hosts: Vec<String>,
    /// Address to listen on.
    pub listen: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Which start of the same ranks this is, from 0.
    pub generation: u32,
    /// How the model is divided.
    pub parallel: ParallelOptions,
    /// Ranks of this host.
    pub on_this_host: usize,
    /// Seconds for all ranks to meet.
    pub start_timeout: f64,
    /// The model's place on this host, if it differs.
    pub model: Option<String>,
    /// Whether the command reads the user's input, which a remote rank 0 gets behind its orders.
    pub reads_input: bool,
}

impl Order {
    pub(super) fn secret(&self) -> anyhow::Result<Secret> {
        let digits = self.secret.as_bytes();
        ensure!(digits.len() == 2 * SECRET_BYTES, "the launcher's secret has the wrong length");
        let mut secret = [0; SECRET_BYTES];
        for (byte, pair) in secret.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair)?, 16)?;
        }
        Ok(Secret(secret))
    }
}

/// News of a rank.
#[derive(Serialize, Deserialize)]
pub enum Announcement {
    /// The rank can be reached here.
    Listening(SocketAddr),
    /// Bytes of weights that have arrived, and bytes in all.
    Loading {
        /// So far.
        done: u64,
        /// In all.
        total: u64,
    },
}

/// Tells the launcher.
pub(super) fn announce(news: &Announcement) {
    if let Ok(text) = serde_json::to_string(news) {
        eprintln!("{NEWS}{text}");
    }
}

/// Ends this process after a message: the launcher or another rank is lost.
pub type Quit = fn(&str);

/// A rank that knows where the others are.
pub struct Started {
    pub(super) order: Order,
    listener: TcpListener,
    peers: Vec<Peer>,
    quit: Quit,
}

impl Started {
    /// The model's place on this host, if it differs.
    pub(crate) fn model_on_this_host(&self) -> Option<&str> {
        self.order.model.as_deref()
    }

    /// Where this rank is among those of its host.
    pub(super) fn place(&self) -> Place {
        let (rank, peers) = (self.order.rank, &self.peers);
        let local_rank = peers[..rank].iter().filter(|p| p.host == peers[rank].host).count();
        Place { on_this_host: self.order.on_this_host, local_rank }
    }

    /// Meets the other ranks; all must have the same `model` hash.
    pub(super) fn connect(self, model: String) -> anyhow::Result<Box<dyn Transport>> {
        let Started { order, listener, peers, quit } = self;
        let deadline = order.parallel.deadline()?;
        let config = TcpConfig {
            rank: order.rank,
            peers,
            secret: order.secret()?,
            encrypt: order.parallel.encrypt,
            generation: order.generation,
            hello: Hello { version: env!("CARGO_PKG_VERSION").to_string(), model },
            deadline,
            start_timeout: Duration::from_secs_f64(order.start_timeout),
            on_failure: Box::new(move |error| quit(&error.to_string())),
        };
        Ok(Box::new(tcp::connect(listener, config)?))
    }

    /// The address that this rank listens on.
    pub(super) fn listen(&self) -> IpAddr {
        self.order.listen
    }
}

/// Takes orders from the pipe `fd`.
pub(super) fn start(fd: u32, quit: Quit) -> anyhow::Result<Started> {
    let mut pipe = File::open(format!("/dev/fd/{fd}")).context("--launch-fd is for tandem launch only")?;
    let mut order: Order = serde_json::from_str(&line(&mut pipe)?).context("orders of the launcher")?;
    let listener = tcp::listen(SocketAddr::new(order.listen, order.port))?;
    announce(&Announcement::Listening(listener.local_addr()?));
    let addresses: Vec<SocketAddr> = serde_json::from_str(&line(&mut pipe)?).context("addresses of the ranks")?;
    ensure!(addresses.len() == order.hosts.len(), "the launcher sent {} addresses", addresses.len());
    let peers = std::mem::take(&mut order.hosts)
        .into_iter()
        .zip(addresses)
        .map(|(host, address)| Peer { host, address })
        .collect();
    // Where the user's input comes through the same pipe, its end means nothing.
    if !(order.rank == 0 && fd == 0 && order.reads_input) {
        std::thread::spawn(move || {
            let mut byte = [0];
            while matches!(pipe.read(&mut byte), Ok(n) if n > 0) {}
            quit("the launcher is gone");
        });
    }
    Ok(Started { order, listener, peers, quit })
}

/// One line, and not a byte more: what follows may be the user's.
fn line(pipe: &mut File) -> anyhow::Result<String> {
    let mut text = vec![];
    let mut byte = [0];
    loop {
        let n = pipe.read(&mut byte).context("cannot read the launcher's orders")?;
        ensure!(n > 0, "the launcher ended before it sent orders");
        if byte[0] == b'\n' {
            return Ok(String::from_utf8(text)?);
        }
        text.push(byte[0]);
        ensure!(text.len() < 1 << 20, "the launcher's orders are too long");
    }
}
