//! A rank that [`super::launch`] started: its orders come on a pipe, its news go to stderr.
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

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use tandem_comm::tcp::{self, Peer, SECRET_BYTES, Secret};

use crate::cli::ParallelArgs;

/// Marks a line of a rank's stderr as news for the launcher.
pub(super) const NEWS: &str = "@tandem ";

/// What the launcher tells a rank.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(super) secret: String,
    pub(crate) rank: usize,
    /// Name of every rank's host.
    pub(super) hosts: Vec<String>,
    pub(super) listen: IpAddr,
    /// 0: any.
    pub(super) port: u16,
    pub(super) generation: u32,
    pub(crate) parallel: ParallelArgs,
    pub(super) on_this_host: usize,
    /// Seconds.
    pub(super) start_timeout: f64,
    /// The model's place on this host, if it differs.
    pub(crate) model: Option<String>,
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
pub(crate) enum Announcement {
    Listening(SocketAddr),
    Loading { done: u64, total: u64 },
}

/// Tells the launcher, if there is one.
pub(crate) fn announce(news: &Announcement) {
    if LAUNCHED.load(std::sync::atomic::Ordering::Relaxed)
        && let Ok(text) = serde_json::to_string(news)
    {
        eprintln!("{NEWS}{text}");
    }
}

static LAUNCHED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// A rank that knows where the others are.
pub(crate) struct Started {
    pub(crate) order: Order,
    pub(super) listener: TcpListener,
    pub(super) peers: Vec<Peer>,
}

impl Started {
    /// The address that this rank listens on.
    pub(crate) fn listen(&self) -> IpAddr {
        self.order.listen
    }
}

/// Takes orders from the pipe `fd`.
pub(super) fn start(fd: u32) -> anyhow::Result<Started> {
    LAUNCHED.store(true, std::sync::atomic::Ordering::Relaxed);
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
    // A remote rank 0 gets the user's input from the same pipe, whose end means nothing then.
    if !(order.rank == 0 && fd == 0) {
        std::thread::spawn(move || {
            let mut byte = [0];
            while matches!(pipe.read(&mut byte), Ok(n) if n > 0) {}
            eprintln!("error: the launcher is gone");
            std::process::exit(1);
        });
    }
    Ok(Started { order, listener, peers })
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
