//! A conversation, whichever interface it came through.
//!
//! Owns the messages as chat templates read them, the tools, and the choice among them. What a model of text cannot take
//! (images, sound, tools that only a vendor runs) is left out with a note, so that a client's turn goes on.

use std::collections::HashSet;

use serde_json::{Map, Value, json};
use tandem_text::{Effort, Function, Reasoning, ReasoningControls, template_call};

use crate::app::App;
use crate::error::ApiError;
use crate::generation::{Ask, Chat};
use crate::grammar::Form;
use crate::read::{expected, kind, list, missing, object, optional, optional_text, required_text, text};

/// Tools of a request at most.
const MAX_TOOLS: usize = 4096;
/// Messages of a request at most.
pub(crate) const MAX_MESSAGES: usize = 100_000;

/// What was left out of a request, for the answer's header and the log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes(Vec<String>);

impl Notes {
    /// Adds a note, once.
    pub(crate) fn add(&mut self, note: impl Into<String>) {
        let note = note.into();
        if self.0.len() < 20 && !self.0.contains(&note) {
            tracing::info!("{note}");
            self.0.push(note);
        }
    }

    /// All in one line, if there are any.
    pub(crate) fn line(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.join("; "))
    }
}

/// How a tool is called and its calls are given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToolKind {
    /// With JSON arguments.
    Function,
    /// With a text.
    Custom,
}

/// Whether the prompt shows a tool, so that the model may call it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Shown {
    /// Among the tools at the prompt's front.
    #[default]
    First,
    /// In the result that refers to it, so that what stands before it is still found in the cache.
    InResult,
    /// Not yet.
    No,
}

/// A tool that the client runs.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    /// As the model knows it.
    pub(crate) name: String,
    /// As the client knows it.
    pub(crate) client_name: String,
    /// Of Responses' tools of type namespace.
    pub(crate) namespace: Option<String>,
    pub(crate) kind: ToolKind,
    pub(crate) description: Option<String>,
    pub(crate) parameters: Map<String, Value>,
    pub(crate) shown: Shown,
}

impl Tool {
    /// As chat templates expect it.
    pub(crate) fn declaration(&self) -> Value {
        let mut function = json!({"name": self.name});
        if let Some(description) = &self.description {
            function["description"] = json!(description);
        }
        if !self.parameters.is_empty() {
            function["parameters"] = json!(self.parameters);
        }
        json!({"type": "function", "function": function})
    }

    /// A function from a definition with name, description and a schema under `schema_key`.
    pub(crate) fn function(map: &Map<String, Value>, schema_key: &str, path: &str) -> Result<Tool, ApiError> {
        let name = required_text(map, "name", path)?;
        let parameters = match optional(map, schema_key) {
            None => Map::new(),
            Some(schema) => object(schema, &format!("{path}.{schema_key}"))?.clone(),
        };
        Ok(Tool {
            name: name.to_owned(),
            client_name: name.to_owned(),
            namespace: None,
            kind: ToolKind::Function,
            description: optional_text(map, "description", path)?.map(str::to_owned),
            parameters,
            shown: Shown::First,
        })
    }

    /// A tool that takes a text; its grammar, if it has one, becomes part of the description.
    pub(crate) fn custom(map: &Map<String, Value>, path: &str) -> Result<Tool, ApiError> {
        let name = required_text(map, "name", path)?;
        let mut description = optional_text(map, "description", path)?.unwrap_or_default().to_owned();
        if let Some(format) = optional(map, "format") {
            let path = format!("{path}.format");
            let format = object(format, &path)?;
            let format = optional(format, "grammar").and_then(Value::as_object).unwrap_or(format);
            if let Some(definition) = optional_text(format, "definition", &path)? {
                let syntax = optional_text(format, "syntax", &path)?.unwrap_or("lark");
                description.push_str(&format!("\nThe input follows this {syntax} grammar:\n{definition}"));
            }
        }
        let parameters = json!({
            "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
        });
        Ok(Tool {
            name: name.to_owned(),
            client_name: name.to_owned(),
            namespace: None,
            kind: ToolKind::Custom,
            description: (!description.is_empty()).then_some(description),
            parameters: parameters.as_object().cloned().unwrap_or_default(),
            shown: Shown::First,
        })
    }
}

