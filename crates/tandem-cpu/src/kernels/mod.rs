//! One operation per file; each file has the scalar definition that its vector variants are tested against.

pub mod activations;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod attention_avx512;
#[cfg(target_arch = "x86_64")]
mod byte_rows;
#[cfg(target_arch = "x86_64")]
mod exp;
#[cfg(target_arch = "x86_64")]
pub(crate) mod gemm;
pub mod index_select;
pub mod matrix;
#[cfg(target_arch = "x86_64")]
mod nibble_rows;
pub mod norm;
pub mod rope;
pub mod router_topk;
#[cfg(target_arch = "x86_64")]
mod rows;
pub mod silu_mul;
pub mod vector;
