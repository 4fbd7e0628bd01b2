//! `tandem eval tasks`: answers that are generated, and answers that are chosen.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use tandem_engine::{Engine, FinishReason, GenerationConfig, Logits, Request, Sequence, check_vocabulary, logprob};

use crate::cli::TasksArgs;
use crate::news::on_terminal;
use crate::report::print_json;
use tandem_runtime::judge::load_checked;
use tandem_runtime::ranks::Joined;
use tandem_runtime::{Loaded, LogitsRows, model_dir};
use tandem_text::dialect::opens_reasoning;
use tandem_text::{AnswerStream, ChatTemplate, Delta, Dialect, Tokenizer, ends_of_turn};

/// One line of the file.
enum Task {
    Generate(Generate),
    Choose(Choose),
}

/// The greedy answer, after any reasoning, must equal `expect`.
#[derive(Deserialize)]
struct Generate {
    kind: String,
    prompt: String,
    expect: String,
}

/// The choice that the model finds likeliest after the question must be the answer.
#[derive(Deserialize)]
struct Choose {
    #[serde(default = "default_kind")]
    kind: String,
    question: String,
    choices: Vec<String>,
    answer: Answer,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Index(usize),
    Text(String),
}

fn default_kind() -> String {
    "choice".into()
}

impl Task {
    fn parse(line: &str) -> anyhow::Result<Task> {
        let value: Value = serde_json::from_str(line)?;
        if value.get("choices").is_none() {
            return Ok(Task::Generate(serde_json::from_value(value)?));
        }
        let mut task: Choose = serde_json::from_value(value)?;
        ensure!(task.choices.len() > 1, "choices has {}, expected at least 2", task.choices.len());
        ensure!(!task.question.is_empty(), "question is empty");
        ensure!(task.choices.iter().all(|choice| !choice.is_empty()), "a choice is empty");
        let index = match &task.answer {
            Answer::Index(index) => Some(*index).filter(|index| *index < task.choices.len()),
            Answer::Text(text) => task.choices.iter().position(|choice| choice == text),
        };
        let index = index.context("answer is neither the number of a choice, from 0, nor its text")?;
        task.answer = Answer::Index(index);
        Ok(Task::Choose(task))
    }

    fn kind(&self) -> &str {
        match self {
            Task::Generate(task) => &task.kind,
            Task::Choose(task) => &task.kind,
        }
    }
}

/// Right answers of one kind of task.
#[derive(Clone, Copy, Default)]
struct Count {
    right: usize,
    total: usize,
}

impl Count {
    fn add(&mut self, is_right: bool) {
        self.right += usize::from(is_right);
        self.total += 1;
    }

    fn accuracy(self) -> f64 {
        self.right as f64 / self.total as f64
    }

    /// Standard error of the share of right answers, from the sample's deviation; `None` for a single answer.
    fn standard_error(self) -> Option<f64> {
        let p = self.accuracy();
        (self.total > 1).then(|| (p * (1.0 - p) / (self.total - 1) as f64).sqrt())
    }
}

#[derive(Default)]
struct Score {
    plain: Count,
    /// By log-likelihood per byte of the choice; only where one is chosen.
    normalized: Count,
}

