//! From a conversation to token ids.
//!
//! What people and tools write is text: a special token in it is encoded like any other words, and only those that the
//! template writes itself open and close turns. Before rendering a mark goes into each special token of the conversation,
//! which no template looks for, and afterwards the marks tell these tokens from the template's.

use std::borrow::Cow;

use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::chat_template::{ChatTemplate, TemplateError};
use crate::dialect::{END_THINK, THINK, opens_reasoning};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Characters of marks: Unicode keeps them for such use, and no text has them.
const MARK: [char; 2] = ['\u{FDD0}', '\u{FDD1}'];
/// Those of the mark for the end of what an answer continues.
const END_MARK: [char; 2] = ['\u{FDD2}', '\u{FDD3}'];

/// Why a conversation has no prompt.
#[derive(Debug, Error)]
pub enum PromptError {
    /// The template does not render.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The text cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The template leaves out the message that the answer should continue.
    #[error("the chat template does not show the last message as it is, so that no answer can continue it")]
    NotContinued,
}

/// What a template makes a prompt of.
#[derive(Clone, Copy, Debug)]
pub struct TemplateInput<'a> {
    /// Messages as chat templates read them.
    pub messages: &'a [Value],
    /// Tools in OpenAI's form; `None`: the model is told of none.
    pub tools: Option<&'a [Value]>,
    /// Further variables of the template.
    pub variables: &'a Map<String, Value>,
    /// The answer goes on where the last message ends, in place of a turn of its own.
    pub continues: bool,
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Whether it ends inside the reasoning section.
    pub in_reasoning: bool,
    /// Where names of added tokens begin that are text, in order.
    literals: Vec<usize>,
}

/// A conversation as the model reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// The rendered text.
    pub text: String,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Whether it ends inside the reasoning section.
    pub in_reasoning: bool,
}

/// What a template makes of a conversation; `extra` are further variables of it.
///
/// # Errors
/// The template refuses the conversation or fails, or the tokenizer refuses the text.
pub fn prompt(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Value],
    tools: Option<&[Value]>,
    extra: &Map<String, Value>,
) -> Result<Prompt, PromptError> {
    let input = TemplateInput { messages, tools, variables: extra, continues: false };
    render(template, tokenizer, &input)?.encode(tokenizer)
}

/// The text that a template makes of a conversation.
///
/// # Errors
/// The template refuses the conversation or fails, or drops the message that the answer continues.
pub fn render(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    input: &TemplateInput<'_>,
) -> Result<Rendered, PromptError> {
    let TemplateInput { messages, tools, variables, continues } = *input;
    let only_calls = |message: &Value| {
        message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty()) && message["content"] == ""
    };
    let mut messages = Cow::Borrowed(messages);
    if messages.iter().any(only_calls) && template.drops_calls_beside_text() {
        messages.to_mut().iter_mut().filter(|message| only_calls(message)).for_each(|message| {
            message["content"] = Value::Null;
        });
    }
    let messages = &messages[..];
    let values = || messages.iter().chain(tools.into_iter().flatten()).chain(variables.values());
    let is_plain = !continues && !values().any(|value| has_control(tokenizer, value));
    let (text, literals) = if is_plain {
        (template.render(messages, tools, true, variables)?, vec![])
    } else {
        let mark = free_mark(values(), MARK);
        let protect = |value: &Value| protected(tokenizer, value, &mark);
        let mut messages: Vec<Value> = messages.iter().map(protect).collect();
        let tools: Option<Vec<Value>> = tools.map(|tools| tools.iter().map(protect).collect());
        let variables = variables.iter().map(|(key, value)| (key.clone(), protect(value))).collect();
        let end = free_mark(values(), END_MARK);
        if let (true, Some(last)) = (continues, messages.last_mut()) {
            // Behind what the answer continues: its text, or the reasoning if that is all there is.
            let is_thinking =
                last["content"].as_str().is_none_or(str::is_empty) && last["reasoning_content"].is_string();
            let key = if is_thinking { "reasoning_content" } else { "content" };
            last[key] = Value::String(last[key].as_str().unwrap_or_default().to_owned() + &end);
        }
        let mut rendered = template.render(&messages, tools.as_deref(), !continues, &variables)?;
        if continues {
            let at = rendered.rfind(&end).ok_or(PromptError::NotContinued)?;
            rendered.truncate(at);
        }
        without_marks(&rendered, &mark)
    };
    // A literal `<think>` at the end is no order.
    let is_literal = literals.last().is_some_and(|literal| text[*literal..].trim_end() == THINK);
    let in_reasoning = match continues {
        // The section that was opened last is still open.
        true => match (text.rfind(THINK), text.rfind(END_THINK)) {
            (Some(open), close) => close.is_none_or(|close| close < open) && literals.binary_search(&open).is_err(),
            (None, _) => false,
        },
        false => opens_reasoning(&text) && !is_literal,
    };
    Ok(Rendered { text, in_reasoning, literals })
}

