//! `tandem bench comm`: what the network between the ranks does, by collective and size, next to a raw socket.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use anyhow::Context;
use serde_json::{Value, json};
use tandem_comm::{Channel, Doing, Group, Wire};

use tandem_runtime::ParallelOptions;
use tandem_runtime::device::{SumTimes, time_device_sums};
use tandem_runtime::diagnosis::{pair_findings, pairs};
use tandem_runtime::options::TransportKind;
use tandem_runtime::ranks::{self, Joined};

use crate::cli::BenchCommArgs;
use crate::report::print_json;

const DOING: Doing = Doing::of("bench comm");
/// Time spent on one row.
const ROW_SECONDS: f64 = 0.4;
/// Read between two messages, as a stage of a pipeline reads its weights: far more than caches hold.
const READ_BETWEEN: usize = 128 << 20;
/// Sent to see the bandwidth of a direction, at least.
const PAIR_BYTES: usize = 8 << 20;
/// From here on bandwidth counts.
const DUPLEX_BYTES: usize = 64 << 10;

/// Runs the command; every rank comes here.
pub(crate) fn comm(args: &BenchCommArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    let parallel = ParallelOptions::from(&args.parallel);
    let raw_address = joined.as_ref().map_or(std::net::IpAddr::from([127, 0, 0, 1]), Joined::own_address);
    let transport = joined.as_ref().map_or(parallel.transport, |joined| joined.transport(&parallel));
    let local_rank = joined.as_ref().map_or(0, Joined::local_rank);
    let world = ranks::world(joined, &parallel)?;
    if args.pairs {
        let pairs = pairs(&world, args.max_bytes.max(PAIR_BYTES))?;
        world.leave();
        match (world.rank(), args.json) {
            (0, true) => print_json(&json!({ "ranks": world.size(), "pairs": pairs }))?,
            (0, false) => pair_findings(&pairs).iter().for_each(|f| println!("{}: {}", f.level.name(), f.evidence)),
            _ => {}
        }
        return Ok(());
    }
    let mut rows = vec![];
    if transport == TransportKind::Nccl {
        rows.extend(device_sums(&world, local_rank)?);
    }
    let sizes: Vec<usize> =
        [8, 1 << 10, 24 << 10, 64 << 10, 256 << 10].into_iter().chain((20..40).step_by(2).map(|b| 1 << b)).collect();
    for bytes in sizes.into_iter().filter(|b| *b <= args.max_bytes) {
        rows.extend(measure(&world, bytes, raw_address)?);
    }
    world.leave();
    if world.rank() > 0 {
        return Ok(());
    }
    if args.json {
        return print_json(&json!({ "ranks": world.size(), "rows": rows }));
    }
    println!("{:<12}{:>12}{:>12}{:>12}{:>12}", "operation", "bytes", "us median", "us p90", "GB/s");
    for row in &rows {
        let text = |key: &str| row[key].as_f64().unwrap_or(0.0);
        println!(
            "{:<12}{:>12}{:>12.1}{:>12.1}{:>12.3}",
            row["operation"].as_str().unwrap_or(""),
            row["bytes"],
            text("us_median"),
            text("us_p90"),
            text("gb_per_s")
        );
    }
    Ok(())
}

/// Sums that the ranks' devices make among themselves.
fn device_sums(world: &Group, local_rank: usize) -> anyhow::Result<Vec<Value>> {
    let share = (world.size() - 1) as f64 / world.size() as f64;
    let row = |times: SumTimes| {
        let at = |q: f64| times.microseconds[(q * (times.microseconds.len() - 1) as f64) as usize];
        json!({
            "operation": times.name,
            "bytes": times.bytes,
            "repetitions": times.repetitions,
            "us_median": at(0.5),
            "us_p90": at(0.9),
            "gb_per_s": times.bytes as f64 * 2.0 * share / at(0.5) / 1e3,
        })
    };
    Ok(time_device_sums(world, local_rank)?.into_iter().map(row).collect())
}

/// Every collective at one size; bandwidth is what one rank sends and receives each way.
fn measure(world: &Group, bytes: usize, raw_address: std::net::IpAddr) -> anyhow::Result<Vec<Value>> {
    let n = world.size();
    let mut floats = vec![1.0f32; bytes / 4];
    let mine = vec![1u8; bytes];
    let mut all = vec![0u8; bytes * n];
    let parts = vec![1u8; bytes / n * n];
    let mut received = vec![0u8; bytes / n * n];
    let mut buffer = vec![0u8; bytes];
    let share = |times: f64| bytes as f64 * times;
    let moved = (n - 1) as f64 / n as f64;
    let mut rows = vec![];
    let mut row = |name: &str, traffic: f64, mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        let at = |q: f64| times[(q * (times.len() - 1) as f64) as usize] * 1e6;
        rows.push(json!({
            "operation": name,
            "bytes": bytes,
            "repetitions": times.len(),
            "us_median": at(0.5),
            "us_p90": at(0.9),
            "gb_per_s": traffic / at(0.5) / 1e3,
        }));
    };
    let mut socket = raw_socket(world, raw_address)?;
    row("raw", share(1.0), raw(world, bytes, &mut socket)?);
    if bytes < DUPLEX_BYTES {
        row("raw, cold", share(1.0), raw_cold(world, bytes, &mut socket)?);
    } else {
        row("raw duplex", share(1.0), raw_duplex(world, bytes, &socket)?);
    }
    drop(socket);
    row(
        "ping-pong",
        share(1.0),
        timed(world, || match world.rank() {
            0 => {
                world.send(1, Channel::Data, &mine, DOING)?;
                Ok(world.recv(1, Channel::Data, &mut buffer, DOING)?)
            }
            1 => {
                world.recv(0, Channel::Data, &mut buffer, DOING)?;
                Ok(world.send(0, Channel::Data, &mine, DOING)?)
            }
            _ => Ok(()),
        })?,
    );
    row("all_reduce", share(2.0 * moved), timed(world, || Ok(world.all_reduce(&mut floats, Wire::F32, DOING)?))?);
    row("bf16", share(moved), timed(world, || Ok(world.all_reduce(&mut floats, Wire::Bf16, DOING)?))?);
    row("all_gather", share((n - 1) as f64), timed(world, || Ok(world.all_gather(&mine, &mut all, DOING)?))?);
    row("all_to_all", share(moved), timed(world, || Ok(world.all_to_all(&parts, &mut received, DOING)?))?);
    row("broadcast", share(1.0), timed(world, || Ok(world.broadcast(0, &mut buffer, DOING)?))?);
    Ok(rows)
}

