//! What a server answers before its model is loaded.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::error::ApiError;

/// Stands at the server's port from the start: says how far loading is, and passes requests on once it is done.
#[derive(Debug)]
pub struct Loading {
    start: Instant,
    /// Bytes loaded and bytes in all; none while something else is done.
    progress: Mutex<Option<(u64, u64)>>,
    app: OnceLock<Router>,
}

impl Loading {
    /// Loading begins.
    pub fn begin() -> Arc<Loading> {
        Arc::new(Loading { start: Instant::now(), progress: Mutex::new(None), app: OnceLock::new() })
    }

    /// `done` of `total` bytes of weights are loaded.
    pub fn progress(&self, done: u64, total: u64) {
        *self.progress.lock().unwrap_or_else(|e| e.into_inner()) = Some((done, total));
    }

    /// Loading is done: `router` answers from now on.
    pub fn done(&self, router: Router) {
        let _ = self.app.set(router);
    }

    /// Everything that the port answers.
    pub fn router(self: &Arc<Self>) -> Router {
        Router::new().fallback(answer).with_state(Arc::clone(self))
    }

    /// The state for /health, and seconds until the rest of the weights is probably loaded.
    fn state(&self) -> (Value, u32) {
        let seconds = self.start.elapsed().as_secs_f64();
        let progress = *self.progress.lock().unwrap_or_else(|e| e.into_inner());
        let (done, total) = progress.unwrap_or_default();
        let left = if done > 0 { seconds * total.saturating_sub(done) as f64 / done as f64 } else { 5.0 };
        let progress = json!({
            "loaded_bytes": done,
            "total_bytes": progress.map(|(_, total)| total),
            "fraction": if total > 0 { done as f64 / total as f64 } else { 0.0 },
            "elapsed_seconds": seconds,
        });
        (json!({"status": "loading", "progress": progress}), (left.ceil() as u32).clamp(1, 60))
    }
}

async fn answer(State(loading): State<Arc<Loading>>, request: Request) -> Response {
    if let Some(app) = loading.app.get() {
        return app.clone().oneshot(request).await.into_response();
    }
    let (state, seconds) = loading.state();
    if request.uri().path() == "/health" {
        return Json(state).into_response();
    }
    let percent = 100.0 * state["progress"]["fraction"].as_f64().unwrap_or_default();
    let message = format!("the model is being loaded ({percent:.0} %); try again");
    ApiError::loading(message, seconds).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::header;
    use axum::routing::get;

    use super::*;

    #[tokio::test]
    async fn answers_change_when_loading_is_done() {
        let loading = Loading::begin();
        let router = loading.router();
        let ask = async |path: &str| {
            let request = Request::get(path).body(Body::empty()).expect("a request");
            let response = router.clone().oneshot(request).await.expect("an answer");
            let (parts, body) = response.into_parts();
            let text = to_bytes(body, 1 << 20).await.expect("a body");
            let retry = parts.headers.get(header::RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
            (parts.status.as_u16(), retry, serde_json::from_slice::<Value>(&text).unwrap_or_default())
        };
        loading.progress(1, 4);
        let (status, _, body) = ask("/health").await;
        assert_eq!((status, &body["status"], &body["progress"]["fraction"]), (200, &json!("loading"), &json!(0.25)));
        for path in ["/ready", "/v1/models", "/v1/chat/completions", "/metrics", "/", "/no/such"] {
            let (status, retry, body) = ask(path).await;
            assert_eq!(status, 503, "{path}");
            assert!(retry.is_some_and(|seconds| (1..=60).contains(&seconds)), "{path}");
            assert_eq!(body["error"]["code"], "engine_unavailable", "{path}: {body}");
        }
        loading.done(Router::new().route("/ready", get(|| async { "yes" })));
        assert_eq!((ask("/ready").await.0, ask("/no/such").await.0), (200, 404));
    }
}
