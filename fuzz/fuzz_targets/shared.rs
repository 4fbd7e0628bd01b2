//! What targets share.

#![allow(dead_code)] // Each uses a part.

use std::cell::OnceCell;
use std::path::Path;

use tempfile::TempDir;

thread_local! {
    static DIR: OnceCell<TempDir> = const { OnceCell::new() };
}

/// Runs `work` with a folder that all inputs share, in memory where there is such a place.
pub fn in_folder<T>(work: impl FnOnce(&Path) -> T) -> T {
    DIR.with(|cell| {
        let dir = cell.get_or_init(|| {
            let shm = Path::new("/dev/shm");
            if shm.is_dir() { TempDir::new_in(shm) } else { TempDir::new() }.expect("a temporary folder")
        });
        work(dir.path())
    })
}

/// Lets panics of the tokenizers crate on malformed files be: they are caught, and become errors. Called before the first
/// input.
pub fn allow_caught_panics() {
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !tandem_text::tokenizer::is_guarded() {
            abort(info);
        }
    }));
}
