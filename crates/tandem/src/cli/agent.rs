//! `tandem agent`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use tandem_agent::Client;

use super::values::{tokens, whole};

#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// The coding agent to start.
    #[arg(value_enum)]
    pub(crate) client: ClientArg,
    /// Address of a running server. If not given, the one at --port, or one that is started for this run.
    #[arg(long, value_name = "URL", conflicts_with = "port")]
    pub(crate) url: Option<String>,
    /// Port of this machine where a server is looked for.
    #[arg(long, value_name = "N", default_value_t = 8000, value_parser = whole::<u16>(1, 65535))]
    pub(crate) port: u16,
    /// File whose first line is the server's API key.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Name of the model, or its directory or Hugging Face id for a server that is started; the server's first one if not
    /// given.
    #[arg(long, value_name = "NAME|DIR|ID")]
    pub(crate) model: Option<String>,
    /// Tokens of context of a server that is started, such as 64k.
    #[arg(long, value_name = "N", value_parser = tokens(1, 268435456))]
    pub(crate) context: Option<usize>,
    /// Arguments for the agent, after --.
    #[arg(last = true)]
    pub(crate) arguments: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ClientArg {
    /// Anthropic's Claude Code.
    Claude,
    /// OpenAI's Codex.
    Codex,
    /// OpenCode.
    Opencode,
}

impl From<ClientArg> for Client {
    fn from(arg: ClientArg) -> Client {
        match arg {
            ClientArg::Claude => Client::Claude,
            ClientArg::Codex => Client::Codex,
            ClientArg::Opencode => Client::OpenCode,
        }
    }
}
