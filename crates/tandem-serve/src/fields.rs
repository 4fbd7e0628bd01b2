//! What becomes of every field that a client may send: honoured, ignored on purpose, or refused.
//!
//! The tables are the only place that says so. Requests are checked against them, docs/serving-fields.md is written from them, and a
//! test sends each field's sample.

use serde_json::{Map, Value};

use crate::conversation::Notes;
use crate::error::ApiError;

/// What the server does with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// It takes effect.
    Honoured,
    /// It has none, for this reason, and the request is served.
    Ignored(&'static str),
    /// It cannot have its effect, for this reason, and the request would go wrong without it.
    Refused(&'static str),
}

/// A field of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) r#use: Use,
    /// A value that the published schema allows, as JSON.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) sample: &'static str,
}

/// One interface's request.
pub(crate) struct Table {
    pub(crate) path: &'static str,
    /// The least request, as JSON.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) least: &'static str,
    pub(crate) fields: &'static [&'static [Field]],
}

macro_rules! fields {
    ($name:ident: $($field:literal $sample:literal $use:expr;)*) => {
        const $name: &[Field] = &[$(Field { name: $field, r#use: $use, sample: $sample }),*];
    };
}

use Use::{Honoured, Ignored, Refused};

const VENDOR: Use = Ignored("the vendor's accounts, tiers and records do not exist here");
const CACHE: Use = Ignored("what was seen before is found by its text");
const ALWAYS: Use = Ignored("this is what the server always does");

fields! { SAMPLING:
    "model" "null" Honoured;
    "stream" "false" Honoured;
    "stream_options" "{\"include_usage\": true, \"include_obfuscation\": false}" Honoured;
    "max_tokens" "5" Honoured;
    "n" "1" Honoured;
    "seed" "18446744073709551615" Honoured;
    "stop" "[\"x\", \"y\"]" Honoured;
    "temperature" "0.5" Honoured;
    "top_p" "0.9" Honoured;
    "top_k" "40" Honoured;
    "min_p" "0.1" Honoured;
    "presence_penalty" "0.5" Honoured;
    "frequency_penalty" "0.5" Honoured;
    "repetition_penalty" "1.1" Honoured;
    "logit_bias" "{\"50\": -100}" Honoured;
    "ignore_eos" "false" Honoured;
    "min_tokens" "1" Honoured;
    "stop_token_ids" "[5]" Honoured;
    "structured_outputs" "{\"regex\": \"[a-z]{3}\"}" Honoured;
    "guided_json" "{\"type\": \"object\"}" Honoured;
    "guided_regex" "\"[a-z]{3}\"" Honoured;
    "guided_choice" "[\"red\", \"blue\"]" Honoured;
    "guided_grammar" "\"start: /[a-z]+/\"" Honoured;
    "user" "\"u\"" VENDOR;
    "skip_special_tokens" "true" ALWAYS;
    "spaces_between_special_tokens" "true" ALWAYS;
    "include_stop_str_in_output" "true" Refused("a stop string is never part of the answer");
    "priority" "1" Ignored("requests are served in the order of their coming");
    "request_id" "\"r\"" Ignored("the server gives ids");
    "cache_salt" "\"s\"" Ignored("all who may ask share the cache");
    "use_beam_search" "true" Refused("there is no beam search");
    "length_penalty" "1.0" Ignored("it belongs to beam search");
    "logits_processors" "[\"x\"]" Refused("code does not come with a request");
    "allowed_token_ids" "[5]" Refused("structured_outputs restricts answers");
    "bad_words" "[\"x\"]" Refused("logit_bias keeps tokens out");
    "prompt_logprobs" "1" Refused("echo with logprobs of /v1/completions gives them");
    "truncate_prompt_tokens" "5" Refused("prompts are not shortened behind the client's back");
    "return_token_ids" "true" Ignored("logprobs and /tokenize name tokens");
    "return_tokens_as_token_ids" "true" Ignored("logprobs name tokens by their text");
    "kv_transfer_params" "{}" VENDOR;
    "vllm_xargs" "{}" VENDOR;
    "cache_prompt" "true" CACHE;
    "timings_per_token" "true" Ignored("/metrics has times");
}

fields! { CHAT_ONLY:
    "messages" "[{\"role\": \"user\", \"content\": \"hi\"}]" Honoured;
    "max_completion_tokens" "5" Honoured;
    "logprobs" "true" Honoured;
    "top_logprobs" "2" Honoured;
    "tools" "[{\"type\": \"function\", \"function\": {\"name\": \"f\"}}]" Honoured;
    "tool_choice" "\"auto\"" Honoured;
    "parallel_tool_calls" "false" Honoured;
    "functions" "[{\"name\": \"f\", \"parameters\": {\"type\": \"object\"}}]" Honoured;
    "function_call" "\"auto\"" Honoured;
    "response_format" "{\"type\": \"text\"}" Honoured;
    "reasoning_effort" "\"none\"" Honoured;
    "reasoning" "{\"effort\": \"low\"}" Honoured;
    "include_reasoning" "true" Honoured;
    "thinking" "{\"type\": \"disabled\"}" Honoured;
    "thinking_token_budget" "100" Honoured;
    "chat_template_kwargs" "{\"enable_thinking\": false}" Honoured;
    "add_generation_prompt" "true" Honoured;
    "continue_final_message" "false" Honoured;
    "documents" "[{\"title\": \"t\", \"text\": \"x\"}]" Honoured;
    "audio" "{\"voice\": \"alloy\", \"format\": \"mp3\"}" Refused("this model writes text only");
    "modalities" "[\"text\"]" Honoured;
    "metadata" "{\"a\": \"b\"}" VENDOR;
    "moderation" "{}" VENDOR;
    "prediction" "{\"type\": \"content\", \"content\": \"x\"}" Ignored("it would only be faster");
    "prompt_cache_key" "\"k\"" CACHE;
    "prompt_cache_options" "{}" CACHE;
    "prompt_cache_retention" "\"24h\"" CACHE;
    "safety_identifier" "\"s\"" VENDOR;
    "service_tier" "\"auto\"" VENDOR;
    "store" "true" Ignored("chat completions are not kept");
    "verbosity" "\"low\"" Ignored("the model was not trained for it");
    "web_search_options" "{}" Ignored("this server cannot search; the model answers by itself");
    "chat_template" "\"x\"" Refused("templates do not come with a request; start the server with --chat-template");
    "add_special_tokens" "false" ALWAYS;
    "mm_processor_kwargs" "{}" Ignored("this model reads text only");
    "tool_stream" "true" ALWAYS;
    "do_sample" "true" Ignored("temperature 0 takes the likeliest token");
    "provider" "{}" VENDOR;
    "transforms" "[]" VENDOR;
    "usage" "{\"include\": true}" ALWAYS;
}

fields! { COMPLETIONS_ONLY:
    "prompt" "\"x\"" Honoured;
    "logprobs" "2" Honoured;
    "echo" "true" Honoured;
    "best_of" "2" Refused("answers are not ranked; ask for n of them");
    "suffix" "\"x\"" Refused("the model was not trained to fill gaps");
    "add_special_tokens" "true" ALWAYS;
}

fields! { RESPONSES_FIELDS:
    "model" "null" Honoured;
    "input" "\"x\"" Honoured;
    "instructions" "\"be brief\"" Honoured;
    "stream" "false" Honoured;
    "stream_options" "{\"include_obfuscation\": false}" Ignored("events carry no padding");
    "max_output_tokens" "20" Honoured;
    "max_tool_calls" "3" Ignored("it bounds tools that the vendor runs");
    "temperature" "0.5" Honoured;
    "top_p" "0.9" Honoured;
    "top_k" "40" Honoured;
    "min_p" "0.1" Honoured;
    "seed" "5" Honoured;
    "presence_penalty" "0.5" Honoured;
    "frequency_penalty" "0.5" Honoured;
    "repetition_penalty" "1.1" Honoured;
    "top_logprobs" "2" Honoured;
    "tools" "[{\"type\": \"function\", \"name\": \"f\", \"parameters\": null, \"strict\": true}]" Honoured;
    "tool_choice" "\"auto\"" Honoured;
    "parallel_tool_calls" "false" Honoured;
    "reasoning" "{\"effort\": \"none\", \"summary\": \"auto\"}" Honoured;
    "text" "{\"format\": {\"type\": \"text\"}, \"verbosity\": \"low\"}" Honoured;
    "include" "[\"reasoning.encrypted_content\"]" Honoured;
    "store" "false" Honoured;
    "previous_response_id" "null" Honoured;
    "conversation" "\"conv_1\"" Refused("conversations are not kept; previous_response_id continues a response");
    "metadata" "{\"a\": \"b\"}" Honoured;
    "truncation" "\"auto\"" Honoured;
    "chat_template_kwargs" "{\"enable_thinking\": false}" Honoured;
    "background" "true" Refused("responses are written while the client waits");
    "prompt" "{\"id\": \"pmpt_1\"}" Refused("the vendor's stored prompts do not exist here");
    "context_management" "[]" Ignored("the client shortens its conversation");
    "moderation" "{}" VENDOR;
    "prompt_cache_key" "\"k\"" CACHE;
    "prompt_cache_options" "{}" CACHE;
    "prompt_cache_retention" "\"24h\"" CACHE;
    "safety_identifier" "\"s\"" VENDOR;
    "service_tier" "\"auto\"" VENDOR;
    "user" "\"u\"" VENDOR;
    "client_metadata" "{\"a\": \"b\"}" VENDOR;
}

fields! { COUNT_FIELDS:
    "model" "\"MODEL\"" Honoured;
    "messages" "[{\"role\": \"user\", \"content\": \"hi\"}]" Honoured;
    "system" "\"be brief\"" Honoured;
    "tools" "[{\"name\": \"f\", \"input_schema\": {\"type\": \"object\"}}]" Honoured;
    "tool_choice" "{\"type\": \"auto\"}" Honoured;
    "thinking" "{\"type\": \"disabled\"}" Honoured;
    "output_config" "{\"effort\": \"low\"}" Honoured;
    "output_format" "{\"type\": \"json_schema\", \"schema\": {\"type\": \"object\"}}" Honoured;
    "cache_control" "{\"type\": \"ephemeral\"}" CACHE;
    "context_management" "{\"edits\": []}" Ignored("the client shortens its conversation");
    "mcp_servers" "[]" Ignored("this server does not call others; declare tools");
    "betas" "[\"x\"]" VENDOR;
}

fields! { MESSAGES_ONLY:
    "max_tokens" "5" Honoured;
    "stream" "false" Honoured;
    "stop_sequences" "[\"x\"]" Honoured;
    "temperature" "0.5" Honoured;
    "top_p" "0.9" Honoured;
    "top_k" "40" Honoured;
    "min_p" "0.1" Honoured;
    "repetition_penalty" "1.1" Honoured;
    "seed" "5" Honoured;
    "metadata" "{\"user_id\": \"u\"}" VENDOR;
    "service_tier" "\"auto\"" VENDOR;
    "container" "null" VENDOR;
    "inference_geo" "\"us\"" VENDOR;
    "speed" "\"fast\"" VENDOR;
}

fields! { TOOL_FIELDS:
    "type" "\"custom\"" Honoured;
    "name" "\"f\"" Honoured;
    "description" "\"d\"" Honoured;
    "input_schema" "{\"type\": \"object\"}" Honoured;
    "defer_loading" "false" Honoured;
    "cache_control" "{\"type\": \"ephemeral\"}" CACHE;
    "strict" "true" Ignored("calls are held to their schema where tool_choice asks for one");
    "input_examples" "[{}]" Ignored("chat templates have no place for them");
    "allowed_callers" "[\"direct\"]" Ignored("only the model calls tools");
    "eager_input_streaming" "true" ALWAYS;
}

/// A tool of /v1/messages.
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) static TOOL: &[Field] = TOOL_FIELDS;

pub(crate) static CHAT: Table = Table {
    path: "/v1/chat/completions",
    least: "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 3}",
    fields: &[CHAT_ONLY, SAMPLING],
};
pub(crate) static COMPLETIONS: Table = Table {
    path: "/v1/completions",
    least: "{\"prompt\": \"hi\", \"max_tokens\": 3}",
    fields: &[COMPLETIONS_ONLY, SAMPLING],
};
pub(crate) static RESPONSES: Table = Table {
    path: "/v1/responses",
    least: "{\"input\": \"hi\", \"max_output_tokens\": 3}",
    fields: &[RESPONSES_FIELDS],
};
pub(crate) static MESSAGES: Table = Table {
    path: "/v1/messages",
    least: "{\"model\": \"MODEL\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 3}",
    fields: &[COUNT_FIELDS, MESSAGES_ONLY],
};
pub(crate) static COUNT: Table = Table {
    path: "/v1/messages/count_tokens",
    least: "{\"model\": \"MODEL\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}",
    fields: &[COUNT_FIELDS],
};

/// Sampling fields of this and other servers, which a client's field may be a slip of.
const NAMES: [&str; 20] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_sequences",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
    "n",
];

impl Table {
    fn find(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().flat_map(|fields| fields.iter()).find(|field| field.name == name)
    }

    /// Refuses what must not be left out without a word, and notes what looks like a slip.
    pub(crate) fn check(&self, request: &Map<String, Value>, notes: &mut Notes) -> Result<(), ApiError> {
        for (name, value) in request {
            match self.find(name).map(|field| field.r#use) {
                Some(Use::Refused(reason)) if !(is_nothing(value) || name == "best_of" && value == 1) => {
                    let message = format!("{name} cannot be honoured: {reason}; leave it out");
                    return Err(ApiError::invalid(name, message));
                }
                Some(_) => {}
                None => {
                    let shown: String = name.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
                    if let Some(meant) = misspelt(name, &NAMES) {
                        notes.add(format!("the field {shown:?} is not known and was ignored: did you mean {meant:?}?"));
                    } else {
                        tracing::debug!("the field {shown:?} of {} is not known and was ignored", self.path);
                    }
                }
            }
        }
        Ok(())
    }
}

/// What a field says that asks for nothing.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    }
}

