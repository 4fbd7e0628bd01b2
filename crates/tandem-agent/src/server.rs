//! The server that a client talks to: one that is there, or one that is started for it and stopped after it.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::Endpoint;
use crate::{AgentError, Options, write_private};

/// Between two looks at a server that loads.
const PAUSE: Duration = Duration::from_millis(100);
/// A server that takes longer to list its models hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// For a server to end answers that nobody waits for, in seconds, and to end itself.
const DRAIN_SECONDS: &str = "2";
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A server that is ready.
pub(crate) struct Server {
    endpoint: Endpoint,
    started: Option<Started>,
}

/// A process that ends when its standard input does: with this one, however that ends.
struct Started {
    child: Child,
    log: PathBuf,
}

/// The first answer of an address.
enum Found {
    Models(Vec<Model>),
    Loading,
    Nobody(String),
    NoKey,
    Other(String),
}

struct Model {
    name: String,
    context: Option<u64>,
    is_tandem: bool,
    /// Of a server with several: 0 in memory, 1 not yet, 2 one that cannot be loaded.
    effort: u8,
}

/// A signal that came while the server loaded, or a value.
type OrSignal<T> = Result<T, i32>;

impl Server {
    /// The server of the options, ready; `interrupted` gives the signals that came.
    pub(crate) fn find_or_start(
        options: &Options,
        folder: &Path,
        news: &mut dyn FnMut(&str),
        interrupted: &mut dyn FnMut() -> Option<i32>,
    ) -> Result<OrSignal<Server>, AgentError> {
        let usual = format!("http://127.0.0.1:{}", options.port);
        let url = options.url.as_deref().unwrap_or(&usual).trim_end_matches('/');
        let url = url.strip_suffix("/v1").unwrap_or(url).to_owned();
        let is_address =
            url::Url::parse(&url).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        if !is_address {
            return Err(AgentError::Url(url));
        }
        let key = options.api_key.clone();
        let must_be_there = options.url.is_some();
        let mut look = Look::at(&url, key.clone());
        let mut found = look.models();
        while let Found::Loading = found {
            look.tell(news);
            if let Some(signal) = interrupted() {
                return Ok(Err(signal));
            }
            std::thread::sleep(PAUSE);
            found = look.models();
        }
        let why = match found {
            Found::Models(models) if must_be_there || models.iter().any(|model| model.is_tandem) => {
                match choose(models, options.model.as_deref(), &url) {
                    Ok(model) => {
                        let endpoint = endpoint(url, key, model);
                        return Ok(Ok(Server { endpoint, started: None }));
                    }
                    Err(error) if must_be_there => return Err(error),
                    Err(error) => error.to_string(),
                }
            }
            Found::Models(_) | Found::Other(_) if !must_be_there => format!("{url} belongs to another program"),
            Found::NoKey if !must_be_there && key.is_none() => format!("the server at {url} wants a key"),
            Found::Nobody(why) if must_be_there => return Err(AgentError::Absent { url, why }),
            Found::Nobody(_) => format!("no server at {url}"),
            Found::NoKey => return Err(AgentError::Key(url)),
            Found::Other(what) => return Err(AgentError::NoServer { url, what }),
            Found::Models(_) | Found::Loading => unreachable!("both were looked at above"),
        };
        news(&format!("{why}; one is started for this run"));
        Server::start(options, folder, news, interrupted)
    }

