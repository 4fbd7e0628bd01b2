//! Every matrix kernel of this processor against the scalar oracle, over ragged shapes.

use tandem_core::backend::{Linear, Mlp, Moe, RouterTopk, Routing};
use tandem_core::quant;
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind};
use tandem_core::{Backend, DType, Float};
use tandem_cpu::{CpuBackend, CpuBuffer, Isa, Numerics};

const FORMATS: [DType; 14] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Mxfp4,
    DType::Mxfp8,
    DType::Nvfp4,
    DType::Fp8Block,
    DType::Affine { bits: 3, group_size: 32, params: Float::BF16 },
    DType::Affine { bits: 4, group_size: 32, params: Float::F16 },
    DType::Affine { bits: 4, group_size: 64, params: Float::BF16 },
    DType::Affine { bits: 4, group_size: 128, params: Float::F32 },
    DType::Affine { bits: 8, group_size: 32, params: Float::F16 },
    DType::Affine { bits: 8, group_size: 64, params: Float::BF16 },
    DType::Affine { bits: 8, group_size: 128, params: Float::F32 },
];

/// A cheap deterministic sequence in -1..1.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn matrix(dtype: DType, stack: usize, rows: usize, cols: usize, seed: u64) -> MatrixData {
    let parts = (0..stack)
        .map(|i| {
            let mut values = noise(seed + i as u64, rows * cols);
            // A group of zeros, and one far smaller than the rest.
            values[..cols.min(32)].fill(0.0);
            values.iter_mut().skip(cols).take(32).for_each(|v| *v *= 1e-6);
            let packed = quant::quantize(dtype, rows, cols, &values).expect("fits");
            MatrixPart {
                weight: packed.weight.into(),
                scales: packed.scales.into(),
                biases: packed.biases.into(),
                global_scale: None,
            }
        })
        .collect();
    MatrixData { name: format!("{dtype}"), dtype, rows, cols, parts }
}

fn linear(backend: &CpuBackend, x: &CpuBuffer, n: usize, w: MatrixData) -> Vec<f32> {
    let rows = w.rows;
    let w = backend.load_matrix(w);
    let mut out = backend.alloc(n, rows);
    backend.linear(Linear { x, n_rows: n, outputs: &mut [(&w, &mut out)], label: ModuleKind::Attention });
    let mut values = vec![0.0; n * rows];
    backend.download(&out, &mut values);
    values
}

/// Error allowed relative to `sqrt(cols) * rms(x) * rms(w)`, the size of a sum of `cols` products of random sign.
fn tolerance(numerics: Numerics) -> f32 {
    match numerics {
        Numerics::F32 => 1e-5,
        // Half of 2^-8 per activation, of random sign: 0.1 % expected.
        Numerics::Bf16 => 5e-3,
        // Half of 1/127 of the largest per activation: 0.4 % expected of uniform noise.
        Numerics::Int8 => 1e-2,
    }
}

/// Compares with the oracle; `scale` is the size of the sums.
fn check(what: &str, found: &[f32], expected: &[f32], scale: f32, tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    assert!(found.iter().all(|v| v.is_finite()), "{what}: not finite");
    let squares: f32 = found.iter().zip(expected).map(|(a, b)| (a - b) * (a - b)).sum();
    let relative = (squares / found.len() as f32).sqrt() / scale;
    assert!(relative <= tolerance, "{what}: relative error {relative}");
}

fn variants() -> Vec<(Isa, Numerics)> {
    let all = [Numerics::F32, Numerics::Bf16, Numerics::Int8];
    Isa::available().into_iter().flat_map(|isa| all.map(|numerics| (isa, numerics))).collect()
}

