//! `tandem doctor` and `tandem explain`.

use std::path::PathBuf;

use clap::Args;
use tandem_cpu::Isa;
use tandem_runtime::DeviceOptions;
use tandem_runtime::diagnosis::DoctorOptions;

use super::model::BackendArg;
use super::values::whole;

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Address of a running server, such as http://127.0.0.1:8000; the last run of this user if not given.
    #[arg(value_name = "URL")]
    pub(crate) url: Option<String>,
    /// File whose first line is the server's API key.
    #[arg(long, value_name = "FILE", requires = "url")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Write a page with charts, which needs nothing else.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) report: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Model directory, or a Hugging Face id, to check and to predict the speed of.
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Hosts of ranks, as `tandem launch` has them.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) hostfile: Option<PathBuf>,
    /// Threads that would compute; one per core if not given.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1024))]
    pub(crate) threads: Option<usize>,
    /// Kernels of the processor: scalar, avx2, avx512, amx or neon; the best that it has if not given.
    #[arg(long, value_name = "ISA")]
    pub(crate) isa: Option<Isa>,
    /// Device that would run it.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl From<&DoctorArgs> for DoctorOptions {
    fn from(args: &DoctorArgs) -> DoctorOptions {
        DoctorOptions {
            model: args.model.clone(),
            hostfile: args.hostfile.clone(),
            device: DeviceOptions {
                backend: args.backend.into(),
                threads: args.threads,
                isa: args.isa,
                ..DeviceOptions::default()
            },
            program: None,
        }
    }
}
