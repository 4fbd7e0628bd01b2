//! The settings that each client gets for one run: arguments before the user's, variables, and files of a temporary folder.
//! Nothing here reads or writes a client's own configuration.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// A coding agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// Anthropic's Claude Code.
    Claude,
    /// OpenAI's Codex.
    Codex,
    /// OpenCode.
    OpenCode,
}

/// Milliseconds that a client waits for an answer: as long as a server works on one. A long prompt takes minutes.
const ANSWER_MS: u64 = 3_600_000;
/// Variable with the key for Codex, whose arguments everybody sees in the list of processes.
const CODEX_KEY: &str = "LOCAL_SERVER_API_KEY";

/// Variables that would lead Claude Code to another server, or give this one the user's credentials.
const CLAUDE_ELSEWHERE: [&str; 11] = [
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_CUSTOM_HEADERS",
    "ANTHROPIC_PROFILE",
    "ANTHROPIC_UNIX_SOCKET",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_USE_ANTHROPIC_AWS",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_GATEWAY",
    "CLAUDE_CODE_USE_MANTLE",
    "CLAUDE_CODE_USE_VERTEX",
];

/// Where a client finds its model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address without a path, such as `http://127.0.0.1:8000`.
    pub url: String,
    /// Key that the server wants; any text if it wants none.
    pub key: String,
    /// Name of the model.
    pub model: String,
    /// Tokens of its context, if the server says.
    pub context: Option<u64>,
}

/// What a client gets beside the user's arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// Arguments before the user's, so that the user's count more.
    pub arguments: Vec<OsString>,
    /// Variables to set, or to remove.
    pub variables: Vec<(&'static str, Option<OsString>)>,
    /// Files of the run's folder.
    pub files: Vec<(PathBuf, String)>,
}

impl Client {
    /// Every client.
    pub const ALL: [Client; 3] = [Client::Claude, Client::Codex, Client::OpenCode];

    /// Its name for people.
    pub fn title(self) -> &'static str {
        match self {
            Client::Claude => "Claude Code",
            Client::Codex => "Codex",
            Client::OpenCode => "OpenCode",
        }
    }

    /// Name of its program.
    pub fn program(self) -> &'static str {
        match self {
            Client::Claude => "claude",
            Client::Codex => "codex",
            Client::OpenCode => "opencode",
        }
    }

    /// Its package at npm.
    pub fn package(self) -> &'static str {
        match self {
            Client::Claude => "@anthropic-ai/claude-code",
            Client::Codex => "@openai/codex",
            Client::OpenCode => "opencode-ai",
        }
    }

    /// The settings for one run. `folder` is there for this run only; `inherited` finds variables of this process.
    pub fn setup(self, endpoint: &Endpoint, folder: &Path, inherited: impl Fn(&str) -> Option<OsString>) -> Setup {
        let mut setup = match self {
            Client::Claude => claude(endpoint, folder),
            Client::Codex => codex(endpoint),
            Client::OpenCode => opencode(endpoint, inherited("OPENCODE_CONFIG_CONTENT")),
        };
        // A proxy of the user's environment knows nothing of this machine's ports.
        for name in ["NO_PROXY", "no_proxy"] {
            let mut hosts = inherited(name).filter(|hosts| !hosts.is_empty()).unwrap_or_default();
            if !hosts.is_empty() {
                hosts.push(",");
            }
            hosts.push(host(&endpoint.url));
            setup.variables.push((name, Some(hosts)));
        }
        setup
    }
}

/// The host of an address.
fn host(address: &str) -> String {
    let url = url::Url::parse(address).ok();
    url.as_ref().and_then(url::Url::host_str).unwrap_or(address).trim_matches(['[', ']']).to_owned()
}

/// Variables, and the same in a file of settings: these count more than `env` in the user's settings files.
fn claude(endpoint: &Endpoint, folder: &Path) -> Setup {
    let mut env = vec![
        ("ANTHROPIC_BASE_URL", endpoint.url.clone()),
        ("ANTHROPIC_AUTH_TOKEN", endpoint.key.clone()),
        ("ANTHROPIC_MODEL", endpoint.model.clone()),
        ("API_TIMEOUT_MS", ANSWER_MS.to_string()),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1".to_owned()),
    ];
    // Names that the client uses by itself, for small tasks and for agents of its own.
    for name in [
        "ANTHROPIC_DEFAULT_FABLE_MODEL",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL",
        "ANTHROPIC_DEFAULT_OPUS_MODEL",
        "ANTHROPIC_DEFAULT_SONNET_MODEL",
        "ANTHROPIC_SMALL_FAST_MODEL",
        "CLAUDE_CODE_SUBAGENT_MODEL",
    ] {
        env.push((name, endpoint.model.clone()));
    }
    if let Some(context) = endpoint.context {
        // It is made for contexts of 200,000 tokens, and answers of 32,000.
        env.push(("CLAUDE_CODE_AUTO_COMPACT_WINDOW", context.to_string()));
        env.push(("CLAUDE_CODE_MAX_OUTPUT_TOKENS", largest_answer(context).to_string()));
    }
    let settings: serde_json::Map<String, Value> =
        env.iter().map(|(name, value)| ((*name).into(), json!(value))).collect();
    let file = folder.join("claude-settings.json");
    let mut variables: Vec<_> = env.into_iter().map(|(name, value)| (name, Some(OsString::from(value)))).collect();
    variables.extend(CLAUDE_ELSEWHERE.map(|name| (name, None)));
    Setup {
        arguments: vec!["--settings".into(), file.clone().into()],
        variables,
        files: vec![(file, json!({"env": settings, "model": endpoint.model}).to_string())],
    }
}