/// Runs the command.
pub(crate) fn tasks(args: &TasksArgs, joined: Option<Joined>) -> anyhow::Result<()> {
    let path = args.tasks.display();
    let text = std::fs::read_to_string(&args.tasks).with_context(|| format!("cannot read {path}"))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let tasks: Vec<(usize, Task)> = lines
        .map(|(i, line)| {
            let what = "is neither {kind, prompt, expect} nor {question, choices, answer}";
            Ok((i + 1, Task::parse(line).with_context(|| format!("{path} line {} {what}", i + 1))?))
        })
        .collect::<anyhow::Result<_>>()?;
    if tasks.is_empty() {
        bail!("{path} holds no task; expected one JSON object a line");
    }
    let needs_rows = tasks.iter().any(|(_, task)| matches!(task, Task::Choose(_)));
    let rows = if needs_rows { LogitsRows::Chunk } else { LogitsRows::One };
    let dir = model_dir(args.model.model.as_deref())?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    for (line, task) in &tasks {
        let Task::Choose(task) = task else { continue };
        for choice in &task.choices {
            ensure!(
                tokenizer.encode(&format!("{}{choice}", task.question), true)?.len() > 1,
                "{path} line {line}: the question and the choice {choice:?} are one token together, so nothing comes \
                 before the choice; expected a longer question, or a choice that begins with a space"
            );
        }
    }
    let template = ChatTemplate::from_dir(&dir, None).unwrap_or_default();
    let eos = GenerationConfig::load(&dir)?.eos_token_ids;
    let Loaded { mut engine, prefill_chunk, .. } =
        load_checked(&(&args.model).into(), rows, joined, &mut on_terminal())?;
    check_vocabulary(&eos, engine.vocab_size()).context("eos_token_id")?;
    let eos = ends_of_turn(&eos, &tokenizer, template.as_ref(), engine.vocab_size());
    let mut scores: BTreeMap<&str, Score> = BTreeMap::new();
    for (line, task) in &tasks {
        let score = scores.entry(task.kind()).or_default();
        match task {
            Task::Generate(task) => {
                let is_right = generate(&mut engine, &tokenizer, task, args.max_tokens, &eos);
                score.plain.add(is_right.with_context(|| format!("{path} line {line}"))?);
            }
            Task::Choose(task) => {
                let Answer::Index(answer) = task.answer else { bail!("the answer of line {line} has no number") };
                let chosen = choose(&mut engine, &tokenizer, task, prefill_chunk);
                let (plain, normalized) = chosen.with_context(|| format!("{path} line {line}"))?;
                score.plain.add(plain == answer);
                score.normalized.add(normalized == answer);
            }
        }
    }
    report(args, &scores)
}

fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    task: &Generate,
    max_tokens: usize,
    eos: &[u32],
) -> anyhow::Result<bool> {
    let prompt = tokenizer.encode(&task.prompt, true)?;
    let in_reasoning = opens_reasoning(&task.prompt);
    let mut stream = AnswerStream::chat(tokenizer, Dialect::Hermes, vec![], in_reasoning, vec![]);
    let mut answer = String::new();
    let mut take = |deltas: Vec<Delta>| {
        for delta in deltas {
            if let Delta::Content(text) = delta {
                answer.push_str(&text);
            }
        }
    };
    let request = Request { prompt, max_tokens, eos: eos.to_vec(), ..Request::default() };
    let mut failure = None;
    let generated = engine.generate(request, |token| match stream.push(token) {
        Ok(piece) => {
            take(piece.deltas);
            ControlFlow::Continue(())
        }
        Err(error) => {
            failure = Some(error);
            ControlFlow::Break(())
        }
    })?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    take(stream.finish(generated.finish_reason == FinishReason::Length)?.0);
    Ok(answer.trim() == task.expect.trim())
}

/// The likeliest choice, and the likeliest per byte.
fn choose(engine: &mut Engine, tokenizer: &Tokenizer, task: &Choose, chunk: usize) -> anyhow::Result<(usize, usize)> {
    let n_question = tokenizer.encode(&task.question, true)?.len();
    let mut scores = vec![];
    for choice in &task.choices {
        // Where the two meet the question's last token may change; it counts as the question's.
        let tokens = tokenizer.encode(&format!("{}{choice}", task.question), true)?;
        let n_question = n_question.clamp(1, tokens.len() - 1);
        let score = log_likelihood(engine, &tokens, n_question, chunk)?;
        scores.push((score, score / choice.len() as f64));
    }
    let best = |of: fn(&(f64, f64)) -> f64| {
        // The first of equals.
        let best = (0..scores.len()).rev().max_by(|a, b| of(&scores[*a]).total_cmp(&of(&scores[*b])));
        best.unwrap_or_default()
    };
    Ok((best(|s| s.0), best(|s| s.1)))
}

