//! What the model said, token by token, so that a conversation which comes back begins with what the cache holds.
//!
//! A client sends an answer back as text, and a template writes it again: other tokens for the same text, or the same call with
//! other spaces. Where a prompt goes on as an earlier one did, up to an answer that says the same as the one given then, that one's
//! tokens take its place. What a template leaves out (reasoning of earlier turns) is not put back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

/// Bytes of answers that are remembered, at most.
const MOST_BYTES: usize = 32 << 20;
/// Answers to one prompt that are remembered.
const MOST_ANSWERS: usize = 8;

/// Names a prompt: its number of tokens and their digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PromptKey(usize, [u8; 32]);

impl PromptKey {
    pub(crate) fn of(prompt: &[u32]) -> PromptKey {
        let mut hasher = Sha256::new();
        add(&mut hasher, prompt);
        PromptKey(prompt.len(), hasher.finalize().into())
    }
}

fn add(hasher: &mut Sha256, tokens: &[u32]) {
    for tokens in tokens.chunks(1024) {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        hasher.update(&bytes);
    }
}

/// The last answers.
#[derive(Debug, Default)]
pub(crate) struct Said(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// Tokens of answers by their prompt, the latest last.
    answers: BTreeMap<PromptKey, Vec<Vec<u32>>>,
    /// Prompts in the order of their answers.
    order: VecDeque<PromptKey>,
    bytes: usize,
}

fn bytes_of(answer: &[u32]) -> usize {
    size_of_val(answer) + size_of::<PromptKey>()
}

impl Kept {
    fn forget(&mut self, key: &PromptKey) {
        if let Some(answers) = self.answers.get_mut(key) {
            self.bytes -= bytes_of(&answers.remove(0));
            if answers.is_empty() {
                self.answers.remove(key);
            }
        }
    }
}

impl Said {
    /// Remembers an answer, without the token that ended it.
    pub(crate) fn put(&self, prompt: PromptKey, answer: Vec<u32>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = kept.answers.get(&prompt).is_some_and(|known| known.contains(&answer));
        if answer.is_empty() || is_known {
            return;
        }
        let known = kept.answers.entry(prompt).or_default();
        let bytes = bytes_of(&answer);
        known.push(answer);
        let is_full = known.len() > MOST_ANSWERS;
        kept.bytes += bytes;
        kept.order.push_back(prompt);
        if is_full {
            kept.forget(&prompt);
            let oldest = kept.order.iter().position(|key| *key == prompt);
            oldest.map(|at| kept.order.remove(at));
        }
        while kept.bytes > MOST_BYTES
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.forget(&oldest);
        }
    }

    /// A prompt with the tokens of earlier answers in the place of `same` ones; an answer reaches up to a token that
    /// `is_end`.
    pub(crate) fn replay(
        &self,
        mut prompt: Vec<u32>,
        is_end: impl Fn(u32) -> bool,
        mut same: impl FnMut(&[u32], &[u32]) -> bool,
    ) -> Vec<u32> {
        let (mut hasher, mut at) = (Sha256::new(), 0);
        loop {
            let length = {
                let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                let next = kept.answers.range(PromptKey(at + 1, [0; 32])..).next();
                next.map(|(PromptKey(length, _), _)| *length).filter(|length| *length < prompt.len())
            };
            let Some(length) = length else { return prompt };
            add(&mut hasher, &prompt[at..length]);
            at = length;
            let answers = {
                let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                kept.answers.get(&PromptKey(length, hasher.clone().finalize().into())).cloned().unwrap_or_default()
            };
            let rest = &prompt[at..];
            let Some(end) = rest.iter().position(|token| is_end(*token)) else { continue };
            let written = &rest[..end];
            if answers.iter().any(|answer| answer == written) {
                continue;
            }
            if let Some(answer) = answers.iter().rev().find(|answer| same(written, answer)) {
                drop(prompt.splice(at..at + end, answer.iter().copied()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_take_the_place_of_the_same_ones() {
        let said = Said::default();
        // 9 ends a turn; tokens are the same if their sums are.
        let replay = |prompt: &[u32]| {
            said.replay(prompt.to_vec(), |token| token == 9, |a, b| a.iter().sum::<u32>() == b.iter().sum::<u32>())
        };
        said.put(PromptKey::of(&[1, 2]), vec![3, 4]);
        said.put(PromptKey::of(&[1, 2, 3, 4, 9, 5]), vec![6, 1, 1]);
        for (prompt, expected) in [
            (&[][..], &[][..]),
            (&[1, 2], &[1, 2]),
            // Written as it was said; as one token; something else; another prompt; not ended.
            (&[1, 2, 3, 4, 9, 5], &[1, 2, 3, 4, 9, 5]),
            (&[1, 2, 7, 9, 5], &[1, 2, 3, 4, 9, 5]),
            (&[1, 2, 8, 9, 5], &[1, 2, 8, 9, 5]),
            (&[2, 2, 7, 9, 5], &[2, 2, 7, 9, 5]),
            (&[1, 2, 7], &[1, 2, 7]),
            // A second turn follows only from the tokens of the first.
            (&[1, 2, 7, 9, 5, 8, 9, 1], &[1, 2, 3, 4, 9, 5, 6, 1, 1, 9, 1]),
            (&[1, 2, 3, 4, 9, 5, 2, 6, 9, 1], &[1, 2, 3, 4, 9, 5, 6, 1, 1, 9, 1]),
        ] {
            assert_eq!(replay(prompt), expected, "{prompt:?}");
        }
        // Several answers to one prompt: the latest that says the same, and not more than a few.
        said.put(PromptKey::of(&[1, 2]), vec![5, 2]);
        assert_eq!(replay(&[1, 2, 7, 9]), [1, 2, 5, 2, 9]);
        for n in 0..20 {
            said.put(PromptKey::of(&[1, 2]), vec![n, 100]);
        }
        let kept = said.0.lock().unwrap();
        assert_eq!(kept.answers[&PromptKey::of(&[1, 2])].len(), MOST_ANSWERS);
        assert_eq!(kept.order.len(), MOST_ANSWERS + 1);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let said = Said::default();
        let long = vec![1; MOST_BYTES / 16];
        for i in 0..10 {
            said.put(PromptKey::of(&[i]), long.clone());
        }
        let kept = said.0.lock().unwrap();
        assert!(kept.bytes <= MOST_BYTES && kept.answers.len() == 3 && kept.order.len() == 3, "{}", kept.bytes);
        assert!(kept.answers.contains_key(&PromptKey::of(&[9])));
    }
}
