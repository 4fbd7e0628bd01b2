//! One matrix times one token, many times: what scripts/instruction-counts counts.
//!
//! `matvec FORMAT NUMERICS REPEATS`: mxfp4 or affine8, and f32, bf16 or int8; 256 rows of 2048 columns, one thread.

use tandem_core::backend::Linear;
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind};
use tandem_core::{Backend, DType, Float, quant};
use tandem_cpu::{CpuBackend, CpuBuffer, Numerics};

const ROWS: usize = 256;
const COLS: usize = 2048;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [format, numerics, repeats] = &args[..] else {
        eprintln!("usage: matvec mxfp4|affine8 f32|bf16|int8 REPEATS");
        std::process::exit(2);
    };
    let dtype = match format.as_str() {
        "mxfp4" => DType::Mxfp4,
        _ => DType::Affine { bits: 8, group_size: 64, params: Float::BF16 },
    };
    let numerics = match numerics.as_str() {
        "int8" => Numerics::Int8,
        "bf16" => Numerics::Bf16,
        _ => Numerics::F32,
    };
    let values: Vec<f32> = (0..ROWS * COLS).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
    let packed = quant::quantize(dtype, ROWS, COLS, &values).expect("the shape fits");
    let part = MatrixPart {
        weight: packed.weight.into(),
        scales: packed.scales.into(),
        biases: packed.biases.into(),
        global_scale: None,
    };
    let backend = CpuBackend::new(1, numerics);
    let data = MatrixData { name: format.clone(), dtype, rows: ROWS, cols: COLS, parts: vec![part] };
    let matrix = backend.load_matrix(data);
    let x = CpuBuffer::new(values[..COLS].to_vec(), COLS);
    let mut out = backend.alloc(1, ROWS);
    for _ in 0..repeats.parse().unwrap_or(1) {
        let outputs = &mut [(&matrix, &mut out)];
        backend.linear(Linear { x: &x, n_rows: 1, outputs, label: ModuleKind::Attention });
    }
    println!("{} {format} {ROWS}x{COLS}: {}", backend.isa(), out.row(0)[0]);
}
