//! The shapes of GLM-5.1 and DeepSeek-V3.2: up to three rows, of whose results some rows or heads are compared, and stacks
//! that repeat a few matrices.

use tandem_core::backend::{RopeLayout, Routing};
use tandem_core::{Backend, DType};

use super::attention::{LatentAttention, WriteLatent};
use super::experts::{LargeMoe, Route};
use super::index::{Keys, Select};
use super::products::{ByHead, DenseMlp, Input, Linear};
use super::rows::{Embed, Norms};
use super::sampling;
use crate::Suite;
use crate::data::{AFFINE8, large_matrix, sample_of};

/// What of a config.json decides shapes.
struct Shapes {
    vocab: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    q_lora: usize,
    nope: usize,
    value: usize,
    index_heads: usize,
    n_group: usize,
    topk_group: usize,
}

const GLM_5_1: Shapes = Shapes {
    vocab: 154_880,
    hidden: 6144,
    intermediate: 12_288,
    heads: 64,
    q_lora: 2048,
    nope: 192,
    value: 256,
    index_heads: 32,
    n_group: 1,
    topk_group: 1,
};

const DEEPSEEK_V3_2: Shapes = Shapes {
    vocab: 129_280,
    hidden: 7168,
    intermediate: 18_432,
    heads: 128,
    q_lora: 1536,
    nope: 128,
    value: 128,
    index_heads: 64,
    n_group: 8,
    topk_group: 4,
};

// What both have.
const LATENT: usize = 512;
const ROPE: usize = 64;
const EXPERTS: usize = 256;
const EXPERT_WIDTH: usize = 2048;
const INDEX_DIM: usize = 128;
const INDEX_TOPK: usize = 2048;
/// Around the selection's size, where it begins to select, and far beyond.
const CONTEXTS: [usize; 4] = [2047, 2048, 2049, 20_000];

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>) {
    for shapes in [GLM_5_1, DEEPSEEK_V3_2] {
        rows(suite, &shapes);
        products(suite, &shapes);
        experts(suite, &shapes);
        attention(suite, &shapes);
    }
    sampling::run(suite, &[(GLM_5_1.vocab, 15.0, 3)]);
}

fn rows<B: Backend>(suite: &mut Suite<B>, shapes: &Shapes) {
    for dtype in [DType::BF16, AFFINE8] {
        suite.case(&Embed { dtype, table: large_matrix(dtype, (1, 1), (shapes.vocab, shapes.hidden), 1), n: 3 });
    }
    for n in [1, 2, 3] {
        suite.case(&Norms { n, width: shapes.hidden });
        let (latent, rope_dim, layout) = (LATENT, ROPE, RopeLayout::Interleaved);
        suite.case(&WriteLatent { latent, rope_dim, layout, n, fused_query: Some(shapes.q_lora) });
    }
}

fn products<B: Backend>(suite: &mut Suite<B>, shapes: &Shapes) {
    let Shapes { hidden, heads, q_lora, nope, value, index_heads, .. } = *shapes;
    let matrices = [
        (q_lora, hidden),
        (LATENT + ROPE, hidden),
        (heads * (nope + ROPE), q_lora),
        (hidden, heads * value),
        (index_heads * INDEX_DIM, q_lora),
        (INDEX_DIM, hidden),
        (index_heads, hidden),
    ];
    for (rows, cols) in matrices {
        for dtype in [DType::Mxfp4, AFFINE8, DType::BF16] {
            let weights = large_matrix(dtype, (1, 1), (rows, cols), 2);
            for (n, input) in [(1, Input::Coarse), (3, Input::Noise)] {
                let only = Some(sample_of(rows));
                suite.case(&Linear { weights: weights.clone(), n, input, only });
            }
        }
    }
    let (weights, only) = (large_matrix(AFFINE8, (1, 1), (shapes.vocab, hidden), 3), Some(sample_of(shapes.vocab)));
    suite.case(&Linear { weights, n: 2, input: Input::Coarse, only });
    for dtype in [AFFINE8, DType::BF16] {
        for (cols, rows) in [(nope, LATENT), (LATENT, value)] {
            suite.case(&ByHead { dtype, n_heads: heads, cols, rows, n: 3 });
        }
    }
    let width = shapes.intermediate;
    let mut seed = 4..;
    let mlp = [(width, hidden), (width, hidden), (hidden, width)]
        .map(|shape| large_matrix(AFFINE8, (1, 1), shape, seed.next().unwrap_or(0)));
    suite.case(&DenseMlp { mlp, n: 3, only: Some(sample_of(hidden)) });
}

fn experts<B: Backend>(suite: &mut Suite<B>, shapes: &Shapes) {
    let Shapes { hidden, n_group, topk_group, .. } = *shapes;
    let routing =
        Routing { top_k: 8, n_group, topk_group, normalize: true, scale: 2.5, first_expert: 0, n_held: EXPERTS };
    for dtype in [DType::BF16, DType::F32, AFFINE8] {
        let gate = large_matrix(dtype, (1, 1), (EXPERTS, hidden), 7);
        (1..=3).for_each(|n| suite.case(&Route { gate: gate.clone(), routing, n }));
    }
    // Five matrices, so that neighbours in a group of 32 experts differ.
    let mlp = |dtype, stack, distinct, seed: u64| {
        let mut seed = seed..;
        [(EXPERT_WIDTH, hidden), (EXPERT_WIDTH, hidden), (hidden, EXPERT_WIDTH)]
            .map(|shape| large_matrix(dtype, (stack, distinct), shape, seed.next().unwrap_or(0)))
    };
    suite.case(&LargeMoe {
        experts: mlp(DType::Mxfp4, EXPERTS, 5, 20),
        shared: mlp(AFFINE8, 1, 1, 30),
        routing,
        batches: [1, 2, 3],
        only: sample_of(hidden),
    });
}

fn attention<B: Backend>(suite: &mut Suite<B>, shapes: &Shapes) {
    let Shapes { heads, index_heads, .. } = *shapes;
    for context in CONTEXTS {
        for (n, how, fused) in [(1, Keys::Written, true), (3, Keys::Grid, false), (2, Keys::Written, false)] {
            let (heads, dim, k) = (index_heads, INDEX_DIM, INDEX_TOPK);
            suite.case(&Select { heads, dim, context, k, n, how, fused });
        }
        let all = if context == 20_000 { &[(1, false), (3, true)][..] } else { &[(2, false), (3, true)] };
        for (n, fused) in all {
            for topk in [None, Some(INDEX_TOPK)] {
                let only = Some(vec![0, 1, heads / 2 + 1, heads - 1]);
                let (latent, rope_dim, n, fused) = (LATENT, ROPE, *n, *fused);
                if topk.is_none() && n == 3 && context == 20_000 {
                    continue;
                }
                suite.case(&LatentAttention { heads, latent, rope_dim, context, n, topk, fused, only });
            }
        }
    }
    let (heads, dim, k) = (index_heads, INDEX_DIM, INDEX_TOPK);
    suite.case(&Select { heads, dim, context: 2049, k, n: 3, how: Keys::Prepared, fused: true });
}
