//! How a model is found, loaded and divided: plain values that check themselves, whoever fills them in.

use std::time::Duration;

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};
use tandem_core::ModelConfig;
use tandem_cpu::Isa;
use tandem_engine::DraftDepth;

/// Context when nobody asks for more: the cache of a model made for 200,000 tokens would take tens of gigabytes.
const DEFAULT_CONTEXT: usize = 32768;

/// Which model, and how it runs.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// A model directory, or a Hugging Face id in the local cache; the bundled model if `None`.
    pub model: Option<String>,
    /// Tokens of context; the model's own limit, at most 32768, if `None`.
    pub context: Option<usize>,
    /// Tokens of a prompt that run at once.
    pub prefill_chunk: usize,
    /// Pin the weights in memory.
    pub lock: bool,
    /// Where it runs.
    pub device: DeviceOptions,
    /// How it is divided among ranks.
    pub parallel: ParallelOptions,
    /// Tokens drafted for a sequence in one step. If `None`, as many as pay where the processor computes alone, and
    /// none elsewhere.
    pub draft_depth: Option<DraftDepth>,
    /// Directory or Hugging Face id of the multi-token-prediction layer that drafts; the model's own if `None`.
    pub mtp: Option<String>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions {
            model: None,
            context: None,
            prefill_chunk: 256,
            lock: false,
            device: DeviceOptions::default(),
            parallel: ParallelOptions::default(),
            draft_depth: None,
            mtp: None,
        }
    }
}

impl ModelOptions {
    /// The defaults, for this model.
    pub fn new(model: &str) -> ModelOptions {
        ModelOptions { model: Some(model.to_string()), ..ModelOptions::default() }
    }

    /// Tokens of context for a model.
    ///
    /// # Errors
    /// The model was made for fewer, or none are asked for.
    pub fn context(&self, config: &ModelConfig) -> anyhow::Result<usize> {
        match self.context {
            Some(0) => bail!("--context must be at least 1"),
            Some(n) if n > config.max_position_embeddings => bail!(
                "--context {n} exceeds the {} positions this model was made for; ask for fewer",
                config.max_position_embeddings
            ),
            Some(n) => Ok(n),
            None => Ok(config.max_position_embeddings.min(DEFAULT_CONTEXT)),
        }
    }
}

/// What a loaded model is for.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Logits that one step returns.
    pub logits: crate::LogitsRows,
    /// Tokens that the cache holds; `n_contexts` full sequences if `None`. One sequence fits in any case.
    pub cache_tokens: Option<usize>,
    /// Full sequences that the cache holds.
    pub n_contexts: usize,
}

impl LoadOptions {
    /// For one sequence at a time.
    pub const fn one_sequence(logits: crate::LogitsRows) -> LoadOptions {
        LoadOptions { logits, cache_tokens: None, n_contexts: 1 }
    }
}

/// Where a model runs, and with which numbers.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// The device.
    pub backend: BackendChoice,
    /// The GPU for `wgpu`: its number among those found, or a part of its name; the first if `None`.
    pub device: Option<String>,
    /// Numerics of the activations that meet quantised weights.
    pub activations: Activations,
    /// Threads of the processor; one per core if `None`.
    pub threads: Option<usize>,
    /// Kernels of the processor; the best that it has if `None`.
    pub isa: Option<Isa>,
    /// Load weights that cannot all stay in memory, and read the rest from the disk for every token.
    pub allow_paging: bool,
    /// Layers whose experts stay in the host's memory; as few as let the model fit the GPU if `None`.
    pub n_cpu_moe: Option<usize>,
}

/// A device that somebody asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The best one found.
    #[default]
    Auto,
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// Any GPU, through Vulkan or Metal.
    Wgpu,
}

/// Numerics that somebody asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// The best for the device.
    #[default]
    Auto,
    /// Single precision: the reference.
    F32,
    /// Rounded to bfloat16.
    Bf16,
    /// 8-bit integers per group of 32.
    Int8,
}

/// How ranks talk to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransportKind {
    /// TCP.
    #[default]
    Auto,
    /// Threads of one process.
    Local,
    /// Built in; nothing to install.
    Tcp,
    /// An installed Open MPI or MPICH.
    Mpi,
    /// TCP, and a GPU of this host for each rank: their sums are made on the devices.
    Nccl,
}

impl TransportKind {
    /// As `--transport` has it.
    pub fn name(self) -> &'static str {
        match self {
            TransportKind::Auto => "auto",
            TransportKind::Local => "local",
            TransportKind::Tcp => "tcp",
            TransportKind::Mpi => "mpi",
            TransportKind::Nccl => "nccl",
        }
    }
}

