//! What a model writes, taken apart while it is written: reasoning, text and tool calls.
//!
//! One parser for two dialects that share `<think>`..`</think>` and `<tool_call>`..`</tool_call>`:
//!
//! - GLM: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>..</tool_call>`
//! - JSON (Llama, SmolLM, Qwen): `{"name": .., "parameters": {..}}`, alone, in a list, or between the tags
//!
//! Rules where a model does not keep to its format: a call inside the reasoning is a call; a tag inside a value is part of
//! the value unless what follows fits the format; a call of an undeclared function, or one that cannot be read, is text.
//! Arguments are passed on one by one as soon as they are complete, as pieces of one JSON object.

use serde_json::{Map, Value};

use crate::schema::{of_argument, type_of, types};
use crate::stop::held_back;

/// Begins a reasoning section.
pub const THINK: &str = "<think>";
/// Ends a reasoning section.
pub const END_THINK: &str = "</think>";
const CALL: &str = "<tool_call>";
const END_CALL: &str = "</tool_call>";
const KEY: &str = "<arg_key>";
const END_KEY: &str = "</arg_key>";
const VALUE: &str = "<arg_value>";
const END_VALUE: &str = "</arg_value>";
const PYTHON: &str = "<|python_tag|>";

/// Tags that stay in the text that the parser gets, special tokens or not.
pub const TAGS: [&str; 9] = [THINK, END_THINK, CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE, PYTHON];

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Arguments between tags.
    Glm,
    /// One JSON object per call.
    Json,
}

impl Dialect {
    /// The dialect that a chat template teaches.
    pub fn of_template(source: &str) -> Dialect {
        if source.contains(KEY) { Dialect::Glm } else { Dialect::Json }
    }
}

/// True when a rendered prompt leaves the reasoning section open, so that the answer begins inside it.
pub fn opens_reasoning(prompt: &str) -> bool {
    prompt.trim_end().ends_with(THINK)
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Its name, as calls give it.
    pub name: String,
    /// JSON schema of the arguments.
    pub parameters: Value,
}

impl Function {
    /// The function that a tool in OpenAI's form declares, with or without `{"type": "function", "function": ..}` around it.
    pub fn of_tool(tool: &Value) -> Option<Function> {
        let function = tool.get("function").unwrap_or(tool);
        let name = function.get("name")?.as_str().filter(|name| !name.is_empty())?;
        let parameters = function.get("parameters").cloned().unwrap_or_else(|| Value::Object(Map::new()));
        Some(Function { name: name.to_owned(), parameters })
    }
}

/// The next piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// More of the reasoning.
    Reasoning(String),
    /// More of the text for the reader.
    Content(String),
    /// A call begins.
    Call {
        /// The declared function's name.
        name: String,
    },
    /// More of the last call's arguments, JSON text.
    Arguments(String),
    /// The last call is complete.
    EndCall,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before anything was said.
    Start,
    Reasoning,
    Content,
    /// After `<tool_call>`: the name is not complete.
    Name,
    /// Between arguments.
    Arguments,
}

/// Takes a model's text piece by piece.
#[derive(Debug)]
pub struct Parser {
    dialect: Dialect,
    functions: Vec<Function>,
    state: State,
    /// The prompt has opened the reasoning, of which nothing was written yet.
    is_opened: bool,
    /// Where to go on after a call.
    after_call: State,
    pending: String,
    /// Bytes of `pending` in which a call that is one JSON value does not end.
    n_tried: usize,
    /// Index of the function whose call is being read.
    function: usize,
    keys: Vec<String>,
    n_calls: usize,
    n_malformed: usize,
    /// White space that is only passed on if text follows, or the end.
    space: String,
    has_content: bool,
    deltas: Vec<Delta>,
}

impl Parser {
    /// A parser for an answer that begins inside the reasoning section or after it.
    pub fn new(dialect: Dialect, functions: Vec<Function>, in_reasoning: bool) -> Parser {
        let state = if in_reasoning { State::Reasoning } else { State::Start };
        Parser {
            dialect,
            functions,
            state,
            is_opened: in_reasoning,
            after_call: state,
            pending: String::new(),
            n_tried: 0,
            function: 0,
            keys: vec![],
            n_calls: 0,
            n_malformed: 0,
            space: String::new(),
            has_content: false,
            deltas: vec![],
        }
    }

