//! When requests start, and what they ask.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Gamma};
use serde_json::Value;

/// Words that any tokenizer splits into about one token each.
const WORDS: [&str; 32] = [
    "the", "fox", "and", "a", "tree", "with", "red", "bird", "who", "said", "that", "day", "was", "good", "in",
    "house", "to", "find", "old", "man", "one", "day", "she", "had", "little", "boy", "we", "go", "home", "cat", "sun",
    "is",
];

/// Requests that come at their own times, whatever the server does.
#[derive(Clone, Debug)]
pub struct Arrivals {
    /// How many a second.
    pub ramp: Ramp,
    /// Shape of the gamma distribution of the pauses: 1 is a Poisson process, less comes in bursts, more is more even.
    pub burstiness: f64,
}

/// Requests a second, from the first request to the last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ramp {
    /// Always as many.
    Constant(f64),
    /// From one rate to another, the same step at each request.
    Linear(f64, f64),
    /// From one rate to another, the same factor at each request.
    Exponential(f64, f64),
}

impl Arrivals {
    /// Requests a second, if they are always as many.
    pub(crate) fn rate(&self) -> Option<f64> {
        match self.ramp {
            Ramp::Constant(rate) => Some(rate),
            Ramp::Linear(..) | Ramp::Exponential(..) => None,
        }
    }

    /// Seconds after the beginning at which `n` requests start; the first at once.
    pub(crate) fn starts(&self, n: usize, seed: u64) -> anyhow::Result<Vec<f64>> {
        let rate_of = |i: usize| {
            let share = i as f64 / (n.max(2) - 1) as f64;
            match self.ramp {
                Ramp::Constant(rate) => rate,
                Ramp::Linear(from, to) => from + (to - from) * share,
                Ramp::Exponential(from, to) => from * (to / from).powf(share),
            }
        };
        let mut random = StdRng::seed_from_u64(seed);
        let mut now = 0.0;
        (0..n)
            .map(|i| {
                let start = now;
                let is_rate = |rate: f64| rate > 0.0 && rate.is_finite();
                ensure!(is_rate(rate_of(i)), "rates of requests must be above 0, found {}", rate_of(i));
                let pause = Gamma::new(self.burstiness, 1.0 / (rate_of(i) * self.burstiness));
                let pause = pause.context("--burstiness must be above 0")?;
                now += pause.sample(&mut random);
                Ok(start)
            })
            .collect()
    }
}

/// A limit in milliseconds, as vLLM writes it: `ttft:200`, `tpot:50` or `e2el:5000`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// To the first token.
    TimeToFirstToken(f64),
    /// For each token after it.
    TimePerOutputToken(f64),
    /// Of the whole request.
    EndToEnd(f64),
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> Result<Goal, String> {
        let parts = text.split_once(':').and_then(|(key, limit)| Some((key, limit.parse::<f64>().ok()?)));
        match parts.filter(|(_, limit)| *limit > 0.0 && limit.is_finite()) {
            Some(("ttft", limit)) => Ok(Goal::TimeToFirstToken(limit)),
            Some(("tpot", limit)) => Ok(Goal::TimePerOutputToken(limit)),
            Some(("e2el", limit)) => Ok(Goal::EndToEnd(limit)),
            _ => Err("expected ttft:MS, tpot:MS or e2el:MS".to_owned()),
        }
    }
}

/// What requests ask.
#[derive(Clone, Debug)]
pub enum Prompts {
    /// Random words.
    Words {
        /// Words that only this prompt has.
        own: usize,
        /// Words before them that it shares with others.
        shared: usize,
        /// Different beginnings, of which each prompt gets one; at least 1.
        num_prefixes: usize,
    },
    /// First messages of a data set in ShareGPT's form, in random order, again and again if there are too few.
    ShareGpt(PathBuf),
}

impl Prompts {
    /// Random words of each prompt; `None` for a data set's.
    pub(crate) fn own_words(&self) -> Option<usize> {
        match self {
            Prompts::Words { own, .. } => Some(*own),
            Prompts::ShareGpt(_) => None,
        }
    }

