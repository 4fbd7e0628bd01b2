//! Nothing is traced.

use axum::Router;
use tracing_subscriber::layer::Identity;

/// Sends nothing.
pub(crate) struct Telemetry;

impl Telemetry {
    pub(crate) fn start() -> anyhow::Result<(Telemetry, Option<Identity>)> {
        Ok((Telemetry, None))
    }
}

pub(crate) fn below_the_caller(router: Router) -> Router {
    router
}
