//! Per-thread working memory that is kept between operations.

use std::cell::RefCell;

use crate::kernels::activations::Activations;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
    static ACTIVATIONS: RefCell<Option<Activations>> = const { RefCell::new(None) };
}

/// Calls `body` with `len` floats of unspecified content. Nested calls get separate memory.
pub(crate) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = FREE.with(|free| free.borrow_mut().pop()).unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = body(&mut buffer[..len]);
    FREE.with(|free| free.borrow_mut().push(buffer));
    result
}

/// Calls `body` with this thread's activations, to be prepared again.
pub(crate) fn with_activations<R>(body: impl FnOnce(&mut Activations) -> R) -> R {
    let mut activations = ACTIVATIONS.with(|a| a.borrow_mut().take()).unwrap_or_default();
    let result = body(&mut activations);
    ACTIVATIONS.with(|a| *a.borrow_mut() = Some(activations));
    result
}
