//! The server as a part of another axum program: its interfaces lie below /llm, beside a page of the program's own.
//!
//! `cargo run --release -p tandem-llm-serve --example mounted [DIR]`, then
//! `curl http://127.0.0.1:8080/llm/v1/chat/completions -d '{"messages": [{"role": "user", "content": "hi"}]}'`

use axum::Router;
use axum::routing::get;
use tandem_core::ModelConfig;
use tandem_engine::GenerationConfig;
use tandem_runtime::{LoadOptions, LogitsRows, ModelOptions, ignore_news, load, model_dir};
use tandem_serve::{App, Limits, Model, Options, StepBytes, Worker, router, serve};
use tandem_text::{ChatFormat, Tokenizer};

const MAX_BATCH: usize = 8;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let named = std::env::args().nth(1);
    let dir = model_dir(named.as_deref())?;
    let options = ModelOptions { model: named, ..ModelOptions::default() };
    let config = ModelConfig::load(&dir)?;
    let context = options.context(&config)?;
    // The engine lives in a thread of its own, and is made there.
    let make = move || {
        let what = LoadOptions { logits: LogitsRows::Several(MAX_BATCH), cache_tokens: None, n_contexts: 2 };
        let loaded = load(&options, what, None, &mut ignore_news)?;
        Ok((loaded.engine, Box::new(|_| 0u64) as StepBytes))
    };
    let worker = Worker::start(make, MAX_BATCH + 64)?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let ChatFormat { dialect, template } = ChatFormat::from_dir(&dir, None, None, |token| tokenizer.has_token(token))?;
    let model = Model {
        names: vec!["mine".into()],
        model_type: config.model_type.name().to_owned(),
        tokenizer,
        dialect,
        template,
        defaults: GenerationConfig::load(&dir)?,
        vocab_size: config.vocab_size,
        context,
        numerics: "",
        bandwidth: 0.0,
        max_batch: MAX_BATCH,
    };
    let app = App::new(worker, model, &Options::default())?;
    let program = Router::new().route("/", get(|| async { "a page of mine" })).nest("/llm", router(app));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
    println!("http://{}", listener.local_addr()?);
    let stop = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    serve(listener, program, Limits::default(), stop).await;
    Ok(())
}
