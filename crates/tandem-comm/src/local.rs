//! Ranks as threads of one process, with optional faults for tests.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::error::{CommError, Failure};
use crate::frame::{Counters, Header};
use crate::transport::{Channel, Incoming, Transport, Wait};

/// What a simulated network does to one message. Chosen by (seed, sender, receiver, number of the message), so that a
/// schedule does not depend on how threads run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Delivered.
    None,
    /// Never delivered.
    Drop,
    /// Delivered twice.
    Duplicate,
    /// Delivered before the message in front of it.
    Overtake,
    /// Delivered after this time.
    Delay(Duration),
    /// The sender dies instead of sending.
    Die,
    /// The sender stops for this long, as a suspended process does.
    Stall(Duration),
}

/// Decides what happens to message number `n` from one rank to another.
pub type Faults = Arc<dyn Fn(usize, usize, u64) -> Fault + Send + Sync>;

struct Message {
    header: Header,
    payload: Vec<u8>,
    at: Instant,
}

#[derive(Default)]
struct Mailboxes {
    /// `[from * size + to][channel]`
    queues: Vec<[VecDeque<Message>; Channel::N]>,
    /// Why each rank ended, if it did.
    ended: Vec<Option<Failure>>,
    /// Ranks that left in order.
    left: Vec<bool>,
}

struct Hub {
    size: usize,
    mail: Mutex<Mailboxes>,
    news: Condvar,
    faults: Option<Faults>,
}

impl Hub {
    fn mail(&self) -> MutexGuard<'_, Mailboxes> {
        self.mail.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One rank of a group of threads.
pub struct Local {
    hub: Arc<Hub>,
    rank: usize,
    sent: Vec<Counters>,
    received: Vec<Counters>,
    n_sent: Vec<u64>,
}

impl Drop for Local {
    fn drop(&mut self) {
        if !self.hub.mail().left[self.rank] {
            self.end(Failure::Lost { why: "its thread ended".to_string() });
        }
    }
}

/// `size` ranks; hand one to each thread.
pub fn group(size: usize) -> Vec<Local> {
    faulty_group(size, None)
}

/// [`group`] over a network with faults.
pub fn faulty_group(size: usize, faults: Option<Faults>) -> Vec<Local> {
    let queues = (0..size * size).map(|_| Default::default()).collect();
    let mail = Mailboxes { queues, ended: vec![None; size], left: vec![false; size] };
    let hub = Arc::new(Hub { size, mail: Mutex::new(mail), news: Condvar::new(), faults });
    (0..size)
        .map(|rank| Local {
            hub: hub.clone(),
            rank,
            sent: vec![Counters::default(); size],
            received: vec![Counters::default(); size],
            n_sent: vec![0; size],
        })
        .collect()
}

impl Local {
    fn error(&self, rank: usize, failure: Failure, wait: Wait) -> CommError {
        CommError::by(rank, &self.host(rank), failure).while_doing(wait.doing)
    }

    fn send(&mut self, to: usize, channel: Channel, data: &[u8], wait: Wait) -> Result<(), CommError> {
        let header = Header { channel, sequence: self.sent[to].next(channel), length: data.len() };
        let number = self.n_sent[to];
        self.n_sent[to] += 1;
        let fault = self.hub.faults.as_ref().map_or(Fault::None, |faults| faults(self.rank, to, number));
        match fault {
            Fault::Drop => return Ok(()),
            Fault::Die => {
                let failure = Failure::Lost { why: "killed by the simulation".to_string() };
                self.end(failure.clone());
                return Err(self.error(self.rank, failure, wait));
            }
            Fault::Stall(time) => std::thread::sleep(time),
            _ => {}
        }
        let at = Instant::now() + if let Fault::Delay(time) = fault { time } else { Duration::ZERO };
        let message = || Message { header, payload: data.to_vec(), at };
        let mut mail = self.hub.mail();
        let queue = &mut mail.queues[self.rank * self.hub.size + to][channel as usize];
        match fault {
            Fault::Overtake => queue.insert(queue.len().saturating_sub(1), message()),
            Fault::Duplicate => queue.extend([message(), message()]),
            _ => queue.push_back(message()),
        }
        drop(mail);
        self.hub.news.notify_all();
        Ok(())
    }

    fn recv(&mut self, from: usize, channel: Channel, mut into: Incoming<'_>, wait: Wait) -> Result<(), CommError> {
        let deadline = wait.patience.map(|p| Instant::now() + p);
        let mut mail = self.hub.mail();
        let message = loop {
            let now = Instant::now();
            let queue = &mut mail.queues[from * self.hub.size + self.rank][channel as usize];
            let ready = queue.front().map(|m| m.at);
            if ready.is_some_and(|at| at <= now)
                && let Some(message) = queue.pop_front()
            {
                break message;
            }
            // The first rank that ended is the cause; the others followed it.
            let ended = mail.ended.iter().enumerate().find_map(|(r, why)| why.clone().map(|why| (r, why)));
            if let Some((rank, failure)) = ended
                && ready.is_none()
            {
                return Err(self.error(rank, failure, wait));
            }
            if mail.left[from] && ready.is_none() {
                return Err(self.error(from, Failure::Lost { why: "it has left the group".to_string() }, wait));
            }
            if deadline.is_some_and(|d| now >= d) {
                let seconds = wait.patience.unwrap_or_default().as_secs_f64();
                return Err(self.error(from, Failure::Stalled { seconds }, wait));
            }
            let until = [deadline, ready].into_iter().flatten().min().unwrap_or(now + Duration::from_secs(1));
            let timeout = until.saturating_duration_since(now).max(Duration::from_micros(50));
            mail = self.hub.news.wait_timeout(mail, timeout).unwrap_or_else(|e| e.into_inner()).0;
        };
        drop(mail);
        self.received[from]
            .check(&message.header)
            .and_then(|()| into.fill(&message.payload))
            .map_err(|failure| self.error(from, failure, wait))
    }

    fn end(&self, failure: Failure) {
        let mut mail = self.hub.mail();
        // Only the first cause is kept.
        if mail.ended.iter().all(Option::is_none) {
            mail.ended[self.rank] = Some(failure);
        }
        drop(mail);
        self.hub.news.notify_all();
    }
}

impl Transport for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.hub.size
    }

    fn host(&self, _rank: usize) -> String {
        "this process".to_string()
    }

    fn exchange(
        &mut self,
        channel: Channel,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, Incoming<'_>)>,
        wait: Wait,
    ) -> Result<(), CommError> {
        if let Some((to, data)) = send {
            self.send(to, channel, data, wait)?;
        }
        match recv {
            Some((from, into)) => self.recv(from, channel, into, wait),
            None => Ok(()),
        }
    }

    fn abort(&mut self, message: &str) {
        self.end(Failure::Stopped { message: message.to_string() });
    }

    fn leave(&mut self) {
        self.hub.mail().left[self.rank] = true;
        self.hub.news.notify_all();
    }
}
