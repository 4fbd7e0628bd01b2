//! Sampled texts have the distribution that the model gives them, with drafts and without: counted over 10,000 texts against
//! exact probabilities, which are computed here from a table, not by the sampler.

use std::collections::VecDeque;

use tandem_core::Batch;
use tandem_core::backend::{PAGE_SIZE, SAMPLED, Sampling};
use tandem_engine::{
    BlockManager, DeviceSampler, DraftDepth, Drafted, Drafter, Engine, EngineError, Event, Request, Runner,
    SampleError, SamplingParams,
};
use tandem_model::Limits;

const VOCAB: usize = 7;
const PROMPT: [u32; 2] = [3, 1];
const N_TEXTS: usize = 10_000;
const N_TOKENS: usize = 6;
const TEMPERATURE: f32 = 0.8;
const TOP_P: f32 = 0.9;

/// The logits of the token after `token`: some likely, some hardly, some cut off by [`TOP_P`].
fn logits_after(token: u32) -> [f32; VOCAB] {
    std::array::from_fn(|id| 0.6 * ((token as f32 * 2.3 + id as f32 * 1.7).sin() + (id as f32 * 0.9).cos()))
}

/// The probabilities of the token after `token`: a softmax over the temperature, cut to the fewest likeliest tokens that
/// reach [`TOP_P`].
fn probabilities_after(token: u32) -> [f64; VOCAB] {
    let weights = logits_after(token).map(|logit| f64::from(logit / TEMPERATURE).exp());
    let total: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..VOCAB).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let (mut kept, mut reached) = ([0.0; VOCAB], 0.0);
    for id in order {
        if reached >= f64::from(TOP_P) {
            break;
        }
        kept[id] = weights[id] / total;
        reached += kept[id];
    }
    kept.map(|p| p / reached)
}

/// Which token a layer drafts.
#[derive(Clone, Copy, Debug)]
enum Draft {
    Likeliest,
    /// One that is possible.
    Other,
    /// One that the truncation has cut off.
    Impossible,
}

impl Draft {
    fn after(self, token: u32) -> u32 {
        let p = probabilities_after(token);
        let mut order: Vec<u32> = (0..VOCAB as u32).collect();
        order.sort_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]));
        order[match self {
            Draft::Likeliest => 0,
            Draft::Other => 1,
            Draft::Impossible => VOCAB - 1,
        }]
    }
}

/// A model whose logits are [`logits_after`] its last token, with a layer that drafts.
struct TableRunner {
    draft: Option<Draft>,
    /// It samples tokens itself; those of steps under way.
    samples: bool,
    sampled: VecDeque<Vec<u32>>,
    hidden: Vec<f32>,
}

impl TableRunner {
    fn new(draft: Option<Draft>, samples: bool) -> TableRunner {
        TableRunner { draft, samples, sampled: VecDeque::new(), hidden: vec![] }
    }

    fn wanted<'a>(&'a self, batch: &'a Batch) -> impl Iterator<Item = u32> + 'a {
        batch.logits_rows.iter().map(|row| match batch.tokens[*row as usize] {
            token if token & SAMPLED == 0 => token,
            token => self.sampled.back().expect("a step before")[(token & !SAMPLED) as usize],
        })
    }
}

impl Runner for TableRunner {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        self.hidden = vec![0.0; batch.n_rows()];
        logits.extend(self.wanted(&batch).flat_map(logits_after));
        Ok(())
    }

    fn device_sampler(&mut self) -> Option<&mut dyn DeviceSampler> {
        if self.samples { Some(self) } else { None }
    }

    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        if self.draft.is_some() { Some(self) } else { None }
    }

    fn limits(&self) -> Limits {
        Limits { max_rows: 64, max_logits_rows: 64 }
    }

    fn vocab_size(&self) -> usize {
        VOCAB
    }
}

/// A device that draws from [`probabilities_after`] by the number it is given.
impl DeviceSampler for TableRunner {
    fn submit(&mut self, batch: Batch) -> Result<(), EngineError> {
        self.hidden = vec![0.0; batch.n_rows()];
        let draw = |(token, sampling): (u32, &Sampling)| {
            let (mut left, mut last) = (sampling.unit, 0);
            for (id, p) in probabilities_after(token).into_iter().enumerate().filter(|(_, p)| *p > 0.0) {
                last = id as u32;
                left -= p;
                if left < 0.0 {
                    break;
                }
            }
            last
        };
        let tokens = self.wanted(&batch).zip(&batch.sampling).map(draw).collect();
        self.sampled.push_back(tokens);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Result<u32, SampleError>>, EngineError> {
        Ok(self.sampled.pop_front().expect("a step under way").into_iter().map(Ok).collect())
    }
}

impl Drafter for TableRunner {
    fn hidden_size(&self) -> usize {
        1
    }

    fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    fn draft(&mut self, batch: Batch, _hidden: &[f32]) -> Result<Drafted, EngineError> {
        let draft = self.draft.expect("it drafts");
        let tokens: Vec<u32> = batch.logits_rows.iter().map(|row| draft.after(batch.tokens[*row as usize])).collect();
        Ok(Drafted { hidden: vec![0.0; tokens.len()], tokens })
    }
}

/// Texts of [`N_TOKENS`] tokens each, whose seeds begin at `first_seed`, and the share of the layer's drafts that were right.
fn texts(runner: TableRunner, depth: DraftDepth, first_seed: u64) -> (Vec<Vec<u32>>, Option<f64>) {
    let blocks = BlockManager::for_tokens(32 * PAGE_SIZE);
    let mut engine = Engine::new(Box::new(runner), blocks, 64, 64).with_drafts(depth);
    let (mut texts, mut ids, mut outputs) = (vec![vec![]; N_TEXTS], std::collections::HashMap::new(), vec![]);
    for i in 0..N_TEXTS {
        let seed = Some(first_seed + i as u64);
        let sampling = SamplingParams { temperature: TEMPERATURE, top_p: TOP_P, seed, ..SamplingParams::default() };
        let request = Request { prompt: PROMPT.to_vec(), sampling, max_tokens: N_TOKENS, ..Request::default() };
        ids.insert(engine.submit(request).expect("takes it"), i);
        // A few at a time, so that there is room for their drafts.
        while engine.n_running() + engine.n_waiting() >= if i + 1 < N_TEXTS { 12 } else { 1 } {
            engine.step(&mut outputs).expect("runs");
            for output in outputs.drain(..) {
                if let Event::Token { id, .. } = output.event {
                    texts[ids[&output.request]].push(id);
                }
            }
        }
    }
    let drafts = engine.counters().mtp_drafts;
    (texts, (drafts.drafts > 0).then(|| drafts.accepted[0] as f64 / drafts.drafts as f64))
}

/// Pearson's statistic of `counts` against `probabilities`, and the value that it exceeds by chance once in 100,000 times
/// (Wilson and Hilferty's approximation). A cell that cannot be must be empty.
fn chi_squared(counts: &[usize], probabilities: &[f64]) -> (f64, f64) {
    let n: usize = counts.iter().sum();
    let (mut statistic, mut n_cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
    let mut add = |count: f64, expected: f64| {
        statistic += (count - expected).powi(2) / expected;
        n_cells += 1.0;
    };
    for (count, p) in counts.iter().zip(probabilities) {
        assert!(*p > 0.0 || *count == 0, "{count} times what cannot be");
        match p * n as f64 {
            // Too few for the approximation: together.
            expected if expected < 8.0 => rest = (rest.0 + *count as f64, rest.1 + expected),
            expected => add(*count as f64, expected),
        }
    }
    if rest.1 >= 8.0 {
        add(rest.0, rest.1);
    }
    let (freedom, z): (f64, f64) = (n_cells - 1.0, 4.265);
    let part = 2.0 / (9.0 * freedom);
    (statistic, freedom * (1.0 - part + z * part.sqrt()).powi(3))
}

#[test]
fn sampled_texts_have_the_models_distribution_with_drafts_and_without() {
    use DraftDepth::{Auto, Fixed};
    let cases = [
        (None, Fixed(0)),
        // From earlier places of the text alone.
        (None, Fixed(3)),
        (Some(Draft::Likeliest), Fixed(1)),
        (Some(Draft::Likeliest), Fixed(3)),
        (Some(Draft::Other), Fixed(4)),
        (Some(Draft::Impossible), Fixed(2)),
        (Some(Draft::Likeliest), Auto),
    ];
    for (samples, (i, (draft, depth))) in
        [false, true].into_iter().flat_map(|samples| cases.into_iter().enumerate().map(move |case| (samples, case)))
    {
        let case = format!("{draft:?}, depth {depth}, sampled by {}", if samples { "the device" } else { "the host" });
        let first_seed = (2 * i + usize::from(samples)) * N_TEXTS;
        let (texts, right) = texts(TableRunner::new(draft, samples), depth, first_seed as u64);
        match (draft, depth) {
            (Some(Draft::Likeliest), Fixed(_)) => assert!(right.is_some_and(|p| (0.25..0.7).contains(&p)), "{right:?}"),
            (Some(Draft::Other), _) => assert!(right.is_some_and(|p| (0.1..0.4).contains(&p)), "{right:?}"),
            (Some(Draft::Impossible), _) => assert_eq!(right, Some(0.0)),
            _ => {}
        }
        let mut marginal = [0.0; VOCAB];
        marginal[PROMPT[1] as usize] = 1.0;
        for position in 0..N_TOKENS {
            // The token there together with the one before it.
            let (mut counts, mut expected) = (vec![0; VOCAB * VOCAB], vec![]);
            for text in &texts {
                assert_eq!(text.len(), N_TOKENS);
                let before = if position == 0 { PROMPT[1] } else { text[position - 1] };
                counts[before as usize * VOCAB + text[position] as usize] += 1;
            }
            for (before, p) in marginal.into_iter().enumerate() {
                expected.extend(probabilities_after(before as u32).map(|q| p * q));
            }
            marginal = std::array::from_fn(|id| (0..VOCAB).map(|before| expected[before * VOCAB + id]).sum());
            let (statistic, critical) = chi_squared(&counts, &expected);
            assert!(statistic < critical, "{case}, position {position}: {statistic:.1}, expected below {critical:.1}");
            // And the token alone, as the sum over the one before it.
            let alone: Vec<usize> = (0..VOCAB).map(|id| (0..VOCAB).map(|b| counts[b * VOCAB + id]).sum()).collect();
            let (statistic, critical) = chi_squared(&alone, &marginal);
            assert!(statistic < critical, "{case}, position {position}: {statistic:.1}, expected below {critical:.1}");
        }
    }
}

/// The test would notice: an eighth of one token's probability given to another.
#[test]
fn a_small_mistake_would_be_noticed() {
    let p = probabilities_after(PROMPT[1]);
    let mut order: Vec<usize> = (0..VOCAB).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
    let mut wrong = p.map(|p| (p * N_TEXTS as f64) as usize);
    let moved = wrong[order[0]] / 8;
    wrong[order[0]] -= moved;
    wrong[order[1]] += moved;
    let (statistic, critical) = chi_squared(&wrong, &p);
    assert!(statistic > critical, "{statistic} against {critical}");
}
