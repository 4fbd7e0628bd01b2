//! Caches of latents, keys and values, and attention over them.

use tandem_core::Backend;
use tandem_core::backend::{Batch, CacheKind, Heads, RopeLayout};

use crate::data::{SEQUENCES, all_positions, coarse, grid, last_rows, noise, plain_batch, rope, slots, tables};
use crate::subject::{Latents, Mla};
use crate::tolerance::{Budget, EVEN};
use crate::{Case, Oracle, Precision, Rounding, Subject, Suite, compare, same};

/// Standard deviation of attention's logits, to which queries are scaled.
const SPREAD: f64 = 1.5;

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>, batches: &[usize]) {
    for n in batches {
        for (latent, rope_dim) in [(64, 32), (48, 16), (512, 64), (40, 8)] {
            for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
                suite.case(&WriteLatent { latent, rope_dim, layout, n: *n, fused_query: None });
            }
            // The fused block, with and without queries.
            for query in [0, 200] {
                let layout = RopeLayout::Interleaved;
                suite.case(&WriteLatent { latent, rope_dim, layout, n: *n, fused_query: Some(query) });
            }
        }
        for width in [8, 64, 256] {
            suite.case(&WriteCache { width, n: *n });
        }
    }
    for (heads, latent, rope_dim, context) in
        [(4, 64, 32, 1), (4, 64, 32, 5), (6, 128, 32, 300), (5, 48, 16, 90), (16, 512, 64, 130), (64, 512, 64, 260)]
    {
        for n in batches.iter().filter(|n| heads < 16 || [1, 3, 65].contains(*n)) {
            // Every combination of small heads; of large ones, each choice once.
            let combinations = [(None, false), (Some(100), true), (None, true), (Some(16), false), (Some(16), true)];
            for (topk, fused) in combinations.into_iter().take(if heads < 16 { 5 } else { 2 }) {
                suite.case(&LatentAttention { heads, latent, rope_dim, context, n: *n, topk, fused, only: None });
            }
        }
    }
    for (heads, kv_heads, dim, context) in [(8, 2, 64, 3), (8, 8, 32, 200), (6, 2, 128, 333), (5, 1, 16, 70)] {
        for n in batches {
            suite.case(&Grouped { heads, kv_heads, dim, context, n: *n });
        }
    }
    for (latent, rope_dim) in [(64, 32), (512, 64)] {
        suite.case(&PageOfLatents { latent, rope_dim });
    }
    suite.case(&PageOfValues { width: 96 });
}

/// Vectors of `n` rows spread over all sequences, written to a cache and read back.
pub(crate) struct WriteLatent {
    pub(crate) latent: usize,
    pub(crate) rope_dim: usize,
    pub(crate) layout: RopeLayout,
    pub(crate) n: usize,
    /// By [`Backend::prepare_attention`], with queries of this width (none if 0); else by [`Backend::write_latent`].
    pub(crate) fused_query: Option<usize>,
}

/// `n` rows at different positions of all sequences.
pub(crate) fn scattered_rows(n: usize) -> Batch {
    let context = 2 * n.div_ceil(SEQUENCES) + 1;
    Batch {
        positions: (0..n).map(|r| (2 * (r / SEQUENCES) + r % 2) as u32).collect(),
        sequences: (0..n).map(|r| (r % SEQUENCES) as u32).collect(),
        block_tables: tables(context),
        ..plain_batch(n)
    }
}

impl WriteLatent {
    /// Cached vectors, and normalised queries if there are any.
    fn run<B: Backend>(&self, b: &Subject<B>) -> (Vec<f32>, Vec<f32>) {
        let WriteLatent { latent, rope_dim, layout, n, fused_query } = *self;
        let (width, batch) = (latent + rope_dim, scattered_rows(n));
        let mut cache = b.cache(CacheKind::Latent, slots(batch.max_context()), width);
        let (kv_a, norm, rope) = (noise(50, n * width), noise(4, latent), rope(rope_dim, layout));
        let latents = Latents { kv_a: &kv_a, norm: &norm, rope: &rope };
        let mut queries = vec![];
        match fused_query {
            None => b.write_latent(&latents, &batch, &mut cache),
            Some(query) => {
                let (x, weight) = (noise(51, n * query), noise(52, query));
                let query = (query > 0).then_some((&x[..], &weight[..]));
                queries = b.prepare_attention(query, &latents, &mut cache, None, &batch).unwrap_or_default();
            }
        }
        (b.read_cache(&cache, width, &batch), queries)
    }
}

