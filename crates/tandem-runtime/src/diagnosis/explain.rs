//! What a run's numbers mean: where a token's time went, what costs most that need not be, and what would help.
//!
//! A cause is named only if its own evidence is there; its cost is what it alone takes from a token. Causes multiply: two that
//! cost 10 ms each may cost 30 together. Where nothing explains
//! the time, the verdict says so and names the command that would tell.

use std::collections::BTreeMap;

use serde::Serialize;
use tandem_core::weights::ModuleKind;
use tandem_engine::Operation;

use super::record::{KindBytes, Phase, RankRecord, RunRecord};
use crate::units::bytes;

/// From this share of a token's time on, a fault is worth a verdict.
const MIN_SHARE: f64 = 0.15;
/// Steps below which nothing is said.
const MIN_STEPS: usize = 8;
/// Part of the measured bandwidth that the best kernels reach in decoding; the rest of a floor is no fault.
const REACHABLE: f64 = 0.75;
/// Below this part of the bandwidth, kernels and not memory are what limits.
const KERNEL_BOUND: f64 = 0.45;

/// Share of a time that delays may explain: threads add up, and something ran.
const MOST_STARVED: f64 = 0.95;

/// Tokens of a step that verifies one draft, if half of the drafts are right.
const EXPECTED_OF_A_DRAFT: f64 = 1.5;

/// Something that takes time from a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CauseKind {
    /// Weights are read from a disk.
    Paging,
    /// One rank is slower than the others, which wait for it.
    SlowRank,
    /// Messages between ranks.
    Communication,
    /// Other programs, or a quota, take the cores.
    CpuContention,
    /// More threads than cores.
    TooManyThreads,
    /// Kernels of an older instruction set.
    Kernels,
    /// Experts of a GPU's model are on the host.
    HostExperts,
    /// A GPU has lost its memory to others.
    DeviceMemoryLost,
    /// Work between steps: text, scheduling, sampling.
    Host,
    /// Reading weights at about the speed of memory: no fault.
    Weights,
    /// Attention over the context, with the indexer.
    Attention,
    /// Work outside of the matrices: norms, transfers, starting threads.
    Overheads,
    /// The numbers do not say.
    Unknown,
}

/// A cause with its evidence.
#[derive(Clone, Debug, Serialize)]
pub struct Cause {
    /// What it is.
    pub kind: CauseKind,
    /// The rank at fault, if it is one's.
    pub rank: Option<usize>,
    /// What it alone takes from a token, ms; together with others it may be more.
    pub cost_ms: f64,
    /// The same as a share of a token's time.
    pub share: f64,
    /// The numbers that show it.
    pub evidence: String,
    /// What to do.
    pub remedy: String,
}

/// A part of a token's time.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// An operation's name, or `communication`, `waiting`, `host`, `outside`, `unexplained`.
    pub name: String,
    /// Mean per step.
    pub ms: f64,
    /// What memory alone would take for its bytes; none without bytes or without a measured bandwidth.
    pub floor_ms: Option<f64>,
    /// Bytes that it reads.
    pub bytes: u64,
}

/// Something that would make it faster.
#[derive(Clone, Debug, Serialize)]
pub struct Advice {
    /// What to do.
    pub what: String,
    /// Tokens per second that this is estimated to give one sequence.
    pub tokens_per_second: f64,
    /// How the estimate was made.
    pub estimate: String,
}

/// What a run's numbers mean.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// In one sentence.
    pub verdict: String,
    /// What limits most; `unknown` if the evidence does not carry a verdict.
    pub principal: CauseKind,
    /// Everything with a cost, the largest first.
    pub causes: Vec<Cause>,
    /// A step's time in parts.
    pub parts: Vec<Part>,
    /// Mean time of a step, ms.
    pub step_ms: f64,
    /// Tokens per second of all sequences.
    pub tokens_per_second: f64,
    /// What memory alone would allow, where its bandwidth is known.
    pub roofline_tokens_per_second: Option<f64>,
    /// What would help, the largest estimate first.
    pub advice: Vec<Advice>,
    /// What is not known, and which command tells.
    pub unknown: Vec<String>,
}

/// Kinds of module whose bytes an operation reads.
fn kinds_of(operation: Operation) -> &'static [ModuleKind] {
    match operation {
        Operation::AttentionProjections => &[ModuleKind::Attention, ModuleKind::Indexer],
        Operation::Router => &[ModuleKind::Router],
        Operation::Experts => &[ModuleKind::RoutedExperts, ModuleKind::SharedExpert],
        Operation::DenseMlp => &[ModuleKind::DenseMlp],
        Operation::LmHead => &[ModuleKind::LmHead],
        Operation::Indexer | Operation::SparseAttention | Operation::Norms | Operation::Other => &[],
    }
}

