//! `tandem bench`: speed, and how far it is from what the memory allows.
//!
//! The headline figures come from unprofiled steps; a second, shorter run of the same model with a stopwatch around every
//! operation gives the breakdown. Every decode step runs at the same position with other tokens, so that all steps see
//! exactly the context asked for.

pub(crate) mod comm;
mod matrix;
mod serve;

use std::time::Instant;

use anyhow::{bail, ensure};
use serde_json::{Map, Value, json};
use tandem_cpu::bandwidth::ReadMeter;
use tandem_engine::{EXACT_ROWS, Operation};

use crate::cli::{BenchArgs, BenchCommand, BenchDecodeArgs, BenchPrefillArgs, OutputArgs};
use tandem_model::Limits;
use tandem_runtime::ModelOptions;
use tandem_runtime::diagnosis::timing_overhead;
use tandem_runtime::measured::workload::{PROFILED_STEPS, Random, Sequences, Spread, experts_per_layer};
use tandem_runtime::measured::{
    BytesRead, MeasuredModel, MeasuredOptions, RankReport, bandwidth_before, by_stage, drafts, plot, prefill_flop,
    times_ahead,
};
use tandem_runtime::ranks::Joined;
use tandem_runtime::units::{bytes, count};

use crate::news::on_terminal;
use crate::report::print_json;

/// Read between two steps, for the bandwidth of that moment.
const PASS_BYTES: usize = 256 << 20;

const DECODE_COLUMNS: [&str; 8] = [
    "context",
    "batch",
    "decode_ms_median",
    "decode_ms_p10",
    "decode_ms_p90",
    "tokens_per_second",
    "achieved_gb_per_s",
    "bandwidth_fraction",
];
const PREFILL_COLUMNS: [&str; 8] = [
    "context",
    "prompt_tokens",
    "prefill_chunk",
    "prefill_ms_median",
    "prefill_ms_p10",
    "prefill_ms_p90",
    "tokens_per_second",
    "achieved_gflop_per_s",
];

/// Prints figures under their JSON names if a table is asked for; true if so.
fn print_table(output: OutputArgs, rows: &[Map<String, Value>], columns: &[&str]) -> bool {
    let (start, between, end) = match (output.markdown, output.csv) {
        (true, _) => ("| ", " | ", " |"),
        (_, true) => ("", ",", ""),
        _ => return false,
    };
    let line = |cells: Vec<String>| println!("{start}{}{end}", cells.join(between));
    line(columns.iter().map(|name| name.to_string()).collect());
    if output.markdown {
        line(vec!["---:".to_owned(); columns.len()]);
    }
    let cell = |value: Option<&Value>| match value {
        Some(Value::Number(number)) if number.is_u64() => number.to_string(),
        Some(Value::Number(number)) => format!("{:.3}", number.as_f64().unwrap_or(0.0)),
        // Not set, or nothing was measured.
        _ => String::new(),
    };
    rows.iter().for_each(|row| line(columns.iter().map(|name| cell(row.get(*name))).collect()));
    true
}

/// Adds the only row itself, or a list of several.
fn insert_rows(report: &mut Map<String, Value>, mut rows: Vec<Map<String, Value>>) {
    match &mut rows[..] {
        [row] => report.append(row),
        _ => drop(report.insert("sweep".into(), json!(rows))),
    }
}

/// Runs the command.
pub(crate) fn bench(args: &BenchArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    match &args.command {
        BenchCommand::Decode(args) => decode(args, joined),
        BenchCommand::Prefill(args) => prefill(args, joined),
        BenchCommand::Serve(args) => serve::serve(args),
        BenchCommand::Comm(args) => comm::comm(args, joined),
        BenchCommand::Matrix(args) => matrix::matrix(args),
        BenchCommand::Timings(args) => {
            let cost = timing_overhead(&ModelOptions::from(&args.model), args.pairs, &mut on_terminal())?;
            print_json(&json!({ "command": "timings", "overhead": cost }))
        }
    }
}

