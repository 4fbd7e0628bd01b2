//! Every fixture checkpoint on a GPU or on software Vulkan, through every path. Without an adapter these tests say so and pass.

mod device;
#[allow(dead_code)]
#[path = "../../tandem-engine/tests/golden/mod.rs"]
mod golden;

use std::ops::ControlFlow;
use std::path::Path;

use golden::{ROUTES, check_some};
use tandem_core::{Backend, Checkpoint, ModelConfig};
use tandem_cpu::{CpuBackend, Numerics};
use tandem_engine::{BlockManager, Engine, ModelRunner, Request};
use tandem_model::Limits;
use tandem_wgpu::{Options, Tiles, WgpuBackend};

#[test]
fn single_precision_matches_the_reference_logits() {
    if device::skipped() {
        return;
    }
    let backend = WgpuBackend::new(&Options::default()).expect("a device");
    // Software takes its time: in one piece, and first in chunks, then one by one.
    let some = [ROUTES[0], ROUTES[4]];
    let routes = if backend.info().kind == "cpu" { &some[..] } else { &ROUTES[..] };
    check_some(|| backend.another(), routes);
}

#[test]
fn cooperative_matrices_match_the_reference_logits() {
    if device::skipped() {
        return;
    }
    let backend = WgpuBackend::new(&Options { tiles: Tiles::Split, ..Options::default() }).expect("a device");
    let software = backend.info().kind == "cpu";
    check_some(|| backend.another(), if software { &ROUTES[..1] } else { &ROUTES[..] });
}

/// The bundled model's likeliest continuation of its README's prompt.
fn story<B: Backend + 'static>(backend: B, n: usize) -> Vec<u32> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/fable-30m-MXFP4-Q8");
    let dir = if here.exists() { here } else { "models/fable-30m-MXFP4-Q8".into() };
    let (config, checkpoint) = (ModelConfig::load(&dir).expect("config"), Checkpoint::open(&dir).expect("weights"));
    let limits = Limits { max_rows: 64, max_logits_rows: 1 };
    let model = tandem_model::load(&backend, &config, &checkpoint, limits, &mut |_| {}).expect("loads");
    let blocks = BlockManager::for_tokens(256);
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, blocks.n_slots());
    let mut engine = Engine::new(Box::new(runner), blocks, 256, config.max_position_embeddings);
    let request = Request { prompt: vec![2, 4, 7, 216, 648], max_tokens: n, ..Request::default() };
    let mut tokens = vec![];
    engine
        .generate(request, |token| {
            tokens.push(token);
            ControlFlow::Continue(())
        })
        .expect("runs");
    tokens
}

#[test]
#[ignore = "takes software minutes"]
fn the_bundled_model_tells_the_processors_story_to_its_end() {
    if device::skipped() {
        return;
    }
    let (there, here) = (
        story(WgpuBackend::new(&Options::default()).expect("a device"), 250),
        story(CpuBackend::new(2, Numerics::F32), 250),
    );
    println!("{} tokens: {here:?}", here.len());
    assert_eq!(there, here);
}

#[test]
fn the_bundled_model_tells_the_processors_story() {
    if device::skipped() {
        return;
    }
    let backend = WgpuBackend::new(&Options::default()).expect("a device");
    let n = if backend.info().kind == "cpu" { 24 } else { 200 };
    assert_eq!(story(backend, n), story(CpuBackend::new(2, Numerics::F32), n));
}
