//! Request and response bodies of OpenAI's interface, with vLLM's further sampling fields.

use std::collections::BTreeMap;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Number, Value};
use tandem_engine::SamplingOverrides;
use utoipa::ToSchema;

use crate::body::Fields;
use crate::error::ApiError;
use crate::fields::{self, Table};
use crate::strict::objects;

objects!(ChatRequest, CompletionRequest, StreamOptions, StructuredOutputs);

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

/// Of whole numbers, above and below 0.
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

/// Any whole number of 64 bits, with or without a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seed(pub(crate) u64);

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = Number::deserialize(deserializer)?;
        let whole = number.as_f64().filter(|n| number.is_f64() && n.fract() == 0.0 && n.abs() < 9e15);
        let seed = number.as_u64().or(number.as_i64().map(|n| n as u64)).or(whole.map(|n| n as i64 as u64));
        seed.map(Seed).ok_or_else(|| Error::custom(format!("expected a whole number of 64 bits, found {number}")))
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
            pub(crate) seed: Option<Seed>,
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
            /// As structured_outputs.json.
            #[schema(value_type = Option<Object>)]
            pub(crate) guided_json: Option<Value>,
            /// As structured_outputs.regex.
            pub(crate) guided_regex: Option<String>,
            /// As structured_outputs.choice.
            pub(crate) guided_choice: Option<Vec<String>>,
            /// As structured_outputs.grammar.
            pub(crate) guided_grammar: Option<String>,
        }

        impl $name {
            /// Texts that end the answer, checked.
            pub(crate) fn stops(&self) -> Result<Vec<String>, ApiError> {
                check_stops(self.stop.clone().map_or_else(Vec::new, OneOrMany::into_vec), "stop")
            }

            /// How the answer is restricted, under either of vLLM's names.
            pub(crate) fn structured_outputs(&self) -> Option<StructuredOutputs> {
                let guided = StructuredOutputs {
                    json: self.guided_json.clone(),
                    regex: self.guided_regex.clone(),
                    choice: self.guided_choice.clone(),
                    grammar: self.guided_grammar.clone(),
                };
                let is_guided = guided.json.is_some()
                    || guided.regex.is_some()
                    || guided.choice.is_some()
                    || guided.grammar.is_some();
                self.structured_outputs.clone().or(is_guided.then_some(guided))
            }

            /// What concerns sampling, checked.
            pub(crate) fn sampling(&self, vocab_size: usize) -> Result<SamplingOverrides, ApiError> {
                if let Some(Count(n)) = self.n && !(1..=16).contains(&n) {
                    return Err(ApiError::invalid("n", format!("n is {n}, expected 1 to 16")));
                }
                Ok(SamplingOverrides {
                    top_p: self.top_p,
                    min_p: self.min_p,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: logit_bias(self.logit_bias.as_ref(), vocab_size)?,
                    seed: self.seed.map(|seed| seed.0),
                    ..sampling(self.temperature, self.top_k, self.repetition_penalty)?
                })
            }
        }
    };
}

/// The sampling fields whose bounds are the interfaces' own.
pub(crate) fn sampling(
    temperature: Option<f32>,
    top_k: Option<Integer>,
    repetition_penalty: Option<f32>,
) -> Result<SamplingOverrides, ApiError> {
    if let Some(t) = temperature
        && !(0.0..=2.0).contains(&t)
    {
        return Err(ApiError::invalid("temperature", format!("temperature is {t}, expected 0 to 2")));
    }
    if let Some(r) = repetition_penalty
        && !(0.01..=100.0).contains(&r)
    {
        let message = format!("repetition_penalty is {r}, expected 0.01 to 100");
        return Err(ApiError::invalid("repetition_penalty", message));
    }
    let top_k = match top_k {
        Some(Integer(k)) if k < -1 || k > i64::from(i32::MAX) => {
            return Err(ApiError::invalid("top_k", format!("top_k is {k}, expected -1 to {}", i32::MAX)));
        }
        k => k.map(|k| k.0.max(0) as u32),
    };
    Ok(SamplingOverrides { temperature, top_k, repetition_penalty, ..SamplingOverrides::default() })
}