/// A record with what several causes look at.
struct Case<'a> {
    record: &'a RunRecord,
    decode: &'a Phase,
    /// Sequences of a step.
    n_rows: f64,
    operations: BTreeMap<String, f64>,
    /// Work of the stages, ranks of a stage at the same time.
    working: f64,
    communication: f64,
    waiting: f64,
    weight_bytes: f64,
    /// What memory alone would take for the weights, ms.
    floor: Option<f64>,
    /// By rank: what page faults take of its work, ms.
    paging: Vec<f64>,
}

impl Case<'_> {
    fn new<'a>(record: &'a RunRecord, decode: &'a Phase) -> Case<'a> {
        let n_rows = (decode.n_tokens as f64 / decode.n_steps.max(1) as f64).max(1.0);
        let (operations, working, communication, waiting) = if record.ranks.len() > 1 {
            over_ranks(record, decode)
        } else {
            (decode.operations_ms.clone(), decode.working_ms, 0.0, 0.0)
        };
        let weight_bytes = bytes_of(record, n_rows);
        let floor = record.facts.bandwidth.filter(|b| *b > 0.0).map(|bandwidth| weight_bytes / bandwidth * 1e3);
        let paging = paging_of(record, decode);
        Case { record, decode, n_rows, operations, working, communication, waiting, weight_bytes, floor, paging }
    }

    fn bytes_of(&self, n_rows: f64) -> f64 {
        bytes_of(self.record, n_rows)
    }

    fn time_of(&self, operations: &[Operation]) -> f64 {
        operations.iter().filter_map(|o| self.operations.get(o.name())).sum()
    }

    /// Time in products of weights; all work where operations are not timed.
    fn weights_ms(&self) -> f64 {
        if self.operations.is_empty() {
            return self.working;
        }
        self.time_of(&Operation::ALL.into_iter().filter(|o| !kinds_of(*o).is_empty()).collect::<Vec<_>>())
    }

    /// The same on the fastest rank of each stage, without page faults and time without a core: what the kernels take.
    fn kernels_ms(&self) -> f64 {
        let (mut own, mut all) = (0.0, 0.0);
        for (stage, paging) in self.stages() {
            let undisturbed = |(rank, paging): (&RankRecord, &f64)| rank.working_ms - paging - self.starved(rank);
            own += stage.iter().zip(paging).map(undisturbed).fold(f64::INFINITY, f64::min).max(0.0);
            all += stage.iter().map(|rank| rank.working_ms).sum::<f64>() / stage.len() as f64;
        }
        if all > 0.0 { self.weights_ms() * own / all } else { self.weights_ms() }
    }

    /// What products of weights would take if nothing were wrong.
    fn healthy_ms(&self) -> f64 {
        let facts = &self.record.facts;
        let (ms, best) = (self.kernels_ms(), self.floor.map(|floor| floor / REACHABLE));
        if facts.isa == facts.best_isa { ms } else { best.map_or(ms, |best| best.min(ms)) }
    }

    fn stages(&self) -> impl Iterator<Item = (&[RankRecord], &[f64])> {
        let size = self.record.facts.tensor_size.max(1);
        self.record.ranks.chunks(size).zip(self.paging.chunks(size))
    }

    fn cause(&self, kind: CauseKind, cost_ms: f64, evidence: String, remedy: &str) -> Cause {
        let remedy = remedy.to_string();
        Cause { kind, rank: None, cost_ms, share: cost_ms / self.decode.ms.max(1e-9), evidence, remedy }
    }

    /// This rank's time without cores per step, threads taken together. Threads that a quota holds wait for a core too,
    /// where the system tells.
    fn lost(&self, rank: &RankRecord) -> f64 {
        (rank.run_delay_ms / self.record.facts.threads.max(1) as f64).max(rank.throttled_ms)
    }

    /// The part of it in this rank's work. Nothing tells when in a step it was: a thread that wants to run is taken to be
    /// as often without a core in work as in sums, where it may also sleep.
    fn starved(&self, rank: &RankRecord) -> f64 {
        let (lost, had) = (self.lost(rank), rank.cpu_ms / self.record.facts.threads.max(1) as f64);
        let runnable = if had > 0.0 { lost + had } else { rank.working_ms + rank.summing_ms };
        (rank.working_ms * lost / runnable.max(1e-9)).min(lost).min(MOST_STARVED * rank.working_ms)
    }

    /// Time in sums in which no rank had a core.
    fn starved_in_sums(&self) -> f64 {
        let ranks = &self.record.ranks;
        if ranks.len() < 2 {
            return 0.0;
        }
        let in_sums = |rank: &RankRecord| (self.lost(rank) - self.starved(rank)).min(rank.summing_ms);
        ranks.iter().map(in_sums).fold(self.communication, f64::min).max(0.0)
    }

    /// How much slower a rank works than the others, whose page faults are left out.
    fn excess(&self, rank: usize) -> Option<f64> {
        Some(self.record.ranks[rank].working_ms - self.paging[rank] - expected(self.record, &self.paging, rank)?)
    }

    /// How long a rank without a core was in sums, for which the others waited, beyond what all lack.
    fn held_in_sums(&self, rank: usize) -> f64 {
        let lost = |rank: &RankRecord| self.lost(rank);
        let least = self.record.ranks.iter().map(lost).fold(f64::INFINITY, f64::min);
        let held = lost(&self.record.ranks[rank]) - least - self.excess(rank).unwrap_or(0.0).max(0.0);
        held.min(self.communication - self.starved_in_sums()).max(0.0)
    }

    /// Time between steps in which rank 0 had no core: what is left of its threads' delay beside its work.
    fn starved_between(&self) -> f64 {
        let between = self.decode.outside_ms + self.decode.host_ms;
        let counted = |rank: &RankRecord| self.starved(rank) + self.starved_in_sums();
        let left = |rank: &RankRecord| rank.run_delay_ms - counted(rank) * self.record.facts.threads as f64;
        self.record.ranks.first().map_or(0.0, left).min(MOST_STARVED * between).max(0.0)
    }
}

