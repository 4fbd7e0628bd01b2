//! Bodies of requests: bounded in bytes and time, each alone and all together, before anything is done with them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tandem_text::exact;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};
use tokio_stream::StreamExt;

use crate::app::App;
use crate::conversation::Notes;
use crate::error::ApiError;
use crate::fields::Table;
use crate::generation::work;

/// Bytes of all bodies together that are being read or worked on, in the server's default.
pub(crate) const IN_FLIGHT: usize = 64 << 20;
/// The first bytes of each body are free: whoever holds many large ones does not shut out small ones.
const FREE: usize = 64 << 10;
/// Unit of the bound on all bytes.
const UNIT: usize = 1 << 10;
/// Between two pieces of a body.
const IDLE: Duration = Duration::from_secs(15);
/// For a whole body.
const DEADLINE: Duration = Duration::from_secs(120);
/// For a place among those whose text is worked on.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests whose text is worked on at the same time.
const N_WORKING: usize = 4;
/// Bodies from this size on are worked on one after the other.
const LARGE: usize = 1 << 20;
/// A body that is too large is read and dropped up to this many times the limit: a client that is still writing when the
/// connection closes would see a broken pipe instead of the answer.
const TOO_LARGE_READ: usize = 8;

/// From the end of a large body on until its memory is given back: others may come.
const MEMORY: Duration = Duration::from_secs(1);
/// Without a new request, until what small ones left is given back too.
const QUIET: Duration = Duration::from_secs(5);

/// Places for work on requests before they reach the engine's queue.
pub(crate) struct Admission {
    bytes: Arc<Semaphore>,
    working: Arc<Semaphore>,
    large: Arc<Semaphore>,
    memory: Memory,
}

impl Admission {
    pub(crate) fn new(in_flight: usize, return_memory: fn()) -> Admission {
        let semaphore = |n: usize| Arc::new(Semaphore::new(n.min(Semaphore::MAX_PERMITS)));
        Admission {
            bytes: semaphore(in_flight / UNIT),
            working: semaphore(N_WORKING),
            large: semaphore(1),
            memory: Memory {
                give_back: return_memory,
                is_planned: Arc::default(),
                n_requests: Arc::default(),
                waits_for_quiet: Arc::default(),
            },
        }
    }
}

/// A place among those whose request is worked on.
pub(crate) struct Admitted {
    _permits: Vec<OwnedSemaphorePermit>,
    _large: Option<Large>,
}

/// How memory goes back to the system: the allocator keeps for later what a large request had.
#[derive(Clone)]
struct Memory {
    give_back: fn(),
    is_planned: Arc<AtomicBool>,
    /// Requests that have come.
    n_requests: Arc<AtomicU64>,
    waits_for_quiet: Arc<AtomicBool>,
}

impl Memory {
    /// Gives it back once no other request has come for a while.
    fn when_quiet(&self) {
        let Memory { give_back, n_requests, waits_for_quiet, .. } = self.clone();
        n_requests.fetch_add(1, Ordering::Relaxed);
        if let (Ok(runtime), false) = (Handle::try_current(), waits_for_quiet.swap(true, Ordering::Relaxed)) {
            runtime.spawn(async move {
                loop {
                    let before = n_requests.load(Ordering::Relaxed);
                    tokio::time::sleep(QUIET).await;
                    if n_requests.load(Ordering::Relaxed) == before {
                        break;
                    }
                }
                waits_for_quiet.store(false, Ordering::Relaxed);
                let _ = tokio::task::spawn_blocking(give_back).await;
            });
        }
    }
}

/// A body that is large. After its end memory is given back.
pub(crate) struct Large(Memory);

impl Drop for Large {
    fn drop(&mut self) {
        let Memory { give_back, is_planned, .. } = self.0.clone();
        if let (Ok(runtime), false) = (Handle::try_current(), is_planned.swap(true, Ordering::Relaxed)) {
            runtime.spawn(async move {
                tokio::time::sleep(MEMORY).await;
                is_planned.store(false, Ordering::Relaxed);
                let _ = tokio::task::spawn_blocking(give_back).await;
            });
        }
    }
}

/// A request, read from a JSON body.
pub(crate) struct Body<T> {
    pub(crate) value: T,
    pub(crate) notes: Notes,
    /// To be dropped when the prompt is made.
    pub(crate) admitted: Admitted,
}

