//! Finding a model's directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The model that ships with the project.
const BUNDLED: &str = "models/fable-30m-MXFP4-Q8";

/// The directory of a model: the bundled one if there is no name, a path, or a Hugging Face id in the local cache.
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
    if path.exists() {
        bail!("{name} has no config.json; --model takes a model directory or a Hugging Face id");
    }
    let is_id = name.split('/').count() == 2 && !name.starts_with(['.', '/', '~']);
    if !is_id {
        bail!("{name} does not exist; --model takes a model directory or a Hugging Face id (owner/name)");
    }
    let cache = hugging_face_cache().context("neither HF_HOME nor HOME is set, so there is no Hugging Face cache")?;
    let repo = cache.join(format!("models--{}", name.replace('/', "--")));
    snapshot(&repo).with_context(|| {
        format!(
            "{name} is neither a directory nor in the Hugging Face cache at {}; `tandem pull {name}` gets it",
            cache.display()
        )
    })
}

/// Hugging Face's cache of models; `None` when no variable says where it is.
pub fn hugging_face_cache() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HF_HUB_CACHE")
        .or_else(|| var("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| var("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

/// The snapshot that `refs/main` names, else the only one with a config.json.
fn snapshot(repo: &Path) -> Option<PathBuf> {
    let snapshots = repo.join("snapshots");
    if let Ok(revision) = std::fs::read_to_string(repo.join("refs/main")) {
        let dir = snapshots.join(revision.trim());
        if dir.join("config.json").exists() {
            return Some(dir);
        }
    }
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(&snapshots)
        .ok()?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|dir| dir.join("config.json").exists())
        .collect();
    dirs.sort();
    dirs.pop()
}

/// Next to the working directory or above the executable, as in a clone.
fn bundled_model() -> anyhow::Result<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    std::iter::once(Path::new(""))
        .chain(executable.ancestors())
        .map(|dir| dir.join(BUNDLED))
        .find(|dir| dir.join("config.json").exists())
        .with_context(|| format!("the bundled model {BUNDLED} was not found; name one with --model DIR"))
}