fn decode(args: &BenchDecodeArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    let longest = args.context.iter().copied().max().unwrap_or(0);
    let largest = args.batch.iter().copied().max().unwrap_or(1);
    let options = MeasuredOptions::from(&args.model);
    let bandwidth_before = bandwidth_alone(&options, joined.as_ref())?;
    let n_rows = 1 + args.draft_depth;
    ensure!(
        args.draft_depth == 0 || largest * n_rows <= EXACT_ROWS,
        "--batch {largest} with --draft-depth {} is {} rows; a step that verifies drafts has at most {EXACT_ROWS}",
        args.draft_depth,
        largest * n_rows
    );
    let length = longest + n_rows;
    let sequences = Sequences::new(largest, length);
    let limits = Limits { max_rows: largest * n_rows, max_logits_rows: largest * n_rows };
    let mut model = MeasuredModel::load(&options, limits, length, sequences.n_slots(), joined, &mut on_terminal())?;
    fill_cache(&mut model, if longest > 0 { sequences.n_slots() } else { 0 })?;

    // A processor's memory is shared with others and changes speed; a device's does not. Of ranks it is
    // measured once.
    let pool = model.runner.pool();
    let meter = pool.as_deref().map(|pool| ReadMeter::new(pool, PASS_BYTES));
    let mut points = vec![];
    for context in &args.context {
        for batch in &args.batch {
            let point = decode_point(&mut model, meter.as_ref(), &sequences.first(*batch), *context, args)?;
            eprintln!(
                "context {context}, batch {batch}: {:.2} ms per step, {:.2} tokens/s",
                point.ms.median, point.tokens_per_second
            );
            points.push(point);
        }
    }
    model.note_peak_memory(if meter.is_some() { PASS_BYTES } else { 0 });
    drop(meter);
    let measured = bandwidth_before.max(model.runner.bandwidth());

    let mut report = model.describe();
    report.insert("command".into(), json!("decode"));
    report.insert("steps".into(), json!(args.steps));
    report.insert("measured_bandwidth_gb_per_s".into(), json!(measured / 1e9));
    let results: Vec<Map<String, Value>> = points.iter().map(|p| p.json(measured)).collect();
    let is_table = print_table(args.model.output, &results, &DECODE_COLUMNS);
    insert_rows(&mut report, results);
    if let Some(file) = &args.model.plot {
        // One curve: that of the first batch.
        let curve = points.iter().filter(|p| p.batch == args.batch[0]);
        let curve: Vec<(f64, f64)> = curve.map(|p| (p.context as f64, p.tokens_per_second)).collect();
        let name = |p: &DecodePoint| match args.batch.len() {
            1 => format!("{} tokens", p.context),
            _ => format!("{} tokens, batch {}", p.context, p.batch),
        };
        let bars: Vec<(String, Vec<(&str, f64)>)> =
            points.iter().map(|p| (name(p), p.breakdown.rows.clone())).collect();
        plot::draw(file, &model.title, &curve, &bars)?;
    }
    if args.model.output.json {
        print_json(&report)?;
    } else if !is_table {
        print_model(&model);
        for point in &points {
            point.print(measured);
        }
    }
    for point in &points {
        let fraction = point.bytes_per_second() / measured;
        if fraction > 1.0 {
            bail!(
                "decoding at context {}, batch {} reads {:.1} GB/s, more than the {:.1} GB/s that this machine was measured to \
                 deliver, so the measurement is wrong: something else kept the memory busy while bandwidth was \
                 measured, or the weights ({} per step) stay in the processor's cache. Close other programs and run \
                 again, or measure a larger model",
                point.context,
                point.batch,
                point.bytes_per_second() / 1e9,
                measured / 1e9,
                bytes(point.bytes.total() as u64)
            );
        }
    }
    Ok(())
}

/// Bytes per second before the model is loaded, where nothing else runs; 0 where the device or the ranks measure.
fn bandwidth_alone(options: &MeasuredOptions, joined: Option<&Joined>) -> anyhow::Result<f64> {
    if joined.is_some() {
        return Ok(0.0);
    }
    let bandwidth = bandwidth_before(&options.device)?;
    if bandwidth > 0.0 {
        eprintln!("read bandwidth: {:.2} GB/s", bandwidth / 1e9);
    }
    Ok(bandwidth)
}

