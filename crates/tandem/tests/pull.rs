//! `tandem pull` against a server of this process that answers as Hugging Face does.

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{Done, command, finish, temporary};
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Clone)]
struct Served {
    bytes: Vec<u8>,
    /// Large files are known by SHA-256, small ones by git's hash.
    is_large: bool,
    /// Breaks off after so many bytes, once for each number.
    breaks: Vec<usize>,
    /// Sends something else than what the hash is of.
    is_damaged: bool,
}

impl Served {
    fn small(bytes: &[u8]) -> Served {
        Served { bytes: bytes.to_vec(), is_large: false, breaks: vec![], is_damaged: false }
    }

    fn large(n: usize) -> Served {
        let bytes = (0..n).map(|i| (i * 31 % 251) as u8).collect();
        Served { bytes, is_large: true, breaks: vec![], is_damaged: false }
    }

    fn etag(&self) -> String {
        let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        match self.is_large {
            true => hex(&Sha256::digest(&self.bytes)),
            false => {
                let prefix = format!("blob {}\0", self.bytes.len());
                hex(&Sha1::digest([prefix.as_bytes(), &self.bytes].concat()))
            }
        }
    }
}

fn pull(url: &str, home: &Path, args: &[&str]) -> Done {
    let mut command = command(&[&["pull"], args].concat());
    for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    finish(command.env("HF_ENDPOINT", url).env("HF_HOME", home).env("HF_TOKEN", "secret"))
}

/// One repository, owner/name, on a port of its own.
struct Hub {
    url: String,
    files: Arc<Mutex<HashMap<String, Served>>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// Name of a file, the first byte wanted, and the token.
type Asked = (String, usize, Option<String>);

impl Hub {
    fn start(files: &[(&str, Served)]) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Hub {
            url: format!("http://{}", listener.local_addr().unwrap()),
            files: Arc::new(Mutex::new(files.iter().map(|(name, file)| (name.to_string(), file.clone())).collect())),
            asked: Arc::default(),
        };
        let (files, asked) = (Arc::clone(&hub.files), Arc::clone(&hub.asked));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (files, asked) = (Arc::clone(&files), Arc::clone(&asked));
                std::thread::spawn(move || {
                    let _ = answer(stream.unwrap(), &files, &asked);
                });
            }
        });
        hub
    }

    fn pull(&self, home: &Path, args: &[&str]) -> Done {
        pull(&self.url, home, &[&["owner/name"], args].concat())
    }

    /// Names and first bytes of the downloads so far, and forgets them.
    fn downloads(&self) -> Vec<(String, usize)> {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        assert!(asked.iter().all(|(_, _, token)| token.as_deref() == Some("Bearer secret")), "{asked:?}");
        asked.into_iter().map(|(path, from, _)| (path, from)).collect()
    }
}

fn answer(stream: TcpStream, files: &Mutex<HashMap<String, Served>>, asked: &Mutex<Vec<Asked>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut stream = stream;
    // One request a connection.
    let path = lines.next().unwrap()?.split(' ').nth(1).unwrap().to_owned();
    let (mut range, mut token) = (String::new(), None);
    for line in lines {
        let line = line?;
        match line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())) {
            Some((name, value)) if name == "range" => range = value,
            Some((name, value)) if name == "authorization" => token = Some(value),
            Some(_) => {}
            None => break,
        }
    }
    let reply = |stream: &mut TcpStream, status: &str, headers: &str, body: &[u8], length: usize| {
        let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)
    };
    let mut files = files.lock().unwrap();
    if path == "/api/models/owner/name/revision/main" {
        let siblings: Vec<Value> = files.keys().map(|name| json!({"rfilename": name})).collect();
        let body = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return reply(&mut stream, "200 OK", "content-type: application/json\r\n", body.as_bytes(), body.len());
    }
    let name = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/")).map(str::to_owned);
    let Some(file) = name.as_ref().and_then(|name| files.get_mut(name)) else {
        return reply(&mut stream, "404 Not Found", "", b"", 0);
    };
    let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let first: usize = first.parse().unwrap();
    let last = if last.is_empty() { file.bytes.len() - 1 } else { last.parse().unwrap() };
    let headers = format!(
        "etag: \"{}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {first}-{last}/{}\r\n",
        file.etag(),
        file.bytes.len()
    );
    let mut body = file.bytes[first..=last].to_vec();
    let length = body.len();
    if range.ends_with('-') {
        asked.lock().unwrap().push((name.unwrap(), first, token));
        if !file.breaks.is_empty() {
            body.truncate(file.breaks.remove(0));
        }
        if file.is_damaged {
            body[0] ^= 1;
        }
    }
    drop(files);
    reply(&mut stream, "206 Partial Content", &headers, &body, length)
}

