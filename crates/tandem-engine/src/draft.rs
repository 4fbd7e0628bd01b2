//! Tokens that are proposed before the model has computed them: how many, and where they come from.
//!
//! Verification is the engine's: a step runs a sequence's next token and its drafts as rows, and tokens are sampled row by
//! row as long as they are the drafted ones. Nothing here changes a text, only the number of steps that it takes.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

/// Tokens drafted for a sequence in one step, at most.
pub const MAX_DRAFT_DEPTH: usize = 8;

/// Tokens that an earlier place must share with the end of the text to be continued from.
const MIN_MATCH: usize = 3;
/// Tokens that are compared to find out which of several places shares the most.
const MAX_MATCH: usize = 24;
/// Places that are compared.
const MAX_PLACES: usize = 32;
/// No earlier place.
const NONE: u32 = u32::MAX;

/// How many tokens are drafted for a sequence in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftDepth {
    /// Whatever is fastest, as far as measured times and acceptance tell; none if that is.
    Auto,
    /// This number, up to [`MAX_DRAFT_DEPTH`], wherever there are drafts; 0 is off.
    Fixed(usize),
}

impl DraftDepth {
    /// No drafts.
    pub const OFF: DraftDepth = DraftDepth::Fixed(0);

    /// Drafts of one sequence in one step, at most.
    pub fn most(self) -> usize {
        match self {
            DraftDepth::Auto => MAX_DRAFT_DEPTH,
            DraftDepth::Fixed(depth) => depth.min(MAX_DRAFT_DEPTH),
        }
    }
}

impl FromStr for DraftDepth {
    type Err = String;

    fn from_str(text: &str) -> Result<DraftDepth, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(DraftDepth::Auto),
            (_, Ok(depth)) if depth <= MAX_DRAFT_DEPTH => Ok(DraftDepth::Fixed(depth)),
            _ => Err(format!("expected auto, or a whole number from 0 (off) to {MAX_DRAFT_DEPTH}")),
        }
    }
}

impl fmt::Display for DraftDepth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DraftDepth::Auto => f.write_str("auto"),
            DraftDepth::Fixed(depth) => write!(f, "{depth}"),
        }
    }
}

/// Drafts of one source, and how far they were right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftCounts {
    /// Steps of a sequence that had drafts.
    pub drafts: u64,
    /// Tokens drafted.
    pub tokens: u64,
    /// Drafts by position that were what the model then sampled.
    pub accepted: [u64; MAX_DRAFT_DEPTH],
}

impl DraftCounts {
    /// Tokens drafted that were right.
    pub fn accepted_tokens(&self) -> u64 {
        self.accepted.iter().sum()
    }

    /// Counts a draft of `n` tokens, the first `n_accepted` of which were right.
    pub(crate) fn add(&mut self, n: usize, n_accepted: usize) {
        self.drafts += 1;
        self.tokens += n as u64;
        self.accepted[..n_accepted].iter_mut().for_each(|count| *count += 1);
    }
}

impl std::ops::Sub for DraftCounts {
    type Output = DraftCounts;

    fn sub(self, earlier: DraftCounts) -> DraftCounts {
        DraftCounts {
            drafts: self.drafts - earlier.drafts,
            tokens: self.tokens - earlier.tokens,
            accepted: std::array::from_fn(|i| self.accepted[i] - earlier.accepted[i]),
        }
    }
}

impl std::ops::Add for DraftCounts {
    type Output = DraftCounts;

    fn add(self, other: DraftCounts) -> DraftCounts {
        DraftCounts {
            drafts: self.drafts + other.drafts,
            tokens: self.tokens + other.tokens,
            accepted: std::array::from_fn(|i| self.accepted[i] + other.accepted[i]),
        }
    }
}

/// Where a sequence's tokens have occurred before.
#[derive(Debug, Default)]
pub(crate) struct NgramIndex {
    /// Start of the latest run of these tokens that another token follows.
    latest: HashMap<[u32; MIN_MATCH], u32>,
    /// By start of a run, the start of the same run before it, or [`NONE`].
    earlier: Vec<u32>,
}

