//! Finding a model's directory, and Hugging Face's cache.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The model that ships with the project.
pub(crate) const BUNDLED: &str = "models/fable-30m-MXFP4-Q8";

/// The directory of a model: the bundled one if there is no name, a path, or a Hugging Face id in the local cache, perhaps
/// with a branch, tag or commit (`owner/name@revision`).
///
/// # Errors
/// There is no such directory, or it holds no model.
pub fn model_dir(name: Option<&str>) -> anyhow::Result<PathBuf> {
    let Some(name) = name else {
        return bundled_model();
    };
    let path = Path::new(name);
    if path.join("config.json").exists() {
        return Ok(path.to_path_buf());
    }
    if path.is_file() {
        bail!("{name} is a file; --model takes a model directory or a Hugging Face id");
    }
    if path.exists() {
        bail!("{name} has no config.json; --model takes a model directory or a Hugging Face id");
    }
    let (id, revision) = name.split_once('@').map_or((name, None), |(id, revision)| (id, Some(revision)));
    let is_inside = |revision: &str| revision.split('/').all(|part| !matches!(part, "" | "." | ".."));
    let is_id = id.split('/').count() == 2 && !id.starts_with(['.', '/', '~']) && revision.is_none_or(is_inside);
    if !is_id {
        bail!("{name} does not exist; --model takes a model directory or a Hugging Face id (owner/name)");
    }
    let cache = hugging_face_cache().context("neither HF_HOME nor HOME is set, so there is no Hugging Face cache")?;
    let repo = cache.join(format!("models--{}", id.replace('/', "--")));
    snapshot(&repo, revision).with_context(|| {
        let get = revision.map_or_else(String::new, |revision| format!(" --revision {revision}"));
        format!(
            "{name} is neither a directory nor in the Hugging Face cache at {}; `tandem pull {id}{get}` gets it, and so does --yes",
            cache.display()
        )
    })
}

/// Where models from Hugging Face are kept, found as its own library finds it.
pub fn hugging_face_cache() -> Option<PathBuf> {
    path_variable("HF_HUB_CACHE")
        .or_else(|| path_variable("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| hugging_face_home().map(|home| home.join("hub")))
}

/// The user's token, if there is one.
pub fn hugging_face_token() -> Option<String> {
    let variable = |name| std::env::var(name).ok();
    let file = || path_variable("HF_TOKEN_PATH").or_else(|| hugging_face_home().map(|home| home.join("token")));
    let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
    let token = token.filter(|token| !token.trim().is_empty()).or_else(|| std::fs::read_to_string(file()?).ok())?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

fn hugging_face_home() -> Option<PathBuf> {
    path_variable("HF_HOME").or_else(|| user_cache().map(|cache| cache.join("huggingface")))
}

/// Where programs keep what they can get again.
pub(crate) fn user_cache() -> Option<PathBuf> {
    path_variable("XDG_CACHE_HOME").or_else(|| home().map(|home| home.join(".cache")))
}

fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from)
}

/// A variable that names a folder; `~` stands for the home directory, `$NAME` and `${NAME}` for other variables.
fn path_variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
    let Some(text) = value.to_str() else { return Some(PathBuf::from(value)) };
    let variable = |name: &str| std::env::var(name).ok();
    let expanded = expand(text, &variable);
    Some(match (expanded.strip_prefix('~'), home()) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => PathBuf::from(expanded),
    })
}

/// Puts values in the place of `$NAME` and `${NAME}`; names without a value stay as they are.
fn expand(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, tail) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some(braced) => braced,
            None => after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len())),
        };
        match variable(name).filter(|_| !name.is_empty()) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[before.len()..rest.len() - tail.len()]),
        }
        rest = tail;
    }
    out + rest
}

/// The snapshot of a revision: that which `refs` names so, else the commit itself. Without one that of `main`, else the only
/// one with a config.json.
fn snapshot(repo: &Path, revision: Option<&str>) -> Option<PathBuf> {
    let snapshots = repo.join("snapshots");
    let found = |dir: PathBuf| Some(dir).filter(|dir| dir.join("config.json").exists());
    if let Ok(commit) = std::fs::read_to_string(repo.join("refs").join(revision.unwrap_or("main")))
        && let Some(dir) = found(snapshots.join(commit.trim()))
    {
        return Some(dir);
    }
    if let Some(commit) = revision {
        return found(snapshots.join(commit));
    }
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(&snapshots)
        .ok()?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|dir| dir.join("config.json").exists())
        .collect();
    // Of several, nothing says which is meant.
    dirs.pop().filter(|_| dirs.is_empty())
}

/// Next to the working directory or above the executable, as in a clone or a release's archive; else inside the program.
fn bundled_model() -> anyhow::Result<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    let found = std::iter::once(Path::new(""))
        .chain(executable.ancestors())
        .map(|dir| dir.join(BUNDLED))
        .find(|dir| dir.join("config.json").exists());
    if let Some(dir) = found {
        return Ok(dir);
    }
    crate::bundled::unpacked()?.with_context(|| {
        format!(
            "no model is named, and the bundled {BUNDLED} is only in a clone of the repository; name a directory with \
             --model DIR, or let --model OWNER/NAME get one from Hugging Face (`tandem inspect OWNER/NAME` tells its size)"
        )
    })
}
