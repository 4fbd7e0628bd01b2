//! Request and response bodies of OpenAI's interface, with vLLM's further sampling fields.

use std::collections::BTreeMap;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Number, Value};
use tandem_engine::SamplingOverrides;
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::strict::{named_by_type, objects};
use tandem_text::dialect::Function;

objects!(
    ChatRequest, CompletionRequest, StreamOptions, Message, TextPart, NamedTool, ToolName, JsonSchemaFormat,
    StructuredOutputs, Thinking; ToolCall, FunctionCall, Tool, FunctionDefinition
);
named_by_type!(ResponseFormat);

/// One string or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub(crate) fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// Largest absolute value of a whole number.
pub(crate) const LARGEST_INTEGER: i64 = 9_000_000_000_000_000_000;

/// A whole number, which JSON may also write as `3.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Integer(pub(crate) i64);

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = Number::deserialize(deserializer)?;
        let whole = number.as_f64().filter(|n| number.is_f64() && n.fract() == 0.0).map(|n| n as i64);
        let value = number.as_i64().or(whole).filter(|n| n.unsigned_abs() <= LARGEST_INTEGER.unsigned_abs());
        value.map(Integer).ok_or_else(|| Error::custom(format!("expected a whole number, found {number}")))
    }
}

/// A number of things, 0 to 2147483647.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count(pub(crate) u32);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Integer(value) = Integer::deserialize(deserializer)?;
        let count = i32::try_from(value).ok().and_then(|n| u32::try_from(n).ok());
        count.map(Count).ok_or_else(|| Error::custom(format!("expected 0 to {}, found {value}", i32::MAX)))
    }
}

/// A token of the model's vocabulary; the served document says how large that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ToSchema)]
pub(crate) struct TokenId(pub(crate) u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Count::deserialize(deserializer).map(|Count(id)| TokenId(id))
    }
}

impl TokenId {
    /// The ids.
    pub(crate) fn all(tokens: &[TokenId]) -> Vec<u32> {
        tokens.iter().map(|token| token.0).collect()
    }
}

/// Adds the fields that chat and plain completions share.
macro_rules! with_common_fields {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Deserialize, ToSchema)]
        #[serde(remote = "Self")]
        pub(crate) struct $name {
            $($(#[$field_meta])* pub(crate) $field: $type,)*
            /// Name of the model, as /v1/models lists it.
            pub(crate) model: Option<String>,
            /// Answer as server-sent events.
            pub(crate) stream: Option<bool>,
            pub(crate) stream_options: Option<StreamOptions>,
            /// Tokens to generate at most.
            #[schema(value_type = Option<u32>)]
            pub(crate) max_tokens: Option<Count>,
            /// Answers to generate.
            #[schema(value_type = Option<u32>, minimum = 1, maximum = 16)]
            pub(crate) n: Option<Count>,
            #[schema(value_type = Option<i64>)]
            pub(crate) seed: Option<Integer>,
            /// Texts that end the answer.
            pub(crate) stop: Option<OneOrMany>,
            /// 0 always takes the likeliest token.
            #[schema(minimum = 0, maximum = 2)]
            pub(crate) temperature: Option<f32>,
            #[schema(minimum = 0, maximum = 1)]
            pub(crate) top_p: Option<f32>,
            /// 0 or -1 considers every token.
            #[schema(value_type = Option<i32>, minimum = -1)]
            pub(crate) top_k: Option<Integer>,
            #[schema(minimum = 0, maximum = 1)]
            pub(crate) min_p: Option<f32>,
            #[schema(minimum = -2, maximum = 2)]
            pub(crate) presence_penalty: Option<f32>,
            #[schema(minimum = -2, maximum = 2)]
            pub(crate) frequency_penalty: Option<f32>,
            #[schema(minimum = 0.01, maximum = 100)]
            pub(crate) repetition_penalty: Option<f32>,
            /// Token ids, each with a number from -100 to 100 that is added to its logit.
            #[schema(value_type = Option<Object>)]
            pub(crate) logit_bias: Option<BTreeMap<String, f32>>,
            /// Go on after an end-of-text token.
            pub(crate) ignore_eos: Option<bool>,
            /// Tokens before an end-of-text token is allowed.
            #[schema(value_type = Option<u32>)]
            pub(crate) min_tokens: Option<Count>,
            /// Further tokens that end the answer.
            pub(crate) stop_token_ids: Option<Vec<TokenId>>,
            /// Restricts the answer.
            pub(crate) structured_outputs: Option<StructuredOutputs>,
        }

        impl $name {
            /// What concerns sampling, checked.
            pub(crate) fn sampling(&self, vocab_size: usize) -> Result<SamplingOverrides, ApiError> {
                if let Some(Count(n)) = self.n && !(1..=16).contains(&n) {
                    return Err(ApiError::invalid("n", format!("n is {n}, expected 1 to 16")));
                }
                if let Some(t) = self.temperature && !(0.0..=2.0).contains(&t) {
                    return Err(ApiError::invalid("temperature", format!("temperature is {t}, expected 0 to 2")));
                }
                if let Some(r) = self.repetition_penalty && !(0.01..=100.0).contains(&r) {
                    let message = format!("repetition_penalty is {r}, expected 0.01 to 100");
                    return Err(ApiError::invalid("repetition_penalty", message));
                }
                let top_k = match self.top_k {
                    Some(Integer(k)) if k < -1 || k > i64::from(i32::MAX) => {
                        return Err(ApiError::invalid("top_k", format!("top_k is {k}, expected -1 to {}", i32::MAX)));
                    }
                    k => k.map(|k| k.0.max(0) as u32),
                };
                Ok(SamplingOverrides {
                    temperature: self.temperature,
                    top_k,
                    top_p: self.top_p,
                    min_p: self.min_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: logit_bias(self.logit_bias.as_ref(), vocab_size)?,
                    seed: self.seed.map(|seed| seed.0 as u64),
                })
            }
        }
    };
}

