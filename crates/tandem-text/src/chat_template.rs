//! Chat templates: Jinja as `transformers` renders it, on minijinja.
//!
//! Owns finding a template, the differences between minijinja and Hugging Face's Jinja environment
//! (`transformers/utils/chat_template_utils.py`), and error messages. It deliberately does not tokenise the result and
//! does not interpret messages: they reach the template as they came.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value as JinjaValue};
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::dialect::{Dialect, deepseek_v32};
use crate::reasoning::ReasoningControls;
use crate::tokenizer::{SPECIAL_TOKENS, TokenizerError, content_of, read_tokenizer_config, token_text};
use crate::{exact, jinja};

/// Why a chat template could not be loaded or rendered.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// A template file is unreadable.
    #[error(
        "cannot read the chat template {path}: {source}; check the path, or name another with --chat-template FILE",
        path = path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// `tokenizer_config.json` is unreadable.
    #[error(transparent)]
    Config(#[from] TokenizerError),
    /// `chat_template` in `tokenizer_config.json` has a shape that Hugging Face does not define.
    #[error("{path}: {cause}; name a template with --chat-template FILE", path = path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The template is not valid Jinja.
    #[error(
        "chat template, line {line}: syntax error: {cause}; fix it, or name another template with --chat-template FILE"
    )]
    Syntax {
        /// 1-based line in the template.
        line: usize,
        /// The parser's words.
        cause: String,
    },
    /// The template called `raise_exception`: it does not accept this conversation.
    #[error(
        "chat template, line {line}: the template refused the conversation: \"{cause}\"; \
         change the messages, or name another template with --chat-template FILE"
    )]
    Refused {
        /// 1-based line in the template.
        line: usize,
        /// The template's own message.
        cause: String,
    },
    /// The model's own encoding, which stands in for a template, has no place for this conversation.
    #[error("the chat format {format} refused the conversation: {cause}; change the messages")]
    Encoding {
        /// Its name.
        format: &'static str,
        /// What is wrong with the messages.
        cause: String,
    },
    /// The template failed while rendering.
    #[error("chat template, line {line}: \"{cause}\"; fix the template, or name another with --chat-template FILE")]
    Render {
        /// 1-based line in the template.
        line: usize,
        /// The engine's words.
        cause: String,
    },
}

/// The special tokens that a template may name, as transformers passes them (`bos_token`, `eos_token`, ...,
/// `additional_special_tokens`, and those that only this model has); absent ones are undefined.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TemplateTokens(Vec<(String, Value)>);

impl TemplateTokens {
    /// Reads the tokens of a `tokenizer_config.json` (each a string, or an object with `content`).
    pub fn from_config(config: &Map<String, Value>) -> Self {
        let mut tokens = vec![];
        let named = config.get("extra_special_tokens").and_then(Value::as_object);
        let models_own =
            named.into_iter().flat_map(|map| map.keys().filter_map(|key| Some((key, token_text(map, key)?))));
        tokens.extend(models_own.map(|(key, token)| (key.clone(), Value::String(token))));
        for key in SPECIAL_TOKENS {
            tokens.extend(token_text(config, key).map(|token| (key.to_owned(), Value::String(token))));
        }
        let list = config.get("additional_special_tokens").and_then(Value::as_array);
        let texts = list.map(|list| list.iter().filter_map(content_of).map(Value::String).collect());
        tokens.extend(texts.map(|texts| ("additional_special_tokens".into(), Value::Array(texts))));
        Self(tokens)
    }
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// A compiled chat template, with the variant for tools where the model has one; or an encoding that stands in for one.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: TemplateTokens,
    /// Name and source of each variant, the default one first.
    variants: Vec<(String, String)>,
    /// As they came, all variants.
    source: String,
    /// Prompts are written by this dialect, not by a template.
    built_in: Option<Dialect>,
    controls: OnceLock<ReasoningControls>,
    /// It takes the arguments of calls as JSON text, and fails on objects.
    wants_text: OnceLock<bool>,
    wants_null: OnceLock<bool>,
}

impl ChatTemplate {
    /// Compiles one template.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`] when it is not valid Jinja.
    pub fn new(source: &str, tokens: TemplateTokens) -> Result<Self, TemplateError> {
        let mut template = Self { tokens, ..Self::empty() };
        template.add(DEFAULT, source)?;
        Ok(template)
    }

    /// The encoding of a dialect whose checkpoints have no template; `None` for those that have one.
    pub fn built_in(dialect: Dialect) -> Option<Self> {
        let has_encoding = match dialect {
            Dialect::DeepSeekV32 => true,
            Dialect::DeepSeekV3 | Dialect::DeepSeekV31 | Dialect::Glm | Dialect::Hermes | Dialect::Llama3 => false,
        };
        has_encoding.then(|| Self { built_in: Some(dialect), ..Self::empty() })
    }

    fn empty() -> Self {
        Self {
            environment: environment(),
            tokens: TemplateTokens::default(),
            variants: vec![],
            source: String::new(),
            built_in: None,
            controls: OnceLock::new(),
            wants_text: OnceLock::new(),
            wants_null: OnceLock::new(),
        }
    }

    /// Whether it is an encoding of ours.
    pub fn is_built_in(&self) -> bool {
        self.built_in.is_some()
    }

    /// What it lets a client say about reasoning.
    pub fn reasoning(&self) -> &ReasoningControls {
        self.controls.get_or_init(|| ReasoningControls::of(self))
    }

    /// Finds a model's template: `explicit`, else `chat_template.jinja` and `additional_chat_templates/*.jinja`, else
    /// `chat_template.json`, else `chat_template` of `tokenizer_config.json` (a string, or a list of named templates). Of
    /// several, `default` and, for tools, `tool_use` are taken. `None` when the model has no template.
    ///
    /// # Errors
    /// When a file is unreadable or malformed, or the template is not valid Jinja.
    pub fn from_dir(dir: &Path, explicit: Option<&Path>) -> Result<Option<Self>, TemplateError> {
        Self::from_config(dir, explicit, &read_tokenizer_config(dir)?)
    }

