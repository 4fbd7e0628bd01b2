//! The share of a model that one rank holds: which layers, and which slices of them.
//!
//! A [`Part`] says what was asked for; [`Division`] works out the slices from the weights at hand, so that quantisation
//! groups stay whole; [`PartWeights`] cuts them. What does not divide is held by every rank of the tensor group, and
//! where it feeds a sum, only the first one adds it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use tandem_core::backend::{Backend, TensorGroup};
use tandem_core::dtype::FP8_BLOCK;
use tandem_core::weights::{Axis, MatrixData, MatrixPart, ModuleKind, Read, Split, Weight, WeightSpec};
use tandem_core::{CheckpointError, DType, ModelConfig};

use crate::WeightSource;

/// What one rank is asked to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Decoder layers.
    pub layers: Range<usize>,
    /// Holds the embedding, and starts from tokens.
    pub embeds: bool,
    /// Holds the final norm and the output projection, and ends with logits.
    pub head: bool,
    /// Place among the ranks that share these layers.
    pub tensor_rank: usize,
    /// Ranks that share these layers.
    pub tensor_size: usize,
    /// Attention heads and MLP widths are sliced (tensor parallelism).
    pub slice: bool,
    /// Routed experts are divided by whole experts (expert parallelism).
    pub by_expert: bool,
}

impl Part {
    /// The whole model.
    pub fn whole(config: &ModelConfig) -> Part {
        Part {
            layers: 0..config.num_hidden_layers,
            embeds: true,
            head: true,
            tensor_rank: 0,
            tensor_size: 1,
            slice: false,
            by_expert: false,
        }
    }

    /// True when this rank needs the weight at all.
    pub(crate) fn needs(&self, spec: &WeightSpec, config: &ModelConfig) -> bool {
        match (spec.kind, spec.layer) {
            _ if spec.read == Read::Never => false,
            (_, Some(layer)) => self.layers.contains(&layer),
            (ModuleKind::Embed, None) => self.embeds || (self.head && config.tie_word_embeddings),
            (_, None) => self.head,
        }
    }
}

/// Which slices of the layers a rank holds. `None`: all of it, on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Division {
    /// What was asked for.
    pub part: Part,
    n_heads: usize,
    n_kv_heads: usize,
    heads: Option<Range<usize>>,
    dense: Option<Range<usize>>,
    shared: Option<Range<usize>>,
    experts: Option<Experts>,
    n_experts: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Experts {
    /// A slice of every expert.
    Width(Range<usize>),
    /// Some experts whole.
    Whole(Range<usize>),
}

/// What a rank holds of one weight.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cut {
    Whole,
    Range(Axis, Range<usize>),
    /// A term that another rank adds.
    Zeros,
}

impl Division {
    /// Works out the slices.
    pub fn new(part: &Part, config: &ModelConfig, weights: &[Weight]) -> Division {
        let moe = config.moe.as_ref();
        let n_experts = moe.map_or(0, |m| m.n_routed_experts);
        let mut division = Division {
            part: part.clone(),
            n_heads: config.num_attention_heads,
            n_kv_heads: config.num_key_value_heads,
            heads: None,
            dense: None,
            shared: None,
            experts: None,
            n_experts,
        };
        if part.tensor_size == 1 {
            return division;
        }
        if part.slice {
            // Query heads that share a key head stay together.
            let has_kv = weights.iter().any(|w| matches!(w.spec.split, Split::KvHeads(_)));
            let group = if has_kv { config.num_attention_heads / config.num_key_value_heads.max(1) } else { 1 };
            let n_heads = config.num_attention_heads;
            let unit = weights.iter().fold(group, |unit, w| match w.spec.split {
                Split::Heads(axis) => lcm(unit, unit_of(w, axis, length(&w.spec, axis) / n_heads)),
                Split::KvHeads(axis) => {
                    lcm(unit, group * unit_of(w, axis, length(&w.spec, axis) / config.num_key_value_heads.max(1)))
                }
                _ => unit,
            });
            division.heads = part.range(n_heads, unit);
            let width = |kind: ModuleKind, n: usize| part.range(n, width_unit(weights, kind));
            division.dense = width(ModuleKind::DenseMlp, config.intermediate_size);
            if let Some(moe) = moe {
                let shared = moe.moe_intermediate_size * moe.n_shared_experts;
                division.shared = width(ModuleKind::SharedExpert, shared);
                if !part.by_expert {
                    let range = width(ModuleKind::RoutedExperts, moe.moe_intermediate_size);
                    division.experts = range.map(Experts::Width);
                }
            }
        }
        if division.experts.is_none() {
            division.experts = part.range(n_experts, 1).map(Experts::Whole);
        }
        division
    }

