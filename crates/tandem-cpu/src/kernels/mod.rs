//! One operation per file; each file has the scalar definition that its vector variants are tested against.

pub mod activations;
mod affine;
pub mod attention;
#[cfg(target_arch = "x86_64")]
pub(crate) mod attention_amx;
#[cfg(target_arch = "x86_64")]
mod attention_avx2;
#[cfg(target_arch = "x86_64")]
mod attention_avx512;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod byte_rows;
#[cfg(target_arch = "x86_64")]
mod exp;
pub mod index_select;
pub mod matrix;
#[cfg(target_arch = "aarch64")]
mod neon;
mod nibble_rows;
pub mod norm;
pub mod rope;
pub mod router_topk;
mod rows;
pub mod silu_mul;
pub(crate) mod tile_rows;
pub mod vector;
