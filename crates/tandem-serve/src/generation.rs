//! From a checked request to pieces of an answer: what every endpoint shares.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value};
use tandem_engine::{Event, FinishReason, Logprobs, Request, SamplingOverrides};
use tandem_text::dialect::{Delta, END_THINK, Function};
use tandem_text::{AnswerStream, FinishedBy, prompt, stop_tokens};
use tokio::time::timeout_at;

use crate::api::{TokenLogprob, TopLogprob, Usage};
use crate::app::App;
use crate::error::ApiError;
use crate::grammar::{Compiled, Form, GrammarError};
use crate::worker::{Replies, Reply};

/// Bytes from which on work on a text would hold up other requests.
pub(crate) const LARGE: usize = 32 << 10;

/// Works on `n_bytes` of text; while that takes long, another thread takes over this one's other tasks.
pub(crate) fn work<T>(n_bytes: usize, work: impl FnOnce() -> T) -> T {
    if n_bytes < LARGE { work() } else { tokio::task::block_in_place(work) }
}

/// A checked request.
#[derive(Default)]
pub(crate) struct Ask {
    /// Name of the field that holds the prompt.
    pub(crate) param: &'static str,
    pub(crate) prompt: Vec<u32>,
    pub(crate) overrides: SamplingOverrides,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) min_tokens: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) top_logprobs: Option<usize>,
    pub(crate) form: Option<Form>,
    /// How to take the answer apart; plain text if none.
    pub(crate) chat: Option<Chat>,
    /// Answers.
    pub(crate) n: usize,
}

/// What a conversation's answer may hold.
#[derive(Clone, Default)]
pub(crate) struct Chat {
    /// Functions that may be called.
    pub(crate) functions: Vec<Function>,
    /// The prompt has opened the reasoning section.
    pub(crate) in_reasoning: bool,
    /// End the answer after its first call.
    pub(crate) one_call: bool,
}

