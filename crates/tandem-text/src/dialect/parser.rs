//! An answer taken apart while it is written: what all dialects share.

use std::fmt;

use serde_json::{Map, Value};

use super::{Delta, Dialect, END_THINK, Function, THINK, is_beginning_of};
use crate::schema::of_argument;
use crate::stop::held_back;

/// Reads the calls of one dialect: what follows an opening tag, up to where text goes on.
pub(super) trait CallReader: fmt::Debug + Send {
    /// Tags with which a call begins, or a list of calls.
    fn openings(&self) -> &'static [&'static str];

    /// Begins to read what follows an opening tag.
    fn open(&mut self, opening: &'static str);

    /// Handles what is certain at the front of `pending`; with `at_end` nothing follows it.
    fn advance(&mut self, pending: &mut String, calls: &mut Calls, at_end: bool) -> Step;

    /// Ends the text in the middle of what an opening tag began. `cut_off`: the model did not end its turn.
    fn finish(&mut self, rest: &str, calls: &mut Calls, cut_off: bool) -> End;

    /// Whether an answer that begins like this may be calls as a whole, without an opening tag, which only its end tells.
    fn may_be_whole(&self, _start: &str) -> bool {
        false
    }

    /// Passes on the calls that such an answer consists of; false when it is anything else.
    fn whole(&self, _text: &str, _calls: &mut Calls) -> bool {
        false
    }
}

/// What became of the front of the text.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// More text is needed.
    Wait,
    /// Some of it is handled.
    Again,
    /// The calls are over: text follows.
    Over,
    /// There is no call: the opening tag is text, and so is this, as far as nothing else is found in it.
    Text(String),
}

/// What became of calls in whose middle the text ends.
#[derive(Debug, PartialEq)]
pub(super) enum End {
    /// They are complete.
    Complete,
    /// The last one has no end.
    Open,
    /// There is no call, as with [`Step::Text`].
    Text(String),
}

/// What has been found, and the functions that may be called.
#[derive(Debug)]
pub(super) struct Calls {
    functions: Vec<Function>,
    /// Index of the function whose call is being read.
    function: usize,
    /// Its arguments so far.
    keys: Vec<String>,
    n_calls: usize,
    /// White space that is only passed on if text follows, or the end.
    space: String,
    has_content: bool,
    deltas: Vec<Delta>,
}

impl Calls {
    pub(super) fn is_declared(&self, name: &str) -> bool {
        self.functions.iter().any(|function| function.name == name)
    }

    /// Begins a call; false when there is no such function.
    pub(super) fn begin(&mut self, name: &str) -> bool {
        let Some(function) = self.functions.iter().position(|function| function.name == name) else { return false };
        self.function = function;
        self.keys.clear();
        self.space.clear();
        self.deltas.push(Delta::Call { name: name.to_owned() });
        true
    }

    /// What the schema says about an argument of the call that is being read; nothing if it does not know it.
    pub(super) fn schemas(&self, key: &str) -> Vec<Map<String, Value>> {
        of_argument(&self.functions[self.function].parameters, key).unwrap_or_default()
    }

    /// Adds an argument, JSON text; of several with one name the first counts.
    pub(super) fn argument(&mut self, key: String, value: &str) {
        if key.is_empty() || self.keys.contains(&key) {
            return;
        }
        let opening = if self.keys.is_empty() { "{" } else { ", " };
        self.arguments(format!("{opening}{}: {value}", Value::String(key.clone())));
        self.keys.push(key);
    }

    /// Adds a part of the arguments' JSON text as it stands.
    pub(super) fn arguments(&mut self, json: String) {
        self.deltas.push(Delta::Arguments(json));
    }

