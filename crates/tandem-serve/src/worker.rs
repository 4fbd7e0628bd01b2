//! The thread that owns the engine. Requests come through a channel, events go back through one per request.
//!
//! When the engine fails (a device error, a rank of a group that died, a panic), every request in flight gets one error,
//! and the engine is made again.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_engine::{
    Counters, Engine, EngineError, Event, Logits, Logprobs, Output, RankStatus, Request, RequestId, Sequence, logprob,
    top_logprobs,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::error::ApiError;
use crate::grammar::STACK_BYTES;

/// Between attempts to make the engine again.
const RETRY: Duration = Duration::from_secs(2);
/// How often an idle engine looks up.
const IDLE: Duration = Duration::from_millis(200);
/// Between questions to the ranks.
const RANKS: Duration = Duration::from_secs(1);

/// What a request hears of the engine.
pub(crate) enum Reply {
    /// An event, and when it happened.
    Event(Event, Instant),
    /// The engine failed, or refuses the request; nothing follows.
    Error(ApiError),
}

enum Job {
    Generate { request: Request, client: Client },
    Score(Scoring),
}

/// A prompt whose tokens' probabilities are asked for.
struct Scoring {
    tokens: Vec<u32>,
    n_top: usize,
    sequence: Sequence,
    scores: Vec<Logprobs>,
    reply: oneshot::Sender<Result<Vec<Logprobs>, ApiError>>,
    _place: Place,
}

/// Tokens that are scored between two steps of the others.
const SCORED_AT_ONCE: usize = 64;

impl Scoring {
    /// Runs some more tokens; true at the end.
    fn advance(&mut self, engine: &mut Engine) -> Result<bool, EngineError> {
        let n_done = self.sequence.tokens().len();
        // The last token's successor is not asked for.
        let end = (n_done + SCORED_AT_ONCE).min(self.tokens.len() - 1);
        if end > n_done {
            let vocab_size = engine.vocab_size();
            let logits = engine.run(&mut self.sequence, &self.tokens[n_done..end], SCORED_AT_ONCE, Logits::All)?;
            for (row, next) in logits.chunks_exact(vocab_size).zip(&self.tokens[n_done + 1..]) {
                self.scores.push(Logprobs { chosen: logprob(row, *next), top: top_logprobs(row, self.n_top) });
            }
        }
        Ok(end + 1 >= self.tokens.len())
    }
}

/// The engine's end of a request.
struct Client {
    replies: UnboundedSender<Reply>,
    _place: Place,
}

impl Client {
    fn send(&self, reply: Reply) {
        // A client that is gone is noticed before the next step.
        let _ = self.replies.send(reply);
    }
}

/// One of the open requests. The engine's end holds it: what a slow reader has not read yet does not keep others out.
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.n_open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// State of the engine, for metrics and the page.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Status {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) pages: usize,
    pub(crate) pages_used: usize,
    pub(crate) pages_cached: usize,
    pub(crate) counters: Counters,
    /// Generated tokens and weight bytes of about the last second, per second.
    pub(crate) tokens_per_second: f64,
    pub(crate) bytes_per_second: f64,
    /// Times that the engine was made again.
    pub(crate) restarts: u64,
    /// The device has lost memory, as far as it can tell.
    pub(crate) device_warns: bool,
}

impl Status {
    /// Bytes of a rank's part of the cache that requests hold.
    pub(crate) fn cache_bytes_used(&self, rank: &RankStatus) -> u64 {
        // Every rank has every page, of its own layers.
        rank.cache_bytes / self.pages.max(1) as u64 * self.pages_used as u64
    }
}

struct Shared {
    is_ready: AtomicBool,
    is_stopping: AtomicBool,
    /// The thread ends.
    is_ended: AtomicBool,
    n_open: AtomicUsize,
    status: Mutex<Status>,
    /// As of about a second ago.
    ranks: Mutex<Vec<RankStatus>>,
    /// What the device said of itself then.
    warning: Mutex<Option<String>>,
    /// When the engine last had nothing to do or got something done, through all ranks.
    progress: Mutex<Instant>,
}

impl Shared {
    fn note_progress(&self) {
        *self.progress.lock().unwrap_or_else(|e| e.into_inner()) = Instant::now();
    }
}