/// A body that is read by this table of fields.
pub(crate) trait Fields: DeserializeOwned {
    /// `None`: whatever is not known is ignored.
    const TABLE: Option<&'static Table>;
}

impl<T: Fields> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let admission = &app.admission;
        admission.memory.when_quiet();
        let (bytes, held, large) = read(request, app.max_body_bytes, admission).await?;
        let mut permits = vec![held];
        let mut enter = async |semaphore: &Arc<Semaphore>| {
            match timeout_at(Instant::now() + PATIENCE, Arc::clone(semaphore).acquire_owned()).await {
                Ok(Ok(permit)) => permits.push(permit),
                _ => return Err(ApiError::unavailable("too many requests are being read; try again later")),
            }
            Ok(())
        };
        if large.is_some() {
            enter(&admission.large).await?;
        }
        enter(&admission.working).await?;
        let mut notes = Notes::default();
        let n_bytes = bytes.len();
        let value = work(n_bytes, || {
            let value: Value = exact::read_where(&bytes, is_argument)
                .map_err(|error| ApiError::invalid("", format!("the body is not valid JSON: {error}")))?;
            drop(bytes);
            if let (Some(table), Value::Object(map)) = (T::TABLE, &value) {
                table.check(map, &mut notes)?;
            }
            serde_path_to_error::deserialize(value).map_err(|error| {
                let path = error.path().to_string();
                let path = if path == "." { String::new() } else { path };
                ApiError::invalid(&path, format!("the request is not as expected: {}", error.into_inner()))
            })
        })?;
        Ok(Body { value, notes, admitted: Admitted { _permits: permits, _large: large } })
    }
}

/// Arguments of calls in messages and items keep every digit; elsewhere a number has its 64 bits.
fn is_argument(keys: &[&[u8]]) -> bool {
    let Some((first, rest)) = keys.split_first() else { return false };
    matches!(*first, b"messages" | b"input") && rest.iter().any(|key| matches!(*key, b"input" | b"arguments"))
}

/// Reads a whole body within its bounds; its bytes count among those in flight until the permit is dropped.
pub(crate) async fn read(
    request: Request,
    limit: usize,
    admission: &Admission,
) -> Result<(Vec<u8>, OwnedSemaphorePermit, Option<Large>), ApiError> {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse::<usize>().ok());
    let mut chunks = request.into_body().into_data_stream();
    let (mut bytes, mut n_read, mut n_units, mut large) = (vec![], 0usize, 0, None);
    let none = Arc::clone(&admission.bytes).try_acquire_many_owned(0);
    let mut held = none.map_err(|_| ApiError::unavailable("the server is stopping"))?;
    let end = Instant::now() + DEADLINE;
    let is_too_large = |n_read: usize| n_read > limit || length.is_some_and(|length| length > limit);
    loop {
        let next = timeout_at(end.min(Instant::now() + IDLE), chunks.next()).await;
        let Some(chunk) = next.map_err(|_| ApiError::slow_body())? else { break };
        let chunk = chunk.map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, format!("the body broke off: {e}")))?;
        n_read += chunk.len();
        if n_read >= LARGE {
            large.get_or_insert_with(|| Large(admission.memory.clone()));
        }
        if is_too_large(n_read) {
            bytes = vec![];
            if n_read / TOO_LARGE_READ > limit {
                break;
            }
            continue;
        }
        let wanted = n_read.saturating_sub(FREE).div_ceil(UNIT);
        if wanted > n_units {
            let more = u32::try_from(wanted - n_units).unwrap_or(u32::MAX);
            match Arc::clone(&admission.bytes).try_acquire_many_owned(more) {
                Ok(permit) => held.merge(permit),
                Err(_) => return Err(ApiError::unavailable("too many large requests are being read; try again later")),
            }
            n_units = wanted;
        }
        bytes.extend_from_slice(&chunk);
    }
    if is_too_large(n_read) {
        return Err(ApiError::body_too_large(limit));
    }
    Ok((bytes, held, large))
}

impl ApiError {
    /// 413: the body is larger than the server takes.
    fn body_too_large(limit: usize) -> ApiError {
        let limit = limit >> 20;
        let message = format!("the request is larger than the {limit} MB that this server takes (--max-body-mb)");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).with_code("request_too_large")
    }

    /// 408: the body does not come.
    fn slow_body() -> ApiError {
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body of the request did not come in time")
    }
}
