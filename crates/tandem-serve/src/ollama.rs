//! Ollama's interface: /api/chat, /api/generate, /api/tags, /api/show, /api/ps and /api/version.
//!
//! Streams are lines of JSON, and a stream is what a client gets unless it says otherwise.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body as HttpBody;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tandem_engine::SamplingOverrides;
use tandem_text::Reasoning;
use tandem_text::dialect::Delta;
use tandem_text::exact;
use tokio::sync::mpsc::channel;
use tokio_stream::wrappers::ReceiverStream;

use crate::api::{Integer, Seed, check_stops, sampling};
use crate::app::App;
use crate::body::{Body, Fields};
use crate::conversation::{Choice, Conversation, Notes, Tool, content_text, function_call, read_effort};
use crate::error::ApiError;
use crate::fields::{Table, misspelt};
use crate::generation::{Ask, Finish, Generation, new_id, now};
use crate::grammar::Form;
use crate::read::{exact_json, expected, list, object, optional, optional_text, required_text, text};

/// A conversation.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ChatRequest {
    model: String,
    #[serde(default)]
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    format: Option<Value>,
    think: Option<Value>,
    stream: Option<bool>,
    options: Option<Map<String, Value>>,
}

/// A text, or one turn of a conversation.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct GenerateRequest {
    model: String,
    #[serde(default)]
    prompt: String,
    system: Option<String>,
    raw: Option<bool>,
    format: Option<Value>,
    think: Option<Value>,
    stream: Option<bool>,
    suffix: Option<String>,
    template: Option<String>,
    images: Option<Vec<Value>>,
    /// Tokens of the turns before, as versions before there was a chat gave them out.
    context: Option<Vec<Value>>,
    options: Option<Map<String, Value>>,
}

/// The name of a model.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ShowRequest {
    model: Option<String>,
    name: Option<String>,
}

impl Fields for ChatRequest {
    const TABLE: Option<&'static Table> = None;
}

impl Fields for GenerateRequest {
    const TABLE: Option<&'static Table> = None;
}

impl Fields for ShowRequest {
    const TABLE: Option<&'static Table> = None;
}

/// Continues a conversation.
pub(crate) async fn chat(State(app): State<Arc<App>>, body: Body<ChatRequest>) -> Result<Response, ApiError> {
    let Body { value: request, notes, admitted } = body;
    check_model(&app, &request.model)?;
    app.worker.check_open()?;
    let mut conversation = Conversation { notes, param: "messages", ..Conversation::default() };
    for (i, message) in request.messages.iter().enumerate() {
        let path = format!("messages[{i}]");
        let map = object(message, &path)?;
        let role = required_text(map, "role", &path)?;
        if !["system", "user", "assistant", "tool"].contains(&role) {
            let message = format!("role is {role:?}, expected system, user, assistant or tool");
            return Err(ApiError::invalid(&format!("{path}.role"), message));
        }
        let content = map.get("content").unwrap_or(&Value::Null);
        let mut text = content_text(content, &format!("{path}.content"), &mut conversation.notes)?;
        if let Some(images) = optional(map, "images").and_then(Value::as_array).filter(|images| !images.is_empty()) {
            let n_images = images.len();
            conversation.notes.add("images were left out: this model reads text only");
            text.push_str(&format!("\n[{n_images} images left out: this model reads text only]"));
        }
        let mut value = json!({"role": role, "content": text});
        if let Some(thinking) = optional_text(map, "thinking", &path)? {
            value["reasoning_content"] = json!(thinking);
        }
        if let Some(name) = optional_text(map, "tool_name", &path)? {
            value["name"] = json!(name);
        }
        if let Some(calls) = optional(map, "tool_calls") {
            let path = format!("{path}.tool_calls");
            let mut read = vec![];
            for (i, call) in list(calls, &path)?.iter().enumerate() {
                let path = format!("{path}[{i}].function");
                let function = object(call.get("function").unwrap_or(call), &path)?;
                read.push(function_call(function, optional_text(map, "id", &path)?.unwrap_or_default(), &path)?);
            }
            value["tool_calls"] = json!(read);
        }
        conversation.messages.push(value);
    }
    let mut tools = vec![];
    for (i, tool) in request.tools.iter().flatten().enumerate() {
        let path = format!("tools[{i}].function");
        tools.push(Tool::function(object(tool.get("function").unwrap_or(tool), &path)?, "parameters", &path)?);
    }
    conversation.set_tools(tools)?;
    conversation.choice = Choice::Auto;
    if conversation.messages.is_empty() {
        return Ok(loaded(&app, true));
    }
    conversation.form = form(request.format.as_ref())?;
    conversation.thinking = thinking(request.think.as_ref())?;
    let ask = conversation.ask(&app)?;
    let ask = with_options(ask, request.options.as_ref(), &mut conversation.notes)?;
    drop(admitted);
    let generation = app.start(ask)?.remove(0);
    Ok(answer(&app, generation, request.stream, true, conversation.notes).await)
}

