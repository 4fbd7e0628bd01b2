//! Errors as clients of OpenAI's and Anthropic's interfaces expect them, and the reading of request bodies.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::conversation::Notes;
use crate::generation::new_id;

const WARNING: HeaderName = HeaderName::from_static("x-tandem-warning");

impl Notes {
    /// A response that tells what was left out of its request.
    pub(crate) fn on(&self, mut response: Response) -> Response {
        let plain = |c: char| if c.is_ascii() && !c.is_ascii_control() { c } else { '?' };
        let line = self.line().map(|line| line.chars().take(2000).map(plain).collect::<String>());
        if let Some(value) = line.and_then(|line| HeaderValue::from_str(&line).ok()) {
            response.headers_mut().insert(WARNING, value);
        }
        response
    }
}

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
    /// Tokens of a prompt that is too long, and of the context.
    context: Option<(usize, usize)>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after: None, context: None }
    }

    /// 400: the field `param` cannot be as it is.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, message);
        ApiError { param: (!param.is_empty()).then(|| param.to_owned()), ..error }
    }

    /// 400: the prompt has `found` tokens, and the context holds `most`. `found` may be a lower bound.
    pub(crate) fn too_long(param: &str, found: usize, most: usize) -> ApiError {
        let message = format!(
            "This model's maximum context length is {most} tokens. However, your {param} resulted in {found} tokens. Please \
             reduce the length of the {param}, or start the server with a larger --context."
        );
        ApiError {
            context: Some((found, most)),
            ..ApiError::invalid(param, message).with_code("context_length_exceeded")
        }
    }

    /// 404: nothing is kept under this id.
    pub(crate) fn unknown_id(param: &str, what: &str, id: &str) -> ApiError {
        let error = ApiError::new(StatusCode::NOT_FOUND, format!("{what} with id '{id}' not found."));
        ApiError { param: (!param.is_empty()).then(|| param.to_owned()), ..error }
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

    /// 404: none of several models.
    pub(crate) fn unknown_among(asked: &str, served: &[&str]) -> ApiError {
        let served = served.join(", ");
        let message = format!("the model {asked:?} does not exist here; this server has {served}");
        ApiError { message, ..ApiError::unknown_model(asked, "") }
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

    /// 503: the model is being loaded, for about as many seconds more.
    pub(crate) fn loading(message: impl Into<String>, seconds: u32) -> ApiError {
        ApiError { retry_after: Some(seconds), ..ApiError::unavailable(message) }
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

    pub(crate) fn kind(&self) -> &'static str {
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
    pub(crate) fn anthropic_body(&self) -> Value {
        let message = match &self.param {
            // Clients look for the first words of this one.
            Some(param) if self.context.is_none() && !self.message.starts_with(param.as_str()) => {
                format!("{param}: {}", self.message)
            }
            _ => match self.context {
                Some((found, most)) => format!("prompt is too long: {found} tokens > {most} maximum"),
                None => self.message.clone(),
            },
        };
        let kind = match self.status.as_u16() {
            413 => "request_too_large",
            504 => "timeout_error",
            _ => self.kind(),
        };
        json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": new_id("req_")})
    }

    /// What is wrong, without its form.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Tokens of the prompt that is too long.
    pub(crate) fn tokens(&self) -> Option<usize> {
        self.context.map(|(found, _)| found)
    }

    /// The same of another field.
    pub(crate) fn at(self, param: &str) -> ApiError {
        ApiError { param: Some(param.to_owned()), ..self }
    }

    /// OpenAI's word for the error.
    pub(crate) fn code(&self) -> Option<&'static str> {
        self.code
    }

    pub(crate) fn with_code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    fn respond(&self, body: &Value) -> Response {
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
        let mut response = self.respond(&self.body());
        // For interfaces that have another form.
        response.extensions_mut().insert(self);
        response
    }
}

/// Gives each error the form of the interface that was asked, whoever made it: a handler, a wrong method or a missing key.
pub(crate) async fn shape(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    let Some(error) = response.extensions().get::<ApiError>().cloned() else { return response };
    let body = match path.as_str() {
        path if path == "/v1/messages" || path.starts_with("/v1/messages/") => error.anthropic_body(),
        path if path.starts_with("/api/") => json!({"error": error.message}),
        _ => return response,
    };
    let mut shaped = error.respond(&body);
    // Such as Allow, and CORS.
    for (name, value) in response.headers() {
        if name != header::CONTENT_LENGTH && !shaped.headers().contains_key(name) {
            shaped.headers_mut().append(name, value.clone());
        }
    }
    shaped
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