impl Rendered {
    /// The tokens.
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    pub fn encode(self, tokenizer: &Tokenizer) -> Result<Prompt, PromptError> {
        let ids = tokenizer.encode_with_literals(&self.text, &self.literals)?;
        Ok(Prompt { text: self.text, ids, in_reasoning: self.in_reasoning })
    }
}

/// A call as chat templates expect it: `arguments`, JSON text, as an object, read by [`crate::exact`].
pub fn template_call(id: &str, name: &str, arguments: &str) -> Value {
    let arguments = match crate::exact::read(arguments) {
        Ok(Value::Object(map)) => Value::Object(map),
        Ok(Value::Null) => json!({}),
        // A call that was cut off; the model sees what it wrote.
        _ if arguments.trim().is_empty() => json!({}),
        _ => json!({"arguments": arguments}),
    };
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

fn has_control(tokenizer: &Tokenizer, value: &Value) -> bool {
    match value {
        Value::String(text) => tokenizer.has_control(text),
        Value::Array(list) => list.iter().any(|value| has_control(tokenizer, value)),
        Value::Object(map) => {
            map.iter().any(|(key, value)| tokenizer.has_control(key) || has_control(tokenizer, value))
        }
        _ => false,
    }
}

/// A text that occurs nowhere in the values.
fn free_mark<'a>(values: impl Iterator<Item = &'a Value> + Clone, [filling, last]: [char; 2]) -> String {
    fn contains(value: &Value, mark: &str) -> bool {
        match value {
            Value::String(text) => text.contains(mark),
            Value::Array(list) => list.iter().any(|value| contains(value, mark)),
            Value::Object(map) => map.iter().any(|(key, value)| key.contains(mark) || contains(value, mark)),
            _ => false,
        }
    }
    let mut mark = String::from(last);
    while values.clone().any(|value| contains(value, &mark)) {
        mark.insert(0, filling);
    }
    mark
}

/// The value with a mark after the first character of each special token in its texts.
fn protected(tokenizer: &Tokenizer, value: &Value, mark: &str) -> Value {
    let protect = |text: &str| {
        let mut marked = String::with_capacity(text.len() + 16);
        let mut rest = 0;
        // Tokens may overlap: each occurrence counts.
        for start in tokenizer.control_starts(text) {
            let after = start + text[start..].chars().next().map_or(0, char::len_utf8);
            marked.push_str(&text[rest..after]);
            marked.push_str(mark);
            rest = after;
        }
        marked + &text[rest..]
    };
    match value {
        Value::String(text) => Value::String(protect(text)),
        Value::Array(list) => list.iter().map(|value| protected(tokenizer, value, mark)).collect(),
        Value::Object(map) => {
            Value::Object(map.iter().map(|(key, value)| (protect(key), protected(tokenizer, value, mark))).collect())
        }
        other => other.clone(),
    }
}

