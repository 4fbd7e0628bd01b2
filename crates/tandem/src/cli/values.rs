//! Values of flags, with refusals that name what was expected.

use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use tandem_text::{Dialect, Effort, Reasoning};

/// A whole number within a range, which a refusal names.
pub(crate) fn whole<T: TryFrom<u64>>(
    low: u64,
    high: u64,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse::<u64>().ok().filter(|number| (low..=high).contains(number));
        let number = number.and_then(|number| T::try_from(number).ok());
        number.ok_or_else(|| format!("expected a whole number from {low} to {high}"))
    }
}

/// A number of tokens within a range: `4096`, `4k` (4096) or `1m`.
pub(crate) fn tokens(
    low: usize,
    high: usize,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = token_count(text).ok().filter(|number| (low..=high).contains(number));
        number.ok_or_else(|| format!("expected a whole number from {low} to {high}, or one such as 8k"))
    }
}

/// A number within a range, which a refusal names.
pub(crate) fn real<T: FromStr + Into<f64> + Copy>(
    low: f64,
    high: f64,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        // NaN is in no range.
        let number = text.parse::<T>().ok().filter(|number| (low..=high).contains(&(*number).into()));
        number.ok_or_else(|| format!("expected a number from {low} to {high}"))
    }
}

/// A number whose range is checked where it is used.
pub(crate) fn number<T: FromStr>() -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    |text| text.parse().map_err(|_| "expected a number".to_owned())
}

/// The name of a chat format.
pub(crate) fn chat_format() -> impl TypedValueParser<Value = Dialect> {
    PossibleValuesParser::new(Dialect::names())
        .try_map(|name| Dialect::from_name(&name).ok_or("expected the name of a chat format"))
}

/// `on`, `off`, or a level of effort.
pub(crate) fn reasoning() -> impl TypedValueParser<Value = Reasoning> {
    let words = ["on", "off"].into_iter().chain(Effort::ALL.into_iter().map(|(name, _)| name));
    PossibleValuesParser::new(words).try_map(|word| Reasoning::from_word(&word).ok_or("expected a level of effort"))
}

/// `5GB`, `300MB` or a number of bytes.
pub(crate) fn byte_count(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let units = [("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1000), ("B", 1), ("", 1)];
    let (digits, factor) = units.iter().find_map(|(unit, n)| Some((upper.strip_suffix(unit)?, *n))).unwrap_or(("", 1));
    digits
        .trim()
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|n| (1..=1 << 50).contains(n))
        .ok_or_else(|| format!("expected a size such as 5GB or 300MB, from 1 B to {} GB", (1u64 << 50) / 1_000_000_000))
}

/// `4096`, `4k` (4096) or `1m`.
pub(crate) fn token_count(text: &str) -> Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    let (digits, factor) = match lower.strip_suffix('k') {
        Some(digits) => (digits, 1 << 10),
        None => lower.strip_suffix('m').map_or((lower.as_str(), 1), |digits| (digits, 1 << 20)),
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|n| *n <= MOST_TOKENS)
        .ok_or_else(|| format!("expected a number of tokens such as 512 or 8k, from 0 to {MOST_TOKENS}"))
}

/// Tokens in a cache, and bytes of a message.
const MOST_TOKENS: usize = 1 << 28;
