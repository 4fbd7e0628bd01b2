//! Models without a checkpoint.

use clap::{Args, ValueEnum};
use tandem_runtime::options::ShapeOptions;

use super::values::whole;

/// A model without a checkpoint.
#[derive(Debug, Args)]
pub(crate) struct ShapeArgs {
    /// Shapes of a model without a checkpoint: glm-5.1, deepseek-v3.2, llama-3.2-3b or a config.json.
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) config: Option<String>,
    /// Read weights from the checkpoint, or make random ones.
    #[arg(long, value_enum, default_value_t = LoadFormatArg::Checkpoint)]
    pub(crate) load_format: LoadFormatArg,
    /// Layers, with random weights.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096))]
    pub(crate) num_layers: Option<usize>,
    /// Leading layers without experts, with random weights.
    #[arg(long, value_name = "K", value_parser = whole::<usize>(0, 4096))]
    pub(crate) first_dense: Option<usize>,
    /// Vocabulary size, with random weights.
    #[arg(long, value_name = "V", value_parser = whole::<usize>(1, 16777216))]
    pub(crate) vocab: Option<usize>,
}

impl From<&ShapeArgs> for ShapeOptions {
    fn from(args: &ShapeArgs) -> ShapeOptions {
        ShapeOptions {
            config: args.config.clone(),
            dummy: args.load_format == LoadFormatArg::Dummy,
            num_layers: args.num_layers,
            first_dense: args.first_dense,
            vocab: args.vocab,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadFormatArg {
    /// The weights of the checkpoint.
    Checkpoint,
    /// Random weights of true shapes and formats.
    Dummy,
}