/// Bytes of weights that a step of so many rows reads.
fn bytes_of(record: &RunRecord, n_rows: f64) -> f64 {
    Operation::ALL.iter().map(|o| record.facts.read_bytes(n_rows, kinds_of(*o))).sum()
}

/// Operations, work, communication and waiting of several ranks, ms per step.
fn over_ranks(record: &RunRecord, decode: &Phase) -> (BTreeMap<String, f64>, f64, f64, f64) {
    let mut operations: BTreeMap<String, f64> = BTreeMap::new();
    let (mut working, mut summing, mut least_summing) = (0.0, 0.0, 0.0);
    for stage in record.ranks.chunks(record.facts.tensor_size.max(1)) {
        let n = stage.len() as f64;
        let mean = |of: &dyn Fn(&RankRecord) -> f64| stage.iter().map(of).sum::<f64>() / n;
        for rank in stage {
            for (name, ms) in &rank.operations_ms {
                *operations.entry(name.clone()).or_default() += ms / n;
            }
        }
        working += mean(&|rank| rank.working_ms);
        summing += mean(&|rank| rank.summing_ms);
        // The rank that waits least tells what sums take by themselves.
        least_summing += stage.iter().map(|rank| rank.summing_ms).fold(f64::INFINITY, f64::min);
    }
    let device = decode.ms - decode.outside_ms - decode.host_ms;
    let between = (device - working - summing).max(0.0);
    (operations, working, least_summing + between, (summing - least_summing).max(0.0))
}

/// Explains a run.
pub fn explain(record: &RunRecord) -> Explanation {
    let Some(decode) = record.decode.as_ref().filter(|decode| decode.n_steps >= MIN_STEPS) else {
        let n = record.decode.as_ref().map_or(0, |decode| decode.n_steps);
        return nothing(format!(
            "only {n} tokens were decoded, too few to say anything: let it write {MIN_STEPS} or more"
        ));
    };
    let case = Case::new(record, decode);
    let candidates = [
        paging(&case),
        slow_rank(&case),
        communication(&case),
        cores(&case),
        kernels(&case),
        device(&case),
        host(&case),
    ];
    let mut causes: Vec<Cause> = candidates.into_iter().flatten().filter(|cause| cause.cost_ms > 0.0).collect();
    causes.sort_by(|a, b| b.cost_ms.total_cmp(&a.cost_ms));
    let fault = causes.iter().find(|cause| cause.share >= MIN_SHARE).cloned();
    let mut unknown = vec![];
    let principal = fault.unwrap_or_else(|| without_fault(&case, &mut unknown));
    if case.floor.is_none() {
        unknown.push("the bandwidth of memory is not known; `tandem doctor` measures it".to_string());
    }
    let verdict = verdict(&case, &principal);
    if !causes.iter().any(|cause| cause.kind == principal.kind) {
        causes.insert(0, principal.clone());
    }
    Explanation {
        verdict,
        principal: principal.kind,
        advice: advice(&case, &principal),
        parts: parts(&case),
        causes,
        step_ms: decode.ms,
        tokens_per_second: case.n_rows * 1e3 / decode.ms,
        roofline_tokens_per_second: case.floor.map(|floor| case.n_rows * 1e3 / floor),
        unknown,
    }
}

