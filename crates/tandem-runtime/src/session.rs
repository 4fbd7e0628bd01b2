//! A model, a conversation, and answers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem_cpu::system::peak_memory_bytes;
use tandem_engine::{DraftCounts, Event, FinishReason, Request};
use tandem_text::{AnswerStream, Delta, FinishedBy, template_call};

use crate::conversation::{Conversation, openai_call};
use crate::load::Loaded;
use crate::units::bytes;

/// A model and one conversation with it.
pub struct Session {
    loaded: Loaded,
    /// What was said.
    pub conversation: Conversation,
}

/// What happens while an answer is made.
pub enum Step<'a> {
    /// Tokens of the prompt that have run, and all of them.
    Prompt {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// The next piece of the answer.
    Delta(&'a Delta),
    /// Nothing follows.
    End,
}

/// One answer and what it took.
#[derive(Default)]
pub struct Answer {
    /// For the reader.
    pub text: String,
    /// What came before it.
    pub reasoning: String,
    /// In the form of chat templates.
    pub calls: Vec<Value>,
    /// Every token.
    pub tokens: Vec<u32>,
    /// `stop`, `length`, `tool_calls` or `interrupted`.
    pub finish_reason: &'static str,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens that an earlier turn had left in the cache.
    pub cached_tokens: usize,
    /// Tokens that were drafted for it.
    pub drafts: DraftCounts,
    reasoning_tokens: usize,
    reasoning_time: Duration,
    prefill: Duration,
    decode: Duration,
    /// Weights and cache that a token reads at the end of the answer.
    read_bytes: u64,
}

impl Answer {
    /// Ctrl-C ended it.
    pub fn is_interrupted(&self) -> bool {
        self.finish_reason == "interrupted"
    }

    /// The answer as a message, for the template.
    fn message(&self) -> Value {
        let mut message = json!({"role": "assistant", "content": self.text});
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = json!(self.reasoning);
        }
        if !self.calls.is_empty() {
            message["tool_calls"] = json!(self.calls);
        }
        message
    }

    fn take(&mut self, delta: &Delta, arguments: &mut String) {
        match delta {
            Delta::Reasoning(text) => self.reasoning.push_str(text),
            Delta::Content(text) => self.text.push_str(text),
            Delta::Call { name } => {
                arguments.clear();
                let id = format!("call_{}", self.calls.len());
                self.calls.push(template_call(&id, name, ""));
            }
            Delta::Arguments(text) => arguments.push_str(text),
            Delta::EndCall => {}
        }
        if let (Delta::Arguments(_), Some(call)) = (delta, self.calls.last_mut()) {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            *call = template_call(&text(&call["id"]), &text(&call["function"]["name"]), arguments);
        }
    }
}

impl Session {
    /// A model and what was said so far.
    pub fn new(loaded: Loaded, conversation: Conversation) -> Session {
        Session { loaded, conversation }
    }

    /// Tokens of context.
    pub fn context(&self) -> usize {
        self.loaded.engine.context()
    }

