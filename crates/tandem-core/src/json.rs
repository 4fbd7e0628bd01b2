//! JSON as Python writes it.

use std::borrow::Cow;

/// Puts texts in the place of the numbers that Python's `json` writes and JSON does not have: `Infinity`, `-Infinity` and
/// `NaN`. A field that nobody reads does not matter then, and one that must be a number says what was found.
pub fn without_literals(text: &str) -> Cow<'_, str> {
    const LITERALS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !LITERALS.iter().any(|literal| text.contains(literal)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut in_string) = (text, false);
    while let Some(c) = rest.chars().next() {
        let literal = LITERALS.iter().find(|literal| !in_string && rest.starts_with(**literal));
        let n = match (literal, in_string, c) {
            (Some(literal), ..) => {
                out.push('"');
                out.push_str(literal);
                out.push('"');
                rest = &rest[literal.len()..];
                continue;
            }
            // An escaped character, a quote too.
            (None, true, '\\') => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, _, '"') => {
                in_string = !in_string;
                1
            }
            _ => c.len_utf8(),
        };
        out.push_str(&rest[..n]);
        rest = &rest[n..];
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_numbers_become_texts_outside_of_texts() {
        let check = |text: &str, expected: &str| assert_eq!(without_literals(text), expected);
        check(r#"{"a": [0.0, Infinity, -Infinity], "b": NaN}"#, r#"{"a": [0.0, "Infinity", "-Infinity"], "b": "NaN"}"#);
        check(r#"{"NaN": "Infinity \" NaN \\", "é": NaN}"#, r#"{"NaN": "Infinity \" NaN \\", "é": "NaN"}"#);
        check(r#"{"a": 1}"#, r#"{"a": 1}"#);
        check("NaN\"", "\"NaN\"\"");
    }
}
