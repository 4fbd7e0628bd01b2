//! OpenAI's /v1/responses: conversations that can be continued by the id of an answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tandem_engine::SamplingOverrides;
use tandem_text::dialect::Delta;
use tandem_text::template_call;
use tokio::time::{Instant, timeout_at};
use utoipa::ToSchema;

use crate::api::{Count, Integer, Seed, StreamEvent, TokenLogprob, Usage, sampling};
use crate::app::App;
use crate::body::{Body, Fields};
use crate::chat::{Events, Gone, custom_input, read_reasoning, send, stream};
use crate::conversation::{
    Choice, Conversation, Notes, Tool, ToolKind, content_text, custom_call, function_call, read_format, reference,
    split_reasoning,
};
use crate::error::{ApiError, ErrorResponse};
use crate::fields::{self, Table};
use crate::generation::{Ask, Finish, Generation, new_id, now};
use crate::read::{expected, kind, list, missing, object, optional, optional_text, required_text};
use crate::store::Stored;
use crate::strict::objects;

objects!(ResponsesRequest);

/// While nothing is to be said an event comes this often: clients count events, not comments.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// What marks the reasoning that we gave out for clients that keep nothing else of it.
const SEALED: &str = "tandem:";

/// A conversation to continue, in the form of OpenAI's Responses.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct ResponsesRequest {
    model: Option<String>,
    /// A text, or items: messages, reasoning, calls, their outputs, and references to items.
    #[schema(value_type = InputDocument)]
    input: Option<Value>,
    /// System message.
    #[schema(value_type = Option<String>)]
    instructions: Option<Value>,
    stream: Option<bool>,
    /// Tokens to generate at most.
    #[schema(value_type = Option<u32>, minimum = 1)]
    max_output_tokens: Option<Count>,
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// 0 or -1 considers every token.
    #[schema(value_type = Option<i32>, minimum = -1)]
    top_k: Option<Integer>,
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    #[schema(value_type = Option<i64>)]
    seed: Option<Seed>,
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    #[schema(minimum = 0.01, maximum = 100)]
    repetition_penalty: Option<f32>,
    /// Likeliest tokens of which log-probabilities are returned.
    #[schema(value_type = Option<u32>, minimum = 0, maximum = 20)]
    top_logprobs: Option<Count>,
    #[schema(value_type = Option<Vec<FlatTool>>)]
    tools: Option<Vec<Value>>,
    #[schema(value_type = Option<Object>)]
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    #[schema(value_type = Option<Object>)]
    reasoning: Option<Value>,
    #[schema(value_type = Option<Object>)]
    text: Option<Value>,
    /// Further parts of the answer: "reasoning.encrypted_content", "message.output_text.logprobs".
    #[schema(value_type = Option<Vec<String>>)]
    include: Option<Vec<Value>>,
    /// Whether the answer can be continued by its id; it can if not given.
    store: Option<bool>,
    /// The answer that this request continues.
    previous_response_id: Option<String>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Value>,
    /// "auto": the oldest messages go where the context does not hold all; "disabled" if not given.
    truncation: Option<String>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Fields that have no effect, for the answer to repeat.
    #[serde(flatten)]
    #[schema(ignore)]
    others: Map<String, Value>,
}

impl Fields for ResponsesRequest {
    const TABLE: Option<&'static Table> = Some(&fields::RESPONSES);
}

/// The types that only the OpenAPI document has.
mod document {
    #![allow(dead_code)]
    use super::*;

    #[derive(ToSchema)]
    #[serde(untagged)]
    pub(crate) enum InputDocument {
        Text(String),
        Items(Vec<ItemDocument>),
    }

    #[derive(ToSchema)]
    #[serde(tag = "type", rename_all = "snake_case")]
    pub(crate) enum ItemDocument {
        Message { role: ItemRole, content: String },
        Reasoning {},
        FunctionCall { call_id: String, name: String, arguments: String },
        FunctionCallOutput { call_id: String, output: String },
    }

    #[derive(ToSchema)]
    #[serde(rename_all = "lowercase")]
    pub(crate) enum ItemRole {
        System,
        Developer,
        User,
        Assistant,
    }

    #[derive(ToSchema)]
    pub(crate) struct FlatTool {
        r#type: FlatToolType,
        #[schema(min_length = 1)]
        name: String,
        description: Option<String>,
        #[schema(value_type = Option<Object>)]
        parameters: Option<Map<String, Value>>,
    }

