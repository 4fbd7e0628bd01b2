//! `tandem launch` and `--ranks` on systems where starting and watching ranks has not been written.

use std::process::ExitCode;

use anyhow::bail;
use tandem_runtime::ParallelOptions;

use crate::cli::LaunchArgs;

pub(crate) fn launch(_: &LaunchArgs) -> anyhow::Result<ExitCode> {
    bail!("tandem launch starts ranks on Linux and macOS only; start each rank by itself, with --rank and --peers")
}

pub(crate) fn launch_here(_: usize, _: &ParallelOptions, _: Vec<String>) -> anyhow::Result<ExitCode> {
    bail!("--ranks starts ranks on Linux and macOS only; start each rank by itself, with --rank and --peers")
}
