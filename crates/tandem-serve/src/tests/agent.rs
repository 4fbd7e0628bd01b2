//! A long conversation of an agent: every turn runs only what is new, whatever tokens the model chose for what it said.

use serde_json::{Value, json};

use super::Server;
use crate::Options;

/// Tokens of which hardly one is what a tokenizer would make of their text: letter by letter, but for tags.
fn spelled(server: &Server, text: &str) -> Vec<u32> {
    let mut tokens = vec![];
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let tag = rest.find('>').map(|end| &rest[..=end]).filter(|tag| tag.starts_with('<'));
        let piece = tag.unwrap_or(&rest[..first.len_utf8()]);
        tokens.extend(server.tokenizer.encode(piece, false).unwrap());
        rest = &rest[piece.len()..];
    }
    tokens
}

/// Runs 30 turns: the tokens of all prompts but the first, and those that ran again though an earlier turn had run them.
async fn run(server: &Server, spell: bool) -> (usize, usize) {
    let tool = |name: &str| {
        json!({"type": "function", "function": {
            "name": name, "description": format!("{name} of a file. ").repeat(8),
            "parameters": {"type": "object", "properties": {
                "path": {"type": "string"}, "lines": {"type": "integer"}, "exact": {"type": "boolean"},
            }},
        }})
    };
    let tools = json!([tool("read"), tool("search"), tool("write")]);
    let mut messages = vec![
        json!({"role": "system", "content": "You are an agent that mends programs. Be brief. ".repeat(60)}),
        json!({"role": "user", "content": "There is a mistake in the parser. Find it."}),
    ];
    let (mut all, mut again, mut before) = (0, 0, 0);
    for turn in 0..30 {
        // A call with spaces and an order that no template writes, text with a call, or text alone.
        let said = match turn % 3 {
            0 => format!(
                "<tool_call>read<arg_key>lines</arg_key><arg_value> {turn}0 </arg_value><arg_key>path</arg_key>\
                 <arg_value>src/parser_{turn}.rs</arg_value></tool_call>"
            ),
            1 => format!(
                "I look for it elsewhere.<tool_call>search<arg_key>path</arg_key><arg_value>src/{turn}</arg_value>\
                 <arg_key>exact</arg_key><arg_value>true</arg_value></tool_call>"
            ),
            _ => format!("It is in line {turn}: the parser forgets what comes after a comma."),
        };
        let tokens = if spell { spelled(server, &said) } else { server.tokenizer.encode(&said, false).unwrap() };
        *server.script.lock().unwrap() = tokens;
        let answer =
            server.ok("/v1/chat/completions", &json!({"messages": messages, "tools": tools, "max_tokens": 500})).await;
        let usage = &answer["usage"];
        let [prompt, cached, completion] =
            [&usage["prompt_tokens"], &usage["prompt_tokens_details"]["cached_tokens"], &usage["completion_tokens"]]
                .map(|n| n.as_u64().unwrap() as usize);
        if turn > 0 {
            all += prompt;
            again += before - cached.min(before);
        }
        before = prompt + completion;
        let message = answer["choices"][0]["message"].clone();
        let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
        assert_eq!(calls.is_empty(), turn % 3 == 2, "{message}");
        messages.push(message);
        if calls.is_empty() {
            messages.push(json!({"role": "user", "content": format!("Mend it, then go on with file {turn}.")}));
        }
        for call in calls {
            // Clients send arguments back as they parsed them, in any spacing.
            let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
            let last = messages.last_mut().unwrap();
            last["tool_calls"][0]["function"]["arguments"] = json!(serde_json::to_string_pretty(&arguments).unwrap());
            let result = format!("{turn}: let token = next(input)?; if token == comma {{ continue }}\n")
                .repeat(10 + turn * 7 % 60);
            messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": result}));
        }
    }
    (all, again)
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_turns_run_only_what_is_new() {
    for spell in [false, true] {
        let server = Server::with_context(&Options::default(), 1 << 17);
        let (all, again) = run(&server, spell).await;
        assert!(all > 200_000, "{all}");
        assert!(again * 50 <= all, "{again} of {all} tokens ran again, spelled {spell}");
        println!("{again} of {all} prompt tokens ran again, spelled {spell}");
    }
}