    /// The configuration as this rank's slices have it.
    pub fn config(&self, config: &ModelConfig) -> ModelConfig {
        let mut local = config.clone();
        if let Some(heads) = &self.heads {
            local.num_attention_heads = heads.len();
            local.num_key_value_heads = (heads.len() * self.n_kv_heads / self.n_heads).max(1);
        }
        if let Some(moe) = &mut local.moe
            && self.part.tensor_size > 1
            && self.shared.is_none()
            && self.part.tensor_rank > 0
        {
            moe.n_shared_experts = 0;
        }
        local
    }

    /// Routed experts that this rank holds.
    pub(crate) fn held_experts(&self) -> Range<usize> {
        match &self.experts {
            Some(Experts::Whole(range)) => range.clone(),
            _ => 0..self.n_experts,
        }
    }

    /// True when each rank computes a part of what a module of this kind adds to the residual stream.
    fn is_summed(&self, kind: ModuleKind) -> bool {
        match kind {
            ModuleKind::Attention => self.heads.is_some(),
            ModuleKind::DenseMlp => self.dense.is_some(),
            // The shared expert is added on one rank only where it is not sliced.
            ModuleKind::RoutedExperts => self.part.tensor_size > 1,
            _ => false,
        }
    }

    fn cut(&self, spec: &WeightSpec) -> Cut {
        let slice = |range: &Option<Range<usize>>, axis: Axis| match range {
            Some(range) => Cut::Range(axis, range.clone()),
            None => Cut::Whole,
        };
        let not_first = self.part.tensor_rank > 0;
        match (spec.split, spec.kind) {
            (Split::Whole, _) => Cut::Whole,
            (Split::Once, _) if not_first && self.heads.is_some() => Cut::Zeros,
            (Split::Once, _) => Cut::Whole,
            (Split::Heads(axis), _) | (Split::KvHeads(axis), _) => {
                // Lengths of the axis per query head; key heads are shared by a whole number of them.
                let per_head = |head: usize| head * length(spec, axis) / self.n_heads;
                let range = self.heads.as_ref().map(|h| per_head(h.start)..per_head(h.end));
                slice(&range, axis)
            }
            (Split::Width(axis), ModuleKind::RoutedExperts) => match &self.experts {
                Some(Experts::Width(range)) => Cut::Range(axis, range.clone()),
                Some(Experts::Whole(range)) => Cut::Range(Axis::Stack, range.clone()),
                None => Cut::Whole,
            },
            (Split::Width(axis), ModuleKind::SharedExpert) => match &self.shared {
                None if not_first => Cut::Zeros,
                range => slice(range, axis),
            },
            (Split::Width(axis), _) => slice(&self.dense, axis),
        }
    }

    /// Bytes that this rank holds of a weight.
    pub fn bytes(&self, weight: &Weight, config: &ModelConfig) -> u64 {
        if !self.part.needs(&weight.spec, config) {
            return 0;
        }
        let (stack, rows, cols) = weight.spec.dims();
        let bytes = match self.cut(&weight.spec) {
            Cut::Whole => stack * weight.dtype.total_bytes(rows, cols),
            Cut::Zeros => 0,
            Cut::Range(Axis::Stack, range) => range.len() * weight.dtype.total_bytes(rows, cols),
            Cut::Range(Axis::Rows, range) => stack * weight.dtype.total_bytes(range.len(), cols),
            Cut::Range(Axis::Cols, range) => stack * weight.dtype.total_bytes(rows, range.len()),
        };
        bytes as u64
    }

    /// What of the layers is on every rank, in words; empty when everything divides.
    pub fn replicated(&self) -> Vec<&'static str> {
        let mut names = vec![];
        if self.part.tensor_size > 1 {
            let dense_layers = self.part.layers.clone().next().is_some();
            for (name, whole) in [
                ("attention", self.heads.is_none()),
                ("dense MLPs", self.dense.is_none() && dense_layers),
                ("the shared expert (added once)", self.shared.is_none() && self.n_experts > 0),
            ] {
                if whole {
                    names.push(name);
                }
            }
        }
        names
    }
}

