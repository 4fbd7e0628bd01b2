//! Anthropic's interface: /v1/messages and /v1/messages/count_tokens.

use std::sync::Arc;

use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tandem_engine::SamplingOverrides;
use utoipa::ToSchema;

use crate::api::{
    Count, FunctionType, NamedTool, StreamEvent, Thinking, ThinkingType, Tool, ToolChoice, ToolMode, ToolName, Usage,
};
use crate::app::App;
use crate::chat::{Events, Functions, Gone, chat_ask, choose_functions, send, stream};
use crate::error::{AnthropicError, ApiError, Body};
use crate::generation::{Answer, Ask, Finish, Generation, new_id};
use crate::grammar::Form;
use crate::strict::{named_by_type, objects};
use tandem_text::dialect::Delta;

objects!(MessagesRequest, CountRequest, InputMessage, InputTool);
named_by_type!(Block, Choice);

/// A conversation to continue, in Anthropic's form.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct MessagesRequest {
    model: String,
    #[schema(min_items = 1)]
    messages: Vec<InputMessage>,
    /// Tokens to generate at most.
    #[schema(value_type = u32, minimum = 1)]
    max_tokens: Count,
    system: Option<Blocks>,
    stream: Option<bool>,
    stop_sequences: Option<Vec<String>>,
    #[schema(minimum = 0, maximum = 1)]
    temperature: Option<f32>,
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    #[schema(value_type = Option<u32>)]
    top_k: Option<Count>,
    tools: Option<Vec<InputTool>>,
    tool_choice: Option<Choice>,
    thinking: Option<Thinking>,
}

