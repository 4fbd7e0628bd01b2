//! What happens while a model is loaded or converted, for whoever shows it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Something to show.
#[derive(Clone, Debug)]
pub enum News {
    /// How far a piece of work is.
    Progress(Progress),
    /// A line that the user should see: the plan of several ranks, where experts are, what is slower than it could be.
    Note(String),
}

/// How far a piece of work is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Names the work: `loading`, `writing`.
    pub doing: &'static str,
    /// What is counted.
    pub unit: Unit,
    /// So far.
    pub done: u64,
    /// In all.
    pub total: u64,
}

/// What a piece of work is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of weights.
    Bytes,
    /// Tokens run.
    Tokens,
}

/// Takes [`News`] as they come.
pub type OnNews<'a> = &'a mut (dyn FnMut(News) + Send);

/// For callers that show nothing.
pub fn ignore_news(_: News) {}

/// Counts one piece of work, from any thread.
pub struct Meter<'a> {
    doing: &'static str,
    unit: Unit,
    total: u64,
    done: AtomicU64,
    on_news: Mutex<OnNews<'a>>,
}

impl<'a> Meter<'a> {
    /// Nothing is done yet.
    pub fn new(doing: &'static str, unit: Unit, total: u64, on_news: OnNews<'a>) -> Meter<'a> {
        Meter { doing, unit, total, done: AtomicU64::new(0), on_news: Mutex::new(on_news) }
    }

    /// `n` more are done.
    pub fn add(&self, n: u64) {
        let done = self.done.fetch_add(n, Ordering::Relaxed) + n;
        self.tell(done);
    }

    /// `n` of those that were done have to be done again.
    pub fn take_back(&self, n: u64) {
        let before = self.done.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |done| Some(done.saturating_sub(n)));
        self.tell(before.unwrap_or_default().saturating_sub(n));
    }

    /// All is done.
    pub fn finish(self) {
        self.tell(self.total);
    }

    fn tell(&self, done: u64) {
        let progress = Progress { doing: self.doing, unit: self.unit, done, total: self.total };
        let mut on_news = self.on_news.lock().unwrap_or_else(|e| e.into_inner());
        on_news(News::Progress(progress));
    }
}
