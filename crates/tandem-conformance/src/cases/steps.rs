//! Steps that a device records and replays: they give the bits of the same operations one by one.

use tandem_core::Backend;
use tandem_core::DType;
use tandem_core::backend::{
    AddRmsNorm, Batch, CacheKind, HeadLinear, Heads, Linear, Mlp, Moe, PrepareAttention, RmsNorm, Rope,
    RopeIndexSelect, RopeLayout, RopeMlaAttention, Route, Routing, WriteIndexKey, WriteLatent,
};
use tandem_core::weights::ModuleKind;

use crate::data::{AFFINE8, SEQUENCES, matrix, noise, plain_batch, rope, slots, tables};
use crate::{Case, Oracle, Subject, Suite, same};

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>, batches: &[usize]) {
    for n in batches.iter().filter(|n| [1, 3, 64].contains(*n)) {
        suite.case(&Steps { n: *n });
    }
}

const HIDDEN: usize = 128;
const VOCAB: usize = 50;
const HEADS: usize = 4;
const LATENT: usize = 64;
const ROPE: usize = 32;
const WIDTH: usize = LATENT + ROPE;
const INDEX_HEADS: usize = 2;
const INDEX_DIM: usize = 32;
const TOPK: usize = 16;
const EXPERTS: usize = 6;
const EPS: f32 = 1e-6;
/// Steps of a sequence: the first runs, the second is recorded, later ones replay it.
const STEPS: u32 = 5;
/// The position of the first step, which is within one power of two for all.
const FIRST: u32 = 40;

const ROUTING: Routing =
    Routing { top_k: 2, n_group: 1, topk_group: 1, normalize: true, scale: 2.5, first_expert: 0, n_held: EXPERTS };

/// A layer of latent attention with an indexer, and experts, at positions that grow by one a step.
struct Steps {
    n: usize,
}

/// Weights, activations and caches of the layer.
struct Layer<B: Backend> {
    table: B::Matrix,
    inputs: Vec<B::Matrix>,
    embed_q: B::Matrix,
    output: B::Matrix,
    gate: B::Matrix,
    experts: Mlp<B::Matrix>,
    shared: Mlp<B::Matrix>,
    norm: B::Buffer,
    q_norm: B::Buffer,
    latent_norm: B::Buffer,
    key_norm: B::Buffer,
    bias: B::Buffer,
    rope: Rope,
    x: B::Buffer,
    normed: B::Buffer,
    /// Latents, queries, their parts to rotate, index keys, index queries, weights of the indexer's heads.
    projected: Vec<B::Buffer>,
    q: B::Buffer,
    rotated: B::Buffer,
    selected: B::Indices,
    attended: B::Buffer,
    block: B::Buffer,
    logits: B::Buffer,
    ids: B::Indices,
    weights: B::Buffer,
    latents: B::Cache,
    keys: B::Cache,
}

/// Widths of [`Layer::projected`].
const PROJECTED: [usize; 6] = [WIDTH, HEADS * WIDTH, HEADS * WIDTH, INDEX_DIM, INDEX_HEADS * INDEX_DIM, INDEX_HEADS];

impl<B: Backend> Layer<B> {
    fn new(b: &Subject<B>, n: usize) -> Layer<B> {
        let backend = b.backend();
        let load = |dtype, rows, cols, seed| b.load(&matrix(dtype, 1, rows, cols, seed));
        let mlp = |dtype, stack, seed| {
            let shapes = [(64, HIDDEN), (64, HIDDEN), (HIDDEN, 64)];
            b.load_mlp(&shapes.map(|(rows, cols)| matrix(dtype, stack, rows, cols, seed)))
        };
        let vector = |seed, width| backend.load_vector(&noise(seed, width));
        let n_slots = slots(FIRST as usize + STEPS as usize);
        Layer {
            table: load(DType::BF16, VOCAB, HIDDEN, 1),
            inputs: PROJECTED.iter().map(|rows| load(AFFINE8, *rows, HIDDEN, *rows as u64)).collect(),
            embed_q: b.load(&matrix(AFFINE8, HEADS, LATENT, LATENT, 7)),
            output: load(DType::Mxfp4, HIDDEN, HEADS * LATENT, 8),
            gate: load(DType::BF16, EXPERTS, HIDDEN, 9),
            experts: mlp(DType::Mxfp4, EXPERTS, 10),
            shared: mlp(AFFINE8, 1, 11),
            norm: vector(12, HIDDEN),
            q_norm: vector(13, HEADS * WIDTH),
            latent_norm: vector(14, LATENT),
            key_norm: vector(15, INDEX_DIM),
            bias: vector(16, EXPERTS),
            rope: rope(ROPE, RopeLayout::Interleaved),
            x: b.out(n, HIDDEN),
            normed: b.out(n, HIDDEN),
            projected: PROJECTED.iter().map(|width| b.out(n, *width)).collect(),
            q: b.out(n, HEADS * WIDTH),
            rotated: b.out(n, INDEX_HEADS * INDEX_DIM),
            selected: backend.alloc_indices(n, TOPK),
            attended: b.out(n, HEADS * LATENT),
            block: b.out(n, HIDDEN),
            logits: b.out(n, EXPERTS),
            ids: backend.alloc_indices(n, ROUTING.top_k),
            weights: b.out(n, ROUTING.top_k),
            latents: b.cache(CacheKind::Latent, n_slots, WIDTH),
            keys: b.cache(CacheKind::IndexKey, n_slots, INDEX_DIM),
        }
    }

