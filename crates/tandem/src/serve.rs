//! `tandem serve`: loads the model and puts it behind tandem-serve's interfaces.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, ensure};
use tandem_core::backend::PAGE_SIZE;
use tandem_cpu::system;
use tandem_engine::{Engine, PageStore, Scheduling};
use tandem_runtime::diagnosis::{Recorder, RunRecord};
use tandem_runtime::ranks::{Joined, Quit};
use tandem_runtime::serving::{ModelFiles, bytes_of_step, memory_bandwidth, memory_needed, page_fingerprint};
use tandem_runtime::{LoadOptions, Loaded, LogitsRows, ModelOptions, News, Progress, load};
use tandem_serve::{
    App, Loading, Model, Models, ModelsOptions, Options, Serving, StepBytes, Worker, arguments_of_model, end_signal,
    read_keys, router,
};
use tokio::net::TcpListener;

use crate::cli::ServeArgs;
use crate::news::on_terminal;
use crate::report::plain;
use crate::telemetry::below_the_caller;

/// Between the failure of a group of ranks and the end of this process.
const GROUP_GRACE: Duration = Duration::from_millis(500);
/// Cache of this many full contexts unless --cache-tokens says otherwise.
const DEFAULT_CONTEXTS: usize = 4;

/// Bytes of all requests together that are being read; a single larger one is read all the same.
const IN_FLIGHT_BYTES: usize = 64 << 20;

/// Said at the first request to end.
const STOPPING: &str = "stopping: answers in flight are completed; a second signal ends them";

/// Runs the command.
pub(crate) fn serve(args: &ServeArgs, joined: Option<Joined>, quit: Quit) -> anyhow::Result<()> {
    if args.end_with_stdin {
        tandem_serve::end_with_stdin();
    }
    system::keep_little_freed_memory();
    // A token costs HTTP tens of microseconds: where there are few cores a second thread would only disturb the engine.
    let n_threads = if system::default_threads() > 2 { 2 } else { 1 };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(n_threads).build()?;
    runtime.block_on(async {
        // Faults of flags, files and ports show before the model is loaded.
        let mut options = options(args)?;
        options.check()?;
        if let Some(dir) = &args.cache_dir {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot use --cache-dir {}", dir.display()))?;
        }
        if let Some(dir) = &args.models_dir {
            ensure!(
                joined.is_none(),
                "--models-dir starts the ranks of its models itself; give it --ranks, without launch"
            );
            return serve_models(args, dir, options).await;
        }
        let is_of_several = args.models_memory.is_some() || !args.pin.is_empty();
        ensure!(!is_of_several, "--models-memory and --pin are for several models: give --models-dir too");
        if joined.is_some() {
            // Within it the ranks find a lost one themselves; two that wait for each other only show here.
            options.stall_timeout = ModelOptions::from(&args.model).parallel.deadline()?;
        }
        let files =
            ModelFiles::read(&ModelOptions::from(&args.model), args.chat_template.as_deref(), args.chat_format)?;
        let (listener, address) = listen(args, &mut options).await?;
        let loading = Loading::begin();
        let mut server = Serving::start(listener, loading.router());
        eprintln!("listening on {address}; loading {} (/health says how far it is)", files.name());
        let (worker, facts) = tokio::select! {
            loaded = in_thread(args.clone(), joined, quit, Arc::clone(&loading)) => loaded?,
            // Nothing is in flight.
            () = end_signal() => return Ok(()),
        };
        let app = App::new(worker, model(args, files, facts), &options)?;
        loading.done(below_the_caller(router(Arc::clone(&app))));
        announce(address, app.model_name(), options.api_keys.is_empty());
        server.until_end_signal().await.context("the server failed")?;
        eprintln!("{STOPPING}");
        app.worker().stop();
        drain(server, args).await?;
        let record = app.worker().timings().map(|record| RunRecord::parse(&record.to_string()));
        if let Some(Err(error)) = record.map(|record| record.and_then(|record| record.keep())) {
            tracing::debug!("{error:#}");
        }
        tokio::task::block_in_place(|| app.worker().end());
        Ok(())
    })
}

