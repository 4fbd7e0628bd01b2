//! Mapped files that become shorter while they are in use.
//!
//! Reading beyond the new end is SIGBUS, which ends a process. Here it maps zeros in the place of what is gone and marks
//! the file; whoever used it asks [`check_mapped`] before a result counts.

#![allow(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use crate::checkpoint::CheckpointError;

/// Mappings watched at once; those beyond them end the process as they would without this.
const MAX_MAPS: usize = 4096;

/// A mapping as the signal handler sees it; `end` is 0 for a free place.
struct Place {
    start: AtomicUsize,
    end: AtomicUsize,
    is_damaged: AtomicBool,
}

static PLACES: [Place; MAX_MAPS] =
    [const { Place { start: AtomicUsize::new(0), end: AtomicUsize::new(0), is_damaged: AtomicBool::new(false) } };
        MAX_MAPS];
/// Whether any place was ever damaged.
static ANY_DAMAGED: AtomicBool = AtomicBool::new(false);
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(4096);
/// Paths of the places in use.
static PATHS: Mutex<Vec<(usize, PathBuf)>> = Mutex::new(Vec::new());
/// What handled the signal before, for faults that are not ours.
static BEFORE: Mutex<Option<libc::sigaction>> = Mutex::new(None);

/// Keeps a mapping watched while it lives.
#[derive(Debug)]
pub(crate) struct Watched(Option<usize>);

/// Watches the mapping of a file from now on.
pub(crate) fn watch(path: &Path, map: &[u8]) -> Watched {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(install);
    let mut paths = PATHS.lock().unwrap_or_else(PoisonError::into_inner);
    let free = PLACES.iter().position(|place| place.end.load(Ordering::Relaxed) == 0);
    let Some(i) = free.filter(|_| !map.is_empty()) else { return Watched(None) };
    let start = map.as_ptr() as usize;
    PLACES[i].is_damaged.store(false, Ordering::Relaxed);
    PLACES[i].start.store(start, Ordering::Relaxed);
    PLACES[i].end.store(start + map.len().next_multiple_of(PAGE_BYTES.load(Ordering::Relaxed)), Ordering::Release);
    paths.push((i, path.to_path_buf()));
    Watched(Some(i))
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(i) = self.0 {
            PLACES[i].end.store(0, Ordering::Release);
            PATHS.lock().unwrap_or_else(PoisonError::into_inner).retain(|(place, _)| *place != i);
        }
    }
}

/// Fails if a file that is mapped now became shorter, or could not be read, since it was opened.
///
/// # Errors
/// [`CheckpointError::Shrunk`], which stays.
pub fn check_mapped() -> Result<(), CheckpointError> {
    if !ANY_DAMAGED.load(Ordering::Acquire) {
        return Ok(());
    }
    let paths = PATHS.lock().unwrap_or_else(PoisonError::into_inner);
    match paths.iter().find(|(i, _)| PLACES[*i].is_damaged.load(Ordering::Acquire)) {
        Some((_, path)) => Err(CheckpointError::Shrunk { path: path.display().to_string() }),
        None => Ok(()),
    }
}

/// Lets the system take the memory of a part of a mapped file, which comes back from the file when it is read again. Anything
/// else stays as it is.
pub fn release_mapped(bytes: &[u8]) {
    let page = PAGE_BYTES.load(Ordering::Relaxed);
    let first = bytes.as_ptr() as usize;
    let (start, end) = (first.next_multiple_of(page), (first + bytes.len()) / page * page);
    let holds = |place: &Place| {
        place.end.load(Ordering::Acquire) >= end && place.start.load(Ordering::Relaxed) <= start && start < end
    };
    if PLACES.iter().any(holds) {
        // SAFETY: the pages lie in a mapping of a file that is there while `bytes` is borrowed, and that nobody writes to, so
        // that they come back with the same bytes. What the advice fails with changes nothing.
        let _ = unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

fn install() {
    // SAFETY: sysconf only reads; the action is zeroed plain data, then filled in, and the handler does what a handler may
    // (see there).
    unsafe {
        if let Ok(bytes @ 1..) = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)) {
            PAGE_BYTES.store(bytes, Ordering::Relaxed);
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, &action, &mut before) == 0 {
            *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        }
    }
}

/// Maps zeros where a file has ended. It only loads and stores atomics and calls mmap and sigaction, which take no locks.
extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the system passes a valid siginfo with SA_SIGINFO.
    let address = unsafe { (*info).si_addr() } as usize;
    let is_hit = |place: &&Place| {
        let end = place.end.load(Ordering::Acquire);
        end != 0 && (place.start.load(Ordering::Relaxed)..end).contains(&address)
    };
    if let Some(place) = PLACES.iter().find(is_hit) {
        let page = PAGE_BYTES.load(Ordering::Relaxed);
        let start = address / page * page;
        // SAFETY: the page lies in a mapping of ours that nobody writes to, and stays mapped, to zeros that nobody writes.
        let mapped = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                page,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped != libc::MAP_FAILED {
            place.is_damaged.store(true, Ordering::Release);
            ANY_DAMAGED.store(true, Ordering::Release);
            return;
        }
    }
    // Not ours: as it was before. The access is tried again and meets that. Where another thread holds the lock, the default.
    let before = BEFORE.try_lock().ok().and_then(|before| *before);
    // SAFETY: restoring an action that the system gave, or the default.
    unsafe {
        let mut action: libc::sigaction = before.unwrap_or_else(|| std::mem::zeroed());
        if before.is_none() {
            action.sa_sigaction = libc::SIG_DFL;
        }
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::checkpoint::MappedFile;

    #[test]
    fn a_file_that_shrinks_reads_as_zeros_and_is_an_error() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&[7; 300_000]).expect("written");
        let mapped = MappedFile::new(file.path(), file.as_file()).expect("mapped");
        let bytes = mapped.bytes();
        assert_eq!((bytes[299_999], check_mapped().is_ok()), (7, true));
        file.as_file().set_len(10).expect("cut");
        assert_eq!(bytes.iter().skip(10).map(|byte| u64::from(*byte)).sum::<u64>(), 0);
        let error = check_mapped().expect_err("noticed").to_string();
        assert!(error.contains(&file.path().display().to_string()), "{error}");
        release_mapped(&bytes);
        assert_eq!(bytes[3], 7, "what is released is read again");
        release_mapped(&[1; 9000]);
        drop((bytes, mapped));
        assert!(check_mapped().is_ok(), "nobody uses it any more");
    }
}
