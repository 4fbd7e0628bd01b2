//! Experts that stay in memory of the host, because they do not fit the device: who computes them, and what goes back and
//! forth.

use std::cell::RefCell;
use std::sync::Arc;

use tandem_core::weights::MatrixData;

use crate::CudaBuffer;
use crate::buffer::CudaIndices;
use crate::driver::{Device, Pinned};

/// Computes experts in memory of the host.
pub trait HostExperts {
    /// Takes a stack of matrices over and returns its number.
    fn load(&self, data: MatrixData) -> usize;
    /// `out = sum_k weights[k] * expert[ids[k]](x)` over ids that are not negative, by gate, up and down of these numbers;
    /// `x` and `out` are `[n_rows, hidden]`, `ids` and `weights` `[n_rows, top_k]`.
    fn moe(&self, mlp: [usize; 3], n_rows: usize, x: &[f32], ids: &[i32], weights: &[f32], out: &mut [f32]);
}

/// Which stacks stay on the host, by name, and what computes them.
pub(crate) struct OnHost {
    pub(crate) keeps: Box<dyn Fn(&str) -> bool>,
    pub(crate) experts: Box<dyn HostExperts>,
    exchange: RefCell<Option<Pinned>>,
}

/// One layer's experts for one step.
#[derive(Clone, Copy)]
pub(crate) struct HostMoe {
    mlp: [usize; 3],
    n_rows: usize,
    hidden: usize,
    top_k: usize,
    /// Where the sum goes on the device.
    sum: u64,
}

impl HostMoe {
    /// Floats of the input, ids, weights and output in pinned memory, in this order.
    fn parts(&self) -> [usize; 4] {
        let (rows, choices) = (self.n_rows * self.hidden, self.n_rows * self.top_k);
        [rows, choices, choices, rows]
    }
}

impl OnHost {
    pub(crate) fn new(keeps: Box<dyn Fn(&str) -> bool>, experts: Box<dyn HostExperts>) -> OnHost {
        OnHost { keeps, experts, exchange: RefCell::default() }
    }

    /// Enqueues the copies that the experts need; the second value is true if their memory moved, so that no graph is valid
    /// any more. The result will be added up at `sum` on the device.
    pub(crate) fn fetch(
        &self,
        device: &Arc<Device>,
        mlp: [usize; 3],
        n_rows: usize,
        (x, ids, weights): (&CudaBuffer, &CudaIndices, &CudaBuffer),
        sum: u64,
    ) -> (HostMoe, bool) {
        let work = HostMoe { mlp, n_rows, hidden: x.width(), top_k: ids.width(), sum };
        let parts = work.parts();
        let bytes = parts.iter().sum::<usize>() * 4;
        let mut exchange = self.exchange.borrow_mut();
        let moved = exchange.as_ref().is_none_or(|pinned| pinned.bytes() < bytes);
        if moved {
            *exchange = device.pinned(bytes);
        }
        if let Some(pinned) = exchange.as_ref() {
            let mut offset = 0;
            for (from, floats) in [x.pointer(), ids.pointer(), weights.pointer()].into_iter().zip(parts) {
                device.fetch_back(pinned, offset, from, floats * 4);
                offset += floats * 4;
            }
        }
        (work, moved)
    }

    /// Waits for the copies, computes, and enqueues the copy of the result.
    pub(crate) fn run(&self, device: &Device, work: &HostMoe) {
        let mut exchange = self.exchange.borrow_mut();
        let Some(pinned) = exchange.as_mut() else { return };
        if !device.wait_for_all() {
            return;
        }
        let [rows, choices, ..] = work.parts();
        let floats: &mut [f32] = bytemuck::cast_slice_mut(pinned.bytes_mut());
        let (x, rest) = floats.split_at_mut(rows);
        let (ids, rest) = rest.split_at_mut(choices);
        let (weights, out) = rest.split_at_mut(choices);
        self.experts.moe(work.mlp, work.n_rows, x, bytemuck::cast_slice(ids), weights, &mut out[..rows]);
        device.fetch(work.sum, pinned, (rows + 2 * choices) * 4, rows * 4);
    }
}
