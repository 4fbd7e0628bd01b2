//! From a checked request to pieces of an answer: what every endpoint shares.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value};
use tandem_engine::{Event, FinishReason, Logprobs, Request, SamplingOverrides};
use tandem_text::dialect::{Delta, END_THINK, Function};
use tandem_text::{AnswerStream, FinishedBy, TemplateInput, stop_tokens};
use tokio::time::timeout_at;

use crate::api::{TokenLogprob, TopLogprob, Usage};
use crate::app::App;
use crate::connections::CLIENT;
use crate::error::ApiError;
use crate::grammar::{Compiled, Form, GrammarError};
use crate::metrics::CLIENT_LEFT;
use crate::replay::PromptKey;
use crate::span::{Answered, Asked, RequestSpan};
use crate::worker::{Replies, Reply};

/// Bytes from which on work on a text would hold up other requests.
pub(crate) const LARGE: usize = 32 << 10;

/// Works on `n_bytes` of text; while that takes long, another thread takes over this one's other tasks.
pub(crate) fn work<T>(n_bytes: usize, work: impl FnOnce() -> T) -> T {
    if n_bytes < LARGE { work() } else { tokio::task::block_in_place(work) }
}

/// Bytes of a token, usually; shorter texts are encoded as they are.
const USUAL_TOKEN: usize = 8;
/// Tokens that cutting a text may add.
const CUT_TOKENS: usize = 8;
/// Bytes of text in a template's variables at most.
const MAX_VARIABLES: usize = 64 << 10;

