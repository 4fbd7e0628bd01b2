//! Where a conversion reads from: a checkpoint in any layout, or made-up weights.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value};
use tandem_core::json::without_literals;
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind, Weight, is_of_mtp};
use tandem_core::{Checkpoint, CheckpointError, DType, ModelConfig};
use tandem_model::{DummyWeights, RandomRows, Recipe, Stacks};

use tandem_runtime::{presets, settle_tie};

/// Weights by rows, in the formats that they have.
pub(super) trait Source: Sync {
    /// config.json as it is.
    fn config_json(&self) -> &Map<String, Value>;
    /// The same, understood.
    fn config(&self) -> &ModelConfig;
    /// Every weight, with the format in which [`Source::rows`] gives it.
    fn weights(&self) -> &[Weight];
    /// Rows of one matrix of the stack `weights()[weight]`; `rows.start` is a multiple of 128.
    ///
    /// # Errors
    /// The file is damaged.
    fn rows(&self, weight: usize, part: usize, rows: Range<usize>) -> Result<MatrixPart, CheckpointError>;
    /// Says that these rows will be asked for soon.
    fn prefetch(&self, weight: usize, part: usize, rows: Range<usize>);
    /// Says that these rows are done with, so that their memory can go.
    fn release(&self, weight: usize, part: usize, rows: Range<usize>);
    /// Says that a weight is done with.
    fn close(&self, weight: usize);
    /// Writes what is not weights and not config.json: the tokenizer and its company.
    fn write_other_files(&self, out: &Path) -> anyhow::Result<()>;
    /// Changes when the source changes.
    fn fingerprint(&self) -> String;
}

/// A directory of safetensors files.
pub(super) struct CheckpointSource {
    config_json: Map<String, Value>,
    config: ModelConfig,
    checkpoint: Checkpoint,
    weights: Vec<Weight>,
    /// What is being read.
    open: Vec<Mutex<Option<Arc<MatrixData>>>>,
}

impl CheckpointSource {
    /// Opens a model; of its weights, only those of the multi-token-prediction layer need to be there if `mtp_only`.
    pub(super) fn open(dir: &Path, mtp_only: bool) -> anyhow::Result<CheckpointSource> {
        refuse_pickle(dir)?;
        let mut config = ModelConfig::load(dir)?;
        let mut config_json = json_object(&presets::read(&dir.join("config.json"))?)?;
        if mtp_only {
            let what = || {
                format!(
                    "--mtp-only {}: the layer is missing; `tandem pull OWNER/NAME --mtp` gets that of the original model",
                    dir.display()
                )
            };
            ensure!(!config.mtp_layers().is_empty(), "{} (config.json has no num_nextn_predict_layers)", what());
            let checkpoint = Checkpoint::open_mtp(dir, &config).with_context(what)?;
            ensure!(checkpoint.names().any(|name| is_of_mtp(name, &config)), what());
            let weights = tandem_model::resolve_mtp(&checkpoint, &config)?;
            let open = weights.iter().map(|_| Mutex::default()).collect();
            return Ok(CheckpointSource { config_json, config, checkpoint, weights, open });
        }
        let checkpoint = Checkpoint::open(dir)?;
        if settle_tie(&mut config, &checkpoint) {
            config_json.insert("tie_word_embeddings".into(), false.into());
            if let Some(Value::Object(inner)) = config_json.get_mut("text_config") {
                inner.insert("tie_word_embeddings".into(), false.into());
            }
        }
        let weights = tandem_model::resolve(&checkpoint, &config)?;
        let open = weights.iter().map(|_| Mutex::default()).collect();
        Ok(CheckpointSource { config_json, config, checkpoint, weights, open })
    }
}