fn config() -> Served {
    Served::small(b"{\"model_type\": \"llama\"}")
}

#[test]
fn a_model_is_got_whole_continued_and_checked() {
    let weights = Served { breaks: vec![1000, 200_000, 0], ..Served::large(500_000) };
    let hub = Hub::start(&[
        ("config.json", config()),
        ("model.safetensors", weights.clone()),
        ("README.md", Served::small(b"words")),
        ("pytorch_model.bin", Served::small(b"a program")),
    ]);
    let home = temporary();
    let found = hub.pull(home.path(), &["--json"]).json();
    assert_eq!((&found["commit"], &found["bytes"]), (&json!(COMMIT), &json!(500_023)));
    let dir = home.path().join("hub/models--owner--name/snapshots").join(COMMIT);
    assert_eq!(found["path"], dir.display().to_string());
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights.bytes);
    assert_eq!(std::fs::read(dir.join("config.json")).unwrap(), config().bytes);
    assert!(!dir.join("README.md").exists() && !dir.join("pytorch_model.bin").exists());
    let mut downloads = hub.downloads();
    downloads.sort();
    let of = |from: usize| ("model.safetensors".to_owned(), from);
    assert_eq!(downloads, [("config.json".to_owned(), 0), of(0), of(1000), of(201_000), of(201_000)]);
    // It is there now, under its name.
    let again = hub.pull(home.path(), &[]).ok();
    assert!(again.contains("2 files") && again.contains("--model owner/name"), "{again}");
    assert_eq!(hub.downloads(), []);
    let inspected = finish(command(&["inspect", "--model", "owner/name"]).env("HF_HOME", home.path()));
    assert!(!inspected.stderr.contains("Hugging Face cache"), "{}", inspected.stderr);
    // A file that was damaged later is noticed, and got again.
    let blob = std::fs::canonicalize(dir.join("model.safetensors")).unwrap();
    std::fs::write(&blob, b"damaged").unwrap();
    let done = hub.pull(home.path(), &[]);
    assert!(done.stderr.contains("arrived damaged (7 of 500000 bytes"), "{}", done.stderr);
    hub.pull(home.path(), &[]).ok();
    assert_eq!(std::fs::read(&blob).unwrap(), weights.bytes);
}

#[test]
fn refusals_say_why() {
    let check = |files: &[(&str, Served)], args: &[&str], expected: &str| {
        let home = temporary();
        let done = Hub::start(files).pull(home.path(), args);
        assert_eq!((done.code, &*done.stdout), (Some(1), ""), "{}", done.stderr);
        let error = done.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(error.contains(expected), "{}", done.stderr);
        assert!(!home.path().join("hub/models--owner--name/refs/main").exists(), "nothing of it may be found");
    };
    let damaged = Served { is_damaged: true, ..Served::large(1000) };
    check(&[("model.safetensors", damaged)], &[], "model.safetensors arrived damaged (1000 of 1000 bytes");
    let endless = Served { breaks: vec![0; 9], ..Served::large(1000) };
    check(&[("model.safetensors", endless)], &[], "cannot get model.safetensors");
    check(&[("pytorch_model.bin", config())], &[], "only pickles such as pytorch_model.bin");
    check(&[("a.safetensors", config()), ("a.bin", config())], &["--include", "*.bin"], "a.bin is a pickle");
    check(&[("../../../outside.json", config()), ("a.safetensors", config())], &[], "outside the cache");
    check(&[], &["--revision", "other"], "has no model owner/name with revision other");
    check(&[], &["--revision", "../x"], "not the name of a branch");
}

#[test]
fn without_a_network_the_message_says_what_to_do() {
    let home = temporary();
    // Nobody listens on port 1.
    let done = pull("http://127.0.0.1:1", home.path(), &["owner/name"]);
    assert_eq!(done.code, Some(1));
    assert!(done.stderr.starts_with("error: cannot reach http://127.0.0.1:1: "), "{}", done.stderr);
    assert!(done.stderr.contains("copy a model directory here"), "{}", done.stderr);
    let done = pull("http://127.0.0.1:1", home.path(), &["name"]);
    assert!(done.stderr.contains("\"name\" is not a Hugging Face id"), "{}", done.stderr);
}
