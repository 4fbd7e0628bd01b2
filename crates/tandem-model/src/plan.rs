//! Which rank gets which part, what that takes, and how fast it should be; or why it does not fit.
//!
//! Rank 0 holds the last layers, so that it samples what it has computed; pipelines run rank 0's neighbours first:
//! stage 1, 2, .., then 0.

use std::fmt::Write as _;
use std::ops::Range;

use tandem_core::ModelConfig;
use tandem_core::backend::CacheKind;
use tandem_core::weights::{ModuleKind, Weight};

use crate::registry::cache_specs;
use crate::share::{Division, Part};

/// What one rank has.
#[derive(Clone, Debug, PartialEq)]
pub struct RankResources {
    /// For messages.
    pub host: String,
    /// Bytes that this rank may fill.
    pub memory: u64,
    /// Measured bytes per second, while the other ranks of the same host measure too.
    pub bandwidth: f64,
    /// Seconds from one rank to another and back, with activations of one token.
    pub round_trip: f64,
}

/// How a model is to be divided; `None` leaves it to the planner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Pipeline stages.
    pub pp: Option<usize>,
    /// Slices of each layer.
    pub tp: Option<usize>,
    /// Parts of the experts.
    pub ep: Option<usize>,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The numbers do not fit together.
    #[error("{0}")]
    Request(String),
    /// Too little memory.
    #[error("{0}")]
    Memory(String),
}

/// What one rank holds and reads.
#[derive(Clone, Debug, PartialEq)]
pub struct RankPlan {
    /// Its part.
    pub part: Part,
    /// Weights.
    pub weight_bytes: u64,
    /// Cache of the whole context.
    pub cache_bytes: u64,
    /// Read for one decoded token.
    pub read_bytes: u64,
    /// Tokens per second of its own work, by its bandwidth.
    pub tokens_per_second: f64,
    /// Seconds for a message to the others and back, as measured at the start.
    pub round_trip: f64,
}

/// A division of a model among ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Pipeline stages.
    pub n_stages: usize,
    /// Ranks per stage.
    pub tensor_size: usize,
    /// By rank.
    pub ranks: Vec<RankPlan>,
    /// Speed of one sequence: every stage in turn, and the way between them.
    pub tokens_per_second: f64,
}

impl Plan {
    /// Bytes per second at which one sequence reads the model: the ranks of a stage at the same time, stage after stage.
    pub fn bandwidth(&self) -> f64 {
        let slowest = |stage: &[RankPlan]| stage.iter().map(|rank| 1.0 / rank.tokens_per_second).fold(0.0, f64::max);
        let seconds: f64 = self.ranks.chunks(self.tensor_size).map(slowest).sum();
        self.ranks.iter().map(|rank| rank.read_bytes as f64).sum::<f64>() / seconds
    }
}

/// Divides the model.
pub struct Planner<'a> {
    /// The whole model's.
    pub config: &'a ModelConfig,
    /// The whole model's.
    pub weights: &'a [Weight],
    /// Tokens that the cache holds.
    pub n_slots: usize,
    /// Bytes of a cached vector.
    pub cache_bytes: &'a dyn Fn(CacheKind, usize) -> usize,
    /// By rank.
    pub ranks: &'a [RankResources],
}

