//! From the table of weights a model needs to the tensors of a checkpoint, strictly.
//!
//! A family lists its [`WeightSpec`]s once; loading, inspecting and (later) sharding and planning read that list.
//! [`resolve`] finds each one in either published layout (MLX's stacked modules, Hugging Face's per-expert tensors and
//! joint `kv_b_proj`), and reports every missing, duplicate, misshapen, wrongly typed or unexplained tensor together.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;

use crate::checkpoint::{Checkpoint, CheckpointError, TensorDType, text_name};
use crate::config::{ModelConfig, QuantizationConfig};
use crate::dtype::{DType, FP8_BLOCK, Float};
use crate::quant::{self, PackedView};

/// What a weight belongs to, for accounting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ModuleKind {
    /// Token embedding.
    Embed,
    /// Attention projections.
    Attention,
    /// The sparse-attention indexer.
    Indexer,
    /// Router gate and correction bias.
    Router,
    /// Routed experts.
    RoutedExperts,
    /// Shared expert.
    SharedExpert,
    /// MLP of dense layers.
    DenseMlp,
    /// Norms of every kind.
    Norms,
    /// Output projection.
    LmHead,
    /// Everything of a multi-token-prediction layer.
    Mtp,
}

impl ModuleKind {
    /// Every kind, in the order reports use.
    pub const ALL: [ModuleKind; 10] = [
        ModuleKind::RoutedExperts,
        ModuleKind::SharedExpert,
        ModuleKind::DenseMlp,
        ModuleKind::Attention,
        ModuleKind::Indexer,
        ModuleKind::Router,
        ModuleKind::Norms,
        ModuleKind::LmHead,
        ModuleKind::Embed,
        ModuleKind::Mtp,
    ];

    /// Name in reports and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            ModuleKind::Embed => "embed",
            ModuleKind::Attention => "attention",
            ModuleKind::Indexer => "indexer",
            ModuleKind::Router => "router",
            ModuleKind::RoutedExperts => "routed_experts",
            ModuleKind::SharedExpert => "shared_expert",
            ModuleKind::DenseMlp => "dense_mlp",
            ModuleKind::Norms => "norms",
            ModuleKind::LmHead => "lm_head",
            ModuleKind::Mtp => "mtp",
        }
    }
}

impl fmt::Display for ModuleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the weight looks in a Hugging Face checkpoint, where that differs from MLX's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `[n]`, never quantised.
    Vector,
    /// `[out, in]`.
    Matrix,
    /// `[n_experts, out, in]`; HF stores `experts.{e}.{proj}` instead of `switch_mlp.{proj}`, gpt-oss
    /// `experts.{proj}_blocks` with gate and up rows alternating in `gate_up_proj`.
    Experts,
    /// `[n_heads, kv_lora_rank, qk_nope_head_dim]`; HF: the transposed first rows of each head of `kv_b_proj`.
    EmbedQ,
    /// `[n_heads, v_head_dim, kv_lora_rank]`; HF: the last rows of each head of `kv_b_proj`.
    UnembedOut,
}

/// A direction in a matrix or a stack of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Which matrix.
    Stack,
    /// Output dimension.
    Rows,
    /// Input dimension; the elements of a vector.
    Cols,
}

/// How tensor-parallel ranks divide a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Not at all: every rank holds it.
    Whole,
    /// By query heads.
    Heads(Axis),
    /// By key and value heads.
    KvHeads(Axis),
    /// By the intermediate width of an MLP; routed experts may be divided by whole experts instead.
    Width(Axis),
    /// A term of a sum over ranks: the first rank holds it, the others hold zeros.
    Once,
}

/// How much of a weight decoding one token reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// All of it.
    Always,
    /// One row.
    PerRow,
    /// As many matrices of the stack as a token has experts.
    Experts {
        /// Experts per token.
        per_token: usize,
    },
    /// All of it while the context is longer than the indexer selects, else nothing.
    Sparse,
    /// Nothing: it is counted, not loaded.
    Never,
}

/// One weight a model needs.
#[derive(Clone, Debug)]
pub struct WeightSpec {
    /// Module path in MLX's layout, e.g. `model.layers.3.mlp.switch_mlp.gate_proj`.
    pub module: String,
    /// Tensor of the module: `weight`, `bias` or `e_score_correction_bias`.
    pub leaf: &'static str,
    /// Logical shape, unpacked: `[n]`, `[out, in]` or `[stack, out, in]`.
    pub shape: Vec<usize>,
    /// For accounting.
    pub kind: ModuleKind,
    /// Decoder layer, if any.
    pub layer: Option<usize>,
    /// Layout.
    pub form: Form,
    /// How ranks divide it.
    pub split: Split,
    /// How much of it a token reads.
    pub read: Read,
    /// Recipes leave its format as it is, unless a rule names it: a router picks experts by small differences.
    pub keeps_format: bool,
    /// May be absent.
    pub optional: bool,
}

impl WeightSpec {
    /// A matrix or stack of matrices `module.weight`.
    pub fn matrix(module: impl Into<String>, shape: &[usize], kind: ModuleKind, form: Form) -> WeightSpec {
        WeightSpec {
            module: module.into(),
            leaf: "weight",
            shape: shape.to_vec(),
            kind,
            layer: None,
            form,
            split: Split::Whole,
            read: Read::Always,
            keeps_format: false,
            optional: false,
        }
    }

