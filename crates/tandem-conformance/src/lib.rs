//! One suite for every backend: each operation and each fused block of [`Backend`] gives what the scalar kernels of the
//! CPU give, to tolerances that follow from types and lengths (`tolerance.rs`), over every format, ragged shapes, odd
//! batches, and sequences whose pages are out of order.
//!
//! A backend calls it from one test:
//!
//! ```ignore
//! let subjects = vec![Subject::new("mine f32", Precision::F32, || Mine::new(), |b, ids, out| b.read(ids, out))];
//! suite(subjects, Scale::from_environment()).assert_passed();
//! ```
//!
//! `cases/` has a file per kind of operation. `subject.rs` alone calls the backend.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tandem_core::Backend;
use tandem_cpu::{CpuBackend, Isa, Numerics};

mod cases;
mod data;
mod subject;
mod tolerance;

pub use subject::Subject;
pub use tolerance::{Precision, Rounding, Sums};

use tolerance::{Budget, PEAK};

/// The scalar kernels, which say what is right.
type Oracle = Subject<CpuBackend>;

/// How much of the suite runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// One row and the smallest shapes: for emulators and sanitizers.
    OneRow,
    /// Products and experts in batches of more than 64 rows: for kernels that only those take.
    ManyRows,
    /// Ragged shapes and all batches: for `cargo test`.
    Small,
    /// The shapes of GLM-5.1 and DeepSeek-V3.2, up to three rows, sampled outputs: for scripts.
    Full,
}

impl Scale {
    /// `TANDEM_CONFORMANCE` as `one-row`, `many-rows`, `small` or `full`; small when it is not set.
    ///
    /// # Panics
    /// When it is set to anything else.
    pub fn from_environment() -> Scale {
        match std::env::var("TANDEM_CONFORMANCE").as_deref() {
            Err(_) | Ok("small") => Scale::Small,
            Ok("one-row") => Scale::OneRow,
            Ok("many-rows") => Scale::ManyRows,
            Ok("full") => Scale::Full,
            Ok(other) => panic!("TANDEM_CONFORMANCE is one-row, many-rows, small or full, found {other:?}"),
        }
    }
}

/// Runs the suite on every subject. A case is one set of inputs on one subject.
pub fn suite<B: Backend>(subjects: Vec<Subject<B>>, scale: Scale) -> Report {
    let oracle = scalar(std::thread::available_parallelism().map_or(1, usize::from));
    let mut suite = Suite { subjects, oracle, report: Report::default() };
    cases::run(&mut suite, scale);
    suite.report
}

fn scalar(n_threads: usize) -> Oracle {
    let make = move || CpuBackend::with_isa(n_threads, Numerics::F32, Isa::Scalar);
    Subject::new("scalar", Precision::F32, make, |_, ids, out| ids.read(out))
}

/// The outcome.
#[derive(Debug, Default)]
pub struct Report {
    /// Cases that ran.
    pub cases: usize,
    /// The failures: the case and the subject, and the difference.
    pub failures: Vec<String>,
    /// Cases that a subject's largest buffer excludes.
    pub excluded: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (failed, excluded) = (self.failures.len(), self.excluded.len());
        write!(f, "conformance: cases={} failed={failed} excluded={excluded}", self.cases)
    }
}

impl Report {
    /// Prints the counts, for scripts to read, and every failure.
    ///
    /// # Panics
    /// When a case failed or none ran.
    pub fn assert_passed(self) {
        println!("{self}");
        self.excluded.iter().for_each(|name| println!("excluded: {name}"));
        self.failures.iter().for_each(|failure| println!("FAILED {failure}"));
        assert!(self.failures.is_empty() && self.cases > 0, "{self}:\n{}", self.failures.join("\n"));
    }
}

/// A set of inputs, and the comparison of results.
trait Case {
    /// What the scalar kernels give.
    type Expected;

    fn name(&self) -> String;

    /// Bytes of the largest matrix, cache or buffer.
    fn bytes(&self) -> usize {
        0
    }

    /// Whether the subject has the operation; where it has not, there is no case.
    fn applies<B: Backend>(&self, _: &Subject<B>) -> bool {
        true
    }

    fn expected(&self, oracle: &Oracle) -> Self::Expected;

    /// # Errors
    /// The difference, in words.
    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Self::Expected) -> Result<(), String>;
}

/// Subjects under test, and the outcome so far.
struct Suite<B: Backend> {
    subjects: Vec<Subject<B>>,
    oracle: Oracle,
    report: Report,
}

impl<B: Backend> Suite<B> {
    fn case(&mut self, case: &impl Case) {
        let expected = case.expected(&self.oracle);
        for subject in &self.subjects {
            let name = format!("{}: {}", subject.name, case.name());
            if case.bytes() > subject.largest_buffer {
                self.report.excluded.push(name);
                continue;
            }
            if !case.applies(subject) {
                continue;
            }
            self.report.cases += 1;
            let outcome = catch_unwind(AssertUnwindSafe(|| case.check(subject, &expected)));
            let outcome = outcome.unwrap_or_else(|panic| Err(format!("panicked: {}", message(&*panic))));
            if let Err(difference) = outcome {
                self.report.failures.push(format!("{name}: {difference}"));
            }
        }
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// Root mean square.
fn rms(values: &[f32]) -> f64 {
    (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len().max(1) as f64).sqrt()
}

/// Compares values with those of the scalar kernels. `size` is the root mean square that the inputs make likely, for
/// results of too few values to have their own; 0 where there are many.
fn compare(what: &str, found: &[f32], expected: &[f32], size: f64, budget: Budget) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} values instead of {}", found.len(), expected.len()));
    }
    if let Some(i) = (0..found.len()).find(|i| !found[*i].is_finite()) {
        return Err(format!("{what}: value {i} is {}, expected {}", found[i], expected[i]));
    }
    let differences: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
    let size = rms(expected).max(size);
    let (error, allowed) = (rms(&differences), budget.tolerance() * size);
    if error > allowed {
        return Err(format!("{what}: relative error {:.2e}, allowed {:.2e}", error / size, budget.tolerance()));
    }
    // A value's own error grows with its terms, which are at least as large as the value.
    let limit = |i: usize| PEAK * budget.tolerance() * size.hypot(f64::from(expected[i]));
    match (0..found.len()).find(|i| f64::from(differences[*i].abs()) > limit(*i)) {
        Some(i) => Err(format!("{what}: value {i} is {}, expected {}; size {size:.2e}", found[i], expected[i])),
        None => Ok(()),
    }
}

/// The same bits, NaN for NaN.
fn same(what: &str, found: &[f32], expected: &[f32]) -> Result<(), String> {
    let unlike =
        |i: &usize| found[*i].to_bits() != expected[*i].to_bits() && !(found[*i].is_nan() && expected[*i].is_nan());
    if found.len() != expected.len() {
        return Err(format!("{what}: {} values instead of {}", found.len(), expected.len()));
    }
    match (0..found.len()).find(unlike) {
        Some(i) => Err(format!("{what}: value {i} is {:?}, expected exactly {:?}", found[i], expected[i])),
        None => Ok(()),
    }
}

/// The same integers.
fn alike(what: &str, found: &[i32], expected: &[i32]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} integers instead of {}", found.len(), expected.len()));
    }
    match (0..found.len()).find(|i| found[*i] != expected[*i]) {
        Some(i) => Err(format!("{what}: entry {i} is {}, expected {}", found[i], expected[i])),
        None => Ok(()),
    }
}
