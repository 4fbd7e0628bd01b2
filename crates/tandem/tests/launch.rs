//! `tandem launch` and `--ranks`, black box: equal answers, and no rank outlives the others.
#![cfg(target_os = "linux")]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{command, file, finish, golden, tandem, temporary, text};
use serde_json::Value;

const PROMPT: &str = "Tell me a story about a brave fox named Lily.";

fn tokens(flags: &[&str], model: &str) -> Vec<Value> {
    let run = ["run", "--raw", "--json", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"];
    let rest = ["--activations", "f32", "--threads", "1", "--context", "256", "--model", model, PROMPT];
    let args = [&run[..], flags, &rest[..]].concat();
    tandem(&args).json()["tokens"].as_array().expect("tokens").clone()
}

#[test]
fn every_way_to_start_ranks_gives_the_tokens_of_one() {
    for model in ["models/fable-30m-MXFP4-Q8".to_string(), golden("models/glm51_tiny")] {
        let expected = tokens(&[], &model);
        for flags in [
            &["--ranks", "2"][..],
            &["--pp", "3"],
            &["--tp", "2"],
            &["--ep", "2"],
            &["--pp", "2", "--tp", "2"],
            &["--ranks", "2", "--pp", "2", "--transport", "local"],
            &["--tp", "2", "--transport", "local"],
        ] {
            assert_eq!(tokens(flags, &model), expected, "{flags:?}");
        }
    }
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

#[test]
fn mpi_launchers_give_the_tokens_of_one() {
    let model = golden("models/glm51_tiny");
    let expected = tokens(&[], &model);
    for mpirun in ["mpirun.openmpi", "mpirun.mpich"].into_iter().filter(|m| installed(m)) {
        for division in [["--pp", "2"], ["--pp", "3"], ["--tp", "2"], ["--ep", "2"]] {
            let launch = ["launch", "--transport", "mpi", "--mpirun", mpirun, division[0], division[1], "--", "run"];
            let run =
                ["--raw", "--json", "--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--activations", "f32"];
            let rest = ["--threads", "1", "--context", "256", "--model", &model, PROMPT];
            let mut command = command(&[&launch[..], &run, &rest].concat());
            for name in
                ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"]
            {
                command.env(name, "1");
            }
            let found = finish(&mut command).json();
            assert_eq!(found["tokens"].as_array(), Some(&expected), "{mpirun} {division:?}");
        }
    }
}

/// An ssh that runs the command here, and writes down how it was called.
#[test]
fn other_hosts_are_reached_through_ssh_without_the_secret_on_the_command_line() {
    use std::os::unix::fs::PermissionsExt;
    let dir = temporary();
    let log = text(&dir.path().join("log"));
    let ssh = file(
        &dir,
        "ssh",
        format!("#!/bin/sh\necho \"$@\" >> {log}\nenv >> {log}\nfor last; do :; done\nexec sh -c \"$last\"\n"),
    );
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).expect("own file");
    let path = format!("{}:{}", text(dir.path()), std::env::var("PATH").unwrap_or_default());
    let model = golden("models/glm51_tiny");
    let expected = tokens(&[], &model);
    for hosts in [
        r#"[{"ssh": "localhost"}, {"ssh": "far away", "ips": ["127.0.0.1"], "rdma": [null]}]"#,
        r#"{"hosts": [{"ssh": "a", "ips": ["127.0.0.1"]}, {"ssh": "b", "ips": ["127.0.0.1"]}]}"#,
    ] {
        let hostfile = file(&dir, "hosts.json", hosts);
        let launch =
            ["launch", "--hostfile", &hostfile, "--backend", "ring", "--pp", "2", "--remote-model", &model, "--"];
        let run = ["run", "--raw", "--json", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"];
        let rest = ["--activations", "f32", "--threads", "1", "--context", "256", "--model", &model, PROMPT];
        let found = finish(command(&[&launch[..], &run, &rest].concat()).env("PATH", &path)).json();
        assert_eq!(found["tokens"].as_array(), Some(&expected));
    }
    let log = std::fs::read_to_string(log).expect("ssh was called");
    assert!(log.contains("BatchMode=yes far away"), "{log}");
    // The secret is 64 hexadecimal digits.
    let digits = log.split(|c: char| !c.is_ascii_hexdigit()).map(str::len).max();
    assert!(digits < Some(64), "{log}");
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    for (flags, expected) in [
        (&["--ranks", "2", "--pp", "3"][..], "needs 3 ranks, but there are 2"),
        (&["--ranks", "2", "--tp", "2", "--ep", "3"], "must be equal"),
        (&["--pp", "0"], "at least 1"),
        (&["--pp", "2", "--deadline", "0"], "--deadline must be between"),
        (&["--ranks", "2", "--transport", "mpi"], "needs an MPI launcher"),
    ] {
        let done = tandem(&[&["run", "--raw"], flags, &["--context", "128", "hello"]].concat());
        assert_ne!(done.code, Some(0));
        assert!(done.stderr.contains(expected), "{flags:?}: {}", done.stderr);
    }
}

/// A launch in the background, with its ranks' process ids.
struct Launch {
    child: Child,
    ranks: Vec<u32>,
}

fn children(of: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    let mut pids: Vec<u32> = text.split_whitespace().filter_map(|p| p.parse().ok()).collect();
    pids.sort_unstable();
    pids
}

fn runs(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z')
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(status.expect("kill").success());
}

fn launch(n: usize, flags: &[&str], run_flags: &[&str]) -> Launch {
    let ranks = n.to_string();
    let launch = ["launch", "--deadline", "4", "--ranks", &ranks];
    let run = ["--", "run", "--raw", "--temperature", "0", "--threads", "1", "--activations", "f32", "--ignore-eos"];
    let args = [&launch[..], flags, &run, run_flags].concat();
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let start = Instant::now();
    let mut pids = vec![];
    while pids.len() < n && start.elapsed() < Duration::from_secs(20) {
        assert!(child.try_wait().expect("a child").is_none(), "the launcher ended");
        pids = children(child.id());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(pids.len(), n);
    Launch { child, ranks: pids }
}

impl Launch {
    /// Waits for text, so that decoding is under way.
    fn wait_for_text(&mut self) {
        let stdout = self.child.stdout.as_mut().expect("piped");
        stdout.read_exact(&mut [0; 40]).expect("the model speaks");
    }

    /// Code and stderr, which must come within the deadline.
    fn end(mut self, within: Duration) -> (Option<i32>, String, Duration) {
        let start = Instant::now();
        // The story goes on until the end.
        let mut stdout = self.child.stdout.take().expect("piped");
        std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        let stderr = BufReader::new(self.child.stderr.take().expect("piped"));
        let reader = std::thread::spawn(move || stderr.lines().map_while(Result::ok).collect::<Vec<_>>().join("\n"));
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            assert!(start.elapsed() < within, "the launcher did not end within {within:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        let took = start.elapsed();
        while self.ranks.iter().any(|pid| runs(*pid)) {
            assert!(start.elapsed() < within, "a rank outlived the launcher");
            std::thread::sleep(Duration::from_millis(5));
        }
        (status.code(), reader.join().expect("no panic"), took)
    }
}

const ENDLESS: [&str; 3] = ["--max-tokens", "30000", PROMPT];
/// The deadline of these launches, and some time for a busy machine.
const WITHIN: Duration = Duration::from_secs(6);

#[test]
fn a_killed_rank_is_named_and_nobody_outlives_it() {
    for (n, flags, victim) in [(2, ["--pp", "2"], 1), (3, ["--pp", "3"], 0), (2, ["--tp", "2"], 1)] {
        let mut launch = launch(n, &flags, &ENDLESS);
        launch.wait_for_text();
        signal(launch.ranks[victim], "KILL");
        let (code, stderr, _) = launch.end(WITHIN);
        assert_ne!(code, Some(0));
        assert!(stderr.contains(&format!("rank {victim} (localhost) is gone")), "{stderr}");
        assert!(stderr.contains(&format!("rank {victim} (localhost) ended first: signal: 9")), "{stderr}");
    }
}

#[test]
fn a_suspended_rank_is_named_within_the_deadline() {
    let mut launch = launch(2, &["--pp", "2"], &ENDLESS);
    launch.wait_for_text();
    signal(launch.ranks[1], "STOP");
    let (code, stderr, _) = launch.end(WITHIN * 2);
    assert_ne!(code, Some(0));
    assert!(stderr.contains("rank 1 (localhost) did not answer"), "{stderr}");
}

#[test]
fn the_end_of_the_launcher_ends_every_rank() {
    for (name, code) in [("KILL", None), ("INT", Some(130)), ("TERM", Some(130))] {
        let mut launch = launch(2, &["--pp", "2"], &ENDLESS);
        launch.wait_for_text();
        signal(launch.child.id(), name);
        assert_eq!(launch.end(WITHIN).0, code);
    }
}

#[test]
fn restarted_ranks_answer() {
    let mut launch = launch(2, &["--pp", "2", "--restart", "1"], &["--max-tokens", "400", PROMPT]);
    launch.wait_for_text();
    signal(launch.ranks[1], "KILL");
    let (code, stderr, _) = launch.end(Duration::from_secs(60));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stderr.contains("starting the ranks again (1 of 1)") && stderr.contains("generated 400 tokens"),
        "{stderr}"
    );
}

/// Kills a random rank at a random moment, many times: `cargo test -p tandem --test launch -- --ignored --nocapture`.
#[test]
#[ignore = "takes minutes; see bench/runs/2026-11-23-comm"]
fn soak_of_killed_ranks() {
    let prompt = PROMPT.repeat(60);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    let mut slowest = Duration::ZERO;
    let mut stages = [0; 3];
    for i in 0..200 {
        let (n, flags) =
            [(2, ["--pp", "2"]), (3, ["--pp", "3"]), (2, ["--tp", "2"]), (2, ["--ep", "2"])][next(4) as usize];
        let victim = next(n as u64) as usize;
        let moment = Duration::from_millis(next(2500));
        let mut launch = launch(n, &flags, &["--max-tokens", "30000", &prompt]);
        std::thread::sleep(moment);
        assert!(launch.child.try_wait().expect("a child").is_none(), "ended before the kill");
        signal(launch.ranks[victim], "KILL");
        let (code, stderr, took) = launch.end(WITHIN);
        assert_ne!(code, Some(0));
        assert!(stderr.contains(&format!("rank {victim} (localhost) ended first: signal: 9")), "{i}: {stderr}");
        let stage = if !stderr.contains("plan:") {
            0
        } else if stderr.contains("waiting for every rank") {
            1
        } else {
            2
        };
        stages[stage] += 1;
        slowest = slowest.max(took);
        println!("{i}: {n} ranks {flags:?}, rank {victim} killed after {moment:?}, all ended after {took:?}");
    }
    println!("200 kills ({stages:?} before the plan, while loading, running); slowest end {slowest:?}, deadline 4 s");
}
