//! Bytes and parameters of a model by module kind: what is resident, and what one decoded token reads.

use tandem_core::ModelConfig;
use tandem_core::weights::{ModuleKind, Read, Weight};

/// One module kind's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KindShare {
    /// The kind.
    pub kind: ModuleKind,
    /// Elements, scales not counted.
    pub parameters: u64,
    /// Elements that take part in one token.
    pub active_parameters: u64,
    /// Bytes in memory, scales and biases included.
    pub resident_bytes: u64,
    /// Bytes read to decode one token at batch 1, every position scored by the indexer.
    pub read_bytes: u64,
    /// Storage formats, each with its resident bytes, largest first.
    pub formats: Vec<(String, u64)>,
}

/// A model's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accounting {
    /// Kinds that exist, in report order.
    pub kinds: Vec<KindShare>,
    /// The part of the indexer's `read_bytes` that is not read while the context is at most `index_topk`.
    pub index_query_bytes: u64,
}

impl Accounting {
    /// Adds up the weights of a model.
    pub fn new(weights: &[Weight], config: &ModelConfig) -> Accounting {
        let mut kinds: Vec<KindShare> = vec![];
        for kind in ModuleKind::ALL {
            let mut share = KindShare {
                kind,
                parameters: 0,
                active_parameters: 0,
                resident_bytes: 0,
                read_bytes: 0,
                formats: vec![],
            };
            for weight in weights.iter().filter(|w| w.spec.kind == kind) {
                let (elements, bytes) = (weight.spec.elements() as u64, weight.bytes() as u64);
                share.parameters += elements;
                share.resident_bytes += bytes;
                share.active_parameters += weight.spec.read_per_token(elements);
                share.read_bytes += weight.spec.read_per_token(bytes);
                let name = weight.dtype.to_string();
                match share.formats.iter_mut().find(|(format, _)| *format == name) {
                    Some((_, total)) => *total += bytes,
                    None => share.formats.push((name, bytes)),
                }
            }
            if kind == ModuleKind::LmHead && config.tie_word_embeddings {
                // The embedding is read whole as the output projection.
                for embed in weights.iter().filter(|w| w.spec.kind == ModuleKind::Embed) {
                    share.active_parameters += embed.spec.elements() as u64;
                    share.read_bytes += embed.bytes() as u64;
                }
            }
            share.formats.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
            if share.parameters > 0 || share.read_bytes > 0 {
                kinds.push(share);
            }
        }
        let queries = weights.iter().filter(|w| w.spec.read == Read::Sparse);
        Accounting { kinds, index_query_bytes: queries.map(|w| w.bytes() as u64).sum() }
    }

    /// Sum over kinds.
    pub fn total(&self, of: impl Fn(&KindShare) -> u64) -> u64 {
        self.kinds.iter().map(of).sum()
    }

    /// Weight bytes that decoding one token reads with `context` tokens visible.
    pub fn read_bytes_at(&self, config: &ModelConfig, context: usize) -> u64 {
        let sparse = config.indexer.as_ref().is_some_and(|i| context > i.index_topk);
        self.total(|k| k.read_bytes) - if sparse { 0 } else { self.index_query_bytes }
    }
}
