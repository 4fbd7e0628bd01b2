//! What a run did, in numbers and without any text: made from the engine's timings, kept in the user's state directory,
//! read by [`explain`](super::explain()).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tandem_core::ModelConfig;
use tandem_core::weights::ModuleKind;
use tandem_engine::{Operation, RankStatus, Spent, StepTimes, Timings};
use tandem_model::{Accounting, Plan, RankPlan};

use super::residency::Residency;

/// Number of the form of [`RunRecord`]; another one is not read.
const FORM: u32 = 1;
/// Steps whose times are kept one by one, for charts.
const N_CHARTED: usize = 400;

/// What is known of a model and its devices when it is loaded.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Facts {
    /// Name of the model's directory.
    pub model: String,
    /// Decoder layers.
    pub n_layers: usize,
    /// `cpu`, `cuda` or `wgpu`.
    pub backend: String,
    /// The device in one line.
    pub device: String,
    /// Name of the activations' numerics.
    pub numerics: String,
    /// Kernels in use, and the best that this build has for the processor; none for GPUs.
    pub isa: Option<String>,
    /// See `isa`.
    pub best_isa: Option<String>,
    /// Threads that compute in each rank.
    pub threads: usize,
    /// Cores that this process may use.
    pub cores: usize,
    /// Weights in memory.
    pub weight_bytes: u64,
    /// Whether they stay mapped from their files.
    pub weights_are_mapped: bool,
    /// Formats whose rows the processor decodes at every use, having no kernel for them.
    #[serde(default)]
    pub slow_formats: Vec<String>,
    /// Bytes by kind of module.
    pub kinds: Vec<KindBytes>,
    /// Bytes of experts that one token reads on the host, beside a GPU.
    pub host_expert_bytes: u64,
    /// Experts of a token, and of a layer; none for a model without.
    pub experts: Option<(usize, usize)>,
    /// Bytes per second that memory delivers to all ranks together, where that was measured.
    pub bandwidth: Option<f64>,
    /// Ranks of each stage; 1 without tensor or expert parallelism.
    pub tensor_size: usize,
    /// By rank: bytes that it reads for a token. Empty for one rank.
    pub rank_bytes: Vec<u64>,
    /// By rank: bytes per second that its memory was measured to deliver at the start.
    pub rank_bandwidth: Vec<f64>,
    /// By rank: microseconds for a message to the others and back, measured at the start; a record of before has none.
    #[serde(default)]
    pub rank_round_trip_us: Vec<f64>,
    /// Milliseconds that messages were planned to take for a token, from round trips at the start.
    pub planned_communication_ms: f64,
}

/// Bytes of a kind of module.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KindBytes {
    /// As [`ModuleKind::name`].
    pub kind: String,
    /// Read for one token.
    pub read_bytes: u64,
    /// Of all its weights.
    pub resident_bytes: u64,
    /// Names of its formats, the largest part first.
    pub formats: Vec<String>,
}

impl Facts {
    /// The part that follows from the model.
    pub fn of_model(name: String, config: &ModelConfig, accounting: &Accounting) -> Facts {
        let kinds = accounting.kinds.iter().filter(|k| k.kind != ModuleKind::Mtp);
        let kinds = kinds.map(|k| KindBytes {
            kind: k.kind.name().to_string(),
            read_bytes: k.read_bytes,
            resident_bytes: k.resident_bytes,
            formats: k.formats.iter().map(|(name, _)| name.clone()).collect(),
        });
        Facts {
            model: name,
            n_layers: config.num_hidden_layers,
            kinds: kinds.collect(),
            experts: config.moe.as_ref().map(|moe| (moe.num_experts_per_tok, moe.n_routed_experts)),
            tensor_size: 1,
            cores: tandem_cpu::system::default_threads(),
            ..Facts::default()
        }
    }

    /// Notes how the model is divided.
    pub(crate) fn take_plan(&mut self, plan: &Plan) {
        self.tensor_size = plan.tensor_size;
        self.rank_bytes = plan.ranks.iter().map(|rank| rank.read_bytes).collect();
        self.rank_bandwidth = plan.ranks.iter().map(|rank| rank.tokens_per_second * rank.read_bytes as f64).collect();
        self.rank_round_trip_us = plan.ranks.iter().map(|rank| rank.round_trip * 1e6).collect();
        let slowest = |stage: &[RankPlan]| stage.iter().map(|rank| 1.0 / rank.tokens_per_second).fold(0.0, f64::max);
        let work: f64 = plan.ranks.chunks(plan.tensor_size).map(slowest).sum();
        self.planned_communication_ms = (1e3 * (1.0 / plan.tokens_per_second - work)).max(0.0);
    }

