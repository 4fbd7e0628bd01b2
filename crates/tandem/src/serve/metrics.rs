//! What /metrics says, in Prometheus' format.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;

use super::worker::Status;

type FloatGauge = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rank {
    rank: u32,
}

/// Counters, gauges and histograms of one server.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Reason, Counter>,
    /// Calls that could not be read and were passed on as text.
    pub(crate) malformed_calls: Counter,
    /// Seconds from a request's arrival to its first token.
    pub(crate) time_to_first_token: Histogram,
    /// Seconds between the tokens of a stream.
    pub(crate) inter_token: Histogram,
    /// Seconds of whole requests.
    pub(crate) duration: Histogram,
    running: Gauge,
    waiting: Gauge,
    pages: Gauge,
    pages_used: Gauge,
    pages_cached: Gauge,
    prompt_tokens: Gauge,
    cached_tokens: Gauge,
    disk_tokens: Gauge,
    generated_tokens: Gauge,
    preemptions: Gauge,
    restarts: Gauge,
    tokens_per_second: FloatGauge,
    bytes_per_second: FloatGauge,
    bandwidth_fraction: FloatGauge,
    /// Bytes per second that the memory was measured to deliver.
    pub(crate) bandwidth: f64,
}

impl Metrics {
    /// All at zero; `ranks` are layers and weight bytes of each rank.
    pub(crate) fn new(bandwidth: f64, ranks: &[(u64, u64)]) -> Metrics {
        let mut registry = Registry::with_prefix("tandem");
        let seconds = |start: f64, n: u16| Histogram::new(exponential_buckets(start, 2.0, n));
        let metrics = Metrics {
            requests: Family::default(),
            malformed_calls: Counter::default(),
            time_to_first_token: seconds(0.001, 18),
            inter_token: seconds(0.000_5, 16),
            duration: seconds(0.01, 18),
            running: Gauge::default(),
            waiting: Gauge::default(),
            pages: Gauge::default(),
            pages_used: Gauge::default(),
            pages_cached: Gauge::default(),
            prompt_tokens: Gauge::default(),
            cached_tokens: Gauge::default(),
            disk_tokens: Gauge::default(),
            generated_tokens: Gauge::default(),
            preemptions: Gauge::default(),
            restarts: Gauge::default(),
            tokens_per_second: Gauge::default(),
            bytes_per_second: Gauge::default(),
            bandwidth_fraction: Gauge::default(),
            bandwidth,
            registry: Registry::default(),
        };
        registry.register("requests_finished", "Requests by how they ended", metrics.requests.clone());
        registry.register("malformed_tool_calls", "Tool calls passed on as text", metrics.malformed_calls.clone());
        let histograms = [
            ("time_to_first_token", "From arrival to the first token", &metrics.time_to_first_token),
            ("inter_token_latency", "Between the tokens of a stream", &metrics.inter_token),
            ("request_duration", "Whole requests", &metrics.duration),
        ];
        for (name, help, histogram) in histograms {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
        let gauges = [
            ("requests_running", "Requests that run", &metrics.running),
            ("requests_waiting", "Requests that wait for a place", &metrics.waiting),
            ("cache_pages", "Pages of the key-value cache", &metrics.pages),
            ("cache_pages_used", "Pages that requests hold", &metrics.pages_used),
            ("cache_pages_idle", "Pages kept for prompts to come", &metrics.pages_cached),
            ("prompt_tokens", "Prompt tokens run since the start", &metrics.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens found in the cache since the start", &metrics.cached_tokens),
            ("disk_prompt_tokens", "Of these, tokens read from disk", &metrics.disk_tokens),
            ("generated_tokens", "Tokens generated since the start", &metrics.generated_tokens),
            ("preemptions", "Requests that gave up their pages for a while", &metrics.preemptions),
            ("engine_restarts", "Times that the engine was made anew", &metrics.restarts),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
        let rates = [
            ("tokens_per_second", "Tokens generated, over about a second", &metrics.tokens_per_second),
            (
                "read_bytes_per_second",
                "Weight bytes that the steps needed, over about a second",
                &metrics.bytes_per_second,
            ),
            ("bandwidth_fraction", "The same as a fraction of the measured bandwidth", &metrics.bandwidth_fraction),
        ];
        for (name, help, gauge) in rates {
            registry.register(name, help, gauge.clone());
        }
        let measured = FloatGauge::default();
        measured.set(bandwidth);
        registry.register("measured_bandwidth_bytes_per_second", "Read bandwidth, measured at the start", measured);
        let (layers, weights) = (Family::<Rank, Gauge>::default(), Family::<Rank, Gauge>::default());
        for (rank, (n_layers, n_bytes)) in ranks.iter().enumerate() {
            let rank = Rank { rank: rank as u32 };
            layers.get_or_create(&rank).set(*n_layers as i64);
            weights.get_or_create(&rank).set(*n_bytes as i64);
        }
        registry.register("rank_layers", "Decoder layers of each rank", layers);
        registry.register_with_unit("rank_weights", "Weights of each rank", Unit::Bytes, weights);
        Metrics { registry, ..metrics }
    }

    /// Counts a request that ended, by `reason`.
    pub(crate) fn finished(&self, reason: &str) {
        self.requests.get_or_create(&Reason { reason: reason.to_owned() }).inc();
    }

    /// The page's text.
    pub(crate) fn render(&self, status: &Status) -> String {
        let counters = &status.counters;
        self.running.set(status.running as i64);
        self.waiting.set(status.waiting as i64);
        self.pages.set(status.pages as i64);
        self.pages_used.set(status.pages_used as i64);
        self.pages_cached.set(status.pages_cached as i64);
        self.prompt_tokens.set(counters.prompt_tokens as i64);
        self.cached_tokens.set(counters.cached_tokens as i64);
        self.disk_tokens.set(counters.disk_tokens as i64);
        self.generated_tokens.set(counters.generated_tokens as i64);
        self.preemptions.set(counters.preemptions as i64);
        self.restarts.set(status.restarts as i64);
        self.tokens_per_second.set(status.tokens_per_second);
        self.bytes_per_second.set(status.bytes_per_second);
        self.bandwidth_fraction.set(status.bytes_per_second / self.bandwidth.max(1.0));
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
