//! Everything that a doctor looks at, put together.

use std::fmt::Write as _;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use tandem_core::weights::Weight;
use tandem_core::{Checkpoint, ModelConfig};
use tandem_model::{Accounting, cache_specs};

use super::finding::{Finding, Level};
use super::gpus::gpus;
use super::hosts::{between, check_hosts};
use super::machine::Machine;
use super::pairs;
use super::plans::{Network, PlanSpeed, plans};
use super::predict::{Prediction, predict};
use crate::device::DeviceKind;
use crate::load::resident_bytes;
use crate::model_dir::model_dir;
use crate::options::DeviceOptions;
use crate::presets;
use crate::units::bytes;

/// Context that predictions are for.
const CONTEXT: usize = 512;
/// Tokens of a prompt at once, as `run` has it.
const CHUNK: usize = 256;
/// Read from each file to see how fast the disk is.
const DISK_BYTES: usize = 64 << 20;
/// A disk below this takes minutes for a large model.
const SLOW_DISK: f64 = 5e8;

/// What a doctor is asked.
#[derive(Clone, Debug, Default)]
pub struct DoctorOptions {
    /// A model directory or a Hugging Face id; none: only the machine is looked at.
    pub model: Option<String>,
    /// Hosts of ranks.
    pub hostfile: Option<PathBuf>,
    /// Where the model would run.
    pub device: DeviceOptions,
    /// The `tandem` program, which is started on every host to measure the network; none: it is not measured.
    pub program: Option<PathBuf>,
}

/// A doctor's report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Everything that was looked at.
    pub findings: Vec<Finding>,
    /// What to expect of the model here.
    pub prediction: Option<Prediction>,
}

impl Report {
    /// Whether something does not work.
    pub fn has_problem(&self) -> bool {
        self.findings.iter().any(|finding| finding.level == Level::Problem)
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for f in &self.findings {
            let _ = writeln!(out, "{:<8} {}: {}", f.level.name(), f.what, f.evidence.replace('\n', "\n         "));
            if let Some(remedy) = &f.remedy {
                let _ = writeln!(out, "         to do: {remedy}");
            }
        }
        if let Some(p) = &self.prediction {
            let _ = writeln!(
                out,
                "\nexpected: {:.2} tokens/s of one sequence at {} tokens of context, {:.0} tokens/s of a prompt",
                p.decode_tokens_per_second, p.context, p.prefill_tokens_per_second
            );
            p.reasoning.iter().for_each(|line| {
                let _ = writeln!(out, "  {line}");
            });
            for plan in p.plans.iter().skip(1) {
                let _ = writeln!(out, "{}: {}", plan.plan, plan.expected());
                plan.reasoning.iter().for_each(|line| {
                    let _ = writeln!(out, "  {line}");
                });
            }
        }
        out
    }
}

