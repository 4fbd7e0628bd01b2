//! OpenAI's, Anthropic's and Ollama's interfaces to one model, as an axum router; or to several, each a process ([`Models`]).
//!
//! The engine lives in a thread of its own ([`Worker`]); handlers turn requests into prompts, and tokens into answers. One
//! file per interface: chat (with completions), responses, messages, ollama, pages; page is the chat page. [`router`] can be mounted in any axum program;
//! [`App`] holds what its handlers need.

mod api;
mod app;
mod body;
mod browser;
mod chat;
mod connections;
mod conversation;
mod error;
mod fields;
mod generation;
mod grammar;
mod loading;
mod messages;
mod metrics;
mod models;
mod ollama;
mod page;
mod pages;
mod process;
mod read;
mod replay;
mod responses;
mod span;
mod store;
mod strict;
mod tagged;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::header;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub use app::{App, Model, Options, ServeError};
pub use connections::{Limits, Serving, serve};
pub use loading::Loading;
pub use models::{CheckModel, KeepAlive, Models, ModelsError, ModelsOptions, OnLine, arguments_of_model, keep_alive};
pub use process::end_with_stdin;
pub use process::{end_signal, max_connections, read_keys};
pub use span::TARGET as SPAN_TARGET;
pub use worker::{BoxError, StepBytes, TimingsSource, Worker};

use crate::browser::Access;
use crate::error::ApiError;

/// Everything that the server answers, to be served or mounted in a larger program.
pub fn router(app: Arc<App>) -> Router {
    let access = app.access.clone();
    let keyed = Router::new()
        .route("/v1/models", get(pages::models))
        .route("/v1/models/{*id}", get(pages::model))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(chat::completions))
        .route("/v1/responses", post(responses::responses))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/responses/{id}/input_items", get(responses::input_of))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/messages", post(messages::messages))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/api/chat", post(ollama::chat))
        .route("/api/generate", post(ollama::generate))
        .route("/api/tags", get(ollama::tags))
        .route("/api/ps", get(ollama::tags))
        .route("/api/show", post(ollama::show))
        .route("/api/version", get(ollama::version))
        .route("/tokenize", post(pages::tokenize))
        .route("/detokenize", post(pages::detokenize))
        .route("/metrics", get(pages::metrics))
        .route("/info", get(pages::info))
        .route("/timings", get(pages::timings))
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() });
    let router = protected(keyed, app.keys.as_slice().into(), app.open_metrics)
        .route("/", get(page::page))
        .route("/favicon.ico", get(page::no_icon))
        .route("/health", get(pages::health))
        .route("/ready", get(pages::ready))
        .route("/openapi.json", get(pages::openapi))
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .fallback(|| async { ApiError::not_found() })
        .with_state(Arc::clone(&app));
    guarded(router, &access)
}

/// Routes that want a key, if there are any; /metrics does not if `open_metrics`.
fn protected<S: Clone + Send + Sync + 'static>(
    router: Router<S>,
    keys: Arc<[[u8; 32]]>,
    open_metrics: bool,
) -> Router<S> {
    router.route_layer(from_fn(move |request, next| check_key(Arc::clone(&keys), open_metrics, request, next)))
}

/// Errors in the form of each interface, for whoever may ask.
fn guarded(mut router: Router, access: &Access) -> Router {
    if let Some(cors) = access.cors() {
        router = router.layer(cors);
    }
    let access = access.clone();
    router = router.layer(from_fn(move |request, next| browser::guard(access.clone(), request, next)));
    router.layer(from_fn(error::shape))
}

/// Lets requests with a right key pass, or all if the server has none.
async fn check_key(keys: Arc<[[u8; 32]]>, open_metrics: bool, request: Request, next: Next) -> Response {
    if keys.is_empty() || open_metrics && request.uri().path() == "/metrics" {
        return next.run(request).await;
    }
    let headers = request.headers();
    let authorization = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let bearer = authorization
        .and_then(|v| v.split_once(' '))
        .and_then(|(scheme, key)| scheme.eq_ignore_ascii_case("bearer").then_some(key));
    let given = bearer.or_else(|| headers.get("x-api-key").and_then(|v| v.to_str().ok())).unwrap_or_default();
    // Every key is compared, in constant time, by its hash: neither length nor place shows.
    let given: [u8; 32] = Sha256::digest(given.trim()).into();
    let matches = keys.iter().fold(0u8, |found, key| found | key.ct_eq(&given).unwrap_u8());
    if matches == 1 { next.run(request).await } else { ApiError::unauthorized().into_response() }
}