/// Bytes of all texts in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(text_bytes).sum(),
        Value::Object(map) => map.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        _ => 1,
    }
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
    /// Tokens of reasoning at most.
    pub(crate) thinking_budget: Option<u32>,
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

    /// Token ids of a conversation, and whether they end inside the reasoning section. If it `continues`, the answer goes on
    /// with the last message.
    pub(crate) fn prompt(
        &self,
        param: &str,
        messages: &[Value],
        tools: Option<&[Value]>,
        variables: &Map<String, Value>,
        continues: bool,
    ) -> Result<(Vec<u32>, bool), ApiError> {
        let Some(template) = &self.template else {
            let message = "this model has no chat template; use /v1/completions";
            return Err(ApiError::invalid(param, message));
        };
        let n_variables: usize = variables.values().map(text_bytes).sum();
        if n_variables > MAX_VARIABLES {
            let message = format!("chat_template_kwargs has {n_variables} bytes, expected at most {MAX_VARIABLES}");
            return Err(ApiError::invalid("chat_template_kwargs", message));
        }
        let n_bytes = messages.iter().chain(tools.into_iter().flatten()).map(text_bytes).sum();
        self.check_bytes(param, n_bytes)?;
        let conversation = TemplateInput { messages, tools, variables, continues };
        let prompt = work(n_bytes, || {
            let rendered = tandem_text::render(template, &self.tokenizer, &conversation)
                .map_err(|error| ApiError::invalid(param, error.to_string()))?;
            if self.log_text {
                tracing::info!(prompt = %rendered.text, "request");
            }
            self.check_tokens(param, &rendered.text)?;
            rendered.encode(&self.tokenizer).map_err(|error| ApiError::invalid(param, error.to_string()))
        })?;
        Ok((prompt.ids, prompt.in_reasoning))
    }

    pub(crate) fn encode(&self, param: &str, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
        self.check_bytes(param, text.len())?;
        work(text.len(), || {
            self.check_tokens(param, text)?;
            self.tokenizer.encode(text, add_special_tokens).map_err(|error| ApiError::invalid(param, error.to_string()))
        })
    }

    /// Refuses what cannot fit whatever its tokens are.
    fn check_bytes(&self, param: &str, n_bytes: usize) -> Result<(), ApiError> {
        let least = n_bytes / self.longest_token.max(1);
        if least > self.context { Err(ApiError::too_long(param, least, self.context)) } else { Ok(()) }
    }

    /// Refuses a long text as soon as its first part has more tokens than fit: encoding takes a hundred times its memory.
    fn check_tokens(&self, param: &str, text: &str) -> Result<(), ApiError> {
        if text.len() / USUAL_TOKEN <= self.context {
            return Ok(());
        }
        let mut n_tokens = 0;
        let mut rest = text;
        while !rest.is_empty() && n_tokens <= self.context {
            let mut end = rest.len().min(LARGE);
            while !rest.is_char_boundary(end) {
                end += 1;
            }
            if end < rest.len() {
                end = rest[..end].rfind([' ', '\n']).filter(|at| *at > end / 2).unwrap_or(end);
            }
            let ids = self.tokenizer.encode(&rest[..end], false);
            let n_part = ids.map_err(|error| ApiError::invalid(param, error.to_string()))?.len();
            // The cut may have made some more.
            n_tokens += n_part.saturating_sub(CUT_TOKENS);
            rest = &rest[end..];
        }
        if n_tokens > self.context { Err(ApiError::too_long(param, n_tokens, self.context)) } else { Ok(()) }
    }

    /// Refuses a prompt that cannot run.
    pub(crate) fn check_prompt(&self, ask: &Ask, prompt: &[u32]) -> Result<(), ApiError> {
        if prompt.is_empty() {
            return Err(ApiError::invalid(ask.param, "the prompt is empty; give at least one token"));
        }
        if prompt.len() > self.context {
            return Err(ApiError::too_long(ask.param, prompt.len(), self.context));
        }
        for (param, ids) in [(ask.param, prompt), ("stop_token_ids", &ask.stop_token_ids)] {
            if let Some(id) = ids.iter().find(|id| **id as usize >= self.vocab_size) {
                let message = format!("token id {id} is outside the vocabulary of {}", self.vocab_size);
                return Err(ApiError::invalid(param, message));
            }
        }
        Ok(())
    }

    /// Starts the answers to a request.
    pub(crate) fn start(self: &Arc<Self>, mut ask: Ask) -> Result<Vec<Generation>, ApiError> {
        let prompt = std::mem::take(&mut ask.prompt);
        self.start_all(&ask, vec![prompt])
    }

    /// Starts the answers to several prompts, all or none; they are numbered through.
    pub(crate) fn start_all(self: &Arc<Self>, ask: &Ask, prompts: Vec<Vec<u32>>) -> Result<Vec<Generation>, ApiError> {
        // A conversation goes on with the tokens that were said.
        let prompts = match &ask.chat {
            Some(chat) => prompts.into_iter().map(|prompt| self.replayed(prompt, chat)).collect(),
            None => prompts,
        };
        prompts.iter().try_for_each(|prompt| self.check_prompt(ask, prompt))?;
        let sampling = self.defaults.apply(&ask.overrides);
        sampling.validate().map_err(|error| ApiError::invalid(error.name, error.to_string()))?;
        let reasoning = ask.chat.as_ref().filter(|chat| chat.in_reasoning).map(|_| END_THINK);
        let mut eos = if ask.ignore_eos { vec![] } else { self.defaults.eos_token_ids.clone() };
        let named = [stop_tokens(&ask.stop, &self.tokenizer), ask.stop_token_ids.clone()].concat();
        eos.extend(&named);
        // Schemas and grammars take milliseconds.
        let compile = |form| work(LARGE, || self.grammars.compile(form, reasoning));
        let compiled = ask.form.as_ref().map(compile).transpose().map_err(|error| match error {
            GrammarError::Invalid(error) => {
                let param = match (&ask.form, ask.param) {
                    (Some(Form::Calls { or_text: None, .. }), _) => "tools",
                    (Some(Form::JsonSchema(_) | Form::Calls { .. }), "input") => "text.format",
                    (Some(Form::JsonSchema(_) | Form::Calls { .. }) | None, _) => "response_format",
                    _ => "structured_outputs",
                };
                ApiError::invalid(param, format!("the schema or grammar cannot be used: {error}"))
            }
            GrammarError::Busy => ApiError::unavailable("other schemas and grammars are being compiled; try again"),
        })?;
        let budget = ask.chat.as_ref().and_then(|chat| chat.thinking_budget);
        let in_reasoning = reasoning.is_some();
        let mut n_prompts = vec![];
        let mut keys = vec![];
        let mut requests = vec![];
        for prompt in prompts {
            let key = ask.chat.is_some().then(|| PromptKey::of(&prompt));
            for i in 0..ask.n.max(1) as u64 {
                let mut sampling = sampling.clone();
                // Different answers, and the same ones every time.
                sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(i));
                n_prompts.push(prompt.len());
                keys.push(key);
                requests.push(Request {
                    prompt: prompt.clone(),
                    sampling,
                    max_tokens: ask.max_tokens.or(self.defaults.max_new_tokens).map_or(usize::MAX, |n| n as usize),
                    min_tokens: ask.min_tokens as usize,
                    eos: eos.clone(),
                    top_logprobs: ask.top_logprobs,
                    constraint: match budget {
                        Some(budget) => Some(self.grammars.with_budget(budget, compiled.as_ref(), in_reasoning)),
                        None => compiled.as_ref().map(Compiled::constraint),
                    },
                });
            }
        }
        let start = Instant::now();
        let client = CLIENT.try_with(|client| *client).ok();
        let span = Arc::new(RequestSpan::begin(&Asked {
            model: self.model_name(),
            client,
            is_chat: ask.chat.is_some(),
            sampling: &sampling,
            max_tokens: ask.max_tokens.or(self.defaults.max_new_tokens),
            n: ask.n.max(1),
            input_tokens: n_prompts.iter().step_by(ask.n.max(1)).sum(),
        }));
        let all = self.worker.submit(requests)?;
        let generation =
            |(index, ((replies, n_prompt), key)): (usize, ((Replies, usize), Option<PromptKey>))| Generation {
                app: Arc::clone(self),
                index,
                key,
                said: vec![],
                replies,
                one_call: ask.chat.as_ref().is_some_and(|chat| chat.one_call),
                has_stop_tokens: !named.is_empty(),
                stream: match ask.chat.clone() {
                    Some(Chat { functions, in_reasoning, .. }) => {
                        AnswerStream::chat(&self.tokenizer, self.dialect, functions, in_reasoning, ask.stop.clone())
                    }
                    None => AnswerStream::plain(&self.tokenizer, ask.stop.clone()),
                },
                n_prompt,
                n_tokens: 0,
                n_reasoning: 0,
                n_drafted: [0; 2],
                n_cached: 0,
                client,
                span: Arc::clone(&span),
                start,
                started: None,
                first_token: None,
                last_token: None,
                is_done: false,
                error: None,
            };
        Ok(all.into_iter().zip(n_prompts).zip(keys).enumerate().map(generation).collect())
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
    /// Of a conversation: what its prompt is known by, and the answer's tokens.
    key: Option<PromptKey>,
    said: Vec<u32>,
    one_call: bool,
    /// The client has named tokens that end the answer, in the middle of a call as well.
    has_stop_tokens: bool,
    n_prompt: usize,
    n_tokens: usize,
    n_reasoning: usize,
    /// Drafted tokens that were said, and that were not.
    n_drafted: [usize; 2],
    n_cached: usize,
    client: Option<SocketAddr>,
    span: Arc<RequestSpan>,
    start: Instant,
    /// When its prompt began to run.
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    is_done: bool,
    /// Comes after what was written before it.
    error: Option<ApiError>,
}

