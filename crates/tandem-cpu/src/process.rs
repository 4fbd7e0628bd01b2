//! What this process gets of the machine: cores, memory of its control group, and which of its mapped pages are in memory.
//!
//! Everything is read from files of Linux, where they are; elsewhere nothing is known.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time in which threads of this process could have run and had no core, all threads added; zero where the system does
/// not tell.
pub fn run_delay() -> Duration {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Duration::ZERO };
    let delay = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()
    };
    Duration::from_nanos(tasks.flatten().filter_map(delay).sum())
}

/// The same of the calling thread alone.
pub fn own_run_delay() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split_ascii_whitespace().nth(1).and_then(|ns| ns.parse().ok()).unwrap_or(0))
}

/// Bytes that this process may pin in memory; `None` without a limit, which is so for those with the right to ignore it.
#[cfg(unix)]
#[allow(unsafe_code)]
pub fn lockable_bytes() -> Option<u64> {
    if may_pin_all() {
        return None;
    }
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes the struct that it is given.
    let done = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    (done == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Bytes that this process may pin in memory: no limit is known on this system.
#[cfg(not(unix))]
pub fn lockable_bytes() -> Option<u64> {
    None
}

/// Whether this process has CAP_IPC_LOCK of Linux.
#[cfg(unix)]
fn may_pin_all() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let word = text.lines().find_map(|line| line.strip_prefix("CapEff:")).map(str::trim);
    word.and_then(|word| u64::from_str_radix(word, 16).ok()).is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1)
}

/// Bytes of this process that are swapped out.
pub fn swapped_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmSwap:"));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Where a controller keeps the numbers of this process's control group, from the group itself up to the root.
fn group_dirs(controller: &str) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let roots = |line: &str| -> Option<(Vec<PathBuf>, String)> {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?.to_string());
        let root = Path::new("/sys/fs/cgroup");
        match controllers {
            "" => Some((vec![root.to_path_buf(), root.join("unified")], path)),
            list if list.split(',').any(|c| c == controller) => {
                Some((vec![root.join(list), root.join(controller)], path))
            }
            _ => None,
        }
    };
    let mut dirs = vec![];
    for (roots, path) in text.lines().filter_map(roots) {
        for root in roots {
            // Within a container the group's own path may not be there: its numbers are at the root.
            let own = root.join(path.trim_start_matches('/'));
            dirs.extend(own.ancestors().take_while(|dir| dir.starts_with(&root)).map(Path::to_path_buf));
        }
    }
    dirs
}

fn number(path: &Path) -> Option<u64> {
    // "max" is no number, and no limit.
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A line `name value` of a file.
fn field(path: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Memory of a control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// All that it may have.
    pub limit_bytes: u64,
    /// What it may still take: pages of files can be given back.
    pub available_bytes: u64,
}

/// The tightest limit on memory of the control groups that this process is in; `None` without one.
pub fn memory_limit() -> Option<MemoryLimit> {
    // Without a limit version 1 gives the largest number of pages.
    const NO_LIMIT: u64 = 1 << 60;
    let limit = |dir: PathBuf| {
        let limit_bytes = number(&dir.join("memory.max")).or_else(|| number(&dir.join("memory.limit_in_bytes")))?;
        let used = number(&dir.join("memory.current")).or_else(|| number(&dir.join("memory.usage_in_bytes")))?;
        let stat = dir.join("memory.stat");
        let files = ["inactive_file", "active_file"]
            .map(|name| field(&stat, &format!("total_{name}")).or_else(|| field(&stat, name)).unwrap_or(0));
        let available_bytes = limit_bytes.saturating_sub(used.saturating_sub(files[0] + files[1]));
        (limit_bytes < NO_LIMIT).then_some(MemoryLimit { limit_bytes, available_bytes })
    };
    group_dirs("memory").into_iter().filter_map(limit).min_by_key(|limit| limit.available_bytes)
}

/// Cores that a quota of this process's control groups leaves it; `None` without a quota.
pub fn cpu_quota() -> Option<f64> {
    let quota = |dir: PathBuf| -> Option<f64> {
        if let Ok(text) = fs::read_to_string(dir.join("cpu.max")) {
            let (quota, period) = text.trim().split_once(' ')?;
            return Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?);
        }
        let quota: f64 = fs::read_to_string(dir.join("cpu.cfs_quota_us")).ok()?.trim().parse().ok()?;
        (quota > 0.0).then_some(quota / number(&dir.join("cpu.cfs_period_us"))? as f64)
    };
    group_dirs("cpu").into_iter().filter_map(quota).reduce(f64::min)
}

