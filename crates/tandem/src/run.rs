//! `tandem run`: one answer, or a chat.

use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustyline::error::ReadlineError;
use serde_json::{Map, Value, json};
use tandem_cpu::system::peak_memory_bytes;
use tandem_engine::{
    FinishReason, Generated, GenerationConfig, Request, SamplingOverrides, SamplingParams, check_vocabulary,
};

use crate::cli::{OnOff, RunArgs, SamplingArgs};
use crate::news::on_terminal;
use crate::report::{plain, print_json};
use tandem_runtime::ranks::Joined;
use tandem_runtime::units::bytes;
use tandem_runtime::{LoadOptions, Loaded, LogitsRows, load};
use tandem_text::ChatTemplate;
use tandem_text::prompt;
use tandem_text::{StopMatcher, Tokenizer, ends_of_turn, stop_tokens};

/// Runs the command.
pub(crate) fn run(args: &RunArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    let prompt = match &args.prompt {
        Some(prompt) => Some(prompt.clone()),
        None if std::io::stdin().is_terminal() => None,
        None => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input is not UTF-8 text")?;
            Some(text)
        }
    };
    if prompt.is_none() && args.json {
        bail!("--json needs a prompt, as an argument or on standard input");
    }
    let mut session = Session::new(args, joined)?;
    match prompt {
        Some(prompt) => session.answer_once(&prompt, args),
        None => session.chat(args),
    }
}

/// The model's defaults with the flags on top.
fn sampling(defaults: &GenerationConfig, flags: &SamplingArgs) -> anyhow::Result<SamplingParams> {
    let overrides = SamplingOverrides {
        temperature: flags.temperature,
        top_k: flags.top_k,
        top_p: flags.top_p,
        min_p: flags.min_p,
        repetition_penalty: flags.repetition_penalty,
        seed: flags.seed,
        ..SamplingOverrides::default()
    };
    let params = defaults.apply(&overrides);
    params.validate()?;
    Ok(params)
}

/// A model, its texts and one conversation.
struct Session {
    loaded: Loaded,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    extra: Map<String, Value>,
    tools: Option<Vec<Value>>,
    params: SamplingParams,
    max_tokens: usize,
    eos: Vec<u32>,
    stop_strings: Vec<String>,
}

/// One answer and what it took.
struct Answer {
    text: String,
    tokens: Vec<u32>,
    finish_reason: FinishReason,
    prompt_tokens: usize,
    /// The part of these that an earlier turn had left in the cache.
    cached_tokens: usize,
    prefill: Duration,
    decode: Duration,
    read_bytes: u64,
}

