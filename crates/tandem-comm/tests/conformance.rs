//! Every transport does the same: one suite over threads, TCP, and MPI where a launcher is installed.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use tandem_comm::tcp::{Hello, Peer, Secret, Tcp, TcpConfig};
use tandem_comm::{Channel, CommError, Doing, Failure, Group, Transport, Wire, local, tcp};

const TEST: Doing = Doing::of("test");
const DEADLINE: Duration = Duration::from_secs(5);

fn peers(listeners: &[TcpListener]) -> Vec<Peer> {
    listeners.iter().map(|l| Peer { host: "loopback".to_string(), address: l.local_addr().expect("bound") }).collect()
}

fn config(rank: usize, peers: &[Peer], deadline: Duration) -> TcpConfig {
    TcpConfig {
        rank,
        peers: peers.to_vec(),
        secret: Secret([7; 32]),
        encrypt: false,
        generation: 0,
        hello: Hello { version: "test".to_string(), model: "none".to_string() },
        deadline,
        start_timeout: Duration::from_secs(20),
        on_failure: Box::new(|_| {}),
    }
}

fn listeners(n: usize) -> Vec<TcpListener> {
    (0..n).map(|_| tcp::listen("127.0.0.1:0".parse().expect("an address")).expect("loopback")).collect()
}

/// Runs `rank` in a thread per rank over TCP, plain and then encrypted.
fn over_tcp<R: Send>(n: usize, deadline: Duration, rank: impl Fn(Tcp) -> R + Sync) -> [Vec<R>; 2] {
    [false, true].map(|encrypt| over_one_tcp(n, deadline, encrypt, &rank))
}

fn over_one_tcp<R: Send>(n: usize, deadline: Duration, encrypt: bool, rank: impl Fn(Tcp) -> R + Sync) -> Vec<R> {
    let listeners = listeners(n);
    let peers = peers(&listeners);
    std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(i, listener)| {
                let (peers, rank) = (&peers, &rank);
                let config = TcpConfig { encrypt, ..config(i, peers, deadline) };
                scope.spawn(move || rank(tcp::connect(listener, config).expect("meets")))
            })
            .collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    })
}

fn over_local<R: Send>(n: usize, rank: impl Fn(local::Local) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> = local::group(n).into_iter().map(|t| scope.spawn(move || rank(t))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    })
}

fn world(transport: impl Transport + 'static) -> Group {
    Group::world(Box::new(transport), DEADLINE)
}

/// Values whose sum depends on the order.
fn values(rank: usize, n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 7919 + rank * 104_729) % 1000) as f32 * 1.7e-3 * 10f32.powi((i + rank) as i32 % 7 - 3))
        .collect()
}