    /// Weight bytes that a step of `n_rows` tokens reads in modules of these kinds: each row has experts of its own, evenly
    /// spread.
    pub fn read_bytes(&self, n_rows: f64, kinds: &[ModuleKind]) -> f64 {
        let of = |k: &KindBytes| {
            if k.kind != ModuleKind::RoutedExperts.name() {
                return k.read_bytes as f64;
            }
            let (chosen, all) = self.experts.unwrap_or((1, 1));
            let skipped = 1.0 - chosen as f64 / all as f64;
            k.resident_bytes as f64 * (1.0 - skipped.powf(n_rows))
        };
        self.kinds.iter().filter(|k| kinds.iter().any(|kind| kind.name() == k.kind)).map(of).sum()
    }
}

/// Mean times of steps of one kind, ms.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Phase {
    /// Steps.
    pub n_steps: usize,
    /// Tokens that they ran.
    pub n_tokens: usize,
    /// Mean tokens of context.
    pub context: f64,
    /// Mean of a step from the end of the one before.
    pub ms: f64,
    /// Half of the steps took at most this.
    pub ms_median: f64,
    /// A tenth of the steps took at most this.
    pub ms_p10: f64,
    /// Nine tenths of the steps took at most this.
    pub ms_p90: f64,
    /// Between steps: text, connections.
    pub outside_ms: f64,
    /// Scheduling, sampling and pages.
    pub host_ms: f64,
    /// By operation of rank 0; empty where operations are only enqueued.
    pub operations_ms: BTreeMap<String, f64>,
    /// Rank 0's own work.
    pub working_ms: f64,
    /// Rank 0 in sums.
    pub summing_ms: f64,
    /// Rank 0 waiting for hidden states.
    pub receiving_ms: f64,
    /// Rank 0 sending them.
    pub sending_ms: f64,
    /// Pages that rank 0 read from a disk, per step.
    pub major_faults: f64,
    /// Mean of the steps without such faults; none if there were none.
    pub clean_ms: Option<f64>,
    /// Rank 0's own work in these.
    pub clean_working_ms: Option<f64>,
}

impl Phase {
    fn new(steps: &[&StepTimes]) -> Option<Phase> {
        if steps.is_empty() {
            return None;
        }
        let n = steps.len() as f64;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let mean = |of: &dyn Fn(&StepTimes) -> f64| steps.iter().map(|step| of(step)).sum::<f64>() / n;
        let mut totals: Vec<f64> = steps.iter().map(|step| ms(step.total)).collect();
        totals.sort_by(f64::total_cmp);
        let at = |q: f64| totals[(q * (totals.len() - 1) as f64).round() as usize];
        let clean: Vec<&&StepTimes> = steps.iter().filter(|step| step.rank.usage.major_faults == 0).collect();
        let clean_mean = |of: &dyn Fn(&StepTimes) -> f64| {
            (!clean.is_empty()).then(|| clean.iter().map(|step| of(step)).sum::<f64>() / clean.len() as f64)
        };
        Some(Phase {
            n_steps: steps.len(),
            n_tokens: steps.iter().map(|step| step.n_decoding + step.n_prefilled).sum(),
            context: mean(&|step| step.context as f64),
            ms: mean(&|step| ms(step.total)),
            ms_median: at(0.5),
            ms_p10: at(0.1),
            ms_p90: at(0.9),
            outside_ms: mean(&|step| ms(step.outside)),
            host_ms: mean(&|step| ms(step.host)),
            operations_ms: by_name(&|i| mean(&|step| ms(step.rank.operations[i]))),
            working_ms: mean(&|step| ms(step.rank.working)),
            summing_ms: mean(&|step| ms(step.rank.summing)),
            receiving_ms: mean(&|step| ms(step.rank.receiving)),
            sending_ms: mean(&|step| ms(step.rank.sending)),
            major_faults: mean(&|step| step.rank.usage.major_faults as f64),
            clean_ms: clean_mean(&|step| ms(step.total)),
            clean_working_ms: clean_mean(&|step| ms(step.rank.working)),
        })
    }
}

/// Values by the names of operations; empty if all are zero.
fn by_name(value: &dyn Fn(usize) -> f64) -> BTreeMap<String, f64> {
    let names = Operation::ALL.iter().enumerate();
    let values: BTreeMap<String, f64> = names.map(|(i, o)| (o.name().to_string(), value(i))).collect();
    if values.values().any(|value| *value > 0.0) { values } else { BTreeMap::new() }
}

