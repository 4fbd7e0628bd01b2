//! Text in and out: the tokenizer, incremental decoding, stop strings and chat templates.
//!
//! Nothing here knows about sequences, scheduling or HTTP.

pub(crate) mod chat_template;
pub(crate) mod prompt;
pub(crate) mod tokenizer;