    #[derive(ToSchema)]
    #[serde(rename_all = "lowercase")]
    pub(crate) enum FlatToolType {
        Function,
    }
}
use document::*;

/// Continues a conversation.
#[utoipa::path(
    post, path = "/v1/responses", tag = "OpenAI", request_body = ResponsesRequest,
    responses(
        (status = 200, description = "The answer, or its events", content(
            (Object = "application/json"), (StreamEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
        (status = "5XX", description = "The engine is not there, or too slow", body = ErrorResponse),
    )
)]
pub(crate) async fn responses(State(app): State<Arc<App>>, body: Body<ResponsesRequest>) -> Result<Response, ApiError> {
    let Body { value: request, notes, admitted } = body;
    app.check_model(request.model.as_deref())?;
    app.worker.check_open()?;
    let is_stream = request.stream == Some(true);
    let input = input_items(&app, &request)?;
    let mut conversation = read(&request, &input, notes)?;
    let includes = |what: &str| request.include.iter().flatten().any(|included| included == what);
    let output = Output {
        id: new_id("resp_"),
        created: now(),
        head: head(&app, &request),
        items: vec![],
        sequence: 0,
        events: None,
        tools: conversation.tools.clone().into(),
        shows_logprobs: request.top_logprobs.is_some() || includes("message.output_text.logprobs"),
        seals_reasoning: includes("reasoning.encrypted_content"),
        logprobs: vec![],
        arguments: String::new(),
        input: (request.store != Some(false)).then_some(input),
    };
    let started = ask(&app, &request, &mut conversation, output.shows_logprobs).and_then(|ask| app.start(ask));
    drop(admitted);
    let mut generations = match started {
        Ok(generations) => generations,
        // Clients that stream look for this one in the stream.
        Err(error) if is_stream && error.code() == Some("context_length_exceeded") => {
            let response = stream(&app, move |events| async move {
                let mut output = Output { events: Some(events), ..output };
                let _ = output.fail_at_once(&error).await;
            });
            return Ok(conversation.notes.on(response));
        }
        Err(error) => return Err(error),
    };
    let generation = generations.remove(0);
    if is_stream {
        let kept = Arc::clone(&app);
        let response = stream(&app, move |events| async move {
            let mut output = Output { events: Some(events), ..output };
            let _ = output.run(&kept, generation).await;
        });
        return Ok(conversation.notes.on(response));
    }
    let mut output = output;
    match output.run(&app, generation).await {
        Ok(Ok(response)) => Ok(conversation.notes.on(axum::Json(response).into_response())),
        Ok(Err(error)) => Err(error),
        Err(Gone) => Err(ApiError::internal("the client is gone")),
    }
}

/// An answer that was given out.
#[utoipa::path(get, path = "/v1/responses/{id}", tag = "OpenAI", params(("id" = String, Path)), responses(
    (status = 200, description = "The answer", body = Object),
    (status = "4XX", description = "It is not kept", body = ErrorResponse),
))]
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let stored = app.store.get(&id).ok_or_else(|| ApiError::unknown_id("response_id", "Response", &id))?;
    Ok(axum::Json(stored.response))
}

/// Forgets an answer.
#[utoipa::path(delete, path = "/v1/responses/{id}", tag = "OpenAI", params(("id" = String, Path)), responses(
    (status = 200, description = "It is forgotten", body = Object),
    (status = "4XX", description = "It is not kept", body = ErrorResponse),
))]
pub(crate) async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    match app.store.remove(&id) {
        true => Ok(axum::Json(json!({"id": id, "object": "response", "deleted": true}))),
        false => Err(ApiError::unknown_id("response_id", "Response", &id)),
    }
}

/// Input of an answer that was given out.
#[utoipa::path(get, path = "/v1/responses/{id}/input_items", tag = "OpenAI", params(("id" = String, Path)), responses(
    (status = 200, description = "The items", body = Object),
    (status = "4XX", description = "It is not kept", body = ErrorResponse),
))]
pub(crate) async fn input_of(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let stored = app.store.get(&id).ok_or_else(|| ApiError::unknown_id("response_id", "Response", &id))?;
    // The last first, as OpenAI does.
    let items: Vec<&Value> = stored.input.iter().rev().collect();
    let id_of = |item: Option<&&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    Ok(axum::Json(json!({
        "object": "list", "data": items, "first_id": id_of(items.first()), "last_id": id_of(items.last()), "has_more": false,
    })))
}