impl NgramIndex {
    /// Up to `depth` tokens that followed the place most like the end of `tokens`, and the number of tokens that both
    /// share (up to [`MAX_MATCH`]). `tokens` begins with those of the call before.
    pub(crate) fn propose(&mut self, tokens: &[u32], depth: usize) -> Option<(Vec<u32>, usize)> {
        let run_at = |start: usize| tokens.get(start..)?.first_chunk::<MIN_MATCH>().copied();
        while self.earlier.len() + MIN_MATCH < tokens.len()
            && let Some(run) = run_at(self.earlier.len())
        {
            let earlier = self.latest.insert(run, self.earlier.len() as u32);
            self.earlier.push(earlier.unwrap_or(NONE));
        }
        let last = tokens.last_chunk::<MIN_MATCH>()?;
        let mut start = *self.latest.get(last)?;
        let (mut best, mut best_length) = (0, 0);
        for _ in 0..MAX_PLACES {
            let end = start as usize + MIN_MATCH;
            let pairs = tokens[..end].iter().rev().zip(tokens.iter().rev());
            let length = pairs.take(MAX_MATCH).take_while(|(a, b)| a == b).count();
            if length > best_length {
                (best, best_length) = (end, length);
            }
            start = self.earlier[start as usize];
            if start == NONE || best_length == MAX_MATCH {
                break;
            }
        }
        let mut drafts: Vec<u32> = vec![];
        for i in best..best + depth {
            // A text that repeats itself goes on with what was drafted.
            drafts.push(tokens.get(i).copied().unwrap_or_else(|| drafts[i - tokens.len()]));
        }
        (depth > 0).then_some((drafts, best_length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn depths_are_read_and_refused() {
        for (text, expected) in
            [("auto", Some(DraftDepth::Auto)), ("0", Some(DraftDepth::OFF)), ("8", Some(DraftDepth::Fixed(8)))]
        {
            assert_eq!(text.parse().ok(), expected);
            assert_eq!(expected.map(|depth| depth.to_string()).as_deref(), Some(text));
        }
        for text in ["9", "-1", "", "Auto", "x", "1.5", "99999999999999999999"] {
            let error = text.parse::<DraftDepth>().unwrap_err();
            assert!(error.contains("from 0 (off) to 8"), "{error}");
        }
    }

    #[test]
    fn the_longest_and_latest_place_is_continued() {
        let check = |tokens: &[u32], depth: usize, expected: Option<(&[u32], usize)>| {
            let found = NgramIndex::default().propose(tokens, depth);
            assert_eq!(found, expected.map(|(tokens, length)| (tokens.to_vec(), length)), "{tokens:?}");
        };
        check(&[], 2, None);
        check(&[1, 2], 2, None);
        check(&[1, 2, 3, 4, 5], 2, None);
        check(&[1, 2, 3, 4, 5, 1, 2, 3], 2, Some((&[4, 5], 3)));
        check(&[1, 2, 3, 4, 5, 1, 2, 3], 0, None);
        // Two places: the later one, but for a longer match.
        check(&[1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 1, Some((&[8], 3)));
        check(&[6, 1, 2, 3, 7, 5, 1, 2, 3, 8, 6, 1, 2, 3], 1, Some((&[7], 4)));
        // It overlaps with the end.
        check(&[1, 2, 1, 2, 1, 2], 5, Some((&[1, 2, 1, 2, 1], 4)));
        check(&[9, 9, 9, 9], 3, Some((&[9, 9, 9], 3)));
    }

    proptest! {
        /// Whatever is built up token by token is as if built at once, and continues a real match.
        #[test]
        fn an_index_grows_with_its_text(tokens in prop::collection::vec(0u32..4, 0..60), depth in 1usize..9) {
            let mut index = NgramIndex::default();
            for n in 0..=tokens.len() {
                let text = &tokens[..n];
                let grown = index.propose(text, depth);
                prop_assert_eq!(&grown, &NgramIndex::default().propose(text, depth));
                let Some((drafts, length)) = grown else { continue };
                prop_assert!(drafts.len() == depth && length >= MIN_MATCH);
                let end = &text[n - length..];
                prop_assert!((length..n).any(|at| text[at - length..at] == *end && text[at] == drafts[0]));
            }
        }
    }
}
