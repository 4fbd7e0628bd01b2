//! Everything beside generation: models, tokens, health, metrics and the OpenAPI document.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tandem_engine::RankStatus;
use utoipa::{OpenApi, ToSchema};

use crate::api::{ChatRequest, LARGEST_INTEGER, Message, TokenId};
use crate::app::App;
use crate::body::{Body, Fields};
use crate::error::{ApiError, ErrorResponse};
use crate::fields::Table;
use crate::strict::objects;

/// Media type of /metrics.
pub(crate) const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(OpenApi)]
#[openapi(
    info(title = "Tandem", description = "OpenAI- and Anthropic-compatible server of one model"),
    paths(
        super::chat::chat,
        super::chat::completions,
        super::responses::responses,
        super::responses::retrieve,
        super::responses::delete,
        super::responses::input_of,
        super::messages::messages,
        super::messages::count_tokens,
        models,
        model,
        tokenize,
        detokenize,
        health,
        ready,
        metrics,
        info,
        timings,
    )
)]
pub(crate) struct Document;

/// The served model under each of its names.
#[derive(Serialize, ToSchema)]
pub(crate) struct Models {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Tokens of context.
    max_model_len: usize,
}

/// Lists the model.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses(
    (status = 200, description = "The model's names", body = Models),
    (status = "4XX", description = "No key, or a wrong one", body = ErrorResponse),
))]
pub(crate) async fn models(State(app): State<Arc<App>>) -> axum::Json<Models> {
    axum::Json(Models { object: "list", data: app.model_names.iter().map(|name| Model::named(&app, name)).collect() })
}

impl Model {
    fn named(app: &App, name: &str) -> Model {
        Model {
            id: name.to_owned(),
            object: "model",
            created: app.created,
            owned_by: "tandem",
            max_model_len: app.context,
        }
    }
}

/// The model under one of its names.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "OpenAI", params(("id" = String, Path)), responses(
    (status = 200, description = "The model", body = Model),
    (status = "4XX", description = "There is none of this name", body = ErrorResponse),
))]
pub(crate) async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<axum::Json<Model>, ApiError> {
    app.check_model(Some(&id))?;
    Ok(axum::Json(Model::named(&app, &id)))
}

objects!(TokenizeRequest, DetokenizeRequest);

impl Fields for TokenizeRequest {
    const TABLE: Option<&'static Table> = None;
}

impl Fields for DetokenizeRequest {
    const TABLE: Option<&'static Table> = None;
}

/// A text, or a conversation, to be counted.
#[derive(Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct TokenizeRequest {
    /// A text.
    prompt: Option<String>,
    /// A conversation, put into the model's template as /v1/chat/completions does; wins over a text. All fields of that
    /// interface that change the prompt are read.
    #[schema(value_type = Option<Vec<Message>>)]
    messages: Option<Vec<Value>>,
    /// Whether to add the tokens that begin a text.
    add_special_tokens: Option<bool>,
    /// Whether to name each token.
    return_token_strs: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    others: serde_json::Map<String, Value>,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct TokenizeResponse {
    tokens: Vec<u32>,
    count: usize,
    max_model_len: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

/// Token ids of a text.
#[utoipa::path(post, path = "/tokenize", tag = "Tokens", request_body = TokenizeRequest, responses(
    (status = 200, description = "The tokens", body = TokenizeResponse),
    (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
))]
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    body: Body<TokenizeRequest>,
) -> Result<axum::Json<TokenizeResponse>, ApiError> {
    let request = body.value;
    let tokens = match (request.prompt, request.messages) {
        (_, Some(messages)) => {
            let mut others = request.others;
            others.insert("messages".into(), Value::Array(messages));
            others.remove("model");
            let chat: ChatRequest = serde_path_to_error::deserialize(Value::Object(others)).map_err(|error| {
                let path = error.path().to_string();
                ApiError::invalid(&path, format!("the request is not as expected: {}", error.into_inner()))
            })?;
            super::chat::read(&chat, body.notes)?.ask(&app)?.prompt
        }
        (Some(prompt), None) => app.encode("prompt", &prompt, request.add_special_tokens.unwrap_or(true))?,
        (None, None) => vec![],
    };
    let name = |id: &u32| String::from_utf8_lossy(&app.tokenizer.token_bytes(*id).unwrap_or_default()).into_owned();
    let token_strs = (request.return_token_strs == Some(true)).then(|| tokens.iter().map(name).collect());
    Ok(axum::Json(TokenizeResponse { count: tokens.len(), tokens, max_model_len: app.context, token_strs }))
}

