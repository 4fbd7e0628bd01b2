//! A config.json and a safetensors file from any bytes: opening, resolving and reading every weight must not panic.
//!
//! Input: one byte of mode, u16 length of the configuration's text, the text, the rest. Mode 0 takes the rest as the
//! file. Otherwise the rest decides, tensor by tensor, how a file made for the configuration deviates from what is
//! asked: such files get past the strict checks, where random bytes never would.

#![no_main]

mod shared;

use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};
use shared::in_folder;
use tandem_core::weights::{Form, WeightSpec};
use tandem_core::{Checkpoint, ModelConfig};
use tandem_model::Accounting;

const MAX_FILE: usize = 1 << 20;
const MAX_TENSORS: usize = 600;

fuzz_target!(|data: &[u8]| {
    let [mode, low, high, rest @ ..] = data else { return };
    let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
    let (text, rest) = rest.split_at(length);
    let config = std::str::from_utf8(text).ok().and_then(|text| ModelConfig::parse(text).ok());
    let file = match (mode, &config) {
        (0, _) => Some(rest.to_vec()),
        (_, Some(config)) => fitting_file(config, rest),
        _ => None,
    };
    let Some(file) = file else { return };
    in_folder(|dir| {
        std::fs::write(dir.join("model.safetensors"), file).expect("writable");
        let Ok(checkpoint) = Checkpoint::open(dir) else { return };
        for name in checkpoint.names() {
            assert_eq!(checkpoint.bytes(name).map(|b| b.len()), checkpoint.info(name).map(|i| i.bytes()));
        }
        let Some(config) = config else { return };
        match tandem_model::resolve(&checkpoint, &config) {
            Ok(weights) => {
                let accounting = Accounting::new(&weights, &config);
                let _ = accounting.total(|k| k.resident_bytes);
                for weight in &weights {
                    // Backends take the parts as they are: their sizes must be what the format says.
                    if let Ok(matrix) = weight.matrix(&checkpoint) {
                        for part in 0..matrix.parts.len() {
                            let view = matrix.view(part);
                            let size = view.weight.len() + view.scales.len() + view.biases.len();
                            assert_eq!(size, matrix.dtype.total_bytes(matrix.rows, matrix.cols), "{}", matrix.name);
                            let _ = view.dequantize();
                        }
                    }
                    if weight.spec.form == Form::Vector {
                        let _ = weight.vector(&checkpoint);
                    }
                }
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
});

/// Bytes of the input, one by one, then zeros.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn next(&mut self) -> u8 {
        match self.0 {
            [first, rest @ ..] => {
                self.0 = rest;
                *first
            }
            [] => 0,
        }
    }
}

struct File {
    header: Map<String, Value>,
    data: Vec<u8>,
    fill: u8,
}

impl File {
    fn add(&mut self, name: String, dtype: &str, bits: usize, shape: &[usize]) {
        let bytes = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).and_then(|n| n.checked_mul(bits));
        let Some(bytes) = bytes.map(|bits| bits / 8).filter(|b| self.data.len() + b <= MAX_FILE) else { return };
        let start = self.data.len();
        self.data.resize(start + bytes, self.fill);
        self.header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, start + bytes]}));
    }
}

/// A safetensors file for `config`, each tensor as `choices` say.
fn fitting_file(config: &ModelConfig, choices: &[u8]) -> Option<Vec<u8>> {
    if config.num_hidden_layers > 4 || config.num_nextn_predict_layers > 2 {
        return None;
    }
    let mut choices = Choices(choices);
    let mut file = File { header: Map::new(), data: vec![], fill: choices.next() };
    let mtp = if choices.next() & 1 == 0 { vec![] } else { tandem_model::mtp_specs(config) };
    for spec in tandem_model::weight_specs(config).iter().chain(&mtp) {
        if file.header.len() > MAX_TENSORS {
            return None;
        }
        add_spec(&mut file, spec, config, &mut choices);
    }
    let header = serde_json::to_vec(&file.header).ok()?;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(&file.data);
    Some(bytes)
}

fn add_spec(file: &mut File, spec: &WeightSpec, config: &ModelConfig, choices: &mut Choices<'_>) {
    let choice = choices.next();
    let (stack, rows, cols) = spec.dims();
    match (spec.form, choice >> 4) {
        (Form::Vector, _) | (_, 0) => {
            add_module(file, &spec.module, spec.leaf, &spec.shape, choice & 15, config, choices);
        }
        (Form::Experts, _) => {
            for expert in 0..stack.min(32) {
                let module = spec.module.replacen("switch_mlp", &format!("experts.{expert}"), 1);
                add_module(file, &module, "weight", &[rows, cols], choice & 15, config, choices);
            }
        }
        (Form::EmbedQ, _) => {
            let module = spec.module.replacen("embed_q", "kv_b_proj", 1);
            let head = config.mla.as_ref().map_or(1, |m| m.qk_nope_head_dim + m.v_head_dim);
            add_module(file, &module, "weight", &[stack * head, rows], choice & 15, config, choices);
        }
        (Form::UnembedOut, _) => {}
        (_, _) => add_module(file, &spec.module, spec.leaf, &spec.shape, choice & 15, config, choices),
    }
}

/// The tensors of one module; `kind` says in which type, and how they are wrong.
fn add_module(
    file: &mut File,
    module: &str,
    leaf: &str,
    shape: &[usize],
    kind: u8,
    config: &ModelConfig,
    choices: &mut Choices<'_>,
) {
    let weight = format!("{module}.{leaf}");
    let cols = *shape.last().unwrap_or(&1);
    let last = |n: usize| [&shape[..shape.len() - 1], &[n]].concat();
    match kind {
        0 => {
            let f32 = leaf == "e_score_correction_bias";
            file.add(weight, if f32 { "F32" } else { "BF16" }, if f32 { 32 } else { 16 }, shape);
        }
        1 => file.add(weight, "F32", 32, shape),
        2 => file.add(weight, "F16", 16, shape),
        3 => file.add(weight, "I32", 32, shape),
        4 => {}
        5 => file.add(weight, "BF16", 16, &last(cols + 1)),
        6 => {
            file.add(weight, "F8_E4M3", 8, shape);
            let stacked = shape.len().saturating_sub(2) * usize::from(choices.next() & 1 == 0);
            let block = |(i, n): (usize, &usize)| if i < stacked { *n } else { n.div_ceil(128) };
            let blocks: Vec<usize> = shape.iter().enumerate().map(block).collect();
            file.add(format!("{module}.weight_scale_inv"), "F32", 32, &blocks);
        }
        _ => {
            let (bits, group, affine) = match config.quantization.for_module(module) {
                Some(q) => (q.bits, q.group_size.max(1), q.mode == "affine"),
                None => (4, 32, kind & 1 == 0),
            };
            let packed = cols.saturating_mul(bits).div_ceil(32);
            file.add(weight, "U32", 32, &last(packed + usize::from(kind == 15)));
            let (dtype, width) = if affine { ("BF16", 16) } else { ("U8", 8) };
            file.add(format!("{module}.scales"), dtype, width, &last(cols / group));
            if affine != (kind == 14) {
                file.add(format!("{module}.biases"), dtype, width, &last(cols / group));
            }
            if kind == 13 {
                let shape: &[usize] = if choices.next() & 1 == 0 { &[] } else { &[1] };
                file.add(format!("{module}.global_scale"), "F32", 32, shape);
            }
        }
    }
}