fn nothing(verdict: String) -> Explanation {
    Explanation {
        verdict: format!("unknown: {verdict}"),
        principal: CauseKind::Unknown,
        causes: vec![],
        parts: vec![],
        step_ms: 0.0,
        tokens_per_second: 0.0,
        roofline_tokens_per_second: None,
        advice: vec![],
        unknown: vec![verdict],
    }
}

/// Pages per step from which on a rank counts as paging.
const MIN_FAULTS: f64 = 0.2;

/// Milliseconds of each rank's work that page faults take.
fn paging_of(record: &RunRecord, decode: &Phase) -> Vec<f64> {
    let ranks = &record.ranks;
    let of_rank_0 = match decode.clean_working_ms {
        Some(clean) => decode.working_ms - clean,
        // Not one step without: what good kernels would not take.
        None => {
            let bytes = bytes_of(record, 1.0);
            let share = record.facts.rank_bytes.first().map_or(1.0, |own| *own as f64 / bytes.max(1.0));
            let per_rank = record.facts.bandwidth.map(|bandwidth| bandwidth / record.facts.tensor_size.max(1) as f64);
            per_rank.map_or(decode.working_ms / 2.0, |b| decode.working_ms - bytes * share / b * 1e3 / REACHABLE)
        }
    };
    let rank_0 = if decode.major_faults >= MIN_FAULTS { of_rank_0.max(0.0) } else { 0.0 };
    let mut list = vec![rank_0];
    for (i, rank) in ranks.iter().enumerate().skip(1) {
        let others: Vec<f64> = (0..ranks.len()).map(|j| if j == 0 { rank_0 } else { 0.0 }).collect();
        let excess = expected(record, &others, i).map_or(0.0, |expected| (rank.working_ms - expected).max(0.0));
        list.push(if rank.major_faults >= MIN_FAULTS { excess } else { 0.0 });
    }
    list
}

/// Milliseconds that a rank's work would take at the rate of the others, whose page faults are left out.
fn expected(record: &RunRecord, paging: &[f64], rank: usize) -> Option<f64> {
    let bytes = &record.facts.rank_bytes;
    let rate = |(i, r): (usize, &RankRecord)| {
        let ms = r.working_ms - paging.get(i).unwrap_or(&0.0);
        (i != rank && ms > 0.0).then(|| *bytes.get(i).unwrap_or(&0) as f64 / ms)
    };
    let mut rates: Vec<f64> = record.ranks.iter().enumerate().filter_map(rate).filter(|rate| *rate > 0.0).collect();
    rates.sort_by(f64::total_cmp);
    let typical = rates.get(rates.len() / 2)?;
    Some(*bytes.get(rank)? as f64 / typical)
}

fn paging(case: &Case<'_>) -> Option<Cause> {
    let (decode, facts, ranks) = (case.decode, &case.record.facts, &case.record.ranks);
    let (rank, cost) = case.paging.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let resident = ranks.iter().filter_map(|rank| rank.resident_share).fold(1.0, f64::min);
    let faults = if rank == 0 { decode.major_faults } else { ranks[rank].major_faults };
    let place = if ranks.len() > 1 { format!(" on rank {rank}") } else { String::new() };
    let clean = decode.clean_ms.filter(|_| rank == 0);
    let evidence = format!(
        "{faults:.1} pages per token came from the disk{place}{}, {:.0} % of the weights are in memory",
        clean.map_or(String::new(), |ms| format!(" (steps without: {ms:.1} ms, all: {:.1} ms)", decode.ms)),
        100.0 * resident
    );
    let remedy = format!(
        "free memory for the {} of weights, pin them with --lock, use fewer bits, or add a machine",
        bytes(facts.weight_bytes)
    );
    let rank = (ranks.len() > 1).then_some(rank);
    Some(Cause { rank, ..case.cause(CauseKind::Paging, cost, evidence, &remedy) })
}

