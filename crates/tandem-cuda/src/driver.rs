//! The CUDA driver: a device with its stream, memory, kernels and graphs. Every call into libcuda is here.
//!
//! Operations do not fail one by one: the first error is kept, later launches do nothing, and `sync` returns it.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys::{self, CUresult};

use crate::CudaError;
use crate::compile::machine_code;

/// CUDA 12.4: graphs with programmatic launches.
const MIN_DRIVER: i32 = 12040;

/// What a device is.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub total_memory: u64,
    /// Multiprocessors.
    pub multiprocessors: i32,
    /// True if it has Hopper's own instructions (sm_90a).
    pub hopper: bool,
    /// True if blocks form clusters, and kernels may start while their predecessors finish: compute capability 9.0 on.
    pub clusters: bool,
}

/// True if there is a driver with at least one device.
pub fn device_present() -> bool {
    initialise().is_ok()
}

/// Loads the driver and returns the number of devices, at least 1.
fn initialise() -> Result<i32, CudaError> {
    // SAFETY: the library is looked for before its first call; out-pointers are locals.
    unsafe {
        if !sys::is_culib_present() {
            return Err(CudaError::NoDriver);
        }
        let mut version = 0;
        sys::cuDriverGetVersion(&mut version);
        if version < MIN_DRIVER {
            return Err(CudaError::DriverTooOld(version));
        }
        let result = sys::cuInit(0);
        if result != CUresult::CUDA_SUCCESS {
            return Err(CudaError::NoDevice(message(result)));
        }
        let mut count = 0;
        let result = sys::cuDeviceGetCount(&mut count);
        if result != CUresult::CUDA_SUCCESS || count == 0 {
            return Err(CudaError::NoDevice(message(result)));
        }
        Ok(count)
    }
}

fn message(result: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver returns a static string or an error.
    unsafe {
        if sys::cuGetErrorString(result, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null() {
            return CStr::from_ptr(text).to_string_lossy().into_owned();
        }
    }
    format!("{result:?}")
}

fn check(result: CUresult, what: &str) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(CudaError::Driver { what: what.to_string(), message: message(result) })
}

/// A device, its streams and its kernels.
pub(crate) struct Device {
    context: sys::CUcontext,
    /// Where everything runs, in order.
    stream: sys::CUstream,
    /// Where weights are copied from the host, beside kernels that rearrange the ones before.
    copies: sys::CUstream,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, sys::CUfunction>>,
    /// The kernel that was enqueued last.
    last: Mutex<&'static str>,
    error: Mutex<Option<CudaError>>,
    /// Kernels may start while their predecessors finish.
    programmatic: bool,
    /// Bytes of shared memory that a block may have.
    max_shared: i32,
    pinned: Mutex<Option<Pinned>>,
    pub(crate) info: DeviceInfo,
}

