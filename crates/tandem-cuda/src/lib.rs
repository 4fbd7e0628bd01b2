//! The NVIDIA backend: CUDA C++ kernels (`kernels/`), compiled by NVRTC for the device found and kept on disk.
//!
//! The driver and NVRTC are loaded at run time, so that a binary with this crate starts on machines without either.

#[macro_use]
mod args;
mod attention;
mod backend;
mod batch;
mod buffer;
mod compile;
mod driver;
mod error;
mod group;
mod host_experts;
mod index;
mod linear;
mod matrix;
mod mlp;
mod nccl;
mod norm;
mod preamble;
mod stager;
mod step;

pub use backend::{CudaBackend, Options};
pub use buffer::{CudaBuffer, CudaIndices};
pub use compile::{KERNEL_FILES, kernel_source};
pub use driver::{DeviceInfo, Memory, device_present};
pub use error::CudaError;
pub use group::{CudaGroup, GroupBuffer, Handle, Peers, Way};
pub use host_experts::HostExperts;
pub use matrix::CudaMatrix;
pub use nccl::{UniqueId, forbid_multicast, nccl_present, unique_id};
pub use tandem_core::Numerics;
