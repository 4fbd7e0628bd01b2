//! The bundled model inside the program (feature `bundled-model`): written to the user's cache when it is first used, since
//! weights are mapped from files.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::model_dir::{BUNDLED, user_cache};

#[cfg(feature = "bundled-model")]
fn files() -> &'static [(&'static str, &'static [u8])] {
    macro_rules! files {
        ($($name:literal)*) => {
            &[$(($name, include_bytes!(concat!("../../../models/fable-30m-MXFP4-Q8/", $name)))),*]
        };
    }
    files!("tokenizer.json" "tokenizer_config.json" "generation_config.json" "model.safetensors" "config.json")
}

#[cfg(not(feature = "bundled-model"))]
fn files() -> &'static [(&'static str, &'static [u8])] {
    &[]
}

/// The folder of the bundled model, if it is inside the program.
///
/// # Errors
/// There is no cache, or it cannot be written.
pub(crate) fn unpacked() -> anyhow::Result<Option<PathBuf>> {
    if files().is_empty() {
        return Ok(None);
    }
    let cache = user_cache();
    let cache = cache.context("neither XDG_CACHE_HOME nor HOME is set, so the bundled model cannot be unpacked")?;
    let name = Path::new(BUNDLED).file_name().unwrap_or_default();
    let folder = cache.join("tandem").join(name);
    let failed =
        || format!("cannot unpack the bundled model to {}; XDG_CACHE_HOME names another place", folder.display());
    unpack(files(), &folder).with_context(failed)?;
    Ok(Some(folder))
}

/// Writes files that are not there, or have another size, each under its name only when it is whole.
fn unpack(files: &[(&str, &[u8])], folder: &Path) -> std::io::Result<()> {
    let is_there = |path: &Path, content: &[u8]| path.metadata().is_ok_and(|found| found.len() == content.len() as u64);
    for (name, content) in files.iter().filter(|(name, content)| !is_there(&folder.join(name), content)) {
        std::fs::create_dir_all(folder)?;
        // Another process may do the same at the same time.
        let part = folder.join(format!("{name}.{}", std::process::id()));
        std::fs::write(&part, content)?;
        std::fs::rename(&part, folder.join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_written_once_and_repaired() {
        let dir = tempfile::TempDir::new().expect("a folder");
        let folder = dir.path().join("a/b");
        let files: &[(&str, &[u8])] = &[("x", b"one"), ("y", b"")];
        let names = || std::fs::read_dir(&folder).expect("there").count();
        for _ in 0..2 {
            unpack(files, &folder).expect("written");
            assert_eq!((std::fs::read(folder.join("x")).expect("there"), names()), (b"one".to_vec(), 2));
        }
        std::fs::write(folder.join("x"), "cut").and_then(|()| std::fs::write(folder.join("x"), "o")).expect("writable");
        unpack(files, &folder).expect("written");
        assert_eq!((std::fs::read(folder.join("x")).expect("there"), names()), (b"one".to_vec(), 2));
        std::fs::write(dir.path().join("file"), "").expect("writable");
        assert!(unpack(files, &dir.path().join("file/below")).is_err());
    }
}
