//! `tandem inspect`.

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Model directory, or a Hugging Face id, of which only the metadata is got. The bundled fable-30m if not given.
    #[arg(value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
