//! Listening, with a bound on everything that a client can make wait: its connection's headers, its silence, and how slowly it
//! reads; and on how many there are.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, Sleep, sleep};
use tower::ServiceExt;

use crate::process::{end_signal, max_connections};

/// What a client may make wait, and how many there may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at the same time; more wait to be accepted.
    pub max_connections: usize,
    /// For the whole head of a request, and until the next one on a connection that is kept.
    pub header_timeout: Duration,
    /// For a reader to take something of what is ready for it.
    pub write_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_connections: 4096,
            header_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(30),
        }
    }
}

tokio::task_local! {
    /// Whose request this task answers.
    pub(crate) static CLIENT: SocketAddr;
}

/// After a failed accept: descriptors may be free again then.
const RETRY: Duration = Duration::from_millis(100);

/// Serves until `stop` is ready, then completes what is being answered.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(limits.max_connections.clamp(1, Semaphore::MAX_PERMITS)));
    let graceful = GracefulShutdown::new();
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    let mut stop = std::pin::pin!(stop);
    let mut has_warned = false;
    loop {
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, stream) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut stop => break,
        };
        let (stream, client) = match stream {
            Ok(accepted) => accepted,
            Err(error) => {
                // The client was gone already, or descriptors have run out: neither is a reason to end.
                if !std::mem::replace(&mut has_warned, true) {
                    tracing::warn!("a connection cannot be accepted: {error}; trying on");
                }
                sleep(RETRY).await;
                continue;
            }
        };
        // A token is a small packet, and must not wait for the one before it to be acknowledged.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("cannot set TCP_NODELAY: {error}");
        }
        let service = router.clone();
        let service = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let router = service.clone();
            let answer = CLIENT.scope(client, router.oneshot(request));
            async move { Ok::<_, Infallible>(answer.await.unwrap_or_else(|never| match never {})) }
        });
        let io = TokioIo::new(Watched::new(stream, limits.write_timeout));
        let connection = graceful.watch(builder.serve_connection(io, service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection ended: {error}");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// A server that answers in a task of its own.
pub struct Serving {
    task: JoinHandle<()>,
    stop: oneshot::Sender<()>,
}

impl Serving {
    /// Begins to serve, with as many connections as there are descriptors for. Needs tokio's runtime.
    pub fn start(listener: TcpListener, router: Router) -> Serving {
        let (stop, stopped) = oneshot::channel::<()>();
        let limits = Limits { max_connections: max_connections(), ..Limits::default() };
        let stop_waiting = async {
            let _ = stopped.await;
        };
        Serving { task: tokio::spawn(serve(listener, router, limits, stop_waiting)), stop }
    }

    /// Waits until the process is asked to end.
    ///
    /// # Errors
    /// The server has panicked.
    pub async fn until_end_signal(&mut self) -> Result<(), JoinError> {
        tokio::select! {
            result = &mut self.task => result,
            () = end_signal() => Ok(()),
        }
    }

    /// Takes no more connections, and completes answers for this long, or until the process is asked to end again; whether
    /// all are complete.
    ///
    /// # Errors
    /// The server has panicked.
    pub async fn drain(self, time: Duration) -> Result<bool, JoinError> {
        let _ = self.stop.send(());
        tokio::select! {
            result = self.task => result.map(|()| true),
            () = end_signal() => Ok(false),
            () = sleep(time) => Ok(false),
        }
    }
}

/// A connection that ends when its reader takes nothing for a while.
struct Watched {
    stream: TcpStream,
    timeout: Duration,
    /// Set while a write waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Watched {
    fn new(stream: TcpStream, timeout: Duration) -> Watched {
        Watched { stream, timeout, deadline: None }
    }

    fn watch<T>(&mut self, written: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let timeout = self.timeout;
        let deadline =
            self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + timeout)));
        match deadline.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.watch(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(flushed, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream as Client};

    async fn start(limits: Limits) -> SocketAddr {
        let big = "x".repeat(32 << 20);
        let router = Router::new().route("/", get(|| async { "ok" })).route("/big", get(move || async move { big }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, router, limits, std::future::pending()));
        address
    }

    /// Sends some bytes and waits for the end of the connection.
    fn ends(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
        let mut stream = Client::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = vec![];
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("the connection stays open"),
            _ => answer,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn silent_clients_lose_their_places() {
        let short = Duration::from_millis(300);
        let limits = Limits { max_connections: 2, header_timeout: short, write_timeout: short };
        let address = start(limits).await;
        let clients = move || {
            // Nothing, half a head, a head and then nothing.
            ends(address, b"");
            ends(address, b"GET / HTTP/1.1\r\nHost: x\r\n");
            let answer = ends(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
            assert!(answer.starts_with(b"HTTP/1.1 200") && answer.ends_with(b"ok"));
            // Two that do not read hold both places for the bound, no longer.
            let slow: Vec<Client> = (0..2)
                .map(|_| {
                    let mut stream = Client::connect(address).unwrap();
                    stream.write_all(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
                    stream
                })
                .collect();
            let answer = ends(address, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            assert!(answer.ends_with(b"ok"));
            drop(slow);
        };
        tokio::task::spawn_blocking(clients).await.unwrap();
    }
}
