//! Requests for one of several models: each goes to the model that it names, once that is loaded.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::metrics;
use super::pool::{Lease, Refusal, Shown, State as Place};
use super::process::Processes;
use super::send::{self, Holding, Target};
use super::{Models, keep_alive};
use crate::body::read;
use crate::error::ApiError;
use crate::read::expected;
use crate::{guarded, ollama, page, pages, protected};

/// Header with the seconds that a request waits for its model.
const LOAD_TIMEOUT: &str = "x-tandem-load-timeout";
/// A request whose model ends before the first word of an answer is sent again. Once: it may be the reason.
const N_TRIES: usize = 2;

type Held = Lease<Processes>;

pub(super) fn router(models: &Arc<Models>) -> Router {
    let by_id = || get(by_response_id).delete(by_response_id).post(by_response_id);
    let keyed = Router::new()
        .route("/v1/models", get(list))
        .route("/v1/models/{*id}", get(one))
        .route("/v1/chat/completions", post(by_model))
        .route("/v1/completions", post(by_model))
        .route("/v1/responses", post(by_model))
        .route("/v1/responses/{id}", get(by_response_id).delete(by_response_id))
        .route("/v1/responses/{id}/{part}", by_id())
        .route("/v1/messages", post(by_model))
        .route("/v1/messages/count_tokens", post(by_model))
        .route("/api/chat", post(by_model))
        .route("/api/generate", post(by_model))
        .route("/api/show", post(by_model))
        .route("/api/tags", get(tags))
        .route("/api/ps", get(running))
        .route("/api/version", get(ollama::version))
        .route("/tokenize", post(by_model))
        .route("/detokenize", post(by_model))
        .route("/metrics", get(metrics_of_all))
        .route("/info", get(by_query))
        .route("/timings", get(by_query))
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() });
    let router = protected(keyed, models.keys.as_slice().into(), models.open_metrics)
        .route("/", get(page::page))
        .route("/favicon.ico", get(page::no_icon))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/openapi.json", get(openapi))
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .fallback(|| async { ApiError::not_found() })
        .with_state(Arc::clone(models));
    guarded(router, &models.access)
}

/// The parts of a request that say where it goes.
#[derive(Deserialize)]
struct Asked {
    #[serde(default)]
    model: Value,
    /// What Ollama's clients call the model in /api/show.
    #[serde(default)]
    name: Value,
    #[serde(default)]
    keep_alive: Value,
}

async fn by_model(State(models): State<Arc<Models>>, request: Request) -> Result<Response, ApiError> {
    let wait = wait(&models, request.headers())?;
    let (parts, body) = request.into_parts();
    let is_ollama = parts.uri.path().starts_with("/api/");
    let request = Request::from_parts(parts.clone(), body);
    let (bytes, _held, _large) = read(request, models.max_body_bytes, &models.admission).await?;
    let asked: Asked = serde_json::from_slice(&bytes).map_err(|error| {
        let what = if error.is_data() { "the request is not as expected" } else { "the body is not valid JSON" };
        ApiError::invalid("", format!("{what}: {error}"))
    })?;
    let name = match (&asked.model, &asked.name) {
        (Value::Null, Value::String(name)) if is_ollama => Some(name),
        (Value::String(name), _) => Some(name),
        (Value::Null, _) => None,
        (other, _) => return Err(expected("model", other, "a text")),
    };
    let keep = match &asked.keep_alive {
        Value::String(text) if is_ollama => Some(keep_alive(text)),
        Value::Number(number) if is_ollama => Some(keep_alive(&number.to_string())),
        _ => None,
    };
    let keep = keep.transpose().map_err(|message| ApiError::invalid("keep_alive", message))?;
    let name = models.resolve(name.map(String::as_str), is_ollama).await?;
    if let Some(keep) = keep {
        models.pool.keep_alive(&name, keep);
    }
    models.forward(&name, wait, &parts, bytes.into()).await
}

/// Seconds that a request waits for its model.
fn wait(models: &Models, headers: &HeaderMap) -> Result<Duration, ApiError> {
    let Some(value) = headers.get(LOAD_TIMEOUT) else { return Ok(models.load_timeout) };
    let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
    let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| {
        ApiError::invalid(LOAD_TIMEOUT, format!("{LOAD_TIMEOUT} is {value:?}, expected seconds, 0 or more"))
    })
}

