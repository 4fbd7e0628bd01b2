//! Sums over the GPUs of one host (kernels/all_reduce.cu): a process a GPU, whose buffers the others have mapped.

use std::sync::Arc;

use tandem_core::backend::TensorGroup;

use crate::args::{MAX_RANKS, ReduceArgs};
use crate::driver::{Device, Memory, PeerMemory, Pinned};
use crate::{CudaBackend, CudaBuffer, CudaError};

/// Elements of one sum, at most; longer ones are made in pieces. 64 rows of 6144.
const PIECE: usize = 64 * 6144;
/// 8 bytes of data are sent in 16.
const PACKET_ELEMENTS: usize = 2;
const PACKET_BYTES: usize = 16;
/// Rows of which sums wait for the norm that follows; the widest that it takes, and threads of its block.
const NORM_ROWS: usize = 64;
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
    /// Kept mapped for as long as graphs refer to it.
    _peers: Vec<PeerMemory>,
    _memory: [Memory; 2],
    failed: Pinned,
    args: ReduceArgs,
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
    pub fn connect(self, rank: usize, handles: &[Handle]) -> Result<CudaGroup, CudaError> {
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
        let mut peers = vec![];
        for (r, handle) in handles.iter().enumerate() {
            args.buffers[r] = buffer.pointer();
            if r != rank {
                let peer = device.map(handle)?;
                args.buffers[r] = peer.pointer();
                peers.push(peer);
            }
        }
        device.sync()?;
        Ok(CudaGroup { device, _peers: peers, _memory: [buffer, state], failed, args })
    }
}

/// Packets of one sum.
fn capacity() -> usize {
    PIECE / PACKET_ELEMENTS
}

impl CudaGroup {
    /// True once a rank did not send its part in time; what was computed since is of no use.
    pub fn has_failed(&self) -> bool {
        self.failed.word(0) != 0
    }

    /// Seconds of one sum of `elements` within a graph of `n` of them; every rank measures at the same time.
    ///
    /// # Errors
    /// The device failed.
    pub fn measure(&self, elements: usize, n: usize) -> Result<f64, CudaError> {
        let x = CudaBuffer::new(&self.device, 1, elements.next_multiple_of(8));
        let graph = self.device.capture(|| (0..n).for_each(|_| self.run(&x, 1)));
        self.device.sync()?;
        let seconds = graph.map_or(0.0, |graph| {
            self.device.replay(&graph);
            let seconds = self.device.time(|| self.device.replay(&graph));
            seconds / n as f64
        });
        self.device.sync()?;
        Ok(seconds)
    }

    pub(crate) fn args(&self) -> ReduceArgs {
        self.args
    }

    /// Enqueues the sum.
    pub(crate) fn run(&self, x: &CudaBuffer, n_rows: usize) {
        x.written();
        let total = n_rows * x.width();
        assert!(total.is_multiple_of(8), "sums over GPUs of rows of a multiple of 8 elements");
        for first in (0..total).step_by(PIECE) {
            let n = (PIECE.min(total - first) / 8) as u32;
            let (args, to) = (self.args, x.pointer() + (first * 4) as u64);
            self.device.launch("all_reduce", ((n as usize).div_ceil(256), 1, 1), 256, 0, &mut args![args, to, n]);
        }
    }
}

impl TensorGroup<CudaBackend> for CudaGroup {
    fn begin_layer(&self, _backend: &CudaBackend, _layer: usize, _hidden: &CudaBuffer, _n_rows: usize) {}

    fn all_reduce(&self, backend: &CudaBackend, x: &mut CudaBuffer, n_rows: usize, _part: &'static str) {
        // The norm that follows can add up on its way.
        if n_rows <= NORM_ROWS && x.width() <= NORM_WIDTH && x.width().is_multiple_of(8) {
            backend.expect_sum(self.args(), x);
        } else {
            self.run(x, n_rows);
        }
    }
}