impl App {
    /// Checks the model that a request names.
    pub(crate) fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(asked) if !self.model_names.iter().any(|name| name == asked) => {
                Err(ApiError::unknown_model(asked, self.model_name()))
            }
            _ => Ok(()),
        }
    }

    /// Token ids of a conversation, and whether they end inside the reasoning section.
    pub(crate) fn prompt(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        variables: &Map<String, Value>,
    ) -> Result<(Vec<u32>, bool), ApiError> {
        let Some(template) = &self.template else {
            let message = "this model has no chat template; use /v1/completions";
            return Err(ApiError::invalid("messages", message));
        };
        let n_bytes = messages.iter().filter_map(|m| m["content"].as_str()).map(str::len).sum();
        let prompt = work(n_bytes, || prompt(template, &self.tokenizer, messages, tools, variables))
            .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
        if self.log_text {
            tracing::info!(prompt = %prompt.text, "request");
        }
        Ok((prompt.ids, prompt.in_reasoning))
    }

    pub(crate) fn encode(&self, param: &str, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
        work(text.len(), || self.tokenizer.encode(text, add_special_tokens))
            .map_err(|error| ApiError::invalid(param, error.to_string()))
    }

    /// Starts the answers to a request.
    pub(crate) fn start(self: &Arc<Self>, ask: Ask) -> Result<Vec<Generation>, ApiError> {
        let n_prompt = ask.prompt.len();
        if n_prompt == 0 {
            return Err(ApiError::invalid(ask.param, "the prompt is empty; give at least one token"));
        }
        if n_prompt > self.context {
            let message = format!(
                "the prompt has {n_prompt} tokens and the context holds {}; shorten it, or start the server with a \
                 larger --context",
                self.context
            );
            return Err(ApiError::too_long(ask.param, message));
        }
        if let Some(id) = ask.prompt.iter().find(|id| **id as usize >= self.vocab_size) {
            let message = format!("token id {id} is outside the vocabulary of {}", self.vocab_size);
            return Err(ApiError::invalid(ask.param, message));
        }
        if let Some(id) = ask.stop_token_ids.iter().find(|id| **id as usize >= self.vocab_size) {
            let message = format!("token id {id} is outside the vocabulary of {}", self.vocab_size);
            return Err(ApiError::invalid("stop_token_ids", message));
        }
        let sampling = self.defaults.apply(&ask.overrides);
        sampling.validate().map_err(|error| ApiError::invalid(error.name, error.to_string()))?;
        let reasoning = ask.chat.as_ref().filter(|chat| chat.in_reasoning).map(|_| END_THINK);
        let mut eos = if ask.ignore_eos { vec![] } else { self.defaults.eos_token_ids.clone() };
        eos.extend(&ask.stop_token_ids);
        eos.extend(stop_tokens(&ask.stop, &self.tokenizer));
        // Schemas and grammars take milliseconds.
        let compile = |form| work(LARGE, || self.grammars.compile(form, reasoning));
        let compiled = ask.form.as_ref().map(compile).transpose().map_err(|error| match error {
            GrammarError::Invalid(error) => {
                ApiError::invalid("response_format", format!("the schema or grammar cannot be used: {error}"))
            }
            GrammarError::Busy => ApiError::unavailable("other schemas and grammars are being compiled; try again"),
        })?;
        let requests = (0..ask.n.max(1) as u64)
            .map(|i| {
                let mut sampling = sampling.clone();
                // Different answers, and the same ones every time.
                sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(i));
                Ok(Request {
                    prompt: ask.prompt.clone(),
                    sampling,
                    max_tokens: ask.max_tokens.or(self.defaults.max_new_tokens).map_or(usize::MAX, |n| n as usize),
                    min_tokens: ask.min_tokens as usize,
                    eos: eos.clone(),
                    top_logprobs: ask.top_logprobs,
                    constraint: compiled.as_ref().map(Compiled::constraint),
                })
            })
            .collect::<Result<Vec<Request>, ApiError>>()?;
        let now = Instant::now();
        let all = self.worker.submit(requests)?;
        Ok(all
            .into_iter()
            .enumerate()
            .map(|(index, replies)| {
                let (tokenizer, stops) = (&self.tokenizer, ask.stop.clone());
                let one_call = ask.chat.as_ref().is_some_and(|chat| chat.one_call);
                Generation {
                    app: Arc::clone(self),
                    index,
                    replies,
                    stream: match ask.chat.clone() {
                        Some(Chat { functions, in_reasoning, .. }) => {
                            AnswerStream::chat(tokenizer, self.dialect, functions, in_reasoning, stops)
                        }
                        None => AnswerStream::plain(tokenizer, stops),
                    },
                    one_call,
                    n_prompt,
                    n_tokens: 0,
                    n_reasoning: 0,
                    n_cached: 0,
                    start: now,
                    last_token: None,
                    is_done: false,
                    error: None,
                }
            })
            .collect())
    }
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    /// A stop string.
    StopSequence(String),
    Length,
    ToolCalls,
}

impl Finish {
    /// OpenAI's word.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Finish::Stop | Finish::StopSequence(_) => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        }
    }
}

/// The next piece of an answer.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    pub(crate) deltas: Vec<Delta>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    pub(crate) finish: Option<Finish>,
}

impl Chunk {
    fn is_empty(&self) -> bool {
        self.deltas.is_empty() && self.logprobs.is_empty() && self.finish.is_none()
    }

    fn append(&mut self, more: Chunk) {
        for delta in more.deltas {
            match (self.deltas.last_mut(), delta) {
                (Some(Delta::Reasoning(text)), Delta::Reasoning(more))
                | (Some(Delta::Content(text)), Delta::Content(more)) => text.push_str(&more),
                (_, delta) => self.deltas.push(delta),
            }
        }
        self.logprobs.extend(more.logprobs);
        self.finish = more.finish.or(self.finish.take());
    }
}

