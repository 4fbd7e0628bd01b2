//! mlx.launch's hostfiles: one host for each rank.

use std::net::IpAddr;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

/// One rank's host.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// For ssh, and for messages.
    pub name: String,
    /// The address that the rank listens on.
    pub ip: IpAddr,
}

impl Host {
    /// Whether it is this machine, so that a process is started instead of ssh.
    pub fn is_local(&self) -> bool {
        matches!(self.name.as_str(), "localhost" | "127.0.0.1" | "::1")
    }
}

/// This machine for each of `n` ranks.
pub fn local_hosts(n: usize) -> Vec<Host> {
    vec![Host { name: "localhost".to_string(), ip: IpAddr::from([127, 0, 0, 1]) }; n]
}

/// The hosts of a file's text: `[{"ssh": "name", "ips": ["10.0.0.1"]}]`, or the same list under "hosts"; `path` is for
/// messages.
///
/// # Errors
/// It is something else, or an address is none.
pub fn hosts(text: &str, path: &str) -> anyhow::Result<Vec<Host>> {
    let wrong = |what: &str| format!("{path}: {what}; expected [{{\"ssh\": \"name\", \"ips\": [\"10.0.0.1\"]}}, ...]");
    let value: Value = serde_json::from_str(text).with_context(|| wrong("this is not JSON"))?;
    let list = value.get("hosts").unwrap_or(&value).as_array().with_context(|| wrong("there is no list of hosts"))?;
    ensure!(!list.is_empty(), wrong("the list is empty"));
    let host = |entry: &Value| -> anyhow::Result<Host> {
        let name = entry.get("ssh").and_then(Value::as_str).with_context(|| wrong("a host has no \"ssh\""))?;
        let first = entry.get("ips").and_then(|ips| ips.get(0)).and_then(Value::as_str);
        let local = name == "localhost" || name == "127.0.0.1";
        let ip = match first {
            Some(ip) => ip.parse().with_context(|| wrong(&format!("{ip:?} is not an address")))?,
            None if local => IpAddr::from([127, 0, 0, 1]),
            None => bail!(wrong(&format!("{name} has no \"ips\""))),
        };
        ensure!(!name.starts_with('-'), wrong("a host's name starts with -"));
        Ok(Host { name: name.to_string(), ip })
    };
    list.iter().map(host).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostfiles_of_mlx_launch() {
        let host = |name: &str, ip: [u8; 4]| Host { name: name.to_string(), ip: IpAddr::from(ip) };
        let list = r#"[{"ssh": "a.local", "ips": ["10.0.0.1", "10.0.1.1"]}, {"ssh": "localhost"}]"#;
        let expected = [host("a.local", [10, 0, 0, 1]), host("localhost", [127, 0, 0, 1])];
        assert_eq!(hosts(list, "f").expect("valid"), expected);
        let jaccl = r#"{"hosts": [{"ssh": "b", "ips": ["10.0.0.2"], "rdma": [null, "rdma_en5"]}]}"#;
        assert_eq!(hosts(jaccl, "f").expect("valid"), [host("b", [10, 0, 0, 2])]);
        for bad in [
            "",
            "[]",
            "{}",
            "[1]",
            r#"[{"ssh": "a"}]"#,
            r#"[{"ssh": "a", "ips": ["x"]}]"#,
            r#"[{"ssh": "-oProxyCommand=x", "ips": ["10.0.0.1"]}]"#,
        ] {
            assert!(hosts(bad, "f").is_err(), "{bad}");
        }
    }
}
