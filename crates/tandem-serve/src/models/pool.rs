//! Which models are in memory: requests wait for theirs in the order of their coming, idle models leave for them, the one
//! least recently used first.
//!
//! A model that answers is never ended: it takes no more requests, and leaves after its last answer. What a model is (a
//! process, or anything in a test) is the [`Launcher`]'s.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

/// After a failed load, until it is tried again; doubled with each failure up to the second one.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// A model that was loaded for a request that is to come again stays at least this long for it.
const UNUSED: Duration = Duration::from_secs(60);
/// For the end of a process to be known at most.
const NOTICED: Duration = Duration::from_secs(3);
/// Between two looks at the memory of models and at the clock.
const TICK: Duration = Duration::from_millis(500);

/// A model that can be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    /// Its name in requests.
    pub(crate) name: String,
    /// Its directory.
    pub(crate) dir: PathBuf,
    /// Bytes of memory that it will probably take, or why it cannot be loaded.
    pub(crate) bytes: Result<u64, String>,
}

impl Spec {
    /// Why it can never be loaded, if that is so.
    pub(crate) fn never(&self, memory_bytes: u64) -> Option<String> {
        match &self.bytes {
            Ok(bytes) => (*bytes > memory_bytes).then(|| too_large(*bytes, memory_bytes)),
            Err(why) => Some(why.clone()),
        }
    }
}

/// Brings models into memory and out of it.
pub(crate) trait Launcher: Send + Sync + 'static {
    /// A loaded model.
    type Running: Send + 'static;
    /// Where its requests go.
    type Address: Clone + Send + Sync + 'static;

    /// Loads a model; to drop the future ends the load. Bytes are those that it really takes, if they are known.
    fn load(&self, spec: &Spec) -> impl Future<Output = Result<(Self::Running, Self::Address), String>> + Send;
    /// Bytes of memory that it takes.
    fn bytes(&self, running: &Self::Running) -> Option<u64>;
    /// Waits until it ends by itself, and says why.
    fn ended(&self, running: &mut Self::Running) -> impl Future<Output = String> + Send;
    /// Ends it. Its memory is free when this returns.
    fn end(&self, running: Self::Running) -> impl Future<Output = ()> + Send;
}

/// How long an idle model stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepAlive {
    /// Until its memory is needed.
    Forever,
    /// This long after its last answer, zero: not at all.
    For(Duration),
}

/// Bounds of all models together.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Bytes of memory.
    pub(crate) memory_bytes: u64,
    /// For models whose requests say nothing.
    pub(crate) keep_alive: KeepAlive,
    /// Names of models that are loaded at once and never leave.
    pub(crate) pinned: Vec<String>,
}

/// Why a request gets no model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is none of this name.
    Unknown,
    /// It is not loaded, after the time that the request would wait; seconds until it probably is.
    NotYet(u32),
    /// It cannot be loaded; seconds until it is tried again, none if only a person can help.
    Failed(String, Option<u32>),
    /// The server ends.
    Ending,
}

/// Where a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// On the disk.
    Unloaded,
    /// On its way into memory.
    Loading,
    /// In memory.
    Loaded,
    /// On its way out.
    Stopping,
    /// On the disk, and the last load failed, or it ended by itself.
    Failed,
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            State::Unloaded => "unloaded",
            State::Loading => "loading",
            State::Loaded => "loaded",
            State::Stopping => "stopping",
            State::Failed => "failed",
        }
    }

    fn is_in_memory(self) -> bool {
        matches!(self, State::Loading | State::Loaded | State::Stopping)
    }
}

/// A model as lists show it.
#[derive(Clone, Debug)]
pub(crate) struct Shown<A> {
    pub(crate) name: String,
    pub(crate) state: State,
    pub(crate) is_pinned: bool,
    pub(crate) error: Option<String>,
    /// Bytes that it takes, or will probably take.
    pub(crate) bytes: Option<u64>,
    pub(crate) n_running: usize,
    pub(crate) n_waiting: usize,
    pub(crate) n_loads: u64,
    pub(crate) n_evictions: u64,
    pub(crate) n_failures: u64,
    pub(crate) load_seconds: Option<f64>,
    /// Time until it leaves if nobody asks.
    pub(crate) leaves_in: Option<Duration>,
    /// Time since its last use.
    pub(crate) unused_for: Duration,
    pub(crate) address: Option<A>,
}

