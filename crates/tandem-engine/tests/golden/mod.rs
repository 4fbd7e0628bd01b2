//! Every fixture checkpoint against the logits of an independent implementation, for any backend.
//!
//! `tests/golden/models` is in the repository; set `TANDEM_FIXTURES` to a folder of more checkpoints of the same form.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use tandem_core::{Backend, Checkpoint, ModelConfig};
use tandem_engine::{BlockManager, Engine, Logits, ModelRunner, Sequence};
use tandem_model::Limits;

/// Largest difference allowed in f32: tests/golden/README.md.
const TOLERANCE: f32 = 5e-4;

/// The only golden whose logits are not kept: tests/golden/README.md.
const WITHOUT_LOGITS: &str = "glm52_cut p0";

struct Golden {
    name: String,
    tokens: Vec<u32>,
    /// `[n, vocab]`; only [`WITHOUT_LOGITS`] has none.
    logits: Option<Vec<f32>>,
    greedy: Vec<u32>,
}

fn fixtures() -> Vec<PathBuf> {
    // A test binary that was carried to another machine runs in a clone's root.
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
    let mut roots = vec![if here.exists() { here } else { PathBuf::from("tests/golden/models") }];
    roots.extend(std::env::var_os("TANDEM_FIXTURES").map(PathBuf::from));
    let mut dirs: Vec<PathBuf> = roots
        .iter()
        .flat_map(|root| std::fs::read_dir(root).expect("a folder of checkpoints"))
        .map(|entry| entry.expect("readable").path())
        .filter(|dir| dir.join("golden.safetensors").exists())
        .collect();
    dirs.sort();
    assert!(dirs.len() >= 7, "found {dirs:?}");
    dirs
}

fn goldens(dir: &Path) -> Vec<Golden> {
    let data = std::fs::read(dir.join("golden.safetensors")).expect("golden.safetensors");
    let tensors = SafeTensors::deserialize(&data).expect("safetensors");
    let u32s = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).unwrap_or_else(|_| panic!("{name}")).data().to_vec();
        data.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    };
    let f32s = |name: &str| -> Option<Vec<f32>> {
        let data = tensors.tensor(name).ok()?.data().to_vec();
        Some(data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect())
    };
    let model = dir.file_name().expect("named").to_string_lossy();
    (0..3)
        .map(|p| {
            let name = format!("{model} p{p}");
            let logits = f32s(&format!("p{p}.logits"));
            assert_eq!(logits.is_none(), name == WITHOUT_LOGITS, "{name}: logits are missing, or no longer are");
            let (tokens, greedy) = (u32s(&format!("p{p}.tokens")), u32s(&format!("p{p}.greedy")));
            Golden { name, tokens, logits, greedy }
        })
        .collect()
}

fn engine<B: Backend + 'static>(dir: &Path, backend: B) -> Engine {
    let config = ModelConfig::load(dir).expect("config.json");
    let checkpoint = Checkpoint::open(dir).expect("weights");
    let limits = Limits { max_rows: 256, max_logits_rows: 256 };
    let model = tandem_model::load(&backend, &config, &checkpoint, limits, &mut |_| {}).expect("model");
    let blocks = BlockManager::for_tokens(512);
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, blocks.n_slots());
    Engine::new(Box::new(runner), blocks, 512, config.max_position_embeddings)
}

/// Compares logits with the reference at every position.
fn check(what: &str, found: &[f32], golden: &Golden) {
    let Some(expected) = &golden.logits else { return };
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    assert!(worst <= TOLERANCE, "{what}: logits differ by {worst}");
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Prefill in chunks of `chunk`, from position `decode_from` on one by one.
fn all_logits(engine: &mut Engine, tokens: &[u32], chunk: usize, decode_from: usize) -> Vec<f32> {
    let mut sequence = Sequence::default();
    let (prompt, rest) = tokens.split_at(decode_from.min(tokens.len()));
    let mut logits = vec![];
    for (part, chunk) in [(prompt, chunk), (rest, 1)] {
        if !part.is_empty() {
            logits.extend(engine.run(&mut sequence, part, chunk, Logits::All).expect("runs"));
        }
    }
    engine.release(&mut sequence);
    logits
}

/// How a prompt is run: a chunk of prefill, and the position from which on tokens are run one by one, for a prompt of so many tokens.
pub(crate) type Route = fn(usize) -> (usize, usize);

/// In one piece, in chunks of two sizes, one by one, and first in chunks, then one by one.
pub(crate) const ROUTES: [Route; 5] = [|n| (256, n), |n| (16, n), |n| (7, n), |_| (256, 0), |n| (5, n / 2)];

/// Logits of every path and greedy tokens, in single precision.
pub(crate) fn check_all<B: Backend + 'static>(backend: impl Fn() -> B) {
    check_some(backend, &ROUTES);
}