    fn start(
        options: &Options,
        folder: &Path,
        news: &mut dyn FnMut(&str),
        interrupted: &mut dyn FnMut() -> Option<i32>,
    ) -> Result<OrSignal<Server>, AgentError> {
        let key = random_key()?;
        let key_file = folder.join("key.txt");
        write_private(&key_file, &key)?;
        let log = folder.join("serve.log");
        let sink = File::create(&log).map_err(AgentError::io(format!("write {}", log.display())))?;
        let mut arguments: Vec<OsString> = options.server.iter().skip(1).cloned().collect();
        arguments.extend(["--host", "127.0.0.1", "--port", "0", "--end-with-stdin"].map(OsString::from));
        arguments.extend(["--drain-timeout", DRAIN_SECONDS, "--api-key-file"].map(OsString::from));
        arguments.push(key_file.into());
        if let Some(model) = &options.model {
            arguments.extend(["--model".into(), model.into()]);
        }
        if let Some(context) = options.context {
            arguments.extend(["--context".into(), context.to_string().into()]);
        }
        let program = options.server.first().cloned().unwrap_or_default();
        let mut command = Command::new(&program);
        // A group of its own: the terminal's signals are the client's.
        command.args(&arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(sink).process_group(0);
        let child = command.spawn().map_err(AgentError::io(format!("start {}", program.display())))?;
        let mut started = Started { child, log };
        let mut look: Option<Look> = None;
        loop {
            if let Some(signal) = interrupted() {
                started.stop();
                return Ok(Err(signal));
            }
            if started.has_ended() {
                return Err(AgentError::Start(started.last_line()));
            }
            std::thread::sleep(PAUSE);
            look = look
                .or_else(|| started.address().map(|address| Look::at(&format!("http://{address}"), Some(key.clone()))));
            let Some(look) = &mut look else { continue };
            match look.models() {
                Found::Models(models) => {
                    // Its names are its own: the directory's, or those of its settings.
                    let model = choose(models, None, &look.url)?;
                    let endpoint = endpoint(look.url.clone(), Some(key), model);
                    return Ok(Ok(Server { endpoint, started: Some(started) }));
                }
                Found::Loading | Found::Nobody(_) => look.tell(news),
                Found::NoKey => return Err(AgentError::Key(look.url.clone())),
                Found::Other(what) => return Err(AgentError::NoServer { url: look.url.clone(), what }),
            }
        }
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Ends a server that was started; its last line if it had ended before.
    pub(crate) fn stop(mut self) -> Option<String> {
        let started = self.started.as_mut()?;
        if started.has_ended() {
            return Some(started.last_line());
        }
        started.stop();
        None
    }
}

impl Started {
    fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    fn text(&self) -> String {
        std::fs::read(&self.log).map_or(String::new(), |text| String::from_utf8_lossy(&text).into_owned())
    }

    /// Where it says that it listens.
    fn address(&self) -> Option<String> {
        let text = self.text();
        let line = text.lines().find_map(|line| line.strip_prefix("listening on "));
        line.and_then(|rest| rest.split(';').next()).map(str::to_owned)
    }

    /// The last line of its log, or its last error.
    fn last_line(&self) -> String {
        let text = self.text();
        let lines = || text.lines().filter(|line| !line.trim().is_empty());
        let line = lines().rev().find_map(|line| line.strip_prefix("error: ")).or_else(|| lines().next_back());
        line.unwrap_or("it said nothing").to_owned()
    }

    fn stop(&mut self) {
        // The end of its input.
        drop(self.child.stdin.take());
        let start = Instant::now();
        while start.elapsed() < END_TIMEOUT {
            if self.has_ended() {
                return;
            }
            std::thread::sleep(PAUSE / 5);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// On an error in between the server must not stay.
impl Drop for Started {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.stop();
        }
    }
}

/// Questions to one address.
struct Look {
    url: String,
    key: Option<String>,
    agent: ureq::Agent,
    /// The tenth of loading that was told last.
    told: Option<u64>,
}

impl Look {
    fn at(url: &str, key: Option<String>) -> Look {
        let mut config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(ANSWER_TIMEOUT));
        let parsed = url::Url::parse(url).ok();
        let is_local = match parsed.as_ref().and_then(url::Url::host) {
            Some(url::Host::Domain(name)) => name == "localhost",
            Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
            None => false,
        };
        if is_local {
            config = config.proxy(None);
        }
        Look { url: url.to_owned(), key, agent: config.build().into(), told: None }
    }

    fn get(&self, path: &str) -> Result<(u16, String), String> {
        let mut call = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            call = call.header("authorization", format!("Bearer {key}"));
        }
        let mut response = call.call().map_err(|error| error.to_string())?;
        let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        Ok((response.status().as_u16(), text))
    }

    fn models(&self) -> Found {
        let (status, text) = match self.get("/v1/models") {
            Ok(answer) => answer,
            Err(why) => return Found::Nobody(why),
        };
        match status {
            200 => {}
            503 => return Found::Loading,
            401 | 403 => return Found::NoKey,
            _ => return Found::Other(status.to_string()),
        }
        let list = serde_json::from_str::<Value>(&text).ok();
        let Some(list) = list.as_ref().and_then(|list| list["data"].as_array()) else {
            return Found::Other("no list of models".to_owned());
        };
        let models = list.iter().filter_map(|model| {
            Some(Model {
                name: model["id"].as_str()?.to_owned(),
                context: model["max_model_len"].as_u64(),
                is_tandem: model["owned_by"] == "tandem",
                effort: match model["state"].as_str() {
                    _ if !model["error"].is_null() => 2,
                    None | Some("loaded") => 0,
                    Some(_) => 1,
                },
            })
        });
        Found::Models(models.collect())
    }

    /// Tells how far loading is, at each tenth.
    fn tell(&mut self, news: &mut dyn FnMut(&str)) {
        let health = self.get("/health").ok().and_then(|(_, text)| serde_json::from_str::<Value>(&text).ok());
        let fraction = health.and_then(|health| health["progress"]["fraction"].as_f64()).unwrap_or(0.0);
        let tenth = (fraction * 10.0) as u64;
        if self.told.is_none_or(|told| told < tenth) {
            self.told = Some(tenth);
            news(&format!("the server loads its model: {} %", tenth * 10));
        }
    }
}

/// The model of this name, or of the last part of this path; if none is named the first, of several models the first in memory.
fn choose(models: Vec<Model>, asked: Option<&str>, url: &str) -> Result<Model, AgentError> {
    let listed: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    let Some(asked) = asked else {
        let error = || AgentError::NoServer { url: url.to_owned(), what: "an empty list".to_owned() };
        return models.into_iter().min_by_key(|model| model.effort).ok_or_else(error);
    };
    let last = Path::new(asked).file_name().and_then(|name| name.to_str());
    let place =
        listed.iter().position(|name| name == asked).or_else(|| listed.iter().position(|name| Some(&**name) == last));
    let error = || AgentError::Model { url: url.to_owned(), asked: asked.to_owned(), listed };
    let Some(place) = place else { return Err(error()) };
    models.into_iter().nth(place).ok_or_else(error)
}

fn endpoint(url: String, key: Option<String>, model: Model) -> Endpoint {
    Endpoint { url, key: key.unwrap_or_else(|| "none".to_owned()), model: model.name, context: model.context }
}

/// A key that nobody else on this machine knows.
fn random_key() -> Result<String, AgentError> {
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes)
        .map_err(|error| AgentError::io("make a key")(std::io::Error::other(error.to_string())))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_by_name_path_or_place() {
        let models = || {
            ["one", "org/two", "two"]
                .map(|name| Model { name: name.into(), context: None, is_tandem: true, effort: 0 })
                .into_iter()
                .collect()
        };
        for (asked, expected) in [
            (None, Some("one")),
            (Some("two"), Some("two")),
            (Some("org/two"), Some("org/two")),
            (Some("/models/two"), Some("two")),
            (Some("./one/"), Some("one")),
            (Some("three"), None),
            (Some(""), None),
            (Some(".."), None),
        ] {
            let found = choose(models(), asked, "http://x").map(|model| model.name);
            match expected {
                Some(name) => assert_eq!(found.expect(name), name, "{asked:?}"),
                None => {
                    let error = found.expect_err("none").to_string();
                    assert!(error.contains("it has one, org/two, two"), "{error}");
                }
            }
        }
        assert!(choose(vec![], None, "http://x").is_err());
        for (efforts, expected) in [([2, 1, 0], 2), ([2, 1, 1], 1), ([1, 0, 0], 1), ([2, 2, 2], 0)] {
            let model = |n: usize| Model { name: n.to_string(), context: None, is_tandem: true, effort: efforts[n] };
            let found = choose((0..3).map(model).collect(), None, "http://x").expect("one");
            assert_eq!(found.name, expected.to_string(), "{efforts:?}");
        }
    }
}
