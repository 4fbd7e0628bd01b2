//! The chat at a terminal: lines, commands, history.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use console::style;
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Cmd, CompletionType, Config, Context, Editor, Helper, KeyEvent};

use tandem_runtime::session::{Session, Step};
use tandem_text::Reasoning;

use super::Interrupt;
use super::screen::Screen;
use crate::report::plain;

/// Name, arguments and use of each command.
const COMMANDS: [(&str, &str, &str); 14] = [
    ("/help", "", "this list"),
    ("/clear", "", "forget the conversation, keep the system message"),
    ("/system", "TEXT", "start again with this system message; without TEXT, show it"),
    (
        "/set",
        "NAME VALUE",
        "temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens; VALUE default resets",
    ),
    ("/regen", "", "answer the last message again"),
    ("/undo", "", "forget the last message and its answer"),
    ("/drop", "", "forget the oldest turns until a quarter of the context is free"),
    ("/save", "FILE", "write the conversation as JSON (OpenAI's messages)"),
    ("/load", "FILE", "go on with a conversation from a file"),
    ("/tools", "FILE|off", "let the model call the tools of a JSON file; without FILE, list them"),
    ("/stats", "", "model, device, context, tokens, memory"),
    (
        "/think",
        "on|off|LEVEL|show|full",
        "reason before answers or not, or how much; show the last reasoning; show all as it comes",
    ),
    ("/result", "TEXT", "what a tool that the model called gave back; the model goes on after the last one"),
    ("/exit", "", "leave, as Ctrl-D does"),
];
/// What `/set` knows.
const SETTINGS: [&str; 7] = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens"];
/// What `/think` knows.
const THINK: [&str; 8] = ["on", "off", "low", "medium", "high", "max", "show", "full"];
/// Begins and ends a message of several lines.
const QUOTES: &str = "\"\"\"";

/// Chats until the user leaves.
pub(crate) fn chat(session: Session, interrupt: Interrupt) -> anyhow::Result<()> {
    let config = Config::builder().completion_type(CompletionType::List).auto_add_history(false).build();
    let mut editor: Editor<Line, FileHistory> = Editor::with_config(config)?;
    editor.set_helper(Some(Line { files: FilenameCompleter::new() }));
    editor.bind_sequence(KeyEvent::alt('\r'), Cmd::Newline);
    let history = history_file();
    if let Some(path) = &history {
        let _ = editor.load_history(path);
    }
    println!("{} - type a message; /help for commands, Ctrl-D to leave", session.conversation.model);
    Chat { session, interrupt, unfolded: false, reasoning: String::new() }.talk(&mut editor, history.as_deref())
}

struct Chat {
    session: Session,
    interrupt: Interrupt,
    /// Reasoning is shown as it comes.
    unfolded: bool,
    /// The last answer's.
    reasoning: String,
}

