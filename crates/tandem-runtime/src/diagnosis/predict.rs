//! How fast a model should be on this machine: its own shapes and formats are timed on a few layers of random weights, and
//! the times of every kind of operation are multiplied by how often the model does it. Nothing is assumed about kernels.

use std::time::Instant;

use anyhow::Context;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tandem_core::backend::PAGE_SIZE;
use tandem_core::weights::{ModuleKind, Weight};
use tandem_core::{Batch, DType, ModelConfig};
use tandem_cpu::bandwidth::ReadMeter;
use tandem_engine::Operation;
use tandem_model::{Limits, Recipe, Target};

use super::plans::PlanSpeed;
use crate::device::DeviceKind;
use crate::measured::{MeasuredModel, MeasuredOptions, times_ahead};
use crate::news::ignore_news;
use crate::options::{DeviceOptions, ParallelOptions, ShapeOptions};

/// How large a sample is.
#[derive(Clone, Copy)]
struct Size {
    /// A step must read this much, far more than caches hold, unless the model reads less.
    least_read: u64,
    /// Memory that the sample's weights may take, unless one layer of each kind takes more.
    most_resident: u64,
}

const ON_PROCESSOR: Size = Size { least_read: 512 << 20, most_resident: 3 << 30 };
/// What a step costs besides its layers must not count much, and weights are made fast.
const ON_GPU: Size = Size { least_read: 2 << 30, most_resident: 12 << 30 };
/// Read between two steps, as `bench` does: other memory than the model's is in the processor's caches then.
const PASS_BYTES: usize = 256 << 20;
/// Experts of a sampled layer, where the model has more: a token still meets others in every step.
const FEWEST_EXPERTS: usize = 32;
/// Decode steps, and the time for them.
const STEPS: (usize, usize) = (8, 64);
const DECODE_SECONDS: f64 = 1.5;
/// Prompts measured, and the time for more than the fewest.
const PROMPTS: (usize, usize) = (3, 15);
const PREFILL_SECONDS: f64 = 1.5;

/// What is expected.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Tokens of context.
    pub context: usize,
    /// Of one sequence.
    pub decode_tokens_per_second: f64,
    /// Tokens of a prompt that run at once.
    pub prefill_chunk: usize,
    /// Of a prompt of this length.
    pub prefill_tokens_per_second: f64,
    /// How they come about, a line each.
    pub reasoning: Vec<String>,
    /// Expected milliseconds of a decode step by operation.
    pub decode_ms: Vec<(String, f64)>,
    /// Expected milliseconds of a whole chunk of a prompt by operation.
    pub prefill_ms: Vec<(String, f64)>,
    /// The ways to run it, with what they make one expect; on this machine alone comes first.
    pub plans: Vec<PlanSpeed>,
}

/// Counts that scale operations.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Counts {
    layers: f64,
    dense: f64,
    moe: f64,
    experts: f64,
}

impl Counts {
    fn of(config: &ModelConfig) -> Counts {
        let n = config.num_hidden_layers;
        let moe = (0..n).filter(|layer| config.is_sparse(*layer)).count() as f64;
        let experts = config.moe.as_ref().map_or(1, |moe| moe.n_routed_experts) as f64;
        Counts { layers: n as f64, dense: n as f64 - moe, moe, experts }
    }

    /// How often a model does an operation for each time that its sample does.
    fn factor(&self, sample: &Counts, operation: Operation) -> f64 {
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        match operation {
            Operation::Router | Operation::Experts => ratio(self.moe, sample.moe),
            Operation::DenseMlp => ratio(self.dense, sample.dense),
            Operation::LmHead => 1.0,
            _ => ratio(self.layers, sample.layers),
        }
    }
}

/// The part of a model that is timed.
struct Sample {
    /// Its config.json.
    text: String,
    config: ModelConfig,
    recipe: Recipe,
}