/// Stop strings, bounded: each is looked for in every piece of the answer.
pub(crate) fn check_stops(stops: Vec<String>, param: &str) -> Result<Vec<String>, ApiError> {
    let n_bytes: usize = stops.iter().map(String::len).sum();
    if stops.len() > 256 || n_bytes > 64 << 10 {
        let message =
            format!("{param} has {} texts of {n_bytes} bytes, expected at most 256 of 65536 bytes", stops.len());
        return Err(ApiError::invalid(param, message));
    }
    Ok(stops)
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
        #[schema(min_items = 1, value_type = Vec<Message>)]
        messages: Vec<Value>,
        /// Tokens to generate at most, reasoning included; wins over max_tokens.
        #[schema(value_type = Option<u32>)]
        max_completion_tokens: Option<Count>,
        /// Return log-probabilities of the tokens.
        logprobs: Option<bool>,
        /// And of this many likeliest ones.
        #[schema(value_type = Option<u32>, minimum = 0, maximum = 20)]
        top_logprobs: Option<Count>,
        /// Functions and custom tools that the model may call.
        #[schema(value_type = Option<Vec<ToolDocument>>)]
        tools: Option<Vec<Value>>,
        /// "none", "auto", "required", a tool's name in an object, or allowed_tools.
        #[schema(value_type = Option<ToolChoiceDocument>)]
        tool_choice: Option<Value>,
        /// Whether one answer may hold several calls.
        parallel_tool_calls: Option<bool>,
        /// As tools, in the form from before there were any.
        #[schema(value_type = Option<Vec<FunctionDocument>>)]
        functions: Option<Vec<Value>>,
        /// As tool_choice, in the form from before there were tools.
        #[schema(value_type = Option<ToolMode>)]
        function_call: Option<Value>,
        #[schema(value_type = Option<ResponseFormat>)]
        response_format: Option<Value>,
        /// "none" switches reasoning off, anything else on.
        #[schema(value_type = Option<ReasoningEffort>)]
        reasoning_effort: Option<Value>,
        /// Effort, tokens at most and whether it is shown, as gateways write it.
        #[schema(value_type = Option<ReasoningDocument>)]
        reasoning: Option<Value>,
        /// Whether reasoning is part of the answer.
        include_reasoning: Option<bool>,
        #[schema(value_type = Option<ThinkingDocument>)]
        thinking: Option<Value>,
        /// Tokens of reasoning at most.
        #[schema(value_type = Option<u32>)]
        thinking_token_budget: Option<Count>,
        /// Further variables of the chat template.
        #[schema(value_type = Option<Object>)]
        chat_template_kwargs: Option<Map<String, Value>>,
        /// Texts for templates that know documents.
        #[schema(value_type = Option<Vec<Object>>)]
        documents: Option<Vec<Map<String, Value>>>,
        /// False: the template does not open an answer.
        add_generation_prompt: Option<bool>,
        /// The answer continues the last message, which is the assistant's.
        continue_final_message: Option<bool>,
        /// Kinds of answers; only "text" can be had.
        modalities: Option<Vec<String>>,
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

/// The types that only the OpenAPI document has: requests are read by hand, and more widely than it says.
mod document {
    #![allow(dead_code)]
    use super::*;

    #[derive(ToSchema)]
    #[serde(rename_all = "lowercase")]
    pub(crate) enum Role {
        System,
        Developer,
        User,
        Assistant,
        Tool,
    }

    /// One turn of a conversation.
    #[derive(ToSchema)]
    pub(crate) struct Message {
        role: Role,
        content: Option<Content>,
        /// Reasoning of an earlier answer, for models that want it back.
        reasoning_content: Option<String>,
        /// Calls of an earlier answer.
        tool_calls: Option<Vec<ToolCall>>,
        /// Call of a tool's result.
        tool_call_id: Option<String>,
        name: Option<String>,
    }

    #[derive(ToSchema)]
    #[serde(untagged)]
    pub(crate) enum Content {
        Text(String),
        Parts(Vec<TextPart>),
    }

    /// `{"type": "text", "text": ..}`; images and files are left out with a note.
    #[derive(ToSchema)]
    pub(crate) struct TextPart {
        r#type: TextPartType,
        text: String,
    }

    #[derive(ToSchema)]
    #[serde(rename_all = "snake_case")]
    pub(crate) enum TextPartType {
        Text,
    }

    #[derive(ToSchema)]
    #[serde(rename_all = "lowercase")]
    pub(crate) enum FunctionType {
        Function,
    }

    /// A call of a function.
    #[derive(ToSchema)]
    pub(crate) struct ToolCall {
        id: String,
        r#type: FunctionType,
        function: FunctionCall,
    }

    #[derive(ToSchema)]
    pub(crate) struct FunctionCall {
        name: String,
        /// JSON text.
        arguments: String,
    }

    /// A function that the model may call.
    #[derive(ToSchema)]
    pub(crate) struct ToolDocument {
        r#type: FunctionType,
        function: FunctionDocument,
    }

    #[derive(ToSchema)]
    pub(crate) struct FunctionDocument {
        #[schema(min_length = 1)]
        name: String,
        description: Option<String>,
        /// JSON schema of the arguments.
        #[schema(value_type = Option<Object>)]
        parameters: Option<Map<String, Value>>,
    }

    #[derive(ToSchema)]
    #[serde(untagged)]
    pub(crate) enum ToolChoiceDocument {
        Mode(ToolMode),
        Function(NamedTool),
    }

    #[derive(ToSchema)]
    #[serde(rename_all = "lowercase")]
    pub(crate) enum ToolMode {
        None,
        Auto,
        Required,
    }

    #[derive(ToSchema)]
    pub(crate) struct NamedTool {
        r#type: FunctionType,
        function: ToolName,
    }

    #[derive(ToSchema)]
    pub(crate) struct ToolName {
        name: String,
    }

    /// The form of the answer.
    #[derive(ToSchema)]
    #[serde(tag = "type", rename_all = "snake_case")]
    pub(crate) enum ResponseFormat {
        Text,
        /// Any JSON object.
        JsonObject,
        /// JSON that fits a schema.
        JsonSchema {
            json_schema: JsonSchemaFormat,
        },
    }

    #[derive(ToSchema)]
    pub(crate) struct JsonSchemaFormat {
        name: Option<String>,
        #[schema(value_type = Object)]
        schema: Map<String, Value>,
    }

    #[derive(ToSchema)]
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

    #[derive(ToSchema)]
    pub(crate) struct ReasoningDocument {
        effort: Option<ReasoningEffort>,
        #[schema(minimum = 0, maximum = 2147483647)]
        max_tokens: Option<u32>,
        enabled: Option<bool>,
        exclude: Option<bool>,
    }

    /// Reasoning on or off, as Anthropic and Z.ai write it.
    #[derive(ToSchema)]
    pub(crate) struct ThinkingDocument {
        r#type: ThinkingType,
        /// Tokens of reasoning at most.
        #[schema(minimum = 0, maximum = 2147483647)]
        budget_tokens: Option<u32>,
    }

    #[derive(ToSchema)]
    #[serde(rename_all = "lowercase")]
    pub(crate) enum ThinkingType {
        Enabled,
        Adaptive,
        Disabled,
    }
}
pub(crate) use document::*;

/// vLLM's way to restrict an answer; one field of these.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct StructuredOutputs {
    /// A JSON schema.
    #[schema(value_type = Option<Object>)]
    pub(crate) json: Option<Value>,
    /// A regular expression.
    pub(crate) regex: Option<String>,
    /// One of these texts.
    pub(crate) choice: Option<Vec<String>>,
    /// A grammar in Lark's notation.
    pub(crate) grammar: Option<String>,
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
    /// Always null: the model writes no refusals of its own kind.
    pub(crate) refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<ToolCall>>)]
    pub(crate) tool_calls: Option<Vec<Value>>,
    /// Where the request has functions in place of tools.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<FunctionCall>)]
    pub(crate) function_call: Option<Value>,
}

