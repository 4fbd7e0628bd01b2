//! The header of every message: what it is, which one it is, how long it is.

use crate::error::Failure;
use crate::transport::Channel;

/// Bytes of a header.
pub(crate) const HEADER: usize = 16;
/// Longest message; a header that says more is not ours.
const MAX_LENGTH: u64 = 1 << 36;
const MAGIC: u32 = 0x4d45_4454; // "TDEM"

/// A parsed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) channel: Channel,
    /// Messages sent before on this channel between the same two ranks, modulo 2^16.
    pub(crate) sequence: u16,
    pub(crate) length: usize,
}

impl Header {
    /// Little-endian: magic u32, channel u16, sequence u16, length u64.
    pub(crate) fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.channel as u16).to_le_bytes());
        bytes[6..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..].copy_from_slice(&(self.length as u64).to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Result<Header, Failure> {
        let bad = |message: &str| Failure::Protocol { message: message.to_string() };
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes[..4] != MAGIC.to_le_bytes() {
            return Err(bad("expected a message header, found other bytes"));
        }
        let channel = Channel::of(u16_at(4)).ok_or_else(|| bad("a message on a channel that does not exist"))?;
        let length = bytes[8..].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        if length > MAX_LENGTH {
            return Err(bad("a message longer than any of ours"));
        }
        Ok(Header { channel, sequence: u16_at(6), length: length as usize })
    }
}

/// Counts messages per channel, so that a lost, repeated or reordered one is noticed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters([u16; Channel::N]);

impl Counters {
    /// The number of the next message.
    pub(crate) fn next(&mut self, channel: Channel) -> u16 {
        let counter = &mut self.0[channel as usize];
        *counter = counter.wrapping_add(1);
        counter.wrapping_sub(1)
    }

    /// Checks that `header` is the next message.
    pub(crate) fn check(&mut self, header: &Header) -> Result<(), Failure> {
        let expected = self.next(header.channel);
        if header.sequence == expected {
            return Ok(());
        }
        let message = format!("expected message {expected} of its channel, found {}", header.sequence);
        Err(Failure::Protocol { message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_survive(channel in 0u16..2, sequence: u16, length in 0usize..1 << 36) {
            let header = Header { channel: Channel::of(channel).expect("exists"), sequence, length };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn garbage_never_panics(bytes: [u8; HEADER]) {
            prop_assert!(Header::decode(&bytes).is_err() || bytes[..4] == MAGIC.to_le_bytes());
        }
    }
}