// SAFETY: the driver's handles may be used from any thread, one at a time for the stream, which `&mut` of the model and
// the locks see to.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Device {
    /// Opens device `ordinal` and compiles the kernels for it.
    pub(crate) fn open(ordinal: i32, programmatic: bool) -> Result<Device, CudaError> {
        let count = initialise()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice(format!("device {ordinal} was asked for, and there are {count}")));
        }
        // SAFETY: out-pointers are locals; handles come from the calls before.
        unsafe {
            let mut device = 0;
            check(sys::cuDeviceGet(&mut device, ordinal), "find the device")?;
            let attribute = |which| {
                let mut value = 0;
                sys::cuDeviceGetAttribute(&mut value, which, device);
                value
            };
            use sys::CUdevice_attribute_enum as Attribute;
            let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
            let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
            let mut name = [0 as std::ffi::c_char; 256];
            sys::cuDeviceGetName(name.as_mut_ptr(), 256, device);
            let name = CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
            if major < 8 {
                return Err(CudaError::Architecture { name, major, minor });
            }
            let mut total = 0;
            check(sys::cuDeviceTotalMem_v2(&mut total, device), "read the device's memory size")?;
            let mut context = null_mut();
            check(sys::cuDevicePrimaryCtxRetain(&mut context, device), "open the device")?;
            check(sys::cuCtxSetCurrent(context), "use the device")?;
            let (hopper, clusters) = ((major, minor) == (9, 0), major >= 9);
            let code = machine_code(&if hopper { "sm_90a".into() } else { format!("sm_{major}{minor}") })?;
            let mut module = null_mut();
            check(sys::cuModuleLoadData(&mut module, code.as_ptr().cast()), "load the kernels")?;
            let mut stream = null_mut();
            check(sys::cuStreamCreate(&mut stream, 1), "make a stream")?;
            let mut copies = null_mut();
            check(sys::cuStreamCreate(&mut copies, 1), "make a stream")?;
            let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
            Ok(Device {
                context,
                stream,
                copies,
                module,
                functions: Mutex::default(),
                last: Mutex::default(),
                error: Mutex::default(),
                programmatic: programmatic && clusters,
                max_shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
                pinned: Mutex::default(),
                info: DeviceInfo { name, total_memory: total as u64, multiprocessors, hopper, clusters },
            })
        }
    }

    /// The stream, for libraries.
    pub(crate) fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// Makes this thread use the device.
    pub(crate) fn bind(&self) {
        // SAFETY: the context is open as long as `self` is.
        self.note(unsafe { sys::cuCtxSetCurrent(self.context) }, "use the device");
    }

    /// Keeps the first error.
    fn note(&self, result: CUresult, what: &str) -> bool {
        match check(result, what) {
            Ok(()) => true,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    /// Keeps the first error.
    pub(crate) fn fail(&self, error: CudaError) {
        lock(&self.error).get_or_insert(error);
    }

    fn failed(&self) -> bool {
        lock(&self.error).is_some()
    }

    /// Bytes free on the device.
    pub(crate) fn free_memory(&self) -> u64 {
        let (mut free, mut total) = (0, 0);
        // SAFETY: out-pointers are locals.
        self.note(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "read the free memory");
        free as u64
    }

    /// Zeroed memory; at least 256 bytes, so that kernels may be given a pointer to nothing.
    pub(crate) fn alloc(self: &Arc<Self>, bytes: usize) -> Memory {
        let memory = self.alloc_for_all_bytes(bytes);
        if memory.pointer != 0 {
            // SAFETY: the range was just allocated.
            let cleared = unsafe { sys::cuMemsetD8Async(memory.pointer, 0, memory.bytes, self.stream) };
            self.note(cleared, "clear memory");
        }
        memory
    }

    /// Memory for what writes all of its bytes before anything reads them.
    pub(crate) fn alloc_for_all_bytes(self: &Arc<Self>, bytes: usize) -> Memory {
        self.bind();
        let mut pointer = 0;
        let size = bytes.max(256).next_multiple_of(256);
        if !self.failed() {
            // SAFETY: out-pointer is a local.
            unsafe {
                let result = sys::cuMemAlloc_v2(&mut pointer, size);
                if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                    let remedy = "use a smaller --context or --prefill-chunk, a smaller model, or --backend cpu";
                    self.fail(CudaError::OutOfMemory { wanted: size as u64, free: self.free_memory(), remedy });
                } else {
                    self.note(result, "allocate memory");
                }
            }
        }
        Memory { pointer, bytes: size, device: Arc::clone(self) }
    }

    /// Copies bytes to the device, after everything enqueued before; `bytes` may change when this returns.
    pub(crate) fn upload(&self, to: u64, bytes: &[u8]) {
        self.bind();
        if bytes.is_empty() || self.failed() {
            return;
        }
        // SAFETY: `to` has room, by the callers' sizes; pageable memory is read before the call returns.
        self.note(
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), self.stream) },
            "copy to the device",
        );
    }

    /// Copies to the host through pinned memory, after everything enqueued before.
    pub(crate) fn download(&self, from: u64, out: &mut [u8]) {
        if out.is_empty() || self.failed() {
            return;
        }
        let mut pinned = lock(&self.pinned);
        if pinned.as_ref().is_none_or(|p| p.bytes < out.len()) {
            *pinned = self.pinned(out.len());
        }
        let Some(pinned) = pinned.as_mut() else { return };
        // SAFETY: the pinned buffer has `out.len()` bytes; the stream is waited for before they are read.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(pinned.pointer, from, out.len(), self.stream) };
        if self.note(copied, "copy from the device") && self.wait_for_all() {
            out.copy_from_slice(&pinned.bytes_mut()[..out.len()]);
        }
    }

    /// Enqueues a copy to pinned memory, which nobody may read before it is done.
    pub(crate) fn fetch_back(&self, to: &Pinned, offset: usize, from: u64, bytes: usize) {
        if bytes == 0 || self.failed() {
            return;
        }
        assert!(offset + bytes <= to.bytes, "a copy beyond the pinned memory");
        // SAFETY: the range is within the buffer; `from` has as much, by the callers' sizes.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to.pointer.add(offset), from, bytes, self.stream) };
        self.note(copied, "copy from the device");
    }

    pub(crate) fn wait_for_all(&self) -> bool {
        // SAFETY: the stream is open as long as `self` is.
        self.note(unsafe { sys::cuStreamSynchronize(self.stream) }, "wait for the device")
    }

    /// Host memory that the device copies from and to by itself.
    pub(crate) fn pinned(&self, bytes: usize) -> Option<Pinned> {
        self.bind();
        let mut pointer = null_mut();
        // SAFETY: out-pointer is a local.
        let made = unsafe { sys::cuMemHostAlloc(&mut pointer, bytes, 0) };
        self.note(made, "allocate pinned memory").then_some(Pinned { pointer, bytes })
    }

    /// Enqueues a copy of `bytes` of pinned memory, which must stay as they are until it is done.
    pub(crate) fn fetch(&self, to: u64, from: &Pinned, offset: usize, bytes: usize) {
        if bytes == 0 || self.failed() {
            return;
        }
        assert!(offset + bytes <= from.bytes, "a copy beyond the pinned memory");
        // SAFETY: the range is within the buffer; `to` has room, by the callers' sizes.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.pointer.add(offset), bytes, self.stream) };
        self.note(copied, "copy to the device");
    }

    /// Enqueues a copy of pinned memory beside the stream: [`Device::after_copies`] makes the stream wait for it.
    pub(crate) fn fetch_aside(&self, to: u64, from: &Pinned, bytes: usize) {
        if bytes == 0 || self.failed() {
            return;
        }
        assert!(bytes <= from.bytes, "a copy beyond the pinned memory");
        // SAFETY: the range is within the buffer; `to` has room, by the callers' sizes.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.pointer, bytes, self.copies) };
        self.note(copied, "copy to the device");
    }

    /// Copies beside the stream wait for what the stream has been given.
    pub(crate) fn copies_after_stream(&self, event: &Event) {
        // SAFETY: all three are open.
        unsafe {
            self.note(sys::cuEventRecord(event.0, self.stream), "record an event");
            self.note(sys::cuStreamWaitEvent(self.copies, event.0, 0), "order copies");
        }
    }

    /// The stream waits for the copies beside it that have been enqueued.
    pub(crate) fn after_copies(&self, event: &Event) {
        // SAFETY: all three are open.
        unsafe {
            self.note(sys::cuEventRecord(event.0, self.copies), "record an event");
            self.note(sys::cuStreamWaitEvent(self.stream, event.0, 0), "order copies");
        }
    }

    /// What another process maps this memory by.
    pub(crate) fn share(&self, memory: &Memory) -> Result<[u8; 64], CudaError> {
        // SAFETY: the memory is an allocation of its own.
        unsafe {
            let mut handle: sys::CUipcMemHandle = std::mem::zeroed();
            check(sys::cuIpcGetMemHandle(&mut handle, memory.pointer), "share memory with another process")?;
            Ok(handle.reserved.map(|c| c as u8))
        }
    }

    /// Another process's memory, on this device or one that it can reach.
    pub(crate) fn map(&self, handle: &[u8; 64]) -> Result<PeerMemory, CudaError> {
        self.bind();
        let handle = sys::CUipcMemHandle { reserved: handle.map(|b| b as _) };
        let mut pointer = 0;
        // SAFETY: out-pointer is a local; 1 is CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.
        let mapped = unsafe { sys::cuIpcOpenMemHandle_v2(&mut pointer, handle, 1) };
        check(mapped, "map another GPU's memory (several GPUs must reach each other by NVLink or PCIe)")?;
        Ok(PeerMemory(pointer))
    }

    /// A mark in the stream.
    pub(crate) fn event(&self) -> Option<Event> {
        self.bind();
        let mut event = null_mut();
        // SAFETY: out-pointer is a local; 2 is without timing.
        let made = unsafe { sys::cuEventCreate(&mut event, 2) };
        self.note(made, "make an event").then_some(Event(event))
    }

    /// Puts the mark after everything enqueued.
    pub(crate) fn record(&self, event: &Event) {
        // SAFETY: both are open.
        self.note(unsafe { sys::cuEventRecord(event.0, self.stream) }, "record an event");
    }

    /// Puts the mark after the copies beside the stream.
    pub(crate) fn record_copies(&self, event: &Event) {
        // SAFETY: both are open.
        self.note(unsafe { sys::cuEventRecord(event.0, self.copies) }, "record an event");
    }

    /// Waits until the mark is passed, if it was put anywhere.
    pub(crate) fn wait(&self, event: &Event) {
        self.bind();
        // SAFETY: the event is open.
        self.note(unsafe { sys::cuEventSynchronize(event.0) }, "wait for the device");
    }

    /// Copies on the device.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) {
        if bytes == 0 || self.failed() {
            return;
        }
        // SAFETY: both ranges are the callers' memory.
        self.note(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) }, "copy on the device");
    }

    /// Waits for everything enqueued and returns the first error since the last call.
    pub(crate) fn sync(&self) -> Result<(), CudaError> {
        self.wait_for_all();
        self.take_error()
    }

    /// The first error since the last call.
    pub(crate) fn take_error(&self) -> Result<(), CudaError> {
        lock(&self.error).take().map_or(Ok(()), Err)
    }

    /// Seconds that `work` takes on the device.
    pub(crate) fn time(&self, work: impl FnOnce()) -> f64 {
        let mut ms = 0.0;
        // SAFETY: events live for this call.
        unsafe {
            let (mut start, mut end) = (null_mut(), null_mut());
            sys::cuEventCreate(&mut start, 0);
            sys::cuEventCreate(&mut end, 0);
            sys::cuEventRecord(start, self.stream);
            work();
            sys::cuEventRecord(end, self.stream);
            self.note(sys::cuEventSynchronize(end), "run the kernels");
            sys::cuEventElapsedTime_v2(&mut ms, start, end);
            sys::cuEventDestroy_v2(start);
            sys::cuEventDestroy_v2(end);
        }
        f64::from(ms) / 1e3
    }

    fn function(&self, name: &'static str) -> Option<sys::CUfunction> {
        if let Some(function) = lock(&self.functions).get(name) {
            return Some(*function);
        }
        let mut function = null_mut();
        let text = CString::new(name).ok()?;
        // SAFETY: the module is loaded as long as `self` is.
        let found = unsafe { sys::cuModuleGetFunction(&mut function, self.module, text.as_ptr()) };
        if !self.note(found, &format!("find the kernel {name}")) {
            return None;
        }
        // Beyond 48 KB shared memory must be asked for: all that the kernel's own arrays leave. Less is unaffected.
        use sys::CUfunction_attribute_enum as Attribute;
        let mut own = 0;
        // SAFETY: as above.
        let raised = unsafe {
            sys::cuFuncGetAttribute(&mut own, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function);
            let rest = self.max_shared - own;
            sys::cuFuncSetAttribute(function, Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, rest)
        };
        self.note(raised, &format!("give shared memory to {name}"));
        lock(&self.functions).insert(name, function);
        Some(function)
    }

    /// Enqueues a kernel. `arguments` are pointers to its parameters, in order and of the right types.
    pub(crate) fn launch(
        &self,
        name: &'static str,
        grid: (usize, usize, usize),
        threads: usize,
        shared: usize,
        arguments: &mut [*mut c_void],
    ) {
        if self.failed() || grid.0 * grid.1 * grid.2 == 0 {
            return;
        }
        let Some(function) = self.function(name) else { return };
        // SAFETY: plain data, all zero is valid.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0 as u32,
            gridDimY: grid.1 as u32,
            gridDimZ: grid.2 as u32,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.stream,
            attrs: &mut attribute,
            numAttrs: u32::from(self.programmatic),
        };
        // SAFETY: the callers pass what the kernel declares; memory outlives the stream's work, as it is freed only
        // after waiting.
        let launched = unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), null_mut()) };
        self.note(launched, &format!("launch {name}"));
        *lock(&self.last) = name;
    }

    /// The kernel that was enqueued last.
    pub(crate) fn last_launch(&self) -> &'static str {
        *lock(&self.last)
    }

    /// Records what `work` enqueues instead of running it.
    pub(crate) fn capture(&self, work: impl FnOnce()) -> Option<Graph> {
        self.begin_capture();
        work();
        self.end_capture()
    }

    /// Records what this thread enqueues from here on, until [`Device::end_capture`].
    pub(crate) fn begin_capture(&self) {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is open as long as `self` is.
        self.note(unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) }, "begin a graph");
    }

    /// What was recorded.
    pub(crate) fn end_capture(&self) -> Option<Graph> {
        // SAFETY: one stream, captured from begin to end on one thread.
        unsafe {
            let (mut graph, mut exec) = (null_mut(), null_mut());
            if !self.note(sys::cuStreamEndCapture(self.stream, &mut graph), "end a graph") {
                return None;
            }
            let made = self.note(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0), "make a graph");
            sys::cuGraphDestroy(graph);
            made.then_some(Graph { exec })
        }
    }

    /// Enqueues a graph.
    pub(crate) fn replay(&self, graph: &Graph) {
        if !self.failed() {
            // SAFETY: the graph's memory is kept by whoever keeps the graph.
            self.note(unsafe { sys::cuGraphLaunch(graph.exec, self.stream) }, "run a graph");
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handles any more: memory and graphs hold an Arc of the device.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuStreamSynchronize(self.stream);
            lock(&self.pinned).take();
            sys::cuModuleUnload(self.module);
            sys::cuStreamDestroy_v2(self.copies);
            sys::cuStreamDestroy_v2(self.stream);
        }
    }
}