/// What one rank did, ms per step.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RankRecord {
    /// Where it runs; empty if that is where rank 0 runs.
    pub host: String,
    /// Its layers.
    pub layers: (usize, usize),
    /// Its own work.
    pub working_ms: f64,
    /// Parts of it by operation; empty where operations are only enqueued.
    pub operations_ms: BTreeMap<String, f64>,
    /// Sums, waiting for others included.
    pub summing_ms: f64,
    /// Waiting for hidden states.
    pub receiving_ms: f64,
    /// Sending them.
    pub sending_ms: f64,
    /// Processor time of its process.
    pub cpu_ms: f64,
    /// Time of its threads without a core, all added.
    pub run_delay_ms: f64,
    /// Time in which a quota held it.
    pub throttled_ms: f64,
    /// Pages read from a disk.
    pub major_faults: f64,
    /// Bytes swapped out.
    pub swapped_bytes: u64,
    /// Share of its weights in memory, from 0 to 1.
    pub resident_share: Option<f64>,
}

/// A run in numbers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RunRecord {
    /// Of this structure.
    pub form: u32,
    /// The program's.
    pub tandem_version: String,
    /// Seconds since 1970.
    pub unix_seconds: u64,
    /// What was known at the start.
    pub facts: Facts,
    /// Steps in which sequences got a token each, and nothing else ran.
    pub decode: Option<Phase>,
    /// Steps with tokens of prompts.
    pub prefill: Option<Phase>,
    /// By rank, over the same time; per step.
    pub ranks: Vec<RankRecord>,
    /// What the device says of itself, or the watch over the weights.
    pub warning: Option<String>,
    /// The last decode steps: ms, and pages read from a disk.
    pub steps: Vec<(f64, u64)>,
}

/// Makes records of a running model.
#[derive(Clone, Debug)]
pub struct Recorder {
    /// What was known at the start.
    pub facts: Facts,
    timings: Arc<Timings>,
    residency: Arc<Residency>,
    /// What the ranks had done when the time that counts began.
    mark: Arc<Mutex<Vec<Spent>>>,
}

impl Recorder {
    /// Records what follows.
    pub fn new(facts: Facts, timings: &Arc<Timings>, residency: Arc<Residency>) -> Recorder {
        Recorder { facts, timings: Arc::clone(timings), residency, mark: Arc::default() }
    }

    /// The watch over the weights.
    pub fn residency(&self) -> &Residency {
        &self.residency
    }

    /// From now on the ranks' work counts: a prompt has run.
    pub fn mark(&self, ranks: &[RankStatus]) {
        *self.mark.lock().unwrap_or_else(|e| e.into_inner()) = ranks.iter().map(|rank| rank.spent).collect();
    }

    /// The same as JSON, with what it means under `explanation`: for whoever watches a server.
    pub fn live(&self, ranks: &[RankStatus], warning: Option<String>) -> Value {
        let record = self.record(ranks, warning);
        let mut value = json!(record);
        value["explanation"] = json!(super::explain(&record));
        value
    }

    /// A record of the last steps; `ranks` are as of now, `warning` is the device's.
    pub fn record(&self, ranks: &[RankStatus], warning: Option<String>) -> RunRecord {
        let steps = self.timings.last();
        let (prefilling, mut decoding): (Vec<&StepTimes>, Vec<&StepTimes>) =
            steps.iter().filter(|s| s.n_decoding + s.n_prefilled > 0).partition(|s| s.n_prefilled > 0);
        // The first step after a prompt touches memory that the others find warm.
        if decoding.len() > 4 {
            decoding.remove(0);
        }
        let mark = self.mark.lock().unwrap_or_else(|e| e.into_inner());
        let decode = Phase::new(&decoding);
        // A server's sums hold steps with prompts too; all ranks' times are to those of decoding as rank 0's work is.
        let mean = ranks.first().map(|rank| rank.spent.working.as_secs_f64() * 1e3 / rank.spent.n_steps.max(1) as f64);
        let scale = match (&decode, mean) {
            (Some(decode), Some(mean)) if mark.is_empty() && mean > 0.0 => decode.working_ms / mean,
            _ => 1.0,
        };
        let ranks = ranks.iter().enumerate();
        let charted = decoding.len().saturating_sub(N_CHARTED);
        RunRecord {
            form: FORM,
            tandem_version: env!("CARGO_PKG_VERSION").to_string(),
            unix_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            facts: self.facts.clone(),
            ranks: ranks.map(|(i, rank)| rank_record(rank, mark.get(i).unwrap_or(&Spent::default()), scale)).collect(),
            warning: warning.or_else(|| self.residency.warning()),
            steps: decoding[charted..]
                .iter()
                .map(|step| (step.total.as_secs_f64() * 1e3, step.rank.usage.major_faults))
                .collect(),
            decode,
            prefill: Phase::new(&prefilling),
        }
    }
}