    /// Whether the text is reasoning now.
    pub fn in_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    /// Complete calls so far.
    pub fn n_calls(&self) -> usize {
        self.n_calls
    }

    /// What looked like calls and was passed on as text.
    pub fn n_malformed(&self) -> usize {
        self.n_malformed
    }

    /// Whether a call has begun that is not complete.
    pub fn in_call(&self) -> bool {
        matches!(self.state, State::Name | State::Arguments)
    }

    /// Takes more text.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        self.pending.push_str(text);
        while self.advance(false) {}
        std::mem::take(&mut self.deltas)
    }

    /// Ends the text. If it was cut off, a call that is not complete keeps its open end; else it is closed.
    pub fn finish(&mut self, cut_off: bool) -> Vec<Delta> {
        while self.advance(!cut_off) {}
        while self.state == State::Name {
            let rest = std::mem::take(&mut self.pending);
            if !cut_off && self.json_calls(rest.trim()) {
                self.state = self.after_call;
            } else {
                self.not_a_call(&rest);
            }
            while self.advance(!cut_off) {}
        }
        let rest = std::mem::take(&mut self.pending);
        match self.state {
            State::Start | State::Content if self.dialect == Dialect::Json && !self.has_content => {
                self.json_text(&rest);
            }
            State::Start | State::Content | State::Reasoning => self.text(&rest),
            State::Arguments if cut_off => {}
            State::Name | State::Arguments => self.end_call(),
        }
        if self.has_content && matches!(self.state, State::Content) && !self.space.is_empty() {
            self.deltas.push(Delta::Content(std::mem::take(&mut self.space)));
        }
        std::mem::take(&mut self.deltas)
    }

    /// Handles what is certain at the front of `pending`; false when more text is needed.
    fn advance(&mut self, at_end: bool) -> bool {
        match self.state {
            State::Start | State::Content | State::Reasoning => self.advance_text(at_end),
            State::Name => self.advance_name(at_end),
            State::Arguments => self.advance_arguments(at_end),
        }
    }

    fn advance_text(&mut self, at_end: bool) -> bool {
        if self.state == State::Start {
            // A model may open or close the reasoning that its prompt has opened or closed already.
            let trimmed = self.pending.trim_start();
            if let Some(rest) = trimmed.strip_prefix(THINK) {
                (self.pending, self.state) = (rest.to_owned(), State::Reasoning);
                return true;
            }
            if let Some(rest) = trimmed.strip_prefix(END_THINK) {
                self.pending = rest.to_owned();
                return true;
            }
            if !at_end && (is_beginning_of(trimmed, THINK) || is_beginning_of(trimmed, END_THINK)) {
                return false;
            }
            self.state = State::Content;
        }
        if self.is_opened {
            let trimmed = self.pending.trim_start();
            if let Some(rest) = trimmed.strip_prefix(THINK) {
                self.pending = rest.to_owned();
            } else if !at_end && is_beginning_of(trimmed, THINK) {
                return false;
            }
            self.is_opened = false;
        }
        let in_reasoning = self.state == State::Reasoning;
        if self.dialect == Dialect::Json && !in_reasoning && !self.functions.is_empty() {
            let start = self.pending.trim_start();
            let may_be_call =
                start.starts_with(['{', '[']) || start.starts_with(PYTHON) || is_beginning_of(start, PYTHON);
            if !self.has_content && may_be_call {
                // It may be one call, which only its end tells.
                return false;
            }
        }
        // In the text it ends a section that nothing opened: the tag means nothing to a reader.
        let mut tags: Vec<&str> = vec![END_THINK];
        if !self.functions.is_empty() {
            tags.push(CALL);
        }
        let found = tags.iter().filter_map(|tag| self.pending.find(tag).map(|at| (at, *tag))).min();
        if let Some((at, tag)) = found {
            let rest = self.pending.split_off(at + tag.len());
            let before = std::mem::replace(&mut self.pending, rest);
            self.text(&before[..at]);
            if tag == CALL {
                self.after_call = self.state;
                self.state = State::Name;
                self.n_tried = 0;
            } else {
                self.state = State::Content;
                if in_reasoning {
                    self.space.clear();
                }
            }
            return true;
        }
        let held = if at_end { 0 } else { tags.iter().map(|tag| held_back(&self.pending, tag)).max().unwrap_or(0) };
        let rest = self.pending.split_off(self.pending.len() - held);
        let text = std::mem::replace(&mut self.pending, rest);
        self.text(&text);
        false
    }

    fn advance_name(&mut self, at_end: bool) -> bool {
        if self.pending.trim_start().starts_with(['{', '[']) {
            // The end tag may stand inside a string: the first one after which the JSON is complete counts.
            // Each is tried once: a model may write any number of them.
            while let Some(at) = self.pending[self.n_tried..].find(END_CALL).map(|at| at + self.n_tried) {
                self.n_tried = at + 1;
                let json = self.pending[..at].trim().to_owned();
                if serde_json::from_str::<Value>(&json).is_ok() {
                    let rest = self.pending.split_off(at + END_CALL.len());
                    let whole = std::mem::replace(&mut self.pending, rest);
                    self.state = self.after_call;
                    if !self.json_calls(&json) {
                        self.not_a_call(&whole);
                    }
                    return true;
                }
            }
            return false;
        }
        let tags = [KEY, END_CALL, CALL, END_THINK];
        let Some(at) = tags.iter().filter_map(|tag| self.pending.find(tag)).min() else {
            // A name is short, and of one word; a tag may have begun after it.
            let held = tags.iter().map(|tag| held_back(&self.pending, tag)).max().unwrap_or(0);
            let name = self.pending[..self.pending.len() - held].trim();
            if at_end || (name.len() > 256 || name.contains(char::is_whitespace)) {
                let rest = std::mem::take(&mut self.pending);
                let declared = self.functions.iter().any(|f| f.name == rest.trim());
                if at_end && declared {
                    // The end tag is missing.
                    self.pending = rest + END_CALL;
                    return true;
                }
                self.not_a_call(&rest);
                return true;
            }
            return false;
        };
        let name = self.pending[..at].trim().to_owned();
        let rest = self.pending.split_off(at);
        let before = std::mem::replace(&mut self.pending, rest);
        match self.functions.iter().position(|f| f.name == name) {
            Some(function) => {
                self.function = function;
                self.keys.clear();
                self.state = State::Arguments;
                self.space.clear();
                self.deltas.push(Delta::Call { name });
            }
            None => self.not_a_call(&before),
        }
        true
    }

    fn advance_arguments(&mut self, at_end: bool) -> bool {
        let trimmed = self.pending.trim_start();
        if let Some(rest) = trimmed.strip_prefix(END_CALL) {
            self.pending = rest.to_owned();
            self.end_call();
            return true;
        }
        if trimmed.starts_with(CALL) || trimmed.starts_with(END_THINK) {
            // The end tag is missing.
            self.end_call();
            return true;
        }
        let Some(after_key) = trimmed.strip_prefix(KEY) else {
            let next = [KEY, END_CALL, CALL].iter().filter_map(|tag| trimmed.find(tag)).min();
            if let Some(at) = next {
                // Words between arguments mean nothing.
                self.pending = trimmed[at..].to_owned();
                return true;
            }
            return false;
        };
        let (key_end, mut value_at) = match (after_key.find(END_KEY), after_key.find(VALUE)) {
            (Some(end), value) if value.is_none_or(|v| end < v) => (end, end + END_KEY.len()),
            (_, Some(value)) => (value, value),
            _ => return false,
        };
        let key = after_key[..key_end].trim().to_owned();
        let gap = &after_key[value_at..];
        let after_gap = gap.trim_start();
        if !at_end && is_beginning_of(after_gap, VALUE) && after_gap.len() < VALUE.len() {
            return false;
        }
        if after_gap.starts_with(VALUE) {
            value_at += gap.len() - after_gap.len() + VALUE.len();
        }
        let text = &after_key[value_at..];
        let Some((value_end, next)) = value_end(text, at_end) else { return false };
        let (value, rest) = (text[..value_end].to_owned(), text[next..].to_owned());
        self.pending = rest;
        if key.is_empty() || self.keys.contains(&key) {
            return true;
        }
        let schemas = of_argument(&self.functions[self.function].parameters, &key);
        let value = coerce(&value, schemas.as_deref().unwrap_or_default());
        let opening = if self.keys.is_empty() { "{" } else { ", " };
        self.deltas.push(Delta::Arguments(format!("{opening}{}: {value}", Value::String(key.clone()))));
        self.keys.push(key);
        true
    }

    fn end_call(&mut self) {
        self.deltas.push(Delta::Arguments(if self.keys.is_empty() { "{}".into() } else { "}".into() }));
        self.deltas.push(Delta::EndCall);
        self.n_calls += 1;
        self.state = self.after_call;
    }

    /// The whole of a JSON dialect's text: calls, or words.
    fn json_text(&mut self, whole: &str) {
        let text = whole.trim();
        let text = text.strip_prefix(PYTHON).unwrap_or(text).trim();
        let looks_like_calls = text.starts_with(['{', '[']) && !self.functions.is_empty();
        if !looks_like_calls || !self.json_calls(text) {
            self.text(whole);
        }
    }

    /// Passes on the calls that `text` consists of; false when it is anything else.
    fn json_calls(&mut self, text: &str) -> bool {
        let mut calls = vec![];
        // Several objects, separated by nothing, lines or semicolons.
        let mut rest = text;
        while !rest.is_empty() {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            match values.next() {
                Some(Ok(Value::Array(items))) => calls.extend(items),
                Some(Ok(value)) => calls.push(value),
                _ => return false,
            }
            rest = rest[values.byte_offset()..].trim_start_matches(|c: char| c.is_whitespace() || c == ';' || c == ',');
        }
        let calls: Option<Vec<(String, String)>> = calls.iter().map(|call| self.json_call(call)).collect();
        let Some(calls) = calls.filter(|calls| !calls.is_empty()) else { return false };
        self.space.clear();
        for (name, arguments) in calls {
            self.deltas.extend([Delta::Call { name }, Delta::Arguments(arguments), Delta::EndCall]);
            self.n_calls += 1;
        }
        true
    }

    /// Name and arguments of a declared function's call.
    fn json_call(&self, call: &Value) -> Option<(String, String)> {
        let call = call.get("function").filter(|f| f.is_object()).unwrap_or(call);
        let name = call.get("name")?.as_str()?;
        self.functions.iter().find(|f| f.name == name)?;
        let arguments = match call.get("parameters").or_else(|| call.get("arguments")) {
            None | Some(Value::Null) => Value::Object(Map::new()),
            // Some models write the arguments as a string of JSON.
            Some(Value::String(text)) => serde_json::from_str(text).ok()?,
            Some(value) => value.clone(),
        };
        arguments.is_object().then(|| (name.to_owned(), arguments.to_string()))
    }

    /// `<tool_call>` was text, and `text` after it is looked at again.
    fn not_a_call(&mut self, text: &str) {
        self.n_malformed += 1;
        self.state = self.after_call;
        self.text(CALL);
        self.pending.insert_str(0, text);
    }

    /// Passes text on; white space at its end waits, since it may only separate it from a call.
    fn text(&mut self, text: &str) {
        self.space.push_str(text);
        if self.state != State::Reasoning && !self.has_content {
            // Templates put lines between the reasoning and the answer.
            let n_lines = self.space.len() - self.space.trim_start_matches('\n').len();
            self.space.drain(..n_lines);
        }
        let n_text = self.space.trim_end().len();
        if n_text == 0 {
            return;
        }
        let rest = self.space.split_off(n_text);
        let text = std::mem::replace(&mut self.space, rest);
        if self.state == State::Reasoning {
            self.deltas.push(Delta::Reasoning(text));
        } else {
            self.has_content = true;
            self.deltas.push(Delta::Content(text));
        }
    }
}