struct Waiter<L: Launcher> {
    ticket: u64,
    sender: oneshot::Sender<Result<Lease<L>, Refusal>>,
}

struct Entry<L: Launcher> {
    spec: Spec,
    state: State,
    is_pinned: bool,
    /// It leaves after its last answer: another model needs the memory.
    is_draining: bool,
    address: Option<L::Address>,
    /// Measured, of this load or the last one.
    measured: Option<u64>,
    n_running: usize,
    waiters: Vec<Waiter<L>>,
    /// A request wanted it and did not wait; its place among waiters.
    wish: Option<u64>,
    last_used: Instant,
    /// Whoever made it load has not come yet.
    is_unused: bool,
    keep_alive: KeepAlive,
    stop: Option<oneshot::Sender<()>>,
    error: Option<String>,
    n_failures_in_a_row: u32,
    retry_at: Instant,
    n_loads: u64,
    n_evictions: u64,
    n_failures: u64,
    load_begun: Instant,
    load_time: Option<Duration>,
}

impl<L: Launcher> Entry<L> {
    fn new(spec: Spec, is_pinned: bool, keep_alive: KeepAlive) -> Entry<L> {
        let now = Instant::now();
        Entry {
            spec,
            state: State::Unloaded,
            is_pinned,
            is_draining: false,
            address: None,
            measured: None,
            n_running: 0,
            waiters: vec![],
            wish: None,
            last_used: now,
            is_unused: false,
            keep_alive,
            stop: None,
            error: None,
            n_failures_in_a_row: 0,
            retry_at: now,
            n_loads: 0,
            n_evictions: 0,
            n_failures: 0,
            load_begun: now,
            load_time: None,
        }
    }

    /// Measured where it is loaded; else what it will take, a load's passing needs too, which a measured one no longer has.
    fn bytes(&self) -> u64 {
        let expected = self.spec.bytes.as_ref().ok().copied();
        match self.state {
            State::Loaded | State::Stopping => self.measured.or(expected).unwrap_or(0),
            State::Unloaded | State::Loading | State::Failed => self.measured.max(expected).unwrap_or(0),
        }
    }

    /// Place in the queue for memory, if it is in it.
    fn ticket(&self, now: Instant) -> Option<u64> {
        let first = self.waiters.iter().map(|waiter| waiter.ticket).min();
        let wanted = first.into_iter().chain(self.wish).min();
        let wanted = if self.is_pinned { Some(0) } else { wanted };
        wanted.filter(|_| match self.state {
            State::Unloaded | State::Stopping => true,
            State::Failed => now >= self.retry_at,
            State::Loading | State::Loaded => false,
        })
    }

    fn is_idle(&self) -> bool {
        self.state == State::Loaded && self.n_running == 0 && self.waiters.is_empty()
    }

    fn leaves_at(&self) -> Option<Instant> {
        match self.keep_alive {
            KeepAlive::For(time) if !self.is_pinned && self.state == State::Loaded => {
                let time = if self.is_unused { time.max(UNUSED) } else { time };
                self.last_used.checked_add(time)
            }
            _ => None,
        }
    }

    fn retry_after(&self, now: Instant) -> u32 {
        let usual = self.load_time.unwrap_or(Duration::from_secs(5));
        let left = match self.state {
            State::Loading => usual.saturating_sub(now - self.load_begun),
            _ => usual,
        };
        (left.as_secs_f64().ceil() as u32).clamp(1, 60)
    }

    fn refuse(&mut self, refusal: &Refusal, actions: &mut Vec<Action<L>>) {
        self.wish = None;
        actions.extend(self.waiters.drain(..).map(|waiter| Action::Answer(waiter.sender, Err(refusal.clone()))));
    }
}

/// What is done once the lock is free.
enum Action<L: Launcher> {
    Load(usize),
    Answer(oneshot::Sender<Result<Lease<L>, Refusal>>, Result<Lease<L>, Refusal>),
}

/// Whether there is memory for a model.
enum Room {
    Now,
    Later,
    Never(String),
}

