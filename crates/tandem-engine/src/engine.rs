//! Sequences and the loop that advances them.

use std::ops::ControlFlow;

use tandem_core::Batch;

use crate::block_manager::BlockManager;
use crate::runner::Runner;
use crate::sampler::{SampleError, Sampler};

/// Why generation stopped with an error.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// More tokens than the cache holds.
    #[error(
        "the prompt has {tokens} tokens and the context holds {context}; shorten the prompt or raise --context \
         (the model was made for {trained})"
    )]
    ContextExceeded {
        /// Tokens asked for.
        tokens: usize,
        /// Tokens that fit.
        context: usize,
        /// The model's own limit.
        trained: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab_size}; the tokenizer and the model do not match")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Ids below this exist.
        vocab_size: usize,
    },
    /// Nothing to run.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// The backend failed.
    #[error("the device failed: {0}")]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// Another rank failed.
    #[error(transparent)]
    Ranks(#[from] tandem_comm::CommError),
    /// The logits cannot be sampled.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

/// One text being processed: its tokens, and the cache pages that hold them.
#[derive(Debug, Default)]
pub struct Sequence {
    tokens: Vec<u32>,
    pages: Vec<u32>,
}

impl Sequence {
    /// Tokens that the cache holds.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

/// Which rows' logits a run returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// When to stop generating.
#[derive(Clone, Debug, Default)]
pub struct StopConditions {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Ids that end the text; they are not passed on.
    pub eos: Vec<u32>,
}

/// Why generation ended, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token, or the caller asked.
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

/// A runner with its cache pages.
pub struct Engine {
    runner: Box<dyn Runner>,
    blocks: BlockManager,
    context: usize,
    trained_context: usize,
}

impl Engine {
    /// An engine over `runner`, whose cache has the slots of `blocks`; `context` tokens per sequence.
    pub fn new(runner: Box<dyn Runner>, blocks: BlockManager, context: usize, trained_context: usize) -> Engine {
        Engine { runner, blocks, context, trained_context }
    }

    /// Tokens per sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits per token.
    pub fn vocab_size(&self) -> usize {
        self.runner.vocab_size()
    }

    /// Appends `tokens` to the sequence, in batches of at most `chunk`, and returns the wanted logits
    /// `[1 or tokens.len(), vocab_size]`.
    ///
    /// # Errors
    /// The tokens do not fit, are not in the vocabulary, or the device failed. The sequence is as before.
    pub fn run(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        chunk: usize,
        wanted: Logits,
    ) -> Result<Vec<f32>, EngineError> {
        let vocab_size = self.runner.vocab_size();
        if tokens.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= vocab_size) {
            return Err(EngineError::UnknownToken { token: *token, vocab_size });
        }
        let total = sequence.tokens.len() + tokens.len();
        if total > self.context || !self.blocks.grow(&mut sequence.pages, total) {
            return Err(EngineError::ContextExceeded {
                tokens: total,
                context: self.context,
                trained: self.trained_context,
            });
        }
        let limits = self.runner.limits();
        let chunk = match wanted {
            Logits::Last => chunk.clamp(1, limits.max_rows),
            Logits::All => chunk.clamp(1, limits.max_rows.min(limits.max_logits_rows)),
        };
        let mut batches = vec![];
        let mut position = sequence.tokens.len();
        for part in tokens.chunks(chunk) {
            let end = position + part.len();
            let logits_rows = match wanted {
                Logits::All => (0..part.len() as u32).collect(),
                Logits::Last if end == total => vec![part.len() as u32 - 1],
                Logits::Last => vec![],
            };
            batches.push(Batch {
                tokens: part.to_vec(),
                positions: (position as u32..end as u32).collect(),
                sequences: vec![0; part.len()],
                block_tables: vec![sequence.pages.clone()],
                logits_rows,
            });
            position = end;
        }
        let mut logits = vec![];
        self.runner.steps(batches, &mut logits)?;
        sequence.tokens.extend_from_slice(tokens);
        Ok(logits)
    }

    /// Samples tokens one by one after `logits`, the last row of what [`Engine::run`] returned. `emit` gets each token
    /// and may stop the text.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn generate(
        &mut self,
        sequence: &mut Sequence,
        mut logits: Vec<f32>,
        sampler: &mut Sampler,
        stop: &StopConditions,
        mut emit: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<FinishReason, EngineError> {
        for n in 0..stop.max_tokens {
            let token = sampler.sample(&mut logits, &sequence.tokens)?;
            if stop.eos.contains(&token) {
                return Ok(FinishReason::Stop);
            }
            let stopped = emit(token).is_break();
            if stopped {
                return Ok(FinishReason::Stop);
            }
            if n + 1 == stop.max_tokens || sequence.tokens.len() + 1 > self.context {
                break;
            }
            logits = self.run(sequence, &[token], 1, Logits::Last)?;
        }
        Ok(FinishReason::Length)
    }

    /// Keeps the first `n_tokens` of the sequence; their cached vectors stay valid.
    pub fn truncate(&mut self, sequence: &mut Sequence, n_tokens: usize) {
        sequence.tokens.truncate(n_tokens);
        self.blocks.shrink(&mut sequence.pages, sequence.tokens.len());
    }

    /// Returns the sequence's pages.
    pub fn release(&mut self, sequence: &mut Sequence) {
        self.blocks.release(&mut sequence.pages);
        sequence.tokens.clear();
    }
}
