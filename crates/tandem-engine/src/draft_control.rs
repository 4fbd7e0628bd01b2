//! How many tokens to draft for each sequence of a step, from what steps cost and how often drafts were right.
//!
//! A step of more rows takes longer: on a mixture of experts each row reads experts of its own. So the time of steps is
//! measured by rows and context, the acceptance of drafts by source and position, and the rows are taken that give the
//! most tokens per second. What is not known is tried, within a budget: [`Control::balance`] is the time that drafts have
//! saved so far, against steps without, and nothing is tried that it could not pay for.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::draft::{DraftDepth, MAX_DRAFT_DEPTH};

/// Kinds of drafts whose acceptance is learnt apart: the multi-token-prediction layer's, and those of earlier places by how
/// much these share with the end of the text.
const N_CLASSES: usize = 5;
/// Share of drafts expected to be right before anything is known, by class.
const EXPECTED: [f64; N_CLASSES] = [0.7, 0.35, 0.5, 0.7, 0.85];
/// Drafts that this expectation weighs as much as; for later positions the one before them is the expectation.
const EXPECTED_WEIGHT: f64 = 2.0;
const LATER_WEIGHT: f64 = 4.0;
/// Drafts of all sequences that a sequence's own weigh against.
const COMMON_WEIGHT: f64 = 8.0;
/// What an older draft counts for when another one is added, among all sequences' and among a sequence's own.
const COMMON_DECAY: f64 = 0.995;
const OWN_DECAY: f64 = 0.98;
/// Standard deviations by which a share that few drafts tell is taken for better than they say.
const OPTIMISM: f64 = 0.75;

/// Share of the time of steps that may be spent on finding out.
const ALLOWANCE: f64 = 0.008;
/// Steps' time that may be spent on it at the start.
const FIRST_ALLOWANCE: f64 = 1.5;
/// Steps' time saved that is remembered, at most.
const MOST_SAVED: f64 = 16.0;
/// Share of the time of steps that run prompts which may be spent on it too: the layer follows a prompt in the time that one
/// of the model's own layers takes for it.
const PREFILL_ALLOWANCE: f64 = 0.015;
/// Steps on which the time is spread that the layer takes to follow a text up to its end before it can draft.
const SPREAD: f64 = 64.0;
/// Positions that it is expected to follow in the time of a step, before that is known.
const EXPECTED_FOLLOWED: f64 = 64.0;
/// Steps in a row without drafts after which none are expected soon.
const RESTING: u32 = 32;
/// Drafting goes on for this many steps before one without tells what it would cost: few at first, so that a time which
/// something else had lengthened is soon corrected.
const FIRST_PLAIN: u32 = 3;
const PLAIN_EVERY: u32 = 48;
/// Tokens per second that drafts must promise, against none.
const WORTHWHILE: f64 = 1.01;
/// Steps after which a sequence without drafts tries one again; twice as many after each that fails, up to the last.
const FIRST_RETRY: u32 = 16;
const LAST_RETRY: u32 = 64;
/// Weight of a new time in a mean, and how far it may be from it: a step that something else held up says little, and one
/// that was fast says more.
const NEWEST: f64 = 0.1;
const NEWEST_FAST: f64 = 0.2;
const MOST_CHANGE: f64 = 2.0;

/// Where a sequence's drafts would come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DraftSource {
    /// The multi-token-prediction layer.
    Mtp,
    /// An earlier place with this number of tokens in common.
    Ngram(usize),
}

impl DraftSource {
    fn class(self) -> usize {
        match self {
            DraftSource::Mtp => 0,
            DraftSource::Ngram(..=3) => 1,
            DraftSource::Ngram(4..=5) => 2,
            DraftSource::Ngram(6..=11) => 3,
            DraftSource::Ngram(_) => 4,
        }
    }
}

/// How often drafts were right, by class and position, where those before them were.
#[derive(Clone, Debug, Default)]
pub(crate) struct Acceptance {
    /// Drafts, and those that were right.
    counts: [[(f64, f64); MAX_DRAFT_DEPTH]; N_CLASSES],
}

