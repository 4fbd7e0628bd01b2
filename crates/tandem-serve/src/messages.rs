//! Anthropic's interface: /v1/messages and /v1/messages/count_tokens.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use axum::response::sse::Event;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tandem_engine::SamplingOverrides;
use tandem_text::dialect::Delta;
use tandem_text::exact;
use tokio::time::{Instant, timeout_at};
use utoipa::ToSchema;

use crate::api::{Count, Integer, Seed, StreamEvent, ThinkingDocument, Usage, check_stops, sampling};
use crate::app::App;
use crate::body::{Body, Fields};
use crate::chat::{Events, Gone, send, stream};
use crate::conversation::{
    Choice, Conversation, Notes, Shown, Tool, content_text, part_text, read_effort, read_format, read_thinking,
    split_reasoning,
};
use crate::error::ApiError;
use crate::fields::{self, Table};
use crate::generation::{Answer, Ask, Finish, Generation, new_id};
use crate::read::{exact_json, expected, kind, missing, object, optional, required_text};
use crate::strict::objects;

objects!(MessagesRequest, CountRequest);

/// While nothing is to be said a ping comes this often.
const PING: Duration = Duration::from_secs(10);
/// Kinds of tools with which the vendor finds others.
const SEARCH: &str = "tool_search_tool";
/// What Claude Code writes before its system text for its own vendor's accounts; it differs each time.
const BILLING: &str = "x-anthropic-billing-header";

/// A conversation to continue, in Anthropic's form.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct MessagesRequest {
    model: String,
    #[schema(min_items = 1, value_type = Vec<InputMessage>)]
    messages: Vec<Value>,
    /// Tokens to generate at most.
    #[schema(value_type = u32, minimum = 1)]
    max_tokens: Count,
    #[schema(value_type = Option<Blocks>)]
    system: Option<Value>,
    stream: Option<bool>,
    stop_sequences: Option<Vec<String>>,
    #[schema(minimum = 0, maximum = 1)]
    temperature: Option<f32>,
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    #[schema(value_type = Option<u32>)]
    top_k: Option<Integer>,
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    #[schema(minimum = 0.01, maximum = 100)]
    repetition_penalty: Option<f32>,
    #[schema(value_type = Option<i64>)]
    seed: Option<Seed>,
    #[schema(value_type = Option<Vec<InputTool>>)]
    tools: Option<Vec<Value>>,
    #[schema(value_type = Option<ChoiceDocument>)]
    tool_choice: Option<Value>,
    #[schema(value_type = Option<ThinkingDocument>)]
    thinking: Option<Value>,
    /// Effort, and the form of the answer.
    #[schema(value_type = Option<Object>)]
    output_config: Option<Value>,
    /// The form of the answer.
    #[schema(value_type = Option<Object>)]
    output_format: Option<Value>,
}

impl Fields for MessagesRequest {
    const TABLE: Option<&'static Table> = Some(&fields::MESSAGES);
}

/// What would be sent to /v1/messages.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct CountRequest {
    model: String,
    #[schema(min_items = 1, value_type = Vec<InputMessage>)]
    messages: Vec<Value>,
    #[schema(value_type = Option<Blocks>)]
    system: Option<Value>,
    #[schema(value_type = Option<Vec<InputTool>>)]
    tools: Option<Vec<Value>>,
    #[schema(value_type = Option<ChoiceDocument>)]
    tool_choice: Option<Value>,
    #[schema(value_type = Option<ThinkingDocument>)]
    thinking: Option<Value>,
    #[schema(value_type = Option<Object>)]
    output_config: Option<Value>,
    #[schema(value_type = Option<Object>)]
    output_format: Option<Value>,
}

impl Fields for CountRequest {
    const TABLE: Option<&'static Table> = Some(&fields::COUNT);
}

/// Tokens of a prompt.
#[derive(Serialize, ToSchema)]
pub(crate) struct CountResponse {
    input_tokens: usize,
}