/// One answer being written. Dropping it cancels the request.
pub(crate) struct Generation {
    app: Arc<App>,
    /// Which of the request's answers.
    pub(crate) index: usize,
    replies: Replies,
    stream: AnswerStream,
    one_call: bool,
    n_prompt: usize,
    n_tokens: usize,
    n_reasoning: usize,
    n_cached: usize,
    start: Instant,
    last_token: Option<Instant>,
    is_done: bool,
    /// Comes after what was written before it.
    error: Option<ApiError>,
}

impl Generation {
    /// Tokens so far.
    pub(crate) fn usage(&self) -> Usage {
        Usage::new(self.n_prompt, self.n_tokens, self.n_cached, self.n_reasoning)
    }

    /// The next piece; `None` after the end. What has gathered since the last call comes in one piece.
    pub(crate) async fn next(&mut self) -> Option<Result<Chunk, ApiError>> {
        let mut chunk = Chunk::default();
        while !self.is_done {
            let reply = if chunk.is_empty() {
                let deadline = (self.start + self.app.timeout).into();
                match timeout_at(deadline, self.replies.receiver.recv()).await {
                    Ok(Some(reply)) => reply,
                    Ok(None) => Reply::Error(ApiError::unavailable("the engine has stopped")),
                    Err(_) => Reply::Error(ApiError::deadline(self.app.timeout.as_secs())),
                }
            } else {
                match self.replies.receiver.try_recv() {
                    Ok(reply) => reply,
                    Err(_) => return Some(Ok(chunk)),
                }
            };
            match self.take(reply) {
                Ok(more) => chunk.append(more),
                Err(error) => {
                    self.close("error");
                    self.error = Some(error);
                }
            }
            if let Some(finish) = &chunk.finish {
                let name = finish.name();
                self.close(name);
            }
        }
        if !chunk.is_empty() {
            return Some(Ok(chunk));
        }
        self.error.take().map(Err)
    }

    fn take(&mut self, reply: Reply) -> Result<Chunk, ApiError> {
        match reply {
            Reply::Event(Event::Started { cached_tokens }, _) => {
                self.n_cached = cached_tokens;
                Ok(Chunk::default())
            }
            Reply::Event(Event::Token { id, logprobs }, at) => self.token(id, logprobs, at),
            Reply::Event(Event::Finished(reason), _) => self.finished(Chunk::default(), reason),
            Reply::Event(Event::Failed(error), _) => Err(ApiError::internal(error.to_string())),
            Reply::Error(error) => Err(error),
        }
    }

    fn close(&mut self, reason: &str) {
        self.is_done = true;
        self.app.metrics.finished(reason);
        self.app.metrics.duration.observe(self.start.elapsed().as_secs_f64());
        let n_malformed = self.stream.n_malformed();
        if n_malformed > 0 {
            self.app.metrics.malformed_calls.inc_by(n_malformed as u64);
            tracing::warn!("{n_malformed} tool calls could not be read and were passed on as text");
        }
    }

    fn token(&mut self, id: u32, logprobs: Option<Logprobs>, at: Instant) -> Result<Chunk, ApiError> {
        match self.last_token.replace(at) {
            None => self.app.metrics.time_to_first_token.observe((at - self.start).as_secs_f64()),
            Some(last) => self.app.metrics.inter_token.observe((at - last).as_secs_f64()),
        }
        self.n_tokens += 1;
        self.n_reasoning += usize::from(self.stream.in_reasoning());
        let mut chunk = Chunk::default();
        if let Some(logprobs) = logprobs {
            chunk.logprobs.push(self.logprobs(id, &logprobs));
        }
        let piece = self.stream.push(id).map_err(|error| ApiError::internal(error.to_string()))?;
        chunk.deltas = piece.deltas;
        if piece.stopped {
            return self.finished(chunk, FinishReason::Stop);
        }
        if self.one_call && self.stream.n_calls() > 0 {
            chunk.finish = Some(Finish::ToolCalls);
        }
        Ok(chunk)
    }

