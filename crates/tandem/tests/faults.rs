//! Faults that make a model slow or keep it from running are put into real runs, and each must be found by name. What a
//! machine does not let us inject is skipped, unless TANDEM_REQUIRE_FAULTS is set, as .ci/run does where it may.
#![cfg(target_os = "linux")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use common::tiny::{Tensor, Tiny};
use common::{Copy, command, file, finish, tandem, temporary, text};
use serde_json::{Value, json};
use tempfile::TempDir;

const FABLE: &str = "models/fable-30m-MXFP4-Q8";
/// Runs of a fault: another program may take the cores of one, which is then the larger fault.
const N_TRIES: usize = 4;

/// One at a time: a test that computes is another's fault, doctors too.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Says that a fault cannot be injected here.
fn skip(what: &str) {
    assert!(std::env::var_os("TANDEM_REQUIRE_FAULTS").is_none(), "cannot inject: {what}");
    eprintln!("SKIPPED, NOT TESTED: cannot inject {what} here");
}

fn succeeds(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// A llama of 152 MB in plain f32, which the processor reads where its file is mapped.
fn mapped_model() -> TempDir {
    const WIDTH: usize = 768;
    const MIDDLE: usize = 3072;
    const LAYERS: usize = 4;
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder on a disk");
    let mut tiny = Tiny::new(256);
    let sizes = json!({
        "hidden_size": WIDTH, "intermediate_size": MIDDLE, "num_hidden_layers": LAYERS, "num_attention_heads": 12,
        "num_key_value_heads": 12, "head_dim": 64,
    });
    tiny.config.as_object_mut().expect("an object").extend(sizes.as_object().expect("an object").clone());
    let mut state = 1u32;
    let mut matrix = |rows: usize, cols: usize| {
        let mut value = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 83_886_080.0 - 0.1
        };
        Tensor::f32(&[rows, cols], &(0..rows * cols).map(|_| value()).collect::<Vec<f32>>())
    };
    tiny.tensors.clear();
    for name in ["model.embed_tokens", "lm_head"] {
        tiny.tensors.insert(format!("{name}.weight"), matrix(256, WIDTH));
    }
    let ones = Tensor::f32(&[WIDTH], &[1.0; WIDTH]);
    tiny.tensors.insert("model.norm.weight".into(), ones.clone());
    for layer in 0..LAYERS {
        let mut add = |name: &str, tensor: Tensor| {
            tiny.tensors.insert(format!("model.layers.{layer}.{name}.weight"), tensor);
        };
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(&format!("self_attn.{name}"), matrix(WIDTH, WIDTH));
        }
        add("mlp.gate_proj", matrix(MIDDLE, WIDTH));
        add("mlp.up_proj", matrix(MIDDLE, WIDTH));
        add("mlp.down_proj", matrix(WIDTH, MIDDLE));
        add("input_layernorm", ones.clone());
        add("post_attention_layernorm", ones.clone());
    }
    tiny.write_to(dir.path());
    dir
}

/// The words of a run.
fn run<'a>(model: &'a str, n_tokens: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    let run = ["run", "Once", "--raw", "--model", model, "--max-tokens", n_tokens, "--ignore-eos"];
    [&run[..], &["--temperature", "0", "--draft-depth", "0"], flags].concat()
}

/// The command behind other programs, such as `unshare -n`.
fn behind(programs: &[&str], args: &[&str]) -> Command {
    let direct = command(args);
    let mut behind = Command::new(programs[0]);
    behind.args(&programs[1..]).arg(direct.get_program()).args(direct.get_args());
    behind
        .current_dir(common::root())
        .env("HOME", "/nonexistent")
        .env_remove("TANDEM_REQUIRE_FAULTS")
        .stdin(Stdio::null());
    behind
}

/// What `explain` says of the last run of this state directory.
fn explained(state: &TempDir) -> Value {
    finish(command(&["explain", "--json"]).env("XDG_STATE_HOME", state.path())).json()
}

