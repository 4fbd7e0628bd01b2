//! Models from Hugging Face into the local cache, where `--model OWNER/NAME` finds them.
//!
//! ureq speaks HTTP. Redirects are followed here, because only here it is known which host may see the token; so are what
//! to get, checksums, names that stay inside the cache, and messages.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{IsTerminal, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tandem_core::weights::is_of_mtp;
use tandem_core::{Checkpoint, ModelConfig};
use tandem_model::glob_matches;
use ureq::Body;
use ureq::http::{Response, StatusCode};
use url::Url;

use tandem_runtime::units::bytes;
use tandem_runtime::{hugging_face_cache, hugging_face_token, model_dir};

/// What a model needs besides its weights, and nothing else of its repository.
const METADATA: [&str; 5] = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"];
const WEIGHTS: &str = "*.safetensors";
/// Endings of files that are programs.
const PICKLES: [&str; 5] = ["bin", "pt", "pth", "pkl", "ckpt"];
/// Times that a file is tried without a byte more; each goes on where the last one broke off.
const ATTEMPTS: usize = 5;
/// Files got at once.
const CONNECTIONS: usize = 8;
/// A model of 750 GB has about 300 files.
const MAX_FILES: usize = 10_000;
/// Most bytes of what the server tells about a repository.
const MAX_LISTING_BYTES: u64 = 64 << 20;
const MAX_REDIRECTS: usize = 10;
/// For a connection, and for the head of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A body is read for so long, then asked for again from where it is.
const WINDOW: Duration = Duration::from_secs(60);
/// No byte for so long ends an attempt.
const READ_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes a second below which a server counts as hanging.
const SLOWEST: u64 = 1000;

/// What to get of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `owner/name`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Files to get besides the default ones, `*` standing for anything.
    pub include: Vec<String>,
    /// The configuration, the index and the tokenizer only.
    pub metadata: bool,
    /// Of the weights, only the files that hold the multi-token-prediction layer.
    pub mtp: bool,
    /// Nothing is written to the error output but a bar at a terminal.
    pub quiet: bool,
}

impl Request {
    /// For a model as commands name it: `owner/name`, perhaps with `@revision`.
    pub fn of_model(model: &str, metadata: bool) -> Request {
        let (repo, revision) = model.split_once('@').unwrap_or((model, "main"));
        Request {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            include: vec![],
            metadata,
            mtp: false,
            quiet: false,
        }
    }
}

/// True for `owner/name` that is no directory.
pub fn is_hugging_face_id(name: &str) -> bool {
    name.split('/').count() == 2 && !name.starts_with(['.', '/', '~']) && is_inside(name) && !Path::new(name).exists()
}

/// True for a model whose weights are here, all of them.
pub fn has_weights(model: &str) -> bool {
    let dir = model_dir(Some(model)).ok().filter(|dir| Checkpoint::is_whole(dir));
    let files = dir.and_then(|dir| std::fs::read_dir(dir).ok());
    let is_weights = |path: PathBuf| path.extension().is_some_and(|e| e == "safetensors" || e == "gguf");
    files.is_some_and(|mut files| files.any(|file| file.is_ok_and(|file| is_weights(file.path()))))
}

/// What was got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// The model's directory in the cache.
    pub snapshot: PathBuf,
    /// Of the revision that was asked for.
    pub commit: String,
    /// Names in the repository.
    pub files: Vec<String>,
    /// Of all files, those that were here included.
    pub bytes: u64,
}

