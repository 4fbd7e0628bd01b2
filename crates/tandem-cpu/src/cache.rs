//! Cached vectors, one row per slot.

use std::ops::Range;

use half::bf16;
use half::vec::HalfBitsVecExt;
use tandem_core::backend::PAGE_SIZE;

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

    /// Appends the bytes of a page: its elements, then the scales if there are any.
    pub(crate) fn save_page(&self, page: u32, out: &mut Vec<u8>) {
        let slots = page_slots(page);
        match self {
            CpuCache::F32(Rows { data, width }) => {
                out.extend(data[elements(&slots, *width)].iter().flat_map(|v| v.to_le_bytes()));
            }
            CpuCache::Bf16(Rows { data, width }) => {
                out.extend(data[elements(&slots, *width)].iter().flat_map(|v| v.to_le_bytes()));
            }
            CpuCache::Int8(Int8Rows { codes, scales, width }) => {
                out.extend_from_slice(&codes[elements(&slots, *width)]);
                out.extend(scales[slots].iter().flat_map(|v| v.to_le_bytes()));
            }
        }
    }

    /// Takes a page off the front of `bytes`; false, and nothing changed, when they are too few.
    pub(crate) fn load_page(&mut self, page: u32, bytes: &mut &[u8]) -> bool {
        let slots = page_slots(page);
        let (width, element_bytes, extra) = match self {
            CpuCache::F32(rows) => (rows.width, 4, 0),
            CpuCache::Bf16(rows) => (rows.width, 2, 0),
            CpuCache::Int8(rows) => (rows.width, 1, 4 * PAGE_SIZE),
        };
        let size = PAGE_SIZE * width * element_bytes;
        let Some((page_bytes, rest)) = bytes.split_at_checked(size + extra) else { return false };
        let (values, scale_bytes) = page_bytes.split_at(size);
        match self {
            CpuCache::F32(rows) => fill_f32(&mut rows.data[elements(&slots, width)], values),
            CpuCache::Bf16(rows) => {
                let cells = &mut rows.data[elements(&slots, width)];
                for (cell, value) in cells.iter_mut().zip(values.as_chunks::<2>().0) {
                    *cell = bf16::from_le_bytes(*value);
                }
            }
            CpuCache::Int8(rows) => {
                rows.codes[elements(&slots, width)].copy_from_slice(values);
                fill_f32(&mut rows.scales[slots], scale_bytes);
            }
        }
        *bytes = rest;
        true
    }
}

fn page_slots(page: u32) -> Range<usize> {
    page as usize * PAGE_SIZE..(page as usize + 1) * PAGE_SIZE
}

fn elements(slots: &Range<usize>, width: usize) -> Range<usize> {
    slots.start * width..slots.end * width
}

fn fill_f32(cells: &mut [f32], bytes: &[u8]) {
    for (cell, value) in cells.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *cell = f32::from_le_bytes(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTH: usize = 24;

    /// What is written to a slot.
    fn values(slot: usize) -> Vec<f32> {
        (0..WIDTH).map(|i| (slot * 31 + i) as f32 - 700.0).collect()
    }

    /// A slot's vector as kernels read it.
    fn decoded(cache: &CpuCache, slot: usize) -> Vec<f32> {
        match cache {
            CpuCache::F32(rows) => rows.row(slot).to_vec(),
            CpuCache::Bf16(rows) => rows.row(slot).iter().map(|v| v.to_f32()).collect(),
            CpuCache::Int8(rows) => {
                let (codes, scale) = rows.row(slot);
                codes.iter().map(|code| (i32::from(*code) - KEY_OFFSET) as f32 * scale).collect()
            }
        }
    }

    #[test]
    fn a_page_moves_to_another_place_unchanged() {
        let n_slots = 3 * PAGE_SIZE;
        for mut cache in [CpuCache::f32(n_slots, WIDTH), CpuCache::bf16(n_slots, WIDTH), CpuCache::int8(n_slots, WIDTH)]
        {
            for slot in 0..PAGE_SIZE {
                cache.write(PAGE_SIZE + slot, &values(slot));
            }
            let mut saved = vec![];
            cache.save_page(1, &mut saved);
            assert!(!cache.load_page(2, &mut &saved[1..]));
            let mut rest = &saved[..];
            assert!(cache.load_page(2, &mut rest));
            assert!(rest.is_empty());
            for slot in 0..PAGE_SIZE {
                let (found, expected) = (decoded(&cache, 2 * PAGE_SIZE + slot), decoded(&cache, PAGE_SIZE + slot));
                assert_eq!(found, expected, "slot {slot}");
                // Half a step of 8 bits, the coarsest of the three.
                let largest = values(slot).iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (found, written) in found.iter().zip(values(slot)) {
                    assert!((found - written).abs() <= 0.501 * largest / 127.0, "slot {slot}: {found} for {written}");
                }
            }
        }
    }
}
