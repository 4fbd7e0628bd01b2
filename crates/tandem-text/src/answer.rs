//! An answer while it is written: token ids in; reasoning, text and tool calls out.
//!
//! Owns the order of the stages: ids become text, a dialect takes the text apart, and stop strings are looked for in
//! what the reader gets, so that reasoning, arguments and tags never end an answer.

use crate::dialect::{Delta, Dialect, Function, Parser};
use crate::stop::StopMatcher;
use crate::tokenizer::{DecodeStream, Tokenizer, TokenizerError};

/// What one token added to an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnswerPiece {
    /// In order; may be empty while a character, a tag or a stop string is incomplete.
    pub deltas: Vec<Delta>,
    /// A stop string is complete: the answer ends here, and later tokens add nothing.
    pub stopped: bool,
}

/// Why an answer that its own text ended did so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishedBy {
    /// The model ended its turn.
    EndOfTurn,
    /// This stop string occurred in the text.
    StopString(String),
    /// It calls functions.
    ToolCalls,
    /// It was cut off; a call that was being written has no end.
    Length,
}

/// Takes the tokens of one answer and gives its parts.
#[derive(Debug)]
pub struct AnswerStream {
    tokenizer: Tokenizer,
    decoder: DecodeStream,
    /// `None`: all text is content.
    parser: Option<Parser>,
    stops: StopMatcher,
}

impl AnswerStream {
    /// A stream for plain text: every token that is not special is content.
    pub fn plain(tokenizer: &Tokenizer, stops: Vec<String>) -> AnswerStream {
        AnswerStream {
            tokenizer: tokenizer.clone(),
            decoder: tokenizer.decode_stream(false),
            parser: None,
            stops: StopMatcher::new(stops),
        }
    }

