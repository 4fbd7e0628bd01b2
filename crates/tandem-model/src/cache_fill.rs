//! Random cache contents, for measuring long contexts without running them.

use tandem_core::ModelConfig;
use tandem_core::backend::{Backend, Batch, PAGE_SIZE, Rope, RopeLayout, WriteIndexKey, WriteLatent};

use crate::{KvCache, LayerCache};

/// Different vectors in use; slots cycle through them, rotated by their place in a page.
const N_VECTORS: usize = 61;

impl<B: Backend> KvCache<B> {
    /// Fills slots `0..n_slots` of every layer through the operations that a forward pass caches with, so that every
    /// backend has it and cached values have the magnitudes of real ones.
    pub fn fill_random(&mut self, backend: &B, config: &ModelConfig, n_slots: usize, seed: u64) {
        let mut random = Random(seed | 1);
        let mut vectors = |width: usize| -> Vec<B::Buffer> {
            (0..N_VECTORS)
                .map(|_| backend.load_vector(&(0..width).map(|_| random.next()).collect::<Vec<f32>>()))
                .collect()
        };
        let (latent_width, rope_dim) = config.mla.as_ref().map_or((0, 0), |m| (m.kv_lora_rank, m.qk_rope_head_dim));
        let index_width = config.indexer.as_ref().map_or(0, |i| i.index_head_dim);
        let latents = vectors(latent_width + rope_dim);
        let index_keys = vectors(index_width);
        let plain = vectors(config.num_key_value_heads * config.head_dim);
        let ones = |width: usize| backend.load_vector(&vec![1.0; width]);
        let (latent_norm, index_norm) = (ones(latent_width), ones(index_width));
        let index_bias = backend.load_vector(&vec![0.0; index_width]);
        let rope = Rope {
            inv_freq: config.rope.inv_freq(rope_dim),
            scaling: config.rope.attention_scaling(),
            layout: RopeLayout::Interleaved,
        };
        for slot in 0..n_slots {
            // A page is a sequence of its own here: one short table reaches any slot.
            let batch = backend.upload(Batch {
                tokens: vec![0],
                positions: vec![(slot % PAGE_SIZE) as u32],
                sequences: vec![0],
                block_tables: vec![vec![(slot / PAGE_SIZE) as u32]],
                logits_rows: vec![],
                sampling: vec![],
            });
            for (layer, cache) in self.layers.iter_mut().enumerate() {
                let pick = slot.wrapping_mul(31).wrapping_add(layer) % N_VECTORS;
                match cache {
                    LayerCache::Latent { latent, index } => {
                        backend.write_latent(WriteLatent {
                            kv_a: &latents[pick],
                            norm: &latent_norm,
                            eps: 1e-6,
                            rope: &rope,
                            batch: &batch,
                            cache: latent,
                        });
                        if let Some(index) = index {
                            backend.write_index_key(WriteIndexKey {
                                k: &index_keys[pick],
                                norm: &index_norm,
                                norm_bias: &index_bias,
                                eps: 1e-6,
                                rope: &rope,
                                batch: &batch,
                                cache: index,
                            });
                        }
                    }
                    LayerCache::KeyValue { keys, values } => {
                        backend.write_cache(&plain[pick], &batch, keys);
                        backend.write_cache(&plain[(pick + 7) % N_VECTORS], &batch, values);
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