fn logit_bias(bias: Option<&BTreeMap<String, f32>>, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    bias.into_iter()
        .flatten()
        .map(|(token, bias)| match token.parse::<u32>() {
            Ok(id) if (id as usize) < vocab_size && id.to_string() == *token => Ok((id, *bias)),
            _ => {
                let message = format!("logit_bias has the key {token:?}, expected a token id below {vocab_size}");
                Err(ApiError::invalid("logit_bias", message))
            }
        })
        .collect()
}

with_common_fields! {
    /// A conversation to continue.
    ChatRequest {
        /// The conversation so far.
        #[schema(min_items = 1)]
        messages: Vec<Message>,
        /// Tokens to generate at most, reasoning included; wins over max_tokens.
        #[schema(value_type = Option<u32>)]
        max_completion_tokens: Option<Count>,
        /// Return log-probabilities of the tokens.
        logprobs: Option<bool>,
        /// And of this many likeliest ones.
        #[schema(value_type = Option<u32>, minimum = 0, maximum = 20)]
        top_logprobs: Option<Count>,
        /// Functions that the model may call.
        tools: Option<Vec<Tool>>,
        tool_choice: Option<ToolChoice>,
        /// Whether one answer may hold several calls.
        parallel_tool_calls: Option<bool>,
        response_format: Option<ResponseFormat>,
        /// "none" switches reasoning off, anything else on.
        reasoning_effort: Option<ReasoningEffort>,
        thinking: Option<Thinking>,
        /// Further variables of the chat template.
        #[schema(value_type = Option<Object>)]
        chat_template_kwargs: Option<Map<String, Value>>,
    }
}

with_common_fields! {
    /// A text to continue.
    CompletionRequest {
        /// The text, or several.
        prompt: Prompt,
        /// Return log-probabilities of the tokens and of this many likeliest ones.
        #[schema(value_type = Option<u32>, minimum = 0, maximum = 20)]
        logprobs: Option<Count>,
        /// Put the prompt before the answer.
        echo: Option<bool>,
    }
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, a list of texts, a list of token ids or a list of such lists")]
pub(crate) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<TokenId>),
    TokenLists(Vec<Vec<TokenId>>),
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct StreamOptions {
    /// Send a last event with the token counts.
    pub(crate) include_usage: Option<bool>,
    /// And the counts so far in every other event (vLLM's field).
    pub(crate) continuous_usage_stats: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// One turn of a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct Message {
    pub(crate) role: Role,
    pub(crate) content: Option<Content>,
    /// Reasoning of an earlier answer, for models that want it back.
    pub(crate) reasoning_content: Option<String>,
    /// Calls of an earlier answer.
    pub(crate) tool_calls: Option<Vec<ToolCall>>,
    /// The call whose result this is.
    pub(crate) tool_call_id: Option<String>,
    pub(crate) name: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of parts of type text")]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<TextPart>),
}