impl Generation {
    /// Tokens so far.
    pub(crate) fn usage(&self) -> Usage {
        let [accepted, rejected] = self.n_drafted;
        Usage::new(self.n_prompt, self.n_tokens, self.n_cached, self.n_reasoning).with_drafts(accepted, rejected)
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
                    self.error = Some(error);
                    self.close("error");
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
            Reply::Event(Event::Started { cached_tokens }, at) => {
                self.n_cached = cached_tokens;
                self.started.get_or_insert(at);
                Ok(Chunk::default())
            }
            Reply::Event(Event::Token { id, logprobs }, at) => self.token(id, logprobs, at),
            Reply::Event(Event::Drafted { n_tokens, n_accepted }, _) => {
                self.n_drafted[0] += n_accepted;
                self.n_drafted[1] += n_tokens - n_accepted;
                Ok(Chunk::default())
            }
            Reply::Event(Event::Finished(reason), _) => self.finished(Chunk::default(), reason),
            Reply::Event(Event::Failed(error), _) => Err(ApiError::internal(error.to_string())),
            Reply::Error(error) => Err(error),
        }
    }

    fn close(&mut self, reason: &str) {
        self.is_done = true;
        self.log(reason);
        let metrics = &self.app.metrics;
        metrics.duration.observe(self.start.elapsed().as_secs_f64());
        metrics.request_prompt_tokens.observe(self.n_prompt as f64);
        metrics.request_generation_tokens.observe(self.n_tokens as f64);
        let (started, first) = (self.started, self.first_token);
        for (histogram, from, to) in [
            (&metrics.queued, Some(self.start), started),
            (&metrics.prefill, started, first),
            (&metrics.decode, first, Some(Instant::now())),
        ] {
            if let (Some(from), Some(to)) = (from, to) {
                histogram.observe((to - from).as_secs_f64());
            }
        }
        let n_malformed = self.stream.n_malformed();
        if n_malformed > 0 {
            self.app.metrics.malformed_calls.inc_by(n_malformed as u64);
            tracing::warn!("{n_malformed} tool calls could not be read and were passed on as text");
        }
    }

    /// One line for each answer, and its part of counts and of the request's span.
    fn log(&self, finish: &str) {
        self.app.metrics.finished(finish);
        let since = |to: Option<Instant>| to.map(|at| at - self.start);
        self.span.answered(Answered {
            cached_tokens: self.n_cached,
            output_tokens: self.n_tokens,
            reasoning_tokens: self.n_reasoning,
            time_in_queue: since(self.started),
            time_to_first_token: since(self.first_token),
            finish,
            error: self.error.as_ref().map(|error| error.kind().to_owned()),
        });
        let seconds = |to: Option<Instant>| since(to).map(|duration| duration.as_secs_f64());
        tracing::info!(
            model = self.app.model_name(),
            prompt_tokens = self.n_prompt,
            cached_tokens = self.n_cached,
            completion_tokens = self.n_tokens,
            reasoning_tokens = self.n_reasoning,
            first_token_seconds = seconds(self.first_token),
            seconds = self.start.elapsed().as_secs_f64(),
            finish,
            client = self.client.map(tracing::field::display),
            "request"
        );
    }

    fn token(&mut self, id: u32, logprobs: Option<Logprobs>, at: Instant) -> Result<Chunk, ApiError> {
        self.first_token.get_or_insert(at);
        match self.last_token.replace(at) {
            None => self.app.metrics.time_to_first_token.observe((at - self.start).as_secs_f64()),
            Some(last) => self.app.metrics.inter_token.observe((at - last).as_secs_f64()),
        }
        self.n_tokens += 1;
        if self.key.is_some() {
            self.said.push(id);
        }
        let was_reasoning = self.stream.in_reasoning();
        self.n_reasoning += usize::from(was_reasoning);
        let mut chunk = Chunk::default();
        if let Some(logprobs) = logprobs {
            chunk.logprobs.push(self.app.token_logprob(id, &logprobs));
        }
        let piece = self.stream.push(id).map_err(|error| ApiError::internal(error.to_string()))?;
        // The tags around the reasoning belong to it.
        let is_reasoning = was_reasoning || self.stream.in_reasoning();
        chunk.logprobs.iter_mut().for_each(|token| token.is_reasoning = is_reasoning);
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
        // A call that something else than the model ended is not complete.
        let is_cut = reason == FinishReason::Length || (self.has_stop_tokens && self.stream.in_call());
        let (deltas, by) = self.stream.finish(is_cut).map_err(|error| ApiError::internal(error.to_string()))?;
        chunk.deltas.extend(deltas);
        chunk.finish = Some(match by {
            FinishedBy::EndOfTurn => Finish::Stop,
            FinishedBy::StopString(text) => Finish::StopSequence(text),
            FinishedBy::ToolCalls => Finish::ToolCalls,
            FinishedBy::Length => Finish::Length,
        });
        if let (Some(key), Some(Finish::Stop | Finish::ToolCalls)) = (self.key, &chunk.finish) {
            self.app.said.put(key, std::mem::take(&mut self.said));
        }
        Ok(chunk)
    }
}

