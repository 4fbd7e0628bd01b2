//! Traces of the server's requests for OpenTelemetry, with the feature `otel`: one span for each, sent where
//! OTEL_EXPORTER_OTLP_ENDPOINT says. What a span holds is tandem-serve's matter.

#[cfg_attr(feature = "otel", path = "enabled.rs")]
#[cfg_attr(not(feature = "otel"), path = "disabled.rs")]
mod seam;

pub(crate) use seam::{Telemetry, below_the_caller};
