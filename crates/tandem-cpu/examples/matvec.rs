//! One matrix times a few tokens, many times: what scripts/instruction-counts counts, and how fast a kernel is when the
//! weights are in the processor's own cache.
//!
//! `matvec FORMAT NUMERICS REPEATS [ISA [TOKENS]]`: mxfp4, nvfp4, mxfp8, affine4, affine8 or bf16; f32, bf16 or int8;
//! 256 rows of 2048 columns, one thread.

use std::time::Instant;

use tandem_core::backend::Linear;
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind};
use tandem_core::{Backend, DType, Float, quant};
use tandem_cpu::{CpuBackend, CpuBuffer, Isa, Numerics};

const ROWS: usize = 256;
const COLS: usize = 2048;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [format, numerics, repeats, rest @ ..] = &args[..] else {
        eprintln!("usage: matvec FORMAT NUMERICS REPEATS [ISA [TOKENS]]");
        std::process::exit(2);
    };
    let affine = |bits| DType::Affine { bits, group_size: 64, params: Float::BF16 };
    let dtype = match format.as_str() {
        "mxfp4" => DType::Mxfp4,
        "nvfp4" => DType::Nvfp4,
        "mxfp8" => DType::Mxfp8,
        "affine4" => affine(4),
        "bf16" => DType::BF16,
        _ => affine(8),
    };
    let numerics = match numerics.as_str() {
        "int8" => Numerics::Int8,
        "bf16" => Numerics::Bf16,
        _ => Numerics::F32,
    };
    let isa = rest.first().map_or(Isa::detect(), |name| name.parse().unwrap_or_else(|error| panic!("{error}")));
    let n_tokens = rest.get(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    let repeats: usize = repeats.parse().unwrap_or(1);
    let n = ROWS.max(n_tokens) * COLS;
    let values: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
    let packed = quant::quantize(dtype, ROWS, COLS, &values[..ROWS * COLS]).expect("the shape fits");
    let part = MatrixPart {
        weight: packed.weight.into(),
        scales: packed.scales.into(),
        biases: packed.biases.into(),
        global_scale: None,
    };
    let backend = CpuBackend::with_isa(1, numerics, isa);
    let data = MatrixData { name: format.clone(), dtype, rows: ROWS, cols: COLS, parts: vec![part] };
    let bytes = data.bytes();
    let matrix = backend.load_matrix(data);
    let x = CpuBuffer::new(values[..n_tokens * COLS].to_vec(), COLS);
    let mut out = backend.alloc(n_tokens, ROWS);
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let start = Instant::now();
        let outputs = &mut [(&matrix, &mut out)];
        backend.linear(Linear { x: &x, n_rows: n_tokens, outputs, label: ModuleKind::Attention });
        best = best.min(start.elapsed().as_secs_f64());
    }
    let operations = 2.0 * (ROWS * COLS * n_tokens) as f64;
    println!(
        "{} {format} {} {n_tokens} tokens: {:.1} GB/s, {:.0} GFLOP/s ({})",
        backend.isa(),
        numerics.name(),
        bytes as f64 / best / 1e9,
        operations / best / 1e9,
        out.row(0)[0]
    );
}
