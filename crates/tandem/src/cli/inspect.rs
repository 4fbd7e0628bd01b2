//! `tandem inspect`.

use clap::Args;
use tandem_text::Dialect;

use super::values::chat_format;

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Model directory, or a Hugging Face id, of which only the metadata is got. The bundled fable-30m if not given.
    #[arg(value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// How prompts are made and answers written, if not as the checkpoint says.
    #[arg(long, value_name = "NAME", value_parser = chat_format())]
    pub(crate) chat_format: Option<Dialect>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