impl Acceptance {
    fn add(&mut self, class: usize, n: usize, n_accepted: usize, decay: f64) {
        for (i, (tried, right)) in self.counts[class].iter_mut().enumerate().take(n.min(n_accepted + 1)) {
            *tried = *tried * decay + 1.0;
            *right = *right * decay + f64::from(u8::from(i < n_accepted));
        }
    }

    /// Share of right drafts, if `weight` drafts with the share `expected` had been made before.
    fn share(&self, class: usize, i: usize, expected: f64, weight: f64) -> f64 {
        let (tried, right) = self.counts[class][i];
        (right + expected * weight) / (tried + weight)
    }
}

/// What a sequence has been through.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    own: Acceptance,
    /// Steps since it last had drafts, and those after which it tries again.
    since_drafts: u32,
    retry: u32,
}

/// What a sequence of the next step could draft.
pub(crate) struct Offer<'a> {
    /// Its past.
    pub(crate) history: &'a mut History,
    /// Its sources, and how many tokens each would draft.
    pub(crate) sources: Vec<(DraftSource, usize)>,
    /// Positions that the multi-token-prediction layer must run before it can draft, the last one with the draft itself.
    pub(crate) n_lagging: usize,
}

/// A step that has run, in which every sequence decoded.
pub(crate) struct Ran {
    /// Sequences.
    pub(crate) n_sequences: usize,
    /// Their tokens and drafts.
    pub(crate) n_rows: usize,
    /// Longest context.
    pub(crate) context: usize,
    /// Tokens that it gave.
    pub(crate) n_tokens: usize,
    /// The time that making drafts took, and the most that were made for a sequence by the multi-token-prediction layer.
    pub(crate) drafting: Duration,
    pub(crate) mtp_depth: usize,
    /// All of its time, without that of the layer following texts.
    pub(crate) time: Duration,
}

/// Seconds of steps by rows, in contexts of about the same length.
type Times = BTreeMap<usize, Mean>;

#[derive(Clone, Copy, Debug)]
struct Mean(f64, u32);

impl Mean {
    fn add(mean: Option<Mean>, value: f64) -> Mean {
        let Some(Mean(old, n)) = mean else { return Mean(value, 1) };
        let value = if n > 2 { value.clamp(old / MOST_CHANGE, old * MOST_CHANGE) } else { value };
        let newest = if value < old { NEWEST_FAST } else { NEWEST };
        Mean(old + (value - old) * newest.max(1.0 / f64::from(n + 1)), n.saturating_add(1))
    }
}

/// Decides.
#[derive(Debug)]
pub(crate) struct Control {
    depth: DraftDepth,
    common: Acceptance,
    /// By class of context.
    times: BTreeMap<u32, Times>,
    /// Seconds of drafting by the multi-token-prediction layer, by depth.
    mtp: BTreeMap<usize, Mean>,
    /// Seconds in which it follows a text by a position.
    following: Option<Mean>,
    /// Seconds saved, within bounds; none before a first time is known.
    balance: Option<f64>,
    /// Seconds allowed so far for prompts, as long as there is no balance.
    allowed: f64,
    since_plain: u32,
    plain_after: u32,
    /// Steps in a row without drafts.
    n_without: u32,
}

impl Control {
    pub(crate) fn new(depth: DraftDepth) -> Control {
        Control {
            depth,
            common: Acceptance::default(),
            times: BTreeMap::new(),
            mtp: BTreeMap::new(),
            following: None,
            balance: None,
            allowed: 0.0,
            since_plain: 0,
            plain_after: FIRST_PLAIN,
            n_without: 0,
        }
    }

    pub(crate) fn depth(&self) -> DraftDepth {
        self.depth
    }

