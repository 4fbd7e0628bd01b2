//! Quantising an unquantised checkpoint in memory gives the bytes of the published quantised one, from either layout.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tandem_core::dtype::{DType, Float};
use tandem_core::weights::{Form, MatrixData};
use tandem_core::{Checkpoint, ModelConfig};

const AFFINE8: DType = DType::Affine { bits: 8, group_size: 64, params: Float::BF16 };

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every weight of a checkpoint by name.
fn matrices(dir: &Path) -> BTreeMap<String, (Form, MatrixData)> {
    let config = ModelConfig::load(dir).expect("config.json");
    let checkpoint = Checkpoint::open(dir).expect("weights");
    tandem_model::resolve(&checkpoint, &config)
        .expect("complete")
        .iter()
        .map(|w| {
            let name = format!("{}.{}", w.spec.module, w.spec.leaf);
            (name, (w.spec.form, w.matrix(&checkpoint).expect("sound")))
        })
        .collect()
}

/// MXFP4-Q8: experts in mxfp4, what else has whole groups in affine, the rest as it is.
fn mxfp4_q8(name: &str, form: Form, matrix: &MatrixData) -> DType {
    match form {
        Form::Vector => matrix.dtype,
        Form::Experts => DType::Mxfp4,
        _ if name.ends_with("mlp.gate.weight") || !matrix.cols.is_multiple_of(64) => matrix.dtype,
        _ => AFFINE8,
    }
}

/// Checks that quantising `source` gives `quantized`, byte for byte.
fn check(source: &Path, quantized: &Path) {
    let (source, quantized) = (matrices(source), matrices(quantized));
    assert_eq!(source.keys().collect::<Vec<_>>(), quantized.keys().collect::<Vec<_>>());
    let mut n_quantized = 0;
    for (name, (form, matrix)) in &source {
        let (_, expected) = &quantized[name];
        let dtype = mxfp4_q8(name, *form, matrix);
        assert_eq!(dtype, expected.dtype, "{name}: format");
        let found = if dtype == matrix.dtype { matrix.clone() } else { matrix.quantize(dtype).expect("fits") };
        n_quantized += usize::from(dtype != matrix.dtype);
        assert_eq!((found.rows, found.cols, found.parts.len()), (expected.rows, expected.cols, expected.parts.len()));
        for (i, (found, expected)) in found.parts.iter().zip(&expected.parts).enumerate() {
            for (part, found, expected) in [
                ("weight", &found.weight, &expected.weight),
                ("scales", &found.scales, &expected.scales),
                ("biases", &found.biases, &expected.biases),
            ] {
                let first = found.iter().zip(expected).position(|(f, e)| f != e);
                let what = "(first different byte, length)";
                assert_eq!((first, found.len()), (None, expected.len()), "{name} part {i} {part}: {what}");
            }
        }
    }
    assert!(n_quantized > 20, "only {n_quantized} matrices were quantised");
    for kind in ["embed_q", "unembed_out", "switch_mlp"] {
        assert!(source.keys().any(|name| name.contains(kind)), "no {kind} was compared");
    }
}

#[test]
fn quantising_the_tiny_model_gives_the_published_bytes() {
    let models = root().join("tests/golden/models");
    check(&models.join("glm51_tiny_bf16"), &models.join("glm51_tiny"));
}

/// The 58 MB original is not in the repository; `TANDEM_FABLE_BF16` names its folder.
#[test]
fn quantising_the_hugging_face_fable_gives_the_bundled_bytes() {
    if let Some(original) = std::env::var_os("TANDEM_FABLE_BF16") {
        check(Path::new(&original), &root().join("models/fable-30m-MXFP4-Q8"));
    }
}
