//! Decode and prefill of made-up layers on a GPU, with the time of every kernel, as lines of JSON.
//!
//!     cargo run --release -p tandem-llm-wgpu --example layers -- CONFIG.json LAYERS [--device N] [--context N] [--prefill N]
//!         [--steps N] [--batch N] [--recipe NAME] [--budget-ms N]
//!         [--staged N] [--groups N] [--rows N] [--gate-rows N] [--tiles single|split|half]
//!
//! CONFIG.json gives the shapes (crates/tandem/src/presets); dense layers are left out and the vocabulary is 1024.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tandem_core::backend::{Backend, PAGE_SIZE};
use tandem_core::{Batch, ModelConfig};
use tandem_engine::{ModelRunner, Runner};
use tandem_model::{DummyWeights, Limits, Recipe, Stacks};
use tandem_wgpu::{Options, Tiles, Tuning, WgpuBackend};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, layers, ..] = args.as_slice() else {
        return Err("usage: layers CONFIG.json LAYERS [--flag VALUE]..".into());
    };
    let flag = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1));
    let number = |name: &str, default: usize| flag(name).map_or(Ok(default), |v| v.parse());
    let (context, prefill) = (number("--context", 512)?, number("--prefill", 512)?);
    let (steps, batch, budget) = (number("--steps", 50)?, number("--batch", 1)?, number("--budget-ms", 250)?);
    let usual = Tuning::default();
    let tuning = Tuning {
        staged_vectors: number("--staged", usual.staged_vectors)?,
        enough_groups: number("--groups", usual.enough_groups)?,
        most_rows: number("--rows", usual.most_rows)?,
        most_gate_rows: number("--gate-rows", usual.most_gate_rows)?,
    };
    let tiles = match flag("--tiles").map(String::as_str) {
        None => Tiles::default(),
        Some("single") => Tiles::Single,
        Some("split") => Tiles::Split,
        Some("half") => Tiles::Half,
        Some(other) => return Err(format!("--tiles {other}").into()),
    };
    let options = Options {
        tuning,
        tiles,
        device: flag("--device").cloned(),
        budget: Duration::from_millis(budget as u64),
        ..Options::default()
    };
    let config = shapes(Path::new(path), layers.parse()?)?;

    let backend = WgpuBackend::new(&options)?;
    let info = backend.info().clone();
    println!(
        "{}",
        json!({"adapter": info.name, "api": info.api, "driver": info.driver, "kind": info.kind, "features": info.features,
            "subgroup": [info.subgroup.0, info.subgroup.1], "max_binding_bytes": info.max_binding_bytes,
            "copy_gb_per_s": backend.bandwidth() / 1e9, "tiles": format!("{tiles:?}"),
            "cooperative": backend.is_cooperative()})
    );
    let copy = backend.bandwidth();
    let recipe = Recipe::parse(flag("--recipe").map_or("mxfp4-q8", String::as_str))?;
    let limits = Limits { max_rows: prefill.max(batch), max_logits_rows: batch.max(1) };
    let start = Instant::now();
    let source = DummyWeights::new(&config, &recipe, Stacks::Repeated);
    let model = tandem_model::load_from(&backend, &config, &source, limits, &mut |_| {})?;
    backend.sync()?;
    println!("{}", json!({"load_seconds": start.elapsed().as_secs_f64()}));
    let pages = (context.max(prefill) + steps * 2 + 64).div_ceil(PAGE_SIZE) + 1;
    let mut runner = ModelRunner::new(backend, model, limits, config.vocab_size, pages * batch * PAGE_SIZE);
    let tables: Vec<Vec<u32>> = (0..batch).map(|b| (0..pages).map(|p| (b * pages + p) as u32).collect()).collect();
    let mut logits = vec![];

    if prefill > 0 {
        let rows = Batch {
            tokens: (0..prefill as u32).map(|t| t % 1000).collect(),
            positions: (0..prefill as u32).collect(),
            sequences: vec![0; prefill],
            block_tables: vec![tables[0].clone()],
            logits_rows: vec![prefill as u32 - 1],
            sampling: vec![],
        };
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            let start = Instant::now();
            logits.clear();
            runner.step(rows.clone(), &mut logits)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        runner.backend().profile(true);
        logits.clear();
        runner.step(rows, &mut logits)?;
        println!("{}", json!({"prefill_tokens": prefill, "seconds": best, "tokens_per_second": prefill as f64 / best}));
        report(&runner, 1);
    }
    runner.fill_cache_random(&config, pages * batch * PAGE_SIZE, 1)?;
    let mut times = vec![];
    let mut encode = vec![];
    for step in 0..steps + 5 {
        let rows = Batch {
            tokens: (0..batch as u32).collect(),
            positions: vec![(context + step) as u32 - 1; batch],
            sequences: (0..batch as u32).collect(),
            block_tables: tables.clone(),
            logits_rows: (0..batch as u32).collect(),
            sampling: vec![],
        };
        let start = Instant::now();
        logits.clear();
        runner.step(rows, &mut logits)?;
        if step >= 5 {
            times.push(start.elapsed().as_secs_f64());
            encode.push(runner.backend().encoding_seconds());
        }
    }
    times.sort_by(f64::total_cmp);
    encode.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    runner.backend().profile(true);
    let before = runner.backend().bytes();
    for step in 0..5 {
        let rows = Batch {
            tokens: (0..batch as u32).collect(),
            positions: vec![(context + step) as u32; batch],
            sequences: (0..batch as u32).collect(),
            block_tables: tables.clone(),
            logits_rows: (0..batch as u32).collect(),
            sampling: vec![],
        };
        logits.clear();
        runner.step(rows, &mut logits)?;
    }
    let bytes = (runner.backend().bytes() - before) as f64 / 5.0;
    println!(
        "{}",
        json!({"decode_batch": batch, "context": context, "layers": config.num_hidden_layers, "seconds": median,
            "seconds_per_layer": median / config.num_hidden_layers as f64, "encoding_seconds": encode[encode.len() / 2],
            "bytes": bytes, "gb_per_s": bytes / median / 1e9, "of_copy": bytes / median / copy,
            "submissions": format!("{:?}", runner.backend().submission_stats()),
            "residency": format!("{:?}", runner.backend().residency())})
    );
    report(&runner, 5);
    Ok(())
}

