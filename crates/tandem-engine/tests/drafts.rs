//! Drafts of real models: the multi-token-prediction layer against the reference, and texts with drafts and without.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tandem_core::{Batch, Checkpoint, ModelConfig};
use tandem_cpu::{CpuBackend, Numerics};
use tandem_engine::{
    BlockManager, Counters, DraftDepth, Drafter, Engine, Event, ModelRunner, Request, Runner, SamplingParams,
};
use tandem_model::{CheckpointWeights, Limits, MtpSource, Share, load_drafting};

const N_SLOTS: usize = 2048;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn fable_dir() -> PathBuf {
    root().join("models/fable-30m-MXFP4-Q8")
}

/// A runner with the multi-token-prediction layer of a checkpoint, if `drafts`.
fn runner(dir: &Path, numerics: Numerics, limits: Limits, drafts: bool) -> ModelRunner<CpuBackend> {
    let config = ModelConfig::load(dir).expect("config.json");
    let checkpoint = Checkpoint::open(dir).expect("weights");
    let weights = tandem_model::resolve(&checkpoint, &config).expect("resolves");
    let source = CheckpointWeights::new(&checkpoint, weights.clone());
    let mtp = if drafts { MtpSource::new(&config, &source, &weights) } else { None };
    runner_with(&config, &source, mtp, numerics, limits)
}

fn runner_with(
    config: &ModelConfig,
    source: &CheckpointWeights<'_>,
    mtp: Option<MtpSource<'_>>,
    numerics: Numerics,
    limits: Limits,
) -> ModelRunner<CpuBackend> {
    let (backend, share) = (CpuBackend::new(2, numerics), Share::whole(config));
    let model = load_drafting(&backend, config, source, share, limits, mtp, &mut |_| {}).expect("loads");
    ModelRunner::new(backend, model, limits, config.vocab_size, N_SLOTS)
}

fn i32s(tensors: &SafeTensors<'_>, name: &str) -> Vec<u32> {
    let data = tensors.tensor(name).expect("in the golden file").data().to_vec();
    data.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
}

/// Row i has the hidden state of token i and token i + 1, and drafts token i + 2; in one piece, and cut anywhere.
#[test]
fn the_layer_drafts_what_the_reference_does() {
    let mut dirs = vec![root().join("tests/golden/models/glm51_hf_tiny_mtp")];
    let fixtures = std::env::var_os("TANDEM_FIXTURES").map(|dir| PathBuf::from(dir).join("glm51_mtp_tiny"));
    dirs.extend(fixtures.filter(|dir| dir.exists()));
    for dir in dirs {
        let data = std::fs::read(dir.join("golden.safetensors")).expect("golden.safetensors");
        let tensors = SafeTensors::deserialize(&data).expect("safetensors");
        let (tokens, expected) = (i32s(&tensors, "p1.mtp_seq"), i32s(&tensors, "p1.mtp_draft"));
        for chunk in [expected.len(), 7, 1] {
            let limits = Limits { max_rows: 128, max_logits_rows: 128 };
            let mut runner = runner(&dir, Numerics::F32, limits, true);
            let mut drafts = vec![];
            for first in (0..expected.len()).step_by(chunk) {
                let n = chunk.min(expected.len() - first);
                let batch = |tokens: &[u32]| Batch {
                    tokens: tokens.to_vec(),
                    positions: (first as u32..(first + n) as u32).collect(),
                    sequences: vec![0; n],
                    block_tables: vec![vec![0, 1, 2]],
                    logits_rows: (0..n as u32).collect(),
                    sampling: vec![],
                };
                runner.step(batch(&tokens[first..first + n]), &mut vec![]).expect("runs");
                let hidden = Drafter::hidden(&runner).to_vec();
                drafts.extend(runner.draft(batch(&tokens[first + 1..first + 1 + n]), &hidden).expect("drafts").tokens);
            }
            assert_eq!(drafts, expected, "{} in chunks of {chunk}", dir.display());
        }
    }
}

/// The numbers of generate/gen_deepseek_mtp.py: whole multiples of 1/4096.
fn filled(n: usize, seed: u64, scale: f32, offset: f32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % 2001) as f32 - 1000.0
    };
    (0..n).map(|_| next() * scale / 4096.0 + offset).collect()
}

