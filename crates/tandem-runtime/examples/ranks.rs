//! Two ranks in threads of one process: a pipeline of two stages.
//!
//!     cargo run --release -p tandem-llm-runtime --example ranks -- models/fable-30m-MXFP4-Q8

use tandem_runtime::options::TransportKind;
use tandem_runtime::ranks::Joined;
use tandem_runtime::{Chat, ModelOptions, News, ParallelOptions};

fn main() -> anyhow::Result<()> {
    let parallel = ParallelOptions { pp: Some(2), transport: TransportKind::Local, ..ParallelOptions::default() };
    let n_ranks = parallel.n_ranks()?;
    let options = ModelOptions { model: std::env::args().nth(1), parallel, ..ModelOptions::default() };
    let mut show = |news| {
        if let News::Note(line) = news {
            eprintln!("{line}");
        }
    };
    let mut chat = Chat::open(&options, Some(Joined::Threads(n_ranks)), &mut show)?;
    println!("{}", chat.say("Tell me a story about a brave fox.", |_| {})?);
    Ok(())
}
