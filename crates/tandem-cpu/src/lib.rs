//! The CPU backend: vector kernels chosen at run time, a fork-join pool, weights read where they are mapped.

pub mod bandwidth;
pub mod isa;
pub mod kernels;
pub mod pool;
pub mod system;

mod backend;
mod cache;
mod scratch;
mod shared_mut;

pub use backend::{CpuBackend, CpuBuffer, CpuError, CpuIndices};
pub use cache::CpuCache;
pub use isa::Isa;
pub use kernels::activations::Numerics;
pub use pool::Pool;
