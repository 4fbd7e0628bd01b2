//! What commands print: stdout, where a full disk is an error and a reader that left is none; stderr, which may be closed;
//! and text that steers no terminal.
//!
//! The macros stand for those of the standard library, which panic.

use std::borrow::Cow;
use std::fmt::Arguments;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

macro_rules! print {
    ($($arg:tt)*) => { $crate::report::print(format_args!($($arg)*)) };
}

macro_rules! println {
    () => { $crate::report::print(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::report::print(format_args!("{}\n", format_args!($($arg)*))) };
}

macro_rules! eprint {
    ($($arg:tt)*) => { $crate::report::eprint(format_args!($($arg)*)) };
}

macro_rules! eprintln {
    ($($arg:tt)*) => { $crate::report::eprint(format_args!("{}\n", format_args!($($arg)*))) };
}

/// stdout cannot be written. Unwinds to `main`, so that no command has to pass it on.
pub(crate) struct Unwritable(pub(crate) std::io::Error);

/// Writes to stdout.
pub(crate) fn print(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_fmt(text).and_then(|()| out.flush()) {
        std::panic::resume_unwind(Box::new(Unwritable(error)));
    }
}

/// Writes to stderr, whether or not anybody can read it.
pub(crate) fn eprint(text: Arguments<'_>) {
    let _ = std::io::stderr().lock().write_fmt(text);
}

/// Pretty JSON on stdout.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    // JSON escapes controls but for these, which some terminals obey too.
    let is_left = |c: char| ('\u{7f}'..='\u{9f}').contains(&c);
    let mut escaped = String::with_capacity(text.len());
    text.chars().for_each(|c| match is_left(c) {
        true => escaped.push_str(&format!("\\u{:04x}", u32::from(c))),
        false => escaped.push(c),
    });
    println!("{escaped}");
    Ok(())
}

/// Makes sure that a file can be written before the work whose result it gets. A file that is there stays as it is.
pub(crate) fn check_writable(path: &Path) -> anyhow::Result<()> {
    let is_new = !path.exists();
    let opened = OpenOptions::new().append(true).create(true).open(path);
    opened.with_context(|| format!("cannot write {}", path.display()))?;
    if is_new {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Characters of an error's message, which may quote a name of any length from a file.
const MAX_ERROR: usize = 4_000;

/// An error as it is shown: [`plain`], without the middle where it is very long.
pub(crate) fn error_text(message: &str) -> String {
    let n_chars = message.chars().count();
    if n_chars <= MAX_ERROR {
        return plain(message).into_owned();
    }
    let start: String = message.chars().take(MAX_ERROR / 2).collect();
    let end: String = message.chars().skip(n_chars - MAX_ERROR / 2).collect();
    let left_out = n_chars - MAX_ERROR;
    format!("{} [{left_out} characters left out] {}", plain(&start), plain(&end))
}

/// A text of a file or a model with escapes in the place of control characters, but for line ends and tabs: it must not
/// steer the terminal that shows it.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    // Orders of writing, too, can make a line say something else.
    let is_order = |c: char| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let steers = |c: char| (c.is_control() && !matches!(c, '\n' | '\t')) || is_order(c);
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    text.chars().for_each(|c| match steers(c) {
        true => out.extend(c.escape_unicode()),
        false => out.push(c),
    });
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_steer_no_terminal() {
        let check = |text: &str, expected: &str| assert_eq!(plain(text), expected);
        check("a b\tc\né 🙂", "a b\tc\né 🙂");
        check("\x1b]0;title\x07\r\u{9b}2J\x7f", "\\u{1b}]0;title\\u{7}\\u{d}\\u{9b}2J\\u{7f}");
        check("a\u{202e}b", "a\\u{202e}b");
    }

    #[test]
    fn a_name_of_any_length_leaves_an_error_readable() {
        assert_eq!(error_text("no tensor x\x07"), "no tensor x\\u{7}");
        let long = format!("no tensor {} in model.gguf", "n".repeat(1 << 20));
        let shown = error_text(&long);
        assert!(shown.len() < MAX_ERROR + 100, "{} bytes", shown.len());
        assert!(shown.starts_with("no tensor nn") && shown.ends_with("nn in model.gguf"), "{shown}");
    }
}
