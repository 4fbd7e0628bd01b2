//! `tandem serve`: the model behind OpenAI's and Anthropic's interfaces.
//!
//! The engine lives in a thread of its own ([`worker`]); handlers turn requests into prompts, and tokens into answers
//! ([`generation`]). One file per interface: [`chat`], [`responses`], [`messages`], [`pages`].

mod api;
mod browser;
mod chat;
mod error;
mod generation;
mod grammar;
mod messages;
mod metrics;
mod pages;
mod responses;
mod strict;
mod worker;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, ensure};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use serde_json::json;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tandem_core::ModelConfig;
use tandem_core::weights::ModuleKind;
use tandem_cpu::bandwidth::measure_read_bandwidth;
use tandem_cpu::system;
use tandem_engine::{GenerationConfig, PageStore, RankStatus, Scheduling};
use tandem_model::Accounting;

use self::browser::Access;
use self::error::{ApiError, MaxBody};
use self::generation::App;
use self::grammar::Grammars;
use self::worker::{StepBytes, Worker};
use crate::cli::ServeArgs;
use crate::load::{Device, Loaded, LogitsRows, choose, cpu_backend, load_with_cache};
use tandem_text::ChatTemplate;
use tandem_text::Tokenizer;
use tandem_text::dialect::Dialect;

/// Bytes over which the memory's bandwidth is measured at the start.
const BANDWIDTH_BYTES: usize = 256 << 20;
/// Between the failure of a group of ranks and the end of this process.
const GROUP_GRACE: Duration = Duration::from_millis(500);
/// Cache of this many full contexts unless --cache-tokens says otherwise.
const DEFAULT_CONTEXTS: usize = 4;

/// Runs the command.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    // A token costs HTTP tens of microseconds: where there are few cores a second thread would only disturb the engine.
    let n_threads = if system::default_threads() > 2 { 2 } else { 1 };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(n_threads).build()?;
    runtime.block_on(async {
        // Faults of the flags show before the model is loaded.
        Access::new(true, &args.allowed_host, &args.cors_origin)?;
        let app = tokio::task::block_in_place(|| start(args))?;
        // A token is a small packet, and must not wait for the one before it to be acknowledged.
        let no_delay = |tcp: &mut tokio::net::TcpStream| {
            if let Err(error) = tcp.set_nodelay(true) {
                tracing::warn!("cannot set TCP_NODELAY: {error}");
            }
        };
        let listener = tokio::net::TcpListener::bind((args.host.as_str(), args.port)).await.with_context(|| {
            format!("cannot listen on {}:{}; choose another --host or --port", args.host, args.port)
        })?;
        let address = listener.local_addr()?;
        let access = Access::new(address.ip().is_loopback(), &args.allowed_host, &args.cors_origin)?;
        announce(address, &app);
        let (stopping, ending) = (Arc::clone(&app), Arc::clone(&app));
        let (stopped, wait) = tokio::sync::oneshot::channel();
        let server =
            axum::serve(listener.tap_io(no_delay), router(app, args, access)?).with_graceful_shutdown(async move {
                signal().await;
                eprintln!("stopping: answers in flight are completed; a second signal ends them");
                stopping.worker.stop();
                let _ = stopped.send(());
            });
        let drained = Duration::from_secs(args.drain_timeout);
        tokio::select! {
            result = server => result.context("the server failed")?,
            () = async {
                let _ = wait.await;
                tokio::select! { () = signal() => {}, () = tokio::time::sleep(drained) => {} }
            } => eprintln!("stopped with answers in flight"),
        }
        tokio::task::block_in_place(|| ending.worker.end());
        Ok(())
    })
}

fn announce(address: SocketAddr, app: &App) {
    eprintln!("{} on http://{address} (chat page at /, OpenAI at /v1, metrics at /metrics)", app.model_name());
    if !address.ip().is_loopback() && app.keys.is_empty() {
        eprintln!("warning: every machine that reaches {address} may use it; --api-key-file asks for a key");
    }
}