struct Inner<L: Launcher> {
    entries: Vec<Entry<L>>,
    next_ticket: u64,
    is_ending: bool,
}

/// The models of a server.
pub(crate) struct Pool<L: Launcher> {
    launcher: L,
    limits: Limits,
    inner: Mutex<Inner<L>>,
}

/// A request's hold on a loaded model: it stays until this is dropped.
pub(crate) struct Lease<L: Launcher> {
    pool: Arc<Pool<L>>,
    place: usize,
    n_loads: u64,
    /// Where to send the request.
    pub(crate) address: L::Address,
}

impl<L: Launcher> Lease<L> {
    /// Waits a little for the end of a model that does not answer to be known, so that the next request loads it again.
    /// Returns whether it has ended.
    pub(crate) async fn has_ended(&self) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < NOTICED {
            let is_as_before = {
                let inner = self.pool.lock();
                let entry = &inner.entries[self.place];
                entry.state == State::Loaded && entry.n_loads == self.n_loads
            };
            if !is_as_before {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }
}

impl<L: Launcher> Drop for Lease<L> {
    fn drop(&mut self) {
        let place = self.place;
        self.pool.change(|inner| {
            let entry = &mut inner.entries[place];
            entry.n_running = entry.n_running.saturating_sub(1);
            entry.last_used = Instant::now();
        });
    }
}

/// A request that no longer waits frees what was kept for it.
struct Leaves<'a, L: Launcher>(&'a Arc<Pool<L>>);

impl<L: Launcher> Drop for Leaves<'_, L> {
    fn drop(&mut self) {
        self.0.change(|_| ());
    }
}

