//! `tandem bench serve`: prints what tandem-load measures.

use std::time::Duration;

use anyhow::bail;
use serde_json::{Map, Value};
use tandem_load::Report;

use super::{insert_rows, print_table};
use crate::cli::BenchServeArgs;
use crate::report::print_json;

/// Seconds that a server may load its model, unless --ready-check-timeout-sec says otherwise.
const LOADING_SECONDS: u64 = 600;

const COLUMNS: [&str; 13] = [
    "concurrency",
    "request_rate",
    "prompt_words",
    "max_tokens",
    "requests_per_second",
    "good_requests_per_second",
    "generated_tokens_per_second",
    "total_tokens_per_second",
    "time_to_first_token_ms_mean",
    "time_to_first_token_ms_p99",
    "time_per_output_token_ms_mean",
    "time_per_output_token_ms_p99",
    "errors",
];

/// Runs the command.
pub(super) fn serve(args: &BenchServeArgs) -> anyhow::Result<()> {
    let loads = args.loads();
    let patience = |given: Option<u64>, usual| Duration::from_secs(given.unwrap_or(usual));
    let given = args.ready_check_timeout_sec;
    let (absent, loading) = (patience(given, 0), patience(given, LOADING_SECONDS));
    if let Some(load) = loads.first() {
        tandem_load::wait_until_ready(load, absent, loading, |why| eprintln!("waiting for {}: {why}", args.url))?;
    }
    let output = args.output;
    let is_plain = !(output.json || output.markdown || output.csv);
    let mut reports = vec![];
    for (i, load) in loads.iter().enumerate() {
        let report = tandem_load::run(load)?;
        if loads.len() > 1 {
            eprintln!("load {} of {}: {:.1} s", i + 1, loads.len(), report.seconds);
        }
        if is_plain {
            print(&report);
        }
        reports.push(report);
    }
    let rows: Vec<Map<String, Value>> = reports.iter().map(|report| flat(&report.json)).collect();
    if !print_table(output, &rows, &COLUMNS) && output.json {
        let mut json = Map::new();
        insert_rows(&mut json, reports.iter().map(|report| report.json.clone()).collect());
        print_json(&json)?;
    }
    let requests = reports.iter().map(|report| report.json["requests"].as_u64().unwrap_or(0)).sum::<u64>();
    let errors: usize = reports.iter().filter_map(|report| report.failed.as_ref()).map(|(_, n)| n).sum();
    match reports.into_iter().find_map(|report| report.failed) {
        Some((error, _)) => bail!("{errors} of {requests} requests failed; the first: {error}"),
        None => Ok(()),
    }
}

/// Percentiles as columns of their own.
fn flat(json: &Map<String, Value>) -> Map<String, Value> {
    let cells = json.iter().flat_map(|(key, value)| match value {
        Value::Object(figures) => figures.iter().map(|(name, n)| (format!("{key}_{name}"), n.clone())).collect(),
        value => vec![(key.clone(), value.clone())],
    });
    cells.collect()
}

fn print(report: &Report) {
    let json = &report.json;
    let number = |key: &str| json[key].as_f64().unwrap_or(0.0);
    let url = json["url"].as_str().unwrap_or_default();
    println!(
        "{} at {url}: {} requests in {:.1} s, {} errors",
        report.model, json["requests"], report.seconds, json["errors"]
    );
    let (prompt, generated) = (&json["prompt_tokens"], &json["generated_tokens"]);
    let rate = number("generated_tokens_per_second");
    println!("{prompt} prompt tokens, {generated} generated, {rate:.1} tokens/s");
    if let Some(good) = json["good_requests_per_second"].as_f64() {
        println!("goodput: {good:.2} of {:.2} requests/s", number("requests_per_second"));
    }
    for (name, key) in [
        ("time to first token, ms", "time_to_first_token_ms"),
        ("time per output token, ms", "time_per_output_token_ms"),
        ("between tokens, ms", "inter_token_ms"),
        ("whole requests, ms", "request_ms"),
        ("tokens/s of each request", "request_tokens_per_second"),
    ] {
        let figures = json[key].as_object().into_iter().flatten();
        let line = figures.map(|(name, value)| format!("{name} {:.2}", value.as_f64().unwrap_or(0.0)));
        println!("{name}: {}", line.collect::<Vec<_>>().join(", "));
    }
}