    pub(crate) fn make(&self, n: usize, seed: u64) -> anyhow::Result<Vec<String>> {
        let mut random = StdRng::seed_from_u64(seed);
        let words = |random: &mut StdRng, n: usize| -> Vec<&str> {
            (0..n).map(|_| WORDS[random.random_range(0..WORDS.len())]).collect()
        };
        match self {
            Prompts::Words { own, shared, num_prefixes } => {
                let prefixes: Vec<Vec<&str>> =
                    (0..(*num_prefixes).max(1)).map(|_| words(&mut random, *shared)).collect();
                let prompt = |_| {
                    let prefix = &prefixes[random.random_range(0..prefixes.len())];
                    [&prefix[..], &words(&mut random, *own)].concat().join(" ")
                };
                Ok((0..n).map(prompt).collect())
            }
            Prompts::ShareGpt(path) => {
                let name = path.display();
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
                let value: Value = serde_json::from_str(&text).with_context(|| format!("{name} is not JSON"))?;
                let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
                // As vLLM: conversations of two turns and more, the first turn of each.
                let first = |entry: &Value| {
                    let turns = entry.get("conversations")?.as_array().filter(|turns| turns.len() > 1)?;
                    turns[0]["value"].as_str().filter(|text| !text.is_empty()).map(str::to_owned)
                };
                let mut prompts: Vec<String> = list.iter().filter_map(first).collect();
                let form = "[{\"conversations\": [{\"from\": \"human\", \"value\": \"..\"}, {\"from\": \"gpt\", \"value\": \"..\"}]}]";
                ensure!(
                    !prompts.is_empty(),
                    "{name} has no conversation of two turns; expected ShareGPT's form, {form}"
                );
                prompts.shuffle(&mut random);
                Ok(prompts.iter().cycle().take(n).cloned().collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn pauses(ramp: Ramp, burstiness: f64, n: usize) -> Vec<f64> {
        let starts = Arrivals { ramp, burstiness }.starts(n, 7).expect("rates");
        assert_eq!(starts[0], 0.0);
        starts.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// The deviation of a gamma distribution's pauses is their mean over the root of its shape.
    #[test]
    fn pauses_have_the_rate_and_the_shape_asked_for() {
        for burstiness in [0.25, 1.0, 100.0] {
            let pauses = pauses(Ramp::Constant(5.0), burstiness, 20_001);
            let mean = pauses.iter().sum::<f64>() / pauses.len() as f64;
            let variance = pauses.iter().map(|pause| (pause - mean).powi(2)).sum::<f64>() / pauses.len() as f64;
            let deviation = 0.2 / burstiness.sqrt();
            // Five standard errors of a mean of 20,000.
            assert!((mean - 0.2).abs() < 5.0 * deviation / 20_000f64.sqrt(), "{burstiness}: mean {mean}");
            assert!((variance.sqrt() / deviation - 1.0).abs() < 0.15, "{burstiness}: {}", variance.sqrt());
        }
        assert!(Arrivals { ramp: Ramp::Constant(0.0), burstiness: 1.0 }.starts(2, 1).is_err());
    }

    #[test]
    fn ramps_go_from_one_rate_to_the_other() {
        for (ramp, middle) in [(Ramp::Linear(1.0, 100.0), 50.5), (Ramp::Exponential(1.0, 100.0), 10.0)] {
            // So even that each pause is one over its rate.
            let pauses = pauses(ramp, 1e9, 1001);
            for (i, rate) in [(0, 1.0), (500, middle), (999, 100.0)] {
                assert!((pauses[i] * rate - 1.0).abs() < 0.12, "{ramp:?} {i}: {}", pauses[i]);
            }
        }
    }

    #[test]
    fn prompts_share_their_beginnings() {
        let made = Prompts::Words { own: 5, shared: 10, num_prefixes: 3 }.make(50, 1).expect("words");
        let heads: BTreeSet<Vec<&str>> = made.iter().map(|prompt| prompt.split(' ').take(10).collect()).collect();
        assert!(heads.len() <= 3 && heads.len() > 1, "{}", heads.len());
        assert!(made.iter().all(|prompt| prompt.split(' ').count() == 15));
        assert_eq!(made, Prompts::Words { own: 5, shared: 10, num_prefixes: 3 }.make(50, 1).expect("words"));
    }

    #[test]
    fn a_data_set_in_sharegpts_form() {
        let dir = tempfile::TempDir::new().expect("a folder");
        let path = dir.path().join("data.json");
        let made = |text: &str, n: usize| {
            std::fs::write(&path, text).expect("writable");
            Prompts::ShareGpt(path.clone()).make(n, 1)
        };
        let two = r#"[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "human", "value": "left out"}]}, {"id": 3}]"#;
        assert_eq!(made(two, 3).expect("one"), ["a", "a", "a"]);
        for (text, expected) in [("[]", "no conversation of two turns"), ("{", "is not JSON"), ("3", "ShareGPT's form")]
        {
            assert!(format!("{:#}", made(text, 1).expect_err("refused")).contains(expected), "{text}");
        }
        assert!(Prompts::ShareGpt("/no/such".into()).make(1, 1).is_err());
    }

    #[test]
    fn limits_of_good_requests() {
        assert_eq!("ttft:200".parse(), Ok(Goal::TimeToFirstToken(200.0)));
        for text in ["ttft", "ttft:", "ttft:-1", "ttft:nan", "itl:3", ":3"] {
            assert!(text.parse::<Goal>().is_err(), "{text}");
        }
    }
}