/// Gets files into the Hugging Face cache, if `confirm` agrees to the bytes that are missing.
///
/// # Errors
/// When the request or the server's answers are wrong, there is no cache, no space or no server, a file's checksum differs, or
/// `confirm` disagrees.
pub fn get(request: &Request, confirm: impl FnOnce(u64) -> bool) -> anyhow::Result<Pulled> {
    let is_id = request.repo.split('/').count() == 2 && is_inside(&request.repo);
    ensure!(is_id, "{:?} is not a Hugging Face id, which looks like owner/name", request.repo);
    ensure!(
        is_inside(&request.revision),
        "--revision {:?} is not the name of a branch, tag or commit",
        request.revision
    );
    let is_set =
        |name: &str| std::env::var(name).is_ok_and(|v| matches!(&*v.to_uppercase(), "1" | "ON" | "YES" | "TRUE"));
    ensure!(!is_set("HF_HUB_OFFLINE"), "HF_HUB_OFFLINE is set, so nothing can be got; unset it");
    let cache = hugging_face_cache().context("neither HF_HOME nor HOME is set, so there is no Hugging Face cache")?;
    let folder = cache.join(format!("models--{}", request.repo.replace('/', "--")));
    let hub = Hub::from_env(hugging_face_token().filter(|_| !is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN")))?;

    let info = hub.info(request).map_err(|error| hub.explain(error, request))?;
    ensure!(is_hex(&info.sha, 40), "the server names the commit {:?}, expected 40 hexadecimal digits", info.sha);
    let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let mut wanted = choose(&names, request)?;
    if request.mtp {
        wanted = hub.with_mtp(wanted, request, &info.sha, &folder)?;
    }
    ensure!(
        wanted.len() <= MAX_FILES,
        "{} has {} files to get, expected at most {MAX_FILES}; this is no model, or --include asks for too much",
        request.repo,
        wanted.len()
    );

    // All files of one commit, whatever is pushed meanwhile.
    let snapshot = folder.join("snapshots").join(&info.sha);
    let bar = progress_bar();
    let in_words = |name: &str, error: Failure| hub.explain(error, request).context(format!("cannot get {name}"));
    let files = in_parallel(&wanted, |name| {
        let file = hub.metadata(&request.repo, &info.sha, name).map_err(|error| in_words(name, error))?;
        ensure!(file.commit == info.sha, "the server gives {name} of another commit");
        Ok(file)
    })?;
    let total = files.iter().try_fold(0u64, |sum, file| sum.checked_add(file.size));
    let total = total.context("the server announces more bytes than there are; this is no Hugging Face server")?;
    let missing: u64 = files.iter().map(|file| file.size - file.bytes_here(&folder).min(file.size)).sum();
    ensure!(missing == 0 || confirm(missing), "{} is not here, and nothing was got", request.repo);
    std::fs::create_dir_all(folder.join("blobs"))
        .and_then(|()| std::fs::create_dir_all(&snapshot))
        .with_context(|| format!("cannot write to the Hugging Face cache at {}", cache.display()))?;
    check_space(&folder, missing)?;
    if missing > 0 && !request.quiet {
        eprintln!("{} files, {}; {} to get", files.len(), bytes(total), bytes(missing));
    }
    bar.set_length(total);
    in_parallel(&files, |file| {
        hub.fetch(file, &folder, &bar).map_err(|error| in_words(&file.name, error))?;
        link(&snapshot.join(&file.name), &folder.join("blobs").join(&file.digest), &file.name)
    })?;
    bar.finish_and_clear();
    // Only now is it the model of this name.
    let reference = folder.join("refs").join(&request.revision);
    let write = || {
        std::fs::create_dir_all(reference.parent().unwrap_or(&folder))?;
        std::fs::write(&reference, &info.sha)
    };
    write().with_context(|| format!("cannot write {}", reference.display()))?;
    Ok(Pulled { snapshot, commit: info.sha, files: wanted.into_iter().map(str::to_owned).collect(), bytes: total })
}

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// What of `names` the multi-token-prediction layer needs: no weights but those that `index` says hold it, if there is one.
fn mtp_files<'a>(names: Vec<&'a str>, config: &str, index: Option<&str>) -> anyhow::Result<Vec<&'a str>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let config = ModelConfig::parse(config)?;
    ensure!(
        !config.mtp_layers().is_empty(),
        "its config.json has no num_nextn_predict_layers, so there is no multi-token-prediction layer to get"
    );
    let Some(index) = index else { return Ok(names) };
    let Index { weight_map } = serde_json::from_str(index).with_context(|| format!("{INDEX} is not a weight index"))?;
    let holds = |file: &str| weight_map.iter().any(|(tensor, held_by)| held_by == file && is_of_mtp(tensor, &config));
    let wanted: Vec<&str> = names.into_iter().filter(|name| !glob_matches(WEIGHTS, name) || holds(name)).collect();
    ensure!(
        wanted.iter().any(|name| glob_matches(WEIGHTS, name)),
        "{INDEX} names no tensor of model.layers.{}, the multi-token-prediction layer: this conversion has left it out; pull \
         the layer of the original model",
        config.num_hidden_layers
    );
    Ok(wanted)
}