    /// [`ChatTemplate::from_dir`] for who has read the directory's `tokenizer_config.json`.
    pub(crate) fn from_config(
        dir: &Path,
        explicit: Option<&Path>,
        config: &Map<String, Value>,
    ) -> Result<Option<Self>, TemplateError> {
        let tokens = TemplateTokens::from_config(config);
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| TemplateError::Read { path: path.to_owned(), source })
        };
        if let Some(path) = explicit {
            return Self::new(&read(path)?, tokens).map(Some);
        }
        let mut named: Vec<(String, String)> = vec![];
        let path = dir.join("chat_template.jinja");
        if path.exists() {
            named.push((DEFAULT.into(), read(&path)?));
        }
        for entry in std::fs::read_dir(dir.join("additional_chat_templates")).into_iter().flatten().flatten() {
            let path = entry.path();
            if let (Some("jinja"), Some(name)) =
                (path.extension().and_then(|e| e.to_str()), path.file_stem().and_then(|name| name.to_str()))
            {
                named.push((name.to_owned(), read(&path)?));
            }
        }
        if !named.is_empty() {
            let path = dir.join("additional_chat_templates");
            return Self::of_variants(named, tokens, &path).map(Some);
        }
        let path = dir.join("chat_template.json");
        let (path, value) = if path.exists() {
            let shape = |cause: String| TemplateError::Shape { path: path.clone(), cause };
            let value: Map<String, Value> = serde_json::from_str(&read(&path)?)
                .map_err(|error| shape(format!("not an object of JSON ({error})")))?;
            let value = value.get("chat_template").cloned();
            (path, value)
        } else {
            (dir.join("tokenizer_config.json"), config.get("chat_template").cloned())
        };
        let shape = |cause: String| TemplateError::Shape { path: path.clone(), cause };
        match value {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(source)) => Self::new(&source, tokens).map(Some),
            Some(Value::Array(list)) => {
                let text = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                let variant = |entry: &Value| Some((text(entry, "name")?, text(entry, "template")?));
                let named: Option<Vec<(String, String)>> = list.iter().map(variant).collect();
                let named =
                    named.ok_or_else(|| shape("chat_template has an entry without name and template".into()))?;
                Self::of_variants(named, tokens, &path).map(Some)
            }
            Some(Value::Object(map)) => {
                let variant = |(name, source): (&String, &Value)| Some((name.clone(), source.as_str()?.to_owned()));
                let named: Option<Vec<(String, String)>> = map.iter().map(variant).collect();
                let named = named.ok_or_else(|| shape("chat_template has a variant that is no text".into()))?;
                Self::of_variants(named, tokens, &path).map(Some)
            }
            Some(_) => Err(shape("chat_template is neither a string nor a list of {name, template}".into())),
        }
    }

    /// The variants that Tandem chooses from; the first of equal names counts.
    fn of_variants(named: Vec<(String, String)>, tokens: TemplateTokens, path: &Path) -> Result<Self, TemplateError> {
        let find = |name: &str| named.iter().find(|(n, _)| n == name).map(|(_, source)| source);
        let default = find(DEFAULT).ok_or_else(|| {
            let names: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
            let cause = format!("chat_template lists {names:?}, none of them \"default\"");
            TemplateError::Shape { path: path.to_owned(), cause }
        })?;
        let mut template = Self::new(default, tokens)?;
        if let Some(source) = find(TOOL_USE) {
            template.add(TOOL_USE, source)?;
        }
        Ok(template)
    }

    /// Renders a conversation. `extra` are further template variables (`enable_thinking`, ...) and win over all others.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] when the template raises, [`TemplateError::Render`] when it fails.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, TemplateError> {
        if let Some(dialect) = self.built_in {
            let is_on = |name: &str| extra.get(name).and_then(Value::as_bool);
            let adds_prompt = is_on("add_generation_prompt").unwrap_or(add_generation_prompt);
            let is_thinking = ["thinking", "enable_thinking"].iter().any(|name| is_on(name) == Some(true));
            return deepseek_v32::render(messages, tools.unwrap_or_default(), is_thinking, adds_prompt)
                .map_err(|cause| TemplateError::Encoding { format: dialect.name(), cause });
        }
        let has_calls = messages.iter().any(|message| message["tool_calls"].is_array());
        if has_calls && *self.wants_text.get_or_init(|| self.fails_on_objects()) {
            let messages: Vec<Value> = messages.iter().map(with_text_arguments).collect();
            return self.render_jinja(&messages, tools, add_generation_prompt, extra);
        }
        self.render_jinja(messages, tools, add_generation_prompt, extra)
    }

    /// Whether the template needs the arguments of calls as text: DeepSeek's add them to other texts.
    fn fails_on_objects(&self) -> bool {
        let messages = one_call(&json!(""));
        let renders = |messages: &[Value]| self.render_jinja(messages, None, true, &Map::new()).is_ok();
        !renders(&messages) && renders(&messages.each_ref().map(with_text_arguments))
    }

    /// Whether the template writes an answer's calls only if its content is null, and drops them beside an empty text, as
    /// DeepSeek-V3's and R1's do.
    pub(crate) fn drops_calls_beside_text(&self) -> bool {
        let shows_call = |content: &Value| {
            self.render(&one_call(content), None, true, &Map::new()).is_ok_and(|text| text.contains(PROBE))
        };
        *self.wants_null.get_or_init(|| !shows_call(&json!("")) && shows_call(&Value::Null))
    }

    fn render_jinja(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, TemplateError> {
        // Hugging Face passes tools and documents always: they are defined, and none.
        let mut variables: Vec<(&str, JinjaValue)> = vec![
            ("messages", JinjaValue::from_serialize(messages)),
            ("tools", tools.map_or(JinjaValue::from(()), JinjaValue::from_serialize)),
            ("documents", JinjaValue::from(())),
            ("add_generation_prompt", add_generation_prompt.into()),
        ];
        let tokens = self.tokens.0.iter();
        variables.extend(tokens.map(|(name, token)| (name.as_str(), JinjaValue::from_serialize(token))));
        variables.extend(extra.iter().map(|(name, value)| (name.as_str(), JinjaValue::from_serialize(value))));
        let tool_use = self.variants.iter().find(|(name, _)| tools.is_some() && name == TOOL_USE);
        let Some((_, source)) = tool_use.or(self.variants.first()) else { return Ok(String::new()) };
        let root = variables.into_iter().collect::<JinjaValue>();
        jinja::render(&self.environment, source, root, render_error).map(exact::unmarked)
    }

    /// Text of the template, its variants one after the other; nothing if the encoding is ours.
    pub fn source(&self) -> &str {
        &self.source
    }

    fn add(&mut self, name: &str, source: &str) -> Result<(), TemplateError> {
        self.source.push_str(source);
        // Jinja2's lexer makes one kind of line end of all.
        let source = replace_generation_tags(&source.replace("\r\n", "\n").replace('\r', "\n"));
        jinja::check(&source, |error| {
            let cause = describe(error);
            let cause = cause.strip_prefix("syntax error: ").unwrap_or(&cause).to_string();
            TemplateError::Syntax { line: error.line().unwrap_or(1), cause }
        })?;
        self.variants.push((name.to_owned(), source));
        Ok(())
    }
}

