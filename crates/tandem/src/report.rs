//! What commands print: stdout, where a full disk is an error and a reader that left is none; stderr, which may be closed.
//!
//! The macros stand for those of the standard library, which panic.

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
    println!("{}", serde_json::to_string_pretty(value)?);
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