impl Chat {
    fn talk(&mut self, editor: &mut Editor<Line, FileHistory>, history: Option<&Path>) -> anyhow::Result<()> {
        let name = self.session.name();
        let mut wants_to_leave = false;
        loop {
            // Narrow terminals keep room for the message.
            let columns = usize::from(console::Term::stdout().size().1) / 3;
            let prompt = format!("{}> ", name.chars().take(columns.max(4)).collect::<String>());
            let styled = style(&prompt).bold().to_string();
            self.interrupt.clear();
            let line = match editor.readline(&(prompt, styled)) {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) if wants_to_leave => return Ok(()),
                Err(ReadlineError::Interrupted) => {
                    eprintln!("Ctrl-C again leaves, and so does Ctrl-D");
                    wants_to_leave = true;
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            wants_to_leave = false;
            if line.trim().is_empty() {
                continue;
            }
            let _ = editor.add_history_entry(&line);
            if let Some(path) = history
                && let Err(error) = editor.append_history(path)
            {
                tracing::info!("history is not kept in {}: {error}", path.display());
            }
            let text = message(&line);
            let done = match text.strip_prefix('/').filter(|_| !line.trim().starts_with(QUOTES)) {
                Some(_) => self.command(text.trim()),
                None => {
                    self.session.conversation.say(&text);
                    let done = self.answer();
                    if done.is_err() {
                        self.session.conversation.undo();
                    }
                    done.map(|()| true)
                }
            };
            match done {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => eprintln!("error: {error:#}"),
            }
        }
    }

    /// Runs a command; false to leave.
    fn command(&mut self, line: &str) -> anyhow::Result<bool> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let conversation = &mut self.session.conversation;
        match name {
            "/exit" | "/quit" | "/bye" => return Ok(false),
            "/help" => {
                for (name, arguments, what) in COMMANDS {
                    println!("  {:<26} {what}", format!("{name} {arguments}"));
                }
                println!(
                    "{QUOTES} begins and ends a message of several lines; so does a \\ at the end of a line, or Alt-Enter."
                );
                println!("Ctrl-C ends an answer, and twice the program. Tab completes commands and names of files.");
            }
            "/clear" => conversation.restart(conversation.system().as_deref()),
            "/system" if rest.is_empty() => match conversation.system() {
                Some(text) => println!("{text}"),
                None => println!("there is no system message"),
            },
            "/system" => conversation.restart(Some(rest)),
            "/set" => self.set(rest)?,
            "/regen" => {
                ensure!(conversation.forget_answer(), "there is nothing to answer yet");
                self.answer()?;
            }
            "/result" => match conversation.add_result(rest)? {
                0 => self.answer()?,
                n => println!("{n} more"),
            },
            "/undo" => {
                ensure!(conversation.undo(), "there is nothing to undo");
                println!("{} messages are left", conversation.messages.len());
            }
            "/drop" => self.drop_oldest()?,
            "/save" | "/load" | "/tools" if rest == "off" || !rest.is_empty() => match name {
                "/save" => conversation.save(Path::new(rest))?,
                "/load" => {
                    conversation.load(Path::new(rest))?;
                    println!("{} messages", conversation.messages.len());
                }
                _ if rest == "off" => conversation.tools.clear(),
                _ => conversation.load_tools(Path::new(rest))?,
            },
            "/save" | "/load" => bail!("{name} needs the name of a file"),
            "/tools" => {
                for tool in &conversation.tools {
                    let function = tool.get("function").unwrap_or(tool);
                    let text = |key: &str| function[key].as_str().unwrap_or_default().to_owned();
                    println!("  {}  {}", text("name"), text("description"));
                }
                if conversation.tools.is_empty() {
                    println!("there are no tools; /tools FILE reads some");
                }
            }
            "/stats" => println!("{}", self.session.facts()?),
            "/think" => match (rest, Reasoning::from_word(rest)) {
                (_, Some(thinking)) => {
                    conversation.thinking = thinking;
                    conversation.notes().iter().for_each(|note| println!("{note}"));
                }
                ("show", _) if self.reasoning.is_empty() => println!("the last answer has no reasoning"),
                ("show", _) => println!("{}", style(plain(self.reasoning.trim())).dim()),
                ("full", _) => self.unfolded = !self.unfolded,
                _ => bail!("/think takes on, off, low, high or another level of effort, show or full"),
            },
            name => match COMMANDS.iter().filter(|(known, ..)| known.starts_with(name)).collect::<Vec<_>>()[..] {
                [(known, ..)] => bail!("unknown command {name}; did you mean {known}? Tab completes"),
                _ => bail!("unknown command {name}; /help lists them"),
            },
        }
        Ok(true)
    }

    fn answer(&mut self) -> anyhow::Result<()> {
        let used = self.session.conversation.prompt()?.ids.len();
        let context = self.session.context();
        if used > context {
            eprintln!(
                "the conversation has {used} tokens and the context holds {context}: /drop forgets the oldest turns and \
                 answers, /clear forgets all, /undo takes the last message back"
            );
            return Ok(());
        }
        let mut screen = Screen::new();
        screen.unfolded = self.unfolded;
        let answer = self.session.answer(&self.interrupt.0, &mut |step| screen.show(step));
        screen.show(Step::End);
        let answer = answer?;
        eprintln!("{}", style(self.session.summary(&answer)).dim().for_stderr());
        self.reasoning = answer.reasoning;
        if !answer.calls.is_empty() {
            eprintln!("the model waits for results: /result TEXT gives one, in the order of the calls");
        }
        Ok(())
    }

    fn drop_oldest(&mut self) -> anyhow::Result<()> {
        let room = self.session.context() / 4 * 3;
        let mut n_dropped = 0;
        while self.session.conversation.prompt()?.ids.len() > room && self.session.conversation.drop_oldest() {
            n_dropped += 1;
        }
        eprintln!("{n_dropped} turns are forgotten");
        let is_unanswered = self.session.conversation.messages.last().is_some_and(|m| m["role"] == "user");
        if is_unanswered { self.answer() } else { Ok(()) }
    }