impl<L: Launcher> Pool<L> {
    /// The models of `specs`, none of them loaded; pinned ones are from now on.
    pub(crate) fn new(launcher: L, limits: Limits, specs: Vec<Spec>) -> Arc<Pool<L>> {
        let inner = Inner { entries: vec![], next_ticket: 1, is_ending: false };
        let pool = Arc::new(Pool { launcher, limits, inner: Mutex::new(inner) });
        pool.update(specs);
        let watched = Arc::downgrade(&pool);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(TICK).await;
                let Some(pool) = watched.upgrade() else { return };
                pool.change(|_| ());
            }
        });
        pool
    }

    /// The models that there are now: new ones come in, those that are gone leave unless they are in memory.
    pub(crate) fn update(self: &Arc<Self>, specs: Vec<Spec>) {
        self.change(|inner| {
            let mut found: HashMap<String, Spec> = specs.into_iter().map(|spec| (spec.name.clone(), spec)).collect();
            for entry in &mut inner.entries {
                match found.remove(&entry.spec.name) {
                    Some(spec) => entry.spec = spec,
                    // Places are what leases know models by: none is removed.
                    None if entry.state.is_in_memory() => {}
                    None => entry.spec.bytes = Err(format!("{} is gone", entry.spec.dir.display())),
                }
            }
            let mut new: Vec<Spec> = found.into_values().collect();
            new.sort_by(|one, other| one.name.cmp(&other.name));
            for spec in new {
                let is_pinned = self.limits.pinned.contains(&spec.name);
                inner.entries.push(Entry::new(spec, is_pinned, self.limits.keep_alive));
            }
        });
    }

    /// Waits for the model, at most this long; it is on its way even if the request then has to come again.
    pub(crate) async fn acquire(self: &Arc<Self>, name: &str, wait: Duration) -> Result<Lease<L>, Refusal> {
        let (sender, receiver) = oneshot::channel();
        let deadline = Instant::now() + wait.min(Duration::from_secs(1 << 32));
        let place = self.change(|inner| {
            if inner.is_ending {
                return Err(Refusal::Ending);
            }
            let ticket = inner.next_ticket;
            let place = inner.entries.iter().position(|entry| entry.spec.name == name).ok_or(Refusal::Unknown)?;
            let entry = &mut inner.entries[place];
            if let (Err(why), false) = (&entry.spec.bytes, entry.state.is_in_memory()) {
                return Err(Refusal::Failed(why.clone(), None));
            }
            let now = Instant::now();
            if let (State::Failed, Some(why)) = (entry.state, &entry.error)
                && now < entry.retry_at
            {
                let seconds = (entry.retry_at - now).as_secs_f64().ceil() as u32;
                return Err(Refusal::Failed(why.clone(), Some(seconds.max(1))));
            }
            entry.waiters.push(Waiter { ticket, sender });
            inner.next_ticket += 1;
            Ok(place)
        })?;
        let _leaves = Leaves(self);
        tokio::select! {
            biased;
            answer = receiver => answer.unwrap_or(Err(Refusal::Ending)),
            () = tokio::time::sleep_until(deadline) => Err(self.change(|inner| {
                let ticket = inner.next_ticket;
                inner.next_ticket += 1;
                let entry = &mut inner.entries[place];
                if entry.state != State::Loaded {
                    entry.wish.get_or_insert(ticket);
                }
                Refusal::NotYet(entry.retry_after(Instant::now()))
            })),
        }
    }

    /// How long the model stays after its last answer.
    pub(crate) fn keep_alive(self: &Arc<Self>, name: &str, keep_alive: KeepAlive) {
        self.change(|inner| {
            if let Some(entry) = inner.entries.iter_mut().find(|entry| entry.spec.name == name) {
                entry.keep_alive = keep_alive;
            }
        });
    }

    /// Every model, in the order of names.
    pub(crate) fn list(&self) -> Vec<Shown<L::Address>> {
        let now = Instant::now();
        let inner = self.lock();
        let shown = inner.entries.iter().map(|entry| Shown {
            name: entry.spec.name.clone(),
            state: entry.state,
            is_pinned: entry.is_pinned,
            error: entry.spec.bytes.as_ref().err().or(entry.error.as_ref()).cloned(),
            bytes: Some(entry.bytes()).filter(|bytes| *bytes > 0),
            n_running: entry.n_running,
            n_waiting: entry.waiters.iter().filter(|waiter| !waiter.sender.is_closed()).count(),
            n_loads: entry.n_loads,
            n_evictions: entry.n_evictions,
            n_failures: entry.n_failures,
            load_seconds: entry.load_time.map(|time| time.as_secs_f64()),
            leaves_in: entry.leaves_at().map(|at| at.saturating_duration_since(now)),
            unused_for: now.saturating_duration_since(entry.last_used),
            address: entry.address.clone().filter(|_| entry.state == State::Loaded),
        });
        let mut shown: Vec<_> = shown.collect();
        shown.sort_by(|one, other| one.name.cmp(&other.name));
        shown
    }

    /// Bytes of memory that models may take, and take.
    pub(crate) fn memory(&self) -> (u64, u64) {
        (self.limits.memory_bytes, used(&self.lock()))
    }

    /// Whether every pinned model is loaded.
    pub(crate) fn is_ready(&self) -> bool {
        let inner = self.lock();
        let n_pinned = inner.entries.iter().filter(|entry| entry.is_pinned && entry.state == State::Loaded).count();
        n_pinned == self.limits.pinned.len() && !inner.is_ending
    }

    /// Ends every model, and returns when all are gone.
    pub(crate) async fn end(self: &Arc<Self>) {
        self.change(|inner| inner.is_ending = true);
        while self.lock().entries.iter().any(|entry| entry.state.is_in_memory()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<L>> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Changes something, and then does whatever follows from it.
    fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut Inner<L>) -> T) -> T {
        let mut actions = vec![];
        let result = {
            let mut inner = self.lock();
            let result = change(&mut inner);
            self.schedule(&mut inner, &mut actions);
            result
        };
        for action in actions {
            match action {
                Action::Load(place) => drop(tokio::spawn(Arc::clone(self).supervise(place))),
                // A lease that nobody takes ends here.
                Action::Answer(sender, answer) => drop(sender.send(answer)),
            }
        }
        result
    }

    fn schedule(self: &Arc<Self>, inner: &mut Inner<L>, actions: &mut Vec<Action<L>>) {
        let now = Instant::now();
        for entry in &mut inner.entries {
            entry.waiters.retain(|waiter| !waiter.sender.is_closed());
        }
        if inner.is_ending {
            for entry in &mut inner.entries {
                entry.refuse(&Refusal::Ending, actions);
                stop(entry);
            }
            return;
        }
        // Who waited for a model that has just come goes before whoever wants its memory.
        self.grant(inner, actions);
        inner.entries.iter_mut().for_each(|entry| entry.is_draining = false);
        let mut queue: Vec<(u64, usize)> = vec![];
        queue.extend(inner.entries.iter().enumerate().filter_map(|(i, entry)| Some((entry.ticket(now)?, i))));
        queue.sort_unstable();
        for (_, place) in queue {
            if inner.entries[place].state == State::Stopping {
                break;
            }
            if let Err(why) = &inner.entries[place].spec.bytes {
                let refusal = Refusal::Failed(why.clone(), None);
                inner.entries[place].refuse(&refusal, actions);
                continue;
            }
            match self.make_room(inner, place) {
                Room::Now => {
                    let entry = &mut inner.entries[place];
                    entry.state = State::Loading;
                    entry.load_begun = now;
                    entry.error = None;
                    actions.push(Action::Load(place));
                }
                Room::Later => break,
                Room::Never(why) => {
                    let entry = &mut inner.entries[place];
                    entry.error = Some(why.clone());
                    entry.refuse(&Refusal::Failed(why, None), actions);
                }
            }
        }
        // Models that need not leave after all.
        self.grant(inner, actions);
        for entry in &mut inner.entries {
            if entry.is_idle() && !entry.is_pinned && entry.leaves_at().is_some_and(|at| at <= now) {
                stop(entry);
            }
        }
        self.keep_within(inner);
    }

    /// Gives loaded models to those who wait for them.
    fn grant(self: &Arc<Self>, inner: &mut Inner<L>, actions: &mut Vec<Action<L>>) {
        for (place, entry) in inner.entries.iter_mut().enumerate() {
            let Some(address) = entry.address.as_ref().filter(|_| entry.state == State::Loaded && !entry.is_draining)
            else {
                continue;
            };
            for waiter in entry.waiters.drain(..) {
                entry.n_running += 1;
                entry.is_unused = false;
                entry.last_used = Instant::now();
                let (pool, n_loads) = (Arc::clone(self), entry.n_loads);
                let lease = Lease { pool, place, n_loads, address: address.clone() };
                actions.push(Action::Answer(waiter.sender, Ok(lease)));
            }
        }
    }

    /// Lets models leave until there is room: idle ones at once, others after their last answer.
    fn make_room(&self, inner: &mut Inner<L>, place: usize) -> Room {
        let budget = self.limits.memory_bytes;
        let needed = inner.entries[place].bytes();
        let others = || inner.entries.iter().enumerate().filter(|(i, _)| *i != place).map(|(_, entry)| entry);
        let pinned: u64 =
            others().filter(|entry| entry.is_pinned && entry.state == State::Loaded).map(Entry::bytes).sum();
        if needed > budget {
            return Room::Never(too_large(needed, budget));
        }
        if needed + pinned > budget {
            return Room::Never(format!(
                "it needs {} of memory, and pinned models leave it {} of {} (--models-memory)",
                size(needed),
                size(budget.saturating_sub(pinned)),
                size(budget)
            ));
        }
        let in_use: u64 = others().filter(|entry| entry.state.is_in_memory()).map(Entry::bytes).sum();
        if in_use + needed <= budget {
            return Room::Now;
        }
        let leaving: u64 = others().filter(|entry| entry.state == State::Stopping).map(Entry::bytes).sum();
        let mut left = in_use - leaving;
        let mut candidates: Vec<usize> = (0..inner.entries.len())
            .filter(|i| *i != place && inner.entries[*i].state == State::Loaded && !inner.entries[*i].is_pinned)
            .collect();
        candidates.sort_by_key(|i| (!inner.entries[*i].is_idle(), inner.entries[*i].last_used));
        for i in candidates {
            if left + needed <= budget {
                break;
            }
            let entry = &mut inner.entries[i];
            left -= entry.bytes();
            if entry.n_running == 0 {
                entry.n_evictions += 1;
                stop(entry);
            } else {
                entry.is_draining = true;
            }
        }
        Room::Later
    }

    /// Models that have grown in memory leave like others, but not the last one.
    fn keep_within(&self, inner: &mut Inner<L>) {
        while used(inner) > self.limits.memory_bytes
            && inner.entries.iter().filter(|entry| entry.state.is_in_memory()).count() > 1
            && !inner.entries.iter().any(|entry| matches!(entry.state, State::Stopping | State::Loading))
        {
            let idle = inner.entries.iter_mut().filter(|entry| entry.is_idle() && !entry.is_pinned);
            let Some(entry) = idle.min_by_key(|entry| entry.last_used) else { return };
            entry.n_evictions += 1;
            stop(entry);
        }
    }

    /// A model from its load to its end.
    async fn supervise(self: Arc<Self>, place: usize) {
        let (stop, mut stopped) = oneshot::channel();
        let spec = {
            let mut inner = self.lock();
            inner.entries[place].stop = Some(stop);
            inner.entries[place].spec.clone()
        };
        if self.lock().is_ending {
            return self.gone(place, None);
        }
        let loaded = tokio::select! {
            loaded = self.launcher.load(&spec) => loaded,
            _ = &mut stopped => return self.gone(place, None),
        };
        let (mut running, address) = match loaded {
            Ok(loaded) => loaded,
            Err(why) => return self.gone(place, Some(why)),
        };
        let bytes = self.launcher.bytes(&running);
        self.change(|inner| {
            let entry = &mut inner.entries[place];
            // Of one that was told to end meanwhile the end comes below.
            if entry.state == State::Loading {
                entry.state = State::Loaded;
            }
            entry.address = Some(address);
            entry.measured = bytes.or(entry.measured);
            entry.last_used = Instant::now();
            entry.is_unused = true;
            entry.load_time = Some(entry.load_begun.elapsed());
            entry.n_loads += 1;
            entry.n_failures_in_a_row = 0;
            entry.wish = None;
        });
        let why = loop {
            tokio::select! {
                why = self.launcher.ended(&mut running) => break Some(why),
                _ = &mut stopped => break None,
                () = tokio::time::sleep(TICK) => {}
            }
            if let Some(bytes) = self.launcher.bytes(&running) {
                self.lock().entries[place].measured = Some(bytes);
            }
        };
        if why.is_none() {
            self.launcher.end(running).await;
        }
        self.gone(place, why);
    }

    /// A model is out of memory, if it is not as it should be for this reason.
    fn gone(self: &Arc<Self>, place: usize, why: Option<String>) {
        let mut refused = vec![];
        self.change(|inner| {
            let entry = &mut inner.entries[place];
            let failed_to_load = entry.state == State::Loading;
            entry.address = None;
            entry.stop = None;
            entry.is_draining = false;
            match why {
                Some(why) if entry.state != State::Stopping => {
                    entry.state = State::Failed;
                    entry.n_failures += 1;
                    entry.error = Some(why.clone());
                    entry.retry_at = Instant::now();
                    if failed_to_load {
                        let backoff = FIRST_BACKOFF.saturating_mul(1 << entry.n_failures_in_a_row.min(6));
                        entry.n_failures_in_a_row += 1;
                        entry.retry_at += backoff.min(LONGEST_BACKOFF);
                        let seconds = backoff.min(LONGEST_BACKOFF).as_secs() as u32;
                        entry.refuse(&Refusal::Failed(why, Some(seconds)), &mut refused);
                    }
                }
                _ => entry.state = State::Unloaded,
            }
        });
        for action in refused {
            if let Action::Answer(sender, answer) = action {
                drop(sender.send(answer));
            }
        }
    }
}

/// Tells a model in memory to end.
fn stop<L: Launcher>(entry: &mut Entry<L>) {
    if matches!(entry.state, State::Loading | State::Loaded) {
        entry.state = State::Stopping;
        if let Some(stop) = entry.stop.take() {
            // One that has just ended by itself does not listen.
            let _ = stop.send(());
        }
    }
}

fn too_large(needed: u64, budget: u64) -> String {
    let (needed, budget) = (size(needed), size(budget));
    format!("it needs {needed} of memory, and all models together may have {budget} (--models-memory)")
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    if bytes < 1_000_000_000 {
        format!("{:.0} MB", bytes as f64 / 1e6)
    } else {
        format!("{:.2} GB", bytes as f64 / 1e9)
    }
}

fn used<L: Launcher>(inner: &Inner<L>) -> u64 {
    inner.entries.iter().filter(|entry| entry.state.is_in_memory()).map(Entry::bytes).sum()
}
