//! `tandem bench serve`: load for any OpenAI-compatible server, measured from the client's side.

use std::io::{BufRead, BufReader};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};

use crate::cli::BenchServeArgs;
use crate::report::print_json;

/// Words that any tokenizer splits into about one token each.
const WORDS: [&str; 32] = [
    "the", "fox", "and", "a", "tree", "with", "red", "bird", "who", "said", "that", "day", "was", "good", "in",
    "house", "to", "find", "old", "man", "one", "day", "she", "had", "little", "boy", "we", "go", "home", "cat", "sun",
    "is",
];
/// Percentiles of the report.
const PERCENTILES: [f64; 4] = [0.5, 0.9, 0.95, 0.99];

/// What one request did.
#[derive(Default)]
struct Measured {
    /// Seconds to the first piece of text, and between the pieces after it.
    first: Option<f64>,
    gaps: Vec<f64>,
    /// Seconds to the end.
    whole: f64,
    prompt_tokens: u64,
    generated_tokens: u64,
    error: Option<String>,
}

/// Runs the command.
pub(super) fn serve(args: &BenchServeArgs) -> anyhow::Result<()> {
    ensure!(args.concurrency > 0 && args.requests > 0, "--concurrency and --requests must be at least 1");
    ensure!(args.request_rate.is_none_or(|rate| rate > 0.0), "--request-rate must be above 0");
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let url = args.url.trim_end_matches('/');
    let model = match &args.model_name {
        Some(model) => model.clone(),
        None => first_model(&agent, url, args.api_key.as_deref())?,
    };
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Measured>> = Mutex::default();
    let start = Instant::now();
    // With a rate, requests start on time whatever the server does: each has a thread of its own.
    let n_threads = if args.request_rate.is_some() { args.requests } else { args.concurrency.min(args.requests) };
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= args.requests {
                        return;
                    }
                    if let Some(rate) = args.request_rate {
                        let due = Duration::from_secs_f64(i as f64 / rate);
                        std::thread::sleep(due.saturating_sub(start.elapsed()));
                    }
                    let measured = request(&agent, url, &model, args, i)
                        .unwrap_or_else(|error| Measured { error: Some(format!("{error:#}")), ..Measured::default() });
                    results.lock().unwrap_or_else(|e| e.into_inner()).push(measured);
                }
            });
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let results = results.into_inner().unwrap_or_else(|e| e.into_inner());
    report(args, &model, seconds, &results)
}

fn first_model(agent: &ureq::Agent, url: &str, key: Option<&str>) -> anyhow::Result<String> {
    let mut call = agent.get(format!("{url}/v1/models"));
    if let Some(key) = key {
        call = call.header("authorization", format!("Bearer {key}"));
    }
    let mut response = call.call().with_context(|| format!("{url} does not answer; is the server running?"))?;
    let body: Value = serde_json::from_str(&response.body_mut().read_to_string()?).context("/v1/models is not JSON")?;
    match body["data"][0]["id"].as_str() {
        Some(model) => Ok(model.to_owned()),
        None => bail!("{url}/v1/models lists no model ({body}); name one with --model-name"),
    }
}

