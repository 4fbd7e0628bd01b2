//! Which family runs a `model_type`: the only place that asks.

use tandem_core::backend::{Backend, CacheSpec};
use tandem_core::weights::WeightSpec;
use tandem_core::{CheckpointError, ModelConfig, ModelType};

use crate::families::{deepseek_v32, llama};
use crate::mtp::MtpSource;
use crate::{Limits, Loader, Model, Share};

/// Calls a function of the family's file. Every model type is named, so that none is taken for another family's.
macro_rules! of_family {
    ($config:expr, $function:ident $arguments:tt) => {
        match $config.model_type {
            ModelType::GlmMoeDsa | ModelType::DeepseekV32 | ModelType::DeepseekV3 | ModelType::Glm4MoeLite => {
                deepseek_v32::$function $arguments
            }
            ModelType::Llama => llama::$function $arguments,
        }
    };
}

/// The weights a model of this configuration needs.
pub fn weight_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    of_family!(config, weight_specs(config))
}

/// The weights of the multi-token-prediction layers, if the configuration announces any.
pub fn mtp_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    of_family!(config, mtp_specs(config))
}

/// What decoder layer `layer` caches for each token.
pub fn cache_specs(config: &ModelConfig, layer: usize) -> Vec<CacheSpec> {
    of_family!(config, cache_specs(config, layer))
}

/// Loads a rank's share of a model.
pub(crate) fn load<B: Backend + 'static>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    share: Share<B>,
    limits: Limits,
    mtp: Option<MtpSource<'_>>,
) -> Result<Box<dyn Model<B>>, CheckpointError> {
    of_family!(config, load(loader, config, share, limits, mtp))
}
