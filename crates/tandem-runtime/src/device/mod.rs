//! Where a model runs. The only file that says which backends this build has.
//!
//! A backend is one file here that implements [`Device`], an arm of [`DeviceKind`], and a feature.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(feature = "wgpu", target_os = "macos"))]
mod wgpu;

use std::sync::Arc;

use anyhow::bail;
use serde_json::{Map, Value};
use tandem_comm::Group;
use tandem_core::Backend;
use tandem_core::backend::TensorGroup;
use tandem_core::weights::Weight;
use tandem_cpu::{CpuBackend, Pool, system};
use tandem_engine::{Check, Profiled};
use tandem_model::Stacks;

use crate::load::Shape;
use crate::mtp::Sidecar;
use crate::news::OnNews;
use crate::options::{Activations, BackendChoice, DeviceOptions, TransportKind};

pub use cpu::{cpu_backend, fits_in_memory, lock_memory};

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// Any GPU, through Vulkan or Metal.
    Wgpu,
}

impl DeviceKind {
    /// As `--backend` has it.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda => "cuda",
            DeviceKind::Wgpu => "wgpu",
        }
    }

    /// The device of a model that runs in one process.
    ///
    /// # Errors
    /// This build does not have what is asked for.
    pub fn choose(options: &DeviceOptions) -> anyhow::Result<DeviceKind> {
        match options.backend {
            BackendChoice::Cpu => Ok(DeviceKind::Cpu),
            BackendChoice::Cuda if HAS_CUDA => Ok(DeviceKind::Cuda),
            BackendChoice::Cuda => {
                bail!("this tandem was built without CUDA; build it with --features cuda, or use --backend cpu")
            }
            // int8 is the processor's.
            BackendChoice::Auto if options.activations != Activations::Int8 && cuda_device_present() => {
                Ok(DeviceKind::Cuda)
            }
            BackendChoice::Wgpu if HAS_WGPU => Ok(DeviceKind::Wgpu),
            BackendChoice::Wgpu => bail!("{NO_WGPU}, or use --backend cpu"),
            BackendChoice::Auto if has_wgpu_numerics(options.activations) && wgpu_device_present() => {
                Ok(DeviceKind::Wgpu)
            }
            BackendChoice::Auto => Ok(DeviceKind::Cpu),
        }
    }

    /// The device of each of several ranks.
    ///
    /// # Errors
    /// This build does not have what is asked for, or the transport does not go with it.
    pub fn choose_for_ranks(options: &DeviceOptions, transport: TransportKind) -> anyhow::Result<DeviceKind> {
        match transport {
            TransportKind::Nccl if HAS_CUDA => Ok(DeviceKind::Cuda),
            TransportKind::Nccl => {
                bail!("this tandem was built without CUDA, which --transport nccl needs; build it with --features cuda")
            }
            _ if options.backend == BackendChoice::Cuda => {
                bail!("several ranks run on GPUs with --transport nccl; add it, or use --backend cpu")
            }
            _ if options.backend == BackendChoice::Wgpu => DeviceKind::choose(options),
            _ => Ok(DeviceKind::Cpu),
        }
    }

    /// Runs `work` with the backend of this kind.
    ///
    /// # Errors
    /// The work's own; this build does not have the backend.
    pub fn with<W: WithDevice>(self, work: W) -> anyhow::Result<W::Output> {
        match self {
            DeviceKind::Cpu => work.run::<CpuBackend>(),
            #[cfg(feature = "cuda")]
            DeviceKind::Cuda => work.run::<tandem_cuda::CudaBackend>(),
            #[cfg(not(feature = "cuda"))]
            DeviceKind::Cuda => bail!("this tandem was built without CUDA"),
            #[cfg(any(feature = "wgpu", target_os = "macos"))]
            DeviceKind::Wgpu => work.run::<tandem_wgpu::WgpuBackend>(),
            #[cfg(not(any(feature = "wgpu", target_os = "macos")))]
            DeviceKind::Wgpu => bail!("{NO_WGPU}"),
        }
    }
}

#[cfg(feature = "cuda")]
const HAS_CUDA: bool = true;
#[cfg(not(feature = "cuda"))]
const HAS_CUDA: bool = false;

#[cfg(feature = "cuda")]
fn cuda_device_present() -> bool {
    tandem_cuda::device_present()
}
#[cfg(not(feature = "cuda"))]
fn cuda_device_present() -> bool {
    false
}

