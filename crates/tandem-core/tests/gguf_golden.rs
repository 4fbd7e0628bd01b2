//! Agreement of the block formats with the gguf package (`tests/golden/gguf/blocks.safetensors`).

use std::path::Path;

use safetensors::tensor::SafeTensors;
use tandem_core::dtype::Float;
use tandem_core::gguf::GgmlType;
use tandem_core::quant::PackedView;

#[test]
fn blocks_decode_to_the_reference_values() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/gguf/blocks.safetensors");
    let file = std::fs::read(path).expect("the golden file");
    let golden = SafeTensors::deserialize(&file).expect("safetensors");
    for (name, kind) in [
        ("Q4_0", GgmlType::Q4_0),
        ("Q4_1", GgmlType::Q4_1),
        ("Q5_0", GgmlType::Q5_0),
        ("Q5_1", GgmlType::Q5_1),
        ("Q8_0", GgmlType::Q8_0),
        ("Q4_K", GgmlType::Q4K),
        ("Q5_K", GgmlType::Q5K),
        ("Q6_K", GgmlType::Q6K),
        ("MXFP4", GgmlType::Mxfp4),
    ] {
        let tensor = |leaf: &str| golden.tensor(&format!("{name}.{leaf}")).expect("stored").data().to_vec();
        let (blocks, values) = (tensor("blocks"), tensor("values"));
        let expected: Vec<f32> = (0..values.len() / 4).map(|i| Float::F32.read(&values, i)).collect();
        // With a fixed offset, ggml multiplies q - 8 where d * q - 8 * d is computed here: one more rounding.
        let check = |found: &[f32], how: &str| {
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let tolerance = 2e-6 * expected.abs().max(0.5);
                assert!((found - expected).abs() <= tolerance, "{name} {how} {i}: {found}, expected {expected}");
            }
        };
        let mut found = vec![0.0; expected.len()];
        kind.dequantize_row(&blocks, &mut found);
        check(&found, "decoded");
        if matches!(kind, GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K | GgmlType::Mxfp4) {
            assert_eq!(found, expected, "{name} has the same operations");
        }
        if let Some(dtype) = kind.exact() {
            let (mut weight, mut scales, mut biases) = (vec![], vec![], vec![]);
            kind.repack_row(&blocks, &mut weight, &mut scales, &mut biases);
            let view = PackedView::new(dtype, 1, expected.len(), &weight, &scales, &biases).expect("whole groups");
            check(&view.dequantize(), "repacked");
        }
    }
}