impl Source for CheckpointSource {
    fn config_json(&self) -> &Map<String, Value> {
        &self.config_json
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn weights(&self) -> &[Weight] {
        &self.weights
    }

    fn rows(&self, weight: usize, part: usize, rows: Range<usize>) -> Result<MatrixPart, CheckpointError> {
        let data = {
            let mut open = self.open[weight].lock().unwrap_or_else(PoisonError::into_inner);
            match &*open {
                Some(data) => data.clone(),
                None => open.insert(Arc::new(self.weights[weight].matrix(&self.checkpoint)?)).clone(),
            }
        };
        Ok(slice_rows(&data.parts[part], data.dtype, data.cols, rows))
    }

    fn prefetch(&self, weight: usize, part: usize, rows: Range<usize>) {
        if let Ok(part) = self.rows(weight, part, rows) {
            [&part.weight, &part.scales, &part.biases].into_iter().for_each(|bytes| self.checkpoint.prefetch(bytes));
        }
    }

    fn release(&self, weight: usize, part: usize, rows: Range<usize>) {
        if let Ok(part) = self.rows(weight, part, rows) {
            [&part.weight, &part.scales, &part.biases].into_iter().for_each(|bytes| self.checkpoint.release(bytes));
        }
    }

    fn close(&self, weight: usize) {
        *self.open[weight].lock().unwrap_or_else(PoisonError::into_inner) = None;
        let whole = self.weights[weight].tensors().filter_map(|name| self.checkpoint.bytes(name));
        whole.for_each(|bytes| self.checkpoint.release(&bytes));
    }

    fn write_other_files(&self, out: &Path) -> anyhow::Result<()> {
        let dir = self.checkpoint.dir();
        for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            let wanted =
                matches!(extension, "json" | "jinja" | "model" | "txt" | "tiktoken") || name.starts_with("LICENSE");
            if path.is_file() && wanted && name != "config.json" && !name.ends_with(".index.json") {
                check_link(dir, &path)?;
                copy(&path, &out.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn fingerprint(&self) -> String {
        self.checkpoint.files().map(file_fingerprint).collect::<Vec<_>>().join(" ")
    }
}

/// Refuses links that lead out of a model: its copy would hold what it never had. The cache of Hugging Face links a
/// snapshot's files to blobs of the same repository.
fn check_link(dir: &Path, path: &Path) -> anyhow::Result<()> {
    if !path.symlink_metadata()?.is_symlink() {
        return Ok(());
    }
    let (target, dir) = (path.canonicalize()?, dir.canonicalize()?);
    let snapshots = dir.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|repository| repository.join("blobs"));
    ensure!(
        target.starts_with(&dir) || blobs.is_some_and(|blobs| target.starts_with(blobs)),
        "{} is a link to {}, outside of the model; replace it by the file, or remove it",
        path.display(),
        target.display()
    );
    Ok(())
}

/// Copies a file in the place of whatever has its new name, never through a link.
pub(super) fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    if to.symlink_metadata().is_ok() {
        std::fs::remove_file(to)?;
    }
    let mut new = std::fs::File::options().write(true).create_new(true).open(to)?;
    std::io::copy(&mut std::fs::File::open(from)?, &mut new).map(|_| ())
}

/// Name, length and time of change.
pub(super) fn file_fingerprint(path: &Path) -> String {
    let changed =
        |m: std::fs::Metadata| (m.len(), m.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok()));
    format!("{} {:?}", path.display(), std::fs::metadata(path).map(changed).ok())
}

/// Rows of a matrix of any format, without copying.
pub(super) fn slice_rows(part: &MatrixPart, dtype: DType, cols: usize, rows: Range<usize>) -> MatrixPart {
    let slice = |bytes: &bytes::Bytes, size: &dyn Fn(usize) -> usize| {
        if bytes.is_empty() { bytes.clone() } else { bytes.slice(size(rows.start)..size(rows.end)) }
    };
    MatrixPart {
        weight: slice(&part.weight, &|n| dtype.weight_bytes(n, cols)),
        scales: slice(&part.scales, &|n| dtype.scale_bytes(n, cols)),
        biases: slice(&part.biases, &|n| dtype.bias_bytes(n, cols)),
        global_scale: part.global_scale,
    }
}

/// PyTorch's older files are programs: opening one runs what its author put in.
fn refuse_pickle(dir: &Path) -> anyhow::Result<()> {
    let mut pickles = vec![];
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path: PathBuf = entry?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("safetensors") => return Ok(()),
            Some("bin" | "pt" | "pth" | "pkl" | "ckpt") => pickles.push(path),
            _ => {}
        }
    }
    match pickles.first() {
        Some(path) => bail!(
            "{} is a pickle file, and there is no *.safetensors file beside it. Opening a pickle runs the code inside, so \
             it is refused; get the safetensors version of this model",
            path.display()
        ),
        None => Ok(()),
    }
}

