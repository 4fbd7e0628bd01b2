//! One rank of several: joins the others, agrees on a plan, loads its part, and leads or follows.
//!
//! A rank is started by a launcher (processes over TCP), by an MPI launcher, or as a thread of one process. Rank 0 runs
//! the command; the others only load and follow. What a process is comes as a value ([`Role`]) and is handed down.

mod hostfile;
mod load;
mod started;

use anyhow::bail;
use tandem_comm::{Group, Transport, mpi};

use crate::options::{ParallelOptions, TransportKind};

pub use hostfile::{Host, hosts, local_hosts};
pub use load::follow;
pub(crate) use load::{Answers, Model, RankBackend, Source, follow_with, lead};
pub use started::{Announcement, NEWS, Order, Quit, Started};

/// What a process does with its command.
pub enum Role {
    /// Runs it, without other ranks.
    Alone,
    /// Runs it as rank 0 of several.
    Lead(Joined),
    /// Follows rank 0.
    Follow(Joined),
    /// Starts this many ranks.
    Launch(usize),
}

/// How this process reaches the other ranks.
pub enum Joined {
    /// A launcher said where they are.
    Tcp(Box<Started>),
    /// An MPI job.
    Mpi(Box<mpi::Mpi>),
    /// Threads of this process; ranks in all.
    Threads(usize),
}

impl Role {
    /// Finds out what this process is: `launch_fd` is where a launcher sends its orders, `parallel` how the command's
    /// ranks are arranged, if it can have several. `quit` ends the process when the launcher or another rank is lost.
    ///
    /// # Errors
    /// The orders make no sense, or there is no MPI where it is asked for.
    pub fn find(launch_fd: Option<u32>, parallel: Option<&ParallelOptions>, quit: Quit) -> anyhow::Result<Role> {
        if let Some(fd) = launch_fd {
            let started = started::start(fd, quit)?;
            if parallel.is_some_and(|parallel| parallel.encrypt) && !started.order.parallel.encrypt {
                bail!("--encrypt is set for this rank, but not for all: give it to tandem launch, in front of --");
            }
            let joined = |started| Joined::Tcp(Box::new(started));
            return Ok(if started.order.rank > 0 {
                Role::Follow(joined(started))
            } else {
                Role::Lead(joined(started))
            });
        }
        let Some(parallel) = parallel else { return Ok(Role::Alone) };
        let asked = parallel.n_ranks()?;
        parallel.check_encryption()?;
        match parallel.transport {
            TransportKind::Mpi if mpi::launched() => {
                let transport = mpi::init()?;
                let rank = transport.rank();
                let joined = Joined::Mpi(Box::new(transport));
                Ok(if rank > 0 { Role::Follow(joined) } else { Role::Lead(joined) })
            }
            TransportKind::Mpi => bail!(
                "--transport mpi needs an MPI launcher: mpirun -n {asked} tandem ..., or tandem launch --transport mpi \
                 --ranks {asked} -- ..."
            ),
            _ if asked == 1 => Ok(Role::Alone),
            TransportKind::Local => Ok(Role::Lead(Joined::Threads(asked))),
            TransportKind::Auto | TransportKind::Tcp | TransportKind::Nccl => Ok(Role::Launch(asked)),
        }
    }
}

impl Joined {
    /// How the ranks reach each other.
    pub fn transport(&self, parallel: &ParallelOptions) -> TransportKind {
        match self {
            Joined::Tcp(started) => started.order.parallel.transport,
            Joined::Mpi(_) | Joined::Threads(_) => parallel.transport,
        }
    }

    /// This rank among those of its host.
    pub fn local_rank(&self) -> usize {
        match self {
            Joined::Tcp(started) => started.place().local_rank,
            Joined::Mpi(_) | Joined::Threads(_) => 0,
        }
    }

    /// The address that this rank listens on.
    pub fn own_address(&self) -> std::net::IpAddr {
        match self {
            Joined::Tcp(started) => started.listen(),
            Joined::Mpi(_) | Joined::Threads(_) => std::net::IpAddr::from([127, 0, 0, 1]),
        }
    }
}

/// The other ranks, for commands that every rank runs.
///
/// # Errors
/// There are none, or they do not answer.
pub fn world(joined: Option<Joined>, parallel: &ParallelOptions) -> anyhow::Result<Group> {
    let deadline = parallel.deadline()?;
    match joined {
        Some(Joined::Tcp(started)) => Ok(Group::world(started.connect("none".to_string())?, deadline)),
        Some(Joined::Mpi(transport)) => Ok(Group::world(transport, deadline)),
        _ => bail!("this command needs several ranks: --ranks 2, tandem launch ... --, or mpirun with --transport mpi"),
    }
}