/// Anthropic's error object.
#[derive(Serialize, ToSchema)]
pub(crate) struct AnthropicErrorResponse {
    r#type: String,
    error: AnthropicErrorBody,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct AnthropicErrorBody {
    r#type: String,
    message: String,
}

/// The types that only the OpenAPI document has.
mod document {
    #![allow(dead_code)]
    use super::*;

    #[derive(ToSchema)]
    pub(crate) struct InputMessage {
        role: InputRole,
        content: Blocks,
    }

    #[derive(ToSchema)]
    #[serde(rename_all = "lowercase")]
    pub(crate) enum InputRole {
        User,
        Assistant,
        System,
    }

    #[derive(ToSchema)]
    #[serde(untagged)]
    pub(crate) enum Blocks {
        Text(String),
        Blocks(Vec<Block>),
    }

    #[derive(ToSchema)]
    #[serde(tag = "type", rename_all = "snake_case")]
    pub(crate) enum Block {
        Text {
            text: String,
        },
        Thinking {
            thinking: String,
        },
        ToolUse {
            id: String,
            name: String,
            #[schema(value_type = Object)]
            input: Map<String, Value>,
        },
        ToolResult {
            tool_use_id: String,
            content: Option<String>,
            is_error: Option<bool>,
        },
    }

    #[derive(ToSchema)]
    pub(crate) struct InputTool {
        #[schema(min_length = 1)]
        name: String,
        description: Option<String>,
        /// JSON schema of the arguments.
        #[schema(value_type = Object)]
        input_schema: Map<String, Value>,
    }

    #[derive(ToSchema)]
    #[serde(tag = "type", rename_all = "snake_case")]
    pub(crate) enum ChoiceDocument {
        Auto { disable_parallel_tool_use: Option<bool> },
        Any { disable_parallel_tool_use: Option<bool> },
        Tool { name: String, disable_parallel_tool_use: Option<bool> },
        None,
    }
}
use document::*;

/// Continues a conversation.
#[utoipa::path(
    post, path = "/v1/messages", tag = "Anthropic", request_body = MessagesRequest,
    responses(
        (status = 200, description = "The answer, or its events", content(
            (Object = "application/json"), (StreamEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = AnthropicErrorResponse),
        (status = "5XX", description = "The engine is not there, or too slow", body = AnthropicErrorResponse),
    )
)]
pub(crate) async fn messages(State(app): State<Arc<App>>, body: Body<MessagesRequest>) -> Result<Response, ApiError> {
    let Body { value: request, notes, admitted } = body;
    app.check_model(Some(&request.model))?;
    app.worker.check_open()?;
    if request.max_tokens.0 == 0 {
        return Err(ApiError::invalid("max_tokens", "max_tokens is 0, expected at least 1"));
    }
    if let Some(t) = request.temperature
        && !(0.0..=1.0).contains(&t)
    {
        return Err(ApiError::invalid("temperature", format!("temperature is {t}, expected 0 to 1")));
    }
    let mut conversation = CountRequest {
        model: request.model,
        messages: request.messages,
        system: request.system,
        tools: request.tools,
        tool_choice: request.tool_choice,
        thinking: request.thinking,
        output_config: request.output_config,
        output_format: request.output_format,
    }
    .read(notes)?;
    let ask = Ask {
        max_tokens: Some(request.max_tokens.0),
        stop: check_stops(request.stop_sequences.unwrap_or_default(), "stop_sequences")?,
        overrides: SamplingOverrides {
            top_p: request.top_p,
            min_p: request.min_p,
            seed: request.seed.map(|seed| seed.0),
            ..sampling(request.temperature, request.top_k, request.repetition_penalty)?
        },
        ..conversation.ask(&app)?
    };
    drop(admitted);
    let generation = app.start(ask)?.remove(0);
    let (id, model) = (new_id("msg_"), app.model_name().to_owned());
    if request.stream == Some(true) {
        let response = stream(&app, move |events| async move {
            let _ = write(&events, generation, &id, &model).await;
        });
        return Ok(conversation.notes.on(response));
    }
    let answer = Answer::of(generation).await?;
    let mut content = vec![];
    if !answer.reasoning.is_empty() {
        let signature = signature(&answer.reasoning);
        content.push(json!({"type": "thinking", "thinking": answer.reasoning, "signature": signature}));
    }
    if !answer.content.is_empty() || (answer.calls.is_empty() && answer.reasoning.is_empty()) {
        content.push(json!({"type": "text", "text": answer.content}));
    }
    for call in &answer.calls {
        // A call that was cut off has no complete arguments, and must not look as if it had.
        if let Ok(input) = exact::read(&call.arguments) {
            content.push(json!({"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": input}));
        }
    }
    let (stop_reason, stop_sequence) = stop_reason(answer.finish.as_ref());
    let body = json!({
        "id": id, "type": "message", "role": "assistant", "model": model, "content": content,
        "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage_json(&answer.usage),
    });
    Ok(conversation.notes.on(exact_json(&body)))
}

/// Counts the tokens of a prompt.
#[utoipa::path(
    post, path = "/v1/messages/count_tokens", tag = "Anthropic", request_body = CountRequest,
    responses(
        (status = 200, description = "The number", body = CountResponse),
        (status = "4XX", description = "The request cannot be served", body = AnthropicErrorResponse),
    )
)]
pub(crate) async fn count_tokens(
    State(app): State<Arc<App>>,
    body: Body<CountRequest>,
) -> Result<axum::Json<CountResponse>, ApiError> {
    app.check_model(Some(&body.value.model))?;
    let input_tokens = match body.value.read(body.notes)?.ask(&app) {
        Ok(ask) => ask.prompt.len(),
        Err(error) => error.tokens().ok_or(error)?,
    };
    Ok(axum::Json(CountResponse { input_tokens }))
}