/// The files to get.
fn choose<'a>(names: &'a [String], request: &Request) -> anyhow::Result<Vec<&'a str>> {
    if let Some(name) = names.iter().find(|name| !is_inside(name)) {
        bail!("the server lists the file {name:?}, which would lie outside the cache; this is no Hugging Face server");
    }
    let is_pickle = |name: &str| Path::new(name).extension().is_some_and(|e| PICKLES.iter().any(|pickle| e == *pickle));
    // Copies of the model for other programs are in folders; what is needed is not.
    let is_default = |name: &str| {
        let is_weights = glob_matches(WEIGHTS, name) && !request.metadata;
        !name.contains('/') && (is_weights || METADATA.iter().any(|pattern| glob_matches(pattern, name)))
    };
    let is_asked = |name: &str| request.include.iter().any(|pattern| glob_matches(pattern, name));
    let pickle = names.iter().find(|name| is_pickle(name));
    if let Some(name) = names.iter().find(|name| is_pickle(name) && is_asked(name)) {
        bail!("{name} is a pickle file. Opening one runs the code inside, so it is refused");
    }
    let mut wanted: Vec<&str> =
        names.iter().map(String::as_str).filter(|name| is_default(name) || is_asked(name)).collect();
    wanted.dedup();
    if request.metadata {
        ensure!(wanted.contains(&"config.json"), "{} has no config.json, so it is no model", request.repo);
        return Ok(wanted);
    }
    let is_weights = |name: &&&str| name.ends_with(".safetensors") || name.ends_with(".gguf");
    match (wanted.iter().find(is_weights), pickle) {
        (Some(_), _) => Ok(wanted),
        (None, Some(pickle)) => bail!(
            "{} has no *.safetensors file, only pickles such as {pickle}. Opening a pickle runs the code inside, so it is \
             refused; look for a safetensors version of this model",
            request.repo
        ),
        (None, None) => bail!(
            "{} has no *.safetensors file; its files: {}. --include GLOB takes others",
            request.repo,
            names.iter().take(20).map(String::as_str).collect::<Vec<_>>().join(", ")
        ),
    }
}

/// What the server tells about a repository.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// One file of one commit.
struct Remote {
    name: String,
    url: Url,
    commit: String,
    /// SHA-256 of large files, git's hash of small ones.
    digest: String,
    size: u64,
}

impl Remote {
    fn blob(&self, folder: &Path) -> PathBuf {
        folder.join("blobs").join(&self.digest)
    }

    fn part(&self, folder: &Path) -> PathBuf {
        folder.join("blobs").join(format!("{}.part", self.digest))
    }

    /// Bytes of it that earlier pulls left.
    fn bytes_here(&self, folder: &Path) -> u64 {
        let size = |path: PathBuf| std::fs::symlink_metadata(path).ok().filter(|m| m.is_file()).map(|m| m.len());
        size(self.blob(folder)).or_else(|| size(self.part(folder))).unwrap_or(0)
    }
}

/// Why a request had no use.
enum Failure {
    /// The answer says so.
    Status(StatusCode),
    /// The answer did not come, or not whole.
    Network(ureq::Error),
    /// Less than [`SLOWEST`].
    Slow,
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Other(error)
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Failure {
        Failure::Network(error)
    }
}

impl Failure {
    /// Whether to go on where a download stopped.
    fn is_broken_off(&self) -> bool {
        match self {
            Failure::Status(status) => status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS,
            Failure::Network(error) => {
                matches!(error, ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::Protocol(_))
            }
            Failure::Slow => true,
            Failure::Other(_) => false,
        }
    }
}

