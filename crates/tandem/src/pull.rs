//! `tandem pull`, and what other commands do about a model that is not here.

use std::io::IsTerminal;

use anyhow::anyhow;
use serde_json::json;
use tandem_hub::{Pulled, Request, get, has_weights, is_hugging_face_id};
use tandem_runtime::model_dir;
use tandem_runtime::units::bytes;

use crate::cli::PullArgs;
use crate::report::print_json;

/// Runs the command.
pub(crate) fn pull(args: &PullArgs) -> anyhow::Result<()> {
    let PullArgs { repo, revision, include, metadata, mtp, json } = args.clone();
    let request = Request { repo, revision, include, metadata, mtp, quiet: json };
    let Pulled { snapshot, commit, files, bytes: total } = get(&request, |_| true)?;
    if args.json {
        return print_json(
            &json!({"path": snapshot.display().to_string(), "commit": commit, "files": files, "bytes": total}),
        );
    }
    // A name alone stands for what main is.
    let name = if args.revision == "main" { args.repo.clone() } else { format!("{}@{}", args.repo, args.revision) };
    let flag = if mtp { "--mtp" } else { "--model" };
    println!("{} files, {}; use it as {flag} {name}", files.len(), bytes(total));
    Ok(())
}

/// Gets a model that a command names if it is an id and not here: asked once at a terminal, without asking if `yes`. Else
/// the command says what to do.
pub(crate) fn offer(model: &str, yes: bool) -> anyhow::Result<()> {
    let can_ask = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if !is_hugging_face_id(model) || has_weights(model) || !(yes || can_ask) {
        return Ok(());
    }
    let pulled = get(&Request::of_model(model, false), |missing| {
        if yes {
            return true;
        }
        eprint!("{model} is not here. Get {} from Hugging Face? [y/N] ", bytes(missing));
        let mut line = String::new();
        let read = std::io::stdin().read_line(&mut line);
        read.is_ok() && matches!(line.trim().to_lowercase().as_str(), "y" | "yes")
    })?;
    eprintln!("{} files, {}", pulled.files.len(), bytes(pulled.bytes));
    Ok(())
}

/// Gets what `inspect` needs of a model that is not here.
pub(crate) fn offer_metadata(model: &str) -> anyhow::Result<()> {
    if is_hugging_face_id(model)
        && let Err(missing) = model_dir(Some(model))
    {
        get(&Request::of_model(model, true), |_| true)
            .map_err(|error| anyhow!("{missing:#}; its metadata: {error:#}"))?;
    }
    Ok(())
}