/// Runs until the fault is named; whether `explain` names it may take more than one run on a busy machine.
fn diagnosed(principal: &str, run: impl Fn(&TempDir)) -> Value {
    let mut verdicts = vec![];
    for _ in 0..N_TRIES {
        let state = temporary();
        run(&state);
        let found = explained(&state);
        if found["explanation"]["principal"] == principal {
            return found;
        }
        verdicts.push(found["explanation"]["verdict"].to_string());
    }
    panic!("not {principal}:\n{}", verdicts.join("\n"));
}

/// A doctor's findings of a level other than ok: `id: what`.
fn findings(done: &common::Done) -> Vec<(String, String, String)> {
    let report: Value =
        serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", done.stdout, done.stderr));
    let findings = report["report"]["findings"].as_array().expect("findings");
    let word = |f: &Value, name: &str| f[name].as_str().expect("a word").to_string();
    let bad = findings.iter().filter(|f| f["level"] != "ok");
    bad.map(|f| (word(f, "id"), word(f, "level"), format!("{}: {}", word(f, "what"), word(f, "evidence")))).collect()
}

/// The finding with this identity, and its level.
#[track_caller]
fn found(done: &common::Done, id: &str) -> (String, String) {
    let all = findings(done);
    let one = all.iter().find(|(found, ..)| found == id).unwrap_or_else(|| panic!("no {id} in {all:?}"));
    (one.1.clone(), one.2.clone())
}

/// A control group of one controller; version 1 or 2.
struct Group(PathBuf);