/// Which tools may be called.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Choice {
    #[default]
    Auto,
    None,
    Required,
    /// This one must be.
    Named(String),
    /// Only these may, or must.
    Allowed {
        names: Vec<String>,
        is_required: bool,
    },
}

impl Choice {
    /// OpenAI's `tool_choice` in any of its forms, Chat's and Responses'.
    pub(crate) fn read(value: &Value, path: &str) -> Result<Choice, ApiError> {
        let what = "\"none\", \"auto\", \"required\", or an object that names a function or a custom tool";
        let map = match value {
            Value::Null => return Ok(Choice::Auto),
            Value::String(mode) => {
                return match mode.as_str() {
                    "auto" => Ok(Choice::Auto),
                    "none" => Ok(Choice::None),
                    "required" | "any" => Ok(Choice::Required),
                    _ => Err(expected(path, value, what)),
                };
            }
            Value::Object(map) => map,
            _ => return Err(expected(path, value, what)),
        };
        match kind(map, "function", path)? {
            kind @ ("function" | "custom") => {
                let inner = format!("{path}.{kind}");
                match optional(map, kind) {
                    Some(named) => Ok(Choice::Named(required_text(object(named, &inner)?, "name", &inner)?.to_owned())),
                    None => Ok(Choice::Named(required_text(map, "name", path)?.to_owned())),
                }
            }
            "allowed_tools" => {
                let (map, path) = match optional(map, "allowed_tools") {
                    Some(inner) => (object(inner, &format!("{path}.allowed_tools"))?, format!("{path}.allowed_tools")),
                    None => (map, path.to_owned()),
                };
                let is_required = match optional_text(map, "mode", &path)? {
                    None | Some("auto") => false,
                    Some("required") => true,
                    Some(mode) => {
                        let message = format!("mode is {mode:?}, expected \"auto\" or \"required\"");
                        return Err(ApiError::invalid(&format!("{path}.mode"), message));
                    }
                };
                let tools = map.get("tools").ok_or_else(|| missing(&format!("{path}.tools")))?;
                let mut names = vec![];
                for (i, tool) in list(tools, &format!("{path}.tools"))?.iter().enumerate() {
                    let path = format!("{path}.tools[{i}]");
                    let tool = object(tool, &path)?;
                    let inner = optional(tool, kind(tool, "function", &path)?).and_then(Value::as_object);
                    // A vendor's tool has no name.
                    if let Some(name) = optional_text(inner.unwrap_or(tool), "name", &path)? {
                        names.push(name.to_owned());
                    }
                }
                Ok(Choice::Allowed { names, is_required })
            }
            other => {
                let message = format!(
                    "tool_choice is of type {other:?}: this server cannot run such a tool, and cannot be made to; choose a \
                     function"
                );
                Err(ApiError::invalid(path, message))
            }
        }
    }
}

/// One of OpenAI's levels.
pub(crate) fn read_effort(value: &Value, path: &str) -> Result<Effort, ApiError> {
    let found = value.as_str().and_then(Effort::from_name);
    found.ok_or_else(|| expected(path, value, "one of none, minimal, low, medium, high, xhigh and max"))
}

/// `{"type": "enabled", "budget_tokens": ..}`, as Anthropic and Z.ai write it.
pub(crate) fn read_thinking(value: &Value, path: &str) -> Result<Reasoning, ApiError> {
    let map = object(value, path)?;
    let is_on = match kind(map, "enabled", path)? {
        "enabled" | "adaptive" | "auto" => true,
        "disabled" => false,
        other => {
            let message = format!("type is {other:?}, expected \"enabled\", \"adaptive\" or \"disabled\"");
            return Err(ApiError::invalid(&format!("{path}.type"), message));
        }
    };
    let budget =
        optional(map, "budget_tokens").map(|value| count(value, &format!("{path}.budget_tokens"))).transpose()?;
    Ok(Reasoning { is_on: Some(is_on), effort: None, budget: budget.filter(|_| is_on) })
}

