//! Command blocks of README.md, CONTRIBUTING.md and docs: each runs as it is written in a clone and prints what stands
//! there, or the line before it says why not. Flags of those that do not run are checked all the same.

mod common;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{root, temporary};

/// A command, and the lines that it prints.
struct Shown {
    place: String,
    command: String,
    expected: Vec<String>,
    is_run: bool,
}

fn pages() -> Vec<PathBuf> {
    let docs = std::fs::read_dir(root().join("docs")).expect("docs").map(|entry| entry.expect("readable").path());
    let mut pages: Vec<PathBuf> = docs.filter(|path| path.extension().is_some_and(|e| e == "md")).collect();
    pages.sort();
    [root().join("README.md"), root().join("CONTRIBUTING.md")].into_iter().chain(pages).collect()
}

fn shown(page: &Path) -> Vec<Shown> {
    let text = std::fs::read_to_string(page).expect("a page");
    let lines: Vec<&str> = text.lines().collect();
    let mut found: Vec<Shown> = vec![];
    let mut block: Option<(usize, bool)> = None;
    for (i, line) in lines.iter().enumerate() {
        let place = format!("{}:{}", page.file_name().expect("named").to_string_lossy(), i + 1);
        match (block, line) {
            (None, line) if line.starts_with("```console") => {
                let before = lines[..i].last().copied().unwrap_or_default();
                let reason = before.strip_prefix("<!-- not run: ").and_then(|rest| rest.strip_suffix(" -->"));
                assert!(reason.is_none_or(|reason| reason.len() > 3), "{place}: no reason");
                block = Some((i, reason.is_none()));
            }
            (Some(_), line) if line.starts_with("```") => block = None,
            (Some((_, is_run)), line) => match line.strip_prefix("$ ") {
                Some(command) => {
                    found.push(Shown { place, command: command.to_owned(), expected: vec![], is_run });
                }
                None => {
                    let last = found.last_mut().unwrap_or_else(|| panic!("{place}: output of no command"));
                    match last.command.strip_suffix('\\') {
                        Some(begun) => last.command = format!("{begun} {line}"),
                        None => last.expected.push((*line).to_owned()),
                    }
                }
            },
            (None, _) => {}
        }
    }
    found
}

/// Runs a line in `folder`, where `tandem` and `cargo run --release --` are the program; `how` stands before its arguments.
fn shell(folder: &Path, line: &str, how: &str) -> Output {
    let program = env!("CARGO_BIN_EXE_tandem");
    let bin = folder.join("bin");
    std::fs::create_dir_all(&bin).expect("a folder");
    for (name, script) in [
        ("tandem", format!("exec '{program}' {how} \"$@\"")),
        ("cargo", format!("[ \"$1 $2 $3\" = 'run --release --' ] || exit 3\nshift 3\nexec '{program}' {how} \"$@\"")),
    ] {
        let path = bin.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("writable");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("a program");
    }
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("sh");
    command
        .args(["-c", line])
        .current_dir(folder)
        .env("PATH", path)
        .env("HOME", folder)
        .stdin(std::process::Stdio::null());
    command.output().expect("a shell")
}

#[test]
fn commands_do_what_stands_there() {
    let folder = temporary();
    for name in ["models", "tests", "docs"] {
        symlink(root().join(name).canonicalize().expect("there"), folder.path().join(name)).expect("a link");
    }
    let (mut n_run, mut n_checked) = (0, 0);
    for shown in pages().iter().flat_map(|page| shown(page)) {
        let Shown { place, command, expected, is_run } = shown;
        if !is_run {
            // Its flags at least exist.
            if command.starts_with("tandem ") && !command.contains(['|', '<', '>']) {
                let done = shell(folder.path(), &command, "config --json");
                assert!(done.status.success(), "{place}: {command}: {}", String::from_utf8_lossy(&done.stderr));
                n_checked += 1;
            }
            continue;
        }
        let done = shell(folder.path(), &command, "");
        let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{place}: {command}: {err}");
        // Statistics differ from machine to machine.
        for line in expected.iter().filter(|line| !line.is_empty() && !line.starts_with("[prompt ")) {
            assert!(out.lines().any(|found| found == line), "{place}: {command} did not print {line:?} but {out}");
        }
        n_run += 1;
    }
    assert!(n_run >= 6 && n_checked >= 6, "{n_run} commands ran, {n_checked} were checked");
}

/// Targets of a page's links, but for those to other sites and within the page.
fn links(text: &str) -> Vec<String> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
    let targets = targets.map(|target| target.split('#').next().unwrap_or_default().to_owned());
    targets.filter(|target| !target.is_empty() && !target.contains(':')).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut n = 0;
    let others = ["ARCHITECTURE.md", "CHANGELOG.md"].map(|name| root().join(name));
    for page in pages().into_iter().chain(others) {
        let text = std::fs::read_to_string(&page).expect("a page");
        for link in links(&text) {
            assert!(page.parent().expect("a folder").join(&link).exists(), "{}: {link} is not there", page.display());
            n += 1;
        }
    }
    assert!(n > 40, "{n} links");
}

#[test]
fn every_page_is_in_the_book_once() {
    let summary = std::fs::read_to_string(root().join("docs/SUMMARY.md")).expect("a summary");
    let mut listed = links(&summary);
    listed.sort();
    let docs = std::fs::read_dir(root().join("docs")).expect("docs").map(|entry| entry.expect("readable").file_name());
    let names = docs.map(|name| name.to_string_lossy().into_owned());
    let mut pages: Vec<String> = names.filter(|name| name.ends_with(".md") && name != "SUMMARY.md").collect();
    pages.sort();
    assert_eq!(listed, pages);
}

/// The program's text, with strings that go on in the next line put together.
fn sources(folder: &Path, text: &mut String) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let source = std::fs::read_to_string(&path).expect("UTF-8");
            text.extend(source.split("\\\n").map(str::trim_start));
        }
    }
}

#[test]
fn messages_in_troubleshooting_are_the_programs() {
    let mut text = String::new();
    for entry in std::fs::read_dir(root().join("crates")).expect("crates") {
        sources(&entry.expect("readable").path().join("src"), &mut text);
    }
    let page = std::fs::read_to_string(root().join("docs/troubleshooting.md")).expect("a page");
    let mut n = 0;
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let messages = line.split('|').nth(1).expect("a column").split('`').skip(1).step_by(2);
        for part in messages.flat_map(|message| message.split("..")).flat_map(|part| part.split(" N ")) {
            let part = part.trim().trim_end_matches(" N");
            assert!(text.contains(part), "no message has {part:?}");
            n += 1;
        }
    }
    assert!(n > 15, "{n} messages");
}