/// Ctrl-C, or the system's request to end.
async fn signal() {
    #[cfg(unix)]
    {
        let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
        if let Ok(mut terminate) = terminate {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// Loads everything and starts the engine.
fn start(args: &ServeArgs) -> anyhow::Result<Arc<App>> {
    ensure!((1..=64).contains(&args.max_batch), "--max-batch is {}, expected 1 to 64", args.max_batch);
    ensure!(args.prefill_share >= 0.0, "--prefill-share is {}, expected 0 or more", args.prefill_share);
    let inter_token = args.inter_token_ms.map(|ms| Duration::try_from_secs_f64(ms / 1e3)).transpose();
    let inter_token = inter_token.context("--inter-token-ms is not a number of milliseconds")?;
    // Alone on the processor; otherwise loading measures. Before it, since two pools would be in each other's way.
    let is_group = crate::distributed::leads();
    let is_cpu = !is_group && matches!(choose(args.model.backend, args.model.activations)?, Device::Cpu);
    let measured = is_cpu.then(|| {
        let (backend, _) = cpu_backend(args.model.threads, args.model.activations, 0);
        measure_read_bandwidth(backend.pool(), BANDWIDTH_BYTES)
    });
    let slot: Arc<Mutex<Option<Facts>>> = Arc::default();
    let (made_facts, made_args) = (Arc::clone(&slot), args.clone());
    let mut is_first = true;
    let worker = Worker::start(
        move || {
            let args = &made_args;
            if is_group && !std::mem::take(&mut is_first) {
                // The other ranks are gone: only the launcher can start the group again. The errors go out first.
                std::thread::sleep(GROUP_GRACE);
                eprintln!("error: the group of ranks failed; the launcher starts it again if it is asked to");
                std::process::exit(1);
            }
            let rows = LogitsRows::Several(args.max_batch);
            let loaded = load_with_cache(&args.model, rows, args.cache_tokens, DEFAULT_CONTEXTS)?;
            let Loaded { dir, config, engine, accounting, prefill_chunk, numerics, bandwidth, .. } = loaded;
            let mut engine = engine.with_scheduling(Scheduling {
                max_batch: args.max_batch,
                prefill_chunk,
                prefill_share: args.prefill_share,
                inter_token,
            });
            if let Some(cache_dir) = &args.cache_dir {
                let max_bytes = args.cache_dir_gb.saturating_mul(1_000_000_000);
                ensure!(
                    engine.saves_pages(),
                    "--cache-dir is for --backend cpu: pages of the GPU's cache cannot be saved; leave it out"
                );
                let ranks = engine.ranks()?;
                let store = PageStore::open(cache_dir, &fingerprint(&dir, numerics, &ranks)?, max_bytes)
                    .with_context(|| format!("cannot use --cache-dir {}", cache_dir.display()))?;
                tracing::info!("{} pages in {}", store.n_pages(), cache_dir.display());
                engine = engine.with_page_store(store);
            }
            let step_bytes = step_bytes(&accounting, &config);
            let bandwidth = bandwidth.or(measured).unwrap_or_default();
            let facts = Facts { dir, context: engine.context(), config, numerics, bandwidth };
            *made_facts.lock().unwrap_or_else(|e| e.into_inner()) = Some(facts);
            Ok((engine, step_bytes))
        },
        args.max_batch + args.max_queue,
    )?;
    let Some(facts) = slot.lock().unwrap_or_else(|e| e.into_inner()).take() else {
        anyhow::bail!("the engine did not say what it loaded");
    };
    app(args, facts, worker).map(Arc::new)
}

/// What is known after loading.
struct Facts {
    dir: std::path::PathBuf,
    context: usize,
    config: ModelConfig,
    numerics: &'static str,
    bandwidth: f64,
}

fn app(args: &ServeArgs, facts: Facts, worker: Worker) -> anyhow::Result<App> {
    let Facts { dir, context, config, numerics, bandwidth } = facts;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let template = ChatTemplate::from_dir(&dir, args.chat_template.as_deref())?;
    let dialect = template.as_ref().map_or(Dialect::Json, |template| Dialect::of_template(template.source()));
    let defaults = GenerationConfig::load(&dir)?;
    let model_names = match &args.served_model_name[..] {
        [] => {
            vec![dir.canonicalize()?.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())]
        }
        names => names.to_vec(),
    };
    let keys = args.api_key_file.as_deref().map(read_keys).transpose()?.unwrap_or_default();
    Ok(App {
        grammars: Grammars::new(&tokenizer, dialect, config.vocab_size, &defaults.eos_token_ids)?,
        metrics: metrics::Metrics::new(bandwidth),
        facts: json!({
            "model": model_names[0], "model_type": config.model_type.name(), "context": context, "numerics": numerics,
            "max_batch": args.max_batch, "version": env!("CARGO_PKG_VERSION"),
            "sampling": {
                "temperature": defaults.apply(&Default::default()).temperature,
                "top_p": defaults.apply(&Default::default()).top_p,
            },
        }),
        worker,
        tokenizer,
        template,
        dialect,
        defaults,
        vocab_size: config.vocab_size,
        context,
        model_names,
        created: generation::now(),
        timeout: Duration::from_secs(args.request_timeout),
        keys,
        log_text: args.log_text,
    })
}

/// Weight bytes that a step of so many rows reads: each row picks experts of its own, evenly spread.
fn step_bytes(accounting: &Accounting, config: &ModelConfig) -> StepBytes {
    let routed = accounting.total(|k| if k.kind == ModuleKind::RoutedExperts { k.resident_bytes } else { 0 });
    let others = accounting.total(|k| if k.kind == ModuleKind::RoutedExperts { 0 } else { k.read_bytes });
    let skipped =
        config.moe.as_ref().map_or(0.0, |moe| 1.0 - moe.num_experts_per_tok as f64 / moe.n_routed_experts as f64);
    Box::new(move |n_rows| others + (routed as f64 * (1.0 - skipped.powi(n_rows as i32))) as u64)
}

/// Names what cached pages depend on: the model's files, the numerics, and who has which layers if these are sliced.
fn fingerprint(dir: &Path, numerics: &str, ranks: &[RankStatus]) -> anyhow::Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(concat!("tandem ", env!("CARGO_PKG_VERSION"), " pages 1\n"));
    hasher.update(numerics);
    if ranks.windows(2).any(|pair| pair[0].layers == pair[1].layers) {
        ranks.iter().for_each(|rank| hasher.update(format!(" {:?}", rank.layers)));
    }
    hasher.update(std::fs::read(dir.join("config.json"))?);
    let mut files: Vec<_> = std::fs::read_dir(dir)?.collect::<Result<_, _>>()?;
    files.sort_by_key(std::fs::DirEntry::file_name);
    for file in files.iter().filter(|f| f.path().extension().is_some_and(|e| e == "safetensors" || e == "gguf")) {
        let meta = std::fs::metadata(file.path())?;
        let modified = meta.modified()?.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        hasher.update(format!("{:?} {} {modified}\n", file.file_name(), meta.len()));
    }
    Ok(hasher.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect())
}

/// Keys of a file, one a line; empty lines and lines that begin with # do not count.
fn read_keys(path: &Path) -> anyhow::Result<Vec<[u8; 32]>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read --api-key-file {}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<[u8; 32]> = lines.map(|key| Sha256::digest(key).into()).collect();
    ensure!(!keys.is_empty(), "{} holds no key; write one on a line of its own", path.display());
    Ok(keys)
}

