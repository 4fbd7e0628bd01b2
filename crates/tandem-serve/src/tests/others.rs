//! What the servers of llama.cpp and vLLM check in their own tests, in our words: docs/serving-cases.md says which of their
//! cases do not apply and why.

use serde_json::{Value, json};

use super::Server;

/// Named after theirs; asks `path` with a body, and looks at places of the answer.
struct Case {
    name: &'static str,
    path: &'static str,
    body: Value,
    says: &'static str,
    status: u16,
    /// JSON pointer and value there; `"*"` is anything but null, `"-"` nothing or null. A stream has `first`, `last` and
    /// `events`.
    places: Vec<(&'static str, Value)>,
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";
const CALL: &str = "<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value></tool_call>";

fn case(
    name: &'static str,
    path: &'static str,
    body: Value,
    says: &'static str,
    places: Vec<(&'static str, Value)>,
) -> Case {
    Case { name, path, body, says, status: 200, places }
}

fn refused(name: &'static str, path: &'static str, body: Value, status: u16) -> Case {
    let place = if path.starts_with("/v1/messages") { "/error/message" } else { "/error/type" };
    Case { name, path, body, says: "yes", status, places: vec![(place, json!("*"))] }
}

fn with(base: &Value, more: Value) -> Value {
    let mut body = base.clone();
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn cases() -> Vec<Case> {
    let chat = json!({"messages": [{"role": "system", "content": "Book"}, {"role": "user", "content": "Hey"}], "max_tokens": 20});
    let text = json!({"prompt": "Once upon a time", "max_tokens": 4});
    let responses = json!({"input": "Hey", "max_output_tokens": 20});
    let messages = json!({"model": "fable", "max_tokens": 20, "messages": [{"role": "user", "content": "Hey"}]});
    let schema = json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": false});
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": schema}});
    let chat_tools = with(&chat, json!({"tools": [tool], "max_tokens": 60}));
    let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    let result = |extra: Value| {
        let mut block = json!({"type": "tool_result", "tool_use_id": "c", "content": "sunny, 25 °C"});
        block.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!([{"role": "user", "content": "weather?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": "Paris"}}]},
            {"role": "user", "content": [{"type": "text", "text": "Here:"}, block]}])
    };
    let long = "fox ".repeat(5000);
    let mut cases = vec![
        case(
            "chat_completion",
            CHAT,
            chat.clone(),
            "yes",
            vec![
                ("/object", json!("chat.completion")),
                ("/id", json!("*")),
                ("/choices/0/message/role", json!("assistant")),
                ("/choices/0/message/content", json!("yes")),
                ("/choices/0/finish_reason", json!("stop")),
                ("/usage/prompt_tokens", json!("*")),
                ("/choices/0/logprobs", json!("-")),
                ("/choices/0/message/tool_calls", json!("-")),
            ],
        ),
        case(
            "chat_completion, length",
            CHAT,
            with(&chat, json!({"max_tokens": 2, "ignore_eos": true})),
            "",
            vec![("/choices/0/finish_reason", json!("length")), ("/usage/completion_tokens", json!(2))],
        ),
        case(
            "max_completion_tokens",
            CHAT,
            json!({"messages": chat["messages"], "max_completion_tokens": 3, "ignore_eos": true}),
            "",
            vec![("/usage/completion_tokens", json!(3))],
        ),
        case(
            "complex_message_content",
            CHAT,
            json!({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "What is"}, {"type": "text", "text": " this?"}]}]}),
            "yes",
            vec![("/choices/0/message/content", json!("yes"))],
        ),
        case(
            "chat_completion_stream",
            CHAT,
            with(&chat, json!({"stream": true, "stream_options": {"include_usage": true}})),
            "yes",
            vec![
                ("/first/choices/0/delta/role", json!("assistant")),
                ("/first/object", json!("chat.completion.chunk")),
                ("/events/1/choices/0/delta/content", json!("yes")),
                ("/events/1/choices/0/delta/role", json!("-")),
                ("/events/2/choices/0/finish_reason", json!("stop")),
                ("/events/1/choices/0/finish_reason", json!("-")),
                ("/last/choices", json!([])),
                ("/last/usage/completion_tokens", json!("*")),
                ("/events/1/usage", json!("-")),
            ],
        ),
        case(
            "stream without usage",
            CHAT,
            with(&chat, json!({"stream": true})),
            "yes",
            vec![("/last/choices/0/finish_reason", json!("stop")), ("/last/usage", json!("-"))],
        ),
        case(
            "continuous_usage_stats",
            CHAT,
            with(
                &chat,
                json!({"stream": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true}}),
            ),
            "yes",
            vec![("/events/1/usage/prompt_tokens", json!("*"))],
        ),
        case("parallel_streaming n", CHAT, with(&chat, json!({"n": 2})), "yes", vec![("/choices/1/index", json!(1))]),
        case(
            "chat logprobs",
            CHAT,
            with(&chat, json!({"logprobs": true, "top_logprobs": 3, "temperature": 0})),
            "yes",
            vec![
                ("/choices/0/logprobs/content/0/token", json!("yes")),
                ("/choices/0/logprobs/content/0/bytes", json!([121, 101, 115])),
                ("/choices/0/logprobs/content/0/logprob", json!("*")),
                ("/choices/0/logprobs/content/0/top_logprobs/2/token", json!("*")),
            ],
        ),
        case(
            "zero_logprobs_chat",
            CHAT,
            with(&chat, json!({"logprobs": true, "top_logprobs": 0})),
            "yes",
            vec![("/choices/0/logprobs/content/0/top_logprobs", json!([]))],
        ),
        case(
            "logprobs_stream",
            CHAT,
            with(&chat, json!({"logprobs": true, "top_logprobs": 2, "stream": true})),
            "yes",
            vec![("/events/1/choices/0/logprobs/content/0/token", json!("yes"))],
        ),
        case(
            "json_schema const",
            CHAT,
            with(&chat, format(json!({"const": "foo"}))),
            "",
            vec![("/choices/0/message/content", json!("\"foo\""))],
        ),
        case(
            "json_object with schema",
            CHAT,
            with(&chat, json!({"response_format": {"type": "json_object", "schema": {"const": "42"}}})),
            "",
            vec![("/choices/0/message/content", json!("\"42\""))],
        ),
        case(
            "response_format text",
            CHAT,
            with(&chat, json!({"response_format": {"type": "text"}})),
            "yes",
            vec![("/choices/0/message/content", json!("yes"))],
        ),
        case(
            "guided_choice",
            CHAT,
            with(&chat, json!({"guided_choice": ["red"]})),
            "",
            vec![("/choices/0/message/content", json!("red"))],
        ),
        case(
            "guided_regex",
            TEXT,
            with(&text, json!({"structured_outputs": {"regex": "a{3}"}, "max_tokens": 9})),
            "",
            vec![("/choices/0/text", json!("aaa"))],
        ),
        case(
            "guided_grammar",
            TEXT,
            with(&text, json!({"guided_grammar": "start: \"b\" \"c\"", "max_tokens": 9})),
            "",
            vec![("/choices/0/text", json!("bc"))],
        ),
        case(
            "guided_json",
            TEXT,
            with(&text, json!({"guided_json": {"const": 7}, "max_tokens": 9})),
            "",
            vec![("/choices/0/text", json!("7"))],
        ),
        case(
            "required_tool",
            CHAT,
            with(&chat_tools, json!({"tool_choice": "required", "parallel_tool_calls": false})),
            CALL,
            vec![
                ("/choices/0/message/tool_calls/0/function/name", json!("f")),
                ("/choices/0/message/tool_calls/0/function/arguments", json!("{\"a\": \"x\"}")),
                ("/choices/0/message/content", json!("-")),
                ("/choices/0/finish_reason", json!("tool_calls")),
                ("/choices/0/message/tool_calls/1", json!("-")),
            ],
        ),
        case(
            "named_tool_use",
            CHAT,
            with(&chat_tools, json!({"tool_choice": {"type": "function", "function": {"name": "f"}}})),
            CALL,
            vec![("/choices/0/message/tool_calls/0/function/name", json!("f"))],
        ),
        case(
            "without_tool_call",
            CHAT,
            with(&chat_tools, json!({"tool_choice": "none"})),
            "yes",
            vec![("/choices/0/message/tool_calls", json!("-"))],
        ),
        case(
            "tool_choice_null",
            CHAT,
            with(&chat_tools, json!({"tool_choice": null})),
            CALL,
            vec![("/choices/0/finish_reason", json!("tool_calls"))],
        ),
        case(
            "empty tools",
            CHAT,
            with(&chat, json!({"tools": []})),
            "yes",
            vec![("/choices/0/message/content", json!("yes"))],
        ),
        case(
            "tool call streamed",
            CHAT,
            with(&chat_tools, json!({"stream": true})),
            CALL,
            vec![
                ("/last/choices/0/finish_reason", json!("tool_calls")),
                ("/events/1/choices/0/delta/tool_calls/0/function/name", json!("f")),
                ("/events/1/choices/0/delta/tool_calls/0/id", json!("*")),
                ("/events/2/choices/0/delta/tool_calls/0/id", json!("-")),
            ],
        ),
        case(
            "reasoning",
            CHAT,
            chat.clone(),
            "<think>so</think>yes",
            vec![("/choices/0/message/reasoning_content", json!("so")), ("/choices/0/message/content", json!("yes"))],
        ),
        case(
            "include_reasoning",
            CHAT,
            with(&chat, json!({"include_reasoning": false})),
            "<think>so</think>yes",
            vec![("/choices/0/message/reasoning_content", json!("-")), ("/choices/0/message/content", json!("yes"))],
        ),
        case(
            "stop_strings",
            CHAT,
            with(&chat, json!({"stop": ["b", "d"]})),
            "abcd",
            vec![("/choices/0/message/content", json!("a")), ("/choices/0/finish_reason", json!("stop"))],
        ),
        case(
            "extra_fields_allowed",
            CHAT,
            with(&chat, json!({"unknown_field": "x"})),
            "yes",
            vec![("/choices/0/message/content", json!("yes"))],
        ),
        case(
            "reasoning_effort",
            CHAT,
            with(&chat, json!({"reasoning_effort": "low"})),
            "so</think>yes",
            vec![("/choices/0/message/content", json!("yes"))],
        ),
        case(
            "single_completion",
            TEXT,
            text.clone(),
            "yes",
            vec![
                ("/object", json!("text_completion")),
                ("/choices/0/text", json!("yes")),
                ("/choices/0/finish_reason", json!("stop")),
                ("/choices/0/logprobs", json!("-")),
                ("/usage/prompt_tokens", json!(4)),
            ],
        ),
        case(
            "completion_stream",
            TEXT,
            with(&text, json!({"stream": true})),
            "yes",
            vec![("/first/choices/0/text", json!("yes")), ("/last/choices/0/finish_reason", json!("stop"))],
        ),
        case(
            "completion echo",
            TEXT,
            with(&text, json!({"echo": true})),
            " yes",
            vec![("/choices/0/text", json!("Once upon a time yes"))],
        ),
        case(
            "some_logprobs",
            TEXT,
            with(&text, json!({"logprobs": 5})),
            "yes",
            vec![
                ("/choices/0/logprobs/tokens/0", json!("yes")),
                ("/choices/0/logprobs/token_logprobs/0", json!("*")),
                ("/choices/0/logprobs/text_offset/0", json!(0)),
            ],
        ),
        case(
            "tokens_input",
            TEXT,
            with(&text, json!({"prompt": [640, 671, 275, 484]})),
            "yes",
            vec![("/usage/prompt_tokens", json!(4))],
        ),
        case(
            "batch_completions",
            TEXT,
            with(&text, json!({"prompt": ["a", "b"]})),
            "",
            vec![("/choices/1/index", json!(1))],
        ),
        case(
            "batch of tokens",
            TEXT,
            with(&text, json!({"prompt": [[640], [640, 671]]})),
            "",
            vec![("/usage/prompt_tokens", json!(3))],
        ),
        case(
            "prompt of special tokens",
            TEXT,
            with(&text, json!({"prompt": "<|user|>"})),
            "yes",
            vec![("/usage/prompt_tokens", json!(1))],
        ),
        case(
            "ignore_eos",
            TEXT,
            with(&text, json!({"ignore_eos": true})),
            "",
            vec![("/choices/0/finish_reason", json!("length")), ("/usage/completion_tokens", json!(4))],
        ),
        case(
            "min_tokens",
            TEXT,
            with(&text, json!({"min_tokens": 2})),
            "",
            vec![("/usage/completion_tokens", json!(2))],
        ),
        case(
            "responses",
            RESPONSES,
            responses.clone(),
            "yes",
            vec![
                ("/object", json!("response")),
                ("/status", json!("completed")),
                ("/output/0/type", json!("message")),
                ("/output/0/content/0/text", json!("yes")),
                ("/usage/output_tokens", json!("*")),
                ("/error", json!("-")),
            ],
        ),
        case(
            "responses list",
            RESPONSES,
            with(
                &responses,
                json!({"input": [
            {"role": "system", "content": "Book"}, {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}),
            ),
            "yes",
            vec![("/status", json!("completed"))],
        ),
        case(
            "responses stream",
            RESPONSES,
            with(&responses, json!({"stream": true})),
            "yes",
            vec![
                ("/first/type", json!("response.created")),
                ("/events/1/type", json!("response.in_progress")),
                ("/last/type", json!("response.completed")),
                ("/last/response/output/0/content/0/text", json!("yes")),
            ],
        ),
        case(
            "responses json_schema",
            RESPONSES,
            with(
                &responses,
                json!({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"const": "foo"}}}}),
            ),
            "",
            vec![("/output/0/content/0/text", json!("\"foo\""))],
        ),
        case(
            "responses max_tokens",
            RESPONSES,
            with(&responses, json!({"max_output_tokens": 1})),
            "one two three",
            vec![("/status", json!("incomplete")), ("/incomplete_details/reason", json!("max_output_tokens"))],
        ),
        case(
            "responses function",
            RESPONSES,
            with(
                &responses,
                json!({"max_output_tokens": 60, "tools": [{"type": "function", "name": "f", "parameters": schema}]}),
            ),
            CALL,
            vec![
                ("/output/0/type", json!("function_call")),
                ("/output/0/arguments", json!("{\"a\": \"x\"}")),
                ("/output/0/call_id", json!("*")),
            ],
        ),
        case(
            "responses reasoning",
            RESPONSES,
            responses.clone(),
            "<think>so</think>yes",
            vec![("/output/0/type", json!("reasoning")), ("/output/1/type", json!("message"))],
        ),
        case(
            "messages_basic",
            MESSAGES,
            messages.clone(),
            "yes",
            vec![
                ("/type", json!("message")),
                ("/role", json!("assistant")),
                ("/content/0/type", json!("text")),
                ("/content/0/text", json!("yes")),
                ("/stop_reason", json!("end_turn")),
                ("/usage/cache_read_input_tokens", json!("*")),
                ("/usage/input_tokens", json!("*")),
                ("/usage/output_tokens", json!("*")),
                ("/timings", json!("-")),
            ],
        ),
        case(
            "messages_with_system",
            MESSAGES,
            with(&messages, json!({"system": "Be kind."})),
            "yes",
            vec![("/content/0/text", json!("yes"))],
        ),
        case(
            "system as blocks",
            MESSAGES,
            with(&messages, json!({"system": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})),
            "yes",
            vec![("/content/0/text", json!("yes"))],
        ),
        case(
            "messages_multipart",
            MESSAGES,
            with(
                &messages,
                json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}),
            ),
            "yes",
            vec![("/content/0/text", json!("yes"))],
        ),
        case(
            "messages_conversation",
            MESSAGES,
            with(
                &messages,
                json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}),
            ),
            "yes",
            vec![("/content/0/text", json!("yes"))],
        ),
        case(
            "messages_streaming",
            MESSAGES,
            with(&messages, json!({"stream": true})),
            "yes",
            vec![
                ("/first/type", json!("message_start")),
                ("/first/message/content", json!([])),
                ("/first/message/usage/input_tokens", json!("*")),
                ("/last/type", json!("message_stop")),
                ("/last/timings", json!("-")),
            ],
        ),
        case(
            "stop_sequences",
            MESSAGES,
            with(&messages, json!({"stop_sequences": ["b"]})),
            "abc",
            vec![
                ("/stop_reason", json!("stop_sequence")),
                ("/stop_sequence", json!("b")),
                ("/content/0/text", json!("a")),
            ],
        ),
        case(
            "messages sampling",
            MESSAGES,
            with(&messages, json!({"temperature": 0.5, "top_p": 0.9, "top_k": 40})),
            "yes",
            vec![("/content/0/text", json!("yes"))],
        ),
        case(
            "messages metadata",
            MESSAGES,
            with(&messages, json!({"metadata": {"user_id": "u"}})),
            "yes",
            vec![("/content/0/text", json!("yes"))],
        ),
        case(
            "tool_use_basic",
            MESSAGES,
            with(
                &messages,
                json!({"max_tokens": 60, "tools": [{"name": "f", "description": "d", "input_schema": schema}]}),
            ),
            CALL,
            vec![
                ("/stop_reason", json!("tool_use")),
                ("/content/0/type", json!("tool_use")),
                ("/content/0/input", json!({"a": "x"})),
                ("/content/0/id", json!("*")),
            ],
        ),
        case(
            "tool_choice any",
            MESSAGES,
            with(
                &messages,
                json!({"max_tokens": 60, "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}}),
            ),
            CALL,
            vec![("/content/0/name", json!("f"))],
        ),
        case(
            "tool_choice tool",
            MESSAGES,
            with(
                &messages,
                json!({"max_tokens": 60, "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "tool", "name": "f"}}),
            ),
            CALL,
            vec![("/content/0/name", json!("f"))],
        ),
        case(
            "tool_result_with_text",
            MESSAGES,
            with(&messages, json!({"messages": result(json!({}))})),
            "yes",
            vec![("/content/0/type", json!("text"))],
        ),
        case(
            "tool_result_error",
            MESSAGES,
            with(&messages, json!({"messages": result(json!({"is_error": true}))})),
            "yes",
            vec![("/content/0/type", json!("text"))],
        ),
        case(
            "tool_result blocks",
            MESSAGES,
            with(&messages, json!({"messages": result(json!({"content": [{"type": "text", "text": "x"}]}))})),
            "yes",
            vec![("/content/0/type", json!("text"))],
        ),
        case(
            "thinking",
            MESSAGES,
            with(&messages, json!({"max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 1024}})),
            "so</think>yes",
            vec![
                ("/content/0/type", json!("thinking")),
                ("/content/0/thinking", json!("so")),
                ("/content/1/text", json!("yes")),
            ],
        ),
        case(
            "count_tokens_no_max_tokens",
            COUNT,
            json!({"model": "fable", "messages": messages["messages"]}),
            "",
            vec![("/input_tokens", json!("*")), ("/output_tokens", json!("-"))],
        ),
        case(
            "count_tokens_with_system",
            COUNT,
            json!({"model": "fable", "system": "a", "messages": messages["messages"]}),
            "",
            vec![("/input_tokens", json!("*"))],
        ),
        case(
            "tokenize",
            "/tokenize",
            json!({"prompt": "Once upon a time"}),
            "",
            vec![("/count", json!(4)), ("/tokens", json!([640, 671, 275, 484])), ("/max_model_len", json!(4096))],
        ),
        case(
            "tokenize without specials",
            "/tokenize",
            json!({"prompt": "Once", "add_special_tokens": false}),
            "",
            vec![("/tokens", json!([640]))],
        ),
        case(
            "tokenize chat",
            "/tokenize",
            json!({"messages": chat["messages"], "add_generation_prompt": false}),
            "",
            vec![("/count", json!("*"))],
        ),
        case(
            "detokenize",
            "/detokenize",
            json!({"tokens": [640, 671, 275, 484]}),
            "",
            vec![("/prompt", json!("Once upon a time"))],
        ),
        // What is refused.
        refused("unknown model", CHAT, with(&chat, json!({"model": "other"})), 404),
        refused("chat too long", CHAT, json!({"messages": [{"role": "user", "content": long}]}), 400),
        refused("completion too long", TEXT, json!({"prompt": long}), 400),
        refused(
            "max_tokens too large for the context with a prompt of it",
            MESSAGES,
            with(&messages, json!({"messages": [{"role": "user", "content": long}]})),
            400,
        ),
        refused("too_many_chat_logprobs", CHAT, with(&chat, json!({"logprobs": true, "top_logprobs": 21})), 400),
        refused("too_many_completion_logprobs", TEXT, with(&text, json!({"logprobs": 21})), 400),
        refused(
            "too_many_completion_logprobs, stream",
            TEXT,
            with(&text, json!({"logprobs": 21, "stream": true})),
            400,
        ),
        refused("empty_prompt_list", TEXT, json!({"prompt": []}), 400),
        refused("out_of_vocab_token_ids", TEXT, json!({"prompt": [999_999]}), 400),
        refused("negative token ids", TEXT, json!({"prompt": [-1]}), 400),
        refused("reject_multiple n", TEXT, with(&text, json!({"n": 0})), 400),
        refused("logit_bias out of vocab", CHAT, with(&chat, json!({"logit_bias": {"999999": 1.0}})), 400),
        refused("logit_bias no token", CHAT, with(&chat, json!({"logit_bias": {"x": 1.0}})), 400),
        refused("logit_bias too large", CHAT, with(&chat, json!({"logit_bias": {"5": 200.0}})), 400),
        refused("invalid_json_schema", CHAT, with(&chat, format(json!({"type": "hiccup"}))), 400),
        refused("invalid_json_schema type", CHAT, with(&chat, format(json!({"type": 123}))), 400),
        refused("invalid_regex", TEXT, with(&text, json!({"structured_outputs": {"regex": "[.*"}})), 400),
        refused("invalid_grammar", TEXT, with(&text, json!({"structured_outputs": {"grammar": "start: x"}})), 400),
        refused("guided_decoding_type_error", TEXT, with(&text, json!({"guided_regex": 5})), 400),
        refused(
            "two constraints",
            TEXT,
            with(&text, json!({"structured_outputs": {"regex": "a", "choice": ["b"]}})),
            400,
        ),
        refused("response_format sound", CHAT, with(&chat, json!({"response_format": {"type": "sound"}})), 400),
        refused(
            "response_format without schema",
            CHAT,
            with(&chat, json!({"response_format": {"type": "json_schema"}})),
            400,
        ),
        refused(
            "responses json_schema without schema",
            RESPONSES,
            with(&responses, json!({"text": {"format": {"type": "json_schema", "name": "x"}}})),
            400,
        ),
        refused(
            "json_object schema 123",
            CHAT,
            with(&chat, json!({"response_format": {"type": "json_object", "schema": 123}})),
            400,
        ),
        refused("tool_choice without tools", CHAT, with(&chat, json!({"tool_choice": "required"})), 400),
        refused(
            "named tool without tools",
            CHAT,
            with(&chat, json!({"tool_choice": {"type": "function", "function": {"name": "f"}}})),
            400,
        ),
        refused(
            "inconsistent_tool_choice",
            CHAT,
            with(&chat_tools, json!({"tool_choice": {"type": "function", "function": {"name": "g"}}})),
            400,
        ),
        refused("tool_choice without name", CHAT, with(&chat_tools, json!({"tool_choice": {"type": "function"}})), 400),
        refused("temperature below 0", CHAT, with(&chat, json!({"temperature": -1})), 400),
        refused("top_p above 1", CHAT, with(&chat, json!({"top_p": 1.5})), 400),
        refused("presence_penalty out of range", CHAT, with(&chat, json!({"presence_penalty": 3})), 400),
        refused("max_tokens below 0", CHAT, with(&chat, json!({"max_tokens": -1})), 400),
        refused("max_tokens no number", CHAT, with(&chat, json!({"max_tokens": "many"})), 400),
        refused(
            "messages without max_tokens",
            MESSAGES,
            json!({"model": "fable", "messages": messages["messages"]}),
            400,
        ),
        refused("messages without messages", MESSAGES, json!({"model": "fable", "max_tokens": 5}), 400),
        refused("messages empty", MESSAGES, json!({"model": "fable", "max_tokens": 5, "messages": []}), 400),
        refused("messages unknown model", MESSAGES, with(&messages, json!({"model": "other"})), 404),
        refused(
            "responses unknown previous id",
            RESPONSES,
            with(&responses, json!({"previous_response_id": "resp_0"})),
            400,
        ),
        refused("responses background", RESPONSES, with(&responses, json!({"background": true})), 400),
        refused("truncate_prompt_tokens", TEXT, with(&text, json!({"truncate_prompt_tokens": 2})), 400),
        refused("prompt_logprobs", TEXT, with(&text, json!({"prompt_logprobs": 1})), 400),
    ];
    let broken = [
        Value::Null,
        json!("string"),
        json!([123]),
        json!([{}]),
        json!([{"role": 123}]),
        json!([{"role": "system", "content": 123}]),
        json!([{"role": "system", "content": "x"}, {}]),
        json!([{"content": "hello"}]),
        json!([]),
    ];
    cases.extend(
        broken.into_iter().map(|broken| refused("invalid_chat_completion_req", CHAT, json!({"messages": broken}), 400)),
    );
    for path in [CHAT, TEXT, RESPONSES, MESSAGES] {
        cases.extend(
            [Value::Null, json!([]), json!(5), json!("x")].map(|body| refused("non_object_body", path, body, 400)),
        );
    }
    cases
}

/// vLLM's conversions: these say the same, so that they make the same prompt.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_history_makes_the_same_prompt() {
    let user = json!({"role": "user", "content": "hi"});
    let last = json!({"role": "user", "content": "and?"});
    let chat = |messages: &[Value]| (CHAT, json!({"messages": messages}));
    let said = |items: &[Value]| (MESSAGES, json!({"model": "fable", "messages": items}));
    let input = |items: &[Value]| (RESPONSES, json!({"input": items}));
    let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": id, "arguments": "{\"a\": 1}"}});
    let tool = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": format!("result {id}")});
    let tool_use = |id: &str| json!({"type": "tool_use", "id": id, "name": id, "input": {"a": 1}});
    let result = |id: &str| json!({"type": "tool_result", "tool_use_id": id, "content": format!("result {id}")});
    let item = |id: &str| json!({"type": "function_call", "call_id": id, "name": id, "arguments": "{\"a\": 1}"});
    let output = |id: &str| json!({"type": "function_call_output", "call_id": id, "output": format!("result {id}")});
    let assistant = |content: Value| json!({"role": "assistant", "content": content});
    let thinking = |text: &str| json!({"type": "thinking", "thinking": text, "signature": "s"});
    let text = |text: &str| json!({"type": "text", "text": text});
    let billing = "x-anthropic-billing-header: cc_version=2.1.37.abc; cc_entrypoint=cli;";
    let system = |system: Value| (MESSAGES, with(&said(std::slice::from_ref(&user)).1, json!({"system": system})));
    for same in [
        // Calls at once, and one after the other.
        vec![
            chat(&[
                user.clone(),
                json!({"role": "assistant", "content": null, "tool_calls": [call("f"), call("g")]}),
                tool("f"),
                tool("g"),
            ]),
            said(&[
                user.clone(),
                assistant(json!([tool_use("f"), tool_use("g")])),
                json!({"role": "user", "content": [result("f"), result("g")]}),
            ]),
            input(&[user.clone(), item("f"), item("g"), output("f"), output("g")]),
        ],
        vec![
            chat(&[
                user.clone(),
                json!({"role": "assistant", "tool_calls": [call("f")]}),
                tool("f"),
                json!({"role": "assistant", "content": "", "tool_calls": [call("g")]}),
                tool("g"),
            ]),
            said(&[
                user.clone(),
                assistant(json!([tool_use("f")])),
                json!({"role": "user", "content": [result("f")]}),
                assistant(json!([tool_use("g")])),
                json!({"role": "user", "content": [result("g")]}),
            ]),
            input(&[user.clone(), item("f"), output("f"), item("g"), output("g")]),
        ],
        // A text before its call, and reasoning before both.
        vec![
            chat(&[
                user.clone(),
                json!({"role": "assistant", "reasoning_content": "hm", "content": "I look.",
                "tool_calls": [call("f")]}),
                tool("f"),
            ]),
            chat(&[
                user.clone(),
                json!({"role": "assistant", "reasoning": "hm", "content": [text("I look.")],
                "tool_calls": [call("f")]}),
                tool("f"),
            ]),
            said(&[
                user.clone(),
                assistant(json!([thinking("hm"), text("I look."), tool_use("f")])),
                json!({"role": "user", "content": [result("f")]}),
            ]),
            input(&[
                user.clone(),
                json!({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}],
                "encrypted_content": null}),
                json!({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}),
                item("f"),
                output("f"),
            ]),
        ],
        // Several pieces of reasoning, and some that nobody can read.
        vec![
            chat(&[
                user.clone(),
                json!({"role": "assistant", "reasoning_content": "One. Two.", "content": "Done."}),
                last.clone(),
            ]),
            said(&[
                user.clone(),
                assistant(json!([thinking("One. "), {"type": "redacted_thinking", "data": "x"},
                thinking("Two."), text("Done.")])),
                last.clone(),
            ]),
        ],
        // A system text in the middle stays there.
        vec![
            chat(&[user.clone(), json!({"role": "system", "content": "Be brief."})]),
            said(&[user.clone(), json!({"role": "system", "content": [text("Be brief.")]})]),
            input(&[user.clone(), json!({"role": "developer", "content": "Be brief."})]),
        ],
        // What is only for the vendor's accounts, wherever it stands.
        vec![
            system(json!("Be brief.\nBe kind.")),
            system(json!([text("Be brief."), text("Be kind.")])),
            system(json!([text(billing), text("Be brief."), text("Be kind.")])),
            system(json!([text("Be brief."), text(billing), text("Be kind.")])),
            system(json!([text("Be brief."), text("Be kind."), text(billing)])),
        ],
    ] {
        let mut prompts = vec![];
        for (path, request) in &same {
            prompts.push(Server::start().prompt_of(path, request).await);
        }
        for (prompt, (path, request)) in prompts.iter().zip(&same) {
            assert_eq!(*prompt, prompts[0], "{path} {request}");
        }
    }
}

