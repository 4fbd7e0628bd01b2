//! Choosing the next token from logits: penalties, temperature, truncation and a seeded draw.
//!
//! Owns the order of these steps and the random numbers. It deliberately knows nothing of grammars (they mask logits
//! with `-inf` before), stop conditions or batches: one [`Sampler`] serves one sequence.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use tandem_core::backend::{NO_TOKEN, SAMPLED, Sampling};
use thiserror::Error;

/// How to sample a token. The default is greedy and changes nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest most likely tokens whose probabilities reach `top_p`; 1 keeps all, 0 only the first.
    pub top_p: f32,
    /// Keep tokens with at least `min_p` times the probability of the most likely one; 0 keeps all.
    pub min_p: f32,
    /// For tokens in prompt or output: positive logits are divided by it, negative ones multiplied; 1 changes nothing
    /// ([CTRL](https://arxiv.org/abs/1909.05858), section 4.1, in Hugging Face's form).
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the output.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the output, once per occurrence.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens, before the penalties.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draws; `None` takes a fresh one.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// A sampling parameter outside its range.
#[derive(Clone, Debug, Error, PartialEq)]
#[error("{name} is {found}, expected {expected}")]
pub struct InvalidParam {
    /// The parameter's name, as in the API.
    pub name: &'static str,
    /// The value given.
    pub found: f32,
    /// The range, in words.
    pub expected: &'static str,
}

impl SamplingParams {
    /// Checks every range.
    ///
    /// # Errors
    /// Names the first parameter outside its range.
    pub fn validate(&self) -> Result<(), InvalidParam> {
        let check = |name, found: f32, is_valid: bool, expected| {
            if is_valid && found.is_finite() { Ok(()) } else { Err(InvalidParam { name, found, expected }) }
        };
        let temperature = self.temperature;
        check("temperature", temperature, temperature >= 0.0, "a number of at least 0 (0 is greedy)")?;
        check("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p), "a number from 0 to 1 (1 keeps all tokens)")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1 (0 keeps all tokens)")?;
        let repetition = self.repetition_penalty;
        check("repetition_penalty", repetition, repetition > 0.0, "a number above 0 (1 changes nothing)")?;
        let in_range = |penalty: f32| (-2.0..=2.0).contains(&penalty);
        let expected = "a number from -2 to 2 (0 changes nothing)";
        check("presence_penalty", self.presence_penalty, in_range(self.presence_penalty), expected)?;
        check("frequency_penalty", self.frequency_penalty, in_range(self.frequency_penalty), expected)?;
        for &(_, bias) in &self.logit_bias {
            check("logit_bias", bias, (-100.0..=100.0).contains(&bias), "numbers from -100 to 100")?;
        }
        Ok(())
    }

    /// Whether the most likely token is always chosen.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether a [`Sampling`] says all of it: a token depends on the logits alone.
    pub fn is_plain(&self) -> bool {
        self.logit_bias.is_empty() && !self.has_penalties()
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Why no token could be sampled.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SampleError {
    /// The model produced garbage.
    #[error("the logit of token {token_id} is NaN: the forward pass is broken (overflow, or a damaged checkpoint)")]
    NanLogits {
        /// The first such token.
        token_id: u32,
    },
    /// Every token is masked.
    #[error(
        "no token is allowed: all {n_logits} logits are -inf (a grammar or logit_bias excludes the whole vocabulary)"
    )]
    NoCandidates {
        /// Length of the logits.
        n_logits: usize,
    },
}

/// A token that may be sampled: its logit over the temperature, and its id.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    token_id: u32,
}

/// Most likely first; lowest id first among equals. No NaN gets here.
fn by_likelihood(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token_id.cmp(&b.token_id))
}