#[derive(Default, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<TokenLogprob>,
    /// Always null.
    pub(crate) refusal: Option<Vec<TokenLogprob>>,
}

/// Natural log-probability of a token, and of the likeliest ones at its place.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct TokenLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) top_logprobs: Vec<TopLogprob>,
    /// Whether it belongs to the reasoning.
    #[serde(skip)]
    pub(crate) is_reasoning: bool,
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
    /// Tokens that were drafted and then said.
    pub(crate) accepted_prediction_tokens: usize,
    /// Tokens that were drafted in vain.
    pub(crate) rejected_prediction_tokens: usize,
}

impl Usage {
    pub(crate) fn new(prompt: usize, completion: usize, cached: usize, reasoning: usize) -> Usage {
        Usage {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt + completion,
            prompt_tokens_details: PromptTokens { cached_tokens: cached },
            completion_tokens_details: CompletionTokens { reasoning_tokens: reasoning, ..CompletionTokens::default() },
        }
    }

    /// The same with drafted tokens: those that were then said, and the others.
    pub(crate) fn with_drafts(mut self, accepted: usize, rejected: usize) -> Usage {
        self.completion_tokens_details.accepted_prediction_tokens = accepted;
        self.completion_tokens_details.rejected_prediction_tokens = rejected;
        self
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

#[derive(Clone, Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    pub(crate) tokens: Vec<String>,
    /// Null for the first token of an echoed prompt.
    pub(crate) token_logprobs: Vec<Option<f32>>,
    #[schema(value_type = Vec<Option<Object>>)]
    pub(crate) top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Of each token, in characters of the answer.
    pub(crate) text_offset: Vec<usize>,
}

impl Fields for ChatRequest {
    const TABLE: Option<&'static Table> = Some(&fields::CHAT);
}

impl Fields for CompletionRequest {
    const TABLE: Option<&'static Table> = Some(&fields::COMPLETIONS);
}
