//! The controller, simulated.

use super::*;

/// Tokens that a simulated text has.
const TEXT: usize = 3000;

/// The time of a step of one sequence, against one row at a context of 1k: GLM-5.1's shape, where half of a token's
/// bytes are experts, 8 of 256 for each row, and a layer that drafts takes a twenty-fifth of a step.
struct Shape {
    /// Share of a row's experts that an earlier row chose too, beyond chance.
    overlap: f64,
    context: usize,
}

const DRAFT: f64 = 0.04;

/// What steps cost.
trait Costs {
    /// Cached tokens.
    fn context(&self) -> usize;
    /// Time of a step of this number of rows.
    fn step(&self, n_rows: usize) -> f64;
    /// Time of a draft.
    fn draft(&self) -> f64;

    /// Tokens per second with always `depth` drafts.
    fn rate(&self, acceptance: f64, depth: usize) -> f64 {
        let tokens: f64 = (0..=depth).map(|i| acceptance.powi(i as i32)).sum();
        tokens / (self.step(depth + 1) + self.draft() * depth as f64)
    }
}

impl Costs for Shape {
    fn context(&self) -> usize {
        self.context
    }

    fn draft(&self) -> f64 {
        DRAFT
    }

    fn step(&self, n_rows: usize) -> f64 {
        let experts = (1..n_rows).fold(8.0, |n: f64, _| n + 8.0 * (1.0 - self.overlap) * (1.0 - n / 256.0));
        // Scoring and attending to what is cached, which every row does for itself.
        let context = 0.004 * self.context as f64 / 1024.0;
        0.5 + 0.5 * experts / 8.0 + context * n_rows as f64
    }
}

/// Layers of GLM-5.1.
const N_LAYERS: f64 = 78.0;

/// One layer of GLM-5.1's shape, measured (bench/runs/2026-11-26-draft-rows), as if there were 78 of them and one more that
/// drafts.
#[derive(serde::Deserialize)]
struct Measured {
    expert_overlap: f64,
    context: usize,
    /// Milliseconds of one layer by number of rows, from 1 on.
    layer_ms: Vec<f64>,
}

impl Costs for Measured {
    fn context(&self) -> usize {
        self.context
    }

    fn step(&self, n_rows: usize) -> f64 {
        N_LAYERS * self.layer_ms[n_rows - 1] / 1e3
    }

    fn draft(&self) -> f64 {
        self.layer_ms[0] / 1e3
    }
}

/// Numbers from 0 to 1 (Marsaglia's xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Tokens per second of texts whose drafts are right with the probability that `acceptance` gives for each token; times
/// vary by a tenth.
fn simulate(shape: &impl Costs, seed: u64, acceptance: impl Fn(usize) -> f64) -> f64 {
    let mut control = Control::new(DraftDepth::Auto);
    let mut random = Random(seed | 1);
    let (mut history, mut n_tokens, mut total) = (History::default(), 0, 0.0);
    while n_tokens < TEXT {
        let sources = vec![(DraftSource::Mtp, MAX_DRAFT_DEPTH)];
        let offer = Offer { history: &mut history, sources, n_lagging: 1 };
        let chosen = control.choose(&mut [offer], shape.context(), 63)[0];
        let depth = chosen.map_or(0, |(_, depth)| depth);
        let n_accepted = (0..depth).take_while(|_| random.next() < acceptance(n_tokens)).count();
        if let Some((source, depth)) = chosen {
            control.note_draft(&mut history, source, depth, n_accepted);
        }
        let noise = 0.95 + 0.1 * random.next();
        let (step, drafting) = (shape.step(depth + 1) * noise, shape.draft() * depth as f64);
        total += step + drafting;
        n_tokens += 1 + n_accepted;
        control.note_step(&Ran {
            n_sequences: 1,
            n_rows: 1 + depth,
            context: shape.context(),
            n_tokens: 1 + n_accepted,
            drafting: Duration::from_secs_f64(drafting),
            mtp_depth: depth,
            time: Duration::from_secs_f64(step + drafting),
        });
    }
    n_tokens as f64 / total
}