/// The prompt of request `i`: random words, after the same `shared_prefix` words for all.
fn prompt(args: &BenchServeArgs, i: usize) -> String {
    let mut state =
        (args.seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (i as u64).wrapping_mul(0xd134_2543_de82_ef95);
    let word = |n: u64| WORDS[(n >> 33) as usize % WORDS.len()];
    let mut words: Vec<&str> =
        (0..args.shared_prefix as u64).map(|n| word(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    for _ in 0..args.prompt_words {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        words.push(word(state));
    }
    words.join(" ")
}

fn request(agent: &ureq::Agent, url: &str, model: &str, args: &BenchServeArgs, i: usize) -> anyhow::Result<Measured> {
    let mut body = json!({
        "model": model, "max_tokens": args.max_tokens, "temperature": 0, "stream": true, "ignore_eos": true,
        "stream_options": {"include_usage": true},
    });
    let path = if args.chat {
        body["messages"] = json!([{"role": "user", "content": prompt(args, i)}]);
        "/v1/chat/completions"
    } else {
        body["prompt"] = json!(prompt(args, i));
        "/v1/completions"
    };
    let mut call = agent.post(format!("{url}{path}")).header("content-type", "application/json");
    if let Some(key) = &args.api_key {
        call = call.header("authorization", format!("Bearer {key}"));
    }
    let start = Instant::now();
    let mut response = call.send(body.to_string())?;
    if response.status() != 200 {
        bail!("{}: {}", response.status(), response.body_mut().read_to_string()?);
    }
    let mut measured = Measured::default();
    let mut last = start;
    for line in BufReader::new(response.body_mut().as_reader()).lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data:").map(str::trim).filter(|data| *data != "[DONE]") else { continue };
        let event: Value = serde_json::from_str(data).context("an event is not JSON")?;
        if let Some(message) = event["error"]["message"].as_str() {
            bail!("{message}");
        }
        if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
            measured.prompt_tokens = usage["prompt_tokens"].as_u64().unwrap_or(0);
            measured.generated_tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
        }
        let choice = &event["choices"][0];
        let texts = [&choice["text"], &choice["delta"]["content"], &choice["delta"]["reasoning_content"]];
        if !texts.iter().any(|text| text.as_str().is_some_and(|text| !text.is_empty())) {
            continue;
        }
        let now = Instant::now();
        match measured.first {
            None => measured.first = Some((now - start).as_secs_f64()),
            Some(_) => measured.gaps.push((now - last).as_secs_f64()),
        }
        last = now;
    }
    measured.whole = start.elapsed().as_secs_f64();
    if measured.generated_tokens == 0 {
        // A server that does not count: one token for each piece.
        measured.generated_tokens = (measured.gaps.len() + usize::from(measured.first.is_some())) as u64;
    }
    Ok(measured)
}

fn report(args: &BenchServeArgs, model: &str, seconds: f64, results: &[Measured]) -> anyhow::Result<()> {
    let errors: Vec<&str> = results.iter().filter_map(|r| r.error.as_deref()).collect();
    let complete = || results.iter().filter(|r| r.error.is_none());
    let first = percentiles(complete().filter_map(|r| r.first).map(|s| s * 1e3));
    let gaps = percentiles(complete().flat_map(|r| &r.gaps).map(|s| s * 1e3));
    let whole = percentiles(complete().map(|r| r.whole * 1e3));
    let rates = percentiles(complete().map(|r| r.generated_tokens as f64 / r.whole));
    let sum = |of: fn(&Measured) -> u64| results.iter().map(of).sum::<u64>();
    let (prompt_tokens, generated) = (sum(|r| r.prompt_tokens), sum(|r| r.generated_tokens));
    let result = json!({
        "url": args.url, "model": model, "requests": results.len(), "errors": errors.len(), "seconds": seconds,
        "concurrency": args.concurrency, "request_rate": args.request_rate, "max_tokens": args.max_tokens,
        "prompt_tokens": prompt_tokens, "generated_tokens": generated,
        "requests_per_second": results.len() as f64 / seconds,
        "generated_tokens_per_second": generated as f64 / seconds,
        "total_tokens_per_second": (prompt_tokens + generated) as f64 / seconds,
        "time_to_first_token_ms": first, "inter_token_ms": gaps, "request_ms": whole,
        "request_tokens_per_second": rates,
    });
    if args.json {
        print_json(&result)?;
    } else {
        println!("{model} at {}: {} requests in {seconds:.1} s, {} errors", args.url, results.len(), errors.len());
        println!("{prompt_tokens} prompt tokens, {generated} generated, {:.1} tokens/s", generated as f64 / seconds);
        for (name, key) in [
            ("time to first token, ms", "time_to_first_token_ms"),
            ("between tokens, ms", "inter_token_ms"),
            ("whole requests, ms", "request_ms"),
            ("tokens/s of each request", "request_tokens_per_second"),
        ] {
            let line: Vec<String> = result[key]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, value)| format!("{name} {:.2}", value.as_f64().unwrap_or(0.0)))
                .collect();
            println!("{name}: {}", line.join(", "));
        }
    }
    match errors.first() {
        Some(error) => bail!("{} of {} requests failed; the first: {error}", errors.len(), results.len()),
        None => Ok(()),
    }
}

/// Mean and percentiles.
fn percentiles(values: impl Iterator<Item = f64>) -> Map<String, Value> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let mut map = Map::new();
    if sorted.is_empty() {
        return map;
    }
    map.insert("mean".into(), json!(sorted.iter().sum::<f64>() / sorted.len() as f64));
    for p in PERCENTILES {
        let rank = ((sorted.len() as f64 * p).ceil() as usize).clamp(1, sorted.len());
        map.insert(format!("p{:.0}", p * 100.0), json!(sorted[rank - 1]));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let found = percentiles((1..=100).rev().map(f64::from));
        let of = |name: &str| found[name].as_f64().unwrap();
        assert_eq!((of("mean"), of("p50"), of("p90"), of("p95"), of("p99")), (50.5, 50.0, 90.0, 95.0, 99.0));
        assert!(percentiles(std::iter::empty()).is_empty());
    }
}
