//! The forms in which models reason and call functions, one a file, and which of them a checkpoint has.
//!
//! [`Dialect`] is the registry: a name for `--chat-format`, what a checkpoint of it looks like, the tokens that its tags are
//! made of, and how its calls are read. [`Parser`] is what they share: it takes an answer apart while it is written, into
//! reasoning, text and calls, and leaves what stands between a call's tags to the dialect.
//!
//! Rules where a model does not keep to its format: a call inside the reasoning is a call; a tag inside a value is part of
//! the value unless what follows fits the format; a call of an undeclared function, or one that cannot be read, is text.

mod argument;
mod deepseek_v3;
pub(crate) mod deepseek_v32;
mod glm;
mod hermes;
mod json;
mod llama3;
mod parser;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value};

pub use parser::Parser;

/// Begins a reasoning section.
pub const THINK: &str = "<think>";
/// Ends a reasoning section.
pub const END_THINK: &str = "</think>";

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// DeepSeek-V3.2: blocks of invocations with typed parameters, between tags of the token `｜DSML｜`. Its prompts are
    /// written without a template.
    DeepSeekV32,
    /// DeepSeek-V3 and R1: tokens of their own around a block of JSON in Markdown.
    DeepSeekV3,
    /// DeepSeek-V3.1: the same tokens around a name and JSON.
    DeepSeekV31,
    /// GLM-4.5 to 5.3: keys and values between tags.
    Glm,
    /// Qwen, SmolLM and others: JSON between `<tool_call>` and `</tool_call>`, or alone.
    Hermes,
    /// Llama 3: JSON alone or after `<|python_tag|>`, `<function=name>` before JSON, or calls as Python writes them.
    Llama3,
}

/// What is known about a dialect.
struct Entry {
    dialect: Dialect,
    name: &'static str,
    /// Added tokens of which its tags consist; they stay in the text that is taken apart, special or not.
    tokens: &'static [&'static str],
    /// Whether a chat template teaches it.
    is_taught_by: fn(&str) -> bool,
    /// A token that no vocabulary of another dialect has, if there is one.
    own_token: Option<&'static str>,
    reader: fn() -> Box<dyn parser::CallReader>,
}

/// All dialects in the order of [`Dialect`]; of those that fit a checkpoint the first counts.
static DIALECTS: [Entry; 6] = [
    Entry {
        dialect: Dialect::DeepSeekV32,
        name: "deepseek_v32",
        tokens: &[deepseek_v32::MARK],
        is_taught_by: |template| template.contains(deepseek_v32::MARK),
        own_token: Some(deepseek_v32::MARK),
        reader: || Box::<deepseek_v32::Reader>::default(),
    },
    Entry {
        dialect: Dialect::DeepSeekV3,
        name: "deepseek_v3",
        tokens: &deepseek_v3::TOKENS,
        is_taught_by: |template| template.contains(deepseek_v3::SEPARATOR) && template.contains("```json"),
        own_token: None,
        reader: || Box::<deepseek_v3::Reader>::default(),
    },
    Entry {
        dialect: Dialect::DeepSeekV31,
        name: "deepseek_v31",
        tokens: &deepseek_v3::TOKENS,
        is_taught_by: |template| template.contains(deepseek_v3::SEPARATOR),
        own_token: Some(deepseek_v3::SEPARATOR),
        reader: || Box::<deepseek_v3::Reader>::default(),
    },
    Entry {
        dialect: Dialect::Glm,
        name: "glm",
        tokens: &glm::TOKENS,
        is_taught_by: |template| template.contains(glm::KEY),
        own_token: Some(glm::KEY),
        reader: || Box::<glm::Reader>::default(),
    },
    Entry {
        dialect: Dialect::Hermes,
        name: "hermes",
        tokens: &hermes::TOKENS,
        is_taught_by: |template| template.contains(hermes::CALL),
        own_token: None,
        reader: || Box::<hermes::Reader>::default(),
    },
    Entry {
        dialect: Dialect::Llama3,
        name: "llama3",
        tokens: &llama3::TOKENS,
        is_taught_by: |template| template.contains(llama3::PYTHON) || template.contains("<|start_header_id|>"),
        own_token: Some(llama3::PYTHON),
        reader: || Box::<llama3::Reader>::default(),
    },
];

impl Dialect {
    /// Every name that [`Dialect::from_name`] takes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        DIALECTS.iter().map(|entry| entry.name)
    }

    /// The dialect of a name.
    pub fn from_name(name: &str) -> Option<Dialect> {
        DIALECTS.iter().find(|entry| entry.name == name).map(|entry| entry.dialect)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// The dialect that a chat template teaches; without one, or if it teaches none, that of the vocabulary's tokens, else
    /// the most common one. `has_token`: whether the vocabulary has a token.
    pub fn of_template(template: &str, has_token: impl Fn(&str) -> bool) -> Dialect {
        let taught = DIALECTS.iter().find(|entry| (entry.is_taught_by)(template));
        let known = || DIALECTS.iter().find(|entry| entry.own_token.is_some_and(&has_token));
        taught.or_else(known).map_or(Dialect::Hermes, |entry| entry.dialect)
    }

    fn entry(self) -> &'static Entry {
        &DIALECTS[self as usize]
    }
}

/// True when a rendered prompt leaves the reasoning section open, so that the answer begins inside it.
pub fn opens_reasoning(prompt: &str) -> bool {
    prompt.trim_end().ends_with(THINK)
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Its name, as calls give it.
    pub name: String,
    /// JSON schema of the arguments.
    pub parameters: Value,
}

impl Function {
    /// The function that a tool in OpenAI's form declares, with or without `{"type": "function", "function": ..}` around it.
    pub fn of_tool(tool: &Value) -> Option<Function> {
        let function = tool.get("function").unwrap_or(tool);
        let name = function.get("name")?.as_str().filter(|name| !name.is_empty())?;
        let parameters = function.get("parameters").cloned().unwrap_or_else(|| Value::Object(Map::new()));
        Some(Function { name: name.to_owned(), parameters })
    }
}

/// The next piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// More of the reasoning.
    Reasoning(String),
    /// More of the text for the reader.
    Content(String),
    /// A call begins.
    Call {
        /// The declared function's name.
        name: String,
    },
    /// More of the last call's arguments, JSON text.
    Arguments(String),
    /// The last call is complete.
    EndCall,
}

/// Whether `text` could become `tag`: nothing, or its first characters.
fn is_beginning_of(text: &str, tag: &str) -> bool {
    text.len() < tag.len() && tag.starts_with(text)
}

/// Whether `text` could become one of the tags.
fn may_become(text: &str, tags: &[&str]) -> bool {
    tags.iter().any(|tag| is_beginning_of(text, tag))
}
