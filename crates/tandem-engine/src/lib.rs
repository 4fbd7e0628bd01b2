//! From tokens to tokens: sequences, cache pages, sampling and the loop around a model.

mod block_manager;
mod distributed;
mod engine;
mod generation_config;
mod profiled;
mod runner;
mod sampler;

pub use block_manager::BlockManager;
pub use distributed::{CHECK_STEPS, DistributedRunner, HostReduce, Pipeline, RankRunner};
pub use engine::{Engine, EngineError, FinishReason, Logits, Sequence, StopConditions};
pub use generation_config::*;
pub use profiled::{Operation, Profile, Profiled};
pub use runner::{ModelRunner, Runner};
pub use sampler::*;
