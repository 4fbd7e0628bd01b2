//! `cargo xtask scaling`: tokens per second, time to first token and cost of GLM-5.1's shape on 1 to 64 machines.
//!
//! A model on paper: constants from archived runs, a formula for each division, and assumptions about load, prices and failures. It
//! measures nothing. docs/scaling.md shows its output; tests compare it with the archived runs.

use std::fmt::Write;

use crate::Result;

const MB: f64 = 1e6;
const US: f64 = 1e-6;

/// GLM-5.1 in MXFP4-Q8, as its layers read it for one token (bench/runs/2026-11-26-cuda-roofline).
struct Model {
    n_layers: f64,
    /// Bytes of one layer for one token at a short context.
    layer: f64,
    /// Of these, what every tensor-parallel rank reads: first projections, router.
    replicated: f64,
    shared_expert: f64,
    /// Of one routed expert.
    expert: f64,
    n_experts: f64,
    n_experts_per_token: u32,
    /// Bytes of one token between layers, f32.
    hidden: f64,
    /// Head, and what the first three layers read more than the others.
    rest: f64,
    /// Of the whole checkpoint.
    weights: f64,
}

const GLM: Model = Model {
    n_layers: 78.0,
    layer: 384.8 * MB,
    replicated: 21.2 * MB,
    shared_expert: 40.1 * MB,
    expert: 20.05 * MB,
    n_experts: 256.0,
    n_experts_per_token: 8,
    hidden: 6144.0 * 4.0,
    rest: 1130.0 * MB,
    weights: 405e9,
};

/// A GPU, seconds and bytes per second.
struct Gpu {
    name: &'static str,
    /// Measured copy bandwidth.
    copy: f64,
    /// What a layer takes beyond its bytes, with one token.
    layer: f64,
}

const H100: Gpu = Gpu { name: "H100", copy: 3.0e12, layer: 49.0 * US };
const H200: Gpu = Gpu { name: "H200", copy: 4.29e12, layer: 73.0 * US };

/// A further token of a step in a layer: its attention, router and choice, with all heads and without any.
const ROW: (f64, f64) = (9.0 * US, 7.0 * US);
/// Scores and selection in a layer, beyond 2048 positions; and for each 1024 positions beyond 4096.
const SELECTION: (f64, f64) = (15.0 * US, 0.286 * US);
/// A sum of one token's activations, for each rank beside the first; the bytes per second of longer ones.
const SUM: (f64, f64) = (3.0 * US, 46e9);
/// The same by NCCL, which prefill uses: latency, and bytes per second between two ranks.
const LONG_SUM: (f64, f64) = (7.0 * US, 284e9);
/// From one stage to the next.
const HOP: f64 = 60.0 * US;
/// The step around the layers.
const STEP: f64 = 17.0 * US;
/// Prefill in a layer on one GPU: bytes of all experts and projections, with the bandwidth that they reach as a share of
/// the copy; time of each token.
const PREFILL: (f64, f64, f64) = (5355.0 * MB, 0.71, 3.68 * US);
/// Loading from page cache, of one rank, bytes per second.
const LOAD: f64 = 19e9;

/// Two cores of Zen 4 (AVX-512 with VNNI; 8-bit or 16-bit activations) on one token: what a layer takes beside reading, and from
/// 2048 positions on scores and selection, at 4096 and for each 1024 more.
const ZEN4: (f64, f64, f64) = (3400.0 * US, 3800.0 * US, 24.0 * US);
/// Prefill there: a token in a layer with AVX-512 and 8-bit activations, with 16-bit ones, and with AVX2 and 8-bit ones.
const ZEN4_PREFILL: (f64, f64, f64) = (2150.0 * US, 3850.0 * US, 4500.0 * US);

/// Seconds of a token through `n_layers` layers on those two cores, whose memory gave `bandwidth` bytes per second meanwhile: other
/// guests change it.
fn on_zen4(n_layers: f64, context: f64, bandwidth: f64) -> f64 {
    let selection = if context > 2048.0 { ZEN4.1 + ZEN4.2 * (context - 4096.0).max(0.0) / 1024.0 } else { 0.0 };
    n_layers * (GLM.layer / bandwidth + ZEN4.0 + selection)
}

/// How one model lies on GPUs.
#[derive(Clone, Copy)]
struct Plan {
    tp: f64,
    ep: f64,
    pp: f64,
}