#[test]
fn no_text_is_slower_and_most_are_as_fast_as_the_best_fixed_depth() {
    let mut gains = vec![];
    for acceptance in [0.0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.75, 0.83, 0.9, 0.98] {
        for context in [1 << 10, 8 << 10, 32 << 10, 128 << 10] {
            for overlap in [0.0, 0.3, 0.7] {
                let shape = Shape { overlap, context };
                let plain = 1.0 / shape.step(1);
                let best = (0..=MAX_DRAFT_DEPTH).map(|k| shape.rate(acceptance, k)).fold(0.0, f64::max);
                // Chance moves a text's own rate, so several are averaged.
                let rate = (1..=3).map(|seed| simulate(&shape, 77 * seed, |_| acceptance)).sum::<f64>() / 3.0;
                let case = format!("acceptance {acceptance}, context {context}, overlap {overlap}");
                assert!(rate >= 0.98 * plain, "{case}: {:.3} of no drafts", rate / plain);
                assert!(rate >= 0.95 * best, "{case}: {:.3} of the best depth", rate / best);
                gains.push(rate / plain);
            }
        }
    }
    assert!(gains.iter().any(|gain| *gain > 2.0));
}

/// The same with what a processor measured: contexts from 1k to 128k, experts chosen independently and with overlap.
#[test]
fn measured_costs_are_followed_too() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../bench/runs/2026-11-26-draft-rows/layer.json");
    let text = std::fs::read_to_string(path).expect("the archive");
    let measured: Vec<Measured> = serde_json::from_str(&text).expect("its form");
    let has = |overlap: f64, context: usize| {
        measured
            .iter()
            .any(|m| m.expert_overlap == overlap && m.context == context && m.layer_ms.len() > MAX_DRAFT_DEPTH)
    };
    assert!([1 << 10, 8 << 10, 32 << 10, 128 << 10].iter().all(|context| has(0.0, *context) && has(0.3, *context)));
    for costs in &measured {
        let plain = 1.0 / costs.step(1);
        for acceptance in [0.0, 0.2, 0.35, 0.49, 0.65, 0.83, 0.98] {
            let best = (0..=MAX_DRAFT_DEPTH).map(|k| costs.rate(acceptance, k)).fold(0.0, f64::max);
            let rate = (1..=3).map(|seed| simulate(costs, 91 * seed, |_| acceptance)).sum::<f64>() / 3.0;
            let case = format!("acceptance {acceptance}, context {}, overlap {}", costs.context, costs.expert_overlap);
            assert!(rate >= 0.98 * plain, "{case}: {:.3} of no drafts", rate / plain);
            assert!(rate >= 0.95 * best, "{case}: {:.3} of the best depth", rate / best);
            println!("{case}: {:.3} of none, {:.3} of the best depth", rate / plain, rate / best);
        }
    }
}

#[test]
fn a_text_that_changes_is_followed() {
    let shape = Shape { overlap: 0.3, context: 1 << 10 };
    let plain = 1.0 / shape.step(1);
    // Good drafts, then useless ones, in turns of a third of the text.
    let rate = simulate(&shape, 5, |token| if (token / (TEXT / 6)).is_multiple_of(2) { 0.95 } else { 0.05 });
    assert!(rate > 1.1 * plain, "{:.3}", rate / plain);
    let rate = simulate(&shape, 5, |token| if token < TEXT / 10 { 0.95 } else { 0.0 });
    assert!(rate > 0.98 * plain, "{:.3}", rate / plain);
}

/// Rows are shared among sequences by what their drafts promise.
#[test]
fn sequences_with_better_drafts_get_the_rows() {
    let mut control = Control::new(DraftDepth::Fixed(4));
    let mut histories = [History::default(), History::default()];
    for _ in 0..50 {
        let [good, bad] = &mut histories;
        control.note_draft(good, DraftSource::Mtp, 4, 4);
        control.note_draft(bad, DraftSource::Mtp, 4, 0);
    }
    let mut offers: Vec<Offer<'_>> = histories
        .iter_mut()
        .map(|history| Offer { history, sources: vec![(DraftSource::Mtp, 4)], n_lagging: 1 })
        .collect();
    assert_eq!(control.choose(&mut offers, 100, 5), [Some((DraftSource::Mtp, 4)), Some((DraftSource::Mtp, 1))]);
    assert_eq!(control.choose(&mut offers, 100, 0), [None, None]);
    assert!(Control::new(DraftDepth::OFF).choose(&mut [], 100, 5).is_empty());
}