    fn finished(&mut self, mut chunk: Chunk, reason: FinishReason) -> Result<Chunk, ApiError> {
        let (deltas, by) = self
            .stream
            .finish(reason == FinishReason::Length)
            .map_err(|error| ApiError::internal(error.to_string()))?;
        chunk.deltas.extend(deltas);
        chunk.finish = Some(match by {
            FinishedBy::EndOfTurn => Finish::Stop,
            FinishedBy::StopString(text) => Finish::StopSequence(text),
            FinishedBy::ToolCalls => Finish::ToolCalls,
            FinishedBy::Length => Finish::Length,
        });
        Ok(chunk)
    }

    fn logprobs(&self, id: u32, logprobs: &Logprobs) -> TokenLogprob {
        let name = |id: u32| {
            let bytes = self.app.tokenizer.token_bytes(id).unwrap_or_default();
            (String::from_utf8_lossy(&bytes).into_owned(), bytes)
        };
        let (token, bytes) = name(id);
        let top_logprobs = logprobs.top.iter().map(|(id, logprob)| {
            let (token, bytes) = name(*id);
            // JSON has no infinity.
            TopLogprob { token, logprob: logprob.max(-9999.0), bytes }
        });
        TokenLogprob { token, logprob: logprobs.chosen.max(-9999.0), bytes, top_logprobs: top_logprobs.collect() }
    }
}

/// A whole answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) reasoning: String,
    pub(crate) content: String,
    /// Name and arguments.
    pub(crate) calls: Vec<(String, String)>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    pub(crate) finish: Option<Finish>,
    pub(crate) usage: Usage,
}

impl Answer {
    /// Waits for the end of an answer.
    pub(crate) async fn of(mut generation: Generation) -> Result<Answer, ApiError> {
        let mut answer = Answer::default();
        while let Some(chunk) = generation.next().await {
            let chunk = chunk?;
            for delta in chunk.deltas {
                match delta {
                    Delta::Reasoning(text) => answer.reasoning.push_str(&text),
                    Delta::Content(text) => answer.content.push_str(&text),
                    Delta::Call { name } => answer.calls.push((name, String::new())),
                    Delta::Arguments(json) => {
                        if let Some((_, arguments)) = answer.calls.last_mut() {
                            arguments.push_str(&json);
                        }
                    }
                    Delta::EndCall => {}
                }
            }
            answer.logprobs.extend(chunk.logprobs);
            answer.finish = chunk.finish.or(answer.finish);
        }
        answer.usage = generation.usage();
        Ok(answer)
    }

    /// All answers to prompts of `n_prompt` tokens in all, and their tokens together.
    pub(crate) async fn all(n_prompt: usize, generations: Vec<Generation>) -> Result<(Vec<Answer>, Usage), ApiError> {
        let mut answers = vec![];
        for generation in generations {
            answers.push(Answer::of(generation).await?);
        }
        let usage = total(n_prompt, answers.iter().map(|a| a.usage));
        Ok((answers, usage))
    }

    /// OpenAI's word for the end.
    pub(crate) fn finish_name(&self) -> &'static str {
        self.finish.as_ref().map_or("stop", Finish::name)
    }
}

/// Tokens of several answers to prompts of `n_prompt` tokens in all.
pub(crate) fn total(n_prompt: usize, usages: impl Iterator<Item = Usage>) -> Usage {
    usages.fold(Usage::new(n_prompt, 0, 0, 0), |sum, usage| {
        let cached = sum.prompt_tokens_details.cached_tokens.max(usage.prompt_tokens_details.cached_tokens);
        let reasoning =
            sum.completion_tokens_details.reasoning_tokens + usage.completion_tokens_details.reasoning_tokens;
        Usage::new(n_prompt, sum.completion_tokens + usage.completion_tokens, cached, reasoning)
    })
}

/// An id such as `chatcmpl-0123456789abcdef01234567`.
pub(crate) fn new_id(prefix: &str) -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let random = || RandomState::new().build_hasher().finish();
    format!("{prefix}{:016x}{:08x}", random(), random() as u32)
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