const fn plan(tp: u32, ep: u32, pp: u32) -> Plan {
    Plan { tp: tp as f64, ep: ep as f64, pp: pp as f64 }
}

impl Plan {
    fn n_ranks(self) -> f64 {
        self.tp * self.ep * self.pp
    }

    fn name(self) -> String {
        let parts = [("tp", self.tp), ("ep", self.ep), ("pp", self.pp)];
        let named: Vec<String> =
            parts.iter().filter(|(_, n)| *n > 1.0).map(|(name, n)| format!("{name} {n}")).collect();
        if named.is_empty() { "one GPU".into() } else { named.join(" x ") }
    }
}

/// Experts that `tokens` tokens choose between them, if all are as likely.
fn distinct_experts(tokens: f64) -> f64 {
    let share = f64::from(GLM.n_experts_per_token) / GLM.n_experts;
    GLM.n_experts * (1.0 - (1.0 - share).powf(tokens))
}

/// Experts on the busiest of `n_ranks` ranks, for one token: the mean of the largest count.
fn busiest(n_ranks: f64) -> f64 {
    let (n, k) = (n_ranks as u32, GLM.n_experts_per_token);
    // P(no rank has more than m): k! times the coefficient of x^k in (sum of x^i / i! for i <= m) ^ n.
    let at_most = |m: u32| {
        let factorial = |i: u32| (1..=i).map(f64::from).product::<f64>();
        let mut ways = vec![0.0; k as usize + 1];
        ways[0] = 1.0;
        for _ in 0..n {
            let mut next = vec![0.0; k as usize + 1];
            for (i, way) in ways.iter().enumerate() {
                (0..=m)
                    .filter(|j| i + *j as usize <= k as usize)
                    .for_each(|j| next[i + j as usize] += way / factorial(j));
            }
            ways = next;
        }
        ways[k as usize] * factorial(k) / f64::from(n).powi(k as i32)
    };
    (0..k).map(|m| 1.0 - at_most(m)).sum()
}

/// Seconds of one layer for a step of `rows` sequences, with `context` tokens each.
fn layer(gpu: &Gpu, plan: Plan, rows: f64, context: f64) -> f64 {
    let routed = f64::from(GLM.n_experts_per_token) * GLM.expert;
    let others = GLM.layer - routed;
    let experts = distinct_experts(rows) * GLM.expert;
    let (bytes, n_sums, ranks) = if plan.ep > 1.0 {
        let busy = (experts / plan.ep).max(busiest(plan.ep) * GLM.expert);
        (others - GLM.shared_expert + GLM.shared_expert / plan.ep + busy, 1.0, plan.ep)
    } else {
        (GLM.replicated + (others - GLM.replicated + experts) / plan.tp, 2.0, plan.tp)
    };
    let sum = (ranks - 1.0) * (SUM.0 + (rows - 1.0) * GLM.hidden / SUM.1);
    // Rows are selected side by side, but each reads its own keys.
    let keys = SELECTION.1 * (context - 4096.0).max(0.0) / 1024.0;
    let selection = if context > 2048.0 { SELECTION.0 + rows * keys } else { 0.0 };
    bytes / gpu.copy + gpu.layer + n_sums * sum + (rows - 1.0) * (ROW.0 / plan.tp + ROW.1) + selection
}

/// Seconds of a step of `rows` sequences through `n_layers` layers and, if `is_whole`, the head: from token to token.
fn step(gpu: &Gpu, plan: Plan, n_layers: f64, rows: f64, context: f64, is_whole: bool) -> f64 {
    // The sequences of a batch are spread over the stages, which work at the same time.
    let rows = (rows / plan.pp).max(1.0);
    let rest = if is_whole { GLM.rest / gpu.copy / plan.tp.max(plan.ep) } else { 0.0 };
    n_layers * layer(gpu, plan, rows, context) + rest + STEP + (plan.pp - 1.0) * HOP
}

/// Tokens per second of `rows` sequences together.
fn decode(gpu: &Gpu, plan: Plan, rows: f64, context: f64) -> f64 {
    rows / step(gpu, plan, GLM.n_layers, rows, context, true)
}

