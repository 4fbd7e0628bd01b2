//! DeepSeek-V3.2: DSML.
//!
//! ```text
//! <｜DSML｜function_calls>
//! <｜DSML｜invoke name="f">
//! <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
//! <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
//! </｜DSML｜invoke>
//! </｜DSML｜function_calls>
//! ```
//!
//! Texts stand as they are, everything else as JSON.
//!
//! The checkpoint has no chat template, so its prompts are written here, as the program that it ships in its place does
//! (`encoding/encoding_dsv32.py`): `scripts/compare-dialects` holds one against the other.

use serde_json::Value;

use super::argument::coerce_marked;
use super::parser::{CallReader, Calls, End, Step};
use super::{END_THINK, THINK, argument, is_beginning_of, json, may_become};
use crate::chat_template::json_dumps;
use crate::exact;

/// The token in every tag.
pub(super) const MARK: &str = "｜DSML｜";
const LIST: &str = "<｜DSML｜function_calls>";
const END_LIST: &str = "</｜DSML｜function_calls>";
const CALL: &str = "<｜DSML｜invoke";
const END_CALL: &str = "</｜DSML｜invoke>";
const PARAMETER: &str = "<｜DSML｜parameter";
const END_PARAMETER: &str = "</｜DSML｜parameter>";

/// Bytes of an opening tag after its name, at most.
const LONGEST_HEAD: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Reader {
    state: State,
    /// What was read since the opening tag, as long as there is no call.
    before: String,
    /// Bytes of the text in which arguments that are one JSON object do not end.
    n_tried: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before the first call of a list.
    #[default]
    List,
    /// Inside a call's opening tag.
    Head,
    Parameters,
    /// After a call; those that follow are opened by their own tags.
    After,
}

impl CallReader for Reader {
    fn openings(&self) -> &'static [&'static str] {
        &[LIST, CALL]
    }

    fn open(&mut self, opening: &'static str) {
        *self = Reader { state: if opening == CALL { State::Head } else { State::List }, ..Reader::default() };
    }

    fn advance(&mut self, pending: &mut String, calls: &mut Calls, at_end: bool) -> Step {
        match self.state {
            State::List => self.advance_list(pending, at_end),
            State::Head => self.advance_head(pending, calls, at_end),
            State::Parameters => self.advance_parameters(pending, calls, at_end),
            State::After => {
                let start = pending.trim_start();
                if let Some(rest) = start.strip_prefix(END_LIST) {
                    *pending = rest.to_owned();
                    return Step::Over;
                }
                if !at_end && is_beginning_of(start, END_LIST) { Step::Wait } else { Step::Over }
            }
        }
    }

    fn finish(&mut self, rest: &str, calls: &mut Calls, cut_off: bool) -> End {
        match self.state {
            State::List | State::Head => End::Text(std::mem::take(&mut self.before) + rest),
            State::Parameters if cut_off => End::Open,
            State::Parameters => {
                for (key, value) in json::members(rest).unwrap_or_default() {
                    calls.argument(key, value);
                }
                calls.end();
                End::Complete
            }
            State::After => End::Complete,
        }
    }
}

impl Reader {
    fn advance_list(&mut self, pending: &mut String, at_end: bool) -> Step {
        let start = pending.trim_start();
        if let Some(rest) = start.strip_prefix(CALL) {
            let rest = rest.to_owned();
            self.before = pending[..pending.len() - rest.len()].to_owned();
            *pending = rest;
            self.state = State::Head;
            return Step::Again;
        }
        if !at_end && is_beginning_of(start, CALL) { Step::Wait } else { Step::Text(std::mem::take(pending)) }
    }

    fn advance_head(&mut self, pending: &mut String, calls: &mut Calls, at_end: bool) -> Step {
        let Some(head) = Head::read(pending) else {
            let is_none = at_end || pending.len() > LONGEST_HEAD || pending.contains(MARK);
            return if is_none { self.text(pending) } else { Step::Wait };
        };
        let (is_closed, end) = (head.is_closed, head.end);
        if !head.name.is_some_and(|name| calls.begin(name)) {
            return self.text(pending);
        }
        *pending = pending.split_off(end);
        self.state = State::Parameters;
        self.n_tried = 0;
        if is_closed {
            return self.end(calls);
        }
        Step::Again
    }