#[cfg(any(feature = "wgpu", target_os = "macos"))]
const HAS_WGPU: bool = true;
#[cfg(not(any(feature = "wgpu", target_os = "macos")))]
const HAS_WGPU: bool = false;
const NO_WGPU: &str = "this tandem was built without Vulkan and Metal; build it with --features wgpu";

#[cfg(any(feature = "wgpu", target_os = "macos"))]
fn wgpu_device_present() -> bool {
    wgpu::device_present()
}
#[cfg(not(any(feature = "wgpu", target_os = "macos")))]
fn wgpu_device_present() -> bool {
    false
}

fn has_wgpu_numerics(activations: Activations) -> bool {
    matches!(activations, Activations::Auto | Activations::F32)
}

/// A device of this machine that this build can run on.
pub struct FoundDevice {
    /// The word for `--backend`.
    pub backend: &'static str,
    /// One line.
    pub name: String,
    /// The same in JSON.
    pub json: Map<String, Value>,
}

/// Every device of this machine that this build can run on; the processor comes first.
pub fn found() -> Vec<FoundDevice> {
    let cpu = CpuBackend::new(1, CpuBackend::default_numerics());
    let (threads, isa) = (system::default_threads(), cpu.isa().to_string());
    let mut json = Map::new();
    json.insert("threads".into(), threads.into());
    json.insert("isa".into(), isa.clone().into());
    json.insert("memory_bytes".into(), system::available_memory_bytes().into());
    let name = format!("{threads} threads, {isa}");
    #[allow(unused_mut)]
    let mut found = vec![FoundDevice { backend: "cpu", name, json }];
    #[cfg(feature = "cuda")]
    found.extend(cuda::found());
    #[cfg(any(feature = "wgpu", target_os = "macos"))]
    found.extend(wgpu::found());
    found
}

/// Whether there are NVIDIA GPUs that this build can use.
pub fn has_cuda_devices() -> bool {
    HAS_CUDA && cuda_device_present()
}

/// Bytes per second that the first device of a backend copies on itself, both ways counted, and gets from the host; `None`
/// where that is not measured.
pub fn copy_speed(backend: &str) -> Option<(f64, f64)> {
    match backend {
        #[cfg(feature = "cuda")]
        "cuda" => cuda::copy_speed(),
        _ => None,
    }
}

/// Bytes that one token takes in the cache.
#[cfg(any(feature = "cuda", feature = "wgpu", target_os = "macos"))]
fn cache_bytes_per_token<B: Backend>(backend: &B, shape: Shape<'_>) -> usize {
    let layers = 0..shape.config.num_hidden_layers;
    let specs = layers.flat_map(|layer| tandem_model::cache_specs(shape.config, layer));
    specs.map(|spec| backend.cache_bytes(spec.kind, spec.width)).sum()
}

/// What the backends of this build need before anything else runs in the process.
pub fn prepare_process() {
    #[cfg(feature = "cuda")]
    tandem_cuda::forbid_multicast();
}

/// Work on a backend whose type only the run time knows.
pub trait WithDevice {
    /// Its result.
    type Output;
    /// Does it.
    ///
    /// # Errors
    /// The work's own.
    fn run<D: Device>(self) -> anyhow::Result<Self::Output>;
}

/// Where a rank is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Ranks of this host.
    pub on_this_host: usize,
    /// This one among them.
    pub local_rank: usize,
}

/// Sums on devices, and what knows of their failures.
pub struct Sums<B: Backend> {
    /// Makes them.
    pub group: Arc<dyn TensorGroup<B>>,
    /// Says whether one failed.
    pub check: Check,
}

/// How long sums of one size take between devices.
pub struct SumTimes {
    /// `on GPUs`, or the library that made them.
    pub name: &'static str,
    /// Size of each sum.
    pub bytes: usize,
    /// Sums timed.
    pub repetitions: usize,
    /// Microseconds of one sum: means of runs of many, sorted.
    pub microseconds: Vec<f64>,
}

