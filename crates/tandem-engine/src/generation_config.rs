//! A model's own generation defaults: end-of-turn tokens and sampling parameters.
//!
//! Owns `generation_config.json` and how command-line flags or request fields override it. It deliberately does not
//! look at the tokenizer: stop strings and token texts belong to the binary.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tandem_core::json::without_literals;
use thiserror::Error;

use crate::sampler::{InvalidParam, SamplingParams};

/// Why a model's generation defaults could not be read.
#[derive(Debug, Error)]
pub enum GenerationConfigError {
    /// The file exists but cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not JSON of the expected shape.
    #[error("{path} is malformed: {source}; fix the file or remove it to use neutral defaults", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A value is outside its range.
    #[error("{path}: {source}; fix the file, or give the value as an option", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The parameter.
        source: InvalidParam,
    },
}

/// Generation defaults of a model; what the files do not say is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a turn, of `generation_config.json` and of `config.json`: either may leave some out.
    pub eos_token_ids: Vec<u32>,
    /// `false` asks for greedy decoding, whatever the other values are.
    pub do_sample: Option<bool>,
    /// See [`SamplingParams::temperature`].
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_k`].
    pub top_k: Option<u32>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// Most tokens to generate.
    pub max_new_tokens: Option<u32>,
}

/// What a user or a request asks for; `None` keeps the model's default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOverrides {
    /// See [`SamplingParams::temperature`]; above 0 it also overrides `do_sample: false`.
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_k`].
    pub top_k: Option<u32>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// See [`SamplingParams::presence_penalty`].
    pub presence_penalty: Option<f32>,
    /// See [`SamplingParams::frequency_penalty`].
    pub frequency_penalty: Option<f32>,
    /// See [`SamplingParams::logit_bias`].
    pub logit_bias: Vec<(u32, f32)>,
    /// See [`SamplingParams::seed`].
    pub seed: Option<u64>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a model directory, and `config.json` for the end-of-turn tokens it may lack.
    /// Missing files are fine.
    ///
    /// # Errors
    /// When a file is unreadable or malformed, or a value is outside its range.
    pub fn load(dir: &Path) -> Result<Self, GenerationConfigError> {
        let path = dir.join("generation_config.json");
        let file: GenerationFile = read_json(&path)?.unwrap_or_default();
        let mut eos_token_ids = file.eos_token_id.map(TokenIds::into_vec).unwrap_or_default();
        let model: ModelFile = read_json(&dir.join("config.json"))?.unwrap_or_default();
        let nested = model.text_config.and_then(|text| text.eos_token_id);
        for id in [model.eos_token_id, nested].into_iter().flatten().flat_map(TokenIds::into_vec) {
            if !eos_token_ids.contains(&id) {
                eos_token_ids.push(id);
            }
        }
        let config = Self {
            eos_token_ids,
            do_sample: file.do_sample,
            temperature: file.temperature,
            // -1 is vLLM's, 0 Hugging Face's way to say "all".
            top_k: file.top_k.map(|top_k| u32::try_from(top_k).unwrap_or(0)),
            top_p: file.top_p,
            min_p: file.min_p,
            repetition_penalty: file.repetition_penalty,
            max_new_tokens: file.max_new_tokens,
        };
        let params = config.apply(&SamplingOverrides::default());
        params.validate().map_err(|source| GenerationConfigError::Invalid { path, source })?;
        Ok(config)
    }

    /// The parameters to sample with: `overrides` win, then the model's defaults, then neutral values.
    ///
    /// Without a temperature from either side the model samples at 1 if its file asks for sampling (`do_sample: true`,
    /// or sampling values without `do_sample`), and is greedy otherwise.
    pub fn apply(&self, overrides: &SamplingOverrides) -> SamplingParams {
        let neutral = SamplingParams::default();
        let asks_for_sampling =
            self.temperature.is_some() || self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let default_temperature = match self.do_sample.unwrap_or(asks_for_sampling) {
            true => self.temperature.unwrap_or(1.0),
            false => 0.0,
        };
        SamplingParams {
            temperature: overrides.temperature.unwrap_or(default_temperature),
            top_k: overrides.top_k.or(self.top_k).unwrap_or(neutral.top_k),
            top_p: overrides.top_p.or(self.top_p).unwrap_or(neutral.top_p),
            min_p: overrides.min_p.or(self.min_p).unwrap_or(neutral.min_p),
            repetition_penalty: overrides
                .repetition_penalty
                .or(self.repetition_penalty)
                .unwrap_or(neutral.repetition_penalty),
            presence_penalty: overrides.presence_penalty.unwrap_or(neutral.presence_penalty),
            frequency_penalty: overrides.frequency_penalty.unwrap_or(neutral.frequency_penalty),
            logit_bias: overrides.logit_bias.clone(),
            seed: overrides.seed,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "eos_token_id is neither a token id nor a list of token ids")]
enum TokenIds {
    One(i64),
    Many(Vec<i64>),
}

