//! tokenizer.json and tokenizer_config.json of any bytes, one after the other behind a length: loading, encoding and
//! decoding must not panic, and a stream must give what decoding at once gives.

#![no_main]

mod shared;

use libfuzzer_sys::fuzz_target;
use shared::{allow_caught_panics, in_folder};
use tandem_text::Tokenizer;

fuzz_target!(init: allow_caught_panics(), |data: &[u8]| {
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return };
    let (config, tokenizer) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    in_folder(|dir| {
        std::fs::write(dir.join("tokenizer.json"), tokenizer).expect("writable");
        std::fs::write(dir.join("tokenizer_config.json"), config).expect("writable");
        let tokenizer = match Tokenizer::from_dir(dir) {
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