    /// A vector `module.leaf` of `len` elements.
    pub fn vector(module: impl Into<String>, leaf: &'static str, len: usize, kind: ModuleKind) -> WeightSpec {
        WeightSpec {
            module: module.into(),
            leaf,
            shape: vec![len],
            kind,
            layer: None,
            form: Form::Vector,
            split: Split::Whole,
            read: Read::Always,
            keeps_format: false,
            optional: false,
        }
    }

    /// The same weight, divided as `split` says.
    #[must_use]
    pub fn divided(self, split: Split) -> WeightSpec {
        WeightSpec { split, ..self }
    }

    /// The same weight, read as `read` says.
    #[must_use]
    pub fn read(self, read: Read) -> WeightSpec {
        WeightSpec { read, ..self }
    }

    /// The part of `amount` (bytes or elements, of the whole weight or of a rank's slice) that decoding one token reads
    /// with a context longer than the indexer selects.
    pub fn read_per_token(&self, amount: u64) -> u64 {
        let (stack, rows, _) = self.dims();
        match self.read {
            Read::Always | Read::Sparse => amount,
            Read::PerRow => amount / rows as u64,
            Read::Experts { per_token } => amount * per_token as u64 / stack as u64,
            Read::Never => 0,
        }
    }

    /// Matrices in the stack, rows and columns of each.
    pub fn dims(&self) -> (usize, usize, usize) {
        match self.shape[..] {
            [n] => (1, 1, n),
            [rows, cols] => (1, rows, cols),
            [stack, rows, cols] => (stack, rows, cols),
            _ => unreachable!("a weight has one to three dimensions"),
        }
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn tensor(&self) -> String {
        format!("{}.{}", self.module, self.leaf)
    }
}

/// The tensors of one matrix in the checkpoint.
#[derive(Clone, Debug)]
struct Source {
    weight: String,
    scales: Option<String>,
    biases: Option<String>,
    global_scale: Option<String>,
    dtype: DType,
}

impl Source {
    fn names(&self) -> impl Iterator<Item = &String> {
        [Some(&self.weight), self.scales.as_ref(), self.biases.as_ref(), self.global_scale.as_ref()]
            .into_iter()
            .flatten()
    }
}

#[derive(Clone, Debug)]
enum Place {
    /// One set of tensors, as the spec's shape says.
    Whole(Source),
    /// One set of tensors per expert.
    PerExpert(Vec<Source>),
    /// Every second row of `experts.gate_up_proj_blocks`, from `offset` 0 (gate) or 1 (up); or all of another.
    Blocks { source: Source, offset: usize, step: usize },
    /// Part of `kv_b_proj`, `[n_heads * (nope + v), kv_lora]`.
    KvB(Source),
    /// In no checkpoint.
    Nowhere,
}

/// A weight and where it was found.
#[derive(Clone, Debug)]
pub struct Weight {
    /// What was asked for.
    pub spec: WeightSpec,
    /// Format in which it is stored.
    pub dtype: DType,
    place: Place,
}

impl Weight {
    /// A weight of no checkpoint, for accounting and for made-up values; [`Weight::matrix`] fails on it.
    pub fn nowhere(spec: WeightSpec, dtype: DType) -> Weight {
        Weight { spec, dtype, place: Place::Nowhere }
    }

    /// The matrix whose stacked tensors are `whole`, laid out as in an MLX checkpoint.
    ///
    /// # Panics
    /// When the byte lengths do not fit shape and format.
    pub fn matrix_of(&self, whole: &MatrixPart) -> MatrixData {
        let (stack, rows, cols) = self.spec.dims();
        let parts = split_stack(whole, self.dtype, stack, rows, cols);
        MatrixData { name: self.spec.module.clone(), dtype: self.dtype, rows, cols, parts }
    }

    /// Bytes in the checkpoint: elements, scales and biases.
    pub fn bytes(&self) -> usize {
        let (stack, rows, cols) = self.spec.dims();
        stack * self.dtype.total_bytes(rows, cols)
    }

    /// The checkpoint's tensors that hold it.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let sources = match &self.place {
            Place::Whole(source) | Place::KvB(source) | Place::Blocks { source, .. } => std::slice::from_ref(source),
            Place::PerExpert(sources) => sources,
            Place::Nowhere => &[],
        };
        sources.iter().flat_map(Source::names).map(String::as_str)
    }
}

/// A matrix or stack of equal matrices with its bytes, ready for a backend.
#[derive(Clone, Debug)]
pub struct MatrixData {
    /// Module path, for messages.
    pub name: String,
    /// Storage format.
    pub dtype: DType,
    /// Output dimension of each matrix.
    pub rows: usize,
    /// Input dimension of each matrix.
    pub cols: usize,
    /// One entry per matrix of the stack (experts, heads), or one.
    pub parts: Vec<MatrixPart>,
}

/// The bytes of one matrix.
#[derive(Clone, Debug, Default)]
pub struct MatrixPart {
    /// Packed elements.
    pub weight: Bytes,
    /// Scales, or empty.
    pub scales: Bytes,
    /// Biases, or empty.
    pub biases: Bytes,
    /// nvfp4's extra scale.
    pub global_scale: Option<f32>,
}