impl Part {
    /// This rank's part of `n` things that come in units, or `None` when there are fewer units than ranks.
    fn range(&self, n: usize, unit: usize) -> Option<Range<usize>> {
        let n_units = n.div_ceil(unit.max(1));
        let at = |rank: usize| (n_units * rank / self.tensor_size * unit).min(n);
        (n_units >= self.tensor_size).then(|| at(self.tensor_rank)..at(self.tensor_rank + 1))
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn lcm(a: usize, b: usize) -> usize {
    a / gcd(a, b).max(1) * b
}

fn length(spec: &WeightSpec, axis: Axis) -> usize {
    let (stack, rows, cols) = spec.dims();
    match axis {
        Axis::Stack => stack,
        Axis::Rows => rows,
        Axis::Cols => cols,
    }
}

/// Things of `size` elements along `axis` that a cut must keep together, so that no quantisation group is split.
fn unit_of(weight: &Weight, axis: Axis, size: usize) -> usize {
    let together = match (axis, weight.dtype) {
        (Axis::Cols, dtype) => dtype.group_size(),
        (Axis::Rows, DType::Fp8Block) => FP8_BLOCK,
        _ => 1,
    };
    together / gcd(together, size).max(1)
}

fn width_unit(weights: &[Weight], kind: ModuleKind) -> usize {
    weights.iter().filter(|w| w.spec.kind == kind).fold(1, |unit, w| match w.spec.split {
        Split::Width(axis) => lcm(unit, unit_of(w, axis, 1)),
        _ => unit,
    })
}

/// Cuts a rank's slices out of a whole model's weights.
pub struct PartWeights<'a> {
    source: &'a dyn WeightSource,
    specs: HashMap<String, WeightSpec>,
    division: Division,
}

impl<'a> PartWeights<'a> {
    /// The weights that `division` leaves of `source`, whose table is `weights`.
    pub fn new(source: &'a dyn WeightSource, weights: &[Weight], division: Division) -> Self {
        let name = |w: &Weight| format!("{}.{}", w.spec.module, w.spec.leaf);
        let specs = weights.iter().map(|w| (name(w), w.spec.clone())).collect();
        PartWeights { source, specs, division }
    }

    fn cut(&self, module: &str, leaf: &str) -> Cut {
        self.specs.get(&format!("{module}.{leaf}")).map_or(Cut::Whole, |spec| self.division.cut(spec))
    }
}

impl WeightSource for PartWeights<'_> {
    fn matrix(&self, module: &str) -> Result<MatrixData, CheckpointError> {
        let data = self.source.matrix(module)?;
        Ok(match self.cut(module, "weight") {
            Cut::Range(Axis::Cols, range) => {
                // Copied: the file's own pages are not needed any more.
                let whole = data.parts.clone();
                let cut = data.cut(Axis::Cols, range);
                self.source.release(&whole);
                cut
            }
            Cut::Range(axis, range) => data.cut(axis, range),
            // Only terms of sums can be zeros, and those are vectors or not loaded.
            Cut::Whole | Cut::Zeros => data,
        })
    }

    fn release(&self, parts: &[MatrixPart]) {
        self.source.release(parts);
    }

    fn vector(&self, module: &str, leaf: &str) -> Result<Vec<f32>, CheckpointError> {
        let mut values = self.source.vector(module, leaf)?;
        match self.cut(module, leaf) {
            Cut::Range(_, range) => values = values[range].to_vec(),
            Cut::Zeros => values.fill(0.0),
            Cut::Whole => {}
        }
        Ok(values)
    }
}

/// A rank's part as a model sees it: its slices, and the ranks to add up with.
pub struct Share<B: Backend> {
    /// Slices.
    pub division: Division,
    /// The ranks that share these layers, if there are others.
    pub group: Option<Arc<dyn TensorGroup<B>>>,
}

impl<B: Backend> Share<B> {
    /// The whole model.
    pub fn whole(config: &ModelConfig) -> Share<B> {
        Share { division: Division::new(&Part::whole(config), config, &[]), group: None }
    }

    pub(crate) fn part(&self) -> &Part {
        &self.division.part
    }

    /// Before layer `idx` of this part.
    pub(crate) fn begin_layer(&self, backend: &B, idx: usize, hidden: &B::Buffer, n_rows: usize) {
        if let Some(group) = &self.group {
            group.begin_layer(backend, self.part().layers.start + idx, hidden, n_rows);
        }
    }

    /// Adds up `x`, which a module of this kind computed, over the ranks that have parts of it.
    pub(crate) fn all_reduce(&self, backend: &B, kind: ModuleKind, x: &mut B::Buffer, n_rows: usize) {
        if let (true, Some(group)) = (self.division.is_summed(kind), &self.group) {
            let module = if kind == ModuleKind::Attention { "attention" } else { "the MLP" };
            group.all_reduce(backend, x, n_rows, module);
        }
    }
}