/// The multi-token-prediction layer of another source.
pub(super) struct MtpSource {
    source: Box<dyn Source>,
    weights: Vec<Weight>,
    /// Indices of these in the source.
    indices: Vec<usize>,
}

impl MtpSource {
    pub(super) fn new(source: Box<dyn Source>) -> anyhow::Result<MtpSource> {
        let is_of_layer = |(_, weight): &(usize, &Weight)| weight.spec.kind == ModuleKind::Mtp;
        let found = source.weights().iter().enumerate().filter(is_of_layer);
        let (indices, weights): (Vec<usize>, Vec<Weight>) = found.map(|(i, weight)| (i, weight.clone())).unzip();
        ensure!(!weights.is_empty(), "--mtp-only: the source has no multi-token-prediction layer");
        Ok(MtpSource { source, weights, indices })
    }
}

impl Source for MtpSource {
    fn config_json(&self) -> &Map<String, Value> {
        self.source.config_json()
    }

    fn config(&self) -> &ModelConfig {
        self.source.config()
    }

    fn weights(&self) -> &[Weight] {
        &self.weights
    }

    fn rows(&self, weight: usize, part: usize, rows: Range<usize>) -> Result<MatrixPart, CheckpointError> {
        self.source.rows(self.indices[weight], part, rows)
    }

    fn prefetch(&self, weight: usize, part: usize, rows: Range<usize>) {
        self.source.prefetch(self.indices[weight], part, rows);
    }

    fn release(&self, weight: usize, part: usize, rows: Range<usize>) {
        self.source.release(self.indices[weight], part, rows);
    }

    fn close(&self, weight: usize) {
        self.source.close(self.indices[weight]);
    }

    fn write_other_files(&self, _out: &Path) -> anyhow::Result<()> {
        Ok(())
    }

    fn fingerprint(&self) -> String {
        format!("the layer that drafts of {}", self.source.fingerprint())
    }
}

pub(super) fn json_object(text: &str) -> anyhow::Result<Map<String, Value>> {
    serde_json::from_str(&without_literals(text)).context("config.json is not a JSON object")
}

/// Random weights of true shapes, already in their final formats.
pub(super) struct DummySource {
    config_json: Map<String, Value>,
    config: ModelConfig,
    weights: Vec<Weight>,
    random: Vec<RandomRows>,
}

impl DummySource {
    pub(super) fn new(config_text: &str, recipe: &Recipe) -> anyhow::Result<DummySource> {
        let config = ModelConfig::parse(config_text)?;
        let weights = DummyWeights::new(&config, recipe, Stacks::Distinct).weights().to_vec();
        let random = weights.iter().map(RandomRows::new).collect();
        Ok(DummySource { config_json: json_object(config_text)?, config, weights, random })
    }
}

impl Source for DummySource {
    fn config_json(&self) -> &Map<String, Value> {
        &self.config_json
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn weights(&self) -> &[Weight] {
        &self.weights
    }

    fn rows(&self, weight: usize, part: usize, rows: Range<usize>) -> Result<MatrixPart, CheckpointError> {
        let Weight { spec, dtype, .. } = &self.weights[weight];
        let (_, n_rows, cols) = spec.dims();
        let mut elements = vec![0; dtype.weight_bytes(rows.len(), cols)];
        let mut scales = vec![0; dtype.scale_bytes(rows.len(), cols)];
        let mut biases = vec![0; dtype.bias_bytes(rows.len(), cols)];
        if spec.shape.len() > 1 {
            self.random[weight].fill(part * n_rows + rows.start, &mut elements, &mut scales, &mut biases);
        } else if let DType::Float(float) = dtype {
            let value = if spec.leaf == "weight" { 1.0 } else { 0.0 };
            elements.clear();
            (0..cols).for_each(|_| float.write(value, &mut elements));
        }
        Ok(MatrixPart { weight: elements.into(), scales: scales.into(), biases: biases.into(), global_scale: None })
    }

    fn prefetch(&self, _weight: usize, _part: usize, _rows: Range<usize>) {}

    fn release(&self, _weight: usize, _part: usize, _rows: Range<usize>) {}

    fn close(&self, _weight: usize) {}

    fn write_other_files(&self, _out: &Path) -> anyhow::Result<()> {
        Ok(())
    }

    fn fingerprint(&self) -> String {
        format!("random {}", Value::Object(self.config_json.clone()))
    }
}
