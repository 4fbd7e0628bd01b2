//! DeepSeek-V3.1: `<｜tool▁calls▁begin｜>`, then for each call `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{..}<｜tool▁call▁end｜>`,
//! then `<｜tool▁calls▁end｜>`. V3 and R1 write `function` for the name, and after the separator the name and a block of JSON in
//! Markdown; both are read, whichever the checkpoint.

use super::is_beginning_of;
use super::json;
use super::parser::{CallReader, Calls, End, Step};

const LIST: &str = "<｜tool▁calls▁begin｜>";
const END_LIST: &str = "<｜tool▁calls▁end｜>";
const CALL: &str = "<｜tool▁call▁begin｜>";
const END_CALL: &str = "<｜tool▁call▁end｜>";
pub(super) const SEPARATOR: &str = "<｜tool▁sep｜>";
pub(super) const TOKENS: [&str; 5] = [LIST, END_LIST, CALL, END_CALL, SEPARATOR];

/// Before the separator, where the name stands behind it.
const KIND: &str = "function";
/// Between that name and the arguments.
const FENCE: &str = "```";

/// Bytes of a function's name at most.
const LONGEST_NAME: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Reader {
    in_call: bool,
    /// One call is complete.
    has_call: bool,
    /// What was read since the opening tag, as long as there is no call.
    before: String,
    /// Bytes of the text in which the call does not end.
    n_tried: usize,
}

impl CallReader for Reader {
    fn openings(&self) -> &'static [&'static str] {
        &[LIST, CALL]
    }

    fn open(&mut self, opening: &'static str) {
        *self = Reader { in_call: opening == CALL, ..Reader::default() };
    }

    fn advance(&mut self, pending: &mut String, calls: &mut Calls, at_end: bool) -> Step {
        if self.in_call { self.advance_call(pending, calls) } else { self.advance_list(pending, at_end) }
    }

    fn finish(&mut self, rest: &str, calls: &mut Calls, cut_off: bool) -> End {
        if self.has_call {
            return End::Complete;
        }
        match partial(rest).filter(|(name, _)| self.in_call && calls.is_declared(name)) {
            Some((name, arguments)) if cut_off => {
                calls.begin(name);
                calls.arguments(arguments.to_owned());
                End::Open
            }
            Some(_) if pass_on(rest, calls) => End::Complete,
            _ => End::Text(std::mem::take(&mut self.before) + rest),
        }
    }
}

impl Reader {
    /// Before the first call of a list, or after a call. Those that follow are opened by their own tags.
    fn advance_list(&mut self, pending: &mut String, at_end: bool) -> Step {
        let start = pending.trim_start();
        let next = if self.has_call { END_LIST } else { CALL };
        if let Some(rest) = start.strip_prefix(next) {
            let rest = rest.to_owned();
            if self.has_call {
                *pending = rest;
                return Step::Over;
            }
            self.before = pending[..pending.len() - rest.len()].to_owned();
            *pending = rest;
            self.in_call = true;
            return Step::Again;
        }
        match self.has_call {
            _ if !at_end && is_beginning_of(start, next) => Step::Wait,
            true => Step::Over,
            false => Step::Text(std::mem::take(pending)),
        }
    }

    fn advance_call(&mut self, pending: &mut String, calls: &mut Calls) -> Step {
        let Some((name, body_at)) = name_of(pending) else {
            // In the other form the name stands behind the separator.
            let is_no_name = !pending.contains(SEPARATOR) && pending.len() > LONGEST_NAME;
            return if is_no_name { self.text(pending) } else { Step::Wait };
        };
        if !calls.is_declared(name) {
            return self.text(pending);
        }
        let mut tried = self.n_tried.max(body_at);
        while let Some((at, tag)) = json::first(&pending[tried..], &[END_CALL, END_LIST, CALL]) {
            let at = at + tried;
            if pass_on(&pending[..at], calls) {
                // The end tag may be missing.
                let next = if tag == END_CALL { at + tag.len() } else { at };
                *pending = pending.split_off(next);
                (self.in_call, self.has_call) = (false, true);
                return Step::Again;
            }
            // It stands inside of a string.
            tried = at + tag.len();
            self.n_tried = tried;
        }
        Step::Wait
    }

    fn text(&mut self, pending: &mut String) -> Step {
        Step::Text(std::mem::take(&mut self.before) + &std::mem::take(pending))
    }
}

/// The name, and where its arguments begin, with what may stand in front of them.
fn name_of(text: &str) -> Option<(&str, usize)> {
    let (before, after) = text.split_once(SEPARATOR)?;
    let after_at = text.len() - after.len();
    if before.trim() != KIND || after.trim_start().starts_with('{') {
        return Some((before.trim(), after_at));
    }
    let (name, arguments) = after.split_once('\n')?;
    Some((name.trim(), text.len() - arguments.len()))
}

/// Name and arguments of what may be the beginning of a call.
fn partial(text: &str) -> Option<(&str, &str)> {
    let (name, at) = name_of(text)?;
    let arguments = text[at..].trim_start();
    let arguments = match arguments.strip_prefix(FENCE) {
        Some(block) => block.strip_prefix("json").unwrap_or(block).trim_start(),
        None => arguments,
    };
    let is_object = arguments.is_empty() || arguments.starts_with('{');
    is_object.then_some((name, arguments))
}

/// Passes a call on that is complete; false if it is none.
fn pass_on(text: &str, calls: &mut Calls) -> bool {
    let Some((name, arguments)) = partial(text) else { return false };
    let arguments = arguments.trim_end();
    let arguments = arguments.strip_suffix(FENCE).unwrap_or(arguments);
    let arguments = if arguments.is_empty() { Some("{}") } else { json::object(arguments) };
    let (Some(arguments), true) = (arguments, calls.is_declared(name)) else { return false };
    calls.whole(name, arguments.to_owned());
    true
}
