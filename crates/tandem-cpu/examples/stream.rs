//! Speed of the matrix kernels on weights in memory, against plain reads of as many bytes by the same threads in turns.
//!
//! `stream FORMAT NUMERICS [ISA [THREADS [ROUNDS]]]`: mxfp4, nvfp4, affine4, affine8 or bf16; f32, bf16 or int8. The
//! matrices are a stack of 2048 x 6144, as experts are, of 1 GB in all; each round reads a quarter of them.

use std::time::Instant;

use tandem_core::backend::Linear;
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind};
use tandem_core::{Backend, DType, Float, quant};
use tandem_cpu::bandwidth::ReadMeter;
use tandem_cpu::{CpuBackend, CpuBuffer, Isa, Numerics, system};

const ROWS: usize = 2048;
const COLS: usize = 6144;
const BYTES: usize = 1 << 30;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [format, numerics, rest @ ..] = &args[..] else {
        eprintln!("usage: stream FORMAT NUMERICS [ISA [THREADS [ROUNDS]]]");
        std::process::exit(2);
    };
    let affine = |bits| DType::Affine { bits, group_size: 64, params: Float::BF16 };
    let dtype = match format.as_str() {
        "mxfp4" => DType::Mxfp4,
        "nvfp4" => DType::Nvfp4,
        "affine4" => affine(4),
        "bf16" => DType::BF16,
        _ => affine(8),
    };
    let numerics: Numerics = numerics.parse().unwrap_or_else(|error| panic!("{error}"));
    let isa = rest.first().map_or(Isa::detect(), |name| name.parse().unwrap_or_else(|error| panic!("{error}")));
    let number = |i: usize| rest.get(i).and_then(|n: &String| n.parse::<usize>().ok());
    let n_threads = number(1).unwrap_or_else(system::default_threads);
    let rounds = number(2).unwrap_or(10);

    let values: Vec<f32> = (0..ROWS * COLS).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
    let packed = quant::quantize(dtype, ROWS, COLS, &values).expect("the shape fits");
    let part = MatrixPart {
        weight: packed.weight.into(),
        scales: packed.scales.into(),
        biases: packed.biases.into(),
        global_scale: None,
    };
    let one = dtype.total_bytes(ROWS, COLS);
    let n_parts = BYTES / one;
    let backend = CpuBackend::with_isa(n_threads, numerics, isa);
    let matrices: Vec<_> = (0..n_parts)
        .map(|_| {
            let data = MatrixData { name: format.clone(), dtype, rows: ROWS, cols: COLS, parts: vec![part.clone()] };
            backend.load_matrix(data)
        })
        .collect();
    let x = CpuBuffer::new(values[..COLS].to_vec(), COLS);
    let mut outs: Vec<CpuBuffer> = (0..n_parts).map(|_| backend.alloc(1, ROWS)).collect();
    let quarter = n_parts / 4;
    let meter = ReadMeter::new(backend.pool(), quarter * one);
    let (mut rates, mut shares) = (vec![], vec![]);
    let mut before = meter.pass();
    for round in 0..rounds {
        let first = round % 4 * quarter;
        let start = Instant::now();
        let mut outputs: Vec<_> =
            matrices[first..first + quarter].iter().zip(&mut outs[first..first + quarter]).collect();
        backend.linear(Linear { x: &x, n_rows: 1, outputs: &mut outputs, label: ModuleKind::RoutedExperts });
        let rate = (quarter * one) as f64 / start.elapsed().as_secs_f64();
        let after = meter.pass();
        rates.push((rate, (before + after) / 2.0));
        shares.push(rate / ((before + after) / 2.0));
        before = after;
    }
    let median = |mut v: Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    println!(
        "{} {format} {} {n_threads} threads: {:.1} GB/s of {:.1} plain, {:.0} % (medians)",
        backend.isa(),
        numerics.name(),
        median(rates.iter().map(|r| r.0).collect()) / 1e9,
        median(rates.iter().map(|r| r.1).collect()) / 1e9,
        100.0 * median(shares)
    );
}
