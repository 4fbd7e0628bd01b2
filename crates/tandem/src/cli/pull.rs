//! `tandem pull`.

use clap::Args;

#[derive(Clone, Debug, Args)]
pub(crate) struct PullArgs {
    /// Hugging Face id, owner/name. HF_TOKEN, or the token of `hf auth login`, is sent along; HF_ENDPOINT names another
    /// server; HF_HUB_CACHE or HF_HOME another cache.
    pub(crate) repo: String,
    /// Branch, tag or commit.
    #[arg(long, value_name = "NAME", default_value = "main")]
    pub(crate) revision: String,
    /// Get files of this name too, * standing for anything, such as *.gguf; may be given several times. Weights
    /// (safetensors), JSON, tokenizers and chat templates are got in any case, pickles in none.
    #[arg(long, value_name = "GLOB")]
    pub(crate) include: Vec<String>,
    /// Get the configuration, the index and the tokenizer only, for `inspect` and `bench --load-format dummy`.
    #[arg(long)]
    pub(crate) metadata: bool,
    /// Of the weights get only the files that hold the multi-token-prediction layer, for `--mtp` of other commands and
    /// `convert --mtp-only`: many quantised checkpoints have left it out, the original has it.
    #[arg(long, conflicts_with = "metadata")]
    pub(crate) mtp: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
