//! Collectives, written once over any transport.
//!
//! Sums are always taken in the order of ranks, `((x0 + x1) + x2) + ...`, whatever the size and the algorithm: the same
//! bits on every rank, in every run, and for a row of activations whatever else is in the batch
//! (docs/decisions/0007-sums-in-rank-order.md).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use half::bf16;

use crate::error::{CommError, Doing, Failure};
use crate::transport::{Channel, Incoming, Transport, Wait};

/// Up to this many bytes an all_reduce sends everything to everyone and sums locally: one hop. Above, ranks sum a part
/// each and gather: two hops, less traffic (but not for two ranks).
const DIRECT_BYTES: usize = 64 << 10;
/// What is sent to everyone is added up in slices of this size, while they are in the processor's cache.
const SLICE_BYTES: usize = 256 << 10;

/// Type of a payload between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// 4 bytes an element.
    F32,
    /// 2 bytes: every rank's part is rounded to bf16, and so is the sum.
    Bf16,
}

/// Some ranks of a launch, numbered from 0 in the group's own order.
#[derive(Clone)]
pub struct Group {
    transport: Arc<Mutex<Box<dyn Transport>>>,
    /// Ranks of the launch.
    members: Vec<usize>,
    /// This rank's place in `members`.
    me: usize,
    patience: Duration,
    /// Multiplies the patience while ranks compute for long.
    slack: Arc<AtomicU32>,
    scratch: Arc<Mutex<Vec<u8>>>,
}

impl Group {
    /// All ranks of a launch; `patience` bounds every wait.
    pub fn world(transport: Box<dyn Transport>, patience: Duration) -> Group {
        let (me, members) = (transport.rank(), (0..transport.size()).collect());
        Group {
            transport: Arc::new(Mutex::new(transport)),
            members,
            me,
            patience,
            slack: Arc::new(AtomicU32::new(1)),
            scratch: Arc::default(),
        }
    }