/// Continues a text.
pub(crate) async fn generate(State(app): State<Arc<App>>, body: Body<GenerateRequest>) -> Result<Response, ApiError> {
    let Body { value: request, mut notes, admitted } = body;
    check_model(&app, &request.model)?;
    app.worker.check_open()?;
    if request.template.as_ref().is_some_and(|template| !template.is_empty()) {
        let message = "template cannot be honoured: templates do not come with a request; start the server with --chat-template, \
                       or send a raw prompt";
        return Err(ApiError::invalid("template", message));
    }
    if request.images.as_ref().is_some_and(|images| !images.is_empty()) {
        notes.add("images were left out: this model reads text only");
    }
    if request.context.as_ref().is_some_and(|context| !context.is_empty()) {
        notes.add("context was left out: send the conversation to /api/chat");
    }
    if request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "suffix cannot be honoured: the model was not trained to fill gaps"));
    }
    let ask = if request.prompt.is_empty() {
        None
    } else if request.raw == Some(true) || app.template.is_none() {
        let prompt = app.encode("prompt", &request.prompt, true)?;
        Some(Ask { param: "prompt", prompt, form: form(request.format.as_ref())?, n: 1, ..Ask::default() })
    } else {
        let mut conversation = Conversation { notes, param: "prompt", ..Conversation::default() };
        let system = request.system.iter().filter(|system| !system.is_empty());
        conversation.messages.extend(system.map(|system| json!({"role": "system", "content": system})));
        conversation.messages.push(json!({"role": "user", "content": request.prompt}));
        conversation.form = form(request.format.as_ref())?;
        conversation.thinking = thinking(request.think.as_ref())?;
        let ask = conversation.ask(&app)?;
        notes = conversation.notes;
        Some(ask)
    };
    drop(admitted);
    let Some(ask) = ask else { return Ok(loaded(&app, false)) };
    let generation = app.start(with_options(ask, request.options.as_ref(), &mut notes)?)?.remove(0);
    Ok(answer(&app, generation, request.stream, false, notes).await)
}

/// The answer where nothing is asked for but to load the model.
fn loaded(app: &App, is_chat: bool) -> Response {
    let mut done = json!({"model": app.model_name(), "created_at": time(now()), "done": true, "done_reason": "load"});
    match is_chat {
        true => done["message"] = json!({"role": "assistant", "content": ""}),
        false => done["response"] = json!(""),
    }
    axum::Json(done).into_response()
}

/// Lists the model.
pub(crate) async fn tags(State(app): State<Arc<App>>) -> axum::Json<Value> {
    let model = |name: &String| {
        json!({
            "name": name, "model": name, "modified_at": time(now()), "size": 0, "digest": "",
            "details": details(&app),
        })
    };
    axum::Json(json!({"models": app.model_names.iter().map(model).collect::<Vec<_>>()}))
}

/// Facts about the model.
pub(crate) async fn show(State(app): State<Arc<App>>, body: Body<ShowRequest>) -> Result<axum::Json<Value>, ApiError> {
    let name = body.value.model.or(body.value.name).unwrap_or_default();
    check_model(&app, &name)?;
    let family = app.facts["model_type"].as_str().unwrap_or_default().to_owned();
    let mut info = json!({"general.architecture": family});
    info[format!("{family}.context_length")] = json!(app.context);
    Ok(axum::Json(json!({
        "modelfile": "", "parameters": "", "template": app.template.as_ref().map_or("", |template| template.source()),
        "details": details(&app), "model_info": info, "capabilities": ["completion", "tools", "thinking"],
    })))
}

/// The interface's version, for clients that ask for one.
pub(crate) async fn version() -> axum::Json<Value> {
    axum::Json(json!({"version": "0.12.0"}))
}