impl MatrixData {
    /// Finds the first of `n_rows` rows of matrix `part` that holds an element which is NaN or infinite.
    ///
    /// # Errors
    /// [`CheckpointError::NotFinite`], with the element.
    pub fn check_finite(&self, part: usize, first_row: usize, n_rows: usize) -> Result<(), CheckpointError> {
        let view = self.view(part);
        let Some((row, col)) = view.find_non_finite(first_row, n_rows) else { return Ok(()) };
        let mut values = vec![0.0; self.cols];
        view.dequantize_row(row, &mut values);
        let place = if self.parts.len() > 1 { vec![part, row, col] } else { vec![row, col] };
        Err(CheckpointError::NotFinite { tensor: format!("{}.weight", self.name), place, value: values[col] })
    }

    /// Decoding view of matrix `part`.
    ///
    /// # Panics
    /// When the byte lengths do not fit the format, which [`resolve`] has checked.
    pub fn view(&self, part: usize) -> PackedView<'_> {
        let p = &self.parts[part];
        PackedView {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            weight: &p.weight,
            scales: &p.scales,
            biases: &p.biases,
            global_scale: p.global_scale,
        }
    }

    /// The part of each matrix (or of the stack) in `range` along `axis`. Rows and matrices stay where they are; columns
    /// are copied together.
    ///
    /// # Panics
    /// When the range does not keep quantisation groups whole.
    #[must_use]
    pub fn cut(self, axis: Axis, range: Range<usize>) -> MatrixData {
        let (dtype, rows, cols) = (self.dtype, self.rows, self.cols);
        match axis {
            Axis::Stack => MatrixData { parts: self.parts[range].to_vec(), ..self },
            Axis::Rows => {
                let block = if dtype == DType::Fp8Block { FP8_BLOCK } else { 1 };
                assert!(range.start.is_multiple_of(block), "{}: rows {range:?} split a block", self.name);
                let blocks = range.start / block..range.end.div_ceil(block);
                let cut = |bytes: &Bytes, range: &Range<usize>, row_bytes: usize| {
                    let end = (range.end * row_bytes).min(bytes.len());
                    bytes.slice((range.start * row_bytes).min(end)..end)
                };
                let parts = self
                    .parts
                    .iter()
                    .map(|p| MatrixPart {
                        weight: cut(&p.weight, &range, dtype.weight_bytes(1, cols)),
                        scales: cut(&p.scales, &blocks, dtype.scale_bytes(1, cols)),
                        biases: cut(&p.biases, &blocks, dtype.bias_bytes(1, cols)),
                        global_scale: p.global_scale,
                    })
                    .collect();
                MatrixData { rows: range.len(), parts, ..self }
            }
            Axis::Cols => {
                let group = dtype.group_size();
                assert!(range.start.is_multiple_of(group), "{}: columns {range:?} split a group", self.name);
                let groups = range.start / group..range.end.div_ceil(group);
                let elements = range.start * dtype.bits() / 8..range.end * dtype.bits() / 8;
                let group_bytes = |all: usize| {
                    let size = all / cols.div_ceil(group).max(1);
                    groups.start * size..groups.end * size
                };
                let cut = |p: &MatrixPart| MatrixPart {
                    weight: columns(&p.weight, dtype.weight_bytes(1, cols), &elements),
                    scales: columns(&p.scales, dtype.scale_bytes(1, cols), &group_bytes(dtype.scale_bytes(1, cols))),
                    biases: columns(&p.biases, dtype.bias_bytes(1, cols), &group_bytes(dtype.bias_bytes(1, cols))),
                    global_scale: p.global_scale,
                };
                // Matrices that share their bytes go on doing so.
                let first = &self.parts[0];
                let parts = if self.parts.iter().all(|p| p.has_bytes_of(first)) {
                    vec![cut(first); self.parts.len()]
                } else {
                    on_threads(&self.parts, first.weight.len(), cut)
                };
                MatrixData { rows, cols: range.len(), parts, ..self }
            }
        }
    }

    /// All bytes.
    pub fn bytes(&self) -> usize {
        self.parts.len() * self.dtype.total_bytes(self.rows, self.cols)
    }

    /// The same matrices in another format, bit-identical to mlx's quantiser when the source is unquantised.
    ///
    /// # Errors
    /// When the shape does not fit the format.
    pub fn quantize(&self, dtype: DType) -> Result<MatrixData, CheckpointError> {
        let mut parts = Vec::with_capacity(self.parts.len());
        for part in 0..self.parts.len() {
            let packed = quant::quantize(dtype, self.rows, self.cols, &self.view(part).dequantize())
                .map_err(|source| CheckpointError::Quant { tensor: self.name.clone(), source })?;
            parts.push(MatrixPart {
                weight: packed.weight.into(),
                scales: packed.scales.into(),
                biases: packed.biases.into(),
                global_scale: None,
            });
        }
        Ok(MatrixData { name: self.name.clone(), dtype, rows: self.rows, cols: self.cols, parts })
    }
}

