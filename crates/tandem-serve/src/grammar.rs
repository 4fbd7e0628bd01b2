//! Structured output: grammars over tokens, by llguidance.
//!
//! A client's grammar is not trusted. llguidance recurses along chains of rules and references, and an overflow of the
//! stack would end the process: its size is bounded, and it is compiled on a thread with a stack that the bounds fit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use anyhow::{anyhow, bail, ensure};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, Recognizer, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use tandem_engine::{Constraint, argmax};

use crate::tagged::{self, Tags};
use tandem_text::Tokenizer;
use tandem_text::dialect::{Dialect, END_THINK, Function, THINK};

/// Bytes of the largest schema, expression or grammar.
const MAX_BYTES: usize = 256 << 10;
/// Rules, terminals and references of one grammar, each of which may be a step of one chain.
const MAX_STEPS: usize = 2000;
/// Arrays and objects inside each other; serde_json reads 128 of them.
const MAX_DEPTH: usize = 128;
/// A step of a chain takes up to 20 KB in a debug build. Only pages that are touched become memory.
pub(crate) const STACK_BYTES: usize = 512 << 20;
/// A compilation that takes longer is given up. The bounds make it end soon after.
const COMPILE_TIME: Duration = Duration::from_secs(10);
/// Compilations at the same time.
const MAX_COMPILING: usize = 2;

/// White space between JSON's tokens, of which a model could otherwise write any amount.
const WHITE_SPACE: &str = r"[\x20\x0A]{0,8}";

/// What an answer is restricted to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Form {
    JsonSchema(Value),
    Regex(String),
    Choice(Vec<String>),
    Lark(String),
    /// One or more calls of these functions, or a text of this schema in their place.
    Calls {
        functions: Vec<Function>,
        parallel: bool,
        or_text: Option<Value>,
    },
}

/// Makes constraints for one model's tokens.
#[derive(Clone)]
pub(crate) struct Grammars(Arc<Inner>);

struct Inner {
    factory: ParserFactory,
    tokenizer: Tokenizer,
    dialect: Dialect,
    eos: Vec<u32>,
    n_compiling: AtomicUsize,
}

/// Why a grammar is not used.
#[derive(Debug)]
pub(crate) enum GrammarError {
    /// It is not valid, or too large.
    Invalid(anyhow::Error),
    /// Others are being compiled.
    Busy,
}

/// A compiled form, of which each answer gets a copy.
pub(crate) struct Compiled(Grammar);

impl Compiled {
    /// A constraint for one answer.
    pub(crate) fn constraint(&self) -> Box<dyn Constraint> {
        Box::new(self.0.clone())
    }
}

impl Grammars {
    /// For a model with `vocab_size` logits and these end-of-text tokens.
    ///
    /// # Errors
    /// The vocabulary is of no use to llguidance.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        dialect: Dialect,
        vocab_size: usize,
        eos: &[u32],
    ) -> anyhow::Result<Grammars> {
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                if tokenizer.is_added(id) { [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat() } else { bytes }
            })
            .collect();
        let info = TokRxInfo::new(vocab_size as u32, eos.first().copied().unwrap_or(0));
        let environment = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut factory = ParserFactory::new_simple(&(environment as _))?;
        factory.quiet();
        let n_compiling = AtomicUsize::new(0);
        let (tokenizer, eos) = (tokenizer.clone(), eos.to_vec());
        Ok(Grammars(Arc::new(Inner { factory, tokenizer, dialect, eos, n_compiling })))
    }

    /// Compiles a form; it lets everything pass up to the end of the reasoning section, if `reasoning` names what ends it.
    ///
    /// # Errors
    /// The schema, expression or grammar is not valid or too large, or too many are being compiled.
    pub(crate) fn compile(&self, form: &Form, reasoning: Option<&str>) -> Result<Compiled, GrammarError> {
        check_size(form).map_err(GrammarError::Invalid)?;
        let place = Compiling::enter(&self.0).ok_or(GrammarError::Busy)?;
        let (done, result) = sync_channel(1);
        let (form, reasoning) = (form.clone(), reasoning.map(str::to_owned));
        let compile = move || {
            let compiled = place.0.compile(&form, reasoning.as_deref());
            // Who has the answer may ask again at once.
            drop(place);
            let _ = done.send(compiled);
        };
        let thread = std::thread::Builder::new().name("tandem-grammar".into()).stack_size(STACK_BYTES).spawn(compile);
        thread.map_err(|error| GrammarError::Invalid(anyhow!("no thread can be started: {error}")))?;
        let compiled = match result.recv_timeout(COMPILE_TIME) {
            Ok(compiled) => compiled,
            Err(RecvTimeoutError::Timeout) => {
                Err(anyhow!("it takes longer than {} s to compile; make it simpler", COMPILE_TIME.as_secs()))
            }
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("it cannot be compiled (a bug)")),
        };
        compiled.map(Compiled).map_err(GrammarError::Invalid)
    }

    /// A constraint that ends the reasoning after `budget` tokens, and keeps the answer to a compiled form if there is one.
    pub(crate) fn with_budget(
        &self,
        budget: u32,
        compiled: Option<&Compiled>,
        in_reasoning: bool,
    ) -> Box<dyn Constraint> {
        let mut end = self.0.tokenizer.encode(END_THINK, false).unwrap_or_default();
        end.reverse();
        Box::new(Budget {
            inner: compiled.map(Compiled::constraint),
            tokenizer: self.0.tokenizer.clone(),
            // One more goes to the tag that opens the section.
            n_left: budget.saturating_add(u32::from(!in_reasoning)),
            end,
            is_open: true,
            is_start: !in_reasoning,
            tail: String::new(),
        })
    }
}

