//! What the operating system says about this process.

/// Largest resident memory of this process so far, in bytes; 0 where the system does not tell.
pub fn peak_memory_bytes() -> u64 {
    // getrusage begins with the peak of the process that started this one.
    platform::peak_memory_bytes().unwrap_or_else(peak_of_usage)
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
    platform::resident_memory_bytes()
}

/// Processor time of all threads of this process so far; zero where the system does not tell.
#[cfg(unix)]
pub fn cpu_time() -> std::time::Duration {
    let time = |t: libc::timeval| std::time::Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    resource_usage().map_or_else(Default::default, |usage| time(usage.ru_utime) + time(usage.ru_stime))
}

/// Processor time of all threads of this process so far; zero where the system does not tell.
#[cfg(not(unix))]
pub fn cpu_time() -> std::time::Duration {
    platform::cpu_time()
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

/// Memory that new allocations can have without swapping, in bytes: what the machine has, or what a control group leaves of
/// it; `None` where the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    let machine = platform::available_memory_bytes();
    match (machine, crate::process::memory_limit().map(|limit| limit.available_bytes)) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

/// Memory that a GPU may keep of a machine whose processor and GPU share it, in bytes: a limit of its owner's, where there
/// is one.
pub fn wired_limit_bytes() -> Option<u64> {
    platform::wired_limit_bytes()
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

/// Lets the allocator keep little of what is freed from now on. glibc's bounds grow with what was freed before: up to 64 MB
/// in each thread's arena, which not even [`return_freed_memory`] reaches.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn keep_little_freed_memory() {
    // SAFETY: mallopt changes bounds of the allocator and no memory.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 4 << 20);
    }
}

/// Lets the allocator keep little of what is freed: those of other systems do it by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_little_freed_memory() {}

/// Gives memory that was freed back to the system, where the allocator would keep it for later.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn return_freed_memory() {
    // SAFETY: malloc_trim touches free memory only, and takes the allocator's locks.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Gives memory that was freed back to the system: allocators of other systems do it by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn return_freed_memory() {}

/// Threads to use when nobody says: one per core this process may run on, and of Apple's cores only the fast ones: a fork is
/// done when its slowest thread is.
pub fn default_threads() -> usize {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    platform::performance_cores().map_or(all, |fast| all.min(fast).max(1))
}

/// Bytes of a page of memory.
pub fn page_bytes() -> usize {
    platform::page_bytes().unwrap_or(4096)
}

/// Asks the system to run the calling thread on fast cores, where it tells threads apart.
pub fn prefer_fast_cores() {
    platform::prefer_fast_cores();
}

/// Gives the calling thread the lowest priority, so that it never takes a core from one that computes.
pub fn lower_priority() {
    platform::lower_priority();
}

#[cfg(all(unix, not(target_os = "macos")))]
#[allow(unsafe_code)]
mod platform {
    pub(super) fn performance_cores() -> Option<usize> {
        None
    }

    pub(super) fn page_bytes() -> Option<usize> {
        // SAFETY: sysconf only answers.
        usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()
    }

    pub(super) fn prefer_fast_cores() {}

    pub(super) fn lower_priority() {
        // SAFETY: this changes the priority of a thread, on Linux of the calling one, and no memory.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::setpriority(libc::PRIO_PROCESS, 0, 19);
        }
    }

    pub(super) fn peak_memory_bytes() -> Option<u64> {
        kilobytes("/proc/self/status", "VmHWM:")
    }

    pub(super) fn resident_memory_bytes() -> Option<u64> {
        kilobytes("/proc/self/smaps_rollup", "Rss:")
    }

    pub(super) fn available_memory_bytes() -> Option<u64> {
        kilobytes("/proc/meminfo", "MemAvailable:")
    }

    pub(super) fn wired_limit_bytes() -> Option<u64> {
        None
    }

    /// A line such as `MemAvailable:  1024 kB`, in bytes.
    fn kilobytes(path: &str, name: &str) -> Option<u64> {
        let text = std::fs::read_to_string(path).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
    }
}

#[cfg(target_os = "macos")]
#[allow(unsafe_code)]
mod platform {
    use std::ffi::CStr;

    pub(super) fn performance_cores() -> Option<usize> {
        sysctl(c"hw.perflevel0.logicalcpu").and_then(|n| usize::try_from(n).ok())
    }

    pub(super) fn page_bytes() -> Option<usize> {
        // SAFETY: sysconf only answers.
        usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()
    }

    pub(super) fn prefer_fast_cores() {
        set_quality(libc::qos_class_t::QOS_CLASS_USER_INTERACTIVE);
    }

    pub(super) fn lower_priority() {
        set_quality(libc::qos_class_t::QOS_CLASS_BACKGROUND);
    }

    fn set_quality(class: libc::qos_class_t) {
        // SAFETY: this changes how the calling thread is scheduled, and no memory.
        let _ = unsafe { libc::pthread_set_qos_class_self_np(class, 0) };
    }

    pub(super) fn peak_memory_bytes() -> Option<u64> {
        None
    }