impl Group {
    /// Where its limit is kept in `file`.
    fn new(controller: &str, files: [&str; 2]) -> Option<Group> {
        let name = format!("tandem-faults-{controller}-{}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        [root.join(controller), root.to_path_buf(), root.join("unified")].into_iter().find_map(|root| {
            let group = Group(root.join(&name));
            std::fs::create_dir(&group.0).ok()?;
            files.iter().any(|file| group.0.join(file).exists()).then_some(group)
        })
    }

    /// Writes one of these files, whichever is there.
    fn set(&self, values: &[(&str, &str)]) {
        for (file, value) in values {
            let path = self.0.join(file);
            if path.exists() {
                std::fs::write(&path, value).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            }
        }
    }

    fn number(&self, files: [&str; 2]) -> u64 {
        let read = |file: &&str| std::fs::read_to_string(self.0.join(file)).ok()?.trim().parse().ok();
        files.iter().find_map(read).expect("a number")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let end = Instant::now() + Duration::from_secs(5);
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Waits for something that must happen.
#[track_caller]
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn started(mut command: Command, state: &TempDir) -> Child {
    command.env("XDG_STATE_HOME", state.path()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts")
}

fn ended(child: Child) -> String {
    let output = child.wait_with_output().expect("ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// Jiffies of all processors that were not idle.
fn busy_jiffies() -> u64 {
    let text = std::fs::read_to_string("/proc/stat").expect("readable");
    let numbers = text.lines().next().expect("a line").split_whitespace().skip(1).map(|word| word.parse().unwrap_or(0));
    let numbers: Vec<u64> = numbers.collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    numbers[..3].iter().chain(&numbers[5..8]).sum()
}

#[test]
fn a_healthy_run_raises_no_alarm() {
    let _alone = alone();
    let (mut quiet, mut alarms) = (0, vec![]);
    for i in 0..12 {
        let state = temporary();
        let flags: &[&str] = if i % 3 == 2 { &["--tp", "2", "--threads", "1"] } else { &[] };
        let (start, busy) = (Instant::now(), busy_jiffies());
        ended(started(command(&run(FABLE, "80", flags)), &state));
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        // What the run did not do itself, as it cannot use more than all cores.
        let all = (busy_jiffies() - busy) as f64 / 100.0 / start.elapsed().as_secs_f64();
        let found = explained(&state);
        let ranks = found["record"]["ranks"].as_array().expect("ranks");
        let own: f64 = ranks.iter().map(|r| r["cpu_ms"].as_f64().expect("ms")).sum();
        let own = own / found["explanation"]["step_ms"].as_f64().expect("ms");
        let principal = found["explanation"]["principal"].as_str().expect("a word");
        let others_compute = all - own > 0.1 * cores;
        quiet += usize::from(!others_compute);
        // Slices of a model this small may wait for their sums more than for memory, and nothing is wrong then.
        let is_healthy = matches!(principal, "weights" | "attention" | "overheads")
            || principal == "communication" && !flags.is_empty();
        // Where others compute, that they do is the truth; and what it delays.
        if !is_healthy && !others_compute {
            alarms.push(found["explanation"]["verdict"].to_string());
        }
        if quiet == 4 {
            break;
        }
    }
    assert!(alarms.is_empty(), "{}", alarms.join("\n"));
    if quiet == 0 {
        eprintln!("SKIPPED, NOT TESTED: other programs had the cores during every run");
    }
}

#[test]
fn weights_that_are_evicted_during_a_run_are_named() {
    let _alone = alone();
    const LIMITS: [&str; 2] = ["memory.limit_in_bytes", "memory.max"];
    const USES: [&str; 2] = ["memory.usage_in_bytes", "memory.current"];
    let dir = mapped_model();
    let weights = dir.path().join("model.safetensors");
    let bytes = weights.metadata().expect("written").len();
    let (path, of) = (text(dir.path()), format!("of={}", weights.display()));
    if Group::new("memory", LIMITS).is_none() || !is_root() {
        return skip("eviction: no control group of memory");
    }
    let found = diagnosed("paging", |state| {
        let group = Group::new("memory", LIMITS).expect("it was there before");
        // Pages count for the group that reads them first.
        assert!(succeeds("dd", &[&of, "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none"]));
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.0.display());
        let child = started(behind(&["sh", "-c", &enter, "sh"], &run(&path, "250", &[])), state);
        wait_for("the weights in memory", || (group.number(USES) > bytes).then_some(()));
        std::thread::sleep(Duration::from_millis(300));
        let limit = (bytes * 6 / 10).to_string();
        group.set(&LIMITS.map(|file| (file, limit.as_str())));
        ended(child);
    });
    let rank = &found["record"]["ranks"][0];
    assert!(rank["resident_share"].as_f64().expect("known") < 0.9, "{rank}");
    assert!(found["record"]["warning"].as_str().is_some_and(|text| text.contains("in memory")), "{found}");
}

#[test]
fn a_throttled_link_is_named() {
    let _alone = alone();
    let unshare = if is_root() { "-n" } else { "-rn" };
    // Messages of a token are 8 sums there and back, of 3 kB: far more than what a busy machine takes.
    let limit = "ip link set lo up mtu 1500 && tc qdisc add dev lo root tbf rate 1mbit burst 1600 limit 1mb";
    if !succeeds("unshare", &[unshare, "sh", "-c", limit]) {
        return skip("a throttled link: needs unshare, ip and tc, and the right to use them");
    }
    let dir = mapped_model();
    let path = text(dir.path());
    let script = format!("{limit} && exec \"$@\"");
    let found = diagnosed("communication", |state| {
        let run = run(&path, "16", &["--tp", "2", "--threads", "1"]);
        ended(started(behind(&["unshare", unshare, "sh", "-c", &script, "sh"], &run), state));
    });
    assert!(found["explanation"]["verdict"].as_str().expect("a text").contains("messages between the ranks"));
}

/// Processes that this one started.
fn children(pid: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").expect("processes").flatten();
    let is_child = |pid_of: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid_of}/status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("PPid:").is_some_and(|p| p.trim() == pid.to_string()))
    };
    let mut children: Vec<u32> = all.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(is_child).collect();
    children.sort_unstable();
    children
}

