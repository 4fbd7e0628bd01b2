//! What the timings that every run keeps cost: the engine steps with them and without them in turns, in one process.

use std::time::Instant;

use anyhow::ensure;
use serde::Serialize;
use tandem_engine::{DraftDepth, Request};

use crate::LogitsRows;
use crate::load::load;
use crate::news::OnNews;
use crate::options::{LoadOptions, ModelOptions};

/// Steps with timings, and steps without, of one pair.
const N_STEPS: usize = 4;
/// Seconds between two looks at the memory of the weights.
const LOOKS_EVERY: f64 = super::residency::EVERY.as_secs_f64();

/// Steps with timings against steps without, as shares of the time without: 0.01 is one per cent more.
#[derive(Clone, Debug, Serialize)]
pub struct Overhead {
    /// The model's directory.
    pub model: String,
    /// The device in one line.
    pub device: String,
    /// Pairs of runs of `steps_per_run` steps each.
    pub pairs: usize,
    /// See `pairs`.
    pub steps_per_run: usize,
    /// Milliseconds of a step without timings: the median of all.
    pub step_ms: f64,
    /// Of the quarter of all steps that took least: what other programs take is in the rest.
    pub overhead_quartile: f64,
    /// Of the medians of all steps.
    pub overhead_of_medians: f64,
    /// Median over the pairs.
    pub overhead_median: f64,
    /// Mean over the pairs, the outer tenths left out.
    pub overhead_mean: f64,
    /// Standard error of that mean.
    pub overhead_standard_error: f64,
    /// Share of one core that looking at the weights' memory every few seconds takes.
    pub residency_share: f64,
}

/// Measures it over so many pairs of runs of a few steps.
///
/// # Errors
/// The model cannot be loaded, its context is too short for the steps, or the device failed.
pub fn timing_overhead(options: &ModelOptions, pairs: usize, on_news: OnNews<'_>) -> anyhow::Result<Overhead> {
    let options = ModelOptions { draft_depth: Some(DraftDepth::OFF), ..options.clone() };
    let mut loaded = load(&options, LoadOptions::one_sequence(LogitsRows::One), None, on_news)?;
    let n_steps = 2 * N_STEPS * (pairs + 1);
    ensure!(
        n_steps + 8 < loaded.engine.context(),
        "{pairs} pairs are {n_steps} steps, more than a context of {} tokens; ask for fewer, or for a larger --context",
        loaded.engine.context()
    );
    let start = Instant::now();
    loaded.recorder.residency().look();
    let residency_share = start.elapsed().as_secs_f64() / LOOKS_EVERY;
    loaded.engine.submit(Request { prompt: vec![0; 4], max_tokens: usize::MAX, ..Request::default() })?;
    let mut outputs = vec![];
    let mut run = |on: bool| -> anyhow::Result<[f64; N_STEPS]> {
        loaded.engine.set_timings(on);
        let mut times = [0.0; N_STEPS];
        for time in &mut times {
            let start = Instant::now();
            loaded.engine.step(&mut outputs)?;
            outputs.clear();
            *time = start.elapsed().as_secs_f64() * 1e3;
        }
        Ok(times)
    };
    // The prompt, and the first steps after it.
    run(true)?;
    run(false)?;
    let (mut with, mut without, mut ratios) = (vec![], vec![], vec![]);
    for i in 0..pairs {
        // Each goes first in half of the pairs: steps become longer with the context.
        let first = run(i % 2 == 0)?;
        let second = run(i % 2 == 1)?;
        let (on, off) = if i % 2 == 0 { (first, second) } else { (second, first) };
        ratios.push(on.iter().sum::<f64>() / off.iter().sum::<f64>() - 1.0);
        with.extend(on);
        without.extend(off);
    }
    for list in [&mut with, &mut without, &mut ratios] {
        list.sort_by(f64::total_cmp);
    }
    let more_at = |share: usize| with[with.len() / share] / without[without.len() / share] - 1.0;
    let inner = &ratios[pairs / 10..pairs - pairs / 10];
    let n = inner.len() as f64;
    let mean = inner.iter().sum::<f64>() / n;
    let variance = inner.iter().map(|ratio| (ratio - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    Ok(Overhead {
        model: loaded.recorder.facts.model.clone(),
        device: loaded.device.clone(),
        pairs,
        steps_per_run: N_STEPS,
        step_ms: without[without.len() / 2],
        overhead_quartile: more_at(4),
        overhead_of_medians: more_at(2),
        overhead_median: ratios[pairs / 2],
        overhead_mean: mean,
        overhead_standard_error: (variance / n).sqrt(),
        residency_share,
    })
}
