//! How a model is divided among ranks.

use clap::{Args, ValueEnum};
use tandem_runtime::ParallelOptions;
use tandem_runtime::options::TransportKind;

use super::values::{number, whole};

/// How a model is divided among ranks.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Several ranks")]
pub(crate) struct ParallelArgs {
    /// Ranks; on this machine, unless `tandem launch` has a hostfile.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096))]
    pub(crate) ranks: Option<usize>,
    /// Pipeline stages: each rank holds some layers.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096), hide_short_help = true)]
    pub(crate) pp: Option<usize>,
    /// Tensor parallelism: each rank holds a slice of every head group and MLP.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096), hide_short_help = true)]
    pub(crate) tp: Option<usize>,
    /// Expert parallelism: each rank holds some of the experts.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 4096), hide_short_help = true)]
    pub(crate) ep: Option<usize>,
    /// Let measured bandwidth and memory choose; the default when none of --pp, --tp, --ep is given.
    #[arg(long, value_enum, conflicts_with_all = ["pp", "tp", "ep"], hide_short_help = true)]
    pub(crate) plan: Option<PlanArg>,
    /// How ranks talk to each other.
    #[arg(long, value_enum, default_value_t = TransportArg::Auto, hide_short_help = true)]
    pub(crate) transport: TransportArg,
    /// Seconds after which a rank that does not answer is taken for dead (10 if not given).
    #[arg(long, value_name = "SECONDS", value_parser = number::<f64>(), hide_short_help = true)]
    pub(crate) deadline: Option<f64>,
    /// Send sums of tensor-parallel ranks as bf16: half the traffic, less exact.
    #[arg(long, hide_short_help = true)]
    pub(crate) wire_bf16: bool,
    /// Encrypt what ranks send to each other over TCP, for networks that you do not trust.
    #[arg(long, hide_short_help = true)]
    pub(crate) encrypt: bool,
}

impl From<&ParallelArgs> for ParallelOptions {
    fn from(args: &ParallelArgs) -> ParallelOptions {
        ParallelOptions {
            ranks: args.ranks,
            pp: args.pp,
            tp: args.tp,
            ep: args.ep,
            transport: args.transport.into(),
            deadline: args.deadline,
            wire_bf16: args.wire_bf16,
            encrypt: args.encrypt,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlanArg {
    /// The fastest division that fits.
    #[default]
    Auto,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportArg {
    /// TCP.
    #[default]
    Auto,
    /// Threads of one process.
    Local,
    /// Built in; nothing to install.
    #[value(alias = "ring")]
    Tcp,
    /// An installed Open MPI or MPICH.
    Mpi,
    /// TCP, and a GPU of this host for each rank: their sums are made on the devices.
    Nccl,
}

impl From<TransportArg> for TransportKind {
    fn from(arg: TransportArg) -> TransportKind {
        match arg {
            TransportArg::Auto => TransportKind::Auto,
            TransportArg::Local => TransportKind::Local,
            TransportArg::Tcp => TransportKind::Tcp,
            TransportArg::Mpi => TransportKind::Mpi,
            TransportArg::Nccl => TransportKind::Nccl,
        }
    }
}
