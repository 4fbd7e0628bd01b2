//! Bytes that a decode step really reads, and arithmetic that a prefill really does.

use serde_json::{Map, Value, json};
use tandem_core::backend::{CacheKind, CacheSpec};
use tandem_core::weights::ModuleKind;
use tandem_model::cache_specs;

use super::MeasuredModel;

/// Bytes of one step by module kind.
pub struct BytesRead {
    /// Names of kinds of module, and bytes.
    pub kinds: Vec<(&'static str, f64)>,
    /// Different routed experts per MoE layer, counted while profiling.
    pub experts_per_layer: Option<f64>,
}

impl BytesRead {
    /// Bytes of decoding `batch` sequences with `visible` positions each: weights once, routed experts as often as they were
    /// counted to differ, and each sequence's attended cache.
    pub fn of_decode_step(
        model: &MeasuredModel,
        visible: usize,
        batch: usize,
        experts_per_layer: Option<f64>,
    ) -> BytesRead {
        let config = &model.config;
        let sparse = config.indexer.as_ref().is_some_and(|i| visible > i.index_topk);
        let mut kinds = vec![];
        for share in &model.accounting.kinds {
            let once = share.read_bytes as f64;
            let read = match share.kind {
                ModuleKind::Mtp => continue,
                ModuleKind::Embed => once * batch as f64,
                ModuleKind::Indexer if !sparse => once - model.accounting.index_query_bytes as f64,
                ModuleKind::RoutedExperts => match (experts_per_layer, &config.moe) {
                    (Some(n), Some(moe)) => once * n / moe.num_experts_per_tok as f64,
                    _ => once,
                },
                _ => once,
            };
            kinds.push((share.kind.name(), read));
        }
        kinds.push(("kv_cache", batch as f64 * cache_bytes(model, visible, sparse)));
        BytesRead { kinds, experts_per_layer }
    }

    /// Bytes of all kinds.
    pub fn total(&self) -> f64 {
        self.kinds.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Per token of a batch.
    pub fn json(&self, batch: usize) -> Value {
        let share = |bytes: f64| json!((bytes / batch as f64).round() as u64);
        let mut map: Map<String, Value> = self.kinds.iter().map(|(name, n)| (name.to_string(), share(*n))).collect();
        map.insert("total".into(), share(self.total()));
        Value::Object(map)
    }
}

/// Cached bytes that one sequence's token attends to, each counted once.
fn cache_bytes(model: &MeasuredModel, visible: usize, sparse: bool) -> f64 {
    let config = &model.config;
    let read = |spec: CacheSpec| {
        let positions = match spec.kind {
            CacheKind::Latent => config.indexer.as_ref().map_or(visible, |i| visible.min(i.index_topk)),
            CacheKind::IndexKey if !sparse => 0,
            CacheKind::IndexKey | CacheKind::KeyValue => visible,
        };
        positions * model.runner.cache_bytes(spec.kind, spec.width)
    };
    let specs = (0..config.num_hidden_layers).flat_map(|layer| cache_specs(config, layer));
    let bytes: usize = specs.map(read).sum();
    bytes as f64
}

/// Floating-point operations of a prompt: 2 per weight that a token meets. The output projection runs for the last
/// token only, index queries only in chunks that see more than `index_topk` positions.
pub fn prefill_flop(model: &MeasuredModel, context: usize, n_tokens: usize, chunk: usize) -> f64 {
    let config = &model.config;
    let end = context + n_tokens;
    let scored: usize = (context..end)
        .step_by(chunk)
        .map(|first| (first, (first + chunk).min(end)))
        .filter(|(_, end)| config.indexer.as_ref().is_some_and(|i| *end > i.index_topk))
        .map(|(first, end)| end - first)
        .sum();
    let mut weights = 0.0;
    for share in &model.accounting.kinds {
        let active = share.active_parameters as f64;
        weights += match share.kind {
            ModuleKind::Embed | ModuleKind::Norms | ModuleKind::Mtp => 0.0,
            ModuleKind::LmHead => active,
            ModuleKind::Indexer => {
                let queries = model.index_query_parameters as f64;
                (active - queries) * n_tokens as f64 + queries * scored as f64
            }
            _ => active * n_tokens as f64,
        };
    }
    2.0 * weights
}
