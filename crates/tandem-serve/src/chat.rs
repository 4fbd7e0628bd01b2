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
use crate::error::{ApiError, Body, ErrorResponse};
use crate::generation::{Answer, Ask, Chat, Chunk, Generation, new_id, now, total};
use crate::grammar::Form;
use tandem_text::dialect::Delta;

/// Events that may wait for a slow reader before its stream pauses.
const BUFFER: usize = 64;
/// Between comments that keep an idle stream open.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Time after a request's deadline in which its reader may take the rest.
const GRACE: Duration = Duration::from_secs(30);

/// Where a stream's events go.
pub(crate) type Events = Sender<Result<Event, Infallible>>;

/// The client is gone.
pub(crate) struct Gone;

/// Sends one event.
pub(crate) async fn send(events: &Events, event: Event) -> Result<(), Gone> {
    events.send(Ok(event)).await.map_err(|_| Gone)
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
pub(crate) async fn chat(State(app): State<Arc<App>>, Body(request): Body<ChatRequest>) -> Result<Response, ApiError> {
    app.check_model(request.model.as_deref())?;
    let ask = ask(&app, &request)?;
    let n_prompt = ask.prompt.len();
    let generations = app.start(ask)?;
    let (id, created, model) = (new_id("chatcmpl-"), now(), app.model_name().to_owned());
    if request.stream != Some(true) {
        let (answers, usage) = Answer::all(n_prompt, generations).await?;
        let wants_logprobs = request.logprobs == Some(true);
        let choices = answers.into_iter().enumerate().map(|(i, a)| chat_choice(i, a, wants_logprobs)).collect();
        return Ok(axum::Json(ChatCompletion { id, object: "chat.completion", created, model, choices, usage })
            .into_response());
    }
    let frame = move |choices: Value| json!({"id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices});
    let answers = Answers { n_prompt, generations, usage: UsageEvents::of(request.stream_options.as_ref()) };
    Ok(stream(&app, move |events| write_stream(events, answers, frame, |_| ChatPieces::default())))
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

/// Deltas of a chat stream.
#[derive(Default)]
struct ChatPieces {
    n_calls: usize,
}

impl Pieces for ChatPieces {
    fn open(&mut self) -> Option<Value> {
        Some(json!({"delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}))
    }

    fn choices(&mut self, chunk: Chunk) -> Vec<Value> {
        let mut choices: Vec<Value> = chunk
            .deltas
            .into_iter()
            .filter_map(|delta| self.delta(delta))
            .map(|delta| json!({"delta": delta, "logprobs": null, "finish_reason": null}))
            .collect();
        if !chunk.logprobs.is_empty() {
            if choices.is_empty() {
                choices.push(json!({"delta": {}, "logprobs": null, "finish_reason": null}));
            }
            choices[0]["logprobs"] = json!({"content": chunk.logprobs});
        }
        if let Some(finish) = chunk.finish {
            choices.push(json!({"delta": {}, "logprobs": null, "finish_reason": finish.name()}));
        }
        choices
    }
}

impl ChatPieces {
    fn delta(&mut self, delta: Delta) -> Option<Value> {
        Some(match delta {
            Delta::Reasoning(text) => json!({"reasoning_content": text}),
            Delta::Content(text) => json!({"content": text}),
            Delta::Call { name } => {
                self.n_calls += 1;
                json!({"tool_calls": [{
                    "index": self.n_calls - 1, "id": new_id("call_"), "type": "function",
                    "function": {"name": name, "arguments": ""},
                }]})
            }
            Delta::Arguments(json) => {
                json!({"tool_calls": [{"index": self.n_calls - 1, "function": {"arguments": json}}]})
            }
            Delta::EndCall => return None,
        })
    }
}

fn chat_choice(index: usize, answer: Answer, wants_logprobs: bool) -> ChatChoice {
    let finish_reason = answer.finish_name();
    let tool_calls: Vec<ToolCall> = answer
        .calls
        .into_iter()
        .map(|(name, arguments)| ToolCall {
            id: new_id("call_"),
            r#type: FunctionType::Function,
            function: FunctionCall { name, arguments },
        })
        .collect();
    let is_call = !tool_calls.is_empty();
    ChatChoice {
        index,
        message: AssistantMessage {
            role: "assistant",
            content: (!is_call || !answer.content.is_empty()).then_some(answer.content),
            reasoning_content: (!answer.reasoning.is_empty()).then_some(answer.reasoning),
            tool_calls: is_call.then_some(tool_calls),
        },
        logprobs: wants_logprobs.then_some(ChatLogprobs { content: answer.logprobs }),
        finish_reason,
    }
}

/// Checks a conversation and makes its prompt.
fn ask(app: &App, request: &ChatRequest) -> Result<Ask, ApiError> {
    if request.messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty; give at least one"));
    }
    let messages: Vec<Value> = request.messages.iter().map(template_message).collect();
    let tools = request.tools.as_deref().unwrap_or_default();
    let functions = choose_functions(tools, request.tool_choice.as_ref())?;
    let mut variables = Map::new();
    let thinking = match (&request.thinking, request.reasoning_effort) {
        (Some(thinking), _) => Some(thinking.r#type != ThinkingType::Disabled),
        (None, effort) => effort.map(|effort| effort != ReasoningEffort::None),
    };
    if let Some(thinking) = thinking {
        variables.insert("enable_thinking".into(), Value::Bool(thinking));
    }
    variables.extend(request.chat_template_kwargs.clone().unwrap_or_default());
    let top_logprobs = match (request.logprobs == Some(true), request.top_logprobs) {
        (_, Some(Count(n))) if n > 20 => {
            return Err(ApiError::invalid("top_logprobs", format!("top_logprobs is {n}, expected 0 to 20")));
        }
        (true, n) => Some(n.map_or(0, |n| n.0 as usize)),
        (false, _) => None,
    };
    let one_call = request.parallel_tool_calls == Some(false);
    let form = match functions.is_required {
        true => Some(Form::Calls { functions: functions.callable.clone(), parallel: !one_call }),
        false => form_of(request.response_format.as_ref(), request.structured_outputs.as_ref())?,
    };
    chat_ask(app, &messages, tools, functions, &variables, one_call)
        .map(|ask| Ask {
            overrides: Default::default(),
            max_tokens: request.max_completion_tokens.or(request.max_tokens).map(|n| n.0),
            min_tokens: request.min_tokens.map_or(0, |n| n.0),
            stop: request.stop.clone().map_or_else(Vec::new, OneOrMany::into_vec),
            stop_token_ids: TokenId::all(request.stop_token_ids.as_deref().unwrap_or_default()),
            ignore_eos: request.ignore_eos == Some(true),
            top_logprobs,
            form,
            n: request.n.map_or(1, |n| n.0 as usize),
            ..ask
        })
        .and_then(|ask| Ok(Ask { overrides: request.sampling(app.vocab_size)?, ..ask }))
}

/// Which functions may, or must, be called.
pub(crate) struct Functions {
    pub(crate) callable: Vec<tandem_text::dialect::Function>,
    pub(crate) is_required: bool,
}

/// What `tool_choice` makes of the declared tools.
pub(crate) fn choose_functions(tools: &[Tool], choice: Option<&ToolChoice>) -> Result<Functions, ApiError> {
    if tools.iter().any(|tool| tool.function.name.is_empty()) {
        return Err(ApiError::invalid("tools", "a tool has an empty name"));
    }
    let mut callable: Vec<_> = tools.iter().map(Tool::declaration).collect();
    let is_required = match choice {
        None | Some(ToolChoice::Mode(ToolMode::Auto)) => false,
        Some(ToolChoice::Mode(ToolMode::None)) => {
            callable.clear();
            false
        }
        Some(ToolChoice::Mode(ToolMode::Required)) if tools.is_empty() => {
            return Err(ApiError::invalid("tool_choice", "tool_choice is \"required\", but there are no tools"));
        }
        Some(ToolChoice::Mode(ToolMode::Required)) => true,
        Some(ToolChoice::Function(named)) => {
            callable.retain(|f| f.name == named.function.name);
            if callable.is_empty() {
                let message = format!("tool_choice names {:?}, which is not among the tools", named.function.name);
                return Err(ApiError::invalid("tool_choice", message));
            }
            true
        }
    };
    Ok(Functions { callable, is_required })
}

/// A conversation's prompt, with everything else at its default.
pub(crate) fn chat_ask(
    app: &App,
    messages: &[Value],
    tools: &[Tool],
    functions: Functions,
    variables: &Map<String, Value>,
    one_call: bool,
) -> Result<Ask, ApiError> {
    let tools: Vec<Value> = tools.iter().map(|tool| json!(tool)).collect();
    let shown = (!tools.is_empty() && !functions.callable.is_empty()).then_some(&tools[..]);
    let (prompt, in_reasoning) = app.prompt(messages, shown, variables)?;
    Ok(Ask {
        param: "messages",
        prompt,
        chat: Some(Chat { functions: functions.callable, in_reasoning, one_call }),
        n: 1,
        ..Ask::default()
    })
}

/// A message as chat templates expect it: text as a string, arguments as objects.
fn template_message(message: &Message) -> Value {
    let role = match message.role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    };
    let mut value = json!({"role": role, "content": message.content.as_ref().map_or_else(String::new, Content::text)});
    if let Some(reasoning) = &message.reasoning_content {
        value["reasoning_content"] = json!(reasoning);
    }
    if let Some(calls) = message.tool_calls.as_ref().filter(|calls| !calls.is_empty()) {
        let calls: Vec<Value> =
            calls.iter().map(|call| template_call(&call.id, &call.function.name, &call.function.arguments)).collect();
        value["tool_calls"] = json!(calls);
    }
    if let Some(id) = &message.tool_call_id {
        value["tool_call_id"] = json!(id);
    }
    if let Some(name) = &message.name {
        value["name"] = json!(name);
    }
    value
}

/// A call as chat templates expect it.
pub(crate) fn template_call(id: &str, name: &str, arguments: &str) -> Value {
    let arguments = match serde_json::from_str::<Value>(arguments) {
        Ok(Value::Object(map)) => Value::Object(map),
        Ok(Value::Null) => json!({}),
        // A call that was cut off; the model sees what it wrote.
        _ if arguments.trim().is_empty() => json!({}),
        _ => json!({"arguments": arguments}),
    };
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

fn form_of(format: Option<&ResponseFormat>, outputs: Option<&StructuredOutputs>) -> Result<Option<Form>, ApiError> {
    if let Some(StructuredOutputs { json, regex, choice, grammar }) = outputs {
        let forms: Vec<Form> = [
            json.clone().map(|schema| Form::JsonSchema(Value::Object(schema))),
            regex.clone().map(Form::Regex),
            choice.clone().filter(|texts| !texts.is_empty()).map(Form::Choice),
            grammar.clone().map(Form::Lark),
        ]
        .into_iter()
        .flatten()
        .collect();
        return match <[Form; 1]>::try_from(forms) {
            Ok([form]) => Ok(Some(form)),
            Err(forms) if forms.is_empty() => Ok(None),
            Err(_) => {
                let message = "structured_outputs takes one of json, regex, choice and grammar";
                Err(ApiError::invalid("structured_outputs", message))
            }
        };
    }
    Ok(match format {
        None | Some(ResponseFormat::Text) => None,
        Some(ResponseFormat::JsonObject) => Some(Form::JsonSchema(json!({"type": "object"}))),
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            Some(Form::JsonSchema(Value::Object(json_schema.schema.clone())))
        }
    })
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
    Body(request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    app.check_model(request.model.as_deref())?;
    let prompts = prompts(&app, &request.prompt)?;
    if let Some(Count(n)) = request.logprobs.filter(|n| n.0 > 20) {
        return Err(ApiError::invalid("logprobs", format!("logprobs is {n}, expected 0 to 20")));
    }
    let overrides = request.sampling(app.vocab_size)?;
    let mut generations = vec![];
    let mut echoes = vec![];
    for prompt in &prompts {
        let started = app.start(Ask {
            param: "prompt",
            prompt: prompt.clone(),
            overrides: overrides.clone(),
            // OpenAI's default.
            max_tokens: Some(request.max_tokens.map_or(16, |n| n.0)),
            min_tokens: request.min_tokens.map_or(0, |n| n.0),
            stop: request.stop.clone().map_or_else(Vec::new, OneOrMany::into_vec),
            stop_token_ids: TokenId::all(request.stop_token_ids.as_deref().unwrap_or_default()),
            ignore_eos: request.ignore_eos == Some(true),
            top_logprobs: request.logprobs.map(|n| n.0 as usize),
            form: form_of(None, request.structured_outputs.as_ref())?,
            chat: None,
            n: request.n.map_or(1, |n| n.0 as usize),
        })?;
        let echo = match request.echo {
            Some(true) => app.tokenizer.decode(prompt, true).map_err(|e| ApiError::internal(e.to_string()))?,
            _ => String::new(),
        };
        for mut generation in started {
            generation.index = generations.len();
            echoes.push(echo.clone());
            generations.push(generation);
        }
    }
    let n_prompt = prompts.iter().map(Vec::len).sum();
    let (id, created, model) = (new_id("cmpl-"), now(), app.model_name().to_owned());
    let wants_logprobs = request.logprobs.is_some();
    if request.stream != Some(true) {
        let (answers, usage) = Answer::all(n_prompt, generations).await?;
        let choices = answers.into_iter().zip(echoes).enumerate().map(|(index, (answer, echo))| {
            let mut logprobs = CompletionLogprobs::default();
            add_logprobs(&mut logprobs, &answer.logprobs, &mut 0);
            CompletionChoice {
                index,
                finish_reason: answer.finish_name(),
                text: echo + &answer.content,
                logprobs: wants_logprobs.then_some(logprobs),
            }
        });
        let choices = choices.collect();
        return Ok(
            axum::Json(Completion { id, object: "text_completion", created, model, choices, usage }).into_response()
        );
    }
    let frame = move |choices: Value| json!({"id": id, "object": "text_completion", "created": created, "model": model, "choices": choices});
    let pieces = move |index: usize| TextPieces { echo: echoes[index].clone(), offset: 0 };
    let answers = Answers { n_prompt, generations, usage: UsageEvents::of(request.stream_options.as_ref()) };
    Ok(stream(&app, move |events| write_stream(events, answers, frame, pieces)))
}

/// Texts of a completion stream.
struct TextPieces {
    echo: String,
    /// Characters so far.
    offset: usize,
}

impl Pieces for TextPieces {
    fn open(&mut self) -> Option<Value> {
        (!self.echo.is_empty()).then(|| json!({"text": self.echo, "logprobs": null, "finish_reason": null}))
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
        add_logprobs(&mut logprobs, &chunk.logprobs, &mut self.offset);
        let logprobs = if chunk.logprobs.is_empty() { Value::Null } else { json!(logprobs) };
        let finish = chunk.finish.map(|finish| finish.name());
        vec![json!({"text": text, "logprobs": logprobs, "finish_reason": finish})]
    }
}

fn add_logprobs(to: &mut CompletionLogprobs, logprobs: &[TokenLogprob], offset: &mut usize) {
    for token in logprobs {
        let top: BTreeMap<String, f32> = token.top_logprobs.iter().map(|t| (t.token.clone(), t.logprob)).collect();
        to.tokens.push(token.token.clone());
        to.token_logprobs.push(token.logprob);
        to.top_logprobs.push(top);
        to.text_offset.push(*offset);
        *offset += token.token.chars().count();
    }
}

fn prompts(app: &App, prompt: &Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |text: &String| app.encode("prompt", text, true);
    let prompts = match prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Tokens(ids) => vec![TokenId::all(ids)],
        Prompt::TokenLists(lists) => lists.iter().map(|ids| TokenId::all(ids)).collect(),
    };
    if prompts.len() > 64 {
        return Err(ApiError::invalid("prompt", format!("there are {} prompts, expected at most 64", prompts.len())));
    }
    let prompts = if prompts.is_empty() { vec![vec![]] } else { prompts };
    // An empty prompt begins a text, as after the end of another (OpenAI's rule).
    let start = app.defaults.eos_token_ids.first().copied();
    Ok(prompts.into_iter().map(|ids| if ids.is_empty() { start.into_iter().collect() } else { ids }).collect())
}