/// A server that speaks Hugging Face's protocol.
struct Hub {
    agent: ureq::Agent,
    endpoint: Url,
    token: Option<String>,
}

impl Hub {
    fn from_env(token: Option<String>) -> anyhow::Result<Hub> {
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|endpoint| !endpoint.trim().is_empty());
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".into());
        let url = Url::parse(endpoint.trim().trim_end_matches('/')).ok();
        let url = url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let endpoint =
            url.with_context(|| format!("HF_ENDPOINT {endpoint:?} is not a URL such as https://huggingface.co"))?;
        if let Some(token) = &token {
            let is_printable = token.bytes().all(|byte| byte.is_ascii_graphic());
            ensure!(
                is_printable,
                "the Hugging Face token has characters that no token has; check HF_TOKEN or its file"
            );
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(Some(ANSWER_TIMEOUT))
            .timeout_connect(Some(ANSWER_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .timeout_recv_body(Some(WINDOW))
            .max_idle_connections_per_host(CONNECTIONS)
            .user_agent(concat!("tandem/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Hub { agent: agent.into(), endpoint, token })
    }

    /// Asks for a URL and follows redirects until `is_enough` of an answer. The token goes to the hub's own host only.
    fn get(
        &self,
        url: &Url,
        range: Option<&str>,
        mut is_enough: impl FnMut(&Response<Body>) -> bool,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(url.as_str());
            if let Some(range) = range {
                request = request.header("Range", range);
            }
            if let Some(token) = self.token.as_ref().filter(|_| url.origin() == self.endpoint.origin()) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call()?;
            let status = response.status();
            if is_enough(&response) || status.is_success() {
                return Ok(response);
            }
            if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Err(Failure::Status(status));
            }
            let location = header(&response, "location").context("the server redirects without saying where to")?;
            let next = url.join(&location).with_context(|| format!("the server redirects to {location:?}"))?;
            let is_secure = next.scheme() == "https" || (next.scheme() == "http" && url.scheme() == "http");
            if !is_secure || !next.has_host() {
                return Err(anyhow!("the server redirects to {location:?}, expected a https address").into());
            }
            url = next;
        }
        Err(anyhow!("the server redirects more than {MAX_REDIRECTS} times").into())
    }

    /// A URL below the endpoint.
    fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    fn info(&self, request: &Request) -> Result<Info, Failure> {
        let (owner, name) = request.repo.split_once('/').unwrap_or_default();
        let url = self.url(&["api", "models", owner, name, "revision", &request.revision]);
        let body =
            self.get(&url, None, |_| false)?.into_body().into_with_config().limit(MAX_LISTING_BYTES).read_to_vec()?;
        let info = serde_json::from_slice(&body);
        Ok(info.context("the server did not describe the repository as Hugging Face does")?)
    }

    fn metadata(&self, repo: &str, commit: &str, name: &str) -> Result<Remote, Failure> {
        let segments: Vec<&str> = repo.split('/').chain(["resolve", commit]).chain(name.split('/')).collect();
        let url = self.url(&segments);
        // The hub knows the digest; where it redirects to may know another.
        let (mut linked, mut etag, mut found_commit, mut size) = (None, None, None, None);
        self.get(&url, Some("bytes=0-0"), |response| {
            let has = |name: &str| header(response, name);
            linked = linked.take().or_else(|| has("x-linked-etag"));
            etag = has("etag").or_else(|| etag.take());
            found_commit = found_commit.take().or_else(|| has("x-repo-commit"));
            size = size.take().or_else(|| has("x-linked-size"));
            if response.status().is_success() {
                let total = has("content-range").and_then(|range| range.rsplit_once('/').map(|(_, n)| n.to_owned()));
                size = size.take().or(total).or_else(|| has("content-length"));
            }
            linked.is_some() && found_commit.is_some() && size.is_some()
        })?;
        let digest = linked.or(etag).context("the server gives no ETag to check the file with")?;
        let digest = digest.trim_start_matches("W/").replace('"', "");
        if !is_hex(&digest, 64) && !is_hex(&digest, 40) {
            let what = "expected a SHA-256 or a git hash to check it with";
            return Err(anyhow!("the server gives it the ETag {digest:?}, {what}").into());
        }
        let commit = found_commit.context("the server does not say of which commit the file is")?;
        let size = size.and_then(|size| size.trim().parse().ok()).context("the server does not say how large it is")?;
        Ok(Remote { name: name.to_owned(), url, commit, digest: digest.to_lowercase(), size })
    }

    /// Of the files `wanted`, what the multi-token-prediction layer needs; the configuration and the index are got for that.
    fn with_mtp<'a>(
        &self,
        wanted: Vec<&'a str>,
        request: &Request,
        commit: &str,
        folder: &Path,
    ) -> anyhow::Result<Vec<&'a str>> {
        std::fs::create_dir_all(folder.join("blobs"))
            .with_context(|| format!("cannot write to the Hugging Face cache at {}", folder.display()))?;
        let text = |name: &str| -> anyhow::Result<String> {
            let in_words = |error: Failure| self.explain(error, request).context(format!("cannot get {name}"));
            let file = self.metadata(&request.repo, commit, name).map_err(in_words)?;
            ensure!(file.size <= MAX_LISTING_BYTES, "{name} has {}, which is no model's", bytes(file.size));
            self.fetch(&file, folder, &ProgressBar::hidden()).map_err(in_words)?;
            std::fs::read_to_string(file.blob(folder)).with_context(|| format!("cannot read {name}"))
        };
        ensure!(wanted.contains(&CONFIG), "{} has no {CONFIG}, so it is no model", request.repo);
        let index = wanted.contains(&INDEX).then(|| text(INDEX)).transpose()?;
        mtp_files(wanted, &text(CONFIG)?, index.as_deref()).with_context(|| format!("--mtp {}", request.repo))
    }