/// The variables that tell a template of it, with those that the client has named. These win, but for a level that the
/// template does not know, or a switch that it does not have: then the nearest that it knows is taken.
fn template_variables(
    controls: &ReasoningControls,
    wanted: Reasoning,
    named: &Map<String, Value>,
    notes: &mut Notes,
) -> Map<String, Value> {
    let (mut variables, said) = controls.variables(wanted);
    said.into_iter().for_each(|note| notes.add(note));
    let is_unknown = |word: &str| Effort::from_name(word).is_some_and(|effort| !controls.efforts.contains(&effort));
    for (key, value) in named {
        let is_mapped =
            key == "reasoning_effort" && variables.contains_key(key) && value.as_str().is_some_and(is_unknown);
        if !is_mapped {
            variables.insert(key.clone(), value.clone());
        }
    }
    variables
}

/// A whole number of things.
pub(crate) fn count(value: &Value, path: &str) -> Result<u32, ApiError> {
    let whole = value.as_u64().or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && *n >= 0.0).map(|n| n as u64));
    let count = whole.and_then(|n| u32::try_from(n).ok()).filter(|n| *n <= i32::MAX as u32);
    count.ok_or_else(|| expected(path, value, &format!("a whole number from 0 to {}", i32::MAX)))
}

/// A checked conversation.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    /// As chat templates read them: text as a string, arguments as objects.
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Vec<Tool>,
    pub(crate) choice: Choice,
    pub(crate) one_call: bool,
    /// The form of an answer that is text.
    pub(crate) form: Option<Form>,
    pub(crate) thinking: Reasoning,
    /// Further variables of the template.
    pub(crate) variables: Map<String, Value>,
    /// The answer continues the last message.
    pub(crate) continues: bool,
    pub(crate) notes: Notes,
    /// Field that holds the messages.
    pub(crate) param: &'static str,
}

impl Conversation {
    /// Tools with names that differ, as models need them.
    pub(crate) fn set_tools(&mut self, tools: Vec<Tool>) -> Result<(), ApiError> {
        if tools.len() > MAX_TOOLS {
            return Err(ApiError::invalid(
                "tools",
                format!("there are {} tools, expected at most {MAX_TOOLS}", tools.len()),
            ));
        }
        let mut names: HashSet<String> = self.tools.iter().map(|tool| tool.name.clone()).collect();
        for (i, mut tool) in tools.into_iter().enumerate() {
            if tool.name.is_empty() {
                return Err(ApiError::invalid(&format!("tools[{i}].name"), "a tool has an empty name"));
            }
            if let Some(namespace) = &tool.namespace
                && names.contains(&tool.name)
            {
                tool.name = format!("{namespace}__{}", tool.name);
            }
            // The same tool twice is one; of two that differ the first counts.
            if !names.insert(tool.name.clone()) {
                self.notes.add(format!("the tool {:?} is declared twice: the first counts", tool.name));
                continue;
            }
            self.tools.push(tool);
        }
        Ok(())
    }

    /// The tools that may be called, and whether one must be.
    fn callable(&self) -> Result<(Vec<&Tool>, bool), ApiError> {
        let invalid = |message: String| Err(ApiError::invalid("tool_choice", message));
        let all = || self.tools.iter().filter(|tool| tool.shown != Shown::No);
        match &self.choice {
            Choice::Auto => Ok((all().collect(), false)),
            Choice::None => Ok((vec![], false)),
            Choice::Required if all().next().is_none() => invalid(
                "tool_choice is \"required\", but there are no tools that this server could let be called".into(),
            ),
            Choice::Required => Ok((all().collect(), true)),
            Choice::Named(name) => {
                let named: Vec<&Tool> = all().filter(|tool| tool.client_name == *name).collect();
                match named.is_empty() {
                    true => invalid(format!("tool_choice names {name:?}, which is not among the tools")),
                    false => Ok((named, true)),
                }
            }
            Choice::Allowed { names, is_required } => {
                // A body may repeat names by the million, each for thousands of tools.
                let known: HashSet<&String> = all().map(|tool| &tool.client_name).collect();
                if let Some(name) = names.iter().find(|name| !known.contains(name)) {
                    return invalid(format!("tool_choice allows {name:?}, which is not among the tools"));
                }
                let names: HashSet<&String> = names.iter().collect();
                let allowed: Vec<&Tool> = all().filter(|tool| names.contains(&tool.client_name)).collect();
                if *is_required && allowed.is_empty() {
                    return invalid("tool_choice requires one of no tools".into());
                }
                Ok((allowed, *is_required))
            }
        }
    }

