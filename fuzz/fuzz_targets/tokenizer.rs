//! tokenizer.json and tokenizer_config.json of any bytes, one after the other behind a length: loading, encoding and
//! decoding must not panic, and a stream must give what decoding at once gives.

#![no_main]

use std::cell::OnceCell;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tandem_text::Tokenizer;
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
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return };
    let (config, tokenizer) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    DIR.with(|cell| {
        let dir = cell.get_or_init(|| {
            let shm = Path::new("/dev/shm");
            if shm.is_dir() { TempDir::new_in(shm) } else { TempDir::new() }.expect("a temporary folder")
        });
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer).expect("writable");
        std::fs::write(dir.path().join("tokenizer_config.json"), config).expect("writable");
        let tokenizer = match Tokenizer::from_dir(dir.path()) {
            Ok(tokenizer) => tokenizer,
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        let Ok(ids) = tokenizer.encode("Hello <|im_end|> w\u{f6}rld 12\r\n", true) else { return };
        let Ok(text) = tokenizer.decode(&ids, false) else { return };
        let mut stream = tokenizer.decode_stream(false);
        let mut pieces = String::new();
        for id in ids {
            let Ok(piece) = stream.push(id) else { return };
            pieces += &piece;
        }
        if let Ok(rest) = stream.flush() {
            assert_eq!(pieces + &rest, text);
        }
    });
});
