//! Cached vectors, one row per slot.

use half::bf16;

use crate::kernels::vector::Element;

/// `[n_slots, width]` in the element type that the numerics allow.
pub enum CpuCache {
    /// Exact, for the reference numerics.
    F32(Rows<f32>),
    /// Half the memory.
    Bf16(Rows<bf16>),
}

/// Rows of equal width.
pub struct Rows<E> {
    data: Vec<E>,
    width: usize,
}

impl<E: Element> Rows<E> {
    pub(crate) fn row(&self, slot: usize) -> &[E] {
        &self.data[slot * self.width..(slot + 1) * self.width]
    }

    fn write(&mut self, slot: usize, values: &[f32]) {
        for (cell, value) in self.data[slot * self.width..(slot + 1) * self.width].iter_mut().zip(values) {
            *cell = E::narrow(*value);
        }
    }
}

impl CpuCache {
    /// Zeroed rows. The system hands out zero pages, so memory is taken as slots are used.
    pub(crate) fn new(exact: bool, n_slots: usize, width: usize) -> CpuCache {
        if exact {
            CpuCache::F32(Rows { data: vec![0.0; n_slots * width], width })
        } else {
            // SAFETY-free zeroing: bf16 has no calloc specialisation, u16 has, and bf16 is a transparent u16.
            CpuCache::Bf16(Rows { data: zeroed_bf16(n_slots * width), width })
        }
    }

    pub(crate) fn write(&mut self, slot: usize, values: &[f32]) {
        match self {
            CpuCache::F32(rows) => rows.write(slot, values),
            CpuCache::Bf16(rows) => rows.write(slot, values),
        }
    }
}

fn zeroed_bf16(len: usize) -> Vec<bf16> {
    half::vec::HalfBitsVecExt::reinterpret_into(vec![0u16; len])
}
