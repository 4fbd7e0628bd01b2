//! The tokens that a source is judged on: of a text that was given, else of its own.

use std::path::Path;

use tandem_core::ModelConfig;
use tandem_cpu::CpuBackend;
use tandem_engine::{BlockManager, Engine, Event, ModelRunner, Request, SamplingParams};
use tandem_model::{Limits, WeightSource};
use xxhash_rust::xxh3::xxh3_64;

use tandem_runtime::judge::Windows;
use tandem_runtime::{Meter, OnNews, Unit};
use tandem_text::Tokenizer;

/// Inputs per window of a plain text.
const WINDOW: usize = 512;
/// Tokens of a text that are used, at most.
const MAX_TOKENS: usize = 16_384;
/// Texts that a model writes, and tokens of each.
const WRITTEN: (usize, usize) = (64, 128);
/// Random tokens for a model that is too slow to write.
const RANDOM: usize = 8192;

/// Runs of tokens from a file.
pub(super) fn from_file(path: &Path, tokenizer: &Tokenizer) -> anyhow::Result<Vec<Vec<u32>>> {
    let mut left = MAX_TOKENS;
    let mut runs = Windows::new(path, tokenizer, WINDOW)?.0;
    for tokens in &mut runs {
        tokens.truncate(left);
        left -= tokens.len();
    }
    runs.retain(|tokens| tokens.len() > 1);
    Ok(runs)
}

/// Random tokens, each run one step: all weights are read a few times only.
pub(super) fn random(config: &ModelConfig) -> Vec<Vec<u32>> {
    let length = step_rows(config).min(config.max_position_embeddings);
    let tokens: Vec<u32> = (0..RANDOM).map(|i| any_token(i, config.vocab_size)).collect();
    tokens.chunks(length).map(<[u32]>::to_vec).collect()
}

/// What the model writes from random first tokens, all at the same time.
pub(super) fn written(
    config: &ModelConfig,
    source: &dyn WeightSource,
    backend: CpuBackend,
    on_news: OnNews<'_>,
) -> anyhow::Result<Vec<Vec<u32>>> {
    let (n, length) = (WRITTEN.0, WRITTEN.1.min(config.max_position_embeddings));
    let limits = Limits { max_rows: n, max_logits_rows: n };
    let model = tandem_model::load_from(&backend, config, source, limits, &mut |_| {})?;
    let blocks = BlockManager::for_tokens(n * length);
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, blocks.n_slots());
    let mut engine = Engine::new(Box::new(runner), blocks, length, config.max_position_embeddings);
    let mut runs = vec![];
    let mut ids = vec![];
    for i in 0..n {
        let first = any_token(i, config.vocab_size);
        let sampling = SamplingParams { temperature: 1.0, seed: Some(i as u64), ..SamplingParams::default() };
        ids.push(engine.submit(Request { prompt: vec![first], sampling, max_tokens: length, ..Request::default() })?);
        runs.push(vec![first]);
    }
    let meter = Meter::new("the model writes", Unit::Tokens, (n * length) as u64, on_news);
    let mut outputs = vec![];
    while engine.n_running() + engine.n_waiting() > 0 {
        engine.step(&mut outputs)?;
        meter.add(engine.last_step_rows() as u64);
        for output in outputs.drain(..) {
            match output.event {
                Event::Token { id, .. } => {
                    runs.iter_mut()
                        .zip(&ids)
                        .filter(|(_, id)| **id == output.request)
                        .for_each(|(run, _)| run.push(id));
                }
                Event::Failed(error) => return Err(error.into()),
                Event::Started { .. } | Event::Drafted { .. } | Event::Finished(_) => {}
            }
        }
    }
    meter.finish();
    Ok(runs)
}

fn any_token(i: usize, vocab_size: usize) -> u32 {
    (xxh3_64(&i.to_le_bytes()) % vocab_size as u64) as u32
}

/// Rows of a step: many, for weights that come from the disk in each, but 512 MB of logits at most.
pub(super) fn step_rows(config: &ModelConfig) -> usize {
    ((1 << 27) / config.vocab_size).clamp(128, 1024)
}
