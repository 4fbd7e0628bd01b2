//! A tokenizer in the metadata of a GGUF file, of any bytes: planning its conversion must not panic.

#![no_main]

mod shared;

use libfuzzer_sys::fuzz_target;
use shared::{allow_caught_panics, in_folder};
use tandem_convert::ConvertOptions;

fuzz_target!(init: allow_caught_panics(), |data: &[u8]| {
    in_folder(|dir| {
        let path = dir.join("model.gguf");
        std::fs::write(&path, data).expect("writable");
        let options = ConvertOptions::new(&path.display().to_string(), "keep");
        if let Err(error) = tandem_convert::plan(&options, &mut |_| {}) {
            assert!(!error.to_string().is_empty());
        }
    });
});