/// Answers are not written in the background, and cannot be stopped by another request.
pub(crate) async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let known = app.store.get(&id);
    known.ok_or_else(|| ApiError::unknown_id("response_id", "Response", &id))?;
    Err(ApiError::invalid("response_id", "only a response with background true can be cancelled; close the connection"))
}

/// The whole input as items with ids: of the answers before, then this request's, with its references looked up.
fn input_items(app: &App, request: &ResponsesRequest) -> Result<Vec<Value>, ApiError> {
    let mut items: Vec<Value> = vec![];
    if let Some(id) = request.previous_response_id.as_deref().filter(|id| !id.is_empty()) {
        let stored = app.store.get(id).ok_or_else(|| {
            let message = format!("Previous response with id '{id}' not found.");
            ApiError::invalid("previous_response_id", message).with_code("previous_response_not_found")
        })?;
        items.extend(stored.input);
        items.extend(stored.response["output"].as_array().cloned().unwrap_or_default());
    }
    let n_earlier = items.len();
    // A body may refer to the same large item again and again, and to many of one answer.
    let mut known: HashMap<String, Value> = HashMap::new();
    let remember = |item: &Value, known: &mut HashMap<String, Value>| {
        if let Some(id) = item["id"].as_str().filter(|id| !known.contains_key(*id)) {
            known.insert(id.to_owned(), item.clone());
        }
    };
    let has_references = matches!(&request.input, Some(Value::Array(given)) if given.iter().any(is_reference));
    items.iter().filter(|_| has_references).for_each(|item| remember(item, &mut known));
    let mut n_bytes = 0;
    match &request.input {
        None if n_earlier == 0 => return Err(missing("input")),
        None => {}
        Some(Value::String(text)) => items.push(json!({
            "type": "message", "role": "user", "content": [{"type": "input_text", "text": text}],
        })),
        Some(Value::Array(given)) => {
            for (i, item) in given.iter().enumerate() {
                let path = format!("input[{i}]");
                let map = object(item, &path)?;
                if !is_reference(item) {
                    if has_references {
                        remember(item, &mut known);
                    }
                    items.push(item.clone());
                    continue;
                }
                let path = format!("{path}.id");
                let id = reference(map.get("id").ok_or_else(|| missing(&path))?, &path)?;
                if !known.contains_key(id) {
                    let beside = app.store.items_beside(id).unwrap_or_default();
                    beside.iter().for_each(|item| remember(item, &mut known));
                }
                let found = known.get(id).ok_or_else(|| ApiError::unknown_id(&path, "Item", id))?;
                n_bytes += found.to_string().len();
                if n_bytes > app.max_body_bytes {
                    let message = format!(
                        "the items that input refers to have more than {} MB together; refer to fewer",
                        app.max_body_bytes >> 20
                    );
                    return Err(ApiError::invalid("input", message));
                }
                items.push(found.clone());
            }
        }
        Some(other) => return Err(expected("input", other, "a text or a list of items")),
    }
    for item in items.iter_mut().skip(n_earlier) {
        if let Value::Object(map) = item
            && !map.get("id").is_some_and(Value::is_string)
        {
            map.insert("id".into(), json!(new_id("item_")));
        }
    }
    Ok(items)
}

/// Whether an item only names another one.
fn is_reference(item: &Value) -> bool {
    match item.get("type") {
        Some(kind) => kind == "item_reference",
        None => item.get("id").is_some() && item.get("role").is_none(),
    }
}

