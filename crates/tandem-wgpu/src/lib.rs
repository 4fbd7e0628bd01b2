//! The portable GPU backend: WGSL kernels over Vulkan and Metal, in single precision.
//!
//! An operation is one or two dispatches. `shaders/` has a file for each, in WGSL with the few directives of `template.rs`.
//! Nothing here knows a model.

mod args;
mod attention;
mod backend;
mod batch;
mod buffer;
mod device;
mod error;
mod linear;
mod matrix;
mod memory;
mod mixing;
mod pipelines;
mod recorder;
mod residency;
#[cfg(test)]
mod shader_tests;
mod template;

pub use backend::{Options, Tiles, Tuning, WgpuBackend};
pub use batch::WgpuBatch;
pub use buffer::{WgpuBuffer, WgpuCache, WgpuIndices};
pub use device::{AdapterInfo, adapters, device_present};
pub use error::WgpuError;
pub use matrix::WgpuMatrix;
pub use recorder::{KernelTime, SubmissionStats};
pub use residency::Residency;