fn stop_reason(finish: Option<&Finish>) -> (&'static str, Option<&str>) {
    match finish {
        Some(Finish::Length) => ("max_tokens", None),
        Some(Finish::ToolCalls) => ("tool_use", None),
        Some(Finish::StopSequence(text)) => ("stop_sequence", Some(text)),
        Some(Finish::Stop) | None => ("end_turn", None),
    }
}

/// Anthropic counts cached tokens apart from the others.
fn usage_json(usage: &Usage) -> Value {
    let cached = usage.prompt_tokens_details.cached_tokens;
    json!({
        "input_tokens": usage.prompt_tokens - cached, "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0, "output_tokens": usage.completion_tokens,
    })
}

/// Clients give a thinking block back only with a signature; this one says which text it belongs to.
fn signature(thinking: &str) -> String {
    Sha256::digest(thinking).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl CountRequest {
    fn read(self, notes: Notes) -> Result<Conversation, ApiError> {
        let mut conversation = Conversation { notes, param: "messages", ..Conversation::default() };
        if self.messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages is empty; give at least one"));
        }
        if let Some(system) = &self.system {
            let system = system_text(system, "system", &mut conversation.notes)?;
            conversation.messages.extend((!system.is_empty()).then(|| json!({"role": "system", "content": system})));
        }
        let places = self.read_tools(&mut conversation)?;
        for (i, message) in self.messages.iter().enumerate() {
            add_message(message, &format!("messages[{i}]"), &mut conversation, &places)?;
        }
        // The answer goes on where the assistant's last message ends.
        if let Some(last) = conversation.messages.last()
            && last["role"] == "assistant"
            && last["tool_calls"].is_null()
        {
            if last["content"] == "" && last["reasoning_content"].is_null() {
                conversation.messages.pop();
            } else {
                conversation.continues = true;
            }
        }
        if let Some(choice) = &self.tool_choice {
            let map = object(choice, "tool_choice")?;
            conversation.one_call = map.get("disable_parallel_tool_use") == Some(&Value::Bool(true));
            conversation.choice = match kind(map, "", "tool_choice")? {
                "auto" => Choice::Auto,
                "any" => Choice::Required,
                "none" => Choice::None,
                "tool" => {
                    let name = required_text(map, "name", "tool_choice")?;
                    if let Some(tool) = places.get(name).map(|place| &mut conversation.tools[*place])
                        && tool.shown == Shown::No
                    {
                        tool.shown = Shown::First;
                    }
                    Choice::Named(name.to_owned())
                }
                other => {
                    let message = format!("type is {other:?}, expected \"auto\", \"any\", \"tool\" or \"none\"");
                    return Err(ApiError::invalid("tool_choice.type", message));
                }
            };
        }
        if let Some(thinking) = &self.thinking {
            conversation.thinking = read_thinking(thinking, "thinking")?;
        }
        let config = self.output_config.as_ref().map(|config| object(config, "output_config")).transpose()?;
        if let Some(effort) = config.and_then(|config| optional(config, "effort")) {
            // It says how much, and the field thinking says whether.
            conversation.thinking.effort = Some(read_effort(effort, "output_config.effort")?);
        }
        let format = config.and_then(|config| optional(config, "format")).or(self.output_format.as_ref());
        conversation.form = format.map(|format| read_format(format, "output_format")).transpose()?.flatten();
        Ok(conversation)
    }
}