    /// Makes sure that a file is in the cache and is what its server says it is.
    fn fetch(&self, file: &Remote, folder: &Path, bar: &ProgressBar) -> Result<(), Failure> {
        let (blob, part) = (file.blob(folder), file.part(folder));
        if blob.symlink_metadata().is_ok() {
            bar.inc(file.size);
            return Ok(file.check(&blob)?);
        }
        let cannot_write = || format!("cannot write {}", part.display());
        let mut out = OpenOptions::new().append(true).create(true).open(&part).with_context(cannot_write)?;
        match out.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(anyhow!("another pull is getting the same file; wait for it").into());
            }
            // A file system without locks.
            Err(TryLockError::Error(_)) => {}
        }
        let mut have = out.metadata().with_context(cannot_write)?.len();
        if have > file.size {
            out.set_len(0).with_context(cannot_write)?;
            have = 0;
        }
        bar.inc(have);
        let (mut n_idle, mut n_slow) = (0, 0);
        while have < file.size {
            let before = have;
            let Err(error) = self.read_body(file, &mut have, &mut out, bar) else { continue };
            if !error.is_broken_off() {
                return Err(error);
            }
            n_idle = if have > before { 0 } else { n_idle + 1 };
            n_slow = if matches!(error, Failure::Slow) { n_slow + 1 } else { 0 };
            if n_idle == ATTEMPTS || n_slow == 2 {
                return Err(error);
            }
            let what = self.in_short(&error);
            tracing::info!("{} broke off ({what}); going on", file.name);
            std::thread::sleep(Duration::from_millis(100 << n_idle.min(6)));
        }
        out.sync_all().with_context(cannot_write)?;
        file.check(&part)?;
        std::fs::rename(&part, &blob).with_context(cannot_write)?;
        Ok(())
    }

    /// Appends what comes from `have` on, up to the end or until the connection breaks.
    fn read_body(&self, file: &Remote, have: &mut u64, out: &mut File, bar: &ProgressBar) -> Result<(), Failure> {
        let cannot_write = || format!("cannot write {}", file.name);
        let response = self.get(&file.url, Some(&format!("bytes={have}-")), |_| false)?;
        let expected = format!("bytes {have}-{}/{}", file.size - 1, file.size);
        match (response.status(), header(&response, "content-range")) {
            (StatusCode::PARTIAL_CONTENT, Some(found)) if found == expected => {}
            // The server does not continue: from the start.
            (StatusCode::OK, _) => {
                out.set_len(0).with_context(cannot_write)?;
                bar.set_position(bar.position().saturating_sub(*have));
                *have = 0;
            }
            (status, found) => {
                let found = found.unwrap_or_else(|| "no Content-Range".into());
                return Err(anyhow!("the server answers {status} with {found:?}, expected {expected:?}").into());
            }
        }
        let (start, before) = (Instant::now(), *have);
        let mut reader = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; 256 << 10];
        let is_slow = |have: u64| have - before < SLOWEST * start.elapsed().as_secs();
        loop {
            match reader.read(&mut buffer) {
                Ok(0) if *have < file.size => {
                    let broken = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the connection broke off");
                    return Err(Failure::Network(ureq::Error::Io(broken)));
                }
                Ok(0) => return Ok(()),
                Ok(n) if n as u64 > file.size - *have => {
                    return Err(anyhow!("the server sends more than the {} that it announced", bytes(file.size)).into());
                }
                Ok(n) => {
                    out.write_all(&buffer[..n]).with_context(cannot_write)?;
                    *have += n as u64;
                    bar.inc(n as u64);
                    if start.elapsed() > READ_TIMEOUT && is_slow(*have) {
                        return Err(Failure::Slow);
                    }
                }
                Err(_) if start.elapsed() >= READ_TIMEOUT && is_slow(*have) => return Err(Failure::Slow),
                Err(error) => return Err(Failure::Network(ureq::Error::Io(error))),
            }
        }
    }

    fn in_short(&self, failure: &Failure) -> String {
        match failure {
            Failure::Status(status) => format!("status {status}"),
            Failure::Network(error) => error.to_string(),
            Failure::Slow => format!("less than {SLOWEST} bytes a second"),
            Failure::Other(error) => format!("{error:#}"),
        }
    }

    /// A failure in words that help.
    fn explain(&self, failure: Failure, request: &Request) -> anyhow::Error {
        let server = self.endpoint.as_str().trim_end_matches('/');
        match failure {
            Failure::Other(error) => error,
            Failure::Status(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => anyhow!(
                "{server} does not give {} to everybody: accept its licence there, and set HF_TOKEN or run `hf auth login` \
                 (the same answer comes for models that do not exist)",
                request.repo
            ),
            Failure::Status(StatusCode::NOT_FOUND) => {
                anyhow!("{server} has no model {} with revision {}", request.repo, request.revision)
            }
            Failure::Network(ureq::Error::Protocol(_)) | Failure::Status(_) => {
                anyhow!("{server} did not answer as Hugging Face does: {}", self.in_short(&failure))
            }
            Failure::Network(_) | Failure::Slow => anyhow!(
                "cannot reach {server}: {}. Without a network, copy a model directory here and name it with --model; \
                 HF_ENDPOINT names a mirror; what has arrived is kept for the next try",
                self.in_short(&failure)
            ),
        }
    }
}