    pub(super) fn resident_memory_bytes() -> Option<u64> {
        let mut info = std::mem::MaybeUninit::<libc::proc_taskinfo>::zeroed();
        let size = size_of::<libc::proc_taskinfo>() as i32;
        // SAFETY: the call writes at most `size` bytes of the struct, which is valid whatever they are.
        unsafe {
            let to = info.as_mut_ptr().cast();
            let written = libc::proc_pidinfo(libc::getpid(), libc::PROC_PIDTASKINFO, 0, to, size);
            (written == size).then(|| info.assume_init().pti_resident_size)
        }
    }

    /// Memory that is not wired and not in the compressor: the system takes pages of files and idle programs back when they
    /// are asked for.
    pub(super) fn available_memory_bytes() -> Option<u64> {
        let total = sysctl(c"hw.memsize")?;
        let free = sysctl(c"vm.page_free_count")?;
        let reusable = sysctl(c"vm.page_pageable_external_count").unwrap_or(0);
        let purgeable = sysctl(c"vm.page_purgeable_count").unwrap_or(0);
        let page = page_bytes()? as u64;
        Some(((free + reusable + purgeable) * page).min(total))
    }

    /// `iogpu.wired_limit_mb`, or three quarters of the memory where it is 0, the system's own choice.
    pub(super) fn wired_limit_bytes() -> Option<u64> {
        match sysctl(c"iogpu.wired_limit_mb") {
            Some(megabytes) if megabytes > 0 => Some(megabytes << 20),
            _ => sysctl(c"hw.memsize").map(|total| total / 4 * 3),
        }
    }

    /// A number that the kernel keeps under a name, of 4 or 8 bytes.
    fn sysctl(name: &CStr) -> Option<u64> {
        let mut value = [0u8; 8];
        let mut size = value.len();
        // SAFETY: the call writes at most `size` bytes of `value`, and says how many.
        let done =
            unsafe { libc::sysctlbyname(name.as_ptr(), value.as_mut_ptr().cast(), &mut size, std::ptr::null_mut(), 0) };
        // Little-endian on every machine of theirs, so that a shorter number is a prefix.
        (done == 0 && (size == 4 || size == 8)).then(|| u64::from_le_bytes(value))
    }
}

#[cfg(windows)]
#[allow(unsafe_code)]
mod platform {
    use std::time::Duration;

    use windows_sys::Win32::Foundation::FILETIME;
    use windows_sys::Win32::System::ProcessStatus::{K32GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS};
    use windows_sys::Win32::System::SystemInformation::{
        GetSystemInfo, GlobalMemoryStatusEx, MEMORYSTATUSEX, SYSTEM_INFO,
    };
    use windows_sys::Win32::System::Threading::{
        GetCurrentProcess, GetCurrentThread, GetProcessTimes, SetThreadPriority, THREAD_PRIORITY_LOWEST,
    };

    pub(super) fn performance_cores() -> Option<usize> {
        None
    }

    pub(super) fn page_bytes() -> Option<usize> {
        let mut info = SYSTEM_INFO::default();
        // SAFETY: the call writes the struct that it is given.
        unsafe { GetSystemInfo(&mut info) };
        usize::try_from(info.dwPageSize).ok().filter(|bytes| *bytes > 0)
    }

    pub(super) fn prefer_fast_cores() {}

    pub(super) fn lower_priority() {
        // SAFETY: this changes the priority of the calling thread, and no memory.
        unsafe { SetThreadPriority(GetCurrentThread(), THREAD_PRIORITY_LOWEST) };
    }

    pub(super) fn peak_memory_bytes() -> Option<u64> {
        memory().map(|memory| memory.PeakWorkingSetSize as u64)
    }

    pub(super) fn resident_memory_bytes() -> Option<u64> {
        memory().map(|memory| memory.WorkingSetSize as u64)
    }

    pub(super) fn available_memory_bytes() -> Option<u64> {
        let mut status = MEMORYSTATUSEX { dwLength: size_of::<MEMORYSTATUSEX>() as u32, ..Default::default() };
        // SAFETY: the call writes the struct that it is given, whose size it is told.
        let done = unsafe { GlobalMemoryStatusEx(&mut status) };
        (done != 0).then_some(status.ullAvailPhys)
    }

    pub(super) fn wired_limit_bytes() -> Option<u64> {
        None
    }

    pub(super) fn cpu_time() -> Duration {
        let [mut begun, mut ended, mut kernel, mut user] = [FILETIME::default(); 4];
        // SAFETY: the call writes the four structs that it is given.
        let done = unsafe { GetProcessTimes(GetCurrentProcess(), &mut begun, &mut ended, &mut kernel, &mut user) };
        // In units of 100 ns.
        let time = |t: FILETIME| (u64::from(t.dwHighDateTime) << 32 | u64::from(t.dwLowDateTime)) * 100;
        if done == 0 { Duration::ZERO } else { Duration::from_nanos(time(kernel) + time(user)) }
    }

    fn memory() -> Option<PROCESS_MEMORY_COUNTERS> {
        let mut memory = PROCESS_MEMORY_COUNTERS::default();
        let size = size_of::<PROCESS_MEMORY_COUNTERS>() as u32;
        // SAFETY: the call writes at most `size` bytes of the struct.
        let done = unsafe { K32GetProcessMemoryInfo(GetCurrentProcess(), &mut memory, size) };
        (done != 0).then_some(memory)
    }
}