impl MatrixPart {
    /// True if this is the same memory as `other`.
    fn has_bytes_of(&self, other: &MatrixPart) -> bool {
        let same = |a: &Bytes, b: &Bytes| a.len() == b.len() && std::ptr::eq(a.as_ptr(), b.as_ptr());
        same(&self.weight, &other.weight) && same(&self.scales, &other.scales) && same(&self.biases, &other.biases)
    }
}

/// Bytes `range` of every row of `row_bytes`.
fn columns(bytes: &Bytes, row_bytes: usize, range: &Range<usize>) -> Bytes {
    if bytes.is_empty() {
        return Bytes::new();
    }
    let mut out = Vec::with_capacity(bytes.len() / row_bytes * range.len());
    bytes.chunks_exact(row_bytes).for_each(|row| out.extend_from_slice(&row[range.clone()]));
    out.into()
}

/// Memory below which another thread is not worth its start.
const BYTES_PER_THREAD: usize = 1 << 20;

/// `f` of each item, which reads about `bytes_of_each`, on as many threads as all of it is worth; in the items' order.
fn on_threads<T: Sync, R: Send>(items: &[T], bytes_of_each: usize, f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let n_threads = (items.len() * bytes_of_each / BYTES_PER_THREAD).min(n_cores);
    if n_threads < 2 {
        return items.iter().map(f).collect();
    }
    let f = &f;
    std::thread::scope(|scope| {
        let shares = items.chunks(items.len().div_ceil(n_threads));
        let threads: Vec<_> =
            shares.map(|share| scope.spawn(move || share.iter().map(f).collect::<Vec<R>>())).collect();
        // A panic of `f` goes on here.
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    })
}

/// Finds every weight of `specs` in `checkpoint`, and checks that nothing else is there.
///
/// `mtp` is the table of the multi-token-prediction layers: all of it must be there if any of it is.
///
/// # Errors
/// [`CheckpointError::Mismatch`] with every problem.
pub fn resolve(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    specs: &[WeightSpec],
    mtp: &[WeightSpec],
) -> Result<Vec<Weight>, CheckpointError> {
    let mtp_present = checkpoint.names().any(|name| is_of_mtp(name, config));
    let specs = specs.iter().chain(if mtp_present { mtp } else { &[] });
    find_all(checkpoint, config, specs, |name| !ignored(name, config))
}

/// Finds every weight of the multi-token-prediction layers in a checkpoint that may hold more than them.
///
/// # Errors
/// As [`resolve`], of these layers alone.
pub fn resolve_mtp(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    mtp: &[WeightSpec],
) -> Result<Vec<Weight>, CheckpointError> {
    find_all(checkpoint, config, mtp.iter(), |name| is_of_mtp(name, config))
}

/// Whether a tensor of this name belongs to a multi-token-prediction layer of the model.
pub fn is_of_mtp(name: &str, config: &ModelConfig) -> bool {
    let name = text_name(name);
    config.mtp_layers().any(|layer| name.starts_with(&format!("model.layers.{layer}.")))
}

/// Finds the weights of `specs`; of the other tensors there must be none that are `unexpected`.
fn find_all<'a>(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    specs: impl Iterator<Item = &'a WeightSpec>,
    unexpected: impl Fn(&str) -> bool,
) -> Result<Vec<Weight>, CheckpointError> {
    let mut resolver = Resolver {
        checkpoint,
        quantization: &config.quantization,
        float: config.float,
        kv_b_head: config.mla.as_ref().map_or(0, |m| m.qk_nope_head_dim + m.v_head_dim),
        claimed: HashSet::new(),
        problems: checkpoint.duplicates().iter().map(|n| format!("{n} is in more than one file")).collect(),
    };
    let mut weights = vec![];
    for spec in specs {
        if let Some((dtype, place)) = resolver.find(spec) {
            weights.push(Weight { spec: spec.clone(), dtype, place });
        }
    }
    let Resolver { claimed, mut problems, .. } = resolver;
    for name in checkpoint.names() {
        if !claimed.contains(name) && unexpected(name) {
            problems.push(format!(
                "{name} is in the checkpoint but this {} model has no use for it",
                config.model_type.name()
            ));
        }
    }
    if problems.is_empty() { Ok(weights) } else { Err(CheckpointError::Mismatch { problems }) }
}

/// Tensors that are known and carry nothing: old checkpoints' rotary tables, and an lm_head that is tied.
fn ignored(name: &str, config: &ModelConfig) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name.starts_with("lm_head."))
}

struct Resolver<'a> {
    checkpoint: &'a Checkpoint,
    quantization: &'a QuantizationConfig,
    float: Float,
    /// Rows of one head in `kv_b_proj`.
    kv_b_head: usize,
    claimed: HashSet<String>,
    problems: Vec<String>,
}

