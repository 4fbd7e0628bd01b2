//! Every operation on a GPU against the scalar oracle of the CPU, over ragged shapes.
//!
//! In the bf16 numerics inputs of matrix products are rounded to bf16 first, for both sides, so that what is left is the
//! order of f32 sums and tolerances can be tight. Without a device these tests say so and pass.

use tandem_core::backend::{
    AddRmsNorm, Batch, CacheKind, GqaAttention, HeadLinear, Heads, IndexSelect, Linear, MlaAttention, Mlp, Moe,
    NO_TOKEN, PAGE_SIZE, RmsNorm, Rope, RopeLayout, Rotate, RouterTopk, Routing, SAMPLED, Sampling, WriteIndexKey,
    WriteLatent,
};
use tandem_core::quant;
use tandem_core::weights::{MatrixData, MatrixPart, ModuleKind};
use tandem_core::{Backend, DType, Float};
use tandem_cpu::{CpuBackend, CpuBuffer, Isa, Numerics as CpuNumerics};
use tandem_cuda::{CudaBackend, CudaBuffer, Numerics, Options, device_present};
use tandem_engine::{Sampler, SamplingParams};

const AFFINE8: DType = DType::Affine { bits: 8, group_size: 64, params: Float::BF16 };

const FORMATS: [DType; 15] = [
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
    DType::Affine { bits: 6, group_size: 64, params: Float::BF16 },
    DType::Affine { bits: 4, group_size: 128, params: Float::F32 },
    DType::Affine { bits: 8, group_size: 32, params: Float::F16 },
    AFFINE8,
    DType::Affine { bits: 8, group_size: 128, params: Float::F32 },
];

fn skipped() -> bool {
    if !device_present() {
        eprintln!("skipped: no NVIDIA device here; scripts/gpu-check runs this on one");
    }
    !device_present()
}

fn devices() -> Vec<CudaBackend> {
    let fast = Options::new(Numerics::Bf16);
    [Options::new(Numerics::F32), fast, Options { programmatic: false, hopper: false, ..fast }]
        .into_iter()
        .map(|options| CudaBackend::new(options).expect("a device"))
        .collect()
}

fn oracle() -> CpuBackend {
    CpuBackend::with_isa(2, CpuNumerics::F32, Isa::Scalar)
}

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

/// The same, in values that bf16 has.
fn coarse(seed: u64, n: usize) -> Vec<f32> {
    noise(seed, n).into_iter().map(|v| f32::from_bits(v.to_bits() & 0xffff_0000)).collect()
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

/// Rows of values as a buffer of any backend, which has only vectors from the host: through an embedding of f32 rows.
fn rows<B: Backend>(b: &B, values: &[f32], width: usize) -> B::Buffer {
    let n = values.len() / width;
    let weight: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let part = MatrixPart { weight: weight.into(), ..MatrixPart::default() };
    let table =
        b.load_matrix(MatrixData { name: "rows".into(), dtype: DType::F32, rows: n, cols: width, parts: vec![part] });
    let batch = b.upload(Batch {
        tokens: (0..n as u32).collect(),
        positions: vec![0; n],
        sequences: vec![0; n],
        block_tables: vec![vec![0]],
        logits_rows: vec![],
        sampling: vec![],
    });
    let mut out = b.alloc(n, width);
    b.embed(&table, &batch, &mut out);
    b.sync().expect("runs");
    out
}

fn values<B: Backend>(b: &B, buffer: &B::Buffer, n: usize) -> Vec<f32> {
    // Poison: what is not downloaded stays NaN.
    let mut out = vec![f32::NAN; n];
    b.download(buffer, &mut out);
    b.sync().expect("runs");
    out
}

/// Root mean square of the difference, relative to the expected values' own.
fn check(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    assert!(found.iter().all(|v| v.is_finite()), "{what}: not finite");
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    let size: f64 = expected.iter().map(|v| square(*v)).sum();
    let relative = (error / size.max(1e-30)).sqrt();
    assert!(relative <= f64::from(tolerance), "{what}: relative error {relative:e}");
    // No single value far off either.
    let rms = (size / expected.len() as f64).sqrt() as f32;
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 50.0 * tolerance * rms, "{what}: largest error {worst:e}, rms {rms:e}");
}

/// Sums of f32 only, except that prefill rounds affine weights to bf16.
fn product_tolerance(b: &CudaBackend, n: usize) -> f32 {
    if b.numerics() == Numerics::Bf16 && n > 64 { 6e-3 } else { 3e-5 }
}

