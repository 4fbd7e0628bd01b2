//! The cases, a file per kind of operation.

use tandem_core::Backend;

use crate::{Scale, Suite};

mod attention;
mod experts;
mod full;
mod index;
mod products;
mod rows;
mod sampling;
mod steps;

/// Rows of decode steps, prefill, and the borders between them: 64 rows are the most whose results do not depend on the
/// batch.
const BATCHES: [usize; 7] = [1, 2, 3, 63, 64, 65, 150];
/// How many of them have at most 64 rows.
const FEW: usize = 5;

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>, scale: Scale) {
    if scale == Scale::Full {
        return full::run(suite);
    }
    if scale == Scale::ManyRows {
        products::run(suite, &BATCHES[FEW..]);
        return experts::run(suite, &BATCHES[FEW..]);
    }
    let batches: &[usize] = if scale == Scale::OneRow { &BATCHES[..1] } else { &BATCHES };
    rows::run(suite, batches);
    products::run(suite, batches);
    experts::run(suite, batches);
    attention::run(suite, batches);
    index::run(suite, batches);
    sampling::run(suite, &sampling::SHAPES);
    steps::run(suite, batches);
}