/// Samples the tokens of one sequence.
///
/// The same parameters, seed, logits and history give the same tokens on every machine with IEEE arithmetic and the
/// same `exp`.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    n_prompt_tokens: usize,
    seed: u64,
    rng: Xoshiro256PlusPlus,
    counts: HistoryCounts,
    /// Scratch, kept between steps.
    candidates: Vec<Candidate>,
    /// Scratch: probability of each candidate, relative to the most likely one.
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler that takes the whole history as output (see [`Self::with_prompt_len`]).
    ///
    /// # Errors
    /// When a parameter is outside its range.
    pub fn new(params: SamplingParams) -> Result<Self, InvalidParam> {
        params.validate()?;
        // Adding 0.0 turns -0.0 into 0.0.
        let params = SamplingParams { temperature: params.temperature + 0.0, ..params };
        let seed = params.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        Ok(Self {
            params,
            n_prompt_tokens: 0,
            seed,
            rng: Xoshiro256PlusPlus::from_seed(seed),
            counts: HistoryCounts::default(),
            candidates: Vec::new(),
            weights: Vec::new(),
        })
    }

    /// Declares the first `n_prompt_tokens` of the history to be the prompt: presence and frequency penalties leave it
    /// out (OpenAI's and vLLM's meaning), the repetition penalty counts it.
    #[must_use]
    pub fn with_prompt_len(mut self, n_prompt_tokens: usize) -> Self {
        self.n_prompt_tokens = n_prompt_tokens;
        self.counts = HistoryCounts::default();
        self
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The seed in use, given or fresh: with it the run can be repeated.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Samples a token id from `logits` `[vocab_size] f32`; `history` is prompt, then output so far.
    ///
    /// Order: logit bias, repetition, presence and frequency penalty (these change `logits`), temperature, top-k,
    /// top-p, min-p, draw. Top-p is relative to what top-k left, as in Hugging Face and vLLM. Among equal logits lower
    /// ids come first, and exactly `top_k` tokens stay. Greedy sampling draws no random number, any other one.
    ///
    /// # Errors
    /// When a logit is NaN, or none is above `-inf`.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32, SampleError> {
        self.adjust(logits, history);
        let best = argmax(logits)?;
        let max_logit = logits[best as usize];
        let unit = self.draw();
        // An infinite logit leaves no finite odds to draw from.
        if self.params.is_greedy() || max_logit == f32::INFINITY {
            return Ok(best);
        }
        self.collect_candidates(logits, max_logit);
        self.truncate();
        let total: f64 = self.weights.iter().sum();
        Ok(self.pick(unit * total))
    }

    /// How a device samples the next token in place of [`Self::sample`]; takes its random number. For parameters that
    /// are [plain](SamplingParams::is_plain).
    pub fn sampling(&mut self) -> Sampling {
        let unit = self.draw();
        self.sampling_with(unit)
    }

    fn sampling_with(&self, unit: f64) -> Sampling {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        Sampling { temperature, top_k, top_p, min_p, unit }
    }

    /// How a device samples the next `n` tokens, some of which may never be: [`Sampler::skip`] says how many were.
    pub(crate) fn sampling_ahead(&self, n: usize) -> Vec<Sampling> {
        let mut rng = self.rng.clone();
        (0..n).map(|_| self.sampling_with(self.draw_from(&mut rng))).collect()
    }

    /// Takes the random numbers of `n` tokens that a device has sampled.
    pub(crate) fn skip(&mut self, n: usize) {
        (0..n).for_each(|_| _ = self.draw());
    }

    fn draw(&mut self) -> f64 {
        let mut rng = self.rng.clone();
        let unit = self.draw_from(&mut rng);
        self.rng = rng;
        unit
    }

    fn draw_from(&self, rng: &mut Xoshiro256PlusPlus) -> f64 {
        if self.params.is_greedy() { 0.0 } else { rng.next_unit() }
    }

    fn adjust(&mut self, logits: &mut [f32], history: &[u32]) {
        for &(token_id, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token_id as usize) {
                *logit += bias;
            }
        }
        if !self.params.has_penalties() {
            return;
        }
        self.counts.update(history, self.n_prompt_tokens);
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        for (&token_id, count) in &self.counts.by_token {
            let Some(logit) = logits.get_mut(token_id as usize) else { continue };
            if *logit > 0.0 {
                *logit /= repetition_penalty;
            } else {
                *logit *= repetition_penalty;
            }
            if count.n_output > 0 {
                *logit -= frequency_penalty * count.n_output as f32 + presence_penalty;
            }
        }
    }

    /// Fills `candidates` with every token above `-inf`, in order of id, as odds relative to the most likely token.
    fn collect_candidates(&mut self, logits: &[f32], max_logit: f32) {
        let inverse_temperature = 1.0 / self.params.temperature;
        self.candidates.clear();
        for (token_id, &logit) in (0u32..).zip(logits) {
            // Subtracting first keeps a tiny temperature from overflowing: the best candidate is at exactly 0.
            let logit = if logit == max_logit { 0.0 } else { (logit - max_logit) * inverse_temperature };
            if logit > f32::NEG_INFINITY {
                self.candidates.push(Candidate { logit, token_id });
            }
        }
    }

    /// Applies top-k, top-p and min-p; leaves `weights` parallel to `candidates`.
    fn truncate(&mut self) {
        let SamplingParams { top_p, min_p, .. } = self.params;
        let top_k = self.params.top_k as usize;
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(top_k - 1, by_likelihood);
            self.candidates.truncate(top_k);
            self.candidates.sort_unstable_by(by_likelihood);
        }
        if top_p < 1.0 {
            let total: f64 = self.candidates.iter().map(weight).sum();
            let n_kept = select_mass(&mut self.candidates, f64::from(top_p) * total);
            self.candidates.truncate(n_kept);
        }
        if min_p > 0.0 {
            let min_logit = min_p.ln();
            self.candidates.retain(|candidate| candidate.logit >= min_logit);
        }
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(weight));
    }

    fn pick(&self, target: f64) -> u32 {
        let mut mass = 0.0;
        let mut last = 0;
        for (candidate, &weight) in self.candidates.iter().zip(&self.weights) {
            // A weight that underflowed to zero is never sampled, nor is it the remainder's heir.
            if weight > 0.0 {
                mass += weight;
                last = candidate.token_id;
                if target < mass {
                    break;
                }
            }
        }
        last
    }
}