fn router(app: Arc<App>, args: &ServeArgs, access: Access) -> anyhow::Result<Router> {
    let protected = Router::new()
        .route("/v1/models", get(pages::models))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(chat::completions))
        .route("/v1/responses", post(responses::responses))
        .route("/v1/messages", post(messages::messages))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/tokenize", post(pages::tokenize))
        .route("/detokenize", post(pages::detokenize))
        .route("/metrics", get(pages::metrics))
        .route("/info", get(pages::info))
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .route_layer(from_fn_with_state(Arc::clone(&app), check_key));
    let mut router = protected
        .route("/", get(pages::page))
        .route("/favicon.ico", get(pages::no_icon))
        .route("/health", get(pages::health))
        .route("/ready", get(pages::ready))
        .route("/openapi.json", get(pages::openapi))
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .fallback(|| async { ApiError::not_found() })
        .layer(axum::Extension(MaxBody(args.max_body_mb << 20)))
        .with_state(app);
    if let Some(cors) = access.cors() {
        router = router.layer(cors);
    }
    router = router.layer(from_fn(move |request, next| browser::guard(access.clone(), request, next)));
    Ok(router)
}

/// Lets requests with a right key pass, or all if the server has none.
async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if app.keys.is_empty() {
        return next.run(request).await;
    }
    let headers = request.headers();
    let authorization = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let bearer = authorization
        .and_then(|v| v.split_once(' '))
        .and_then(|(scheme, key)| scheme.eq_ignore_ascii_case("bearer").then_some(key));
    let given = bearer.or_else(|| headers.get("x-api-key").and_then(|v| v.to_str().ok())).unwrap_or_default();
    // Every key is compared, in constant time, by its hash: neither length nor place shows.
    let given: [u8; 32] = Sha256::digest(given.trim()).into();
    let matches = app.keys.iter().fold(0u8, |found, key| found | key.ct_eq(&given).unwrap_u8());
    if matches == 1 { next.run(request).await } else { ApiError::unauthorized().into_response() }
}