    /// The prompt, and how its answer is taken apart; everything else is at its default.
    pub(crate) fn ask(&mut self, app: &App) -> Result<Ask, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::invalid(self.param, format!("{} is empty; give at least one message", self.param)));
        }
        if self.messages.len() > MAX_MESSAGES {
            let message = format!("there are {} messages, expected at most {MAX_MESSAGES}", self.messages.len());
            return Err(ApiError::invalid(self.param, message));
        }
        let wanted = Reasoning::of_variables(&self.variables).or(self.thinking);
        let controls = app.template.as_ref().map(|template| template.reasoning().clone()).unwrap_or_default();
        let variables = template_variables(&controls, wanted, &self.variables, &mut self.notes);
        let (callable, is_required) = self.callable()?;
        let functions: Vec<Function> = callable
            .iter()
            .map(|tool| Function { name: tool.name.clone(), parameters: Value::Object(tool.parameters.clone()) })
            .collect();
        // All are shown, so that the prompt stays the same while the choice changes.
        let first = self.tools.iter().filter(|tool| tool.shown == Shown::First);
        let first: Option<Vec<Value>> = (!functions.is_empty()).then(|| first.map(Tool::declaration).collect());
        let first = first.filter(|tools| !tools.is_empty());
        let (prompt, in_reasoning) =
            app.prompt(self.param, &self.messages, first.as_deref(), &variables, self.continues)?;
        let form = match (is_required, &self.form) {
            (true, _) => Some(Form::Calls { functions: functions.clone(), parallel: !self.one_call, or_text: None }),
            (false, Some(Form::JsonSchema(schema))) if !functions.is_empty() => Some(Form::Calls {
                functions: functions.clone(),
                parallel: !self.one_call,
                or_text: Some(schema.clone()),
            }),
            (false, form) => form.clone(),
        };
        Ok(Ask {
            param: self.param,
            prompt,
            form,
            chat: Some(Chat { functions, in_reasoning, one_call: self.one_call, thinking_budget: wanted.budget }),
            n: 1,
            ..Ask::default()
        })
    }
}

/// The text of a message's content: a text, nothing, or a list of parts of any interface.
pub(crate) fn content_text(value: &Value, path: &str, notes: &mut Notes) -> Result<String, ApiError> {
    match value {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let mut texts = vec![];
            for (i, part) in parts.iter().enumerate() {
                texts.extend(part_text(part, &format!("{path}[{i}]"), notes)?);
            }
            Ok(texts.join("\n"))
        }
        other => Err(expected(path, other, "a text or a list of parts")),
    }
}

/// A function's call of an earlier answer, with its name and `arguments` in `map`.
pub(crate) fn function_call(map: &Map<String, Value>, id: &str, path: &str) -> Result<Value, ApiError> {
    let name = required_text(map, "name", path)?;
    // Some clients send the arguments as an object.
    let arguments = match map.get("arguments") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(arguments)) => arguments.clone(),
        Some(other) => other.to_string(),
    };
    Ok(template_call(id, name, &arguments))
}

/// A custom tool's call of an earlier answer, with its name and `input` in `map`; see [`Tool::custom`].
pub(crate) fn custom_call(map: &Map<String, Value>, id: &str, path: &str) -> Result<Value, ApiError> {
    let name = required_text(map, "name", path)?;
    let input = json!({"input": optional_text(map, "input", path)?.unwrap_or_default()});
    Ok(template_call(id, name, &input.to_string()))
}

