//! Hands weights from where they are to a backend by module name.

use std::collections::HashMap;

use tandem_core::backend::{Backend, Mlp};
use tandem_core::checkpoint::MappedPages;
use tandem_core::weights::{MatrixData, MatrixPart, Weight};
use tandem_core::{Checkpoint, CheckpointError};

/// Advice on this many mapped bytes takes the system longer than starting a thread that gives it.
const WORTH_A_THREAD: usize = 16 << 20;

/// Where weights come from, by module name.
pub trait WeightSource {
    /// The matrix or stack `module.weight`.
    ///
    /// # Errors
    /// The file is damaged.
    fn matrix(&self, module: &str) -> Result<MatrixData, CheckpointError>;
    /// The vector `module.leaf`.
    ///
    /// # Errors
    /// The file is damaged.
    fn vector(&self, module: &str, leaf: &str) -> Result<Vec<f32>, CheckpointError>;
    /// Called when a backend has what it needs of matrices: memory that only served to read them may go.
    fn release(&self, _parts: &[MatrixPart]) {}
}

/// Weights by tensor name.
pub(crate) struct WeightTable(HashMap<String, Weight>);

impl WeightTable {
    pub(crate) fn new(weights: Vec<Weight>) -> WeightTable {
        WeightTable(weights.into_iter().map(|w| (format!("{}.{}", w.spec.module, w.spec.leaf), w)).collect())
    }

    pub(crate) fn get(&self, module: &str, leaf: &str) -> Result<&Weight, CheckpointError> {
        let name = format!("{module}.{leaf}");
        self.0
            .get(&name)
            .ok_or_else(|| CheckpointError::Mismatch { problems: vec![format!("{name} is not in the model's table")] })
    }
}

/// The weights of a checkpoint, as [`crate::resolve`] found them.
pub struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    weights: WeightTable,
}

impl<'a> CheckpointWeights<'a> {
    /// Pairs the checkpoint with what was found in it.
    pub fn new(checkpoint: &'a Checkpoint, weights: Vec<Weight>) -> Self {
        CheckpointWeights { checkpoint, weights: WeightTable::new(weights) }
    }
}

impl WeightSource for CheckpointWeights<'_> {
    fn matrix(&self, module: &str) -> Result<MatrixData, CheckpointError> {
        let data = self.weights.get(module, "weight")?.matrix(self.checkpoint)?;
        advise(self.checkpoint.pages(data.parts.iter().map(|p| &p.weight[..])), MappedPages::prefetch);
        Ok(data)
    }

    fn release(&self, parts: &[MatrixPart]) {
        let bytes_of: [fn(&MatrixPart) -> &[u8]; 3] = [|p| &p.weight, |p| &p.scales, |p| &p.biases];
        for bytes in bytes_of {
            advise(self.checkpoint.pages(parts.iter().map(bytes)), MappedPages::release);
        }
    }

    fn vector(&self, module: &str, leaf: &str) -> Result<Vec<f32>, CheckpointError> {
        self.weights.get(module, leaf)?.vector(self.checkpoint)
    }
}

/// Tells the system about pages, beside what goes on if there are many.
fn advise(pages: Vec<MappedPages>, advice: fn(&MappedPages)) {
    let bytes: usize = pages.iter().map(MappedPages::bytes).sum();
    let all = move || pages.iter().for_each(advice);
    if bytes < WORTH_A_THREAD { all() } else { _ = std::thread::spawn(all) }
}

/// Weights on their way to a backend.
pub struct Loader<'a, B: Backend> {
    /// Where the weights go.
    pub backend: &'a B,
    source: &'a dyn WeightSource,
    progress: &'a mut dyn FnMut(usize),
}

impl<'a, B: Backend> Loader<'a, B> {
    /// From `source` to `backend`; `progress` gets the bytes of each matrix.
    pub fn new(backend: &'a B, source: &'a dyn WeightSource, progress: &'a mut dyn FnMut(usize)) -> Self {
        Loader { backend, source, progress }
    }

    /// The matrix or stack `module.weight`.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn matrix(&mut self, module: &str) -> Result<B::Matrix, CheckpointError> {
        let data = self.source.matrix(module)?;
        let (bytes, parts) = (data.bytes(), data.parts.clone());
        let matrix = self.backend.load_matrix(data);
        self.source.release(&parts);
        (self.progress)(bytes);
        Ok(matrix)
    }

    /// [`Loader::matrix`], if this rank needs it.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn matrix_if(&mut self, needed: bool, module: &str) -> Result<Option<B::Matrix>, CheckpointError> {
        if needed { self.matrix(module).map(Some) } else { Ok(None) }
    }

    /// The vector `module.leaf`.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn vector(&mut self, module: &str, leaf: &str) -> Result<B::Buffer, CheckpointError> {
        let values = self.source.vector(module, leaf)?;
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
}
