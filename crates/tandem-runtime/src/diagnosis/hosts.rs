//! What a doctor finds of the hosts of a hostfile: each by itself, and the way between them.

use std::cell::LazyCell;
use std::net::{IpAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::finding::{Finding, Level};
use super::pairs::PairSpeed;
use crate::presets;
use crate::ranks::{Host, hosts};

/// Seconds that clocks may differ by without a word.
const CLOCKS_DIFFER: f64 = 2.0;

/// Reads a hostfile, and sees whether each host is there.
pub(super) fn check_hosts(file: &Path, say: &mut dyn FnMut(&str)) -> (Vec<Host>, Vec<Finding>) {
    let read = || -> anyhow::Result<Vec<Host>> { hosts(&presets::read(file)?, &file.display().to_string()) };
    let list = match read() {
        Ok(list) => list,
        Err(error) => {
            let found = Finding::new("hosts.file", Level::Problem, "the hostfile cannot be used", format!("{error:#}"))
                .with_remedy("write it as mlx.launch has it: [{\"ssh\": \"name\", \"ips\": [\"10.0.0.1\"]}]");
            return (vec![], vec![found]);
        }
    };
    let (mut findings, mut units) = (vec![], vec![]);
    let here = LazyCell::new(Here::new);
    for (rank, host) in list.iter().enumerate() {
        say(&format!("host {} of rank {rank}", host.name));
        let (found, mtu) = if host.is_local() { local_host(rank, host) } else { remote_host(rank, host, &here) };
        findings.extend(found);
        units.push(mtu);
    }
    for (rank, host) in list.iter().enumerate() {
        if list[..rank].iter().any(|other| other.ip == host.ip && other.name != host.name) {
            let evidence = format!("{} has the address {} of another host", host.name, host.ip);
            let found = Finding::new("hosts.entry", Level::Problem, "two hosts have one address", evidence);
            findings.push(found.with_remedy("give each host its own address of the network between them"));
        }
    }
    findings.extend(largest_packets(&list, &units));
    if findings.iter().all(|found| found.level < Level::Problem) {
        let transport = "TCP, as `tandem launch` chooses it (--encrypt encrypts it, --transport mpi is the other way); \
                         GPUs of one host reach each other with --transport nccl";
        findings.push(Finding::new("hosts.transport", Level::Ok, "messages between the ranks", transport));
    }
    (list, findings)
}

/// Starts a rank on every host, and measures each direction between every two.
///
/// # Errors
/// The ranks cannot be started.
pub(super) fn between(program: &Path, hostfile: &Path) -> anyhow::Result<Vec<PairSpeed>> {
    let mut command = Command::new(program);
    command.args(["launch", "--hostfile"]).arg(hostfile);
    let output = command.args(["--", "bench", "comm", "--pairs", "--json"]).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", said.lines().last().unwrap_or("the ranks did not start"));
    let mut value: Value = serde_json::from_slice(&output.stdout).context("the measurement's JSON")?;
    Ok(serde_json::from_value(value["pairs"].take())?)
}

/// The largest packets of the interfaces with the hosts' addresses.
fn largest_packets(list: &[Host], units: &[Option<u32>]) -> Option<Finding> {
    let known: Vec<u32> = units.iter().flatten().copied().collect();
    let (least, most) = (known.iter().min()?, known.iter().max()?);
    let one = |(host, mtu): (&Host, &Option<u32>)| mtu.map(|mtu| format!("{mtu} bytes on {} ({})", host.name, host.ip));
    let evidence = list.iter().zip(units).filter_map(one).collect::<Vec<_>>().join(", ");
    let found = Finding::new("hosts.mtu", Level::Ok, "largest packets (MTU)", evidence);
    // The loopback's is large, and no network's.
    let is_network = list.iter().any(|host| !host.ip.is_loopback());
    Some(match is_network && least != most {
        true => found.with_level(Level::Warning, "the largest packets (MTU) differ").with_remedy(
            "set one MTU on all interfaces and switches of this network: larger packets of one host may be lost on the way",
        ),
        false => found,
    })
}

/// Whether this machine has the address that its rank is to listen on.
fn local_host(rank: usize, host: &Host) -> (Vec<Finding>, Option<u32>) {
    let what = format!("rank {rank} on this machine at {}", host.ip);
    let found = match TcpListener::bind((host.ip, 0)) {
        Ok(_) => Finding::new("hosts.entry", Level::Ok, what, "the address can be listened on"),
        Err(error) => Finding::new("hosts.entry", Level::Problem, what, format!("{}: {error}", host.ip))
            .with_remedy("write one of this machine's own addresses (`ip addr`) in the hostfile"),
    };
    let output = Command::new("sh").args(["-c", &mtu_of(host.ip)]).stdin(Stdio::null()).output();
    let mtu = output.ok().and_then(|output| String::from_utf8_lossy(&output.stdout).trim().parse().ok());
    (vec![found], mtu)
}

/// A shell's words for the MTU of the interface with an address; they print an empty line where it is not known.
fn mtu_of(ip: IpAddr) -> String {
    format!(
        "d=$(ip -o addr show to {ip} 2>/dev/null | awk '{{print $2; exit}}'); echo \"$(cat /sys/class/net/$d/mtu 2>/dev/null)\""
    )
}

/// What a host's answers are compared with.
struct Here {
    program: String,
    /// SHA-256 of the program.
    digest: Option<String>,
    /// System and processor.
    platform: String,
}

impl Here {
    fn new() -> Here {
        let own = std::env::current_exe().ok();
        Here {
            program: own.as_ref().map_or_else(|| "tandem".to_string(), |path| path.display().to_string()),
            digest: own.as_deref().and_then(digest_of),
            platform: platform(),
        }
    }
}

/// What a host says of itself.
struct Answers {
    clock: f64,
    version: String,
    addresses: String,
    /// System and processor.
    platform: String,
    /// SHA-256 of the program.
    digest: String,
    mtu: Option<u32>,
}

impl Answers {
    /// From a line each; `None` if the first is no time.
    fn parse(text: &str) -> Option<Answers> {
        let mut lines = text.lines().map(|line| line.trim().to_string());
        let clock = lines.next()?.parse().ok()?;
        let mut next = || lines.next().unwrap_or_default();
        let [version, addresses, platform] = [next(), next(), next()];
        let digest = next().split(' ').next().unwrap_or_default().to_string();
        Some(Answers { clock, version, addresses, platform, digest, mtu: next().parse().ok() })
    }

    /// A shell's words that print them. Macs have other names for some.
    fn asked(program: &str, ip: IpAddr) -> String {
        let program = format!("'{}'", program.replace('\'', "'\\''"));
        format!(
            "date +%s.%N | tr -d N; echo \"$({program} --version 2>&1 | head -1)\"; \
             echo \"$(hostname -I 2>/dev/null || ifconfig -a | awk '/inet/{{print $2}}' | xargs)\"; echo \"$(uname -sm)\"; \
             echo \"$(sha256sum {program} 2>/dev/null || shasum -a 256 {program} 2>/dev/null)\"; {}",
            mtu_of(ip)
        )
    }
}

/// Whether a host lets this user in, has this program, agrees on the time, and has the address.
fn remote_host(rank: usize, host: &Host, here: &Here) -> (Vec<Finding>, Option<u32>) {
    let what = format!("rank {rank} on {} at {}", host.name, host.ip);
    let problem = |evidence: String, remedy: &str| {
        (vec![Finding::new("hosts.entry", Level::Problem, what.clone(), evidence).with_remedy(remedy)], None)
    };
    let program = &here.program;
    let asked = Answers::asked(program, host.ip);
    let ssh = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=5", &host.name, &asked];
    let start = unix_seconds();
    let output = match Command::new("ssh").args(ssh).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => return problem(format!("ssh: {error}"), "install an ssh client"),
    };
    // The clock is read first, soon after the start.
    let end = unix_seconds();
    let Some(answers) = Answers::parse(&String::from_utf8_lossy(&output.stdout)) else {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
        let said = if said.is_empty() { "ssh gave no answer".to_string() } else { said };
        return problem(said, "check the name, and that `ssh NAME true` works without a question");
    };
    let version = format!("tandem {}", env!("CARGO_PKG_VERSION"));
    if answers.version != version {
        let remedy = "install the same version at the same path, or name its place with --remote-binary";
        return problem(format!("{program} --version says {:?} and here it is {version:?}", answers.version), remedy);
    }
    let addresses = &answers.addresses;
    if !addresses.is_empty() && !addresses.split_whitespace().any(|address| address == host.ip.to_string()) {
        let remedy = "write one of that host's addresses in the hostfile";
        return problem(format!("it has the addresses {addresses} and not {}", host.ip), remedy);
    }
    // No more than what the answer leaves open.
    let apart = (start - answers.clock).max(answers.clock - end).max(0.0);
    let clocks = format!("clocks differ by {:.0} ms at least", 1e3 * apart);
    let mut findings = vec![Finding::new(
        "hosts.entry",
        Level::Ok,
        what.clone(),
        format!("{version}; {}; {clocks}", answers.platform),
    )];
    if apart > CLOCKS_DIFFER {
        let found = Finding::new("hosts.clock", Level::Warning, format!("the clock of {} is wrong", host.name), clocks);
        findings.push(found.with_remedy("synchronise the clocks (NTP): lines of their logs cannot be put in order"));
    }
    if let (Some(own), false) = (&here.digest, answers.digest.is_empty())
        && *own != answers.digest
        && answers.platform == here.platform
    {
        let evidence = format!("{program} is {} there and {} here (SHA-256)", short(&answers.digest), short(own));
        let what = format!("another build of the same version on {}", host.name);
        findings.push(
            Finding::new("hosts.build", Level::Warning, what, evidence)
                .with_remedy("copy this program there: other features or another commit may compute other numbers"),
        );
    }
    (findings, answers.mtu)
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// SHA-256 of a file, in hexadecimal.
fn digest_of(path: &Path) -> Option<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path).ok()?, &mut hash).ok()?;
    Some(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// As `uname -sm`.
fn platform() -> String {
    let output = Command::new("uname").arg("-sm").stdin(Stdio::null()).output();
    output.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn unix_seconds() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<Finding> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hosts.json");
        std::fs::write(&file, text).unwrap();
        check_hosts(&file, &mut |_| ()).1
    }

    #[test]
    fn wrong_entries_of_a_hostfile_are_found() {
        // 203.0.113.0/24 is nobody's (RFC 5737).
        let cases = [
            (r#"[{"ssh": "localhost"}, {"ssh": "localhost"}]"#, None),
            ("{", Some("hosts.file")),
            (r#"[{"ssh": "a"}]"#, Some("hosts.file")),
            (r#"[{"ssh": "localhost", "ips": ["203.0.113.7"]}]"#, Some("hosts.entry")),
            (r#"[{"ssh": "localhost"}, {"ssh": "no such host.invalid", "ips": ["127.0.0.1"]}]"#, Some("hosts.entry")),
        ];
        for (text, expected) in cases {
            let problems = found(text).into_iter().filter(|f| f.level == Level::Problem);
            let problems: Vec<&str> = problems.map(|f| f.id).collect();
            assert_eq!(problems.first().copied(), expected, "{text}");
        }
    }

    #[test]
    fn answers_of_hosts_are_read_whatever_they_lack() {
        let whole = "1700000000.5\ntandem 1\n10.0.0.1 fe80::1\nLinux x86_64\nabc  /bin/tandem\n9000\n";
        let answers = Answers::parse(whole).unwrap();
        assert_eq!((answers.clock, answers.digest.as_str(), answers.mtu), (1_700_000_000.5, "abc", Some(9000)));
        // A Mac's date has no %N.
        let less = Answers::parse("1700000000.\ntandem 1\n").unwrap();
        assert_eq!((less.clock, less.addresses.as_str(), less.mtu), (1_700_000_000.0, "", None));
        assert!(Answers::parse("Welcome!\n").is_none() && Answers::parse("").is_none());
    }

    #[test]
    fn packets_of_different_sizes_are_a_warning() {
        let list = hosts(r#"[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]"#, "hosts").unwrap();
        let level = |units: &[Option<u32>]| largest_packets(&list, units).map(|found| found.level);
        assert_eq!(level(&[Some(9000), Some(9000)]), Some(Level::Ok));
        assert_eq!(level(&[Some(9000), Some(1500)]), Some(Level::Warning));
        assert_eq!(level(&[Some(9000), None]), Some(Level::Ok));
        assert_eq!(level(&[None, None]), None);
    }
}