impl Resolver<'_> {
    fn find(&mut self, spec: &WeightSpec) -> Option<(DType, Place)> {
        let (stack, rows, cols) = spec.dims();
        let packed = spec.form != Form::Vector && self.checkpoint.contains(&packed_of(&spec.module));
        if packed || self.checkpoint.contains(&spec.tensor()) {
            let source = self.source(&spec.module, spec.leaf, &spec.shape, spec.form != Form::Vector)?;
            return Some((source.dtype, Place::Whole(source)));
        }
        let place = match spec.form {
            Form::Experts if self.has(&expert_module(&spec.module, 0)) => {
                let sources: Vec<Source> =
                    (0..stack).filter_map(|e| self.required(&expert_module(&spec.module, e), &[rows, cols])).collect();
                if sources.len() != stack {
                    return None;
                }
                if let Some(odd) = sources.iter().find(|s| s.dtype != sources[0].dtype) {
                    self.problems.push(format!(
                        "{} is {} but other experts of {} are {}",
                        odd.weight, odd.dtype, spec.module, sources[0].dtype
                    ));
                    return None;
                }
                Place::PerExpert(sources)
            }
            Form::Experts if self.checkpoint.contains(&blocks_of(&spec.module).0) => {
                let (blocks, offset, step) = blocks_of(&spec.module);
                let scales = format!("{}_scales", blocks.trim_end_matches("_blocks"));
                if !self.checkpoint.contains(&scales) {
                    self.problems.push(format!("{scales} is missing"));
                    return None;
                }
                self.expect(&blocks, &[TensorDType::U8], &[stack, rows * step, cols / 32, 16]);
                self.expect(&scales, &[TensorDType::U8, TensorDType::F8_E8M0], &[stack, rows * step, cols / 32]);
                self.claimed.extend([blocks.clone(), scales.clone()]);
                let (biases, global_scale) = (None, None);
                let source = Source { weight: blocks, scales: Some(scales), biases, global_scale, dtype: DType::Mxfp4 };
                Place::Blocks { source, offset, step }
            }
            Form::EmbedQ | Form::UnembedOut if self.has(&kv_b_module(&spec.module)) => {
                let module = kv_b_module(&spec.module);
                let kv_lora = if spec.form == Form::EmbedQ { rows } else { cols };
                let height = stack * self.kv_b_head;
                Place::KvB(self.required(&module, &[height, kv_lora])?)
            }
            _ => {
                if !spec.optional {
                    self.problems.push(format!("{} is missing", spec.tensor()));
                }
                return None;
            }
        };
        let dtype = match &place {
            Place::Whole(source) | Place::Blocks { source, .. } => source.dtype,
            Place::PerExpert(sources) => sources[0].dtype,
            Place::KvB(source) => split_dtype(source.dtype),
            Place::Nowhere => unreachable!("found above"),
        };
        Some((dtype, place))
    }

    fn has(&self, module: &str) -> bool {
        self.checkpoint.contains(&format!("{module}.weight")) || self.checkpoint.contains(&packed_of(module))
    }

    fn required(&mut self, module: &str, shape: &[usize]) -> Option<Source> {
        if self.has(module) {
            self.source(module, "weight", shape, true)
        } else {
            self.problems.push(format!("{module}.weight is missing"));
            None
        }
    }

    /// Claims the tensors of one module and checks types and shapes.
    fn source(&mut self, module: &str, leaf: &str, shape: &[usize], quantizable: bool) -> Option<Source> {
        let before = self.problems.len();
        let weight = format!("{module}.{leaf}");
        let optional = |checkpoint: &Checkpoint, suffix: &str| {
            Some(format!("{module}.{suffix}")).filter(|name| quantizable && checkpoint.contains(name))
        };
        let mut source = Source {
            weight,
            scales: optional(self.checkpoint, "scales"),
            biases: optional(self.checkpoint, "biases"),
            global_scale: optional(self.checkpoint, "global_scale"),
            dtype: DType::Float(self.float),
        };
        if let Some(scales) = source.scales.clone() {
            let Some(settings) = self.quantization.for_module(module) else {
                self.problems
                    .push(format!("{scales} exists but config.json's quantization says nothing about {module}"));
                self.claimed.extend(source.names().cloned());
                return None;
            };
            let params = self.float_of(&scales).unwrap_or(self.float);
            match settings.dtype(params) {
                Ok(dtype) => source.dtype = dtype,
                Err(e) => {
                    self.problems.push(format!("{module}: {e}"));
                    return None;
                }
            }
        } else if let Some(packed) = optional(self.checkpoint, "weight_packed") {
            // compressed-tensors' mxfp4-pack-quantized: MLX's bits under other names and types.
            let Some(scales) = optional(self.checkpoint, "weight_scale") else {
                self.problems.push(format!("{module}.weight_scale is missing"));
                self.claimed.insert(packed);
                return None;
            };
            (source.weight, source.scales, source.dtype) = (packed, Some(scales), DType::Mxfp4);
        } else if let Some(scales) = optional(self.checkpoint, "weight_scale_inv") {
            source.scales = Some(scales);
            source.dtype = DType::Fp8Block;
        } else if let (true, Some(Some(settings))) = (quantizable, self.quantization.modules.get(module)) {
            // Without this, names alone (no weight files) would pass for an unquantised module.
            let (mode, bits) = (&settings.mode, settings.bits);
            self.problems.push(format!("{module}.scales is missing (config.json says {mode} with {bits} bits)"));
            self.claimed.extend(source.names().cloned());
            return None;
        } else if let Some(float) = self.float_of(&source.weight) {
            source.dtype = DType::Float(float);
        } else if leaf == "e_score_correction_bias" {
            source.dtype = DType::F32; // by name only: published checkpoints keep it in f32
        }
        self.check(&source, shape);
        self.claimed.extend(source.names().cloned());
        (self.problems.len() == before).then_some(source)
    }

    fn float_of(&self, name: &str) -> Option<Float> {
        match self.checkpoint.info(name)?.dtype {
            TensorDType::F32 => Some(Float::F32),
            TensorDType::F16 => Some(Float::F16),
            TensorDType::BF16 => Some(Float::BF16),
            _ => None,
        }
    }

    fn check(&mut self, source: &Source, shape: &[usize]) {
        let dtype = source.dtype;
        let cols = *shape.last().unwrap_or(&1);
        let with_last = |last: usize| [&shape[..shape.len() - 1], &[last]].concat();
        if dtype != DType::Fp8Block && !cols.is_multiple_of(dtype.group_size()) {
            self.problems.push(format!(
                "{}: input dimension {cols} does not divide by the group size {} of {dtype}",
                source.weight,
                dtype.group_size()
            ));
            return;
        }
        let biases_expected = matches!(dtype, DType::Affine { .. });
        if biases_expected != source.biases.is_some() {
            let module = source.weight.trim_end_matches(".weight").trim_end_matches(".weight_packed");
            self.problems.push(if biases_expected {
                format!("{module}.biases is missing ({dtype} has scales and biases)")
            } else {
                format!("{module}.biases exists, but {dtype} has no biases")
            });
        }
        let groups = with_last(cols / dtype.group_size());
        let (weight_type, weight_shape) = match dtype {
            DType::Float(f) => (float_type(f), shape.to_vec()),
            DType::Fp8Block => (TensorDType::F8_E4M3, shape.to_vec()),
            _ if source.weight.ends_with(".weight_packed") => (TensorDType::U8, with_last(cols / 2)),
            _ => (TensorDType::U32, with_last((cols * dtype.bits()).div_ceil(32))),
        };
        self.expect(&source.weight, &[weight_type], &weight_shape);
        match dtype {
            DType::Float(_) => {}
            DType::Affine { params, .. } => {
                for name in [&source.scales, &source.biases].into_iter().flatten() {
                    self.expect(name, &[float_type(params)], &groups);
                }
            }
            DType::Mxfp4 | DType::Mxfp8 | DType::Nvfp4 => {
                let types = [TensorDType::U8, TensorDType::F8_E8M0, TensorDType::F8_E4M3];
                self.expect(source.scales.as_deref().unwrap_or_default(), &types, &groups);
            }
            DType::Fp8Block => {
                // Blocks span rows and columns; a stack keeps one grid per matrix.
                let n_stack = shape.len().saturating_sub(2);
                let mut blocks = shape.to_vec();
                blocks[n_stack..].iter_mut().for_each(|n| *n = n.div_ceil(FP8_BLOCK));
                let types =
                    [TensorDType::F32, TensorDType::BF16, TensorDType::F16, TensorDType::F8_E8M0, TensorDType::U8];
                self.expect(source.scales.as_deref().unwrap_or_default(), &types, &blocks);
            }
        }
    }

    fn expect(&mut self, name: &str, types: &[TensorDType], shape: &[usize]) {
        let Some(info) = self.checkpoint.info(name) else {
            return; // names only
        };
        if !types.contains(&info.dtype) {
            self.problems.push(format!("{name} has type {:?}, expected {:?}", info.dtype, types[0]));
        } else if info.shape != shape {
            self.problems.push(format!("{name} has shape {:?}, expected {shape:?}", info.shape));
        }
    }
}

