//! Renders chat templates for comparison with Jinja2: one JSON object a line in, `{template, messages, tools, extra,
//! add_generation_prompt}`, one out, `{text}` or `{error}`. `scripts/compare-jinja` runs it.

use std::io::{BufRead, Write};

use serde_json::{Map, Value, json};
use tandem_text::ChatTemplate;
use tandem_text::chat_template::TemplateTokens;

fn main() -> std::io::Result<()> {
    let mut compiled: Option<(String, ChatTemplate)> = None;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let mut case: Value = serde_json::from_str(&line?)?;
        let source = case["template"].as_str().unwrap_or_default().to_owned();
        if compiled.as_ref().is_none_or(|(known, _)| *known != source) {
            let tokens = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
            let tokens = TemplateTokens::from_config(tokens.as_object().unwrap_or(&Map::new()));
            match ChatTemplate::new(&source, tokens) {
                Ok(template) => compiled = Some((source, template)),
                Err(error) => {
                    writeln!(out, "{}", json!({"error": error.to_string()}))?;
                    continue;
                }
            }
        }
        let Some((_, template)) = &compiled else { continue };
        let messages = case["messages"].as_array().cloned().unwrap_or_default();
        let tools = case["tools"].as_array().cloned();
        let extra = case["extra"].as_object_mut().map(std::mem::take).unwrap_or_default();
        let prompt = case["add_generation_prompt"] == true;
        let answer = match template.render(&messages, tools.as_deref(), prompt, &extra) {
            Ok(text) => json!({"text": text}),
            Err(error) => json!({"error": error.to_string()}),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}