/// What a device's word means: [`tandem_core::Backend::collect`].
///
/// # Errors
/// As [`argmax`].
pub(crate) fn sampled(word: u32, n_logits: usize) -> Result<u32, SampleError> {
    match word {
        NO_TOKEN => Err(SampleError::NoCandidates { n_logits }),
        word if word & SAMPLED != 0 => Err(SampleError::NanLogits { token_id: word & !SAMPLED }),
        token_id => Ok(token_id),
    }
}

/// The token with the largest logit, the lowest id among equals.
///
/// # Errors
/// When a logit is NaN, or none is above `-inf`.
pub fn argmax(logits: &[f32]) -> Result<u32, SampleError> {
    let mut best = None;
    let mut max_logit = f32::NEG_INFINITY;
    for (token_id, &logit) in (0u32..).zip(logits) {
        if logit > max_logit {
            max_logit = logit;
            best = Some(token_id);
        } else if logit.is_nan() {
            return Err(SampleError::NanLogits { token_id });
        }
    }
    best.ok_or(SampleError::NoCandidates { n_logits: logits.len() })
}

/// Natural logarithm of the softmax probability of `token_id`. Call it before [`Sampler::sample`], which changes the
/// logits, for the model's own probability.
///
/// # Panics
/// When `token_id` is outside `logits`.
pub fn logprob(logits: &[f32], token_id: u32) -> f32 {
    (f64::from(logits[token_id as usize]) - log_sum_exp(logits)) as f32
}

