//! `tandem agent`: a coding agent on this server, or another.

use std::path::Path;
use std::process::ExitCode;

use tandem_serve::read_keys;

use crate::cli::AgentArgs;
use crate::report::plain;

/// Runs the command.
pub(crate) fn agent(args: AgentArgs, config_file: Option<&Path>) -> anyhow::Result<ExitCode> {
    let mut server = vec![std::env::current_exe()?.into_os_string(), "serve".into()];
    if let Some(file) = config_file {
        server.extend(["--config-file".into(), file.into()]);
    }
    let options = tandem_agent::Options {
        client: args.client.into(),
        arguments: args.arguments,
        url: args.url,
        port: args.port,
        api_key: args.api_key_file.as_deref().map(read_keys).transpose()?.map(|keys| keys[0].clone()),
        model: args.model,
        context: args.context,
        server,
    };
    Ok(tandem_agent::run(&options, &mut |line| eprintln!("{}", plain(line)))?.into())
}