impl App {
    /// A conversation's prompt with the tokens of earlier answers where it says the same.
    fn replayed(&self, prompt: Vec<u32>, chat: &Chat) -> Vec<u32> {
        let text = |tokens: &[u32]| self.tokenizer.decode(tokens, false).ok();
        let said = |tokens: &[u32]| self.read_answer(tokens, chat);
        let same = |written: &[u32], answer: &[u32]| {
            text(written).is_some_and(|written| Some(written) == text(answer)) || {
                let written = said(written);
                written.is_some() && written == said(answer)
            }
        };
        self.said.replay(prompt, |token| self.defaults.eos_token_ids.contains(&token), same)
    }

    /// Reasoning, text and calls of an answer, without the spaces around them.
    fn read_answer(&self, tokens: &[u32], chat: &Chat) -> Option<Meaning> {
        let (functions, reasoning) = (chat.functions.clone(), chat.in_reasoning);
        let mut stream = AnswerStream::chat(&self.tokenizer, self.dialect, functions, reasoning, vec![]);
        let mut answer = Answer::default();
        for token in tokens {
            stream.push(*token).ok()?.deltas.into_iter().for_each(|delta| answer.take(delta));
        }
        stream.finish(false).ok()?.0.into_iter().for_each(|delta| answer.take(delta));
        let call = |call: Call| Some((call.name, serde_json::from_str(&call.arguments).ok()?));
        let calls = answer.calls.into_iter().map(call).collect::<Option<Vec<_>>>()?;
        Some((answer.reasoning.trim().to_owned(), answer.content.trim().to_owned(), calls))
    }

