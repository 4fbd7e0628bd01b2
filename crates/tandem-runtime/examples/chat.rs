//! Chats with a model, streaming.
//!
//!     cargo run --release -p tandem-llm-runtime --example chat -- models/fable-30m-MXFP4-Q8

use std::io::{BufRead, Write};

use tandem_runtime::{Chat, ModelOptions, ignore_news};
use tandem_text::Delta;

fn main() -> anyhow::Result<()> {
    let options = ModelOptions { model: std::env::args().nth(1), ..ModelOptions::default() };
    let mut chat = Chat::open(&options, None, &mut ignore_news)?;
    for line in std::io::stdin().lock().lines() {
        chat.say(&line?, |delta| {
            if let Delta::Content(text) = delta {
                print!("{text}");
                let _ = std::io::stdout().flush();
            }
        })?;
        println!();
    }
    Ok(())
}