#[test]
fn a_rank_with_a_quota_is_named() {
    let _alone = alone();
    let files = ["cpu.cfs_quota_us", "cpu.max"];
    if Group::new("cpu", files).is_none() || !is_root() {
        return skip("a slow rank: no control group of the processor");
    }
    let dir = mapped_model();
    let path = text(dir.path());
    let found = diagnosed("slow_rank", |state| {
        let group = Group::new("cpu", files).expect("it was there before");
        // A twentieth of a core: more than what a busy machine takes.
        group.set(&[("cpu.cfs_period_us", "20000"), ("cpu.cfs_quota_us", "1000"), ("cpu.max", "1000 20000")]);
        let child = started(command(&run(&path, "20", &["--tp", "2", "--threads", "1"])), state);
        // The launcher starts the ranks in order.
        let ranks = wait_for("two ranks", || Some(children(child.id())).filter(|ranks| ranks.len() == 2));
        group.set(&[("cgroup.procs", &ranks[1].to_string())]);
        ended(child);
    });
    assert_eq!(found["explanation"]["causes"][0]["rank"], 1, "{found}");
    let verdict = found["explanation"]["verdict"].as_str().expect("a text");
    assert!(verdict.contains("wait for rank 1") && verdict.contains("quota"), "{verdict}");
}

#[test]
fn too_many_threads_are_named() {
    let _alone = alone();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (4 * cores).to_string();
    let dir = mapped_model();
    let path = text(dir.path());
    diagnosed("too_many_threads", |state| {
        ended(started(command(&run(&path, "60", &["--threads", &threads])), state));
    });
    let done = tandem(&["doctor", "--json", "--threads", &threads]);
    assert_eq!((done.code, found(&done, "processor.threads").0.as_str()), (Some(1), "problem"));
}

#[test]
fn memory_that_may_not_be_pinned_is_named() {
    let _alone = alone();
    let dir = mapped_model();
    let path = text(dir.path());
    // Who may pin without limit gives that right up.
    let script = match is_root() {
        true => "ulimit -l 64; exec setpriv --inh-caps=-ipc_lock --bounding-set=-ipc_lock \"$@\"",
        false => "ulimit -l 64; exec \"$@\"",
    };
    if !succeeds("sh", &["-c", script, "sh", "true"]) {
        return skip("a limit on pinned memory: needs setpriv");
    }
    let limited = |args: &[&str]| finish(&mut behind(&["sh", "-c", script, "sh"], args));
    let (level, said) = found(&limited(&["doctor", "--json", "--model", &path]), "memory.locked");
    assert!(level == "warning" && said.contains("ulimit -l allows 65.54 kB"), "{said}");
    let state = temporary();
    let mut locked = behind(&["sh", "-c", script, "sh"], &run(&path, "10", &["--lock"]));
    let said = finish(locked.env("XDG_STATE_HOME", state.path())).stderr;
    assert!(said.contains("--lock: the weights are not locked") && said.contains("ulimit -l"), "{said}");
}

#[test]
fn a_truncated_shard_is_named() {
    let _alone = alone();
    for (model, cut) in [("llama_tiny", 1), ("llama_tiny", 5000), ("glm51_tiny", 100)] {
        let copy = Copy::of(model);
        let dir = PathBuf::from(copy.path());
        let shards = std::fs::read_dir(&dir).expect("a folder").map(|entry| entry.expect("readable").path());
        let shard = shards.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).max().expect("a shard");
        let length = shard.metadata().expect("there").len();
        std::fs::OpenOptions::new().write(true).open(&shard).expect("opens").set_len(length - cut).expect("cut");
        let done = tandem(&["doctor", "--json", "--model", &copy.path()]);
        let (level, said) = found(&done, "model.files");
        let name = shard.file_name().expect("named").to_str().expect("UTF-8");
        assert!(done.code == Some(1) && level == "problem" && said.contains(name), "{model} less {cut}: {said}");
    }
}

