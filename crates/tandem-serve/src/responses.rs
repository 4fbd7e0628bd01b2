//! OpenAI's /v1/responses, without stored state: every request brings its whole conversation.

use std::sync::Arc;

use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tandem_engine::SamplingOverrides;
use utoipa::ToSchema;

use crate::api::{
    Count, FunctionType, NamedTool, ReasoningEffort, StreamEvent, Tool, ToolChoice, ToolMode, ToolName, Usage,
};
use crate::app::App;
use crate::chat::{Events, Gone, chat_ask, choose_functions, send, stream, template_call};
use crate::error::{ApiError, Body, ErrorResponse};
use crate::generation::{Ask, Finish, Generation, new_id, now};
use crate::grammar::Form;
use crate::strict::{named_by_type, objects};
use tandem_text::dialect::Delta;

objects!(ResponsesRequest, ItemMessage, ItemText, FlatTool, FlatToolName, Reasoning, TextOptions);
named_by_type!(TypedItem, TextFormat);

/// A conversation to continue, in the form of OpenAI's Responses.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct ResponsesRequest {
    model: Option<String>,
    input: Input,
    /// System message.
    instructions: Option<String>,
    stream: Option<bool>,
    /// Tokens to generate at most.
    #[schema(value_type = Option<u32>, minimum = 1)]
    max_output_tokens: Option<Count>,
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    tools: Option<Vec<FlatTool>>,
    tool_choice: Option<FlatToolChoice>,
    parallel_tool_calls: Option<bool>,
    reasoning: Option<Reasoning>,
    text: Option<TextOptions>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a text or a list of items (message, reasoning, function_call, function_call_output)"
)]
enum Input {
    Text(String),
    Items(Vec<Item>),
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected an item of type message, reasoning, function_call or function_call_output")]
enum Item {
    Typed(TypedItem),
    /// A message may leave its type out.
    Message(ItemMessage),
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", remote = "Self")]
enum TypedItem {
    Message(ItemMessage),
    Reasoning { content: Option<Vec<ItemText>> },
    FunctionCall { call_id: String, name: String, arguments: String },
    FunctionCallOutput { call_id: String, output: String },
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
struct ItemMessage {
    role: ItemRole,
    content: ItemContent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ItemRole {
    System,
    Developer,
    User,
    Assistant,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of text parts")]
enum ItemContent {
    Text(String),
    Parts(Vec<ItemText>),
}

/// `{"type": "input_text", "text": ..}`
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
struct ItemText {
    #[allow(dead_code)] // read for its check alone
    r#type: ItemTextType,
    text: String,
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[allow(clippy::enum_variant_names)] // OpenAI's words
enum ItemTextType {
    InputText,
    OutputText,
    ReasoningText,
    Text,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
struct FlatTool {
    #[allow(dead_code)] // read for its check alone
    r#type: FunctionType,
    #[schema(min_length = 1)]
    name: String,
    description: Option<String>,
    #[schema(value_type = Option<Object>)]
    parameters: Option<Map<String, Value>>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"name\": ..}")]
enum FlatToolChoice {
    Mode(ToolMode),
    Function(FlatToolName),
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
struct FlatToolName {
    #[allow(dead_code)] // read for its check alone
    r#type: FunctionType,
    name: String,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
struct Reasoning {
    effort: Option<ReasoningEffort>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
struct TextOptions {
    format: Option<TextFormat>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", remote = "Self")]
enum TextFormat {
    Text,
    JsonObject,
    JsonSchema {
        #[schema(value_type = Object)]
        schema: Map<String, Value>,
    },
}

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
pub(crate) async fn responses(
    State(app): State<Arc<App>>,
    Body(request): Body<ResponsesRequest>,
) -> Result<Response, ApiError> {
    app.check_model(request.model.as_deref())?;
    let is_stream = request.stream == Some(true);
    let generation = app.start(ask(&app, request)?)?.remove(0);
    let mut output = Output {
        id: new_id("resp_"),
        created: now(),
        model: app.model_name().to_owned(),
        items: vec![],
        sequence: 0,
        events: None,
    };
    if is_stream {
        return Ok(stream(&app, move |events| async move {
            output.events = Some(events);
            let _ = output.run(generation).await;
        }));
    }
    match output.run(generation).await {
        Ok(Ok(response)) => Ok(axum::Json(response).into_response()),
        Ok(Err(error)) => Err(error),
        Err(Gone) => Err(ApiError::internal("the client is gone")),
    }
}

fn ask(app: &App, request: ResponsesRequest) -> Result<Ask, ApiError> {
    if request.max_output_tokens == Some(Count(0)) {
        return Err(ApiError::invalid("max_output_tokens", "max_output_tokens is 0, expected at least 1"));
    }
    if let Some(t) = request.temperature
        && !(0.0..=2.0).contains(&t)
    {
        return Err(ApiError::invalid("temperature", format!("temperature is {t}, expected 0 to 2")));
    }
    let mut messages = vec![];
    if let Some(instructions) = &request.instructions {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    match &request.input {
        Input::Text(text) => messages.push(json!({"role": "user", "content": text})),
        Input::Items(items) => items.iter().for_each(|item| add_item(item, &mut messages)),
    }

    let tools: Vec<Tool> = request
        .tools
        .unwrap_or_default()
        .into_iter()
        .map(|tool| Tool::new(tool.name, tool.description, tool.parameters))
        .collect();
    let choice = request.tool_choice.map(|choice| match choice {
        FlatToolChoice::Mode(mode) => ToolChoice::Mode(mode),
        FlatToolChoice::Function(named) => {
            let function = ToolName { name: named.name };
            ToolChoice::Function(NamedTool { kind: FunctionType::Function, function })
        }
    });
    let functions = choose_functions(&tools, choice.as_ref())?;
    let one_call = request.parallel_tool_calls == Some(false);
    let form = match (functions.is_required, request.text.and_then(|text| text.format)) {
        (true, _) => Some(Form::Calls { functions: functions.callable.clone(), parallel: !one_call }),
        (false, None | Some(TextFormat::Text)) => None,
        (false, Some(TextFormat::JsonObject)) => Some(Form::JsonSchema(json!({"type": "object"}))),
        (false, Some(TextFormat::JsonSchema { schema })) => Some(Form::JsonSchema(Value::Object(schema))),
    };
    let mut variables = Map::new();
    if let Some(effort) = request.reasoning.and_then(|r| r.effort) {
        variables.insert("enable_thinking".into(), Value::Bool(effort != ReasoningEffort::None));
    }
    Ok(Ask {
        param: "input",
        form,
        max_tokens: request.max_output_tokens.map(|n| n.0),
        overrides: SamplingOverrides {
            temperature: request.temperature,
            top_p: request.top_p,
            ..SamplingOverrides::default()
        },
        ..chat_ask(app, &messages, &tools, functions, &variables, one_call)?
    })
}

/// Adds an item as chat templates expect it: reasoning and calls belong to the assistant's message beside them.
fn add_item(item: &Item, messages: &mut Vec<Value>) {
    let (Item::Typed(TypedItem::Message(message)) | Item::Message(message)) = item else {
        let Item::Typed(item) = item else { return };
        if let TypedItem::FunctionCallOutput { call_id, output } = item {
            return messages.push(json!({"role": "tool", "content": output, "tool_call_id": call_id}));
        }
        if messages.last().is_none_or(|m| m["role"] != "assistant") {
            messages.push(json!({"role": "assistant", "content": ""}));
        }
        let Some(last) = messages.last_mut() else { return };
        match item {
            TypedItem::Reasoning { content } => {
                last["reasoning_content"] = json!(joined(content.as_deref().unwrap_or_default()));
            }
            TypedItem::FunctionCall { call_id, name, arguments } => {
                let call = template_call(call_id, name, arguments);
                match last["tool_calls"].as_array_mut() {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                }
            }
            TypedItem::FunctionCallOutput { .. } | TypedItem::Message(_) => {}
        }
        return;
    };
    let text = match &message.content {
        ItemContent::Text(text) => text.clone(),
        ItemContent::Parts(parts) => joined(parts),
    };
    let role = match message.role {
        ItemRole::System | ItemRole::Developer => "system",
        ItemRole::User => "user",
        ItemRole::Assistant => "assistant",
    };
    // The reasoning of an answer comes as an item before it.
    match messages.last_mut() {
        Some(last)
            if role == "assistant" && last["role"] == role && last["content"] == "" && last["tool_calls"].is_null() =>
        {
            last["content"] = json!(text);
        }
        _ => messages.push(json!({"role": role, "content": text})),
    }
}

fn joined(parts: &[ItemText]) -> String {
    parts.iter().map(|part| part.text.as_str()).collect::<Vec<_>>().join("\n")
}

/// A response being written, with its events if they are wanted.
struct Output {
    id: String,
    created: u64,
    model: String,
    items: Vec<Value>,
    sequence: u64,
    events: Option<Events>,
}

impl Output {
    async fn run(&mut self, mut generation: Generation) -> Result<Result<Value, ApiError>, Gone> {
        let response = self.response("in_progress", None);
        self.event("response.created", json!({"response": response})).await?;
        self.event("response.in_progress", json!({"response": response})).await?;
        let mut status = ("completed", None);
        while let Some(chunk) = generation.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    let body = error.body();
                    let details = json!({"code": "server_error", "message": body["error"]["message"]});
                    let mut response = self.response("failed", None);
                    response["error"] = details;
                    self.event("response.failed", json!({"response": response})).await?;
                    return Ok(Err(error));
                }
            };
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
        self.event(&format!("response.{}", status.0), json!({"response": response})).await?;
        Ok(Ok(response))
    }

    fn response(&self, status: &str, usage: Option<Usage>) -> Value {
        let usage = usage.map(|u| {
            json!({
                "input_tokens": u.prompt_tokens, "output_tokens": u.completion_tokens, "total_tokens": u.total_tokens,
                "input_tokens_details": {"cached_tokens": u.prompt_tokens_details.cached_tokens},
                "output_tokens_details": {"reasoning_tokens": u.completion_tokens_details.reasoning_tokens},
            })
        });
        json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "output": self.items, "usage": usage, "error": null, "incomplete_details": null, "instructions": null,
            "metadata": {}, "parallel_tool_calls": true, "temperature": null, "top_p": null, "tool_choice": "auto",
            "tools": [], "store": false,
        })
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
        let whole = format!("{}{text}", item["content"][0]["text"].as_str().unwrap_or_default());
        item["content"][0]["text"] = json!(whole);
        let mut place = json!({"item_id": item["id"], "output_index": output_index, "content_index": 0, "delta": text});
        if name == "response.output_text.delta" {
            place["logprobs"] = json!([]);
        }
        self.event(name, place).await
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
                self.add(json!({
                    "type": "function_call", "id": new_id("fc_"), "call_id": new_id("call_"), "name": name,
                    "arguments": "", "status": "in_progress",
                }))
                .await
            }
            Delta::Arguments(json) => {
                let output_index = self.items.len() - 1;
                let item = &mut self.items[output_index];
                item["arguments"] = json!(format!("{}{json}", item["arguments"].as_str().unwrap_or_default()));
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
        let item = self.items[output_index].clone();
        let place = |mut value: Value| {
            value["item_id"] = item["id"].clone();
            value["output_index"] = json!(output_index);
            value
        };
        if kind == "function_call" {
            let done = place(json!({"name": item["name"], "arguments": item["arguments"]}));
            self.event("response.function_call_arguments.done", done).await?;
        } else {
            let part = &item["content"][0];
            let name = if kind == "message" { "output_text" } else { "reasoning_text" };
            let mut done = place(json!({"content_index": 0, "text": part["text"]}));
            if kind == "message" {
                done["logprobs"] = json!([]);
            }
            self.event(&format!("response.{name}.done"), done).await?;
            self.event("response.content_part.done", place(json!({"content_index": 0, "part": part}))).await?;
        }
        self.event("response.output_item.done", json!({"output_index": output_index, "item": item})).await
    }
}