/// Name of a function that no template speaks of.
const PROBE: &str = "qzprobe";

/// A conversation with one call, in an answer of this content.
fn one_call(content: &Value) -> [Value; 3] {
    let call = json!({"id": "call00000", "type": "function", "function": {"name": PROBE, "arguments": {"a": "b"}}});
    [
        json!({"role": "user", "content": "hi"}),
        json!({"role": "assistant", "content": content, "tool_calls": [call]}),
        json!({"role": "tool", "tool_call_id": "call00000", "name": PROBE, "content": "ok"}),
    ]
}

/// The message with the arguments of its calls as JSON text.
fn with_text_arguments(message: &Value) -> Value {
    let mut message = message.clone();
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments").filter(|arguments| arguments.is_object()) else {
            continue;
        };
        if let Ok(text) = json_dumps(arguments) {
            *arguments = Value::String(text);
        }
    }
    message
}

/// The message of a `raise_exception` call, carried through minijinja as an error source.
#[derive(Debug, Error)]
#[error("{0}")]
struct Raised(String);

fn render_error(error: &Error) -> TemplateError {
    let mut line = error.line();
    let mut cause = describe(error);
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(raised) = inner.downcast_ref::<Raised>() {
            return TemplateError::Refused { line: line.unwrap_or(1), cause: raised.0.clone() };
        }
        if let Some(inner) = inner.downcast_ref::<Error>() {
            line = inner.line().or(line);
            cause = describe(inner);
        }
        source = inner.source();
    }
    TemplateError::Render { line: line.unwrap_or(1), cause }
}

fn describe(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Hugging Face's environment: trim_blocks, lstrip_blocks, loop controls, Python methods, its `tojson`, no escaping.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python_method);
    environment.set_formatter(|out, _state, value| match value.as_str() {
        Some(text) => {
            jinja::charge(text.len())?;
            out.write_str(text).map_err(Error::from)
        }
        None => out.write_str(&jinja::text(value)?).map_err(Error::from),
    });
    jinja::set_up(&mut environment);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", jinja::text);
    // In Python strings and dicts have a length and items.
    environment.add_test("sequence", |value: &JinjaValue| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_test("iterable", |value: &JinjaValue| {
        value.kind() == ValueKind::String || (!value.is_none() && value.try_iter().is_ok())
    });
    environment.add_function("raise_exception", |message: String| -> Result<JinjaValue, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        let mut text = String::new();
        write!(text, "{}", chrono::Local::now().format(format))
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}")))?;
        Ok(text)
    });
    environment
}