    /// A stream for an assistant's turn that may call `functions`. `in_reasoning`: the prompt has opened the reasoning.
    pub fn chat(
        tokenizer: &Tokenizer,
        dialect: Dialect,
        functions: Vec<Function>,
        in_reasoning: bool,
        stops: Vec<String>,
    ) -> AnswerStream {
        AnswerStream {
            parser: Some(Parser::new(dialect, functions, in_reasoning)),
            ..AnswerStream::plain(tokenizer, stops)
        }
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// The tokenizer cannot decode it.
    pub fn push(&mut self, id: u32) -> Result<AnswerPiece, TokenizerError> {
        if self.stops.stopped().is_some() {
            return Ok(AnswerPiece { deltas: vec![], stopped: true });
        }
        if self.tokenizer.is_special(id) && !self.is_tag(id) {
            return Ok(AnswerPiece::default());
        }
        let text = self.decoder.push(id)?;
        let deltas = self.parse(&text);
        Ok(self.until_stop(deltas))
    }

    /// Ends the answer: what was held back, and why it ended. `cut_off`: the model did not end its turn, so a call that
    /// is being written stays without an end.
    ///
    /// # Errors
    /// The tokenizer cannot decode what is left.
    pub fn finish(&mut self, cut_off: bool) -> Result<(Vec<Delta>, FinishedBy), TokenizerError> {
        let mut deltas = vec![];
        if self.stops.stopped().is_none() {
            let text = self.decoder.flush()?;
            let mut rest = self.parse(&text);
            if let Some(parser) = &mut self.parser {
                rest.extend(parser.finish(cut_off));
            }
            deltas = self.until_stop(rest).deltas;
            let held = self.stops.flush();
            push_content(&mut deltas, held);
        }
        let by = match self.stops.stopped() {
            _ if self.n_calls() > 0 && !cut_off => FinishedBy::ToolCalls,
            Some(which) => FinishedBy::StopString(self.stops.text(which).to_owned()),
            None if cut_off => FinishedBy::Length,
            None => FinishedBy::EndOfTurn,
        };
        Ok((deltas, by))
    }

    /// True while the text is reasoning.
    pub fn in_reasoning(&self) -> bool {
        self.parser.as_ref().is_some_and(Parser::in_reasoning)
    }

    /// Whether a call has begun that is not complete.
    pub fn in_call(&self) -> bool {
        self.parser.as_ref().is_some_and(Parser::in_call)
    }

    /// Complete calls so far.
    pub fn n_calls(&self) -> usize {
        self.parser.as_ref().map_or(0, Parser::n_calls)
    }

    /// Texts that looked like calls, could not be read, and were passed on as content.
    pub fn n_malformed(&self) -> usize {
        self.parser.as_ref().map_or(0, Parser::n_malformed)
    }

    fn is_tag(&self, id: u32) -> bool {
        self.parser.as_ref().zip(self.tokenizer.id_to_token(id)).is_some_and(|(parser, token)| parser.keeps(&token))
    }

    fn parse(&mut self, text: &str) -> Vec<Delta> {
        match &mut self.parser {
            Some(parser) => parser.push(text),
            None if text.is_empty() => vec![],
            None => vec![Delta::Content(text.to_owned())],
        }
    }

    /// Looks for stop strings in the content; what follows one is dropped.
    fn until_stop(&mut self, deltas: Vec<Delta>) -> AnswerPiece {
        let mut piece = AnswerPiece::default();
        for delta in deltas {
            let Delta::Content(text) = delta else {
                // What was held back as a possible beginning of a stop string stands before this.
                let held = self.stops.flush();
                push_content(&mut piece.deltas, held);
                piece.deltas.push(delta);
                continue;
            };
            let step = self.stops.push(&text);
            push_content(&mut piece.deltas, step.text);
            if step.stopped.is_some() {
                piece.stopped = true;
                break;
            }
        }
        piece
    }
}

fn push_content(deltas: &mut Vec<Delta>, text: String) {
    if !text.is_empty() {
        deltas.push(Delta::Content(text));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn fable() -> Tokenizer {
        let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8"));
        Tokenizer::from_dir(dir).expect("the bundled tokenizer")
    }

    fn functions() -> Vec<Function> {
        vec![Function { name: "write".into(), parameters: json!({"properties": {"text": {"type": "string"}}}) }]
    }

    /// Reasoning, content, arguments, and the end of an answer with this text.
    fn answer(text: &str, stops: &[&str], cut_off: bool) -> (String, String, String, FinishedBy) {
        let tokenizer = fable();
        let stops = stops.iter().map(|s| (*s).to_string()).collect();
        let mut stream = AnswerStream::chat(&tokenizer, Dialect::Glm, functions(), false, stops);
        let mut deltas = vec![];
        for id in tokenizer.encode(text, false).expect("encodes") {
            deltas.extend(stream.push(id).expect("decodes").deltas);
        }
        let (rest, by) = stream.finish(cut_off).expect("decodes");
        deltas.extend(rest);
        let (mut reasoning, mut content, mut arguments) = (String::new(), String::new(), String::new());
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => reasoning.push_str(&text),
                Delta::Content(text) => content.push_str(&text),
                Delta::Arguments(text) => arguments.push_str(&text),
                Delta::Call { .. } | Delta::EndCall => {}
            }
        }
        (reasoning, content, arguments, by)
    }

    const CALL: &str = "<tool_call>write<arg_key>text</arg_key><arg_value>one END two</arg_value></tool_call>";

    #[test]
    fn stop_strings_belong_to_the_content() {
        let whole = r#"{"text": "one END two"}"#;
        let end = FinishedBy::StopString("END".to_string());
        let cases: [(&str, &str, &str, &str, FinishedBy); 4] = [
            ("<think>an END here</think>yes END no", "an END here", "yes ", "", end.clone()),
            (&format!("so {CALL}"), "", "so", whole, FinishedBy::ToolCalls),
            ("it is an EN", "", "it is an EN", "", FinishedBy::EndOfTurn),
            ("<think>EN</think>D is no stop", "EN", "D is no stop", "", FinishedBy::EndOfTurn),
        ];
        for (text, reasoning, content, arguments, by) in cases {
            let found = answer(text, &["END"], false);
            let expected = (reasoning.to_string(), content.to_string(), arguments.to_string(), by);
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn a_call_that_was_cut_has_no_end() {
        let (_, _, arguments, by) = answer(&CALL[..CALL.len() - 20], &[], true);
        assert_eq!(by, FinishedBy::Length);
        assert!(serde_json::from_str::<serde_json::Value>(&arguments).is_err(), "{arguments}");
    }
}
