//! Activations: single precision, with a packed bf16 copy where tensor-core kernels read them.

use std::cell::{Cell, OnceCell};
use std::sync::Arc;

use crate::args::ReduceArgs;
use crate::driver::{Device, Memory};

/// `[rows, width] f32`, and the same rows as packed bf16 (common.cuh, `packed_place`) once a kernel has asked for them.
pub struct CudaBuffer {
    memory: Memory,
    rows: usize,
    width: usize,
    packed: OnceCell<Memory>,
    /// Rows whose packed copy is current.
    packed_rows: Cell<usize>,
    /// A sum over ranks that the next norm or addition of these rows makes (group.rs).
    pub(crate) pending: Cell<Option<ReduceArgs>>,
}

/// `[rows, width] i32`
pub struct CudaIndices {
    memory: Memory,
    width: usize,
}

/// A packed bf16 copy: address, and elements from row to row.
#[derive(Clone, Copy)]
pub(crate) struct Packed {
    pub(crate) pointer: u64,
    pub(crate) pitch: usize,
}

impl CudaBuffer {
    pub(crate) fn new(device: &Arc<Device>, rows: usize, width: usize) -> CudaBuffer {
        let memory = device.alloc(rows * width * 4);
        CudaBuffer { memory, rows, width, packed: OnceCell::new(), packed_rows: Cell::new(0), pending: Cell::new(None) }
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.memory.pointer()
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    fn pitch(&self) -> usize {
        self.width.next_multiple_of(64)
    }

    /// The packed copy of the first `n` rows, made now unless the kernel that wrote the rows made it.
    pub(crate) fn packed(&self, device: &Arc<Device>, n: usize) -> Packed {
        let memory = self.packed.get_or_init(|| device.alloc(self.rows * self.pitch() * 2));
        let packed = Packed { pointer: memory.pointer(), pitch: self.pitch() };
        if self.packed_rows.get() < n {
            let (x, width, pitch) = (self.pointer(), self.width as u32, packed.pitch as u32);
            device.launch("pack_rows", (n, 1, 1), 256, 0, &mut args![x, width, packed.pointer, pitch]);
            self.packed_rows.set(n);
        }
        packed
    }

    /// Where a kernel that writes `n` rows puts their packed copy: address 0 if nobody has asked for one.
    pub(crate) fn packed_output(&self, n: usize) -> Packed {
        let pointer = self.packed.get().map_or(0, Memory::pointer);
        self.packed_rows.set(if pointer == 0 { 0 } else { n });
        Packed { pointer, pitch: self.pitch() }
    }

    /// A kernel changes the rows without making a packed copy.
    pub(crate) fn written(&self) {
        self.packed_rows.set(0);
    }
}

impl CudaIndices {
    pub(crate) fn new(device: &Arc<Device>, rows: usize, width: usize) -> CudaIndices {
        CudaIndices { memory: device.alloc(rows * width * 4), width }
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.memory.pointer()
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }
}
