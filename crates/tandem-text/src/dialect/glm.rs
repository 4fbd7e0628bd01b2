//! GLM: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>..</tool_call>`.

use super::argument::coerce;
use super::parser::{CallReader, Calls, End, Step};
use super::{END_THINK, hermes, is_beginning_of};
use crate::stop::held_back;

pub(super) const CALL: &str = "<tool_call>";
pub(super) const END_CALL: &str = "</tool_call>";
pub(super) const KEY: &str = "<arg_key>";
const END_KEY: &str = "</arg_key>";
const VALUE: &str = "<arg_value>";
const END_VALUE: &str = "</arg_value>";
pub(super) const TOKENS: [&str; 6] = [CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE];

/// Bytes of a function's name at most.
const LONGEST_NAME: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Reader {
    /// The name is complete: arguments follow.
    has_name: bool,
    /// A call as other models write it.
    json: hermes::Reader,
}

impl CallReader for Reader {
    fn openings(&self) -> &'static [&'static str] {
        &[CALL]
    }

    fn open(&mut self, opening: &'static str) {
        self.has_name = false;
        self.json.open(opening);
    }

    fn advance(&mut self, pending: &mut String, calls: &mut Calls, at_end: bool) -> Step {
        if self.has_name {
            advance_arguments(pending, calls, at_end)
        } else if pending.trim_start().starts_with(['{', '[']) {
            self.json.advance(pending, calls, at_end)
        } else {
            self.advance_name(pending, calls, at_end)
        }
    }

    fn finish(&mut self, rest: &str, calls: &mut Calls, cut_off: bool) -> End {
        if !self.has_name {
            return self.json.finish(rest, calls, cut_off);
        }
        if cut_off {
            return End::Open;
        }
        calls.end();
        End::Complete
    }
}

impl Reader {
    fn advance_name(&mut self, pending: &mut String, calls: &mut Calls, at_end: bool) -> Step {
        let tags = [KEY, END_CALL, CALL, END_THINK];
        let at = match tags.iter().filter_map(|tag| pending.find(tag)).min() {
            Some(at) => at,
            // The end tag is missing.
            None if at_end && calls.is_declared(pending.trim()) => pending.len(),
            None => {
                // A name is short, and of one word; a tag may have begun after it.
                let held = tags.iter().map(|tag| held_back(pending, tag)).max().unwrap_or(0);
                let name = pending[..pending.len() - held].trim();
                let is_no_name = at_end || name.len() > LONGEST_NAME || name.contains(char::is_whitespace);
                return if is_no_name { Step::Text(std::mem::take(pending)) } else { Step::Wait };
            }
        };
        let rest = pending.split_off(at);
        let before = std::mem::replace(pending, rest);
        if !calls.begin(before.trim()) {
            return Step::Text(before);
        }
        self.has_name = true;
        Step::Again
    }
}

fn advance_arguments(pending: &mut String, calls: &mut Calls, at_end: bool) -> Step {
    let trimmed = pending.trim_start();
    if let Some(rest) = trimmed.strip_prefix(END_CALL) {
        *pending = rest.to_owned();
        calls.end();
        return Step::Over;
    }
    if trimmed.starts_with(CALL) || trimmed.starts_with(END_THINK) {
        // The end tag is missing.
        calls.end();
        return Step::Over;
    }
    let Some(after_key) = trimmed.strip_prefix(KEY) else {
        let next = [KEY, END_CALL, CALL].iter().filter_map(|tag| trimmed.find(tag)).min();
        let Some(at) = next else { return Step::Wait };
        // Words between arguments mean nothing.
        *pending = trimmed[at..].to_owned();
        return Step::Again;
    };
    let (key_end, mut value_at) = match (after_key.find(END_KEY), after_key.find(VALUE)) {
        (Some(end), value) if value.is_none_or(|v| end < v) => (end, end + END_KEY.len()),
        (_, Some(value)) => (value, value),
        _ => return Step::Wait,
    };
    let key = after_key[..key_end].trim().to_owned();
    let gap = &after_key[value_at..];
    let after_gap = gap.trim_start();
    if !at_end && is_beginning_of(after_gap, VALUE) {
        return Step::Wait;
    }
    if after_gap.starts_with(VALUE) {
        value_at += gap.len() - after_gap.len() + VALUE.len();
    }
    let text = &after_key[value_at..];
    let Some((value_end, next)) = value_end(text, at_end) else { return Step::Wait };
    let (value, rest) = (coerce(&text[..value_end], &calls.schemas(&key)), text[next..].to_owned());
    *pending = rest;
    calls.argument(key, &value);
    Step::Again
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
