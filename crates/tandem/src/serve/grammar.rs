//! Structured output: grammars over tokens, by llguidance.

use std::sync::Arc;

use anyhow::anyhow;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use tandem_engine::{Constraint, argmax};

use tandem_text::Tokenizer;
use tandem_text::dialect::{Dialect, Function};

/// White space between JSON's tokens, of which a model could otherwise write any amount.
const WHITE_SPACE: &str = r"[\x20\x0A]{0,8}";

/// What an answer is restricted to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Form {
    JsonSchema(Value),
    Regex(String),
    Choice(Vec<String>),
    Lark(String),
    /// One or more calls of these functions.
    Calls {
        functions: Vec<Function>,
        parallel: bool,
    },
}

/// Makes constraints for one model's tokens.
pub(crate) struct Grammars {
    factory: ParserFactory,
    tokenizer: Tokenizer,
    dialect: Dialect,
    eos: Vec<u32>,
}

impl Grammars {
    /// For a model with `vocab_size` logits and these end-of-text tokens.
    ///
    /// # Errors
    /// The vocabulary is of no use to llguidance.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        dialect: Dialect,
        vocab_size: usize,
        eos: &[u32],
    ) -> anyhow::Result<Grammars> {
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                if tokenizer.is_added(id) { [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat() } else { bytes }
            })
            .collect();
        let info = TokRxInfo::new(vocab_size as u32, eos.first().copied().unwrap_or(0));
        let environment = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut factory = ParserFactory::new_simple(&(environment as _))?;
        factory.quiet();
        Ok(Grammars { factory, tokenizer: tokenizer.clone(), dialect, eos: eos.to_vec() })
    }

    /// A constraint for one answer; it lets everything pass up to the end of the reasoning section, if `reasoning` names
    /// what ends it.
    ///
    /// # Errors
    /// The schema, expression or grammar is not valid, or too large.
    pub(crate) fn constraint(&self, form: &Form, reasoning: Option<&str>) -> anyhow::Result<Box<dyn Constraint>> {
        let grammar = match form {
            Form::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_white_space(schema.clone())),
            Form::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Form::Choice(texts) => TopLevelGrammar::from_lark(format!("start: {}", alternatives(texts))),
            Form::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
            Form::Calls { functions, parallel } => self.calls(functions, *parallel),
        };
        let parser = self.factory.create_parser(grammar)?;
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(anyhow!(error));
        }
        // A grammar without any text would only show later.
        matcher.compute_mask_or_eos()?;
        Ok(Box::new(Grammar {
            matcher,
            tokenizer: self.tokenizer.clone(),
            eos: self.eos.clone(),
            reasoning_end: reasoning.map(|end| end.as_bytes().to_vec()),
            tail: vec![],
        }))
    }

    /// Calls as the model's dialect writes them.
    fn calls(&self, functions: &[Function], parallel: bool) -> TopLevelGrammar {
        match self.dialect {
            Dialect::Json => {
                let call = |f: &Function| {
                    json!({
                        "type": "object",
                        "properties": {"name": {"const": f.name}, "parameters": object_schema(&f.parameters)},
                        "required": ["name", "parameters"],
                        "additionalProperties": false,
                    })
                };
                let calls = json!({"anyOf": functions.iter().map(call).collect::<Vec<_>>()});
                let schema = if parallel {
                    json!({"anyOf": [calls, {"type": "array", "items": calls, "minItems": 1}]})
                } else {
                    calls
                };
                TopLevelGrammar::from_json_schema(with_white_space(schema))
            }
            Dialect::Glm => TopLevelGrammar::from_lark(self.glm_calls(functions, parallel)),
        }
    }

    /// Lark grammar of `<tool_call>name<arg_key>..</tool_call>`; required arguments first, in the schema's order.
    fn glm_calls(&self, functions: &[Function], parallel: bool) -> String {
        // A special token is named as it is, other tags are text.
        let tag = |tag: &str| match self.tokenizer.token_to_id(tag) {
            Some(_) => tag.to_owned(),
            None => quoted(tag),
        };
        let mut grammar = format!("start: call{}\ncall: ", if parallel { "+" } else { "" });
        let names: Vec<String> = (0..functions.len()).map(|i| format!("call_{i}")).collect();
        grammar.push_str(&names.join(" | "));
        grammar.push_str("\nTEXT: /(.|\\n)+/\n");
        for (i, function) in functions.iter().enumerate() {
            let mut call = format!("call_{i}: {} {}", tag("<tool_call>"), quoted(&function.name));
            let none = serde_json::Map::new();
            let properties = function.parameters.get("properties").and_then(Value::as_object).unwrap_or(&none);
            let required: Vec<&str> = function
                .parameters
                .get("required")
                .and_then(Value::as_array)
                .map_or_else(Vec::new, |names| names.iter().filter_map(Value::as_str).collect());
            for (key, schema) in properties {
                let value = match (schema.get("type").and_then(Value::as_str), schema.get("enum")) {
                    (_, Some(Value::Array(values))) => {
                        let texts: Vec<String> =
                            values.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
                        format!("({})", alternatives(&texts))
                    }
                    (Some("string") | None, _) => "TEXT".to_owned(),
                    _ => format!("%json {schema}"),
                };
                let argument = format!(
                    "{} {} {} {} {value} {}",
                    tag("<arg_key>"),
                    quoted(key),
                    tag("</arg_key>"),
                    tag("<arg_value>"),
                    tag("</arg_value>")
                );
                let argument = if required.contains(&key.as_str()) { argument } else { format!("({argument})?") };
                call.push(' ');
                call.push_str(&argument);
            }
            grammar.push_str(&format!("{call} {}\n", tag("</tool_call>")));
        }
        grammar
    }
}