/// Time in which a quota kept this process's control group from running.
pub fn throttled() -> Duration {
    let own = |dir: PathBuf| {
        let stat = dir.join("cpu.stat");
        let microseconds = field(&stat, "throttled_usec").map(|us| us * 1000);
        microseconds.or_else(|| field(&stat, "throttled_time"))
    };
    Duration::from_nanos(group_dirs("cpu").into_iter().filter_map(own).max().unwrap_or(0))
}

/// Windows of mapped files that are looked at: the whole of a large model would take seconds.
#[cfg(target_os = "linux")]
const N_WINDOWS: usize = 2048;
/// Bytes of a window.
#[cfg(target_os = "linux")]
const WINDOW: usize = 1 << 20;

/// The share of these files' mappings that is in memory; `None` if none is mapped, or the system does not tell. The paths
/// are those of the files themselves, without links. Of much, a sample is looked at.
#[cfg(target_os = "linux")]
pub fn resident_share(files: &[PathBuf]) -> Option<f64> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let ranges: Vec<(usize, usize)> = maps.lines().filter_map(|line| mapped_file(line, files)).collect();
    let total: usize = ranges.iter().map(|(start, end)| end - start).sum();
    if total == 0 {
        return None;
    }
    let every = (total / WINDOW / N_WINDOWS).max(1) * WINDOW;
    let (mut resident, mut seen) = (0, 0);
    for (start, end) in ranges {
        for window in (start..end).step_by(every) {
            let pages = pages_in_memory(window, WINDOW.min(end - window))?;
            seen += pages.len();
            resident += pages.iter().filter(|page| **page & 1 == 1).count();
        }
    }
    (seen > 0).then(|| resident as f64 / seen as f64)
}

/// The share of mapped files that is in memory: not known on this system.
#[cfg(not(target_os = "linux"))]
pub fn resident_share(_: &[PathBuf]) -> Option<f64> {
    None
}

/// The addresses of a line of /proc/self/maps, if it is one of `files`.
#[cfg(target_os = "linux")]
fn mapped_file(line: &str, files: &[PathBuf]) -> Option<(usize, usize)> {
    let path = Path::new(&line[line.find('/')?..]);
    if !files.iter().any(|file| file == path) {
        return None;
    }
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

/// One byte a page, whose lowest bit says that the page is in memory; `None` if nothing is mapped there any more.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn pages_in_memory(start: usize, bytes: usize) -> Option<Vec<u8>> {
    let page = crate::system::page_bytes();
    let mut pages = vec![0u8; bytes.div_ceil(page)];
    // SAFETY: mincore reads no memory at the address, which it checks, and writes one byte a page into `pages`.
    let done = unsafe { libc::mincore(start as *mut libc::c_void, bytes, pages.as_mut_ptr()) };
    (done == 0).then_some(pages)
}

pub use crate::system::lower_priority;

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_read() {
        let line = "7f0000001000-7f0000003000 r--s 00000000 08:01 42 /models/a b/model.safetensors";
        let files = |path: &str| [PathBuf::from(path)];
        let own = files("/models/a b/model.safetensors");
        assert_eq!(mapped_file(line, &own), Some((0x7f00_0000_1000, 0x7f00_0000_3000)));
        assert_eq!(mapped_file(line, &files("/models/a b")), None);
        assert_eq!(mapped_file("7f00-7f01 rw-p 00000000 00:00 0", &own), None);
    }

    #[test]
    fn a_file_that_was_just_written_is_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("weights");
        fs::write(&path, vec![1u8; 3 << 20]).unwrap();
        let file = fs::File::open(&path).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: nobody else knows of the file.
        let map = unsafe { memmap2::Mmap::map(&file).unwrap() };
        assert_eq!(map.iter().map(|byte| usize::from(*byte)).sum::<usize>(), 3 << 20);
        let files = [path];
        let share = resident_share(&files).unwrap();
        assert!(share > 0.99, "{share}");
        drop(map);
        assert_eq!(resident_share(&files), None);
    }

    #[test]
    fn a_thread_that_waits_for_a_core_is_seen() {
        let before = crate::system::cpu_time();
        // Twice as many as there are cores. Each looks at itself: the process's sum loses what ended threads had waited.
        let waited: Vec<Duration> = std::thread::scope(|scope| {
            let spinning = || {
                let start = std::time::Instant::now();
                while start.elapsed() < Duration::from_millis(60) {}
                own_run_delay()
            };
            let threads: Vec<_> = (0..2 * crate::system::default_threads()).map(|_| scope.spawn(spinning)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(waited.iter().any(|waited| *waited > Duration::from_millis(1)), "{waited:?}");
        assert!(crate::system::cpu_time() > before);
    }
}