/// Python methods beyond those of minijinja-contrib.
fn python_method(state: &State, value: &JinjaValue, method: &str, args: &[JinjaValue]) -> Result<JinjaValue, Error> {
    if let Some(text) = value.as_str() {
        // Every method looks at all of it.
        jinja::charge(if text.len() < 256 { 0 } else { text.len() })?;
        if method == "format" {
            jinja::check_format(text, args)?;
        }
        if let Some(result) = text_method(text, method, args) {
            return result;
        }
    }
    if let (Some(text), [argument]) = (value.as_str(), args)
        && let Some(argument) = argument.as_str()
    {
        match method {
            "removeprefix" => return Ok(text.strip_prefix(argument).unwrap_or(text).into()),
            "removesuffix" => return Ok(text.strip_suffix(argument).unwrap_or(text).into()),
            "partition" | "rpartition" => {
                let parts = if method == "partition" { text.split_once(argument) } else { text.rsplit_once(argument) };
                let parts = match (parts, method) {
                    (Some((before, after)), _) => [before, argument, after],
                    (None, "partition") => [text, "", ""],
                    (None, _) => ["", "", text],
                };
                return Ok(parts.into_iter().map(JinjaValue::from).collect());
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Methods of Python's strings; `None` for those that are elsewhere.
fn text_method(text: &str, method: &str, args: &[JinjaValue]) -> Option<Result<JinjaValue, Error>> {
    let word = |i: usize| args.get(i).and_then(JinjaValue::as_str);
    let count = |i: usize| args.get(i).and_then(|count| i64::try_from(count.clone()).ok());
    let fill = || word(1).and_then(|fill| fill.chars().next()).unwrap_or(' ');
    let width = || args.first().and_then(JinjaValue::as_usize).unwrap_or(0);
    let missing = || Err(jinja::failed(format!("str.{method}: substring not found")));
    let place = |at: Option<usize>| at.map(|at| Ok(text[..at].chars().count().into()));
    Some(match method {
        "rsplit" => {
            let max = count(1).and_then(|max| usize::try_from(max).ok()).unwrap_or(usize::MAX);
            let mut parts: Vec<&str> = match word(0) {
                Some("") => return Some(Err(jinja::failed("empty separator"))),
                Some(separator) => text.rsplitn(max.saturating_add(1), separator).collect(),
                None => {
                    let (mut parts, mut rest) = (vec![], text.trim_end_matches(jinja::is_python_space));
                    while !rest.is_empty() && parts.len() < max {
                        let (before, word) = rest.rsplit_once(jinja::is_python_space).unwrap_or(("", rest));
                        parts.push(word);
                        rest = before.trim_end_matches(jinja::is_python_space);
                    }
                    parts.extend((!rest.trim_start_matches(jinja::is_python_space).is_empty()).then_some(rest));
                    parts
                }
            };
            parts.reverse();
            Ok(parts.into_iter().map(JinjaValue::from).collect())
        }
        "replace" => match (word(0), word(1)) {
            (Some(old), Some(new)) => jinja::replace(text, old, new, count(2)),
            _ => return None,
        },
        "join" => jinja::join_method(text, args.first()?),
        "ljust" => jinja::pad(text, width(), fill(), jinja::Side::Right),
        "rjust" => jinja::pad(text, width(), fill(), jinja::Side::Left),
        "center" => jinja::pad(text, width(), fill(), jinja::Side::Both),
        "zfill" => {
            let (sign, digits) = match text.strip_prefix(['-', '+']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            let padded = jinja::pad(digits, width().saturating_sub(sign.len()), '0', jinja::Side::Left);
            padded.map(|padded| format!("{sign}{}", padded.as_str().unwrap_or_default()).into())
        }
        "index" => return Some(place(text.find(word(0)?)).unwrap_or_else(missing)),
        "rindex" => return Some(place(text.rfind(word(0)?)).unwrap_or_else(missing)),
        "casefold" => Ok(text.to_lowercase().into()),
        "swapcase" => {
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Ok(text.chars().map(swap).collect::<String>().into())
        }
        "isdigit" | "isdecimal" | "isnumeric" => Ok((!text.is_empty()
            && text.chars().all(|c| c.is_numeric() && (method != "isdecimal" || c.is_ascii_digit())))
        .into()),
        "istitle" => {
            let (mut cased, mut found) = (false, false);
            let fits = text.chars().all(|c| {
                let fits = if c.is_uppercase() { !cased } else { !c.is_lowercase() || cased };
                cased = c.is_uppercase() || c.is_lowercase();
                found |= cased;
                fits
            });
            Ok((fits && found).into())
        }
        _ => return None,
    })
}

/// `transformers`' tojson: `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(value: &JinjaValue, positional_ascii: Option<bool>, options: Kwargs) -> Result<String, Error> {
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.or(positional_ascii).unwrap_or(false);
    let indent = match options.get::<Option<JinjaValue>>("indent")? {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(n_spaces)) if n_spaces <= 64 => " ".repeat(n_spaces),
            _ => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: bad indent {indent}"))),
        }),
    };
    let (item_separator, key_separator) = match options.get::<Option<Vec<String>>>("separators")? {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(separators) => <[String; 2]>::try_from(separators)
            .map(|[item, key]| (item, key))
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair of strings"))?,
    };
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer =
        JsonWriter { out: String::new(), ensure_ascii, indent, item_separator, key_separator, sort_keys, depth: 0 };
    writer.value(value)?;
    jinja::charge(writer.out.len())?;
    Ok(writer.out)
}

/// A value as Python's `json.dumps` writes it, letters of all languages as they are.
pub(crate) fn json_dumps(value: &Value) -> Result<String, Error> {
    let mut writer = JsonWriter {
        out: String::new(),
        ensure_ascii: false,
        indent: None,
        item_separator: ", ".to_owned(),
        key_separator: ": ".to_owned(),
        sort_keys: false,
        depth: 0,
    };
    writer.value(&JinjaValue::from_serialize(value))?;
    Ok(writer.out)
}

/// Python's `json.dumps`.
struct JsonWriter {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    depth: usize,
}

impl JsonWriter {
    fn value(&mut self, value: &JinjaValue) -> Result<(), Error> {
        jinja::check_depth(&self.out, self.depth)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number_text(value)),
            ValueKind::String => {
                let text = value.as_str().unwrap_or_default();
                match exact::number(text) {
                    Some(digits) => self.out.push_str(digits),
                    None => self.string(text),
                }
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<JinjaValue> = value.try_iter()?.collect();
                self.container('[', ']', &items, |writer, item| writer.value(item))?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    let text = match key.kind() {
                        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                        ValueKind::Number => number_text(&key),
                        ValueKind::Bool => key.to_string(),
                        ValueKind::None => "null".into(),
                        kind => return Err(not_serializable(kind)),
                    };
                    entries.push((text, item));
                }
                if self.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container('{', '}', &entries, |writer, (key, item)| {
                    writer.string(key);
                    let separator = std::mem::take(&mut writer.key_separator);
                    writer.out.push_str(&separator);
                    writer.key_separator = separator;
                    writer.value(item)
                })?;
            }
            kind => return Err(not_serializable(kind)),
        }
        Ok(())
    }

    fn container<T>(
        &mut self,
        open: char,
        close: char,
        items: &[T],
        mut write_item: impl FnMut(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        self.depth += 1;
        for (item_idx, item) in items.iter().enumerate() {
            if item_idx > 0 {
                self.out.push_str(&self.item_separator);
            }
            self.line_break();
            write_item(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.line_break();
        }
        self.out.push(close);
        Ok(())
    }

    fn line_break(&mut self) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn not_serializable(kind: ValueKind) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a value of type {kind} is not JSON serializable"))
}

/// A number as Python's `json.dumps` and `repr` write it.
pub(crate) fn number_text(value: &JinjaValue) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => float_text(float),
        _ => value.to_string(),
    }
}

/// Python's `float.__repr__`: shortest digits, scientific below 1e-4 and from 1e16 on.
fn float_text(float: f64) -> String {
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{float:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(-4..16) => {
            let plain = format!("{float}");
            if plain.contains('.') { plain } else { format!("{plain}.0") }
        }
        Ok(exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
        }
        Err(_) => scientific,
    }
}

