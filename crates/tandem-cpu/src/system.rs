//! What the operating system says about this process.

/// Largest resident memory of this process so far, in bytes; 0 where the system does not tell.
pub fn peak_memory_bytes() -> u64 {
    resource_usage().map_or(0, |usage| {
        // Linux counts kilobytes, macOS bytes.
        let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
        usage.ru_maxrss as u64 * unit
    })
}

/// Major page faults of this process so far: reads from the disk that a memory access had to wait for.
pub fn major_page_faults() -> u64 {
    resource_usage().map_or(0, |usage| usage.ru_majflt as u64)
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn resource_usage() -> Option<libc::rusage> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage writes the struct it is given, which is zeroed and so valid whatever it writes.
    unsafe { (libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) == 0).then(|| usage.assume_init()) }
}

#[cfg(not(unix))]
fn resource_usage() -> Option<NoUsage> {
    None
}

#[cfg(not(unix))]
struct NoUsage {
    ru_maxrss: i64,
    ru_majflt: i64,
}

/// Threads to use when nobody says: one per core this process may run on.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