/// Looks at this machine, a model and the hosts of a hostfile. `say` gets a line before each thing that takes seconds.
pub fn doctor(options: &DoctorOptions, say: &mut dyn FnMut(&str)) -> Report {
    let mut findings = vec![];
    let model = options.model.as_deref().map(|name| {
        say("the model's files");
        check_model(name, &mut findings)
    });
    let model = model.flatten();
    say("processor and memory");
    let machine = Machine::look(options.device.threads, options.device.isa);
    let mut findings = [machine.findings(model.as_ref().map(|model| model.resident)), gpus(), findings].concat();
    let refusal = match DeviceKind::choose(&options.device) {
        Err(error) => Some(format!("{error:#}")),
        Ok(kind) => {
            let is_there = kind == DeviceKind::Cpu || findings.iter().any(|found| found.what.ends_with(kind.name()));
            (!is_there).then(|| format!("no device for --backend {} was found", kind.name()))
        }
    };
    if let Some(refusal) = refusal {
        let what = "the device that was asked for cannot be used";
        let found = Finding::new("device", Level::Problem, what, refusal);
        findings.push(found.with_remedy("leave --backend out; `tandem devices` shows what this build finds"));
    }
    let mut prediction = None;
    if let Some(model) = &model {
        findings.extend(model.fit(&options.device, &machine));
        say("speed of the disk");
        findings.extend(model.disk());
        say("a few layers of the model's shapes and formats");
        match predict(
            &model.text,
            &model.weights,
            &options.device,
            CONTEXT.min(model.longest()),
            CHUNK.min(model.longest()),
        ) {
            Ok(predicted) => {
                findings.push(model.speed(&predicted, &machine, &options.device));
                prediction = Some(predicted);
            }
            Err(error) => findings.push(
                Finding::new("model.speed", Level::Warning, "the speed cannot be predicted", format!("{error:#}"))
                    .with_remedy("`tandem bench decode` and `tandem bench prefill` measure the model itself"),
            ),
        }
    }
    let mut network = None;
    if let Some(file) = &options.hostfile {
        let (hosts, found) = check_hosts(file, say);
        let all_are_there = found.iter().all(|found| found.level < Level::Problem);
        findings.extend(found);
        if let (Some(program), true) = (&options.program, all_are_there) {
            say("the way between every two hosts");
            match between(program, file) {
                Ok(pairs) => {
                    findings.extend(pairs::findings(&pairs));
                    network = Some(Network::of(hosts.len(), &pairs));
                }
                Err(error) => findings.push(
                    Finding::new("hosts.ranks", Level::Problem, "the ranks cannot be started", format!("{error:#}"))
                        .with_remedy("`tandem launch --hostfile FILE -- bench comm` shows what each rank says"),
                ),
            }
        }
    }
    if let (Some(model), Some(prediction)) = (&model, &mut prediction) {
        let host = (machine.memory.map_or(u64::MAX >> 8, |(_, free)| free), machine.bandwidth);
        prediction.plans = plans(prediction, &model.config, &model.weights, host, network.as_ref());
        findings.extend(prediction.plans.iter().skip(1).map(PlanSpeed::finding));
    }
    Report { findings, prediction }
}

/// A model whose files are as its config.json says.
struct Model {
    text: String,
    config: ModelConfig,
    weights: Vec<Weight>,
    files: Vec<PathBuf>,
    resident: u64,
    read: u64,
}

/// Checks every weight against config.json.
fn check_model(name: &str, findings: &mut Vec<Finding>) -> Option<Model> {
    let read = || -> anyhow::Result<Model> {
        let dir = model_dir(Some(name))?;
        let text = presets::read(&dir.join("config.json"))?;
        let mut config = ModelConfig::load(&dir)?;
        let checkpoint = Checkpoint::open(&dir)?;
        config.settle_tie(&checkpoint);
        let weights = tandem_model::resolve(&checkpoint, &config)?;
        let accounting = Accounting::new(&weights, &config);
        let (resident, read) = (resident_bytes(&accounting), accounting.read_bytes_at(&config, CONTEXT));
        let files = checkpoint.files().map(Path::to_path_buf).collect();
        Ok(Model { text, config, weights, files, resident, read })
    };
    match read() {
        Ok(model) => {
            let evidence = format!(
                "{}: {} weights in {} files, {}, each of the type and shape that config.json asks for",
                model.config.model_type.name(),
                model.weights.len(),
                model.files.len(),
                bytes(model.resident)
            );
            findings.push(Finding::new("model.files", Level::Ok, "the model's files", evidence));
            Some(model)
        }
        Err(error) => {
            let found = Finding::new("model.files", Level::Problem, "the model cannot be loaded", format!("{error:#}"));
            findings.push(
                found.with_remedy("get the files again: `tandem pull OWNER/NAME` completes what is missing or damaged"),
            );
            None
        }
    }
}

impl Model {
    fn longest(&self) -> usize {
        self.config.max_position_embeddings.saturating_sub(1).max(1)
    }

    /// Whether weights and a cache fit.
    fn fit(&self, device: &DeviceOptions, machine: &Machine) -> Vec<Finding> {
        let kind = DeviceKind::choose(device).unwrap_or(DeviceKind::Cpu);
        if kind != DeviceKind::Cpu {
            let evidence =
                format!("{} of weights; the GPU's own check follows when it is loaded", bytes(self.resident));
            return vec![Finding::new("model.fit", Level::Ok, format!("--backend {}", kind.name()), evidence)];
        }
        let layers = 0..self.config.num_hidden_layers;
        // The processor's caches take at most four bytes an element.
        let width: usize = layers.flat_map(|layer| cache_specs(&self.config, layer)).map(|spec| spec.width).sum();
        let cache = 4 * width as u64;
        let Some((_, free)) = machine.memory else { return vec![] };
        let evidence = format!("{} of weights, {} of memory can be had", bytes(self.resident), bytes(free));
        let found = Finding::new("model.fit", Level::Ok, "the weights fit", evidence);
        vec![if self.resident > free {
            found.with_level(Level::Problem, "the weights do not fit").with_remedy(
                "free memory, use fewer bits or more machines (`tandem launch`); with --allow-paging most of the time goes \
                 into reading them from the disk",
            )
        } else if self.resident + cache * CONTEXT as u64 * 16 > free {
            let left = (free - self.resident) / cache.max(1);
            found
                .with_level(Level::Warning, "the weights fit, and little else")
                .with_remedy(format!("at most about --context {left}; close other programs"))
        } else {
            found
        }]
    }