/// Overrides of single settings; each value is TOML.
fn codex(endpoint: &Endpoint) -> Setup {
    let provider = format!(
        "{{name = \"Tandem\", base_url = {}, wire_api = \"responses\", env_key = \"{CODEX_KEY}\", \
         requires_openai_auth = false, stream_idle_timeout_ms = {ANSWER_MS}}}",
        toml_string(&format!("{}/v1", endpoint.url))
    );
    let mut settings = vec![
        format!("model_providers.tandem={provider}"),
        "model_provider=\"tandem\"".to_owned(),
        format!("model={}", toml_string(&endpoint.model)),
    ];
    settings.extend(endpoint.context.map(|context| format!("model_context_window={context}")));
    Setup {
        arguments: settings.into_iter().flat_map(|setting| ["-c".into(), setting.into()]).collect(),
        variables: vec![(CODEX_KEY, Some(endpoint.key.clone().into()))],
        files: vec![],
    }
}

/// A configuration in a variable, put into the one that is there already.
fn opencode(endpoint: &Endpoint, inherited: Option<OsString>) -> Setup {
    let mut model = json!({"name": endpoint.model});
    if let Some(context) = endpoint.context {
        model["limit"] = json!({"context": context, "output": largest_answer(context)});
    }
    let options = json!({"baseURL": format!("{}/v1", endpoint.url), "apiKey": endpoint.key, "timeout": ANSWER_MS});
    let mut models = serde_json::Map::new();
    models.insert(endpoint.model.clone(), model);
    let provider = json!({"npm": "@ai-sdk/openai-compatible", "name": "Tandem", "options": options, "models": models});
    let inherited = inherited.and_then(|text| serde_json::from_str::<Value>(text.to_str()?).ok());
    let mut config = inherited.filter(Value::is_object).unwrap_or_else(|| json!({}));
    if !config["provider"].is_object() {
        config["provider"] = json!({});
    }
    config["provider"]["tandem"] = provider;
    for name in ["model", "small_model"] {
        config[name] = json!(format!("tandem/{}", endpoint.model));
    }
    Setup {
        arguments: vec![],
        variables: vec![("OPENCODE_CONFIG_CONTENT", Some(config.to_string().into()))],
        files: vec![],
    }
}

/// Tokens of an answer that leave most of the context to the prompt.
fn largest_answer(context: u64) -> u64 {
    (context / 4).clamp(1, 32_000)
}