    /// A token's log-probabilities by its text.
    pub(crate) fn token_logprob(&self, id: u32, logprobs: &Logprobs) -> TokenLogprob {
        let name = |id: u32| {
            let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
            (String::from_utf8_lossy(&bytes).into_owned(), bytes)
        };
        let (token, bytes) = name(id);
        let top_logprobs = logprobs.top.iter().map(|(id, logprob)| {
            let (token, bytes) = name(*id);
            // JSON has no infinity.
            TopLogprob { token, logprob: logprob.max(-9999.0), bytes }
        });
        let top_logprobs = top_logprobs.collect();
        TokenLogprob { token, logprob: logprobs.chosen.max(-9999.0), bytes, top_logprobs, is_reasoning: false }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.is_done {
            self.log(CLIENT_LEFT);
        }
    }
}

/// A call in an answer.
#[derive(Debug, Default)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// JSON text; open at its end if the answer was cut off.
    pub(crate) arguments: String,
}

/// What an answer says, in whatever tokens: its reasoning, text and calls.
type Meaning = (String, String, Vec<(String, Value)>);

/// A whole answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) reasoning: String,
    pub(crate) content: String,
    pub(crate) calls: Vec<Call>,
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
            chunk.deltas.into_iter().for_each(|delta| answer.take(delta));
            answer.logprobs.extend(chunk.logprobs);
            answer.finish = chunk.finish.or(answer.finish);
        }
        answer.usage = generation.usage();
        Ok(answer)
    }

    fn take(&mut self, delta: Delta) {
        match delta {
            Delta::Reasoning(text) => self.reasoning.push_str(&text),
            Delta::Content(text) => self.content.push_str(&text),
            Delta::Call { name } => self.calls.push(Call { name, arguments: String::new() }),
            Delta::Arguments(json) => {
                if let Some(call) = self.calls.last_mut() {
                    call.arguments.push_str(&json);
                }
            }
            Delta::EndCall => {}
        }
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
        let (a, b) = (sum.completion_tokens_details, usage.completion_tokens_details);
        let reasoning = a.reasoning_tokens + b.reasoning_tokens;
        Usage::new(n_prompt, sum.completion_tokens + usage.completion_tokens, cached, reasoning).with_drafts(
            a.accepted_prediction_tokens + b.accepted_prediction_tokens,
            a.rejected_prediction_tokens + b.rejected_prediction_tokens,
        )
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