impl TokenIds {
    /// Without -1, which some files write for none.
    fn into_vec(self) -> Vec<u32> {
        let ids = match self {
            Self::One(token_id) => vec![token_id],
            Self::Many(token_ids) => token_ids,
        };
        ids.into_iter().filter(|id| *id >= 0).map(|id| u32::try_from(id).unwrap_or(u32::MAX)).collect()
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct GenerationFile {
    eos_token_id: Option<TokenIds>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<i64>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<u32>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ModelFile {
    eos_token_id: Option<TokenIds>,
    text_config: Option<TextFile>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TextFile {
    eos_token_id: Option<TokenIds>,
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, GenerationConfigError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_str(&without_literals(&String::from_utf8_lossy(&bytes)))
            .map(Some)
            .map_err(|source| GenerationConfigError::Parse { path: path.to_owned(), source }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(GenerationConfigError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(generation: Option<&str>, model: Option<&str>) -> Result<GenerationConfig, GenerationConfigError> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("generation_config.json", generation), ("config.json", model)] {
            if let Some(text) = text {
                std::fs::write(dir.path().join(name), text).unwrap();
            }
        }
        GenerationConfig::load(dir.path())
    }

    #[test]
    fn missing_files_are_neutral() {
        let config = load(None, None).unwrap();
        assert_eq!(config, GenerationConfig::default());
        assert_eq!(config.apply(&SamplingOverrides::default()), SamplingParams::default());
    }

    #[test]
    fn shipped_model() {
        let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8"));
        let config = GenerationConfig::load(dir).unwrap();
        assert_eq!(config.eos_token_ids, [0, 7, 9]);
        let params = config.apply(&SamplingOverrides::default());
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.6, 0.95, 0));
    }

    #[test]
    fn end_tokens() {
        let check = |generation: Option<&str>, model: Option<&str>, expected: &[u32]| {
            assert_eq!(load(generation, model).unwrap().eos_token_ids, expected, "{generation:?} {model:?}");
        };
        check(Some(r#"{"eos_token_id": 5}"#), Some(r#"{"eos_token_id": 9}"#), &[5, 9]);
        check(Some(r#"{"eos_token_id": [5, -1], "x": Infinity}"#), Some(r#"{"eos_token_id": -1, "y": NaN}"#), &[5]);
        check(Some(r#"{"eos_token_id": [5, 6]}"#), None, &[5, 6]);
        check(Some(r#"{"eos_token_id": null}"#), Some(r#"{"eos_token_id": [9, 8]}"#), &[9, 8]);
        check(None, Some(r#"{"text_config": {"eos_token_id": 3}}"#), &[3]);
        check(Some("{}"), Some("{}"), &[]);
    }

    #[test]
    fn overrides_win() {
        let file = r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05,
            "repetition_penalty": 1.1, "max_new_tokens": 77, "transformers_version": "5.0"}"#;
        let config = load(Some(file), None).unwrap();
        assert_eq!(config.max_new_tokens, Some(77));
        let params = config.apply(&SamplingOverrides::default());
        let expected = SamplingParams {
            temperature: 0.6,
            top_p: 0.95,
            top_k: 20,
            min_p: 0.05,
            repetition_penalty: 1.1,
            ..SamplingParams::default()
        };
        assert_eq!(params, expected);
        let overrides = SamplingOverrides {
            temperature: Some(0.0),
            top_p: Some(1.0),
            top_k: Some(0),
            min_p: Some(0.0),
            repetition_penalty: Some(1.0),
            presence_penalty: Some(0.5),
            frequency_penalty: Some(0.25),
            logit_bias: vec![(1, 2.0)],
            seed: Some(3),
        };
        let expected = SamplingParams {
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(1, 2.0)],
            seed: Some(3),
            ..SamplingParams::default()
        };
        assert_eq!(config.apply(&overrides), expected);
    }

    #[test]
    fn do_sample_decides_the_temperature() {
        let check = |file: &str, temperature: Option<f32>, expected: f32| {
            let overrides = SamplingOverrides { temperature, ..SamplingOverrides::default() };
            assert_eq!(load(Some(file), None).unwrap().apply(&overrides).temperature, expected, "{file}");
        };
        check(r#"{"do_sample": false, "temperature": 0.7}"#, None, 0.0);
        check(r#"{"do_sample": false}"#, Some(0.8), 0.8);
        check(r#"{"do_sample": true}"#, None, 1.0);
        check(r#"{"temperature": 0.7}"#, None, 0.7);
        check(r#"{"top_p": 0.9}"#, None, 1.0);
        check(r#"{"top_k": -1, "eos_token_id": 1}"#, None, 1.0);
        check("{}", None, 0.0);
    }

    #[test]
    fn errors_name_the_file() {
        let check = |file: &str, expected: &str| {
            let message = load(Some(file), None).unwrap_err().to_string();
            assert!(message.contains("generation_config.json") && message.contains(expected), "{message}");
        };
        check("{", "malformed");
        check(r#"{"eos_token_id": "x"}"#, "neither a token id nor a list");
        check(r#"{"top_p": 1.5}"#, "top_p is 1.5");
        check(r#"{"temperature": "hot"}"#, "malformed");
        let message = load(None, Some("[")).unwrap_err().to_string();
        assert!(message.contains("config.json is malformed"), "{message}");
    }
}
