//! The CPU backend: vector kernels chosen at run time and a fork-join pool. Weights are read where they are mapped, or
//! from tiles that they are repacked into at load.

pub mod bandwidth;
pub mod isa;
pub mod kernels;
pub mod peak;
pub mod pool;
pub mod process;
pub mod system;

mod backend;
mod cache;
mod matrix;
mod scratch;
mod shared_mut;
mod tiles;

pub use backend::{CpuBackend, CpuBuffer, CpuError, CpuIndices};
pub use cache::CpuCache;
pub use isa::Isa;
pub use matrix::CpuMatrix;
pub use pool::Pool;
pub use tandem_core::Numerics;
