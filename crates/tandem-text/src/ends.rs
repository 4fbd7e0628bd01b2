//! Which tokens end an answer.

use serde_json::{Map, json};

use crate::chat_template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Special tokens that end a turn by their name, whatever a configuration says.
const ENDS: [&str; 12] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "[EOT]",
];

/// What stands for an answer when a template is asked how it ends one.
const ANSWER: &str = "qzjx";

/// Every token below `vocab_size` that ends a turn: those that the model's files `configured`, the tokenizer's own
/// `eos_token`, the special token that the template writes after an answer, and special tokens known by name. One rule
/// for all sources, because each of them leaves some out.
pub fn ends_of_turn(
    configured: &[u32],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    vocab_size: usize,
) -> Vec<u32> {
    let mut ends = configured.to_vec();
    ends.extend(tokenizer.eos());
    ends.extend(template.and_then(|template| written_after_an_answer(template, tokenizer)));
    let special = |name: &str| tokenizer.token_to_id(name).filter(|id| tokenizer.is_special(*id));
    ends.extend(ends_by_name(|name| special(name).is_some()).into_iter().filter_map(special));
    let mut seen = std::collections::HashSet::new();
    ends.retain(|id| (*id as usize) < vocab_size && seen.insert(*id));
    ends
}

/// Names of the tokens in a vocabulary that end a turn whatever its files say.
pub fn ends_by_name(has: impl Fn(&str) -> bool) -> Vec<&'static str> {
    // Harmony ends each message of a turn with <|end|>, and the turn with one of the others.
    let is_harmony = has("<|return|>") && has("<|call|>");
    ENDS.into_iter().filter(|name| has(name) && (!is_harmony || *name != "<|end|>")).collect()
}

/// Stop strings that are one special token: it has no text that could be found, so its id ends the answer.
pub fn stop_tokens(stops: &[String], tokenizer: &Tokenizer) -> Vec<u32> {
    let id = |stop: &String| tokenizer.token_to_id(stop.trim()).filter(|id| tokenizer.is_added(*id));
    stops.iter().filter_map(id).collect()
}

fn written_after_an_answer(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<u32> {
    let messages = [json!({"role": "user", "content": "hi"}), json!({"role": "assistant", "content": ANSWER})];
    let text = template.render(&messages, None, false, &Map::new()).ok()?;
    let (_, after) = text.rsplit_once(ANSWER)?;
    let first = *tokenizer.encode(after.trim_start(), false).ok()?.first()?;
    (tokenizer.is_added(first) && tokenizer.is_special(first)).then_some(first)
}
