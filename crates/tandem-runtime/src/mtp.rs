//! Where the multi-token-prediction layer comes from: the model's own checkpoint, or a directory beside it, since many
//! quantised checkpoints have left it out.

use anyhow::{Context, ensure};
use tandem_core::weights::Weight;
use tandem_core::{Checkpoint, ModelConfig};
use tandem_model::{Accounting, CheckpointWeights, MtpSource, WeightSource};

use crate::load::mtp_bytes;
use crate::model_dir::model_dir;

/// A layer that another directory holds.
pub(crate) struct Sidecar {
    config: ModelConfig,
    checkpoint: Checkpoint,
    weights: Vec<Weight>,
}

impl Sidecar {
    /// Finds the layer for a model of this configuration in a directory, which may hold a whole model too.
    ///
    /// # Errors
    /// There is none, it is not complete, or it is another model's.
    pub(crate) fn open(place: &str, model: &ModelConfig) -> anyhow::Result<Sidecar> {
        let dir = model_dir(Some(place))?;
        let config = ModelConfig::load(&dir)?;
        let same = [
            ("num_hidden_layers", config.num_hidden_layers, model.num_hidden_layers),
            ("hidden_size", config.hidden_size, model.hidden_size),
            ("vocab_size", config.vocab_size, model.vocab_size),
        ];
        let path = dir.display();
        for (name, found, expected) in same {
            ensure!(found == expected, "--mtp {path}: {name} is {found}, expected {expected} as in the model");
        }
        let (found, expected) = (config.model_type.name(), model.model_type.name());
        ensure!(found == expected, "--mtp {path}: model_type is {found}, expected {expected} as in the model");
        ensure!(
            !config.mtp_layers().is_empty(),
            "--mtp {path}: its config.json has no num_nextn_predict_layers; expected a directory with the layer"
        );
        let checkpoint = Checkpoint::open_mtp(&dir, &config).with_context(|| format!("--mtp {path}"))?;
        let weights = tandem_model::resolve_mtp(&checkpoint, &config).with_context(|| format!("--mtp {path}"))?;
        Ok(Sidecar { config, checkpoint, weights })
    }
}

/// Bytes of the layer that drafts; 0 if there is none.
pub(crate) fn bytes_of(sidecar: Option<&Sidecar>, config: &ModelConfig, weights: &[Weight]) -> u64 {
    let (config, weights) = sidecar.map_or((config, weights), |s| (&s.config, &s.weights));
    mtp_bytes(&Accounting::new(weights, config))
}

/// Calls `load` with the layer that drafts, if there is one: the sidecar's, or the model's own.
pub(crate) fn with_source<R>(
    sidecar: Option<&Sidecar>,
    config: &ModelConfig,
    source: &dyn WeightSource,
    weights: &[Weight],
    load: impl FnOnce(Option<MtpSource<'_>>) -> R,
) -> R {
    match sidecar {
        Some(Sidecar { config, checkpoint, weights }) => {
            let source = CheckpointWeights::new(checkpoint, weights.clone());
            load(MtpSource::new(config, &source, weights))
        }
        None => load(MtpSource::new(config, source, weights)),
    }
}