impl Planner<'_> {
    /// The plan asked for, or the fastest one that fits.
    ///
    /// # Errors
    /// The numbers do not multiply to the number of ranks, or the model does not fit.
    pub fn plan(&self, request: Request) -> Result<Plan, PlanError> {
        let n = self.ranks.len();
        let Request { pp, tp, ep } = request;
        if [pp, tp, ep].contains(&Some(0)) {
            return Err(PlanError::Request("--pp, --tp and --ep must be at least 1".to_string()));
        }
        if let (Some(tp), Some(ep)) = (tp, ep)
            && tp > 1
            && ep > 1
            && tp != ep
        {
            return Err(PlanError::Request(format!(
                "--tp {tp} and --ep {ep} divide the same layers among the same ranks, so they must be equal; leave one out"
            )));
        }
        if let (None, None, None) = (pp, tp, ep) {
            return self.fastest(n);
        }
        let tensor = tp.unwrap_or(1).max(ep.unwrap_or(1));
        let stages = pp.unwrap_or(if n.is_multiple_of(tensor) { n / tensor } else { 1 });
        if stages * tensor != n {
            return Err(PlanError::Request(format!(
                "--pp {stages} times {tensor} ranks per stage needs {} ranks, but there are {n}; change --pp, --tp or --ep, or \
                 the number of ranks",
                stages * tensor
            )));
        }
        if ep.is_some_and(|ep| ep > 1) && self.config.moe.is_none() {
            return Err(PlanError::Request("--ep needs a model with experts; use --tp or --pp".to_string()));
        }
        self.with(stages, tensor, tp.is_some_and(|tp| tp > 1), ep.is_some_and(|ep| ep > 1))
    }

    fn fastest(&self, n: usize) -> Result<Plan, PlanError> {
        let mut best: Result<Plan, PlanError> = Err(PlanError::Request("there are no ranks".to_string()));
        for tensor in (1..=n).filter(|t| n.is_multiple_of(*t)) {
            match (self.with(n / tensor, tensor, tensor > 1, false), &best) {
                (Ok(plan), Ok(other)) if plan.tokens_per_second <= other.tokens_per_second => {}
                (Ok(plan), _) => best = Ok(plan),
                // The pipeline's reason is the clearest: it holds every weight once.
                (Err(error), Err(PlanError::Request(_))) => best = Err(error),
                (Err(_), _) => {}
            }
        }
        best
    }

    fn with(&self, n_stages: usize, tensor_size: usize, slice: bool, by_expert: bool) -> Result<Plan, PlanError> {
        let n_layers = self.config.num_hidden_layers;
        let part = |layers: Range<usize>, position: usize, tensor_rank: usize| Part {
            layers,
            embeds: position == 0,
            head: position + 1 == n_stages && tensor_rank == 0,
            tensor_rank,
            tensor_size,
            slice,
            by_expert,
        };
        // What each tensor rank holds and reads per layer; the ends of the model are counted with their stages.
        let whole = |rank: usize| part(0..n_layers, 0, rank);
        let divisions: Vec<Division> =
            (0..tensor_size).map(|r| Division::new(&whole(r), self.config, self.weights)).collect();
        let cache: Vec<Vec<u64>> = divisions.iter().map(|division| self.cache(&division.config(self.config))).collect();
        let mut layers = vec![vec![(0u64, 0u64); n_layers]; tensor_size];
        for (division, layers) in divisions.iter().zip(&mut layers) {
            for weight in self.weights {
                if let Some(layer) = weight.spec.layer.filter(|l| *l < n_layers) {
                    let bytes = division.bytes(weight, self.config);
                    layers[layer].0 += bytes;
                    layers[layer].1 += weight.spec.read_per_token(bytes);
                }
            }
        }
        let ends = |part: &Part| -> (u64, u64) {
            let of_end = self.weights.iter().filter(|w| w.spec.layer.is_none() && part.needs(&w.spec, self.config));
            let tied = self.config.tie_word_embeddings && part.head;
            of_end.fold((0, 0), |(held, reads), w| {
                let bytes = w.bytes() as u64;
                // A tied embedding is the output projection too.
                let whole = tied && w.spec.kind == ModuleKind::Embed;
                (held + bytes, reads + if whole { bytes } else { w.spec.read_per_token(bytes) })
            })
        };
        let rank_plan = |stage_layers: &Range<usize>, position: usize, tensor_rank: usize| -> RankPlan {
            let part = part(stage_layers.clone(), position, tensor_rank);
            let (end_bytes, end_reads) = ends(&part);
            let sum = |of: &dyn Fn(usize) -> u64| stage_layers.clone().map(of).sum::<u64>();
            let rank = (position + 1) % n_stages * tensor_size + tensor_rank;
            let read_bytes = end_reads + sum(&|l| layers[tensor_rank][l].1);
            RankPlan {
                weight_bytes: end_bytes + sum(&|l| layers[tensor_rank][l].0),
                cache_bytes: sum(&|l| cache[tensor_rank][l]),
                tokens_per_second: self.ranks[rank].bandwidth / read_bytes.max(1) as f64,
                round_trip: self.ranks[rank].round_trip,
                read_bytes,
                part,
            }
        };
        // cost[position][end]: the slowest stage when the first stages hold the layers before `end`.
        let cuts: Vec<usize> = (0..=n_layers).filter(|l| self.may_cut(*l)).collect();
        let stage_cost = |position: usize, range: Range<usize>| -> f64 {
            let plans = (0..tensor_size).map(|r| (r, rank_plan(&range, position, r)));
            plans
                .map(|(r, plan)| {
                    let rank = (position + 1) % n_stages * tensor_size + r;
                    let needed = plan.weight_bytes + plan.cache_bytes;
                    if needed > self.ranks[rank].memory { f64::INFINITY } else { 1.0 / plan.tokens_per_second }
                })
                .fold(0.0, f64::max)
        };
        let mut cost = vec![vec![f64::INFINITY; cuts.len()]; n_stages + 1];
        let mut from = vec![vec![0; cuts.len()]; n_stages + 1];
        cost[0][0] = 0.0;
        for position in 0..n_stages {
            for end in 0..cuts.len() {
                let options = (0..=end)
                    .filter(|start| cost[position][*start].is_finite())
                    .map(|start| (cost[position][start].max(stage_cost(position, cuts[start]..cuts[end])), start));
                let best = options.min_by(|a, b| a.0.total_cmp(&b.0));
                if let Some((slowest, start)) = best {
                    cost[position + 1][end] = slowest;
                    from[position + 1][end] = start;
                }
            }
        }
        if cost[n_stages].last().is_none_or(|c| c.is_infinite()) {
            return Err(self.does_not_fit(&layers, &cache));
        }
        let mut ranges = vec![];
        let mut end = cuts.len() - 1;
        for position in (0..n_stages).rev() {
            let start = from[position + 1][end];
            ranges.push(cuts[start]..cuts[end]);
            end = start;
        }
        ranges.reverse();
        let ranks: Vec<RankPlan> = (0..n_stages * tensor_size)
            .map(|rank| {
                let position = (rank / tensor_size + n_stages - 1) % n_stages;
                rank_plan(&ranges[position], position, rank % tensor_size)
            })
            .collect();
        let slowest = |stage: &[RankPlan]| stage.iter().map(|r| 1.0 / r.tokens_per_second).fold(0.0, f64::max);
        let work: f64 = ranks.chunks(tensor_size).map(slowest).sum();
        let hop = self.ranks.iter().map(|r| r.round_trip / 2.0).fold(0.0, f64::max);
        let reductions = if tensor_size > 1 { 2 * n_layers } else { 0 };
        let hops = if n_stages > 1 { n_stages } else { usize::from(tensor_size > 1) } + reductions;
        Ok(Plan { n_stages, tensor_size, ranks, tokens_per_second: 1.0 / (work + hops as f64 * hop) })
    }

    /// Bytes of each layer's cache for a rank with this configuration.
    fn cache(&self, config: &ModelConfig) -> Vec<u64> {
        let layer =
            |layer| cache_specs(config, layer).iter().map(|c| (self.cache_bytes)(c.kind, c.width)).sum::<usize>();
        (0..config.num_hidden_layers).map(|l| (layer(l) * self.n_slots) as u64).collect()
    }

    /// A stage may start at a layer that does not reuse the selection of the layer before it.
    fn may_cut(&self, layer: usize) -> bool {
        self.config.indexer.is_none()
            || layer == 0
            || layer == self.config.num_hidden_layers
            || self.config.has_indexer(layer)
    }

    fn does_not_fit(&self, layers: &[Vec<(u64, u64)>], cache: &[Vec<u64>]) -> PlanError {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let held: u64 = layers.iter().flatten().map(|(bytes, _)| bytes).sum();
        let ends: u64 = self.weights.iter().filter(|w| w.spec.layer.is_none()).map(|w| w.bytes() as u64).sum();
        let cache: u64 = cache.iter().flatten().sum();
        let needed = held + ends + cache;
        let all: u64 = self.ranks.iter().map(|r| r.memory).sum();
        let mut message = format!(
            "the model does not fit: weights of {:.2} GB and a cache of {:.2} GB for {} tokens",
            gb(held + ends),
            gb(cache),
            self.n_slots
        );
        let _ = write!(message, ", and these ranks have {:.2} GB", gb(all));
        for (rank, resources) in self.ranks.iter().enumerate() {
            let _ = write!(message, "\n  rank {rank} ({}): {:.2} GB free", resources.host, gb(resources.memory));
        }
        let missing = gb(needed.saturating_sub(all));
        let remedy = if missing > 0.0 {
            format!("\n{missing:.2} GB are missing: add ranks, free memory, or lower --context")
        } else {
            "\nno cut between layers suits the memory of each rank: give the ranks more even memory, use another --pp or \
             --tp, or lower --context"
                .to_string()
        };
        PlanError::Memory(message + &remedy)
    }
}
