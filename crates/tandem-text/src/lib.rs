//! Text in and out of a language model: tokenizers, chat templates, and answers taken apart while they are written.
//!
//! Knows no model, no scheduling and no HTTP: token ids go in and come out. [`Tokenizer`] and [`ChatFormat`] read a model
//! directory; [`AnswerStream`] takes an answer's tokens and gives reasoning, text and tool calls.

mod answer;
mod chat_format;
pub mod chat_template;
pub mod dialect;
mod ends;
pub mod exact;
mod jinja;
mod prompt;
mod reasoning;
pub mod schema;
mod stop;
pub mod tokenizer;

pub use answer::{AnswerPiece, AnswerStream, FinishedBy};
pub use chat_format::ChatFormat;
pub use chat_template::{ChatTemplate, TemplateError};
pub use dialect::{Delta, Dialect, Function};
pub use ends::{ends_by_name, ends_of_turn, stop_tokens};
pub use prompt::{Prompt, PromptError, Rendered, TemplateInput, prompt, render, template_call};
pub use reasoning::{Effort, Reasoning, ReasoningControls};
pub use stop::{StopMatcher, StopStep};
pub use tokenizer::{DecodeStream, Tokenizer, TokenizerError};