/// Weight bytes that a step of a given number of rows reads.
pub type StepBytes = Box<dyn Fn(usize) -> u64 + Send>;

/// Makes a record of the timings so far from what the ranks have done, and from what the device says of itself.
pub type TimingsSource = Arc<dyn Fn(&[RankStatus], Option<String>) -> serde_json::Value + Send + Sync>;

/// Why an engine cannot be made.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The way to the engine's thread.
#[derive(Clone)]
pub struct Worker {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
    max_open: usize,
    timings: Option<TimingsSource>,
}

/// Replies to one request. Dropping it cancels the request.
pub(crate) struct Replies {
    pub(crate) receiver: UnboundedReceiver<Reply>,
}

impl Worker {
    /// Starts the thread; returns when the first engine is ready. At most `max_open` requests wait or run. With an engine
    /// comes a function that says how many weight bytes its steps read.
    ///
    /// # Errors
    /// The first engine cannot be made.
    pub fn start(
        make: impl FnMut() -> Result<(Engine, StepBytes), BoxError> + Send + 'static,
        max_open: usize,
    ) -> Result<Worker, BoxError> {
        let shared = Arc::new(Shared {
            is_ready: AtomicBool::new(false),
            is_stopping: AtomicBool::new(false),
            is_ended: AtomicBool::new(false),
            n_open: AtomicUsize::new(0),
            status: Mutex::default(),
            ranks: Mutex::default(),
            warning: Mutex::default(),
            progress: Mutex::new(Instant::now()),
        });
        let (jobs, receiver) = channel();
        let (first, first_result) = channel();
        let thread_shared = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("tandem-engine".into())
            // Constraints recurse here too.
            .stack_size(STACK_BYTES)
            .spawn(move || run(make, &receiver, &thread_shared, first))?;
        first_result.recv()??;
        Ok(Worker { jobs, shared, thread: Arc::new(Mutex::new(Some(thread))), max_open, timings: None })
    }

    /// The same, whose timings can be asked for.
    #[must_use]
    pub fn with_timings(self, timings: TimingsSource) -> Worker {
        Worker { timings: Some(timings), ..self }
    }

    /// A record of the timings so far.
    pub fn timings(&self) -> Option<serde_json::Value> {
        let warning = self.shared.warning.lock().unwrap_or_else(|e| e.into_inner()).clone();
        self.timings.as_ref().map(|timings| timings(&self.ranks(), warning))
    }

    /// Whether requests are served.
    pub(crate) fn is_ready(&self) -> bool {
        self.shared.is_ready.load(Ordering::Relaxed) && !self.shared.is_stopping.load(Ordering::Relaxed)
    }

    /// Stops being ready; requests in flight go on.
    pub fn stop(&self) {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
    }

    /// Ends the thread, and with it whatever is still in flight; returns when the engine has put everything away.
    pub fn end(&self) {
        self.shared.is_ended.store(true, Ordering::Relaxed);
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(thread) = thread {
            // A panic of the engine has been reported already.
            let _ = thread.join();
        }
    }

    /// State as of the last step.
    pub(crate) fn status(&self) -> Status {
        *self.shared.status.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// For how long requests have waited without a step that passed all ranks; zero if nothing waits.
    pub(crate) fn stalled_for(&self) -> Duration {
        match self.shared.n_open.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            _ => self.shared.progress.lock().unwrap_or_else(|e| e.into_inner()).elapsed(),
        }
    }

