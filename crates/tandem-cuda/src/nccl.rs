//! NCCL, loaded at run time: sums too long for the kernel of `group.rs`, or between GPUs that cannot reach each other's
//! memory.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

use libloading::Library;

use crate::CudaError;
use crate::driver::Device;

/// `ncclUniqueId`: what the ranks of a communicator find each other by.
pub type UniqueId = [u8; 128];

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

#[repr(C)]
struct Id(UniqueId);

type Comm = *mut c_void;

/// The functions of nccl.h that are used here, which have been the same in every version 2.
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    init_rank: unsafe extern "C" fn(*mut Comm, c_int, Id, c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int,
    async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(Comm) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

fn functions() -> Option<&'static Functions> {
    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    FUNCTIONS
        .get_or_init(|| {
            // SAFETY: NCCL's initialisers do nothing but read its environment; the types are those of nccl.h.
            unsafe {
                let library = Library::new("libnccl.so.2").or_else(|_| Library::new("libnccl.so")).ok()?;
                // Never unloaded: it may have threads.
                let library = Box::leak(Box::new(library));
                Some(Functions {
                    get_unique_id: *library.get(b"ncclGetUniqueId\0").ok()?,
                    init_rank: *library.get(b"ncclCommInitRank\0").ok()?,
                    all_reduce: *library.get(b"ncclAllReduce\0").ok()?,
                    async_error: *library.get(b"ncclCommGetAsyncError\0").ok()?,
                    abort: *library.get(b"ncclCommAbort\0").ok()?,
                    error_string: *library.get(b"ncclGetErrorString\0").ok()?,
                })
            }
        })
        .as_ref()
}

/// Keeps NCCL from using NVLink multicast, of which a killed process can leave a host's GPUs unusable. Call it while the
/// process has one thread.
pub fn forbid_multicast() {
    // SAFETY: nobody else reads or writes the environment, by the contract above.
    unsafe { std::env::set_var("NCCL_NVLS_ENABLE", "0") }
}

/// True if libnccl can be loaded.
pub fn nccl_present() -> bool {
    functions().is_some()
}

fn check(functions: &Functions, result: c_int, what: &'static str) -> Result<(), CudaError> {
    if result == SUCCESS {
        return Ok(());
    }
    // SAFETY: NCCL returns a static string.
    let message = unsafe { CStr::from_ptr((functions.error_string)(result)) }.to_string_lossy().into_owned();
    Err(CudaError::Nccl { what, message })
}

/// A new id, for one rank to pass on to the others.
///
/// # Errors
/// NCCL is missing or fails.
pub fn unique_id() -> Result<UniqueId, CudaError> {
    let functions = functions().ok_or(CudaError::NoNccl)?;
    let mut id = Id([0; 128]);
    // SAFETY: the out-pointer is a local.
    check(functions, unsafe { (functions.get_unique_id)(&mut id) }, "make an id")?;
    Ok(id.0)
}

/// This rank's end of a communicator.
pub(crate) struct Communicator {
    functions: &'static Functions,
    comm: Comm,
}

impl Communicator {
    /// Meets the other ranks, which all call this with the same id.
    pub(crate) fn new(device: &Arc<Device>, id: &UniqueId, rank: usize, n_ranks: usize) -> Result<Self, CudaError> {
        let functions = functions().ok_or(CudaError::NoNccl)?;
        device.bind();
        let mut comm = null_mut();
        // SAFETY: the out-pointer is a local; the device is current.
        let made = unsafe { (functions.init_rank)(&mut comm, n_ranks as c_int, Id(*id), rank as c_int) };
        check(functions, made, "start a communicator")?;
        Ok(Communicator { functions, comm })
    }

    /// Enqueues the sum over ranks of `n` floats, in place.
    pub(crate) fn all_reduce(&self, device: &Device, x: u64, n: usize) {
        let (x, stream) = (x as *mut c_void, device.stream());
        // SAFETY: the callers' memory has `n` floats; the stream is open as long as the device.
        let result = unsafe { (self.functions.all_reduce)(x, x, n, FLOAT32, SUM, self.comm, stream) };
        if let Err(error) = check(self.functions, result, "add up over GPUs") {
            device.fail(error);
        }
    }

    /// True once NCCL found that something went wrong.
    pub(crate) fn has_failed(&self) -> bool {
        let mut state = SUCCESS;
        // SAFETY: the out-pointer is a local.
        let asked = unsafe { (self.functions.async_error)(self.comm, &mut state) };
        asked != SUCCESS || (state != SUCCESS && state != IN_PROGRESS)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Not destroyed in order, which would wait for ranks that may be gone.
        // SAFETY: used no more.
        unsafe {
            (self.functions.abort)(self.comm);
        }
    }
}

// SAFETY: used by one thread at a time: sums are enqueued by the thread that has the model, and NCCL's errors may be asked
// for from any.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_from_nccl_or_its_absence_is_said() {
        match unique_id() {
            Ok(id) => assert!(nccl_present() && id != [0; 128]),
            Err(CudaError::NoNccl) => assert!(!nccl_present()),
            // There, without a device.
            Err(error) => eprintln!("{error}"),
        }
    }
}