    fn advance_parameters(&mut self, pending: &mut String, calls: &mut Calls, at_end: bool) -> Step {
        let start = pending.trim_start();
        if let Some(rest) = start.strip_prefix(END_CALL) {
            *pending = rest.to_owned();
            return self.end(calls);
        }
        if [END_LIST, CALL, END_THINK].iter().any(|tag| start.starts_with(tag)) {
            // The end tag is missing.
            return self.end(calls);
        }
        let Some(after) = start.strip_prefix(PARAMETER) else {
            if start.starts_with('{') && !calls.has_arguments() {
                return self.advance_json(pending, calls);
            }
            let next = json::first(start, &[PARAMETER, END_CALL, END_LIST, CALL]);
            let Some((at, _)) = next else { return Step::Wait };
            // Words between arguments mean nothing.
            *pending = start[at..].to_owned();
            return Step::Again;
        };
        let Some(head) = Head::read(after) else {
            let Some((at, _)) = json::first(after, &[PARAMETER, END_CALL]) else { return Step::Wait };
            *pending = after[at..].to_owned();
            return Step::Again;
        };
        let (key, text) = (head.name.unwrap_or_default().to_owned(), &after[head.end..]);
        let (value, next) = match head.is_closed {
            true => ("", 0),
            false => match value_end(text, at_end) {
                Some((end, next)) => (&text[..end], next),
                None => return Step::Wait,
            },
        };
        let schemas = calls.schemas(&key);
        let value = match head.is_text {
            Some(is_text) => coerce_marked(value, is_text, &schemas),
            None => argument::coerce(value, &schemas),
        };
        *pending = text[next..].to_owned();
        calls.argument(key, &value);
        Step::Again
    }

    /// Arguments as one JSON object.
    fn advance_json(&mut self, pending: &mut String, calls: &mut Calls) -> Step {
        let Some((end, next)) = json::until(pending, &[END_CALL], &mut self.n_tried) else { return Step::Wait };
        for (key, value) in json::members(&pending[..end]).unwrap_or_default() {
            calls.argument(key, value);
        }
        *pending = pending.split_off(next);
        self.end(calls)
    }

    fn end(&mut self, calls: &mut Calls) -> Step {
        calls.end();
        self.state = State::After;
        Step::Again
    }

    fn text(&mut self, pending: &mut String) -> Step {
        Step::Text(std::mem::take(&mut self.before) + &std::mem::take(pending))
    }
}

/// The attributes of an opening tag.
struct Head<'a> {
    name: Option<&'a str>,
    /// `string="true"` or `"false"`.
    is_text: Option<bool>,
    /// It ends as in `<invoke name="f"/>`.
    is_closed: bool,
    /// Bytes up to the end of the tag.
    end: usize,
}

impl Head<'_> {
    /// What follows a tag's name; `None` when its end is missing.
    fn read(text: &str) -> Option<Head<'_>> {
        let mut head = Head { name: None, is_text: None, is_closed: false, end: 0 };
        let mut rest = text;
        loop {
            let at = rest.find(['"', '>'])?;
            let (before, after) = (rest[..at].trim(), &rest[at + 1..]);
            if rest[at..].starts_with('>') {
                head.is_closed = before.ends_with('/');
                head.end = text.len() - after.len();
                return Some(head);
            }
            let (value, after) = after.split_once('"')?;
            match before {
                "name=" => head.name = Some(value),
                "string=" => head.is_text = Some(value == "true"),
                _ => {}
            }
            rest = after;
        }
    }
}

/// Where the value at the front of `text` ends, and where what follows its end tag begins. `None` when more text is
/// needed to tell: an end tag that nothing of a call follows is part of the value.
fn value_end(text: &str, at_end: bool) -> Option<(usize, usize)> {
    const NEXT: [&str; 5] = [PARAMETER, END_CALL, END_LIST, CALL, END_THINK];
    for (at, tag) in text.match_indices(END_PARAMETER) {
        let next = at + tag.len();
        let after = text[next..].trim_start();
        if NEXT.iter().any(|tag| after.starts_with(tag)) {
            return Some((at, next));
        }
        if may_become(after, &NEXT) {
            return at_end.then_some((at, next));
        }
    }
    if !at_end {
        return None;
    }
    let end = match text.rfind(END_PARAMETER) {
        Some(at) => (at, at + END_PARAMETER.len()),
        // The end tag is missing, but not the end of the line.
        None => {
            let next = text.find(END_CALL).unwrap_or(text.len());
            (text[..next].trim_end_matches('\n').len(), next)
        }
    };
    Some(end)
}