/// Predicts a model with this config.json and these weights, at `context` tokens.
///
/// # Errors
/// The configuration cannot be cut, or the device failed.
pub fn predict(
    text: &str,
    weights: &[Weight],
    device: &DeviceOptions,
    context: usize,
    chunk: usize,
) -> anyhow::Result<Prediction> {
    let whole = ModelConfig::parse(text)?;
    let size = if DeviceKind::choose(device)? == DeviceKind::Cpu { ON_PROCESSOR } else { ON_GPU };
    let sample = sample(text, &whole, weights, size)?;
    let (of_model, of_sample) = (Counts::of(&whole), Counts::of(&sample.config));
    // Rows per expert as in the model, where the sample has fewer experts.
    let fewer = of_sample.experts / of_model.experts;
    let expert_rows = ((chunk as f64 * fewer).round() as usize).clamp(1, chunk);
    let length = context.max(chunk) + 1;
    let n_slots = length.next_multiple_of(PAGE_SIZE);
    let options = MeasuredOptions {
        model: None,
        shapes: ShapeOptions { dummy: true, ..ShapeOptions::default() },
        quant: sample.recipe.clone(),
        lock: false,
        device: device.clone(),
        parallel: ParallelOptions::default(),
        sync_every: 1,
    };
    let limits = Limits { max_rows: chunk, max_logits_rows: 1 };
    let mut timed = Timed {
        model: MeasuredModel::of_text(&options, sample.text, limits, length, n_slots, &mut ignore_news)?,
        pages: (0..(n_slots / PAGE_SIZE) as u32).collect(),
        random: 1,
    };
    timed.model.fill_cache(n_slots)?;
    let decode = timed.decode(context)?;
    let prefill = timed.prefill(chunk)?;
    let expert_prefill = if expert_rows < chunk { timed.prefill(expert_rows)? } else { prefill.clone() };
    let name = |i: usize| Operation::ALL[i].name().to_string();
    let scaled = |times: &[f64], i: usize| times[i] * of_model.factor(&of_sample, Operation::ALL[i]);
    let decode_ms: Vec<(String, f64)> = (0..decode.len()).map(|i| (name(i), scaled(&decode, i))).collect();
    let of_prompt = |i: usize| match Operation::ALL[i] {
        Operation::Experts => scaled(&expert_prefill, i) / fewer,
        _ => scaled(&prefill, i),
    };
    let by_operation: Vec<(String, f64)> = (0..prefill.len()).map(|i| (name(i), of_prompt(i))).collect();
    let prefill_ms: f64 = by_operation.iter().map(|(_, ms)| ms).sum();
    let step_ms: f64 = decode_ms.iter().map(|(_, ms)| ms).sum();
    let largest = decode_ms.iter().max_by(|a, b| a.1.total_cmp(&b.1)).context("there are operations")?;
    let reasoning = vec![
        format!(
            "timed: {} of {} layers ({} of {} with experts, {} of {} experts each), random weights of the same formats",
            of_sample.layers, of_model.layers, of_sample.moe, of_model.moe, of_sample.experts, of_model.experts
        ),
        format!("a decode step takes {step_ms:.1} ms, {:.1} ms of it in {}", largest.1, largest.0),
        format!("{chunk} tokens of prompt take {prefill_ms:.0} ms"),
    ];
    Ok(Prediction {
        context,
        decode_tokens_per_second: 1e3 / step_ms,
        prefill_chunk: chunk,
        prefill_tokens_per_second: chunk as f64 * 1e3 / prefill_ms,
        reasoning,
        decode_ms,
        prefill_ms: by_operation,
        plans: vec![],
    })
}