#[test]
fn linear_matches_the_oracle_over_ragged_shapes() {
    let oracle = CpuBackend::with_isa(1, Numerics::F32, Isa::Scalar);
    let repacked = variants().into_iter().map(|(i, n)| CpuBackend::with_isa(2, n, i));
    let mapped = variants().into_iter().filter(|(i, _)| *i == Isa::Avx512);
    let mapped = mapped.map(|(i, n)| CpuBackend::with_isa(2, n, i).with_repacking(false));
    let backends: Vec<CpuBackend> = repacked.chain(mapped).collect();
    let shapes = [(1, 32), (3, 64), (4, 96), (7, 128), (5, 160), (17, 256), (64, 384), (130, 512), (33, 2176)];
    for dtype in FORMATS {
        for (rows, cols) in shapes {
            if dtype != DType::Fp8Block && cols % dtype.group_size() != 0 {
                continue;
            }
            let w = matrix(dtype, 1, rows, cols, 7);
            for n in [1, 2, 5, 67, 130] {
                let x = CpuBuffer::new(noise(n as u64 + 99, n * cols), cols);
                let expected = linear(&oracle, &x, n, w.clone());
                for backend in &backends {
                    let what = format!("{} {:?} {dtype} {rows}x{cols} n={n}", backend.isa(), backend.numerics());
                    let scale = (cols as f32).sqrt() / 3.0;
                    check(&what, &linear(backend, &x, n, w.clone()), &expected, scale, tolerance(backend.numerics()));
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch_up_to_64_rows() {
    for (isa, numerics) in variants() {
        let backend = CpuBackend::with_isa(2, numerics, isa);
        for dtype in FORMATS {
            let (rows, cols) = (37, 256);
            let w = matrix(dtype, 1, rows, cols, 3);
            let x = noise(5, 64 * cols);
            let all = linear(&backend, &CpuBuffer::new(x.clone(), cols), 64, w.clone());
            for row in [0, 1, 31, 63] {
                let own = CpuBuffer::new(x[row * cols..(row + 1) * cols].to_vec(), cols);
                let single = linear(&backend, &own, 1, w.clone());
                assert_eq!(single, all[row * rows..(row + 1) * rows], "{isa} {numerics:?} {dtype} row {row}");
            }
        }
    }
}

fn moe(backend: &CpuBackend, x: &CpuBuffer, n: usize, experts: &[MatrixData; 3], shared: &[MatrixData; 3]) -> Vec<f32> {
    let load = |m: &[MatrixData; 3]| Mlp {
        gate: backend.load_matrix(m[0].clone()),
        up: backend.load_matrix(m[1].clone()),
        down: backend.load_matrix(m[2].clone()),
    };
    let (n_experts, hidden) = (experts[0].parts.len(), experts[2].rows);
    let (experts, shared) = (load(experts), load(shared));
    let logits = CpuBuffer::new(noise(17, n * n_experts), n_experts);
    let bias = backend.load_vector(&vec![0.0; n_experts]);
    let routing = Routing {
        top_k: 3,
        n_group: 1,
        topk_group: 1,
        normalize: true,
        scale: 2.5,
        first_expert: 0,
        n_held: usize::MAX,
    };
    let mut ids = backend.alloc_indices(n, 3);
    let (mut weights, mut out) = (backend.alloc(n, 3), backend.alloc(n, hidden));
    let (ids, weights) = (&mut ids, &mut weights);
    backend.router_topk(RouterTopk { logits: &logits, bias: &bias, routing: &routing, n_rows: n, ids, weights });
    backend.moe(Moe { x, experts: &experts, shared: Some(&shared), ids, weights, n_rows: n, out: &mut out });
    let mut values = vec![0.0; n * hidden];
    backend.download(&out, &mut values);
    values
}

#[test]
fn mixture_of_experts_matches_the_oracle() {
    let oracle = CpuBackend::with_isa(1, Numerics::F32, Isa::Scalar);
    let affine8 = DType::Affine { bits: 8, group_size: 64, params: Float::BF16 };
    for (dtype, shared_dtype) in [(DType::Mxfp4, affine8), (affine8, DType::BF16), (DType::BF16, DType::Mxfp4)] {
        let (hidden, inter, wide) = (192, 64, 128);
        let experts = [(inter, hidden), (inter, hidden), (hidden, inter)].map(|(r, c)| matrix(dtype, 9, r, c, 1));
        for width in [inter, wide] {
            let shared = [(width, hidden), (width, hidden), (hidden, width)];
            let shared = shared.map(|(r, c)| matrix(shared_dtype, 1, r, c, 2));
            for n in [1, 3, 70, 200] {
                let x = CpuBuffer::new(noise(3, n * hidden), hidden);
                let expected = moe(&oracle, &x, n, &experts, &shared);
                for (isa, numerics) in variants() {
                    let found = moe(&CpuBackend::with_isa(2, numerics, isa), &x, n, &experts, &shared);
                    let rms = (expected.iter().map(|v| v * v).sum::<f32>() / expected.len() as f32).sqrt();
                    // Three products in a row, the middle one squaring errors of gate and up together.
                    check(
                        &format!("{isa} {numerics:?} {dtype} n={n}"),
                        &found,
                        &expected,
                        rms,
                        4.0 * tolerance(numerics),
                    );
                }
            }
        }
    }
}

#[test]
fn scale_bytes_at_the_ends_of_their_range_decode_as_the_oracle_does() {
    // e8m0 byte 0 is a subnormal; at 240 sums still fit.
    let oracle = CpuBackend::with_isa(1, Numerics::F32, Isa::Scalar);
    for byte in [0u8, 1, 2, 126, 127, 128, 200, 240] {
        let mut w = matrix(DType::Mxfp4, 1, 5, 160, 1);
        w.parts[0].scales = vec![byte; 5 * 5].into();
        let x = CpuBuffer::new(noise(8, 160), 160);
        let expected = linear(&oracle, &x, 1, w.clone());
        let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (isa, numerics) in variants() {
            let found = linear(&CpuBackend::with_isa(1, numerics, isa), &x, 1, w.clone());
            for (a, b) in found.iter().zip(&expected) {
                assert!((a - b).abs() <= scale * tolerance(numerics) * 3.0, "{isa} {numerics:?} scale {byte}: {a} {b}");
            }
        }
    }
}

#[test]
fn a_nan_scale_reaches_the_output() {
    for (isa, numerics) in variants() {
        let mut w = matrix(DType::Affine { bits: 8, group_size: 64, params: Float::BF16 }, 1, 3, 128, 1);
        let mut scales = w.parts[0].scales.to_vec();
        scales[..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
        w.parts[0].scales = scales.into();
        let backend = CpuBackend::with_isa(1, numerics, isa);
        let found = linear(&backend, &CpuBuffer::new(noise(8, 128), 128), 1, w);
        assert!(found[0].is_nan() && found[1..].iter().all(|v| v.is_finite()), "{isa} {numerics:?} {found:?}");
    }
}