fn float_type(float: Float) -> TensorDType {
    match float {
        Float::F32 => TensorDType::F32,
        Float::F16 => TensorDType::F16,
        Float::BF16 => TensorDType::BF16,
    }
}

/// `...mlp.switch_mlp.gate_proj` -> `...mlp.experts.{expert}.gate_proj`.
fn expert_module(module: &str, expert: usize) -> String {
    module.replacen("switch_mlp", &format!("experts.{expert}"), 1)
}

/// compressed-tensors' name of a packed weight.
fn packed_of(module: &str) -> String {
    format!("{module}.weight_packed")
}

/// gpt-oss's tensor that holds a stack of experts, the first of its rows and the distance between them:
/// `...mlp.switch_mlp.up_proj` -> `...mlp.experts.gate_up_proj_blocks`, 1, 2.
fn blocks_of(module: &str) -> (String, usize, usize) {
    let (stack, projection) = module.rsplit_once('.').unwrap_or(("", module));
    let stack = stack.replacen("switch_mlp", "experts", 1);
    match projection {
        "gate_proj" => (format!("{stack}.gate_up_proj_blocks"), 0, 2),
        "up_proj" => (format!("{stack}.gate_up_proj_blocks"), 1, 2),
        other => (format!("{stack}.{other}_blocks"), 0, 1),
    }
}

/// `...self_attn.embed_q` -> `...self_attn.kv_b_proj`.
fn kv_b_module(module: &str) -> String {
    match module.rsplit_once('.') {
        Some((attention, _)) => format!("{attention}.kv_b_proj"),
        None => "kv_b_proj".to_string(),
    }
}

/// Splitting `kv_b_proj` transposes a part of it, which packed formats do not survive: those become f32.
fn split_dtype(joint: DType) -> DType {
    match joint {
        DType::Float(f) => DType::Float(f),
        _ => DType::F32,
    }
}

