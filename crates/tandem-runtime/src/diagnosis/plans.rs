//! The ways to run a model on several hosts, with what the speed of one and of the network make one expect.

use serde::Serialize;
use tandem_core::ModelConfig;
use tandem_core::weights::Weight;
use tandem_engine::Operation;
use tandem_model::{Planner, RankResources, Request};

use super::finding::{Finding, Level};
use super::pairs::PairSpeed;
use super::predict::Prediction;
use crate::units::bytes;

/// One way to run a model.
#[derive(Clone, Debug, Serialize)]
pub struct PlanSpeed {
    /// Flags that ask for it; `one process` for the first.
    pub plan: String,
    /// Of one sequence; none where the model does not fit or cannot be divided so.
    pub decode_tokens_per_second: Option<f64>,
    /// Of a long prompt.
    pub prefill_tokens_per_second: Option<f64>,
    /// How it comes about, or why it does not work.
    pub reasoning: Vec<String>,
}

impl PlanSpeed {
    /// In a few words.
    pub fn expected(&self) -> String {
        match (self.decode_tokens_per_second, self.prefill_tokens_per_second) {
            (Some(decode), Some(prefill)) => {
                format!("{decode:.2} tokens/s of one sequence, {prefill:.0} tokens/s of a prompt")
            }
            _ => format!("not possible: {}", self.reasoning.join(" ")),
        }
    }

    /// As a line of a report.
    pub(super) fn finding(&self) -> Finding {
        Finding::new("model.plan", Level::Ok, self.plan.clone(), self.expected())
    }
}

/// The slowest way between two of several hosts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Network {
    hosts: usize,
    /// Of a message one way.
    latency_ms: f64,
    bytes_per_ms: f64,
}

impl Network {
    /// Of so many ranks with these ways between them.
    pub(super) fn of(hosts: usize, pairs: &[PairSpeed]) -> Network {
        let latency_ms = pairs.iter().map(|pair| pair.latency_us / 1e3).fold(0.0, f64::max);
        let slowest = pairs.iter().map(|pair| pair.bytes_per_second).fold(f64::INFINITY, f64::min);
        Network { hosts, latency_ms, bytes_per_ms: (slowest / 1e3).max(1e-9) }
    }

    /// Milliseconds of a message.
    fn message(&self, bytes: f64) -> f64 {
        self.latency_ms + bytes / self.bytes_per_ms
    }

    /// The same of a sum over all hosts: each sends and receives every part twice, less its own.
    fn sum(&self, bytes: f64) -> f64 {
        let n = self.hosts as f64;
        self.latency_ms + 2.0 * (n - 1.0) / n * bytes / self.bytes_per_ms
    }
}

/// What is known of an operation when hosts share its work.
fn is_divided(name: &str, by_experts: bool) -> bool {
    match by_experts {
        true => name == Operation::Experts.name(),
        // Every host norms every row.
        false => ![Operation::Norms, Operation::Other, Operation::Router].iter().any(|o| o.name() == name),
    }
}

/// One process here, and every way to divide the model among the hosts of a network that have as much free memory as this one,
/// of the same bandwidth.
pub(super) fn plans(
    prediction: &Prediction,
    config: &ModelConfig,
    weights: &[Weight],
    (memory, bandwidth): (u64, f64),
    network: Option<&Network>,
) -> Vec<PlanSpeed> {
    let mut list = vec![PlanSpeed {
        plan: "one process".to_string(),
        decode_tokens_per_second: Some(prediction.decode_tokens_per_second),
        prefill_tokens_per_second: Some(prediction.prefill_tokens_per_second),
        reasoning: prediction.reasoning.clone(),
    }];
    let Some(network) = network.filter(|network| network.hosts > 1) else { return list };
    let n = network.hosts;
    let rank = RankResources { host: "a host".to_string(), memory, bandwidth, round_trip: 2e-3 * network.latency_ms };
    let (ranks, cache_bytes) = (vec![rank; n], |_, width| 4 * width);
    let planner = Planner { config, weights, n_slots: prediction.context, cache_bytes: &cache_bytes, ranks: &ranks };
    let none = Request::default();
    let mut ways = vec![
        (format!("--pp {n}"), Request { pp: Some(n), ..none }),
        (format!("--tp {n}"), Request { tp: Some(n), ..none }),
    ];
    if config.moe.is_some() {
        ways.push((format!("--ep {n}"), Request { ep: Some(n), ..none }));
    }
    for (plan, request) in ways {
        list.push(match planner.plan(request) {
            Err(error) => PlanSpeed {
                plan,
                decode_tokens_per_second: None,
                prefill_tokens_per_second: None,
                reasoning: error.to_string().lines().map(str::to_string).collect(),
            },
            Ok(planned) => {
                let held = planned.ranks.iter().map(|rank| rank.weight_bytes).max().unwrap_or(0);
                let Times { decode_ms, prefill_ms, how } = times(prediction, config, network, request);
                PlanSpeed {
                    plan,
                    decode_tokens_per_second: Some(1e3 / decode_ms),
                    prefill_tokens_per_second: Some(prediction.prefill_chunk as f64 * 1e3 / prefill_ms),
                    reasoning: vec![format!("at most {} of weights a host, if all are as this one", bytes(held)), how],
                }
            }
        });
    }
    list
}

