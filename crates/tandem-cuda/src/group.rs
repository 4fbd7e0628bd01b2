//! Sums over the GPUs of one host, a process each: by kernels/all_reduce.cu, which writes into buffers that the others have
//! mapped, or by NCCL where sums are long or the GPUs cannot reach each other's memory.

use std::sync::Arc;

use tandem_core::EXACT_ROWS;
use tandem_core::backend::TensorGroup;

use crate::args::ReduceArgs;
use crate::driver::{Device, Memory, PeerMemory, Pinned};
use crate::nccl::{Communicator, UniqueId};
use crate::preamble::MAX_RANKS;
use crate::{CudaBackend, CudaBuffer, CudaError};

/// Elements of one sum by the kernel; longer ones are made in pieces. 64 rows of 6144.
const PIECE: usize = 64 * 6144;
/// Elements from which on NCCL is faster, where a sum need not have the same bits in any batch, as its order is NCCL's own.
const LONG: usize = 1 << 16;
/// 8 bytes of data are sent in 16.
const PACKET_ELEMENTS: usize = 2;
const PACKET_BYTES: usize = 16;
/// The widest row that the norm adds up.
const NORM_WIDTH: usize = 8192;

/// What another process needs to map a buffer.
pub type Handle = [u8; 64];

/// This rank's buffer, before the others are known.
pub struct GroupBuffer {
    device: Arc<Device>,
    buffer: Memory,
    n_ranks: usize,
}

/// The ranks that add up what they compute.
pub struct CudaGroup {
    device: Arc<Device>,
    /// If the GPUs reach each other's memory.
    peers: Option<Peers>,
    nccl: Option<Communicator>,
}

/// Buffers that the ranks write to.
pub struct Peers {
    /// Kept mapped for as long as graphs refer to it.
    _mapped: Vec<PeerMemory>,
    _memory: [Memory; 2],
    failed: Pinned,
    args: ReduceArgs,
}

/// What makes a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The kernel.
    Peers,
    /// NCCL.
    Nccl,
}

impl GroupBuffer {
    /// A buffer for sums over `n_ranks`, and its handle for the other ranks.
    ///
    /// # Errors
    /// Too many ranks, or the device cannot share memory with other processes.
    pub fn new(backend: &CudaBackend, n_ranks: usize) -> Result<(GroupBuffer, Handle), CudaError> {
        if n_ranks > MAX_RANKS {
            return Err(CudaError::Ranks(n_ranks));
        }
        let device = backend.device();
        let buffer = device.alloc(2 * n_ranks * capacity() * PACKET_BYTES);
        device.sync()?;
        let handle = device.share(&buffer)?;
        Ok((GroupBuffer { device, buffer, n_ranks }, handle))
    }

    /// Maps the buffers of the others, `handles` by rank; this one is `rank`.
    ///
    /// # Errors
    /// The GPUs cannot reach each other's memory.
    pub fn connect(self, rank: usize, handles: &[Handle]) -> Result<Peers, CudaError> {
        let GroupBuffer { device, buffer, n_ranks } = self;
        let state = device.alloc(16);
        let mut failed = device.pinned(4).ok_or_else(|| device.sync().err().unwrap_or(CudaError::Ranks(n_ranks)))?;
        failed.bytes_mut().fill(0);
        let mut args = ReduceArgs {
            buffers: [0; MAX_RANKS],
            state: state.pointer(),
            failed: failed.address(),
            n_ranks: n_ranks as u32,
            rank: rank as u32,
            capacity: capacity() as u32,
            unused: 0,
        };
        let mut mapped = vec![];
        for (r, handle) in handles.iter().enumerate() {
            args.buffers[r] = buffer.pointer();
            if r != rank {
                let peer = device.map(handle)?;
                args.buffers[r] = peer.pointer();
                mapped.push(peer);
            }
        }
        device.sync()?;
        Ok(Peers { _mapped: mapped, _memory: [buffer, state], failed, args })
    }
}