/// `scale` is the part of a mean step that counts.
fn rank_record(rank: &RankStatus, mark: &Spent, scale: f64) -> RankRecord {
    let spent = rank.spent.since(mark);
    let n = spent.n_steps.max(1) as f64;
    let ms = |time: Duration| time.as_secs_f64() * 1e3 / n * scale;
    RankRecord {
        host: rank.host.clone(),
        layers: (rank.layers.start, rank.layers.end),
        working_ms: ms(spent.working),
        operations_ms: by_name(&|i| ms(spent.operations[i])),
        summing_ms: ms(spent.summing),
        receiving_ms: ms(spent.receiving),
        sending_ms: ms(spent.sending),
        cpu_ms: ms(spent.usage.cpu),
        run_delay_ms: ms(spent.usage.run_delay),
        throttled_ms: ms(spent.usage.throttled),
        major_faults: spent.usage.major_faults as f64 / n,
        swapped_bytes: spent.usage.swapped_bytes,
        resident_share: spent.usage.resident_ppm.map(|ppm| ppm as f64 / 1e6),
    }
}

impl RunRecord {
    /// Keeps it as the last run.
    ///
    /// # Errors
    /// There is no state directory, or it cannot be written.
    pub fn keep(&self) -> anyhow::Result<()> {
        let file = last_run_file().context("neither XDG_STATE_HOME nor HOME is set")?;
        let dir = file.parent().context("a file has a directory")?;
        let write = || -> anyhow::Result<()> {
            std::fs::create_dir_all(dir)?;
            // Another process may be writing too: whoever is later wins, and nobody reads half a file.
            let partial = dir.join(format!("last-run.{}.partial", std::process::id()));
            std::fs::write(&partial, serde_json::to_vec(self)?)?;
            Ok(std::fs::rename(&partial, &file)?)
        };
        write().with_context(|| format!("cannot keep the run's timings in {}", file.display()))
    }

    /// From JSON.
    ///
    /// # Errors
    /// It is no record, or another version's.
    pub fn parse(text: &str) -> anyhow::Result<RunRecord> {
        let value: Map<String, Value> = serde_json::from_str(text).context("this is not a JSON object")?;
        let form = value.get("form").and_then(Value::as_u64);
        ensure!(form.is_some(), "these are no timings of a tandem: they have no number \"form\"");
        ensure!(
            form == Some(u64::from(FORM)),
            "the timings have form {} and this tandem reads form {FORM}; use the version that wrote them",
            form.unwrap_or(0)
        );
        serde_json::from_value(Value::Object(value)).context("timings of a run")
    }
}

/// Where the last run's record is: `$XDG_STATE_HOME/tandem/last-run.json`, or below `~/.local/state`.
pub fn last_run_file() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").filter(|dir| dir.is_absolute());
    // Nobody's home is made here.
    let home = || set("HOME").filter(|home| home.is_dir());
    let state = state.or_else(|| home().map(|home| home.join(".local/state")));
    state.map(|state| state.join("tandem").join("last-run.json"))
}

/// The last run's record.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn read_last_run() -> anyhow::Result<RunRecord> {
    let file = last_run_file().context("neither XDG_STATE_HOME nor HOME is set, so there is no last run")?;
    let text = read(&file)?;
    RunRecord::parse(&text).with_context(|| format!("{}", file.display()))
}

fn read(file: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(file).with_context(|| {
        format!("no run to explain: cannot read {}; run a prompt first, or name a server's address", file.display())
    })
}

impl RunRecord {
    /// Measures the bandwidth of memory with the run's threads, where the run did not: on the processor of one machine,
    /// which must be this one.
    pub fn measure_bandwidth(&mut self) {
        if self.facts.bandwidth.is_none() && self.facts.backend == "cpu" && self.ranks.len() <= 1 {
            // A file may say anything.
            let most = tandem_cpu::system::default_threads();
            let pool = tandem_cpu::Pool::new(self.facts.threads.clamp(1, most));
            self.facts.bandwidth = Some(tandem_cpu::bandwidth::measure_read_bandwidth(&pool, BANDWIDTH_BYTES));
        }
    }
}

/// Read for the bandwidth.
const BANDWIDTH_BYTES: usize = 256 << 20;
