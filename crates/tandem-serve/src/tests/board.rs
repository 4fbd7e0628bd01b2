//! Every metric that the Grafana board, the alert rules and docs/metrics.md ask for is one of this server's.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tandem_engine::RankStatus;

use super::Server;
use crate::Options;
use crate::worker::Status;

/// Metrics that a query names.
fn metrics(query: &str) -> Vec<&str> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words.filter(|word| word.starts_with("vllm:") || word.starts_with("tandem_")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_board_asks_for_metrics_that_there_are() {
    let server = Server::start();
    server.says("Hello there, says the fox.");
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    server.ok("/v1/chat/completions", &body).await;
    let (_, Value::String(page)) = server.get("/metrics").await else { panic!("no text") };
    // The engine of these tests has no ranks that say something.
    let mut rank = RankStatus::default();
    rank.spent.usage.resident_ppm = Some(1_000_000);
    let with_ranks = server.app.metrics.render(&Status::default(), &[rank]);
    let lines = page.lines().chain(with_ranks.lines()).filter(|line| !line.starts_with('#'));
    let samples: BTreeSet<&str> = lines.filter_map(|line| line.split(['{', ' ']).next()).collect();

    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../packaging/grafana/");
    let read = |name: &str| std::fs::read_to_string(format!("{folder}{name}")).expect("in the tree");
    let board: Value = serde_json::from_str(&read("tandem.json")).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let targets = panels.iter().filter(|panel| panel["type"] != "row").flat_map(|panel| {
        let targets = panel["targets"].as_array().expect("queries");
        assert!(!targets.is_empty(), "{panel}");
        targets.iter().map(|target| target["expr"].as_str().expect("a query").to_owned())
    });
    let rules_text = read("alerts.yml");
    let rules = rules_text.lines().filter_map(|line| line.trim().strip_prefix("expr: ").map(str::to_owned));
    let queries: Vec<String> = targets.chain(rules).collect();
    assert!(queries.len() > 35, "{}", queries.len());
    for query in queries {
        let names = metrics(&query);
        assert!(!names.is_empty(), "{query}");
        names.iter().for_each(|name| assert!(samples.contains(name), "{name} of {query} in\n{page}"));
    }
    // So is each that the book tells to watch, and each rule that it names.
    let book =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md")).expect("in the tree");
    let told = metrics(&book);
    assert!(told.len() > 12, "{told:?}");
    for name in told {
        assert!(samples.contains(name) || samples.contains(format!("{name}_count").as_str()), "{name} in\n{page}");
    }
    let words = book.split(|c: char| !c.is_ascii_alphanumeric());
    for rule in words.filter(|word| word.strip_prefix("Tandem").is_some_and(|rest| !rest.is_empty())) {
        assert!(rules_text.contains(&format!("alert: {rule}\n")), "{rule} is no rule");
    }
    // What the answer above was.
    for expected in [
        "vllm:request_success_total{model_name=\"fable\",finished_reason=\"length\"} 1",
        "vllm:request_generation_tokens_sum{model_name=\"fable\"} 4.0",
        "vllm:request_queue_time_seconds_count{model_name=\"fable\"} 1",
        "vllm:request_decode_time_seconds_count{model_name=\"fable\"} 1",
    ] {
        assert!(page.contains(expected), "{expected} in\n{page}");
    }
    assert!(metrics("rate(up[5m])").is_empty() && !samples.contains("vllm:no_such"));
}

/// Kubernetes' endpoint picker reads these, and sends no key.
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_picker_reads_the_metrics_without_a_key() {
    let keyed = Options { api_keys: vec!["secret".into()], ..Options::default() };
    for open_metrics in [false, true] {
        let server = Server::with(&Options { open_metrics, ..keyed.clone() });
        for path in ["/info", "/timings", "/v1/models", "/metrics/"] {
            assert_ne!(server.get(path).await.0, 200, "{path}");
        }
        let (status, page) = server.get("/metrics").await;
        assert_eq!(status, if open_metrics { 200 } else { 401 });
        let Some(page) = page.as_str().filter(|_| open_metrics) else { continue };
        for sample in [
            "vllm:num_requests_waiting{model_name=\"fable\"} 0",
            "vllm:num_requests_running{model_name=\"fable\"} 0",
            "vllm:kv_cache_usage_perc{model_name=\"fable\"} 0.0",
        ] {
            assert!(page.lines().any(|line| line == sample), "{sample} in\n{page}");
        }
        let config = "vllm:cache_config_info{model_name=\"fable\",block_size=\"64\",num_gpu_blocks=\"";
        let configs: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix(config)).collect();
        assert!(configs.len() == 1 && configs[0].ends_with("\"} 1"), "{configs:?} in\n{page}");
    }
}
