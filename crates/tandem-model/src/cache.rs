//! The key-value cache: storage by layer as the family's [`CacheSpec`]s say, pages of it, and random contents.

use tandem_core::ModelConfig;
use tandem_core::backend::{
    Backend, Batch, CacheKind, CacheSpec, PAGE_SIZE, Rope, RopeLayout, WriteIndexKey, WriteLatent,
};

/// Different pages of vectors in use by [`KvCache::fill_random`]; a layer's pages take turns with them.
const N_PAGES: usize = 5;

/// The cache of one decoder layer, each kind of vector in a cache of its own, in the order of the layer's
/// [`CacheSpec`]s.
pub struct LayerCache<B: Backend> {
    specs: Vec<CacheSpec>,
    /// `[n_slots, width]` each.
    pub caches: Vec<B::Cache>,
}

/// The key-value cache of all layers.
pub struct KvCache<B: Backend> {
    /// One entry per decoder layer.
    pub layers: Vec<LayerCache<B>>,
}

impl<B: Backend> KvCache<B> {
    /// An empty cache for `n_slots` tokens.
    pub fn new(backend: &B, layers: &[Vec<CacheSpec>], n_slots: usize) -> KvCache<B> {
        let alloc = |spec: &CacheSpec| backend.alloc_cache(spec.kind, n_slots, spec.width);
        let layer =
            |specs: &Vec<CacheSpec>| LayerCache { specs: specs.clone(), caches: specs.iter().map(alloc).collect() };
        KvCache { layers: layers.iter().map(layer).collect() }
    }

    /// The vectors of a page in all layers; `None` if the backend cannot save them.
    pub fn save_page(&self, backend: &B, page: u32) -> Option<Vec<u8>> {
        let mut bytes = vec![];
        let mut caches = self.layers.iter().flat_map(|layer| &layer.caches);
        caches.all(|cache| backend.save_page(cache, page, &mut bytes)).then_some(bytes)
    }

    /// Fills a page with what [`KvCache::save_page`] returned for the same model and numerics; false, and the page's
    /// contents are undefined, when that is not possible.
    pub fn load_page(&mut self, backend: &B, page: u32, mut bytes: &[u8]) -> bool {
        let mut caches = self.layers.iter_mut().flat_map(|layer| &mut layer.caches);
        caches.all(|cache| backend.load_page(cache, page, &mut bytes)) && bytes.is_empty()
    }

    /// Fills slots `0..n_slots` of every layer through the operations that a forward pass caches with, so that every
    /// backend has it and cached values have the magnitudes of real ones.
    pub fn fill_random(&mut self, backend: &B, config: &ModelConfig, n_slots: usize, seed: u64) {
        let mut random = Random(seed | 1);
        let mut pages = |width: usize| -> Vec<B::Buffer> {
            let mut page = |_| {
                let mut rows = backend.alloc(PAGE_SIZE, width);
                backend.write_rows(&(0..PAGE_SIZE * width).map(|_| random.next()).collect::<Vec<f32>>(), &mut rows);
                rows
            };
            (0..N_PAGES).map(&mut page).collect()
        };
        let ones = |width: usize| backend.load_vector(&vec![1.0; width]);
        let (latent_width, rope_dim) = config.mla.as_ref().map_or((0, 0), |m| (m.kv_lora_rank, m.qk_rope_head_dim));
        let latent_norm = ones(latent_width);
        let rope = Rope {
            inv_freq: config.rope.inv_freq(rope_dim),
            scaling: config.rope.attention_scaling(),
            layout: RopeLayout::Interleaved,
        };
        // A family has few different specs: their pages of vectors, norm and bias.
        let mut specs: Vec<CacheSpec> = vec![];
        for spec in self.layers.iter().flat_map(|layer| &layer.specs) {
            if !specs.contains(spec) {
                specs.push(*spec);
            }
        }
        let material: Vec<_> = specs
            .iter()
            .map(|spec| (pages(spec.width), ones(spec.width), backend.load_vector(&vec![0.0; spec.width])))
            .collect();
        for page in 0..n_slots.div_ceil(PAGE_SIZE) {
            let n_rows = PAGE_SIZE.min(n_slots - page * PAGE_SIZE);
            // A page is a sequence of its own here: one short table reaches any slot.
            let batch = &backend.upload(Batch {
                tokens: vec![0; n_rows],
                positions: (0..n_rows as u32).collect(),
                sequences: vec![0; n_rows],
                block_tables: vec![vec![page as u32]],
                logits_rows: vec![],
                sampling: vec![],
            });
            for (idx, layer) in self.layers.iter_mut().enumerate() {
                for (i, (spec, cache)) in layer.specs.iter().zip(&mut layer.caches).enumerate() {
                    let Some(which) = specs.iter().position(|s| s == spec) else { continue };
                    let (pages, ones, zeros) = &material[which];
                    let rows = &pages[(page + 2 * idx + i) % N_PAGES];
                    let (eps, rope) = (1e-6, &rope);
                    match spec.kind {
                        CacheKind::Latent => {
                            backend.write_latent(WriteLatent {
                                kv_a: rows,
                                norm: &latent_norm,
                                eps,
                                rope,
                                batch,
                                cache,
                            });
                        }
                        CacheKind::IndexKey => {
                            let (k, norm, norm_bias) = (rows, ones, zeros);
                            backend.write_index_key(WriteIndexKey { k, norm, norm_bias, eps, rope, batch, cache });
                        }
                        CacheKind::KeyValue => backend.write_cache(rows, batch, cache),
                    }
                }
            }
        }
    }
}

/// xorshift64 (Marsaglia 2003).
struct Random(u64);

impl Random {
    /// Uniform in -1..1.
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}
