//! What was said, and how it becomes a prompt. Needs a model's small files only.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tandem_engine::{GenerationConfig, SamplingOverrides, SamplingParams, check_vocabulary};
use tandem_text::{
    AnswerStream, ChatFormat, Dialect, Function, Prompt, Reasoning, Tokenizer, ends_of_turn, prompt, stop_tokens,
    template_call,
};

/// What a chat begins with.
#[derive(Clone, Debug, Default)]
pub struct ConversationOptions {
    /// System message.
    pub system: Option<String>,
    /// The prompt is the last message as it stands, without the chat template.
    pub raw: bool,
    /// Chat template to use instead of the model's.
    pub chat_template: Option<PathBuf>,
    /// The chat format to use in place of that which the checkpoint says.
    pub chat_format: Option<Dialect>,
    /// How much the model should think first; what is not said is the template's choice.
    pub thinking: Reasoning,
    /// JSON file with an array of tools in OpenAI's form.
    pub tools: Option<PathBuf>,
    /// Tokens of an answer at most; the model's own limit if `None`.
    pub max_tokens: Option<usize>,
    /// What differs from the model's defaults.
    pub sampling: SamplingOverrides,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Go on after an end-of-text token.
    pub ignore_eos: bool,
}

/// The messages of a chat, and everything that their prompt depends on.
pub struct Conversation {
    /// In the form of chat templates.
    pub messages: Vec<Value>,
    /// OpenAI's form.
    pub tools: Vec<Value>,
    /// What differs from the model's defaults.
    pub sampling: SamplingOverrides,
    /// Tokens of an answer at most; the rest of the context if `None`.
    pub max_tokens: Option<usize>,
    /// How much the model should think first; what is not said is the template's choice.
    pub thinking: Reasoning,
    stops: Vec<String>,
    raw: bool,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    tokenizer: Tokenizer,
    format: ChatFormat,
    defaults: GenerationConfig,
    /// Directory of the model, for messages.
    pub model: String,
}

impl Conversation {
    /// Nothing is said yet.
    ///
    /// # Errors
    /// A file is missing or malformed, or a flag is outside its range.
    pub fn new(options: &ConversationOptions, dir: &Path, vocab_size: usize) -> anyhow::Result<Conversation> {
        let defaults = GenerationConfig::load(dir)?;
        let tokenizer = Tokenizer::from_dir(dir)?;
        let format = ChatFormat::from_dir(dir, options.chat_template.as_deref(), options.chat_format, |token| {
            tokenizer.has_token(token)
        })?;
        check_vocabulary(&defaults.eos_token_ids, vocab_size).context("eos_token_id")?;
        let mut eos = match options.ignore_eos {
            true => vec![],
            false => ends_of_turn(&defaults.eos_token_ids, &tokenizer, format.template.as_ref(), vocab_size),
        };
        eos.extend(stop_tokens(&options.stop, &tokenizer));
        let conversation = Conversation {
            messages: system_message(options.system.as_deref()),
            tools: options.tools.as_deref().map(read_tools).transpose()?.unwrap_or_default(),
            sampling: options.sampling.clone(),
            max_tokens: options.max_tokens.or(defaults.max_new_tokens.map(|n| n as usize)),
            thinking: options.thinking,
            stops: options.stop.clone(),
            raw: options.raw,
            eos,
            tokenizer,
            format,
            defaults,
            model: dir.display().to_string(),
        };
        conversation.sampling()?;
        Ok(conversation)
    }

    /// The model's defaults with [`Conversation::sampling`] on top.
    ///
    /// # Errors
    /// A value is outside its range.
    pub fn sampling(&self) -> anyhow::Result<SamplingParams> {
        let params = self.defaults.apply(&self.sampling);
        params.validate()?;
        Ok(params)
    }

    /// Adds what the user says.
    pub fn say(&mut self, text: &str) {
        self.messages.push(json!({"role": "user", "content": text}));
    }

    /// The messages as the model reads them; the last message alone, as it stands, under `--raw`.
    ///
    /// # Errors
    /// There is no template, or it refuses the messages.
    pub fn prompt(&self) -> anyhow::Result<Prompt> {
        if self.raw {
            let text = self.messages.last().and_then(|m| m["content"].as_str()).unwrap_or_default().to_owned();
            return Ok(Prompt { ids: self.tokenizer.encode(&text, true)?, text, in_reasoning: false });
        }
        let Some(template) = &self.format.template else {
            bail!(
                "{} has no chat template; pass the prompt as it stands with --raw, or a template with --chat-template FILE",
                self.model
            );
        };
        // Templates may refuse to begin without a message of the user.
        if !self.messages.iter().any(|m| m["role"] == "user") {
            return Ok(Prompt::default());
        }
        let (extra, _) = template.reasoning().variables(self.thinking);
        let tools = (!self.tools.is_empty()).then_some(&self.tools[..]);
        Ok(prompt(template, &self.tokenizer, &self.messages, tools, &extra)?)
    }

    /// What the chat template cannot be told of [`Conversation::thinking`].
    pub fn notes(&self) -> Vec<String> {
        let template = self.format.template.as_ref().filter(|_| !self.raw);
        template.map(|template| template.reasoning().variables(self.thinking).1).unwrap_or_default()
    }

