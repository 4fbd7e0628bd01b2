//! Tasks with right answers: answers that are generated, and answers that are chosen.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use tandem_engine::{Engine, FinishReason, GenerationConfig, Logits, Request, Sequence, check_vocabulary, logprob};

use tandem_text::dialect::opens_reasoning;
use tandem_text::{AnswerStream, ChatFormat, Delta, Dialect, Tokenizer, ends_of_turn};

use super::load_checked;
use crate::load::{Loaded, LogitsRows};
use crate::model_dir::model_dir;
use crate::news::OnNews;
use crate::options::ModelOptions;
use crate::ranks::Joined;

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
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    /// Tasks that were answered right.
    pub right: usize,
    /// All of them.
    pub total: usize,
}

impl Count {
    fn add(&mut self, is_right: bool) {
        self.right += usize::from(is_right);
        self.total += 1;
    }

    /// Share of right answers; NaN without tasks.
    pub fn accuracy(self) -> f64 {
        self.right as f64 / self.total as f64
    }

    /// Standard error of the share of right answers, from the sample's deviation; `None` for a single answer.
    pub fn standard_error(self) -> Option<f64> {
        let p = self.accuracy();
        (self.total > 1).then(|| (p * (1.0 - p) / (self.total - 1) as f64).sqrt())
    }
}

/// What a model reached in one kind of task.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    /// Greedy answers that equal the expected one, or choices by log-likelihood.
    pub plain: Count,
    /// By log-likelihood per byte of the choice; only where one is chosen.
    pub normalized: Count,
}

/// A file of tasks, one JSON object a line: `{kind, prompt, expect}` or `{question, choices, answer}`.
pub struct Tasks {
    path: PathBuf,
    /// With their lines' numbers.
    tasks: Vec<(usize, Task)>,
}

impl Tasks {
    /// # Errors
    /// The file cannot be read, holds no task, or a line is not one.
    pub fn read(path: &Path) -> anyhow::Result<Tasks> {
        let shown = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let tasks: Vec<(usize, Task)> = lines
            .map(|(i, line)| {
                let what = "is neither {kind, prompt, expect} nor {question, choices, answer}";
                Ok((i + 1, Task::parse(line).with_context(|| format!("{shown} line {} {what}", i + 1))?))
            })
            .collect::<anyhow::Result<_>>()?;
        if tasks.is_empty() {
            bail!("{shown} holds no task; expected one JSON object a line");
        }
        Ok(Tasks { path: path.to_owned(), tasks })
    }

    /// Loads a model and scores its answers, of up to `max_tokens` tokens, by kind of task.
    ///
    /// # Errors
    /// A task has no token before its choice; the model cannot be loaded, or its outputs are not numbers.
    pub fn score(
        &self,
        options: &ModelOptions,
        max_tokens: usize,
        joined: Option<Joined>,
        on_news: OnNews<'_>,
    ) -> anyhow::Result<BTreeMap<String, Score>> {
        let path = self.path.display();
        let needs_rows = self.tasks.iter().any(|(_, task)| matches!(task, Task::Choose(_)));
        let rows = if needs_rows { LogitsRows::Chunk } else { LogitsRows::One };
        let dir = model_dir(options.model.as_deref())?;
        let tokenizer = Tokenizer::from_dir(&dir)?;
        for (line, task) in &self.tasks {
            let Task::Choose(task) = task else { continue };
            for choice in &task.choices {
                ensure!(
                    tokenizer.encode(&format!("{}{choice}", task.question), true)?.len() > 1,
                    "{path} line {line}: the question and the choice {choice:?} are one token together, so nothing \
                     comes before the choice; expected a longer question, or a choice that begins with a space"
                );
            }
        }
        // A call in an expected answer is text: the dialect only says which of its tags are kept.
        let format = ChatFormat::from_dir(&dir, None, None, |token| tokenizer.has_token(token))?;
        let eos = GenerationConfig::load(&dir)?.eos_token_ids;
        let Loaded { mut engine, prefill_chunk, .. } = load_checked(options, rows, joined, on_news)?;
        check_vocabulary(&eos, engine.vocab_size()).context("eos_token_id")?;
        let eos = ends_of_turn(&eos, &tokenizer, format.template.as_ref(), engine.vocab_size());
        let mut scores: BTreeMap<String, Score> = BTreeMap::new();
        for (line, task) in &self.tasks {
            let score = scores.entry(task.kind().to_owned()).or_default();
            match task {
                Task::Generate(task) => {
                    let is_right = generate(&mut engine, &tokenizer, format.dialect, task, max_tokens, &eos);
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
        Ok(scores)
    }
}

fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    dialect: Dialect,
    task: &Generate,
    max_tokens: usize,
    eos: &[u32],
) -> anyhow::Result<bool> {
    let prompt = tokenizer.encode(&task.prompt, true)?;
    let in_reasoning = opens_reasoning(&task.prompt);
    let mut stream = AnswerStream::chat(tokenizer, dialect, vec![], in_reasoning, vec![]);
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