/// A directory with the layer alone that gen_deepseek_mtp.py describes: layer 3 at 4, and what [`filled`] gives.
fn write_deepseek_mtp(main: &Path, dir: &Path) {
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(main.join("config.json")).expect("there")).expect("JSON");
    let moved = |name: &str| name.replacen("model.layers.3.", "model.layers.4.", 1);
    for section in ["quantization", "quantization_config"] {
        let section = config[section].as_object_mut().expect("a section");
        let of_layer: Vec<_> = section.iter().filter(|(name, _)| name.starts_with("model.layers.3.")).collect();
        let of_layer: Vec<_> = of_layer.into_iter().map(|(name, value)| (moved(name), value.clone())).collect();
        section.extend(of_layer);
    }
    std::fs::write(dir.join("config.json"), config.to_string()).expect("writable");
    let hidden = config["hidden_size"].as_u64().expect("a number") as usize;
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = vec![];
    for file in 1..=3 {
        let data = std::fs::read(main.join(format!("model-{file:05}-of-00003.safetensors"))).expect("there");
        for (name, view) in SafeTensors::deserialize(&data).expect("safetensors").tensors() {
            if name.starts_with("model.layers.3.") {
                tensors.push((moved(&name), view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            }
        }
    }
    let mut add = |name: &str, shape: Vec<usize>, values: Vec<f32>| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.push((format!("model.layers.4.{name}.weight"), Dtype::F32, shape, bytes));
    };
    for (seed, name) in [(1, "enorm"), (2, "hnorm"), (3, "shared_head.norm")] {
        add(name, vec![hidden], filled(hidden, seed, 1.0, 1.0));
    }
    add("eh_proj", vec![hidden, 2 * hidden], filled(2 * hidden * hidden, 4, 1.0, 0.0));
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("writable");
}

/// DeepSeek's layer gets its own output back, as it is, for each further draft.
#[test]
fn deepseeks_layer_drafts_as_the_reference_by_recurrence() {
    let main = root().join("tests/golden/models/dsv32_tiny");
    let dir = tempfile::tempdir().expect("a directory");
    write_deepseek_mtp(&main, dir.path());
    let config = ModelConfig::load(dir.path()).expect("config.json");
    let checkpoints = [&main, dir.path()].map(|dir| Checkpoint::open(dir).expect("opens"));
    let weights = tandem_model::resolve(&checkpoints[0], &config).expect("resolves");
    let mtp_weights = tandem_model::resolve_mtp(&checkpoints[1], &config).expect("resolves");
    let source = CheckpointWeights::new(&checkpoints[0], weights);
    let mtp_source = CheckpointWeights::new(&checkpoints[1], mtp_weights.clone());
    let text = std::fs::read_to_string(root().join("tests/golden/units/deepseek_mtp.json")).expect("the golden file");
    let golden: Value = serde_json::from_str(&text).expect("JSON");
    let (mut n_drafts, mut n_other) = (0, 0);
    for case in golden["cases"].as_array().expect("cases") {
        let mtp = MtpSource::new(&config, &mtp_source, &mtp_weights);
        let limits = Limits { max_rows: 64, max_logits_rows: 8 };
        let mut runner = runner_with(&config, &source, mtp, Numerics::F32, limits);
        let mut tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).expect("ids");
        let mut hidden =
            filled(tokens.len() * config.hidden_size, 100 + case["seed"].as_u64().expect("a seed"), 4.0, 0.0);
        let mut first = 0;
        for (i, expected) in case["drafts"].as_array().expect("drafts").iter().enumerate() {
            let batch = Batch {
                positions: (first..first + tokens.len() as u32).collect(),
                sequences: vec![0; tokens.len()],
                block_tables: vec![vec![0]],
                logits_rows: vec![tokens.len() as u32 - 1],
                tokens: std::mem::take(&mut tokens),
                sampling: vec![],
            };
            first += batch.tokens.len() as u32;
            let drafted = runner.draft(batch, &hidden).expect("drafts");
            assert_eq!(json!(drafted.tokens[0]), expected["token"], "draft {i} of {case}");
            let fed_back: Vec<f32> = serde_json::from_value(expected["fed_back"].clone()).expect("numbers");
            for (found, expected) in drafted.hidden.iter().zip(&fed_back) {
                // The file has five digits; sums of f32 over a few hundred terms lose about as much.
                assert!((found - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{found} and {expected}");
            }
            n_drafts += 1;
            n_other += usize::from(case["drafts_if_normalised"][i] != expected["token"]);
            (tokens, hidden) = (drafted.tokens, drafted.hidden);
        }
    }
    assert!(n_drafts >= 24 && n_other >= 3, "{n_other} of {n_drafts} tell the rules apart");
}

/// Chats that fable-30m was trained on, as token ids: the goldens' prompts.
fn prompts() -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(root().join("tests/golden/fable-30m/golden.json")).expect("golden.json");
    let golden: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let mut found = vec![];
    collect(&golden, &mut found);
    assert!(found.len() >= 7, "{}", found.len());
    // The other version's are the same.
    found.truncate(7);
    found
}