/// Seconds of a prompt of `tokens` tokens in chunks of `chunk` through `n_layers` layers.
fn prefill(gpu: &Gpu, plan: Plan, n_layers: f64, tokens: f64, chunk: f64) -> f64 {
    let ranks = plan.tp * plan.ep;
    let rows = tokens.min(chunk);
    let sums = if ranks > 1.0 {
        2.0 * (LONG_SUM.0 + rows * GLM.hidden * 2.0 * (ranks - 1.0) / ranks / LONG_SUM.1)
    } else {
        0.0
    };
    let layer = (PREFILL.0 / (PREFILL.1 * gpu.copy) + rows * PREFILL.2) / ranks + sums;
    // The chunks follow each other through the stages.
    let n_chunks = (tokens / chunk).max(1.0);
    (n_chunks + plan.pp - 1.0) * layer * n_layers / plan.pp
}

/// Load, prices and failures: nobody measured these here. `cargo xtask scaling NAME=VALUE ...` changes them.
struct Assumptions {
    /// Tokens of a prompt, and of an answer.
    prompt: f64,
    answer: f64,
    /// Share of a prompt that an earlier request had too.
    common: f64,
    /// Answers written at the same time by one replica.
    batch: f64,
    chunk: f64,
    /// Share of its time that a replica is at work.
    load: f64,
    /// Price of one GPU for an hour.
    price: f64,
    n_gpus_per_machine: f64,
    /// Hours of one GPU between two failures.
    hours_between_failures: f64,
    /// Seconds until a lost rank is noticed (0.7 of --deadline), and until a lost machine is replaced and has read its files.
    noticed: f64,
    replaced: f64,
    /// Share of failures that need another machine.
    hard: f64,
}

impl Assumptions {
    fn parse(words: &[&str]) -> Result<Assumptions> {
        let mut found = Assumptions {
            prompt: 4096.0,
            answer: 512.0,
            common: 0.7,
            batch: 32.0,
            chunk: 512.0,
            load: 0.7,
            price: 3.0,
            n_gpus_per_machine: 4.0,
            hours_between_failures: 50_000.0,
            noticed: 7.0,
            replaced: 600.0,
            hard: 0.5,
        };
        for word in words {
            let wrong = || {
                let names = found.list().map(|(name, _)| name).join(", ");
                format!("expected NAME=VALUE with a positive number and one of {names}; found {word:?}")
            };
            let (name, value) = word.split_once('=').ok_or_else(wrong)?;
            let value: f64 = value.parse().ok().filter(|v: &f64| v.is_finite() && *v > 0.0).ok_or_else(wrong)?;
            let error = wrong();
            *found.place(name).ok_or(error)? = value;
        }
        for (name, share) in [("common", found.common), ("load", found.load), ("hard", found.hard)] {
            if share >= 1.0 {
                return Err(format!("{name} is a share: expected less than 1, found {share}"));
            }
        }
        Ok(found)
    }

    fn place(&mut self, name: &str) -> Option<&mut f64> {
        Some(match name {
            "prompt" => &mut self.prompt,
            "answer" => &mut self.answer,
            "common" => &mut self.common,
            "batch" => &mut self.batch,
            "chunk" => &mut self.chunk,
            "load" => &mut self.load,
            "price" => &mut self.price,
            "gpus" => &mut self.n_gpus_per_machine,
            "failures" => &mut self.hours_between_failures,
            "noticed" => &mut self.noticed,
            "replaced" => &mut self.replaced,
            "hard" => &mut self.hard,
            _ => return None,
        })
    }

