//! `tandem convert`.

use std::path::PathBuf;

use clap::Args;
use tandem_convert::ConvertOptions;

use super::shapes::ShapeArgs;
use super::values::{byte_count, whole};

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Model directory (Hugging Face or MLX), GGUF file, or a Hugging Face id that is in the local cache.
    #[arg(value_name = "SRC", required_unless_present = "config", conflicts_with = "config")]
    pub(crate) source: Option<String>,
    /// Gets the new checkpoint; must not exist. Until it is complete, work is in DIR.partial: the same command goes on
    /// where an interrupted one stopped.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub(crate) out: Option<PathBuf>,
    /// mxfp4-q8 (routed experts mxfp4, the rest affine 8-bit), or one format for all: mxfp4, mxfp8, nvfp4, affine2, 3, 4,
    /// 5, 6, 8 (groups of 64; :g32, :g128), bf16, keep; or mixed-4.8 (affine, 3 to 8 bits for each kind of module, 4.8 a
    /// weight in all), or mixed:FILE, a TOML file of patterns and formats.
    ///
    /// mixed-4.8 runs the source once for each kind of module, and prints the rules that it chose.
    /// Router gates, norms and biases are left alone. FILE: `default = "affine8"`, then under `[rules]` lines such as
    /// `"model.layers.*.mlp.switch_mlp.*" = "mxfp4"`, of which the first that matches a module counts.
    #[arg(long, value_name = "FORMATS", default_value = "mxfp4-q8")]
    pub(crate) quant: String,
    #[command(flatten)]
    pub(crate) shapes: ShapeArgs,
    /// Look for scales and codes with less error than those of mlx, at the same size.
    ///
    /// The source first writes some text of its own (where its weights do not fit in memory, it reads random tokens): errors
    /// then count by what goes into each matrix, and codes make up for the errors of those before them (GPTQ).
    #[arg(long)]
    pub(crate) search: bool,
    /// A text, or JSON with strings, that the source reads instead of text of its own. Implies --search.
    #[arg(long, value_name = "FILE")]
    pub(crate) calibrate: Option<PathBuf>,
    /// Take the tokenizer (and its chat template) of this model directory instead of the GGUF file's own.
    #[arg(long, value_name = "DIR")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Write the multi-token-prediction layer alone, for `--mtp` of a checkpoint that has none. Of SRC only the files that
    /// hold it need to be there, as `pull --mtp` gets them.
    #[arg(long, conflicts_with_all = ["search", "calibrate", "tokenizer"])]
    pub(crate) mtp_only: bool,
    /// Size of one output file, at most, unless a single weight is larger.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = byte_count)]
    pub(crate) max_shard_size: u64,
    /// Threads; one per core if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1024))]
    pub(crate) threads: Option<usize>,
    /// Print what would be written: formats, sizes, bytes read per token.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl From<&ConvertArgs> for ConvertOptions {
    fn from(args: &ConvertArgs) -> ConvertOptions {
        ConvertOptions {
            source: args.source.clone(),
            shapes: (&args.shapes).into(),
            quant: args.quant.clone(),
            search: args.search,
            calibrate: args.calibrate.clone(),
            tokenizer: args.tokenizer.clone(),
            mtp_only: args.mtp_only,
            max_shard_size: args.max_shard_size,
            threads: args.threads,
        }
    }
}
