//! Who runs in the next step, and with how many tokens.
//!
//! A step holds one token of every sequence that decodes, and as many prompt tokens as its budget allows. While nothing
//! decodes the budget is the prefill chunk. Otherwise a step stays within [`EXACT_ROWS`], so that decoded tokens never
//! depend on what else runs, and its prompt part may take [`Scheduling::prefill_share`] times as long as its decoding
//! part, so that streams never stall. With [`Scheduling::inter_token`] a step also stays within that time, as far as
//! measured costs tell: fewer sequences run, the others wait.

use std::time::Duration;

use tandem_core::EXACT_ROWS;

/// Weight of the newest measurement in running means.
const NEWEST: f64 = 0.2;

/// How sequences share the steps.
#[derive(Clone, Copy, Debug)]
pub struct Scheduling {
    /// Sequences that run at the same time, at most.
    pub max_batch: usize,
    /// Prompt tokens of one step while nothing decodes.
    pub prefill_chunk: usize,
    /// Time that a step may spend on prompts, as a multiple of the time it spends on decoding.
    pub prefill_share: f64,
    /// Time that a step with decoded tokens keeps to: no sequence is added that would make steps longer, and prompts get
    /// what is left. One sequence, and one prompt row, run whatever they take.
    pub inter_token: Option<Duration>,
}

/// Running means of what steps cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepCosts {
    /// Seconds of a step per decoded row, when it only decodes.
    decode_row: Option<f64>,
    /// Seconds that one prompt row adds to a step.
    prefill_row: Option<f64>,
}

impl StepCosts {
    /// Learns from one step.
    pub(crate) fn record(&mut self, n_decode: usize, n_prefill: usize, time: Duration) {
        let seconds = time.as_secs_f64();
        let learn = |mean: &mut Option<f64>, value: f64| {
            *mean = Some(mean.map_or(value, |mean| mean + NEWEST * (value - mean)));
        };
        match (n_decode, n_prefill) {
            (0, 0) => {}
            (_, 0) => learn(&mut self.decode_row, seconds / n_decode as f64),
            (0, _) => {}
            _ => {
                let Some(decode_row) = self.decode_row else { return };
                let rest = seconds - decode_row * n_decode as f64;
                // Never below a tenth of a decoded row: a lucky measurement must not fill the next step.
                learn(&mut self.prefill_row, (rest / n_prefill as f64).max(0.1 * decode_row));
            }
        }
    }

    /// Prompt rows that may join `n_decode` decoded ones; at least one, so that prompts never starve.
    fn prefill_rows(&self, n_decode: usize, scheduling: &Scheduling) -> usize {
        let decode_row = self.decode_row.unwrap_or(1.0);
        let prefill_row = self.prefill_row.unwrap_or(decode_row);
        let decoding = n_decode as f64 * decode_row;
        let left = match scheduling.inter_token {
            Some(time) if self.decode_row.is_some() => time.as_secs_f64() - decoding,
            Some(_) => 0.0,
            None => f64::INFINITY,
        };
        ((scheduling.prefill_share * decoding).min(left) / prefill_row).max(1.0) as usize
    }

    /// Sequences that may run at the same time.
    ///
    /// A step of few rows costs more for each than a step of many, so that this errs on the side of too few, and more are
    /// let in as they turn out to be cheaper.
    pub(crate) fn max_running(&self, scheduling: &Scheduling) -> usize {
        let Some(time) = scheduling.inter_token else { return scheduling.max_batch };
        let n = self.decode_row.map_or(1.0, |decode_row| time.as_secs_f64() / decode_row);
        (n as usize).clamp(1, scheduling.max_batch)
    }
}

