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
    /// Breaks off after this many bytes, once for each number.
    breaks: Vec<usize>,
    /// Sends something else than what the hash is of.
    is_damaged: bool,
    /// Is somewhere else, or nowhere known (empty).
    location: Option<String>,
    /// Sends one byte, then nothing for this many seconds.
    stalls: u64,
    /// Not its length.
    announced: Option<u64>,
}

impl Served {
    fn small(bytes: &[u8]) -> Served {
        Served {
            bytes: bytes.to_vec(),
            is_large: false,
            breaks: vec![],
            is_damaged: false,
            location: None,
            stalls: 0,
            announced: None,
        }
    }

    fn large(n: usize) -> Served {
        let bytes: Vec<u8> = (0..n).map(|i| (i * 31 % 251) as u8).collect();
        Served { is_large: true, ..Served::small(&bytes) }
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
    /// Files are redirected to it: no token may come.
    is_elsewhere: bool,
}

/// Name of a file, the first byte wanted, and the token.
type Asked = (String, usize, Option<String>);

impl Hub {
    fn start(files: &[(&str, Served)]) -> Hub {
        Hub::listen("127.0.0.1:0", files)
    }

    fn listen(address: &str, files: &[(&str, Served)]) -> Hub {
        let listener = TcpListener::bind(address).unwrap();
        let hub = Hub {
            url: format!("http://{}", listener.local_addr().unwrap()),
            files: Arc::new(Mutex::new(files.iter().map(|(name, file)| (name.to_string(), file.clone())).collect())),
            asked: Arc::default(),
            is_elsewhere: false,
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
        let wanted = (!self.is_elsewhere).then_some("Bearer secret");
        assert!(asked.iter().all(|(_, _, token)| token.as_deref() == wanted), "{asked:?}");
        asked.into_iter().map(|(path, from, _)| (path, from)).filter(|(path, _)| !path.starts_with("head")).collect()
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
    if let Some(location) = &file.location {
        let location = if location.is_empty() { String::new() } else { format!("location: {location}\r\n") };
        let headers = format!(
            "x-linked-etag: \"{}\"\r\nx-linked-size: {}\r\nx-repo-commit: {COMMIT}\r\netag: \"other\"\r\n{location}",
            file.etag(),
            file.announced.unwrap_or(file.bytes.len() as u64)
        );
        return reply(&mut stream, "302 Found", &headers, b"", 0);
    }
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
        if file.stalls > 0 {
            let seconds = std::mem::take(&mut file.stalls);
            drop(files);
            reply(&mut stream, "206 Partial Content", &headers, &body[..1], length)?;
            std::thread::sleep(std::time::Duration::from_secs(seconds));
            return Ok(());
        }
    } else {
        // The first byte alone, to see how many there are.
        asked.lock().unwrap().push((format!("head of {}", name.unwrap()), 0, token));
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
fn the_token_goes_to_the_hub_alone() {
    let path = format!("/owner/name/resolve/{COMMIT}/model.safetensors");
    let weights = Served::large(5000);
    // Another port, another host, and a name for the same host.
    for (address, host) in [("127.0.0.1:0", None), ("127.0.0.2:0", None), ("127.0.0.1:0", Some("localhost"))] {
        let mut elsewhere = Hub::listen(address, &[("model.safetensors", weights.clone())]);
        elsewhere.is_elsewhere = true;
        if let Some(name) = host {
            elsewhere.url = elsewhere.url.replace("127.0.0.1", name);
        }
        let location = Some(format!("{}{path}", elsewhere.url));
        let hub =
            Hub::start(&[("config.json", config()), ("model.safetensors", Served { location, ..weights.clone() })]);
        let home = temporary();
        hub.pull(home.path(), &[]).ok();
        let found = home.path().join("hub/models--owner--name/snapshots").join(COMMIT).join("model.safetensors");
        assert_eq!(std::fs::read(found).unwrap(), weights.bytes);
        assert_eq!(hub.downloads(), [("config.json".into(), 0)]);
        assert_eq!(elsewhere.downloads(), [("model.safetensors".into(), 0)]);
    }
    // Within the hub it goes along.
    let hub = Hub::start(&[
        ("model.safetensors", Served { location: Some(format!("/owner/name/resolve/{COMMIT}/b")), ..weights.clone() }),
        ("b", weights.clone()),
    ]);
    hub.pull(temporary().path(), &[]).ok();
    assert_eq!(hub.downloads(), [("b".into(), 0)]);
}

#[test]
fn redirects_that_lead_nowhere_are_errors() {
    for (location, expected) in [
        ("", "redirects without saying where"),
        (&*format!("/owner/name/resolve/{COMMIT}/model.safetensors"), "redirects more than 10 times"),
        ("file:///etc/passwd", "redirects to"),
        ("ftp://127.0.0.1/x", "redirects to"),
        ("http://", "redirects to"),
    ] {
        let file = Served { location: Some(location.into()), ..Served::large(100) };
        let done = Hub::start(&[("model.safetensors", file)]).pull(temporary().path(), &[]);
        assert_eq!((done.code, &*done.stdout), (Some(1), ""), "{location}: {}", done.stderr);
        assert!(done.stderr.contains(expected), "{location}: {}", done.stderr);
    }
}

#[test]
fn metadata_alone_leaves_the_weights_where_they_are() {
    let hub = Hub::start(&[
        ("config.json", config()),
        ("model.safetensors.index.json", Served::small(b"{}")),
        ("chat_template.jinja", Served::small(b"{{ messages }}")),
        ("model-00001-of-00001.safetensors", Served::large(5000)),
    ]);
    let found = hub.pull(temporary().path(), &["--metadata", "--json"]).json();
    let mut names: Vec<&str> = found["files"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["chat_template.jinja", "config.json", "model.safetensors.index.json"]);
    assert_eq!(hub.downloads().len(), 3);
}

/// Of a large original only the files with its layer that drafts; a checkpoint without one drafts with it then.
#[test]
fn the_layer_that_drafts_alone() {
    const FABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8");
    let read = |name: &str| std::fs::read(Path::new(FABLE).join(name)).unwrap();
    let (whole, config) = (read("model.safetensors"), Served::small(&read("config.json")));
    let n_layers = serde_json::from_slice::<Value>(&config.bytes).unwrap()["num_hidden_layers"].as_u64().unwrap();
    let of_layer = format!("model.layers.{n_layers}.");
    let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let is_of_layer = |name: &str| name.starts_with(&of_layer);
    // The layer is in two files, of which one holds something else too; the last file has nothing of it.
    let files =
        ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"];
    let place = |name: &str| match name {
        _ if is_of_layer(name) => files[usize::from(name.contains(".mlp."))],
        "model.norm.weight" => files[0],
        _ => files[2],
    };
    let shard = |file: &str| {
        let held = tensors.tensors().into_iter().filter(|(name, _)| place(name) == file);
        Served { is_large: true, ..Served::small(&safetensors::serialize(held, None).unwrap()) }
    };
    let weight_map: serde_json::Map<String, Value> =
        tensors.names().into_iter().map(|name| (name.to_string(), json!(place(name)))).collect();
    let index = |weight_map: &serde_json::Map<String, Value>| {
        Served::small(json!({"metadata": {}, "weight_map": weight_map}).to_string().as_bytes())
    };
    let hub = Hub::start(&[
        ("config.json", config.clone()),
        ("model.safetensors.index.json", index(&weight_map)),
        ("tokenizer.json", Served::small(&read("tokenizer.json"))),
        (files[0], shard(files[0])),
        (files[1], shard(files[1])),
        (files[2], Served::large(1000)),
    ]);
    let home = temporary();
    let said = hub.pull(home.path(), &["--mtp"]).ok();
    assert!(said.contains("use it as --mtp owner/name"), "{said}");
    let mut got: Vec<String> = hub.downloads().into_iter().map(|(name, _)| name).collect();
    got.sort();
    assert_eq!(got, ["config.json", files[0], files[1], "model.safetensors.index.json", "tokenizer.json"]);
    // A whole model is not here yet: it would be asked for.
    let done = finish(command(&["run", "Hello", "--model", "owner/name"]).env("HF_HOME", home.path()));
    assert!(done.code == Some(1), "{}", done.stderr);

    let run = |mtp: Option<&str>| {
        let mut args = vec!["run", "Tell me a story about a brave fox named Lily.", "--model", FABLE, "--json"];
        args.extend(["--max-tokens", "40", "--temperature", "0", "--draft-depth", "3"]);
        args.extend(mtp.iter().flat_map(|mtp| ["--mtp", *mtp]));
        let found = finish(command(&args).env("HF_HOME", home.path())).json();
        ["tokens", "drafted_tokens", "accepted_by_draft_position"].map(|name| found[name].clone())
    };
    let own = run(None);
    assert!(own[1].as_u64() > Some(20), "{own:?}");
    assert_eq!(run(Some("owner/name")), own);
    // From there into a directory that has nothing else.
    let out = home.path().join("layer");
    let out_name = out.display().to_string();
    let convert = ["convert", "owner/name", "--mtp-only", "--quant", "keep", "--out", &out_name];
    finish(command(&convert).env("HF_HOME", home.path())).ok();
    let kept = std::fs::read(out.join("model.safetensors")).unwrap();
    assert!(safetensors::SafeTensors::deserialize(&kept).unwrap().names().iter().all(|name| is_of_layer(name)));
    assert!(!out.join("tokenizer.json").exists());
    assert_eq!(run(Some(&out_name)), own);

    // What has no such layer says so before it gets weights.
    let check = |config: Served, weight_map: &serde_json::Map<String, Value>, expected: &str| {
        let files = [
            ("config.json", config),
            ("model.safetensors.index.json", index(weight_map)),
            (files[0], Served::large(10)),
        ];
        let (home, hub) = (temporary(), Hub::start(&files));
        let done = hub.pull(home.path(), &["--mtp"]);
        assert!(done.code == Some(1) && done.stderr.contains(expected), "{}", done.stderr);
        assert!(hub.downloads().iter().all(|(name, _)| !name.ends_with(".safetensors")));
    };
    let without: serde_json::Map<String, Value> =
        weight_map.iter().filter(|(name, _)| !is_of_layer(name)).map(|(n, f)| (n.clone(), f.clone())).collect();
    check(config.clone(), &without, &format!("no tensor of model.layers.{n_layers}"));
    let mut plain: Value = serde_json::from_slice(&config.bytes).unwrap();
    plain.as_object_mut().unwrap().remove("num_nextn_predict_layers");
    check(Served::small(plain.to_string().as_bytes()), &weight_map, "no num_nextn_predict_layers");
}

#[test]
fn a_stalled_connection_is_given_up_and_continued() {
    let weights = Served { stalls: 40, ..Served::large(3000) };
    let hub = Hub::start(&[("model.safetensors", weights.clone())]);
    let home = temporary();
    let start = std::time::Instant::now();
    hub.pull(home.path(), &[]).ok();
    assert!(start.elapsed().as_secs() < 35, "{:?}", start.elapsed());
    assert_eq!(hub.downloads(), [("model.safetensors".into(), 0), ("model.safetensors".into(), 1)]);
}

#[test]
fn what_the_disk_cannot_hold_is_refused_before_it_is_got() {
    let file = Served { location: Some("http://127.0.0.1:1/".into()), ..Served::large(1) };
    let hub = Hub::start(&[("model.safetensors", file)]);
    hub.files.lock().unwrap().get_mut("model.safetensors").unwrap().announced = Some(1 << 60);
    let done = hub.pull(temporary().path(), &[]);
    assert!(done.code == Some(1) && done.stderr.contains("make room"), "{}", done.stderr);
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