/// A string as TOML has it, on one line. JSON escapes what TOML does, but for the character DEL.
fn toml_string(text: &str) -> String {
    json!(text).to_string().replace('\u{7f}', "\\u007F")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(model: &str, context: Option<u64>) -> Endpoint {
        Endpoint { url: "http://127.0.0.1:8000".into(), key: "secret".into(), model: model.into(), context }
    }

    fn value(setup: &Setup, name: &str) -> Option<String> {
        let found = setup.variables.iter().find(|(variable, _)| *variable == name);
        found.and_then(|(_, value)| value.clone()).map(|value| value.into_string().expect("UTF-8"))
    }

    #[test]
    fn names_of_any_kind_reach_every_client_whole() {
        for model in
            ["fable", "org/name", "a b", "say \"hi\"", "back\\slash", "τ→∞", "x=y,z", "quote'", "\u{7f}tab\t", "{}"]
        {
            let folder = Path::new("/run/folder");
            for client in Client::ALL {
                let setup = client.setup(&endpoint(model, Some(65_536)), folder, |_| None);
                let said = match client {
                    Client::Claude => {
                        let settings: Value = serde_json::from_str(&setup.files[0].1).expect("JSON");
                        assert_eq!(settings["env"]["ANTHROPIC_DEFAULT_HAIKU_MODEL"], model);
                        assert_eq!(settings["model"], model);
                        value(&setup, "ANTHROPIC_MODEL").expect("set")
                    }
                    Client::Codex => {
                        let setting = setup.arguments[5].to_str().expect("UTF-8").to_owned();
                        toml_value(&setting)["model"].as_str().expect("a string").to_owned()
                    }
                    Client::OpenCode => {
                        let config: Value =
                            serde_json::from_str(&value(&setup, "OPENCODE_CONFIG_CONTENT").expect("set"))
                                .expect("JSON");
                        let models = config["provider"]["tandem"]["models"].as_object().expect("models");
                        assert_eq!(config["model"], format!("tandem/{model}"));
                        models.keys().next().expect("a model").clone()
                    }
                };
                assert_eq!(said, model, "{client:?}");
            }
        }
    }

    fn toml_value(text: &str) -> toml::Table {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn codex_settings_are_toml_without_the_key() {
        let setup = Client::Codex.setup(&endpoint("fable", Some(4096)), Path::new("/x"), |_| None);
        let words: Vec<&str> = setup.arguments.iter().map(|word| word.to_str().expect("UTF-8")).collect();
        assert!(words.iter().step_by(2).all(|word| *word == "-c"), "{words:?}");
        let all = words.iter().skip(1).step_by(2).copied().collect::<Vec<_>>().join("\n");
        let table = toml_value(&all);
        let provider = &table["model_providers"]["tandem"];
        assert_eq!(provider["base_url"].as_str(), Some("http://127.0.0.1:8000/v1"));
        assert_eq!((table["model_provider"].as_str(), table["model"].as_str()), (Some("tandem"), Some("fable")));
        assert_eq!(table["model_context_window"].as_integer(), Some(4096));
        assert!(!all.contains("secret"), "{all}");
        assert_eq!(value(&setup, provider["env_key"].as_str().expect("named")), Some("secret".into()));
    }

    #[test]
    fn no_key_is_among_arguments() {
        for client in Client::ALL {
            let setup = client.setup(&endpoint("fable", None), Path::new("/x"), |_| None);
            assert!(setup.arguments.iter().all(|word| !word.to_string_lossy().contains("secret")), "{client:?}");
        }
    }

    #[test]
    fn claude_is_led_nowhere_else() {
        let setup = Client::Claude.setup(&endpoint("fable", Some(8192)), Path::new("/run"), |_| None);
        for name in CLAUDE_ELSEWHERE {
            assert!(setup.variables.contains(&(name, None)), "{name}");
        }
        assert_eq!(value(&setup, "CLAUDE_CODE_AUTO_COMPACT_WINDOW"), Some("8192".into()));
        assert_eq!(value(&setup, "CLAUDE_CODE_MAX_OUTPUT_TOKENS"), Some("2048".into()));
        assert!(setup.variables.iter().all(|(name, _)| *name != "CLAUDE_CONFIG_DIR" && *name != "HOME"));
    }

    #[test]
    fn what_opencode_has_in_its_variable_stays() {
        for (before, theme) in [
            (None, Value::Null),
            (Some("not JSON"), Value::Null),
            (Some("[1]"), Value::Null),
            (Some(r#"{"theme": "dark", "model": "other/x", "provider": {"other": {}}}"#), json!("dark")),
            (Some(r#"{"theme": "dark", "provider": 3}"#), json!("dark")),
        ] {
            let setup = Client::OpenCode.setup(&endpoint("fable", None), Path::new("/x"), |name| {
                before.filter(|_| name == "OPENCODE_CONFIG_CONTENT").map(OsString::from)
            });
            let text = value(&setup, "OPENCODE_CONFIG_CONTENT").expect("set");
            let config: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!((&config["theme"], &config["model"]), (&theme, &json!("tandem/fable")), "{before:?}");
            assert_eq!(config["provider"]["tandem"]["options"]["apiKey"], "secret");
            assert_eq!(config["provider"]["other"].is_object(), before.is_some_and(|text| text.contains("other\"")));
        }
    }

    #[test]
    fn proxies_are_told_of_this_machine() {
        for (url, before, after) in [
            ("http://127.0.0.1:8000", None, "127.0.0.1"),
            ("http://127.0.0.1:8000", Some(""), "127.0.0.1"),
            ("http://gpu.example:1", Some("a,b"), "a,b,gpu.example"),
            ("http://[::1]:8000", None, "::1"),
        ] {
            let endpoint = Endpoint { url: url.into(), ..endpoint("fable", None) };
            let setup = Client::Codex.setup(&endpoint, Path::new("/x"), |name| {
                before.filter(|_| name.eq_ignore_ascii_case("no_proxy")).map(OsString::from)
            });
            assert_eq!(
                (value(&setup, "NO_PROXY"), value(&setup, "no_proxy")),
                (Some(after.into()), Some(after.into()))
            );
        }
    }
}