fn linear<B: Backend>(b: &B, x: &[f32], n: usize, w: &MatrixData) -> Vec<f32> {
    let m = b.load_matrix(w.clone());
    let x = rows(b, x, w.cols);
    let mut out = b.alloc(n, w.rows);
    b.linear(Linear { x: &x, n_rows: n, outputs: &mut [(&m, &mut out)], label: ModuleKind::Attention });
    values(b, &out, n * w.rows)
}

#[test]
fn linear_matches_the_oracle_over_ragged_shapes() {
    if skipped() {
        return;
    }
    let devices = devices();
    let shapes =
        [(1, 32), (3, 64), (4, 96), (7, 128), (5, 160), (17, 256), (64, 384), (130, 512), (33, 2176), (40, 6144)];
    for dtype in FORMATS {
        for (n_rows, cols) in shapes {
            if dtype != DType::Fp8Block && cols % dtype.group_size() != 0 {
                continue;
            }
            let w = matrix(dtype, 1, n_rows, cols, 7);
            for n in [1, 2, 5, 8, 9, 33, 67, 150] {
                let x = coarse(n as u64 + 99, n * cols);
                let expected = linear(&oracle(), &x, n, &w);
                for b in &devices {
                    let what = format!("{:?} {dtype} {n_rows}x{cols} n={n}", b.numerics());
                    check(&what, &linear(b, &x, n, &w), &expected, product_tolerance(b, n));
                }
            }
        }
    }
}

#[test]
fn products_of_a_long_prefill_match_the_oracle() {
    if skipped() {
        return;
    }
    let devices = devices();
    for (dtype, cols) in [(DType::Mxfp4, 288), (AFFINE8, 320), (DType::BF16, 328)] {
        let (n_rows, n) = (2050, 1100);
        let w = matrix(dtype, 1, n_rows, cols, 7);
        let x = coarse(5, n * cols);
        let expected = linear(&oracle(), &x, n, &w);
        for b in &devices {
            check(&format!("{:?} {dtype}", b.numerics()), &linear(b, &x, n, &w), &expected, product_tolerance(b, n));
        }
    }
}

#[test]
fn prefill_multiplies_bf16_weights_without_rounding_its_input() {
    if skipped() {
        return;
    }
    let w = matrix(DType::BF16, 1, 100, 1000, 7);
    for b in &devices() {
        let x = noise(5, 90 * 1000);
        check("split", &linear(b, &x, 90, &w), &linear(&oracle(), &x, 90, &w), 3e-6);
    }
}

#[test]
fn several_matrices_share_an_input() {
    if skipped() {
        return;
    }
    let (n, cols) = (3, 256);
    let data = [
        (AFFINE8, 48),
        (DType::Mxfp4, 33),
        (AFFINE8, 16),
        (DType::BF16, 20),
        (AFFINE8, 130),
        (AFFINE8, 1),
        (AFFINE8, 7),
    ]
    .map(|(dtype, r)| matrix(dtype, 1, r, cols, r as u64));
    let x = coarse(5, n * cols);
    for b in &devices() {
        let matrices: Vec<_> = data.iter().map(|d| b.load_matrix(d.clone())).collect();
        let mut outs: Vec<_> = data.iter().map(|d| b.alloc(n, d.rows)).collect();
        let input = rows(b, &x, cols);
        let mut outputs: Vec<_> = matrices.iter().zip(&mut outs).collect();
        b.linear(Linear { x: &input, n_rows: n, outputs: &mut outputs, label: ModuleKind::Attention });
        for (d, out) in data.iter().zip(&outs) {
            let what = format!("{:?} {} of {}", b.numerics(), d.name, d.rows);
            check(&what, &values(b, out, n * d.rows), &linear(&oracle(), &x, n, d), 3e-5);
        }
    }
}

