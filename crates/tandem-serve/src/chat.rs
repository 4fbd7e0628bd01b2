//! /v1/chat/completions and /v1/completions.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use crate::api::*;
use crate::app::App;
use crate::body::Body;
use crate::conversation::{
    Choice, Conversation, Notes, Tool, ToolKind, content_text, count, custom_call, function_call, read_effort,
    read_format, read_thinking, split_reasoning,
};
use crate::error::{ApiError, ErrorResponse};
use crate::generation::{Answer, Ask, Chunk, Finish, Generation, new_id, now, total};
use crate::grammar::Form;
use crate::read::{kind, list, missing, object, optional, optional_text, required_text};
use tandem_text::Reasoning;
use tandem_text::dialect::Delta;

/// Events that may wait for a slow reader before its stream pauses.
const BUFFER: usize = 64;
/// Between comments that keep an idle stream open.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Time in which a reader must take something.
const SLOW: Duration = Duration::from_secs(30);
/// Time after a request's deadline in which its reader may take the rest.
const GRACE: Duration = Duration::from_secs(30);

/// Where a stream's events go.
pub(crate) type Events = Sender<Result<Event, Infallible>>;

/// The client is gone.
pub(crate) struct Gone;

/// Sends one event. A reader that takes nothing for a while counts as gone.
pub(crate) async fn send(events: &Events, event: Event) -> Result<(), Gone> {
    tokio::time::timeout(SLOW, events.send(Ok(event))).await.map_err(|_| Gone)?.map_err(|_| Gone)
}

/// Sends one JSON object as OpenAI does.
async fn send_json(events: &Events, value: &Value) -> Result<(), Gone> {
    send(events, Event::default().data(value.to_string())).await
}

/// A response whose events `write` sends; it stops when the client goes away, or does not read them in time.
pub(crate) fn stream<F>(app: &App, write: impl FnOnce(Events) -> F) -> Response
where
    F: Future<Output = ()> + Send + 'static,
{
    let (events, receiver) = channel(BUFFER);
    let closed = events.clone();
    let writing = tokio::time::timeout(app.timeout + GRACE, write(events));
    tokio::spawn(async move {
        tokio::select! {
            _ = writing => {}
            () = closed.closed() => {}
        }
    });
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// Continues a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "OpenAI", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer, or its events", content(
            (ChatCompletion = "application/json"), (StreamEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
        (status = "5XX", description = "The engine is not there, or too slow", body = ErrorResponse),
    )
)]
pub(crate) async fn chat(State(app): State<Arc<App>>, body: Body<ChatRequest>) -> Result<Response, ApiError> {
    let request = body.value;
    app.check_model(request.model.as_deref())?;
    app.worker.check_open()?;
    let mut conversation = read(&request, body.notes)?;
    let ask = ask(&app, &request, &mut conversation)?;
    drop(body.admitted);
    let n_prompt = ask.prompt.len();
    let generations = app.start(ask)?;
    let (id, created, model) = (new_id("chatcmpl-"), now(), app.model_name().to_owned());
    let shape = Shape {
        tools: conversation.tools.into(),
        is_function_call: request.functions.is_some() && request.tools.is_none(),
        hides_reasoning: request.include_reasoning == Some(false)
            || request.reasoning.as_ref().is_some_and(|r| r["exclude"] == true),
    };
    let response = if request.stream != Some(true) {
        let (answers, usage) = Answer::all(n_prompt, generations).await?;
        let wants_logprobs = request.logprobs == Some(true);
        let choices = answers.into_iter().enumerate().map(|(i, a)| shape.choice(i, a, wants_logprobs)).collect();
        axum::Json(ChatCompletion { id, object: "chat.completion", created, model, choices, usage }).into_response()
    } else {
        let frame = move |choices: Value| json!({"id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices});
        let answers = Answers { n_prompt, generations, usage: UsageEvents::of(request.stream_options.as_ref()) };
        let pieces = move |_| ChatPieces { shape: shape.clone(), n_calls: 0, custom: None };
        stream(&app, move |events| write_stream(events, answers, frame, pieces))
    };
    Ok(conversation.notes.on(response))
}

/// Turns an answer's chunks into choices of stream events.
trait Pieces: Send + 'static {
    /// Before the first chunk.
    fn open(&mut self) -> Option<Value>;
    /// Choices without their index, in order.
    fn choices(&mut self, chunk: Chunk) -> Vec<Value>;
}

/// The answers that a stream is about.
struct Answers {
    /// Tokens of all prompts.
    n_prompt: usize,
    generations: Vec<Generation>,
    usage: UsageEvents,
}

/// Which events carry the token counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UsageEvents {
    None,
    /// One more at the end; the others say null.
    Last,
    /// That one, and each other with the counts of its answer so far.
    Every,
}

