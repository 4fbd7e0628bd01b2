//! What is asked of the engine, and what it answers.

use crate::EngineError;
use crate::sampler::SamplingParams;

/// Names a request; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(crate) u64);

/// A prompt to continue.
#[derive(Default)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are sampled.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; the end of the context ends the text too.
    pub max_tokens: usize,
    /// Tokens to generate before an end token is allowed.
    pub min_tokens: usize,
    /// Ids that end the text; they are not passed on.
    pub eos: Vec<u32>,
    /// Log-probabilities of each token and of this many likeliest ones.
    pub top_logprobs: Option<usize>,
    /// Restricts the tokens that may follow.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// A grammar, as the engine sees it.
pub trait Constraint: Send {
    /// Sets the logits `[vocab_size]` of tokens that may not come next to `-inf`.
    fn mask(&mut self, logits: &mut [f32]);
    /// Takes the sampled token; false when the text is complete with it and nothing may follow.
    fn accept(&mut self, token: u32) -> bool;
}

/// Why generation ended, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token, a complete grammar, or the caller asked.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

impl FinishReason {
    /// Name in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// Natural log-probabilities at one position, before penalties and grammars.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Log probability of the sampled token.
    pub chosen: f32,
    /// Log-probabilities of the likeliest tokens, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// What happened to a request.
#[derive(Debug)]
pub enum Event {
    /// It runs; this many tokens of its prompt were in the cache.
    Started {
        /// Prompt tokens that need not run.
        cached_tokens: usize,
    },
    /// A token was sampled.
    Token {
        /// The token.
        id: u32,
        /// If asked for.
        logprobs: Option<Logprobs>,
    },
    /// The tokens that came since the last one were drafted in part: so many were proposed, and so many of these were right.
    Drafted {
        /// Proposed.
        n_tokens: usize,
        /// Right.
        n_accepted: usize,
    },
    /// The end; nothing follows.
    Finished(FinishReason),
    /// The end, by an error of this request alone; nothing follows.
    Failed(EngineError),
}

/// An event and whom it concerns.
#[derive(Debug)]
pub struct Output {
    /// The request.
    pub request: RequestId,
    /// What happened.
    pub event: Event,
}
