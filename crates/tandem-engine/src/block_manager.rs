//! Pages of the key-value cache: who owns which, and what the others still hold.
//!
//! A page is free (nothing in it), owned by one or more sequences, or idle: nobody owns it, but its vectors are kept for
//! the next prompt that begins with the same tokens. Idle pages are reused when free ones run out, the least recently
//! used first. A page is known by the hash of all tokens up to its end, so that equal hashes mean equal contents.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};
use tandem_core::backend::PAGE_SIZE;

/// Hash of all tokens of a sequence up to the end of a page.
pub type PageHash = [u8; 32];

/// What comes before the first page.
pub(crate) const ROOT: PageHash = [0; 32];

/// The hash of the page that holds `tokens` and follows the page `parent`.
pub(crate) fn page_hash(parent: &PageHash, tokens: &[u32]) -> PageHash {
    let mut hasher = Sha256::new();
    hasher.update(parent);
    for token in tokens {
        hasher.update(token.to_le_bytes());
    }
    hasher.finalize().into()
}

/// What a page is known to hold.
#[derive(Debug)]
struct Contents {
    parent: PageHash,
    /// Full pages only; nothing follows a partly filled page.
    hash: Option<PageHash>,
    /// `[1..=PAGE_SIZE]`
    tokens: Vec<u32>,
}

#[derive(Debug, Default)]
struct Page {
    n_owners: u32,
    contents: Option<Contents>,
    /// Key in `idle` while nobody owns the page.
    last_used: u64,
}

/// The cached beginning of a prompt.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// Pages, now owned by the caller too.
    pub pages: Vec<u32>,
    /// Hashes of the full pages among them.
    pub hashes: Vec<PageHash>,
    /// Tokens that need not run again.
    pub n_tokens: usize,
}

/// Hands out pages of [`PAGE_SIZE`] tokens.
#[derive(Debug)]
pub struct BlockManager {
    pages: Vec<Page>,
    free: Vec<u32>,
    /// Pages that nobody owns but a prompt may find, by time of last use.
    idle: BTreeMap<u64, u32>,
    /// Pages with known contents, by the hash of the page before them.
    children: HashMap<PageHash, Vec<u32>>,
    clock: u64,
}

impl BlockManager {
    /// All pages free; enough of them for `n_tokens` in one sequence.
    pub fn for_tokens(n_tokens: usize) -> BlockManager {
        let n_pages = n_tokens.div_ceil(PAGE_SIZE);
        BlockManager {
            pages: (0..n_pages).map(|_| Page::default()).collect(),
            free: (0..n_pages as u32).rev().collect(),
            idle: BTreeMap::new(),
            children: HashMap::new(),
            clock: 0,
        }
    }

    /// Slots of all pages.
    pub fn n_slots(&self) -> usize {
        self.n_pages() * PAGE_SIZE
    }

    /// All pages.
    pub fn n_pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages nobody owns, idle ones included.
    pub fn n_available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages nobody owns that a prompt may find.
    pub fn n_idle(&self) -> usize {
        self.idle.len()
    }

    /// Pages that some sequence owns.
    pub fn n_used(&self) -> usize {
        self.n_pages() - self.n_available()
    }

    /// Grows `pages` until it holds `n_tokens`; false, and nothing changed, when there are too few.
    pub fn grow(&mut self, pages: &mut Vec<u32>, n_tokens: usize) -> bool {
        let missing = n_tokens.div_ceil(PAGE_SIZE).saturating_sub(pages.len());
        if missing > self.n_available() {
            return false;
        }
        pages.extend((0..missing).filter_map(|_| self.take()));
        true
    }

    /// [`BlockManager::grow`] by pages that hold nothing that a prompt may find.
    pub fn grow_by_free(&mut self, pages: &mut Vec<u32>, n_tokens: usize) -> bool {
        let missing = n_tokens.div_ceil(PAGE_SIZE).saturating_sub(pages.len());
        missing <= self.free.len() && self.grow(pages, n_tokens)
    }

    /// Gives back the pages that `n_tokens` do not need, in the order that undoes their taking.
    pub fn trim(&mut self, pages: &mut Vec<u32>, n_tokens: usize) {
        let n_pages = n_tokens.div_ceil(PAGE_SIZE);
        if n_pages < pages.len() {
            self.release(&mut pages.split_off(n_pages));
        }
    }