/// The `n_top` most likely tokens and their log-probabilities, most likely first.
pub fn top_logprobs(logits: &[f32], n_top: usize) -> Vec<(u32, f32)> {
    let mut candidates: Vec<Candidate> =
        (0u32..).zip(logits).map(|(token_id, &logit)| Candidate { logit, token_id }).collect();
    if n_top == 0 || candidates.is_empty() {
        return Vec::new();
    }
    if n_top < candidates.len() {
        candidates.select_nth_unstable_by(n_top - 1, by_likelihood);
        candidates.truncate(n_top);
    }
    candidates.sort_unstable_by(by_likelihood);
    let log_total = log_sum_exp(logits);
    candidates.into_iter().map(|c| (c.token_id, (f64::from(c.logit) - log_total) as f32)).collect()
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max_logit = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|&logit| (f64::from(logit) - max_logit).exp()).sum();
    max_logit + total.ln()
}

fn weight(candidate: &Candidate) -> f64 {
    f64::from(candidate.logit).exp()
}

/// Moves the fewest most likely candidates whose weights reach `mass` (at least one) to the front, sorted; returns
/// their number. Selects blocks of growing size instead of sorting the vocabulary: usually a few hundred tokens
/// suffice.
fn select_mass(candidates: &mut [Candidate], mass: f64) -> usize {
    const FIRST_BLOCK: usize = 64;
    let mut reached = 0.0;
    let mut n_sorted = 0;
    let mut n_block = FIRST_BLOCK;
    while n_sorted < candidates.len() {
        let rest = &mut candidates[n_sorted..];
        let n = n_block.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, by_likelihood);
        }
        rest[..n].sort_unstable_by(by_likelihood);
        for candidate in &rest[..n] {
            reached += weight(candidate);
            n_sorted += 1;
            if reached >= mass {
                return n_sorted;
            }
        }
        n_block *= 4;
    }
    n_sorted
}

#[derive(Clone, Copy, Debug, Default)]
struct TokenCount {
    n_prompt: u32,
    n_output: u32,
}

/// Occurrences of each token in the history, kept up to date from step to step; tokens taken back (rejected drafts) are
/// noticed by comparing with the copy.
#[derive(Clone, Debug, Default)]
struct HistoryCounts {
    counted: Vec<u32>,
    by_token: HashMap<u32, TokenCount>,
}

impl HistoryCounts {
    fn update(&mut self, history: &[u32], n_prompt_tokens: usize) {
        // The usual step only appends; comparing slices is a memcmp, so a long context costs microseconds.
        let n_common = if history.starts_with(&self.counted) {
            self.counted.len()
        } else {
            self.counted.iter().zip(history).take_while(|(a, b)| a == b).count()
        };
        for position in (n_common..self.counted.len()).rev() {
            let token_id = self.counted[position];
            if let Some(count) = self.by_token.get_mut(&token_id) {
                let n = if position < n_prompt_tokens { &mut count.n_prompt } else { &mut count.n_output };
                *n -= 1;
                if count.n_prompt + count.n_output == 0 {
                    self.by_token.remove(&token_id);
                }
            }
        }
        self.counted.truncate(n_common);
        for (position, &token_id) in history.iter().enumerate().skip(n_common) {
            let count = self.by_token.entry(token_id).or_default();
            *(if position < n_prompt_tokens { &mut count.n_prompt } else { &mut count.n_output }) += 1;
            self.counted.push(token_id);
        }
    }
}

/// xoshiro256++ 1.0, seeded through SplitMix64 as its authors advise
/// (Blackman and Vigna, [Scrambled linear pseudorandom number generators](https://arxiv.org/abs/1805.01407)).
#[derive(Clone, Debug)]
struct Xoshiro256PlusPlus {
    state: [u64; 4],
}

impl Xoshiro256PlusPlus {
    fn from_seed(seed: u64) -> Self {
        let mut counter = seed;
        Self { state: std::array::from_fn(|_| split_mix64(&mut counter)) }
    }