    /// The name of the model's directory.
    pub fn name(&self) -> String {
        let dir = self.loaded.dir.canonicalize().unwrap_or_else(|_| self.loaded.dir.clone());
        // A snapshot in Hugging Face's cache is named by its commit.
        let id = dir.ancestors().filter_map(|dir| dir.file_name()?.to_str()?.strip_prefix("models--"));
        let id = id.map(|id| id.rsplit("--").next().unwrap_or(id).to_owned()).next();
        id.unwrap_or_else(|| dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned()))
    }

    /// Answers the conversation as it is and adds the answer to it. What the cache holds of the prompt is not run again.
    ///
    /// # Errors
    /// The prompt cannot be made or does not fit, or the device failed: the conversation is as before.
    pub fn answer(&mut self, interrupt: &AtomicBool, on: &mut dyn FnMut(Step<'_>)) -> anyhow::Result<Answer> {
        let prompt = self.conversation.prompt()?;
        let mut stream = self.conversation.stream(&prompt);
        let request = Request {
            prompt: prompt.ids,
            sampling: self.conversation.sampling()?,
            max_tokens: self.conversation.max_tokens.unwrap_or(usize::MAX),
            eos: self.conversation.eos.clone(),
            ..Request::default()
        };
        let answer = self.generate(request, &mut stream, interrupt, on)?;
        self.conversation.messages.push(answer.message());
        Ok(answer)
    }

    fn generate(
        &mut self,
        request: Request,
        stream: &mut AnswerStream,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Step<'_>),
    ) -> anyhow::Result<Answer> {
        let start = Instant::now();
        let Loaded { engine, recorder, .. } = &mut self.loaded;
        let mut answer = Answer { prompt_tokens: request.prompt.len(), ..Answer::default() };
        let (mut first_token, mut end_of_reasoning) = (None, None);
        let mut arguments = String::new();
        let before = engine.counters();
        let id = engine.submit(request)?;
        let mut outputs = vec![];
        // None: the caller ended it, by a stop string or Ctrl-C.
        let reason = 'steps: loop {
            if interrupt.load(Ordering::Relaxed) {
                answer.finish_reason = "interrupted";
                break None;
            }
            engine.step(&mut outputs)?;
            for output in outputs.drain(..).filter(|output| output.request == id) {
                match output.event {
                    Event::Started { cached_tokens } => answer.cached_tokens = cached_tokens,
                    Event::Token { id: token, .. } => {
                        if first_token.is_none() {
                            // From here on the ranks' times are those of decoding.
                            recorder.mark(&engine.ranks()?);
                            first_token = Some(Instant::now());
                        }
                        answer.tokens.push(token);
                        let was_reasoning = stream.in_reasoning();
                        let piece = stream.push(token)?;
                        answer.reasoning_tokens += usize::from(was_reasoning || stream.in_reasoning());
                        if was_reasoning && !stream.in_reasoning() {
                            end_of_reasoning = Some(Instant::now());
                        }
                        for delta in &piece.deltas {
                            answer.take(delta, &mut arguments);
                            on(Step::Delta(delta));
                        }
                        if piece.stopped {
                            break 'steps None;
                        }
                    }
                    Event::Drafted { .. } => {}
                    Event::Finished(reason) => break 'steps Some(reason),
                    Event::Failed(error) => return Err(error.into()),
                }
            }
            if first_token.is_none() {
                let done = answer.cached_tokens + (engine.counters().prompt_tokens - before.prompt_tokens) as usize;
                on(Step::Prompt { done, total: answer.prompt_tokens });
            }
        };
        engine.cancel(id);
        answer.drafts = engine.counters().drafts() - before.drafts();
        let decode_time = first_token.map(|first: Instant| first.elapsed());
        // The answer is there whether or not its timings can be kept.
        let kept = engine.ranks().map_err(anyhow::Error::from);
        if let Err(error) = kept.and_then(|ranks| recorder.record(&ranks, engine.warning()).keep()) {
            tracing::debug!("{error:#}");
        }
        let is_cut = answer.is_interrupted() || reason == Some(FinishReason::Length);
        let (rest, by) = stream.finish(is_cut)?;
        for delta in &rest {
            answer.take(delta, &mut arguments);
            on(Step::Delta(delta));
        }
        if !answer.is_interrupted() {
            answer.finish_reason = match by {
                FinishedBy::EndOfTurn | FinishedBy::StopString(_) => "stop",
                FinishedBy::ToolCalls => "tool_calls",
                FinishedBy::Length => "length",
            };
        }
        let decode_start = first_token.unwrap_or_else(Instant::now);
        (answer.prefill, answer.decode) = (decode_start - start, decode_time.unwrap_or_default());
        if answer.reasoning_tokens > 0 {
            answer.reasoning_time = end_of_reasoning.unwrap_or_else(Instant::now) - decode_start;
        }
        let context = answer.prompt_tokens + answer.tokens.len();
        answer.read_bytes = self.loaded.accounting.read_bytes_at(&self.loaded.config, context);
        Ok(answer)
    }

    /// One line about an answer.
    pub fn summary(&self, a: &Answer) -> String {
        let cached = if a.cached_tokens > 0 { format!(" ({} from cache)", a.cached_tokens) } else { String::new() };
        let thought = match a.reasoning_tokens {
            0 => String::new(),
            n => format!(" ({n} of them thinking, {:.1} s)", a.reasoning_time.as_secs_f64()),
        };
        let drafts = match a.drafts.tokens {
            0 => String::new(),
            n => format!(" | {} of {n} drafted tokens kept ({})", a.drafts.accepted_tokens(), by_position(&a.drafts)),
        };
        let end = match a.finish_reason {
            "length" if a.prompt_tokens + a.tokens.len() >= self.context() => {
                " | the context is full: /clear or /drop makes room, --context more".to_owned()
            }
            "length" => " | cut off at --max-tokens".to_owned(),
            "stop" => String::new(),
            reason => format!(" | {}", reason.replace('_', " ")),
        };
        let warning = self.warning().map_or(String::new(), |warning| format!(" | {warning}"));
        format!(
            "[prompt {} tokens{cached}, {:.1} tok/s | generated {} tokens{thought}, {:.1} tok/s | peak memory {} | {:.2} GB/s moved | numerics {}{drafts}{end}{warning}]",
            a.prompt_tokens,
            rate(a.prompt_tokens - a.cached_tokens, a.prefill),
            a.tokens.len(),
            rate(a.tokens.len(), a.decode),
            bytes(peak_memory_bytes()),
            gb_per_s(a),
            self.loaded.numerics,
        )
    }

    /// What a user should know now: weights have left memory.
    pub fn warning(&self) -> Option<String> {
        self.loaded.engine.warning().or_else(|| self.loaded.recorder.residency().warning())
    }

    /// Facts about the model and the conversation, a line each.
    ///
    /// # Errors
    /// The conversation has no prompt.
    pub fn facts(&self) -> anyhow::Result<String> {
        let Loaded { dir, engine, device, numerics, load_time, .. } = &self.loaded;
        let (counters, used) = (engine.counters(), self.conversation.prompt()?.ids.len());
        Ok(format!(
            "model    {}\ndevice   {device}, numerics {numerics}, loaded in {:.1} s\ncontext  {used} of {} tokens\n\
             so far   {} prompt tokens run, {} from the cache, {} generated\nmemory   {} at the peak",
            dir.display(),
            load_time.as_secs_f64(),
            engine.context(),
            counters.prompt_tokens,
            counters.cached_tokens,
            counters.generated_tokens,
            bytes(peak_memory_bytes()),
        ))
    }

    /// The answer for programs.
    pub fn as_json(&self, a: &Answer) -> Value {
        json!({
            "text": a.text,
            "reasoning": a.reasoning,
            "tool_calls": a.calls.iter().map(openai_call).collect::<Vec<Value>>(),
            "tokens": a.tokens,
            "finish_reason": a.finish_reason,
            "prompt_tokens": a.prompt_tokens,
            "cached_tokens": a.cached_tokens,
            "generated_tokens": a.tokens.len(),
            "reasoning_tokens": a.reasoning_tokens,
            "drafted_tokens": a.drafts.tokens,
            "accepted_drafted_tokens": a.drafts.accepted_tokens(),
            "accepted_by_draft_position": a.drafts.accepted,
            "load_seconds": self.loaded.load_time.as_secs_f64(),
            "prefill_ms": a.prefill.as_secs_f64() * 1e3,
            "prefill_tokens_per_second": rate(a.prompt_tokens - a.cached_tokens, a.prefill),
            "decode_ms": a.decode.as_secs_f64() * 1e3,
            "decode_tokens_per_second": rate(a.tokens.len(), a.decode),
            "reasoning_ms": a.reasoning_time.as_secs_f64() * 1e3,
            "read_bytes_per_token": a.read_bytes,
            "gb_per_s": gb_per_s(a),
            "peak_memory_bytes": peak_memory_bytes(),
            "device": self.loaded.device,
            "numerics": self.loaded.numerics,
        })
    }
}

/// Shares of drafts that were right, by position, up to the last that ever was.
fn by_position(drafts: &DraftCounts) -> String {
    let right = drafts.accepted.iter().filter(|n| **n > 0);
    let percent = |n: &u64| format!("{:.0}", 100.0 * *n as f64 / drafts.drafts.max(1) as f64);
    let shares: Vec<String> = right.map(percent).collect();
    if shares.is_empty() { "0 %".into() } else { format!("{} %", shares.join(", ")) }
}

fn rate(n: usize, time: Duration) -> f64 {
    n as f64 / time.as_secs_f64().max(1e-9)
}

fn gb_per_s(a: &Answer) -> f64 {
    rate(a.tokens.len(), a.decode) * a.read_bytes as f64 / 1e9
}
