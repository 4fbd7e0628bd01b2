//! Cached vectors, one row per slot.

use half::bf16;
use half::vec::HalfBitsVecExt;

use crate::kernels::index_select::KEY_OFFSET;
use crate::kernels::vector::Element;

/// `[n_slots, width]` in the element type that the numerics and the use allow.
pub enum CpuCache {
    /// Exact, for the reference numerics.
    F32(Rows<f32>),
    /// Half the memory.
    Bf16(Rows<bf16>),
    /// A quarter, for the indexer's keys, whose scores only rank positions.
    Int8(Int8Rows),
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

/// Rows of 8-bit codes with a scale each.
pub struct Int8Rows {
    /// Codes plus [`KEY_OFFSET`].
    codes: Vec<u8>,
    scales: Vec<f32>,
    width: usize,
}

impl Int8Rows {
    /// Codes and scale of a slot.
    pub(crate) fn row(&self, slot: usize) -> (&[u8], f32) {
        (&self.codes[slot * self.width..(slot + 1) * self.width], self.scales[slot])
    }

    fn write(&mut self, slot: usize, values: &[f32]) {
        let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        self.scales[slot] = largest / 127.0;
        for (code, value) in self.codes[slot * self.width..(slot + 1) * self.width].iter_mut().zip(values) {
            *code = ((value * inverse).round_ties_even() as i32 + KEY_OFFSET) as u8;
        }
    }
}

// The system hands out zero pages, so memory is taken as slots are used.
impl CpuCache {
    pub(crate) fn f32(n_slots: usize, width: usize) -> CpuCache {
        CpuCache::F32(Rows { data: vec![0.0; n_slots * width], width })
    }

    pub(crate) fn bf16(n_slots: usize, width: usize) -> CpuCache {
        // Through u16, whose zeroed allocation the standard library leaves to the system.
        CpuCache::Bf16(Rows { data: vec![0u16; n_slots * width].reinterpret_into(), width })
    }

    pub(crate) fn int8(n_slots: usize, width: usize) -> CpuCache {
        CpuCache::Int8(Int8Rows { codes: vec![0; n_slots * width], scales: vec![0.0; n_slots], width })
    }

    pub(crate) fn write(&mut self, slot: usize, values: &[f32]) {
        match self {
            CpuCache::F32(rows) => rows.write(slot, values),
            CpuCache::Bf16(rows) => rows.write(slot, values),
            CpuCache::Int8(rows) => rows.write(slot, values),
        }
    }
}