// SAFETY: a graph is launched through its device only.
unsafe impl Send for Graph {}

/// Pinned host memory.
pub(crate) struct Pinned {
    pointer: *mut c_void,
    bytes: usize,
}

impl Pinned {
    /// Its bytes; what is being copied to or from them is the callers' concern.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size, and initialised by the driver.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes) }
    }
}

impl Pinned {
    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its address for kernels.
    pub(crate) fn address(&self) -> u64 {
        self.pointer as u64
    }

    /// Word `index`, which a kernel may write at any time.
    pub(crate) fn word(&self, index: usize) -> u32 {
        assert!((index + 1) * 4 <= self.bytes, "a word beyond the pinned memory");
        // SAFETY: within the buffer, aligned.
        unsafe { self.pointer.cast::<u32>().add(index).read_volatile() }
    }
}

// SAFETY: plain memory; what a kernel writes is read by `word` only.
unsafe impl Sync for Pinned {}

/// Memory of another process.
pub(crate) struct PeerMemory(u64);

impl PeerMemory {
    /// Its address here.
    pub(crate) fn pointer(&self) -> u64 {
        self.0
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        // SAFETY: unmapped once, when no kernel uses it any more.
        unsafe {
            sys::cuIpcCloseMemHandle(self.0);
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: freed once; the driver waits for copies.
        unsafe {
            sys::cuMemFreeHost(self.pointer);
        }
    }
}

// SAFETY: plain memory.
unsafe impl Send for Pinned {}

/// A mark in a device's stream.
pub(crate) struct Event(sys::CUevent);

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe {
            sys::cuEventDestroy_v2(self.0);
        }
    }
}

// SAFETY: used through its device only.
unsafe impl Send for Event {}

/// An executable graph.
pub(crate) struct Graph {
    exec: sys::CUgraphExec,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver waits for a running graph.
        unsafe {
            sys::cuGraphExecDestroy(self.exec);
        }
    }
}

/// Memory on a device.
pub struct Memory {
    pointer: u64,
    bytes: usize,
    device: Arc<Device>,
}

impl Memory {
    /// Its address; 0 after a failed allocation.
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.pointer != 0 {
            // SAFETY: allocated by `alloc` and freed once; the driver waits for work that uses it.
            unsafe {
                sys::cuCtxSetCurrent(self.device.context);
                sys::cuStreamSynchronize(self.device.stream);
                sys::cuMemFree_v2(self.pointer);
            }
        }
    }
}
