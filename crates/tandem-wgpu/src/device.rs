//! Adapters, and a device opened on one of them: its features, its limits, and where its errors are kept.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use crate::WgpuError;
use crate::args::MAX_ARGS_BYTES;
use crate::backend::Tiles;
use crate::memory;

/// Threads of a workgroup.
pub(crate) const WORKGROUP: u32 = 256;
/// Workgroup memory that the largest kernel takes.
const WORKGROUP_BYTES: u32 = 30 << 10;
/// The same with cooperative matrices.
const COOPERATIVE_BYTES: u32 = 46 << 10;
/// Storage buffers of the kernel with most of them.
const STORAGE_BUFFERS: u32 = 8;

/// An adapter as a user sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterInfo {
    /// The number that chooses it.
    pub index: usize,
    /// The driver's name for it.
    pub name: String,
    /// `vulkan`, `metal`, ..
    pub api: String,
    /// `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    pub kind: &'static str,
    /// Driver and version.
    pub driver: String,
    /// Memory that the GPU can use, where the driver tells.
    pub memory_bytes: Option<u64>,
    /// Most bytes of one buffer.
    pub max_buffer_bytes: u64,
    /// Most bytes of a buffer that a kernel sees at once.
    pub max_binding_bytes: u64,
    /// Most buffers of a kernel.
    pub max_storage_buffers: u32,
    /// Fewest and most threads of a subgroup; zeros without subgroups.
    pub subgroup: (u32, u32),
    /// What the kernels can make use of.
    pub features: Vec<&'static str>,
}

impl AdapterInfo {
    fn new(index: usize, adapter: &wgpu::Adapter) -> AdapterInfo {
        let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
        let known = [
            ("subgroups", wgpu::Features::SUBGROUP),
            ("f16", wgpu::Features::SHADER_F16),
            ("timestamps", wgpu::Features::TIMESTAMP_QUERY),
            ("timestamps in passes", wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES),
            ("immediates", wgpu::Features::IMMEDIATES),
            ("cooperative matrices", wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
        ];
        let subgroups = features.contains(wgpu::Features::SUBGROUP);
        AdapterInfo {
            index,
            api: format!("{:?}", info.backend).to_lowercase(),
            kind: match info.device_type {
                wgpu::DeviceType::DiscreteGpu => "discrete",
                wgpu::DeviceType::IntegratedGpu => "integrated",
                wgpu::DeviceType::VirtualGpu => "virtual",
                wgpu::DeviceType::Cpu => "cpu",
                wgpu::DeviceType::Other => "other",
            },
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
            name: info.name,
            memory_bytes: memory::bytes(adapter),
            max_buffer_bytes: limits.max_buffer_size,
            max_binding_bytes: limits.max_storage_buffer_binding_size,
            max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
            subgroup: if subgroups { (info.subgroup_min_size, info.subgroup_max_size) } else { (0, 0) },
            features: known.iter().filter(|(_, f)| features.contains(*f)).map(|(name, _)| *name).collect(),
        }
    }
}

/// Every adapter, discrete GPUs first, software last.
pub fn adapters() -> Vec<AdapterInfo> {
    enumerate(&instance()).iter().enumerate().map(|(i, adapter)| AdapterInfo::new(i, adapter)).collect()
}

/// True if there is an adapter of any kind.
pub fn device_present() -> bool {
    !enumerate(&instance()).is_empty()
}

fn instance() -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN | wgpu::Backends::METAL,
        flags: wgpu::InstanceFlags::empty(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    })
}

fn enumerate(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    let mut adapters = wait(instance.enumerate_adapters(wgpu::Backends::VULKAN | wgpu::Backends::METAL));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// True if linear_tiles_half.wgsl can use cooperative matrices: of its shapes, for subgroups of 32, with enough workgroup memory.
fn has_cooperative_matrices(adapter: &wgpu::Adapter) -> bool {
    let info = adapter.get_info();
    let fits = |p: &wgpu::CooperativeMatrixProperties| {
        let types = (p.ab_type, p.cr_type) == (wgpu::CooperativeScalarType::F16, wgpu::CooperativeScalarType::F32);
        [p.m_size, p.n_size, p.k_size] == [16; 3] && types && !p.saturating_accumulation
    };
    adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16)
        && (info.subgroup_min_size, info.subgroup_max_size) == (32, 32)
        && adapter.limits().max_compute_workgroup_storage_size >= COOPERATIVE_BYTES
        && adapter.cooperative_matrix_properties().iter().any(fits)
}

/// The adapter that `wanted` names: its number, or a part of its name in any case. The first one without a name.
fn choose(adapters: &[wgpu::Adapter], wanted: Option<&str>) -> Result<usize, WgpuError> {
    if adapters.is_empty() {
        return Err(WgpuError::NoAdapter);
    }
    let Some(wanted) = wanted else { return Ok(0) };
    let names: Vec<String> = adapters.iter().map(|adapter| adapter.get_info().name).collect();
    let fits: Vec<usize> = match wanted.parse::<usize>() {
        Ok(number) => (number..names.len().min(number + 1)).collect(),
        Err(_) => {
            let wanted = wanted.to_lowercase();
            (0..names.len()).filter(|i| names[*i].to_lowercase().contains(&wanted)).collect()
        }
    };
    match fits[..] {
        [one] => Ok(one),
        _ => Err(WgpuError::Device {
            wanted: wanted.into(),
            found: fits.len(),
            available: names.iter().enumerate().map(|(i, n)| format!("{i} ({n})")).collect::<Vec<_>>().join(", "),
        }),
    }
}

/// Polls a future that does not wait for anything outside of this thread, as wgpu's are on native devices.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::yield_now();
    }
}