impl UsageEvents {
    fn of(options: Option<&StreamOptions>) -> UsageEvents {
        let is_set = |field: fn(&StreamOptions) -> Option<bool>| options.and_then(field) == Some(true);
        match (is_set(|o| o.include_usage), is_set(|o| o.continuous_usage_stats)) {
            (false, _) => UsageEvents::None,
            (true, false) => UsageEvents::Last,
            (true, true) => UsageEvents::Every,
        }
    }
}

async fn write_stream<P: Pieces>(
    events: Events,
    answers: Answers,
    frame: impl Fn(Value) -> Value + Clone + Send + Sync + 'static,
    pieces: impl Fn(usize) -> P,
) {
    let Answers { n_prompt, generations, usage } = answers;
    let mut tasks = JoinSet::new();
    for mut generation in generations {
        let (events, frame, mut pieces) = (events.clone(), frame.clone(), pieces(generation.index));
        tasks.spawn(async move {
            let framed = |mut choice: Value, generation: &Generation| {
                choice["index"] = json!(generation.index);
                let mut framed = frame(json!([choice]));
                match usage {
                    UsageEvents::None => {}
                    UsageEvents::Last => framed["usage"] = Value::Null,
                    UsageEvents::Every => framed["usage"] = json!(generation.usage()),
                }
                framed
            };
            if let Some(choice) = pieces.open() {
                send_json(&events, &framed(choice, &generation)).await.ok()?;
            }
            while let Some(chunk) = generation.next().await {
                match chunk {
                    Ok(chunk) => {
                        for choice in pieces.choices(chunk) {
                            send_json(&events, &framed(choice, &generation)).await.ok()?;
                        }
                    }
                    Err(error) => {
                        send_json(&events, &error.body()).await.ok()?;
                        return None;
                    }
                }
            }
            Some(generation.usage())
        });
    }
    let mut usages = vec![];
    while let Some(result) = tasks.join_next().await {
        match result {
            Ok(Some(usage)) => usages.push(usage),
            _ => return,
        }
    }
    if usage != UsageEvents::None {
        let mut last = frame(json!([]));
        last["usage"] = json!(total(n_prompt, usages.into_iter()));
        if send_json(&events, &last).await.is_err() {
            return;
        }
    }
    let _ = send(&events, Event::default().data("[DONE]")).await;
}

/// How answers are given out.
#[derive(Clone)]
struct Shape {
    tools: Arc<[Tool]>,
    /// The request has `functions`, as before there were tools.
    is_function_call: bool,
    hides_reasoning: bool,
}