/// A place among the compilations.
struct Compiling(Arc<Inner>);

impl Compiling {
    fn enter(inner: &Arc<Inner>) -> Option<Compiling> {
        let place = Compiling(Arc::clone(inner));
        (inner.n_compiling.fetch_add(1, Ordering::Relaxed) < MAX_COMPILING).then_some(place)
    }
}

impl Drop for Compiling {
    fn drop(&mut self) {
        self.0.n_compiling.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inner {
    fn compile(&self, form: &Form, reasoning: Option<&str>) -> anyhow::Result<Grammar> {
        let grammar = match form {
            Form::JsonSchema(schema) => {
                Some(TopLevelGrammar::from_json_schema(with_white_space(self_contained(schema, schema)?)))
            }
            Form::Regex(regex) => Some(TopLevelGrammar::from_regex(regex)),
            Form::Choice(_) => None,
            Form::Lark(grammar) => Some(TopLevelGrammar::from_lark(grammar.clone())),
            Form::Calls { functions, parallel, or_text } => Some(self.calls(functions, *parallel, or_text.as_ref())?),
        };
        let rules = match (grammar, form) {
            (Some(grammar), _) => {
                let parser = self.factory.create_parser(grammar)?;
                let mut matcher = Matcher::new(Ok(parser));
                if let Some(error) = matcher.get_error() {
                    bail!(error);
                }
                // A grammar without any text would only show later.
                matcher.compute_mask_or_eos()?;
                Rules::Matcher(Box::new(matcher))
            }
            (None, Form::Choice(texts)) => Rules::Choice(Choice::new(texts, Arc::clone(self.factory.tok_env()))),
            (None, _) => bail!("a form without a grammar"),
        };
        Ok(Grammar {
            rules,
            tokenizer: self.tokenizer.clone(),
            eos: self.eos.clone(),
            reasoning_end: reasoning.map(|end| end.as_bytes().to_vec()),
            tail: vec![],
        })
    }

    /// Calls as the model's dialect writes them.
    fn calls(
        &self,
        functions: &[Function],
        parallel: bool,
        or_text: Option<&Value>,
    ) -> anyhow::Result<TopLevelGrammar> {
        let tag = |tag: &str| match self.tokenizer.token_to_id(tag) {
            Some(id) => format!("<[{id}]>"),
            None => quoted(tag),
        };
        match self.dialect {
            Dialect::Llama3 | Dialect::Hermes => {
                // References start from the schema that they stand in.
                let roots = json!({
                    "functions": functions
                        .iter()
                        .enumerate()
                        .map(|(i, f)| rebased(&f.parameters, &format!("#/functions/{i}")))
                        .collect::<Vec<_>>(),
                    "text": or_text.map(|schema| rebased(schema, "#/text")),
                });
                let call = |(i, f): (usize, &Function)| {
                    json!({
                        "type": "object",
                        "properties": {"name": {"const": f.name}, "parameters": object_schema(&roots["functions"][i])},
                        "required": ["name", "parameters"],
                        "additionalProperties": false,
                    })
                };
                let calls = json!({"anyOf": functions.iter().enumerate().map(call).collect::<Vec<_>>()});
                let mut forms = vec![calls.clone()];
                if parallel {
                    forms.push(json!({"type": "array", "items": calls, "minItems": 1}));
                }
                forms.extend(or_text.map(|_| roots["text"].clone()));
                let schema = self_contained(&json!({"anyOf": forms}), &roots)?;
                Ok(TopLevelGrammar::from_json_schema(with_white_space(schema)))
            }
            Dialect::Glm => {
                Ok(TopLevelGrammar::from_lark(tagged::calls(functions, parallel, or_text, &Tags::glm(&tag))?))
            }
            Dialect::DeepSeekV32 => {
                let tags = Tags::dsml(self.tokenizer.token_to_id("｜DSML｜"));
                Ok(TopLevelGrammar::from_lark(tagged::calls(functions, parallel, or_text, &tags)?))
            }
            Dialect::DeepSeekV3 | Dialect::DeepSeekV31 => {
                let is_fenced = self.dialect == Dialect::DeepSeekV3;
                let grammar = tagged::deepseek_v3(functions, parallel, or_text, is_fenced, &tag)?;
                Ok(TopLevelGrammar::from_lark(grammar))
            }
        }
    }
}

pub(crate) fn object_schema(parameters: &Value) -> Value {
    if parameters.as_object().is_none_or(serde_json::Map::is_empty) {
        json!({"type": "object"})
    } else {
        parameters.clone()
    }
}

/// The same with references that start from `prefix` of a larger document.
fn rebased(value: &Value, prefix: &str) -> Value {
    match value {
        Value::Object(map) => {
            let entry = |(key, value): (&String, &Value)| match (key.as_str(), value.as_str()) {
                ("$ref", Some(target)) if target == "#" || target.starts_with("#/") => {
                    (key.clone(), json!(format!("{prefix}{}", target[1..].trim_end_matches('/'))))
                }
                ("const" | "enum" | "default" | "examples", _) => (key.clone(), value.clone()),
                _ => (key.clone(), rebased(value, prefix)),
            };
            Value::Object(map.iter().map(entry).collect())
        }
        Value::Array(list) => list.iter().map(|value| rebased(value, prefix)).collect(),
        other => other.clone(),
    }
}

/// A part of a schema with the definitions that its references name, which start from `root`.
///
/// # Errors
/// A reference leads nowhere.
pub(crate) fn self_contained(schema: &Value, root: &Value) -> anyhow::Result<Value> {
    /// Names definitions by their numbers: every pointer is one that llguidance can read.
    fn rewritten(value: &Value, references: &mut Vec<String>) -> Value {
        match value {
            Value::Object(map) => {
                let entry = |(key, value): (&String, &Value)| match (key.as_str(), value.as_str()) {
                    ("$ref", Some(target)) => {
                        let known = references.iter().position(|known| known == target);
                        let i = known.unwrap_or_else(|| {
                            references.push(target.to_owned());
                            references.len() - 1
                        });
                        (key.clone(), json!(format!("#/$defs/r{i}")))
                    }
                    ("$defs" | "definitions", _) => (key.clone(), Value::Null),
                    ("const" | "enum" | "default" | "examples", _) => (key.clone(), value.clone()),
                    _ => (key.clone(), rewritten(value, references)),
                };
                let map = map.iter().map(entry);
                Value::Object(map.filter(|(key, _)| key != "$defs" && key != "definitions").collect())
            }
            Value::Array(list) => list.iter().map(|value| rewritten(value, references)).collect(),
            other => other.clone(),
        }
    }
    let mut references = vec![];
    let mut contained = rewritten(schema, &mut references);
    let mut definitions = serde_json::Map::new();
    while let Some(reference) = references.get(definitions.len()).cloned() {
        let Some(target) = tandem_text::schema::resolve(&reference, root) else {
            bail!("the reference {reference:?} ($ref) leads nowhere");
        };
        let definition = rewritten(target, &mut references);
        definitions.insert(format!("r{}", definitions.len()), definition);
    }
    if let (false, Value::Object(map)) = (definitions.is_empty(), &mut contained) {
        map.insert("$defs".into(), Value::Object(definitions));
    }
    Ok(contained)
}

pub(crate) fn with_white_space(mut schema: Value) -> Value {
    if let Value::Object(map) = &mut schema {
        map.insert("x-guidance".into(), json!({"whitespace_pattern": WHITE_SPACE}));
    }
    schema
}

pub(crate) fn alternatives(texts: &[String]) -> String {
    texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(" | ")
}

/// A Lark string.
pub(crate) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Refuses what could take too much of the stack, the memory or the time.
fn check_size(form: &Form) -> anyhow::Result<()> {
    let (n_bytes, n_steps) = match form {
        Form::JsonSchema(schema) => schema_size(schema)?,
        Form::Regex(regex) => (regex.len(), 0),
        Form::Choice(texts) => {
            return within("choice", texts.iter().map(|text| text.len() + 1).sum::<usize>(), CHOICE_BYTES);
        }
        Form::Lark(grammar) => (grammar.len(), lark_steps(grammar)),
        Form::Calls { functions, or_text, .. } => {
            let mut sum = or_text.as_ref().map(schema_size).transpose()?.unwrap_or((0, 0));
            for function in functions {
                let (n_bytes, n_steps) = schema_size(&function.parameters)?;
                sum = (sum.0 + n_bytes + function.name.len(), sum.1 + n_steps);
            }
            sum
        }
    };
    within("schema or grammar", n_bytes, MAX_BYTES)?;
    ensure!(
        n_steps <= MAX_STEPS,
        "it has {n_steps} rules, terminals or references, expected at most {MAX_STEPS}; make it smaller"
    );
    Ok(())
}

/// Bytes of all choices together; they are not compiled, only sorted.
const CHOICE_BYTES: usize = 4 << 20;

fn within(what: &str, n_bytes: usize, most: usize) -> anyhow::Result<()> {
    ensure!(n_bytes <= most, "the {what} has {n_bytes} bytes, expected at most {most}; make it smaller");
    Ok(())
}

/// Bytes of a schema as text, and references in it.
fn schema_size(schema: &Value) -> anyhow::Result<(usize, usize)> {
    let mut pending = vec![(schema, 0)];
    let (mut n_bytes, mut n_steps) = (0, 0);
    while let Some((value, depth)) = pending.pop() {
        ensure!(depth <= MAX_DEPTH, "the schema is nested more than {MAX_DEPTH} deep");
        match value {
            Value::Object(map) => {
                n_bytes += 2 + map.keys().map(|key| key.len() + 4).sum::<usize>();
                n_steps += usize::from(map.get("$ref").is_some_and(Value::is_string));
                pending.extend(map.values().map(|value| (value, depth + 1)));
            }
            Value::Array(list) => {
                n_bytes += 2 + list.len();
                pending.extend(list.iter().map(|value| (value, depth + 1)));
            }
            Value::String(text) => n_bytes += text.len() + 2,
            _ => n_bytes += 4,
        }
    }
    Ok((n_bytes, n_steps))
}

/// Definitions of a Lark grammar, at most: each stands at the beginning of a line.
fn lark_steps(grammar: &str) -> usize {
    let may_define = |line: &&str| {
        let line = line.trim_start();
        line.contains([':', '%']) && !line.starts_with(['|', '/', '#', '"'])
    };
    // References to a schema's definitions count as well.
    grammar.split(['\n', '\r']).filter(may_define).count() + grammar.matches("$ref").count()
}

/// What decides about tokens.
#[derive(Clone)]
enum Rules {
    Matcher(Box<Matcher>),
    Choice(Choice),
}

impl Rules {
    /// The tokens that may follow; an error when only the end may.
    fn allowed(&mut self) -> anyhow::Result<SimpleVob> {
        match self {
            Rules::Matcher(matcher) => matcher.compute_mask_or_eos(),
            Rules::Choice(choice) => choice.allowed(),
        }
    }

    /// Takes a token; false when nothing more may follow it.
    fn accept(&mut self, token: u32) -> bool {
        match self {
            Rules::Matcher(matcher) => matcher.consume_token(token).is_ok() && !matcher.is_stopped(),
            Rules::Choice(choice) => choice.accept(token),
        }
    }
}

/// One of several texts. They are sorted: those that begin with what is written already are neighbours.
#[derive(Clone)]
struct Choice {
    texts: Arc<[Vec<u8>]>,
    tokens: TokEnv,
    /// After each byte since the last token: the texts that are left, and bytes written. Never empty.
    places: Vec<ChoicePlace>,
}

#[derive(Clone, Copy)]
struct ChoicePlace {
    first: usize,
    end: usize,
    n_written: usize,
}

impl Choice {
    fn new(texts: &[String], tokens: TokEnv) -> Choice {
        let mut texts: Vec<Vec<u8>> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        texts.sort_unstable();
        texts.dedup();
        let start = ChoicePlace { first: 0, end: texts.len(), n_written: 0 };
        Choice { texts: texts.into(), tokens, places: vec![start] }
    }

    fn place(&self) -> ChoicePlace {
        self.places[self.places.len() - 1]
    }

    /// Whether one of the texts is written.
    fn is_complete(&self) -> bool {
        let ChoicePlace { first, end, n_written } = self.place();
        first < end && self.texts[first].len() == n_written
    }

    fn allowed(&mut self) -> anyhow::Result<SimpleVob> {
        let tokens = Arc::clone(&self.tokens);
        let trie = tokens.tok_trie();
        let mut allowed = trie.alloc_token_set();
        trie.add_bias(self, &mut allowed, &[]);
        if self.is_complete() {
            allowed.or(&trie.eos_token_set());
        }
        Ok(allowed)
    }

    fn accept(&mut self, token: u32) -> bool {
        let tokens = Arc::clone(&self.tokens);
        for byte in tokens.tok_trie().token(token) {
            if !self.try_push_byte(*byte) {
                return false;
            }
        }
        self.collapse();
        let ChoicePlace { first, end, n_written } = self.place();
        !(end - first == 1 && self.texts[first].len() == n_written)
    }
}

impl Recognizer for Choice {
    fn pop_bytes(&mut self, num: usize) {
        self.places.truncate((self.places.len() - num).max(1));
    }

    fn collapse(&mut self) {
        self.places = vec![self.place()];
    }

    fn trie_finished(&mut self) {
        self.places.truncate(1);
    }

    fn try_push_byte(&mut self, byte: u8) -> bool {
        let ChoicePlace { first, end, n_written } = self.place();
        let left = &self.texts[first..end];
        // A text that ends here comes before those that go on.
        let is_before = |text: &Vec<u8>, byte: u8| text.get(n_written).is_none_or(|b| *b < byte);
        let from = left.partition_point(|text| is_before(text, byte));
        let n = left[from..].partition_point(|text| text.get(n_written) == Some(&byte));
        if n > 0 {
            let place = ChoicePlace { first: first + from, end: first + from + n, n_written: n_written + 1 };
            self.places.push(place);
        }
        n > 0
    }
}

/// Ends the reasoning when its tokens are used up.
struct Budget {
    inner: Option<Box<dyn Constraint>>,
    tokenizer: Tokenizer,
    n_left: u32,
    /// Tokens of the tag that ends the reasoning, the last first, as far as they are still to come.
    end: Vec<u32>,
    /// The reasoning is going on, or may begin with the next token.
    is_open: bool,
    is_start: bool,
    tail: String,
}

impl Constraint for Budget {
    fn mask(&mut self, logits: &mut [f32]) {
        if let (true, 0, Some(next)) = (self.is_open, self.n_left, self.end.last()) {
            logits.fill(f32::NEG_INFINITY);
            logits[*next as usize] = 0.0;
        } else if let Some(inner) = &mut self.inner {
            inner.mask(logits);
        }
    }

    fn accept(&mut self, token: u32) -> bool {
        if self.is_open {
            let bytes = self.tokenizer.token_bytes(token).unwrap_or_default();
            self.tail.push_str(&String::from_utf8_lossy(&bytes));
            if std::mem::take(&mut self.is_start) && !self.tail.trim_start().starts_with(THINK) {
                // The model does not think first.
                self.is_open = false;
            }
            if self.n_left == 0 {
                self.end.pop();
            }
            self.n_left = self.n_left.saturating_sub(1);
            if self.tail.ends_with(END_THINK) || self.end.is_empty() {
                self.is_open = false;
            }
            let keep = self.tail.char_indices().rev().nth(15).map_or(0, |(at, _)| at);
            self.tail.drain(..keep);
        }
        self.inner.as_mut().is_none_or(|inner| inner.accept(token))
    }
}

/// One answer's place in its grammar.
#[derive(Clone)]
struct Grammar {
    rules: Rules,
    tokenizer: Tokenizer,
    eos: Vec<u32>,
    /// What ends the reasoning section, until it has come.
    reasoning_end: Option<Vec<u8>>,
    /// The last bytes of the reasoning.
    tail: Vec<u8>,
}

impl Constraint for Grammar {
    fn mask(&mut self, logits: &mut [f32]) {
        let ends: Vec<(u32, f32)> =
            self.eos.iter().filter_map(|id| logits.get(*id as usize).map(|logit| (*id, *logit))).collect();
        if let Some(end) = &self.reasoning_end {
            // An end here would be an empty answer: where the model wants one, the reasoning ends instead.
            let wants_end = argmax(logits).is_ok_and(|id| self.eos.contains(&id));
            let end = std::str::from_utf8(end).ok().and_then(|end| self.tokenizer.token_to_id(end));
            for (id, _) in ends {
                logits[id as usize] = f32::NEG_INFINITY;
            }
            if let (true, Some(end)) = (wants_end, end) {
                logits.fill(f32::NEG_INFINITY);
                logits[end as usize] = 0.0;
            }
            return;
        }
        let Ok(mask) = self.rules.allowed() else {
            // Only the end is left.
            logits.fill(f32::NEG_INFINITY);
            for (id, logit) in ends {
                logits[id as usize] = logit;
            }
            return;
        };
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= mask.len() || !mask.get(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        // The grammar knows one end token, the model may prefer another.
        if self.eos.iter().any(|id| (*id as usize) < mask.len() && mask.get(*id as usize)) {
            for (id, logit) in ends {
                logits[id as usize] = logit;
            }
        }
    }

    fn accept(&mut self, token: u32) -> bool {
        if let Some(end) = &self.reasoning_end {
            self.tail.extend(self.tokenizer.token_bytes(token).unwrap_or_default());
            if self.tail.ends_with(end) {
                self.reasoning_end = None;
            }
            let keep = self.tail.len().min(64);
            self.tail.drain(..self.tail.len() - keep);
            return true;
        }
        self.rules.accept(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn grammars() -> Grammars {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8");
        let tokenizer = Tokenizer::from_dir(std::path::Path::new(model)).unwrap();
        let vocab_size = tokenizer.vocab_size();
        Grammars::new(&tokenizer, Dialect::Glm, vocab_size, &[0]).unwrap()
    }

    fn chain(n: usize, step: impl Fn(usize) -> String, last: &str) -> String {
        (0..n).map(step).collect::<Vec<_>>().join("\n") + "\n" + last
    }

    /// Each compiles, or is refused, without an overflow of the stack and without holding anybody up.
    #[test]
    fn hostile_grammars_end_in_an_answer() {
        let grammars = grammars();
        let references = |n: usize, key: &str| {
            let mut definitions = serde_json::Map::new();
            for i in 0..n {
                definitions.insert(format!("d{i}"), json!({"$ref": format!("#/{key}/d{}", i + 1)}));
            }
            definitions.insert(format!("d{n}"), json!({"type": "string"}));
            json!({"$ref": format!("#/{key}/d0"), key: definitions})
        };
        let nested =
            |n: usize| (0..n).fold(json!({"type": "null"}), |schema, _| json!({"type": "array", "items": schema}));
        let function = |parameters: Value| Form::Calls {
            functions: vec![Function { name: "f".into(), parameters }],
            parallel: true,
            or_text: None,
        };
        let forms = [
            Form::Lark("start: ".to_owned() + &chain(1000, |i| format!("r{i}\nr{i}: "), "\"x\"").replace(": \n", ": ")),
            Form::Lark(chain(1990, |i| format!("r{i}: r{}", i + 1), "r1990: \"x\"\nstart: r0")),
            Form::Lark(chain(1990, |i| format!("T{i}: T{}", i + 1), "T1990: \"x\"\nstart: T0")),
            Form::Lark(chain(1990, |i| format!("r{i}: r{} \"a\" | r{}", i + 1, i + 1), "r1990: \"x\"\nstart: r0")),
            Form::Lark(chain(90_000, |i| format!("r{i}: r{}", i + 1), "start: r0")),
            Form::Lark(format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000))),
            Form::Lark(format!("start: \"a\"{}", "?".repeat(100_000))),
            Form::Lark(format!("start: {}", "\"a\" ".repeat(50_000))),
            Form::Lark(format!("start: {}", "a b c ".repeat(10_000))),
            Form::Lark("start: start".into()),
            Form::Lark("start: start start |".into()),
            Form::Lark("start: a\na: b a\nb:".into()),
            Form::Regex("(".repeat(100_000) + &")".repeat(100_000)),
            Form::Regex("(a?){1000}".repeat(10)),
            Form::Regex("((((a{100}){100}){100}){100}){100}".into()),
            Form::Regex("a".repeat(200_000)),
            Form::Regex("a|".repeat(100_000)),
            Form::Regex("(a|b".repeat(30_000)),
            Form::JsonSchema(references(400, "$defs")),
            Form::JsonSchema(references(1990, "definitions")),
            Form::JsonSchema(references(5000, "$defs")),
            Form::JsonSchema(nested(120)),
            Form::JsonSchema(nested(3000)),
            Form::JsonSchema(json!({"$ref": "#"})),
            Form::JsonSchema(
                json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
            ),
            Form::JsonSchema(json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]})),
            Form::JsonSchema(json!({"enum": (0..20_000).map(|i| format!("v{i}")).collect::<Vec<_>>()})),
            Form::JsonSchema(json!({"type": "string", "pattern": "(x+x+)+y", "maxLength": 2_000_000_000})),
            Form::JsonSchema(json!({"type": "array", "items": {}, "minItems": 1_000_000_000})),
            function(references(1000, "$defs")),
            function(json!({"type": "object", "properties": {"a": references(1000, "$defs")}})),
        ];
        for form in &forms {
            let (start, text) = (Instant::now(), format!("{form:?}"));
            let result = grammars.compile(form, None);
            let shown: String = text.chars().take(80).collect();
            assert!(start.elapsed() < COMPILE_TIME, "{shown}");
            if let Ok(compiled) = result {
                let mut constraint = compiled.constraint();
                let mut logits = vec![0.0; grammars.0.tokenizer.vocab_size()];
                constraint.mask(&mut logits);
                assert!(start.elapsed() < COMPILE_TIME, "{shown}");
            }
        }
        // Nothing is left behind.
        assert!(grammars.compile(&Form::Regex("a".into()), None).is_ok());
    }