/// What every form of the response repeats of its request.
fn head(app: &App, request: &ResponsesRequest) -> Map<String, Value> {
    let sampling = app.defaults.apply(&SamplingOverrides {
        temperature: request.temperature,
        top_p: request.top_p,
        ..SamplingOverrides::default()
    });
    let other = |key: &str| request.others.get(key).cloned().unwrap_or(Value::Null);
    let mut text = request.text.clone().filter(Value::is_object).unwrap_or_else(|| json!({}));
    if text["format"].is_null() {
        text["format"] = json!({"type": "text"});
    }
    let mut reasoning = json!({"effort": null, "summary": null});
    for (key, value) in request.reasoning.as_ref().and_then(Value::as_object).into_iter().flatten() {
        reasoning[key] = value.clone();
    }
    let head = json!({
        "model": app.model_name(),
        "background": false,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens.map(|n| n.0),
        "max_tool_calls": other("max_tool_calls"),
        "metadata": request.metadata.clone().unwrap_or_else(|| json!({})),
        "parallel_tool_calls": request.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": other("prompt_cache_key"),
        "reasoning": reasoning,
        "safety_identifier": other("safety_identifier"),
        "service_tier": "default",
        "store": request.store.unwrap_or(true),
        "temperature": round(sampling.temperature),
        "text": text,
        "tool_choice": request.tool_choice.clone().unwrap_or_else(|| json!("auto")),
        "tools": request.tools.clone().unwrap_or_default(),
        "top_logprobs": request.top_logprobs.map_or(0, |n| n.0),
        "top_p": round(sampling.top_p),
        "truncation": request.truncation.as_deref().unwrap_or("disabled"),
        "user": other("user"),
    });
    match head {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// A number in as many digits as it was given.
fn round(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |value| json!(value))
}

fn read(request: &ResponsesRequest, input: &[Value], notes: Notes) -> Result<Conversation, ApiError> {
    if request.max_output_tokens == Some(Count(0)) {
        return Err(ApiError::invalid("max_output_tokens", "max_output_tokens is 0, expected at least 1"));
    }
    if let Some(truncation) = request.truncation.as_deref()
        && !["auto", "disabled"].contains(&truncation)
    {
        let message = format!("truncation is {truncation:?}, expected \"auto\" or \"disabled\"");
        return Err(ApiError::invalid("truncation", message));
    }
    let mut conversation = Conversation { notes, param: "input", ..Conversation::default() };
    match &request.instructions {
        None => {}
        Some(Value::Array(items)) => add_items(items, "instructions", &mut conversation)?,
        Some(text) => {
            let text = content_text(text, "instructions", &mut conversation.notes)?;
            conversation.messages.push(json!({"role": "system", "content": text}));
        }
    }
    add_items(input, "input", &mut conversation)?;
    let mut tools = vec![];
    for (i, tool) in request.tools.iter().flatten().enumerate() {
        read_tool(tool, &format!("tools[{i}]"), None, &mut tools, &mut conversation.notes)?;
    }
    conversation.set_tools(tools)?;
    rename_calls(&mut conversation);
    conversation.choice =
        request.tool_choice.as_ref().map(|c| Choice::read(c, "tool_choice")).transpose()?.unwrap_or_default();
    conversation.one_call = request.parallel_tool_calls == Some(false);
    if let Some(text) = &request.text {
        let format = optional(object(text, "text")?, "format");
        conversation.form = format.map(|format| read_format(format, "text.format")).transpose()?.flatten();
    }
    if let Some(reasoning) = &request.reasoning {
        conversation.thinking = read_reasoning(reasoning, "reasoning")?;
    }
    conversation.variables = request.chat_template_kwargs.clone().unwrap_or_default();
    Ok(conversation)
}

/// A tool; those in a namespace one by one, and none for those that a vendor would run.
fn read_tool(
    tool: &Value,
    path: &str,
    namespace: Option<&str>,
    tools: &mut Vec<Tool>,
    notes: &mut Notes,
) -> Result<(), ApiError> {
    let map = object(tool, path)?;
    match kind(map, "function", path)? {
        "function" => {
            // Chat's form is taken as well.
            let inner = format!("{path}.function");
            let tool = match optional(map, "function") {
                Some(function) => Tool::function(object(function, &inner)?, "parameters", &inner)?,
                None => Tool::function(map, "parameters", path)?,
            };
            tools.push(Tool { namespace: namespace.map(str::to_owned), ..tool });
        }
        "custom" => tools.push(Tool { namespace: namespace.map(str::to_owned), ..Tool::custom(map, path)? }),
        "namespace" => {
            let name = required_text(map, "name", path)?;
            let inner = format!("{path}.tools");
            for (i, tool) in list(map.get("tools").ok_or_else(|| missing(&inner))?, &inner)?.iter().enumerate() {
                read_tool(tool, &format!("{inner}[{i}]"), Some(name), tools, notes)?;
            }
        }
        other => {
            notes.add(format!("the tool of type {other:?} was left out: this server does not run such tools"));
        }
    }
    Ok(())
}

/// Earlier calls of namespaced tools go by the name that the model knows.
fn rename_calls(conversation: &mut Conversation) {
    let tools = conversation.tools.iter().rev();
    let names: HashMap<(&str, &str), &str> =
        tools.filter_map(|tool| Some(((tool.namespace.as_deref()?, &*tool.client_name), &*tool.name))).collect();
    for call in conversation.messages.iter_mut().filter_map(|m| m["tool_calls"].as_array_mut()).flatten() {
        let Value::Object(map) = call else { continue };
        let Some(Value::String(namespace)) = map.remove("namespace") else { continue };
        if let Some(function) = map.get_mut("function")
            && let Some(name) = function["name"].as_str().and_then(|name| names.get(&(&*namespace, name)))
        {
            function["name"] = json!(name);
        }
    }
}

fn ask(
    app: &App,
    request: &ResponsesRequest,
    conversation: &mut Conversation,
    shows_logprobs: bool,
) -> Result<Ask, ApiError> {
    if let Some(Count(n)) = request.top_logprobs.filter(|n| n.0 > 20) {
        return Err(ApiError::invalid("top_logprobs", format!("top_logprobs is {n}, expected 0 to 20")));
    }
    let overrides = SamplingOverrides {
        top_p: request.top_p,
        min_p: request.min_p,
        presence_penalty: request.presence_penalty,
        frequency_penalty: request.frequency_penalty,
        seed: request.seed.map(|seed| seed.0),
        ..sampling(request.temperature, request.top_k, request.repetition_penalty)?
    };
    let made = match checked(app, conversation) {
        Err(error)
            if error.code() == Some("context_length_exceeded") && request.truncation.as_deref() == Some("auto") =>
        {
            shortened(app, conversation).ok_or(error)?
        }
        made => made?,
    };
    Ok(Ask {
        max_tokens: request.max_output_tokens.map(|n| n.0),
        overrides,
        top_logprobs: shows_logprobs.then(|| request.top_logprobs.map_or(0, |n| n.0 as usize)),
        ..made
    })
}

/// The prompt of a conversation, if the context holds it.
fn checked(app: &App, conversation: &mut Conversation) -> Result<Ask, ApiError> {
    conversation.ask(app).and_then(|ask| app.check_prompt(&ask, &ask.prompt).map(|()| ask))
}

/// The prompt without the oldest turns, from one message of the user to the next; no more than needed go. The number is
/// found by halving: a long conversation is not read again for each turn.
fn shortened(app: &App, conversation: &mut Conversation) -> Option<Ask> {
    let all = std::mem::take(&mut conversation.messages);
    let first = all.iter().position(|m| m["role"] != "system").unwrap_or(all.len());
    let starts: Vec<usize> = (first + 1..all.len()).filter(|i| all[*i]["role"] == "user").collect();
    let (mut low, mut high, mut made) = (0, starts.len(), None);
    while low < high {
        let middle = low + (high - low) / 2;
        conversation.messages = [&all[..first], &all[starts[middle]..]].concat();
        match checked(app, conversation) {
            Ok(ask) => {
                made = Some(ask);
                high = middle;
            }
            Err(_) => low = middle + 1,
        }
    }
    if made.is_some() {
        conversation.notes.add("the oldest messages were left out, since the context does not hold them (truncation)");
    }
    made
}

/// Adds items as chat templates expect them: reasoning and calls belong to the assistant's message beside them.
fn add_items(items: &[Value], path: &str, conversation: &mut Conversation) -> Result<(), ApiError> {
    for (i, item) in items.iter().enumerate() {
        add_item(item, &format!("{path}[{i}]"), conversation)?;
    }
    Ok(())
}

fn add_item(item: &Value, path: &str, conversation: &mut Conversation) -> Result<(), ApiError> {
    let map = object(item, path)?;
    let Conversation { messages, notes, .. } = conversation;
    let default = if map.contains_key("role") { "message" } else { "" };
    match kind(map, default, path)? {
        "message" => return add_message(map, path, messages, notes),
        "function_call_output"
        | "custom_tool_call_output"
        | "local_shell_call_output"
        | "shell_call_output"
        | "apply_patch_call_output"
        | "mcp_tool_call_output" => {
            let output = match map.get("output") {
                Some(Value::Object(output)) => match output.get("content").or(output.get("body")) {
                    Some(content) => content_text(content, &format!("{path}.output"), notes)?,
                    None => Value::Object(output.clone()).to_string(),
                },
                Some(output) => content_text(output, &format!("{path}.output"), notes)?,
                None => String::new(),
            };
            let id = optional_text(map, "call_id", path)?.unwrap_or_default();
            messages.push(json!({"role": "tool", "content": output, "tool_call_id": id}));
        }
        "reasoning" => {
            let mut texts = String::new();
            for key in ["content", "summary"] {
                if texts.is_empty()
                    && let Some(parts) = optional(map, key)
                {
                    texts = content_text(parts, &format!("{path}.{key}"), notes)?;
                }
            }
            let sealed = optional_text(map, "encrypted_content", path)?.and_then(|text| text.strip_prefix(SEALED));
            if let Some(text) = sealed {
                texts = unseal(text).unwrap_or(texts);
            }
            assistant(messages)["reasoning_content"] = json!(texts);
        }
        kind @ ("function_call" | "custom_tool_call") => {
            let id = optional_text(map, "call_id", path)?.unwrap_or_default();
            let mut call = match kind {
                "function_call" => function_call(map, id, path)?,
                _ => custom_call(map, id, path)?,
            };
            if let Some(namespace) = optional_text(map, "namespace", path)? {
                call["namespace"] = json!(namespace);
            }
            add_call(call, messages);
        }
        kind @ ("local_shell_call" | "shell_call" | "apply_patch_call") => {
            let action = optional(map, "action").or(optional(map, "operation")).unwrap_or(&Value::Null);
            let name = kind.trim_end_matches("_call");
            let id = optional_text(map, "call_id", path)?.unwrap_or_default();
            add_call(template_call(id, name, &action.to_string()), messages);
        }
        "" => {
            let message = "an item has neither type nor role; expected a message, a call, an output or a reference";
            return Err(ApiError::invalid(path, message));
        }
        other => {
            // Calls of a vendor's tools and their results, shortened conversations that only the vendor can read.
            notes.add(format!("the item of type {other:?} was left out: this server does not run such tools"));
        }
    }
    Ok(())
}

/// The assistant's message at the end, a new one if there is none.
fn assistant(messages: &mut Vec<Value>) -> &mut Value {
    if messages.last().is_none_or(|m| m["role"] != "assistant") {
        messages.push(json!({"role": "assistant", "content": ""}));
    }
    let last = messages.len() - 1;
    &mut messages[last]
}

fn add_call(call: Value, messages: &mut Vec<Value>) {
    let last = assistant(messages);
    match last["tool_calls"].as_array_mut() {
        Some(calls) => calls.push(call),
        None => last["tool_calls"] = json!([call]),
    }
}

fn add_message(
    map: &Map<String, Value>,
    path: &str,
    messages: &mut Vec<Value>,
    notes: &mut Notes,
) -> Result<(), ApiError> {
    let role = match required_text(map, "role", path)? {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        other => {
            let message = format!("role is {other:?}, expected system, developer, user or assistant");
            return Err(ApiError::invalid(&format!("{path}.role"), message));
        }
    };
    let content = map.get("content").ok_or_else(|| missing(&format!("{path}.content")))?;
    let mut text = content_text(content, &format!("{path}.content"), notes)?;
    let mut reasoning = None;
    if role == "assistant"
        && let Some((thought, answer)) = split_reasoning(&text)
    {
        (reasoning, text) = (Some(thought.to_owned()), answer.to_owned());
    }
    // The reasoning of an answer comes as an item before it.
    match messages.last_mut() {
        Some(last)
            if role == "assistant" && last["role"] == role && last["content"] == "" && last["tool_calls"].is_null() =>
        {
            last["content"] = json!(text);
        }
        _ => messages.push(json!({"role": role, "content": text})),
    }
    if let Some(reasoning) = reasoning {
        assistant(messages)["reasoning_content"] = json!(reasoning);
    }
    Ok(())
}

/// Text in a form that clients pass through; it hides nothing.
fn seal(text: &str) -> String {
    SEALED.to_owned() + &text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>()
}

fn unseal(sealed: &str) -> Option<String> {
    let byte = |i: usize| u8::from_str_radix(sealed.get(i..i + 2)?, 16).ok();
    String::from_utf8((0..sealed.len() / 2).map(|i| byte(2 * i)).collect::<Option<_>>()?).ok()
}

/// A response being written, with its events if they are wanted.
struct Output {
    id: String,
    created: u64,
    /// What is repeated of the request.
    head: Map<String, Value>,
    items: Vec<Value>,
    sequence: u64,
    events: Option<Events>,
    tools: Arc<[Tool]>,
    shows_logprobs: bool,
    seals_reasoning: bool,
    /// Of the next piece of text.
    logprobs: Vec<TokenLogprob>,
    /// So far, of a custom tool's call.
    arguments: String,
    /// To be kept with the answer.
    input: Option<Vec<Value>>,
}

impl Output {
    async fn run(&mut self, app: &App, mut generation: Generation) -> Result<Result<Value, ApiError>, Gone> {
        self.open().await?;
        let mut status = ("completed", None);
        loop {
            let next = if self.events.is_some() {
                match timeout_at(Instant::now() + KEEP_ALIVE, generation.next()).await {
                    Ok(next) => next,
                    Err(_) => {
                        let response = self.response("in_progress", None);
                        self.event("response.in_progress", json!({"response": response})).await?;
                        continue;
                    }
                }
            } else {
                generation.next().await
            };
            let Some(chunk) = next else { break };
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    self.fail(&error).await?;
                    return Ok(Err(error));
                }
            };
            if self.shows_logprobs {
                self.logprobs.extend(chunk.logprobs.into_iter().filter(|token| !token.is_reasoning));
            }
            for delta in chunk.deltas {
                self.delta(delta).await?;
            }
            if chunk.finish == Some(Finish::Length) {
                status = ("incomplete", Some(json!({"reason": "max_output_tokens"})));
            }
        }
        self.close(status.0).await?;
        let mut response = self.response(status.0, Some(generation.usage()));
        response["incomplete_details"] = json!(status.1);
        if status.0 == "completed" {
            response["completed_at"] = json!(now());
        }
        // It can be continued as soon as the client knows its id.
        if let Some(input) = self.input.take() {
            app.store.put(&self.id, &Stored { input, response: response.clone() });
        }
        self.event(&format!("response.{}", status.0), json!({"response": response})).await?;
        Ok(Ok(response))
    }

    async fn open(&mut self) -> Result<(), Gone> {
        let response = self.response("in_progress", None);
        self.event("response.created", json!({"response": response})).await?;
        self.event("response.in_progress", json!({"response": response})).await
    }

    async fn fail(&mut self, error: &ApiError) -> Result<(), Gone> {
        let mut response = self.response("failed", None);
        response["error"] = json!({"code": error.code().unwrap_or("server_error"), "message": error.message()});
        self.event("response.failed", json!({"response": response})).await
    }

    async fn fail_at_once(&mut self, error: &ApiError) -> Result<(), Gone> {
        self.open().await?;
        self.fail(error).await
    }

    fn response(&self, status: &str, usage: Option<Usage>) -> Value {
        let usage = usage.map(|u| {
            json!({
                "input_tokens": u.prompt_tokens, "output_tokens": u.completion_tokens, "total_tokens": u.total_tokens,
                "input_tokens_details": {"cached_tokens": u.prompt_tokens_details.cached_tokens},
                "output_tokens_details": {"reasoning_tokens": u.completion_tokens_details.reasoning_tokens},
            })
        });
        let mut response = json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "completed_at": null,
            "error": null, "incomplete_details": null, "output": self.items, "usage": usage,
        });
        for (key, value) in &self.head {
            response[key] = value.clone();
        }
        response
    }

    async fn event(&mut self, name: &str, mut value: Value) -> Result<(), Gone> {
        let Some(events) = &self.events else { return Ok(()) };
        value["type"] = json!(name);
        value["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        send(events, Event::default().event(name).data(value.to_string())).await
    }

    fn open_kind(&self) -> Option<&str> {
        let last = self.items.last()?;
        (last["status"] == "in_progress").then(|| last["type"].as_str().unwrap_or_default())
    }

    async fn add(&mut self, item: Value) -> Result<(), Gone> {
        self.items.push(item.clone());
        self.event("response.output_item.added", json!({"output_index": self.items.len() - 1, "item": item})).await
    }

    /// Opens an item with one part of text, unless it is open.
    async fn within(&mut self, kind: &str, item: Value, part: Value) -> Result<(), Gone> {
        if self.open_kind() == Some(kind) {
            return Ok(());
        }
        self.close("completed").await?;
        let mut shown = item.clone();
        shown["content"] = json!([]);
        let id = item["id"].clone();
        self.items.push(item);
        let output_index = self.items.len() - 1;
        self.event("response.output_item.added", json!({"output_index": output_index, "item": shown})).await?;
        let place = json!({"item_id": id, "output_index": output_index, "content_index": 0, "part": part});
        self.event("response.content_part.added", place).await
    }

    /// Appends to the open item's text.
    async fn append(&mut self, name: &str, text: &str) -> Result<(), Gone> {
        let output_index = self.items.len() - 1;
        let item = &mut self.items[output_index];
        if let Value::String(whole) = &mut item["content"][0]["text"] {
            whole.push_str(text);
        }
        let mut place = json!({"item_id": item["id"], "output_index": output_index, "content_index": 0, "delta": text});
        if name == "response.output_text.delta" {
            let logprobs = json!(std::mem::take(&mut self.logprobs));
            if let (Value::Array(all), Value::Array(new)) = (&mut item["content"][0]["logprobs"], &logprobs) {
                all.extend(new.iter().cloned());
            }
            place["logprobs"] = logprobs;
        }
        self.event(name, place).await
    }

    fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    async fn delta(&mut self, delta: Delta) -> Result<(), Gone> {
        match delta {
            Delta::Reasoning(text) => {
                let part = json!({"type": "reasoning_text", "text": ""});
                let item = json!({
                    "type": "reasoning", "id": new_id("rs_"), "status": "in_progress", "summary": [], "content": [part],
                });
                self.within("reasoning", item, part).await?;
                self.append("response.reasoning_text.delta", &text).await
            }
            Delta::Content(text) => {
                let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
                let item = json!({
                    "type": "message", "id": new_id("msg_"), "status": "in_progress", "role": "assistant",
                    "content": [part],
                });
                self.within("message", item, part).await?;
                self.append("response.output_text.delta", &text).await
            }
            Delta::Call { name } => {
                self.close("completed").await?;
                self.arguments.clear();
                let tool = self.tool(&name);
                let is_custom = tool.is_some_and(|tool| tool.kind == ToolKind::Custom);
                let client_name = tool.map_or(&name, |tool| &tool.client_name);
                let (kind, id, field) = match is_custom {
                    true => ("custom_tool_call", "ctc_", "input"),
                    false => ("function_call", "fc_", "arguments"),
                };
                let mut item = json!({
                    "type": kind, "id": new_id(id), "call_id": new_id("call_"), "name": client_name, "status": "in_progress",
                });
                item[field] = json!("");
                if let Some(namespace) = tool.and_then(|tool| tool.namespace.as_ref()) {
                    item["namespace"] = json!(namespace);
                }
                self.add(item).await
            }
            Delta::Arguments(json) => {
                if self.open_kind() != Some("function_call") {
                    self.arguments.push_str(&json);
                    return Ok(());
                }
                let output_index = self.items.len() - 1;
                let item = &mut self.items[output_index];
                if let Value::String(whole) = &mut item["arguments"] {
                    whole.push_str(&json);
                }
                let place = json!({"item_id": item["id"], "output_index": output_index, "delta": json});
                self.event("response.function_call_arguments.delta", place).await
            }
            Delta::EndCall => self.close("completed").await,
        }
    }

    /// Ends the open item, if there is one.
    async fn close(&mut self, status: &str) -> Result<(), Gone> {
        let Some(kind) = self.open_kind().map(str::to_owned) else { return Ok(()) };
        let output_index = self.items.len() - 1;
        self.items[output_index]["status"] = json!(status);
        if kind == "custom_tool_call" {
            self.items[output_index]["input"] = json!(custom_input(&self.arguments));
        }
        if kind == "reasoning" && self.seals_reasoning {
            let text = self.items[output_index]["content"][0]["text"].as_str().unwrap_or_default();
            self.items[output_index]["encrypted_content"] = json!(seal(text));
        }
        let item = self.items[output_index].clone();
        let place = |mut value: Value| {
            value["item_id"] = item["id"].clone();
            value["output_index"] = json!(output_index);
            value
        };
        match kind.as_str() {
            "function_call" => {
                let done = place(json!({"name": item["name"], "arguments": item["arguments"]}));
                self.event("response.function_call_arguments.done", done).await?;
            }
            "custom_tool_call" => {
                self.event("response.custom_tool_call_input.delta", place(json!({"delta": item["input"]}))).await?;
                self.event("response.custom_tool_call_input.done", place(json!({"input": item["input"]}))).await?;
            }
            _ => {
                let part = &item["content"][0];
                let name = if kind == "message" { "output_text" } else { "reasoning_text" };
                let mut done = place(json!({"content_index": 0, "text": part["text"]}));
                if kind == "message" {
                    done["logprobs"] = part["logprobs"].clone();
                }
                self.event(&format!("response.{name}.done"), done).await?;
                self.event("response.content_part.done", place(json!({"content_index": 0, "part": part}))).await?;
            }
        }
        self.event("response.output_item.done", json!({"output_index": output_index, "item": item})).await
    }
}
