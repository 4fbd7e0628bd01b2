//! Errors as clients of OpenAI's and Anthropic's interfaces expect them, and the reading of request bodies.

use axum::extract::{FromRequest, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio_stream::StreamExt;
use utoipa::ToSchema;

use crate::generation::work;

/// Why a request was not served.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    /// The field at fault.
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which to try again.
    retry_after: Option<u32>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400: the field `param` cannot be as it is.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, message);
        ApiError { param: (!param.is_empty()).then(|| param.to_owned()), ..error }
    }

    /// 400: the prompt does not fit.
    pub(crate) fn too_long(param: &str, message: impl Into<String>) -> ApiError {
        ApiError { code: Some("context_length_exceeded"), ..ApiError::invalid(param, message) }
    }

    /// 401: no key, or a wrong one.
    pub(crate) fn unauthorized() -> ApiError {
        let message =
            "this server needs an API key: send one as \"Authorization: Bearer KEY\" or as \"x-api-key: KEY\"";
        ApiError { code: Some("invalid_api_key"), ..ApiError::new(StatusCode::UNAUTHORIZED, message) }
    }

    /// 404: another model than the one that is served.
    pub(crate) fn unknown_model(asked: &str, served: &str) -> ApiError {
        let message = format!("the model {asked:?} does not exist here; this server has {served:?}");
        ApiError {
            code: Some("model_not_found"),
            param: Some("model".into()),
            ..ApiError::new(StatusCode::NOT_FOUND, message)
        }
    }

    /// 404: no such path.
    pub(crate) fn not_found() -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this path; /openapi.json lists what there is")
    }

    /// 405: another method.
    pub(crate) fn method_not_allowed() -> ApiError {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method; see the Allow header")
    }

    /// 429: the queue is full.
    pub(crate) fn busy(n_waiting: usize) -> ApiError {
        let message = format!("{n_waiting} requests are waiting already; try again later");
        ApiError {
            code: Some("queue_full"),
            retry_after: Some(1),
            ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
        }
    }

    /// 503: no engine at the moment.
    pub(crate) fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError {
            code: Some("engine_unavailable"),
            retry_after: Some(2),
            ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message)
        }
    }

    /// 504: the deadline passed.
    pub(crate) fn deadline(seconds: u64) -> ApiError {
        let message = format!("the answer was not complete after {seconds} s (--request-timeout)");
        ApiError { code: Some("deadline_exceeded"), ..ApiError::new(StatusCode::GATEWAY_TIMEOUT, message) }
    }

    /// 500: our fault.
    pub(crate) fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    #[cfg(test)]
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            503 => "overloaded_error",
            _ => "api_error",
        }
    }

    /// OpenAI's form.
    pub(crate) fn body(&self) -> serde_json::Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }

    /// Anthropic's form.
    pub(crate) fn anthropic_body(&self) -> serde_json::Value {
        let message = match &self.param {
            Some(param) => format!("{param}: {}", self.message),
            None => self.message.clone(),
        };
        json!({"type": "error", "error": {"type": self.kind(), "message": message}})
    }

    fn respond(&self, body: &serde_json::Value) -> Response {
        let mut response = (self.status, axum::Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(&self.body())
    }
}

/// The same in Anthropic's form.
pub(crate) struct AnthropicError(pub(crate) ApiError);

impl From<ApiError> for AnthropicError {
    fn from(error: ApiError) -> AnthropicError {
        AnthropicError(error)
    }
}

impl IntoResponse for AnthropicError {
    fn into_response(self) -> Response {
        self.0.respond(&self.0.anthropic_body())
    }
}

/// OpenAI's error object.
#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorResponse {
    pub(crate) error: ErrorBody,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    pub(crate) message: String,
    pub(crate) r#type: String,
    /// The field at fault.
    #[schema(required)]
    pub(crate) param: Option<String>,
    #[schema(required)]
    pub(crate) code: Option<String>,
}

/// Bytes of a body, at most.
#[derive(Clone, Copy)]
pub(crate) struct MaxBody(pub(crate) usize);

/// A body that is too large is read and dropped up to this many times the limit: a client that is still writing when the
/// connection closes would see a broken pipe instead of the answer.
const TOO_LARGE_READ: usize = 8;

/// A JSON body, whatever its content type says.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let limit = request.extensions().get::<MaxBody>().map_or(usize::MAX, |max| max.0);
        let mut chunks = request.into_body().into_data_stream();
        let (mut bytes, mut n_read) = (vec![], 0usize);
        while let Some(chunk) = chunks.next().await {
            let chunk =
                chunk.map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, format!("the body broke off: {e}")))?;
            n_read += chunk.len();
            if n_read <= limit {
                bytes.extend_from_slice(&chunk);
            } else if n_read / TOO_LARGE_READ > limit {
                break;
            }
        }
        if n_read > limit {
            let message = "the request is larger than this server takes (--max-body-mb)";
            let error = ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message);
            return Err(ApiError { code: Some("request_too_large"), ..error });
        }
        let mut reader = serde_json::Deserializer::from_slice(&bytes);
        let body = work(bytes.len(), || serde_path_to_error::deserialize(&mut reader)).map_err(|error| {
            let path = error.path().to_string();
            let path = if path == "." { String::new() } else { path };
            let error = error.into_inner();
            let what = if error.is_data() { "the request is not as expected" } else { "the body is not valid JSON" };
            ApiError::invalid(&path, format!("{what}: {error}"))
        })?;
        reader.end().map_err(|error| ApiError::invalid("", format!("the body is not valid JSON: {error}")))?;
        Ok(Body(body))
    }
}