fn slow_rank(case: &Case<'_>) -> Option<Cause> {
    let ranks = &case.record.ranks;
    let cost = |i: usize| Some((i, case.excess(i)?.max(0.0) + case.held_in_sums(i)));
    let (rank, cost) = (0..ranks.len()).filter_map(cost).max_by(|a, b| a.1.total_cmp(&b.1))?;
    let slow = &ranks[rank];
    let rate = |i: usize| *case.record.facts.rank_bytes.get(i).unwrap_or(&0) as f64 / ranks[i].working_ms / 1e6;
    let others = (0..ranks.len()).filter(|i| *i != rank).map(rate).fold(0.0, f64::max);
    let host = if slow.host.is_empty() { String::new() } else { format!(" ({})", slow.host) };
    let why = if slow.throttled_ms > 0.1 * slow.working_ms {
        format!("; a quota holds it for {:.1} ms of every token", slow.throttled_ms)
    } else if case.starved(slow) > 0.1 * slow.working_ms {
        format!("; its threads wait {:.1} ms of every token for a core", case.starved(slow))
    } else {
        format!("; it had {:.1} ms of processor time per token", slow.cpu_ms)
    };
    let evidence =
        format!("rank {rank}{host} reads its weights at {:.1} GB/s and the others at {others:.1}{why}", rate(rank));
    let remedy = format!("stop what else runs on the host of rank {rank}, lift its quota, or give it a smaller part");
    Some(Cause { rank: Some(rank), ..case.cause(CauseKind::SlowRank, cost, evidence, &remedy) })
}

fn communication(case: &Case<'_>) -> Option<Cause> {
    if case.record.ranks.len() < 2 {
        return None;
    }
    let planned = case.record.facts.planned_communication_ms;
    let slower = if planned > 0.0 && case.communication > 3.0 * planned {
        format!(": the network is {:.0} times slower than it was", case.communication / planned)
    } else {
        String::new()
    };
    let evidence = format!(
        "messages take {:.2} ms of every token; round trips at the start let expect {planned:.2} ms{slower}",
        case.communication
    );
    let remedy = "use a network with shorter round trips (`tandem doctor --hostfile` measures every pair in both \
                  directions), or a pipeline (--pp), which sends far less than slices (--tp)";
    // While a rank in a sum has no core, it is no message that the others wait for.
    let held = (0..case.record.ranks.len()).map(|rank| case.held_in_sums(rank)).fold(0.0, f64::max);
    Some(case.cause(CauseKind::Communication, case.communication - held - case.starved_in_sums(), evidence, remedy))
}

/// Cores that others have, or that more threads than cores share.
fn cores(case: &Case<'_>) -> Option<Cause> {
    let (ranks, facts) = (&case.record.ranks, &case.record.facts);
    if facts.backend != "cpu" {
        return None;
    }
    // What the fastest rank lacks; what one lacks more is that rank's fault.
    let (working, starved) = (ranks.iter().zip(&case.paging))
        .map(|(rank, paging)| (rank.working_ms - paging, case.starved(rank)))
        .min_by(|a, b| a.0.total_cmp(&b.0))?;
    let share = (starved / working.max(1e-9)).min(MOST_STARVED);
    let elsewhere = case.starved_between() + case.starved_in_sums();
    let starved = starved + elsewhere;
    let local = ranks.iter().filter(|rank| rank.host.is_empty() || rank.host == ranks[0].host).count().max(1);
    let threads = facts.threads.saturating_mul(local);
    let (kind, remedy) = if threads > facts.cores {
        (CauseKind::TooManyThreads, "run with as many threads as there are cores: leave --threads out")
    } else {
        (CauseKind::CpuContention, "stop what else runs on this machine, or lift the quota")
    };
    let throttled: f64 = ranks.iter().map(|rank| rank.throttled_ms).fold(0.0, f64::max);
    let quota = if throttled > 0.0 { format!("; a quota held them for {throttled:.1} ms") } else { String::new() };
    let evidence = format!(
        "threads that could run waited {starved:.1} ms of every token for one of {} cores ({threads} threads compute){quota}",
        facts.cores
    );
    let cost = case.healthy_ms() * share / (1.0 - share) + elsewhere;
    Some(case.cause(kind, cost, evidence, remedy))
}

