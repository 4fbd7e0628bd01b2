//! `tandem bench` from the outside.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn tandem(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tandem"))
        .args(args)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
        .output()
        .expect("the binary starts")
}

fn json(args: &[&str]) -> Value {
    let output = tandem(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("stdout is one JSON object")
}

fn positive(value: &Value, field: &str) -> f64 {
    let number = value[field].as_f64().unwrap_or_else(|| panic!("{field} is not a number in {value}"));
    assert!(number > 0.0, "{field} is {number}");
    number
}

fn check_decode(value: &Value) {
    let median = positive(value, "decode_ms_median");
    assert!(positive(value, "decode_ms_p10") <= median && median <= positive(value, "decode_ms_p90"));
    for field in ["tokens_per_second", "achieved_gb_per_s", "bytes_per_step", "breakdown_total_ms"] {
        positive(value, field);
    }
    assert!(positive(value, "bandwidth_fraction") <= 1.0);
    let kinds = value["bytes_per_token"].as_object().expect("bytes by kind");
    let total = kinds["total"].as_u64().expect("total");
    let sum: u64 = kinds.iter().filter(|(k, _)| *k != "total").map(|(_, v)| v.as_u64().expect("bytes")).sum();
    assert!(total.abs_diff(sum) <= kinds.len() as u64);
    let rows = value["breakdown_ms"].as_object().expect("breakdown");
    let sum: f64 = rows.values().map(|v| v.as_f64().expect("ms")).sum();
    assert!((sum / positive(value, "breakdown_total_ms") - 1.0).abs() < 0.05);
}

#[test]
fn decode_of_the_bundled_model_crossing_index_topk() {
    let dir = tempfile::tempdir().expect("tempdir");
    let plot = dir.path().join("plot.svg");
    let plot = plot.to_str().expect("utf-8");
    let steps = ["--steps", "6", "--warmup", "1", "--json"];
    let value = json(&[&["bench", "decode", "--sweep-context", "64,1k", "--plot", plot][..], &steps].concat());
    for field in ["measured_bandwidth_gb_per_s", "threads", "resident_bytes"] {
        positive(&value, field);
    }
    for field in ["numerics", "isa", "model"] {
        assert!(value[field].is_string(), "{field}");
    }
    let sweep = value["sweep"].as_array().expect("points");
    assert_eq!(sweep.len(), 2);
    sweep.iter().for_each(check_decode);
    let of = |point: usize, kind: &str| sweep[point]["bytes_per_token"][kind].as_u64().expect("bytes");
    assert!(of(0, "indexer") < of(1, "indexer"), "index queries are read above index_topk only");
    assert_eq!(of(0, "routed_experts"), of(1, "routed_experts"));
    assert_eq!(sweep[0]["experts_read_per_layer"].as_f64(), Some(6.0));
    assert!(std::fs::read_to_string(plot).expect("plot").contains("</svg>"));

    let batch = json(&[&["bench", "decode", "--context", "32", "--batch", "3"][..], &steps].concat());
    check_decode(&batch);
    let experts = positive(&batch, "experts_read_per_layer");
    assert!((6.0..=18.0).contains(&experts), "{experts}");
}

#[test]
fn dummy_weights_need_no_checkpoint() {
    let shape = ["--config", "llama-3.2-3b", "--load-format", "dummy", "--num-layers", "1", "--vocab", "1024"];
    let steps = ["--steps", "2", "--warmup", "0", "--json"];
    let value = json(&[&["bench", "decode", "--context", "100"][..], &shape, &steps].concat());
    check_decode(&value);
    assert_eq!((value["quant"].as_str(), value["num_hidden_layers"].as_u64()), (Some("mxfp4-q8"), Some(1)));

    let chunks = ["--prompt-tokens", "12", "--prefill-chunk", "8", "--quant", "affine4"];
    let value = json(&[&["bench", "prefill"][..], &shape, &steps, &chunks].concat());
    for field in ["tokens_per_second", "achieved_gflop_per_s", "prefill_ms_median", "chunk_ms_median"] {
        positive(&value, field);
    }
}

#[test]
fn mistakes_are_explained() {
    for (args, expected) in [
        (&["bench", "decode", "--config", "glm-5.1"][..], "--load-format dummy"),
        (&["bench", "decode", "--vocab", "1024"], "--load-format dummy"),
        (&["bench", "decode", "--config", "glm-9", "--load-format", "dummy"], "glm-5.1, deepseek-v3.2"),
        (&["bench", "decode", "--context", "many"], "number of tokens"),
    ] {
        let output = tandem(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && stderr.contains(expected), "{args:?}: {stderr}");
    }
}

#[test]
fn ranks_decode_random_weights_and_say_where_the_time_goes() {
    let shapes = ["--load-format", "dummy", "--num-layers", "4", "--context", "32", "--steps", "3", "--json"];
    for (launch, flags) in [
        (&["launch", "--tp", "2", "--"][..], &["bench", "decode", "--sync-every", "2"][..]),
        (&[], &["bench", "decode", "--pp", "2", "--transport", "local"]),
        (&[], &["bench", "prefill", "--pp", "2", "--prompt-tokens", "64", "--transport", "local"]),
    ] {
        let output = tandem(&[launch, flags, &shapes].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        // So small a model may stay in the processor's cache, which is an error after the report.
        assert!(output.status.success() || said.contains("stay in the processor's cache"), "{flags:?}: {said}");
        let value: Value = serde_json::from_slice(&output.stdout).expect("stdout is one JSON object");
        positive(&value, "tokens_per_second");
        assert_eq!(value["weights"], "dummy");
        assert_eq!(value["ranks"].as_array().map(Vec::len), Some(2));
        let rows = value["breakdown_ms"].as_object().expect("breakdown");
        assert!(rows["communication"].is_number() && rows["waiting"].is_number());
        let sum: f64 = rows.values().map(|v| v.as_f64().expect("ms")).sum();
        assert!((sum / positive(&value, "breakdown_total_ms") - 1.0).abs() < 0.05, "{value}");
        if value["command"] == "decode" {
            assert_eq!(value["rank_ms"].as_array().map(Vec::len), Some(2));
            assert!(value["between_stages_ms"].is_number());
        }
    }
}
