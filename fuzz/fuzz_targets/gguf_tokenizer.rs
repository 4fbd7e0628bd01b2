//! A tokenizer in the metadata of a GGUF file, of any bytes: planning its conversion must not panic.

#![no_main]

use std::cell::OnceCell;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tandem_convert::ConvertOptions;
use tempfile::TempDir;

thread_local! {
    static DIR: OnceCell<TempDir> = const { OnceCell::new() };
}

fuzz_target!(init: {
    // A panic of the tokenizers crate on a malformed file is caught, and becomes an error.
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !tandem_text::tokenizer::is_guarded() {
            abort(info);
        }
    }));
}, |data: &[u8]| {
    DIR.with(|cell| {
        let dir = cell.get_or_init(|| {
            let shm = Path::new("/dev/shm");
            if shm.is_dir() { TempDir::new_in(shm) } else { TempDir::new() }.expect("a temporary folder")
        });
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, data).expect("writable");
        let options = ConvertOptions::new(&path.display().to_string(), "keep");
        if let Err(error) = tandem_convert::plan(&options, &mut |_| {}) {
            assert!(!error.to_string().is_empty());
        }
    });
});