impl Models {
    /// The model that a request means; one without a name means the only model, or the only one that is loaded.
    async fn resolve(self: &Arc<Self>, asked: Option<&str>, is_ollama: bool) -> Result<String, ApiError> {
        let find = |list: &[Shown<Target>]| {
            let Some(asked) = asked else {
                let mut loaded = list.iter().filter(|model| model.state == Place::Loaded);
                return match (list, loaded.next(), loaded.next()) {
                    ([only], ..) | (_, Some(only), None) => Some(only.name.clone()),
                    _ => None,
                };
            };
            let tagless = asked.strip_suffix(":latest").filter(|_| is_ollama);
            let found = |name: &str| list.iter().find(|model| model.name == name).map(|model| model.name.clone());
            found(asked).or_else(|| found(tagless?))
        };
        let mut list = self.pool.list();
        // A broken one may have been mended, or its folder may be back.
        let is_broken = |found: &str| list.iter().any(|model| model.name == found && model.error.is_some());
        if let Some(found) = find(&list).filter(|found| asked.is_none() || !is_broken(found)) {
            return Ok(found);
        }
        if asked.is_some() {
            list = self.fresh_list().await;
            if let Some(found) = find(&list) {
                return Ok(found);
            }
        }
        let names: Vec<&str> = list.iter().map(|model| &*model.name).collect();
        Err(match asked {
            Some(asked) => ApiError::unknown_among(asked, &names),
            None => ApiError::invalid("model", format!("model is missing; this server has {}", names.join(", "))),
        })
    }

    async fn fresh_list(self: &Arc<Self>) -> Vec<Shown<Target>> {
        let models = Arc::clone(self);
        let _ = tokio::task::spawn_blocking(move || models.reread()).await;
        self.pool.list()
    }

    /// Sends a request to its model, and passes the answer on as it comes.
    async fn forward(&self, name: &str, wait: Duration, parts: &Parts, body: Bytes) -> Result<Response, ApiError> {
        for _ in 0..N_TRIES {
            let lease = self.pool.acquire(name, wait).await.map_err(|refusal| refused(name, refusal))?;
            match answer(&lease.address, parts, body.clone()).await {
                Ok(response) => return Ok(held(response, lease)),
                Err(error) => tracing::warn!("the model {name:?} did not answer: {error}"),
            }
            if !lease.has_ended().await {
                break;
            }
        }
        Err(ApiError::unavailable(format!("the process of the model {name:?} ended before it answered; try again")))
    }
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// The answer of a loaded model, once it begins.
async fn answer(target: &Target, parts: &Parts, body: Bytes) -> Result<axum::http::Response<Incoming>, AnyError> {
    let stream = TcpStream::connect(&target.address).await?;
    let mut request = axum::http::Request::new(Body::from(body));
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = path_of(&parts.uri);
    *request.headers_mut() = parts.headers.clone();
    Ok(send::send(stream, target, request).await?)
}

/// The answer for the client; its model stays until the end of it.
fn held(response: axum::http::Response<Incoming>, lease: Held) -> Response {
    let (from, body) = response.into_parts();
    let mut response = Response::new(Body::new(Holding { body, _held: lease }));
    *response.status_mut() = from.status;
    *response.headers_mut() = send::passed_on(&from.headers);
    // Known for an answer that is not a stream.
    if let Some(length) = from.headers.get(header::CONTENT_LENGTH) {
        response.headers_mut().insert(header::CONTENT_LENGTH, length.clone());
    }
    response
}

fn path_of(uri: &Uri) -> Uri {
    uri.path_and_query().and_then(|path| path.as_str().parse().ok()).unwrap_or_default()
}

fn refused(name: &str, refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Unknown => ApiError::unknown_among(name, &[]),
        Refusal::NotYet(seconds) => ApiError::loading(
            format!("the model {name:?} is not loaded yet; try again, or let the request wait longer ({LOAD_TIMEOUT})"),
            seconds,
        ),
        Refusal::Failed(why, Some(seconds)) => {
            ApiError::loading(format!("the model {name:?} cannot be loaded: {why}"), seconds)
        }
        Refusal::Failed(why, None) => {
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, format!("the model {name:?} cannot be loaded: {why}"))
                .with_code("model_not_loadable")
        }
        Refusal::Ending => ApiError::unavailable("the server is stopping"),
    }
}

/// Kept answers are with the model that wrote them: whichever has this one.
async fn by_response_id(State(models): State<Arc<Models>>, request: Request) -> Result<Response, ApiError> {
    let (parts, _) = request.into_parts();
    let loaded = models.pool.list().into_iter().filter(|model| model.state == Place::Loaded);
    for model in loaded {
        match models.forward(&model.name, Duration::ZERO, &parts, Bytes::new()).await {
            Ok(response) if response.status() == StatusCode::NOT_FOUND => {}
            Err(_) => {}
            Ok(response) => return Ok(response),
        }
    }
    let id = parts.uri.path().split('/').nth(3).unwrap_or_default();
    Err(ApiError::unknown_id("", "Response", id))
}

#[derive(Deserialize)]
struct OfModel {
    model: Option<String>,
}

