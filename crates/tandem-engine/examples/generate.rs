//! Loads a model directory on the CPU and continues a prompt of token ids, always with the likeliest token.
//!
//!     cargo run --release -p tandem-llm-engine --example generate -- models/fable-30m-MXFP4-Q8 2,4,7,216,648
//!
//! Text to ids and back is tandem-text's work; this example shows the engine alone.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use tandem_core::{Checkpoint, ModelConfig};
use tandem_cpu::{CpuBackend, system};
use tandem_engine::{BlockManager, Engine, ModelRunner, Request};
use tandem_model::Limits;

/// Tokens of context.
const CONTEXT: usize = 512;
/// Prompt tokens run at once.
const CHUNK: usize = 128;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, ids] = args.as_slice() else {
        return Err("usage: generate MODEL_DIR ID,ID,...".into());
    };
    let dir = Path::new(dir);
    let prompt: Vec<u32> = ids.split(',').map(|id| id.trim().parse()).collect::<Result<_, _>>()?;

    let config = ModelConfig::load(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let limits = Limits { max_rows: CHUNK, max_logits_rows: 1 };
    let backend = CpuBackend::new(system::default_threads(), CpuBackend::default_numerics());
    let model = tandem_model::load(&backend, &config, &checkpoint, limits, &mut |_| {})?;

    let blocks = BlockManager::for_tokens(CONTEXT);
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, blocks.n_slots());
    let mut engine = Engine::new(Box::new(runner), blocks, CONTEXT, config.max_position_embeddings);

    // The default sampling has temperature 0: always the likeliest token.
    let request = Request { prompt, max_tokens: 32, eos: config.eos_token_id, ..Request::default() };
    let mut tokens = vec![];
    let generated = engine.generate(request, |token| {
        tokens.push(token);
        ControlFlow::Continue(())
    })?;
    println!("{tokens:?} ({})", generated.finish_reason.name());
    Ok(())
}
