//! One span of a trace for each request that runs, with the names of OpenTelemetry's conventions for generative models, and
//! vLLM's where these have none.
//!
//! This is a span of the `tracing` crate: whoever serves the router chooses where spans go. Without a subscriber for
//! [`TARGET`] a request costs nothing more.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tandem_engine::SamplingParams;
use tracing::Span;
use tracing::field::Empty;

/// Of the spans of requests.
pub const TARGET: &str = "tandem_serve::request";

/// A request, until the last of its answers ends.
pub(crate) struct RequestSpan {
    span: Span,
    sums: Mutex<Sums>,
}

/// All answers together.
#[derive(Default)]
struct Sums {
    cached_tokens: usize,
    output_tokens: usize,
    reasoning_tokens: usize,
    finish_reasons: Vec<String>,
    time_in_queue: Option<Duration>,
    time_to_first_token: Option<Duration>,
    error: Option<String>,
}

/// What a request asks for.
pub(crate) struct Asked<'a> {
    pub(crate) model: &'a str,
    pub(crate) client: Option<SocketAddr>,
    pub(crate) is_chat: bool,
    pub(crate) sampling: &'a SamplingParams,
    pub(crate) max_tokens: Option<u32>,
    /// Answers to each prompt.
    pub(crate) n: usize,
    /// Of all prompts.
    pub(crate) input_tokens: usize,
}

/// What an answer took.
pub(crate) struct Answered<'a> {
    pub(crate) cached_tokens: usize,
    pub(crate) output_tokens: usize,
    pub(crate) reasoning_tokens: usize,
    pub(crate) time_in_queue: Option<Duration>,
    pub(crate) time_to_first_token: Option<Duration>,
    pub(crate) finish: &'a str,
    pub(crate) error: Option<String>,
}

impl RequestSpan {
    /// Begins one, below the caller's.
    pub(crate) fn begin(asked: &Asked<'_>) -> RequestSpan {
        let operation = if asked.is_chat { "chat" } else { "text_completion" };
        let span = tracing::info_span!(
            target: TARGET, "request",
            otel.name = format!("{operation} {}", asked.model), otel.kind = "server", otel.status_code = Empty,
            gen_ai.operation.name = operation, gen_ai.provider.name = "tandem",
            gen_ai.request.model = asked.model, gen_ai.response.model = asked.model,
            gen_ai.request.max_tokens = asked.max_tokens.map(i64::from),
            gen_ai.request.temperature = f64::from(asked.sampling.temperature),
            gen_ai.request.top_p = f64::from(asked.sampling.top_p),
            gen_ai.request.choice.count = (asked.n > 1).then_some(asked.n as i64),
            gen_ai.usage.input_tokens = asked.input_tokens as i64, gen_ai.usage.output_tokens = Empty,
            gen_ai.usage.cache_read.input_tokens = Empty, gen_ai.usage.reasoning.output_tokens = Empty,
            gen_ai.response.finish_reasons = Empty,
            gen_ai.latency.time_in_queue = Empty, gen_ai.latency.time_to_first_token = Empty,
            client.address = asked.client.map(|client| client.ip().to_string()), "error.type" = Empty,
        );
        RequestSpan { span, sums: Mutex::default() }
    }

    /// Adds an answer that has ended.
    pub(crate) fn answered(&self, answer: Answered<'_>) {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.cached_tokens += answer.cached_tokens;
        sums.output_tokens += answer.output_tokens;
        sums.reasoning_tokens += answer.reasoning_tokens;
        sums.finish_reasons.push(answer.finish.to_owned());
        let earlier = |a: Option<Duration>, b: Option<Duration>| a.into_iter().chain(b).min();
        sums.time_in_queue = earlier(sums.time_in_queue, answer.time_in_queue);
        sums.time_to_first_token = earlier(sums.time_to_first_token, answer.time_to_first_token);
        sums.error = answer.error.or(sums.error.take());
    }
}

impl Drop for RequestSpan {
    fn drop(&mut self) {
        let sums = self.sums.get_mut().unwrap_or_else(PoisonError::into_inner);
        let span = &self.span;
        span.record("gen_ai.usage.output_tokens", sums.output_tokens as i64);
        span.record("gen_ai.usage.cache_read.input_tokens", sums.cached_tokens as i64);
        span.record("gen_ai.usage.reasoning.output_tokens", sums.reasoning_tokens as i64);
        span.record("gen_ai.response.finish_reasons", sums.finish_reasons.join(","));
        let seconds = [
            ("gen_ai.latency.time_in_queue", sums.time_in_queue),
            ("gen_ai.latency.time_to_first_token", sums.time_to_first_token),
        ];
        for (name, duration) in seconds.into_iter().filter_map(|(name, duration)| Some((name, duration?))) {
            span.record(name, duration.as_secs_f64());
        }
        if let Some(error) = &sums.error {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", error.as_str());
        }
    }
}
