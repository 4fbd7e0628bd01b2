//! A GGUF file from any bytes: opening it, repacking and decoding every row must not panic.

#![no_main]

mod shared;

use libfuzzer_sys::fuzz_target;
use shared::in_folder;
use tandem_core::gguf::Gguf;

const MAX_ELEMENTS: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    in_folder(|dir| {
        let path = dir.join("model.gguf");
        std::fs::write(&path, data).expect("writable");
        let gguf = match Gguf::open(&path) {
            Ok(gguf) => gguf,
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        for name in gguf.names() {
            let tensor = gguf.tensor(name).expect("listed");
            let (block, size) = tensor.ggml_type.block();
            let cols = *tensor.shape.last().expect("at least one dimension");
            let bytes = gguf.bytes(tensor);
            if cols == 0 || cols > MAX_ELEMENTS {
                continue;
            }
            let mut values = vec![0.0; cols];
            for row in bytes.chunks_exact(cols / block * size).take(4) {
                tensor.ggml_type.dequantize_row(row, &mut values);
                if let Some(dtype) = tensor.ggml_type.exact() {
                    let (mut weight, mut scales, mut biases) = (vec![], vec![], vec![]);
                    tensor.ggml_type.repack_row(row, &mut weight, &mut scales, &mut biases);
                    assert_eq!(weight.len() + scales.len() + biases.len(), dtype.total_bytes(1, cols));
                }
            }
        }
    });
});
