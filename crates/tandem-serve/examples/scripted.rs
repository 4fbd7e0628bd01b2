//! A server whose answers are written by hand: the real tokenizer, template, dialect and interfaces, and an engine that says
//! what it is told. It shows how a client behaves when a model calls its tools, which a small model does not do by itself.
//!
//! `cargo run -p tandem-llm-serve --example scripted -- PORT ANSWERS [MODEL_DIR]`: the file ANSWERS has one answer after the other,
//! separated by lines of `---`; the last one is repeated. Each request's path and body are printed, one a line, so that they
//! can be kept as fixtures.

use std::sync::{Arc, Mutex};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use tandem_core::Batch;
use tandem_engine::{BlockManager, Engine, EngineError, GenerationConfig, Runner};
use tandem_model::Limits as RunnerLimits;
use tandem_serve::{App, Limits, Model, Options, StepBytes, Worker, router, serve};
use tandem_text::{ChatTemplate, Dialect, Tokenizer};

const CONTEXT: usize = 1 << 17;
const NAMES: [&str; 6] = ["scripted", "gpt-5", "gpt-4o", "claude-sonnet-4-5", "claude-haiku-4-5", "llama3"];

/// Tokens still to be written, in order.
type Script = Arc<Mutex<Vec<u32>>>;

struct Scripted {
    script: Script,
    end: u32,
    vocab_size: usize,
}

impl Runner for Scripted {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        for _ in &batch.logits_rows {
            let mut script = self.script.lock().unwrap_or_else(|e| e.into_inner());
            let next = if script.is_empty() { self.end } else { script.remove(0) };
            let mut row = vec![0.0; self.vocab_size];
            row[next as usize] = 30.0;
            logits.extend(row);
        }
        Ok(())
    }

    fn limits(&self) -> RunnerLimits {
        RunnerLimits { max_rows: 4096, max_logits_rows: 64 }
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [port, answers, rest @ ..] = &arguments[..] else {
        return Err("give a port and a file with answers".into());
    };
    let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8").to_owned();
    let dir = std::path::PathBuf::from(rest.first().unwrap_or(&bundled));
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let template = ChatTemplate::from_dir(&dir, None)?;
    let defaults = GenerationConfig::load(&dir)?;
    let end = defaults.eos_token_ids.first().copied().unwrap_or(0);
    let vocab_size = tokenizer.vocab_size();
    let text = std::fs::read_to_string(answers)?;
    let answers: Vec<Vec<u32>> = text
        .split("\n---\n")
        .map(|answer| tokenizer.encode(answer.trim_end_matches('\n'), false))
        .collect::<Result<_, _>>()?;
    let script = Script::default();
    let engine_script = Arc::clone(&script);
    let make = move || {
        let runner = Scripted { script: Arc::clone(&engine_script), end, vocab_size };
        let engine = Engine::new(Box::new(runner), BlockManager::for_tokens(4 * CONTEXT), CONTEXT, CONTEXT);
        Ok((engine, Box::new(|_| 0u64) as StepBytes))
    };
    let model = Model {
        names: NAMES.iter().map(|name| (*name).to_owned()).collect(),
        model_type: "scripted".into(),
        dialect: template.as_ref().map_or(Dialect::Json, |template| Dialect::of_template(template.source())),
        tokenizer,
        template,
        defaults,
        vocab_size,
        context: CONTEXT,
        numerics: "",
        bandwidth: 0.0,
        max_batch: 1,
    };
    let app = App::new(Worker::start(make, 64)?, model, &Options::default())?;
    let n_asked = Arc::new(Mutex::new(0usize));
    let answers = Arc::new(answers);
    let tell = from_fn(move |request: Request, next: Next| {
        let (script, answers, n_asked) = (Arc::clone(&script), Arc::clone(&answers), Arc::clone(&n_asked));
        async move { told(request, next, &script, &answers, &n_asked).await }
    });
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port.parse::<u16>()?)).await?;
    eprintln!("scripted on http://{}", listener.local_addr()?);
    serve(listener, router(app).layer(tell), Limits::default(), std::future::pending()).await;
    Ok(())
}

/// Prints a request, and makes the next answer the engine's when one is asked for.
async fn told(request: Request, next: Next, script: &Script, answers: &[Vec<u32>], n_asked: &Mutex<usize>) -> Response {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
    println!("{} {} {}", head.method, head.uri, String::from_utf8_lossy(&body));
    let path = head.uri.path();
    let generates =
        ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate"];
    if generates.contains(&path) {
        let mut n_asked = n_asked.lock().unwrap_or_else(|e| e.into_inner());
        let answer = answers.get(*n_asked).or(answers.last()).cloned().unwrap_or_default();
        *script.lock().unwrap_or_else(|e| e.into_inner()) = answer;
        *n_asked += 1;
    }
    next.run(Request::from_parts(head, Body::from(body))).await
}