/// Each of n answers has its number and one end, whole and in pieces.
#[tokio::test(flavor = "multi_thread")]
async fn several_answers_are_told_apart() {
    let server = Server::start();
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, request) in [
        (CHAT, json!({"messages": messages, "n": 3, "max_tokens": 2, "ignore_eos": true})),
        (TEXT, json!({"prompt": "hi", "n": 3, "max_tokens": 2, "ignore_eos": true})),
        (TEXT, json!({"prompt": ["a", "b", "c"], "max_tokens": 2, "ignore_eos": true, "logprobs": 1})),
    ] {
        server.says("");
        let answer = server.ok(path, &request).await;
        let whole: Vec<&Value> = answer["choices"].as_array().unwrap().iter().map(|choice| &choice["index"]).collect();
        assert_eq!(json!(whole), json!([0, 1, 2]), "{path}");
        let (mut ends, mut n_bytes) = ([0; 3], [0; 3]);
        for chunk in server.stream(path, &request).await {
            for choice in chunk["choices"].as_array().unwrap() {
                let index = choice["index"].as_u64().unwrap() as usize;
                ends[index] += usize::from(!choice["finish_reason"].is_null());
                let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
                n_bytes[index] += text.map_or(0, str::len);
            }
        }
        assert_eq!(ends, [1; 3], "{path}");
        assert!(n_bytes.iter().all(|n| *n == n_bytes[0]), "{path} {n_bytes:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cases_of_other_servers() {
    let server = Server::start();
    let mut wrong = vec![];
    let all = cases();
    for Case { name, path, body, says, status, places } in &all {
        server.says(says);
        let (found, answer) = server.post(path, body).await;
        let answer = match &answer {
            Value::String(text) if text.starts_with("data:") || text.starts_with("event:") => {
                let data = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
                let events: Vec<Value> = data.map(|data| serde_json::from_str(data).unwrap()).collect();
                json!({"first": events[0], "last": events[events.len() - 1], "events": events})
            }
            _ => answer,
        };
        let differs = places.iter().find(|(place, value)| {
            let found = answer.pointer(place).filter(|found| !found.is_null());
            match value.as_str() {
                Some("*") => found.is_none(),
                Some("-") => found.is_some(),
                _ => found != Some(value),
            }
        });
        if found != *status || differs.is_some() {
            wrong.push(format!("{name}: {path} {body}: {found} instead of {status}, {differs:?}: {answer}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), all.len(), wrong.join("\n"));
}
