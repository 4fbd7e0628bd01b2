//! What a doctor finds of GPUs: those that this build runs on, how fast they copy, and what connects several. The driver's own
//! program, nvidia-smi, knows of connections; without it they are not known.

use std::process::{Command, Stdio};

use super::finding::{Finding, Level};
use crate::device;

/// Every GPU that this build can use, with its driver, speed and links where they are known.
pub(super) fn gpus() -> Vec<Finding> {
    let gpus: Vec<_> = device::found().into_iter().filter(|device| device.backend != "cpu").collect();
    if gpus.is_empty() {
        return vec![];
    }
    let mut findings: Vec<Finding> = vec![];
    for gpu in gpus {
        let what = format!("--backend {}", gpu.backend);
        let speed = device::copy_speed(gpu.backend).map_or_else(String::new, |(own, host)| {
            format!(
                "; copies {:.0} GB/s on the device (read and written), {:.1} GB/s from the host",
                own / 1e9,
                host / 1e9
            )
        });
        findings.push(Finding::new("device", Level::Ok, what, format!("{}{speed}", gpu.name)));
    }
    if device::has_cuda_devices() {
        findings.push(
            match said(
                "nvidia-smi",
                &[
                    "--query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current",
                    "--format=csv,noheader",
                ],
            ) {
                Some(text) => Finding::new("device.driver", Level::Ok, "NVIDIA's driver", drivers(&text)),
                None => Finding::new(
                    "device.driver",
                    Level::Ok,
                    "NVIDIA's driver",
                    "its version is not known: no nvidia-smi",
                ),
            },
        );
        if let Some(text) = said("nvidia-smi", &["topo", "-m"]) {
            findings.extend(links(&text));
        }
    }
    findings
}

/// What a program prints, if it succeeds.
fn said(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From lines `name, driver, generation, width`.
fn drivers(text: &str) -> String {
    let line = |line: &str| {
        let words: Vec<&str> = line.split(',').map(str::trim).collect();
        match words[..] {
            [name, driver, generation, width] => format!("{name}: driver {driver}, PCIe {generation} x{width}"),
            _ => line.to_string(),
        }
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(line).collect::<Vec<_>>().join("; ")
}

/// The connections of a matrix as `nvidia-smi topo -m` prints it: a line and a column for each GPU.
fn links(text: &str) -> Vec<Finding> {
    let plain: String = without_colours(text);
    let rows: Vec<Vec<&str>> = plain
        .lines()
        .map(|line| line.split_whitespace().collect())
        .filter(|words: &Vec<&str>| words.len() > 1 && is_gpu(words[0]) && !is_gpu(words[1]))
        .collect();
    let (mut names, mut is_slow) = (vec![], false);
    for (i, row) in rows.iter().enumerate() {
        for (j, word) in row.iter().skip(1).take(rows.len()).enumerate().skip(i + 1) {
            names.push(format!("{}-{}: {}", row[0], rows[j][0], meaning(word)));
            is_slow |= !word.starts_with("NV");
        }
    }
    if names.is_empty() {
        return vec![];
    }
    let evidence = format!(
        "{}; `tandem launch --ranks {} -- bench comm --transport nccl` times sums",
        names.join(", "),
        rows.len()
    );
    let found = Finding::new("device.link", Level::Ok, "links between the GPUs", evidence);
    vec![match is_slow {
        true => found
            .with_level(Level::Warning, "GPUs are connected by PCIe and not by NVLink")
            .with_remedy("--pp sends far less than --tp; sums of --tp take longer than over NVLink"),
        false => found,
    }]
}

fn is_gpu(word: &str) -> bool {
    word.strip_prefix("GPU").is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Words of the matrix in plain ones.
fn meaning(word: &str) -> String {
    match word {
        "SYS" => "PCIe over several processors".to_string(),
        "NODE" | "PHB" => "PCIe over one processor".to_string(),
        "PXB" | "PIX" => "PCIe over a bridge".to_string(),
        _ => match word.strip_prefix("NV") {
            Some(n) => format!("NVLink ({n} links)"),
            None => word.to_string(),
        },
    }
}

/// Text without escape sequences of terminals.
fn without_colours(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        out.push_str(before);
        rest = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        rest = rest.strip_prefix('m').unwrap_or(rest);
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_read_from_the_drivers_matrix() {
        let head = "\t\u{1b}[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\u{1b}[0m\n";
        let fast = format!(
            "{head}GPU0\t X \tNV18\tNV18\tPIX\t0-47\nGPU1\tNV18\t X \tNV18\tNODE\t0-47\nGPU2\tNV18\tNV18\t X \tSYS\t0-47\nNIC0\tPIX\tNODE\tSYS\t X\n\nLegend:\n  X    = Self\n"
        );
        let found = links(&fast);
        assert_eq!((found.len(), found[0].level), (1, Level::Ok), "{found:?}");
        let all = "GPU0-GPU1: NVLink (18 links), GPU0-GPU2: NVLink (18 links), GPU1-GPU2: NVLink (18 links)";
        assert!(found[0].evidence.starts_with(all), "{found:?}");
        let slow = links("\tGPU0\tGPU1\nGPU0\t X \tSYS\nGPU1\tSYS\t X \n");
        assert_eq!(slow[0].level, Level::Warning);
        assert!(slow[0].evidence.contains("GPU0-GPU1: PCIe over several processors"), "{slow:?}");
        assert!(links("\tGPU0\nGPU0\t X \n").is_empty() && links("").is_empty());
        let line = "NVIDIA H100 80GB HBM3, 550.54.15, 5, 16\n";
        assert_eq!(drivers(line), "NVIDIA H100 80GB HBM3: driver 550.54.15, PCIe 5 x16");
    }
}
