//! Llama 3, in all forms that its templates and documents teach:
//!
//! - `{"name": "f", "parameters": {..}}`, alone or after `<|python_tag|>`, several with semicolons between
//! - `<function=f>{..}</function>`
//! - `<|python_tag|>f.call(city="Paris")`, the form of its built-in tools
//! - `[f(city="Paris"), g()]`, which the smallest models write

use super::json;
use super::parser::{CallReader, Calls, End, Step};

pub(super) const PYTHON: &str = "<|python_tag|>";
const FUNCTION: &str = "<function=";
const END_FUNCTION: &str = "</function>";
pub(super) const TOKENS: [&str; 1] = [PYTHON];

/// Bytes of a function's name at most.
const LONGEST_NAME: usize = 256;
/// Lists and dicts inside each other.
const MAX_DEPTH: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Reader {
    after_python: bool,
    /// Bytes of the text in which the call does not end.
    n_tried: usize,
}

impl CallReader for Reader {
    fn openings(&self) -> &'static [&'static str] {
        &[PYTHON, FUNCTION]
    }

    fn open(&mut self, opening: &'static str) {
        *self = Reader { after_python: opening == PYTHON, n_tried: 0 };
    }

    fn advance(&mut self, pending: &mut String, calls: &mut Calls, _at_end: bool) -> Step {
        if self.after_python {
            // Only the end of the text ends it.
            return Step::Wait;
        }
        let Some((name, after)) = pending.split_once('>') else {
            let is_name = pending.len() <= LONGEST_NAME && !pending.contains(['<', '\n']);
            return if is_name { Step::Wait } else { Step::Text(std::mem::take(pending)) };
        };
        if !calls.is_declared(name) {
            return Step::Text(std::mem::take(pending));
        }
        let at = pending.len() - after.len();
        let Some((end, next)) = json::until(after, &[END_FUNCTION], &mut self.n_tried) else { return Step::Wait };
        let Some(arguments) = json::object(&after[..end]) else { return Step::Text(std::mem::take(pending)) };
        calls.whole(name, arguments.to_owned());
        *pending = pending.split_off(at + next);
        Step::Over
    }

    fn finish(&mut self, rest: &str, calls: &mut Calls, cut_off: bool) -> End {
        if cut_off {
            return End::Text(rest.to_owned());
        }
        let is_call = match (self.after_python, rest.split_once('>')) {
            (true, _) => json::pass_on(rest, calls) || python(rest, calls),
            (false, Some((name, arguments))) => {
                let arguments = json::object(arguments).filter(|_| calls.is_declared(name));
                arguments.inspect(|arguments| calls.whole(name, (*arguments).to_owned())).is_some()
            }
            (false, None) => false,
        };
        if is_call { End::Complete } else { End::Text(rest.to_owned()) }
    }

    fn may_be_whole(&self, start: &str) -> bool {
        start.starts_with(['{', '['])
    }

    fn whole(&self, text: &str, calls: &mut Calls) -> bool {
        json::pass_on(text, calls) || python(text, calls)
    }
}

/// Passes on calls as Python writes them; false when the text is anything else.
fn python(text: &str, calls: &mut Calls) -> bool {
    let mut source = Python { rest: text.trim(), depth: 0 };
    let found = match source.rest.starts_with('[') {
        true => source.list_of_calls(),
        false => source.call().map(|call| vec![call]),
    };
    let Some(found) = found.filter(|found| source.rest.trim().is_empty() && !found.is_empty()) else { return false };
    if !found.iter().all(|(name, _)| calls.is_declared(name)) {
        return false;
    }
    for (name, arguments) in found {
        calls.whole(&name, arguments);
    }
    true
}

/// Reads literals of Python as JSON text.
struct Python<'a> {
    rest: &'a str,
    depth: usize,
}

impl Python<'_> {
    fn take(&mut self, token: &str) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn is_next(&self, token: &str) -> bool {
        self.rest.trim_start().starts_with(token)
    }

    /// Elements up to `end`, with commas between.
    fn elements<T>(&mut self, end: &str, element: fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut all = vec![];
        while !self.is_next(end) {
            all.push(element(self)?);
            if !self.is_next(end) {
                self.take(",")?;
            }
        }
        self.take(end)?;
        Some(all)
    }

    fn list_of_calls(&mut self) -> Option<Vec<(String, String)>> {
        self.take("[")?;
        self.elements("]", Self::call)
    }

    /// `f(a=1)` or `f.call(a=1)`: name and arguments.
    fn call(&mut self) -> Option<(String, String)> {
        let name = self.name(|c| c.is_alphanumeric() || "_.-".contains(c))?;
        let name = name.strip_suffix(".call").unwrap_or(&name).to_owned();
        self.take("(")?;
        let arguments = self.elements(")", |source| {
            let key = source.name(|c| c.is_alphanumeric() || c == '_')?;
            source.take("=")?;
            Some(format!("{}: {}", serde_json::Value::from(key), source.value()?))
        })?;
        Some((name, format!("{{{}}}", arguments.join(", "))))
    }

    fn name(&mut self, is_part: impl Fn(char) -> bool) -> Option<String> {
        self.rest = self.rest.trim_start();
        let end = self.rest.find(|c| !is_part(c)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!name.is_empty()).then(|| name.to_owned())
    }

    fn value(&mut self) -> Option<String> {
        self.rest = self.rest.trim_start();
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let value = match self.rest.chars().next()? {
            '"' | '\'' => self.string().map(|text| serde_json::Value::from(text).to_string()),
            '[' => {
                self.take("[")?;
                Some(format!("[{}]", self.elements("]", Self::value)?.join(", ")))
            }
            '{' => {
                self.take("{")?;
                let members = self.elements("}", |source| {
                    source.rest = source.rest.trim_start();
                    let key = source.string()?;
                    source.take(":")?;
                    Some(format!("{}: {}", serde_json::Value::from(key), source.value()?))
                })?;
                Some(format!("{{{}}}", members.join(", ")))
            }
            _ => {
                let word = self.name(|c| c.is_alphanumeric() || "_.+-".contains(c))?;
                match word.as_str() {
                    "True" | "true" => Some("true".to_owned()),
                    "False" | "false" => Some("false".to_owned()),
                    "None" | "null" => Some("null".to_owned()),
                    _ => serde_json::from_str::<serde_json::Number>(&word).ok().map(|_| word),
                }
            }
        };
        self.depth -= 1;
        value
    }

    /// A string in quotes, with Python's escapes.
    fn string(&mut self) -> Option<String> {
        let quote = self.rest.chars().next().filter(|c| "\"'".contains(*c))?;
        let mut text = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                _ if c == quote => {
                    self.rest = &self.rest[at + 1..];
                    return Some(text);
                }
                '\\' => match chars.next()?.1 {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    '\n' => {}
                    'u' => {
                        let digits: String = chars.by_ref().take(4).map(|(_, c)| c).collect();
                        text.push(char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?);
                    }
                    c @ ('\\' | '\'' | '"') => text.push(c),
                    // As Python, which leaves what it does not know.
                    c => text.extend(['\\', c]),
                },
                c => text.push(c),
            }
        }
        None
    }
}