/// Where the value at the front of `text` ends, and where what follows its end tag begins. `None` when more text is
/// needed to tell.
fn value_end(text: &str, at_end: bool) -> Option<(usize, usize)> {
    for (at, _) in text.match_indices(END_VALUE) {
        let next = at + END_VALUE.len();
        let after = text[next..].trim_start();
        if [KEY, END_CALL, CALL, END_THINK].iter().any(|tag| after.starts_with(tag)) {
            // Before it another call may have begun, if this one's end tag of the value is missing.
            let other = text[..at].match_indices(END_CALL).map(|(end, _)| end);
            let cut = other.into_iter().find(|end| text[end + END_CALL.len()..at].trim_start().starts_with(CALL));
            return Some(cut.map_or((at, next), |end| (end, end)));
        }
        if [KEY, END_CALL, CALL, END_THINK].iter().any(|tag| is_beginning_of(after, tag)) {
            return at_end.then_some((at, next));
        }
    }
    if !at_end {
        return None;
    }
    if let Some(at) = text.rfind(END_VALUE) {
        return Some((at, at + END_VALUE.len()));
    }
    let end = text.trim_end();
    Some(match end.strip_suffix(END_CALL) {
        Some(value) => (value.len(), value.len()),
        None => (text.len(), text.len()),
    })
}

