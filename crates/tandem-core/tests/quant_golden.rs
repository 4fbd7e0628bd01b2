//! Bit-exact agreement of the codecs with MLX 0.32.4's CPU backend (`tests/golden/quant`, one file per mode).

use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tandem_core::dtype::{DType, Float};
use tandem_core::quant::minifloat::{E4M3, e8m0};
use tandem_core::quant::{PackedView, QuantError, has_nan_scale, quantize};

/// One golden file and the mode it is for.
struct Golden<'a> {
    name: &'a str,
    tensors: SafeTensors<'a>,
    /// What all modes were given, and values that depend on the bits of a code only (`NAME.bBITS`).
    shared: SafeTensors<'a>,
}

impl Golden<'_> {
    fn has(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_ok()
    }

    fn tensor(&self, name: &str) -> TensorView<'_> {
        let of_bits = || format!("{name}.{}", self.name.split('_').nth(1).unwrap());
        let found = self.tensors.tensor(name).or_else(|_| self.shared.tensor(name));
        let found = found.or_else(|_| self.shared.tensor(&of_bits()));
        found.unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name))
    }

    fn shape<const N: usize>(&self, name: &str) -> [usize; N] {
        let view = self.tensor(name);
        view.shape().try_into().unwrap_or_else(|_| panic!("{}: {name} has shape {:?}", self.name, view.shape()))
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.tensor(name).data().to_vec()
    }

    /// Bytes of a tensor that only some modes have.
    fn bytes_or_empty(&self, name: &str) -> Vec<u8> {
        if self.has(name) { self.bytes(name) } else { Vec::new() }
    }

    fn float_type(&self, name: &str) -> Float {
        match self.tensor(name).dtype() {
            Dtype::F32 => Float::F32,
            Dtype::F16 => Float::F16,
            Dtype::BF16 => Float::BF16,
            other => panic!("{}: {name} has type {other:?}, expected a float", self.name),
        }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let (float, bytes) = (self.float_type(name), self.bytes(name));
        (0..bytes.len() / float.bytes()).map(|i| float.read(&bytes, i)).collect()
    }

    /// Storage format, from the file name and, for affine, the type of the scales.
    fn dtype(&self, scales: &str) -> DType {
        let mut parts = self.name.split('_');
        let (mode, bits, group) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
        match mode {
            "affine" => DType::Affine {
                bits: bits[1..].parse().unwrap(),
                group_size: group[1..].parse().unwrap(),
                params: self.float_type(scales),
            },
            "mxfp4" => DType::Mxfp4,
            "mxfp8" => DType::Mxfp8,
            "nvfp4" => DType::Nvfp4,
            _ => panic!("{}: unknown mode", self.name),
        }
    }
}

/// One file of each mode has products: what else differs is the codec, whose values are compared bit for bit.
const WITH_PRODUCTS: [&str; 4] = ["affine_b4_g64", "mxfp4", "mxfp8", "nvfp4"];

/// Runs `test` on every golden file whose name starts with `prefix`.
fn for_each_golden(prefix: &str, test: impl Fn(&Golden<'_>)) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/quant");
    let shared = std::fs::read(dir.join("shared/edge.safetensors")).unwrap();
    let mut n_files = 0;
    for entry in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if path.extension().is_some_and(|e| e == "safetensors") && name.starts_with(prefix) {
            let bytes = std::fs::read(&path).unwrap();
            let [tensors, shared] = [&bytes, &shared].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
            test(&Golden { name, tensors, shared });
            n_files += 1;
        }
    }
    assert!(n_files > 0, "no golden {prefix}*.safetensors in {}", dir.display());
}

/// Same bits, or both NaN.
#[track_caller]
fn check_floats(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(f.to_bits() == e.to_bits() || f.is_nan() && e.is_nan(), "{what}[{i}]: found {f:e}, expected {e:e}");
    }
}

#[track_caller]
fn check_bytes(what: &str, found: &[u8], expected: &[u8]) {
    let first = found.iter().zip(expected).position(|(f, e)| f != e);
    assert_eq!((first, found.len()), (None, expected.len()), "{what}: (first different byte, length)");
}

/// `|found - expected| <= 2e-5`, the fixtures' bound for f32 activations.
#[track_caller]
fn check_close(what: &str, found: &[f64], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - f64::from(*e)).abs() <= 2e-5, "{what}[{i}]: found {f:e}, expected {e:e}");
    }
}

/// `x @ w^T`: `x` `[m, k]`, `w` `[n, k]`.
fn matmul_nt(x: &[f32], w: &[f32], k: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

/// `[rows, cols]` to `[cols, rows]`.
fn transposed(w: &[f32], cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| w.iter().skip(col).step_by(cols).copied()).collect()
}

/// Decodes `{prefix}.packed/scales/biases`, `[rows, cols]`.
fn decode(golden: &Golden<'_>, prefix: &str, rows: usize, cols: usize) -> Vec<f32> {
    let name = |part: &str| format!("{prefix}.{part}");
    let (weight, scales) = (golden.bytes(&name("packed")), golden.bytes(&name("scales")));
    let biases = golden.bytes_or_empty(&name("biases"));
    let dtype = golden.dtype(&name("scales"));
    let view = PackedView::new(dtype, rows, cols, &weight, &scales, &biases).unwrap();
    let whole = view.dequantize();
    let mut row = vec![0.0; cols];
    for (r, expected) in whole.chunks_exact(cols).enumerate() {
        view.dequantize_row(r, &mut row);
        check_floats(&format!("{} {prefix} row {r}", golden.name), &row, expected);
    }
    whole
}

