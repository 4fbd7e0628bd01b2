//! Memory on the device.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::WgpuError;
use crate::device::Device;

/// Bytes behind every buffer that kernels may read, but make nothing of: a whole unit of the widest format.
const MARGIN: u64 = 128;

/// A buffer with a number, by which bind groups are found again.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) id: u64,
    pub(crate) bytes: u64,
}

impl Memory {
    /// Zeroed memory for kernels and copies.
    pub(crate) fn new(device: &Device, bytes: u64) -> Memory {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let size = (bytes + MARGIN).next_multiple_of(16);
        let limit = device.info.max_buffer_bytes.min(device.info.max_binding_bytes.next_multiple_of(16));
        let fits = size <= limit;
        if !fits {
            device.errors.set(WgpuError::OutOfMemory { wanted: size, operation: device.errors.operation() });
        }
        let buffer = device.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: if fits { size } else { MARGIN },
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Memory { buffer, id: NEXT.fetch_add(1, Ordering::Relaxed), bytes }
    }
}

/// Activations, `[rows, width] f32`.
#[derive(Debug)]
pub struct WgpuBuffer {
    pub(crate) memory: Memory,
    pub(crate) rows: usize,
    pub(crate) width: usize,
}

impl WgpuBuffer {
    pub(crate) fn new(device: &Device, rows: usize, width: usize) -> WgpuBuffer {
        WgpuBuffer { memory: Memory::new(device, (rows * width * 4) as u64), rows, width }
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// Small integers, `[rows, width] i32`.
#[derive(Debug)]
pub struct WgpuIndices {
    pub(crate) memory: Memory,
    pub(crate) width: usize,
}

impl WgpuIndices {
    /// Integers of a row.
    pub fn width(&self) -> usize {
        self.width
    }
}

/// Paged storage of one kind of cached vector, `[slots, width] f32`.
#[derive(Debug)]
pub struct WgpuCache {
    pub(crate) memory: Memory,
    pub(crate) width: usize,
    pub(crate) n_slots: usize,
}