    fn list(&self) -> [(&'static str, f64); 12] {
        [
            ("prompt", self.prompt),
            ("answer", self.answer),
            ("common", self.common),
            ("batch", self.batch),
            ("chunk", self.chunk),
            ("load", self.load),
            ("price", self.price),
            ("gpus", self.n_gpus_per_machine),
            ("failures", self.hours_between_failures),
            ("noticed", self.noticed),
            ("replaced", self.replaced),
            ("hard", self.hard),
        ]
    }
}

/// Replicas of one plan, as a whole.
struct Fleet {
    tokens_per_second: f64,
    first_token: f64,
    price_per_million: f64,
    failures_per_month: f64,
    lost_per_month: f64,
    /// Share of the time in which a replica is not down.
    available: f64,
}

fn fleet(gpu: &Gpu, plan: Plan, n_replicas: f64, is_prefix_aware: bool, a: &Assumptions) -> Fleet {
    // Without a picker a conversation's next request meets its replica by chance.
    let found = if is_prefix_aware { 1.0 } else { 1.0 / n_replicas };
    let prompt = a.prompt * (1.0 - a.common * found);
    let prefill = prefill(gpu, plan, GLM.n_layers, prompt, a.chunk);
    let step = step(gpu, plan, GLM.n_layers, a.batch, a.prompt + a.answer, true);
    let work = prefill + a.answer * step / a.batch;
    // Each failure costs a replica the time to notice and load, or to get another machine.
    let loading = a.noticed + GLM.weights / plan.n_ranks() / LOAD;
    let down = loading + a.hard * a.replaced;
    let failures_per_second = plan.n_ranks() / (a.hours_between_failures * 3600.0);
    let available = 1.0 / (1.0 + failures_per_second * down);
    let tokens_per_second = n_replicas * available * a.load * a.answer / work;
    let failures_per_month = n_replicas * failures_per_second * 30.0 * 86400.0;
    Fleet {
        tokens_per_second,
        // A single server with Poisson arrivals: half of a job in progress, and those before it.
        first_token: prefill * (1.0 + a.load / (2.0 * (1.0 - a.load))) + step,
        price_per_million: n_replicas * plan.n_ranks() * a.price / 3600.0 / tokens_per_second * 1e6,
        failures_per_month,
        lost_per_month: failures_per_month * a.batch * a.load,
        available,
    }
}

/// A measured figure, and what the formulas give for it.
struct Check {
    what: String,
    unit: &'static str,
    measured: f64,
    predicted: f64,
    /// The file of the figure, and its words there; `None`: the first run on four H200, which was not archived.
    source: Option<(&'static str, &'static str)>,
    /// Whether a constant above was fitted to it.
    is_fitted: bool,
}

fn checks() -> Vec<Check> {
    const FIRST: &str = "2026-11-23-cuda-h100";
    const LATER: &str = "2026-11-26-h100";
    const ROOFLINE: &str = "2026-11-26-cuda-roofline";
    const TILES: &str = "2026-11-23-cpu-tiles";
    const AVX2: &str = "2026-11-26-cpu-avx2";
    let one = plan(1, 1, 1);
    let layers = |gpu: &Gpu, plan, n: f64, rows, context| step(gpu, plan, n, rows, context, false);
    let each = |gpu: &Gpu, plan, context| layer(gpu, plan, 1.0, context) * 1e3;
    let ms = |what: &str, predicted: f64, measured, source, is_fitted| Check {
        what: what.into(),
        unit: "ms",
        measured,
        predicted,
        source: Some(source),
        is_fitted,
    };
    let rate = |what: &str, predicted: f64, measured, source, is_fitted| Check {
        what: what.into(),
        unit: "tok/s",
        measured,
        predicted,
        source: Some(source),
        is_fitted,
    };
    let six = "H100, 6 layers";
    let mut checks = vec![
        ms(
            &format!("{six}, context 512"),
            layers(&H100, one, 6.0, 1.0, 512.0) * 1e3,
            1.0794,
            (LATER, "1.0794 ms"),
            true,
        ),
        ms(
            &format!("{six}, context 4096"),
            layers(&H100, one, 6.0, 1.0, 4096.0) * 1e3,
            1.1797,
            (LATER, "1.1797 ms"),
            false,
        ),
        rate(
            &format!("{six}, batch 8"),
            8.0 / layers(&H100, one, 6.0, 8.0, 512.0),
            2077.0,
            (FIRST, "2,077 / 3,160"),
            true,
        ),
        rate(
            &format!("{six}, batch 32"),
            32.0 / layers(&H100, one, 6.0, 32.0, 512.0),
            3160.0,
            (FIRST, "2,077 / 3,160"),
            true,
        ),
        ms(
            "H100, 4 layers, context 4k",
            layers(&H100, one, 4.0, 1.0, 4096.0) * 1e3,
            0.810,
            (FIRST, "0.952 / 0.810 ms"),
            false,
        ),
        ms(
            "H100, 4 layers, context 128k",
            layers(&H100, one, 4.0, 1.0, 131072.0) * 1e3,
            0.952,
            (FIRST, "0.952 / 0.810 ms"),
            true,
        ),
        rate(
            "H100, 10 layers, prefill in chunks of 512",
            512.0 / prefill(&H100, one, 10.0, 512.0, 512.0),
            11642.0,
            (LATER, "11,642 tok/s"),
            true,
        ),
        rate(
            "H100, 10 layers, prefill in chunks of 4096",
            4096.0 / prefill(&H100, one, 10.0, 4096.0, 4096.0),
            23243.0,
            (LATER, "23,243 tok/s"),
            true,
        ),
        ms("H200, a layer at 512", each(&H200, one, 512.0), 0.163, (FIRST, "0.163 / 0.178 ms"), true),
        ms("H200, a layer at 4096", each(&H200, one, 4096.0), 0.178, (FIRST, "0.163 / 0.178 ms"), true),
        ms(
            "2 H200, tp 2, a layer at 512",
            each(&H200, plan(2, 1, 1), 512.0),
            0.122,
            (FIRST, "0.122 / 0.135 ms"),
            false,
        ),
        ms(
            "2 H200, tp 2, a layer at 4096",
            each(&H200, plan(2, 1, 1), 4096.0),
            0.135,
            (FIRST, "0.122 / 0.135 ms"),
            false,
        ),
        ms(
            "2 H200, ep 2, a layer at 512",
            each(&H200, plan(1, 2, 1), 512.0),
            0.153,
            (FIRST, "0.153 / 0.167 ms"),
            false,
        ),
        ms(
            "2 H200, ep 2, a layer at 4096",
            each(&H200, plan(1, 2, 1), 4096.0),
            0.167,
            (FIRST, "0.153 / 0.167 ms"),
            false,
        ),
        ms(
            "2 H200, pp 2, 12 layers",
            layers(&H200, plan(1, 1, 2), 12.0, 1.0, 512.0) * 1e3,
            2.048,
            (FIRST, "2.048 ms"),
            true,
        ),
        ms(
            "2 H200, pp 2, 50 layers",
            layers(&H200, plan(1, 1, 2), 50.0, 1.0, 512.0) * 1e3,
            8.36,
            (FIRST, "8.36 ms"),
            false,
        ),
        ms("4 H200, tp 4, a layer at 512", each(&H200, plan(4, 1, 1), 512.0), 0.117, (ROOFLINE, "| 99 | 117 |"), true),
    ];
    for (measured, quote) in [(18.8, "18.8 GB/s, 35 % of 54"), (21.0, "21.0 GB/s")] {
        let run = if measured > 20.0 { LATER } else { FIRST };
        let what = "H100, loading from page cache".into();
        checks.push(Check {
            what,
            unit: "GB/s",
            measured,
            predicted: LOAD / 1e9,
            source: Some((run, quote)),
            is_fitted: true,
        });
    }
    // Bandwidth of the moment: as it was noted, or the bytes of the layers over the time and its share.
    let share = |n_layers: f64, ms: f64, percent: f64| n_layers * GLM.layer / (ms * 1e-3) / (percent / 100.0);
    for (what, n, context, bandwidth, measured, run, quote, is_fitted) in [
        ("int8, 2 layers", 2.0, 512.0, share(2.0, 32.6, 80.0), 32.6, TILES, "80 % of the moment", true),
        ("bf16, 2 layers", 2.0, 512.0, share(2.0, 29.6, 78.0), 29.6, TILES, "78 % of the moment", true),
        ("bf16, 2 layers, 4k", 2.0, 4096.0, 33.1e9, 38.3, TILES, "45.6 / 38.3 ms", true),
        ("bf16, 2 layers, 128k", 2.0, 131_072.0, 32.6e9, 45.6, TILES, "45.6 / 38.3 ms", true),
        ("int8, a layer", 1.0, 512.0, 62.5e9, 10.2, AVX2, "60 to 65 GB/s | 12.5 to 14.5 ms | 10.2 ms", false),
        ("bf16, a layer", 1.0, 512.0, 58.5e9, 11.5, AVX2, "52 to 65 GB/s | 12.5 to 14.5 ms | 11.5 ms", false),
        ("AVX2, int8, a layer", 1.0, 512.0, 34e9, 14.5, AVX2, "14.5 ms | 79.5 % (34 GB/s)", false),
        ("AVX2, bf16, a layer", 1.0, 512.0, 34.5e9, 14.4, AVX2, "14.4 ms | 79.7 % (34 to 35 GB/s)", false),
    ] {
        let at = format!("2 cores at {:.0} GB/s, {what}", bandwidth / 1e9);
        checks.push(ms(&at, on_zen4(n, context, bandwidth) * 1e3, measured, (run, quote), is_fitted));
    }
    for (what, n, seconds, measured, run, quote, is_fitted) in [
        ("int8, 256 tokens, 2 layers", 2.0, ZEN4_PREFILL.0, 221.0, TILES, "256 tokens, int8 | 221 tok/s", true),
        ("int8, 512 tokens, 2 layers", 2.0, ZEN4_PREFILL.0, 216.0, TILES, "512 tokens, int8 | 216 tok/s", false),
        ("bf16, 256 tokens, 2 layers", 2.0, ZEN4_PREFILL.1, 129.0, TILES, "bf16 | 129 and 124 tok/s", true),
        ("bf16, 512 tokens, 2 layers", 2.0, ZEN4_PREFILL.1, 124.0, TILES, "bf16 | 129 and 124 tok/s", false),
        ("int8, 256 tokens, a layer", 1.0, ZEN4_PREFILL.0, 494.0, AVX2, "494 tokens/s", false),
        ("int8, the same later", 1.0, ZEN4_PREFILL.0, 485.0, AVX2, "485 tokens/s", false),
        ("bf16, 256 tokens, a layer", 1.0, ZEN4_PREFILL.1, 268.0, AVX2, "268 tokens/s", false),
        ("AVX2, int8, 256 tokens, a layer", 1.0, ZEN4_PREFILL.2, 237.0, AVX2, "237 tokens/s", true),
        ("AVX2, the same later", 1.0, ZEN4_PREFILL.2, 205.0, AVX2, "205 tokens/s", false),
    ] {
        checks.push(rate(&format!("2 cores, prefill, {what}"), 1.0 / (n * seconds), measured, (run, quote), is_fitted));
    }
    for (what, plan, rows, context, measured, is_fitted) in [
        ("tp 4, context 1k", plan(4, 1, 1), 1.0, 1024.0, 109.9, false),
        ("tp 4, context 8k", plan(4, 1, 1), 1.0, 8192.0, 87.9, false),
        ("tp 4, context 64k", plan(4, 1, 1), 1.0, 65536.0, 83.5, false),
        ("ep 4", plan(1, 4, 1), 1.0, 1024.0, 101.6, false),
        ("tp 2 x pp 2", plan(2, 1, 2), 1.0, 1024.0, 99.6, false),
        ("pp 4", plan(1, 1, 4), 1.0, 1024.0, 74.8, false),
        ("tp 4, batch 8", plan(4, 1, 1), 8.0, 1024.0, 386.0, true),
        ("tp 4, batch 32", plan(4, 1, 1), 32.0, 1024.0, 592.0, true),
    ] {
        let what = format!("4 H200, all 78 layers, {what}");
        checks.push(Check {
            what,
            unit: "tok/s",
            measured,
            predicted: decode(&H200, plan, rows, context),
            source: None,
            is_fitted,
        });
    }
    checks
}

/// Three digits, as people read them.
fn short(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

/// What `cargo xtask scaling NAME=VALUE ...` prints: tables in Markdown.
///
/// # Errors
/// A word is no assumption with a value.
pub(crate) fn scaling(words: &[&str]) -> Result<String> {
    let a = Assumptions::parse(words)?;
    let mut text = String::new();
    let mut line = |words: std::fmt::Arguments| writeln!(text, "{words}").expect("a string takes everything");
    line(format_args!("Measured, and by the formulas (* : a constant was fitted to it)\n"));
    line(format_args!("| | measured | predicted | ratio | off | run |\n|---|---|---|---|---|---|"));
    for Check { what, unit, measured, predicted, source, is_fitted } in checks() {
        let star = if is_fitted { " *" } else { "" };
        let ratio = predicted / measured;
        let off = 100.0 * (ratio - 1.0);
        let run = source.map_or("-", |(run, _)| run);
        let (measured, predicted) = (short(measured), short(predicted));
        line(format_args!("| {what} | {measured} {unit} | {predicted}{star} | {ratio:.2} | {off:+.0} % | {run} |"));
    }
    line(format_args!("\nOne replica on {}s, tokens per second\n", H200.name));
    line(format_args!("| | GPUs | 1 stream, 1k | 64k | 8 streams, 1k | 32 | prompt of 4096 in chunks of 512, s |"));
    line(format_args!("|---|---|---|---|---|---|---|"));
    for p in [plan(4, 1, 1), plan(1, 4, 1), plan(2, 1, 2), plan(1, 1, 4), plan(8, 1, 1), plan(4, 1, 2)] {
        let rate = |rows, context| short(decode(&H200, p, rows, context));
        let prompt = short(prefill(&H200, p, GLM.n_layers, 4096.0, 512.0));
        let (name, n) = (p.name(), p.n_ranks());
        let rates = [rate(1.0, 1024.0), rate(1.0, 65536.0), rate(8.0, 1024.0), rate(32.0, 1024.0)].join(" | ");
        line(format_args!("| {name} | {n} | {rates} | {prompt} |"));
    }
    let list: Vec<String> = a.list().iter().map(|(name, value)| format!("{name}={value}")).collect();
    line(format_args!("\nMachines of {} {}s; {}\n", a.n_gpus_per_machine, H200.name, list.join(" ")));
    line(format_args!(
        "| machines | a replica | replicas | routing | tok/s | first token, s | $ per million tokens | failures a month | \
         requests lost | a replica is down, s a month |"
    ));
    line(format_args!("|---|---|---|---|---|---|---|---|---|---|"));
    for n_machines in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0] {
        for n_stages in [1.0, 2.0] {
            let n_replicas = n_machines / n_stages;
            if n_replicas < 1.0 {
                continue;
            }
            let p = Plan { tp: a.n_gpus_per_machine, ep: 1.0, pp: n_stages };
            for is_prefix_aware in [false, true] {
                if n_replicas == 1.0 && !is_prefix_aware {
                    continue;
                }
                let f = fleet(&H200, p, n_replicas, is_prefix_aware, &a);
                let routing = match (n_replicas == 1.0, is_prefix_aware) {
                    (true, _) => "-",
                    (_, true) => "prefix",
                    _ => "random",
                };
                line(format_args!(
                    "| {n_machines} | {} | {n_replicas} | {routing} | {} | {} | {} | {} | {} | {} |",
                    p.name(),
                    short(f.tokens_per_second),
                    short(f.first_token),
                    short(f.price_per_million),
                    short(f.failures_per_month),
                    short(f.lost_per_month),
                    short(30.0 * 86400.0 * (1.0 - f.available))
                ));
            }
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root;

    fn read(path: &str) -> String {
        std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    #[test]
    fn predictions_are_within_a_fifth_of_what_was_measured() {
        let checks = checks();
        assert!(checks.iter().filter(|check| !check.is_fitted).count() >= 12);
        for Check { what, measured, predicted, source, .. } in checks {
            let off = (predicted / measured - 1.0).abs();
            assert!(off <= 0.2, "{what}: {predicted} where {measured} was measured");
            if let Some((run, quote)) = source {
                assert!(read(&format!("bench/runs/{run}/README.md")).contains(quote), "{run} does not say {quote:?}");
            }
        }
    }

    #[test]
    fn the_page_shows_what_is_printed() {
        let page = read("docs/scaling.md");
        let text = scaling(&[]).expect("the defaults are right");
        assert!(page.contains(&text), "put the output of `cargo xtask scaling` into docs/scaling.md:\n{text}");
    }

    #[test]
    fn experts_are_counted() {
        assert!((distinct_experts(8.0) - 57.4).abs() < 0.1 && (distinct_experts(32.0) - 163.3).abs() < 0.1);
        // Of 8 coins the larger side has 4 to 8: 5.09 in the mean.
        assert!((busiest(2.0) - 5.09).abs() < 0.01);
        assert!((busiest(1.0) - 8.0).abs() < 1e-9);
    }

    #[test]
    fn assumptions_are_read_and_refused() {
        let price = |text: String| text.lines().last().expect("lines").to_owned();
        assert_ne!(price(scaling(&["price=6"]).expect("known")), price(scaling(&[]).expect("known")));
        for bad in ["price", "prize=1", "price=x", "price=-1", "price=inf", "load=1", "common=2"] {
            assert!(scaling(&[bad]).expect_err(bad).contains("expected"), "{bad}");
        }
    }

    #[test]
    fn more_of_something_costs_or_gives_more() {
        let a = Assumptions::parse(&[]).expect("defaults");
        let p = plan(4, 1, 1);
        let of = |n, aware| fleet(&H200, p, n, aware, &a);
        assert!(of(8.0, true).tokens_per_second > of(8.0, false).tokens_per_second);
        assert!((of(8.0, true).tokens_per_second / of(1.0, true).tokens_per_second - 8.0).abs() < 1e-9);
        assert!(of(8.0, false).first_token > of(2.0, false).first_token);
        let often = Assumptions::parse(&["failures=100"]).expect("known");
        assert!(fleet(&H200, p, 8.0, true, &often).price_per_million > of(8.0, true).price_per_million);
    }
}
