//! A conversation with a model, for programs that want no more than that.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::AtomicBool;

use tandem_core::ModelConfig;
use tandem_text::Delta;

use crate::conversation::{Conversation, ConversationOptions};
use crate::load::{LogitsRows, load};
use crate::model_dir::model_dir;
use crate::news::OnNews;
use crate::options::{LoadOptions, ModelOptions};
use crate::ranks::Joined;
use crate::session::{Session, Step};

/// A [`Session`] whose questions and answers are texts. Its [`Conversation`] has the messages and how answers are sampled.
///
/// ```no_run
/// use tandem_runtime::{Chat, ModelOptions, ignore_news};
///
/// let mut chat = Chat::open(&ModelOptions::new("models/fable-30m-MXFP4-Q8"), None, &mut ignore_news)?;
/// let answer = chat.say("Tell me a story about a fox.", |delta| println!("{delta:?}"))?;
/// assert!(!answer.is_empty());
/// # Ok::<(), anyhow::Error>(())
/// ```
pub struct Chat(Session);

impl Chat {
    /// Loads a model; as rank 0 of several if `joined` leads to others.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub fn open(options: &ModelOptions, joined: Option<Joined>, on_news: OnNews<'_>) -> anyhow::Result<Chat> {
        let dir = model_dir(options.model.as_deref())?;
        let config = ModelConfig::load(&dir)?;
        let conversation = Conversation::new(&ConversationOptions::default(), &dir, config.vocab_size)?;
        let loaded = load(options, LoadOptions::one_sequence(LogitsRows::One), joined, on_news)?;
        Ok(Chat(Session::new(loaded, conversation)))
    }

    /// Says something, passes the answer on as it is written, and returns its text. The turns before are in the cache.
    ///
    /// # Errors
    /// The model has no chat template or it refuses the conversation, it does not fit the context, or the device failed.
    pub fn say(&mut self, text: &str, mut on_delta: impl FnMut(&Delta)) -> anyhow::Result<String> {
        self.conversation.say(text);
        let answer = self.answer(&AtomicBool::new(false), &mut |step| {
            if let Step::Delta(delta) = step {
                on_delta(delta);
            }
        })?;
        Ok(answer.text)
    }
}

impl Deref for Chat {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.0
    }
}

impl DerefMut for Chat {
    fn deref_mut(&mut self) -> &mut Session {
        &mut self.0
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
            chat.conversation.sampling.temperature = Some(0.0);
            let mut streamed = String::new();
            let answer = chat
                .say("What is 47 + 38?", |delta| {
                    if let Delta::Content(text) = delta {
                        streamed.push_str(text);
                    }
                })
                .expect("answers");
            assert_eq!(answer, streamed);
            assert_eq!(chat.conversation.messages.len(), 2);
            answer
        };
        let alone = say(None);
        assert!(alone.starts_with("47 + 38 = "), "{alone}");
        assert_eq!(say(Some(Joined::Threads(2))), alone);
    }
}