/// What stands in the place of something that is no text.
fn placeholder(what: &str, notes: &mut Notes) -> String {
    notes.add(format!("{what} was left out: this model reads text only"));
    format!("[{what} left out: this model reads text only]")
}

/// The text of a part of a message, if it is for the model.
pub(crate) fn part_text(part: &Value, path: &str, notes: &mut Notes) -> Result<Option<String>, ApiError> {
    if let Value::String(text) = part {
        return Ok(Some(text.clone()));
    }
    let map = object(part, path)?;
    let text_of = |key: &str| required_text(map, key, path).map(|text| Some(text.to_owned()));
    match kind(map, if map.contains_key("text") { "text" } else { "" }, path)? {
        "text" | "input_text" | "output_text" | "reasoning_text" | "summary_text" => text_of("text"),
        "refusal" => text_of("refusal"),
        "image_url" | "input_image" | "image" | "image_file" | "computer_screenshot" => {
            Ok(Some(placeholder("an image", notes)))
        }
        "input_audio" | "audio" | "audio_url" => Ok(Some(placeholder("audio", notes))),
        "video" | "video_url" | "input_video" => Ok(Some(placeholder("a video", notes))),
        "file" | "input_file" | "document" | "container_upload" => file_text(map, path, notes).map(Some),
        "search_result" => {
            let mut lines: Vec<String> = vec![];
            for key in ["title", "source"] {
                lines.extend(optional_text(map, key, path)?.map(str::to_owned));
            }
            lines.push(content_text(map.get("content").unwrap_or(&Value::Null), &format!("{path}.content"), notes)?);
            Ok(Some(lines.join("\n")))
        }
        "tool_reference" => {
            let name = required_text(map, "tool_name", path)?;
            Ok(Some(format!("The tool {name} is available.")))
        }
        // Reasoning of earlier answers has a place of its own.
        "thinking" | "redacted_thinking" | "reasoning" => Ok(None),
        "" => Err(missing(&format!("{path}.type"))),
        other if other.ends_with("_tool_result") || other.ends_with("_tool_use") || other.ends_with("_result") => {
            notes.add(format!("a part of type {other} was left out: this server does not run such tools"));
            Ok(None)
        }
        other => {
            let message = format!("type is {other:?}, expected text, an image, audio, a file or a document");
            Err(ApiError::invalid(&format!("{path}.type"), message))
        }
    }
}

/// The text of a file that holds text; a placeholder for any other.
fn file_text(map: &Map<String, Value>, path: &str, notes: &mut Notes) -> Result<String, ApiError> {
    let file = optional(map, "file").and_then(Value::as_object).unwrap_or(map);
    let title = ["title", "filename"].iter().find_map(|key| file.get(*key).and_then(Value::as_str)).unwrap_or_default();
    let source = optional(map, "source").and_then(Value::as_object);
    let body = match source {
        Some(source) => match source.get("type").and_then(Value::as_str) {
            Some("text") => Some(required_text(source, "data", &format!("{path}.source"))?.to_owned()),
            Some("content") => {
                let content = source.get("content").unwrap_or(&Value::Null);
                Some(content_text(content, &format!("{path}.source.content"), notes)?)
            }
            _ => None,
        },
        None => None,
    };
    match body {
        Some(body) if title.is_empty() => Ok(body),
        Some(body) => Ok(format!("{title}\n{body}")),
        None if title.is_empty() => Ok(placeholder("a file", notes)),
        None => Ok(placeholder(&format!("the file {title}"), notes)),
    }
}

/// An assistant's text that carries its reasoning in front, as raw answers do: the two apart.
pub(crate) fn split_reasoning(text: &str) -> Option<(&str, &str)> {
    let (reasoning, answer) = text.trim_start().strip_prefix("<think>")?.split_once("</think>")?;
    Some((reasoning.trim(), answer.trim_start_matches('\n')))
}