/// A norm of `width` elements: half of the error of the mean square remains after the root; a root, a division and two
/// products.
fn norm_budget(width: usize) -> Budget {
    Budget::sum(width).times(0.25).and(Budget::steps(4))
}

impl Case for WriteLatent {
    type Expected = (Vec<f32>, Vec<f32>);

    fn name(&self) -> String {
        let WriteLatent { latent, rope_dim, layout, n, fused_query } = self;
        let how = match fused_query {
            None => "write_latent".to_string(),
            Some(0) => "prepare_attention without queries".to_string(),
            Some(query) => format!("prepare_attention with queries of {query}"),
        };
        format!("{how} {latent}+{rope_dim} {layout:?} n={n}")
    }

    fn expected(&self, oracle: &Oracle) -> Self::Expected {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, (rows, queries): &Self::Expected) -> Result<(), String> {
        let (found, found_queries) = self.run(b);
        let width = self.latent + self.rope_dim;
        let part = |values: &[f32], from: usize, to: usize| -> Vec<f32> {
            values.chunks_exact(width).flat_map(|row| row[from..to].iter().copied()).collect()
        };
        let stored = Budget::rounded(b.precision.cache, EVEN);
        let compare_part = |what, from, to, budget: Budget| {
            compare(what, &part(&found, from, to), &part(rows, from, to), 0.0, budget.and(stored))
        };
        compare_part("latents", 0, self.latent, norm_budget(self.latent))?;
        compare_part("rotated keys", self.latent, width, Budget::steps(6))?;
        compare("queries", &found_queries, queries, 0.0, norm_budget(self.fused_query.unwrap_or(0)))
    }
}

/// [`Backend::write_cache`]: values of bf16 come back as they are.
struct WriteCache {
    width: usize,
    n: usize,
}

impl Case for WriteCache {
    type Expected = ();

    fn name(&self) -> String {
        format!("write_cache {} n={}", self.width, self.n)
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        let (batch, x) = (scattered_rows(self.n), coarse(3, self.n * self.width));
        let mut cache = b.cache(CacheKind::KeyValue, slots(batch.max_context()), self.width);
        b.write_cache(&x, &batch, &mut cache);
        same("rows", &b.read_cache(&cache, self.width, &batch), &x)
    }
}

/// A cache of latents for every position of all sequences.
pub(crate) fn latent_cache<B: Backend>(b: &Subject<B>, latent: usize, rope_dim: usize, context: usize) -> B::Cache {
    let width = latent + rope_dim;
    let mut cache = b.cache(CacheKind::Latent, slots(context), width);
    let (norm, rope) = (noise(4, latent), rope(rope_dim, RopeLayout::Interleaved));
    for (i, batch) in all_positions(context, &tables(context), 1024).into_iter().enumerate() {
        let kv_a = noise(50 + i as u64, batch.n_rows() * width);
        b.write_latent(&Latents { kv_a: &kv_a, norm: &norm, rope: &rope }, &batch, &mut cache);
    }
    cache
}

/// [`Backend::mla_attention`] or [`Backend::rope_mla_attention`], over all positions or `topk` selected ones.
pub(crate) struct LatentAttention {
    pub(crate) heads: usize,
    pub(crate) latent: usize,
    pub(crate) rope_dim: usize,
    pub(crate) context: usize,
    pub(crate) n: usize,
    pub(crate) topk: Option<usize>,
    pub(crate) fused: bool,
    /// Heads that are compared; all if none.
    pub(crate) only: Option<Vec<usize>>,
}

impl LatentAttention {
    /// Selected positions that every backend agrees on: keys and queries in eighths, whose scores are exact.
    fn selected<B: Backend>(&self, b: &Subject<B>, batch: &Batch, k: usize) -> B::Indices {
        const DIM: usize = 32;
        const HEADS: usize = 4;
        let mut keys = b.cache(CacheKind::KeyValue, slots(self.context), DIM);
        for (i, batch) in all_positions(self.context, &tables(self.context), 1024).into_iter().enumerate() {
            b.write_cache(&grid(70 + i as u64, batch.n_rows() * DIM), &batch, &mut keys);
        }
        b.index_select(&grid(8, self.n * HEADS * DIM), &grid(9, self.n * HEADS), batch, &keys, k)
    }

