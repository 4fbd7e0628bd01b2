//! Hermes, Qwen, SmolLM: `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, or the JSON alone.

use super::json;
use super::parser::{CallReader, Calls, End, Step};

pub(super) const CALL: &str = super::glm::CALL;
const END_CALL: &str = super::glm::END_CALL;
pub(super) const TOKENS: [&str; 2] = [CALL, END_CALL];

#[derive(Debug, Default)]
pub(super) struct Reader {
    /// Bytes of the text in which the call does not end.
    n_tried: usize,
}

impl CallReader for Reader {
    fn openings(&self) -> &'static [&'static str] {
        &[CALL]
    }

    fn open(&mut self, _opening: &'static str) {
        self.n_tried = 0;
    }

    fn advance(&mut self, pending: &mut String, calls: &mut Calls, _at_end: bool) -> Step {
        let start = pending.trim_start();
        if !start.is_empty() && !may_begin(start) {
            return Step::Text(std::mem::take(pending));
        }
        let Some((end, next)) = json::until(pending, &[END_CALL], &mut self.n_tried) else { return Step::Wait };
        let rest = pending.split_off(next);
        let whole = std::mem::replace(pending, rest);
        if json::pass_on(&whole[..end], calls) { Step::Over } else { Step::Text(whole) }
    }

    fn finish(&mut self, rest: &str, calls: &mut Calls, cut_off: bool) -> End {
        if !cut_off && json::pass_on(rest, calls) { End::Complete } else { End::Text(rest.to_owned()) }
    }

    fn may_be_whole(&self, start: &str) -> bool {
        may_begin(start)
    }

    fn whole(&self, text: &str, calls: &mut Calls) -> bool {
        json::pass_on(text, calls)
    }
}

fn may_begin(start: &str) -> bool {
    start.starts_with(['{', '['])
}
