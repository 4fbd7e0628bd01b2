//! Load for any OpenAI-compatible server, measured from the client's side: what vLLM's `bench serve` measures, by its names.
//!
//! `plan.rs` says when requests start and what they ask; this file sends them, reads the streams and sums up. Nothing is
//! printed here.

mod plan;

use std::io::{BufRead, BufReader};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};

pub use plan::{Arrivals, Goal, Prompts, Ramp};

/// Percentiles of the report.
const PERCENTILES: [f64; 4] = [0.5, 0.9, 0.95, 0.99];

/// What is sent where.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The server, without /v1.
    pub url: String,
    /// Name of the model; the first of /v1/models if `None`.
    pub model_name: Option<String>,
    /// Key to send.
    pub api_key: Option<String>,
    /// Take any certificate.
    pub insecure: bool,
    /// Requests that are measured, at least 1.
    pub requests: usize,
    /// Requests before them that are not, one after the other.
    pub num_warmups: usize,
    /// Requests open at the same time, at least 1; with arrivals, at most so many if given.
    pub concurrency: Option<usize>,
    /// When requests start; as soon as another ends if `None`.
    pub arrivals: Option<Arrivals>,
    /// What they ask.
    pub prompts: Prompts,
    /// Tokens of each answer.
    pub max_tokens: usize,
    /// /v1/chat/completions instead of /v1/completions.
    pub chat: bool,
    /// Of prompts and arrivals.
    pub seed: u64,
    /// What a request must keep to, to count as good.
    pub goodput: Vec<Goal>,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the model.
    pub model: String,
    /// Seconds from the first request to the end of the last.
    pub seconds: f64,
    /// Figures, with units in their names.
    pub json: Map<String, Value>,
    /// The first of the errors of requests, if there is any, and how many there are.
    pub failed: Option<(String, usize)>,
}

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

impl Measured {
    /// Seconds per token after the first.
    fn per_token(&self) -> Option<f64> {
        let first = self.first.filter(|_| self.generated_tokens > 1)?;
        Some((self.whole - first) / (self.generated_tokens - 1) as f64)
    }

    fn keeps(&self, goals: &[Goal]) -> bool {
        let within = |seconds: Option<f64>, limit: f64| seconds.is_none_or(|seconds| seconds * 1e3 <= limit);
        self.error.is_none()
            && goals.iter().all(|goal| match goal {
                Goal::TimeToFirstToken(limit) => self.first.is_some() && within(self.first, *limit),
                Goal::TimePerOutputToken(limit) => within(self.per_token(), *limit),
                Goal::EndToEnd(limit) => within(Some(self.whole), *limit),
            })
    }
}

/// Sends the requests and measures them.
///
/// # Errors
/// Options contradict each other, a data set cannot be read, or the server does not answer. Errors of single requests are
/// in the report.
pub fn run(options: &LoadOptions) -> anyhow::Result<Report> {
    ensure!(options.requests > 0, "--requests must be at least 1");
    ensure!(options.concurrency != Some(0), "--concurrency must be at least 1");
    let agent = agent(options, None);
    let url = options.url.trim_end_matches('/');
    let prompts = options.prompts.make(options.num_warmups + options.requests, options.seed)?;
    let (warmups, prompts) = prompts.split_at(options.num_warmups);
    let starts =
        options.arrivals.as_ref().map(|arrivals| arrivals.starts(options.requests, options.seed)).transpose()?;
    let model = match &options.model_name {
        Some(model) => model.clone(),
        None => first_model(&agent, url, options.api_key.as_deref())?,
    };
    for prompt in warmups {
        request(&agent, url, &model, options, prompt).context("a warm-up request failed")?;
    }
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Measured>> = Mutex::default();
    let start = Instant::now();
    // With arrivals, requests start on time whatever the server does: each has a thread of its own, or waits for one.
    let n_threads = options.concurrency.unwrap_or(options.requests).min(options.requests);
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(prompt) = prompts.get(i) else { return };
                    if let Some(starts) = &starts {
                        std::thread::sleep(Duration::from_secs_f64(starts[i]).saturating_sub(start.elapsed()));
                    }
                    let measured = request(&agent, url, &model, options, prompt)
                        .unwrap_or_else(|error| Measured { error: Some(format!("{error:#}")), ..Measured::default() });
                    results.lock().unwrap_or_else(|e| e.into_inner()).push(measured);
                }
            });
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let results = results.into_inner().unwrap_or_else(|e| e.into_inner());
    Ok(report(options, model, seconds, &results))
}

/// Between two looks at a server that is not ready.
const PAUSE: Duration = Duration::from_millis(250);
/// A server that takes longer to say whether it is ready hangs.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

fn agent(options: &LoadOptions, timeout: Option<Duration>) -> ureq::Agent {
    let tls = ureq::tls::TlsConfig::builder().disable_verification(options.insecure).build();
    let config = ureq::Agent::config_builder().http_status_as_error(false).tls_config(tls).timeout_global(timeout);
    config.build().into()
}

