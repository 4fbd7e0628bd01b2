//! The families, a file each: what a layer's weights and cached vectors are, and its forward pass.
//!
//! What all families share (embedding, residual stream, sums over ranks, head) is in [`crate::decoder`]; which
//! `model_type` belongs to which file is in [`crate::registry`].

pub(crate) mod deepseek_v32;
pub(crate) mod llama;