impl CountRequest {
    /// Takes the tools; the place of each by its name.
    fn read_tools(&self, conversation: &mut Conversation) -> Result<HashMap<String, usize>, ApiError> {
        let (mut tools, mut n_deferred, mut is_searched_here) = (vec![], 0, false);
        let listed = self.tools.as_deref().unwrap_or_default();
        for (i, tool) in listed.iter().enumerate() {
            let path = format!("tools[{i}]");
            let map = object(tool, &path)?;
            is_searched_here |= kind(map, "custom", &path)?.starts_with(SEARCH);
            let is_deferred = match optional(map, "defer_loading") {
                None => false,
                Some(Value::Bool(is_deferred)) => *is_deferred,
                Some(other) => return Err(expected(&format!("{path}.defer_loading"), other, "true or false")),
            };
            n_deferred += usize::from(is_deferred);
            let shown = if is_deferred { Shown::No } else { Shown::First };
            tools.extend(read_tool(tool, &path, &mut conversation.notes)?.map(|tool| Tool { shown, ..tool }));
        }
        if n_deferred > 0 && n_deferred == listed.len() {
            let message = "all tools have defer_loading set; at least one must be there from the beginning, for example one \
                           that searches the others";
            return Err(ApiError::invalid("tools", message));
        }
        if is_searched_here && n_deferred > 0 {
            let note =
                "this server does not search tools: those with defer_loading are in the prompt from the beginning";
            conversation.notes.add(note);
            tools.iter_mut().for_each(|tool| tool.shown = Shown::First);
        }
        conversation.set_tools(tools)?;
        Ok(conversation.tools.iter().enumerate().map(|(i, tool)| (tool.client_name.clone(), i)).collect())
    }
}

/// The text that stands for a reference to a tool: its definition, where it is named first.
fn referred(
    map: &Map<String, Value>,
    path: &str,
    conversation: &mut Conversation,
    places: &HashMap<String, usize>,
) -> Result<String, ApiError> {
    let name = required_text(map, "tool_name", path)?;
    Ok(match places.get(name).map(|place| &mut conversation.tools[*place]) {
        Some(tool) if tool.shown == Shown::No => {
            tool.shown = Shown::InResult;
            format!("The tool {name} can be called from now on: {}", tool.declaration()["function"])
        }
        Some(_) => format!("The tool {name} is available."),
        None => {
            conversation.notes.add(format!("a reference to the tool {name:?}, which is not among the tools"));
            format!("The tool {name} is not available.")
        }
    })
}