/// Packets of one sum.
fn capacity() -> usize {
    PIECE / PACKET_ELEMENTS
}

impl CudaGroup {
    /// Ranks that sum through `peers`, if they are there; with an id of NCCL, which all ranks must have then, through it too.
    ///
    /// # Errors
    /// There is neither, or NCCL fails.
    pub fn new(
        backend: &CudaBackend,
        peers: Option<Peers>,
        nccl: Option<&UniqueId>,
        rank: usize,
        n_ranks: usize,
    ) -> Result<CudaGroup, CudaError> {
        let device = backend.device();
        let nccl = nccl.map(|id| Communicator::new(&device, id, rank, n_ranks)).transpose()?;
        if peers.is_none() && nccl.is_none() {
            return Err(CudaError::NoNccl);
        }
        Ok(CudaGroup { device, peers, nccl })
    }

    /// True once a rank did not send its part in time; what was computed since is of no use.
    pub fn has_failed(&self) -> bool {
        self.peers.as_ref().is_some_and(|p| p.failed.word(0) != 0)
            || self.nccl.as_ref().is_some_and(Communicator::has_failed)
    }

    /// Seconds of one sum of `elements` within a graph of `n` of them, if this `way` is there; every rank measures at the
    /// same time.
    ///
    /// # Errors
    /// The device failed.
    pub fn measure(&self, elements: usize, n: usize, way: Way) -> Result<Option<f64>, CudaError> {
        let there = if way == Way::Peers { self.peers.is_some() } else { self.nccl.is_some() };
        if !there {
            return Ok(None);
        }
        let x = CudaBuffer::new(&self.device, 1, elements.next_multiple_of(8));
        let sums = |n: usize| (0..n).for_each(|_| self.run(&x, 1, Some(way)));
        // NCCL connects for a kind of sum when it is first made.
        sums(1);
        let graph = self.device.capture(|| sums(n));
        self.device.sync()?;
        let seconds = graph.map_or(0.0, |graph| {
            self.device.replay(&graph);
            let seconds = self.device.time(|| self.device.replay(&graph));
            seconds / n as f64
        });
        self.device.sync()?;
        Ok(Some(seconds))
    }

    /// Enqueues the sum; `way` is chosen by its length if none is asked for.
    fn run(&self, x: &CudaBuffer, n_rows: usize, way: Option<Way>) {
        x.written();
        let total = n_rows * x.width();
        assert!(total.is_multiple_of(8), "sums over GPUs of rows of a multiple of 8 elements");
        let long = n_rows > EXACT_ROWS && total > LONG;
        let by_nccl = way.map_or(long || self.peers.is_none(), |way| way == Way::Nccl);
        match (&self.peers, &self.nccl) {
            (_, Some(nccl)) if by_nccl => nccl.all_reduce(&self.device, x.pointer(), total),
            (Some(peers), _) => {
                for first in (0..total).step_by(PIECE) {
                    let n = (PIECE.min(total - first) / 8) as u32;
                    let (args, to) = (peers.args, x.pointer() + (first * 4) as u64);
                    let blocks = (n as usize).div_ceil(256);
                    self.device.launch("all_reduce", (blocks, 1, 1), 256, 0, &mut args![args, to, n]);
                }
            }
            _ => {}
        }
    }
}

impl TensorGroup<CudaBackend> for CudaGroup {
    fn begin_layer(&self, _backend: &CudaBackend, _layer: usize, _hidden: &CudaBuffer, _n_rows: usize) {}

    fn all_reduce(&self, backend: &CudaBackend, x: &mut CudaBuffer, n_rows: usize, _part: &'static str) {
        // The norm that follows can add up on its way.
        match &self.peers {
            Some(peers) if n_rows <= EXACT_ROWS && x.width() <= NORM_WIDTH && x.width().is_multiple_of(8) => {
                backend.expect_sum(peers.args, x);
            }
            _ => self.run(x, n_rows, None),
        }
    }
}