impl Weight {
    /// The matrix with its bytes; from the mapped file wherever the layout allows.
    ///
    /// # Errors
    /// [`CheckpointError::BadScale`] when a scale is not a number.
    pub fn matrix(&self, checkpoint: &Checkpoint) -> Result<MatrixData, CheckpointError> {
        let (stack, rows, cols) = self.spec.dims();
        let parts = match &self.place {
            Place::Whole(source) => split_stack(&load(checkpoint, source)?, source.dtype, stack, rows, cols),
            Place::PerExpert(sources) => sources.iter().map(|s| load(checkpoint, s)).collect::<Result<_, _>>()?,
            Place::KvB(source) => self.split_kv_b(checkpoint, source)?,
            Place::Blocks { source, step: 1, .. } => {
                split_stack(&load(checkpoint, source)?, source.dtype, stack, rows, cols)
            }
            Place::Blocks { source, offset, step } => {
                let joint = load(checkpoint, source)?;
                let pick = |bytes: &Bytes, row_bytes: usize| {
                    let picked: Vec<u8> =
                        bytes.chunks_exact(row_bytes.max(1)).skip(*offset).step_by(*step).flatten().copied().collect();
                    Bytes::from(picked)
                };
                let weight = pick(&joint.weight, source.dtype.weight_bytes(1, cols));
                let scales = pick(&joint.scales, source.dtype.scale_bytes(1, cols));
                split_stack(&MatrixPart { weight, scales, ..joint }, source.dtype, stack, rows, cols)
            }
            Place::Nowhere => {
                return Err(CheckpointError::Mismatch {
                    problems: vec![format!("{} has no data", self.spec.tensor())],
                });
            }
        };
        let data = MatrixData { name: self.spec.module.clone(), dtype: self.dtype, rows, cols, parts };
        if data.dtype.is_quantized() {
            // Every scale of a checkpoint passes here, most of them from memory that nobody has touched yet.
            let scale_bytes = data.parts.first().map_or(0, |p| p.scales.len() + p.biases.len());
            let numbers: Vec<usize> = (0..data.parts.len()).collect();
            let bad = on_threads(&numbers, scale_bytes, |part| quant::has_nan_scale(&data.view(*part)));
            if let Some(index) = bad.into_iter().flatten().next() {
                return Err(CheckpointError::BadScale { tensor: data.name, index });
            }
        }
        Ok(data)
    }

    /// The vector as f32.
    ///
    /// # Errors
    /// As [`Weight::matrix`], and [`CheckpointError::NotFinite`] when an element is NaN or infinite.
    pub fn vector(&self, checkpoint: &Checkpoint) -> Result<Vec<f32>, CheckpointError> {
        let values = self.matrix(checkpoint)?.view(0).dequantize();
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(index) => {
                Err(CheckpointError::NotFinite { tensor: self.spec.tensor(), place: vec![index], value: values[index] })
            }
        }
    }

    fn split_kv_b(&self, checkpoint: &Checkpoint, source: &Source) -> Result<Vec<MatrixPart>, CheckpointError> {
        let (n_heads, rows, cols) = self.spec.dims();
        let joint_part = load(checkpoint, source)?;
        let kv_lora = if self.spec.form == Form::EmbedQ { rows } else { cols };
        let height = match source.dtype {
            DType::Float(f) => joint_part.weight.len() / (kv_lora * f.bytes()),
            other => joint_part.weight.len() * 8 / (kv_lora * other.bits()),
        };
        let joint = MatrixData {
            name: source.weight.clone(),
            dtype: source.dtype,
            rows: height,
            cols: kv_lora,
            parts: vec![joint_part],
        };
        let per_head = height / n_heads;
        let view = joint.view(0);
        if source.dtype.is_quantized()
            && let Some(index) = quant::has_nan_scale(&view)
        {
            return Err(CheckpointError::BadScale { tensor: joint.name, index });
        }
        let DType::Float(float) = self.dtype else { unreachable!("split_dtype is a float") };
        let mut parts = Vec::with_capacity(n_heads);
        for head in 0..n_heads {
            let first = head * per_head;
            let weight = match self.spec.form {
                Form::UnembedOut if source.dtype == self.dtype => {
                    let row_bytes = kv_lora * float.bytes();
                    let start = (first + per_head - rows) * row_bytes;
                    joint.parts[0].weight.slice(start..start + rows * row_bytes)
                }
                Form::UnembedOut => decode_rows(&view, first + per_head - rows, rows, float).into(),
                // Rows are nope dimensions, columns the latent: transpose to [kv_lora, nope].
                _ => {
                    let mut decoded = vec![0.0f32; cols * kv_lora];
                    for (i, row) in decoded.chunks_exact_mut(kv_lora).enumerate() {
                        view.dequantize_row(first + i, row);
                    }
                    let mut bytes = Vec::with_capacity(decoded.len() * float.bytes());
                    for latent in 0..kv_lora {
                        for nope in 0..cols {
                            float.write(decoded[nope * kv_lora + latent], &mut bytes);
                        }
                    }
                    bytes.into()
                }
            };
            parts.push(MatrixPart { weight, ..MatrixPart::default() });
        }
        Ok(parts)
    }
}