/// Cuts a model down to layers of each kind that are worth timing, in the formats of its weights.
fn sample(text: &str, whole: &ModelConfig, weights: &[Weight], size: Size) -> anyhow::Result<Sample> {
    let n = whole.num_hidden_layers;
    let bytes = |layer: usize| -> (u64, u64) {
        let of_layer = weights.iter().filter(|w| w.spec.layer == Some(layer));
        of_layer.fold((0, 0), |(held, read), w| {
            let bytes = w.bytes() as u64;
            (held + bytes, read + w.spec.read_per_token(bytes))
        })
    };
    let n_dense = (0..n).take_while(|layer| !whole.is_sparse(*layer)).count();
    let n_moe = n - n_dense;
    let experts = whole.moe.as_ref().map(|moe| moe.n_routed_experts);
    let (moe_held, moe_read) = if n_moe > 0 { bytes(n_dense) } else { (0, 0) };
    let (dense_held, dense_read) = if n_dense > 0 { bytes(0) } else { (0, 0) };
    // Fewer experts make a layer small enough; groups of experts stay whole.
    let mut n_experts = experts;
    if let (Some(all), Some(moe)) = (experts, &whole.moe)
        && moe_held > size.most_resident / 2
    {
        let step = all / FEWEST_EXPERTS.min(all).max(1);
        n_experts = Some(all / step.max(1)).filter(|n| *n >= 2 * moe.num_experts_per_tok && all.is_multiple_of(*n));
        n_experts = n_experts.or(Some(all));
    }
    let shrink = n_experts.zip(experts).map_or(1.0, |(some, all)| some as f64 / all as f64);
    let moe_held = (moe_held as f64 * shrink) as u64;
    let (mut dense, mut moe) = (n_dense.min(1), n_moe.min(1));
    loop {
        let (read, held) =
            (dense as u64 * dense_read + moe as u64 * moe_read, dense as u64 * dense_held + moe as u64 * moe_held);
        let is_whole = dense == n_dense && moe == n_moe;
        if is_whole || read >= size.least_read || (held >= size.most_resident && dense + moe >= 2) {
            break;
        }
        // In the model's own proportion.
        if moe < n_moe && (dense == n_dense || moe * n_dense <= dense * n_moe) { moe += 1 } else { dense += 1 }
    }
    let mut map: Map<String, Value> = serde_json::from_str(text).context("the configuration is not a JSON object")?;
    map.insert("num_hidden_layers".into(), json!(dense + moe));
    if experts.is_some() {
        map.remove("mlp_layer_types");
        map.insert("first_k_dense_replace".into(), json!(dense));
        map.insert("n_routed_experts".into(), json!(n_experts));
    }
    if let Some(Value::Array(list)) = map.get_mut("indexer_types") {
        list.truncate(dense + moe);
    }
    if let Some(Value::String(pattern)) = map.get_mut("index_topk_pattern") {
        pattern.truncate(dense + moe);
    }
    let text = serde_json::to_string(&map)?;
    let config = ModelConfig::parse(&text).context("a few layers of the model")?;
    // Layers of the sample stand for the first of their kind.
    let stands_for = |layer: usize| if layer < dense { layer } else { layer - dense + n_dense };
    let target = |dtype: DType| match dtype {
        DType::Float(float) => Target::Float(float),
        DType::Affine { bits, group_size, .. } => Target::Affine { bits, group_size },
        other => Target::Block(other),
    };
    let mut rules = vec![];
    for weight in weights.iter().filter(|w| w.spec.kind != ModuleKind::Mtp) {
        let module = &weight.spec.module;
        let Some(layer) = weight.spec.layer else {
            rules.push((module.clone(), target(weight.dtype)));
            continue;
        };
        for l in (0..dense + moe).filter(|l| stands_for(*l) == layer) {
            let renamed = module.replacen(&format!(".layers.{layer}."), &format!(".layers.{l}."), 1);
            rules.push((renamed, target(weight.dtype)));
        }
    }
    let keep = Target::Float(tandem_core::Float::BF16);
    let recipe = Recipe { name: "the checkpoint's formats".to_string(), rules, experts: keep, rest: keep };
    Ok(Sample { text, config, recipe })
}

/// A sample that runs.
struct Timed {
    model: MeasuredModel,
    pages: Vec<u32>,
    random: u64,
}