/// The first error, and the operation enqueued last.
#[derive(Clone, Default)]
pub(crate) struct Errors {
    first: Arc<Mutex<Option<WgpuError>>>,
    operation: Arc<Mutex<&'static str>>,
    failed: Arc<AtomicBool>,
}

impl Errors {
    pub(crate) fn enter(&self, operation: &'static str) {
        *self.operation.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = operation;
    }

    pub(crate) fn operation(&self) -> String {
        let operation = *self.operation.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if operation.is_empty() { "opening the device".into() } else { operation.into() }
    }

    /// Keeps the first one.
    pub(crate) fn set(&self, error: WgpuError) {
        let mut first = self.first.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // A lost device says more than what failed because of it.
        if first.is_none()
            || (matches!(error, WgpuError::Lost { .. }) && !matches!(*first, Some(WgpuError::Lost { .. })))
        {
            *first = Some(error);
        }
        self.failed.store(true, Ordering::Release);
    }

    pub(crate) fn any(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Takes the error; a lost device stays lost.
    pub(crate) fn take(&self) -> Result<(), WgpuError> {
        let mut first = self.first.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*first {
            None => Ok(()),
            Some(error @ WgpuError::Lost { .. }) => Err(error.clone()),
            Some(_) => {
                self.failed.store(false, Ordering::Release);
                Err(first.take().unwrap_or(WgpuError::NoAdapter))
            }
        }
    }
}

/// An open device.
pub(crate) struct Device {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) info: AdapterInfo,
    pub(crate) features: wgpu::Features,
    pub(crate) errors: Errors,
    /// True where the processor and the GPU share memory.
    pub(crate) unified: bool,
    /// True if kernels may use cooperative matrices of 16 x 16, of half-precision numbers with sums in single precision.
    pub(crate) cooperative: bool,
    staged: AtomicUsize,
}

impl Device {
    /// Opens the adapter that `wanted` names; `tiles` says whether for products in half precision.
    pub(crate) fn open(wanted: Option<&str>, tiles: Tiles) -> Result<Device, WgpuError> {
        let adapters = enumerate(&instance());
        let index = choose(&adapters, wanted)?;
        let adapter = &adapters[index];
        let info = AdapterInfo::new(index, adapter);
        let unsuitable = |lacks: String| WgpuError::Unsuitable { name: info.name.clone(), lacks };
        let (features, limits) = (adapter.features(), adapter.limits());
        if !features.contains(wgpu::Features::IMMEDIATES) || limits.max_immediate_size < MAX_ARGS_BYTES {
            return Err(unsuitable(format!(
                "it passes {} bytes of arguments, not {MAX_ARGS_BYTES}",
                limits.max_immediate_size
            )));
        }
        for (what, found, needed) in [
            ("bytes of workgroup memory", limits.max_compute_workgroup_storage_size, WORKGROUP_BYTES),
            ("threads in a workgroup", limits.max_compute_invocations_per_workgroup, WORKGROUP),
            ("storage buffers in a kernel", limits.max_storage_buffers_per_shader_stage, STORAGE_BUFFERS),
        ] {
            if found < needed {
                return Err(unsuitable(format!("it has {found} {what}, and {needed} are needed")));
            }
        }
        let wanted = wgpu::Features::IMMEDIATES
            | wgpu::Features::SUBGROUP
            | wgpu::Features::SHADER_F16
            | wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES;
        let cooperative = tiles != Tiles::Single && has_cooperative_matrices(adapter);
        let needs_halves = matches!(tiles, Tiles::Split | Tiles::Half);
        if needs_halves && !features.contains(wgpu::Features::SHADER_F16) {
            return Err(unsuitable("it has no half-precision numbers".into()));
        }
        let mut features = features & wanted;
        let mut experimental_features = wgpu::ExperimentalFeatures::disabled();
        if cooperative {
            features |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            // SAFETY: they are used in one kernel, which keeps to what they are specified for: whole subgroups of 32, in
            // uniform control flow, on memory that the kernel declares.
            #[allow(unsafe_code)]
            let enabled = unsafe { wgpu::ExperimentalFeatures::enabled() };
            experimental_features = enabled;
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("tandem"),
            required_features: features,
            required_limits: limits,
            experimental_features,
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..wgpu::DeviceDescriptor::default()
        };
        let (device, queue) =
            wait(adapter.request_device(&descriptor)).map_err(|e| unsuitable(format!("the driver says: {e}")))?;
        let errors = Errors::default();
        let sink = errors.clone();
        device.on_uncaptured_error(Arc::new(move |error| {
            let operation = sink.operation();
            sink.set(match error {
                wgpu::Error::OutOfMemory { .. } => WgpuError::OutOfMemory { wanted: 0, operation },
                other => WgpuError::Driver { operation, message: other.to_string() },
            });
        }));
        let sink = errors.clone();
        device.set_device_lost_callback(move |_, reason| {
            sink.set(WgpuError::Lost { operation: sink.operation(), reason });
        });
        let unified = matches!(info.kind, "integrated" | "cpu");
        Ok(Device { device, queue, info, features, errors, unified, cooperative, staged: AtomicUsize::new(0) })
    }
}

impl Device {
    /// Notes `bytes` that a write has copied to memory of the host; returns all since the last [`Device::drain`].
    pub(crate) fn staged(&self, bytes: usize) -> usize {
        self.staged.fetch_add(bytes, Ordering::Relaxed) + bytes
    }

    /// Submits writes and waits for them, so that their memory is free again.
    pub(crate) fn drain(&self) {
        self.queue.submit([]);
        if let Err(error) = self.device.poll(wgpu::PollType::wait_indefinitely()) {
            self.errors.set(WgpuError::Lost { operation: self.errors.operation(), reason: error.to_string() });
        }
        self.staged.store(0, Ordering::Relaxed);
    }
}