    /// The ranks `members` (as this group numbers them) as a group of their own.
    ///
    /// # Panics
    /// When this rank is not among them.
    pub fn subgroup(&self, members: &[usize]) -> Group {
        let Some(me) = members.iter().position(|m| *m == self.me) else { panic!("a rank makes groups it is in") };
        let members = members.iter().map(|m| self.members[*m]).collect();
        Group { members, me, ..self.clone() }
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> usize {
        self.me
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// Where `rank` runs, for messages.
    pub fn host(&self, rank: usize) -> String {
        self.transport().host(self.members[rank])
    }

    /// The bound on a wait.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Multiplies the patience of every wait, of this group and of those made from it, until the next call: the others may
    /// be computing for longer than communication takes.
    pub fn set_slack(&self, slack: u32) {
        self.slack.store(slack.max(1), Ordering::Relaxed);
    }

    /// The error that blames `rank` of this group.
    pub fn blame(&self, rank: usize, failure: Failure, doing: Doing) -> CommError {
        CommError::by(self.members[rank], &self.host(rank), failure).while_doing(doing)
    }

    fn transport(&self) -> MutexGuard<'_, Box<dyn Transport>> {
        self.transport.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait(&self, doing: Doing) -> Wait {
        Wait { patience: Some(self.patience * self.slack.load(Ordering::Relaxed)), doing }
    }

    /// Sends `data` to `to` on `channel`.
    ///
    /// # Errors
    /// As [`Transport::exchange`]; so for all that follow.
    pub fn send(&self, to: usize, channel: Channel, data: &[u8], doing: Doing) -> Result<(), CommError> {
        self.transport().exchange(channel, Some((self.members[to], data)), None, self.wait(doing))
    }

    /// Receives exactly `into` from `from`.
    pub fn recv(&self, from: usize, channel: Channel, into: &mut [u8], doing: Doing) -> Result<(), CommError> {
        let wait = self.wait(doing);
        self.transport().exchange(channel, None, Some((self.members[from], Incoming::Exact(into))), wait)
    }

    /// Receives a message of any length from `from`, waiting as long as that rank lives.
    pub fn recv_when_ready(
        &self,
        from: usize,
        channel: Channel,
        into: &mut Vec<u8>,
        doing: Doing,
    ) -> Result<(), CommError> {
        let wait = Wait { patience: None, doing };
        self.transport().exchange(channel, None, Some((self.members[from], Incoming::Any(into))), wait)
    }

    /// Waits for every rank.
    pub fn barrier(&self, doing: Doing) -> Result<(), CommError> {
        self.all_gather(&[], &mut [], doing)
    }

    /// Every rank gets `root`'s `data`.
    pub fn broadcast(&self, root: usize, data: &mut [u8], doing: Doing) -> Result<(), CommError> {
        if self.me != root {
            return self.recv(root, Channel::Data, data, doing);
        }
        (0..self.size()).filter(|to| *to != root).try_for_each(|to| self.send(to, Channel::Data, data, doing))
    }

    /// `all[r * mine.len()..]` becomes rank r's `mine`.
    ///
    /// # Panics
    /// When `all` is not as long as all parts together.
    pub fn all_gather(&self, mine: &[u8], all: &mut [u8], doing: Doing) -> Result<(), CommError> {
        let (n, me, length) = (self.size(), self.me, mine.len());
        assert_eq!(all.len(), n * length, "all_gather needs room for every part");
        all[me * length..][..length].copy_from_slice(mine);
        let mut transport = self.transport();
        for step in 1..n {
            let (to, from) = ((me + step) % n, (me + n - step) % n);
            let into = Incoming::Exact(&mut all[from * length..][..length]);
            let send = Some((self.members[to], mine));
            transport.exchange(Channel::Data, send, Some((self.members[from], into)), self.wait(doing))?;
        }
        Ok(())
    }

    /// Gathers messages of any length from every rank.
    pub fn gather_messages(&self, mine: &[u8], doing: Doing) -> Result<Vec<Vec<u8>>, CommError> {
        let (n, me) = (self.size(), self.me);
        let mut all = vec![vec![]; n];
        all[me] = mine.to_vec();
        let mut transport = self.transport();
        for step in 1..n {
            let (to, from) = ((me + step) % n, (me + n - step) % n);
            let into = Incoming::Any(&mut all[from]);
            let send = Some((self.members[to], mine));
            transport.exchange(Channel::Data, send, Some((self.members[from], into)), self.wait(doing))?;
        }
        Ok(all)
    }

    /// Part r of `send` goes to rank r; part r of `recv` comes from it. All parts are equally long.
    ///
    /// # Panics
    /// When the lengths differ or do not divide.
    pub fn all_to_all(&self, send: &[u8], recv: &mut [u8], doing: Doing) -> Result<(), CommError> {
        let (n, me) = (self.size(), self.me);
        assert!(send.len() == recv.len() && send.len().is_multiple_of(n), "all_to_all needs equal parts");
        let length = send.len() / n;
        recv[me * length..][..length].copy_from_slice(&send[me * length..][..length]);
        let mut transport = self.transport();
        for step in 1..n {
            let (to, from) = ((me + step) % n, (me + n - step) % n);
            let into = Incoming::Exact(&mut recv[from * length..][..length]);
            let send = Some((self.members[to], &send[to * length..][..length]));
            transport.exchange(Channel::Data, send, Some((self.members[from], into)), self.wait(doing))?;
        }
        Ok(())
    }

    /// `x` becomes the sum of every rank's `x`, the same bits everywhere.
    pub fn all_reduce(&self, x: &mut [f32], wire: Wire, doing: Doing) -> Result<(), CommError> {
        if self.size() == 1 || x.is_empty() {
            return Ok(());
        }
        match wire {
            Wire::F32 => self.reduce(x, doing),
            Wire::Bf16 => {
                let mut rounded: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
                self.reduce(&mut rounded, doing)?;
                x.iter_mut().zip(rounded).for_each(|(x, v)| *x = v.to_f32());
                Ok(())
            }
        }
    }

    fn reduce<T: Element>(&self, x: &mut [T], doing: Doing) -> Result<(), CommError> {
        if self.size() == 2 || size_of_val(x) <= DIRECT_BYTES {
            return x.chunks_mut(SLICE_BYTES / size_of::<T>()).try_for_each(|slice| self.reduce_direct(slice, doing));
        }
        self.reduce_scattered(x, doing)
    }

    /// Everything to everyone, one hop.
    fn reduce_direct<T: Element>(&self, x: &mut [T], doing: Doing) -> Result<(), CommError> {
        let (n, me) = (self.size(), self.me);
        let mut scratch = self.scratch.lock().unwrap_or_else(|e| e.into_inner());
        let bytes = size_of_val(x);
        scratch.resize((n - 1) * bytes, 0);
        let mut transport = self.transport();
        let mut parts: Vec<&mut [u8]> = scratch.chunks_exact_mut(bytes).collect();
        for step in 1..n {
            let (to, from) = ((me + step) % n, (me + n - step) % n);
            // Parts lie in the order of ranks, this one left out.
            let part = &mut parts[if from < me { from } else { from - 1 }];
            let send = Some((self.members[to], bytemuck::cast_slice(x)));
            let recv = Some((self.members[from], Incoming::Exact(part)));
            transport.exchange(Channel::Data, send, recv, self.wait(doing))?;
        }
        drop(transport);
        sum_in_order(x, me, &parts);
        Ok(())
    }

    /// Each rank sums one part of `x`, then all parts are gathered.
    fn reduce_scattered<T: Element>(&self, x: &mut [T], doing: Doing) -> Result<(), CommError> {
        let (n, me, len) = (self.size(), self.me, x.len());
        let part = |r: usize| len * r / n..len * (r + 1) / n;
        let own = part(me);
        let bytes = own.len() * size_of::<T>();
        let mut scratch = self.scratch.lock().unwrap_or_else(|e| e.into_inner());
        scratch.resize((n - 1) * bytes, 0);
        let mut transport = self.transport();
        for step in 1..n {
            let (to, from) = ((me + step) % n, (me + n - step) % n);
            let place = if from < me { from } else { from - 1 };
            let into = Incoming::Exact(&mut scratch[place * bytes..][..bytes]);
            let send = Some((self.members[to], bytemuck::cast_slice(&x[part(to)])));
            transport.exchange(Channel::Data, send, Some((self.members[from], into)), self.wait(doing))?;
        }
        let parts: Vec<&mut [u8]> = scratch.chunks_exact_mut(bytes.max(1)).collect();
        sum_in_order(&mut x[own.clone()], me, &parts);
        for step in 1..n {
            let (to, from) = ((me + step) % n, (me + n - step) % n);
            let (mine, into) = disjoint(x, own.clone(), part(from));
            let send = Some((self.members[to], bytemuck::cast_slice(mine)));
            let into = Incoming::Exact(bytemuck::cast_slice_mut(into));
            transport.exchange(Channel::Data, send, Some((self.members[from], into)), self.wait(doing))?;
        }
        Ok(())
    }

    /// Tells every other rank that this one stops, and why.
    pub fn abort(&self, message: &str) {
        self.transport().abort(message);
    }

    /// Leaves in order.
    pub fn leave(&self) {
        self.transport().leave();
    }
}

/// What can be summed.
trait Element: bytemuck::Pod {
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(value: f32) -> f32 {
        value
    }
}

impl Element for bf16 {
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    fn from_f32(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
}

/// `x` becomes the sum over ranks, in their order; `x` itself is rank `me`'s part, `others` the rest in order.
fn sum_in_order<T: Element>(x: &mut [T], me: usize, others: &[&mut [u8]]) {
    // Scratch is bytes: elements are read unaligned.
    let read =
        |part: &[u8], i: usize| -> T { bytemuck::pod_read_unaligned(&part[i * size_of::<T>()..][..size_of::<T>()]) };
    match others {
        // Two ranks: addition commutes, so the order is the same from both sides.
        [other] => {
            for (x, bytes) in x.iter_mut().zip(other.chunks_exact(size_of::<T>())) {
                *x = T::from_f32(x.to_f32() + bytemuck::pod_read_unaligned::<T>(bytes).to_f32());
            }
        }
        _ => {
            for (i, x) in x.iter_mut().enumerate() {
                let mut ordered = others[..me].iter().map(|p| read(p, i).to_f32());
                let mut sum = match ordered.next() {
                    Some(first) => ordered.fold(first, |sum, v| sum + v) + x.to_f32(),
                    None => x.to_f32(),
                };
                for part in &others[me..] {
                    sum += read(part, i).to_f32();
                }
                *x = T::from_f32(sum);
            }
        }
    }
}

/// One part to read and another, which does not overlap it, to write.
fn disjoint<T>(x: &mut [T], read: std::ops::Range<usize>, write: std::ops::Range<usize>) -> (&[T], &mut [T]) {
    if read.end <= write.start {
        let (low, high) = x.split_at_mut(write.start);
        (&low[read], &mut high[..write.len()])
    } else {
        let (low, high) = x.split_at_mut(read.start);
        (&high[..read.len()], &mut low[write])
    }
}
