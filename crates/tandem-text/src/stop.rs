//! Stop strings: where an answer ends because of its text.

/// What [`StopMatcher::push`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that can be shown: it holds no part of a stop string.
    pub text: String,
    /// Index of the stop string that ended the text, as passed to [`StopMatcher::new`].
    pub stopped: Option<usize>,
}

/// Finds stop strings in a stream of text pieces, whatever the piece borders.
///
/// The stop string that is complete first wins (the longest of those that end together), so the result does not depend
/// on how the text was cut.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    pending: String,
    stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`; empty strings never match.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, pending: String::new(), stopped: None }
    }

    /// Takes a piece; returns what can be shown now. After a stop every further piece is dropped.
    pub fn push(&mut self, piece: &str) -> StopStep {
        if self.stopped.is_some() {
            return StopStep { text: String::new(), stopped: self.stopped };
        }
        self.pending.push_str(piece);
        let first_match = (self.stops.iter().enumerate())
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(stop_idx, stop)| self.pending.find(stop).map(|start| (start + stop.len(), start, stop_idx)))
            .min();
        if let Some((_, start, stop_idx)) = first_match {
            self.pending.truncate(start);
            self.stopped = Some(stop_idx);
            return StopStep { text: std::mem::take(&mut self.pending), stopped: self.stopped };
        }
        let n_held = self.stops.iter().map(|stop| held_back(&self.pending, stop)).max().unwrap_or(0);
        let held = self.pending.split_off(self.pending.len() - n_held);
        StopStep { text: std::mem::replace(&mut self.pending, held), stopped: None }
    }

    /// Ends the text and returns what was held back as a possible beginning of a stop string.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.pending)
    }

    /// A stop string.
    pub fn text(&self, stop_idx: usize) -> &str {
        &self.stops[stop_idx]
    }

    /// Index of the stop string that was met, if any.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }
}

/// Length of the longest end of `text` that is a proper beginning of `stop`.
pub(crate) fn held_back(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run_stops(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut text: String = pieces.iter().map(|piece| matcher.push(piece).text).collect();
        text.push_str(&matcher.flush());
        (text, matcher.stopped())
    }

    #[test]
    fn stop_strings_across_borders() {
        assert_eq!(run_stops(&["END"], &["abcE", "N", "Dxyz", "more"]), ("abc".into(), Some(0)));
        assert_eq!(run_stops(&["END"], &["abcE", "N"]), ("abcEN".into(), None));
        assert_eq!(run_stops(&["END"], &["EEN", "END"]), ("EEN".into(), Some(0)));
        assert_eq!(run_stops(&["abcd", "bc"], &["xabcd"]), ("xa".into(), Some(1)));
        assert_eq!(run_stops(&["b", "ab"], &["ab"]), ("".into(), Some(1)));
        assert_eq!(run_stops(&["", "\n\n"], &["a\n", "\nb"]), ("a".into(), Some(1)));
        assert_eq!(run_stops(&["日本"], &["x日", "月日", "本"]), ("x日月".into(), Some(0)));
        assert_eq!(run_stops(&[], &["a", "b"]), ("ab".into(), None));
        let mut matcher = StopMatcher::new(vec!["</s>".into()]);
        assert_eq!(matcher.push("a < b"), StopStep { text: "a < b".into(), stopped: None });
        assert_eq!(matcher.push("<").text, "");
    }

    proptest! {
        #[test]
        fn stops_do_not_depend_on_borders(
            text in "[abc]{0,24}", stops in prop::collection::vec("[abc]{0,4}", 0..3),
            cuts in prop::collection::vec(0usize..25, 0..8),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let whole = run_stops(&stops, &[&text]);
            prop_assert_eq!(&run_stops(&stops, &pieces), &whole);
            prop_assert!(stops.iter().all(|stop| stop.is_empty() || !whole.0.contains(stop)));
            prop_assert!(whole.1.is_some() || whole.0 == text);
        }
    }
}
