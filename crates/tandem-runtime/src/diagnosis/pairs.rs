//! The way between every two ranks, in each direction by itself: a link may be slow one way only, which collectives and
//! round trips hide.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tandem_comm::{Channel, Doing, Group};

use super::finding::{Finding, Level};
use crate::units::bytes;

const DOING: Doing = Doing::of("measuring a pair of ranks");
/// Messages there and back for a latency.
const N_ROUND_TRIPS: usize = 31;
/// Times that a long message is sent; the median counts.
const N_TRANSFERS: usize = 5;

/// One direction between two ranks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PairSpeed {
    /// The rank that sends.
    pub from: usize,
    /// The rank that receives.
    pub to: usize,
    /// Half of a round trip of eight bytes, microseconds.
    pub latency_us: f64,
    /// Bytes per second of one long message.
    pub bytes_per_second: f64,
}

/// Measures each direction between every two ranks with messages of `size` bytes; every rank comes here, all get the result.
///
/// # Errors
/// A rank is gone.
pub fn pairs(world: &Group, size: usize) -> anyhow::Result<Vec<PairSpeed>> {
    let (me, n) = (world.rank(), world.size());
    let mut mine = vec![];
    for a in 0..n {
        for b in (0..n).filter(|b| *b != a) {
            // One pair at a time: they share links.
            world.barrier(DOING)?;
            if me == a {
                mine.push(send(world, b, size)?);
            } else if me == b {
                receive(world, a, size)?;
            }
        }
    }
    let texts = world.gather_messages(&serde_json::to_vec(&mine)?, DOING)?;
    let mut all = vec![];
    for text in texts {
        all.extend(serde_json::from_slice::<Vec<PairSpeed>>(&text)?);
    }
    Ok(all)
}

fn send(world: &Group, to: usize, size: usize) -> anyhow::Result<PairSpeed> {
    let (data, mut word) = (vec![1u8; size], [0u8; 8]);
    let mut latencies = vec![];
    for _ in 0..N_ROUND_TRIPS {
        let start = Instant::now();
        world.send(to, Channel::Data, &word, DOING)?;
        world.recv(to, Channel::Data, &mut word, DOING)?;
        latencies.push(start.elapsed().as_secs_f64() / 2.0);
    }
    let latency = median(latencies);
    let mut rates = vec![];
    for _ in 0..N_TRANSFERS {
        let start = Instant::now();
        world.send(to, Channel::Data, &data, DOING)?;
        world.recv(to, Channel::Data, &mut word, DOING)?;
        rates.push(size as f64 / (start.elapsed().as_secs_f64() - latency).max(1e-9));
    }
    // The best: what else runs on the hosts only takes away from it, and is no fault of the way.
    let bytes_per_second = rates.into_iter().fold(0.0, f64::max);
    Ok(PairSpeed { from: world.rank(), to, latency_us: latency * 1e6, bytes_per_second })
}

fn receive(world: &Group, from: usize, size: usize) -> anyhow::Result<()> {
    let (mut data, mut word) = (vec![0u8; size], [0u8; 8]);
    for _ in 0..N_ROUND_TRIPS {
        world.recv(from, Channel::Data, &mut word, DOING)?;
        world.send(from, Channel::Data, &word, DOING)?;
    }
    for _ in 0..N_TRANSFERS {
        world.recv(from, Channel::Data, &mut data, DOING)?;
        world.send(from, Channel::Data, &word, DOING)?;
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A direction that has less than this part of the other's bandwidth is broken.
const MOST_UNEVEN: f64 = 0.4;
/// A pair slower than this part of the median pair is worth a word.
const MOST_BEHIND: f64 = 0.4;
/// Microseconds one way from which on tensor parallelism loses.
const LONG_LATENCY_US: f64 = 500.0;

/// What the pairs say.
pub fn findings(pairs: &[PairSpeed]) -> Vec<Finding> {
    let name = |p: &PairSpeed| format!("rank {} to rank {}", p.from, p.to);
    let speed = |p: &PairSpeed| {
        format!("{} at {}/s and {:.0} us one way", name(p), bytes(p.bytes_per_second as u64), p.latency_us)
    };
    let median = if pairs.is_empty() { 0.0 } else { median(pairs.iter().map(|p| p.bytes_per_second).collect()) };
    let back = |p: &PairSpeed| pairs.iter().find(|q| (q.from, q.to) == (p.to, p.from));
    let finding = |p: &PairSpeed| {
        let found = Finding::new("hosts.pair", Level::Ok, format!("the way from {}", name(p)), speed(p));
        match back(p) {
            Some(other) if p.bytes_per_second < MOST_UNEVEN * other.bytes_per_second => found
                .with_level(Level::Problem, format!("the direction from {} is slow", name(p)))
                .with_evidence(format!("{}; the other direction: {}", speed(p), speed(other)))
                .with_remedy(
                    "look at duplex and error counters of both network interfaces (ethtool), the cable and the switch port",
                ),
            _ if p.bytes_per_second < MOST_BEHIND * median => found
                .with_level(Level::Warning, format!("the way from {} is slower than others", name(p)))
                .with_remedy("use the interface of the faster network for this host in the hostfile"),
            _ if p.latency_us > LONG_LATENCY_US => found
                .with_level(Level::Warning, format!("the way from {} is long", name(p)))
                .with_remedy("divide by layers (--pp): slices (--tp) send two messages for every layer"),
            _ => found,
        }
    };
    pairs.iter().map(finding).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tandem_comm::{CommError, Incoming, Transport, Wait, local};

    use super::*;

    /// Takes its time for every long message that it sends.
    struct Slow<T: Transport>(T, Duration);

    impl<T: Transport> Transport for Slow<T> {
        fn rank(&self) -> usize {
            self.0.rank()
        }

        fn size(&self) -> usize {
            self.0.size()
        }

        fn host(&self, rank: usize) -> String {
            self.0.host(rank)
        }

        fn exchange(
            &mut self,
            channel: Channel,
            send: Option<(usize, &[u8])>,
            recv: Option<(usize, Incoming<'_>)>,
            wait: Wait,
        ) -> Result<(), CommError> {
            if send.is_some_and(|(_, data)| data.len() > 1000) {
                std::thread::sleep(self.1);
            }
            self.0.exchange(channel, send, recv, wait)
        }

        fn abort(&mut self, message: &str) {
            self.0.abort(message);
        }

        fn leave(&mut self) {
            self.0.leave();
        }
    }

    fn measured(slow: Option<usize>) -> Vec<PairSpeed> {
        let ranks = local::group(2).into_iter().enumerate().map(|(rank, transport)| {
            std::thread::spawn(move || {
                // Long beside what a busy machine takes away.
                let delay = Duration::from_millis(if slow.is_none() || slow == Some(rank) { 100 } else { 0 });
                let world = Group::world(Box::new(Slow(transport, delay)), Duration::from_secs(10));
                pairs(&world, 8 << 20).unwrap()
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).next().unwrap()
    }

    #[test]
    fn a_direction_that_is_slow_is_named() {
        for slow in [None, Some(0), Some(1)] {
            let found = findings(&measured(slow));
            assert_eq!(found.len(), 2);
            let problems: Vec<&str> =
                found.iter().filter(|f| f.level == Level::Problem).map(|f| f.what.as_str()).collect();
            match slow {
                None => assert!(problems.is_empty(), "{problems:?}"),
                Some(from) => {
                    let expected = format!("the direction from rank {from} to rank {} is slow", 1 - from);
                    assert_eq!(problems, [expected]);
                }
            }
        }
    }
}