/// How a model is divided among ranks.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ParallelOptions {
    /// Ranks; as many as the division needs if `None`.
    pub ranks: Option<usize>,
    /// Pipeline stages: each rank holds some layers.
    pub pp: Option<usize>,
    /// Tensor parallelism: each rank holds a slice of every head group and MLP.
    pub tp: Option<usize>,
    /// Expert parallelism: each rank holds some of the experts.
    pub ep: Option<usize>,
    /// How ranks talk to each other.
    pub transport: TransportKind,
    /// Seconds after which a rank that does not answer is taken for dead; 10 if `None`.
    pub deadline: Option<f64>,
    /// Send sums of tensor-parallel ranks as bf16: half the traffic, less exact.
    pub wire_bf16: bool,
    /// Encrypt what ranks send to each other over TCP.
    #[serde(default)]
    pub encrypt: bool,
}

impl ParallelOptions {
    /// Ranks asked for.
    ///
    /// # Errors
    /// None, or too many.
    pub fn n_ranks(&self) -> anyhow::Result<usize> {
        let of_plan =
            [self.pp, self.tp.max(self.ep)].iter().try_fold(1usize, |n, part| n.checked_mul(part.unwrap_or(1)));
        let n = self.ranks.or(of_plan).unwrap_or(usize::MAX);
        ensure!(
            (1..=4096).contains(&n),
            "--ranks, --pp, --tp and --ep must be at least 1, and at most 4096 ranks in all"
        );
        Ok(n)
    }

    /// The bound on a wait for another rank.
    ///
    /// # Errors
    /// It is too short or too long.
    pub fn deadline(&self) -> anyhow::Result<Duration> {
        let seconds = self.deadline.unwrap_or(10.0);
        ensure!((0.1..=86_400.0).contains(&seconds), "--deadline must be between 0.1 and 86400 seconds");
        Ok(Duration::from_secs_f64(seconds))
    }

    /// Checks that what ranks send can be encrypted, if it is to be.
    ///
    /// # Errors
    /// It does not go over TCP.
    pub fn check_encryption(&self) -> anyhow::Result<()> {
        let name = self.transport.name();
        match self.transport {
            TransportKind::Mpi | TransportKind::Nccl if self.encrypt => anyhow::bail!(
                "--encrypt reaches what goes over TCP, and --transport {name} sends by other ways; use --transport tcp, or leave \
                 --encrypt out"
            ),
            _ => Ok(()),
        }
    }

    /// The same as flags of a command.
    pub fn flags(&self, n_ranks: usize) -> Vec<String> {
        let transport = self.transport.name().to_string();
        let mut flags = vec!["--transport".to_string(), transport, "--ranks".to_string(), n_ranks.to_string()];
        for (name, value) in [("--pp", self.pp), ("--tp", self.tp), ("--ep", self.ep)] {
            flags.extend(value.into_iter().flat_map(|n| [name.to_string(), n.to_string()]));
        }
        flags.extend(self.deadline.into_iter().flat_map(|s| ["--deadline".to_string(), s.to_string()]));
        flags.extend(self.wire_bf16.then(|| "--wire-bf16".to_string()));
        flags.extend(self.encrypt.then(|| "--encrypt".to_string()));
        flags
    }
}

/// A model without a checkpoint, or with other shapes than its own.
#[derive(Clone, Debug, Default)]
pub struct ShapeOptions {
    /// A preset's name or a config.json.
    pub config: Option<String>,
    /// Random weights of true shapes and formats.
    pub dummy: bool,
    /// Layers.
    pub num_layers: Option<usize>,
    /// Leading layers without experts.
    pub first_dense: Option<usize>,
    /// Vocabulary size.
    pub vocab: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_counted_from_the_division() {
        let options = |pp, tp, ep| ParallelOptions { pp, tp, ep, ..ParallelOptions::default() };
        let cases = [
            (options(None, None, None), Some(1)),
            (options(Some(2), Some(3), None), Some(6)),
            (options(Some(2), None, Some(4)), Some(8)),
            (options(None, Some(2), Some(4)), Some(4)),
            (options(Some(0), None, None), None),
            (options(Some(usize::MAX), Some(2), None), None),
            (ParallelOptions { ranks: Some(0), ..ParallelOptions::default() }, None),
        ];
        for (options, expected) in cases {
            assert_eq!(options.n_ranks().ok(), expected, "{options:?}");
        }
    }
}
