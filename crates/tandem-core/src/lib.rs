//! Formats, checkpoints, configurations and the traits that backends implement.
//!
//! This crate has no threads, no network and no device code.

pub mod backend;
pub mod checkpoint;
pub mod config;
pub mod dtype;
pub mod gguf;
pub mod json;
mod numerics;
pub mod quant;
#[cfg_attr(not(unix), path = "shrink_never.rs")]
mod shrink;
pub mod weights;

pub use backend::{Backend, Batch, EXACT_ROWS};
pub use checkpoint::{Checkpoint, CheckpointError};
pub use config::{ConfigError, ModelConfig, ModelType};
pub use dtype::{DType, Float};
pub use numerics::{Numerics, UnknownNumerics};