fn kernels(case: &Case<'_>) -> Option<Cause> {
    let facts = &case.record.facts;
    let (isa, best) = (facts.isa.as_deref()?, facts.best_isa.as_deref()?);
    let (ms, floor) = (case.kernels_ms(), case.floor?);
    // The best kernels for this processor are at fault only where they are far from the memory's limit.
    if ms <= 0.0 || (isa == best && floor / ms > KERNEL_BOUND) {
        return None;
    }
    let without = (isa == best).then(|| format_without_kernels(case)).flatten();
    let remedy = match (isa, &without) {
        _ if isa != best => format!("leave --isa out: this processor has kernels for {best}"),
        (_, Some(format)) => format!(
            "`tandem convert` writes formats that have kernels: bf16, affine and mxfp4; each row of {format} is decoded \
             at every use"
        ),
        ("scalar" | "avx2", None) => {
            "a processor with AVX-512 (VNNI and VBMI), or a virtual machine that shows it".to_string()
        }
        // The best kernels on this processor: nothing is known to be wrong with them.
        _ => return None,
    };
    let evidence = format!(
        "products of weights run at {:.1} GB/s of {:.1} GB/s with {}",
        case.weight_bytes / ms / 1e6,
        facts.bandwidth? / 1e9,
        without.map_or(format!("{isa} kernels"), |format| format!("no kernel for {format} as it is in the file"))
    );
    Some(case.cause(CauseKind::Kernels, (ms - floor / REACHABLE).max(0.0), evidence, &remedy))
}

/// The format of most bytes that a step reads, if it has no kernel of its own.
fn format_without_kernels(case: &Case<'_>) -> Option<String> {
    let facts = &case.record.facts;
    let slow = |k: &&KindBytes| k.formats.first().is_some_and(|format| facts.slow_formats.contains(format));
    let slow: Vec<&KindBytes> = facts.kinds.iter().filter(slow).collect();
    let sum = |kinds: &[&KindBytes]| kinds.iter().map(|k| k.read_bytes as f64).sum::<f64>();
    let is_most = 2.0 * sum(&slow) > sum(&facts.kinds.iter().collect::<Vec<_>>());
    let largest = slow.into_iter().max_by_key(|k| k.read_bytes)?;
    is_most.then(|| largest.formats[0].clone())
}

fn device(case: &Case<'_>) -> Option<Cause> {
    let facts = &case.record.facts;
    let over = case.floor.map_or(0.0, |floor| (case.decode.ms - floor / REACHABLE).max(0.0));
    if facts.host_expert_bytes > 0 {
        let evidence = format!(
            "experts of {} per token are read and multiplied on the host, because the GPU does not hold them",
            bytes(facts.host_expert_bytes)
        );
        let remedy = "a GPU with more memory, a second one (--transport nccl), fewer bits, or a smaller --context";
        return Some(case.cause(CauseKind::HostExperts, over, evidence, remedy));
    }
    match &case.record.warning {
        Some(warning) if facts.backend != "cpu" => {
            let remedy = "close other programs, use a smaller --context, or raise the limit on wired memory";
            Some(case.cause(CauseKind::DeviceMemoryLost, over, warning.clone(), remedy))
        }
        _ => None,
    }
}

fn host(case: &Case<'_>) -> Option<Cause> {
    let decode = case.decode;
    let evidence = format!(
        "{:.2} ms between steps (text, connections) and {:.2} ms of scheduling and sampling, while no matrix is read",
        decode.outside_ms, decode.host_ms
    );
    let remedy = "greedy decoding or fewer sampling filters, plainer grammars, fewer clients on this machine";
    let cost = decode.outside_ms + decode.host_ms - case.starved_between();
    Some(case.cause(CauseKind::Host, cost, evidence, remedy))
}