    /// Takes the answer to a prompt apart.
    pub fn stream(&self, prompt: &Prompt) -> AnswerStream {
        if self.raw {
            return AnswerStream::plain(&self.tokenizer, self.stops.clone());
        }
        let functions = self.tools.iter().filter_map(Function::of_tool).collect();
        AnswerStream::chat(&self.tokenizer, self.format.dialect, functions, prompt.in_reasoning, self.stops.clone())
    }

    /// Forgets everything, and begins with a system message if there is one.
    pub fn restart(&mut self, system: Option<&str>) {
        self.messages = system_message(system);
    }

    /// The system message.
    pub fn system(&self) -> Option<String> {
        self.messages.first().filter(|m| m["role"] == "system").and_then(|m| m["content"].as_str()).map(str::to_owned)
    }

    /// Takes the answer to the last message of the user away, so that it can be answered again; false if there is none.
    pub fn forget_answer(&mut self) -> bool {
        let last = self.messages.iter().rposition(|m| m["role"] == "user");
        self.messages.truncate(last.map_or(self.messages.len(), |i| i + 1));
        last.is_some()
    }

    /// Takes the last message of the user and its answer away; false if there is none.
    pub fn undo(&mut self) -> bool {
        let found = self.forget_answer();
        if found {
            self.messages.pop();
        }
        found
    }

    /// Forgets the oldest turn, but not the last one; false if there is only one.
    pub fn drop_oldest(&mut self) -> bool {
        let mut turns = self.messages.iter().enumerate().filter(|(_, m)| m["role"] == "user").map(|(i, _)| i);
        let (Some(first), Some(second)) = (turns.next(), turns.next()) else { return false };
        self.messages.drain(first..second);
        true
    }

    /// Adds the result of the first call of the last answer that has none yet; returns how many are left.
    ///
    /// # Errors
    /// No call waits for a result.
    pub fn add_result(&mut self, text: &str) -> anyhow::Result<usize> {
        let last = self.messages.iter().rposition(|m| m["role"] != "tool");
        let calls = last.and_then(|i| Some((i, self.messages[i]["tool_calls"].as_array()?)));
        let (n_results, calls) = calls.map_or((0, &[][..]), |(i, calls)| (self.messages.len() - 1 - i, &calls[..]));
        let Some(call) = calls.get(n_results) else { bail!("the model has called no tool that waits for a result") };
        let (id, n_left) = (call["id"].clone(), calls.len() - n_results - 1);
        self.messages.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
        Ok(n_left)
    }

    /// Reads declarations of tools.
    ///
    /// # Errors
    /// The file is not an array of tools.
    pub fn load_tools(&mut self, path: &Path) -> anyhow::Result<()> {
        self.tools = read_tools(path)?;
        Ok(())
    }

    /// Writes the messages, in OpenAI's form.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let messages: Vec<Value> = self.messages.iter().map(openai_message).collect();
        let text = serde_json::to_string_pretty(&json!({"messages": messages, "tools": self.tools}))?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads messages that [`Conversation::save`] or another client of OpenAI's interface wrote.
    ///
    /// # Errors
    /// The file is not a conversation.
    pub fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let form =
            || format!("{} is not a conversation, {{\"messages\": [{{\"role\", \"content\"}}, ..]}}", path.display());
        let value: Value = serde_json::from_str(&text).with_context(form)?;
        let messages = value.get("messages").unwrap_or(&value).as_array().with_context(form)?;
        let roles = ["system", "user", "assistant", "tool"];
        let is_message =
            |m: &&Value| m["role"].as_str().is_some_and(|role| roles.contains(&role)) && !m["content"].is_object();
        ensure!(messages.iter().filter(is_message).count() == messages.len(), form());
        self.messages = messages.iter().map(template_message).collect();
        if let Some(tools) = value["tools"].as_array() {
            self.tools = tools.clone();
        }
        Ok(())
    }
}

fn system_message(text: Option<&str>) -> Vec<Value> {
    text.map(|content| json!({"role": "system", "content": content})).into_iter().collect()
}

fn read_tools(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let form = || format!("{} must be a JSON array of tools, [{{\"type\": \"function\", ...}}]", path.display());
    let tools: Vec<Value> = serde_json::from_str(&text).with_context(form)?;
    if let Some(i) = tools.iter().position(|tool| Function::of_tool(tool).is_none()) {
        bail!("{}; entry {i} declares no function with a name", form());
    }
    Ok(tools)
}

/// A call in OpenAI's form, with arguments as text.
pub fn openai_call(call: &Value) -> Value {
    let mut call = call.clone();
    if !call["function"]["arguments"].is_string() {
        call["function"]["arguments"] = json!(call["function"]["arguments"].to_string());
    }
    call
}

fn openai_message(message: &Value) -> Value {
    let mut message = message.clone();
    if let Some(calls) = message["tool_calls"].as_array() {
        message["tool_calls"] = calls.iter().map(openai_call).collect();
    }
    message
}

fn template_message(message: &Value) -> Value {
    let mut message = message.clone();
    if let Some(calls) = message.get("tool_calls").and_then(Value::as_array) {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let call = |call: &Value| {
            let function = &call["function"];
            template_call(&text(&call["id"]), &text(&function["name"]), &text(&function["arguments"]))
        };
        message["tool_calls"] = calls.iter().map(call).collect();
    }
    if message["content"].is_null() {
        message["content"] = json!("");
    }
    message
}
