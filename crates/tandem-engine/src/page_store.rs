//! Cache pages on disk, so that a restart need not run old prompts again.
//!
//! One file per full page, named by its hash; the model's fingerprint names the folder. A file that cannot be read, or
//! whose checksum is wrong, is removed and counts as missing: the cache may be deleted at any time.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::block_manager::PageHash;

/// Pages that may wait to be written; more are dropped. Removals never wait: they are names, of pages that are there.
const QUEUE: usize = 64;
/// Bytes of the checksum after a page's own.
const CHECKSUM: usize = 32;

/// A folder of pages.
pub struct PageStore {
    dir: PathBuf,
    /// Bytes of each page that is on disk or on its way there.
    sizes: HashMap<PageHash, u64>,
    /// Oldest first.
    order: VecDeque<PageHash>,
    total_bytes: u64,
    max_bytes: u64,
    /// Takes pages to write, and names of pages to remove, in order.
    writer: Option<Sender<(PathBuf, Option<Vec<u8>>)>>,
    /// Messages that the writer has not finished.
    n_queued: Arc<AtomicUsize>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl PageStore {
    /// Opens or makes the folder `dir/fingerprint`; the oldest pages go when there are more than `max_bytes`.
    ///
    /// # Errors
    /// The folder cannot be made or listed.
    pub fn open(dir: &Path, fingerprint: &str, max_bytes: u64) -> std::io::Result<PageStore> {
        let dir = dir.join(fingerprint);
        std::fs::create_dir_all(&dir)?;
        let mut found: Vec<(SystemTime, PageHash, u64)> = vec![];
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            if let (Some(hash), Ok(meta)) = (entry.file_name().to_str().and_then(parse_name), entry.metadata()) {
                found.push((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), hash, meta.len()));
            }
        }
        found.sort();
        let (sender, receiver) = channel::<(PathBuf, Option<Vec<u8>>)>();
        let n_queued = Arc::new(AtomicUsize::new(0));
        let n_unfinished = Arc::clone(&n_queued);
        let thread = std::thread::Builder::new().name("tandem-pages".into()).spawn(move || {
            for (path, bytes) in receiver {
                let result = match bytes {
                    Some(bytes) => write_file(&path, bytes),
                    None => std::fs::remove_file(&path),
                };
                n_unfinished.fetch_sub(1, Ordering::Relaxed);
                if let Err(error) = result {
                    tracing::warn!("cannot write or remove {}: {error}", path.display());
                }
            }
        })?;
        let mut store = PageStore {
            dir,
            total_bytes: found.iter().map(|f| f.2).sum(),
            sizes: found.iter().map(|f| (f.1, f.2)).collect(),
            order: found.iter().map(|f| f.1).collect(),
            max_bytes,
            writer: Some(sender),
            n_queued,
            thread: Some(thread),
        };
        store.shrink();
        Ok(store)
    }

    /// Pages on disk.
    pub fn n_pages(&self) -> usize {
        self.sizes.len()
    }

    /// Whether a page is there.
    pub fn contains(&self, hash: &PageHash) -> bool {
        self.sizes.contains_key(hash)
    }

    /// What was written for `hash`.
    pub fn read(&mut self, hash: &PageHash) -> Option<Vec<u8>> {
        if !self.contains(hash) {
            return None;
        }
        let path = self.path(hash);
        let checked = std::fs::read(&path).ok().and_then(|mut bytes| {
            let content = bytes.len().checked_sub(CHECKSUM)?;
            (Sha256::digest(&bytes[..content])[..] == bytes[content..]).then(|| {
                bytes.truncate(content);
                bytes
            })
        });
        if checked.is_none() {
            self.order.retain(|h| h != hash);
            self.forget(hash);
        }
        checked
    }

    /// Whether the disk keeps up: otherwise [`PageStore::write`] does nothing.
    pub fn has_room(&self) -> bool {
        self.n_queued.load(Ordering::Relaxed) < QUEUE
    }

    /// Writes a page in the background, unless it is there or the disk does not keep up.
    pub fn write(&mut self, hash: PageHash, bytes: Vec<u8>) {
        let size = (bytes.len() + CHECKSUM) as u64;
        if self.contains(&hash) || size > self.max_bytes || !self.has_room() {
            return;
        }
        self.send((self.path(&hash), Some(bytes)));
        self.sizes.insert(hash, size);
        self.order.push_back(hash);
        self.total_bytes += size;
        self.shrink();
    }

    fn shrink(&mut self) {
        while self.total_bytes > self.max_bytes {
            let Some(oldest) = self.order.pop_front() else { break };
            self.forget(&oldest);
        }
    }

    /// Removes a page that is no more in `order`.
    fn forget(&mut self, hash: &PageHash) {
        if let Some(size) = self.sizes.remove(hash) {
            self.total_bytes -= size;
            self.send((self.path(hash), None));
        }
    }

    fn send(&self, message: (PathBuf, Option<Vec<u8>>)) {
        if let Some(writer) = &self.writer {
            self.n_queued.fetch_add(1, Ordering::Relaxed);
            let _ = writer.send(message);
        }
    }

    fn path(&self, hash: &PageHash) -> PathBuf {
        let mut name = String::with_capacity(70);
        for byte in hash {
            name.push_str(&format!("{byte:02x}"));
        }
        self.dir.join(name + ".page")
    }
}

impl Drop for PageStore {
    /// Waits for the pages that are being written.
    fn drop(&mut self) {
        self.writer = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn parse_name(name: &str) -> Option<PageHash> {
    let digits = name.strip_suffix(".page")?;
    let mut hash = PageHash::default();
    if digits.len() != 64 || !digits.is_ascii() {
        return None;
    }
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(hash)
}

/// Writes a page and its checksum beside and renames, so that a crash leaves no half page under its name.
fn write_file(path: &Path, mut bytes: Vec<u8>) -> std::io::Result<()> {
    let digest = Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest);
    let beside = path.with_extension("part");
    std::fs::File::create(&beside)?.write_all(&bytes)?;
    std::fs::rename(beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_survive_a_restart_and_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let page = |n: u8| ([n; 32], vec![n; 100]);
        let mut store = PageStore::open(dir.path(), "model", 300).unwrap();
        for n in 1..=3 {
            let (hash, bytes) = page(n);
            store.write(hash, bytes);
        }
        drop(store);
        let mut store = PageStore::open(dir.path(), "model", 300).unwrap();
        assert_eq!(store.n_pages(), 2, "132 bytes each with the checksum: the oldest of three had to go");
        assert_eq!(store.read(&page(2).0), Some(page(2).1));
        let path = store.path(&page(3).0);
        std::fs::write(&path, b"damaged, and long enough to hold a checksum of some kind").unwrap();
        assert_eq!(store.read(&page(3).0), None);
        assert!(!store.contains(&page(3).0));
        drop(store);
        assert!(!path.exists());
        assert_eq!(PageStore::open(dir.path(), "other model", 300).unwrap().n_pages(), 0);
    }
}