    /// Gives all pages back; those with known contents become idle, the end of the sequence to be reused first.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        for page_id in pages.drain(..).rev() {
            let page = &mut self.pages[page_id as usize];
            page.n_owners -= 1;
            if page.n_owners > 0 {
                continue;
            }
            if page.contents.is_some() {
                self.clock += 1;
                page.last_used = self.clock;
                self.idle.insert(self.clock, page_id);
            } else {
                self.free.push(page_id);
            }
        }
    }

    /// Finds the longest cached beginning of `tokens`, and makes the caller an owner of its pages.
    ///
    /// Full pages are shared. After them, a page that holds the next tokens in part, and that nobody owns, is handed
    /// over to be continued, if more than half of it is of use.
    pub fn find_prefix(&mut self, tokens: &[u32]) -> Prefix {
        let mut found = Prefix::default();
        loop {
            let rest = &tokens[found.n_tokens..];
            let parent = found.hashes.last().copied().unwrap_or(ROOT);
            let candidates = self.children.get(&parent).map_or(&[][..], Vec::as_slice);
            let contents = |page_id: u32| self.pages[page_id as usize].contents.as_ref();
            let full = candidates.iter().copied().find_map(|page_id| {
                let contents = contents(page_id)?;
                let hash = contents.hash?;
                rest.starts_with(&contents.tokens).then_some((page_id, hash))
            });
            if let Some((page_id, hash)) = full {
                self.own(page_id);
                found.pages.push(page_id);
                found.hashes.push(hash);
                found.n_tokens += PAGE_SIZE;
                continue;
            }
            let partial = candidates
                .iter()
                .copied()
                .filter(|page_id| self.pages[*page_id as usize].n_owners == 0)
                .filter_map(|page_id| {
                    let tokens = &contents(page_id)?.tokens;
                    let n_common = tokens.iter().zip(rest).take_while(|(a, b)| a == b).count();
                    (2 * n_common > tokens.len()).then_some((n_common, page_id))
                })
                .max();
            if let Some((n_common, page_id)) = partial {
                self.own(page_id);
                self.forget(page_id);
                found.pages.push(page_id);
                found.n_tokens += n_common;
            }
            return found;
        }
    }

    /// Makes what `pages` hold known: the first `tokens.len()` slots hold `tokens`. `hashes` are those of the full pages
    /// that are known already, and grows. `and_rest` includes the last, partly filled page, which must not be written to
    /// any more.
    pub fn publish(&mut self, pages: &[u32], hashes: &mut Vec<PageHash>, tokens: &[u32], and_rest: bool) {
        for (page_idx, part) in tokens.chunks(PAGE_SIZE).enumerate().skip(hashes.len()) {
            let is_full = part.len() == PAGE_SIZE;
            if !is_full && !and_rest {
                break;
            }
            let parent = hashes.last().copied().unwrap_or(ROOT);
            let hash = is_full.then(|| page_hash(&parent, part));
            self.describe(pages[page_idx], Contents { parent, hash, tokens: part.to_vec() });
            hashes.extend(hash);
        }
    }

    /// Whether a full page of this hash is in the cache.
    pub fn contains(&self, parent: &PageHash, tokens: &[u32]) -> bool {
        self.children.get(parent).is_some_and(|ids| {
            ids.iter().any(|id| {
                self.pages[*id as usize].contents.as_ref().is_some_and(|c| c.hash.is_some() && c.tokens == tokens)
            })
        })
    }

    fn describe(&mut self, page_id: u32, contents: Contents) {
        // A second copy of a page would never be found, and would keep the first one's place.
        if contents.hash.is_some() && self.contains(&contents.parent, &contents.tokens) {
            return;
        }
        self.children.entry(contents.parent).or_default().push(page_id);
        self.pages[page_id as usize].contents = Some(contents);
    }

    fn own(&mut self, page_id: u32) {
        let page = &mut self.pages[page_id as usize];
        if page.n_owners == 0 {
            self.idle.remove(&page.last_used);
        }
        page.n_owners += 1;
    }

    /// A page of one's own with nothing in it.
    fn take(&mut self) -> Option<u32> {
        let page_id = match self.free.pop() {
            Some(page_id) => page_id,
            None => {
                let (_, page_id) = self.idle.pop_first()?;
                self.forget(page_id);
                page_id
            }
        };
        self.pages[page_id as usize].n_owners = 1;
        Some(page_id)
    }

    fn forget(&mut self, page_id: u32) {
        let Some(contents) = self.pages[page_id as usize].contents.take() else { return };
        if let Some(siblings) = self.children.get_mut(&contents.parent) {
            siblings.retain(|id| *id != page_id);
            if siblings.is_empty() {
                self.children.remove(&contents.parent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const P: usize = PAGE_SIZE;

    /// Runs `tokens` through the cache as a sequence would and returns how many were found.
    fn run(blocks: &mut BlockManager, tokens: &[u32]) -> usize {
        let Prefix { mut pages, mut hashes, n_tokens } = blocks.find_prefix(&tokens[..tokens.len() - 1]);
        assert!(blocks.grow(&mut pages, tokens.len()));
        blocks.publish(&pages, &mut hashes, tokens, true);
        blocks.release(&mut pages);
        n_tokens
    }

    fn tokens(n: usize, seed: u32) -> Vec<u32> {
        (0..n as u32).map(|i| i.wrapping_mul(7).wrapping_add(seed)).collect()
    }

    #[test]
    fn pages_grow_run_out_and_come_back() {
        let mut blocks = BlockManager::for_tokens(3 * P);
        let (mut a, mut b) = (vec![], vec![]);
        assert!(blocks.grow(&mut a, 1));
        assert!(blocks.grow(&mut a, P));
        assert_eq!(a, [0]);
        assert!(blocks.grow(&mut b, P + 1));
        assert_eq!(b.len(), 2);
        assert!(!blocks.grow(&mut a, P + 1));
        assert_eq!(a.len(), 1);
        blocks.release(&mut b);
        assert_eq!((blocks.n_available(), blocks.n_used()), (2, 1));
        assert!(blocks.grow(&mut a, 3 * P));
    }

    #[test]
    fn a_conversation_finds_everything_before_its_last_token() {
        let mut blocks = BlockManager::for_tokens(16 * P);
        let text = tokens(5 * P, 1);
        assert_eq!(run(&mut blocks, &text[..100]), 0);
        assert_eq!(run(&mut blocks, &text[..150]), 100, "the partly filled page is continued");
        assert_eq!(run(&mut blocks, &text[..3 * P]), 150);
        assert_eq!(run(&mut blocks, &text[..3 * P + 1]), 3 * P);
        assert_eq!(run(&mut blocks, &text[..3 * P + 1]), 3 * P, "the last token must run for its logits");
        assert_eq!(run(&mut blocks, &tokens(100, 5)), 0);
        assert_eq!(blocks.n_used(), 0);
    }

    #[test]
    fn owned_pages_are_shared_when_full_and_left_alone_when_not() {
        let mut blocks = BlockManager::for_tokens(16 * P);
        let text = tokens(2 * P + 10, 1);
        let (mut pages, mut hashes) = (vec![], vec![]);
        assert!(blocks.grow(&mut pages, text.len()));
        blocks.publish(&pages, &mut hashes, &text, false);
        assert_eq!(hashes.len(), 2);
        let mut other = blocks.find_prefix(&text);
        assert_eq!((other.n_tokens, &other.pages[..]), (2 * P, &pages[..2]));
        blocks.release(&mut other.pages);
        assert_eq!(blocks.n_used(), 3);
        blocks.release(&mut pages);
        assert_eq!((blocks.n_used(), blocks.n_idle()), (0, 2));
    }

    #[test]
    fn the_least_recently_used_end_goes_first() {
        let mut blocks = BlockManager::for_tokens(4 * P);
        let (old, new) = (tokens(2 * P, 1), tokens(2 * P, 2));
        run(&mut blocks, &old);
        run(&mut blocks, &new);
        // One page more: the end of the older text is given up.
        let mut pages = vec![];
        assert!(blocks.grow(&mut pages, 1));
        blocks.release(&mut pages);
        let mut found = blocks.find_prefix(&old);
        assert_eq!(found.n_tokens, P);
        blocks.release(&mut found.pages);
        let mut found = blocks.find_prefix(&new);
        assert_eq!(found.n_tokens, 2 * P);
        blocks.release(&mut found.pages);
    }

    proptest! {
        #[test]
        fn whatever_is_found_was_published(lengths in prop::collection::vec((1usize..4 * P, 0u32..3), 1..40)) {
            let mut blocks = BlockManager::for_tokens(6 * P);
            // What each page really holds.
            let mut slots = vec![vec![u32::MAX; P]; blocks.n_pages()];
            for (n, seed) in lengths {
                let mut text = tokens(n, seed);
                text[n / 2] = n as u32 % 5;
                let Prefix { mut pages, mut hashes, n_tokens } = blocks.find_prefix(&text[..n - 1]);
                for position in 0..n_tokens {
                    prop_assert_eq!(slots[pages[position / P] as usize][position % P], text[position]);
                }
                prop_assert!(blocks.grow(&mut pages, n));
                for position in n_tokens..n {
                    slots[pages[position / P] as usize][position % P] = text[position];
                }
                blocks.publish(&pages, &mut hashes, &text, true);
                blocks.release(&mut pages);
                prop_assert_eq!(blocks.n_used(), 0);
                prop_assert_eq!(blocks.n_available(), blocks.n_pages());
            }
        }
    }
}
