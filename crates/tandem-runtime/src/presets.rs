//! Shapes of published models, for measuring and writing made-up checkpoints.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};

use crate::options::ShapeOptions;

/// From their config.json.
const PRESETS: [(&str, &str); 3] = [
    ("glm-5.1", include_str!("presets/glm-5.1.json")),
    ("deepseek-v3.2", include_str!("presets/deepseek-v3.2.json")),
    ("llama-3.2-3b", include_str!("presets/llama-3.2-3b.json")),
];

/// Name and text of a configuration: a preset's or a file's.
///
/// # Errors
/// It is neither, or the file cannot be read.
pub fn config_text(name: &str) -> anyhow::Result<(String, String)> {
    if let Some((name, text)) = PRESETS.iter().find(|(preset, _)| *preset == name) {
        return Ok((name.to_string(), text.to_string()));
    }
    let path = Path::new(name);
    if !path.is_file() {
        let known: Vec<&str> = PRESETS.iter().map(|(preset, _)| *preset).collect();
        bail!("--config {name} is neither a file nor one of {}", known.join(", "));
    }
    Ok((name.to_string(), read(path)?))
}

/// The text of a file.
///
/// # Errors
/// It cannot be read as UTF-8.
pub fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

impl ShapeOptions {
    /// True when weights are made up; `instead` says how to name a checkpoint.
    ///
    /// # Errors
    /// Shapes are given, but the weights are a checkpoint's.
    pub fn is_dummy(&self, instead: &str) -> anyhow::Result<bool> {
        if !self.dummy {
            ensure!(self.config.is_none(), "--config gives shapes only; add --load-format dummy, or use {instead}");
            ensure!(
                self.num_layers.or(self.first_dense).or(self.vocab).is_none(),
                "--num-layers, --first-dense and --vocab change shapes; they need --load-format dummy"
            );
        }
        Ok(self.dummy)
    }

    /// A configuration's text with these shapes, so that it is validated like any other.
    ///
    /// # Errors
    /// It is not a JSON object, or has no experts where a number of dense layers is asked for.
    pub fn apply(&self, text: &str) -> anyhow::Result<String> {
        let mut config: Map<String, Value> =
            serde_json::from_str(text).context("the configuration is not a JSON object")?;
        if let Some(n) = self.num_layers {
            config.insert("num_hidden_layers".into(), json!(n));
        }
        if let Some(n) = self.first_dense {
            ensure!(config.contains_key("n_routed_experts"), "--first-dense needs a model with experts");
            config.remove("mlp_layer_types");
            config.insert("first_k_dense_replace".into(), json!(n));
        }
        if let Some(n) = self.vocab {
            config.insert("vocab_size".into(), json!(n));
            // A smaller vocabulary ends before the model's special tokens.
            config.retain(|key, value| !key.ends_with("_token_id") || is_below(value, n));
        }
        Ok(serde_json::to_string(&config)?)
    }
}

/// Whether every token id, of one or of a list, is below `n`.
fn is_below(ids: &Value, n: usize) -> bool {
    match ids {
        Value::Array(ids) => ids.iter().all(|id| is_below(id, n)),
        id => id.as_u64().is_none_or(|id| id < n as u64),
    }
}

#[cfg(test)]
mod tests {
    use tandem_core::ModelConfig;
    use tandem_model::{Accounting, DummyWeights, Recipe, Stacks};

    use super::*;

    #[test]
    fn a_smaller_vocabulary_has_no_special_tokens_beyond_it() {
        let text = r#"{"vocab_size": 100, "eos_token_id": [98, 5], "bos_token_id": 1, "pad_token_id": 99, "cls_token_id": null}"#;
        let shapes = ShapeOptions { vocab: Some(64), ..ShapeOptions::default() };
        let config: Value = serde_json::from_str(&shapes.apply(text).expect("an object")).expect("JSON");
        assert_eq!(config, json!({"vocab_size": 64, "bos_token_id": 1, "cls_token_id": null}));
    }

    #[test]
    fn presets_are_valid() {
        for (name, text) in PRESETS {
            let config = ModelConfig::parse(text).unwrap_or_else(|e| panic!("{name}: {e}"));
            let weights = DummyWeights::new(&config, &Recipe::parse("mxfp4-q8").expect("known"), Stacks::Distinct);
            let active = Accounting::new(weights.weights(), &config).total(|k| k.active_parameters);
            let billions = match name {
                "glm-5.1" => 40.0..42.0,
                "deepseek-v3.2" => 36.0..39.0,
                _ => 3.1..3.3,
            };
            assert!(billions.contains(&(active as f64 / 1e9)), "{name}: {active} active parameters");
        }
    }
}
