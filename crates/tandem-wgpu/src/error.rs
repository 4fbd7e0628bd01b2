//! What can go wrong with a device, said once and with a remedy.

/// An error of a GPU or its driver.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum WgpuError {
    /// Nothing to run on.
    #[error(
        "no GPU was found: install a Vulkan driver (Debian: apt-get install mesa-vulkan-drivers libvulkan1), or run with \
         --backend cpu"
    )]
    NoAdapter,
    /// The choice names no adapter, or several.
    #[error("--device {wanted} names {found} of the adapters here; give one of the numbers: {available}")]
    Device {
        /// The choice.
        wanted: String,
        /// How many it fits.
        found: usize,
        /// What there is.
        available: String,
    },
    /// The adapter lacks what every kernel needs.
    #[error("{name} cannot run the kernels: {lacks}. Choose another adapter with --device, or run with --backend cpu")]
    Unsuitable {
        /// The adapter's name.
        name: String,
        /// What is missing.
        lacks: String,
    },
    /// Not enough memory on the device.
    #[error(
        "the GPU has no memory left for {wanted} bytes ({operation}): ask for a smaller --context, use a smaller model, or \
         run with --backend cpu"
    )]
    OutOfMemory {
        /// Bytes asked for.
        wanted: u64,
        /// During which operation.
        operation: String,
    },
    /// The device is gone.
    #[error(
        "the GPU was lost during {operation} ({reason}): it was reset, removed, or one piece of work took too long"
    )]
    Lost {
        /// The operation enqueued last.
        operation: String,
        /// The driver's words.
        reason: String,
    },
    /// The driver refused something.
    #[error("the GPU failed during {operation}: {message}")]
    Driver {
        /// The operation enqueued last.
        operation: String,
        /// The driver's words.
        message: String,
    },
}
