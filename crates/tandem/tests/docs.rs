//! Command blocks of README.md, CONTRIBUTING.md, ARCHITECTURE.md and docs: each runs as it is written in a clone and prints what
//! stands there, or the line before it says why not. `<!-- with a server -->` before a block: there is one at http://127.0.0.1:8000,
//! whose place a free port takes. Flags of those that do not run are checked all the same. Links, messages and
//! the book's contents too; that the book builds is checked by scripts/docs/book.py.

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::{root, temporary};

/// A command, and the lines that it prints.
struct Shown {
    place: String,
    command: String,
    expected: Vec<String>,
    how: How,
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    Run,
    WithServer,
    NotRun,
}

/// Pages of the book, by their names in docs.
fn chapters() -> Vec<String> {
    let mut found: Vec<String> = vec![];
    for folder in ["", "decisions/"] {
        let docs = std::fs::read_dir(root().join("docs").join(folder)).expect("docs");
        let names = docs.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned());
        found.extend(names.filter(|name| name.ends_with(".md")).map(|name| format!("{folder}{name}")));
    }
    found.sort();
    found
}

fn pages() -> Vec<PathBuf> {
    let others = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"].map(|name| root().join(name));
    others.into_iter().chain(chapters().iter().map(|name| root().join("docs").join(name))).collect()
}

