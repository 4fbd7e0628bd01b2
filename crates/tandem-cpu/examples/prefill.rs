//! Speed of the matrix products of a prompt: two linear layers and a mixture of experts of GLM-5.1's widths.
//!
//! `prefill NUMERICS [ISA [THREADS [TOKENS [ROUNDS]]]]`: f32, bf16 or int8. The experts are 64, of which each token takes 2: the
//! tokens of an expert are as many as with 256 and 8.

use std::time::Instant;

use tandem_core::backend::{Linear, Mlp, Moe};
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind};
use tandem_core::{Backend, DType, Float, quant};
use tandem_cpu::{CpuBackend, CpuBuffer, CpuIndices, CpuMatrix, Isa, Numerics, system};

const EXPERTS: usize = 64;
const PER_TOKEN: usize = 2;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [numerics, rest @ ..] = &args[..] else {
        eprintln!("usage: prefill NUMERICS [ISA [THREADS [TOKENS [ROUNDS]]]]");
        std::process::exit(2);
    };
    let numerics: Numerics = numerics.parse().unwrap_or_else(|error| panic!("{error}"));
    let isa = rest.first().map_or(Isa::detect(), |name| name.parse().unwrap_or_else(|error| panic!("{error}")));
    let number = |i: usize| rest.get(i).and_then(|n: &String| n.parse::<usize>().ok());
    let n_threads = number(1).unwrap_or_else(system::default_threads);
    let n_tokens = number(2).unwrap_or(512);
    let rounds = number(3).unwrap_or(10);
    let backend = CpuBackend::with_isa(n_threads, numerics, isa);
    let load = |dtype, rows: usize, cols: usize, n_parts: usize| -> CpuMatrix {
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        let packed = quant::quantize(dtype, rows, cols, &values).expect("the shape fits");
        let part = MatrixPart {
            weight: packed.weight.into(),
            scales: packed.scales.into(),
            biases: packed.biases.into(),
            global_scale: None,
        };
        backend.load_matrix(MatrixData { name: dtype.to_string(), dtype, rows, cols, parts: vec![part; n_parts] })
    };
    let report = |name: &str, products: usize, run: &mut dyn FnMut()| {
        let mut times: Vec<f64> = (0..rounds)
            .map(|_| {
                let start = Instant::now();
                run();
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let median = times[rounds / 2];
        println!(
            "{isa} {} {n_threads} threads, {n_tokens} tokens, {name}: {:.1} ms, {:.0} GFLOP/s a thread",
            numerics.name(),
            1e3 * median,
            2e-9 * (products * n_tokens) as f64 / median / n_threads as f64
        );
    };
    let input = |width: usize| {
        let values = (0..n_tokens * width).map(|i| ((i * 31337) % 2000) as f32 / 700.0 - 1.3).collect();
        CpuBuffer::new(values, width)
    };
    let affine = DType::Affine { bits: 8, group_size: 64, params: Float::BF16 };
    for (rows, cols) in [(16384, 2048), (6144, 16384)] {
        let (matrix, x, mut out) = (load(affine, rows, cols, 1), input(cols), backend.alloc(n_tokens, rows));
        report(&format!("{affine} {rows} x {cols}"), rows * cols, &mut || {
            let outputs = &mut [(&matrix, &mut out)];
            backend.linear(Linear { x: &x, n_rows: n_tokens, outputs, label: ModuleKind::Attention });
        });
    }
    let (hidden, width) = (6144, 2048);
    let experts = Mlp {
        gate: load(DType::Mxfp4, width, hidden, EXPERTS),
        up: load(DType::Mxfp4, width, hidden, EXPERTS),
        down: load(DType::Mxfp4, hidden, width, EXPERTS),
    };
    let (x, mut out) = (input(hidden), backend.alloc(n_tokens, hidden));
    // Scattered, and not alike for all experts.
    let ids = (0..n_tokens * PER_TOKEN)
        .map(|i| (((i / PER_TOKEN * 2_654_435_761) >> 7) + i % PER_TOKEN * 31) as i32 & (EXPERTS as i32 - 1))
        .collect();
    let ids = CpuIndices::new(ids, PER_TOKEN);
    let weights = CpuBuffer::new(vec![0.5; n_tokens * PER_TOKEN], PER_TOKEN);
    report(&format!("{EXPERTS} experts"), 3 * PER_TOKEN * hidden * width, &mut || {
        let (x, experts, ids, weights) = (&x, &experts, &ids, &weights);
        backend.moe(Moe { x, experts, shared: None, ids, weights, n_rows: n_tokens, out: &mut out });
    });
}