/// The largest part of a run in which nothing is wrong.
fn without_fault(case: &Case<'_>, unknown: &mut Vec<String>) -> Cause {
    let (ms, weights) = (case.decode.ms, case.weights_ms());
    let attention = case.time_of(&[Operation::SparseAttention, Operation::Indexer]);
    let overheads = case.time_of(&[Operation::Norms, Operation::Other]);
    let of_bandwidth = case.floor.map(|floor| 100.0 * floor / weights.max(1e-9));
    if case.operations.is_empty() && of_bandwidth.is_none_or(|percent| percent < 100.0 * KERNEL_BOUND) {
        let told = "a GPU's operations are not timed while it runs; `tandem bench decode` times them one by one";
        unknown.push(told.to_string());
        let evidence =
            of_bandwidth.map_or_else(String::new, |p| format!("the device reads at {p:.0} % of its bandwidth"));
        return case.cause(CauseKind::Unknown, 0.0, evidence, told);
    }
    let rest = ms - weights - attention - overheads - case.communication - case.waiting;
    let rest = rest - case.decode.host_ms - case.decode.outside_ms;
    if rest > 0.25 * ms && !case.operations.is_empty() {
        let told = "`tandem bench decode` times every operation of this model";
        unknown.push(format!("{rest:.1} ms of a step belong to no operation; {told}"));
        return case.cause(CauseKind::Unknown, 0.0, format!("{rest:.1} ms of {ms:.1} ms belong to no operation"), told);
    }
    let speed = of_bandwidth.map_or_else(String::new, |p| format!(" at {p:.0} % of the memory's bandwidth"));
    let candidates = [
        (
            CauseKind::Weights,
            weights,
            format!("{} of weights per step are read{speed}", bytes(case.weight_bytes as u64)),
        ),
        (CauseKind::Attention, attention, format!("attention over {:.0} tokens of context", case.decode.context)),
        (
            CauseKind::Overheads,
            overheads,
            "norms, transfers and the start of threads: the model is small for this machine".to_string(),
        ),
    ];
    let [first, rest @ ..] = candidates;
    let (kind, cost, evidence) = rest.into_iter().fold(first, |a, b| if b.1 > a.1 { b } else { a });
    let is_read = of_bandwidth.is_none_or(|percent| percent > 100.0 * KERNEL_BOUND);
    let remedy = match kind {
        CauseKind::Weights if !is_read => {
            "the kernels compute longer than memory takes to deliver: more cores or a faster clock help, bandwidth does not"
        }
        CauseKind::Weights => "nothing is wrong: fewer bytes per token, or more bandwidth, make it faster",
        CauseKind::Attention => "a shorter context; other weight formats do not help",
        _ => "several sequences at once; a faster memory does not help",
    };
    case.cause(kind, cost, evidence, remedy)
}

fn verdict(case: &Case<'_>, cause: &Cause) -> String {
    let name = match (cause.kind, cause.rank) {
        (CauseKind::Paging, _) => "weights are read from the disk".to_string(),
        (CauseKind::SlowRank, Some(rank)) => format!("the ranks wait for rank {rank}"),
        (CauseKind::SlowRank, None) => "the ranks wait for a slow one".to_string(),
        (CauseKind::Communication, _) => "messages between the ranks".to_string(),
        (CauseKind::CpuContention, _) => "other work takes the cores".to_string(),
        (CauseKind::TooManyThreads, _) => "there are more threads than cores".to_string(),
        (CauseKind::Kernels, _)
            if case.record.facts.isa == case.record.facts.best_isa && format_without_kernels(case).is_some() =>
        {
            "the weights' format has no kernel on this processor".to_string()
        }
        (CauseKind::Kernels, _) => "the kernels are of an older instruction set".to_string(),
        (CauseKind::HostExperts, _) => "experts are on the host".to_string(),
        (CauseKind::DeviceMemoryLost, _) => "the GPU has lost memory".to_string(),
        (CauseKind::Host, _) => "work outside of the model".to_string(),
        (CauseKind::Weights, _) => "reading weights".to_string(),
        (CauseKind::Attention, _) => "attention over the context".to_string(),
        (CauseKind::Overheads, _) => "work outside of the matrices".to_string(),
        (CauseKind::Unknown, _) => return format!("unknown: {}; {}", cause.evidence, cause.remedy),
    };
    let share = 100.0 * cause.share;
    format!("{name}, {share:.0} % of {:.1} ms per step: {}. To do: {}", case.decode.ms, cause.evidence, cause.remedy)
}

fn parts(case: &Case<'_>) -> Vec<Part> {
    let bandwidth = case.record.facts.bandwidth.filter(|b| *b > 0.0);
    let mut parts: Vec<Part> = vec![];
    for operation in Operation::ALL {
        let read = case.record.facts.read_bytes(case.n_rows, kinds_of(operation));
        let Some(ms) = case.operations.get(operation.name()) else { continue };
        let floor_ms = bandwidth.filter(|_| read > 0.0).map(|bandwidth| read / bandwidth * 1e3);
        parts.push(Part { name: operation.name().to_string(), ms: *ms, floor_ms, bytes: read as u64 });
    }
    if parts.is_empty() {
        let bytes = case.weight_bytes as u64;
        parts.push(Part { name: "device".to_string(), ms: case.working, floor_ms: case.floor, bytes });
    }
    let plain = |name: &str, ms: f64| Part { name: name.to_string(), ms, floor_ms: None, bytes: 0 };
    if case.record.ranks.len() > 1 {
        parts.extend([plain("communication", case.communication), plain("waiting", case.waiting)]);
    }
    // Drafting runs the layer that drafts between steps: the time of its operations is shown with theirs only.
    let operations: f64 = case.operations.values().sum();
    let drafting = (operations - case.working).max(0.0);
    let outside = (case.decode.outside_ms - drafting).max(0.0);
    let host = (case.decode.host_ms - (drafting - case.decode.outside_ms).max(0.0)).max(0.0);
    parts.extend([plain("host", host), plain("outside", outside)]);
    let known: f64 = parts.iter().map(|part| part.ms).sum();
    parts.push(plain("unexplained", (case.decode.ms - known).max(0.0)));
    parts
}