    /// A vocabulary with the tags of all dialects as tokens.
    fn with_tags() -> Tokenizer {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8");
        let path = std::path::Path::new(model).join("tokenizer.json");
        let mut file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let n_known = Tokenizer::from_dir(std::path::Path::new(model)).unwrap().vocab_size();
        let tags = [
            "｜DSML｜",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
        ];
        for (i, tag) in tags.into_iter().enumerate() {
            file["added_tokens"]
                .as_array_mut()
                .unwrap()
                .push(json!({"id": n_known + i, "content": tag, "special": false,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
        Tokenizer::from_dir(dir.path()).unwrap()
    }

    /// In each dialect, with its tags as tokens and without: what the grammar lets pass is read as the calls that it stands for.
    #[test]
    fn forced_calls_in_every_dialect() {
        let functions = vec![
            Function {
                name: "set".into(),
                parameters: json!({
                    "type": "object", "required": ["city", "n"],
                    "properties": {
                        "city": {"type": "string"}, "n": {"type": "integer"}, "unit": {"enum": ["C", 1]},
                        "code": {"type": "string", "pattern": "^[a-z]+$"}, "tags": {"type": "array"}, "any": {},
                    },
                }),
            },
            Function { name: "now".into(), parameters: json!({}) },
        ];
        let dsml = |calls: &str| format!("<｜DSML｜function_calls>\n{calls}</｜DSML｜function_calls>");
        let call = |name: &str, parameters: &[(&str, bool, &str)]| {
            let parameters: Vec<String> = parameters
                .iter()
                .map(|(key, is_text, value)| {
                    format!("<｜DSML｜parameter name=\"{key}\" string=\"{is_text}\">{value}</｜DSML｜parameter>\n")
                })
                .collect();
            format!("<｜DSML｜invoke name=\"{name}\">\n{}</｜DSML｜invoke>\n", parameters.concat())
        };
        let all = [
            ("city", true, "Z\u{fc}rich </b>\n\"x\""),
            ("n", false, "3"),
            ("unit", true, "C"),
            ("code", true, "abc"),
            ("tags", false, "[1, {\"a\": \"</\"}]"),
            ("any", true, "1"),
        ];
        let v31 = |name: &str, arguments: &str| {
            format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>")
        };
        let list = |calls: &str| format!("<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>");
        let v3 = |name: &str, arguments: &str| v31("function", &format!("{name}\n```json\n{arguments}\n```"));
        let json = r#"{"city": "a</b>", "n": 3}"#;
        let glm =
            |rest: &str| format!("<tool_call>set<arg_key>city</arg_key><arg_value>a</b></arg_value>{rest}</tool_call>");
        let n = "<arg_key>n</arg_key><arg_value>3</arg_value>";
        // A text, and the number of calls in it; none if it must not pass.
        let cases: [(Dialect, String, usize); 16] = [
            (Dialect::DeepSeekV32, dsml(&call("set", &all)), 1),
            (Dialect::DeepSeekV32, format!("\n\n{}", dsml(&call("set", &all[..2]))), 1),
            (Dialect::DeepSeekV32, dsml(&(call("now", &[]) + &call("set", &all[..3]))), 2),
            (Dialect::DeepSeekV32, dsml(&call("set", &[all[0], ("n", false, "3"), ("unit", false, "1")])), 1),
            (Dialect::DeepSeekV32, dsml(&call("set", &all[..1])), 0),
            (Dialect::DeepSeekV32, dsml(&call("set", &[all[0], ("n", true, "3")])), 0),
            (Dialect::DeepSeekV32, dsml(&call("set", &[all[0], all[1], ("code", true, "ABC")])), 0),
            (Dialect::DeepSeekV32, dsml(&call("fly", &[])), 0),
            (Dialect::DeepSeekV32, "words".into(), 0),
            (Dialect::DeepSeekV31, list(&(v31("set", json) + &v31("now", "{}"))), 2),
            (Dialect::DeepSeekV31, list(&v31("set", "{}")), 0),
            (Dialect::DeepSeekV3, list(&(v3("set", json) + &v3("now", "{}"))), 2),
            (Dialect::DeepSeekV3, list(&v31("now", "{}")), 0),
            (Dialect::Glm, glm(n), 1),
            (Dialect::Glm, glm(""), 0),
            (Dialect::Llama3, format!("[{{\"name\": \"set\", \"parameters\": {json}}}]"), 1),
        ];
        for tokenizer in [with_tags(), grammars().0.tokenizer.clone()] {
            for (dialect, text, n_calls) in &cases {
                let grammars = Grammars::new(&tokenizer, *dialect, tokenizer.vocab_size(), &[0]).unwrap();
                let form = Form::Calls { functions: functions.clone(), parallel: true, or_text: None };
                let compiled = grammars.compile(&form, None).unwrap_or_else(|error| panic!("{dialect:?}: {error:?}"));
                let mut constraint = compiled.constraint();
                let mut goes_on = true;
                let mut passes = |id: u32| {
                    let mut logits = vec![0.0; tokenizer.vocab_size()];
                    constraint.mask(&mut logits);
                    let passes = goes_on && logits[id as usize] == 0.0;
                    goes_on = passes && constraint.accept(id);
                    passes
                };
                let ids = tokenizer.encode(text, false).unwrap();
                let n_passed = ids.iter().take_while(|id| passes(**id)).count();
                // A grammar that can only end has ended.
                let is_whole = n_passed == ids.len();
                assert_eq!(is_whole, *n_calls > 0, "{dialect:?} {text:?} after {n_passed} of {} tokens", ids.len());
                if is_whole {
                    let mut stream =
                        tandem_text::AnswerStream::chat(&tokenizer, *dialect, functions.clone(), false, vec![]);
                    ids.iter().for_each(|id| drop(stream.push(*id).unwrap()));
                    stream.finish(false).unwrap();
                    assert_eq!(stream.n_calls(), *n_calls, "{text:?}");
                }
            }
        }
    }

    /// All texts that a constraint lets pass, up to a length.
    fn texts(grammars: &Grammars, constraint: &dyn Fn() -> Box<dyn Constraint>, most: usize) -> Vec<String> {
        let tokenizer = &grammars.0.tokenizer;
        let (mut pending, mut found) = (vec![vec![]], vec![]);
        while let Some(ids) = pending.pop() {
            let mut constraint = constraint();
            let goes_on = ids.iter().all(|id| constraint.accept(*id));
            let text = tokenizer.decode(&ids, false).unwrap();
            if !goes_on {
                found.push(text);
                continue;
            }
            let mut logits = vec![0.0; tokenizer.vocab_size()];
            constraint.mask(&mut logits);
            for (id, logit) in logits.iter().enumerate().filter(|(_, logit)| **logit == 0.0) {
                assert!(*logit == 0.0 && ids.len() < most);
                match id {
                    0 => found.push(text.clone()),
                    _ => pending.push([&ids[..], &[id as u32]].concat()),
                }
            }
        }
        found.sort();
        found.dedup();
        found
    }

    #[test]
    fn a_choice_is_exactly_its_texts() {
        let grammars = grammars();
        for choices in [vec!["red", "blue"], vec!["a", "ab", "abc"], vec!["é", "ê", "日本"], vec!["", "x"]] {
            let choices: Vec<String> = choices.into_iter().map(str::to_owned).collect();
            let compiled = grammars.compile(&Form::Choice(choices.clone()), None).unwrap();
            let mut expected = choices.clone();
            expected.sort();
            assert_eq!(texts(&grammars, &|| compiled.constraint(), 12), expected);
        }
        let start = Instant::now();
        let many = Form::Choice((0..300_000).map(|i| format!("zq{i}")).collect());
        let mut logits = vec![0.0; grammars.0.tokenizer.vocab_size()];
        grammars.compile(&many, None).unwrap().constraint().mask(&mut logits);
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}
