//! What /metrics says, in the format of OpenMetrics, which Prometheus reads.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::{AtomicU64, Ordering};
use tandem_core::backend::PAGE_SIZE;
use tandem_engine::RankStatus;

use crate::worker::Status;

type FloatGauge = Gauge<f64, AtomicU64>;
type FloatCounter = Counter<f64, AtomicU64>;

/// As vLLM's `cache_config_info` says it; endpoint pickers make blocks of a prompt of this size.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheConfig {
    block_size: u64,
    num_gpu_blocks: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: String,
}

/// The same by vLLM's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishedReason {
    finished_reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rank {
    rank: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Source {
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Position {
    position: u32,
}

/// How a request ends whose client does not wait for it.
pub(crate) const CLIENT_LEFT: &str = "client left";

/// Counters, gauges and histograms of one server.
pub(crate) struct Metrics {
    registry: Registry,
    /// The same counts by vLLM's names, for its boards and routers.
    vllm: Registry,
    vllm_prompt_tokens: Counter,
    success: Family<FinishedReason, Counter>,
    /// Tokens of each prompt, and of each answer.
    pub(crate) request_prompt_tokens: Histogram,
    pub(crate) request_generation_tokens: Histogram,
    /// Seconds from a request's arrival to its start, from there to its first token, and from there to its end.
    pub(crate) queued: Histogram,
    pub(crate) prefill: Histogram,
    pub(crate) decode: Histogram,
    cache_usage: FloatGauge,
    cache_config: Family<CacheConfig, Gauge>,
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
    prompt_tokens: Counter,
    cached_tokens: Counter,
    disk_tokens: Counter,
    generated_tokens: Counter,
    preemptions: Counter,
    /// By source: drafts, tokens in them, and tokens that were right.
    drafts: [Family<Source, Counter>; 3],
    /// The same of all sources, and the last by place in the draft.
    all_drafts: [Counter; 3],
    accepted_by_position: Family<Position, Counter>,
    restarts: Counter,
    memory_lost: Gauge,
    tokens_per_second: FloatGauge,
    bytes_per_second: FloatGauge,
    bandwidth_fraction: FloatGauge,
    rank_layers: Family<Rank, Gauge>,
    rank_weights: Family<Rank, Gauge>,
    rank_cache: Family<Rank, Gauge>,
    rank_cache_used: Family<Rank, Gauge>,
    rank_rows: Family<Rank, Counter>,
    rank_busy: Family<Rank, FloatCounter>,
    rank_resident: Family<Rank, FloatGauge>,
    rank_faults: Family<Rank, Counter>,
    /// Bytes per second that the memory was measured to deliver.
    pub(crate) bandwidth: f64,
}

impl Metrics {
    /// All at zero, for a model of this name; `bandwidth` is what the memory was measured to deliver, bytes per second.
    pub(crate) fn new(model_name: &str, bandwidth: f64) -> Metrics {
        let mut registry = Registry::with_prefix("tandem");
        let seconds = |start: f64, n: u16| Histogram::new(exponential_buckets(start, 2.0, n));
        let tokens = || Histogram::new(exponential_buckets(1.0, 2.0, 21));
        let metrics = Metrics {
            requests: Family::default(),
            malformed_calls: Counter::default(),
            time_to_first_token: seconds(0.001, 18),
            inter_token: Histogram::new(exponential_buckets(0.000_5, 1.5, 24)),
            duration: seconds(0.01, 18),
            running: Gauge::default(),
            waiting: Gauge::default(),
            pages: Gauge::default(),
            pages_used: Gauge::default(),
            pages_cached: Gauge::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            disk_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            preemptions: Counter::default(),
            drafts: Default::default(),
            all_drafts: Default::default(),
            accepted_by_position: Family::default(),
            restarts: Counter::default(),
            memory_lost: Gauge::default(),
            tokens_per_second: Gauge::default(),
            bytes_per_second: Gauge::default(),
            bandwidth_fraction: Gauge::default(),
            rank_layers: Family::default(),
            rank_weights: Family::default(),
            rank_cache: Family::default(),
            rank_cache_used: Family::default(),
            rank_rows: Family::default(),
            rank_busy: Family::default(),
            rank_resident: Family::default(),
            rank_faults: Family::default(),
            bandwidth,
            vllm_prompt_tokens: Counter::default(),
            success: Family::default(),
            request_prompt_tokens: tokens(),
            request_generation_tokens: tokens(),
            queued: seconds(0.001, 18),
            prefill: seconds(0.001, 18),
            decode: seconds(0.01, 18),
            cache_usage: Gauge::default(),
            cache_config: Family::default(),
            registry: Registry::default(),
            vllm: Registry::with_labels([("model_name".into(), model_name.to_owned().into())].into_iter()),
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
            (
                "device_memory_lost",
                "1 while the device reads weights far more slowly than at first: the system took memory back",
                &metrics.memory_lost,
            ),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
        let counters = [
            ("prompt_tokens", "Prompt tokens run", &metrics.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens found in the cache", &metrics.cached_tokens),
            ("disk_prompt_tokens", "Of these, tokens read from disk", &metrics.disk_tokens),
            ("generated_tokens", "Tokens generated", &metrics.generated_tokens),
            ("preemptions", "Requests that gave up their pages for a while", &metrics.preemptions),
            ("engine_restarts", "Times that the engine was made again", &metrics.restarts),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        let drafts = [
            ("drafts", "Steps of a request that verified drafted tokens"),
            ("drafted_tokens", "Tokens drafted"),
            ("accepted_drafted_tokens", "Tokens drafted that the model then said"),
        ];
        for ((name, help), counter) in drafts.into_iter().zip(&metrics.drafts) {
            registry.register(name, help, counter.clone());
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
        registry.register("rank_layers", "Decoder layers of each rank, or slices of them", metrics.rank_layers.clone());
        let sizes = [
            ("rank_weights", "Weights of each rank", &metrics.rank_weights),
            ("rank_cache", "Key-value cache of each rank", &metrics.rank_cache),
            ("rank_cache_used", "Of this, what requests hold", &metrics.rank_cache_used),
        ];
        for (name, help, gauge) in sizes {
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
        }
        registry.register("rank_rows", "Tokens that each rank has run", metrics.rank_rows.clone());
        let help = "Time that each rank has spent on them, waiting for others left out";
        registry.register_with_unit("rank_busy", help, Unit::Seconds, metrics.rank_busy.clone());
        let help = "Share of each rank's weights that is in memory, where the system tells";
        registry.register("rank_weights_resident_ratio", help, metrics.rank_resident.clone());
        let help = "Pages that each rank had to wait for, from a disk";
        registry.register("rank_major_page_faults", help, metrics.rank_faults.clone());
        Metrics { registry, ..metrics }.with_vllm_names()
    }

    fn with_vllm_names(mut self) -> Metrics {
        let vllm = &mut self.vllm;
        vllm.register("vllm:num_requests_running", "Requests that run", self.running.clone());
        vllm.register("vllm:num_requests_waiting", "Requests that wait for a place", self.waiting.clone());
        vllm.register("vllm:kv_cache_usage_perc", "Share of the cache that requests hold", self.cache_usage.clone());
        vllm.register("vllm:cache_config_info", "Pages of the cache and their tokens", self.cache_config.clone());
        let counters = [
            ("prompt_tokens", "Prompt tokens", &self.vllm_prompt_tokens),
            ("generation_tokens", "Tokens generated", &self.generated_tokens),
            ("prefix_cache_queries", "Prompt tokens looked for in the cache", &self.vllm_prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the cache", &self.cached_tokens),
            ("num_preemptions", "Requests that gave up their pages for a while", &self.preemptions),
        ];
        for (name, help, counter) in counters {
            vllm.register(format!("vllm:{name}"), help, counter.clone());
        }
        let drafts = [
            ("num_drafts", "Steps of a request that verified drafted tokens"),
            ("num_draft_tokens", "Tokens drafted"),
            ("num_accepted_tokens", "Tokens drafted that the model then said"),
        ];
        for ((name, help), counter) in drafts.into_iter().zip(&self.all_drafts) {
            vllm.register(format!("vllm:spec_decode_{name}"), help, counter.clone());
        }
        let (name, help) = ("vllm:spec_decode_num_accepted_tokens_per_pos", "The same by place in the draft, from 0");
        vllm.register(name, help, self.accepted_by_position.clone());
        let histograms = [
            ("time_to_first_token", "From arrival to the first token", &self.time_to_first_token),
            ("inter_token_latency", "Between the tokens of a stream", &self.inter_token),
            ("time_per_output_token", "The same, by its older name", &self.inter_token),
            ("e2e_request_latency", "Whole requests", &self.duration),
            ("request_queue_time", "From arrival to the start", &self.queued),
            ("request_prefill_time", "From the start to the first token", &self.prefill),
            ("request_decode_time", "From the first token to the end", &self.decode),
        ];
        for (name, help, histogram) in histograms {
            vllm.register_with_unit(format!("vllm:{name}"), help, Unit::Seconds, histogram.clone());
        }
        vllm.register("vllm:request_success", "Requests by how they ended", self.success.clone());
        let sizes = [
            ("prompt", "Tokens of a prompt", &self.request_prompt_tokens),
            ("generation", "Tokens of an answer", &self.request_generation_tokens),
        ];
        for (name, help, histogram) in sizes {
            vllm.register(format!("vllm:request_{name}_tokens"), help, histogram.clone());
        }
        self
    }

    /// Counts a request that ended, by `reason`.
    pub(crate) fn finished(&self, reason: &str) {
        let finished_reason = match reason {
            "length" => "length",
            "error" => "error",
            CLIENT_LEFT => "abort",
            _ => "stop",
        };
        self.success.get_or_create(&FinishedReason { finished_reason }).inc();
        self.requests.get_or_create(&Reason { reason: reason.to_owned() }).inc();
    }

    /// The page's text.
    pub(crate) fn render(&self, status: &Status, ranks: &[RankStatus]) -> String {
        let counters = &status.counters;
        self.running.set(status.running as i64);
        self.waiting.set(status.waiting as i64);
        let config = CacheConfig { block_size: PAGE_SIZE as u64, num_gpu_blocks: status.pages as u64 };
        if self.pages.set(status.pages as i64) != status.pages as i64 {
            self.cache_config.clear();
        }
        self.cache_config.get_or_create(&config).set(1);
        self.pages_used.set(status.pages_used as i64);
        self.pages_cached.set(status.pages_cached as i64);
        set(&self.prompt_tokens, counters.prompt_tokens);
        set(&self.cached_tokens, counters.cached_tokens);
        set(&self.vllm_prompt_tokens, counters.prompt_tokens + counters.cached_tokens);
        self.cache_usage.set(status.pages_used as f64 / status.pages.max(1) as f64);
        set(&self.disk_tokens, counters.disk_tokens);
        set(&self.generated_tokens, counters.generated_tokens);
        set(&self.preemptions, counters.preemptions);
        set(&self.restarts, status.restarts);
        self.memory_lost.set(status.device_warns.into());
        for (source, counts) in [("ngram", counters.ngram_drafts), ("mtp", counters.mtp_drafts)] {
            for (family, value) in self.drafts.iter().zip([counts.drafts, counts.tokens, counts.accepted_tokens()]) {
                set(&family.get_or_create(&Source { source }), value);
            }
        }
        let counts = counters.drafts();
        for (counter, value) in self.all_drafts.iter().zip([counts.drafts, counts.tokens, counts.accepted_tokens()]) {
            set(counter, value);
        }
        for (position, value) in (0..).zip(counts.accepted) {
            set(&self.accepted_by_position.get_or_create(&Position { position }), value);
        }
        self.tokens_per_second.set(status.tokens_per_second);
        self.bytes_per_second.set(status.bytes_per_second);
        self.bandwidth_fraction.set(status.bytes_per_second / self.bandwidth.max(1.0));
        for (i, rank) in ranks.iter().enumerate() {
            let label = Rank { rank: i as u32 };
            self.rank_layers.get_or_create(&label).set(rank.layers.len() as i64);
            self.rank_weights.get_or_create(&label).set(rank.weight_bytes as i64);
            self.rank_cache.get_or_create(&label).set(rank.cache_bytes as i64);
            self.rank_cache_used.get_or_create(&label).set(status.cache_bytes_used(rank) as i64);
            set(&self.rank_rows.get_or_create(&label), rank.rows);
            let busy = self.rank_busy.get_or_create(&label);
            busy.inner().store(rank.busy.as_secs_f64().to_bits(), Ordering::Relaxed);
            let usage = rank.spent.usage;
            set(&self.rank_faults.get_or_create(&label), usage.major_faults);
            if let Some(ppm) = usage.resident_ppm {
                self.rank_resident.get_or_create(&label).set(ppm as f64 / 1e6);
            }
        }
        let mut text = String::new();
        // Writing to a string cannot fail.
        let registries = [&self.registry, &self.vllm];
        let _ = registries.iter().try_for_each(|r| encode_registry(&mut text, r)).and_then(|()| encode_eof(&mut text));
        text
    }
}

/// A count that the engine keeps; it begins again with a new engine.
fn set(counter: &Counter, value: u64) {
    counter.inner().store(value, Ordering::Relaxed);
}
