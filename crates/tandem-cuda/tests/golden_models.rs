//! Every fixture checkpoint on a GPU, through every path. Without a device these tests say so and pass.

#[path = "../../tandem-engine/tests/golden/mod.rs"]
mod golden;

use golden::{check_all, check_fast};
use tandem_cuda::{CudaBackend, Numerics, Options, device_present};

fn backend(options: Options) -> CudaBackend {
    CudaBackend::new(options).expect("a device")
}

fn skipped() -> bool {
    let skip = !device_present();
    if skip {
        eprintln!("skipped: no NVIDIA device here; scripts/gpu-check runs this on one");
    }
    skip
}

#[test]
fn single_precision_matches_the_reference_logits_on_every_path() {
    if !skipped() {
        check_all(|| backend(Options::new(Numerics::F32)));
    }
}

#[test]
fn launches_one_by_one_match_the_reference_logits() {
    if !skipped() {
        check_all(|| backend(Options { graphs: false, programmatic: false, ..Options::new(Numerics::F32) }));
    }
}

#[test]
fn bf16_activations_stay_within_the_fixtures_tolerance() {
    if !skipped() {
        check_fast("bf16", || backend(Options::new(Numerics::Bf16)));
        check_fast("bf16 without graphs", || {
            backend(Options { graphs: false, programmatic: false, ..Options::new(Numerics::Bf16) })
        });
    }
}