    /// The ranks as of about a second ago.
    pub(crate) fn ranks(&self) -> Vec<RankStatus> {
        self.shared.ranks.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Log-probabilities of a prompt's tokens from the second on, and of `n_top` likeliest ones at each place.
    ///
    /// # Errors
    /// The queue is full, the engine fails, or it takes too long.
    pub(crate) async fn score(
        &self,
        tokens: Vec<u32>,
        n_top: usize,
        timeout: Duration,
    ) -> Result<Vec<Logprobs>, ApiError> {
        self.check_open()?;
        self.shared.n_open.fetch_add(1, Ordering::Relaxed);
        let place = Place(Arc::clone(&self.shared));
        let (reply, scores) = oneshot::channel();
        let scoring = Scoring { tokens, n_top, sequence: Sequence::default(), scores: vec![], reply, _place: place };
        let gone = |_| ApiError::unavailable("the engine has stopped");
        self.jobs.send(Job::Score(scoring)).map_err(|_| ApiError::unavailable("the engine has stopped"))?;
        match tokio::time::timeout(timeout, scores).await {
            Ok(scores) => scores.map_err(gone)?,
            Err(_) => Err(ApiError::deadline(timeout.as_secs())),
        }
    }

    /// Whether another request would be taken now.
    ///
    /// # Errors
    /// The queue is full, or there is no engine.
    pub(crate) fn check_open(&self) -> Result<(), ApiError> {
        let n_open = self.shared.n_open.load(Ordering::Relaxed);
        match (self.is_ready(), n_open < self.max_open) {
            (true, true) => Ok(()),
            (true, false) => Err(ApiError::busy(n_open)),
            (false, _) => Err(ApiError::unavailable("the engine is starting or stopping; try again later")),
        }
    }

    /// Hands requests to the engine, all or none of them.
    ///
    /// # Errors
    /// The queue is full, or there is no engine.
    pub(crate) fn submit(&self, requests: Vec<Request>) -> Result<Vec<Replies>, ApiError> {
        if !self.is_ready() {
            return Err(ApiError::unavailable("the engine is starting or stopping; try again later"));
        }
        let n = requests.len();
        let n_open = self.shared.n_open.fetch_add(n, Ordering::Relaxed);
        if n_open + n > self.max_open {
            self.shared.n_open.fetch_sub(n, Ordering::Relaxed);
            return Err(ApiError::busy(n_open));
        }
        // From here on dropping a place counts down.
        let places: Vec<Place> = (0..n).map(|_| Place(Arc::clone(&self.shared))).collect();
        requests
            .into_iter()
            .zip(places)
            .map(|(request, place)| {
                let (replies, receiver) = unbounded_channel();
                let client = Client { replies, _place: place };
                let sent = self.jobs.send(Job::Generate { request, client });
                sent.map_err(|_| ApiError::unavailable("the engine has stopped"))?;
                Ok(Replies { receiver })
            })
            .collect()
    }
}

fn run(
    mut make: impl FnMut() -> Result<(Engine, StepBytes), BoxError>,
    jobs: &Receiver<Job>,
    shared: &Shared,
    first: Sender<Result<(), BoxError>>,
) {
    let mut first = Some(first);
    loop {
        match make() {
            Ok((mut engine, step_bytes)) => {
                shared.is_ready.store(true, Ordering::Relaxed);
                if let Some(first) = first.take() {
                    let _ = first.send(Ok(()));
                }
                // A panic is a bug of ours, and no reason to leave everybody without service.
                let served = catch_unwind(AssertUnwindSafe(|| serve(&mut engine, jobs, shared, &step_bytes)));
                let error = match served {
                    Ok(None) => return,
                    Ok(Some(error)) => error.to_string(),
                    Err(_) => "it panicked".to_owned(),
                };
                shared.is_ready.store(false, Ordering::Relaxed);
                {
                    let mut status = shared.status.lock().unwrap_or_else(|e| e.into_inner());
                    *status = Status { restarts: status.restarts + 1, ..Status::default() };
                }
                tracing::error!("the engine failed and is made again: {error}");
            }
            Err(error) => {
                if let Some(first) = first.take() {
                    let _ = first.send(Err(error));
                    return;
                }
                let error = chain(&*error);
                tracing::error!("the engine cannot be made: {error}; trying again in {} s", RETRY.as_secs());
                std::thread::sleep(RETRY);
                if shared.is_ended.load(Ordering::Relaxed) {
                    return;
                }
            }
        }
    }
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Serves until the engine fails, or the server ends (`None`).
fn serve(engine: &mut Engine, jobs: &Receiver<Job>, shared: &Shared, step_bytes: &StepBytes) -> Option<EngineError> {
    let mut clients: HashMap<RequestId, Client> = HashMap::new();
    let mut outputs: Vec<Output> = vec![];
    let mut rates = Rates::new();
    if let Err(error) = ask_ranks(engine, shared) {
        return Some(error);
    }
    let (mut asked, mut steps_asked) = (Instant::now(), 0);
    let mut scorings: VecDeque<Scoring> = VecDeque::new();
    loop {
        shared.note_progress();
        let is_idle = clients.is_empty() && scorings.is_empty();
        let mut next =
            if is_idle { jobs.recv_timeout(IDLE) } else { jobs.try_recv().map_err(|_| RecvTimeoutError::Timeout) };
        let is_alone = is_idle && matches!(next, Err(RecvTimeoutError::Disconnected));
        if is_alone || shared.is_ended.load(Ordering::Relaxed) {
            return None;
        }
        while let Ok(job) = next {
            match job {
                Job::Score(scoring) => scorings.push_back(scoring),
                Job::Generate { request, client } => match engine.submit(request) {
                    Ok(id) => {
                        clients.insert(id, client);
                    }
                    Err(error) => client.send(Reply::Error(ApiError::invalid("", error.to_string()))),
                },
            }
            next = jobs.try_recv().map_err(|_| RecvTimeoutError::Timeout);
        }
        clients.retain(|id, client| {
            let is_gone = client.replies.is_closed();
            if is_gone {
                engine.cancel(*id);
            }
            !is_gone
        });
        if let Some(mut scoring) = scorings.pop_front() {
            let done = if scoring.reply.is_closed() { Ok(true) } else { scoring.advance(engine) };
            match done {
                Ok(false) => scorings.push_front(scoring),
                done => {
                    engine.release(&mut scoring.sequence);
                    let is_fatal = matches!(done, Err(EngineError::Device(_) | EngineError::Ranks(_)));
                    let message = done.as_ref().err().map(ToString::to_string);
                    let scores = match &message {
                        None => Ok(std::mem::take(&mut scoring.scores)),
                        Some(message) => Err(ApiError::internal(message.clone())),
                    };
                    let _ = scoring.reply.send(scores);
                    if let (true, Err(error)) = (is_fatal, done) {
                        return Some(fail(&clients, error));
                    }
                }
            }
        }
        if !clients.is_empty() {
            let before = engine.counters();
            if let Err(error) = engine.step(&mut outputs) {
                return Some(fail(&clients, error));
            }
            if engine.counters().steps > before.steps {
                rates.add(
                    engine.counters().generated_tokens - before.generated_tokens,
                    step_bytes(engine.last_step_rows()),
                );
            }
        }
        let now = Instant::now();
        for Output { request, event } in outputs.drain(..) {
            let is_end = matches!(event, Event::Finished(_) | Event::Failed(_));
            if let Some(client) = clients.get(&request) {
                client.send(Reply::Event(event, now));
            }
            if is_end {
                clients.remove(&request);
            }
        }
        let steps = engine.counters().steps;
        if steps > steps_asked && asked.elapsed() >= RANKS {
            if let Err(error) = ask_ranks(engine, shared) {
                return Some(fail(&clients, error));
            }
            (asked, steps_asked) = (Instant::now(), steps);
        }
        let mut status = shared.status.lock().unwrap_or_else(|e| e.into_inner());
        let (tokens_per_second, bytes_per_second) = rates.current();
        *status = Status {
            running: engine.n_running(),
            waiting: engine.n_waiting(),
            pages: engine.blocks().n_pages(),
            pages_used: engine.blocks().n_used(),
            pages_cached: engine.blocks().n_idle(),
            counters: engine.counters(),
            tokens_per_second,
            bytes_per_second,
            restarts: status.restarts,
            device_warns: engine.warning().is_some(),
        };
    }
}

/// Notes what the ranks have done.
fn ask_ranks(engine: &mut Engine, shared: &Shared) -> Result<(), EngineError> {
    let ranks = engine.ranks()?;
    *shared.ranks.lock().unwrap_or_else(|e| e.into_inner()) = ranks;
    *shared.warning.lock().unwrap_or_else(|e| e.into_inner()) = engine.warning();
    Ok(())
}

/// Tells everybody that the engine failed.
fn fail(clients: &HashMap<RequestId, Client>, error: EngineError) -> EngineError {
    let message = format!("the engine failed: {error}; it is being made again");
    clients.values().for_each(|client| client.send(Reply::Error(ApiError::unavailable(message.clone()))));
    error
}

/// Tokens and bytes per second, over windows of about a second.
struct Rates {
    start: Instant,
    tokens: u64,
    bytes: u64,
    last: (f64, f64),
}

impl Rates {
    const WINDOW: f64 = 1.0;

    fn new() -> Rates {
        Rates { start: Instant::now(), tokens: 0, bytes: 0, last: (0.0, 0.0) }
    }

    fn add(&mut self, tokens: u64, bytes: u64) {
        self.tokens += tokens;
        self.bytes += bytes;
    }

    fn current(&mut self) -> (f64, f64) {
        let seconds = self.start.elapsed().as_secs_f64();
        if seconds >= Rates::WINDOW {
            let last = (self.tokens as f64 / seconds, self.bytes as f64 / seconds);
            *self = Rates { last, ..Rates::new() };
        }
        self.last
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use tandem_core::{Batch, Checkpoint, ModelConfig};
    use tandem_engine::{BlockManager, ModelRunner, Runner};
    use tandem_model::Limits;
    use tandem_wgpu::WgpuBackend;

    /// Fails at its third step while `is_broken`, by an error or a panic. A step begins when `gate` is free.
    struct Fragile {
        n_steps: usize,
        panics: bool,
        is_broken: Arc<AtomicBool>,
        gate: Arc<Mutex<()>>,
    }

    impl Runner for Fragile {
        fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
            drop(self.gate.lock().unwrap());
            self.n_steps += 1;
            if self.n_steps >= 3 && self.is_broken.load(Ordering::Relaxed) {
                assert!(!self.panics, "as a bug would");
                return Err(EngineError::Device("rank 1 on host b does not answer".into()));
            }
            logits.extend(batch.logits_rows.iter().flat_map(|_| [0.0, 1.0]));
            Ok(())
        }

        fn limits(&self) -> Limits {
            Limits { max_rows: 64, max_logits_rows: 8 }
        }

        fn vocab_size(&self) -> usize {
            2
        }

        fn warning(&self) -> Option<String> {
            (self.n_steps > 2).then(|| "the GPU reads weights more slowly".into())
        }
    }

    fn request() -> Request {
        Request { prompt: vec![1, 1], max_tokens: 5, ..Request::default() }
    }

    fn start(panics: bool, is_broken: &Arc<AtomicBool>, gate: &Arc<Mutex<()>>, max_open: usize) -> Worker {
        let (is_broken, gate) = (Arc::clone(is_broken), Arc::clone(gate));
        let make = move || {
            let runner = Fragile { n_steps: 0, panics, is_broken: Arc::clone(&is_broken), gate: Arc::clone(&gate) };
            let engine = Engine::new(Box::new(runner), BlockManager::for_tokens(512), 256, 256);
            Ok((engine, Box::new(|_| 0u64) as StepBytes))
        };
        Worker::start(make, max_open).unwrap()
    }

    fn read(mut replies: Replies) -> (usize, Option<String>) {
        let mut n_tokens = 0;
        loop {
            match replies.receiver.blocking_recv() {
                Some(Reply::Event(Event::Token { .. }, _)) => n_tokens += 1,
                Some(Reply::Event(Event::Finished(_), _)) => return (n_tokens, None),
                Some(Reply::Error(error)) => return (n_tokens, Some(error.body().to_string())),
                Some(_) => {}
                None => return (n_tokens, Some("the engine has stopped".to_owned())),
            }
        }
    }

    #[test]
    fn a_failed_engine_is_one_error_for_each_request_and_comes_back() {
        for (panics, expected) in [(false, "rank 1 on host b"), (true, "the engine has stopped")] {
            let is_broken = Arc::new(AtomicBool::new(true));
            let worker = start(panics, &is_broken, &Arc::default(), 4);
            let in_flight = worker.submit(vec![request(), request()]).unwrap();
            for replies in in_flight {
                let (_, error) = read(replies);
                assert!(error.unwrap().contains(expected));
            }
            is_broken.store(false, Ordering::Relaxed);
            let again = loop {
                match worker.submit(vec![request()]) {
                    Ok(mut replies) => break replies.remove(0),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            };
            assert_eq!(read(again), (5, None));
            // The two requests may fail in one step or in two.
            assert!((1..=2).contains(&worker.status().restarts), "{}", worker.status().restarts);
        }
    }

    #[test]
    fn a_device_that_lost_memory_is_in_the_metrics() {
        let metrics = crate::metrics::Metrics::new("model", 1e9);
        let worker = start(false, &Arc::default(), &Arc::default(), 2);
        let lost = |worker: &Worker| metrics.render(&worker.status(), &[]).contains("tandem_device_memory_lost 1\n");
        assert!(!lost(&worker), "before the first step");
        assert_eq!(read(worker.submit(vec![request()]).unwrap().remove(0)), (5, None));
        let start = Instant::now();
        while !lost(&worker) {
            assert!(start.elapsed() < Duration::from_secs(10), "after some steps");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Loses its device before its second step, once for all engines.
    struct Losing {
        inner: ModelRunner<WgpuBackend>,
        n_steps: usize,
        is_lost: Arc<AtomicBool>,
    }

    impl Runner for Losing {
        fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
            self.n_steps += 1;
            if self.n_steps == 2 && !self.is_lost.swap(true, Ordering::Relaxed) {
                self.inner.backend().lose();
            }
            self.inner.step(batch, logits)
        }

        fn limits(&self) -> Limits {
            self.inner.limits()
        }

        fn vocab_size(&self) -> usize {
            self.inner.vocab_size()
        }
    }

    fn losing_engine(is_lost: &Arc<AtomicBool>) -> Result<(Engine, StepBytes), BoxError> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/fable-30m-MXFP4-Q8");
        let (config, checkpoint) = (ModelConfig::load(&dir)?, Checkpoint::open(&dir)?);
        let backend = WgpuBackend::new(&Default::default())?;
        let limits = Limits { max_rows: 16, max_logits_rows: 4 };
        let model = tandem_model::load(&backend, &config, &checkpoint, limits, &mut |_| {})?;
        let blocks = BlockManager::for_tokens(256);
        let inner = ModelRunner::new(backend, model, limits, config.vocab_size, blocks.n_slots());
        let runner = Losing { inner, n_steps: 0, is_lost: Arc::clone(is_lost) };
        Ok((Engine::new(Box::new(runner), blocks, 256, 256), Box::new(|_| 0u64) as StepBytes))
    }

    /// As after a time-out of the driver: those who wait get one error that names the operation, and the next is served.
    #[test]
    fn a_lost_gpu_is_one_error_and_a_new_one_is_opened() {
        if !tandem_wgpu::device_present() {
            assert!(std::env::var_os("TANDEM_REQUIRE_VULKAN").is_none(), "no Vulkan or Metal device was found");
            return;
        }
        let is_lost = Arc::new(AtomicBool::new(false));
        let worker = Worker::start(move || losing_engine(&is_lost), 4).unwrap();
        let waiting = worker.submit(vec![request(), request()]).unwrap();
        for replies in waiting {
            let (_, error) = read(replies);
            let error = error.unwrap();
            assert!(error.contains("was lost during"), "{error}");
        }
        let again = loop {
            match worker.submit(vec![request()]) {
                Ok(mut replies) => break replies.remove(0),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        assert_eq!(read(again), (5, None));
        assert_eq!(worker.status().restarts, 1);
    }

    #[test]
    fn the_queue_is_bounded_and_places_come_back() {
        let gate = Arc::default();
        let worker = start(false, &Arc::default(), &gate, 2);
        assert!(worker.submit(vec![request(), request(), request()]).is_err());
        // While the gate is held no step ends, so both keep their places.
        let held = gate.lock().unwrap();
        let places = worker.submit(vec![request(), request()]).unwrap();
        assert!(worker.submit(vec![request()]).is_err());
        drop((places, held));
        // The engine lets go of them before its next step.
        let again = loop {
            match worker.submit(vec![request()]) {
                Ok(mut replies) => break replies.remove(0),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        assert_eq!(read(again), (5, None));
        while worker.status().pages_used > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