/// The form that `response_format` of Chat, or `text.format` of Responses, asks for.
pub(crate) fn read_format(value: &Value, path: &str) -> Result<Option<Form>, ApiError> {
    let map = object(value, path)?;
    match kind(map, "", path)? {
        "text" => Ok(None),
        // llama.cpp's clients give it a schema too.
        "json_object" => schema_of(map, path).map(Some),
        // Chat's schema may be absent, Responses' may not.
        "json_schema" => match optional(map, "json_schema") {
            Some(inner) => {
                schema_of(object(inner, &format!("{path}.json_schema"))?, &format!("{path}.json_schema")).map(Some)
            }
            None if optional(map, "schema").is_some() => schema_of(map, path).map(Some),
            None if path.starts_with("response_format") => Err(missing(&format!("{path}.json_schema"))),
            None => Err(missing(&format!("{path}.schema"))),
        },
        "grammar" => {
            let grammar = optional_text(map, "grammar", path)?.or(optional_text(map, "definition", path)?);
            let grammar = grammar.ok_or_else(|| missing(&format!("{path}.grammar")))?;
            Ok(Some(Form::Lark(grammar.to_owned())))
        }
        "" => Err(missing(&format!("{path}.type"))),
        other => {
            let message = format!("type is {other:?}, expected \"text\", \"json_object\" or \"json_schema\"");
            Err(ApiError::invalid(&format!("{path}.type"), message))
        }
    }
}

/// The schema of a format; without one any object will do.
fn schema_of(map: &Map<String, Value>, path: &str) -> Result<Form, ApiError> {
    match optional(map, "schema") {
        None => Ok(Form::JsonSchema(json!({"type": "object"}))),
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Form::JsonSchema(schema.clone())),
        Some(other) => Err(expected(&format!("{path}.schema"), other, "a JSON schema")),
    }
}

/// A text that must not be empty: the name of a field that was asked for by reference.
pub(crate) fn reference<'a>(value: &'a Value, path: &str) -> Result<&'a str, ApiError> {
    match value {
        Value::Object(map) => required_text(map, "id", path),
        other => text(other, path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A template with levels and no switch, as GLM-5.3's: what each interface says, and any template's variable, becomes one
    /// of its words; a word that it knows is passed on as the client wrote it.
    #[test]
    fn every_way_to_ask_for_reasoning_reaches_the_template() {
        let controls =
            ReasoningControls { has_switch: false, efforts: vec![Effort::Low, Effort::High, Effort::Max], is_on: true };
        let thinking = |value: Value| read_thinking(&value, "thinking").unwrap();
        let effort = |name: &str| Reasoning::of_effort(read_effort(&json!(name), "effort").unwrap());
        let unsaid = Reasoning::default();
        for (wanted, named, word, is_said) in [
            (effort("high"), json!({}), Some("high"), false),
            (effort("medium"), json!({}), Some("high"), true),
            (effort("none"), json!({}), Some("low"), true),
            (thinking(json!({"type": "enabled", "budget_tokens": 1024})), json!({}), Some("low"), false),
            (thinking(json!({"type": "enabled", "budget_tokens": 64000})), json!({}), Some("max"), false),
            (thinking(json!({"type": "disabled"})), json!({}), Some("low"), true),
            (thinking(json!({"type": "adaptive"})), json!({}), None, false),
            (unsaid, json!({}), None, false),
            (unsaid, json!({"enable_thinking": false}), Some("low"), true),
            (unsaid, json!({"thinking": false}), Some("low"), true),
            (unsaid, json!({"reasoning_effort": "max"}), Some("max"), false),
            (unsaid, json!({"reasoning_effort": "minimal"}), Some("low"), true),
            (unsaid, json!({"reasoning_effort": "of my own"}), Some("of my own"), false),
            (effort("low"), json!({"reasoning_effort": "max"}), Some("max"), false),
        ] {
            let Value::Object(named) = named else { panic!("an object") };
            let mut notes = Notes::default();
            let wanted = Reasoning::of_variables(&named).or(wanted);
            let found = template_variables(&controls, wanted, &named, &mut notes);
            assert_eq!(found.get("reasoning_effort").and_then(Value::as_str), word, "{wanted:?} {named:?}");
            assert_eq!(notes.line().is_some(), is_said, "{wanted:?} {named:?} {notes:?}");
        }
    }
}
