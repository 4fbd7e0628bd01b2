//! Which model, and how it runs.

use clap::{Args, ValueEnum};
use tandem_engine::DraftDepth;
use tandem_runtime::options::{Activations, BackendChoice};
use tandem_runtime::{DeviceOptions, ModelOptions};

use super::parallel::ParallelArgs;
use super::values::{tokens, whole};

/// Which model, and how it runs.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Model directory, or a Hugging Face id (owner/name). The bundled fable-30m if not given.
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Get a model that is not here from Hugging Face without asking.
    #[arg(long)]
    pub(crate) yes: bool,
    /// Tokens of context, such as 8k; the model's own limit, at most 32768, if not given.
    #[arg(long, alias = "max-context", value_name = "N", value_parser = tokens(0, 268435456))]
    pub(crate) context: Option<usize>,
    /// Threads; one per core if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1024), help_heading = "Hardware")]
    pub(crate) threads: Option<usize>,
    /// Pin the weights in memory, so that the system cannot take it back.
    #[arg(long, help_heading = "Hardware", hide_short_help = true)]
    pub(crate) lock: bool,
    /// Load weights that cannot all stay in memory: most of a token's time goes into reading them from the disk.
    #[arg(long, help_heading = "Hardware", hide_short_help = true)]
    pub(crate) allow_paging: bool,
    /// Tokens of prompt run at once.
    #[arg(long, value_name = "N", default_value = "256", value_parser = tokens(1, 65536), help_heading = "Hardware", hide_short_help = true)]
    pub(crate) prefill_chunk: usize,
    /// Numerics of the activations that meet quantised weights.
    #[arg(long, value_enum, default_value_t = ActivationsArg::Auto, help_heading = "Hardware", hide_short_help = true)]
    pub(crate) activations: ActivationsArg,
    /// Device to run on.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto, help_heading = "Hardware")]
    pub(crate) backend: BackendArg,
    /// The GPU for --backend wgpu: its number in `tandem devices`, or a part of its name; the first one if not given.
    #[arg(long, value_name = "N|NAME", help_heading = "Hardware", hide_short_help = true)]
    pub(crate) device: Option<String>,
    /// Layers whose experts stay in the host's memory and are computed by its processor, for a model that does not fit the
    /// GPU; as few as let it fit if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(0, 4096), help_heading = "Hardware", hide_short_help = true)]
    pub(crate) n_cpu_moe: Option<usize>,
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
}

impl From<&ModelArgs> for ModelOptions {
    fn from(args: &ModelArgs) -> ModelOptions {
        ModelOptions {
            model: args.model.clone(),
            context: args.context,
            prefill_chunk: args.prefill_chunk,
            lock: args.lock,
            device: DeviceOptions {
                backend: args.backend.into(),
                device: args.device.clone(),
                activations: args.activations.into(),
                threads: args.threads,
                isa: None,
                allow_paging: args.allow_paging,
                n_cpu_moe: args.n_cpu_moe,
            },
            parallel: (&args.parallel).into(),
            draft_depth: Some(DraftDepth::OFF),
            mtp: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActivationsArg {
    /// Single precision: the reference.
    F32,
    /// At least as precise as bfloat16; 16-bit integers per group of 32 where these are faster.
    Bf16,
    /// 8-bit integers per group of 32.
    Int8,
    /// The best for this processor.
    Auto,
}

impl From<ActivationsArg> for Activations {
    fn from(arg: ActivationsArg) -> Activations {
        match arg {
            ActivationsArg::F32 => Activations::F32,
            ActivationsArg::Bf16 => Activations::Bf16,
            ActivationsArg::Int8 => Activations::Int8,
            ActivationsArg::Auto => Activations::Auto,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU (Ampere or later).
    Cuda,
    /// Any GPU, through Vulkan or Metal; `tandem devices` lists them.
    Wgpu,
    /// The best device found.
    Auto,
}

impl From<BackendArg> for BackendChoice {
    fn from(arg: BackendArg) -> BackendChoice {
        match arg {
            BackendArg::Cpu => BackendChoice::Cpu,
            BackendArg::Cuda => BackendChoice::Cuda,
            BackendArg::Wgpu => BackendChoice::Wgpu,
            BackendArg::Auto => BackendChoice::Auto,
        }
    }
}
