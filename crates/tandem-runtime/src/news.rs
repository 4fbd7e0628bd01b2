//! What happens while a model is loaded, for whoever shows it.

/// Something to show.
#[derive(Clone, Debug)]
pub enum News {
    /// Weights that have arrived.
    Loading {
        /// Bytes.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A line that the user should see: the plan of several ranks, where experts are, what is slower than it could be.
    Note(String),
}

/// Takes [`News`] as they come.
pub type OnNews<'a> = &'a mut dyn FnMut(News);

/// For callers that show nothing.
pub fn ignore_news(_: News) {}