impl Shape {
    fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    fn finish(&self, finish: &'static str) -> &'static str {
        if finish == "tool_calls" && self.is_function_call { "function_call" } else { finish }
    }

    fn choice(&self, index: usize, answer: Answer, wants_logprobs: bool) -> ChatChoice {
        let finish_reason = self.finish(answer.finish_name());
        let mut calls: Vec<Value> = answer
            .calls
            .into_iter()
            .map(|call| {
                let tool = self.tool(&call.name);
                let name = tool.map_or(&call.name, |tool| &tool.client_name);
                match tool.map(|tool| tool.kind) {
                    Some(ToolKind::Custom) => {
                        let custom = json!({"name": name, "input": custom_input(&call.arguments)});
                        json!({"id": new_id("call_"), "type": "custom", "custom": custom})
                    }
                    _ => {
                        let function = json!({"name": name, "arguments": call.arguments});
                        json!({"id": new_id("call_"), "type": "function", "function": function})
                    }
                }
            })
            .collect();
        let is_call = !calls.is_empty();
        let function_call = (self.is_function_call && is_call).then(|| calls.remove(0)["function"].take());
        let calls = (is_call && !self.is_function_call).then_some(calls);
        ChatChoice {
            index,
            message: AssistantMessage {
                role: "assistant",
                content: (!is_call || !answer.content.is_empty()).then_some(answer.content),
                refusal: None,
                reasoning_content: (!answer.reasoning.is_empty() && !self.hides_reasoning).then_some(answer.reasoning),
                tool_calls: calls,
                function_call,
            },
            logprobs: wants_logprobs.then_some(ChatLogprobs { content: answer.logprobs, refusal: None }),
            finish_reason,
        }
    }
}

/// The text of a custom tool's call, whose arguments are `{"input": ..}`.
pub(crate) fn custom_input(arguments: &str) -> String {
    match serde_json::from_str::<Value>(arguments) {
        Ok(Value::Object(map)) => match map.get("input") {
            Some(Value::String(input)) => input.clone(),
            Some(other) => other.to_string(),
            None => arguments.to_owned(),
        },
        // It was cut off.
        _ => arguments.to_owned(),
    }
}

/// Deltas of a chat stream.
struct ChatPieces {
    shape: Shape,
    n_calls: usize,
    /// Arguments so far of a custom tool's call, which are passed on as a whole.
    custom: Option<String>,
}

impl Pieces for ChatPieces {
    fn open(&mut self) -> Option<Value> {
        Some(json!({"delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}))
    }

    fn choices(&mut self, chunk: Chunk) -> Vec<Value> {
        let mut deltas: Vec<Value> = chunk.deltas.into_iter().filter_map(|delta| self.delta(delta)).collect();
        if chunk.finish.is_some() {
            deltas.extend(self.end_custom());
        }
        let mut choices: Vec<Value> =
            deltas.into_iter().map(|delta| json!({"delta": delta, "logprobs": null, "finish_reason": null})).collect();
        if !chunk.logprobs.is_empty() {
            if choices.is_empty() {
                choices.push(json!({"delta": {}, "logprobs": null, "finish_reason": null}));
            }
            choices[0]["logprobs"] = json!({"content": chunk.logprobs, "refusal": null});
        }
        if let Some(finish) = chunk.finish {
            let finish = self.shape.finish(finish.name());
            choices.push(json!({"delta": {}, "logprobs": null, "finish_reason": finish}));
        }
        choices
    }
}

impl ChatPieces {
    fn delta(&mut self, delta: Delta) -> Option<Value> {
        let index = self.n_calls.saturating_sub(1);
        Some(match delta {
            Delta::Reasoning(_) if self.shape.hides_reasoning => return None,
            Delta::Reasoning(text) => json!({"reasoning_content": text}),
            Delta::Content(text) => json!({"content": text}),
            Delta::Call { name } => {
                self.n_calls += 1;
                let tool = self.shape.tool(&name);
                let is_custom = tool.is_some_and(|tool| tool.kind == ToolKind::Custom);
                let name = tool.map_or(&name, |tool| &tool.client_name);
                self.custom = is_custom.then(String::new);
                let index = self.n_calls - 1;
                match (is_custom, self.shape.is_function_call) {
                    (true, _) => json!({"tool_calls": [{
                        "index": index, "id": new_id("call_"), "type": "custom", "custom": {"name": name, "input": ""},
                    }]}),
                    (false, true) => json!({"function_call": {"name": name, "arguments": ""}}),
                    (false, false) => json!({"tool_calls": [{
                        "index": index, "id": new_id("call_"), "type": "function",
                        "function": {"name": name, "arguments": ""},
                    }]}),
                }
            }
            Delta::Arguments(json) => {
                if let Some(custom) = &mut self.custom {
                    custom.push_str(&json);
                    return None;
                }
                match self.shape.is_function_call {
                    true => json!({"function_call": {"arguments": json}}),
                    false => json!({"tool_calls": [{"index": index, "function": {"arguments": json}}]}),
                }
            }
            Delta::EndCall => return self.end_custom(),
        })
    }

    /// The input of a custom tool's call.
    fn end_custom(&mut self) -> Option<Value> {
        let input = custom_input(&self.custom.take()?);
        Some(json!({"tool_calls": [{"index": self.n_calls.saturating_sub(1), "custom": {"input": input}}]}))
    }
}

/// Checks a conversation.
pub(crate) fn read(request: &ChatRequest, notes: Notes) -> Result<Conversation, ApiError> {
    let mut conversation = Conversation { notes, param: "messages", ..Conversation::default() };
    for (i, message) in request.messages.iter().enumerate() {
        let message = read_message(message, &format!("messages[{i}]"), &mut conversation.notes)?;
        conversation.messages.push(message);
    }
    let mut tools = vec![];
    for (i, tool) in request.tools.iter().flatten().enumerate() {
        tools.extend(read_tool(tool, &format!("tools[{i}]"), &mut conversation.notes)?);
    }
    if request.tools.is_none() {
        for (i, function) in request.functions.iter().flatten().enumerate() {
            let path = format!("functions[{i}]");
            tools.push(Tool::function(object(function, &path)?, "parameters", &path)?);
        }
    }
    conversation.set_tools(tools)?;
    conversation.choice = match (&request.tool_choice, &request.function_call) {
        (Some(choice), _) => Choice::read(choice, "tool_choice")?,
        (None, Some(Value::Object(named))) => Choice::Named(required_text(named, "name", "function_call")?.to_owned()),
        (None, Some(mode)) => Choice::read(mode, "function_call")?,
        (None, None) => Choice::Auto,
    };
    let is_function_call = request.functions.is_some() && request.tools.is_none();
    conversation.one_call = request.parallel_tool_calls == Some(false) || is_function_call;
    conversation.form = match &request.structured_outputs() {
        Some(outputs) => form_of(outputs)?,
        None => request.response_format.as_ref().map(|f| read_format(f, "response_format")).transpose()?.flatten(),
    };
    let effort = request.reasoning_effort.as_ref().map(|effort| read_effort(effort, "reasoning_effort")).transpose()?;
    let thinking = request.thinking.as_ref().map(|thinking| read_thinking(thinking, "thinking")).transpose()?;
    let reasoning = request.reasoning.as_ref().map(|reasoning| read_reasoning(reasoning, "reasoning")).transpose()?;
    let budget = Reasoning { budget: request.thinking_token_budget.map(|n| n.0), ..Reasoning::default() };
    conversation.thinking = thinking
        .unwrap_or_default()
        .or(effort.map(Reasoning::of_effort).unwrap_or_default())
        .or(reasoning.unwrap_or_default())
        .or(budget);
    conversation.variables = request.chat_template_kwargs.clone().unwrap_or_default();
    if let Some(documents) = &request.documents {
        conversation.variables.insert("documents".into(), json!(documents));
    }
    conversation.continues = request.continue_final_message == Some(true);
    if conversation.continues && request.add_generation_prompt == Some(true) {
        let message = "continue_final_message and add_generation_prompt exclude each other; leave one out";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    if conversation.continues && conversation.messages.last().is_none_or(|m| m["role"] != "assistant") {
        let message = "continue_final_message is set, but the last message is not the assistant's";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    if request.add_generation_prompt == Some(false) {
        conversation.variables.insert("add_generation_prompt".into(), json!(false));
    }
    if request.modalities.iter().flatten().any(|modality| modality != "text") {
        return Err(ApiError::invalid(
            "modalities",
            "modalities asks for more than text, which is all this model writes",
        ));
    }
    Ok(conversation)
}

/// `{"effort": .., "max_tokens": .., "enabled": ..}`, as gateways write it.
pub(crate) fn read_reasoning(value: &Value, path: &str) -> Result<Reasoning, ApiError> {
    let map = object(value, path)?;
    let effort = optional(map, "effort").map(|effort| read_effort(effort, &format!("{path}.effort"))).transpose()?;
    let budget = optional(map, "max_tokens").map(|n| count(n, &format!("{path}.max_tokens"))).transpose()?;
    let is_on = optional(map, "enabled").and_then(Value::as_bool);
    let thinking = Reasoning { is_on, effort: None, budget };
    Ok(thinking.or(effort.map(Reasoning::of_effort).unwrap_or_default()))
}

/// A tool of Chat Completions; `None` for those that a vendor would run.
fn read_tool(tool: &Value, path: &str, notes: &mut Notes) -> Result<Option<Tool>, ApiError> {
    let map = object(tool, path)?;
    match kind(map, "function", path)? {
        kind @ ("function" | "custom") => {
            let inner = format!("{path}.{kind}");
            let (definition, inner) = match optional(map, kind) {
                Some(definition) => (object(definition, &inner)?, inner),
                None if map.contains_key("name") => (map, path.to_owned()),
                None => return Err(missing(&inner)),
            };
            match kind {
                "custom" => Tool::custom(definition, &inner).map(Some),
                _ => Tool::function(definition, "parameters", &inner).map(Some),
            }
        }
        "" => Err(missing(&format!("{path}.type"))),
        other => {
            notes.add(format!("the tool of type {other:?} was left out: this server does not run such tools"));
            Ok(None)
        }
    }
}

/// A message as chat templates expect it: text as a string, arguments as objects.
pub(crate) fn read_message(message: &Value, path: &str, notes: &mut Notes) -> Result<Value, ApiError> {
    let map = object(message, path)?;
    let role = match required_text(map, "role", path)? {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => "tool",
        other => {
            let message = format!("role is {other:?}, expected system, developer, user, assistant or tool");
            return Err(ApiError::invalid(&format!("{path}.role"), message));
        }
    };
    let content = map.get("content").unwrap_or(&Value::Null);
    let mut content = content_text(content, &format!("{path}.content"), notes)?;
    let mut value = json!({"role": role});
    if role == "assistant" {
        if content.is_empty()
            && let Some(refusal) = optional_text(map, "refusal", path)?
        {
            content = refusal.to_owned();
        }
        let reasoning = optional_text(map, "reasoning_content", path)?.map(str::to_owned);
        let reasoning = reasoning.or_else(|| map.get("reasoning").and_then(Value::as_str).map(str::to_owned));
        match (reasoning, split_reasoning(&content)) {
            (Some(reasoning), _) => value["reasoning_content"] = json!(reasoning),
            (None, Some((reasoning, answer))) => {
                value["reasoning_content"] = json!(reasoning);
                content = answer.to_owned();
            }
            (None, None) => {}
        }
        let calls = read_calls(map, path)?;
        if !calls.is_empty() {
            value["tool_calls"] = json!(calls);
        }
    }
    value["content"] = json!(content);
    for key in ["tool_call_id", "name"] {
        if let Some(text) = optional_text(map, key, path)? {
            value[key] = json!(text);
        }
    }
    Ok(value)
}

/// Calls of an earlier answer.
fn read_calls(message: &Map<String, Value>, path: &str) -> Result<Vec<Value>, ApiError> {
    let mut calls = vec![];
    if let Some(listed) = optional(message, "tool_calls") {
        let path = format!("{path}.tool_calls");
        for (i, call) in list(listed, &path)?.iter().enumerate() {
            let path = format!("{path}[{i}]");
            let map = object(call, &path)?;
            let id = optional_text(map, "id", &path)?.unwrap_or_default();
            match kind(map, "function", &path)? {
                "custom" => {
                    let path = format!("{path}.custom");
                    let custom = object(map.get("custom").ok_or_else(|| missing(&path))?, &path)?;
                    calls.push(custom_call(custom, id, &path)?);
                }
                "function" => {
                    let path = format!("{path}.function");
                    let function = object(map.get("function").ok_or_else(|| missing(&path))?, &path)?;
                    calls.push(function_call(function, id, &path)?);
                }
                other => {
                    let message = format!("type is {other:?}, expected \"function\" or \"custom\"");
                    return Err(ApiError::invalid(&format!("{path}.type"), message));
                }
            }
        }
    } else if let Some(call) = optional(message, "function_call") {
        let path = format!("{path}.function_call");
        calls.push(function_call(object(call, &path)?, "", &path)?);
    }
    Ok(calls)
}

/// The prompt of a conversation, and how to continue it.
fn ask(app: &App, request: &ChatRequest, conversation: &mut Conversation) -> Result<Ask, ApiError> {
    let top_logprobs = match (request.logprobs == Some(true), request.top_logprobs) {
        (_, Some(Count(n))) if n > 20 => {
            return Err(ApiError::invalid("top_logprobs", format!("top_logprobs is {n}, expected 0 to 20")));
        }
        (true, n) => Some(n.map_or(0, |n| n.0 as usize)),
        (false, _) => None,
    };
    let overrides = request.sampling(app.vocab_size)?;
    Ok(Ask {
        overrides,
        max_tokens: request.max_completion_tokens.or(request.max_tokens).map(|n| n.0),
        min_tokens: request.min_tokens.map_or(0, |n| n.0),
        stop: request.stops()?,
        stop_token_ids: TokenId::all(request.stop_token_ids.as_deref().unwrap_or_default()),
        ignore_eos: request.ignore_eos == Some(true),
        top_logprobs,
        n: request.n.map_or(1, |n| n.0 as usize),
        ..conversation.ask(app)?
    })
}

/// The form that vLLM's fields ask for.
fn form_of(outputs: &StructuredOutputs) -> Result<Option<Form>, ApiError> {
    let StructuredOutputs { json, regex, choice, grammar } = outputs;
    let forms: Vec<Form> = [
        json.clone().map(Form::JsonSchema),
        regex.clone().map(Form::Regex),
        choice.clone().filter(|texts| !texts.is_empty()).map(Form::Choice),
        grammar.clone().map(Form::Lark),
    ]
    .into_iter()
    .flatten()
    .collect();
    match <[Form; 1]>::try_from(forms) {
        Ok([form]) => Ok(Some(form)),
        Err(forms) if forms.is_empty() => Ok(None),
        Err(_) => {
            let message = "structured_outputs takes one of json, regex, choice and grammar";
            Err(ApiError::invalid("structured_outputs", message))
        }
    }
}

/// Continues a text.
#[utoipa::path(
    post, path = "/v1/completions", tag = "OpenAI", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer, or its events", content(
            (Completion = "application/json"), (StreamEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
        (status = "5XX", description = "The engine is not there, or too slow", body = ErrorResponse),
    )
)]
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    body: Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let Body { value: request, notes, admitted } = body;
    app.check_model(request.model.as_deref())?;
    app.worker.check_open()?;
    if let Some(Count(n)) = request.logprobs.filter(|n| n.0 > 20) {
        return Err(ApiError::invalid("logprobs", format!("logprobs is {n}, expected 0 to 20")));
    }
    let prompts = prompts(&app, &request.prompt)?;
    let n_prompt = prompts.iter().map(Vec::len).sum();
    let n = request.n.map_or(1, |n| n.0 as usize);
    // OpenAI's default.
    let max_tokens = request.max_tokens.map_or(16, |n| n.0);
    let ask = Ask {
        param: "prompt",
        overrides: request.sampling(app.vocab_size)?,
        max_tokens: Some(max_tokens),
        min_tokens: request.min_tokens.map_or(0, |n| n.0),
        stop: request.stops()?,
        stop_token_ids: TokenId::all(request.stop_token_ids.as_deref().unwrap_or_default()),
        ignore_eos: request.ignore_eos == Some(true),
        top_logprobs: request.logprobs.map(|n| n.0 as usize),
        form: request.structured_outputs().as_ref().map(form_of).transpose()?.flatten(),
        n,
        ..Ask::default()
    };
    prompts.iter().try_for_each(|prompt| app.check_prompt(&ask, prompt))?;
    let is_echo = request.echo == Some(true);
    let mut echoes = vec![];
    for prompt in &prompts {
        let echo = match (is_echo, ask.top_logprobs) {
            (true, Some(n_top)) => Echo::scored(&app, prompt, n_top).await?,
            (true, None) => Echo::plain(&app, prompt)?,
            (false, _) => Echo::default(),
        };
        echoes.extend(std::iter::repeat_n(echo, n));
    }
    // Where nothing is to be written, the echo is the answer.
    let generations = if max_tokens == 0 { vec![] } else { app.start_all(&ask, prompts)? };
    drop(admitted);
    let (id, created, model) = (new_id("cmpl-"), now(), app.model_name().to_owned());
    let wants_logprobs = request.logprobs.is_some();
    if request.stream != Some(true) {
        let (mut answers, usage) = Answer::all(n_prompt, generations).await?;
        answers.resize_with(echoes.len(), || Answer { finish: Some(Finish::Length), ..Answer::default() });
        let choices = answers.into_iter().zip(echoes).enumerate().map(|(index, (answer, echo))| {
            let Echo { text, mut logprobs, mut offset } = echo;
            logprobs.add(&answer.logprobs, &mut offset);
            CompletionChoice {
                index,
                finish_reason: answer.finish_name(),
                text: text + &answer.content,
                logprobs: wants_logprobs.then_some(logprobs),
            }
        });
        let choices = choices.collect();
        let completion = Completion { id, object: "text_completion", created, model, choices, usage };
        return Ok(notes.on(axum::Json(completion).into_response()));
    }
    let frame = move |choices: Value| json!({"id": id, "object": "text_completion", "created": created, "model": model, "choices": choices});
    let usage = UsageEvents::of(request.stream_options.as_ref());
    let response = if max_tokens == 0 {
        stream(&app, move |events| async move {
            for (index, echo) in echoes.into_iter().enumerate() {
                let logprobs = wants_logprobs.then_some(echo.logprobs);
                let choice =
                    json!({"index": index, "text": echo.text, "logprobs": logprobs, "finish_reason": "length"});
                if send_json(&events, &frame(json!([choice]))).await.is_err() {
                    return;
                }
            }
            if usage != UsageEvents::None {
                let mut last = frame(json!([]));
                last["usage"] = json!(Usage::new(n_prompt, 0, 0, 0));
                let _ = send_json(&events, &last).await;
            }
            let _ = send(&events, Event::default().data("[DONE]")).await;
        })
    } else {
        let pieces = move |index: usize| TextPieces { offset: echoes[index].offset, echo: Some(echoes[index].clone()) };
        let answers = Answers { n_prompt, generations, usage };
        stream(&app, move |events| write_stream(events, answers, frame, pieces))
    };
    Ok(notes.on(response))
}

/// A prompt before its answer.
#[derive(Clone, Default)]
struct Echo {
    text: String,
    logprobs: CompletionLogprobs,
    /// Characters of it.
    offset: usize,
}

impl Echo {
    fn plain(app: &App, prompt: &[u32]) -> Result<Echo, ApiError> {
        let text = app.tokenizer.decode(prompt, true).map_err(|e| ApiError::internal(e.to_string()))?;
        Ok(Echo { offset: text.chars().count(), text, ..Echo::default() })
    }

    /// With what the model makes of each of its tokens.
    async fn scored(app: &App, prompt: &[u32], n_top: usize) -> Result<Echo, ApiError> {
        let scores = app.worker.score(prompt.to_vec(), n_top, app.timeout).await?;
        let mut echo = Echo::plain(app, prompt)?;
        let mut decoder = app.tokenizer.decode_stream(true);
        let mut offset = 0;
        for (i, id) in prompt.iter().enumerate() {
            let piece = decoder.push(*id).map_err(|e| ApiError::internal(e.to_string()))?;
            // Nothing comes before the first, which has no probability.
            match i.checked_sub(1).and_then(|i| scores.get(i)) {
                Some(score) => echo.logprobs.add(&[app.token_logprob(*id, score)], &mut offset.clone()),
                None => {
                    let bytes = app.tokenizer.token_bytes(*id).unwrap_or_default();
                    echo.logprobs.tokens.push(String::from_utf8_lossy(&bytes).into_owned());
                    echo.logprobs.token_logprobs.push(None);
                    echo.logprobs.top_logprobs.push(None);
                    echo.logprobs.text_offset.push(offset);
                }
            }
            offset += piece.chars().count();
        }
        Ok(echo)
    }
}

/// Texts of a completion stream.
struct TextPieces {
    echo: Option<Echo>,
    /// Characters so far.
    offset: usize,
}

impl Pieces for TextPieces {
    fn open(&mut self) -> Option<Value> {
        let echo = self.echo.take().filter(|echo| !echo.text.is_empty() || !echo.logprobs.tokens.is_empty())?;
        let logprobs = (!echo.logprobs.tokens.is_empty()).then_some(echo.logprobs);
        Some(json!({"text": echo.text, "logprobs": logprobs, "finish_reason": null}))
    }

    fn choices(&mut self, chunk: Chunk) -> Vec<Value> {
        let text: String = chunk
            .deltas
            .into_iter()
            .map(|delta| match delta {
                Delta::Content(text) => text,
                _ => String::new(),
            })
            .collect();
        let mut logprobs = CompletionLogprobs::default();
        logprobs.add(&chunk.logprobs, &mut self.offset);
        let logprobs = if chunk.logprobs.is_empty() { Value::Null } else { json!(logprobs) };
        let finish = chunk.finish.map(|finish| finish.name());
        vec![json!({"text": text, "logprobs": logprobs, "finish_reason": finish})]
    }
}

impl CompletionLogprobs {
    /// Adds tokens whose text begins at a character of the answer.
    fn add(&mut self, logprobs: &[TokenLogprob], offset: &mut usize) {
        for token in logprobs {
            let mut top: BTreeMap<String, f32> = BTreeMap::new();
            for other in &token.top_logprobs {
                // Tokens of half a character may share a name: the likeliest is first.
                top.entry(other.token.clone()).or_insert(other.logprob);
            }
            top.entry(token.token.clone()).or_insert(token.logprob);
            self.tokens.push(token.token.clone());
            self.token_logprobs.push(Some(token.logprob));
            self.top_logprobs.push(Some(top));
            self.text_offset.push(*offset);
            *offset += token.token.chars().count();
        }
    }
}

fn prompts(app: &App, prompt: &Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let n_prompts = match prompt {
        Prompt::Texts(texts) => texts.len(),
        Prompt::TokenLists(lists) => lists.len(),
        Prompt::Text(_) | Prompt::Tokens(_) => 1,
    };
    if !(1..=64).contains(&n_prompts) {
        return Err(ApiError::invalid("prompt", format!("there are {n_prompts} prompts, expected 1 to 64")));
    }
    let encode = |text: &String| app.encode("prompt", text, true);
    let prompts = match prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Tokens(ids) => vec![TokenId::all(ids)],
        Prompt::TokenLists(lists) => lists.iter().map(|ids| TokenId::all(ids)).collect(),
    };
    // An empty prompt begins a text, as after the end of another (OpenAI's rule).
    let start = app.defaults.eos_token_ids.first().copied();
    Ok(prompts.into_iter().map(|ids| if ids.is_empty() { start.into_iter().collect() } else { ids }).collect())
}
