//! Spans over HTTP, in protobuf, in batches, by a thread of the SDK.
//!
//! The SDK reads its own variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and so on).

use std::time::Duration;

use anyhow::anyhow;
use async_trait::async_trait;
use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use opentelemetry::context::FutureExt;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{Array, StringValue, Value};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError, Response};
use opentelemetry_otlp::WithHttpConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::{Layer, Registry};

/// A trace goes nowhere unless one of these is set.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
const TIMEOUT: Duration = Duration::from_secs(10);
/// A list, which spans of the `tracing` crate have as text with commas.
const LIST: &str = "gen_ai.response.finish_reasons";

/// What makes spans of what is logged.
type Spans = Box<dyn Layer<Registry> + Send + Sync>;

/// Sends the spans that are left when it is dropped.
pub(crate) struct Telemetry(Option<SdkTracerProvider>);

impl Telemetry {
    /// What makes spans of requests, if an endpoint is set.
    ///
    /// # Errors
    /// The endpoint is not a URL.
    pub(crate) fn start() -> anyhow::Result<(Telemetry, Option<Spans>)> {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let Some(variable) = ENDPOINTS.iter().find(|name| is_set(name)) else { return Ok((Telemetry(None), None)) };
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT)).build().into();
        let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().with_http_client(Client(agent)).build();
        let exporter = exporter.map_err(|error| {
            anyhow!("{variable} cannot be used, expected a URL such as http://localhost:4318: {error}")
        })?;
        let mut resource = Resource::builder();
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name("tandem");
        }
        let provider = SdkTracerProvider::builder().with_resource(resource.build());
        let provider = provider.with_batch_exporter(Lists(exporter)).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("tandem"));
        let layer = layer.with_location(false).with_threads(false).with_tracked_inactivity(false).with_target(false);
        let layer = layer.with_filter(Targets::new().with_target(tandem_serve::SPAN_TARGET, tracing::Level::INFO));
        Ok((Telemetry(Some(provider)), Some(Box::new(layer))))
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(|provider| provider.shutdown()) {
            eprintln!("warning: the last spans were not sent: {error}");
        }
    }
}

/// Requests whose callers have a trace (the header traceparent) are spans of it.
pub(crate) fn below_the_caller(router: Router) -> Router {
    router.layer(from_fn(|request: Request, next: Next| {
        let caller = TraceContextPropagator::new().extract(&HeaderExtractor(request.headers()));
        next.run(request).with_context(caller)
    }))
}

#[derive(Debug)]
struct Client(ureq::Agent);

#[async_trait]
impl HttpClient for Client {
    /// Waits for the answer: the thread that sends does nothing else.
    async fn send_bytes(&self, request: opentelemetry_http::Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, mut body) = self.0.run(request.map(|body| body.to_vec()))?.into_parts();
        Ok(Response::from_parts(head, body.read_to_vec()?.into()))
    }
}

/// An exporter that gets [`LIST`] as a list.
#[derive(Debug)]
struct Lists<E>(E);

impl<E: SpanExporter> SpanExporter for Lists<E> {
    fn export(&self, mut batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        for attribute in batch.iter_mut().flat_map(|span| &mut span.attributes).filter(|a| a.key.as_str() == LIST) {
            let words = attribute.value.as_str().split(',').map(|word| StringValue::from(word.to_owned())).collect();
            attribute.value = Value::Array(Array::String(words));
        }
        self.0.export(batch)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}