/// Waits `absent` at most for a server that cannot be reached, and `loading` at most for one that says that it is not
/// ready (503); `on_wait` gets the reason, once for each. What else a server says is for [`run`].
///
/// # Errors
/// The server cannot be reached, or is not ready, after that time.
pub fn wait_until_ready(
    options: &LoadOptions,
    absent: Duration,
    loading: Duration,
    mut on_wait: impl FnMut(&str),
) -> anyhow::Result<()> {
    let agent = agent(options, Some(READY_TIMEOUT));
    let url = options.url.trim_end_matches('/');
    let start = Instant::now();
    let mut said = "";
    loop {
        // Servers that lack this path are ready when they have a port.
        let (patience, why) = match agent.get(format!("{url}/ready")).call() {
            Ok(response) if response.status() != 503 => return Ok(()),
            Ok(_) => (loading, "it is not ready (503)"),
            // Time mends neither of these. The TLS library's errors come as malformed data.
            Err(ureq::Error::Io(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
                bail!("{url} is not trusted ({error}); --insecure takes any certificate");
            }
            Err(error @ (ureq::Error::BadUri(_) | ureq::Error::Http(_))) => {
                return Err(error)
                    .with_context(|| format!("--url is {url:?}, expected one such as http://127.0.0.1:8000"));
            }
            Err(error) if start.elapsed() >= absent => {
                return Err(error).with_context(|| format!("{url} does not answer; is the server running?"));
            }
            Err(_) => (absent, "it does not answer"),
        };
        if start.elapsed() >= patience {
            bail!("{url} is not ready after {:.0} s (--ready-check-timeout-sec)", patience.as_secs_f64());
        }
        if said != why {
            on_wait(why);
            said = why;
        }
        std::thread::sleep(PAUSE);
    }
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

fn request(
    agent: &ureq::Agent,
    url: &str,
    model: &str,
    options: &LoadOptions,
    prompt: &str,
) -> anyhow::Result<Measured> {
    let mut body = json!({
        "model": model, "max_tokens": options.max_tokens, "temperature": 0, "stream": true, "ignore_eos": true,
        "stream_options": {"include_usage": true},
    });
    let path = if options.chat {
        body["messages"] = json!([{"role": "user", "content": prompt}]);
        "/v1/chat/completions"
    } else {
        body["prompt"] = json!(prompt);
        "/v1/completions"
    };
    let mut call = agent.post(format!("{url}{path}")).header("content-type", "application/json");
    if let Some(key) = &options.api_key {
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

fn report(options: &LoadOptions, model: String, seconds: f64, results: &[Measured]) -> Report {
    let errors: Vec<&String> = results.iter().filter_map(|r| r.error.as_ref()).collect();
    let complete = || results.iter().filter(|r| r.error.is_none());
    let first = percentiles(complete().filter_map(|r| r.first).map(|s| s * 1e3));
    let gaps = percentiles(complete().flat_map(|r| &r.gaps).map(|s| s * 1e3));
    let per_token = percentiles(complete().filter_map(Measured::per_token).map(|s| s * 1e3));
    let whole = percentiles(complete().map(|r| r.whole * 1e3));
    let rates = percentiles(complete().map(|r| r.generated_tokens as f64 / r.whole));
    let sum = |of: fn(&Measured) -> u64| results.iter().map(of).sum::<u64>();
    let (prompt_tokens, generated) = (sum(|r| r.prompt_tokens), sum(|r| r.generated_tokens));
    let good = complete().filter(|r| r.keeps(&options.goodput)).count();
    let arrivals = options.arrivals.as_ref();
    let json = json!({
        "url": options.url, "model": model, "requests": results.len(), "errors": errors.len(), "seconds": seconds,
        "concurrency": options.concurrency, "prompt_words": options.prompts.own_words(), "request_rate": arrivals.and_then(|a| a.rate()),
        "burstiness": arrivals.map(|a| a.burstiness), "num_warmups": options.num_warmups,
        "max_tokens": options.max_tokens, "prompt_tokens": prompt_tokens, "generated_tokens": generated,
        "requests_per_second": results.len() as f64 / seconds,
        "good_requests_per_second": (!options.goodput.is_empty()).then_some(good as f64 / seconds),
        "generated_tokens_per_second": generated as f64 / seconds,
        "total_tokens_per_second": (prompt_tokens + generated) as f64 / seconds,
        "time_to_first_token_ms": first, "time_per_output_token_ms": per_token, "inter_token_ms": gaps,
        "request_ms": whole, "request_tokens_per_second": rates,
    });
    let json = json.as_object().cloned().unwrap_or_default();
    Report { model, seconds, json, failed: errors.first().map(|error| ((*error).clone(), errors.len())) }
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
    fn percentiles_are_values_that_occurred() {
        let found = percentiles((1..=100).map(f64::from));
        assert_eq!((&found["mean"], &found["p50"], &found["p99"]), (&json!(50.5), &json!(50.0), &json!(99.0)));
        assert!(percentiles(std::iter::empty()).is_empty());
    }

    #[test]
    fn good_requests_keep_every_limit() {
        // 100 ms to the first of 11 tokens, 20 ms for each after it.
        let one = Measured { first: Some(0.1), whole: 0.3, generated_tokens: 11, ..Measured::default() };
        for (goals, expected) in [
            (&[][..], true),
            (&["ttft:100", "tpot:20.1", "e2el:300"], true),
            (&["ttft:99"], false),
            (&["tpot:19"], false),
            (&["ttft:100", "e2el:299"], false),
        ] {
            let goals: Vec<Goal> = goals.iter().map(|text| text.parse().expect("a limit")).collect();
            assert_eq!(one.keeps(&goals), expected, "{goals:?}");
        }
        assert!(!Measured { error: Some("broken".into()), ..Measured::default() }.keeps(&[]));
    }
}