/// The system text, without what changes from request to request and means nothing to a model; a date at its front goes to
/// its end, so that what follows it is found in the cache.
fn system_text(system: &Value, path: &str, notes: &mut Notes) -> Result<String, ApiError> {
    let blocks: Vec<String> = match system {
        Value::Array(blocks) => {
            let mut texts = vec![];
            for (i, block) in blocks.iter().enumerate() {
                texts.push(content_text(&json!([block]), &format!("{path}[{i}]"), notes).map_err(|error| {
                    // The block stood in a list of one.
                    error.at(&format!("{path}[{i}]"))
                })?);
            }
            texts
        }
        other => vec![content_text(other, path, notes)?],
    };
    // It has a block of its own, mostly the first.
    let blocks = blocks.iter().filter_map(|block| {
        let rest = without_billing(block);
        (rest.len() == block.len() || !rest.is_empty()).then_some(rest)
    });
    let text = blocks.collect::<Vec<_>>().join("\n");
    let mut lines = text.split_inclusive('\n').peekable();
    let mut dates = vec![];
    let mut n_front = 0;
    while let Some(line) = lines.peek() {
        let is_date = is_date_header(line);
        if !is_date && !line.trim_start().starts_with(BILLING) {
            break;
        }
        dates.extend(is_date.then(|| line.trim()));
        n_front += line.len();
        lines.next();
    }
    let rest = &text[n_front..];
    Ok(match (rest.trim().is_empty(), dates.is_empty()) {
        (_, true) => rest.to_owned(),
        (true, false) => dates.join("\n"),
        (false, false) => format!("{rest}\n{}", dates.join("\n")),
    })
}

/// A block of the system text without its first lines, if they are for the vendor's accounts.
fn without_billing(block: &str) -> &str {
    let mut rest = block;
    while rest.trim_start().starts_with(BILLING) {
        rest = rest.trim_start().split_once('\n').map_or("", |(_, rest)| rest);
    }
    rest
}

/// A line such as `Today's date: 2026-11-26`.
fn is_date_header(line: &str) -> bool {
    let lower = line.trim().to_lowercase();
    let starts =
        ["date:", "today's date", "current date", "the current date", "current time", "the current time", "x-date"];
    lower.len() < 100
        && lower.contains(|c: char| c.is_ascii_digit())
        && starts.iter().any(|start| lower.starts_with(start))
}

/// A tool; `None` for those that the vendor runs.
fn read_tool(tool: &Value, path: &str, notes: &mut Notes) -> Result<Option<Tool>, ApiError> {
    let map = object(tool, path)?;
    let kind = kind(map, "custom", path)?;
    if kind == "custom" || map.contains_key("input_schema") {
        if optional(map, "input_schema").is_none() {
            return Err(missing(&format!("{path}.input_schema")));
        }
        return Tool::function(map, "input_schema", path).map(Some);
    }
    // Tools of the vendor's making that the client runs.
    let text = json!({"type": "string"});
    let properties = match kind.split_once('_').map_or(kind, |(name, _)| name) {
        "bash" => json!({"command": text, "restart": {"type": "boolean"}}),
        "text" => json!({
            "command": {"enum": ["view", "create", "str_replace", "insert"]}, "path": text, "file_text": text,
            "old_str": text, "new_str": text, "insert_line": {"type": "integer"}, "insert_text": text,
            "view_range": {"type": "array", "items": {"type": "integer"}},
        }),
        "memory" => json!({
            "command": {"enum": ["view", "create", "str_replace", "insert", "delete", "rename"]}, "path": text,
            "file_text": text, "old_str": text, "new_str": text, "insert_line": {"type": "integer"}, "insert_text": text,
            "old_path": text, "new_path": text,
        }),
        _ => {
            notes.add(format!("the tool of type {kind:?} was left out: this server does not run such tools"));
            return Ok(None);
        }
    };
    let name = required_text(map, "name", path)?;
    let definition = json!({"name": name, "parameters": {"type": "object", "properties": properties}});
    Tool::function(object(&definition, path)?, "parameters", path).map(Some)
}