/// A backend that this program can choose: how it is opened, divided and measured.
pub trait Device: Backend + Sized + 'static {
    /// A rank's device before the ranks have agreed on numerics.
    type Opened;
    /// Whether the weights lie in the process's memory, which says then whether they are all there.
    const HOLDS_IN_PROCESS: bool = false;

    /// Opens the device of one rank.
    ///
    /// # Errors
    /// It is not there, or does not have the numerics.
    fn open(options: &DeviceOptions, place: Place) -> anyhow::Result<Self::Opened>;
    /// Bytes that the rank may fill.
    fn memory(opened: &Self::Opened, place: Place) -> u64;
    /// Bytes per second, roughly, for the plan.
    fn plan_bandwidth(opened: &Self::Opened) -> f64;
    /// Name of the numerics that the options ask for.
    ///
    /// # Errors
    /// The device does not have them.
    fn numerics(options: &DeviceOptions) -> anyhow::Result<&'static str>;
    /// The backend, with the numerics of rank 0.
    ///
    /// # Errors
    /// The device does not have them.
    fn finish(opened: Self::Opened, numerics: &str) -> anyhow::Result<Self>;
    /// Told whether a rank's weights fit in memory.
    #[must_use]
    fn with_fit(self, _fits: bool) -> Self {
        self
    }
    /// The backend of a model that runs in one process, told what it has to hold.
    ///
    /// # Errors
    /// It does not fit, or an option means nothing here.
    fn alone(options: &DeviceOptions, load: &ToHold<'_>, on_news: OnNews<'_>) -> anyhow::Result<Self>;
    /// Name of this backend's numerics.
    fn numerics_name(&self) -> &'static str;
    /// Bytes per second, where that is known without a measurement.
    fn known_bandwidth(&self) -> Option<f64>;
    /// Bytes of experts that a token reads on the host, because the device does not hold them.
    fn host_read_bytes(&self) -> u64 {
        0
    }
    /// Whether weights that are not repacked stay mapped from their files.
    fn stays_mapped() -> bool {
        false
    }
    /// Whether made-up experts may share their bytes.
    fn stacks() -> Stacks;
    /// Sums over `group` that the device makes itself.
    ///
    /// # Errors
    /// The ranks cannot agree on them.
    fn sums(&self, _group: &Group, _on_news: OnNews<'_>) -> anyhow::Result<Option<Sums<Self>>> {
        Ok(None)
    }

    /// With a stopwatch that counts the experts of a step; a device that does operations when they are called always notes
    /// how long they take.
    fn profiled(self) -> Profiled<Self>;
    /// Bytes per second that the memory delivers, measured with care.
    fn bandwidth(&self) -> f64;
    /// The same, quickly, while other ranks of this host measure too.
    fn bandwidth_of_rank(&self) -> f64 {
        self.bandwidth()
    }
    /// The threads that compute, if the device is the processor.
    fn pool(&self) -> Option<Arc<Pool>> {
        None
    }
    /// Operations per second that the arithmetic reaches, where that can be measured.
    fn peak(&self) -> Option<f64> {
        None
    }
    /// Share of the positions that f32 index scores select which this device's select too; `None` where it uses f32.
    fn index_agreement(&self, _n_heads: usize, _dim: usize, _n_keys: usize, _k: usize) -> Option<f64> {
        None
    }
    /// Peak memory of the process, or memory in use on the device.
    fn memory_bytes(&self) -> u64;
    /// Formats of loaded matrices that it has no kernel for, and decodes at every use.
    fn slow_formats(&self) -> Vec<String> {
        vec![]
    }
    /// The device in one line.
    fn name(&self) -> String;
    /// The device in JSON.
    fn describe(&self) -> Map<String, Value>;
}

/// What a device of one process has to hold.
pub struct ToHold<'a> {
    /// The model's shapes and the cache.
    pub shape: Shape<'a>,
    /// Every weight.
    pub weights: &'a [Weight],
    /// Bytes of the weights that stay in memory.
    pub resident: u64,
    /// Bytes of the multi-token-prediction layer among them; 0 if it is not loaded.
    pub mtp: u64,
    /// Where that layer is, if not with the model.
    pub(crate) sidecar: Option<&'a Sidecar>,
}

/// Refuses `--n-cpu-moe` where it means nothing.
///
/// # Errors
/// It is given.
pub fn no_host_experts(options: &DeviceOptions) -> anyhow::Result<()> {
    if options.n_cpu_moe.is_some() {
        bail!(
            "--n-cpu-moe leaves experts of one GPU's model on the host; without a GPU, or with several ranks, leave it out"
        );
    }
    Ok(())
}

/// Times sums that devices make between the ranks of `world`; all ranks come here.
///
/// # Errors
/// This build or machine has no such devices, or a rank failed.
pub fn time_device_sums(world: &Group, local_rank: usize) -> anyhow::Result<Vec<SumTimes>> {
    #[cfg(feature = "cuda")]
    return cuda::time_sums(world, local_rank);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (world, local_rank);
        DeviceKind::choose_for_ranks(&DeviceOptions::default(), TransportKind::Nccl).map(|_| vec![])
    }
}

/// Threads to use.
pub fn n_threads(options: &DeviceOptions) -> usize {
    options.threads.unwrap_or_else(system::default_threads).max(1)
}
