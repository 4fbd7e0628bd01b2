//! Which layers' experts stay in memory of the host when a device cannot hold the whole model.
//!
//! A token reads a few of a layer's experts and all of everything else, so experts are what costs least to leave behind:
//! per byte of memory they are read least.

use std::collections::{BTreeMap, HashSet};

use tandem_core::ModelConfig;
use tandem_core::weights::{ModuleKind, Read, Weight};

use crate::Accounting;

/// A division of a model's weights between a device and its host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Offload {
    /// Layers whose experts stay on the host.
    pub layers: Vec<usize>,
    /// Their modules.
    pub modules: HashSet<String>,
    /// Bytes that stay on the host.
    pub host_bytes: u64,
    /// Bytes on the device.
    pub device_bytes: u64,
    /// The part of the host's bytes that one decoded token reads.
    pub host_read_bytes: u64,
    /// The same of the device's.
    pub device_read_bytes: u64,
}

impl Offload {
    /// Leaves the experts of the first layers that have any on the host: of `n_layers` if asked for, else of as few as let
    /// the rest fit into `room` bytes. It may not fit for all that.
    pub fn new(weights: &[Weight], config: &ModelConfig, room: u64, n_layers: Option<usize>) -> Offload {
        let of = |kept: &dyn Fn(&Weight) -> bool| {
            let kept: Vec<Weight> = weights.iter().filter(|w| w.spec.read != Read::Never && kept(w)).cloned().collect();
            let accounting = Accounting::new(&kept, config);
            (accounting.total(|k| k.resident_bytes), accounting.total(|k| k.read_bytes))
        };
        let mut experts: BTreeMap<usize, u64> = BTreeMap::new();
        for weight in weights.iter().filter(|w| w.spec.kind == ModuleKind::RoutedExperts) {
            *experts.entry(weight.spec.layer.unwrap_or(0)).or_default() += weight.bytes() as u64;
        }
        let (mut left, _) = of(&|_| true);
        let mut layers = vec![];
        for (layer, bytes) in experts {
            let enough = n_layers.map_or(left <= room, |n| layers.len() >= n);
            if enough {
                break;
            }
            left -= bytes;
            layers.push(layer);
        }
        let is_host =
            |w: &Weight| w.spec.kind == ModuleKind::RoutedExperts && layers.contains(&w.spec.layer.unwrap_or(0));
        let ((host_bytes, host_read_bytes), (device_bytes, device_read_bytes)) = (of(&is_host), of(&|w| !is_host(w)));
        let modules = weights.iter().filter(|w| is_host(w)).map(|w| w.spec.module.clone()).collect();
        Offload { layers, modules, host_bytes, device_bytes, host_read_bytes, device_read_bytes }
    }

    /// Tokens per second of one sequence at most, at these bytes per second of the device and of the host.
    pub fn tokens_per_second(&self, device: f64, host: f64) -> f64 {
        1.0 / (self.device_read_bytes as f64 / device + self.host_read_bytes as f64 / host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DummyWeights, Recipe, Stacks};

    #[test]
    fn as_few_experts_as_possible_stay_behind() {
        let text = include_str!("../../tandem-runtime/src/presets/glm-5.1.json");
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        value["num_hidden_layers"] = 6.into();
        value["first_k_dense_replace"] = 1.into();
        let config = ModelConfig::parse(&value.to_string()).unwrap();
        let weights = DummyWeights::new(&config, &Recipe::parse("mxfp4-q8").unwrap(), Stacks::Repeated);
        let weights = weights.weights();
        let whole = Offload::new(weights, &config, u64::MAX, None);
        assert_eq!((whole.layers.len(), whole.host_bytes, whole.host_read_bytes), (0, 0, 0));
        let layer = Offload::new(weights, &config, 0, Some(1));
        assert_eq!(layer.layers, [1], "layer 0 has none");
        assert_eq!(layer.modules.len(), 3);
        for n in 0..=5u64 {
            let room = whole.device_bytes - n * layer.host_bytes;
            let found = Offload::new(weights, &config, room, None);
            assert_eq!(found, Offload::new(weights, &config, 0, Some(n as usize)));
            assert_eq!((found.host_bytes, found.device_bytes), (n * layer.host_bytes, room));
            assert_eq!(Offload::new(weights, &config, room + 1, None).layers.len(), n as usize);
            assert_eq!(Offload::new(weights, &config, room - 1, None).layers.len(), (n as usize + 1).min(5));
        }
        // 8 of 256 experts.
        assert_eq!(layer.host_read_bytes, layer.host_bytes / 32);
        let seconds = layer.device_read_bytes as f64 / 3e12 + layer.host_read_bytes as f64 / 1e11;
        assert!((layer.tokens_per_second(3e12, 1e11) * seconds - 1.0).abs() < 1e-9);
    }
}
