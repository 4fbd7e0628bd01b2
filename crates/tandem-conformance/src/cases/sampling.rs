//! Tokens that the device samples, on the terms of the engine's sampler.

use tandem_core::Backend;
use tandem_core::backend::{NO_TOKEN, SAMPLED, Sampling};
use tandem_engine::{Sampler, SamplingParams};

use crate::data::noise;
use crate::{Case, Oracle, Subject, Suite};

/// Sizes of the vocabulary, spread of the logits, steps.
pub(crate) const SHAPES: [(usize, f32, u64); 6] =
    [(1, 1.0, 1), (2, 1.0, 4), (9, 3.0, 8), (2880, 8.0, 12), (2880, 0.01, 8), (5000, 40.0, 8)];

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>, shapes: &[(usize, f32, u64)]) {
    suite.case(&AsTheHost { shapes });
    suite.case(&Unusual);
}

/// [`Backend::sample`] with the host's random numbers gives the host's tokens.
///
/// A draw that falls on the border between two tokens may go either way, because weights are rounded: of 1 token in 100.
struct AsTheHost<'a> {
    shapes: &'a [(usize, f32, u64)],
}

fn parameters() -> [SamplingParams; 12] {
    let warm = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    [
        SamplingParams::default(),
        warm.clone(),
        SamplingParams { temperature: 0.3, ..warm.clone() },
        SamplingParams { top_k: 1, ..warm.clone() },
        SamplingParams { top_k: 40, temperature: 1.7, ..warm.clone() },
        SamplingParams { top_p: 0.95, temperature: 0.6, ..warm.clone() },
        SamplingParams { top_p: 0.0, ..warm.clone() },
        SamplingParams { top_p: 0.999, ..warm.clone() },
        SamplingParams { min_p: 0.05, ..warm.clone() },
        SamplingParams { top_k: 300, top_p: 0.8, min_p: 0.01, temperature: 1.3, ..warm.clone() },
        SamplingParams { top_k: 1_000_000, temperature: 1e-3, ..warm.clone() },
        SamplingParams { min_p: 1.0, temperature: 2.0, ..warm },
    ]
}

/// Logits with ties, and tokens that a mask left out.
fn logits(seed: u64, n: usize, vocab: usize, spread: f32) -> Vec<f32> {
    let mut logits: Vec<f32> = noise(seed + vocab as u64, n * vocab).iter().map(|v| v * spread).collect();
    logits.iter_mut().skip(1).step_by(3).for_each(|v| *v = (*v * 4.0).round() / 4.0);
    if vocab >= 9 {
        logits.iter_mut().step_by(7).for_each(|v| *v = f32::NEG_INFINITY);
    }
    logits
}

impl Case for AsTheHost<'_> {
    type Expected = ();

    fn name(&self) -> String {
        format!("sample as the host does, vocabularies {:?}", self.shapes.iter().map(|s| s.0).collect::<Vec<_>>())
    }

    fn applies<B: Backend>(&self, b: &Subject<B>) -> bool {
        b.backend().samples()
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        let b = b.fresh();
        let (mut total, mut different) = (0, vec![]);
        for (i, (vocab, spread, steps)) in self.shapes.iter().copied().enumerate() {
            // Each shape has its own number of rows, and so its own recorded step.
            let params = &parameters()[i..];
            let n = params.len();
            let mut buffer = b.out(n, vocab);
            for step in 0..steps {
                let mut logits = logits(step, n, vocab, spread);
                let seeded = |i: usize| SamplingParams { seed: Some(100 * step + i as u64), ..params[i].clone() };
                let mut samplers: Vec<Sampler> =
                    (0..n).map(|i| Sampler::new(seeded(i)).map_err(|e| e.to_string())).collect::<Result<_, _>>()?;
                let mut twins = samplers.clone();
                let sampling: Vec<Sampling> = twins.iter_mut().map(Sampler::sampling).collect();
                let found = b.sample(&mut buffer, &logits, &sampling)?;
                for (i, (sampler, twin)) in samplers.iter_mut().zip(&mut twins).enumerate() {
                    let row = &mut logits[i * vocab..(i + 1) * vocab];
                    let expected = sampler.sample(row, &[]).map_err(|e| e.to_string())?;
                    total += 1;
                    if found[i] != expected {
                        different.push((vocab, step, i, found[i], expected));
                    }
                    if sampler.sampling() != twin.sampling() {
                        return Err("the next random numbers differ".into());
                    }
                }
            }
        }
        let few = different.len() * 100 <= total;
        if few { Ok(()) } else { Err(format!("{} of {total} tokens differ: {different:?}", different.len())) }
    }
}

/// Ties, NaN of both signs, no token at all, an infinite logit, and equal logits.
struct Unusual;

impl Case for Unusual {
    type Expected = ();

    fn name(&self) -> String {
        "sample from unusual logits".into()
    }

    fn applies<B: Backend>(&self, b: &Subject<B>) -> bool {
        b.backend().samples()
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        let b = b.fresh();
        let vocab = 3000;
        let mut logits = noise(3, 5 * vocab);
        logits[0] = 1.0;
        logits[2999] = 1.0;
        logits[vocab + 40] = f32::NAN;
        logits[vocab + 20] = -f32::NAN;
        logits[2 * vocab..3 * vocab].fill(f32::NEG_INFINITY);
        logits[3 * vocab + 77] = f32::INFINITY;
        logits[4 * vocab..].fill(-3.0);
        let mut buffer = b.out(5, vocab);
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, top_k: 1, top_p: 1.0, min_p: 0.0, unit: 0.999 };
            let found = b.sample(&mut buffer, &logits, &[sampling; 5])?;
            let expected = [0, SAMPLED | 20, NO_TOKEN, 77, 0];
            if found != expected {
                return Err(format!("temperature {temperature}: {found:?} instead of {expected:?}"));
            }
        }
        Ok(())
    }
}