fn details(app: &App) -> Value {
    json!({
        "parent_model": "", "format": "safetensors", "family": app.facts["model_type"], "families": [app.facts["model_type"]],
        "parameter_size": "", "quantization_level": app.facts["numerics"],
    })
}

/// A name may carry Ollama's tag.
fn check_model(app: &App, name: &str) -> Result<(), ApiError> {
    app.check_model(Some(name)).or_else(|error| match name.strip_suffix(":latest") {
        Some(name) => app.check_model(Some(name)),
        None => Err(error),
    })
}

fn form(format: Option<&Value>) -> Result<Option<Form>, ApiError> {
    match format {
        None => Ok(None),
        Some(Value::String(format)) if format.is_empty() => Ok(None),
        Some(Value::String(format)) if format == "json" => Ok(Some(Form::JsonSchema(json!({"type": "object"})))),
        Some(schema @ Value::Object(_)) => Ok(Some(Form::JsonSchema(schema.clone()))),
        Some(other) => Err(expected("format", other, "\"json\" or a JSON schema")),
    }
}

fn thinking(think: Option<&Value>) -> Result<Reasoning, ApiError> {
    match think {
        // As Ollama, which shows thinking only to those who ask for it.
        None => Ok(Reasoning::default()),
        Some(Value::Bool(is_on)) => Ok(Reasoning { is_on: Some(*is_on), ..Reasoning::default() }),
        Some(effort) => read_effort(effort, "think").map(Reasoning::of_effort),
    }
}

/// Options that take effect.
const OPTIONS: [&str; 10] = [
    "num_predict",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
];

fn with_options(ask: Ask, options: Option<&Map<String, Value>>, notes: &mut Notes) -> Result<Ask, ApiError> {
    let none = Map::new();
    let options = options.unwrap_or(&none);
    for name in options.keys().filter(|name| !OPTIONS.contains(&name.as_str())) {
        let meant = match name.as_str() {
            "max_tokens" => Some("num_predict"),
            "repetition_penalty" => Some("repeat_penalty"),
            name => misspelt(name, &OPTIONS),
        };
        if let Some(meant) = meant {
            let shown: String = name.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
            notes.add(format!("the option {shown:?} is not known and was ignored: did you mean {meant:?}?"));
        }
    }
    let number = |key: &str| -> Result<Option<f64>, ApiError> {
        let read = |value: &Value| value.as_f64().ok_or_else(|| expected(&format!("options.{key}"), value, "a number"));
        optional(options, key).map(read).transpose()
    };
    let stop = match optional(options, "stop") {
        None => vec![],
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) => {
            let stop = |(i, stop): (usize, &Value)| text(stop, &format!("options.stop[{i}]")).map(str::to_owned);
            stops.iter().enumerate().map(stop).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(expected("options.stop", other, "a text or a list of texts")),
    };
    let float = |key: &str| number(key).map(|n| n.map(|n| n as f32));
    let seed = optional(options, "seed").map(|value| {
        Seed::deserialize(value).map_err(|_| expected("options.seed", value, "a whole number of 64 bits"))
    });
    let seed = seed.transpose()?;
    Ok(Ask {
        // -1 and -2 are without end.
        max_tokens: number("num_predict")?.filter(|n| *n >= 0.0).map(|n| n as u32),
        stop: check_stops(stop, "options.stop")?,
        overrides: SamplingOverrides {
            top_p: float("top_p")?,
            min_p: float("min_p")?,
            presence_penalty: float("presence_penalty")?,
            frequency_penalty: float("frequency_penalty")?,
            seed: seed.map(|Seed(seed)| seed),
            ..sampling(float("temperature")?, number("top_k")?.map(|n| Integer(n as i64)), float("repeat_penalty")?)?
        },
        ..ask
    })
}

