//! Every dialect behind the server: tokens of calls in, calls of each interface out, and back into the next prompt.

use serde_json::{Value, json};
use tandem_text::{ChatFormat, Dialect, Tokenizer};

use super::protocol::{
    Said, check_events, said_by_chat, said_by_chunks, said_by_message, said_by_message_events, said_by_response,
};
use super::{CONTEXT, Server};
use crate::Options;

/// A family's way to chat, and an answer as its models write one.
struct Family {
    name: &'static str,
    dialect: Dialect,
    /// In our words, with the family's tags; `None`: ours is built in.
    template: Option<&'static str>,
    /// Special tokens, which the bundled tokenizer does not have.
    tokens: &'static [&'static str],
    /// The call of get_weather with Paris.
    call: &'static str,
    /// Behind the call.
    end: &'static str,
    /// Whether the prompt can open the reasoning.
    reasons: bool,
    /// Whether an earlier turn's reasoning is shown while its calls are going on.
    keeps_reasoning: bool,
    /// Around a result, in a prompt.
    result: [&'static str; 2],
}

const FAMILIES: [Family; 5] = [
    Family {
        name: "DeepSeek-V3.2",
        dialect: Dialect::DeepSeekV32,
        template: None,
        tokens: &["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "｜DSML｜"],
        call: "\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" \
               string=\"true\">Paris</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        end: "<｜end▁of▁sentence｜>",
        reasons: true,
        keeps_reasoning: true,
        result: ["<result>", "</result>"],
    },
    Family {
        name: "DeepSeek-V3.1",
        dialect: Dialect::DeepSeekV31,
        template: Some(
            "<｜begin▁of▁sentence｜>{% if tools %}## Tools: {% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}\
             {% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}\
             <｜Assistant｜></think>{{ m.content or '' }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}\
             <｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>{{ c.function.arguments | tojson }}<｜tool▁call▁end｜>\
             {% endfor %}<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>\
             {{ m.content }}<｜tool▁output▁end｜>{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}\
             {% if messages[-1].role != 'tool' %}<｜Assistant｜>{% endif %}{{ '<think>' if thinking else '</think>' }}{% endif %}",
        ),
        tokens: &[
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
        ],
        call: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Paris\"}<｜tool▁call▁end｜>\
               <｜tool▁calls▁end｜>",
        end: "<｜end▁of▁sentence｜>",
        reasons: true,
        keeps_reasoning: false,
        result: ["<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"],
    },
    Family {
        name: "GLM-5.3",
        dialect: Dialect::Glm,
        template: Some(
            "[gMASK]<sop><|system|>Reasoning Effort: {{ (reasoning_effort if reasoning_effort in ['low', 'high'] else 'max') | \
             capitalize }}{% if tools %}# Tools: {% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}\
             {% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'assistant' %}\
             <|assistant|><think>{{ m.reasoning_content or '' }}</think>{{ m.content or '' }}{% for c in m.tool_calls or [] %}\
             <tool_call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>\
             {{ v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>{% endfor %}{% elif m.role == 'tool' %}\
             <|observation|><tool_response>{{ m.content }}</tool_response>{% else %}<|system|>{{ m.content }}{% endif %}\
             {% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
        ),
        tokens: &[],
        call: "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>",
        end: "",
        reasons: true,
        keeps_reasoning: true,
        result: ["<tool_response>", "</tool_response>"],
    },
    Family {
        name: "Llama 3.1",
        dialect: Dialect::Llama3,
        template: Some(
            "<|begin_of_text|>{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{% for t in tools %}\
             {{ t.function.name }} {% endfor %}<|eot_id|>{% endif %}{% for m in messages %}<|start_header_id|>\
             {{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}\
             {\"name\": \"{{ m.tool_calls[0].function.name }}\", \"parameters\": {{ m.tool_calls[0].function.arguments | tojson }}}\
             {% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}\
             <|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ),
        tokens: &["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
        call: "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}",
        end: "<|eot_id|>",
        reasons: false,
        keeps_reasoning: false,
        result: ["ipython<|end_header_id|>\n\n", "<|eot_id|>"],
    },
    Family {
        name: "Hermes",
        dialect: Dialect::Hermes,
        template: Some(
            "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t.function.name }} {% endfor %}</tools><|im_end|>\n\
             {% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n\
             {% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content or '' }}\
             {% for c in m.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": \
             {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}\
             {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ),
        tokens: &["<|im_start|>", "<|im_end|>"],
        call: "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
        end: "<|im_end|>\n",
        reasons: false,
        keeps_reasoning: false,
        result: ["<tool_response>\n", "\n</tool_response>"],
    },
];

/// A server with the family's format; the bundled tokenizer gets its tokens.
fn server_of(family: &Family) -> Server {
    let bundled = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8"));
    let n = Tokenizer::from_dir(bundled).unwrap().vocab_size();
    let text = std::fs::read_to_string(bundled.join("tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    added.extend(family.tokens.iter().enumerate().map(|(i, token)| {
        json!({"id": n + i, "content": token, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    }));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    if let Some(template) = family.template {
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    }
    let format = ChatFormat::from_dir(dir.path(), None, None, |token| tokenizer.has_token(token)).unwrap();
    assert_eq!(format.dialect, family.dialect, "{}", family.name);
    Server::of(&Options::default(), CONTEXT, tokenizer, format)
}

fn merge(mut base: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

/// The same question for Chat, Messages and Responses; the city can only be Paris.
fn requests(thinks: bool) -> [(&'static str, Value); 3] {
    let schema = json!({"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"],
        "additionalProperties": false});
    let user = json!([{"role": "user", "content": "weather?"}]);
    let effort = if thinks { "high" } else { "none" };
    [
        (
            "/v1/chat/completions",
            json!({"messages": user, "max_tokens": 300, "reasoning_effort": effort,
                "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}]}),
        ),
        (
            "/v1/messages",
            json!({"model": "fable", "messages": user, "max_tokens": 300,
                "thinking": {"type": if thinks { "adaptive" } else { "disabled" }},
                "output_config": {"effort": if thinks { "high" } else { "low" }},
                "tools": [{"name": "get_weather", "input_schema": schema}]}),
        ),
        (
            "/v1/responses",
            json!({"input": user, "max_output_tokens": 300, "reasoning": {"effort": effort}, "store": false,
                "tools": [{"type": "function", "name": "get_weather", "parameters": schema}]}),
        ),
    ]
}

fn said(path: &str, answer: &Value) -> Said {
    match path {
        "/v1/messages" => said_by_message(answer),
        "/v1/responses" => said_by_response(answer),
        _ => said_by_chat(answer),
    }
}

fn said_by_stream(path: &str, events: &[Value]) -> Said {
    match path {
        "/v1/messages" => said_by_message_events(events),
        "/v1/responses" => {
            check_events(events);
            said_by_response(&events.last().unwrap()["response"])
        }
        _ => said_by_chunks(events),
    }
}

/// The request of the next turn: the answer goes back as the client has it, with the call's result.
fn next_turn(path: &str, request: &Value, answer: &Value) -> Value {
    let result = "sunny";
    let with = |key: &str, more: Vec<Value>| {
        let mut messages = request[key].as_array().unwrap().clone();
        messages.extend(more);
        merge(request.clone(), &json!({key: messages}))
    };
    match path {
        "/v1/messages" => {
            let content = &answer["content"];
            let id = &content.as_array().unwrap().last().unwrap()["id"];
            let block = json!({"type": "tool_result", "tool_use_id": id, "content": result});
            with(
                "messages",
                vec![json!({"role": "assistant", "content": content}), json!({"role": "user", "content": [block]})],
            )
        }
        "/v1/responses" => {
            let mut items = answer["output"].as_array().unwrap().clone();
            let id = items.last().unwrap()["call_id"].clone();
            items.push(json!({"type": "function_call_output", "call_id": id, "output": result}));
            with("input", items)
        }
        _ => {
            let message = &answer["choices"][0]["message"];
            let id = &message["tool_calls"][0]["id"];
            with("messages", vec![message.clone(), json!({"role": "tool", "tool_call_id": id, "content": result})])
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_every_dialect_come_out_and_go_back() {
    let arguments = json!({"city": "Paris"});
    for family in &FAMILIES {
        let name = family.name;
        let server = server_of(family);
        for thinks in [false, true].into_iter().filter(|thinks| family.reasons || !thinks) {
            // GLM-5.3 cannot do without.
            let opens = thinks || name == "GLM-5.3";
            let script = if opens { format!("so</think>{}", family.call) } else { family.call.to_owned() };
            let reasoning = if opens { "so" } else { "" };
            let (mut prompts, mut first) = (vec![], String::new());
            for (path, request) in requests(thinks) {
                server.says(&script);
                let answer = server.ok(path, &request).await;
                server.says(&script);
                let streamed = said_by_stream(path, &server.stream(path, &request).await);
                for said in [said(path, &answer), streamed] {
                    let calls: Vec<(String, Value)> =
                        said.2.iter().map(|(name, json)| (name.clone(), serde_json::from_str(json).unwrap())).collect();
                    assert_eq!(
                        (&*said.0, said.1.trim(), &calls[..], &*said.3),
                        (reasoning, "", &[("get_weather".to_owned(), arguments.clone())][..], "calls"),
                        "{name} {path} thinks: {thinks}"
                    );
                }
                // Whatever the model would say, the grammar makes it a call of this dialect.
                let choice = match path {
                    "/v1/messages" => json!({"tool_choice": {"type": "any", "disable_parallel_tool_use": true}}),
                    _ => json!({"tool_choice": "required", "parallel_tool_calls": false}),
                };
                server.says(if opens { "so</think>" } else { "" });
                let forced = said(path, &server.ok(path, &merge(request.clone(), &choice)).await);
                assert_eq!((forced.2.len(), &*forced.3), (1, "calls"), "{name} {path} forced: {forced:?}");
                assert_eq!(forced.2[0].0, "get_weather");
                assert_eq!(serde_json::from_str::<Value>(&forced.2[0].1).unwrap(), arguments);
                prompts.push(server_of(family).prompt_of(path, &next_turn(path, &request, &answer)).await);
                first = server_of(family).prompt_of(path, &request).await;
            }
            assert!(prompts.iter().all(|prompt| *prompt == prompts[0]), "{name}: {prompts:#?}");
            let prompt = &prompts[0];
            let [open, close] = family.result;
            let end = format!("{}{}", family.call.trim_start(), family.end);
            for part in [end, format!("{open}sunny{close}")] {
                assert_eq!(prompt.matches(&part).count(), 1, "{name}: {part:?} in {prompt:?}");
            }
            assert_eq!(prompt.contains("so</think>"), opens && family.keeps_reasoning, "{name}: {prompt:?}");
            // What the cache holds after the first turn is where the second one begins.
            if !opens || family.keeps_reasoning {
                assert!(prompt.starts_with(&(first.clone() + &script)), "{name}: {prompt:?} after {first:?}");
            }
        }
    }
}
