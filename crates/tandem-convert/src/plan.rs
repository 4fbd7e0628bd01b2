//! What a conversion writes: files, tensors and their places, and config.json. Nothing here reads or writes weights.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::ensure;
use serde_json::{Map, Value, json};
use tandem_core::weights::{Weight, WeightSpec};
use tandem_core::{DType, Float, ModelConfig};

/// Elements of one task, at most, unless 128 rows have more.
const TASK_ELEMENTS: usize = 1 << 22;
/// First rows of tasks are multiples of this, the side of fp8's square blocks.
const ROW_UNIT: usize = 128;

/// The files of a new checkpoint.
pub(super) struct Plan {
    pub(super) shards: Vec<Shard>,
    /// Every weight in its new format.
    pub(super) weights: Vec<Weight>,
    pub(super) config_json: Map<String, Value>,
}

/// One safetensors file.
pub(super) struct Shard {
    pub(super) name: String,
    /// Length word and header, to be written at the start.
    pub(super) header: Vec<u8>,
    /// Length of the file.
    pub(super) bytes: u64,
    pub(super) items: Vec<Item>,
    tensors: Vec<String>,
}

/// A weight in a file.
pub(super) struct Item {
    /// Index into the source's weights.
    pub(super) weight: usize,
    /// Offsets in the file of packed elements, scales and biases.
    pub(super) at: [u64; 3],
}

/// Some rows of one matrix.
#[derive(Clone, Debug)]
pub(super) struct Task {
    /// Index into the file's items.
    pub(super) item: usize,
    /// Matrix of the stack.
    pub(super) part: usize,
    pub(super) rows: Range<usize>,
}

impl Plan {
    /// Lays out `source` in new formats, in files of at most `max_shard_size` bytes.
    pub(super) fn new(
        config_json: &Map<String, Value>,
        config: &ModelConfig,
        source: &[Weight],
        dtypes: &[DType],
        max_shard_size: u64,
    ) -> anyhow::Result<Plan> {
        let weights: Vec<Weight> =
            source.iter().zip(dtypes).map(|(w, dtype)| Weight::nowhere(w.spec.clone(), *dtype)).collect();
        let mut groups: Vec<Vec<usize>> = vec![];
        let mut filled = u64::MAX;
        for (i, weight) in weights.iter().enumerate() {
            let bytes = weight.bytes() as u64;
            if filled.saturating_add(bytes) > max_shard_size {
                groups.push(vec![]);
                filled = 0;
            }
            filled += bytes;
            groups.last_mut().expect("just pushed").push(i);
        }
        ensure!(groups.len() < 100_000, "{} files are too many; raise --max-shard-size", groups.len());
        let n = groups.len();
        let name = |i: usize| match n {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let shards = groups.iter().enumerate().map(|(i, group)| Shard::new(name(i), group, &weights)).collect();
        Ok(Plan { shards, config_json: new_config(config_json, config, &weights), weights })
    }

    /// model.safetensors.index.json.
    pub(super) fn index(&self) -> Value {
        let map: BTreeMap<&str, &str> =
            self.shards.iter().flat_map(|s| s.tensors.iter().map(|t| (t.as_str(), s.name.as_str()))).collect();
        json!({
            "metadata": {
                "total_size": self.weights.iter().map(|w| w.bytes() as u64).sum::<u64>(),
                "total_parameters": self.weights.iter().map(|w| w.spec.elements() as u64).sum::<u64>(),
            },
            "weight_map": map,
        })
    }

    /// What the files will hold, as text; equal for equal conversions.
    pub(super) fn fingerprint(&self) -> String {
        let formats: Vec<String> = self
            .weights
            .iter()
            .map(|w| format!("{}.{} {} {:?}", w.spec.module, w.spec.leaf, w.dtype, w.spec.shape))
            .collect();
        let sizes: Vec<u64> = self.shards.iter().map(|s| s.bytes).collect();
        format!("{formats:?} {sizes:?}")
    }
}

impl Shard {
    fn new(name: String, group: &[usize], weights: &[Weight]) -> Shard {
        let mut items: Vec<Item> = group.iter().map(|weight| Item { weight: *weight, at: [0; 3] }).collect();
        // Wide elements first: then every tensor is aligned to its elements.
        let mut order: Vec<(usize, usize, Tensor)> = items
            .iter()
            .enumerate()
            .flat_map(|(i, item)| tensors(&weights[item.weight]).into_iter().map(move |(kind, t)| (i, kind, t)))
            .collect();
        order.sort_by_key(|(_, _, tensor)| std::cmp::Reverse(tensor.width));
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "mlx"}));
        let mut end = 0u64;
        for (_, _, tensor) in &order {
            let start = end;
            end += tensor.bytes;
            let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
            header.insert(tensor.name.clone(), entry);
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let base = 8 + text.len() as u64;
        let mut at = base;
        for (item, kind, tensor) in &order {
            items[*item].at[*kind] = at;
            at += tensor.bytes;
        }
        let header = [(text.len() as u64).to_le_bytes().to_vec(), text].concat();
        Shard { name, header, bytes: at, items, tensors: order.into_iter().map(|(_, _, t)| t.name).collect() }
    }

    /// The work that fills the file, weight by weight.
    pub(super) fn tasks(&self, weights: &[Weight]) -> Vec<Task> {
        let mut tasks = vec![];
        for (item, place) in self.items.iter().enumerate() {
            let (stack, rows, cols) = weights[place.weight].spec.dims();
            let step = (TASK_ELEMENTS / cols.max(1) / ROW_UNIT * ROW_UNIT).max(ROW_UNIT);
            for part in 0..stack {
                let ranges = (0..rows).step_by(step).map(|first| first..rows.min(first + step));
                tasks.extend(ranges.map(|rows| Task { item, part, rows }));
            }
        }
        tasks
    }
}