/// The state of a model that is loaded.
async fn by_query(
    State(models): State<Arc<Models>>,
    Query(of): Query<OfModel>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let list = models.pool.list();
    let found = match &of.model {
        Some(name) => match list.iter().find(|model| model.name == *name) {
            Some(found) => Some(found),
            None => {
                let names: Vec<&str> = list.iter().map(|model| &*model.name).collect();
                return Err(ApiError::unknown_among(name, &names));
            }
        },
        None => list.iter().filter(|model| model.state == Place::Loaded).min_by_key(|model| model.unused_for),
    };
    let address = found.and_then(|model| model.address.clone());
    let none = || ApiError::unavailable("the model is not loaded; a request for an answer loads it");
    let target = address.ok_or_else(none)?;
    // Whoever looks at a model does not use it.
    let stream = TcpStream::connect(&target.address).await.map_err(|_| none())?;
    let (status, body) = send::get(stream, &target, uri.path()).await.map_err(|_| none())?;
    Ok((status, [(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// A model as /v1/models has it.
fn shown(models: &Models, model: &Shown<Target>) -> Value {
    let mut value = json!({
        "id": model.name, "object": "model", "created": models.created, "owned_by": "tandem",
        "state": model.state.name(), "pinned": model.is_pinned, "memory_bytes": model.bytes,
        "requests_running": model.n_running, "requests_waiting": model.n_waiting,
    });
    if let Some(context) = model.address.as_ref().and_then(|target| target.context) {
        value["max_model_len"] = json!(context);
    }
    if let Some(error) = &model.error {
        value["error"] = json!(error);
    }
    value
}

async fn list(State(models): State<Arc<Models>>) -> axum::Json<Value> {
    let list = models.fresh_list().await;
    let data: Vec<Value> = list.iter().map(|model| shown(&models, model)).collect();
    axum::Json(json!({"object": "list", "data": data}))
}

async fn one(State(models): State<Arc<Models>>, Path(id): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let list = models.fresh_list().await;
    let names: Vec<&str> = list.iter().map(|model| &*model.name).collect();
    let found = list.iter().find(|model| model.name == id).ok_or_else(|| ApiError::unknown_among(&id, &names))?;
    Ok(axum::Json(shown(&models, found)))
}

/// A model as Ollama's clients know it.
fn tag(model: &Shown<Target>) -> Value {
    let details = json!({
        "parent_model": "", "format": "safetensors", "family": "", "families": [], "parameter_size": "",
        "quantization_level": "",
    });
    let size = model.bytes.unwrap_or(0);
    json!({
        "name": model.name, "model": model.name, "modified_at": ollama::time(crate::generation::now()), "size": size,
        "digest": "", "details": details,
    })
}

async fn tags(State(models): State<Arc<Models>>) -> axum::Json<Value> {
    let list = models.fresh_list().await;
    axum::Json(json!({"models": list.iter().map(tag).collect::<Vec<_>>()}))
}

/// The models in memory, and when they leave.
async fn running(State(models): State<Arc<Models>>) -> axum::Json<Value> {
    let list = models.pool.list();
    let loaded = list.iter().filter(|model| model.state == Place::Loaded).map(|model| {
        let mut value = tag(model);
        // Ollama names a day that nobody sees for those that stay.
        let left = model.leaves_in.unwrap_or(Duration::from_secs(3650 * 86_400));
        value["expires_at"] = json!(ollama::time(crate::generation::now().saturating_add(left.as_secs())));
        value["size_vram"] = json!(0);
        value
    });
    axum::Json(json!({"models": loaded.collect::<Vec<_>>()}))
}

async fn health(State(models): State<Arc<Models>>) -> axum::Json<Value> {
    let list = models.pool.list();
    let count = |state: Place| list.iter().filter(|model| model.state == state).count();
    let (limit, used) = models.pool.memory();
    axum::Json(json!({
        "status": "ok",
        "models": {
            "loaded": count(Place::Loaded), "loading": count(Place::Loading), "unloaded": count(Place::Unloaded),
            "stopping": count(Place::Stopping), "failed": count(Place::Failed),
        },
        "memory": {"used_bytes": used, "limit_bytes": limit},
    }))
}

/// Ready is a server whose pinned models are loaded: the others come with their requests.
async fn ready(State(models): State<Arc<Models>>) -> Result<axum::Json<Value>, ApiError> {
    match models.pool.is_ready() {
        true => Ok(axum::Json(json!({"status": "ready"}))),
        false => Err(ApiError::unavailable("pinned models are being loaded")),
    }
}

async fn metrics_of_all(State(models): State<Arc<Models>>) -> Response {
    let list = models.pool.list();
    let mut texts = vec![];
    for model in &list {
        let Some(target) = &model.address else { continue };
        let Ok(stream) = TcpStream::connect(&target.address).await else { continue };
        if let Ok((StatusCode::OK, body)) = send::get(stream, target, "/metrics").await {
            texts.push((model.name.clone(), String::from_utf8_lossy(&body).into_owned()));
        }
    }
    let text = metrics::merged(&texts) + &metrics::of_models(&list, models.pool.memory());
    ([(header::CONTENT_TYPE, pages::METRICS_TYPE)], text).into_response()
}

async fn openapi(State(models): State<Arc<Models>>) -> axum::Json<Value> {
    let names: Vec<String> = models.pool.list().into_iter().map(|model| model.name).collect();
    axum::Json(pages::document(&names, None))
}