impl Timed {
    /// splitmix64.
    fn token(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % self.model.config.vocab_size as u64) as u32
    }

    fn batch(&mut self, first: usize, n: usize) -> Batch {
        Batch {
            tokens: (0..n).map(|_| self.token()).collect(),
            positions: (first as u32..(first + n) as u32).collect(),
            sequences: vec![0; n],
            block_tables: vec![self.pages.clone()],
            logits_rows: vec![n as u32 - 1],
            sampling: vec![],
        }
    }

    fn step(&mut self, first: usize, n: usize) -> anyhow::Result<f64> {
        let batch = self.batch(first, n);
        let start = Instant::now();
        self.model.runner.step(batch, &mut vec![])?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// Milliseconds by operation of a decode step: their proportions are profiled, their sum is the median step's.
    fn decode(&mut self, context: usize) -> anyhow::Result<Vec<f64>> {
        for _ in 0..3 {
            self.step(context, 1)?;
        }
        let samples = self.model.runner.device_sampler().is_some();
        let times = if samples { self.steps_ahead(context)? } else { self.steps_between_passes(context)? };
        self.profiled(median(times), STEPS.0, context, 1)
    }

    /// Of a device that has the next step before the token of the last is known.
    fn steps_ahead(&mut self, context: usize) -> anyhow::Result<Vec<f64>> {
        let mut batches: Vec<Batch> = (0..STEPS.1 + 2 * STEPS.0).map(|_| self.batch(context, 1)).collect();
        let sampler = self.model.runner.device_sampler().context("the device samples")?;
        times_ahead(sampler, STEPS.0, STEPS.1, || batches.pop().unwrap_or_default())
    }

    /// Of one that begins with the token: other memory is read in between.
    fn steps_between_passes(&mut self, context: usize) -> anyhow::Result<Vec<f64>> {
        let pool = self.model.runner.pool();
        let meter = pool.as_deref().map(|pool| ReadMeter::new(pool, PASS_BYTES));
        let (mut times, start) = (vec![], Instant::now());
        while times.len() < STEPS.0 || (times.len() < STEPS.1 && start.elapsed().as_secs_f64() < DECODE_SECONDS) {
            meter.as_ref().map(ReadMeter::pass);
            times.push(self.step(context, 1)?);
        }
        Ok(times)
    }

    /// The same of a prompt.
    fn prefill(&mut self, n: usize) -> anyhow::Result<Vec<f64>> {
        self.step(0, n)?;
        let (mut times, start) = (vec![], Instant::now());
        while times.len() < PROMPTS.0 || (times.len() < PROMPTS.1 && start.elapsed().as_secs_f64() < PREFILL_SECONDS) {
            times.push(self.step(0, n)?);
        }
        self.profiled(median(times), 1, 0, n)
    }

    fn profiled(&mut self, ms: f64, repetitions: usize, first: usize, n: usize) -> anyhow::Result<Vec<f64>> {
        self.model.runner.start(true)?;
        for _ in 0..repetitions {
            self.step(first, n)?;
        }
        let report = self.model.runner.stop()?.into_iter().next().context("one rank")?;
        let sum: f64 = report.operations.iter().sum();
        Ok(report.operations.iter().map(|operation| operation / sum * ms).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use tandem_model::{DummyWeights, Stacks};

    use super::*;
    use crate::presets;

    #[test]
    fn samples_have_the_formats_and_both_kinds_of_layer_of_their_models() {
        for (preset, quant) in [("glm-5.1", "mxfp4-q8"), ("deepseek-v3.2", "mxfp4"), ("llama-3.2-3b", "affine4")] {
            let text = presets::config_text(preset).unwrap().1;
            let config = ModelConfig::parse(&text).unwrap();
            let recipe = Recipe::parse(quant).unwrap();
            let weights = DummyWeights::new(&config, &recipe, Stacks::Distinct).weights().to_vec();
            let sample = sample(&text, &config, &weights, ON_PROCESSOR).unwrap();
            let (model, part) = (Counts::of(&config), Counts::of(&sample.config));
            assert!(part.layers < model.layers && (part.moe > 0.0) == (model.moe > 0.0), "{preset}: {part:?}");
            assert!((part.dense > 0.0) == (model.dense > 0.0), "{preset}: {part:?}");
            let made = DummyWeights::new(&sample.config, &sample.recipe, Stacks::Distinct);
            let held: u64 = made.weights().iter().map(|w| w.bytes() as u64).sum();
            assert!(held < 6 << 30, "{preset}: {held}");
            // The last layers are of the same kind, whatever their numbers.
            let formats = |weights: &[Weight], layer: usize| -> Vec<(String, DType)> {
                let end = |w: &Weight| w.spec.module.split_once(&format!("layers.{layer}.")).unwrap().1.to_string();
                weights.iter().filter(|w| w.spec.layer == Some(layer)).map(|w| (end(w), w.dtype)).collect()
            };
            let (last, last_made) = (config.num_hidden_layers - 1, sample.config.num_hidden_layers - 1);
            assert_eq!(formats(&weights, last), formats(made.weights(), last_made), "{preset}");
        }
    }
}