/// Several models, each a process of its own.
async fn serve_models(args: &ServeArgs, dir: &Path, mut options: Options) -> anyhow::Result<()> {
    let (of_model, what) = (args.drafts.apply(ModelOptions::from(&args.model)), load_options(args));
    let mut command = vec![std::env::current_exe()?.into_os_string()];
    command.extend(arguments_of_model(std::env::args_os().skip(1)));
    let device = of_model.device.clone();
    let models = ModelsOptions {
        dir: dir.to_owned(),
        memory_bytes: args.models_memory.unwrap_or(system::available_memory_bytes().unwrap_or(u64::MAX) / 10 * 9),
        keep_alive: args.keep_alive,
        pinned: args.pin.clone(),
        load_timeout: Duration::from_secs(args.load_timeout),
        command: Box::new(move || {
            // Here once, and not in each process.
            if let Ok(Some(bandwidth)) = memory_bandwidth(&device) {
                command.push(format!("--measured-bandwidth={bandwidth}").into());
            }
            command
        }),
        cache_dir: args.cache_dir.clone(),
        check: Box::new(move |dir| {
            let options = ModelOptions { model: Some(dir.to_string_lossy().into_owned()), ..of_model.clone() };
            memory_needed(&options, what).map_err(|error| format!("{error:#}"))
        }),
        on_line: Arc::new(|name, line| eprintln!("[{}] {}", plain(name), plain(line))),
    };
    let (listener, address) = listen(args, &mut options).await?;
    let models = Models::new(models, &options)?;
    for (name, error) in models.names() {
        if let Some(error) = error {
            eprintln!("warning: the model {} cannot be loaded: {}", plain(&name), plain(&error));
        }
    }
    let mut server = Serving::start(listener, below_the_caller(models.router()));
    eprintln!("listening on {address}; models of {} are loaded when requests name them", dir.display());
    announce(address, &format!("{} models", models.names().len()), options.api_keys.is_empty());
    server.until_end_signal().await.context("the server failed")?;
    eprintln!("{STOPPING}");
    drain(server, args).await?;
    models.end().await;
    Ok(())
}

/// The server's port, and who may ask there.
async fn listen(args: &ServeArgs, options: &mut Options) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((args.host.as_str(), args.port))
        .await
        .with_context(|| format!("cannot listen on {}:{}; choose another --host or --port", args.host, args.port))?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && args.allowed_host.is_empty() {
        options.allowed_hosts = None;
    }
    Ok((listener, address))
}

async fn drain(server: Serving, args: &ServeArgs) -> anyhow::Result<()> {
    if !server.drain(Duration::from_secs(args.drain_timeout)).await.context("the server failed")? {
        eprintln!("stopped with answers in flight");
    }
    Ok(())
}

fn load_options(args: &ServeArgs) -> LoadOptions {
    let logits = LogitsRows::Several(args.max_batch);
    LoadOptions { logits, cache_tokens: args.cache_tokens, n_contexts: DEFAULT_CONTEXTS }
}

/// Loads in a thread of its own, which the end of the program does not wait for.
async fn in_thread(
    args: ServeArgs,
    joined: Option<Joined>,
    quit: Quit,
    loading: Arc<Loading>,
) -> anyhow::Result<(Worker, Facts)> {
    let (send, receive) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("load".into()).spawn(move || {
        let _ = send.send(start(&args, joined, quit, loading));
    })?;
    receive.await.context("loading ended without a result")?
}

fn announce(address: SocketAddr, what: &str, is_open: bool) {
    eprintln!("{what} on http://{address} (chat page at /, OpenAI at /v1, metrics at /metrics)");
    if !address.ip().is_loopback() && is_open {
        eprintln!("warning: every machine that reaches {address} may use it; --api-key-file asks for a key");
    }
}