/// What would be sent to /v1/messages.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct CountRequest {
    model: String,
    #[schema(min_items = 1)]
    messages: Vec<InputMessage>,
    system: Option<Blocks>,
    tools: Option<Vec<InputTool>>,
    tool_choice: Option<Choice>,
    thinking: Option<Thinking>,
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

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
struct InputMessage {
    role: InputRole,
    content: Blocks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum InputRole {
    User,
    Assistant,
    System,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of content blocks (text, thinking, tool_use, tool_result)")]
enum Blocks {
    Text(String),
    Blocks(Vec<Block>),
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", remote = "Self")]
enum Block {
    Text {
        text: String,
    },
    Thinking {
        thinking: String,
    },
    RedactedThinking {},
    ToolUse {
        id: String,
        name: String,
        #[schema(value_type = Object)]
        input: Map<String, Value>,
    },
    ToolResult {
        tool_use_id: String,
        content: Option<ResultContent>,
        is_error: Option<bool>,
    },
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of text blocks")]
enum ResultContent {
    Text(String),
    Parts(Vec<super::api::TextPart>),
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
struct InputTool {
    #[schema(min_length = 1)]
    name: String,
    description: Option<String>,
    /// JSON schema of the arguments.
    #[schema(value_type = Object)]
    input_schema: Map<String, Value>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", remote = "Self")]
enum Choice {
    Auto { disable_parallel_tool_use: Option<bool> },
    Any { disable_parallel_tool_use: Option<bool> },
    Tool { name: String, disable_parallel_tool_use: Option<bool> },
    None,
}

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
pub(crate) async fn messages(
    State(app): State<Arc<App>>,
    body: Result<Body<MessagesRequest>, ApiError>,
) -> Result<Response, AnthropicError> {
    let Body(request) = body?;
    app.check_model(Some(&request.model))?;
    if request.max_tokens.0 == 0 {
        return Err(ApiError::invalid("max_tokens", "max_tokens is 0, expected at least 1").into());
    }
    if let Some(t) = request.temperature
        && !(0.0..=1.0).contains(&t)
    {
        return Err(ApiError::invalid("temperature", format!("temperature is {t}, expected 0 to 1")).into());
    }
    let count = CountRequest {
        model: request.model,
        messages: request.messages,
        system: request.system,
        tools: request.tools,
        tool_choice: request.tool_choice,
        thinking: request.thinking,
    };
    let ask = Ask {
        max_tokens: Some(request.max_tokens.0),
        stop: request.stop_sequences.unwrap_or_default(),
        overrides: SamplingOverrides {
            temperature: request.temperature,
            top_p: request.top_p,
            top_k: request.top_k.map(|k| k.0),
            ..SamplingOverrides::default()
        },
        ..ask(&app, count)?
    };
    let generation = app.start(ask)?.remove(0);
    let (id, model) = (new_id("msg_"), app.model_name().to_owned());
    if request.stream == Some(true) {
        return Ok(stream(&app, move |events| async move {
            let _ = write(&events, generation, &id, &model).await;
        }));
    }
    let answer = Answer::of(generation).await?;
    let mut content = vec![];
    if !answer.reasoning.is_empty() {
        content.push(json!({"type": "thinking", "thinking": answer.reasoning, "signature": ""}));
    }
    if !answer.content.is_empty() || (answer.calls.is_empty() && answer.reasoning.is_empty()) {
        content.push(json!({"type": "text", "text": answer.content}));
    }
    for (name, arguments) in &answer.calls {
        // A call that was cut off has no complete arguments.
        let input: Value = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
        content.push(json!({"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": input}));
    }
    let (stop_reason, stop_sequence) = stop_reason(answer.finish.as_ref());
    let body = json!({
        "id": id, "type": "message", "role": "assistant", "model": model, "content": content,
        "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage_json(&answer.usage),
    });
    Ok(axum::Json(body).into_response())
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
    body: Result<Body<CountRequest>, ApiError>,
) -> Result<axum::Json<CountResponse>, AnthropicError> {
    let Body(request) = body?;
    app.check_model(Some(&request.model))?;
    Ok(axum::Json(CountResponse { input_tokens: ask(&app, request)?.prompt.len() }))
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

/// The prompt of a conversation.
fn ask(app: &App, request: CountRequest) -> Result<Ask, ApiError> {
    if request.messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty; give at least one"));
    }
    let mut messages = vec![];
    if let Some(system) = &request.system {
        messages.push(json!({"role": "system", "content": plain_text(system)}));
    }
    for message in &request.messages {
        add_message(message, &mut messages);
    }
    let tools: Vec<Tool> = request
        .tools
        .unwrap_or_default()
        .into_iter()
        .map(|tool| Tool::new(tool.name, tool.description, Some(tool.input_schema)))
        .collect();
    let (choice, one_call) = match request.tool_choice {
        None => (None, false),
        Some(Choice::Auto { disable_parallel_tool_use: one }) => (None, one == Some(true)),
        Some(Choice::None) => (Some(ToolChoice::Mode(ToolMode::None)), false),
        Some(Choice::Any { disable_parallel_tool_use: one }) => {
            (Some(ToolChoice::Mode(ToolMode::Required)), one == Some(true))
        }
        Some(Choice::Tool { name, disable_parallel_tool_use: one }) => {
            let named = NamedTool { kind: FunctionType::Function, function: ToolName { name } };
            (Some(ToolChoice::Function(named)), one == Some(true))
        }
    };
    let functions: Functions = choose_functions(&tools, choice.as_ref())?;
    let form =
        functions.is_required.then(|| Form::Calls { functions: functions.callable.clone(), parallel: !one_call });
    let mut variables = Map::new();
    if let Some(thinking) = &request.thinking {
        variables.insert("enable_thinking".into(), Value::Bool(thinking.r#type != ThinkingType::Disabled));
    }
    Ok(Ask { form, ..chat_ask(app, &messages, &tools, functions, &variables, one_call)? })
}

fn plain_text(blocks: &Blocks) -> String {
    match blocks {
        Blocks::Text(text) => text.clone(),
        Blocks::Blocks(blocks) => {
            let texts: Vec<&str> = blocks
                .iter()
                .filter_map(|block| match block {
                    Block::Text { text } => Some(text.as_str()),
                    _ => None,
                })
                .collect();
            texts.join("\n")
        }
    }
}

/// A message as chat templates expect it; results of tools become messages of their own, before the user's text.
fn add_message(message: &InputMessage, messages: &mut Vec<Value>) {
    let text = plain_text(&message.content);
    let blocks: &[Block] = match &message.content {
        Blocks::Text(_) => &[],
        Blocks::Blocks(blocks) => blocks,
    };
    if message.role == InputRole::Assistant {
        let mut value = json!({"role": "assistant", "content": text});
        let reasoning: String = blocks
            .iter()
            .filter_map(|block| match block {
                Block::Thinking { thinking } => Some(thinking.as_str()),
                _ => None,
            })
            .collect();
        if !reasoning.is_empty() {
            value["reasoning_content"] = json!(reasoning);
        }
        let calls: Vec<Value> = blocks
            .iter()
            .filter_map(|block| match block {
                Block::ToolUse { id, name, input } => Some(json!({
                    "id": id, "type": "function", "function": {"name": name, "arguments": input},
                })),
                _ => None,
            })
            .collect();
        if !calls.is_empty() {
            value["tool_calls"] = json!(calls);
        }
        messages.push(value);
        return;
    }
    let mut has_results = false;
    for block in blocks {
        if let Block::ToolResult { tool_use_id, content, is_error } = block {
            let mut text = match content {
                None => String::new(),
                Some(ResultContent::Text(text)) => text.clone(),
                Some(ResultContent::Parts(parts)) => {
                    parts.iter().map(|part| part.text.as_str()).collect::<Vec<_>>().join("\n")
                }
            };
            if *is_error == Some(true) {
                text = format!("Error: {text}");
            }
            messages.push(json!({"role": "tool", "content": text, "tool_call_id": tool_use_id}));
            has_results = true;
        }
    }
    if !has_results || !text.is_empty() {
        let role = if message.role == InputRole::System { "system" } else { "user" };
        messages.push(json!({"role": role, "content": text}));
    }
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
}

impl Writer<'_> {
    async fn event(&self, value: Value) -> Result<(), Gone> {
        let name = value["type"].as_str().unwrap_or_default().to_owned();
        send(self.events, Event::default().event(name).data(value.to_string())).await
    }

    async fn close(&mut self) -> Result<(), Gone> {
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
    let mut writer = Writer { events, open: Open::Nothing, index: 0 };
    let mut is_started = false;
    while let Some(chunk) = generation.next().await {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => return writer.event(error.anthropic_body()).await,
        };
        if !is_started {
            is_started = true;
            let mut usage = usage_json(&generation.usage());
            usage["output_tokens"] = json!(0);
            let message = json!({
                "id": id, "type": "message", "role": "assistant", "model": model, "content": [],
                "stop_reason": null, "stop_sequence": null, "usage": usage,
            });
            writer.event(json!({"type": "message_start", "message": message})).await?;
        }
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
    Ok(())
}
