//! `tandem run`: one answer, or a chat.

mod chat;
mod screen;

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use signal_hook::consts::SIGINT;
use signal_hook::flag;
use tandem_core::ModelConfig;
use tandem_engine::EngineError;
use tandem_runtime::conversation::Conversation;
use tandem_runtime::ranks::Joined;
use tandem_runtime::session::{Session, Step};
use tandem_runtime::{LoadOptions, LogitsRows, ModelOptions, load, model_dir};

use crate::cli::RunArgs;
use crate::news::on_terminal;
use crate::report::print_json;
use screen::Screen;

/// Exit code of an answer that Ctrl-C ended, as shells have it: 128 and the signal.
const INTERRUPTED: u8 = 130;

/// Runs the command.
pub(crate) fn run(args: &RunArgs, joined: Option<Joined>) -> anyhow::Result<ExitCode> {
    let prompt = match (&args.prompt, piped()?) {
        (Some(prompt), Some(piped)) if !piped.is_empty() => Some(format!("{prompt}\n\n{piped}")),
        (Some(prompt), _) => Some(prompt.clone()),
        (None, piped) => piped,
    };
    ensure!(prompt.is_some() || !args.json, "--json needs a prompt, as an argument or on standard input");
    if let Some(name) = args.prompt.as_deref().filter(|text| args.model.model.is_none() && is_like_a_model(text)) {
        eprintln!("note: {name:?} is taken as the prompt; --model {name} names a model");
    }
    // Whatever can be wrong with flags and small files is found before the weights are read.
    let options = args.drafts.apply(ModelOptions::from(&args.model));
    let dir = model_dir(options.model.as_deref())?;
    let config = ModelConfig::load(&dir)?;
    let context = options.context(&config)?;
    let mut conversation = Conversation::new(&args.into(), &dir, config.vocab_size)?;
    conversation.notes().iter().for_each(|note| eprintln!("{note}"));
    if let Some(text) = &prompt {
        conversation.say(text);
    }
    if prompt.is_some() || !args.raw {
        let tokens = conversation.prompt()?.ids.len();
        let trained = config.max_position_embeddings;
        ensure!(tokens > 0 || prompt.is_none(), EngineError::EmptyPrompt);
        ensure!(tokens <= context, EngineError::ContextExceeded { tokens, context, trained });
    }
    let loaded = load(&options, LoadOptions::one_sequence(LogitsRows::One), joined, &mut on_terminal())?;
    let mut session = Session::new(loaded, conversation);
    let interrupt = Interrupt::listen()?;
    if prompt.is_none() {
        return chat::chat(session, interrupt).map(|()| ExitCode::SUCCESS);
    }
    let mut screen = Screen::new();
    let answer = session.answer(&interrupt.0, &mut |step| {
        if !args.json {
            screen.show(step);
        }
    })?;
    if args.json {
        print_json(&session.as_json(&answer))?;
    } else {
        screen.show(Step::End);
        eprintln!("{}", session.summary(&answer));
    }
    Ok(if answer.is_interrupted() { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

/// A model's directory, or what looks like an id: other programs take it in the prompt's place.
fn is_like_a_model(text: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let parts: Vec<&str> = text.split('/').collect();
    // Names have sizes and versions; "and/or" has none.
    let is_id =
        parts.len() == 2 && parts.iter().all(|part| is_part(part)) && text.contains(|c: char| c.is_ascii_digit());
    is_id || Path::new(text).join("config.json").exists()
}

/// The text on standard input; `None` at a terminal.
fn piped() -> anyhow::Result<Option<String>> {
    if std::io::stdin().is_terminal() {
        return Ok(None);
    }
    let (done, wait) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        // A program that starts this one may have left its own pipe open.
        if wait.recv_timeout(Duration::from_secs(2)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("waiting for the end of standard input; `< /dev/null` leaves it out");
        }
    });
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("standard input is not UTF-8 text")?;
    drop(done);
    Ok(Some(text))
}

/// Notes Ctrl-C, which ends an answer. A second one before [`Interrupt::clear`] ends the program.
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn listen() -> anyhow::Result<Interrupt> {
        let pressed = Arc::new(AtomicBool::new(false));
        // In this order: the second signal finds what the first has set.
        flag::register_conditional_shutdown(SIGINT, INTERRUPTED.into(), Arc::clone(&pressed))
            .and_then(|_| flag::register(SIGINT, Arc::clone(&pressed)))
            .context("cannot wait for Ctrl-C")?;
        Ok(Interrupt(pressed))
    }

    fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