/// The time as Ollama writes it.
pub(crate) fn time(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in years that begin in March.
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year_of_era + era * 400 + carry;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Answers being written in Ollama's form.
struct Writer {
    model: String,
    is_chat: bool,
    /// Name and arguments of the call that is open.
    call: Option<(String, String)>,
    start: Instant,
    first_token: Option<Instant>,
}

impl Writer {
    fn frame(&self, key: &str, value: &Value) -> Value {
        let mut frame = json!({"model": self.model, "created_at": time(now()), "done": false});
        match (self.is_chat, key) {
            (true, "thinking") => frame["message"] = json!({"role": "assistant", "content": "", "thinking": value}),
            (true, "tool_calls") => frame["message"] = json!({"role": "assistant", "content": "", "tool_calls": value}),
            (true, _) => frame["message"] = json!({"role": "assistant", "content": value}),
            (false, "content") => frame["response"] = value.clone(),
            (false, key) => {
                frame["response"] = json!("");
                frame[key] = value.clone();
            }
        }
        frame
    }

    fn write(&mut self, delta: Delta) -> Option<Value> {
        self.first_token.get_or_insert_with(Instant::now);
        match delta {
            Delta::Reasoning(text) => Some(self.frame("thinking", &json!(text))),
            Delta::Content(text) => Some(self.frame("content", &json!(text))),
            Delta::Call { name } => {
                self.call = Some((name, String::new()));
                None
            }
            Delta::Arguments(json) => {
                if let Some((_, arguments)) = &mut self.call {
                    arguments.push_str(&json);
                }
                None
            }
            Delta::EndCall => {
                let (name, arguments) = self.call.take()?;
                let arguments = exact::read(&arguments).ok()?;
                let call = json!([{"id": new_id("call_"), "function": {"name": name, "arguments": arguments}}]);
                Some(self.frame("tool_calls", &call))
            }
        }
    }

    fn last(&self, finish: &Finish, generation: &Generation) -> Value {
        let usage = generation.usage();
        let mut last = self.frame("content", &json!(""));
        let first = self.first_token.unwrap_or_else(Instant::now);
        last["done"] = json!(true);
        last["done_reason"] = json!(if *finish == Finish::Length { "length" } else { "stop" });
        last["total_duration"] = json!(self.start.elapsed().as_nanos() as u64);
        last["load_duration"] = json!(0);
        last["prompt_eval_count"] = json!(usage.prompt_tokens);
        last["prompt_eval_duration"] = json!((first - self.start).as_nanos() as u64);
        last["eval_count"] = json!(usage.completion_tokens);
        last["eval_duration"] = json!(first.elapsed().as_nanos() as u64);
        last
    }
}

async fn answer(app: &App, mut generation: Generation, stream: Option<bool>, is_chat: bool, notes: Notes) -> Response {
    let model = app.model_name().to_owned();
    let mut writer = Writer { model, is_chat, call: None, start: Instant::now(), first_token: None };
    if stream == Some(false) {
        let (mut text, mut thinking, mut calls) = (String::new(), String::new(), vec![]);
        let mut last = Value::Null;
        while let Some(chunk) = generation.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => return error.into_response(),
            };
            for frame in chunk.deltas.into_iter().filter_map(|delta| writer.write(delta)) {
                let part = if is_chat { &frame["message"] } else { &frame };
                text.push_str(part[if is_chat { "content" } else { "response" }].as_str().unwrap_or_default());
                thinking.push_str(part["thinking"].as_str().unwrap_or_default());
                calls.extend(part["tool_calls"].as_array().cloned().unwrap_or_default());
            }
            if let Some(finish) = &chunk.finish {
                last = writer.last(finish, &generation);
            }
        }
        let part = if is_chat { &mut last["message"] } else { &mut last };
        part[if is_chat { "content" } else { "response" }] = json!(text);
        if !thinking.is_empty() {
            part["thinking"] = json!(thinking);
        }
        if !calls.is_empty() {
            part["tool_calls"] = json!(calls);
        }
        return notes.on(exact_json(&last));
    }
    let (lines, receiver) = channel::<Result<String, std::convert::Infallible>>(64);
    let deadline = app.timeout;
    tokio::spawn(async move {
        let write = async move {
            while let Some(chunk) = generation.next().await {
                let frames = match chunk {
                    Ok(chunk) => {
                        let mut frames: Vec<Value> =
                            chunk.deltas.into_iter().filter_map(|delta| writer.write(delta)).collect();
                        frames.extend(chunk.finish.as_ref().map(|finish| writer.last(finish, &generation)));
                        frames
                    }
                    Err(error) => vec![json!({"error": error.message()})],
                };
                for frame in frames {
                    lines.send(Ok(exact::write(&frame) + "\n")).await.ok()?;
                }
            }
            Some(())
        };
        let _ = tokio::time::timeout(deadline, write).await;
    });
    let body = HttpBody::from_stream(ReceiverStream::new(receiver));
    notes.on(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}
