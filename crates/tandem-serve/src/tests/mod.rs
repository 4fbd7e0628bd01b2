//! The server in process: the real tokenizer, template, dialect and router, and an engine that writes what it is told.

mod abuse;
mod agent;
mod board;
mod bytes;
mod clients;
mod dialects;
mod others;
mod protocol;
mod reference;

use std::sync::{Arc, Mutex};

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};
use tandem_core::Batch;
use tandem_engine::{BlockManager, Engine, EngineError, GenerationConfig, Runner};
use tandem_model::Limits;
use tandem_text::{ChatFormat, Tokenizer};
use tower::ServiceExt;

use crate::{App, Model, Options, StepBytes, Worker, router};

const CONTEXT: usize = 4096;
const EOS: u32 = 0;

/// Tokens still to be written, in order.
type Script = Arc<Mutex<Vec<u32>>>;

struct Scripted {
    script: Script,
    /// Tokens of all steps.
    seen: Script,
    /// A step waits for it.
    gate: Arc<Mutex<()>>,
    vocab_size: usize,
}

impl Runner for Scripted {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        drop(self.gate.lock().unwrap());
        self.seen.lock().unwrap().extend(&batch.tokens);
        for _ in &batch.logits_rows {
            let mut script = self.script.lock().unwrap();
            let next = if script.is_empty() { EOS } else { script.remove(0) };
            let mut row = vec![0.0; self.vocab_size];
            // An end that is not allowed gives way to the words.
            row[EOS as usize] = 5.0;
            row[next as usize] = 10.0;
            logits.extend(row);
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { max_rows: 256, max_logits_rows: 64 }
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

pub(crate) struct Server {
    pub(crate) app: Arc<App>,
    script: Script,
    seen: Script,
    /// Whoever holds it stops the engine.
    pub(crate) gate: Arc<Mutex<()>>,
    tokenizer: Tokenizer,
}

impl Server {
    pub(crate) fn start() -> Server {
        Server::with(&Options::default())
    }

    pub(crate) fn with(options: &Options) -> Server {
        Server::with_context(options, CONTEXT)
    }

    /// A model with a context of this many tokens.
    pub(crate) fn with_context(options: &Options, context: usize) -> Server {
        let dir = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8"));
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        let format = ChatFormat::from_dir(dir, None, None, |token| tokenizer.has_token(token)).unwrap();
        Server::of(options, context, tokenizer, format)
    }

    /// A model with this tokenizer and this way to chat.
    pub(crate) fn of(options: &Options, context: usize, tokenizer: Tokenizer, format: ChatFormat) -> Server {
        let ChatFormat { dialect, template } = format;
        let vocab_size = tokenizer.vocab_size();
        let script = Script::default();
        let seen = Script::default();
        let gate = Arc::new(Mutex::new(()));
        let (runner_script, runner_seen, runner_gate) = (Arc::clone(&script), Arc::clone(&seen), Arc::clone(&gate));
        let make = move || {
            let runner = Scripted {
                script: Arc::clone(&runner_script),
                seen: Arc::clone(&runner_seen),
                gate: Arc::clone(&runner_gate),
                vocab_size,
            };
            let engine = Engine::new(Box::new(runner), BlockManager::for_tokens(4 * context), context, context);
            Ok((engine, Box::new(|_| 0u64) as StepBytes))
        };
        let worker = Worker::start(make, 32).unwrap();
        let model = Model {
            names: vec!["fable".into()],
            model_type: "glm_moe_dsa".into(),
            tokenizer: tokenizer.clone(),
            dialect,
            template,
            defaults: GenerationConfig { eos_token_ids: vec![EOS], ..GenerationConfig::default() },
            vocab_size,
            context,
            numerics: "f32",
            bandwidth: 0.0,
            max_batch: 16,
        };
        Server { app: App::new(worker, model, options).unwrap(), script, seen, gate, tokenizer }
    }

    /// The text that the engine has read so far, special tokens too.
    pub(crate) fn seen(&self) -> String {
        self.tokenizer.decode(&self.seen.lock().unwrap(), false).unwrap()
    }

    /// The prompt that a request makes on this server, which has not seen any yet.
    pub(crate) async fn prompt_of(&self, path: &str, request: &Value) -> String {
        assert!(self.seen.lock().unwrap().is_empty());
        let mut request = request.clone();
        request[if path == "/v1/responses" { "max_output_tokens" } else { "max_tokens" }] = json!(1);
        self.says("yes");
        self.ok(path, &request).await;
        self.seen()
    }

    /// What the next answers say.
    pub(crate) fn says(&self, text: &str) {
        *self.script.lock().unwrap() = self.tokenizer.encode(text, false).unwrap();
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> (StatusCode, axum::http::HeaderMap, Vec<u8>) {
        let response = router(Arc::clone(&self.app)).oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        (head.status, head.headers, to_bytes(body, usize::MAX).await.unwrap().to_vec())
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = Request::post(path).header("content-type", "application/json");
        let (status, _, bytes) = self.send(request.body(Body::from(body.to_string())).unwrap()).await;
        let text = String::from_utf8(bytes).unwrap();
        (status.as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        let (status, _, bytes) = self.send(Request::get(path).body(Body::empty()).unwrap()).await;
        let text = String::from_utf8(bytes).unwrap();
        (status.as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    #[track_caller]
    pub(crate) fn ok(&self, path: &str, body: &Value) -> impl Future<Output = Value> {
        let caller = std::panic::Location::caller();
        async move {
            let (status, answer) = self.post(path, body).await;
            assert_eq!(status, 200, "{caller}: {path} {body}: {answer}");
            answer
        }
    }

    /// Events of a stream.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let (status, text) = self.post(path, &body).await;
        assert_eq!(status, 200, "{path} {body}: {text}");
        let Value::String(text) = text else { panic!("{text} is no stream") };
        let data = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        data.map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}
