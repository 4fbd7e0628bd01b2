//! Requests to a model's process.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Bytes of an answer that is read whole.
const LARGEST: usize = 64 << 20;

/// Headers between two neighbours, and those that speak of this server's name, page and key.
const NOT_PASSED_ON: [HeaderName; 12] = [
    header::AUTHORIZATION,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::HOST,
    header::ORIGIN,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("x-api-key"),
];

/// Where a model's requests go.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Its process's host and port.
    pub(crate) address: String,
    pub(crate) key: Arc<str>,
    /// Tokens of its context.
    pub(crate) context: Option<u64>,
}

/// Sends a request, and returns the answer once it begins.
pub(crate) async fn send(
    stream: TcpStream,
    target: &Target,
    request: Request<Body>,
) -> Result<Response<Incoming>, hyper::Error> {
    // A token is a small packet.
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the answer, or when nobody reads that any more.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("a model's connection ended: {error}");
        }
    });
    let (mut parts, body) = request.into_parts();
    parts.headers = passed_on(&parts.headers);
    if let Ok(host) = HeaderValue::from_str(&target.address) {
        parts.headers.insert(header::HOST, host);
    }
    if let Ok(key) = HeaderValue::from_str(&format!("Bearer {}", target.key)) {
        parts.headers.insert(header::AUTHORIZATION, key);
    }
    sender.send_request(Request::from_parts(parts, body)).await
}

/// A whole answer.
pub(crate) async fn get(
    stream: TcpStream,
    target: &Target,
    path: &str,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let response = send(stream, target, Request::get(path).body(Body::empty())?).await?;
    let status = response.status();
    Ok((status, axum::body::to_bytes(Body::new(response.into_body()), LARGEST).await?))
}

/// Headers for the other side.
pub(crate) fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let is_of_page = |name: &HeaderName| name.as_str().starts_with("sec-fetch-");
    let kept = headers.iter().filter(|(name, _)| !NOT_PASSED_ON.contains(name) && !is_of_page(name));
    kept.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// An answer's body that holds something until its end.
pub(crate) struct Holding<T> {
    pub(crate) body: Incoming,
    pub(crate) _held: T,
}

impl<T: Unpin> HttpBody for Holding<T> {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