/// Rows of the next step for each sequence, of which `pending` gives the tokens that have not run yet: at least 1, and
/// exactly 1 for those that decode.
pub(crate) fn share_rows(pending: &[usize], max_rows: usize, scheduling: &Scheduling, costs: &StepCosts) -> Vec<usize> {
    let n_decode = pending.iter().filter(|n| **n == 1).count();
    let mut budget = match n_decode {
        0 => scheduling.prefill_chunk.min(max_rows),
        n => costs.prefill_rows(n, scheduling).min(max_rows.min(EXACT_ROWS).saturating_sub(n)),
    };
    let mut rows = vec![0; pending.len()];
    // The shortest prompts first, each with an equal part of what is left: no long prompt holds up a short one.
    let mut prompts: Vec<usize> = (0..pending.len()).filter(|i| pending[*i] > 1).collect();
    prompts.sort_by_key(|i| pending[*i]);
    let n_prompts = prompts.len();
    for (n_served, i) in prompts.into_iter().enumerate() {
        rows[i] = pending[i].min(budget.div_ceil(n_prompts - n_served)).min(budget);
        budget -= rows[i];
    }
    for (row, _) in rows.iter_mut().zip(pending).filter(|(_, n)| **n == 1) {
        *row = 1;
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDULING: Scheduling =
        Scheduling { max_batch: 64, prefill_chunk: 256, prefill_share: 2.0, inter_token: None };

    #[test]
    fn prompts_share_a_step_and_short_ones_do_not_wait() {
        let check = |pending: &[usize], expected: &[usize]| {
            assert_eq!(share_rows(pending, 512, &SCHEDULING, &StepCosts::default()), expected, "{pending:?}");
        };
        check(&[], &[]);
        check(&[1000], &[256]);
        check(&[1000, 20], &[236, 20]);
        check(&[1000, 1000], &[128, 128]);
        check(&[1, 1000, 1, 1], &[1, 6, 1, 1]);
        check(&[1, 1000, 1, 3], &[1, 2, 1, 2]);
        let many = share_rows(&[&[1; 60][..], &[500]].concat(), 512, &SCHEDULING, &StepCosts::default());
        assert_eq!((many[60], many.iter().sum::<usize>()), (4, EXACT_ROWS));
    }

    #[test]
    fn measured_costs_decide_how_much_prompt_joins() {
        let mut costs = StepCosts::default();
        costs.record(4, 0, Duration::from_millis(40));
        assert_eq!(costs.prefill_rows(4, &SCHEDULING), 8);
        costs.record(4, 8, Duration::from_millis(60));
        assert_eq!(costs.prefill_rows(4, &SCHEDULING), 32, "a prompt row costs 2.5 ms, a decoded one 10 ms");
        costs.record(0, 256, Duration::from_secs(9));
        assert_eq!(costs.prefill_rows(4, &SCHEDULING), 32);
        assert_eq!(costs.prefill_rows(1, &Scheduling { prefill_share: 0.0, ..SCHEDULING }), 1);
    }

    #[test]
    fn a_time_between_tokens_bounds_who_runs_and_how_much_prompt_joins() {
        let scheduling = Scheduling { inter_token: Some(Duration::from_millis(50)), ..SCHEDULING };
        let mut costs = StepCosts::default();
        assert_eq!(costs.max_running(&scheduling), 1, "nothing is known yet");
        assert_eq!(costs.prefill_rows(1, &scheduling), 1);
        costs.record(1, 0, Duration::from_millis(12));
        assert_eq!(costs.max_running(&scheduling), 4);
        assert_eq!(costs.prefill_rows(2, &scheduling), 2, "26 of 50 ms are left");
        assert_eq!(costs.prefill_rows(4, &scheduling), 1);
        for _ in 0..50 {
            costs.record(4, 0, Duration::from_millis(24));
        }
        assert_eq!(costs.max_running(&scheduling), 8, "rows of one step turned out to be cheaper");
        costs.record(4, 0, Duration::from_secs(9));
        assert_eq!(costs.max_running(&scheduling), 1);
        assert_eq!(costs.max_running(&SCHEDULING), 64);
    }
}
