//! Disjoint writes into one buffer from several workers.

use std::marker::PhantomData;

/// A mutable slice that workers of one job may write to, each its own elements.
pub(crate) struct SharedMut<'a, T> {
    data: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer comes from an exclusive borrow that outlives the value; users promise disjoint ranges (`slice`).
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        SharedMut { data: data.as_mut_ptr(), len: data.len(), lifetime: PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Elements `start..start + len`, for writing.
    ///
    /// # Safety
    /// No other reference to any of these elements may be alive.
    ///
    /// # Panics
    /// When the range is outside the slice.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "write of {start}+{len} outside {}", self.len);
        // SAFETY: in bounds (checked), exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}