/// Times of `operation` on this rank, as often on every rank as rank 0 says.
fn timed(world: &Group, mut operation: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
    world.barrier(DOING)?;
    let start = Instant::now();
    for _ in 0..3 {
        operation()?;
    }
    let once = start.elapsed().as_secs_f64() / 3.0;
    let mut repetitions = [((ROW_SECONDS / once) as u32).clamp(5, 2000)];
    world.broadcast(0, bytemuck::cast_slice_mut(&mut repetitions), DOING)?;
    (0..repetitions[0])
        .map(|_| {
            let start = Instant::now();
            operation()?;
            Ok(start.elapsed().as_secs_f64())
        })
        .collect()
}

/// A socket between ranks 0 and 1, without anything of Tandem.
fn raw_socket(world: &Group, address: std::net::IpAddr) -> anyhow::Result<Option<TcpStream>> {
    let stream = match world.rank() {
        0 => {
            let listener = TcpListener::bind((address, 0)).context("cannot listen for the raw socket")?;
            let text = listener.local_addr()?.to_string();
            world.send(1, Channel::Command, text.as_bytes(), DOING)?;
            Some(listener.accept()?.0)
        }
        1 => {
            let mut text = vec![];
            world.recv_when_ready(0, Channel::Command, &mut text, DOING)?;
            Some(TcpStream::connect(String::from_utf8(text)?).context("cannot reach rank 0's raw socket")?)
        }
        _ => None,
    };
    if let Some(stream) = &stream {
        stream.set_nodelay(true)?;
    }
    Ok(stream)
}

/// `bytes` to the other side and back: what an all_reduce of two ranks has to beat where latency counts.
fn raw(world: &Group, bytes: usize, stream: &mut Option<TcpStream>) -> anyhow::Result<Vec<f64>> {
    let mut buffer = vec![1u8; bytes];
    let rank = world.rank();
    timed(world, || {
        let Some(stream) = stream else { return Ok(()) };
        if rank == 0 {
            stream.write_all(&buffer)?;
            stream.read_exact(&mut buffer)?;
        } else {
            stream.read_exact(&mut buffer)?;
            stream.write_all(&buffer)?;
        }
        Ok(())
    })
}

/// As [`raw`], of sides that read memory before they write, which is left out of the time: the caches hold nothing of the
/// way through the system, and the side that waits has gone to sleep. What the two hops of a token have to be compared with.
fn raw_cold(world: &Group, bytes: usize, stream: &mut Option<TcpStream>) -> anyhow::Result<Vec<f64>> {
    let mut buffer = vec![1u8; bytes.max(size_of::<f64>())];
    let memory = vec![1u64; if stream.is_some() { READ_BETWEEN / size_of::<u64>() } else { 0 }];
    let read = || {
        let start = Instant::now();
        std::hint::black_box(memory.iter().fold(0, |sum, word| sum ^ word));
        start.elapsed().as_secs_f64()
    };
    let (rank, mut times) = (world.rank(), vec![]);
    timed(world, || {
        let Some(stream) = stream else { return Ok(()) };
        if rank == 0 {
            read();
            let start = Instant::now();
            stream.write_all(&buffer)?;
            stream.read_exact(&mut buffer)?;
            let reading = f64::from_le_bytes(*buffer.first_chunk().context("a time")?);
            times.push(start.elapsed().as_secs_f64() - reading);
        } else {
            stream.read_exact(&mut buffer)?;
            let reading = read();
            buffer[..size_of::<f64>()].copy_from_slice(&reading.to_le_bytes());
            stream.write_all(&buffer)?;
        }
        Ok(())
    })?;
    Ok(if rank == 0 { times } else { vec![0.0] })
}

/// `bytes` in both directions at once: what an all_reduce of two ranks has to reach where bandwidth counts.
fn raw_duplex(world: &Group, bytes: usize, stream: &Option<TcpStream>) -> anyhow::Result<Vec<f64>> {
    let (out, mut into) = (vec![1u8; bytes], vec![0u8; bytes]);
    timed(world, || {
        let Some(stream) = stream else { return Ok(()) };
        let (mut reader, mut writer, out) = (stream, stream, &out);
        std::thread::scope(|scope| {
            let sent = scope.spawn(move || writer.write_all(out));
            reader.read_exact(&mut into)?;
            Ok(sent.join().unwrap_or(Ok(()))?)
        })
    })
}