/// The configuration with other layers and a small vocabulary.
fn shapes(path: &Path, layers: usize) -> Result<ModelConfig> {
    let mut config: Map<String, Value> = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    config.insert("num_hidden_layers".into(), json!(layers));
    config.insert("vocab_size".into(), json!(1024));
    config.insert("eos_token_id".into(), json!(0));
    config.remove("pad_token_id");
    config.remove("mlp_layer_types");
    config.remove("num_nextn_predict_layers");
    if config.contains_key("n_routed_experts") {
        config.insert("first_k_dense_replace".into(), json!(0));
    }
    Ok(ModelConfig::parse(&Value::Object(config).to_string())?)
}

/// Time, calls and bandwidth of every kernel, for one of `steps` steps.
fn report(runner: &ModelRunner<WgpuBackend>, steps: usize) {
    let times = runner.backend().kernel_times();
    let total: f64 = times.iter().map(|t| t.seconds).sum();
    println!("{}", json!({"kernels_seconds": total / steps as f64}));
    for t in times {
        println!(
            "{}",
            json!({"kernel": t.name, "calls": t.calls as f64 / steps as f64, "microseconds": t.seconds / steps as f64 * 1e6,
                "microseconds_each": t.seconds / t.calls as f64 * 1e6, "gb_per_s": t.bytes as f64 / t.seconds / 1e9,
                "share": t.seconds / total})
        );
    }
    runner.backend().profile(false);
}