/// Puts random vectors into the first `n_slots` slots of the cache.
fn fill_cache(model: &mut MeasuredModel, n_slots: usize) -> anyhow::Result<()> {
    let start = Instant::now();
    model.fill_cache(n_slots)?;
    eprintln!("cache filled with {n_slots} random vectors per layer in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// The model and its device, for people.
fn print_model(model: &MeasuredModel) {
    println!("{}; {}", model.title, model.runner.name());
    println!(
        "{} parameters active per token, weights {}, peak memory {}",
        count(model.accounting.total(|k| k.active_parameters)),
        bytes(model.resident_bytes),
        bytes(model.peak_memory_bytes)
    );
}

/// Decoding at one context.
struct DecodePoint {
    context: usize,
    batch: usize,
    ms: Spread,
    tokens_per_second: f64,
    bytes: BytesRead,
    /// For each step: its rate over the better of the reads just before and after it. Shared machines change speed from
    /// second to second, and this follows.
    fraction_of_moment: Spread,
    /// Where the indexer selects from more positions than it may keep, in 8 bits: the share of f32's selection that it makes,
    /// for random vectors.
    index_agreement: Option<f64>,
    breakdown: Breakdown,
    ranks: RankTotals,
    /// With `--draft-depth`.
    verified: Vec<drafts::Verified>,
}

fn decode_point(
    model: &mut MeasuredModel,
    meter: Option<&ReadMeter<'_>>,
    sequences: &Sequences,
    context: usize,
    args: &BenchDecodeArgs,
) -> anyhow::Result<DecodePoint> {
    let mut random = Random::new(context as u64);
    let vocab_size = model.config.vocab_size;
    let mut logits = vec![];
    let mut step = |model: &mut MeasuredModel| -> anyhow::Result<f64> {
        let batch = sequences.decode_batch(context, &mut random, vocab_size);
        logits.clear();
        let start = Instant::now();
        model.runner.step(batch, &mut logits)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        ensure!(logits.iter().all(|l| l.is_finite()), "the model's logits are not finite; its weights are damaged");
        Ok(ms)
    };
    let samples = sequences.len() <= EXACT_ROWS && model.runner.device_sampler().is_some();
    for _ in 0..args.warmup {
        step(model)?;
    }
    let (mut times, mut around) = (vec![], vec![]);
    let pass = |model: &MeasuredModel| meter.map_or_else(|| model.runner.bandwidth(), ReadMeter::pass);
    let mut before = pass(model);
    model.runner.start(false)?;
    match model.runner.device_sampler().filter(|_| samples) {
        Some(sampler) => {
            let mut random = Random::new(context as u64);
            let batch = || sequences.decode_batch(context, &mut random, vocab_size);
            times = times_ahead(sampler, args.warmup, args.steps, batch)?;
            around = vec![before; times.len()];
        }
        None => {
            for _ in 0..args.steps {
                times.push(step(model)?);
                let after = pass(model);
                around.push(before.max(after));
                before = after;
            }
        }
    }
    let ranks = RankTotals::new(&model.runner.stop()?, times.iter().sum(), times.len(), model);
    let n_profiled = args.steps.min(PROFILED_STEPS);
    model.runner.start(true)?;
    let mut profiled_ms = 0.0;
    for _ in 0..n_profiled {
        profiled_ms += step(model)?;
    }
    let reports = model.runner.stop()?;
    let bytes = BytesRead::of_decode_step(model, context + 1, sequences.len(), experts_per_layer(&reports));
    let fractions = times.iter().zip(&around).map(|(ms, rate)| bytes.total() / (ms / 1e3) / rate).collect();
    let ms = Spread::of(times);
    let index_agreement = match &model.config.indexer {
        Some(i) if context > i.index_topk => {
            model.runner.index_agreement(i.index_n_heads, i.index_head_dim, context, i.index_topk)
        }
        _ => None,
    };
    let (steps, warmup, force_acceptance) = (args.steps, args.warmup, &args.force_acceptance[..]);
    let (depth, expert_overlap) = (args.draft_depth, args.expert_overlap);
    let case = drafts::DraftCase { context, depth, steps, warmup, expert_overlap, force_acceptance };
    let verified = drafts::verified(model, sequences, &case)?;
    Ok(DecodePoint {
        verified,
        context,
        batch: sequences.len(),
        tokens_per_second: sequences.len() as f64 * 1e3 / ms.median,
        bytes,
        fraction_of_moment: Spread::of(fractions),
        index_agreement,
        breakdown: Breakdown::new(&reports, profiled_ms, n_profiled),
        ms,
        ranks,
    })
}

impl DecodePoint {
    fn bytes_per_second(&self) -> f64 {
        self.bytes.total() / (self.ms.median / 1e3)
    }

    fn json(&self, measured: f64) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("context".into(), json!(self.context));
        map.insert("batch".into(), json!(self.batch));
        map.insert("decode_ms_median".into(), json!(self.ms.median));
        map.insert("decode_ms_p10".into(), json!(self.ms.p10));
        map.insert("decode_ms_p90".into(), json!(self.ms.p90));
        map.insert("tokens_per_second".into(), json!(self.tokens_per_second));
        map.insert("bytes_per_step".into(), json!(self.bytes.total().round() as u64));
        map.insert("bytes_per_token".into(), self.bytes.json(self.batch));
        map.insert("experts_read_per_layer".into(), json!(self.bytes.experts_per_layer));
        map.insert("achieved_gb_per_s".into(), json!(self.bytes_per_second() / 1e9));
        map.insert("bandwidth_fraction".into(), json!(self.bytes_per_second() / measured));
        map.insert("bandwidth_fraction_of_moment_median".into(), json!(self.fraction_of_moment.median));
        map.insert("bandwidth_fraction_of_moment_p10".into(), json!(self.fraction_of_moment.p10));
        map.insert("bandwidth_fraction_of_moment_p90".into(), json!(self.fraction_of_moment.p90));
        if let Some(share) = self.index_agreement {
            map.insert("index_agreement_with_f32".into(), json!(share));
        }
        if !self.verified.is_empty() {
            map.insert("verified".into(), drafts::json(&self.verified));
        }
        self.ranks.insert_json(&mut map);
        self.breakdown.insert_json(&mut map);
        map
    }

    fn print(&self, measured: f64) {
        println!();
        println!("decode at context {}, batch {}", self.context, self.batch);
        println!(
            "  {:.2} ms per step (median; p10 {:.2}, p90 {:.2}), {:.2} tokens/s",
            self.ms.median, self.ms.p10, self.ms.p90, self.tokens_per_second
        );
        println!(
            "  {} per step at {:.2} GB/s of {:.2} GB/s measured: {:.1} %",
            bytes(self.bytes.total() as u64),
            self.bytes_per_second() / 1e9,
            measured / 1e9,
            100.0 * self.bytes_per_second() / measured
        );
        println!(
            "  each step against the reads just before and after it: {:.1} % (median; p10 {:.1}, p90 {:.1})",
            100.0 * self.fraction_of_moment.median,
            100.0 * self.fraction_of_moment.p10,
            100.0 * self.fraction_of_moment.p90
        );
        if let Some(share) = self.index_agreement {
            println!("  the 8-bit indexer selects {:.2} % of what f32 selects (random vectors)", 100.0 * share);
        }
        println!("  bytes per step");
        for (name, n) in &self.bytes.kinds {
            println!("    {name:<24}{:>12}{:>8.1} %", bytes(*n as u64), 100.0 * n / self.bytes.total());
        }
        drafts::lines(&self.verified).iter().for_each(|line| println!("{line}"));
        self.ranks.print();
        self.breakdown.print();
    }
}

fn prefill(args: &BenchPrefillArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    let mut cases = vec![];
    for context in &args.context {
        for prompt_tokens in &args.prompt_tokens {
            let chunks = args.prefill_chunk.iter().map(|chunk| *chunk.min(prompt_tokens));
            cases.extend(chunks.map(|chunk| PrefillCase { context: *context, prompt_tokens: *prompt_tokens, chunk }));
        }
    }
    let longest = cases.iter().map(PrefillCase::length).max().unwrap_or(1);
    let largest = cases.iter().map(|case| case.chunk).max().unwrap_or(1);
    let options = MeasuredOptions::from(&args.model);
    let before = bandwidth_alone(&options, joined.as_ref())?;
    let sequences = Sequences::new(1, longest);
    let limits = Limits { max_rows: largest, max_logits_rows: 1 };
    let mut model = MeasuredModel::load(&options, limits, longest, sequences.n_slots(), joined, &mut on_terminal())?;
    let mut points = vec![];
    for case in cases {
        // The prompt of the last case has overwritten the context of this one.
        fill_cache(&mut model, case.context)?;
        points.push(prefill_point(&mut model, &sequences, case, args)?);
    }
    model.note_peak_memory(0);
    let measured = if before > 0.0 { before } else { model.runner.bandwidth() };
    if let Some(file) = &args.model.plot {
        let name = |case: &PrefillCase| match args.context[..] {
            [0] => format!("{} tokens in chunks of {}", case.prompt_tokens, case.chunk),
            _ => format!("{} tokens in chunks of {} after {}", case.prompt_tokens, case.chunk, case.context),
        };
        let bars: Vec<_> = points.iter().map(|point| (name(&point.case), point.breakdown.rows.clone())).collect();
        plot::draw(file, &model.title, &[], &bars)?;
    }
    let rows: Vec<_> = points.iter().map(PrefillPoint::json).collect();
    if print_table(args.model.output, &rows, &PREFILL_COLUMNS) {
        return Ok(());
    }
    if args.model.output.json {
        let mut report = model.describe();
        report.insert("command".into(), json!("prefill"));
        report.insert("steps".into(), json!(args.steps));
        report.insert("measured_bandwidth_gb_per_s".into(), json!(measured / 1e9));
        insert_rows(&mut report, rows);
        return print_json(&report);
    }
    print_model(&model);
    points.iter().for_each(|point| point.print(model.numerics));
    Ok(())
}

/// A prompt after some cached tokens.
#[derive(Clone, Copy, Debug)]
struct PrefillCase {
    context: usize,
    prompt_tokens: usize,
    /// Tokens run at once.
    chunk: usize,
}

impl PrefillCase {
    fn length(&self) -> usize {
        self.context + self.prompt_tokens
    }
}

/// One prompt, run several times.
struct PrefillPoint {
    case: PrefillCase,
    ms: Spread,
    chunk_ms: Spread,
    flop: f64,
    peak: Option<Peak>,
    breakdown: Breakdown,
}

fn prefill_point(
    model: &mut MeasuredModel,
    sequences: &Sequences,
    case: PrefillCase,
    args: &BenchPrefillArgs,
) -> anyhow::Result<PrefillPoint> {
    let PrefillCase { context, prompt_tokens, chunk } = case;
    let mut random = Random::new(prompt_tokens as u64);
    let vocab_size = model.config.vocab_size;
    let mut chunk_times = vec![];
    let mut logits = vec![];
    let mut prompt = |model: &mut MeasuredModel, chunk_times: &mut Vec<f64>| -> anyhow::Result<f64> {
        let start = Instant::now();
        for first in (context..case.length()).step_by(chunk) {
            let end = (first + chunk).min(case.length());
            let batch = sequences.prefill_batch(first..end, end == case.length(), &mut random, vocab_size);
            let chunk_start = Instant::now();
            logits.clear();
            model.runner.step(batch, &mut logits)?;
            chunk_times.push(chunk_start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    for _ in 0..args.warmup {
        prompt(model, &mut vec![])?;
    }
    let (mut times, mut peaks) = (vec![], vec![model.runner.peak()]);
    for step in 0..args.steps {
        times.push(prompt(model, &mut chunk_times)?);
        peaks.push(model.runner.peak());
        eprintln!("prompt {} of {}: {:.1} ms", step + 1, args.steps, times[step]);
    }
    model.runner.start(true)?;
    let profiled_ms = prompt(model, &mut vec![])?;
    let breakdown = Breakdown::new(&model.runner.stop()?, profiled_ms, 1);
    let flop = prefill_flop(model, context, prompt_tokens, chunk);
    let peaks: Option<Vec<f64>> = peaks.into_iter().collect();
    let peak = peaks.map(|peaks| Peak::new(&peaks, &times, flop));
    Ok(PrefillPoint { case, ms: Spread::of(times), chunk_ms: Spread::of(chunk_times), flop, peak, breakdown })
}

impl PrefillPoint {
    fn tokens_per_second(&self) -> f64 {
        self.case.prompt_tokens as f64 * 1e3 / self.ms.median
    }

    fn gflop_per_s(&self) -> f64 {
        self.flop / 1e9 / (self.ms.median / 1e3)
    }

    fn json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        for (name, value) in [
            ("context", json!(self.case.context)),
            ("prompt_tokens", json!(self.case.prompt_tokens)),
            ("prefill_chunk", json!(self.case.chunk)),
            ("prefill_ms_median", json!(self.ms.median)),
            ("prefill_ms_p10", json!(self.ms.p10)),
            ("prefill_ms_p90", json!(self.ms.p90)),
            ("chunk_ms_median", json!(self.chunk_ms.median)),
            ("chunk_ms_p10", json!(self.chunk_ms.p10)),
            ("chunk_ms_p90", json!(self.chunk_ms.p90)),
            ("tokens_per_second", json!(self.tokens_per_second())),
            ("gflop", json!(self.flop / 1e9)),
            ("gflop_counted", json!("2 per active weight and token; attention over cached positions not counted")),
            ("achieved_gflop_per_s", json!(self.gflop_per_s())),
        ] {
            map.insert(name.to_string(), value);
        }
        if let Some(peak) = &self.peak {
            map.insert("measured_peak_gflop_per_s".into(), json!(peak.best / 1e9));
            map.insert("peak_fraction".into(), json!(self.gflop_per_s() * 1e9 / peak.best));
            map.insert("peak_fraction_of_moment_median".into(), json!(peak.fraction_of_moment.median));
        }
        self.breakdown.insert_json(&mut map);
        map
    }

    fn print(&self, numerics: &str) {
        let PrefillCase { context, prompt_tokens, chunk } = self.case;
        let (ms, chunk_ms, gflop_per_s) = (&self.ms, &self.chunk_ms, self.gflop_per_s());
        println!();
        println!("prefill of {prompt_tokens} tokens in chunks of {chunk} after {context} cached");
        println!("  {:.1} ms (median; p10 {:.1}, p90 {:.1})", ms.median, ms.p10, ms.p90);
        println!("  {:.1} ms per chunk (median; p10 {:.1}, p90 {:.1})", chunk_ms.median, chunk_ms.p10, chunk_ms.p90);
        println!(
            "  {:.1} tokens/s, {gflop_per_s:.1} GFLOP/s (2 per active weight and token)",
            self.tokens_per_second()
        );
        if let Some(peak) = &self.peak {
            println!(
                "  {:.1} % of the {:.1} GFLOP/s that {numerics} multiplications in registers reach; each prompt against \
                 those just before and after it: {:.1} %",
                100.0 * gflop_per_s * 1e9 / peak.best,
                peak.best / 1e9,
                100.0 * peak.fraction_of_moment.median
            );
        }
        self.breakdown.print();
    }
}

/// The arithmetic limit beside a prefill.
struct Peak {
    /// Operations per second.
    best: f64,
    /// For each prompt: its rate over the better of the peaks measured just before and after it.
    fraction_of_moment: Spread,
}

impl Peak {
    /// `peaks` were measured around the prompts of `flop` operations that took `times` ms.
    fn new(peaks: &[f64], times: &[f64], flop: f64) -> Peak {
        let fractions = peaks.windows(2).zip(times).map(|(p, ms)| flop / (ms / 1e3) / p[0].max(p[1])).collect();
        Peak { best: peaks.iter().copied().fold(0.0, f64::max), fraction_of_moment: Spread::of(fractions) }
    }
}

/// What the ranks did in the measured steps, ms per step.
struct RankTotals {
    reports: Vec<RankReport>,
    /// Time of a step outside of the work of the stages: the way between them.
    between: f64,
    n_steps: f64,
    /// At least this share of all ranks' weights is in memory; unknown where a device holds them.
    resident_share: Option<f64>,
}

impl RankTotals {
    fn new(reports: &[RankReport], total_ms: f64, n_steps: usize, model: &MeasuredModel) -> RankTotals {
        let (busy, _) = by_stage(reports, |r| r.working + r.summing);
        let resident: Option<u64> = reports.iter().map(|r| r.resident_bytes).sum();
        RankTotals {
            reports: reports.to_vec(),
            between: (total_ms - busy) / n_steps as f64,
            n_steps: n_steps as f64,
            resident_share: resident.map(|bytes| (bytes as f64 / model.resident_bytes as f64).min(1.0)),
        }
    }

    fn insert_json(&self, map: &mut Map<String, Value>) {
        let per_step = |ms: f64| ms / self.n_steps;
        map.insert("major_page_faults".into(), json!(self.reports.iter().map(|r| r.major_faults).sum::<u64>()));
        map.insert("resident_share".into(), json!(self.resident_share));
        if self.reports.len() > 1 {
            let rank = |r: &RankReport| {
                json!({
                    "working_ms": per_step(r.working), "summing_ms": per_step(r.summing),
                    "receiving_ms": per_step(r.receiving), "sending_ms": per_step(r.sending),
                })
            };
            map.insert("rank_ms".into(), self.reports.iter().map(rank).collect());
            map.insert("between_stages_ms".into(), json!(self.between));
        }
    }

    fn print(&self) {
        if self.reports.len() > 1 {
            println!("  ranks, ms per step; {:.3} ms on the way between stages", self.between);
            for (rank, r) in self.reports.iter().enumerate() {
                let [working, summing, receiving, sending] =
                    [r.working, r.summing, r.receiving, r.sending].map(|ms| ms / self.n_steps);
                println!(
                    "    rank {rank}: works {working:.3}, sums {summing:.3}, waits for hidden states {receiving:.3}, sends \
                     {sending:.3}"
                );
            }
        }
    }
}

/// Mean ms per profiled step by operation.
struct Breakdown {
    rows: Vec<(&'static str, f64)>,
    total: f64,
}

impl Breakdown {
    /// Ranks of a stage work side by side, stages one after the other.
    fn new(reports: &[RankReport], total_ms: f64, n_steps: usize) -> Breakdown {
        let mut rows: Vec<(&'static str, f64)> = Operation::ALL
            .iter()
            .enumerate()
            .map(|(i, operation)| (operation.name(), by_stage(reports, |r| r.operations[i]).0))
            .collect();
        let known: f64 = rows.iter().map(|(_, ms)| ms).sum();
        let mut other = (total_ms - known).max(0.0);
        if reports.len() > 1 {
            let (working, _) = by_stage(reports, |r| r.working);
            let (summing, least) = by_stage(reports, |r| r.summing);
            // The rank that waits least tells what sums take by themselves.
            rows.push(("communication", (total_ms - working - summing + least).max(0.0)));
            rows.push(("waiting", summing - least));
            other = (working - known).max(0.0);
        }
        for (name, ms) in &mut rows {
            let extra = if *name == Operation::Other.name() { other } else { 0.0 };
            *ms = (*ms + extra) / n_steps as f64;
        }
        Breakdown { rows, total: total_ms / n_steps as f64 }
    }

    fn insert_json(&self, map: &mut Map<String, Value>) {
        let rows: Map<String, Value> = self.rows.iter().map(|(name, ms)| (name.to_string(), json!(ms))).collect();
        map.insert("breakdown_ms".into(), Value::Object(rows));
        map.insert("breakdown_total_ms".into(), json!(self.total));
    }

    fn print(&self) {
        println!("  operations of a profiled step, {:.2} ms", self.total);
        for (name, ms) in &self.rows {
            println!("    {name:<24}{ms:>9.3} ms{:>8.1} %", 100.0 * ms / self.total);
        }
    }
}
