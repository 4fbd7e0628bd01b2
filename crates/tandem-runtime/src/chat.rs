//! A conversation with a model, for programs that want no more than that.

use std::ops::ControlFlow;

use anyhow::Context;
use serde_json::{Map, Value, json};
use tandem_engine::{FinishReason, GenerationConfig, Request, SamplingOverrides, check_vocabulary};
use tandem_text::{AnswerStream, ChatTemplate, Delta, Dialect, Tokenizer, ends_of_turn, prompt};

use crate::load::{Loaded, LogitsRows, load};
use crate::news::OnNews;
use crate::options::{LoadOptions, ModelOptions};
use crate::ranks::Joined;

/// A model, its texts and one conversation.
///
/// ```no_run
/// use tandem_runtime::{Chat, ModelOptions, ignore_news};
///
/// let mut chat = Chat::open(&ModelOptions::new("models/fable-30m-MXFP4-Q8"), None, &mut ignore_news)?;
/// let answer = chat.say("Tell me a story about a fox.", |delta| println!("{delta:?}"))?;
/// assert!(!answer.is_empty());
/// # Ok::<(), anyhow::Error>(())
/// ```
pub struct Chat {
    loaded: Loaded,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    defaults: GenerationConfig,
    /// What is sampled otherwise than the model's generation_config.json says.
    pub sampling: SamplingOverrides,
    /// The conversation so far, in OpenAI's form.
    pub messages: Vec<Value>,
}

impl Chat {
    /// Loads a model; as rank 0 of several if `joined` leads to others.
    ///
    /// # Errors
    /// It cannot be loaded, or has no chat template.
    pub fn open(options: &ModelOptions, joined: Option<Joined>, on_news: OnNews<'_>) -> anyhow::Result<Chat> {
        let loaded = load(options, LoadOptions::one_sequence(LogitsRows::One), joined, on_news)?;
        let tokenizer = Tokenizer::from_dir(&loaded.dir)?;
        let template = ChatTemplate::from_dir(&loaded.dir, None)?.context("the model has no chat template")?;
        let mut defaults = GenerationConfig::load(&loaded.dir)?;
        let vocab_size = loaded.config.vocab_size;
        check_vocabulary(&defaults.eos_token_ids, vocab_size).context("eos_token_id")?;
        defaults.eos_token_ids = ends_of_turn(&defaults.eos_token_ids, &tokenizer, Some(&template), vocab_size);
        Ok(Chat { tokenizer, template, defaults, loaded, sampling: SamplingOverrides::default(), messages: vec![] })
    }

    /// Says something, passes the answer on as it is written, and returns its text. The turns before are in the cache.
    ///
    /// # Errors
    /// The template refuses the conversation, it does not fit the context, or the device failed.
    pub fn say(&mut self, text: &str, mut on_delta: impl FnMut(&Delta)) -> anyhow::Result<String> {
        self.messages.push(json!({"role": "user", "content": text}));
        let prompt = prompt(&self.template, &self.tokenizer, &self.messages, None, &Map::new())?;
        let dialect = Dialect::of_template(self.template.source());
        let mut stream = AnswerStream::chat(&self.tokenizer, dialect, vec![], prompt.in_reasoning, vec![]);
        let mut answer = String::new();
        let mut take = |deltas: Vec<Delta>| {
            for delta in deltas {
                on_delta(&delta);
                if let Delta::Content(text) = delta {
                    answer.push_str(&text);
                }
            }
        };
        let request = Request {
            prompt: prompt.ids,
            sampling: self.defaults.apply(&self.sampling),
            max_tokens: self.defaults.max_new_tokens.map_or(usize::MAX, |n| n as usize),
            eos: self.defaults.eos_token_ids.clone(),
            ..Request::default()
        };
        let mut failure = None;
        let generated = self.loaded.engine.generate(request, |token| match stream.push(token) {
            Ok(piece) => {
                take(piece.deltas);
                ControlFlow::Continue(())
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        })?;
        if let Some(error) = failure {
            return Err(error.into());
        }
        take(stream.finish(generated.finish_reason == FinishReason::Length)?.0);
        self.messages.push(json!({"role": "assistant", "content": answer}));
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::news::ignore_news;

    /// One rank and two threads of a pipeline say the same, and the second turn knows the first.
    #[test]
    fn ranks_in_threads_say_the_same() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8");
        let options = ModelOptions { context: Some(512), ..ModelOptions::new(model) };
        let say = |joined| {
            let mut chat = Chat::open(&options, joined, &mut ignore_news).expect("loads");
            chat.sampling.temperature = Some(0.0);
            let mut streamed = String::new();
            let answer = chat
                .say("What is 47 + 38?", |delta| {
                    if let Delta::Content(text) = delta {
                        streamed.push_str(text);
                    }
                })
                .expect("answers");
            assert_eq!(answer, streamed);
            assert_eq!(chat.messages.len(), 2);
            answer
        };
        let alone = say(None);
        assert!(alone.starts_with("47 + 38 = "), "{alone}");
        assert_eq!(say(Some(Joined::Threads(2))), alone);
    }
}