/// Natural log-likelihood of `tokens[n_context..]` given those before; `n_context` is at least 1.
fn log_likelihood(engine: &mut Engine, tokens: &[u32], n_context: usize, chunk: usize) -> anyhow::Result<f64> {
    let mut sequence = Sequence::default();
    let vocab = engine.vocab_size();
    check_vocabulary(tokens, vocab)?;
    let (context, scored) = tokens[..tokens.len() - 1].split_at(n_context - 1);
    if !context.is_empty() {
        engine.run(&mut sequence, context, chunk, Logits::Last)?;
    }
    let mut sum = 0.0;
    for (inputs, targets) in scored.chunks(chunk).zip(tokens[n_context..].chunks(chunk)) {
        let logits = engine.run(&mut sequence, inputs, chunk, Logits::All)?;
        let rows = logits.chunks_exact(vocab).zip(targets);
        sum += rows.map(|(row, target)| f64::from(logprob(row, *target))).sum::<f64>();
    }
    engine.release(&mut sequence);
    Ok(sum)
}

fn report(args: &TasksArgs, scores: &BTreeMap<&str, Score>) -> anyhow::Result<()> {
    if args.json {
        let kinds: BTreeMap<&str, Value> = scores
            .iter()
            .map(|(kind, Score { plain, normalized })| {
                let mut value = json!({
                    "right": plain.right, "total": plain.total, "accuracy": plain.accuracy(),
                    "standard_error": plain.standard_error(),
                });
                if normalized.total > 0 {
                    value["right_normalized"] = json!(normalized.right);
                    value["accuracy_normalized"] = json!(normalized.accuracy());
                    value["standard_error_normalized"] = json!(normalized.standard_error());
                }
                (*kind, value)
            })
            .collect();
        return print_json(&json!({ "kinds": kinds }));
    }
    let percent = |count: &Count| {
        let error = count.standard_error().map_or_else(String::new, |error| format!(" ± {:.1}", 100.0 * error));
        format!("{}/{} = {:.1}{error} %", count.right, count.total, 100.0 * count.accuracy())
    };
    for (kind, Score { plain, normalized }) in scores {
        let of = if normalized.total > 0 { format!(", per byte {}", percent(normalized)) } else { String::new() };
        println!("{kind:<16} {}{of}", percent(plain));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_checked() {
        let check = |line: &str, expected: &str| {
            let error = Task::parse(line).err().map_or_else(String::new, |error| error.to_string());
            assert!(error.contains(expected), "{line}: {error}");
        };
        check("{", "EOF");
        check(r#"{"kind": "a", "prompt": "b"}"#, "expect");
        check(r#"{"question": "a", "choices": ["b"], "answer": 0}"#, "at least 2");
        check(r#"{"question": "a", "choices": ["b", ""], "answer": 0}"#, "empty");
        check(r#"{"question": "a", "choices": ["b", "c"], "answer": 2}"#, "neither the number");
        check(r#"{"question": "a", "choices": ["b", "c"], "answer": "d"}"#, "neither the number");
        let task = Task::parse(r#"{"question": "a", "choices": ["b", "c"], "answer": "c"}"#).unwrap();
        assert!(matches!(task, Task::Choose(Choose { answer: Answer::Index(1), .. })));
        assert_eq!(task.kind(), "choice");
    }

    #[test]
    fn the_standard_error_is_that_of_a_mean() {
        let count = Count { right: 8, total: 10 };
        // Deviation of eight ones and two zeros, with nine degrees of freedom, over the root of ten.
        assert!((count.standard_error().unwrap() - (1.6f64 / 9.0 / 10.0).sqrt()).abs() < 1e-12);
        assert_eq!(Count { right: 1, total: 1 }.standard_error(), None);
    }
}
