//! A server whose answers are written by hand: the real tokenizer, template, dialect and interfaces, and an engine that says
//! what it is told. It shows how a client behaves when a model calls its tools, which a small model does not do by itself.
//!
//! `cargo run -p tandem-llm-serve --example scripted -- PORT ANSWERS [MODEL_DIR]`: the file ANSWERS has one answer after the other,
//! separated by lines of `---`; the last one is repeated, and is what a request without tools gets (agents ask for titles beside
//! their work). Each request is printed as a line of JSON (method, path, headers, body, and what was answered), so that it can
//! be kept as a fixture.

use std::sync::{Arc, Mutex};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use serde_json::{Value, json};
use tandem_core::Batch;
use tandem_engine::{BlockManager, Engine, EngineError, GenerationConfig, Runner};
use tandem_model::Limits as RunnerLimits;
use tandem_serve::{App, Limits, Model, Options, StepBytes, Worker, router, serve};
use tandem_text::{ChatFormat, Tokenizer};
use tokio_stream::StreamExt;

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
    let ChatFormat { dialect, template } = ChatFormat::from_dir(&dir, None, None, |token| tokenizer.has_token(token))?;
    let defaults = GenerationConfig::load(&dir)?;
    let end = defaults.eos_token_ids.first().copied().unwrap_or(0);
    let vocab_size = tokenizer.vocab_size();
    let text = std::fs::read_to_string(answers)?;
    let answers = text.split("\n---\n").map(|answer| answer.trim_end_matches('\n'));
    let answers: Vec<(String, Vec<u32>)> = answers
        .map(|answer| Ok((answer.to_owned(), tokenizer.encode(answer, false)?)))
        .collect::<Result<_, tandem_text::TokenizerError>>()?;
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
        dialect,
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
    let answers = Arc::new(Answers { all: answers, script, n_given: Arc::default() });
    let tell = from_fn(move |request: Request, next: Next| {
        let answers = Arc::clone(&answers);
        async move { answers.give(request, next).await }
    });
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port.parse::<u16>()?)).await?;
    eprintln!("scripted on http://{}", listener.local_addr()?);
    serve(listener, router(app).layer(tell), Limits::default(), std::future::pending()).await;
    Ok(())
}

/// What the engine says, answer by answer.
struct Answers {
    /// Texts and their tokens.
    all: Vec<(String, Vec<u32>)>,
    script: Script,
    /// Answers given to requests with tools. Locked until an answer is complete: agents ask several things at once.
    n_given: Arc<tokio::sync::Mutex<usize>>,
}

impl Answers {
    /// Prints a request, and makes the next answer the engine's when one is asked for.
    async fn give(&self, request: Request, next: Next) -> Response {
        let (head, body) = request.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
        let json: Value = serde_json::from_slice(&body).unwrap_or_default();
        let headers: Value = head
            .headers
            .iter()
            .map(|(name, value)| (name.to_string(), json!(String::from_utf8_lossy(value.as_bytes()))))
            .collect();
        let path = head.uri.path().to_owned();
        let mut line =
            json!({"method": head.method.as_str(), "path": head.uri.to_string(), "headers": headers, "body": json});
        let generates =
            ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate"];
        let request = Request::from_parts(head, Body::from(body));
        if !generates.contains(&path.as_str()) {
            println!("{line}");
            return next.run(request).await;
        }
        let mut n_given = Arc::clone(&self.n_given).lock_owned().await;
        let has_tools = json["tools"].as_array().is_some_and(|tools| !tools.is_empty());
        let answer = if has_tools { self.all.get(*n_given) } else { None }.or(self.all.last());
        if let Some((text, tokens)) = answer {
            line["says"] = json!(text);
            *self.script.lock().unwrap_or_else(|e| e.into_inner()) = tokens.clone();
        }
        *n_given += usize::from(has_tools);
        println!("{line}");
        let (head, body) = next.run(request).await.into_parts();
        let body = body.into_data_stream().map(move |part| {
            let _until_the_end = &n_given;
            part
        });
        Response::from_parts(head, Body::from_stream(body))
    }
}