    /// How fast the largest file is read, past the system's cache.
    fn disk(&self) -> Option<Finding> {
        let file = self.files.iter().max_by_key(|file| file.metadata().map_or(0, |meta| meta.len()))?;
        let found = |level, what: &str, evidence: String| Finding::new("model.disk", level, what, evidence);
        match read_speed(file) {
            Ok((speed, _)) if speed < SLOW_DISK => {
                let seconds = self.resident as f64 / speed;
                let evidence = format!("{}/s: loading takes about {seconds:.0} s", bytes(speed as u64));
                let level = if seconds > 60.0 { Level::Warning } else { Level::Ok };
                let found = found(level, "the disk of the model's files", evidence);
                Some(if level == Level::Ok { found } else { found.with_remedy("copy the model to a local NVMe disk") })
            }
            Ok((speed, cached)) => {
                let cached = if cached { ", partly from the system's cache" } else { "" };
                Some(found(Level::Ok, "the disk of the model's files", format!("{}/s{cached}", bytes(speed as u64))))
            }
            Err(error) => Some(
                found(Level::Problem, "a file of the model cannot be read", format!("{}: {error}", file.display()))
                    .with_remedy("look at the system's log for errors of the disk"),
            ),
        }
    }

    fn speed(&self, predicted: &Prediction, machine: &Machine, device: &DeviceOptions) -> Finding {
        let tps = predicted.decode_tokens_per_second;
        let is_cpu = DeviceKind::choose(device).is_ok_and(|kind| kind == DeviceKind::Cpu);
        let limit = machine.bandwidth / self.read.max(1) as f64;
        let of_limit = match is_cpu {
            true => format!(
                ": {} per token at {:.1} GB/s would allow {limit:.2}, the kernels reach {:.0} % of it",
                bytes(self.read),
                machine.bandwidth / 1e9,
                100.0 * tps / limit
            ),
            false => String::new(),
        };
        let evidence = format!(
            "{tps:.2} tokens/s of one sequence, {:.0} of a prompt{of_limit}",
            predicted.prefill_tokens_per_second
        );
        Finding::new("model.speed", Level::Ok, "expected speed on this machine", evidence)
    }
}

/// Bytes per second of parts of a file, and whether most of it came from memory.
fn read_speed(path: &Path) -> std::io::Result<(f64, bool)> {
    const N_PARTS: u64 = 4;
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let part = (DISK_BYTES as u64 / N_PARTS).min(length / N_PARTS).max(1);
    let mut buffer = vec![0u8; part as usize];
    // Pages that nobody has mapped are read from the disk again.
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    let start = Instant::now();
    let mut n = 0;
    for i in 0..N_PARTS {
        file.seek(SeekFrom::Start((length - part.min(length)) / N_PARTS * i))?;
        n += file.by_ref().take(part).read(&mut buffer)?;
    }
    let speed = n as f64 / start.elapsed().as_secs_f64().max(1e-9);
    Ok((speed, speed > 8e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_shard_is_a_problem_of_the_model() {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama_tiny");
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        let name = dir.path().to_str().unwrap().to_string();
        let mut findings = vec![];
        assert!(check_model(&name, &mut findings).is_some(), "{findings:?}");
        let shards = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let shard = shards.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).max().unwrap();
        let length = shard.metadata().unwrap().len();
        std::fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(length - 100).unwrap();
        let mut findings = vec![];
        assert!(check_model(&name, &mut findings).is_none());
        assert_eq!((findings[0].id, findings[0].level), ("model.files", Level::Problem));
        let file = shard.file_name().unwrap().to_str().unwrap();
        assert!(findings[0].evidence.contains(file), "{}", findings[0].evidence);
    }
}