/// Loads everything and starts the engine.
fn start(
    args: &ServeArgs,
    joined: Option<Joined>,
    quit: Quit,
    loading: Arc<Loading>,
) -> anyhow::Result<(Worker, Facts)> {
    let inter_token = args.inter_token_ms.map(|ms| Duration::from_secs_f64(ms / 1e3));
    // Alone on the processor; otherwise loading measures. Before it, since two pools would be in each other's way.
    let model_options = args.drafts.apply(ModelOptions::from(&args.model));
    let is_group = joined.is_some();
    let measured = match args.measured_bandwidth {
        None if !is_group => memory_bandwidth(&model_options.device)?,
        known => known,
    };
    let slot: Arc<Mutex<Option<Facts>>> = Arc::default();
    let recorder: Arc<Mutex<Option<Recorder>>> = Arc::default();
    let (made_facts, made_recorder, made_args) = (Arc::clone(&slot), Arc::clone(&recorder), args.clone());
    let mut joined = joined;
    let mut make = move || -> anyhow::Result<(Engine, StepBytes)> {
        let args = &made_args;
        let joined = joined.take();
        if is_group && joined.is_none() {
            // The other ranks are gone: only the launcher can start the group again. The errors go out first.
            std::thread::sleep(GROUP_GRACE);
            quit("the group of ranks failed; the launcher starts it again if it is asked to");
        }
        let what = load_options(args);
        let mut show = on_terminal();
        let mut on_news = |news| {
            if let News::Progress(Progress { done, total, .. }) = news {
                loading.progress(done, total);
            }
            show(news);
        };
        let loaded = load(&model_options, what, joined, &mut on_news)?;
        let Loaded { dir, config, engine, accounting, prefill_chunk, numerics, bandwidth, load_time, device, .. } =
            loaded;
        let mut recorder = loaded.recorder;
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
            let store = PageStore::open(cache_dir, &page_fingerprint(&dir, numerics, &ranks)?, max_bytes)
                .with_context(|| format!("cannot use --cache-dir {}", cache_dir.display()))?;
            tracing::info!("{} pages in {}", store.n_pages(), cache_dir.display());
            engine = engine.with_page_store(store);
        }
        let step_bytes: StepBytes = Box::new(bytes_of_step(&accounting, &config));
        let bandwidth = bandwidth.or(measured).unwrap_or_default();
        recorder.facts.bandwidth = Some(bandwidth).filter(|bandwidth| *bandwidth > 0.0);
        *made_recorder.lock().unwrap_or_else(|e| e.into_inner()) = Some(recorder);
        let facts = Facts { context: engine.context(), numerics, bandwidth };
        let resident = accounting.total(|k| k.resident_bytes);
        let seconds = load_time.as_secs_f64();
        let cache_tokens = engine.blocks().n_pages() * PAGE_SIZE;
        tracing::info!(
            model = %dir.display(), device, numerics, context = facts.context, cache_tokens, max_batch = args.max_batch,
            resident_bytes = resident, seconds, gb_per_s = resident as f64 / seconds / 1e9, "loaded"
        );
        *made_facts.lock().unwrap_or_else(|e| e.into_inner()) = Some(facts);
        Ok((engine, step_bytes))
    };
    let max_open = args.max_batch + args.max_queue;
    let worker = Worker::start(move || make().map_err(Into::into), max_open).map_err(anyhow::Error::from_boxed)?;
    // Of the engine as it is now: it may have been made again.
    let worker = worker.with_timings(Arc::new(move |ranks, warning| {
        let recorder = recorder.lock().unwrap_or_else(|e| e.into_inner());
        recorder.as_ref().map_or_else(Default::default, |recorder| recorder.live(ranks, warning))
    }));
    let Some(facts) = slot.lock().unwrap_or_else(|e| e.into_inner()).take() else {
        anyhow::bail!("the engine did not say what it loaded");
    };
    Ok((worker, facts))
}

/// What is known after loading.
struct Facts {
    context: usize,
    numerics: &'static str,
    bandwidth: f64,
}

/// What the flags say about requests.
fn options(args: &ServeArgs) -> anyhow::Result<Options> {
    Ok(Options {
        api_keys: args.api_key_file.as_deref().map(read_keys).transpose()?.unwrap_or_default(),
        allowed_hosts: Some(args.allowed_host.clone()),
        cors_origins: args.cors_origin.clone(),
        max_body_bytes: args.max_body_mb.saturating_mul(1 << 20),
        max_body_bytes_in_flight: IN_FLIGHT_BYTES.max(args.max_body_mb.saturating_mul(1 << 20)),
        store_dir: args.cache_dir.as_ref().map(|dir| dir.join("responses")),
        request_timeout: Duration::from_secs(args.request_timeout),
        stall_timeout: Options::default().stall_timeout,
        log_text: args.log_text,
        open_metrics: args.metrics_without_key,
        return_memory: system::return_freed_memory,
    })
}

fn model(args: &ServeArgs, files: ModelFiles, facts: Facts) -> Model {
    let names = match &args.served_model_name[..] {
        [] => vec![files.name()],
        names => names.to_vec(),
    };
    let ModelFiles { config, tokenizer, chat_format, defaults, .. } = files;
    Model {
        names,
        model_type: config.model_type.name().to_owned(),
        tokenizer,
        dialect: chat_format.dialect,
        template: chat_format.template,
        defaults,
        vocab_size: config.vocab_size,
        context: facts.context,
        numerics: facts.numerics,
        bandwidth: facts.bandwidth,
        max_batch: args.max_batch,
    }
}