const BEGIN: &str = "<｜begin▁of▁sentence｜>";
const END: &str = "<｜end▁of▁sentence｜>";
const USER: &str = "<｜User｜>";
const ASSISTANT: &str = "<｜Assistant｜>";

/// What the system message says about tools, around their declarations.
const TOOLS: [&str; 2] = [
    "\n\n## Tools\n\
     You have access to a set of tools you can use to answer the user's question.\n\
     You can invoke functions by writing a \"<｜DSML｜function_calls>\" block like the following as part of your reply to the \
     user:\n\
     <｜DSML｜function_calls>\n\
     <｜DSML｜invoke name=\"$FUNCTION_NAME\">\n\
     <｜DSML｜parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</｜DSML｜parameter>\n\
     ...\n\
     </｜DSML｜invoke>\n\
     <｜DSML｜invoke name=\"$FUNCTION_NAME2\">\n\
     ...\n\
     </｜DSML｜invoke>\n\
     </｜DSML｜function_calls>\n\
     String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
     use JSON format. The \"string\" attribute should be set to \"true\" for string type parameters and \"false\" for other types \
     (numbers, booleans, arrays, objects).\n\
     If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
     Here is an example:\n\
     <｜DSML｜function_calls>\n\
     ...\n\
     </｜DSML｜function_calls>\n\
     <function_results>\n\
     ...\n\
     </function_results>\n\
     <think>...thinking about results</think>\n\
     Here are the functions available in JSONSchema format:\n\
     <functions>\n",
    "\n</functions>\n",
];

/// The prompt of a conversation.
///
/// # Errors
/// Why the messages make no conversation.
pub(crate) fn render(
    messages: &[Value],
    tools: &[Value],
    is_thinking: bool,
    add_generation_prompt: bool,
) -> Result<String, String> {
    let mut conversation = Prompt { messages: messages.iter().collect(), text: BEGIN.to_owned(), is_thinking };
    if is_thinking {
        // Words to the model that came before the last question are dropped together with its earlier reasoning.
        let last = conversation.last_question();
        let kept = |(i, message): &(usize, &Value)| {
            Some(*i) >= last || ["user", "system", "tool", "assistant"].contains(&role(message))
        };
        conversation.messages = messages.iter().enumerate().filter(kept).map(|(_, message)| message).collect();
    }
    if !tools.is_empty() && messages.first().is_none_or(|message| role(message) != "system") {
        conversation.tools(tools)?;
    }
    for i in 0..conversation.messages.len() {
        let shown = if i == 0 { tools } else { &[] };
        conversation.message(i, shown, add_generation_prompt || i + 1 < conversation.messages.len())?;
    }
    Ok(conversation.text)
}

fn role(message: &Value) -> &str {
    message["role"].as_str().unwrap_or_default()
}

/// The text of a message; of a list of parts, those that are text.
fn content(message: &Value) -> String {
    match &message["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts = parts.iter().filter_map(|part| part.as_str().or_else(|| part["text"].as_str()));
            texts.collect::<Vec<_>>().join(" ")
        }
        _ => String::new(),
    }
}

/// A value as JSON; nothing where there is none.
fn dumps(value: &Value) -> Result<String, String> {
    json_dumps(value).map_err(|error| error.to_string())
}

/// What a program would take for something: no null, no empty text or list.
fn is_some(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

struct Prompt<'a> {
    messages: Vec<&'a Value>,
    text: String,
    is_thinking: bool,
}

