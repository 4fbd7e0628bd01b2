//! Loads for servers that are not Tandem's: behind https, and not ready yet.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tandem_load::{LoadOptions, Prompts, run, wait_until_ready};

const NEVER: Duration = Duration::ZERO;
const PATIENT: Duration = Duration::from_secs(60);

fn options(url: String) -> LoadOptions {
    LoadOptions {
        url,
        model_name: None,
        api_key: None,
        insecure: false,
        requests: 4,
        num_warmups: 0,
        concurrency: Some(2),
        arrivals: None,
        prompts: Prompts::Words { own: 3, shared: 0, num_prefixes: 1 },
        max_tokens: 2,
        chat: true,
        seed: 1,
        goodput: vec![],
    }
}

/// Answers the requests of one connection; the first `n_unready` of all are 503.
fn answer(stream: impl Read + Write, n_unready: &AtomicUsize) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (mut first, mut length) = (String::new(), 0);
        if stream.read_line(&mut first)? == 0 {
            return Ok(());
        }
        loop {
            let mut line = String::new();
            stream.read_line(&mut line)?;
            if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = n.trim().parse().expect("a number");
            }
            if line.trim().is_empty() {
                break;
            }
        }
        stream.read_exact(&mut vec![0; length])?;
        let unready = n_unready.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
        let event = "data: {\"choices\": [{\"delta\": {\"content\": \"a\"}}]}\n\n";
        let (status, body) = match first.split(' ').nth(1) {
            _ if unready => ("503 Service Unavailable", String::new()),
            Some("/v1/models") => ("200 OK", "{\"data\": [{\"id\": \"some\"}]}".to_owned()),
            Some("/v1/chat/completions") => ("200 OK", format!("{event}{event}data: [DONE]\n\n")),
            _ => ("404 Not Found", String::new()),
        };
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.get_mut().write_all(head.as_bytes())?;
        stream.get_mut().flush()?;
    }
}

/// A server's address; with a certificate that nobody vouches for, or without one.
fn start(tls: bool, n_unready: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let config = config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key).expect("a key");
    let config = Arc::new(config);
    let n_unready = Arc::new(AtomicUsize::new(n_unready));
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let (config, n_unready) = (Arc::clone(&config), Arc::clone(&n_unready));
            std::thread::spawn(move || match tls {
                true => {
                    let connection = ServerConnection::new(config).expect("a connection");
                    answer(StreamOwned::new(connection, socket), &n_unready)
                }
                false => answer(socket, &n_unready),
            });
        }
    });
    if tls { format!("https://localhost:{port}") } else { format!("http://127.0.0.1:{port}") }
}

#[test]
fn https() {
    let mut load = options(start(true, 0));
    let refused = wait_until_ready(&load, PATIENT, PATIENT, |_| {}).expect_err("nobody vouches for it");
    assert!(format!("{refused:#}").contains("--insecure"), "{refused:#}");
    load.insecure = true;
    wait_until_ready(&load, NEVER, NEVER, |_| {}).expect("ready");
    let report = run(&load).expect("answers");
    assert!(report.failed.is_none(), "{:?}", report.failed);
    assert_eq!((report.model.as_str(), &report.json["generated_tokens"]), ("some", &8.into()));
}

#[test]
fn a_server_that_is_not_ready() {
    let load = options(start(false, 2));
    let mut said = vec![];
    wait_until_ready(&load, NEVER, PATIENT, |why| said.push(why.to_owned())).expect("ready at last");
    assert_eq!(said, ["it is not ready (503)"]);
    run(&load).expect("answers");

    let load = options(start(false, usize::MAX));
    let begin = Instant::now();
    let late = wait_until_ready(&load, NEVER, Duration::from_secs(1), |_| {}).expect_err("never ready");
    assert!(format!("{late:#}").contains("is not ready after 1 s"), "{late:#}");
    assert!(begin.elapsed() < PATIENT);
    // Nobody listens: an error at once, or after the time that was given.
    let closed = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    for (url, expected) in [(format!("http://{closed}"), "is the server running?"), ("nonsense".into(), "--url is")] {
        let error = wait_until_ready(&options(url), NEVER, PATIENT, |_| {}).expect_err("nobody");
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    }
}
