//! What goes wrong between ranks, and what was being done then.

use std::fmt;

/// What a rank is doing while it communicates, for messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Doing {
    /// For example `all_reduce`.
    pub operation: &'static str,
    /// For example `attention`.
    pub part: &'static str,
    /// Decoder layer.
    pub layer: Option<usize>,
}

impl Doing {
    /// Something outside the layers.
    pub const fn of(operation: &'static str) -> Doing {
        Doing { operation, part: "", layer: None }
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.operation)?;
        if !self.part.is_empty() {
            write!(f, " of {}", self.part)?;
        }
        match self.layer {
            Some(layer) => write!(f, " in layer {layer}"),
            None => Ok(()),
        }
    }
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// A rank's process or connection ended.
    Lost {
        /// What the system said.
        why: String,
    },
    /// A rank gave no sign of life, or did not deliver in time.
    Stalled {
        /// How long was waited.
        seconds: f64,
    },
    /// A rank stopped and said why.
    Stopped {
        /// Its words.
        message: String,
    },
    /// A rank sent something else than the protocol asks for.
    Protocol {
        /// Expected and found.
        message: String,
    },
    /// A rank computed something else than the others.
    Diverged {
        /// What was compared.
        message: String,
    },
    /// The group could not be formed.
    Setup {
        /// What was expected, what was found, what to do.
        message: String,
    },
}

/// A failure and the rank that caused it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub struct CommError {
    /// What went wrong.
    pub failure: Failure,
    /// The rank at fault, if known.
    pub rank: Option<usize>,
    /// Its host, and what it holds, as far as that is known.
    pub host: String,
    /// What this rank was doing, if it was waiting.
    pub doing: Option<Doing>,
}

impl CommError {
    /// A failure caused by `rank` on `host`.
    pub fn by(rank: usize, host: &str, failure: Failure) -> CommError {
        CommError { failure, rank: Some(rank), host: host.to_string(), doing: None }
    }

    /// A group that could not be formed.
    pub fn setup(message: impl Into<String>) -> CommError {
        let failure = Failure::Setup { message: message.into() };
        CommError { failure, rank: None, host: String::new(), doing: None }
    }

    /// Adds what this rank was doing.
    #[must_use]
    pub fn while_doing(mut self, doing: Doing) -> CommError {
        self.doing.get_or_insert(doing);
        self
    }
}

impl fmt::Display for CommError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = self.rank.map_or_else(|| "a rank".to_string(), |rank| format!("rank {rank} ({})", self.host));
        match &self.failure {
            Failure::Lost { why } => write!(f, "{who} is gone: {why}")?,
            Failure::Stalled { seconds } => write!(
                f,
                "{who} did not answer for {seconds:.1} s; it hangs, or the network between the hosts is cut (--deadline \
                 changes the patience)"
            )?,
            // The words of the first rank that noticed; its own "while ..." is in them.
            Failure::Stopped { message } => write!(f, "{who} stopped: {message}")?,
            Failure::Protocol { message } => write!(f, "{who} broke the protocol: {message}")?,
            Failure::Diverged { message } => write!(f, "{who} computes something else: {message}")?,
            Failure::Setup { message } => f.write_str(message)?,
        }
        match &self.doing {
            Some(doing) => write!(f, " (noticed during {doing})"),
            None => Ok(()),
        }
    }
}