fn object_schema(parameters: &Value) -> Value {
    if parameters.as_object().is_none_or(serde_json::Map::is_empty) {
        json!({"type": "object"})
    } else {
        parameters.clone()
    }
}

fn with_white_space(mut schema: Value) -> Value {
    if let Value::Object(map) = &mut schema {
        map.insert("x-guidance".into(), json!({"whitespace_pattern": WHITE_SPACE}));
    }
    schema
}

fn alternatives(texts: &[String]) -> String {
    texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(" | ")
}

/// A Lark string.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// One answer's place in its grammar.
struct Grammar {
    matcher: Matcher,
    tokenizer: Tokenizer,
    eos: Vec<u32>,
    /// What ends the reasoning section, until it has come.
    reasoning_end: Option<Vec<u8>>,
    /// The last bytes of the reasoning.
    tail: Vec<u8>,
}

impl Constraint for Grammar {
    fn mask(&mut self, logits: &mut [f32]) {
        let ends: Vec<(u32, f32)> =
            self.eos.iter().filter_map(|id| logits.get(*id as usize).map(|logit| (*id, *logit))).collect();
        if let Some(end) = &self.reasoning_end {
            // An end here would be an empty answer: where the model wants one, the reasoning ends instead.
            let wants_end = argmax(logits).is_ok_and(|id| self.eos.contains(&id));
            let end = std::str::from_utf8(end).ok().and_then(|end| self.tokenizer.token_to_id(end));
            for (id, _) in ends {
                logits[id as usize] = f32::NEG_INFINITY;
            }
            if let (true, Some(end)) = (wants_end, end) {
                logits.fill(f32::NEG_INFINITY);
                logits[end as usize] = 0.0;
            }
            return;
        }
        let Ok(mask) = self.matcher.compute_mask_or_eos() else {
            // Only the end is left.
            logits.fill(f32::NEG_INFINITY);
            for (id, logit) in ends {
                logits[id as usize] = logit;
            }
            return;
        };
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= mask.len() || !mask.get(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        // The grammar knows one end token, the model may prefer another.
        if self.eos.iter().any(|id| (*id as usize) < mask.len() && mask.get(*id as usize)) {
            for (id, logit) in ends {
                logits[id as usize] = logit;
            }
        }
    }

    fn accept(&mut self, token: u32) -> bool {
        if let Some(end) = &self.reasoning_end {
            self.tail.extend(self.tokenizer.token_bytes(token).unwrap_or_default());
            if self.tail.ends_with(end) {
                self.reasoning_end = None;
            }
            let keep = self.tail.len().min(64);
            self.tail.drain(..self.tail.len() - keep);
            return true;
        }
        self.matcher.consume_token(token).is_ok() && !self.matcher.is_stopped()
    }
}