    fn next_u64(&mut self) -> u64 {
        let [s0, s1, s2, s3] = &mut self.state;
        let result = s0.wrapping_add(*s3).rotate_left(23).wrapping_add(*s0);
        let shifted = *s1 << 17;
        *s2 ^= *s0;
        *s3 ^= *s1;
        *s1 ^= *s2;
        *s0 ^= *s3;
        *s2 ^= shifted;
        *s3 = s3.rotate_left(45);
        result
    }

    /// Uniform in [0, 1): the upper 53 bits.
    fn next_unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// Steele, Lea and Flood, [Fast splittable pseudorandom number generators](https://doi.org/10.1145/2714064.2660195).
fn split_mix64(counter: &mut u64) -> u64 {
    *counter = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *counter;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const N_DRAWS: usize = 20_000;

    fn warm() -> SamplingParams {
        SamplingParams { temperature: 1.0, seed: Some(7), ..SamplingParams::default() }
    }

    fn logits_of(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32).collect()
    }

    fn draw(params: SamplingParams, logits: &[f32], n_draws: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(params).unwrap();
        (0..n_draws).map(|_| sampler.sample(&mut logits.to_vec(), &[]).unwrap()).collect()
    }

    /// Pearson's chi-square against `expected` probabilities; zero means never drawn. The bound is mean + 5 standard
    /// deviations (a chi-square variable of k degrees of freedom has mean k and variance 2k).
    #[track_caller]
    fn check_distribution(params: SamplingParams, logits: &[f32], expected: &[f64]) {
        let mut counts = vec![0.0f64; logits.len()];
        for token_id in draw(params.clone(), logits, N_DRAWS) {
            counts[token_id as usize] += 1.0;
        }
        let mut chi_square = 0.0;
        let mut n_cells = 0.0f64;
        for (token_id, (&count, &probability)) in counts.iter().zip(expected).enumerate() {
            if probability == 0.0 {
                assert_eq!(count, 0.0, "token {token_id} must not be drawn: {params:?}");
            } else {
                let mean = probability * N_DRAWS as f64;
                chi_square += (count - mean).powi(2) / mean;
                n_cells += 1.0;
            }
        }
        let freedom = (n_cells - 1.0).max(0.0);
        let bound = freedom + 5.0 * (2.0 * freedom).sqrt() + 1e-9;
        assert!(chi_square <= bound, "chi-square {chi_square} > {bound}: {counts:?} {params:?}");
    }

    #[test]
    fn draws_follow_the_softmax() {
        let probabilities = [0.5, 0.25, 0.125, 0.0625, 0.0625];
        let logits = logits_of(&probabilities);
        check_distribution(warm(), &logits, &probabilities);
        // Temperature 1/2 squares the odds, temperature 2 takes their roots.
        for (temperature, power) in [(0.5, 2.0), (2.0, 0.5)] {
            let total: f64 = probabilities.iter().map(|p: &f64| p.powf(power)).sum();
            let expected: Vec<f64> = probabilities.iter().map(|p| p.powf(power) / total).collect();
            check_distribution(SamplingParams { temperature, ..warm() }, &logits, &expected);
        }
        let huge: Vec<f32> = logits.iter().map(|logit| logit + 3e6).collect();
        assert!(draw(warm(), &huge, 100).iter().all(|&id| id < 5));
    }