impl Remote {
    /// Compares a file with its digest, and removes it if it is another.
    fn check(&self, path: &Path) -> anyhow::Result<()> {
        let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let found_size = file.metadata()?.len();
        let found = if self.digest.len() == 64 {
            hash::<Sha256>(&mut file, b"")?
        } else {
            hash::<Sha1>(&mut file, format!("blob {found_size}\0").as_bytes())?
        };
        if found != self.digest {
            // What is wrong must not be found again.
            let _ = std::fs::remove_file(path);
            bail!(
                "{} arrived damaged ({found_size} of {} bytes, checksum {found}, expected {}) and was removed; pull again",
                self.name,
                self.size,
                self.digest
            );
        }
        Ok(())
    }
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

/// Runs `work` for every item in [`CONNECTIONS`] threads; results are in the order of the items. After an error nothing
/// more is begun.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> anyhow::Result<R> + Sync) -> anyhow::Result<Vec<R>> {
    let queue: Mutex<VecDeque<(usize, &T)>> = Mutex::new(items.iter().enumerate().collect());
    let results = Mutex::new(vec![]);
    let take = || queue.lock().ok()?.pop_front();
    std::thread::scope(|scope| {
        for _ in 0..CONNECTIONS.min(items.len()) {
            scope.spawn(|| {
                while let Some((i, item)) = take() {
                    let result = work(item);
                    if let (Err(_), Ok(mut queue)) = (&result, queue.lock()) {
                        queue.clear();
                    }
                    if let Ok(mut results) = results.lock() {
                        results.push((i, result));
                    }
                }
            });
        }
    });
    let mut results = results.into_inner().map_err(|_| anyhow!("a download panicked"))?;
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Refuses what the disk cannot hold, before anything is got, where the system tells how much that is.
#[cfg(not(unix))]
fn check_space(_: &Path, _: u64) -> anyhow::Result<()> {
    Ok(())
}

/// Refuses what the disk cannot hold, before anything is got.
#[cfg(unix)]
fn check_space(folder: &Path, missing: u64) -> anyhow::Result<()> {
    let Ok(disk) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    ensure!(
        missing <= free,
        "{} are to be got and {} are free at {}; make room, or set HF_HOME to a larger disk",
        bytes(missing),
        bytes(free),
        folder.display()
    );
    Ok(())
}

#[cfg(unix)]
use std::os::unix::fs::symlink;
#[cfg(windows)]
use std::os::windows::fs::symlink_file as symlink;

/// Makes `pointer` a link to a blob of the same repository, as other programs expect it.
fn link(pointer: &Path, blob: &Path, name: &str) -> anyhow::Result<()> {
    let up = "../".repeat(name.split('/').count() + 1);
    let target = PathBuf::from(up).join("blobs").join(blob.file_name().unwrap_or_default());
    let make = || {
        std::fs::create_dir_all(pointer.parent().unwrap_or(pointer))?;
        if std::fs::read_link(pointer).is_ok_and(|found| found == target) {
            return Ok(());
        }
        // Whatever was there is of an earlier, broken pull.
        if pointer.symlink_metadata().is_ok() {
            std::fs::remove_file(pointer)?;
        }
        symlink(&target, pointer)
    };
    make().with_context(|| format!("cannot write {}", pointer.display()))
}

fn hash<D: Digest>(file: &mut File, prefix: &[u8]) -> anyhow::Result<String> {
    let mut hasher = D::new_with_prefix(prefix);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Whether a name from the server stays below the folder it is joined to.
fn is_inside(name: &str) -> bool {
    !name.is_empty()
        && !name.contains('\\')
        && !name.chars().any(char::is_control)
        && PathBuf::from(name).components().all(|part| matches!(part, Component::Normal(_)))
}

fn is_hex(text: &str, n_digits: usize) -> bool {
    text.len() == n_digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn progress_bar() -> ProgressBar {
    let is_shown = std::io::stderr().is_terminal();
    let target = if is_shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(None, target);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:40} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(include: &[&str]) -> Request {
        let include = include.iter().map(|pattern| pattern.to_string()).collect();
        Request { repo: "a/b".into(), revision: "main".into(), include, metadata: false, mtp: false, quiet: false }
    }

    fn check(names: &[&str], include: &[&str], expected: Result<&[&str], &str>) {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        match (choose(&names, &request(include)), expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (found, expected) => panic!("{found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn only_what_a_model_needs() {
        let names = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.json", "q.gguf"];
        check(&names, &[], Ok(&["config.json", "model.safetensors"]));
        check(&names, &["*.gguf", "README.md"], Ok(&["README.md", "config.json", "model.safetensors", "q.gguf"]));
        check(&names, &["pytorch*"], Err("pytorch_model.bin is a pickle"));
        check(&["config.json", "pytorch_model.bin"], &[], Err("only pickles such as pytorch_model.bin"));
        check(&["config.json", "q.gguf"], &[], Err("--include GLOB"));
        check(&["config.json", "q.gguf"], &["q.gguf"], Ok(&["config.json", "q.gguf"]));
        for name in ["../x.json", "/etc/x.json", "a/../../x.json", "a\\..\\x.json", "", "./x.json"] {
            check(&[name, "model.safetensors"], &[], Err("outside the cache"));
        }
    }
}
