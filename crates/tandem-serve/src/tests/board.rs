//! Every metric that the Grafana board and the alert rules ask for is one of this server's.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Server;

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
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    let samples: BTreeSet<&str> = samples.filter_map(|line| line.split(['{', ' ']).next()).collect();
    // Counts of ranks are there once ranks have said something, which these have not.
    let declared: BTreeSet<&str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let is_there = |name: &str| {
        samples.contains(name)
            || declared.contains(name.strip_suffix("_total").unwrap_or(name)) && name.contains("_rank_")
    };

    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../packaging/grafana/");
    let read = |name: &str| std::fs::read_to_string(format!("{folder}{name}")).expect("in the tree");
    let board: Value = serde_json::from_str(&read("tandem.json")).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let targets = panels.iter().filter(|panel| panel["type"] != "row").flat_map(|panel| {
        let targets = panel["targets"].as_array().expect("queries");
        assert!(!targets.is_empty(), "{panel}");
        targets.iter().map(|target| target["expr"].as_str().expect("a query").to_owned())
    });
    let rules = read("alerts.yml");
    let rules = rules.lines().filter_map(|line| line.trim().strip_prefix("expr: ").map(str::to_owned));
    let queries: Vec<String> = targets.chain(rules).collect();
    assert!(queries.len() > 35, "{}", queries.len());
    for query in queries {
        let names = metrics(&query);
        assert!(!names.is_empty(), "{query}");
        names.iter().for_each(|name| assert!(is_there(name), "{name} of {query} in\n{page}"));
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
    assert!(metrics("rate(up[5m])").is_empty() && !is_there("vllm:no_such"));
}