#[derive(Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct DetokenizeRequest {
    tokens: Vec<TokenId>,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct DetokenizeResponse {
    prompt: String,
}

/// Text of token ids.
#[utoipa::path(post, path = "/detokenize", tag = "Tokens", request_body = DetokenizeRequest, responses(
    (status = 200, description = "The text", body = DetokenizeResponse),
    (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
))]
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    body: Body<DetokenizeRequest>,
) -> Result<axum::Json<DetokenizeResponse>, ApiError> {
    let tokens = TokenId::all(&body.value.tokens);
    if let Some(id) = tokens.iter().find(|id| **id as usize >= app.vocab_size) {
        let message = format!("token id {id} is outside the vocabulary of {}", app.vocab_size);
        return Err(ApiError::invalid("tokens", message));
    }
    let prompt = app.tokenizer.decode(&tokens, false).map_err(|e| ApiError::invalid("tokens", e.to_string()))?;
    Ok(axum::Json(DetokenizeResponse { prompt }))
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Health {
    status: &'static str,
}

/// Whether the process lives, and its engine gets on.
#[utoipa::path(get, path = "/health", tag = "Server", responses(
    (status = 200, description = "It does", body = Health),
    (status = 503, description = "Requests wait, and no step has passed all ranks for a while", body = ErrorResponse),
))]
pub(crate) async fn health(State(app): State<Arc<App>>) -> Result<axum::Json<Health>, ApiError> {
    let stalled = app.worker.stalled_for();
    if stalled > app.stall_timeout {
        let seconds = stalled.as_secs();
        let message = format!("requests wait, and no step has passed all ranks for {seconds} s");
        return Err(ApiError::unavailable(message));
    }
    Ok(axum::Json(Health { status: "ok" }))
}

/// Whether requests are served.
#[utoipa::path(get, path = "/ready", tag = "Server", responses(
    (status = 200, description = "They are", body = Health),
    (status = 503, description = "The engine is starting or stopping", body = ErrorResponse),
))]
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Result<axum::Json<Health>, ApiError> {
    match app.worker.is_ready() {
        true => Ok(axum::Json(Health { status: "ready" })),
        false => Err(ApiError::unavailable("the engine is starting or stopping")),
    }
}

/// Metrics for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "Server", responses(
    (status = 200, description = "The metrics", body = String, content_type = "application/openmetrics-text"),
    (status = "4XX", description = "No key, or a wrong one", body = ErrorResponse),
))]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.metrics.render(&app.worker.status(), &app.worker.ranks());
    ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response()
}

/// The model, its ranks and the state of the cache, for the page.
#[utoipa::path(get, path = "/info", tag = "Server", responses(
    (status = 200, description = "The state", body = Object),
    (status = "4XX", description = "No key, or a wrong one", body = ErrorResponse),
))]
pub(crate) async fn info(State(app): State<Arc<App>>) -> axum::Json<Value> {
    let status = app.worker.status();
    let counters = status.counters;
    let mut info = app.facts.clone();
    let rank = |(i, rank): (usize, &RankStatus)| {
        json!({
            "rank": i, "host": rank.host, "first_layer": rank.layers.start, "n_layers": rank.layers.len(),
            "weight_bytes": rank.weight_bytes, "cache_bytes": rank.cache_bytes,
            "cache_bytes_used": status.cache_bytes_used(rank), "rows": rank.rows,
            "busy_seconds": rank.busy.as_secs_f64(),
        })
    };
    info["ranks"] = app.worker.ranks().iter().enumerate().map(rank).collect();
    info["requests"] = json!({"running": status.running, "waiting": status.waiting});
    info["cache"] = json!({
        "pages": status.pages, "used": status.pages_used, "idle": status.pages_cached,
        "page_tokens": tandem_core::backend::PAGE_SIZE,
        "prompt_tokens": counters.prompt_tokens, "cached_tokens": counters.cached_tokens,
        "disk_tokens": counters.disk_tokens,
    });
    let drafts = counters.drafts();
    info["drafts"] = json!({
        "drafts": drafts.drafts, "tokens": drafts.tokens, "accepted": drafts.accepted_tokens(),
        "accepted_by_position": drafts.accepted,
    });
    info["speed"] = json!({
        "tokens_per_second": status.tokens_per_second, "bytes_per_second": status.bytes_per_second,
        "bandwidth": app.metrics.bandwidth,
        "bandwidth_fraction": status.bytes_per_second / app.metrics.bandwidth.max(1.0),
    });
    axum::Json(info)
}