impl Session {
    fn new(args: &RunArgs, joined: Option<Joined>) -> anyhow::Result<Session> {
        let loaded =
            load(&(&args.model).into(), LoadOptions::one_sequence(LogitsRows::One), joined, &mut on_terminal())?;
        let defaults = GenerationConfig::load(&loaded.dir)?;
        let mut extra = Map::new();
        if let Some(thinking) = args.thinking {
            extra.insert("enable_thinking".to_string(), Value::Bool(thinking == OnOff::On));
        }
        let tools = match &args.tools {
            None => None,
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                Some(serde_json::from_str(&text).with_context(|| {
                    format!("{} must be a JSON array of tools, [{{\"type\": \"function\", ...}}]", path.display())
                })?)
            }
        };
        let tokenizer = Tokenizer::from_dir(&loaded.dir)?;
        let template = ChatTemplate::from_dir(&loaded.dir, args.chat_template.as_deref())?;
        let vocab_size = loaded.config.vocab_size;
        check_vocabulary(&defaults.eos_token_ids, vocab_size).context("eos_token_id")?;
        let mut eos = match args.ignore_eos {
            true => vec![],
            false => ends_of_turn(&defaults.eos_token_ids, &tokenizer, template.as_ref(), vocab_size),
        };
        eos.extend(stop_tokens(&args.stop, &tokenizer));
        let max_tokens = args.max_tokens.or(defaults.max_new_tokens.map(|n| n as usize)).unwrap_or(usize::MAX);
        Ok(Session {
            tokenizer,
            template,
            extra,
            tools,
            params: sampling(&defaults, &args.sampling)?,
            max_tokens,
            eos,
            stop_strings: args.stop.clone(),
            loaded,
        })
    }

    fn answer_once(&mut self, prompt: &str, args: &RunArgs) -> anyhow::Result<()> {
        let ids = if args.raw {
            self.tokenizer.encode(prompt, true)?
        } else {
            let mut messages = system_message(args.system.as_deref());
            messages.push(json!({"role": "user", "content": prompt}));
            self.render(&messages)?
        };
        let answer = self.answer(&ids, !args.json)?;
        if args.json {
            return print_json(&self.as_json(&answer));
        }
        println!();
        eprintln!("{}", self.summary(&answer));
        Ok(())
    }

    /// The prompt of a conversation, as token ids.
    fn render(&self, messages: &[Value]) -> anyhow::Result<Vec<u32>> {
        let Some(template) = &self.template else {
            bail!(
                "{} has no chat template; pass the prompt as it stands with --raw, or a template with --chat-template FILE",
                self.loaded.dir.display()
            );
        };
        Ok(prompt(template, &self.tokenizer, messages, self.tools.as_deref(), &self.extra)?.ids)
    }

    /// Answers `ids`, streaming to stdout if asked. What the cache already holds of `ids` is not run again.
    fn answer(&mut self, ids: &[u32], stream: bool) -> anyhow::Result<Answer> {
        let start = Instant::now();
        let mut first_token = None;
        let mut decoder = self.tokenizer.decode_stream(true);
        let mut matcher = StopMatcher::new(self.stop_strings.clone());
        let (mut text, mut tokens, mut failure) = (String::new(), vec![], None);
        let mut emit = |piece: &str| -> std::io::Result<()> {
            text.push_str(piece);
            if stream && !piece.is_empty() {
                let mut out = std::io::stdout().lock();
                // Whoever wrote the tokens must not write to the terminal's state; files get what was said.
                let shown = if out.is_terminal() { plain(piece) } else { piece.into() };
                out.write_all(shown.as_bytes())?;
                out.flush()?;
            }
            Ok(())
        };
        let request = Request {
            prompt: ids.to_vec(),
            sampling: self.params.clone(),
            max_tokens: self.max_tokens,
            eos: self.eos.clone(),
            ..Request::default()
        };
        let Generated { finish_reason, cached_tokens } = self.loaded.engine.generate(request, |token| {
            first_token.get_or_insert_with(Instant::now);
            tokens.push(token);
            let result = decoder.push(token).map_err(anyhow::Error::from).and_then(|piece| {
                let step = matcher.push(&piece);
                emit(&step.text)?;
                Ok(step.stopped.is_some())
            });
            match result {
                Ok(false) => ControlFlow::Continue(()),
                Ok(true) => ControlFlow::Break(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        if matcher.stopped().is_none() {
            let rest = matcher.push(&decoder.flush()?);
            emit(&rest.text)?;
            emit(&matcher.flush())?;
        }
        let decode_start = first_token.unwrap_or_else(Instant::now);
        let (prefill, decode) = (decode_start - start, decode_start.elapsed());
        let context = ids.len() + tokens.len();
        let read_bytes = self.loaded.accounting.read_bytes_at(&self.loaded.config, context);
        Ok(Answer { text, tokens, finish_reason, prompt_tokens: ids.len(), cached_tokens, prefill, decode, read_bytes })
    }

    /// The chat REPL.
    fn chat(&mut self, args: &RunArgs) -> anyhow::Result<()> {
        let mut editor = rustyline::DefaultEditor::new()?;
        let history = history_file();
        if let Some(path) = &history {
            let _ = editor.load_history(path);
        }
        println!("{} - type a message; /help for commands, Ctrl-D to leave", self.loaded.dir.display());
        let mut messages = system_message(args.system.as_deref());
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error.into()),
            };
            if line.trim().is_empty() {
                continue;
            }
            let _ = editor.add_history_entry(&line);
            match line.trim() {
                "/exit" | "/quit" => break,
                "/help" => println!("/clear forgets the conversation, /system TEXT starts a new one, /exit leaves"),
                "/clear" => messages = system_message(args.system.as_deref()),
                command if command.starts_with("/system ") => messages = system_message(command.get(8..)),
                command if command.starts_with('/') => println!("unknown command {command}; /help lists them"),
                _ => {
                    messages.push(json!({"role": "user", "content": line}));
                    match self.turn(&messages, &line, args.raw) {
                        Ok(answer) => {
                            println!();
                            eprintln!("{}", self.summary(&answer));
                            messages.push(json!({"role": "assistant", "content": answer.text}));
                        }
                        Err(error) => {
                            messages.pop();
                            eprintln!("error: {error:#}");
                        }
                    }
                }
            }
        }
        if let Some(path) = &history {
            let _ = editor.save_history(path);
        }
        Ok(())
    }

    fn turn(&mut self, messages: &[Value], line: &str, raw: bool) -> anyhow::Result<Answer> {
        let ids = if raw { self.tokenizer.encode(line, true)? } else { self.render(messages)? };
        self.answer(&ids, true)
    }

    fn summary(&self, a: &Answer) -> String {
        let cached = if a.cached_tokens > 0 { format!(" ({} from cache)", a.cached_tokens) } else { String::new() };
        format!(
            "[prompt {} tokens{cached}, {:.1} tok/s | generated {} tokens, {:.1} tok/s | peak memory {} | {:.2} GB/s moved | numerics {}]",
            a.prompt_tokens,
            rate(a.prompt_tokens - a.cached_tokens, a.prefill),
            a.tokens.len(),
            rate(a.tokens.len(), a.decode),
            bytes(peak_memory_bytes()),
            gigabytes_per_second(a),
            self.loaded.numerics,
        )
    }

    fn as_json(&self, a: &Answer) -> Value {
        json!({
            "text": a.text,
            "tokens": a.tokens,
            "finish_reason": a.finish_reason.name(),
            "prompt_tokens": a.prompt_tokens,
            "generated_tokens": a.tokens.len(),
            "load_ms": self.loaded.load_time.as_secs_f64() * 1e3,
            "prefill_ms": a.prefill.as_secs_f64() * 1e3,
            "prefill_tokens_per_second": rate(a.prompt_tokens - a.cached_tokens, a.prefill),
            "decode_ms": a.decode.as_secs_f64() * 1e3,
            "decode_tokens_per_second": rate(a.tokens.len(), a.decode),
            "read_bytes_per_token": a.read_bytes,
            "gigabytes_per_second": gigabytes_per_second(a),
            "peak_memory_bytes": peak_memory_bytes(),
            "numerics": self.loaded.numerics,
        })
    }
}

fn rate(n: usize, time: Duration) -> f64 {
    n as f64 / time.as_secs_f64().max(1e-9)
}

fn gigabytes_per_second(a: &Answer) -> f64 {
    rate(a.tokens.len(), a.decode) * a.read_bytes as f64 / 1e9
}

fn system_message(text: Option<&str>) -> Vec<Value> {
    text.map(|content| json!({"role": "system", "content": content})).into_iter().collect()
}

fn history_file() -> Option<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share")))?;
    let dir = data.join("tandem");
    std::fs::create_dir_all(&dir).ok()?;
    Some(dir.join("history"))
}
