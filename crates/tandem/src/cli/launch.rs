//! `tandem launch`.

use std::path::PathBuf;

use clap::Args;
use tandem_runtime::ParallelOptions;

use super::parallel::{ParallelArgs, TransportArg};
use super::values::{real, whole};

#[derive(Clone, Debug, Args)]
pub(crate) struct LaunchArgs {
    /// Hosts as mlx.launch has them: [{"ssh": "name", "ips": ["10.0.0.1"]}, ...]. "localhost" starts a process here.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) hostfile: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
    /// The same as --transport, as mlx.launch spells it: ring is tcp.
    #[arg(long, value_enum, value_name = "TRANSPORT", conflicts_with = "transport", hide = true)]
    pub(crate) backend: Option<TransportArg>,
    /// Start all ranks again after a failure, at most N times.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole::<u32>(0, 1048576))]
    pub(crate) restart: u32,
    /// Rank r listens on this port plus r; any free port if 0.
    #[arg(long, value_name = "PORT", default_value_t = 0, value_parser = whole::<u16>(0, 65535))]
    pub(crate) starting_port: u16,
    /// Seconds for all ranks to start and meet.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = real::<f64>(0.1, 86400.0))]
    pub(crate) start_timeout: f64,
    /// This program on the other hosts; the same path as here if not given.
    #[arg(long, value_name = "PATH")]
    pub(crate) remote_binary: Option<PathBuf>,
    /// The model's directory on the other hosts; as in the command if not given.
    #[arg(long, value_name = "DIR")]
    pub(crate) remote_model: Option<String>,
    /// Option for ssh, as after its -o; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) ssh_option: Vec<String>,
    /// MPI's launcher.
    #[arg(long, value_name = "PROGRAM", default_value = "mpirun")]
    pub(crate) mpirun: PathBuf,
    /// The command: run, eval, bench ... with its flags.
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

#[cfg_attr(not(unix), allow(dead_code))]
impl LaunchArgs {
    /// `--ranks N` of a command, without a launch.
    pub(crate) fn short_form(command: Vec<String>) -> LaunchArgs {
        LaunchArgs {
            hostfile: None,
            parallel: ParallelArgs::default(),
            backend: None,
            restart: 0,
            starting_port: 0,
            start_timeout: 60.0,
            remote_binary: None,
            remote_model: None,
            ssh_option: vec![],
            mpirun: PathBuf::new(),
            command,
        }
    }

    /// The flags, --backend counted in.
    pub(crate) fn parallel(&self) -> ParallelOptions {
        let transport = self.backend.unwrap_or(self.parallel.transport).into();
        ParallelOptions { transport, ..(&self.parallel).into() }
    }
}