    /// Queries of the heads `only`, whose latent parts and parts to rotate lie side by side in heads of `latent + rope`.
    fn run<B: Backend>(&self, b: &Subject<B>, only: Option<&[usize]>) -> [Vec<f32>; 2] {
        let LatentAttention { latent, rope_dim, context, n, .. } = *self;
        let width = latent + rope_dim;
        let all: Vec<usize> = (0..self.heads).collect();
        let chosen = only.unwrap_or(&all);
        let (whole, batch) = (noise(6, n * self.heads * width), last_rows(n, context));
        let q: Vec<f32> = whole
            .chunks_exact(self.heads * width)
            .flat_map(|row| chosen.iter().flat_map(|h| row[h * width..(h + 1) * width].iter().copied()))
            .collect();
        let cache = latent_cache(b, latent, rope_dim, context);
        let selected = self.topk.map(|k| self.selected(b, &batch, k));
        // Queries and cached elements have mean squares of 1/3.
        let scale = (SPREAD * 3.0 / (width as f64).sqrt()) as f32;
        let mla = Mla { q: &q, heads: chosen.len(), latent, scale };
        if !self.fused {
            return b.mla_attention(mla, &batch, &cache, selected.as_ref());
        }
        let from = Heads { n: chosen.len(), stride: width, offset: latent, width: rope_dim };
        let rope = rope(rope_dim, RopeLayout::Interleaved);
        let out = b.rope_mla_attention(mla, (&q, from, &rope), &batch, &cache, selected.as_ref());
        [out.clone(), out]
    }
}

/// The error of attention over `positions` with keys of `width` elements, `operands` being the rounding of queries and of
/// shares.
fn attention_budget(stored: Rounding, operands: Rounding, width: usize, positions: usize) -> Budget {
    let (stored, operands) = (Budget::rounded(stored, EVEN), Budget::rounded(operands, EVEN));
    // Logits are products of queries and keys; exponents of up to five deviations are rounded before the exponential.
    let logits = Budget::sum(width).and(stored).and(operands).times(SPREAD * SPREAD);
    let exponents = Budget::steps(1).times((5.0 * SPREAD).powi(2)).and(Budget::steps(4));
    // Shares times values, and the sum of shares that divides them.
    logits.and(exponents).and(stored).and(operands).and(Budget::sum(positions).times(2.0))
}

impl Case for LatentAttention {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        let LatentAttention { heads, latent, rope_dim, context, n, topk, fused, .. } = self;
        let name = if *fused { "rope_mla_attention" } else { "mla_attention" };
        let of = topk.map_or("all".into(), |k: usize| format!("{k}"));
        format!("{name} {heads} heads {latent}+{rope_dim}, {of} of {context} positions n={n}")
    }

    fn bytes(&self) -> usize {
        slots(self.context) * (self.latent + self.rope_dim) * 4
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        let [expected, _] = self.run(oracle, self.only.as_deref());
        expected
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let [found, again] = self.run(b, None);
        same("the second run", &again, &found)?;
        let found = match &self.only {
            None => found,
            Some(heads) => found
                .chunks_exact(self.heads * self.latent)
                .flat_map(|row| heads.iter().flat_map(|h| row[h * self.latent..(h + 1) * self.latent].iter().copied()))
                .collect(),
        };
        let Precision { cache, mla, .. } = b.precision;
        let positions = self.topk.unwrap_or(self.context).min(self.context);
        let budget = attention_budget(cache, mla, self.latent + self.rope_dim, positions);
        // Cached elements carry the errors of their norms.
        compare("heads", &found, expected, 0.0, budget.and(norm_budget(self.latent).times(1.0 + SPREAD * SPREAD)))
    }
}

/// [`Backend::gqa_attention`] over keys and values that bf16 has.
struct Grouped {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    context: usize,
    n: usize,
}

