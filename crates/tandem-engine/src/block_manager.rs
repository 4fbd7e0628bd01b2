//! Pages of the key-value cache: who owns which.

use tandem_core::backend::PAGE_SIZE;

/// Hands out pages of [`PAGE_SIZE`] tokens.
#[derive(Debug)]
pub struct BlockManager {
    free: Vec<u32>,
    n_pages: usize,
}

impl BlockManager {
    /// All pages free; enough of them for `n_tokens` in one sequence.
    pub fn for_tokens(n_tokens: usize) -> BlockManager {
        let n_pages = n_tokens.div_ceil(PAGE_SIZE);
        BlockManager { free: (0..n_pages as u32).rev().collect(), n_pages }
    }

    /// Slots of all pages.
    pub fn n_slots(&self) -> usize {
        self.n_pages * PAGE_SIZE
    }

    /// Pages nobody owns.
    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Grows `pages` until it holds `n_tokens`; false, and nothing changed, when there are too few.
    pub fn grow(&mut self, pages: &mut Vec<u32>, n_tokens: usize) -> bool {
        let missing = n_tokens.div_ceil(PAGE_SIZE).saturating_sub(pages.len());
        if missing > self.free.len() {
            return false;
        }
        pages.extend(self.free.drain(self.free.len() - missing..).rev());
        true
    }

    /// Takes back the pages that `n_tokens` do not need.
    pub fn shrink(&mut self, pages: &mut Vec<u32>, n_tokens: usize) {
        let kept = n_tokens.div_ceil(PAGE_SIZE).min(pages.len());
        self.free.extend(pages.drain(kept..).rev());
    }

    /// Takes all pages back.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        self.shrink(pages, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_grow_run_out_and_come_back() {
        let mut blocks = BlockManager::for_tokens(3 * PAGE_SIZE);
        let (mut a, mut b) = (vec![], vec![]);
        assert!(blocks.grow(&mut a, 1));
        assert!(blocks.grow(&mut a, PAGE_SIZE));
        assert_eq!(a, [0]);
        assert!(blocks.grow(&mut b, PAGE_SIZE + 1));
        assert_eq!(b.len(), 2);
        assert!(!blocks.grow(&mut a, PAGE_SIZE + 1));
        assert_eq!(a.len(), 1);
        blocks.shrink(&mut b, PAGE_SIZE);
        assert_eq!((blocks.n_free(), b.len()), (1, 1));
        blocks.release(&mut b);
        assert_eq!(blocks.n_free(), 2);
        assert!(blocks.grow(&mut a, 3 * PAGE_SIZE));
    }
}