/// A message as chat templates expect it; results of tools become messages of their own, before the user's text.
fn add_message(
    message: &Value,
    path: &str,
    conversation: &mut Conversation,
    places: &HashMap<String, usize>,
) -> Result<(), ApiError> {
    let map = object(message, path)?;
    let role = match required_text(map, "role", path)? {
        role @ ("user" | "assistant" | "system") => role,
        other => {
            let message = format!("role is {other:?}, expected \"user\" or \"assistant\"");
            return Err(ApiError::invalid(&format!("{path}.role"), message));
        }
    };
    let path = format!("{path}.content");
    let content = map.get("content").ok_or_else(|| missing(&path))?;
    let blocks = match content {
        Value::Array(blocks) => blocks.as_slice(),
        Value::String(_) => &[],
        other => return Err(expected(&path, other, "a text or a list of content blocks")),
    };
    let mut texts: Vec<String> = content.as_str().map(str::to_owned).into_iter().collect();
    let (mut reasoning, mut calls, mut has_results) = (String::new(), vec![], false);
    for (i, block) in blocks.iter().enumerate() {
        let path = format!("{path}[{i}]");
        let map = object(block, &path)?;
        match kind(map, "", &path)? {
            "thinking" => reasoning.push_str(required_text(map, "thinking", &path)?),
            "tool_use" if role == "assistant" => {
                let input = match map.get("input") {
                    None | Some(Value::Null) => json!({}),
                    Some(Value::Object(input)) => Value::Object(input.clone()),
                    Some(other) => return Err(expected(&format!("{path}.input"), other, "an object")),
                };
                calls.push(json!({
                    "id": required_text(map, "id", &path)?, "type": "function",
                    "function": {"name": required_text(map, "name", &path)?, "arguments": input},
                }));
            }
            "tool_result" => {
                let id = required_text(map, "tool_use_id", &path)?;
                let inner = map.get("content").unwrap_or(&Value::Null);
                let mut text = result_text(inner, &format!("{path}.content"), conversation, places)?;
                if map.get("is_error") == Some(&Value::Bool(true)) {
                    text = format!("Error: {text}");
                }
                conversation.messages.push(json!({"role": "tool", "content": text, "tool_call_id": id}));
                has_results = true;
            }
            "tool_reference" => texts.push(referred(map, &path, conversation, places)?),
            _ => texts.extend(part_text(block, &path, &mut conversation.notes)?),
        }
    }
    let text = texts.join("\n");
    if role == "assistant" {
        let mut value = json!({"role": role, "content": text});
        if let Some((thought, answer)) = split_reasoning(&text).filter(|_| reasoning.is_empty()) {
            value = json!({"role": role, "content": answer, "reasoning_content": thought});
        } else if !reasoning.is_empty() {
            value["reasoning_content"] = json!(reasoning);
        }
        if !calls.is_empty() {
            value["tool_calls"] = json!(calls);
        }
        conversation.messages.push(value);
    } else if !has_results || !text.is_empty() {
        conversation.messages.push(json!({"role": role, "content": text}));
    }
    Ok(())
}

/// The text of a tool's result, with the definitions of the tools that it refers to.
fn result_text(
    content: &Value,
    path: &str,
    conversation: &mut Conversation,
    places: &HashMap<String, usize>,
) -> Result<String, ApiError> {
    let Value::Array(parts) = content else { return content_text(content, path, &mut conversation.notes) };
    let mut texts = vec![];
    for (i, part) in parts.iter().enumerate() {
        let path = format!("{path}[{i}]");
        match part.as_object().filter(|map| map.get("type").is_some_and(|kind| kind == "tool_reference")) {
            Some(map) => texts.push(referred(map, &path, conversation, places)?),
            None => texts.extend(part_text(part, &path, &mut conversation.notes)?),
        }
    }
    Ok(texts.join("\n"))
}