impl Grouped {
    fn run<B: Backend>(&self, b: &Subject<B>) -> Vec<f32> {
        let Grouped { heads, kv_heads, dim, context, n } = *self;
        let width = kv_heads * dim;
        let fill = |seed: u64| {
            let mut cache = b.cache(CacheKind::KeyValue, slots(context), width);
            for (i, batch) in all_positions(context, &tables(context), 256).into_iter().enumerate() {
                b.write_cache(&coarse(seed + i as u64, batch.n_rows() * width), &batch, &mut cache);
            }
            cache
        };
        let scale = (SPREAD * 3.0 / (dim as f64).sqrt()) as f32;
        let q = noise(6, n * heads * dim);
        b.gqa_attention(&q, (heads, kv_heads, dim), scale, &last_rows(n, context), &fill(50), &fill(80))
    }
}

impl Case for Grouped {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        let Grouped { heads, kv_heads, dim, context, n } = self;
        format!("gqa_attention {heads} heads on {kv_heads} of {dim}, {context} positions n={n}")
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let budget = attention_budget(Rounding::None, b.precision.gqa, self.dim, self.context);
        compare("heads", &self.run(b), expected, 0.0, budget)
    }
}

/// A page of latents that is saved and loaded to another place decodes as before; the pages beside it stay.
struct PageOfLatents {
    latent: usize,
    rope_dim: usize,
}

/// The same for plain vectors.
struct PageOfValues {
    width: usize,
}

/// Moves page 1 of the second sequence of two pages to where page 0 is in another cache, and compares what is read there.
fn check_page<B: Backend>(b: &Subject<B>, width: usize, filled: &B::Cache, mut other: B::Cache) -> Result<(), String> {
    let context = 128;
    let tables = tables(context);
    let page_rows = |sequence: usize, first: u32| Batch {
        positions: (first..first + 64).collect(),
        sequences: vec![sequence as u32; 64],
        block_tables: tables.clone(),
        ..plain_batch(64)
    };
    let saved_rows = b.read_cache(filled, width, &page_rows(1, 64));
    let kept_rows = b.read_cache(&other, width, &page_rows(0, 64));
    let mut bytes = vec![];
    if !b.save_page(filled, tables[1][1], &mut bytes) {
        return Err("save_page says that it cannot, after it could".into());
    }
    let target = tables[0][0];
    let mut short = &bytes[..bytes.len() - 1];
    if b.load_page(&mut other, target, &mut short) {
        return Err("a page of too few bytes was loaded".into());
    }
    bytes.extend([1, 2, 3]);
    let mut rest = &bytes[..];
    if !b.load_page(&mut other, target, &mut rest) || rest != [1, 2, 3] {
        return Err(format!("the page was not taken off the front: {} bytes are left", rest.len()));
    }
    same("the page", &b.read_cache(&other, width, &page_rows(0, 0)), &saved_rows)?;
    same("the page beside it", &b.read_cache(&other, width, &page_rows(0, 64)), &kept_rows)
}

fn saves_pages<B: Backend>(b: &Subject<B>) -> bool {
    b.save_page(&b.cache(CacheKind::KeyValue, 64, 8), 0, &mut vec![])
}

impl Case for PageOfLatents {
    type Expected = ();

    fn name(&self) -> String {
        format!("save_page and load_page of latents {}+{}", self.latent, self.rope_dim)
    }

    fn applies<B: Backend>(&self, b: &Subject<B>) -> bool {
        saves_pages(b)
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        let filled = latent_cache(b, self.latent, self.rope_dim, 128);
        let other = b.cache(CacheKind::Latent, slots(128), self.latent + self.rope_dim);
        check_page(b, self.latent + self.rope_dim, &filled, other)
    }
}

impl Case for PageOfValues {
    type Expected = ();

    fn name(&self) -> String {
        format!("save_page and load_page of vectors of {}", self.width)
    }

    fn applies<B: Backend>(&self, b: &Subject<B>) -> bool {
        saves_pages(b)
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        let fill = |seed: u64| {
            let mut cache = b.cache(CacheKind::KeyValue, slots(128), self.width);
            for (i, batch) in all_positions(128, &tables(128), 256).into_iter().enumerate() {
                b.write_cache(&coarse(seed + i as u64, batch.n_rows() * self.width), &batch, &mut cache);
            }
            cache
        };
        check_page(b, self.width, &fill(3), fill(90))
    }
}