/// Every list of ids under the name `prompt_ids`.
fn collect(value: &serde_json::Value, found: &mut Vec<Vec<u32>>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value.as_array()) {
                    ("prompt_ids", Some(ids)) => {
                        found.push(ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect());
                    }
                    _ => collect(value, found),
                }
            }
        }
        serde_json::Value::Array(list) => list.iter().for_each(|value| collect(value, found)),
        _ => {}
    }
}

/// The texts of all prompts, which run together, and what it took.
fn texts(numerics: Numerics, depth: DraftDepth, temperature: f32) -> (Vec<Vec<u32>>, Counters) {
    let limits = Limits { max_rows: 64, max_logits_rows: 64 };
    let runner = runner(&fable_dir(), numerics, limits, depth != DraftDepth::OFF);
    let blocks = BlockManager::for_tokens(N_SLOTS);
    let mut engine = Engine::new(Box::new(runner), blocks, 512, 2048).with_drafts(depth);
    let prompts = prompts();
    let mut ids = vec![];
    for (i, prompt) in prompts.into_iter().enumerate() {
        let sampling = SamplingParams { temperature, seed: Some(i as u64), ..SamplingParams::default() };
        let request = Request { prompt, sampling, max_tokens: 48, ..Request::default() };
        ids.push(engine.submit(request).expect("takes it"));
    }
    let (mut texts, mut outputs) = (vec![vec![]; ids.len()], vec![]);
    while engine.n_running() + engine.n_waiting() > 0 {
        engine.step(&mut outputs).expect("runs");
        for output in outputs.drain(..) {
            if let (Event::Token { id, .. }, Some(i)) = (output.event, ids.iter().position(|id| *id == output.request))
            {
                texts[i].push(id);
            }
        }
    }
    (texts, engine.counters())
}

#[test]
fn fable_says_the_same_in_fewer_steps() {
    for numerics in [Numerics::F32, Numerics::Bf16, Numerics::Int8] {
        let (plain, plain_counters) = texts(numerics, DraftDepth::OFF, 0.0);
        let all = [DraftDepth::Fixed(3), DraftDepth::Fixed(1), DraftDepth::Auto];
        for depth in if numerics == Numerics::Bf16 { all.to_vec() } else { all[..1].to_vec() } {
            let (drafted, counters) = texts(numerics, depth, 0.0);
            assert_eq!(drafted, plain, "{numerics:?}, depth {depth}");
            let DraftDepth::Fixed(depth) = depth else { continue };
            let drafts = counters.mtp_drafts;
            let share = |i: usize| drafts.accepted[i] as f64 / drafts.drafts as f64;
            let shares: Vec<f64> = (0..depth).map(share).collect();
            let (steps, plain_steps) = (counters.steps, plain_counters.steps);
            eprintln!("{numerics:?}, depth {depth}: {shares:.3?} accepted, {steps} of {plain_steps} steps");
            // It agrees with the model on 98 % of next tokens of its training's texts.
            assert!(share(0) > 0.8, "{}", share(0));
            assert!(steps * 10 < plain_steps * if depth == 1 { 8 } else { 7 });
        }
    }
    let (plain, _) = texts(Numerics::Bf16, DraftDepth::OFF, 0.8);
    assert_eq!(texts(Numerics::Bf16, DraftDepth::Fixed(4), 0.8).0, plain, "with seeds");
}