/// `{"type": "text", "text": ..}`
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct TextPart {
    #[allow(dead_code)] // read for its check alone
    pub(crate) r#type: TextPartType,
    pub(crate) text: String,
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TextPartType {
    Text,
}

impl Content {
    pub(crate) fn text(&self) -> String {
        match self {
            Content::Text(text) => text.clone(),
            Content::Parts(parts) => parts.iter().map(|p| p.text.as_str()).collect::<Vec<_>>().join("\n"),
        }
    }
}

/// A call of a function.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    pub(crate) r#type: FunctionType,
    pub(crate) function: FunctionCall,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FunctionType {
    #[default]
    Function,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct FunctionCall {
    pub(crate) name: String,
    /// JSON text.
    pub(crate) arguments: String,
}

/// A function that the model may call.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct Tool {
    pub(crate) r#type: FunctionType,
    pub(crate) function: FunctionDefinition,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct FunctionDefinition {
    #[schema(min_length = 1)]
    pub(crate) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    /// JSON schema of the arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub(crate) parameters: Option<Map<String, Value>>,
}

impl Tool {
    pub(crate) fn new(name: String, description: Option<String>, parameters: Option<Map<String, Value>>) -> Tool {
        Tool { r#type: FunctionType::Function, function: FunctionDefinition { name, description, parameters } }
    }

    pub(crate) fn declaration(&self) -> Function {
        Function {
            name: self.function.name.clone(),
            parameters: Value::Object(self.function.parameters.clone().unwrap_or_default()),
        }
    }
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": ..}}"
)]
pub(crate) enum ToolChoice {
    Mode(ToolMode),
    Function(NamedTool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ToolMode {
    None,
    Auto,
    Required,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct NamedTool {
    #[serde(rename = "type")]
    #[allow(dead_code)] // read for its check alone
    pub(crate) kind: FunctionType,
    pub(crate) function: ToolName,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct ToolName {
    pub(crate) name: String,
}

/// The form of the answer.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", remote = "Self")]
pub(crate) enum ResponseFormat {
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that fits a schema.
    JsonSchema {
        json_schema: JsonSchemaFormat,
    },
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct JsonSchemaFormat {
    #[allow(dead_code)] // OpenAI wants one
    pub(crate) name: Option<String>,
    #[schema(value_type = Object)]
    pub(crate) schema: Map<String, Value>,
}

/// vLLM's way to restrict an answer; one field of these.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct StructuredOutputs {
    /// A JSON schema.
    #[schema(value_type = Option<Object>)]
    pub(crate) json: Option<Map<String, Value>>,
    /// A regular expression.
    pub(crate) regex: Option<String>,
    /// One of these texts.
    pub(crate) choice: Option<Vec<String>>,
    /// A grammar in Lark's notation.
    pub(crate) grammar: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ReasoningEffort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    Xhigh,
    Max,
}

/// Reasoning on or off, as Anthropic and Z.ai write it.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct Thinking {
    pub(crate) r#type: ThinkingType,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ThinkingType {
    Enabled,
    Adaptive,
    Disabled,
}

/// One server-sent event.
#[derive(ToSchema)]
#[allow(dead_code)] // stands for the events in the OpenAPI document
pub(crate) struct StreamEvent {
    /// JSON, or `[DONE]`.
    data: String,
    event: Option<String>,
}

/// An answer to a conversation.
#[derive(Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: Usage,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: AssistantMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: &'static str,
}

#[derive(Default, Serialize, ToSchema)]
pub(crate) struct AssistantMessage {
    pub(crate) role: &'static str,
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tool_calls: Option<Vec<ToolCall>>,
}

#[derive(Default, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<TokenLogprob>,
}

/// Natural log-probability of a token, and of the likeliest ones at its place.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct TokenLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) top_logprobs: Vec<TopLogprob>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    pub(crate) prompt_tokens_details: PromptTokens,
    pub(crate) completion_tokens_details: CompletionTokens,
}

#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct PromptTokens {
    /// Prompt tokens that an earlier request had left in the cache.
    pub(crate) cached_tokens: usize,
}

#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionTokens {
    pub(crate) reasoning_tokens: usize,
}

impl Usage {
    pub(crate) fn new(prompt: usize, completion: usize, cached: usize, reasoning: usize) -> Usage {
        Usage {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt + completion,
            prompt_tokens_details: PromptTokens { cached_tokens: cached },
            completion_tokens_details: CompletionTokens { reasoning_tokens: reasoning },
        }
    }
}

/// A continued text.
#[derive(Serialize, ToSchema)]
pub(crate) struct Completion {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<CompletionChoice>,
    pub(crate) usage: Usage,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<CompletionLogprobs>,
    pub(crate) finish_reason: &'static str,
}

#[derive(Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    pub(crate) tokens: Vec<String>,
    pub(crate) token_logprobs: Vec<f32>,
    #[schema(value_type = Vec<Object>)]
    pub(crate) top_logprobs: Vec<BTreeMap<String, f32>>,
    /// Where each token begins, in characters of the answer.
    pub(crate) text_offset: Vec<usize>,
}
