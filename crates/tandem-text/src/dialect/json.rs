//! Calls that are JSON, `{"name": .., "arguments": {..}}`, as they were written: no digit of a number is lost.

use serde::de::{DeserializeOwned, IgnoredAny};

use super::parser::Calls;

/// The value at the front of a text, and what follows it.
fn value(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
    values.next()?.ok()?;
    let (value, rest) = text.split_at(values.byte_offset());
    Some((value, rest.trim_start()))
}

fn parsed<T: DeserializeOwned>(value: &str) -> Option<T> {
    serde_json::from_str(value).ok()
}

/// What stands between two brackets, item by item; `item` takes one from the front of a text and returns what follows it.
fn items<'a, T>(
    text: &'a str,
    [opening, closing]: [char; 2],
    item: impl Fn(&'a str) -> Option<(T, &'a str)>,
) -> Option<Vec<T>> {
    let mut rest = text.trim_start().strip_prefix(opening)?.trim_start();
    let mut items = vec![];
    while !rest.starts_with(closing) {
        let (found, after) = item(rest)?;
        items.push(found);
        rest = after.strip_prefix(',').map_or(after, str::trim_start);
    }
    Some(items)
}

/// Names and values of an object.
pub(super) fn members(text: &str) -> Option<Vec<(String, &str)>> {
    items(text, ['{', '}'], |rest| {
        let (name, after) = value(rest)?;
        let (value, after) = value(after.strip_prefix(':')?)?;
        Some(((parsed(name)?, value), after))
    })
}

/// Elements of a list.
fn elements(text: &str) -> Option<Vec<&str>> {
    items(text, ['[', ']'], value)
}

/// An object's text, without what stands around it.
pub(super) fn object(text: &str) -> Option<&str> {
    let (value, rest) = value(text)?;
    (value.starts_with('{') && rest.is_empty()).then_some(value)
}

/// Name and arguments of each call that a text consists of: objects, lists of them, with nothing, lines, commas or
/// semicolons between; `None` when it is anything else, or a function is not declared.
fn read(text: &str, calls: &Calls) -> Option<Vec<(String, String)>> {
    let mut found = vec![];
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (value, after) = value(rest)?;
        match value.starts_with('[') {
            true => found.extend(elements(value)?),
            false => found.push(value),
        }
        rest = after.trim_start_matches(|c: char| c.is_whitespace() || c == ';' || c == ',');
    }
    found.into_iter().map(|call| read_call(call, calls)).collect::<Option<Vec<_>>>().filter(|found| !found.is_empty())
}

fn read_call(call: &str, calls: &Calls) -> Option<(String, String)> {
    let get = |members: &[(String, &str)], key: &str| Some(members.iter().find(|(name, _)| name == key)?.1.to_owned());
    let outer = members(call)?;
    let inner = get(&outer, "function").filter(|function| function.starts_with('{'));
    let call = match &inner {
        Some(function) => members(function)?,
        None => outer,
    };
    let name: String = parsed(&get(&call, "name")?)?;
    let arguments = get(&call, "parameters").or_else(|| get(&call, "arguments"));
    let arguments = match arguments.as_deref() {
        None | Some("null") => "{}".to_owned(),
        // Some models write the arguments as a string of JSON.
        Some(text) if text.starts_with('"') => object(&parsed::<String>(text)?)?.to_owned(),
        Some(value) => object(value)?.to_owned(),
    };
    calls.is_declared(&name).then_some((name, arguments))
}

/// Passes on the calls that a text consists of; false when it is anything else.
pub(super) fn pass_on(text: &str, calls: &mut Calls) -> bool {
    let Some(found) = read(text, calls) else { return false };
    for (name, arguments) in found {
        calls.whole(&name, arguments);
    }
    true
}

/// Where one JSON value ends that one of the tags follows, and where the text after the tag begins. A tag may stand inside a
/// string: the first one counts before which the value is complete. `n_tried`: bytes in which none does; each is tried once,
/// since a model may write any number of them.
pub(super) fn until(text: &str, tags: &[&str], n_tried: &mut usize) -> Option<(usize, usize)> {
    while let Some((at, tag)) = first(&text[*n_tried..], tags).map(|(at, tag)| (at + *n_tried, tag)) {
        *n_tried = at + 1;
        if value(&text[..at]).is_some_and(|(_, rest)| rest.is_empty()) {
            return Some((at, at + tag.len()));
        }
        while !text.is_char_boundary(*n_tried) {
            *n_tried += 1;
        }
    }
    None
}

/// The first of the tags in a text.
pub(super) fn first<'a>(text: &str, tags: &[&'a str]) -> Option<(usize, &'a str)> {
    tags.iter().filter_map(|tag| Some((text.find(tag)?, *tag))).min_by_key(|(at, _)| *at)
}
