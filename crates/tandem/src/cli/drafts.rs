//! Tokens that are drafted and verified several at once.

use clap::Args;
use tandem_engine::DraftDepth;
use tandem_runtime::ModelOptions;

/// Tokens that are drafted and verified several at once.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Drafts")]
pub(crate) struct DraftArgs {
    /// Tokens to draft for an answer in one step, 0 (off) to 8.
    ///
    /// The model's multi-token-prediction layer and what the text has said before draft them; the answer stays the same. auto drafts as many as measured times and acceptance say pays, and is
    /// the default where the processor computes alone; on GPUs and among ranks that is 0.
    #[arg(long, value_name = "N|auto")]
    pub(crate) draft_depth: Option<DraftDepth>,
    /// Directory, or Hugging Face id in the local cache, of the multi-token-prediction layer that drafts: a checkpoint of the
    /// same model that still has it. The model's own if not given.
    #[arg(long, value_name = "DIR|ID", hide_short_help = true)]
    pub(crate) mtp: Option<String>,
}

impl DraftArgs {
    /// The options with these drafts.
    pub(crate) fn apply(&self, options: ModelOptions) -> ModelOptions {
        ModelOptions { draft_depth: self.draft_depth, mtp: self.mtp.clone(), ..options }
    }
}