#[test]
fn unusual_scales_decode_as_the_oracle_does() {
    if skipped() {
        return;
    }
    for b in &devices() {
        for byte in [0u8, 1, 60, 96, 127, 192, 193, 240] {
            let mut w = matrix(DType::Mxfp4, 1, 5, 160, 1);
            w.parts[0].scales = vec![byte; 5 * 5].into();
            let x = coarse(8, 160);
            let expected = linear(&oracle(), &x, 1, &w);
            let found = linear(b, &x, 1, &w);
            let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            // A uniform scale below 2^-60 may be lost where larger ones are usual.
            let allowed = if byte == 0 { scale * 2.0 } else { scale * 1e-4 };
            for (a, e) in found.iter().zip(&expected) {
                assert!((a - e).abs() <= allowed, "{:?} scale {byte}: {a} {e}", b.numerics());
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch_up_to_64_rows() {
    if skipped() {
        return;
    }
    for b in &devices() {
        for dtype in FORMATS {
            let cols = 2048;
            let w = matrix(dtype, 1, 37, cols, 3);
            let x = noise(5, 64 * cols);
            let all = linear(b, &x, 64, &w);
            for (first, n) in [(0, 1), (1, 1), (31, 9), (40, 17), (63, 1)] {
                let own = linear(b, &x[first * cols..(first + n) * cols], n, &w);
                assert_eq!(own, all[first * 37..(first + n) * 37], "{:?} {dtype} row {first} of {n}", b.numerics());
            }
        }
    }
}

#[test]
fn products_by_head_match_the_oracle() {
    if skipped() {
        return;
    }
    fn run<B: Backend>(b: &B, x: &[f32], n: usize, w: &MatrixData, from: Heads, to: Heads) -> Vec<f32> {
        let heads = w.parts.len();
        let m = b.load_matrix(w.clone());
        let x = rows(b, x, heads * from.stride);
        let mut out = b.alloc(n, heads * to.stride);
        b.head_linear(HeadLinear { x: &x, from, w: &m, n_rows: n, out: &mut out, to });
        values(b, &out, n * heads * to.stride)
    }
    let devices = devices();
    for (dtype, heads, cols, w_rows) in [
        (AFFINE8, 4, 64, 64),
        (AFFINE8, 6, 192, 512),
        (DType::BF16, 3, 48, 40),
        (AFFINE8, 2, 512, 256),
        (AFFINE8, 32, 192, 256),
    ] {
        let w = matrix(dtype, heads, w_rows, cols, 4);
        let from = Heads { n: heads, stride: cols + 32, offset: 0, width: cols };
        let to = Heads { n: heads, stride: w_rows + 16, offset: 0, width: w_rows };
        for n in [1, 6, 40, 70, 200] {
            let x = coarse(n as u64, n * heads * from.stride);
            let expected = run(&oracle(), &x, n, &w, from, to);
            for b in &devices {
                check(
                    &format!("{:?} {dtype} {cols} n={n}", b.numerics()),
                    &run(b, &x, n, &w, from, to),
                    &expected,
                    product_tolerance(b, n),
                );
            }
        }
    }
}

fn load_mlp<B: Backend>(b: &B, m: &[MatrixData; 3]) -> Mlp<B::Matrix> {
    Mlp { gate: b.load_matrix(m[0].clone()), up: b.load_matrix(m[1].clone()), down: b.load_matrix(m[2].clone()) }
}

/// Nine of twelve experts are held; the others are somebody else's.
const ROUTING: Routing =
    Routing { top_k: 3, n_group: 1, topk_group: 1, normalize: true, scale: 2.5, first_expert: 2, n_held: 9 };

fn moe<B: Backend>(
    b: &B,
    x: &[f32],
    n: usize,
    experts: &[MatrixData; 3],
    shared: Option<&[MatrixData; 3]>,
) -> Vec<f32> {
    let (n_experts, hidden) = (experts[0].parts.len() + 3, experts[2].rows);
    let (experts, shared) = (load_mlp(b, experts), shared.map(|s| load_mlp(b, s)));
    let logits = rows(b, &noise(17, n * n_experts), n_experts);
    let bias = b.load_vector(&vec![0.0; n_experts]);
    let mut ids = b.alloc_indices(n, 3);
    let (mut weights, mut out) = (b.alloc(n, 3), b.alloc(n, hidden));
    let (ids, weights) = (&mut ids, &mut weights);
    b.router_topk(RouterTopk { logits: &logits, bias: &bias, routing: &ROUTING, n_rows: n, ids, weights });
    let (x, out) = (&rows(b, x, hidden), &mut out);
    b.moe(Moe { x, experts: &experts, shared: shared.as_ref(), ids, weights, n_rows: n, out });
    values(b, out, n * hidden)
}

#[test]
fn mixture_of_experts_matches_the_oracle() {
    if skipped() {
        return;
    }
    for (dtype, shared_dtype) in
        [(DType::Mxfp4, AFFINE8), (AFFINE8, AFFINE8), (AFFINE8, DType::BF16), (DType::BF16, DType::Mxfp4)]
    {
        let (hidden, inter, wide) = (192, 64, 128);
        let experts = [(inter, hidden), (inter, hidden), (hidden, inter)].map(|(r, c)| matrix(dtype, 9, r, c, 1));
        for width in [inter, wide] {
            let shared = [(width, hidden), (width, hidden), (hidden, width)];
            let shared = shared.map(|(r, c)| matrix(shared_dtype, 1, r, c, 2));
            for n in [1, 3, 8, 40, 70, 600] {
                let x = coarse(3, n * hidden);
                for shared in [None, Some(&shared)] {
                    let expected = moe(&oracle(), &x, n, &experts, shared);
                    for b in &devices() {
                        // The intermediate layer is rounded to bf16 in the fast numerics.
                        let tolerance = if b.numerics() == Numerics::F32 { 3e-5 } else { 6e-3 };
                        let what = format!("{:?} {dtype} {shared_dtype} {width} n={n}", b.numerics());
                        check(&what, &moe(b, &x, n, &experts, shared), &expected, tolerance);
                    }
                }
            }
        }
    }
}

#[test]
fn mixture_of_experts_is_the_same_in_any_batch_and_in_wide_layers() {
    if skipped() {
        return;
    }
    let (hidden, inter) = (2048, 512);
    let experts = [(inter, hidden), (inter, hidden), (hidden, inter)].map(|(r, c)| matrix(DType::Mxfp4, 9, r, c, 1));
    let shared = [(inter, hidden), (inter, hidden), (hidden, inter)].map(|(r, c)| matrix(AFFINE8, 1, r, c, 2));
    let x = coarse(3, 64 * hidden);
    for b in &devices() {
        let all = moe(b, &x, 64, &experts, Some(&shared));
        for n in [1, 5, 20] {
            // The first rows route alike whatever follows.
            let few = moe(b, &x[..n * hidden], n, &experts, Some(&shared));
            assert!(few == all[..n * hidden], "{:?} n={n}", b.numerics());
        }
        let tolerance = if b.numerics() == Numerics::F32 { 3e-5 } else { 6e-3 };
        let expected = moe(&oracle(), &x[..5 * hidden], 5, &experts, Some(&shared));
        check("wide", &all[..5 * hidden], &expected, tolerance);
    }
}

#[test]
fn mlp_matches_the_oracle() {
    if skipped() {
        return;
    }
    fn run<B: Backend>(b: &B, x: &[f32], n: usize, m: &[MatrixData; 3]) -> Vec<f32> {
        let mlp = load_mlp(b, m);
        let mut out = b.alloc(n, m[2].rows);
        b.mlp(&rows(b, x, m[0].cols), &mlp, n, &mut out);
        values(b, &out, n * m[2].rows)
    }
    for dtype in [AFFINE8, DType::Mxfp4, DType::BF16, DType::Affine { bits: 4, group_size: 64, params: Float::BF16 }] {
        let m = [(320, 128), (320, 128), (128, 320)].map(|(r, c)| matrix(dtype, 1, r, c, 5));
        for n in [1, 7, 33, 100] {
            let x = coarse(9, n * 128);
            let expected = run(&oracle(), &x, n, &m);
            for b in &devices() {
                let tolerance = if b.numerics() == Numerics::F32 { 3e-5 } else { 6e-3 };
                check(&format!("{:?} {dtype} n={n}", b.numerics()), &run(b, &x, n, &m), &expected, tolerance);
            }
        }
    }
}

#[test]
fn norms_additions_and_rotations_match_the_oracle() {
    if skipped() {
        return;
    }
    fn run<B: Backend>(b: &B, n: usize, width: usize, layout: RopeLayout) -> Vec<Vec<f32>> {
        let (x, y) = (noise(1, n * width), noise(2, n * width));
        let weight = b.load_vector(&noise(3, width));
        let (mut a, c) = (rows(b, &x, width), rows(b, &y, width));
        let (mut normed, mut sum_normed) = (b.alloc(n, width), b.alloc(n, width));
        b.rms_norm(RmsNorm { x: &a, weight: &weight, eps: 1e-6, n_rows: n, out: &mut normed });
        let (x, y, weight, out) = (&mut a, &c, &weight, &mut sum_normed);
        b.add_rms_norm(AddRmsNorm { x, y, weight, eps: 1e-6, n_rows: n, out });
        b.add(&mut a, &c, n);
        b.add_bias(&mut a, weight, n);
        let rope = Rope { inv_freq: (0..8).map(|i| 10000f32.powf(-i as f32 / 8.0)).collect(), scaling: 1.1, layout };
        let batch = b.upload(Batch {
            tokens: vec![0; n],
            positions: (0..n as u32).map(|r| r * 9001).collect(),
            sequences: vec![0; n],
            block_tables: vec![(0..10_000).collect()],
            logits_rows: vec![n as u32 - 1, 0],
            sampling: vec![],
        });
        let from = Heads { n: width / 40, stride: 40, offset: 8, width: 24 };
        let to = Heads { n: width / 40, stride: 32, offset: 4, width: 24 };
        let mut rotated = b.alloc(n, width);
        let (rope, out, label) = (&rope, &mut rotated, ModuleKind::Attention);
        b.rope(Rotate { x: &c, from, rope, batch: &batch, out, to, label });
        let mut gathered = b.alloc(2, width);
        b.gather_logits_rows(&c, &batch, &mut gathered);
        let mut out: Vec<_> = [&normed, &sum_normed, &a, &rotated].map(|v| values(b, v, n * width)).to_vec();
        out.push(values(b, &gathered, 2 * width));
        out
    }
    for (n, width) in [(2, 80), (5, 200), (3, 6160), (70, 400)] {
        for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
            let expected = run(&oracle(), n, width, layout);
            for b in &devices() {
                for (i, (found, expected)) in run(b, n, width, layout).iter().zip(&expected).enumerate() {
                    check(&format!("{:?} {n}x{width} {i}", b.numerics()), found, expected, 2e-6);
                }
            }
        }
    }
}

#[test]
fn the_router_chooses_as_the_oracle_does() {
    if skipped() {
        return;
    }
    for (n_experts, n_group, topk_group, top_k) in
        [(16, 1, 1, 4), (256, 1, 1, 8), (256, 8, 4, 8), (32, 1, 1, 6), (16, 4, 2, 4)]
    {
        let (first_expert, n_held) = (n_experts / 4, n_experts / 2);
        let routing = Routing { top_k, n_group, topk_group, normalize: n_group > 1, scale: 2.5, first_expert, n_held };
        let n = 33;
        let mut logits = noise(21, n * n_experts);
        // Ties.
        logits[..n_experts].iter_mut().for_each(|v| *v = (*v * 4.0).round());
        let bias = noise(22, n_experts);
        let o = oracle();
        let (mut ids, mut weights) = (o.alloc_indices(n, top_k), o.alloc(n, top_k));
        o.router_topk(RouterTopk {
            logits: &CpuBuffer::new(logits.clone(), n_experts),
            bias: &o.load_vector(&bias),
            routing: &routing,
            n_rows: n,
            ids: &mut ids,
            weights: &mut weights,
        });
        for b in &devices() {
            let (mut found, mut found_weights) = (b.alloc_indices(n, top_k), b.alloc(n, top_k));
            b.router_topk(RouterTopk {
                logits: &rows(b, &logits, n_experts),
                bias: &b.load_vector(&bias),
                routing: &routing,
                n_rows: n,
                ids: &mut found,
                weights: &mut found_weights,
            });
            let mut out = vec![-9; n * top_k];
            b.download_indices(&found, &mut out);
            let expected: Vec<i32> = (0..n).flat_map(|r| ids.row(r).to_vec()).collect();
            assert_eq!(out, expected, "{n_experts} experts in {n_group} groups");
            let expected: Vec<f32> = (0..n).flat_map(|r| weights.row(r).to_vec()).collect();
            check("weights", &values(b, &found_weights, n * top_k), &expected, 1e-5);
        }
    }
}

/// Two sequences whose pages are interleaved and out of order.
fn tables(context: usize) -> Vec<Vec<u32>> {
    let pages = context.div_ceil(PAGE_SIZE) as u32;
    vec![(0..pages).map(|p| 2 * (pages - 1 - p)).collect(), (0..pages).map(|p| 2 * p + 1).collect()]
}

/// Rows at the end of both sequences.
fn last_rows(n: usize, context: usize) -> Batch {
    let positions = (0..n).map(|r| (context - 1).saturating_sub(r / 2 * 3) as u32).collect();
    Batch {
        tokens: vec![0; n],
        positions,
        sequences: (0..n as u32).map(|r| r % 2).collect(),
        block_tables: tables(context),
        logits_rows: vec![],
        sampling: vec![],
    }
}

/// Batches that write every position of both sequences.
fn all_positions(context: usize) -> Vec<Batch> {
    (0..2u32)
        .flat_map(|s| (0..context as u32).map(move |p| (s, p)))
        .collect::<Vec<_>>()
        .chunks(256)
        .map(|chunk| Batch {
            tokens: vec![0; chunk.len()],
            positions: chunk.iter().map(|c| c.1).collect(),
            sequences: chunk.iter().map(|c| c.0).collect(),
            block_tables: tables(context),
            logits_rows: vec![],
            sampling: vec![],
        })
        .collect()
}

fn rope_of(dim: usize) -> Rope {
    let inv_freq = (0..dim / 2).map(|i| 10000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
    Rope { inv_freq, scaling: 1.0, layout: RopeLayout::Interleaved }
}

#[test]
fn latent_attention_matches_the_oracle() {
    if skipped() {
        return;
    }
    fn run<B: Backend>(
        b: &B,
        (heads, latent, rope_dim): (usize, usize, usize),
        context: usize,
        n: usize,
        topk: Option<usize>,
    ) -> (Vec<f32>, Vec<f32>) {
        let width = latent + rope_dim;
        let n_slots = tables(context).concat().into_iter().max().unwrap_or(0) as usize * PAGE_SIZE + PAGE_SIZE;
        let mut cache = b.alloc_cache(CacheKind::Latent, n_slots, width);
        let norm = b.load_vector(&noise(4, latent));
        for (i, batch) in all_positions(context).into_iter().enumerate() {
            let kv = rows(b, &noise(50 + i as u64, batch.n_rows() * width), width);
            let (rope, batch) = (&rope_of(rope_dim), &b.upload(batch));
            b.write_latent(WriteLatent { kv_a: &kv, norm: &norm, eps: 1e-6, rope, batch, cache: &mut cache });
        }
        let batch = last_rows(n, context);
        let q = rows(b, &noise(6, n * heads * width), heads * width);
        let mut out = b.alloc(n, heads * latent);
        let selected = topk.map(|k| {
            // Keys of 32 elements in steps of 1/8 that bf16 has, so that every backend selects alike.
            let coarse = |seed, n| -> Vec<f32> { noise(seed, n).iter().map(|v| (v * 8.0).round() / 8.0).collect() };
            let mut keys = b.alloc_cache(CacheKind::KeyValue, n_slots, 32);
            for (i, batch) in all_positions(context).into_iter().enumerate() {
                let k = rows(b, &coarse(70 + i as u64, batch.n_rows() * 32), 32);
                b.write_cache(&k, &b.upload(batch), &mut keys);
            }
            let (q, w) = (rows(b, &coarse(8, n * 4 * 32), 4 * 32), rows(b, &coarse(9, n * 4), 4));
            let mut selected = b.alloc_indices(n, k);
            let batch = &b.upload(batch.clone());
            let (weights, cache, selected_rows) = (&w, &keys, &mut selected);
            b.index_select(IndexSelect { q: &q, weights, n_heads: 4, batch, cache, selected: selected_rows });
            selected
        });
        let device = b.upload(batch);
        let mut run = || {
            b.mla_attention(MlaAttention {
                q: &q,
                n_heads: heads,
                latent,
                scale: 0.1,
                batch: &device,
                cache: &cache,
                selected: selected.as_ref(),
                out: &mut out,
            });
            values(b, &out, n * heads * latent)
        };
        // Scratch of the first run is dirty in the second.
        (run(), run())
    }
    for (shape, context) in
        [((4, 64, 32), 5), ((6, 128, 32), 300), ((16, 512, 64), 130), ((64, 512, 64), 1000), ((5, 48, 16), 90)]
    {
        for topk in [None, Some(16), Some(100)] {
            for n in [1, 5, 70] {
                let (expected, _) = run(&oracle(), shape, context, n, topk);
                for b in &devices() {
                    let tolerance = if b.numerics() == Numerics::F32 { 2e-5 } else { 8e-3 };
                    let (found, again) = run(b, shape, context, n, topk);
                    check(
                        &format!("{:?} {shape:?} {context} {topk:?} n={n}", b.numerics()),
                        &found,
                        &expected,
                        tolerance,
                    );
                    assert!(found == again, "{:?} {shape:?} {context} {topk:?} n={n} repeats itself", b.numerics());
                }
            }
        }
    }
}

#[test]
fn the_indexer_selects_as_the_oracle_does() {
    if skipped() {
        return;
    }
    fn cache<B: Backend>(b: &B, dim: usize, context: usize) -> B::Cache {
        let n_slots = tables(context).concat().into_iter().max().unwrap_or(0) as usize * PAGE_SIZE + PAGE_SIZE;
        let mut cache = b.alloc_cache(CacheKind::IndexKey, n_slots, dim);
        let (norm, bias) = (b.load_vector(&noise(4, dim)), b.load_vector(&noise(5, dim)));
        for (i, batch) in all_positions(context).into_iter().enumerate() {
            let k = rows(b, &noise(50 + i as u64, batch.n_rows() * dim), dim);
            let (rope, batch, cache) = (&rope_of(32), &b.upload(batch), &mut cache);
            b.write_index_key(WriteIndexKey { k: &k, norm: &norm, norm_bias: &bias, eps: 1e-6, rope, batch, cache });
        }
        cache
    }
    for (heads, dim, context, k) in [
        (4, 64, 700, 128),
        (8, 32, 100, 16),
        (32, 128, 3000, 2048),
        (64, 128, 5000, 512),
        (16, 128, 90, 128),
        // Beyond 8192 positions a cluster of blocks selects.
        (4, 32, 20_000, 2048),
    ] {
        for n in [1, 6, 70] {
            let batch = last_rows(n, context);
            let (q, w) = (noise(6, n * heads * dim), noise(7, n * heads));
            let o = oracle();
            let mut expected = o.alloc_indices(n, k);
            let keys = cache(&o, dim, context);
            o.index_select(IndexSelect {
                q: &CpuBuffer::new(q.clone(), heads * dim),
                weights: &CpuBuffer::new(w.clone(), heads),
                n_heads: heads,
                batch: &batch,
                cache: &keys,
                selected: &mut expected,
            });
            for b in &devices() {
                let mut selected = b.alloc_indices(n, k);
                let keys = cache(b, dim, context);
                b.index_select(IndexSelect {
                    q: &rows(b, &q, heads * dim),
                    weights: &rows(b, &w, heads),
                    n_heads: heads,
                    batch: &b.upload(batch.clone()),
                    cache: &keys,
                    selected: &mut selected,
                });
                let mut found = vec![-9; n * k];
                b.download_indices(&selected, &mut found);
                for r in 0..n {
                    let (found, expected) = (&found[r * k..(r + 1) * k], expected.row(r));
                    let what = format!("{:?} {heads}x{dim} {k} of {context} n={n} row {r}", b.numerics());
                    let visible = batch.positions[r] as usize + 1;
                    let count = found.iter().filter(|p| **p >= 0).count();
                    assert_eq!(count, visible.min(k), "{what}");
                    assert!(found[..count].is_sorted_by(|a, b| a < b), "{what}: ascending");
                    assert!(found[..count].iter().all(|p| (*p as usize) < visible), "{what}: visible");
                    let alike = found.iter().filter(|p| **p >= 0 && expected.contains(p)).count();
                    // Scores near the threshold may change places: rounding of sums, or of bf16 keys and queries.
                    let needed = if b.numerics() == Numerics::F32 { 0.995 } else { 0.96 };
                    assert!((alike + 1) as f64 >= needed * count as f64, "{what}: {alike} of {count} agree");
                }
            }
        }
    }
}

#[test]
fn grouped_query_attention_matches_the_oracle() {
    if skipped() {
        return;
    }
    fn run<B: Backend>(b: &B, (heads, kv, dim): (usize, usize, usize), context: usize, n: usize) -> Vec<f32> {
        let n_slots = tables(context).concat().into_iter().max().unwrap_or(0) as usize * PAGE_SIZE + PAGE_SIZE;
        let (mut keys, mut vals) = (
            b.alloc_cache(CacheKind::KeyValue, n_slots, kv * dim),
            b.alloc_cache(CacheKind::KeyValue, n_slots, kv * dim),
        );
        for (i, batch) in all_positions(context).into_iter().enumerate() {
            let rows_of = |seed: u64| rows(b, &coarse(seed + i as u64, batch.n_rows() * kv * dim), kv * dim);
            let (k, v) = (rows_of(50), rows_of(80));
            b.write_cache(&k, &b.upload(batch.clone()), &mut keys);
            b.write_cache(&v, &b.upload(batch), &mut vals);
        }
        let q = rows(b, &noise(6, n * heads * dim), heads * dim);
        let mut out = b.alloc(n, heads * dim);
        b.gqa_attention(GqaAttention {
            q: &q,
            n_heads: heads,
            n_kv_heads: kv,
            scale: 0.125,
            batch: &b.upload(last_rows(n, context)),
            keys: &keys,
            values: &vals,
            out: &mut out,
        });
        values(b, &out, n * heads * dim)
    }
    for (shape, context) in [((8, 2, 64), 3), ((8, 8, 32), 200), ((6, 2, 128), 333)] {
        for n in [1, 4, 70] {
            let expected = run(&oracle(), shape, context, n);
            for b in &devices() {
                check(&format!("{:?} {shape:?} n={n}", b.numerics()), &run(b, shape, context, n), &expected, 2e-5);
            }
        }
    }
}

/// The device's tokens from rows of logits, the second and third time as a recorded step. Steps of one size must come with
/// one buffer, as they do in a model.
fn sampled(b: &CudaBackend, buffer: &mut CudaBuffer, logits: &[f32], sampling: &[Sampling]) -> Vec<u32> {
    let n = sampling.len();
    let batch = Batch {
        tokens: vec![0; n],
        positions: vec![0; n],
        sequences: vec![0; n],
        block_tables: vec![vec![0]],
        logits_rows: (0..n as u32).collect(),
        sampling: sampling.to_vec(),
    };
    b.write_rows(logits, buffer);
    let mut found = vec![];
    let submit = || {
        let batch = b.upload(batch.clone());
        b.record_or_replay(&batch, 1, &mut |_| b.sample(buffer, &batch));
    };
    submit();
    submit();
    b.collect(&mut found).expect("runs");
    submit();
    b.collect(&mut found).expect("runs");
    b.collect(&mut found).expect("runs");
    assert!(found[..n] == found[n..2 * n] && found[..n] == found[2 * n..], "two steps under way sample alike");
    found.truncate(n);
    found
}

#[test]
fn tokens_are_sampled_as_the_host_samples_them() {
    if skipped() {
        return;
    }
    let warm = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    let params = [
        SamplingParams::default(),
        warm.clone(),
        SamplingParams { temperature: 0.3, ..warm.clone() },
        SamplingParams { top_k: 1, ..warm.clone() },
        SamplingParams { top_k: 40, temperature: 1.7, ..warm.clone() },
        SamplingParams { top_p: 0.95, temperature: 0.6, ..warm.clone() },
        SamplingParams { top_p: 0.0, ..warm.clone() },
        SamplingParams { top_p: 0.999, ..warm.clone() },
        SamplingParams { min_p: 0.05, ..warm.clone() },
        SamplingParams { top_k: 300, top_p: 0.8, min_p: 0.01, temperature: 1.3, ..warm.clone() },
        SamplingParams { top_k: 1_000_000, temperature: 1e-3, ..warm.clone() },
        SamplingParams { min_p: 1.0, temperature: 2.0, ..warm.clone() },
    ];
    for b in &devices() {
        let (mut total, mut different) = (0, vec![]);
        let shapes = [
            (1, 1.0, 1),
            (2, 1.0, 4),
            (9, 3.0, 8),
            (2880, 8.0, 12),
            (2880, 0.01, 8),
            (5000, 40.0, 8),
            (154_880, 15.0, 3),
        ];
        for (i, (vocab, spread, steps)) in shapes.into_iter().enumerate() {
            // Each shape has its own number of rows, from 12 to 6, and so its own recorded step.
            let params = &params[i..];
            let n = params.len();
            let mut buffer = b.alloc(n, vocab);
            for step in 0..steps {
                let mut logits: Vec<f32> = noise(step + vocab as u64, n * vocab).iter().map(|v| v * spread).collect();
                // Ties, and tokens that a mask left out.
                logits.iter_mut().skip(1).step_by(3).for_each(|v| *v = (*v * 4.0).round() / 4.0);
                let masked = if vocab < 9 { 0 } else { logits.len() };
                logits[..masked].iter_mut().step_by(7).for_each(|v| *v = f32::NEG_INFINITY);
                let seeded = |i: usize| SamplingParams { seed: Some(100 * step + i as u64), ..params[i].clone() };
                let mut samplers: Vec<Sampler> = (0..n).map(|i| Sampler::new(seeded(i)).expect("valid")).collect();
                let mut device_samplers = samplers.clone();
                let sampling: Vec<Sampling> = device_samplers.iter_mut().map(Sampler::sampling).collect();
                let found = sampled(b, &mut buffer, &logits, &sampling);
                for (i, sampler) in samplers.iter_mut().enumerate() {
                    let row = &mut logits[i * vocab..(i + 1) * vocab];
                    let expected = sampler.sample(row, &[]).expect("tokens");
                    total += 1;
                    if found[i] != expected {
                        different.push((vocab, step, i, found[i], expected));
                    }
                    assert_eq!(sampler.sampling(), device_samplers[i].sampling(), "the next random number");
                }
            }
        }
        // A draw that falls on the border between two tokens may go either way: weights are rounded.
        assert!(different.len() * 100 <= total, "{} of {total}: {different:?}", different.len());

        let vocab = 3000;
        let mut logits = noise(3, 5 * vocab);
        logits[0] = 1.0;
        logits[2999] = 1.0;
        logits[vocab + 40] = f32::NAN;
        logits[vocab + 20] = -f32::NAN;
        logits[2 * vocab..3 * vocab].fill(f32::NEG_INFINITY);
        logits[3 * vocab + 77] = f32::INFINITY;
        logits[4 * vocab..].fill(-3.0);
        let mut buffer = b.alloc(5, vocab);
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, top_k: 1, top_p: 1.0, min_p: 0.0, unit: 0.999 };
            assert_eq!(sampled(b, &mut buffer, &logits, &[sampling; 5]), [0, SAMPLED | 20, NO_TOKEN, 77, 0]);
        }
    }
}
