//! Shows what happens while a model is loaded: a bar with GB/s on a terminal, notes as lines.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tandem_runtime::News;

/// Shows news on stderr; the bar only if that is a terminal.
pub(crate) fn on_terminal() -> impl FnMut(News) {
    let mut bar: Option<ProgressBar> = None;
    move |news| match news {
        News::Loading { done, total } => {
            let bar = bar.get_or_insert_with(|| progress_bar(total, "loading"));
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
            }
        }
        News::Note(line) => eprintln!("{line}"),
    }
}

/// A bar over `total` bytes on stderr, silent when that is not a terminal.
pub(crate) fn progress_bar(total: u64, doing: &str) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let template = format!("{doing} {{bar:40}} {{bytes}}/{{total_bytes}} {{bytes_per_sec}} {{eta}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}