    /// Whether the call that is being read has arguments.
    pub(super) fn has_arguments(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Ends a call whose arguments came one by one.
    pub(super) fn end(&mut self) {
        self.arguments(if self.keys.is_empty() { "{}".into() } else { "}".into() });
        self.end_whole();
    }

    fn end_whole(&mut self) {
        self.deltas.push(Delta::EndCall);
        self.n_calls += 1;
    }

    /// Adds a whole call of a declared function.
    pub(super) fn whole(&mut self, name: &str, arguments: String) {
        if self.begin(name) {
            self.arguments(arguments);
            self.end_whole();
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before anything was said.
    Start,
    Reasoning,
    Content,
    /// After this tag.
    Call(&'static str),
}

/// Takes a model's text piece by piece. Arguments are passed on one by one as soon as they are complete, as pieces of one
/// JSON object, where the dialect writes them one by one.
#[derive(Debug)]
pub struct Parser {
    dialect: Dialect,
    reader: Box<dyn CallReader>,
    calls: Calls,
    state: State,
    /// The prompt has opened the reasoning, of which nothing was written yet.
    is_opened: bool,
    /// Where to go on after calls.
    after_call: State,
    /// Complete calls before the last opening tag.
    n_before: usize,
    pending: String,
    n_malformed: usize,
}

impl Parser {
    /// A parser for an answer that begins inside the reasoning section or after it.
    pub fn new(dialect: Dialect, functions: Vec<Function>, in_reasoning: bool) -> Parser {
        let state = if in_reasoning { State::Reasoning } else { State::Start };
        Parser {
            dialect,
            reader: (dialect.entry().reader)(),
            calls: Calls {
                functions,
                function: 0,
                keys: vec![],
                n_calls: 0,
                space: String::new(),
                has_content: false,
                deltas: vec![],
            },
            state,
            is_opened: in_reasoning,
            after_call: state,
            n_before: 0,
            pending: String::new(),
            n_malformed: 0,
        }
    }

    /// Added tokens that belong to the text that the parser takes.
    pub(crate) fn keeps(&self, token: &str) -> bool {
        token == THINK || token == END_THINK || self.dialect.entry().tokens.contains(&token)
    }

    /// Whether the text is reasoning now.
    pub fn in_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    /// Complete calls so far.
    pub fn n_calls(&self) -> usize {
        self.calls.n_calls
    }

    /// What looked like calls and was passed on as text.
    pub fn n_malformed(&self) -> usize {
        self.n_malformed
    }

    /// Whether a call has begun that is not complete.
    pub fn in_call(&self) -> bool {
        matches!(self.state, State::Call(_)) && self.calls.n_calls == self.n_before
    }

    /// Takes more text.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        self.pending.push_str(text);
        while self.advance(false) {}
        std::mem::take(&mut self.calls.deltas)
    }

    /// Ends the text. If it was cut off, a call that is not complete keeps its open end; else it is closed.
    pub fn finish(&mut self, cut_off: bool) -> Vec<Delta> {
        while self.advance(!cut_off) {}
        while let State::Call(opening) = self.state {
            let rest = std::mem::take(&mut self.pending);
            match self.reader.finish(&rest, &mut self.calls, cut_off) {
                End::Complete => self.state = self.after_call,
                End::Open => return std::mem::take(&mut self.calls.deltas),
                End::Text(text) => self.no_call(opening, &text),
            }
            while self.advance(!cut_off) {}
        }
        let rest = std::mem::take(&mut self.pending);
        if self.state == State::Reasoning || !self.may_be_whole(&rest) || !self.reader.whole(&rest, &mut self.calls) {
            self.text(&rest);
        }
        if self.calls.has_content && self.state == State::Content && !self.calls.space.is_empty() {
            let space = std::mem::take(&mut self.calls.space);
            self.calls.deltas.push(Delta::Content(space));
        }
        std::mem::take(&mut self.calls.deltas)
    }

    /// Handles what is certain at the front of `pending`; false when more text is needed.
    fn advance(&mut self, at_end: bool) -> bool {
        let State::Call(opening) = self.state else { return self.advance_text(at_end) };
        match self.reader.advance(&mut self.pending, &mut self.calls, at_end) {
            Step::Wait => return false,
            Step::Again => {}
            Step::Over => self.state = self.after_call,
            Step::Text(text) => self.no_call(opening, &text),
        }
        true
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
        let in_reasoning = self.in_reasoning();
        if !in_reasoning && self.may_be_whole(&self.pending) {
            return false;
        }
        // In the text it ends a section that nothing opened: the tag means nothing to a reader.
        let openings = if self.calls.functions.is_empty() { &[] } else { self.reader.openings() };
        let tags = || openings.iter().copied().chain([END_THINK]);
        // Of two tags that begin at one place the longer one is meant.
        let found = tags().filter_map(|tag| Some((self.pending.find(tag)?, tag)));
        if let Some((at, tag)) = found.min_by_key(|(at, tag)| (*at, std::cmp::Reverse(tag.len()))) {
            let rest = self.pending.split_off(at + tag.len());
            let before = std::mem::replace(&mut self.pending, rest);
            self.text(&before[..at]);
            if tag == END_THINK {
                self.state = State::Content;
                if in_reasoning {
                    self.calls.space.clear();
                }
            } else {
                self.after_call = self.state;
                self.n_before = self.calls.n_calls;
                self.state = State::Call(tag);
                self.reader.open(tag);
            }
            return true;
        }
        let held = if at_end { 0 } else { tags().map(|tag| held_back(&self.pending, tag)).max().unwrap_or(0) };
        let rest = self.pending.split_off(self.pending.len() - held);
        let text = std::mem::replace(&mut self.pending, rest);
        self.text(&text);
        false
    }

    /// Whether the answer may be calls as a whole.
    fn may_be_whole(&self, text: &str) -> bool {
        !self.calls.functions.is_empty() && !self.calls.has_content && self.reader.may_be_whole(text.trim_start())
    }

    /// The opening tag was text, and `text` after it is looked at again.
    fn no_call(&mut self, opening: &str, text: &str) {
        // What opens a call of a list is counted with that call.
        let is_list = self.reader.openings().iter().any(|tag| text.trim_start().starts_with(tag));
        self.n_malformed += usize::from(!is_list);
        self.state = self.after_call;
        self.text(opening);
        self.pending.insert_str(0, text);
    }

    /// Passes text on; white space at its end waits, since it may only separate it from a call.
    fn text(&mut self, text: &str) {
        let in_reasoning = self.in_reasoning();
        let Calls { space, has_content, deltas, .. } = &mut self.calls;
        space.push_str(text);
        if !in_reasoning && !*has_content {
            // Templates put lines between the reasoning and the answer.
            let n_lines = space.len() - space.trim_start_matches('\n').len();
            space.drain(..n_lines);
        }
        let n_text = space.trim_end().len();
        if n_text == 0 {
            return;
        }
        let rest = space.split_off(n_text);
        let text = std::mem::replace(space, rest);
        if in_reasoning {
            deltas.push(Delta::Reasoning(text));
        } else {
            *has_content = true;
            deltas.push(Delta::Content(text));
        }
    }
}