/// Where the time of the last steps went, for `tandem explain`.
///
/// Under `explanation` is what that means: the verdict, the parts of a step in ms, causes with their cost, and what would help.
/// No text of anybody is in it.
#[utoipa::path(get, path = "/timings", tag = "Server", responses(
    (status = 200, description = "The timings", body = Object),
    (status = "4XX", description = "No key, or a wrong one", body = ErrorResponse),
    (status = 503, description = "This server keeps none", body = ErrorResponse),
))]
pub(crate) async fn timings(State(app): State<Arc<App>>) -> Result<axum::Json<Value>, ApiError> {
    let timings = app.worker.timings();
    timings.map(axum::Json).ok_or_else(|| ApiError::unavailable("this server keeps no timings"))
}

/// The OpenAPI document, with the names and the vocabulary of this model.
pub(crate) async fn openapi(State(app): State<Arc<App>>) -> axum::Json<Value> {
    axum::Json(document(&app.model_names, Some(app.vocab_size as u32 - 1)))
}

/// The document for models of these names; without a largest token any number is one.
pub(crate) fn document(names: &[String], largest_id: Option<u32>) -> Value {
    let mut document = json!(Document::openapi());
    document["info"]["version"] = json!(env!("CARGO_PKG_VERSION"));
    let schemas = &mut document["components"]["schemas"];
    add_bounds(schemas);
    let largest_id = largest_id.unwrap_or(i32::MAX as u32);
    schemas["TokenId"]["maximum"] = json!(largest_id);
    for (name, schema) in schemas.as_object_mut().into_iter().flatten().filter(|(name, _)| name.ends_with("Request")) {
        let Some(properties) = schema["properties"].as_object_mut() else { continue };
        if let Some(model) = properties.get_mut("model") {
            let is_optional = !matches!(name.as_str(), "MessagesRequest" | "CountRequest");
            let names = names.iter().map(|name| json!(name));
            model["enum"] = names.chain(is_optional.then_some(Value::Null)).collect();
        }
        if let Some(bias) = properties.get_mut("logit_bias") {
            bias["propertyNames"] = json!({"pattern": up_to(largest_id)});
            bias["additionalProperties"] = json!({"type": "number", "minimum": -100, "maximum": 100});
        }
    }
    document
}

/// Whole numbers have the bounds of what they are read into.
fn add_bounds(schema: &mut Value) {
    match schema {
        Value::Array(list) => list.iter_mut().for_each(add_bounds),
        Value::Object(map) => {
            let bounds = match map.get("format").and_then(Value::as_str) {
                Some("int32") => Some((i64::from(i32::MIN), i64::from(i32::MAX))),
                Some("int64") => Some((-LARGEST_INTEGER, LARGEST_INTEGER)),
                _ => None,
            };
            if let Some((minimum, maximum)) = bounds {
                map.entry("minimum").or_insert(json!(minimum));
                map.entry("maximum").or_insert(json!(maximum));
            }
            map.values_mut().for_each(add_bounds);
        }
        _ => {}
    }
}

/// A regular expression for the whole numbers from 0 to `largest`.
fn up_to(largest: u32) -> String {
    let digits = largest.to_string();
    let mut parts = vec!["0".to_owned(), digits.clone()];
    parts.extend((1..digits.len()).map(|n| format!("[1-9][0-9]{{{}}}", n - 1)));
    for (i, digit) in digits.bytes().enumerate() {
        let least = if i == 0 { b'1' } else { b'0' };
        if digit > least {
            let range = format!("[{}-{}]", least as char, (digit - 1) as char);
            parts.push(format!("{}{range}[0-9]{{{}}}", &digits[..i], digits.len() - i - 1));
        }
    }
    format!("^({})$", parts.join("|"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_as_an_expression() {
        assert_eq!(super::up_to(7), "^(0|7|[1-6][0-9]{0})$");
        assert_eq!(
            super::up_to(1023),
            "^(0|1023|[1-9][0-9]{0}|[1-9][0-9]{1}|[1-9][0-9]{2}|10[0-1][0-9]{1}|102[0-2][0-9]{0})$"
        );
    }
}