/// Kernels of an older processor, as where a virtual machine hides features of the processor.
#[test]
fn hidden_features_of_the_processor_are_named() {
    let _alone = alone();
    let best = tandem(&["devices", "--json"]).json()["devices"][0]["isa"].as_str().expect("a name").to_string();
    let older: &[&str] = match best.as_str() {
        "amx" => &["avx512", "avx2", "scalar"],
        "avx512" => &["avx2", "scalar"],
        "avx2" | "neon" => &["scalar"],
        _ => return skip("hidden features: this processor has none"),
    };
    for isa in older {
        let (_, said) = found(&tandem(&["doctor", "--json", "--isa", isa]), "processor.kernels");
        assert!(said.contains(isa) && (*isa == "scalar" || said.contains(&best)), "{isa}: {said}");
    }
}

/// This build is for the processor; a GPU's has other tests.
#[test]
#[cfg(not(feature = "cuda"))]
fn a_device_that_is_not_there_is_named() {
    let _alone = alone();
    let done = tandem(&["doctor", "--json", "--backend", "cuda"]);
    let (level, said) = found(&done, "device");
    assert!(done.code == Some(1) && level == "problem" && said.contains("CUDA"), "{said}");
}

/// An ssh that runs the command here.
fn stand_in_ssh(dir: &TempDir, lines: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let bin = dir.path().join("bin");
    std::fs::create_dir_all(&bin).expect("made");
    let script = format!("#!/bin/sh\nwhile [ \"$1\" = -o ]; do shift 2; done\nhost=$1; shift\n{lines}\n");
    std::fs::write(bin.join("ssh"), script).expect("written");
    std::fs::set_permissions(bin.join("ssh"), std::fs::Permissions::from_mode(0o755)).expect("executable");
    format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default())
}