#[test]
fn dequantize_matches_mlx() {
    for_each_golden("", |golden| {
        for prefix in ["f32", "bf16", "edge"] {
            let [rows, cols] = golden.shape(&format!("{prefix}.w"));
            let expected = golden.floats(&format!("{prefix}.dequant"));
            check_floats(&format!("{} {prefix}", golden.name), &decode(golden, prefix, rows, cols), &expected);
        }
    });
}

#[test]
fn quantize_matches_mlx() {
    for_each_golden("", |golden| {
        for prefix in ["f32", "bf16", "edge"] {
            let name = |part: &str| format!("{prefix}.{part}");
            let dtype = golden.dtype(&name("scales"));
            let [rows, cols] = golden.shape(&name("w"));
            let of_mlx = decode(golden, prefix, rows, cols);
            let parts = ["packed", "scales", "biases"].map(|part| (part, golden.bytes_or_empty(&name(part))));
            for (row, values) in golden.floats(&name("w")).chunks_exact(cols).enumerate() {
                let what = format!("{} {prefix} row {row}", golden.name);
                let packed = match quantize(dtype, 1, cols, values) {
                    Ok(packed) => packed,
                    // MLX writes infinite scales where the range of a group has no f32; that is refused here.
                    Err(QuantError::Overflow { .. }) => {
                        let row = &of_mlx[row * cols..(row + 1) * cols];
                        assert!(row.iter().any(|value| !value.is_finite()), "{what}: MLX can write this row");
                        continue;
                    }
                    Err(error) => panic!("{what}: {error}"),
                };
                // MLX's CPU encoder wraps E8M0 scales below 2^-127; its GPU encoder clamps them, and so do we.
                let largest = values.iter().fold(0.0f32, |largest, value| value.abs().max(largest));
                let wraps = dtype == DType::Mxfp8 && largest > 0.0 && largest / 448.0 < e8m0(0);
                let mine = [&packed.weight, &packed.scales, &packed.biases];
                for ((part, expected), mine) in parts.iter().zip(mine) {
                    let range = row * mine.len()..(row + 1) * mine.len();
                    let gpu = if wraps { golden.bytes_or_empty(&name(&format!("{part}_gpu"))) } else { Vec::new() };
                    let expected = if wraps { &gpu } else { expected };
                    check_bytes(&format!("{what} {part}"), mine, &expected[range]);
                }
            }
        }
    });
}

#[test]
fn fp4_tables_match_every_code_under_every_scale() {
    for prefix in ["mxfp4", "nvfp4"] {
        for_each_golden(prefix, |golden| {
            let dtype = golden.dtype("table.scales");
            let cols = dtype.group_size();
            let found = decode(golden, "table", 256, cols);
            check_floats(golden.name, &found, &golden.floats("table.dequant"));

            let (weight, scales) = (golden.bytes("table.packed"), golden.bytes("table.scales"));
            let view = PackedView::new(dtype, 256, cols, &weight, &scales, &[]).unwrap();
            assert_eq!(has_nan_scale(&view), Some(if dtype == DType::Mxfp4 { 255 } else { 0x7f }));
        });
    }
}

#[test]
fn byte_tables_match() {
    let e8m0_table: Vec<f32> = (0..=255).map(e8m0).collect();
    for_each_golden("mxfp8", |golden| {
        check_floats("e4m3", &E4M3, &golden.floats("table.e4m3_values"));
        check_floats("e8m0", &e8m0_table, &golden.floats("table.e8m0_values"));
    });
    for_each_golden("nvfp4", |golden| check_floats("e4m3", &E4M3, &golden.floats("table.e4m3_scale_values")));
}

#[test]
fn products_match() {
    let test = |golden: &Golden<'_>| {
        for prefix in ["f32", "bf16"] {
            let name = |part: &str| format!("{prefix}.{part}");
            let [rows, cols] = golden.shape(&name("w"));
            let w = decode(golden, prefix, rows, cols);
            let y = matmul_nt(&golden.floats(&name("x")), &w, cols);
            check_close(&format!("{} {prefix}.y", golden.name), &y, &golden.floats(&name("y")));
            let yt = matmul_nt(&golden.floats(&name("xt")), &transposed(&w, cols), rows);
            check_close(&format!("{} {prefix}.yt", golden.name), &yt, &golden.floats(&name("yt")));
        }
    };
    WITH_PRODUCTS.iter().for_each(|name| for_each_golden(name, test));
}

#[test]
fn expert_products_match() {
    let test = |golden: &Golden<'_>| {
        let [n_experts, rows, _] = golden.shape("gather.packed");
        let [_, _, _, cols] = golden.shape("gather.x");
        let [_, n_chosen] = golden.shape("gather.indices");
        let stack = decode(golden, "gather", n_experts * rows, cols);
        let x = golden.floats("gather.x");
        let indices: Vec<usize> = golden
            .bytes("gather.indices")
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
            .collect();
        let experts = stack.chunks_exact(rows * cols).collect::<Vec<_>>();
        let y: Vec<f64> = x
            .chunks_exact(cols)
            .zip(indices.chunks_exact(n_chosen))
            .flat_map(|(x, chosen)| chosen.iter().flat_map(|e| matmul_nt(x, experts[*e], cols)).collect::<Vec<_>>())
            .collect();
        check_close(&format!("{} gather", golden.name), &y, &golden.floats("gather.y"));
    };
    WITH_PRODUCTS.iter().for_each(|name| for_each_golden(name, test));
}
