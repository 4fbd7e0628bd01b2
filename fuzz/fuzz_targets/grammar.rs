//! A grammar, regular expression or schema of any text, as a request brings it: the server must answer, with tokens or with
//! the reason why not.

#![no_main]

use std::path::Path;
use std::sync::{Arc, OnceLock};

use axum::body::Body;
use axum::http::Request;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use tandem_core::Batch;
use tandem_engine::{BlockManager, Engine, EngineError, GenerationConfig, Runner};
use tandem_model::Limits;
use tandem_serve::{App, Model, Options, StepBytes, Worker, router};
use tandem_text::{Dialect, Tokenizer};
use tower::ServiceExt;

const CONTEXT: usize = 256;

/// Likes all tokens equally: the grammar decides.
struct Flat(usize);

impl Runner for Flat {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        logits.resize(batch.logits_rows.len() * self.0, 0.0);
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { max_rows: 256, max_logits_rows: 64 }
    }

    fn vocab_size(&self) -> usize {
        self.0
    }
}

fn app() -> Arc<App> {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/fable-30m-MXFP4-Q8"));
    let tokenizer = Tokenizer::from_dir(dir).expect("the bundled tokenizer");
    let vocab_size = tokenizer.vocab_size();
    let make = move || {
        let engine = Engine::new(Box::new(Flat(vocab_size)), BlockManager::for_tokens(4 * CONTEXT), CONTEXT, CONTEXT);
        Ok((engine, Box::new(|_| 0u64) as StepBytes))
    };
    let model = Model {
        names: vec!["flat".into()],
        model_type: "glm_moe_dsa".into(),
        tokenizer,
        template: None,
        dialect: Dialect::Hermes,
        defaults: GenerationConfig { eos_token_ids: vec![0], ..GenerationConfig::default() },
        vocab_size,
        context: CONTEXT,
        numerics: "f32",
        bandwidth: 0.0,
        max_batch: 1,
    };
    let worker = Worker::start(make, 4).expect("an engine");
    App::new(worker, model, &Options::default()).expect("a server")
}

static SERVER: OnceLock<(tokio::runtime::Runtime, Arc<App>)> = OnceLock::new();

fuzz_target!(|input: (u8, &str)| {
    let (runtime, app) = SERVER.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("threads");
        let app = runtime.block_on(async { app() });
        (runtime, app)
    });
    let (kind, text) = input;
    let form = match kind % 4 {
        0 => json!({"grammar": text}),
        1 => json!({"regex": text}),
        2 => json!({"choice": text.split('\n').collect::<Vec<_>>()}),
        _ => match serde_json::from_str::<Value>(text) {
            Ok(schema) => json!({"json": schema}),
            Err(_) => return,
        },
    };
    let body = json!({"prompt": "x", "max_tokens": 8, "structured_outputs": form}).to_string();
    let request = Request::post("/v1/completions").header("content-type", "application/json").body(Body::from(body));
    let answer = runtime.block_on(async { router(Arc::clone(app)).oneshot(request.expect("a request")).await });
    let status = answer.expect("an answer").status().as_u16();
    assert!(status == 200 || status == 400, "{status}");
});