struct Times {
    decode_ms: f64,
    prefill_ms: f64,
    how: String,
}

fn times(prediction: &Prediction, config: &ModelConfig, network: &Network, request: Request) -> Times {
    let n = network.hosts as f64;
    let row = 4.0 * config.hidden_size as f64;
    let chunk = row * prediction.prefill_chunk as f64;
    let all = |list: &[(String, f64)]| list.iter().map(|(_, ms)| ms).sum::<f64>();
    let (decode, prefill) = (all(&prediction.decode_ms), all(&prediction.prefill_ms));
    if request.pp.is_some() {
        let hops = n * network.message(row);
        // Every host works on a chunk of its own.
        let prefill_ms = (prefill / n).max(network.message(chunk));
        let how = format!(
            "{decode:.1} ms of all layers in turn and {hops:.2} ms of {n:.0} messages; hosts work on chunks of a long prompt \
             at the same time"
        );
        return Times { decode_ms: decode + hops, prefill_ms, how };
    }
    let by_experts = request.ep.is_some();
    let divided = |list: &[(String, f64)]| -> f64 {
        list.iter().map(|(name, ms)| if is_divided(name, by_experts) { ms / n } else { *ms }).sum()
    };
    let layers = config.num_hidden_layers;
    let sums = match by_experts {
        true => (0..layers).filter(|layer| config.is_sparse(*layer)).count(),
        false => 2 * layers,
    } as f64;
    let (step, of_sums) = (divided(&prediction.decode_ms), sums * network.sum(row));
    let how = format!("{step:.1} ms of the shared work and {of_sums:.2} ms of {sums:.0} sums of {}", bytes(row as u64));
    Times { decode_ms: step + of_sums, prefill_ms: divided(&prediction.prefill_ms) + sums * network.sum(chunk), how }
}

#[cfg(test)]
mod tests {
    use tandem_model::{DummyWeights, Recipe, Stacks};

    use super::*;
    use crate::presets;

    fn made_up() -> Prediction {
        let operation = |o: Operation, ms: f64| (o.name().to_string(), ms);
        let decode = vec![operation(Operation::Experts, 60.0), operation(Operation::AttentionProjections, 30.0)];
        let prefill = decode.iter().map(|(name, ms)| (name.clone(), 20.0 * ms)).collect();
        Prediction {
            context: 512,
            decode_tokens_per_second: 10.0,
            prefill_chunk: 256,
            prefill_tokens_per_second: 142.0,
            reasoning: vec![],
            decode_ms: [decode, vec![operation(Operation::Norms, 10.0)]].concat(),
            prefill_ms: prefill,
            plans: vec![],
        }
    }

    /// (plan, decode, prefill) over a network of this latency and bandwidth.
    fn speeds(preset: &str, memory: u64, latency_us: f64, bytes_per_second: f64) -> Vec<(String, f64, f64)> {
        let text = presets::config_text(preset).unwrap().1;
        let config = ModelConfig::parse(&text).unwrap();
        let weights =
            DummyWeights::new(&config, &Recipe::parse("mxfp4-q8").unwrap(), Stacks::Distinct).weights().to_vec();
        let pair = PairSpeed { from: 0, to: 1, latency_us, bytes_per_second };
        let network = Network::of(2, &[pair]);
        let plans = plans(&made_up(), &config, &weights, (memory, 1e11), Some(&network));
        let speed = |p: PlanSpeed| {
            (p.plan, p.decode_tokens_per_second.unwrap_or(0.0), p.prefill_tokens_per_second.unwrap_or(0.0))
        };
        plans.into_iter().map(speed).collect()
    }

    #[test]
    fn a_fast_network_favours_slices_and_a_slow_one_pipelines() {
        let names = |list: &[(String, f64, f64)]| list.iter().map(|p| p.0.clone()).collect::<Vec<_>>();
        let fast = speeds("glm-5.1", 1 << 43, 10.0, 1e10);
        assert_eq!(names(&fast), ["one process", "--pp 2", "--tp 2", "--ep 2"]);
        let slow = speeds("glm-5.1", 1 << 43, 2000.0, 1e8);
        let best =
            |list: &[(String, f64, f64)]| list.iter().skip(1).max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0.clone();
        assert_eq!((best(&fast).as_str(), best(&slow).as_str()), ("--tp 2", "--pp 2"));
        // A pipeline of two works on two chunks, and is no faster for one sequence.
        assert!(fast[1].1 < 10.0 && fast[1].2 > 250.0, "{fast:?}");
        // 45 ms of shared work, 10 of norms, and 156 sums of 24 kB.
        assert!((1e3 / fast[2].1 - 55.0 - 156.0 * (0.01 + 24576.0 / 1e7)).abs() < 0.1, "{fast:?}");
        // A model without experts has no such plan, and one that does not fit has none.
        assert_eq!(names(&speeds("llama-3.2-3b", 1 << 43, 10.0, 1e10)).len(), 3);
        assert!(speeds("glm-5.1", 1 << 34, 10.0, 1e10).iter().skip(1).all(|p| p.1 == 0.0));
    }
}