/// The block being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    Nothing,
    Thinking,
    Text,
    ToolUse,
}

/// Numbers the blocks of a stream and closes each before the next.
struct Writer<'a> {
    events: &'a Events,
    open: Open,
    index: usize,
    /// Of the open thinking block.
    thinking: Sha256,
}

impl Writer<'_> {
    async fn event(&self, value: Value) -> Result<(), Gone> {
        let name = value["type"].as_str().unwrap_or_default().to_owned();
        send(self.events, Event::default().event(name).data(value.to_string())).await
    }

    async fn close(&mut self) -> Result<(), Gone> {
        if self.open == Open::Thinking {
            let hash = std::mem::take(&mut self.thinking).finalize();
            let signature: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
            self.delta(json!({"type": "signature_delta", "signature": signature})).await?;
        }
        if self.open != Open::Nothing {
            self.event(json!({"type": "content_block_stop", "index": self.index})).await?;
            self.index += 1;
            self.open = Open::Nothing;
        }
        Ok(())
    }

    /// Makes sure that a block of this kind is open.
    async fn within(&mut self, open: Open, block: Value) -> Result<(), Gone> {
        if self.open != open || open == Open::ToolUse {
            self.close().await?;
            self.event(json!({"type": "content_block_start", "index": self.index, "content_block": block})).await?;
            self.open = open;
        }
        Ok(())
    }

    async fn delta(&self, delta: Value) -> Result<(), Gone> {
        self.event(json!({"type": "content_block_delta", "index": self.index, "delta": delta})).await
    }

    async fn write(&mut self, delta: Delta) -> Result<(), Gone> {
        match delta {
            Delta::Reasoning(text) => {
                self.within(Open::Thinking, json!({"type": "thinking", "thinking": "", "signature": ""})).await?;
                self.thinking.update(&text);
                self.delta(json!({"type": "thinking_delta", "thinking": text})).await
            }
            Delta::Content(text) => {
                self.within(Open::Text, json!({"type": "text", "text": ""})).await?;
                self.delta(json!({"type": "text_delta", "text": text})).await
            }
            Delta::Call { name } => {
                let block = json!({"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}});
                self.within(Open::ToolUse, block).await
            }
            Delta::Arguments(json) => self.delta(json!({"type": "input_json_delta", "partial_json": json})).await,
            Delta::EndCall => self.close().await,
        }
    }
}

async fn write(events: &Events, mut generation: Generation, id: &str, model: &str) -> Result<(), Gone> {
    let mut writer = Writer { events, open: Open::Nothing, index: 0, thinking: Sha256::new() };
    let mut is_started = false;
    loop {
        let next = timeout_at(Instant::now() + PING, generation.next()).await;
        if !is_started {
            is_started = true;
            let mut usage = usage_json(&generation.usage());
            usage["output_tokens"] = json!(0);
            let message = json!({
                "id": id, "type": "message", "role": "assistant", "model": model, "content": [],
                "stop_reason": null, "stop_sequence": null, "usage": usage,
            });
            if !matches!(next, Ok(Some(Err(_)))) {
                writer.event(json!({"type": "message_start", "message": message})).await?;
            }
        }
        let chunk = match next {
            Err(_) => {
                writer.event(json!({"type": "ping"})).await?;
                continue;
            }
            Ok(None) => return Ok(()),
            Ok(Some(Err(error))) => return writer.event(error.anthropic_body()).await,
            Ok(Some(Ok(chunk))) => chunk,
        };
        for delta in chunk.deltas {
            writer.write(delta).await?;
        }
        if let Some(finish) = chunk.finish {
            writer.close().await?;
            let (stop_reason, stop_sequence) = stop_reason(Some(&finish));
            let delta = json!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
            let usage = usage_json(&generation.usage());
            writer.event(json!({"type": "message_delta", "delta": delta, "usage": usage})).await?;
            writer.event(json!({"type": "message_stop"})).await?;
        }
    }
}