/// An argument as JSON text: what the schemas say it is, else what it looks like, else a string. JSON is passed on as it was
/// written, so that no digit is lost.
fn coerce(text: &str, schemas: &[Map<String, Value>]) -> String {
    let as_text = || Value::from(text).to_string();
    let types: Vec<&str> = schemas.iter().flat_map(types).collect();
    let is_any = schemas.is_empty() || schemas.iter().any(|schema| crate::schema::types(schema).is_empty());
    let allows = |kind: &str| is_any || types.contains(&kind);
    if !is_any && types.iter().all(|kind| *kind == "string") {
        return as_text();
    }
    // A text that the schema names is that text, whatever it looks like.
    let is_named = schemas.iter().any(|schema| {
        let values = schema.get("enum").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        values.iter().chain(schema.get("const")).any(|value| value.as_str() == Some(text))
    });
    if is_named {
        return as_text();
    }
    let trimmed = text.trim();
    let parsed = match trimmed {
        // As Python writes them.
        "True" if allows("boolean") => return "true".to_owned(),
        "False" if allows("boolean") => return "false".to_owned(),
        "None" if allows("null") => return "null".to_owned(),
        _ => serde_json::from_str::<Value>(trimmed).ok(),
    };
    match parsed {
        Some(Value::String(_)) if allows("string") => as_text(),
        Some(Value::Number(n)) => {
            let is_whole = !trimmed.contains(['.', 'e', 'E']);
            match n.as_f64() {
                _ if allows("number") || (is_whole && allows("integer")) => trimmed.to_owned(),
                Some(value) if allows("integer") && value.fract() == 0.0 && value.abs() < 9e15 => {
                    (value as i64).to_string()
                }
                _ if allows("integer") && !allows("string") => trimmed.to_owned(),
                _ => as_text(),
            }
        }
        Some(value) if allows(type_of(&value)) => trimmed.to_owned(),
        _ => as_text(),
    }
}