    /// The source and the number of drafts of each sequence, with at most `most_rows` drafts in all.
    pub(crate) fn choose(
        &mut self,
        offers: &mut [Offer<'_>],
        context: usize,
        most_rows: usize,
    ) -> Vec<Option<(DraftSource, usize)>> {
        let n = offers.len();
        let lags: Vec<usize> = offers.iter().map(|offer| offer.n_lagging).collect();
        // Expected tokens of each offer's better source, draft by draft.
        let best: Vec<(DraftSource, Vec<f64>)> = offers.iter().map(|offer| self.better_source(offer)).collect();
        let mut rows: Vec<(f64, usize)> = vec![];
        for (i, (_, gains)) in best.iter().enumerate() {
            rows.extend(gains.iter().map(|gain| (*gain, i)));
        }
        // A later draft of a sequence is never likelier than an earlier one, so that a front part of this has no gaps.
        rows.sort_by(|a, b| b.0.total_cmp(&a.0));
        rows.truncate(most_rows);
        let n_drafts = match self.depth {
            DraftDepth::Fixed(_) => rows.len(),
            DraftDepth::Auto => self.pay(n, context, &rows, &best, &lags),
        };
        let mut depths = vec![0; n];
        rows[..n_drafts].iter().for_each(|(_, i)| depths[*i] += 1);
        if self.depth == DraftDepth::Auto && n_drafts == 0 {
            self.retry(offers, context, &rows, &best, &mut depths);
        }
        self.n_without = if depths.iter().all(|depth| *depth == 0) { self.n_without.saturating_add(1) } else { 0 };
        for (offer, depth) in offers.iter_mut().zip(&depths) {
            offer.history.since_drafts = if *depth > 0 { 0 } else { offer.history.since_drafts + 1 };
        }
        let chosen = best.iter().zip(depths).map(|((source, _), depth)| (depth > 0).then_some((*source, depth)));
        chosen.collect()
    }

    /// The source of an offer that gives more, and the probability of each of its drafts to be taken.
    fn better_source(&self, offer: &Offer<'_>) -> (DraftSource, Vec<f64>) {
        let gains = |(source, n): &(DraftSource, usize)| {
            let class = source.class();
            let (mut all, mut expected) = (1.0, EXPECTED[class]);
            let gain = |i: usize| {
                expected = self.common.share(class, i, expected, if i == 0 { EXPECTED_WEIGHT } else { LATER_WEIGHT });
                let share = offer.history.own.share(class, i, expected, COMMON_WEIGHT);
                let n = offer.history.own.counts[class][i].0 + COMMON_WEIGHT;
                all *= (share + OPTIMISM * (share * (1.0 - share) / n).sqrt()).min(1.0);
                all
            };
            (*source, (0..*n).map(gain).collect::<Vec<f64>>())
        };
        let total = |(source, gains): &(DraftSource, Vec<f64>)| {
            // A draft by the layer costs time.
            gains.iter().sum::<f64>() - if *source == DraftSource::Mtp { 0.1 } else { 0.0 }
        };
        let sources = offer.sources.iter().map(gains).max_by(|a, b| total(a).total_cmp(&total(b)));
        sources.unwrap_or((DraftSource::Mtp, vec![]))
    }

    /// The number of `rows` that gives the most tokens per second, or one more to find out.
    fn pay(
        &mut self,
        n: usize,
        context: usize,
        rows: &[(f64, usize)],
        best: &[(DraftSource, Vec<f64>)],
        lags: &[usize],
    ) -> usize {
        let Some(plain) = self.time(n, n, context) else { return 0 };
        let balance = *self.balance.get_or_insert(FIRST_ALLOWANCE * plain + self.allowed);
        if self.since_plain >= self.plain_after || balance <= 0.0 {
            return 0;
        }
        let (mut n_best, mut best_rate) = (0, WORTHWHILE * n as f64 / plain);
        let (mut depths, mut tokens, mut last_known) = (vec![0; n], n as f64, plain);
        for (m, (gain, i)) in rows.iter().enumerate() {
            tokens += gain;
            depths[*i] += 1;
            let by_mtp = || (0..n).filter(|i| best[*i].0 == DraftSource::Mtp && depths[*i] > 0);
            let mtp = by_mtp().map(|i| depths[i]).max().unwrap_or(0);
            let following: f64 = by_mtp().map(|i| self.following_time(lags[i], plain)).sum();
            if following > balance {
                return n_best;
            }
            let drafting = self.mtp_time(mtp) + following / SPREAD;
            match self.time(n, n + m + 1, context) {
                Some(time) => {
                    // A row never makes a step faster.
                    let time = time.max(plain);
                    last_known = time;
                    let rate = tokens / (time + drafting);
                    if rate > best_rate {
                        (n_best, best_rate) = (m + 1, rate);
                    }
                }
                None => {
                    // At best it costs no more than what is known; at worst a whole step for each row.
                    let promises = tokens / (last_known + drafting) > best_rate;
                    let loss =
                        plain * (m + 1) as f64 / n as f64 + drafting + following - plain * (tokens / n as f64 - 1.0);
                    return if promises && loss <= balance { m + 1 } else { n_best };
                }
            }
        }
        n_best
    }

    /// Lets a sequence that has not drafted for long try once more, if that can be paid.
    fn retry(
        &self,
        offers: &[Offer<'_>],
        context: usize,
        rows: &[(f64, usize)],
        best: &[(DraftSource, Vec<f64>)],
        depths: &mut [usize],
    ) {
        let n = offers.len();
        let (Some(plain), Some(balance)) = (self.time(n, n, context), self.balance) else { return };
        let loss = self.time(n, n + 1, context).unwrap_or(2.0 * plain) + self.mtp_time(1) - plain;
        let is_due = |i: &usize| {
            let Offer { history, n_lagging, .. } = &offers[*i];
            let following = if best[*i].0 == DraftSource::Mtp { self.following_time(*n_lagging, plain) } else { 0.0 };
            let loss = loss + following;
            history.since_drafts >= history.retry.max(FIRST_RETRY) && loss <= balance
        };
        if let Some(i) = rows.iter().map(|(_, i)| *i).find(is_due) {
            depths[i] = 1;
        }
    }

    /// Learns from a draft of `n` tokens, the first `n_accepted` of which were right.
    pub(crate) fn note_draft(&mut self, history: &mut History, source: DraftSource, n: usize, n_accepted: usize) {
        self.common.add(source.class(), n, n_accepted, COMMON_DECAY);
        history.own.add(source.class(), n, n_accepted, OWN_DECAY);
        let retry = if n_accepted > 0 { FIRST_RETRY } else { (2 * history.retry).clamp(2 * FIRST_RETRY, LAST_RETRY) };
        history.retry = retry;
    }

    /// Whether the multi-token-prediction layer may follow a text by `n_lagging` positions, so that it can draft later.
    pub(crate) fn may_follow(&self, n_lagging: usize, n_sequences: usize, context: usize) -> bool {
        if self.depth != DraftDepth::Auto {
            return true;
        }
        let plain = self.time(n_sequences, n_sequences, context).unwrap_or(0.0);
        !self.rests() && self.following_time(n_lagging, plain) <= self.balance.unwrap_or(self.allowed)
    }

    /// The same for a text that has ended, and may go on in another request.
    pub(crate) fn may_prepare(&self, n_lagging: usize, n_sequences: usize, context: usize) -> bool {
        let is_in_use = self.depth != DraftDepth::Auto || !self.mtp.is_empty();
        is_in_use && self.may_follow(n_lagging, n_sequences, context)
    }

    /// True if drafts have not paid for long.
    pub(crate) fn rests(&self) -> bool {
        self.n_without >= RESTING
    }

    /// Learns from the time in which the multi-token-prediction layer followed texts by `n_rows` positions.
    pub(crate) fn note_following(&mut self, n_rows: usize, time: Duration) {
        if n_rows > 0 {
            self.following = Some(Mean::add(self.following, time.as_secs_f64() / n_rows as f64));
            self.balance = self.balance.map(|balance| balance - time.as_secs_f64());
        }
    }

    /// Learns from the time of a step that ran prompts.
    pub(crate) fn note_prefill(&mut self, time: Duration) {
        let allowed = PREFILL_ALLOWANCE * time.as_secs_f64();
        match &mut self.balance {
            Some(balance) => *balance += allowed,
            None => self.allowed += allowed,
        }
    }

    /// Learns from the time of a step.
    pub(crate) fn note_step(&mut self, ran: &Ran) {
        let (time, drafting) = (ran.time.as_secs_f64(), ran.drafting.as_secs_f64());
        let is_plain = ran.n_rows == ran.n_sequences;
        if is_plain && self.since_plain > 0 {
            self.plain_after = (2 * self.plain_after).min(PLAIN_EVERY);
        }
        self.since_plain = if is_plain { 0 } else { self.since_plain + 1 };
        if let (Some(plain), Some(balance)) = (self.time(ran.n_sequences, ran.n_sequences, ran.context), self.balance) {
            let saved = plain * ran.n_tokens as f64 / ran.n_sequences as f64 - time;
            let saved = if is_plain { ALLOWANCE * time } else { saved };
            // What prompts have allowed stays.
            self.balance = Some((balance + saved).min(balance.max(MOST_SAVED * plain)));
        }
        let times = self.times.entry(class_of(ran.context)).or_default();
        let mean = Mean::add(times.get(&ran.n_rows).copied(), (time - drafting).max(1e-9));
        times.insert(ran.n_rows, mean);
        if ran.mtp_depth > 0 {
            let mean = Mean::add(self.mtp.get(&ran.mtp_depth).copied(), drafting);
            self.mtp.insert(ran.mtp_depth, mean);
        }
    }

    /// Seconds of a step of `n_rows` rows, `n` of them without drafts: measured, between two that were, or as in the nearest
    /// other context.
    fn time(&self, n: usize, n_rows: usize, context: usize) -> Option<f64> {
        let class = class_of(context);
        let within = |times: &Times| {
            let (low, high) = (times.range(..=n_rows).next_back()?, times.range(n_rows..).next()?);
            let part = if low.0 == high.0 { 0.0 } else { (n_rows - low.0) as f64 / (high.0 - low.0) as f64 };
            Some(low.1.0 + part * (high.1.0 - low.1.0))
        };
        if let Some(time) = self.times.get(&class).and_then(within) {
            return Some(time);
        }
        let plain = self.times.get(&class)?.get(&n)?.0;
        let mut others: Vec<(&u32, &Times)> = self.times.iter().filter(|(other, _)| **other != class).collect();
        others.sort_by_key(|(other, _)| other.abs_diff(class));
        others.into_iter().find_map(|(_, times)| Some(plain * within(times)? / times.get(&n)?.0))
    }

    /// Seconds until the multi-token-prediction layer has followed a text by `n_lagging` positions, where a step takes `plain`.
    fn following_time(&self, n_lagging: usize, plain: f64) -> f64 {
        self.following.map_or(plain / EXPECTED_FOLLOWED, |mean| mean.0) * n_lagging.saturating_sub(1) as f64
    }

    /// Seconds that the multi-token-prediction layer takes for `depth` drafts; none as long as it was never measured.
    fn mtp_time(&self, depth: usize) -> f64 {
        if depth == 0 {
            return 0.0;
        }
        let nearest = self.mtp.iter().min_by_key(|(known, _)| known.abs_diff(depth));
        nearest.map_or(0.0, |(known, mean)| mean.0 * depth as f64 / *known as f64)
    }
}

/// Contexts of one class are within a factor of two, up to 512 alike.
fn class_of(context: usize) -> u32 {
    (context / 512 + 1).ilog2()
}

#[cfg(test)]
mod tests;