/// Estimates of what would help, from the same numbers.
fn advice(case: &Case<'_>, principal: &Cause) -> Vec<Advice> {
    let (ms, weights, n) = (case.decode.ms, case.weights_ms(), case.n_rows);
    let mut list = vec![];
    let mut add = |what: &str, new_ms: f64, estimate: String| {
        if new_ms > 0.0 && new_ms < 0.97 * ms {
            list.push(Advice { what: what.to_string(), tokens_per_second: n * 1e3 / new_ms, estimate });
        }
    };
    let is_fault = !matches!(
        principal.kind,
        CauseKind::Weights | CauseKind::Attention | CauseKind::Overheads | CauseKind::Unknown
    );
    if is_fault {
        add(&principal.remedy, ms - principal.cost_ms, format!("{:.1} ms less", principal.cost_ms));
    }
    let is_read = case.floor.is_some_and(|floor| floor > KERNEL_BOUND * weights);
    if is_read && weights > 0.3 * ms {
        add("memory with twice the bandwidth", ms - weights / 2.0, "half the time of products of weights".to_string());
    }
    if weights > 0.3 * ms {
        if case.record.ranks.len() < 2 {
            let sums = 2.0 * case.record.facts.n_layers as f64 * 0.05;
            let estimate = format!("half of that time, and {sums:.1} ms for sums at 50 us each");
            add("a second machine, --tp 2", ms - weights / 2.0 + sums, estimate);
        }
        let eight_bit: f64 = case.record.facts.kinds.iter().filter(|k| is_wide(k)).map(|k| k.read_bytes as f64).sum();
        if eight_bit > 0.0 {
            let saved = weights * eight_bit / 2.0 / case.weight_bytes.max(1.0);
            let estimate = format!("half of the {} that are wider than 4 bits", bytes(eight_bit as u64));
            add("4 bits for all matrices (`tandem convert`; quality changes)", ms - saved, estimate);
        }
    }
    let ranks = case.record.ranks.len();
    if ranks > 1 && case.record.facts.tensor_size == 1 {
        // A pipeline was planned with a message for each stage.
        let message = case.record.facts.planned_communication_ms / ranks as f64;
        let sums = 2.0 * case.record.facts.n_layers as f64 * message;
        let estimate =
            format!("the work of all ranks at the same time, and {sums:.1} ms for sums as long as a message");
        add(
            &format!("--tp {ranks} instead of a pipeline"),
            ms - case.working * (1.0 - 1.0 / ranks as f64) + sums,
            estimate,
        );
    }
    // A step that verifies a draft reads the experts of two tokens.
    let more = case.bytes_of(n + 1.0) / case.weight_bytes.max(1.0);
    if !is_fault && n < 1.05 && weights > 0.5 * ms {
        let new_ms = (ms + weights * (more - 1.0)) / EXPECTED_OF_A_DRAFT;
        let estimate = format!("half of the drafts right, {:.0} % more bytes a step", 100.0 * (more - 1.0));
        add("drafting (--draft-depth 1, or auto)", new_ms, estimate);
    }
    list.sort_by(|a, b| b.tokens_per_second.total_cmp(&a.tokens_per_second));
    list
}

/// Whether most of a kind's weights have more than about four bits.
fn is_wide(kind: &KindBytes) -> bool {
    let is_matrix = !matches!(kind.kind.as_str(), "norms" | "router" | "embed");
    let narrow = ["mxfp4", "nvfp4", "affine-2", "affine-3", "affine-4", "affine2", "affine3", "affine4"];
    is_matrix && kind.formats.first().is_some_and(|format| !narrow.iter().any(|name| format.starts_with(name)))
}

#[cfg(test)]
#[path = "explain_tests.rs"]
mod tests;
