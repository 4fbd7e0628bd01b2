//! From tokens to tokens: sequences, cache pages, sampling and the loop around a model.

mod block_manager;
mod distributed;
mod draft;
mod draft_control;
mod engine;
mod generation_config;
mod page_store;
mod private;
mod profiled;
mod request;
mod runner;
mod sampler;
mod scheduler;
mod timings;

pub use block_manager::{BlockManager, PageHash};
pub use distributed::{Answer, CHECK_STEPS, Check, DistributedRunner, HostReduce, Pipeline, RankRunner, RankTimes};
pub use draft::{DraftCounts, DraftDepth, MAX_DRAFT_DEPTH};
pub use engine::{Counters, Engine, EngineError, Generated, Logits, Sequence, check_vocabulary};
pub use generation_config::*;
pub use page_store::PageStore;
pub use profiled::{Operation, Profile, Profiled};
pub use request::{Constraint, Event, FinishReason, Logprobs, Output, Request, RequestId};
pub use runner::{DeviceSampler, Drafted, Drafter, ModelRunner, RankStatus, Runner};
pub use sampler::*;
pub use scheduler::Scheduling;
pub use tandem_core::EXACT_ROWS;
pub use timings::{ByOperation, OperationTimes, ReadUsage, Spent, StepTimes, Timings, Usage};
