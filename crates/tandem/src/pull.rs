//! `tandem pull`: a model from Hugging Face into the local cache, where `--model OWNER/NAME` finds it.
//!
//! hf-hub speaks the protocol and continues what was broken off. Here is what it leaves to its callers: which files,
//! their checksums, names that stay inside the cache, and messages.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressDrawTarget};
use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tandem_model::glob_matches;

use crate::cli::PullArgs;
use tandem_runtime::hugging_face_cache;
use crate::report::print_json;
use tandem_runtime::units::bytes;

/// What a model needs, and nothing else of its repository.
const FILES: [&str; 6] = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"];
/// Of files that are programs.
const PICKLES: [&str; 5] = ["bin", "pt", "pth", "pkl", "ckpt"];
/// Times that a file is tried; each goes on where the last one broke off.
const ATTEMPTS: usize = 5;

/// Runs the command.
pub(crate) fn pull(args: &PullArgs) -> anyhow::Result<()> {
    let is_id = args.repo.split('/').count() == 2 && is_inside(&args.repo);
    ensure!(is_id, "{:?} is not a Hugging Face id, which looks like owner/name", args.repo);
    ensure!(is_inside(&args.revision), "--revision {:?} is not the name of a branch, tag or commit", args.revision);
    let cache = hugging_face_cache().context("neither HF_HOME nor HOME is set, so there is no Hugging Face cache")?;
    let cache = Cache::new(cache);
    let mut builder = ApiBuilder::from_env().with_cache_dir(cache.path().clone()).with_progress(false);
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|token| !token.trim().is_empty()) {
        builder = builder.with_token(Some(token.trim().to_owned()));
    }
    let api = builder.build().map_err(|error| anyhow!("cannot prepare downloads: {error}"))?;

    let asked = Repo::with_revision(args.repo.clone(), RepoType::Model, args.revision.clone());
    let info = api.repo(asked.clone()).info().map_err(|error| explain(error, args))?;
    ensure!(is_hex(&info.sha, 40), "the server names the commit {:?}, expected 40 hexadecimal digits", info.sha);
    let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let wanted = choose(&names, args)?;

    // All files of one commit, whatever is pushed meanwhile.
    let commit = Repo::with_revision(args.repo.clone(), RepoType::Model, info.sha.clone());
    let (repo, mut total) = (api.repo(commit.clone()), 0);
    for name in &wanted {
        total += fetch(&api, &repo, &cache, &commit, name).map_err(|error| match error.downcast::<ApiError>() {
            Ok(error) => explain(error, args).context(format!("cannot get {name}")),
            Err(error) => error,
        })?;
    }
    // Only now is it the model of this name.
    cache.repo(asked).create_ref(&info.sha).context("cannot write to the Hugging Face cache")?;
    let path = cache.repo(commit).pointer_path(&info.sha);
    if args.json {
        return print_json(
            &json!({"path": path.display().to_string(), "commit": info.sha, "files": wanted, "bytes": total}),
        );
    }
    // A name alone stands for what main is.
    let name = if args.revision == "main" { args.repo.clone() } else { path.display().to_string() };
    println!("{} files, {}; use it as --model {name}", wanted.len(), bytes(total));
    Ok(())
}