    #[test]
    fn truncations() {
        let logits = logits_of(&[0.1, 0.4, 0.2, 0.3]);
        let check = |params: SamplingParams, expected: [f64; 4]| check_distribution(params, &logits, &expected);
        let (third, four_sevenths, three_sevenths) = (1.0 / 9.0, 4.0 / 7.0, 3.0 / 7.0);
        check(SamplingParams { top_k: 2, ..warm() }, [0.0, four_sevenths, 0.0, three_sevenths]);
        check(SamplingParams { top_k: 1, ..warm() }, [0.0, 1.0, 0.0, 0.0]);
        check(SamplingParams { top_k: 9, ..warm() }, [0.1, 0.4, 0.2, 0.3]);
        // The token that crosses the border stays.
        check(SamplingParams { top_p: 0.39, ..warm() }, [0.0, 1.0, 0.0, 0.0]);
        check(SamplingParams { top_p: 0.41, ..warm() }, [0.0, four_sevenths, 0.0, three_sevenths]);
        check(SamplingParams { top_p: 0.69, ..warm() }, [0.0, four_sevenths, 0.0, three_sevenths]);
        check(SamplingParams { top_p: 0.71, ..warm() }, [0.0, 4.0 * third, 2.0 * third, 3.0 * third]);
        check(SamplingParams { top_p: 0.0, ..warm() }, [0.0, 1.0, 0.0, 0.0]);
        check(SamplingParams { top_p: 1.0, ..warm() }, [0.1, 0.4, 0.2, 0.3]);
        // After top-k of 2 the first token has 4/7 = 0.571 of the mass.
        check(SamplingParams { top_k: 2, top_p: 0.57, ..warm() }, [0.0, 1.0, 0.0, 0.0]);
        check(SamplingParams { top_k: 2, top_p: 0.58, ..warm() }, [0.0, four_sevenths, 0.0, three_sevenths]);
        check(SamplingParams { min_p: 0.7, ..warm() }, [0.0, four_sevenths, 0.0, three_sevenths]);
        check(SamplingParams { min_p: 0.3, ..warm() }, [0.0, 4.0 * third, 2.0 * third, 3.0 * third]);
        check(SamplingParams { min_p: 1.0, ..warm() }, [0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        let logits = [1.0, 3.0, 3.0, 3.0];
        let greedy = SamplingParams::default();
        assert_eq!(draw(greedy, &logits, 3), [1, 1, 1]);
        check_distribution(SamplingParams { top_k: 2, ..warm() }, &logits, &[0.0, 0.5, 0.5, 0.0]);
        check_distribution(SamplingParams { top_p: 0.1, ..warm() }, &logits, &[0.0, 1.0, 0.0, 0.0]);
        assert_eq!(argmax(&[-0.0, 0.0]), Ok(0));
    }

    #[test]
    fn same_seed_same_tokens() {
        let logits: Vec<f32> = (0..500).map(|i| ((i * 37 % 101) as f32) / 20.0).collect();
        let seeded = |seed| SamplingParams { seed: Some(seed), top_p: 0.9, ..warm() };
        assert_eq!(draw(seeded(1), &logits, 50), draw(seeded(1), &logits, 50));
        assert_ne!(draw(seeded(1), &logits, 50), draw(seeded(2), &logits, 50));
        let fresh = Sampler::new(SamplingParams { seed: None, ..warm() }).unwrap();
        let again = SamplingParams { seed: Some(fresh.seed()), ..warm() };
        let mut fresh = fresh;
        let first: Vec<u32> = (0..50).map(|_| fresh.sample(&mut logits.clone(), &[]).unwrap()).collect();
        assert_eq!(first, draw(again, &logits, 50));
        let other = Sampler::new(SamplingParams { seed: None, ..warm() }).unwrap();
        assert_ne!(fresh.seed(), other.seed());
    }

    #[test]
    fn generators_match_the_reference_code() {
        let mut counter = 1_234_567;
        let first: Vec<u64> = (0..3).map(|_| split_mix64(&mut counter)).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
        let mut rng = Xoshiro256PlusPlus { state: [1, 2, 3, 4] };
        let first: Vec<u64> = (0..4).map(|_| rng.next_u64()).collect();
        assert_eq!(first, [41_943_041, 58_720_359, 3_588_806_011_781_223, 3_591_011_842_654_386]);
    }

    fn adjusted(params: SamplingParams, n_prompt: usize, history: &[u32], logits: &[f32]) -> Vec<f32> {
        let mut logits = logits.to_vec();
        Sampler::new(params).unwrap().with_prompt_len(n_prompt).sample(&mut logits, history).unwrap();
        logits
    }

    #[test]
    fn penalties() {
        let logits = [2.0, -2.0, 1.0, 0.5];
        let repetition = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
        // The prompt (0, 0) counts, once; an id outside the vocabulary does not matter.
        assert_eq!(adjusted(repetition, 2, &[0, 0, 1, 99], &logits), [1.0, -4.0, 1.0, 0.5]);
        let presence = SamplingParams { presence_penalty: 0.5, ..SamplingParams::default() };
        assert_eq!(adjusted(presence, 1, &[0, 2, 2], &logits), [2.0, -2.0, 0.5, 0.5]);
        let frequency = SamplingParams { frequency_penalty: 0.25, ..SamplingParams::default() };
        assert_eq!(adjusted(frequency, 1, &[0, 2, 2], &logits), [2.0, -2.0, 0.5, 0.5]);
        let bias = SamplingParams { logit_bias: vec![(3, 10.0), (77, 1.0)], ..SamplingParams::default() };
        assert_eq!(adjusted(bias, 0, &[], &logits), [2.0, -2.0, 1.0, 10.5]);
        assert_eq!(adjusted(SamplingParams::default(), 0, &[0, 1], &logits), logits);
    }

    #[test]
    fn broken_logits_are_errors() {
        for params in [SamplingParams::default(), warm(), SamplingParams { top_k: 2, ..warm() }] {
            let mut sampler = Sampler::new(params).unwrap();
            let nan = sampler.sample(&mut [0.0, f32::NAN, 1.0], &[]);
            assert_eq!(nan, Err(SampleError::NanLogits { token_id: 1 }));
            let masked = sampler.sample(&mut [f32::NEG_INFINITY; 3], &[]);
            assert_eq!(masked, Err(SampleError::NoCandidates { n_logits: 3 }));
            assert_eq!(sampler.sample(&mut [], &[]), Err(SampleError::NoCandidates { n_logits: 0 }));
            assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, -5.0], &[]), Ok(1));
            assert_eq!(sampler.sample(&mut [0.0, f32::INFINITY, f32::INFINITY], &[]), Ok(1));
        }
        let cold = SamplingParams { temperature: 1e-40, ..warm() };
        assert_eq!(draw(cold, &[1.0, 2.0, -3.0], 5), [1; 5]);
    }

    #[test]
    fn invalid_parameters_are_named() {
        let check = |params: SamplingParams, expected: &str| {
            assert_eq!(Sampler::new(params).unwrap_err().to_string(), expected);
        };
        let base = SamplingParams::default;
        check(
            SamplingParams { temperature: -1.0, ..base() },
            "temperature is -1, expected a number of at least 0 (0 is greedy)",
        );
        check(
            SamplingParams { top_p: 1.5, ..base() },
            "top_p is 1.5, expected a number from 0 to 1 (1 keeps all tokens)",
        );
        check(
            SamplingParams { min_p: f32::NAN, ..base() },
            "min_p is NaN, expected a number from 0 to 1 (0 keeps all tokens)",
        );
        check(
            SamplingParams { repetition_penalty: 0.0, ..base() },
            "repetition_penalty is 0, expected a number above 0 (1 changes nothing)",
        );
        check(
            SamplingParams { presence_penalty: 3.0, ..base() },
            "presence_penalty is 3, expected a number from -2 to 2 (0 changes nothing)",
        );
        check(
            SamplingParams { logit_bias: vec![(1, 101.0)], ..base() },
            "logit_bias is 101, expected numbers from -100 to 100",
        );
        assert!(Sampler::new(SamplingParams { temperature: f32::INFINITY, ..base() }).is_err());
        assert!(Sampler::new(SamplingParams { temperature: -0.0, ..base() }).unwrap().params().is_greedy());
    }

    #[test]
    fn logprobs() {
        let logits = logits_of(&[0.5, 0.3, 0.2]);
        assert!((logprob(&logits, 1) - 0.3f32.ln()).abs() < 1e-6);
        let top = top_logprobs(&logits, 2);
        assert_eq!(top.iter().map(|&(token_id, _)| token_id).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(top[1].1, logprob(&logits, 1));
        assert_eq!(top_logprobs(&logits, 9).len(), 3);
        assert_eq!(top_logprobs(&logits, 0), []);
        assert_eq!(logprob(&[0.0, f32::NEG_INFINITY], 1), f32::NEG_INFINITY);
    }

    /// The same choice set by sorting everything.
    fn allowed_by_sorting(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
        let max_logit = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut candidates: Vec<Candidate> = (0u32..)
            .zip(logits)
            .map(|(token_id, &logit)| Candidate { logit: (logit - max_logit) * (1.0 / params.temperature), token_id })
            .collect();
        candidates.sort_by(by_likelihood);
        if params.top_k > 0 {
            candidates.truncate(params.top_k as usize);
        }
        let total: f64 = candidates.iter().map(weight).sum();
        let mut before = 0.0;
        let mut allowed = Vec::new();
        for (rank, candidate) in candidates.iter().enumerate() {
            // A hair of slack: sums in another order round differently.
            let in_top_p = rank == 0 || params.top_p == 1.0 || before < f64::from(params.top_p) * total * (1.0 + 1e-12);
            if in_top_p && candidate.logit >= params.min_p.ln() {
                allowed.push(candidate.token_id);
            }
            before += weight(candidate);
        }
        allowed
    }

    proptest! {
        #[test]
        fn choice_is_within_the_sorted_set(
            logits in prop::collection::vec(-6.0f32..6.0, 1..700),
            temperature in 0.1f32..3.0, top_k in 0u32..300, top_p in 0.0f32..=1.0,
            min_p in 0.0f32..0.3, seed in any::<u64>(),
        ) {
            let params = SamplingParams {
                temperature, top_k, top_p, min_p, seed: Some(seed), ..SamplingParams::default()
            };
            let mut sampler = Sampler::new(params.clone()).unwrap();
            let token_id = sampler.sample(&mut logits.clone(), &[]).unwrap();
            let allowed = allowed_by_sorting(&logits, &params);
            prop_assert!(allowed.contains(&token_id), "{token_id} not in {allowed:?}");
            let n_kept = sampler.candidates.len();
            prop_assert!(n_kept <= allowed.len() && n_kept + 1 >= allowed.len(), "{n_kept} of {}", allowed.len());
        }

        #[test]
        fn counts_follow_any_history(
            steps in prop::collection::vec(prop::collection::vec(0u32..6, 0..12), 1..8), n_prompt in 0usize..6,
        ) {
            let mut counts = HistoryCounts::default();
            for history in &steps {
                counts.update(history, n_prompt);
                let mut fresh = HistoryCounts::default();
                fresh.update(history, n_prompt);
                let sorted = |counts: &HistoryCounts| {
                    let mut all: Vec<_> =
                        counts.by_token.iter().map(|(&id, count)| (id, count.n_prompt, count.n_output)).collect();
                    all.sort_unstable();
                    all
                };
                prop_assert_eq!(sorted(&counts), sorted(&fresh));
            }
        }

        #[test]
        fn greedy_is_the_argmax(logits in prop::collection::vec(-5i8..5, 1..50)) {
            let mut logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let expected = logits.iter().position(|&logit| logit == best).unwrap();
            let chosen = Sampler::new(SamplingParams::default()).unwrap().sample(&mut logits, &[1, 2]).unwrap();
            prop_assert_eq!(chosen as usize, expected);
        }

        #[test]
        fn probabilities_sum_to_one(logits in prop::collection::vec(-50.0f32..50.0, 1..60)) {
            let total: f32 = (0..logits.len() as u32).map(|id| logprob(&logits, id).exp()).sum();
            prop_assert!((total - 1.0).abs() < 1e-4, "{total}");
        }
    }
}
