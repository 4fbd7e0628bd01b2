//! What can go wrong with a device, said once and with a remedy.

/// An error of the device, its driver or its compiler.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CudaError {
    /// libcuda is not installed.
    #[error("no NVIDIA driver: libcuda.so.1 was not found. Install the driver, or run with --backend cpu")]
    NoDriver,
    /// The driver is there, but no device.
    #[error("the NVIDIA driver finds no device ({0}). Check nvidia-smi, or run with --backend cpu")]
    NoDevice(String),
    /// The driver lacks calls that the kernels or graphs need.
    #[error(
        "the NVIDIA driver supports CUDA {}.{}, and 12.4 is needed: install driver 550 or later, or run with --backend cpu",
        .0 / 1000, .0 % 1000 / 10
    )]
    DriverTooOld(i32),
    /// The device lacks instructions that the kernels use.
    #[error(
        "{name} has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or later: run with --backend cpu"
    )]
    Architecture {
        /// The device's name.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
    },
    /// NVRTC is not installed.
    #[error(
        "the CUDA run-time compiler was not found: libnvrtc.so must be on the loader's path (package \
         cuda-nvrtc, or the wheel nvidia-cuda-nvrtc and LD_LIBRARY_PATH)"
    )]
    NoCompiler,
    /// NVRTC is older than the device.
    #[error(
        "the CUDA run-time compiler does not know {arch}, the newest that it compiles for is sm_{newest}: install a newer \
         one (package cuda-nvrtc, or the wheel nvidia-cuda-nvrtc and LD_LIBRARY_PATH; 12.8 or later for Blackwell)"
    )]
    OldCompiler {
        /// Target.
        arch: String,
        /// The newest architecture that it knows, as 10 times its compute capability.
        newest: i32,
    },
    /// NVRTC refused the kernels.
    #[error("the kernels do not compile for {arch}, which is a bug:\n{log}")]
    Compile {
        /// Target.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// Not enough memory on the device.
    #[error("{wanted} bytes do not fit in the {free} bytes free on the GPU: {remedy}")]
    OutOfMemory {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes free.
        free: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// Kernels for these numerics are on the processor only.
    #[error("a GPU has no numerics {0}: use bf16 or f32, or --backend cpu")]
    Numerics(tandem_core::Numerics),
    /// More GPUs than sums are made over.
    #[error("{0} GPUs cannot share layers: at most 8 can; use fewer with --tp or --ep, and --pp for the rest")]
    Ranks(usize),
    /// libnccl is not installed.
    #[error(
        "NCCL was not found: libnccl.so.2 must be on the loader's path (package libnccl2, or the wheel nvidia-nccl-cu13 and \
         LD_LIBRARY_PATH)"
    )]
    NoNccl,
    /// NCCL reported a failure.
    #[error("NCCL failed to {what}: {message}")]
    Nccl {
        /// What was attempted.
        what: &'static str,
        /// NCCL's words.
        message: String,
    },
    /// The driver reported a failure.
    #[error("CUDA failed to {what}: {message}")]
    Driver {
        /// What was attempted.
        what: String,
        /// The driver's words.
        message: String,
    },
}