fn decode_rows(view: &PackedView<'_>, first: usize, n_rows: usize, float: Float) -> Vec<u8> {
    let mut row = vec![0.0f32; view.cols];
    let mut bytes = Vec::with_capacity(n_rows * view.cols * float.bytes());
    for i in first..first + n_rows {
        view.dequantize_row(i, &mut row);
        for value in &row {
            float.write(*value, &mut bytes);
        }
    }
    bytes
}

fn load(checkpoint: &Checkpoint, source: &Source) -> Result<MatrixPart, CheckpointError> {
    let bytes = |name: &Option<String>| match name {
        Some(name) => tensor_bytes(checkpoint, name),
        None => Ok(Bytes::new()),
    };
    let global = bytes(&source.global_scale)?;
    let mut scales = bytes(&source.scales)?;
    if source.dtype == DType::Fp8Block
        && let Some(info) = source.scales.as_ref().and_then(|name| checkpoint.info(name))
    {
        scales = f32_scales(info.dtype, scales);
    }
    Ok(MatrixPart {
        weight: tensor_bytes(checkpoint, &source.weight)?,
        scales,
        biases: bytes(&source.biases)?,
        global_scale: (global.len() >= 4).then(|| Float::F32.read(&global, 0)),
    })
}

/// Block scales of any published type as f32, which holds every value of them.
fn f32_scales(dtype: TensorDType, bytes: Bytes) -> Bytes {
    let widen = |values: &mut dyn Iterator<Item = f32>| values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into();
    match dtype {
        TensorDType::BF16 => widen(&mut (0..bytes.len() / 2).map(|i| Float::BF16.read(&bytes, i))),
        TensorDType::F16 => widen(&mut (0..bytes.len() / 2).map(|i| Float::F16.read(&bytes, i))),
        // Powers of two; 255 is NaN.
        TensorDType::F8_E8M0 | TensorDType::U8 => {
            widen(&mut bytes.iter().map(|byte| if *byte == u8::MAX { f32::NAN } else { quant::minifloat::e8m0(*byte) }))
        }
        _ => bytes,
    }
}

fn tensor_bytes(checkpoint: &Checkpoint, name: &str) -> Result<Bytes, CheckpointError> {
    checkpoint.bytes(name).ok_or_else(|| CheckpointError::Mismatch { problems: vec![format!("{name} has no data")] })
}

/// Cuts a stacked tensor `[stack, rows, cols]` into its matrices.
fn split_stack(whole: &MatrixPart, dtype: DType, stack: usize, rows: usize, cols: usize) -> Vec<MatrixPart> {
    let slice = |bytes: &Bytes, size: usize, i: usize| {
        if bytes.is_empty() { Bytes::new() } else { bytes.slice(i * size..(i + 1) * size) }
    };
    (0..stack)
        .map(|i| MatrixPart {
            weight: slice(&whole.weight, dtype.weight_bytes(rows, cols), i),
            scales: slice(&whole.scales, dtype.scale_bytes(rows, cols), i),
            biases: slice(&whole.biases, dtype.bias_bytes(rows, cols), i),
            global_scale: whole.global_scale,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stack of f32 matrices `[2, 65536]`, of which element `i` of matrix `p` is `p * 131072 + i`.
    fn stack(n: usize) -> MatrixData {
        let part = |p: usize| {
            let values = (0..2 * 65536).map(|i| (p * 131_072 + i) as f32);
            MatrixPart {
                weight: values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into(),
                ..MatrixPart::default()
            }
        };
        let parts = (0..n).map(part).collect();
        MatrixData { name: "stack".into(), dtype: DType::F32, rows: 2, cols: 65536, parts }
    }

    #[test]
    fn columns_are_cut_from_every_matrix_of_a_stack() {
        // Small enough for one thread, and large enough for several.
        for n in [1, 9] {
            let cut = stack(n).cut(Axis::Cols, 1000..1003);
            assert_eq!((cut.rows, cut.cols, cut.parts.len()), (2, 3, n));
            for p in 0..n {
                let expected: Vec<f32> = [0, 65536]
                    .iter()
                    .flat_map(|row| (1000..1003).map(move |c| (p * 131_072 + row + c) as f32))
                    .collect();
                assert_eq!(cut.view(p).dequantize(), expected, "matrix {p} of {n}");
            }
        }
    }

    #[test]
    fn matrices_that_share_their_bytes_share_what_is_cut_from_them() {
        let mut repeated = stack(1);
        repeated.parts = vec![repeated.parts[0].clone(); 4];
        for axis in [Axis::Rows, Axis::Cols] {
            let cut = repeated.clone().cut(axis, 1..2);
            assert!(cut.parts.iter().all(|p| p.has_bytes_of(&cut.parts[0])), "{axis:?}");
            assert_eq!(cut.view(3).dequantize(), cut.view(0).dequantize());
        }
    }

    #[test]
    fn results_of_several_threads_are_in_order() {
        let numbers: Vec<usize> = (0..100).collect();
        for bytes in [0, 1 << 20] {
            assert_eq!(on_threads(&numbers, bytes, |n| n * n), numbers.iter().map(|n| n * n).collect::<Vec<_>>());
        }
    }
}