/// The text without its marks, and where the tokens begin that had one.
fn without_marks(marked: &str, mark: &str) -> (String, Vec<usize>) {
    let mut text = String::with_capacity(marked.len());
    let mut literals = vec![];
    for (i, piece) in marked.split(mark).enumerate() {
        if i > 0 {
            literals.push(text.char_indices().next_back().map_or(0, |(at, _)| at));
        }
        text.push_str(piece);
    }
    (text, literals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat_template::TemplateTokens;
    use std::path::{Path, PathBuf};

    /// Every model with a tokenizer and a chat template in the repository.
    fn models() -> Vec<(PathBuf, Tokenizer, ChatTemplate)> {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let folders = std::fs::read_dir(root.join("tests/golden/models")).unwrap().map(|entry| entry.unwrap().path());
        let all = folders.chain([root.join("models/fable-30m-MXFP4-Q8")]);
        let models: Vec<_> = all
            .filter_map(|dir| {
                let tokenizer = Tokenizer::from_dir(&dir).ok()?;
                let template = ChatTemplate::from_dir(&dir, None).ok()??;
                Some((dir, tokenizer, template))
            })
            .collect();
        assert!(models.len() >= 2);
        models
    }

    /// A place, and messages and tools with a text in it.
    type Case = (&'static str, Vec<Value>, Option<Vec<Value>>);

    /// Conversations with a text in each place that a client can write to.
    fn conversations(text: &str) -> Vec<Case> {
        let user = json!({"role": "user", "content": "hi"});
        let call = |name: &str, arguments: Value| {
            json!({"role": "assistant", "content": "", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}},
            ]})
        };
        let tool = |name: &str, description: &str, key: &str| {
            json!({"type": "function", "function": {"name": name, "description": description, "parameters": {
                "type": "object", "properties": {key: {"type": "string", "description": description}},
            }}})
        };
        let plain = tool("f", "x", "a");
        let result = json!({"role": "tool", "tool_call_id": "c", "content": text});
        vec![
            ("user", vec![json!({"role": "user", "content": text})], None),
            ("system", vec![json!({"role": "system", "content": text}), user.clone()], None),
            ("assistant", vec![user.clone(), json!({"role": "assistant", "content": text}), user.clone()], None),
            (
                "reasoning",
                vec![user.clone(), json!({"role": "assistant", "content": "a", "reasoning_content": text})],
                None,
            ),
            ("result", vec![user.clone(), call("f", json!({"a": "b"})), result], Some(vec![plain.clone()])),
            ("argument", vec![user.clone(), call("f", json!({"a": text, "b": [text]}))], Some(vec![plain.clone()])),
            ("key", vec![user.clone(), call("f", json!({text: "b"}))], Some(vec![plain.clone()])),
            ("name of a call", vec![user.clone(), call(text, json!({"a": "b"}))], Some(vec![plain])),
            ("tool", vec![user.clone()], Some(vec![tool(text, text, text)])),
        ]
    }

    #[test]
    fn calls_reach_templates_that_write_them_beside_null_only() {
        let strict = "{% for m in messages %}{% if m.tool_calls and m.content is none %}[{% for c in m.tool_calls %}\
                      {{ c.function.name }}{% endfor %}]{% else %}<{{ m.content }}>{% endif %}{% endfor %}";
        let usual = "{% for m in messages %}{{ m.content | trim }}{% for c in m.tool_calls or [] %}\
                     ({{ c.function.name }}){% endfor %}{% endfor %}";
        let check = |source: &str, content: Value, expected: &str| {
            let template = ChatTemplate::new(source, TemplateTokens::default()).unwrap();
            let messages = [
                json!({"role": "user", "content": "a"}),
                json!({"role": "assistant", "content": content, "tool_calls": [template_call("c", "f", "{}")]}),
            ];
            let (_, tokenizer, _) = models().swap_remove(0);
            let input = TemplateInput { messages: &messages, tools: None, variables: &Map::new(), continues: false };
            assert_eq!(render(&template, &tokenizer, &input).unwrap().text, expected, "{source}");
        };
        check(strict, json!(""), "<a>[f]");
        check(strict, Value::Null, "<a>[f]");
        check(strict, json!("text"), "<a><text>");
        check(usual, json!(""), "a(f)");
    }

    #[test]
    fn special_tokens_in_a_conversation_are_text() {
        for (dir, tokenizer, template) in models() {
            let controls: Vec<(u32, String)> = (0..tokenizer.vocab_size() as u32 + 1000)
                .filter(|id| tokenizer.is_added(*id))
                .filter_map(|id| Some((id, tokenizer.id_to_token(id)?)))
                .filter(|(_, token)| !token.trim().is_empty())
                .collect();
            assert!(!controls.is_empty());
            let orders = |ids: &[u32]| -> Vec<u32> {
                ids.iter().copied().filter(|id| controls.iter().any(|(control, _)| control == id)).collect()
            };
            let none = Map::new();
            let render = |messages: &[Value], tools: Option<&[Value]>| {
                prompt(&template, &tokenizer, messages, tools, &none).ok()
            };
            let tokens: Vec<&str> = controls.iter().map(|(_, token)| token.as_str()).collect();
            let all = tokens.concat();
            let mut texts: Vec<String> = tokens.iter().map(|token| format!("word{token}word")).collect();
            // Alone, with each other, inside each other, with marks.
            texts.extend(tokens.iter().map(|token| (*token).to_owned()));
            texts.push(all.clone());
            texts.push(
                tokens.iter().map(|token| token.split_at(1).0.to_owned() + token + token.split_at(1).1).collect(),
            );
            texts.push(format!("{}{}{all}{}", MARK[0], MARK[1], MARK[1]));
            for text in &texts {
                for ((place, messages, tools), (_, plain, plain_tools)) in
                    conversations(text).iter().zip(conversations("words"))
                {
                    let Some(expected) = render(&plain, plain_tools.as_deref()) else { continue };
                    let Some(found) = render(messages, tools.as_deref()) else { continue };
                    let what = format!("{}: {place}: {text:?}", dir.display());
                    assert_eq!(orders(&found.ids), orders(&expected.ids), "{what}");
                    assert_eq!(found.in_reasoning, expected.in_reasoning, "{what}");
                    assert_eq!(tokenizer.decode(&found.ids, false).unwrap(), found.text, "{what}");
                    if place == &"user" {
                        assert!(found.text.contains(text.trim()), "{what}");
                    }
                }
            }
        }
    }

    /// As the model was trained: the text of the template is one piece with what stands beside it.
    #[test]
    fn other_conversations_are_encoded_as_one_text() {
        for (dir, tokenizer, template) in models() {
            for (place, messages, tools) in conversations("It is 1 < 2, <b>bold</b> and \u{fdd0}.\n") {
                let Ok(found) = prompt(&template, &tokenizer, &messages, tools.as_deref(), &Map::new()) else {
                    continue;
                };
                let text = template.render(&messages, tools.as_deref(), true, &Map::new()).unwrap();
                assert_eq!(found.text, text, "{}: {place}", dir.display());
                assert_eq!(found.ids, tokenizer.encode(&text, false).unwrap(), "{}: {place}", dir.display());
            }
        }
    }
}
