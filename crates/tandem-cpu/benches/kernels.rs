//! Speed of the matrix kernels on one thread, weights in the second-level cache: bytes of weights per second.
//!
//! `cargo bench -p tandem-llm-cpu`; compare with the memory bandwidth per thread that `tandem bench` prints.

use divan::Bencher;
use divan::counter::BytesCount;
use tandem_core::backend::Linear;
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind};
use tandem_core::{Backend, DType, Float, quant};
use tandem_cpu::{CpuBackend, CpuBuffer, Numerics};

const COLS: usize = 2048;
const ROWS: usize = 256;

const FORMATS: [DType; 4] = [
    DType::Mxfp4,
    DType::Affine { bits: 4, group_size: 64, params: Float::BF16 },
    DType::Affine { bits: 8, group_size: 64, params: Float::BF16 },
    DType::BF16,
];
const NUMERICS: [Numerics; 3] = [Numerics::F32, Numerics::Bf16, Numerics::Int8];

fn cases() -> Vec<String> {
    FORMATS.iter().flat_map(|f| NUMERICS.iter().map(move |n| format!("{f}/{}", n.name()))).collect()
}

fn run(bencher: Bencher<'_, '_>, case: &str, n_rows: usize) {
    let find = |f: &DType, n: &Numerics| format!("{f}/{}", n.name()) == case;
    let (dtype, numerics) = FORMATS
        .iter()
        .flat_map(|f| NUMERICS.iter().map(move |n| (*f, *n)))
        .find(|(f, n)| find(f, n))
        .expect("a case of the list");
    let values: Vec<f32> = (0..ROWS * COLS).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect();
    let packed = quant::quantize(dtype, ROWS, COLS, &values).expect("fits");
    let part = MatrixPart {
        weight: packed.weight.into(),
        scales: packed.scales.into(),
        biases: packed.biases.into(),
        global_scale: None,
    };
    let data = MatrixData { name: case.to_string(), dtype, rows: ROWS, cols: COLS, parts: vec![part] };
    let bytes = data.bytes();
    let backend = CpuBackend::new(1, numerics);
    let matrix = backend.load_matrix(data);
    let x = CpuBuffer::new(values[..n_rows * COLS].to_vec(), COLS);
    let mut out = backend.alloc(n_rows, ROWS);
    bencher.counter(BytesCount::new(bytes)).bench_local(|| {
        let outputs = &mut [(&matrix, &mut out)];
        backend.linear(Linear { x: &x, n_rows, outputs, label: ModuleKind::Attention });
    });
}

/// One token: bounded by memory when faster than it.
#[divan::bench(args = cases())]
fn decode(bencher: Bencher<'_, '_>, case: &str) {
    run(bencher, case, 1);
}

/// 128 tokens: bounded by arithmetic; 2 * 128 * 256 * 2048 operations a call.
#[divan::bench(args = cases())]
fn prefill_128(bencher: Bencher<'_, '_>, case: &str) {
    run(bencher, case, 128);
}

fn main() {
    divan::main();
}
