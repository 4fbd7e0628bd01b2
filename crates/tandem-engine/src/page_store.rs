//! Cache pages on disk, so that a restart need not run old prompts again.
//!
//! One file per full page, named by its hash; the model's fingerprint names the folder. A file that cannot be read, or
//! whose checksum is wrong, is removed and counts as missing: the cache may be deleted at any time. The checksum is of the
//! model's and the page's name too, so that a page is not taken for another.
//!
//! Pages hold what people wrote: folder and files are for their owner alone, and nothing else than the owner's regular
//! files is read.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::block_manager::PageHash;
use crate::private::{self, is_own};

/// Pages that may wait to be written; more are dropped. Removals never wait: they are names, of pages that are there.
const QUEUE: usize = 64;
/// Bytes of the checksum after a page's own.
const CHECKSUM: usize = 32;

/// A folder of pages.
pub struct PageStore {
    dir: PathBuf,
    /// Names the model and the numerics.
    fingerprint: String,
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
    /// The folder cannot be made or listed, is a link, or belongs to somebody else.
    pub fn open(dir: &Path, fingerprint: &str, max_bytes: u64) -> std::io::Result<PageStore> {
        let dir = dir.join(fingerprint);
        private::create_dir_all(&dir)?;
        let meta = dir.symlink_metadata()?;
        if !meta.is_dir() || !is_own(&meta) {
            let message = format!("{} is a link or belongs to another user; choose another folder", dir.display());
            return Err(Error::new(ErrorKind::PermissionDenied, message));
        }
        private::make_private(&dir, &meta)?;
        let mut found: Vec<(SystemTime, PageHash, u64)> = vec![];
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            let (name, path) = (entry.file_name(), entry.path());
            // What a run that was ended left half written.
            if path.extension().is_some_and(|extension| extension == "part") {
                let _ = std::fs::remove_file(&path);
            }
            // Without following links.
            let (Some(hash), Ok(meta)) = (name.to_str().and_then(parse_name), entry.metadata()) else { continue };
            if !meta.is_file() || !is_own(&meta) {
                tracing::warn!("{} is no regular file of this user: it is not read", path.display());
                continue;
            }
            private::make_private(&path, &meta)?;
            found.push((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), hash, meta.len()));
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
            fingerprint: fingerprint.to_string(),
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
        let size = *self.sizes.get(hash)?;
        let checked = read_file(&self.path(hash), size).ok().and_then(|mut bytes| {
            let content = bytes.len().checked_sub(CHECKSUM)?;
            (self.digest(hash, &bytes[..content])[..] == bytes[content..]).then(|| {
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
        let mut bytes = bytes;
        let digest = self.digest(&hash, &bytes);
        bytes.extend_from_slice(&digest);
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

    /// Of a page and its name.
    fn digest(&self, hash: &PageHash, content: &[u8]) -> [u8; CHECKSUM] {
        let mut hasher = Sha256::new_with_prefix(b"tandem cache page\0");
        for part in [self.fingerprint.as_bytes(), b"\0", hash, content] {
            hasher.update(part);
        }
        hasher.finalize().into()
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

/// Writes a page beside and renames, so that a crash leaves no half page under its name.
fn write_file(path: &Path, bytes: Vec<u8>) -> std::io::Result<()> {
    let beside = path.with_extension("part");
    // Never through what is there: a new file of our own.
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    private::create_new(&beside)?.write_all(&bytes)?;
    std::fs::rename(beside, path)
}

/// Reads a file of `size` bytes; neither a link nor a pipe, of which the end may never come.
fn read_file(path: &Path, size: u64) -> std::io::Result<Vec<u8>> {
    let file = private::open_itself(path)?;
    check_file(&file, size)?;
    let mut bytes = Vec::with_capacity(size as usize);
    file.take(size).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn check_file(file: &File, size: u64) -> std::io::Result<()> {
    let meta = file.metadata()?;
    match meta.is_file() && is_own(&meta) && meta.len() == size {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::InvalidData, "not a regular file of this user, or of another length")),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

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

    /// Everything that may stand in a page's place but the page itself.
    #[test]
    fn only_the_page_itself_is_read() {
        let hashes = [[1; 32], [2; 32]];
        let check = |what: &str, spoil: &dyn Fn(&Path, &Path)| {
            let dir = tempfile::tempdir().unwrap();
            let mut store = PageStore::open(dir.path(), "model", 1 << 20).unwrap();
            hashes.iter().for_each(|hash| store.write(*hash, vec![hash[0]; 1000]));
            let paths = hashes.map(|hash| store.path(&hash));
            drop(store);
            // Spoiled before the store is opened, and while it is open.
            for before in [true, false] {
                let copies = paths.each_ref().map(|path| std::fs::read(path).unwrap());
                let mut store = (!before).then(|| PageStore::open(dir.path(), "model", 1 << 20).unwrap());
                spoil(&paths[0], &paths[1]);
                let store = store.get_or_insert_with(|| PageStore::open(dir.path(), "model", 1 << 20).unwrap());
                assert_eq!(store.read(&hashes[0]), None, "{what}, before: {before}");
                drop(std::mem::replace(store, PageStore::open(dir.path(), "other", 1).unwrap()));
                for (path, bytes) in paths.iter().zip(copies) {
                    let _ = std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path));
                    std::fs::write(path, bytes).unwrap();
                }
            }
        };
        check("another page of the model", &|a, b| {
            std::fs::copy(b, a).unwrap();
        });
        check("swapped", &|a, b| {
            let (of_a, of_b) = (std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
            std::fs::write(a, of_b).unwrap();
            std::fs::write(b, of_a).unwrap();
        });
        check("a link to a page", &|a, b| {
            std::fs::remove_file(a).unwrap();
            std::os::unix::fs::symlink(b, a).unwrap();
        });
        check("a link without an end", &|a, _| {
            std::fs::remove_file(a).unwrap();
            std::os::unix::fs::symlink("/dev/zero", a).unwrap();
        });
        check("a pipe", &|a, _| {
            std::fs::remove_file(a).unwrap();
            let made = std::process::Command::new("mkfifo").arg(a).status().unwrap();
            assert!(made.success());
        });
        check("a folder", &|a, _| {
            std::fs::remove_file(a).unwrap();
            std::fs::create_dir(a).unwrap();
        });
        check("cut short", &|a, _| File::options().write(true).open(a).unwrap().set_len(500).unwrap());
        check("longer", &|a, _| File::options().write(true).open(a).unwrap().set_len(5000).unwrap());
        check("empty", &|a, _| std::fs::write(a, b"").unwrap());
        check("with a checksum of its content alone", &|a, _| {
            let content = vec![9u8; 1000];
            std::fs::write(a, [content.as_slice(), &Sha256::digest(&content)].concat()).unwrap();
        });
    }

    #[test]
    fn pages_are_for_their_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        std::fs::create_dir(&folder).unwrap();
        std::fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        std::fs::write(folder.join("left.part"), b"half").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
        let mut store = PageStore::open(dir.path(), "model", 1 << 20).unwrap();
        assert!(!folder.join("left.part").exists());
        store.write([1; 32], vec![1; 100]);
        let path = store.path(&[1; 32]);
        drop(store);
        assert_eq!((mode(&folder), mode(&path)), (0o700, 0o600));
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(PageStore::open(dir.path(), "model", 1 << 20).unwrap().n_pages(), 1);
        assert_eq!(mode(&path), 0o600);
        // A folder that is a link.
        std::os::unix::fs::symlink(&folder, dir.path().join("link")).unwrap();
        assert!(PageStore::open(dir.path(), "link", 1 << 20).is_err());
    }
}