/// Replaces transformers' `{% generation %}` blocks, which only mark spans for training, by neutral ones: an `if true`
/// keeps line numbers and whitespace control as they are.
fn replace_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        out.push_str(&rest[..start]);
        let tag = &rest[start..];
        let Some(length) = tag[2..].find("%}").map(|end| end + 4) else {
            rest = tag;
            break;
        };
        let inner = &tag[2..length - 2];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" | "endgeneration" => {
                let replacement = if word == "generation" { " if true " } else { " endif " };
                let is_mark = |c: char| c == '-' || c == '+';
                let open: String = inner.chars().next().filter(|&c| is_mark(c)).into_iter().collect();
                let close: String = inner.chars().last().filter(|&c| is_mark(c)).into_iter().collect();
                let n_lines = inner.matches('\n').count();
                out.push_str(&format!("{{%{open}{replacement}{}{close}%}}", "\n".repeat(n_lines)));
                rest = &tag[length..];
            }
            // Only past the opening: what looks like a tag's end may lie within a string.
            _ => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn try_render(source: &str, context: Value) -> Result<String, TemplateError> {
        let tokens = json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": null});
        let tokens = TemplateTokens::from_config(tokens.as_object().unwrap());
        let mut extra = context.as_object().unwrap().clone();
        let messages = extra.shift_remove("messages").unwrap_or_else(|| json!([]));
        let tools = extra.shift_remove("tools");
        let add = extra.shift_remove("add_generation_prompt").is_some_and(|value| value == true);
        let tools = tools.as_ref().and_then(Value::as_array).map(Vec::as_slice);
        ChatTemplate::new(source, tokens)?.render(messages.as_array().unwrap(), tools, add, &extra)
    }

    #[track_caller]
    fn check(source: &str, context: Value, expected: &str) {
        assert_eq!(try_render(source, context).unwrap(), expected, "template: {source}");
    }

    fn conversation() -> Value {
        json!([
            {"role": "system", "content": " be brief "},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello",
             "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"city": "Zürich <&>", "n": 2}}}
             ]},
            {"role": "tool", "content": "42"},
            {"role": "user", "content": "and?"},
        ])
    }

    fn tools() -> Value {
        json!([{"type": "function", "function": {"name": "f",
            "parameters": {"z": 1, "a": [1.0, null, true], "e": {}, "l": []}}}])
    }

    /// Expected texts in this module come from Jinja2 3.1.6 in transformers' environment.
    #[test]
    fn renders_as_jinja2() {
        check(
            r#"{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }},{% endfor %}"#,
            json!({}),
            "0,1,3,4,",
        );
        check(
            r#"{{ messages[::-1]|map(attribute='role')|join(' ') }} {{ messages[-1].content }} {{ messages[1:3]|length }} {{ 'abc'[::-1] }}"#,
            json!({"messages": conversation()}),
            "user tool assistant user system and? 2 cba",
        );
        check(
            r#"{% for k, v in d|items %}{{ k }}={{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}"#,
            json!({"d": {"b": 1, "a": "x"}}),
            "b=1;a=x;ba",
        );
        check(
            r#"{{ d|tojson(indent=4) }}|{{ d|tojson(indent=2, sort_keys=true) }}|{{ d|tojson(separators=(',', ':')) }}|{{ d|tojson(ensure_ascii=true) }}|{{ d|tojson }}"#,
            json!({"d": {"z": {"é\n\"\\": [1, 2.5, 1e-07, 1e+16, 1e+20, 12345.0, -0.0]}, "a": [], "h": "<a href='x'>&\u{7f}\u{1}🙂", "t": true, "n": null, "e": {}}}),
            "{\n    \"z\": {\n        \"é\\n\\\"\\\\\": [\n            1,\n            2.5,\n            1e-07,\n            1e+16,\n            1e+20,\n            12345.0,\n            -0.0\n        ]\n    },\n    \"a\": [],\n    \"h\": \"<a href='x'>&\u{7f}\\u0001🙂\",\n    \"t\": true,\n    \"n\": null,\n    \"e\": {}\n}|{\n  \"a\": [],\n  \"e\": {},\n  \"h\": \"<a href='x'>&\u{7f}\\u0001🙂\",\n  \"n\": null,\n  \"t\": true,\n  \"z\": {\n    \"é\\n\\\"\\\\\": [\n      1,\n      2.5,\n      1e-07,\n      1e+16,\n      1e+20,\n      12345.0,\n      -0.0\n    ]\n  }\n}|{\"z\":{\"é\\n\\\"\\\\\":[1,2.5,1e-07,1e+16,1e+20,12345.0,-0.0]},\"a\":[],\"h\":\"<a href='x'>&\u{7f}\\u0001🙂\",\"t\":true,\"n\":null,\"e\":{}}|{\"z\": {\"\\u00e9\\n\\\"\\\\\": [1, 2.5, 1e-07, 1e+16, 1e+20, 12345.0, -0.0]}, \"a\": [], \"h\": \"<a href='x'>&\\u007f\\u0001\\ud83d\\ude42\", \"t\": true, \"n\": null, \"e\": {}}|{\"z\": {\"é\\n\\\"\\\\\": [1, 2.5, 1e-07, 1e+16, 1e+20, 12345.0, -0.0]}, \"a\": [], \"h\": \"<a href='x'>&\u{7f}\\u0001🙂\", \"t\": true, \"n\": null, \"e\": {}}",
        );
        check(
            r#"{{ t }} {{ n }} {{ f }} {{ l }} {{ d }} {{ u }}|{{ t|string }}|{{ 3 // 2 }} {{ 3 / 2 }} {{ 2 ** 3 }} {{ l|length }}"#,
            json!({"t": true, "n": null, "f": 1.0, "l": [1, "a'b", null, [true]], "d": {"k": "v\n", "x": 1e-05}}),
            "True None 1.0 [1, \"a'b\", None, [True]] {'k': 'v\\n', 'x': 1e-05} |True|1 1.5 8 4",
        );
        check(
            r#"{{ s is sequence }} {{ s is iterable }} {{ s is mapping }} {{ d is mapping }} {{ d is sequence }} {{ l is sequence }} {{ n is none }} {{ u is defined }} {{ n is iterable }} {{ s is string }} {{ i is number }} {{ i is integer }} {{ t is boolean }} {{ t is true }}"#,
            json!({"s": "a", "d": {}, "l": [], "n": null, "i": 3, "t": true}),
            "True True False True True True True False False True True True True True",
        );
        check(
            r#"{{ tools is defined }} {{ tools is none }} {{ documents is none }} {{ pad_token is defined }} {{ bos_token }}{{ eos_token }} {{ 'x' in u }}"#,
            json!({}),
            "True True True False <s></s> False",
        );
        check(
            "  {%- set ns = namespace(n=0) %}\n    {% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n{{ loop.index }}{{ loop.last }} {{ loop.previtem.role if loop.previtem is defined else '-' }}\n    {% endfor %}\n{{ ns.n }}\n",
            json!({"messages": conversation()}),
            "1False -\n2False system\n3False user\n4False assistant\n5True tool\n5",
        );
        check(
            "a\n  {% generation %}\n  {{ 'x' }}\n  {%- endgeneration -%}  \nb {% generation %}y{% endgeneration %}\n",
            json!({}),
            "a\n  xb y",
        );
        check(
            r#"{{ ' a b '.strip() }}|{{ 'a,b,,c'.split(',') }}|{{ 'a b  c'.split() }}|{{ 'a-b-c'.split('-', 1)[1] }}|{{ 'Abc'.lower() }}{{ 'abc'.title() }}{{ 'x'.upper() }}|{{ 'aXb'.replace('X', '') }}|{{ 'abc'.removeprefix('a').removesuffix('c') }}|{{ 'k=v=w'.partition('=')[2] }}|{{ 'xaxx'.strip('x') }}|{{ 'abc'.find('c') }}|{{ ', '.join(['a','b']) }}"#,
            json!({}),
            "a b|['a', 'b', '', 'c']|['a', 'b', 'c']|b-c|abcAbcX|ab|b|v=w|a|2|a, b",
        );
        check(
            r#"{{ d.get('a', 'none') }} {{ d.get('q', 'dflt') }} {{ d.keys()|list }} {{ d.values()|list }} {{ 'a' in d }} {{ d['q'] is defined }} {{ (d.x.y is defined) if d.x else 'no' }}"#,
            json!({"d": {"a": 1}}),
            "1 dflt ['a'] [1] True False no",
        );
        check(
            r#"{% macro f(x, y='d') %}{{ x }}-{{ y }}{% endmacro %}{{ f(1) }} {{ f(1, y=2) }} {{ f('a')|upper }}"#,
            json!({}),
            "1-d 1-2 A-D",
        );
        check(
            r#"{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|rejectattr('role', '==', 'user')|map(attribute='role')|list }} {{ messages|first|tojson }} {{ (messages|last).content }}"#,
            json!({"messages": conversation()}),
            "2 ['system', 'assistant', 'tool'] {\"role\": \"system\", \"content\": \" be brief \"} and?",
        );
        check(
            r#"{{ 'yes' if x is not defined else 'no' }} {{ x|default('dd') }} {{ n|default('q', true) }} {{ [1,2]+[3] }} {{ 'a' ~ 1 ~ 'b' }} {{ 7 % 4 }} {{ not x }} {{ (1, 2)|length }} {{ '%s' is string }}"#,
            json!({"n": null}),
            "yes dd q [1, 2, 3] a1b 3 True 2 True",
        );
        check(
            r#"{% set x = 'a' if true %}{{ x }}{% set y %}blk{{ x }}{% endset %}{{ y }}{# c #}{% raw %}{{ raw }}{% endraw %}{% filter upper %}q{% endfilter %}{% for x in [] %}{% else %}empty{% endfor %}"#,
            json!({}),
            "ablka{{ raw }}Qempty",
        );
        check(
            r#"{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }}{{ ',' if not loop.last }}{% endfor %} {{ loop is defined }} {{ 'a\tb\'c' }} {{ messages[0]['content'] | trim + '!' }} {{ -1 if false else 2 }} {{ 1 if u else 0 }}"#,
            json!({"messages": conversation()}),
            "3,7 False a\tb'c be brief! 2 0",
        );
        check(
            r#"{%- for m in messages if m.role != 'system' -%}{{ loop.index }}{{ m.role[0] }}{{ m['name'] or '' }} {% endfor %}{{ messages | length > 3 and messages[0].role in ['system', 'developer'] }}"#,
            json!({"messages": conversation()}),
            "1u 2a 3t 4u True",
        );
        check(
            "{{ 'é\n'|tojson|length }} {{ {'a': 1, 'b': [1, 2]}|tojson }} {{ dict(a=1)|tojson }} {{ [1,2,3]|sum }} {{ ['b','a']|sort|join }} {{ 'x' * 3 }} {{ 'a' if messages else 'e' }}",
            json!({}),
            "5 {\"a\": 1, \"b\": [1, 2]} {\"a\": 1} 6 ab xxx e",
        );
    }

    /// Values that are missing or none, Python's operators on texts and lists, and what minijinja lacks.
    #[test]
    fn renders_pythons_odd_ends_as_jinja2() {
        let context = || json!({"n": null, "t": true, "l": ["a", "b"], "d": {"k": "v"}});
        check(
            "{{ u|length }} {{ u|count }} [{{ u|first }}] [{{ u|last }}] {{ u|items|list }} {{ u|list }} [{{ u|join }}] [{{ u|upper }}] [{{ u|trim }}]",
            context(),
            "0 0 [] [] [] [] [] [] []",
        );
        check(
            "{{ 'a-b-c'.rsplit('-', 1) }} {{ ' a b  c '.rsplit(None, 1) }} {{ 'a b c'.rsplit() }} {{ 'abc'.rsplit('-') }}",
            context(),
            "['a-b', 'c'] [' a b', 'c'] ['a', 'b', 'c'] ['abc']",
        );
        check(
            "{{ '%s is %d' % ('x', 3) }} {{ '%s' % l }} {{ '%05.2f|%-4s|%x' % (3.14159, 'a', 255) }} {{ l|length % -3 }} {{ -7 % 3 }} {{ 7.5 % 2 }} {{ '100%%' % () }}",
            context(),
            "x is 3 ['a', 'b'] 03.14|a   |ff -1 2 1.5 100%",
        );
        check(
            "{{ 'a long text with many words'|truncate(12) }}|{{ 'a long text'|truncate(8, true) }}|{{ 'short'|truncate(3) }}|{{ 'a long text with many words'|truncate(12, end='!', leeway=0) }}",
            context(),
            "a long...|a long text|short|a long!",
        );
        check(
            "{{ n }} {{ n ~ 'x' }} {{ [n, t, 1.0, 'a'] }} {{ {'k': [n]} }} {{ n|default('d') }} {{ l ~ d }} {{ l|join('-') }} {{ d|string|upper }} {{ n|string|length }}",
            context(),
            "None Nonex [None, True, 1.0, 'a'] {'k': [None]} None ['a', 'b']{'k': 'v'} a-b {'K': 'V'} 4",
        );
        check(
            "{{ [1, 2, 3][1:] }} {{ [1,2,3][::-1] }} {{ 'hello'[1:4] }} {{ 'hello'[-3:] }} {{ 'hello'[::-2] }} {{ l[:1] }} {{ [1] + [2] }} {{ [0] * 3 }} {{ 'ab' * 2 }} {{ 3 * 'x' }}",
            context(),
            "[2, 3] [3, 2, 1] ell llo olh ['a'] [1, 2] [0, 0, 0] abab xxx",
        );
        check(
            "{{ 'abc'.center(9, '*') }}|{{ 'abc'.ljust(5) }}|{{ '7'.zfill(3) }}|{{ '-7'.zfill(4) }}|{{ 'aBc'.swapcase() }}|{{ 'abc'.index('c') }}|{{ 'Ab Cd'.istitle() }}|{{ 'abcd'.rindex('d') }}|{{ 'x'|center(6) }}|",
            context(),
            "***abc***|abc  |007|-007|AbC|2|True|3|  x   |",
        );
        check(
            "{{ '3'|int + 1 }} {{ 'x'|int }} {{ 'x'|int(7) }} {{ '2.7'|int }} {{ '1.5'|float }} {{ 'y'|float }} {{ 'ff'|int(0, 16) }}",
            context(),
            "4 0 7 2 1.5 0.0 255",
        );
        check(
            "{{ [1,2,3,4,5]|batch(2)|list }} {{ [1,2,3]|batch(2, 'x')|list }} {{ [1,2,3,4,5]|slice(2)|list }} {{ [1,2,3]|slice(2, 'x')|list }}",
            context(),
            "[[1, 2], [3, 4], [5]] [[1, 2], [3, 'x']] [[1, 2, 3], [4, 5]] [[1, 2], [3, 'x']]",
        );
        check(
            "{{ 'a\nb\n\nc'|indent(2) }}|{{ 'a\nb'|indent(2, true) }}|{{ 'hello world again'|wordcount }}|{{ 'hELLO'|capitalize }}",
            context(),
            "a\n  b\n\n  c|  a\n  b|3|Hello",
        );
        check(
            "{{ 'a,b'.replace(',', ';') }} {{ 'aaa'.replace('a', 'b', 2) }} {{ 'aaa'|replace('a', 'b', 1) }} {{ 12|replace('1', 'x') }} {{ '-'.join(['a','b']) }}",
            context(),
            "a;b bba baa x2 a-b",
        );
        check(
            "{{ d|length }} {{ 'é🙂'|length }} {{ d|first }} {{ 'xyz'|last }} {{ d|list }} {{ 'ab'|list }}",
            context(),
            "1 2 k z ['k'] ['a', 'b']",
        );
        // Line ends of every kind are one.
        check("a\r\nb\rc\n{{ 'x' }}\r\n", json!({}), "a\nb\nc\nx");
    }

    #[test]
    fn limits_end_a_rendering_within_a_second() {
        let start = std::time::Instant::now();
        for source in [
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x + [1] %}{% endfor %}",
            "{% set ns = namespace(x=1) %}{% for i in range(9000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
            "{{ [1]|batch(10**12, 1) }}",
            "{{ 'a' * 10**10 }}",
            "{{ '%99999999d' % 1 }}",
        ] {
            let error = try_render(source, json!({})).unwrap_err().to_string();
            assert!(error.contains("chat template, line 1"), "{error}");
        }
        assert!(start.elapsed().as_secs() < 7, "{:?}", start.elapsed());
    }

    const LLAMA3: &str = r#"{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system message is taken out of the list. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;

    const GLM: &str = r#"[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>
{%- endif -%}
{%- macro visible_text(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}
                {{- item.text }}
            {%- elif item is string -%}
                {{- item }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- content }}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user_index=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set ns.last_user_index = loop.index0 -%}
    {%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible_text(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible_text(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning_content = '' %}
{%- set content = visible_text(m.content) %}
{%- if m.reasoning_content is string %}
    {%- set reasoning_content = m.reasoning_content %}
{%- else %}
    {%- if '</think>' in content %}
        {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
{%- endif %}
{%- if loop.index0 > ns.last_user_index and reasoning_content -%}
{{ '\n<think>' + reasoning_content.strip() +  '</think>'}}
{%- else -%}
{{ '\n<think></think>' }}
{%- endif -%}
{%- if content.strip() -%}
{{ '\n' + content.strip() }}
{%- endif -%}
{% if m.tool_calls %}
{% for tc in m.tool_calls %}
{%- if tc.function %}
    {%- set tc = tc.function %}
{%- endif %}
{{ '\n<tool_call>' + tc.name }}
{% set _args = tc.arguments %}
{% for k, v in _args.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}
{% endif %}
{%- elif m.role == 'tool' -%}
{%- if m.content is string -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
    {{- '<|observation|>' }}
{%- endif %}
{{- '\n<tool_response>\n' }}
{{- m.content }}
{{- '\n</tool_response>' }}
{%- endif -%}
{%- elif m.role == 'system' -%}
<|system|>
{{ visible_text(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}
"#;

    const DEEPSEEK: &str = r#"{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] is not none %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls'] %}{%- if not ns.is_first %}{{'<｜Assistant｜><｜tool▁calls▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + tool['function']['arguments']|tojson + '\n' + '```'}}{%- set ns.is_first = true -%}{%- else %}{{'\n'}}{%- endif %}{%- endfor %}{{'<｜end▁of▁sentence｜>'}}{%- endif %}{%- if message['role'] == 'assistant' and not message['tool_calls'] %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% if not thinking is defined or not thinking %}{{'</think>'}}{% else %}{{'<think>\n'}}{% endif %}{% endif %}"#;

    const QWEN: &str = r##"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"##;

    #[test]
    fn renders_model_templates_as_jinja2() {
        let conversation = conversation();
        let short = json!(conversation.as_array().unwrap()[..3]);
        check(
            LLAMA3,
            json!({"messages": conversation, "add_generation_prompt": true}),
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nbe brief<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{\"name\": \"f\", \"parameters\": {\"city\": \"Zürich <&>\", \"n\": 2}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n\"42\"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        );
        check(
            LLAMA3,
            json!({"messages": conversation, "add_generation_prompt": true, "tools": tools(), "tools_in_user_message": false, "enable_thinking": false, "thinking": true}),
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n{\n    \"type\": \"function\",\n    \"function\": {\n        \"name\": \"f\",\n        \"parameters\": {\n            \"z\": 1,\n            \"a\": [\n                1.0,\n                null,\n                true\n            ],\n            \"e\": {},\n            \"l\": []\n        }\n    }\n}\n\nbe brief<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{\"name\": \"f\", \"parameters\": {\"city\": \"Zürich <&>\", \"n\": 2}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n\"42\"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        );
        check(
            LLAMA3,
            json!({"messages": short, "add_generation_prompt": false}),
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nbe brief<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{\"name\": \"f\", \"parameters\": {\"city\": \"Zürich <&>\", \"n\": 2}}<|eot_id|>",
        );
        check(
            GLM,
            json!({"messages": conversation, "add_generation_prompt": true}),
            "[gMASK]<sop><|system|>\n be brief <|user|>\nhi<|assistant|>\n<think></think>\nhello\n<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Zürich <&></arg_value>\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call><|observation|>\n<tool_response>\n42\n</tool_response><|user|>\nand?<|assistant|>",
        );
        check(
            GLM,
            json!({"messages": conversation, "add_generation_prompt": true, "tools": tools(), "tools_in_user_message": false, "enable_thinking": false, "thinking": true}),
            "[gMASK]<sop><|system|>\n# Tools\n<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {\"z\": 1, \"a\": [1.0, null, true], \"e\": {}, \"l\": []}}}\n</tools><|system|>\n be brief <|user|>\nhi/nothink<|assistant|>\n<think></think>\nhello\n<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Zürich <&></arg_value>\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call><|observation|>\n<tool_response>\n42\n</tool_response><|user|>\nand?/nothink<|assistant|>\n<think></think>",
        );
        check(
            GLM,
            json!({"messages": short, "add_generation_prompt": false}),
            "[gMASK]<sop><|system|>\n be brief <|user|>\nhi<|assistant|>\n<think>hm</think>\nhello\n<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Zürich <&></arg_value>\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        );
        check(
            DEEPSEEK,
            json!({"messages": conversation, "add_generation_prompt": true}),
            "<s> be brief <｜User｜>hi<｜Assistant｜><｜tool▁calls▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"city\": \"Zürich <&>\", \"n\": 2}\n```<｜end▁of▁sentence｜><｜tool▁output▁begin｜>42<｜tool▁output▁end｜><｜User｜>and?<｜Assistant｜></think>",
        );
        check(
            DEEPSEEK,
            json!({"messages": conversation, "add_generation_prompt": true, "tools": tools(), "tools_in_user_message": false, "enable_thinking": false, "thinking": true}),
            "<s> be brief <｜User｜>hi<｜Assistant｜><｜tool▁calls▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"city\": \"Zürich <&>\", \"n\": 2}\n```<｜end▁of▁sentence｜><｜tool▁output▁begin｜>42<｜tool▁output▁end｜><｜User｜>and?<｜Assistant｜><think>\n",
        );
        check(
            DEEPSEEK,
            json!({"messages": short, "add_generation_prompt": false}),
            "<s> be brief <｜User｜>hi<｜Assistant｜><｜tool▁calls▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"city\": \"Zürich <&>\", \"n\": 2}\n```<｜end▁of▁sentence｜>",
        );
        check(
            QWEN,
            json!({"messages": conversation, "add_generation_prompt": true}),
            "<|im_start|>system\n be brief <|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Zürich <&>\", \"n\": 2}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n",
        );
        check(
            QWEN,
            json!({"messages": conversation, "add_generation_prompt": true, "tools": tools(), "tools_in_user_message": false, "enable_thinking": false, "thinking": true}),
            "<|im_start|>system\n be brief \n\n# Tools\n\n<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {\"z\": 1, \"a\": [1.0, null, true], \"e\": {}, \"l\": []}}}\n</tools><|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Zürich <&>\", \"n\": 2}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        );
        check(
            QWEN,
            json!({"messages": short, "add_generation_prompt": false}),
            "<|im_start|>system\n be brief <|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nhello\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Zürich <&>\", \"n\": 2}}\n</tool_call><|im_end|>\n",
        );
    }

    /// DeepSeek's templates add the arguments of calls to texts, others go through them.
    #[test]
    fn arguments_come_in_the_form_that_the_template_takes() {
        let text = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + '(' + c.function.arguments + ')' }}\
                    {% endfor %}{% endfor %}";
        let object = "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}{{ k }}=\
                      {{ v }};{% endfor %}{% endfor %}{% endfor %}";
        let both = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";
        let calls = json!([{"id": "c", "function": {"name": "f", "arguments": {"a": "é", "n": [1, 2.0]}}}]);
        let messages = [json!({"role": "assistant", "content": "", "tool_calls": calls})];
        for (source, expected) in [
            (text, r#"f({"a": "é", "n": [1, 2.0]})"#),
            (object, "a=é;n=[1, 2.0];"),
            (both, r#"{"a": "é", "n": [1, 2.0]}"#),
        ] {
            let template = ChatTemplate::new(source, TemplateTokens::default()).unwrap();
            assert_eq!(template.render(&messages, None, true, &Map::new()).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn refusals_and_failures_say_what_to_do() {
        let error = try_render("a\n{% if true %}\n{{ raise_exception('roles must alternate') }}{% endif %}", json!({}));
        let error = error.unwrap_err();
        assert!(matches!(error, TemplateError::Refused { .. }));
        assert_eq!(
            error.to_string(),
            "chat template, line 3: the template refused the conversation: \"roles must alternate\"; \
             change the messages, or name another template with --chat-template FILE"
        );
        let nested = "{% macro f() %}\n{{ raise_exception('inner') }}{% endmacro %}\n\n{{ f() }}";
        let error = try_render(nested, json!({})).unwrap_err();
        assert!(matches!(&error, TemplateError::Refused { line: 2, cause } if cause == "inner"), "{error:?}");

        let error = try_render("ok\n{{ nothing.at.all }}", json!({})).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("--chat-template FILE"), "{error}");
        let error = try_render("ok\n\n{% if %}", json!({})).unwrap_err().to_string();
        assert!(error.contains("line 3: syntax error") && error.contains("--chat-template FILE"), "{error}");
        let error = try_render("{{ nothing|tojson }}", json!({})).unwrap_err().to_string();
        assert!(error.contains("not JSON serializable"), "{error}");
        let error = try_render("{{ strftime_now('%Q!') }}", json!({})).unwrap_err().to_string();
        assert!(error.contains("strftime_now"), "{error}");
    }

    #[test]
    fn strftime_now_knows_the_year() {
        let year = chrono::Local::now().format("%Y").to_string();
        assert!(try_render("{{ strftime_now('%d %b %Y') }}", json!({})).unwrap().ends_with(&year));
    }

    #[test]
    fn generation_tags_keep_whitespace_control() {
        assert_eq!(replace_generation_tags("{%- generation -%}x{% endgeneration +%}"), "{%- if true -%}x{% endif +%}");
        assert_eq!(replace_generation_tags("{%\ngeneration %}x{% endgeneration"), "{% if true \n%}x{% endgeneration");
        assert_eq!(replace_generation_tags("{% set a = '%}' %}{%generation%}é"), "{% set a = '%}' %}{% if true %}é");
    }

    #[test]
    fn template_sources_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let from_dir = |explicit: Option<&Path>| ChatTemplate::from_dir(dir.path(), explicit);
        let show =
            |tools: Option<&[Value]>| from_dir(None).unwrap().unwrap().render(&[], tools, false, &Map::new()).unwrap();
        assert!(from_dir(None).unwrap().is_none());

        std::fs::write(path("tokenizer_config.json"), r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#)
            .unwrap();
        let message = from_dir(None).unwrap_err().to_string();
        assert!(message.contains("[\"rag\"]") && message.contains("--chat-template FILE"), "{message}");

        let list = json!({
            "bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": null,
            "chat_template": [
                {"name": "default", "template": "default {{ bos_token }}{{ eos_token }}{{ pad_token }}"},
                {"name": "tool_use", "template": "tools {{ tools|length }}"},
            ],
        });
        std::fs::write(path("tokenizer_config.json"), list.to_string()).unwrap();
        assert_eq!(show(None), "default <b><e>");
        assert_eq!(show(Some(&[json!({})])), "tools 1");

        std::fs::write(path("chat_template.jinja"), "jinja {{ bos_token }}").unwrap();
        assert_eq!(show(Some(&[])), "jinja <b>");
        std::fs::write(path("mine.jinja"), "mine").unwrap();
        let mine = from_dir(Some(&path("mine.jinja"))).unwrap().unwrap();
        assert_eq!(mine.render(&[], None, false, &Map::new()).unwrap(), "mine");
        let message = from_dir(Some(&path("absent.jinja"))).unwrap_err().to_string();
        assert!(message.contains("absent.jinja"), "{message}");
    }
}
