//! JSON whose whole numbers keep their digits, however many there are.
//!
//! `serde_json` makes a float of a whole number beyond 64 bits, and an identifier of 20 digits would reach a tool as another
//! one. Here such a number is a text that begins with a mark, which no text from outside has; [`write()`] and chat templates
//! make the number of it.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::LazyLock;

use serde_json::Value;

/// Nobody outside this process can write it.
static MARK: LazyLock<String> = LazyLock::new(|| {
    let random = || RandomState::new().build_hasher().finish();
    format!("number {:016x}{:016x} ", random(), random())
});

/// Fewer digits always fit 64 bits.
const MIN_DIGITS: usize = 19;

/// Reads JSON text; every whole number keeps its digits.
///
/// # Errors
/// The text is not JSON.
pub fn read(text: &str) -> serde_json::Result<Value> {
    read_where(text.as_bytes(), |_| true)
}

/// Reads JSON text; whole numbers keep their digits where `keeps` says so of the keys that lead to them (outermost first;
/// empty for the items of a list).
///
/// # Errors
/// The text is not JSON.
pub fn read_where(text: &[u8], keeps: impl Fn(&[&[u8]]) -> bool) -> serde_json::Result<Value> {
    match text.split(|byte| !byte.is_ascii_digit()).any(|digits| digits.len() >= MIN_DIGITS) {
        true => serde_json::from_slice(&marked(text, keeps)),
        false => serde_json::from_slice(text),
    }
}

/// The JSON text of a value, with the numbers that [`read`] kept.
pub fn write(value: &Value) -> String {
    let text = value.to_string();
    let quoted = format!("\"{}", *MARK);
    let mut pieces = text.split(&quoted);
    let mut out = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (digits, rest) = piece.split_once('"').unwrap_or((piece, ""));
        out.push_str(digits);
        out.push_str(rest);
    }
    out
}

/// The number that a text stands for.
pub(crate) fn number(text: &str) -> Option<&str> {
    text.strip_prefix(MARK.as_str())
}

/// A rendered text without marks.
pub(crate) fn unmarked(text: String) -> String {
    if text.contains(MARK.as_str()) { text.replace(MARK.as_str(), "") } else { text }
}

fn marked(text: &[u8], keeps: impl Fn(&[&[u8]]) -> bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 64);
    let (mut keys, mut last): (Vec<&[u8]>, &[u8]) = (vec![], &[]);
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        let start = at;
        at += 1;
        match byte {
            b'"' => {
                while let Some(inner) = text.get(at) {
                    at += if *inner == b'\\' { 2 } else { 1 };
                    if *inner == b'"' {
                        break;
                    }
                }
                at = at.min(text.len());
                last = &text[start + 1..(at - 1).max(start + 1)];
            }
            b'{' | b'[' => keys.push(&[]),
            b'}' | b']' => {
                keys.pop();
            }
            b':' => {
                if let Some(key) = keys.last_mut() {
                    *key = last;
                }
            }
            b'-' | b'0'..=b'9' => {
                at += text[at..]
                    .iter()
                    .take_while(|b| matches!(b, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-'))
                    .count();
                if is_long(&text[start..at]) && keeps(&keys) {
                    out.extend(format!("\"{}", *MARK).bytes());
                    out.extend(&text[start..at]);
                    out.push(b'"');
                    continue;
                }
            }
            _ => {}
        }
        out.extend(&text[start..at]);
    }
    out
}

/// A whole number as JSON writes it, beyond 64 bits.
fn is_long(token: &[u8]) -> bool {
    let digits = token.strip_prefix(b"-").unwrap_or(token);
    let fits = std::str::from_utf8(token).is_ok_and(|t| t.parse::<i64>().is_ok() || t.parse::<u64>().is_ok());
    digits.len() >= MIN_DIGITS && digits[0] != b'0' && digits.iter().all(u8::is_ascii_digit) && !fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_survive() {
        let long = "123456789012345678901234567890";
        for text in [
            format!("{{\"a\":{long},\"b\":[-{long},{{\"c\":{long}}}]}}"),
            format!("[{long}]"),
            format!("-{long}"),
            "18446744073709551616".to_owned(),
            "[18446744073709551615,-9223372036854775808,-9223372036854775809]".to_owned(),
            format!("{{\"a\\\"{long}\":\"{long}\",\"b\":\"\\\\\",\"{long}\":1}}"),
            format!("{{\"text\":\"{{\\\"a\\\": {long}}}\"}}"),
        ] {
            let value = read(&text).unwrap();
            assert_eq!(write(&value), text);
        }
        assert_eq!(read(&format!("\"{long}\"")).unwrap(), Value::from(long), "a text stays one");
        for wrong in
            [format!("0{long}"), format!("[{long}"), format!("{long} {long}"), format!("{long}-"), format!("\"{long}")]
        {
            assert!(read(&wrong).is_err(), "{wrong}");
        }
        let text = format!("{{\"a\": {long}, \"b\": {{\"c\": [{long}]}}, \"d\": {long}}}");
        let value = read_where(text.as_bytes(), |keys| keys[0] == b"b").unwrap();
        assert!(value["a"].is_f64() && value["d"].is_f64() && value["b"]["c"][0].is_string(), "{value}");
    }
}
