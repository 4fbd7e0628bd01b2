//! Groups of ranks: bytes between them, collectives over those, and the proof that a peer is alive and allowed.
//!
//! A [`Transport`] moves framed messages between ranks: [`local`] (threads of one process), [`tcp`] (built in) and
//! [`mpi`] (a libmpi found at run time). [`Group`] builds the collectives on any of them, so that all transports give
//! the same bits and pass the same tests. Every wait has a deadline; errors name rank, host, operation and layer.
//!
//! What the ranks compute is not known here.

mod error;
mod frame;
mod group;
pub mod local;
pub mod mpi;
pub mod tcp;
mod transport;

pub use error::{CommError, Doing, Failure};
pub use group::{Group, Wire};
pub use transport::{Channel, Incoming, Transport, Wait};