#[test]
fn wrong_entries_of_a_hostfile_are_named() {
    let _alone = alone();
    let here = "exec sh -c \"$*\"";
    let no_address = "exec sh -c \"$(echo \"$*\" | sed 's/hostname -I/echo 192.0.2.1/')\"";
    // (what stands in for ssh, hosts, words of the problem)
    let cases = [
        (here, r#"[{"ssh": "localhost", "ips": ["203.0.113.7"]}]"#, "203.0.113.7"),
        (
            "echo 'Permission denied (publickey).' >&2; exit 255",
            r#"[{"ssh": "b", "ips": ["192.0.2.1"]}]"#,
            "Permission denied",
        ),
        ("exit 255", r#"[{"ssh": "b", "ips": ["192.0.2.1"]}]"#, "no answer"),
        (no_address, r#"[{"ssh": "b", "ips": ["192.0.2.9"]}]"#, "and not 192.0.2.9"),
        ("date +%s.%N; echo tandem 0.0.1; echo 192.0.2.1", r#"[{"ssh": "b", "ips": ["192.0.2.1"]}]"#, "0.0.1"),
        ("echo 1000000000.5; exec sh -c \"$2\"", r#"[{"ssh": "b", "ips": ["192.0.2.1"]}]"#, "--version says"),
        (here, r#"[{"ssh": "localhost", "ips": ["127.0.0.1"]}, {"ssh": "b", "ips": ["127.0.0.1"]}]"#, "127.0.0.1"),
        (here, r#"[{"ssh": "b", "ips": ["no address"]}]"#, "no address"),
        (here, r#"[{"host": "b"}]"#, "hostfile"),
        (here, "[", "hostfile"),
        (here, "[]", "hostfile"),
    ];
    for (ssh, hosts, words) in cases {
        let dir = temporary();
        let path = stand_in_ssh(&dir, ssh);
        let hosts = file(&dir, "hosts.json", hosts);
        let done = finish(command(&["doctor", "--json", "--hostfile", &hosts]).env("PATH", path));
        let problems: Vec<_> = findings(&done).into_iter().filter(|(id, ..)| id.starts_with("hosts.")).collect();
        assert!(done.code == Some(1) && problems.iter().any(|p| p.2.contains(words)), "{words}: {problems:?}");
    }
}

/// Two network namespaces, joined by a link.
struct Hosts([String; 2]);

impl Hosts {
    fn new() -> Option<Hosts> {
        let names = ["a", "b"].map(|name| format!("tandem-faults-{name}-{}", std::process::id()));
        let ip = |args: &str| succeeds("ip", &args.split(' ').collect::<Vec<_>>());
        let hosts = Hosts(names);
        let [a, b] = &hosts.0;
        let mut commands = vec![format!("netns add {a}"), format!("netns add {b}")];
        commands.push(format!("-n {a} link add v0 type veth peer name v0 netns {b}"));
        for (i, name) in [a, b].into_iter().enumerate() {
            commands.push(format!("-n {name} addr add 10.77.1.{}/24 dev v0", i + 1));
            commands.extend(["lo", "v0"].map(|device| format!("-n {name} link set {device} up")));
        }
        commands.iter().all(|command| ip(command)).then_some(hosts)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.0 {
            succeeds("ip", &["netns", "del", name]);
        }
    }
}

#[test]
fn a_direction_that_is_slow_between_two_hosts_is_named() {
    let _alone = alone();
    let Some(hosts) = Hosts::new() else { return skip("a slow direction: needs ip, and the right to make namespaces") };
    let dir = temporary();
    let path = stand_in_ssh(&dir, "exec ip netns exec \"$host\" sh -c \"$*\"");
    let [a, b] = &hosts.0;
    let list = json!([{"ssh": a, "ips": ["10.77.1.1"]}, {"ssh": b, "ips": ["10.77.1.2"]}]).to_string();
    let list = file(&dir, "hosts.json", list);
    let pairs = || {
        let done = finish(command(&["doctor", "--json", "--hostfile", &list]).env("PATH", &path));
        let hosts = findings(&done).into_iter().filter(|(id, ..)| id.starts_with("hosts."));
        hosts.map(|(_, level, what)| format!("{level} {what}")).collect::<Vec<_>>()
    };
    let healthy = pairs();
    assert!(healthy.iter().all(|found| !found.starts_with("problem")), "{healthy:?}");
    let slow =
        ["-n", b, "qdisc", "add", "dev", "v0", "root", "tbf", "rate", "200mbit", "burst", "64kbit", "latency", "400ms"];
    if !succeeds("tc", &slow) {
        return skip("a slow direction: needs tc");
    }
    let found = pairs();
    let problems: Vec<&String> = found.iter().filter(|found| found.starts_with("problem")).collect();
    assert_eq!(problems.len(), 1, "{found:?}");
    assert!(problems[0].contains("the direction from rank 1 to rank 0 is slow"), "{found:?}");
}

/// A GPU is not needed to judge its run: the record of one is enough.
#[test]
fn experts_that_fell_to_the_host_are_named() {
    let _alone = alone();
    let state = temporary();
    ended(started(command(&run(FABLE, "20", &[])), &state));
    let path = state.path().join("tandem/last-run.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).expect("kept")).expect("JSON");
    let facts = &mut record["facts"];
    facts["backend"] = json!("cuda");
    facts["device"] = json!("NVIDIA H100 80GB HBM3");
    facts["isa"] = Value::Null;
    facts["bandwidth"] = json!(3.0e12);
    record["decode"]["operations_ms"] = json!({});
    for (name, ms) in [("ms", 20.0), ("working_ms", 19.9), ("host_ms", 0.05), ("outside_ms", 0.05)] {
        record["decode"][name] = json!(ms);
    }
    for (bytes, principal) in [(40_000_000_000u64, "host_experts"), (0, "unknown")] {
        record["facts"]["host_expert_bytes"] = json!(bytes);
        std::fs::write(&path, record.to_string()).expect("written");
        let found = explained(&state);
        assert_eq!(found["explanation"]["principal"], principal, "{}", found["explanation"]["verdict"]);
    }
}
