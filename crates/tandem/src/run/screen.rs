//! An answer at the terminal: text to stdout, reasoning folded into one line of stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use console::{Term, style};
use tandem_runtime::session::Step;
use tandem_runtime::{News, Progress, Unit};
use tandem_text::Delta;

use crate::news::on_terminal;
use crate::report::plain;

/// A prompt that takes longer than this gets a bar.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two pictures of the reasoning.
const FRAME: Duration = Duration::from_millis(100);

/// Shows the parts of one answer after the other.
pub(crate) struct Screen {
    stderr: Term,
    /// stdout is one.
    is_terminal: bool,
    /// Lines can be written over.
    is_live: bool,
    /// Reasoning is shown whole.
    pub(crate) unfolded: bool,
    start: Instant,
    bar: Option<Box<dyn FnMut(News) + Send>>,
    /// Since when the model thinks, and the end of what it has thought.
    thought: Option<(Instant, String)>,
    last_frame: Option<Instant>,
    in_line: bool,
}

impl Screen {
    pub(crate) fn new() -> Screen {
        let stderr = Term::stderr();
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Screen {
            is_live: stderr.is_term() && !is_dumb,
            stderr,
            is_terminal: std::io::stdout().is_terminal(),
            unfolded: false,
            start: Instant::now(),
            bar: None,
            thought: None,
            last_frame: None,
            in_line: false,
        }
    }

    /// Shows a part.
    pub(crate) fn show(&mut self, step: Step<'_>) {
        match step {
            Step::Prompt { done, total } => {
                if self.is_live && (self.bar.is_some() || (self.start.elapsed() > PATIENCE && done < total)) {
                    let (doing, unit) = ("reading the prompt", Unit::Tokens);
                    let progress = Progress { doing, unit, done: done as u64, total: total as u64 };
                    self.bar.get_or_insert_with(|| Box::new(on_terminal()))(News::Progress(progress));
                }
            }
            Step::Delta(Delta::Reasoning(text)) => {
                self.end_bar();
                self.think(text);
            }
            Step::Delta(delta) => {
                self.end_bar();
                self.fold();
                match delta {
                    Delta::Content(text) => {
                        self.print(text);
                        self.in_line = !text.ends_with('\n') && (self.in_line || !text.is_empty());
                    }
                    Delta::Call { name } => {
                        self.print(&format!("{}{name}(", if self.in_line { "\n" } else { "" }));
                        self.in_line = true;
                    }
                    Delta::Arguments(text) => self.print(text),
                    Delta::EndCall => {
                        println!(")");
                        self.in_line = false;
                    }
                    Delta::Reasoning(_) => {}
                }
            }
            Step::End => {
                self.end_bar();
                self.fold();
                if self.in_line {
                    println!();
                }
            }
        }
    }

    /// What a model writes must not steer a terminal; files and pipes get it as it is.
    fn print(&self, text: &str) {
        print!("{}", if self.is_terminal { plain(text) } else { text.into() });
    }

    fn end_bar(&mut self) {
        if let Some(mut bar) = self.bar.take() {
            bar(News::Progress(Progress { doing: "reading the prompt", unit: Unit::Tokens, done: 1, total: 1 }));
        }
    }

    fn think(&mut self, text: &str) {
        let (_, tail) = self.thought.get_or_insert_with(|| (Instant::now(), String::new()));
        if !self.stderr.is_term() {
            return;
        }
        if self.unfolded {
            eprint!("{}", style(plain(text)).dim().for_stderr());
            tail.clear();
            tail.push_str(text);
            return;
        }
        tail.extend(plain(text).chars().map(|c| if c.is_control() { ' ' } else { c }));
        if !self.is_live || self.last_frame.is_some_and(|last| last.elapsed() < FRAME) {
            return;
        }
        self.last_frame = Some(Instant::now());
        // Wide characters take two columns: half of them surely fit.
        let columns = usize::from(self.stderr.size().1).saturating_sub(13);
        let keep = tail.chars().rev().scan(0, |width, c| {
            *width += if c.is_ascii() { 1 } else { 2 };
            (*width <= columns).then_some(c.len_utf8())
        });
        let start = tail.len() - keep.sum::<usize>();
        tail.drain(..start);
        eprint!("\r\x1b[K{}", style(format!("thinking: {tail}")).dim().for_stderr());
    }

    /// Leaves one line of the reasoning.
    fn fold(&mut self) {
        let Some((since, tail)) = self.thought.take() else { return };
        if !self.stderr.is_term() {
            return;
        }
        if self.unfolded && !tail.ends_with('\n') {
            eprintln!("");
        }
        let clear = if self.is_live && !self.unfolded { "\r\x1b[K" } else { "" };
        let text = format!("thought for {:.1} s", since.elapsed().as_secs_f64());
        eprintln!("{clear}{}", style(text).dim().for_stderr());
    }
}