fn shown(page: &Path) -> Vec<Shown> {
    let text = std::fs::read_to_string(page).expect("a page");
    let lines: Vec<&str> = text.lines().collect();
    let mut found: Vec<Shown> = vec![];
    let mut block: Option<How> = None;
    for (i, line) in lines.iter().enumerate() {
        let place = format!("{}:{}", page.file_name().expect("named").to_string_lossy(), i + 1);
        match (block, line) {
            (None, line) if line.starts_with("```console") => {
                let before = lines[..i].last().copied().unwrap_or_default();
                let reason = before.strip_prefix("<!-- not run: ").and_then(|rest| rest.strip_suffix(" -->"));
                assert!(reason.is_none_or(|reason| reason.len() > 3), "{place}: no reason");
                block = Some(match (reason, before) {
                    (Some(_), _) => How::NotRun,
                    (None, "<!-- with a server -->") => How::WithServer,
                    (None, _) => How::Run,
                });
            }
            (Some(_), line) if line.starts_with("```") => block = None,
            (Some(how), line) => match line.strip_prefix("$ ") {
                Some(command) => {
                    found.push(Shown { place, command: command.to_owned(), expected: vec![], how });
                }
                None => {
                    let last = found.last_mut().unwrap_or_else(|| panic!("{place}: output of no command"));
                    match last.command.strip_suffix('\\') {
                        Some(begun) => last.command = format!("{begun} {line}"),
                        None => last.expected.push((*line).to_owned()),
                    }
                }
            },
            // Written in another way, commands would not be found here.
            (None, line) => {
                let fence = line.trim_start().strip_prefix("```").unwrap_or_default();
                let is_shell = ["console", "sh", "bash", "shell", "zsh"].contains(&fence);
                assert!(
                    !is_shell,
                    "{place}: commands stand in a block that begins with ```console, without indentation"
                );
            }
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

/// The bundled model's server at a free port.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start() -> Server {
        let mut process =
            common::command(&["serve", "--port", "0"]).stderr(Stdio::piped()).spawn().expect("the program");
        let mut lines = BufReader::new(process.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let ready = lines.find_map(|line| Some(line.split_once("http://")?.1.split(' ').next()?.to_owned()));
        // The pipe must not fill up.
        std::thread::spawn(move || lines.for_each(drop));
        Server { process, address: format!("http://{}", ready.expect("the server has ended")) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn commands_do_what_stands_there() {
    let folder = temporary();
    for name in ["models", "tests", "docs"] {
        symlink(root().join(name).canonicalize().expect("there"), folder.path().join(name)).expect("a link");
    }
    let server = Server::start();
    let (mut n_run, mut n_served, mut n_checked) = (0, 0, 0);
    for shown in pages().iter().flat_map(|page| shown(page)) {
        let Shown { place, mut command, expected, how } = shown;
        if how == How::WithServer {
            assert!(command.contains("http://127.0.0.1:8000"), "{place}: {command} asks no server");
            command = command.replace("http://127.0.0.1:8000", &server.address).replace("curl -s ", "curl -sf ");
            n_served += 1;
        }
        if how == How::NotRun {
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
    assert!(
        n_run >= 20 && n_served >= 6 && n_checked >= 16,
        "{n_run} commands ran, {n_served} with a server, {n_checked} were checked"
    );
}

/// Targets of a page's links and the places in them, but for those to other sites.
fn links(text: &str) -> Vec<(String, String)> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
    let targets = targets.filter(|target| !target.is_empty() && !target.contains(':'));
    targets
        .map(|target| target.split_once('#').unwrap_or((target, "")))
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect()
}

/// Names of a page's headings in links, as GitHub and mdBook make them.
fn headings(text: &str) -> Vec<String> {
    let mut found: Vec<String> = vec![];
    let mut is_code = false;
    for line in text.lines() {
        is_code ^= line.trim_start().starts_with("```");
        let Some(heading) = line.strip_prefix('#').filter(|_| !is_code) else { continue };
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        let name: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let n_earlier = found.iter().filter(|earlier| **earlier == name).count();
        found.push(if n_earlier > 0 { format!("{name}-{n_earlier}") } else { name });
    }
    found
}

#[test]
fn links_lead_somewhere() {
    let (mut n, mut n_places) = (0, 0);
    for page in pages().into_iter().chain([root().join("CHANGELOG.md")]) {
        let text = std::fs::read_to_string(&page).expect("a page");
        for (link, place) in links(&text) {
            let target = if link.is_empty() { page.clone() } else { page.parent().expect("a folder").join(&link) };
            assert!(target.exists(), "{}: {link} is not there", page.display());
            n += 1;
            if !place.is_empty() {
                let text = std::fs::read_to_string(&target).expect("a page");
                assert!(headings(&text).contains(&place), "{}: {link}#{place} is no heading", page.display());
                n_places += 1;
            }
        }
    }
    assert!(n > 150 && n_places > 60, "{n} links, {n_places} of them to headings");
}

#[test]
fn every_page_is_in_the_book_once() {
    let summary = std::fs::read_to_string(root().join("docs/SUMMARY.md")).expect("a summary");
    let mut listed: Vec<String> = links(&summary).into_iter().map(|(link, _)| link).collect();
    listed.sort();
    let pages: Vec<String> = chapters().into_iter().filter(|name| name != "SUMMARY.md").collect();
    assert_eq!(listed, pages);
}

/// The program's text without comments, with strings that go on in the next line put together.
fn sources(folder: &Path, text: &mut String) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let source = std::fs::read_to_string(&path).expect("UTF-8");
            let code: Vec<&str> = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
            text.extend(code.join("\n").split("\\\n").map(str::trim_start));
        }
    }
}

/// Messages of troubleshooting.md, and verdicts and parts of a step in reading-explain.md.
#[test]
fn messages_in_the_book_are_the_programs() {
    let mut text = String::new();
    for entry in std::fs::read_dir(root().join("crates")).expect("crates") {
        sources(&entry.expect("readable").path().join("src"), &mut text);
    }
    for (page, at_least) in [("troubleshooting.md", 60), ("reading-explain.md", 20)] {
        let lines = std::fs::read_to_string(root().join("docs").join(page)).expect("a page");
        let lines = lines.split_once("## The parts of a step").map_or(lines.as_str(), |(_, rest)| rest);
        let mut n = 0;
        for line in lines.lines().filter(|line| line.starts_with("| `")) {
            let messages = line.split('|').nth(1).expect("a column").split('`').skip(1).step_by(2);
            for part in messages.flat_map(|message| message.split("..")).flat_map(|part| part.split(" N ")) {
                let part = part.trim().trim_end_matches(" N");
                assert!(text.contains(part), "{page}: no message has {part:?}");
                n += 1;
            }
        }
        assert!(n >= at_least, "{page}: {n} messages");
    }
}