/// Whether `text` could become `tag`: nothing, or its first characters.
fn is_beginning_of(text: &str, tag: &str) -> bool {
    text.len() < tag.len() && tag.starts_with(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn functions() -> Vec<Function> {
        let function = |name: &str, properties: Value| Function {
            name: name.to_owned(),
            parameters: json!({"type": "object", "properties": properties}),
        };
        vec![
            function("get_weather", json!({"city": {"type": "string"}, "days": {"type": "integer"}})),
            function("write", json!({"path": {"type": "string"}, "text": {"type": "string"}})),
            function("now", json!({})),
            function(
                "set",
                json!({"on": {"type": "boolean"}, "level": {"type": "number"}, "tags": {"type": "array"},
                    "to": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "unit": {"enum": ["C", "F"]}}),
            ),
        ]
    }

    /// Reasoning, content and calls (name, arguments) of a whole answer.
    type Answer = (String, String, Vec<(String, String)>);

    fn collect(deltas: impl IntoIterator<Item = Delta>) -> Answer {
        let mut answer = Answer::default();
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => answer.0.push_str(&text),
                Delta::Content(text) => answer.1.push_str(&text),
                Delta::Call { name } => answer.2.push((name, String::new())),
                Delta::Arguments(json) => answer.2.last_mut().expect("a call has begun").1.push_str(&json),
                Delta::EndCall => {
                    serde_json::from_str::<Value>(&answer.2.last().unwrap().1).expect("arguments are JSON");
                }
            }
        }
        answer
    }

    fn parse(dialect: Dialect, in_reasoning: bool, pieces: &[&str]) -> Answer {
        let mut parser = Parser::new(dialect, functions(), in_reasoning);
        let mut deltas: Vec<Delta> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
        deltas.extend(parser.finish(false));
        collect(deltas)
    }

    fn check(dialect: Dialect, text: &str, reasoning: &str, content: &str, calls: &[(&str, Value)]) {
        let in_reasoning = text.contains(END_THINK) && !text.contains(THINK);
        let (found_reasoning, found_content, found_calls) = parse(dialect, in_reasoning, &[text]);
        assert_eq!((&*found_reasoning, &*found_content), (reasoning, content), "{text}");
        let found: Vec<(&str, Value)> =
            found_calls.iter().map(|(n, a)| (n.as_str(), serde_json::from_str(a).expect("JSON"))).collect();
        assert_eq!(found, calls, "{text}");
        // The same character by character.
        let pieces: Vec<String> = text.chars().map(String::from).collect();
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        assert_eq!(parse(dialect, in_reasoning, &pieces), (found_reasoning, found_content, found_calls), "{text}");
    }

    #[test]
    fn glm_answers() {
        let check = |text: &str, reasoning: &str, content: &str, calls: &[(&str, Value)]| {
            check(Dialect::Glm, text, reasoning, content, calls);
        };
        let paris = || ("get_weather", json!({"city": "Paris"}));
        check("Hello.", "", "Hello.", &[]);
        check("47 + 38</think>\n85", "47 + 38", "85", &[]);
        check("<think>a</think>b", "a", "b", &[]);
        check("</think>b", "", "b", &[]);
        check("a < b <b>c</b>\n", "", "a < b <b>c</b>\n", &[]);
        let call = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>";
        check(call, "", "", &[paris()]);
        check(&format!("Let me look.\n{call}"), "", "Let me look.", &[paris()]);
        check(&format!("why</think>{call}{call}"), "why", "", &[paris(), paris()]);
        let lines = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n\
                     <arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>";
        check(lines, "", "", &[("get_weather", json!({"city": "Paris", "days": 3}))]);
        check("<tool_call>now</tool_call>", "", "", &[("now", json!({}))]);
    }

    #[test]
    fn a_tag_that_the_prompt_has_written_is_no_reasoning() {
        for text in ["<think>a</think>b", "\n<think>a</think>b", "a</think>b"] {
            for dialect in [Dialect::Glm, Dialect::Json] {
                for cut in 0..text.len() {
                    let found = parse(dialect, true, &[&text[..cut], &text[cut..]]);
                    assert_eq!((found.0.trim(), found.1.as_str()), ("a", "b"), "{text:?} cut at {cut}");
                }
            }
        }
    }

    #[test]
    fn types_follow_the_schema() {
        let check = |key: &str, value: &str, expected: Value| {
            let text = format!("<tool_call>set<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>");
            check(Dialect::Glm, &text, "", "", &[("set", json!({key: expected}))]);
        };
        check("on", "true", json!(true));
        check("on", "False", json!(false));
        check("on", "maybe", json!("maybe"));
        check("level", "3", json!(3));
        check("level", "0.5", json!(0.5));
        check("tags", "[1, \"a\"]", json!([1, "a"]));
        check("to", "null", json!(null));
        check("to", "12", json!("12"));
        check("unit", "C", json!("C"));
        check("unknown", "{\"a\": 1}", json!({"a": 1}));
        check("unknown", "plain words", json!("plain words"));
        let days = "<tool_call>get_weather<arg_key>days</arg_key><arg_value>2.0</arg_value><arg_key>city</arg_key>\
                    <arg_value>12</arg_value></tool_call>";
        super::tests::check(Dialect::Glm, days, "", "", &[("get_weather", json!({"days": 2, "city": "12"}))]);
    }

    /// Each line is something a model has written, or might.
    #[test]
    fn malformed_glm_calls() {
        let check = |text: &str, reasoning: &str, content: &str, calls: &[(&str, Value)]| {
            check(Dialect::Glm, text, reasoning, content, calls);
        };
        let paris = || ("get_weather", json!({"city": "Paris"}));
        let city = "<arg_key>city</arg_key><arg_value>Paris</arg_value>";
        // Inside the reasoning, which goes on after it.
        check(&format!("hm <tool_call>get_weather{city}</tool_call> ok</think>x"), "hm ok", "x", &[paris()]);
        check(&format!("hm <tool_call>get_weather{city}</think>x"), "hm", "x", &[paris()]);
        // Undeclared, empty, or no call at all.
        check("<tool_call>fly</tool_call>", "", "<tool_call>fly</tool_call>", &[]);
        check("<tool_call></tool_call>", "", "<tool_call></tool_call>", &[]);
        check("the tag <tool_call> means a call", "", "the tag <tool_call> means a call", &[]);
        check("a <tool_call>", "", "a <tool_call>", &[]);
        check("a </tool_call> b", "", "a </tool_call> b", &[]);
        check(
            &format!("<tool_call>fly{city}</tool_call><tool_call>now</tool_call>"),
            "",
            &format!("<tool_call>fly{city}</tool_call>"),
            &[("now", json!({}))],
        );
        // Missing tags.
        check(&format!("<tool_call>get_weather{city}"), "", "", &[paris()]);
        check("<tool_call>now", "", "", &[("now", json!({}))]);
        check("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris", "", "", &[paris()]);
        check("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</tool_call>", "", "", &[paris()]);
        check("<tool_call>get_weather<arg_key>city</arg_key>Paris</arg_value></tool_call>", "", "", &[paris()]);
        check("<tool_call>get_weather<arg_key>city<arg_value>Paris</arg_value></tool_call>", "", "", &[paris()]);
        check(
            &format!("<tool_call>get_weather{city}<tool_call>now</tool_call>"),
            "",
            "",
            &[paris(), ("now", json!({}))],
        );
        let swallowed = format!(
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</tool_call>\n<tool_call>get_weather{city}</tool_call>"
        );
        check(&swallowed, "", "", &[paris(), paris()]);
        // Repeated keys, words between arguments.
        check(&format!("<tool_call>get_weather{city}{city}</tool_call>"), "", "", &[paris()]);
        check(
            &format!("<tool_call>get_weather and {city} then</tool_call>"),
            "",
            &format!("<tool_call>get_weather and {city} then</tool_call>"),
            &[],
        );
        check(&format!("<tool_call>get_weather{city} then </tool_call>"), "", "", &[paris()]);
        // Tags inside values.
        let text = "a</arg_value>b</tool_call>c<tool_call>d<arg_key>e</think>";
        check(
            &format!("</think><tool_call>write<arg_key>text</arg_key><arg_value>{text}</arg_value></tool_call>."),
            "",
            ".",
            &[("write", json!({"text": text}))],
        );
        // The other dialect.
        check("<tool_call>{\"name\": \"now\"}</tool_call>", "", "", &[("now", json!({}))]);
    }

    #[test]
    fn json_calls() {
        let check = |text: &str, content: &str, calls: &[(&str, Value)]| {
            check(Dialect::Json, text, "", content, calls);
        };
        let paris = || ("get_weather", json!({"city": "Paris"}));
        let call = r#"{"name": "get_weather", "parameters": {"city": "Paris"}}"#;
        check(call, "", &[paris()]);
        check(&format!("<|python_tag|>{call}; {call}"), "", &[paris(), paris()]);
        check(&format!("[{call}, {call}]"), "", &[paris(), paris()]);
        check(&format!("<tool_call>[{call}]</tool_call>"), "", &[paris()]);
        check(&format!("Sure.\n<tool_call>\n{call}\n</tool_call>"), "Sure.", &[paris()]);
        check(&format!("<tool_call>{call}"), "", &[paris()]);
        check(r#"{"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}"#, "", &[paris()]);
        check(r#"{"type": "function", "function": {"name": "now", "arguments": {}}}"#, "", &[("now", json!({}))]);
        let tag = r#"<tool_call>{"name": "write", "arguments": {"text": "</tool_call>"}}</tool_call>"#;
        check(tag, "", &[("write", json!({"text": "</tool_call>"}))]);
        // Not calls.
        for text in [
            r#"{"name": "fly", "parameters": {}}"#,
            r#"{"name": "get_weather", "parameters": {"city": "Paris""#,
            r#"{"name": "get_weather", "parameters": [1]}"#,
            r#"{"city": "Paris"}"#,
            "[]",
            "{not json}",
            "Use {\"name\": \"now\"} to call.",
            "<tool_call>{\"name\": \"fly\"}</tool_call>",
        ] {
            check(text, text, &[]);
        }
    }

    #[test]
    fn a_cut_off_call_keeps_its_open_end_and_a_half_name_is_text() {
        let cut = |text: &str| {
            let mut parser = Parser::new(Dialect::Glm, functions(), false);
            let mut deltas = parser.push(text);
            deltas.extend(parser.finish(true));
            collect(deltas)
        };
        let (_, content, calls) = cut(
            "<tool_call>get_weather<arg_key>days</arg_key><arg_value>1</arg_value><arg_key>city</arg_key><arg_value>Pa",
        );
        assert_eq!((content.as_str(), calls), ("", vec![("get_weather".to_owned(), r#"{"days": 1"#.to_owned())]));
        assert_eq!(cut("<tool_call>get_w").1, "<tool_call>get_w");
    }

    #[test]
    fn without_functions_everything_is_text() {
        let mut parser = Parser::new(Dialect::Glm, vec![], false);
        let text = "<tool_call>now</tool_call>";
        let mut deltas = parser.push(text);
        deltas.extend(parser.finish(false));
        assert_eq!(collect(deltas).1, text);
    }

    #[test]
    fn arguments_come_one_by_one() {
        let mut parser = Parser::new(Dialect::Glm, functions(), false);
        let first = parser.push("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>");
        let name = "get_weather".to_owned();
        assert_eq!(first, [Delta::Call { name }, Delta::Arguments(r#"{"city": "Paris""#.into())]);
        let rest = parser.push("days</arg_key><arg_value>2</arg_value></tool_call>");
        assert_eq!(rest, [Delta::Arguments(r#", "days": 2"#.into()), Delta::Arguments("}".into()), Delta::EndCall]);
    }

    proptest! {
        /// Any order of tags and words, cut anywhere: no panic, the same result, and arguments that are JSON.
        #[test]
        fn cuts_do_not_matter(
            parts in prop::collection::vec(0usize..16, 0..14), cuts in prop::collection::vec(0usize..200, 0..6),
            glm: bool, in_reasoning: bool,
        ) {
            let words = [THINK, END_THINK, CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE, "get_weather", "city", " \n",
                "{\"name\": \"now\"}", "now", "<", "é", "words"];
            let text: String = parts.iter().map(|part| words[*part]).collect();
            let dialect = if glm { Dialect::Glm } else { Dialect::Json };
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).filter(|c| text.is_char_boundary(*c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(parse(dialect, in_reasoning, &pieces), parse(dialect, in_reasoning, &[&text]));
        }
    }
}