/// The whole suite, from one rank's side.
fn suite(group: &Group) {
    let (n, me) = (group.size(), group.rank());
    group.barrier(TEST).expect("barrier");
    for len in [0, 1, 3, 97, 6144, 16 * 1024 + 5, 100_003] {
        let mut sum = values(me, len);
        group.all_reduce(&mut sum, Wire::F32, TEST).expect("all_reduce");
        let expected =
            (1..n).fold(values(0, len), |sum, r| sum.iter().zip(values(r, len)).map(|(a, b)| a + b).collect());
        assert!(sum.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{n} ranks, {len} values");

        let mut sum = values(me, len);
        group.all_reduce(&mut sum, Wire::Bf16, TEST).expect("all_reduce");
        let round = |v: &f32| if n == 1 { *v } else { half::bf16::from_f32(*v).to_f32() };
        let rounded = |r: usize| -> Vec<f32> { values(r, len).iter().map(round).collect() };
        let expected = (1..n)
            .fold(rounded(0), |sum, r| sum.iter().zip(rounded(r)).map(|(a, b)| a + b).collect())
            .iter()
            .map(round)
            .collect::<Vec<f32>>();
        assert_eq!(sum, expected, "{n} ranks, {len} values in bf16");

        let mine: Vec<u8> = (0..len).map(|i| (i * 31 + me) as u8).collect();
        let mut all = vec![0; n * len];
        group.all_gather(&mine, &mut all, TEST).expect("all_gather");
        assert!(all.iter().enumerate().all(|(i, b)| *b == (i % len.max(1) * 31 + i / len.max(1)) as u8));

        let send: Vec<u8> = (0..n * len).map(|i| (i * 13 + me * 5) as u8).collect();
        let mut recv = vec![0; n * len];
        group.all_to_all(&send, &mut recv, TEST).expect("all_to_all");
        let expected = |i: usize| ((me * len + i % len.max(1)) * 13 + i / len.max(1) * 5) as u8;
        assert!(recv.iter().enumerate().all(|(i, b)| *b == expected(i)));

        for root in 0..n {
            let mut data = if me == root { values(root, len) } else { vec![0.0; len] };
            group.broadcast(root, bytemuck::cast_slice_mut(&mut data), TEST).expect("broadcast");
            assert_eq!(data, values(root, len));
        }
    }
    let messages = group.gather_messages(format!("rank {me}").repeat(me).as_bytes(), TEST).expect("gathers");
    assert!(messages.iter().enumerate().all(|(r, m)| *m == format!("rank {r}").repeat(r).as_bytes()));

    // Channels do not wait for each other, whatever order the other side sends in.
    if n > 1 && me == 0 {
        for i in 0..3u8 {
            group.send(1, Channel::Command, &vec![i; 10 + usize::from(i)], TEST).expect("sends");
        }
        group.send(1, Channel::Data, &[9; 50_000], TEST).expect("sends");
        group.send(1, Channel::Command, &[3; 13], TEST).expect("sends");
        group.send(1, Channel::Data, &[8; 5], TEST).expect("sends");
    } else if me == 1 {
        let (mut large, mut small, mut command) = ([0; 50_000], [0; 5], vec![]);
        group.recv(0, Channel::Data, &mut large, TEST).expect("receives");
        for i in 0..4u8 {
            group.recv_when_ready(0, Channel::Command, &mut command, TEST).expect("receives");
            assert_eq!(command, vec![i; 10 + usize::from(i)]);
        }
        group.recv(0, Channel::Data, &mut small, TEST).expect("receives");
        assert!(large == [9; 50_000] && small == [8; 5]);
    }
    // Commands do not wait for a receiver that waits itself for its activations to be taken.
    if n > 1 && me < 2 {
        let (there, mut here) = (vec![me as u8 + 1; 16 << 20], vec![0; 16 << 20]);
        if me == 0 {
            group.send(1, Channel::Command, &there, TEST).expect("sends");
            group.recv(1, Channel::Data, &mut here, TEST).expect("receives");
        } else {
            group.send(0, Channel::Data, &there, TEST).expect("sends");
            group.recv_when_ready(0, Channel::Command, &mut here, TEST).expect("receives");
        }
        assert!(here == vec![2 - me as u8; 16 << 20]);
    }
    // Every second rank on its own.
    let members: Vec<usize> = (0..n).filter(|r| r % 2 == me % 2).collect();
    let pair = group.subgroup(&members);
    let mut sum = vec![me as f32; 10];
    pair.all_reduce(&mut sum, Wire::F32, TEST).expect("all_reduce");
    assert_eq!(sum, vec![members.iter().sum::<usize>() as f32; 10]);
    group.barrier(TEST).expect("barrier");
    group.leave();
}

#[test]
fn threads_conform() {
    for n in 1..=5 {
        over_local(n, |t| suite(&world(t)));
    }
}

#[test]
fn tcp_conforms() {
    for n in 1..=4 {
        over_tcp(n, DEADLINE, |t| suite(&world(t)));
    }
}

#[test]
fn messages_in_two_parts_wait_for_those_of_another_channel() {
    over_tcp(2, DEADLINE, |t| {
        let group = world(t);
        let lengths = [3 << 20, 5, (1 << 20) + 1, 400_000];
        if group.rank() == 0 {
            for (i, length) in lengths.into_iter().enumerate() {
                let data: Vec<u8> = (0..length).map(|j| (i + j / 3) as u8).collect();
                group.send(1, Channel::Data, &data, TEST).expect("sends");
            }
            group.send(1, Channel::Command, &[7; 1 << 20], TEST).expect("sends");
        } else {
            let mut command = vec![0; 1 << 20];
            group.recv(0, Channel::Command, &mut command, TEST).expect("receives");
            assert!(command == [7; 1 << 20]);
            for (i, length) in lengths.into_iter().enumerate() {
                let mut data = vec![0; length];
                group.recv(0, Channel::Data, &mut data, TEST).expect("receives");
                assert!(data.iter().enumerate().all(|(j, b)| *b == (i + j / 3) as u8), "message {i}");
            }
        }
        group.barrier(TEST).expect("barrier");
        group.leave();
    });
}

fn blamed(result: Result<(), CommError>) -> (Option<usize>, CommError) {
    let error = result.expect_err("the other rank failed");
    (error.rank, error)
}

#[test]
fn a_rank_that_ends_is_named_by_every_other() {
    let errors = over_tcp(3, DEADLINE, |t| {
        let rank = t.rank();
        let group = world(t);
        group.barrier(TEST).expect("all there");
        if rank == 2 {
            // The others may still be reading the barrier's messages; an end is noticed at once.
            std::thread::sleep(Duration::from_millis(300));
            return None;
        }
        // Rank 0 waits for rank 1, which waits for rank 2.
        let mut byte = [0];
        let start = Instant::now();
        let (blamed, error) = blamed(group.recv(rank + 1, Channel::Data, &mut byte, TEST));
        assert!(start.elapsed() < Duration::from_secs(2));
        group.abort(&error.to_string());
        Some((blamed, error))
    });
    for (blamed, error) in errors.into_iter().flatten().flatten() {
        assert!(blamed == Some(2) || error.to_string().contains("rank 2"), "{error}");
        assert_eq!(error.doing, Some(TEST));
    }
}

#[test]
fn a_rank_that_hangs_is_named_within_the_deadline() {
    // The other side of these connections is this test, which never speaks after the handshake.
    let deadline = Duration::from_millis(600);
    let errors = over_tcp(2, deadline, |t| {
        if t.rank() == 1 {
            // Signs of life go on, data does not come.
            std::thread::sleep(deadline * 3);
            return None;
        }
        let group = Group::world(Box::new(t), deadline);
        let start = Instant::now();
        let (blamed, error) = blamed(group.recv(1, Channel::Data, &mut [0], TEST));
        assert!((deadline..deadline * 2).contains(&start.elapsed()), "{:?}", start.elapsed());
        Some((blamed, error))
    });
    for of_ranks in errors {
        let (blamed, error) = of_ranks[0].clone().expect("rank 0");
        assert!(blamed == Some(1) && matches!(error.failure, Failure::Stalled { .. }), "{error}");
    }
}

#[test]
fn a_reason_reaches_the_others() {
    let errors = over_tcp(2, DEADLINE, |t| {
        let rank = t.rank();
        let group = world(t);
        if rank == 1 {
            group.abort("the disk is full");
            return None;
        }
        let mut byte = vec![];
        Some(group.recv_when_ready(1, Channel::Command, &mut byte, TEST).expect_err("aborted"))
    });
    for of_ranks in errors {
        let error = of_ranks[0].clone().expect("rank 0");
        assert_eq!(error.failure, Failure::Stopped { message: "the disk is full".to_string() });
    }
}

#[test]
fn an_order_leave_is_no_failure() {
    over_tcp(3, DEADLINE, |t| {
        let rank = t.rank();
        let group = world(t);
        group.barrier(TEST).expect("all there");
        if rank == 0 {
            group.leave();
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
        group.subgroup(&[1, 2]).barrier(TEST).expect("the others go on");
        group.leave();
    });
}

#[test]
fn different_versions_and_models_do_not_meet() {
    for (version, model, expected) in [("2", "a", "runs tandem"), ("1", "b", "has another model")] {
        let listeners = listeners(2);
        let peers = peers(&listeners);
        let errors: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = listeners
                .into_iter()
                .enumerate()
                .map(|(i, listener)| {
                    let hello = if i == 0 { ("1", "a") } else { (version, model) };
                    let hello = Hello { version: hello.0.to_string(), model: hello.1.to_string() };
                    let config = TcpConfig { hello, ..config(i, &peers, DEADLINE) };
                    scope.spawn(move || tcp::connect(listener, config).err().expect("differs").to_string())
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect()
        });
        assert!(errors.iter().all(|e| e.contains(expected)), "{errors:?}");
    }
}

#[test]
fn strangers_are_dropped_and_nothing_is_lost() {
    knock(600, false);
    knock(600, true);
}

#[test]
#[ignore = "takes half a minute"]
fn ten_thousand_strangers_are_dropped() {
    knock(10_000, false);
}

/// `n` connections that do not belong to the launch, then the ranks that do.
fn knock(n: u32, encrypt: bool) {
    let listeners = listeners(2);
    let peers = peers(&listeners);
    let target = peers[0].address;
    let mut listeners = listeners.into_iter();
    let (first, second) = (listeners.next().expect("two"), listeners.next().expect("two"));
    let rank = |i: usize, listener: TcpListener| {
        let mut config = config(i, &peers, DEADLINE);
        config.start_timeout = Duration::from_secs(120);
        config.encrypt = encrypt;
        std::thread::spawn(move || tcp::connect(listener, config).map(|t| suite(&world(t))))
    };
    let zero = rank(0, first);
    let mut kept = vec![];
    for i in 0..n {
        let Ok(mut stream) = TcpStream::connect(target) else { continue };
        let _ = match i % 4 {
            0 => stream.write_all(&i.to_le_bytes().repeat(20)),
            1 => stream.write_all(b"GET / HTTP/1.1\r\n\r\n"),
            // A first message and a wrong proof that claims to be rank 1.
            2 => stream.write_all(&[&b"TANDEM/1"[..], &[1; 32], &[1, 0, 0], &[5; 32]].concat()),
            _ => Ok(()), // half-open
        };
        if i % 3 == 0 {
            // As many as one process may have open.
            kept.truncate(300);
            kept.push(stream);
        }
    }
    let one = rank(1, second);
    for thread in [zero, one] {
        thread.join().expect("no panic").expect("meets");
    }
}

#[test]
fn a_wrong_secret_or_generation_does_not_get_in() {
    for (secret, generation, encrypt) in
        [(8, 0, false), (7, 1, false), (8, 0, true), (7, 1, true)].map(|(key, g, e)| (Secret([key; 32]), g, e))
    {
        let listeners = listeners(2);
        let peers = peers(&listeners);
        std::thread::scope(|scope| {
            for (i, listener) in listeners.into_iter().enumerate() {
                let mut config = config(i, &peers, DEADLINE);
                config.start_timeout = Duration::from_millis(400);
                config.encrypt = encrypt;
                if i == 1 {
                    (config.secret, config.generation) = (secret.clone(), generation);
                }
                scope.spawn(move || {
                    let error = tcp::connect(listener, config).err().expect("does not meet").to_string();
                    assert!(error.contains(&format!("rank {} (loopback)", 1 - i)), "{error}");
                });
            }
        });
    }
}

#[test]
fn plain_and_encrypted_ranks_do_not_meet() {
    for encrypting in [0, 1] {
        let listeners = listeners(2);
        let peers = peers(&listeners);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (i, listener) in listeners.into_iter().enumerate() {
                let config = TcpConfig { encrypt: i == encrypting, ..config(i, &peers, DEADLINE) };
                scope.spawn(move || {
                    let error = tcp::connect(listener, config).err().expect("differs").to_string();
                    let how = |rank| if rank == encrypting { "with --encrypt" } else { "without --encrypt" };
                    let other = format!("rank {} (loopback) was started {}, ", 1 - i, how(1 - i));
                    assert!(error.starts_with(&other) && error.contains(how(i)), "{error}");
                });
            }
        });
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

/// One byte less than the longest frame has.
const LONG: u16 = u16::MAX - 1;

/// What somebody between two ranks may do to a frame.
#[derive(Clone, Copy, Debug)]
enum Tamper {
    /// Another bit in its middle.
    Flip,
    /// Another length.
    Length(u16),
    /// The frame twice.
    Repeat,
    /// Not at all.
    LeaveOut,
    /// Behind the next one.
    Swap,
    /// The frame that the other side sent, back to it.
    Reflect,
}

/// Passes frames of one connection on, and does something to the third; the first is the introduction.
fn pass_on(mut from: TcpStream, mut to: TcpStream, handshake: usize, tamper: Option<Tamper>, back: TcpStream) {
    let mut back = back;
    let mut pass = || -> std::io::Result<()> {
        // Each side waits for the other meanwhile.
        let mut start = vec![0; handshake];
        while !start.is_empty() {
            let n = from.read(&mut start)?;
            to.write_all(&start[..n])?;
            start.truncate(if n == 0 { 0 } else { start.len() - n });
        }
        let mut kept: Option<Vec<u8>> = None;
        for i in 0.. {
            let mut length = [0; 2];
            from.read_exact(&mut length)?;
            let mut frame = vec![0; usize::from(u16::from_le_bytes(length))];
            from.read_exact(&mut frame)?;
            let mut whole = [&length[..], &frame].concat();
            match tamper.filter(|_| i == 2) {
                None => {}
                Some(Tamper::Flip) => whole[2 + frame.len() / 2] ^= 4,
                Some(Tamper::Length(length)) => whole[..2].copy_from_slice(&length.to_le_bytes()),
                Some(Tamper::Repeat) => to.write_all(&whole)?,
                Some(Tamper::LeaveOut) => continue,
                Some(Tamper::Swap) => {
                    kept = Some(whole);
                    continue;
                }
                Some(Tamper::Reflect) => back.write_all(&whole)?,
            }
            to.write_all(&whole)?;
            if let Some(kept) = kept.take() {
                to.write_all(&kept)?;
            }
        }
        Ok(())
    };
    let _ = pass();
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// Two encrypted ranks with somebody between them, who does something to one connection (messages, signs of life, second
/// parts), in one direction; the error of each.
fn between(connection: usize, to_rank_0: bool, tamper: Tamper) -> Vec<CommError> {
    let listeners = listeners(2);
    let true_peers = peers(&listeners);
    let middle = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let mut seen_by_1 = true_peers.clone();
    seen_by_1[0].address = middle.local_addr().expect("bound");
    let target = true_peers[0].address;
    std::thread::spawn(move || {
        for (i, stream) in middle.incoming().take(3).enumerate() {
            let (Ok(one), Ok(zero)) = (stream, TcpStream::connect(target)) else { return };
            let clone = |stream: &TcpStream| stream.try_clone().expect("clones");
            let of = |direction: bool| Some(tamper).filter(|_| i == connection && direction == to_rank_0);
            let (up, down) = (of(true), of(false));
            // Behind the proofs and the two messages that agree on keys.
            let (a, b, c) = (clone(&one), clone(&zero), clone(&one));
            std::thread::spawn(move || pass_on(a, b, 40 + 35 + 48, up, c));
            let (a, b, c) = (clone(&zero), clone(&one), clone(&zero));
            std::thread::spawn(move || pass_on(a, b, 32 + 32 + 48, down, c));
        }
    });
    std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(i, listener)| {
                let peers = if i == 1 { &seen_by_1 } else { &true_peers };
                let config = TcpConfig { encrypt: true, ..config(i, peers, Duration::from_secs(1)) };
                scope.spawn(move || {
                    let group = world(tcp::connect(listener, config).expect("meets"));
                    // Long enough to go over both connections.
                    let (mine, mut all) = (vec![1; 1 << 20], vec![0; 2 << 20]);
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_secs(20) {
                        if let Err(error) = group.all_gather(&mine, &mut all, TEST) {
                            group.abort(&error.to_string());
                            return error;
                        }
                    }
                    panic!("{tamper:?} of connection {connection} was not noticed");
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    })
}

#[test]
fn frames_that_were_tampered_with_are_refused() {
    let kinds = [
        Tamper::Flip,
        Tamper::Length(0),
        Tamper::Length(16),
        Tamper::Length(LONG),
        Tamper::Repeat,
        Tamper::LeaveOut,
        Tamper::Swap,
        Tamper::Reflect,
    ];
    for tamper in kinds {
        std::thread::scope(|scope| {
            for (connection, to_rank_0) in [(0, true), (0, false), (1, true), (1, false), (2, true), (2, false)] {
                scope.spawn(move || {
                    let errors = between(connection, to_rank_0, tamper);
                    // A reflected frame reaches the rank that sent it.
                    let noticing = if to_rank_0 != matches!(tamper, Tamper::Reflect) { 0 } else { 1 };
                    let what = format!("{tamper:?} of connection {connection}: {errors:?}");
                    let error = &errors[noticing];
                    assert_eq!(error.rank, Some(1 - noticing), "{what}");
                    // Signs of life are too few to fill a frame that is said to be longer.
                    let starves = connection == 1 && matches!(tamper, Tamper::Length(LONG));
                    let word = if starves { "did not answer" } else { "altered, repeated or left out" };
                    assert!(error.to_string().contains(word), "{what}");
                    // The other one learns it, or misses the signs of life.
                    let learnt = errors[1 - noticing].to_string();
                    assert!(learnt.contains(word) || learnt.contains(&format!("rank {noticing}")), "{what}");
                });
            }
        });
    }
}

/// One rank of [`mpi_conforms`], started by mpirun.
#[test]
#[ignore = "started by mpi_conforms under mpirun"]
fn mpi_rank() {
    suite(&world(tandem_comm::mpi::init().expect("libmpi")));
}

#[test]
fn mpi_conforms() {
    for mpirun in ["mpirun.openmpi", "mpirun.mpich"] {
        let mut found = 0;
        for n in ["1", "2", "3"] {
            let mut command = std::process::Command::new(mpirun);
            command.args(["-n", n]).arg(std::env::current_exe().expect("this test"));
            command.args(["--exact", "mpi_rank", "--ignored"]);
            // Open MPI refuses root and more ranks than cores unless told otherwise, and looks for an ssh.
            for name in
                ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"]
            {
                command.env(name, "1");
            }
            command.env("OMPI_MCA_plm", "isolated");
            let Ok(output) = command.output() else { continue };
            found += 1;
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{mpirun}: {text}{}", String::from_utf8_lossy(&output.stderr));
        }
        let required = std::env::var_os("TANDEM_REQUIRE_MPI").is_some();
        assert!(found == 3 || !required, "{mpirun} was not found (Debian: apt-get install openmpi-bin mpich)");
    }
}