    fn forward(&mut self, b: &B, batch: &B::Batch, n: usize) {
        let Layer { rope, x, normed, projected, q, rotated, selected, attended, block, .. } = self;
        let (logits, ids, weights) = (&mut self.logits, &mut self.ids, &mut self.weights);
        let index_rope = Rope { inv_freq: rope.inv_freq[..INDEX_DIM / 4].to_vec(), ..rope.clone() };
        b.embed(&self.table, batch, x);
        b.rms_norm(RmsNorm { x, weight: &self.norm, eps: EPS, n_rows: n, out: normed });
        let mut outputs: Vec<(&B::Matrix, &mut B::Buffer)> = self.inputs.iter().zip(projected.iter_mut()).collect();
        b.linear(Linear { x: normed, n_rows: n, outputs: &mut outputs, label: ModuleKind::Attention });
        let [kv_a, q_a, unrotated, key, index_q, index_weights] = &projected[..] else { unreachable!("six outputs") };
        b.prepare_attention(PrepareAttention {
            query: Some(RmsNorm { x: q_a, weight: &self.q_norm, eps: EPS, n_rows: n, out: q }),
            latent: WriteLatent { kv_a, norm: &self.latent_norm, eps: EPS, rope, batch, cache: &mut self.latents },
            key: Some(WriteIndexKey {
                k: key,
                norm: &self.key_norm,
                norm_bias: &self.key_norm,
                eps: EPS,
                rope: &index_rope,
                batch,
                cache: &mut self.keys,
            }),
        });
        b.rope_index_select(RopeIndexSelect {
            q: index_q,
            heads: Heads::packed(INDEX_HEADS, INDEX_DIM),
            rope: &index_rope,
            rotated,
            weights: index_weights,
            batch,
            cache: &self.keys,
            selected,
        });
        let heads = Heads { n: HEADS, stride: WIDTH, offset: 0, width: LATENT };
        let (w, out) = (&self.embed_q, &mut *q);
        b.head_linear(HeadLinear { x: unrotated, from: heads, w, n_rows: n, out, to: heads });
        b.rope_mla_attention(RopeMlaAttention {
            x: unrotated,
            from: Heads { n: HEADS, stride: WIDTH, offset: LATENT, width: ROPE },
            rope,
            q,
            latent: LATENT,
            scale: 0.1,
            batch,
            cache: &self.latents,
            selected: Some(selected),
            out: attended,
        });
        let outputs = &mut [(&self.output, &mut *block)];
        b.linear(Linear { x: attended, n_rows: n, outputs, label: ModuleKind::Attention });
        b.add_rms_norm(AddRmsNorm { x, y: block, weight: &self.norm, eps: EPS, n_rows: n, out: normed });
        let (gate, bias, routing) = (&self.gate, &self.bias, &ROUTING);
        b.route(Route { x: normed, gate, bias, routing, n_rows: n, logits, ids, weights });
        let (experts, shared) = (&self.experts, Some(&self.shared));
        b.moe(Moe { x: normed, experts, shared, ids, weights, n_rows: n, out: block });
        b.add(x, block, n);
    }
}

impl Steps {
    /// Rows of all sequences, each at a position of its own.
    fn batch(&self, step: u32) -> Batch {
        let n = self.n as u32;
        let sequences = SEQUENCES as u32;
        Batch {
            tokens: (0..n).map(|r| (7 * r + 13 * step) % VOCAB as u32).collect(),
            positions: (0..n).map(|r| (FIRST + step).saturating_sub(r / sequences)).collect(),
            sequences: (0..n).map(|r| r % sequences).collect(),
            block_tables: tables(FIRST as usize + STEPS as usize),
            ..plain_batch(self.n)
        }
    }

    /// The residual stream after every step.
    fn run<B: Backend>(&self, subject: &Subject<B>, recorded: bool) -> Vec<Vec<f32>> {
        let subject = subject.fresh();
        let b = subject.backend();
        let mut layer = Layer::new(&subject, self.n);
        (0..STEPS)
            .map(|step| {
                let batch = b.upload(self.batch(step));
                if recorded {
                    let context = (FIRST + step + 1) as usize;
                    b.record_or_replay(&batch, context, &mut |_| layer.forward(b, &batch, self.n));
                } else {
                    layer.forward(b, &batch, self.n);
                }
                subject.values(&layer.x, self.n * HIDDEN)
            })
            .collect()
    }
}

impl Case for Steps {
    type Expected = ();

    fn name(&self) -> String {
        format!("record_or_replay of a layer n={}", self.n)
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        let (found, expected) = (self.run(b, true), self.run(b, false));
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            if let Some(i) = expected.iter().position(|v| !v.is_finite()) {
                return Err(format!("step {step}: value {i} is {}", expected[i]));
            }
            same(&format!("step {step}"), found, expected)?;
        }
        Ok(())
    }
}
