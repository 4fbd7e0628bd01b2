//! Answers that can be continued by their ids: the last ones, in memory and, if there is a directory, on disk.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Answers at most.
const MAX_RESPONSES: usize = 1000;
/// Bytes of JSON at most, of all answers with their inputs.
const MAX_BYTES: usize = 64 << 20;

/// An answer and what it was given for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Stored {
    /// Items of the whole conversation before it.
    pub(crate) input: Vec<Value>,
    pub(crate) response: Value,
}

/// The kept answers; the oldest go first.
pub(crate) struct Store {
    inner: Mutex<Inner>,
    dir: Option<PathBuf>,
}

#[derive(Default)]
struct Inner {
    responses: HashMap<String, Kept>,
    /// Oldest first.
    order: VecDeque<String>,
    n_bytes: usize,
}

struct Kept {
    /// JSON text of a [`Stored`]: as values it would take many times its bytes.
    json: Box<[u8]>,
    /// Ids of its items.
    items: Vec<Box<str>>,
}

impl Kept {
    fn new(stored: &Stored, json: Vec<u8>) -> Kept {
        let output = stored.response["output"].as_array().into_iter().flatten();
        let ids = output.chain(&stored.input).filter_map(|item| item["id"].as_str());
        Kept { items: ids.map(Box::from).collect(), json: json.into() }
    }
}

impl Store {
    /// A store that keeps answers in `dir` as well; what is there already is known.
    pub(crate) fn new(dir: Option<PathBuf>) -> Store {
        let mut inner = Inner::default();
        if let Some(dir) = &dir {
            if let Err(error) = private_dir(dir) {
                tracing::warn!("answers are not kept in {}: {error}", dir.display());
            }
            let mut files: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().flatten().collect();
            files.sort_by_key(|file| file.metadata().and_then(|meta| meta.modified()).ok());
            for file in files {
                let path = file.path();
                let is_json = path.extension().is_some_and(|extension| extension == "json");
                let is_small = file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() < MAX_BYTES as u64);
                let Some(id) =
                    path.file_stem().and_then(|id| id.to_str()).filter(|id| is_json && is_small && is_id(id))
                else {
                    continue;
                };
                let Ok(bytes) = std::fs::read(&path) else { continue };
                if let Some(stored) = parse(&bytes) {
                    inner.put(id, Kept::new(&stored, bytes)).iter().for_each(|id| forget(dir, id));
                }
            }
        }
        Store { inner: Mutex::new(inner), dir }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Keeps an answer under its id.
    pub(crate) fn put(&self, id: &str, stored: &Stored) {
        let Ok(bytes) = serde_json::to_vec(stored) else { return };
        if bytes.len() > MAX_BYTES / 4 {
            return;
        }
        if let Some(dir) = &self.dir
            && let Err(error) = write(dir, id, &bytes)
        {
            tracing::warn!("an answer is not kept in {}: {error}", dir.display());
        }
        let gone = self.lock().put(id, Kept::new(stored, bytes));
        if let Some(dir) = &self.dir {
            gone.iter().for_each(|id| forget(dir, id));
        }
    }

    pub(crate) fn get(&self, id: &str) -> Option<Stored> {
        let json = self.lock().responses.get(id)?.json.clone();
        parse(&json)
    }

    /// Forgets an answer; false if it is not there.
    pub(crate) fn remove(&self, id: &str) -> bool {
        let is_there = self.lock().remove(id);
        if let Some(dir) = self.dir.as_ref().filter(|_| is_there) {
            forget(dir, id);
        }
        is_there
    }

    /// All items of the newest answer that holds this one, or was given for it.
    pub(crate) fn items_beside(&self, id: &str) -> Option<Vec<Value>> {
        let json = {
            let inner = self.lock();
            let mut newest_first = inner.order.iter().rev().filter_map(|id| inner.responses.get(id));
            newest_first.find(|kept| kept.items.iter().any(|item| **item == *id))?.json.clone()
        };
        let Stored { input, mut response } = parse(&json)?;
        let output = response["output"].as_array_mut().map(std::mem::take).unwrap_or_default();
        Some(output.into_iter().chain(input).collect())
    }
}

impl Inner {
    /// Returns the ids that went.
    fn put(&mut self, id: &str, kept: Kept) -> Vec<String> {
        self.remove(id);
        self.n_bytes += kept.json.len();
        self.responses.insert(id.to_owned(), kept);
        self.order.push_back(id.to_owned());
        let mut gone = vec![];
        while self.order.len() > MAX_RESPONSES || self.n_bytes > MAX_BYTES {
            let Some(oldest) = self.order.front().cloned() else { break };
            self.remove(&oldest);
            gone.push(oldest);
        }
        gone
    }

    fn remove(&mut self, id: &str) -> bool {
        let Some(kept) = self.responses.remove(id) else { return false };
        self.order.retain(|other| other != id);
        self.n_bytes -= kept.json.len();
        true
    }
}

fn parse(bytes: &[u8]) -> Option<Stored> {
    serde_json::from_slice(bytes).ok()
}

/// Ids become names of files.
fn is_id(id: &str) -> bool {
    id.starts_with("resp_") && id.len() < 100 && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Conversations are private.
fn private_dir(dir: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

fn write(dir: &Path, id: &str, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    if !is_id(id) {
        return Ok(());
    }
    let part = dir.join(format!("{id}.part"));
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(&part)?.write_all(bytes)?;
    std::fs::rename(&part, dir.join(format!("{id}.json")))
}

fn forget(dir: &Path, id: &str) {
    if is_id(id) {
        let _ = std::fs::remove_file(dir.join(format!("{id}.json")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stored(text: &str) -> Stored {
        let output = json!([{"id": format!("msg_{text}"), "content": text}]);
        Stored { input: vec![json!({"id": format!("item_{text}")})], response: json!({"output": output}) }
    }

    #[test]
    fn the_oldest_go_and_a_restart_finds_the_others() {
        let dir = std::env::temp_dir().join(format!("tandem-store-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let store = Store::new(Some(dir.clone()));
        for i in 0..MAX_RESPONSES + 5 {
            store.put(&format!("resp_{i}"), &stored(&i.to_string()));
        }
        assert!(store.get("resp_4").is_none() && store.get("resp_5").is_some());
        assert!(store.remove("resp_6") && !store.remove("resp_6"));
        let again = Store::new(Some(dir.clone()));
        assert!(again.get("resp_4").is_none() && again.get("resp_6").is_none());
        assert_eq!(again.get("resp_7").unwrap().input, stored("7").input);
        let item = |id: &str| again.items_beside(id).and_then(|items| items.into_iter().find(|item| item["id"] == id));
        assert_eq!(item("msg_7").unwrap()["content"], "7");
        assert!(item("item_7").is_some() && item("msg_4").is_none());
        assert!(!is_id("resp_../x") && !is_id("x"));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
