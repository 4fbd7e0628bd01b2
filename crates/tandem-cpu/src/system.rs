//! What the operating system says about this process.

/// Largest resident memory of this process so far, in bytes; 0 where the system does not tell.
pub fn peak_memory_bytes() -> u64 {
    // getrusage begins with the peak of the process that started this one.
    let own = std::fs::read_to_string("/proc/self/status").ok().and_then(|text| kilobytes(&text, "VmHWM:"));
    own.unwrap_or_else(peak_of_usage)
}

/// The value of a line such as `VmHWM:   1234 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

fn peak_of_usage() -> u64 {
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

/// Memory of this process that is resident now, in bytes; `None` where the system does not tell.
pub fn resident_memory_bytes() -> Option<u64> {
    kilobytes(&std::fs::read_to_string("/proc/self/smaps_rollup").ok()?, "Rss:")
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

/// Memory that new allocations can have without swapping, in bytes; `None` where the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    kilobytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// Pins all memory of this process, mapped files included, so that the system cannot take it back.
///
/// # Errors
/// The limit on locked memory (`ulimit -l`) is too small, or there is not enough memory.
#[cfg(unix)]
#[allow(unsafe_code)]
pub fn lock_memory() -> std::io::Result<()> {
    // SAFETY: mlockall changes no memory.
    match unsafe { libc::mlockall(libc::MCL_CURRENT) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Pins all memory of this process.
///
/// # Errors
/// Always: not built for this system.
#[cfg(not(unix))]
pub fn lock_memory() -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Threads to use when nobody says: one per core this process may run on.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
