//! Why a model is as fast as it is: what a run did ([`RunRecord`]), whether its weights stay in memory ([`Residency`]), what
//! that means ([`explain()`]), and what this machine and a model make one expect ([`doctor()`]).
//!
//! A verdict follows from recorded numbers alone, so that it can be made later, elsewhere, and in tests. It prints nothing.

mod doctor;
mod explain;
mod finding;
mod gpus;
mod hosts;
mod machine;
pub mod matrix;
mod overhead;
mod pairs;
mod plans;
mod predict;
mod record;
mod report;
mod residency;

pub use doctor::{DoctorOptions, Report, doctor};
pub use explain::{Advice, Cause, CauseKind, Explanation, Part, explain};
pub use finding::{Finding, Level};
pub use machine::Machine;
pub use overhead::{Overhead, timing_overhead};
pub use pairs::{PairSpeed, findings as pair_findings, pairs};
pub use plans::PlanSpeed;
pub use predict::{Prediction, predict};
pub use record::{Facts, KindBytes, Phase, RankRecord, Recorder, RunRecord, last_run_file, read_last_run};
pub use report::{Bar, write_chart};
pub use residency::Residency;