impl Item {
    /// Offsets in the file of the pieces that a task fills.
    pub(super) fn places(&self, weight: &Weight, task: &Task) -> [u64; 3] {
        let (_, rows, cols) = weight.spec.dims();
        let dtype = weight.dtype;
        let first = task.part * rows + task.rows.start;
        let sizes = [dtype.weight_bytes(1, cols), dtype.scale_bytes(1, cols), dtype.bias_bytes(1, cols)];
        std::array::from_fn(|i| self.at[i] + (first * sizes[i]) as u64)
    }
}

struct Tensor {
    name: String,
    dtype: &'static str,
    width: usize,
    shape: Vec<usize>,
    bytes: u64,
}

/// The tensors of a weight; 0 are elements, 1 scales, 2 biases.
fn tensors(weight: &Weight) -> Vec<(usize, Tensor)> {
    let WeightSpec { module, leaf, shape, .. } = &weight.spec;
    let (stack, rows, cols) = weight.spec.dims();
    let tensor = |name: String, (dtype, width): (&'static str, usize), last: usize, bytes: usize| {
        let mut shape = shape.clone();
        *shape.last_mut().expect("a weight has dimensions") = last;
        Tensor { name, dtype, width, shape, bytes: (stack * bytes) as u64 }
    };
    let float = |float: Float| match float {
        Float::F32 => ("F32", 4),
        Float::F16 => ("F16", 2),
        Float::BF16 => ("BF16", 2),
    };
    let name = format!("{module}.{leaf}");
    let dtype = weight.dtype;
    let packed = cols * dtype.bits() / 32;
    let groups = cols / dtype.group_size();
    let elements = |kind, last| (0, tensor(name.clone(), kind, last, dtype.weight_bytes(rows, cols)));
    let scales = |kind| (1, tensor(format!("{module}.scales"), kind, groups, dtype.scale_bytes(rows, cols)));
    match dtype {
        DType::Float(f) => vec![elements(float(f), cols)],
        DType::Affine { params, .. } => vec![
            elements(("U32", 4), packed),
            scales(float(params)),
            (2, tensor(format!("{module}.biases"), float(params), groups, dtype.bias_bytes(rows, cols))),
        ],
        DType::Mxfp4 | DType::Mxfp8 | DType::Nvfp4 => vec![elements(("U32", 4), packed), scales(("U8", 1))],
        DType::Fp8Block => unreachable!("MLX has no fp8 in square blocks, and no recipe asks for it"),
    }
}

/// config.json with MLX's `quantization` section: the most common format on top, others by module.
fn new_config(source: &Map<String, Value>, config: &ModelConfig, weights: &[Weight]) -> Map<String, Value> {
    let settings = |dtype: DType| {
        let mode = match dtype {
            DType::Mxfp4 => "mxfp4",
            DType::Mxfp8 => "mxfp8",
            DType::Nvfp4 => "nvfp4",
            DType::Affine { .. } => "affine",
            DType::Float(_) | DType::Fp8Block => unreachable!("{dtype} has no mode of MLX"),
        };
        json!({"group_size": dtype.group_size(), "bits": dtype.bits(), "mode": mode})
    };
    let mut out = source.clone();
    out.remove("quantization");
    out.remove("quantization_config");
    let quantized: Vec<(&str, Value)> = weights
        .iter()
        .filter(|w| w.dtype.is_quantized())
        .map(|w| (w.spec.module.as_str(), settings(w.dtype)))
        .collect();
    let n_like = |value: &Value| quantized.iter().filter(|(_, other)| other == value).count();
    if let Some((_, Value::Object(common))) = quantized.iter().max_by_key(|(_, value)| n_like(value)) {
        let mut section = common.clone();
        for (module, value) in &quantized {
            if value.as_object() != Some(common) {
                section.insert(module.to_string(), value.clone());
            }
        }
        // mlx-lm writes both.
        out.insert("quantization".into(), json!(section));
        out.insert("quantization_config".into(), json!(section));
    }
    // The type that readers give to what is not quantised.
    let floats =
        |float| weights.iter().filter(|w| w.dtype == DType::Float(float)).map(|w| w.spec.elements()).sum::<usize>();
    if quantized.is_empty() && floats(config.float) == 0 {
        let (name, _) = [("bfloat16", Float::BF16), ("float16", Float::F16), ("float32", Float::F32)]
            .into_iter()
            .max_by_key(|(_, float)| floats(*float))
            .expect("three");
        let key = if out.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        out.insert(key.into(), json!(name));
    }
    out
}
