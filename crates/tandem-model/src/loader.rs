//! Hands weights from a checkpoint to a backend by module name.

use std::collections::HashMap;

use tandem_core::backend::{Backend, Mlp};
use tandem_core::weights::Weight;
use tandem_core::{Checkpoint, CheckpointError};

/// A checkpoint whose weights are found, on its way to a backend.
pub struct Loader<'a, B: Backend> {
    /// Where the weights go.
    pub backend: &'a B,
    checkpoint: &'a Checkpoint,
    weights: HashMap<String, Weight>,
    progress: &'a mut dyn FnMut(usize),
}

impl<'a, B: Backend> Loader<'a, B> {
    /// Weights as [`crate::resolve`] found them.
    pub fn new(
        backend: &'a B,
        checkpoint: &'a Checkpoint,
        weights: Vec<Weight>,
        progress: &'a mut dyn FnMut(usize),
    ) -> Self {
        let weights = weights.into_iter().map(|w| (format!("{}.{}", w.spec.module, w.spec.leaf), w)).collect();
        Loader { backend, checkpoint, weights, progress }
    }

    /// The matrix or stack `module.weight`.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn matrix(&mut self, module: &str) -> Result<B::Matrix, CheckpointError> {
        let data = self.weight(module, "weight")?.matrix(self.checkpoint)?;
        let bytes = data.bytes();
        let matrix = self.backend.load_matrix(data);
        (self.progress)(bytes);
        Ok(matrix)
    }

    /// The vector `module.leaf`.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn vector(&mut self, module: &str, leaf: &str) -> Result<B::Buffer, CheckpointError> {
        let values = self.weight(module, leaf)?.vector(self.checkpoint)?;
        Ok(self.backend.load_vector(&values))
    }

    /// `gate_proj`, `up_proj` and `down_proj` below `module`.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn mlp(&mut self, module: &str) -> Result<Mlp<B::Matrix>, CheckpointError> {
        Ok(Mlp {
            gate: self.matrix(&format!("{module}.gate_proj"))?,
            up: self.matrix(&format!("{module}.up_proj"))?,
            down: self.matrix(&format!("{module}.down_proj"))?,
        })
    }

    fn weight(&self, module: &str, leaf: &str) -> Result<&Weight, CheckpointError> {
        let name = format!("{module}.{leaf}");
        self.weights
            .get(&name)
            .ok_or_else(|| CheckpointError::Mismatch { problems: vec![format!("{name} is not in the model's table")] })
    }
}