impl Prompt<'_> {
    /// Where the last turn begins.
    fn last_question(&self) -> Option<usize> {
        self.messages.iter().rposition(|message| ["user", "developer"].contains(&role(message)))
    }

    fn message(&mut self, i: usize, tools: &[Value], adds_prompt: bool) -> Result<(), String> {
        let message = self.messages[i];
        match role(message) {
            "system" => {
                self.text.push_str(&content(message));
                self.extras(message, tools)
            }
            "user" => {
                self.text.extend([USER, &content(message)]);
                self.assistant(i, adds_prompt);
                Ok(())
            }
            "developer" => {
                let content = content(message);
                if content.is_empty() {
                    return Err("a message of the role developer is empty".to_owned());
                }
                self.text.push_str(USER);
                self.extras(message, &[])?;
                self.text.extend(["\n\n# The user's message is: ", &content]);
                self.assistant(i, adds_prompt);
                Ok(())
            }
            "tool" => self.result(i, adds_prompt),
            "assistant" => self.answer(i),
            other => Err(format!("the role {other:?} is not one of system, developer, user, assistant and tool")),
        }
    }

    /// Declarations of tools and the form of answers, which belong to a system message, or are in its place.
    fn extras(&mut self, message: &Value, tools: &[Value]) -> Result<(), String> {
        let own = message["tools"].as_array().map(Vec::as_slice).unwrap_or_default();
        let tools = if tools.is_empty() { own } else { tools };
        if !tools.is_empty() {
            self.tools(tools)?;
        }
        let format = &message["response_format"];
        if is_some(format) {
            let format = dumps(format)?;
            let words = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";
            self.text.extend([words, &format]);
        }
        Ok(())
    }

    fn tools(&mut self, tools: &[Value]) -> Result<(), String> {
        let tools: Result<Vec<String>, String> =
            tools.iter().map(|tool| dumps(tool.get("function").unwrap_or(tool))).collect();
        self.text.extend([TOOLS[0], &tools?.join("\n"), TOOLS[1]]);
        Ok(())
    }

    /// Begins the answer to a question.
    fn assistant(&mut self, i: usize, adds_prompt: bool) {
        if adds_prompt {
            let is_open = self.is_thinking && Some(i) == self.last_question();
            self.text.extend([ASSISTANT, if is_open { THINK } else { END_THINK }]);
        }
    }

    fn answer(&mut self, i: usize) -> Result<(), String> {
        let message = self.messages[i];
        if self.is_thinking && Some(i) > self.last_question() {
            self.text.extend([message["reasoning_content"].as_str().unwrap_or_default(), END_THINK]);
        }
        self.text.push_str(&content(message));
        let calls = message["tool_calls"].as_array().map(Vec::as_slice).unwrap_or_default();
        if !calls.is_empty() {
            self.text.extend(["\n\n", LIST, "\n"]);
            for call in calls {
                self.call(call.get("function").unwrap_or(call))?;
            }
            self.text.push_str(END_LIST);
        }
        self.text.push_str(END);
        Ok(())
    }

    fn call(&mut self, call: &Value) -> Result<(), String> {
        let parsed = call["arguments"].as_str().and_then(|text| exact::read(text).ok());
        let arguments = parsed.as_ref().unwrap_or(&call["arguments"]);
        let name = call["name"].as_str().ok_or("a call has no name")?;
        let Value::Object(arguments) = arguments else {
            return Err(format!("the arguments of a call of {name:?} are no JSON object"));
        };
        let mut parameters = vec![];
        for (key, value) in arguments {
            let (is_text, value) = match value {
                Value::String(text) if exact::number(text).is_none() => (true, text.clone()),
                value => (false, dumps(value)?),
            };
            parameters.push(format!("{PARAMETER} name=\"{key}\" string=\"{is_text}\">{value}{END_PARAMETER}"));
        }
        self.text.push_str(&format!("{CALL} name=\"{name}\">\n{}\n{END_CALL}\n", parameters.join("\n")));
        Ok(())
    }

    /// One result of the calls before it, which come in the order of the calls.
    fn result(&mut self, i: usize, adds_prompt: bool) -> Result<(), String> {
        let before = self.messages[..i].iter().rposition(|message| role(message) != "tool");
        let caller = before.filter(|before| role(self.messages[*before]) == "assistant");
        let n_calls = caller.and_then(|at| self.messages[at]["tool_calls"].as_array()).map_or(0, Vec::len);
        let nth = i - before.map_or(0, |before| before + 1) + 1;
        if nth > n_calls {
            return Err(format!("the result of a tool (message {i}) follows no call of the assistant"));
        }
        if nth == 1 {
            self.text.push_str("\n\n<function_results>");
        }
        self.text.extend(["\n<result>", &content(self.messages[i]), "</result>"]);
        if nth == n_calls {
            self.text.push_str("\n</function_results>");
            if adds_prompt {
                let is_open = self.is_thinking && Some(i) >= self.last_question();
                self.text.extend(["\n\n", if is_open { THINK } else { END_THINK }]);
            }
        }
        Ok(())
    }
}