/// The files to get.
fn choose<'a>(names: &'a [String], args: &PullArgs) -> anyhow::Result<Vec<&'a str>> {
    if let Some(name) = names.iter().find(|name| !is_inside(name)) {
        bail!("the server lists the file {name:?}, which would lie outside the cache; this is no Hugging Face server");
    }
    let is_pickle = |name: &str| Path::new(name).extension().is_some_and(|e| PICKLES.iter().any(|pickle| e == *pickle));
    // Copies of the model for other programs are in folders; what is needed is not.
    let is_default = |name: &str| !name.contains('/') && FILES.iter().any(|pattern| glob_matches(pattern, name));
    let is_asked = |name: &str| args.include.iter().any(|pattern| glob_matches(pattern, name));
    let pickle = names.iter().find(|name| is_pickle(name));
    if let Some(name) = names.iter().find(|name| is_pickle(name) && is_asked(name)) {
        bail!("{name} is a pickle file. Opening one runs the code inside, so it is refused");
    }
    let wanted: Vec<&str> =
        names.iter().map(String::as_str).filter(|name| is_default(name) || is_asked(name)).collect();
    let is_weights = |name: &&&str| name.ends_with(".safetensors") || name.ends_with(".gguf");
    match (wanted.iter().find(is_weights), pickle) {
        (Some(_), _) => Ok(wanted),
        (None, Some(pickle)) => bail!(
            "{} has no *.safetensors file, only pickles such as {pickle}. Opening a pickle runs the code inside, so it is \
             refused; look for a safetensors version of this model",
            args.repo
        ),
        (None, None) => bail!(
            "{} has no *.safetensors file; its files: {}. --include GLOB takes others",
            args.repo,
            names.iter().take(20).map(String::as_str).collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Makes sure that a file is in the cache and is what its server says it is; its bytes.
fn fetch(api: &Api, repo: &ApiRepo, cache: &Cache, commit: &Repo, name: &str) -> anyhow::Result<u64> {
    let metadata = api.metadata(&repo.url(name))?;
    let digest = metadata.etag().to_owned();
    ensure!(
        is_hex(&digest, 64) || is_hex(&digest, 40),
        "the server gives {name} the ETag {digest:?}, expected a SHA-256 or a git hash to check it with"
    );
    ensure!(metadata.commit_hash() == commit.revision(), "the server gives {name} of another commit");
    let (size, blob) = (metadata.size() as u64, cache.repo(commit.clone()).blob_path(&digest));
    let part = blob.with_extension("part");
    let bar = progress_bar();
    for attempt in 1.. {
        // A part that is complete cannot be continued.
        if std::fs::metadata(&part).is_ok_and(|part| part.len() >= size) {
            std::fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
        }
        let result = match cache.repo(commit.clone()).get(name) {
            Some(path) => Ok(path),
            None => {
                bar.reset();
                repo.download_with_progress(name, bar.clone())
            }
        };
        match result {
            Ok(path) => {
                check(&path, &digest, size).inspect_err(|_| {
                    // What is wrong must not be found again.
                    let _ = (std::fs::remove_file(&path), std::fs::remove_file(&blob));
                })?;
                bar.finish_and_clear();
                return Ok(size);
            }
            Err(error) if attempt < ATTEMPTS && is_broken_off(&error) => {
                tracing::warn!("{name} broke off ({error}); going on");
            }
            Err(error) => return Err(error.into()),
        }
    }
    unreachable!("the last attempt returns")
}

/// Compares a file with its digest: SHA-256 of large files, git's hash of small ones.
fn check(path: &Path, digest: &str, size: u64) -> anyhow::Result<()> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let found_size = file.metadata()?.len();
    let found = if digest.len() == 64 {
        hash::<Sha256>(&mut file, b"")?
    } else {
        hash::<Sha1>(&mut file, format!("blob {found_size}\0").as_bytes())?
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    ensure!(
        found == digest,
        "{name} arrived damaged ({found_size} of {size} bytes, checksum {found}, expected {digest}) and was removed; pull again"
    );
    Ok(())
}

fn hash<D: Digest>(file: &mut File, prefix: &[u8]) -> anyhow::Result<String> {
    let mut hasher = D::new_with_prefix(prefix);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Whether to go on where a download stopped.
fn is_broken_off(error: &ApiError) -> bool {
    match error {
        ApiError::IoError(_) => true,
        ApiError::RequestError(error) => matches!(
            **error,
            ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::StatusCode(500..) | ureq::Error::Protocol(_)
        ),
        _ => false,
    }
}

/// An error of the network in words that help.
fn explain(error: ApiError, args: &PullArgs) -> anyhow::Error {
    let server = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".into());
    let ApiError::RequestError(cause) = &error else { return error.into() };
    match **cause {
        ureq::Error::StatusCode(401 | 403) => anyhow!(
            "{server} does not give {} to everybody: accept its licence there, and set HF_TOKEN or run `hf auth login` \
             (the same answer comes for models that do not exist)",
            args.repo
        ),
        ureq::Error::StatusCode(404) => {
            anyhow!("{server} has no model {} with revision {}", args.repo, args.revision)
        }
        ureq::Error::Io(_) | ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::Timeout(_) => {
            anyhow!(
                "cannot reach {server}: {cause}. Without a network, copy a model directory here and name it with --model; \
             HF_ENDPOINT names a mirror; what has arrived is kept for the next try"
            )
        }
        _ => anyhow!("{server} did not answer as Hugging Face does: {cause}"),
    }
}

/// Whether a name from the server stays below the folder it is joined to.
fn is_inside(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', '\0'])
        && PathBuf::from(name).components().all(|part| matches!(part, Component::Normal(_)))
}

fn is_hex(text: &str, n_digits: usize) -> bool {
    text.len() == n_digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn progress_bar() -> ProgressBar {
    let is_shown = std::io::stderr().is_terminal();
    let target = if is_shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    ProgressBar::with_draw_target(None, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(include: &[&str]) -> PullArgs {
        let include = include.iter().map(|pattern| pattern.to_string()).collect();
        PullArgs { repo: "a/b".into(), revision: "main".into(), include, json: false }
    }

    fn check(names: &[&str], include: &[&str], expected: Result<&[&str], &str>) {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        match (choose(&names, &args(include)), expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (found, expected) => panic!("{found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn only_what_a_model_needs() {
        let names = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.json", "q.gguf"];
        check(&names, &[], Ok(&["config.json", "model.safetensors"]));
        check(&names, &["*.gguf", "README.md"], Ok(&["README.md", "config.json", "model.safetensors", "q.gguf"]));
        check(&names, &["pytorch*"], Err("pytorch_model.bin is a pickle"));
        check(&["config.json", "pytorch_model.bin"], &[], Err("only pickles such as pytorch_model.bin"));
        check(&["config.json", "q.gguf"], &[], Err("--include GLOB"));
        check(&["config.json", "q.gguf"], &["q.gguf"], Ok(&["config.json", "q.gguf"]));
        for name in ["../x.json", "/etc/x.json", "a/../../x.json", "a\\..\\x.json", "", "./x.json"] {
            check(&[name, "model.safetensors"], &[], Err("outside the cache"));
        }
    }
}
