//! The seam between collectives and the ways to move bytes.

use std::time::Duration;

use crate::error::{CommError, Doing};

/// Messages of one channel arrive in order; channels do not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// What to run next.
    Command = 0,
    /// Activations and collectives.
    Data = 1,
}

impl Channel {
    pub(crate) const N: usize = 2;

    pub(crate) fn of(number: u16) -> Option<Channel> {
        [Channel::Command, Channel::Data].get(usize::from(number)).copied()
    }
}

/// Where a received message goes.
#[derive(Debug)]
pub enum Incoming<'a> {
    /// A message of exactly this length.
    Exact(&'a mut [u8]),
    /// A message of any length, which replaces the contents.
    Any(&'a mut Vec<u8>),
}

impl Incoming<'_> {
    /// Takes a whole message that is already in memory.
    ///
    /// # Errors
    /// Its length is not the expected one.
    pub(crate) fn fill(&mut self, message: &[u8]) -> Result<(), crate::Failure> {
        self.room(message.len())?.copy_from_slice(message);
        Ok(())
    }

    /// Where the `length` bytes of a message go.
    pub(crate) fn room(&mut self, length: usize) -> Result<&mut [u8], crate::Failure> {
        match self {
            Incoming::Exact(into) => {
                if into.len() != length {
                    let message = format!("expected a message of {} bytes, found {length}", into.len());
                    return Err(crate::Failure::Protocol { message });
                }
                Ok(into)
            }
            Incoming::Any(into) => {
                into.resize(length, 0);
                Ok(into)
            }
        }
    }
}

/// How long to wait, and for what.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    /// None: as long as the other rank gives signs of life.
    pub patience: Option<Duration>,
    /// For the error.
    pub doing: Doing,
}

/// Moves messages between the ranks of one launch.
pub trait Transport: Send {
    /// This rank.
    fn rank(&self) -> usize;
    /// Ranks of the launch.
    fn size(&self) -> usize;
    /// A name for messages: where `rank` runs.
    fn host(&self, rank: usize) -> String;
    /// Sends a message, receives one, or both at once; returns when everything asked for is done. A sent message may
    /// still be on its way. On [`Channel::Command`] sending never waits for the receiver, which may itself be waiting for
    /// this rank to take its activations.
    ///
    /// # Errors
    /// A rank is gone, stalled, stopped, or sent something else; the patience is over. The transport is then unusable.
    fn exchange(
        &mut self,
        channel: Channel,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, Incoming<'_>)>,
        wait: Wait,
    ) -> Result<(), CommError>;
    /// Tells every other rank that this one stops, and why.
    fn abort(&mut self, message: &str);
    /// Leaves in order: the others do not take the end of this rank for a failure.
    fn leave(&mut self);
}
