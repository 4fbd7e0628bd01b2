//! A chat template of any text: compiling and rendering it must end, without a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{Map, json};
use tandem_text::ChatTemplate;
use tandem_text::chat_template::TemplateTokens;

fuzz_target!(|source: &str| {
    let template = match ChatTemplate::new(source, TemplateTokens::default()) {
        Ok(template) => template,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let messages = [
        json!({"role": "system", "content": "be brief"}),
        json!({"role": "user", "content": [{"type": "text", "text": "hi"}]}),
        json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1.5}}}]}),
        json!({"role": "tool", "content": "42"}),
    ];
    let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})];
    for tools in [None, Some(&tools[..])] {
        if let Err(error) = template.render(&messages, tools, true, &Map::new()) {
            assert!(!error.to_string().is_empty());
        }
    }
});
