//! Shows what happens while a model is loaded or converted: a bar on a terminal, notes as lines.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tandem_runtime::{News, Progress, Unit};

/// Shows news on stderr; bars only if that is a terminal.
pub(crate) fn on_terminal() -> impl FnMut(News) + Send {
    let mut bar: Option<(&'static str, ProgressBar)> = None;
    move |news| match news {
        News::Progress(progress) => {
            if bar.as_ref().is_none_or(|(doing, _)| *doing != progress.doing) {
                bar = Some((progress.doing, new_bar(progress)));
            }
            let Some((_, shown)) = &bar else { return };
            shown.set_position(progress.done);
            if progress.done >= progress.total {
                shown.finish_and_clear();
            }
        }
        News::Note(line) => eprintln!("{line}"),
    }
}

fn new_bar(progress: Progress) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(progress.total), target);
    let template = match progress.unit {
        Unit::Bytes => "{msg} {bar:40} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
        Unit::Tokens => "{msg} {bar:40} {pos}/{len} tokens {eta}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(progress.doing);
    bar
}