    fn set(&mut self, rest: &str) -> anyhow::Result<()> {
        let conversation = &mut self.session.conversation;
        let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let value = value.trim().trim_start_matches('=').trim();
        if !name.is_empty() {
            ensure!(SETTINGS.contains(&name), "/set knows {}", SETTINGS.join(", "));
            ensure!(!value.is_empty(), "/set {name} needs a value, or default");
            let before = (conversation.sampling.clone(), conversation.max_tokens);
            let s = &mut conversation.sampling;
            match name {
                "temperature" => s.temperature = number(name, value)?,
                "top_k" => s.top_k = number(name, value)?,
                "top_p" => s.top_p = number(name, value)?,
                "min_p" => s.min_p = number(name, value)?,
                "repetition_penalty" => s.repetition_penalty = number(name, value)?,
                "seed" => s.seed = number(name, value)?,
                _ => conversation.max_tokens = number(name, value)?,
            }
            if let Err(error) = conversation.sampling() {
                (conversation.sampling, conversation.max_tokens) = before;
                return Err(error);
            }
        }
        let now = conversation.sampling()?;
        let seed = conversation.sampling.seed.map_or("random".to_owned(), |seed| seed.to_string());
        let max_tokens = conversation.max_tokens.map_or("the rest of the context".to_owned(), |n| n.to_string());
        println!(
            "temperature {}, top_k {}, top_p {}, min_p {}, repetition_penalty {}, seed {seed}, max_tokens {max_tokens}",
            now.temperature, now.top_k, now.top_p, now.min_p, now.repetition_penalty
        );
        Ok(())
    }
}

/// A value of `/set`; `None` for `default`.
fn number<T: std::str::FromStr>(name: &str, value: &str) -> anyhow::Result<Option<T>> {
    match value {
        "default" => Ok(None),
        _ => value.parse().map(Some).ok().with_context(|| format!("/set {name} takes a number, found {value:?}")),
    }
}

/// A message as typed, without the marks of several lines.
fn message(line: &str) -> String {
    let trimmed = line.trim();
    match trimmed.strip_prefix(QUOTES).map(|rest| rest.strip_suffix(QUOTES).unwrap_or(rest)) {
        Some(text) => text.trim_matches('\n').to_owned(),
        None => line.replace("\\\n", "\n"),
    }
}

/// True while more lines belong to a message.
fn is_incomplete(line: &str) -> bool {
    let trimmed = line.trim();
    match trimmed.strip_prefix(QUOTES) {
        Some(rest) => !rest.ends_with(QUOTES),
        None => line.ends_with('\\') && !line.ends_with("\\\\"),
    }
}

fn history_file() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let data = variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")))?;
    let dir = data.join("tandem");
    std::fs::create_dir_all(&dir).ok()?;
    Some(dir.join("history"))
}

/// What the editor knows of a line.
struct Line {
    files: FilenameCompleter,
}

impl Completer for Line {
    type Candidate = Pair;

    fn complete(&self, line: &str, pos: usize, context: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let before = &line[..pos];
        let pair = |text: &str| Pair { display: text.to_owned(), replacement: format!("{text} ") };
        let all = |names: &mut dyn Iterator<Item = &'static str>, start: &str| {
            names.filter(|name| name.starts_with(start)).map(pair).collect()
        };
        let Some((command, rest)) = before.split_once(' ') else {
            let is_command = before.starts_with('/');
            return Ok((0, if is_command { all(&mut COMMANDS.iter().map(|c| c.0), before) } else { vec![] }));
        };
        match command {
            "/save" | "/load" | "/tools" => self.files.complete(line, pos, context),
            "/set" => Ok((command.len() + 1, all(&mut SETTINGS.into_iter(), rest))),
            "/think" => Ok((command.len() + 1, all(&mut THINK.into_iter(), rest))),
            _ => Ok((pos, vec![])),
        }
    }
}

impl Validator for Line {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let is_incomplete = is_incomplete(context.input());
        Ok(if is_incomplete { ValidationResult::Incomplete } else { ValidationResult::Valid(None) })
    }
}

impl Hinter for Line {
    type Hint = String;
}

impl Highlighter for Line {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _: bool) -> Cow<'b, str> {
        Cow::Borrowed(prompt)
    }
}

impl Helper for Line {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_may_have_several_lines() {
        for (line, incomplete, text) in [
            ("one", false, "one"),
            ("one\\", true, "one\\"),
            ("one\\\ntwo", false, "one\ntwo"),
            ("\"\"\"one", true, "one"),
            ("\"\"\"\none\n/two\n\"\"\"", false, "one\n/two"),
            ("\"\"\"", true, ""),
            ("a path C:\\\\", false, "a path C:\\\\"),
        ] {
            assert_eq!((is_incomplete(line), message(line)), (incomplete, text.to_owned()), "{line:?}");
        }
    }
}
