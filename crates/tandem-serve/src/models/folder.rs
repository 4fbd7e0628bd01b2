//! The models of a folder: each folder with a model's files, or with folders that have (`OWNER/NAME`).

use std::path::{Path, PathBuf};

use super::pool::Spec;

/// Bytes of memory that a model in a directory will probably take, or why it cannot be loaded.
pub type CheckModel = Box<dyn Fn(&Path) -> Result<u64, String> + Send + Sync>;

/// Every model of the folder, broken ones with their error. What `known` has and is not broken is not checked again.
///
/// # Errors
/// The folder cannot be read.
pub(crate) fn models_of(folder: &Path, known: &[Spec], check: &CheckModel) -> std::io::Result<Vec<Spec>> {
    let mut specs = vec![];
    for (name, dir) in folders(folder)? {
        if has_model_files(&dir) {
            specs.push((name, dir));
            continue;
        }
        let inner: Vec<_> =
            folders(&dir).unwrap_or_default().into_iter().filter(|(_, dir)| has_model_files(dir)).collect();
        if inner.is_empty() {
            specs.push((name, dir));
        } else {
            specs.extend(inner.into_iter().map(|(last, dir)| (format!("{name}/{last}"), dir)));
        }
    }
    let spec = |(name, dir): (String, PathBuf)| {
        if let Some(known) = known.iter().find(|known| known.name == name && known.bytes.is_ok()) {
            return known.clone();
        }
        let bytes = match dir.to_str() {
            Some(_) => check(&dir),
            None => Err("its folder's name is not UTF-8; rename it".to_owned()),
        };
        Spec { name, dir, bytes }
    };
    Ok(specs.into_iter().map(spec).collect())
}

/// Folders in a folder, by name; hidden ones and those that are being written are left out.
fn folders(folder: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut found = vec![];
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        // Two names that are not UTF-8 stay two.
        let name = name.to_str().map_or_else(|| format!("{name:?}"), str::to_owned);
        if path.is_dir() && !name.starts_with('.') && !name.ends_with(".partial") {
            found.push((name, path));
        }
    }
    found.sort();
    Ok(found)
}

fn has_model_files(dir: &Path) -> bool {
    let is_weight = |path: &Path| path.extension().is_some_and(|e| e == "safetensors" || e == "gguf");
    dir.join("config.json").exists()
        || std::fs::read_dir(dir)
            .is_ok_and(|mut files| files.any(|file| file.is_ok_and(|file| is_weight(&file.path()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_model_once_and_broken_ones_with_their_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |path: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
            std::fs::write(path, "{}").expect("writable");
        };
        for path in [
            "good/config.json",
            "owner/one/config.json",
            "owner/two/model.safetensors",
            "owner/notes/readme.txt",
            "weights only/model.safetensors",
            "-odd name \"τ\"\n%2f/config.json",
            ".hidden/config.json",
            "new.partial/config.json",
            "file.txt",
            "empty/notes.txt",
        ] {
            write(path);
        }
        let check: CheckModel = Box::new(|dir| match dir.join("config.json").exists() {
            true => Ok(7),
            false => Err("no config.json".to_owned()),
        });
        let found = models_of(folder.path(), &[], &check).expect("readable");
        let seen: Vec<(&str, bool)> = found.iter().map(|spec| (&*spec.name, spec.bytes.is_ok())).collect();
        let expected = [
            ("-odd name \"τ\"\n%2f", true),
            ("empty", false),
            ("good", true),
            ("owner/one", true),
            ("owner/two", false),
            ("weights only", false),
        ];
        assert_eq!(seen, expected);
        // Broken ones are looked at again, others are not.
        let check: CheckModel = Box::new(|_| Ok(9));
        let again = models_of(folder.path(), &found, &check).expect("readable");
        let bytes: Vec<u64> = again.iter().map(|spec| *spec.bytes.as_ref().expect("whole")).collect();
        assert_eq!(bytes, [7, 9, 7, 7, 9, 9]);
        assert!(models_of(&folder.path().join("file.txt"), &[], &check).is_err());
    }
}