/// Logits of some of [`ROUTES`] and greedy tokens, in single precision.
pub(crate) fn check_some<B: Backend + 'static>(backend: impl Fn() -> B, routes: &[Route]) {
    for dir in fixtures() {
        let mut engine = engine(&dir, backend());
        for golden in goldens(&dir) {
            let n = golden.tokens.len();
            for (chunk, decode_from) in routes.iter().map(|route| route(n)) {
                let what = format!("{}, chunk {chunk}, decode from {decode_from}", golden.name);
                check(&what, &all_logits(&mut engine, &golden.tokens, chunk, decode_from), &golden);
            }
            let mut sequence = Sequence::default();
            let mut logits = engine.run(&mut sequence, &golden.tokens, 64, Logits::Last).expect("runs");
            let mut greedy = vec![];
            for _ in 0..golden.greedy.len() {
                let token = argmax(&logits);
                greedy.push(token);
                logits = engine.run(&mut sequence, &[token], 1, Logits::Last).expect("runs");
            }
            engine.release(&mut sequence);
            assert_eq!(greedy, golden.greedy, "{}", golden.name);
        }
    }
}

/// Largest error of the fast numerics, of root mean squares: rounding and what it makes selections do.
///
/// *Rounding*: between its two ends, a layer rounds about 12 operands (inputs of its products, cached vectors, queries,
/// shares). Each has the relative error `2^-9 / sqrt(3)` = 0.0011 in bf16, and `2.5 / 127 / sqrt(12)` = 0.0057 in 8 bits,
/// where a group of 32 normal values has its largest at 2.5 deviations. Errors add up as squares: in 6 layers,
/// sqrt(72) = 8.5 times that is 0.01 in bf16 and 0.05 in 8 bits.
///
/// *Selections*: the fixtures' weights are random, so that scores lie close together, and an error of a percent swaps
/// experts. A swapped one of 4 changes its block by `sqrt(2) / 4` of its size; a block is one of two in a layer, so that
/// swaps in all layers change the result by `1 / 4`, and swaps in a share `p` of them by `sqrt(p) / 4`. Neighbouring
/// scores of 16 experts differ by some 0.06 of their range, errors of both by up to 0.02: one layer in three swaps, which
/// is 0.14.
///
/// Together sqrt(0.05^2 + 0.14^2) = 0.15.
const FAST_ERROR: f64 = 0.15;

/// Smallest share of positions whose likeliest token stays. The two highest of 320 normal logits differ by an
/// exponentially distributed gap of `1 / sqrt(2 ln 320)` = 0.29 deviations in the mean. An error of 0.1, which is what
/// [`FAST_ERROR`] allows with half of the swaps, moves their difference by 0.14 and so changes their order at 0.15 of
/// the positions.
const FAST_AGREEMENT: f64 = 0.85;

/// Quality of the fast numerics.
pub(crate) fn check_fast<B: Backend + 'static>(numerics: &str, backend: impl Fn() -> B) {
    for dir in fixtures() {
        let mut engine = engine(&dir, backend());
        for golden in goldens(&dir) {
            let Some(expected) = &golden.logits else { continue };
            let n = golden.tokens.len();
            for (chunk, decode_from) in [(256, n), (7, n), (256, 0)] {
                let found = all_logits(&mut engine, &golden.tokens, chunk, decode_from);
                let square = |x: f32| f64::from(x) * f64::from(x);
                let error: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
                let size: f64 = expected.iter().map(|v| square(*v)).sum();
                let vocab = engine.vocab_size();
                let rows = found.chunks_exact(vocab).zip(expected.chunks_exact(vocab));
                let agree = rows.filter(|(a, b)| argmax(a) == argmax(b)).count() as f64 / n as f64;
                let relative = (error / size).sqrt();
                let what = format!("{} {numerics} chunk {chunk} decode from {decode_from}", golden.name);
                assert!(
                    relative <= FAST_ERROR && agree >= FAST_AGREEMENT,
                    "{what}: relative error {relative}, argmax agrees {agree}"
                );
            }
        }
    }
}
