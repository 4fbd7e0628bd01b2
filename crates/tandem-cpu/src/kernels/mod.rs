//! One operation per file; each file has the scalar definition that its vector variants are tested against.

pub mod attention;
pub mod index_select;
pub mod matrix;
pub mod norm;
pub mod rope;
pub mod router_topk;
pub mod silu_mul;
pub mod vector;