/// The field among `names` that a name is a slip of: other case or separators, or up to two letters.
pub(crate) fn misspelt(name: &str, names: &[&'static str]) -> Option<&'static str> {
    if name.len() > 40 {
        return None;
    }
    let plain = |name: &str| name.to_lowercase().replace(['-', '_', ' ', '.'], "");
    let name = plain(name);
    let distance = |known: &&str| {
        let known = plain(known);
        let most = if known.len() >= 8 { 2 } else { 1 };
        let distance = strsim::osa_distance(&name, &known);
        (distance == 0 || (known.len() > 3 && distance <= most)).then_some(distance)
    };
    names.iter().filter_map(|known| Some((distance(known)?, *known))).min().map(|(_, known)| known)
}

/// The page of the docs that the tables make.
#[cfg(test)]
fn page() -> String {
    let mut page = String::from(
        "# Fields of requests\n\n\
         What the server does with each field that the published schemas of OpenAI, Anthropic, vLLM and others name. This page is\n\
         written from crates/tandem-serve/src/fields.rs, and a test sends every field. Fields that are not here are ignored; one\n\
         that looks like a misspelt sampling field is named in the header `x-tandem-warning` and in the log. A refused field may\n\
         say nothing (null, false, 0, empty).\n",
    );
    let tables = [&CHAT, &COMPLETIONS, &RESPONSES, &MESSAGES];
    let mut sections: Vec<(String, Vec<&Field>)> = vec![];
    for table in tables {
        sections.push((table.path.to_owned(), table.fields.iter().flat_map(|fields| fields.iter()).collect()));
    }
    sections.push(("Tools of /v1/messages".to_owned(), TOOL.iter().collect()));
    for (title, mut fields) in sections {
        fields.sort_by_key(|field| field.name);
        let honoured = fields.iter().filter(|field| field.r#use == Honoured);
        let names: Vec<String> = honoured.map(|field| format!("`{}`", field.name)).collect();
        page.push_str(&format!(
            "\n## {title}\n\nHonoured: {}.\n\n| field | | why |\n|---|---|---|\n",
            names.join(", ")
        ));
        for field in fields {
            let (what, why) = match field.r#use {
                Use::Ignored(why) => ("ignored", why),
                Use::Refused(why) => ("refused", why),
                Use::Honoured => continue,
            };
            page.push_str(&format!("| `{}` | {what} | {why} |\n", field.name));
        }
    }
    page.push_str(
        "\nA tool with `defer_loading` is not in the prompt until a `tool_reference` in a message or in the result of a tool\n\
         names it. Its definition then stands in that place, so that what was cached before stays of use, and the model may call\n\
         it from there on. Searches that the vendor runs (tools of type `tool_search_tool_..`) are not run here: beside one, all\n\
         tools are in the prompt from the beginning.\n",
    );
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_found() {
        for (name, meant) in [
            ("temprature", Some("temperature")),
            ("Temperature", Some("temperature")),
            ("topP", Some("top_p")),
            ("top-k", Some("top_k")),
            ("maxTokens", Some("max_tokens")),
            ("max_token", Some("max_tokens")),
            ("repetition_penality", Some("repetition_penalty")),
            ("presencePenalty", Some("presence_penalty")),
            ("sed", Some("seed")),
            ("extra_body", None),
            ("messages2", None),
            ("x", None),
        ] {
            assert_eq!(misspelt(name, &NAMES), meant, "{name}");
        }
    }

    /// `TANDEM_WRITE_DOCS=1 cargo test` writes the page.
    #[test]
    fn the_page_says_what_the_tables_say() {
        let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/serving-fields.md"));
        if std::env::var_os("TANDEM_WRITE_DOCS").is_some() {
            std::fs::write(path, page()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), page(), "run with TANDEM_WRITE_DOCS=1");
    }
}
