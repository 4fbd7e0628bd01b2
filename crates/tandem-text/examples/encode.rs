//! Prompts of a model's directory for comparison with other programs: one JSON object a line in, `{messages, tools,
//! variables}`, one out, `{text, ids}` or `{error}`. `scripts/compare-dialects` runs it.
//!
//! ```text
//! encode DIR [CHAT_FORMAT]
//! ```

use std::io::{BufRead, Write};
use std::path::Path;

use serde_json::{Value, json};
use tandem_text::{ChatFormat, Dialect, Tokenizer, prompt};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, rest @ ..] = &arguments[..] else { return Err("give a model's directory".into()) };
    let forced = rest.first().map(|name| Dialect::from_name(name).ok_or("no such chat format")).transpose()?;
    let tokenizer = Tokenizer::from_dir(Path::new(dir))?;
    let format = ChatFormat::from_dir(Path::new(dir), None, forced, |token| tokenizer.has_token(token))?;
    let template = format.template.ok_or("the model has no chat template")?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let mut case: Value = serde_json::from_str(&line?)?;
        let messages = case["messages"].as_array().cloned().unwrap_or_default();
        let tools = case["tools"].as_array().cloned();
        let variables = case["variables"].as_object_mut().map(std::mem::take).unwrap_or_default();
        let answer = match prompt(&template, &tokenizer, &messages, tools.as_deref(), &variables) {
            Ok(prompt) => json!({"text": prompt.text, "ids": prompt.ids}),
            Err(error) => json!({"error": error.to_string()}),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}
